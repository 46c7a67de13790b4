"""The way of batches to the device: fetched while the step before is computed, and the time that waits for them."""

import statistics
import time

import pytest
import torch
from conftest import read_log, tiny_flags, write_data

from dataset.packing import PackedBatches
from trainer.arguments import stage_parser
from trainer.distributed import Process
from trainer.loader import MicroBatches, PackedData


def test_batches_of_the_next_step_are_fetched_while_this_one_is_computed():
    events = []

    def loader():
        for number in range(6):
            events.append(f"fetch {number}")
            yield number

    micro_batches, steps = MicroBatches(loader(), 2), []
    while micro_batches:
        for number in micro_batches:
            events.append(f"compute {number}")
        assert sum(number for number in micro_batches) == sum(list(micro_batches)), "going through them again is free"
        events.append("wait for the GPU")
        steps.append(list(micro_batches))
        micro_batches = micro_batches.following()
    assert steps == [[0, 1], [2, 3], [4, 5]]
    waits = [place for place, event in enumerate(events) if event == "wait for the GPU"]
    assert events.index("fetch 3") < waits[0] < events.index("compute 2")
    assert events[: waits[0]] == ["fetch 0", "fetch 1", "compute 0", "fetch 2", "compute 1", "fetch 3"]


def test_a_step_that_nobody_goes_through_is_followed_by_the_next_one():
    micro_batches = MicroBatches(iter(range(4)), 2)
    assert list(micro_batches.following()) == [2, 3]
    assert not micro_batches.following().following()


def packed(path, tmp_path, tokenizer, kind="pretrain", device="cpu", **flags) -> PackedData:
    args = stage_parser("").parse_args(tiny_flags(tmp_path, path, cache_dir=tmp_path, **flags))
    return PackedData(args, kind, tokenizer, Process(0, 0, 1, torch.device(device)))


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
    expected, found = (
        next(packed(path, tmp_path, tokenizer, kind, device).all_batches()) for device in ("cpu", "meta")
    )
    assert found.keys() == expected.keys()
    devices = {name: value.device.type for name, value in found.items() if isinstance(value, torch.Tensor)}
    assert devices.pop(ids) == "cpu" and found[ids].equal(expected[ids])
    assert devices.keys() > {"input_ids", "labels", "cu_seqlens"} and set(devices.values()) == {"meta"}


def test_time_spent_on_batches_is_logged_as_a_share(train, texts, tmp_path, monkeypatch, tokenizer):
    train("train_pretrain", tiny_flags(tmp_path / "fast", texts, max_steps=5))
    make = PackedBatches.__getitem__

    def slowly(self, index):
        time.sleep(0.3)
        return make(self, index)

    monkeypatch.setattr(PackedBatches, "__getitem__", slowly)
    train("train_pretrain", tiny_flags(tmp_path / "slow", texts, max_steps=5))
    # with the last step there is no further batch to fetch
    fast, slow = ([record["waiting"] for record in read_log(tmp_path / name)][:-1] for name in ("fast", "slow"))
    assert 0 < min(fast) and statistics.median(fast) < 0.25 and 0.5 < statistics.median(slow) < 1
    data = packed(texts, tmp_path, tokenizer, max_steps=2)
    start = time.perf_counter()
    assert sum(1 for _ in data.steps()) == 2
    assert 0.6 <= data.waited <= time.perf_counter() - start
