"""scripts/speedrun.py: every step once, crashed stages resumed, a tiny form of the whole."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_conversations, write_texts, write_weights

from scripts import speedrun

TINY = (
    "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 4 --num_key_value_heads 2 --max_seq_len 64 "
    "--batch_size 4 --accumulation_steps 1 --dtype float32 --device cpu --log_interval 1 --optimizer adamw"
).split()


def write_data(folder: Path) -> list[str]:
    write_texts(folder / "pretrain_hq.jsonl")
    write_conversations(folder / "sft_mini_512.jsonl")
    question = "what colour was the sky when an old king read by his fire and it rained?"
    options = {"A": "grey", "B": "red", "C": "old", "D": "fire"}
    (folder / "set.jsonl").write_text(json.dumps({"question": question, "answer": "A"} | options) + "\n")
    tasks = ["--tasks", str(folder / "set.jsonl")]
    return ["--data_dir", str(folder), "--out_dir", str(folder / "out"), *tasks, *TINY]


def test_a_tiny_run_from_data_to_report_and_again(tmp_path, monkeypatch, capsys):
    """In this process: every script with the flags that it would get."""
    ran = []

    def in_process(title, script, *words, launcher=""):
        ran.append(script)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        module.main([*map(str, words)])
        return 0

    monkeypatch.setattr(speedrun, "run", in_process)
    flags = [*write_data(tmp_path), "--estimate=false", "--max_steps=3", "--price_per_hour=2"]
    speedrun.main(flags)
    stages = ["trainer/train_pretrain.py", "trainer/train_full_sft.py"]
    rest = ["scripts/evaluate.py", "scripts/report.py"]
    assert ran == stages + rest
    page = (tmp_path / "out" / "report" / "report.md").read_text("utf-8")
    assert "| pretrain_32 | complete |" in page and "| full_sft_32 | complete |" in page
    assert page.count("**you:**") == len(speedrun.QUESTIONS) and "$0.0" in page
    assert page.count("| set, letters | 1 | 25.0 |") == 2  # both weights are scored
    assert "eval_model.py --model_mode 1 --hidden_size 32" in capsys.readouterr().out
    ran.clear()
    speedrun.main([*flags, "--max_steps=5"])
    assert ran == rest and "pretrain_32.pth was trained with --max_steps 3 and stays" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="pretrain_32.pth holds weights of another configuration .*num_hidden_layers 1 there, 2"
    ):
        speedrun.main([*flags, "--num_hidden_layers", "2"])
    with pytest.raises(SystemExit, match="another configuration .*qk_norm False there, True here"):
        speedrun.main([*flags, "--size", "minimind3"])


def test_the_flag_for_a_mixture_names_the_weights_that_are_looked_for(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(speedrun, "train", lambda stage, weights, command, args: trained.append((weights, command)))
    monkeypatch.setattr(speedrun, "run", lambda *_, **options: 0)
    monkeypatch.setattr(speedrun, "converse", lambda title, weights, questions: trained.append((weights, [])))
    speedrun.main([*write_data(tmp_path), "--use_moe"])
    assert [weights.name for weights, _ in trained] == ["pretrain_32_moe.pth", *["full_sft_32_moe.pth"] * 2]
    assert trained[0][1][trained[0][1].index("--use_moe") + 1] is True


def test_an_answer_of_several_lines_stays_with_its_question(tmp_path, monkeypatch, tokenizer, capsys):
    weights, questions = write_weights(tmp_path / "full_sft_32.pth", tokenizer), ("如何保持健康？", "1+1等于几？")
    said = ["1. 多喝水\n\n2. 早睡", "2"]
    thought = "<think>\nhm\n</think>\n<answer>\n"
    answers = [[*tokenizer.encode_contents([thought * n + text])[0], tokenizer.eos_id] for n, text in enumerate(said)]
    monkeypatch.setattr(speedrun, "generate_batch", lambda *_, **__: answers)
    speedrun.converse("a conversation", weights, questions)
    kept = json.loads((tmp_path / "report" / "dialogue.json").read_text("utf-8"))["turns"]
    assert kept == [{"you": you, "model": text} for you, text in zip(questions, said, strict=True)]
    assert "model: 1. 多喝水\n\n2. 早睡\n  you:   1+1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "steps, runs, status", [([40, 80, 100], 3, 0), ([0], 1, 1), ([40, 40], 2, 1)], ids=["resumed", "at once", "stuck"]
)
def test_a_crashed_stage_is_resumed_as_long_as_it_gets_ahead(tmp_path, monkeypatch, steps, runs, status):
    weights, commands, left = tmp_path / "pretrain_32.pth", [], list(steps)

    def crash(title, *command, launcher=""):
        commands.append((launcher, *command))
        step = left.pop(0)
        if step:
            weights.touch()
            state = {"step": step, "complete": step == 100}
            weights.with_suffix(".json").write_text(json.dumps({"progress": state}))
        return int(step != 100)

    monkeypatch.setattr(speedrun, "run", crash)
    args = speedrun.argparse.Namespace(estimate=False, launcher="torchrun")
    with contextlib.nullcontext() if not status else pytest.raises(SystemExit, match="before it got beyond"):
        speedrun.train("pretrain", weights, ["trainer/train_pretrain.py"], args)
    assert commands == [("torchrun", "trainer/train_pretrain.py", "--resume")] * runs


def test_ctrl_c_waits_until_the_script_has_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    (tmp_path / "saves.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5)\n    pathlib.Path('saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "os.killpg(0, signal.SIGINT)\ntime.sleep(60)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib; from scripts import speedrun\n"
    code += "speedrun.ROOT = pathlib.Path('.'); speedrun.run('a', 'saves.py'); print('never')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == 1 and "run the same command to go on" in done.stderr and "never" not in done.stdout
    assert (tmp_path / "saved").exists()


@pytest.mark.full
def test_a_killed_stage_goes_on_by_itself(tmp_path):
    """For real: SIGKILL in the middle of pretraining, and one command that ends with the report."""
    flags = [*write_data(tmp_path), "--epochs=12", "--save_interval=5", "--price_per_hour=2"]
    script = [sys.executable, str(ROOT / "scripts" / "speedrun.py"), *flags]
    with (tmp_path / "printed.txt").open("w") as printed, subprocess.Popen(script, stdout=printed) as run:
        log = tmp_path / "out" / "logs" / "pretrain_32.jsonl"
        while run.poll() is None and not (log.exists() and log.read_text().count('"event": "step"') > 12):
            time.sleep(0.05)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
        assert run.wait() == 0
    text = (tmp_path / "printed.txt").read_text("utf-8")
    assert "going on from there" in text and "what it will take" in text and "report: " in text
    page = (tmp_path / "out" / "report" / "report.md").read_text("utf-8")
    assert "resumed once" in page and "--estimate said" in page
