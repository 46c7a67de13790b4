"""From a request to prompts of token ids, and from the tokens of an engine to answers in OpenAI's words."""

import asyncio
import functools
import json
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import jinja2
import torch

from dataset.text_stream import TextStream, ToolCall, ToolCallSplitter
from dataset.tokenization import ChatTokenizer, StreamDecoder
from model.batching import Engine, Request, Token, check_prompt
from model.generation import SamplingParams
from scripts.openai_schema import ApiError, ChatRequest, CompletionRequest

LEAST_LOGPROB = -9999.0  # JSON has no -inf

# --- prompts ---------------------------------------------------------------------------------------------------------


def encode_chat(tokenizer: ChatTokenizer, body: ChatRequest) -> list[int]:
    """The ids that training would make of the conversation, and the opening of the answer."""
    tools = body.offered_tools
    messages = [message.model_dump(include={"role", "content", "tool_calls"}) for message in body.messages]
    for message in messages:
        message["content"] = message["content"] or ""
        message["role"] = "system" if message["role"] == "developer" else message["role"]
    if tools or any(message["tool_calls"] for message in messages):
        messages = render_tools(tokenizer, messages, tools)
    return tokenizer.encode_prompt(messages)


def render_tools(tokenizer: ChatTokenizer, messages: list[dict], tools: list[dict]) -> list[dict]:
    """The turns as the tokenizer's chat template writes them, tools and tool calls inside the contents.

    The template gives one text, in which a content that holds a control string would look like the end of a turn. So
    these are spelled otherwise while the template runs, and put back before the contents are encoded, as text.
    """
    bos, eos = (tokenizer.token_bytes(i, skip_control=False).decode() for i in (tokenizer.bos_id, tokenizer.eos_id))
    spelled = {control: f"({secrets.token_hex(8)})" for control in (bos, eos)}
    try:
        given = json.dumps([messages, tools], ensure_ascii=False)
        for control, spelling in spelled.items():
            given = given.replace(control, spelling)
        messages, tools = json.loads(given)
        text = _template_reader(tokenizer.path).apply_chat_template(messages, tools=tools or None, tokenize=False)
    except RecursionError as error:  # nothing else in a conversation can be nested
        raise ApiError(400, "tools: the parameters are nested too deeply", "tools") from error
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise ApiError(400, f"the chat template cannot write this conversation: {error}", "messages") from error
    turns = re.findall(f"{re.escape(bos)}(\\w+)\n(.*?){re.escape(eos)}", text, re.DOTALL)
    for control, spelling in spelled.items():
        turns = [(role, content.replace(spelling, control)) for role, content in turns]
    return [{"role": role, "content": content} for role, content in turns]


