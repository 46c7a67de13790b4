"""Send rows of data files through worker processes into one file, and report what was left out and why.

A step is a dataclass whose fields are the command's flags. Workers call it with each row: it returns the records that
come out, None to keep the line as it is, or raises Dropped. Blocks are cut by size alone and written in order, so the
output is the same with any number of workers. It is written next to its name and renamed at the end: a killed run
leaves the old file or none.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from dataset.disk import writing_errors
from dataset.lm_dataset import RecordError
from dataset.progress import ProgressBar
from dataset.workers import results_in_order, usable_cores
from model.flags import at_least, fraction
from scripts.prepare_sources import Block, find_files, layout, passages, read_blocks

EXAMPLES = 10  # of each reason, in the report
EXAMPLE_CHARACTERS = 300


class Dropped(Exception):
    """A row is left out: reason is one of few and is counted, detail is about this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


UNFIT = (Dropped, RecordError, AttributeError, LookupError, TypeError)  # what a row of another layout can raise


@dataclass
class Report:
    """Counts of rows in and out, and the reasons, of one block or of a whole run."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, other: "Report") -> None:
        for name in ("rows_in", "rows_out", "dropped", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:EXAMPLES]

    def count(self, counts: Counter, reason: str, where: str, row: str, detail: str = "") -> None:
        """Count a reason in self.dropped or self.changed, and keep the first rows as examples."""
        counts[reason] += 1
        if counts[reason] <= EXAMPLES:
            shown = row[:EXAMPLE_CHARACTERS] + "…" * (len(row) > EXAMPLE_CHARACTERS)
            example = {"where": where, "detail": detail, "row": shown.encode(errors="replace").decode()}
            self.examples.setdefault(reason, []).append(example)

    def write(self, path: Path, command: str, inputs: list[Path], settings: dict) -> None:
        """Write {path}.report.json, and the same in short to the screen."""
        print(f"{command}: {self.rows_in:,} rows in, {self.rows_out:,} rows out -> {path}")
        contents = {"command": command, "settings": settings, "inputs": {str(p): p.stat().st_size for p in inputs}}
        contents |= {"rows_in": self.rows_in, "rows_out": self.rows_out}
        for title, counts in (("dropped", self.dropped), ("changed", self.changed)):
            contents[title] = {}
            for name, count in counts.most_common():
                print(f"  {title} {name:40} {count:9,}  {count / max(self.rows_in, 1):6.2%}")
                contents[title][name] = {"rows": count, "examples": self.examples.get(name, [])}
        report_path = path.with_name(path.name + ".report.json")
        report_path.write_text(dumped(contents, indent=1) + "\n", encoding="utf-8")
        print(f"  ten examples of each: {report_path}", flush=True)


def dumped(record: object, **options) -> str:
    return json.dumps(record, ensure_ascii=False, default=str, **options)


def rows_of(block: Block, passage: int = 512) -> Iterator[tuple[int, str, object]]:
    """Yield (number, source text, decoded row or Dropped) of each row of a block."""
    if isinstance(block.rows, list):
        for number, row in enumerate(block.rows, block.first):
            yield number, (text := dumped(row)), _checked(row, text)
    elif layout(block.path) == "text":
        for text in filter(None, map(str.strip, passages(block.rows, passage))):
            yield block.first, text, {"text": text} if _is_utf8(text) else Dropped("not UTF-8")
    else:
        for number, line in enumerate(block.rows.split("\n"), block.first):
            line = line.strip().strip("\ufeff")  # files put together have a byte order mark in the middle
            if line:
                yield number, line, _decoded(line)


def _decoded(line: str) -> object:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Dropped("broken JSON" if _is_utf8(line) else "not UTF-8", str(error))
    if not _is_utf8(line):
        return Dropped("not UTF-8")
    return _checked(row, dumped(row) if "\\u" in line and "\\ud" in line.lower() else "")


def _checked(row: object, text: str) -> object:
    """Return a row, or Dropped if it is no record; text: the row as JSON, in which a bad byte is U+DC80 to U+DCFF."""
    if not _is_utf8(text):
        return Dropped("not UTF-8" if re.search("[\udc80-\udcff]", text) else "half a surrogate pair")
    return row if isinstance(row, dict) else Dropped("not a JSON object")


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:
        return False


def filter_block(step: "Step", block: Block) -> tuple[bytes, Report]:
    """Return the lines that a step makes from a block, and the report on it."""
    report, records = Report(), []
    for index, (number, source, row) in enumerate(rows_of(block, getattr(step, "passage", 512))):
        report.rows_in += 1
        where, changes = f"{block.path}:{number}", []
        try:
            if block.verdicts and block.verdicts[index]:
                raise Dropped(*block.verdicts[index])
            if isinstance(row, Dropped):
                raise Dropped(row.reason, row.detail)  # a raised row would hold this frame, and so the block
            made = step(row, changes)
        except UNFIT as error:
            is_named = isinstance(error, Dropped | RecordError)
            reason = re.sub(r"\bturn \d+", "a turn", str(error)) if is_named else "not a record"
            detail = getattr(error, "detail", "" if is_named else repr(error))
            report.count(report.dropped, reason, where, source, detail)
            continue
        records += [source] if made is None else made
        for change in changes:
            report.count(report.changed, change, where, dumped(made))
    lines = [record if isinstance(record, str) else dumped(record) for record in step.finish(records)]
    report.rows_out = len(lines)
    return "".join(line + "\n" for line in lines).encode(), report


def in_order(function: Callable, argument: object, blocks: Iterable[Block], args) -> Iterator:
    """Yield function(argument, block) for each block, in order, from worker processes; few blocks are in memory."""
    tasks = ((block,) for block in blocks)
    return results_in_order(functools.partial(function, argument), tasks, args.workers or usable_cores())


def all_blocks(paths: list[Path], title: str, args) -> Iterator[Block]:
    """Yield the blocks of several files, with a progress bar over their bytes."""
    with ProgressBar(title, sum(path.stat().st_size for path in paths), "B", show=not args.quiet) as bar:
        for path in paths:
            for block in read_blocks(path, args.encoding):
                yield block
                bar.update(block.size)


def check_output(path: Path, args, inputs: list[Path], name: str = "--output") -> None:
    """Raise ValueError if a path, given by the flag of that name, is an input, or is there and must not be replaced."""
    if any(path.exists() and path.samefile(source) for source in inputs):
        raise ValueError(f"{path} is an input too; give another {name}")
    if path.exists() and not args.overwrite:
        raise ValueError(f"{path} is there already; give another {name}, or --overwrite")


@contextmanager
def new_output(path: Path, args, inputs: list[Path], name: str = "--output"):
    """Yield (file to write bytes to, folder for scratch files); the file gets its name if all went well."""
    check_output(path, args, inputs, name)
    unfinished = path.with_name(path.name + ".unfinished")
    with writing_errors(path.parent, path.name, name):
        unfinished.mkdir(parents=True, exist_ok=True)
        lock = FileLock(unfinished / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing {path}; wait for it, or give another {name}") from None
        try:
            for stale in set(unfinished.iterdir()) - {unfinished / "lock"}:  # of a run that was killed
                stale.unlink()
            with open(unfinished / "rows", "wb") as file:
                yield file, unfinished
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished / "rows", path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            lock.release()


def flag(default, text: str, **options):
    """Return a field of a step that is a flag of its command, with options of argparse."""
    by_kind = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "*"}}
    by_kind |= {int: {"type": at_least(0)}, float: {"type": fraction}}  # a step's numbers are counts and shares
    return field(default=default, metadata={"help": text} | by_kind.get(type(default), {}) | options)


@dataclass
class Step:
    """One command: rows of args.inputs to args.output."""

    def __call__(self, row: dict, changes: list[str]) -> list[dict] | None:
        """Return the records that a row becomes, None if it stays as it is. Append to changes what was changed."""

    def finish(self, records: list) -> list:
        """Return the records of a block, once all its rows are done."""
        return records

    def settings(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata}

    def run(self, args) -> None:
        inputs = find_files(args.inputs)
        with new_output(args.output, args, inputs) as (file, _):
            self.write(file, all_blocks(inputs, args.command, args), inputs, args)

    def write(self, file, blocks: Iterable[Block], inputs: list[Path], args) -> None:
        """Send blocks through workers to a file, and write the report."""
        report = Report()
        for lines, part in in_order(filter_block, self, blocks, args):
            file.write(lines)
            report.add(part)
        if not report.rows_out:
            raise ValueError(f"no row is left of {report.rows_in:,}: {dict(report.dropped.most_common(5))}")
        report.write(args.output, args.command, inputs, self.settings())
