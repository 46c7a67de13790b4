"""Flags that every stage has. Each stage passes its own defaults and adds its own flags."""

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.token_cache import MAX_RECORD_BYTES
from model.device import choose_device
from model.flags import add_boolean, show_defaults, utf8, utf8_path
from model.model_minimind import PRESETS, MiniMindConfig
from model.streams import set_up_streams
from model.weights import STAGES, WeightsError, config_of_file, find_weights, read_sidecar, read_state_dict
from trainer.distributed import lost_process
from trainer.estimate import IRRELEVANT, run_or_estimate
from trainer.tracking import tracking_mistakes
from trainer.zero import zero_mistakes

ROOT = Path(__file__).resolve().parents[1]

LATER_SECONDS = 10  # the other processes wait this long before showing an error, so that the first one's comes first

MODEL_FLAGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "use_moe", "qk_norm")
# flags that may change on --resume; changing any other would change the result
FREE_ON_RESUME = IRRELEVANT | {
    "num_workers", "device", "compile", "batch_size", "accumulation_steps", "gradient_checkpointing", "base_weight",
    "reference_weight", "teacher_weight", "deepspeed_config", "max_record_bytes", "preset",
}  # fmt: skip


class PerOptimizer(dict):
    """A default for each --optimizer, shown in words by --help."""

    def __str__(self) -> str:
        return ", ".join(f"{value:g} with {optimizer}" for optimizer, value in self.items())


# what a number must be: flags -> (whether a value is right, how to say it)
COUNTS = (
    "epochs", "batch_size", "accumulation_steps", "log_interval", "save_interval", "eval_interval", "max_record_bytes",
)  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
RANGES = {
    (*SIZES, *COUNTS): (lambda value: value >= 1, "at least 1"),
    ("max_seq_len",): (lambda value: value >= 2, "at least 2"),
    ("warmup_iters", "max_steps", "num_workers", "seed", "weight_decay", "grad_clip", "price_per_hour"): (
        lambda value: value >= 0,
        "0 or more",
    ),
    ("learning_rate", "rank_timeout"): (lambda value: 0 < value < math.inf, "a number above 0"),
    ("embedding_lr_scale",): (lambda value: 0 <= value < math.inf, "0 or more"),
    ("min_lr_ratio", "decay_ratio"): (lambda value: 0 <= value <= 1, "between 0 and 1"),
    ("beta1", "beta2"): (lambda value: 0 <= value < 1, "at least 0 and below 1"),
}


