"""jsonl to memory-mapped tokens: built once per (file, tokenizer, kind of record) and shared by all ranks.

A cache is a folder:
    tokens.bin   uint16, the ids of all documents one after another
    mask.bin     uint8, 1 where a token is a target; absent for pretrain, where every token is one
    offsets.bin  int64 (documents + 1), where each document begins in tokens.bin
    meta.json    what it was made of, and counts

The file is read in ranges of bytes by worker processes and written in order by this one, so memory does not grow with
the data. Workers are plain subprocesses: unlike multiprocessing's, they do not import the main script again, and so
neither torch nor transformers.
"""

import errno
import functools
import gc
import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from filelock import FileLock, Timeout

from dataset.lm_dataset import FORMS, RecordError, check_kind, count_target_bytes, parse_record, tokenize_records
from dataset.progress import ProgressBar
from dataset.tokenization import ChatTokenizer

FORMAT_VERSION = 1
RANGE_BYTES = 2 << 20  # of the file per task: about half a second of work, so that workers finish together
BATCH_CHARACTERS = 200_000  # per call of the tokenizer: bounds the Python lists of ids that are alive at once
SHOWN_ERRORS = 10
ROOT = Path(__file__).resolve().parents[1]


class TokenCache:
    """An opened cache. Pickles as its folder, so that workers of a DataLoader map the same files.

    tokens (meta["tokens"],) uint16, mask the same in uint8 or None, offsets (documents + 1,) int64: memory maps.
    meta: kind, documents, tokens, bytes (UTF-8 bytes of the text that is a target), records, skipped_lines,
    first_skipped (messages), data_path, data_bytes, tokenizer_sha256, vocab_size, format_version.
    contents_sha256: of tokens, mask and offsets, wherever the data file lies.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        self.kind = self.meta["kind"]
        self.tokens = self._map("tokens.bin", np.uint16, self.meta["tokens"])
        self.mask = None if self.kind == "pretrain" else self._map("mask.bin", np.uint8, self.meta["tokens"])
        self.offsets = self._map("offsets.bin", np.int64, self.meta["documents"] + 1)

    @functools.cached_property
    def contents_sha256(self) -> str:
        if "contents_sha256" in self.meta:
            return self.meta["contents_sha256"]
        names = ["tokens", "offsets", *(() if self.mask is None else ("mask",))]  # a cache from before it was kept
        digests = {}
        for name in names:
            with open(self.folder / f"{name}.bin", "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256")
        return _joined(digests)

    def _map(self, name: str, dtype: type, count: int) -> np.memmap:
        # A file shorter than this is a ValueError of mmap.
        return np.memmap(self.folder / name, dtype, mode="r", shape=(count,))

    def __reduce__(self):
        return TokenCache, (self.folder,)


def _joined(digests: dict) -> str:
    """One hash for those of several files."""
    return hashlib.sha256("".join(digests[name].hexdigest() for name in sorted(digests)).encode()).hexdigest()


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
    """The tokens of a jsonl file, made now if cache_dir does not hold them yet.

    num_workers: processes that tokenize, all usable cores by default. Where several processes ask for the same cache,
    one builds and the others wait. Bad lines stop it with a list of them, before any training; with skip_bad_lines
    they are left out and counted in meta["skipped_lines"].
    ValueError: the file is missing, empty, not a file, holds bad lines or nothing else; the vocabulary does not fit
    uint16; cache_dir cannot be written.
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
    cache = _open_whole(folder)
    if cache is None:
        with writing_errors(folder.parent, "the token cache"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = folder.with_name(folder.name + ".lock")
            with file_lock(lock, show_progress, f"the token cache of {data_path.name}"):
                cache = _open_whole(folder)
                if cache is None:  # nobody finished it while this process waited
                    builder = _Builder(data_path, tokenizer, kind, identity, num_workers, show_progress)
                    with replaced_folder(folder) as unfinished:
                        builder.write(unfinished)
                    cache = TokenCache(folder)
    if cache.meta["skipped_lines"] and show_progress:
        meta = cache.meta
        lines = "\n  ".join(meta["first_skipped"])
        print(f"{meta['skipped_lines']:,} bad lines of {data_path} are left out. The first:\n  {lines}", flush=True)
    return cache


class _Builder:
    """Reads one jsonl file and writes its cache into a folder."""

    def _wanted(self) -> str:
        return f"No line is what is wanted here, which is: {FORMS[self.kind]}. Is this the file that you meant?"

    def __init__(
        self,
        data_path: Path,
        tokenizer: ChatTokenizer,
        kind: str,
        identity: dict,
        num_workers: int | None,
        show_progress: bool,
    ):
        self.data_path = data_path
        self.tokenizer = tokenizer
        self.kind = kind
        self.identity = identity
        self.skip_bad_lines = identity["skip_bad_lines"]
        self.show_progress = show_progress
        self.tokenize = True
        size = identity["data_bytes"]
        self.ranges = [(start, min(start + RANGE_BYTES, size)) for start in range(0, size, RANGE_BYTES)]
        self.num_workers = min(num_workers or usable_cores(), len(self.ranges))

    def write(self, folder: Path) -> None:
        documents = tokens = target_bytes = lines = records = skipped = 0
        first_skipped = []
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(open(folder / f"{name}.bin", "wb"))
                for name in ("tokens", "offsets", *(() if self.kind == "pretrain" else ("mask",)))
            }
            digests = {name: hashlib.sha256() for name in files}

            def write(name: str, array: np.ndarray) -> None:
                write_array(files[name], array)
                digests[name].update(np.ascontiguousarray(array))

            write("offsets", np.zeros(1, np.int64))
            bar = stack.enter_context(
                ProgressBar(f"tokenizing {self.data_path.name}", self.ranges[-1][1], "B", show=self.show_progress)
            )
            results = self._results()
            stack.callback(results.close)
            for (start, end), result in zip(self.ranges, results, strict=True):
                for number, reason in result["bad_lines"][: SHOWN_ERRORS - len(first_skipped)]:
                    first_skipped.append(f"{self.data_path}:{lines + number}: {reason}")
                skipped += result["bad_count"]
                lines += result["lines"]
                records += result["records"]
                target_bytes += result["target_bytes"]
                if result["lengths"] is not None:
                    write("tokens", result["tokens"])
                    write("offsets", tokens + np.cumsum(result["lengths"], dtype=np.int64))
                    if "mask" in files:
                        write("mask", result["mask"])
                    documents += len(result["lengths"])
                    tokens += len(result["tokens"])
                # A bad line ends the run, but people want to know all of them: the rest is only looked at.
                self.tokenize = not skipped or self.skip_bad_lines
                bar.update(end - start, f"{tokens:,} tokens")
        if skipped and not self.skip_bad_lines:
            more = f"\n  … and {skipped - len(first_skipped):,} more" if skipped > len(first_skipped) else ""
            raise ValueError(
                f"{skipped:,} bad line{'s' * (skipped > 1)} in {self.data_path}:\n  "
                + "\n  ".join(first_skipped)
                + f"{more}\n"
                + ("Correct them, or leave them out with --skip_bad_lines." if records else self._wanted())
            )
        if not records:
            detail = f": all {skipped:,} lines are bad. The first:\n  " + "\n  ".join(first_skipped) if skipped else ""
            raise ValueError(f"{self.data_path} holds no record{detail}\n{self._wanted()}")
        stat = _checked_stat(self.data_path)
        if (stat.st_size, stat.st_mtime_ns) != (self.identity["data_bytes"], self.identity["data_mtime_ns"]):
            raise ValueError(f"{self.data_path} changed while it was read; start again when nothing writes to it")
        meta = self.identity | {
            "documents": documents,
            "tokens": tokens,
            "bytes": target_bytes,
            "records": records,
            "skipped_lines": skipped,
            "first_skipped": first_skipped,
            "vocab_size": self.tokenizer.vocab_size,
            "contents_sha256": _joined(digests),
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False), encoding="utf-8")

    def _results(self) -> Iterator[dict]:
        """What each range gives, in the order of the file."""
        if self.num_workers == 1:
            with serial_tokenizers():
                for byte_range in self.ranges:
                    yield tokenize_range(self.data_path, self.kind, self.tokenizer, byte_range, self.tokenize)
            return
        workers = SimpleQueue()
        with ExitStack() as stack:
            # The pool is entered last and so closed first: no thread is left that waits for a worker already ended.
            for _ in range(self.num_workers):
                workers.put(stack.enter_context(_Worker(self.data_path, self.kind, self.tokenizer)))
            pool = stack.enter_context(ThreadPoolExecutor(self.num_workers))

            def run(byte_range: tuple[int, int]) -> dict:
                worker = workers.get()
                try:
                    return worker.run(byte_range, self.tokenize)
                finally:
                    workers.put(worker)

            pending = deque()
            try:
                for byte_range in self.ranges:
                    pending.append(pool.submit(run, byte_range))
                    if len(pending) > 2 * self.num_workers:  # results that wait to be written stay few
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Millions of small lists make the collector search them again and again, in vain: none of them is in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@garbage_collection_paused()
def tokenize_range(
    data_path: Path, kind: str, tokenizer: ChatTokenizer, byte_range: tuple[int, int], tokenize: bool = True
) -> dict:
    """The records whose lines begin inside a range of bytes.

    Returns lines, records, bad_count, bad_lines ([(line of the range from 1, reason)], the first few), target_bytes,
    and tokens uint16, mask uint8 or None, lengths int64 per document: the last three None if not tokenize.
    """
    tokens, masks, lengths = [], [], []
    bad_lines, bad_count, lines, count, target_bytes = [], 0, 0, 0, 0
    records, characters = [], 0

    def flush() -> None:
        nonlocal records, characters
        if records and tokenize:
            documents = tokenize_records(kind, records, tokenizer)
            sizes = np.array([len(ids) for ids, _ in documents], np.int64)
            lengths.append(sizes)
            tokens.append(_flat([ids for ids, _ in documents], np.uint16, sizes.sum()))
            if kind != "pretrain":
                masks.append(_flat([mask for _, mask in documents], np.uint8, sizes.sum()))
        records, characters = [], 0

    for line in _lines(data_path, *byte_range):
        lines += 1
        if not line:
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 at byte {error.start + 1} of the line"
        else:
            try:
                record = parse_record(kind, text)
            except RecordError as error:
                reason = str(error)
            else:
                count += 1
                target_bytes += count_target_bytes(kind, record)
                records.append(record)
                characters += len(text)
                if characters > BATCH_CHARACTERS:
                    flush()
                continue
        bad_count += 1
        if len(bad_lines) < SHOWN_ERRORS:
            bad_lines.append((lines, reason))
    flush()
    return {
        "lines": lines,
        "records": count,
        "bad_count": bad_count,
        "bad_lines": bad_lines,
        "target_bytes": target_bytes,
        "tokens": np.concatenate(tokens) if tokens else None,
        "mask": np.concatenate(masks) if masks else None,
        "lengths": np.concatenate(lengths) if lengths else None,
    }


