"""What is in a data file: counts, lengths, scripts, roles, duplicates, and rows as the model sees them."""

import heapq
import html
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset.lm_dataset import KINDS, RecordError, count_target_bytes, parse_record, tokenize_records
from dataset.tokenization import ChatTokenizer
from scripts.prepare_formats import guess_kind
from scripts.prepare_overlap import hash_of
from scripts.prepare_pipeline import Dropped, Step, all_blocks, flag, in_order, rows_of
from scripts.prepare_rules import HAN, LETTER, character_classes, code_points
from scripts.prepare_sources import Block, find_files

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 1 << 16  # tokens; longer documents count as this long
SHOWN_IDS = 48


@dataclass
class Inspect(Step):
    """Count what is in files of records, and show some as the model sees them."""

    kind: str | None = flag(None, "kind of record (default: what the first rows look like)", choices=KINDS)
    tokenizer_path: Path = flag(ROOT / "model", "folder with tokenizer.json (default: model/)", type=Path)
    max_seq_len: int = flag(512, "count what this length cuts (default: %(default)s)")
    rows: int = flag(10, "random rows to show (default: %(default)s)")
    seed: int = flag(42, "which rows (default: %(default)s)")
    picture: Path | None = flag(None, "write the histogram of lengths to this SVG file", type=Path)
    writes = False

    def run(self, args) -> None:
        paths, total = find_files(args.inputs), Statistics()
        guess = self.kind or guess_kind(paths, args.encoding)
        self.kind = guess if guess in KINDS else "conversation"
        self.tokenizer = ChatTokenizer(self.tokenizer_path)
        for part in in_order(look_at_block, self, all_blocks(paths, "inspect", args), args):
            total.add(part, self.rows)
        if total.rows == total.bad.total():
            raise ValueError(f"no {self.kind} record in {paths[0]}: {dict(total.bad.most_common(3))}")
        print_statistics(total, self.kind, self.max_seq_len)
        if self.picture:
            self.picture.write_text(histogram_svg(total.lengths, self.max_seq_len), encoding="utf-8")
            print(f"picture: {self.picture}")
        for number, (_, where, line) in enumerate(sorted(total.shown)):
            show_row(self, where, line, as_table=not number)


@dataclass
class Statistics:
    rows: int = 0
    bad: Counter = field(default_factory=Counter)
    bytes: int = 0  # of UTF-8 text that is learned
    targets: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(LONGEST + 1, np.int64))  # documents of each length
    scripts: Counter = field(default_factory=Counter)  # characters
    roles: Counter = field(default_factory=Counter)
    turns: Counter = field(default_factory=Counter)  # conversations of each number of turns
    hashes: list[np.ndarray] = field(default_factory=list)  # (rows,) uint64
    shown: list[tuple] = field(default_factory=list)  # (random number, where, line) of the rows to show

    def add(self, other: "Statistics", rows: int) -> None:
        self.rows += other.rows
        self.bytes += other.bytes
        self.targets += other.targets
        self.lengths += other.lengths
        for name in ("bad", "scripts", "roles", "turns"):
            getattr(self, name).update(getattr(other, name))
        self.hashes += other.hashes
        self.shown = heapq.nsmallest(rows, self.shown + other.shown)


def look_at_block(look: Inspect, block: Block) -> Statistics:
    found, records, hashes = Statistics(), [], []
    for number, line, row in rows_of(block):
        found.rows += 1
        try:
            if isinstance(row, Dropped):
                raise RecordError(str(row))
            record = parse_record(look.kind, line)
        except RecordError as error:
            found.bad[str(error)[:60]] += 1
            continue
        records.append(record)
        hashes.append(hash_of(line))
        where = f"{block.path}:{number}"
        found.shown.append((hash_of(f"{look.seed} {where}"), where, line))
        found.bytes += count_target_bytes(look.kind, record)
        sides = [] if look.kind == "pretrain" else [record] if look.kind == "conversation" else record
        for side in sides:
            found.turns[len(side)] += 1
            found.roles.update(turn["role"] for turn in side)
        texts = [turn["content"] or "" for side in sides for turn in side] or [record]
        count_scripts(found.scripts, code_points("".join(texts)))
    for ids, mask in tokenize_records(look.kind, records, look.tokenizer):
        found.lengths[min(len(ids), LONGEST)] += 1
        found.targets += len(ids) - 1 if mask is None else sum(mask[1:])
    found.hashes, found.shown = [np.array(hashes, np.uint64)], heapq.nsmallest(look.rows, found.shown)
    return found


def count_scripts(scripts: Counter, codes: np.ndarray) -> None:
    classes = character_classes()[np.minimum(codes, 0xFFFF)]
    letters = classes == LETTER
    latin = int(np.count_nonzero(letters & (codes < 0x250)))
    scripts["Han"] += int(np.count_nonzero(classes == HAN))
    scripts["Latin"] += latin
    scripts["other letters"] += int(np.count_nonzero(letters)) - latin
    scripts["no letter"] += int(np.count_nonzero((classes != HAN) & ~letters))


