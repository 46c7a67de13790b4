"""How the loss falls with parameters and tokens: a curve through recorded runs, and what it and the cards predict.

    python benchmarks/scaling.py                          writes benchmarks/SCALING.md from benchmarks/recipe_runs.jsonl
    python benchmarks/scaling.py --recipe muon --learning_rate 8e-3 --rows 8

The curve is L = E + A / N^alpha + B / D^beta (arXiv:2203.15556, section 3.3): L nats a token on held-out text, N
parameters, D tokens. Only runs of one recipe and one setting are points of it, each the mean over its seeds; without
flags the setting with the most sizes and budgets is taken. Where so few runs cannot tell the exponents, they are taken
from the literature, and the page says so.

The rest of the page is arithmetic on a data sheet's figures: how long an optimizer step computes, what of the network,
the optimizer and the loader is left beside that, and which flags change it. All formulas are functions below.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipe import read_results
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import train_pretrain
from trainer.arguments import run_script
from trainer.cost import attention_flops, count_parameters, flops_per_token
from trainer.estimate import CARDS, assumed_mfu, duration
from trainer.loader import plural

# --- the recorded runs -----------------------------------------------------------------------------------------------

SETTING = ("recipe", "learning_rate", "rows", "data", "more", "ideas")
WARM_STEPS = 200  # shorter runs spend a quarter of their steps and more on the warm-up


@dataclass(frozen=True)
class Point:
    """Runs of one size and budget that differ by their seed only; N counts the tied embedding once."""

    hidden_size: int
    layers: int
    parameters: int
    tokens: int
    loss: float
    bits_per_byte: float
    seeds: int
    spread: float | None  # standard deviation of the loss over seeds


def shapes(config: MiniMindConfig) -> list[tuple[str, torch.Size]]:
    with torch.device("meta"):
        return [(name, p.shape) for name, p in MiniMindForCausalLM(config).named_parameters()]


def parameters_of(config: MiniMindConfig) -> int:
    with torch.device("meta"):
        return count_parameters(MiniMindForCausalLM(config))[0]


def select(runs: list[dict], path: Path, args: argparse.Namespace) -> tuple[dict, list[Point]]:
    """The setting asked for, or else the one with the most points, and its points. ValueError: too few of them."""
    families: dict[str, list[dict]] = defaultdict(list)
    for run in runs:
        wanted = all(getattr(args, name) in (None, run[name]) for name in ("recipe", "learning_rate", "rows"))
        # the original's budget counts padding
        if wanted and run["steps"] >= args.min_steps and (args.recipe or run["recipe"] != "original"):
            families[json.dumps({name: run.get(name, []) for name in SETTING})].append(run)
    if not families:
        raise ValueError(
            f"{path} holds no run of at least {args.min_steps} steps for these flags; record some with "
            "`python benchmarks/recipe.py run --help`, or leave --recipe, --learning_rate and --rows out"
        )
    newest = {key: max(run["time"] for run in group) for key, group in families.items()}
    key = max(families, key=lambda key: (len(points_of(families[key])), newest[key]))
    setting, points = json.loads(key), points_of(families[key])
    sizes, budgets = ({getattr(p, name) for p in points} for name in ("parameters", "tokens"))
    if len(points) < 6 or len(sizes) < 2 or len(budgets) < 2:
        raise ValueError(
            f"{path} holds {plural(len(points), 'point')} of one setting ({plural(len(sizes), 'size')} and "
            f"{plural(len(budgets), 'budget')} of {describe(setting)}); the curve needs 6, of 2 sizes and 2 budgets at "
            "least. Record more with other --hidden_size and --tokens: python benchmarks/recipe.py run --recipe "
            f"{setting['recipe']} --learning_rate {setting['learning_rate']:g} --rows {setting['rows']} "
            "--hidden_size 128 --tokens 2e6 --data_path TRAIN.jsonl --valid_path HELD_OUT.jsonl"
        )
    return setting, points


def points_of(runs: list[dict]) -> list[Point]:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in runs:
        groups[run["hidden_size"], run["num_hidden_layers"], run["tokens"]].append(run)
    points = []
    for (hidden, layers, tokens), group in sorted(groups.items()):
        losses = [run["valid_loss"] for run in group]
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        bits = statistics.fmean(run["bits_per_byte"] for run in group)
        size = parameters_of(MiniMindConfig(hidden_size=hidden, num_hidden_layers=layers))
        points.append(Point(hidden, layers, size, tokens, statistics.fmean(losses), bits, len(group), spread))
    return points


def describe(setting: dict) -> str:
    more = " ".join([*setting["more"], *setting["ideas"]])
    return (
        f"recipe {setting['recipe']}{f' {more}' if more else ''}, learning rate {setting['learning_rate']:g}, "
        f"{setting['rows']} rows of 512 a step"
    )


# --- the curve -------------------------------------------------------------------------------------------------------

# alpha, beta. The second re-derives the first from the same runs.
LITERATURE = {"arXiv:2203.15556, appendix D.3": (0.34, 0.28), "arXiv:2404.10102": (0.3478, 0.3658)}
# The paper's 1e-3 is for its 400 runs. Ours differ by more than that from their seed alone, and an absolute loss would
# run through some of so few points exactly.
HUBER_DELTA = 1e-2
DRAWS = 200  # of the bootstrap
LOWEST = np.array([math.log(1e-2), -20, 0.02, -20, 0.02])  # log E, log A, alpha, log B, beta
HIGHEST = np.array([math.log(20), 40, 2.0, 40, 2.0])


@dataclass(frozen=True)
class Curve:
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


def log_curve(theta: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L of parameters theta (batch, 5) at points (points,), and its derivatives (batch, points, 5)."""
    e, a, alpha, b, beta = (theta[:, [i]] for i in range(5))
    terms = np.stack(np.broadcast_arrays(e, a - alpha * log_n, b - beta * log_d))
    top = terms.max(0)
    parts = np.exp(terms - top)
    total = parts.sum(0)
    share = parts / total
    slopes = [share[0], share[1], -share[1] * log_n, share[2], -share[2] * log_d]
    return top + np.log(total), np.stack(slopes, -1)


