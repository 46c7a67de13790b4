"""Weight files: their names, how they are written and how they are read.

A weight file is a plain state dict of half-precision tensors and nothing else. Its sidecar, a JSON file next to it,
says what the weights are (configuration, stage, tokenizer, losses); it is used when present and never required.
"""

import errno
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from torch import nn

from model.model_minimind import MINIMIND3_FILES, MiniMindConfig, MiniMindForCausalLM


class Stage(NamedTuple):
    """mode: --model_mode of the chats. script: what trains it. order: rank in a list of models to talk to."""

    mode: int
    script: str
    order: int


# A stage's name is also the beginning of its weight file's name.
STAGES = {
    "pretrain": Stage(0, "train_pretrain.py", 6),
    "full_sft": Stage(1, "train_full_sft.py", 1),
    "rlhf": Stage(2, "train_dpo.py", 2),
    "reason": Stage(3, "train_distill_reason.py", 4),
    "full_dist": Stage(4, "train_distillation.py", 5),
    "grpo": Stage(5, "train_grpo.py", 3),
}
STAGE_OF_MODE = {stage.mode: name for name, stage in STAGES.items()}
# The fields of a sidecar that are read. Other people's sidecars are checked against these types.
SIDECAR_TYPES: dict[str, type] = dict.fromkeys(("config", "flags", "metrics", "progress"), dict)
SIDECAR_TYPES |= dict.fromkeys(("tokenizer_sha256", "stage"), str)
IS_SAFETENSORS = "it is a safetensors file; put it in its folder, next to config.json, and use --load 1"
# First bytes of a file -> what it is, and the cure.
MISTAKEN_FILES = (
    (rb"\Z", "it is empty; a download or a copy was interrupted, so fetch it again"),
    (rb"version https://git-lfs", "it is a Git-LFS pointer; run git lfs pull, or download the file itself"),
    (rb"\s*<(!doctype|html|head|\?xml)", "it is a web page, such as a login or an error; download the file itself"),
    (rb"\s*[{[]", "it is JSON, such as a server's error message; download the file again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "it is compressed; unpack it first"),
    (rb"GGUF", "it is a GGUF file; name it .gguf and read it with scripts/convert_model.py --input"),
    (rb".{6}\0\0\{", IS_SAFETENSORS),
)
WEIGHT_NAME = re.compile(rf"(?P<stage>{'|'.join(STAGES)})_(?P<hidden_size>\d+)(?P<moe>_moe)?")


class WeightsError(ValueError):
    """Weights are missing, unreadable or do not fit; the message says what to do."""


T = TypeVar("T")


def reads_a_file(read: Callable[..., T]) -> Callable[..., T]:
    """Make a reader raise WeightsError, naming the file (its first argument), for whatever it stumbles over."""

    @functools.wraps(read)
    def reading(path: str | Path, *args: Any, **options: Any) -> T:
        try:
            return read(path, *args, **options)
        except (ArithmeticError, AttributeError, LookupError, MemoryError, re.error, RuntimeError, TypeError) as error:
            what = f"{type(error).__name__}, {' '.join(str(error).split())[:200]}"
            raise WeightsError(f"{path} is damaged, or not what it seems: {what}") from error

    return reading


def weight_path(out_dir: str | Path, stage: str, hidden_size: int, use_moe: bool) -> Path:
    """Return out/{stage}_{hidden_size}{_moe}.pth."""
    return Path(out_dir) / f"{stage}_{hidden_size}{'_moe' if use_moe else ''}.pth"


def find_weights(
    stage_or_path: str,
    out_dir: str | Path,
    hidden_size: int | None = None,
    use_moe: bool | None = None,
    size_flag: str = "--hidden_size",
) -> Path:
    """Return the existing weight file that a flag names: a .pth, or a stage's file in out_dir.

    If a size is None, take the stage's only file that fits, else the dense one of size 512. size_flag: the flag that
    chose hidden_size, for the message. Raises WeightsError if there is no such file, or no way to choose.
    """
    if stage_or_path not in STAGES:
        path = Path(stage_or_path)
        if path.suffix != ".pth":
            raise WeightsError(
                f"{stage_or_path} is neither a .pth file nor a stage; the stages are {', '.join(STAGES)}. "
                f"{out_dir} holds: {listed_weights(Path(out_dir))}"
            )
        if not path.is_file():
            raise WeightsError(missing_message(path, size_flag))
        return path
    fitting = {}  # (hidden size, MoE) -> path
    for path in sorted(Path(out_dir).glob(f"{stage_or_path}_*.pth")):
        if match := WEIGHT_NAME.fullmatch(path.stem):
            size, moe = int(match["hidden_size"]), bool(match["moe"])
            if hidden_size in (None, size) and use_moe in (None, moe) and path.is_file():
                fitting[size, moe] = path
    wanted = (hidden_size or 512, bool(use_moe))
    if len(fitting) == 1 or wanted in fitting:
        return fitting.get(wanted, next(iter(fitting.values())))
    if fitting:
        listed = ", ".join(path.name for path in fitting.values())
        raise WeightsError(
            f"{out_dir} holds several {stage_or_path} weights: {listed}. Choose by {size_flag} and --use_moe"
        )
    raise WeightsError(missing_message(weight_path(out_dir, stage_or_path, *wanted), size_flag))


def sidecar_path(path: str | Path) -> Path:
    """Return NAME.json for NAME.pth, NAME.gguf.json for NAME.gguf, minimind.json in a Hugging Face folder."""
    path = Path(path)
    if path.suffix == ".gguf":  # NAME.json would be the sidecar of a NAME.pth
        return path.with_name(path.name + ".json")
    return path.with_suffix(".json") if path.suffix == ".pth" else path / "minimind.json"


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write to a temporary file, flush it to disk and rename it: a reader sees the old file or the new one, whole.

    Raises WeightsError if the folder cannot be written or the disk is full; the previous file stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # what a killed process left behind
            if stale.is_file():
                stale.unlink(missing_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, file_mode())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        full = "enforce fail" in str(error) or "PytorchStreamWriter" in str(error)  # torch.save's words for a full disk
        kept = "; the previous file is as it was" if path.exists() else ""
        raise WeightsError(
            f"cannot write {path}: {os.strerror(errno.ENOSPC) if full else error}{kept}. "
            "Check --out_dir, its permissions and free space."
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def file_mode() -> int:
    """Return the permissions that a new file gets by default; temporary files are readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows has no such call and needs none."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n"
    # a path that is not UTF-8 becomes a JSON escape
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def clean_key(key: str) -> str:
    """Return a parameter's name without the prefixes of torch.compile and DDP."""
    return re.sub(r"^(_orig_mod\.|module\.)+", "", key)


def half_state_dict(model: nn.Module | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the model's weights in float16 on the CPU under their plain names; tied tensors stay one storage."""
    state = model if isinstance(model, dict) else model.state_dict()
    copies: dict[tuple, torch.Tensor] = {}
    result = {}
    for key, tensor in state.items():
        source = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if source not in copies or tensor.numel() == 0:
            copies[source] = _to_half(clean_key(key), tensor)
        result[clean_key(key)] = copies[source]
    return result


def _to_half(key: str, tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.detach().to("cpu", torch.float16, copy=True)
    if not torch.isfinite(half).all():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{key} holds NaN or infinity; nothing was written")
        raise WeightsError(f"{key} reaches {tensor.abs().max():.3g}, beyond float16's 65504; nothing was written")
    return half


def save_weights(
    path: str | Path, model: nn.Module | dict[str, torch.Tensor], sidecar: dict[str, Any] | None = None
) -> None:
    """Write the half-precision state dict and, if given, the sidecar next to it, each atomically."""
    state = half_state_dict(model)
    write_atomically(path, lambda file: torch.save(state, file))
    if sidecar is not None:
        write_json(sidecar_path(path), sidecar)


def read_sidecar(path: str | Path) -> dict[str, Any] | None:
    """Return the sidecar of a weight file or a folder of weights, or None if there is none."""
    side = sidecar_path(path)
    try:
        content = json.loads(side.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{side} is not readable ({error}); delete it to load the weights without it") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{side} is not a JSON object; delete it to load the weights without it")
    for name, kind in SIDECAR_TYPES.items():
        if not isinstance(content.get(name), kind | None):
            raise WeightsError(
                f"{side}: {name} is not {'an object' if kind is dict else 'a text'}; delete it to load the weights "
                "without it"
            )
    return {name: value for name, value in content.items() if value is not None}


def read_state_dict(path: str | Path, old_names: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a .pth under plain names; anything that could run code is refused.

    old_names: accept the names from before April 2025, which are an error otherwise.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(missing_message(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: UnpicklingError, RuntimeError, EOFError, KeyError ...
        what = mistaken_file(path) or "it is damaged, or holds more than tensors, which could run code"
        raise WeightsError(f"{path} is not a weight file of tensors only, so it was not loaded: {what}") from error
    named = list(state.items()) if isinstance(state, dict) else []
    if not named or not all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in named):
        raise WeightsError(
            f"{path} does not hold a plain state dict (names to tensors); it is not a weight file of ours"
        )
    if not old_names and has_old_names(state):
        raise WeightsError(
            f"{path} holds weights of the original project from before April 2025 (tok_embeddings, wq, w1 ...); "
            "turn them into today's names with scripts/convert_model.py first"
        )
    return {clean_key(key): tensor for key, tensor in state.items()}


def has_old_names(state: Iterable[str]) -> bool:
    """Tell whether tensors have the names that the original project used before April 2025."""
    return any(key == "tok_embeddings.weight" or ".attention.wq." in key for key in state)


def mistaken_file(path: Path) -> str:
    """Say what a file is that was saved as weights by mistake, and the cure; "" if its first bytes do not tell."""
    with open(path, "rb") as file:
        head = file.read(512)
    return next((what for pattern, what in MISTAKEN_FILES if re.match(pattern, head, re.DOTALL | re.IGNORECASE)), "")


def missing_message(path: Path, size_flag: str = "--hidden_size") -> str:
    """Say what is missing, which script makes it, and what is there instead."""
    match = WEIGHT_NAME.fullmatch(path.stem)
    hint = ""
    if match:
        hint = f"; run trainer/{STAGES[match['stage']].script} first, or name another size with {size_flag}"
    if path.is_dir():
        return f"{path} is a folder, not a weight file{hint}"
    message = f"{path} not found{hint}. {path.parent} holds: {listed_weights(path.parent)}"
    quickstart = path.parent / "quickstart"
    if match and any(quickstart.glob(f"{match['stage']}_*.pth")):
        message += f". --out_dir {quickstart} holds: {listed_weights(quickstart)}"
    return message


def listed_weights(folder: Path, none: str = "no weights") -> str:
    return ", ".join(sorted(path.name for path in folder.glob("*.pth"))) or none


def config_from_state_dict(
    state: dict[str, torch.Tensor], sidecar: dict | None = None, unseen: dict[str, Any] | None = None
) -> MiniMindConfig:
    """Read the sizes off the tensors.

    What tensors do not show (theta, eps, top-k, without qk_norm the number of heads) comes from the sidecar, else from
    `unseen`, else from the original's models of this kind.
    """
    prefix = "model.layers.0."
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        layers = {int(key.split(".")[2]) for key in state if key.startswith("model.layers.")}
        query_rows, key_rows = (state[f"{prefix}self_attn.{name}_proj.weight"].shape[0] for name in "qk")
        use_moe = f"{prefix}mlp.gate.weight" in state
        intermediate_size = state[prefix + ("mlp.experts.0." if use_moe else "mlp.") + "gate_proj.weight"].shape[0]
        qk_norm = f"{prefix}self_attn.q_norm.weight" in state
        head_dim = state[f"{prefix}self_attn.q_norm.weight"].shape[0] if qk_norm else None
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(f"these are not MiniMind weights: {error} is missing or has another shape") from error
    known = inspect.signature(MiniMindConfig).parameters.keys() | {f"{name}_token_id" for name in ("bos", "eos", "pad")}
    told = {name: value for name, value in (sidecar or {}).get("config", {}).items() if name in known}
    guessed = MINIMIND3_FILES if qk_norm and not told else {}
    told = {**guessed, **(unseen or {}), **told}
    if (unseen or {}).get("qk_norm", qk_norm) != qk_norm:
        raise WeightsError(
            "these weights have no query/key norm, which MiniMind-3 has; choose a --preset of MiniMind-2"
        )
    heads = (
        query_rows // head_dim if head_dim else told.get("num_attention_heads", MiniMindConfig().num_attention_heads)
    )
    if type(heads) is not int or not 1 <= heads <= query_rows or query_rows % heads or key_rows % (query_rows // heads):
        raise WeightsError(
            f"{heads} attention heads do not divide the {query_rows} rows of q_proj and the {key_rows} of k_proj; name "
            "the number that these weights were trained with by --num_attention_heads"
        )
    told |= {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": key_rows // (query_rows // heads),
        "head_dim": query_rows // heads,
        "qk_norm": qk_norm,
        "intermediate_size": intermediate_size,
        "use_moe": use_moe,
    }
    if use_moe:
        told["n_routed_experts"] = state[f"{prefix}mlp.gate.weight"].shape[0]
        told["n_shared_experts"] = len({key.split(".")[5] for key in state if f"{prefix}mlp.shared_experts." in key})
    return MiniMindConfig(**told)


def heads_are_guessed(config: MiniMindConfig, sidecar: dict | None) -> bool:
    """Tell whether nothing shows the number of heads, and it is not the presets' four query heads to a key head."""
    known = (sidecar or {}).get("config") or config.qk_norm
    return not known and config.num_attention_heads != 4 * config.num_key_value_heads


def config_of_file(
    path: str | Path, state: dict[str, torch.Tensor], sidecar: dict | None, unseen: dict[str, Any] | None = None
) -> MiniMindConfig:
    """Return config_from_state_dict's result; errors name the file, and a warning says what was guessed."""
    try:
        config = config_from_state_dict(state, sidecar, unseen)
    except ValueError as error:
        said = f" (its sidecar {sidecar_path(path).name} counts too)" if sidecar else ""
        raise WeightsError(f"{path} cannot be loaded: {error}{said}") from error
    if (sidecar or {}).get("config"):
        return config
    if config.qk_norm:
        rest = f"rms_norm_eps {config.rms_norm_eps:g}, rope_theta {config.rope_theta:g}"
        rest += f", {config.num_experts_per_tok} expert per token" * config.use_moe
        warnings.warn(f"{path} has no sidecar; its tensors say MiniMind-3, so it is read with {rest}", stacklevel=3)
    elif heads_are_guessed(config, sidecar) and not unseen:
        warnings.warn(
            f"{path} has no sidecar, and its tensors do not show the number of attention heads: "
            f"{config.num_attention_heads} assumed. A wrong number makes noise; name it with --num_attention_heads",
            stacklevel=3,
        )
    return config


def tie_head(path: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Fill in a missing head, which is the embedding. Raises WeightsError if the file has a head of its own."""
    embedding = state.get("model.embed_tokens.weight")
    head = state.setdefault("lm_head.weight", embedding)
    if embedding is None or head is embedding:
        return
    if head.shape != embedding.shape or not torch.equal(head.nan_to_num(), embedding.nan_to_num()):
        raise WeightsError(
            f"{path} has an lm_head.weight that differs from the embedding (untied weights); MiniMind shares one "
            "tensor, so loading it would change the model"
        )


def _read(path: str | Path, tokenizer_sha256: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    state, sidecar = read_state_dict(path), read_sidecar(path)
    check_tokenizer(path, sidecar, tokenizer_sha256)
    tie_head(path, state)
    return state, sidecar


def load_weights(model: nn.Module, path: str | Path, tokenizer_sha256: str | None = None) -> dict[str, Any] | None:
    """Load a weight file into a model of the same sizes, strictly; return the sidecar if there is one.

    tokenizer_sha256: hash of the tokenizer in use. Weights belong to a tokenizer: a sidecar that names another one is
    an error, a missing sidecar a warning.
    """
    state, sidecar = _read(path, tokenizer_sha256)
    check_shapes(model, state, path)
    _check_heads(model, sidecar, path)
    model.load_state_dict(state, strict=True)
    return sidecar


def load_model(
    path: str | Path, tokenizer_sha256: str | None = None, unseen: dict[str, Any] | None = None
) -> tuple[MiniMindForCausalLM, dict[str, Any] | None]:
    """Return the model of a weight file, in eval mode, and its sidecar.

    unseen: configuration that the tensors do not show, for a file without a sidecar.
    """
    state, sidecar = _read(path, tokenizer_sha256)
    config = config_of_file(path, state, sidecar, unseen)
    with torch.random.fork_rng(devices=[]):  # loading a frozen model must not change what the run draws later
        model = MiniMindForCausalLM(config)
    check_shapes(model, state, path)
    model.load_state_dict(state, strict=True)
    return model.eval(), sidecar


def check_tokenizer(path: str | Path, sidecar: dict | None, tokenizer_sha256: str | None) -> None:
    """Raise WeightsError if the sidecar names another tokenizer than the one in use; warn if it names none."""
    if tokenizer_sha256 is None:
        return
    known = (sidecar or {}).get("tokenizer_sha256")
    if known is None:
        warnings.warn(
            f"{path} has no sidecar that names its tokenizer. If that is not model/tokenizer.json (weights of the "
            "original project have another), the output will be noise: name the right one with --tokenizer_path FOLDER",
            stacklevel=3,
        )
    elif known != tokenizer_sha256:
        files = Path(__file__).parent.glob("**/tokenizer.json")  # ours, and in folders those of earlier releases
        folders = [file.parent for file in files if hashlib.sha256(file.read_bytes()).hexdigest() == known]
        raise WeightsError(
            f"{path} was trained with the tokenizer {known[:12]}…, and this run uses {tokenizer_sha256[:12]}…; "
            f"name the one it was trained with by --tokenizer_path {folders[0] if folders else 'FOLDER'}"
        )


def _check_heads(model: nn.Module, sidecar: dict | None, path: str | Path) -> None:
    """Raise WeightsError if the sidecar says that the same matrices are divided into another number of heads."""
    there = (sidecar or {}).get("config", {}).get("num_attention_heads")
    here = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if None not in (there, here) and there != here:
        raise WeightsError(
            f"{path} does not fit this model: --num_attention_heads is {here} here and {there} in the file's sidecar"
        )


def check_shapes(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise WeightsError if shapes differ, and say which flag to change; load_state_dict would only list tensors."""
    own = {clean_key(key): tensor for key, tensor in model.state_dict().items()}
    if own.keys() == state.keys() and all(own[key].shape == state[key].shape for key in own):
        return
    config = getattr(model, "config", None)
    theirs = config_from_state_dict(state, None, {"num_attention_heads": getattr(config, "num_attention_heads", 8)})
    flags = ("hidden_size", "num_hidden_layers", "use_moe", "vocab_size", "intermediate_size", "qk_norm")
    flags += ("num_attention_heads", "num_key_value_heads", "n_routed_experts", "n_shared_experts")
    differing = [
        f"--{flag} is {getattr(config, flag)} here and {getattr(theirs, flag)} in the file"
        for flag in flags
        if config is not None and getattr(config, flag) != getattr(theirs, flag)
    ]
    if not differing:
        missing, unknown = sorted(own.keys() - state.keys())[:3], sorted(state.keys() - own.keys())[:3]
        differing = [f"missing in the file: {', '.join(missing)}"] * bool(missing)
        differing += [f"unknown in the file: {', '.join(unknown)}"] * bool(unknown)
        differing += [
            f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} here"
            for key in own.keys() & state.keys()
            if own[key].shape != state[key].shape
        ][:1]
    if theirs.qk_norm and not getattr(config, "qk_norm", True):
        preset = "minimind3_moe" if theirs.use_moe else "minimind3"
        differing.insert(0, f"the file holds a MiniMind-3, so give --preset {preset}")
    raise WeightsError(f"{path} does not fit this model: {'; '.join(differing)}")
