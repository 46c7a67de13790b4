"""Chat with the weights of any stage, or let pretrained weights continue a text.

    python eval_model.py                          full_sft weights: out/full_sft_512.pth
    python eval_model.py --model_mode 0           0 pretrain, 1 full_sft, 2 rlhf (DPO), 3 reason, 4 full_dist, 5 grpo
    python eval_model.py --lora_name lora_medical an adapter on top: out/lora/lora_medical_512.pth
    python eval_model.py --load 1                 a folder in Hugging Face format: MiniMind2/, or --hf_path FOLDER
    python eval_model.py --prompt "你好"          answers once; only the answer goes to stdout
    python eval_model.py < prompts.txt            one prompt a line

Answers go to stdout, everything else to stderr. /help lists the commands.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import torch

from dataset.text_stream import TextStream
from dataset.tokenization import ChatTokenizer
from model.batching import Engine
from model.flags import HISTORY_MESSAGES, show_defaults, utf8
from model.generation import SamplingParams, loop_length, stream
from model.loading import (
    READY_FLAGS,
    SHARED_FLAGS,
    ReadyModel,
    add_flags,
    check_sizes,
    experts_in,
    given_sizes,
    load_ready,
    named_path,
    ready_flags,
)
from model.model_lora import find_lora, load_lora, lora_layers, remove_lora
from model.streams import note, set_up_streams
from model.weights import STAGE_OF_MODE, WEIGHT_NAME, find_weights
from scripts.example_prompts import example_prompts
from scripts.model_catalog import find_models
from scripts.terminal import Display, LineEditor, TerminalChat, is_typed, piped_prompts, run_main

THINKING_STAGES = ("reason", "grpo")
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
SETTINGS = (*SAMPLING, "history_cnt")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with MiniMind, or let pretrained weights continue a text.")
    add_flags(parser, "model_mode", "load", "out_dir", "hf_path", "lora_name", "hidden_size", "num_hidden_layers")
    add_flags(parser, "use_moe", *READY_FLAGS, *SETTINGS)
    parser.add_argument("--seed", type=int, help="of every answer (default: a new one each time)")
    parser.add_argument("--prompt", type=utf8, help="answer this and exit")
    parser.set_defaults(history_cnt=None)
    show_defaults(parser)
    args = parser.parse_args(argv)
    try:
        sampling_params(args, stop_ids=())
    except ValueError as error:
        parser.error(str(error))
    return args


def sampling_params(args: argparse.Namespace, stop_ids: tuple[int, ...]) -> SamplingParams:
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    return SamplingParams(stop_ids=stop_ids, seed=seed, **{name: getattr(args, name) for name in SAMPLING})


# --- weights ---------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> ReadyModel:
    """Load the model that the flags name and check it against them."""
    path = named_path(args)
    ready = load_ready(path, ChatTokenizer, **ready_flags(args))
    check_sizes(ready.model.config, path, *given_sizes(args))
    return ready


def put_on_adapter(ready: ReadyModel, args: argparse.Namespace, lora_name: str) -> str:
    """Replace the model's adapter by the one named; "None" only removes it.

    Returns the adapter's file, or "". After a WeightsError the model is as it was.
    """
    if lora_name.lower() == "none":
        remove_lora(ready.model)
        return ""
    config = ready.model.config
    path = find_lora(lora_name, args.out_dir, config.hidden_size, experts_in(config) > 0)
    load_lora(ready.model, path, ready.tokenizer.sha256)
    return str(path)


def describe(model: torch.nn.Module, source: str) -> str:
    config, parameter = model.config, next(model.parameters())
    adapter = sum(p.numel() for _, layer in lora_layers(model) for p in layer.lora.parameters())
    count = f"{(sum(p.numel() for p in model.parameters()) - adapter) / 1e6:.2f}M"
    count += f" + {adapter / 1e6:.2f}M" if adapter else ""
    kind = f"MoE of {experts_in(config)} experts" if experts_in(config) else "dense"
    return (
        f"{source}: {count} parameters "
        f"({kind}, hidden_size {config.hidden_size}, {config.num_hidden_layers} layers), "
        f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"
    )


# --- the chat --------------------------------------------------------------------------------------------------------


class LocalChat(TerminalChat):
    """A chat with a model in this process. Its engine reads a conversation only once."""

    settings = {name: SHARED_FLAGS[name]["type"] for name in SETTINGS} | {"seed": int}

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        ready = load(args)
        lora = put_on_adapter(ready, args, args.lora_name)
        stage = STAGE_OF_MODE[args.model_mode]
        self._use(ready, ready.sidecar.get("stage", stage) if args.load == 1 else stage)
        note(describe(ready.model, f"{ready.path} with {lora}" if lora else str(ready.path)))

    def _use(self, ready: ReadyModel, stage: str) -> None:
        self.ready, self.stage = ready, stage
        self.engine = Engine(ready.model, slots=1, context_length=ready.context_length)

    @property
    def continues(self) -> bool:
        """Pretrained weights continue a text; they know no turns."""
        return self.stage == "pretrain"

    def encode(self, prompt: str) -> list[int]:
        if self.continues:
            return self.ready.tokenizer.encode_beginning(prompt)
        context = self.engine.context_length
        ids, left_out = self.ready.tokenizer.encode_fitting(self.messages(prompt), context, self.args.max_new_tokens)
        if left_out:
            note(f"the conversation exceeds --max_seq_len {context}: left out {left_out} old messages")
        return ids

    def answer(self, prompt: str) -> bool:
        tokenizer = self.ready.tokenizer
        ids = self.encode(prompt)
        params = sampling_params(self.args, (tokenizer.eos_id, tokenizer.pad_id))
        text = TextStream(tokenizer, split_thoughts=self.stage in THINKING_STAGES, prompt_ids=ids)
        display = Display()
        answer_ids, interrupted = [], False
        started = time.perf_counter()
        try:
            for token_id in stream(self.ready.model, ids, params, engine=self.engine):
                answer_ids.append(token_id)
                display.show(text.push(token_id))
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
        display.show(text.flush())
        display.end()

        ending = ", stopped" if interrupted else ""
        if not interrupted and answer_ids[-1] not in params.stop_ids:
            full = len(answer_ids) < params.max_new_tokens
            ending = ", cut: --max_seq_len is reached" if full else ", cut: --max_new_tokens is reached"
        if loop_length(answer_ids):
            ending += ", repeats itself: try --repetition_penalty 1.1"
        seed = f", seed {params.seed}" if params.temperature > 0 else ""
        note(f"[{len(answer_ids)} tokens, {len(answer_ids) / seconds:.1f} tokens/s{seed}{ending}]")
        if answer_ids:
            self.remember(prompt, tokenizer.decode(answer_ids))
        return not interrupted

    def check_settings(self) -> None:
        sampling_params(self.args, stop_ids=())

    def set_system(self, text: str) -> None:
        if self.continues:
            raise ValueError("pretrained weights continue a text; they know no system message")
        super().set_system(text)

    def switch_model(self, name: str) -> None:
        out_dir = Path(self.args.out_dir)
        if not name:
            here = str(self.ready.path.absolute())
            for entry in find_models(out_dir):
                note(f"{'*' if str(entry.path) == here else ' '} {entry.name}")
            return
        path = next((entry.path for entry in find_models(out_dir) if entry.name == name), Path(name))
        if not path.is_dir():
            path = find_weights(str(path), out_dir, self.args.hidden_size, self.args.use_moe)
        ready = load_ready(path, ChatTokenizer, **ready_flags(self.args))
        match = WEIGHT_NAME.fullmatch(path.stem)
        self._use(ready, match["stage"] if match else ready.sidecar.get("stage", "full_sft"))
        note(f"now with {describe(ready.model, str(path))}")

    def switch_lora(self, name: str) -> None:
        if not name:
            raise ValueError("which adapter? /lora NAME, or /lora none")
        lora = put_on_adapter(self.ready, self.args, name)
        note(f"now with {lora}" if lora else "now without an adapter")


def converse(args: argparse.Namespace) -> int:
    """Answer --prompt, the lines of stdin, or what is typed at the menu; return the exit status."""
    chat = LocalChat(args)
    remembers = args.history_cnt is not None
    args.history_cnt = args.history_cnt or 0
    if args.prompt is not None:
        return 0 if chat.answer(args.prompt) else 130
    if not is_typed():
        return chat.run(piped_prompts(), typed=False)
    editor = LineEditor(chat.words())
    note("[0] automatic test 自动测试\n[1] type your own 手动输入")
    try:
        choice = editor.read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        choice = ""
    if not choice:
        return 0
    if choice == "0":
        return chat.run(announced(example_prompts(chat.ready.sidecar, chat.continues)), typed=True)
    if not remembers:
        args.history_cnt = HISTORY_MESSAGES
    note("/help lists the commands, /exit leaves. /help 列出命令，/exit 退出。")
    first = [] if choice == "1" else [choice]  # a question typed at the menu wants an answer
    return chat.run(itertools.chain(first, editor.prompts("👶: ")), typed=True)


def announced(prompts: Iterable[str]) -> Iterator[str]:
    for prompt in prompts:
        note(f"👶: {prompt}")
        yield prompt


def main(argv: list[str] | None = None) -> int:
    set_up_streams()
    args = parse_args(argv)
    return run_main(lambda: converse(args))


if __name__ == "__main__":
    raise SystemExit(main())
