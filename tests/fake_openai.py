"""A server that speaks the OpenAI protocol and says what a test wants: the model's name chooses how it behaves."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = ("says", "thinks", "ponders", "endless", "silent", "full", "broken", "breaks-off", "dies", "odd", "flood")
KEY = "secret"


class FakeOpenAI(ThreadingHTTPServer):
    """names: the models, or None for a web page in place of an API. text: what `says` answers, in pieces of three
    characters. requests: the bodies that came; paths: what else was
    asked for. gone: set when a client has dropped an answer that has no end."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.names, self.text, self.needs_key = list(MODELS), "Hello.", False
        self.requests, self.paths, self.gone = [], [], threading.Event()
        self.first_chunk = {}  # what `odd` says first

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.needs_key and self.headers.get("authorization") != f"Bearer {KEY}":
            return self.reply(401, {"error": {"message": "wrong key", "type": "invalid_request_error"}})
        if self.path != "/v1/models":
            self.server.paths.append(self.path)
        if self.path.startswith("/v1/models/"):
            return self.reply(404, {"detail": "Not Found"})
        if self.server.names is None:
            return self.reply(200, "<html>")
        self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.names]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(body)
        model = body["model"]
        if model == "full":
            message = "the prompt holds 900 tokens, and the context 512"
            return self.reply(400, {"error": {"message": message, "type": "invalid_request_error"}})
        if model == "broken":
            return self.reply(500, {"error": {"message": "out of memory", "type": "server_error"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        if model == "dies":
            self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        if model == "dies":
            self.wfile.write(b"ffff\r\n")  # the length of a chunk that does not come to its end
        with contextlib.suppress(ConnectionError):
            self.answer(model)

    def answer(self, model: str) -> None:
        self.event({"role": "assistant"})
        if model in ("thinks", "ponders"):
            self.event({"reasoning_content": "First, "})
            self.event({"reasoning_content": "the sky."})
        while model in ("ponders", "endless", "silent"):
            try:
                if model != "silent":
                    self.event({"content": "on and "})
                else:  # a comment: nothing for the client, but it shows whether it is there
                    self.wfile.write(b":\n\n")
                    self.wfile.flush()
            except ConnectionError:
                self.server.gone.set()
                return
            threading.Event().wait(0.02)
        if model == "odd":
            first = self.server.first_chunk
            self.send_event({"choices": []} | first if isinstance(first, dict) else first)
        while model == "flood":
            self.event({"content": "on and " * 100})
        for start in range(0, len(self.server.text), 3):
            self.event({"content": self.server.text[start : start + 3]})
        if model in ("breaks-off", "dies"):
            return
        self.event({}, finish_reason="stop")
        self.chunk({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 42, "total_tokens": 47}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, delta: dict, finish_reason: str | None = None) -> None:
        self.chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})

    def chunk(self, fields: dict) -> None:
        self.send_event({"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"} | fields)

    def send_event(self, content) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def reply(self, status: int, body: dict | str) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("content-type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def fake_openai() -> Iterator[FakeOpenAI]:
    server = FakeOpenAI()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
