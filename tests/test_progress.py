"""The progress bar: what it shows on a terminal and elsewhere, and that no stream can make it end a run."""

import io
import os
import shutil
import sys

import pytest

from dataset import progress
from dataset.progress import ProgressBar
from trainer.logger import fitted


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
    assert "counting:  50%|" in text and "20.0/40.0 [" in text
    assert " rows/s, 1,234 tokens]" in text and "00:00<00:00" in text
    assert "\n" not in text and not text.rstrip("\r").split("\r")[-1].strip()


def test_a_file_gets_whole_lines(monkeypatch):
    stream = io.StringIO()
    shown(monkeypatch, stream)
    assert "\r" not in stream.getvalue()
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("counting: ") and " left, " in line for line in lines)
    assert any(line.startswith("counting: 75% of 40.0, 00:00 gone, 00:00 left") for line in lines)


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
