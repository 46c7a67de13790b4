"""What learning from outcomes adds: a tiny model has learned from a careless teacher; three ways to go on from there.

    python benchmarks/lab/grpo_sums.py [--what tools] [--seeds 0 1 2]

sums   347+285: the model learns to add digit by digit (full SFT, from random weights) from a teacher who forgets three
       carries in four.
tools  (34+58)*7: it learns to ask the calculator twice from a teacher who mostly stops after the first.

So the start answers now this, now that, and nothing but the result says which habit is right. Further prompts come with
nothing but the result. Three arms start from these weights and have as much processor time, one thread each:

    grpo       trainer/train_grpo.py --reward number
    sft        trainer/train_full_sft.py on the prompts with their results as answers
    rejection  half the time: eight sampled answers to each prompt; then train_full_sft.py on the right ones

Prints, for each seed, the percentage of held-out problems whose greedy answer ends in the right number; of the start
also that of sampled answers. Worked examples, prompts and held-out problems are all different. A start that is there
already is used again. Linux only.
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
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch

from dataset.tokenization import ChatTokenizer
from model.loading import load_ready
from trainer.rollouts import Rollout, Sampler, draw_seed

SIZES = "--hidden_size 64 --num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2".split()
START = (
    "--optimizer muon --learning_rate 4e-3 --warmup_iters 10 --min_lr_ratio 0 --epochs 1000 --base_weight none".split()
)
COMMON = "--max_seq_len 256 --batch_size 4 --dtype float32 --log_interval 20 --save_interval 100000 --overwrite".split()
GO_ON = "--min_lr_ratio 1 --warmup_iters 5 --epochs 1000".split()
HELD_OUT, SAMPLES = 300, 8
CALCULATOR = {"type": "function", "function": {"name": "calculator"}}  # short, for a short prompt
Problem = tuple[int, ...]


def conversation(turns: list[dict], answer: str) -> dict:
    return {"conversations": [*turns, {"role": "assistant", "content": answer}]}


class Sums:
    """Two numbers of three digits."""

    forgets, start_steps, longest, vocab_size = 0.75, 800, 40, 290
    ranges = (range(100, 1000), range(100, 1000))

    @staticmethod
    def prompt(problem: Problem) -> dict:
        question = {"role": "user", "content": "{}+{}=?".format(*problem)}
        return {"conversations": [question], "answer": str(sum(problem))}

    @staticmethod
    def worked(problem: Problem, remembers: Callable[[], bool]) -> list[dict]:
        """Add digit by digit: 47+38 -> 7+8=15;4+3+1=8;85, or 4+3=7;75 if the carry is forgotten."""
        first, second = problem
        steps, digits, carry = [], "", 0
        while first or second:
            terms = [first % 10, second % 10] + [1] * carry
            steps.append(f"{'+'.join(map(str, terms))}={sum(terms)}")
            first, second = first // 10, second // 10
            digits = str(sum(terms) % 10 if first or second else sum(terms)) + digits
            carry = int(sum(terms) > 9 and remembers())
        return [{"role": "assistant", "content": ";".join([*steps, digits])}]  # "8,853" would be thousands


class Tools:
    """The sum of two numbers times a third, in two calls."""

    forgets, start_steps, longest, vocab_size = 0.6, 2000, 90, 400
    ranges = (range(10, 100), range(10, 100), range(2, 10))

    @staticmethod
    def prompt(problem: Problem) -> dict:
        question = {"role": "user", "content": "({}+{})*{}=?".format(*problem)}
        system = {"role": "system", "content": "", "tools": [CALCULATOR]}
        return {"conversations": [system, question], "answer": str((problem[0] + problem[1]) * problem[2])}

    @staticmethod
    def worked(problem: Problem, remembers: Callable[[], bool]) -> list[dict]:
        """Call the calculator for the sum, then for the product, unless that is forgotten."""
        turns, value = [], problem[0]
        for sign, number in zip("+*", problem[1:], strict=True):
            if sign == "*" and not remembers():
                break
            call = {"name": "calculator", "arguments": {"expression": f"{value}{sign}{number}"}}
            value = value + number if sign == "+" else value * number
            turns.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
            turns.append({"role": "tool", "content": str(value)})
        return [*turns, {"role": "assistant", "content": str(value)}]


class Arm:
    """A folder in which stages run and weights are scored."""

    def __init__(self, folder: Path, tokenizer: Path, seed: int, task: type[Sums] | type[Tools]):
        self.folder, self.tokenizer, self.seed, self.task = folder, tokenizer, seed, task
        self.flags = ["--seed", seed, "--tokenizer_path", tokenizer, "--out_dir", folder, *COMMON]
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def weights(self) -> Path:
        return next(self.folder.glob("*_64.pth"))

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
    def answers(self, weights: Path, problems: list[Problem], samples: int, temperature: float) -> list[Rollout]:
        """Return scored answers, so many to each problem. Draws depend on the problem and the sample alone."""
        ready = load_ready(weights, ChatTokenizer, tokenizer_path=self.tokenizer, device="cpu", dtype="float32")
        asked = self.write("asked.jsonl", [self.task.prompt(problem) for problem in problems])
        flags = {"reward": "number", "skip_bad_lines": False, "max_new_tokens": self.task.longest, "max_seq_len": 256}
        flags |= {"prompts_per_step": 1, "group_size": 1, "batch_size": 1}
        flags |= {"epochs": 1, "max_steps": 0, "temperature": temperature}
        sampler = Sampler(asked, argparse.Namespace(**flags), ready.tokenizer, None)
        jobs = [(n, draw_seed(*problem, sample)) for n, problem in enumerate(problems) for sample in range(samples)]
        return sampler._answers(ready.model, jobs, sampler.params)

    def score(self, weights: Path, problems: list[Problem], temperature: float = 0.0) -> float:
        return 100 * fmean(answer.total for answer in self.answers(weights, problems, 1, temperature))


def make_start(arm: Arm, problems: list[Problem]) -> None:
    """Train the tokenizer and the start on a careless teacher's examples."""
    task, teacher, records = arm.task, random.Random(arm.seed), []
    for problem in problems:
        shown = task.worked(problem, lambda: teacher.random() > task.forgets)
        records.append({"conversations": task.prompt(problem)["conversations"] + shown})
    data = arm.write("examples.jsonl", records)
    # the bytes and the words of the chat template: a small head makes steps cheap
    plain = ChatTokenizer(ROOT / "model")
    words = [{"text": plain.decode(plain.encode_conversation(each["conversations"])[0])} for each in records[:1000]]
    vocabulary = ("--vocab_size", task.vocab_size, "--output_dir", arm.tokenizer)
    arm.run("scripts/train_tokenizer.py", "--data_path", arm.write("words.jsonl", words), *vocabulary)
    arm.run("trainer/train_full_sft.py", *SIZES, *START, "--max_steps", task.start_steps, "--data_path", data)


