"""Resuming: a run that was killed at any instant ends as if it had never stopped, and never goes on as another run."""

import functools
import importlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    DISTILLATION,
    DPO,
    FULL_SFT,
    GRPO,
    LORA,
    PRETRAIN,
    REASON,
    STAGES,
    assert_identical,
    each_stage,
    read_log,
    read_resume,
    relative_error,
    replace_step,
    tiny_flags,
    write_texts,
    write_weights,
)

from model.model_minimind import MiniMindConfig
from model.weights import WeightsError, save_weights
from scripts import convert_model
from trainer import checkpoint, frozen_outputs
from trainer.arguments import FREE_ON_RESUME, parse_arguments, stage_parser
from trainer.checkpoint import Checkpoint, Progress, refuse_other_weights, result_flags
from trainer.distributed import Process

MOMENTS = random.Random(0)


def noisy_slow_steps(module) -> None:
    """Steps that depend on every random number generator, and that leave time to be killed in."""
    import numpy

    def make(take_step):
        def step(training, lr):
            time.sleep(0.02)
            noise = random.random() + numpy.random.rand() + numpy.random.randn()
            for parameter in filter(lambda p: p.requires_grad, training.model.parameters()):
                parameter.grad.add_(torch.randn_like(parameter), alpha=1e-3 * noise)
            return take_step(training, lr)

        return step

    replace_step(make)


def killed_at_step(number: int, module, by: int = signal.SIGKILL) -> None:
    """The number of a step counts from the start of the process."""

    def make(take_step):
        calls = []

        def step(*arguments):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), by)
            return take_step(*arguments)

        return step

    replace_step(make)


def killed_at_step_4(module) -> None:
    killed_at_step(4, module)


def replace_write(module, make) -> None:
    """Every weight file is then written by make(the stage's own function)."""

    class Checkpoint(module.Checkpoint):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.write = make(self.write)

    module.Checkpoint = Checkpoint


def killed_before_the_last_save_of_weights(module) -> None:
    def make(write):
        def save(path, model, sidecar):
            if sidecar["progress"]["complete"]:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, model, sidecar)

        return save

    replace_write(module, make)


def killed_after_the_last_save_of_weights(module) -> None:
    def make(write):
        def save(path, model, sidecar):
            write(path, model, sidecar)
            if sidecar["progress"]["complete"]:
                os.kill(os.getpid(), signal.SIGKILL)

        return save

    replace_write(module, make)


def assert_same_end(ours, theirs, name: str = "pretrain_32") -> None:
    """Weights, optimizer, position and random numbers to the last bit, and the weight files."""
    assert_identical(read_resume(ours, name), read_resume(theirs, name))
    assert_identical(torch.load(ours / f"{name}.pth"), torch.load(theirs / f"{name}.pth"))
    half = {key: weight.half() for key, weight in read_resume(ours, name)["model"].items()}
    assert_identical(torch.load(ours / f"{name}.pth"), half)


def check_interrupted(launcher, tmp_path, script, interrupt, name="pretrain_32", patches=(noisy_slow_steps,), **flags):
    """interrupt(start) stops the run as often as it likes, each time start()-ed with --resume; then it runs to the end.
    Returns what it says at last."""

    def start(*more):
        return launcher.start(script, line, patches=[*patches, *more])

    flags = {"save_interval": 2} | flags
    launcher.run(script, tiny_flags(tmp_path / "whole", **flags), patches=patches)
    line = [*tiny_flags(tmp_path / "parts", **flags), "--resume"]
    interrupt(start)
    printed = launcher.run(script, line, patches=patches)
    assert_same_end(tmp_path / "parts", tmp_path / "whole", name)
    return printed


def stopped_three_times(start) -> None:
    """Twice killed after a step that was not saved, then told to stop: that saves step 7."""
    for by, step, said in (
        (signal.SIGKILL, 4, "from the beginning"),
        (signal.SIGKILL, 4, "at step 2; going on"),
        (signal.SIGTERM, 3, "at step 4; going on"),
    ):
        child = start(functools.partial(killed_at_step, step, by=by))
        assert child.wait() == (-by if by == signal.SIGKILL else 128 + by) and said in child.output, child.output


def test_killed_runs_end_bit_identical(launcher, tmp_path, texts):
    flags = {"data_path": texts, "epochs": 2}
    printed = check_interrupted(launcher, tmp_path, "train_pretrain", stopped_three_times, **flags)
    assert "at step 7; going on" in printed


