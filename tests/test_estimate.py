"""--estimate: counts by hand, nothing saved, and what a later run says about it."""

import argparse
import functools
import importlib
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DISTILLATION, DPO, LORA, PRETRAIN, each_stage, sharp_model, tiny_flags, write_data
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from model import model_minimind
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import write_json
from trainer import estimate, train_pretrain
from trainer.arguments import stage_parser
from trainer.cost import activation_bytes, attention_backward_bytes, memory_parts
from trainer.distributed import Process
from trainer.estimate import CARDS, Estimate, assumed_mfu, compared
from trainer.loader import PackedData
from trainer.optimization import build_optimizer


@pytest.fixture
def estimated(monkeypatch, tmp_path, capfd):
    """estimated(stage, **flags): runs the stage's script with --estimate; returns (what is printed, the JSON file)."""
    monkeypatch.setattr(estimate, "SECONDS", 0)  # enough for tiny models

    def run(stage, **flags) -> tuple[str, dict]:
        main = importlib.import_module(f"trainer.{stage.script}").main
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        capfd.readouterr()
        estimate.run_or_estimate(main, tiny_flags(tmp_path, flags.pop("data_path"), **flags | {"estimate": True}))
        (file,) = tmp_path.glob("logs/**/*.estimate.json")
        return capfd.readouterr().out, json.loads(file.read_text("utf-8"))

    return run


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "token_cache" not in p.parts}


@each_stage(DPO)
def test_an_estimate_of_every_stage_prints_the_whole_and_saves_nothing_else(stage, estimated, inputs, tmp_path):
    more = {"epochs": 9, "save_interval": 1, "price_per_hour": 36000}
    shown, record = estimated(stage, **inputs(stage) | more)
    assert files(tmp_path) == {f"logs/{stage.name()}.estimate.json"}
    assert not list(tmp_path.glob(".estimate-*")), "the short run's folder is gone"
    assert shown.index("timing step ") < shown.index("this machine")
    steps, tokens = map(int, re.search(r"tokens in (\d+) steps (\d+) tokens a step", shown.replace(",", "")).groups())
    assert steps == record["steps"] >= 45 and 100 < tokens <= 4 * 2 * 128
    assert record["timed"] >= 4 and "8 × H100 SXM" in shown and "without evaluations" in shown
    cost = float(re.search(r"\$([\d,.]+) at \$36000 an hour", shown)[1].replace(",", ""))
    assert cost == pytest.approx(10 * record["seconds"], abs=0.01)
    assert ("before training: log-probs of" in shown) == (stage is DPO)
    disk = shown.split("disk: ")[1].splitlines()[0]
    assert ("log-probs" in disk) == (stage is DPO) and re.search(r"weights \d+ MB, resume \d+ MB", disk)


@pytest.mark.full
def test_the_pass_of_a_cached_teacher_is_part_of_the_estimate(estimated, inputs):
    shown, record = estimated(DISTILLATION, **inputs(DISTILLATION) | {"cache_teacher": 4, "batch_size": 1})
    seconds = float(re.search(r"before training: (?:most likely|likeliest) tokens of \w+\.pth, ([\d.]+) s", shown)[1])
    assert 0 < seconds < record["seconds"]


def test_an_estimate_leaves_a_run_that_could_be_resumed_alone(estimated, train, inputs, tmp_path):
    """Its base may be named by stage, and its adapter has been exported."""
    flags = inputs(LORA)
    for suffix in (".pth", ".json"):
        shutil.copy(flags["base_weight"].with_suffix(suffix), tmp_path / f"full_sft_32{suffix}")
    flags |= {"base_weight": "full_sft", "save_peft": True}
    train(LORA.script, tiny_flags(tmp_path, **flags | {"max_steps": 2}))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert "lora/lora_medical_32_peft/adapter_model.safetensors" in before
    estimated(LORA, **flags | {"max_steps": 7, "resume": True})
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert files(tmp_path) - before.keys() == {"logs/lora/lora_medical_32.estimate.json"}


