"""Outputs of a frozen model on the training data: computed once, kept on disk, read while another model trains.

DPO keeps the reference's log-probs of every answer here, knowledge distillation the teacher's most likely tokens. The
arrays are memory-mapped, so they take no memory of the training process. A folder belongs to one (model, data,
settings): a hash of these is part of its name. The next run continues an interrupted computation.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dataset.disk import open_or_build, writing_errors
from trainer.distributed import Process, barrier, gather_objects, sum_over_ranks

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
        shapes: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
        process: Process,
        reserve: bool = True,
    ):
        """Open the folder, or make it. All processes call this together.

        path: the folder's name before the hash is added. identity: everything that decides the numbers. reserve: take
        the disk space of the whole, as an --estimate that computes little of it need not.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = path.with_name(f"{path.name}-{digest}")
        self.identity, self.process, self.reserve = identity, process, reserve
        self.shapes = {"done": ((items,), np.uint8), **shapes}
        if process.is_main:
            stale = [other for other in path.parent.glob(f"{path.name}-*") if (other / "complete.json").exists()]
            if stale and not self.folder.exists():
                print(f"{stale[0]} belongs to other weights, data or settings; computing them again", flush=True)
            open_or_build(self.folder, self._open, self._make, path.name)
            if not (self.folder / "complete.json").exists():  # an --estimate may have made it
                with writing_errors(self.folder, path.name):
                    self._take_space(self.folder, made_now=False)
        barrier(process)
        try:
            self.arrays = self._open(self.folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.folder} cannot be read ({error}); several machines need one --cache_dir"
            ) from error
        self.done = self.arrays.pop("done")
        complete = (self.folder / "complete.json").exists()  # another run may be finishing it right now
        self.complete = sum_over_ranks([complete], process)[0] == process.world_size
        self.pending: list[np.ndarray] = []
        self.flushed = time.monotonic()

    def _open(self, folder: Path) -> dict[str, np.memmap]:
        complete = (folder / "complete.json").exists()
        arrays = {name: np.load(folder / f"{name}.npy", "r" if complete else "r+") for name in self.shapes}
        if any((array.shape, array.dtype) != self.shapes[name] for name, array in arrays.items()):
            raise ValueError("arrays of another shape")
        return arrays

    def _make(self, folder: Path) -> None:
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.shapes.values())
        free = shutil.disk_usage(folder).free
        if self.reserve and free < size:
            raise OSError(errno.ENOSPC, f"it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        for name, (shape, dtype) in self.shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
        self._take_space(folder)

    def _take_space(self, folder: Path, made_now: bool = True) -> None:
        """Reserve the disk space: a sparse file on a disk that fills up would kill the process (SIGBUS)."""
        for name in self.shapes if self.reserve and hasattr(os, "posix_fallocate") else ():
            with open(folder / f"{name}.npy", "r+b") as file:
                found = os.fstat(file.fileno())
                if made_now or found.st_blocks * 512 < found.st_size:
                    os.posix_fallocate(file.fileno(), 0, found.st_size)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in (self.done, *self.arrays.values()))

    def missing(self, items: np.ndarray) -> np.ndarray:
        """Tell for each of these items whether it is still missing."""
        return self.done[items] == 0

    def write(self, items: np.ndarray, rows: np.ndarray, **values: np.ndarray) -> None:
        """Write values[name] to `rows` of the array of that name; with them `items` are done."""
        for name, value in values.items():
            self.arrays[name][rows] = value
        self.pending.append(items)
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Mark the written items as done, after their values have reached the disk."""
        for array in self.arrays.values():
            array.flush()
        for items in self.pending:
            self.done[items] = 1
        self.done.flush()
        self.pending, self.flushed = [], time.monotonic()

    def finish(self, in_part: bool = False) -> None:
        """Finish a process's share; all processes call this. in_part: of what this run needs, not of all items."""
        self.flush()
        barrier(self.process)
        if self.process.is_main and self.done.all():
            with writing_errors(self.folder, "complete.json"):
                text = json.dumps(self.identity, indent=2, default=str)
                (self.folder / "complete.json").write_text(text, encoding="utf-8")
        if not (any(gather_objects(in_part, self.process)) or self.done.all()):  # also waits for the main process
            raise ValueError(
                f"{self.folder} lacks what other machines computed: --cache_dir must be on a disk that all share"
            )
