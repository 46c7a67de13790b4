"""DeepSpeed's ZeRO: the same training as DistributedDataParallel, resumed from shards, and the same weight files."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    DISTILLATION,
    DPO,
    FULL_SFT,
    LORA,
    PRETRAIN,
    ROOT,
    SPEEDS,
    STAGES,
    read_log,
    read_resume,
    relative_error,
    replace_step,
    tiny_flags,
)

from trainer import zero
from trainer.arguments import parse_arguments, stage_parser
from trainer.zero import zero_settings

needs_deepspeed = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
# eight rows a step on two processes; the last of five steps is ragged
SIZES = {"batch_size": 2, "accumulation_steps": 2, "learning_rate": 1e-3}
SECONDS = 400


def keep_float32(module) -> None:
    """The trained weights as they are in training, at every save."""
    save = module.Checkpoint.save

    def keep(checkpoint, training, *arguments):
        save(checkpoint, training, *arguments)
        with training.whole_weights() as model:
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            if checkpoint.process.is_main:
                torch.save(trained, os.environ["WEIGHTS"])

    module.Checkpoint.save = keep


def norm_in_float64(module) -> None:
    """As DeepSpeed's. torch adds squares in float32, and on some CPUs that loses 1e-4 of a large matrix's norm."""

    def clip(parameters, max_norm):
        norm = torch.stack([p.grad.double().square().sum() for p in parameters]).sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm.float())
        return norm

    torch.nn.utils.clip_grad_norm_ = clip


def killed_at_step_4(module) -> None:
    def make(take_step):
        calls = []

        def step(*arguments):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return take_step(*arguments)

        return step

    replace_step(make)


@pytest.fixture(scope="module")
def everything_divided(tmp_path_factory):
    """Settings under which ZeRO-3 divides small weights too, as it does large ones by default."""
    path = tmp_path_factory.mktemp("settings") / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage": "auto"}}))
    return path


class Runs:
    """Runs of one stage on two processes that differ in how they are divided."""

    def __init__(self, launcher, folder, stage, flags):
        self.launcher, self.folder, self.stage = launcher, folder, stage
        self.flags = SIZES | {"optimizer": "adamw"} | flags  # what ZeRO takes
        self.name = stage.name(self.flags.get("use_moe", False))

    def line(self, name, **flags):
        return tiny_flags(self.folder / name, **self.flags | flags)

    def run(self, name, **flags):
        """The float32 weights at the end."""
        weights = self.folder / f"{name}.float32"
        self.printed = self.launcher.run(
            self.stage.script, self.line(name, **flags), 2, SECONDS, env={"WEIGHTS": str(weights)},
            patches=[keep_float32, norm_in_float64],
        )  # fmt: skip
        return torch.load(weights)

    def kill(self, name, **flags):
        children = self.launcher.start_ranks(
            2, self.stage.script, self.line(name, **flags), env={"WEIGHTS": str(self.folder / "unused")},
            patches=[keep_float32, killed_at_step_4],
        )  # fmt: skip
        assert -signal.SIGKILL in [child.wait(SECONDS) for child in children], children[0].output


def assert_same_log(ours, theirs, tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs) == 5
    for line, expected in zip(ours, theirs, strict=True):
        for name in expected.keys() - SPEEDS - {"event"}:
            assert line[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance / 10), name


def zero_flags(stage: int, everything_divided) -> dict:
    return {"zero_stage": stage} | ({"deepspeed_config": everything_divided} if stage == 3 else {})


@needs_deepspeed
def test_zero_killed_and_resumed_trains_as_ddp(launcher, tmp_path, inputs):
    """Five steps of two micro-batches; killed in the fourth, and resumed from the shards of the third."""
    runs = Runs(launcher, tmp_path, FULL_SFT, inputs(FULL_SFT))
    expected = runs.run("ddp")
    runs.kill("zero", zero_stage=2, save_interval=3)
    (shards,) = (tmp_path / "zero/resume/full_sft_32.shards").iterdir()
    assert shards.name.startswith("step-3-")
    weights = runs.run("zero", zero_stage=2, save_interval=3, resume=True)
    assert "is at step 3; going on" in runs.printed
    assert relative_error(weights, expected) < 1e-4
    assert_same_log(read_log(tmp_path / "zero", runs.name)[-5:], read_log(tmp_path / "ddp", runs.name))
    halves = [torch.load(tmp_path / name / "full_sft_32.pth", weights_only=True) for name in ("zero", "ddp")]
    assert {tensor.dtype for tensor in halves[0].values()} == {torch.float16}
    assert halves[0]["lm_head.weight"].data_ptr() == halves[0]["model.embed_tokens.weight"].data_ptr()
    assert relative_error(*halves) < 1e-4
    (left,) = (tmp_path / "zero/resume/full_sft_32.shards").iterdir()
    assert left.name == read_resume(tmp_path / "zero", "full_sft_32")["shards"], "older shards are removed"


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.script)
def test_every_stage_trains_as_ddp(launcher, tmp_path, inputs, everything_divided, stage, use_moe):
    runs = Runs(launcher, tmp_path, stage, inputs(stage, use_moe))
    expected = runs.run("ddp")
    for number in (1, 2, 3):
        name = f"zero{number}"
        weights = runs.run(name, **zero_flags(number, everything_divided))
        assert relative_error(weights, expected) < 1e-4, name
        assert_same_log(read_log(tmp_path / name, runs.name), read_log(tmp_path / "ddp", runs.name))
        halves = [torch.load(tmp_path / n / f"{runs.name}.pth", weights_only=True) for n in (name, "ddp")]
        assert relative_error(*halves) < 1e-4


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "stage, use_moe",
    [
        pytest.param(stage, moe, id=stage.script)
        for stage, moe in ((PRETRAIN, True), (LORA, True), (DPO, False), (DISTILLATION, False))
    ],
)
def test_killed_and_resumed_ends_as_if_uninterrupted(
    launcher, tmp_path, inputs, everything_divided, stage, use_moe, number
):
    runs = Runs(launcher, tmp_path, stage, inputs(stage, use_moe))
    flags = zero_flags(number, everything_divided) | {"save_interval": 3}
    expected = runs.run("whole", **flags)
    runs.kill("parts", **flags)
    assert relative_error(runs.run("parts", resume=True, **flags), expected) < 1e-4
    assert "is at step 3; going on" in runs.printed


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("number", [1, 2, 3])
def test_bfloat16_under_zero_is_that_of_ddp(launcher, tmp_path, inputs, everything_divided, number):
    runs = Runs(launcher, tmp_path, PRETRAIN, inputs(PRETRAIN) | {"dtype": "bfloat16"})
    expected = runs.run("ddp")
    weights = runs.run("zero", **zero_flags(number, everything_divided))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert relative_error(weights, expected) < 5e-3
    assert_same_log(read_log(tmp_path / "zero"), read_log(tmp_path / "ddp"), 5e-3)


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True])
def test_zero_3_evaluates_samples_and_goes_on(launcher, tmp_path, inputs, everything_divided, use_moe):
    """Held-out numbers, the sample and the training after them are those of DDP."""
    flags = inputs(PRETRAIN, use_moe)
    flags |= {"valid_path": flags["data_path"], "sample_prompt": "the old king", "eval_interval": 2}
    runs = Runs(launcher, tmp_path, PRETRAIN, flags)
    expected = runs.run("ddp")
    weights = runs.run("zero", **zero_flags(3, everything_divided))
    assert relative_error(weights, expected) < 1e-4
    ours, theirs = (read_log(tmp_path / name, runs.name, "evaluation") for name in ("zero", "ddp"))
    assert [line["step"] for line in ours] == [2, 4, 5] and all(line["sample"] for line in ours)
    for line, other in zip(ours, theirs, strict=True):
        assert line["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-4)
        assert line["sample"] == other["sample"]


@needs_deepspeed
@pytest.mark.full
def test_clipping_and_its_norm_under_zero(launcher, tmp_path, inputs, everything_divided):
    """The norm shown is that before clipping; the clip bites at every step."""
    runs = Runs(launcher, tmp_path, PRETRAIN, inputs(PRETRAIN) | {"grad_clip": 0.01})
    expected = runs.run("ddp")
    for number in (1, 2, 3):
        assert relative_error(runs.run(f"zero{number}", **zero_flags(number, everything_divided)), expected) < 1e-4
        log = read_log(tmp_path / f"zero{number}")
        assert min(line["grad_norm"] for line in log) > 0.1
        assert_same_log(log, read_log(tmp_path / "ddp"))


@needs_deepspeed
@pytest.mark.full
def test_another_number_of_processes_is_refused(launcher, tmp_path, inputs):
    runs = Runs(launcher, tmp_path, PRETRAIN, inputs(PRETRAIN))
    runs.run("zero", zero_stage=1)
    child = launcher.start("train_pretrain", runs.line("zero", zero_stage=1, resume=True, accumulation_steps=4))
    assert child.wait(SECONDS) == 1
    assert "saved under ZeRO by 2 processes" in child.output and "Traceback" not in child.output
    child = launcher.start("train_pretrain", runs.line("zero", resume=True, accumulation_steps=4))
    assert child.wait() == 1 and "--zero_stage was 1, is 0" in child.output
    shutil.rmtree(tmp_path / "zero/resume/pretrain_32.shards")
    children = launcher.start_ranks(2, "train_pretrain", runs.line("zero", zero_stage=1, resume=True))
    assert [child.wait(SECONDS) for child in children] == [1, 1]
    assert "pretrain_32.shards" in children[0].output and "Traceback" not in children[0].output


@needs_deepspeed
@pytest.mark.full
def test_a_kill_while_shards_are_written_leaves_the_last_state(launcher, tmp_path, inputs):
    runs = Runs(launcher, tmp_path, PRETRAIN, inputs(PRETRAIN))
    expected = runs.run("whole", zero_stage=2)
    children = launcher.start_ranks(
        2, "train_pretrain", runs.line("parts", zero_stage=2, save_interval=1), env={"WEIGHTS": "unused"},
        patches=[killed_in_the_third_save],
    )  # fmt: skip
    for child in children:
        child.wait(SECONDS)
    assert read_resume(tmp_path / "parts")["progress"]["step"] == 2
    assert len(list((tmp_path / "parts/resume/pretrain_32.shards").iterdir())) == 2, "a half of the third is there"
    assert relative_error(runs.run("parts", zero_stage=2, save_interval=1, resume=True), expected) < 1e-4


def killed_in_the_third_save(module) -> None:
    """The first process dies when its shard is written and the other's may be."""
    from trainer import training

    save_shards, calls = training.save_shards, []

    def save(*arguments):
        save_shards(*arguments)
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    training.save_shards = save


