"""Low-rank adapters (LoRA, arXiv:2106.09685): W x + (alpha / rank) B A x with W frozen; only A and B train.

An adapter file is a plain state dict, `{module}.lora.A.weight` (rank, in) and `{module}.lora.B.weight` (out, rank), to
be applied as W x + B(A x): saving folds alpha / rank into B, so a reader that knows no scale is right. The original
project's loader reads only the square layers (q_proj, o_proj) of such a file and silently ignores the rest. Train with
`--lora_targets q_proj,o_proj` if an adapter must work there.
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from model.model_minimind import MiniMindConfig
from model.weights import (
    WeightsError,
    check_tokenizer,
    clean_key,
    listed_weights,
    read_sidecar,
    read_state_dict,
    reads_a_file,
    save_weights,
    weight_path,
    write_atomically,
    write_json,
)

# Fields of adapter_config.json that may be set; any other, if only to {}, changes what the tensors mean.
PEFT_FIELDS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "eva_config",
    "loftq_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
PEFT_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal")  # the others change the base weights as well
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """scale · B A x. B starts at zero, so a new adapter does not change its layer."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.A = nn.Linear(linear.in_features, rank, bias=False, dtype=linear.weight.dtype)
        self.B = nn.Linear(rank, linear.out_features, bias=False, dtype=linear.weight.dtype)
        nn.init.normal_(self.A.weight, std=1 / math.sqrt(linear.in_features))
        nn.init.zeros_(self.B.weight)
        self.scale = scale
        self.to(linear.weight.device)  # drawn on the CPU: one seed gives one adapter, whatever the device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.B(self.A(x))  # (..., in) -> (..., rank) -> (..., out)
        return low if self.scale == 1 else low * self.scale

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """Return what the adapter adds to the weight, (out, in) in float32."""
        return self.scale * (self.B.weight.float() @ self.A.weight.float())


class LoRALinear(nn.Linear):
    """A linear layer with an adapter; `attach` turns a plain one into it, remove_lora turns it back."""

    lora: LowRank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + self.lora(x)


def attach(linear: nn.Linear, rank: int, scale: float) -> LowRank:
    """Give a plain linear layer a new adapter."""
    linear.lora = LowRank(linear, rank, scale)
    linear.__class__ = LoRALinear
    return linear.lora


def apply_lora(
    model: nn.Module, rank: int = 8, alpha: float | None = None, targets: Iterable[str] = TARGETS
) -> nn.Module:
    """Add a new adapter to every linear layer of the blocks whose name ends in one of `targets`; freeze all else.

    alpha: the adapter's output is scaled by alpha / rank; None means alpha = rank. Raises ValueError for a rank below 1
    and for targets that no layer has.
    """
    targets = tuple(targets)
    if rank < 1:
        raise ValueError(f"--lora_rank {rank}: must be at least 1")
    layers = {name: layer for name, layer in block_linears(model) if name.rsplit(".", 1)[-1] in targets}
    unknown = [t for t in targets if not any(name.endswith("." + t) for name in layers)]
    if unknown or not targets:
        there = sorted({name.rsplit(".", 1)[-1] for name, _ in block_linears(model)})
        raise ValueError(
            f"--lora_targets {','.join(unknown) or '(none)'}: the blocks have no such linear layer; "
            f"they have {','.join(there)}"
        )
    remove_lora(model)
    model.requires_grad_(False)
    for layer in layers.values():
        attach(layer, rank, (alpha or rank) / rank)
    return model


def remove_lora(model: nn.Module) -> None:
    """Remove the adapter; the base weights never changed."""
    for _, layer in list(lora_layers(model)):
        del layer.lora
        layer.__class__ = nn.Linear


def merge_lora(model: nn.Module) -> None:
    """Add the adapter to the base weights, in float32, and remove it: same outputs, a plain model."""
    for _, layer in lora_layers(model):
        with torch.no_grad():
            layer.weight.copy_(layer.weight.float() + layer.lora.delta())
    remove_lora(model)


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the names of its file, the scale folded into B."""
    state = {}
    for name, layer in lora_layers(model):
        state[f"{name}.lora.A.weight"] = layer.lora.A.weight.detach()
        state[f"{name}.lora.B.weight"] = layer.lora.B.weight.detach() * layer.lora.scale
    return state


def save_lora(path: str | Path, model: nn.Module, sidecar: dict[str, Any] | None = None) -> None:
    """Write the adapter in half precision, without its base."""
    save_weights(path, lora_state_dict(model), sidecar)


def save_merged(path: str | Path, model: nn.Module, sidecar: dict[str, Any] | None = None) -> None:
    """Write the model's weights with its adapters added to them; the model itself stays as it is."""
    merged = copy.deepcopy(model)
    merge_lora(merged)
    save_weights(path, merged, sidecar)


