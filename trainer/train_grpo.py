"""Group-relative policy optimisation (GRPO): the model samples answers, and those that score above their group's mean
become more likely. Rewards are computed from the record's answer; there is no judge and no value model.

    loss = -sum w * min(rho * A, clip(rho, 1 - low, 1 + high) * A) + beta * sum w * k3 + aux     (policy_loss below)

A is an answer's reward minus the mean over its group, the answers to one prompt (grpo, cispo: divided by the standard
deviation); rho = pi / pi_before for each token, where pi_before is the model before the step's first update.

`--loss dr_grpo` (arXiv:2503.20783) weighs a token by w = 1 / (answers * --max_new_tokens), which favours neither short
nor long answers; `grpo` (arXiv:2402.03300, eq. 3) by 1 / (answers * its answer's length); `cispo` (arXiv:2506.13585,
eq. 4) by 1 / tokens, DAPO's average (arXiv:2503.14476), with -sum w * sg(min(rho, 1 + high)) * A * log pi: no token
loses its gradient. --clip_high above --clip_low is DAPO's clip-higher. k3 estimates the KL divergence to the base.

A group of equal rewards teaches nothing and is left out, but counts in `answers` and `tokens`. A step is one batch of
answers with --updates optimizer steps; with one, rho is 1 and the gradient is REINFORCE with the group's mean as
baseline. Records may offer tools, which the model then calls: see trainer/rollouts.py.

Reads   {"conversations": [turns, the user's last], "answer": "..."} a line (--data_path, default dataset/grpo.jsonl),
        out/full_sft_{hidden_size}{_moe}.pth (--base_weight)
Writes  out/grpo_{hidden_size}{_moe}.pth and a .json next to it, out/resume/, out/logs/

    python train_grpo.py --data_path FILE.jsonl --reward number format=0.2
    torchrun --nproc_per_node 8 train_grpo.py --data_path FILE.jsonl --reward number
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import numpy as np
import torch

from dataset.tokenization import ChatTokenizer
from model.model_lora import apply_lora, save_merged
from model.model_minimind import MiniMindForCausalLM
from model.weights import find_weights, load_weights, save_weights
from trainer.arguments import chat_command, model_config, parse_arguments, run_script, stage_parser
from trainer.checkpoint import Checkpoint, output_path
from trainer.distributed import start_process, stop_on_signal, stop_process, sum_over_ranks
from trainer.logger import Logger
from trainer.optimization import check_finite, learning_rate
from trainer.rewards import REWARD_HELP, checked_rewards
from trainer.rollouts import Sampler, starting_point
from trainer.token_losses import target_log_probs
from trainer.training import start_training

METRICS = ("loss", "kl", "clipped", "rollout_kl")


def parse(argv: list[str] | None):
    parser = stage_parser(
        __doc__,
        data_path="dataset/grpo.jsonl",
        batch_size=8,
        learning_rate={"adamw": 1e-4},
        max_seq_len=512,
        weight_decay=0.0,
        log_interval=10,
        eval_interval=50,
    )
    add = parser.add_argument_group("answers and rewards").add_argument
    add("--reward", nargs="+", default=["number"], metavar="NAME[=WEIGHT]", help=REWARD_HELP)
    add("--prompts_per_step", type=int, default=16, help="prompts of a step, all processes together")
    add("--group_size", type=int, default=8, help="answers to each prompt")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the distribution that learns")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    add("--eval_samples", type=int, default=4, help="sampled answers to each held-out prompt, for pass@k")
    add = parser.add_argument_group("the objective").add_argument
    add("--loss", choices=("dr_grpo", "grpo", "cispo"), default="dr_grpo", help="how tokens are weighed, see above")
    add("--clip_low", type=float, default=0.2)
    add("--clip_high", type=float, default=0.28)
    add("--updates", type=int, default=1, help="optimizer steps per batch of answers (1: on policy)")
    add("--beta", type=float, default=0.0, help="weight of the KL divergence to the starting weights (0: no reference)")
    add("--lora_rank", type=int, default=0, help="train an adapter of this rank, merged when saved (0: all weights)")
    add("--base_weight", default="full_sft", help="stage or .pth file to start from")
    args = parse_arguments(
        parser,
        argv,
        **dict.fromkeys(
            ("prompts_per_step", "max_new_tokens", "eval_samples", "updates"), (lambda n: n >= 1, "at least 1")
        ),
        **dict.fromkeys(("clip_low", "clip_high", "beta", "lora_rank"), (lambda v: 0 <= v < float("inf"), "0 or more")),
        group_size=(lambda n: n >= 2, "at least 2: an answer is compared with its group"),
        temperature=(lambda t: 0 < t < float("inf"), "above 0: equal answers teach nothing"),
        accumulation_steps=(lambda n: n == 1, "1: a step takes as many micro-batches as its answers need"),
    )
    args.reward = checked_rewards(args.reward)  # a mistake is reported before anything is loaded
    return args


def advantages(totals: np.ndarray, loss: str) -> np.ndarray:
    """Return how much better each answer is than its group, (prompts, group). totals: sums of rewards, same shape."""
    centred = totals - totals.mean(axis=1, keepdims=True)
    return centred if loss == "dr_grpo" else centred / (totals.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def token_weight(length: int, answers: float, tokens: float, args) -> float:
    """Return the weight of one token in the step's loss, in an answer of `length` tokens.

    answers, tokens: of the whole step, all processes together.
    """
    return {
        "dr_grpo": 1 / (answers * args.max_new_tokens),
        "grpo": 1 / (answers * length),
        "cispo": 1 / tokens,
    }[args.loss]


def policy_loss(log_probs: torch.Tensor, batch: dict, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this micro-batch's share of the step's loss, and of METRICS, which have no gradient.

    log_probs (tokens,): of the learned tokens under the model, in nats. batch holds in the same shape: advantages;
    weights, see token_weight; log-probs when sampled, before the first update (set here if missing), under a reference.
    """
    before = batch.setdefault("before", log_probs.detach())
    ratio, advantage = (log_probs - before).exp(), batch["advantages"]
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    if args.loss == "cispo":
        losses = -ratio.detach().clamp(max=1 + args.clip_high) * advantage * log_probs
    else:
        losses = -torch.minimum(ratio * advantage, clipped * advantage)
    kl = k3(log_probs, batch["reference"]) if "reference" in batch else torch.zeros_like(log_probs)
    loss = (batch["weights"] * (losses + args.beta * kl)).sum()
    shown = torch.stack((kl, (ratio != clipped).float(), k3(batch["sampled"], before)))
    return loss, torch.cat((loss.view(1), shown.sum(dim=1) / batch["step_targets"])).detach()


