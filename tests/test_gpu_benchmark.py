"""benchmarks/gpu.py: one failure or too little time loses nothing else; its data, and what it measures, on a CPU."""

import argparse
import itertools
import json

import pytest
import torch
from conftest import one_thread

from benchmarks import gpu
from model.batching import Engine
from model.model_minimind import MiniMindConfig


@pytest.fixture
def schedule(tmp_path):
    args = argparse.Namespace(device="cpu", budget=100, json=tmp_path / "gpu.json")
    return gpu.Schedule(args, {"training": {}, "decoding": {}})


def fails(error: Exception):
    def run():
        raise error

    return run


def test_a_contender_that_fails_leaves_the_others_alone(schedule, capsys):
    schedule.run("training", "26M", "ours", lambda: {"tokens_per_second": 5.0})
    schedule.run("training", "26M", "large", fails(torch.OutOfMemoryError("CUDA out of memory")))
    schedule.run("training", "26M", "broken", fails(RuntimeError("no such kernel\nand a long trace")))
    schedule.run("decoding", "26M", "ours, 1", lambda: {"tokens_per_second": 7.0})
    record = json.loads(schedule.args.json.read_text("utf-8"))
    assert record["training"]["26M"]["ours"] == {"tokens_per_second": 5.0}
    assert record["training"]["26M"]["large"] == {"error": "out of memory"}
    assert record["training"]["26M"]["broken"]["error"].startswith("RuntimeError: no such kernel")
    assert record["decoding"]["26M"]["ours, 1"] == {"tokens_per_second": 7.0}
    shown = capsys.readouterr().out
    assert "26M training, large: out of memory" in shown and "26M training, broken: RuntimeError: no such" in shown


def test_numbers_so_far_are_on_disk_before_the_next_contender_starts(schedule):
    schedule.run("training", "26M", "ours", lambda: {"tokens_per_second": 5.0})

    def look() -> dict:
        assert json.loads(schedule.args.json.read_text("utf-8"))["training"]["26M"]["ours"] == {
            "tokens_per_second": 5.0
        }
        return {"tokens_per_second": 6.0}

    schedule.run("training", "26M", "next", look)
    assert schedule.record["training"]["26M"]["next"] == {"tokens_per_second": 6.0}


def test_what_there_is_no_time_for_is_left_out(schedule, monkeypatch):
    clock = itertools.count(step=30).__next__  # asked when a contender starts and twice after it
    monkeypatch.setattr(gpu.time, "monotonic", clock)
    schedule.deadline = 200
    for name in ("a", "b", "c", "d"):
        schedule.run("training", "26M", name, lambda: {"tokens_per_second": 1.0})
    results = schedule.record["training"]["26M"]
    assert [name for name, result in results.items() if "error" not in result] == ["a", "b"]
    assert results["c"] == results["d"] == {"error": "left out: no time"}


def test_tables_show_results_errors_and_what_is_missing(capsys):
    numbers = {"flops_per_second": 5e12, "memory": 2e9, "warm_after": 3.0, "loader_share": 0.004}
    training = {
        "ours": {"tokens_per_second": 4000.0, **numbers},
        "broken": {"error": "out of memory"},
        "peer": {"tokens_per_second": 1000.0, **numbers},
    }
    gpu.print_training("26M", training, peak=1e13)
    gpu.print_decoding({"ours, 1": {"tokens_per_second": 50.0}, "generate, 1": {"error": "failed"}}, [1, 16])
    shown = " ".join(capsys.readouterr().out.split())
    assert "ours 4,000 1.00× 50.0% 2.00 GB 3 s 0.4%" in shown and "broken out of memory" in shown
    assert "peer 1,000 4.00×" in shown and "1 50 failed" in shown
    gpu.print_training("26M", {"ours": {"error": "failed"}, "peer": training["peer"]}, peak=1e13)
    assert "peer 1,000 50.0%" in " ".join(capsys.readouterr().out.split())


def test_packed_and_padded_batches_come_without_end_and_hold_documents_of_web_length(tmp_path, tokenizer):
    args = gpu.parse(["--device=cpu", "--rows=8"])
    rows = gpu.Rows(args, tokenizer, str(tmp_path))
    assert 150 < rows.tokens_per_document < 300
    per_file = rows.data.steps_per_epoch
    for batches, least in ((rows.packed(), 0.85), (rows.padded(), 0.1)):
        tokens = [int((batch["labels"] >= 0).sum()) for batch in itertools.islice(batches, per_file + 2)]
        assert len(tokens) == per_file + 2 and min(tokens) > least * 8 * 512, "no batch is half empty"
        batches.close()


def test_rates_are_those_of_the_time_that_passed(monkeypatch):
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=97)
    batch = {"input_ids": torch.ones(2, 16, dtype=torch.int64), "labels": torch.ones(2, 16, dtype=torch.int64)}
    seconds = itertools.count(step=1.0).__next__  # every look at the clock is a second later
    monkeypatch.setattr(gpu.time, "perf_counter", seconds)
    args = argparse.Namespace(device="cpu", seconds=7)
    with one_thread():
        model = gpu.MiniMindForCausalLM(config)
        result = gpu.measure(model, itertools.repeat(batch), gpu.peer_loss, args, fused=False)
    # the loop looks three times a step: the seventh look ends it after two steps, the eighth is the end
    assert result["warm_after"] == 1
    assert result["tokens_per_second"] == pytest.approx(2 * 32 / 8)
    assert result["loader_share"] == pytest.approx(2 / 8)
    per_token = 6 * sum(p.numel() for p in model.parameters())
    expected = (2 * 32 * per_token + 12 * 32 * 2 * 2 * 136) / 8  # 136 = 16 · 17 / 2 pairs in each row
    assert result["flops_per_second"] == pytest.approx(expected)


def test_decoding_is_timed_with_its_prompts(monkeypatch):
    requests, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda *args: requests.append(submit(*args)) or requests[-1])
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    args = argparse.Namespace(device="cpu", new_tokens=2, batches=[2])
    with one_thread():
        result = gpu.decoding_contenders(config, args)["ours, 2"]()
    assert result["tokens_per_second"] > 0
    assert [request.cached_tokens for request in requests] == [0] * 4, "two texts, to warm up and on the clock"
