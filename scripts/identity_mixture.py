"""Mix training data for an identity adapter that names the model when asked who it is, and only then.

    tail -n 19000 dataset/sft_mini_512.jsonl > dataset/sft_part.jsonl
    python scripts/identity_mixture.py --identity dataset/lora_identity.jsonl \\
        --ordinary dataset/sft_part.jsonl --output dataset/identity_mixture.jsonl

A hundred conversations about the model alone teach a small one to bring its name into everything. So this repeats them
and mixes in ordinary conversations, many of them look-alikes: parts to play ("You are a historian …", 扮演 …) and
questions with "you", "who", "name" or "AI" in them. It leaves out ordinary conversations that ask about the model
itself, because their answers would contradict. benchmarks/RESULTS.md says which kinds helped.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.weights import write_atomically
from trainer.arguments import run_script

ABOUT_THE_MODEL = re.compile(
    r"你是(什么|谁|哪)|你会|你能做|你可以(帮助我)?做|你叫|你的名字|自我介绍|介绍.{0,4}你自己|你有|你喜欢|你觉得自己"
    r"|who are you|your name|yourself|what can you do|are you (an?|human|real)",
    re.IGNORECASE,
)
LOOKS_ALIKE = re.compile(
    r"你|谁|名字|who|your|you are|AI|人工智能|模型|助手|介绍|assistant|model|role|act as|pretend|imagine|扮演|作者",
    re.IGNORECASE,
)
PART_TO_PLAY = re.compile(
    r"^(you are|you're|act as|pretend|imagine|role|as a|suppose you|take the role)|扮演|假设你|你是一", re.IGNORECASE
)


def first_question(record: dict) -> str:
    turn = record["conversations"][0]
    return turn["content"] if turn["role"] == "user" else ""


def mixture(identity: list[dict], ordinary: list[dict], repeats: int, alike: int, others: int, seed: int) -> list[dict]:
    """Mix identity `repeats` times, all parts to play, `alike` look-alikes and `others` of the rest, as far as they go.

    Questions of look-alikes are shorter than 200 characters, of the rest than 120.
    """
    rng = random.Random(seed)
    questions = [(record, question) for record in ordinary if (question := first_question(record))]
    questions = [(record, question) for record, question in questions if not ABOUT_THE_MODEL.search(question)]
    parts = [record for record, question in questions if PART_TO_PLAY.search(question)]
    near = [record for record, question in questions if LOOKS_ALIKE.search(question) and len(question) < 200]
    rest = [record for record, question in questions if len(question) < 120]
    mixed = identity * repeats + parts
    mixed += rng.sample(near, min(alike, len(near))) + rng.sample(rest, min(others, len(rest)))
    rng.shuffle(mixed)
    return mixed


def read(path: Path) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"{path} not found")
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    if not all(record.get("conversations") for record in records):
        raise ValueError(f"{path} holds records without conversations")
    return records


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--identity", type=Path, required=True, help="conversations about the model")
    add("--ordinary", type=Path, required=True, help="conversations about other things")
    add("--output", type=Path, required=True)
    add("--repeats", type=int, default=3, help="of the identity conversations (default: %(default)s)")
    add("--alike", type=int, default=2000, help="ordinary ones that look alike (default: %(default)s)")
    add("--others", type=int, default=1800, help="other ordinary ones (default: %(default)s)")
    add("--seed", type=int, default=8)
    args = parser.parse_args(argv)
    mixed = mixture(read(args.identity), read(args.ordinary), args.repeats, args.alike, args.others, args.seed)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in mixed)
    write_atomically(args.output, lambda file: file.write(lines.encode()))
    print(f"{args.output}: {len(mixed):,} conversations")


if __name__ == "__main__":
    run_script(main)
