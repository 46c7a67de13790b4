"""Records of this project from the layouts that people publish: ShareGPT, messages, Alpaca, pairs, preferences, R1."""

import json
import re

from dataset.lm_dataset import RecordError, parse_record
from scripts.prepare_pipeline import Dropped

# the kinds that a file can be converted to, and how lm_dataset names what is in it
KINDS = {
    "pretrain": "pretrain",
    "conversation": "conversation",
    "reason": "conversation",
    "preference": "preference",
    "problem": "conversation",
}
TURNS = ("conversations", "messages", "conversation", "dialogue", "dialog", "data")
PROMPTS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWERS = ("output", "response", "completion", "answer", "content", "solution", "target")
REASONS = ("reasoning_content", "reasoning", "thinking", "think", "thought", "cot", "Complex_CoT")
BETTER = ("chosen", "chosen_response", "response_chosen", "preferred", "accepted")
WORSE = ("rejected", "rejected_response", "response_rejected", "non_preferred")
# other spellings of a thought and its conclusion
TAGS = {
    "<|begin_of_thought|>": "<think>",
    "<|end_of_thought|>": "</think>",
    "<|begin_of_solution|>": "<answer>",
    "<|end_of_solution|>": "</answer>",
}
THOUGHT = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*(?:<answer>)?\s*(.*?)\s*(?:</answer>)?\s*", re.DOTALL)
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
GSM8K = re.compile(r"(.*?)\s*\n#### *(\S.*)", re.DOTALL)


class Convert:
    """A step: any known layout to records of one kind."""

    def __init__(self, kind: str, passage: int = 512):
        self.kind, self.passage = kind, passage

    def settings(self) -> dict:
        return vars(self)

    def __call__(self, row: dict, changes: list[str]) -> list[dict]:
        record = CONVERTERS[self.kind](row)
        extra = {key: record[key] for key in ("answer",) if key in record}
        if extra:  # a problem: its conversation ends with the question
            record = record | {"conversations": [*record["conversations"], turn("assistant", record["answer"])]}
        try:
            parsed = parse_record(KINDS[self.kind], json.dumps(record))
        except RecordError as error:
            raise Dropped(re.sub(r"\bturn \d+", "a turn", str(error))) from None
        if self.kind == "pretrain":
            return [{"text": parsed}]
        if self.kind == "preference":
            return [dict(zip(("chosen", "rejected"), parsed, strict=True))]
        return [{"conversations": parsed[:-1] if extra else parsed} | extra]


def guess_kind(rows: list[dict]) -> str:
    """The kind that most rows of a file can become. Raises ValueError if none can become any."""
    kinds = [kind for row in rows if (kind := _kind_of(row))]
    if not kinds:
        keys = ", ".join(sorted({key for row in rows for key in row})[:12])
        raise ValueError(f"no known layout (keys here: {keys or 'none'}); rename its columns, or say --to")
    return max(sorted(set(kinds)), key=kinds.count)


def _kind_of(row: dict) -> str | None:
    if (_first(row, BETTER) and _first(row, WORSE)) or isinstance(row.get("completions"), list):
        return "preference"
    try:
        turns = turns_of(row)
    except Dropped:
        return "pretrain" if _text(row) else None
    if "answer" in row and isinstance(row.get("conversations"), list):
        return "problem"
    return "reason" if "<think>" in str(turns[-1]) else "conversation"


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def turns_of(row: dict) -> list[dict]:
    """The turns of a row, with the names of roles that it has. Raises Dropped if the layout is none that we know."""
    value = next((row[key] for key in TURNS if isinstance(row.get(key), list) and row[key]), None)
    if value is not None:
        turns = [made for item in value for made in _turns_of_item(item)]
        if all(isinstance(item, str) for item in value):
            turns = [turn("assistant" if n % 2 else "user", text) for n, text in enumerate(value)]
    else:
        turns = _prompt(row)
        answer = _first(row, [key for key in ANSWERS if key != _prompt_key(row)])
        if not turns or answer is None:
            raise Dropped("no known layout", f"keys: {', '.join(row)[:100]}")
        turns.append(turn("assistant", with_thought(_first(row, REASONS), answer)))
    return _with_system(row, turns)


def _turns_of_item(item: object) -> list[dict]:
    if not isinstance(item, dict):
        return [item]
    if "human" in item and "assistant" in item:
        return [turn("user", item["human"]), turn("assistant", item["assistant"])]
    made = {key: value for key, value in item.items() if key not in ("from", "value")}
    for ours, theirs in (("role", "from"), ("content", "value")):
        if theirs in item:
            made.setdefault(ours, item[theirs])
    if isinstance(made.get("content"), str):
        for theirs, ours in TAGS.items():
            made["content"] = made["content"].replace(theirs, ours)
    return [made]


def _prompt_key(row: dict) -> str | None:
    return next((key for key in PROMPTS if _is_text(row.get(key))), None)


def _prompt(row: dict) -> list[dict]:
    """The turns before the answer: the history and the question."""
    key = _prompt_key(row)
    if key is None:
        return []
    question = row[key]
    if key == "instruction" and _is_text(row.get("input")):
        question += "\n" + row["input"]
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise Dropped("history is not a list of pairs", str(history)[:100])
    turns = [made for asked, said in history for made in (turn("user", asked), turn("assistant", said))]
    return [*turns, turn("user", question)]


