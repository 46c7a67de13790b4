"""Chat with a small language model: the app.py of a Space, which make_space.py puts together. Run: python app.py"""

import json
import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch

from dataset.text_stream import TextStream
from dataset.tokenization import ChatTokenizer
from model.batching import Engine, QueueFull
from model.loading import load_ready
from model.sampling import SamplingParams
from scripts.web_markdown import safe_markdown

HERE = Path(__file__).resolve().parent
SPACE = json.loads((HERE / "space.json").read_text("utf-8"))  # title, weights, continues, examples
device = "cuda" if torch.cuda.is_available() else "cpu"
ready = load_ready(HERE / SPACE["weights"], ChatTokenizer, tokenizer_path=HERE / "model", device=device)
tokenizer = ready.tokenizer
engine = Engine(ready.model, slots=4, context_length=ready.context_length)
engine.start()
LONGEST = min(1024, engine.context_length // 2)
# whatever a visitor or the model writes, the browser asks no other host
SAFE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
HEAD = f'<meta http-equiv="Content-Security-Policy" content="{SAFE}">'


def said(message: dict) -> str:
    """Return what a message said; its content is Markdown changed for display if its metadata holds a log."""
    content, raw = message["content"], (message.get("metadata") or {}).get("log")
    return raw or (content if isinstance(content, str) else "".join(part.get("text", "") for part in content))


def answer(question: str, history: list[dict], temperature: float, max_tokens: int, system: str):
    """Yield the messages of the answer so far: a folded thought, if there is one, and the answer."""
    turns = [{"role": "system", "content": system}] if system.strip() else []
    without_thoughts = [turn for turn in history if not (turn.get("metadata") or {}).get("title")]
    turns += [{"role": turn["role"], "content": said(turn)} for turn in without_thoughts]
    turns.append({"role": "user", "content": question})
    if SPACE["continues"]:
        ids = tokenizer.encode_beginning(question)
    else:
        ids, _ = tokenizer.encode_fitting(turns, engine.context_length, max_tokens)
    stop_ids = (tokenizer.eos_id, tokenizer.pad_id)
    params = SamplingParams(temperature=temperature, top_p=0.85, max_new_tokens=max_tokens, stop_ids=stop_ids)
    try:
        request = engine.submit(ids, params)
    except (ValueError, QueueFull) as error:
        raise gr.Error(str(error)) from error
    stream, texts = TextStream(tokenizer, split_thoughts=True, prompt_ids=ids), {True: "", False: ""}

    def messages(pieces: list) -> list[gr.ChatMessage]:
        for is_thought, text in pieces:
            texts[is_thought] += text
        thought = [gr.ChatMessage(texts[True], metadata={"title": "思考 · Reasoning"})] if texts[True] else []
        # a log is shown only with a title: here it keeps the text for the next prompt
        return [*thought, gr.ChatMessage(safe_markdown(texts[False]), metadata={"log": texts[False]})]

    try:
        for token in request:
            yield messages(stream.push(token.id))
        yield messages(stream.flush())
    finally:  # Stop, or the visitor has left
        request.cancel()


page = gr.ChatInterface(
    answer,
    title=SPACE["title"],
    description=SPACE["description"],
    examples=[[example] for example in SPACE["examples"]],
    cache_examples=False,
    run_examples_on_click=True,
    concurrency_limit=4,
    chatbot=gr.Chatbot(
        show_label=False,
        height="65vh",
        buttons=["copy", "copy_all"],  # not "share", which asks another host
        latex_delimiters=[{"left": mark, "right": mark, "display": mark == "$$"} for mark in ("$$", "$")],
    ),
    additional_inputs=[
        gr.Slider(0, 1.5, 0.85, step=0.05, label="温度 · Temperature"),
        gr.Slider(16, LONGEST, min(512, LONGEST), step=16, label="最大 token 数 · Longest answer"),
        gr.Textbox("", label="系统提示词 · System prompt"),
    ],
)

if __name__ == "__main__":
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # of the visitor, not of another host
    page.launch(head=HEAD, theme=gr.themes.Default(**fonts), footer_links=[], ssr_mode=False)
