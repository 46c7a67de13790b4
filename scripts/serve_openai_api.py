"""An OpenAI-compatible server for the weights of any stage, on the decoding engine of model/batching.py.

    python scripts/serve_openai_api.py                       full_sft weights: out/full_sft_512.pth, as "minimind"
    python scripts/serve_openai_api.py --model_mode 3        0 pretrain, 1 full_sft, 2 rlhf (DPO), 3 reason,
                                                             4 full_dist, 5 grpo
    python scripts/serve_openai_api.py --lora_name lora_medical
    python scripts/serve_openai_api.py --load 1              a folder in Hugging Face format: MiniMind2/, or --hf_path
    python scripts/chat_openai_api.py                        a chat with it

POST /v1/chat/completions, /v1/completions · GET /v1/models, /health, /metrics

Other weights in --out_dir and other folders are served by their names (full_sft_768), adapters as "minimind:NAME";
each is loaded when first asked for. Only programs on this machine can reach it unless --host says otherwise.
response_format and tool_choice hold the answer to a JSON schema.
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import json
import math
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from dataset.tokenization import ChatTokenizer
from model.batching import Engine, QueueFull, Token
from model.flags import add_api_key, add_boolean, at_least, show_defaults
from model.generation import SamplingParams
from model.loading import READY_FLAGS, add_flags, check_sizes, given_sizes, named_path, read_config, ready_flags
from model.model_lora import find_lora
from model.streams import note, set_up_streams
from scripts.known_hosts import KnownHosts
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
    refuse_too_long,
    sampling_params,
)
from scripts.openai_grammar import make_grammar
from scripts.openai_http import EventStream, Metrics, TimedProtocol, WatchRequests, event, read_body, unless_gone
from scripts.openai_schema import ApiError, ChatRequest, CompletionRequest, parse

Echo = tuple[str, list[Token]]  # a prompt's text and, if log-probs are asked for, its tokens
LARGE = 2**16  # bytes; larger requests are read one at a time, so that they leave a core for everybody's answers
SWITCH_SECONDS = 0.0005  # the decoding engine needs Python's lock hundreds of times a token, and quickly


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve MiniMind through an OpenAI-compatible API.")
    add_flags(parser, "model_mode", "load", "out_dir", "hf_path", "lora_name", "hidden_size", "num_hidden_layers")
    add_flags(parser, "use_moe", *READY_FLAGS, "temperature", "top_p", "max_new_tokens")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from other machines")
    add("--port", type=int, default=8998, help="0: any free one")
    add("--model_name", default="minimind", help="what the default model is called in requests")
    add_api_key(parser, "key that every request must send")
    add(
        "--cors_origin",
        action="append",
        default=[],
        help="origin whose pages may call this server; may be repeated",
    )
    add("--allowed_host", action="append", default=[], help="a name under which clients may ask for this server")
    add("--slots", type=at_least(1), default=16, help="answers that are made together")
    add("--max_queue", type=at_least(0), default=64, help="requests that may wait for a slot; more get status 429")
    add("--max_models", type=at_least(1), default=3, help="models and adapters in memory; 1: the default alone")
    add("--max_messages", type=at_least(1), default=1000, help="in one request")
    add("--max_body_bytes", type=at_least(1), default=2**20, help="longest request")
    add_boolean(parser, "--quiet", False, "do not print a line for every request")
    add("--shutdown_timeout", type=at_least(0), default=30, help="seconds that running answers get at the end")
    show_defaults(parser)
    args = parser.parse_args(argv)
    try:
        SamplingParams(temperature=args.temperature, top_p=args.top_p)
    except ValueError as error:
        parser.error(str(error))
    if args.trained_length is not None and args.rope_scaling is None:
        parser.error("--trained_length belongs to --rope_scaling FACTOR")
    if not 0 <= args.port < 2**16:
        parser.error(f"--port is {args.port}, and must be between 0 and 65535")
    return args


# --- models ----------------------------------------------------------------------------------------------------------


def default_offer(args: argparse.Namespace) -> Offer:
    """Return the model that the flags name. Raises ValueError if it is missing."""
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
            if offer.entry.path.is_dir():  # its own tokenizer fits it
                flags["tokenizer_path"] = None
        ready = load_entry(offer.entry, offer.lora_name, **flags)
        engine = Engine(ready.model, slots=args.slots, context_length=ready.context_length, max_queue=args.max_queue)
        engine.start()
        return engine, ready.tokenizer

    return load


# --- endpoints -------------------------------------------------------------------------------------------------------


class Api:
    """The endpoints. generations: the requests being answered, so that a shutdown can end them."""

    def __init__(self, pool: ModelPool, args: argparse.Namespace):
        self.pool, self.args, self.metrics = pool, args, Metrics(pool.stats)
        self.generations: set[Generation] = set()
        # prompts whose log-probs are asked for are read outside the engine, one at a time
        self.reader, self.readings = ThreadPoolExecutor(1, "prompts"), 0
        self.large = ThreadPoolExecutor(1, "large requests")
        self.compiler = ThreadPoolExecutor(1, "grammars")

    def app(self) -> ASGIApp:
        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI):
            yield
            self.end_answers()
            for executor in (self.reader, self.large, self.compiler):
                executor.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.pool.close)

        # the pages of /docs would be fetched from other hosts
        app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
        checked = [Depends(self.check_key)]
        app.post("/v1/chat/completions", dependencies=checked)(self.chat)
        app.post("/v1/completions", dependencies=checked)(self.complete)
        for path, endpoint, dependencies in (
            ("/v1/models", self.models, checked),
            ("/v1/models/", self.models, checked),
            ("/v1/models/{name:path}", self.model, checked),
            ("/metrics", self.show_metrics, checked),
            ("/health", self.health, []),
        ):
            app.api_route(path, methods=["GET", "HEAD"], dependencies=dependencies)(endpoint)
        app.exception_handler(ApiError)(self.tell)
        app.exception_handler(HTTPException)(self.tell_http)
        app.exception_handler(QueueFull)(self.tell_full)
        app.exception_handler(ClientDisconnect)(self.tell_nobody)
        app.exception_handler(Exception)(self.tell_bug)
        # around the whole app, because add_middleware's layers do not see the answers of tell_bug
        whole = app
        if self.args.cors_origin:
            origins = self.args.cors_origin
            whole = CORSMiddleware(whole, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        if self.args.api_key is None:
            whole = KnownHosts(whole, {self.args.host, *self.args.allowed_host})
        paths = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/health"}
        return WatchRequests(whole, self.metrics, paths, None if self.args.quiet else print_line)

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
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict:
        def listed() -> list[dict]:
            return [self._about(name, offer) for name, offer in self.pool.offers().items()]

        return {"object": "list", "data": await asyncio.to_thread(listed)}

    async def model(self, name: str) -> dict:
        return await asyncio.to_thread(lambda: self._about(name, self.pool.find(name)))

    def _about(self, name: str, offer: Offer) -> dict:
        about = {"id": name, "object": "model", "owned_by": "minimind", "root": offer.root, "size": offer.entry.size}
        about["max_model_len"] = self.pool.context_of(offer)
        try:
            return about | {"created": int(offer.entry.path.stat().st_mtime)}
        except OSError:  # deleted since
            return about | {"created": 0}

    async def _read(self, request: Request, schema: type) -> tuple[ChatRequest | CompletionRequest, Callable]:
        """Return the request, and a function that runs work on the request in a thread.

        Parsing and encoding take time in proportion to the body, while the event loop has tokens to send.
        """
        raw = await read_body(request, self.args.max_body_bytes)
        executor, loop = self.large if len(raw) > LARGE else None, asyncio.get_running_loop()

        def run(function: Callable, *args) -> asyncio.Future:
            return loop.run_in_executor(executor, function, *args)

        body = await run(parse, schema, raw, self.args.max_messages)
        request.state.about.append(body.model if body.model.isprintable() else repr(body.model))
        return body, run

    async def chat(self, request: Request) -> Response:
        started = time.monotonic()
        body, run = await self._read(request, ChatRequest)
        self._check_count(body, 1)
        async with contextlib.AsyncExitStack() as held:
            model = await held.enter_async_context(self.pool.use(body.model))
            prompt = await run(encode_chat, model.tokenizer, body, model.engine.context_length)
            grammar = None
            if body.is_held:
                compiling = asyncio.get_running_loop().run_in_executor(self.compiler, make_grammar, model, body)
                grammar = await unless_gone(request, compiling)
                if grammar is None:
                    return await self.tell_nobody()
            generation = self._generate(held, request, model, [prompt], body, grammar)
            form = ChatFormat(model.tokenizer, body)
            return await self._answer(request, body, generation, form, started, held.pop_all())

    async def complete(self, request: Request) -> Response:
        started = time.monotonic()
        body, run = await self._read(request, CompletionRequest)
        self._check_count(body, len(body.prompt))
        async with contextlib.AsyncExitStack() as held:
            model = await held.enter_async_context(self.pool.use(body.model))
            context = model.engine.context_length
            prompts = await run(lambda: [encode_completion(model.tokenizer, prompt, context) for prompt in body.prompt])
            generation = self._generate(held, request, model, prompts, body)
            echoes = await unless_gone(request, self._echo(model, body, prompts)) if body.echo else []
            if echoes is None:
                return await self.tell_nobody()
            form = CompletionFormat(model.tokenizer, body, echoes)
            return await self._answer(request, body, generation, form, started, held.pop_all())

    def _check_count(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        answers, most = prompts * (body.n or 1), self.args.slots + self.args.max_queue
        if answers > most:
            message = f"a request may ask for at most {most} answers, not {answers}"
            raise ApiError(400, message, "n", "too_many_answers")

    async def _echo(self, model: LoadedModel, body: CompletionRequest, prompts: list[list[int]]) -> list[Echo]:
        """Return an echo of each prompt. Raises QueueFull if --max_queue requests are waiting already."""
        pairs = list(zip(body.prompt, prompts, strict=True))
        if body.logprobs is None:
            return await asyncio.to_thread(lambda: [make_echo(model, *pair) for pair in pairs])
        if self.readings > self.args.max_queue:
            raise QueueFull(self.readings - 1, 1.0)
        self.readings += 1
        try:
            # one by one, so that requests take turns, and a request whose client has gone is not read to its end
            loop = asyncio.get_running_loop()
            return [await loop.run_in_executor(self.reader, make_echo, model, *pair, body.logprobs) for pair in pairs]
        finally:
            self.readings -= 1

    def _generate(
        self,
        held: contextlib.AsyncExitStack,
        request: Request,
        model: LoadedModel,
        prompts: list[list[int]],
        body: ChatRequest | CompletionRequest,
        grammar: Callable | None = None,
    ) -> Generation:
        """Queue all answers to a request; leaving `held` cancels them."""
        is_chat, context_length = isinstance(body, ChatRequest), model.engine.context_length
        param = "messages" if is_chat else "prompt"
        for ids in prompts:
            refuse_too_long(param, len(ids), context_length)
        tokenizer = model.tokenizer
        defaults = SamplingParams(
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            max_new_tokens=self.args.max_new_tokens,
            stop_ids=(tokenizer.eos_id, tokenizer.pad_id),
        )
        tools = is_chat and bool(body.offered_tools)
        one_call = is_chat and body.parallel_tool_calls is False
        split_thoughts = is_chat and not body.is_json
        params = sampling_params(body, defaults)
        if grammar:
            params = [replace(each, grammar=grammar, stop_ids=defaults.stop_ids) for each in params]
        nothing, stop = body.max_tokens == 0, body.stop or ()
        try:
            generation = Generation(
                model.engine, tokenizer, prompts, params, stop, split_thoughts, tools, one_call, nothing
            )
        except ValueError as error:
            raise ApiError(400, str(error), param, "invalid_value") from error
        self.generations.add(generation)
        held.callback(self.generations.discard, generation)
        held.callback(generation.close)

        def count() -> None:
            usage = generation.usage()
            self.metrics.count_usage(model.name, usage)
            request.state.about.append(f"{usage['prompt_tokens']}+{usage['completion_tokens']} tokens")

        held.callback(count)
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

            def render() -> bytes:  # by parts: log-probs of a long answer take a while
                choices = [form.whole(choice, found[choice]) for choice in generation.choices]
                encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                return "".join(encoder.iterencode(about | {"choices": choices, "usage": generation.usage()})).encode()

            return Response(await asyncio.to_thread(render), media_type="application/json")

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
                        yield chunk(form.chunk(choice, []) | {"finish_reason": choice.finish_reason})
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
        """Answer a client that has gone; only metrics and log see it."""
        return Response(status_code=499)

    async def tell_bug(self, request: Request, error: Exception) -> JSONResponse:
        return await self.tell(request, ApiError(500, f"internal server error: {type(error).__name__}"))


def make_echo(model: LoadedModel, prompt: str | list[int], ids: list[int], logprobs: int | None = None) -> Echo:
    """Return a prompt's echo. ids: its tokens. logprobs: how many likely tokens to give for each; None: no tokens."""
    text = prompt if isinstance(prompt, str) else model.tokenizer.decode(ids, skip_control=False)
    tokens = [] if logprobs is None else prompt_log_probs(model.engine.model, ids, logprobs)
    if any(token.logprob is not None and math.isnan(token.logprob) for token in tokens):
        raise ApiError(503, "the log-probs are not finite: the weights are broken", "model", "model_broken")
    if isinstance(prompt, str) and ids != model.tokenizer.encode_documents([prompt])[0]:
        tokens = tokens[1:]  # a bos that the prompt did not hold
    return text, tokens


