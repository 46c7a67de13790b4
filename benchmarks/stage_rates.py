"""Learning rates of the stages after pretraining, compared by the loss on held-out data.

    python benchmarks/stage_rates.py run --stage full_sft --optimizer adamw --learning_rates 2.5e-4 5e-4 1e-3 \\
        --steps 100 --rows 8 --base_weight out/pretrain_256.pth --data_path SFT.jsonl --valid_path HELD_OUT.jsonl
    python benchmarks/stage_rates.py report

A stage is trainer/train_{stage}.py: full_sft, dpo, lora, distill_reason or distillation (which needs --teacher_weight).
Everything that is not named here is as the script's defaults have it; further flags for it follow `--`. Every run has a
whole schedule for its own steps and is appended to --results as one line of JSON; what stands there already is not run
again. Files are named in it by the first digits of their SHA-256.

`report` prints the mean loss over seeds with its standard deviation, a row a rate and a column an optimizer, and beside
every default whether another rate gains more than that spread, on the same seeds.
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipe import read_results
from trainer.arguments import run_script
from trainer.checkpoint import file_sha256

STAGES = ("full_sft", "dpo", "lora", "distill_reason", "distillation")
FILES = ("base_weight", "teacher_weight", "data_path", "valid_path")
# what makes two runs comparable, and what tells them apart then
SETTING = ("stage", "hidden_size", "num_hidden_layers", "rows", "steps", *FILES, "more")
CHOICE = ("optimizer", "learning_rate", "seed")
# what a stage measures on held-out data besides the loss and is worth a look
ALSO = {"dpo": ("valid_reward_accuracy", "valid_kl", "valid_logp_chosen")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "stage_rate_runs.jsonl")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", allow_abbrev=False).add_argument
    add("--stage", required=True, choices=STAGES)
    add("--optimizer", required=True, choices=("adamw", "muon"))
    add("--learning_rates", type=float, nargs="+", required=True)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, required=True, help="optimizer steps of a run")
    add("--rows", type=int, required=True, help="rows in an optimizer step; of DPO, pairs")
    add("--hidden_size", type=int, default=256)
    add("--num_hidden_layers", type=int, default=4)
    add("--base_weight", type=Path, required=True, help=".pth file to start from")
    add("--teacher_weight", type=Path, help=".pth file of the teacher, for distillation")
    add("--data_path", type=Path, required=True)
    add("--valid_path", type=Path, required=True)
    add("--cache_dir", type=Path, default=ROOT / "out" / "token_cache")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    commands.add_parser("report")
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    args.more = more
    return args


def key_of(run: dict, names: tuple[str, ...] = SETTING + CHOICE) -> str:
    return json.dumps({name: run[name] for name in names})


# --- the runs --------------------------------------------------------------------------------------------------------


def held_out(run: dict, args: argparse.Namespace) -> dict:
    """The stage's script as a process of its own; what it measured on --valid_path at its end."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "out_dir": folder, "cache_dir": args.cache_dir, "device": args.device, "hidden_size": run["hidden_size"],
            "num_hidden_layers": run["num_hidden_layers"], "optimizer": run["optimizer"],
            "learning_rate": run["learning_rate"], "seed": run["seed"], "batch_size": run["rows"],
            "accumulation_steps": 1, "max_steps": run["steps"], "epochs": 1000, "log_interval": 10**6,
            "save_interval": 10**6, "eval_interval": 10**6,
        }  # fmt: skip
        flags |= {name: getattr(args, name) for name in FILES if getattr(args, name)}
        script = f"train_{run['stage']}.py"
        command = [sys.executable, str(ROOT / "trainer" / script)]
        command += [f"--{name}={value}" for name, value in flags.items()] + run["more"]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{script} failed: {done.stderr.strip() or done.stdout.strip()}")
        (log,) = (Path(folder) / "logs").rglob("*.jsonl")
        records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    last = next(record for record in reversed(records) if record["event"] == "evaluation")
    return {name: value for name, value in last.items() if name not in ("event", "step", "sample")}


def execute(args: argparse.Namespace) -> None:
    if (args.teacher_weight is None) == (args.stage == "distillation"):
        raise ValueError("--teacher_weight: distillation needs it, and no other stage has it")
    files = {name: getattr(args, name) for name in FILES}
    for name, path in files.items():
        if path and not path.is_file():
            raise ValueError(f"--{name}: {path} not found")
    files = {name: path and file_sha256(path)[:12] for name, path in files.items()}
    known = {key_of(run) for run in read_results(args.results)}
    for seed, learning_rate in itertools.product(args.seeds, args.learning_rates):
        run = {name: getattr(args, name, None) for name in SETTING + CHOICE} | files
        run |= {"learning_rate": learning_rate, "seed": seed}
        if key_of(run) in known:
            continue
        started = time.time()
        run |= held_out(run, args)
        run |= {"seconds": round(time.time() - started, 1), "threads": args.threads, "device": args.device}
        run |= {"torch": torch.__version__, "time": int(started)}
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        choice = f"{run['stage']} {run['optimizer']} {learning_rate:g}, seed {seed}"
        print(f"{choice}: held-out loss {run['valid_loss']:.4f}, {run['seconds']:.0f} s", flush=True)


