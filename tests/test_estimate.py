"""--estimate: counts by hand, nothing saved, and what a later run says about it."""

import argparse
import json
import re

import pytest
import torch
from conftest import DISTILLATION, DPO, PRETRAIN, each_stage, sharp_model, tiny_flags

from model.model_minimind import MiniMindConfig
from trainer import estimate
from trainer.cost import activation_bytes
from trainer.distributed import Process
from trainer.estimate import CARDS, Calibration, assumed_mfu, compared, memory_parts
from trainer.optimization import build_optimizer


def alone(world_size: int = 1) -> Process:
    return Process(rank=0, local_rank=0, world_size=world_size, device=torch.device("cpu"))


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "token_cache" not in p.parts}


@each_stage()
def test_an_estimate_of_every_stage_prints_the_whole_and_saves_nothing_else(stage, train, inputs, tmp_path, capsys):
    flags = inputs(stage) | {"estimate": True, "epochs": 3, "save_interval": 1, "price_per_hour": 36000}
    train(stage.script, tiny_flags(tmp_path, flags.pop("data_path"), **flags))
    assert files(tmp_path) == {f"logs/{stage.name()}.estimate.json"}
    shown = capsys.readouterr().out
    steps, tokens = map(int, re.search(r"tokens in (\d+) steps (\d+) tokens a step", shown.replace(",", "")).groups())
    assert steps >= 15 and 100 < tokens <= 4 * 2 * 128
    assert "(4 timed)" in shown and "8 × H100 SXM" in shown and "without evaluations" in shown
    seconds = json.loads((tmp_path / "logs" / f"{stage.name()}.estimate.json").read_text("utf-8"))["seconds"]
    assert float(re.search(r"\$([\d,.]+) at \$36000 an hour", shown)[1].replace(",", "")) == pytest.approx(
        10 * seconds, abs=0.01
    )
    assert ("beforehand: log-probs of" in shown) == (stage is DPO)


def test_the_pass_of_a_cached_teacher_is_part_of_the_estimate(train, inputs, tmp_path, capsys):
    flags = inputs(DISTILLATION) | {"estimate": True, "cache_teacher": 4, "batch_size": 1}
    train(DISTILLATION.script, tiny_flags(tmp_path, flags.pop("data_path"), **flags))
    beforehand = float(re.search(r"beforehand: likeliest tokens of \w+\.pth, ([\d.]+) s", capsys.readouterr().out)[1])
    assert 0 < beforehand < json.loads((tmp_path / "logs/full_dist_32.estimate.json").read_text("utf-8"))["seconds"]


def test_an_estimate_leaves_a_run_that_could_be_resumed_alone(train, inputs, tmp_path, capsys):
    flags = inputs(PRETRAIN)
    command = tiny_flags(tmp_path, flags.pop("data_path"), **flags)
    train(PRETRAIN.script, [*command, "--max_steps=2"])
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    train(PRETRAIN.script, [*command, "--estimate", "--resume"])
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "holds the state" not in capsys.readouterr().out.split("ready")[-1]


def test_a_run_says_how_far_off_its_estimate_was(train, inputs, tmp_path, capsys):
    flags = inputs(PRETRAIN)
    command = tiny_flags(tmp_path, flags.pop("data_path"), **flags)
    train(PRETRAIN.script, [*command, "--estimate"])
    capsys.readouterr()
    train(PRETRAIN.script, [*command, "--log_interval=2"])
    assert re.search(
        r"estimated: [\d.]+ s, [\d.]+ GB; it took [\d.]+ s \([+-]\d+%\) and [\d.]+ GB", capsys.readouterr().out
    )
    train(PRETRAIN.script, [*command, "--hidden_size=48"])
    train(PRETRAIN.script, [*command, "--batch_size=2"])
    assert "estimated" not in capsys.readouterr().out


