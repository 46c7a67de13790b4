"""Structured output: response_format and enforced tool calls as grammars that an answer has to follow.

llguidance turns a JSON schema into the set of tokens that may come next.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
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
# keys that extend what stands in a composed one
EXTENDING = COMPOSED | {
    "properties", "additionalProperties", "required", "minProperties", "multipleOf", "items", "prefixItems",
}  # fmt: skip
# what llguidance compiles within about a second
MOST_PROPERTIES = 2000
MOST_MULTIPLES = 10_000
Ready = Callable[[dict, bool | None], dict]  # (schema, strict) -> the schema to compile


class Grammar:
    """One answer's position in its grammar; the engine asks it for the tokens that may come next."""

    def __init__(self, matcher, param: str):
        self._matcher, self._param = matcher, param

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Return a mask (vocab,) of the tokens that may come; once the text is complete, those that end an answer."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise GrammarError(f"{self._param}: the schema is too complex: {self._matcher.get_error()}")
        mask = np.zeros(vocab_size, dtype=bool)
        mask[: len(bits)] = bits[:vocab_size]
        return torch.from_numpy(mask)

    def advance(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)


def make_grammar(model: LoadedModel, body: ChatRequest) -> Callable[[], Grammar] | None:
    """Return what makes a Grammar for each answer to this request; None if it may say anything.

    Compiling may take a second: equal schemas are compiled once if one thread calls this. Raises ApiError if the schema
    is wrong, or if llguidance is not installed.
    """
    if not body.is_held:
        return None
    tokenizer, vocab_size = model.tokenizer, model.engine.model.config.vocab_size
    param = "tool_choice" if body.enforced_tools else "response_format" if body.is_json else "tools"
    for patterns in (True, False):  # which may be of kinds that llguidance does not know
        try:
            refuse_impossible(body, param)
            readies = [functools.partial(_ready, patterns=patterns, close=close) for close in (False, True)]
            sources = dict.fromkeys(_source(body, tokenizer, ready) for ready in readies)
            matchers = [_compile(tokenizer.json, tokenizer.eos_id, vocab_size, source) for source in sources]
        except RecursionError as error:
            raise ApiError(400, "the schema is nested too deeply", code="invalid_value") from error
        except ImportError as error:
            message = f"{param} needs the llguidance package where the server runs: pip install llguidance"
            raise unsupported(param, message) from error
        except (ValueError, TypeError, LookupError) as error:
            raise unsupported(param, f"{param}: llguidance cannot read this model's tokenizer: {error}") from error
        held = [matcher for matcher in matchers if not matcher.is_error()]
        # closed, branches of oneOf that overlap would seem to differ
        if held and not ('"oneOf"' in "".join(sources) and matchers[0].is_error()):
            return lambda: Grammar(held[-1].deep_copy(), param)
    message = re.split(r"<backtrace>|\n *1 \| start", matchers[0].get_error())[0]  # what follows shows the grammar
    message = " ".join(message.split()).rpartition("JSON schema: ")[2]
    raise ApiError(400, f"{param}: {message}", param, "invalid_value")


def _source(body: ChatRequest, tokenizer: ChatTokenizer, ready: Ready) -> str:
    tools, several = body.enforced_tools or body.functions, body.parallel_tool_calls is not False
    opening, closing = (_tag(tokenizer, tag) for tag in (ToolCallSplitter.OPEN, ToolCallSplitter.CLOSE))
    named = "\ncalled: " + " | ".join(_call(function, ready) for function in tools)
    call = f'call: {opening} "\\n" called "\\n" {closing}{named}'
    if body.enforced_tools:
        return f"start: call\n{call}"
    answer = _answer(body, ready)
    if answer and tools:  # calls, or the answer
        more = ' ("\\n" call)*' if several else ""
        return f"start: call{more} | answer\n{call}\nanswer: {answer}"
    if not answer:
        # free text, in which a tool call follows the schema; to llguidance, tags that are tokens may be no text
        tags = [f"<[{number}]>" for number in tokenizer.tag_ids if f"<[{number}]>" != opening]
        source = (
            f"start: call{'*' if several else '?'} text\ntext: ({' | '.join(['TEXT', *tags])})*\nTEXT: /(.|\\n)+/\n"
        )
        source += f'call: text call_opening "\\n" called "\\n" {closing}{named}\n'
        source += f"call_opening: spelled | {opening}\n" if opening.startswith("<") else "call_opening: spelled\n"
        return source + f"spelled[lazy]: /(.|\\n)*{ToolCallSplitter.OPEN}/"
    return f"start: {answer}"


def _answer(body: ChatRequest, ready: Ready) -> str:
    """Return the grammar of response_format; "" if the answer is free."""
    asked = body.response_format
    if not asked or asked.type == "text":
        return ""
    if asked.type == "json_object":
        return _json({"type": "object"})
    return _json(ready(asked.json_schema.definition, asked.json_schema.strict), asked.json_schema.strict)


def _json(schema: dict, strict: bool | None = False) -> str:
    """Return the grammar of a schema. Only a strict schema is refused for what llguidance does not know in it."""
    return f"%json {json.dumps(schema | {'x-guidance': JSON_STYLE | {'lenient': not strict}})}"


