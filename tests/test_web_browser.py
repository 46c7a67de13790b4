"""The web page in a real browser: a headless Chromium chats, stops, and meets text that would like to be a page."""

import http.client
import random
import shutil

import pytest
import torch
from conftest import ROOT, sharp_model
from fake_openai import fake_openai
from take_screenshots import BROWSER_FLAGS, BROWSERS, served

from model.weights import save_weights

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
LINKS = "[a](javascript:window.hit=1) <javascript:window.hit=1> [b](data:text/html,<script>window.hit=1</script>)"
# each would do something if it were read as a page: run a script, or fetch from another host
NASTY = (
    "<script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    "<svg onload=window.hit=1><iframe src='{host}/frame'></iframe>",
    "<style>body {{ display: none }}</style><link rel=stylesheet href='{host}/style.css'>",
    "![image]({host}/image.png)",
    "![image][r]\n\n[r]: {host}/reference.png",
    "[![image]({host}/linked.png)]({host}/page)",
    "`a\n\n![image]({host}/code.png)`",
    "~~~ `\n```\n~~~\n![image]({host}/fence.png)\n```",
    "$$x\ny$$\n\n```\n$$\n![image]({host}/maths.png)\n```",
    "$\\includegraphics{{{host}/tex.png}}$ $\\href{{javascript:window.hit=1}}{{x}}$ $\\htmlData{{a=b}}{{y}}$",
    "| a |\n|---|\n| ![image]({host}/table.png) |",
    ":material/home: :streamlit: :red[![image]({host}/directive.png)]",
    "<!-- ![image]({host}/comment.png) -->",
    "```mermaid\ngraph TD; a[\"<img src='{host}/mermaid.png' onerror='window.hit=1'>\"]\n```",
    "```html\n<img src='{host}/block.png' onerror='window.hit=1'>\n```",
    # read as code by one reader and as text by another
    "~~~ `\n```\n~~~\n![x]({host}/1.png)\n```",
    "`\n\n![x]({host}/2.png)`",
    "| `a | ![x]({host}/3.png) ` |\n|---|---|",
    "- `a\n- ![x]({host}/4.png)`",
    "\\`![x]({host}/5.png)`",
    "\\\\![x]({host}/6.png)",
    "```\n```` \n![x]({host}/7.png)\n```",
    "<!--\n```\n-->\n![x]({host}/8.png)\n```",
)
PIECES = [
    "![x]({host}/9.png)",
    "![x][r]",
    "\n[r]: {host}/10.png\n",
    "<img src={host}/11.png>",
    "<script>window.hit=1</script>",
]
PIECES += [
    "!",
    "[",
    "```",
    "~~~",
    "~~~ `",
    "`",
    "``",
    "$",
    "$$",
    "\\",
    "\\[",
    "\\]",
    "\\(",
    "\\)",
    "\n",
    "\n\n",
    "\n$$\n",
]
PIECES += [
    "\n```\n",
    "\n- ",
    "\n> ",
    "    ",
    "\t",
    "|",
    "\n|-|\n",
    "a",
    " ",
    "<!--",
    "-->",
    "<pre>",
    "\r",
    ":red[",
    "]",
    "\n~~~\n",
]


@pytest.fixture(scope="module")
def url(tmp_path_factory, tokenizer):
    """The page, started as the README says, with two tiny models."""
    out_dir = tmp_path_factory.mktemp("out")
    for stage, size in (("full_sft", 32), ("rlhf", 48)):
        model = sharp_model(hidden_size=size)
        with torch.no_grad():  # the end is far from likely, so that there is something to stop
            model.model.embed_tokens.weight.mul_(2)
            model.model.embed_tokens.weight[[tokenizer.eos_id, tokenizer.pad_id]] = 0
        details = {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256}
        save_weights(out_dir / f"{stage}_{size}.pth", model, details)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT / "scripts")
    with served("--out_dir", str(out_dir), "--hf_path", str(out_dir)) as url:
        monkeypatch.undo()
        yield url


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=[*BROWSER_FLAGS, *QUIET.split()])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desktop(browser):
    """One for all tests: the second visit of a page is much faster than the first."""
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        yield context


@pytest.fixture
def requests() -> list[str]:
    """Addresses that the page of a test asked for."""
    return []


