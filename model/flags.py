"""Types and helpers for flags, for training, chat and tools alike. Imports no torch, so --help and clients are fast."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Messages that a conversation remembers by default, in the terminal and on the page: three questions and answers.
HISTORY_MESSAGES = 6


def boolean(text: str) -> bool:
    """Accept `--flag`, `--flag true` and `--flag False`, which all mean what they say."""
    value = text.strip().lower()
    if value in ("true", "1", "yes", "on"):
        return True
    if value in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def fraction(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def message_count(text: str) -> int:
    """Accept an even number: messages are questions with their answers."""
    if int(text) < 0 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text} is not an even number: messages are questions with their answers")
    return int(text)


def utf8(text: str) -> str:
    """Refuse what is not UTF-8: it could be neither encoded nor written to JSON."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode(errors="backslashreplace").decode()
        raise argparse.ArgumentTypeError(f"{shown} is not UTF-8") from error
    return text


def utf8_path(text: str) -> Path:
    return Path(utf8(text))


BOOL: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
HISTORY: dict[str, Any] = {
    "type": message_count,
    "default": HISTORY_MESSAGES,
    "help": f"earlier messages sent along, an even number; 0: each prompt alone (default: {HISTORY_MESSAGES} in a "
    "conversation, 0 for prompts that eval_model.py reads from a file)",
}


def add_boolean(parser: argparse._ActionsContainer, flag: str, default: bool | None, help: str) -> None:
    parser.add_argument(flag, default=default, help=help, **BOOL)


def add_api_key(parser: argparse._ActionsContainer, help: str) -> None:
    default, text = os.environ.get("MINIMIND_API_KEY"), f"{help} (default: MINIMIND_API_KEY, if set)"
    parser.add_argument("--api_key", type=lambda key: key or None, default=default, help=text)  # "" is no key


def show_defaults(parser: argparse.ArgumentParser) -> None:
    """Add the default to each help text that does not mention it."""
    for action in parser._actions:
        said = action.help or ""
        if argparse.SUPPRESS in (said, action.default) or "default" in said:
            continue
        if action.default is not False and action.default not in (None, "", "None", []):
            action.help = f"{said} (default: %(default)s)".lstrip()
