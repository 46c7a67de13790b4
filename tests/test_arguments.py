"""Flags: they mean what they say, all mistakes are told at once, each one is read, and defaults stand on the root."""

import argparse
import ast
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, replace_step, tiny_flags

from model.flags import show_defaults
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights
from trainer import arguments
from trainer.arguments import model_config, parse_arguments, stage_parser

SCRIPTS = sorted(path.stem for path in (ROOT / "trainer").glob("train_*.py"))


def parse(*flags: str, **defaults):
    return parse_arguments(stage_parser("", **defaults), list(flags))


@pytest.mark.parametrize(
    "flags, value",
    [
        ((), False),
        (("--use_moe",), True),
        (("--use_moe", "true"), True),
        (("--use_moe", "True"), True),
        (("--use_moe=1",), True),
        (("--use_moe", "False"), False),
        (("--use_moe", "false"), False),
        (("--use_moe=0",), False),
        (("--use_moe", "--epochs", "2"), True),
    ],
)
def test_booleans_mean_what_they_say(flags, value):
    assert parse(*flags).use_moe is value


def test_other_booleans_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse("--use_moe", "maybe")
    assert "expected true or false, got 'maybe'" in capsys.readouterr().err


def test_all_mistakes_are_told_at_once():
    flags = {
        "batch_size": 0,
        "accumulation_steps": -1,
        "epochs": 0,
        "learning_rate": -1.0,
        "min_lr_ratio": 1.5,
        "decay_ratio": -0.5,
        "warmup_iters": -2,
        "beta2": 1.0,
        "grad_clip": -1.0,
        "num_workers": -1,
        "log_interval": 0,
        "save_interval": 0,
        "max_seq_len": 40_000,
        "hidden_size": 100,
        "num_attention_heads": 8,
        "device": "gpu",
        "seed": -1,
    }
    with pytest.raises(ValueError) as caught:
        parse(*(f"--{name}={value}" for name, value in flags.items()))
    message = str(caught.value)
    missing = [name for name in flags if f"--{name}" not in message and name != "num_attention_heads"]
    assert not missing, message
    assert "num_attention_heads 8" in message


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--hidden_size=512", "--num_attention_heads=7"], "num_attention_heads 7"),
        (["--hidden_size=40", "--num_attention_heads=8"], "--hidden_size"),  # five numbers a head: no pairs to rotate
        (["--num_attention_heads=8", "--num_key_value_heads=3"], "num_key_value_heads 3"),
        (["--learning_rate=nan"], "--learning_rate nan"),
        (["--learning_rate=inf"], "--learning_rate inf"),
        (["--weight_decay=nan"], "--weight_decay nan"),
        (["--device=cuda:0"], "--device cuda:0"),
        (["--device=meta"], "--device meta"),
        (["--device=mps"], "--device mps"),
        (["--max_seq_len=1"], "--max_seq_len 1"),
    ],
)
def test_single_mistakes_name_the_flag(monkeypatch, flags, said):
    monkeypatch.setattr(arguments.torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(ValueError) as caught:
        parse(*flags)
    assert said in str(caught.value)


@pytest.mark.parametrize("flag", ["--batch_siz=3", "--learn=1", "--unknown"])
def test_flags_are_neither_guessed_nor_ignored(flag):
    with pytest.raises(SystemExit):
        parse(flag)


def test_defaults_of_a_stage_replace_the_common_ones_and_must_exist():
    assert parse(batch_size=3).batch_size == 3
    with pytest.raises(AssertionError, match="learning_rat"):
        stage_parser("", learning_rat=3.0)


def test_the_learning_rate_by_itself_is_that_of_the_optimizer():
    rates = {"muon": 8e-3, "adamw": 5e-4}

    def found(*flags):
        args = parse(*flags, learning_rate=rates)
        return args.optimizer, args.learning_rate

    assert found() == ("muon", 8e-3) == found("--optimizer=muon")
    assert found("--optimizer=adamw") == ("adamw", 5e-4)
    assert found("--optimizer=sgd") == ("sgd", 5e-4), "sgd is for checks and takes AdamW's"
    assert found("--learning_rate=8e-3") == ("muon", 8e-3) and found("--learning_rate=1") == ("muon", 1.0)
    assert found("--optimizer=adamw", "--learning_rate=8e-3") == ("adamw", 8e-3)
    words = stage_parser("", learning_rate=rates).format_help().split()
    assert "0.008 with muon, 0.0005 with adamw" in " ".join(words)


def test_zero_takes_adamw_by_itself():
    args = parse("--zero_stage=2", learning_rate={"muon": 8e-3, "adamw": 5e-4})
    assert (args.optimizer, args.learning_rate) == ("adamw", 5e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_path_defaults_stand_on_the_root(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = importlib.import_module(f"trainer.{script}").parse([])
    assert args.data_path.parent == ROOT / "dataset" and args.data_path.suffix == ".jsonl"
    assert args.tokenizer_path == ROOT / "model"
    assert args.out_dir == ROOT / "out" and args.cache_dir == ROOT / "out" / "token_cache"
    others = [value for value in vars(args).values() if isinstance(value, Path)]
    assert all(path.is_absolute() and ROOT in path.parents for path in others)


def test_paths_that_are_given_stand_on_the_working_folder_and_carry_the_cache_with_them():
    args = parse("--out_dir", "here", "--data_path", "data.jsonl")
    assert args.out_dir == Path("here") and args.data_path == Path("data.jsonl")
    assert args.cache_dir == Path("here/token_cache")
    assert parse("--cache_dir", "there").cache_dir == Path("there")


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_users_know_exist(script):
    known = """out_dir epochs batch_size learning_rate device dtype use_wandb wandb_project num_workers ddp
    accumulation_steps grad_clip warmup_iters log_interval save_interval local_rank hidden_size num_hidden_layers
    max_seq_len use_moe data_path tokenizer_path"""
    args = importlib.import_module(f"trainer.{script}").parse([])
    assert set(known.split()) <= vars(args).keys()


def test_the_defaults_that_users_know():
    for script, known in {
        "train_pretrain": {"epochs": 1, "batch_size": 32, "max_seq_len": 512, "accumulation_steps": 8},
        "train_full_sft": {"epochs": 2, "batch_size": 16, "max_seq_len": 512, "accumulation_steps": 1},
    }.items():
        args = vars(importlib.import_module(f"trainer.{script}").parse([]))
        model = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
        assert {name: args[name] for name in known | model} == known | model


def flags_read_in(path: Path) -> set[str]:
    """Attributes of `args` that a file reads; where a flag is only declared or checked does not count."""
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in ("stage_parser", "parse_arguments")]
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", "")) == "args":
                read.add(node.attr)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MODEL_FLAGS":  # model_config's
            read |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return read


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    helpers = [path for path in (ROOT / "trainer").glob("*.py") if not path.stem.startswith("train_")]
    read = set().union(*(flags_read_in(path) for path in [*helpers, ROOT / "trainer" / f"{script}.py"]))
    declared = vars(importlib.import_module(f"trainer.{script}").parse([])).keys() - {"changed"}  # for the log
    assert not declared - read, "nothing reads these flags"


def test_defaults_are_shown_where_there_are_any():
    parser = argparse.ArgumentParser(add_help=False)
    for name, default in {"none": None, "off": False, "text": "", "list": [], "zero": 0, "half": 0.5}.items():
        parser.add_argument(f"--{name}", default=default, help="it")
    show_defaults(parser)
    shown = [action.dest for action in parser._actions if action.help == "it (default: %(default)s)"]
    assert shown == ["zero", "half"] and all(action.help.startswith("it") for action in parser._actions)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_shown(script, capsys):
    """A percent sign in a help text breaks argparse only here."""
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"trainer.{script}").main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "torchrun" in printed and f"python {script}.py" in printed and "--learning_rate" in printed


@pytest.mark.parametrize(
    "flags, environment, said",
    [
        (["--ddp"], {}, "torchrun"),
        (["--ddp=false"], {"RANK": "0", "WORLD_SIZE": "2"}, "--ddp false"),
        (
            ["--device=cpu:1"],
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "--device cpu:1 .*CUDA_VISIBLE_DEVICES",
        ),
        (["--local_rank=3"], {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "--local_rank 3"),
    ],
)
def test_what_launchers_say_twice_must_agree(train, monkeypatch, tmp_path, texts, flags, environment, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        train("train_pretrain", tiny_flags(tmp_path, texts) + flags)


@pytest.mark.parametrize("flags", [["--ddp=false"], ["--local_rank=0"], ["--local-rank=0"], ["--local_rank=-1"]])
def test_what_launchers_say_twice_is_accepted_where_it_agrees(train, tmp_path, texts, flags):
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=1) + flags)
    assert (tmp_path / "pretrain_32.pth").exists()


def test_mistakes_are_messages_not_tracebacks(capsys):
    module = importlib.import_module("trainer.train_pretrain")
    with pytest.raises(SystemExit) as caught:
        arguments.run_script(lambda: module.main(["--epochs=0", "--batch_size=0"]))
    assert caught.value.code.startswith("error: ") and "--epochs 0" in caught.value.code
    assert "--batch_size 0" in caught.value.code
    with pytest.raises(SystemExit, match="error: .*too long"):
        arguments.run_script(lambda: module.main([f"--base_weight={'x' * 300}.pth"]))


def test_an_out_dir_that_cannot_be_written_is_found_before_training(train, tmp_path, texts):
    """A file stands where the folder should be; the cache of tokens lies elsewhere, so that it does not trip first."""
    blocked = tmp_path / "out"
    blocked.write_text("")
    for flags in ({}, {"cache_dir": tmp_path / "cache"}):
        with pytest.raises(ValueError, match="out") as caught:
            train("train_pretrain", tiny_flags(blocked, texts, **flags))
        assert str(blocked) in str(caught.value)


# --- several processes -----------------------------------------------------------------------------------------------


def torchrun(*flags: str, script: str = "train_pretrain.py", seconds: int = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT / "trainer", env=environment, capture_output=True, text=True, timeout=seconds
    )


@pytest.mark.full
@pytest.mark.parametrize("flags, said", [({"epochs": 0}, "--epochs 0"), ({"data_path": "nowhere.jsonl"}, "nowhere")])
def test_a_mistake_is_told_once_by_two_processes(tmp_path, texts, flags, said):
    done = torchrun(*tiny_flags(tmp_path, **{"data_path": texts} | flags))
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and said in done.stderr


def wrong_in_the_second_process(module) -> None:
    start_process = module.start_process

    def start(args):
        process = start_process(args)
        if not process.is_main:
            raise ValueError("this machine lacks the data")
        return process

    module.start_process = start


def dies_in_the_third_step(module) -> None:
    def make(take_step):
        calls = []

        def step(*arguments):
            calls.append(1)
            if len(calls) == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return take_step(*arguments)

        return step

    replace_step(make)


@pytest.mark.parametrize("patch", [wrong_in_the_second_process, dies_in_the_third_step])
def test_one_process_of_two_takes_the_other_with_it(launcher, tmp_path, texts, patch):
    """Within a minute, with messages: also where no launcher ends the others."""
    children = launcher.start_ranks(2, "train_pretrain", tiny_flags(tmp_path, texts), patches=[patch])
    statuses = [child.wait(60) for child in children]
    first, second = (child.output for child in children)
    assert statuses == [1, 1 if patch is wrong_in_the_second_process else -signal.SIGKILL], first + second
    assert "error: another process of this job has ended or hangs" in first and "--resume" in first
    assert "Traceback" not in first + second
    if patch is wrong_in_the_second_process:
        assert "error: process 1: this machine lacks the data" in second


# --- the model of a stage that starts from weights -------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """Weights of sizes that are nobody's default, without a query/key norm."""
    config = MiniMindConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, vocab_size=50
    )
    save_weights(
        tmp_path / "a.pth", MiniMindForCausalLM(config), {"config": config.to_diff_dict() | {"rope_theta": 5e5}}
    )
    return tmp_path / "a.pth"


