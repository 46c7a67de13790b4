"""The web page without a browser: Streamlit's AppTest runs it, with tiny models and a server of the tests' own."""

import json
import sys
import threading
import time

import pytest
from conftest import ROOT, sharp_model, write_endless_weights
from fake_openai import KEY, MODELS, fake_openai
from streamlit import cache_data as web_cache
from streamlit.testing.v1 import AppTest

import eval_model
from dataset.tokenization import DEFAULT_SYSTEM
from model.batching import Engine
from model.flags import HISTORY_MESSAGES
from model.model_lora import apply_lora, save_lora
from model.weights import load_model
from scripts import chat_openai_api, serve_openai_api
from scripts.web_answers import LONGEST, ApiModel, LocalModel, Settings, list_api_models
from scripts.web_conversation import CUT, FAILED, STOPPED, Answer, Chats

WORDS = json.loads((ROOT / "scripts" / "web_words.json").read_text("utf-8"))
QUESTION = [{"role": "user", "content": "the sky"}]
UNSEEN = "http://127.0.0.1:9/v1"  # the discard port: nothing listens


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tokenizer):
    """Two models, and an adapter for the smaller one."""
    out_dir = tmp_path_factory.mktemp("out")
    write_endless_weights(out_dir / "full_sft_32.pth", tokenizer)
    write_endless_weights(out_dir / "pretrain_48.pth", tokenizer, hidden_size=48)
    model = apply_lora(sharp_model(), rank=2)
    (out_dir / "lora").mkdir()
    details = {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256}
    save_lora(out_dir / "lora" / "lora_poems_32.pth", model, details)
    return out_dir


@pytest.fixture
def open_page(monkeypatch, tmp_path):
    """open_page(out_dir, **flags): the page as a visitor finds it; answers are 16 tokens long."""

    def opened(out_dir=tmp_path, query: dict | None = None, **flags) -> AppTest:
        values = {
            "out_dir": str(out_dir),
            "hf_path": [str(tmp_path / "folders")],
            "tokenizer_path": None,
            "max_seq_len": 512,
            "device": "cpu",
            "dtype": None,
            "base_url": UNSEEN,
            "temperature": 0.85,
            "top_p": 0.85,
            "max_new_tokens": 512,
        }
        monkeypatch.setenv("MINIMIND_WEB_FLAGS", json.dumps(values | flags))
        # AppTest leaves the page as the main module, which every worker process of a later test would import
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        app = AppTest.from_file(str(ROOT / "scripts" / "web_page.py"), default_timeout=180)
        for key, value in (query or {}).items():
            app.query_params[key] = value
        app.run()
        assert not app.exception
        app.slider(key="max_tokens").set_value(16)
        return app

    return opened


@pytest.fixture
def server():
    with fake_openai() as server:
        yield server


def page(app: AppTest):
    return app.session_state["page"]


def ask(app: AppTest, question: str = "the sky") -> Answer:
    app.chat_input[0].set_value(question).run()
    assert not app.exception
    return page(app).conversation.turns[-1].answer


def click(app: AppTest, key: str) -> None:
    app.button(key=key).click().run()
    assert not app.exception


def shown(app: AppTest) -> str:
    """Texts of the page, without the backslashes that make them literal."""
    texts = [element.value for kind in ("markdown", "caption", "error", "code") for element in app.get(kind)]
    return "\n".join(texts).replace("\\", "")


def use_api(app: AppTest, base_url: str, model: str = "says") -> None:
    app.session_state["source"] = "api"
    app.run()
    app.text_input(key="base_url").set_value(base_url).run()
    if not app.selectbox(key="api_model").disabled:
        app.selectbox(key="api_model").set_value(model).run()


# --- the page --------------------------------------------------------------------------------------------------------


def test_models_and_adapters_are_offered_by_name(open_page, weights):
    app = open_page(weights)
    assert app.selectbox(key="model").options == ["full_sft · 0.2M dense", "pretrain · 0.4M dense"]
    adapter = next(box for box in app.selectbox if box.label == "Adapter")
    assert adapter.options == ["none", "lora_poems"]
    adapter.set_value("lora_poems").run()
    assert ask(app).model == "full_sft · 0.2M dense + lora_poems"


