"""Chat in a terminal with any OpenAI-compatible server, by default the one of serve_openai_api.py on this machine.

    python scripts/serve_openai_api.py                  in one terminal
    python scripts/chat_openai_api.py                   in another
    python scripts/chat_openai_api.py < prompts.txt     one message a line

Answers go to stdout, thoughts and everything else to stderr. /help lists the commands.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import openai

from model.flags import HISTORY, add_api_key, message_count, show_defaults, utf8
from model.streams import note, set_up_streams
from scripts.openai_client import explain, new_client
from scripts.terminal import CONTROL_CHARACTERS, Display, LineEditor, TerminalChat, is_typed, piped_prompts, run_main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with an OpenAI-compatible server.")
    add = parser.add_argument
    add("--base_url", default="http://127.0.0.1:8998/v1", help="of the server")
    add("--model", help="default: the first one that the server offers")
    add_api_key(parser, "of the server")
    add("--temperature", type=float, help="default: the server's")
    add("--top_p", type=float, help="default: the server's")
    add("--max_tokens", type=int, help="longest answer; default: the server's")
    add("--system", type=utf8, help="system message")
    add("--history_cnt", **HISTORY)
    show_defaults(parser)
    return parser.parse_args(argv)


class ServerChat(TerminalChat):
    """A chat with a server, which knows only what each request sends of the conversation."""

    settings = {"temperature": float, "top_p": float, "max_tokens": int, "history_cnt": message_count}
    errors = (ValueError, TypeError, LookupError, AttributeError, openai.OpenAIError)  # whatever a server sends

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.client = new_client(openai.OpenAI, args.base_url, api_key=args.api_key)
        names = self.models()
        self.model = args.model or names[0]
        self._require(self.model, names)

    def models(self) -> list[str]:
        names = [CONTROL_CHARACTERS.sub("", str(model.id)) for model in self.client.models.list()]
        if not names:
            raise ValueError(f"{self.args.base_url} offers no model")
        return names

    def _require(self, name: str, names: list[str]) -> None:
        try:
            if name not in names:  # the server may know it without listing it
                self.client.models.retrieve(name)
        except openai.NotFoundError as error:
            raise ValueError(f"there is no model {name!r} here; there are: {', '.join(names)}") from error

    def answer(self, prompt: str) -> bool:
        text, display, finish_reason, interrupted = "", Display(), None, False
        try:
            with self._ask(self.messages(prompt)) as chunks:
                for chunk in chunks:
                    for choice in (chunk.choices or ())[:1]:
                        finish_reason = choice.finish_reason or finish_reason
                        display.show([(True, getattr(choice.delta, "reasoning_content", None) or "")])
                        display.show([(False, choice.delta.content or "")])
                        text += choice.delta.content or ""
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if display.started or finish_reason:
                display.end()
        if interrupted or finish_reason == "length":
            note("[stopped]" if interrupted else "[cut: the length is reached]")
        if text or finish_reason:
            self.remember(prompt, text)
        if not finish_reason and not interrupted:
            raise ValueError("the server broke off before the answer was complete")
        return not interrupted

    def _ask(self, messages: list[dict]) -> openai.Stream:
        """Ask with as many of the messages as the server's context holds."""
        names = ("temperature", "top_p", "max_tokens")
        options = {name: getattr(self.args, name) for name in names if getattr(self.args, name) is not None}
        oldest = 1 if self.system else 0
        while True:
            try:
                return self.client.chat.completions.create(model=self.model, messages=messages, stream=True, **options)
            except openai.BadRequestError as error:
                if error.code != "context_length_exceeded" or len(messages) <= oldest + 1:
                    raise
                note("[the conversation is longer than the context: left out its oldest messages]")
                messages = messages[:oldest] + messages[oldest + 2 :]

    def switch_model(self, name: str) -> None:
        names = self.models()
        if not name:
            note("\n".join(f"{'*' if name == self.model else ' '} {name}" for name in names))
        else:
            self._require(name, names)
            self.model = name
            note(f"[now with {name}]")

    def switch_lora(self, name: str) -> None:
        if not name:
            raise ValueError("which adapter? /lora NAME, or /lora none")
        base = self.model.partition(":")[0]
        if name.lower() != "none":
            return self.switch_model(f"{base}:{name}")
        root = str(getattr(self.client.models.retrieve(base), "root", ""))  # FILE:ADAPTER, if it always has one
        self.switch_model(root.rpartition(":")[0] or base)

    def explain(self, error: Exception) -> str:
        return explain(error, self.args.base_url)


def converse(args: argparse.Namespace) -> int:
    try:
        chat = ServerChat(args)
    except ServerChat.errors as error:
        raise ValueError(explain(error, args.base_url)) from error
    note(f"{chat.model} at {args.base_url}" + (" (/help lists the commands)" if is_typed() else ""))
    lines = LineEditor(chat.words()).prompts("👶: ") if is_typed() else piped_prompts()
    return chat.run(lines, is_typed())


def main(argv: list[str] | None = None) -> int:
    set_up_streams()
    args = parse_args(argv)
    return run_main(lambda: converse(args))


if __name__ == "__main__":
    sys.exit(main())
