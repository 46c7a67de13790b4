"""Turn requests into prompts of token ids, and an engine's tokens into answers in OpenAI's format."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import torch

from dataset.text_stream import Piece, TextStream, ToolCall, ToolCallSplitter
from dataset.tokenization import ChatTokenizer, StreamDecoder
from model.batching import Engine, Request, Token, check_prompt
from model.generation import SamplingParams
from model.sampling import GrammarError
from scripts.openai_schema import ApiError, ChatRequest, CompletionRequest

LEAST_LOGPROB = -9999.0  # JSON has no -inf
MOST_NESTING = 100  # of tools: writing them is recursive

# --- prompts ---------------------------------------------------------------------------------------------------------


def refuse_too_long(param: str, tokens: int, context_length: int, bound: str = "") -> None:
    """Raise ApiError if a prompt of this many tokens leaves no room for an answer."""
    if tokens >= context_length:
        # the first sentence is OpenAI's, by which client libraries recognise this error
        message = f"Input tokens exceed the configured limit of {context_length} tokens. Your {param} resulted in "
        message += f"{bound}{tokens} tokens; the context holds {context_length}, answer included."
        raise ApiError(400, message, param, "context_length_exceeded")


def refuse_endless(tokenizer: ChatTokenizer, text: str, context_length: int, param: str) -> None:
    """Refuse a text that cannot fit however it is tokenized, before encoding it takes seconds and 100 MB."""
    refuse_too_long(param, len(text) // tokenizer.longest_token, context_length, "at least ")


def encode_chat(tokenizer: ChatTokenizer, body: ChatRequest, context_length: int) -> list[int]:
    """Return the ids that training would make of the conversation, and the opening of the answer."""
    refuse_endless(tokenizer, "".join(m.content or "" for m in body.messages), context_length, "messages")
    if _depth(body.offered_tools) > MOST_NESTING:
        raise ApiError(400, "tools: the parameters are nested too deeply", "tools")
    try:
        turns = [message.as_turn() for message in body.messages]
        if not tokenizer.template.is_ours:
            turns = [with_objects(turn) for turn in turns]
        return tokenizer.encode_prompt(turns, body.offered_tools)
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error


def with_objects(turn: dict) -> dict:
    """Return a turn whose calls have their arguments as objects, as templates of others expect; clients send text."""
    for call in turn.get("tool_calls", ()):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(call["function"]["arguments"])
            json.dumps(arguments, ensure_ascii=False).encode()  # no half of a character
            if isinstance(arguments, dict) and _depth(arguments) <= MOST_NESTING:
                call["function"]["arguments"] = arguments
    return turn


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        holders = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level, depth = [each for holder in holders for each in holder], depth + 1
    return depth


def encode_completion(tokenizer: ChatTokenizer, prompt: str | list[int], context_length: int) -> list[int]:
    """Return the ids to continue; a prompt of ids is taken as it is."""
    if not isinstance(prompt, str):
        return prompt
    refuse_endless(tokenizer, prompt, context_length, "prompt")
    return tokenizer.encode_beginning(prompt)


# --- answers as they are made ----------------------------------------------------------------------------------------

Delta = tuple[str, str | ToolCall]  # ("content" | "reasoning_content", text), or ("tool_calls", call)


class Choice:
    """One answer: turns its request's tokens into deltas of text and calls, until a stop string or its end.

    new_tokens: those whose log-probs have not been sent yet.
    """

    def __init__(
        self, index: int, prompt_index: int, request: Request, stream: TextStream, tools: bool, one_call: bool = False
    ):
        self.index, self.prompt_index, self.request = index, prompt_index, request
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.new_tokens: list[Token] = []
        self._stream, self._tools, self._called = stream, ToolCallSplitter() if tools else None, False
        self._one_call = one_call  # ends the answer

    def advance(self) -> list[Delta]:
        """Return what is new. Sets finish_reason at the end; raises ApiError if the engine gave up."""
        tokens, ending = self.request.take()
        deltas = []
        for token in tokens:
            self.completion_tokens += 1
            self.new_tokens.append(token)
            deltas += self._read(self._stream.push(token.id))
            if self._stream.stopped or (self._called and self._one_call):
                self.request.cancel()
                ending = "stop"
                break
        if isinstance(self.request.error, GrammarError):
            message = str(self.request.error)
            raise ApiError(400, message, message.partition(":")[0], "invalid_value")
        if ending == "error":
            raise ApiError(500, f"the answer could not be made: {self.request.error}")
        if ending == "cancelled":
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})
        if ending:
            deltas += self._read(self._stream.flush())
            deltas += self._read_calls(self._tools.flush()) if self._tools else []
            self.finish_reason = "tool_calls" if self._called and ending == "stop" else ending
        return deltas

    def _read(self, pieces: list[Piece]) -> list[Delta]:
        deltas = []
        for is_thought, text in pieces:
            if is_thought or self._tools is None:
                deltas.append(("reasoning_content" if is_thought else "content", text))
            else:
                deltas += self._read_calls(self._tools.push(text))
        return deltas

    def _read_calls(self, found: list[str | ToolCall]) -> list[Delta]:
        deltas = []
        for each in found:
            if self._called and self._one_call:
                break
            self._called |= isinstance(each, ToolCall)
            deltas.append(("tool_calls" if isinstance(each, ToolCall) else "content", each))
        return deltas


class NoAnswer:
    """A request for no tokens, which has ended from the start."""

    finish_reason, error, cached_tokens = "length", None, 0

    def __init__(self, params: SamplingParams):
        self.params = params

    def take(self) -> tuple[list[Token], str]:
        return [], self.finish_reason

    def cancel(self) -> None:
        pass


class Generation:
    """All answers to one HTTP request. `close` cancels those not done and frees their slots at once."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        stop: Sequence[str],
        split_thoughts: bool,
        tools: bool = False,
        one_call: bool = False,
        nothing: bool = False,
    ):
        """params: one for each answer to a prompt. tools: look for calls. one_call: an answer ends with its first one.

        nothing: make no tokens, only echo prompts.

        Raises QueueFull, with nothing left in the queue, and ValueError.
        """
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
                    stream = TextStream(tokenizer, stop, split_thoughts, prompt_ids=ids)
                    self.choices.append(Choice(len(self.choices), prompt_index, request, stream, tools, one_call))
        except BaseException:
            self.close()
            raise

    async def deltas(self) -> AsyncIterator[tuple[Choice, list[Delta]]]:
        """Yield (choice, what is new of it) as it comes; the choice's finish_reason is set with its last."""
        running = list(self.choices)
        while running:
            self._changed.clear()
            for choice in list(running):
                before = choice.completion_tokens
                deltas = choice.advance()
                if choice.finish_reason:
                    running.remove(choice)
                if deltas or choice.finish_reason or choice.completion_tokens > before:
                    yield choice, deltas
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
    """The completions endpoint's four lists. text_offset counts characters from the beginning of the text."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer, self._offset = tokenizer, 0
        self._shown = {False: StreamDecoder(tokenizer), True: StreamDecoder(tokenizer, skip_control=False)}

    def of(self, tokens: Sequence[Token], echoed: bool = False) -> dict:
        """echoed: these are the prompt's tokens, whose text is shown completely, control ids included."""
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
    """Return the prompt's tokens with log-probs in nats and the `top` most likely instead; the first token has none."""
    tokens, device = [Token(ids[0])], next(model.parameters()).device
    hidden_states = model.get_decoder()(input_ids=torch.tensor([ids], device=device), use_cache=False)[0][0]
    # Logits of a long prompt are the largest tensor by far: make them in parts.
    for hidden, next_ids in zip(hidden_states.split(512), torch.tensor(ids[1:]).split(512), strict=False):
        log_probs = model.get_output_embeddings()(hidden).float().log_softmax(dim=-1).cpu()
        for row, token_id in zip(log_probs, next_ids.tolist(), strict=False):
            values, top_ids = row.topk(top)
            pairs = list(zip(top_ids.tolist(), values.tolist(), strict=True))
            tokens.append(Token(token_id, float(row[token_id]), pairs))
    return tokens


