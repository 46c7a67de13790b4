"""From flags (stage, size, folder, device, dtype) to a model that is ready to answer.

add_flags(parser, "model_mode", "out_dir", "hidden_size", "use_moe", *READY_FLAGS)
ready = load_ready(named_path(args), ChatTokenizer, **ready_flags(args))
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from model.device import choose_device, has_bfloat16
from model.flags import BOOL, HISTORY, at_least, utf8
from model.model_lora import find_lora, load_lora, merge_lora
from model.model_minimind import PRESETS, MiniMindForCausalLM, yarn_parameters
from model.weights import IS_SAFETENSORS, STAGE_OF_MODE, find_weights, load_model, mistaken_file, read_sidecar

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens of conversation and answer for weights whose sidecar does not say how long rows were in training.
CONTEXT = 8192


# --- flags -----------------------------------------------------------------------------------------------------------


MODES = ", ".join(f"{mode} {stage}" for mode, stage in sorted(STAGE_OF_MODE.items()))
# The flags that chat, server, page, converter and scores share.
SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "model_mode": dict(type=int, default=1, choices=sorted(STAGE_OF_MODE), help=f"stage of the weights: {MODES}"),
    "load": dict(type=int, default=0, choices=[0, 1], help="0: .pth in --out_dir; 1: Hugging Face folder --hf_path"),
    "out_dir": dict(type=utf8, default=str(ROOT / "out"), help="folder of the .pth files, adapters in its lora/"),
    "hf_path": dict(type=utf8, default=str(ROOT / "MiniMind2"), help="folder in Hugging Face format, for --load 1"),
    "trust_remote_code": dict(BOOL, default=False, help="run the code in that folder"),
    "tokenizer_path": dict(type=utf8, help="folder of the tokenizer (default: the model's own, else model/)"),
    "lora_name": dict(type=utf8, default="None", help="adapter to apply: a name in OUT_DIR/lora/, or a .pth file"),
    "hidden_size": dict(type=int, help="chooses between files (default: the only one there, or 512)"),
    "num_hidden_layers": dict(type=int, help="read from the weights; checked against them if given"),
    "num_attention_heads": dict(type=at_least(1), help="of weights without a sidecar, if it is not 8"),
    "preset": dict(
        choices=list(PRESETS), help="a known model: sizes that no flag gives, and what a file without a sidecar is"
    ),
    "use_moe": dict(BOOL, help="chooses between files"),
    "max_seq_len": dict(
        type=at_least(2),
        help="context in tokens, conversation and answer (default: the length of the rows that the weights were "
        f"trained on, {CONTEXT} if unknown)",
    ),
    "rope_scaling": dict(type=float, help="YaRN: read this many times the trained length"),
    "trained_length": dict(type=at_least(1), help="tokens, for --rope_scaling (default: what the sidecar says)"),
    "temperature": dict(type=float, default=0.85, help="0: greedy"),
    "top_p": dict(type=float, default=0.85, help="sample from the most likely tokens that add up to this; 1: all"),
    "top_k": dict(type=int, default=0, help="sample from the k most likely tokens; 0: all"),
    "repetition_penalty": dict(type=float, default=1.0, help="above 1: tokens already there become less likely"),
    "max_new_tokens": dict(type=at_least(1), default=1024, help="longest answer in tokens"),
    "history_cnt": HISTORY,
    "device": dict(default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps, xpu or npu"),
    "dtype": dict(choices=list(DTYPES), help="default: bfloat16 on CUDA, or float16 without it; else float32"),
}


def add_flags(parser: argparse._ActionsContainer, *names: str) -> None:
    for name in names:
        parser.add_argument(f"--{name}", **SHARED_FLAGS[name])


# Flags that load_ready takes by the same name.
READY_FLAGS = (
    "preset", "num_attention_heads",
    "tokenizer_path", "trust_remote_code", "max_seq_len", "rope_scaling", "trained_length", "device", "dtype",
)  # fmt: skip


# --- a model that is ready -------------------------------------------------------------------------------------------


class ReadyModel(NamedTuple):
    """tokenizer: a ChatTokenizer. sidecar: {} if there is none. context_length: tokens of conversation and answer."""

    model: nn.Module
    tokenizer: Any
    path: Path
    sidecar: dict
    context_length: int


def named_path(args: argparse.Namespace) -> Path:
    """Return the .pth file or the folder that the flags name."""
    if args.load == 1:
        return Path(args.hf_path)
    hidden_size, _, use_moe = given_sizes(args)
    return find_weights(STAGE_OF_MODE[args.model_mode], args.out_dir, hidden_size, use_moe)


def given_sizes(args: argparse.Namespace) -> tuple[int | None, int | None, bool | None]:
    """Return hidden size, layers and whether it is a mixture: from the flags, else from --preset, else None."""
    preset = PRESETS[args.preset] if args.preset else {}
    if args.preset:
        preset = {"use_moe": False, **preset}
    names = ("hidden_size", "num_hidden_layers", "use_moe")
    return tuple(preset.get(name) if getattr(args, name) is None else getattr(args, name) for name in names)


def ready_flags(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name in READY_FLAGS}


def tokenizer_folder(path: Path, given: str | Path | None = None) -> Path:
    """Return the folder of the tokenizer that most likely belongs to these weights."""
    return Path(given or (path if (path / "tokenizer.json").is_file() else ROOT / "model"))


def load_ready(
    path: Path,
    read_tokenizer: Callable[[Path], Any],
    *,
    merged_lora: str | None = None,
    out_dir: str | Path = ROOT / "out",
    preset: str | None = None,
    num_attention_heads: int | None = None,
    tokenizer_path: str | Path | None = None,
    trust_remote_code: bool = False,
    max_seq_len: int | None = None,
    rope_scaling: float | None = None,
    trained_length: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> ReadyModel:
    """Load a .pth file, or a folder in Hugging Face format, in eval mode on its device.

    read_tokenizer: dataset.tokenization.ChatTokenizer, which this folder may not import. merged_lora: a name in
    out_dir/lora/ or a .pth file, to be merged into the weights. Raises ValueError if files or flags are wrong.
    """
    place = choose_device(device)
    try:
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    compute = choose_dtype(dtype, place)
    tokenizer = read_tokenizer(tokenizer_folder(path, tokenizer_path))
    if path.suffix == ".pth":
        model, sidecar = load_model(path, tokenizer.sha256, unseen_fields(preset, num_attention_heads))
    else:
        model = load_folder(path, trust_remote_code, torch.float32 if merged_lora else compute)
        sidecar = read_sidecar(path)
        check_template(path, tokenizer.template, model.config.model_type)
    check_vocabulary(model, path, tokenizer.path, tokenizer.vocab_size)
    scale_positions(model, sidecar, rope_scaling, trained_length)
    if merged_lora:
        lora = find_lora(merged_lora, out_dir, model.config.hidden_size, experts_in(model.config) > 0)
        merge_lora(load_lora(model, lora, tokenizer.sha256))
    context = choose_context(model.config, sidecar, max_seq_len)
    return ReadyModel(model.to(device=place, dtype=compute).eval(), tokenizer, path, sidecar or {}, context)


def unseen_fields(preset: str | None, num_attention_heads: int | None) -> dict[str, Any]:
    """Return the configuration that flags name for weights without a sidecar."""
    fields = dict(PRESETS[preset] if preset else {})
    return fields | ({"num_attention_heads": num_attention_heads} if num_attention_heads else {})


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is not None:
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def read_config(folder: Path) -> dict:
    """Read config.json of a folder in Hugging Face format."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        others = sorted(file.parent.name for file in folder.absolute().parent.glob("*/config.json"))
        there = f"; there are: {', '.join(others)}" if others else ""
        raise ValueError(f"{config_file} not found; --hf_path takes a folder that save_pretrained wrote{there}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} is not a JSON object")
    return config


