"""Reason distillation: the model learns from a reasoning model's answers to think first, then answer.

    loss = sum(w * CE) / sum(m) + aux        (reason_loss below)

m is 1 on the assistant's content and the <|im_end|> that ends it, else 0. w is m, but --tag_weight (10) on the tags
<think> </think> <answer> </answer> in the assistant's content: few tokens that decide the form of an answer. CE is the
cross-entropy of the next token in nats; both sums run over the whole optimizer step. aux is the load-balancing loss of
a mixture of experts, as in train_pretrain.py.

Reads   {"conversations": [...]} a line, answers as <think>...</think><answer>...</answer> (--data_path, default
        dataset/r1_mix_1024.jsonl), out/rlhf_{hidden_size}{_moe}.pth (--base_weight)
Writes  out/reason_{hidden_size}{_moe}.pth and a .json next to it, out/resume/, out/logs/

    python train_distill_reason.py
    torchrun --nproc_per_node 8 train_distill_reason.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import numpy as np
import torch

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindForCausalLM
from model.weights import find_weights, load_weights
from trainer.arguments import chat_command, model_config, parse_arguments, run_script, stage_parser
from trainer.checkpoint import Checkpoint, output_path
from trainer.distributed import start_process, stop_on_signal, stop_process, sum_over_ranks
from trainer.evaluation import Evaluator
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.optimization import check_finite, learning_rate
from trainer.token_losses import forward_losses
from trainer.training import start_training

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def parse(argv: list[str] | None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/r1_mix_1024.jsonl",
        epochs=1,
        batch_size=8,
        accumulation_steps=1,
        learning_rate={"adamw": 1e-3},
        max_seq_len=1024,
    )
    add = parser.add_argument
    add("--tag_weight", type=float, default=10.0, help="weight of a tag's loss (default: %(default)s)")
    add("--base_weight", default="rlhf", help="stage or .pth file to start from (default: %(default)s)")
    return parse_arguments(parser, argv, tag_weight=(lambda weight: 0 <= weight < float("inf"), "0 or more"))


def target_weights(labels: torch.Tensor, tags: list[list[int]], tag_weight: float) -> torch.Tensor:
    """Return each position's loss weight: tag_weight if its target belongs to a tag, 1 on other targets, else 0.

    labels (rows, seq), -100 outside the assistant's content. tags: the ids of each tag; a tag of several ids counts
    only if all of them follow in order.
    """
    weights = (labels >= 0).float()
    for ids in tags:
        starts = labels.shape[1] - len(ids) + 1
        found = torch.stack([labels[:, i : starts + i] == token for i, token in enumerate(ids)]).all(dim=0)
        for i in range(len(ids)):
            weights[:, i : starts + i][found] = tag_weight
    return weights


def reason_loss(
    token_losses: torch.Tensor, weights: torch.Tensor, aux_loss: torch.Tensor, batch: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this micro-batch's share of the step's weighted cross-entropy and of its balance loss, in nats.

    token_losses and weights (rows, seq), 0 outside answers; aux_loss, the mean over the micro-batch's conversations.
    The denominator counts answer tokens without weights.
    """
    cross_entropy = (token_losses * weights).sum() / batch["step_targets"]
    return cross_entropy, aux_loss * batch["num_documents"] / batch["step_documents"]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = start_process(args)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    base = find_weights(args.base_weight, args.out_dir, args.hidden_size, args.use_moe)
    config = model_config(args, tokenizer.vocab_size, base)
    weights = output_path("reason", config, args, process)
    tags = tokenizer.encode_contents(list(TAGS))

    data = PackedData(args, "conversation", tokenizer, process)
    seen = set(np.unique(data.cache.tokens[: 1 << 22]).tolist())
    missing = [tag for tag, ids in zip(TAGS, tags, strict=True) if not seen.issuperset(ids)]
    if missing:
        process.say(f"note: {args.data_path} holds no {' '.join(missing)}; nothing in it teaches to think first")
    evaluator = Evaluator(args, "conversation", tokenizer, process)
    model = MiniMindForCausalLM(config).to(process.device)
    load_weights(model, base, tokenizer.sha256)
    training = start_training(model, args, process)
    checkpoint = Checkpoint(weights, "reason", args, process, tokenizer, data, base=base)
    progress = checkpoint.restore(training, fresh=f"starting from {base}")
    logger = Logger(checkpoint.name, args, training, data, progress)
    metrics = {}

    with stop_on_signal() as stop:
        for step, micro_batches in data.steps(progress.step, stop):
            # ---- one optimizer step ----
            losses = torch.zeros(2, device=process.device)
            for batch in micro_batches:
                with training.micro_batch(last=batch["last"]):
                    with training.autocast():
                        token_losses, aux_loss = forward_losses(training.forward, batch)
                        tag_weights = target_weights(batch["labels"], tags, args.tag_weight)
                        cross_entropy, aux_loss = reason_loss(token_losses, tag_weights, aux_loss, batch)
                    training.backward(cross_entropy + aux_loss)
                losses += torch.stack((cross_entropy, aux_loss)).detach()
            if stop.agreed(process):  # this step stays unfinished; the last one is saved
                checkpoint.save(training, progress, metrics)
                break
            cross_entropy, aux_loss = sum_over_ranks(losses.tolist(), process)
            check_finite(cross_entropy + aux_loss, step)
            lr = learning_rate(step, data.total_steps, args)
            grad_norm = training.step(lr)
            # ----------------------------
            progress.advance(batch, data.total_steps)
            logger.step(step, cross_entropy, lr, grad_norm, batch, aux_loss=aux_loss)
            metrics["loss"] = cross_entropy

            if progress.due(args.eval_interval):
                metrics |= evaluator.run(training, logger, progress.step)
            if checkpoint.due(progress):
                with logger.paused("saving"):
                    checkpoint.save(training, progress, metrics)
    logger.close(weights, progress, chat_command(args, "reason"))
    stop_process(stop, progress.complete)


if __name__ == "__main__":
    run_script(main)
