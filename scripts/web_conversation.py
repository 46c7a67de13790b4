"""The web page's conversations: questions and answers, edits and undo, and the files that hold them."""

import contextlib
import copy
import functools
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

STOPPED, CUT, FAILED, COMPLETE = "cancelled", "length", "error", "stop"  # how an answer can end
MOST_LISTED = 100  # chats of one visitor
SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Answer:
    """One answer of a model. `ending` is "" while it is still being made.

    continues: pretrained weights wrote it; it goes on with the question's text. calls: tool calls, each with "name" and
    "arguments". left_out: earlier turns that the context had no room for.
    """

    model: str = ""
    text: str = ""
    thought: str = ""
    tokens: int = 0
    tokens_per_second: float = 0.0
    ending: str = ""
    error: str = ""
    continues: bool = False
    left_out: int = 0
    calls: list[dict] = field(default_factory=list)

    def pace(self) -> str:
        """Return 128 tokens · 43.2 tokens/s."""
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"] if self.tokens else []
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        return " · ".join(parts)


@dataclass(eq=False)
class Turn:
    """A question with every answer to it; `chosen` is the one that is shown and that later answers see."""

    question: str
    answers: list[Answer] = field(default_factory=lambda: [Answer()])
    chosen: int = 0

    @property
    def answer(self) -> Answer:
        return self.answers[self.chosen]


class Conversation:
    """Questions with their answers. Editing, deleting and clearing can be undone once, until the next question."""

    def __init__(self, path: Path | None = None):
        """path: the file that keeps it, or None."""
        self.path, self.turns = path, []
        self.pending: Turn | None = None  # whose answer begins as soon as a tab that shows it has a model
        self.run = None  # the thread that makes an answer (web_answers.Run), if one does
        self.unread: Path | None = None  # the file that was to be opened, if it could not be read
        self.undo_label = ""  # what can be undone, or ""
        self._before: list[Turn] = []

    @property
    def name(self) -> str:
        return self.path.stem if self.path else ""

    def ask(self, question: str) -> Answer:
        """Add a question; return its empty answer."""
        self.undo_label = ""
        self.turns.append(Turn(question))
        return self._wait(self.turns[-1])

    # the next three raise ValueError if the turn is gone: another tab may have deleted it

    def again(self, turn: Turn) -> Answer:
        """Add another answer to a question. Earlier ones stay, to be chosen again."""
        self.turns.index(turn)
        self.undo_label = ""
        turn.answers.append(Answer())
        turn.chosen = len(turn.answers) - 1
        return self._wait(turn)

    def edit(self, turn: Turn, question: str) -> Answer:
        """Ask another question in place of an earlier one; drop what came after."""
        index = self.turns.index(turn)
        self._remember("edited")
        self.turns[index:] = [Turn(question)]
        return self._wait(self.turns[-1])

    def delete(self, turn: Turn) -> None:
        index = self.turns.index(turn)
        self._remember("deleted")
        del self.turns[index]

    def clear(self) -> None:
        self._remember("cleared")
        self.turns = []

    def undo(self) -> None:
        if self.undo_label:
            self.turns, self.undo_label = self._before, ""

    def stop(self) -> None:
        """End the answer that is being made or about to be; keep the part that is there."""
        if self.pending is not None:
            self.pending.answer.ending, self.pending = STOPPED, None
        if (run := self.run) is not None:  # it may end by itself at any moment
            run.cancel()
            run.join(timeout=2)

    def _wait(self, turn: Turn) -> Answer:
        self.pending = turn
        return turn.answer

    def answered(self) -> None:
        """Save the conversation; the thread that makes an answer calls this at its end."""
        with contextlib.suppress(OSError):  # the page says so at the next question
            self.save()
        self.run = None

    def _remember(self, label: str) -> None:
        self._before, self.undo_label = copy.deepcopy(self.turns), label

    def messages(self, history_turns: int, system: str = "", turn: Turn | None = None) -> list[dict]:
        """Return a turn's question (default: the last) and the turns before it as a model takes them, without thoughts
        and without turns that have no answer."""
        turn = turn or self.turns[-1]
        earlier = [each for each in self.turns[: self.turns.index(turn)] if each.answer.text.strip()]
        first = [{"role": "system", "content": system.strip()}] if system.strip() else []
        told = _messages_of(earlier[max(len(earlier) - history_turns, 0) :])
        return [*first, *told, {"role": "user", "content": turn.question}]

    # --- files

    def to_json(self) -> str:
        """Return one object: "conversations" is a record of the training format, of complete answers alone; "turns" is
        all that the page knows."""
        unfinished = (STOPPED, CUT, FAILED, "")
        complete = [turn for turn in self.turns if turn.answer.text.strip() and turn.answer.ending not in unfinished]
        content = {"conversations": _messages_of(complete), "turns": [asdict(turn) for turn in self.turns]}
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        parts = ["# MiniMind"]
        for turn in self.turns:
            parts.append("**You**\n\n" + _quote(turn.question))
            answer = turn.answer
            if answer.thought:
                parts.append("<details><summary>Reasoning</summary>\n\n" + _quote(answer.thought) + "\n\n</details>")
            parts.append(f"**{answer.model or 'MiniMind'}**\n\n{answer.text or '(no answer)'}")
            parts += ["```json\n" + json.dumps(call, ensure_ascii=False) + "\n```" for call in answer.calls]
            if answer.error:
                parts.append(f"*{answer.error}*")
        return "\n\n".join(parts) + "\n"

    def save(self) -> None:
        """Write the file, or remove it if the conversation is empty. Raises OSError."""
        if self.path is None:
            return
        if not self.turns:
            return self.path.unlink(missing_ok=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        try:
            partial.write_text(self.to_json(), encoding="utf-8", errors="replace")
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)