def test_a_mistake_is_said_by_the_short_run(estimated, inputs, tmp_path, capfd):
    with pytest.raises(SystemExit, match="1"):
        estimated(PRETRAIN, **inputs(PRETRAIN) | {"learning_rate": -1})
    assert "error: --learning_rate -1" in capfd.readouterr().err
    assert not files(tmp_path) and not list(tmp_path.glob(".estimate-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_signal_ends_the_estimate_and_its_short_run(launcher, inputs, tmp_path, number):
    flags = inputs(PRETRAIN) | {"epochs": 10**6, "estimate": True}
    child = launcher.start(PRETRAIN.script, tiny_flags(tmp_path, flags.pop("data_path"), **flags))
    child.wait_for("timing step ")
    child.signal(number)
    assert child.wait() == 128 + number, child.output
    assert not list(tmp_path.glob(".estimate-*")) and "Traceback" not in child.output


def test_a_run_says_how_far_off_its_estimate_was(train, inputs, tmp_path, capsys):
    """The same flags, what changes neither time nor memory apart."""
    flags = inputs(PRETRAIN)
    command = tiny_flags(tmp_path, flags.pop("data_path"), **flags)
    start = {"flags": vars(train_pretrain.parse(command)), "processes": 1, "threads": 1}
    path = tmp_path / "logs" / "pretrain_32.estimate.json"
    write_json(path, {"seconds": 10.0, "bytes": 2e9, "flags": estimate.relevant_flags(start)})
    train(PRETRAIN.script, [*command, "--log_interval=2"])
    assert re.search(
        r"estimated: 10 s, 2.0 GB; it took [\d.]+ s \([+-]\d+%\) and [\d.]+ GB \([+-]\d+%\)", capsys.readouterr().out
    )
    train(PRETRAIN.script, [*command, "--hidden_size=48"])
    train(PRETRAIN.script, [*command, "--batch_size=2", "--overwrite"])
    assert "estimated" not in capsys.readouterr().out


def test_what_is_off_is_the_share_by_which_the_run_took_more(tmp_path):
    start, path = {"flags": {"batch_size": 3, "estimate": False}, "processes": 1, "threads": 1}, tmp_path / "a.json"
    path.write_text(json.dumps({"seconds": 100, "bytes": 2e9, "flags": estimate.relevant_flags(start)}), "utf-8")
    expected = "estimated: 100 s, 2.0 GB; it took 110 s (+10%) and 1.5 GB (-25%)"
    assert compared(path, start, 110, 1.5e9) == expected
    start["flags"]["estimate"] = True  # says nothing about the steps
    assert compared(path, start, 110, 1.5e9) == expected
    assert compared(path, start | {"processes": 2}, 110, 1.5e9) == ""
    assert compared(tmp_path / "none.json", start, 110, 1.5e9) == ""


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_memory_of_optimizer_state_is_what_the_optimizer_holds(optimizer, use_moe):
    model = sharp_model(use_moe)
    names = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "device": "cpu"}
    args = argparse.Namespace(optimizer=optimizer, zero_stage=0, embedding_lr_scale=2.0, **names)
    built = build_optimizer(model, args)
    sum(p.square().sum() for p in model.parameters()).backward()
    built.step()
    parts = [built] if isinstance(built, torch.optim.Optimizer) else built.parts
    states = [tensor for part in parts for state in part.state.values() for tensor in state.values()]
    held = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.numel() > 1)
    found = memory_parts(model, args, 1)
    assert found["optimizer state"] == held
    assert found["weights"] == found["gradients"] == sum(p.numel() * 4 for p in model.parameters())


