"""Make training files from raw sources, and look into them.

    python scripts/prepare_data.py convert raw.json -o sft.jsonl            ShareGPT, Alpaca, csv, parquet, plain text …
    python scripts/prepare_data.py clean sft.jsonl -o clean.jsonl           length, mojibake, refusals …: a flag each
    python scripts/prepare_data.py dedup a.jsonl b.jsonl -o one.jsonl --held_out valid.jsonl
    python scripts/prepare_data.py decontaminate one.jsonl -o fair.jsonl --evaluation ceval/ cmmlu/
    python scripts/prepare_data.py join fair.jsonl -o texts.jsonl           conversations to pretraining texts
    python scripts/prepare_data.py mix a.jsonl b.jsonl -o train.jsonl --epochs 1 2
    python scripts/prepare_data.py contrast sft.jsonl -o ordinary.jsonl     company for an identity's conversations
    python scripts/prepare_data.py inspect train.jsonl                      lengths, shares, rows as the model sees them
    python scripts/prepare_data.py recipe raw/ -o sft_512.jsonl --name sft_512      all the steps of a published file

Files are read in blocks by a process per core; memory does not grow with them. The same input and flags give the same
bytes. Each command writes {output}.report.json: what came in, what was left out by which rule, ten examples of each.
"""

import argparse
import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.flags import at_least
from model.streams import entry_point
from scripts.prepare_formats import Convert
from scripts.prepare_inspect import Inspect
from scripts.prepare_mix import Contrast, Join, Mix
from scripts.prepare_overlap import Decontaminate, Dedup
from scripts.prepare_pipeline import Step, check_output, find_files, flag
from scripts.prepare_rules import Clean

# How each published file is made from raw sources; the kinds of these are in docs/data.md.
RECIPES = {
    "pretrain": "convert --to conversation | clean --max_chars 512 --min_chinese 0.5 | dedup | join --max_chars 512",
    "sft_512": "convert --to conversation | clean --max_chars 512 --min_chinese 0.5 | dedup | mix",
    "sft_1024": "convert --to conversation | clean --max_chars 1024 | dedup | mix",
    "sft_2048": "convert --to conversation | clean --max_chars 2048 | dedup | mix",
    "dpo": "convert --to preference | clean --max_chars 3000 | dedup | mix",
    "reason": "convert --to reason | clean --max_chars 1024 | dedup | mix",
    "identity": "convert --to conversation | clean --min_chars 1 --max_chars 512 | dedup --near 0 | mix",
    "medical": "convert --to conversation | clean --max_chars 1024 --min_chinese 0.3 | dedup | mix",
}


@dataclass
class Recipe(Step):
    """Run the steps that make a published file from raw sources, and print each as a command."""

    name: str = flag("sft_512", "which file (default: %(default)s)", choices=tuple(RECIPES))
    held_out: tuple = flag((), "files whose rows must not be in the output", type=Path)
    evaluation: tuple = flag((), "evaluation files whose text must not be in the output", type=Path)

    def run(self, args) -> None:
        check_output(args.output, args, find_files(args.inputs))
        steps = RECIPES[self.name].split(" | ")
        more = {"dedup": ["--held_out", *self.held_out], "decontaminate": ["--evaluation", *self.evaluation]}
        if self.evaluation:
            steps.insert(-1, "decontaminate")
        common = [
            "--overwrite",
            *(["--quiet"] if args.quiet else []),
            *([f"--workers={args.workers}"] if args.workers else []),
        ]
        inputs, between = args.inputs, []
        for number, step in enumerate(steps, 1):
            name, *flags = step.split()
            between.append(args.output.with_name(f"{args.output.stem}.{number}_{name}.jsonl"))
            output = args.output if number == len(steps) else between[-1]
            encoding = [f"--encoding={args.encoding}"] if number == 1 else []
            words = [name, *inputs, "-o", output, *flags, *more.get(name, []), *encoding]
            print("python scripts/prepare_data.py " + shlex.join(map(str, words)), flush=True)
            main([*map(str, words), *common])
            inputs = [output]
        for path in between[:-1]:
            path.unlink()


COMMANDS = (Convert, Clean, Dedup, Decontaminate, Join, Mix, Contrast, Inspect, Recipe)


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for step in COMMANDS:
        add = commands.add_parser(step.__name__.lower(), help=step.__doc__, description=step.__doc__).add_argument
        add("inputs", nargs="+", type=Path, help="data files or folders of them")
        if getattr(step, "writes", True):
            add("--output", "-o", type=Path, required=True, help="the jsonl file to write")
            add("--overwrite", action="store_true", help="replace an output that is there")
        add("--workers", type=at_least(1), help="processes (default: one per core)")
        add("--encoding", default="utf-8", help="of the inputs: gb18030, utf-16 … (default: %(default)s)")
        add("--quiet", action="store_true", help="no progress bar")
        for field in dataclasses.fields(step):
            if field.metadata:
                add(f"--{field.name}", default=field.default, **field.metadata)
    return parser


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = new_parser().parse_args(argv)
    step = next(step for step in COMMANDS if step.__name__.lower() == args.command)
    step(**{field.name: getattr(args, field.name) for field in dataclasses.fields(step) if field.metadata}).run(args)


if __name__ == "__main__":
    main()