def sampling_params(body: ChatRequest | CompletionRequest, defaults: SamplingParams) -> list[SamplingParams]:
    """Return the parameters of each of n answers; with a seed, the i-th has seed + i."""
    names = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty".split()
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    least = {"top_k": 0, "top_p": 1e-9}  # top_k -1: all tokens; top_p 0: the most likely token alone
    given |= {name: max(given[name], least[name]) for name in given.keys() & least}
    if isinstance(body, ChatRequest):
        longest = body.max_completion_tokens or body.max_tokens or defaults.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        longest, logprobs = body.max_tokens, body.logprobs
        longest = 16 if longest is None else max(longest, 1)
    params = replace(
        defaults, **given, max_new_tokens=longest, min_new_tokens=body.min_tokens or 0, logprobs=logprobs,
        stop_ids=() if body.ignore_eos else defaults.stop_ids,
    )  # fmt: skip
    return [replace(params, seed=None if body.seed is None else body.seed + n) for n in range(body.n or 1)]


# --- answers in OpenAI's format --------------------------------------------------------------------------------------


class ChatFormat:
    """chat.completion, and its chunks: the role first, then deltas, then the finish_reason."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: ChatTokenizer, body: ChatRequest):
        self.tokenizer, self.wants_logprobs, self.calls = tokenizer, bool(body.logprobs), {}

    def opening(self, choice: Choice) -> dict | None:
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def chunk(self, choice: Choice, deltas: list[Delta]) -> dict:
        return self._chunk(choice, self._message(choice, deltas), self.logprobs(choice))

    def whole(self, choice: Choice, deltas: list[Delta]) -> dict:
        message = {"role": "assistant", "content": None, "refusal": None} | self._message(choice, deltas)
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        for call in message.get("tool_calls", ()):
            del call["index"]
        logprobs = self.logprobs(choice)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def logprobs(self, choice: Choice) -> dict | None:
        """Return log-probs of the tokens since the last call, or None if there are none. Stop ids are not content."""
        tokens = [token for token in choice.new_tokens if token.id not in choice.request.params.stop_ids]
        choice.new_tokens = []
        return chat_logprobs(self.tokenizer, tokens) if self.wants_logprobs and tokens else None

    def _chunk(self, choice: Choice, delta: dict, logprobs: dict | None = None) -> dict:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _message(self, choice: Choice, deltas: list[Delta]) -> dict:
        message = {}
        for kind, delta in deltas:
            if kind == "tool_calls":
                number = self.calls[choice.index] = self.calls.get(choice.index, -1) + 1
                function = {"name": delta.name, "arguments": delta.arguments}
                call = {"index": number, "id": new_id("call"), "type": "function", "function": function}
                message.setdefault(kind, []).append(call)
            else:
                message[kind] = message.get(kind, "") + delta
        return message


class CompletionFormat:
    """text_completion, the same for a whole answer and for a chunk of it.

    Log-probs include the token that ends an answer: with echo and max_tokens 1 there is one more than the prompt has,
    which evaluation tools count on.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: ChatTokenizer, body: CompletionRequest, echoes: Sequence[tuple[str, list[Token]]]):
        """echoes: for each prompt, its text and its tokens with log-probs; empty if no echo is asked for."""
        self.tokenizer, self.wants_logprobs, self.echoes = tokenizer, body.logprobs is not None, echoes
        self.writers: dict[int, LegacyLogprobs] = {}

    def opening(self, choice: Choice) -> dict | None:
        if not self.echoes:
            return None
        text, tokens = self.echoes[choice.prompt_index]
        return self._choice(choice, text, self._logprobs(choice, tokens, echoed=True))

    def chunk(self, choice: Choice, deltas: list[Delta]) -> dict:
        tokens, choice.new_tokens = choice.new_tokens, []
        return self._choice(choice, "".join(text for _, text in deltas), self._logprobs(choice, tokens))

    def whole(self, choice: Choice, deltas: list[Delta]) -> dict:
        prompt = self.opening(choice) or {"text": "", "logprobs": None}
        answer = self.chunk(choice, deltas)
        given = [logprobs for logprobs in (prompt["logprobs"], answer["logprobs"]) if logprobs]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {name: [item for each in given for item in each[name]] for name in names}
        return answer | {
            "text": prompt["text"] + answer["text"],
            "logprobs": logprobs if self.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, choice: Choice, tokens: list[Token], echoed: bool = False) -> dict | None:
        if not self.wants_logprobs or not tokens:
            return None
        return self.writers.setdefault(choice.index, LegacyLogprobs(self.tokenizer)).of(tokens, echoed)

    def _choice(self, choice: Choice, text: str, logprobs: dict | None) -> dict:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
