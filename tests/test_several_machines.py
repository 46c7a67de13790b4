"""Training on two machines: network namespaces with addresses and disks of their own, joined by a virtual cable."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DPO, PRETRAIN, Child, assert_identical, each_stage, read_resume, tiny_flags, write_texts

from trainer import distributed

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NEW_NETWORK = 0x40000000  # CLONE_NEWNET of setns(2)

pytestmark = pytest.mark.full


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Two machines, as far as the network is concerned."""

    def __init__(self):
        self.names = [f"minimind{os.getpid()}{side}" for side in "ab"]
        self.cables = [f"mm{os.getpid()}{side}" for side in "ab"]  # at most 15 characters

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        (a, b), (cable_a, cable_b) = self.names, self.cables
        ip("link", "add", cable_a, "netns", a, "type", "veth", "peer", "name", cable_b, "netns", b)
        for name, cable, address in zip(self.names, self.cables, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.cables[1], "down")

    def slow_down(self, rate: str) -> None:
        """Limit what the first machine sends; what the short queue cannot hold is dropped and must be sent again."""
        limit = ["rate", rate, "burst", "16kb", "limit", "32kb"]
        words = ["tc", "-n", self.names[0], "qdisc", "add", "dev", self.cables[0], "root", "tbf", *limit]
        subprocess.run(words, check=True, capture_output=True)

    def disconnect(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and the ip command")
    hosts = Hosts()
    try:
        hosts.connect()
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    finally:
        hosts.disconnect()


def enter_host(module) -> None:
    """In a child process: leave this machine's network for the one that the environment names."""
    with open(f"/run/netns/{os.environ['HOST']}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")


def warn_soon(module) -> None:
    distributed.HANG_SECONDS = 2


@pytest.fixture
def start(launcher, hosts, tmp_path) -> Callable[..., list[Child]]:
    """start(script, data, **flags): one process on each machine, each with a folder and a copy of the data."""

    def start(script: str, data_path: Path, **flags) -> list[Child]:
        children = []
        for rank, host in enumerate(hosts.names):
            folder = tmp_path / f"disk{rank}"
            folder.mkdir(exist_ok=True)
            line = tiny_flags(folder / "out", shutil.copy(data_path, folder), batch_size=4, **flags)
            env = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            env |= {"RANK": str(rank), "LOCAL_RANK": "0", "HOST": host}
            children.append(launcher.start(script, line, env, [enter_host, warn_soon]))
        return children

    return start


def finish(children: list[Child]) -> None:
    printed = [(child.wait(), child.output) for child in children]
    assert all(status == 0 for status, _ in printed), "\n".join(map(str, printed))


@each_stage()
def test_two_machines_train_as_one(launcher, start, inputs, tmp_path, stage):
    flags = inputs(stage)
    if stage is DPO:  # its processes share the reference's pass, so they need one disk for it
        flags["cache_dir"] = tmp_path / "shared"
    launcher.run(stage.script, tiny_flags(tmp_path / "one", batch_size=4, **flags), world_size=2)
    finish(start(stage.script, **flags))
    name = stage.name()
    ours, expected = (read_resume(folder, name)["model"] for folder in (tmp_path / "disk0/out", tmp_path / "one"))
    assert_identical(ours, expected)
    assert not (tmp_path / "disk1/out/logs").exists()  # the first machine writes log and weights


def test_a_slow_cable_that_loses_packets_changes_nothing(launcher, hosts, start, texts, tmp_path):
    hosts.slow_down("20mbit")
    launcher.run(PRETRAIN.script, tiny_flags(tmp_path / "one", texts, batch_size=4), world_size=2)
    finish(start(PRETRAIN.script, texts))
    assert_identical(read_resume(tmp_path / "disk0/out")["model"], read_resume(tmp_path / "one")["model"])


def test_a_machine_that_dies_is_told_and_the_run_goes_on_without_its_disk(launcher, start, tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl", 400)
    launcher.run(PRETRAIN.script, tiny_flags(tmp_path / "one", texts, batch_size=4), world_size=2)
    ours, other = start(PRETRAIN.script, texts, save_interval=5)
    ours.wait_for("(10/", seconds=120)
    other.signal(signal.SIGKILL)
    assert ours.wait() == 1 and "another process of this job has ended" in ours.output
    shutil.rmtree(tmp_path / "disk1")  # a new machine
    finish(start(PRETRAIN.script, texts, resume=True))
    state, expected = (read_resume(folder) for folder in (tmp_path / "disk0/out", tmp_path / "one"))
    assert_identical(state["model"], expected["model"])
    assert_identical(state["optimizer"], expected["optimizer"])


def test_a_cable_that_is_cut_is_told(hosts, start, tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl", 4000)
    children = start(PRETRAIN.script, texts, rank_timeout=10)
    children[0].wait_for("(10/", seconds=120)
    hosts.cut()
    for child in children:
        assert child.wait() == 1
        assert "another process may hang" in child.output and "start again with --resume" in child.output.lower()
