"""All stages one after the other, as a person runs them: each script a process of its own, through one out/ folder."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    DISTILLATION,
    DPO,
    FULL_SFT,
    LORA,
    PRETRAIN,
    REASON,
    ROOT,
    STAGES,
    read_log,
    skip_measuring,
    tiny_flags,
    write_data,
    write_jsonl,
)

from model.weights import read_sidecar

# it learns more than the student has when it becomes one
TEACHER = {"hidden_size": 48, "num_hidden_layers": 3, "epochs": 5, "learning_rate": 5e-3}


def run_as_main(module) -> None:
    """The file itself as __main__ with its flags on the command line, in the folder that a person would be in."""
    skip_measuring(module)
    folder, *arguments = json.loads(os.environ["AS_MAIN"])
    os.chdir(folder)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit(0)


@pytest.fixture(params=["forked", pytest.param("python", marks=pytest.mark.full)])
def start(request, launcher):
    """start(folder, script, *flags): what `cd folder && python script flags` prints.

    By default from a server that has imported torch already; the long test starts the interpreter itself.
    """

    def run(folder: Path, script: str, *flags: str) -> str:
        if request.param == "forked":
            env = {"AS_MAIN": json.dumps([str(folder), script, *flags])}
            return launcher.run("train_pretrain", [], env=env, patches=[run_as_main])
        done = subprocess.run(
            [sys.executable, script, *flags], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def test_the_whole_chain(start, tmp_path, tokenizer):
    """pretrain -> SFT -> LoRA -> DPO -> reason -> distillation from a larger teacher -> eval in every mode.

    No stage is told where its weights lie: it finds what the one before it left in out/.
    """
    out, data = tmp_path / "out", {}
    for kind, count in (("pretrain", 60), ("conversation", 60), ("reasoning", 60), ("preference", 40)):
        data[kind] = write_data(kind, tmp_path / f"{kind}.jsonl", count=count)
    printed = {}

    def train(stage, **flags) -> None:
        flags = {"max_seq_len": 128, "epochs": 3} | flags
        line = tiny_flags(out, data[stage.data], **flags)
        printed[stage] = start(ROOT / "trainer", f"{stage.script}.py", *line)

    for sizes in (TEACHER, {}):
        train(PRETRAIN, **sizes)
        train(FULL_SFT, **sizes)
    train(LORA)
    train(DPO, learning_rate=3e-4)
    train(REASON)
    train(DISTILLATION, teacher_hidden_size=48, epochs=5)

    # each started from the weights of the one before it
    for stage in STAGES[1:]:
        assert f"{out / stage.base}_32.pth" in printed[stage]
    assert f"teacher {out / 'full_sft_48.pth'}" in printed[DISTILLATION]

    # files: the weights, which the next stage found, and beside each what it is
    names = {f"{stage.name()}" for stage in STAGES} | {"pretrain_48", "full_sft_48"}
    files = {str(path.relative_to(out)) for path in out.rglob("*") if "token_cache" not in path.parts}
    files = {name for name in files if not name.endswith(".lock")}  # one for each run
    kinds = ("{}.pth", "{}.json", "logs/{}.jsonl", "resume/{}.resume")
    folders = {"lora", "logs", "logs/lora", "resume", "resume/lora"}
    assert files == {kind.format(name) for name in names for kind in kinds} | folders
    keys = torch.load(out / "pretrain_32.pth").keys()
    for stage in STAGES:
        state, sidecar = torch.load(out / f"{stage.name()}.pth"), read_sidecar(out / f"{stage.name()}.pth")
        assert sidecar["stage"] == stage.stem and sidecar["progress"]["complete"]
        assert sidecar["tokenizer_sha256"] == tokenizer.sha256 and sidecar["config"]["hidden_size"] == 32
        if stage is not LORA:
            assert state.keys() == keys
        assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in state.values())

    # each learnt what it is for
    first, last = ({stage: read_log(out, stage.name())[i] for stage in STAGES} for i in (0, -1))
    for stage in STAGES:
        assert last[stage]["loss"] < first[stage]["loss"] - 0.01, stage
    assert first[DPO]["reward_margin"] == pytest.approx(0, abs=1e-4) and last[DPO]["reward_margin"] > 0.05
    assert last[DISTILLATION]["kl"] < first[DISTILLATION]["kl"]

    # chat with all of them
    flags = ["--out_dir", str(out), "--hidden_size", "32", "--device", "cpu"]
    flags += ["--temperature", "0", "--max_new_tokens", "4", "--prompt", "the old king"]
    for mode, stage in enumerate((PRETRAIN, FULL_SFT, DPO, REASON, DISTILLATION)):
        printed = start(ROOT, "eval_model.py", "--model_mode", str(mode), *flags)
        assert f"{out / stage.name()}.pth: " in printed and "tokens/s" in printed
    printed = start(ROOT, "eval_model.py", "--model_mode", "1", "--lora_name", "lora_medical", *flags)
    assert f"{out / FULL_SFT.name()}.pth" in printed and "lora_medical_32.pth" in printed and "tokens/s" in printed


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_originals_minimind3_goes_through_the_stages(start, tmp_path, kind):
    """A file without a sidecar: SFT with tools -> LoRA -> DPO -> chat, server with tools, export to Qwen3."""
    out, names = tmp_path / "out", f"64{'_moe' if kind == 'moe' else ''}"
    shutil.copy(Path(__file__).parent / "compat3" / f"{kind}.pth", tmp_path / "their.pth")
    # a tokenizer of as many ids as the file has: the bytes, and tokens that no text becomes
    vocabulary = json.loads((ROOT / "model" / "tokenizer.json").read_text("utf-8"))
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)[:640]
    vocabulary["model"] |= {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1+1"}}}
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "calculator"}}]
    records = write_jsonl(tmp_path / "tools.jsonl", [{"conversations": turns, "tools": tools}] * 8)
    pairs = write_data("preference", tmp_path / "pairs.jsonl", count=8)
    where = ["--out_dir", str(out), "--tokenizer_path", str(tmp_path / "tokenizer"), "--device", "cpu"]
    where += ["--hidden_size", "64", *["--use_moe"] * (kind == "moe")]
    flags = [*where, "--max_seq_len", "768", "--batch_size", "2", "--max_steps", "2", "--dtype", "float32"]
    for stage, data, more in (
        (FULL_SFT, records, ("--base_weight", str(tmp_path / "their.pth"))),
        (LORA, records, ("--lora_name", "tools")),
        (DPO, pairs, ()),
    ):
        start(ROOT / "trainer", f"{stage.script}.py", *flags, "--data_path", str(data), *more)
    config = read_sidecar(out / f"rlhf_{names}.pth")["config"]
    assert config["qk_norm"] and config["rms_norm_eps"] == 1e-6 and config["n_shared_experts"] == 0
    chat = ["--model_mode", "2", "--temperature", "0", "--max_new_tokens", "4", "--prompt", "hello"]
    assert f"{out / f'rlhf_{names}.pth'}: " in start(ROOT, "eval_model.py", *where, *chat)
    printed = start(ROOT, "scripts/eval_toolcall.py", *where, "--model_mode", "2", "--data_path", str(records))
    assert "8 conversations" in printed and "right answer: " in printed
    more = ["--input", str(out / f"rlhf_{names}.pth"), "--output", str(tmp_path / "hf"), *where[2:4]]
    start(ROOT, "scripts/convert_model.py", *more)
    exported = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    assert exported["model_type"] == ("qwen3" if kind == "dense" else "qwen3_moe")
