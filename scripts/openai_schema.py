"""The requests that clients may send to the server, in OpenAI's words, and the errors for all others.

Unknown fields are ignored, as OpenAI-compatible servers do. Fields that would change the answer and are not supported
are refused by name. Lists stop at their first error: a body of half a million errors would take seconds to describe.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from dataset.lm_dataset import joined_parts

MOST_TOOLS = 128
NO_LIMIT = 2**31 - 1  # tokens: what max_tokens -1 means to local servers; the context ends the answer
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ROLES = ("system", "developer", "user", "assistant", "tool")
# fields that would change the answer
UNSUPPORTED = dict.fromkeys(("logit_bias", "suffix"), "it is not supported") | {
    "best_of": "n gives several answers",
    "modalities": "the model writes text only",
    "functions": "use tools and tool_choice instead",
    "function_call": "use tools and tool_choice instead",
}


class ApiError(Exception):
    """Becomes {"error": {"message", "type", "param", "code"}} with this status."""

    TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else self.TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, param, "unsupported_parameter")


def whole_number(value: Any) -> Any:
    """Turn 3.0, as some clients write it, into 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def answer_length(value: Any) -> Any:
    return NO_LIMIT if whole_number(value) == -1 and not isinstance(value, bool) else whole_number(value)


Int = Annotated[int, BeforeValidator(whole_number)]
Length = Annotated[int, BeforeValidator(answer_length)]


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class FunctionCall(Part):
    name: str
    arguments: str = "{}"


class ToolCallMessage(Part):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    role: Literal[ROLES]
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def join_parts(cls, content: Any) -> Any:
        return joined_parts(content, "") if isinstance(content, list) else content

    @model_validator(mode="after")
    def has_content(self):
        says_more = self.role == "assistant" and (self.tool_calls or self.reasoning_content is not None)
        if self.content is None and not says_more:
            raise ValueError(f"a message of role {self.role!r} needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        return self

    def as_turn(self) -> dict:
        """Return the turn that training makes of a record like this message."""
        turn = {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}
        if self.role == "assistant" and self.reasoning_content is not None:
            turn["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            calls = [call.function.model_dump() for call in self.tool_calls]
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return turn


class Function(Part):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class JsonSchema(Part):
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema, with a schema in it")
        return self


class StreamOptions(Part):
    include_usage: bool | None = False


class Sampling(Part):
    """Fields that both endpoints take. None: the server's default."""

    model: Annotated[str, Field(max_length=1000)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=128)] | None = 1
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str], Field(fail_fast=True)] | None = None
    max_tokens: Annotated[Length, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = False
    min_tokens: Annotated[Int, Field(ge=0)] | None = 0

    @field_validator("stop", mode="before")
    @classmethod
    def one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def few_and_not_empty(cls, stop: list[str] | None) -> list[str] | None:
        if stop and len(stop) > 4:
            raise ValueError(f"{len(stop)} stop strings, and at most 4 are taken")
        if stop and not all(stop):
            raise ValueError("an empty stop string ends every text before it begins")
        return stop

    @model_validator(mode="after")
    def supported(self):
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only taken with stream: true", "stream_options")
        return self


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[Length, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def chat_supported(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.enforced_tools:
            raise ApiError(400, "tool_choice names a tool that is not among tools", "tool_choice", "invalid_value")
        return self

    @property
    def functions(self) -> list[Function]:
        """Return the functions that the answer may call."""
        return [tool.function for tool in self.tools or () if self.tool_choice != "none"]

    @property
    def enforced_tools(self) -> list[Function]:
        """Return the functions of which the answer must call one; [] if it need not call any."""
        if isinstance(self.tool_choice, Tool):
            return [function for function in self.functions if function.name == self.tool_choice.function.name]
        return self.functions if self.tool_choice == "required" else []

    @property
    def is_json(self) -> bool:
        """Return whether the answer is JSON or calls from its beginning, without thoughts."""
        return bool(self.enforced_tools or (self.response_format and self.response_format.type != "text"))

    @property
    def is_held(self) -> bool:
        """Return whether the answer has to follow a grammar."""
        return self.is_json or any(function.strict for function in self.functions)

    @property
    def offered_tools(self) -> list[dict]:
        """Return the tools as the chat template takes them."""
        tools = self.tools if self.functions else []
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


class CompletionRequest(Sampling):
    prompt: Annotated[
        list[str | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]], Field(fail_fast=True)
    ]  # fmt: skip
    max_tokens: Annotated[Length, Field(ge=0)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def several(cls, prompt: Any) -> Any:
        """Make a list of prompts of one text, several, ids, or lists of ids."""
        single = isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        )
        return [prompt] if single else prompt

    @model_validator(mode="after")
    def completion_supported(self):
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list", "prompt")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens 0 is only taken with echo: true", "max_tokens")
        return self


def parse(schema: type[Sampling], raw: bytes, max_messages: int = 1000) -> Sampling:
    """Read a request from its body. Raises ApiError 400, which names the first field that is wrong."""
    try:
        content = json.loads(raw.decode("utf-8-sig"))  # given bytes, json would let surrogates pass
        if SURROGATE.search(raw):
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half of a character: a surrogate without its partner") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    harmless = {"best_of": content.get("n") or 1, "modalities": ["text"]}
    for name, message in UNSUPPORTED.items():
        if content.get(name) and content[name] != harmless.get(name):
            raise unsupported(name, f"{name}: {message}")
    if isinstance(content.get("messages"), list) and len(content["messages"]) > max_messages:
        message = f"{len(content['messages'])} messages, and at most {max_messages} are taken"
        raise ApiError(400, message, "messages", "too_many_messages")
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        names = schema.model_fields.keys()
        place = [str(key) for key in first["loc"]]
        param = ".".join(place) if place and place[0] in names else None
        message = first["msg"].removeprefix("Value error, ")
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        raise ApiError(400, f"{param}: {message}" if param else message, param, code) from error
