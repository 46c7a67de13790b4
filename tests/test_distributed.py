"""The same training however a global batch is split: at once, accumulated, on several processes. And signals."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

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
    SPEEDS,
    assert_identical,
    each_stage,
    read_log,
    read_resume,
    relative_error,
    replace_step,
    tiny_flags,
    write_data,
)

from trainer import distributed
from trainer.distributed import Process, StopRequest, gather_objects, stop_on_signal, sum_over_ranks
from trainer.training import Training

# batch_size, accumulation_steps, processes: always eight rows per optimizer step
WHOLE, ACCUMULATED, RANKS = (8, 1, 1), (2, 4, 1), (2, 2, 2)
ALONE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def keep_gradients(module) -> None:
    """Saves the gradients of every optimizer step of the first process, before they are clipped."""

    def make(take_step):
        steps = []

        def keep(training, lr):
            trained = [(name, p) for name, p in training.model.named_parameters() if p.requires_grad]
            steps.append({name: parameter.grad.clone() for name, parameter in trained})
            if training.process.is_main:
                torch.save(steps, os.environ["GRADIENTS"])
            return take_step(training, lr)

        return keep

    replace_step(make)


def split_run(launcher, out_dir, stage, split, **flags):
    """Gradients of all steps, the final float32 weights, and the log of a run."""
    batch_size, accumulation_steps, world_size = split
    line = tiny_flags(out_dir, batch_size=batch_size, accumulation_steps=accumulation_steps, **flags)
    gradients = out_dir.with_suffix(".gradients")
    launcher.run(stage.script, line, world_size, env={"GRADIENTS": str(gradients)}, patches=[keep_gradients])
    name = stage.name(flags.get("use_moe", False))
    return torch.load(gradients), read_resume(out_dir, name)["model"], read_log(out_dir, name)


def check_split(launcher, folder, stage, split, whole, tolerance, **flags):
    """The gradients of the first step to 1e-6; everything after it to a tolerance in relative norm."""
    gradients, weights, log = split_run(launcher, folder / "-".join(map(str, split)), stage, split, **flags)
    expected_gradients, expected_weights, expected_log = whole
    assert len(gradients) == len(expected_gradients) == 5
    # later gradients and losses are taken at weights that differ by rounding; where that is the bfloat16 of Muon, a
    # token near the border between two experts may go to the other one
    later = tolerance
    if flags.get("optimizer") == "muon" and flags.get("use_moe"):
        later = 5e-2 if stage == DPO else 2e-2
    for step, (ours, theirs) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert relative_error(ours, theirs) < (1e-6 if step == 0 else later), f"gradients of step {step}"
    assert relative_error(weights, expected_weights) < tolerance
    # how fast, and how a micro-batch of pairs was laid out, may differ
    names = expected_log[0].keys() - SPEEDS - {"event", "padding"}
    for ours, theirs in zip(log, expected_log, strict=True):
        for name in names - {"step", "epoch", "lr"}:
            # margins are near 0, but differences of float32 log-probs, which are not
            size = abs(theirs.get("logp_chosen", 0.0))
            relative, absolute = max(1e-5, later), max(1e-6, later / 10, 1e-7 * size)
            assert ours[name] == pytest.approx(theirs[name], rel=relative, abs=absolute), name
        for name in ("step", "epoch", "lr"):
            assert ours[name] == theirs[name]


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_global_batch_may_be_split_in_any_way(launcher, tmp_path, texts, use_moe):
    """Five steps, the last one ragged. Plain gradient descent shows every gradient in the weights."""
    flags = {"data_path": texts, "optimizer": "sgd", "learning_rate": 0.3, "use_moe": use_moe}
    whole = split_run(launcher, tmp_path / "whole", PRETRAIN, WHOLE, **flags)
    for split in (ACCUMULATED, RANKS):
        check_split(launcher, tmp_path, PRETRAIN, split, whole, 1e-6, **flags)


@pytest.mark.parametrize(
    "stage, use_moe",
    [
        pytest.param(LORA, True, id="train_lora-moe"),
        pytest.param(DPO, False, id="train_dpo"),
        pytest.param(REASON, False, id="train_distill_reason", marks=pytest.mark.full),
        pytest.param(DISTILLATION, True, id="train_distillation-moe"),
    ],
)
def test_two_processes_train_as_one(launcher, tmp_path, inputs, stage, use_moe):
    """Five steps of AdamW, the last one ragged, accumulated too."""
    flags = inputs(stage, use_moe) | {"learning_rate": 1e-3}
    whole = split_run(launcher, tmp_path / "whole", stage, WHOLE, **flags)
    check_split(launcher, tmp_path, stage, RANKS, whole, 1e-5, **flags)


@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True])
@each_stage()
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_every_stage_may_be_split_in_any_way(launcher, tmp_path, inputs, stage, optimizer, use_moe):
    # torch's Muon orthogonalises in bfloat16, which makes more of a difference in rounding
    rate, tolerance = {"sgd": (0.03, 1e-6), "adamw": (1e-3, 1e-5), "muon": (1e-3, 1e-3)}[optimizer]
    plain = stage in (PRETRAIN, FULL_SFT)  # elsewhere small losses, and differences of them: more of them is rounding
    if optimizer == "sgd" and not plain:
        tolerance = 2e-6
    if optimizer == "muon" and (use_moe or not plain):
        tolerance = 5e-3
    flags = inputs(stage, use_moe) | {"optimizer": optimizer, "learning_rate": rate}
    whole = split_run(launcher, tmp_path / "whole", stage, WHOLE, **flags)
    for split in (ACCUMULATED, RANKS, (1, 8, 1), (4, 2, 1), (4, 1, 2), (1, 4, 2)):
        check_split(launcher, tmp_path, stage, split, whole, tolerance, **flags)


@each_stage(PRETRAIN, LORA, DPO, DISTILLATION)
def test_more_processes_than_rows(launcher, tmp_path, inputs, stage):
    """Processes without a row in a step still take part in it, and experts without a token."""
    data = write_data(stage.data, tmp_path / "data.jsonl", count=1, longest=3)
    flags = inputs(stage, use_moe=True) | {"data_path": data, "valid_path": data}
    if stage is DISTILLATION:
        flags["cache_teacher"] = 5
    printed = launcher.run(stage.script, tiny_flags(tmp_path / "out", **flags), 2)
    assert "(1/1)" in printed and "held out" in printed


@pytest.mark.full
def test_torchrun(tmp_path, texts):
    """The real launcher, two processes, the flags that old commands pass."""
    flags = tiny_flags(tmp_path, texts, batch_size=2, accumulation_steps=2, optimizer="adamw")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_pretrain.py"]
    done = subprocess.run(
        [*command, "--ddp", *flags], cwd=ROOT / "trainer", env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("(5/5)") == 1, "only the first process prints"
    whole = tmp_path / "whole"
    single = subprocess.run(
        [sys.executable, "train_pretrain.py", *tiny_flags(whole, texts, batch_size=8, optimizer="adamw")],
        cwd=ROOT / "trainer", env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert single.returncode == 0, single.stderr
    assert relative_error(read_resume(tmp_path)["model"], read_resume(whole)["model"]) < 1e-5


def test_one_process_needs_no_group():
    assert sum_over_ranks([1.0, 2.0], ALONE) == [1.0, 2.0]
    assert gather_objects("this", ALONE) == ["this"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, ()),
        (
            {"learning_rate": 1, "accumulation_steps": 2, "resume": True, "hidden_size": 64, "num_hidden_layers": 3},
            ("--learning_rate is 0.002 in process 0, 1.0 in 1", "--accumulation_steps is 1", "--resume is False",
             "--hidden_size is 32", "--num_hidden_layers is 2", "the result is pretrain_32.pth"),
        ),
        pytest.param({"data_path": "OTHER"}, ("documents is 48 in process 0, 47 in 1",), marks=pytest.mark.full),
        pytest.param(
            {"valid_path": "OTHER"}, ("held-out documents is 48 in process 0, 47 in 1",), marks=pytest.mark.full
        ),
        pytest.param({"valid_path": ""}, ("--valid_path is True in process 0, False in 1",), marks=pytest.mark.full),
    ],
    ids=["the same", "flags", "data", "held-out data", "no held-out data"],
)  # fmt: skip
def test_processes_of_different_runs_are_refused_and_other_folders_are_not(launcher, tmp_path, texts, flags, said):
    """All name what differs. Each machine may have its own disk, and workers as it likes."""
    other, lines = write_data("pretrain", tmp_path / "other.jsonl", count=47), []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        own = {"data_path": shutil.copy(texts, tmp_path / str(rank)), "valid_path": texts, "num_workers": rank}
        own |= {name: other if value == "OTHER" else value for name, value in flags.items() if rank}
        line = {name: value for name, value in own.items() if value != ""}
        lines.append(tiny_flags(tmp_path / str(rank) / "out", line.pop("data_path"), max_steps=1, **line))
    children = launcher.start_ranks(2, "train_pretrain", lines)
    assert [child.wait() for child in children] == [bool(said)] * 2, children[0].output + children[1].output
    for child in children:
        assert all(text in child.output for text in said) and "Traceback" not in child.output, child.output


# --- signals ---------------------------------------------------------------------------------------------------------


def test_handlers_are_put_back_and_a_second_interrupt_is_at_once(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stop:
        assert not stop.agreed(ALONE)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(ALONE) and isinstance(stop, StopRequest)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert capfd.readouterr().err.count("Ctrl-C again stops at once, without saving") == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_whose_launcher_was_killed_stops(monkeypatch):
    """Without a launcher a run outlives its shell, even if ZeRO has set LOCAL_RANK for its engine."""
    for name in (None, "LOCAL_RANK", "RANK"):
        for each in ("LOCAL_RANK", "RANK"):
            monkeypatch.delenv(each, raising=False)
        if name:
            monkeypatch.setenv(name, "0")
        monkeypatch.setattr(os, "getppid", lambda: 1000)  # the tests may themselves be a child of process 1
        stop = StopRequest()
        assert not stop.agreed(ALONE)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        launched = name == "RANK"
        assert stop.agreed(ALONE) == launched and stop.signal == (signal.SIGTERM if launched else 0)
        monkeypatch.undo()


def test_a_long_evaluation_is_not_taken_for_a_process_that_hangs():
    """The seconds since the last step, which the watching thread compares, do not grow meanwhile."""
    with stop_on_signal() as stop:
        with distributed.between_steps():
            assert time.monotonic() - stop.last < 0
        assert time.monotonic() >= stop.last > time.monotonic() - 600
    with distributed.between_steps():  # outside a run
        pass


def test_a_process_that_waits_for_another_one_says_so(monkeypatch, capsys):
    """Once, and not when its steps are slow anyway."""
    monkeypatch.setattr(distributed, "HANG_SECONDS", 0.05)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values, process: values)
    stop = StopRequest()
    stop.longest = 0.1  # so that three times as much is not slow
    assert not stop.agreed(dataclasses.replace(ALONE, world_size=2))
    said, end = "", time.monotonic() + 60
    while "process 0 has waited" not in said and time.monotonic() < end:
        said += capsys.readouterr().err
        time.sleep(0.01)
    time.sleep(0.2)
    stop.watching = False
    assert (said + capsys.readouterr().err).count("another process may hang. It gives up after --rank_timeout") == 1


@pytest.mark.full
def test_a_process_that_hangs_ends_the_others(launcher, tmp_path, texts):
    flags = tiny_flags(tmp_path, texts, epochs=50, batch_size=2, rank_timeout=30)
    children = launcher.start_ranks(2, "train_pretrain", flags, patches=[slow_steps])
    children[0].wait_for("(3/")
    children[1].signal(signal.SIGSTOP)
    assert children[0].wait(200) == 1 and "has ended or hangs" in children[0].output
    children[1].signal(signal.SIGKILL)
    children[1].wait()


def slow_steps(module) -> None:
    """Leaves time to send a signal between two steps."""
    replace_step(lambda take_step: lambda *arguments: time.sleep(0.05) or take_step(*arguments))


@pytest.mark.parametrize(
    "number, workers, group",
    [(signal.SIGTERM, 0, False), (signal.SIGINT, 1, True), (signal.SIGTERM, 1, True)],
)
def test_a_signal_saves_and_says_how_to_go_on(launcher, tmp_path, texts, number, workers, group):
    """Also when the whole process group gets it, as from Ctrl-C and launchers: workers that assemble batches too."""
    flags = tiny_flags(tmp_path, texts, epochs=50, num_workers=workers)
    child = launcher.start("train_pretrain", flags, patches=[slow_steps])
    child.wait_for("(3/")
    child.signal(number, group)
    assert child.wait() == 128 + number, child.output
    assert "stopped after step" in child.output and "--resume" in child.output and "Traceback" not in child.output
    step = read_resume(tmp_path)["progress"]["step"]
    assert f"stopped after step {step};" in child.output and read_log(tmp_path)[-1]["step"] == step
    assert (tmp_path / "pretrain_32.pth").exists()


def asked_in_the_middle_of_the_second_step(module) -> None:
    """The last process gets SIGTERM in the third of eight micro-batches. Prints every micro-batch."""
    from trainer import training

    backward, micro_batches = training.Training.backward, []

    def counted(self, share):
        micro_batches.append(print("micro-batch", flush=True))
        backward(self, share)
        if len(micro_batches) == 8 + 3 and self.process.rank == self.process.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    training.Training.backward = counted


@pytest.mark.parametrize("world_size", [1, 2])
@each_stage(PRETRAIN, DPO)
def test_a_signal_in_the_middle_of_a_step_ends_it_and_the_run_resumes_to_the_same_bits(
    launcher, tmp_path, inputs, stage, world_size
):
    flags = inputs(stage) | {"batch_size": 1, "accumulation_steps": 8, "max_steps": 3, "epochs": 9}
    line = tiny_flags(tmp_path / "parts", **flags)
    patches = [asked_in_the_middle_of_the_second_step]
    children = launcher.start_ranks(world_size, stage.script, line, patches=patches)
    assert [child.wait() for child in children] == [128 + signal.SIGTERM] * world_size, children[0].output
    assert "stopped after step 1; saved" in children[0].output
    # the one that was asked goes to the step's last micro-batch at once
    assert [child.output.count("micro-batch\n") for child in children] == [16] * (world_size - 1) + [12]
    launcher.run(stage.script, [*line, "--resume"], world_size)
    launcher.run(stage.script, tiny_flags(tmp_path / "whole", **flags), world_size)
    ours, theirs = (read_resume(tmp_path / name, stage.name()) for name in ("parts", "whole"))
    assert_identical(ours, theirs)


@pytest.mark.parametrize("step", [0, 1])
def test_a_signal_before_a_step_is_done_saves_nothing_again(train, tmp_path, texts, monkeypatch, capsys, step):
    """In the first step there is nothing to save, and later nothing new."""
    flags = tiny_flags(tmp_path, texts, save_interval=1)
    backward, calls = Training.backward, []
    monkeypatch.setattr(
        Training,
        "backward",
        lambda *args: calls.append(backward(*args)) or len(calls) > step and os.kill(os.getpid(), signal.SIGTERM),
    )
    with pytest.raises(SystemExit) as stopped:
        train("train_pretrain", flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "pretrain_32.pth").exists() == bool(step)
    said = "stopped after step 1; saved" if step else "stopped in the first step, so there is nothing to save"
    assert said in capsys.readouterr().out


def test_all_processes_stop_after_the_same_step(launcher, tmp_path, texts):
    """One of them was asked; both save, leave, and end with the signal's status."""
    children = launcher.start_ranks(
        2, "train_pretrain", tiny_flags(tmp_path, texts, epochs=50, batch_size=2), patches=[slow_steps]
    )
    children[0].wait_for("(3/")
    children[1].signal(signal.SIGTERM)
    assert [child.wait() for child in children] == [128 + signal.SIGTERM] * 2, children[0].output
    state = read_resume(tmp_path)
    assert f"stopped after step {state['progress']['step']};" in children[0].output
    assert len(state["rng"]) == 2
