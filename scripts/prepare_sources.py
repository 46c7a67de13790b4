"""Rows of data files a block at a time, whatever their layout: jsonl, JSON arrays, csv, tsv, parquet, plain text.

Files may be compressed (.gz, .zst) and in another encoding. Memory holds one block, whatever the size of the file.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

BLOCK_CHARACTERS = 1 << 20
BLOCK_ROWS = 1000  # of csv, parquet and JSON arrays
LONGEST_ITEM = 64 << 20  # characters of one item of a JSON array
LAYOUTS = dict.fromkeys((".jsonl", ".ndjson", ".json"), "lines") | dict.fromkeys((".txt", ".md"), "text")
LAYOUTS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


class Block(NamedTuple):
    """Some rows of one file: whole lines as one string, or decoded rows as a list.

    first: number of its first row (line) from 1. size: bytes of the file that it takes, for a progress bar.
    verdicts: why each row is left out, None if it stays; empty if nothing is decided yet.
    """

    path: Path
    first: int
    rows: str | list
    size: int
    verdicts: list = []


def layout(path: Path) -> str | None:
    return LAYOUTS.get(Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower())


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The data files that paths name, those of a folder sorted. Raises ValueError if there is none, or one is empty."""
    files = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file() and layout(p)) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no {', '.join(LAYOUTS)} file (.gz and .zst are read too)")
        files += inside
    for path in files:
        if not path.is_file():
            near = ", ".join(sorted(p.name for p in path.parent.glob("*") if layout(p))[:10])
            raise ValueError(f"{path} not found. {path.parent} holds: {near or 'no data file'}")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty; download or make it again")
    return files


def read_blocks(path: Path, encoding: str = "utf-8") -> Iterator[Block]:
    """The blocks of one file, in order. Raises ValueError if it is damaged, or not in this layout or encoding."""
    with _reading_errors(path), open(path, "rb") as raw:
        number = position = 1
        for rows in _batches(path, raw, encoding):
            size, position = raw.tell() + 1 - position, raw.tell() + 1
            yield Block(path, number, rows, size)
            number += rows.count("\n") if isinstance(rows, str) else len(rows)


def guess_encoding(head: bytes) -> str | None:
    """The encoding that the first bytes of a file show; None for UTF-8 and for what we do not know."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    for encoding in ("utf-8", "gb18030"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        return None if encoding == "utf-8" else encoding
    return None


def passages(text: str, longest: int) -> Iterator[str]:
    """A plain text in passages of at most so many characters, cut between paragraphs, sentences or characters."""
    waiting = ""
    for paragraph in map(str.rstrip, text.split("\n")):
        pieces = [paragraph] if len(paragraph) <= longest else re.split(r"(?<=[。！？!?；;])|(?<=\. )", paragraph)
        for joint, piece in zip(["\n", *[""] * len(pieces)], pieces, strict=False):
            if len(waiting) + len(joint) + len(piece) <= longest:
                waiting += joint + piece if waiting else piece
                continue
            yield waiting
            while len(piece) > longest:
                yield piece[:longest]
                piece = piece[longest:]
            waiting = piece
    yield waiting


@contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    """Whatever a library says of a damaged file, say it with the name of the file and a cure."""
    try:
        yield
    except Exception as error:
        cure = "" if "--" in str(error) else "; download it again, or rename it to what it is"
        raise ValueError(f"cannot read {path}: {error}{cure}") from error


def _batches(path: Path, raw, encoding: str) -> Iterator[str | list]:
    if layout(path) == "parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(raw).iter_batches(BLOCK_ROWS, use_threads=False):
            yield batch.to_pylist()
        return
    chunks = _chunks(raw, path.suffix)
    head = next(chunks, b"")
    if codecs.lookup(encoding).name != "utf-8":
        text = codecs.iterdecode(itertools.chain([head], chunks), encoding)
    elif guess := guess_encoding(head):
        raise ValueError(f"it is not UTF-8 but looks like {guess}; say so with --encoding {guess}")
    else:  # what is no UTF-8 is found in its line
        text = codecs.iterdecode(itertools.chain([head], chunks), "utf-8-sig", "surrogateescape")
    start = next(text, "")
    lines = _whole_lines(itertools.chain([start], text))
    if layout(path) == "csv":
        csv.field_size_limit(1 << 30)
        each = (line for some in lines for line in io.StringIO(some, newline=""))
        rows = csv.DictReader(each, delimiter="\t" if ".tsv" in path.suffixes else ",")
    elif start.lstrip().startswith("[") and layout(path) != "text":
        rows = _array_items(start.lstrip()[1:], text)
    else:
        yield from lines
        return
    while batch := list(itertools.islice(rows, BLOCK_ROWS)):
        yield batch


def _chunks(raw, suffix: str) -> Iterator[bytes]:
    if suffix != ".zst":
        yield from iter(partial((gzip.open(raw) if suffix == ".gz" else raw).read, BLOCK_CHARACTERS), b"")
        return
    import zstandard

    frame = None  # a file may be several frames one after another
    while chunk := raw.read(BLOCK_CHARACTERS // 8):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the compressed file ends early")


def _whole_lines(chunks: Iterable[str]) -> Iterator[str]:
    ready, rest = "", []
    for chunk in chunks:
        if ready:
            yield ready
        cut = chunk.rfind("\n") + 1
        ready = "".join([*rest, chunk[:cut]]) if cut else ""
        rest = [chunk[cut:]] if cut else [*rest, chunk]
    if ready or any(rest):
        yield ready + "".join(rest)


def _array_items(buffer: str, chunks: Iterator[str]) -> Iterator:
    """The items of a JSON array after its bracket, decoded as they come: memory holds a chunk and an item."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    start = count = 0
    while True:
        start = between.match(buffer, start).end()
        if buffer.startswith("]", start):
            return
        try:
            item, start = decode(buffer, start)
        except (ValueError, RecursionError) as error:  # broken, or not all there yet
            chunk = next(chunks, "") if len(buffer) - start < LONGEST_ITEM else ""
            if not chunk:
                raise ValueError(f"the JSON array is broken after item {count:,}: {error}") from error
            buffer, start = buffer[start:] + chunk, 0
            continue
        count += 1
        yield item
