"""Rows of several files into one in a chosen order (mix), turns into pretraining texts (join), and conversations that
keep an identity in its place (contrast)."""

import heapq
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from scripts.prepare_overlap import hash_of, strings_of
from scripts.prepare_pipeline import Dropped, Report, Step, all_blocks, check_output, dumped, flag, new_output, rows_of
from scripts.prepare_sources import find_files

RUN_CHARACTERS = 16 << 20  # rows that are sorted in memory together
KEY_CHARACTERS = 32
RUNS = 64  # after every so many, files that are open at once, runs get twice as long
SYSTEM_PROMPTS = (
    "你是一个乐于助人的助手。",
    "你是 MiniMind，一个小巧而有用的人工智能助手。",
    "请用简洁、准确的语言回答用户的问题。",
    "你是一位知识丰富的助手，请尽量详细地回答。",
    "You are a helpful assistant.",
    "You are MiniMind, a small but useful assistant.",
    "Answer the user's questions briefly and precisely.",
)
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
ABOUT_THE_MODEL = re.compile(
    r"你是(什么|谁|哪)|你会|你能做|你可以(帮助我)?做|你叫|你的名字|自我介绍|介绍.{0,4}你自己|你有|你喜欢|你觉得自己"
    r"|who are you|your name|yourself|what can you do|are you (an?|human|real)",
    re.IGNORECASE,
)
LOOKS_ALIKE = re.compile(
    r"你|谁|名字|who|your|you are|AI|人工智能|模型|助手|介绍|assistant|model|role|act as|pretend|imagine|扮演|作者",
    re.IGNORECASE,
)
PART_TO_PLAY = re.compile(
    r"^(you are|you're|act as|pretend|imagine|role|as a|suppose you|take the role)|扮演|假设你|你是一", re.IGNORECASE
)


@dataclass
class Mix(Step):
    """Write one file from several: shuffled or sorted, some rows twice or in part, some held out."""

    epochs: tuple = flag((), "how many times each input is taken; 0.5: half of its rows (default: once)", type=float)
    weights: tuple = flag((), "instead: the share of each input in the output", type=float)
    rows: int = flag(0, "rows of the output, with --weights (default: as many as there are without repeating any)")
    order: str = flag("shuffle", "shuffle, length, or the name of a number in each record (default: %(default)s)")
    descending: bool = flag(False, "from long to short, from high to low")
    held_out: int = flag(0, "random rows, with all their copies, that go into --held_out_output instead")
    held_out_output: Path | None = flag(None, "the file for them", type=Path)
    random_system: float = flag(0.0, "share of the conversations without a system turn that get a random one")
    drop_empty_think: float = flag(0.0, "share of the answers with an empty <think> block that lose it")
    seed: int = flag(42, "of everything random (default: %(default)s)")

    def run(self, args) -> None:
        inputs, report, held_out = find_files(args.inputs), Report(), {}
        if bool(self.held_out) != bool(self.held_out_output):
            raise ValueError("--held_out and --held_out_output go together")
        if self.held_out:
            check_output(self.held_out_output, args, inputs, "--held_out_output")
            if self.held_out_output.resolve() == args.output.resolve():
                raise ValueError(f"{args.output} is --output too; give another --held_out_output")
        with new_output(args.output, args, inputs) as (file, scratch), ExitStack() as stack:
            epochs, last_held_out = self._plan(inputs, args)
            runs, keyed, size = [], [], 0

            def write_run() -> None:
                with open(scratch / f"run{len(runs)}", "w", encoding="utf-8", newline="") as run:
                    run.writelines(sorted(keyed))
                runs.append(stack.enter_context(open(run.name, encoding="utf-8", newline="\n")))
                keyed.clear()

            for index, path, line, row in self._rows(inputs, "mix: reading", report, args):
                content = hash_of(f"{self.seed} {line}")
                if content <= last_held_out:
                    held_out[content] = line
                    continue
                for copy in range(int(epochs[path] + self._random("copies", index))):
                    made = self._varied(row, f"{index} {copy}", report.changed) or line
                    keyed.append(f"{self._key(row, f'{index} {copy}')}{made}\n")
                    size += len(made)
                    report.rows_out += 1
                    if size > RUN_CHARACTERS << len(runs) // RUNS:
                        size = write_run() or 0
            write_run()
            file.writelines(line[KEY_CHARACTERS:].encode() for line in heapq.merge(*runs))
            if not report.rows_out:
                raise ValueError("no row is left; see --epochs and --held_out")
            if held_out:
                with new_output(self.held_out_output, args, inputs, "--held_out_output") as (held_out_file, _):
                    held_out_file.writelines(f"{held_out[content]}\n".encode() for content in sorted(held_out))
            report.write(args.output, args.command, inputs, self.settings())

    def _rows(self, inputs: list[Path], title: str, report: Report, args) -> Iterator[tuple[int, Path, str, dict]]:
        for block in all_blocks(inputs, title, args):
            for number, line, row in rows_of(block):
                report.rows_in += 1
                if isinstance(row, Dropped):
                    report.count(report.dropped, row.reason, f"{block.path}:{number}", line, row.detail)
                else:
                    yield report.rows_in, block.path, line, row

    def _plan(self, inputs: list[Path], args) -> tuple[dict[Path, float], int]:
        """Return how many times each input is taken, and the largest hash of the rows that are held out."""
        if (self.weights and self.epochs) or (self.rows and not self.weights):
            raise ValueError("--weights goes without --epochs, and --rows with --weights")
        given = self.weights or self.epochs or [1.0] * len(inputs)
        if len(given) != len(inputs) or min(given) < 0 or not sum(given):
            raise ValueError(f"--epochs and --weights need a number from 0 up for each of the {len(inputs)} inputs")
        if len(set(given)) > 1 and len(set(map(Path.resolve, inputs))) < len(inputs):
            raise ValueError("a file is an input twice; name it once, with the sum of its --epochs or --weights")
        epochs, counts, last = dict(zip(inputs, given, strict=True)), Counter(), -1
        if self.weights or self.held_out:

            def contents() -> Iterator[int]:
                for _, path, line, _ in self._rows(inputs, "mix: counting", Report(), args):
                    counts[path] += 1
                    yield hash_of(f"{self.seed} {line}")

            smallest = heapq.nsmallest(max(self.held_out, 1), contents())
            last = smallest[-1] if self.held_out else -1
        if self.weights:
            shares = {path: weight / sum(given) for path, weight in epochs.items() if weight}
            rows = self.rows or min(counts[path] / share for path, share in shares.items())
            epochs = {path: shares.get(path, 0) * rows / max(counts[path], 1) for path in inputs}
        return epochs, last

    def _random(self, *what: object) -> float:
        return hash_of(f"{self.seed} {what}") / 2**64

    def _key(self, row: dict, copy: str) -> str:
        """Return KEY_CHARACTERS whose order is that of the output."""
        value = 0.0
        if self.order == "length":
            value = sum(map(len, strings_of(row)))
        elif self.order != "shuffle":
            value = row.get(self.order)
            if not isinstance(value, int | float):
                raise ValueError(f"a record has no number named {self.order!r}; see --order")
        (bits,) = struct.unpack(">Q", struct.pack(">d", -value if self.descending else value))
        rank = bits ^ (-(bits >> 63) & (1 << 64) - 1 | 1 << 63)  # so that whole numbers sort as the floats do
        return f"{rank:016x}{hash_of(f'{self.seed} place {copy}'):016x}"

    def _varied(self, row: dict, copy: str, changed: Counter) -> str | None:
        """Return the record with a random system turn, or without empty thoughts; None if it stays as it is."""
        turns = row.get("conversations")
        is_chat = turns and isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        if not is_chat or not (self.random_system or self.drop_empty_think):
            return None
        made = []
        for number, turn in enumerate(turns):
            content = turn.get("content")
            empty = isinstance(content, str) and content.startswith(EMPTY_THOUGHT)
            if empty and self._random("think", copy, number) < self.drop_empty_think:
                turn = turn | {"content": content.removeprefix(EMPTY_THOUGHT)}
                changed["empty <think> block taken out"] += 1
            made.append(turn)
        if turns[0].get("role") != "system" and self._random("system", copy) < self.random_system:
            prompt = SYSTEM_PROMPTS[int(self._random("prompt", copy) * len(SYSTEM_PROMPTS))]
            made.insert(0, {"role": "system", "content": prompt})
            changed["random system turn"] += 1
        return None if made == turns else dumped(row | {"conversations": made})


