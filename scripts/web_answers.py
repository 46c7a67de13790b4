"""Sources of the web page's answers: a model in this process, or an OpenAI-compatible server.

`start` returns at once; the Run is a thread that fills in the Answer, whatever the page does meanwhile: a visitor may
reload it or close it. `cancel` ends the answer and keeps what there is.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import openai

from dataset.text_stream import TextStream, ThoughtSplitter, ToolCall, ToolCallSplitter
from dataset.tokenization import ChatTokenizer
from model.batching import Engine, QueueFull
from model.flags import HISTORY_MESSAGES
from model.loading import SHARED_FLAGS
from model.sampling import SamplingParams
from scripts.openai_client import explain, new_client
from scripts.web_conversation import CUT, FAILED, STOPPED, Answer

PUT_AWAY = "This model was put away to make room for another. Ask again."
KEY_CURE = "enter it in the sidebar"
API_TIMEOUT = 300.0  # seconds without a sign of life
LONGEST = 100_000  # characters of an answer: a server may go on forever, and a browser draws all of it
SHOWN_EVERY = 0.05  # seconds; joining the text for every token would take the square of its length


@dataclass(frozen=True)
class Settings:
    temperature: float = SHARED_FLAGS["temperature"]["default"]
    top_p: float = SHARED_FLAGS["top_p"]["default"]
    max_tokens: int = SHARED_FLAGS["max_new_tokens"]["default"]
    history_turns: int = HISTORY_MESSAGES // 2
    system: str = ""


class Run(threading.Thread):
    """Fills in an answer. Only this thread writes to it, and it calls `ended` at the end."""

    def __init__(self, answer: Answer, ended: Callable[[], None]):
        super().__init__(name="answer", daemon=True)
        self.answer, self._ended, self._cancelled = answer, ended, False
        self._texts: dict[bool, list[str]] = {False: [], True: []}  # by whether they are thoughts
        self._length, self._shown, self._first_token, self._calls = 0, 0.0, 0.0, ToolCallSplitter()

    def run(self) -> None:
        try:
            ending, error = self._read()
        except Exception as failure:  # whatever a server sends, the answer must come to its end
            ending, error = self._explain(failure)
        self._show()
        self.answer.error, self.answer.ending = error, ending
        self._ended()

    def _read(self) -> tuple[str, str]:
        """Pass pieces to _add; return how the answer ended, and an error or ""."""
        raise NotImplementedError

    def _explain(self, failure: Exception) -> tuple[str, str]:
        return FAILED, str(failure) if type(failure) is ValueError else f"The model failed: {failure}"

    def _count(self, tokens: int) -> None:
        """Count tokens; the rate starts at the first one, because waiting and reading the prompt are not generation."""
        now = time.perf_counter()
        self._first_token = self._first_token or now
        seconds = now - self._first_token
        self.answer.tokens = tokens
        self.answer.tokens_per_second = (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0

    def _add(self, is_thought: bool, text: str) -> None:
        for part in [text] if is_thought else self._calls.push(text):
            self._add_part(is_thought, part)
        if time.perf_counter() - self._shown > SHOWN_EVERY:
            self._show()

    def _add_part(self, is_thought: bool, part: str | ToolCall) -> None:
        if isinstance(part, ToolCall):
            self.answer.calls.append(part._asdict())
        else:
            self._texts[is_thought].append(part)
            self._limit(part)

    def _limit(self, part: str) -> None:
        self._length += len(part)
        if self._length > LONGEST:
            raise ValueError(f"The answer was cut: it has more than {LONGEST:,} characters.")

    def _show(self) -> None:
        for is_thought, name in ((False, "text"), (True, "thought")):
            setattr(self.answer, name, "".join(self._texts[is_thought])[:LONGEST])
        self._shown = time.perf_counter()

    def _flush(self, pieces: list[tuple[bool, str]]) -> None:
        for piece in pieces:
            self._add(*piece)
        for part in self._calls.flush():
            self._add_part(False, part)


# --- a model in this process -----------------------------------------------------------------------------------------


@dataclass
class LocalModel:
    """An engine with its tokenizer."""

    name: str
    engine: Engine
    tokenizer: ChatTokenizer
    continues: bool = False  # pretrained weights, which continue a text and know no turns
    split_thoughts: bool = False
    warning: str = ""  # what its loader had to say
    examples: Sequence[str] = ()  # prompts to try it with

    def close(self) -> None:
        self.engine.close()

    def start(
        self, answer: Answer, messages: list[dict], settings: Settings, ended: Callable[[], None] = lambda: None
    ) -> "LocalRun":
        """Start an answer. Raises ValueError with a key of web_words.json if it is too long or the engine is busy."""
        answer.model, answer.continues = self.name, self.continues
        ids = self._encode(answer, messages, settings.max_tokens)
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_tokens,
            stop_ids=(self.tokenizer.eos_id, self.tokenizer.pad_id),
            seed=random.SystemRandom().randrange(2**31),
        )
        try:
            request = self.engine.submit(ids, params)
        except QueueFull as error:
            raise ValueError("busy", error) from error
        except RuntimeError as error:  # it was closed to make room for another model
            raise ValueError(PUT_AWAY) from error
        return LocalRun(
            answer, ended, request, TextStream(self.tokenizer, split_thoughts=self.split_thoughts, prompt_ids=ids)
        )

    def _encode(self, answer: Answer, messages: list[dict], max_tokens: int) -> list[int]:
        """Return the ids to continue, without the oldest turns if these would leave an answer too little room."""
        if self.continues:
            return self.tokenizer.encode_beginning(messages[-1]["content"])
        context = self.engine.context_length
        ids, left_out = self.tokenizer.encode_fitting(messages, context, max_tokens)
        answer.left_out = left_out // 2
        if len(ids) >= context:
            raise ValueError("too_long", len(ids), context)
        return ids


class LocalRun(Run):
    def __init__(self, answer: Answer, ended: Callable[[], None], request, stream: TextStream):
        super().__init__(answer, ended)
        self._request, self._stream = request, stream
        self.start()

    def _read(self) -> tuple[str, str]:
        for token in self._request:
            self._count(self.answer.tokens + 1)
            for piece in self._stream.push(token.id):
                self._add(*piece)
        self._flush(self._stream.flush())
        ending = self._request.finish_reason
        return (FAILED, PUT_AWAY) if ending == STOPPED and not self._cancelled else (ending, "")

    def cancel(self) -> None:
        self._cancelled = True
        self._request.cancel()


# --- a server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ApiModel:
    """A model behind an OpenAI-compatible server. api_key may be empty: many local servers ask for none."""

    base_url: str
    api_key: str
    name: str

    def start(
        self, answer: Answer, messages: list[dict], settings: Settings, ended: Callable[[], None] = lambda: None
    ) -> "ApiRun":
        answer.model = self.name
        return ApiRun(answer, ended, self, messages, settings)


class ApiRun(Run):
    """Reads the server's stream in an event loop of its own, so that it can be stopped before anything has come."""

    def __init__(
        self, answer: Answer, ended: Callable[[], None], model: ApiModel, messages: list[dict], settings: Settings
    ):
        super().__init__(answer, ended)
        self._model, self._messages, self._settings = model, messages, settings
        self._loop, self._splitter = asyncio.new_event_loop(), ThoughtSplitter()
        self._task = self._loop.create_task(self._stream())
        self.start()

    def cancel(self) -> None:
        """Drop the connection, which tells the server to stop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the answer has ended
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _read(self) -> tuple[str, str]:
        try:
            return self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            return STOPPED, ""
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _explain(self, failure: Exception) -> tuple[str, str]:
        return FAILED, explain(failure, self._model.base_url, KEY_CURE)

    async def _stream(self) -> tuple[str, str]:
        settings, ending, calls = self._settings, "", {}
        async with api_client(openai.AsyncOpenAI, self._model.base_url, self._model.api_key) as client:
            stream = await client.chat.completions.create(
                model=self._model.name,
                messages=self._messages,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_tokens,
                stream=True,
                stream_options={"include_usage": True},
            )
            async with stream:
                async for chunk in stream:
                    for choice in (chunk.choices or ())[:1]:
                        self._take(choice.delta, calls)
                        ending = str(choice.finish_reason or ending)
                    # about one token a chunk, until the server tells
                    told = getattr(chunk.usage, "completion_tokens", None)
                    if chunk.choices or isinstance(told, int):
                        self._count(told if isinstance(told, int) else self.answer.tokens + 1)
                    await asyncio.sleep(0)  # a server that is always ahead must not keep a cancellation waiting
        self._flush(self._splitter.flush())
        self.answer.calls += calls.values()
        if not ending:
            return FAILED, "The server broke off before the answer was complete."
        return (CUT if ending == "length" else ending), ""

    def _take(self, delta, calls: dict[int, dict]) -> None:
        text, thought = delta.content or "", getattr(delta, "reasoning_content", None) or ""
        if not isinstance(text, str) or not isinstance(thought, str):
            raise TypeError("the content of its answer is not text")
        if thought:
            self._add(True, thought)
        for piece in self._splitter.push(text):  # servers that leave the tags in the text
            self._add(*piece)
        for part in delta.tool_calls or ():
            call = calls.setdefault(part.index, {"name": "", "arguments": ""})
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
            self._limit(part.function.arguments or "")


def api_client(kind: type, base_url: str, api_key: str, timeout: float = API_TIMEOUT):
    # never the environment's key: it is not meant for whatever address the page names
    timeout = openai.Timeout(timeout, connect=5.0)
    return new_client(kind, base_url, api_key, timeout=timeout, max_retries=0)


def list_api_models(base_url: str, api_key: str) -> tuple[list[str], str]:
    """Return (names, ""), or ([], what is wrong)."""
    if not base_url.startswith(("http://", "https://")):
        return [], f"{base_url or 'An empty line'} is not a base URL: it begins with http:// and usually ends with /v1."
    try:
        with api_client(openai.OpenAI, base_url, api_key, timeout=10.0) as client:
            names = [str(model.id) for model in client.models.list().data]
        return names, "" if names else f"{base_url} offers no models."
    except Exception as error:  # whatever a server sends
        return [], explain(error, base_url, KEY_CURE)
