"""From a jsonl file to the micro-batches of this process: token cache, packing plan, loader, transfer to the device."""

import argparse
import itertools
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from dataset.packing import PackedBatches, PreferenceBatches, build_plan
from dataset.token_cache import open_token_cache
from dataset.tokenization import ChatTokenizer
from trainer.distributed import Process, sum_over_ranks

CALIBRATION_STEPS = {False: 5, True: 21}  # of --estimate on a CPU, on a GPU, at least; the first one is not timed
CALIBRATION_SECONDS = 10  # and at least so long
# Files on disk are looked up with these. From a GPU they would come back only after all that it was asked for before.
STAY_ON_CPU = ("row_ids", "pair_ids")
MODEL_INPUTS = ("input_ids", "position_ids", "document_ids", "cu_seqlens", "max_seqlen")


def plural(count: int, noun: str) -> str:
    """1 process, 1,024 processes"""
    ending = "es" if noun.endswith(("s", "ch")) and noun != "epoch" else "s"
    return f"{count:,} {noun}{ending * (count != 1)}"


class PackedData:
    """One data file as packed batches. The same global batches come in the same order at any number of processes."""

    def __init__(
        self,
        args: argparse.Namespace,
        kind: str,
        tokenizer: ChatTokenizer,
        process: Process,
        data_path: Path | None = None,
    ):
        """data_path: of a held-out file, in place of --data_path."""
        self.args, self.process, self.pad_id = args, process, tokenizer.pad_id
        self.path, self.held_out = data_path or args.data_path, data_path is not None
        self.cache = open_token_cache(
            self.path,
            tokenizer,
            kind,
            cache_dir=args.cache_dir,
            skip_bad_lines=args.skip_bad_lines,
            show_progress=process.is_main,
        )
        self.plan = build_plan(self.cache, args.max_seq_len, show_progress=process.is_main)
        self.passes: dict[str, float] = {}  # seconds of what is computed before the first step; of --estimate: foretold
        self.stores: dict[str, int] = {}  # bytes on disk of what is kept of that
        self.waited = 0.0  # seconds that this process has spent on getting batches
        self.batches_class = PreferenceBatches if kind == "preference" else PackedBatches

    def fingerprint(self) -> dict:
        """What must be the same when a run is resumed: the tokens, wherever the file lies."""
        sizes = {name: int(self.cache.meta[name]) for name in ("documents", "tokens")}
        return sizes | {"contents": self.cache.contents_sha256[:16]}

    def describe(self) -> str:
        stats = self.plan.stats
        notes = [
            f"{stats.get(name, 0):,} {text}"
            for name, text in (
                ("split", "documents longer than a row cut into pieces"),
                ("truncated", "conversations lost their last turns"),
                ("cut", "answers cut to fit"),
                ("skipped", "skipped: no token to learn from"),
            )
            if stats.get(name, 0)
        ]
        filled = "; ".join([f"{self.plan.fill:.1%} filled", *notes])
        return (
            f"{self.path}: {plural(stats['documents'], 'document')}, {plural(stats['positions'], 'token')} in "
            f"{plural(self.plan.num_rows, 'row')} of {self.plan.max_seq_len} ({filled})"
        )

    def _batches(self, epoch: int, shuffle: bool = True, accumulation_steps: int | None = None):
        args, options = self.args, {}
        if self.batches_class is PreferenceBatches and self.process.device.type == "cuda":
            options = {"row_multiple": args.batch_size}  # two shapes to compile
        return self.batches_class(
            self.cache,
            self.plan,
            **options,
            batch_size=args.batch_size,
            accumulation_steps=accumulation_steps or args.accumulation_steps,
            world_size=self.process.world_size,
            rank=self.process.rank,
            seed=args.seed,
            epoch=epoch,
            shuffle=shuffle,
            pad_id=self.pad_id,
        )

    @property
    def steps_per_epoch(self) -> int:
        return self._batches(0).steps_per_epoch

    @property
    def total_steps(self) -> int:
        total = self.steps_per_epoch * self.args.epochs
        return min(total, self.args.max_steps) if self.args.max_steps else total

    def steps(self, start_step: int = 0) -> Iterator[tuple[int, list[dict]]]:
        """(step, micro-batches on the device) for every optimizer step from start_step on, over all epochs."""
        per_epoch, total = self.steps_per_epoch, self.total_steps
        step, started = start_step, time.monotonic()
        while step < total:
            epoch, first = divmod(step, per_epoch)
            batches = self._batches(epoch)
            last = min(per_epoch, total - epoch * per_epoch)
            accumulation = self.args.accumulation_steps
            loader = self.load(batches, range(first * accumulation, last * accumulation))
            try:
                micro_batches = MicroBatches(loader, accumulation)
                while micro_batches:
                    yield step, micro_batches
                    step, micro_batches = step + 1, micro_batches.following()
                    if step == 1:
                        started = time.monotonic()
                    if self.args.estimate and self.enough(step, time.monotonic() - started):
                        return
            finally:
                loader.close()  # its workers end here; whoever keeps the last micro-batches would keep them alive

    def enough(self, steps: int, seconds: float) -> bool:
        """Whether so many steps are a calibration for --estimate; all processes agree."""
        seconds = sum_over_ranks([seconds], self.process)[0] / self.process.world_size
        return steps >= CALIBRATION_STEPS[self.process.device.type == "cuda"] and seconds >= CALIBRATION_SECONDS

    @property
    def tokens_per_step(self) -> float:
        """Real tokens of an optimizer step of all processes, on average over an epoch."""
        return self.plan.stats["positions"] / self.steps_per_epoch

    @property
    def looked_at_in_part(self) -> bool:
        """Whether --max_steps ends the run within its first epoch."""
        return not self.held_out and self.total_steps < self.steps_per_epoch

    def each_batch_once(self) -> tuple[PackedBatches | PreferenceBatches, range]:
        """What this process looks at of the file, with the indices: the batches of its steps where these are but a
        part, else all in file order."""
        if self.looked_at_in_part:
            return self._batches(0), range(self.total_steps * self.args.accumulation_steps)
        batches = self.all_of_the_file()
        return batches, range(len(batches))

    def all_of_the_file(self) -> PackedBatches | PreferenceBatches:
        """This process's share of the whole file, in file order."""
        return self._batches(0, shuffle=False, accumulation_steps=1)

    def all_batches(self) -> Iterator[dict]:
        """The same, on the device, once."""
        batches = self.all_of_the_file()
        yield from self.load(batches, range(len(batches)))

    def load(self, batches: PackedBatches | PreferenceBatches, indices: Iterable[int]) -> Iterator[dict]:
        """Some of these batches on the device but for STAY_ON_CPU, assembled and brought there beforehand on a GPU."""
        cuda = self.process.device.type == "cuda"
        workers = self.args.num_workers if self.args.num_workers is not None else int(cuda)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            pin_memory=cuda,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # a loader draws a seed, and a resumed run makes one loader more
        )
        asked = time.perf_counter()
        batches = iter(loader)
        while (batch := next(batches, None)) is not None:
            seen = (batch["position_ids"] + 1) * (batch["document_ids"] >= 0)
            batch["attended"] = int(seen.sum())  # (token, position it looks at) pairs, for the count of operations
            for name, value in batch.items():
                if isinstance(value, torch.Tensor) and name not in STAY_ON_CPU:
                    batch[name] = value.to(self.process.device, non_blocking=True)
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()


class MicroBatches(list):
    """The micro-batches of one optimizer step. Whoever goes through them also fetches those of the next step, one each:
    a GPU still works on what was asked of it meanwhile, and the transfers wait in line behind that."""

    def __init__(self, loader: Iterator[dict], count: int, fetched: list[dict] | None = None):
        super().__init__(fetched or [])
        self.loader, self.count, self.next_ones = loader, count, []
        self.extend(itertools.islice(loader, count - len(self)))

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            yield batch
            if len(self.next_ones) < self.count:
                self.next_ones.extend(itertools.islice(self.loader, 1))

    def following(self) -> "MicroBatches":
        """Those of the next step; empty after the last."""
        return MicroBatches(self.loader, self.count, self.next_ones)


def leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C reaches workers too, and torchrun's SIGTERM; only the training loop may answer them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def model_inputs(batch: dict) -> dict:
    """What the model's forward takes of a batch."""
    return {name: batch[name] for name in MODEL_INPUTS}