def stage_parser(description: str, **defaults) -> argparse.ArgumentParser:
    """Make the parser of the flags that all stages share. defaults: what differs between stages (data_path, ...).

    Paths are anchored on the repository root, so that a script does the same from any folder. A default may be given
    for each optimizer; the first in learning_rate is the stage's own optimizer.
    """
    defaults = {"learning_rate": {"adamw": 5e-4}} | defaults
    if "data_path" in defaults:
        defaults["data_path"] = ROOT / defaults["data_path"]
    defaults = {name: PerOptimizer(value) if isinstance(value, dict) else value for name, value in defaults.items()}
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    group = parser.add_argument_group("data and output")
    add = group.add_argument
    add("--data_path", type=utf8_path, help="training data, jsonl")
    add("--valid_path", type=utf8_path, help="held-out data of the same kind, evaluated every --eval_interval")
    add("--tokenizer_path", type=utf8_path, default=ROOT / "model", help="folder with tokenizer.json")
    add("--out_dir", type=utf8_path, default=ROOT / "out", help="weights, logs and resume states")
    add("--cache_dir", type=utf8_path, help="tokenised data (default: OUT_DIR/token_cache; GRPO keeps none)")
    add_boolean(group, "--skip_bad_lines", False, "drop and count lines that are not valid records")
    add("--max_record_bytes", type=int, default=MAX_RECORD_BYTES, help="longer lines are bad (default: 16 MiB)")
    add_boolean(group, "--overwrite", False, "replace an unfinished run, or weights of another configuration")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--preset", choices=list(PRESETS), help="a known model; the flags below override it (default: minimind2_26m)")
    add("--hidden_size", type=int, help="(default: 512 or the preset's)")
    add("--num_hidden_layers", type=int, help="(default: 8 or the preset's)")
    add("--num_attention_heads", type=int, help="(default: 8)")
    add("--num_key_value_heads", type=int, help="(default: 2 or the preset's)")
    add("--max_seq_len", type=int, default=512, help="positions in a row of packed documents")
    add_boolean(group, "--use_moe", None, "mixture of experts (default: false or the preset's)")
    add_boolean(group, "--qk_norm", None, "normalise queries and keys (default: false or the preset's)")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--max_steps", type=int, default=0, help="stop, and end the schedule, after so many (default: 0, all epochs)")
    add("--batch_size", type=int, default=32, help="rows per process and micro-batch")
    add("--accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--learning_rate", type=float, help="peak learning rate (default: %(default)s)")
    add("--embedding_lr_scale", type=float, default=1.0, help="multiplies the rate of the embedding, also the head")
    add("--min_lr_ratio", type=float, default=0.1, help="the schedule ends at this share of the peak")
    schedule = "cosine: falls all the way; wsd: stays at the peak and falls in the last --decay_ratio of the steps"
    add("--lr_schedule", choices=("cosine", "wsd"), default="cosine", help=schedule)
    add("--decay_ratio", type=float, default=0.2, help="share of the steps in which wsd falls; 0: never")
    add("--warmup_iters", type=int, default=0, help="optimizer steps of linear warm-up (default: %(default)s)")
    own = f"(default: {next(iter(defaults['learning_rate']))})"
    add(
        "--optimizer",
        choices=("muon", "adamw", "sgd"),
        help=f"muon: for matrices inside the blocks; sgd: a check {own}",
    )
    add("--beta1", type=float, default=0.9, help="AdamW's mean of gradients")
    add("--beta2", type=float, default=0.95, help="AdamW's mean of squared gradients")
    add("--weight_decay", type=float, default=0.1, help="on matrices, not on norms (default: %(default)s)")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm, 0 = no clipping")
    add("--seed", type=int, default=1337, help="of the initial weights and the order of the data")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the matrix products")

    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="cpu, cuda:N, mps, xpu or npu")
    add("--num_workers", type=int, help="processes that assemble batches (default: 1 on CUDA and XPU, else 0; GRPO: 0)")
    add("--log_interval", type=int, default=100, help="optimizer steps between log lines")
    add("--save_interval", type=int, help="optimizer steps between saves (default: 100, more if saving is slow)")
    add("--eval_interval", type=int, default=500, help="optimizer steps between evaluations")
    add("--sample_prompt", type=utf8, default="", help="a text that the model continues at every evaluation")
    add_boolean(group, "--estimate", False, "time a short run, print what the whole run will take, keep no weights")
    add("--price_per_hour", type=float, help="of this machine in dollars, for --estimate")
    add("--pass_seconds", type=float, default=math.inf, help=argparse.SUPPRESS)  # --estimate: cut frozen passes short
    add_boolean(group, "--resume", False, "go on from the last saved state of this run")
    add_boolean(group, "--compile", None, "torch.compile (default: on with CUDA and XPU, else off)")
    add_boolean(group, "--gradient_checkpointing", False, "recompute activations: less memory, more time")
    zero = "DeepSpeed: divide optimizer state (1), gradients too (2), weights too (3) among processes (default: 0)"
    add("--zero_stage", type=int, choices=(0, 1, 2, 3), default=0, help=zero)
    add("--deepspeed_config", type=utf8_path, metavar="FILE", help="DeepSpeed's own settings on top of ours, JSON")
    add_boolean(group, "--use_wandb", False, "log to Weights & Biases too")
    add_boolean(group, "--use_swanlab", False, "log to SwanLab too")
    add_boolean(group, "--use_tensorboard", False, "write event files for TensorBoard too, in OUT_DIR/tensorboard/")
    add("--wandb_project", default="MiniMind", help="project at Weights & Biases and SwanLab")
    add("--rank_timeout", type=float, default=600, help="seconds to wait for a process that hangs")
    add_boolean(group, "--ddp", None, "accepted because old commands pass it; torchrun alone decides")
    add("--local_rank", "--local-rank", type=int, default=-1, help="what a launcher passes; LOCAL_RANK decides")

    unknown = defaults.keys() - {action.dest for action in parser._actions}
    assert not unknown, f"defaults for flags that do not exist: {unknown}"
    parser.set_defaults(**defaults)
    show_defaults(parser)
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, **checks: tuple[Callable, str]
) -> argparse.Namespace:
    """Parse and check. Raises ValueError with all mistakes at once, each with its flag.

    checks: for a stage's own flags, name -> (a function that tells whether a value is right, what it must be).
    """
    show_defaults(parser)
    args = parser.parse_args(argv)
    args.changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.optimizer is None:
        args.optimizer = "adamw" if args.zero_stage else next(iter(parser.get_default("learning_rate")))
    for name, value in vars(args).items():
        if isinstance(value, PerOptimizer):
            setattr(args, name, value.get(args.optimizer, value["adamw"]))
    chosen = MiniMindConfig(**PRESETS[args.preset or "minimind2_26m"])
    args.given = [flag for flag in MODEL_FLAGS if getattr(args, flag) is not None]
    for flag in set(MODEL_FLAGS) - set(args.given):
        setattr(args, flag, getattr(chosen, flag))
    mistakes = []
    for flags, (ok, wanted) in [*RANGES.items(), *(((flag,), check) for flag, check in checks.items())]:
        values = {flag: getattr(args, flag) for flag in flags}
        mistakes += [f"--{k} {v}: must be {wanted}" for k, v in values.items() if v is not None and not ok(v)]
    sizes_are_given = getattr(args, "base_weight", "none") == "none"  # otherwise the weights decide
    if sizes_are_given and all(getattr(args, flag) >= 1 for flag in SIZES):
        try:
            model_config(args, chosen.vocab_size)
        except ValueError as error:
            mistakes.append(str(error))
    if args.max_seq_len > (most := MiniMindConfig().max_position_embeddings):
        mistakes.append(f"--max_seq_len {args.max_seq_len}: the model has {most} positions")
    try:
        choose_device(args.device)
    except ValueError as error:
        mistakes.append(str(error))
    mistakes += zero_mistakes(args) + tracking_mistakes(args)
    if mistakes:
        raise ValueError("; ".join(mistakes))
    args.cache_dir = args.cache_dir or args.out_dir / "token_cache"
    return args


