"""A server in a thread of the test process, on tiny models, for the tests of the server and of its client."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import openai
import torch
from conftest import sharp_model, write_weights

from dataset.tokenization import ChatTokenizer
from model.batching import Token
from model.model_lora import apply_lora, lora_layers, save_lora
from scripts import serve_openai_api
from scripts.model_catalog import entry_of_file
from scripts.model_pool import Offer

ECHO = "full_dist_32"  # EchoEngine's name


def write_models(folder: Path, tokenizer: ChatTokenizer) -> Path:
    write_weights(folder / "full_sft_32.pth", tokenizer, scale=3.0)
    write_weights(folder / "reason_32_moe.pth", tokenizer, seed=1, scale=3.0, use_moe=True)
    write_weights(folder / "full_dist_32.pth", tokenizer, seed=2, scale=3.0)
    model = apply_lora(sharp_model(), rank=2)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora.B.weight)
    save_lora(folder / "lora" / "lora_medical_32.pth", model, {"tokenizer_sha256": tokenizer.sha256})
    return folder


class EchoEngine:
    """Answers with the last user's words, a token at a time, so that a test can have any text as an answer."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer, self.context_length, self.requests = tokenizer, 512, []
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=tokenizer.vocab_size))
        self.opening = [tokenizer.bos_id, *tokenizer.encode_contents(["user\n"])[0]]

    def submit(self, prompt_ids, params, notify):
        starts = [i for i in range(len(prompt_ids)) if prompt_ids[i : i + len(self.opening)] == self.opening]
        words = prompt_ids[starts[-1] + len(self.opening) :] if starts else [self.tokenizer.eos_id]
        words = words[: words.index(self.tokenizer.eos_id)]
        ids = [*words, self.tokenizer.eos_id][: params.max_new_tokens]
        self.requests.append(EchoRequest(ids, params, notify, prompt_ids))
        return self.requests[-1]

    def stats(self) -> dict:
        return {"slots": 1, "running": 0, "waiting": 0}

    def close(self) -> None:
        pass


class EchoRequest:
    error, cached_tokens = None, 0

    def __init__(self, ids, params, notify, prompt_ids):
        self.ids, self.params, self.notify, self.prompt_ids, self.cancelled = ids, params, notify, prompt_ids, False

    @property
    def finish_reason(self) -> str | None:
        if self.cancelled:
            return "cancelled"
        return None if self.ids else ("stop" if self.last in self.params.stop_ids else "length")

    def take(self) -> tuple[list[Token], str | None]:
        if not self.ids:
            return [], self.finish_reason
        self.last = self.ids.pop(0)
        self.notify()
        return [Token(self.last, -0.5, [(self.last, -0.5)][: self.params.logprobs])], self.finish_reason

    def cancel(self) -> None:
        self.cancelled = self.cancelled or bool(self.ids)


@contextlib.contextmanager
def running_server(out_dir: Path, *flags: str) -> Iterator[SimpleNamespace]:
    """url, api (scripts/serve_openai_api.py's Api), client: the real one of openai; engine of the default model."""
    common = ["--out_dir", str(out_dir), "--hf_path", str(out_dir / "none"), "--device", "cpu", "--port", "0"]
    args = serve_openai_api.parse_args([*common, "--max_models", "4", "--quiet", *flags])
    server, listener = serve_openai_api.make_server(args)
    api, port = server.api, listener.getsockname()[1]
    tokenizer = api.pool._loaded[api.pool.default.key].tokenizer
    echo = EchoEngine(tokenizer)
    api.pool.add(Offer(entry_of_file(out_dir / "full_dist_32.pth")), echo, tokenizer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    root = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{root}/v1", api_key=args.api_key or "none", max_retries=0, timeout=60)
    try:
        yield SimpleNamespace(
            root=root, url=f"{root}/v1", port=port, api=api, client=client, echo=echo, tokenizer=tokenizer,
            engine=api.pool.engine_of_default, server=server,
        )  # fmt: skip
    finally:
        client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