def huber(residual: np.ndarray, weight: np.ndarray) -> np.ndarray:
    size = np.abs(residual)
    inside = np.where(size <= HUBER_DELTA, residual**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))
    return (weight * inside).sum(-1)


def starts(log_n, log_d, log_l, exponents: tuple[float, float] | None) -> list[np.ndarray]:
    """E takes a share of the lowest loss, the other two terms halve the rest. Each (batch, 5)."""
    pairs = [exponents] if exponents else itertools.product((0.2, 0.5), (0.2, 0.5))
    begin = []
    for share, (alpha, beta) in itertools.product((0.05, 0.4, 0.8), pairs):
        lowest, rest = np.exp(log_l.min(1)), np.exp(log_l.mean(1)) - share * np.exp(log_l.min(1))
        a, b = np.log(rest / 2) + alpha * log_n.mean(), np.log(rest / 2) + beta * log_d.mean()
        begin.append(np.stack([np.log(share * lowest), a, np.full_like(a, alpha), b, np.full_like(a, beta)], -1))
    return begin


def fit(log_n, log_d, log_l, weight=None, exponents: tuple[float, float] | None = None, near=None) -> np.ndarray:
    """theta (batch, 5) that minimises the Huber loss of log L, log_l and weight being (batch, points).

    Levenberg-Marquardt in float64 from several starts at once, or from `near` (5,). exponents: alpha and beta when they
    are given.
    """
    log_l = np.atleast_2d(log_l)
    weight = np.ones_like(log_l) if weight is None else weight
    free = [0, 1, 3] if exponents else [0, 1, 2, 3, 4]
    if near is None:
        begin = starts(log_n, log_d, log_l, exponents)
    else:
        begin = [np.tile(near, (len(log_l), 1))]
    theta = np.concatenate(begin)
    log_l, weight = np.tile(log_l, (len(begin), 1)), np.tile(weight, (len(begin), 1))
    damping = np.full(len(theta), 1e-3)
    value, idle = huber(log_curve(theta, log_n, log_d)[0] - log_l, weight), 0
    for _ in range(1000):
        estimate, slopes = log_curve(theta, log_n, log_d)
        residual, slopes = estimate - log_l, slopes[..., free]
        pull = weight * np.minimum(1, HUBER_DELTA / np.maximum(np.abs(residual), 1e-300))
        curvature = np.einsum("bpi,bp,bpj->bij", slopes, pull, slopes)
        gradient = np.einsum("bpi,bp,bp->bi", slopes, pull, residual)
        diagonal = np.einsum("bii->bi", curvature)
        damped = curvature + np.eye(len(free)) * (damping[:, None] * diagonal + 1e-15)[:, None]
        new = theta.copy()
        new[:, free] -= np.linalg.solve(damped, gradient[..., None])[..., 0]
        new = np.clip(new, LOWEST, HIGHEST)
        new_value = huber(log_curve(new, log_n, log_d)[0] - log_l, weight)
        better = new_value <= value
        idle = 0 if (new_value < value * (1 - 1e-9)).any() else idle + 1
        theta, value = np.where(better[:, None], new, theta), np.where(better, new_value, value)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e9)
        if idle == 20:
            break
    value = value.reshape(len(begin), -1)
    return theta.reshape(*value.shape, 5)[value.argmin(0), np.arange(value.shape[1])]


@dataclass(frozen=True)
class Fitted:
    """A curve, what it leaves, and curves through points with other noise: how well it is known."""

    name: str
    curve: Curve
    residuals: np.ndarray  # log of measured over fitted loss
    left_out: np.ndarray  # the same, each point against a curve fitted to the others
    draws: list[Curve]

    def interval(self, value) -> tuple[float, float]:
        """Of value(curve): nine in ten of the drawn curves lie in it."""
        low, high = np.percentile([value(curve) for curve in self.draws], (5, 95))
        return float(low), float(high)