def test_zero_divides_memory_among_processes():
    model = sharp_model()
    parts = {
        stage: memory_parts(model, argparse.Namespace(optimizer="adamw", zero_stage=stage), 4) for stage in range(4)
    }
    whole = parts[0]
    divided = {1: {"optimizer state"}, 2: {"optimizer state", "gradients"}, 3: set(whole)}
    for stage, names in divided.items():
        assert parts[stage] == {name: size // (4 if name in names else 1) for name, size in whole.items()}


def test_activations_by_hand():
    config = MiniMindConfig(hidden_size=512, num_hidden_layers=2)
    # inputs of two norms 2 × 2,048, normaliser of 8 heads 32; norms' results 2 × 1,024, query 1,024, key and value
    # 2 × 256, attention 1,024, SwiGLU 3 × 2,816
    layer = 4096 + 32 + 2048 + 1024 + 512 + 1024 + 8448
    # the last norm 2,048 + 1,024, probabilities 2 × 6,400, gradients of a feed-forward 8,448
    end = 3072 + 12800 + 8448
    assert activation_bytes(config, 10) == 10 * (2 * layer + end)
    assert activation_bytes(config, 10, whole_head=False) == 10 * (2 * layer + end - 12800)
    assert activation_bytes(config, 10, checkpointing=True) == 10 * (2 * 2048 + layer + end)
    # in float32 all but the stream, the normaliser and the last norm's input is twice as large
    assert activation_bytes(config, 10, size=4) == 20 * (2 * layer + end) - 10 * (2 * 4128 + 2048)
    # two chosen experts and the shared one; what the chosen ones read and give, 2 × 2 × 1,024
    moe = MiniMindConfig(hidden_size=512, num_hidden_layers=2, use_moe=True)
    assert activation_bytes(moe, 10) == 10 * (2 * (layer + 2 * 8448 + 4096) + end + 2 * 8448)


def test_memory_of_attentions_backward_by_hand():
    # 4 × 512 bytes for each of 10 positions and of 128 for each of 3 documents
    assert attention_backward_bytes(MiniMindConfig(hidden_size=512), 10, 3) == 2048 * 394


@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True])
def test_activations_are_those_that_the_compiled_forward_of_a_gpu_keeps(use_moe, monkeypatch):
    """Traced as on CUDA, but on a CPU and not run: what the compiler hands from the forward to the backward graph."""
    kept = []

    class Traced(Exception):
        pass

    def forward_graph(graph, inputs):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["val"] for node in output.args[0] if node is not None and node.op != "placeholder"]
        kept.append(sum(value.nbytes for value in values if isinstance(value, torch.Tensor)))
        raise Traced

    as_on_cuda(monkeypatch)
    torch._dynamo.reset()  # forget what other tests compiled of the same code
    config = MiniMindConfig(hidden_size=256, num_hidden_layers=3, use_moe=use_moe)
    model, (rows, seq) = MiniMindForCausalLM(config), (8, 512)
    ids = torch.zeros(rows, seq, dtype=torch.int64)
    borders = torch.zeros(rows * 9 + 1, dtype=torch.int32)
    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(fw_compiler=forward_graph, bw_compiler=forward_graph, partition_fn=partition)
    compiled = torch.compile(model.model, backend=backend, dynamic=False, fullgraph=True)
    with pytest.raises(Exception, match="Traced"), torch.autocast("cpu", torch.bfloat16):
        compiled(input_ids=ids, position_ids=ids, document_ids=ids.int(), cu_seqlens=borders, max_seqlen=seq)
    assert len(kept) == 1, "one graph, without a break"
    weights = 2 * sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    feed_forward_gradients = 6 * config.intermediate_size * (3 if use_moe else 1)
    computed = activation_bytes(config, rows * seq, whole_head=False) - rows * seq * feed_forward_gradients + weights
    assert computed == pytest.approx(kept[0], rel=0.05)


def as_on_cuda(monkeypatch) -> None:
    """The functions that CUDA uses, on a CPU."""
    monkeypatch.setattr(model_minimind, "trains_eagerly_on_cpu", lambda x: False)
    monkeypatch.setattr(
        model_minimind.RMSNorm,
        "forward",
        lambda self, x: F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(model_minimind.compute_dtype(x)),
    )

    def packed(cls, borders, longest, *_):
        return cls("varlen", cu_seqlens=borders, max_seqlen=longest)

    monkeypatch.setattr(model_minimind.AttentionPlan, "packed", classmethod(packed))
    monkeypatch.setattr(model_minimind.MoEFeedForward, "_sliced", model_minimind.MoEFeedForward._grouped)


def test_assumed_shares_of_the_peak():
    shares = [assumed_mfu(MiniMindConfig(hidden_size=size), 1) for size in (256, 512, 640, 768, 1024)]
    assert shares == pytest.approx([0.15, 0.30, 0.375, 0.45, 0.45])
    assert assumed_mfu(MiniMindConfig(), 8) == pytest.approx(0.27)