def find_base(args: argparse.Namespace) -> Path | None:
    """Return the weight file that --base_weight names; None if that is "none", which means random weights."""
    if args.base_weight == "none":
        return None
    return find_weights(args.base_weight, args.out_dir, args.hidden_size, args.use_moe)


def given_config(args: argparse.Namespace) -> dict:
    """Return what --preset and the flags that were given say of the model."""
    return PRESETS.get(args.preset, {}) | {name: getattr(args, name) for name in args.given}


def model_config(args: argparse.Namespace, vocab_size: int, base: Path | None = None) -> MiniMindConfig:
    """Return the configuration to train: what the flags say, or with `base` what these weights are.

    What tensors do not show (theta, eps, routing, heads) comes from the sidecar of `base`, as weights mean nothing
    without it. Raises WeightsError if flags that were given contradict it; the others are set to what it says.
    """
    given = given_config(args)
    if base is None:
        flags = {name: getattr(args, name) for name in MODEL_FLAGS}
        return MiniMindConfig(**PRESETS.get(args.preset, {}) | flags | {"vocab_size": vocab_size})
    config = config_of_file(base, read_state_dict(base), read_sidecar(base), given)
    differing = [
        f"--{name} is {value} here and {getattr(config, name)} in the file"
        for name, value in given.items()
        if getattr(config, name) != value
    ]
    if config.vocab_size != vocab_size:
        differing.append(
            f"the tokenizer has {vocab_size} tokens and the file {config.vocab_size}: name its own by --tokenizer_path"
        )
    if differing:
        raise WeightsError(f"{base} does not fit this model: {'; '.join(differing)}")
    for name in MODEL_FLAGS:
        setattr(args, name, getattr(config, name))
    return config


def chat_command(args: argparse.Namespace, stage: str, *more: str) -> str:
    """Return the command that talks to the weights of a stage, ready to paste."""
    command = ["python", os.path.relpath(ROOT / "eval_model.py"), "--model_mode", str(STAGES[stage].mode)]
    if args.out_dir != ROOT / "out":
        command += ["--out_dir", str(args.out_dir)]
    if args.tokenizer_path != ROOT / "model":
        command += ["--tokenizer_path", str(args.tokenizer_path)]
    command += ["--hidden_size", str(args.hidden_size)] + ["--use_moe"] * args.use_moe
    return shlex.join([*command, *more])


def out_of_memory(error: RuntimeError) -> str:
    """Return the message for an error about memory, with its cure; "" for any other error."""
    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
        return ""
    reason = str(error).strip().splitlines()[0]
    return f"{reason} Lower --batch_size and raise --accumulation_steps as much, or give --gradient_checkpointing"


def run_script(main: Callable[..., None], argv: list[str] | None = None) -> None:
    """Run a script's main, or its --estimate. Show a user's mistake as a message without a traceback.

    The main process shows what all processes found. The others wait a little before they speak, because a launcher
    ends them together with the main one.
    """
    set_up_streams()
    try:
        run_or_estimate(main, argv)
    except (ValueError, OSError, FloatingPointError) as error:
        message = str(error)
    except RuntimeError as error:
        message = lost_process(error) or out_of_memory(error)
        if not message:
            raise
    except KeyboardInterrupt:  # before the loop that answers it by saving: there is nothing to save yet
        sys.exit(128 + signal.SIGINT)
    else:
        return
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(LATER_SECONDS)
    sys.exit(f"error: process {rank}: {message}" if rank else f"error: {message}")
