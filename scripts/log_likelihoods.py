"""Log-likelihoods of many continuations, in one pass over each distinct prefix.

Sequences that begin alike form a tree: worked examples are shared by the questions of a subject, a question by its
options. A row holds a part of that tree in depth-first order, so each token's descendants follow it without a gap:

    place      0 1 2 3 4 5 6
    token      Q u ? A B b C         the sequences Qu?A, Qu?Bb, Qu?C
    position   0 1 2 3 3 4 3
    end        7 7 7 4 6 6 7         one past the last descendant

A token attends to place p if p is not after it and it comes before end[p]: these are its ancestors and itself. There is
no padding, and logits exist only where an option's tokens are predicted.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from model.batching import common_prefix

LONGEST_ROW = 8192  # tokens, unless one sequence has more: attention takes their square
Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context (one at least) and of its continuation


class Row(NamedTuple):
    """A part of the tree. targets: (place of the token before, id, number of the pair) of every scored token."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    targets: list[tuple[int, int, int]]


def lay_out(pairs: Sequence[Pair], longest: int) -> Iterator[Row]:
    """Yield rows of at most `longest` tokens (more if one sequence has more) that hold all pairs."""
    row, path, before = Row([], [], [], []), [], []  # path: places of the tokens of the sequence laid out last
    for number in sorted(range(len(pairs)), key=lambda n: [*pairs[n][0], *pairs[n][1]]):
        context, continuation = pairs[number]
        sequence = [*context, *continuation[:-1]]  # the last token is only predicted
        shared = common_prefix(before, sequence)
        if row.ids and len(row.ids) + len(sequence) - shared > longest:
            _close(row, path)
            yield row
            row, path, shared = Row([], [], [], []), [], 0
        _close(row, path[shared:])
        path[shared:] = range(len(row.ids), len(row.ids) + len(sequence) - shared)
        row.ids.extend(sequence[shared:])
        row.positions.extend(range(shared, len(sequence)))
        row.ends.extend([0] * (len(sequence) - shared))
        row.targets.extend((path[len(context) - 1 + i], token, number) for i, token in enumerate(continuation))
        before = sequence
    if row.ids:
        _close(row, path)
        yield row


def _close(row: Row, places: Sequence[int]) -> None:
    for place in places:
        row.ends[place] = len(row.ids)


@torch.inference_mode()
def log_likelihoods(model: nn.Module, pairs: Sequence[Pair], longest: int = 1024) -> list[float]:
    """Return the log-probability of each continuation after its context, summed over its tokens, in nats."""
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    device = next(model.parameters()).device
    whole = max((len(c) + len(o) for c, o in pairs), default=0)
    for row in lay_out(pairs, max(longest, min(6 * whole, LONGEST_ROW))):
        ids, positions, ends = (torch.tensor(values, device=device) for values in row[:3])
        place = torch.arange(len(row.ids), device=device)
        mask = (place <= place.unsqueeze(1)) & (ends > place.unsqueeze(1))  # (queries, keys)
        places, tokens, numbers = torch.tensor(row.targets, device=device).unbind(1)
        asked, which = places.unique(return_inverse=True)
        logits = model(
            input_ids=ids[None], position_ids=positions[None], attention_mask=mask[None, None],
            logits_to_keep=asked, use_cache=False,
        ).logits[0]  # fmt: skip
        log_probs = logits.float().log_softmax(dim=-1)[which, tokens]
        sums.index_add_(0, numbers.cpu(), log_probs.cpu().double())
    if not sums.isfinite().all():
        raise ValueError("the log-probs are not finite: the weights are broken, or --dtype is too narrow for them")
    return sums.tolist()


def log_likelihoods_of_server(client, model: str, pairs: Sequence[Pair], batch: int = 32) -> list[float]:
    """Return the same from an OpenAI-compatible server that echoes prompts of token ids with log-probs."""
    sums = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        prompts = [[*context, *continuation] for context, continuation in part]
        answer = client.completions.create(
            model=model, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        for choice, (context, continuation) in zip(sorted(answer.choices, key=lambda c: c.index), part, strict=True):
            found = choice.logprobs.token_logprobs if choice.logprobs else []
            if len(found) < len(context) + len(continuation):
                raise ValueError(f"{client.base_url} gives no log-probs of a prompt; it must know echo and logprobs")
            sums.append(sum(found[len(context) : len(context) + len(continuation)]))
    return sums
