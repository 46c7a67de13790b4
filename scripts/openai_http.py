"""The server's HTTP parts: metrics and a log line for every request, bodies, event streams, and time limits."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator

import h11
import prometheus_client as prometheus
from fastapi import Request
from fastapi.responses import StreamingResponse
from prometheus_client.metrics_core import GaugeMetricFamily
from uvicorn.protocols.http.h11_impl import H11Protocol

from scripts.openai_schema import ApiError

HEADER_SECONDS = 10  # for all headers of a request to arrive
BODY_SECONDS = 30  # for its body
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds

prometheus.disable_created_metrics()  # a second series for every counter


class Metrics:
    """Counts requests and tokens for Prometheus.

    stats: returns each model's engine statistics; the gauges show what it says when they are read.
    """

    def __init__(self, stats: Callable[[], dict[str, dict]]):
        self.stats, self.registry = stats, prometheus.CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"minimind_{name}", about, labels, registry=self.registry)

        self.requests = counter("requests", "HTTP requests by path and status.", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.", "model")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that were already in the cache.", "model")
        self.generated_tokens = counter("generated_tokens", "Answer tokens.", "model")
        name, about = "minimind_time_to_first_token_seconds", "Time from request to first token."
        self.first_token = prometheus.Histogram(name, about, buckets=FIRST_TOKEN_BOUNDS, registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges: slots in all, answers being made, requests waiting for a slot."""
        stats = self.stats()
        for key in ("slots", "running", "waiting"):
            gauge = GaugeMetricFamily(f"minimind_{key}", f"Answers: {key}.", labels=("model",))
            for model, counts in stats.items():
                gauge.add_metric((model,), counts[key])
            yield gauge

    def count_usage(self, model: str, usage: dict) -> None:
        self.prompt_tokens.labels(model).inc(usage["prompt_tokens"])
        self.cached_tokens.labels(model).inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.generated_tokens.labels(model).inc(usage["completion_tokens"])

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)


class WatchRequests:
    """Count each request by path and status when it ends, and write a line about it.

    An endpoint adds to the line through request.state.about, a list of words.
    """

    def __init__(self, app, metrics: Metrics, paths: set[str], note: Callable[[str], None] | None):
        self.app, self.metrics, self.paths, self.note = app, metrics, paths, note

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.monotonic(), 499  # nothing was sent: the client has gone
        about = scope.setdefault("state", {})["about"] = []

        async def watched_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # paths that do not exist are counted as one, or anyone could fill the memory
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, status).inc()
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            if self.note and scope["path"] != "/health":
                path = scope.get("raw_path", b"").decode("latin-1")[:100]
                words = [scope["method"], path, str(status), *about, f"{time.monotonic() - started:.2f} s"]
                self.note(" ".join(words))


class TimedProtocol(H11Protocol):
    """Closes a connection whose request headers have not arrived in time; uvicorn itself would wait forever."""

    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._time_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.header_timer:
            self.header_timer.cancel()
        super().connection_lost(exc)

    def _time_headers(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not waiting and self.header_timer:
            self.header_timer.cancel()
            self.header_timer = None


async def read_body(request: Request, longest: int) -> bytes:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= longest:  # read and drop the rest: a client that is still sending hears no answer
                    body += chunk
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS} s") from error
    if size > longest:
        raise ApiError(413, f"the body has {size} bytes, and at most {longest} are taken", code="request_too_large")
    return bytes(body)


class EventStream(StreamingResponse):
    """Server-sent events. `held` is closed after the last one, or when the client has gone."""

    def __init__(self, events: AsyncIterator[str], held: contextlib.AsyncExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.held = held

    async def __call__(self, scope, receive, send) -> None:
        async with self.held:
            await super().__call__(scope, receive, send)


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_gone(request: Request, answer):
    """Return the result of a coroutine, or None if the client disconnects, which cancels it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
