"""Pictures of the web page for the README: images/web_light.png and images/web_dark.png.

    python scripts/take_screenshots.py                      the model that `make quickstart` made, on what it knows
    python scripts/take_screenshots.py --out_dir out --question "你好，你是谁？" "Why is the sky blue?"

Needs Chromium (apt-get install chromium fonts-noto-cjk) and what requirements-dev.txt names. The answers are the
model's own.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 300_000  # bytes of a picture
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
    add("--image_dir", default=str(ROOT / "images"), help="where the pictures go")
    add("--question", nargs="+", default=QUESTIONS, help="asked in turn")
    add("--width", type=int, default=1200, help="pixels")
    add("--height", type=int, default=800, help="pixels")
    add("--max_tokens", type=int, default=128, help="longest answer, a multiple of 16")
    add("--temperature", type=float, default=0.7, help="a multiple of 0.05")
    return parser.parse_args(argv)


@contextlib.contextmanager
def served(out_dir: str) -> Iterator[str]:
    """The page's address, while it is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "scripts" / "web_demo.py")]
    command += ["--server.port", str(port), "--server.headless", "true", "--", "--out_dir", out_dir]
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                    break
                if process.poll() is not None:
                    printed.seek(0)
                    raise ValueError(f"the page did not start:\n{printed.read().decode(errors='replace')}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def set_slider(page, key: str, steps: int) -> None:
    """From its least value up by so many steps."""
    slider = page.locator(f".st-key-{key}").get_by_role("slider")
    slider.press("Home")
    for _ in range(steps):
        slider.press("ArrowRight")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise ValueError("playwright is not installed: pip install -r requirements-dev.txt") from None
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        raise ValueError("no Chromium found: apt-get install chromium fonts-noto-cjk")
    os.makedirs(args.image_dir, exist_ok=True)
    with served(args.out_dir) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": args.width, "height": args.height})
        page.goto(url)
        page.locator(".st-key-max_tokens, .st-key-no-weights").first.wait_for(timeout=60_000)
        if not page.locator(".st-key-model").count():
            raise ValueError(f"no weights in {args.out_dir}; name a folder that holds some with --out_dir")
        set_slider(page, "max_tokens", args.max_tokens // 16 - 1)
        set_slider(page, "temperature", round(args.temperature / 0.05))
        for index, question in enumerate(args.question):
            box = page.get_by_test_id("stChatInputTextArea")
            box.fill(question)
            box.press("Enter")
            page.locator(f".st-key-answer-{index} .st-key-again").wait_for(timeout=300_000)
        page.mouse.move(args.width - 5, 5)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(1000)
            path = Path(args.image_dir) / f"web_{scheme}.png"
            page.screenshot(path=path)
            if path.stat().st_size > LARGEST:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {LARGEST}; lower --width")
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
        browser.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
