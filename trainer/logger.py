"""What a run shows: log lines, a progress bar on a terminal, the same numbers as JSON lines, and wandb on request."""

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from model.model_minimind import MiniMindConfig
from trainer.distributed import Process, sum_over_ranks, unwrap_model
from trainer.loader import PackedData, plural
from trainer.optimization import Precision
from trainer.tracking import Tracker


def flops_per_token(config: MiniMindConfig, parameters: int, frozen: int = 0) -> float:
    """Floating-point operations of forward and backward per token in the weights: 6 per active parameter.

    frozen: how many of the parameters are not trained; they need no gradient of their own and cost 4. A routed expert
    that a token does not visit costs nothing. The embedding is tied to the head and counts once.
    """
    idle = 0
    if config.use_moe:
        idle = config.n_routed_experts - config.num_experts_per_tok
        idle *= config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    return 6 * (parameters - idle) - 2 * (frozen - idle if frozen else 0)


def attention_flops(config: MiniMindConfig, positions_seen: int) -> float:
    """Forward and backward of causal attention: 12 · hidden · layers for every (token, position it sees) pair."""
    return 12 * config.hidden_size * config.num_hidden_layers * positions_seen


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers in all weights, and in those that are frozen."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ZeRO-3 empties them
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if not trained)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """The best rate of a large square matrix product on this device: what MFU is measured against."""
    size = size or (8192 if device.type == "cuda" else 2048)
    own_generator = torch.Generator(device)  # the run's random numbers are not to depend on this
    a = torch.randn(size, size, device=device, generator=own_generator).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass
class StepCounts:
    """Of one optimizer step: real tokens, positions with padding, (token, position it attends to) pairs."""

    tokens: float
    positions: float
    attended: float


def step_counts(micro_batches: list[dict], process: Process) -> StepCounts:
    """Added up over the step's micro-batches on all processes."""
    tokens = sum(batch["real_tokens"] for batch in micro_batches)
    positions = sum(batch["input_ids"].numel() for batch in micro_batches)
    attended = sum(batch["attended"] for batch in micro_batches)
    return StepCounts(*sum_over_ranks([tokens, positions, attended], process))


