"""How threads wait on a busy machine."""

import ast
import os
import sys

import pytest

from model import threads
from tests.conftest import ROOT

ENTRIES = [*sorted((ROOT / "trainer").glob("train_*.py")), ROOT / "eval_model.py"]
ENTRIES += [ROOT / "scripts" / name for name in ("evaluate.py", "serve_openai_api.py", "web_demo.py")]


@pytest.mark.parametrize(("idle", "expected"), [(2.0, None), (1.6, None), (1.0, "0"), (0.0, "0")])
def test_threads_sleep_only_where_cores_are_taken(monkeypatch, idle, expected):
    ticks = iter([1000, 1000 + idle * os.sysconf("SC_CLK_TCK")])
    monkeypatch.setattr(threads, "_idle_ticks", lambda: next(ticks))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.yield_when_busy(1.0)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_what_the_environment_says_is_kept(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(threads, "_idle_ticks", lambda: pytest.fail("looked at the machine"))
    threads.yield_when_busy()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_idle_time_is_that_of_our_own_cores_waiting_for_disks_included(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    cores = ["  9 9 9 9000 900 9 9 9 9 9", "0 1 2 3 1000 100 4 5 6 7 8", "1 1 2 3 20 2 4 5 6 7 8"]
    cores += ["2 1 2 3 300 30 4 5 6 7 8", "20 1 2 3 50 5 4 5 6 7 8"]
    stat.write_text("".join(f"cpu{line}\n" for line in cores) + "intr 17 0 9\n\nctxt 1234\n")
    monkeypatch.setattr(threads, "Path", {"/proc/stat": stat}.__getitem__)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 2}, raising=False)
    assert threads._idle_ticks() == 1000 + 100 + 300 + 30


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_scripts_decide_before_torch_loads(path):
    imports = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "names")]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    heavy = [name for name in names if name.split(".")[0] in ("torch", "transformers", "model", "dataset")]
    assert heavy[0] == "model.threads"
