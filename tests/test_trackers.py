"""--use_swanlab and --use_tensorboard, for real and without a network; --use_wandb has test_wandb.py."""

import importlib.util

import pytest
from conftest import read_log, tiny_flags

from trainer import tracking
from trainer.arguments import parse_arguments, stage_parser

NAMES = ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second", "valid/loss", "valid/sample")


def test_swanlab_offline_keeps_the_same_names_on_disk(launcher, tmp_path, texts):
    pytest.importorskip("swanlab", reason="swanlab is not installed: requirements-cloud.txt")
    flags = {"max_steps": 3, "valid_path": texts, "sample_prompt": "the old king", "eval_interval": 3}
    line = [*tiny_flags(tmp_path, texts, **flags), "--use_swanlab", "--wandb_project=Mine"]
    output = launcher.run("train_pretrain", line, env={"SWANLAB_MODE": "offline"})
    assert "pretrain_32.pth is ready" in output and "note: swanlab failed" not in output
    (run,) = (tmp_path / "swanlab").glob("run-*")
    kept = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert all(name.encode() in kept for name in NAMES) and b"Mine" in kept and b"the old king" in kept


def test_tensorboard_holds_what_the_log_file_holds_and_a_resumed_run_goes_on(
    train, broken_off, tmp_path, texts, monkeypatch
):
    """Broken off after step 3, resumed from step 2: each step is there once."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: requirements-cloud.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"max_steps": 4, "save_interval": 2, "valid_path": texts, "sample_prompt": "the sky", "eval_interval": 2}
    line = [*tiny_flags(tmp_path, texts, **flags), "--use_tensorboard"]
    log = tracking.TensorBoard.log
    monkeypatch.setattr(tracking.TensorBoard, "log", lambda run, *a: log(run, *a) or run.writer.flush())
    broken_off("train_pretrain", line, 4)
    train("train_pretrain", [*line, "--resume"])
    train("train_pretrain", [*line, "--resume"])  # complete: nothing is added
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name == "MiniMind-pretrain_32-Epoch-1-BatchSize-4-LearningRate-0.002"
    events = EventAccumulator(str(folder)).Reload()
    for name in NAMES[:4]:
        field = name.split("/")[1]
        kept = [(event.step, event.value) for event in events.Scalars(name)]
        logged = {record["step"]: record[field] for record in read_log(tmp_path)}
        assert kept == [(step, pytest.approx(logged[step], rel=1e-6)) for step in (1, 2, 3, 4)]
    assert [event.step for event in events.Scalars("valid/loss")] == [2, 4]
    assert "valid/sample/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("name", ["swanlab", "tensorboard"])
def test_not_installed_is_told_with_the_command(monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda wanted: None if wanted == name else find_spec(wanted)
    )
    with pytest.raises(ValueError, match=f"--use_{name}: {name} is not installed; run: pip install {name}"):
        parse_arguments(stage_parser(""), ["--device=cpu", f"--use_{name}"])


def test_swanlab_that_is_not_logged_in_is_told_before_anything_else(launcher, tmp_path, texts):
    pytest.importorskip("swanlab", reason="swanlab is not installed: requirements-cloud.txt")
    env = {
        "SWANLAB_API_KEY": "",
        "SWANLAB_MODE": "online",
        "HOME": str(tmp_path),
        "SWANLAB_SAVE_DIR": str(tmp_path / "home"),
    }
    out = tmp_path / "out"
    child = launcher.start("train_pretrain", [*tiny_flags(out, texts), "--use_swanlab"], env=env)
    assert child.wait() == 1
    assert "error: --use_swanlab: swanlab is not logged in; run `swanlab login`" in child.output
    assert "SWANLAB_MODE=offline" in child.output and "Traceback" not in child.output and not out.exists()