@functools.lru_cache(maxsize=8)
def _template_reader(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_completion(tokenizer: ChatTokenizer, prompt: str | list[int]) -> list[int]:
    """Raw text begins with bos, as pretraining documents do; ids are taken as they are."""
    if not isinstance(prompt, str):
        return prompt
    ids = tokenizer.encode_documents([prompt])[0]
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


# --- answers as they are made ----------------------------------------------------------------------------------------

Part = tuple[str, str | ToolCall]  # ("content" | "reasoning_content", text), or ("tool_calls", call)


class Choice:
    """One answer: what its request brings, turned into parts of text and calls, until a stop string or its end."""

    def __init__(self, index: int, prompt_index: int, request: Request, stream: TextStream, tools: bool):
        self.index, self.prompt_index, self.request = index, prompt_index, request
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.shown_tokens: list[Token] = []  # for log-probs: those that are text; the one that ends the answer is not
        self._stream, self._tools, self._called = stream, ToolCallSplitter() if tools else None, False

    def advance(self) -> list[Part]:
        """What is new. Sets finish_reason at the end; ApiError where the engine gave up."""
        ending, error = self.request.finish_reason, self.request.error  # before take, or the last token could be lost
        pieces = []
        for token in self.request.take():
            self.completion_tokens += 1
            if token.id not in self.request.params.stop_ids:
                self.shown_tokens.append(token)
            pieces += self._stream.push(token.id)
            if self._stream.stopped:
                self.request.cancel()
                ending = "stop"
                break
        if ending == "error":
            raise ApiError(500, f"the answer could not be made: {error}")
        if ending == "cancelled":
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if ending:
            pieces += self._stream.flush()
        parts = []
        for is_thought, text in pieces:
            if is_thought or self._tools is None:
                parts.append(("reasoning_content" if is_thought else "content", text))
            else:
                parts += self._read_calls(self._tools.push(text))
        if ending:
            parts += self._read_calls(self._tools.flush()) if self._tools else []
            self.finish_reason = "tool_calls" if self._called and ending == "stop" else ending
        return parts

    def _read_calls(self, found: list[str | ToolCall]) -> list[Part]:
        self._called |= any(isinstance(part, ToolCall) for part in found)
        return [("tool_calls" if isinstance(part, ToolCall) else "content", part) for part in found]


class NoAnswer:
    """A request for no tokens: it has ended at once."""

    finish_reason, error, cached_tokens = "length", None, 0

    def __init__(self, params: SamplingParams):
        self.params = params

    def take(self) -> list[Token]:
        return []

    def cancel(self) -> None:
        pass


class Generation:
    """All answers to one HTTP request. `close` cancels what is not done; the slots are free at once."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        stop: Sequence[str],
        is_chat: bool,
        tools: bool = False,
        nothing: bool = False,
    ):
        """params: one for each answer to a prompt. nothing: no tokens are made, only prompts echoed. Raises QueueFull,
        with nothing left in the queue, and ValueError."""
        self.prompts, self.choices, self._changed = prompts, [], asyncio.Event()
        loop = asyncio.get_running_loop()

        def notify() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        if nothing:  # else the engine checks them
            for ids in prompts:
                check_prompt(ids, engine.context_length, engine.model.config.vocab_size)
        try:
            for prompt_index, ids in enumerate(prompts):
                for each in params:
                    request = NoAnswer(each) if nothing else engine.submit(ids, each, notify)
                    stream = TextStream(tokenizer, stop, split_thoughts=is_chat)
                    self.choices.append(Choice(len(self.choices), prompt_index, request, stream, tools))
        except BaseException:
            self.close()
            raise

    async def parts(self) -> AsyncIterator[tuple[Choice, list[Part]]]:
        """(choice, what is new of it), as it comes; finish_reason stands in a choice's last one."""
        running = list(self.choices)
        while running:
            self._changed.clear()
            for choice in list(running):
                before = choice.completion_tokens
                parts = choice.advance()
                if choice.finish_reason:
                    running.remove(choice)
                if parts or choice.finish_reason or choice.completion_tokens > before:
                    yield choice, parts
            if running:
                await self._changed.wait()

    def close(self) -> None:
        for choice in self.choices:
            choice.request.cancel()

    def usage(self) -> dict:
        first = {choice.prompt_index: choice.request for choice in reversed(self.choices)}
        prompt_tokens = sum(map(len, self.prompts))
        completion_tokens = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in first.values())},
        }


# --- log-probs -------------------------------------------------------------------------------------------------------


def chat_logprobs(tokenizer: ChatTokenizer, tokens: Sequence[Token]) -> dict:
    def entry(token_id: int, logprob: float) -> dict:
        raw = tokenizer.token_bytes(token_id, skip_control=False)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]} for token in tokens
    ]
    return {"content": content}


