"""Folders that are built once and shared by all processes, and the messages for a full or read-only disk."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout

HEAD_START = 1.0  # seconds
Opened = TypeVar("Opened")
CURES = (
    dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there")
    | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO), "make it writable")
    | dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is in the way, move it")
    | {errno.ENAMETOOLONG: "the name is too long"}
)


def open_or_build(
    folder: Path, open_folder: Callable[[Path], Opened], build: Callable[[Path], None], what: str, show: bool = True
) -> Opened:
    """Return open_folder(folder); build the folder first if it is missing or damaged.

    One process builds, the others wait for it. build fills a folder of another name, so a killed process leaves nothing
    half-made under the final one. what: the contents, for messages. Raises ValueError if the disk cannot hold them.
    """
    if (opened := _opened(folder, open_folder)) is not None:
        return opened
    with writing_errors(folder.parent, what):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock"), what, show):
            if (opened := _opened(folder, open_folder)) is None:  # nobody finished it while this process waited
                if folder.exists() and show:
                    print(f"{folder} is damaged; making it again", flush=True)
                with _replaced(folder) as unfinished:
                    build(unfinished)
                opened = open_folder(folder)
    return opened


def _opened(folder: Path, open_folder: Callable[[Path], Opened]) -> Opened | None:
    try:
        return open_folder(folder)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _locked(path: Path, what: str, show: bool) -> AcquireReturnProxy:
    """Take a lock for a `with` block; the operating system releases it if its holder dies."""
    lock = FileLock(path)
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(HEAD_START)  # so that the process that shows its progress makes it
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if show:
            print(f"waiting for another process that is making {what}", flush=True)
        return lock.acquire()


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name of `folder` if the block succeeds and vanishes if it fails.

    Call with the lock held: what a killed process left under the temporary name is removed first.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        for file in unfinished.iterdir():  # a rename that reaches the disk before its contents would name an empty file
            with open(file, "r+b") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextmanager
def writing_errors(folder: Path, what: str, flag: str = "--cache_dir") -> Iterator[None]:
    """Turn the error of a full or read-only disk into a ValueError with the cure; flag: what names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in CURES:
            raise
        raise ValueError(
            f"cannot write {what} in {folder}: {error.strerror}; {CURES[error.errno]}, or choose another {flag}"
        ) from error


def write_array(file, array: np.ndarray) -> None:
    # Not ndarray.tofile, which on a full disk says how many items it wrote, but not why it stopped.
    file.write(memoryview(np.ascontiguousarray(array)).cast("B"))
