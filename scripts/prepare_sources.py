"""Rows of data files a block at a time, whatever their layout: jsonl, JSON arrays, csv, tsv, parquet, plain text.

Files may be compressed (.gz, .zst) and in another encoding. Memory holds one block, whatever the size of the file.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1000  # of csv, parquet and JSON arrays
LONGEST_ITEM = 64 << 20  # characters of one item of a JSON array
LAYOUTS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "lines"),
    **dict.fromkeys((".txt", ".md"), "text"),
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet"},
}


class Block(NamedTuple):
    """Some rows of one file: jsonl lines as bytes, plain text as bytes, or decoded rows as a list.

    first: number of its first row (line) from 1. size: bytes of the file that it stands for, for a progress bar.
    """

    path: Path
    first: int
    data: bytes | list
    is_text: bool
    size: int


def find_files(paths: list[Path]) -> list[Path]:
    """The data files that paths name, those of a folder sorted. Raises ValueError if there is none, or one is empty."""
    files = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file() and _layout(p)) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no {', '.join(LAYOUTS)} file (.gz and .zst are read too)")
        files += inside
    for path in files:
        if not path.is_file():
            near = ", ".join(sorted(p.name for p in path.parent.glob("*") if _layout(p))[:10])
            raise ValueError(f"{path} not found. {path.parent} holds: {near or 'no data file'}")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty; download or make it again")
    return files


def read_blocks(path: Path, encoding: str = "utf-8") -> Iterator[Block]:
    """The blocks of one file, in order. Raises ValueError if it is damaged, or not in this layout or encoding."""
    layout = _layout(path) or "lines"
    with _reading_errors(path):
        if layout == "parquet":
            yield from _parquet_blocks(path)
            return
        with open(path, "rb") as raw, _decompressed(raw, path) as stream:
            chunks = _utf8_chunks(stream, path, encoding)
            first = next(chunks, b"")
            if layout == "lines" and first.lstrip()[:1] == b"[":
                layout = "array"
            chunks = _chain(first, chunks)
            position = 0
            if layout in ("lines", "text"):
                number = 1
                for data in _whole_lines(chunks):
                    size, position = raw.tell() - position, raw.tell()
                    yield Block(path, number, data, layout == "text", size)
                    number += data.count(b"\n")
                return
            text = codecs.iterdecode(chunks, "utf-8")
            rows = _array_items(path, text) if layout == "array" else _csv_rows(path, text)
            for number, batch in _batches(rows):
                size, position = raw.tell() - position, raw.tell()
                yield Block(path, number, batch, False, size)


def _layout(path: Path) -> str | None:
    return LAYOUTS.get(Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower())


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


@contextmanager
def _reading_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile as error:
        raise ValueError(
            f"{path} is not a gzip file ({error}); rename it to what it is, or download it again"
        ) from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {error.encoding} ({error.reason}); name its encoding with --encoding"
        ) from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def _decompressed(raw, path: Path):
    if path.suffix == ".gz":
        with gzip.open(raw) as stream:
            yield stream
    elif path.suffix == ".zst":
        import zstandard

        try:
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
                yield stream
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} is not a whole zstd file ({error}); download it again") from error
    else:
        yield raw


def _utf8_chunks(stream, path: Path, encoding: str) -> Iterator[bytes]:
    """The contents in UTF-8, without a byte order mark in front. Raises ValueError if the encoding is another."""
    chunks = iter(partial(stream.read, BLOCK_BYTES), b"")
    first = next(chunks, b"")
    if codecs.lookup(encoding).name != "utf-8":
        for text in codecs.iterdecode(_chain(first, chunks), encoding):
            yield text.encode("utf-8", "surrogatepass")
        return
    guess = guess_encoding(first)
    if guess:
        raise ValueError(f"{path} is not UTF-8 but looks like {guess}; say so with --encoding {guess}")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from chunks


def guess_encoding(head: bytes) -> str | None:
    """The encoding that the first bytes of a file show, None for UTF-8 and for what is none that we know."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    for encoding in ("utf-8", "gb18030"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        return None if encoding == "utf-8" else encoding
    return None


def _whole_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    ready, rest = b"", []
    for chunk in chunks:
        if ready:
            yield ready
        cut = chunk.rfind(b"\n") + 1
        ready = b"".join([*rest, chunk[:cut]]) if cut else b""
        rest = [chunk[cut:]] if cut else [*rest, chunk]
    if ready or any(rest):
        yield ready + b"".join(rest)


def _batches(rows: Iterator) -> Iterator[tuple[int, list]]:
    number, batch = 1, []
    for row in rows:
        batch.append(row)
        if len(batch) == BLOCK_ROWS:
            yield number, batch
            number, batch = number + len(batch), []
    if batch:
        yield number, batch


def _array_items(path: Path, chunks: Iterator[str]) -> Iterator:
    """The items of a JSON array, decoded as they come: memory holds a chunk and an item."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    buffer, count = next(chunks).lstrip()[1:], 0
    start = 0
    while True:
        start = between.match(buffer, start).end()
        if buffer.startswith("]", start):
            return
        try:
            item, start = decode(buffer, start)
        except (ValueError, RecursionError) as error:  # broken, or not all there yet
            chunk = next(chunks, "") if len(buffer) - start < LONGEST_ITEM else ""
            if not chunk:
                raise ValueError(f"{path}: the JSON array is broken after item {count:,}: {error}") from error
            buffer, start = buffer[start:] + chunk, 0
            continue
        count += 1
        yield item


def _csv_rows(path: Path, chunks: Iterator[str]) -> Iterator[dict]:
    csv.field_size_limit(1 << 30)
    lines = (line for block in _whole_text_lines(chunks) for line in io.StringIO(block, newline=""))
    reader = csv.DictReader(lines, delimiter="\t" if ".tsv" in path.suffixes else ",")
    try:
        for row in reader:
            row.pop(None, None)  # fields beyond the header's
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def _whole_text_lines(chunks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        whole, newline, rest = (rest + chunk).rpartition("\n")
        yield whole + newline
    yield rest


def _parquet_blocks(path: Path) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number, size, total = 1, path.stat().st_size, file.metadata.num_rows
        for batch in file.iter_batches(BLOCK_ROWS):
            yield Block(path, number, batch.to_pylist(), False, size * len(batch) // total)
            number += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); download it again") from error


def passages(text: str, longest: int) -> Iterator[str]:
    """A plain text in passages of at most so many characters, cut between paragraphs, sentences or characters."""
    waiting = ""
    for paragraph in map(str.rstrip, text.split("\n")):
        pieces = [paragraph] if len(paragraph) <= longest else re.split(r"(?<=[。！？!?；;])|(?<=\. )", paragraph)
        for joint, piece in zip(["\n", *[""] * len(pieces)], pieces, strict=False):
            if len(waiting) + len(joint) + len(piece) > longest:
                yield waiting
                while len(piece) > longest:
                    yield piece[:longest]
                    piece = piece[longest:]
                waiting = piece
            else:
                waiting += joint + piece if waiting else piece
    yield waiting
