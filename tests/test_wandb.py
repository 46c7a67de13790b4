"""--use_wandb: what reaches it, what it asks for before any training, and that training survives its failures."""

import importlib.util
import json
import os
import struct
import sys
import threading
import types

import pytest
from conftest import read_log, tiny_flags

from trainer import tracking
from trainer.arguments import parse_arguments, stage_parser

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_X_DISABLE_STATS": "true"}


def stored_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records in parts) behind 7 bytes."""
    records, part, at = [], b"", 7
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no room for the head of a part: filled up
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(part)
            part = b""
    return records


def recorded(folder) -> tuple[dict, list[dict], dict, dict]:
    """What an offline run kept on disk: (project and name, history, summary, config)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    about, history, summary, config = {}, [], {}, {}
    for data in stored_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            about = {"project": record.run.project, "name": record.run.display_name}
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            history.append(items)
        elif kind == "summary":
            summary |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.summary.update}
    return about, history, summary, config


@needs_wandb
def test_offline_run_holds_what_the_log_file_holds(launcher, tmp_path, texts):
    """For real, on two processes, without a network: one run with config, metrics, samples and the weights' path."""
    flags = {"max_steps": 4, "valid_path": texts, "sample_prompt": "the old king", "eval_interval": 2}
    line = [*tiny_flags(tmp_path, texts, batch_size=2, **flags), "--use_wandb", "--wandb_project=Mine"]
    launcher.run("train_pretrain", line, 2, env=OFFLINE)
    about, history, summary, config = recorded(tmp_path)
    assert about["project"] == "Mine"
    assert about["name"] == "MiniMind-pretrain_32-Epoch-1-BatchSize-2-LearningRate-0.002"
    assert config["learning_rate"] == 2e-3 and config["data_path"] == str(texts)
    rows = {row["_step"]: row for row in history}
    for record in read_log(tmp_path):
        for name in ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/mfu", "perf/padding"):
            assert rows[record["step"]][name] == record[name.split("/")[1]], name
        assert {name.split("/")[0] for name in rows[record["step"]] if name[0] != "_"} <= {"train", "perf", "valid"}
    evaluations = read_log(tmp_path, event="evaluation")
    assert [record["step"] for record in evaluations] == [2, 4]
    for record in evaluations:
        assert rows[record["step"]]["valid/loss"] == record["valid_loss"]
        assert rows[record["step"]]["valid/sample"] == record["sample"] and "the old king" in record["sample"]
    assert summary["weights"] == str(tmp_path / "pretrain_32.pth") and summary["steps"] == 4


def parse(*flags: str):
    return parse_arguments(stage_parser(""), ["--device=cpu", "--use_wandb", *flags])


def test_not_installed_is_told_with_the_command(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ValueError, match="--use_wandb: wandb is not installed; run: pip install wandb"):
        parse()
    parse("--use_wandb=false")
    monkeypatch.setenv("RANK", "1")
    parse()  # another process than the one that logs: on other machines nothing is needed


@needs_wandb
def test_not_logged_in_is_told_before_anything_else(launcher, tmp_path, texts):
    """Without a terminal, a key or a network: not even the data is read."""
    env = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    out = tmp_path / "out"
    child = launcher.start("train_pretrain", [*tiny_flags(out, texts), "--use_wandb"], env=env)
    assert child.wait() == 1
    assert "error: --use_wandb: wandb is not logged in; run `wandb login`" in child.output
    assert "WANDB_MODE=offline" in child.output and "Traceback" not in child.output and not out.exists()


class FakeRun:
    """As wandb's, failing when told to."""

    def __init__(self, trouble: str):
        self.trouble, self.summary, self.logged, self.code = trouble, {}, [], None

    def log(self, values, step):
        if self.trouble == "log" and step == 3:
            raise ConnectionError("the server has gone")
        self.logged.append(step)

    def finish(self, exit_code):
        self.code = exit_code
        if self.trouble == "finish":
            raise ConnectionError("the server has gone")
        if self.trouble == "hang":
            threading.Event().wait(30)


@pytest.fixture
def fake_wandb(monkeypatch):
    """fake_wandb(trouble): a wandb that fails at "start", "offline" too, "log", "finish", or whose end "hang"s."""

    def install(trouble: str = "") -> types.ModuleType:
        module = types.ModuleType("wandb")
        module.modes, module.runs = [], []

        def init(mode, **_):
            module.modes.append(mode)
            if trouble == "start" and mode is None or trouble == "offline":
                raise TimeoutError("no answer")
            module.runs.append(FakeRun(trouble))
            return module.runs[-1]

        module.init = init
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setattr(tracking, "tracking_mistakes", lambda args: [])
        monkeypatch.setattr(sys.modules["trainer.arguments"], "tracking_mistakes", lambda args: [])
        monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
        return module

    return install


@pytest.mark.parametrize("trouble", ["", "start", "offline", "log", "finish", "hang"])
def test_training_goes_on_whatever_becomes_of_wandb(train, fake_wandb, tmp_path, texts, capsys, trouble):
    wandb = fake_wandb(trouble)
    train("train_pretrain", [*tiny_flags(tmp_path, texts, max_steps=5), "--use_wandb"])
    printed = capsys.readouterr().out
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert "pretrain_32.pth is ready" in printed
    notes = [line for line in printed.splitlines() if "note: wandb failed" in line]
    assert len(notes) == {"": 0, "offline": 2}.get(trouble, 1), printed
    assert wandb.modes == ([None, "offline"] if trouble in ("start", "offline") else [None])
    if trouble != "offline":
        (run,) = wandb.runs
        assert run.logged == ([1, 2] if trouble == "log" else [1, 2, 3, 4, 5])
    if trouble in ("", "start"):
        assert run.code == 0 and run.summary["weights"] == str(tmp_path / "pretrain_32.pth")


@needs_wandb
@pytest.mark.full
def test_a_server_that_is_not_there(launcher, tmp_path, texts):
    """For real: the run is kept on disk instead, and training does not stop."""
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
    line = [*tiny_flags(tmp_path, texts, max_steps=3), "--use_wandb"]
    output = launcher.run("train_pretrain", line, env=env, seconds=300)
    assert output.count("note: wandb failed") == 1 and "keeping the run on disk" in output
    assert len(recorded(tmp_path)[1]) == 3


@needs_wandb
def test_nothing_of_wandb_is_touched_without_the_flag(launcher, tmp_path, texts):
    assert "WANDB_MODE" not in os.environ
    launcher.run("train_pretrain", tiny_flags(tmp_path, texts, max_steps=1))
    assert not (tmp_path / "wandb").exists()
