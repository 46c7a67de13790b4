"""What both terminal chats share: lines from people and files, commands, and what reaches the terminal."""

import argparse
import codecs
import io
import os
import re
import select
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_endless_weights

from model.streams import note
from scripts.example_prompts import BEGINNINGS, CONVERSATIONS, QUESTIONS, example_prompts
from scripts.terminal import Display, LineEditor, TerminalChat, piped_prompts, run_main

GREETING = "你好，今天天气怎么样？"


# --- prompts from files ----------------------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch):
    """piped(bytes on stdin, PYTHONIOENCODING): the prompts."""

    def prompts(content: bytes, encoding: str | None = None) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8", errors="replace"))
        if encoding is None:
            monkeypatch.delenv("PYTHONIOENCODING", raising=False)
        else:
            monkeypatch.setenv("PYTHONIOENCODING", encoding)
        return list(piped_prompts())

    return prompts


def test_a_byte_order_mark_and_blank_lines_are_no_prompts(piped):
    text = f"{GREETING}\n\nhello\r\n   \n\t\nlast"
    for mark in (b"", codecs.BOM_UTF8):
        assert piped(mark + text.encode()) == [GREETING, "hello", "last"]
    assert piped(b"") == piped(b"\n\n") == []


def test_another_encoding_is_named_unless_it_is_given(piped):
    lines = f"{GREETING}\nhello\n"
    for encoding, guess in (("gbk", "gb18030"), ("utf-16", "utf-16")):
        with pytest.raises(
            ValueError, match=f"stdin is not utf-8 but looks like {guess}; set PYTHONIOENCODING={guess}"
        ):
            piped(lines.encode(encoding))
        for given in (encoding, f"{encoding}:strict"):
            assert piped(lines.encode(encoding), given) == [GREETING, "hello"]
    with pytest.raises(ValueError, match="stdin is not utf-8 .*PYTHONIOENCODING"):
        piped(b"caf\xe9 \xff\xff\n")
    for name in ("ascii", "nonsense", ":replace"):  # what a C locale says, and what says nothing
        assert piped(lines.encode(), name) == [GREETING, "hello"]


def test_a_pipe_is_answered_line_by_line():
    """Without waiting for its end: another program may be having a conversation."""
    code = "from scripts.terminal import piped_prompts\nfor line in piped_prompts(): print(line.upper(), flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    for word in ("one", "two"):
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{word.upper()}\n"
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


# --- commands --------------------------------------------------------------------------------------------------------


class EchoChat(TerminalChat):
    settings = {"temperature": float, "history_cnt": int}

    def __init__(self):
        super().__init__(argparse.Namespace(temperature=1.0, history_cnt=2))
        self.asked, self.interrupt = [], 0

    def answer(self, prompt: str) -> bool:
        if prompt == "too long":
            raise ValueError("the prompt leaves no room")
        if prompt == "interrupt":
            raise KeyboardInterrupt
        self.asked.append(self.messages(prompt))
        self.remember(prompt, prompt.upper())
        return prompt != "stop"

    def switch_model(self, name: str) -> None:
        note(f"model {name!r}")

    def switch_lora(self, name: str) -> None:
        note(f"lora {name!r}")

    def check_settings(self) -> None:
        if self.args.temperature < 0:
            raise ValueError("must be 0 or more")


def contents(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages]


def test_history_system_message_and_reset(capsys):
    chat = EchoChat()
    chat.run(["a", "b", "c", "/reset", "d", "/system be brief", "e", "f", "/system", "g"], typed=True)
    assert [contents(messages) for messages in chat.asked] == [
        ["a"], ["a", "A", "b"], ["b", "B", "c"], ["d"], ["be brief", "e"], ["be brief", "e", "E", "f"], ["g"],
    ]  # fmt: skip
    assert chat.asked[4][0]["role"] == "system"
    chat.run(["/set history_cnt 0", "h"], typed=True)
    assert contents(chat.asked[-1]) == ["h"]


