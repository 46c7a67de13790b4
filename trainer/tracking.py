"""Where numbers go besides the terminal: JSON lines in out/logs/, and Weights & Biases on request, one run per job.

Whatever becomes of either, training goes on.
"""

import argparse
import errno
import importlib.util
import io
import json
import os
import sys
import threading
from pathlib import Path

FINISH_SECONDS = 60  # how long the end of a run may wait for uploads
# numbers of speed and memory, shown apart from those of learning
PERFORMANCE = {
    "tokens_per_second", "mfu", "padding", "waiting", "seconds", "seconds_per_step", "processor_seconds",
    "peak_memory_bytes",
}  # fmt: skip


def grouped(record: dict) -> dict:
    """Return the numbers of a step or an evaluation under names that group in charts, such as train/loss."""
    content = {k: v for k, v in record.items() if k not in ("event", "step", "time") and v != ""}
    if record["event"] == "evaluation":
        return {f"valid/{name.removeprefix('valid_')}": value for name, value in content.items()}
    return {f"{'perf' if name in PERFORMANCE else 'train'}/{name}": value for name, value in content.items()}


def tracking_mistakes(args: argparse.Namespace) -> list[str]:
    """Return why --use_wandb cannot work here; on a terminal, ask for the login. Only the main process logs."""
    if not args.use_wandb or int(os.environ.get("RANK", 0)):
        return []
    if importlib.util.find_spec("wandb") is None:
        return ["--use_wandb: wandb is not installed; run: pip install wandb"]
    import wandb

    try:
        if wandb.setup().settings.mode != "online":
            return []
        terminal = sys.stdin is not None and sys.stdin.isatty()
        logged_in, reason = wandb.login(verify=False, prompt=terminal), "wandb is not logged in"
        logged_in = logged_in or wandb.setup().settings.mode != "online"  # chosen at the prompt
    except Exception as error:  # wandb raises many kinds here
        logged_in, reason = False, f"{type(error).__name__}: {error}"
    advice = "run `wandb login` once, or set WANDB_MODE=offline to keep the run on disk"
    return [] if logged_in else [f"--use_wandb: {reason}; {advice}"]


def append(file: io.FileIO, line: bytes) -> int:
    return file.write(line)


class JsonLines:
    """A file with one JSON object a line. A full disk is reported once; half a line does not spoil the next one."""

    def __init__(self, path: Path):
        self.path, self.told = path, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+b", buffering=0)
            self.broken = self.file.tell() > 0 and self.file.seek(-1, os.SEEK_END) >= 0 and self.file.read(1) != b"\n"
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error}; choose another --out_dir") from error

    def write(self, content: dict) -> str:
        """Append a line. Return what went wrong, the first time that something does; else ""."""
        line = b"\n" * self.broken + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.broken = True
        try:
            if append(self.file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.broken = False
        except OSError as error:
            first, self.told = not self.told, True
            return f"note: cannot write {self.path} ({error}); training goes on, and its log lacks lines" * first
        return ""


class Tracker:
    """The job's wandb run. If wandb fails, it says so once and does nothing from then on."""

    def __init__(self, args: argparse.Namespace, name: str, config: dict):
        """Start the run; if the server cannot be reached, keep it on disk in out/wandb/."""
        import wandb

        self.run = None
        for mode in (None, "offline"):
            try:
                args.out_dir.mkdir(parents=True, exist_ok=True)
                self.run = wandb.init(
                    project=args.wandb_project,
                    name=name,
                    config=config,
                    dir=os.environ.get("WANDB_DIR") or str(args.out_dir),
                    mode=mode,
                )
                return
            except Exception as error:  # wandb raises many kinds here
                advice = "; keeping the run on disk, for `wandb sync`" if mode is None else ""
                self._give_up(error, advice)

    def _give_up(self, error: object, advice: str = "") -> None:
        self.run = None
        reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        advice = advice or "; going on without it. All numbers are in out/logs/"
        print(f"note: wandb failed ({reason}){advice}", flush=True)

    def log(self, values: dict, step: int) -> None:
        if self.run is not None:
            try:
                self.run.log(values, step=step)
            except Exception as error:
                self._give_up(error)

    def finish(self, complete: bool, **summary) -> None:
        """Wait for uploads, but not for ever."""
        if self.run is None:
            return
        failure = []

        def finish() -> None:
            try:
                self.run.summary.update(summary)
                self.run.finish(exit_code=0 if complete else 1)
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            self._give_up(f"its uploads took longer than {FINISH_SECONDS} s", "; `wandb sync` sends them later")
        elif failure:
            self._give_up(failure[0])
