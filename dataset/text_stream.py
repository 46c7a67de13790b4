"""Token ids to text for people, piece by piece: whole characters, stop strings, thoughts apart, tool calls.

Each class takes the output of the one before it and holds back only what a later piece may still turn into something
that is not shown. The result does not depend on where the text was cut into pieces.
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

    stop: strings that end the text and are not shown; after one, `stopped` is true and the rest is dropped.
    split_thoughts: separate what is inside <think> from the answer, see ThoughtSplitter; otherwise tags are text.
    prompt_ids: what the answer follows; some chat templates end it with <think>.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        stop: Sequence[str] = (),
        split_thoughts: bool = False,
        prompt_ids: Sequence[int] = (),
    ):
        self._decoder, self._stop = StreamDecoder(tokenizer), StopStrings(stop)
        self._splitter = None
        if split_thoughts:
            self._splitter = ThoughtSplitter()
            if tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>"):
                self._splitter.push("<think>")

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    def push(self, token_id: int) -> list[Piece]:
        """Return what can be shown after this id: often one piece, [] while a character or a tag is incomplete."""
        return self._split(self._stop.push(self._decoder.push(token_id)))

    def flush(self) -> list[Piece]:
        """Return what was held back, at the end of the answer."""
        pieces = self._split(self._stop.push(self._decoder.flush()) + self._stop.flush())
        return pieces + (self._splitter.flush() if self._splitter else [])

    def _split(self, text: str) -> list[Piece]:
        if self._splitter:
            return self._splitter.push(text)
        return [Piece(False, text)] if text else []


class StopStrings:
    """Passes text on until a stop string is complete; of two that overlap, the one that is complete first counts."""

    def __init__(self, strings: Sequence[str]):
        if any(not string for string in strings):
            raise ValueError("stop: an empty string ends every text before it begins; leave it out")
        self.pending, self.stopped = "", False
        self._matches = [PrefixMatch(string) for string in strings]

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._matches:
            return text
        self.pending += text
        for left, char in zip(range(len(text) - 1, -1, -1), text, strict=True):
            found = [len(match.string) for match in self._matches if match.push(char)]
            if found:
                shown = self.pending[: len(self.pending) - left - max(found)]
                self.stopped, self.pending = True, ""
                return shown
        held = max(match.length for match in self._matches)
        shown, self.pending = self.pending[: len(self.pending) - held], self.pending[len(self.pending) - held :]
        return shown

    def flush(self) -> str:
        text, self.pending = self.pending, ""
        return text


class PrefixMatch:
    """Follows, character by character, how much of the string's beginning the text ends with: `length`.

    This is the algorithm of Knuth, Morris and Pratt: linear in the text, whatever strings a client asks for. The table
    of borders grows only as far as the text has matched.
    """

    def __init__(self, string: str):
        self.string, self.length = string, 0
        self._borders = [0]  # [n - 1]: longest shorter beginning that ends the first n characters

    def push(self, char: str) -> bool:
        """Return True if the string is complete; nothing may be pushed after that."""
        self.length = self._after(self.length, char)
        if self.length > len(self._borders):
            self._borders.append(self._after(self._borders[-1], char))
        return self.length == len(self.string)

    def _after(self, length: int, char: str) -> int:
        while length and self.string[length] != char:
            length = self._borders[length - 1]
        return length + (self.string[length] == char)


def len_of_open_end(text: str, string: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `string`, but not all of it."""
    return next((n for n in range(min(len(string) - 1, len(text)), 0, -1) if text.endswith(string[:n])), 0)


class Spacing:
    """Passes text on, but holds white space back until it is clear what follows: next to a tag it is dropped."""

    def __init__(self):
        self._held: list[str] = []
        self._after_tag = False

    def push(self, text: str) -> str:
        words = text.rstrip()
        space = text[len(words) :]
        if words:
            words = words.lstrip() if self._after_tag else "".join([*self._held, words])
            self._held, self._after_tag = [], False
        if space and not self._after_tag:
            self._held.append(space)
        return words

    def tag(self) -> None:
        """Note that there is a tag here."""
        self._held, self._after_tag = [], True

    def flush(self) -> str:
        space, self._held = "".join(self._held), []
        return space


