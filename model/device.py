"""What a device can do, and how tensors get there without waiting for it."""

from collections.abc import Sequence

import numpy as np
import torch


def to_device(values: Sequence | np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return `values` as a tensor on `device` without waiting for work queued on a GPU.

    The copy goes through pinned memory, which torch does not reuse until the GPU has read it.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def cuda_has_bfloat16() -> bool:
    """Tell whether this GPU computes in bfloat16; emulation does not count."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def usable_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype to train in, and a notice if it is not the one named, else ""."""
    if name == "bfloat16" and device.type == "cuda" and not cuda_has_bfloat16():
        return torch.float16, "this GPU has no bfloat16: training in float16 with a gradient scaler"
    if name == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        return torch.float32, "this CPU has no bfloat16 arithmetic: training in float32"
    if name == "float16" and device.type != "cuda":
        return torch.float32, f"float16 training needs a GPU: training in float32 on {device.type}"
    return getattr(torch, name), ""
