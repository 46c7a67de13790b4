"""JSON lines in out/logs/ and, on request, Weights & Biases, SwanLab and TensorBoard: one run per job, the same names.

If any of them fails, training goes on.
"""

import argparse
import errno
import importlib.util
import io
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    """Return why the trackers asked for cannot work here. Only the main process logs."""
    mistakes = []
    for service in chosen(args) if not int(os.environ.get("RANK", 0)) else ():
        if importlib.util.find_spec(service.package) is None:
            mistakes.append(f"--{service.flag}: {service.package} is not installed; run: pip install {service.package}")
            continue
        try:
            reason = service.login()
        except Exception as error:  # each library has its own
            reason = f"{type(error).__name__}: {error}"
        if reason:
            mistakes.append(f"--{service.flag}: {reason}; {service.advice}")
    return mistakes


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
        """Append a line. Return a notice the first time that this fails, else ""."""
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


class Wandb:
    """A run of Weights & Biases: online, or on disk in out/wandb/."""

    package, flag, sync = "wandb", "use_wandb", "wandb sync"
    advice = "run `wandb login` once, or set WANDB_MODE=offline to keep the run on disk"

    @staticmethod
    def login() -> str:
        """Return "" if runs can be kept; on a terminal, ask for the login."""
        import wandb

        if wandb.setup().settings.mode != "online":
            return ""
        terminal = sys.stdin is not None and sys.stdin.isatty()
        logged_in = wandb.login(verify=False, prompt=terminal)
        logged_in = logged_in or wandb.setup().settings.mode != "online"  # chosen at the prompt
        return "" if logged_in else "wandb is not logged in"

    def __init__(self, args: argparse.Namespace, name: str, config: dict, step: int, mode: Any):
        import wandb

        folder = os.environ.get("WANDB_DIR") or str(args.out_dir)
        self.run = wandb.init(project=args.wandb_project, name=name, config=config, dir=folder, mode=mode)

    def log(self, values: dict, step: int) -> None:
        self.run.log(values, step=step)

    def finish(self, complete: bool, summary: dict) -> None:
        self.run.summary.update(summary)
        self.run.finish(exit_code=0 if complete else 1)


class SwanLab:
    """A run of SwanLab: online, or on disk in out/swanlab/."""

    package, flag, sync = "swanlab", "use_swanlab", "swanlab sync"
    advice = "run `swanlab login` once, or set SWANLAB_MODE=offline to keep the run on disk"

    @staticmethod
    def login() -> str:
        import swanlab

        settings = swanlab.Settings()
        return "" if settings.mode != "online" or settings.api_key else "swanlab is not logged in"

    def __init__(self, args: argparse.Namespace, name: str, config: dict, step: int, mode: str | None):
        import swanlab

        self.text, folder = swanlab.Text, str(args.out_dir / "swanlab")
        options = {"project": args.wandb_project, "name": name, "config": config, "log_dir": folder, "mode": mode}
        with ThreadPoolExecutor(1) as thread:  # in the main thread it would take over Ctrl-C
            self.run = thread.submit(swanlab.init, **options).result()

    def log(self, values: dict, step: int) -> None:
        self.run.log({k: self.text(v) if isinstance(v, str) else v for k, v in values.items()}, step=step)

    def finish(self, complete: bool, summary: dict) -> None:
        self.run.finish(*() if complete else ("aborted", "stopped before the end"))


class TensorBoard:
    """Event files in out/tensorboard/; a resumed run goes on in the same curves."""

    package, flag, sync, advice = "tensorboard", "use_tensorboard", "tensorboard", ""

    @staticmethod
    def login() -> str:
        return ""

    def __init__(self, args: argparse.Namespace, name: str, config: dict, step: int, mode: str | None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(args.out_dir / "tensorboard" / name, purge_step=step + 1)
        self.writer.add_text("flags", "\n".join(f"    {key} {value}" for key, value in config.items()), step)

    def log(self, values: dict, step: int) -> None:
        for name, value in values.items():
            (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value, step)

    def finish(self, complete: bool, summary: dict) -> None:
        self.writer.close()


Service = type[Wandb] | type[SwanLab] | type[TensorBoard]
SERVICES: tuple[Service, ...] = (Wandb, SwanLab, TensorBoard)


def chosen(args: argparse.Namespace) -> list[Service]:
    """Return the services that the flags ask for."""
    asked = (args.use_wandb, args.use_swanlab, args.use_tensorboard)
    return [service for service, wanted in zip(SERVICES, asked, strict=True) if wanted]


class Tracker:
    """The job's run at one of the services. If that fails, it says so once and does nothing from then on."""

    def __init__(self, service: Service, args: argparse.Namespace, name: str, config: dict, step: int):
        """Start the run; if the server cannot be reached, keep it on disk. step: optimizer steps done before."""
        self.service, self.run = service, None
        for mode in (None, "offline"):
            try:
                args.out_dir.mkdir(parents=True, exist_ok=True)
                self.run = service(args, name, config, step, mode)
                return
            except Exception as error:  # each library has its own
                advice = f"; keeping the run on disk, for `{service.sync}`" if mode is None else ""
                self._give_up(error, advice)

    def _give_up(self, error: object, advice: str = "") -> None:
        self.run = None
        reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        advice = advice or "; going on without it. All numbers are in out/logs/"
        print(f"note: {self.service.package} failed ({reason}){advice}", flush=True)

    def log(self, values: dict, step: int) -> None:
        if self.run is not None:
            try:
                self.run.log(values, step)
            except Exception as error:
                self._give_up(error)

    def finish(self, complete: bool, **summary) -> None:
        """Wait for uploads, but not longer than FINISH_SECONDS."""
        if self.run is None:
            return
        failure = []

        def finish() -> None:
            try:
                self.run.finish(complete, summary)
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            sends = f"; `{self.service.sync}` sends them later"
            self._give_up(f"its uploads took longer than {FINISH_SECONDS} s", sends)
        elif failure:
            self._give_up(failure[0])
