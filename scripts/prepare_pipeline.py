"""Rows of data files through worker processes into one file, with a report of what was left out and why.

A step is an object that workers call with each row: it returns the records that come out, None to keep the line as it
is, or raises Dropped. Blocks are cut by size alone and written in order, so the output is the same with any number of
workers. The output is written next to its name and renamed at the end: a killed run leaves the old file or none.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

from dataset.disk import writing_errors
from dataset.progress import ProgressBar
from dataset.workers import usable_cores
from scripts.prepare_sources import Block, find_files, passages, read_blocks

EXAMPLES = 10  # of each reason, in the report
EXAMPLE_CHARACTERS = 300


class Dropped(Exception):
    """Why a row is left out: reason is one of few and is counted, detail is about this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class Report:
    """What came in, what went and why. Of workers' results, and of a whole run."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, other: "Report") -> None:
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.dropped += other.dropped
        self.changed += other.changed
        for reason, examples in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += examples[: EXAMPLES - len(known)]

    def count(self, counts: Counter, reason: str, where: str, row: str, detail: str = "") -> None:
        """Count a reason among dropped or changed, with an example."""
        counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            shown = row if len(row) <= EXAMPLE_CHARACTERS else row[:EXAMPLE_CHARACTERS] + "…"
            shown = shown.encode(errors="replace").decode()
            examples.append({"where": where, "row": shown} | ({"detail": detail} if detail else {}))


def rows_of(block: Block, passage: int = 512) -> Iterator[tuple[int, str, object]]:
    """(number, source text, decoded row or Dropped) of each row of a block."""
    if isinstance(block.data, list):
        for number, row in enumerate(block.data, block.first):
            yield number, "", row if isinstance(row, dict) else Dropped("not a JSON object")
        return
    if block.is_text:
        try:
            for text in passages(block.data.decode(), passage):
                if text.strip():
                    yield block.first, "", {"text": text.strip()}
        except UnicodeDecodeError as error:
            yield block.first, "", Dropped("not UTF-8", str(error))
        return
    for number, line in enumerate(block.data.split(b"\n"), block.first):
        try:
            text = line.decode().strip().strip("\ufeff")  # files put together have a byte order mark in the middle
            if text:
                row = json.loads(text)
                if "\\ud" in text.lower():
                    dumped(row).encode()  # half of a surrogate pair is no character
                yield number, text, row if isinstance(row, dict) else Dropped("not a JSON object")
        except UnicodeDecodeError as error:
            yield number, line.decode(errors="replace"), Dropped("not UTF-8", f"at byte {error.start + 1} of the line")
        except UnicodeEncodeError:
            yield number, text, Dropped("half a surrogate pair")
        except (ValueError, RecursionError) as error:
            yield number, text, Dropped("broken JSON", str(error))


def filter_block(step: Callable, block: Block) -> tuple[bytes, Report]:
    """The lines that a step makes of a block, and the report on it."""
    report, lines = Report(), []
    for number, source, row in rows_of(block, getattr(step, "passage", 512)):
        report.rows_in += 1
        where, changes = f"{block.path}:{number}", []
        try:
            if isinstance(row, Dropped):
                raise row
            records = step(row, changes)
            made = [source] if records is None else [dumped(record) for record in records]
        except Dropped as dropped:
            report.count(report.dropped, dropped.reason, where, source or dumped(row), dropped.detail)
            continue
        for change in changes:
            report.count(report.changed, change, where, made[0])
        lines += made
        report.rows_out += len(made)
    return "".join(line + "\n" for line in lines).encode(), report


def dumped(record: object) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)


def in_order(function: Callable, argument: object, blocks: Iterable, workers: int | None = None) -> Iterator[tuple]:
    """(block, function(argument, block)) for each block, in order, computed by processes; few blocks are in memory."""
    workers = workers or usable_cores()
    if workers == 1:
        for block in blocks:
            yield block, function(argument, block)
        return
    pending = deque()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(function, argument))
    try:
        for block in blocks:
            pending.append((block, pool.submit(_run, block)))
            if len(pending) > 2 * workers:
                block, result = pending.popleft()
                yield block, result.result()
        while pending:
            block, result = pending.popleft()
            yield block, result.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process ended early. If the system killed it for lack of memory, free some or use fewer "
            "--workers, then start again: nothing half-made is left behind"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable, argument: object) -> None:
    global _job
    _job = function, argument
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(block: Block):
    function, argument = _job
    return function(argument, block)


def all_blocks(paths: list[Path], encoding: str, title: str, quiet: bool) -> Iterator[Block]:
    """The blocks of several files, with a progress bar over their bytes."""
    with ProgressBar(title, sum(path.stat().st_size for path in paths), "B", show=not quiet) as bar:
        for path in paths:
            for block in read_blocks(path, encoding):
                yield block
                bar.update(block.size)


@contextmanager
def new_output(path: Path, inputs: list[Path], overwrite: bool):
    """A file to write bytes to, which takes its name when the block ends well. Raises ValueError if it may not."""
    if any(path.exists() and path.samefile(source) for source in inputs):
        raise ValueError(f"{path} is an input too; give another --output")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; give another --output, or --overwrite")
    unfinished = path.with_name(path.name + ".unfinished")
    with writing_errors(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def write_report(path: Path, command: str, inputs: list[Path], report: Report, **facts) -> None:
    """{output}.report.json, and the same in short on the screen."""
    reasons = {
        reason: {"rows": count, "examples": report.examples.get(reason, [])}
        for reason, count in report.dropped.most_common()
    }
    contents = {
        "command": command,
        "inputs": [{"path": str(source), "bytes": source.stat().st_size} for source in inputs],
        **facts,
        "rows_in": report.rows_in,
        "rows_out": report.rows_out,
        "dropped": reasons,
        "changed": {
            name: {"rows": count, "examples": report.examples.get(name, [])}
            for name, count in report.changed.most_common()
        },
    }
    report_path = path.with_name(path.name + ".report.json")
    report_path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{command}: {report.rows_in:,} rows in, {report.rows_out:,} rows out -> {path}")
    for title, counts in (("left out", report.dropped), ("changed", report.changed)):
        for name, count in counts.most_common():
            print(f"  {title:9} {name:32} {count:9,}  {count / max(report.rows_in, 1):6.2%}")
    print(f"  examples of each: {report_path}", flush=True)


def run_step(command: str, step: Callable, args) -> Report:
    """Send every row of args.inputs through a step to args.output, and report."""
    inputs, report = find_files(args.inputs), Report()
    blocks = all_blocks(inputs, args.encoding, command, args.quiet)
    with new_output(args.output, inputs, args.overwrite) as file:
        for _, (lines, part) in in_order(filter_block, step, blocks, args.workers):
            file.write(lines)
            report.add(part)
        if not report.rows_out:
            raise ValueError(f"no row is left of {report.rows_in:,}: {dict(report.dropped.most_common(5))}")
        write_report(args.output, command, inputs, report, settings=step.settings())
    return report