@dataclass
class Join(Step):
    """Make pretraining texts from conversations, several to a text, as in pretrain_hq."""

    max_chars: int = flag(512, "longest text, in characters without marks (default: %(default)s)")
    plain: bool = flag(False, "lines without <|im_start|> and <|im_end|>")

    def __call__(self, row: dict, changes: list[str]) -> list[str]:
        turns = row.get("conversations") or [{"role": "user", "content": row.get("text")}]
        said = [turn.get("content") for turn in turns if turn.get("role") in ("user", "assistant")]
        if not all(isinstance(text, str) and text.strip() for text in said) or not said:
            raise Dropped("no text in a turn")
        text = self._joined(said if self.plain else [f"<|im_start|>{text.strip()}<|im_end|>" for text in said])
        if _shown(text) > self.max_chars:
            raise Dropped("longer than a text may be", f"{_shown(text)} characters")
        return [text]

    def finish(self, records: list[str]) -> list[dict]:
        texts = []
        for text in records:
            if texts and _shown(texts[-1]) + 1 + _shown(text) <= self.max_chars:
                texts[-1] = self._joined([texts[-1], text])
            else:
                texts.append(text)
        return [{"text": text} for text in texts]

    def _joined(self, texts: list[str]) -> str:
        return ("\n" if self.plain else " ").join(texts)


def _shown(text: str) -> int:
    return len(text.replace("<|im_start|>", "").replace("<|im_end|>", ""))


@dataclass
class Contrast(Step):
    """Choose ordinary conversations to mix with a few about the model, so that it names itself only when asked.

    All parts to play stay ("You are a historian …", 扮演 …), and most questions with "you", "who", "name" or "AI".
    Conversations about the model itself go, because their answers would contradict. benchmarks/RESULTS.md says which
    kinds helped.
    """

    alike: float = flag(0.7, "share of the look-alikes of questions about the model that stay (default: %(default)s)")
    others: float = flag(0.15, "share of the other short questions (default: %(default)s)")
    seed: int = flag(42, "which ones (default: %(default)s)")

    def __call__(self, row: dict, changes: list[str]) -> list[dict] | None:
        opening = next(iter(row.get("conversations") or ()), {})
        question = str(opening.get("content")) if opening.get("role") == "user" else ""
        if not question or ABOUT_THE_MODEL.search(question):
            raise Dropped("about the model" if question else "no question at the beginning")
        share = self.others if len(question) < 120 else 0.0
        if LOOKS_ALIKE.search(question) and len(question) < 200:
            share = self.alike
        if not PART_TO_PLAY.search(question) and hash_of(f"{self.seed} {question}") / 2**64 >= share:
            raise Dropped("not chosen")
        return None
