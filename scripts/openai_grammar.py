"""Structured output: response_format and enforced tool calls as grammars that an answer has to follow.

llguidance turns a JSON schema into the set of tokens that may come next.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.text_stream import ToolCallSplitter
from dataset.tokenization import ChatTokenizer
from model.sampling import GrammarError
from scripts.model_pool import LoadedModel
from scripts.openai_schema import ApiError, ChatRequest, Function, unsupported

# as json.dumps writes it, which is how training data has it; free spaces would tempt small models to write only spaces
JSON_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

VALUES = ("const", "enum", "default", "examples")  # their values are not schemas
NAMED = ("properties", "$defs", "definitions")  # keys whose value maps names to schemas
COMPOSED = {"anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas", "patternProperties"}


class Grammar:
    """One answer's position in its grammar; the engine asks it for the tokens that may come next."""

    def __init__(self, matcher):
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Return a mask (vocab,) of the tokens that may come; once the text is complete, those that end an answer."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise GrammarError(f"the schema is too complex: {self._matcher.get_error()}")
        mask = np.zeros(vocab_size, dtype=bool)
        mask[: len(bits)] = bits[:vocab_size]
        return torch.from_numpy(mask)

    def advance(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


def make_grammar(model: LoadedModel, body: ChatRequest) -> Callable[[], Grammar] | None:
    """Return what makes a Grammar for each answer to this request; None if it may say anything.

    Raises ApiError if the schema is wrong, or if llguidance is not installed.
    """
    try:
        param, source = _source(body, model.tokenizer)
    except RecursionError as error:
        raise ApiError(400, "the schema is nested too deeply", code="invalid_value") from error
    if source is None:
        return None
    try:
        tokenizer, vocab_size = model.tokenizer, model.engine.model.config.vocab_size
        matcher = _compile(tokenizer.path / "tokenizer.json", tokenizer.eos_id, vocab_size, source)
    except ImportError as error:
        message = f"{param} needs the llguidance package where the server runs: pip install llguidance"
        raise unsupported(param, message) from error
    if matcher.is_error():
        message = matcher.get_error().splitlines()[0].rpartition("JSON schema: ")[2]
        raise ApiError(400, f"{param}: {message}", param, "invalid_value")
    return lambda: Grammar(matcher.deep_copy())


def _source(body: ChatRequest, tokenizer: ChatTokenizer) -> tuple[str, str | None]:
    """Return (field that asks for it, grammar); the grammar is None if nothing does."""
    tools = [tool.function for tool in body.tools or ()] if body.offered_tools else []
    several = body.parallel_tool_calls is not False
    opening, closing = (_tag(tokenizer, tag) for tag in (ToolCallSplitter.OPEN, ToolCallSplitter.CLOSE))
    if body.enforced_tools:
        return "tool_choice", f'start: {opening} "\\n" %json {_call_schema(body.enforced_tools)} "\\n" {closing}'
    answer = _answer_schema(body)
    if answer and tools:  # calls, or the answer
        call = f'call: {opening} "\\n" %json {_call_schema(tools)} "\\n" {closing}'
        more = ' ("\\n" call)*' if several else ""
        return "response_format", f"start: call{more} | answer\n{call}\nanswer: %json {answer}"
    if any(function.strict for function in tools):
        # Free text, in which a tool call follows the schema. To llguidance, tags that are tokens are not text.
        tags = [f"<[{number}]>" for number in tokenizer.tag_ids if f"<[{number}]>" != opening]
        source = (
            f"start: call{'*' if several else '?'} text\ntext: ({' | '.join(['TEXT', *tags])})*\nTEXT: /(.|\\n)+/\n"
        )
        source += f'call: text call_opening "\\n" %json {_call_schema(tools)} "\\n" {closing}\n'
        source += f"call_opening: spelled | {opening}\n" if opening.startswith("<") else "call_opening: spelled\n"
        return "tools", source + f"spelled[lazy]: /(.|\\n)*{ToolCallSplitter.OPEN}/"
    return ("response_format", f"start: %json {answer}") if answer else ("", None)


def _answer_schema(body: ChatRequest) -> str:
    """Return the JSON schema of response_format as text; "" if the answer is free."""
    if not body.response_format or body.response_format.type == "text":
        return ""
    asked = body.response_format.json_schema
    schema = closed(asked.definition) if body.response_format.type == "json_schema" else {"type": "object"}
    return json.dumps(schema | {"x-guidance": _style(asked and asked.strict)})


def _style(strict: bool | None) -> dict:
    """Return how JSON is written. Only a strict schema is refused for what llguidance does not know in it."""
    return JSON_STYLE | {"lenient": not strict}


def _tag(tokenizer: ChatTokenizer, tag: str) -> str:
    """Return a tag in llguidance's grammar: its id if it is one token, else its text."""
    ids = tokenizer.encode_contents([tag])[0]
    return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(tag)


def _call_schema(functions: list[Function]) -> str:
    """Return the JSON schema of a call of one of these, as text."""
    kinds = []
    for number, function in enumerate(functions):
        own = {key: value for key, value in (function.parameters or {"type": "object"}).items() if key != "$id"}
        arguments = json.dumps(closed(own))
        # references count from the root of the whole schema, and an $id would make another root
        arguments = re.sub(r'("\$ref": "#)', rf"\1/anyOf/{number}/properties/arguments", arguments)
        properties = {"name": {"const": function.name}, "arguments": json.loads(arguments)}
        kinds.append({"type": "object", "properties": properties, "required": list(properties)})
        kinds[-1]["additionalProperties"] = False
    return json.dumps({"anyOf": kinds, "x-guidance": _style(any(function.strict for function in functions))})


def closed(schema: dict) -> dict:
    """Let objects hold the properties that the schema names and no others, unless it says otherwise.

    A small model invents more and more of them. A schema that is put together by allOf stays as it is.
    """
    return schema if '"allOf"' in json.dumps(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            result[key] = {name: _closed(each) for name, each in value.items()}
        else:
            result[key] = value if key in VALUES else _closed(value)
    if isinstance(schema.get("properties"), dict) and not schema.keys() & COMPOSED:
        result.setdefault("additionalProperties", False)
    return result


@functools.lru_cache(maxsize=64)
def _compile(tokenizer_file: Path, eos_id: int, vocab_size: int, source: str):
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(_tokenizer(tokenizer_file, eos_id, vocab_size), source, log_level=0, limits=limits)


@functools.lru_cache(maxsize=8)
def _tokenizer(tokenizer_file: Path, eos_id: int, vocab_size: int):
    import llguidance

    return llguidance.LLTokenizer(tokenizer_file.read_text("utf-8"), n_vocab=vocab_size, eos_token=eos_id)
