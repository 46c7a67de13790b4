"""Downloads through the real client libraries from a hub on this machine that breaks, lies and refuses."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, run_python
from fake_hub import LoopbackServer, QuietHandler

from scripts import download_data

FILES = {
    "pretrain_hq.jsonl": b'{"text": "a line of the file for pretraining"}\n' * 9000,
    "sft_mini_512.jsonl": b'{"conversations": []}\n' * 9000,
    "README.md": b"# data\n",
    ".gitattributes": b"*.jsonl filter=lfs\n",
}


class FakeHub(LoopbackServer):
    """The addresses of Hugging Face and of ModelScope that the client libraries ask for.

    faults: file name to what goes wrong with its next transfers, one after another: a status code, "break" (half the
    bytes, then nothing), "bytes" (as many others), "short" (fewer than were announced by the hub), "redirect".
    """

    def __init__(self):
        self.files, self.faults, self.sent, self.asked = dict(FILES), {}, Counter(), []
        super().__init__(Handler)


class Handler(QuietHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        name = path.rsplit("/", 1)[1]
        if path.startswith("/api/"):
            self._list(path)
        elif name not in self.server.files or (fault := self._fault(name)) == 404:
            self._answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        elif isinstance(fault, int):
            self._answer(fault, b"busy", {"Retry-After": "1"})
        elif fault == "redirect":
            self._answer(302, b"", {"Location": f"{self.server.url}/cdn/{name}"})
        else:
            self._send_file(name, fault)

    def _fault(self, name: str) -> object:
        if self.command == "HEAD":
            return None
        faults = self.server.faults.get(name, [])
        return faults.pop(0) if faults else None

    def _list(self, path: str) -> None:
        if self.server.faults.get("list"):
            self._answer(self.server.faults["list"].pop(0), b"busy", {"Retry-After": "1"})
            return
        sizes = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in self.server.files.items()}
        if "/api/v1/" in path:
            files = [{"Path": n, "Size": s, "Sha256": h, "Type": "blob"} for n, (s, h) in sizes.items()]
            body = {"Code": 200, "Data": {"Files": files}}
        else:
            siblings = [
                {"rfilename": n, "size": s, "lfs": {"sha256": h, "size": s, "pointerSize": 1}}
                for n, (s, h) in sizes.items()
            ]
            readme = f"blob {len(FILES['README.md'])}\0".encode() + FILES["README.md"]
            siblings[2] = {
                "rfilename": "README.md",
                "size": sizes["README.md"][0],
                "blobId": hashlib.sha1(readme).hexdigest(),
            }
            body = {"id": "jingyaogong/minimind_dataset", "sha": "c" * 40, "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, fault: str | None) -> None:
        data = self.server.files[name]
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        etag = hashlib.sha256(data).hexdigest()
        headers = {
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": "c" * 40,
        }
        body = {"bytes": b"x" * len(data), "short": data[:-100]}.get(fault, data)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        half = start + (len(body) - start) // 2 if fault == "break" else None
        self._answer(206 if start else 200, body[start:], headers, body[start:half] if half else None)
        if self.command == "GET":
            self.server.sent[name] += len(body[start:half])

    def _answer(self, status: int, body: bytes, headers: dict, sent: bytes | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if sent is None else sent)
        if sent is not None:
            self.close_connection = True
            self.connection.shutdown(2)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = FakeHub()
    for source in (download_data.HuggingFace, download_data.ModelScope):
        monkeypatch.setattr(source, "endpoint", server.url)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what a broken transfer may lose
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the libraries wait before they try again
    yield server
    server.shutdown()
    server.server_close()


SOURCES = pytest.mark.parametrize("source", ["huggingface", "modelscope"])


def bring(tmp_path: Path, source: str, *arguments: str) -> Path:
    download_data.main([*arguments, "--source", source, "--out_dir", str(tmp_path / "dataset")])
    return tmp_path / "dataset"


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        bring(*arguments)
    assert str(stopped.value).startswith("error: ")
    return str(stopped.value)


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


QUICK = {name: FILES[name] for name in ("pretrain_hq.jsonl", "sft_mini_512.jsonl")}


@SOURCES
def test_without_arguments_the_two_files_of_the_quick_recipe_arrive(hub, tmp_path, source):
    folder = bring(tmp_path, source)
    assert held(folder) == QUICK and [path.name for path in folder.iterdir() if path.is_dir()] == []


@SOURCES
def test_whole_files_are_not_sent_again_and_others_not_replaced_unasked(hub, tmp_path, source, capsys):
    folder = bring(tmp_path, source)
    sent = hub.sent.total()
    bring(tmp_path, source)
    assert hub.sent.total() == sent and capsys.readouterr().out.count("already there and complete") == 2
    (folder / "pretrain_hq.jsonl").write_bytes(b"mine")
    assert "--overwrite" in error_of(tmp_path, source)
    assert held(folder)["pretrain_hq.jsonl"] == b"mine"
    assert held(bring(tmp_path, source, "--overwrite")) == QUICK


@SOURCES
@pytest.mark.parametrize("fault", ["break", "redirect", 429])
def test_the_libraries_recover_from_what_passes(hub, tmp_path, source, fault):
    hub.faults = {"pretrain_hq.jsonl": [fault]}
    assert held(bring(tmp_path, source)) == QUICK


@SOURCES
@pytest.mark.parametrize(
    ("fault", "said"), [("short", "size"), ("bytes", "contents differ"), (404, "404"), (503, "503")]
)
def test_what_does_not_pass_is_said_and_nothing_half_gets_the_name(hub, tmp_path, source, fault, said):
    hub.faults = {"sft_mini_512.jsonl": [fault] * 20}
    message = error_of(tmp_path, source)
    assert "sft_mini_512.jsonl" in message and said in message
    assert held(tmp_path / "dataset") == {"pretrain_hq.jsonl": FILES["pretrain_hq.jsonl"]}
    hub.faults = {}
    assert held(bring(tmp_path, source)) == QUICK


@SOURCES
def test_a_transfer_that_broke_for_good_goes_on_where_it_stopped(hub, tmp_path, source):
    hub.faults = {"pretrain_hq.jsonl": ["break"] + [503] * 20}
    error_of(tmp_path, source, "pretrain_hq")
    arrived, hub.faults = hub.sent["pretrain_hq.jsonl"], {}
    assert 0 < arrived < len(FILES["pretrain_hq.jsonl"])
    bring(tmp_path, source, "pretrain_hq")
    assert hub.asked[-1][2] == f"bytes={arrived // 1000 * 1000}-"  # all but the part of a chunk
    assert hub.sent["pretrain_hq.jsonl"] - len(FILES["pretrain_hq.jsonl"]) == arrived % 1000


@SOURCES
def test_another_file_leaves_a_broken_transfer_where_it_is(hub, tmp_path, source):
    hub.faults = {"pretrain_hq.jsonl": ["break"] + [503] * 20}
    error_of(tmp_path, source, "pretrain_hq")
    hub.faults = {}
    bring(tmp_path, source, "sft_mini_512")
    bring(tmp_path, source, "pretrain_hq")
    assert hub.asked[-1][2] is not None  # from where it stopped
    assert not list(tmp_path.rglob(".download"))


@SOURCES
@pytest.mark.parametrize("status", [404, 429, 500])
def test_a_list_that_cannot_be_had_is_named_with_its_repository(hub, tmp_path, source, status):
    hub.faults = {"list": [status] * 20}
    message = error_of(tmp_path, source, "pretrain_hq")
    assert "/minimind_dataset" in message and str(status) in message and not hub.sent


@SOURCES
def test_a_hub_that_is_not_there_is_named_with_the_ways_round_it(monkeypatch, tmp_path, source):
    for hub in (download_data.HuggingFace, download_data.ModelScope):
        monkeypatch.setattr(hub, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    message = error_of(tmp_path, source)
    assert "127.0.0.1:9" in message and "HF_ENDPOINT" in message and "--source modelscope" in message


@SOURCES
def test_an_unknown_file_is_named_with_those_that_there_are(hub, tmp_path, source):
    message = error_of(tmp_path, source, "sft_4096")
    assert "has no sft_4096.jsonl" in message and "pretrain_hq.jsonl" in message and "--revision" in message


@SOURCES
def test_a_disk_that_is_too_small_is_refused_before_anything_is_sent(hub, tmp_path, source, monkeypatch):
    free = type("Usage", (), {"free": len(FILES["pretrain_hq.jsonl"])})
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    assert "GB free" in error_of(tmp_path, source) and not hub.sent
    bring(tmp_path, source, "pretrain_hq")


@SOURCES
def test_a_name_that_leads_out_of_the_folder_is_refused(hub, tmp_path, source):
    for name in ("x/../../../../escaped.txt", str(tmp_path / "escaped.txt")):
        hub.files = FILES | {name: b"bad"}
        assert "outside" in error_of(tmp_path, source, "--weights", "MiniMind2") and not hub.sent
    assert not list(tmp_path.rglob("*escaped*"))


@SOURCES
def test_a_transfer_that_is_longer_than_the_file_begins_again(hub, tmp_path, source):
    part = tmp_path / "dataset" / ".download" / "pretrain_hq.jsonl.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (len(FILES["pretrain_hq.jsonl"]) + 1))
    assert held(bring(tmp_path, source, "pretrain_hq"))["pretrain_hq.jsonl"] == FILES["pretrain_hq.jsonl"]


@SOURCES
def test_weights_come_as_a_folder(hub, tmp_path, source):
    hub.files = {
        "config.json": b"{}",
        "model.safetensors": b"\0" * 5000,
        "README.md": FILES["README.md"],
        ".gitattributes": b"",
    }
    folder = bring(tmp_path, source, "--weights", "MiniMind2") / "MiniMind2"
    assert held(folder) == {name: data for name, data in hub.files.items() if name != ".gitattributes"}
    assert f"/{'gongjy' if source == 'modelscope' else 'jingyaogong'}/MiniMind2/" in hub.asked[0][1] + "/"


def test_a_mirror_is_named_by_hf_endpoint_and_the_list_shows_its_addresses(hub, tmp_path):
    script, environment = str(ROOT / "scripts" / "download_data.py"), {"HF_ENDPOINT": hub.url, "NO_PROXY": "*"}
    done = run_python(script, "--list", **environment)
    assert f"{hub.url}/datasets/jingyaogong/minimind_dataset/resolve/main/pretrain_hq.jsonl" in done.stdout
    done = run_python(script, "pretrain_hq", f"--out_dir={tmp_path}", **environment)
    assert held(tmp_path) == {"pretrain_hq.jsonl": FILES["pretrain_hq.jsonl"]}, done.stderr


def test_the_list_names_every_file_that_the_stages_expect(capsys):
    download_data.main(["--list", "--source", "modelscope"])
    text = capsys.readouterr().out
    for name in (
        "pretrain_hq",
        "sft_mini_512",
        "sft_512",
        "sft_1024",
        "sft_2048",
        "dpo",
        "r1_mix_1024",
        "lora_medical",
        "lora_identity",
    ):
        assert f"https://www.modelscope.cn/datasets/gongjy/minimind_dataset/resolve/master/{name}.jsonl" in text
    assert "https://www.modelscope.cn/models/gongjy/MiniMind2\n" in text