def k3(log_probs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Estimate KL(pi || other) of each token from samples of pi: unbiased, never negative, in nats."""
    difference = other - log_probs
    return torch.expm1(difference) - difference  # exp(x) - 1 - x would lose small ones to rounding


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    process = start_process(args)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    base = find_weights(args.base_weight, args.out_dir, args.hidden_size, args.use_moe)
    config = model_config(args, tokenizer.vocab_size, base)
    weights = output_path("grpo", config, args, process)

    sampler = Sampler(args.data_path, args, tokenizer, process)
    held_out = Sampler(args.valid_path, args, tokenizer, process) if args.valid_path else None
    model = MiniMindForCausalLM(config).to(process.device)
    load_weights(model, base, tokenizer.sha256)
    reference = starting_point(model, share=args.lora_rank and args.zero_stage < 3) if args.beta else None
    if args.lora_rank:
        apply_lora(model, args.lora_rank)
    training = start_training(model, args, process)
    write = save_merged if args.lora_rank else save_weights
    frozen = {"reference": base} if args.beta or args.lora_rank else {}  # else it only starts from its base
    checkpoint = Checkpoint(weights, "grpo", args, process, tokenizer, sampler, write, base=base, **frozen)
    progress = checkpoint.restore(training, fresh=f"starting from {base}")
    logger = Logger(checkpoint.name, args, training, sampler, progress)
    metrics = {}

    with stop_on_signal() as stop:
        for step in range(progress.step, sampler.total_steps):
            rollouts = sampler.sample_step(training, step, stop)
            if stop.agreed(process):  # this step stays unfinished; the last one is saved
                checkpoint.save(training, progress, metrics)
                break
            micro_batches, counts, sampled = sampler.micro_batches(rollouts, advantages, token_weight)
            lr = learning_rate(step, sampler.total_steps, args)
            means, grad_norm = [0.0] * len(METRICS), 0.0  # if no group teaches anything
            for _ in range(args.updates if micro_batches else 0):
                # ---- one optimizer step ----
                sums = torch.zeros(len(METRICS) + 1, device=process.device)
                for batch in micro_batches:
                    with training.micro_batch(last=batch["last"]):
                        with training.autocast():
                            log_probs, aux_loss = target_log_probs(training.forward, batch, args.temperature)
                            if reference is not None and "reference" not in batch:
                                with torch.no_grad():
                                    batch["reference"] = target_log_probs(reference, batch, args.temperature)[0]
                            loss, shown = policy_loss(log_probs, batch, args)
                            aux_loss = aux_loss * batch["num_documents"] / batch["step_documents"]
                        training.backward(loss + aux_loss)
                    sums += torch.cat((shown, aux_loss.detach().view(1)))
                *means, aux_loss = sum_over_ranks(sums.tolist(), process)
                check_finite(means[0] + aux_loss, step)
                grad_norm = training.step(lr)
                # ----------------------------
            progress.advance(counts, sampler.total_steps)
            sampled |= zip(METRICS[1:], means[1:], strict=True)
            logger.step(step, means[0], lr, grad_norm, counts, **sampled)
            metrics |= sampled

            if held_out and progress.due(args.eval_interval):
                metrics |= {f"valid_{k}": v for k, v in held_out.evaluate(training, logger, progress.step).items()}
            if checkpoint.due(progress):
                with logger.paused("saving"):
                    checkpoint.save(training, progress, metrics)
    logger.close(weights, progress, chat_command(args, "grpo"))
    stop_process(stop, progress.complete)


if __name__ == "__main__":
    run_script(main)
