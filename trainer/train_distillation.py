"""Knowledge distillation: a small model learns the distributions of a large one, token by token (white box).

    loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher_T || student_T) + aux        (distillation_loss below)

(arXiv:1503.02531, section 2.) CE is the cross-entropy of the next token, KL the divergence between the distributions
softmax(logits / T), in nats: means over the assistant's content and the <|im_end|> that ends it, over the whole
optimizer step. T^2 keeps the size of the gradient when T changes. aux is a mixture's load-balancing loss.

With --cache_teacher K the teacher's K most likely tokens are computed once and kept on disk, and the student trains
without the teacher in memory; all other tokens then count as one.

Reads   {"conversations": [{"role": ..., "content": ...}, ...]} a line (--data_path, default dataset/sft_512.jsonl),
        out/full_sft_{hidden_size}{_moe}.pth of the student (--base_weight) and of the teacher (--teacher_weight)
Writes  out/full_dist_{hidden_size}{_moe}.pth and a .json next to it, out/resume/, out/logs/

    python train_distillation.py
    torchrun --nproc_per_node 8 train_distillation.py
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import torch
import torch.nn.functional as F

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindForCausalLM
from model.weights import find_weights, load_weights
from trainer.arguments import add_boolean, chat_command, model_config, parse_arguments, run_script, stage_parser
from trainer.checkpoint import Checkpoint, output_path
from trainer.distributed import start_process, stop_on_signal, stop_process, sum_over_ranks
from trainer.evaluation import Evaluator
from trainer.loader import PackedData, model_inputs
from trainer.logger import Logger
from trainer.optimization import check_finite, learning_rate
from trainer.teacher import Teacher
from trainer.token_losses import chunked_loss, target_indices
from trainer.training import start_training

CACHE_HELP = "keep the teacher's K most likely tokens on disk, 4 K bytes a target, and train without it (0: no)"


def parse(argv: list[str] | None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/sft_512.jsonl",
        epochs=6,
        batch_size=32,
        accumulation_steps=1,
        learning_rate={"adamw": 5e-4, "muon": 4e-3},
        max_seq_len=512,
    )
    add = parser.add_argument
    add("--alpha", type=float, default=0.0, help="share of the cross-entropy, 0 to 1 (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="T of both distributions (default: %(default)s)")
    add("--base_weight", default="full_sft", help="student: stage or .pth file to start from (default: %(default)s)")
    add("--teacher_weight", default="full_sft", help="teacher: stage or .pth file (default: %(default)s)")
    add("--teacher_hidden_size", type=int, default=768, help="chooses the teacher's file (default: %(default)s)")
    add("--teacher_num_hidden_layers", type=int, help="read from the file (16 layers: 104M); checked if given")
    add_boolean(parser, "--teacher_use_moe", False, "the teacher is a mixture of experts")
    add("--cache_teacher", type=int, default=0, metavar="K", help=CACHE_HELP)
    return parse_arguments(
        parser,
        argv,
        alpha=(lambda alpha: 0 <= alpha <= 1, "between 0 and 1"),
        temperature=(lambda temperature: 0 < temperature < float("inf"), "above 0"),
        cache_teacher=(lambda k: k >= 0, "0 or more"),
    )


def distillation_loss(
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    alpha: float,
    temperature: float,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return sums over tokens in nats: (the loss, cross-entropy, KL divergence).

    student_logits (tokens, vocab), labels (tokens,). teacher_log_probs (tokens, vocab): log softmax(teacher logits
    / T); with token_ids (tokens, K) those of the K most likely tokens: the rest of the vocabulary then counts as one.
    """
    cross_entropy = F.cross_entropy(student_logits, labels, reduction="sum")
    log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    if token_ids is not None:
        log_probs, teacher_log_probs = with_rest(log_probs.gather(1, token_ids)), with_rest(teacher_log_probs)
    divergence = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum")
    loss = alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence
    return torch.stack((loss, cross_entropy, divergence))