@pytest.mark.parametrize(
    "stage, use_moe",
    [
        pytest.param(LORA, False, id="train_lora"),
        pytest.param(DPO, False, id="train_dpo"),
        pytest.param(REASON, False, id="train_distill_reason", marks=pytest.mark.full),
        pytest.param(DISTILLATION, True, id="train_distillation-moe"),
    ],
)
def test_a_killed_run_of_every_stage_ends_bit_identical(launcher, tmp_path, inputs, stage, use_moe):
    """Killed at the fourth step, two after the last save."""
    flags = inputs(stage, use_moe) | {"save_interval": 2}
    if stage is DISTILLATION:
        flags["cache_teacher"] = 20
    launcher.run(stage.script, tiny_flags(tmp_path / "whole", **flags), patches=[noisy_slow_steps])
    line = tiny_flags(tmp_path / "parts", **flags)
    child = launcher.start(stage.script, line, patches=[noisy_slow_steps, killed_at_step_4])
    assert child.wait() == -signal.SIGKILL, child.output
    printed = launcher.run(stage.script, [*line, "--resume"], patches=[noisy_slow_steps])
    assert "is at step 2; going on" in printed
    assert_same_end(tmp_path / "parts", tmp_path / "whole", stage.name(use_moe))


def check_files(folder) -> None:
    """Whatever has its final name is whole."""
    for path in folder.rglob("*"):
        if path.suffix in (".pth", ".resume"):
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text("utf-8"))


def kill_at_random(launcher, script, line, seconds: float, times: int, folder, patches=()) -> None:
    moments = [MOMENTS.uniform(0, seconds) for _ in range(times)]
    print(moments)
    for moment in moments:
        child = launcher.start(script, line, patches=patches)
        time.sleep(moment)
        child.signal(signal.SIGKILL)
        assert child.wait() in (-signal.SIGKILL, 0), child.output
        check_files(folder)


@pytest.mark.full
@each_stage()
def test_killed_at_any_moment_nothing_is_half_written(launcher, tmp_path, inputs, stage):
    """Fourteen kills of each stage: while it builds its cache, asks the frozen model, trains or saves."""
    flags = inputs(stage) | {"save_interval": 1}
    started = time.monotonic()
    launcher.run(stage.script, tiny_flags(tmp_path / "whole", **flags))
    seconds = time.monotonic() - started
    line = [*tiny_flags(tmp_path / "parts", **flags), "--resume"]
    (tmp_path / "parts").mkdir()
    kill_at_random(launcher, stage.script, line, seconds, 14, tmp_path / "parts")
    launcher.run(stage.script, line)
    assert_same_end(tmp_path / "parts", tmp_path / "whole", stage.name())


def converts(module) -> None:
    module.main = convert_model.main


@pytest.mark.full
def test_a_conversion_killed_at_any_moment_leaves_nothing_half_written(launcher, tmp_path, tokenizer):
    weights = write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    for number, kind in enumerate(("llama", "gguf")):
        target = tmp_path / str(number) / (f"m.{kind}" if kind == "gguf" else "m")
        line = ["--input", str(weights), "--to", kind, "--output", str(target)]
        started = time.monotonic()
        launcher.run("train_pretrain", line, patches=[converts])
        seconds = time.monotonic() - started
        whole = {path.name: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()}
        for _ in range(8):
            shutil.rmtree(target.parent, ignore_errors=True)
            kill_at_random(launcher, "train_pretrain", line, seconds, 1, tmp_path, [converts])
            left = {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()}
            left |= {target.name: target.read_bytes()} if target.is_file() else {}
            assert not left or left.items() <= whole.items(), sorted(left)
        shutil.rmtree(target.parent, ignore_errors=True)
        launcher.run("train_pretrain", line, patches=[converts])


@pytest.mark.full
@pytest.mark.parametrize("shared", ["out_dir", "cache_dir"])
def test_two_runs_started_together_fifteen_times(launcher, tmp_path, inputs, shared):
    """With one out_dir they run one after the other, or one is refused by name; with one cache both run."""
    flags = inputs(DPO)
    launcher.run("train_dpo", tiny_flags(tmp_path / "alone", **flags))
    for number in range(15):
        folder = tmp_path / str(number)
        outs = [folder / "a", folder / ("a" if shared == "out_dir" else "b")]
        lines = [[*tiny_flags(out, **flags), f"--cache_dir={folder / 'cache'}"] for out in outs]
        children = [launcher.start("train_dpo", line) for line in lines]
        ended = [child.wait() for child in children]
        said = [child.output for child in children]
        if shared == "out_dir" and 1 in ended:
            assert "another process is training" in said[ended.index(1)], said
            ended.remove(1)
        assert set(ended) == {0}, said
        for out in outs:
            assert_same_end(out, tmp_path / "alone", "rlhf_32")


