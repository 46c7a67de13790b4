"""The progress bar for everything that takes long: tokenizing, training, frozen passes, evaluation, downloads."""

import contextlib
import sys

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines if there is no terminal
LINE_FORMAT = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


class ProgressBar(tqdm):
    """A bar with rate and time left on a terminal; elsewhere a line every LINE_SECONDS. It never ends a run.

        with ProgressBar("tokenizing", total_bytes, "B") as bar:
            bar.update(count, note="1,234 tokens")

    done: the amount done earlier, which does not count in the rate. Call clear() before printing on the terminal.
    """

    monitor_interval = 0  # no thread that watches slow loops: processes that fork must not have one

    def __init__(self, title: str, total: int | None, unit: str, *, done: int = 0, show: bool = True):
        stream = _SafeStream(sys.stderr)
        self.terminal = stream.terminal
        interval = 0.1 if stream.terminal else LINE_SECONDS
        super().__init__(
            desc=title,
            total=total,
            initial=done,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B" or not 0 < (total or 0) < 10_000,  # 12.3k, but 60 and not 60.0
            file=stream,
            disable=not show,
            leave=False,
            dynamic_ncols=True,
            smoothing=0.1,
            miniters=1,
            mininterval=interval,
            delay=0 if stream.terminal else interval,
            bar_format=None if stream.terminal or not total else LINE_FORMAT,
        )

    @staticmethod
    def format_meter(*given, **named) -> str:
        """Return tqdm's line without the spaces that its rates bring: 1.48s/ steps."""
        return tqdm.format_meter(*given, **named).replace("s/ ", "s/").replace(",  ", ", ")

    def rename(self, title: str) -> None:
        """Show another title: what is done instead for a while."""
        self.set_description_str(title, refresh=self.terminal)

    def update(self, amount: float = 1, note: str | None = None) -> None:
        if note is not None:
            self.set_postfix_str(note, refresh=False)
        super().update(amount)


class _SafeStream:
    """Standard error that may be closed, full or in a narrow encoding. If it is not a terminal, a write is one line."""

    def __init__(self, stream):
        self.stream, self.encoding = stream, getattr(stream, "encoding", None)
        self.terminal = False
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or closed
            self.terminal = stream.isatty()

    def write(self, text: str) -> None:
        if not self.terminal:
            text = text.strip() and text.strip() + "\n"
        with contextlib.suppress(AttributeError, LookupError, OSError, ValueError):
            text = text.encode(self.encoding or "utf-8", "replace").decode(self.encoding or "utf-8")
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()
