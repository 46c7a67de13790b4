"""How long an optimizer step takes on 1, 8 and 64 cards, and what network, optimizer and loader add to the computing.

    python benchmarks/lab/many_cards.py        prints the tables of docs/scaling.md

All of it is arithmetic on data sheets and on the share of the peak that --estimate assumes; none was measured.
"""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import peers
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.cost import attention_flops, count_parameters, flops_per_token
from trainer.estimate import CARDS, assumed_mfu

SEQ_LEN = 512
MODELS = {name: MiniMindConfig(**sizes) for name, sizes in peers.MODELS.items()}
ROWS, ACCUMULATION = 32, 8  # train_pretrain.py on one card; many cards share these 131,072 tokens

LOADER_TOKENS = 27e6  # packed tokens per second and process: the lowest in RESULTS.md, "Data path"
MEMORY_BANDWIDTH = {"RTX 4090": 1008e9, "H100 SXM": 3350e9}  # bytes per second, the makers' data sheets
# Bytes per second in one direction. PCIe 4.0 x16 carries 31.5 GB/s; consumer cards cannot read each other's memory, so
# every byte passes through the host and the rate halves. Ethernet: one port per machine, which a ring crosses once.
LINKS = {"PCIe 4.0 x16": 31.5e9 / 2, "NVLink 4": 450e9, "100 Gb Ethernet": 12.5e9, "400 Gb Ethernet": 50e9}
REACHED = 0.8  # of these rates, assumed
WIRING = {  # within a machine of eight cards, and between machines
    "RTX 4090": ("PCIe 4.0 x16", "100 Gb Ethernet"),
    "H100 SXM": ("NVLink 4", "400 Gb Ethernet"),
}
CARDS_PER_MACHINE = 8
# Bytes per parameter, float32: AdamW reads weight, gradient and two moments and writes three of them (28); clipping
# reads the gradient, reads it again and writes it (12). Muon's state is smaller; it is counted the same.
OPTIMIZER_BYTES = 40


@dataclass(frozen=True)
class Setup:
    card: str
    cards: int

    @property
    def name(self) -> str:
        return f"{self.cards} × {self.card}" if self.cards > 1 else self.card

    @property
    def link(self) -> str:
        """Return the slowest link that the gradients cross."""
        return WIRING[self.card][self.cards > CARDS_PER_MACHINE]

    def rate(self, config: MiniMindConfig) -> float:
        """Operations per second of one card in training."""
        return next(c.teraflops for c in CARDS if c.name == self.card) * 1e12 * assumed_mfu(config, self.cards)

    def all_reduce(self, parameters: int) -> float:
        """Seconds for float32 gradients to go around a ring: each card sends 2 (n - 1) / n of them. No latency."""
        return 2 * (self.cards - 1) / self.cards * 4 * parameters / (LINKS[self.link] * REACHED)


SETUPS = (
    Setup("RTX 4090", 1),
    Setup("RTX 4090", 8),
    Setup("RTX 4090", 64),
    Setup("H100 SXM", 8),
    Setup("H100 SXM", 64),
)


@dataclass(frozen=True)
class Work:
    """What one token and one optimizer step of a model cost."""

    parameters: int
    active: int
    token_flops: float
    muon_flops: float


def muon_flops(rows: int, columns: int, iterations: int = 5) -> float:
    """Newton-Schulz of one matrix, m its shorter side: X X^T (2 m² n), its square (2 m³), times X (2 m² n), each
    iteration (arXiv:2502.16982, section 2.1; five are torch.optim.Muon's default)."""
    m, n = min(rows, columns), max(rows, columns)
    return iterations * (4 * m * m * n + 2 * m**3)


def work_of(config: MiniMindConfig) -> Work:
    """Attention is counted for rows of one document, in which a token sees (512 + 1) / 2 positions on average."""
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    parameters = count_parameters(model)[0]
    weights = flops_per_token(config, parameters)
    flops = weights + attention_flops(config, 1) * (SEQ_LEN + 1) / 2
    products = sum(muon_flops(*p.shape) for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    return Work(parameters, round(weights / 6), flops, products)


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step: what the cards compute, and what is added to it."""

    tokens: int  # of all cards
    compute: float
    network: float  # the part of the all-reduce that the last backward pass does not hide
    optimizer: float  # memory traffic, and Muon's products
    loader: float  # waiting for batches


def step_of(
    config: MiniMindConfig, work: Work, setup: Setup, rows: int, accumulation: int, optimizer: str, zero: bool = False
) -> Step:
    """Gradients travel during the backward pass of the last micro-batch, which is two thirds of its time. Each card
    computes Muon's products for itself, at the same share of the peak as the model's. With ZeRO stage 1 each card
    updates its part and then gathers the others': half of the traffic, hidden by nothing.
    """
    rate = setup.rate(config)
    micro = rows * SEQ_LEN * work.token_flops / rate
    travel = setup.all_reduce(work.parameters)
    reduced = travel / 2 if zero else travel
    network = max(0.0, reduced - micro * 2 / 3) + (travel - reduced)
    update = OPTIMIZER_BYTES * work.parameters / (setup.cards if zero else 1) / MEMORY_BANDWIDTH[setup.card]
    update += work.muon_flops / rate if optimizer == "muon" else 0.0
    compute = accumulation * micro
    waiting = max(0.0, accumulation * rows * SEQ_LEN / LOADER_TOKENS - compute)
    return Step(setup.cards * accumulation * rows * SEQ_LEN, compute, network, update, waiting)


def hiding_rows(config: MiniMindConfig, work: Work, setup: Setup) -> int:
    """Return the fewest rows in a micro-batch whose backward pass lasts as long as the all-reduce."""
    row = SEQ_LEN * work.token_flops / setup.rate(config)
    return math.ceil(setup.all_reduce(work.parameters) * 3 / 2 / row)


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def milliseconds(seconds: float) -> str:
    return f"{float(f'{seconds * 1e3:.2g}'):,g}"


def steps_table() -> str:
    rows = []
    for (name, config), setup in itertools.product(MODELS.items(), SETUPS):
        work, total = work_of(config), ROWS * ACCUMULATION // setup.cards
        size = min(total, ROWS), math.ceil(total / ROWS)
        kinds = (("adamw", False), ("muon", False), ("adamw", True))
        adamw, muon, zero = (step_of(config, work, setup, *size, optimizer, zero) for optimizer, zero in kinds)
        times = [milliseconds(t) for t in (adamw.compute, adamw.network, adamw.optimizer, muon.optimizer)]
        divided = f"{milliseconds(zero.network)} + {milliseconds(zero.optimizer)}" if setup.cards > 1 else "-"
        flags = "`--batch_size {} --accumulation_steps {}`".format(*size)
        rows.append([name, setup.name, flags, *times, divided])
    header = ["model", "cards", "flags", "computing", "network, not hidden", "AdamW", "Muon"]
    return table([*header, "`--zero_stage 1`: network + AdamW"], rows)


def network_table() -> str:
    rows = []
    for (name, config), setup in itertools.product(MODELS.items(), SETUPS[1:]):
        work = work_of(config)
        travel = f"{milliseconds(setup.all_reduce(work.parameters))} ms"
        size = f"{4 * work.parameters / 1e6:,.0f} MB"
        rows.append([name, setup.name, setup.link, size, travel, f"{hiding_rows(config, work, setup)}"])
    return table(["model", "cards", "slowest link", "gradients", "all-reduce", "rows that hide it"], rows)


if __name__ == "__main__":
    print(f"{steps_table()}\n\n{network_table()}")
