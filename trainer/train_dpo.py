"""Direct preference optimisation (DPO, arXiv:2305.18290): chosen answers become more likely than rejected ones.

    loss = -log sigmoid(beta * ((logpi_c - logpi_r) - (logref_c - logref_r))) + aux     (dpo_loss below)

(Equation 7, the mean over pairs.) logpi_c and logpi_r are the log-probs of the chosen and the rejected answer under the
model, logref those under the frozen reference: summed over the answer's tokens as in the paper (--logp sum), or
averaged (--logp mean). Label smoothing e counts a share e of the pairs as labelled the wrong way round:
(1 - e) * loss(margin) + e * loss(-margin).
aux is the load-balancing loss of a mixture of experts, as in train_pretrain.py.

The reference's log-probs do not change, so they are computed once and kept on disk: training holds one model.

Reads   {"chosen": [turns], "rejected": [turns]} a line (--data_path, default dataset/dpo.jsonl),
        out/full_sft_{hidden_size}{_moe}.pth (--base_weight; the reference too, unless --reference_weight is given)
Writes  out/rlhf_{hidden_size}{_moe}.pth and a .json next to it, out/resume/, out/logs/, log-probs in out/token_cache/

    python train_dpo.py
    torchrun --nproc_per_node 8 train_dpo.py
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import numpy as np
import torch
import torch.nn.functional as F

from dataset.tokenization import ChatTokenizer
from model.device import to_device
from model.model_minimind import MiniMindForCausalLM
from model.weights import find_weights, load_weights
from trainer.arguments import chat_command, model_config, parse_arguments, run_script, stage_parser
from trainer.checkpoint import Checkpoint, output_path
from trainer.distributed import start_process, stop_on_signal, stop_process, sum_over_ranks
from trainer.evaluation import Evaluator
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.optimization import check_finite, learning_rate
from trainer.reference import reference_log_probs
from trainer.token_losses import answer_log_probs, forward_losses
from trainer.training import start_training

METRICS = ("loss", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "kl")


def parse(argv: list[str] | None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/dpo.jsonl",
        epochs=2,
        batch_size=4,
        accumulation_steps=1,
        learning_rate={"adamw": 2e-5},
        max_seq_len=1024,
    )
    add = parser.add_argument
    add("--beta", type=float, default=0.1, help="how strongly the reference holds the model (default: %(default)s)")
    add("--logp", choices=("sum", "mean"), default="sum", help="an answer's log-prob: of all its tokens, or per token")
    add("--label_smoothing", type=float, default=0.0, help="share of pairs taken as mislabelled (default: %(default)s)")
    add("--base_weight", default="full_sft", help="stage or .pth file to start from (default: %(default)s)")
    add("--reference_weight", help="stage or .pth file of the reference (default: that of --base_weight)")
    return parse_arguments(
        parser,
        argv,
        beta=(lambda beta: 0 < beta < float("inf"), "above 0"),
        label_smoothing=(lambda share: 0 <= share < 0.5, "at least 0 and below 0.5"),
    )


def dpo_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the reward margin of each pair, (pairs,); a reward is beta * (logpi - logref), in nats.

    policy, reference (pairs, 2): log-probs of the chosen and the rejected answer.
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, margin


def preference_loss(
    token_losses: torch.Tensor, batch: dict, reference: np.ndarray, args
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed DPO loss of the micro-batch's pairs, and the sums of METRICS over them."""
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


@torch.no_grad()
def evaluate_pairs(model, data, precision, process, tokenizer, reference: np.ndarray, args) -> dict[str, float]:
    """Return METRICS over a held-out file."""
    sums, pairs = torch.zeros(len(METRICS), dtype=torch.float64), 0
    model.eval()
    for batch in data.once():
        with precision.autocast():
            token_losses, _ = forward_losses(model, batch)
            sums += preference_loss(token_losses, batch, reference, args)[1].cpu()
        pairs += len(batch["pair_ids"])
    model.train()
    *sums, pairs = sum_over_ranks([*sums.tolist(), pairs], process)
    return {f"valid_{name}": value / pairs for name, value in zip(METRICS, sums, strict=True)}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = start_process(args)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    base = find_weights(args.base_weight, args.out_dir, args.hidden_size, args.use_moe)
    config = model_config(args, tokenizer.vocab_size, base)
    weights = output_path("rlhf", config, args, process)
    frozen = find_weights(args.reference_weight or str(base), args.out_dir, config.hidden_size, config.use_moe)

    data = PackedData(args, "preference", tokenizer, process)
    evaluator = Evaluator(args, "preference", tokenizer, process)
    checkpoint = Checkpoint(weights, "rlhf", args, process, tokenizer, data, base=base, reference=frozen)
    reference = reference_log_probs(frozen, data, tokenizer)
    measure = None
    if evaluator.data:
        held_out = reference_log_probs(frozen, evaluator.data, tokenizer)
        measure = functools.partial(evaluate_pairs, reference=held_out, args=args)
    model = MiniMindForCausalLM(config).to(process.device)
    load_weights(model, base, tokenizer.sha256)
    training = start_training(model, args, process)
    progress = checkpoint.restore(training, fresh=f"starting from {base}")
    logger = Logger(checkpoint.name, args, training, data, progress)
    metrics = {}

    with stop_on_signal() as stop:
        for step, micro_batches in data.steps(progress.step, stop):
            # ---- one optimizer step ----
            sums = torch.zeros(len(METRICS) + 1, device=process.device)
            for batch in micro_batches:
                with training.micro_batch(last=batch["last"]):
                    with training.autocast():
                        token_losses, aux_loss = forward_losses(training.forward, batch)
                        loss, shown = preference_loss(token_losses, batch, reference, args)
                        loss = loss / batch["step_pairs"]
                        aux_loss = aux_loss * batch["num_documents"] / batch["step_documents"]
                    training.backward(loss + aux_loss)
                sums += torch.cat((shown / batch["step_pairs"], aux_loss.detach().view(1)))
            if stop.agreed(process):  # this step stays unfinished; the last one is saved
                checkpoint.save(training, progress, metrics)
                break
            loss, *shown, aux_loss = sum_over_ranks(sums.tolist(), process)
            check_finite(loss + aux_loss, step)
            lr = learning_rate(step, data.total_steps, args)
            grad_norm = training.step(lr)
            # ----------------------------
            progress.advance(batch, data.total_steps)
            more = dict(zip(METRICS[1:], shown, strict=True))
            logger.step(step, loss, lr, grad_norm, batch, **more, aux_loss=aux_loss)
            metrics["loss"] = loss

            if progress.due(args.eval_interval):
                metrics |= evaluator.run(training, logger, progress.step, measure)
            if checkpoint.due(progress):
                with logger.paused("saving"):
                    checkpoint.save(training, progress, metrics)
    logger.close(weights, progress, chat_command(args, "rlhf"))
    stop_process(stop, progress.complete)


if __name__ == "__main__":
    run_script(main)
