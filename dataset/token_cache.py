"""jsonl to memory-mapped tokens: built once per (file, tokenizer, kind of record) and shared by all ranks.

A cache is a folder:
    tokens.bin   uint16, the ids of all documents one after another
    mask.bin     uint8, 1 where a token is a target; absent for pretrain, where every token is one
    offsets.bin  int64 (documents + 1), where each document begins in tokens.bin
    meta.json    what it was made of, and counts

Worker processes read the file in ranges of bytes; this one writes the results in order. Memory does not grow with the
data.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.disk import open_or_build, write_array
from dataset.lm_dataset import FORMS, RecordError, check_kind, count_target_bytes, parse_record, tokenize_records
from dataset.progress import ProgressBar
from dataset.tokenization import ChatTokenizer
from dataset.workers import results_in_order, usable_cores

FORMAT_VERSION = 1
RANGE_BYTES = 2 << 20  # of the file per task: about half a second of work, so that workers finish together
BATCH_CHARACTERS = 200_000  # per call of the tokenizer: bounds the Python lists of ids that are alive at once
SHOWN_ERRORS = 10


class TokenCache:
    """An opened cache. Pickles as its folder, so that workers of a DataLoader map the same files.

    tokens (meta["tokens"],) uint16, mask the same in uint8 or None, offsets (documents + 1,) int64: memory maps.
    meta: kind, documents, tokens, bytes (UTF-8 bytes of the text that is a target), records, skipped_lines,
    first_skipped (messages), contents_sha256 (of tokens, mask and offsets, wherever the data file is), and what decides
    them: data_path, data_bytes, tokenizer_sha256, format_version and so on.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.kind = self.meta["kind"]
        self.contents_sha256 = self.meta["contents_sha256"]
        self.tokens = self._map("tokens.bin", np.uint16, self.meta["tokens"])
        self.mask = None if self.kind == "pretrain" else self._map("mask.bin", np.uint8, self.meta["tokens"])
        self.offsets = self._map("offsets.bin", np.int64, self.meta["documents"] + 1)

    def _map(self, name: str, dtype: type, count: int) -> np.memmap:
        return np.memmap(self.folder / name, dtype, mode="r", shape=(count,))  # ValueError if the file is shorter

    def __reduce__(self):
        return TokenCache, (self.folder,)


def open_token_cache(
    data_path: str | Path,
    tokenizer: ChatTokenizer,
    kind: str,
    *,
    cache_dir: str | Path,
    skip_bad_lines: bool = False,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> TokenCache:
    """Return the tokens of a jsonl file; build them first if cache_dir does not hold them yet.

    num_workers: processes that tokenize, all usable cores by default. If several processes ask for the same cache, one
    builds and the others wait. Bad lines are listed before any training starts; with skip_bad_lines they are left out
    and counted in meta["skipped_lines"].
    Raises ValueError if the file is missing, empty, not a file, or holds bad lines or nothing else; if the vocabulary
    does not fit uint16; if cache_dir cannot be written.
    """
    check_kind(kind)
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size:,} ids, but the token cache stores 16 bits an id "
            "(65,536 at most); choose a smaller tokenizer with --tokenizer_path"
        )
    data_path = Path(data_path).absolute()
    stat = _checked_stat(data_path)
    identity = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "data_path": str(data_path),
        "data_bytes": stat.st_size,
        "data_mtime_ns": stat.st_mtime_ns,
        "tokenizer_sha256": tokenizer.sha256,
        "skip_bad_lines": bool(skip_bad_lines),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir).absolute() / f"{data_path.stem}-{kind}-{digest[:16]}"
    reader = RangeReader(data_path, kind, tokenizer)
    cache = open_or_build(
        folder,
        TokenCache,
        lambda unfinished: _write_cache(unfinished, reader, identity, num_workers, show_progress),
        f"the token cache of {data_path.name}",
        show_progress,
    )
    if cache.meta["skipped_lines"] and show_progress:
        meta = cache.meta
        lines = "\n  ".join(meta["first_skipped"])
        print(f"{meta['skipped_lines']:,} bad lines of {data_path} are left out. The first:\n  {lines}", flush=True)
    return cache


