"""A text is found in every encoding that a file may use, and only as a whole word."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from lakehouse.byte_search import SearchTerms, search_bytes, search_files
from lakehouse.iceberg.catalog import Lake
from lakehouse.table import Table, column
from pipelines.settings import Settings


def zstd(content: bytes) -> bytes:
    """Return the content compressed with Zstandard."""
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


TERMS = SearchTerms(("Ada@X.example", "+49 151 2345", "Zoë Straße"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ada@x.example", True),
        ("mail ADA@X.EXAMPLE now", True),
        ("jada@x.example", False),
        ("joan.ada@x.example", False),
        ("ada@x.examples", False),
        ("email:ada@x.example", True),
        ('{"name": "Zo\\u00eb Stra\\u00dfe"}', True),
        ("zoë straße|12", True),
        ("call +49 151 2345", True),
        ("+49 151 23456", False),
        # other escapes: line ends, escapes that JSON does not require, JSON in JSON, URLs
        ('{"note": "write to:\\nada@x.example"}', True),
        ('{"note": "\\tAda@X.example\\r"}', True),
        ('{"who": "ada\\u0040x.example"}', True),
        ('{"who": "\\u002B49 151 2345"}', True),
        ('{"body": "{\\"who\\": \\"Zo\\\\u00EB Stra\\\\u00DFe\\"}"}', True),
        ("/?mail=ada%40x.example&page=2", True),
        ("/?phone=%2B49%20151%202345", True),
        ("/?phone=%2B49+151+2345", True),
        ("/?name=Zo%C3%AB+Stra%C3%9Fe", True),
        ("/?mail=j%61da%40x.example", False),
        (json.dumps([["h", "x"], ["user", base64.b64encode("Zoë Straße".encode()).decode()]]), True),
        (
            json.dumps([["user", base64.b64encode(b"another user").decode()], ["b", base64.b64encode(b"\xff\xfe").decode()]]),
            False,
        ),
        ("half a pair: \\ud83d, and half an escape: \\u00, 100 %", False),
        (None, False),
    ],
)
def test_a_text_matches_as_a_whole_word(text: str | None, found: bool) -> None:
    assert TERMS.hits(pl.Series([text, "nothing"], dtype=pl.String)).to_list() == [found, False]


def test_found_in_returns_the_contained_texts() -> None:
    assert TERMS.found_in(pl.Series(["x ada@x.example y", "Zoë"])) == {"Ada@X.example"}


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy", "gzip"])
def test_parquet_is_decoded_with_every_compression_and_encoding(compression: str, tmp_path: Path) -> None:
    values = ["x"] * 1000 + ["ada@x.example"]
    for dictionary in (True, False):
        for column_ in (
            pa.array(values),
            pa.array([value.encode() for value in values]),
            pa.array([[value] for value in values]),
            pa.array([{"mail": value} for value in values]),
        ):
            pq.write_table(pa.table({"c": column_}), tmp_path / "f", compression=compression, use_dictionary=dictionary)
            content = (tmp_path / "f").read_bytes()
            assert search_bytes("f", content, TERMS).matches == ("f",)
            assert search_bytes("f", content, SearchTerms(("another user",))).matches == ()


@pytest.mark.parametrize("compress", [gzip.compress, zstd, bytes])
def test_compressed_and_plain_files_are_searched(compress: object) -> None:
    content = compress(json.dumps({"n": "Zoë Straße"}).encode())  # type: ignore[operator]
    assert search_bytes("f", content, TERMS).matches == ("f",)
    assert search_bytes("f", compress(b"{}"), TERMS).matches == ()  # type: ignore[operator]


def test_column_bounds_in_manifests_are_searched(tmp_path: Path) -> None:
    table = Table("gold.people", "People.", (column("email", pa.string(), "E-mail.", personal="email"),), key=("email",))
    lake = Lake(Settings(home=tmp_path))
    handle = lake.load(table)
    # bounds are truncated to 16 characters, so this one is complete
    handle.commit(handle.writer.write(pl.DataFrame({"email": ["ada@x.example"], "_seq": [1], "_group_hash": [1]})), positions={})
    found = LocalFileSystem().get_file_info(FileSelector(str(tmp_path), recursive=True))
    searched = search_files(LocalFileSystem(), [info for info in found if info.type == FileType.File], TERMS)
    assert sorted({Path(path).suffix for path in searched.matches}) == [".avro", ".parquet"]
    assert searched.files >= 4


@pytest.mark.parametrize("start", [b"PAR1", b"Obj\x01", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_a_truncated_file_is_searched_raw_and_reported_as_unread(start: bytes) -> None:
    searched = search_bytes("f", start + b" ada@x.example", TERMS)
    assert (searched.files, searched.matches, searched.unread) == (1, ("f",), ("f",))
    assert search_bytes("f", start + b" no match", TERMS).matches == ()
    assert search_bytes("f", b"whole, and text", TERMS).unread == ()


def test_a_deleted_file_is_skipped() -> None:
    deleted = LocalFileSystem().get_file_info("/nowhere/at/all")
    assert search_files(LocalFileSystem(), [deleted], TERMS).files == 0


def test_without_texts_nothing_matches() -> None:
    assert search_bytes("f", b"anything", SearchTerms(())).matches == ()


def test_a_file_read_without_its_content_is_reported_as_unread(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("something")
    listed = LocalFileSystem().get_file_info(str(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"")
    assert search_files(LocalFileSystem(), [listed], TERMS).unread == (str(tmp_path / "a"),)
