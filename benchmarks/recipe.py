"""Recipes for pretraining, compared: small models trained to the end of a schedule, bits per byte on held-out text.

    python benchmarks/recipe.py search --recipe adamw --tokens 2e6 --learning_rates 1e-3 2e-3 4e-3 --rows 8 16
    python benchmarks/recipe.py run --recipe adamw --tokens 4e6 --learning_rate 2e-3 --rows 8 --seeds 0 1 2
    python benchmarks/recipe.py run --recipe muon --tokens 2.6e6 --learning_rate 5e-3 --rows 8 --seeds 0 1 2
    python benchmarks/recipe.py report
    python benchmarks/recipe.py versus

Every run has a full schedule for its own budget of tokens and is appended to --results as one line of JSON; what stands
there already is not run again, so an interrupted search goes on where it stopped. `report` prints the settings, best
first, with the mean over seeds and their standard deviation; `versus` what the default recipe needs to come to where
`adamw` (this pipeline, one classic rate for all) and `original` end. Each training file has a table of its own; for
yours give --results, before the command, a file of its own too.

Recipes: `original` is the loop that people know: 32 padded documents a micro-batch, 8 of them a step, float32, AdamW
with betas 0.9 and 0.999 and decay 0.01, a cosine from 1.1 times the peak to 0.1 of it, no warm-up, gradients averaged
per micro-batch. The others are trainer/train_pretrain.py with flags; see RECIPES. Further flags for it follow `--`.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import run_script, stage_parser
from trainer.distributed import Process, keep_freed_memory
from trainer.evaluation import evaluate
from trainer.loader import PackedData
from trainer.optimization import Precision

# flags of train_pretrain.py; "default" has none
ONE_RATE = ["--embedding_lr_scale", "1", "--warmup_iters", "50"]
RECIPES = {
    "default": [],
    "adamw": ["--optimizer", "adamw", *ONE_RATE],
    "muon": ["--optimizer", "muon", *ONE_RATE],
    "muon-to-zero": ["--optimizer", "muon", *ONE_RATE, "--min_lr_ratio", "0"],
}
AS_SHIPPED = {"learning_rate": 5e-4, "rows": 256}  # of the original recipe
PADDED_LENGTH, ORIGINAL_ROWS, ORIGINAL_ACCUMULATION = 512, 32, 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "recipe_runs.jsonl")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("search", "run"):
        add = commands.add_parser(command).add_argument
        add("--recipe", required=True, choices=["original", *RECIPES])
        add("--tokens", type=float, required=True, help="budget: positions of all steps together")
        if command == "search":
            add("--learning_rates", type=float, nargs="+", required=True)
            add("--rows", type=int, nargs="+", required=True, help="rows of 512 in an optimizer step")
        else:
            add("--learning_rate", dest="learning_rates", type=float, nargs=1, required=True)
            add("--rows", type=int, nargs=1, required=True, help="rows of 512 in an optimizer step")
        add("--seeds", type=int, nargs="+", default=[0])
        add("--ideas", nargs="*", default=[], metavar="IDEA=NUMBER", help="of recipe_ideas.py")
        add("--hidden_size", type=int, default=256)
        add("--num_hidden_layers", type=int, default=4)
        add("--data_path", type=Path, required=True)
        add("--valid_path", type=Path, required=True)
        add("--cache_dir", type=Path, default=ROOT / "out" / "token_cache")
        add("--threads", type=int, default=torch.get_num_threads())
        add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    commands.add_parser("report")
    commands.add_parser("versus")
    args = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    args.more = more
    return args


def key_of(run: dict) -> str:
    """What decides the result of a run."""
    names = (
        "recipe",
        "tokens",
        "learning_rate",
        "rows",
        "seed",
        "hidden_size",
        "num_hidden_layers",
        "data",
        "more",
        "ideas",
    )
    return json.dumps({name: run.get(name, []) for name in names}, sort_keys=True)


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


# --- the runs --------------------------------------------------------------------------------------------------------


def run_ours(run: dict, args: argparse.Namespace) -> dict:
    """train_pretrain.py as a process of its own."""
    steps = max(1, round(run["tokens"] / (run["rows"] * 512)))
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "data_path": args.data_path, "valid_path": args.valid_path, "out_dir": folder, "cache_dir": args.cache_dir,
            "hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers, "max_seq_len": 512,
            "batch_size": run["rows"], "accumulation_steps": 1, "learning_rate": run["learning_rate"],
            "max_steps": steps, "epochs": 1000, "seed": run["seed"], "device": args.device,
            "log_interval": 50, "save_interval": 10**6, "eval_interval": 10**6,
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "benchmarks" / "recipe_ideas.py"), *run["ideas"], "--"]
        command += [*(f"--{name}={value}" for name, value in flags.items()), *RECIPES[run["recipe"]], *run["more"]]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}, capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"train_pretrain.py failed: {done.stderr.strip() or done.stdout.strip()}")
        lines = (Path(folder) / "logs" / f"pretrain_{args.hidden_size}.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    logged = [record for record in records if record["event"] == "step"]
    marks = [0, *(record["step"] for record in logged)]
    tokens = [
        run["rows"] * 512 * (1 - record["padding"]) * (b - a)
        for record, a, b in zip(logged, marks, marks[1:], strict=False)
    ]
    seconds = sum(count / record["tokens_per_second"] for count, record in zip(tokens, logged, strict=True))
    final = next(record for record in reversed(records) if record["event"] == "evaluation")
    curve = [(record["step"], round(record["loss"], 4)) for record in logged]
    return {
        "bits_per_byte": final["bits_per_byte"],
        "valid_loss": final["valid_loss"],
        "steps": steps,
        "seconds": seconds,
        "curve": curve,
    }


def run_original(run: dict, args: argparse.Namespace) -> dict:
    """The loop of the original scripts, written down from its behaviour: padded rows, means over micro-batches."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(run["seed"])
    tokenizer, device = ChatTokenizer(ROOT / "model"), torch.device(args.device)
    with args.data_path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    documents = [
        [tokenizer.bos_id, *ids, tokenizer.eos_id][:PADDED_LENGTH] for ids in tokenizer.encode_documents(texts)
    ]
    accumulation = max(1, run["rows"] // ORIGINAL_ROWS)
    rows = min(run["rows"], ORIGINAL_ROWS)
    micro_steps = max(1, round(run["tokens"] / (rows * PADDED_LENGTH)))
    config = MiniMindConfig(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    model = MiniMindForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["learning_rate"])
    order = itertools.chain.from_iterable(torch.randperm(len(documents)).tolist() for _ in itertools.count())
    started, curve = time.perf_counter(), []
    for micro_step in range(micro_steps):
        batch = [documents[next(order)] for _ in range(rows)]
        ids = torch.full((rows, PADDED_LENGTH), tokenizer.pad_id)
        for row, document in enumerate(batch):
            ids[row, : len(document)] = torch.tensor(document)
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == tokenizer.pad_id, -100)
        rate = run["learning_rate"] * (0.1 + 0.5 * (1 + math.cos(math.pi * micro_step / micro_steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=ids[:, :-1].to(device)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten().to(device))
        (loss / accumulation).backward()
        if (micro_step + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (micro_step + 1) % (50 * accumulation) == 0:
            curve.append(((micro_step + 1) // accumulation, round(loss.item(), 4)))
    seconds = time.perf_counter() - started
    flags = ["--device", args.device, "--cache_dir", str(args.cache_dir), "--dtype", "float32"]
    settings = stage_parser("", batch_size=16).parse_args(flags)
    settings.data_path = args.valid_path
    alone, precision = Process(0, 0, 1, device), Precision("float32", device)
    held_out = PackedData(settings, "pretrain", tokenizer, alone)
    measured = evaluate(model, held_out, precision, alone, tokenizer)
    return measured | {"steps": micro_steps // accumulation, "seconds": seconds, "curve": curve}


def execute(args: argparse.Namespace) -> None:
    if args.recipe == "original" and any(rows > ORIGINAL_ROWS and rows % ORIGINAL_ROWS for rows in args.rows):
        raise ValueError(f"--rows: above {ORIGINAL_ROWS} the original takes micro-batches of {ORIGINAL_ROWS}")
    for path in (args.data_path, args.valid_path):
        if not path.is_file():
            raise ValueError(f"{path} not found")
    known = {key_of(run) for run in read_results(args.results)}
    data = hashlib.sha256(args.data_path.read_bytes()).hexdigest()[:12]
    for seed, rows, learning_rate in itertools.product(args.seeds, args.rows, args.learning_rates):
        run = {
            "recipe": args.recipe, "tokens": int(args.tokens), "learning_rate": learning_rate, "rows": rows,
            "seed": seed, "hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers, "data": data,
            "more": args.more, "ideas": args.ideas,
        }  # fmt: skip
        if key_of(run) in known:
            continue
        run |= run_original(run, args) if args.recipe == "original" else run_ours(run, args)
        run |= {"threads": args.threads, "device": args.device, "torch": torch.__version__, "time": int(time.time())}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print(
            f"{describe(run)}, seed {seed}: {run['bits_per_byte']:.4f} bits per byte, {run['seconds']:.0f} s",
            flush=True,
        )


# --- the report ------------------------------------------------------------------------------------------------------


def describe(run: dict) -> str:
    more = "".join(f" {word}" for word in [*run["more"], *run.get("ideas", [])])
    return (
        f"{run['hidden_size']}×{run['num_hidden_layers']} {run['recipe']}{more}, lr {run['learning_rate']:g}, "
        f"{run['rows']} rows, {run['tokens'] / 1e6:.2f}M tokens"
    )


def seconds_of(group: list[dict]) -> float | None:
    """Mean over the runs beside which no other program ran, as far as is known; None where there is no such run."""
    quiet = [run["seconds"] for run in group if run.get("quiet", True)]
    return statistics.fmean(quiet) if quiet else None


def shown(group: list[dict]) -> str:
    seconds = seconds_of(group)
    return "busy" if seconds is None else f"{seconds:.0f}"


def report(runs: list[dict]) -> str:
    """Settings by bits per byte with their spread over seeds."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for run in runs:
        groups[describe(run)].append(run)
    lines = [f"{'bits per byte':>14}{'spread':>9}{'seeds':>7}{'steps':>7}{'seconds':>9}   setting"]
    for title, group in sorted(groups.items(), key=lambda item: statistics.fmean(r["bits_per_byte"] for r in item[1])):
        values = [run["bits_per_byte"] for run in group]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        mean, steps = statistics.fmean(values), group[0]["steps"]
        lines.append(f"{mean:14.4f}{spread:>9}{len(values):7}{steps:7}{shown(group):>9}   {title}")
    return "\n".join(lines)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if part >= 0.1 * whole else f"{part / whole:.2g}"


def versus(runs: list[dict], ours: str = "default") -> str:
    """What the default recipe needs to come to where others end: shares of their tokens and seconds.

    The others: AdamW and the original, each at its best setting of its largest budget, and the original as it was
    shipped. Ours is the smallest budget whose mean is as good.
    """
    settings: dict[tuple, list[dict]] = defaultdict(list)
    for run in runs:
        if run["more"] or run.get("ideas"):
            continue  # a variant, not the recipe
        size = (run["hidden_size"], run["num_hidden_layers"])
        settings[size, run["recipe"], run["tokens"], describe(run)].append(run)
    means = {key: statistics.fmean(run["bits_per_byte"] for run in group) for key, group in settings.items()}

    def said(key: tuple) -> str:
        values = [run["bits_per_byte"] for run in settings[key]]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{key[-1]}: {means[key]:.4f}{spread} bits per byte, {len(values)} seeds, {shown(settings[key])} s"

    lines = []
    for size, recipe in sorted({key[:2] for key in settings if key[1] in ("adamw", "original")}):
        budgets = [key for key in settings if key[:2] == (size, recipe)]
        last = max(key[2] for key in budgets)
        ended = [key for key in budgets if key[2] == last]
        shipped = [key for key in ended if recipe == "original" and AS_SHIPPED.items() <= settings[key][0].items()]
        for theirs in dict.fromkeys((min(ended, key=means.get), *shipped)):
            as_good = [key for key in settings if key[:2] == (size, ours) and means[key] <= means[theirs]]
            if not as_good:
                continue
            best = min(as_good, key=lambda key: (key[2], means[key]))
            lines += [said(theirs), "  " + said(best), f"  {share(best[2], last)} of the tokens"]
            seconds = [seconds_of(settings[key]) for key in (best, theirs)]
            if None not in seconds:
                lines[-1] += f", {share(*seconds)} of the time"
    return "\n".join(lines) or f"no run of recipe {ours} is as good as another recipe's longest"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    if args.command in ("search", "run"):
        return execute(args)
    by_data: dict[str, list[dict]] = defaultdict(list)
    for run in read_results(args.results):
        by_data[run.get("data", "")].append(run)
    for data, runs in by_data.items():
        if len(by_data) > 1:
            print(f"data {data}:")
        print(report(runs) if args.command == "report" else versus(runs))


if __name__ == "__main__":
    run_script(main)
