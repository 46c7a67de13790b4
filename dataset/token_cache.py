"""jsonl to memory-mapped tokens: built once per (file, tokenizer, kind of record) and shared by all ranks.

A cache is a folder:
    tokens.bin   uint16, the ids of all documents one after another
    mask.bin     uint8, 1 where a token is a target; absent for pretrain, where every token is one
    offsets.bin  int64 (documents + 1), where each document begins in tokens.bin
    meta.json    what it was made of, and counts

Worker processes read the file in ranges of bytes; the main one writes the results in order. Memory does not grow with
the data.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.data_file import CONVERT, data_identity
from dataset.disk import open_or_build, write_array
from dataset.lm_dataset import (
    FORMS,
    RULES_VERSION,
    RecordError,
    check_kind,
    parse_record,
    render_record,
    tokenize_rendered,
)
from dataset.progress import ProgressBar
from dataset.tokenization import CONTROL_TOKENS, ChatTokenizer
from dataset.workers import results_in_order, usable_cores

FORMAT_VERSION = 2
RANGE_BYTES = 2 << 20  # of the file per task: half a second of work, so that workers finish at about the same time
BATCH_CHARACTERS = 200_000  # per call of the tokenizer: bounds the Python lists of ids that are alive at once
SHOWN_ERRORS = 10
MAX_RECORD_BYTES = 16 << 20  # tokenizing a line takes about 90 times its size in memory


class TokenCache:
    """An opened cache. Pickles as its folder, so that workers of a DataLoader map the same files.

    tokens (meta["tokens"],) uint16, mask the same in uint8 or None, offsets (documents + 1,) int64: memory maps.
    meta: kind, lines, documents, tokens, records, skipped_lines, first_skipped (messages), unused (keys that nothing
    reads), contents_sha256 (of tokens, mask and offsets, wherever the data file is), and all that they depend on:
    data_path, data_bytes, tokenizer_sha256, format_version and so on.
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
    max_record_bytes: int = MAX_RECORD_BYTES,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> TokenCache:
    """Return the tokens of a jsonl file; build them first if cache_dir does not hold them yet.

    max_record_bytes: a longer line is a bad one. num_workers: processes, all usable cores by default. If several ask
    for the same cache, one builds and the others wait. Bad lines are listed before any training starts; with
    skip_bad_lines they are left out and counted in meta["skipped_lines"].
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
    identity = data_identity(data_path) | {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "tokenizer_sha256": tokenizer.sha256,
        "skip_bad_lines": bool(skip_bad_lines),
    }
    if kind != "pretrain":
        identity |= {"rules_version": RULES_VERSION, "chat_template_sha256": tokenizer.template.sha256}
    if (control := [tokenizer.template.bos, tokenizer.template.eos]) != list(CONTROL_TOKENS.values())[:2]:
        identity["control_tokens"] = control  # tokenizer_config.json names them
    if skip_bad_lines:
        identity["max_record_bytes"] = max_record_bytes
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(cache_dir).absolute() / f"{data_path.stem[:60]}-{kind}-{digest[:16]}"
    reader = RangeReader(data_path, kind, tokenizer, max_record_bytes)
    cache = open_or_build(
        folder,
        TokenCache,
        lambda unfinished: _write_cache(unfinished, reader, identity, num_workers, show_progress),
        f"the token cache of {data_path.name}",
        show_progress,
    )
    meta = cache.meta
    if meta["skipped_lines"] and show_progress:
        lines = "\n  ".join(meta["first_skipped"])
        print(f"{meta['skipped_lines']:,} bad lines of {data_path} are left out. The first:\n  {lines}", flush=True)
    if meta["unused"] and show_progress:
        keys = ", ".join(f"{what} ({count:,})" for what, count in meta["unused"].items())
        print(f"{data_path}: these keys are not used: {keys}", flush=True)
    return cache


def _write_cache(
    folder: Path, reader: "RangeReader", identity: dict, num_workers: int | None, show_progress: bool
) -> None:
    """Read the file range by range and write tokens, mask, offsets and meta.json."""
    data_path, size, skip_bad_lines = reader.data_path, identity["data_bytes"], identity["skip_bad_lines"]
    ranges = [(start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
    counts = dict.fromkeys(("lines", "records", "skipped_lines", "documents", "tokens"), 0)
    first_skipped, unused = [], Counter()
    # A bad line ends the run, but people want to see all of them: after the first, ranges are only checked.
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
            unused += part.unused
            bar.update(end - start, f"{counts['tokens']:,} tokens")
    _refuse_bad_lines(data_path, reader.kind, counts, first_skipped, skip_bad_lines)
    if not data_identity(data_path).items() <= identity.items():
        raise ValueError(f"{data_path} changed while it was read; start again when nothing writes to it")
    joined = "".join(digests[name].hexdigest() for name in sorted(digests))
    meta = identity | counts | {"first_skipped": first_skipped, "unused": dict(unused.most_common())}
    meta["contents_sha256"] = hashlib.sha256(joined.encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _refuse_bad_lines(data_path: Path, kind: str, counts: dict, first: list[str], skip_bad_lines: bool) -> None:
    """Raise ValueError if there are bad lines that may not be skipped, or no good ones."""
    skipped, records = counts["skipped_lines"], counts["records"]
    shown = "\n  ".join(["", *first])
    wanted = (
        f"No line is what is wanted here, which is: {FORMS[kind]}. Is this the file that you meant? Files of other "
        f"layouts (ShareGPT, messages, Alpaca and more) become such with: {CONVERT} {data_path} --output NEW.jsonl"
    )
    if skipped and not skip_bad_lines:
        more = f"\n  … and {skipped - len(first):,} more" if skipped > len(first) else ""
        cure = "Correct them, or leave them out with --skip_bad_lines." if records else wanted
        raise ValueError(f"{skipped:,} bad line{'s' * (skipped > 1)} in {data_path}:{shown}{more}\n{cure}")
    if not records:
        detail = f": all {skipped:,} lines are bad. The first:{shown}" if skipped else ""
        raise ValueError(f"{data_path} holds no record{detail}\n{wanted}")


@dataclass
class Part:
    """The tokenized lines of one range.

    tokens uint16, mask uint8 (empty for pretrain) and lengths int64, one per document: empty if nothing was tokenized.
    bad_lines: (line of the range from 1, reason) of the first few. counts: see _write_cache. unused: see parse_record.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    bad_lines: list[tuple[int, str]]
    counts: dict[str, int]
    unused: Counter