@pytest.mark.full
@pytest.mark.parametrize("use_moe, optimizer", [(False, "muon"), (True, "adamw")])
@each_stage()
def test_runs_killed_ten_times_end_bit_identical(launcher, tmp_path, inputs, stage, use_moe, optimizer):
    flags = inputs(stage, use_moe) | {"epochs": 8, "batch_size": 2, "accumulation_steps": 2, "optimizer": optimizer}
    stops = [(MOMENTS.choice([signal.SIGKILL] * 4 + [signal.SIGTERM]), MOMENTS.uniform(0, 0.5)) for _ in range(9)]
    print(stops)

    def interrupt(start):
        assert start(killed_at_step_4).wait() == -signal.SIGKILL
        children = []
        for number, delay in stops:
            children.append(child := start())
            child.wait_for("at step ")
            time.sleep(delay)
            child.signal(number)
            # it may be through already, or not in its loop yet, where SIGTERM kills
            assert child.wait() in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0), child.output
        assert "going on" in children[0].output

    check_interrupted(launcher, tmp_path, stage.script, interrupt, stage.name(use_moe), **flags)


@pytest.mark.full
@each_stage()
def test_two_processes_killed_end_bit_identical(launcher, tmp_path, inputs, stage):
    flags = inputs(stage) | {"epochs": 3, "batch_size": 2, "save_interval": 1, "resume": True}
    launcher.run(stage.script, tiny_flags(tmp_path / "whole", **flags), 2)
    line = tiny_flags(tmp_path / "parts", **flags)
    for step, said in ((3, "from the beginning"), (4, "at step 2; going on"), (2, "at step 5; going on")):
        patches = [functools.partial(killed_at_step, step)]
        children = launcher.start_ranks(2, stage.script, line, patches=patches)
        assert -signal.SIGKILL in [child.wait() for child in children], children[0].output
        assert said in children[0].output
    assert "at step 6; going on" in launcher.run(stage.script, line, 2)
    assert_same_end(tmp_path / "parts", tmp_path / "whole", stage.name())


@pytest.mark.full
def test_bit_identical_on_two_threads_in_bfloat16(launcher, tmp_path, texts):
    flags = {"data_path": texts, "epochs": 3, "dtype": "bfloat16", "hidden_size": 64, "num_workers": 1}
    flags["patches"] = [noisy_slow_steps, two_threads]
    printed = check_interrupted(launcher, tmp_path, "train_pretrain", stopped_three_times, "pretrain_64", **flags)
    assert "at step 7; going on" in printed


def two_threads(module) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("moment", [killed_before_the_last_save_of_weights, killed_after_the_last_save_of_weights])
@each_stage(PRETRAIN)
def test_killed_between_the_two_files_of_the_last_save(launcher, tmp_path, inputs, stage, moment):
    """Whichever was written first, the weight file must be the finished one in the end."""
    flags = inputs(stage)
    line = tiny_flags(tmp_path / "parts", **flags, save_interval=4)
    assert launcher.start(stage.script, line, patches=[moment]).wait() == -signal.SIGKILL
    launcher.run(stage.script, [*line, "--resume"])
    launcher.run(stage.script, tiny_flags(tmp_path / "whole", **flags))
    assert_same_end(tmp_path / "parts", tmp_path / "whole", stage.name())
    sidecar = json.loads((tmp_path / "parts" / f"{stage.name()}.json").read_text())
    assert sidecar["progress"]["complete"] is True


@each_stage(PRETRAIN)
def test_resumed_on_another_number_of_processes(launcher, tmp_path, inputs, stage):
    """accumulation_steps gives way, so that the global batch stays as it was."""
    whole, parts, name = tmp_path / "whole", tmp_path / "parts", stage.name()
    flags = inputs(stage) | {"batch_size": 2, "accumulation_steps": 4, "save_interval": 1, "optimizer": "adamw"}
    launcher.run(stage.script, tiny_flags(whole, **flags))
    line = tiny_flags(parts, **flags)
    assert launcher.start(stage.script, line, patches=[killed_at_step_4]).wait() == -signal.SIGKILL
    printed = launcher.run(stage.script, [*line, "--resume"], 2)
    assert "is at step 3; going on" in printed and "1 -> 2 processes; accumulation_steps is now 2" in printed
    assert relative_error(read_resume(parts, name)["model"], read_resume(whole, name)["model"]) < 1e-5
    ours, theirs = (read_resume(folder, name)["optimizer"]["state"] for folder in (parts, whole))
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = [{str(key): state[moment] for key, state in states.items()} for states in (ours, theirs)]
        assert relative_error(*moments) < 1e-5
    for line, expected in zip(read_log(parts, name)[-2:], read_log(whole, name)[-2:], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


# --- stopped before training starts ----------------------------------------------------------------------------------

FROZEN_PASSES = pytest.mark.parametrize(
    "stage, flags",
    [pytest.param(DPO, {}, id="reference"), pytest.param(DISTILLATION, {"cache_teacher": 20}, id="teacher")],
)


def flush_every_batch(module) -> None:
    """What a frozen model says is on disk after every batch instead of every 20 seconds."""
    frozen_outputs.FLUSH_SECONDS = -1


def print_frozen_batches(module) -> None:
    write = frozen_outputs.FrozenOutputs.write
    frozen_outputs.FrozenOutputs.write = lambda *arguments, **arrays: print("batch") or write(*arguments, **arrays)


def killed_after_three_frozen_batches(module, by: int = signal.SIGKILL) -> None:
    flush_every_batch(module)
    write, calls = frozen_outputs.FrozenOutputs.write, []

    def counted(*arguments, **arrays):
        write(*arguments, **arrays)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), by)

    frozen_outputs.FrozenOutputs.write = counted


