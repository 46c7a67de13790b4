"""Resuming: a run that was killed at any instant ends as if it had never stopped, and never goes on as another run."""

import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import (
    assert_identical,
    read_log,
    read_resume,
    relative_error,
    tiny_flags,
    write_conversations,
    write_texts,
)

from model.model_minimind import MiniMindConfig
from model.weights import WeightsError, save_weights
from trainer.arguments import FREE_ON_RESUME, parse_arguments, stage_parser
from trainer.checkpoint import refuse_other_weights, result_flags


def noisy_slow_steps(module) -> None:
    """Steps that depend on every random number generator, and that leave time to be killed in."""
    import numpy

    optimizer_step = module.optimizer_step

    def step(model, *arguments):
        time.sleep(0.02)
        noise = random.random() + numpy.random.rand() + numpy.random.randn()
        for parameter in model.parameters():
            parameter.grad.add_(torch.randn_like(parameter), alpha=1e-3 * noise)
        return optimizer_step(model, *arguments)

    module.optimizer_step = step


def killed_at_step(number: int, module) -> None:
    optimizer_step, calls = module.optimizer_step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(*arguments)

    module.optimizer_step = step


def killed_at_step_4(module) -> None:
    killed_at_step(4, module)


def killed_before_the_last_save_of_weights(module) -> None:
    save_weights = module.save_weights

    def save(path, model, sidecar):
        if sidecar["progress"]["complete"]:
            os.kill(os.getpid(), signal.SIGKILL)
        save_weights(path, model, sidecar)

    module.save_weights = save


def killed_after_the_last_save_of_weights(module) -> None:
    save_weights = module.save_weights

    def save(path, model, sidecar):
        save_weights(path, model, sidecar)
        if sidecar["progress"]["complete"]:
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_weights = save


def assert_same_end(ours, theirs, name: str = "pretrain_32") -> None:
    """Weights, optimizer, position and random numbers to the last bit, and the weight files."""
    assert_identical(read_resume(ours, name), read_resume(theirs, name))
    assert_identical(torch.load(ours / f"{name}.pth"), torch.load(theirs / f"{name}.pth"))
    half = {key: weight.half() for key, weight in read_resume(ours, name)["model"].items()}
    assert_identical(torch.load(ours / f"{name}.pth"), half)


def interrupted(launcher, script, flags, stops, patches) -> None:
    """Starts with --resume again and again, stopped by these signals, and then lets it run to the end."""
    for number, delay in stops:
        child = launcher.start(script, [*flags, "--resume"], patches=patches)
        child.wait_for("parameters")
        time.sleep(delay)
        child.signal(number)
        # it may be through already, or not in its loop yet, where SIGTERM kills
        assert child.wait() in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0), child.output
    launcher.run(script, [*flags, "--resume"], patches=patches)


def random_stops(count: int) -> list[tuple[int, float]]:
    return [(random.choice([signal.SIGKILL] * 4 + [signal.SIGTERM]), random.uniform(0, 0.5)) for _ in range(count)]


def check_interrupted(launcher, tmp_path, script, stops, name="pretrain_32", patches=(noisy_slow_steps,), **flags):
    patches = list(patches)
    flags = {"save_interval": 2} | flags
    launcher.run(script, tiny_flags(tmp_path / "whole", **flags), patches=patches)
    interrupted(launcher, script, tiny_flags(tmp_path / "parts", **flags), stops, patches)
    assert_same_end(tmp_path / "parts", tmp_path / "whole", name)


def test_killed_runs_end_bit_identical(launcher, tmp_path, texts):
    """Saved every second step; killed twice at random moments, a third time by a signal that it can answer."""
    stops = [(signal.SIGKILL, random.uniform(0, 0.3)) for _ in range(2)] + [(signal.SIGTERM, 0.1)]
    check_interrupted(launcher, tmp_path, "train_pretrain", stops, data_path=texts, epochs=2)