@pytest.fixture
def visit(url, desktop, requests):
    """visit(context=desktop): the page of a new visitor, ready to type. Whatever a test does there, its requests stay
    on the host and no script fails."""
    errors, pages = [], []

    def opened(context=desktop):
        page = context.new_page()
        pages.append(page)
        page.set_default_timeout(180_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url.replace("ws://", "http://", 1)))
        page.on("requestfailed", lambda request: request.failure == "csp" and requests.remove(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        page.goto(url)
        page.get_by_test_id("stChatInputTextArea").wait_for()
        return page

    yield opened
    for page in pages:
        page.close()
    elsewhere = [address for address in requests if not address.startswith((url, "data:", "blob:" + url))]
    assert requests and not elsewhere, "a request left for another host"
    assert not errors


@pytest.fixture
def server():
    with fake_openai() as server:
        yield server


def ask(page, question: str = "the sky") -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    box.fill(question)
    box.press("Enter")


def answer(page, index: int = 0):
    return page.locator(f".st-key-answer-{index}")


def wait_until_answered(page) -> None:
    page.get_by_role("button", name="Again").first.wait_for()


def choose(page, label: str, option: str) -> None:
    """Open the list again if the page closed it: a run of the script that ends late does."""
    from playwright.sync_api import TimeoutError as TooLate

    for attempts_left in reversed(range(10)):
        page.get_by_role("combobox", name=label).click()
        try:
            return page.get_by_role("option", name=option, exact=True).click(timeout=10_000)
        except TooLate:
            if not attempts_left:
                raise


def set_longest_answer(page, key: str) -> None:
    """To the least ("Home") or the most ("End")."""
    page.locator(".st-key-max_tokens").get_by_role("slider").press(key)


def use_api(page, server, model: str) -> None:
    page.get_by_text("API", exact=True).click()
    box = page.get_by_label("Base URL")
    box.fill(server.base_url)
    box.press("Enter")
    page.get_by_role("combobox", name="Model").and_(page.locator(":enabled")).wait_for()
    choose(page, "Model", model)


def text_of(page, index: int = 0) -> str:
    return answer(page, index).get_by_test_id("stMarkdown").first.inner_text()


# --- chatting --------------------------------------------------------------------------------------------------------


def test_a_visitor_chats_regenerates_deletes_and_takes_that_back(visit):
    page = visit()
    set_longest_answer(page, "Home")
    ask(page)
    wait_until_answered(page)
    assert "16 tokens · " in answer(page).inner_text() and "tokens/s" in answer(page).inner_text()
    first = text_of(page)
    assert first.strip()
    page.get_by_role("button", name="Again").click()
    page.wait_for_function(
        "before => { const p = document.querySelector('.st-key-answer-0 [data-testid=stMarkdown]');"
        "return p && !['…', before].includes(p.innerText) && document.querySelector('.st-key-other-0'); }",
        arg=first,
    )
    ask(page, "and then")
    answer(page, 1).get_by_role("button", name="Again").wait_for()
    assert page.locator(".st-key-suggestions").count() == 0
    page.locator(".st-key-bubble-0").hover()
    page.get_by_role("button", name="Delete", exact=True).first.click()
    page.locator(".st-key-bubble-1").wait_for(state="detached")
    assert page.locator(".st-key-bubble-0").inner_text() == "and then"
    page.get_by_role("button", name="Undo").click()
    page.locator(".st-key-bubble-1").wait_for()
    assert page.locator(".st-key-bubble-0").inner_text() == "the sky"


def test_a_visitor_stops_an_answer_and_goes_on_with_another_model(visit):
    page = visit()
    set_longest_answer(page, "End")
    ask(page)
    page.locator(".st-key-answer-0", has_text="tokens/s").wait_for()
    page.locator(".st-key-stop button").click()
    wait_until_answered(page)
    assert "stopped" in answer(page).inner_text() and text_of(page).strip() not in ("", "…")
    assert int(answer(page).inner_text().split(" tokens · ")[0].split()[-1]) < 4096
    choose(page, "Model", "rlhf · 0.4M dense")
    set_longest_answer(page, "Home")
    ask(page)
    answer(page, 1).get_by_role("button", name="Again").wait_for()
    assert "full_sft · 0.2M dense" in answer(page, 0).inner_text()
    assert "rlhf · 0.4M dense" in answer(page, 1).inner_text()


def test_stopping_in_the_page_drops_the_connection_to_a_server(visit, server):
    page = visit()
    use_api(page, server, "ponders")
    ask(page)
    page.get_by_text("First, the sky.").wait_for()  # reasoning can be read while it comes
    page.locator(".st-key-answer-0", has_text="on and on").wait_for()
    page.locator(".st-key-stop button").click()
    wait_until_answered(page)
    assert server.gone.wait(10)
    page.get_by_text("First, the sky.").wait_for(state="hidden")  # and is folded away then
    page.get_by_text("Reasoning").click()
    page.get_by_text("First, the sky.").wait_for()


def test_a_reload_keeps_the_chat_and_an_answer_in_the_making(visit, server, desktop):
    page = visit()
    use_api(page, server, "says")
    server.text = "An *answer* to copy."
    ask(page, "first question")
    wait_until_answered(page)
    desktop.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".st-key-copy-0 button").click()
    page.wait_for_function("async text => await navigator.clipboard.readText() == text", arg=server.text)
    choose(page, "Model", "endless")
    ask(page, "second question")
    page.locator(".st-key-answer-1", has_text="on and on").wait_for()
    page.reload()
    page.locator(".st-key-answer-1", has_text="on and on").wait_for()
    assert not server.gone.is_set(), "the answer goes on"
    page.locator(".st-key-stop button").click()
    answer(page, 1).get_by_role("button", name="Again").wait_for()
    assert server.gone.wait(10) and "An answer to copy." in text_of(page, 0)
    page.get_by_role("button", name="New chat").click()
    page.locator(".st-key-suggestions").wait_for()
    other = visit()
    other.get_by_role("button", name="first question").click()
    other.locator(".st-key-answer-1").wait_for()
    assert "first question" in other.locator(".st-key-bubble-0").inner_text()


def test_other_visitors_see_none_of_it_and_chinese_ones_read_chinese(visit, browser):
    with browser.new_context(locale="zh-CN", viewport={"width": 1200, "height": 900}) as context:
        page = visit(context)
        assert page.locator(".st-key-chats").count() == 0
        page.get_by_role("button", name="删除对话").wait_for()
        assert page.get_by_test_id("stChatInputTextArea").get_attribute("placeholder").startswith("发消息给 full_sft")


@pytest.mark.parametrize("host, status", [("evil.example", 421), ("localhost", 200), ("127.0.0.1", 200)])
def test_a_name_made_to_point_here_is_refused(url, host, status):
    for headers in ({}, {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                         "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Origin": f"http://{host}"}):  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", int(url.rsplit(":", 1)[1]), timeout=60)
        path = "/_stcore/stream" if headers else "/"
        connection.request("GET", path, headers={"Host": f"{host}:80"} | headers)
        expected = {200: 101, 421: 403}[status] if headers else status
        assert connection.getresponse().status == expected
        connection.close()


# --- text that would like to be a page -------------------------------------------------------------------------------


def test_nothing_that_a_model_or_a_visitor_writes_becomes_a_page(visit, server):
    page, rng = visit(), random.Random(0)
    use_api(page, server, "says")
    host = server.base_url.removesuffix("/v1")
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(2, 14))).replace("{host}", host) for _ in range(60)]
    texts = [text.format(host=host) for text in (*NASTY, LINKS)]
    server.text = "\n\n---\n\n".join(texts) + "\n\nthe end"
    ask(page, server.text)
    answer(page, 0).get_by_text("the end").first.wait_for()
    answer(page, 0).get_by_role("button", name="Again").wait_for()
    for link in page.locator(".st-key-answer-0 a", has_text="a").all():
        link.evaluate("link => { link.removeAttribute('target'); if (!link.href.startsWith('http')) link.click(); }")
    server.text = "\n\n".join(mixed)
    ask(page, texts[0])
    answer(page, 1).get_by_role("button", name="Again").wait_for()
    page.wait_for_function(  # the end is in sight
        "() => { const e = document.querySelector('[data-testid=stAppScrollToBottomContainer]');"
        "return e.scrollTop + e.clientHeight > e.scrollHeight - 5; }"
    )
    active = ".st-key-turns :is(script, iframe, style, link, object, embed, svg[onload], [onerror])"
    found = "selector => [...document.querySelectorAll(selector)].map(element => element.outerHTML)"
    assert page.evaluate(found, active) == []
    images = page.locator(".st-key-turns img")
    assert images.evaluate_all("images => images.filter(i => i.naturalWidth).length") == 0, "no image was fetched"
    for link in page.locator(".st-key-turns a").all():
        assert (link.get_attribute("href") or "#").startswith(("http", "#", "mailto:", "data:")), link.inner_text()
    assert page.evaluate("window.hit") is None
    assert "onerror='window.hit=1'" in answer(page).inner_text() and "<script>" in answer(page).inner_text()
    assert not server.paths


