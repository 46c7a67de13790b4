"""Token ids to text for people, a piece at a time: whole characters, no stop strings, thoughts apart, tool calls read.

Each class takes what the one before it gives, and holds back only what a later piece may still turn into something
that is not to be shown. The pieces do not depend on where the text was cut on its way.
"""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from dataset.tokenization import ChatTokenizer, StreamDecoder


class Piece(NamedTuple):
    is_thought: bool
    text: str


class TextStream:
    """The text of one answer, from its ids.

    stop: strings that end the text and are not shown; `stopped` tells that one came, and what follows is dropped.
    split_thoughts: parts what stands in <think> from the answer, see ThoughtSplitter; else tags are text.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), split_thoughts: bool = False):
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(stop)
        self._splitter = ThoughtSplitter() if split_thoughts else None

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    def push(self, token_id: int) -> list[Piece]:
        """What can be shown after this id: often one piece, [] while a character or a tag is open."""
        return self._split(self._stop.push(self._decoder.push(token_id)))

    def flush(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        pieces = self._split(self._stop.push(self._decoder.flush()) + self._stop.flush())
        return pieces + (self._splitter.flush() if self._splitter else [])

    def _split(self, text: str) -> list[Piece]:
        if self._splitter:
            return self._splitter.push(text)
        return [Piece(False, text)] if text else []


class StopStrings:
    """Passes text on until one of the strings is complete; where two overlap, the one that is complete first counts."""

    def __init__(self, strings: Sequence[str]):
        if any(not string for string in strings):
            raise ValueError("stop: an empty string ends every text before it begins; leave it out")
        self.strings, self.pending, self.stopped = tuple(strings), "", False

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self.strings:
            return text
        self.pending += text
        found = [(start + len(s), start) for s in self.strings if (start := self.pending.find(s)) >= 0]
        if found:
            self.stopped, shown = True, self.pending[: min(found)[1]]
            self.pending = ""
            return shown
        held = max(len_of_open_end(self.pending, string) for string in self.strings)
        shown, self.pending = self.pending[: len(self.pending) - held], self.pending[len(self.pending) - held :]
        return shown

    def flush(self) -> str:
        text, self.pending = self.pending, ""
        return text


def len_of_open_end(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with, all of `string` excepted."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)


class ThoughtSplitter:
    """Parts the text of a reasoning model, as it arrives, into thought and answer.

    What stands in <think> is thought, all else answer; the tags and the white space beside them are dropped. A tag may
    arrive in several pieces.
    """

    TAGS = {"<think>": True, "</think>": False, "<answer>": False, "</answer>": False}
    PATTERN = re.compile(r"\s*(</?(?:think|answer)>)\s*")

    def __init__(self):
        # fresh: nothing but white space since the last tag
        self.thinking, self.pending, self.fresh, self.tagged = False, "", False, False

    def push(self, text: str) -> list[Piece]:
        self.pending += text
        pieces = []
        while match := self.PATTERN.search(self.pending):
            self._take(match.start(), pieces)
            self.pending = self.pending[match.end() - match.start() :]
            self.thinking, self.fresh, self.tagged = self.TAGS[match[1]], True, True
        # the end may be the beginning of a tag, and white space may stand before one
        held = max(len_of_open_end(self.pending, tag) for tag in self.TAGS)
        self._take(len(self.pending[: len(self.pending) - held].rstrip()), pieces)
        return pieces

    def flush(self) -> list[Piece]:
        pieces = []
        self._take(len(self.pending.rstrip() if self.tagged else self.pending), pieces)
        return pieces

    def _take(self, length: int, pieces: list[Piece]) -> None:
        text, self.pending = self.pending[:length], self.pending[length:]
        text = text.lstrip() if self.fresh else text
        if text:
            self.fresh = False
            pieces.append(Piece(self.thinking, text))


class ToolCall(NamedTuple):
    name: str
    arguments: str  # a JSON object as text


class ToolCallSplitter:
    """Takes `<tool_call>{"name": …, "arguments": {…}}</tool_call>` out of the text of an answer, as it arrives.

    A call is given as one ToolCall when its closing tag is there. What stands between the tags and is no call stays
    text, tags and all; white space beside a call is dropped.
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self):
        self.pending, self.after_call = "", False

    def push(self, text: str) -> list[str | ToolCall]:
        self.pending += text
        parts = []
        while (start := self.pending.find(self.OPEN)) >= 0:
            end = self.pending.find(self.CLOSE, start)
            if end < 0:
                self._show(len(self.pending[:start].rstrip()), parts)
                return parts
            call = read_tool_call(self.pending[start + len(self.OPEN) : end])
            if call is None:
                self._show(end + len(self.CLOSE), parts)
                continue
            self._show(len(self.pending[:start].rstrip()), parts)
            parts.append(call)
            self.pending, self.after_call = self.pending.lstrip()[end + len(self.CLOSE) - start :], True
        held = len_of_open_end(self.pending, self.OPEN)
        self._show(len(self.pending[: len(self.pending) - held].rstrip()), parts)
        return parts

    def flush(self) -> list[str | ToolCall]:
        parts = []
        self._show(len(self.pending), parts)
        return parts

    def _show(self, length: int, parts: list[str | ToolCall]) -> None:
        text, self.pending = self.pending[:length], self.pending[length:]
        text = text.lstrip() if self.after_call else text
        if text:
            self.after_call = False
            parts.append(text)


def read_tool_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
