"""From raw files to records: layouts, rules, reports, and what a broken input says."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pyarrow
import pytest
from conftest import ROOT, write_conversations, write_jsonl, write_preferences, write_texts
from filelock import FileLock

from dataset.lm_dataset import parse_record, tokenize_records
from scripts import prepare_data
from scripts.prepare_rules import OTHER_NAME, is_cut

SCRIPT = ROOT / "scripts" / "prepare_data.py"
CHAT = [{"role": "user", "content": "山有多高？"}, {"role": "assistant", "content": "三千米。"}]


def compress_zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def prepare(command: str, *arguments, workers: int = 1) -> None:
    prepare_data.main([command, *map(str, arguments), "--quiet", f"--workers={workers}"])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def report(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".report.json").read_text("utf-8"))


def reasons(path: Path) -> dict[str, int]:
    return {reason: entry["rows"] for reason, entry in report(path)["dropped"].items()}


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        prepare(*arguments)
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


def converted(tmp_path: Path, rows: list, *flags) -> list[dict]:
    source, output = tmp_path / "raw.jsonl", tmp_path / "made.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    prepare("convert", source, "-o", output, "--overwrite", *flags)
    return read(output)


# --- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ours": {"conversations": CHAT},
    "ShareGPT": {"conversations": [{"from": "human", "value": "山有多高？"}, {"from": "gpt", "value": "三千米。"}]},
    "messages": {"messages": CHAT, "source": "x"},
    "Alpaca": {"instruction": "山有多高？", "input": "", "output": "三千米。"},
    "Jiangshu": {"id": 1, "instruction": "", "input": "山有多高？", "output": "三千米。", "history": []},
    "prompt and completion": {"prompt": "山有多高？", "completion": "三千米。"},
    "question and answer": {"question": "山有多高？", "answer": "三千米。"},
    "Magpie": {
        "instruction": "山有多高？",
        "response": "三千米。",
        "conversations": [{"from": "human", "value": "山有多高？"}, {"from": "gpt", "value": "三千米。"}],
    },
    "pairs of human and assistant": {"conversation": [{"human": "山有多高？", "assistant": "三千米。"}]},
    "a list of texts": {"data": ["山有多高？", "三千米。"]},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_the_same_conversation(tmp_path, name):
    assert converted(tmp_path, [LAYOUTS[name]]) == [{"conversations": CHAT}]


def test_history_system_and_input_are_kept(tmp_path):
    row = {
        "instruction": "译成英文",
        "input": "山",
        "output": "mountain",
        "history": [["你好", "你好！"]],
        "system": "译者",
    }
    [record] = converted(tmp_path, [row])
    assert [(t["role"], t["content"]) for t in record["conversations"]] == [
        ("system", "译者"),
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "译成英文\n山"),
        ("assistant", "mountain"),
    ]


REASONED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\n加\n</think>\n<answer>\n2\n</answer>"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "1+1?", "reasoning_content": "加", "content": "2", "score": 10},
        {"question": "1+1?", "reasoning": "加", "response": "2"},
        {"instruction": "1+1?", "output": "<think>加</think>\n\n2"},
        {
            "conversations": [
                {"from": "user", "value": "1+1?"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>加<|end_of_thought|>\n<|begin_of_solution|>2<|end_of_solution|>",
                },
            ]
        },
        {"question": "1+1?", "answer": "加<<1+1=2>>\n#### 2"},
    ],
)
def test_distilled_reasoning_gets_the_four_tags(tmp_path, row):
    assert converted(tmp_path, [row], "--to", "reason") == [{"conversations": REASONED}]


def test_an_answer_without_a_thought_is_no_reasoning(tmp_path):
    rows = [{"question": "1+1?", "answer": "2"}, {"question": "1+1?", "reasoning": "加", "answer": "2"}]
    assert len(converted(tmp_path, rows, "--to", "reason")) == 1
    assert reasons(tmp_path / "made.jsonl") == {"no thought and answer": 1}


def test_gsm8k_becomes_problems_with_a_bare_answer(tmp_path):
    row = {"question": "How many?", "answer": "He has 1200.<<1200+34=1234>>\nSo 1234.\n#### 1,234"}
    expected = {"conversations": [{"role": "user", "content": "How many?"}], "answer": "1234"}
    assert converted(tmp_path, [row], "--to", "problem") == [expected]
    assert converted(tmp_path, [expected], "--to", "problem") == [expected]
    for number in (7, 0):
        [numeric] = converted(tmp_path, [{"problem": "How many?", "answer": number}], "--to", "problem")
        assert numeric["answer"] == str(number)


def preference(*answers: str) -> dict:
    sides = [[{"role": "user", "content": "问"}, {"role": "assistant", "content": answer}] for answer in answers]
    return dict(zip(("chosen", "rejected"), sides, strict=True))


@pytest.mark.parametrize(
    "row",
    [
        preference("好", "坏"),
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"prompt": "问", **preference("好", "坏")},
        {
            "conversations": [{"from": "human", "value": "问"}],
            "chosen": {"from": "gpt", "value": "好"},
            "rejected": {"from": "gpt", "value": "坏"},
        },
        {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
        {
            "instruction": "问",
            "completions": [
                {"response": "坏", "overall_score": 1.0},
                {"response": "好", "overall_score": 9.0},
                {"response": "中", "overall_score": 5.0},
            ],
        },
    ],
)
def test_preferences_of_every_layout(tmp_path, row):
    assert converted(tmp_path, [row]) == [preference("好", "坏")]


TOOL = {
    "name": "weather",
    "description": "天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = {"name": "weather", "arguments": {"city": "北京"}}
# our own form of one conversation with everything that a turn may hold
WITH_TOOLS = [
    {"role": "system", "content": "", "tools": [TOOL]},
    {"role": "user", "content": "北京天气如何？"},
    {"role": "assistant", "content": "", "reasoning_content": "要查天气", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": 21}'},
    {"role": "assistant", "content": "北京二十一度。"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": WITH_TOOLS},
        {"messages": WITH_TOOLS[1:], "tools": [TOOL]},
        {"messages": WITH_TOOLS[1:], "tools": json.dumps([TOOL])},
        {"messages": [WITH_TOOLS[0] | {"role": "developer"}, *WITH_TOOLS[1:]]},
        {
            "messages": [
                *WITH_TOOLS[:2],
                WITH_TOOLS[2]
                | {
                    "content": None,
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": CALL | {"arguments": json.dumps(CALL["arguments"], ensure_ascii=False)},
                        }
                    ],
                },
                WITH_TOOLS[3] | {"content": [{"type": "text", "text": '{"degrees": 21}'}]},
                WITH_TOOLS[4],
            ]
        },
        {
            "system": "",
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "北京天气如何？"},
                {"from": "function_call", "value": json.dumps(CALL), "reasoning_content": "要查天气"},
                {"from": "observation", "value": '{"degrees": 21}'},
                {"from": "gpt", "value": "北京二十一度。"},
            ],
        },
    ],
)
def test_tools_calls_thoughts_and_results_survive_converting(tmp_path, tokenizer, row):
    """The model reads the same ids as of our own form, and learns the same ones."""
    [record] = converted(tmp_path, [row], "--to", "conversation")
    made, expected = (
        tokenize_records("conversation", [parse_record("conversation", json.dumps(r))], tokenizer)
        for r in (record, {"conversations": WITH_TOOLS})
    )
    assert made == expected
    text = tokenizer.decode(made[0][0], skip_control=False)
    learned = tokenizer.decode([i for i, kept in zip(*made[0], strict=True) if kept])
    assert '"city"' in text and "<think>" in learned and '"北京"' in learned and "degrees" not in learned


def test_a_row_that_offers_no_tools_gets_no_system_turn(tmp_path):
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    assert converted(tmp_path, [{"conversations": turns, "tools": "[]"}], "--to", "conversation") == [
        {"conversations": turns}
    ]


def test_what_convert_leaves_out_is_counted(tmp_path):
    turns = [CHAT[0], CHAT[1] | {"weight": 0}]
    converted(tmp_path, [{"messages": turns, "source": "x", "score": None}, {"messages": CHAT}])
    changed = {name: entry["rows"] for name, entry in report(tmp_path / "made.jsonl")["changed"].items()}
    assert changed == {'"source" of records left out': 1, '"weight" of turns left out': 1}


def test_what_cannot_be_converted_is_counted_by_reason(tmp_path):
    rows = [
        {"conversations": CHAT},
        {"numbers": [1, 2]},
        {"conversations": [{"role": "user", "content": "一个人说"}]},
        {"instruction": "问", "output": "答", "history": "不是表"},
        [1, 2],
    ]
    assert len(converted(tmp_path, rows)) == 1
    found = reasons(tmp_path / "made.jsonl")
    assert found["no layout that we know"] == found["not a JSON object"] == found["history is not a list of pairs"] == 1
    assert sum(found.values()) == 4 and report(tmp_path / "made.jsonl")["rows_in"] == 5


# --- files -----------------------------------------------------------------------------------------------------------

PAIRS = [{"question": f"问题 {n}，“引号”\n第二行", "answer": f"答案 {n}"} for n in range(2500)]


def write_as(path: Path, rows: list[dict]) -> Path:
    """The same rows in the layout that the name says."""
    name = path.name
    if ".csv" in name or ".tsv" in name:
        import csv
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    elif ".parquet" in name:
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    elif ".json" in name and ".jsonl" not in name:
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = compress_zstd(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.zst", "a.jsonl.zst"]
)
def test_every_file_layout_gives_the_same_records(tmp_path, name):
    output = tmp_path / "made.jsonl"
    prepare("convert", write_as(tmp_path / name, PAIRS), "-o", output)
    made = read(output)
    assert [[t["content"] for t in r["conversations"]] for r in made] == [[p["question"], p["answer"]] for p in PAIRS]


@pytest.mark.parametrize("indent, between", [(1, " "), (None, " "), (None, "\n")])
def test_json_arrays_one_after_another_are_all_read(tmp_path, monkeypatch, indent, between):
    parts = [json.dumps(PAIRS[n : n + 20], indent=indent) for n in (0, 20)]
    (tmp_path / "a.json").write_text(between.join(parts) + "\n", "utf-8")
    for characters in (1 << 20, 7):
        monkeypatch.setattr("scripts.prepare_sources.BLOCK_CHARACTERS", characters)
        prepare("convert", tmp_path / "a.json", "-o", tmp_path / "made.jsonl", "--to", "conversation", "--overwrite")
        assert [r["conversations"][1]["content"] for r in read(tmp_path / "made.jsonl")] == [
            pair["answer"] for pair in PAIRS[:40]
        ]


def test_a_list_in_each_line_is_a_row_that_is_no_record(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [CHAT] * 9)
    assert "no row is left of 9: {'not a JSON object': 9}" in error_of("clean", source, "-o", tmp_path / "b.jsonl")


def test_tabs_divide_a_tsv_whose_name_is_in_capitals(tmp_path):
    source = write_as(tmp_path / "a.tsv", PAIRS[:9]).rename(tmp_path / "A.TSV")
    prepare("convert", source, "-o", tmp_path / "made.jsonl")
    assert len(read(tmp_path / "made.jsonl")) == 9


def test_a_folder_is_read_without_what_describes_it_and_every_file_says_what_the_rows_are(tmp_path):
    folder = tmp_path / "raw"
    (folder / ".cache").mkdir(parents=True)
    for name in ("README.md", "LICENSE.txt", ".cache/a.jsonl", "a.jsonl.report.json"):
        (folder / name).write_text("{}", "utf-8")
    write_texts(folder / "a.jsonl", 2)
    write_conversations(folder / "b.jsonl", 9)
    prepare("convert", folder, "-o", tmp_path / "made.jsonl")
    assert len(read(tmp_path / "made.jsonl")) == 9 and reasons(tmp_path / "made.jsonl") == {"no layout that we know": 2}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_is_what_it_holds_whatever_its_name(tmp_path, name):
    write_as(tmp_path / name, PAIRS[:50]).rename(tmp_path / "b.jsonl")
    prepare("convert", tmp_path / "b.jsonl", "-o", tmp_path / "made.jsonl")
    assert len(read(tmp_path / "made.jsonl")) == 50


def test_a_folder_of_plain_text_becomes_passages(tmp_path):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "b.txt").write_text("第一段。\n第二段。\r\n" + "长句子。" * 300, encoding="utf-8")
    (folder / "more" / "a.md").write_text("# 标题\n\n正文", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    prepare("convert", folder, "-o", tmp_path / "made.jsonl", "--passage", "500")
    texts = [record["text"] for record in read(tmp_path / "made.jsonl")]
    assert max(map(len, texts)) <= 500 and all(text.endswith(("。", "正文")) for text in texts)
    assert "".join(texts).replace("\n", "") == "第一段。第二段。" + "长句子。" * 300 + "# 标题正文"


def test_several_inputs_one_output_and_any_number_of_processes(tmp_path, monkeypatch):
    a, b = write_texts(tmp_path / "a.jsonl", 1000, seed=1), write_texts(tmp_path / "b.jsonl", 100, seed=2)
    monkeypatch.setattr("scripts.prepare_sources.BLOCK_CHARACTERS", 20_000)  # several blocks
    for workers in (1, 2, 3):
        prepare("clean", a, b, "-o", tmp_path / f"{workers}.jsonl", "--no-cut", workers=workers)
    outputs = {(tmp_path / f"{n}.jsonl").read_bytes() for n in (1, 2, 3)}
    reports = [{k: v for k, v in report(tmp_path / f"{n}.jsonl").items()} for n in (1, 2, 3)]
    assert len(outputs) == 1 and reports[0] == reports[1] == reports[2]
    assert a.read_text("utf-8").splitlines()[0] in (tmp_path / "1.jsonl").read_text("utf-8")


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_another_encoding_is_named_with_its_cure(tmp_path, encoding):
    source, output = tmp_path / "a.jsonl", tmp_path / "made.jsonl"
    source.write_bytes(
        "".join(json.dumps({"text": f"第{n}座石桥很老。"}, ensure_ascii=False) + "\n" for n in range(40)).encode(
            encoding
        )
    )
    message = error_of("convert", source, "-o", output)
    assert str(source) in message and f"--encoding {encoding}" in message and not output.exists()
    prepare("convert", source, "-o", output, "--encoding", encoding)
    assert read(output)[39]["text"] == "第39座石桥很老。"


def test_byte_order_marks_in_the_middle_are_no_part_of_a_record(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_bytes(("\ufeff" + '{"text": "第一行"}\n' + "\ufeff" + '{"text": "第二行"}\n').encode())
    prepare("convert", source, "-o", tmp_path / "made.jsonl")
    assert [r["text"] for r in read(tmp_path / "made.jsonl")] == ["第一行", "第二行"]


def test_bad_lines_are_counted_by_reason_with_file_and_line(tmp_path):
    source, output = tmp_path / "a.jsonl", tmp_path / "made.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b"\xff\xfe\xff",
        b"[1]",
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": 3}',
        b"[" * 100_000,
    ]
    source.write_bytes(b"\n".join(lines))
    prepare("convert", source, "-o", output)
    assert reasons(output) == {
        "broken JSON": 2,
        "not UTF-8": 1,
        "not a JSON object": 1,
        "half a surrogate pair": 1,
        "no text": 1,
    }
    assert report(output)["dropped"]["broken JSON"]["examples"][0]["where"] == f"{source}:2"


def test_rows_of_arrays_and_tables_are_checked_as_lines_are(tmp_path):
    array, table = tmp_path / "a.json", tmp_path / "b.csv"
    array.write_bytes(b'[{"text": "good"}, {"text": "\\ud83d"}, {"text": "\xff"}, [1]]')
    table.write_bytes(b"text\ngood too\nb\xffd\none,more\n")
    for command, flags in (("convert", ["--to=pretrain"]), ("clean", ["--min_chars=1"]), ("dedup", []), ("mix", [])):
        output = tmp_path / f"{command}.jsonl"
        prepare(command, array, table, "-o", output, *flags)
        assert reasons(output) == {"half a surrogate pair": 1, "not UTF-8": 2, "not a JSON object": 1}
        assert sorted(record["text"] for record in read(output)) == ["good", "good too", "one"]


ODD = [{"conversations": odd} for odd in (["问", "答"], [None], "text", 3, [{"role": ["user"], "content": "x" * 20}])]
ODD += [{"messages": [None]}, {"conversations": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}]}]


@pytest.mark.parametrize("command", ["convert", "clean", "join", "contrast", "mix --random_system 1", "dedup"])
def test_an_odd_row_does_not_end_a_run(tmp_path, command):
    name, *flags = command.split()
    question = {"role": "user", "content": "请扮演一位老师，介绍一下这座山"}
    good = {"conversations": [question, {"role": "assistant", "content": LONG}]}
    source = write_jsonl(tmp_path / "a.jsonl", [*ODD, good])
    prepare(name, source, "-o", tmp_path / "b.jsonl", *flags)
    assert any(LONG in json.dumps(record, ensure_ascii=False) for record in read(tmp_path / "b.jsonl"))
    assert report(tmp_path / "b.jsonl")["rows_in"] == len(ODD) + 1


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl.gz", b'{"text": "plain"}\n', "Not a gzipped file"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "cut short"}\n' * 9000)[:-300], "ended before"),
        ("a.jsonl.zst", b'{"text": "plain"}\n', "ZSTD"),
        ("b.jsonl.zst", compress_zstd(b'{"text": "cut short"}\n' * 9000)[:-9], "Truncated"),
        ("a.parquet", b"PAR1 no table", "Parquet"),
        ("a.json", b'[{"text": "one"}, {"text": ', "broken after item 1"),
        ("a.json", b'[{"text": "one"} oops]', "broken after item 1"),
        ("a.json", b'[{"text": "one"}] oops', "goes on after a JSON array, item 1, with 'oops'"),
        ("a.csv", b'text\none\n"two\nthree\nfour\n', "row that begins in line 3"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"PK\x03\x04" + bytes(range(250)), "is a zip file; unpack it"),
        ("a.jsonl", b"<!DOCTYPE html><p>log in", "is a web page"),
        ("a.jsonl", bytes(5000), "zero bytes only"),
        ("a.jsonl", b"\n \n", "holds no JSON object"),
        ("a.jsonl", b"{cut\n", "its first lines are: broken JSON"),
        ("a.jsonl", b'{"x": 1}\n', "no layout that we know (keys: x)"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    message = error_of("convert", tmp_path / name, "-o", tmp_path / "made.jsonl")
    assert said in message and str(tmp_path / name) in message
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_inputs_say_what_is_there(tmp_path):
    write_texts(tmp_path / "other.jsonl", 2)
    assert "other.jsonl" in error_of("clean", tmp_path / "a.jsonl", "-o", tmp_path / "b.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no" in error_of("clean", tmp_path / "empty", "-o", tmp_path / "b.jsonl")
    assert "too long" in error_of("clean", tmp_path / ("x" * 300), "-o", tmp_path / "b.jsonl")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "pipe is not a regular file" in error_of("clean", tmp_path / "pipe", "-o", tmp_path / "b.jsonl")


def test_an_output_that_cannot_be_written_is_a_line(tmp_path):
    write_texts(tmp_path / "a.jsonl", 2)
    assert "a.jsonl/x" in error_of("clean", tmp_path / "a.jsonl", "-o", tmp_path / "a.jsonl" / "x" / "b.jsonl")


def test_an_output_never_replaces_its_input_nor_another_file_unasked(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 5)
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for output in (source, tmp_path / "link.jsonl"):
        assert "is an input too" in error_of("clean", source, "-o", output, "--overwrite")
    (tmp_path / "b.jsonl").write_text("mine")
    assert "--overwrite" in error_of("clean", source, "-o", tmp_path / "b.jsonl")
    assert source.read_bytes() == before and (tmp_path / "b.jsonl").read_text() == "mine"
    prepare("clean", source, "-o", tmp_path / "b.jsonl", "--overwrite")


def test_the_file_for_held_out_rows_replaces_nothing_unasked(tmp_path):
    source, mine = numbered(tmp_path / "a.jsonl", 200), tmp_path / "mine.jsonl"
    before = source.read_bytes()
    mine.write_text("mine")
    command = ("mix", source, "-o", tmp_path / "b.jsonl", "--held_out", 10, "--held_out_output")
    for path, said in (
        (source, "is an input too"),
        (mine, "is there already"),
        (tmp_path / "x" / ".." / "b.jsonl", "is --output too"),
        (source / "c.jsonl", "cannot write"),
    ):
        message = error_of(*command, path)
        assert said in message and "another --held_out_output" in message
    assert source.read_bytes() == before and mine.read_text() == "mine" and not (tmp_path / "b.jsonl").exists()
    prepare(*command, mine, "--overwrite")
    assert len(read(mine)) == 10 and len(read(tmp_path / "b.jsonl")) == 190


@pytest.mark.parametrize(
    "command",
    [
        "mix --held_out -5", "mix --random_system 50", "mix --drop_empty_think -0.1", "dedup --near 80",
        "convert --passage 0", "clean --max_marks 60", "contrast --alike 70",
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(tmp_path, capsys, command):
    name, flag, value = command.split()
    with pytest.raises(SystemExit):
        prepare(name, write_texts(tmp_path / "a.jsonl", 2), "-o", tmp_path / "b.jsonl", f"{flag}={value}")
    assert flag in capsys.readouterr().err and not (tmp_path / "b.jsonl").exists()


def test_flags_of_mix_that_do_not_go_together_are_refused(tmp_path):
    source, output = write_texts(tmp_path / "a.jsonl", 2), tmp_path / "b.jsonl"
    assert "--rows with --weights" in error_of("mix", source, "-o", output, "--rows", 1)
    assert "--weights goes without" in error_of("mix", source, "-o", output, "--weights", 1, "--epochs", 1)
    assert "an input twice" in error_of("mix", source, source, "-o", output, "--epochs", 1, 2)
    prepare("mix", source, source, "-o", output)
    assert len(read(output)) == 4


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 3000)
    limited = f"ulimit -f 40; exec {sys.executable} {SCRIPT} clean {source} -o {tmp_path}/b.jsonl --quiet --workers 1"
    done = subprocess.run(["bash", "-c", "trap '' XFSZ; " + limited], capture_output=True, text=True)
    assert done.returncode == 1 and "free some space" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# --- rules -----------------------------------------------------------------------------------------------------------

LONG = "这座山在城的北边，春天开满了花。夏天山上有很多树，人们常去散步。秋天叶子变红，冬天偶尔下雪。"
TEXT_RULES = {
    "too short": ("短", "这一行有十个字以上，留下。"),
    "too long": ("长" * 512, "不太长的一段文字，在五百一十二字以内。" * 2),
    "mojibake": ("浣犲ソ锛屼笘鐣岋紒浠婂ぉ澶╂皵寰堝ソ銆�", "锛是一种工具，用来削平木头，这一句不是乱码。"),
    "symbol noise": ("★☆★☆###￥￥%%%&&&***~~~!!!@@@^^^ 广告", "公式：$a^{2}+b^{2}=c^{2}$，这是勾股定理的写法。"),
    "repeated lines": (
        "运行结果为这样：\n运行结果为这样：\n运行结果为这样：",
        "第一行说山。\n第二行说水。\n第一行说山。\n第四行说树，长一些。",
    ),
    "repeated n-grams": ("买它买它买它" * 20, LONG),
    "broken markup": ("<div class='a'>一段没有结尾的网页文字&nbsp;", "若$a<b$且$b>c$，则<b>结论</b>成立，这是好的。"),
}


@pytest.mark.parametrize("rule", TEXT_RULES)
def test_each_rule_of_texts_drops_what_it_names_and_spares_its_neighbour(tmp_path, rule):
    bad, good = TEXT_RULES[rule]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": bad}, {"text": good}])
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == [{"text": good}] and reasons(tmp_path / "b.jsonl") == {rule: 1}


CHAT_RULES = {
    "one-sided conversation": ([("user", "只有一个人在说话，没有人回答他")], None),
    "empty turn": ([("user", "请介绍一下这座山的四季"), ("assistant", "  ")], None),
    "answer repeats the question": (
        [("user", "请介绍一下这座山的四季"), ("assistant", "请介绍一下这座山的四季")],
        None,
    ),
    "answer cut in the middle": (
        [("user", "介绍这座山"), ("assistant", LONG[:-4])],
        [
            ("user", "列出"),
            ("assistant", "- 春天开花的山\n- 夏天散步的山\n- 秋天的红叶\n- 冬天的雪，还有很多很多别的景色"),
        ],
    ),
    "refusal": (
        [("user", "今天天气"), ("assistant", "作为一个人工智能语言模型，我无法查询实时天气。")],
        [("user", "语言模型是什么"), ("assistant", "语言模型是给文字打分的程序，它不能代替人。")],
    ),
    "another model's name": (
        [("user", "你是谁"), ("assistant", "我是由OpenAI开发的ChatGPT，很高兴认识你。")],
        [("user", "谁做了ChatGPT"), ("assistant", "ChatGPT 是 OpenAI 在二〇二二年发布的。")],
    ),
    "broken markup": (
        [("user", "介绍这座山"), ("assistant", "<think>想一想这座山的样子，然后再回答")],
        [("user", "介绍"), ("assistant", "<think>\n想\n</think>\n<answer>\n山很高。\n</answer>")],
    ),
}


@pytest.mark.parametrize(
    ("answer", "foreign"),
    [
        ("我是由百度研发的大语言模型。", True),
        ("我是百度的AI助手。", True),
        ("作为OpenAI开发的语言模型，我会尽力。", True),
        ("我是书生·浦语。", True),
        ("I was created by OpenAI to help.", True),
        ("I am a large language model, trained by Google.", True),
        ("我是一个穷书生，家住江南，正要进京赶考。", False),
        ("我是通过百度地图找到这家店的，味道很好。", False),
        ("我是一个用于聊天的ChatGPT助手。", True),
        ("我是一个专门用来看图的Qwen模型。", True),
        ("我是吃豆包长大的。", False),
        ("它是OpenAI开发的聊天机器人，于2022年发布。", False),
        ("I was surprised by Gemini and its bright stars.", False),
    ],
)
def test_another_models_name_is_one_that_the_answer_gives_itself(answer, foreign):
    assert bool(OTHER_NAME.search(answer)) == foreign


@pytest.mark.parametrize("rule", CHAT_RULES)
def test_each_rule_of_conversations(tmp_path, rule):
    rows = [
        {"conversations": [dict(zip(("role", "content"), t, strict=True)) for t in turns]}
        for turns in CHAT_RULES[rule]
        if turns
    ]
    rows.append(
        {"conversations": [{"role": "user", "content": "介绍一下这座山"}, {"role": "assistant", "content": LONG}]}
    )
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == rows[1:] and reasons(tmp_path / "b.jsonl") == {rule: 1}


@pytest.mark.parametrize(
    "answer",
    [
        LONG[:-12],
        "山上有很多树，山下有一条小河。\n夏天人们常去山上散步，秋天叶子",
        "这座山在城的北边，以下是我的几点建议，希望能帮到你：",
        "设这个数为$x$，则$\\frac{x}{2}+3=8$，所以$\\frac{x}{2}=",
        "def area(width, height):\n    return width * max(height",
        "The hill is north of the town. In spring it is covered with the",
        "春天山上开满了花，夏天有很多树，人们常去散步，秋天叶子变红，到了冬天，因为天气冷，去的人少了一些，不过还是有不少人喜欢在雪后的早晨",
    ],
)
def test_answers_that_stop_in_the_middle_are_seen_by_their_end(answer):
    assert is_cut(answer)


@pytest.mark.parametrize(
    "answer",
    [
        LONG,
        "三千米",
        "正确答案是A、C：\nA. 申请人应当在六十日内提出申请\nC. 复议期间，具体行政行为原则上不停止执行",
        "推荐三道菜。\n1. 青椒土豆丝\n2. 西红柿炒鸡蛋\n3. 土豆炖豆角，再加一点点葱花",
        "设这个数为$x$，则$\\frac{x}{2}=4$，\n所以这个数是$8$．\n答案：B",
        'echo "there are $count files"\nfind . -type f -exec rm {} \\;',
        "此致\n敬礼\n\n城北的守林人",
        "The hill is north of the town. In spring it is covered with flowers.",
    ],
)
def test_answers_that_have_an_end_are_not_cut(answer):
    assert not is_cut(answer)


def test_only_the_chosen_side_of_a_preference_must_be_good(tmp_path):
    question = {"role": "user", "content": "介绍一下这座山"}
    answers = {"good": LONG, "refusal": "很抱歉，我无法回答这个问题，请换一个。", "repeated": "山很高。\n" * 20}
    answers |= {"open": "```\n" + LONG, "echo": question["content"]}
    rows = [
        {
            side: [question, {"role": "assistant", "content": answers[name]}]
            for side, name in zip(("chosen", "rejected"), pair, strict=True)
        }
        for pair in (
            ("good", "refusal"), ("good", "repeated"), ("good", "open"), ("good", "echo"),
            ("refusal", "good"), ("repeated", "good"), ("open", "open"), ("echo", "good"),
        )
    ]  # fmt: skip
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == rows[:4]
    reasons_why = {"refusal": 1, "repeated lines": 1, "broken markup": 1, "answer repeats the question": 1}
    assert reasons(tmp_path / "b.jsonl") == reasons_why


def test_a_question_without_answer_at_the_end_goes_and_the_rest_stays(tmp_path):
    turns = [{"role": "user", "content": "介绍一下这座山"}, {"role": "assistant", "content": LONG}]
    last = {"role": "user", "content": "？" * 200}  # which alone would be noise
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": [*turns, last]}])
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == [{"conversations": turns}]
    assert report(tmp_path / "b.jsonl")["changed"]["question without answer at the end"]["rows"] == 1


def test_personal_data_is_masked_and_numbers_that_are_none_stay(tmp_path):
    text = (
        "见 https://a.example/b?c=1，写信到 li.si@mail.example.cn，电话13812345678或010-62345678，"
        "身份证11010519491231002X。圆周率3.14159265358979，订单20240101123456789，共1234567890123元。"
    )
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    [record] = read(tmp_path / "b.jsonl")
    assert record["text"] == (
        "见 [url]，写信到 [mail]，电话[phone]或[phone]，身份证[id]。"
        "圆周率3.14159265358979，订单20240101123456789，共1234567890123元。"
    )
    changed = report(tmp_path / "b.jsonl")["changed"]
    assert {name: entry["rows"] for name, entry in changed.items()} == {
        f"{n} masked": 1 for n in ("url", "mail", "phone", "id")
    }
    prepare("clean", source, "-o", tmp_path / "c.jsonl", "--mask")
    assert (tmp_path / "c.jsonl").read_bytes() == source.read_bytes()


def test_what_a_turn_holds_besides_its_content_is_masked_counted_and_checked(tmp_path):
    def row(content: object, arguments: object, thought: str = "想一想") -> dict:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        calling = {"role": "gpt", "content": content, "reasoning_content": thought, "tool_calls": [call], "weight": 1}
        said = {"role": "assistant", "content": [{"type": "text", "text": "三千米，写信到 a@b.example 即可。"}]}
        return {
            "conversations": [
                {"role": "human", "content": "山有多高？"},
                calling,
                {"role": "tool", "content": ""},
                said,
            ]
        }

    rows = [
        row(None, {"to": ["打13812345678找我"], "n": 13812345678}, "见 https://a.example/b"),
        row("", json.dumps({"to": "打13812345678找我"}, ensure_ascii=False)),
        row("", {}, "长" * 512),
        row("", {"to": "锟斤拷" * 9}),
        row("", {}, "我是由OpenAI开发的ChatGPT，想一想。"),
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    first, second = (record["conversations"] for record in read(tmp_path / "b.jsonl"))
    assert [turn["role"] for turn in first] == ["user", "assistant", "tool", "assistant"]
    assert first[1]["tool_calls"][0]["function"]["arguments"] == {"to": ["打[phone]找我"], "n": 13812345678}
    assert first[1]["reasoning_content"] == "见 [url]" and first[1]["weight"] == 1
    assert second[1]["tool_calls"][0]["function"]["arguments"] == {"to": "打[phone]找我"}
    assert first[3]["content"] == second[3]["content"] == "三千米，写信到 [mail] 即可。"
    assert reasons(tmp_path / "b.jsonl") == {"too long": 1, "mojibake": 1, "another model's name": 1}
    prepare("clean", source, "-o", tmp_path / "c.jsonl", "--mask")
    assert (tmp_path / "c.jsonl").read_bytes() == b"".join(source.read_bytes().splitlines(True)[:2])


def test_a_side_of_a_preference_may_have_3000_characters_and_a_report_ten_examples(tmp_path):
    rows = [
        {
            side: [{"role": "user", "content": "问"}, {"role": "assistant", "content": content}]
            for side, content in (("chosen", LONG), ("rejected", f"{n:04}" * 750))
        }
        for n in range(12)
    ]
    rows[0]["rejected"][1]["content"] = "长" * 2998
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
    assert read(tmp_path / "b.jsonl") == rows[:1] and reasons(tmp_path / "b.jsonl") == {"too long": 11}
    examples = report(tmp_path / "b.jsonl")["dropped"]["too long"]["examples"]
    assert len(examples) == 10 and all(len(example["row"]) == 301 for example in examples)


def test_every_rule_can_be_turned_off(tmp_path):
    rows = [{"text": bad} for bad, _ in TEXT_RULES.values()]
    rows += [
        {"conversations": [dict(zip(("role", "content"), t, strict=True)) for t in turns]}
        for turns, _ in CHAT_RULES.values()
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    off = [f"--no-{rule}" for rule in ("mojibake", "markup", "turns", "cut", "refusals", "other_names")]
    bounds = ["--min_chars=0", "--max_chars=9999", "--max_marks=1", "--max_repeated_lines=1", "--max_repeated_ngrams=1"]
    prepare("clean", source, "-o", tmp_path / "b.jsonl", *off, *bounds, "--mask")
    assert (tmp_path / "b.jsonl").read_bytes() == source.read_bytes()


def test_chinese_is_measured_by_script(tmp_path):
    rows = [{"text": "This sentence is English only."}, {"text": "这一句是中文，with a few words."}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("clean", source, "-o", tmp_path / "b.jsonl", "--min_chinese", "0.25")
    assert read(tmp_path / "b.jsonl") == rows[1:] and reasons(tmp_path / "b.jsonl") == {"too little Chinese": 1}


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_counts_and_shows(tmp_path, capsys):
    source = write_conversations(tmp_path / "a.jsonl", 30)
    source.write_bytes(source.read_bytes() + source.read_bytes().split(b"\n")[0] + b"\n{broken\n")
    prepare("inspect", source, "--rows", "2", "--max_seq_len", "32", "--picture", tmp_path / "a.svg")
    text = capsys.readouterr().out
    assert "32 rows, 31 of them conversation records" in text and "1 exact duplicates" in text and "broken JSON" in text
    assert text.count("--- ") == 2 and "⟦" in text and "  -100  " in text
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(("write", "kind"), [(write_texts, "pretrain"), (write_preferences, "preference")])
def test_inspect_agrees_with_the_token_cache(tmp_path, capsys, write, kind, tokenizer):
    from dataset.token_cache import open_token_cache

    source = write(tmp_path / "a.jsonl")
    prepare("inspect", source, workers=1)
    cache = open_token_cache(source, tokenizer, kind, cache_dir=tmp_path / "cache", show_progress=False)
    targets = cache.meta["tokens"] - cache.meta["documents"] if cache.mask is None else int(cache.mask.sum())
    assert (
        f"{cache.meta['tokens']:,} tokens in {cache.meta['documents']:,} documents, {targets:,} learned"
        in capsys.readouterr().out
    )


def test_inspect_counts_bytes_that_are_learned_and_tokens_beyond_a_row(tmp_path, capsys, tokenizer):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "not learned"}]
    sides = [[*prompt, {"role": "user", "content": "b"}, {"role": "assistant", "content": c}] for c in ("cd", "天")]
    source = write_jsonl(tmp_path / "a.jsonl", [dict(zip(("chosen", "rejected"), sides, strict=True))])
    prepare("inspect", source, "--max_seq_len", 20)
    documents = tokenize_records("preference", [sides], tokenizer)
    learned = sum(sum(mask) for _, mask in documents)
    tokens, beyond = (sum(len(ids) - n for ids, _ in documents) for n in (0, 21))
    text = capsys.readouterr().out
    assert f"{learned} learned, {5 / learned:.2f} bytes per learned token" in text
    assert f"2 documents (100.0%) are longer, {beyond:,} tokens ({beyond / tokens:.1%}) are beyond it" in text


# --- overlap ---------------------------------------------------------------------------------------------------------


def edited(rng: random.Random, text: str, share: float) -> str:
    """The text with about that share of its characters replaced, in a few places."""
    letters = list(text)
    for _ in range(int(len(text) * share)):
        letters[rng.randrange(len(letters))] = chr(rng.randrange(0x4E00, 0x9FA5))
    return "".join(letters)


def similarity(left: str, right: str) -> float:
    """The Jaccard similarity of the 5-character runs, counted one by one."""
    a, b = ({text[n : n + 5] for n in range(len(text) - 4)} for text in (left, right))
    return len(a & b) / len(a | b)


def random_text(rng: random.Random, length: int) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(length))


def test_dedup_keeps_the_first_and_ignores_width_case_and_marks(tmp_path):
    texts = ["Ａ cat，很小的猫！", "另一只猫，很大的一只", "a CAT 很小的猫", "另一只猫，很大的一只"]
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": texts[1]}, {"text": "第三只猫，不大也不小"}])
    prepare("dedup", a, b, "-o", tmp_path / "c.jsonl")
    assert [r["text"] for r in read(tmp_path / "c.jsonl")] == [*texts[:2], "第三只猫，不大也不小"]
    assert reasons(tmp_path / "c.jsonl") == {"exact duplicate": 3}
    assert (
        report(tmp_path / "c.jsonl")["dropped"]["exact duplicate"]["examples"][0]["detail"] == "of row 1 of all files"
    )


@pytest.mark.parametrize(
    "texts", [["x < 0", "x > 0"], ["3 - 4", "3 + 4"], ["15 米", "1.5 米"], ["C#", "c", "C++"], ["a != b", "a = b"]]
)
def test_a_symbol_makes_another_text(tmp_path, texts):
    rows = [{"text": text} for text in texts] + [{"a": "一二", "b": "三"}, {"a": "一", "b": "二三"}]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("dedup", source, "-o", tmp_path / "b.jsonl", "--near", "0")
    assert read(tmp_path / "b.jsonl") == rows


def test_blank_lines_are_nothing_to_compare(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n \n")
    assert "a.jsonl: nothing but blank" in error_of("dedup", tmp_path / "a.jsonl", "-o", tmp_path / "b.jsonl")


def test_near_duplicates_are_those_whose_runs_are_alike(tmp_path):
    """Against similarities counted one by one; near the bound the estimate may err: 120 minima, 3 to 4 % either way."""
    rng = random.Random(0)
    originals = [random_text(rng, rng.randrange(60, 400)) for _ in range(60)]
    copies = [edited(rng, text, rng.choice([0.003, 0.01, 0.03, 0.06, 0.2])) for text in originals for _ in range(4)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in originals + copies])
    prepare("dedup", source, "-o", tmp_path / "b.jsonl")
    kept = {record["text"] for record in read(tmp_path / "b.jsonl")}
    assert set(originals) <= kept
    likeness = {copy: similarity(copy, originals[n // 4]) for n, copy in enumerate(copies) if copy not in originals}
    near = [copy for copy, alike in likeness.items() if alike > 0.9]
    far = [copy for copy, alike in likeness.items() if alike < 0.5]
    assert len(near) > 40 and len(far) > 30
    assert not kept & set(near) and set(far) <= kept
    prepare("dedup", source, "-o", tmp_path / "c.jsonl", "--near", "0")
    assert len(read(tmp_path / "c.jsonl")) == len(set(originals + copies))


def test_held_out_rows_come_first_and_are_not_written(tmp_path):
    rng = random.Random(1)
    texts = [random_text(rng, 200) for _ in range(6)]
    held_out = write_jsonl(tmp_path / "valid.jsonl", [{"text": texts[0]}, {"text": edited(rng, texts[1], 0.005)}])
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    prepare("dedup", source, "-o", tmp_path / "b.jsonl", "--held_out", held_out)
    assert [r["text"] for r in read(tmp_path / "b.jsonl")] == texts[2:]
    assert reasons(tmp_path / "b.jsonl") == {"exact duplicate": 1, "near duplicate": 1}


def test_dedup_of_many_rows_in_slices_gives_the_same(tmp_path, monkeypatch):
    rng = random.Random(2)
    texts = [random_text(rng, 40) for _ in range(300)]
    rows = [{"text": rng.choice([text, edited(rng, text, 0.03)])} for text in rng.choices(texts, k=900)]
    source = write_jsonl(tmp_path / "a.jsonl", rows + [{"broken": 1}])
    source.write_bytes(source.read_bytes() + b"{oops\n")
    prepare("dedup", source, "-o", tmp_path / "b.jsonl")
    monkeypatch.setattr("scripts.prepare_overlap.SLICE_ROWS", 50)
    prepare("dedup", source, "-o", tmp_path / "c.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert reasons(tmp_path / "b.jsonl")["broken JSON"] == 1


QUESTION = "在农业生产中被当作极其重要的劳动对象发挥作用，最主要的不可替代的基本生产资料是"
ENGLISH = (
    "An astronomer observes that a planet rotates faster after a meteorite impact, which is the most likely effect?"
)


@pytest.fixture
def evaluation(tmp_path) -> Path:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "ceval.csv").write_text(
        f"id,question,A,B,C,D,answer\n0,短题,甲,乙,丙,丁,A\n1,{QUESTION},工具,土地,劳力,资金,B\n", "utf-8"
    )
    (folder / "cmmlu.csv").write_text(",Question,A,B,C,D,Answer\n0,另一题,甲,乙,丙,丁,A\n", "utf-8")
    write_jsonl(folder / "core.jsonl", [{"query": ENGLISH, "choices": ["a", "b"], "gold": 1}])
    return folder


def test_decontaminate_finds_shared_text_in_any_layout(tmp_path, evaluation, capsys):
    shared = [
        {"text": "题目：" + QUESTION.replace("，", "\n")[5:35] + "……"},  # other marks between the same letters
        {"conversations": [{"role": "user", "content": ENGLISH.upper()}, {"role": "assistant", "content": "Days."}]},
    ]
    clean = [{"text": QUESTION[:20] + "别的东西"}, {"text": "An astronomer observes that a planet rotates faster."}]
    source = write_jsonl(tmp_path / "a.jsonl", [shared[0], clean[0], shared[1], clean[1]])
    prepare("decontaminate", source, "-o", tmp_path / "b.jsonl", "--evaluation", evaluation)
    assert read(tmp_path / "b.jsonl") == clean
    assert "4 evaluation rows; 2 are too short" in capsys.readouterr().out
    details = [
        e["detail"] for e in report(tmp_path / "b.jsonl")["dropped"]["shares text with an evaluation"]["examples"]
    ]
    assert "ceval.csv:2: " in details[0] and "core.jsonl:1: an astronomer" in details[1]
    prepare("decontaminate", source, "-o", tmp_path / "c.jsonl", "--evaluation", evaluation, "--list_only")
    assert [found["row"] for found in read(tmp_path / "c.jsonl")] == shared


def test_decontaminate_says_when_nothing_can_be_found(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 2)
    evaluation = write_jsonl(tmp_path / "e.jsonl", [{"query": "短", "choices": ["甲"], "gold": 0}])
    command = ("decontaminate", source, "-o", tmp_path / "b.jsonl", "--evaluation", evaluation)
    assert "--characters" in error_of(*command)
    assert "--characters 30: from 1 to 24" in error_of(*command, "--characters", "30")
    assert "--words 40: from 1 to 24" in error_of(*command, "--words", "40")


# --- mix and join ----------------------------------------------------------------------------------------------------


def numbered(path: Path, count: int, name: str = "row") -> Path:
    return write_jsonl(path, [{"text": f"{name} {n}", "score": (n * 7919) % count - 5} for n in range(count)])


def test_mix_takes_each_input_so_many_times_and_shuffles_by_seed(tmp_path, monkeypatch):
    a, b, c = (numbered(tmp_path / f"{name}.jsonl", 400, name) for name in "abc")
    flags = ["--epochs", "1", "2", "0.5"]
    prepare("mix", a, b, c, "-o", tmp_path / "1.jsonl", *flags)
    monkeypatch.setattr("scripts.prepare_mix.RUN_CHARACTERS", 2000)  # many runs to merge
    prepare("mix", a, b, c, "-o", tmp_path / "2.jsonl", *flags)
    prepare("mix", a, b, c, "-o", tmp_path / "3.jsonl", *flags, "--seed", "1")
    first, other = read(tmp_path / "1.jsonl"), read(tmp_path / "3.jsonl")
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes() and first != other
    counts = Counter(record["text"] for record in first)
    assert all(counts[f"a {n}"] == 1 and counts[f"b {n}"] == 2 for n in range(400))
    assert 150 < sum(counts[f"c {n}"] for n in range(400)) < 250  # half of 400, five deviations of 10 either way
    assert sorted(map(str, other)) != sorted(map(str, first))  # another half
    where = [n for n, record in enumerate(first) if record["text"][0] == "a"]
    assert 0.45 < sum(where) / len(where) / len(first) < 0.55


def test_mix_by_weights_and_rows(tmp_path):
    a, b = numbered(tmp_path / "a.jsonl", 1000, "a"), numbered(tmp_path / "b.jsonl", 100, "b")
    prepare("mix", a, b, "-o", tmp_path / "c.jsonl", "--weights", "3", "1")
    names = Counter(record["text"][0] for record in read(tmp_path / "c.jsonl"))
    assert names["b"] == 100 and 240 < names["a"] < 360  # 300 expected, four deviations of 14.5
    prepare("mix", a, b, "-o", tmp_path / "d.jsonl", "--weights", "3", "1", "--rows", "4000")
    assert Counter(record["text"][0] for record in read(tmp_path / "d.jsonl")) == {"a": 3000, "b": 1000}


def test_mix_opens_few_files_however_often_the_rows_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.prepare_mix.RUN_CHARACTERS", 500)
    monkeypatch.setattr("scripts.prepare_mix.RUNS", 4)
    opened, plain = [], open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(str(a[0])) or plain(*a, **k))
    prepare("mix", numbered(tmp_path / "a.jsonl", 100), "-o", tmp_path / "b.jsonl", "--epochs", "300")
    assert len(read(tmp_path / "b.jsonl")) == 30_000
    assert 8 < len({path for path in opened if "/run" in path}) < 40  # 800,000 characters, and runs that double


@pytest.mark.parametrize("order", ["length", "score"])
def test_mix_in_order_of_a_measure(tmp_path, order):
    source = numbered(tmp_path / "a.jsonl", 1200)
    measure = (lambda r: len(r["text"])) if order == "length" else lambda r: r["score"]
    for flags, sign in (([], 1), (["--descending"], -1)):
        prepare("mix", source, "-o", tmp_path / "b.jsonl", "--order", order, "--overwrite", *flags)
        measures = [sign * measure(record) for record in read(tmp_path / "b.jsonl")]
        assert len(measures) == 1200 and measures == sorted(measures)
    assert "no number named 'quality'" in error_of("mix", source, "-o", tmp_path / "c.jsonl", "--order", "quality")


def test_held_out_rows_are_in_one_file_only_with_all_their_copies(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n % 500}"} for n in range(1000)])
    valid = tmp_path / "valid.jsonl"
    prepare("mix", source, "-o", tmp_path / "b.jsonl", "--held_out", "100", "--held_out_output", valid, "--epochs", "2")
    held_out, rest = [r["text"] for r in read(valid)], [r["text"] for r in read(tmp_path / "b.jsonl")]
    assert 50 <= len(held_out) <= 100 and len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(rest) and len(rest) == 4 * (500 - len(held_out))


def test_some_conversations_get_a_system_turn_and_some_lose_an_empty_thought(tmp_path):
    empty = "<think>\n\n</think>\n\n"
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": empty + "答"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns, "n": n} for n in range(1000)])
    flags = ["--random_system", "0.2", "--drop_empty_think", "0.8"]
    prepare("mix", source, "-o", tmp_path / "b.jsonl", *flags)
    records = read(tmp_path / "b.jsonl")
    opened = [r for r in records if r["conversations"][0]["role"] == "system"]
    thoughtless = [r for r in records if r["conversations"][-1]["content"] == "答"]
    assert 140 < len(opened) < 260 and 740 < len(thoughtless) < 860  # five deviations of 12.6
    changed = {name: entry["rows"] for name, entry in report(tmp_path / "b.jsonl")["changed"].items()}
    assert changed == {"random system turn": len(opened), "empty <think> block taken out": len(thoughtless)}
    prepare("mix", source, "-o", tmp_path / "c.jsonl", *flags)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


def test_contrast_keeps_what_looks_like_an_identity_and_nothing_that_contradicts(tmp_path):
    def conversation(question: str) -> dict:
        return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": "…"}]}

    parts = [conversation("You are a historian. " + "Explain. " * 40), conversation("请扮演一位老师")]
    near = [conversation(f"你好，{number}") for number in range(200)]
    rest = [conversation(f"Sum of {number} and 2") for number in range(200)]
    long = [conversation("Sum of 2 and 2. " * 10)]
    about = [conversation("你是谁"), conversation("What can you do?"), conversation("What is your name?")]
    source = write_jsonl(tmp_path / "a.jsonl", parts + near + rest + long + about)
    prepare("contrast", source, "-o", tmp_path / "b.jsonl", "--alike", 0.5, "--others", 0.1)
    chosen = read(tmp_path / "b.jsonl")
    assert all(record in chosen for record in parts)
    assert not any(record in chosen for record in about + long)
    # within four standard deviations of the shares
    assert 72 <= sum(record in chosen for record in near) <= 128
    assert 3 <= sum(record in chosen for record in rest) <= 37
    prepare("contrast", source, "-o", tmp_path / "c.jsonl", "--alike", 0.5, "--others", 0.1)
    assert read(tmp_path / "c.jsonl") == chosen


def test_join_makes_texts_as_the_published_file_has_them(tmp_path):
    def chat(*contents: str) -> dict:
        roles = ["user", "assistant"] * len(contents)
        return {"conversations": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}

    rows = [
        chat("问一", "答一"),
        chat("问二", "答二", "问三", "答三"),
        chat("问四", "长" * 40),
        chat("太长", "长" * 99),
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    prepare("join", source, "-o", tmp_path / "b.jsonl", "--max_chars", "50")
    texts = [record["text"] for record in read(tmp_path / "b.jsonl")]
    turn = "<|im_start|>{}<|im_end|>".format
    assert texts == [
        " ".join(map(turn, ["问一", "答一", "问二", "答二", "问三", "答三"])),
        f"{turn('问四')} {turn('长' * 40)}",
    ]
    assert reasons(tmp_path / "b.jsonl") == {"longer than a text may be": 1}
    prepare("join", source, "-o", tmp_path / "c.jsonl", "--max_chars", "61", "--plain")
    assert [r["text"] for r in read(tmp_path / "c.jsonl")] == ["问一\n答一\n问二\n答二\n问三\n答三\n问四\n" + "长" * 40]


# --- whole runs ------------------------------------------------------------------------------------------------------


def raw_of(kind: str, rng: random.Random) -> list[dict]:
    """Rows of a raw source of each kind, as good as they can be."""
    texts = [f"这是第{n}个回答，" + random_text(rng, 60) + "。" for n in range(80)]
    asked = [f"第{n}个问题，{random_text(rng, 12)}？" for n in range(80)]
    if kind == "dpo":
        return [{"prompt": q, "chosen": a, "rejected": a[::-1]} for q, a in zip(asked, texts, strict=True)]
    if kind == "reason":
        return [{"input": q, "reasoning_content": a, "content": a[9:]} for q, a in zip(asked, texts, strict=True)]
    return [{"instruction": q, "input": "", "output": a, "history": []} for q, a in zip(asked, texts, strict=True)]


@pytest.mark.parametrize("name", prepare_data.RECIPES)
def test_every_recipe_makes_a_file_that_trains(tmp_path, capsys, tokenizer, name, evaluation):
    from dataset.token_cache import open_token_cache

    rows = raw_of(name, random.Random(3))
    source = write_as(tmp_path / "raw.json", [*rows, *rows[:20]])
    output = tmp_path / "made" / f"{name}.jsonl"
    flags = ["--evaluation", evaluation] if name == "sft_512" else []
    prepare("recipe", source, "-o", output, "--name", name, *flags)
    kind = {"pretrain": "pretrain", "dpo": "preference"}.get(name, "conversation")
    cache = open_token_cache(output, tokenizer, kind, cache_dir=tmp_path / "cache", show_progress=False)
    contents = output.read_text("utf-8")
    assert cache.meta["skipped_lines"] == 0 and all(contents.count(f"第{n}个问题") >= 1 for n in range(80))
    assert len(read(output)) == 80 or name == "pretrain"
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python scripts/prepare_data.py")]
    steps = len(prepare_data.RECIPES[name].split(" | ")) + bool(flags)
    assert len(shown) == steps == len(list(output.parent.glob("*.report.json")))
    assert [path.name for path in output.parent.glob("*.jsonl")] == [output.name]


def test_a_recipe_passes_on_encoding_and_held_out_files(tmp_path):
    rows = raw_of("sft_512", random.Random(3))
    source = tmp_path / "raw.jsonl"
    source.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("gb18030"))
    turns = [{"role": "user", "content": rows[7]["input"] or rows[7]["instruction"]}]
    turns += [{"role": "assistant", "content": rows[7]["output"]}]
    held_out = write_jsonl(tmp_path / "valid.jsonl", [{"conversations": turns}])
    prepare("recipe", source, "-o", tmp_path / "b.jsonl", "--encoding", "gb18030", "--held_out", held_out)
    made = read(tmp_path / "b.jsonl")
    assert len(made) == 79 and {"conversations": turns} not in made


def written(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed or removed meanwhile
        return 0


KILLS = [pytest.param(command, 4, id=command, marks=pytest.mark.full) for command in ("clean", "mix", "recipe")]


@pytest.mark.parametrize(("command", "kills"), [pytest.param("dedup", 1, id="dedup"), *KILLS])
def test_a_killed_run_leaves_no_half_file_and_its_processes_end(tmp_path, command, kills):
    """Killed after some bytes and started again: the same bytes as uninterrupted, and no worker left."""
    rng = random.Random(4)
    rows = [
        {"conversations": [*CHAT[:1], {"role": "assistant", "content": random_text(rng, 150)}]} for _ in range(1500)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": CHAT[:1]}, *rows, *rows[:300]])
    whole, again = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    prepare(command, source, "-o", whole, workers=2)
    start = [sys.executable, SCRIPT, command, source, "-o", again, "--quiet", "--workers=2"]
    for _ in range(kills):
        process, enough = subprocess.Popen(list(map(str, start)), stdout=subprocess.DEVNULL), rng.randrange(400_000)
        while process.poll() is None:
            if sum(written(path) for path in tmp_path.glob("again*/*")) > enough:
                break
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        assert not psutil.wait_procs(children, timeout=60)[1]
        assert not again.exists() or again.read_bytes() == whole.read_bytes()
    subprocess.run([*map(str, start), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
    assert again.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("again*") if "report" not in path.name) == ["again.jsonl"]


def test_two_runs_on_one_output_do_not_mix(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 5)
    (tmp_path / "b.jsonl.unfinished").mkdir()
    with FileLock(tmp_path / "b.jsonl.unfinished" / "lock"):
        assert "another run is writing" in error_of("clean", source, "-o", tmp_path / "b.jsonl")
    prepare("clean", source, "-o", tmp_path / "b.jsonl")
