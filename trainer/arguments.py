"""Flags that every stage has. Each stage passes its own defaults and adds its own flags."""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import DistError

from dataset.token_cache import MAX_RECORD_BYTES
from model.flags import add_boolean, show_defaults, utf8, utf8_path
from model.model_minimind import PRESETS, MiniMindConfig
from trainer.tracking import tracking_mistakes
from trainer.zero import zero_mistakes

ROOT = Path(__file__).resolve().parents[1]

LATER_SECONDS = 3  # how long other processes leave it to the first one to show an error
# what gloo says when a process at the other end is gone
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")

MODEL_FLAGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "use_moe", "qk_norm")
# flags that may change between the parts of a resumed run; a change of any other would change its result
FREE_ON_RESUME = {
    "resume", "log_interval", "save_interval", "eval_interval", "num_workers", "use_wandb", "wandb_project", "out_dir",
    "cache_dir", "device", "ddp", "local_rank", "valid_path", "sample_prompt", "compile", "overwrite", "batch_size",
    "accumulation_steps", "gradient_checkpointing", "save_peft", "base_weight", "reference_weight", "teacher_weight",
    "deepspeed_config", "estimate", "price_per_hour", "max_record_bytes",
}  # fmt: skip


class PerOptimizer(dict):
    """A default for each --optimizer, shown in words by --help."""

    def __str__(self) -> str:
        return ", ".join(f"{value:g} with {optimizer}" for optimizer, value in self.items())


def from_root(path: str | Path) -> Path:
    """Path defaults are anchored on the repository root, so that a script does the same from any folder."""
    return ROOT / path


