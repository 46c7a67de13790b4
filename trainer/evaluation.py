"""Held-out loss, bits per byte, and a sample: they show whether training works."""

import argparse
import math
from collections.abc import Callable

import torch
from torch import nn

from dataset.tokenization import ChatTokenizer
from model.device import where_float64_is
from model.generation import SamplingParams, stream
from trainer.distributed import Process, refuse_differing, sum_over_ranks
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.optimization import Precision
from trainer.token_losses import forward_losses
from trainer.training import Training


@torch.no_grad()
def evaluate(
    model: nn.Module, data: PackedData, precision: Precision, process: Process, tokenizer: ChatTokenizer
) -> dict[str, float]:
    """Return valid_loss, in nats per target token, and bits_per_byte, which is comparable between tokenizers."""
    # UTF-8 bytes of text that each id stands for; control tokens stand for none
    sizes = [len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)]
    byte_counts = torch.tensor(sizes, device=process.device)
    nats = torch.zeros((), dtype=torch.float64, device=where_float64_is(process.device))
    num_bytes = torch.zeros((), dtype=torch.int64, device=process.device)
    targets = 0
    was_training = model.training
    model.eval()
    for batch in data.once():
        labels = batch["labels"]
        with precision.autocast():
            nats += forward_losses(model, batch)[0].to(nats.device).sum(dtype=torch.float64)
        num_bytes += (byte_counts[labels.clamp(min=0)] * (labels >= 0)).sum()
        targets += batch["target_tokens"]
    model.train(was_training)
    nats, num_bytes, targets = sum_over_ranks([float(nats), float(num_bytes), float(targets)], process)
    return {"valid_loss": nats / targets, "bits_per_byte": nats / math.log(2) / max(num_bytes, 1)}


@torch.no_grad()
def sample_text(
    model: nn.Module, tokenizer: ChatTokenizer, precision: Precision, prompt_ids: list[int], max_new_tokens: int = 64
) -> str:
    """Return the model's greedy continuation of a prompt."""
    was_training = model.training
    model.eval()
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, stop_ids=(tokenizer.eos_id,))
    # each new length would trigger a recompile and exhaust the limit
    with torch.compiler.set_stance("force_eager"), precision.autocast():
        text = tokenizer.decode(list(stream(model, prompt_ids, params)))
    model.train(was_training)
    return text


class Evaluator:
    """Carries out --valid_path and --sample_prompt, every --eval_interval steps and at the end."""

    def __init__(self, args: argparse.Namespace, kind: str, tokenizer: ChatTokenizer, process: Process):
        self.tokenizer, self.process = tokenizer, process
        self.data = PackedData(args, kind, tokenizer, process, args.valid_path) if args.valid_path else None
        if self.data is not None:
            refuse_differing({f"held-out {name}": value for name, value in self.data.fingerprint().items()}, process)
        self.prompt, self.prompt_ids = args.sample_prompt, []
        if args.sample_prompt and kind == "pretrain":
            self.prompt_ids = tokenizer.encode_beginning(args.sample_prompt)
        elif args.sample_prompt:
            self.prompt_ids = tokenizer.encode_prompt([{"role": "user", "content": args.sample_prompt}])

    def run(self, training: Training, logger: Logger, step: int, measure: Callable = evaluate) -> dict[str, float]:
        """Evaluate, log and return the held-out metrics; {} if there is nothing to evaluate.

        measure: the function that computes them, with evaluate's arguments.
        """
        metrics, sample, precision = {}, "", training.precision
        with logger.paused("evaluating"):
            if self.data is not None:
                metrics = measure(training.model, self.data, precision, self.process, self.tokenizer)
            if self.prompt_ids:
                with training.whole_weights() as model:
                    if self.process.is_main:
                        text = sample_text(model, self.tokenizer, precision, self.prompt_ids)
                        sample = f"{self.prompt!r} -> {text!r}"
        if metrics or sample:
            logger.evaluation(step, metrics, sample)
        return metrics
