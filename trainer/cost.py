"""The cost of training: floating-point operations, bytes of memory, and the rate that a device can reach."""

import argparse
import contextlib
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

from model.device import has_own_memory, named_device
from model.model_minimind import MiniMindConfig


def flops_per_token(config: MiniMindConfig, parameters: int, frozen: int = 0) -> float:
    """Return the floating-point operations of forward and backward per token, without attention: 6 per parameter.

    frozen: the number of parameters that are not trained; they have no gradient of their own and cost 4 each. A routed
    expert that a token does not visit costs nothing. The embedding is tied to the head and counts once; where the head
    leaves out tokens without a target, these cost head_flops less.
    """
    idle = 0
    if config.use_moe:
        idle = config.n_routed_experts - config.num_experts_per_tok
        idle *= config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
    return 6 * (parameters - idle) - 2 * (frozen - idle if frozen else 0)


def head_flops(model: nn.Module) -> int:
    """Return the part of flops_per_token that is the head's."""
    head = model.lm_head.weight
    return model.config.vocab_size * model.config.hidden_size * (6 if head.requires_grad else 4)


def attention_flops(config: MiniMindConfig, positions_seen: int) -> float:
    """Return the operations of causal attention: 12 · heads · head_dim · layers for every (token, position) pair."""
    return 12 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * positions_seen


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters, and of those that are frozen."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]  # ZeRO-3 empties them
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if not trained)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Measure the best rate of a large square matrix product on this device; MFU is relative to it.

    A CPU's is taken from processor time where that says more, so that other programs on the machine do not lower it.
    """
    size = size or (8192 if has_own_memory(device) else 2048)
    own_generator = torch.Generator(device)  # the run's random numbers must not depend on this
    a = torch.randn(size, size, device=device, generator=own_generator).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        start, processor = time.perf_counter(), time.process_time()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if device.type == "cpu":
            best = min(best, (time.process_time() - processor) / torch.get_num_threads())
    return 2 * size**3 / best


def memory_parts(model: nn.Module, args: argparse.Namespace, processes: int) -> dict[str, int]:
    """Return the bytes that weights, gradients and optimizer state take in each process."""
    parameters = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, _, grad in parameters if grad)
    state = trained * {"adamw": 8, "muon": 4, "sgd": 0}[args.optimizer]
    if args.optimizer == "muon":  # one momentum for matrices inside the blocks, two moments for the rest
        state += 4 * sum(p.numel() for n, p in model.named_parameters() if p.dim() != 2 or ".layers." not in n)
    share = {stage: processes if args.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    return {
        "weights": sum(size * bytes_each for size, bytes_each, _ in parameters) // share[3],
        "gradients": 4 * trained // share[2],
        "optimizer state": state // share[1],
    }


def activation_bytes(
    config: MiniMindConfig, positions: int, checkpointing: bool = False, size: int = 2, whole_head: bool = True
) -> int:
    """Return the bytes that a compiled forward on CUDA keeps for the backward pass, over a float32 residual stream.

    Per layer and position, in float32: the inputs of both norms and each head's softmax normaliser; in `size` bytes
    each: the inputs of the projections, query, key, value, the attention's result, gate, up and their product.
    After the layers: the last norm's input and result and, with whole_head, the probabilities of the vocabulary, which
    the loss per token keeps. Plus what the backward pass makes first: the gradients of one feed-forward.
    """
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    query, kv = heads * config.head_dim, kv_heads * config.head_dim
    chosen, shared = (config.num_experts_per_tok, config.n_shared_experts) if config.use_moe else (0, 1)
    feed_forward = 3 * config.intermediate_size * (chosen + shared)
    layer = 8 * hidden + 4 * heads + size * (2 * hidden + 2 * query + 2 * kv + feed_forward)
    if config.qk_norm:  # query and key before their norm, and its factor for each head in float32
        layer += size * (query + kv) + 4 * (heads + kv_heads)
    layer += size * 2 * hidden * chosen  # inputs and outputs of the experts
    end = (4 + size) * hidden + size * feed_forward + size * config.vocab_size * whole_head
    if checkpointing:  # the input of every layer, and one layer in full
        return positions * (4 * hidden * config.num_hidden_layers + layer + end)
    return positions * (layer * config.num_hidden_layers + end)


def attention_backward_bytes(config: MiniMindConfig, positions: int, borders: int) -> int:
    """Return the bytes of the buffer in which FlashAttention's backward sums the query's gradient.

    One layer at a time, in float32, with 128 extra positions for each packed document that `borders` has room for.
    """
    return 4 * config.num_attention_heads * config.head_dim * (positions + 128 * borders)


class Memory:
    """Memory of this process in bytes: allocated on a device with its own, else resident."""

    def __init__(self, device: torch.device | str):
        device = named_device(str(device))
        self.own = torch.get_device_module(device) if has_own_memory(device) else None

    def reset(self) -> None:
        """Forget the highest value so far, if the system can."""
        if self.own:
            self.own.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.own:
            return self.own.max_memory_allocated()
        return _status("VmHWM") or _highest_resident()

    def total(self) -> int:
        """Return the memory of the device; 0 if the system does not tell."""
        if self.own:
            return self.own.get_device_properties(self.own.current_device()).total_memory
        with contextlib.suppress(OSError):  # in a container it may know a limit that sysconf does not
            text = Path("/proc/meminfo").read_text("ascii")
            return int(re.search(r"^MemTotal:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024
        with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return 0


def _status(name: str) -> int:
    """Return a line of /proc/self/status in bytes; 0 if there is none."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0


def _highest_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
