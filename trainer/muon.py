"""Muon for GPUs, and CPUs without bfloat16: matrices of one shape are orthogonalised together."""

import math
from collections import defaultdict
from itertools import islice

import torch

from model.device import has_bfloat16

STACK_ELEMENTS = 2**25  # largest stack; peak memory is about five times this


def product_dtype(device: torch.device) -> torch.dtype:
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32  # emulated bfloat16 takes several times as long


def orthogonalise(
    stack: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Bring all singular values of each matrix of a stack (n, rows, columns), rows <= columns, close to 1.

    Newton-Schulz iterations (arXiv:2502.16982, eq. 2) in bfloat16; where that is only emulated, in float16 on a GPU and
    in float32 on a CPU.
    """
    a, b, c = coefficients
    x = stack.bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    x = x.to(product_dtype(x.device))  # no entry is above 1, and small ones do not matter
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class GroupedMuon(torch.optim.Muon):
    """torch.optim.Muon with the same state and result, up to the order of additions in a product.

    Torch steps matrix by matrix. The 56 matrices of the 26M model are three stacks here (down_proj is a transposed
    gate_proj), 45 products instead of 840, most of which are too small to fill a GPU. On a CPU with bfloat16, where a
    batched product is slower than its parts (RESULTS.md), torch's own is used: see build_optimizer.
    """

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(sorted(parameter.shape))].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                remaining = iter(parameters)
                while stack := list(islice(remaining, max(STACK_ELEMENTS // (rows * columns), 1))):
                    self._step_together(group, stack)

    def _step_together(self, group: dict, parameters: list[torch.Tensor]) -> None:
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        upright = [p.size(0) > p.size(1) for p in parameters]
        stack = torch.stack([u.mT if turned else u for u, turned in zip(updates, upright, strict=True)])
        del updates
        stack = orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"]).to(gradients[0].dtype)
        updates = [u.mT if turned else u for u, turned in zip(stack, upright, strict=True)]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # updates as large as AdamW's (section 2.2)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] * (0.2 * math.sqrt(max(parameters[0].shape))))
