"""What a frozen model said, kept on disk: computed once, by all processes together, and never believed when stale."""

import errno
import functools
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_identical, read_log, read_resume, tiny_flags, write_jsonl

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights
from trainer import frozen_outputs
from trainer.distributed import Process
from trainer.frozen_outputs import FrozenOutputs

CPU = Process(0, 0, 1, torch.device("cpu"))
SHAPES = {"values": ((12, 2), np.float32)}
ITEMS = 6  # of two rows each


def open_outputs(tmp_path: Path, identity: dict | None = None) -> FrozenOutputs:
    return FrozenOutputs(tmp_path / "outputs", identity or {"weights": "a"}, ITEMS, SHAPES, CPU)


def fill(outputs: FrozenOutputs, items, sign: int = 1) -> list[int]:
    """Writes what is missing of some items; returns which were."""
    computed = [item for item in items if outputs.missing(np.array([item]))[0]]
    for item in computed:
        rows = np.array([2 * item, 2 * item + 1])
        outputs.write(np.array([item]), rows, values=np.full((2, 2), sign * (item + 1), np.float32))
    return computed


EXPECTED = np.repeat(np.arange(1, ITEMS + 1, dtype=np.float32), 2)[:, None].repeat(2, axis=1)


# --- the store -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again(tmp_path, capsys):
    outputs = open_outputs(tmp_path)
    assert not outputs.complete and fill(outputs, range(ITEMS)) == list(range(ITEMS))
    outputs.finish()
    again = open_outputs(tmp_path)
    assert again.complete and again.folder == outputs.folder
    assert np.array_equal(again.arrays["values"], EXPECTED) and again.arrays["values"].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        again.arrays["values"][0] = 0
    assert not capsys.readouterr().out


def test_an_interrupted_computation_is_taken_up_again(tmp_path, monkeypatch):
    """Items count as done once they are flushed; what was written after that is computed again."""
    outputs = open_outputs(tmp_path)
    fill(outputs, [0, 3])
    outputs.flush()
    fill(outputs, [4])
    del outputs  # killed
    again = open_outputs(tmp_path)
    assert not again.complete and again.missing(np.arange(ITEMS)).tolist() == [False, True, True, False, True, True]
    assert fill(again, range(ITEMS)) == [1, 2, 4, 5]
    again.finish()
    assert np.array_equal(open_outputs(tmp_path).arrays["values"], EXPECTED)

    monkeypatch.setattr(frozen_outputs, "FLUSH_SECONDS", -1)  # by itself, now and then
    other = open_outputs(tmp_path, {"weights": "b"})
    fill(other, [2])
    assert open_outputs(tmp_path, {"weights": "b"}).missing(np.arange(ITEMS)).sum() == ITEMS - 1


def test_it_is_not_complete_while_an_item_is_missing(tmp_path):
    outputs = open_outputs(tmp_path)
    fill(outputs, range(ITEMS - 1))
    with pytest.raises(ValueError, match="lacks what other machines computed: --cache_dir"):
        outputs.finish()
    assert not open_outputs(tmp_path).complete