@needs_deepspeed
@pytest.mark.full
def test_the_deepspeed_launcher(tmp_path, texts):
    """The real command, which passes --local_rank; without --zero_stage it is a launcher only."""
    outputs = []
    for name, more in (("plain", []), ("zero", ["--zero_stage=2"])):
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "train_pretrain.py"]
        flags = tiny_flags(tmp_path / name, texts, batch_size=4, optimizer="adamw")
        done = subprocess.run(
            [*command, *flags, *more], cwd=ROOT / "trainer",
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "2 processes" in done.stdout and done.stdout.count("(5/5)") == 1
        outputs.append(torch.load(tmp_path / name / "pretrain_32.pth", weights_only=True))
    assert relative_error(*outputs) < 1e-4


@needs_deepspeed
@pytest.mark.full
@pytest.mark.parametrize("number", [1, 3])
def test_one_process_needs_no_launcher(launcher, tmp_path, texts, number):
    flags = {"batch_size": 8, "optimizer": "adamw"}
    launcher.run("train_pretrain", tiny_flags(tmp_path / "plain", texts, **flags))
    launcher.run("train_pretrain", tiny_flags(tmp_path / "zero", texts, zero_stage=number, **flags), seconds=SECONDS)
    halves = [torch.load(tmp_path / name / "pretrain_32.pth", weights_only=True) for name in ("zero", "plain")]
    assert relative_error(*halves) < 1e-4


# --- flags -----------------------------------------------------------------------------------------------------------


def parse(*flags: str):
    return parse_arguments(stage_parser(""), ["--device=cpu", *flags])


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed runs on Linux only")
def test_zero_takes_adamw_only():
    for optimizer in ("muon", "sgd"):
        with pytest.raises(ValueError, match=f"--optimizer {optimizer}: .*AdamW"):
            parse("--zero_stage=2", f"--optimizer={optimizer}")
    assert parse("--optimizer=muon").optimizer == "muon"


def test_without_deepspeed_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(zero.sys, "platform", "linux")
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--zero_stage 1: deepspeed is not installed; run: pip install"):
        parse("--zero_stage=1")
    parse()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_than_linux_are_told_so(monkeypatch, platform):
    monkeypatch.setattr(zero.sys, "platform", platform)
    with pytest.raises(ValueError, match="--zero_stage 3: DeepSpeed runs on Linux only"):
        parse("--zero_stage=3")
    parse()


@needs_deepspeed
def test_a_file_of_settings_lies_over_ours(tmp_path):
    path = tmp_path / "deepspeed.json"
    content = {"zero_optimization": {"stage": "auto", "overlap_comm": True, "offload_optimizer": {"device": "cpu"}}}
    path.write_text(json.dumps(content | {"steps_per_print": 7, "train_batch_size": "auto"}))
    args = parse("--zero_stage=2", f"--deepspeed_config={path}", "--grad_clip=0.5")
    settings = zero_settings(args, torch.bfloat16, cuda=False)
    assert settings["zero_optimization"]["stage"] == 2 and settings["zero_optimization"]["overlap_comm"] is True
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["zero_optimization"]["reduce_bucket_size"] > 0, "what the file leaves out is ours"
    assert settings["steps_per_print"] == 7 and settings["gradient_clipping"] == 0.5
    assert settings["torch_autocast"]["dtype"] == "bfloat16" and "train_batch_size" not in settings
    assert zero_settings(args, torch.float16, cuda=True)["fp16"]["enabled"]
    path.write_text(json.dumps({"bf16": {"enabled": True}}))
    assert "torch_autocast" not in zero_settings(args, torch.bfloat16, cuda=False), "one kind of bfloat16"


def test_a_machine_without_the_weights_shard_is_told_to_share_the_disk(tmp_path):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="several machines need one --out_dir"):
        zero.load_shards(None, tmp_path)


@needs_deepspeed
@pytest.mark.parametrize(
    "content, said",
    [
        ('{"train_batch_size": 8, "optimizer": {"type": "Adam"}}', "optimizer, train_batch_size must go"),
        ('{"zero_optimization": {"stage": 3}}', "stage 3 contradicts --zero_stage 2"),
        ('{"zero_optimization": true}', "zero_optimization must be an object"),
        ('{"bf16": true}', "bf16 must be an object"),
        ("[1]", "must hold a JSON object"),
        ("{", "deepspeed.json: Expecting"),
        (None, "No such file"),
    ],
)
def test_a_file_of_settings_that_contradicts_is_refused(tmp_path, content, said):
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="--deepspeed_config") as caught:
        parse("--zero_stage=2", f"--deepspeed_config={path}")
    assert said in str(caught.value)
    with pytest.raises(ValueError, match="needs --zero_stage"):
        parse(f"--deepspeed_config={path}")
