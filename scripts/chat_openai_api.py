"""Chat in a terminal with any OpenAI-compatible server, by default the one of serve_openai_api.py on this machine.

    python scripts/serve_openai_api.py                  in one terminal
    python scripts/chat_openai_api.py                   in another
    python scripts/chat_openai_api.py < prompts.txt     one message a line

Answers go to stdout, thoughts and everything else to stderr. An empty line ends the conversation, Ctrl-C an answer;
/help lists the commands.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openai

from scripts.openai_client import new_client

HELP = """\
/reset          forget what was said
/system TEXT    begin anew with this system message; without TEXT: with none
/model NAME     go on with another model; without NAME: list them
/help           this
An empty line ends the conversation, Ctrl-C an answer."""
COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Chat with an OpenAI-compatible server.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--base_url", default="http://127.0.0.1:8998/v1", help="of the server")
    add("--model", default=None, help="default: the first one that the server offers")
    add("--api_key", default=os.environ.get("MINIMIND_API_KEY") or "none", help="or MINIMIND_API_KEY")
    add("--temperature", type=float, default=None, help="default: the server's")
    add("--top_p", type=float, default=None, help="default: the server's")
    add("--max_tokens", type=int, default=None, help="longest answer; default: the server's")
    add("--system", default=None, help="system message")
    add("--history_cnt", type=int, default=20, help="earlier messages sent along, an even number; 0: each alone")
    args = parser.parse_args(argv)
    if args.history_cnt < 0 or args.history_cnt % 2:
        parser.error(f"--history_cnt is {args.history_cnt}, and must be even: questions with their answers")
    return args


def note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


class Chat:
    """What was said, and how an answer is asked for and written out."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.system, self.history = args, args.system, []
        self.client = new_client(openai.OpenAI, args.base_url, api_key=args.api_key)
        self.model = args.model or self.models()[0]

    def models(self) -> list[str]:
        names = [model.id for model in self.client.models.list()]
        if not names:
            raise ValueError(f"{self.args.base_url} offers no model")
        return names

    def answer(self, prompt: str) -> bool:
        """Writes the answer to stdout while it comes and keeps it; False when Ctrl-C ended it."""
        question, text, thought, interrupted = {"role": "user", "content": prompt}, "", "", False
        dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        finish_reason = None
        try:
            with self._ask(question) as chunks:
                for chunk in chunks:
                    for choice in chunk.choices:
                        finish_reason = choice.finish_reason or finish_reason
                        if piece := getattr(choice.delta, "reasoning_content", None):
                            thought += piece
                            note(f"{dim}{piece}{plain}", end="")
                        if piece := choice.delta.content:
                            if thought and not text:
                                note("\n")
                            text += piece
                            print(piece, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if text or thought:
                print(flush=True)
        if interrupted or finish_reason == "length":
            note("[stopped]" if interrupted else "[cut: the length is reached]")
        if text or finish_reason:
            self.history += [question, {"role": "assistant", "content": text}]
        return not interrupted

    def _ask(self, question: dict) -> openai.Stream:
        """Asks with as much of the history as the flag allows and the context holds."""
        args, system = self.args, [{"role": "system", "content": self.system}] if self.system else []
        kept = self.history[-args.history_cnt :] if args.history_cnt else []
        options = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
        options = {name: value for name, value in options.items() if value is not None}
        while True:
            try:
                return self.client.chat.completions.create(
                    model=self.model, messages=[*system, *kept, question], stream=True, **options
                )
            except openai.BadRequestError as error:
                if error.code != "context_length_exceeded" or not kept:
                    raise
                note("[the conversation is longer than the context: left out its oldest messages]")
                kept = kept[2:]

    def command(self, name: str, text: str) -> None:
        if name == "reset":
            self.history = []
            note("[what was said is forgotten]")
        elif name == "system":
            self.system, self.history = text or None, []
            note(f"[begun anew, {'with this' if text else 'without a'} system message]")
        elif name == "model" and text:
            names = self.models()
            if text in names:
                self.model = text
            note(f"[now with {text}]" if text in names else f"there is no model {text}; there are: {', '.join(names)}")
        elif name == "model":
            note("\n".join(f"{'*' if name == self.model else ' '} {name}" for name in self.models()))
        else:
            note(HELP if name == "help" else f"there is no /{name}; /help lists the commands")


def read_lines(label: str) -> Iterator[str]:
    """Lines that a person types or a file holds, until an empty one, the end, or Ctrl-C at the prompt."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # Windows edits lines by itself
            import readline  # arrow keys, and a backspace that takes a whole Chinese character

            for setting in ("input-meta on", "output-meta on", "convert-meta off"):  # off in locales without UTF-8
                readline.parse_and_bind(f"set {setting}")
    while sys.stdin is not None:
        try:
            if typed and not sys.stdout.isatty():  # input would write the label to the file
                note(label, end="")
            line = input(label if typed and sys.stdout.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            if typed:
                note("")
            return
        if not line.strip():
            return
        yield line


def explain(error: openai.OpenAIError, base_url: str) -> str:
    if isinstance(error, openai.APITimeoutError):
        return f"{base_url} did not answer in time"
    if isinstance(error, openai.APIConnectionError):
        return f"no server at {base_url}; start one with: python scripts/serve_openai_api.py, or name it by --base_url"
    if isinstance(error, openai.AuthenticationError):
        return f"{base_url} asks for a key: --api_key KEY, or MINIMIND_API_KEY"
    if isinstance(error, openai.NotFoundError) and not base_url.rstrip("/").endswith("/v1"):
        return f"there is no OpenAI API at {base_url}; is it {base_url.rstrip('/')}/v1?"
    body = getattr(error, "body", None)
    return body["message"] if isinstance(body, dict) and body.get("message") else str(error)


def main(argv: list[str] | None = None) -> int:
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):  # consoles of other encodings and broken bytes must not end a conversation
            file.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args(argv)
    typed = sys.stdin is not None and sys.stdin.isatty()
    failed = False
    try:
        chat = Chat(args)
        note(f"{chat.model} at {args.base_url}" + (" (/help lists the commands)" if typed else ""))
        for line in read_lines("👶: "):
            command = COMMAND.fullmatch(line.strip())
            try:
                if command:
                    chat.command(command[1].lower(), (command[2] or "").strip())
                    continue
                if typed:
                    note("🤖: ", end="")
                if not chat.answer(line) and not typed:
                    return 130
            except openai.OpenAIError as error:  # a conversation is worth more than one question
                note(f"error: {explain(error, args.base_url)}")
                failed = True
            if typed:
                note("")
    except openai.OpenAIError as error:
        note(f"error: {explain(error, args.base_url)}")
        return 1
    except ValueError as error:
        note(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(failed and not typed)


if __name__ == "__main__":
    sys.exit(main())