def test_commands_never_reach_the_model(capsys):
    chat = EchoChat()
    lines = [
        "/model",
        "/MODEL x y",
        " /lora  z ",
        "/nonsense",
        "/nonsense with words",
        "/help",
        "/etc/hosts?",
        "/exit",
        "x",
    ]
    assert chat.run(lines, typed=True) == 0
    assert [contents(messages) for messages in chat.asked] == [["/etc/hosts?"]]
    said = capsys.readouterr().err
    assert "model ''\n" in said and "model 'x y'\n" in said and "lora 'z'\n" in said
    assert said.count("there is no /nonsense; /help lists the commands") == 2
    assert all(f"\n/{name}" in f"\n{said}" for name in chat.commands)
    assert set(chat.words()) == {f"/{name}" for name in chat.commands} | {"/set temperature", "/set history_cnt"}


def test_settings_change_only_to_what_is_right(capsys):
    chat = EchoChat()
    chat.run(["/set temperature 0.5", "/set temperature -1", "/set temperature hot", "/set", "/set x 1"], typed=True)
    assert chat.args.temperature == 0.5
    said = capsys.readouterr().err
    assert "[temperature is 0.5]" in said and "/set temperature -1: must be 0 or more" in said
    assert said.count("the names are temperature, history_cnt") == 2 and "could not convert" in said


def test_an_error_or_ctrl_c_ends_the_answer_and_not_the_chat(capsys):
    chat = EchoChat()
    assert chat.run(["too long", "interrupt", "stop", "a"], typed=True) == 0
    assert [messages[-1]["content"] for messages in chat.asked] == ["stop", "a"]
    assert chat.run(["/set x 1", "/imagine a cat"], typed=False) == 1, "a pipe may hold what only looks like a command"
    assert chat.asked[-1][-1]["content"] == "/imagine a cat"
    assert chat.run(["too long", "b"], typed=False) == 1 and chat.asked[-1][-1]["content"] == "b"
    assert chat.run(["stop", "c"], typed=False) == 130 and chat.asked[-1][-1]["content"] == "stop"
    with pytest.raises(KeyboardInterrupt):
        chat.run(["interrupt", "d"], typed=False)


def test_ctrl_c_leaves_only_when_pressed_twice_in_a_row(monkeypatch, capsys):
    typed = iter(
        [KeyboardInterrupt(), "a", "", "  ", KeyboardInterrupt(), "b\nc", KeyboardInterrupt(), KeyboardInterrupt()]
    )

    def read(label: str) -> str:
        event = next(typed)
        if isinstance(event, BaseException):
            raise event
        return event

    editor = LineEditor()
    monkeypatch.setattr(editor, "read", read)
    assert list(editor.prompts("> ")) == ["a", "b\nc"]
    assert next(typed, "all read") == "all read"
    assert capsys.readouterr().err.count("Ctrl-C again") == 3


def test_what_ends_a_chat_is_a_line(capsys):
    assert run_main(lambda: os.stat("x" * 300)) == 1 and "too long" in capsys.readouterr().err


# --- display ---------------------------------------------------------------------------------------------------------


