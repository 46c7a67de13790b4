"""From raw files to records: layouts, rules, reports, and what a broken input says."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_conversations, write_jsonl, write_preferences, write_texts

from scripts import prepare_data

SCRIPT = ROOT / "scripts" / "prepare_data.py"
CHAT = [{"role": "user", "content": "山有多高？"}, {"role": "assistant", "content": "三千米。"}]


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
    assert reasons(tmp_path / "made.jsonl") == {"no thought before the answer": 1}


def test_gsm8k_becomes_problems_with_a_bare_answer(tmp_path):
    row = {"question": "How many?", "answer": "He has 1200.<<1200+34=1234>>\nSo 1234.\n#### 1,234"}
    expected = {"conversations": [{"role": "user", "content": "How many?"}], "answer": "1234"}
    assert converted(tmp_path, [row], "--to", "problem") == [expected]
    assert converted(tmp_path, [expected], "--to", "problem") == [expected]
    [numeric] = converted(tmp_path, [{"problem": "How many?", "answer": 7}], "--to", "problem")
    assert numeric["answer"] == "7"


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
    assert found["no known layout"] == found["not a JSON object"] == found["history is not a list of pairs"] == 1
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
        import pyarrow
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
        import zstandard

        data = zstandard.compress(data)
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


def test_several_inputs_one_output_and_any_number_of_processes(tmp_path):
    a, b = write_texts(tmp_path / "a.jsonl", 3000, seed=1), write_texts(tmp_path / "b.jsonl", 3000, seed=2)
    a.write_bytes(a.read_bytes() * 20)  # several blocks
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


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl.gz", b'{"text": "plain"}\n', "not a gzip file"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "cut short"}\n' * 9000)[:-300], "damaged"),
        ("a.jsonl.zst", b'{"text": "plain"}\n', "not a whole zstd file"),
        ("a.parquet", b"PAR1 no table", "not a readable parquet file"),
        ("a.json", b'[{"text": "one"}, {"text": ', "broken after item 1"),
        ("a.json", b'[{"text": "one"} oops]', "broken after item 1"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"x": 1}\n', "no known layout (keys here: x)"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    message = error_of("convert", tmp_path / name, "-o", tmp_path / "made.jsonl")
    assert said in message and str(tmp_path / name) in message or said.startswith("no known")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_inputs_say_what_is_there(tmp_path):
    write_texts(tmp_path / "other.jsonl", 2)
    assert "other.jsonl" in error_of("clean", tmp_path / "a.jsonl", "-o", tmp_path / "b.jsonl")
    (tmp_path / "empty").mkdir()
    assert "holds no" in error_of("clean", tmp_path / "empty", "-o", tmp_path / "b.jsonl")


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


def test_a_question_without_answer_at_the_end_goes_and_the_rest_stays(tmp_path):
    turns = [{"role": "user", "content": "介绍一下这座山"}, {"role": "assistant", "content": LONG}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"conversations": [*turns, {"role": "user", "content": "还有吗"}]}])
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
    assert (tmp_path / "a.svg").read_text("utf-8").startswith("<svg")


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
