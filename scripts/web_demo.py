"""A web page to talk to MiniMind: streamlit run web_demo.py

    cd scripts && streamlit run web_demo.py --server.port 9994
    streamlit run scripts/web_demo.py -- --out_dir out/quickstart     flags of the page come after --
    python scripts/web_demo.py                                        the same, without flags of Streamlit

Offers the models in out/ and in folders in Hugging Face format, and any OpenAI-compatible server. This file starts the
page, which is web_page.py, and tells browsers to fetch nothing from elsewhere. Chats are kept in OUT_DIR/chats/.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import streamlit
from starlette.datastructures import Headers
from starlette.middleware import Middleware

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
from model.flags import show_defaults
from model.loading import add_flags
from scripts.known_hosts import KnownHosts

VISITOR_COOKIE = "minimind_visitor"
FLAGS_VARIABLE = "MINIMIND_WEB_FLAGS"  # how the flags reach web_page.py, which Streamlit runs apart from this file


def content_security_policy() -> str:
    """Return a policy under which the browser loads nothing from other hosts and runs only Streamlit's own scripts.

    These are its files, the lines in its index.html (by their hash), and the copy button, which Streamlit hands over as
    a blob. Its styles are made while it runs, hence unsafe-inline.
    """
    index = Path(streamlit.__file__).with_name("static") / "index.html"
    inline = re.findall(r"<script>(.*?)</script>", index.read_text("utf-8"), re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in inline]
    scripts = " ".join(["'self'", "'wasm-unsafe-eval'", "blob:", *(f"'sha256-{value}'" for value in hashes)])
    return (
        f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A web page to talk to MiniMind.")
    add_flags(parser, "out_dir", "tokenizer_path", "max_seq_len", "device", "dtype", "temperature", "top_p")
    add_flags(parser, "max_new_tokens")
    add = parser.add_argument
    add("--hf_path", nargs="+", default=[str(ROOT)], help="folders in Hugging Face format, or folders that hold such")
    add("--allowed_host", action="append", default=[], help="a name under which browsers may ask for the page")
    add("--base_url", default="http://127.0.0.1:8998/v1", help="server that the page offers under API")
    show_defaults(parser)
    return parser.parse_args(argv)


class SecurityHeaders:
    """Add the policy to every response, and to the page itself a cookie that tells visitors apart."""

    HEADERS = (
        (b"content-security-policy", content_security_policy().encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    )

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.HEADERS]
                if scope["path"] == "/" and VISITOR_COOKIE not in Headers(scope=scope).get("cookie", ""):
                    cookie = (
                        f"{VISITOR_COOKIE}={secrets.token_urlsafe(16)}; Max-Age=31536000; HttpOnly; SameSite=Strict"
                    )
                    message["headers"].append((b"set-cookie", cookie.encode()))
            await send(message)

        await self.app(scope, receive, send_with_headers)


@contextlib.asynccontextmanager
async def end_quietly(_) -> AsyncIterator[None]:
    """Stop the server at Ctrl-C; uvicorn would pass the signal on after stopping, and click print "Aborted!"."""
    server = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if server is not None:
        signal.signal(signal.SIGINT, lambda *_: vars(server).update(force_exit=server.should_exit, should_exit=True))
    yield


args = parse_args(sys.argv[1:])
os.environ[FLAGS_VARIABLE] = json.dumps(vars(args))
names = [streamlit.get_option("server.address") or "", streamlit.get_option("browser.serverAddress") or ""]
known_hosts = Middleware(KnownHosts, names=[*names, *args.allowed_host])
middleware = [known_hosts, Middleware(SecurityHeaders)]
app = streamlit.App(Path(__file__).with_name("web_page.py"), middleware=middleware, lifespan=end_quietly)

if __name__ == "__main__":
    app.run()
