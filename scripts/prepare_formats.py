"""Turn the layouts that people publish into our records: ShareGPT, messages, Alpaca, pairs, preferences, R1."""

import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dataset.lm_dataset import parse_prompt, parse_record
from model.flags import at_least
from scripts.prepare_pipeline import UNFIT, Dropped, Step, flag, rows_of
from scripts.prepare_sources import find_files, read_blocks

TURNS = ("conversations", "messages", "conversation", "dialogue", "data")
PROMPTS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWERS = ("output", "response", "completion", "answer", "content", "solution", "target")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "think", "thought", "cot", "Complex_CoT")
TEXTS = ("text", "content", "raw_content", "article")
BETTER = ("chosen", "chosen_response", "response_chosen", "accepted")
WORSE = ("rejected", "rejected_response", "response_rejected")
SYSTEMS = ("system", "system_prompt")
USED = {*TURNS, *PROMPTS, *ANSWERS, *THOUGHTS, *TEXTS, *BETTER, *WORSE, *SYSTEMS, "completions", "history", "tools"}
SCORES = ("overall_score", "score", "rating")
TAG = re.compile(r"<\|(begin|end)_of_(thought|solution)\|>")  # another spelling of <think> and <answer>
REASONED = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*(?:<answer>)?\s*(.*?)\s*(?:</answer>)?\s*", re.DOTALL)
GSM8K = re.compile(r"(.*?)\s*\n#### *(\S.*)", re.DOTALL)
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass
class Convert(Step):
    """Turn ShareGPT, messages, Alpaca, prompt and answer, preferences, R1 traces and plain text into our records."""

    to: str | None = flag(
        None,
        "kind of record (default: what the first rows look like)",
        choices=("pretrain", "conversation", "reason", "preference", "problem"),
    )
    passage: int = flag(512, "longest passage of a text file, in characters (default: %(default)s)", type=at_least(1))

    def run(self, args) -> None:
        if self.to is None:
            self.to = guess_kind(args.inputs, args.encoding)
            print(f"these become {self.to} records; --to chooses another kind")
        super().run(args)

    def __call__(self, row: dict, changes: list[str]) -> list[dict]:
        line = json.dumps(CONVERTERS[self.to](row))
        if self.to == "problem":
            return [parse_prompt(line)]
        kind = "conversation" if self.to == "reason" else self.to
        unused = Counter({f'"{key}" of records': 1 for key in row.keys() - USED if row[key] is not None})
        parsed = parse_record(kind, line, unused)
        changes += [f"{name} left out" for name in sorted(unused)]
        return [dict(zip(KEYS[kind], parsed if kind == "preference" else [parsed], strict=True))]


