"""The processes of a job: rank and device, agreement between ranks, seeds, signals, clean-up."""

import argparse
import contextlib
import ctypes
import datetime
import math
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.device import collectives, has_own_memory, where_float64_is


@dataclass(frozen=True)
class Process:
    """This process among those of the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    locks: list = field(default_factory=list, compare=False, repr=False)  # held until the process ends

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on the main process. A terminal that is gone or a full disk does not end a run."""
        if self.is_main:
            with contextlib.suppress(OSError, ValueError):
                print(text, flush=True)


LAUNCHED = "MINIMIND_LAUNCHED"  # set for a process that must not outlive the one that started it
HANG_SECONDS = 60  # without a step before a process warns that another one may hang
# what gloo says when the other process has gone
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


def lost_process(error: RuntimeError) -> str:
    """Return what to tell a process that waited in vain for another one; "" if the error is of another kind."""
    if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in LOST_PROCESS):
        return ""
    return (
        "another process of this job has ended or hangs, and this one cannot go on alone; see above for what it said. "
        "Start again with --resume to go on from the last save "
        f"({type(error).__name__}: {str(error).splitlines()[0]})"
    )


def start_process(args: argparse.Namespace) -> Process:
    """Join the process group that torchrun describes in the environment, if any, and seed everything."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if args.ddp and not launched:
        raise ValueError(
            "--ddp was given, but RANK and WORLD_SIZE are not set; start with: torchrun --nproc_per_node N train_X.py"
        )
    if args.ddp is False and launched and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError("--ddp false was given, but a launcher started several processes; leave the flag out")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if args.local_rank not in (-1, local_rank):
        raise ValueError(
            f"--local_rank {args.local_rank} contradicts LOCAL_RANK={local_rank} in the environment; leave the flag out"
        )
    device = torch.device(args.device)
    if launched and "device" in args.changed and device.index not in (None, local_rank):
        raise ValueError(
            f"--device {args.device} contradicts LOCAL_RANK={local_rank} in the environment; leave the number out, and "
            "choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    rank = int(os.environ["RANK"]) if launched else 0
    if device.type == "mps" and world_size > 1:
        raise ValueError("--device mps: there is one such GPU, for one process")
    if has_own_memory(device):
        device = torch.device(device.type, local_rank if launched else device.index or 0)
        if device.index >= (count := torch.get_device_module(device).device_count()):
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own ({count} are here); lower --nproc_per_node"
            )
        torch.get_device_module(device).set_device(device)
        if args.dtype != "float32":
            torch.set_float32_matmul_precision("high")  # TF32 for the products that autocast leaves in float32
    else:
        keep_freed_memory()
    if (world_size > 1 or args.zero_stage) and not dist.is_initialized():
        alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        several_machines = world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if "gloo" in collectives(device) and several_machines and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(os.environ["MASTER_ADDR"]))
        timeout = datetime.timedelta(seconds=args.rank_timeout)
        bound = device if device.type == "cuda" else None  # without it torch guesses, and warns
        dist.init_process_group(collectives(device), timeout=timeout, device_id=bound, **alone)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return Process(rank, local_rank, world_size, device)


def interface_towards(host: str) -> str:
    """Return the name of the network interface through which this machine and host reach each other.

    Gloo would take the interface of this machine's own name, which many systems resolve to 127.0.0.1.
    """
    import fcntl  # Windows has none

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing; chooses the address that a packet would leave from
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    raise ValueError(f"no network interface of this machine has {address}; set GLOO_SOCKET_IFNAME to the one to use")


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks.

    Each training step frees and allocates the same activations, and fresh pages from the kernel cost more than the
    arithmetic on them. Other C libraries have no such switch.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def stop_process(stop: "StopRequest", complete: bool) -> None:
    """Leave the process group. An unfinished run exits with the signal's status, so a chain of commands stops too."""
    if dist.is_initialized():
        dist.barrier()
        # Gloo's threads need Python's lock to release the last collective's tensors, and destroying the group waits
        # for these threads with the lock held. Without a pause in between, one run in ten never ends.
        time.sleep(0.1)
        dist.destroy_process_group()
    if not complete:
        raise SystemExit(128 + (stop.signal or signal.SIGTERM))


def sum_over_ranks(values: list[float], process: Process) -> list[float]:
    """Return the sum of each number over all processes."""
    if process.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=where_float64_is(process.device))
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: object, process: Process) -> list:
    """Return every process's value, in the order of ranks."""
    if process.world_size == 1:
        return [value]
    values = [None] * process.world_size
    dist.all_gather_object(values, value)
    return values


def refuse_differing(facts: dict, process: Process) -> None:
    """Raise ValueError, in all processes alike, if facts that they must share differ: they are of different runs."""
    first, *others = gather_objects(facts, process)
    for rank, other in enumerate(others, 1):
        differing = [name for name in sorted(first.keys() & other.keys()) if first[name] != other[name]]
        if differing:
            listed = [f"{name} is {first[name]} in process 0, {other[name]} in {rank}" for name in differing]
            raise ValueError(f"all processes must be started for the same run: {'; '.join(listed)}")


def share_from_main(value: Any, process: Process) -> Any:
    """Return the main process's value on every process."""
    values = [value]
    if process.world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def barrier(process: Process) -> None:
    if process.world_size > 1:
        dist.barrier()


class StopRequest:
    """Remembers SIGINT and SIGTERM. The training loop asks before each update, then saves the last step and ends.

    A killed launcher counts as SIGTERM; otherwise its processes would go on training unnoticed. A process that waits
    long for another one says so.
    """

    current: "StopRequest | None" = None

    def __init__(self):
        self.signal = 0
        self.launcher = os.getppid() if {"RANK", LAUNCHED} & os.environ.keys() else None
        self.last, self.longest, self.watching = time.monotonic(), 0.0, False

    def _handle(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        if not self.signal and not int(os.environ.get("RANK", 0)):
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, b"\nstopping: finished steps are saved; Ctrl-C again stops at once, without saving\n")
        self.signal = number

    def heard(self) -> bool:
        """Tell whether this process was asked to stop."""
        if self.launcher not in (None, os.getppid()):
            self.signal = self.signal or signal.SIGTERM
        return self.signal > 0

    def agreed(self, process: Process) -> bool:
        """Tell whether any process was asked to stop: all must leave the loop in the same step."""
        stop = sum_over_ranks([float(self.heard())], process)[0] > 0
        self.longest, self.last = max(self.longest, time.monotonic() - self.last), time.monotonic()
        if process.world_size > 1 and not self.watching:
            self.watching = True
            threading.Thread(target=self._watch, args=(process.rank,), daemon=True).start()
        return stop

    def _watch(self, rank: int) -> None:
        told = None
        while self.watching:
            time.sleep(HANG_SECONDS / 10)
            silent = time.monotonic() - self.last
            if silent > max(HANG_SECONDS, 3 * self.longest) and told != self.last:
                told = self.last
                said = f"process {rank} has waited {silent:.0f} s for the end of a step; another process may hang"
                with contextlib.suppress(OSError, ValueError):
                    print(f"note: {said}. It gives up after --rank_timeout", file=sys.stderr, flush=True)


@contextlib.contextmanager
def between_steps() -> Iterator[None]:
    """Wrap an evaluation or a save: a long one does not mean that a process hangs."""
    request = StopRequest.current
    if request:
        request.last = math.inf
    yield
    if request:
        request.last = time.monotonic()


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    request = StopRequest.current = StopRequest()
    previous = {number: signal.signal(number, request._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        request.watching, StopRequest.current = False, None
        for number, handler in previous.items():
            signal.signal(number, handler)