def test_an_answer_is_shown_with_its_pace_and_told_of_earlier_turns(open_page, weights):
    app = open_page(weights)
    answer = ask(app)
    assert answer.text and answer.tokens == 16 and answer.ending == CUT
    text = "".join(c for c in answer.text if c.isprintable() or c.isspace())  # the page leaves control characters out
    assert text.split()[0] in shown(app) and "16 tokens · " in shown(app) and "tokens/s" in shown(app)
    ask(app, "and then")
    assert len(page(app).conversation.messages(app.slider(key="history_turns").value)) == 3


def test_temperature_zero_gives_the_same_answer_again(open_page, weights):
    app = open_page(weights)
    app.slider(key="temperature").set_value(0.0)
    first = ask(app).text
    click(app, "again-0")
    assert page(app).conversation.turns[-1].answer.text == first
    app.slider(key="temperature").set_value(2.0).run()
    click(app, "again-0")
    assert page(app).conversation.turns[-1].answer.text != first


def test_an_edited_question_is_answered_and_what_came_after_is_dropped(open_page, weights):
    app = open_page(weights)
    ask(app, "one")
    ask(app, "two")
    click(app, "edit-0")
    app.text_area(key="edited-0").set_value("three")
    click(app, "send-0")
    (turn,) = page(app).conversation.turns
    assert turn.question == "three" and turn.answer.tokens == 16
    click(app, "undo")
    assert [turn.question for turn in page(app).conversation.turns] == ["one", "two"]


def test_a_turn_is_deleted_and_all_are_cleared(open_page, weights):
    app = open_page(weights)
    ask(app, "one")
    ask(app, "two")
    click(app, "delete-0")
    assert [turn.question for turn in page(app).conversation.turns] == ["two"]
    click(app, "clear")
    assert not page(app).conversation.turns and app.button(key="suggestion-0")
    click(app, "undo")
    assert [turn.question for turn in page(app).conversation.turns] == ["two"]


def test_the_conversation_goes_on_with_another_model(open_page, weights):
    app = open_page(weights)
    ask(app)
    app.selectbox(key="model").set_value(str(weights / "pretrain_48.pth")).run()
    assert ask(app, "more").model == "pretrain · 0.4M dense"
    assert len(page(app).conversation.turns) == 2


def test_at_most_two_models_are_kept_and_the_oldest_is_closed(open_page, tmp_path, tokenizer):
    threads = len([thread for thread in threading.enumerate() if thread.name == "engine"])
    for size in (32, 48, 64):
        write_endless_weights(tmp_path / f"full_sft_{size}.pth", tokenizer, hidden_size=size)
    app = open_page(tmp_path)
    for size in (32, 48, 64, 32):
        app.selectbox(key="model").set_value(str(tmp_path / f"full_sft_{size}.pth")).run()
        assert ask(app).tokens == 16
    assert len([thread for thread in threading.enumerate() if thread.name == "engine"]) <= max(2, threads)


def test_a_suggestion_is_a_question(open_page, weights):
    app = open_page(weights)
    label = app.button(key="suggestion-1").label
    click(app, "suggestion-1")
    assert page(app).conversation.turns[0].question == label


def test_without_weights_the_page_says_how_to_make_them(open_page, tmp_path, tokenizer):
    app = open_page(tmp_path / "out")
    assert "make quickstart" in shown(app) and "train_pretrain.py" in shown(app) and str(tmp_path / "out") in shown(app)
    assert app.chat_input[0].disabled
    (tmp_path / "out" / "quickstart").mkdir(parents=True)
    write_endless_weights(tmp_path / "out" / "quickstart" / "full_sft_32.pth", tokenizer)
    app.run()
    assert not app.selectbox, "looking is not done at every click"
    click(app, "look-again")
    assert app.selectbox(key="model").options == ["full_sft · 0.2M dense · quickstart"]
    assert ask(app).tokens == 16


