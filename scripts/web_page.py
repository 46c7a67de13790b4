"""The page that web_demo.py shows. Streamlit runs this file from top to bottom after every click.

The conversation is kept in a file and shared by all tabs that show it (web_conversation.py). An answer is made in a
thread (web_answers.py). So a run of this file may end at any line, and a reload shows the answer where it has got to.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import streamlit as st

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dataset.tokenization import DEFAULT_SYSTEM
from model.batching import Engine
from model.loading import READY_FLAGS
from scripts.example_prompts import example_prompts
from scripts.model_catalog import Entry, find_models, load_entry, printable, stamp_of
from scripts.web_answers import ApiModel, LocalModel, Settings, list_api_models
from scripts.web_conversation import CUT, FAILED, STOPPED, Answer, Chats, Conversation, Turn
from scripts.web_markdown import literal, safe_markdown

FRAME = 0.08  # seconds between two pictures of an answer that grows
SETTLING, SLOW_FRAME = 10, 1.0  # the first seconds of a tab: quick pictures would keep it from drawing its buttons
LOADED_AT_ONCE = 2  # models kept in memory
ICON = ROOT / "images" / "icon.svg"
STYLE = Path(__file__).with_suffix(".css")
WORDS = json.loads(Path(__file__).with_name("web_words.json").read_text("utf-8"))
VISITOR_COOKIE = "minimind_visitor"  # set by web_demo.py


@dataclass
class Page:
    """The state of one tab between two runs of this file."""

    visitor: str
    conversation: Conversation
    editing: Turn | None = None  # whose question is being edited
    drawn: int = 0  # turns that the browser shows
    problem: str = ""
    opened: float = field(default_factory=time.monotonic)


def page() -> Page:
    return st.session_state.page


def words(key: str) -> str:
    return WORDS["zh" if str(st.context.locale).startswith("zh") else "en"][key]


@st.cache_resource
def all_chats(folder: Path) -> Chats:
    return Chats(folder)


def open_page(chats: Chats) -> Page:
    if "page" not in st.session_state:
        visitor = str(st.context.cookies.get(VISITOR_COOKIE, "local"))
        st.session_state.page = Page(visitor, chats.open(visitor, st.query_params.get("chat")))
    return page()


# --- what people do --------------------------------------------------------------------------------------------------


def keep() -> None:
    try:
        page().conversation.save()
        page().problem = ""
    except OSError as error:
        page().problem = words("not_kept").format(error)


def change(name: str, *args) -> None:
    """Call the conversation's ask, again, edit, delete, clear or undo."""
    stop()
    with contextlib.suppress(ValueError):  # another tab has deleted the turn
        getattr(page().conversation, name)(*args)
    keep()


def ask_typed() -> None:
    if (st.session_state.question or "").strip():
        change("ask", st.session_state.question.strip())


def show_other(turn: Turn) -> None:
    turn.chosen = (turn.chosen + 1) % len(turn.answers)
    keep()


def stop() -> None:
    page().conversation.stop()
    page().editing = None


def begin_edit(turn: Turn) -> None:
    stop()
    page().editing = turn


def end_edit(turn: Turn, key: str) -> None:
    question = st.session_state[key].strip()
    stop()
    if question:
        change("edit", turn, question)


def open_chat(chats: Chats, name: str | None) -> None:
    """Show another conversation, or a new one; an answer in the making goes on, one that waits for its model ends."""
    if page().conversation.pending:
        stop()
    page().conversation, page().editing = chats.open(page().visitor, name), None


def action(place, label: str, key: str, on_click: Callable[..., None], *args, **look: str) -> None:
    """Draw a button without a frame."""
    place.button(label, key, on_click=on_click, args=args, type="tertiary", **look)


# --- models ----------------------------------------------------------------------------------------------------------