def reject(arm: Arm, start: Path, problems: list[Problem], seconds: float) -> list[dict]:
    """Sample answers to the prompts for so long, 64 prompts at a time; return each right one once, as a record."""
    before, right = time.thread_time(), {}
    for first in range(0, len(problems), 64):
        for answer in arm.answers(start, problems[first : first + 64], SAMPLES, 1.0):
            if answer.total:
                record = conversation(answer.turns, answer.text)
                right[json.dumps(record)] = record
        if time.thread_time() - before > seconds:
            break
    return list(right.values())


def one_seed(seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Return the percentage of the held-out problems that the start and each arm solve."""
    task = {"sums": Sums, "tools": Tools}[args.what]
    everything = math.prod(map(len, task.ranges))
    problems = []
    for number in random.Random(seed).sample(range(everything), args.examples + args.prompts + HELD_OUT):
        problem = []
        for values in task.ranges:
            number, place = divmod(number, len(values))
            problem.append(values[place])
        problems.append(tuple(problem))
    examples, asked, held_out = problems[: args.examples], problems[args.examples : -HELD_OUT], problems[-HELD_OUT:]
    folder = args.out_dir / args.what / str(seed)
    arms = {name: Arm(folder / name, folder / "tokenizer", seed, task) for name in ("start", *args.arms)}
    if not (folder / "start" / "full_sft_64.pth").exists():
        make_start(arms["start"], examples)
    start = arms["start"].weights
    found = {"start, sampled": arms["start"].score(start, held_out, 1.0), "start": arms["start"].score(start, held_out)}
    print(f"seed {seed}: start {found}", flush=True)
    go_on = (*GO_ON, "--base_weight", start, "--data_path")
    prompts = [task.prompt(problem) for problem in asked]

    def grpo(arm: Arm) -> None:
        flags = ("--max_new_tokens", task.longest, *args.grpo.split(), *go_on, arm.write("data.jsonl", prompts))
        arm.run("trainer/train_grpo.py", *flags, seconds=args.seconds)

    def sft(arm: Arm, records: list[dict] | None = None, seconds: float = args.seconds) -> None:
        bare = [conversation(each["conversations"], each["answer"]) for each in prompts]
        flags = (*args.sft.split(), *go_on, arm.write("data.jsonl", records or bare))
        arm.run("trainer/train_full_sft.py", *flags, seconds=seconds)

    def rejection(arm: Arm) -> None:
        sft(arm, reject(arm, start, asked, args.seconds / 2), args.seconds / 2)

    jobs = {"grpo": grpo, "sft": sft, "rejection": rejection}
    with ThreadPoolExecutor(args.parallel) as pool:
        for done in [pool.submit(jobs[name], arms[name]) for name in args.arms]:
            done.result()
    found |= {name: arms[name].score(arms[name].weights, held_out) for name in args.arms}
    print(f"seed {seed}: " + ", ".join(f"{name} {value:.1f} %" for name, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", choices=("sums", "tools"), default="sums")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--arms", nargs="+", choices=("grpo", "sft", "rejection"), default=["grpo", "sft", "rejection"])
    add("--examples", type=int, default=8000, help="worked examples of the start")
    add("--prompts", type=int, default=5000, help="prompts with nothing but the result")
    add("--seconds", type=float, default=60, help="of processor time for each arm, its start included")
    add("--grpo", default="--learning_rate 3e-4", help="more flags for GRPO")
    add("--sft", default="--learning_rate 1e-3", help="more flags for SFT, after rejection sampling too")
    add("--parallel", type=int, default=2, help="arms at a time")
    add("--out_dir", type=Path, default=ROOT / "out" / "grpo_sums")
    args = parser.parse_args()
    rows = [one_seed(seed, args) for seed in args.seeds]
    print("mean:   " + ", ".join(f"{name} {fmean(row[name] for row in rows):.1f} %" for name in rows[0]))


if __name__ == "__main__":
    main()