def test_only_what_is_in_the_quickstarts_folder_is_named_after_it(open_page, tmp_path, tokenizer):
    path = write_endless_weights(tmp_path / "quickstart" / "full_sft_32.pth", tokenizer)
    model, _ = load_model(path, tokenizer.sha256)
    model.save_pretrained(tmp_path / "folders" / "mine")
    options = open_page(tmp_path / "quickstart").selectbox(key="model").options
    assert options == ["full_sft · 0.2M dense · quickstart", "mine · 0.2M dense"]


def test_weights_that_were_trained_again_are_loaded_again(open_page, tmp_path, tokenizer):
    path = write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    app = open_page(tmp_path)
    app.slider(key="temperature").set_value(0.0)
    first = ask(app).text
    write_endless_weights(path, tokenizer, seed=1)
    app.run()
    click(app, "again-0")
    assert page(app).conversation.turns[-1].answer.text != first


def test_broken_weights_are_said_and_the_conversation_is_kept(open_page, weights, tmp_path, tokenizer):
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    path = write_endless_weights(out_dir / "full_sft_32.pth", tokenizer)
    app = open_page(out_dir)
    ask(app)
    path.write_bytes(b"no weights")
    app.run()
    assert "full_sft_32.pth is not a weight file" in shown(app)
    assert app.chat_input[0].disabled and len(page(app).conversation.turns) == 1


def test_weights_of_another_tokenizer_are_said(open_page, tmp_path, tokenizer):
    path = write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    sidecar = json.loads(path.with_suffix(".json").read_text("utf-8")) | {"tokenizer_sha256": "0" * 64}
    path.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")
    assert "--tokenizer_path" in shown(open_page(tmp_path))


def test_a_question_longer_than_the_context_is_said_and_kept(open_page, weights):
    app = open_page(weights, max_seq_len=64)
    answer = ask(app, "the sky was grey " * 40)
    assert answer.ending == FAILED and "too long" in answer.error and "64" in answer.error
    assert "too long" in app.error[0].value
    assert ask(app, "short").tokens == 16


def test_html_is_text_to_the_page(open_page, weights, server):
    server.text = "<script>alert(1)</script> ![x](http://evil/i.png)"
    app = open_page(weights)
    use_api(app, server.base_url)
    answer = ask(app, "<img src=x onerror=alert(1)>")
    assert answer.text == server.text
    answer_shown = app.main.markdown[-1].value
    assert "<script" not in answer_shown and "![" not in answer_shown and "alert(1)" in answer_shown
    assert not any(element.proto.allow_html for element in app.markdown)


def test_an_answer_is_given_again_and_each_can_be_chosen(open_page, weights):
    app = open_page(weights)
    ask(app, "one")
    ask(app, "two")
    click(app, "again-0")
    first, second = page(app).conversation.turns
    assert len(first.answers) == 2 and first.chosen == 1 and first.answer.tokens == 16 and second.question == "two"
    click(app, "other-0")
    assert first.chosen == 0 and app.button(key="other-0").label == "1 / 2"


def test_pretrained_weights_show_prompt_and_continuation_as_one_text(open_page, weights):
    app = open_page(weights)
    app.selectbox(key="model").set_value(str(weights / "pretrain_48.pth")).run()
    ask(app, "the sky")
    assert [element.value for element in app.main.markdown][-1].startswith("the sky")
    assert sum("the sky" in element.value for element in app.main.markdown) == 1


def test_an_empty_answer_says_so(open_page, server):
    server.text = ""
    app = open_page()
    use_api(app, server.base_url)
    ask(app)
    assert "The answer is empty" in shown(app)


def test_the_default_system_prompt_is_shown_and_sent(open_page, server):
    app = open_page()
    use_api(app, server.base_url)
    ask(app, "Hi")
    assert app.text_area(key="system").value == DEFAULT_SYSTEM
    assert server.requests[-1]["messages"][0] == {"role": "system", "content": DEFAULT_SYSTEM}
    app.text_area(key="system").set_value("")
    ask(app, "Hi")
    assert server.requests[-1]["messages"][0]["role"] == "user"


