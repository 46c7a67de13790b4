"""Weights & Biases, on request: one run per job. Whatever becomes of it, training goes on, and out/logs/ has it all."""

import argparse
import importlib.util
import os
import sys
import threading

FINISH_SECONDS = 60  # how long the end of a run may wait for uploads


def tracking_mistakes(args: argparse.Namespace) -> list[str]:
    """Why --use_wandb cannot work here; asks on a terminal for the login. Only the job's first process logs."""
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


class Tracker:
    """The job's wandb run. When wandb fails it says so once and does nothing from then on."""

    def __init__(self, args: argparse.Namespace, name: str, config: dict):
        """Where the server cannot be reached, the run is kept on disk, in out/wandb/."""
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
        """Waits for uploads, but not for ever."""
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
