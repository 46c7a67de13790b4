"""How torch's threads on a CPU wait for each other when other programs want the same cores.

Threads that share an operation meet many times in each layer. The one that arrives first spins, which is fastest on a
quiet machine; but where a core is shared, it burns the time slice that the late one needs. Measured on two cores next
to one busy process: training at 0.35 and decoding at 0.2 of the quiet speed, without spinning 0.6 and 0.9.
"""

import os
import sys
import time
from pathlib import Path

from model.streams import show_unless_interrupted


def yield_when_busy(seconds: float = 0.2) -> None:
    """Let waiting threads sleep if other programs keep our cores busy now.

    Runs when this module is imported. That must be before torch, whose OpenMP library reads the environment as it
    loads. Does nothing where the environment says how threads wait, in the processes of a launcher, and where the
    system is not Linux.
    """
    decided = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LOCAL_RANK"} & set(os.environ)
    if decided or "torch" in sys.modules or not Path("/proc/stat").exists():
        return
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # may be a list, one for each level
    threads = int(given) if given.isdigit() else os.cpu_count()
    before = _idle_ticks()
    time.sleep(seconds)
    free = (_idle_ticks() - before) / (seconds * os.sysconf("SC_CLK_TCK"))
    if free < min(threads, len(os.sched_getaffinity(0))) - 0.5:
        os.environ["GOMP_SPINCOUNT"] = "0"


def _idle_ticks() -> int:
    """Return how long the cores that this process may use have been idle, in clock ticks, summed."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    return sum(int(words[4]) + int(words[5]) for words in lines if words and words[0] in ours)  # idle and iowait


sys.excepthook = show_unless_interrupted  # a script that is stopped while torch loads
yield_when_busy()
