"""Compare learning rates of the stages after pretraining by the loss on held-out data.

    python benchmarks/lab/stage_rates.py run --stage full_sft --optimizer adamw --learning_rates 2.5e-4 5e-4 1e-3 \\
        --steps 100 --rows 8 --base_weight out/pretrain_256.pth --data_path SFT.jsonl --valid_path HELD_OUT.jsonl
    python benchmarks/lab/stage_rates.py report
    python benchmarks/lab/stage_rates.py --results benchmarks/lab/stage_rate_runs.jsonl report    the runs of RESULTS.md

A stage is trainer/train_{stage}.py: full_sft, dpo, lora, distill_reason or distillation (which needs --teacher_weight).
Whatever no flag here names keeps the script's default; further flags for it follow `--`. Each run has a whole schedule
for its own steps, is appended to --results as one line of JSON, and is never repeated. The line names files by the
first digits of their SHA-256.

`report` prints the mean loss over seeds with its standard deviation, a row per rate and a column per optimizer, and
says whether another rate beats the default by more than that spread on the same seeds.
"""

import argparse
import importlib
import itertools
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.lab.recipe import (
    add_commands,
    append_result,
    key_of,
    last_evaluation,
    parse_with_more,
    read_results,
    recorded_runs,
    spread,
    train,
)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run, _ = add_commands(parser, ROOT / "out" / "stage_rate_runs.jsonl")
    add = run.add_argument
    add("--stage", required=True, choices=STAGES)
    add("--optimizer", required=True, choices=("adamw", "muon"))
    add("--steps", type=int, required=True, help="optimizer steps of a run")
    add("--rows", type=int, required=True, help="rows in an optimizer step; of DPO, pairs")
    add("--base_weight", type=Path, required=True, help=".pth file to start from")
    add("--teacher_weight", type=Path, help=".pth file of the teacher, for distillation")
    return parse_with_more(parser, argv)


# --- the runs --------------------------------------------------------------------------------------------------------


def held_out(run: dict, args: argparse.Namespace) -> dict:
    """What the stage's script measured on --valid_path at its end."""
    flags = {name: run[name] for name in ("hidden_size", "num_hidden_layers", *CHOICE)}
    flags |= {"batch_size": run["rows"], "max_steps": run["steps"], "log_interval": 10**6}
    flags |= {name: getattr(args, name) for name in ("cache_dir", "device", *FILES) if getattr(args, name)}
    last = last_evaluation(train(run["stage"], flags, run["more"], args.threads))
    return {name: value for name, value in last.items() if name not in ("event", "step", "sample")}


def execute(args: argparse.Namespace) -> None:
    if (args.teacher_weight is None) == (args.stage == "distillation"):
        raise ValueError("--teacher_weight: distillation needs it, and no other stage has it")
    files = {name: getattr(args, name) for name in FILES}
    for name, path in files.items():
        if path and not path.is_file():
            raise ValueError(f"--{name}: {path} not found")
    files = {name: path and file_sha256(path)[:12] for name, path in files.items()}
    known = {key_of(run, SETTING + CHOICE) for run in read_results(args.results)}
    for seed, learning_rate in itertools.product(args.seeds, args.learning_rates):
        run = {name: getattr(args, name, None) for name in SETTING + CHOICE} | files
        run |= {"learning_rate": learning_rate, "seed": seed}
        if key_of(run, SETTING + CHOICE) in known:
            continue
        started = time.time()
        run |= held_out(run, args)
        append_result(args.results, run | {"seconds": round(time.time() - started, 1)}, args)
        choice = f"{run['stage']} {run['optimizer']} {learning_rate:g}, seed {seed}"
        print(f"{choice}: held-out loss {run['valid_loss']:.4f}, {time.time() - started:.0f} s", flush=True)


# --- the report ------------------------------------------------------------------------------------------------------

Losses = dict[float, dict[int, float]]  # learning rate -> seed -> loss


def default_rate(stage: str, optimizer: str) -> float:
    return importlib.import_module(f"trainer.train_{stage}").parse(["--optimizer", optimizer]).learning_rate


def gain(before: dict[int, float], after: dict[int, float]) -> tuple[float, float, int]:
    """(how far the mean loss falls, the larger of both spreads, the number of seeds), over the seeds that both have."""
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
    """Compare the best rates of the two optimizers."""
    rates = best_rate(adamw), best_rate(muon)
    difference, noise, seeds = gain(adamw[rates[0]], muon[rates[1]])
    if not seeds:
        return f"muon {rates[1]:g} and adamw {rates[0]:g}, the best, have no seed in common"
    noise = f"spread over {seeds} seeds {noise:.4f}" if seeds > 1 else "one seed"
    sign = "lower" if difference > 0 else "higher"
    return f"muon {rates[1]:g} ends {abs(difference):.4f} {sign} than adamw {rates[0]:g}; {noise}"


def table(runs: list[dict], metric: str) -> list[str]:
    """A row per learning rate, a column per optimizer: mean, spread and number of seeds."""
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
        print(report(recorded_runs(args.results)))
    else:
        execute(args)


if __name__ == "__main__":
    run_script(main)