@FROZEN_PASSES
def test_killed_while_the_frozen_model_is_asked(launcher, tmp_path, inputs, stage, flags):
    """With --resume the run starts from the beginning, and asks only what is not on disk; it ends bit-identical."""
    flags = inputs(stage) | flags
    line = tiny_flags(tmp_path / "parts", **flags)
    child = launcher.start(stage.script, line, patches=[killed_after_three_frozen_batches])
    assert child.wait() == -signal.SIGKILL, child.output
    assert not list((tmp_path / "parts").rglob("*.pth"))
    printed = launcher.run(stage.script, [*line, "--resume"], patches=[print_frozen_batches])
    assert "nothing is saved" in printed and "from the beginning" in printed
    whole = launcher.run(stage.script, tiny_flags(tmp_path / "whole", **flags), patches=[print_frozen_batches])
    assert printed.count("batch\n") == whole.count("batch\n") - 3 > 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole", stage.name())


@pytest.mark.parametrize(
    "stage, flags, number",
    [
        pytest.param(DPO, {}, signal.SIGINT, id="reference-SIGINT"),
        pytest.param(DISTILLATION, {"cache_teacher": 20}, signal.SIGTERM, id="teacher-SIGTERM"),
    ],
)
def test_a_signal_while_the_frozen_model_is_asked(launcher, tmp_path, inputs, stage, flags, number):
    """It ends at once, with a bad status; nothing but what is kept of the frozen model is there to go on with."""
    line = tiny_flags(tmp_path, **inputs(stage) | flags)
    patches = [functools.partial(killed_after_three_frozen_batches, by=number)]
    child = launcher.start(stage.script, line, patches=patches)
    assert child.wait() in (-signal.SIGTERM, 128 + signal.SIGINT) and "Traceback" not in child.output
    assert {path.name for path in tmp_path.iterdir()} == {"token_cache", "resume"}
    assert [path.suffix for path in (tmp_path / "resume").iterdir()] == [".lock"]
    printed = launcher.run(stage.script, [*line, "--resume"], patches=[print_frozen_batches])
    assert 0 < printed.count("batch\n") < 10 and "is ready" in printed


# --- what may change on resume, and what may not ---------------------------------------------------------------------


def test_without_an_interval_saving_takes_at_most_a_thirtieth_of_the_time(monkeypatch):
    alone = Process(0, 0, 1, torch.device("cpu"))
    now = SimpleNamespace(args=SimpleNamespace(save_interval=None), process=alone, _saved_at=1000, _save_seconds=2)
    for seconds, due in ((59, False), (61, True)):
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda seconds=seconds: 1000 + seconds)
        assert Checkpoint.due(now, Progress(step=300)) == due
        assert Checkpoint.due(now, Progress(step=301, complete=True)) and not Checkpoint.due(now, Progress(step=301))
    now.args.save_interval, now._save_seconds = 7, 10**6
    assert Checkpoint.due(now, Progress(step=14)), "as often as the user says"


@pytest.fixture
def finished(train, tmp_path, texts):
    """A finished run, its flags, and what to give instead of them."""
    train("train_pretrain", tiny_flags(tmp_path, texts))
    return lambda **changes: tiny_flags(tmp_path, **{"data_path": texts, "resume": True} | changes)


def contents(folder) -> dict:
    files = [path for path in folder.rglob("*") if path.suffix in (".pth", ".json", ".resume", ".npy", ".safetensors")]
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@each_stage()
def test_a_complete_run_says_so_and_leaves_its_files_alone(train, tmp_path, inputs, stage, capsys):
    flags = inputs(stage) | {"max_steps": 2}
    if stage is DISTILLATION:
        flags["cache_teacher"] = 5
    train(stage.script, tiny_flags(tmp_path, **flags))
    before = contents(tmp_path)
    own = {f"{stage.name()}.pth", f"{stage.name()}.json", f"resume/{stage.name()}.resume"}
    assert own <= {str(path) for path in before}
    capsys.readouterr()
    train(stage.script, tiny_flags(tmp_path, **flags, resume=True))
    printed = capsys.readouterr().out
    assert "is at step 2; the run is complete; nothing to do" in printed and "Epoch" not in printed
    assert contents(tmp_path) == before


