"""The optimizer step: parameter groups, learning-rate schedule, precision, clipping."""

import argparse
import contextlib
import functools
import math
import warnings
from typing import NoReturn

import torch
from torch import nn

from model.device import compiles, has_fused_adamw, usable_dtype
from trainer.muon import GroupedMuon, product_dtype


def learning_rate(step: int, total_steps: int, args: argparse.Namespace) -> float:
    """Return the rate of a step: linear warm-up to --learning_rate, the peak, then down to --min_lr_ratio of it.

    --lr_schedule cosine: all the way along a cosine (arXiv:1608.03983, eq. 5, one period). wsd: stay at the peak and
    fall in the last --decay_ratio of all steps only, along 1 - sqrt (arXiv:2405.18392, eq. 2). step counts optimizer
    steps from 0; the last is total_steps - 1. The rate is never above the peak.
    """
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    cosine = args.lr_schedule == "cosine"
    stable = (
        args.warmup_iters if cosine else max(args.warmup_iters, total_steps - round(args.decay_ratio * total_steps))
    )
    progress = min(max(step - stable, 0) / max(total_steps - stable - 1, 1), 1.0)
    height = 0.5 * (1 + math.cos(math.pi * progress)) if cosine else 1 - math.sqrt(progress)
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * height)


class OptimizerPair:
    """Two optimizers over disjoint parameters that step as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer):
        self.parts = (first, second)

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer | OptimizerPair:
    """Build the optimizer that --optimizer names, over the parameters that require gradients.

    adamw: arXiv:1711.05101; matrices decay, norms do not. muon: orthogonalised momentum (arXiv:2502.16982, which scales
    the update so that AdamW's learning rates fit) for the matrices inside the blocks, AdamW for the rest. sgd: plain,
    to check gradients. The embedding may have its own rate: lr_scale, see set_rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [p for name, p in named if p.dim() == 2 and ".layers." in name] if args.optimizer == "muon" else []
    scale = args.embedding_lr_scale
    embedding = [p for name, p in named if p.dim() == 2 and ".layers." not in name] if scale != 1 else []
    taken = {id(p) for p in inside + embedding}
    groups = [
        {"params": embedding, "weight_decay": args.weight_decay, "lr_scale": scale},
        {"params": [p for _, p in named if p.dim() >= 2 and id(p) not in taken], "weight_decay": args.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if args.optimizer == "sgd":
        return torch.optim.SGD([dict(group, weight_decay=0.0) for group in groups], lr=args.learning_rate)
    parts, device = [], named[0][1].device
    if inside:
        grouped = device.type != "cpu" or product_dtype(device) != torch.bfloat16
        muon = GroupedMuon if grouped else functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        parts.append(muon(inside, lr=args.learning_rate, weight_decay=args.weight_decay))
    if groups:  # empty for adapters: all of them are inside the blocks
        options = {"betas": (args.beta1, args.beta2), "eps": 1e-8}
        fused = has_fused_adamw(device)
        parts.append(torch.optim.AdamW(groups, lr=args.learning_rate, fused=fused, **options))
    return parts[0] if len(parts) == 1 else OptimizerPair(*parts)


class Precision:
    """Autocast and, for float16, the gradient scaler."""

    def __init__(self, name: str, device: torch.device):
        self.device = device
        self.dtype, self.notice = usable_dtype(name, device)
        self.name = str(self.dtype).removeprefix("torch.")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()


@torch.no_grad()
def blur_half_weights(model: nn.Module, seed: int) -> None:
    """Move the matrices that came from a float16 file within float16's own rounding error, before bfloat16 training.

    One float16 number in eight is halfway between two bfloat16 numbers. There the first update, however small, decides
    for all of them at once: a step of half a bfloat16 ulp that no learning rate asked for. The moves, uniform up to
    half a float16 ulp, change no number's rounding to bfloat16, and from then on updates are rounded without bias.
    """
    generator = torch.Generator().manual_seed(seed)  # its own: the run's other random numbers stay as they are
    for parameter in trainable(model):
        if parameter.dim() < 2 or not torch.equal(parameter, parameter.half().float()):
            continue
        weights = parameter.cpu()
        ulp = torch.ldexp((weights != 0).float(), torch.frexp(weights).exponent - 11)  # of float16
        moves = ulp * (torch.rand(weights.shape, generator=generator) - 0.5)
        same = (weights + moves).bfloat16() == weights.bfloat16()
        parameter.copy_(torch.where(same, weights + moves, weights - moves))


def compiler_works(device: torch.device) -> bool:
    """Compile something small; warn if that fails. The model would fail the same way for minutes, part by part."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # torch raises many kinds here
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(f"torch.compile does not work here, so the run goes on without it: {reason}", stacklevel=3)
        return False
    return True


def prepare_forward(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Turn on gradient checkpointing and torch.compile as the flags say. By default CUDA and XPU compile.

    ZeRO-3 swaps weights in and out around every layer, which breaks compiled graphs apart: off there by default.
    Compiling is in place, so parameter names do not change. If it fails, torch says so and the model runs as it is.
    """
    if args.gradient_checkpointing:
        model.model.gradient_checkpointing = True
    by_default = compiles(device) and args.zero_stage < 3
    if (by_default if args.compile is None else args.compile) and compiler_works(device):
        torch._dynamo.config.suppress_errors = True
        model.model.compile(dynamic=False)


def check_finite(loss: float, step: int) -> None:
    """Stop a run whose loss is NaN or infinite, before any weight changes."""
    if not math.isfinite(loss):
        refuse_not_finite(f"the loss is {loss} at step {step + 1}")


def refuse_not_finite(found: str) -> NoReturn:
    raise FloatingPointError(
        f"{found}; the last saved weights and resume state are untouched. "
        "Lower --learning_rate, or raise --warmup_iters, or train with --dtype float32"
    )


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | OptimizerPair,
    precision: Precision,
    lr: float,
    grad_clip: float,
) -> float:
    """Clip the gradients, update the weights, clear the gradients; return the gradient norm before clipping.

    The rate of a parameter group is lr times its lr_scale, if it has one. Raises FloatingPointError if the gradient is
    not finite, before any weight changes. Under float16 the scaler skips such a step and lowers its scale instead.
    """
    set_rate(optimizer, lr)
    precision.scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(trainable(model), grad_clip if grad_clip > 0 else math.inf))
    if not math.isfinite(norm) and (not precision.scaler.is_enabled() or precision.scaler.get_scale() < 1e-4):
        refuse_not_finite(f"the gradient norm is {norm}")
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_rate(optimizer: torch.optim.Optimizer | OptimizerPair, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
