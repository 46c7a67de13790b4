"""The same training however a global batch is split: at once, accumulated, on several processes. And signals."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_log, read_resume, relative_error, tiny_flags, write_conversations

from trainer.distributed import Process, StopRequest, gather_objects, stop_on_signal, sum_over_ranks

# batch_size, accumulation_steps, processes: always eight rows per optimizer step
WHOLE, ACCUMULATED, RANKS = (8, 1, 1), (2, 4, 1), (2, 2, 2)
ALONE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def keep_gradients(module) -> None:
    """Saves the gradients of every optimizer step of the first process, before they are clipped."""
    optimizer_step, steps = module.optimizer_step, []

    def keep(model, *arguments):
        inner = getattr(model, "module", model)
        steps.append({name: parameter.grad.clone() for name, parameter in inner.named_parameters()})
        if os.environ.get("RANK", "0") == "0":
            torch.save(steps, os.environ["GRADIENTS"])
        return optimizer_step(model, *arguments)

    module.optimizer_step = keep


def split_run(launcher, out_dir, data, split, script="train_pretrain", **flags):
    """Gradients of all steps, the final float32 weights, and the log of a run."""
    batch_size, accumulation_steps, world_size = split
    line = tiny_flags(out_dir, data, batch_size=batch_size, accumulation_steps=accumulation_steps, **flags)
    gradients = out_dir.with_suffix(".gradients")
    launcher.run(script, line, world_size, env={"GRADIENTS": str(gradients)}, patches=[keep_gradients])
    name = script.removeprefix("train_") + ("_32_moe" if flags.get("use_moe") else "_32")
    return torch.load(gradients), read_resume(out_dir, name)["model"], read_log(out_dir, name)


def check_split(launcher, folder, data, split, whole, tolerance, **flags):
    """The gradients of the first step to 1e-6; everything after it to a tolerance in relative norm."""
    gradients, weights, log = split_run(launcher, folder / "-".join(map(str, split)), data, split, **flags)
    expected_gradients, expected_weights, expected_log = whole
    assert len(gradients) == len(expected_gradients) == 5
    for step, (ours, theirs) in enumerate(zip(gradients, expected_gradients, strict=True)):
        # later gradients are taken at weights that differ by rounding
        assert relative_error(ours, theirs) < (1e-6 if step == 0 else tolerance), f"gradients of step {step}"
    assert relative_error(weights, expected_weights) < tolerance
    for ours, theirs in zip(log, expected_log, strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=max(1e-5, tolerance), abs=1e-9), name
        for name in ("step", "epoch", "lr"):
            assert ours[name] == theirs[name]


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_global_batch_may_be_split_in_any_way(launcher, tmp_path, texts, use_moe):
    """Five steps, the last one ragged. Plain gradient descent shows every gradient in the weights."""
    flags = {"optimizer": "sgd", "learning_rate": 0.3, "use_moe": use_moe}
    whole = split_run(launcher, tmp_path / "whole", texts, WHOLE, **flags)
    for split in (ACCUMULATED, RANKS):
        check_split(launcher, tmp_path, texts, split, whole, 1e-6, **flags)


@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("script", ["train_pretrain", "train_full_sft"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_every_stage_may_be_split_in_any_way(launcher, tmp_path, texts, script, optimizer, use_moe):
    # torch's Muon orthogonalises in bfloat16, which makes more of a difference in rounding
    rate, tolerance = {"sgd": (0.3, 1e-6), "adamw": (1e-3, 1e-5), "muon": (1e-3, 1e-3)}[optimizer]
    flags = {"optimizer": optimizer, "learning_rate": rate, "use_moe": use_moe, "script": script}
    data = texts
    if script == "train_full_sft":
        base = tmp_path / "base"
        launcher.run("train_pretrain", tiny_flags(base, texts, max_steps=3, use_moe=use_moe))
        flags["base_weight"] = base / ("pretrain_32_moe.pth" if use_moe else "pretrain_32.pth")
        flags |= {"max_steps": 5, "epochs": 9}
        data = write_conversations(tmp_path / "chats.jsonl", 45)
    whole = split_run(launcher, tmp_path / "whole", data, WHOLE, **flags)
    for split in (ACCUMULATED, RANKS, (1, 8, 1), (4, 2, 1), (4, 1, 2), (1, 4, 2)):
        check_split(launcher, tmp_path, data, split, whole, tolerance, **flags)


def test_more_processes_than_rows(launcher, tmp_path):
    """Ranks without a row in a step still take part in it."""
    data = write_conversations(tmp_path / "chats.jsonl", 3, longest=4)
    base = tmp_path / "base"
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a text of one line"}\n')
    output = launcher.run("train_pretrain", tiny_flags(base, texts, use_moe=True), 2)
    assert "(1/1)" in output
    flags = tiny_flags(tmp_path / "sft", data, use_moe=True, base_weight=base / "pretrain_32_moe.pth")
    assert "(1/1)" in launcher.run("train_full_sft", flags, 2)


@pytest.mark.full
def test_torchrun(tmp_path, texts):
    """The real launcher, two processes, the flags that old commands pass."""
    flags = tiny_flags(tmp_path, texts, batch_size=2, accumulation_steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_pretrain.py"]
    done = subprocess.run(
        [*command, "--ddp", *flags], cwd=ROOT / "trainer", env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("(5/5)") == 1, "only the first process prints"
    whole = tmp_path / "whole"
    single = subprocess.run(
        [sys.executable, "train_pretrain.py", *tiny_flags(whole, texts, batch_size=8)],
        cwd=ROOT / "trainer", env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert single.returncode == 0, single.stderr
    assert relative_error(read_resume(tmp_path)["model"], read_resume(whole)["model"]) < 1e-5


def test_one_process_needs_no_group():
    assert sum_over_ranks([1.0, 2.0], ALONE) == [1.0, 2.0]
    assert gather_objects("this", ALONE) == ["this"]


# --- signals ---------------------------------------------------------------------------------------------------------


def test_handlers_are_put_back_and_a_second_interrupt_is_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal() as stop:
        assert not stop.agreed(ALONE)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(ALONE) and isinstance(stop, StopRequest)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def slow_steps(module) -> None:
    """Leaves time to send a signal between two steps."""
    import time

    optimizer_step = module.optimizer_step
    module.optimizer_step = lambda *arguments: time.sleep(0.05) or optimizer_step(*arguments)


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
