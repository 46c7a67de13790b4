"""Per-token cross-entropy straight from hidden states: the float32 logits exist for one chunk of tokens at a time."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from model.model_minimind import compute_dtype
from trainer.loader import model_inputs

CHUNK = {"cpu": 1024, "cuda": 4096}  # tokens whose logits exist at once; a GPU wants few, large kernels
BLOCK = 128  # on a CPU: tokens whose float32 logits stay in its cache while the softmax passes over them
DISTRIBUTIONS = {"cpu": 512, "cuda": 2048}  # the same where a loss holds several float32 distributions of each token
ROUNDING = 256  # on a CPU the number of tokens with a target is rounded up to a multiple of this


def chunk_size(sizes: dict[str, int], tensor: torch.Tensor) -> int:
    return sizes.get(tensor.device.type, sizes["cpu"])


class _TokenCrossEntropy(torch.autograd.Function):
    """Saves the softmax in the compute dtype, half the bytes of float32 logits; the gradient is p - onehot(label)."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, keep_for_backward):
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        probabilities = []
        rows = chunk_size(CHUNK, hidden)
        block = BLOCK if hidden.device.type == "cpu" else rows
        for start in range(0, len(labels), rows):
            logits = hidden[start : start + rows] @ weight.t()
            for first in range(0, len(logits), block):
                part = logits[first : first + block]
                tokens = slice(start + first, start + first + len(part))
                target = part.gather(1, labels[tokens].clamp(min=0).unsqueeze(1)).float()
                largest = part.amax(dim=-1, keepdim=True).float()
                softmax = torch.softmax(part, dim=-1, dtype=torch.float32)
                # the largest probability is exp(0) / sum_j exp(logit_j - largest): the normaliser without another pass
                log_normaliser = largest - softmax.amax(dim=-1, keepdim=True).log()
                losses[tokens] = (log_normaliser - target).squeeze(1)
                if keep_for_backward:
                    part.copy_(softmax)
            if keep_for_backward:
                probabilities.append(logits)
        ctx.save_for_backward(hidden, weight, labels, *probabilities)
        return losses.masked_fill_(labels < 0, 0.0)

    @staticmethod
    def backward(ctx, grad_losses):
        hidden, weight, labels, *probabilities = ctx.saved_tensors
        grad_losses = grad_losses.masked_fill(labels < 0, 0.0)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # not with a frozen head
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        rows = chunk_size(CHUNK, hidden)
        for index, start in enumerate(range(0, len(labels), rows)):
            chunk = slice(start, start + rows)
            scale = grad_losses[chunk].unsqueeze(1).to(hidden.dtype)
            grad_logits = probabilities[index].mul_(scale)
            targets = labels[chunk].clamp(min=0)
            # not scatter_: on a CPU that goes through a float32 copy of everything
            grad_logits[torch.arange(len(targets), device=targets.device), targets] -= scale.squeeze(1)
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[chunk]
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(ctx.weight_dtype), None, None