def load_lora(model: nn.Module, path: str | Path, tokenizer_sha256: str | None = None) -> nn.Module:
    """Put the adapter of a file on the model, replacing an earlier one; ranks and targets are read off the file.

    tokenizer_sha256: hash of the tokenizer in use, checked as in load_weights. Raises WeightsError if the file is not
    an adapter, or is for another tokenizer or a model of other sizes; the model is then unchanged.
    """
    pairs, sidecar = read_lora(path), read_sidecar(path)
    check_tokenizer(path, sidecar, tokenizer_sha256)
    _check_depth(model, pairs, sidecar, path)
    put_on(model, pairs, path)
    return model


@torch.no_grad()
def put_on(model: nn.Module, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], path: str | Path) -> None:
    """Add the adapters (A, B) of a file to the layers of these names, replacing an earlier one.

    Raises WeightsError if they do not fit; the model is then unchanged.
    """
    layers = dict(block_linears(model))
    for name, (a, b) in pairs.items():
        if name not in layers:
            raise WeightsError(
                f"{path} has an adapter for {name}, and this model has no such layer; it was made for a model of "
                "another depth, or of the other kind (dense and mixture of experts)"
            )
        wanted = (layers[name].out_features, layers[name].in_features)
        if (b.shape[0], a.shape[1]) != wanted or a.shape[0] != b.shape[1]:
            raise WeightsError(
                f"{path} does not fit this model: its adapter of {name} maps {a.shape[1]} to {b.shape[0]} by ranks "
                f"{a.shape[0]} and {b.shape[1]}, and the layer maps {wanted[1]} to {wanted[0]}; it was made for "
                "another --hidden_size"
            )
    remove_lora(model)
    for name, (a, b) in pairs.items():
        lora = attach(model.get_submodule(name), rank=a.shape[0], scale=1.0)
        lora.A.weight.copy_(a)
        lora.B.weight.copy_(b)


def _check_depth(model: nn.Module, layers: Iterable[str], sidecar: dict | None, path: str | Path) -> None:
    """Raise WeightsError if the adapter is for another depth: a shallower one's would fit the first layers here."""
    here, config = model.config.num_hidden_layers, (sidecar or {}).get("config")
    if isinstance(config, dict):
        there = config.get("num_hidden_layers", MiniMindConfig().num_hidden_layers)
        if there != here:
            raise WeightsError(
                f"{path} was made for a model of {there} layers, this one has {here}; name its base weights, or train "
                "an adapter for these with another --lora_name"
            )
    elif sum(any(f".layers.{index}." in name for name in layers) for index in range(here)) < here:
        warnings.warn(f"{path} adapts only some of this model's {here} layers; was it made for it?", stacklevel=3)