def stage_parser(description: str, **defaults) -> argparse.ArgumentParser:
    """The flags shared by all stages. `defaults` sets what differs between them (data_path, batch_size, ...).

    Some are given for each optimizer; the first of learning_rate is the one that the stage takes by itself.
    """
    defaults = {"learning_rate": {"adamw": 5e-4}} | defaults
    defaults = {name: PerOptimizer(value) if isinstance(value, dict) else value for name, value in defaults.items()}
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument

    group = parser.add_argument_group("data and output").add_argument
    group("--data_path", type=utf8_path, help="training data, jsonl (default: %(default)s)")
    group(
        "--valid_path",
        type=utf8_path,
        help="held-out data of the same kind: loss and bits per byte every --eval_interval",
    )
    group("--tokenizer_path", type=utf8_path, default=from_root("model"), help="folder with tokenizer.json")
    group("--out_dir", type=utf8_path, default=from_root("out"), help="weights, logs and resume states (default: out/)")
    group("--cache_dir", type=utf8_path, help="tokenised data (default: OUT_DIR/token_cache)")
    add_boolean(parser, "--skip_bad_lines", False, "drop and count lines that are no valid record, instead of stopping")
    group("--max_record_bytes", type=int, default=MAX_RECORD_BYTES, help="a longer line is a bad one (default: 16 MiB)")
    add_boolean(parser, "--overwrite", False, "replace weights of another configuration that have the same name")

    group = parser.add_argument_group("model").add_argument
    group("--preset", choices=list(PRESETS), help="a known model; the flags below win (default: minimind2_26m)")
    group("--hidden_size", type=int, help="(default: 512 or the preset's)")
    group("--num_hidden_layers", type=int, help="(default: 8 or the preset's)")
    group("--num_attention_heads", type=int, help="(default: 8)")
    group("--num_key_value_heads", type=int, help="(default: 2 or the preset's)")
    group("--max_seq_len", type=int, default=512, help="positions in a row of packed documents (default: %(default)s)")
    add_boolean(parser, "--use_moe", None, "mixture of experts (default: false or the preset's)")
    add_boolean(parser, "--qk_norm", None, "normalise queries and keys (default: false or the preset's)")

    group = parser.add_argument_group("optimisation").add_argument
    group("--epochs", type=int, default=1)
    group(
        "--max_steps",
        type=int,
        default=0,
        help="stop after this many optimizer steps, schedule included (0: all epochs)",
    )
    group("--batch_size", type=int, default=32, help="rows per process and micro-batch (default: %(default)s)")
    group("--accumulation_steps", type=int, default=1, help="micro-batches per optimizer step (default: %(default)s)")
    group("--learning_rate", type=float, help="peak learning rate (default: %(default)s)")
    group(
        "--embedding_lr_scale",
        type=float,
        default=1.0,
        help="the embedding, which is also the head, learns so many times as fast (default: %(default)s)",
    )
    group(
        "--min_lr_ratio",
        type=float,
        default=0.1,
        help="the cosine ends at this share of the peak (default: %(default)s)",
    )
    group("--warmup_iters", type=int, default=0, help="optimizer steps of linear warm-up (default: %(default)s)")
    group(
        "--optimizer",
        choices=("muon", "adamw", "sgd"),
        help="muon: the matrices inside the blocks, adamw for the rest; under ZeRO only adamw; sgd is for checks "
        f"(default: {next(iter(defaults['learning_rate']))})",
    )
    group("--beta1", type=float, default=0.9)
    group("--beta2", type=float, default=0.95)
    group("--weight_decay", type=float, default=0.1, help="on matrices, not on norms (default: %(default)s)")
    group("--grad_clip", type=float, default=1.0, help="largest gradient norm, 0 = no clipping (default: %(default)s)")
    group("--seed", type=int, default=1337)
    group("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")

    group = parser.add_argument_group("the run").add_argument
    group("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    group("--num_workers", type=int, help="processes that assemble batches (default: 1 on CUDA, 0 on a CPU)")
    group("--log_interval", type=int, default=100, help="optimizer steps between log lines (default: %(default)s)")
    group("--save_interval", type=int, default=100, help="optimizer steps between saves (default: %(default)s)")
    group("--eval_interval", type=int, default=500, help="optimizer steps between evaluations (default: %(default)s)")
    group("--sample_prompt", type=utf8, default="", help="a text that the model continues at every evaluation")
    add_boolean(parser, "--estimate", False, "time a few steps and print what the run will take; no weights are saved")
    group("--price_per_hour", type=float, help="of this machine in dollars, for --estimate")
    add_boolean(parser, "--resume", False, "go on from the last saved state of this run")
    add_boolean(parser, "--compile", None, "torch.compile (default: on with CUDA, off on a CPU)")
    add_boolean(
        parser, "--gradient_checkpointing", False, "recompute activations in the backward pass: less memory, more time"
    )
    group(
        "--zero_stage",
        type=int,
        choices=(0, 1, 2, 3),
        default=0,
        help="DeepSpeed: divide optimizer state (1), gradients too (2), weights too (3) among processes (default: 0)",
    )
    group(
        "--deepspeed_config", type=utf8_path, metavar="FILE", help="JSON settings of DeepSpeed over ours, for experts"
    )
    add_boolean(parser, "--use_wandb", False, "log to Weights & Biases too")
    add("--wandb_project", default="MiniMind")
    add_boolean(parser, "--ddp", None, "accepted because old commands pass it; torchrun alone decides")
    add(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="accepted because launchers pass it; LOCAL_RANK decides",
    )

    unknown = defaults.keys() - {action.dest for action in parser._actions}
    assert not unknown, f"defaults for flags that do not exist: {unknown}"
    parser.set_defaults(**defaults)
    return parser


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, **checks: tuple[Callable, str]
) -> argparse.Namespace:
    """Parses and checks; all mistakes are reported at once, each with its flag.

    checks: for flags of one stage, name -> (whether a value is right, what it must be).
    """
    show_defaults(parser)
    args = parser.parse_args(argv)
    if args.optimizer is None:
        args.optimizer = "adamw" if args.zero_stage else next(iter(parser.get_default("learning_rate")))
    for name, value in vars(args).items():
        if isinstance(value, PerOptimizer):
            setattr(args, name, value.get(args.optimizer, value["adamw"]))
    mistakes = []

    def expect(flag: str, ok: Callable[[float], bool], wanted: str) -> None:
        value = getattr(args, flag)
        if value is not None and not ok(value):
            mistakes.append(f"--{flag} {value}: must be {wanted}")

    chosen = MiniMindConfig(**PRESETS[args.preset or "minimind2_26m"])
    for flag in MODEL_FLAGS:
        if getattr(args, flag) is None:
            setattr(args, flag, getattr(chosen, flag))
    for flag in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        expect(flag, lambda v: v >= 1, "at least 1")
    if not mistakes:
        try:
            model_config(args, chosen.vocab_size)
        except ValueError as error:
            mistakes.append(str(error))
    for flag in ("epochs", "batch_size", "accumulation_steps", "log_interval", "save_interval", "eval_interval"):
        expect(flag, lambda v: v >= 1, "at least 1")
    expect("max_seq_len", lambda v: v >= 2, "at least 2")
    expect("max_record_bytes", lambda v: v >= 1, "at least 1")
    for flag in ("warmup_iters", "max_steps", "num_workers", "weight_decay", "grad_clip", "seed", "price_per_hour"):
        expect(flag, lambda v: v >= 0, "0 or more")
    expect("learning_rate", lambda v: 0 < v < float("inf"), "a number above 0")
    expect("embedding_lr_scale", lambda v: 0 <= v < float("inf"), "0 or more")
    expect("min_lr_ratio", lambda v: 0 <= v <= 1, "between 0 and 1")
    for flag in ("beta1", "beta2"):
        expect(flag, lambda v: 0 <= v < 1, "at least 0 and below 1")
    for flag, (ok, wanted) in checks.items():
        expect(flag, ok, wanted)
    if args.max_seq_len > MiniMindConfig().max_position_embeddings:
        mistakes.append(
            f"--max_seq_len {args.max_seq_len}: the model has {MiniMindConfig().max_position_embeddings} positions"
        )
    try:
        device = torch.device(args.device)
        usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not usable.get(device.type):
            mistakes.append(
                f"--device {args.device}: this machine has no usable {device.type} device; use --device cpu"
            )
    except RuntimeError:
        mistakes.append(f"--device {args.device}: not a device; use cpu, cuda or cuda:N")
    mistakes += zero_mistakes(args) + tracking_mistakes(args)
    if mistakes:
        raise ValueError("; ".join(mistakes))
    args.cache_dir = args.cache_dir or args.out_dir / "token_cache"
    if args.estimate:  # the steps and nothing else
        args.resume = args.use_wandb = False
        args.valid_path, args.sample_prompt = None, ""
        args.log_interval = args.save_interval = args.eval_interval = sys.maxsize
    return args