def token_cross_entropy(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every token, in nats.

    hidden_states (batch, seq, hidden), weight (vocab, hidden), labels (batch, seq), -100 where nothing is predicted.
    Returns float32 (batch, seq), 0 where the label is -100. The log-probability of a token is minus its loss.
    """
    dtype = compute_dtype(hidden_states)
    flat_labels = labels.reshape(-1)
    training = torch.is_grad_enabled()  # inside a Function it is off
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type != "cpu":
            return _TokenCrossEntropy.apply(hidden, weight, flat_labels, training).view(labels.shape)
        # a CPU skips the logits of prompts and padding; a GPU would have to wait for their count
        targets = (flat_labels >= 0).nonzero().squeeze(1)
        count = len(targets)
        # rounded up: blocks of few distinct sizes; arbitrary ones would fragment the allocator's memory
        targets = torch.cat((targets, targets[-1:].expand(-count % ROUNDING)))
        labels_of_targets = flat_labels[targets]
        labels_of_targets[count:] = -100
        losses = _TokenCrossEntropy.apply(hidden[targets], weight, labels_of_targets, training)
        return torch.zeros(len(flat_labels)).index_copy(0, targets[:count], losses[:count]).view(labels.shape)


def token_chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices that cover `count` tokens: of `size`, then halved until the rest fits.

    Few distinct sizes keep the allocator's memory from fragmenting.
    """
    start = 0
    while start < count:
        while size > count - start and size > 16:
            size //= 2
        yield slice(start, min(start + size, count))
        start += size


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient of each chunk's logits right after its loss, so logits never outlive their chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, loss_of_logits, losses, with_gradient):
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = None
        if with_gradient and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        sums = torch.zeros(losses, device=hidden.device)
        for chunk in token_chunks(len(hidden), chunk_size(DISTRIBUTIONS, hidden)):
            with torch.set_grad_enabled(with_gradient):
                logits = (hidden[chunk].detach() @ weight.detach().t()).requires_grad_(with_gradient)
                parts = loss_of_logits(logits.float(), chunk)
                total = parts[0]
            sums += parts.detach()
            if with_gradient:
                (grad_logits,) = torch.autograd.grad(total, logits)
                grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight_dtype))
        return sums

    @staticmethod
    def backward(ctx, grad_sums):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = grad_weight if grad_weight is None else grad_weight * grad_sums[0]
        return grad_hidden * grad_sums[0].to(grad_hidden.dtype), grad_weight, None, None, None


def chunked_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    loss_of_logits: Callable[[torch.Tensor, slice], torch.Tensor],
    losses: int,
) -> torch.Tensor:
    """Return sums over tokens of losses that need whole distributions, with logits of DISTRIBUTIONS tokens at a time.

    hidden_states (tokens, hidden), weight (vocab, hidden). loss_of_logits(float32 logits (chunk, vocab), which tokens
    of hidden_states they are) -> sums over these tokens (losses,). Returns the totals (losses,); only the first has a
    gradient. The gradient is computed in the forward pass: backward scales it by what flows into the first total.
    """
    hidden = hidden_states.to(compute_dtype(hidden_states))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedLoss.apply(hidden, weight, loss_of_logits, losses, torch.is_grad_enabled())


def answer_log_probs(token_losses: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return summed log-probs and token counts of the answers, each (pairs, 2): chosen, rejected.

    token_losses (rows, seq): minus the log-prob of each target, 0 elsewhere. Documents 2p and 2p + 1 are pair p's.
    """
    documents = 2 * len(batch["pair_ids"])
    numbers = batch["document_ids"].flatten().long()
    # padding goes to an extra slot; torch.where would copy its number to the GPU and wait
    numbers = numbers.masked_fill(numbers < 0, documents)
    sums = token_losses.new_zeros(documents + 1).index_add(0, numbers, -token_losses.flatten())
    counts = token_losses.new_zeros(documents + 1).index_add(0, numbers, (batch["labels"] >= 0).flatten().float())
    return sums[:documents].view(-1, 2), counts[:documents].view(-1, 2)


def target_indices(batch: dict) -> torch.Tensor:
    """Return the indices of the targets in the flattened rows. Their number is known, so nothing waits for a GPU."""
    return (batch["labels"].flatten() >= 0).nonzero_static(size=batch["target_tokens"]).squeeze(1)


def forward_losses(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model; return the cross-entropy of every token, (rows, seq) in nats, and the balance loss."""
    head = functools.partial(token_cross_entropy, labels=batch["labels"])
    output = model(**model_inputs(batch), head=head)
    return output.head_output, output.aux_loss


def target_log_probs(model: nn.Module, batch: dict, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model; return log-probs (target_tokens,) of the targets, in nats, and the balance loss.

    The distribution is softmax(logits / temperature).
    """

    def head(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return token_cross_entropy(hidden_states / temperature, weight, batch["labels"])

    output = model(**model_inputs(batch), head=head)
    return -output.head_output.flatten()[target_indices(batch)], output.aux_loss
