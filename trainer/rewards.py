"""GRPO's rewards, computed from the answer and the record's gold answer; nothing is judged by a model.

`--reward number format=0.2` sums 1 × number and 0.2 × format. A reward is a function (answer text, record) -> float:

    number   1 if the answer's last number equals the gold answer's, however it is written
    exact    1 if the answer is the gold answer, white space apart
    choice   1 if the answer names the gold letter
    format   1 if the answer is <think>…</think><answer>…</answer>
    length   1 - share of --max_new_tokens used: with a small weight, shorter answers win among equally right ones
    python:FILE:FUNCTION   your own function of the same form
"""

import importlib.util
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataset.answers import choice_matches, exact_matches, is_well_formed, number_matches

REWARD_HELP = (
    "rewards to sum, each with a weight (1): number, exact, choice, format, length or python:FILE:FUNCTION; the first "
    "one says which answers are right"
)
Score = Callable[[str, dict], float]


@dataclass
class Reward:
    """One term of the sum."""

    name: str
    weight: float
    score: Score


BUILT_IN: dict[str, Score] = {
    "number": lambda answer, record: float(number_matches(answer, record["answer"])),
    "exact": lambda answer, record: float(exact_matches(answer, record["answer"])),
    "choice": lambda answer, record: float(choice_matches(answer, record["answer"])),
    "format": lambda answer, record: float(is_well_formed(answer)),
    "length": lambda answer, record: 1.0 - record["length_share"],
}


def checked_rewards(specs: list[str]) -> str:
    """Return --reward as one text, which shlex divides again. Raises ValueError if a reward is unknown."""
    build_rewards(specs)
    return shlex.join(specs)


def build_rewards(specs: list[str]) -> list[Reward]:
    """Return rewards from NAME, NAME=WEIGHT or python:FILE:FUNCTION[=WEIGHT]. Raises ValueError if one is unknown."""
    rewards = []
    for spec in specs:
        folder, colon, last = spec.rpartition(":")  # a path may hold "="
        last, _, weight = last.partition("=")
        name = folder + colon + last
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"--reward {spec}: the weight must be a finite number, such as {name}=0.5")
        score = load_function(name) if name.startswith("python:") else BUILT_IN.get(name)
        if score is None:
            raise ValueError(f"--reward {spec}: choose {', '.join(BUILT_IN)} or python:FILE:FUNCTION")
        rewards.append(Reward(name.rsplit(":", 1)[-1], value, score))
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"--reward {' '.join(specs)}: each reward may be named once")
    return rewards


def load_function(name: str) -> Score:
    """Return the function that python:FILE:FUNCTION names. Raises ValueError if it cannot be loaded."""
    path, _, function = name.removeprefix("python:").rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"--reward {name}: {path or 'FILE'} not found, or not a .py file; write python:FILE:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)  # dataclasses look it up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {name}: {path} cannot be loaded ({type(error).__name__}: {error})") from error
    score = getattr(module, function, None)
    if not callable(score):
        raise ValueError(f"--reward {name}: {path} has no function {function}")
    return score


def score_answer(rewards: list[Reward], answer: str, record: dict) -> dict[str, float]:
    """Return one answer's rewards by name. Raises ValueError, naming the prompt, if one raises or is not finite."""
    values = {}
    for reward in rewards:
        try:
            value = float(reward.score(answer, record))
        except Exception as error:
            raise ValueError(_failed(reward, record, f"{type(error).__name__}: {error}")) from error
        if not math.isfinite(value):
            raise ValueError(_failed(reward, record, f"it returned {value}"))
        values[reward.name] = value
    return values


def _failed(reward: Reward, record: dict, reason: str) -> str:
    prompt = record["conversations"][-1]["content"]
    return f"reward {reward.name} failed on the prompt {prompt[:80]!r} ({reason}); the weights are unchanged"