@st.cache_data(ttl=60, show_spinner=False)
def local_models(out_dir: str, folders: tuple[str, ...]) -> list[Entry]:
    """Find the models in the output folder, in the one of `make quickstart` inside it, and in Hugging Face folders."""
    entries = find_models(out_dir, folders)
    return entries + [entry for entry in find_models(Path(out_dir) / "quickstart", ()) if entry not in entries]


api_models = st.cache_data(ttl=20, show_spinner=False)(list_api_models)


def label_of(entry: Entry) -> str:
    """Return full_sft · 26M dense · quickstart."""
    size = entry.size if entry.use_moe or not entry.size else f"{entry.size} dense"
    place = "quickstart" if entry.path.parent.name == "quickstart" else ""
    return " · ".join(filter(None, (entry.stage or entry.name, size, place)))


@st.cache_resource(max_entries=LOADED_AT_ONCE, on_release=LocalModel.close, show_spinner=False)
def load_local(_entry: Entry, label: str, adapter: str | None, stamp: tuple, flags: dict) -> LocalModel:
    """stamp: changes with the files, so that weights trained again are loaded again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        flags = {name: value for name, value in flags.items() if name in READY_FLAGS}
        ready = load_entry(_entry, adapter, **flags)
    engine = Engine(ready.model, slots=4, context_length=ready.context_length)
    engine.start()
    continues = _entry.stage == "pretrain"
    return LocalModel(
        f"{label} + {adapter}" if adapter else label,
        engine,
        ready.tokenizer,
        continues=continues,
        examples=example_prompts(ready.sidecar, continues),
        split_thoughts=_entry.stage in ("reason", "grpo", ""),  # folders do not tell their stage: look for thoughts
        warning=" ".join(str(w.message) for w in caught if issubclass(w.category, UserWarning)),
    )


def choose_local(flags: argparse.Namespace) -> tuple[LocalModel | None, str]:
    """Return (model, ""), (None, what is wrong), or (None, "") if there are no weights at all."""
    entries = local_models(flags.out_dir, tuple(flags.hf_path))
    if not entries:
        return None, ""
    by_path = {str(entry.path): entry for entry in entries}
    used = [turn.answer.model for turn in page().conversation.turns if turn.answer.model]
    last, _, last_adapter = (used or [""])[-1].partition(" + ")  # a reload goes on with the same model
    index = next((number for number, entry in enumerate(entries) if label_of(entry) == last), 0)
    path = choose_model("model", list(by_path), index=index, format_func=lambda path: label_of(by_path[path]))
    entry, adapter = by_path[path], None
    if entry.adapters:
        adapters = [None, *entry.adapters]
        index = adapters.index(last_adapter) if label_of(entry) == last and last_adapter in adapters else 0
        adapter = st.selectbox(
            words("adapter"), adapters, index, lambda name: printable(name or words("none")), key=printable(path)
        )
    try:
        with st.spinner(words("loading")):
            model = load_local(entry, label_of(entry), adapter, stamp_of(entry, adapter), vars(flags))
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: memory has run out
        return None, str(error)
    if model.warning:
        st.caption(literal(model.warning))
    return model, ""


def choose_api(flags: argparse.Namespace) -> tuple[ApiModel | None, str]:
    base_url = st.text_input("Base URL", flags.base_url, key="base_url").strip().rstrip("/")
    api_key = st.text_input("API key", type="password", key="api_key", help=words("key_help")).strip()
    with st.spinner(words("asking")):
        names, problem = api_models(base_url, api_key)
    name = choose_model("api_model", names, placeholder=words("none_found"), disabled=not names)
    return (None, problem) if problem else (ApiModel(base_url, api_key, name), "")


def choose_model(key: str, options: list[str], **more) -> str:
    """Show the box that chooses a model, with the button that looks for models again."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="model-row"):
        chosen = st.selectbox(words("model"), options, key=key, **more)
        st.button("", icon=":material/refresh:", on_click=reload_models, help=words("look"), key="reload")
    return chosen


def reload_models() -> None:
    local_models.clear()
    api_models.clear()


