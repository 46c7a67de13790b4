"""Compare the seeded loss curves of every stage between two states of this repository.

    git worktree add ../before COMMIT
    python benchmarks/lab/loss_curves.py --before ../before

Both states train the same seeded model with the same flags: every stage, dense and mixture of experts, float32 and
bfloat16. A line says "identical" if every logged number agrees, else the largest difference of a step's loss. A
refactoring must be identical. For another kernel, compare with --nudges N: how far the older state moves from itself
when its first weights change by one part in ten million. AdamW, whose flags old states know.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.lab.estimate_check import preferences
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights
from trainer.arguments import run_script

SIZES = {"hidden_size": 128, "num_hidden_layers": 2}
LOGGED = ("loss", "lr", "grad_norm")
STAGES = {  # the data that a stage reads, and its own flags
    "pretrain": ("texts", []),
    "full_sft": ("conversations", []),
    "lora": ("conversations", []),
    "dpo": ("pairs", ["--beta=0.1"]),
    "distill_reason": ("reasons", ["--base_weight=full_sft"]),
    "distillation": ("conversations", ["--teacher_hidden_size=128", "--alpha=0.5", "--temperature=2"]),
}

# Runs in the folder of a state. Every weight that an optimizer gets is multiplied by 1 + nudge * noise before it.
PROGRAM = """
import importlib, sys
sys.path.insert(0, ".")
import torch
nudge, seed, made = float(sys.argv[1]), int(sys.argv[2]), torch.optim.AdamW.__init__
def nudged(self, groups, *rest, **named):
    groups = list(groups)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])):
            parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=generator))
    made(self, groups, *rest, **named)
if nudge:
    torch.optim.AdamW.__init__ = nudged
importlib.import_module(f"trainer.train_{sys.argv[3]}").main(sys.argv[4:])
"""


def write_data(folder: Path) -> None:
    """texts, conversations, pairs and reasons, from the sample."""
    sample = ROOT / "dataset" / "sample"
    (folder / "texts.jsonl").write_bytes((sample / "pretrain.jsonl").read_bytes())
    (folder / "conversations.jsonl").write_bytes((sample / "sft.jsonl").read_bytes())
    preferences(sample / "sft.jsonl", folder / "pairs.jsonl")
    records = [json.loads(line) for line in (sample / "sft.jsonl").read_text("utf-8").splitlines()]
    for turn in itertools.chain.from_iterable(record["conversations"] for record in records):
        if turn["role"] == "assistant":
            turn["content"] = f"<think>\n…\n</think>\n<answer>\n{turn['content']}\n</answer>"
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "reasons.jsonl").write_text("".join(lines), "utf-8")


def curve(state: Path, stage: str, flags: list[str], folder: Path, nudge: float = 0.0, seed: int = 0) -> list[tuple]:
    """Return what a run logs of each step: loss, learning rate, gradient norm."""
    with tempfile.TemporaryDirectory() as out:
        for base, suffix in itertools.product(("pretrain", "full_sft"), ("", "_moe")):
            os.link(folder / f"base{suffix}.pth", Path(out) / f"{base}_{SIZES['hidden_size']}{suffix}.pth")
        command = [sys.executable, "-c", PROGRAM, str(nudge), str(seed), stage, *flags, "--out_dir", out]
        if stage == "pretrain":
            command.append("--overwrite")
        environment = os.environ | {"PYTHONPATH": ""}
        done = subprocess.run(command, cwd=state, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"train_{stage}.py in {state} failed: {done.stderr.strip() or done.stdout.strip()}")
        (log,) = (Path(out) / "logs").rglob("*.jsonl")
        records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [tuple(record.get(name) for name in LOGGED) for record in records if record["event"] == "step"]


def distance(ours: list[tuple], theirs: list[tuple]) -> float:
    return max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--before", type=Path, required=True, help="a checkout of another state of this repository")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--steps", type=int, default=10)
    add("--nudges", type=int, default=0, help="runs of the older state with other last digits (default: %(default)s)")
    add("--nudge", type=float, default=1e-7, help="relative size of that change (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.before / "trainer/train_pretrain.py").is_file():
        raise ValueError(f"--before {args.before} is not a checkout of this repository")
    different = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for use_moe, suffix in ((False, ""), (True, "_moe")):
            torch.manual_seed(0)
            save_weights(folder / f"base{suffix}.pth", MiniMindForCausalLM(MiniMindConfig(**SIZES, use_moe=use_moe)))
        for stage, use_moe, dtype in itertools.product(args.stages, ("false", "true"), ("float32", "bfloat16")):
            data, more = STAGES[stage]
            values = SIZES | {
                "data_path": folder / f"{data}.jsonl", "cache_dir": folder / "cache", "max_seq_len": 256,
                "batch_size": 4, "accumulation_steps": 2, "max_steps": args.steps, "epochs": 1000, "device": "cpu",
                "optimizer": "adamw", "learning_rate": 5e-4, "log_interval": 1, "save_interval": 10**6,
                "dtype": dtype, "use_moe": use_moe,
            }  # fmt: skip
            if stage == "distillation":
                values["teacher_use_moe"] = use_moe
            flags = [*(f"--{flag}={value}" for flag, value in values.items()), *more]
            before = curve(args.before, stage, flags, folder)
            now = curve(ROOT, stage, flags, folder)
            said = "identical" if now == before else f"{distance(now, before):.1e} apart"
            different += now != before
            if args.nudges:
                moved = [curve(args.before, stage, flags, folder, args.nudge, seed) for seed in range(args.nudges)]
                far = [distance(run, before) for run in moved]
                said += f"; before, nudged: {min(far):.1e} to {max(far):.1e}"
            kind = "mixture" if use_moe == "true" else "dense"
            print(f"{stage:15}{kind:8}{dtype:9} {len(now)} steps: {said}", flush=True)
    print(f"{different} of the curves differ" if different else "all curves are identical")


if __name__ == "__main__":
    run_script(main)
