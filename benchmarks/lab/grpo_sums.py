"""What learning from outcomes adds: sums that a tiny model half masters, and three ways to go on from there.

    python benchmarks/lab/grpo_sums.py --seeds 0 1 2

A model learns to add two numbers digit by digit from worked examples (full SFT, from random weights) until it solves
--enough percent of other sums. Further prompts come with nothing but the result. Three arms start from these weights,
run side by side with one thread each, and have as much processor time:

    grpo       trainer/train_grpo.py --reward number
    sft        trainer/train_full_sft.py on the prompts with their results as answers
    rejection  half the time: eight sampled answers to each prompt; then train_full_sft.py on the right ones

Prints, for each seed, the percentage of held-out sums whose greedy answer ends in the right number. Worked examples,
prompts and held-out sums have no pair of numbers in common. A start that is there already is used again. Linux only.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from dataset.answers import number_matches
from dataset.chat_template import DEFAULT_SYSTEM
from dataset.tokenization import ChatTokenizer
from model.generation import SamplingParams, generate_batch
from model.loading import load_ready

SIZES = "--hidden_size 64 --num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2".split()
SFT = "--optimizer muon --learning_rate 4e-3 --warmup_iters 10 --epochs 1000 --min_lr_ratio 1".split()
COMMON = "--max_seq_len 256 --batch_size 4 --dtype float32 --log_interval 20 --save_interval 100000 --overwrite".split()
HELD_OUT, SAMPLES, LONGEST = 300, 8, 32


def worked(first: int, second: int) -> str:
    """Add digit by digit: 47+38 -> 7+8=15,4+3+1=8,85"""
    steps, carry, result = [], 0, first + second
    while first or second:
        digits = [first % 10, second % 10] + [1] * carry
        steps.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        first, second, carry = first // 10, second // 10, sum(digits) // 10
    return ",".join([*steps, str(result)])


def turns(pair: tuple[int, int], answer: str | None = None) -> list[dict]:
    question = {"role": "user", "content": f"{pair[0]}+{pair[1]}=?"}
    return [question] if answer is None else [question, {"role": "assistant", "content": answer}]


class Arm:
    """A folder in which stages run and weights are scored."""

    def __init__(self, folder: Path, tokenizer: Path, seed: int):
        self.folder, self.tokenizer, self.seed, self.seconds = folder, tokenizer, seed, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, records: list[dict]) -> Path:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def run(self, script: str, *flags: object, seconds: float = math.inf, until: Callable[[], bool] = bool) -> None:
        """Run a script to its end, or stop it as Ctrl-C does, which saves the weights.

        seconds: of processor time that it may take. until: asked every second whether it is enough.
        """
        own = ("--seed", self.seed, "--tokenizer_path", self.tokenizer, "--out_dir", self.folder)
        command = [sys.executable, ROOT / script, *((*COMMON, *own) if script.startswith("trainer") else ()), *flags]
        with (self.folder / "output.txt").open("a") as output:
            child = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
        usage, stopped, used = Path(f"/proc/{child.pid}/stat"), False, 0.0
        while child.poll() is None:
            user, system = usage.read_text().rpartition(")")[2].split()[11:13]
            used = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            if not stopped and (used > seconds or until()):
                child.send_signal(signal.SIGINT)
                stopped = True
            time.sleep(1)
        if child.returncode and not stopped:
            sys.exit(f"error: {script} ended with {child.returncode}; see {self.folder / 'output.txt'}")
        self.seconds += used

    def answers(self, weights: Path, pairs: list[tuple[int, int]], **params) -> list[str]:
        ready = load_ready(weights, ChatTokenizer, tokenizer_path=self.tokenizer, device="cpu", dtype="float32")
        params = SamplingParams(max_new_tokens=LONGEST, stop_ids=(ready.tokenizer.eos_id,), **params)
        prompts = [ready.tokenizer.encode_prompt(turns(pair)) for pair in pairs]
        return [ready.tokenizer.decode(ids) for ids in generate_batch(ready.model, prompts, params)]

    def score(self, weights: Path, pairs: list[tuple[int, int]]) -> float:
        found = zip(self.answers(weights, pairs, temperature=0.0), pairs, strict=True)
        return 100 * fmean(number_matches(answer, str(sum(pair))) for answer, pair in found)


def make_start(base: Path, arm: Arm, examples: list, others: list, enough: float) -> None:
    """Train the start: SFT until it solves enough percent of other sums."""
    # 290 ids: the bytes and the words of the chat template; a small head makes steps cheap
    words = arm.write("words.jsonl", [{"text": f"system\n{DEFAULT_SYSTEM}\nuser\nassistant\n"}] * 1000)
    arm.run("scripts/train_tokenizer.py", "--data_path", words, "--vocab_size", 290, "--output_dir", arm.tokenizer)
    one = arm.write("text.jsonl", [{"text": "1+1=2"}] * 8)
    arm.run("trainer/train_pretrain.py", *SIZES, "--max_steps", 1, "--accumulation_steps", 1, "--data_path", one)
    data = arm.write("examples.jsonl", [{"conversations": turns(pair, worked(*pair))} for pair in examples])
    weights, scored = arm.folder / "full_sft_64.pth", set()

    def is_enough() -> bool:
        if not weights.with_suffix(".json").exists() or weights.stat().st_mtime in scored:
            return False
        scored.add(weights.stat().st_mtime)
        for suffix in (".pth", ".json"):  # training goes on meanwhile
            shutil.copy(weights.with_suffix(suffix), base.with_suffix(suffix))
        return arm.score(base, others) >= enough

    flags = ("--base_weight", arm.folder / "pretrain_64.pth", "--save_interval", 25, "--data_path", data)
    arm.run("trainer/train_full_sft.py", *SFT, *flags, until=is_enough)


def reject(arm: Arm, base: Path, prompts: list, seconds: float) -> list[dict]:
    """Sample answers to the prompts for so long, 64 prompts at a time; return each right one once, as a record."""
    before, right = time.thread_time(), set()
    for first in range(0, len(prompts), 64):
        asked = [pair for pair in prompts[first : first + 64] for _ in range(SAMPLES)]
        drawn = zip(asked, arm.answers(base, asked, seed=first * SAMPLES), strict=True)
        right |= {(pair, text) for pair, text in drawn if number_matches(text, str(sum(pair)))}
        if time.thread_time() - before > seconds:
            break
    return [{"conversations": turns(*each)} for each in sorted(right)]


def one_seed(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the percentage of the held-out sums that the start and each arm solve."""
    pairs = list(itertools.product(range(10, 100), repeat=2))
    random.Random(seed).shuffle(pairs)
    examples, prompts, held_out = pairs[: args.examples], pairs[args.examples : -HELD_OUT], pairs[-HELD_OUT:]
    folder = args.out_dir / str(seed)
    arms = {name: Arm(folder / name, folder / "tokenizer", seed) for name in ("start", "grpo", "sft", "rejection")}
    base = folder / "start" / "start_64.pth"
    if not base.exists():
        make_start(base, arms["start"], examples, prompts[-100:], args.enough)
    rate = ("--learning_rate", args.rate, "--min_lr_ratio", 1, "--warmup_iters", 5, "--base_weight", base)

    def tune(name: str, records: list[dict], seconds: float) -> None:
        data = arms[name].write("data.jsonl", records)
        script, more = "trainer/train_full_sft.py", ("--epochs", 1000)
        if name == "grpo":
            script, more = "trainer/train_grpo.py", ("--max_new_tokens", LONGEST, "--epochs", 1000)
        arms[name].run(script, *rate, *more, "--data_path", data, seconds=seconds)

    results = [{"conversations": turns(pair), "answer": str(sum(pair))} for pair in prompts]
    bare = [{"conversations": turns(pair, str(sum(pair)))} for pair in prompts]
    jobs = {  # each has --seconds; rejection samples for half of them
        "grpo": lambda: tune("grpo", results, args.seconds),
        "sft": lambda: tune("sft", bare, args.seconds),
        "rejection": lambda: tune(
            "rejection", reject(arms["rejection"], base, prompts, args.seconds / 2), args.seconds / 2
        ),
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(job) for job in jobs.values()]:
            done.result()
    found = {"start": arms["start"].score(base, held_out)}
    for name in jobs:
        found[name] = arms[name].score(next((folder / name).glob("*_64.pth")), held_out)
    print(f"seed {seed}: " + ", ".join(f"{name} {value:.1f} %" for name, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--examples", type=int, default=2000, help="worked examples of the SFT")
    add("--enough", type=float, default=30, help="percent of other sums that the SFT is to solve")
    add("--seconds", type=float, default=60, help="of processor time for each arm, its start included")
    add("--rate", type=float, default=3e-4, help="learning rate of all arms")
    add("--out_dir", type=Path, default=ROOT / "out" / "grpo_sums")
    args = parser.parse_args()
    rows = [one_seed(seed, args) for seed in args.seeds]
    print("mean:   " + ", ".join(f"{name} {fmean(row[name] for row in rows):.1f} %" for name in rows[0]))


if __name__ == "__main__":
    main()
