"""How far apart are the seeded loss curves of two states of this repository, and how far does rounding alone take them?

    git worktree add ../before COMMIT
    python benchmarks/loss_curves.py --before ../before --data_path FILE.jsonl

Both states train the same seeded model with the same flags; printed is the largest difference of a step's loss. Beside
it stands what the older state differs from itself by when its first weights change by one part in ten million, which
nobody would call another model: another kernel cannot be held to less. AdamW, whose flags old states know.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.arguments import run_script

NUDGE = 1e-7

# runs in the folder of a state: train_pretrain.py with its first weights multiplied by 1 + nudge * noise
PROGRAM = """
import sys
sys.path.insert(0, ".")
import torch
from trainer import train_pretrain
nudge, seed, make = float(sys.argv[1]), int(sys.argv[2]), train_pretrain.MiniMindForCausalLM
def nudged(config):
    model, generator = make(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=generator))
    return model
train_pretrain.MiniMindForCausalLM = nudged
train_pretrain.main(sys.argv[3:])
"""


def losses(state: Path, flags: list[str], nudge: float = 0.0, seed: int = 0) -> list[float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", PROGRAM, str(nudge), str(seed), *flags, "--out_dir", out]
        done = subprocess.run(command, cwd=state, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"train_pretrain.py in {state} failed: {done.stderr.strip() or done.stdout.strip()}")
        (log,) = Path(out).glob("logs/pretrain_*.jsonl")
        records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


def distance(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--before", type=Path, required=True, help="a checkout of another state of this repository")
    add("--data_path", type=Path, default=ROOT / "dataset/sample/pretrain.jsonl")
    add("--steps", type=int, default=30)
    add("--nudges", type=int, default=4, help="runs of the older state with other first digits (default: %(default)s)")
    args, more = parser.parse_known_args(argv)
    if not (args.before / "trainer/train_pretrain.py").is_file():
        raise ValueError(f"--before {args.before} is no checkout of this repository")
    with tempfile.TemporaryDirectory() as cache:
        for use_moe in ("false", "true"):
            for dtype in ("bfloat16", "float32"):
                values = {
                    "data_path": args.data_path.resolve(), "cache_dir": cache, "hidden_size": 256,
                    "num_hidden_layers": 4, "max_seq_len": 512, "batch_size": 4, "accumulation_steps": 1,
                    "max_steps": args.steps, "epochs": 1000, "optimizer": "adamw", "learning_rate": 5e-4,
                    "log_interval": 1, "save_interval": 10**6, "dtype": dtype, "use_moe": use_moe,
                }  # fmt: skip
                flags = [*(f"--{name}={value}" for name, value in values.items()), *more]
                before = losses(args.before, flags)
                now = distance(losses(ROOT, flags), before)
                alone = [distance(losses(args.before, flags, NUDGE, seed), before) for seed in range(args.nudges)]
                print(
                    f"{'mixture' if use_moe == 'true' else 'dense':8}{dtype:9}{args.steps} steps: now and before "
                    f"{now:.1e} apart; before with first weights off by {NUDGE:.0e}: {min(alone):.1e} to "
                    f"{max(alone):.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    run_script(main)
