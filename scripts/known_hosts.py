"""Refuse requests from web pages whose own name points to this machine (DNS rebinding); for server and web page."""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse


class KnownHosts:
    """Let requests through whose Host is an address, localhost, or one of `names`.

    A page at evil.example that makes its name point to 127.0.0.1 may talk to programs here as if they were its own
    server, but its requests still say Host: evil.example. An address cannot be made to point elsewhere.
    """

    def __init__(self, app, names: Collection[str]):
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope, receive, send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] in ("http", "websocket") else None
        if host is None or self.knows(host):  # programs that send none are not browsers
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message = f"this server does not answer to the name {host!r}; allow it with --allowed_host NAME\n"
            await PlainTextResponse(message, 421)(scope, receive, send)

    def knows(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            return name in self.names or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
        except ValueError:  # neither an address nor a known name
            return False
