"""A text is found wherever a file may hide it, and only where it stands alone."""

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
    """Packed by Zstandard."""
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


NEEDLES = SearchTerms(("Ada@X.example", "+49 151 2345", "Zoë Straße"))


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
        # as others write it: line ends, what need not be escaped, JSON in JSON, URLs
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
            json.dumps([["user", base64.b64encode(b"somebody else").decode()], ["b", base64.b64encode(b"\xff\xfe").decode()]]),
            False,
        ),
        ("half a pair: \\ud83d, and half an escape: \\u00, 100 %", False),
        (None, False),
    ],
)
def test_a_text_is_found_where_it_stands_alone(text: str | None, found: bool) -> None:
    assert NEEDLES.hits(pl.Series([text, "nothing"], dtype=pl.String)).to_list() == [found, False]


def test_which_texts_were_found_is_told() -> None:
    assert NEEDLES.found_in(pl.Series(["x ada@x.example y", "Zoë"])) == {"Ada@X.example"}


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy", "gzip"])
def test_parquet_is_read_whatever_its_encoding(compression: str, tmp_path: Path) -> None:
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
            assert search_bytes("f", content, NEEDLES).matches == ("f",)
            assert search_bytes("f", content, SearchTerms(("somebody else",))).matches == ()


@pytest.mark.parametrize("pack", [gzip.compress, zstd, bytes])
def test_packed_and_plain_files_are_read(pack: object) -> None:
    content = pack(json.dumps({"n": "Zoë Straße"}).encode())  # type: ignore[operator]
    assert search_bytes("f", content, NEEDLES).matches == ("f",)
    assert search_bytes("f", pack(b"{}"), NEEDLES).matches == ()  # type: ignore[operator]


def test_the_bounds_in_manifests_are_read(tmp_path: Path) -> None:
    table = Table("gold.people", "People.", (column("email", pa.string(), "E-mail.", personal="email"),), key=("email",))
    lake = Lake(Settings(home=tmp_path))
    handle = lake.load(table)
    # bounds are cut to 16 characters, so this one is whole
    handle.commit(handle.writer.write(pl.DataFrame({"email": ["ada@x.example"], "_seq": [1], "_group_hash": [1]})), positions={})
    found = LocalFileSystem().get_file_info(FileSelector(str(tmp_path), recursive=True))
    searched = search_files(LocalFileSystem(), [info for info in found if info.type == FileType.File], NEEDLES)
    assert sorted({Path(path).suffix for path in searched.matches}) == [".avro", ".parquet"]
    assert searched.files >= 4


@pytest.mark.parametrize("start", [b"PAR1", b"Obj\x01", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_half_a_file_is_searched_as_it_is_and_told(start: bytes) -> None:
    searched = search_bytes("f", start + b" ada@x.example", NEEDLES)
    assert (searched.files, searched.matches, searched.unread) == (1, ("f",), ("f",))
    assert search_bytes("f", start + b" nobody", NEEDLES).matches == ()
    assert search_bytes("f", b"whole, and text", NEEDLES).unread == ()


def test_a_file_that_vanishes_is_not_there() -> None:
    gone = LocalFileSystem().get_file_info("/nowhere/at/all")
    assert search_files(LocalFileSystem(), [gone], NEEDLES).files == 0


def test_nothing_is_looked_for_without_texts() -> None:
    assert search_bytes("f", b"anything", SearchTerms(())).matches == ()


def test_a_file_whose_content_did_not_come_is_not_one_that_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("something")
    listed = LocalFileSystem().get_file_info(str(tmp_path / "a"))
    (tmp_path / "a").write_bytes(b"")
    assert search_files(LocalFileSystem(), [listed], NEEDLES).unread == (str(tmp_path / "a"),)
