"""Search of files for texts, in raw and decoded form: Parquet by columns, Avro by records, gzip and zstd decompressed.

A text matches as a whole word: no letter or digit directly before or after it (for an e-mail address also none of the other
characters that may be part of one), in any case. It is found as it is, escaped in JSON (also JSON in JSON), escaped in a URL,
or encoded in base64 as the value of a message header.
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

CHUNK_CHARACTERS = 1 << 20
"""Characters of raw content that are searched at a time."""
CHUNK_OVERLAP = 4096
"""Characters that consecutive chunks share; a longer text could be missed."""
MAX_ESCAPE_DEPTH = 3
"""How many levels of escapes are removed from a text: JSON in JSON, a URL in it."""
MAGIC_PARQUET, MAGIC_AVRO, MAGIC_GZIP, MAGIC_ZSTD = b"PAR1", b"Obj\x01", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ESCAPED = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\[nrtbf\"\\/]")
_BASE64 = re.compile(r'"([A-Za-z0-9+/]+={0,2})"')
_HEADERS_PREFIX = '[["'
"""The first characters of message headers: a JSON list of [name, value in base64]."""
_MAY_BE_ESCAPED = r"^\[\[\"|\\[unrtbf\"\\/]|%[0-9A-Fa-f]{2}"


@dataclass(frozen=True)
class SearchTerms:
    """The texts to search for."""

    texts: tuple[str, ...]

    @cached_property
    def patterns(self) -> dict[str, re.Pattern[str]]:
        """The pattern for each written form of a text: as it is and as JSON escapes it, in lower case."""
        lower = sorted({form for text in self.texts for form in _written_forms(text)})
        return {form: re.compile(_whole_word(form)) for form in lower}

    def hits(self, texts: pl.Series, *, binary: bool = False) -> pl.Series:
        """Return for each string whether it contains one of the texts; false for null.

        binary: the strings are decoded from arbitrary bytes.
        """
        found = self._unescaped_hits(texts, binary)
        if not self.patterns:
            return found
        rest = texts.str.contains(_MAY_BE_ESCAPED).fill_null(False) & ~found
        if binary:  # compressed content contains no escapes, only bytes that look like them
            rest &= texts.str.count_matches("\ufffd", literal=True) * 100 < texts.str.len_chars()
        rest = rest.arg_true()
        unescaped = [(at, text) for at, raw in zip(rest, texts.gather(rest).to_list(), strict=True) for text in _unescape(raw)]
        contained = self._unescaped_hits(pl.Series([text for _, text in unescaped], dtype=pl.String), binary)
        indices = sorted({at for (at, _), hit in zip(unescaped, contained, strict=True) if hit})
        return found.scatter(indices, True) if indices else found

    def _unescaped_hits(self, texts: pl.Series, binary: bool) -> pl.Series:
        """Return for each string whether it contains one of the texts without further escapes."""
        none = pl.repeat(False, len(texts), dtype=pl.Boolean, eager=True)
        if not self.patterns:
            return none
        lower = texts.str.to_lowercase()
        candidates = lower.str.contains_any(list(self.patterns)).fill_null(False).arg_true()
        confirmed = [self._matches(text, binary) for text in lower.gather(candidates).to_list()]
        return none.scatter(candidates.filter(pl.Series(confirmed, dtype=pl.Boolean)), True)

    def found_in(self, texts: pl.Series) -> set[str]:
        """Return the search texts that these strings contain."""
        matching = texts.filter(self.hits(texts)).to_list()
        lower = [text.lower() for raw in matching for text in (raw, *_unescape(raw))]
        forms = {form for form, pattern in self.patterns.items() if any(form in one and pattern.search(one) for one in lower)}
        return {text for text in self.texts if forms & _written_forms(text)}

    def _matches(self, lower: str, binary: bool) -> bool:
        return any(
            form in lower and (pattern.search(lower) is not None or (binary and _follows_its_length(form, lower)))
            for form, pattern in self.patterns.items()
        )


def _written_forms(text: str) -> set[str]:
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return {form.lower() for form in forms if form.strip()}


def _unescape(text: str) -> Iterator[str]:
    """Yield a text with its JSON and URL escapes removed, level by level; a plus sign in a URL may be a space.

    For a list of headers, also yield the values decoded from base64.
    """
    if text.startswith(_HEADERS_PREFIX):
        for encoded in _BASE64.findall(text):
            with contextlib.suppress(ValueError):  # it only looked like base64, or is not text
                yield base64.b64decode(encoded, validate=True).decode()
    for _ in range(MAX_ESCAPE_DEPTH):
        plain = unquote(_ESCAPED.sub(_unescape_json, text))
        if plain == text:
            return
        yield plain
        if "+" in text:
            yield unquote_plus(_ESCAPED.sub(_unescape_json, text))
        text = plain


def _unescape_json(escaped: re.Match[str]) -> str:
    text: str = json.loads(f'"{escaped[0]}"')
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is not a character


def _whole_word(form: str) -> str:
    before = r"(?<![\w.+-])" if "@" in form else r"(?<!\w)"
    return before + re.escape(form) + r"(?!\w)"


def _follows_its_length(form: str, lower: str) -> bool:
    """Return whether a text follows its own length, as Thrift and Avro write it. That byte may look like a letter."""
    length = len(form.encode())
    prefixes = [chr(number).lower() for number in (length, 2 * length) if number < 128]
    return any(prefix + form in lower for prefix in prefixes)


@dataclass(frozen=True)
class FileSearchResult:
    """The files searched, and those that contain one of the texts.

    bytes_decoded  after decompression
    matches        paths of the files that contain a text
    unread         paths of files that cannot be read or decoded (a truncated Parquet file, for example) and may contain one
    """

    files: int = 0
    bytes_read: int = 0
    bytes_decoded: int = 0
    matches: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def __add__(self, other: FileSearchResult) -> FileSearchResult:
        return FileSearchResult(
            files=self.files + other.files,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_decoded=self.bytes_decoded + other.bytes_decoded,
            matches=self.matches + other.matches,
            unread=self.unread + other.unread,
        )


def search_files(filesystem: FileSystem, files: Iterable[FileInfo], terms: SearchTerms) -> FileSearchResult:
    """Search files of a file system. A file that has been deleted since it was listed is skipped."""
    total = FileSearchResult()
    for info in files:
        try:
            with filesystem.open_input_stream(info.path) as stream:
                content = stream.read()
        except FileNotFoundError:
            continue
        except OSError:
            total += FileSearchResult(files=1, unread=(info.path,))
            continue
        if info.size and not content:  # a truncated response of an object store looks like an empty file
            total += FileSearchResult(files=1, unread=(info.path,))
            continue
        total += search_bytes(info.path, content, terms)
    return total


def search_bytes(path: str, content: bytes, terms: SearchTerms) -> FileSearchResult:
    """Search the content of one file, raw and decoded."""
    bytes_decoded, found = len(content), bool(terms.hits(_chunks(content), binary=True).any())
    unread = False
    try:
        for texts in _decode(content):
            bytes_decoded += int(texts.str.len_bytes().sum())
            found = found or bool(terms.hits(texts).any())
    except Exception:  # decoders raise many kinds of errors for a truncated file or one of another format
        unread = True
    return FileSearchResult(
        files=1,
        bytes_read=len(content),
        bytes_decoded=bytes_decoded,
        matches=(path,) if found else (),
        unread=(path,) if unread else (),
    )


def _decode(content: bytes) -> Iterator[pl.Series]:
    """Yield the decoded texts of a file, if it has a known format."""
    if content.startswith(MAGIC_PARQUET):
        yield from _parquet_texts(content)
    elif content.startswith(MAGIC_AVRO):
        yield pl.Series(list(_avro_texts(content)), dtype=pl.String)
    elif content.startswith(MAGIC_GZIP):
        yield _chunks(gzip.decompress(content))
    elif content.startswith(MAGIC_ZSTD):
        yield _chunks(pa.input_stream(io.BytesIO(content), compression="zstd").read())


def _parquet_texts(content: bytes) -> Iterator[pl.Series]:
    """Yield the distinct values of each column that may contain text, and the minima and maxima of its statistics."""
    file = pq.ParquetFile(pa.BufferReader(content))
    names = [f.name for f in file.schema_arrow if _may_contain_text(f.type)]
    table = file.read(columns=names)
    for name in names:
        column = table.column(name)
        if pa.types.is_nested(column.type):
            yield pl.Series([json.dumps(value, default=str, ensure_ascii=False) for value in column.to_pylist()], dtype=pl.String)
        else:
            yield pl.Series([_as_text(value) for value in column.unique().to_pylist()], dtype=pl.String)
    bounds = []
    for group in range(file.metadata.num_row_groups):
        for number in range(file.metadata.num_columns):
            statistics = file.metadata.row_group(group).column(number).statistics
            if statistics is not None and statistics.has_min_max:
                bounds += [_as_text(bound) for bound in (statistics.min, statistics.max) if isinstance(bound, str | bytes)]
    yield pl.Series(bounds, dtype=pl.String)


def _may_contain_text(type_: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(type_) for test in (*tests, pa.types.is_nested))


def _as_text(value: Any) -> str | None:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _avro_texts(content: bytes) -> Iterator[str]:
    """Yield every string, and all bytes as text, of the records of an Avro file."""
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
    """Yield the strings in a nested value, and its bytes as text."""
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


def _chunks(content: bytes) -> pl.Series:
    """Return bytes as strings of bounded length. They overlap, so that no text is split."""
    text = content.decode("utf-8", "replace")
    starts = range(0, max(len(text), 1), CHUNK_CHARACTERS)
    return pl.Series([text[start : start + CHUNK_CHARACTERS + CHUNK_OVERLAP] for start in starts], dtype=pl.String)
