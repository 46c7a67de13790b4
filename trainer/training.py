"""A model with its optimizer, its precision and the processes that share the work, as one object.

The loop, the data and the log stay in the stage scripts. An optimizer step of any of them reads

    for batch in micro_batches:
        with training.micro_batch(last=batch["last"]):
            with training.autocast():
                loss = ...  # from training.forward(...)
            training.backward(loss)
    grad_norm = training.step(lr)
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.device import has_own_memory
from trainer.distributed import Process
from trainer.optimization import (
    Precision,
    blur_half_weights,
    build_optimizer,
    optimizer_step,
    prepare_forward,
    refuse_not_finite,
    set_rate,
)
from trainer.zero import gathered, load_shards, save_shards, start_engine


class Training:
    """One process, or several that each hold the whole model and average its gradients (DistributedDataParallel).

    `model` is the plain model, under its own parameter names; `forward` runs it with what the processes need around it.
    """

    def __init__(self, model: nn.Module, args: argparse.Namespace, process: Process):
        """model: on the device, with its initial weights. The parameters that require gradients are trained."""
        self.model, self.process, self.grad_clip = model, process, args.grad_clip
        self.precision = Precision(args.dtype, process.device)
        if self.precision.dtype == torch.bfloat16:
            blur_half_weights(model, args.seed)
        self.optimizer = build_optimizer(model, args)
        prepare_forward(model, args, process.device)
        self.forward = self._distributed(args)

    def _distributed(self, args: argparse.Namespace) -> nn.Module:
        if self.process.world_size == 1:
            return self.model
        device_ids = [self.process.device.index] if has_own_memory(self.process.device) else None
        return DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Wrap the forward and backward of one micro-batch.

        Processes exchange gradients once per optimizer step, with its last micro-batch.
        """
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def autocast(self) -> contextlib.AbstractContextManager:
        return self.precision.autocast()

    def backward(self, share: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's share of the step's loss. The shares of all processes add up."""
        self.precision.backward(share * self.process.world_size)  # DistributedDataParallel averages over processes

    def step(self, lr: float) -> float:
        """Clip the gradients, update the weights, clear the gradients; return the gradient norm before clipping.

        Raises FloatingPointError if the gradient is not finite, before any weight changes.
        """
        return optimizer_step(self.model, self.optimizer, self.precision, lr, self.grad_clip)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        """Yield the plain model with all its weights in place, to read them. All processes enter together."""
        yield self.model

    # --- its part of a resume state ----------------------------------------------------------------------------------

    def state(self) -> dict:
        """Return weights, optimizer and scaler, without frozen weights, which come from their own file."""
        return {
            "model": {name: p.detach() for name, p in self._trained().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def save_shards(self, folder: Path, name: str) -> str:
        """Under ZeRO, write each process's part of the state to folder/name; return the name, or "" if not needed."""
        return ""

    def load_state(self, state: dict, shards: Path) -> None:
        """Restore what `state` and `save_shards` saved. Raises ValueError if the tensors are not those trained here."""
        if self._trained().keys() != state["model"].keys():
            raise ValueError("it holds other tensors than this run trains")
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_scaler(state)

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p for name, p in self.model.state_dict(keep_vars=True).items() if p.requires_grad}

    def _load_scaler(self, state: dict) -> None:
        if state["scaler"]:  # empty if the saved run needed none
            self.precision.scaler.load_state_dict(state["scaler"])


class ZeroTraining(Training):
    """Several processes that divide optimizer state, gradients or weights among them: see trainer/zero.py."""

    def _distributed(self, args: argparse.Namespace) -> nn.Module:
        self.engine = start_engine(self.model, self.optimizer, args, self.precision.dtype, self.process.device)
        self.optimizer = self.engine.optimizer
        return self.engine

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Tell the engine which micro-batch is the step's last. Stages 2 and 3 divide the gradients after each one."""
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, share: torch.Tensor) -> None:
        self.engine.backward(share * self.process.world_size, scale_wrt_gas=False)  # DeepSpeed averages too

    def step(self, lr: float) -> float:
        set_rate(self.optimizer, lr)
        self.engine.step()  # clips too, as zero_settings says
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm) and not self.engine.fp16_enabled():
            refuse_not_finite(f"the gradient norm is {norm}")
        return norm

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[nn.Module]:
        with gathered(self.engine):
            yield self.model

    def state(self) -> dict:
        return {"model": {}, "optimizer": {}, "scaler": self.precision.scaler.state_dict()}

    def save_shards(self, folder: Path, name: str) -> str:
        save_shards(self.engine, folder / name)
        return name

    def load_state(self, state: dict, shards: Path) -> None:
        load_shards(self.engine, shards)
        self._load_scaler(state)


def start_training(model: nn.Module, args: argparse.Namespace, process: Process) -> Training:
    """Make a model that is on its device with its initial weights ready to train as the flags say."""
    return (ZeroTraining if args.zero_stage else Training)(model, args, process)
