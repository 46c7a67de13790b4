"""The openai library's client as the terminal chat and the web page use it."""

from typing import TypeVar
from urllib.parse import urlsplit

import openai

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)


def new_client(kind: type[Client], base_url: str, **options) -> Client:
    """A client of this kind. ValueError where base_url is none."""
    # a proxy that the environment names has no way to this machine, and what is said here is none of its business
    if urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1"):
        is_async = issubclass(kind, openai.AsyncOpenAI)
        http_client = openai.DefaultAsyncHttpxClient if is_async else openai.DefaultHttpxClient
        options["http_client"] = http_client(trust_env=False)
    return kind(base_url=base_url, **options)