# --- the process -----------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Asked to stop, it takes no new connections and lets running answers finish; asked again, it ends them at once."""

    def __init__(self, config: uvicorn.Config, api: Api):
        super().__init__(config)
        self.api, self.stopped_by, self.hurried = api, None, False

    def handle_exit(self, sig: int, frame) -> None:
        self.hurried, self.should_exit, self.stopped_by = self.should_exit, True, sig

    async def shutdown(self, sockets=None) -> None:
        if self.api.generations:
            seconds = self.api.args.shutdown_timeout
            count = len(self.api.generations)
            note(f"requests being answered: {count}; they have {seconds} s. Ctrl-C ends them now")
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        started = time.monotonic()
        while not self.hurried and time.monotonic() < started + self.api.args.shutdown_timeout:
            await asyncio.sleep(0.05)
        for _ in range(40):  # tell all clients, also those that are still sending a request
            self.api.end_answers()
            await asyncio.sleep(0.05)
        if self.stopped_by:
            os._exit(self.status)  # whatever still runs would end in tracebacks

    @property
    def status(self) -> int:
        return 130 if self.stopped_by == signal.SIGINT else 0


def print_line(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed terminal must not fail a request
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ValueError, which names the flag that is wrong."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = host == "::" and socket.has_dualstack_ipv6()  # all addresses, those of IPv4 too
        return socket.create_server(address[:2], family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use: stop the program that has it, or choose another with --port"
            raise ValueError(message) from error
        raise ValueError(f"--host {host} --port {port} cannot be used: {error.strerror or error}") from error


def make_server(args: argparse.Namespace) -> tuple[Server, socket.socket]:
    """Return the server with its default model loaded, and the socket to listen on. Raises ValueError."""
    listener = listen(args.host, args.port)
    default = default_offer(args)
    load = make_loader(args, default)
    engine, tokenizer = load(default)
    check_sizes(engine.model.config, default.entry.path, *given_sizes(args))
    folders = (ROOT, Path(args.hf_path))
    pool = ModelPool(args.model_name, default, Path(args.out_dir), folders, load, args.max_models)
    pool.add(default, engine, tokenizer)
    api = Api(pool, args)
    config = uvicorn.Config(api.app(), http=TimedProtocol, log_level="warning", access_log=False, server_header=False)
    return Server(config, api), listener


def main(argv: list[str] | None = None) -> int:
    set_up_streams()
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server runs
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        server, listener = make_server(args)
        announce(args, server.api.pool, listener.getsockname()[1])
        # a full collection over everything torch and transformers loaded would pause all answers for a quarter second
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
        server.run(sockets=[listener])
        return server.status
    except (ValueError, OSError) as error:
        note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


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
