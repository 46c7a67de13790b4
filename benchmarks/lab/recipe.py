"""Compare recipes for pretraining: small models, each trained to the end of its own schedule, scored on held-out text.

    python benchmarks/lab/recipe.py run --recipe default --tokens 2e6 --learning_rates 1e-3 2e-3 --rows 4 8 \\
        --seeds 0 1 --data_path TRAIN.jsonl --valid_path HELD_OUT.jsonl
    python benchmarks/lab/recipe.py report
    python benchmarks/lab/recipe.py versus
    python benchmarks/lab/recipe.py --results benchmarks/lab/recipe_runs.jsonl versus     the runs of RESULTS.md

Each run is appended to --results as one line of JSON and never repeated, so an interrupted search continues where it
stopped. `report` lists the settings, best first, with mean and standard deviation over seeds. `versus` says what the
default recipe needs to reach the bits per byte at which `adamw` (this pipeline, one classic rate for all), `original`,
`trainer` and `litgpt` end. Each training file has its own table.

Recipes: `original` is the loop of the original scripts: 32 padded documents per micro-batch, 8 of them per step,
float32, AdamW with betas 0.9 and 0.999 and decay 0.01, a cosine from 1.1 times the peak to 0.1 of it, no warm-up,
gradients averaged per micro-batch. `trainer` is transformers' Trainer with its defaults (AdamW without decay, a linear
decay from the peak to 0, float32) on its Llama: documents joined and cut into rows of 512, attention across their
borders. `litgpt` is LitGPT's pretraining (`pip install litgpt`; its compiled model, AdamW, a cosine to 4e-5, float32)
on the same rows, except that it warms up over 20 steps instead of 2,000. The others are trainer/train_pretrain.py with
the flags in RECIPES. Further flags for that script follow `--`.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import peers
from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import run_script, stage_parser
from trainer.checkpoint import file_sha256
from trainer.distributed import Process, keep_freed_memory
from trainer.evaluation import evaluate
from trainer.loader import PackedData
from trainer.optimization import Precision

ONE_RATE = ["--embedding_lr_scale", "1", "--warmup_iters", "50"]
RECIPES = {  # flags of train_pretrain.py
    "default": [],
    "adamw": ["--optimizer", "adamw", *ONE_RATE],
    "muon": ["--optimizer", "muon", *ONE_RATE],
}
AS_SHIPPED = {"learning_rate": 5e-4, "rows": 256}  # of the original recipe
PADDED_LENGTH, ORIGINAL_ROWS, ORIGINAL_ACCUMULATION = 512, 32, 8
SETTING = ("recipe", "tokens", "learning_rate", "rows", "seed", "hidden_size", "num_hidden_layers", "data", "more")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags before `--`, and those after it, for train_pretrain.py, as `more`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "out" / "recipe_runs.jsonl"
    parser.add_argument("--results", type=Path, default=results, help="jsonl file of runs (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", allow_abbrev=False).add_argument
    add("--recipe", required=True, choices=["original", *PEERS, *RECIPES])
    add("--tokens", type=float, required=True, help="budget: positions of all steps together")
    add("--rows", type=int, nargs="+", required=True, help="rows of 512 in an optimizer step")
    add("--learning_rates", type=float, nargs="+", required=True)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--hidden_size", type=int, default=256)
    add("--num_hidden_layers", type=int, default=4)
    add("--data_path", type=Path, required=True)
    add("--valid_path", type=Path, required=True)
    add("--cache_dir", type=Path, default=ROOT / "out" / "token_cache")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    commands.add_parser("report")
    commands.add_parser("versus")
    argv = list(sys.argv[1:] if argv is None else argv)
    border = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:border])
    args.more = argv[border + 1 :]
    return args


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def key_of(run: dict) -> str:
    return json.dumps({name: run[name] for name in SETTING})


# --- the runs --------------------------------------------------------------------------------------------------------


def run_ours(run: dict, args: argparse.Namespace) -> dict:
    """Run trainer/train_pretrain.py to its end, in a process and a folder of its own."""
    steps = max(1, round(run["tokens"] / (run["rows"] * 512)))
    flags = {name: getattr(args, name) for name in ("data_path", "valid_path", "cache_dir", "device")}
    flags |= {name: run[name] for name in ("hidden_size", "num_hidden_layers", "learning_rate", "seed")}
    flags |= {"max_seq_len": 512, "batch_size": run["rows"], "max_steps": steps, "log_interval": 50, "epochs": 1000}
    flags |= {"accumulation_steps": 1, "save_interval": 10**6, "eval_interval": 10**6}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "trainer" / "train_pretrain.py"), f"--out_dir={folder}"]
        command += [*(f"--{name}={value}" for name, value in flags.items()), *RECIPES[run["recipe"]], *run["more"]]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"train_pretrain.py failed: {done.stderr.strip() or done.stdout.strip()}")
        (log,) = (Path(folder) / "logs").rglob("*.jsonl")
        records = read_results(log)
    logged = [record for record in records if record["event"] == "step"]
    (final,) = [record for record in records if record["event"] == "evaluation"]
    curve = [(record["step"], round(record["loss"], 4)) for record in logged]
    measured = {name: final[name] for name in ("bits_per_byte", "valid_loss")}
    return measured | {"steps": steps, "seconds": logged[-1]["seconds"], "curve": curve}


def run_original(run: dict, args: argparse.Namespace) -> dict:
    """Run the loop of the original scripts, written from its behaviour: padded rows, means over micro-batches."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(run["seed"])
    tokenizer, device = ChatTokenizer(ROOT / "model"), torch.device(args.device)
    documents = [ids[:PADDED_LENGTH] for ids in read_documents(args.data_path, tokenizer)]
    accumulation = max(1, run["rows"] // ORIGINAL_ROWS)
    rows = min(run["rows"], ORIGINAL_ROWS)
    micro_steps = max(1, round(run["tokens"] / (rows * PADDED_LENGTH)))
    model = MiniMindForCausalLM(config_of(args)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run["learning_rate"])
    order = itertools.chain.from_iterable(torch.randperm(len(documents)).tolist() for _ in itertools.count())
    started, curve = time.perf_counter(), []
    for micro_step in range(micro_steps):
        ids = torch.full((rows, PADDED_LENGTH), tokenizer.pad_id)
        for row in range(rows):
            document = documents[next(order)]
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
    return held_out(model, tokenizer, args) | {
        "steps": micro_steps // accumulation, "seconds": seconds, "curve": curve
    }  # fmt: skip


def run_peer(run: dict, args: argparse.Namespace) -> dict:
    """Run another program on the documents joined into one stream, and score its weights in our model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(run["seed"])
    tokenizer, config = ChatTokenizer(ROOT / "model"), config_of(args)
    stream = torch.tensor([i for ids in read_documents(args.data_path, tokenizer) for i in ids])
    steps = max(1, round(run["tokens"] / (run["rows"] * 512)))
    with tempfile.TemporaryDirectory() as folder:
        state, curve, seconds = PEERS[run["recipe"]](run, args, config, stream, steps, folder)
    model = MiniMindForCausalLM(config).to(args.device)
    model.load_state_dict(state)
    return held_out(model, tokenizer, args) | {"steps": steps, "seconds": seconds, "curve": curve}


def train_with_trainer(run, args, config, stream, steps, folder) -> tuple[dict, list, float]:
    """Train transformers' Llama with transformers' Trainer; return weights, losses and seconds."""
    from transformers import Trainer, TrainingArguments

    rows = stream[: len(stream) // 512 * 512].view(-1, 512)
    model = peers.llama(config, MiniMindForCausalLM(config).state_dict()).to(args.device)
    options = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=run["rows"], learning_rate=run["learning_rate"],
        max_steps=steps, seed=run["seed"], logging_steps=50, use_cpu=args.device == "cpu", report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    assert options.n_gpu <= 1  # with several, Trainer takes as many times the rows
    trainer = Trainer(model, options, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    curve = [(record["step"], record["loss"]) for record in trainer.state.log_history if "loss" in record]
    return model.state_dict(), curve, seconds


def train_with_litgpt(run, args, config, stream, steps, folder) -> tuple[dict, list, float]:
    """Run LitGPT's pretraining; return weights and seconds, compiling included. It logs no curve that could be read."""
    from litgpt import Config, pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import DataModule
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from torch.utils.data import DataLoader

    if torch.cuda.is_available() != args.device.startswith("cuda"):
        raise ValueError("--recipe litgpt takes the GPU if there is one: --device must say the same")

    class Rows(DataModule):
        def connect(self, **_):
            pass

        def train_dataloader(self):
            rows = stream[: len(stream) // 513 * 513].view(-1, 513)  # 512 positions and the next token of the last
            return DataLoader(rows, batch_size=run["rows"], shuffle=True, drop_last=True)

        val_dataloader = train_dataloader  # read for two batches before training

    sizes = Config(
        block_size=512, n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size,
        n_query_groups=config.num_key_value_heads, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", norm_eps=config.rms_norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=config.intermediate_size, rope_base=config.rope_theta, vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
    )  # fmt: skip
    settings = TrainArgs(
        global_batch_size=run["rows"], micro_batch_size=run["rows"], max_tokens=steps * run["rows"] * 512,
        max_norm=1.0, min_lr=4e-5, lr_warmup_steps=min(20, steps - 1), tie_embeddings=True, save_interval=None,
    )  # fmt: skip
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": run["learning_rate"]}}
    started = time.perf_counter()
    with mock.patch.object(pretrain, "save_checkpoint") as save:  # it would read the flags of LitGPT's own command
        pretrain.setup(
            "", sizes, Path(folder), "32-true", data=Rows(), train=settings, devices=1, optimizer=optimizer,
            eval=EvalArgs(interval=10**6, final_validation=False), logger_name="csv", seed=run["seed"],
        )  # fmt: skip
    seconds, weights = time.perf_counter() - started, {}
    copy_weights_llama(sizes, weights, save.call_args.args[1]["model"].state_dict())
    return weights, [], seconds


PEERS = {"trainer": train_with_trainer, "litgpt": train_with_litgpt}


def read_documents(path: Path, tokenizer: ChatTokenizer) -> list[list[int]]:
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_documents(texts)]


def config_of(args: argparse.Namespace) -> MiniMindConfig:
    return MiniMindConfig(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)


def held_out(model: MiniMindForCausalLM, tokenizer: ChatTokenizer, args: argparse.Namespace) -> dict:
    """Return bits per byte and loss as train_pretrain.py measures them."""
    flags = ["--device", args.device, "--cache_dir", str(args.cache_dir), "--dtype", "float32"]
    settings = stage_parser("", batch_size=16).parse_args(flags)
    settings.data_path = args.valid_path
    device = torch.device(args.device)
    alone, precision = Process(0, 0, 1, device), Precision("float32", device)
    return evaluate(model, PackedData(settings, "pretrain", tokenizer, alone), precision, alone, tokenizer)


def execute(args: argparse.Namespace) -> None:
    if args.recipe == "original" and any(rows > ORIGINAL_ROWS and rows % ORIGINAL_ROWS for rows in args.rows):
        raise ValueError(f"--rows: above {ORIGINAL_ROWS} the original takes micro-batches of {ORIGINAL_ROWS}")
    for flag in ("data_path", "valid_path"):
        if not getattr(args, flag).is_file():
            raise ValueError(f"--{flag} {getattr(args, flag)} not found")
    known = {key_of(run) for run in read_results(args.results)}
    data = file_sha256(args.data_path)[:12]
    for seed, rows, learning_rate in itertools.product(args.seeds, args.rows, args.learning_rates):
        run = {
            "recipe": args.recipe, "tokens": int(args.tokens), "learning_rate": learning_rate, "rows": rows,
            "seed": seed, "hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers, "data": data,
            "more": args.more,
        }  # fmt: skip
        if key_of(run) in known:
            continue
        run |= ({"original": run_original} | dict.fromkeys(PEERS, run_peer)).get(args.recipe, run_ours)(run, args)
        run |= {"threads": args.threads, "device": args.device, "torch": torch.__version__, "time": int(time.time())}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        score, seconds = f"{run['bits_per_byte']:.4f} bits per byte", f"{run['seconds']:.0f} s"
        print(f"{describe(run)}, seed {seed}: {score}, {seconds}", flush=True)


# --- the report ------------------------------------------------------------------------------------------------------


def describe(run: dict) -> str:
    return (
        f"{run['hidden_size']}×{run['num_hidden_layers']} {' '.join([run['recipe'], *run['more']])}, "
        f"lr {run['learning_rate']:g}, {run['rows']} rows, {run['tokens'] / 1e6:.2f}M tokens"
    )


def seconds_of(group: list[dict]) -> float | None:
    """Mean over the runs that had the machine to themselves, as far as the records know; None without such a run."""
    quiet = [run["seconds"] for run in group if run.get("quiet", True)]
    return fmean(quiet) if quiet else None


def shown(group: list[dict]) -> str:
    seconds = seconds_of(group)
    return "busy" if seconds is None else f"{seconds:.0f}"


def bits(group: list[dict]) -> tuple[float, str]:
    """Return the mean, and the standard deviation over seeds if there are several."""
    values = [run["bits_per_byte"] for run in group]
    return fmean(values), f"{stdev(values):.4f}" if len(values) > 1 else ""


def report(runs: list[dict]) -> str:
    """Settings by bits per byte with their spread over seeds."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for run in runs:
        groups[describe(run)].append(run)
    lines = [f"{'bits per byte':>14}{'spread':>9}{'seeds':>7}{'steps':>7}{'seconds':>9}   setting"]
    for title, group in sorted(groups.items(), key=lambda item: bits(item[1])[0]):
        (mean, noise), steps = bits(group), group[0]["steps"]
        lines.append(f"{mean:14.4f}{noise or '-':>9}{len(group):7}{steps:7}{shown(group):>9}   {title}")
    return "\n".join(lines)


def share(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if part >= 0.1 * whole else f"{part / whole:.2g}"


def versus(runs: list[dict]) -> str:
    """Tell which shares of their tokens and seconds the default recipe needs to reach the end of others.

    The others are AdamW, the original and the other programs, each at its best setting of its largest budget, and the
    original as it was shipped. Ours is the smallest budget whose mean is as good.
    """
    settings: dict[tuple, list[dict]] = defaultdict(list)
    for run in runs:
        if not run["more"]:  # with more flags it is a variant, not the recipe
            size = (run["hidden_size"], run["num_hidden_layers"])
            settings[size, run["recipe"], run["tokens"], describe(run)].append(run)
    means = {key: bits(group)[0] for key, group in settings.items()}

    def said(key: tuple) -> str:
        mean, noise = bits(settings[key])
        noise = f" ± {noise}" if noise else ""
        return f"{key[-1]}: {mean:.4f}{noise} bits per byte, {len(settings[key])} seeds, {shown(settings[key])} s"

    lines = []
    for size, recipe in sorted({key[:2] for key in settings if key[1] in ("adamw", "original", *PEERS)}):
        budgets = [key for key in settings if key[:2] == (size, recipe)]
        last = max(key[2] for key in budgets)
        ended = [key for key in budgets if key[2] == last]
        shipped = [key for key in ended if recipe == "original" and AS_SHIPPED.items() <= settings[key][0].items()]
        for theirs in dict.fromkeys((min(ended, key=means.get), *shipped)):
            as_good = [key for key in settings if key[:2] == (size, "default") and means[key] <= means[theirs]]
            if not as_good:
                continue
            best = min(as_good, key=lambda key: (key[2], means[key]))
            lines += [said(theirs), "  " + said(best), f"  {share(best[2], last)} of the tokens"]
            seconds = [seconds_of(settings[key]) for key in (best, theirs)]
            if None not in seconds:
                lines[-1] += f", {share(*seconds)} of the time"
    return "\n".join(lines) or "no run of recipe default is as good as another recipe's longest"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    if args.command == "run":
        return execute(args)
    if not args.results.is_file():
        raise ValueError(f"--results {args.results} not found; the `run` command writes it")
    by_data: dict[str, list[dict]] = defaultdict(list)
    for run in read_results(args.results):
        by_data[run["data"]].append(run)
    for data, runs in by_data.items():
        if len(by_data) > 1:
            print(f"data {data}:")
        print(report(runs) if args.command == "report" else versus(runs))


if __name__ == "__main__":
    run_script(main)