# --- the report ------------------------------------------------------------------------------------------------------

Losses = dict[float, dict[int, float]]  # learning rate -> seed -> loss


def default_rate(stage: str, optimizer: str) -> float:
    return importlib.import_module(f"trainer.train_{stage}").parse(["--optimizer", optimizer]).learning_rate


def spread(values) -> float:
    return stdev(values) if len(values) > 1 else float("nan")


def gain(before: dict[int, float], after: dict[int, float]) -> tuple[float, float, int]:
    """How far the mean loss falls, the larger spread of the two, and the number of seeds: over the seeds of both."""
    seeds = sorted(before.keys() & after.keys())
    if not seeds:
        return float("-inf"), float("nan"), 0
    columns = [[losses[seed] for seed in seeds] for losses in (before, after)]
    return fmean(columns[0]) - fmean(columns[1]), max(map(spread, columns)), len(seeds)


def best_rate(losses: Losses) -> float:
    return min(losses, key=lambda rate: fmean(losses[rate].values()))


def verdict(losses: Losses, default: float) -> str:
    """Whether another rate is better than the default by more than the spread."""
    if default not in losses:
        return f"the default, {default:g}, was not run; best {best_rate(losses):g}"
    best = max(losses, key=lambda rate: gain(losses[default], losses[rate])[0])
    if best == default:
        return f"keep {default:g}: the best of {len(losses)} tried" if len(losses) > 1 else "no other rate was run"
    difference, noise, seeds = gain(losses[default], losses[best])
    found = f"{best:g} is better than the default {default:g} by {difference:.4f}"
    edge = ", at the edge of what was tried" if best in (min(losses), max(losses)) else ""
    if seeds < 2:
        return f"{found}{edge}; with one seed that decides nothing"
    chosen = f"change to {best:g}" if difference > noise else f"keep {default:g}"
    return f"{chosen}: {found}{edge}; spread over {seeds} seeds {noise:.4f}"


def compare_best(adamw: Losses, muon: Losses) -> str:
    """The best rates of the two optimizers beside each other."""
    rates = best_rate(adamw), best_rate(muon)
    difference, noise, seeds = gain(adamw[rates[0]], muon[rates[1]])
    if not seeds:
        return f"muon {rates[1]:g} and adamw {rates[0]:g}, the best, have no seed in common"
    noise = f"spread over {seeds} seeds {noise:.4f}" if seeds > 1 else "one seed"
    sign = "lower" if difference > 0 else "higher"
    return f"muon {rates[1]:g} ends {abs(difference):.4f} {sign} than adamw {rates[0]:g}; {noise}"


def table(runs: list[dict], metric: str) -> list[str]:
    """A row a learning rate, a column an optimizer: mean, spread and number of seeds."""
    optimizers = sorted({run["optimizer"] for run in runs})
    lines = [f"{metric:>22}" + "".join(f"{optimizer:>26}" for optimizer in optimizers)]
    for rate in sorted({run["learning_rate"] for run in runs}):
        line = f"{rate:22g}"
        for optimizer in optimizers:
            values = [r[metric] for r in runs if (r["learning_rate"], r["optimizer"]) == (rate, optimizer)]
            cell = f"{fmean(values):.4f} ± {spread(values):.4f} ({len(values)})" if values else "-"
            line += f"{cell.replace('± nan ', ''):>26}"
        lines.append(line)
    return lines


def report(runs: list[dict]) -> str:
    settings: dict[str, list[dict]] = defaultdict(list)
    for run in runs:
        settings[key_of(run, SETTING)].append(run)
    lines = []
    for group in settings.values():
        setting = group[0]
        more = "".join(f", {flag}" for flag in setting["more"])
        lines.append(
            f"{setting['stage']}, {setting['hidden_size']}×{setting['num_hidden_layers']}, {setting['steps']} steps of "
            f"{setting['rows']} rows, from {setting['base_weight']}{more}"
        )
        for metric in ("valid_loss", *ALSO.get(setting["stage"], ())):
            lines += table(group, metric)
        losses: dict[str, Losses] = defaultdict(lambda: defaultdict(dict))
        for run in group:
            losses[run["optimizer"]][run["learning_rate"]][run["seed"]] = run["valid_loss"]
        for optimizer in sorted(losses):
            lines.append(f"{optimizer}: {verdict(losses[optimizer], default_rate(setting['stage'], optimizer))}")
        if len(losses) == 2:
            lines.append(compare_best(losses["adamw"], losses["muon"]))
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "report":
        print(report(read_results(args.results)))
    else:
        execute(args)


if __name__ == "__main__":
    run_script(main)
