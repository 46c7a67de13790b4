"""The page that web_demo.py shows. Streamlit runs this file from top to bottom after every click.

What must live on stands in `st.session_state.page`: the conversation, and the answer that is being made. The answer is
made elsewhere (web_answers.py), so a run of this file may end at any line and the next one goes on showing it.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import streamlit as st
from streamlit.runtime.scriptrunner import StopException

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from model.batching import Engine
from model.loading import READY_FLAGS
from scripts.model_catalog import Entry, find_models, load_entry
from scripts.web_answers import ApiModel, ApiRun, LocalModel, LocalRun, Settings, list_api_models
from scripts.web_conversation import FAILED, STOPPED, Answer, Conversation, Turn
from scripts.web_markdown import literal, safe_markdown

FRAME = 0.08  # seconds between two pictures of an answer that grows
LOADED_AT_ONCE = 2  # models kept in memory
ICON = ROOT / "images" / "icon.svg"
THINKING = ":material/psychology:"
LOCAL, API = "This computer", "API"
SUGGESTIONS = (
    "你好，你是谁？",
    "Why is the sky blue?",
    "写一首关于秋天的短诗。",
    "Give me three tips for learning a language.",
)
BEGINNINGS = ("世界上最高的山峰是", "The capital of France is", "人工智能的发展", "Once upon a time")
STYLE = Path(__file__).with_suffix(".css")


@dataclass
class Page:
    """What one visitor's page knows between two runs of this file."""

    conversation: Conversation = field(default_factory=Conversation)
    run: LocalRun | ApiRun | None = None  # the answer that is being made
    pending: Answer | None = None  # one that is to be begun as soon as the model is there
    editing: int | None = None  # index of the question that is being edited
    drawn: int = 0  # turns that the browser shows


def page() -> Page:
    return st.session_state.setdefault("page", Page())


# --- what people do --------------------------------------------------------------------------------------------------


def ask(question: str) -> None:
    stop()
    page().pending = page().conversation.ask(question)


def ask_typed() -> None:
    if (st.session_state.question or "").strip():
        ask(st.session_state.question.strip())


def regenerate() -> None:
    stop()
    page().pending = page().conversation.regenerate()


def stop() -> None:
    """Ends the answer that is being made or is to be begun; what there is of it stays."""
    if page().pending is not None:  # its model is still being loaded
        page().pending.ending = STOPPED
        page().pending = None
    if page().run is not None:
        page().run.cancel()
        page().run = None
    page().editing = None


def begin_edit(index: int) -> None:
    stop()
    page().editing = index


def end_edit(index: int) -> None:
    question = st.session_state[f"edited-{index}"].strip()
    stop()
    if question:
        page().pending = page().conversation.edit(index, question)


def delete(index: int) -> None:
    stop()
    page().conversation.delete(index)


def clear() -> None:
    stop()
    page().conversation.clear()


def undo() -> None:
    stop()
    page().conversation.undo()


# --- models ----------------------------------------------------------------------------------------------------------


def read_flags() -> argparse.Namespace:
    return argparse.Namespace(**json.loads(os.environ["MINIMIND_WEB_FLAGS"]))


@st.cache_data(ttl=60, show_spinner=False)
def local_models(out_dir: str, folders: tuple[str, ...]) -> list[Entry]:
    """What lies in the output folder, in the one of `make quickstart` inside it, and in Hugging Face folders."""
    entries = find_models(out_dir, folders)
    return entries + [entry for entry in find_models(Path(out_dir) / "quickstart", ()) if entry not in entries]


api_models = st.cache_data(ttl=20, show_spinner="Asking the server …")(list_api_models)


def label_of(entry: Entry) -> str:
    size = entry.size if entry.use_moe or not entry.size else f"{entry.size} dense"
    place = "quickstart" if entry.out_dir.name == "quickstart" else ""
    return " · ".join(filter(None, (size, entry.stage or entry.name, place)))


def stamp_of(entry: Entry, adapter: str | None) -> tuple:
    """Changes with the files, so that weights that were trained anew are loaded anew."""
    files = [entry.path, *(entry.path.glob("*.safetensors") if entry.path.is_dir() else ())]
    files += (entry.out_dir / "lora").glob(f"{adapter}_*.pth") if adapter else ()
    return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(files) if file.exists())


@st.cache_resource(max_entries=LOADED_AT_ONCE, on_release=LocalModel.close, show_spinner="Loading the weights …")
def load_local(_entry: Entry, label: str, adapter: str | None, stamp: tuple, flags: dict) -> LocalModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        flags = {name: value for name, value in flags.items() if name in READY_FLAGS}
        ready = load_entry(_entry, adapter, **flags)
    engine = Engine(ready.model, slots=4, context_length=ready.context_length)
    engine.start()
    return LocalModel(
        f"{label} + {adapter}" if adapter else label,
        engine,
        ready.tokenizer,
        continues=_entry.stage == "pretrain",
        split_thoughts=_entry.stage in ("reason", ""),  # folders do not tell their stage: thoughts are looked for
        warning=" ".join(str(w.message) for w in caught if issubclass(w.category, UserWarning)),
    )


