"""The shared part of both terminal chats (eval_model.py, chat_openai_api.py): typed and piped lines, commands, display.

Answers go to stdout, everything else to stderr. prompt_toolkit reads typed lines: history, pasting many lines at once,
completion of commands, Chinese input. Pipes and files give one prompt a line.
"""

import argparse
import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from dataset.data_file import guess_encoding
from model.streams import note, stream_encoding

COMMAND = re.compile(r"\s*/([A-Za-z]+)(?:\s+(.*?))?\s*", re.DOTALL)
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
KEYS = """\
Enter sends, Alt-Enter makes a new line. Ctrl-C stops an answer; twice when idle, it leaves.
Enter 发送，Alt-Enter 换行。Ctrl-C 中止回答，空闲时按两次退出。"""


def is_typed() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


class Display:
    """Writes an answer to stdout as it arrives; thoughts to stderr, dim on a terminal."""

    def __init__(self):
        self.started = self.thought_open = False
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")

    def show(self, pieces: Iterable[tuple[bool, str]]) -> None:
        """pieces: (is_thought, text)."""
        for is_thought, text in pieces:
            if (sys.stderr if is_thought else sys.stdout).isatty():
                text = CONTROL_CHARACTERS.sub("", text)  # a model must not command the terminal
            self.started = self.started or bool(text)
            if is_thought and text:
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


# --- lines -----------------------------------------------------------------------------------------------------------


