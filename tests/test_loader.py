"""The way of batches to the device: fetched while the step before is computed, and the time that waits for them."""

import time

import pytest
import torch
from conftest import read_log, tiny_flags, write_data

from dataset.packing import PackedBatches
from trainer.arguments import stage_parser
from trainer.distributed import Process
from trainer.loader import PackedData
from trainer.training import Training


def packed(path, tmp_path, tokenizer, kind="pretrain", device="cpu", **flags) -> PackedData:
    args = stage_parser("").parse_args(tiny_flags(tmp_path, path, cache_dir=tmp_path, **flags))
    return PackedData(args, kind, tokenizer, Process(0, 0, 1, torch.device(device)))


def test_batches_of_the_next_step_are_fetched_while_this_one_is_computed(texts, tmp_path, tokenizer, monkeypatch):
    events, make = [], PackedBatches.__getitem__
    monkeypatch.setattr(
        PackedBatches, "__getitem__", lambda self, index: events.append(f"fetch {index}") or make(self, index)
    )
    data = packed(texts, tmp_path, tokenizer, accumulation_steps=2, max_steps=3)
    for step, micro_batches in data.steps():
        for number, batch in enumerate(micro_batches):
            assert batch["last"] == (number == 1)
            events.append(f"compute {2 * step + number}")
        events.append("wait for the GPU")
    assert [event for event in events if event.startswith("fetch")] == [f"fetch {number}" for number in range(6)]
    first_wait = events.index("wait for the GPU")
    assert events[:first_wait] == ["fetch 0", "fetch 1", "compute 0", "fetch 2", "compute 1", "fetch 3"]
    assert first_wait < events.index("compute 2")


def test_a_step_that_is_left_early_is_followed_by_the_next_one(texts, tmp_path, tokenizer):
    data = packed(texts, tmp_path, tokenizer, accumulation_steps=2, max_steps=4)
    expected = [[batch["row_ids"].tolist() for batch in batches] for _, batches in data.steps()]
    taken = [next(batches)["row_ids"].tolist() if step % 2 else None for step, batches in data.steps()]
    assert taken == [None, expected[1][0], None, expected[3][0]]


@pytest.mark.parametrize("first", [0, 3, 12])
def test_every_step_has_its_own_micro_batches_in_order(texts, tmp_path, tokenizer, first):
    data = packed(texts, tmp_path, tokenizer, accumulation_steps=2, epochs=3, max_steps=14)
    steps = [(step, [batch["row_ids"].tolist() for batch in batches]) for step, batches in data.steps(first)]
    expected = []
    for step in range(first, 14):
        epoch, place = divmod(step, data.steps_per_epoch)
        batches = data._batches(epoch)
        expected.append((step, [batches[2 * place + i]["row_ids"].tolist() for i in (0, 1)]))
    assert steps == expected


@pytest.mark.parametrize("kind, ids", [("pretrain", "row_ids"), ("preference", "pair_ids")])
def test_all_of_a_batch_goes_to_the_device_but_what_files_are_looked_up_with(tmp_path, tokenizer, kind, ids):
    path = write_data(kind, tmp_path / "data.jsonl", count=6)
    expected, found = (next(packed(path, tmp_path, tokenizer, kind, device).once()) for device in ("cpu", "meta"))
    assert found.keys() == expected.keys()
    devices = {name: value.device.type for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert devices.pop(ids) == "cpu" and found[ids].equal(expected[ids])
    assert devices.keys() > {"input_ids", "labels", "cu_seqlens"} and set(devices.values()) == {"meta"}


def test_time_spent_on_batches_is_logged_as_a_share(train, texts, tmp_path, monkeypatch, tokenizer):
    """By a clock of ours: a batch takes three seconds, a step one."""
    now, make, step = [0.0], PackedBatches.__getitem__, Training.step

    def passes(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(PackedBatches, "__getitem__", lambda self, index: passes(3) or make(self, index))
    monkeypatch.setattr(Training, "step", lambda training, lr: passes(1) or step(training, lr))
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=5))
    # the first step also fetches its own batch, and with the last one there is none to fetch
    expected = [6 / 7, 3 / 4, 3 / 4, 3 / 4, 0]
    assert [record["waiting"] for record in read_log(tmp_path)] == pytest.approx(expected)
    data = packed(texts, tmp_path, tokenizer, max_steps=2)
    assert sum(1 for _ in data.steps()) == 2 and data.waited == 6