def _messages_of(turns: list[Turn]) -> list[dict]:
    said = (each for turn in turns for each in (("user", turn.question), ("assistant", turn.answer.text)))
    return [{"role": role, "content": content} for role, content in said]


def _turn(question: str, answers: list[dict], chosen: int, **_) -> Turn:
    """Return a turn from its file, without what another version of the page wrote there."""
    known = [{key: value for key, value in answer.items() if key in Answer.__annotations__} for answer in answers]
    turn = Turn(question, [Answer(**answer) for answer in known], chosen)
    for answer in (turn.answer, *turn.answers):  # the first raises IndexError if `chosen` is wrong
        answer.ending = answer.ending or STOPPED  # the page was closed while it was made
    return turn


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


class Chats:
    """The conversations of all visitors, each in FOLDER/VISITOR/NAME.json. Tabs that open the same one share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: WeakValueDictionary[Path, Conversation] = WeakValueDictionary()

    def open(self, visitor: str, name: str | None = None) -> Conversation:
        """Return a visitor's conversation; a new one without a name, or if the file cannot be read."""
        if name is None or not SAFE_NAME.fullmatch(name):
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        path = self._folder_of(visitor) / f"{name}.json"
        conversation = self._open.get(path)
        if conversation is None:
            conversation = Conversation(path)
            try:
                if os.path.exists(path):
                    conversation.turns = [_turn(**turn) for turn in json.loads(path.read_text("utf-8"))["turns"]]
            except Exception:  # whatever is in the file, it stays as it is
                conversation = self.open(visitor)
                conversation.unread = path
            self._open[conversation.path] = conversation
        return conversation

    def _folder_of(self, visitor: str) -> Path:
        return self.folder / (visitor if SAFE_NAME.fullmatch(visitor) else "local")

    def titles(self, visitor: str) -> dict[str, str]:
        """Return the names of a visitor's conversations with their first questions, newest first."""
        titles = {}
        with contextlib.suppress(OSError):
            for path in sorted(self._folder_of(visitor).glob("*.json"), reverse=True)[:MOST_LISTED]:
                if title := _title(path, path.stat().st_mtime_ns):
                    titles[path.stem] = title
        return titles


@functools.lru_cache(maxsize=10_000)
def _title(path: Path, modified: int) -> str:
    """Return the first question; "" if the file cannot be read. `modified` is there for the cache."""
    try:
        return json.loads(path.read_text("utf-8"))["turns"][0]["question"]
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return ""