# --- the sidebar -----------------------------------------------------------------------------------------------------


def sidebar(flags: argparse.Namespace, chats: Chats) -> tuple[LocalModel | ApiModel | None, str, Settings]:
    """Draw the sidebar; return the model, what is wrong if there is none, and the settings."""
    with st.container(horizontal=True, vertical_alignment="center", key="head"):
        st.markdown("### MiniMind")
        action(st, words("new"), "new", open_chat, chats, None, icon=":material/edit_square:")
    labels = {"local": words("local"), "api": words("api")}
    source = st.segmented_control(
        words("source"), labels, format_func=labels.get, default="local", required=True,
        label_visibility="collapsed", width="stretch", key="source",
    )  # fmt: skip
    model, problem = choose_api(flags) if source == "api" else choose_local(flags)
    with st.container(key="settings"):

        def slider(key: str, *numbers: float) -> float:
            return st.slider(words(key), *numbers, key=key, help=words(f"{key}_help"))

        settings = Settings(
            temperature=slider("temperature", 0.0, 2.0, flags.temperature, 0.05),
            top_p=slider("top_p", 0.05, 1.0, flags.top_p, 0.05),
            max_tokens=slider("max_tokens", 16, max(4096, flags.max_new_tokens), flags.max_new_tokens, 16),
            history_turns=slider("history_turns", 0, 20, Settings.history_turns),
            system=st.text_area(words("system"), DEFAULT_SYSTEM, key="system", height=80, help=words("system_help")),
        )
    conversation = page().conversation
    with st.container(horizontal=True, key="keeping"):
        nothing = not conversation.turns
        delete = ":material/delete_sweep:"
        st.button(words("clear"), icon=delete, on_click=change, args=("clear",), disabled=nothing, key="clear")
        with st.popover(words("export"), icon=":material/download:", disabled=nothing or conversation.run is not None):
            for label, text, ending, mime in (
                ("Markdown", conversation.to_markdown(), "md", "text/markdown"),
                ("JSON", conversation.to_json(), "json", "application/json"),
            ):
                st.download_button(label, text, f"minimind.{ending}", mime, on_click="ignore", width="stretch")
    if titles := chats.titles(page().visitor):
        st.caption(words("chats"))
        with st.container(key="chats", gap=None):
            for name, title in titles.items():
                kind = "secondary" if name == conversation.name else "tertiary"
                label = literal(" ".join(title[:80].split()))
                st.button(label, on_click=open_chat, args=(chats, name), type=kind, width="stretch", key=f"chat-{name}")
    return model, problem, settings


# --- the conversation ------------------------------------------------------------------------------------------------


def draw_question(index: int, turn: Turn) -> None:
    with st.container(key=f"question-{index}", gap=None):
        if page().editing is turn:
            st.text_area(words("question"), turn.question, key=f"edited-{index}", label_visibility="collapsed")
            with st.container(horizontal=True, horizontal_alignment="right", key=f"editing-{index}"):
                st.button(words("cancel"), on_click=stop, key=f"cancel-{index}")
                args = (turn, f"edited-{index}")
                st.button(words("send"), type="primary", on_click=end_edit, args=args, key=f"send-{index}")
            return
        bubble = st.empty()
        if not turn.answer.continues:
            with bubble.container(key=f"bubble-{index}"):
                st.markdown(literal(turn.question))
        with st.container(horizontal=True, horizontal_alignment="right", key=f"actions-question-{index}"):
            edit, delete = st.empty(), st.empty()
            if page().conversation.run is None:
                action(edit, words("edit"), f"edit-{index}", begin_edit, turn)
                action(delete, words("delete"), f"delete-{index}", change, "delete", turn)


