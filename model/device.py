"""What a device can do, and how tensors get there without waiting for it.

cpu, cuda (ROCm's GPUs have this name too), mps (an Apple GPU), xpu (an Intel GPU) and npu (Ascend, with torch_npu).
mps, xpu and npu follow torch's documentation: nobody has run them yet. Which kernel computes what is decided where the
kernels are: model_minimind.py, decoder.py, token_losses.py.
"""

import importlib
from collections.abc import Sequence

import numpy as np
import torch

CPU = torch.device("cpu")


def choose_device(name: str) -> torch.device:
    """Return the device that --device names. Raises ValueError if this machine has none."""
    device = named_device(name)
    here = torch.accelerator.current_accelerator(check_available=True)
    if device.type != "cpu" and (here is None or here.type != device.type):
        raise ValueError(f"--device {name}: this machine has no usable {device.type} device; use --device cpu")
    count = torch.accelerator.device_count()
    if device.type != "cpu" and not 0 <= (device.index or 0) < count:
        raise ValueError(f"--device {name}: this machine has {count} {device.type} device(s), counted from 0")
    return device


def named_device(name: str) -> torch.device:
    """Return the device, here or elsewhere. Raises ValueError if there is no such kind of device."""
    if name.startswith("npu"):
        try:
            importlib.import_module("torch_npu")  # which tells torch about npu
        except ImportError:
            raise ValueError(f"--device {name}: torch_npu is not installed") from None
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; use cpu, cuda, cuda:N, mps, xpu or npu") from None


def has_own_memory(device: torch.device) -> bool:
    """Tell whether a process chooses one of several devices, each with memory of its own."""
    return device.type not in ("cpu", "mps")


def to_device(values: Sequence | np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return `values` as a tensor on `device` without waiting for work queued on a GPU.

    The copy goes through pinned memory, which torch does not reuse until the GPU has read it.
    """
    if not pins_memory(device):
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def pins_memory(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu")


def compiles(device: torch.device) -> bool:
    """Tell whether torch.compile is worth its time here."""
    return device.type in ("cuda", "xpu")


def has_fused_adamw(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda", "mps", "xpu")


def where_float64_is(device: torch.device) -> torch.device:
    """Return the device itself if it is a CPU or CUDA, which have float64; else the CPU."""
    return device if device.type in ("cpu", "cuda") else CPU


def collectives(device: torch.device) -> str:
    """Return the backend of torch.distributed for this device; where float64 sums run on the CPU, also one for it."""
    if device.type in ("cpu", "cuda"):
        return {"cpu": "gloo", "cuda": "nccl"}[device.type]
    return f"cpu:gloo,{device.type}:{torch.distributed.get_default_backend_for_device(device)}"


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether the device computes in bfloat16; emulation does not count."""
    if device.type == "cpu":
        return cpu_has_bfloat16()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    return getattr(torch.get_device_module(device), "is_bf16_supported", lambda: False)()


def cpu_has_bfloat16() -> bool:
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def usable_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype to train in, and a notice if it is not the one named, else ""."""
    if name == "bfloat16" and not has_bfloat16(device):
        if device.type == "cuda":
            return torch.float16, "this GPU has no bfloat16: training in float16 with a gradient scaler"
        called = "CPU" if device.type == "cpu" else f"{device.type} device"
        return torch.float32, f"this {called} has no bfloat16 arithmetic: training in float32"
    if name == "float16" and device.type != "cuda":
        return torch.float32, f"float16 training needs CUDA: training in float32 on {device.type}"
    return getattr(torch, name), ""
