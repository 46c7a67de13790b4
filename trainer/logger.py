"""What a run shows: log lines, a progress bar on a terminal, the same numbers as JSON lines, and wandb on request."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from trainer.checkpoint import Progress, StepCounts, versions
from trainer.cost import Memory, attention_flops, count_parameters, flops_per_token, matmul_flops_per_second
from trainer.estimate import Calibration, compared
from trainer.loader import PackedData, plural
from trainer.optimization import Precision
from trainer.tracking import Tracker
from trainer.training import Training


class Logger:
    """Numbers of one run. Only the main process prints and writes."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        training: Training,
        data: PackedData,
        progress: Progress,
        teacher: nn.Module | None = None,
    ):
        """teacher: a frozen model whose forward is part of every step; its operations count in MFU."""
        self.name, self.args, self.process = name, args, training.process
        process, model, precision, first_step = training.process, training.model, training.precision, progress.step
        self.config = model.config
        self.parameters, self.frozen = count_parameters(model)
        self.first_step, self.total_steps, self.steps_per_epoch = first_step, data.total_steps, data.steps_per_epoch
        self.file, self.tracker, self.bar_shown = None, None, False
        self.terminal = process.is_main and sys.stderr.isatty()
        self.flops_per_token = flops_per_token(self.config, self.parameters, self.frozen)
        if teacher is not None:
            self.flops_per_token += flops_per_token(teacher.config, count_parameters(teacher)[0]) / 3
        self.peak = matmul_flops_per_second(process.device, precision.dtype) * process.world_size
        self.calibration = Calibration(args, process, model, data, name, teacher) if args.estimate else None
        if process.is_main and not args.estimate:
            self._open(name)
            if first_step < self.total_steps:  # else a complete run was resumed, and nothing is about to happen
                self._introduce(data, precision)
        self.memory = Memory(process.device)
        self.memory.reset()
        self.data, self.beforehand = data, sum(data.passes.values())
        self.started, self.not_training = time.perf_counter(), 0.0
        self.processor_started = time.process_time()
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
        config = self.config
        kind = "mixture of experts" if config.use_moe else "dense"
        size = f"{plural(config.num_hidden_layers, 'layer')} of {config.hidden_size}"
        self.say(f"{self.parameters / 1e6:.2f}M parameters, {kind}, {size}")
        self.say(data.describe())
        self.say(f"{data.describe_steps()} on {self.process.device} in {precision.name}")
        for notice in filter(None, (data.notice, precision.notice)):
            self.say(f"note: {notice}")

    def _clear_interval(self) -> None:
        self.sums = {"loss": 0.0, "steps": 0, "tokens": 0.0, "positions": 0.0, "attended": 0.0}
        self.more: dict[str, float] = {}
        self.interval_started, self.paused, self.waited = time.perf_counter(), 0.0, self.data.waited

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Evaluating and saving are not training: they do not count in tokens per second."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start
        self.not_training += time.perf_counter() - start

    def step(self, step: int, loss: float, lr: float, grad_norm: float, counts: StepCounts, **more) -> None:
        """One optimizer step, numbers of all processes together. `more`: further means to log, such as aux_loss."""
        if self.calibration:
            self.calibration.step_done(self._flops(counts.tokens, counts.attended), counts.tokens, counts.positions)
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
        flops = self._flops(sums["tokens"], sums["attended"])
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
            "padding": 1 - sums["tokens"] / max(sums["positions"], 1),  # GRPO may find nothing to learn from in a step
            "waiting": (self.data.waited - self.waited) / seconds,  # for the loader, of this process
        }
        means = {name: value / sums["steps"] for name, value in self.more.items()}
        metrics |= means
        shown = "".join(f", {name} {value:.4f}" for name, value in means.items() if name != "aux_loss" or value)
        self.say(
            f"Epoch:[{epoch + 1}/{self.args.epochs}]({epoch_step + 1}/{epoch_steps}) "
            f"loss:{metrics['loss']:.4f} lr:{lr:.3e} epoch_Time:{minutes:.1f}min | "
            f"{metrics['tokens_per_second']:,.0f} tokens/s, MFU {metrics['mfu']:.0%}, "
            f"grad_norm {grad_norm:.2f}, padding {metrics['padding']:.1%}, "
            f"waiting {metrics['waiting']:.1%}{shown}"
        )
        self.record({"event": "step", **metrics})
        self._clear_interval()

    def _flops(self, tokens: float, attended: float) -> float:
        return self.flops_per_token * tokens + attention_flops(self.config, attended)

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
        if self.calibration:
            progress.complete = True  # all that was asked for
            if self.process.is_main:
                self.say(self.calibration.report(self.config, self.parameters, self.frozen))
            return
        seconds = self.beforehand + time.perf_counter() - self.started - self.not_training
        peak = self.memory.peak()
        end = {"event": "end", "step": progress.step, "seconds": seconds, "peak_memory_bytes": peak}
        self.record(end | {"processor_seconds": time.process_time() - self.processor_started})
        if progress.complete and self.first_step == 0 and self.process.is_main:
            estimate = Path(self.args.out_dir) / "logs" / f"{self.name}.estimate.json"
            if off := compared(estimate, self.args, self.process, seconds, peak):
                self.say(off)
        if progress.complete:
            self.say(f"{weights} is ready; next: {next_command}")
        else:
            self.say(f"stopped after step {progress.step}; saved {weights}. To go on: the same command with --resume")
        if self.file is not None:
            self.file.close()
        if self.tracker:
            self.tracker.finish(progress.complete, weights=str(weights), steps=progress.step, tokens=progress.tokens)
