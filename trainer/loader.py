"""From a jsonl file to the micro-batches of this process: token cache, packing plan, loader, transfer to the device."""

import argparse
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset.packing import PLAN_VERSION, PackedBatches, PreferenceBatches, build_plan
from dataset.progress import ProgressBar
from dataset.token_cache import open_token_cache
from dataset.tokenization import ChatTokenizer
from model.device import compiles, pins_memory
from trainer.distributed import Process, StopRequest

# These index arrays on disk; copying them back would wait for all queued GPU work.
STAY_ON_CPU = ("row_ids", "pair_ids")
MOST_ROWS = 1024  # up to this, --batch_size and the like may exceed the rows of a small file
LEFT_OUT = {  # what packing counted -> how the log says it
    "split": "documents longer than a row cut into pieces",
    "truncated": "conversations lost their last turns",
    "cut": "answers cut to fit",
    "skipped": "skipped: no token to learn from",
    "identical": "pairs skipped: alike once cut to fit",
}
MODEL_INPUTS = ("input_ids", "position_ids", "document_ids", "cu_seqlens", "max_seqlen")


def plural(count: int, noun: str) -> str:
    """Return "1 process" or "1,024 processes"."""
    ending = "es" if noun.endswith(("s", "ch")) and noun != "epoch" else "s"
    return f"{count:,} {noun}{ending * (count != 1)}"


def refuse_vast(args: argparse.Namespace, flags: Sequence[str], path: Path, count: int, noun: str) -> None:
    """Raise ValueError if a flag asks for far more at a time than the file holds: memory would run out unsaid."""
    for flag in flags:
        if getattr(args, flag) > max(count, MOST_ROWS):
            raise ValueError(
                f"--{flag} {getattr(args, flag)}: far more than {path} has, {plural(count, noun)}; lower it"
            )


