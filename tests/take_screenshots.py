"""Take pictures of the web page: out/screenshots/web_light.png and web_dark.png; the README's are in images/.

    python tests/take_screenshots.py                      the model that `make quickstart` made, on what it knows
    python tests/take_screenshots.py --out_dir out --question "你好，你是谁？" "Why is the sky blue?"

Needs Chromium (apt-get install chromium fonts-noto-cjk) and the packages of requirements-dev.txt. The answers are the
model's own.
"""

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.streams import set_up_streams  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_FLAGS = ("--no-sandbox", "--disable-gpu")
QUESTIONS = [
    "你好，你是谁？",
    "树上有10只鸟，又飞来8只，现在有几只鸟？",
    "What is the opposite of long?",
    "“举头望明月”的下一句是什么？",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pictures of the web page.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out_dir", default=str(ROOT / "out" / "quickstart"), help="folder of the weights")
    add("--image_dir", default=str(ROOT / "out" / "screenshots"), help="where the pictures go")
    add("--question", nargs="+", default=QUESTIONS, help="asked one after the other")
    add("--locale", default="en", help="language of the page: en or zh-CN")
    add("--width", type=int, default=1200, help="pixels")
    add("--height", type=int, default=800, help="pixels")
    add("--max_tokens", type=int, default=128, help="longest answer")
    add("--temperature", type=float, default=0.7, help="0: greedy")
    return parser.parse_args(argv)


no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # one cannot reach this machine


@contextlib.contextmanager
def served(*flags: str) -> Iterator[str]:
    """Serve the page with these flags and yield its address. Raises ValueError if it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "scripts" / "web_demo.py")]
    command += ["--server.port", str(port), "--server.headless", "true", "--", *flags]
    with tempfile.TemporaryFile() as printed:

        def check(failed: bool) -> None:
            printed.seek(0)
            text = printed.read().decode(errors="replace")
            if failed or "Traceback" in text or "Aborted" in text:
                raise ValueError(f"the page failed:\n{text}")

        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(OSError):
                    no_proxy.open(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                    break
                check(process.poll() is not None)
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)  # as Ctrl-C
            process.wait()
            check(False)


def main(argv: list[str] | None = None) -> int:
    set_up_streams()
    args = parse_args(argv)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ValueError("playwright is not installed: pip install -r requirements-dev.txt") from None
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise ValueError("no Chromium found: apt-get install chromium fonts-noto-cjk")
    Path(args.image_dir).mkdir(parents=True, exist_ok=True)
    flags = ["--out_dir", args.out_dir, "--temperature", str(args.temperature)]
    with served(*flags, "--max_new_tokens", str(args.max_tokens)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_FLAGS)
        page = browser.new_page(locale=args.locale, viewport={"width": args.width, "height": args.height})
        page.goto(url)
        page.locator(".st-key-max_tokens, .st-key-no-weights").first.wait_for(timeout=120_000)
        if not page.locator(".st-key-model").count():
            raise ValueError(f"no weights in {args.out_dir}; name a folder that holds some with --out_dir")
        for index, question in enumerate(args.question):
            box = page.get_by_test_id("stChatInputTextArea")
            box.fill(question)
            box.press("Enter")
            page.locator(f".st-key-again-{index}").wait_for(timeout=300_000)
        page.mouse.move(args.width - 5, 5)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(1000)
            path = Path(args.image_dir) / f"web_{scheme}.png"
            page.screenshot(path=path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
        browser.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
