"""Log-probs of answers, those of DPO's frozen reference (computed once, kept on disk), and the loss from both."""

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataset.tokenization import ChatTokenizer
from model.decoder import to_device
from model.weights import load_model
from trainer.checkpoint import file_sha256
from trainer.distributed import Process
from trainer.frozen_outputs import FrozenOutputs, missing_batches
from trainer.loader import PackedData, model_inputs
from trainer.optimization import Precision
from trainer.token_losses import token_cross_entropy

METRICS = ("loss", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "kl")


def answer_log_probs(token_losses: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probs and token counts of the answers, each (pairs, 2): chosen, rejected.

    token_losses (rows, seq): minus the log-prob of each target, 0 elsewhere. Documents 2p and 2p + 1 are pair p's.
    """
    documents = 2 * len(batch["pair_ids"])
    numbers = batch["document_ids"].flatten().long()
    # padding goes to an extra place (torch.where would copy this number to a GPU and wait)
    numbers = numbers.masked_fill(numbers < 0, documents)
    sums = token_losses.new_zeros(documents + 1).index_add(0, numbers, -token_losses.flatten())
    counts = token_losses.new_zeros(documents + 1).index_add(0, numbers, (batch["labels"] >= 0).flatten().float())
    return sums[:documents].view(-1, 2), counts[:documents].view(-1, 2)


@torch.no_grad()
def reference_log_probs(
    path: Path, data: PackedData, tokenizer: ChatTokenizer, precision: Precision, process: Process
) -> np.ndarray:
    """Log-probs of a file's answers under the reference, (pairs, 2), of those that the run looks at; from disk as far
    as they are there."""
    identity = {
        "weights": file_sha256(path), "data": data.fingerprint(), "precision": precision.name,
        "max_seq_len": data.args.max_seq_len,
    }  # fmt: skip
    shapes = {"log_probs": ((data.plan.num_rows, 2), np.float32)}
    place = data.args.cache_dir / f"{data.path.stem}-reference"
    outputs = FrozenOutputs(place, identity, data.plan.num_rows, shapes, process)
    data.stores["log-probs"] = outputs.bytes
    if outputs.complete:
        return outputs.arrays["log_probs"]
    model = load_model(path, tokenizer.sha256)[0].to(process.device)
    for batch in missing_batches(data, f"log-probs of {path.name}", outputs, "pair_ids"):
        pairs = batch["pair_ids"].numpy()
        with precision.autocast():
            head = functools.partial(token_cross_entropy, labels=batch["labels"])
            log_probs, _ = answer_log_probs(model(**model_inputs(batch), head=head).head_output, batch)
        outputs.write(pairs, pairs, log_probs=log_probs.cpu().numpy())
    if not data.args.estimate:  # an estimate leaves it all to the run
        outputs.finish(data.looked_at_in_part)
    return outputs.arrays["log_probs"]


def dpo_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair and its reward margin, both (pairs,); a reward is beta * (logpi - logref), in nats.

    policy, reference (pairs, 2): log-probs of the chosen and the rejected answer.
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, margin


def preference_loss(
    token_losses: torch.Tensor, batch: dict, reference: np.ndarray, args
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed DPO loss of the micro-batch's pairs, and the sums of METRICS over them."""
    policy, counts = answer_log_probs(token_losses, batch)
    frozen = to_device(reference[batch["pair_ids"].numpy()], policy.device)
    drift = (policy.detach() - frozen) / counts
    if args.logp == "mean":
        policy, frozen = policy / counts, frozen / counts
    loss, margin = dpo_loss(policy, frozen, args.beta, args.label_smoothing)
    correct = (margin > 0).float() + 0.5 * (margin == 0)
    # the mean of log(pi / ref) per token, over the data's answers in place of samples of the model's own
    metrics = (loss, margin, correct, policy[:, 0], policy[:, 1], drift.mean(dim=1))
    return loss.sum(), torch.stack([metric.detach().sum() for metric in metrics])
