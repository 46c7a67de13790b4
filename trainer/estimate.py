"""--estimate: time, memory and cost of a run, before anything is spent.

The stage runs as always, with its own flags and data, but in its own process and output folder. After some steps it is
stopped the way Ctrl-C stops it, its log is read and extrapolated, and the folder is deleted; what it put into
--cache_dir serves the real run. The time on other cards is computed from the counted operations at a share of the peak
that is assumed, not measured: see assumed_mfu and CARDS. A later run with the same flags says at its end how far off
the estimate was.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.device import has_own_memory, named_device
from model.flags import add_boolean
from model.model_minimind import HAS_VARLEN, MiniMindConfig
from model.weights import write_json
from trainer.cost import Memory, activation_bytes, attention_backward_bytes
from trainer.distributed import LAUNCHED
from trainer.loader import plural
from trainer.tracking import SERVICES

STEPS = {False: 5, True: 21}  # least steps of the short run without and with a GPU; the first one is not timed
SECONDS = 10  # it also lasts at least this long; passes of a frozen model stop after this time
# flags that change neither the result of a run nor time and memory of its steps
IRRELEVANT = {
    "resume", "log_interval", "save_interval", "eval_interval", "eval_samples", "use_wandb", "use_swanlab",
    "use_tensorboard", "wandb_project", "out_dir", "cache_dir",
    "valid_path", "sample_prompt", "overwrite", "save_peft", "estimate", "price_per_hour", "local_rank", "ddp",
    "pass_seconds", "rank_timeout", "given", "changed",
}  # fmt: skip
CONTEXT_BYTES = 0.8e9  # CUDA, its libraries and the allocator's fragmentation


# --- the short run ---------------------------------------------------------------------------------------------------


def run_or_estimate(main: Callable[..., None], argv: list[str] | None = None) -> None:
    """Call a script's main(argv), or with --estimate print what it would take."""
    if any(word.split("=")[0] == "--estimate" for word in (sys.argv if argv is None else argv)):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_boolean(parser, "--estimate", False, "")
        parser.add_argument("--price_per_hour", type=float)
        parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parents[1] / "out")
        parser.add_argument("--cache_dir", type=Path)
        args, rest = parser.parse_known_args(argv)
        if args.estimate:
            estimate(main, args, rest)
            return
    main(*([] if argv is None else [argv]))


def estimate(main: Callable, args: argparse.Namespace, rest: list[str]) -> None:
    """Print what main would take, and keep it for the comparison after the real run. rest: the stage's other flags."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the short run must not outlive this
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=args.out_dir, prefix=".estimate-")
    except OSError as error:
        raise ValueError(f"cannot write to --out_dir {args.out_dir}: {error}") from error
    with scratch as name:
        log = short_run(Path(name), main, args, rest)
        if int(os.environ.get("RANK", 0)):
            return
        found, saved = Estimate(log, args.price_per_hour), {}
        for what, suffix in (("weights", "pth"), ("resume", "resume")):
            files = Path(name).rglob(f"*.{suffix}")
            saved[what] = sum(path.stat().st_size for path in files if not path.is_symlink())
        print(found.report(saved))
        write_json(args.out_dir / "logs" / f"{log[0]['run']}.estimate.json", found.record())


def short_run(folder: Path, main: Callable, args: argparse.Namespace, rest: list[str]) -> list[dict]:
    """Run main's script in `folder` until its log holds enough steps; return the log."""
    for path in [*args.out_dir.glob("*.pth"), *args.out_dir.glob("*.json")]:  # weights to start from
        try:
            (folder / path.name).symlink_to(path.absolute())
        except OSError:  # Windows lets few users make links
            shutil.copy(path, folder)
    command = [sys.executable, sys.modules[main.__module__].__file__, *rest, f"--out_dir={folder}"]
    command += [f"--cache_dir={args.cache_dir or args.out_dir / 'token_cache'}", f"--pass_seconds={SECONDS}"]
    command += [f"--{name}_interval={sys.maxsize}" for name in ("save", "eval")]
    command += ["--log_interval=1", "--resume=false"]
    command += [f"--{service.flag}=false" for service in SERVICES]
    print(f"a short run of at least {STEPS[False]} steps and {SECONDS} seconds; no weights of it are kept", flush=True)
    stopped, shown = False, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {LAUNCHED: "1"}) as child:
        try:
            while child.poll() is None:
                time.sleep(0.1)
                start, *later = read_log(folder) or [None]
                steps = [line for line in later if line["event"] == "step"]
                if start is None or stopped:
                    continue
                wanted = STEPS[has_own_memory(named_device(start["device"]))]
                if len(steps) >= wanted and steps[-1]["seconds"] - steps[0]["seconds"] >= SECONDS:
                    child.terminate()
                    stopped = True
                elif shown <= len(steps) < wanted:
                    shown = len(steps) + 1
                    print(f"timing step {shown} of {wanted}", flush=True)
        finally:
            child.kill()  # Ctrl-C: at once
    if child.returncode not in (0, 128 + signal.SIGTERM) and not stopped:
        sys.exit(child.returncode)  # it has said why
    return read_log(folder)


