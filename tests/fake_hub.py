"""A hub on this machine that speaks what the uploading clients of Hugging Face and ModelScope speak, and breaks."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections import Counter, defaultdict
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretsecretsecretsecretsecretsecr"
LARGE = 50_000  # bytes from which a file goes by LFS


class LoopbackServer(http.server.ThreadingHTTPServer):
    """Serves on a free port of this machine from the start."""

    daemon_threads = True

    def __init__(self, handler: type[http.server.BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class QuietHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass


class FakeHub(LoopbackServer):
    """repos: "models/OWNER/NAME" -> {file name: bytes}.

    faults: a part of an address -> what goes wrong with the next requests for it: a status, or "cut" (the connection
    ends in the middle of what is sent).
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.branches: dict[str, set[str]] = defaultdict(set)
        self.faults: dict[str, list] = {}
        self.asked: list[str] = []
        self.sent, self.created, self.private, self.sdks = Counter(), [], set(), []
        super().__init__(Handler)


class Handler(QuietHandler):
    def do_HEAD(self) -> None:
        self._handle()

    do_GET = do_POST = do_PUT = do_HEAD

    def _handle(self) -> None:
        path, server = unquote(urlsplit(self.path).path), self.server
        server.asked.append(f"{self.command} {path}")
        fault = next((kinds.pop(0) for part, kinds in server.faults.items() if part in path and kinds), None)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.body = self.rfile.read(length)
        if not self.headers.get("Content-Length") and self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        if isinstance(fault, int):
            self._answer({"error": f"refused with {fault}", "Message": f"refused with {fault}"}, fault)
        elif self.command == "PUT":
            self._put(path)
        elif path.startswith("/openapi/") or path.startswith("/api/v1/"):
            self._modelscope(path)
        else:
            self._hugging_face(path)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _put(self, path: str) -> None:
        oid = path.rsplit("/", 1)[1]
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self.server.sent[oid] += 1
        self._answer({})

    # --- Hugging Face ---

    def _hugging_face(self, path: str) -> None:
        server, parts = self.server, path.strip("/").split("/")
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and path != "/api/validate-yaml" and not authorised:
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/whoami-v2":
            self._answer({"name": "me"} if authorised else {"error": "Invalid credentials"}, 200 if authorised else 401)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            wanted = json.loads(self.body)
            name = f"{wanted.get('type', 'model')}s/{wanted.get('organization') or 'me'}/{wanted['name']}"
            server.repos.setdefault(name, {})
            server.created.append(name)
            server.sdks += [wanted["sdk"]] if wanted.get("sdk") else []
            server.private |= {name} if wanted.get("private") or wanted.get("visibility") == "private" else set()
            self._answer({"url": f"{server.url}/{name.removeprefix('models/')}"})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = []
            for entry in json.loads(self.body)["objects"]:
                actions = {"upload": {"href": f"{server.url}/put/{entry['oid']}"}}
                objects.append(entry | ({} if entry["oid"] in server.blobs else {"actions": actions}))
            self._answer({"transfer": "basic", "objects": objects})
        elif parts[0] == "api":
            name = "/".join(parts[1:4])
            if name not in server.repos:
                self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            else:
                self._repository(name, parts[4:])
        elif "resolve" in parts:
            at = parts.index("resolve")
            kind = "models/" if at == 2 else ""
            self._file(kind + "/".join(parts[:at]), "/".join(parts[at + 2 :]))
        else:
            self._answer({"error": f"unknown {path}"}, 400)

    def _repository(self, name: str, rest: list[str]) -> None:
        server = self.server
        files = server.repos[name]
        what, revision = rest[0] if rest else "info", rest[1] if len(rest) > 1 else "main"
        if what == "branch":
            server.branches[name].add(revision)
            self._answer({})
        elif revision not in ("main", "c" * 40) and revision not in server.branches[name]:
            self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self._answer([{"type": "file", "path": n, "size": len(d), "oid": git_hash(d)} for n, d in files.items()])
        elif what == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(self.body)["files"]
            ]
            self._answer({"files": modes})
        elif what == "commit":
            for line in self.body.splitlines():
                record = json.loads(line)
                value = record["value"]
                if record["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif record["key"] == "lfsFile":
                    files[value["path"]] = server.blobs[value["oid"]]
            url = f"{server.url}/{name.removeprefix('models/')}"
            self._answer({"success": True, "commitOid": "c" * 40, "commitUrl": f"{url}/commit/{'c' * 40}"})
        else:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            self._answer({"id": name.split("/", 1)[1], "sha": "c" * 40, "siblings": siblings, "tags": []})

    def _file(self, name: str, file: str) -> None:
        if file not in self.server.repos.get(name, {}):
            self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = self.server.repos[name][file]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self._answer(data, 200, {"ETag": etag, "X-Repo-Commit": "c" * 40, "X-Linked-Size": str(len(data))})

    # --- ModelScope ---

    def _modelscope(self, path: str) -> None:
        server, parts = self.server, path.strip("/").split("/")
        kinds = [part for part in ("models", "datasets") if part in parts]
        name = "/".join(parts[parts.index(kinds[0]) :][:3]) if kinds else ""
        known, missing = name in server.repos, ({"Code": 10010205001, "Message": "not found", "success": False}, 404)
        if path.startswith("/openapi/") and "users" in parts:
            self._answer({"success": True, "data": {"username": "me"}})
        elif path in ("/api/v1/models", "/api/v1/datasets") and self.command == "POST":
            wanted = fields(self.body)
            made = f"{parts[-1]}/{wanted.get('Path') or wanted.get('Owner')}/{wanted['Name']}"
            server.repos.setdefault(made, {})
            server.created.append(made)
            self._answer({"Code": 200, "Success": True, "Data": {"Name": wanted["Name"]}})
        elif not known:
            self._answer(*missing)
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(self.body)["objects"]
            objects = []
            for entry in wanted:
                actions = {"upload": {"href": f"{server.url}/put/{entry['oid']}"}}
                objects.append(entry | ({} if entry["oid"] in server.blobs else {"actions": actions}))
            self._answer({"Code": 200, "Success": True, "Data": {"objects": objects}})
        elif "commit" in parts:
            for action in json.loads(self.body)["actions"]:
                lfs = action["type"] == "lfs"
                content = server.blobs[action["sha256"]] if lfs else base64.b64decode(action["content"])
                server.repos[name][action["path"]] = content
            self._answer({"Code": 200, "Success": True, "Data": {"oid": "c" * 40}})
        elif "files" in parts or "tree" in parts:
            files = [{"Path": n, "Name": n, "Size": len(d), "Type": "blob"} for n, d in server.repos[name].items()]
            self._answer({"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}})
        else:
            owner, title = name.split("/")[1:]
            data = {"Path": owner, "Name": title, "owner": owner, "name": title, "id": 1}
            self._answer({"Code": 200, "Success": True, "success": True, "Data": data, "data": data})

    def _answer(self, body: object, status: int = 200, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def fields(body: bytes) -> dict:
    """Return what a JSON body, or a form's, holds."""
    try:
        return json.loads(body)
    except ValueError:
        return dict(re.findall(r'name="(\w+)"\r\n\r\n(.*?)\r\n', body.decode()))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
