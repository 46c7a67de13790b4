"""What learning from outcomes adds: a tiny model has learned from a careless teacher; three ways to go on from there.

    python benchmarks/lab/grpo_sums.py --seeds 0 1 2

A model learns to add two numbers digit by digit (full SFT, from random weights) from a teacher who forgets half of the
carries. So it answers now this, now that, and nothing but the result says which habit is right. Further prompts come
with nothing but the result. Three arms start from these weights and have as much processor time, one thread each:

    grpo       trainer/train_grpo.py --reward number
    sft        trainer/train_full_sft.py on the prompts with their results as answers
    rejection  half the time: eight sampled answers to each prompt; then train_full_sft.py on the right ones

Prints, for each seed, the percentage of held-out sums whose greedy answer ends in the right number. Worked examples,
prompts and held-out sums have no pair of numbers in common. A start that is there already is used again. Linux only.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch

from dataset.chat_template import DEFAULT_SYSTEM
from dataset.tokenization import ChatTokenizer
from model.loading import load_ready
from trainer import train_grpo
from trainer.rollouts import Rollout, Sampler, draw_seed

SIZES = "--hidden_size 64 --num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2".split()
START = "--optimizer muon --learning_rate 4e-3 --warmup_iters 10 --epochs 1000 --base_weight none".split()
COMMON = "--max_seq_len 256 --batch_size 4 --dtype float32 --log_interval 20 --save_interval 100000 --overwrite".split()
HELD_OUT, SAMPLES, LONGEST = 300, 8, 40


def worked(first: int, second: int, remembers: Callable[[], bool]) -> str:
    """Add digit by digit: 47+38 -> 7+8=15,4+3+1=8,85; 4+3=7,75 if the carry is forgotten."""
    steps, digits, carry = [], "", 0
    while first or second:
        terms = [first % 10, second % 10] + [1] * carry
        steps.append(f"{'+'.join(map(str, terms))}={sum(terms)}")
        first, second = first // 10, second // 10
        digits = str(sum(terms) % 10 if first or second else sum(terms)) + digits
        carry = int(sum(terms) > 9 and remembers())
    return ",".join([*steps, digits])


def turns(pair: tuple[int, int], answer: str | None = None) -> list[dict]:
    question = {"role": "user", "content": f"{pair[0]}+{pair[1]}=?"}
    return [question] if answer is None else [question, {"role": "assistant", "content": answer}]


def prompt(pair: tuple[int, int]) -> dict:
    return {"conversations": turns(pair), "answer": str(sum(pair))}


class Arm:
    """A folder in which stages run and weights are scored."""

    def __init__(self, folder: Path, tokenizer: Path, seed: int):
        self.folder, self.tokenizer, self.seed = folder, tokenizer, seed
        self.flags = ["--seed", seed, "--tokenizer_path", tokenizer, "--out_dir", folder, *COMMON]
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, records: list[dict]) -> Path:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def run(self, script: str, *flags: object, seconds: float = math.inf) -> None:
        """Run a script to its end, or after so much processor time stop it as Ctrl-C does, which saves the weights."""
        command = [sys.executable, ROOT / script, *(self.flags if script.startswith("trainer") else ()), *flags]
        with (self.folder / "output.txt").open("a") as output:
            child = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
        usage, stopped = Path(f"/proc/{child.pid}/stat"), False
        while child.poll() is None:
            user, system = usage.read_text().rpartition(")")[2].split()[11:13]
            if not stopped and (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") > seconds:
                child.send_signal(signal.SIGINT)
                stopped = True
            time.sleep(0.5)
        if child.returncode and not stopped:
            sys.exit(f"error: {script} ended with {child.returncode}; see {self.folder / 'output.txt'}")

    @torch.no_grad()
    def answers(self, weights: Path, pairs: list, samples: int, temperature: float) -> list[Rollout]:
        """Return scored answers, so many to each pair. Draws depend on the pair and the sample alone."""
        ready = load_ready(weights, ChatTokenizer, tokenizer_path=self.tokenizer, device="cpu", dtype="float32")
        asked = self.write("asked.jsonl", [prompt(pair) for pair in pairs])
        flags = [*self.flags, "--data_path", asked, "--max_new_tokens", LONGEST]
        sampler = Sampler(asked, train_grpo.parse([str(word) for word in flags]), ready.tokenizer, None)
        jobs = [(n, draw_seed(*pair, sample)) for n, pair in enumerate(pairs) for sample in range(samples)]
        return sampler._answers(ready.model, jobs, replace(sampler.params, temperature=temperature))

    def score(self, weights: Path, pairs: list, temperature: float = 0.0) -> float:
        return 100 * fmean(answer.total for answer in self.answers(weights, pairs, 1, temperature))


def make_start(arm: Arm, examples: list, args: argparse.Namespace) -> None:
    # 290 ids: the bytes and the words of the chat template; a small head makes steps cheap
    words = arm.write("words.jsonl", [{"text": f"system\n{DEFAULT_SYSTEM}\nuser\nassistant\n"}] * 1000)
    arm.run("scripts/train_tokenizer.py", "--data_path", words, "--vocab_size", 290, "--output_dir", arm.tokenizer)
    teacher = random.Random(arm.seed)
    records = [turns(pair, worked(*pair, lambda: teacher.random() > args.careless)) for pair in examples]
    data = arm.write("examples.jsonl", [{"conversations": record} for record in records])
    arm.run("trainer/train_full_sft.py", *SIZES, *START, "--max_steps", args.start_steps, "--data_path", data)


def reject(arm: Arm, base: Path, prompts: list, seconds: float) -> list[dict]:
    """Sample answers to the prompts for so long, 64 prompts at a time; return each right one once, as a record."""
    before, right = time.thread_time(), set()
    for first in range(0, len(prompts), 64):
        asked = prompts[first : first + 64]
        drawn = arm.answers(base, asked, SAMPLES, 1.0)
        right |= {(asked[answer.prompt], answer.text) for answer in drawn if answer.total}
        if time.thread_time() - before > seconds:
            break
    return [{"conversations": turns(*each)} for each in sorted(right)]


def one_seed(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the percentage of the held-out sums that the start and each arm solve."""
    low, span = 10 ** (args.digits - 1), 9 * 10 ** (args.digits - 1)
    drawn = random.Random(seed).sample(range(span * span), args.examples + args.prompts + HELD_OUT)
    pairs = [(low + each // span, low + each % span) for each in drawn]
    examples, prompts, held_out = pairs[: args.examples], pairs[args.examples : -HELD_OUT], pairs[-HELD_OUT:]
    folder = args.out_dir / str(seed)
    arms = {name: Arm(folder / name, folder / "tokenizer", seed) for name in ("start", *args.arms)}
    start = folder / "start" / "full_sft_64.pth"
    if not start.exists():
        make_start(arms["start"], examples, args)
    found = {
        "start, sampled": arms["start"].score(start, held_out, 1.0),
        "start": arms["start"].score(start, held_out),
    }
    print(found, flush=True)
    common = ("--min_lr_ratio", 1, "--warmup_iters", 5, "--epochs", 1000, "--base_weight", start, "--data_path")

    def sft(arm: Arm, records: list[dict], seconds: float) -> None:
        rate = ("--learning_rate", args.sft_rate)
        arm.run("trainer/train_full_sft.py", *rate, *common, arm.write("data.jsonl", records), seconds=seconds)

    def grpo(arm: Arm) -> None:
        data = arm.write("data.jsonl", [prompt(pair) for pair in prompts])
        flags = ("--learning_rate", args.grpo_rate, "--max_new_tokens", LONGEST, *args.grpo.split())
        arm.run("trainer/train_grpo.py", *flags, *common, data, seconds=args.seconds)

    def rejection(arm: Arm) -> None:
        sft(arm, reject(arm, start, prompts, args.seconds / 2), args.seconds / 2)

    def bare(arm: Arm) -> None:
        sft(arm, [{"conversations": turns(pair, str(sum(pair)))} for pair in prompts], args.seconds)

    jobs = {"grpo": grpo, "sft": bare, "rejection": rejection}
    with ThreadPoolExecutor(args.parallel) as pool:
        for done in [pool.submit(jobs[name], arms[name]) for name in args.arms]:
            done.result()
    for name in args.arms:
        found[name] = arms[name].score(next((folder / name).glob("*_64.pth")), held_out)
    print(f"seed {seed}: " + ", ".join(f"{name} {value:.1f} %" for name, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--arms", nargs="+", choices=("grpo", "sft", "rejection"), default=["grpo", "sft", "rejection"])
    add("--digits", type=int, default=3)
    add("--careless", type=float, default=0.5, help="share of the carries that the teacher forgets")
    add("--examples", type=int, default=8000, help="worked examples of the SFT")
    add("--prompts", type=int, default=8000)
    add("--start_steps", type=int, default=1000)
    add("--seconds", type=float, default=150, help="of processor time for each arm, its start included")
    add("--sft_rate", type=float, default=1e-3)
    add("--grpo_rate", type=float, default=3e-4)
    add("--grpo", default="", help="flags")
    add("--parallel", type=int, default=1)
    add("--out_dir", type=Path, default=ROOT / "out" / "grpo_sums")
    args = parser.parse_args()
    rows = [one_seed(seed, args) for seed in args.seeds]
    print("mean:   " + ", ".join(f"{name} {fmean(row[name] for row in rows):.1f} %" for name in rows[0]))


if __name__ == "__main__":
    main()
