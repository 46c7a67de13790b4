"""What a frozen model says about the training data: computed once, kept on disk, read while another model trains.

DPO keeps the reference's log-probs of every answer here, knowledge distillation the teacher's likeliest tokens. The
arrays are memory-mapped, so they take no memory of the training process. A folder belongs to one (model, data,
settings): a hash of these is part of its name. Computing it can be interrupted and taken up again.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.progress import ProgressBar
from trainer.distributed import Process, barrier
from trainer.loader import CALIBRATION_SECONDS, PackedData

FLUSH_SECONDS = 20


class FrozenOutputs:
    """Arrays on disk whose first axis is divided into items, each written once.

    folder/NAME.npy as `shapes` says, done.npy (items,) uint8, and complete.json once every item is there.
    """

    def __init__(
        self,
        path: Path,
        identity: dict,
        items: int,
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]],
        process: Process,
    ):
        """path: where it lies, without the hash that is added to its name.

        identity: all that decides the numbers. Every process calls this together.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = path.with_name(f"{path.name}-{digest}")
        self.identity, self.process = identity, process
        if process.is_main:
            self._prepare(path, items, shapes)
        barrier(process)
        try:
            self.done = np.load(self.folder / "done.npy", mmap_mode="r" if self.complete else "r+")
            self.arrays = {
                name: np.load(self.folder / f"{name}.npy", mmap_mode="r" if self.complete else "r+") for name in shapes
            }
        except OSError as error:
            raise ValueError(
                f"{self.folder} cannot be read ({error}); several machines need one --cache_dir"
            ) from error
        self.pending: list[np.ndarray] = []
        self.flushed = time.monotonic()

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in (self.done, *self.arrays.values()))

    @property
    def complete(self) -> bool:
        return (self.folder / "complete.json").exists()

    def _prepare(self, path: Path, items: int, shapes: dict) -> None:
        """Makes the files, unless they are there and whole; says what is stale."""
        expected = {"done": ((items,), np.dtype(np.uint8)), **shapes}
        if self.folder.exists() and not all(
            _fits(self.folder / f"{name}.npy", shape, dtype) for name, (shape, dtype) in expected.items()
        ):
            print(f"{self.folder} is damaged; computing it again", flush=True)
            shutil.rmtree(self.folder)
        if self.folder.exists():
            return
        stale = [other for other in path.parent.glob(f"{path.name}-*") if (other / "complete.json").exists()]
        if stale:
            print(f"{stale[0]} belongs to other weights, data or settings; computing anew", flush=True)
        building = self.folder.with_name(f".{self.folder.name}.tmp")
        shutil.rmtree(building, ignore_errors=True)
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in expected.values())
        try:
            building.mkdir(parents=True)
            free = shutil.disk_usage(building).free
            if free < size:  # the files are sparse at first: a full disk would show itself only in the middle
                raise OSError(f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            for name, (shape, dtype) in expected.items():
                np.lib.format.open_memmap(building / f"{name}.npy", "w+", dtype, shape).flush()
            building.rename(self.folder)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise ValueError(f"cannot write {self.folder}: {error}; choose another --cache_dir") from error

    def missing(self, items: np.ndarray) -> np.ndarray:
        """Which of these items are not there yet: a boolean for each."""
        return self.done[items] == 0

    def write(self, items: np.ndarray, rows: np.ndarray, **values: np.ndarray) -> None:
        """values[name] go to `rows` of the array of that name; with them `items` are done."""
        for name, value in values.items():
            self.arrays[name][rows] = value
        self.pending.append(items)
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """An item counts as done only when its values are on disk."""
        for array in self.arrays.values():
            array.flush()
        for items in self.pending:
            self.done[items] = 1
        self.done.flush()
        self.pending, self.flushed = [], time.monotonic()

    def finish(self, in_part: bool = False) -> None:
        """Every process calls this when it has written its share; in_part: of what this run needs, not of all."""
        if self.complete:
            return
        self.flush()
        barrier(self.process)
        if in_part and not self.done.all():
            return
        if not self.done.all():
            raise ValueError(
                f"{self.folder} lacks what other machines computed: --cache_dir must lie on a disk that all share"
            )
        if self.process.is_main:
            text = json.dumps(self.identity, indent=2, ensure_ascii=False, default=str)
            (self.folder / "complete.json").write_text(text, encoding="utf-8")
        barrier(self.process)


def _fits(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # numpy raises the last for an empty file
        return False
    return array.shape == tuple(shape) and array.dtype == dtype


def missing_batches(data: PackedData, title: str, outputs: FrozenOutputs, items: str) -> Iterator[dict]:
    """Yield the batches of this run whose outputs are not all on disk yet, under a progress bar.

    items: what a batch calls its items. The seconds that it takes are noted in data.passes[title]; for --estimate some
    batches are enough to tell.
    """
    batches, indices = data.each_batch_once()
    there = 0.0 if data.looked_at_in_part else float(outputs.done.mean())
    total = max(round(len(indices) * (1 - there)), 1)
    number, started = 0, time.monotonic()
    moments = [started]
    with ProgressBar(title, total, "batches", show=data.process.is_main) as bar:
        for batch in data.load(batches, indices):
            wanted = batch[items].numpy()
            if not (len(wanted) and outputs.missing(wanted).any()):
                continue
            yield batch
            bar.update()
            number, now = number + 1, time.monotonic()
            if data.args.estimate:
                moments.append(now)
                if 1 < number < total and now - started >= CALIBRATION_SECONDS:
                    warm = (number + 1) // 2  # until then kernels may have been compiled
                    data.passes[title] = now - started + (now - moments[warm]) / (number - warm) * (total - number)
                    return
    data.passes[title] = time.monotonic() - started
