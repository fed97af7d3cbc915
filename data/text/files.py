"""Lines and records of files from outside: text, JSON, JSON lines, parquet; UTF-8, or UTF-16 and UTF-32 with the mark
that says so; any of them packed with gzip. Whatever is wrong raises InputError: one line with the path, the line (or
record, or row), and what to do.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data import InputError

MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before UTF-16's, which begin like them
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
SPACE = re.compile(r"\s*")
UNPACKED = (OSError, EOFError, zlib.error)  # what gzip raises over a file that is damaged


def encoding(start: bytes) -> str:
    """The encoding of a text that begins with these bytes."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8-sig")


def ending(path: Path) -> str:
    """In small letters, without .gz: ".json" of "a.JSON.gz"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def set_name(path: Path) -> str:
    """What a file of questions is called: "a" of "a_test.json.gz"."""
    return re.sub(r"_(train|dev|valid|test)$", "", path.name[:len(path.name.removesuffix(".gz")) - len(ending(path))])


def unpacked(path: Path) -> BinaryIO:
    """The bytes of a file, gzip's unpacked."""
    file = path.open("rb")
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.open(file) if packed else file  # type: ignore[return-value]


def text_of(path: Path) -> str:
    """What a file of text holds; InputError if it can't be read."""
    try:
        with unpacked(path) as file:
            content = file.read()
        text = content.decode(coded := encoding(content))
    except UnicodeError as error:
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise InputError(f"{path}, line {line}: neither UTF-8 nor UTF-16 with its mark; save the file as "
                         f"UTF-8") from error
    except UNPACKED as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read ({why}); check its permissions, or download it again") from error
    if coded == "utf-8-sig" and "\0" in text:  # most often UTF-16 without its mark, which passes for UTF-8
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}, line {line}: neither UTF-8 nor UTF-16 with its mark; save the file as UTF-8")
    return text


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line). Only line feeds end a line: JSON strings may hold other separators."""
    return enumerate(text_of(path).split("\n"), start=1)


def records(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """("path, line k", "path, record k" or "path, row k", parsed record) of JSON lines, of a JSON list, of objects over
    several lines, of the list that one object keeps under `data`, or of parquet, there of these columns at most."""
    if ending(path) == ".parquet":
        yield from _rows(path, columns)
        return
    text, decoder, line, count = text_of(path), json.JSONDecoder(), 1, 0
    began, at = 0, SPACE.match(text).end()
    while at < len(text):
        line += text.count("\n", began, at)
        began = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits and endless brackets
            why, at = getattr(error, "msg", type(error).__name__), getattr(error, "lineno", line)
            raise InputError(f"{path}, line {line if ending(path) == '.jsonl' else at}: not JSON ({why}); use one list "
                             f"or JSON lines") from error
        inner = value.get("data") if isinstance(value, dict) else value
        for record in inner if isinstance(inner, list) else [value]:
            count += 1
            yield f"{path}, record {count}" if isinstance(inner, list) else f"{path}, line {line}", record
        at = SPACE.match(text, at).end()


def _rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with unpacked(path) as source:
            file = parquet.ParquetFile(source)
            names = [c for c in columns or file.schema_arrow.names if c in file.schema_arrow.names]
            rows = (row for batch in file.iter_batches(columns=names) for row in batch.to_pylist())
            yield from ((f"{path}, row {k}", row) for k, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, *UNPACKED) as error:
        raise InputError(f"{path}: not a parquet file ({type(error).__name__}); download it again") from error