def made(kind: str = "pretrain", steps: list[dict] | None = None, positions: int = 512, **flags) -> Estimate:
    """From the log of two steps of 300 tokens and a second each; weights of 100 MB."""
    values = {"max_seq_len": 512, "batch_size": 32, "accumulation_steps": 1, "gradient_checkpointing": False}
    start = {
        "event": "start", "flags": values | {"dtype": "bfloat16", "epochs": 1} | flags, "kind": kind,
        "config": MiniMindConfig().to_diff_dict(), "device": "cpu", "processes": 1, "threads": 1,
        "parameters": 25 * 10**6, "frozen": 0, "peak_flops_per_second": 100.0, "passes": {}, "stores": {},
        "bytes": {"weights": 10**8, "gradients": 10**8, "optimizer state": 2 * 10**8},
        "total_steps": 10, "steps_per_epoch": 10, "tokens_per_step": 300, "segments_per_row": 7, "cache": "/nowhere",
    }  # fmt: skip
    numbers = {"seconds_per_step": 1.0, "mfu": 0.5, "padding": 1 - 300 / positions, "peak_memory_bytes": 7}
    steps = steps or [{"seconds": n, "processor_seconds": n, "tokens": 300 * n} for n in (1, 2)]
    return Estimate([start, *({"event": "step"} | numbers | step for step in steps)])


def card_lines(seconds: float = 3600.0, **flags) -> dict[str, str]:
    """Ten steps that take an RTX 4090 so many seconds at the share of its peak that is assumed."""
    estimate = made(**flags)
    estimate.flops = 165e12 * 0.3 * seconds / 10
    return dict(zip((card.name for card in CARDS), estimate.card_lines(), strict=True))


def test_time_and_cost_of_a_card_by_hand():
    lines = card_lines()
    assert lines["RTX 4090"].split()[-3:] == ["60.0", "min", "$0.50"]
    assert lines["8 × RTX 4090"].split()[-3:] == ["8.3", "min", "$0.56"]


def test_memory_of_a_card_by_hand(monkeypatch):
    config = MiniMindConfig()
    # seven documents and their padding are the most that a row holds
    backward = 4 * 512 * (512 + 128 * 8)
    row = activation_bytes(config, 512) + backward
    fixed = 10**8 + 2 * 10**8 + estimate.CONTEXT_BYTES  # weights, optimizer state
    copies = 10**8 // 2  # of the weights in bfloat16
    assert 32 * row + copies > 10**8, "else gradients, which come as activations go, are what is largest"
    assert made().bytes_on_a_card(32) == fixed + 32 * row + copies
    accumulated = made(accumulation_steps=2)  # the gradients of earlier micro-batches are there meanwhile
    assert accumulated.bytes_on_a_card(32) == fixed + 32 * row + copies + 10**8
    single = made(dtype="float32")
    assert single.bytes_on_a_card(32) == fixed + 32 * activation_bytes(config, 512, size=4)
    distilled = made()
    distilled.bytes["teacher"] = 5 * 10**7
    without_head = activation_bytes(config, 512, whole_head=False) + backward
    assert distilled.bytes_on_a_card(32) == fixed + 5 * 10**7 + 32 * without_head + copies
    monkeypatch.setattr(estimate, "HAS_VARLEN", False)
    assert made().bytes_on_a_card(32) == fixed + 32 * (row - backward) + copies


@pytest.mark.parametrize("kind", ["pretrain", "preference"])
def test_borders_are_as_many_as_batches_of_a_gpu_have(tmp_path, tokenizer, kind):
    path = write_data(kind, tmp_path / "data.jsonl", count=12)
    args = stage_parser("").parse_args(tiny_flags(tmp_path, path, cache_dir=tmp_path, batch_size=3))
    data = PackedData(args, kind, tokenizer, Process(0, 0, 1, torch.device("cuda")))
    estimate = made(kind)
    estimate.start["segments_per_row"] = data.plan.max_segments_per_row
    assert estimate.borders(3) == len(data._batches(0)[0]["cu_seqlens"]) - 1


@pytest.mark.parametrize("positions, rows", [(2 * 512, 4), (4 * 512, 4), (5 * 512, 8)])
def test_pairs_take_as_many_rows_as_were_seen(positions, rows):
    assert made("preference", positions=positions, batch_size=4).rows == rows
    assert made("pretrain", positions=positions, batch_size=4).rows == 4