@dataclass
class Progress:
    """How far a run is; part of its resume state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens seen by all processes
    complete: bool = False

    def advance(self, micro_batches: list[dict], total_steps: int, process: Process) -> StepCounts:
        """Another optimizer step is done; returns what it took, all processes together."""
        counts = step_counts(micro_batches, process)
        self.step += 1
        self.tokens += int(counts.tokens)
        self.complete = self.step >= total_steps
        return counts

    def due(self, interval: int) -> bool:
        """Every `interval` steps and after the last one."""
        return self.complete or self.step % interval == 0


class Logger:
    """Numbers of one run. Only the main process prints and writes."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        process: Process,
        model: nn.Module,
        data: PackedData,
        first_step: int,
        precision: Precision,
    ):
        self.args, self.process = args, process
        self.config = unwrap_model(model).config
        self.parameters, self.frozen = count_parameters(model)
        self.first_step, self.total_steps, self.steps_per_epoch = first_step, data.total_steps, data.steps_per_epoch
        self.file, self.tracker, self.bar_shown = None, None, False
        self.terminal = process.is_main and sys.stderr.isatty()
        self.peak = matmul_flops_per_second(process.device, precision.dtype) * process.world_size
        if process.is_main:
            self._open(name)
            if first_step < self.total_steps:  # else a complete run was resumed, and nothing is about to happen
                self._introduce(data, precision)
        self.started = time.perf_counter()
        self._clear_interval()

    def _open(self, name: str) -> None:
        args = self.args
        path = Path(args.out_dir) / "logs" / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error}; choose another --out_dir") from error
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        start = {"event": "start", "run": name, "time": time.time(), "first_step": self.first_step}
        self.record(start | {"total_steps": self.total_steps, "flags": flags, "versions": versions()})
        if args.use_wandb:
            run_name = (
                f"MiniMind-{name}-Epoch-{args.epochs}-BatchSize-{args.batch_size}-LearningRate-{args.learning_rate}"
            )
            self.tracker = Tracker(args, run_name, flags)

    def _introduce(self, data: PackedData, precision: Precision) -> None:
        """What is about to happen, in four lines."""
        args, config = self.args, self.config
        kind = "mixture of experts" if config.use_moe else "dense"
        rows = args.batch_size * args.accumulation_steps * self.process.world_size
        size = f"{plural(config.num_hidden_layers, 'layer')} of {config.hidden_size}"
        self.say(f"{self.parameters / 1e6:.2f}M parameters, {kind}, {size}")
        self.say(data.describe())
        self.say(
            f"{plural(self.total_steps, 'step')} of {plural(rows, 'row')} ({args.batch_size} × "
            f"{plural(args.accumulation_steps, 'micro-batch')} × {plural(self.process.world_size, 'process')}) "
            f"on {self.process.device} in {precision.name}"
        )
        if data.plan.num_rows < rows:
            advice = "for so little data lower --batch_size or --accumulation_steps"
            self.say(f"note: one step takes {plural(rows, 'row')}; {advice}")
        if precision.notice:
            self.say(f"note: {precision.notice}")

    def _clear_interval(self) -> None:
        self.sums = {"loss": 0.0, "steps": 0, "tokens": 0.0, "positions": 0.0, "attended": 0.0}
        self.more: dict[str, float] = {}
        self.interval_started, self.paused = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Evaluating and saving are not training: they do not count in tokens per second."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def step(self, step: int, loss: float, lr: float, grad_norm: float, counts: "StepCounts", **more) -> None:
        """One optimizer step, numbers of all processes together. `more`: further means to log, such as aux_loss."""
        for name, value in (("loss", loss), ("steps", 1), *vars(counts).items()):
            self.sums[name] += value
        for name, value in more.items():
            self.more[name] = self.more.get(name, 0.0) + value
        done = step + 1
        if not self.process.is_main or (done % self.args.log_interval and done != self.total_steps):
            if self.process.is_main and self.terminal:
                self._draw_bar(done, loss)
            return
        sums, seconds = self.sums, max(time.perf_counter() - self.interval_started - self.paused, 1e-9)
        flops = flops_per_token(self.config, self.parameters, self.frozen) * sums["tokens"]
        flops += attention_flops(self.config, sums["attended"])
        epoch, epoch_step = divmod(step, self.steps_per_epoch)
        epoch_steps = min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)
        minutes = seconds / sums["steps"] * (epoch_steps - epoch_step - 1) / 60
        metrics = {
            "step": done,
            "epoch": epoch + 1,
            "loss": sums["loss"] / sums["steps"],
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": sums["tokens"] / seconds,
            "mfu": flops / seconds / self.peak,
            "padding": 1 - sums["tokens"] / sums["positions"],
        }
        means = {name: value / sums["steps"] for name, value in self.more.items()}
        metrics |= means
        shown = "".join(f", {name} {value:.4f}" for name, value in means.items() if name != "aux_loss" or value)
        self.say(
            f"Epoch:[{epoch + 1}/{self.args.epochs}]({epoch_step + 1}/{epoch_steps}) "
            f"loss:{metrics['loss']:.4f} lr:{lr:.3e} epoch_Time:{minutes:.1f}min | "
            f"{metrics['tokens_per_second']:,.0f} tokens/s, MFU {metrics['mfu']:.0%}, "
            f"grad_norm {grad_norm:.2f}, padding {metrics['padding']:.1%}{shown}"
        )
        self.record({"event": "step", **metrics})
        self._clear_interval()

    def _draw_bar(self, done: int, loss: float) -> None:
        seconds = (time.perf_counter() - self.started) / (done - self.first_step) * (self.total_steps - done)
        share = done / self.total_steps
        bar = "#" * int(24 * share)
        print(
            f"\r\x1b[K[{bar:.<24}] {done}/{self.total_steps} loss:{loss:.4f} {seconds / 60:.1f} min left",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip
        self.bar_shown = True

    def evaluation(self, step: int, metrics: dict, sample: str = "") -> None:
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        if metrics:
            self.say(f"step {step} held out: {numbers}")
        if sample:
            self.say(f"step {step} sample: {sample}")
        self.record({"event": "evaluation", "step": step, **metrics, "sample": sample})

    def say(self, text: str) -> None:
        if self.process.is_main:
            if self.bar_shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
                self.bar_shown = False
            print(text, flush=True)

    def record(self, content: dict) -> None:
        """One JSON line in out/logs/, and the same to wandb."""
        if self.file is None:
            return
        self.file.write(json.dumps(content, ensure_ascii=False) + "\n")
        self.file.flush()
        if self.tracker and content["event"] in ("step", "evaluation"):
            prefix = "valid/" if content["event"] == "evaluation" else ""
            values = {prefix + k: v for k, v in content.items() if k not in ("event", "step") and v != ""}
            self.tracker.log(values, content["step"])

    def close(self, weights: Path, progress: Progress, next_command: str) -> None:
        """Says what the run left behind and what comes next."""
        if progress.complete:
            self.say(f"{weights} is ready; next: {next_command}")
        else:
            self.say(f"stopped after step {progress.step}; saved {weights}. To go on: the same command with --resume")
        if self.file is not None:
            self.file.close()
        if self.tracker:
            self.tracker.finish(progress.complete, weights=str(weights), steps=progress.step, tokens=progress.tokens)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
