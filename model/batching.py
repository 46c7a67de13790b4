"""Decode many requests together, joining and leaving at any step, each with its own parameters.

`submit` queues a request; a step reads part of a waiting prompt and makes one more token of every running answer. A
slot of the cache holds one text; the next request that begins with the same ids does not read them again. See the
diagram in model/generation.py.

    engine = Engine(model, slots=16)
    request = engine.submit(prompt_ids, SamplingParams(max_new_tokens=100))
    for token in request: print(token.id)          # steps the engine itself unless a thread does

`with Engine(model) as engine:` runs a thread that steps while there is work.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from model.decoder import WeightsState, new_decoder
from model.device import to_device, where_float64_is
from model.sampling import SamplingParams, SamplingRows, choose, penalise

# Most prompt tokens that one step reads: while no answer is running, and while some are.
PREFILL_ALONE, PREFILL_SHARED = 512, 128


class QueueFull(Exception):
    """The queue is full. retry_after: seconds after which there is probably room."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Token(NamedTuple):
    """logprob: of this token. top: (id, logprob) of the most likely ones, in order.

    In nats, from the model's own distribution; None if not asked for.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Request:
    """An answer in the making. Iterating yields its tokens as they come and raises its error, if any, at the end."""

    def __init__(self, engine: "Engine", prompt_ids: list[int], params: SamplingParams, notify, room: int):
        self.params, self.prompt_tokens, self.cached_tokens = params, len(prompt_ids), 0
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._engine, self._notify, self._room = engine, notify, room
        self._prompt_ids = prompt_ids
        self._slot: Slot | None = None
        self._next_id: int | None = None  # the token to feed next; None while the prompt is being read
        self._made = 0  # tokens of the answer
        # Random ignores the sign of an integer: -1 and 1 would be the same seed.
        self._random = random.Random(None if params.seed is None else params.seed % 2**64)
        self._grammar = params.grammar() if params.grammar else None
        self._started = 0.0
        self._new: deque[Token] = deque()
        self._changed = threading.Condition()

    def cancel(self) -> None:
        """End the answer and free its slot; works from any thread, and changes nothing if the answer has ended."""
        self._engine._finish(self, "cancelled")

    def take(self) -> tuple[list[Token], str | None]:
        """Return the tokens since the last call, and finish_reason if they are the last. Does not wait."""
        with self._changed:
            tokens = list(self._new)
            self._new.clear()
            return tokens, self.finish_reason

    def __iter__(self) -> Iterator[Token]:
        while True:
            with self._changed:
                token = self._new.popleft() if self._new else None
                if token is None and self.finish_reason is not None:
                    break
                if token is None and self._engine.threaded:
                    self._changed.wait(timeout=1.0)
            if token is not None:
                yield token
            elif not self._engine.threaded:
                self._engine.step()
        if self.error is not None:
            raise self.error


class Slot:
    """Room in the cache for one text. ids: those whose keys and values it holds. request: its current user.

    dirty: a failed request may have left values that are not finite; clear them before the next one.
    """

    def __init__(self, index: int):
        self.index, self.ids, self.dirty = index, [], False
        self.request: Request | None = None
        self.last_used = 0.0


class Engine:
    """Decodes many requests on one model. All methods may be called from any thread.

    slots: requests that are decoded together. context_length: longest prompt plus answer in tokens, by default and at
    most the model's max_position_embeddings. max_queue: requests that may wait beyond those in slots. Changed weights
    and switched adapters take effect once all running answers have ended.
    """

    def __init__(self, model: nn.Module, *, slots: int = 16, context_length: int | None = None, max_queue: int = 64):
        longest = model.config.max_position_embeddings
        self.model = model
        self.context_length = longest if context_length is None else min(context_length, longest)
        self.max_queue = max_queue
        self.threaded = False
        self._slots = [Slot(index) for index in range(slots)]
        self._waiting: deque[Request] = deque()
        self._state = threading.RLock()  # slots, queue and counters
        self._stepping = threading.RLock()  # one step at a time
        self._work = threading.Condition(self._state)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._counters = dict.fromkeys(
            ("requests", "cancelled", "prompt_tokens", "cached_tokens", "generated_tokens"), 0
        )
        self._rows_of: list[Request] = []
        self._rows: SamplingRows | None = None
        self._seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._seconds_per_request = 1.0
        self._lay_out()

    def _lay_out(self) -> None:
        """Lay out the weights, adapters included, as they are now."""
        self._decoder = None  # frees its memory first
        state = WeightsState(self.model)
        self._decoder = new_decoder(self.model, len(self._slots), self.context_length)
        self._weights = state
        for slot in self._slots:
            slot.ids, slot.dirty = [], False

    # --- for callers -------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        notify: Callable[[], None] | None = None,
        *,
        context_length: int | None = None,
    ) -> Request:
        """Queue a request.

        notify: called from the stepping thread when there are tokens or the end to take. context_length: a shorter one
        than the engine's. Raises QueueFull, and ValueError if the prompt is empty, too long or has an unknown id.
        """
        prompt_ids = [int(i) for i in prompt_ids]
        longest = min(context_length or self.context_length, self.context_length)
        check_prompt(prompt_ids, longest, self.model.config.vocab_size)
        room = min(params.max_new_tokens, longest - len(prompt_ids))
        request = Request(self, prompt_ids, params, notify, room)
        with self._state:
            if self._closed:
                raise RuntimeError("the engine is closed")
            free = sum(slot.request is None for slot in self._slots)
            if len(self._waiting) >= self.max_queue + free:
                wait = self._seconds_per_request * (1 + len(self._waiting) / len(self._slots))
                raise QueueFull(len(self._waiting), max(1.0, wait))
            self._waiting.append(request)
            self._counters["requests"] += 1
            self._counters["prompt_tokens"] += len(prompt_ids)
            self._work.notify_all()
        return request

    def stats(self) -> dict:
        with self._state:
            running = sum(slot.request is not None for slot in self._slots)
            counts = {"slots": len(self._slots), "running": running, "waiting": len(self._waiting)}
            return counts | self._counters

    def start(self) -> None:
        """Start the thread that steps while there is work."""
        with self._state:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if self._thread is None:
                self.threaded = True
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        with self._state:
            self._closed = True
            self._work.notify_all()
        for request in self._requests():
            request.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._state:
                while not self._closed and not self._has_work():
                    self._work.wait()
                if self._closed:
                    return
            try:
                self.step()
            except Exception as error:  # not one request's fault, for example out of memory: end all, then go on
                for request in self._requests():
                    self._finish(request, "error", error)

    def _has_work(self) -> bool:
        return bool(self._waiting) or any(slot.request is not None for slot in self._slots)

    def _requests(self) -> list[Request]:
        with self._state:
            return [*self._waiting, *(slot.request for slot in self._slots if slot.request is not None)]

    # --- a step ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Read part of the waiting prompts and make one more token of every answer.

        Returns False if there was nothing to do.
        """
        with self._stepping:
            with self._state:
                failed = self._admit()
                requests = [slot.request for slot in self._slots if slot.request is not None]
            if failed is not None:
                self._tell(failed)
            decoding = [r for r in requests if r._next_id is not None]
            reading = sorted((r for r in requests if r._next_id is None), key=lambda r: r._started)
            budget = PREFILL_SHARED if decoding else PREFILL_ALONE
            for request in reading:
                if budget > 0:
                    budget -= self._read(request, budget)
            if decoding:
                self._guarded(self._decode, decoding)
            return bool(requests) or failed is not None

    def _admit(self) -> Request | None:
        """Give free slots to waiting requests. Return a request that had to be ended; those behind it wait a step.

        The longest beginning of the prompt that any slot holds is not read again: the request takes that slot if it is
        free and at least half of its text is shared; otherwise the keys and values are copied.
        """
        while self._waiting:
            free = [slot for slot in self._slots if slot.request is None]
            if not free:
                return None
            if len(free) == len(self._slots) and (self._decoder is None or not self._weights.is_of(self.model)):
                self._lay_out()
            request = self._waiting.popleft()
            source, count = self._longest_beginning(request)
            slot = min(free, key=lambda slot: slot.last_used)
            if source.request is None and 2 * count >= len(source.ids):
                slot = source
            slot.request, request._slot = request, slot
            request._started = time.monotonic()
            try:
                self._make_ready(request, source, count)
            except Exception as error:
                self._end(request, "error", error)
                return request
        return None

    def _longest_beginning(self, request: Request) -> tuple[Slot, int]:
        """Return the slot that holds the longest beginning of the prompt, best a free one, and how many tokens."""
        # The last token of the prompt is always read: the answer begins with its logits.
        shared = {slot: common_prefix(slot.ids, request._prompt_ids[:-1]) for slot in self._slots}
        source = max(self._slots, key=lambda slot: (shared[slot], slot.request is None))
        return source, shared[source]

    def _make_ready(self, request: Request, source: Slot, count: int) -> None:
        """Put the first `count` tokens of `source` into the request's slot."""
        slot = request._slot
        if slot.dirty:
            self._decoder.clear(slot.index)
            slot.dirty = False
        if slot is not source and count:
            self._decoder.copy(source.index, slot.index, count)
        slot.ids = source.ids[:count]
        self._counters["cached_tokens"] += count - request.cached_tokens
        request.cached_tokens = count
        if request.params.penalises:
            self._count_prompt(request)

    def _guarded(self, run: Callable[[list[Request]], None], requests: list[Request]) -> None:
        """Run. If that fails, run each request alone, so that only the one that caused the exception ends."""
        try:
            run(requests)
        except Exception as error:
            if len(requests) == 1:
                self._finish(requests[0], "error", error)
                return
            for request in requests:
                self._guarded(run, [request])

    def _read(self, request: Request, budget: int) -> int:
        """Read up to `budget` more tokens of a prompt; at its end choose the first token of the answer."""
        slot = request._slot
        if len(slot.ids) == request.cached_tokens:  # a prompt like this one may have been read since it was admitted
            source, count = self._longest_beginning(request)
            if count > request.cached_tokens:
                self._guarded(lambda _: self._make_ready(request, source, count), [request])
                if request.finish_reason is not None:  # that failed
                    return 0
        start = len(slot.ids)
        chunk = request._prompt_ids[start : start + budget]

        def read(requests: list[Request]) -> None:
            logits = self._decoder.prefill(slot.index, chunk, start)
            self._advance(requests, logits if start + len(chunk) == request.prompt_tokens else None, [chunk])

        self._guarded(read, [request])
        return len(chunk)

    def _decode(self, requests: list[Request]) -> None:
        slots, ids = [r._slot for r in requests], [r._next_id for r in requests]
        logits = self._decoder.decode_one_token([s.index for s in slots], ids, [len(s.ids) for s in slots])
        self._advance(requests, logits, [[token_id] for token_id in ids])

    def _advance(self, requests: list[Request], logits: torch.Tensor | None, read: list[list[int]]) -> None:
        """Record the ids that each request has read; given logits (requests, vocab), choose and hand over its next."""
        chosen = [None] * len(requests) if logits is None else self._choose(requests, logits)
        notified = []
        with self._state:
            for request, ids, token in zip(requests, read, chosen, strict=True):
                if request.finish_reason is not None:  # cancelled during the forward pass
                    continue
                request._slot.ids += ids
                if isinstance(token, Exception):
                    self._end(request, "error", token)
                elif token is not None:
                    self._hand_over(request, token)
                if token is not None:
                    notified.append(request)
        for request in notified:
            self._tell(request)

    def _hand_over(self, request: Request, token: Token) -> None:
        self._counters["generated_tokens"] += 1
        request._next_id = token.id
        request._made += 1
        if request._grammar:
            request._grammar.advance(token.id)
        if request.params.penalises:
            self._seen[request._slot.index, token.id].fill_(True)  # an assignment would wait for a GPU
            self._counts[request._slot.index, token.id] += 1
        with request._changed:
            request._new.append(token)
            request._changed.notify_all()
        if token.id in request.params.stop_ids:
            self._end(request, "stop")
        elif request._made == request._room:
            self._end(request, "length")

    def _choose(self, requests: list[Request], logits: torch.Tensor) -> list[Token | Exception]:
        logits = logits.to(where_float64_is(logits.device))
        # (rows,): x · 0 is not 0 for NaN and infinity; one reduction, and no synchronisation with a GPU
        broken = logits.sum(dim=-1) * 0 != 0
        if self._rows_of != requests:
            self._rows_of, self._rows = list(requests), SamplingRows([r.params for r in requests], logits.device)
            penalised = [r._slot.index for r in requests if r.params.penalises]
            self._penalised_slots = to_device(penalised, logits.device)
        allowed = logits
        if self._rows.penalised is not None:
            slots = self._penalised_slots
            allowed = penalise(logits, self._rows, self._seen[slots], self._counts[slots])
        early = [row for row, r in enumerate(requests) if r._made < r.params.min_new_tokens and r._grammar is None]
        guided = [row for row, r in enumerate(requests) if r._grammar]
        if early or guided:
            allowed = allowed.clone()
            for row in early:
                stop_ids = [i for i in requests[row].params.stop_ids if i < logits.shape[1]]
                allowed[row, stop_ids] = -torch.inf
            for row in guided:
                mask = requests[row]._grammar.allowed(logits.shape[1])
                allowed[row].masked_fill_(~mask.to(logits.device), -torch.inf)
        draws = to_device([[r._random.random()] for r in requests], logits.device, torch.float64)
        ids = choose(allowed, self._rows, draws)
        logprobs = self._logprobs(requests, logits, ids)
        # One list for all rows: each read from a GPU waits for all of its queued work.
        chosen = ids.masked_fill_(broken, -1).tolist()
        message = "the logits are not finite: the weights are broken, or --dtype float16 is too narrow for them"
        return [
            ValueError(message) if token_id < 0 else Token(token_id, *logprobs.get(row, ()))
            for row, token_id in enumerate(chosen)
        ]

    def _logprobs(self, requests: list[Request], logits: torch.Tensor, ids: torch.Tensor) -> dict[int, tuple]:
        """Return row -> (log-probability of its token, its most likely tokens with theirs), for the rows that ask."""
        counts = {row: r.params.logprobs for row, r in enumerate(requests) if r.params.logprobs is not None}
        if not counts:
            return {}
        if len(counts) < len(requests):
            rows = torch.tensor(list(counts), device=logits.device)
            logits, ids = logits[rows], ids[rows]
        log_probs = logits.log_softmax(dim=-1)
        own = log_probs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
        values, top_ids = log_probs.topk(min(max(counts.values()), logits.shape[1]), dim=-1)
        return {
            row: (logprob, list(zip(row_ids, row_values, strict=True))[:count])
            for (row, count), logprob, row_ids, row_values in zip(
                counts.items(), own, top_ids.tolist(), values.tolist(), strict=True
            )
        }

    def _count_prompt(self, request: Request) -> None:
        if self._seen is None:
            shape, device = (len(self._slots), self.model.config.vocab_size), where_float64_is(self._decoder.device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
            self._counts = torch.zeros(shape, device=device)
        index = request._slot.index
        self._seen[index] = False
        self._seen[index, torch.tensor(request._prompt_ids, device=self._seen.device)] = True
        self._counts[index] = 0

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        if self._end(request, reason, error):
            self._tell(request)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> bool:
        """Free the request's slot or place in the queue. Returns False if it had ended before.

        This does not use the device: a request must end even if the GPU has failed for good.
        """
        with self._state:
            if request.finish_reason is not None:
                return False
            slot = request._slot
            if slot is None:
                self._waiting.remove(request)
            else:
                slot.request, slot.last_used = None, time.monotonic()
                # Requests refer to the engine: without this, a dropped engine's cache waits for the garbage collector.
                self._rows_of = []
                seconds = slot.last_used - request._started
                self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
                if reason == "error":
                    slot.ids, slot.dirty = [], True
            self._counters["cancelled"] += reason == "cancelled"
            with request._changed:
                request.finish_reason, request.error = reason, error
                request._changed.notify_all()
            return True

    def _tell(self, request: Request) -> None:
        if request._notify is not None:
            try:
                request._notify()
            except Exception:  # the listener has gone
                request._notify = None
                request.cancel()


def check_prompt(prompt_ids: Sequence[int], context_length: int, vocab_size: int) -> None:
    if not prompt_ids:
        raise ValueError("the prompt holds no token; generation needs at least one, such as bos")
    if len(prompt_ids) >= context_length:
        raise ValueError(
            f"the prompt holds {len(prompt_ids)} tokens, and the context of {context_length} leaves no room for an "
            "answer; shorten the prompt or raise --max_seq_len"
        )
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
        raise ValueError(f"the prompt holds an id outside the vocabulary of {vocab_size}; is it another tokenizer's?")


def common_prefix(first: list[int], second: list[int]) -> int:
    """Return how many ids agree from the beginning; by bisection, as Python compares slices fast and items slowly."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
