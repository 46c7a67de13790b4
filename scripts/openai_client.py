"""The openai library's client as the terminal chat and the web page use it, and a server of our own to ask."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import openai

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)


def new_client(kind: type[Client], base_url: str, api_key: str | None, **options) -> Client:
    """Create an OpenAI client. Raises ValueError if base_url is invalid."""
    # a proxy that the environment names cannot reach this machine, and need not hear what is said here
    if urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1"):
        is_async = issubclass(kind, openai.AsyncOpenAI)
        http_client = openai.DefaultAsyncHttpxClient if is_async else openai.DefaultHttpxClient
        options["http_client"] = http_client(trust_env=False)
    return kind(base_url=base_url, api_key=api_key or "none", **options)


def explain(error: Exception, base_url: str, key_cure: str = "--api_key KEY, or MINIMIND_API_KEY") -> str:
    """Return what went wrong with a server, and the cure; of a ValueError of ours what it says."""
    if type(error) is ValueError:
        return str(error)
    if not isinstance(error, openai.OpenAIError):  # whatever a server sends
        return f"{base_url} gave no usable answer: {error or type(error).__name__}"
    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} did not answer in time"
    # by name: the error is one of httpx or of httpx2, by the version of openai
    if type(error.__cause__).__name__ in ("RemoteProtocolError", "ReadError"):
        return f"the connection to {base_url} broke before the answer was complete"
    if isinstance(error, openai.APIConnectionError):
        return f"no server at {base_url}; start one with: python scripts/serve_openai_api.py, or name it by --base_url"
    if isinstance(error, openai.AuthenticationError):
        return f"{base_url} asks for an API key: {key_cure}"
    if isinstance(error, openai.NotFoundError) and not base_url.rstrip("/").endswith("/v1"):
        return f"there is no OpenAI API at {base_url}; is it {base_url.rstrip('/')}/v1?"
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    return f"{base_url} is busy: {text or error}" if isinstance(error, openai.RateLimitError) else str(text or error)


@contextlib.contextmanager
def own_server(*flags: str) -> Iterator[tuple[str, int]]:
    """Yield the base URL and the process id of a server with these flags. Raises ValueError if it does not start."""
    script = str(Path(__file__).with_name("serve_openai_api.py"))
    command = [sys.executable, "-u", script, "--port=0", "--quiet", *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        found = next(filter(None, (re.search(r"listening on (\S+)", line) for line in server.stdout)), None)
        if found is None:
            raise ValueError("the server did not start; its message is above")
        yield found[1], server.pid
    finally:
        server.terminate()
        server.communicate()
