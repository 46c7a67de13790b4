"""The Space: its folder runs without the repository, answers in a real browser and asks no other host."""

import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, write_endless_weights
from fake_hub import TOKEN, FakeHub
from huggingface_hub import SpaceCard, constants
from take_screenshots import BROWSER_FLAGS, BROWSERS

from model.weights import read_sidecar, write_json
from scripts import make_space

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: requirements-cloud.txt"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("out")
    weights = write_endless_weights(out / "full_sft_32.pth", tokenizer)
    write_json(weights.with_suffix(".json"), read_sidecar(weights) | {"flags": {"data_path": "/home/me/a.jsonl"}})
    (out / ".env").write_text("SECRET=1")
    make_space.main(["--out_dir", str(out), "--title", "Tiny"])
    return out / "space"


def test_the_folder_holds_what_a_space_needs_and_nothing_private(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "space.json", "full_sft_32.pth", "full_sft_32.json"} < names
    assert {"model/tokenizer.json", "model/loading.py", "dataset/text_stream.py"} < names
    assert not any(part.startswith(".") or "sample" in part for name in names for part in Path(name).parts)
    assert all(b"/home/me" not in path.read_bytes() for path in folder.rglob("*.json"))
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert f"gradio=={make_space.GRADIO}" in needed
    pinned = [
        line
        for name in ("requirements", "requirements-cloud")
        for line in (ROOT / f"{name}.txt").read_text().splitlines()
    ]
    assert all(line in pinned for line in needed if "==" in line)


def test_its_front_matter_is_that_of_a_space_and_tells_the_pace(folder):
    card = SpaceCard.load(folder / "README.md")
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", make_space.GRADIO, "app.py")
    assert "tokens/s on 2 processor cores" in card.text


def test_uploaded_it_is_a_space_with_the_same_files(folder, tmp_path, monkeypatch, capsys):
    hub = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    flags = ["--out_dir", str(folder.parent), "--output", str(tmp_path / "s"), "--repo_id", "me/chat", "--private"]
    make_space.main([*flags, "--dry_run"])
    assert not hub.asked and "app.py" in capsys.readouterr().out
    make_space.main(flags)
    held = hub.repos["spaces/me/chat"]
    assert hub.created == ["spaces/me/chat"] == list(hub.private) and hub.sdks == ["gradio"]
    assert held == {
        str(p.relative_to(tmp_path / "s")): p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()
    }
    hub.shutdown()
    hub.server_close()


def test_wrong_weights_and_folders_of_others_are_told(tmp_path, tokenizer):
    with pytest.raises(SystemExit, match="train_dpo.py first"):
        make_space.main(["--weight", "rlhf", "--out_dir", str(tmp_path)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    with pytest.raises(SystemExit, match="holds other files") as stopped:
        make_space.main(["--out_dir", str(tmp_path), "--output", str(tmp_path / "full")])
    assert str(stopped.value).startswith("error: ") and (tmp_path / "full" / "mine.txt").is_file()


@pytest.mark.parametrize("weights", ["broken.pth", "space/full_sft_32.pth"])
def test_what_goes_wrong_leaves_the_space_that_is_there_as_it_is(folder, tmp_path, weights):
    shutil.copytree(folder, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = "is not a weight file" if weights == "broken.pth" else "name another with --output"
    with pytest.raises(SystemExit, match=told):
        make_space.main(["--weight", str(tmp_path / weights), "--output", str(tmp_path / "space")])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_tokenizer_may_be_named_by_its_file_and_a_broken_off_run_is_repeated(folder, tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    flags = ["--out_dir", str(folder.parent), "--output", str(tmp_path / "space")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_space, "tokens_per_second", interrupted)
        make_space.main(flags)
    assert not list(tmp_path.iterdir())
    make_space.main([*flags, "--tokenizer_path", str(ROOT / "model" / "tokenizer.json")])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "space" / "model" / name).read_bytes() == (ROOT / "model" / name).read_bytes()


def test_a_full_disk_is_told(folder, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(make_space.shutil, "copyfile", full_disk)
    with pytest.raises(SystemExit, match="error: .*No space left"):
        make_space.main(["--out_dir", str(folder.parent), "--output", str(tmp_path / "space")])


@needs_gradio
def test_thoughts_are_folded_and_earlier_ones_are_not_read_again(folder, tokenizer):
    spec = importlib.util.spec_from_file_location("space_app_of_a_test", folder / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    app.engine.close()
    asked = []

    class Request(list):
        def cancel(self) -> None:
            asked.append("cancelled")

    def submit(ids, params):
        asked.append(tokenizer.decode(ids))
        written = tokenizer.encode_contents(["<think>\nwell\n</think>\n<answer>\n![yes](x)\n</answer>"])[0]
        return Request(types.SimpleNamespace(id=number) for number in written)

    app.engine = types.SimpleNamespace(submit=submit, context_length=512)
    *_, first = app.answer("first", [], 0.0, 16, "")
    history = [
        {"role": "user", "content": [{"type": "text", "text": "before"}]},
        {"role": "assistant", "content": "a thought", "metadata": {"title": "Reasoning"}},
        {"role": "assistant", "content": "an answer", "metadata": None},
        {"role": "user", "content": "then"},
        *(json.loads(json.dumps(vars(m))) for m in first),
    ]
    *_, last = app.answer("and now?", history, 0.0, 16, "Be brief.")
    assert [(m.content, bool(m.metadata and m.metadata.get("title"))) for m in last] == [
        ("well", True), ("!\u2060[yes](x)", False)
    ]  # fmt: skip
    prompt = asked[2]
    assert "before" in prompt and "an answer" in prompt and "Be brief." in prompt and "a thought" not in prompt
    assert "\n![yes](x)" in prompt and "well" not in prompt, "as the model wrote it, not as it was shown"
    assert asked[-1] == "cancelled"


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def url(folder, tmp_path):
    """The folder, copied away from the repository and started as its README says."""
    shutil.copytree(folder, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    app = (tmp_path / "space" / "app.py").read_text()  # slow enough that there is something to stop
    slow = app.replace("for token in request:", "for token in request:\n            __import__('time').sleep(0.05)")
    assert slow != app
    (tmp_path / "space" / "app.py").write_text(slow)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1", "NO_PROXY": "*", "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "log.txt").open("wb")
    server = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "space", env=env, stdout=log, stderr=log)
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@needs_gradio
@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_it_answers_in_a_browser_stops_and_asks_no_other_host(url):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(BROWSER_FLAGS))
        page = browser.new_page()
        page.set_default_timeout(180_000)
        left, errors = [], []
        page.on("request", lambda request: left.append(request.url))
        page.on("requestfailed", lambda request: request.failure == "csp" and left.remove(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_text("你好，你是谁？").first.wait_for()  # an example
        box = page.locator("textarea").first
        nasty = "![x](http://192.0.2.1/a.png) <img src='http://192.0.2.1/b.png' onerror='window.hit=1'>"
        box.fill(f"the sky {nasty} <script>window.hit=1</script>")
        box.press("Enter")
        bubble = page.locator("[data-testid=bot]").last
        page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.length > 20")
        page.locator(".stop-button").click()
        page.locator(".submit-button").wait_for()
        stopped = bubble.inner_text()
        box.fill("and again")
        box.press("Enter")
        page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length == 2")
        assert page.locator("[data-testid=bot]").first.inner_text() == stopped
        assert page.evaluate("window.hit") is None and not errors
        assert left and not [address for address in left if not address.startswith((url, "data:", f"blob:{url}"))]
        browser.close()
