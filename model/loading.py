"""From what people name by flags (stage, size, folder, device, dtype) to a model that is ready to answer."""

import argparse
import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from model.model_minimind import MiniMindForCausalLM, yarn_parameters
from model.weights import WeightsError, missing_message, read_sidecar, weight_path

STAGE_OF_MODE = {0: "pretrain", 1: "full_sft", 2: "rlhf", 3: "reason", 4: "full_dist"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def boolean(text: str) -> bool:
    """`--flag`, `--flag true` and `--flag False` all mean what they say."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def choose_device(name: str) -> torch.device:
    """The device that --device names; ValueError where it cannot be used."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_weights(out_dir: str | Path, stage: str, hidden_size: int | None, use_moe: bool | None) -> Path:
    """The stage's file: the one that the flags name, else the only one there, else the dense one of size 512."""
    names = re.compile(rf"{stage}_(\d+)(_moe)?\.pth")
    found = {}  # (hidden size, MoE) -> path
    if os.path.isdir(out_dir):
        for path in sorted(Path(out_dir).iterdir()):
            if match := names.fullmatch(path.name):
                found[int(match[1]), bool(match[2])] = path
    fitting = {
        (size, moe): path
        for (size, moe), path in found.items()
        if hidden_size in (None, size) and use_moe in (None, moe)
    }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    wanted = (hidden_size or 512, bool(use_moe))
    if wanted in fitting:
        return fitting[wanted]
    if fitting:
        listed = ", ".join(path.name for path in fitting.values())
        raise WeightsError(f"{out_dir} holds several {stage} weights: {listed}. Choose by --hidden_size and --use_moe")
    raise WeightsError(missing_message(weight_path(out_dir, stage, *wanted)))


def read_config(folder: Path) -> dict:
    """config.json of a folder in Hugging Face format."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        beside = sorted(file.parent.name for file in folder.absolute().parent.glob("*/config.json"))
        there = f"; there are: {', '.join(beside)}" if beside else ""
        raise ValueError(f"{config_file} not found; --hf_path takes a folder that save_pretrained wrote{there}")
    try:
        return json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not valid JSON: {error}") from error


def facts_path(path: Path) -> Path:
    """The file of what a sidecar tells, in other formats: minimind.json in a folder, NAME.gguf.json beside a NAME.gguf
    (NAME.json would be the sidecar of a NAME.pth)."""
    return path / "minimind.json" if path.suffix != ".gguf" else path.with_name(path.name + ".json")


def read_facts(path: Path) -> dict:
    """Stage, flags, metrics and tokenizer of weights that scripts/convert_model.py wrote; {} where nothing tells."""
    return read_sidecar(facts_path(path)) or {}


def load_folder(folder: Path, trust_remote_code: bool, dtype: torch.dtype) -> nn.Module:
    """A model in Hugging Face format. Our own architecture needs no code from the folder; Llama and others come with
    transformers. Weights that lack a tensor are an error, where transformers would draw it at random and warn."""
    config = read_config(folder)
    if config.get("model_type") == "minimind" and not trust_remote_code:
        loader, options = MiniMindForCausalLM, {}
    else:
        from transformers import AutoModelForCausalLM

        loader, options = AutoModelForCausalLM, {"trust_remote_code": trust_remote_code}
    try:
        model, report = loader.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        own_code = "auto_map" in config and not trust_remote_code
        hint = "; the code in it runs only with --trust_remote_code" if own_code else ""
        raise ValueError(f"{folder} cannot be loaded: {error}{hint}") from error
    broken = {kind: sorted(map(str, report[kind]))[:3] for kind in ("missing_keys", "mismatched_keys") if report[kind]}
    if broken:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {broken}")
    return model.eval()


def check_vocabulary(model: nn.Module, source: str | Path, tokenizer_path: str | Path, vocab_size: int) -> None:
    """A tokenizer with more ids than the model belongs to other weights."""
    if vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{tokenizer_path} has {vocab_size} token ids, and {source} {model.config.vocab_size}; "
            "name the tokenizer that the weights were trained with by --tokenizer_path"
        )


def experts_in(config) -> int:
    """Routed experts of a layer, in our configuration or in transformers'; 0 for a dense model."""
    if hasattr(config, "use_moe"):
        return config.n_routed_experts if config.use_moe else 0
    return getattr(config, "num_experts", 0)


def check_sizes(
    config, source: str | Path, hidden_size: int | None, num_hidden_layers: int | None, use_moe: bool | None
) -> None:
    """Sizes come from the weights; a flag that says otherwise is a mistake to tell, not to ignore."""
    for flag, given, held in (
        ("hidden_size", hidden_size, config.hidden_size),
        ("num_hidden_layers", num_hidden_layers, config.num_hidden_layers),
        ("use_moe", use_moe, experts_in(config) > 0),
    ):
        if given not in (None, held):
            raise ValueError(f"--{flag} is {given}, and {source} has {held}; leave the flag out")


def stretch_context(model: nn.Module, factor: float, trained_length: int) -> None:
    """YaRN: the model, ours or one of transformers' Llama family, then reads `factor` times the length in tokens that
    it was trained on. ValueError for a factor below 1."""
    try:
        scaling = yarn_parameters(
            {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained_length}
        )
    except ValueError as error:
        raise ValueError(f"--rope_scaling {factor:g}: {error}") from error
    config = model.config
    config.max_position_embeddings = max(config.max_position_embeddings, round(trained_length * factor))
    if config.model_type == "minimind":
        config.rope_scaling = scaling
        return
    config.rope_parameters = {**scaling, "rope_theta": config.rope_parameters["rope_theta"]}
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(rotary.inv_freq.device)


def trained_length(sidecar: dict | None, given: int | None) -> int:
    """Tokens of the longest rows that the weights were trained on: what is given, else what their sidecar says (for a
    folder in Hugging Face format, read_facts)."""
    known = given or (sidecar or {}).get("flags", {}).get("max_seq_len")
    if not known:
        raise ValueError("--rope_scaling: name the length in tokens that the weights were trained on, --trained_length")
    return known