@pytest.mark.full
@pytest.mark.parametrize(
    "script, use_moe, optimizer",
    [("train_pretrain", False, "adamw"), ("train_pretrain", True, "muon")]
    + [("train_full_sft", False, "muon"), ("train_full_sft", True, "adamw")],
)
def test_runs_killed_ten_times_end_bit_identical(launcher, tmp_path, texts, script, use_moe, optimizer):
    suffix = "_32_moe" if use_moe else "_32"
    flags = {"data_path": texts, "epochs": 8, "use_moe": use_moe, "batch_size": 2, "accumulation_steps": 2}
    flags["optimizer"] = optimizer
    if script == "train_full_sft":
        launcher.run("train_pretrain", tiny_flags(tmp_path / "base", texts, max_steps=3, use_moe=use_moe))
        data = write_conversations(tmp_path / "chats.jsonl", 40)
        flags |= {"data_path": data, "base_weight": tmp_path / "base" / f"pretrain{suffix}.pth"}
    name = script.removeprefix("train_") + suffix
    stops = random_stops(10)
    print(stops)
    check_interrupted(launcher, tmp_path, script, stops, name, **flags)


@pytest.mark.full
def test_two_processes_killed_end_bit_identical(launcher, tmp_path, texts):
    flags = {"epochs": 3, "batch_size": 2, "save_interval": 1, "resume": True}
    launcher.run("train_pretrain", tiny_flags(tmp_path / "whole", texts, **flags), 2)
    line = tiny_flags(tmp_path / "parts", texts, **flags)
    for delay in (0.05, 0.2, 0.1):
        children = launcher.start_ranks(2, "train_pretrain", line)
        children[0].wait_for("parameters")
        time.sleep(delay)
        for child in children:
            child.signal(signal.SIGKILL)
            child.wait()
    launcher.run("train_pretrain", line, 2)
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.full
def test_bit_identical_on_two_threads_in_bfloat16(launcher, tmp_path, texts):
    stops = [(signal.SIGKILL, 0.2), (signal.SIGKILL, 0.3)]
    flags = {"data_path": texts, "epochs": 3, "dtype": "bfloat16", "hidden_size": 64, "num_workers": 1}
    flags["patches"] = [noisy_slow_steps, two_threads]
    check_interrupted(launcher, tmp_path, "train_pretrain", stops, "pretrain_64", **flags)


def two_threads(module) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("moment", [killed_before_the_last_save_of_weights, killed_after_the_last_save_of_weights])
def test_killed_between_the_two_files_of_the_last_save(launcher, tmp_path, texts, moment):
    """Whichever was written first, the weight file must be the finished one in the end."""
    flags = tiny_flags(tmp_path / "parts", texts, save_interval=4)
    assert launcher.start("train_pretrain", flags, patches=[moment]).wait() == -signal.SIGKILL
    launcher.run("train_pretrain", [*flags, "--resume"])
    launcher.run("train_pretrain", tiny_flags(tmp_path / "whole", texts))
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "pretrain_32.json").read_text())["progress"]["complete"] is True


