"""LoRA (arXiv:2106.09685): small adapters learn, all other weights stay frozen.

    y = W x + (alpha / rank) B A x        loss = sum(w * CE) / sum(w) + aux        (lora_loss below)

A (rank, in) and B (out, rank) are trained, B from zero; W is frozen. w is 1 on the assistant's content and the
<|im_end|> that ends it, else 0; CE is the cross-entropy of the next token in nats. Both sums run over the optimizer
step. aux is the load-balancing loss of a mixture of experts, as in train_pretrain.py; its router is frozen too.

Reads   {"conversations": [{"role": ..., "content": ...}, ...]} a line (--data_path, default
        dataset/lora_medical.jsonl), out/full_sft_{hidden_size}{_moe}.pth (--base_weight)
Writes  out/lora/{lora_name}_{hidden_size}{_moe}.pth and a .json next to it, out/resume/, out/logs/

    python train_lora.py --lora_name lora_medical
    torchrun --nproc_per_node 8 train_lora.py --lora_name lora_medical
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import torch

from dataset.tokenization import ChatTokenizer
from model.model_lora import TARGETS, apply_lora, check_peft, lora_path, save_lora, save_peft
from model.model_minimind import MiniMindForCausalLM
from model.weights import STAGES, find_weights, load_weights, read_sidecar
from trainer.arguments import add_boolean, chat_command, model_config, parse_arguments, run_script, stage_parser
from trainer.checkpoint import Checkpoint, claim, refuse_other_adapter
from trainer.distributed import start_process, stop_on_signal, stop_process, sum_over_ranks
from trainer.evaluation import Evaluator
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.optimization import check_finite, learning_rate, trainable
from trainer.token_losses import forward_losses
from trainer.training import start_training

PLAIN_NAME = 'a plain, short name, without / or ., and not "none", which stands for no adapter in eval_model.py'


def parse(argv: list[str] | None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/lora_medical.jsonl",
        epochs=10,
        batch_size=32,
        accumulation_steps=1,
        learning_rate={"adamw": 3e-3},
        max_seq_len=512,
        weight_decay=0.0,
    )
    add = parser.add_argument
    add("--lora_name", default="lora_medical", help="name of the adapter's file (default: %(default)s)")
    add("--lora_rank", type=int, default=8, help="columns of A and rows of B (default: %(default)s)")
    add("--lora_alpha", type=float, help="the adapter is scaled by alpha / rank (default: the rank)")
    add("--lora_targets", default=",".join(TARGETS), help="linear layers that get an adapter (default: %(default)s)")
    add("--base_weight", default="full_sft", help="stage or .pth file to adapt (default: %(default)s)")
    add_boolean(parser, "--save_peft", False, "also write the adapter for the peft library: out/lora/NAME_peft/")
    return parse_arguments(
        parser,
        argv,
        lora_rank=(lambda rank: rank >= 1, "at least 1"),
        lora_alpha=(lambda alpha: alpha > 0, "above 0"),
        lora_name=(
            lambda name: name.strip().lower() not in ("", "none") and not set(name) & set("/\\.") and len(name) <= 60,
            PLAIN_NAME,
        ),
    )


def lora_loss(token_losses: torch.Tensor, aux_loss: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this micro-batch's share of the step's cross-entropy per answer token and of its balance loss, in nats.

    token_losses (rows, seq), 0 outside the answers; aux_loss, the mean over the micro-batch's conversations.
    """
    return token_losses.sum() / batch["step_targets"], aux_loss * batch["num_documents"] / batch["step_documents"]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = start_process(args)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    base = find_weights(args.base_weight, args.out_dir, args.hidden_size, args.use_moe)
    config = model_config(args, tokenizer.vocab_size, base)
    weights = claim(lora_path(args.out_dir, args.lora_name, config.hidden_size, config.use_moe), args, process)

    data = PackedData(args, "conversation", tokenizer, process)
    evaluator = Evaluator(args, "conversation", tokenizer, process)
    model = MiniMindForCausalLM(config).to(process.device)
    load_weights(model, base, tokenizer.sha256)
    refuse_other_adapter(weights, model, args)
    apply_lora(model, args.lora_rank, args.lora_alpha, args.lora_targets.split(","))
    if args.save_peft:
        check_peft(model)
    trained, total = (sum(p.numel() for p in part) for part in (trainable(model), model.parameters()))
    process.say(f"adapting {base}: {trained:,} of {total:,} parameters train ({trained / total:.2%})")
    training = start_training(model, args, process)
    checkpoint = Checkpoint(
        weights, f"lora/{args.lora_name}", args, process, tokenizer, data, write=save_lora, base=base
    )
    progress = checkpoint.restore(training)
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
                        cross_entropy, aux_loss = lora_loss(token_losses, aux_loss, batch)
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
    if args.save_peft:
        with training.whole_weights() as model:
            if process.is_main:
                save_peft(weights.with_name(f"{weights.stem}_peft"), model)
    stage = (read_sidecar(base) or {}).get("stage", args.base_weight)
    stage = stage if stage in STAGES else "full_sft"
    logger.close(weights, progress, chat_command(args, stage, "--lora_name", args.lora_name))
    stop_process(stop, progress.complete)


if __name__ == "__main__":
    run_script(main)