def test_what_is_off_is_the_share_by_which_the_run_took_more(tmp_path):
    args, path = argparse.Namespace(batch_size=3, estimate=False), tmp_path / "a.json"
    flags = estimate.relevant_flags(args, alone())
    path.write_text(json.dumps({"seconds": 100, "bytes": 2e9, "flags": flags}), "utf-8")
    expected = "estimated: 100 s, 2.0 GB; it took 110 s (+10%) and 1.5 GB (-25%)"
    assert compared(path, args, alone(), 110, 1.5e9) == expected
    args.estimate = True  # says nothing about the steps
    assert compared(path, args, alone(), 110, 1.5e9) == expected
    assert compared(path, args, alone(2), 110, 1.5e9) == ""
    assert compared(tmp_path / "none.json", args, alone(), 110, 1.5e9) == ""


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_memory_of_optimizer_state_is_what_the_optimizer_holds(optimizer, use_moe):
    model = sharp_model(use_moe)
    names = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "device": "cpu"}
    args = argparse.Namespace(optimizer=optimizer, zero_stage=0, **names)
    built = build_optimizer(model, args)
    sum(p.square().sum() for p in model.parameters()).backward()
    built.step()
    parts = [built] if isinstance(built, torch.optim.Optimizer) else built.parts
    states = [tensor for part in parts for state in part.state.values() for tensor in state.values()]
    held = sum(t.nbytes for t in states if isinstance(t, torch.Tensor) and t.numel() > 1)
    found = memory_parts(model, args, alone())
    assert found["optimizer state"] == held
    assert found["weights"] == found["gradients"] == sum(p.numel() * 4 for p in model.parameters())


def test_zero_divides_memory_among_processes():
    model = sharp_model()
    parts = {
        stage: memory_parts(model, argparse.Namespace(optimizer="adamw", zero_stage=stage), alone(4))
        for stage in range(4)
    }
    whole = parts[0]
    divided = {1: {"optimizer state"}, 2: {"optimizer state", "gradients"}, 3: set(whole)}
    for stage, names in divided.items():
        assert parts[stage] == {name: size // (4 if name in names else 1) for name, size in whole.items()}


def test_activations_by_hand():
    config = MiniMindConfig(hidden_size=512, num_hidden_layers=2)
    # norms 2 × 2,048, their results 2 × 1,024, query 1,024, key and value 2 × 256, attention 1,024, SwiGLU 3 × 2,816
    layer = 4096 + 2048 + 1024 + 512 + 1024 + 8448
    assert activation_bytes(config, 10) == 10 * 2 * layer
    assert activation_bytes(config, 10, checkpointing=True) == 10 * (2 * 2048 + layer)
    # two chosen experts and the shared one; what the chosen ones read and give, 2 × 2 × 1,024
    moe = MiniMindConfig(hidden_size=512, num_hidden_layers=2, use_moe=True)
    assert activation_bytes(moe, 10) == 10 * 2 * (layer + 2 * 8448 + 4096)


def test_assumed_shares_of_the_peak():
    shares = [assumed_mfu(MiniMindConfig(hidden_size=size), 1) for size in (256, 512, 640, 768, 1024)]
    assert shares == pytest.approx([0.15, 0.30, 0.375, 0.45, 0.45])
    assert assumed_mfu(MiniMindConfig(), 8) == pytest.approx(0.27)


def card_lines(batch_size: int, flops: float = 165e12 * 0.3 * 3600, checkpointing: bool = False) -> dict[str, str]:
    calibration = Calibration.__new__(Calibration)
    calibration.args = argparse.Namespace(max_seq_len=512, batch_size=batch_size, gradient_checkpointing=checkpointing)
    calibration.parts = {"weights": 10**8, "gradients": 10**8, "optimizer state": 10**8}
    lines = calibration._card_lines(MiniMindConfig(), flops, 1.0)
    return dict(zip((card.name for card in CARDS), lines, strict=True))


def test_time_and_cost_of_a_card_by_hand():
    lines = card_lines(batch_size=32)
    assert lines["RTX 4090"].split()[-3:] == ["60.0", "min", "$0.50"]
    assert lines["8 × RTX 4090"].split()[-3:] == ["8.3", "min", "$0.56"]


def test_what_does_not_fit_is_said_with_the_cure():
    lines = card_lines(batch_size=512)
    rows = int(re.search(r"does not fit: --batch_size (\d+), or --gradient_checkpointing", lines["RTX 4090"])[1])
    assert 0 < rows < 512 and "does not fit" not in lines["H200"]
    assert "does not fit" not in card_lines(batch_size=rows)["RTX 4090"]
    assert "does not fit" in card_lines(batch_size=rows + 1)["RTX 4090"]
    assert "or --gradient" not in card_lines(batch_size=10000, checkpointing=True)["RTX 3090"]