def fit_points(points: list[Point], name: str, exponents: tuple[float, float] | None) -> Fitted:
    """The curve and its uncertainty by a parametric bootstrap: normal noise on log L, as large as the residuals (with
    one degree of freedom less for every fitted number) or the spread over seeds, whichever is more."""
    log_n, log_d, log_l = (np.log([getattr(p, a) for p in points]) for a in ("parameters", "tokens", "loss"))
    theta = fit(log_n, log_d, log_l, exponents=exponents)
    fitted = log_curve(theta, log_n, log_d)[0][0]
    others = np.tile(log_l, (len(points), 1))
    alone = fit(log_n, log_d, others, weight=1 - np.eye(len(points)), exponents=exponents, near=theta[0])
    left_out = log_l - np.diag(log_curve(alone, log_n, log_d)[0])
    spreads = [p.spread / p.loss for p in points if p.spread is not None]
    freedom = max(len(points) - (3 if exponents else 5), 1)
    noise = max(
        math.sqrt(((log_l - fitted) ** 2).sum() / freedom), math.sqrt(np.square(spreads).mean()) if spreads else 0
    )
    random = np.random.default_rng(0)
    noise = noise * np.sqrt(
        freedom / random.chisquare(freedom, (DRAWS, 1))
    )  # known from few residuals, as in Student's t
    drawn = fitted + noise * random.standard_normal((DRAWS, len(points)))
    return Fitted(
        name, as_curve(theta[0]), log_l - fitted, left_out,
        [as_curve(row) for row in fit(log_n, log_d, drawn, exponents=exponents, near=theta[0])],
    )  # fmt: skip


def as_curve(theta: np.ndarray) -> Curve:
    e, a, alpha, b, beta = map(float, theta)
    return Curve(math.exp(e), math.exp(a), alpha, math.exp(b), beta)


def fit_all(points: list[Point]) -> tuple[Fitted, list[Fitted], bool]:
    """The fit to predict with, all fits, and whether the data tell the exponents: three sizes and budgets, and the
    interval of neither exponent wider than a factor of two."""
    fits = [fit_points(points, f"exponents of {source}", pair) for source, pair in LITERATURE.items()]
    enough = all(len({getattr(p, name) for p in points}) >= 3 for name in ("parameters", "tokens"))
    if not enough or len(points) < 7:
        return fits[-1], fits, False
    free = fit_points(points, "all five numbers free", None)
    ranges = [free.interval(lambda c, name=name: getattr(c, name)) for name in ("alpha", "beta")]
    told = all(high / low < 2 and low > LOWEST[2] * 1.01 and high < HIGHEST[2] * 0.99 for low, high in ranges)
    return (free if told else fits[-1]), [free, *fits], told


def hull(fits: list[Fitted], sizes: tuple[float, ...], tokens: float) -> tuple[float, float]:
    """The lowest and the highest end of all fits' intervals: which form is right is part of what is not known."""
    ends = [fitted.interval(lambda c, n=n: c.loss(n, tokens)) for fitted in fits for n in sizes]
    return min(low for low, _ in ends), max(high for _, high in ends)


# --- models, data, cards ---------------------------------------------------------------------------------------------

SEQ_LEN = 512
MODELS = {
    "26M": MiniMindConfig(),
    "104M": MiniMindConfig(hidden_size=768, num_hidden_layers=16),
    "MoE 145M": MiniMindConfig(hidden_size=640, use_moe=True),
}
# Sizes of the original project's files as it publishes them. Bytes of file a token: what our tokenizer made of the
# samples that RESULTS.md speaks of, JSON and templates included (36,846,215 bytes, 9,799,921 tokens of text;
# 25,075,376 bytes, 6,648,272 tokens of conversations). Of bare text it is 3.64 to 3.66.
PRETRAIN_BYTES, SFT_BYTES = 1.6e9, 20e9
DATA = {
    "1.6 GB": PRETRAIN_BYTES / (36_846_215 / 9_799_921),
    "1.6 + 20 GB": PRETRAIN_BYTES / (36_846_215 / 9_799_921) + SFT_BYTES / (25_075_376 / 6_648_272),
}
DATA_BYTES = {"1.6 GB": PRETRAIN_BYTES, "1.6 + 20 GB": PRETRAIN_BYTES + SFT_BYTES}
LOADER_TOKENS = 27e6  # packed tokens a second and process, the lowest of RESULTS.md, "Data path"
TOKENIZE_BYTES = 4.42e6  # of jsonl a second and core, the same place

MEMORY_BANDWIDTH = {"RTX 4090": 1008e9, "H100 SXM": 3350e9}  # bytes a second, the maker's data sheets
# Bytes a second in one direction. Data sheets: PCIe 4.0 x16 31.5 GB/s, halved because consumer cards cannot read each
# other's memory and every byte goes through the host; NVLink 4 450 GB/s a card; Ethernet of one port a machine, which
# a ring crosses once. Of these four fifths are assumed to be reached.
REACHED = 0.8
LINKS = {"PCIe 4.0 x16, host": 31.5e9 / 2, "NVLink 4": 450e9, "100 Gb Ethernet": 12.5e9, "400 Gb Ethernet": 50e9}
WIRING = {  # within a machine of eight cards, and between machines
    "RTX 4090": ("PCIe 4.0 x16, host", "100 Gb Ethernet"),
    "H100 SXM": ("NVLink 4", "400 Gb Ethernet"),
}
CARDS_A_MACHINE = 8


