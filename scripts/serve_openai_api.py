"""An OpenAI-compatible server for the weights of any stage, on the decoding engine of model/batching.py.

    python scripts/serve_openai_api.py                       full_sft weights: out/full_sft_512.pth, as "minimind"
    python scripts/serve_openai_api.py --model_mode 3        0 pretrain, 1 full_sft, 2 rlhf (DPO), 3 reason, 4 full_dist
    python scripts/serve_openai_api.py --lora_name lora_medical
    python scripts/serve_openai_api.py --load 1              a folder in Hugging Face format: MiniMind2/, or --hf_path
    python scripts/chat_openai_api.py                        a chat with it

POST /v1/chat/completions, /v1/completions · GET /v1/models, /health, /metrics

Other weights in --out_dir and other folders are served by their names (full_sft_768), adapters as "minimind:NAME";
each is loaded when first asked for. Only programs on this machine can reach it unless --host says otherwise.
"""

import argparse
import asyncio
import contextlib
import errno
import json
import math
import os
import secrets
import signal
import socket
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import prometheus_client as prometheus
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.metrics_core import GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from dataset.tokenization import ChatTokenizer
from model.batching import Engine, QueueFull, Token
from model.flags import at_least, show_defaults
from model.generation import SamplingParams
from model.loading import READY_FLAGS, add_flags, check_sizes, given_sizes, named_path, read_config, ready_flags
from model.model_lora import find_lora
from scripts.model_catalog import entry_of_file, entry_of_folder, load_entry
from scripts.model_pool import LoadedModel, ModelPool, Offer
from scripts.openai_answers import (
    ChatFormat,
    CompletionFormat,
    Generation,
    encode_chat,
    encode_completion,
    new_id,
    prompt_log_probs,
    sampling_params,
)
from scripts.openai_schema import ApiError, ChatRequest, CompletionRequest, parse

Echo = tuple[str, list[Token]]  # a prompt's text and, where log-probs are asked for, its tokens

BODY_SECONDS = 30  # a body that has not arrived by then is given up
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


prometheus.disable_created_metrics()  # a second series for every counter


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve MiniMind through an OpenAI-compatible API.")
    add_flags(parser, "model_mode", "load", "out_dir", "hf_path", "lora_name", "hidden_size", "num_hidden_layers")
    add_flags(parser, "use_moe", *READY_FLAGS, "temperature", "top_p", "max_new_tokens")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from other machines")
    add("--port", type=int, default=8998, help="0: any free one")
    add("--model_name", default="minimind", help="what the default model is called in requests")
    add(
        "--api_key",
        default=os.environ.get("MINIMIND_API_KEY"),
        help="requests must bring it (default: MINIMIND_API_KEY, if set)",
    )
    add("--cors_origin", action="append", default=[], help="web pages from there may ask; may be given several times")
    add("--slots", type=at_least(1), default=16, help="answers that are made together")
    add("--max_queue", type=at_least(0), default=64, help="requests that may wait for a slot; more get status 429")
    add("--max_models", type=at_least(1), default=3, help="models and adapters in memory; 1: the default alone")
    add("--max_messages", type=at_least(1), default=1000, help="in one request")
    add("--max_body_bytes", type=at_least(1), default=2**20, help="longest request")
    add("--shutdown_timeout", type=at_least(0), default=30, help="seconds that running answers get at the end")
    show_defaults(parser)
    args = parser.parse_args(argv)
    args.api_key = args.api_key or None  # a variable that is set to nothing asks for no key
    try:
        SamplingParams(temperature=args.temperature, top_p=args.top_p)
    except ValueError as error:
        parser.error(str(error))
    if args.trained_length is not None and args.rope_scaling is None:
        parser.error("--trained_length belongs to --rope_scaling FACTOR")
    if not 0 <= args.port < 2**16:
        parser.error(f"--port is {args.port}, and must be below 65536")
    return args


# --- models ----------------------------------------------------------------------------------------------------------


def default_offer(args: argparse.Namespace) -> Offer:
    """What the flags name. ValueError where it is missing."""
    lora_name = None if args.lora_name.lower() == "none" else args.lora_name
    path = named_path(args).absolute()
    if args.load == 1:
        read_config(path)
        entry = entry_of_folder(path, Path(args.out_dir))
        if entry is None:
            raise ValueError(f"{path} holds no language model with its weights; --hf_path takes such a folder")
    else:
        entry = entry_of_file(path)
    if lora_name:
        find_lora(lora_name, args.out_dir, entry.hidden_size, entry.use_moe)
    return Offer(entry, lora_name)