def _lines(path: Path, start: int, end: int) -> Iterator[bytes]:
    """Lines that begin in [start, end), without white space around them, nor the byte order mark of the file."""
    try:
        with open(path, "rb") as file:
            if start:
                file.seek(start - 1)
                start += len(file.readline()) - 1  # the rest of a line that began in the range before
            while start < end:
                line = file.readline()
                if not line:
                    return
                first = start == 0
                start += len(line)
                yield (line.removeprefix(b"\xef\xbb\xbf") if first else line).strip()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; see --data_path") from error


def _flat(rows: list[list[int]], dtype: type, count: int) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype, count)


class _Worker:
    """A process that tokenizes ranges. It ends when its input closes, so it never outlives this process."""

    def __init__(self, data_path: Path, kind: str, tokenizer: ChatTokenizer):
        code = f"import sys; sys.path[:1] = [{str(ROOT)!r}]; from dataset.token_cache import worker_main; worker_main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._send((data_path, kind, tokenizer))

    def run(self, byte_range: tuple[int, int], tokenize: bool) -> dict:
        self._send((byte_range, tokenize))
        try:
            result = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        if isinstance(result, BaseException):
            raise result
        return result

    def _send(self, message: tuple) -> None:
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> ValueError:
        return ValueError(
            f"a tokenizing process ended early (exit status {self._process.wait()}). If the system killed it for lack "
            "of memory, free some or use fewer cores (taskset), then start again: nothing half-made is left behind"
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        try:
            self._process.stdin.close()
        except OSError:  # what was not sent yet has nowhere to go
            pass


def worker_main() -> None:
    """The process behind _Worker: ranges come in on standard input, their tokens go out on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the results
    data_path, kind, tokenizer = pickle.load(sys.stdin.buffer)
    while True:
        try:
            byte_range, tokenize = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = tokenize_range(data_path, kind, tokenizer, byte_range, tokenize)
        except Exception as error:
            result = error
        pickle.dump(result, output, protocol=pickle.HIGHEST_PROTOCOL)
        output.flush()


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def serial_tokenizers() -> Iterator[None]:
    """No threads inside the tokenizers library: once used, it warns in every process forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def file_lock(path: Path, show_progress: bool, what: str) -> Iterator[None]:
    """Hold a lock that the operating system releases when its holder dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if show_progress:
            print(f"waiting for another process that is making {what}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the name of folder when the block ends well and vanishes when it does not.

    Call with the lock held: what a killed process left under the temporary name is removed first.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():  # a rename that reaches the disk before its contents would name an empty file
            with open(file, "r+b") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def writing_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn a full or read-only disk into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        cures = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there")
        cures |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO), "make it writable")
        cures |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is in the way, move it")
        if error.errno not in cures:
            raise
        raise ValueError(
            f"cannot write {what} in {folder}: {error.strerror}; {cures[error.errno]}, or choose another --cache_dir"
        ) from error


def write_array(file, array: np.ndarray) -> None:
    # Not ndarray.tofile: on a full disk that says how many items were written, but not why no more.
    file.write(memoryview(np.ascontiguousarray(array)).cast("B"))


def _checked_stat(data_path: Path) -> os.stat_result:
    """Size and time of a data file that is there and readable. ValueError otherwise."""
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


def _open_whole(folder: Path) -> TokenCache | None:
    """The cache in a folder, or None where there is none or it is not whole: it is made again then."""
    try:
        return TokenCache(folder)
    except (OSError, ValueError, KeyError):
        return None
