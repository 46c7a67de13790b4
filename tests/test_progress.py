"""The progress bar: what it shows on a terminal and elsewhere, and that no stream can make it end a run."""

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from dataset import progress
from dataset.progress import ProgressBar
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import logger
from trainer.arguments import parse_arguments, stage_parser
from trainer.checkpoint import Progress
from trainer.distributed import Process
from trainer.logger import Logger, fitted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file.")


@pytest.fixture(autouse=True)
def every_update(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)


def shown(monkeypatch, stream, total: int | None = 40, **options) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar("counting", total, "rows", **options) as bar:
        bar.mininterval = 0
        for _ in range(4):
            bar.update(10, note="1,234 tokens")
        bar.clear()


def test_a_terminal_gets_a_bar_with_rate_and_time_left_that_vanishes(monkeypatch):
    stream = Terminal()
    shown(monkeypatch, stream)
    text = stream.getvalue()
    assert "counting:  50%|" in text and "20/40 [" in text
    assert " rows/s, 1,234 tokens]" in text and "00:00<00:00" in text
    assert "\n" not in text and not text.rstrip("\r").split("\r")[-1].strip()


def test_a_file_gets_whole_lines(monkeypatch):
    stream = io.StringIO()
    shown(monkeypatch, stream)
    assert "\r" not in stream.getvalue()
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("counting: ") and " left, " in line for line in lines)
    assert any(line.startswith("counting: 75% of 40 rows, 00:00 gone, 00:00 left") for line in lines)


def test_short_work_prints_nothing_to_a_file(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 3600)
    stream = io.StringIO()
    shown(monkeypatch, stream)
    assert stream.getvalue() == ""


def test_hidden_bars_and_unknown_totals(monkeypatch):
    stream = Terminal()
    shown(monkeypatch, stream, show=False)
    assert stream.getvalue() == ""
    shown(monkeypatch, stream, total=None)
    assert "40.0 rows [" in stream.getvalue()


def test_what_was_there_before_does_not_count_in_the_rate(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressBar("resuming", 100, "steps", done=90) as bar:
        assert bar.format_dict["initial"] == 90 and bar.n == 90


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "ascii"])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_encoding_ends_a_run(monkeypatch, encoding, terminal):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors="strict")
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar("数据 \ufffd\udc80 ×", 4, "B") as bar:
        bar.mininterval = 0
        bar.update(2)
    stream.flush()
    assert b"50%" in buffer.getvalue()


def test_no_stream_ends_a_run(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, Broken()):
        shown(monkeypatch, stream)


def test_lines_fit_a_terminal_without_breaking_words_and_stay_whole_in_a_file(monkeypatch):
    line = " ".join(["a-long/path.jsonl:", *["1,778 tokens in rows"] * 9])
    assert fitted(line) == line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((120, 40)))
    lines = fitted(line).split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 120 and " ".join(lines).split() == line.split()


class Data:
    """Four steps in each of two epochs."""

    total_steps, steps_per_epoch, waited, notice = 8, 4, 0.0, ""

    def facts(self) -> dict:
        return {"kind": "conversation"}

    def describe(self) -> str:
        return ""

    describe_steps = describe


@pytest.mark.parametrize("distils", [False, True])
def test_rate_share_of_the_peak_and_time_left_by_hand(tmp_path, monkeypatch, capsys, distils):
    """Two steps of half an hour, each of 1.8M tokens, of which a third are targets, and 0.2M of padding."""
    clock = [100.0]
    monkeypatch.setattr(logger, "_clocks", lambda: (clock[0], clock[0]))
    monkeypatch.setattr(logger, "matmul_flops_per_second", lambda *_: 4e9)
    flags = ["--out_dir", str(tmp_path), "--data_path", "x", "--log_interval", "2", "--epochs", "2", "--device", "cpu"]
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model, teacher = MiniMindForCausalLM(config), MiniMindForCausalLM(config).requires_grad_(False)
    training = SimpleNamespace(
        model=model, process=Process(0, 0, 1, torch.device("cpu")),
        precision=SimpleNamespace(dtype=torch.float32, name="float32", notice=""),
    )  # fmt: skip
    progress = Progress()
    run = Logger(
        "x", parse_arguments(stage_parser(""), flags), training, Data(), progress, teacher if distils else None
    )
    for step in range(2):
        clock[0] += 1800
        batch = {"step_tokens": 1.8e6, "step_positions": 2e6, "step_attended": 9e7, "step_targets": 0.6e6}
        progress.advance(batch, 8)
        run.step(step, 2.0 + step, 1e-3, 1.0, batch)
    assert (progress.step, progress.tokens, progress.complete) == (2, 3.6e6, False)
    start, logged = map(json.loads, (tmp_path / "logs" / "x.jsonl").read_text().splitlines())
    head = 64 * 6400
    layers = sum(p.numel() for p in model.parameters()) - head
    forward = 2 * (layers * 1.8e6 + head * 0.6e6) + 4 * 64 * 2 * 9e7  # of a step; backward takes twice as much
    assert logged["mfu"] == pytest.approx(forward * (3 + distils) / 1800 / 4e9) and 0.1 < logged["mfu"] < 1
    assert (logged["tokens_per_second"], logged["loss"], logged["seconds_per_step"]) == (1000, 2.5, 1800)
    assert logged["padding"] == pytest.approx(0.1) and start["skipped_flops"] == head * (6 + 2 * distils)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "Epoch:[1/2](2/4)" in line and "epoch_Time:60.0min" in line and "1,000 tokens/s" in line
    assert line.endswith("1:00 gone, 3:00 left") and f"MFU {logged['mfu']:.0%}" in line
