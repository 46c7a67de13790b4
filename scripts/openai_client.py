"""The openai library's client as the terminal chat and the web page use it."""

from typing import TypeVar
from urllib.parse import urlsplit

import openai

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)


def new_client(kind: type[Client], base_url: str, **options) -> Client:
    """Create an OpenAI client. Raises ValueError if base_url is invalid."""
    # a proxy that the environment names cannot reach this machine, and need not hear what is said here
    if urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1"):
        is_async = issubclass(kind, openai.AsyncOpenAI)
        http_client = openai.DefaultAsyncHttpxClient if is_async else openai.DefaultHttpxClient
        options["http_client"] = http_client(trust_env=False)
    return kind(base_url=base_url, **options)


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
