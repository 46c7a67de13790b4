"""Read rows of data files a block at a time, whatever their layout: jsonl, JSON arrays, csv, tsv, parquet, plain text.

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
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dataset.data_file import COMPRESSED, disguise, guess_encoding

BLOCK_CHARACTERS = 1 << 20
BLOCK_ROWS = 1000  # of csv, parquet and JSON arrays
LONGEST_ITEM = 64 << 20  # characters of one item of a JSON array
LAYOUTS = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".txt": "text", ".md": "text"}
LAYOUTS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
NO_DATA = re.compile(  # names inside a folder
    r"\..*|(readme|licen[sc]e)([-_.][a-z]{2,5})?\.(md|txt|json)(\.gz|\.zst)?|.*\.report\.json", re.IGNORECASE
)


class Block(NamedTuple):
    """Some rows of one file: whole lines as one string, or decoded rows as a list.

    first: number of its first row (line) from 1. size: bytes of the file that it takes, for a progress bar.
    verdicts: (reason, detail) of each row that is left out, None if it stays; empty if nothing is decided yet.
    """

    path: Path
    first: int
    rows: str | list
    size: int
    verdicts: list = []


def layout(path: Path) -> str | None:
    return LAYOUTS.get(Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix)


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the data files that paths name, those of a folder sorted; READMEs, licences and reports are none.

    Raises ValueError if one is missing or empty.
    """
    files = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file() and layout(p)) if path.is_dir() else [path]
        inside = [p for p in inside if p == path or not any(map(NO_DATA.fullmatch, p.relative_to(path).parts))]
        if not inside:
            raise ValueError(f"{path} holds no {', '.join(LAYOUTS)} file (.gz and .zst are read too)")
        files += inside
    for path in files:
        if not path.is_file():
            if path.exists():
                raise ValueError(
                    f"{path} is not a regular file, and it is read more than once; write it to a file first"
                )
            near = ", ".join(sorted(p.name for p in path.parent.glob("*") if layout(p))[:10])
            raise ValueError(f"{path} not found. {path.parent} holds: {near or 'no data file'}")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty; download or make it again")
    return files


def read_blocks(path: Path, encoding: str = "utf-8") -> Iterator[Block]:
    """Yield the blocks of one file, in order. Raises ValueError, naming the file and a cure, if it cannot be read."""
    try:
        with open(path, "rb", BLOCK_CHARACTERS) as raw:
            number = position = 1
            for rows in _batches(path, raw, encoding):
                size, position = raw.tell() + 1 - position, raw.tell() + 1
                yield Block(path, number, rows, size)
                number += rows.count("\n") if isinstance(rows, str) else len(rows)
    except Exception as error:  # each library has its own
        cure = "; make it readable" if isinstance(error, PermissionError) else "; download it again"
        cure = "" if str(error).startswith("it ") else cure
        raise ValueError(f"cannot read {path}: {error}{cure}") from error


def passages(text: str, longest: int) -> Iterator[str]:
    """Cut a plain text into passages of limited length, between paragraphs, sentences or characters."""
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


def _batches(path: Path, raw: io.BufferedReader, encoding: str) -> Iterator[str | list]:
    head = raw.peek(8)
    kind = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), "")  # whatever it is called
    if kind == "parquet" or layout(path) == "parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(raw).iter_batches(BLOCK_ROWS, use_threads=False):
            yield batch.to_pylist()
        return
    binary = raw
    if kind == "gzip" or path.suffix.lower() == ".gz":
        binary = gzip.open(raw)
    elif kind == "zstd" or path.suffix.lower() == ".zst":
        import pyarrow

        binary = io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), BLOCK_CHARACTERS)
    head = binary.peek(BLOCK_CHARACTERS)
    if fault := disguise(head):
        raise ValueError(f"it {fault}")
    if is_utf8 := codecs.lookup(encoding).name == "utf-8":
        if guess := guess_encoding(head):
            raise ValueError(f"it is not UTF-8 but looks like {guess}; say so with --encoding {guess}")
        encoding = "utf-8-sig"
    # bytes that are not UTF-8 are reported with their line
    text = io.TextIOWrapper(binary, encoding, "surrogateescape" if is_utf8 else "strict", newline="\n")
    if layout(path) == "csv":
        csv.field_size_limit(1 << 30)
        lines = (line.removeprefix("\ufeff") for line in text)  # of files put together
        rows = _csv_rows(lines, "\t" if ".tsv" in path.name.lower() else ",")
    else:
        beginning = text.read(BLOCK_CHARACTERS)
        chunks = itertools.chain([beginning], iter(partial(text.read, BLOCK_CHARACTERS), ""))
        is_one = ".json" in Path(path.name.lower()).suffixes  # the whole file; .jsonl may hold an array in each line
        starts = beginning.lstrip("\ufeff \t\r\n").startswith("[")
        if layout(path) != "lines" or not (starts and is_one or _is_array(beginning)):
            yield from (chunk + text.readline() for chunk in chunks)
            return
        rows = _array_items(chunks)
    while batch := list(itertools.islice(rows, BLOCK_ROWS)):
        yield batch


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[dict]:
    # quotes inside a cell are ordinary between tabs
    options = {"delimiter": delimiter, "strict": delimiter == ","}
    reader, last = csv.DictReader(lines, restkey="columns beyond the first row's", **options), 1
    try:
        for row in reader:
            last = reader.line_num
            yield row
    except csv.Error as error:
        raise ValueError(f"it is broken in the row that begins in line {last + 1}, see its quotes: {error}") from error


def _is_array(beginning: str) -> bool:
    """Tell whether a file holds JSON arrays to be taken apart, not one of many arrays in each line."""
    line, _, more = beginning.lstrip("\ufeff \t\r\n").partition("\n")
    try:
        return line.startswith("[") and not (isinstance(json.loads(line), list) and more.strip())
    except (ValueError, RecursionError):  # it goes on in the next line
        return True


def _array_items(chunks: Iterator[str]) -> Iterator:
    """Yield the items of a JSON array, or of several, decoded as they come: memory holds a chunk and an item."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,\ufeff]*")
    buffer, start, count, is_open = "", 0, 0, False
    while True:
        start = between.match(buffer, start).end()
        if buffer.startswith("]" if is_open else "[", start):
            is_open, start = not is_open, start + 1
            continue
        if not is_open and start < len(buffer):
            raise ValueError(f"it goes on after a JSON array, item {count:,}, with {buffer[start : start + 20]!r}")
        try:
            item, start = decode(buffer, start)
        except (ValueError, RecursionError) as error:  # broken, or not all there yet
            chunk = next(chunks, "") if len(buffer) - start < LONGEST_ITEM else ""
            if not chunk and not is_open and start == len(buffer):
                return
            if not chunk:
                raise ValueError(f"the JSON array is broken after item {count:,}: {error}") from error
            buffer, start = buffer[start:] + chunk, 0
            continue
        count += 1
        yield item