def _write_cache(
    folder: Path, reader: "RangeReader", identity: dict, num_workers: int | None, show_progress: bool
) -> None:
    """Read the file range by range and write tokens, mask, offsets and meta.json."""
    data_path, size, skip_bad_lines = reader.data_path, identity["data_bytes"], identity["skip_bad_lines"]
    ranges = [(start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
    counts = dict.fromkeys(("lines", "records", "bytes", "skipped_lines", "documents", "tokens"), 0)
    first_skipped = []
    # A bad line ends the run, but people want to know all of them: after the first, ranges are only checked.
    tasks = ((byte_range, skip_bad_lines or not counts["skipped_lines"]) for byte_range in ranges)
    with ExitStack() as stack:
        names = ("tokens", "offsets", *(() if reader.kind == "pretrain" else ("mask",)))
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
        digests = {name: hashlib.sha256() for name in names}
        bar = stack.enter_context(ProgressBar(f"tokenizing {data_path.name}", size, "B", show=show_progress))
        parts = results_in_order(reader, tasks, min(num_workers or usable_cores(), len(ranges)))
        stack.enter_context(closing(parts))

        def write(name: str, array: np.ndarray) -> None:
            write_array(files[name], array)
            digests[name].update(np.ascontiguousarray(array))

        write("offsets", np.zeros(1, np.int64))
        for (start, end), part in zip(ranges, parts, strict=True):
            for number, reason in part.bad_lines[: SHOWN_ERRORS - len(first_skipped)]:
                first_skipped.append(f"{data_path}:{counts['lines'] + number}: {reason}")
            if len(part.lengths):
                write("tokens", part.tokens)
                write("offsets", counts["tokens"] + np.cumsum(part.lengths, dtype=np.int64))
                if "mask" in names:
                    write("mask", part.mask)
            for name, amount in part.counts.items():
                counts[name] += amount
            bar.update(end - start, f"{counts['tokens']:,} tokens")
    _refuse_bad_lines(data_path, reader.kind, counts, first_skipped, skip_bad_lines)
    stat = _checked_stat(data_path)
    if (stat.st_size, stat.st_mtime_ns) != (identity["data_bytes"], identity["data_mtime_ns"]):
        raise ValueError(f"{data_path} changed while it was read; start again when nothing writes to it")
    joined = "".join(digests[name].hexdigest() for name in sorted(digests))
    meta = identity | counts | {"first_skipped": first_skipped, "vocab_size": reader.tokenizer.vocab_size}
    meta["contents_sha256"] = hashlib.sha256(joined.encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _refuse_bad_lines(data_path: Path, kind: str, counts: dict, first: list[str], skip_bad_lines: bool) -> None:
    """Raise ValueError if there are bad lines that may not be skipped, or no good ones."""
    skipped, records = counts["skipped_lines"], counts["records"]
    shown = "\n  ".join(["", *first])
    wanted = f"No line is what is wanted here, which is: {FORMS[kind]}. Is this the file that you meant?"
    if skipped and not skip_bad_lines:
        more = f"\n  … and {skipped - len(first):,} more" if skipped > len(first) else ""
        cure = "Correct them, or leave them out with --skip_bad_lines." if records else wanted
        raise ValueError(f"{skipped:,} bad line{'s' * (skipped > 1)} in {data_path}:{shown}{more}\n{cure}")
    if not records:
        detail = f": all {skipped:,} lines are bad. The first:{shown}" if skipped else ""
        raise ValueError(f"{data_path} holds no record{detail}\n{wanted}")


@dataclass
class Part:
    """What the lines of one range became.

    tokens uint16, mask uint8 (empty for pretrain) and lengths int64, one per document: empty if nothing was tokenized.
    bad_lines: (line of the range from 1, reason) of the first few. counts: see _write_cache.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    bad_lines: list[tuple[int, str]]
    counts: dict[str, int]


@dataclass
class RangeReader:
    """Reads and tokenizes the records whose lines begin inside a range of bytes; sent to each worker once."""

    data_path: Path
    kind: str
    tokenizer: ChatTokenizer

    def __call__(self, byte_range: tuple[int, int], tokenize: bool) -> Part:
        ids, masks, lengths, bad_lines = [], [], [], []
        records, characters = [], 0
        counts = dict.fromkeys(("lines", "records", "bytes", "skipped_lines"), 0)

        def flush() -> None:
            nonlocal records, characters
            documents = tokenize_records(self.kind, records, self.tokenizer) if tokenize and records else []
            lengths.append(np.array([len(document) for document, _ in documents], np.int64))
            ids.append(_flat((document for document, _ in documents), np.uint16, lengths[-1].sum()))
            if self.kind != "pretrain":
                masks.append(_flat((mask for _, mask in documents), np.uint8, lengths[-1].sum()))
            records, characters = [], 0

        for line in self._lines(*byte_range):
            counts["lines"] += 1
            if not line:
                continue
            try:
                text = line.decode("utf-8")
                record = parse_record(self.kind, text)
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start + 1} of the line"
            except RecordError as error:
                reason = str(error)
            else:
                counts["records"] += 1
                counts["bytes"] += count_target_bytes(self.kind, record)
                records.append(record)
                characters += len(text)
                if characters > BATCH_CHARACTERS:
                    flush()
                continue
            counts["skipped_lines"] += 1
            if len(bad_lines) < SHOWN_ERRORS:
                bad_lines.append((counts["lines"], reason))
        flush()
        tokens, mask, lengths = (np.concatenate(arrays or [[]]) for arrays in (ids, masks, lengths))
        return Part(tokens, mask, lengths, bad_lines, counts | {"documents": len(lengths), "tokens": len(tokens)})

    def _lines(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the lines that begin in [start, end), without white space around them or a byte order mark."""
        try:
            with open(self.data_path, "rb") as file:
                if start:
                    file.seek(start - 1)
                    start += len(file.readline()) - 1  # the rest of a line that began in the range before
                while start < end and (line := file.readline()):
                    # Two files put together have a second mark in the middle.
                    yield line.removeprefix(b"\xef\xbb\xbf").strip()
                    start += len(line)
        except OSError as error:
            raise ValueError(f"cannot read {self.data_path}: {error.strerror}; see --data_path") from error


def _flat(rows: Iterator[list[int]], dtype: type, count: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype, count)


def _checked_stat(data_path: Path) -> os.stat_result:
    """Return size and time of a data file. Raises ValueError if it is missing, unreadable, empty or a folder."""
    if data_path.is_dir():
        raise ValueError(f"{data_path} is a folder; --data_path takes one jsonl file")
    try:
        with open(data_path, "rb") as file:
            stat = os.fstat(file.fileno())
    except FileNotFoundError as error:
        near = sorted(path.name for path in data_path.parent.glob("*.jsonl"))
        holds = f"{data_path.parent} holds: {', '.join(near[:10]) or 'no jsonl file'}"
        if not data_path.parent.is_dir():
            holds = f"the folder {data_path.parent} is not there either"
        raise ValueError(f"{data_path} not found; give a jsonl file to --data_path or --valid_path. {holds}") from error
    except OSError as error:
        raise ValueError(f"cannot read {data_path}: {error.strerror}; see --data_path") from error
    if not stat.st_size:
        raise ValueError(f"{data_path} is empty; download or make it again")
    return stat