def choose_local(flags: argparse.Namespace) -> tuple[LocalModel | None, str]:
    """(model, "") or (None, what is wrong); "" for both where there are no weights at all."""
    entries = local_models(flags.out_dir, tuple(flags.hf_path))
    if not entries:
        return None, ""
    by_path = {str(entry.path): entry for entry in entries}
    with model_row():
        path = st.selectbox("Model", list(by_path), format_func=lambda path: label_of(by_path[path]), key="model")
    entry = by_path[path]
    adapter = None
    if entry.adapters:
        adapter = st.selectbox("Adapter", [None, *entry.adapters], format_func=lambda name: name or "none", key=path)
    try:
        model = load_local(entry, label_of(entry), adapter, stamp_of(entry, adapter), vars(flags))
    except (ValueError, OSError) as error:
        return None, str(error)
    if model.warning:
        st.caption(literal(model.warning))
    return model, ""


def choose_api(flags: argparse.Namespace) -> tuple[ApiModel | None, str]:
    base_url = st.text_input("Base URL", flags.base_url, key="base_url").strip().rstrip("/")
    api_key = st.text_input("API key", type="password", key="api_key", help="Leave empty where the server wants none.")
    names, problem = api_models(base_url, api_key.strip())
    with model_row():
        name = st.selectbox("Model", names, key="api_model", placeholder="none found", disabled=not names)
    return (None, problem) if problem else (ApiModel(base_url, api_key.strip(), name), "")


@contextlib.contextmanager
def model_row() -> Iterator[None]:
    """What chooses a model, with the button that looks for models again."""
    with st.container(horizontal=True, vertical_alignment="bottom", key="model-row"):
        yield
        st.button("", icon=":material/refresh:", on_click=reload_models, help="Look for models again", key="reload")


def reload_models() -> None:
    local_models.clear()
    api_models.clear()


# --- the sidebar -----------------------------------------------------------------------------------------------------


def sidebar(flags: argparse.Namespace) -> tuple[LocalModel | ApiModel | None, str, Settings]:
    st.markdown("### MiniMind")
    source = st.segmented_control(
        "Source",
        (LOCAL, API),
        default=LOCAL,
        required=True,
        key="source",
        width="stretch",
        label_visibility="collapsed",
    )
    model, problem = choose_local(flags) if source == LOCAL else choose_api(flags)
    with st.container(key="settings"):
        settings = Settings(
            temperature=st.slider(
                "Temperature", 0.0, 2.0, 0.7, 0.05, key="temperature", help="0: always the likeliest"
            ),
            top_p=st.slider(
                "Top-p", 0.05, 1.0, 0.9, 0.05, key="top_p", help="Only the likeliest tokens, up to this share"
            ),
            max_tokens=st.slider("Longest answer", 16, 4096, 512, 16, key="max_tokens", help="In tokens"),
            history_turns=st.slider(
                "Memory", 0, 20, 3, key="history_turns", help="Earlier turns that the model is told"
            ),
            system=st.text_area("System prompt", key="system", placeholder="You are a helpful assistant", height=80),
        )
    conversation = page().conversation
    with st.container(horizontal=True, key="keeping"):
        nothing = not conversation.turns
        st.button("Clear", icon=":material/delete_sweep:", on_click=clear, disabled=nothing, key="clear")
        with st.popover("Export", icon=":material/download:", disabled=nothing or page().run is not None):
            for label, text, ending, mime in (
                ("Markdown", conversation.to_markdown(), "md", "text/markdown"),
                ("JSON", conversation.to_json(), "json", "application/json"),
            ):
                st.download_button(label, text, f"minimind.{ending}", mime, on_click="ignore", width="stretch")
    return model, problem, settings


# --- the conversation ------------------------------------------------------------------------------------------------


def draw_question(index: int, turn: Turn) -> None:
    with st.container(key=f"question-{index}", gap=None):
        if page().editing == index:
            st.text_area("Question", turn.question, key=f"edited-{index}", label_visibility="collapsed")
            with st.container(horizontal=True, horizontal_alignment="right", key=f"editing-{index}"):
                st.button("Cancel", on_click=stop, key=f"cancel-{index}")
                st.button("Send", type="primary", on_click=end_edit, args=(index,), key=f"send-{index}")
            return
        with st.container(key=f"bubble-{index}"):
            st.markdown(literal(turn.question))
        with st.container(horizontal=True, horizontal_alignment="right", key=f"actions-question-{index}"):
            for label, callback in (("Edit", begin_edit), ("Delete", delete)):
                place = st.empty()
                if page().run is None:
                    place.button(label, on_click=callback, args=(index,), type="tertiary", key=f"{label}-{index}")


def draw_turns() -> list | None:
    """All that was said; returns the places of the answer that is being made."""
    state, places = page(), None
    turns = state.conversation.turns
    with st.container(key="turns"):
        for index, turn in enumerate(turns):
            draw_question(index, turn)
            if turn.answer.ending:
                draw_answer(index, turn.answer, last=index == len(turns) - 1)
            else:
                places = answer_places(index)
        for _ in range(state.drawn - len(turns)):  # wipes out turns that are no more
            st.empty()
            st.empty()
    state.drawn = len(turns)
    return places