def test_the_browser_refuses_what_comes_from_elsewhere(visit, server, requests):
    """Even if a text did become a page."""
    page = visit()
    host = server.base_url.removesuffix("/v1")
    refused = page.evaluate(
        """host => new Promise(done => {
            const image = new Image();
            image.onerror = () => fetch(host + '/fetched').then(() => done(false), () => done(true));
            image.onload = () => done(false);
            image.src = host + '/image.png';
            document.body.insertAdjacentHTML('beforeend', '<b onclick="window.hit=1" id="b">b</b>');
            document.getElementById('b').click();
        })""",
        host,
    )
    assert refused and not server.paths and page.evaluate("window.hit") is None


# --- looks -----------------------------------------------------------------------------------------------------------


def test_the_page_fits_a_phone_in_light_and_dark(visit, browser):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with browser.new_context(**phone) as context:
        page = visit(context)
        assert page.get_by_role("slider").first.bounding_box()["x"] < 0, "the sidebar is folded away"
        ask(page, "a-very-long-word-" * 20)
        page.locator(".st-key-stop button").click()
        wait_until_answered(page)
        assert page.get_by_role("button", name="Edit", exact=True).is_visible(), "there is no hovering on a phone"
        assert page.locator(".st-key-topbar").inner_text() == "full_sft · 0.2M dense"
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(
                """scheme => {
                    const color = getComputedStyle(document.querySelector('.stApp')).backgroundColor;
                    const brightness = color.match(/\\d+/g).map(Number).reduce((a, b) => a + b);
                    return scheme == 'light' ? brightness > 700 : brightness < 120;
                }""",
                arg=scheme,
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
