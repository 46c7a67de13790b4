"""Supervised fine-tuning (SFT) of all weights: the pretrained model learns to answer.

    loss = sum(w * CE) / sum(w) + aux        (sft_loss below)

w is 1 on the assistant's content and the <|im_end|> that ends it, else 0; CE is the cross-entropy of the next token
in nats. Both sums run over the whole optimizer step. aux is the load-balancing loss of a mixture of experts, as in
train_pretrain.py.

The learning rate departs from the original's 5e-7, which hardly moves the weights: held-out losses of both are in
benchmarks/RESULTS.md.

Reads   {"conversations": [{"role": ..., "content": ...}, ...]} a line (--data_path,
        default dataset/sft_mini_512.jsonl), out/pretrain_{hidden_size}{_moe}.pth (--base_weight)
Writes  out/full_sft_{hidden_size}{_moe}.pth and a .json next to it, out/resume/, out/logs/

    python train_full_sft.py
    torchrun --nproc_per_node 8 train_full_sft.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import torch

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_weights
from trainer.arguments import chat_command, find_base, model_config, parse_arguments, run_script, stage_parser
from trainer.checkpoint import Checkpoint, output_path
from trainer.distributed import start_process, stop_on_signal, stop_process, sum_over_ranks
from trainer.evaluation import Evaluator
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.optimization import check_finite, learning_rate
from trainer.token_losses import forward_losses
from trainer.training import start_training


def parse(argv: list[str] | None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/sft_mini_512.jsonl",
        epochs=2,
        batch_size=16,
        accumulation_steps=1,
        learning_rate={"adamw": 5e-4, "muon": 1e-3},
        max_seq_len=512,
    )
    said = "stage or .pth file to start from, none: random weights"
    parser.add_argument("--base_weight", default="pretrain", help=said)
    return parse_arguments(parser, argv)


def sft_loss(token_losses: torch.Tensor, aux_loss: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this micro-batch's share of the step's cross-entropy per answer token and of its balance loss, in nats.

    token_losses (rows, seq), 0 outside the answers; aux_loss, the mean over the micro-batch's conversations.
    """
    return token_losses.sum() / batch["step_targets"], aux_loss * batch["num_documents"] / batch["step_documents"]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = start_process(args)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    base = find_base(args)
    config = model_config(args, tokenizer.vocab_size, base)
    weights = output_path("full_sft", config, args, process)

    data = PackedData(args, "conversation", tokenizer, process)
    evaluator = Evaluator(args, "conversation", tokenizer, process)
    model = MiniMindForCausalLM(config).to(process.device)
    if base:
        load_weights(model, base, tokenizer.sha256)
    training = start_training(model, args, process)
    checkpoint = Checkpoint(weights, "full_sft", args, process, tokenizer, data, base=base)
    progress = checkpoint.restore(training, fresh=f"starting from {base or 'random weights'}")
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
                        cross_entropy, aux_loss = sft_loss(token_losses, aux_loss, batch)
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
    logger.close(weights, progress, chat_command(args, "full_sft"))
    stop_process(stop, progress.complete)


if __name__ == "__main__":
    run_script(main)
