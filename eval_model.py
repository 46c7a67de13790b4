"""Chat with the weights of any stage, or let pretrained weights continue a text.

    python eval_model.py                          full_sft weights: out/full_sft_512.pth
    python eval_model.py --model_mode 0           0 pretrain, 1 full_sft, 2 rlhf (DPO), 3 reason, 4 full_dist
    python eval_model.py --lora_name lora_medical an adapter on top: out/lora/lora_medical_512.pth
    python eval_model.py --load 1                 a folder in Hugging Face format: MiniMind2/, or --hf_path FOLDER
    python eval_model.py --prompt "你好"          answers once; only the answer goes to stdout
    python eval_model.py < prompts.txt            one prompt a line

Answers go to stdout, everything else to stderr. An empty line ends the conversation, Ctrl-C an answer.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dataset.text_stream import ThoughtSplitter
from dataset.tokenization import ChatTokenizer, StreamDecoder
from model.batching import Engine
from model.generation import SamplingParams, stream
from model.loading import (
    READY_FLAGS,
    ReadyModel,
    add_flags,
    check_sizes,
    experts_in,
    given_sizes,
    load_ready,
    named_path,
    ready_flags,
    show_defaults,
)
from model.model_lora import find_lora, load_lora, lora_layers, remove_lora

ROOT = Path(__file__).resolve().parent
PRETRAIN, REASON = 0, 3
LORA_COMMAND = re.compile(r"\s*/lora(?:\s+(\S.*?))?\s*")

TEST_PROMPTS = [
    "你好，你是谁？",
    "用两三句话说明什么是光合作用。",
    "小明有5个苹果，吃了2个，又买了4个，现在有几个？",
    "推荐三种适合初学者的运动，并说明理由。",
    "写一首关于秋天的短诗。",
    "Who are you, and what can you do?",
    "Why is the sky blue?",
    "Give me three tips for learning a new language.",
]
TEST_BEGINNINGS = [
    "世界上最高的山峰是",
    "万有引力是指",
    "人工智能的发展",
    "学习一门新语言的时候，",
    "The capital of France is",
    "Once upon a time, there was a little girl who",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with MiniMind, or let pretrained weights continue a text.")
    add_flags(parser, "model_mode", "load", "out_dir", "hf_path", "lora_name", "hidden_size", "num_hidden_layers")
    add_flags(parser, "use_moe", *READY_FLAGS, "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    add = parser.add_argument
    add("--history_cnt", type=int, default=0, help="earlier messages kept, an even number; 0: each prompt alone")
    add("--seed", type=int, help="of every answer (default: another one each time)")
    add("--prompt", help="answer this and exit")
    show_defaults(parser)
    args = parser.parse_args(argv)
    if args.history_cnt < 0 or args.history_cnt % 2:
        parser.error(f"--history_cnt is {args.history_cnt}, and must be even: questions with their answers")
    try:
        sampling_params(args, stop_ids=())
    except ValueError as error:
        parser.error(str(error))
    return args


def sampling_params(args: argparse.Namespace, stop_ids: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_new_tokens,
        stop_ids=stop_ids,
        seed=random.SystemRandom().randrange(2**31) if args.seed is None else args.seed,
    )


def note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def noted_warnings() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        note(f"warning: {warning.message}")


# --- weights ---------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> ReadyModel:
    """Load the model and check it against the flags."""
    path = named_path(args)
    ready = load_ready(path, ChatTokenizer, **ready_flags(args))
    check_sizes(ready.model.config, path, *given_sizes(args))
    return ready


def switch_lora(model: torch.nn.Module, tokenizer: ChatTokenizer, args: argparse.Namespace, lora_name: str) -> str:
    """Puts an adapter on the model in place of the one that is there, or takes that off for "None"; the base weights
    stay where they are. Returns the adapter's file, or "". After a WeightsError the model is as it was."""
    if lora_name.lower() == "none":
        remove_lora(model)
        return ""
    path = find_lora(lora_name, args.out_dir, model.config.hidden_size, experts_in(model.config) > 0)
    load_lora(model, path, tokenizer.sha256)
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


# --- conversation ----------------------------------------------------------------------------------------------------