class LineEditor:
    """Reads what a person types. words: what Tab completes."""

    def __init__(self, words: Iterable[str] = ()):
        self.session = None
        with contextlib.suppress(ImportError, io.UnsupportedOperation):  # no prompt_toolkit, or no real terminal
            sys.stdin.fileno()
            if os.environ.get("TERM") not in ("dumb", "unknown"):
                self.session = self._session(list(words))

    @staticmethod
    def _session(words: list[str]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        return PromptSession(
            key_bindings=keys,
            completer=WordCompleter(words, sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            # stdout may be a file
            output=create_output(stdout=sys.stdout if sys.stdout.isatty() else sys.stderr),
        )

    def read(self, label: str) -> str:
        """Return what was typed. Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
        if self.session is not None:
            return self.session.prompt(label)
        note(label, end="")
        return input()

    def prompts(self, label: str) -> Iterator[str]:
        """Yield what is typed, except empty lines, until Ctrl-D or two Ctrl-C."""
        warned = False
        while True:
            try:
                text = self.read(label)
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                if warned:
                    return
                warned = True
                note("Ctrl-C again, Ctrl-D or /exit leaves. 再按一次 Ctrl-C、按 Ctrl-D 或输入 /exit 退出。")
                continue
            warned = False
            if text.strip():
                yield text


def piped_prompts() -> Iterator[str]:
    """Yield the lines of stdin that are not blank. Raises ValueError if they are in another encoding."""
    if sys.stdin is None:
        return
    encoding = stream_encoding()
    lines = sys.stdin
    if hasattr(sys.stdin, "buffer"):
        strict = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        lines = io.TextIOWrapper(sys.stdin.buffer, strict, errors="strict")
    try:
        for line in lines:
            if line.strip():
                yield line.rstrip("\r\n").removeprefix("\ufeff")
    except UnicodeError as error:
        guess = guess_encoding(getattr(error, "object", b""), fewest_wrong=1)
        looks = f"but looks like {guess}" if guess else f"({error})"
        cure = f"set PYTHONIOENCODING={guess or 'to its encoding'}, or convert it to UTF-8"
        raise ValueError(f"stdin is not {encoding} {looks}; {cure}") from error


# --- the chat --------------------------------------------------------------------------------------------------------


class TerminalChat:
    """History and commands. A chat adds `answer` and, for /model and /lora, `switch_model` and `switch_lora`.

    args: flags; `settings` names those that /set may change, with their types.
    """

    settings: dict[str, Callable[[str], object]] = {}
    errors: tuple[type[Exception], ...] = (ValueError,)  # what ends a command or an answer, not the chat

    def __init__(self, args: argparse.Namespace):
        self.args, self.history = args, []
        self.system: str | None = getattr(args, "system", None)
        self.commands = {
            "help": ("", "this", lambda _: note(self.help())),
            "reset": ("", "forget what was said", self.reset),
            "system": ("[TEXT]", "start again with this system message, or the default one", self.set_system),
            "model": ("[NAME]", "continue with another model, or list them", self.switch_model),
            "lora": ("NAME|none", "continue with another adapter, or without one", self.switch_lora),
            "set": ("NAME VALUE", f"change a setting: {', '.join(self.settings)}", self.set),
            "exit": ("", "leave", None),
        }

    def answer(self, prompt: str) -> bool:
        """Write the answer to stdout while it is made and remember it; False if Ctrl-C ended it."""
        raise NotImplementedError

    def switch_model(self, name: str) -> None:
        raise NotImplementedError

    def switch_lora(self, name: str) -> None:
        raise NotImplementedError

    def check_settings(self) -> None:
        """Raise ValueError if /set has made the settings wrong."""

    def explain(self, error: Exception) -> str:
        return str(error)

    def messages(self, prompt: str) -> list[dict]:
        """Return the question with the system message and as much of the history as --history_cnt keeps."""
        kept = self.history[-self.args.history_cnt :] if self.args.history_cnt else []
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *kept, {"role": "user", "content": prompt}]

    def remember(self, prompt: str, answer: str) -> None:
        self.history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def help(self) -> str:
        usages = [(f"/{name} {usage}", about) for name, (usage, about, _) in self.commands.items()]
        return "\n".join(f"{usage:19} {about}" for usage, about in usages) + "\n" + KEYS

    def words(self) -> list[str]:
        return [f"/{name}" for name in self.commands] + [f"/set {name}" for name in self.settings]

    def reset(self, _: str = "") -> None:
        self.history = []
        note("[what was said is forgotten]")

    def set_system(self, text: str) -> None:
        self.system, self.history = text or None, []
        note(f"[starting again, with {'this' if text else 'the default'} system message]")

    def set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in self.settings:
            raise ValueError(f"/set NAME VALUE; the names are {', '.join(self.settings)}")
        before = getattr(self.args, name)
        if value:
            try:
                setattr(self.args, name, self.settings[name](value))
                self.check_settings()
            except (ValueError, argparse.ArgumentTypeError) as error:
                setattr(self.args, name, before)
                raise ValueError(f"/set {text}: {error}") from error
        note(f"[{name} is {getattr(self.args, name)}]")

    def run(self, lines: Iterable[str], typed: bool) -> int:
        """Answer lines and obey commands until /exit or the end; return the exit status.

        On a terminal an error or Ctrl-C ends an answer, not the chat.
        """
        status = 0
        for line in lines:
            command = COMMAND.fullmatch(line)
            name = command[1].lower() if command else ""
            if name == "exit":
                break
            try:
                if command and (typed or name in self.commands):  # in a pipe a prompt may begin with a slash
                    self.obey(name, command[2] or "")
                    continue
                if typed:
                    note("🤖: ", end="")
                if not self.answer(line) and not typed:
                    return 130
            except self.errors as error:
                tell_error(self.explain(error))
                status = 0 if typed else 1
            except KeyboardInterrupt:
                if not typed:
                    raise
                note("[stopped]")
            if typed:
                note("")
        return status

    def obey(self, name: str, text: str) -> None:
        if name not in self.commands:
            raise ValueError(f"there is no /{name}; /help lists the commands")
        self.commands[name][2](text)


def run_main(chat: Callable[[], int]) -> int:
    """Run a chat; return its exit status, whatever ends it."""
    try:
        return chat()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        tell_error(str(error))
        return 1


def tell_error(text: str) -> None:
    note(f"error: {CONTROL_CHARACTERS.sub('', text)}")  # a server must not command the terminal
