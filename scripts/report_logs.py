"""Read the JSON lines of out/logs/: one continuous run from every log, whatever happened to it.

A run that was killed repeats steps after --resume, and one that was started again begins a new history under the old
name. Each part of a log opens with a "start" line that names its first step; lines of earlier parts from that step on
belong to work that was lost.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from model.weights import STAGES, WEIGHT_NAME
from trainer.estimate import relevant_flags

# numbers of a step that are not drawn against it
BOOKKEEPING = {"step", "epoch", "time", "tokens", "seconds", "seconds_per_step", "processor_seconds"}
BOOKKEEPING |= {"peak_memory_bytes", "padding", "waiting"}
UNSEEN_FLAGS = {"given", "changed", "out_dir", "cache_dir", "resume", "overwrite", "pass_seconds"}


@dataclass
class Run:
    """The latest run of one log."""

    path: Path
    start: dict = field(default_factory=dict)  # the line of the latest part
    steps: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    parts: int = 0  # 1 + how often the run was resumed
    repeated: int = 0  # logged lines of steps that were lost and done again
    replaced: int = 0  # earlier runs of this name that were started again from the beginning
    skipped: int = 0  # broken lines
    wall_seconds: float = 0.0  # of all parts, with evaluations, saving and lost steps
    seconds: float = 0.0  # the same without evaluations and saving: what --estimate predicts
    ended: int | None = None  # step of the "end" line: steps after the last logged one are done too
    label: str = ""

    @property
    def name(self) -> str:
        """Return pretrain_512 or lora/lora_medical_512."""
        parts = self.path.with_suffix("").parts
        return "/".join(parts[len(parts) - parts[::-1].index("logs") :]) if "logs" in parts else parts[-1]

    @property
    def folder(self) -> str:
        """Return the name of the output folder that the log is in."""
        return self.path.absolute().parents[self.name.count("/") + ("logs" in self.path.parts)].name

    @property
    def position(self) -> tuple[float, str]:
        """Return a sort key: the order of the stages; adapters come after the SFT that they start from."""
        found = WEIGHT_NAME.fullmatch(self.name)
        return (list(STAGES).index(found["stage"]) if found else list(STAGES).index("full_sft") + 0.5), self.name

    @property
    def total_steps(self) -> int:
        return int(self.start.get("total_steps", self.steps[-1]["step"]))

    @property
    def last_step(self) -> int:
        return max(self.steps[-1]["step"], self.ended or 0)

    @property
    def state(self) -> str:
        if self.last_step >= self.total_steps:
            return "complete"
        running = ", or still running" if self.ended is None else ""
        return f"stopped at step {self.last_step:,} of {self.total_steps:,}{running}"

    @property
    def flags(self) -> dict:
        return {key: value for key, value in self.start.get("flags", {}).items() if key not in UNSEEN_FLAGS}

    @property
    def changed_flags(self) -> dict:
        """Return the flags that are not the stage's defaults; all flags if the log does not tell."""
        changed = self.start.get("flags", {}).get("changed")
        return self.flags if changed is None else {key: self.flags[key] for key in changed if key in self.flags}

    @property
    def estimate(self) -> dict:
        """Return what --estimate said of a run with these flags; {} if there was none."""
        found = read_json(self.path.with_suffix(".estimate.json"))
        known = {"flags", "processes", "threads"} <= self.start.keys()
        return found if known and found.get("flags") == relevant_flags(self.start) else {}

    def cost(self, price_per_hour: float | None) -> float | None:
        price = price_per_hour if price_per_hour is not None else self.flags.get("price_per_hour")
        return None if price is None else self.wall_seconds / 3600 * price

    def series(self, name: str, held_out: bool = False) -> tuple[list[int], list[float]]:
        """Return steps and values of a metric, of the training lines or of the evaluations."""
        lines = [line for line in (self.evaluations if held_out else self.steps) if is_number(line.get(name))]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def metrics(self) -> dict[str, str]:
        """Return what can be drawn: name ("held out NAME" if only evaluated) -> name among evaluations, or ""."""
        trained = [key for line in self.steps for key, value in line.items() if is_number(value)]
        held_out = [key for line in self.evaluations for key, value in line.items() if is_number(value)]
        trained, held_out = (dict.fromkeys(k for k in keys if k not in BOOKKEEPING) for keys in (trained, held_out))
        pairs = {}
        for name in trained:
            # the held-out loss of distillation is its cross-entropy, while its training loss is mostly the divergence
            other = {"ce": "loss", "loss": "" if "ce" in trained else "loss"}.get(name, name)
            own = [key for key in (f"valid_{other}", other) if key in held_out]
            pairs[name] = own[0] if own else ""
        return pairs | {f"held out {name}": name for name in held_out if name not in pairs.values()}


