"""The terminal chat, against the real server: lines from a pipe, a person at a terminal, and what can go wrong."""

import codecs
import io
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from fake_openai import fake_openai
from served import ECHO, running_server, wait_until, write_models

from scripts import chat_openai_api


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer):
    return write_models(tmp_path_factory.mktemp("out"), tokenizer)


@pytest.fixture(scope="module")
def server(out_dir):
    with running_server(out_dir) as server:
        yield server


@pytest.fixture
def run(server, monkeypatch, capsys):
    """Lines on stdin -> (exit status, stdout, stderr)."""

    def run_main(*lines: str, flags: tuple = (), model: str | None = ECHO) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        chosen = ["--model", model] if model else []
        status = chat_openai_api.main(["--base_url", server.url, *chosen, *map(str, flags)])
        return status, *capsys.readouterr()

    return run_main


def prompts(server, count: int) -> list[str]:
    """What the echoing model was asked last, control ids shown."""
    return [
        server.tokenizer.decode(request.prompt_ids, skip_control=False) for request in server.echo.requests[-count:]
    ]


@pytest.mark.parametrize(
    ("model", "first", "told"),
    [
        ("dies", None, "broke before the answer was complete"),
        ("breaks-off", None, "broke off before the answer was complete"),
        ("odd", {"choices": [{"delta": None}]}, "gave no usable answer"),
        ("odd", {"choices": 5}, "gave no usable answer"),
        ("odd", {"error": {"message": "no\x1b]0;owned\x07 memory"}}, "error: no]0;owned memory\n"),
    ],
)
def test_whatever_a_server_sends_ends_the_answer_in_a_line(monkeypatch, capsys, model, first, told):
    with fake_openai() as server:
        server.first_chunk = first
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nagain\n"))
        assert chat_openai_api.main(["--base_url", server.base_url, "--model", model]) == 1
    said = capsys.readouterr()
    assert said.err.count(told) == 2 and "no server at" not in said.err
    assert said.out == ("" if model == "odd" else "Hello.\nHello.\n")


def test_a_web_page_is_no_api_and_a_models_name_is_only_text(monkeypatch, capsys):
    with fake_openai() as server:
        for names, status, told in ((None, 1, "gave no usable answer"), (["a\x1b[2Jb"], 0, "a[2Jb at http")):
            server.names = names
            monkeypatch.setattr(sys, "stdin", io.StringIO(""))
            assert chat_openai_api.main(["--base_url", server.base_url]) == status
            assert told in capsys.readouterr().err


def test_all_lines_are_answered_blank_ones_skipped(run):
    assert run("the sky", "今天 天气", "", "and rain")[:2] == (0, "the sky\n今天 天气\nand rain\n")


def test_the_first_model_is_the_default(run):
    status, out, err = run("hi", model=None, flags=["--max_tokens", 4, "--temperature", 0])
    assert status == 0 and out.strip() and err.startswith("minimind at http://127.0.0.1")
    assert "[cut: the length is reached]" in err


@pytest.mark.parametrize("history_cnt, earlier", [(0, 0), (2, 2), (20, 4)])
def test_history(run, server, history_cnt, earlier):
    run("one", "two", "three", flags=["--history_cnt", history_cnt])
    assert prompts(server, 1)[0].count("<|im_start|>") == 3 + earlier  # system, question, opening of the answer
    assert ("one" in prompts(server, 1)[0]) == (earlier == 4)


def test_commands(run, server):
    status, out, err = run(
        "one", "/reset", "two", "/system be brief", "three", "/model", "/model nothing", f"/model {ECHO}", "/help",
        "/unknown", "/system", "four",
    )  # fmt: skip
    assert (status, out) == (1, "one\ntwo\nthree\n/unknown\nfour\n"), "/model nothing failed"
    two, three, _, four = prompts(server, 4)
    assert "one" not in two and "helpful assistant" in two
    assert "system\nbe brief<|im_end|>" in three and "two" not in three
    assert "helpful assistant" in four
    assert (
        f"* {ECHO}" in err and "  minimind\n" in err and "there is no model 'nothing' here; there are: minimind" in err
    )
    assert "/reset  " in err and "the default system message" in err


def test_a_text_that_begins_with_a_slash_and_is_no_command(run):
    assert run("/etc/passwd holds what?")[:2] == (0, "/etc/passwd holds what?\n")