def test_a_scaler_that_the_saved_run_did_not_need(train, finished, monkeypatch, capsys):
    """A run in bfloat16 goes on in float16 on a GPU without bfloat16."""
    from trainer import training

    class WithScaler(training.Precision):
        def __init__(self, name, device):
            super().__init__(name, device)
            self.scaler = torch.amp.GradScaler(device.type, enabled=True)

    monkeypatch.setattr(training, "Precision", WithScaler)
    train("train_pretrain", finished())
    assert "complete" in capsys.readouterr().out


def test_nothing_saved_yet(train, tmp_path, texts, capsys):
    train("train_pretrain", tiny_flags(tmp_path / "a", texts, resume=True))
    printed = capsys.readouterr().out
    assert "nothing is saved" in printed and "from the beginning" in printed and "(1/10)" in printed
    train("train_pretrain", tiny_flags(tmp_path / "b", texts))
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_without_resume_a_run_starts_anew_and_says_what_it_replaces(train, tmp_path, texts, finished, capsys):
    before = contents(tmp_path)[Path("pretrain_32.pth")][0]
    train("train_pretrain", finished(resume=False, seed=7))
    printed = capsys.readouterr().out
    assert "pretrain_32.resume" in printed and "replace" in printed
    assert contents(tmp_path)[Path("pretrain_32.pth")][0] != before


@pytest.fixture
def unfinished(broken_off, tmp_path, texts):
    """A run that broke off in its fourth step, saved after the second, and its flags."""
    flags = tiny_flags(tmp_path, texts, save_interval=2)
    broken_off("train_pretrain", flags, 4)
    return flags


def test_an_unfinished_run_is_not_replaced_unasked(train, tmp_path, texts, unfinished, capsys):
    """Refused before the data is read, with both ways out, and both work."""
    before = contents(tmp_path)
    said = r"pretrain_32.resume holds step 2 of an unfinished run: .*--resume.*--overwrite"
    with pytest.raises(ValueError, match=said):
        train("train_pretrain", [*unfinished, "--data_path=nowhere.jsonl"])
    assert contents(tmp_path) == before
    train("train_pretrain", [*unfinished, "--resume"])
    train("train_pretrain", tiny_flags(tmp_path / "whole", texts))
    assert_same_end(tmp_path, tmp_path / "whole")
    train("train_pretrain", unfinished)  # a finished run may be made again


def test_what_a_replaced_run_left_is_not_resumed(train, unfinished, broken_off, capsys):
    """The new run breaks off before its first save."""
    broken_off("train_pretrain", [*unfinished, "--overwrite", "--seed=7"], 1)
    capsys.readouterr()
    train("train_pretrain", [*unfinished, "--resume"])
    assert "nothing is saved" in capsys.readouterr().out


def test_an_unfinished_run_is_replaced_when_asked(train, tmp_path, texts, unfinished):
    train("train_pretrain", [*unfinished, "--overwrite"])
    train("train_pretrain", tiny_flags(tmp_path / "whole", texts))
    assert_same_end(tmp_path, tmp_path / "whole")


def test_a_state_that_cannot_be_read_is_not_replaced_unasked(train, tmp_path, texts):
    state = tmp_path / "resume" / "pretrain_32.resume"
    state.parent.mkdir()
    state.write_bytes(b"half a state")
    with pytest.raises(ValueError, match="pretrain_32.resume cannot be read: .*--overwrite"):
        train("train_pretrain", tiny_flags(tmp_path, texts))
    assert state.read_bytes() == b"half a state"


def test_two_runs_of_one_name_exclude_each_other(launcher, train, tmp_path, texts, monkeypatch):
    """Two processes of one run do not; another name in the same folder is another run."""
    flags = tiny_flags(tmp_path, texts, epochs=200, batch_size=2, save_interval=1)
    ranks = launcher.start_ranks(2, "train_pretrain", flags)
    ranks[0].wait_for("(3/")
    monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 0)
    for more in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(ValueError, match="another process is training .*pretrain_32.pth.*--out_dir"):
            train("train_pretrain", [*flags, *more])
    train("train_pretrain", [*flags, "--hidden_size=48", "--max_steps=1"])
    ranks[0].signal(signal.SIGTERM)
    assert [child.wait() for child in ranks] == [128 + signal.SIGTERM] * 2, ranks[0].output
    train("train_pretrain", [*flags, "--overwrite", "--max_steps=1"])