class AnswerPlaces:
    """The places of one answer. A place that stays empty clears its old content, which would show during this run."""

    def __init__(self, index: int, turn: Turn):
        self.index, self.turn = index, turn
        with st.container(key=f"answer-{index}"):
            self.thought, self.text, self.calls, self.error = st.empty(), st.empty(), st.empty(), st.empty()
            with st.container(horizontal=True, vertical_alignment="center", key=f"actions-answer-{index}"):
                self.summary, self.copy, self.again, self.other = st.empty(), st.empty(), st.empty(), st.empty()

    def grow(self, thought_place=None):
        """Draw the answer while it is made; return the place of its thought."""
        answer = self.turn.answer
        if answer.thought:
            if thought_place is None:
                thought_place = self.thought.expander(words("reasoning"), expanded=True, icon=":material/psychology:")
                thought_place = thought_place.empty()
            thought_place.markdown(safe_markdown(answer.thought))
        self.text.markdown(safe_markdown(self._text(answer)) or "…")
        self.summary.caption(answer.pace(), width="content")
        return thought_place

    def draw(self) -> None:
        """Draw the complete answer with its buttons."""
        answer, index = self.turn.answer, self.index
        if answer.thought:
            with self.thought.expander(words("reasoning"), icon=":material/psychology:"):
                st.markdown(safe_markdown(answer.thought))
        if self._text(answer):
            self.text.markdown(safe_markdown(self._text(answer)))
        elif not answer.calls and not answer.error:
            self.text.caption(words("empty"))
        if answer.calls:
            with self.calls.container():
                for call in answer.calls:
                    with st.expander(literal(f"{words('call')}: {call['name']}"), icon=":material/build:"):
                        st.code(call["arguments"], "json", wrap_lines=True)
        if answer.error:
            self.error.error(literal(answer.error))
        self.summary.caption(literal(summary(answer)), width="content")
        if page().conversation.run is not None:
            return
        if self._text(answer):
            with self.copy.container(key=f"copy-{index}", width="content"):
                copy_button()(data={"text": self._text(answer), "label": words("copy")}, key=f"copied-{index}")
        action(self.again, words("again"), f"again-{index}", change, "again", self.turn, icon=":material/refresh:")
        if (count := len(self.turn.answers)) > 1:
            label, look = f"{self.turn.chosen + 1} / {count}", {"icon": ":material/swap_horiz:", "help": words("other")}
            action(self.other, label, f"other-{index}", show_other, self.turn, **look)

    def _text(self, answer: Answer) -> str:
        return self.turn.question + answer.text if answer.continues else answer.text


@st.cache_resource
def copy_button():
    script = Path(__file__).with_name("web_copy.js").read_text("utf-8")
    style = "button { all: unset; cursor: pointer; font: inherit; } button:focus-visible { outline: 1px solid; }"
    return st.components.v2.component("minimind_copy", html="<button></button>", css=style, js=script)


def summary(answer: Answer) -> str:
    """Return the line under an answer: 128 tokens · 43.2 tokens/s · full_sft · 26M dense · stopped."""
    ending = {STOPPED: words("stopped"), CUT: words("cut")}.get(answer.ending, "")
    left_out = words("left_out").format(answer.left_out) if answer.left_out else ""
    return " · ".join(filter(None, (answer.pace(), answer.model, ending, left_out)))


def draw_turns() -> AnswerPlaces | None:
    """Draw the conversation; return the places of the answer that is being made."""
    state, growing = page(), None
    turns = state.conversation.turns
    with st.container(key="turns"):
        for index, turn in enumerate(turns):
            draw_question(index, turn)
            places = AnswerPlaces(index, turn)
            if turn.answer.ending:
                places.draw()
            else:
                growing = places
        for _ in range(2 * (state.drawn - len(turns))):  # wipe out turns that are gone
            st.empty()
    state.drawn = len(turns)
    return growing


def draw_growing(places: AnswerPlaces) -> None:
    answer, thought_place = places.turn.answer, None
    while not answer.ending:
        thought_place = places.grow(thought_place)
        settling = time.monotonic() < page().opened + SETTLING
        # the browser draws all of the text each time
        time.sleep(SLOW_FRAME if settling else FRAME + len(answer.text + answer.thought) / 200_000)
    st.rerun()