def read_lora(path: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return layer name -> (A, B) of an adapter file. Raises WeightsError if it is not one."""
    state = read_state_dict(path)
    names = {clean_key(key).removesuffix(".lora.A.weight") for key in state if key.endswith(".lora.A.weight")}
    keys = {f"{name}.lora.{side}.weight" for name in names for side in "AB"}
    odd = (keys ^ state.keys()) | {key for key, tensor in state.items() if tensor.dim() != 2}
    if not names or odd:
        raise WeightsError(
            f"{path} is not an adapter file (pairs of matrices *.lora.A.weight and *.lora.B.weight); look at: "
            f"{sorted(odd)[:3] or ['nothing']}"
        )
    return {name: (state[f"{name}.lora.A.weight"], state[f"{name}.lora.B.weight"]) for name in sorted(names)}


# --- files -----------------------------------------------------------------------------------------------------------


def lora_path(out_dir: str | Path, lora_name: str, hidden_size: int, use_moe: bool) -> Path:
    """Return out/lora/{lora_name}_{hidden_size}{_moe}.pth."""
    return weight_path(Path(out_dir) / "lora", lora_name, hidden_size, use_moe)


def find_lora(name_or_path: str, out_dir: str | Path, hidden_size: int, use_moe: bool) -> Path:
    """Return the adapter file that --lora_name means: a path, or a name in out/lora/.

    Older names of adapters for mixtures lack _moe. Raises WeightsError if there is no such file.
    """
    path = Path(name_or_path)
    if path.suffix == ".pth":
        candidates = [path]
    else:
        candidates = [lora_path(out_dir, name_or_path, hidden_size, moe) for moe in {use_moe: 0, False: 0}]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    folder = candidates[0].parent
    raise WeightsError(
        f"{candidates[0]} not found; run trainer/train_lora.py with this --lora_name first. "
        f"{folder} holds: {listed_weights(folder, 'no adapters')}"
    )


def check_peft(model: nn.Module) -> None:
    """Raise ValueError if the peft library cannot hold this model's adapter."""
    if any(".experts." in name or ".shared_experts." in name for name, _ in lora_layers(model)):
        raise ValueError("the PEFT layout holds adapters of dense models; peft's MoE formats name experts otherwise")


def save_peft(folder: str | Path, model: nn.Module) -> None:
    """Write the adapter in the layout of the peft library: adapter_config.json and adapter_model.safetensors.

    It fits the dense model in Llama's or Qwen3's format, whose layers have the same names. The name of that model stays
    empty. Raises ValueError for a mixture of experts, or for different ranks.
    """
    from safetensors.torch import save

    check_peft(model)
    ranks = {layer.lora.A.out_features for _, layer in lora_layers(model)}
    if len(ranks) != 1:
        raise ValueError(f"the PEFT layout takes one rank for all layers; this adapter has {sorted(ranks)}")
    tensors = {
        "base_model.model." + key.replace(".lora.A.", ".lora_A.").replace(".lora.B.", ".lora_B."): tensor.float().cpu()
        for key, tensor in lora_state_dict(model).items()
    }
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": rank,  # the scale is in B already
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name, _ in lora_layers(model)}),
    }
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata={"format": "pt"})
    write_atomically(Path(folder) / "adapter_model.safetensors", lambda file: file.write(data))
    write_json(Path(folder) / "adapter_config.json", config)


@reads_a_file
def read_peft(folder: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return layer name -> (A, B in float32 with the scale folded in) of an adapter that the peft library saved.

    Raises WeightsError for what our adapters cannot express: DoRA, trained biases or whole modules, other layers.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} is not a readable PEFT folder (adapter_model.safetensors): {error}") from error
    allowed = {"peft_type": ("lora",), "bias": ("none",), "init_lora_weights": PEFT_INITS}
    beyond = [name for name, values in allowed.items() if str(config.get(name)).lower() not in values]
    beyond += [name for name, value in config.items() if name not in PEFT_FIELDS and value not in (None, False, [])]
    if beyond:
        kinds = ", ".join(f"{name} {config.get(name)}" for name in beyond)
        raise WeightsError(f"{folder}: our adapter files hold W x + B(A x) and nothing else, so not {kinds}")
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key in sorted(tensors):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        other = key.replace(".lora_A.", ".lora_B.")
        if key.endswith(".lora_A.weight") and ".layers." in name and other in tensors:
            a, b = tensors[key].float(), tensors[other].float()
            if a.dim() == b.dim() == 2 and len(a) == b.shape[1]:
                pairs[name] = a, b * _peft_scale(config, name, len(a))
    if not pairs or 2 * len(pairs) != len(tensors):
        raise WeightsError(
            f"{folder} holds more than pairs of matrices, A and B of one rank, for the linear layers of the blocks"
        )
    return pairs


def _peft_scale(config: dict[str, Any], name: str, rank: int) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with rsLoRA; alpha_pattern may give a layer its own alpha."""
    patterns = config.get("alpha_pattern") or {}
    own = (value for pattern, value in patterns.items() if re.search(rf"(^|\.){pattern}$", name))
    alpha = next(own, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# --- layers ----------------------------------------------------------------------------------------------------------


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, layer) of every linear layer inside the blocks, except those of adapters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}" and ".lora." not in name:
            yield name, module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))