def test_other_weights_data_or_settings_are_computed_anew(tmp_path, capsys):
    outputs = open_outputs(tmp_path, {"weights": "a", "k": 5})
    fill(outputs, range(ITEMS))
    outputs.finish()
    for identity in ({"weights": "b", "k": 5}, {"weights": "a", "k": 6}):
        other = open_outputs(tmp_path, identity)
        assert not other.complete and other.missing(np.arange(ITEMS)).all()
        said = capsys.readouterr().out
        assert f"{outputs.folder} belongs to other weights, data or settings; computing them again" in said
    assert open_outputs(tmp_path, {"k": 5, "weights": "a"}).complete, "the first ones are still there"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def other_shape(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


DAMAGE = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "other shape": other_shape,
    "no array": lambda path: path.write_bytes(b"x" * 400),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", ["values", "done"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_computed_again(tmp_path, capsys, damage, name):
    outputs = open_outputs(tmp_path)
    fill(outputs, range(ITEMS))
    outputs.finish()
    damage(outputs.folder / f"{name}.npy")
    again = open_outputs(tmp_path)
    assert f"{outputs.folder} is damaged; making it again" in capsys.readouterr().out
    assert not again.complete and fill(again, range(ITEMS)) == list(range(ITEMS))
    again.finish()
    assert np.array_equal(open_outputs(tmp_path).arrays["values"], EXPECTED)


def test_a_full_disk_is_told_before_hours_of_work(tmp_path, monkeypatch):
    """Not in the middle of it, when a write to a mapped file would kill the process."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 50, 50))
    with pytest.raises(ValueError, match="cannot write outputs in .*are free; .*choose another --cache_dir"):
        open_outputs(tmp_path)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        if "linux" in sys.platform:
            with pytest.raises(ValueError, match="No space left on device; free some space there"):
                open_outputs(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write .*choose another --cache_dir"):
        open_outputs(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the disk space is not reserved here")
def test_an_estimate_reserves_no_disk_and_the_run_after_it_does(tmp_path):
    def blocks(reserve: bool) -> int:
        outputs = FrozenOutputs(tmp_path / "outputs", {}, ITEMS, {"values": ((1 << 20, 2), np.float32)}, CPU, reserve)
        return (outputs.folder / "values.npy").stat().st_blocks * 512

    assert [blocks(reserve=False) < 1 << 20, blocks(reserve=True) >= 1 << 23] == [True, True]


# --- as DPO and distillation use it ----------------------------------------------------------------------------------


def save_model(path: Path, tokenizer, hidden_size: int = 32) -> Path:
    torch.manual_seed(hidden_size)
    config = MiniMindConfig(
        hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    save_weights(
        path, MiniMindForCausalLM(config), {"config": config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256}
    )
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    answers = ["the sky", "was grey", "an old king", "his fire", "and then it rained"]
    records = [
        {
            side: [{"role": "user", "content": f"天气 {n}"}, {"role": "assistant", "content": answers[(n + m) % 5]}]
            for m, side in enumerate(("chosen", "rejected"))
        }
        for n in range(14)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", records)


def tell_what_is_computed(module) -> None:
    """Prints a line for every batch that the frozen model sees and flushes after each."""
    frozen_outputs.FLUSH_SECONDS = -1
    write = FrozenOutputs.write

    def told(self, items, rows, **values):
        write(self, items, rows, **values)
        print(f"computed {items.tolist()}", flush=True)

    FrozenOutputs.write = told


def stop_at_the_third_batch(module) -> None:
    """Waits for the kill after two batches have been written."""
    tell_what_is_computed(module)
    write, calls = FrozenOutputs.write, []

    def waits(self, *arguments, **values):
        calls.append(1)
        if len(calls) == 3:
            print("waiting", flush=True)
            signal.pause()
        write(self, *arguments, **values)

    FrozenOutputs.write = waits


def computed(output: str) -> list[list[int]]:
    lines = [line.removeprefix("computed ") for line in output.splitlines() if line.startswith("computed ")]
    return [[int(item) for item in line.strip("[]").split(",")] for line in lines]


def test_a_killed_run_computes_only_what_is_missing(launcher, train, tmp_path, pairs, tokenizer):
    """SIGKILL among the reference's log-probs; then the same command: the same training as without it."""
    base = save_model(tmp_path / "base.pth", tokenizer)
    flags = functools.partial(tiny_flags, data_path=pairs, base_weight=base, batch_size=3)
    child = launcher.start("train_dpo", flags(tmp_path / "killed"), patches=[stop_at_the_third_batch])
    child.wait_for("waiting")
    child.signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and computed(child.output) == [[0, 1, 2], [3, 4, 5]]
    output = launcher.run("train_dpo", flags(tmp_path / "killed"), patches=[tell_what_is_computed])
    assert computed(output) == [[6, 7, 8], [9, 10, 11], [12, 13]]
    train("train_dpo", flags(tmp_path / "whole"))
    states = [read_resume(tmp_path / name, "rlhf_32") for name in ("killed", "whole")]
    assert_identical(*states)
    output = launcher.run("train_dpo", flags(tmp_path / "killed"), patches=[tell_what_is_computed])
    assert computed(output) == []


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_of_a_few_steps_waits_only_for_what_it_looks_at(launcher, tmp_path, pairs, tokenizer, world_size):
    """Two steps of four or five: their pairs; a whole run computes what they lack. A held-out file is read whole."""
    base, batch_size = save_model(tmp_path / "base.pth", tokenizer), 4 - world_size
    flags = functools.partial(tiny_flags, tmp_path / "out", pairs, base_weight=base, batch_size=batch_size)

    def run(**more) -> list[list[int]]:
        children = launcher.start_ranks(world_size, "train_dpo", flags(**more), patches=[tell_what_is_computed])
        assert [child.wait() for child in children] == [0] * world_size, [child.output for child in children]
        return [sorted(sum(computed(child.output), [])) for child in children]

    first = sum(run(max_steps=2), [])
    count = 2 * batch_size * world_size
    assert len(first) == len(set(first)) == count and set(first) != set(range(count)), "drawn, not the file's first"
    assert sum(run(max_steps=2), []) == []
    assert set(first + sum(run(), [])) == set(range(14)) and sum(run(), []) == []
    held_out = [json.loads(line) | {"more": 1} for line in pairs.read_text("utf-8").splitlines()[:7]]
    assert len(sum(run(valid_path=write_jsonl(tmp_path / "valid.jsonl", held_out), max_steps=1), [])) == 7


def test_a_process_that_is_through_before_an_estimate_cuts_another_short_accuses_nobody(
    launcher, tmp_path, pairs, tokenizer
):
    """Three batches and two: after two only the first process has more left."""
    base = save_model(tmp_path / "base.pth", tokenizer)
    pairs.write_text("".join(pairs.read_text("utf-8").splitlines(keepends=True)[:13]), encoding="utf-8")
    launcher.run("train_dpo", tiny_flags(tmp_path, pairs, base_weight=base, batch_size=3, pass_seconds=0), 2)


@pytest.mark.parametrize("stage", ["dpo", pytest.param("distillation", marks=pytest.mark.full)])
def test_two_processes_share_the_work(launcher, tmp_path, pairs, chats, tokenizer, stage):
    """Each computes its part, both read the whole; training is that of one process."""
    base = save_model(tmp_path / "base.pth", tokenizer)
    script, name, data, flags = "train_dpo", "rlhf_32", pairs, {}
    if stage == "distillation":
        wide = save_model(tmp_path / "wide.pth", tokenizer, 64)
        script, name, data, flags = "train_distillation", "full_dist_32", chats, {"teacher_weight": wide}
        flags["cache_teacher"] = 20
    arrays, losses = [], []
    for world_size in (1, 2):
        out = tmp_path / str(world_size)
        line = tiny_flags(out, data, base_weight=base, batch_size=4 // world_size, **flags)
        if world_size == 1:
            children = [launcher.start(script, line, patches=[tell_what_is_computed])]
        else:
            children = launcher.start_ranks(2, script, line, patches=[tell_what_is_computed])
        assert [child.wait() for child in children] == [0] * world_size, [child.output for child in children]
        shares = [sorted(sum(computed(child.output), [])) for child in children]
        items = sorted(sum(shares, []))
        assert items == list(range(len(items))) and len(items) >= 14, "each item once"
        if world_size == 2:
            assert abs(len(shares[0]) - len(shares[1])) <= 2
        (folder,) = (out / "token_cache").glob("[!.]*-[rt]e[fa]*-*")
        arrays.append({path.stem: np.load(path) for path in folder.glob("*.npy")})
        losses.append([record["loss"] for record in read_log(out, name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) >= 3
    for key, one in arrays[0].items():
        if key == "token_ids":  # ties may fall either way
            assert float((one == arrays[1][key]).mean()) > 0.99
        else:
            np.testing.assert_allclose(arrays[1][key], one, rtol=1e-3 if one.dtype == np.float16 else 1e-5)


def test_the_reference_and_the_teacher_of_other_settings_are_other_files(
    train, tmp_path, pairs, chats, tokenizer, monkeypatch
):
    """Everything that decides the numbers is part of their name."""
    monkeypatch.setattr("model.device.cpu_has_bfloat16", lambda: True)  # else it would be float32, the same
    base = save_model(tmp_path / "base.pth", tokenizer)
    wide = save_model(tmp_path / "wide.pth", tokenizer, 64)
    cache = tmp_path / "cache"
    flags = {"base_weight": base, "max_steps": 1, "cache_dir": cache}

    def folders(stem: str) -> int:
        return len(list(cache.glob(f"{stem}-*")))

    for change in ({}, {"max_seq_len": 48}, {"reference_weight": wide}, {"dtype": "bfloat16"}):
        before = folders("pairs-reference")
        train("train_dpo", tiny_flags(tmp_path / "a", pairs, **flags | change))
        assert folders("pairs-reference") == before + 1, change
    theta = json.loads(base.with_suffix(".json").read_text("utf-8"))
    theta["config"]["rope_theta"] = 1e4
    base.with_suffix(".json").write_text(json.dumps(theta), encoding="utf-8")
    train("train_dpo", tiny_flags(tmp_path / "a", pairs, **flags | {"overwrite": True}))
    assert folders("pairs-reference") == before + 2, "the sidecar too"
    flags |= {"teacher_weight": wide, "cache_teacher": 4}
    for change in ({}, {"temperature": 3.0}, {"cache_teacher": 5}, {"teacher_weight": base}):
        before = folders("chats-teacher")
        train("train_distillation", tiny_flags(tmp_path / "b", chats, **flags | change))
        assert folders("chats-teacher") == before + 1, change
    before = folders("chats-teacher")
    train("train_distillation", tiny_flags(tmp_path / "b", chats, **flags | {"alpha": 0.1, "batch_size": 2}))
    assert folders("chats-teacher") == before, "these change nothing in what the teacher says"
