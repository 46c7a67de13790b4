"""A conversation as the web page keeps it: what was said, what can be done to it, and how it leaves the page."""

import copy
import json
from dataclasses import asdict, dataclass, field

STOPPED, CUT, FAILED, COMPLETE = "cancelled", "length", "error", "stop"  # how an answer can end


@dataclass
class Answer:
    """What a model said, growing while it speaks; `ending` is "" until it is through."""

    model: str = ""
    text: str = ""
    thought: str = ""
    tokens: int = 0
    tokens_per_second: float = 0.0
    ending: str = ""
    error: str = ""
    notes: list[str] = field(default_factory=list)

    def add(self, is_thought: bool, text: str) -> None:
        if is_thought:
            self.thought += text
        else:
            self.text += text

    def pace(self) -> str:
        """128 tokens · 43.2 tokens/s"""
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"] if self.tokens else []
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        return " · ".join(parts)

    def summary(self) -> str:
        """The line under an answer: 128 tokens · 43.2 tokens/s · 26M dense · full_sft · stopped"""
        parts = [part for part in (self.pace(), self.model) if part]
        if self.ending in (STOPPED, CUT):
            parts.append({STOPPED: "stopped", CUT: "cut: the limit of tokens is reached"}[self.ending])
        return " · ".join(parts + self.notes)


@dataclass
class Turn:
    question: str
    answer: Answer


class Conversation:
    """Questions with their answers. What takes something away can be undone once, until the next question."""

    def __init__(self):
        self.turns: list[Turn] = []
        self.undo_label = ""  # what happened, "" where there is nothing to undo
        self._before: list[Turn] = []

    def ask(self, question: str) -> Answer:
        """Adds a question; the answer returned is empty and to be filled."""
        self.undo_label = ""
        return self._append(question)

    def regenerate(self) -> Answer:
        """Asks the last question again."""
        self._remember("Answered again")
        return self._append(self.turns.pop().question)

    def edit(self, index: int, question: str) -> Answer:
        """Asks another question in place of an earlier one; what came after that is cut off."""
        self._remember("Question edited")
        del self.turns[index:]
        return self._append(question)

    def delete(self, index: int) -> None:
        """Takes out one question and its answer."""
        self._remember("Deleted")
        del self.turns[index]

    def clear(self) -> None:
        self._remember("Conversation cleared")
        self.turns = []

    def undo(self) -> None:
        if self.undo_label:
            self.turns, self.undo_label = self._before, ""

    def _append(self, question: str) -> Answer:
        self.turns.append(Turn(question, Answer()))
        return self.turns[-1].answer

    def _remember(self, label: str) -> None:
        self._before, self.undo_label = copy.deepcopy(self.turns), label

    def messages(self, history_turns: int, system: str = "") -> list[dict]:
        """The last question with as many earlier turns as wanted, as a model takes them; thoughts and turns without an
        answer are left out."""
        earlier = [turn for turn in self.turns[:-1] if turn.answer.text.strip()]
        messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
        for turn in earlier[len(earlier) - history_turns :] if history_turns else []:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.text})
        return [*messages, {"role": "user", "content": self.turns[-1].question}]

    def to_json(self) -> str:
        """One object whose "conversations" are a record of the training format; each answer's details stand beside."""
        turns = []
        for turn in self.turns:
            turns.append({"role": "user", "content": turn.question})
            turns.append({"role": "assistant", "content": turn.answer.text})
        details = [{key: value for key, value in asdict(turn.answer).items() if key != "text"} for turn in self.turns]
        return json.dumps({"conversations": turns, "answers": details}, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        parts = ["# MiniMind"]
        for turn in self.turns:
            parts.append("**You**\n\n" + _quote(turn.question))
            answer = turn.answer
            if answer.thought:
                parts.append("<details><summary>Reasoning</summary>\n\n" + _quote(answer.thought) + "\n\n</details>")
            parts.append(f"**{answer.model or 'MiniMind'}**\n\n{answer.text or '(no answer)'}")
            if answer.error:
                parts.append(f"*{answer.error}*")
        return "\n\n".join(parts) + "\n"


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
