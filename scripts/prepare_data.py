"""Make training files from raw sources, and look into them.

    python scripts/prepare_data.py convert raw.json --output dataset/sft.jsonl          ShareGPT, Alpaca, csv, parquet …
    python scripts/prepare_data.py clean dataset/sft.jsonl --output dataset/sft_clean.jsonl
    python scripts/prepare_data.py inspect dataset/sft_clean.jsonl --max_seq_len 512

Files are read in blocks by a process per core; memory does not grow with them. The same input and flags give the same
bytes. Each command writes {output}.report.json: what came in, what was left out by which rule, ten examples of each.
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.tokenization import ChatTokenizer
from scripts.prepare_formats import KINDS, Convert, guess_kind
from scripts.prepare_inspect import Look, inspect_files
from scripts.prepare_pipeline import rows_of, run_step
from scripts.prepare_rules import MASKS, Clean
from scripts.prepare_sources import find_files, read_blocks


def first_rows(args) -> list[dict]:
    first = next(read_blocks(find_files(args.inputs)[0], args.encoding))
    return [row for _, _, row in itertools.islice(rows_of(first), 100) if isinstance(row, dict)]


def convert(args) -> None:
    """Turn any known layout into records of this project."""
    if args.to is None:
        args.to = guess_kind(first_rows(args))
        print(f"these become {args.to} records; --to chooses another kind")
    run_step("convert", Convert(args.to, args.passage), args)


def clean(args) -> None:
    """Leave out rows that are no good to learn from, and mask personal data."""
    names = Clean().settings()
    run_step("clean", Clean(**{name: getattr(args, name) for name in names}), args)


def inspect(args) -> None:
    """Count what is in a file, and show rows as the model sees them."""
    look = Look(args.kind or guess_kind(first_rows(args)), ChatTokenizer(args.tokenizer_path), args.seed, args.rows)
    look.kind = KINDS[look.kind]
    inspect_files(args.inputs, look, args.max_seq_len, args.picture, args)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, writes: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(run=function)
        sub.add_argument("inputs", nargs="+", type=Path, help="data files or folders")
        if writes:
            sub.add_argument("--output", "-o", type=Path, required=True, help="the jsonl file to write")
            sub.add_argument("--overwrite", action="store_true", help="replace an output that is there")
        sub.add_argument("--workers", type=int, help="processes (default: one per core)")
        sub.add_argument("--encoding", default="utf-8", help="of the inputs: gb18030, utf-16 … (default: utf-8)")
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        return sub

    sub = command(convert)
    sub.add_argument("--to", choices=list(KINDS), help="kind of record (default: what the first rows look like)")
    sub.add_argument("--passage", type=int, default=512, help="longest passage of plain text, in characters")

    sub = command(clean)
    rules = Clean()
    add = sub.add_argument
    add("--min_chars", type=int, default=rules.min_chars, help="drop shorter rows (default: %(default)s)")
    add(
        "--max_chars",
        type=int,
        help="drop rows of this many characters or more (default: 512; preferences: 3000 a side)",
    )
    add("--min_chinese", type=float, default=0.0, help="least share of Han characters (default: %(default)s)")
    add(
        "--max_marks",
        type=float,
        default=rules.max_marks,
        help="largest share of punctuation and symbols (default: %(default)s)",
    )
    add(
        "--max_repeated_lines",
        type=float,
        default=rules.max_repeated_lines,
        help="largest share of text in lines seen before",
    )
    add(
        "--max_repeated_ngrams",
        type=float,
        default=rules.max_repeated_ngrams,
        help="largest share of 10-character runs seen before",
    )
    for name, text in (
        ("mojibake", "wrongly decoded text"),
        ("markup", "HTML left over, tags and code fences without their other half"),
        ("turns", "empty turns and one-sided conversations"),
        ("cut", "answers cut in the middle"),
        ("refusals", "refusals"),
        ("other_names", "answers in another model's name"),
    ):
        add(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=f"drop {text}")
    add("--mask", nargs="*", choices=list(MASKS), default=list(MASKS), help="what to mask (default: all)")

    sub = command(inspect, writes=False)
    add = sub.add_argument
    add("--kind", choices=list(KINDS), help="kind of record (default: what the first rows look like)")
    add("--tokenizer_path", type=Path, default=ROOT / "model", help="folder with tokenizer.json")
    add("--max_seq_len", type=int, default=512, help="count what this length cuts (default: %(default)s)")
    add("--rows", type=int, default=10, help="random rows to show (default: %(default)s)")
    add("--seed", type=int, default=42, help="which rows (default: %(default)s)")
    add("--picture", type=Path, help="write the histogram of lengths as an SVG file")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = new_parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
