"""Log lines, a progress bar, the same numbers as JSON lines in out/logs/, and trackers.

Only the main process prints and writes. Nothing in here ends a run: whatever cannot be shown or written is left out.
"""

import argparse
import contextlib
import shutil
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from dataset.progress import ProgressBar
from trainer.checkpoint import Progress, versions
from trainer.cost import (
    Memory,
    attention_flops,
    count_parameters,
    flops_per_token,
    head_flops,
    matmul_flops_per_second,
    memory_parts,
)
from trainer.distributed import between_steps
from trainer.estimate import compared
from trainer.loader import plural
from trainer.tracking import JsonLines, Tracker, chosen, grouped
from trainer.training import Training


class Logger:
    """The numbers of one run."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        training: Training,
        data: Any,
        progress: Progress,
        teacher: nn.Module | None = None,
        head_of_targets: bool = False,
    ):
        """data: a PackedData, or train_grpo's Sampler. For MFU: teacher, a frozen model that runs in every step, and
        head_of_targets, whether a GPU too skips the logits of tokens without a target, as a CPU always does."""
        self.name, self.args, self.process, self.data = name, args, training.process, data
        self.progress, self.first_step, self.total_steps = progress, progress.step, data.total_steps
        self.config, self.file, self.trackers = training.model.config, None, []
        parameters, frozen = count_parameters(training.model)
        self.flops_per_token = flops_per_token(self.config, parameters, frozen)
        skips = head_of_targets or self.process.device.type == "cpu"
        self.skipped = head_flops(training.model) if skips else 0  # operations, of each token without a target
        self.attention = [(self.config, 1.0)]
        parts = memory_parts(training.model, args, self.process.world_size)
        if teacher is not None:
            parts["teacher"] = sum(p.nbytes for p in teacher.parameters())
            self.flops_per_token += flops_per_token(teacher.config, count_parameters(teacher)[0]) / 3
            self.skipped += head_flops(teacher) / 2  # frozen, and forward only
            self.attention.append((teacher.config, 1 / 3))
        self.peak = matmul_flops_per_second(self.process.device, training.precision.dtype) * self.process.world_size
        going_on = self.process.is_main and self.first_step < self.total_steps  # else a complete run was resumed
        if self.process.is_main:
            self.file = JsonLines(args.out_dir / "logs" / f"{name}.jsonl")
            skipped = 0 if head_of_targets else self.skipped  # what a GPU computes nevertheless
            self._start({"parameters": parameters, "frozen": frozen, "bytes": parts, "skipped_flops": skipped})
        if going_on:
            self._introduce(parameters, training)
        self.bar = ProgressBar("training", self.total_steps, "steps", done=self.first_step, show=going_on)
        self.memory = Memory(self.process.device)
        self.memory.reset()
        self.recent: deque[float] = deque(maxlen=args.log_interval)  # losses: what the bar shows is their mean
        self.started = _clocks()
        self._start_interval()

    def _start(self, model_sizes: dict) -> None:
        """Record what is about to run, with all that --estimate needs."""
        args, data = self.args, self.data
        self.start = {
            "event": "start", "run": self.name, "first_step": self.first_step, "total_steps": self.total_steps,
            "steps_per_epoch": data.steps_per_epoch, "processes": self.process.world_size,
            "threads": torch.get_num_threads(), "device": str(self.process.device), "peak_flops_per_second": self.peak,
            **model_sizes, **data.facts(), "config": self.config.to_diff_dict(), "versions": versions(),
            "flags": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        }  # fmt: skip
        self.record(self.start)
        title = (
            f"MiniMind-{self.name}-Epoch-{args.epochs}-BatchSize-{args.batch_size}-LearningRate-{args.learning_rate}"
        )
        self.trackers = [Tracker(each, args, title, self.start["flags"], self.first_step) for each in chosen(args)]

    def _introduce(self, parameters: int, training: Training) -> None:
        """Say in a few lines what is about to happen."""
        kind = "mixture of experts" if self.config.use_moe else "dense"
        size = f"{plural(self.config.num_hidden_layers, 'layer')} of {self.config.hidden_size}"
        self.process.say(f"{parameters / 1e6:.2f}M parameters, {kind}, {size}")
        self.process.say(fitted(self.data.describe()))
        self.process.say(f"{self.data.describe_steps()} on {self.process.device} in {training.precision.name}")
        notices = [self.data.notice, training.precision.notice]
        if self.args.warmup_iters >= self.total_steps:
            notices.append(
                f"--warmup_iters {self.args.warmup_iters}: the run has {plural(self.total_steps, 'step')}, so it ends "
                "before the learning rate comes down"
            )
        for notice in filter(None, notices):
            self.process.say(fitted(f"note: {notice}"))

    def _start_interval(self) -> None:
        self.sums = Counter()
        self.interval_started, self.waited = self._seconds()[0], self.data.waited

    def _seconds(self) -> list[float]:
        """Return the seconds of training so far: by the clock, and of this process's processors."""
        return [now - start for now, start in zip(_clocks(), self.started, strict=True)]

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Show what the run does instead of training; its time does not count in tokens per second."""
        self.bar.rename(what)
        before = _clocks()
        try:
            with between_steps():
                yield
        finally:
            self.started = [a + c - b for a, b, c in zip(self.started, before, _clocks(), strict=True)]
            self.bar.rename("training")

    def step(self, step: int, loss: float, lr: float, grad_norm: float, batch: dict, **more: float) -> None:
        """Log an optimizer step: numbers of all processes together. more: further means, such as aux_loss.

        batch: any of its micro-batches. tokens: without padding. positions: with it. attended: (token, token) pairs.
        """
        self.recent.append(loss)
        counts = {name: batch[f"step_{name}"] for name in ("tokens", "positions", "attended", "targets")}
        self.sums.update({"loss": loss, "steps": 1} | counts | more)
        sums, (elapsed, processor) = self.sums, self._seconds()
        seconds = max(elapsed - self.interval_started, 1e-9)
        rate, done = sums["tokens"] / seconds, step + 1
        self.bar.update(note=f"loss {fmean(self.recent):.4f}, {rate:,.0f} tokens/s")
        if not self.process.is_main or (done % self.args.log_interval and done != self.total_steps):
            return
        flops = self.flops_per_token * sums["tokens"] - self.skipped * (sums["tokens"] - sums["targets"])
        flops += sum(share * attention_flops(config, sums["attended"]) for config, share in self.attention)
        means = {name: sums[name] / sums["steps"] for name in ("loss", *more)}
        metrics = {
            "step": done,
            "epoch": step // self.data.steps_per_epoch + 1,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.progress.tokens,
            "tokens_per_second": rate,
            "mfu": flops / seconds / self.peak,
            "padding": 1 - sums["tokens"] / max(sums["positions"], 1),  # GRPO may find nothing to learn from in a step
            "waiting": (self.data.waited - self.waited) / seconds,  # for the loader, of this process
            "seconds": elapsed,
            "seconds_per_step": seconds / sums["steps"],
            "processor_seconds": processor,
            "peak_memory_bytes": self.memory.peak(),
            **means,
        }
        self.say(self._line(step, metrics, means))
        self.record({"event": "step", **metrics})
        self._start_interval()

    def _line(self, step: int, metrics: dict, means: dict[str, float]) -> str:
        epoch, epoch_step = divmod(step, self.data.steps_per_epoch)
        epoch_steps = min(self.data.steps_per_epoch, self.total_steps - step + epoch_step)
        minutes = metrics["seconds_per_step"] * (epoch_steps - epoch_step - 1) / 60
        left = metrics["seconds_per_step"] * (self.total_steps - step - 1)
        shown = [f"{k} {v:.4f}" for k, v in means.items() if k != "loss" and (k != "aux_loss" or v)]
        line = ", ".join(
            [
                f"Epoch:[{epoch + 1}/{self.args.epochs}]({epoch_step + 1}/{epoch_steps}) loss:{metrics['loss']:.4f} "
                f"lr:{metrics['lr']:.3e} epoch_Time:{minutes:.1f}min | {metrics['tokens_per_second']:,.0f} tokens/s",
                f"MFU {metrics['mfu']:.0%}, grad_norm {metrics['grad_norm']:.2f}, padding {metrics['padding']:.1%}",
                f"waiting {metrics['waiting']:.1%}",
                *shown,
                f"{hours(metrics['seconds'])} gone, {hours(left)} left",
            ]
        )
        return fitted(line)

    def evaluation(self, step: int, metrics: dict, sample: str = "") -> None:
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        if metrics:
            self.say(f"step {step} held out: {numbers}")
        if sample:
            self.say(f"step {step} sample: {sample}")
        self.record({"event": "evaluation", "step": step, **metrics, "sample": sample})

    def say(self, text: str) -> None:
        self.bar.clear()
        self.process.say(text)

    def record(self, content: dict) -> None:
        """Append one JSON line to out/logs/, and send its numbers to the trackers."""
        if self.file is None:
            return
        if trouble := self.file.write({"time": time.time(), **content}):
            self.say(trouble)
        if content["event"] in ("step", "evaluation"):
            for tracker in self.trackers:
                tracker.log(grouped(content), content["step"])

    def close(self, weights: Path, progress: Progress, next_command: str) -> None:
        """Say what the run left behind and what comes next."""
        self.bar.close()
        seconds, processor = self._seconds()
        end = {
            "seconds": seconds + sum(self.data.passes.values()),
            "peak_memory_bytes": self.memory.peak(),
            "processor_seconds": processor,
        }
        self.record({"event": "end", "step": progress.step, **end})
        if progress.complete and self.first_step == 0 and self.process.is_main:
            estimate = self.args.out_dir / "logs" / f"{self.name}.estimate.json"
            if off := compared(estimate, self.start, end["seconds"], end["peak_memory_bytes"]):
                self.say(off)
        if progress.complete:
            self.say(f"{weights} is ready; next: {next_command}")
        elif not progress.step:
            self.say("stopped in the first step, so there is nothing to save")
        else:
            self.say(f"stopped after step {progress.step}; saved {weights}. To go on: the same command with --resume")
        for tracker in self.trackers:
            tracker.finish(progress.complete, weights=str(weights), steps=progress.step, tokens=progress.tokens)


def fitted(line: str) -> str:
    """Return a line as a terminal shows it without breaking words. A file keeps it whole."""
    if not sys.stdout.isatty():
        return line
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def hours(seconds: float) -> str:
    """Return 3:07 for three hours and seven minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02}"