def test_the_page_has_the_same_words_in_both_languages_and_uses_them_all():
    assert set(WORDS["en"]) == set(WORDS["zh"])
    code = "".join(
        (ROOT / "scripts" / f"web_{name}.py").read_text("utf-8") for name in ("demo", "page", "conversation", "answers")
    )
    code = code.replace("'", '"')  # words named inside f-strings
    named = {key for key in WORDS["en"] for name in (key, key.removesuffix("_help")) if f'"{name}"' in code}
    assert WORDS["en"].keys() - named == set()


# --- chats -----------------------------------------------------------------------------------------------------------


def test_a_chat_is_kept_listed_opened_and_deleted(open_page, tmp_path, tokenizer):
    write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    write_endless_weights(tmp_path / "rlhf_48.pth", tokenizer, hidden_size=48)
    app = open_page(tmp_path)
    app.selectbox(key="model").set_value(str(tmp_path / "rlhf_48.pth")).run()
    said = ask(app, "<b>one</b>").text
    name = page(app).conversation.name
    assert app.query_params["chat"] == name
    click(app, "new")
    assert not page(app).conversation.turns and "chat" not in app.query_params
    ask(app, "two")
    titles = [button.label.replace("\\", "") for button in app.sidebar.button if button.key.startswith("chat-")]
    assert sorted(titles) == ["<b>one</b>", "two"]

    app = open_page(tmp_path, query={"chat": name})  # as a reload does, also after the page was started again
    (turn,) = page(app).conversation.turns
    assert (turn.question, turn.answer.text) == ("<b>one</b>", said)
    assert app.selectbox(key="model").value == str(tmp_path / "rlhf_48.pth"), "it goes on with the same model"
    click(app, "clear")
    assert len(list((tmp_path / "chats").glob("*/*.json"))) == 1
    click(app, "undo")
    assert len(list((tmp_path / "chats").glob("*/*.json"))) == 2


def test_two_tabs_show_one_chat_and_an_answer_goes_on_without_its_tab(open_page, server, tmp_path):
    first = open_page(tmp_path)
    use_api(first, server.base_url)
    ask(first, "one")
    second = open_page(tmp_path, query={"chat": page(first).conversation.name})
    assert page(second).conversation is page(first).conversation
    model = ApiModel(server.base_url, "", "endless")
    conversation = page(first).conversation
    answer = conversation.ask("two")
    conversation.run = model.start(answer, QUESTION, Settings(), conversation.answered)
    wait_for(lambda: answer.text)
    conversation.run.cancel()
    wait_for(lambda: conversation.run is None)
    kept = json.loads(conversation.path.read_text("utf-8"))
    assert kept["turns"][1]["answers"][0]["ending"] == STOPPED


def test_a_button_of_a_turn_that_another_tab_has_deleted_does_nothing(open_page, weights):
    first = open_page(weights)
    for question in ("one", "two", "three"):
        ask(first, question)
    conversation = page(first).conversation
    second = open_page(weights, query={"chat": conversation.name})
    click(second, "delete-0")
    click(first, "delete-0")
    assert [turn.question for turn in conversation.turns] == ["two", "three"]
    click(second, "clear")
    click(first, "again-0")
    assert not conversation.turns


def test_a_reload_while_the_model_is_loaded_begins_the_answer(open_page, weights):
    app = open_page(weights)
    ask(app, "one")
    conversation = page(app).conversation
    conversation.ask("two")  # and the run of the page ends in loading
    open_page(weights, query={"chat": conversation.name})
    wait_for(lambda: conversation.turns[1].answer.ending)
    assert conversation.turns[1].answer.tokens and conversation.turns[1].answer.ending != STOPPED


def test_a_reload_keeps_the_adapter(open_page, weights):
    app = open_page(weights)
    next(box for box in app.selectbox if box.label == "Adapter").set_value("lora_poems").run()
    ask(app)
    app = open_page(weights, query={"chat": page(app).conversation.name})
    adapter = next(box for box in app.selectbox if box.label == "Adapter")
    assert adapter.value == "lora_poems"
    assert ask(app).model.endswith(" + lora_poems")
    adapter.set_value("none").run()
    assert not ask(app).model.endswith(" + lora_poems")


