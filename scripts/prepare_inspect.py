"""Show what is in a data file: counts, lengths, scripts, roles, duplicates, and rows as the model sees them."""

import heapq
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
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
        paths = find_files(args.inputs)
        guess = self.kind or guess_kind(paths, args.encoding)
        self.kind = guess if guess in KINDS else "conversation"
        self.tokenizer = ChatTokenizer(self.tokenizer_path)
        total, hashes, shown = defaultdict(Counter), [], []
        for counts, new_hashes, candidates in in_order(look_at_block, self, all_blocks(paths, "inspect", args), args):
            for name, counter in counts.items():
                total[name].update(counter)
            hashes.append(new_hashes)
            shown = heapq.nsmallest(self.rows, shown + candidates)
        if not total["lengths"]:
            raise ValueError(f"no {self.kind} record in {paths[0]}: {dict(total['bad'].most_common(3))}")
        lengths = np.zeros(LONGEST + 1, np.int64)  # documents of each length
        lengths[list(total["lengths"])] = list(total["lengths"].values())
        hashes = np.concatenate(hashes)
        print_statistics(total, lengths, len(hashes) - len(np.unique(hashes)), self)
        if self.picture:
            draw_histogram(lengths, self.max_seq_len, self.picture)
            print(f"picture: {self.picture}")
        for number, (_, where, line) in enumerate(sorted(shown)):
            show_row(self, where, line, as_table=not number)


def look_at_block(look: Inspect, block: Block) -> tuple[dict[str, Counter], np.ndarray, list[tuple]]:
    """Return counts by name, (records,) hashes, and (random number, where, line) of the rows that may be shown."""
    found, records, hashes, shown = defaultdict(Counter), [], [], []
    for number, line, row in rows_of(block):
        found["sums"]["rows"] += 1
        try:
            if isinstance(row, Dropped):
                raise RecordError(str(row))
            record = parse_record(look.kind, line)
        except RecordError as error:
            found["bad"][str(error)[:60]] += 1
            continue
        records.append(record)
        hashes.append(hash_of(line))
        where = f"{block.path}:{number}"
        shown.append((hash_of(f"{look.seed} {where}"), where, line))
        found["sums"]["bytes"] += count_target_bytes(look.kind, record)
        sides = [] if look.kind == "pretrain" else [record] if look.kind == "conversation" else record
        for side in sides:
            found["turns"][len(side)] += 1
            found["roles"].update(turn["role"] for turn in side)
        text = "".join(turn["content"] for side in sides for turn in side) if sides else record
        codes = code_points(text)
        classes = character_classes()[codes]
        han, letters = classes == HAN, classes == LETTER
        scripts = {"Han": han, "Latin": letters & (codes < 0x250), "other letters": letters & (codes >= 0x250)}
        scripts["no letter"] = ~(han | letters)
        found["scripts"].update({name: int(np.count_nonzero(of)) for name, of in scripts.items()})
    for ids, mask in tokenize_records(look.kind, records, look.tokenizer):
        found["lengths"][min(len(ids), LONGEST)] += 1
        found["sums"]["learned"] += len(ids) - 1 if mask is None else sum(mask[1:])
    return found, np.array(hashes, np.uint64), heapq.nsmallest(look.rows, shown)


def print_statistics(total: dict[str, Counter], lengths: np.ndarray, duplicates: int, look: Inspect) -> None:
    sums, bad, documents = total["sums"], total["bad"], int(lengths.sum())
    tokens = int(lengths @ np.arange(len(lengths)))
    print(f"{sums['rows']:,} rows, {sums['rows'] - bad.total():,} of them {look.kind} records")
    for reason, count in bad.most_common(5):
        print(f"  not one: {reason:60} {count:,}")
    print(f"{tokens:,} tokens in {documents:,} documents, {sums['learned']:,} learned, ", end="")
    print(f"{sums['bytes'] / max(sums['learned'], 1):.2f} bytes per learned token")
    print(f"{duplicates:,} exact duplicates")
    points = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0]
    at = np.searchsorted(np.cumsum(lengths), [max(share * documents, 1) for share in points])
    print("tokens a document: " + "  ".join(f"{share:.0%} {n:,}" for share, n in zip(points, at, strict=True)))
    edges = [0, *(1 << n for n in range(3, 17))]
    counts = np.add.reduceat(lengths, edges)
    used = np.flatnonzero(counts)
    for n in range(used[0], used[-1] + 1):
        last = edges[n + 1] - 1 if n + 1 < len(edges) else LONGEST
        print(f"  {edges[n]:6,} – {last:6,} {counts[n]:10,} {'█' * round(40 * counts[n] / counts.max())}")
    over = np.maximum(np.arange(len(lengths)) - 1 - look.max_seq_len, 0)
    longer = int(lengths[over > 0].sum())
    print(f"--max_seq_len {look.max_seq_len}: {longer:,} documents ({longer / documents:.1%}) are longer, ", end="")
    print(f"{lengths @ over:,} tokens ({lengths @ over / max(tokens, 1):.1%}) are beyond it")
    for title, name in (("characters", "scripts"), ("turns by role", "roles")):
        shares = [f"{key} {count / total[name].total():.1%}" for key, count in total[name].most_common() if count]
        if shares:
            print(f"{title}: {'  '.join(shares)}")
    if total["turns"]:
        counts = sorted(total["turns"].items())[:12]
        print("turns a conversation: " + "  ".join(f"{n}: {count:,}" for n, count in counts))


def draw_histogram(lengths: np.ndarray, max_seq_len: int, path: Path) -> None:
    """Draw the lengths, readable on light and dark pages."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    longest = max(int(np.flatnonzero(lengths)[-1]), max_seq_len) + 1
    size = max(longest // 100, 1)
    starts = np.arange(0, longest, size)
    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
    with rc_context({**grey, "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.2, 2.7), layout="constrained")
        axes = figure.add_subplot(xlabel="tokens a document", title=f"line: max_seq_len {max_seq_len}")
        axes.bar(starts, np.add.reduceat(lengths[:longest], starts), size, align="edge", color="#4c8bf5")
        axes.axvline(max_seq_len + 1, color="#e8710a")
        figure.savefig(path, format="svg", transparent=True)


def show_row(look: Inspect, where: str, line: str, as_table: bool) -> None:
    """Print one row as the model sees it: what is learned stands out.

    as_table: with inputs and labels around the first learned token. A label is the next input, -100 if not learned.
    """
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
            first = max(mask.index(1) - 6, 0) if 1 in mask else 0
            print("position  input  label  input's text")
            for n in range(first, min(first + 14, len(ids) - 1)):
                text = look.tokenizer.decode([ids[n]], skip_control=False)
                print(f"{n:8}  {ids[n]:5} {ids[n + 1] if mask[n + 1] else -100:6}  {text!r}")