def draw_answer(index: int, answer: Answer, last: bool) -> None:
    thought_place, text_place, error_place, summary_place, button_place = answer_places(index)
    if answer.thought:
        thought_place.expander("Reasoning", icon=THINKING).markdown(safe_markdown(answer.thought))
    text_place.markdown(safe_markdown(answer.text))
    if answer.error:
        error_place.error(literal(answer.error))
    summary_place.caption(literal(answer.summary()), width="content")
    if last and page().run is None:
        button_place.button("Again", icon=":material/refresh:", on_click=regenerate, type="tertiary", key="again")


def draw_running(places: list, run: LocalRun | ApiRun) -> None:
    """Shows the answer while it grows, until it is through."""
    answer, inside = run.answer, None
    thought_place, text_place, _, summary_place, _ = places
    try:
        while not run.done:
            run.poll()
            if answer.thought:
                inside = inside or thought_place.expander("Reasoning", expanded=True, icon=THINKING).empty()
                inside.markdown(safe_markdown(answer.thought))
            text_place.markdown(safe_markdown(answer.text) or "…")
            summary_place.caption(answer.pace(), width="content")
            time.sleep(FRAME)
    except StopException:  # the visitor has gone
        run.cancel()
        raise
    page().run = None
    st.rerun()


def answer_places(index: int) -> list:
    """Thought, text, error, summary and button. What stays empty wipes out what was there: else it would be seen for as
    long as this run lasts."""
    with st.container(key=f"answer-{index}"):
        places = [st.empty(), st.empty(), st.empty()]
        with st.container(horizontal=True, vertical_alignment="center", key=f"actions-answer-{index}"):
            return [*places, st.empty(), st.empty()]


def draw_welcome(model: LocalModel | ApiModel | None) -> None:
    with st.container(key="welcome", horizontal_alignment="center"):
        st.image(str(ICON), width=56)
        st.markdown("# MiniMind", anchors=False, text_alignment="center")
        continues = getattr(model, "continues", False)
        greeting = "These are pretrained weights: they go on with your text." if continues else "Ask me something."
        st.caption(greeting, text_alignment="center")
        with st.container(key="suggestions", horizontal=True, horizontal_alignment="center"):
            for number, text in enumerate(BEGINNINGS if continues else SUGGESTIONS):
                st.button(text, on_click=ask, args=(text,), disabled=model is None, key=f"suggestion-{number}")


def draw_no_weights(flags: argparse.Namespace) -> None:
    with st.container(key="no-weights"):
        st.markdown("## No weights yet", anchors=False)
        st.markdown(f"Nothing to talk to in `{flags.out_dir}`. A small model takes a few minutes, without a GPU:")
        st.code("make quickstart", language="bash")
        st.markdown("The real one, from your own data or the published set:")
        st.code("cd trainer\npython train_pretrain.py\npython train_full_sft.py", language="bash")
        st.markdown("Or choose **API** in the sidebar to talk to a server, this one for example:")
        st.code("python scripts/serve_openai_api.py", language="bash")
        st.button("Look again", icon=":material/refresh:", on_click=reload_models, type="primary", key="look-again")


def main() -> None:
    st.set_page_config("MiniMind", page_icon=str(ICON), layout="centered", initial_sidebar_state="auto")
    st.html(STYLE)
    flags = read_flags()
    with st.sidebar:
        model, problem, settings = sidebar(flags)
    state = page()
    turns = state.conversation.turns

    if state.pending is not None:
        answer, state.pending = state.pending, None
        try:
            if model is None:
                raise ValueError(problem or "There are no weights to answer with.")
            state.run = model.start(
                answer, state.conversation.messages(settings.history_turns, settings.system), settings
            )
        except ValueError as error:
            answer.ending, answer.error = FAILED, str(error)

    welcome_place = st.empty()
    if not turns:
        with welcome_place:
            if model or problem:
                draw_welcome(model)
            else:
                draw_no_weights(flags)
    running_places = draw_turns()
    problem_place, undo_place = st.empty(), st.empty()
    if problem:
        problem_place.error(literal(problem))
    if state.conversation.undo_label and state.run is None:
        with undo_place.container(horizontal=True, vertical_alignment="center", key="actions-undo"):
            st.caption(state.conversation.undo_label, width="content")
            st.button("Undo", icon=":material/undo:", on_click=undo, type="tertiary", key="undo")
    st.chat_input(
        f"Message {model.name}" if model else "Choose a model first",
        on_submit=ask_typed,
        key="question",
        disabled=model is None or state.run is not None,
    )
    stop_place = st.bottom.empty()  # lies over the button that sends: one that moved with the text would be hard to hit
    if state.run is not None:
        stop_place.button("Stop", icon=":material/stop_circle:", on_click=stop, key="stop")
    if state.run is not None:
        draw_running(running_places, state.run)


main()