def test_resumed_on_another_number_of_processes(launcher, tmp_path, texts):
    """accumulation_steps gives way, so that the global batch stays as it was."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sizes = {"batch_size": 2, "accumulation_steps": 4, "save_interval": 1}
    launcher.run("train_pretrain", tiny_flags(whole, texts, **sizes))
    flags = tiny_flags(parts, texts, **sizes)
    assert launcher.start("train_pretrain", flags, patches=[killed_at_step_4]).wait() == -signal.SIGKILL
    printed = launcher.run("train_pretrain", [*flags, "--resume"], 2)
    assert "stands at step 3; going on" in printed and "1 -> 2 processes; accumulation_steps is now 2" in printed
    assert relative_error(read_resume(parts)["model"], read_resume(whole)["model"]) < 1e-5
    ours, theirs = (read_resume(folder)["optimizer"]["state"] for folder in (parts, whole))
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [{str(key): state[name] for key, state in states.items()} for states in (ours, theirs)]
        assert relative_error(*moments) < 1e-5
    for line, expected in zip(read_log(parts)[-2:], read_log(whole)[-2:], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.fixture
def finished(train, tmp_path, texts):
    """A finished run, its flags, and what to give instead of them."""
    train("train_pretrain", tiny_flags(tmp_path, texts))
    return lambda **changes: tiny_flags(tmp_path, **{"data_path": texts, "resume": True} | changes)


def contents(folder) -> dict:
    files = [*folder.glob("*.pth"), *folder.glob("*.json"), *folder.glob("resume/*")]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_complete_run_says_so_and_leaves_its_files_alone(train, tmp_path, finished, capsys):
    before = contents(tmp_path)
    assert len(before) == 3
    train("train_pretrain", finished())
    assert "complete" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_scaler_that_the_saved_run_did_not_need(train, finished, monkeypatch, capsys):
    """A run in bfloat16 goes on in float16 on a GPU without bfloat16."""
    from trainer import train_pretrain

    class WithScaler(train_pretrain.Precision):
        def __init__(self, name, device):
            super().__init__(name, device)
            self.scaler = torch.amp.GradScaler(device.type, enabled=True)

    monkeypatch.setattr(train_pretrain, "Precision", WithScaler)
    train("train_pretrain", finished())
    assert "complete" in capsys.readouterr().out


def test_nothing_saved_yet(train, tmp_path, texts, capsys):
    train("train_pretrain", tiny_flags(tmp_path / "a", texts, resume=True))
    printed = capsys.readouterr().out
    assert "nothing is saved" in printed and "from the beginning" in printed and "(1/10)" in printed
    train("train_pretrain", tiny_flags(tmp_path / "b", texts))
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_without_resume_a_run_starts_anew_and_says_what_it_replaces(train, tmp_path, texts, finished, capsys):
    before = contents(tmp_path)["pretrain_32.pth"][0]
    train("train_pretrain", finished(resume=False, seed=7))
    printed = capsys.readouterr().out
    assert "pretrain_32.resume" in printed and "replace" in printed
    assert contents(tmp_path)["pretrain_32.pth"][0] != before


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


def test_every_flag_is_either_free_or_compared():
    """A new flag counts as one that changes the result until it is named as free."""
    args = parse_arguments(stage_parser(""), ["--data_path=x"])
    paths = {"data_path", "valid_path", "tokenizer_path", "out_dir", "cache_dir"}
    assert vars(args).keys() - result_flags(args).keys() - paths <= FREE_ON_RESUME
    assert FREE_ON_RESUME <= vars(args).keys(), "names of flags that do not exist"


def test_what_does_not_change_the_result_may_change(launcher, tmp_path, texts):
    whole, parts, valid = tmp_path / "whole", tmp_path / "parts", write_texts(tmp_path / "valid.jsonl", 5, seed=9)
    launcher.run("train_pretrain", tiny_flags(whole, texts))
    flags = {"save_interval": 1, "accumulation_steps": 2}
    line = tiny_flags(parts, texts, **flags | {"batch_size": 2})
    assert launcher.start("train_pretrain", line, patches=[killed_at_step_4]).wait() == -signal.SIGKILL
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(texts.read_bytes())
    changes = {"save_interval": 3, "log_interval": 5, "eval_interval": 2, "num_workers": 2, "valid_path": valid}
    changes |= {"sample_prompt": "the old king", "gradient_checkpointing": True, "cache_dir": tmp_path / "cache"}
    printed = launcher.run("train_pretrain", tiny_flags(parts, moved, resume=True, accumulation_steps=1, **changes))
    assert "stands at step 3; going on" in printed and "held out" in printed
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
    with pytest.raises(ValueError, match="first_tokens was"):
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
    with pytest.raises(ValueError, match="pretrain_32.resume is no resume state.*delete it"):
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
    before = contents(tmp_path)["pretrain_32.pth"]
    with pytest.raises(ValueError, match="num_hidden_layers 2 there, 1 here.*--overwrite"):
        train("train_pretrain", finished(resume=False, num_hidden_layers=1))
    assert contents(tmp_path)["pretrain_32.pth"] == before
    train("train_pretrain", finished(resume=False, num_hidden_layers=1, overwrite=True))
    assert contents(tmp_path)["pretrain_32.pth"] != before