def test_a_stage_takes_over_what_its_base_is(base):
    args = parse()
    config = model_config(args, 50, base)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    for name, value in sizes.items():
        assert getattr(config, name) == getattr(args, name) == value
    assert config.rope_theta == 5e5 and not config.use_moe and not args.use_moe
    same = parse(*(f"--{name}={value}" for name, value in sizes.items()))
    assert model_config(same, 50, base).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--num_attention_heads=16"], "--num_attention_heads is 16 here and 6 in the file"),
        (["--num_hidden_layers=8"], "--num_hidden_layers is 8 here and 3 in the file"),
        (["--hidden_size=768"], "--hidden_size is 768 here and 48 in the file"),
        (["--use_moe"], "--use_moe is True here and False in the file"),
    ],
)
def test_flags_that_contradict_the_base_are_refused(base, flags, said):
    with pytest.raises(ValueError, match=f"a.pth does not fit this model: .*{said}"):
        model_config(parse(*flags), 50, base)


def test_a_preset_that_contradicts_the_base_is_refused(base):
    with pytest.raises(ValueError, match="a.pth"):
        model_config(parse("--preset=minimind3"), 50, base)


def test_a_tokenizer_of_another_size_is_refused(base):
    with pytest.raises(ValueError, match="the tokenizer has 6400 tokens and the file 50: .* --tokenizer_path"):
        model_config(parse(), 6400, base)