class ThoughtSplitter:
    """Separates the text of a reasoning model, as it arrives, into thought and answer.

    What is inside <think> is thought, all else answer; the tags and the white space next to them are dropped. A tag may
    arrive in several pieces. Each piece is read once, however much white space is held back. In a tool call of the
    answer, tags are text.
    """

    TAGS = {"<think>": True, "</think>": False, "<answer>": False, "</answer>": False}
    CALLS = {"<tool_call>": True, "</tool_call>": False}
    PATTERN = re.compile("|".join([*TAGS, *CALLS]))

    def __init__(self):
        self.thinking, self.tagged, self._calling = False, False, False
        self._open_tag, self._spacing = "", Spacing()

    def push(self, text: str) -> list[Piece]:
        text, pieces, start = self._open_tag + text, [], 0
        for match in self.PATTERN.finditer(text):
            if match[0] in self.CALLS:
                self._calling = self.CALLS[match[0]] and not self.thinking
            if match[0] in self.CALLS or self._calling:
                continue
            self._show(text[start : match.start()], pieces)
            self._spacing.tag()
            self.thinking, self.tagged, start = self.TAGS[match[0]], True, match.end()
        rest = text[start:]
        # The end may be the beginning of a tag.
        end = len(rest) - max(len_of_open_end(rest, tag) for tag in [*self.TAGS, *self.CALLS])
        self._open_tag = rest[end:]
        self._show(rest[:end], pieces)
        return pieces

    def flush(self) -> list[Piece]:
        pieces = []
        text, self._open_tag = self._open_tag, ""
        self._show(text, pieces)
        space = self._spacing.flush()
        if space and not self.tagged:
            pieces.append(Piece(self.thinking, space))
        return pieces

    def _show(self, text: str, pieces: list[Piece]) -> None:
        if shown := self._spacing.push(text):
            pieces.append(Piece(self.thinking, shown))


class ToolCall(NamedTuple):
    name: str
    arguments: str  # a JSON object as text


class ToolCallSplitter:
    """Takes `<tool_call>{"name": …, "arguments": {…}}</tool_call>` out of the text of an answer, as it arrives.

    A call becomes one ToolCall when its closing tag arrives. Anything else between the tags stays text, tags included;
    white space next to a call is dropped.
    """

    OPEN, CLOSE = ThoughtSplitter.CALLS

    def __init__(self):
        self._call: list[str] | None = None  # what has come since the opening tag
        self._open_tag, self._spacing = "", Spacing()

    def push(self, text: str) -> list[str | ToolCall]:
        text, parts, start = self._open_tag + text, [], 0
        while (end := text.find(tag := self.OPEN if self._call is None else self.CLOSE, start)) >= 0:
            self._take(text[start:end], parts)
            if self._call is None:
                self._call = []
            else:
                self._close(parts)
            start = end + len(tag)
        rest = text[start:]
        end = len(rest) - len_of_open_end(rest, tag)
        self._open_tag = rest[end:]
        self._take(rest[:end], parts)
        return parts

    def flush(self) -> list[str | ToolCall]:
        call = [] if self._call is None else [self.OPEN, *self._call]
        text = self._spacing.push("".join([*call, self._open_tag])) + self._spacing.flush()
        self._call, self._open_tag = None, ""
        return [text] if text else []

    def _take(self, text: str, parts: list[str | ToolCall]) -> None:
        if self._call is not None:
            self._call.append(text)
        elif shown := self._spacing.push(text):
            parts.append(shown)

    def _close(self, parts: list[str | ToolCall]) -> None:
        text, self._call = "".join(self._call), None
        if call := read_tool_call(text):
            self._spacing.tag()
            parts.append(call)
        else:
            self._take(self.OPEN + text + self.CLOSE, parts)


def read_tool_call(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode()  # fails if there is half of a character
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return ToolCall(name, written) if isinstance(arguments, dict) else None
