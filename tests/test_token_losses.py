"""Cross-entropy per token from hidden states: equal to torch's own, and without the logits of all tokens at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import token_losses
from trainer.token_losses import token_cross_entropy

BATCH, SEQ, HIDDEN, VOCAB = 3, 11, 16, 53


def example(targets: str = "some", dtype=torch.float32):
    """Hidden states, head and labels; and a weight for every token, so that gradients differ from token to token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    if targets == "some":
        labels[torch.rand(BATCH, SEQ, generator=generator) < 0.4] = -100
    elif targets == "none":
        labels.fill_(-100)
    return hidden, weight, labels, torch.rand(BATCH, SEQ, generator=generator)


def torch_losses(hidden, weight, labels):
    logits = (hidden @ weight.t()).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape)


# of 33 tokens: many chunks, a ragged last one, exactly one, room to spare
@pytest.mark.parametrize("chunk", [1, 4, 33, 1024])
@pytest.mark.parametrize("targets", ["all", "some", "none"])
def test_losses_and_gradients_are_those_of_torch(monkeypatch, chunk, targets):
    monkeypatch.setattr(token_losses, "CHUNK", {"cpu": chunk})
    hidden, weight, labels, scale = example(targets)
    expected = torch_losses(hidden, weight, labels)
    expected_grads = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    losses = token_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    assert losses.shape == labels.shape and losses.dtype == torch.float32
    assert bool((losses[labels < 0] == 0).all())
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_the_path_without_selection_of_targets_is_equal(monkeypatch, chunk):
    """Devices other than the CPU keep the tokens without a target and set their losses and gradients to zero."""
    monkeypatch.setattr(token_losses, "CHUNK", {"cpu": chunk})
    hidden, weight, labels, scale = example()
    losses = token_losses._TokenCrossEntropy.apply(hidden.flatten(0, 1), weight, labels.flatten(), True)
    losses = losses.view(labels.shape)
    grads = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    expected = torch_losses(hidden, weight, labels)
    expected_grads = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    torch.testing.assert_close((losses, *grads), (expected, *expected_grads), rtol=1e-6, atol=1e-6)


def test_a_loss_that_is_not_finite_spoils_no_other_token():
    hidden, weight, labels, _ = example()
    labels[0, 0] = -100
    hidden = hidden.detach().clone()
    hidden[0, 0] = torch.nan
    losses = token_cross_entropy(hidden.requires_grad_(), weight, labels)
    (grad,) = torch.autograd.grad(losses.sum(), weight)
    assert bool(losses.isfinite().all()) and bool(grad.isfinite().all())


def test_bfloat16_is_close_to_float32():
    hidden, weight, labels, scale = example()
    expected = torch_losses(hidden, weight, labels)
    expected_grads = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    assert losses.dtype == torch.float32 and [grad.dtype for grad in grads] == [torch.float32] * 2
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.05)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


class Operations(TorchDispatchMode):
    """Names and output sizes of all operations inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.append((function.name(), result.numel() if isinstance(result, torch.Tensor) else 0))
        return result


def test_without_gradients_nothing_is_kept(monkeypatch):
    """Evaluation needs no softmax, though the head's weight is a parameter."""
    monkeypatch.setattr(token_losses, "CHUNK", {"cpu": 4})
    monkeypatch.setattr(token_losses, "ROUNDING", 4)
    hidden, weight, labels, _ = example("all")
    with torch.no_grad(), Operations() as operations:
        losses = token_cross_entropy(hidden, weight, labels)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, torch_losses(hidden, weight, labels).detach(), rtol=1e-6, atol=1e-6)
    assert not [name for name, _ in operations.seen if "exp_" in name and "logsumexp" not in name]
    assert max(size for _, size in operations.seen) < BATCH * SEQ * VOCAB


def test_logits_exist_for_one_chunk_at_a_time_and_for_targets_only(monkeypatch):
    monkeypatch.setattr(token_losses, "CHUNK", {"cpu": 4})
    monkeypatch.setattr(token_losses, "ROUNDING", 2)
    hidden, weight, labels, _ = example()
    with Operations() as operations:
        token_cross_entropy(hidden, weight, labels).sum().backward()
    products = [size for name, size in operations.seen if name == "aten::mm" and size % VOCAB == 0]
    products = [size for size in products if size != HIDDEN * VOCAB]  # that is the gradient of the head
    assert max(products) <= 4 * VOCAB
    targets = int((labels >= 0).sum())
    assert sum(products) == (targets + targets % 2) * VOCAB