def read_log(folder: Path) -> list[dict]:
    """Return the lines of the only log in an output folder; [] if there is none yet."""
    logs = [*folder.glob("logs/**/*.jsonl")]
    *lines, _ = logs[0].read_text("utf-8").split("\n") if logs else [""]  # the last is not complete
    return [json.loads(line) for line in lines]


# --- what its log tells ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """Peak rate of dense bfloat16 products with float32 sums (from data sheets), memory, and hourly price.

    Prices in US dollars are round numbers of 2026: for A100, H100 and H200 the on-demand offers of specialised
    providers listed at https://www.mercatus-ai.com/blog/cloud-gpu-pricing; for consumer cards a guess.
    """

    name: str
    teraflops: float
    gigabytes: float
    dollars: float
    count: int = 1


CARDS = (
    Card("RTX 3090", 71, 24, 0.25),
    Card("RTX 4090", 165, 24, 0.50),
    Card("A100 80GB", 312, 80, 1.30),
    Card("H100 SXM", 989, 80, 3.00),
    Card("H200", 989, 141, 4.00),
    Card("8 × RTX 4090", 165, 24, 0.50, 8),
    Card("8 × H100 SXM", 989, 80, 3.00, 8),
)


def assumed_mfu(config: MiniMindConfig, cards: int) -> float:
    """Return the share of the peak that training is assumed to reach.

    30 % at width 512, proportionally less below, 45 % from 768 on; several cards in one machine lose a tenth.
    """
    width = config.hidden_size
    share = 0.30 * min(width / 512, 1) + 0.15 * min(max((width - 512) / 256, 0), 1)
    return share * (0.9 if cards > 1 else 1.0)


class Estimate:
    """What a whole run takes, from the log of a short one."""

    def __init__(self, log: list[dict], price_per_hour: float | None = None):
        self.start, self.price_per_hour = log[0], price_per_hour
        self.steps = steps = [line for line in log if line["event"] == "step"]
        self.flags, self.bytes = self.start["flags"], dict(self.start["bytes"])
        self.config = MiniMindConfig(**self.start["config"])
        self.total_steps, self.passes = self.start["total_steps"], sum(self.start["passes"].values())

        def gains(name: str) -> np.ndarray:
            return np.diff([float(line[name]) for line in steps], prepend=0)

        seconds, processor, self.tokens = gains("seconds"), gains("processor_seconds"), gains("tokens")
        # the first step compiles and fills caches; on a GPU a later one may compile for pairs that take more rows
        timed = seconds <= 5 * np.median(seconds[1:] if len(steps) > 1 else seconds)
        timed[0] = len(steps) == 1
        self.tokens_per_step = self.start.get("tokens_per_step") or self.tokens[timed].mean()  # unknown for GRPO
        # the run's mean step relative to the timed ones, in which GRPO may have learned from nothing
        larger = self.tokens_per_step / self.tokens[timed].mean() if self.tokens[timed].any() else 1.0
        # a step always has the same number of packed rows; pairs take as many rows as they need
        longer = larger if self.start["kind"] == "preference" else 1.0
        self.timed, self.spread = len(seconds[timed]), seconds[timed].std() / seconds[timed].mean()
        self.step_seconds, self.processor = seconds[timed].mean() * longer, processor[timed].mean() * longer
        self.compiling = np.maximum(seconds[~timed] - self.step_seconds, 0).sum()
        self.first_processor = processor[0]
        flops = np.array([line["mfu"] * line["seconds_per_step"] for line in steps])
        self.flops = flops[timed].mean() * self.start["peak_flops_per_second"] * larger
        untaught = self.tokens_per_step - self.start.get("targets_per_step", self.tokens_per_step)
        self.flops += self.start.get("skipped_flops", 0) * untaught  # a GPU computes their logits
        self.seconds = self.passes + self.total_steps * self.step_seconds + self.compiling
        self.to_come, self.cached = 0, []
        if "cache" in self.start:
            self.cached = [(path, path.stat().st_size) for path in Path(self.start["cache"]).glob("*")]
        # elsewhere the rest of the token file will be mapped too
        if self.cached and not has_own_memory(named_device(self.start["device"])):
            whole = sum(size for path, size in self.cached if path.suffix == ".bin")
            read, share = (min(n / self.start["steps_per_epoch"], 1) for n in (len(steps), self.total_steps))
            self.bytes["tokens"], self.to_come = int(share * whole), int((share - read) * whole)
        self.memory = max(line["peak_memory_bytes"] for line in log if "peak_memory_bytes" in line) + self.to_come

    def record(self) -> dict:
        """Return what a comparison with the real run needs."""
        return {
            "seconds": self.seconds, "bytes": self.memory, "step": self.step_seconds, "steps": self.total_steps,
            "timed": self.timed, "processor": (self.first_processor, self.processor), "to_come": self.to_come,
            "flags": relevant_flags(self.start),
        }  # fmt: skip

    def report(self, saved: dict[str, int]) -> str:
        """Return the estimate as text. saved: bytes of the files that the short run wrote."""
        steps, start, tokens = self.total_steps, self.start, self.tokens_per_step
        timed = f"± {self.spread:.0%} ({self.timed} timed)" if self.timed > 1 else "(one timed: no spread is known)"
        epochs = f" ({plural(self.flags['epochs'], 'epoch')})" * (self.flags["epochs"] > 1)
        price = ""
        if self.price_per_hour is not None:
            cost = self.seconds / 3600 * self.price_per_hour
            price = f", ${cost:,.2f} at ${self.price_per_hour:g} an hour"
        used, total = self.memory, Memory(start["device"]).total()
        parts = self.bytes | {"activations, libraries and the rest": max(used - sum(self.bytes.values()), 0)}
        on_disk = {"tokens": sum(size for _, size in self.cached), **start["stores"], **saved}
        trained = start["parameters"] - start["frozen"]
        lines = [
            f"{start['parameters'] / 1e6:.2f}M parameters, {trained / 1e6:.2f}M of them trained",
            f"{tokens * steps / 1e6:,.1f}M tokens in {plural(steps, 'step')}, {tokens:,.0f} tokens a step{epochs}",
            "",
            f"this machine ({start['device']}, {plural(start['processes'], 'process')} of "
            f"{plural(start['threads'], 'thread')})",
            f"  {self.step_seconds:.3g} s a step {timed}, {tokens / self.step_seconds:,.0f} tokens/s",
            *(f"  before training: {title}, {duration(seconds)}" for title, seconds in start["passes"].items()),
            f"  {duration(self.seconds)}{price}, without evaluations and saving",
            f"  memory: {gigabytes(used)}{f' of {gigabytes(total)}' if total else ''} a process: {listed(parts)}",
            f"  disk: {listed(on_disk)}",
        ]
        if total and used > 0.9 * total:
            lines.append("  that is nearly all memory: lower --batch_size and raise --accumulation_steps as much")
        if start["kind"] != "rollouts":  # sampling answers takes most of the time, and its operations are not counted
            lines += [
                "",
                f"other cards, computed, not measured: {assumed_mfu(self.config, 1):.0%} of the peak is assumed",
                f"  {'':14}{'memory':>16}{'time':>12}{'cost':>10}",
                *self.card_lines(),
            ]
        return "\n".join(lines)

    # --- other cards -------------------------------------------------------------------------------------------------

    def card_lines(self) -> list[str]:
        lines, slower = [], 1 + self.passes / (self.total_steps * self.step_seconds)
        for card in CARDS:
            speed = card.count * card.teraflops * 1e12 * assumed_mfu(self.config, card.count)
            seconds = slower * self.flops * self.total_steps / speed
            needed, room = self.bytes_on_a_card(self.flags["batch_size"]), 0.95 * card.gigabytes * 1e9
            advice = f"  does not fit: {self._cure(room)}" if needed > room else ""
            cost = seconds / 3600 * card.count * card.dollars
            lines.append(
                f"  {card.name:14}{f'{gigabytes(needed)} of {card.gigabytes:g}':>16}{duration(seconds):>12}"
                f"{f'${cost:,.2f}' if cost >= 0.01 else '< $0.01':>10}{advice}"
            )
        return lines

    def bytes_on_a_card(self, batch_size: int, checkpointing: bool = False) -> float:
        """Return the highest memory of training with CUDA and this batch size, computed."""
        flags, parts = self.flags, self.bytes
        checkpointing = checkpointing or flags["gradient_checkpointing"]
        size = 4 if flags["dtype"] == "float32" else 2
        whole_head = "teacher" not in parts  # distillation computes its loss in chunks that are not kept
        positions = flags["max_seq_len"] * self.rows * batch_size / flags["batch_size"]
        activations = activation_bytes(self.config, positions, checkpointing, size, whole_head)
        activations += parts["weights"] // 2 if size == 2 else 0  # autocast's copies
        if HAS_VARLEN and size == 2:
            activations += attention_backward_bytes(self.config, positions, self.borders(batch_size))
        kept = sum(parts.get(name, 0) for name in ("weights", "optimizer state", "teacher"))
        # a micro-batch frees activations as it adds gradients; gradients of earlier micro-batches are there throughout
        alone = flags["accumulation_steps"] == 1 and self.start["processes"] == 1
        step = max(parts["gradients"], activations) if alone else parts["gradients"] + activations
        return kept + step + CONTEXT_BYTES

    @property
    def rows(self) -> int:
        """Rows of a micro-batch.

        Pairs take as many as they need: the most seen so far, rounded up to a multiple of --batch_size as on a GPU.
        """
        flags, batch_size = self.flags, self.flags["batch_size"]
        if self.start["kind"] != "preference":
            return batch_size
        positions = max(tokens / (1 - line["padding"]) for tokens, line in zip(self.tokens, self.steps, strict=True))
        most = positions / (flags["accumulation_steps"] * self.start["processes"] * flags["max_seq_len"])
        return -(-math.ceil(most - 1e-6) // batch_size) * batch_size

    def borders(self, batch_size: int) -> int:
        """Return how many ends of documents a GPU's micro-batch has room for: see dataset/packing.py."""
        if self.start["kind"] == "preference":
            return 5 * batch_size - 1
        return batch_size * (self.start["segments_per_row"] + 1)

    def _cure(self, room: float) -> str:
        """Return flags that make it fit into `room` bytes with the same optimizer step, or other advice."""
        flags = self.flags
        whole = flags["batch_size"] * flags["accumulation_steps"]
        for checkpointing in (False, True)[flags["gradient_checkpointing"] :]:
            for rows in range(flags["batch_size"], 0, -1):
                if whole % rows == 0 and self.bytes_on_a_card(rows, checkpointing) <= room:
                    more = " --gradient_checkpointing" * (checkpointing and not flags["gradient_checkpointing"])
                    return f"--batch_size {rows} --accumulation_steps {whole // rows}{more}"
        return "use a smaller model, --zero_stage 3 on several cards, or a lower --max_seq_len"


# --- after the real run ----------------------------------------------------------------------------------------------


def relevant_flags(start: dict) -> dict[str, str]:
    """Return what two runs must share to take the same time and memory, from the first line of a log."""
    flags = {name: str(value) for name, value in start["flags"].items() if name not in IRRELEVANT}
    return flags | {name: str(start[name]) for name in ("processes", "threads")}


def compared(path: Path, start: dict, seconds: float, peak: float) -> str:
    """Say how far off an earlier --estimate of this very run was; "" if there was none."""
    try:
        estimate = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    if estimate.get("flags") != relevant_flags(start):
        return ""
    off = seconds / estimate["seconds"] - 1, peak / estimate["bytes"] - 1
    return (
        f"estimated: {duration(estimate['seconds'])}, {gigabytes(estimate['bytes'])}; it took {duration(seconds)} "
        f"({off[0]:+.0%}) and {gigabytes(peak)} ({off[1]:+.0%})"
    )


def listed(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items())


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