def test_when_the_weights_are_gone_a_chat_says_how_to_make_some(open_page, tmp_path, tokenizer):
    path = write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    app = open_page(tmp_path)
    ask(app)
    path.unlink()
    web_cache.clear()
    app = open_page(tmp_path, query={"chat": page(app).conversation.name})
    assert "make quickstart" in shown(app) and len(page(app).conversation.turns) == 1
    assert app.button(key="look-again")


def test_a_model_for_which_memory_runs_out_is_said(open_page, tmp_path, tokenizer, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    write_endless_weights(tmp_path / "full_sft_32.pth", tokenizer)
    monkeypatch.setattr(Engine, "__init__", no_memory)
    assert "can't allocate memory" in shown(open_page(tmp_path))


def test_nobody_opens_the_chats_of_another_visitor(tmp_path):
    chats = Chats(tmp_path)
    secret = chats.open("me", "20260101-000000-aaaaaaaa")
    secret.ask("my secret")
    secret.save()
    assert list(chats.titles("me").values()) == ["my secret"] and not chats.titles("you")
    for visitor, name in (("you", secret.name), ("you", f"../me/{secret.name}"), ("../tmp/me", secret.name)):
        assert not chats.open(visitor, name).turns
        assert chats.open(visitor, name).path.parent.parent == tmp_path


def test_a_damaged_chat_is_left_for_a_new_one_and_an_unfinished_answer_was_stopped(tmp_path):
    chats = Chats(tmp_path)
    conversation = chats.open("me", "unfinished")
    conversation.ask("one").text = "so far"
    conversation.save()
    del conversation
    assert chats.open("me", "unfinished").turns[0].answer.ending == STOPPED
    turn = '{"turns": [{"question": "a", "answers": [%s], "chosen": 0}]}'
    for text in ("{", "[]", '{"turns": [{}]}', turn % "", turn % 5):
        (path := tmp_path / "me" / "damaged.json").write_text(text)
        opened = chats.open("me", "damaged")
        assert opened.turns == [] and opened.unread == path
        opened.ask("two")
        opened.save()
        assert path.read_text() == text and opened.name in chats.titles("me"), "what was there is not written over"
    path.write_text(turn % '{"text": "b", "from a later version": 1}')
    assert chats.open("me", "damaged").turns[0].answer.text == "b"


def test_a_chat_that_cannot_be_read_is_said(open_page, tmp_path):
    (tmp_path / "chats" / "local").mkdir(parents=True)
    (tmp_path / "chats" / "local" / "damaged.json").write_text("{")
    assert "damaged.json cannot be read" in shown(open_page(tmp_path, query={"chat": "damaged"}))


def test_a_disk_that_takes_no_chats_is_said(open_page, server, tmp_path):
    (tmp_path / "chats").write_text("no folder")
    app = open_page(tmp_path)
    use_api(app, server.base_url)
    assert ask(app).text == "Hello." and "not saved" in shown(app)


# --- a server --------------------------------------------------------------------------------------------------------


def test_a_server_answers_with_the_settings_of_the_page(open_page, server):
    app = open_page()
    use_api(app, server.base_url)
    app.slider(key="temperature").set_value(1.5)
    app.slider(key="top_p").set_value(0.5)
    app.text_area(key="system").set_value("Be brief.")
    answer = ask(app, "Hi")
    assert answer.text == "Hello." and answer.tokens == 42 and answer.model == "says"
    body = server.requests[-1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.5, 0.5, 16)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_reasoning_stands_apart(open_page, server):
    app = open_page()
    use_api(app, server.base_url, "thinks")
    answer = ask(app)
    assert (answer.thought, answer.text) == ("First, the sky.", "Hello.")
    assert app.expander[0].label == "Reasoning" and app.expander[0].markdown[0].value == "First, the sky."
    server.text = "<think>\nhm\n</think>\n<answer>\nSo.\n</answer>"
    use_api(app, server.base_url, "says")
    answer = ask(app)
    assert (answer.thought, answer.text) == ("hm", "So.")


def test_tool_calls_are_folded(open_page, server):
    server.text = 'I look.<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    app = open_page()
    use_api(app, server.base_url)
    answer = ask(app)
    assert answer.text.strip() == "I look." and [call["name"] for call in answer.calls] == ["weather"]
    (folded,) = app.expander
    assert "weather" in folded.label and json.loads(folded.code[0].value) == {"city": "北京"}


@pytest.mark.parametrize(
    ("model", "message"),
    [("full", "the context 512"), ("broken", "out of memory"), ("breaks-off", "broke off"), ("dies", "broke before")],
)
def test_what_a_server_refuses_is_said_and_kept(open_page, server, model, message):
    app = open_page()
    use_api(app, server.base_url, model)
    answer = ask(app)
    assert answer.ending == FAILED and message in answer.error
    assert app.error[0].value
    use_api(app, server.base_url, "says")
    assert ask(app).text == "Hello." and len(page(app).conversation.turns) == 2
    assert len(server.requests[-1]["messages"]) == (4 if model in ("breaks-off", "dies") else 2)


def test_a_server_that_is_not_there_is_said(open_page):
    app = open_page()
    use_api(app, UNSEEN)
    assert "serve_openai_api.py" in shown(app) and app.chat_input[0].disabled


def test_models_of_a_server_are_listed_or_the_reason_why_not(server, monkeypatch):
    assert list_api_models(server.base_url, "") == (list(MODELS), "")
    assert "base URL" in list_api_models("localhost:1", "")[1]
    server.needs_key = True
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = list_api_models(server.base_url, "")[1]
    assert told.endswith("API key: enter it in the sidebar"), "the environment's key goes to no server by itself"
    assert list_api_models(server.base_url, KEY)[0] == list(MODELS)


def test_no_proxy_hears_what_is_said_to_this_machine(open_page, server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, UNSEEN.removesuffix("/v1"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert list_api_models(server.base_url, "") == (list(MODELS), "")
    app = open_page()
    use_api(app, server.base_url)
    assert ask(app).text == "Hello."


@pytest.mark.parametrize(
    "chunk",
    [
        {"usage": {}}, {"usage": {"completion_tokens": None}}, {"choices": None}, {"choices": 5},
        {"choices": [{"delta": None}]}, {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {"content": {}}}]},
        {"choices": [{"delta": {"tool_calls": [{}]}}]}, {"choices": [{"delta": {"content": "a"}, "finish_reason": {}}]},
        {"error": "no"}, [], "x", None,
    ],
)  # fmt: skip
def test_whatever_a_server_sends_the_answer_ends_and_can_be_asked_again(open_page, server, chunk):
    server.first_chunk = chunk
    app = open_page()
    use_api(app, server.base_url, "odd")
    answer = ask(app)
    assert answer.ending and "Traceback" not in answer.error and isinstance(answer.text, str)
    server.first_chunk = {"choices": []}
    assert ask(app).text == "Hello."


@pytest.mark.parametrize("stops", [True, False])
def test_a_stream_without_end_is_stopped_at_once_or_cut_at_a_limit(server, stops):
    answer = Answer()
    run = ApiModel(server.base_url, "", "flood").start(answer, QUESTION, Settings())
    if stops:
        wait_for(lambda: answer.text)
        run.cancel()
    run.join(60)
    assert answer.ending == (STOPPED if stops else FAILED) and 0 < len(answer.text) <= LONGEST
    assert stops or answer.error == f"The answer was cut: it has more than {LONGEST:,} characters."


def test_a_huge_chunk_is_cut(server):
    server.first_chunk = {"choices": [{"delta": {"content": "on and on " * 2_000_000}}]}
    answer = Answer()
    ApiModel(server.base_url, "", "odd").start(answer, QUESTION, Settings()).join(60)
    assert answer.ending == FAILED and len(answer.text) == LONGEST


# --- stopping --------------------------------------------------------------------------------------------------------


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("key", ["clear", "delete-0"])
def test_what_takes_away_a_question_whose_model_is_still_loaded_leaves_nothing_to_begin(open_page, weights, key):
    app = open_page(weights)
    ask(app, "one")
    conversation = page(app).conversation
    conversation.again(conversation.turns[0])
    assert conversation.pending, "as it is while weights are read"
    click(app, key)
    assert not conversation.turns and conversation.pending is None and conversation.run is None


def test_opening_the_same_chat_while_its_model_is_loaded_ends_the_answer(open_page, weights):
    app = open_page(weights)
    ask(app, "one")
    page(app).conversation.ask("two")
    click(app, f"chat-{page(app).conversation.name}")
    assert page(app).conversation.turns[1].answer.ending == STOPPED and page(app).conversation.pending is None
    assert ask(app, "three").tokens == 16


def test_asked_twice_while_the_model_is_loaded_the_first_is_stopped_and_the_second_answered(open_page, weights):
    app = open_page(weights)
    page(app).conversation.ask("one")
    assert ask(app, "two").tokens == 16
    first, _ = page(app).conversation.turns
    assert first.answer.ending == STOPPED and "stopped" in shown(app)


def idle_engine(**options) -> Engine:
    """An engine that takes requests and does nothing: answers wait for a thread that is not there."""
    engine = Engine(sharp_model(), slots=1, **options)
    engine.threaded = True
    return engine


def test_stopping_frees_the_engine_and_keeps_what_was_said(tokenizer):
    with Engine(sharp_model(), slots=1) as engine:
        model = LocalModel("tiny", engine, tokenizer)
        answer = Answer()
        run = model.start(answer, QUESTION, Settings(max_tokens=4000, temperature=2.0))
        wait_for(lambda: answer.tokens > 3 and answer.text)
        run.cancel()
        run.join(10)
        assert answer.ending == STOPPED and 3 < answer.tokens < 4000 and answer.text
        assert engine.stats()["running"] == 0 and engine.stats()["cancelled"] == 1


@pytest.mark.parametrize("name", ["endless", "silent"])
def test_stopping_drops_the_connection(server, name):
    answer = Answer()
    run = ApiModel(server.base_url, "", name).start(answer, QUESTION, Settings())
    wait_for(lambda: answer.text if name == "endless" else server.requests)
    run.cancel()
    run.join(10)
    assert answer.ending == STOPPED and (answer.text.startswith("on and") or name == "silent")
    assert server.gone.wait(10), "the server still sends"


def test_a_model_that_was_put_away_says_so(tokenizer):
    model = LocalModel("tiny", idle_engine(), tokenizer)
    answer = Answer()
    run = model.start(answer, QUESTION, Settings())
    model.close()
    run.join(10)
    assert answer.ending == FAILED and "Ask again" in answer.error
    with pytest.raises(ValueError, match="Ask again"):
        model.start(Answer(), QUESTION, Settings())


def test_a_busy_engine_says_so(tokenizer):
    model = LocalModel("tiny", idle_engine(max_queue=0), tokenizer)
    model.start(Answer(), QUESTION, Settings())
    with pytest.raises(ValueError, match="busy"):
        model.start(Answer(), QUESTION, Settings())
    model.close()


def test_old_turns_make_room_when_the_context_is_full(tokenizer):
    engine = idle_engine(context_length=96)
    model = LocalModel("tiny", engine, tokenizer)
    turns = [{"role": role, "content": "the sky was grey"} for _ in range(6) for role in ("user", "assistant")]
    answer = Answer()
    model.start(answer, [{"role": "system", "content": "Be brief."}, *turns, *QUESTION], Settings())
    assert answer.left_out
    model.close()


def test_pretrained_weights_continue_the_text_itself(tokenizer):
    model = LocalModel("tiny", idle_engine(), tokenizer, continues=True)
    request = model.start(Answer(), QUESTION, Settings(max_tokens=1))._request
    assert request.prompt_tokens == 1 + len(tokenizer.encode_documents(["the sky"])[0])
    model.close()


def test_chat_page_and_server_have_the_same_defaults():
    chat, server = eval_model.parse_args([]), serve_openai_api.parse_args([])
    for name in ("temperature", "top_p", "max_new_tokens"):
        page = getattr(Settings(), {"max_new_tokens": "max_tokens"}.get(name, name))
        assert getattr(chat, name) == getattr(server, name) == page, name
    assert chat_openai_api.parse_args([]).history_cnt == 2 * Settings().history_turns == HISTORY_MESSAGES