def test_thoughts_go_to_stderr(run, server):
    status, out, err = run("<think>hm</think>42", "and?")
    assert (status, out) == (0, "42\nand?\n") and "hm\n" in err
    assert "hm" not in prompts(server, 1)[0].split("and?")[0].rsplit("assistant\n", 1)[1]


def test_flags_reach_the_server(run, server):
    flags = ["--temperature", 0.5, "--top_p", 0.25, "--max_tokens", 7, "--system", "speak 中文"]
    run("hi", flags=flags)
    params = server.echo.requests[-1].params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.5, 0.25, 7)
    assert "speak 中文" in prompts(server, 1)[0]


def test_the_oldest_messages_are_left_out_when_the_context_is_full(run, server):
    long = "word " * 150
    status, out, err = run(long + "1", long + "2", long + "3")
    assert status == 0 and out.count("word") == 450 and "left out its oldest messages" in err
    status, _, err = run("word " * 3000)
    assert status == 1 and "the context holds 512" in err


def test_no_server(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert chat_openai_api.main(["--base_url", f"http://127.0.0.1:{port}/v1"]) == 1
    assert capsys.readouterr().err == (
        f"error: no server at http://127.0.0.1:{port}/v1; start one with: python scripts/serve_openai_api.py, "
        "or name it by --base_url\n"
    )


def test_an_address_without_v1(server, capsys):
    assert chat_openai_api.main(["--base_url", server.root]) == 1
    assert f"is it {server.root}/v1?" in capsys.readouterr().err


def test_wrong_models_keys_and_flags(run, out_dir, monkeypatch, capsys):
    status, out, err = run("hi", model="gpt-4")
    assert (status, out) == (1, "") and "there is no model 'gpt-4' here; there are: minimind" in err
    with running_server(out_dir, "--api_key", "secret") as server:
        assert chat_openai_api.main(["--base_url", server.url, "--api_key", "wrong"]) == 1
        assert "--api_key KEY" in capsys.readouterr().err
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        assert chat_openai_api.main(["--base_url", server.url, "--api_key", "secret", "--model", ECHO]) == 0
    with pytest.raises(SystemExit):
        chat_openai_api.main(["--history_cnt", "3"])
    assert "3 is not an even number" in capsys.readouterr().err


def test_a_wrong_model_of_another_server_gets_the_list_of_its_models(capsys):
    with fake_openai() as server:
        for address in (server.base_url, f"{server.base_url}/"):
            assert chat_openai_api.main(["--base_url", address, "--model", "gpt-y"]) == 1
            assert "there is no model 'gpt-y' here; there are: says, thinks" in capsys.readouterr().err


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(run, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert run("hi")[:2] == (0, "hi\n")


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_on_a_terminal_ctrl_c_stops_an_answer_and_the_conversation_goes_on(server):
    terminal, side = os.openpty()
    command = [sys.executable, str(ROOT / "scripts" / "chat_openai_api.py"), "--base_url", server.url]
    process = subprocess.Popen(
        [*command, "--max_tokens", "6000", "--temperature", "0"], stdin=side, stdout=side, stderr=side,
        start_new_session=True, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(side)
    shown, decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(text: str, after: int = 0) -> int:
        nonlocal shown
        end = time.monotonic() + 60
        while text not in shown[after:]:
            assert time.monotonic() < end, f"{text!r} was not shown: {shown}"
            if select.select([terminal], [], [], 0.1)[0]:
                shown += decoder.decode(os.read(terminal, 65536))
        return shown.index(text, after) + len(text)

    try:
        place = wait_for("👶: ")
        os.write(terminal, b"the sky\n")
        place = wait_for("🤖: ", place)
        wait_until(lambda: server.engine.stats()["running"] == 1)
        while len(shown) < place + 20:  # some of the answer
            shown += decoder.decode(os.read(terminal, 65536))
        process.send_signal(signal.SIGINT)
        place = wait_for("[stopped]", place)
        wait_until(lambda: server.engine.stats()["running"] == 0)
        place = wait_for("👶: ", place)
        os.write(terminal, f"/model {ECHO}\n".encode())
        place = wait_for("[now with", place)
        os.write(terminal, "花 and rain\n".encode())
        place = wait_for("🤖: ", place)
        place = wait_for("花 and rain", place)
        assert re.search("user\nthe sky<.*assistant\n.", prompts(server, 1)[0], re.DOTALL)
        place = wait_for("👶: ", place)
        os.write(terminal, b"\n")  # does nothing
        place = wait_for("👶: ", place)
        os.write(terminal, b"/exit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