class PackedData:
    """One data file as packed batches: steps(start) to train on, once(...) for a pass over the file.

    The same global batches come in the same order at any number of processes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        kind: str,
        tokenizer: ChatTokenizer,
        process: Process,
        data_path: Path | None = None,
    ):
        """data_path: a held-out file to read instead of --data_path."""
        self.args, self.process, self.pad_id = args, process, tokenizer.pad_id
        self.path, self.held_out = data_path or args.data_path, data_path is not None
        self.cache = open_token_cache(
            self.path,
            tokenizer,
            kind,
            cache_dir=args.cache_dir,
            skip_bad_lines=args.skip_bad_lines,
            max_record_bytes=args.max_record_bytes,
            show_progress=process.is_main,
        )
        self.plan = build_plan(self.cache, args.max_seq_len, show_progress=process.is_main)
        if not self.held_out:
            refuse_vast(args, ("batch_size", "accumulation_steps"), self.path, self.plan.num_rows, "row")
        self.passes: dict[str, float] = {}  # seconds of each pass over the file, a forecast if it was cut short
        self.stores: dict[str, int] = {}  # bytes that such passes keep on disk
        self.timed_only, self.cut_short = args.pass_seconds < math.inf, False  # by --estimate
        self.waited = 0.0  # seconds that this process has waited for batches

    def fingerprint(self) -> dict:
        """Return what must not change when a run is resumed: the tokens and their plan, wherever the file is."""
        sizes = {name: int(self.cache.meta[name]) for name in ("documents", "tokens")}
        return sizes | {"contents": self.cache.contents_sha256[:16], "plan": PLAN_VERSION}

    def describe(self) -> str:
        stats = self.plan.stats
        notes = [f"{stats[name]:,} {text}" for name, text in LEFT_OUT.items() if stats[name]]
        filled = "; ".join([f"{self.plan.fill:.1%} filled", *notes])
        return (
            f"{self.path}: {plural(stats['documents'], 'document')}, {plural(stats['positions'], 'token')} in "
            f"{plural(self.plan.num_rows, 'row')} of {self.plan.max_seq_len} ({filled})"
        )

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step, on all processes."""
        return self.args.batch_size * self.args.accumulation_steps * self.process.world_size

    def describe_steps(self) -> str:
        args = self.args
        return (
            f"{plural(self.total_steps, 'step')} of {plural(self.global_batch, 'row')} ({args.batch_size} × "
            f"{plural(args.accumulation_steps, 'micro-batch')} × {plural(self.process.world_size, 'process')})"
        )

    @property
    def notice(self) -> str:
        """A warning to show before the run starts, or ""."""
        if self.plan.num_rows >= self.global_batch:
            return ""
        advice = "for so little data lower --batch_size or --accumulation_steps"
        return f"one step takes {plural(self.global_batch, 'row')}; {advice}"

    def _batches(self, epoch: int, shuffle: bool = True, accumulation_steps: int | None = None):
        options = {
            "batch_size": self.args.batch_size, "world_size": self.process.world_size, "rank": self.process.rank,
            "accumulation_steps": accumulation_steps or self.args.accumulation_steps,
            "seed": self.args.seed, "epoch": epoch, "shuffle": shuffle, "pad_id": self.pad_id,
        }  # fmt: skip
        if self.cache.kind != "preference":
            return PackedBatches(self.cache, self.plan, **options)
        multiple = self.args.batch_size if compiles(self.process.device) else 1  # two shapes to compile
        return PreferenceBatches(self.cache, self.plan, row_multiple=multiple, **options)

    @property
    def steps_per_epoch(self) -> int:
        return self._batches(0).steps_per_epoch

    @property
    def total_steps(self) -> int:
        return planned_steps(self.args, self.steps_per_epoch)

    def facts(self) -> dict:
        """Return what the log says about the data, for --estimate. ..._per_step: means over an epoch."""
        return {
            "kind": self.cache.kind, "cache": str(self.cache.folder), "passes": self.passes, "stores": self.stores,
            "tokens_per_step": self.plan.stats["positions"] / self.steps_per_epoch,
            "targets_per_step": self.plan.stats["targets"] / self.steps_per_epoch,
            "segments_per_row": self.plan.max_segments_per_row,
        }  # fmt: skip

    @property
    def read_in_part(self) -> bool:
        """Whether --max_steps ends the run within its first epoch."""
        return not self.held_out and self.total_steps < self.steps_per_epoch

    def steps(self, start: int = 0, stop: StopRequest | None = None) -> Iterator[tuple[int, Iterator[dict]]]:
        """Yield (step, its micro-batches on the device) for every optimizer step from `start` on, over all epochs.

        After a signal the next micro-batch is the step's last, because other processes wait for this one's gradient.
        The step is not to be taken then. Not so under ZeRO, whose processes exchange something in every micro-batch.

        A step's micro-batches can be iterated once. Taking one also fetches one of the next step: meanwhile a GPU is
        busy with the work queued for it, and the transfer queues behind that.
        """
        per_epoch, total, accumulation = self.steps_per_epoch, self.total_steps, self.args.accumulation_steps
        if self.args.zero_stage and self.process.world_size > 1:
            stop = None

        def micro_batches() -> Iterator[dict]:
            for _ in range(accumulation):
                if stop and stop.heard():
                    yield fetched.popleft() | {"last": True}
                    return
                yield fetched.popleft()
                fetched.extend(islice(loader, 1))

        for epoch in range(start // per_epoch, -(-total // per_epoch)):
            begin = epoch * per_epoch
            first, last = max(start, begin), min(begin + per_epoch, total)
            indices = range((first - begin) * accumulation, (last - begin) * accumulation)
            loader = self._load(self._batches(epoch), indices)
            try:
                fetched = deque(islice(loader, accumulation))
                for step in range(first, last):
                    of_this_step = micro_batches()
                    yield step, of_this_step
                    deque(of_this_step, maxlen=0)  # skip those that were not taken
            finally:
                loader.close()  # ends its workers

    def once(self, title: str = "evaluating", missing: Callable[[np.ndarray], np.ndarray] | None = None):
        """Yield this process's share of the file in file order, on the device, under a progress bar.

        missing: a function of rows of the plan that says which are wanted. Batches without a wanted row are skipped; if
        --max_steps ends the run within its first epoch, only the batches of its steps are read; and the pass ends after
        --pass_seconds. Sets self.passes[title] to the seconds of the whole pass.
        """
        in_part = missing is not None and self.read_in_part
        batches = self._batches(0) if in_part else self._batches(0, shuffle=False, accumulation_steps=1)
        indices = range(self.total_steps * self.args.accumulation_steps if in_part else len(batches))
        if missing is not None:
            indices = [index for index in indices if missing(batches.rows(index)).any()]
        moments = [time.monotonic()]
        with ProgressBar(title, len(indices), "batches", show=self.process.is_main) as bar:
            for number, batch in enumerate(self._load(batches, indices), 1):
                yield batch
                bar.update()
                moments.append(time.monotonic())
                seconds, left = moments[-1] - moments[0], len(indices) - number
                timed = missing is not None and number > 1 and left
                if timed and seconds >= self.args.pass_seconds:
                    warm = (number + 1) // 2  # the first half may include compiling kernels
                    self.passes[title] = seconds + (moments[-1] - moments[warm]) / (number - warm) * left
                    self.cut_short = True
                    return
        self.passes[title] = time.monotonic() - moments[0]

    def _load(self, batches: PackedBatches | PreferenceBatches, indices: Sequence[int]) -> Generator[dict]:
        """Yield some of these batches on the device, except for STAY_ON_CPU."""
        pinned = pins_memory(self.process.device)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=indices,
            num_workers=self.args.num_workers if self.args.num_workers is not None else int(pinned),
            pin_memory=pinned,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # each loader draws a seed, and a resumed run makes one more of them
        )
        asked = time.perf_counter()
        for batch in loader:
            for name, value in batch.items():
                if isinstance(value, torch.Tensor) and name not in STAY_ON_CPU:
                    batch[name] = value.to(self.process.device, non_blocking=True)
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()


def planned_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a run: those of all epochs, or --max_steps if that is fewer."""
    total = steps_per_epoch * args.epochs
    return min(total, args.max_steps) if args.max_steps else total


def leave_signals_to_the_parent(_: int) -> None:
    """Ignore Ctrl-C and torchrun's SIGTERM, which reach workers too; only the training loop answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def model_inputs(batch: dict) -> dict:
    """Return the part of a batch that the model's forward takes."""
    return {name: batch[name] for name in MODEL_INPUTS}
