"""Turn one jsonl record into token ids and a loss mask.

Three kinds of record, one JSON object a line:
    pretrain      {"text": "…"}                                            ids of the text between one bos and one eos
    conversation  {"conversations": [{"role": "user", "content": "…"}, …]}  ids of the chat, mask on the answers
    preference    {"chosen": [turns], "rejected": [turns]}                 two conversations, mask on what differs
"""

import itertools
import json
from collections import Counter

from dataset.tokenization import ROLES, ChatTokenizer, Segment

RULES_VERSION = 3  # raise it if conversations become other ids or masks: it is part of a token cache's identity
# kind of record -> how a line looks
FORMS = {
    "pretrain": '{"text": "…"}',
    "conversation": '{"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    "preference": '{"chosen": [turns], "rejected": [turns]}',
}
KINDS = tuple(FORMS)
# what other data sets call our roles; a function call is a turn of the assistant
ROLE_NAMES = dict(zip(ROLES, ROLES, strict=True)) | {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant", "function_call": "assistant",
    "developer": "system", "observation": "tool", "ipython": "tool",
}  # fmt: skip
USED_KEYS = {
    "system": {"role", "content", "tools"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls", "function_call"},
    "tool": {"role", "content"},
}
MOST_UNUSED_KEYS = 20  # counted per file, because a broken file can have a new key in every line


class RecordError(ValueError):
    """Says why a line is not a record. The message is the reason alone; the reader of the file adds file and line."""


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of record {kind!r}; one of {', '.join(KINDS)}")


def parse_record(
    kind: str, line: str, unused: Counter | None = None
) -> str | list[dict] | tuple[list[dict], list[dict]]:
    """Return one line of a jsonl file, validated: text (pretrain), turns (conversation), or (chosen, rejected) turns.

    A turn is {"role": one of ROLES, "content": str} and, if the record has them, "tools" (a list of objects),
    "reasoning_content" (str) and "tool_calls" (a list of {"type": "function", "function": {"name", "arguments"}}).
    If roles are missing, the user and the assistant alternate, the user first.
    unused: counts the keys that nothing reads, as '"key" of turns' or '"key" of records'.
    Raises RecordError if the line is something else.
    """
    check_kind(kind)
    record = json_object(line)
    unused = Counter() if unused is None else unused
    names = {"pretrain": ("text",), "conversation": ("conversations",), "preference": ("chosen", "rejected")}[kind]
    values = [_value(record, name) for name in names]
    used = {*names} if kind == "pretrain" else {*names, "tools"}
    if len(record) > len(names):
        _count_unused(record, used, "records", unused)
    if kind == "pretrain":
        return _text(values[0], '"text"')
    tools = record.get("tools")
    sides = [parse_turns(value, f'"{name}"', tools, unused) for name, value in zip(names, values, strict=True)]
    for name, turns in zip(names, sides, strict=True):
        if not any(turn["role"] == "assistant" for turn in turns):
            raise RecordError(f'"{name}" has no assistant turn: there is nothing to learn')
    if kind == "conversation":
        return sides[0]
    shared = shared_beginning(*sides)
    for name, turns in zip(names, sides, strict=True):
        if not any(turn["role"] == "assistant" for turn in turns[shared:]):
            raise RecordError(f'"{name}" has no assistant turn of its own: chosen and rejected hold the same answers')
    if not shared or any(turns[shared]["role"] != "assistant" for turns in sides):
        raise RecordError(
            f"chosen and rejected differ before their answers, in turn {shared + 1}: both must answer the same prompt"
        )
    return sides[0], sides[1]


def parse_prompt(line: str) -> dict:
    """Return one line of a prompt file: {"conversations": turns before the answer, "answer": text, …}.

    Raises RecordError if the line is something else.
    """
    record = json_object(line)
    turns = parse_turns(_value(record, "conversations"), '"conversations"', record.get("tools"))
    while turns and turns[-1]["role"] == "assistant":  # accept files of answered prompts
        turns.pop()
    if not turns:
        raise RecordError('"conversations" has no turn of the user: there is nothing to answer')
    answer = _value(record, "answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return record | {"conversations": turns, "answer": _text(answer, '"answer"')}


def render_record(kind: str, record, tokenizer: ChatTokenizer) -> list[str] | list[list[Segment]]:
    """Return the documents of a record as text. Raises ValueError if the chat template cannot write them."""
    if kind == "pretrain":
        return [record]
    documents = [tokenizer.render(turns) for turns in ([record] if kind == "conversation" else record)]
    if not all(any(segment.learned for segment in segments) for segments in documents):
        raise ValueError(
            f"the chat template of {tokenizer.template.file} opens no turn with {tokenizer.template.bos}assistant; "
            "nothing would be learned. Choose another --tokenizer_path"
        )
    return documents


def tokenize_rendered(kind: str, documents: list, tokenizer: ChatTokenizer) -> list[tuple[list[int], list[int] | None]]:
    """Return (ids, mask) of each rendered document, with one call of the tokenizer.

    pretrain: one bos opens and one eos ends a document, ids already there are not doubled; every token is a target, so
    the mask is None. conversation: mask 1 on what an assistant says and the eos that ends it. preference: two documents
    a record, chosen then rejected; turns that both begin with are the prompt and have mask 0.
    """
    if kind == "pretrain":
        contents = tokenizer.encode_documents(documents)
        return [(_framed(ids, tokenizer.bos_id, tokenizer.eos_id), None) for ids in contents]
    encoded = tokenizer.encode_rendered(documents)
    if kind == "preference":
        for (chosen, chosen_mask), (rejected, rejected_mask) in zip(encoded[::2], encoded[1::2], strict=True):
            # No content can hold an eos, so the last eos of the common beginning ends the last shared turn.
            shared = shared_beginning(chosen, rejected)
            end = max((place for place in range(shared) if chosen[place] == tokenizer.eos_id), default=-1) + 1
            chosen_mask[:end] = rejected_mask[:end] = [0] * end
    return encoded


def tokenize_records(kind: str, records: list, tokenizer: ChatTokenizer) -> list[tuple[list[int], list[int] | None]]:
    """Return (ids, mask) of each document of the records: render_record, then tokenize_rendered."""
    check_kind(kind)
    rendered = [document for record in records for document in render_record(kind, record, tokenizer)]
    return tokenize_rendered(kind, rendered, tokenizer)


def count_target_bytes(kind: str, record) -> int:
    """Count the UTF-8 bytes of the text that a record teaches, which is what bits per byte divides by."""
    if kind == "pretrain":
        return len(record.encode())
    shared = 0 if kind == "conversation" else shared_beginning(*record)
    sides = [record] if kind == "conversation" else [side[shared:] for side in record]
    answers = [turn for side in sides for turn in side if turn["role"] == "assistant"]
    texts = [turn["content"] + turn.get("reasoning_content", "") + _dumped(turn.get("tool_calls")) for turn in answers]
    return len("".join(texts).encode())


def json_object(line: str) -> dict:
    """Return the object that a line holds. Raises RecordError."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise RecordError(f"broken JSON: {reason} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        raise RecordError(f"broken JSON: {error}") from error
    if not isinstance(record, dict):
        raise RecordError(f"a JSON object was expected, not {_type_name(record)}")
    return record


def _value(record: dict, key: str):
    if key not in record:
        raise RecordError(f'key "{key}" {_missing(record)}')
    return record[key]


def _missing(holder: dict) -> str:
    found = ", ".join(f'"{key}"' for key in list(holder)[:5]) or "none"
    return f"is missing (keys here: {found})"


def _text(value, name: str) -> str:
    """Return a text to learn from. Raises RecordError if it is none."""
    if not isinstance(value, str):
        fault = f"must be a string, not {_type_name(value)}"
    else:
        fault = _surrogate_fault(value) if value and not value.isspace() else "is empty"
    if fault:
        raise RecordError(f"{name} {fault}")
    return value


def _surrogate_fault(value: str) -> str | None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair, \\u{ord(value[error.start]):04x}"
    return None


def parse_turns(value, name: str, tools=None, unused: Counter | None = None, may_be_empty: bool = False) -> list[dict]:
    """Return validated turns, as parse_record. Raises RecordError.

    name: of the list, for messages. tools: of the whole record; they go to the first turn. may_be_empty: accept blank
    contents.
    """
    unused = Counter() if unused is None else unused
    if not isinstance(value, list):
        raise RecordError(f"{name} must be a list of turns, not {_type_name(value)}")
    if not value:
        raise RecordError(f"{name} is empty")
    turns, before = [], None
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            fault = f'must be an object with "role" and "content", not {_type_name(turn)}'
            raise RecordError(f"turn {number} of {name} {fault}")
        turns.append(_turn(turn, f"in turn {number} of {name}", before, unused, may_be_empty))
        before = turns[-1]["role"]
    if tools:
        turns[0] = {**turns[0], "tools": _objects(tools, f'"tools" next to {name}') + turns[0].get("tools", [])}
    return turns


def _turn(given: dict, where: str, before: str | None, unused: Counter, may_be_empty: bool) -> dict:
    role = "assistant" if before in ("user", "tool") else "user"  # if the record names none
    name = given.get("role", role)
    if name not in ROLES:
        if not isinstance(name, str):
            raise RecordError(f'"role" {where} must be a string, not {_type_name(name)}')
        if name.strip().lower() not in ROLE_NAMES:
            raise RecordError(f'"role" {where} is {name[:40]!r}; known are {", ".join(ROLE_NAMES)}')
        name = name.strip().lower()
    role, content = ROLE_NAMES[name], given.get("content")
    if isinstance(content, list) and name != "function_call":
        content = joined_parts(content, f'"content" {where}: ')
    if given.keys() == {"role", "content"} and name != "function_call" and isinstance(content, str) and content.strip():
        return {"role": role, "content": _text(content, f'"content" {where}')}  # nearly every turn, without a detour
    _count_unused(given, USED_KEYS[role], "turns", unused)
    more = {}
    if role == "system" and given.get("tools"):
        more["tools"] = _objects(given["tools"], f'"tools" {where}')
    if role == "assistant":
        thought = given.get("reasoning_content")
        if thought is not None:
            if not isinstance(thought, str) or _surrogate_fault(thought):
                raise RecordError(f'"reasoning_content" {where} must be a text, not {_type_name(thought)}')
            more["reasoning_content"] = thought
        calls = [*_objects(given.get("tool_calls") or [], f'"tool_calls" {where}')]
        calls += _objects(given.get("function_call") or [], f'"function_call" {where}')
        if name == "function_call":
            calls, content = calls + _objects(content, f'"content" {where}'), ""
        if calls:
            more["tool_calls"] = [_call(call, f"call {number} {where}") for number, call in enumerate(calls, 1)]
    may_be_empty = "content" in given and (may_be_empty or (role == "tool" and content is not None))
    is_blank = content is None or (isinstance(content, str) and not content.strip())
    if not (is_blank and (may_be_empty or more.keys() & {"tools", "tool_calls"})):
        if "content" not in given:
            raise RecordError(f'"content" {where} {_missing(given)}')
        _text(content, f'"content" {where}')
    return {"role": role, "content": content or "", **more}


def joined_parts(parts: list, place: str) -> str:
    """Return the text of a list of parts, a line for each, as the API server joins them."""
    for number, part in enumerate(parts, 1):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _type_name(part)
            raise RecordError(f"{place}part {number} is not text but {kind!r}; the model reads text only")
    return "\n".join(part["text"] for part in parts)


def _objects(value, name: str) -> list[dict]:
    """Return a list of objects from that, from one object, or from either as JSON text."""
    value = _from_json(value, name)
    objects = [_from_json(item, name) for item in (value if isinstance(value, list) else [value])]
    for item in objects:
        if not isinstance(item, dict):
            raise RecordError(f"{name} must be a list of objects, or that as JSON text; it holds {_type_name(item)}")
    if fault := _surrogate_fault(_dumped(objects)):
        raise RecordError(f"{name} {fault}")
    return objects


def _call(call: dict, name: str) -> dict:
    function = _from_json(call.get("function") or call, name)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RecordError(f'{name} has no "name" of a function')
    arguments = function.get("arguments")
    if not isinstance(_from_json(arguments, f'"arguments" of {name}'), dict):
        raise RecordError(f'"arguments" of {name} must be an object, or one as JSON text, not {_type_name(arguments)}')
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _from_json(value, name: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{name} is not valid JSON: {error}") from error


def _dumped(value) -> str:
    try:
        return json.dumps(value, ensure_ascii=False) if value else ""
    except RecursionError as error:
        raise RecordError("nested too deeply") from error


def _count_unused(holder: dict, used: set[str], what: str, unused: Counter) -> None:
    for key in holder.keys() - used:
        name = f'"{key[:40]}" of {what}'
        if holder[key] is not None and (name in unused or len(unused) < MOST_UNUSED_KEYS):
            unused[name] += 1


def shared_beginning(chosen: list, rejected: list) -> int:
    """Return the number of turns or ids that both begin with: the prompt of a preference."""
    pairs = zip(chosen, rejected, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _framed(ids: list[int], bos_id: int, eos_id: int) -> list[int]:
    start = [] if ids[:1] == [bos_id] else [bos_id]
    end = [] if ids[-1:] == [eos_id] else [eos_id]
    return start + ids + end


def _type_name(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
