"""The benchmarks count what they say they count."""

import functools
import itertools
import json
import mmap
from pathlib import Path

import pytest
import torch.nn.functional as F

from benchmarks import gpu, stage_throughput
from benchmarks.lab import loss_curves
from dataset.lm_dataset import parse_record
from tests.conftest import ROOT, one_thread, write_conversations
from trainer.cost import Memory
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.rollouts import Sampler


def test_mistakes_name_the_flag(capsys):
    with pytest.raises(ValueError, match="--what"):
        stage_throughput.parse(["--data_path", "x.jsonl"])
    with pytest.raises(SystemExit):
        stage_throughput.parse(["--rounds", "0"])
    assert "--rounds: 0 is less than 1" in capsys.readouterr().err


# --- throughput ------------------------------------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path, tokenizer):
    """part("lora"): the settings of a part with a tiny model, its data and weights made."""

    def make(what: str, *flags):
        sizes = ["--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=4", "--batch_size=2"]
        args = stage_throughput.parse([*sizes, "--max_seq_len=64", "--device=cpu", f"--what={what}", *flags])
        source = write_conversations(tmp_path / "source.jsonl", 40)
        if what == "dpo":
            source = stage_throughput.preferences(source, tmp_path / "pairs.jsonl")
        args = stage_throughput.settings(args, tmp_path, tmp_path / "data.jsonl", what)
        kind = "preference" if what == "dpo" else "conversation"
        stage_throughput.shuffled_copy(args.data_path, source, kind, args)
        stage_throughput.make_weights(args, tokenizer)
        return args

    return make


def amounts(steps, args, tokenizer, count: int = 3, **options) -> list[int]:
    """What a contender reports for its first steps."""
    seen = []

    def step_done(amount: int) -> None:
        seen.append(amount)
        if len(seen) == count:
            raise stage_throughput.EndOfTurns

    with one_thread(), pytest.raises(stage_throughput.EndOfTurns):
        steps(args, tokenizer, step_done=step_done, **options)
    return seen


