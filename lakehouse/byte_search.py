"""Whether texts are anywhere in files, decoded: Parquet by columns, Avro by records, gzip and zstd, and every file as it is.

A text is found where it stands alone: no letter or digit before or after it (of an e-mail address nor what may be part of
one), whatever its case, as it is, as JSON may escape it (within JSON too), as a URL does, or in base64 as the value of a
message's header.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote, unquote_plus

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSystem
from pyiceberg.avro.codecs import KNOWN_CODECS
from pyiceberg.avro.decoder import new_decoder
from pyiceberg.avro.file import META_SCHEMA
from pyiceberg.avro.resolver import construct_reader
from pyiceberg.typedef import Record
from pyiceberg.utils.schema_conversion import AvroSchemaConversion

PIECE = 1 << 20
"""Characters of what is not made of columns that are searched at a time."""
NESTED = 3
"""How often a text is read as escaped: JSON in JSON, a URL in it."""
_ESCAPED = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\[nrtbf\"\\/]")
_BASE64 = re.compile(r'"([A-Za-z0-9+/]+={0,2})"')
_PAIRS = '[["'
"""How a JSON list of [name, value in base64] begins: headers of messages."""
_MAY_BE_ESCAPED = r"^\[\[\"|\\[unrtbf\"\\/]|%[0-9A-Fa-f]{2}"


@dataclass(frozen=True)
class SearchTerms:
    """Texts to look for."""

    texts: tuple[str, ...]

    @cached_property
    def forms(self) -> dict[str, re.Pattern[str]]:
        """Each text, and as JSON writes it, in lower case -> where it stands alone."""
        lower = sorted({form for text in self.texts for form in _forms(text)})
        return {form: re.compile(_alone(form)) for form in lower}

    def hits(self, texts: pl.Series, *, binary: bool = False) -> pl.Series:
        """Which of these strings hold one of the texts (null: does not). binary: they are no text but bytes read as such."""
        found = self._hits(texts, binary)
        if not self.forms:
            return found
        rest = texts.str.contains(_MAY_BE_ESCAPED).fill_null(False) & ~found
        if binary:  # what is packed holds no escapes, only bytes that look like some
            rest &= texts.str.count_matches("\ufffd", literal=True) * 100 < texts.str.len_chars()
        rest = rest.arg_true()
        read = [(at, text) for at, raw in zip(rest, texts.gather(rest).to_list(), strict=True) for text in _unescaped(raw)]
        held = self._hits(pl.Series([text for _, text in read], dtype=pl.String), binary)
        places = sorted({at for (at, _), hit in zip(read, held, strict=True) if hit})
        return found.scatter(places, True) if places else found

    def _hits(self, texts: pl.Series, binary: bool) -> pl.Series:
        nothing = pl.repeat(False, len(texts), dtype=pl.Boolean, eager=True)
        if not self.forms:
            return nothing
        lower = texts.str.to_lowercase()
        places = lower.str.contains_any(list(self.forms)).fill_null(False).arg_true()
        sure = [self._found(text, binary) for text in lower.gather(places).to_list()]
        return nothing.scatter(places.filter(pl.Series(sure, dtype=pl.Boolean)), True)

    def found_in(self, texts: pl.Series) -> set[str]:
        """Which of the texts these strings hold."""
        held = texts.filter(self.hits(texts)).to_list()
        lower = [text.lower() for raw in held for text in (raw, *_unescaped(raw))]
        forms = {form for form, pattern in self.forms.items() if any(form in one and pattern.search(one) for one in lower)}
        return {text for text in self.texts if forms & _forms(text)}

    def _found(self, lower: str, binary: bool) -> bool:
        return any(
            form in lower and (pattern.search(lower) is not None or (binary and _measured(form, lower)))
            for form, pattern in self.forms.items()
        )


def _forms(text: str) -> set[str]:
    every = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return {form.lower() for form in every if form.strip()}


def _unescaped(text: str) -> Iterator[str]:
    """A text without the escapes of JSON and of URLs, as often as it has some; a URL's plus sign may be a space. Of a list of
    pairs also what stands there in base64."""
    if text.startswith(_PAIRS):
        for packed in _BASE64.findall(text):
            with contextlib.suppress(ValueError):  # it only looked like base64, or is no text
                yield base64.b64decode(packed, validate=True).decode()
    for _ in range(NESTED):
        plain = unquote(_ESCAPED.sub(_meant, text))
        if plain == text:
            return
        yield plain
        if "+" in text:
            yield unquote_plus(_ESCAPED.sub(_meant, text))
        text = plain


def _meant(escaped: re.Match[str]) -> str:
    text: str = json.loads(f'"{escaped[0]}"')
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no character


def _alone(form: str) -> str:
    before = r"(?<![\w.+-])" if "@" in form else r"(?<!\w)"
    return before + re.escape(form) + r"(?!\w)"


def _measured(form: str, lower: str) -> bool:
    """Whether a text stands after its own length, as Thrift and Avro write it: that may look like a letter."""
    length = len(form.encode())
    marks = [chr(number).lower() for number in (length, 2 * length) if number < 128]
    return any(mark + form in lower for mark in marks)


@dataclass(frozen=True)
class FileSearchResult:
    """What was searched, and in which files something was found.

    bytes_decoded  after decompression
    matches        the paths of files that hold a text
    unread         of files that cannot be read or decoded, a Parquet file without its end, say: these may hold one
    """

    files: int = 0
    bytes_read: int = 0
    bytes_decoded: int = 0
    matches: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def __add__(self, other: FileSearchResult) -> FileSearchResult:
        return FileSearchResult(
            self.files + other.files,
            self.bytes_read + other.bytes_read,
            self.bytes_decoded + other.bytes_decoded,
            self.matches + other.matches,
            self.unread + other.unread,
        )


def search_files(filesystem: FileSystem, files: Iterable[FileInfo], needles: SearchTerms) -> FileSearchResult:
    """Search files of a file system; one that vanishes meanwhile is not there any more."""
    total = FileSearchResult()
    for info in files:
        try:
            with filesystem.open_input_stream(info.path) as stream:
                content = stream.read()
        except FileNotFoundError:
            continue
        except OSError:
            total += FileSearchResult(1, unread=(info.path,))
            continue
        if info.size and not content:  # an object store's answer that broke off looks like an empty file
            total += FileSearchResult(1, unread=(info.path,))
            continue
        total += search_bytes(info.path, content, needles)
    return total


def search_bytes(path: str, content: bytes, needles: SearchTerms) -> FileSearchResult:
    """Search one file: as it is, and decoded."""
    raw = _pieces(content)
    decoded, found = len(content), bool(needles.hits(raw, binary=True).any())
    broken = False
    try:
        for texts in _decoded(content):
            decoded += int(texts.str.len_bytes().sum())
            found = found or bool(needles.hits(texts).any())
    except Exception:  # whatever a decoder says of what is none of its files, or half of one
        broken = True
    return FileSearchResult(1, len(content), decoded, (path,) if found else (), (path,) if broken else ())


def _decoded(content: bytes) -> Iterator[pl.Series]:
    """What a file holds beside its bytes, as strings."""
    if content[:4] == b"PAR1":
        yield from _parquet(content)
    elif content[:4] == b"Obj\x01":
        yield pl.Series(list(_avro(content)), dtype=pl.String)
    elif content[:2] == b"\x1f\x8b":
        yield _pieces(gzip.decompress(content))
    elif content[:4] == b"\x28\xb5\x2f\xfd":
        yield _pieces(pa.input_stream(io.BytesIO(content), compression="zstd").read())


def _parquet(content: bytes) -> Iterator[pl.Series]:
    """The distinct values of each column that may hold text, and the least and greatest that its statistics tell."""
    file = pq.ParquetFile(pa.BufferReader(content))
    names = [f.name for f in file.schema_arrow if _may_hold_text(f.type)]
    table = file.read(columns=names)
    for name in names:
        column = table.column(name)
        if pa.types.is_nested(column.type):
            yield pl.Series([json.dumps(value, default=str, ensure_ascii=False) for value in column.to_pylist()], dtype=pl.String)
        else:
            yield pl.Series([_text(value) for value in column.unique().to_pylist()], dtype=pl.String)
    told = []
    for group in range(file.metadata.num_row_groups):
        for number in range(file.metadata.num_columns):
            statistics = file.metadata.row_group(group).column(number).statistics
            if statistics is not None and statistics.has_min_max:
                told += [_text(one) for one in (statistics.min, statistics.max) if isinstance(one, str | bytes)]
    yield pl.Series(told, dtype=pl.String)


def _may_hold_text(type_: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(type_) for test in (*tests, pa.types.is_nested))


def _text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _avro(content: bytes) -> Iterator[str]:
    """Every text, and all bytes as text, of the records of an Avro file."""
    decoder = new_decoder(content)
    header = construct_reader(META_SCHEMA).read(decoder)
    codec = KNOWN_CODECS[header[1].get("avro.codec", "null")]
    reader = construct_reader(AvroSchemaConversion().avro_to_iceberg(json.loads(header[1]["avro.schema"])))
    while decoder.tell() < len(content):
        count, block = decoder.read_int(), decoder.read_bytes()
        records = new_decoder(codec.decompress(block) if codec is not None else block)
        for _ in range(count):
            yield from _leaves(reader.read(records))
        decoder.skip(len(header[2]))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, Record):
        for number in range(len(value)):
            yield from _leaves(value[number])
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


def _pieces(content: bytes) -> pl.Series:
    """Bytes as strings of bounded length that overlap, so that nothing is cut in two."""
    text = content.decode("utf-8", "replace")
    overlap = 4096
    return pl.Series([text[start : start + PIECE + overlap] for start in range(0, max(len(text), 1), PIECE)], dtype=pl.String)
