"""Load test of the server: many clients at once, each asking again as soon as it has its answer.

    python benchmarks/serving.py [--clients 64] [--seconds 60] [--weight out/full_sft_512.pth]
    python benchmarks/serving.py --hostile                                  once without and once with a hostile client
    python benchmarks/serving.py --base_url http://127.0.0.1:8998/v1        a server that runs already

The openai client asks for chats of one to six turns; three in four answers are streamed, and one stream in ten is left
in its middle. Printed: time to first token of streams (from sending, queue included; refused tries apart), time between
the tokens of a stream, tokens of answers per second, refusals (429, tried again after Retry-After) and errors by kind,
and what the server still holds a second after the last client has gone. The hostile client sends megabytes of errors,
of text and of brackets, schemas that explode, names that do not exist, and requests that it does not finish or does not
wait for.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx
import openai
import psutil

from benchmarks.decoding import random_model
from dataset.tokenization import ChatTokenizer
from model.weights import save_weights
from scripts.openai_client import own_server

WORDS = "the sky was grey and an old king read by his fire 今天 天气 很好 我们 去 公园 看 花 and then it rained".split()
LEFT_STREAMS, WHOLE_ANSWERS = 0.1, 0.25


@dataclass
class Load:
    """What the clients saw."""

    first_token: list[float] = field(default_factory=list)  # seconds
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of a stream
    answers: int = 0
    left: int = 0
    tokens: int = 0
    refused: int = 0
    errors: Counter = field(default_factory=Counter)
    hostile: Counter = field(default_factory=Counter)  # what the hostile client was told, by status
    seconds: float = 0.0


def conversation(rng: random.Random) -> list[dict]:
    turns = [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for _ in range(rng.choice((1, 1, 1, 3, 5)))]
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


async def ask(client: openai.AsyncOpenAI, model: str, rng: random.Random, max_tokens: int, load: Load) -> None:
    """Ask for one answer: whole, streamed or left."""
    options = {"model": model, "messages": conversation(rng), "max_tokens": rng.randint(max_tokens // 4, max_tokens)}
    started = time.perf_counter()
    if rng.random() < WHOLE_ANSWERS:
        done = await client.chat.completions.create(**options)
        load.tokens += done.usage.completion_tokens
        load.answers += 1
        return
    leave_after = rng.randint(1, 20) if rng.random() < LEFT_STREAMS else None
    seen, finished, last = 0, False, 0.0
    stream = await client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options)
    async with stream:
        async for chunk in stream:
            if chunk.usage:
                load.tokens += chunk.usage.completion_tokens
                finished = True
            elif chunk.choices[0].delta.content:
                now = time.perf_counter()
                (load.gaps if seen else load.first_token).append(now - (last if seen else started))
                last = now
                seen += 1
                if seen == leave_after:
                    load.tokens += seen
                    load.left += 1
                    return
    if finished:
        load.answers += 1
    else:
        load.errors["a stream that ended without its usage"] += 1


async def client_loop(client, model: str, number: int, end: float, max_tokens: int, load: Load) -> None:
    rng = random.Random(number)
    while time.perf_counter() < end:
        try:
            await ask(client, model, rng, max_tokens, load)
        except openai.RateLimitError as error:
            load.refused += 1
            wait = float(error.response.headers["retry-after"])
            await asyncio.sleep(min(wait, max(end - time.perf_counter(), 0)))
        except openai.APIStatusError as error:
            load.errors[f"status {error.status_code}"] += 1
        except openai.OpenAIError as error:
            load.errors[type(error).__name__] += 1


def hostile_bodies(model: str) -> list[tuple[str, bytes]]:
    """Return (path, body) of requests that cost their sender little."""
    hello = [{"role": "user", "content": "hello"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

    def schema(schema: dict) -> dict:
        json_schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        return {"messages": hello, "max_tokens": 8, "response_format": json_schema}

    chats = [
        {"messages": [1] * 500_000},
        {"messages": [{"role": "user", "content": [1] * 300_000}]},
        {"messages": hello, "stop": ["a" * 1000] * 500},
        {"messages": hello, "tools": [tool] * 10_000},
        {"messages": [{"role": "user", "content": "word " * 200_000}]},
        {"messages": [{"role": "user", "content": "a" * 1_000_000}]},
        {"messages": hello * 25_000},
        {"messages": hello, "metadata": [[{}]] * 150_000},
        {"messages": hello, "max_tokens": 400, "logprobs": True, "top_logprobs": 20, "n": 2},
        {"messages": hello, "model": "nothing"},
        schema({"type": "array", "items": {"type": "string", "pattern": "(a{1,500}){1,500}"}, "minItems": 100_000}),
        schema({"anyOf": [{"const": "x" * number} for number in range(1, 1000)]}),
        schema({"type": "string", "pattern": "(x+x+)+y" * 50}),
    ]
    prompts = [{"prompt": [1] * 300_000 + ["a"]}, {"prompt": ["a"] * 200_000}, {"prompt": "word " * 1500, "echo": True,
                "logprobs": 20, "max_tokens": 0}]  # fmt: skip
    kinds = [("chat/completions", chat) for chat in chats] + [("completions", prompt) for prompt in prompts]
    bodies = [(path, json.dumps({"model": model} | body, separators=(",", ":")).encode()) for path, body in kinds]
    return [*bodies, ("chat/completions", b"[" * 900_000), ("completions", b'{"a":' * 180_000)]


async def hostile_loop(base_url: str, model: str, bodies: list[tuple[str, bytes]], end: float, load: Load) -> None:
    """Send the bodies one after the other, at least one, and leave requests half sent on the way."""
    url, half_sent = httpx.URL(base_url), []
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        for path, body in itertools.cycle(bodies):
            if len(half_sent) < 200:
                _, writer = await asyncio.open_connection(url.host, url.port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
                half_sent.append(writer)
            abandoned = {"model": model, "prompt": "the sky", "stream": True, "max_tokens": 400}
            async with client.stream("POST", f"{base_url}/completions", json=abandoned) as stream:
                load.hostile[stream.status_code] += 1
            answer = await client.post(f"{base_url}/{path}", content=body, headers={"Content-Type": "application/json"})
            load.hostile[answer.status_code] += 1
            if time.perf_counter() > end:
                break
    for writer in half_sent:
        writer.close()


async def run_load(base_url: str, clients: int, seconds: float, max_tokens: int, hostile: bool = False) -> Load:
    """Ask for so long; what has begun by then is answered to its end."""
    # one client object with a connection for each, because making 64 of them takes seconds
    http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
    options = {"api_key": "none", "max_retries": 0, "timeout": 300}
    async with openai.AsyncOpenAI(base_url=base_url, http_client=http_client, **options) as client:
        model = [model.id async for model in client.models.list()][0]
        bodies = hostile_bodies(model) if hostile else []  # made before the clock starts: they take a while
        load, started = Load(), time.perf_counter()
        loops = (client_loop(client, model, n, started + seconds, max_tokens, load) for n in range(clients))
        attacks = [hostile_loop(base_url, model, bodies, started + seconds, load)] if hostile else []
        await asyncio.gather(*loops, *attacks)
        load.seconds = time.perf_counter() - started
    return load


def held_by_server(base_url: str) -> int:
    """Return the answers under way and waiting."""
    text = httpx.get(base_url.removesuffix("/v1") + "/metrics", trust_env=False).text
    return int(sum(map(float, re.findall(r"^minimind_(?:running|waiting)\{.*\} (\S+)$", text, re.MULTILINE))))


def slots_leaked(base_url: str) -> int:
    """Return what is held when everyone has gone; the server has a second to notice."""
    end = time.monotonic() + 1
    while held_by_server(base_url) and time.monotonic() < end:
        time.sleep(0.05)
    return held_by_server(base_url)


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1] if len(values) > 1 else 0.0


def report(load: Load, clients: int, leaked: int) -> str:
    first = f"p50 {percentile(load.first_token, 0.5):.2f} s, p95 {percentile(load.first_token, 0.95):.2f} s"
    gap = f"p50 {percentile(load.gaps, 0.5) * 1000:.0f} ms, p99 {percentile(load.gaps, 0.99) * 1000:.0f} ms"
    hostile = "".join(f", {count} x {status}" for status, count in sorted(load.hostile.items()))
    errors = ", ".join(f"{count} {kind}" for kind, count in load.errors.items()) or "none"
    return (
        f"{clients} clients for {load.seconds:.0f} s: {load.answers} answers, {load.left} streams left half-way\n"
        f"first token   {first} ({len(load.first_token)} streams)\n"
        f"token gap     {gap}, most {max(load.gaps, default=0) * 1000:.0f} ms\n"
        f"throughput    {load.tokens / load.seconds:,.0f} tokens/s\n"
        f"refused (429) {load.refused}, tried again after Retry-After\n"
        f"other errors  {errors}\n"
        f"slots leaked  {leaked}" + (f"\nhostile       answered{hostile[1:]}" if hostile else "")
    )


@contextlib.contextmanager
def server_of(args: argparse.Namespace):
    """Give (URL, process id) of a server that lives as long as the measurement."""
    with tempfile.TemporaryDirectory() as folder:
        weight = args.weight or Path(folder) / "full_sft_512.pth"
        if not (match := re.fullmatch(r"full_sft_(\d+)(_moe)?", weight.stem)):
            raise SystemExit(f"error: --weight {weight} is not named full_sft_SIZE.pth")
        if not args.weight:
            save_weights(
                weight, random_model(use_moe=False), {"tokenizer_sha256": ChatTokenizer(ROOT / "model").sha256}
            )
        flags = {name: getattr(args, name) for name in ("device", "slots", "max_queue", "dtype")}
        flags |= {"out_dir": weight.parent, "hidden_size": match[1], "use_moe": bool(match[2])}
        words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        with own_server(*words) as server:
            yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", help="of a server that is already running")
    parser.add_argument("--weight", type=Path, help="full_sft_SIZE.pth (default: random weights of the 26M preset)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max_tokens", type=int, default=128, help="longest answer; the shortest has a quarter")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--max_queue", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--hostile", action="store_true", help="measure again with a hostile client among the others")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url, pid = (args.base_url, None) if args.base_url else stack.enter_context(server_of(args))
        asyncio.run(run_load(url, 2, 1, 8))  # warms up
        for hostile in (False, True) if args.hostile else (False,):
            before = psutil.Process(pid).memory_info().rss / 1e6 if pid else 0
            load = asyncio.run(run_load(url, args.clients, args.seconds, args.max_tokens, hostile))
            print(report(load, args.clients, slots_leaked(url)))
            if pid:
                after = psutil.Process(pid).memory_info().rss / 1e6
                print(f"memory        {before:,.0f} MB before, {after:,.0f} MB after")


if __name__ == "__main__":
    main()
