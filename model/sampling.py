"""Choose tokens: penalties, temperature, top-k, top-p and min-p of many rows at once, each with its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class GrammarError(ValueError):
    """A grammar cannot be followed any further, because it is too complex."""


class Grammar(Protocol):
    """Restricts an answer's tokens: allowed returns a mask (vocab,) on the CPU, advance takes the chosen token."""

    def allowed(self, vocab_size: int) -> torch.Tensor: ...

    def advance(self, token_id: int) -> None: ...


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    temperature: 0 = greedy.
    top_k: only the k most likely tokens, 0 = all.
    top_p: only the most likely tokens that together reach this probability, 1 = all.
    min_p: only tokens whose probability is at least this share of the highest, 0 = all (arXiv:2407.01082).
    repetition_penalty: > 1 makes tokens of prompt and answer less likely to come again (arXiv:1909.05858, section 4.1).
    presence_penalty, frequency_penalty: subtracted from the logits of tokens already in the answer: once (presence),
        once per occurrence (frequency), as OpenAI defines them.
    max_new_tokens: an answer also ends where the context does.
    min_new_tokens: stop_ids are not chosen before an answer has this many tokens.
    stop_ids: ids that end an answer.
    seed: None draws a new one each time.
    logprobs: None = none; k = the log-probability of each chosen token and of the k most likely, in the model's own
        distribution: before penalties, temperature and the rest.
    grammar: makes a Grammar for each answer, which decides when it may end; min_new_tokens is then ignored.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop_ids: tuple[int, ...] = (2,)
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    min_new_tokens: int = 0
    grammar: Callable[[], Grammar] | None = None

    def __post_init__(self):
        infinite = float("inf")
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < infinite, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < infinite, "above 0"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) < infinite, "a finite number"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) < infinite, "a finite number"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "0 or more"),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "0 or more"),
        )
        wrong = [f"--{name} is {value}, and must be {rule}" for name, value, good, rule in checks if not good]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingRows:
    """The parameters of many rows as columns, (rows, 1), on the device of their logits."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu"):
        def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor([[getattr(p, name)] for p in params], dtype=dtype, device=device)

        self.greedy = column("temperature") == 0
        self.temperature = column("temperature").masked_fill(self.greedy, 1.0)
        self.top_k, self.top_p, self.min_p = column("top_k", torch.int64), column("top_p"), column("min_p")
        self.repetition_penalty = column("repetition_penalty")
        self.presence_penalty, self.frequency_penalty = column("presence_penalty"), column("frequency_penalty")
        greedy = [np.float32(p.temperature) == 0 for p in params]  # as the column has it
        self.all_greedy, self.any_greedy = all(greedy), any(greedy)
        self.cut = _indices([p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params], device)
        self.penalised = _indices([p.penalises for p in params], device)


def _indices(chosen: list[bool], device) -> torch.Tensor | None:
    """Return the indices of the chosen rows, or None if there are none."""
    found = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    return torch.tensor(found, device=device) if found else None


def penalise(logits: torch.Tensor, rows: SamplingRows, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return logits (rows, vocab) after the penalties of the rows in rows.penalised.

    seen (penalised, vocab) bool: tokens of prompt and answer. counts (penalised, vocab) float32: how often the answer
    holds each.
    """
    which = rows.penalised
    raw, repetition = logits[which], rows.repetition_penalty[which]
    # Dividing a negative logit would make the token more likely.
    repeated = torch.where(raw > 0, raw / repetition, raw * repetition)
    penalised = torch.where(seen, repeated, raw)
    penalised -= rows.frequency_penalty[which] * counts
    penalised -= rows.presence_penalty[which] * (counts > 0)
    return logits.index_copy(0, which, penalised)


def choose(logits: torch.Tensor, rows: SamplingRows, draws: torch.Tensor) -> torch.Tensor:
    """Choose one token per row: logits (rows, vocab) float32 after penalties, draws (rows, 1) float64 in [0, 1).

    Order: temperature, top_k, top_p, min_p. Tokens as likely as the last one kept are kept, too. A row's token depends
    on its own logits, parameters and draw alone. Returns (rows,).
    """
    if rows.all_greedy:
        return logits.argmax(dim=-1)
    # Relative to the largest logit, so that a tiny temperature cannot overflow.
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / rows.temperature).exp_()
    if rows.cut is not None:
        part = weights[rows.cut]
        part.masked_fill_(part < _smallest_kept(part, *(c[rows.cut] for c in (rows.top_k, rows.top_p, rows.min_p))), 0)
        weights.index_copy_(0, rows.cut, part)
    # The first token whose cumulative weight exceeds draw · total. Float64, so that small weights count.
    cumulative = weights.double().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    if rows.any_greedy:
        drawn = torch.where(rows.greedy, logits.argmax(dim=-1, keepdim=True), drawn)
    return drawn.squeeze(1)


def _smallest_kept(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor):
    """Return the weight (rows, 1) below which tokens are dropped, given weights (rows, vocab) of 1 at most."""
    ordered = _descending(weights)
    cumulative = ordered.double().cumsum(dim=-1)
    last = torch.where(top_k > 0, top_k, weights.shape[1]).clamp(max=weights.shape[1]) - 1
    total = cumulative.gather(1, last)
    # A token is kept if those before it do not reach top_p; the first has none before it, so it is always kept.
    reached = (cumulative < top_p * total).sum(dim=-1, keepdim=True)
    last = torch.where(top_p < 1, torch.minimum(last, reached), last)
    return torch.maximum(ordered.gather(1, last), min_p)


def _descending(weights: torch.Tensor) -> torch.Tensor:
    if weights.device.type != "cpu":
        return weights.sort(dim=-1, descending=True).values
    # An order of magnitude faster than torch's sort on a CPU.
    return torch.from_numpy(-np.sort(-weights.numpy(), axis=-1))
