"""What the benchmarks share: the same model in transformers, and the machine that a figure belongs to."""

import contextlib
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.model_minimind import PRESETS, MiniMindConfig

MODELS = {"26M": PRESETS["minimind2_26m"], "104M": PRESETS["minimind2_104m"], "MoE 145M": PRESETS["minimind2_moe"]}
SHARED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rms_norm_eps", "rope_theta", "max_position_embeddings",
)  # fmt: skip


def llama(config: MiniMindConfig, state: dict | None = None, **more) -> LlamaForCausalLM:
    """transformers' Llama of the same size, with our weights if they are given. Dense models only."""
    sizes = {name: getattr(config, name) for name in SHARED}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, **more))
    if state is not None:
        model.load_state_dict(state)
    return model


def endless(make_iterator):
    while True:
        yield from make_iterator()


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def machine(device: str) -> dict[str, str]:
    """Names of card or processor, and versions."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("torch", "transformers", "trl", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if device.startswith("cuda"):
        found |= {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        return found
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8")
        if name := re.search(r"^model name\s*: (.*)$", text, re.MULTILINE):
            found["processor"] = name[1]
    return found