def draw_welcome(model: LocalModel | ApiModel | None) -> None:
    with st.container(key="welcome", horizontal_alignment="center"):
        st.image(str(ICON), width=56)
        st.markdown("# MiniMind", anchors=False, text_alignment="center")
        continues = getattr(model, "continues", False)
        st.caption(words("continues" if continues else "ask"), text_alignment="center")
        examples = getattr(model, "examples", None) or example_prompts({}, continues)
        with st.container(key="suggestions", horizontal=True, horizontal_alignment="center"):
            for number, text in enumerate(examples[::2]):
                st.button(text, on_click=change, args=("ask", text), disabled=model is None, key=f"suggestion-{number}")


def draw_no_weights(flags: argparse.Namespace) -> None:
    with st.container(key="no-weights"):
        st.markdown(f"## {words('no_weights')}", anchors=False)
        st.markdown(words("nothing_in").format(flags.out_dir))
        st.code("make quickstart", language="bash")
        st.markdown(words("real"))
        st.code("cd trainer\npython train_pretrain.py\npython train_full_sft.py", language="bash")
        st.markdown(words("or_api"))
        st.code("python scripts/serve_openai_api.py", language="bash")
        st.button(words("look"), icon=":material/refresh:", on_click=reload_models, type="primary", key="look-again")


def begin_answer(turn: Turn, model: LocalModel | ApiModel | None, problem: str, settings: Settings) -> None:
    conversation = page().conversation
    answer = turn.answer
    try:
        if model is None:
            raise ValueError(problem or words("choose"))
        messages = conversation.messages(settings.history_turns, settings.system, turn)
        conversation.run = model.start(answer, messages, settings, conversation.answered)
        if answer.ending:  # it ended before `run` was there to be cleared
            conversation.run = None
    except ValueError as error:
        key, *numbers = error.args
        answer.ending, answer.error = FAILED, words(key).format(*numbers) if key in WORDS["en"] else str(error)
        keep()


def main() -> None:
    st.set_page_config("MiniMind", page_icon=str(ICON), layout="centered", initial_sidebar_state="auto")
    st.html(STYLE)
    flags = argparse.Namespace(**json.loads(os.environ["MINIMIND_WEB_FLAGS"]))
    chats = all_chats(Path(flags.out_dir) / "chats")
    state = open_page(chats)
    with st.sidebar:
        model, problem, settings = sidebar(flags, chats)
    conversation = state.conversation
    if (turn := conversation.pending) is not None:
        conversation.pending = None
        begin_answer(turn, model, problem, settings)
    if conversation.turns:
        st.query_params["chat"] = conversation.name
    else:
        st.query_params.clear()

    with st.container(key="topbar"):
        st.text(model.name if model else "MiniMind")
    welcome_place = st.empty()
    with welcome_place:
        if not model and not problem:
            draw_no_weights(flags)
        elif not conversation.turns:
            draw_welcome(model)
    growing = draw_turns()
    problem_place, undo_place = st.empty(), st.empty()
    unread = words("unread").format(conversation.unread) if conversation.unread else ""
    if problem := problem or state.problem or unread:
        problem_place.error(literal(problem))
    if conversation.undo_label and growing is None:
        with undo_place.container(horizontal=True, vertical_alignment="center", key="actions-undo"):
            st.caption(words(conversation.undo_label), width="content")
            action(st, words("undo"), "undo", change, "undo", icon=":material/undo:")
    st.chat_input(
        words("message").format(model.name) if model else words("choose"),
        on_submit=ask_typed,
        key="question",
        disabled=model is None or growing is not None,
    )
    stop_place = st.bottom.empty()  # covers the button that sends; a button that moved with the text is hard to hit
    if growing is not None:
        stop_place.button(words("stop"), icon=":material/stop_circle:", on_click=stop, key="stop")
        draw_growing(growing)


main()
