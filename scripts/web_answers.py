"""Where the web page's answers come from: a model in this process, or an OpenAI-compatible server.

Both `start` an answer and return at once. The page calls `poll` to move what has arrived into the Answer, and `cancel`
to stop; nothing here draws, and nothing here waits.
"""

import asyncio
import queue
import random
import threading
import time
from dataclasses import dataclass

from dataset.text_stream import TextStream, ThoughtSplitter
from dataset.tokenization import ChatTokenizer
from model.batching import Engine, QueueFull
from model.sampling import SamplingParams
from scripts.web_conversation import CUT, FAILED, STOPPED, Answer

PUT_AWAY = "This model was put away to make room for another. Ask again."
API_TIMEOUT = 300.0  # seconds without a sign of life


@dataclass(frozen=True)
class Settings:
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 512
    history_turns: int = 3
    system: str = ""


class Clock:
    """Tokens per second from the first token on: waiting in line and reading the prompt are not the model's pace."""

    def __init__(self):
        self.first, self.last = 0.0, 0.0

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def rate(self, tokens: int) -> float:
        seconds = self.last - self.first
        return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0


# --- a model in this process -----------------------------------------------------------------------------------------


class LocalModel:
    """An engine with its tokenizer. continues: pretrained weights, which go on with a text and know no turns.
    warning: what its loader had to say."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: ChatTokenizer,
        continues: bool = False,
        split_thoughts: bool = False,
        warning: str = "",
    ):
        self.name, self.engine, self.tokenizer = name, engine, tokenizer
        self.continues, self.split_thoughts, self.warning = continues, split_thoughts, warning

    def close(self) -> None:
        self.engine.close()

    def start(self, answer: Answer, messages: list[dict], settings: Settings) -> "LocalRun":
        """ValueError where the question is too long, or the engine has too much to do."""
        answer.model = self.name
        ids = self._encode(answer, messages, settings.max_tokens)
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_tokens,
            stop_ids=(self.tokenizer.eos_id, self.tokenizer.pad_id),
            seed=random.SystemRandom().randrange(2**31),
        )
        stream, clock = TextStream(self.tokenizer, split_thoughts=self.split_thoughts), Clock()
        try:
            request = self.engine.submit(ids, params, notify=clock.tick)
        except QueueFull as error:
            raise ValueError(f"The model is busy: {error}.") from error
        except RuntimeError as error:  # it was closed to make room for another model
            raise ValueError(PUT_AWAY) from error
        return LocalRun(answer, request, stream, clock)

    def _encode(self, answer: Answer, messages: list[dict], max_tokens: int) -> list[int]:
        """Ids to continue; the oldest turns are left out if they would leave an answer too little room."""
        if self.continues:
            return self.tokenizer.encode_beginning(messages[-1]["content"])
        context = self.engine.context_length
        ids, left_out = self.tokenizer.encode_fitting(messages, context, max_tokens)
        if left_out:
            exchanges = left_out // 2
            answer.notes.append(f"left out {exchanges} earlier turn{'s' * (exchanges > 1)}: the context is full")
        if len(ids) >= context:
            raise ValueError(
                f"This question is too long: with its frame it has {len(ids)} tokens, and the context holds {context}. "
                "Shorten it, or start the page with a larger --max_seq_len."
            )
        return ids


class LocalRun:
    def __init__(self, answer: Answer, request, stream: TextStream, clock: Clock):
        self.answer, self._request, self._stream, self._clock = answer, request, stream, clock
        self.done = self._cancelled = False

    def poll(self) -> None:
        if self.done:
            return
        tokens, ending = self._request.take()
        for token in tokens:
            self.answer.tokens += 1
            for piece in self._stream.push(token.id):
                self.answer.add(*piece)
        self.answer.tokens_per_second = self._clock.rate(self.answer.tokens)
        if ending is not None:
            for piece in self._stream.flush():
                self.answer.add(*piece)
            self.answer.ending, self.done = ending, True
            if self._request.error is not None:
                self.answer.error = f"The model failed: {self._request.error}"
            elif ending == STOPPED and not self._cancelled:
                self.answer.ending, self.answer.error = FAILED, PUT_AWAY

    def cancel(self) -> None:
        """Stops the model at once; what it said stays."""
        self._cancelled = True
        self._request.cancel()
        self.poll()


# --- a server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ApiModel:
    """A model behind an OpenAI-compatible server. api_key may be empty: many local servers ask for none."""

    base_url: str
    api_key: str
    name: str

    def start(self, answer: Answer, messages: list[dict], settings: Settings) -> "ApiRun":
        answer.model = self.name
        return ApiRun(self, answer, messages, settings)


class ApiRun:
    """Reads the server's stream in a thread of its own, so that the page can stop it before anything has come."""

    def __init__(self, model: ApiModel, answer: Answer, messages: list[dict], settings: Settings):
        self.answer, self.done = answer, False
        self._model, self._clock, self._splitter = model, Clock(), ThoughtSplitter()
        self._arrived = queue.SimpleQueue()  # functions that change the answer
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._read(messages, settings))
        threading.Thread(target=self._run, name="api answer", daemon=True).start()

    def poll(self) -> None:
        while not self.done and not self._arrived.empty():
            self._arrived.get()()

    def cancel(self) -> None:
        """Drops the connection, which is how a server learns of it; what has arrived stays."""
        self.poll()
        if not self.done:
            self._loop.call_soon_threadsafe(self._task.cancel)
            self._end(STOPPED)

    def _end(self, ending: str, error: str = "") -> None:
        for piece in self._splitter.flush():
            self.answer.add(*piece)
        self.answer.ending, self.answer.error, self.done = ending, error, True

    def _add(self, text: str, thought: str) -> None:
        if thought:
            self.answer.add(True, thought)
        for piece in self._splitter.push(text):  # servers that leave the tags in the text
            self.answer.add(*piece)
        self.answer.tokens += 1  # about one a chunk, until the server tells
        self.answer.tokens_per_second = self._clock.rate(self.answer.tokens)

    def _count(self, tokens: int) -> None:
        self.answer.tokens, self.answer.tokens_per_second = tokens, self._clock.rate(tokens)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _read(self, messages: list[dict], settings: Settings) -> None:
        import openai

        put, ending = self._arrived.put, ""
        try:
            async with _client(openai.AsyncOpenAI, self._model.base_url, self._model.api_key) as client:
                stream = await client.chat.completions.create(
                    model=self._model.name,
                    messages=messages,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    max_tokens=settings.max_tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async with stream:
                    async for chunk in stream:
                        for choice in chunk.choices[:1]:
                            text = choice.delta.content or ""
                            thought = getattr(choice.delta, "reasoning_content", None) or ""
                            ending = choice.finish_reason or ending
                            if text or thought:
                                self._clock.tick()
                                put(lambda text=text, thought=thought: self._add(text, thought))
                        if chunk.usage:
                            put(lambda tokens=chunk.usage.completion_tokens: self._count(tokens))
            if ending:
                put(lambda: self._end(CUT if ending == "length" else ending))
            else:
                put(lambda: self._end(FAILED, "The server broke off before the answer was through."))
        except openai.OpenAIError as error:
            message = api_message(error, self._model.base_url)
            put(lambda: self._end(FAILED, message))
        except Exception as error:  # a base URL that is none, a server that speaks something else
            message = f"{self._model.base_url} gave no usable answer: {error or type(error).__name__}"
            put(lambda: self._end(FAILED, message))


def _client(kind, base_url: str, api_key: str, timeout: float = API_TIMEOUT):
    import openai

    from scripts.openai_client import new_client

    return new_client(
        kind,
        base_url,
        api_key=api_key or "none",  # never the environment's key: it is not meant for whatever URL stands in the page
        timeout=openai.Timeout(timeout, connect=5.0),
        max_retries=0,
    )


def list_api_models(base_url: str, api_key: str) -> tuple[list[str], str]:
    """(names, "") or ([], what is wrong), in words for the page."""
    import openai

    if not base_url.startswith(("http://", "https://")):
        return [], f"{base_url or 'An empty line'} is not a base URL; it begins with http:// and mostly ends with /v1."
    try:
        with _client(openai.OpenAI, base_url, api_key, timeout=10.0) as client:
            names = [model.id for model in client.models.list().data]
        return names, "" if names else f"{base_url} offers no models."
    except openai.OpenAIError as error:
        return [], api_message(error, base_url)
    except Exception as error:  # a server that speaks something else
        return [], f"{base_url} gave no usable answer: {error or type(error).__name__}"


def api_message(error: Exception, base_url: str) -> str:
    """What went wrong with a server, and the cure."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} did not answer in time."
    if isinstance(error, openai.APIConnectionError):
        return f"No server answers at {base_url}. Is it running? Ours starts with: python scripts/serve_openai_api.py"
    if isinstance(error, openai.AuthenticationError):
        return f"{base_url} refuses the API key."
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    if isinstance(error, openai.RateLimitError):
        return f"{base_url} has too much to do: {text or error}"
    return f"{base_url}: {text or error}"