def with_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Append to (tokens, K) log-probs that of all other tokens together: (tokens, K + 1)."""
    known = log_probs.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6)
    return torch.cat((log_probs, torch.log1p(-known)), dim=-1)


def distillation_head(
    hidden: torch.Tensor, weight: torch.Tensor, batch: dict, teacher_log_probs: Callable, args
) -> torch.Tensor:
    """Return the batch's sums of (loss, cross-entropy, KL), a chunk of logits at a time; see Teacher.log_probs."""
    targets = target_indices(batch)
    labels = batch["labels"].flatten()[targets]

    def loss_of_logits(logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        log_probs, token_ids = teacher_log_probs(chunk)
        return distillation_loss(logits, labels[chunk], log_probs, args.alpha, args.temperature, token_ids)

    return chunked_loss(hidden.flatten(0, 1)[targets], weight, loss_of_logits, losses=3)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = start_process(args)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    if args.cache_teacher >= tokenizer.vocab_size:
        raise ValueError(f"--cache_teacher {args.cache_teacher}: must be smaller than the vocabulary")
    base = find_weights(args.base_weight, args.out_dir, args.hidden_size, args.use_moe)
    config = model_config(args, tokenizer.vocab_size, base)
    weights = output_path("full_dist", config, args, process)
    teacher_path = find_weights(
        args.teacher_weight, args.out_dir, args.teacher_hidden_size, args.teacher_use_moe, "--teacher_hidden_size"
    )

    data = PackedData(args, "conversation", tokenizer, process)
    evaluator = Evaluator(args, "conversation", tokenizer, process)
    checkpoint = Checkpoint(weights, "full_dist", args, process, tokenizer, data, base=base, teacher=teacher_path)
    teacher = Teacher(teacher_path, args, tokenizer, process)
    if args.cache_teacher:
        teacher.keep(data, args.cache_teacher)
    model = MiniMindForCausalLM(config).to(process.device)
    load_weights(model, base, tokenizer.sha256)
    model.recompute_activations(not args.gradient_checkpointing)  # memory is what two models are short of
    training = start_training(model, args, process)
    progress = checkpoint.restore(training, fresh=f"student {base}, teacher {teacher_path}")
    logger = Logger(checkpoint.name, args, training, data, progress, teacher.model, head_of_targets=True)
    metrics = {}

    with stop_on_signal() as stop:
        for step, micro_batches in data.steps(progress.step, stop):
            # ---- one optimizer step ----
            sums = torch.zeros(4, device=process.device)
            for batch in micro_batches:
                with training.micro_batch(last=batch["last"]):
                    with training.autocast():
                        # the teacher first: what its forward needs is gone before the student's activations pile up
                        log_probs = teacher.log_probs(batch, target_indices(batch))
                        head = functools.partial(distillation_head, batch=batch, teacher_log_probs=log_probs, args=args)
                        output = training.forward(**model_inputs(batch), head=head)
                        losses = output.head_output / batch["step_targets"]
                        aux_loss = output.aux_loss * batch["num_documents"] / batch["step_documents"]
                    training.backward(losses[0] + aux_loss)
                sums += torch.cat((losses, aux_loss.view(1))).detach()
            if stop.agreed(process):  # this step stays unfinished; the last one is saved
                checkpoint.save(training, progress, metrics)
                break
            loss, cross_entropy, divergence, aux_loss = sum_over_ranks(sums.tolist(), process)
            check_finite(loss + aux_loss, step)
            lr = learning_rate(step, data.total_steps, args)
            grad_norm = training.step(lr)
            # ----------------------------
            progress.advance(batch, data.total_steps)
            more = {"ce": cross_entropy, "kl": divergence, "aux_loss": aux_loss}
            logger.step(step, loss, lr, grad_norm, batch, **more)
            metrics["loss"] = loss

            if progress.due(args.eval_interval):
                metrics |= evaluator.run(training, logger, progress.step)
            if checkpoint.due(progress):
                with logger.paused("saving"):
                    checkpoint.save(training, progress, metrics)
    logger.close(weights, progress, chat_command(args, "full_dist"))
    stop_process(stop, progress.complete)


if __name__ == "__main__":
    run_script(main)