def read_json(path: Path) -> dict:
    """Return the object in a file; {} if there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_run(path: Path) -> Run:
    """Read a log. Raises ValueError if it cannot be read or holds no step."""
    run, part = Run(path), []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.strip()]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    for line in lines:
        try:
            content = json.loads(line)
            event = content["event"]
            wanted = BOOKKEEPING & content.keys() | ({"step"} if event in ("step", "evaluation") else set())
            if not all(is_number(content[name]) for name in wanted):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            run.skipped += 1
            continue
        if event == "start":
            run = _next_part(run, part, content)
            part = []
        elif event == "step":
            run.steps.append(content)
        elif event == "evaluation":
            run.evaluations.append(content)
        run.ended = content.get("step", 0) if event == "end" else None
        part.append(content)
    _add_time(run, part)
    if not run.steps:
        raise ValueError(f"{path} holds no training step yet (broken lines: {run.skipped})")
    return run


def _next_part(run: Run, part: list[dict], start: dict) -> Run:
    """Return the run at the beginning of another part: without the steps that it repeats, or empty if it is new."""
    _add_time(run, part)
    first = start.get("first_step", 0)
    if not first and run.parts:
        return Run(run.path, start, parts=1, replaced=run.replaced + bool(run.steps), skipped=run.skipped)
    kept = [line for line in run.steps if line["step"] <= first]
    run.repeated += len(run.steps) - len(kept)
    run.steps, run.start, run.parts = kept, start, run.parts + 1
    run.evaluations = [line for line in run.evaluations if line["step"] <= first]
    return run


def _add_time(run: Run, part: list[dict]) -> None:
    times = [line["time"] for line in part if is_number(line.get("time"))]
    trained = max((line["seconds"] for line in part if is_number(line.get("seconds"))), default=0.0)
    run.seconds += trained
    run.wall_seconds += max(times[-1] - times[0] if times else 0.0, trained)  # a clock may have been set back


def read_folder(out_dir: Path) -> tuple[list[Run], list[str]]:
    """Return the runs of an output folder in the order of the stages, and what is wrong with other logs.

    Raises ValueError if there is no run.
    """
    runs, wrong = [], []
    for path in sorted((out_dir / "logs").rglob("*.jsonl")):
        try:
            runs.append(read_run(path))
        except ValueError as error:
            wrong.append(str(error))
    if not runs:
        advice = "name the --out_dir of a training run, or start one: python trainer/train_pretrain.py"
        raise ValueError("; ".join([*wrong, f"{out_dir / 'logs'} holds no run; {advice}"]))
    return sorted(runs, key=lambda run: run.position), wrong


def read_runs(paths: list[Path]) -> tuple[list[list[Run]], list[str]]:
    """Return groups of runs to compare, and what is wrong with logs. paths: output folders, or logs.

    Folders with one log each, and logs, make one group; else there is a group for each name that several folders have.
    """
    found, wrong = [], []
    for path in paths:
        runs, problems = read_folder(path) if path.is_dir() else ([read_run(path)], [])
        found.append(runs)
        wrong += problems
    choices = [runs[0].folder for runs in found], [runs[0].name for runs in found], [*map(str, paths)]
    labels = next((names for names in choices if len(set(names)) == len(names)), choices[-1])
    for label, runs in zip(labels, found, strict=True):
        for run in runs:
            run.label = label
    if all(len(runs) == 1 for runs in found):
        return [[runs[0] for runs in found]], wrong
    by_name: dict[str, list[Run]] = {}
    for run in sorted((run for runs in found for run in runs), key=lambda run: run.position[0]):
        by_name.setdefault(run.name, []).append(run)
    groups = [group for group in by_name.values() if len(group) > 1]
    if not groups:
        raise ValueError(f"--compare: no run has the same name in two of these; there are {', '.join(by_name)}")
    return groups, wrong


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return (what, its value in each run) for all settings that are not the same."""
    facts = [
        {f"--{key}": value for key, value in run.flags.items()}
        | {key: run.start.get(key) for key in ("device", "processes", "threads", "total_steps", "parameters")}
        | {f"{key} version": value for key, value in run.start.get("versions", {}).items()}
        for run in runs
    ]
    names = dict.fromkeys(name for fact in facts for name in fact)
    rows = [(name, ["–" if fact.get(name) is None else str(fact[name]) for fact in facts]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