def load_folder(folder: Path, trust_remote_code: bool, dtype: torch.dtype) -> nn.Module:
    """Load a model in Hugging Face format. Ours needs no code from the folder; Llama and others come with transformers.

    Raises ValueError if a tensor is missing; transformers would fill it with random numbers and warn.
    """
    config = read_config(folder)
    if config.get("model_type") == "minimind" and not trust_remote_code:
        loader, options = MiniMindForCausalLM, {}
    else:
        from transformers import AutoModelForCausalLM

        loader, options = AutoModelForCausalLM, {"trust_remote_code": trust_remote_code}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if mistaken_file(file) not in ("", IS_SAFETENSORS):
            raise ValueError(f"{file} holds no weights: {mistaken_file(file)}")
    try:
        model, report = loader.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # also pickle.UnpicklingError, SafetensorError ...
        if "weights_only" in str(error):  # torch's message advises to load it anyway
            error = "its .bin files hold more than tensors, which could run code"
        own_code = "auto_map" in config and not trust_remote_code
        hint = "; the code in it runs only with --trust_remote_code" if own_code else ""
        raise ValueError(f"{folder} cannot be loaded: {error}{hint}") from None
    broken = {kind: sorted(map(str, report[kind]))[:3] for kind in ("missing_keys", "mismatched_keys") if report[kind]}
    if broken:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {broken}")
    return model.eval()


