"""Prints the receipt of an erasure for people."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.privacy.receipt import Receipt


def receipt_lines(receipt: Receipt) -> Iterator[str]:
    """Yield the lines of a receipt."""
    yield f"Erasure {receipt.erasure}, requested {receipt.requested_at:%Y-%m-%d %H:%M:%S} UTC"
    yield from _change_lines(receipt)
    yield from _search_lines(receipt)
    if receipt.shared:
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(receipt.shared.items()))
        yield f"  shared      {counts}: values that other people show too; removed from the person's rows only"
    for reason in receipt.unreached:
        yield f"  not reached {reason}"
    yield f"  sales_daily {_sums_text(receipt)}"
    yield f"  {receipt.seconds:.1f} s"


def _change_lines(receipt: Receipt) -> Iterator[str]:
    rewritten = [one for one in receipt.rewritten if one.rows]
    rows, files = sum(one.rows for one in rewritten), sum(one.files for one in rewritten)
    yield f"  rewritten   {rows:,} bronze rows in {files:,} files of {len(rewritten)} tables"
    history = receipt.forgotten
    snapshots, files = sum(one.snapshots_expired for one in history), sum(one.files_deleted for one in history)
    size, tombstones = sum(one.bytes_deleted for one in history), sum(one.tombstones for one in history)
    yield f"  deleted     {snapshots:,} snapshots, {files:,} files ({size:,} bytes), {tombstones:,} tombstones"


def _search_lines(receipt: Receipt) -> Iterator[str]:
    found = receipt.searched
    if receipt.proved:
        yield (
            f"  searched    {found.files:,} files, {found.bytes_decoded:,} bytes decoded, for {receipt.values} texts: "
            f"{len(found.matches)} files contain one"
        )
    else:
        yield "  searched    not proved: the list of texts to search for is not on this machine"
    for path in found.matches:
        yield f"              {path}"
    if found.unread:
        yield (
            f"  unread      {len(found.unread)} files cannot be decoded and may contain one of the texts. "
            "Delete them if they are not needed:"
        )
    for path in found.unread:
        yield f"              {path}"


def _sums_text(receipt: Receipt) -> str:
    if receipt.sums_equal:
        return "unchanged to the last digit"
    if receipt.arrived:
        return f"not compared: {receipt.arrived:,} rows arrived during the erasure"
    return "CHANGED, although no row arrived"
