"""Call a function in worker processes; results come in the order of the tasks.

Workers are plain subprocesses. Unlike multiprocessing's, they do not import the main script again, so they load neither
torch nor transformers.
"""

import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = f"import sys; sys.path[:1] = [{str(ROOT)!r}]; from dataset.workers import worker_main; worker_main()"
READY = b"\0ready\n"  # before it a worker's output is what Python's start-up printed (sitecustomize, .pth files)
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def results_in_order(function: Callable, tasks: Iterable[tuple], num_workers: int) -> Generator:
    """Yield function(*task) for each task. Tasks are drawn a few ahead; function and results must pickle."""
    if num_workers == 1:
        with _serial_tokenizers(), _garbage_collection_paused():
            yield from itertools.starmap(function, tasks)
        return
    idle = SimpleQueue()
    with ExitStack() as stack:
        # The pool is entered last and so closed first: no thread is left waiting for a worker that has ended.
        for _ in range(num_workers):
            worker = _Worker(function)
            stack.callback(worker.close)
            idle.put(worker)
        pool = stack.enter_context(ThreadPoolExecutor(num_workers))

        def run(task: tuple):
            worker = idle.get()
            try:
                return worker.run(task)
            finally:
                idle.put(worker)

        pending = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(run, task))
                if len(pending) > 2 * num_workers:  # bounds the results that wait in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """A process that computes tasks. It ends when its input closes, so it never outlives this process."""

    def __init__(self, function: Callable):
        self._unsent = [function]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD,
        )

    def run(self, task: tuple):
        try:
            while self._unsent and (line := self._process.stdout.readline()) and not line.endswith(READY):
                pass
            for message in (*self._unsent, task):
                pickle.dump(message, self._process.stdin)
            self._unsent = []
            self._process.stdin.flush()
            result = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._process.kill()  # or one that still waits for input would never end
            raise ValueError(
                f"a worker process ended early (exit status {self._process.wait()}). If the system killed it for "
                "lack of memory, free some or use fewer cores (taskset), then start again: nothing half-made is left"
            ) from error
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with suppress(OSError):  # unsent input has nowhere to go
            self._process.stdin.close()


def worker_main() -> None:
    """Run the process behind _Worker: tasks come in on standard input, results go out on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the results
    output.write(READY)
    output.flush()
    function = pickle.load(sys.stdin.buffer)
    with _garbage_collection_paused():
        while True:
            try:
                task = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                result = function(*task)
            except Exception as error:
                result = error
            pickle.dump(result, output, protocol=pickle.HIGHEST_PROTOCOL)
            output.flush()


def usable_cores() -> int:
    """Return the number of cores that this process may use; in a container that may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Stop the collector, which would search millions of small lists again and again; none of them is in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Keep the tokenizers library from starting threads: once it has, it warns in every process forked later."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM") if before is None else os.environ.update(TOKENIZERS_PARALLELISM=before)
