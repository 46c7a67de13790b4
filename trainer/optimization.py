"""The optimizer step: parameter groups, learning-rate schedule, precision, clipping."""

import argparse
import contextlib
import functools
import math

import torch
from torch import nn

from model.device import usable_dtype
from trainer.distributed import Process
from trainer.muon import GroupedMuon
from trainer.zero import zero_stage


def learning_rate(step: int, total_steps: int, peak_lr: float, warmup_steps: int = 0, min_ratio: float = 0.1) -> float:
    """Linear warm-up to the peak, then a cosine to min_ratio · peak (arXiv:1608.03983, eq. 5, one period).

    step counts optimizer steps from 0; the last one is total_steps - 1. Never above the peak.
    """
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    decay_steps = max(total_steps - warmup_steps - 1, 1)
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    return peak_lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


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
    """The optimizer over what is trainable, as --optimizer says.

    adamw: arXiv:1711.05101; matrices decay, norms do not. muon: orthogonalised momentum (arXiv:2502.16982,
    whose scale of the update makes AdamW's learning rates fit) for the matrices inside the blocks, AdamW for the rest.
    sgd: plain, for checks of gradients. The embedding may have a rate of its own: lr_scale, see optimizer_step.
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
    parts, device = [], named[0][1].device.type
    if inside:
        muon = GroupedMuon if device == "cuda" else functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        parts.append(muon(inside, lr=args.learning_rate, weight_decay=args.weight_decay))
    if groups:  # adapters lie inside the blocks, all of them
        options = {"betas": (args.beta1, args.beta2), "eps": 1e-8}
        fused = device in ("cpu", "cuda")
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


def prepare_forward(model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Gradient checkpointing and torch.compile as the flags say; compiling is on by default with CUDA.

    ZeRO-3 swaps weights in and out around every layer, which breaks compiled graphs apart: off there by default.
    It happens in place: parameter names stay as they are. Where it fails, torch says so and the model runs as it is.
    """
    if args.gradient_checkpointing:
        model.model.gradient_checkpointing = True
    by_default = device.type == "cuda" and args.zero_stage < 3
    if by_default if args.compile is None else args.compile:
        torch._dynamo.config.suppress_errors = True
        model.model.compile(dynamic=False)


def backward(model: nn.Module, share: torch.Tensor, precision: Precision, process: Process) -> None:
    """Adds the gradient of a micro-batch's share of the step's loss; the shares of all processes add up."""
    loss = share * process.world_size  # DistributedDataParallel and DeepSpeed take the mean over processes
    if zero_stage(model):
        model.backward(loss, scale_wrt_gas=False)
    else:
        precision.backward(loss)


def check_finite(loss: float, step: int) -> None:
    """Stops a run whose loss is NaN or infinite, before any weight changes."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step + 1}; the last saved weights and resume state are untouched. "
            "Lower --learning_rate, or raise --warmup_iters, or train with --dtype float32"
        )


def not_finite(norm: float) -> str:
    return (
        f"the gradient norm is {norm}; the last saved weights and resume state are untouched. "
        "Lower --learning_rate, or raise --warmup_iters, or train with --dtype float32"
    )


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | OptimizerPair,
    precision: Precision,
    lr: float,
    grad_clip: float,
) -> float:
    """Clips, steps and clears the gradients; returns the gradient norm before clipping.

    A group's rate is lr times its lr_scale, if it has one.
    Raises FloatingPointError when the gradient is not finite, before any weight changes. Under float16 the scaler
    skips such a step and lowers its scale instead. Under ZeRO the engine does all this, clipping as --grad_clip says.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if zero_stage(model):
        model.step()
        norm = float(model.get_global_grad_norm())
        if not math.isfinite(norm) and not model.fp16_enabled():
            raise FloatingPointError(not_finite(norm))
        return norm
    precision.scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(trainable(model), grad_clip if grad_clip > 0 else math.inf))
    if not math.isfinite(norm) and (not precision.scaler.is_enabled() or precision.scaler.get_scale() < 1e-4):
        raise FloatingPointError(not_finite(norm))
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
