"""Find models to talk to (weights in an output folder, folders in Hugging Face format, adapters), and load them.

The server and the web page use this. Listing is cheap: sizes are read from the files without their tensors, and kept
until a file changes.
"""

import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from dataset.tokenization import ChatTokenizer
from model.loading import ROOT, ReadyModel, load_ready
from model.weights import STAGES, WEIGHT_NAME


@dataclass(frozen=True)
class Entry:
    """A model that can be loaded.

    name: unique among those found: the file's stem (full_sft_512) or the folder's name (MiniMind2).
    stage: a stage of training, "" if unknown. size: "26M", "145M MoE", "" if unreadable.
    adapters: names for load_entry's lora_name, of the same size. out_dir: they are in its lora/.
    """

    name: str
    path: Path
    stage: str
    size: str
    hidden_size: int
    use_moe: bool
    adapters: tuple[str, ...] = ()
    out_dir: Path = ROOT / "out"


def find_models(out_dir: str | Path = ROOT / "out", folders: tuple[str | Path, ...] = (ROOT,)) -> list[Entry]:
    """Return all models in out_dir, and in Hugging Face format: `folders`, and folders in them and in out_dir.

    Chat models come first, then by size. Files that cannot be read are listed too: loading them says what is wrong.
    """
    out_dir = Path(out_dir).absolute()
    entries = [entry_of_file(path) for path in _listed(out_dir) if path.suffix == ".pth" and path.is_file()]
    entries = [entry for entry in entries if entry]
    entries.sort(key=lambda entry: (STAGES[entry.stage].order, entry.hidden_size, entry.use_moe))
    places = [Path(folder).absolute() for folder in folders]
    candidates = [path for place in [*places, out_dir] for path in [place, *_listed(place)]]
    names = {entry.name for entry in entries}
    for path in dict.fromkeys(candidates):
        entry = entry_of_folder(path, out_dir)
        if entry:
            name = entry.name if entry.name not in names else printable(str(path))
            names.add(name)
            entries.append(Entry(**vars(entry) | {"name": name}))
    return entries


def entry_of_file(path: Path) -> Entry | None:
    """Return the entry of a .pth file, or None if its name is not that of a stage's weights."""
    match = WEIGHT_NAME.fullmatch(path.stem)
    if not match:
        return None
    stage, hidden_size, use_moe = match["stage"], int(match["hidden_size"]), bool(match["moe"])
    size = _label(path, use_moe)
    out_dir = path.absolute().parent
    adapters = find_adapters(out_dir, hidden_size, use_moe)
    return Entry(path.stem, path.absolute(), stage, size, hidden_size, use_moe, adapters, out_dir)


def entry_of_folder(path: Path, out_dir: Path) -> Entry | None:
    """Return the entry of a folder in Hugging Face format, or None if it holds no language model with weights."""
    if not _weight_files(path):
        return None
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        hidden_size = config["hidden_size"]
        use_moe = bool(config.get("use_moe") or config.get("num_experts") or config.get("num_local_experts"))
        if not any("CausalLM" in name for name in config["architectures"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    size = _label(path, use_moe)
    adapters = find_adapters(out_dir, hidden_size, use_moe)
    return Entry(printable(path.name), path, "", size, hidden_size, use_moe, adapters, Path(out_dir))


def find_adapters(out_dir: str | Path, hidden_size: int, use_moe: bool) -> tuple[str, ...]:
    """Return the names of the adapters in out_dir/lora/ for models of this size."""
    ending = f"_{hidden_size}{'_moe' if use_moe else ''}"
    stems = [path.stem for path in _listed(Path(out_dir) / "lora") if path.suffix == ".pth"]
    return tuple(sorted(printable(stem[: -len(ending)]) for stem in stems if stem.endswith(ending) and stem != ending))


def printable(name: str) -> str:
    """Return a file's name with escapes for bytes that are not UTF-8: JSON and browsers could not take them."""
    return name.encode(errors="backslashreplace").decode()


def load_entry(entry: Entry, lora_name: str | None = None, **flags) -> ReadyModel:
    """Load a model with the adapter (a name or a .pth) merged in. flags: those of load_ready."""
    return load_ready(entry.path, ChatTokenizer, merged_lora=lora_name, out_dir=entry.out_dir, **flags)


def stamp_of(entry: Entry, lora_name: str | None = None) -> tuple:
    """Return names, times and sizes of the model's files, which change when the files do."""
    files = [entry.path, entry.path.with_suffix(".json")]
    if entry.path.is_dir():
        files = [*_weight_files(entry.path), entry.path / "config.json"]
    if lora_name:
        path = Path(lora_name)
        files += [path] if path.suffix == ".pth" else sorted((entry.out_dir / "lora").glob(f"{lora_name}_*.pth"))
    stats = [(str(file), file.stat()) for file in files if file.exists()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


# --- sizes -----------------------------------------------------------------------------------------------------------


def size_label(parameters: int, use_moe: bool) -> str:
    """Return 26M, 145M MoE, 4.5M or 0.05M."""
    millions = parameters / 1e6
    digits = 0 if millions >= 9.95 else 1 if millions >= 0.095 else 2
    return f"{millions:.{digits}f}M{' MoE' if use_moe else ''}"


def _label(path: Path, use_moe: bool) -> str:
    files = _weight_files(path) if path.is_dir() else (path,)
    try:
        return size_label(count_parameters(files), use_moe)
    except Exception:  # a file that is broken, or being written: torch raises many kinds
        return ""


def count_parameters(files: Iterable[Path]) -> int:
    return sum(_count_parameters(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@functools.lru_cache(maxsize=512)
def _count_parameters(file: str, modified: int, size: int) -> int:
    """Count the parameters in a file without the output layer, which is the embedding. The stamp is for the cache."""
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    else:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        shapes = {name: tensor.shape for name, tensor in state.items()}
    if any(name.endswith("embed_tokens.weight") for name in shapes):
        shapes.pop("lm_head.weight", None)
    return sum(map(math.prod, shapes.values()))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a folder in Hugging Face format; adapters and optimizer states are not among them."""
    names = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
    files = [path for path in _listed(folder) if names.fullmatch(path.name)]
    kinds = {path.suffix for path in files}
    return tuple(path for path in files if len(kinds) == 1 or path.suffix == ".safetensors")


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # missing, not a folder, or not ours to read
        return []
