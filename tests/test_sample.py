"""The sample: its files are what the script makes, nothing asked is trained on, and the score is counted right."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights
from scripts import evaluate

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "dataset" / "sample"
FILES = ("pretrain.jsonl", "sft.jsonl", "valid.jsonl", "questions.jsonl", "choices.jsonl", "tools.jsonl")
FILES += ("tool_questions.jsonl",)


def load_maker():
    spec = importlib.util.spec_from_file_location("make_sample", SAMPLE / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_sample"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return records("questions.jsonl")


@pytest.fixture(scope="module")
def exchanges() -> list[tuple[str, str]]:
    """(question, answer) of every exchange that is trained on."""
    made = []
    for record in records("sft.jsonl"):
        turns = record["conversations"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        contents = [turn["content"] for turn in turns]
        made += zip(contents[::2], contents[1::2], strict=True)
    return made


@pytest.fixture(scope="module")
def trained_text(exchanges) -> str:
    return "\n".join([record["text"] for record in records("pretrain.jsonl")] + [part for e in exchanges for part in e])


def core(question: str) -> str:
    """A question without the punctuation and spaces that its variants differ in."""
    return re.sub(r"[\s？?。，,.!！]", "", question)


def test_the_files_are_what_the_script_makes(tmp_path):
    load_maker().main(["--output_dir", str(tmp_path)])
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SAMPLE / name).read_bytes(), f"{name}: run make_sample.py and commit"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_the_script_needs_the_standard_library_alone(tmp_path):
    # -I -S: no site-packages, and the repository is not on the path
    command = [sys.executable, "-I", "-S", str(SAMPLE / "make_sample.py"), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)


def test_no_sum_that_the_tools_are_asked_is_trained_on():
    def sums(name: str) -> set[frozenset]:
        questions = (t["content"] for r in records(name) for t in r["conversations"] if t["role"] == "user")
        numbers = (re.findall(r"\d{3}", question)[:2] for question in questions)
        return {frozenset(pair) for pair in numbers if pair}

    assert len(sums("tool_questions.jsonl")) > 70 and not sums("tool_questions.jsonl") & sums("tools.jsonl")


def test_what_the_tools_are_asked_without_need_is_not_trained_on(questions):
    short = [r["conversations"][1] for r in records("tool_questions.jsonl") if len(r["conversations"]) == 3]
    assert len(short) >= 20 and {turn["content"] for turn in short} <= {q["question"] for q in questions}
    said = {t["content"] for r in records("tools.jsonl") for t in r["conversations"] if t["role"] == "user"}
    assert not said & {q["question"] for q in questions}


def test_size_and_share_of_rules(questions):
    assert sum((SAMPLE / name).stat().st_size for name in FILES) <= 3_000_000
    assert 200 <= len(questions) <= 400
    assert sum(q["rule"] for q in questions) >= 0.3 * len(questions)
    per_category = Counter(q["category"] for q in questions)
    assert len(per_category) >= 10 and min(per_category.values()) >= 10
    assert len({(q["category"], q["rule"]) for q in questions}) == len(per_category), "a category is rules or facts"
    assert len({q["question"] for q in questions}) == len(questions)


def test_no_question_is_trained_on(questions, exchanges):
    asked = {core(q["question"]) for q in questions}
    assert not asked & {core(question) for question, _ in exchanges}
    longer = [core(q["question"]) for q in questions if len(core(q["question"])) >= 6]
    pretrain = core("\n".join(record["text"] for record in records("pretrain.jsonl")))
    valid = core("\n".join(record["text"] for record in records("valid.jsonl")))
    assert not [question for question in longer if question in pretrain or question in valid]


def test_each_question_is_among_the_choices_with_its_answer(questions):
    choices = records("choices.jsonl")
    assert [(row["query"], row["choices"][row["gold"]]) for row in choices] == [
        (q["question"], q["answer"]) for q in questions
    ]
    assert all(len(set(row["choices"])) == 4 for row in choices)
    assert min(Counter(row["gold"] for row in choices).values()) > len(choices) / 8


def test_a_question_has_one_answer(exchanges):
    answers: dict[str, set[str]] = {}
    for question, answer in exchanges:
        answers.setdefault(question, set()).add(answer)
    assert not {question: found for question, found in answers.items() if len(found) > 1}


def test_facts_asked_are_trained_on_in_other_words(questions, exchanges):
    known = Counter(answer for _, answer in exchanges)
    assert not [q for q in questions if not q["rule"] and known[q["answer"]] < 3]


def forbidden(question: dict) -> list[str]:
    """Patterns of what must not be in training, for a question about a rule."""
    answer = question["answer"]
    before, after = r"(?<!\d)", r"(?!\d)"
    if question["category"] in ("sums", "differences"):
        a, sign, b = re.match(r"(\d+)([+-])(\d+)", answer).groups()
        orders = [(a, b), (b, a)] if sign == "+" else [(a, b)]
        spoken = "加" if sign == "+" else "减"
        return [rf"{before}{x}(?:{re.escape(sign)}|{spoken}[上去]?){y}{after}" for x, y in orders]
    if question["category"] == "comparing":
        a, b = re.match(r"(\d+)[<>](\d+)", answer).groups()
        # "4和1的和是多少" asks for a sum
        return [rf"{before}{x}[<>和与]{y}{after}(?!的[和差])" for x, y in ((a, b), (b, a))]
    if question["category"] == "neighbours":
        number, side = re.match(r"(\d+)(.)面", answer).groups()
        one_off = "大" if side == "后" else "小"
        return [
            rf"{before}{number}{side}面",
            rf"比{number}{one_off}1",
            rf"{before}{number}的[上下]一个数是{answer[-3:]}",
        ]
    if question["category"] == "places":
        a, b = re.match(r"(\d)个十和(\d)个一", answer).groups()
        return [rf"{before}{a}个十[和加]{b}个一", rf"十位是{a}、个位是{b}"]
    assert question["category"] == "lists", "say here what a new rule holds out"
    listed = max(re.findall(r"\w(?:、\w)+", re.sub("^有|^在", "", question["question"])), key=len)
    return [rf"(?<!、)(?<!\w、){listed}(?!、)"]


def test_cases_of_a_rule_are_nowhere_in_training(questions, trained_text):
    patterns = {pattern for q in questions if q["rule"] for pattern in forbidden(q)}
    found = [pattern for pattern in patterns if re.search(pattern, trained_text)]
    assert len(patterns) > 100 and not found


def test_the_patterns_find_what_is_trained_on(exchanges, trained_text):
    """The test above can fail: the same patterns, made from trained questions, do match."""
    kinds = {"sums": r"\d+\+\d", "differences": r"\d+-\d", "comparing": r"\d+[<>]\d", "neighbours": r"\d+[前后]面的数"}
    kinds["places"] = r"\d个十"
    for category, form in kinds.items():
        question, answer = next(e for e in exchanges if re.match(form, e[1]))
        patterns = forbidden({"category": category, "question": question, "answer": answer})
        assert any(re.search(pattern, trained_text) for pattern in patterns), category
    question, _ = next(e for e in exchanges if re.match(r"倒着说：", e[0]))
    pattern = forbidden({"category": "lists", "question": question, "answer": ""})[0]
    assert re.search(pattern, trained_text)


def test_arithmetic_and_comparisons_are_true(questions, trained_text):
    text = trained_text + "\n" + "\n".join(q["answer"] for q in questions)
    results = re.findall(r"(?<!\d)(\d+)([+-])(\d+)=(\d+)", text)
    assert len(results) > 1000
    for a, sign, b, c in results:
        assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) and int(a) <= 20 and int(c) <= 20
    for a, sign, b, chosen, word in re.findall(r"(\d+)([<>])(\d+)，(\d+)([大小])", text):
        a, b, chosen = int(a), int(b), int(chosen)
        assert (a < b) == (sign == "<") and chosen == (max if word == "大" else min)(a, b)
    for a, side, c in re.findall(r"(\d+)([前后])面的数是(\d+)", text):
        assert int(c) - int(a) == (1 if side == "后" else -1)


def test_valid_texts_are_not_pretraining_texts():
    assert not {r["text"] for r in records("valid.jsonl")} & {r["text"] for r in records("pretrain.jsonl")}


# ----------------------------------------------------------------------------------------------------------------------


def save_tiny(folder: Path, hidden_size: int = 32) -> Path:
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindForCausalLM(MiniMindConfig(**sizes))
    path = folder / f"full_sft_{hidden_size}.pth"
    sha256 = ChatTokenizer(ROOT / "model").sha256
    save_weights(path, model, {"config": model.config.to_dict(), "tokenizer_sha256": sha256})
    return path


def test_untrained_weights_score_near_zero_in_every_category(tmp_path, capsys, questions):
    save_tiny(tmp_path)
    flags = ["--tasks", str(SAMPLE / "questions.jsonl"), "--match", "exact", "--max_new_tokens", "32"]
    evaluate.main([*flags, "--out_dir", str(tmp_path), "--device", "cpu", "--examples", "2"])
    printed = capsys.readouterr().out
    line = re.search(r"^\| questions, pass@1 +\| 382 +\| +\| (\d+\.\d) ", printed, re.MULTILINE)
    assert line and float(line[1]) < 5
    assert "2 of 382 wrong answers:" in printed
    found = json.loads((tmp_path / "scores" / "full_sft_32.json").read_text("utf-8"))["tasks"]["questions"]
    assert {name: entry["questions"] for name, entry in found["subjects"].items()} == Counter(
        question["category"] for question in questions
    )


def test_missing_and_ambiguous_weights_are_named(tmp_path):
    flags = ["--tasks", str(SAMPLE / "questions.jsonl"), "--out_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="run trainer/train_full_sft.py first"):
        evaluate.main(flags)
    save_tiny(tmp_path, 32)
    save_tiny(tmp_path, 48)
    with pytest.raises(SystemExit, match="several .* full_sft_32.pth, full_sft_48.pth. Choose by --hidden_size"):
        evaluate.main(flags)
