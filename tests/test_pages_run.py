"""Every shell block of every page runs, in printed order, in one shell, from the root of a fresh copy; tiny sizes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_conversations, write_jsonl, write_preferences, write_reasoning, write_texts
from test_readme import CHINESE, HOUSE_PAGE, PAGES, README, ROOT, fences

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform == "win32", reason="the pages' commands are for a POSIX shell"),
]
PROGRAMS = "python python3 torchrun deepspeed streamlit make pip git ssh tmux rsync nvidia-smi pre-commit".split()
PROGRAMS += ["llama-cli", "ollama", "vllm", "modal", "hf", "docker"]
# files that the commands read, by the kind of their records
DATA = {
    write_texts: ["pretrain_hq", "better"],
    write_conversations: ["sft_mini_512", "sft_512", "lora_medical", "lora_identity"],
    write_reasoning: ["r1_mix_1024", "r1_mix_valid"],
    write_preferences: ["dpo", "dpo_valid"],
}


def port_is_free(port: int) -> bool:
    with socket.socket() as listener:
        return listener.connect_ex(("127.0.0.1", port)) != 0


def fresh_copy(folder: Path) -> Path:
    """What a clone would hold, with small data in place of the published files and stand-ins first on the path."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout: there is no telling which files belong to it")
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / "raw").mkdir()
    for write, names in DATA.items():
        for seed, name in enumerate(names):
            write(
                folder / "dataset" / f"{name}.jsonl",
                count=2040 if name in ("pretrain_hq", "sft_mini_512") else 40,
                seed=seed,
            )
    question = {"question": "三加四等于几？", "answer": "三加四等于七。\n#### 7"}
    write_jsonl(folder / "raw" / "gsm8k.jsonl", [question] * 8)
    problem = {"conversations": [{"role": "user", "content": "How many are 3 and 4?"}], "answer": "7"}
    write_jsonl(folder / "dataset" / "grpo.jsonl", [problem] * 8)
    choices = {"question": "How many are 3 and 4?", "A": "6", "B": "7", "answer": "B"}
    (folder / "dataset" / "eval").mkdir()
    for name in ("ceval", "cmmlu", "arc_easy"):
        write_jsonl(folder / "dataset" / "eval" / f"{name}.jsonl", [choices] * 4)
    alpaca = {"instruction": "晴天的天空是什么颜色？", "output": "晴天的天空是蓝色的。"}
    (folder / "raw" / "alpaca.json").write_text(json.dumps([alpaca] * 8), encoding="utf-8")
    programs = folder / "bin_of_tests"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/tiny.py" {name} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


def run_page(folder: Path, page: str) -> None:
    blocks = fences(page, "bash")
    assert blocks, f"{page} has no shell block"
    script = (
        "".join(blocks)
        + '\n[ "$(pwd -P)" = "$ROOT_FOLDER" ] || { echo "the page leaves the shell in $PWD"; exit 1; }\n'
    )
    environment = os.environ | {
        "PATH": f"{folder / 'bin_of_tests'}:{os.environ['PATH']}",
        "ROOT_FOLDER": str(folder.resolve()),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    log = folder / "page.log"
    with log.open("wb") as output:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-x", "-c", script], cwd=folder, env=environment, stdout=output, stderr=output
        )
    ending = "import sys; sys.path.insert(0, sys.argv[1]); import tiny; tiny.end_background()"
    subprocess.run([sys.executable, "-c", ending, str(ROOT / "tests")], cwd=folder, check=True)
    (folder / "minimind").unlink(missing_ok=True)
    assert done.returncode == 0, f"{page}\n" + log.read_text("utf-8", "replace")[-6000:]


@pytest.fixture(scope="module", params=[README, CHINESE[README]])
def after_the_readme(request, tmp_path_factory) -> tuple[Path, str]:
    """A copy in which all commands of a README have run, from nothing, and the README's name."""
    if not port_is_free(8998) or not port_is_free(9994):
        pytest.skip("another program uses port 8998 or 9994, which the pages name")
    folder = fresh_copy(tmp_path_factory.mktemp("clone"))
    run_page(folder, request.param)
    return folder, request.param


@pytest.mark.parametrize("page", sorted(PAGES, key=lambda page: page not in (README, "docs/stages.md")))
def test_page_runs(after_the_readme, page):
    """The README first, then the stages, whose data, weights and adapters the other pages go on with."""
    folder, readme = after_the_readme
    if page == README:
        for name in (
            "pretrain_512",
            "full_sft_512",
            "rlhf_512",
            "reason_512",
            "full_dist_512",
            "lora/lora_medical_512",
        ):
            assert (folder / "out" / f"{name}.pth").is_file()
        assert (folder / "MiniMind2-Small" / "model.safetensors").is_file()
        (folder / "MiniMind2-Small").rename(folder / "MiniMind2")  # the model that docs/data.md downloads
    elif page != HOUSE_PAGE or readme == README:
        for made in folder.glob("MiniMind2-Small*"):  # by the README; the pages convert too
            shutil.rmtree(made)
        run_page(folder, page if readme == README else CHINESE[page])
