"""The training script of the tokenizer, run as people run it, on a corpus of a few kilobytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.tokenization import ChatTokenizer
from scripts import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/train_tokenizer.py"
SENTENCES = [
    "我们今天学习自然语言处理的基本方法。",
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n",
    "<|im_start|>你好吗？<|im_end|> <|im_start|>我很好，谢谢。<|im_end|>",
]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path):
    """Three files, one for each kind of record."""
    turns = [{"role": "user", "content": SENTENCES[0]}, {"role": "assistant", "content": SENTENCES[1]}]
    return [
        write_jsonl(tmp_path / "text.jsonl", [{"text": f"{i} {SENTENCES[i % 4]}"} for i in range(120)]),
        write_jsonl(tmp_path / "chat.jsonl", [{"conversations": turns}] * 5),
        write_jsonl(tmp_path / "dpo.jsonl", [{"chosen": turns, "rejected": [turns[0], {"content": "不知道"}]}] * 5),
    ]


def run(*arguments, cwd=ROOT):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_twice_the_same_bytes_and_a_report(corpus, tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    for output in outputs:
        done = run("--data_path", *corpus, "--vocab_size", 330, "--output_dir", output.name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()
    assert sorted(os.listdir(outputs[0])) == ["tokenizer.json", "tokenizer_config.json"]  # nothing temporary is left
    for expected in ("held-out text", "Chinese", "English", "code", "17 Unicode planes", "<think> [3]", "y 330"):
        assert expected in done.stdout
    tokenizer = ChatTokenizer(outputs[0])
    assert tokenizer.vocab_size == 330
    assert tokenizer.encode_contents(["".join(train_tokenizer.TAGS)]) == [list(range(3, 11))]
    vocab = json.loads((outputs[0] / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert not any("star" in token for token in vocab if vocab[token] > 10)  # nothing is learned from control strings


def test_the_config_in_model_is_what_the_script_writes():
    for folder in ("model", "model/tokenizer_v1"):
        assert (ROOT / folder / "tokenizer_config.json").read_text("utf-8") == train_tokenizer.tokenizer_config()


@pytest.mark.parametrize("folder", [ROOT / "model", "model", "../model"])
def test_the_tokenizer_in_model_is_not_replaced_without_force(corpus, folder, monkeypatch):
    monkeypatch.chdir(ROOT / "scripts" if folder == "../model" else ROOT)
    monkeypatch.setattr(train_tokenizer, "write_atomically", lambda *_: pytest.fail("would have been replaced"))
    with pytest.raises(SystemExit, match="--force"):
        train_tokenizer.main(["--data_path", str(corpus[0]), "--vocab_size", "300", "--output_dir", str(folder)])


def test_another_runs_tokenizer_is_not_replaced_without_force(corpus, tmp_path):
    arguments = ["--data_path", str(corpus[0]), "--vocab_size", "300", "--output_dir", str(tmp_path)]
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(SystemExit, match="--force"):
        train_tokenizer.main(arguments)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    train_tokenizer.main([*arguments, "--force"])
    assert ChatTokenizer(tmp_path).vocab_size == 300


def test_force_allows_it_and_the_default_is_another_folder(corpus):
    parse = train_tokenizer.parse_arguments
    data = ["--data_path", str(corpus[0])]
    assert parse([*data, "--output_dir", str(ROOT / "model"), "--force"]).output_dir == ROOT / "model"
    assert parse(data).output_dir == ROOT / "out/tokenizer"


def test_mistakes_are_reported_together_and_as_a_line(tmp_path):
    done = run("--data_path", tmp_path / "none.jsonl", "--vocab_size", 100, "--max_train_mb", 0)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for expected in ("none.jsonl not found", "--data_path", "--vocab_size 100", "--max_train_mb 0"):
        assert expected in done.stderr


def test_too_little_data_is_an_error_that_says_how_many_ids_it_yields(corpus, tmp_path):
    with pytest.raises(SystemExit, match=r"yields (\d+) ids.*--vocab_size \1 "):
        train_tokenizer.main(["--data_path", str(corpus[0]), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


BAD_LINES = ["{", "[]", '{"txt": "a"}', '{"text": 1}', '{"conversations": "a"}', '{"chosen": [{}]}']


@pytest.mark.parametrize("line", [*BAD_LINES, '{"text": "\\ud800"}'])
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line, "utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl:3: "):
        list(train_tokenizer.read_records([path]))


def test_bad_lines_can_be_dropped_and_a_byte_order_mark_is_no_text(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    deep = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path.write_text("\ufeff" + "\n".join(['{"text": "a"}', deep, "{", '\ufeff{"text": "b"}']), "utf-8")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: .*--skip_bad_lines"):
        list(train_tokenizer.read_records([path]))
    assert list(train_tokenizer.read_records([path], skip_bad_lines=True)) == [["a"], ["b"]]
    assert "dropped 2 bad lines, the first: " in capsys.readouterr().out


def test_other_encodings_and_an_output_dir_that_cannot_be_written_are_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "train", lambda *_: pytest.fail("trained"))
    text = json.dumps({"text": SENTENCES[0] * 9}, ensure_ascii=False)
    (tmp_path / "gbk.jsonl").write_text(text, "gbk")
    with pytest.raises(SystemExit, match="gbk.jsonl is not UTF-8; it looks like gb18030"):
        train_tokenizer.main(["--data_path", str(tmp_path / "gbk.jsonl")])
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="cannot write the tokenizer in .*file.*--output_dir"):
        train_tokenizer.main(["--data_path", str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path / "file" / "x")])


def test_turns_may_hold_parts_calls_and_thoughts():
    call = {"name": "clock", "arguments": {}}
    turns = [
        {"role": "human", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "gpt", "content": None, "reasoning_content": "c", "tool_calls": [call]},
    ]
    assert train_tokenizer.texts_of({"conversations": turns}) == ["a\nb", "c"]


def test_larger_data_is_thinned_out_evenly(corpus):
    assert len(list(train_tokenizer.read_records(corpus[:1]))) == 120
    quarter = [texts[0].split()[0] for texts in train_tokenizer.read_records(corpus[:1], share=0.25)]
    assert quarter == [str(i) for i in range(3, 120, 4)]


def test_held_out_text_is_told_apart():
    text = "他们在学习 Python。\n\n1. 第一\nIt was late; nobody came.\n42\nfor i in range(3):\n    x = f(i)\n"
    passages = train_tokenizer.split_by_kind(text)
    assert [kind for kind, _ in passages] == ["Chinese", "English", "code"]
    assert "".join(passage for _, passage in passages) == text


def test_records_held_out_for_the_report_are_not_trained_on(tmp_path, capsys):
    texts = [SENTENCES[0] if i % 50 else "zebra zebra" for i in range(1, 201)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    train_tokenizer.main(["--data_path", str(path), "--vocab_size", "270", "--output_dir", str(tmp_path / "out")])
    assert "zebra" not in (tmp_path / "out/tokenizer.json").read_text("utf-8")
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["English"] == str(4 * len("zebra zebra")) and rows["Chinese"] == "none"