@pytest.mark.parametrize("out_dir", ["file/out", "x" * 300])
def test_an_output_folder_that_cannot_be_made(train, tmp_path, texts, out_dir):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write to .*--out_dir"):
        train("train_pretrain", tiny_flags(tmp_path / out_dir, texts))


def test_a_flag_newer_than_the_state_counts_as_its_default(train, tmp_path, texts, unfinished):
    path = tmp_path / "resume" / "pretrain_32.resume"
    state = torch.load(path, weights_only=True)
    assert state["flags"].pop("lr_schedule") == "cosine" and state["flags"].pop("decay_ratio") == 0.2
    torch.save(state, path)
    with pytest.raises(ValueError, match="would not be the run.*: --lr_schedule was None, is wsd. Give"):
        train("train_pretrain", [*unfinished, "--resume", "--lr_schedule=wsd"])
    train("train_pretrain", [*unfinished, "--resume"])
    train("train_pretrain", tiny_flags(tmp_path / "whole", texts, save_interval=2))
    assert_same_end(tmp_path, tmp_path / "whole")


def test_flags_that_change_the_result_are_listed_all(train, tmp_path, finished):
    before = contents(tmp_path)
    with pytest.raises(ValueError) as caught:
        train("train_pretrain", finished(learning_rate=1e-3, grad_clip=0.5, seed=8, dtype="bfloat16"))
    message = str(caught.value)
    for said in ("--learning_rate was 0.002, is 0.001", "--grad_clip was 1.0, is 0.5", "--seed was 1337, is 8"):
        assert said in message
    assert "--dtype was float32" in message and "pretrain_32.resume" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name, value",
    [("epochs", 2), ("max_steps", 3), ("max_seq_len", 48), ("warmup_iters", 1), ("min_lr_ratio", 0.5), ("beta1", 0.5)]
    + [("beta2", 0.5), ("weight_decay", 0.0), ("grad_clip", 0.5), ("optimizer", "sgd"), ("skip_bad_lines", True)],
)
def test_every_flag_that_changes_the_result_is_compared(train, finished, name, value):
    with pytest.raises(ValueError, match=f"--{name} was"):
        train("train_pretrain", finished(**{name: value}))


@pytest.mark.parametrize(
    "stage, changes",
    [
        pytest.param(LORA, {"lora_rank": 4, "lora_alpha": 2.0, "lora_targets": "q_proj"}, id="train_lora"),
        pytest.param(DPO, {"beta": 0.2, "logp": "mean", "label_smoothing": 0.1}, id="train_dpo"),
        pytest.param(REASON, {"tag_weight": 3.0}, id="train_distill_reason"),
        pytest.param(DISTILLATION, {"alpha": 0.2, "temperature": 3.0, "cache_teacher": 3}, id="train_distillation"),
    ],
)
def test_flags_of_a_stage_are_compared_too(train, tmp_path, inputs, stage, changes):
    flags = inputs(stage) | {"max_steps": 1}
    train(stage.script, tiny_flags(tmp_path, **flags))
    before = {path: content for path, content in contents(tmp_path).items() if "token_cache" not in path.parts}
    with pytest.raises(ValueError) as caught:
        train(stage.script, tiny_flags(tmp_path, **flags | changes, resume=True))
    for name, value in changes.items():
        assert f"--{name} was" in str(caught.value) and f"is {value}" in str(caught.value)
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize(
    "stage, flag, said",
    [
        (LORA, "base_weight", "base"),
        (DPO, "reference_weight", "reference"),
        (DISTILLATION, "teacher_weight", "teacher"),
    ],
)
def test_other_frozen_weights_are_refused(train, tmp_path, inputs, tokenizer, stage, flag, said):
    """Also under the same name."""
    frozen = write_weights(tmp_path / "frozen.pth", tokenizer, seed=5)
    line = tiny_flags(tmp_path, **inputs(stage) | {"max_steps": 1, flag: frozen})
    train(stage.script, line)
    write_weights(frozen, tokenizer, seed=6)
    with pytest.raises(ValueError, match=f"would not be the run.*{said} was [0-9a-f]+, is [0-9a-f]+"):
        train(stage.script, [*line, "--resume"])


@pytest.mark.parametrize("stage", [FULL_SFT, DPO, REASON, DISTILLATION], ids=lambda stage: stage.script)
def test_a_base_that_was_trained_again_is_not_taken_for_the_old_one(train, tmp_path, inputs, tokenizer, stage):
    base = write_weights(tmp_path / "base.pth", tokenizer, seed=5)
    line = tiny_flags(tmp_path, **inputs(stage) | {"max_steps": 1, "base_weight": base})
    train(stage.script, line)
    write_weights(base, tokenizer, seed=6)
    with pytest.raises(ValueError, match="would not be the run.*base was [0-9a-f]+, is [0-9a-f]+"):
        train(stage.script, [*line, "--resume"])