@pytest.fixture
def own_hooks(monkeypatch):
    """What a contender of ours puts in place of the stage's own is taken back at the end."""
    for owner, name in ((Logger, "step"), (Sampler, "_answers")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_our_contenders_count_pairs_and_real_tokens(part, tokenizer, own_hooks):
    args = part("dpo", "--rounds=1", "--steps=2")
    assert amounts(stage_throughput.CONTENDERS["ours"], args, tokenizer) == [2, 2, 2]
    assert amounts(stage_throughput.reference_steps, args, tokenizer) == [2, 2, 2]
    # two warm steps and one round of two: eight pairs, and no more for TRL to ask the reference about
    assert len(args.data_path.read_text("utf-8").splitlines()) == 8
    args = part("lora")
    data = PackedData(args, "conversation", tokenizer, stage_throughput.process_of(args))
    steps = itertools.islice(data.steps(0), 3)
    real = [sum(int((batch["document_ids"] >= 0).sum()) for batch in batches) for _, batches in steps]
    assert amounts(stage_throughput.CONTENDERS["ours, packed rows"], args, tokenizer) == real


def test_peft_counts_the_inputs_that_are_no_padding(part, tokenizer):
    pytest.importorskip("peft", reason="peft is in requirements-dev.txt")
    args = part("lora")
    lines = args.data_path.read_text("utf-8").splitlines()
    documents = [tokenizer.encode_conversation(parse_record("conversation", line))[0] for line in lines]
    inputs = [min(len(ids), 65) - 1 for ids in documents]
    expected = [inputs[i] + inputs[i + 1] for i in (0, 2, 4)]
    assert amounts(stage_throughput.peft_steps, args, tokenizer, equal_tokens=False) == expected


@pytest.mark.parametrize("sampling", [True, False])
def test_a_grpo_step_counts_its_answers(part, tokenizer, monkeypatch, own_hooks, sampling):
    monkeypatch.setattr(stage_throughput, "ANSWER", 4)
    args = part("grpo", "--max_seq_len=128")
    steps = functools.partial(stage_throughput.stage_steps, stage="grpo", sampling=sampling)
    assert amounts(steps, args, tokenizer) == [64, 64, 64]  # 8 prompts, 8 answers each


def test_a_ratio_is_that_of_the_same_round(capsys):
    rates = {"ours": [10.0, 20.0, 30.0], "peer": [5.0, 20.0, 3.0]}
    table = stage_throughput.print_rates(rates, "ours", "pairs/s")
    assert table["peer"]["ratio"] == 2.0 and table["peer"]["rate"] == 5.0 and table["ours"]["ratio"] == 1.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_peak_memory_rises_with_what_is_held_and_is_reset():
    memory = Memory("cpu")
    memory.reset()
    before, size = memory.peak(), 256 << 20
    held = mmap.mmap(-1, size)  # not malloc, which may keep what is freed
    for _ in range(size >> 20):
        held.write(bytes(1 << 20))
    assert 0.9 * size < memory.peak() - before
    held.close()
    memory.reset()
    assert memory.peak() - before < 0.5 * size


@pytest.mark.full
def test_all_parts_run_in_processes_of_their_own(tmp_path, capsys):
    pytest.importorskip("trl", reason="trl is in requirements-dev.txt")
    sizes = ["--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=4", "--batch_size=2"]
    target = tmp_path / "measured.jsonl"
    short = ["--max_seq_len=128", "--rounds=1", "--steps=1", "--device=cpu", f"--json={target}"]
    with one_thread():
        stage_throughput.main([*sizes, *short])
    parts = [json.loads(line)["table"] for line in target.read_text("utf-8").splitlines()]
    assert [len(table) for table in parts] == [4, 3, 4]  # DPO, LoRA, GRPO
    assert all(row["rate"] > 0 for table in parts for row in table.values())


@pytest.mark.full
def test_the_gpu_benchmark_runs_through_on_a_cpu(tmp_path, capsys):
    target = tmp_path / "gpu.json"
    small = [
        "--num_hidden_layers=1",
        "--rows=1",
        "--seconds=0.1",
        "--new_tokens=4",
        "--batches",
        "1",
        "3",
        "--budget=1e9",
    ]
    with one_thread():
        gpu.main(["--device=cpu", "--models", "26M", "MoE 145M", *small, "--json", str(target)])
    record = json.loads(target.read_text("utf-8"))
    dense, moe = (record["training"][name] for name in ("26M", "MoE 145M"))
    assert {"ours", "- packing", "transformers, packed"} <= dense.keys() and "- grouped products" in moe
    for result in (*dense.values(), *moe.values()):
        assert result["tokens_per_second"] > 0 and result["memory"] > 0 and 0 <= result["loader_share"] < 1
    assert record["decoding"]["26M"].keys() == {"ours, 1", "generate, 1", "ours, 3", "generate, 3"}
    assert all(rate["tokens_per_second"] > 0 for rates in record["decoding"].values() for rate in rates.values())
    assert 150 < record["tokens_per_document"] < 300
    assert "- varlen" in capsys.readouterr().out and hasattr(F, "grouped_mm")


@pytest.mark.full
def test_the_loss_curves_of_one_state_are_identical_and_a_nudge_moves_them(capsys):
    flags = ["--before", str(ROOT), "--steps", "2", "--nudges", "1", "--nudge", "1e-3"]
    with one_thread():
        loss_curves.main([*flags, "--stages", *loss_curves.STAGES])
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * len(loss_curves.STAGES) and verdict == "all curves are identical"
    assert all(": identical; before, nudged:" in line for line in lines)
    # bfloat16 may round the nudge of an adapter away
    rounded = [line for line in lines if "nudged: 0.0e+00" in line]
    assert all(line.startswith("lora") and "bfloat16" in line for line in rounded)