def make_loader(args: argparse.Namespace, default: Offer) -> Callable[[Offer], tuple[Engine, ChatTokenizer]]:
    def load(offer: Offer) -> tuple[Engine, ChatTokenizer]:
        flags = ready_flags(args)
        if offer.entry != default.entry:
            flags |= {"trust_remote_code": False, "preset": None, "num_attention_heads": None}
            if offer.entry.kind == "hf":  # its own tokenizer fits it
                flags["tokenizer_path"] = None
        ready = load_entry(offer.entry, offer.lora_name, **flags)
        engine = Engine(ready.model, slots=args.slots, context_length=ready.context_length, max_queue=args.max_queue)
        engine.start()
        return engine, ready.tokenizer

    return load


# --- metrics ---------------------------------------------------------------------------------------------------------


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


class CountRequests:
    """Counts each response by path and status. Paths that do not exist are one, or anyone could fill the memory."""

    def __init__(self, app, metrics: Metrics, paths: set[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope, receive, send):
        async def counting_send(message):
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting_send if scope["type"] == "http" else send)


# --- answers ---------------------------------------------------------------------------------------------------------


async def read_body(request: Request, longest: int) -> bytes:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= longest:  # the rest is read and dropped: a client that is still sending hears no answer
                    body += chunk
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS} s") from error
    if size > longest:
        raise ApiError(413, f"the body has {size} bytes, and at most {longest} are taken", code="request_too_large")
    return bytes(body)


class EventStream(StreamingResponse):
    """Server-sent events; what they hold is freed when the last was sent, and when the client has gone."""

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
    """The result of a coroutine, which is cancelled when the client disconnects; None then."""

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