@dataclass(frozen=True)
class Setup:
    card: str
    cards: int

    @property
    def name(self) -> str:
        return f"{self.cards} × {self.card}" if self.cards > 1 else self.card

    @property
    def link(self) -> str:
        """The slowest that the gradients cross."""
        return WIRING[self.card][self.cards > CARDS_A_MACHINE]

    def all_reduce(self, parameters: int) -> float:
        """Seconds that gradients in float32 travel."""
        return ring_seconds(4 * parameters, self.cards, LINKS[self.link] * REACHED)


SETUPS = (
    Setup("RTX 4090", 1),
    Setup("RTX 4090", 8),
    Setup("RTX 4090", 64),
    Setup("H100 SXM", 8),
    Setup("H100 SXM", 64),
)


@dataclass(frozen=True)
class Work:
    """What one token and one optimizer step of a model ask for."""

    parameters: int
    active: int
    token_flops: float
    muon_flops: float


def work_of(config: MiniMindConfig) -> Work:
    """Attention is counted for rows of one document, (512 + 1) / 2 positions seen; shorter documents see fewer."""
    parameters = parameters_of(config)
    weights = flops_per_token(config, parameters)
    flops = weights + attention_flops(config, 1) * (SEQ_LEN + 1) / 2
    products = sum(muon_flops(*shape) for name, shape in shapes(config) if len(shape) == 2 and ".layers." in name)
    return Work(parameters, round(weights / 6), flops, products)


# --- an optimizer step -----------------------------------------------------------------------------------------------


def peak_flops(card: str) -> float:
    return next(c.teraflops for c in CARDS if c.name == card and c.count == 1) * 1e12


def ring_seconds(size: float, cards: int, bandwidth: float) -> float:
    """All-reduce of `size` bytes around a ring: every card sends 2 (n - 1) / n of them. Latency is left out."""
    return 2 * (cards - 1) / cards * size / bandwidth


def muon_flops(rows: int, columns: int, iterations: int = 5) -> float:
    """Newton-Schulz of one matrix, m the shorter side: X X^T (2 m² n), its square (2 m³), times X (2 m² n), each
    iteration (arXiv:2502.16982, section 2.1; five of them are torch.optim.Muon's default)."""
    m, n = min(rows, columns), max(rows, columns)
    return iterations * (4 * m * m * n + 2 * m**3)


# float32, bytes a parameter: AdamW reads weight, gradient and two moments and writes three of them (28); clipping reads
# the gradient, reads it again and writes it (12). Muon's state is smaller; it is counted the same.
OPTIMIZER_BYTES = 40


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step: what the cards compute, and what comes on top of it."""

    rows: int  # of a micro-batch, on one card
    accumulation: int
    tokens: int  # of all cards
    compute: float
    network: float  # of the all-reduce, what does not hide behind the last backward pass
    optimizer: float  # memory traffic, and Muon's products
    loader: float  # waiting for batches

    @property
    def seconds(self) -> float:
        return self.compute + self.network + self.optimizer + self.loader

    @property
    def overheads(self) -> dict[str, float]:
        """In shares of the computing time."""
        return {name: getattr(self, name) / self.compute for name in ("network", "optimizer", "loader")}

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.overheads.items(), key=lambda item: item[1])

    @property
    def flags(self) -> str:
        return f"--batch_size {self.rows} --accumulation_steps {self.accumulation}"


def step_of(
    config: MiniMindConfig, work: Work, setup: Setup, rows: int, accumulation: int, optimizer: str, zero: bool = False
) -> Step:
    """Gradients (float32) travel during the backward pass of the last micro-batch, which is two thirds of it. Muon's
    products are made by every card for itself, at the same share of the peak as the model's. With ZeRO (stage 1) each
    card updates its part, and then gathers the others': half of the traffic, which hides behind nothing.
    """
    rate = peak_flops(setup.card) * assumed_mfu(config, setup.cards)
    micro = rows * SEQ_LEN * work.token_flops / rate
    travel = setup.all_reduce(work.parameters)
    reduced = travel / 2 if zero else travel
    network = max(0.0, reduced - micro * 2 / 3) + (travel - reduced)
    update = OPTIMIZER_BYTES * work.parameters / (setup.cards if zero else 1) / MEMORY_BANDWIDTH[setup.card]
    update += work.muon_flops / rate if optimizer == "muon" else 0.0
    compute = accumulation * micro
    waiting = max(0.0, accumulation * rows * SEQ_LEN / LOADER_TOKENS - compute)
    return Step(rows, accumulation, setup.cards * accumulation * rows * SEQ_LEN, compute, network, update, waiting)


def split(rows: int, largest: int) -> tuple[int, int]:
    """Rows of a card's step as (micro-batch, accumulation)."""
    return min(rows, largest), math.ceil(rows / largest)