def print_statistics(total: Statistics, kind: str, max_seq_len: int) -> None:
    lengths, documents = total.lengths, int(total.lengths.sum())
    tokens = int(lengths @ np.arange(len(lengths)))
    hashes = np.concatenate(total.hashes)
    print(f"{total.rows:,} rows, {total.rows - total.bad.total():,} of them {kind} records")
    for reason, count in total.bad.most_common(5):
        print(f"  not one: {reason:60} {count:,}")
    print(f"{tokens:,} tokens in {documents:,} documents, {total.targets:,} learned, ", end="")
    print(f"{total.bytes / max(total.targets, 1):.2f} bytes per learned token")
    print(f"{len(hashes) - len(np.unique(hashes)):,} exact duplicates")
    points = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0]
    at = np.searchsorted(np.cumsum(lengths), [max(share * documents, 1) for share in points])
    print("tokens a document: " + "  ".join(f"{share:.0%} {n:,}" for share, n in zip(points, at, strict=True)))
    for low, high, count in histogram(lengths):
        print(f"  {low:6,} – {high:6,} {count:10,} {'█' * round(40 * count / max(c for *_, c in histogram(lengths)))}")
    over = np.arange(len(lengths)) - 1 - max_seq_len
    cut = int(lengths[over > 0].sum()), int((lengths * np.maximum(over, 0)).sum())
    print(f"--max_seq_len {max_seq_len}: {cut[0]:,} documents ({cut[0] / documents:.1%}) are longer, ", end="")
    print(f"{cut[1]:,} tokens ({cut[1] / max(tokens, 1):.1%}) lie beyond")
    for title, counts in (("characters", total.scripts), ("turns by role", total.roles)):
        shares = "  ".join(f"{name} {count / counts.total():.1%}" for name, count in counts.most_common() if count)
        print(f"{title}: {shares}" if shares else "", end="\n" if shares else "")
    if total.turns:
        print("turns a conversation: " + "  ".join(f"{n}: {count:,}" for n, count in sorted(total.turns.items())[:12]))


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, documents) of about a dozen ranges that double."""
    used = np.flatnonzero(lengths)
    edges = [0, *(1 << n for n in range(3, 17)), LONGEST + 1]
    rows = [(low, high - 1, int(lengths[low:high].sum())) for low, high in zip(edges, edges[1:], strict=False)]
    return [row for row in rows if row[1] >= used[0] and row[0] <= used[-1]]


def histogram_svg(lengths: np.ndarray, max_seq_len: int) -> str:
    """A picture of the lengths, readable on light and dark pages."""
    longest = max(int(np.flatnonzero(lengths)[-1]), max_seq_len) + 1
    bars = np.add.reduceat(lengths[:longest], np.arange(0, longest, max(longest // 100, 1)))
    width, height, left = 600, 240, 10
    step = width / len(bars)
    shapes = [
        f'<rect x="{left + n * step:.1f}" y="{height - 200 * count / bars.max():.1f}" width="{step * 0.9:.1f}" '
        f'height="{200 * count / bars.max():.1f}" fill="#4c8bf5"/>'
        for n, count in enumerate(bars)
    ]
    cut = left + width * (max_seq_len + 1) / longest
    label = html.escape(f"tokens a document: 0 to {longest - 1:,}; line: max_seq_len {max_seq_len}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 20} {height + 30}" font-family="sans-serif">'
        + "".join(shapes)
        + f'<line x1="{cut:.1f}" x2="{cut:.1f}" y1="20" y2="{height}" stroke="#e8710a" stroke-width="2"/>'
        + f'<text x="{left}" y="{height + 20}" font-size="13" fill="#808080">{label}</text></svg>\n'
    )


def show_row(look: Inspect, where: str, line: str, as_table: bool) -> None:
    """One row as the model sees it: what is learned stands out."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    learned, plain = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    print(f"\n--- {where}" + ("" if colour else "   (⟦learned⟧)"))
    if as_table:
        print(f"line: {line[:200]}{'…' * (len(line) > 200)}")
    for ids, mask in tokenize_records(look.kind, [parse_record(look.kind, line)], look.tokenizer):
        mask = mask or [1] * len(ids)
        print("ids: " + " ".join(map(str, ids[:SHOWN_IDS])) + (f" … ({len(ids)})" if len(ids) > SHOWN_IDS else ""))
        start = 0
        for end in [n for n in range(1, len(ids)) if mask[n] != mask[n - 1]] + [len(ids)]:
            text = look.tokenizer.decode(ids[start:end], skip_control=False)
            print(f"{learned}{text}{plain}" if mask[start] else text, end="")
            start = end
        print()
        if as_table:
            print_labels(look, ids, mask)


def print_labels(look: Inspect, ids: list[int], mask: list[int]) -> None:
    """Inputs and labels around the first learned token: a label is the next input, or -100 if it is not learned."""
    first = max(mask.index(1) - 6, 0) if 1 in mask else 0
    print("position  input  label  input's text")
    for n in range(first, min(first + 14, len(ids) - 1)):
        text = look.tokenizer.decode([ids[n]], skip_control=False)
        print(f"{n:8}  {ids[n]:5} {ids[n + 1] if mask[n + 1] else -100:6}  {text!r}")