def model_config(args: argparse.Namespace, vocab_size: int) -> MiniMindConfig:
    """Return the configuration that the flags describe: the preset's, and what was given instead."""
    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    return MiniMindConfig(**{**PRESETS.get(args.preset, {}), **flags, "vocab_size": vocab_size})


def chat_command(args: argparse.Namespace, model_mode: int, *more: str) -> str:
    """The command that talks to what this run made, ready to paste."""
    command = ["python", os.path.relpath(ROOT / "eval_model.py"), "--model_mode", str(model_mode)]
    if args.out_dir != from_root("out"):
        command += ["--out_dir", str(args.out_dir)]
    if args.tokenizer_path != from_root("model"):
        command += ["--tokenizer_path", str(args.tokenizer_path)]
    command += ["--hidden_size", str(args.hidden_size)] + ["--use_moe"] * args.use_moe
    return shlex.join([*command, *more])


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; a mistake of the user's is shown as a message, not as a traceback.

    Among several processes the first one shows what all of them found; another one speaks when it is still there after
    a while, for a launcher ends it together with the first.
    """
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        message = str(error)
    except RuntimeError as error:
        if not isinstance(error, DistError) and not any(sign in str(error) for sign in LOST_PROCESS):
            raise
        message = (
            "another process of this job has ended, and this one cannot go on alone; what it said stands above, if it "
            f"could say something. Start again with --resume to go on from the last save ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})"
        )
    except KeyboardInterrupt:  # before the loop that answers it by saving: there is nothing to save yet
        sys.exit(128 + signal.SIGINT)
    else:
        return
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(LATER_SECONDS)
    sys.exit(f"error: process {rank}: {message}" if rank else f"error: {message}")