class Api:
    """The endpoints. generations: what is being answered, so that a shutdown can end it."""

    def __init__(self, pool: ModelPool, args: argparse.Namespace):
        self.pool, self.args, self.metrics = pool, args, Metrics(pool.stats)
        self.generations: set[Generation] = set()
        # prompts whose log-probs are asked for are read outside the engine, one at a time
        self.reader, self.readings = ThreadPoolExecutor(1, "prompts"), 0

    def app(self) -> ASGIApp:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI):
            yield
            self.end_answers()
            self.reader.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.pool.close)

        # the pages of /docs would be fetched from other hosts
        app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
        checked = [Depends(self.check_key)]
        app.post("/v1/chat/completions", dependencies=checked)(self.chat)
        app.post("/v1/completions", dependencies=checked)(self.complete)
        app.get("/v1/models", dependencies=checked)(self.models)
        app.get("/v1/models/{name:path}", dependencies=checked)(self.model)
        app.get("/metrics", dependencies=checked)(self.show_metrics)
        app.get("/health")(self.health)
        app.exception_handler(ApiError)(self.tell)
        app.exception_handler(HTTPException)(self.tell_http)
        app.exception_handler(QueueFull)(self.tell_full)
        app.exception_handler(ClientDisconnect)(self.tell_nobody)
        app.exception_handler(Exception)(self.tell_bug)
        # around the whole app: what add_middleware adds does not see the answers of tell_bug
        whole = app
        if self.args.cors_origin:
            origins = self.args.cors_origin
            whole = CORSMiddleware(whole, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health"}
        return CountRequests(whole, self.metrics, paths)

    def end_answers(self) -> None:
        for generation in list(self.generations):
            generation.close()

    async def check_key(self, request: Request) -> None:
        if self.args.api_key is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not secrets.compare_digest(given, f"Bearer {self.args.api_key}".encode()):
            message = "wrong or missing API key; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    # --- endpoints

    async def health(self) -> dict:
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        return Response(
            prometheus.generate_latest(self.metrics.registry), media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4
        )

    async def models(self) -> dict:
        offers = await asyncio.to_thread(self.pool.offers)
        return {"object": "list", "data": [self._about(name, offer) for name, offer in offers.items()]}

    async def model(self, name: str) -> dict:
        return self._about(name, await asyncio.to_thread(self.pool.find, name))

    def _about(self, name: str, offer: Offer) -> dict:
        about = {"id": name, "object": "model", "owned_by": "minimind", "root": offer.root, "size": offer.entry.size}
        try:
            return about | {"created": int(offer.entry.path.stat().st_mtime)}
        except OSError:  # deleted since
            return about | {"created": 0}

    async def chat(self, request: Request) -> Response:
        started = time.monotonic()
        body = parse(ChatRequest, await read_body(request, self.args.max_body_bytes))
        if len(body.messages) > self.args.max_messages:
            message = f"{len(body.messages)} messages, and at most {self.args.max_messages} are taken"
            raise ApiError(400, message, "messages", "too_many_messages")
        self._check_count(body, 1)
        async with contextlib.AsyncExitStack() as held:
            model = await held.enter_async_context(self.pool.use(body.model))
            prompt = await asyncio.to_thread(encode_chat, model.tokenizer, body)
            generation = self._generate(held, model, [prompt], body)
            form = ChatFormat(model.tokenizer, body)
            return await self._answer(request, body, generation, form, started, held.pop_all())

    async def complete(self, request: Request) -> Response:
        started = time.monotonic()
        body = parse(CompletionRequest, await read_body(request, self.args.max_body_bytes))
        self._check_count(body, len(body.prompt))
        async with contextlib.AsyncExitStack() as held:
            model = await held.enter_async_context(self.pool.use(body.model))
            prompts = await asyncio.to_thread(lambda: [encode_completion(model.tokenizer, p) for p in body.prompt])
            generation = self._generate(held, model, prompts, body)
            echoes = await unless_gone(request, self._echo(model, body, prompts)) if body.echo else []
            if echoes is None:
                return await self.tell_nobody()
            form = CompletionFormat(model.tokenizer, body, echoes)
            return await self._answer(request, body, generation, form, started, held.pop_all())

    def _check_count(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        answers, most = prompts * (body.n or 1), self.args.slots + self.args.max_queue
        if answers > most:
            message = f"{answers} answers in one request, and at most {most} are made"
            raise ApiError(400, message, "n", "too_many_answers")

    async def _echo(self, model: LoadedModel, body: CompletionRequest, prompts: list[list[int]]) -> list[Echo]:
        """One for each prompt. Raises QueueFull where as many requests wait as may wait for the engine."""
        pairs = list(zip(body.prompt, prompts, strict=True))
        if body.logprobs is None:
            return await asyncio.to_thread(lambda: [make_echo(model, *pair) for pair in pairs])
        if self.readings > self.args.max_queue:
            raise QueueFull(self.readings - 1, 1.0)
        self.readings += 1
        try:
            # one by one: requests take turns, and one whose client has gone is not read to its end
            loop = asyncio.get_running_loop()
            return [await loop.run_in_executor(self.reader, make_echo, model, *pair, body.logprobs) for pair in pairs]
        finally:
            self.readings -= 1

    def _generate(
        self,
        held: contextlib.AsyncExitStack,
        model: LoadedModel,
        prompts: list[list[int]],
        body: ChatRequest | CompletionRequest,
    ) -> Generation:
        """Puts all answers of a request in line; leaving `held` cancels them."""
        is_chat, context_length = isinstance(body, ChatRequest), model.engine.context_length
        param = "messages" if is_chat else "prompt"
        for ids in prompts:
            if len(ids) >= context_length:
                message = f"{len(ids)} tokens of {param}, and the context holds {context_length}, answer included"
                raise ApiError(400, message, param, "context_length_exceeded")
        tokenizer = model.tokenizer
        defaults = SamplingParams(
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            max_new_tokens=self.args.max_new_tokens,
            stop_ids=(tokenizer.eos_id, tokenizer.pad_id),
        )
        tools = is_chat and bool(body.offered_tools)
        params = sampling_params(body, defaults)
        nothing, stop = body.max_tokens == 0, body.stop or ()
        try:
            generation = Generation(model.engine, tokenizer, prompts, params, stop, is_chat, tools, nothing)
        except ValueError as error:
            raise ApiError(400, str(error), param, "invalid_value") from error
        self.generations.add(generation)
        held.callback(self.generations.discard, generation)
        held.callback(generation.close)
        held.callback(lambda: self.metrics.count_usage(model.name, generation.usage()))
        return generation

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        generation: Generation,
        form: ChatFormat | CompletionFormat,
        started: float,
        held: contextlib.AsyncExitStack,
    ) -> Response:
        about = {"id": new_id(form.prefix), "object": form.chunk_kind if body.stream else form.kind}
        about |= {"created": int(time.time()), "model": body.model}

        async def deltas():
            waiting = True
            async for choice, new in generation.deltas():
                if waiting:
                    self.metrics.first_token.observe(time.monotonic() - started)
                    waiting = False
                yield choice, new

        async def whole() -> Response:
            found = {choice: [] for choice in generation.choices}
            async for choice, new in deltas():
                found[choice] += new
            choices = [form.whole(choice, found[choice]) for choice in generation.choices]
            return JSONResponse(about | {"choices": choices, "usage": generation.usage()})

        async def events() -> AsyncIterator[str]:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            usage = {"usage": None} if include_usage else {}

            def chunk(choice: dict) -> str:
                return event(about | {"choices": [choice]} | usage)

            try:
                for choice in generation.choices:
                    if opening := form.opening(choice):
                        yield chunk(opening)
                async for choice, new in deltas():
                    if new:
                        yield chunk(form.chunk(choice, new))
                    if choice.finish_reason:
                        yield chunk(form.ending(choice))
            except ApiError as error:  # the status has been sent
                yield event(error.body())
                return
            if include_usage:
                yield event(about | {"choices": [], "usage": generation.usage()})
            yield "data: [DONE]\n\n"

        if body.stream:
            return EventStream(events(), held)
        async with held:
            return await unless_gone(request, whole()) or await self.tell_nobody()

    # --- errors

    async def tell(self, _: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def tell_http(self, request: Request, error: HTTPException) -> JSONResponse:
        about = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
        message = about.get(error.status_code, str(error.detail))
        return await self.tell(request, ApiError(error.status_code, message, headers=error.headers))

    async def tell_full(self, request: Request, error: QueueFull) -> JSONResponse:
        seconds = {"Retry-After": str(math.ceil(error.retry_after))}
        return await self.tell(request, ApiError(429, str(error), code="queue_full", headers=seconds))

    async def tell_nobody(self, *_) -> Response:
        """The client has gone; only the metrics hear of it."""
        return Response(status_code=499)

    async def tell_bug(self, request: Request, error: Exception) -> JSONResponse:
        return await self.tell(request, ApiError(500, f"a mistake of the server: {type(error).__name__}"))


def make_echo(model: LoadedModel, prompt: str | list[int], ids: list[int], logprobs: int | None = None) -> Echo:
    """ids: those of the prompt. logprobs: how many likeliest tokens beside each token; None: no tokens."""
    text = prompt if isinstance(prompt, str) else model.tokenizer.decode(ids, skip_control=False)
    tokens = [] if logprobs is None else prompt_log_probs(model.engine.model, ids, logprobs)
    if isinstance(prompt, str) and ids != model.tokenizer.encode_documents([prompt])[0]:
        tokens = tokens[1:]  # a bos that the prompt did not hold
    return text, tokens


# --- the process -----------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Told to stop, it takes no new connections, lets running answers finish, and ends those that take too long."""

    def __init__(self, config: uvicorn.Config, api: Api):
        super().__init__(config)
        self.api = api

    async def shutdown(self, sockets=None) -> None:
        seconds = self.api.args.shutdown_timeout
        if self.api.generations:
            note(f"{len(self.api.generations)} answers are under way; they have {seconds} s. Ctrl-C ends them now")
        timer = asyncio.get_running_loop().call_later(seconds, self.api.end_answers)
        await super().shutdown(sockets)
        timer.cancel()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. ValueError names the flag that is wrong."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use: stop the program that has it, or choose another with --port"
            raise ValueError(message) from error
        raise ValueError(f"--host {host} --port {port} cannot be used: {error.strerror or error}") from error


def make_server(args: argparse.Namespace) -> tuple[Server, socket.socket]:
    """The server with its default model loaded, and the socket to listen on. ValueError says what is wrong."""
    listener = listen(args.host, args.port)
    try:
        default = default_offer(args)
        load = make_loader(args, default)
        engine, tokenizer = load(default)
        config, path = engine.model.config, default.entry.path
        check_sizes(config, path, *given_sizes(args))
    except BaseException:
        listener.close()
        raise
    folders = (ROOT, Path(args.hf_path))
    pool = ModelPool(args.model_name, default, Path(args.out_dir), folders, load, args.max_models)
    pool.add(default, engine, tokenizer)
    api = Api(pool, args)
    config = uvicorn.Config(
        api.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=args.shutdown_timeout + 5,
    )
    return Server(config, api), listener


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    warnings.showwarning = lambda message, *_: note(f"warning: {message}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn hands the signal on when it is done
    try:
        server, listener = make_server(args)
        announce(args, server.api.pool, listener.getsockname()[1])
        server.run(sockets=[listener])
    except ValueError as error:
        note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def announce(args: argparse.Namespace, pool: ModelPool, port: int) -> None:
    engine = pool.engine_of_default
    entry, parameter = pool.default.entry, next(engine.model.parameters())
    adapter = f" with {pool.default.lora_name}" if pool.default.lora_name else ""
    print(
        f"{pool.name}: {entry.path}{adapter} ({entry.size}), {str(parameter.dtype).removeprefix('torch.')} on "
        f"{parameter.device}, context {engine.context_length} tokens, {args.slots} answers at a time"
    )
    if others := [name for name in pool.offers() if name != pool.name]:
        print(f"loaded when asked for: {', '.join(others)}")
    host = args.host if args.host not in ("0.0.0.0", "::") else "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if args.api_key else ""
    question = json.dumps({"model": pool.name, "messages": [{"role": "user", "content": "你好"}]}, ensure_ascii=False)
    print(f"listening on {url} (Ctrl-C ends it). Try:")
    print(f"  curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{question}'")
    more = f"{'' if port == 8998 else f' --base_url {url}'}{' --api_key YOUR_KEY' if args.api_key else ''}"
    print(f"  python scripts/chat_openai_api.py{more}", flush=True)
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
        note(f"warning: anyone who can reach {args.host} can use this server; --api_key KEY asks for a key")


if __name__ == "__main__":
    sys.exit(main())