@dataclass
class RangeReader:
    """Reads and tokenizes the records whose lines begin inside a range of bytes; sent to each worker once."""

    data_path: Path
    kind: str
    tokenizer: ChatTokenizer
    max_record_bytes: int

    def __call__(self, byte_range: tuple[int, int], tokenize: bool) -> Part:
        ids, masks, lengths, bad_lines, unused = [], [], [], [], Counter()
        rendered, characters = [], 0
        counts = dict.fromkeys(("lines", "records", "skipped_lines"), 0)

        def flush() -> None:
            nonlocal rendered, characters
            documents = tokenize_rendered(self.kind, rendered, self.tokenizer) if tokenize and rendered else []
            lengths.append(np.array([len(document) for document, _ in documents], np.int64))
            ids.append(_flat((document for document, _ in documents), np.uint16, lengths[-1].sum()))
            if self.kind != "pretrain":
                masks.append(_flat((mask for _, mask in documents), np.uint8, lengths[-1].sum()))
            rendered, characters = [], 0

        for line in self._lines(*byte_range):
            counts["lines"] += 1
            if not line:
                continue
            try:
                if len(line) > self.max_record_bytes:
                    raise RecordError(f"longer than --max_record_bytes {self.max_record_bytes:,}")
                text = line.decode("utf-8")
                record = parse_record(self.kind, text, unused)
                documents = render_record(self.kind, record, self.tokenizer)
            except UnicodeDecodeError as error:
                reason = f"not UTF-8 at byte {error.start + 1} of the line"
            except ValueError as error:
                reason = str(error)
            else:
                counts["records"] += 1
                rendered += documents
                characters += len(text)
                if characters > BATCH_CHARACTERS:
                    flush()
                continue
            counts["skipped_lines"] += 1
            if len(bad_lines) < SHOWN_ERRORS:
                bad_lines.append((counts["lines"], reason))
        flush()
        tokens, mask, lengths = (np.concatenate(arrays or [[]]) for arrays in (ids, masks, lengths))
        counts |= {"documents": len(lengths), "tokens": len(tokens)}
        return Part(tokens, mask, lengths, bad_lines, counts, unused)

    def _lines(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the lines that begin in [start, end), without surrounding white space or a byte order mark.

        Of a line that is too long, only the beginning is yielded.
        """
        try:
            with open(self.data_path, "rb") as file:
                if start:
                    file.seek(start - 1)
                    start += self._skip_line(file, end) - 1  # the rest of a line that began in the range before
                while start < end and (line := file.readline(self.max_record_bytes + 1)):
                    start += len(line)
                    if len(line) > self.max_record_bytes and not line.endswith(b"\n"):
                        start += self._skip_line(file, end)
                        yield line
                    else:  # two files put together have a second mark in the middle
                        yield line.removeprefix(b"\xef\xbb\xbf").strip()
        except OSError as error:
            raise ValueError(f"cannot read {self.data_path}: {error.strerror}; see --data_path") from error

    @staticmethod
    def _skip_line(file, end: int) -> int:
        """Read up to the end of the line, or past `end` of the range; return the number of bytes."""
        first = file.tell()
        while (part := file.readline(1 << 20)) and not part.endswith(b"\n") and file.tell() < end:
            pass
        return file.tell() - first


def _flat(rows: Iterator[list[int]], dtype: type, count: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype, count)
