"""The whole walk on raw files with planted junk: what was planted is gone, what was good stays, rule by rule."""

import csv
import gzip
import json
import random
from collections import Counter
from pathlib import Path

from conftest import write_jsonl

from scripts import prepare_data

SYMBOLS = "★☆◆※→~!@#%^&*|<>?/\\+=-"
REFUSALS = ("很抱歉，我无法回答这个问题。{}", "作为一个人工智能语言模型，我不能提供这方面的内容。{}")
NAMES = (
    "我是由OpenAI训练的ChatGPT。{}",
    "我叫通义千问，是阿里云研发的大语言模型。{}",
    "I am Claude, made by Anthropic. {}",
)
PERSONAL = (
    ("打13812345678找我", "打[phone]找我"),
    ("写信到 li.si@mail.example.cn 即可", "写信到 [mail] 即可"),
    ("证件11010519491231002X已登记", "证件[id]已登记"),
    ("见 https://a.example/b?c=1 这一页", "见 [url] 这一页"),
)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def prepare(command: str, *arguments) -> dict:
    """Run a command; return its report."""
    output = arguments[arguments.index("-o") + 1]
    prepare_data.main([command, *map(str, arguments), "--quiet", "--workers=1"])
    return json.loads(Path(f"{output}.report.json").read_text("utf-8"))