class Conversation:
    """What was said, the engine that holds what it read of it, and how an answer is written out."""

    def __init__(self, ready: ReadyModel, args: argparse.Namespace):
        self.model, self.tokenizer, self.args = ready.model, ready.tokenizer, args
        self.context_length = ready.context_length
        self.history: list[dict] = []
        self.engine = Engine(self.model, slots=1, context_length=self.context_length)

    def encode(self, prompt: str) -> list[int]:
        """Ids that the model continues; the oldest turns are dropped where they leave an answer too little room."""
        if self.args.model_mode == PRETRAIN:
            ids = self.tokenizer.encode_documents([prompt])[0]
            return ids if ids[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *ids]
        kept = self.history[len(self.history) - self.args.history_cnt :] if self.args.history_cnt else []
        question = {"role": "user", "content": prompt}
        longest = self.context_length - min(self.args.max_new_tokens, self.context_length // 4)
        dropped = 0
        while len(ids := self.tokenizer.encode_prompt([*kept, question])) > longest and kept:
            kept, dropped = kept[2:], dropped + 2
        if dropped:
            note(f"the conversation exceeds --max_seq_len {self.context_length}: left out {dropped} old messages")
        return ids

    def switch_lora(self, lora_name: str | None) -> None:
        """Goes on with another adapter, or with none. What was said stays; the engine reads it again."""
        if lora_name is None:
            raise ValueError("which adapter? /lora NAME, or /lora none")
        with noted_warnings():
            name = switch_lora(self.model, self.tokenizer, self.args, lora_name)
        note(f"now with {name}" if name else "now without an adapter")

    def answer(self, prompt: str) -> bool:
        """Writes the answer to stdout while it is made and keeps it; False when Ctrl-C ended it."""
        args, tokenizer = self.args, self.tokenizer
        ids = self.encode(prompt)
        params = sampling_params(args, (tokenizer.eos_id, tokenizer.pad_id))
        decoder, splitter = StreamDecoder(tokenizer), ThoughtSplitter() if args.model_mode == REASON else None
        display = Display()
        answer_ids, text, interrupted = [], "", False
        started = time.perf_counter()
        try:
            for token_id in stream(self.model, ids, params, engine=self.engine):
                answer_ids.append(token_id)
                piece = decoder.push(token_id)
                text += piece
                display.show(splitter.push(piece) if splitter else [(False, piece)])
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
        rest = decoder.flush()
        text += rest
        display.show(splitter.push(rest) + splitter.flush() if splitter else [(False, rest)])
        display.end()

        ending = ""
        if interrupted:
            ending = ", stopped"
        elif answer_ids[-1] not in params.stop_ids:
            full = len(answer_ids) < params.max_new_tokens
            ending = ", cut: --max_seq_len is reached" if full else ", cut: --max_new_tokens is reached"
        seed = f", seed {params.seed}" if params.temperature > 0 else ""
        count = len(answer_ids)
        note(f"[{count} tokens, {count / seconds:.1f} tokens/s{seed}{ending}]")
        self.history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        return not interrupted


class Display:
    """Answers to stdout; thoughts to stderr, dim on a terminal."""

    def __init__(self):
        self.thought_open = False
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")

    def show(self, pieces: list[tuple[bool, str]]) -> None:
        for is_thought, text in pieces:
            if is_thought:
                note(f"{self.dim}{text}{self.plain}", end="")
                self.thought_open = True
            elif text:
                self._close_thought()
                print(text, end="", flush=True)

    def _close_thought(self) -> None:
        if self.thought_open:
            note("\n")
            self.thought_open = False

    def end(self) -> None:
        self._close_thought()
        print(flush=True)


def read_lines(label: str) -> Iterator[str]:
    """Lines that a person types or a file holds, until an empty one, the end, or Ctrl-C at the prompt."""
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # Windows edits lines by itself
            import readline  # arrow keys, and a backspace that takes a whole Chinese character

            for setting in ("input-meta on", "output-meta on", "convert-meta off"):  # off in locales without UTF-8
                readline.parse_and_bind(f"set {setting}")
            readline.parse_and_bind("tab: self-insert")
    while True:
        try:
            if typed and sys.stdout.isatty():
                line = input(label)  # with the label, so that line editing does not wipe it out
            else:
                if typed:
                    note(label, end="")
                line = input()
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        if not line.strip():
            return
        yield line


def converse(args: argparse.Namespace, conversation: Conversation) -> int:
    """Answers --prompt, or the lines of stdin, or what the menu asks for; returns the exit status."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    if args.prompt is not None:
        return 0 if conversation.answer(args.prompt) else 130
    if not typed:
        for prompt in read_lines("") if sys.stdin is not None else ():
            if not conversation.answer(prompt):
                return 130
        return 0

    note("[0] automatic test 自动测试\n[1] type your own 手动输入")
    choice = next(read_lines("> "), "").strip()
    if not choice:
        return 0
    automatic = choice == "0"
    prompts = TEST_BEGINNINGS if args.model_mode == PRETRAIN else TEST_PROMPTS
    if not automatic:
        note("An empty line ends the conversation, Ctrl-C an answer. 空行结束对话，Ctrl-C 中止回答。")
        note("/lora NAME puts on an adapter, /lora none takes it off. /lora 名称 切换 LoRA，/lora none 取消。")
    # whoever types a question at the menu wants it answered
    first = [] if choice in ("0", "1") else [choice]
    for prompt in prompts if automatic else itertools.chain(first, read_lines("👶: ")):
        command = LORA_COMMAND.fullmatch(prompt)
        try:
            if command and not automatic:
                conversation.switch_lora(command[1])
                continue
            note(f"👶: {prompt}\n🤖: " if automatic else "🤖: ", end="")
            conversation.answer(prompt)
        except ValueError as error:  # a prompt that is too long is no reason to lose the conversation
            note(str(error))
        note("")
    return 0


def main(argv: list[str] | None = None) -> int:
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):  # consoles of other encodings and broken bytes must not end a conversation
            file.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args(argv)
    try:
        with noted_warnings():
            ready = load(args)
            lora = switch_lora(ready.model, ready.tokenizer, args, args.lora_name)
        note(describe(ready.model, f"{ready.path} with {lora}" if lora else str(ready.path)))
        return converse(args, Conversation(ready, args))
    except ValueError as error:
        note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