def test_weights_may_be_trained_further_in_their_own_file(train, tmp_path, inputs, tokenizer):
    base = write_weights(tmp_path / "full_sft_32.pth", tokenizer, seed=5)
    line = tiny_flags(tmp_path, **inputs(FULL_SFT) | {"max_steps": 1, "base_weight": base, "overwrite": True})
    train(FULL_SFT.script, line)
    train(FULL_SFT.script, [*line, "--overwrite=false", "--resume"])


@pytest.mark.parametrize(
    ("stage", "flag", "said"),
    [(DPO, "base_weight", "reference"), (DISTILLATION, "teacher_weight", "teacher")],
)
def test_frozen_weights_are_not_replaced_by_the_result(train, tmp_path, inputs, tokenizer, stage, flag, said):
    frozen = write_weights(tmp_path / f"{stage.name()}.pth", tokenizer, seed=5)
    flags = inputs(stage) | {flag: frozen, "overwrite": True}
    flags.pop("reference_weight", None)  # then it is the base
    before = frozen.read_bytes()
    with pytest.raises(ValueError, match=f"is the {said} of this run and would be replaced"):
        train(stage.script, tiny_flags(tmp_path, **flags))
    assert frozen.read_bytes() == before


def test_on_another_number_of_processes_no_answer_of_the_reference_is_missing(train, tmp_path, inputs, broken_off):
    """Two processes took steps of eight pairs; one goes on, and asks the reference again for a part of them."""
    flags = inputs(DPO) | {"batch_size": 2, "accumulation_steps": 4, "max_steps": 4, "save_interval": 2}
    whole = tiny_flags(tmp_path / "whole", **flags)
    train(DPO.script, whole)
    parts = tiny_flags(tmp_path / "parts", **flags)
    broken_off(DPO.script, parts, 4)
    path = tmp_path / "parts" / "resume" / "rlhf_32.resume"
    torch.save(torch.load(path, weights_only=True) | {"ranks": 2}, path)
    fresh = tmp_path / "fresh"
    train(DPO.script, [*parts, "--resume", "--accumulation_steps=2", f"--cache_dir={fresh}"])
    assert_identical(*(read_resume(tmp_path / name, "rlhf_32")["model"] for name in ("parts", "whole")))


def test_every_flag_is_either_free_or_compared():
    """A new flag counts as one that changes the result until it is named as free."""
    # without a value by default
    unset = ["--preset=minimind3", "--lora_alpha=1", "--reference_weight=x.pth", "--teacher_num_hidden_layers=1"]
    flags = set()
    for stage in (*STAGES, GRPO):
        parse = importlib.import_module(f"trainer.{stage.script}").parse
        known = vars(parse(["--data_path=x"])).keys()
        args = parse(["--data_path=x", *[flag for flag in unset if flag[2:].split("=")[0] in known]])
        paths = {"data_path", "valid_path", "tokenizer_path", "out_dir", "cache_dir"}
        assert vars(args).keys() - result_flags(args).keys() - paths <= FREE_ON_RESUME
        flags |= vars(args).keys()
    assert FREE_ON_RESUME <= flags, "names of flags that do not exist"


def test_what_does_not_change_the_result_may_change(launcher, tmp_path, texts):
    whole, parts, valid = tmp_path / "whole", tmp_path / "parts", write_texts(tmp_path / "valid.jsonl", 5, seed=9)
    launcher.run("train_pretrain", tiny_flags(whole, texts, optimizer="adamw"))
    flags = {"save_interval": 1, "accumulation_steps": 2, "optimizer": "adamw"}
    line = tiny_flags(parts, texts, **flags | {"batch_size": 2})
    assert launcher.start("train_pretrain", line, patches=[killed_at_step_4]).wait() == -signal.SIGKILL
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(texts.read_bytes())
    changes = {"save_interval": 3, "log_interval": 5, "eval_interval": 2, "num_workers": 2, "valid_path": valid}
    changes |= {"sample_prompt": "the old king", "gradient_checkpointing": True, "cache_dir": tmp_path / "cache"}
    printed = launcher.run(
        "train_pretrain", tiny_flags(parts, moved, resume=True, accumulation_steps=1, optimizer="adamw", **changes)
    )
    assert "is at step 3; going on" in printed and "held out" in printed
    assert relative_error(read_resume(parts)["model"], read_resume(whole)["model"]) < 1e-5
    assert_identical(read_resume(parts)["rng"], read_resume(whole)["rng"])