def _with_system(row: dict, turns: list) -> list[dict]:
    system, tools = _first(row, ("system", "system_prompt")), row.get("tools")
    opened = bool(turns) and isinstance(turns[0], dict) and turns[0].get("role") in ("system", "developer")
    if system and not opened:
        turns = [turn("system", system), *turns]
    elif tools and not opened:
        turns = [turn("system", ""), *turns]
    if tools:
        turns[0] = turns[0] | {"tools": tools}
    return turns


def with_thought(thought: str | None, answer: str) -> str:
    return f"<think>\n{thought.strip()}\n</think>\n<answer>\n{answer.strip()}\n</answer>" if thought else answer


def _pretrain(row: dict) -> dict:
    text = _text(row)
    if text is None:
        raise Dropped("no text", f"keys: {', '.join(row)[:100]}; join makes texts of conversations")
    return {"text": text}


def _text(row: dict) -> str | None:
    return next(
        (row[key] for key in ("text", "content", "raw_content", "article", "passage") if _is_text(row.get(key))), None
    )


def _conversation(row: dict) -> dict:
    return {"conversations": turns_of(row)}


def _reason(row: dict) -> dict:
    turns = turns_of(row)
    match = isinstance(turns[-1], dict) and THOUGHT.fullmatch(str(turns[-1].get("content")))
    solved = isinstance(turns[-1], dict) and GSM8K.fullmatch(str(turns[-1].get("content")))
    if not match and not solved:
        raise Dropped("no thought before the answer")
    thought, answer = (match or solved).groups()
    if not thought or not answer:
        raise Dropped("an empty thought or answer")
    thought = thought if match else _without_marks(thought)
    return {"conversations": [*turns[:-1], turns[-1] | {"content": with_thought(thought, answer)}]}


def _problem(row: dict) -> dict:
    """A question and what its answer must be, for rewards and scores: GSM8K, or any prompt with an answer."""
    if isinstance(row.get("conversations"), list) and _is_text(row.get("answer")):
        turns = [made for item in row["conversations"] for made in _turns_of_item(item)]
    else:
        turns = turns_of(row)
    answer = row.get("answer") if "answer" in row else turns[-1].get("content")
    if isinstance(turns[-1], dict) and turns[-1].get("role") in ("assistant", "gpt"):
        turns = turns[:-1]
    if isinstance(answer, int | float):
        answer = str(answer)
    if not _is_text(answer):
        raise Dropped("no answer")
    solved = GSM8K.fullmatch(answer)
    answer = solved[2].replace(",", "") if solved else answer
    return {"conversations": turns, "answer": answer.strip()}


def _without_marks(text: str) -> str:
    """A GSM8K solution without its calculator's marks."""
    return re.sub(r"<<.*?>>", "", text)


def _preference(row: dict) -> dict:
    if isinstance(row.get("completions"), list):
        better, worse = _best_and_worst(row["completions"])
    else:
        better, worse = _first(row, BETTER), _first(row, WORSE)
    if not better or not worse:
        raise Dropped("no known layout", f"keys: {', '.join(row)[:100]}")
    prompt = next((row[key] for key in TURNS if isinstance(row.get(key), list)), None)
    prompt = [made for item in prompt for made in _turns_of_item(item)] if prompt else _prompt(row)
    prompt = _with_system(row, prompt)
    return {"chosen": _whole(prompt, better), "rejected": _whole(prompt, worse)}


def _whole(prompt: list[dict], answer: object) -> list[dict]:
    """The conversation that ends with an answer, which may be a text, a turn, or hold its prompt already."""
    if isinstance(answer, str):
        parts = HH_TURN.split(answer)
        if len(parts) > 2 and not parts[0].strip():
            roles = {"Human": "user", "Assistant": "assistant"}
            return [turn(roles[role], text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]
        return [*prompt, turn("assistant", answer)]
    answers = answer if isinstance(answer, list) else [answer]
    turns = [made for item in answers for made in _turns_of_item(item)]
    asked = any(isinstance(made, dict) and made.get("role") in ("user", "human") for made in turns)
    return turns if asked else [*prompt, *turns]


def _best_and_worst(completions: list) -> tuple[str, str]:
    """UltraFeedback: several answers with scores."""
    scored = []
    for item in completions:
        score = next(
            (item[k] for k in ("overall_score", "score", "rating") if isinstance(item.get(k), int | float)), None
        )
        if score is not None and _is_text(item.get("response")):
            scored.append((score, item["response"]))
    if len(scored) < 2 or max(scored)[0] == min(scored)[0]:
        raise Dropped("no two answers of different scores")
    return max(scored, key=lambda pair: pair[0])[1], min(scored, key=lambda pair: pair[0])[1]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _first(row: dict, keys) -> object:
    return next(
        (row[key] for key in keys if row.get(key) and (not isinstance(row[key], str) or _is_text(row[key]))), None
    )


CONVERTERS = {
    "pretrain": _pretrain,
    "conversation": _conversation,
    "reason": _reason,
    "preference": _preference,
    "problem": _problem,
}