def _ready(schema: dict, strict: bool | None, patterns: bool, close: bool) -> dict:
    """Return the schema to compile. patterns: False leaves them out unless it is strict."""
    schema = schema if strict or patterns else _without_patterns(schema)
    return closed(schema) if close else schema


def refuse_impossible(body: ChatRequest, param: str) -> None:
    """Raise ApiError for calls that are not objects, and for what llguidance takes many seconds and GB to compile."""
    for function in body.functions:
        if "object" not in str((function.parameters or {}).get("type", "object")):
            message = f"{param}: the parameters of {function.name} must be of type object"
            raise ApiError(400, message, param, "invalid_value")
    asked = body.response_format and body.response_format.json_schema
    schemas = [asked and asked.definition, *(function.parameters for function in body.functions)]
    objects = list(_objects(schemas))
    count = sum(len(each["properties"]) for each in objects if isinstance(each.get("properties"), dict))
    if count > MOST_PROPERTIES:
        message = f"{param}: the schema names {count} properties, and at most {MOST_PROPERTIES} are taken"
        raise ApiError(400, message, param, "invalid_value")
    numbers = [each["multipleOf"] for each in objects if type(each.get("multipleOf")) in (int, float)]
    # llguidance refuses others
    multiples = {Fraction(str(number)).numerator for number in numbers if 0 < number < 2**32}
    if _extended(objects):  # one number may have to obey several
        multiples = {math.lcm(*multiples)}
    if sum(min(each, 1000) if len(str(each).rstrip("0")) <= 2 else each for each in multiples) > MOST_MULTIPLES:
        message = f"{param}: the numbers of multipleOf add up to more than {MOST_MULTIPLES}, or have such a multiple"
        raise ApiError(400, message, param, "invalid_value")


def _extended(objects: Iterable[dict]) -> bool:
    """Return whether schemas hold one that is put together, by allOf or next to keys of its own."""
    return any("allOf" in each or (each.keys() & COMPOSED and len(each.keys() & EXTENDING) > 1) for each in objects)


def _objects(value: Any) -> Iterator[dict]:
    """Yield all objects in a value."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(each)


def _tag(tokenizer: ChatTokenizer, tag: str) -> str:
    """Return a tag in llguidance's grammar: its id if it is one token, else its text."""
    ids = tokenizer.encode_contents([tag])[0]
    return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(tag)


def _call(function: Function, ready: Ready) -> str:
    """Return the grammar of a call's JSON."""
    own = {key: value for key, value in (function.parameters or {}).items() if key != "$id"}
    arguments = json.dumps(ready(own | {"type": "object"}, function.strict))
    # references count from the root of the whole schema, and an $id would make another root
    arguments = re.sub(r'("\$ref": "#)(?=[/"])', r"\1/properties/arguments", arguments)
    properties = {"name": {"const": function.name}, "arguments": json.loads(arguments)}
    call = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return _json(call, function.strict)


def closed(schema: dict) -> dict:
    """Let objects hold the properties that the schema names and no others, unless it says otherwise.

    A small model invents more and more of them. A schema with an object that is put together stays as it is.
    """
    return schema if _extended(_objects(schema)) else _each_schema(schema, _close)


def _close(schema: dict) -> dict:
    names, required = schema.get("properties"), schema.get("required")
    if isinstance(names, dict) and (not isinstance(required, list) or set(map(str, required)) <= names.keys()):
        return {"additionalProperties": False} | schema
    return schema


def _without_patterns(schema: dict) -> dict:
    return _each_schema(schema, lambda each: {key: value for key, value in each.items() if key != "pattern"})


def _each_schema(schema: Any, change: Callable[[dict], dict]) -> Any:
    if isinstance(schema, list):
        return [_each_schema(each, change) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            result[key] = {name: _each_schema(each, change) for name, each in value.items()}
        else:
            result[key] = value if key in VALUES else _each_schema(value, change)
    return change(result)


@functools.lru_cache(maxsize=64)
def _compile(tokenizer_json: str, eos_id: int, vocab_size: int, source: str):
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(_tokenizer(tokenizer_json, eos_id, vocab_size), source, log_level=0, limits=limits)


@functools.lru_cache(maxsize=8)
def _tokenizer(tokenizer_json: str, eos_id: int, vocab_size: int):
    import llguidance

    # To llguidance, added tokens are not text. Tags become ordinary tokens, so that JSON may hold them, except those
    # that would end a call in the middle of its arguments.
    content = json.loads(tokenizer_json)
    calls = (ToolCallSplitter.OPEN, ToolCallSplitter.CLOSE)
    tags = [token for token in content["added_tokens"] if not token["special"] and token["content"] not in calls]
    content["added_tokens"] = [token for token in content["added_tokens"] if token not in tags]
    content["model"]["vocab"] |= {tag["content"]: tag["id"] for tag in tags}
    return llguidance.LLTokenizer(json.dumps(content), n_vocab=vocab_size, eos_token=eos_id)