def test_an_answer_cannot_command_the_terminal(monkeypatch):
    """Escape sequences could change the clipboard or the title; a file gets the text as it is."""
    text = "a\x1b]52;c;cm0=\x07b\rc\td\n\x9b2Je"

    class Screen(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Screen(), "a]52;c;cm0=bc\td\n2Je\n"), (io.StringIO(), text + "\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        display = Display()
        display.show([(True, "hm"), (False, ""), (False, text)])
        display.end()
        assert sys.stdout.getvalue() == shown and sys.stderr.getvalue() == "hm\n\n"


# --- example prompts -------------------------------------------------------------------------------------------------


def test_examples_come_from_the_world_of_the_sample_if_that_was_trained_on():
    of_sample = {"flags": {"data_path": "/somewhere/else/dataset/sample/pretrain.jsonl"}}
    of_quickstart = {"flags": {"data_path": f"/somewhere/out/quickstart/{CONVERSATIONS}"}}
    assert example_prompts(of_quickstart, continues=False) == example_prompts(of_sample, continues=False)
    questions = example_prompts(of_sample, continues=False)
    known = (ROOT / "dataset" / "sample" / "questions.jsonl").read_text("utf-8")
    assert len(questions) == len(set(questions)) == 8 and all(f'"{question}"' in known for question in questions)
    beginnings = example_prompts(of_sample, continues=True)
    assert len(beginnings) == 8 and all(f'"answer": "{beginning}' in known for beginning in beginnings)
    for sidecar in ({}, {"flags": {}}, {"flags": {"data_path": "dataset/sft_512.jsonl"}}):
        assert example_prompts(sidecar, continues=False) == QUESTIONS
        assert example_prompts(sidecar, continues=True, count=4) == BEGINNINGS[:4]


@pytest.mark.parametrize("encoding", ["cp1252", "gbk"])
def test_no_encoding_ends_a_script(encoding):
    """What Windows picks for files and pipes: a name that it cannot write is shown with question marks."""
    env = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    line = [sys.executable, "scripts/prepare_data.py", "inspect", "不存在-été-🙂.jsonl"]
    child = subprocess.run(line, cwd=ROOT, env=env, capture_output=True)
    said = child.stderr.decode(encoding)
    assert child.returncode == 1 and "Traceback" not in said and "error:" in said and "?" in said
    assert ("不存在" in said) == (encoding == "gbk")


def test_every_script_sets_up_its_streams():
    for path in [ROOT / "eval_model.py", *ROOT.glob("scripts/*.py"), *ROOT.glob("trainer/*.py")]:
        text = path.read_text(encoding="utf-8")
        if re.search(r"\ndef main\(argv", text):
            assert re.search(r"\n    set_up_streams\(\)|\n    run_script\(main|\n@entry_point\ndef main", text), path


@pytest.mark.parametrize("beginning", ["import model.threads", "from model.streams import *; set_up_streams()"])
def test_ctrl_c_leaves_no_traceback_and_a_mistake_does(beginning):
    """Also while a script still loads its packages."""
    for error, shown in (("KeyboardInterrupt", ""), ("RuntimeError('a mistake')", "RuntimeError: a mistake\n")):
        code = [sys.executable, "-c", f"{beginning}\nraise {error}"]
        child = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
        assert child.returncode != 0 and child.stderr.endswith(shown) and ("Traceback" in child.stderr) == bool(shown)


# --- a person at a terminal ------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_pasted_lines_are_one_question_and_nothing_is_left_for_the_shell(tmp_path, tokenizer):
    """Bracketed paste, a Chinese backspace, an empty line, Ctrl-C in an answer, and twice when idle."""
    write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    master, side = os.openpty()
    command = [sys.executable, str(ROOT / "eval_model.py"), "--out_dir", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
         "os.execv(sys.argv[1], sys.argv[1:])", *command, "--temperature", "0", "--max_new_tokens", "30000"],
        stdin=side, stdout=side, stderr=side,
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1", "LC_ALL": "C"},
    )  # fmt: skip
    shown, decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(pattern: str) -> str:
        nonlocal shown
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, shown, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear: {shown!r}"
            if select.select([master], [], [], 0.2)[0]:
                text = decoder.decode(os.read(master, 65536))
                shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
        before, shown = shown[: found.end()], shown[found.end() :]
        return before

    def type_in(text: str) -> None:
        os.write(master, text.encode())

    try:
        wait_for("手动输入.*>")
        type_in("1\r")
        wait_for("/exit leaves.*👶:")
        type_in("\x1b[200~one 一\n\n/exit\nrm -r three\x1b[201~")
        wait_for("three")
        type_in("\r")
        wait_for("🤖: .{5}")
        type_in("\x03")
        wait_for("stopped.*👶:")
        type_in("\r")
        type_in("你好\x7f们\r")
        wait_for("你们\n")
        wait_for("🤖: .{5}")
        type_in("\x03")
        wait_for("stopped.*👶:")
        type_in("\x03")
        wait_for("Ctrl-C again.*👶:")
        type_in("\x03")
        assert process.wait(60) == 0
        assert not select.select([side], [], [], 0)[0]  # what is left here would be typed into the shell
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(side)