def chat(*contents: str) -> dict:
    """A conversation of these turns, the user's first."""
    roles = ("user", "assistant") * len(contents)
    return {"conversations": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


def junk_of(rng: random.Random, question: str, answer: str, others: list[str]) -> dict[str, dict]:
    """One bad row for each rule of clean, made of a good one."""
    cut = answer[: rng.randrange(len(answer) // 3, len(answer) - 2)]
    marks = "".join(rng.choices(SYMBOLS, k=len(answer) * 2))
    return {
        "too short": chat("嗯", rng.choice("好行是对") + rng.choice("的呢啊")),
        "too long": chat(question, "\n".join(rng.sample(others, 40))),
        "mojibake": chat(question, answer.encode().decode(rng.choice(["gbk", "latin-1"]), "replace")),
        "symbol noise": chat(question, marks),
        "too little Chinese": chat(question, " ".join(rng.choices("the river runs past our old town".split(), k=40))),
        "repeated lines": chat(question, f"{answer}\n" * 4),
        "repeated n-grams": chat(question, rng.choice(others)[:14] * 12),
        "broken markup": chat(question, f'<div class="x">{answer}&nbsp;'),
        "answer cut in the middle": chat(question, cut.rstrip("。！？!?….\n ")),
        "refusal": chat(question, rng.choice(REFUSALS).format(answer)),
        "another model's name": chat(question, rng.choice(NAMES).format(answer)),
        "answer repeats the question": chat(question, question),
    }


def edited(rng: random.Random, record: dict) -> dict:
    """Nearly the same row: every hundredth character is another."""
    turns = [dict(turn) for turn in record["conversations"]]
    letters = list(turns[-1]["content"])
    for _ in range(max(len(letters) // 100, 1)):
        letters[rng.randrange(len(letters))] = "某"
    return {"conversations": [*turns[:-1], turns[-1] | {"content": "".join(letters)}]}


def write_raw(folder: Path, records: list[dict]) -> None:
    """The rows in three layouts: ShareGPT as a JSON array, Alpaca as csv, messages as compressed jsonl."""
    folder.mkdir()
    parts = [[], [], []]
    for number, record in enumerate(records):
        turns = record["conversations"]
        parts[number % 3 if len(turns) == 2 else 2 * (number % 2)].append(turns)
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in ts]} for ts in parts[0]]
    (folder / "sharegpt.json").write_text(json.dumps(shared, ensure_ascii=False), "utf-8")
    with open(folder / "alpaca.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["instruction", "input", "output"], *([q["content"], "", a["content"]] for q, a in parts[1])])
    lines = "".join(json.dumps({"messages": turns}) + "\n" for turns in parts[2])
    (folder / "messages.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def walk(folder: Path, good: list[dict], evaluation: Path, questions: list[str], seed: int = 0) -> dict[str, tuple]:
    """Take good rows apart into raw files, plant junk, run the commands.

    Return for each rule: (rows planted, planted rows that are gone, good rows that it dropped).
    """
    rng = random.Random(seed)
    others = [record["conversations"][-1]["content"] for record in good]
    planted = {}
    for record in good:
        question, answer = (turn["content"] for turn in record["conversations"][-2:])
        if len(answer) >= 60:
            rows = junk_of(rng, question, answer, others)
            name = rng.choice(list(rows))
            planted.setdefault(name, []).append(rows[name])
    copies = rng.sample(good, len(good) // 20)
    planted["exact duplicate"] = copies
    alike = [record for record in rng.sample(good, len(good) // 20) if len(str(record)) > 300]
    planted["near duplicate"] = [edited(rng, record) for record in alike]
    shared = [chat(f"请回答：{question}", rng.choice(others)) for question in questions]
    planted["shares text with an evaluation"] = shared
    personal = [
        chat(f"{r['conversations'][-2]['content']}{rng.choice(PERSONAL)[0]}", "好的，都记下来了。") for r in copies
    ]
    everything = [*good, *personal, *(row for rows in planted.values() for row in rows)]
    start = len(good)  # a duplicate comes after what it repeats
    rest = everything[start:]
    rng.shuffle(rest)
    dropped = {}
    for name, rows in (("good", good), ("all", good + rest)):
        raw, outputs = folder / name, [folder / f"{name}{n}.jsonl" for n in range(4)]
        write_raw(raw, rows)
        reports = [
            prepare("convert", raw, "-o", outputs[0], "--to", "conversation"),
            prepare("clean", outputs[0], "-o", outputs[1], "--max_chars", 2000, "--min_chinese", 0.3),
            prepare("dedup", outputs[1], "-o", outputs[2]),
            prepare("decontaminate", outputs[2], "-o", outputs[3], "--evaluation", evaluation),
        ]
        dropped[name] = {reason: found["rows"] for r in reports for reason, found in r["dropped"].items()}
        assert reports[0]["rows_out"] == len(rows)
        for before, after in zip(reports, reports[1:], strict=False):
            assert before["rows_out"] == after["rows_in"]
    kept = Counter(json.dumps(record, ensure_ascii=False) for record in read(outputs[3]))
    whole = [json.dumps(record, ensure_ascii=False) for record in read(folder / "good3.jsonl")]
    assert len(set(whole) - kept.keys()) <= len(planted["near duplicate"])  # one of two that are alike stays
    left = "\n".join(kept)
    for secret, mask in PERSONAL:
        assert secret not in left and (mask in left) == any(secret in str(record) for record in personal)
    found = {}
    for name, rows in planted.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        twins = [json.dumps(row, ensure_ascii=False) for row in alike] if name == "near duplicate" else lines
        most = 1 if name == "exact duplicate" else 0
        stayed = [line for line, twin in zip(lines, twins, strict=True) if kept[line] > most and kept[twin]]
        found[name] = (len(lines), len(lines) - len(stayed), dropped["good"].get(name, 0))
    return found


PARTS = (
    "城北 海边 山里 学校 车站 医院 图书馆 菜市场 老街 河岸 工厂 公园 茶馆 邮局 码头 果园".split(),
    "老人 孩子 医生 农民 司机 老师 画家 厨师 木匠 学生 店主 渔民 护士 工人 诗人 守林人".split(),
    "常常 总是 偶尔 每天清晨 下雨的时候 过节之前 天黑以后 冬天里 夏夜 午饭后 从去年起 近来".split(),
    "读旧书 种豆角 修自行车 写长信 煮面条 看云 练书法 数星星 学吹笛子 晒稻谷 擦窗户 找蘑菇 画地图 补渔网".split(),
    "因为这样心里安静 为了让邻居高兴 好把日子过得慢些 这是祖母教给他们的 谁也说不清缘由 大家都觉得有趣".split(),
)


def test_what_is_planted_goes_and_what_is_good_stays(tmp_path):
    rng = random.Random(5)

    def sentence() -> str:
        place, who, when, what, why = map(rng.choice, PARTS)
        return f"{place}的{who}{when}{what}，{why}。"

    good = [
        chat(f"说说{sentence()}", *(f"{sentence()}{sentence()}{sentence()}" for _ in range(rng.choice([1, 3]))))
        for _ in range(400)
    ]
    questions = [f"第{n}题：{sentence()[:-1]}，与此最相近的一项是哪一个？" for n in range(12)]
    evaluation = write_jsonl(
        tmp_path / "evaluation.jsonl", [{"query": q, "choices": ["甲", "乙"], "gold": 0} for q in questions]
    )
    found = walk(tmp_path, good, evaluation, questions)
    assert len(found) == 15 and all(planted for planted, _, _ in found.values())
    for name, (planted, gone, lost) in found.items():
        least = 0.6 if name == "answer cut in the middle" else 1.0  # a cut at the end of a clause does not show
        assert gone >= least * planted and lost == 0, (name, planted, gone, lost)