def check_vocabulary(model: nn.Module, source: str | Path, tokenizer_path: str | Path, vocab_size: int) -> None:
    """Raise ValueError if the tokenizer has more ids than the model: it belongs to other weights."""
    if vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{tokenizer_path} has {vocab_size} token ids, and {source} {model.config.vocab_size}; "
            "name the tokenizer that the weights were trained with by --tokenizer_path"
        )


def check_template(folder: Path, template: Any, model_type: str) -> None:
    """Warn if the prompts of somebody else's model are not written by its own chat template."""
    if model_type != "minimind" and (not template.given or template.file.parent != folder):
        other = template.file if template.given else "MiniMind's chat template"
        warnings.warn(
            f"{folder} is asked through {other}, not through a chat template of its own: the answers are noise if the "
            "model was trained with another",
            stacklevel=3,
        )


def experts_in(config) -> int:
    """Return the routed experts of a layer, in our configuration or in transformers'; 0 for a dense model."""
    if hasattr(config, "use_moe"):
        return config.n_routed_experts if config.use_moe else 0
    return getattr(config, "num_experts", 0)


def check_sizes(
    config, source: str | Path, hidden_size: int | None, num_hidden_layers: int | None, use_moe: bool | None
) -> None:
    """Raise ValueError if a flag contradicts the sizes, which the weights decide."""
    for flag, given, held in (
        ("hidden_size", hidden_size, config.hidden_size),
        ("num_hidden_layers", num_hidden_layers, config.num_hidden_layers),
        ("use_moe", use_moe, experts_in(config) > 0),
    ):
        if given not in (None, held):
            raise ValueError(f"--{flag} is {given}, and {source} has {held}; leave the flag out")


# --- context length --------------------------------------------------------------------------------------------------


def choose_context(config: Any, sidecar: dict | None, wanted: int | None = None) -> int:
    """Return how many tokens conversation and answer may have; warn if the model was not trained on so many."""
    known = row_length(sidecar)
    scaling = getattr(config, "rope_parameters" if config.model_type != "minimind" else "rope_scaling", None) or {}
    if scaling.get("factor") and "original_max_position_embeddings" in scaling:
        known = round(scaling["original_max_position_embeddings"] * scaling["factor"])
    if wanted and known and wanted > known:
        warnings.warn(
            f"--max_seq_len is {wanted}, and the weights have learned to read {known} tokens: answers get worse beyond "
            "that. --rope_scaling FACTOR stretches it",
            stacklevel=3,
        )
    longest = config.max_position_embeddings
    if wanted and wanted > longest:
        warnings.warn(f"the context is {longest} tokens: the model has no more positions", stacklevel=3)
    return min(wanted or known or CONTEXT, longest)


def scale_positions(model: nn.Module, sidecar: dict | None, factor: float | None, length: int | None) -> None:
    """Apply --rope_scaling and --trained_length."""
    if factor is not None:
        stretch_context(model, factor, trained_length(sidecar, length))
    elif length is not None:
        raise ValueError("--trained_length belongs to --rope_scaling FACTOR")


def row_length(sidecar: dict | None) -> int | None:
    """Return the length of training's rows in tokens, if the sidecar knows it."""
    length = (sidecar or {}).get("flags", {}).get("max_seq_len")
    return length if type(length) is int and 2 <= length < 2**31 else None


def trained_length(sidecar: dict | None, given: int | None) -> int:
    """Return the length of the rows in training: the given one, else the sidecar's."""
    known = given or row_length(sidecar)
    if not known:
        raise ValueError("--rope_scaling: name the length in tokens that the weights were trained on, --trained_length")
    return known


def stretch_context(model: nn.Module, factor: float, trained_length: int) -> None:
    """Make a model, ours or of transformers' Llama family, read `factor` times the tokens it was trained on (YaRN).

    Raises ValueError for a factor below 1.
    """
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