class LegacyLogprobs:
    """The completions endpoint's four lists; text_offset counts characters from the beginning of the text."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer, self._offset = tokenizer, 0
        self._shown = {False: StreamDecoder(tokenizer), True: StreamDecoder(tokenizer, skip_control=False)}

    def of(self, tokens: Sequence[Token], echoed: bool = False) -> dict:
        """echoed: the tokens are the prompt's, of which all text is shown, that of control ids too."""
        result = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            known = token.logprob is not None  # the very first token has none
            top = {self._text(i): max(logprob, LEAST_LOGPROB) for i, logprob in token.top} if known else None
            result["tokens"].append(self._text(token.id))
            result["token_logprobs"].append(max(token.logprob, LEAST_LOGPROB) if known else None)
            result["top_logprobs"].append(top)
            result["text_offset"].append(self._offset)
            self._offset += len(self._shown[echoed].push(token.id))
        return result

    def _text(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id, skip_control=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@torch.inference_mode()
def prompt_log_probs(model: torch.nn.Module, ids: list[int], top: int) -> list[Token]:
    """The prompt's tokens with their log-probs in nats, and the likeliest at their places; the first has none."""
    tokens, device = [Token(ids[0])], next(model.parameters()).device
    hidden_states = model.get_decoder()(input_ids=torch.tensor([ids], device=device), use_cache=False)[0][0]
    # logits of a long prompt are the largest tensor by far, and not needed at once
    for hidden, next_ids in zip(hidden_states.split(512), torch.tensor(ids[1:]).split(512), strict=False):
        log_probs = model.get_output_embeddings()(hidden).float().log_softmax(dim=-1).cpu()
        for row, token_id in zip(log_probs, next_ids.tolist(), strict=False):
            values, top_ids = row.topk(top)
            pairs = list(zip(top_ids.tolist(), values.tolist(), strict=True))
            tokens.append(Token(token_id, float(row[token_id]), pairs))
    return tokens


def sampling_params(body: ChatRequest | CompletionRequest, defaults: SamplingParams) -> list[SamplingParams]:
    """For each of n answers; with a seed, the i-th has seed + i."""

    def given(name: str):
        value = getattr(body, name)
        return getattr(defaults, name) if value is None else value

    if isinstance(body, ChatRequest):
        longest = body.max_completion_tokens or body.max_tokens or defaults.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        longest, logprobs = body.max_tokens, body.logprobs
        longest = 16 if longest is None else max(longest, 1)
    n, seed = body.n or 1, body.seed
    return [
        SamplingParams(
            temperature=given("temperature"),
            top_k=max(given("top_k"), 0),
            top_p=max(given("top_p"), 1e-9),  # 0 is the likeliest token alone
            min_p=given("min_p"),
            repetition_penalty=given("repetition_penalty"),
            presence_penalty=given("presence_penalty"),
            frequency_penalty=given("frequency_penalty"),
            max_new_tokens=longest,
            stop_ids=defaults.stop_ids,
            seed=None if seed is None else seed + index,
            logprobs=logprobs,
        )
        for index in range(n)
    ]


# --- answers in OpenAI's words ---------------------------------------------------------------------------------------


class ChatFormat:
    """chat.completion, and its chunks: the role first, then deltas, then the finish_reason."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: ChatTokenizer, body: ChatRequest):
        self.tokenizer, self.wants_logprobs, self.calls = tokenizer, bool(body.logprobs), {}

    def opening(self, choice: Choice) -> dict | None:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def chunk(self, choice: Choice, parts: list[Part]) -> dict:
        return self._chunk(choice, self._message(choice, parts), self.logprobs(choice))

    def ending(self, choice: Choice) -> dict:
        return self._chunk(choice, {}, self.logprobs(choice)) | {"finish_reason": choice.finish_reason}

    def whole(self, choice: Choice, parts: list[Part]) -> dict:
        message = {"role": "assistant", "content": None} | self._message(choice, parts)
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        for call in message.get("tool_calls", ()):
            del call["index"]
        logprobs = self.logprobs(choice)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def logprobs(self, choice: Choice) -> dict | None:
        """Of the tokens since the last call; None where there are none."""
        tokens, choice.shown_tokens = choice.shown_tokens, []
        return chat_logprobs(self.tokenizer, tokens) if self.wants_logprobs and tokens else None

    def _chunk(self, choice: Choice, delta: dict, logprobs: dict | None = None) -> dict:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _message(self, choice: Choice, parts: list[Part]) -> dict:
        message = {}
        for kind, part in parts:
            if kind == "tool_calls":
                number = self.calls[choice.index] = self.calls.get(choice.index, -1) + 1
                function = {"name": part.name, "arguments": part.arguments}
                call = {"index": number, "id": new_id("call"), "type": "function", "function": function}
                message.setdefault(kind, []).append(call)
            else:
                message[kind] = message.get(kind, "") + part
        return message


class CompletionFormat:
    """text_completion, which is the same for a whole answer and for a chunk of it."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: ChatTokenizer, body: CompletionRequest, echoes: Sequence[tuple[str, list[Token]]]):
        """echoes: for each prompt, its text and its tokens with log-probs; empty where it is not asked for."""
        self.tokenizer, self.wants_logprobs, self.echoes = tokenizer, body.logprobs is not None, echoes
        self.writers: dict[int, LegacyLogprobs] = {}

    def opening(self, choice: Choice) -> dict | None:
        if not self.echoes:
            return None
        text, tokens = self.echoes[choice.prompt_index]
        return self._choice(choice, text, self._logprobs(choice, tokens, echoed=True))

    def chunk(self, choice: Choice, parts: list[Part]) -> dict:
        return self._choice(choice, "".join(text for _, text in parts), self._new_logprobs(choice))

    def ending(self, choice: Choice) -> dict:
        return self._choice(choice, "", self._new_logprobs(choice)) | {"finish_reason": choice.finish_reason}

    def whole(self, choice: Choice, parts: list[Part]) -> dict:
        prompt = self.opening(choice) or {"text": "", "logprobs": None}
        answer = self.chunk(choice, parts)
        given = [logprobs for logprobs in (prompt["logprobs"], answer["logprobs"]) if logprobs]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {name: [item for each in given for item in each[name]] for name in names}
        return answer | {
            "text": prompt["text"] + answer["text"],
            "logprobs": logprobs if self.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _new_logprobs(self, choice: Choice) -> dict | None:
        tokens, choice.shown_tokens = choice.shown_tokens, []
        return self._logprobs(choice, tokens)

    def _logprobs(self, choice: Choice, tokens: list[Token], echoed: bool = False) -> dict | None:
        """None where there are none."""
        if not self.wants_logprobs or not tokens:
            return None
        return self.writers.setdefault(choice.index, LegacyLogprobs(self.tokenizer)).of(tokens, echoed)

    def _choice(self, choice: Choice, text: str, logprobs: dict | None) -> dict:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