def guess_kind(inputs: list[Path], encoding: str) -> str:
    """Return the kind that most of the first rows can become. Raises ValueError if none can become any."""
    paths, first = find_files(inputs), itertools.islice
    blocks = (block for path in paths for block in first(read_blocks(path, encoding), 1))
    rows = [row for block in blocks for _, _, row in first(rows_of(block), 100)]
    kinds = [kind for row in rows if isinstance(row, dict) and (kind := _kind_of(row))]
    if not kinds:
        keys = ", ".join(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
        if not keys:
            faults = ", ".join({str(row): 0 for row in rows if isinstance(row, Dropped)}) or "blank"
            raise ValueError(f"{paths[0]} holds no JSON object, one a line; its first lines are: {faults}")
        raise ValueError(f"{paths[0]} has no layout that we know (keys: {keys[:200]}); rename its columns")
    return max(sorted(set(kinds)), key=kinds.count)


def _kind_of(row: dict) -> str | None:
    if (_first(row, BETTER) and _first(row, WORSE)) or isinstance(row.get("completions"), list):
        return "preference"
    try:
        last = str(_turns_of(row)[-1])
    except UNFIT:
        return "pretrain" if _first(row, TEXTS, str) else None
    return (
        "problem" if "answer" in row and _first(row, TURNS, list) else "reason" if "<think>" in last else "conversation"
    )


def _pretrain(row: dict) -> dict:
    text = _first(row, TEXTS, str)
    if text is None:
        raise Dropped("no text", f"keys: {', '.join(row)[:200]}; join makes texts of conversations")
    return {"text": text}


def _reason(row: dict) -> dict:
    *turns, last = _turns_of(row)
    content = str(last.get("content"))
    if thought := last.pop("reasoning_content", None):
        content = _with_thought(thought, content)
    match = REASONED.fullmatch(content) or GSM8K.fullmatch(re.sub(r"<<.*?>>", "", content))
    if not match or not all(match.groups()):
        raise Dropped("no thought and answer")
    return {"conversations": [*turns, last | {"content": _with_thought(*match.groups())}]}


def _problem(row: dict) -> dict:
    """Return a question and its gold answer, for rewards and scores: GSM8K, or any prompt with an answer."""
    answer = "" if row.get("answer") is None else str(row["answer"])
    turns = _turns_of(row | {"answer": answer})
    answer = answer or str(turns[-1].get("content"))
    solved = GSM8K.fullmatch(answer)
    return {"conversations": turns, "answer": solved[2].replace(",", "") if solved else answer.strip()}


def _preference(row: dict) -> dict:
    better, worse = _first(row, BETTER), _first(row, WORSE)
    if isinstance(row.get("completions"), list):  # UltraFeedback: several answers with scores
        scored = [(_first(item, SCORES), item.get("response")) for item in row["completions"]]
        scored = sorted((pair for pair in scored if pair[0] is not None and pair[1]), key=lambda pair: pair[0])
        if len(scored) < 2 or scored[0][0] == scored[-1][0]:
            raise Dropped("no two answers of different scores")
        worse, better = scored[0][1], scored[-1][1]
    prompt = [turn for item in _first(row, TURNS, list) or [] for turn in _turns_of_item(item)] or _question(row)
    prompt = _with_system(row, prompt)
    return {"chosen": _whole(prompt, better), "rejected": _whole(prompt, worse)}


CONVERTERS = {
    "pretrain": _pretrain,
    "conversation": lambda row: {"conversations": _turns_of(row)},
    "reason": _reason,
    "preference": _preference,
    "problem": _problem,
}
KEYS = {"pretrain": ("text",), "conversation": ("conversations",), "preference": ("chosen", "rejected")}


def _whole(prompt: list[dict], answer: object) -> list[dict]:
    """Return the conversation that ends with an answer: a text, a turn, or turns that may hold the prompt already."""
    if isinstance(answer, str):
        parts = HH_TURN.split(answer)
        if len(parts) > 2 and not parts[0].strip():  # Anthropic's HH: the whole dialogue in one text
            roles = {"Human": "user", "Assistant": "assistant"}
            return [_turn(roles[role], said.strip()) for role, said in zip(parts[1::2], parts[2::2], strict=True)]
        return [*prompt, _turn("assistant", answer)]
    turns = [turn for item in (answer if isinstance(answer, list) else [answer]) for turn in _turns_of_item(item)]
    return turns if any(turn.get("role") in ("user", "human") for turn in turns) else [*prompt, *turns]


def _turns_of(row: dict) -> list[dict]:
    """Return the turns of a row under its own names of roles. Raises Dropped if its layout is unknown."""
    items = _first(row, TURNS, list)
    if items:
        if all(isinstance(item, str) for item in items):
            items = [_turn("assistant" if n % 2 else "user", text) for n, text in enumerate(items)]
        return _with_system(row, [turn for item in items for turn in _turns_of_item(item)])
    turns = _question(row)
    answer = _first(row, [key for key in ANSWERS if key != _first_key(row, PROMPTS)], str)
    if not turns or answer is None:
        raise Dropped("no layout that we know", f"keys: {', '.join(row)[:200]}")
    thought = _first(row, THOUGHTS, str)
    return _with_system(row, [*turns, _turn("assistant", _with_thought(thought, answer) if thought else answer)])


def _turns_of_item(item: object) -> list[dict]:
    if "human" in item and "assistant" in item:
        return [_turn("user", item["human"]), _turn("assistant", item["assistant"])]
    turn = {{"from": "role", "value": "content"}.get(key, key): value for key, value in item.items()}
    if isinstance(turn.get("content"), str):
        names = {"begin": "<", "end": "</", "thought": "think>", "solution": "answer>"}
        turn["content"] = TAG.sub(lambda match: names[match[1]] + names[match[2]], turn["content"])
    return [turn]


def _question(row: dict) -> list[dict]:
    """Return the turns before the answer: the history and the question."""
    key, history = _first_key(row, PROMPTS), row.get("history") or []
    if key is None:
        return []
    more = key == "instruction" and _first(row, ("input",), str)
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise Dropped("history is not a list of pairs", str(history)[:100])
    turns = [turn for asked, said in history for turn in (_turn("user", asked), _turn("assistant", said))]
    return [*turns, _turn("user", f"{row[key]}\n{more}" if more else row[key])]


def _with_system(row: dict, turns: list[dict]) -> list[dict]:
    system, tools = _first(row, SYSTEMS, str), row.get("tools")
    if isinstance(tools, str) and tools.strip() in ("", "[]", "{}", "null"):
        tools = None
    if (system or tools) and (not turns or turns[0].get("role") not in ("system", "developer")):
        turns = [_turn("system", system or ""), *turns]
    return [turns[0] | {"tools": tools}, *turns[1:]] if tools else turns


def _with_thought(thought: str, answer: str) -> str:
    return f"<think>\n{thought.strip()}\n</think>\n<answer>\n{answer.strip()}\n</answer>"


def _turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def _first_key(row: dict, keys, kind: type = object) -> str | None:
    """Return the first of the keys under which a row has something that is not blank."""
    found = (key for key in keys if row.get(key) is not None and isinstance(row[key], kind))
    return next((key for key in found if (row[key].strip() if isinstance(row[key], str) else row[key] != [])), None)


def _first(row: dict, keys, kind: type = object):
    key = _first_key(row, keys, kind)
    return None if key is None else row[key]