def test_steps_of_grpo_that_taught_nothing_can_be_estimated():
    steps = [{"seconds": n, "processor_seconds": n, "tokens": 0, "mfu": 0.0} for n in (1, 2)]
    log = made("rollouts", steps)
    estimate = Estimate([{k: v for k, v in log.start.items() if k != "tokens_per_step"}, *log.steps])
    assert estimate.seconds == 10 and "0 tokens/s" in estimate.report({})


def test_what_does_not_fit_is_said_with_flags_that_fit_and_keep_the_step():
    lines = card_lines(batch_size=512, accumulation_steps=3)
    rows, steps = map(
        int, re.search(r"does not fit: --batch_size (\d+) --accumulation_steps (\d+)$", lines["RTX 4090"]).groups()
    )
    assert rows * steps == 512 * 3 and rows < 512 and "does not fit" not in lines["H200"]
    assert "does not fit" not in card_lines(batch_size=rows, accumulation_steps=steps)["RTX 4090"]
    divisors = [n for n in range(rows + 1, 512) if 512 * 3 % n == 0]
    assert "does not fit" in card_lines(batch_size=divisors[0], accumulation_steps=512 * 3 // divisors[0])["RTX 4090"]


def test_checkpointing_is_proposed_only_where_rows_alone_are_not_enough():
    one_row = {"batch_size": 1, "max_seq_len": 32768 * 8}
    assert card_lines(**one_row)["RTX 4090"].endswith("--batch_size 1 --accumulation_steps 1 --gradient_checkpointing")
    assert "use a smaller model" in card_lines(**one_row | {"max_seq_len": 32768 * 256})["RTX 4090"]
    assert (
        "use a smaller model"
        in card_lines(**one_row | {"max_seq_len": 32768 * 64, "gradient_checkpointing": True})["RTX 3090"]
    )


def test_steps_of_pairs_are_scaled_to_the_tokens_of_an_average_step():
    """Timed are 2 s with 150 tokens and 4 s with 250; an average step of the run has 300."""
    steps = [
        {"seconds": 9, "processor_seconds": 9, "tokens": 1000, "seconds_per_step": 9},
        {"seconds": 11, "processor_seconds": 10, "tokens": 1150, "seconds_per_step": 2},
        {"seconds": 15, "processor_seconds": 12, "tokens": 1400, "seconds_per_step": 4},
    ]
    for kind, longer in (("preference", 1.5), ("pretrain", 1.0)):
        estimate = made(kind, steps)
        assert estimate.step_seconds == pytest.approx(3 * longer) and estimate.timed == 2
        assert estimate.compiling == pytest.approx(9 - 3 * longer) and estimate.first_processor == 9
        assert estimate.processor == pytest.approx(1.5 * longer)
        assert estimate.seconds == pytest.approx(10 * 3 * longer + 9 - 3 * longer)
        assert estimate.flops == pytest.approx(100 * 0.5 * 3 * 1.5) and estimate.memory == 7


def test_a_later_step_that_compiles_is_counted_once():
    """Steps of a second, of which the first took 31 and the fifth 21: 50 seconds of compiling in all."""
    ends = np.cumsum([31, 1, 1, 1, 21, 1, 1])
    estimate = made(steps=[{"seconds": n, "processor_seconds": n, "tokens": 300 * i} for i, n in enumerate(ends, 1)])
    assert (estimate.step_seconds, estimate.spread, estimate.timed) == (1, 0, 5)
    assert estimate.seconds == 10 * 1 + 50


def test_logits_that_a_cpu_leaves_out_count_on_a_card():
    log = made()
    start = log.start | {"targets_per_step": 100, "skipped_flops": 7}
    assert Estimate([start, *log.steps]).flops == log.flops + 7 * (300 - 100)


def test_the_rest_of_the_mapped_tokens_counts_as_far_as_the_run_will_read_it(tmp_path):
    """Two steps of ten in an epoch were read."""
    (tmp_path / "tokens.bin").write_bytes(bytes(1000))
    for steps, expected in ((5, 500), (10, 1000), (30, 1000)):
        log = made()
        log = [log.start | {"total_steps": steps, "cache": str(tmp_path)}, *log.steps]
        estimate = Estimate(log)
        assert estimate.bytes["tokens"] == expected and estimate.to_come == expected - 200
        assert estimate.memory == 7 + expected - 200
        assert "tokens" not in Estimate([log[0] | {"device": "cuda:0"}, *log[1:]]).bytes
