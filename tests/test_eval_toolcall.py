"""The score of tool use: conversations played through the real server and client, by a model that follows a script."""

import json
from collections import Counter

import pytest
from conftest import TOOLS, write_jsonl
from served import EchoRequest, running_server, write_models

from scripts import eval_toolcall


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(question: str, *calls_and_results, answer: str) -> dict:
    turns = [{"role": "user", "content": question}]
    for made, result in calls_and_results:
        turns += [{"role": "assistant", "content": "", "tool_calls": [made]}, {"role": "tool", "content": result}]
    tools = [TOOLS["calculator"], TOOLS["text_length"]]
    return {"tools": tools, "conversations": [*turns, {"role": "assistant", "content": answer}]}


CONVERSATIONS = [
    conversation("a", (call("calculator", expression="17*23"), "391"), answer="17×23=391。"),
    conversation(
        "b", (call("calculator", expression="1+1"), "2"), (call("text_length", text="你好"), "2"), answer="都是2。"
    ),
    conversation("c", answer="你好"),
    conversation("d", (call("calculator", expression="2+2"), "4"), answer="4"),
    conversation("e", answer="5"),
]
# what the model says; RESULT: what it was told last
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
SAID = {
    "a": [CALL % ("calculator", '{"expression": "17*23"}'), "是RESULT"],
    "b": [CALL % ("calculator", '{"expression": "1+1"}'), CALL % ("text_length", '{"text": "你好"}'), "都是RESULT"],
    "c": ["你好。"],
    "d": [CALL % ("calculator", '{"expression": "2*2"}'), "RESULT"],  # other arguments, right by luck
    "e": [CALL % ("clock", "{}")] * 20,  # a tool that is not offered, for ever
}


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    with running_server(write_models(tmp_path_factory.mktemp("tools"), tokenizer)) as server:

        def submit(prompt_ids, params, notify):
            turns = tokenizer.decode(prompt_ids, skip_control=False).split("<|im_start|>")
            question = next(turn for turn in turns if turn.startswith("user\n"))[5]
            results = [t.removeprefix("tool\n<tool_response>\n").split("\n")[0] for t in turns if t.startswith("tool")]
            text = SAID[question][len(results)].replace("RESULT", (results or [""])[-1])
            return EchoRequest([*tokenizer.encode_contents([text])[0], tokenizer.eos_id], params, notify, prompt_ids)

        server.echo.submit, server.echo.context_length = submit, 4096
        yield server


def test_calls_arguments_and_answers_are_scored(server, tmp_path, capsys):
    data = write_jsonl(tmp_path / "tools.jsonl", CONVERSATIONS)
    eval_toolcall.main(["--base_url", server.url, "--model", "full_dist_32", "--data_path", str(data)])
    shown = capsys.readouterr().out
    assert "right calls: 80.0 %\nright arguments: 60.0 %\nright answer: 80.0 %" in shown
    assert "2 calls due (1): calls 100.0 %, arguments 100.0 %, answer 100.0 %" in shown
    assert "no calls due (2): calls 50.0 %, arguments 50.0 %, answer 50.0 %" in shown
    assert 'd  ->  calculator({"expression": "2*2"}), \'4\'' in shown
    assert shown.count("clock({})") == eval_toolcall.MOST_TURNS


def test_a_conversation_without_room_for_an_answer_has_none(server, tmp_path, capsys):
    long, asked = conversation("word " * 5000, answer="1"), ["--base_url", server.url, "--model", "full_dist_32"]
    data = write_jsonl(tmp_path / "tools.jsonl", [long, *CONVERSATIONS[2:3]])
    eval_toolcall.main([*asked, "--data_path", str(data), "--examples", "0"])
    shown = capsys.readouterr().out
    assert "1 without an answer, the server refused: " in shown and "2 conversations\n" in shown
    with pytest.raises(SystemExit, match="error: .*context"):
        eval_toolcall.main([*asked, "--data_path", str(write_jsonl(tmp_path / "long.jsonl", [long]))])


@pytest.mark.parametrize("none", [[], None])
def test_a_server_may_answer_with_an_empty_list_of_calls(none):
    gold = [{"role": "assistant", "content": "5"}]
    assert all(eval_toolcall.judge([gold[0] | {"tool_calls": none}], gold).values())


def test_a_server_that_refuses_in_words_of_its_own_ends_one_conversation(server, tmp_path, capsys, monkeypatch):
    def submit(prompt_ids, params, notify):
        if len(prompt_ids) > 600:
            raise ValueError("too long")
        return submitted(prompt_ids, params, notify)

    submitted, asked = server.echo.submit, ["--base_url", server.url, "--model", "full_dist_32"]
    monkeypatch.setattr(server.echo, "submit", submit)
    data = write_jsonl(tmp_path / "tools.jsonl", [conversation("c " + "word " * 600, answer="1"), CONVERSATIONS[2]])
    eval_toolcall.main([*asked, "--data_path", str(data), "--examples", "0"])
    shown = capsys.readouterr().out
    assert "1 without an answer, the server refused: too long" in shown and "right answer: 50.0 %" in shown


def test_scripts_start_a_server_of_their_own(tmp_path, tokenizer, capsys):
    folder = write_models(tmp_path, tokenizer)
    data = write_jsonl(tmp_path / "tools.jsonl", CONVERSATIONS[2:3])
    flags = ["--out_dir", str(folder), "--device", "cpu", "--data_path", str(data)]
    eval_toolcall.main(flags)
    assert "1 conversations\nright calls: " in capsys.readouterr().out


def test_a_line_is_what_ends_with_a_line_break(tmp_path):
    data = tmp_path / "tools.jsonl"
    record = conversation("一\u2028二", answer="1\x85")
    data.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (turns,) = eval_toolcall.read_conversations(data)
    assert turns[-1]["content"] == "1\x85"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"role": "user", "content": "a"}]}, ":1: "),
        (conversation("a", answer="1") | {"tools": [{"function": {"name": "shell"}}]}, "no tool 'shell' runs here"),
        (
            {"conversations": CONVERSATIONS[0]["conversations"][:2]},
            "it must end with the assistant's answer",
        ),
    ],
)
def test_bad_records_are_named(tmp_path, record, message, capsys):
    data = write_jsonl(tmp_path / "tools.jsonl", [record])
    with pytest.raises(SystemExit, match="tools.jsonl:1") as error:
        eval_toolcall.main(["--data_path", str(data)])
    assert message in str(error.value)


def test_a_server_that_is_not_there_is_named(tmp_path):
    data = write_jsonl(tmp_path / "tools.jsonl", CONVERSATIONS[:1])
    with pytest.raises(SystemExit, match="no server at http://127.0.0.1:9/v1"):
        eval_toolcall.main(["--base_url", "http://127.0.0.1:9/v1", "--data_path", str(data)])


def test_the_samples_tool_questions_are_read_and_their_answers_are_right(tmp_path):
    conversations = eval_toolcall.read_conversations(eval_toolcall.ROOT / "dataset" / "sample" / "tool_questions.jsonl")
    assert len(conversations) >= 50
    for turns in conversations:
        assert turns[0]["tools"] == [TOOLS["calculator"]]
        results = [turn["content"] for turn in turns if turn["role"] == "tool"]
        calls = eval_toolcall.calls_of(turns)
        assert [eval_toolcall.call_tool(name, arguments) for name, arguments in calls] == results
        assert all(eval_toolcall.judge(turns[2:], turns).values())
    due = Counter(len(eval_toolcall.calls_of(turns)) for turns in conversations)
    assert due.keys() == {0, 1, 2} and min(due.values()) >= 20
    json.dumps(conversations)
