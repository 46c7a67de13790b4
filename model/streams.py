"""Standard streams that replace what they cannot show, so that printing never ends a program. Imports no torch."""

import codecs
import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable


def entry_point(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Wrap a script's main: the streams are set up, and a user's mistake ends it with a message, not a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        set_up_streams()
        try:
            main(argv)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")

    return run


def set_up_streams() -> None:
    """Make stdin, stdout and stderr show what they can, in UTF-8 unless PYTHONIOENCODING names another encoding.

    Warnings become lines on stderr, too, and Ctrl-C ends the program without a traceback.
    """
    sys.excepthook = show_unless_interrupted
    warnings.showwarning = lambda message, *_: note(f"warning: {message}")
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(encoding=stream_encoding(), errors="replace")


def show_unless_interrupted(kind: type[BaseException], error: BaseException, traceback) -> None:
    """Do as sys.excepthook does, but show nothing for Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def stream_encoding() -> str:
    name = os.environ.get("PYTHONIOENCODING", "").split(":")[0]
    with contextlib.suppress(LookupError):
        return "utf-8" if codecs.lookup(name).name == "ascii" else name
    return "utf-8"


def note(text: str, end: str = "\n") -> None:
    """Print to stderr; a closed terminal does not end the program."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)