def test_other_data_is_refused(train, tmp_path, finished):
    other = write_texts(tmp_path / "other.jsonl", 50, seed=1)
    with pytest.raises(ValueError, match="tokens was .*, is "):
        train("train_pretrain", finished(data_path=other))


def test_data_of_the_same_size_is_told_apart(train, tmp_path, texts, finished):
    lines = texts.read_text("utf-8").splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines[1:] + lines[:1]), encoding="utf-8")
    with pytest.raises(ValueError, match="contents was"):
        train("train_pretrain", finished(data_path=other))


def test_another_tokenizer_is_refused(train, finished, other_tokenizer):
    with pytest.raises(ValueError, match="tokenizer was [0-9a-f]+, is [0-9a-f]+"):
        train("train_pretrain", finished(tokenizer_path=other_tokenizer))


@pytest.mark.parametrize("sizes", [{"batch_size": 8}, {"accumulation_steps": 3}, {"batch_size": 3}])
def test_another_global_batch_is_refused_with_what_to_set(train, finished, sizes):
    with pytest.raises(ValueError) as caught:
        train("train_pretrain", finished(**sizes))
    assert "4 rows per optimizer step" in str(caught.value) and "the product is 4" in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"not a resume state", None])
def test_a_damaged_state_is_a_message(train, tmp_path, finished, damage):
    state = tmp_path / "resume" / "pretrain_32.resume"
    state.write_bytes(state.read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(ValueError, match="pretrain_32.resume is not a resume state.*delete it"):
        train("train_pretrain", finished())


def test_a_failed_save_leaves_the_last_one(train, tmp_path, texts, monkeypatch):
    """The disk is full at the second save: the message says so, and the files are those of the first."""
    import model.weights

    train("train_pretrain", tiny_flags(tmp_path / "short", texts))
    replaced, replace = [], os.replace

    def full(source, target):
        if str(target).endswith((".pth", ".resume")):
            replaced.append(target)
            if len(replaced) > 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(model.weights.os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device.*the previous file is as it was"):
        train("train_pretrain", tiny_flags(tmp_path / "full", texts, save_interval=3))
    monkeypatch.undo()
    assert read_resume(tmp_path / "full")["progress"]["step"] == 3
    half = {key: weight.half() for key, weight in read_resume(tmp_path / "full")["model"].items()}
    assert_identical(torch.load(tmp_path / "full" / "pretrain_32.pth"), half)
    assert not list((tmp_path / "full").rglob("*.tmp"))


# --- weights of another configuration --------------------------------------------------------------------------------


def flags_of(**changes):
    return parse_arguments(stage_parser(""), [f"--{name}={value}" for name, value in changes.items()])


def tiny_weights(path, **fields):
    from model.model_minimind import MiniMindForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MiniMindConfig(**sizes | {"vocab_size": 50} | fields)
    save_weights(path, MiniMindForCausalLM(config), {"config": config.to_diff_dict()})
    return config


@pytest.mark.parametrize(
    "fields",
    [{"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"num_attention_heads": 8}, {"vocab_size": 60}]
    + [{"intermediate_size": 192}],
)
def test_weights_of_another_configuration_are_kept(tmp_path, fields):
    path = tmp_path / "pretrain_32.pth"
    config = tiny_weights(path)
    refuse_other_weights(path, config, flags_of())
    other = MiniMindConfig(**{**config.to_dict(), "intermediate_size": config.intermediate_size, **fields})
    name, value = next(iter(fields.items()))
    with pytest.raises(WeightsError, match=f"{name} {getattr(config, name)} there, {value} here.*--overwrite"):
        refuse_other_weights(path, other, flags_of())
    refuse_other_weights(path, other, flags_of(overwrite=True))


def test_a_file_that_is_no_weight_file_is_kept_too(tmp_path):
    path = tmp_path / "pretrain_32.pth"
    path.write_text("my notes")
    with pytest.raises(WeightsError, match="not a weight file.*--overwrite"):
        refuse_other_weights(path, MiniMindConfig(), flags_of())


def test_another_depth_is_not_replaced(train, tmp_path, texts, finished):
    before = contents(tmp_path)[Path("pretrain_32.pth")]
    with pytest.raises(ValueError, match="num_hidden_layers 2 there, 1 here.*--overwrite"):
        train("train_pretrain", finished(resume=False, num_hidden_layers=1))
    assert contents(tmp_path)[Path("pretrain_32.pth")] == before
    train("train_pretrain", finished(resume=False, num_hidden_layers=1, overwrite=True))
    assert contents(tmp_path)[Path("pretrain_32.pth")] != before
