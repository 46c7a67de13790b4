"""What one jsonl record becomes: token ids and a loss mask.

Three kinds of record, one JSON object a line:
    pretrain      {"text": "…"}                                            ids of the text between one bos and one eos
    conversation  {"conversations": [{"role": "user", "content": "…"}, …]}  ids of the chat, mask on the answers
    preference    {"chosen": [turns], "rejected": [turns]}                 two conversations, mask on what differs
"""

import json

from dataset.tokenization import ROLES

KINDS = ("pretrain", "conversation", "preference")
# what a line of each kind looks like
FORMS = {
    "pretrain": '{"text": "…"}',
    "conversation": '{"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    "preference": '{"chosen": [turns], "rejected": [turns]}',
}


class RecordError(ValueError):
    """Why a line is no record. The message is the reason alone; whoever reads the file adds its name and the line."""


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of record {kind!r}; one of {', '.join(KINDS)}")


def parse_record(kind: str, line: str) -> str | list[dict] | tuple[list[dict], list[dict]]:
    """One line of a jsonl file, validated.

    Returns the text (pretrain), the turns (conversation) or (chosen turns, rejected turns) (preference). A turn is
    {"role", "content"} and its role one of ROLES: where it is missing or unknown, the user and the assistant alternate,
    the user first. RecordError: the line is something else.
    """
    check_kind(kind)
    record = _json_object(line)
    if kind == "pretrain":
        return _text(_value(record, "text"), '"text"')
    if kind == "conversation":
        turns = _turns(_value(record, "conversations"), '"conversations"')
        if not any(turn["role"] == "assistant" for turn in turns):
            raise RecordError('"conversations" has no assistant turn: there is nothing to learn')
        return turns
    chosen = _turns(_value(record, "chosen"), '"chosen"')
    rejected = _turns(_value(record, "rejected"), '"rejected"')
    shared = _shared_turns(chosen, rejected)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn["role"] == "assistant" for turn in turns):
            raise RecordError(f'"{name}" has no assistant turn: there is nothing to learn')
        if not any(turn["role"] == "assistant" for turn in turns[shared:]):
            raise RecordError(f'"{name}" has no assistant turn of its own: chosen and rejected hold the same answers')
    if not shared or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise RecordError(
            f"chosen and rejected differ before their answers, in turn {shared + 1}: both must answer the same prompt"
        )
    return chosen, rejected


def parse_prompt(line: str) -> dict:
    """One line of a prompt file: {"conversations": turns before the answer, "answer": text, …}. Raises RecordError."""
    record = _json_object(line)
    turns = _turns(_value(record, "conversations"), '"conversations"')
    while turns and turns[-1]["role"] == "assistant":  # files of answered prompts serve too
        turns.pop()
    if not turns:
        raise RecordError('"conversations" has no turn of the user: there is nothing to answer')
    answer = _value(record, "answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return record | {"conversations": turns, "answer": _text(answer, '"answer"')}


def tokenize_records(kind: str, records: list, tokenizer) -> list[tuple[list[int], list[int] | None]]:
    """(ids, mask) of each document of the records; one batch, so that the tokenizer is asked once.

    pretrain: one bos opens and one eos ends a document, ids already there are not doubled; every token is a target, so
    the mask is None. conversation: mask 1 on an assistant's content and the eos that ends it. preference: two
    documents a record, chosen then rejected; turns that both begin with are the prompt and have mask 0.
    """
    check_kind(kind)
    if kind == "pretrain":
        return [(_framed(ids, tokenizer.bos_id, tokenizer.eos_id), None) for ids in tokenizer.encode_documents(records)]
    if kind == "conversation":
        return tokenizer.encode_conversations(records)
    documents = tokenizer.encode_conversations([turns for pair in records for turns in pair])
    for pair, (chosen, rejected) in enumerate(records):
        shared = _shared_turns(chosen, rejected)
        opening = shared + (chosen[0]["role"] != "system")  # the default system turn that the tokenizer adds
        for ids, mask in (documents[2 * pair], documents[2 * pair + 1]):
            _clear_turns(ids, mask, opening if shared else 0, tokenizer.eos_id)
    return documents


def count_target_bytes(kind: str, record) -> int:
    """UTF-8 bytes of the text that a record teaches: what bits per byte are counted on."""
    if kind == "pretrain":
        return len(record.encode())
    turns = record if kind == "conversation" else [*record[0], *record[1]]
    return sum(len(turn["content"].encode()) for turn in turns if turn["role"] == "assistant")


def _json_object(line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise RecordError(f"broken JSON: {error}") from error
    if not isinstance(record, dict):
        raise RecordError(f"a JSON object was expected, not {_type_name(record)}")
    return record


def _value(record: dict, key: str):
    if key not in record:
        found = ", ".join(f'"{name}"' for name in list(record)[:5]) or "none"
        raise RecordError(f'key "{key}" is missing (keys here: {found})')
    return record[key]


def _text(value, name: str) -> str:
    fault = _text_fault(value)
    if fault:
        raise RecordError(f"{name} {fault}")
    return value


def _text_fault(value) -> str | None:
    """What keeps a value from being a text to learn from, if anything."""
    if not isinstance(value, str):
        return f"must be a string, not {_type_name(value)}"
    if not value or value.isspace():
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair, \\u{ord(value[error.start]):04x}"
    return None


def _turns(value, name: str) -> list[dict]:
    if not isinstance(value, list):
        raise RecordError(f"{name} must be a list of turns, not {_type_name(value)}")
    if not value:
        raise RecordError(f"{name} is empty")
    turns, before = [], None
    for turn in value:
        if not isinstance(turn, dict):
            fault = f'must be an object with "role" and "content", not {_type_name(turn)}'
            raise RecordError(f"turn {len(turns) + 1} of {name} {fault}")
        content, role = turn.get("content"), turn.get("role")
        fault = _text_fault(content) if "content" in turn else "is missing"
        if fault:
            raise RecordError(f'"content" in turn {len(turns) + 1} of {name} {fault}')
        if role not in ROLES:
            if role is not None and not isinstance(role, str):
                fault = f"must be a string, not {_type_name(role)}"
                raise RecordError(f'"role" in turn {len(turns) + 1} of {name} {fault}')
            role = role and role.strip().lower()
            if role not in ROLES:
                role = "assistant" if before in ("user", "tool") else "user"
        turns.append({"role": role, "content": content})
        before = role
    return turns


def _shared_turns(chosen: list[dict], rejected: list[dict]) -> int:
    """Number of turns that both conversations begin with: the prompt of a preference."""
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    return shared


def _framed(ids: list[int], bos_id: int, eos_id: int) -> list[int]:
    start = [] if ids[:1] == [bos_id] else [bos_id]
    end = [] if ids[-1:] == [eos_id] else [eos_id]
    return start + ids + end


def _clear_turns(ids: list[int], mask: list[int], turns: int, eos_id: int) -> None:
    """Set mask to 0 on the first so many turns. Contents cannot forge an eos, so the n-th eos ends the n-th turn."""
    end = 0
    for _ in range(turns):
        end = ids.index(eos_id, end) + 1
    mask[:end] = [0] * end


def _type_name(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
