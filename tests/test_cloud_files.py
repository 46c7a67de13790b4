"""The notebook, run from its first cell to its last, and the Dockerfile."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_pages_run import fresh_copy

CELLS = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text("utf-8"))["cells"]


def test_the_notebook_is_clean_and_its_cells_are_python():
    for cell in CELLS:
        assert not cell.get("outputs") and cell["id"]
        if cell["cell_type"] == "code":
            compile(as_python("".join(cell["source"])), cell["id"], "exec")


def as_python(source: str) -> str:
    """What Jupyter makes of lines for the shell."""
    return re.sub(r"^( *)!(.*)$", lambda match: f"{match[1]}shell({match[2]!r})", source, flags=re.MULTILINE)


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="the cells' commands are for a POSIX shell")
def test_the_notebook_runs_from_the_folder_it_is_in(tmp_path, monkeypatch):
    folder = fresh_copy(tmp_path)
    monkeypatch.chdir(folder / "docs")
    environment = os.environ | {"PATH": f"{folder / 'bin_of_tests'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    printed = io.StringIO()

    def shell(command: str) -> None:
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed.write(done.stdout)

    names = {"shell": shell}
    with contextlib.redirect_stdout(printed):
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec(as_python("".join(cell["source"])), names)
    assert "Done in" in printed.getvalue() and re.search(r"step +2  loss \d", printed.getvalue())


def test_the_container_runs_as_a_user_and_gets_nothing_private():
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] != "root" and "VOLUME /minimind/out" in lines
    torch = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)[1]
    assert f"ARG BASE=pytorch/pytorch:{torch}-" in "\n".join(lines)
    rules = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert rules[1] == "*" and "dataset/*.jsonl" in rules and "**/.env" in rules
    assert all((ROOT / rule[1:]).exists() for rule in rules if rule.startswith("!") and "*" not in rule)