def critical_batch(loss: float) -> float:
    """Tokens a step beyond which a larger batch saves hardly any steps (arXiv:2001.08361, eq. 1.4), at a loss in nats a
    token. Measured on another tokenizer's tokens: an order of magnitude."""
    return 2e8 / loss ** (1 / 0.21)


FEWEST_STEPS = 1000
MOST_CARDS = 64
BEARABLE = 0.10  # share of the computing time


def advised_step(config, work: Work, setup: Setup, defaults, tokens: float, loss: float) -> Step:
    """The smallest batch, from the one-card default on and doubled, with which nothing takes more than a tenth of the
    computing time; at most the critical batch and a thousandth of all tokens, but a row a card."""
    rows = defaults.batch_size * defaults.accumulation_steps
    ceiling = min(critical_batch(loss), tokens / FEWEST_STEPS)
    rows = max(1, rows // setup.cards)
    while True:
        step = step_of(config, work, setup, *split(rows, defaults.batch_size), defaults.optimizer)
        if step.worst[1] <= BEARABLE or 2 * step.tokens > ceiling:
            return step
        rows *= 2


def first_bottleneck(config, work: Work, card: str, defaults, optimizer: str) -> tuple[Setup, Step] | None:
    """The fewest cards (a power of two) at which something takes more than a tenth of the computing time, when
    the batch of the whole stays the one-card default."""
    rows = defaults.batch_size * defaults.accumulation_steps
    for setup in (Setup(card, 2**k) for k in range(MOST_CARDS.bit_length())):
        step = step_of(config, work, setup, *split(max(1, rows // setup.cards), defaults.batch_size), optimizer)
        if step.worst[1] > BEARABLE:
            return setup, step
    return None


def enough_rows(config, work: Work, setup: Setup, defaults, optimizer: str) -> Step:
    """The smallest batch (rows a card a power of two) with which nothing takes more than a tenth."""
    rows = 1
    while True:
        step = step_of(config, work, setup, *split(rows, defaults.batch_size), optimizer)
        if step.worst[1] <= BEARABLE:
            return step
        rows *= 2


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = """# Scaling

Written by `python benchmarks/scaling.py` from `benchmarks/{file}`; do not edit. Measured: the losses of the first
table. Everything after it is fitted or computed, and says from what.

## Measured

Setting: {setting}, the same for all; SHA-256 of the training file {data}…; every run with a whole schedule for its
own tokens. Runs of other settings in the file are not used. Loss in nats a token on held-out text, the mean over
seeds. Residual: measured over fitted; left out: measured over a curve fitted to the other points.

{measured}

## The curve

L = E + A / N^alpha + B / D^beta (arXiv:2203.15556, section 3.3), N all parameters with the tied embedding once, D
tokens; Huber loss of log L, delta {delta:g}, in float64, from several starts. In brackets the range of nine in ten of
{draws} fits to points with noise drawn anew, of the size of the residuals or of the spread over seeds.

{verdict}

{fits}

What the brackets do not hold: that one learning rate and batch size serve all sizes and budgets, that only the width
grew and in the smallest models the embedding is much of N, and that the curve has this form outside of the range
measured. E means this held-out text with our tokenizer; published values of E do not carry over.

## Predicted for the full data

Tokens: files of {pretrain_gb:g} GB (pretraining) and about {sft_gb:g} GB (conversations), as the original project
publishes them, read once, at {pretrain_each:.2f} and {sft_each:.2f} bytes of file a token, which our tokenizer
measured on samples of other text (3.64 to 3.66 of bare text). The loss is that of text like the held-out file's, as
if all of it were pretraining on such text; it says nothing about the loss on answers after SFT. **This goes
{beyond_n:.0f} times beyond the largest model and {beyond_d:.0f} times beyond the most tokens that were measured**:
read it as a direction. The brackets reach from the lowest to the highest end of the intervals of all fits above; a
mixture of experts is predicted as a dense model of its active parameters, and the brackets include one of all its
parameters.

{losses}

Time and money follow from the operations (`trainer/cost.py`; rows of one document of 512) at the share of the peak
that `--estimate` assumes (`trainer/estimate.py`; so does the README's table), with its prices for renting,
and what network, optimizer and loader take on top (below). **None of it was measured on a GPU.**
Flags: the batch of the one-card default, doubled until nothing takes more than {bearable:.0%} of the computing time,
at most to the critical batch and to {fewest:,} steps. `--optimizer {optimizer}`, the default.

{runs}

Time is for one pass over the data at these flags, without tokenising it, saving, evaluating and losing machines.

## Where the first bottleneck appears

Cards are added, eight in a machine, and the batch of the whole stays {batch:,} tokens, the default of one card, and
at least a row a card, so that the run takes the same steps and comes to the same loss. An optimizer step then lasts,
in milliseconds:

{steps}

What first takes more than {bearable:.0%} of the computing time, and at how many cards; the smallest batch that
removes it; and what is the largest part with other settings and the same batch:

{first}

**Loader.** A process makes {loader:.0f}M packed tokens a second (measured on a CPU core, RESULTS.md). One card
consumes, in millions: {card_rates}; at most {loader_share:.0%} of a process. `--num_workers` is there, but one
process a card is enough. Tokenising comes first, once: at {tokenize_rate:g} MB of jsonl a second and core
{tokenize_times}, against {shortest} that {largest_setup} compute for the {smallest_model} model on all of it. With
many cards this is what one waits for, unless the cache is made beforehand on a machine with many cores; processes on
one machine share it, and `--cache_dir` on a shared disk lets all machines do so.

**Network.** Gradients are float32 and travel once a step, in a ring (2 (n - 1) / n of their bytes a card), while the
last micro-batch's backward pass runs. Rows of 512 a micro-batch that hide all of it:

{network}

Cure: `--accumulation_steps` (gradients travel once a step), `--batch_size` (a longer backward pass hides more).
`--zero_stage 1` moves the same bytes, half of them hidden by nothing; `2` and `3` divide the gradients after every
micro-batch, so that accumulating saves no traffic: they are for memory. A mixture of experts sends all its parameters
and computes with the active ones, so it needs the most rows.

**Optimizer.** Every card updates all weights: {optimizer_bytes} bytes a parameter of memory traffic, and with Muon
five Newton-Schulz iterations of every matrix inside the blocks, which do not shrink with the batch:

{updates}

Cure: more rows a card and step, by `--accumulation_steps` or `--batch_size`; `--optimizer adamw` where Muon saves
fewer tokens than its share of the step. `--zero_stage 1` divides the update among the cards, but gathers weights
after it: what that makes of a step stands in the first table of this section.

**Batch.** With the defaults left as they are on every card, the batch grows with the cards and the steps go. The
critical batch, from where on more tokens a step save hardly any steps (arXiv:2001.08361, eq. 1.4; for other tokens
than ours, so an order of magnitude), at the loss predicted:

{batches}

Cure: divide `--accumulation_steps` by the cards first, then `--batch_size`. Below about {fewest:,} steps or above the
critical batch more cards buy no time: train a larger model, or several at once.
"""


def page(setting: dict, points: list[Point], results: Path) -> str:
    chosen, fits, told = fit_all(points)
    defaults = train_pretrain.parse(["--device", "cpu"])
    works = {name: work_of(config) for name, config in MODELS.items()}
    losses, runs = predictions(points, chosen, fits, works, defaults)
    rates = {(name, card): card_rate(name, work, card) for card in WIRING for name, work in works.items()}
    smallest, largest = next(iter(MODELS)), SETUPS[-1]
    filled = PAGE.format(
        file=results.name,
        setting=describe(setting),
        data=setting["data"],
        measured=measured_table(points, chosen),
        delta=HUBER_DELTA,
        draws=DRAWS,
        verdict=verdict(points, told),
        fits=fits_table(chosen, fits),
        pretrain_gb=PRETRAIN_BYTES / 1e9,
        sft_gb=SFT_BYTES / 1e9,
        pretrain_each=PRETRAIN_BYTES / DATA["1.6 GB"],
        sft_each=SFT_BYTES / (DATA["1.6 + 20 GB"] - DATA["1.6 GB"]),
        beyond_n=max(work.active for work in works.values()) / max(p.parameters for p in points),
        beyond_d=max(DATA.values()) / max(p.tokens for p in points),
        losses=losses,
        bearable=BEARABLE,
        fewest=FEWEST_STEPS,
        optimizer=defaults.optimizer,
        runs=runs,
        batch=defaults.batch_size * defaults.accumulation_steps * SEQ_LEN,
        steps=steps_table(works, defaults),
        first=first_table(works, defaults),
        loader=LOADER_TOKENS / 1e6,
        card_rates="; ".join(
            f"{card} " + ", ".join(f"{name} {rates[name, card] / 1e6:.2f}" for name in works) for card in WIRING
        ),
        loader_share=max(rates.values()) / LOADER_TOKENS,
        tokenize_rate=TOKENIZE_BYTES / 1e6,
        tokenize_times=" and ".join(
            f"{duration(size / TOKENIZE_BYTES)} of one core for {data}" for data, size in DATA_BYTES.items()
        ),
        shortest=duration(
            DATA["1.6 + 20 GB"] / (largest.cards * card_rate(smallest, works[smallest], largest.card, largest.cards))
        ),
        largest_setup=largest.name,
        smallest_model=smallest,
        network=network_table(works),
        optimizer_bytes=OPTIMIZER_BYTES,
        updates=updates_table(works),
        batches=batches_table(chosen.curve, works, defaults),
    )
    return "\n\n".join(part if part.startswith(("|", "#")) else wrapped(part) for part in filled.split("\n\n")) + "\n"


def wrapped(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), 150, break_long_words=False, break_on_hyphens=False)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(value: float) -> str:
    """Three of them."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def milliseconds(seconds: float) -> str:
    return digits(seconds * 1e3)


def millions(count: float) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def measured_table(points: list[Point], chosen: Fitted) -> str:
    rows = [
        [
            f"{p.hidden_size} × {p.layers}", f"{p.parameters / 1e6:.2f}M", f"{p.tokens / 1e6:.2f}M", f"{p.seeds}",
            f"{p.loss:.4f}", "-" if p.spread is None else f"{p.spread:.4f}", f"{p.bits_per_byte:.4f}",
            f"{chosen.curve.loss(p.parameters, p.tokens):.4f}", f"{residual:+.2%}", f"{left_out:+.2%}",
        ]
        for p, residual, left_out in zip(points, chosen.residuals, chosen.left_out, strict=True)
    ]  # fmt: skip
    header = ["hidden × layers", "N", "D", "seeds", "loss", "spread", "bits a byte", "fitted", "residual", "left out"]
    return table(header, rows)


def verdict(points: list[Point], told: bool) -> str:
    values = [[getattr(p, name) for p in points] for name in ("parameters", "tokens")]
    spans = [max(column) / min(column) for column in values]
    what = f"{len(points)} points over a factor of {spans[0]:.1f} in N and {spans[1]:.1f} in D"
    if told:
        return f"{what} tell both exponents within a factor of two, so the fit with all numbers free is used."
    return (
        f"{what} **do not tell the exponents**: their intervals are wider than a factor of two, or there are fewer "
        f"than seven points or three sizes and budgets. They are taken from {list(LITERATURE)[-1]}; E, A and B "
        "are fitted."
    )


def fits_table(chosen: Fitted, fits: list[Fitted]) -> str:
    rows = []
    for fitted in fits:
        cells = []
        for name in ("E", "A", "alpha", "B", "beta"):
            value = getattr(fitted.curve, name)
            low, high = fitted.interval(lambda c, name=name: getattr(c, name))
            given = high <= low * (1 + 1e-9)
            cells.append(f"{value:g}, given" if given else f"{digits(value)} ({digits(low)} to {digits(high)})")
        rms = math.sqrt((fitted.residuals**2).mean())
        rows.append([fitted.name + " **(used)**" * (fitted is chosen), *cells, f"{rms:.2%}"])
    return table(["fit", "E", "A", "alpha", "B", "beta", "residual, root mean square"], rows)


def predictions(
    points: list[Point], chosen: Fitted, fits: list[Fitted], works: dict[str, Work], defaults
) -> tuple[str, str]:
    """The tables of losses, and of time and money."""
    bits = statistics.fmean(p.bits_per_byte / p.loss for p in points)
    losses, runs = [], []
    for (name, work), (data, tokens) in itertools.product(works.items(), DATA.items()):
        loss = chosen.curve.loss(work.active, tokens)
        low, high = hull(fits, (work.active, work.parameters), tokens)
        losses.append([
            name, data, millions(tokens), f"{tokens / work.active:.0f}", f"{tokens * work.token_flops:.2e}",
            f"{loss:.2f} ({low:.2f} to {high:.2f})", f"{loss * bits:.2f} ({low * bits:.2f} to {high * bits:.2f})",
        ])  # fmt: skip
        for setup in SETUPS:
            step = advised_step(MODELS[name], work, setup, defaults, tokens, loss)
            steps = tokens / step.tokens
            card = next(c for c in CARDS if c.name == setup.card)
            cost = steps * step.seconds / 3600 * setup.cards * card.dollars
            runs.append([
                name, data, setup.name, f"`{step.flags}`", f"{step.tokens:,}", f"{steps:,.0f}",
                duration(steps * step.seconds), f"${cost:,.2f}", f"{step.seconds / step.compute - 1:.0%}",
            ])  # fmt: skip
    header = ["model", "data", "tokens", "tokens a parameter", "FLOPs", "loss, nats", "bits a byte"]
    return table(header, losses), table(
        ["model", "data", "cards", "flags", "tokens a step", "steps", "time", "cost", "on top of computing"], runs
    )


def steps_table(works: dict[str, Work], defaults) -> str:
    rows, total = [], defaults.batch_size * defaults.accumulation_steps
    for (name, work), setup in itertools.product(works.items(), SETUPS):
        size = split(max(1, total // setup.cards), defaults.batch_size)
        adamw, muon, zero = (
            step_of(MODELS[name], work, setup, *size, optimizer, zero)
            for optimizer, zero in (("adamw", False), ("muon", False), ("adamw", True))
        )
        times = [milliseconds(t) for t in (adamw.compute, adamw.network, adamw.optimizer, muon.optimizer)]
        divided = f"{milliseconds(zero.network)} + {milliseconds(zero.optimizer)}" if setup.cards > 1 else "-"
        rows.append([name, setup.name, f"`{adamw.flags}`", *times, divided])
    header = ["model", "cards", "flags", "computing", "network, not hidden", "AdamW", "Muon"]
    return table([*header, "`--zero_stage 1`: network + AdamW"], rows)


def first_table(works: dict[str, Work], defaults) -> str:
    rows = []
    for optimizer, (name, work), card in itertools.product(("adamw", "muon"), works.items(), WIRING):
        found = first_bottleneck(MODELS[name], work, card, defaults, optimizer)
        where = [f"`{optimizer}`", name, card]
        if found is None:
            rows.append([*where, f"none up to {MOST_CARDS}", "-", "-", "-", "-"])
            continue
        setup, step = found
        more = enough_rows(MODELS[name], work, setup, defaults, optimizer)
        plain, zero = (
            step_of(MODELS[name], work, setup, step.rows, step.accumulation, "adamw", zero) for zero in (False, True)
        )
        rows.append([
            *where, f"{setup.cards} ({setup.link})", largest_part(step), f"`{more.flags}`: {more.tokens:,} tokens",
            largest_part(plain) if optimizer != "adamw" else "-", largest_part(zero),
        ])  # fmt: skip
    header = ["optimizer", "model", "card", "cards", "first bottleneck", "removed by more rows a step"]
    return table([*header, "with `--optimizer adamw`", "and `--zero_stage 1`"], rows)


def largest_part(step: Step) -> str:
    name, share = step.worst
    return f"{name}, {share:.0%}"


def card_rate(name: str, work: Work, card: str, cards: int = 1) -> float:
    """Tokens a second of one card among so many that wait for nothing."""
    return peak_flops(card) * assumed_mfu(MODELS[name], cards) / work.token_flops


def network_table(works: dict[str, Work]) -> str:
    rows = [
        [
            name, setup.name, setup.link, f"{4 * work.parameters / 1e6:,.0f} MB",
            f"{milliseconds(setup.all_reduce(work.parameters))} ms", f"{hiding_rows(MODELS[name], work, setup)}",
        ]
        for (name, work), setup in itertools.product(works.items(), SETUPS)
        if setup.cards > 1
    ]  # fmt: skip
    return table(["model", "cards", "slowest link", "gradients", "all-reduce", "rows that hide it"], rows)


def hiding_rows(config: MiniMindConfig, work: Work, setup: Setup) -> int:
    """The fewest rows a micro-batch whose backward pass lasts as long as the all-reduce."""
    rate = peak_flops(setup.card) * assumed_mfu(config, setup.cards)
    return math.ceil(setup.all_reduce(work.parameters) * rate * 3 / 2 / (SEQ_LEN * work.token_flops))


def updates_table(works: dict[str, Work]) -> str:
    rows = []
    for (name, work), card in itertools.product(works.items(), WIRING):
        rate = peak_flops(card) * assumed_mfu(MODELS[name], 1)
        traffic, products = OPTIMIZER_BYTES * work.parameters / MEMORY_BANDWIDTH[card], work.muon_flops / rate
        tenth = [f"{seconds / BEARABLE * rate / work.token_flops:,.0f}" for seconds in (traffic, traffic + products)]
        flops = f"{work.muon_flops / 1e12:.2f} TFLOP, {milliseconds(products)} ms"
        rows.append([name, card, f"{milliseconds(traffic)} ms", flops, *tenth])
    header = ["model", "card", "traffic", "Muon's products", "tokens a card and step below which AdamW takes a tenth"]
    return table([*header, "the same, Muon"], rows)


def batches_table(curve: Curve, works: dict[str, Work], defaults) -> str:
    each = defaults.batch_size * defaults.accumulation_steps * SEQ_LEN
    rows = []
    for (name, work), (data, tokens) in itertools.product(works.items(), DATA.items()):
        steps = [f"{tokens / (each * cards):,.0f}" for cards in (1, 8, 64)]
        rows.append([name, data, *steps, f"{digits(critical_batch(curve.loss(work.active, tokens)) / 1e3)}K"])
    sizes = [f"steps with {cards}, {each * cards:,} tokens each" for cards in (1, 8, 64)]
    return table(["model", "data", *sizes, "critical batch, tokens"], rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=ROOT / "benchmarks" / "recipe_runs.jsonl", help="what recipe.py recorded")
    add("--output", type=Path, default=ROOT / "benchmarks" / "SCALING.md")
    add("--recipe", help="take runs of this recipe (default: the setting with the most sizes and budgets)")
    add("--learning_rate", type=float, help="take runs of this learning rate")
    add("--rows", type=int, help="take runs of this many rows a step")
    add("--min_steps", type=int, default=WARM_STEPS, help="leave shorter runs out (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.results.is_file():
        raise ValueError(f"--results {args.results} not found; `python benchmarks/recipe.py run --help` records runs")
    setting, points = select(read_results(args.results), args.results, args)
    beside = args.output.with_name(args.output.name + ".tmp")
    beside.write_text(page(setting, points, args.results), "utf-8")
    os.replace(beside, args.output)
    print(f"{args.output}: {len(points)} points of {describe(setting)}")


if __name__ == "__main__":
    run_script(main)
