"""Convert weights to the formats of other runtimes, and back.

    python scripts/convert_model.py                                    out/full_sft_512.pth -> MiniMind2-Small/
    python scripts/convert_model.py --model_mode 2 --hidden_size 768   another stage, another size
    python scripts/convert_model.py --lora_name lora_medical           with an adapter merged in
    python scripts/convert_model.py --to gguf                          for llama.cpp and ollama (with a Modelfile)
    python scripts/convert_model.py --to minimind                      our own classes, for --trust_remote_code
    python scripts/convert_model.py --input MiniMind2 --output out/full_sft_768.pth
    python scripts/convert_model.py --input old.pth                    weights from before April 2025
    python scripts/convert_model.py --input out/lora/lora_medical_512.pth          an adapter -> peft library

The standard format is Llama for dense models and Qwen2-MoE for mixtures of experts; MiniMind-3, which normalises
queries and keys, becomes Qwen3 or Qwen3-MoE. transformers, vLLM and others load all four without code of ours. Every
conversion reads back what it wrote and compares the logits before and after; nothing reaches the target before they
agree.
"""

import argparse
import contextlib
import copy
import glob
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors import SafetensorError

from dataset.tokenization import ChatTokenizer
from model.export import CLASSES, from_hf, from_old_names, hf_config, hf_format, to_hf
from model.flags import show_defaults
from model.gguf_format import check_gguf_type, go_template, read_gguf, round_to_gguf, write_gguf
from model.loading import (
    DTYPES,
    add_flags,
    check_sizes,
    check_vocabulary,
    given_sizes,
    load_folder,
    scale_positions,
    tokenizer_folder,
    unseen_fields,
)
from model.model_lora import (
    find_lora,
    load_lora,
    lora_path,
    merge_lora,
    put_on,
    read_lora,
    read_peft,
    remove_lora,
    save_lora,
    save_peft,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.streams import entry_point
from model.weights import (
    STAGE_OF_MODE,
    WeightsError,
    check_shapes,
    check_tokenizer,
    config_of_file,
    file_mode,
    find_weights,
    has_old_names,
    load_model,
    missing_message,
    read_sidecar,
    read_state_dict,
    reads_a_file,
    save_weights,
    sidecar_path,
    tie_head,
    weight_path,
    write_atomically,
    write_json,
)
from scripts.push_to_hub import model_card, without_paths

HF_FORMATS = (*CLASSES, "minimind")
FORMATS = (*HF_FORMATS, "gguf", "pth", "peft", "lora")
# The original's names for its models, by hidden size, mixture and query/key norm.
NAMES = {(512, False, False): "MiniMind2-Small", (768, False, False): "MiniMind2", (640, True, False): "MiniMind2-MoE"}
NAMES |= {(768, False, True): "MiniMind3", (768, True, True): "MiniMind3-MoE"}
# what else transformers and others read in a folder of weights
READ_BY_RUNTIMES = (
    "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "model_minimind.py",
    "adapter_config.json", "adapter_model.*", "tokenizer.*", "tokenizer_config.json", "chat_template.*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
NO_TEMPLATE = "note: the tokenizer has no chat template, so runtimes cannot chat with these weights by themselves"
# float32 arithmetic in another order: largest difference of logits, relative to the largest logit
TOLERANCE = 1e-4
# rounding a float32 adapter to float16: root mean square of the difference, relative to that of the logits
ROUNDING_TOLERANCE = 0.01


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("input")
    add = group.add_argument
    add("--input", help=".pth, .gguf, folder in Hugging Face or PEFT format (default: the stage's weights)")
    add_flags(group, "model_mode", "out_dir", "hidden_size", "num_hidden_layers", "use_moe", "lora_name")
    add_flags(group, "preset", "num_attention_heads", "tokenizer_path")
    add("--base", default=None, help="weights that an adapter is checked on: a .pth or a stage (random ones)")
    add("--rope_theta", type=float, default=None, help="of weights without a sidecar (1e6)")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--to", default="auto", choices=["auto", *FORMATS], help="format (auto: .pth -> llama, qwen2_moe, qwen3 or "
        "qwen3_moe, whichever computes the same; old .pth, folder and .gguf -> pth; adapter -> peft; PEFT folder -> "
        "lora)")  # fmt: skip
    add("--output", default=None, help="folder, .pth or .gguf to write (named after the weights)")
    add("--dtype", default=None, choices=list(DTYPES), help="of the tensors in a Hugging Face folder (float16)")
    add("--gguf_type", default=None, help="of the tensors in a GGUF file: F16 or Q8_0 (F16)")
    add_flags(group, "rope_scaling", "trained_length")
    add("--force", action="store_true", help="replace files of the target that are there already")
    show_defaults(parser)
    return parser.parse_args(argv)


def say(text: str) -> None:
    print(text, flush=True)


# --- input -----------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A model in memory: our architecture in eval mode, the dtype as stored, and where it came from."""

    model: MiniMindForCausalLM
    path: Path
    kind: str  # pth, old, hf, gguf
    tokenizer: ChatTokenizer
    sidecar: dict
    knows_tokenizer: bool  # if false, the tokenizer is a guess
    reference: torch.nn.Module | None = None  # the input in transformers' own class, if that is not ours
    adapter: str = ""  # merged in
    adapter_path: Path | None = None

    def computing(self, rounded_to: torch.dtype | None = None) -> torch.nn.Module:
        """Return the input's own model in float32, its weights rounded first to the dtype that is written."""
        model = self.model if self.reference is None else self.reference
        if rounded_to is not None:
            check_rounding(model, rounded_to)
        model = copy.deepcopy(model).float()
        for parameter in model.parameters():  # not .to(): buffers hold the rotary frequencies, which stay float32
            parameter.data = parameter.data.to(rounded_to or parameter.dtype).float()
        return model

    @property
    def config(self) -> MiniMindConfig:
        return self.model.config

    @property
    def new_sidecar(self) -> dict:
        """Return the sidecar of what is written, without the configuration."""
        sidecar = {key: value for key, value in self.sidecar.items() if key not in ("config", "tokenizer_sha256")}
        sidecar = without_paths(sidecar) | {"converted_from": self.path.name}
        if self.knows_tokenizer:
            sidecar["tokenizer_sha256"] = self.tokenizer.sha256
        return sidecar

    @property
    def name(self) -> str:
        """Return the name of the converted model."""
        size, moe, qk_norm = self.config.hidden_size, self.config.use_moe, self.config.qk_norm
        other = f"MiniMind{3 if qk_norm else 2}-{size}{'-MoE' if moe else ''}"
        return NAMES.get((size, moe, qk_norm), other) + self.adapter


def input_path(args: argparse.Namespace) -> Path:
    if args.input is None:
        hidden_size, _, use_moe = given_sizes(args)
        return find_weights(STAGE_OF_MODE[args.model_mode], args.out_dir, hidden_size, use_moe)
    path = Path(args.input)
    if not path.exists():
        raise WeightsError(missing_message(path) if path.suffix == ".pth" else f"--input {path} not found")
    return path


def input_kind(path: Path) -> str:
    """Return pth, old (names from before April 2025), adapter, hf, peft or gguf."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "peft"
        if (path / "config.json").is_file():
            return "hf"
        raise ValueError(f"--input {path} is a folder without config.json or adapter_config.json")
    if path.suffix == ".gguf":
        return "gguf"
    keys = read_state_dict(path, old_names=True)
    if has_old_names(keys):
        return "old"
    return "adapter" if any(key.endswith(".lora.A.weight") for key in keys) else "pth"


@reads_a_file
def read_source(path: Path, kind: str, args: argparse.Namespace) -> Source:
    own_tokenizer = kind == "hf" and (path / "tokenizer.json").is_file()
    tokenizer = ChatTokenizer(tokenizer_folder(path, args.tokenizer_path))
    reference = None
    if kind in ("pth", "old"):
        state, sidecar = read_state_dict(path, old_names=True), read_sidecar(path) or {}
        check_tokenizer(path, sidecar, tokenizer.sha256)
        unseen, told = unseen_fields(args.preset, args.num_attention_heads), sidecar.get("config", {})
        if args.rope_theta is not None:
            unseen["rope_theta"] = args.rope_theta
        for name in ("num_attention_heads", "rope_theta"):
            given = getattr(args, name)
            if given is not None and told.get(name, given) != given:
                raise ValueError(f"--{name} is {given}, and the sidecar of {path} says {told[name]}; leave it out")
        if kind == "old":
            heads = {"num_attention_heads": MiniMindConfig().num_attention_heads, **unseen, **told}
            state = from_old_names(state, heads["num_attention_heads"])
        tie_head(path, state)
        config = config_of_file(path, state, sidecar, unseen)
    elif kind == "gguf":
        (state, config), sidecar = read_gguf(path), agreed_sidecar(path, tokenizer.sha256)
    else:
        reference = load_folder(path, trust_remote_code=False, dtype="auto")
        sidecar = agreed_sidecar(path, tokenizer.sha256)
        state, config = from_hf(reference.state_dict(), reference.config)
        reference = None if isinstance(reference, MiniMindForCausalLM) else reference
    model = build(state, config, path)
    check_sizes(config, path, *given_sizes(args))
    check_vocabulary(model, path, tokenizer.path, tokenizer.vocab_size)
    for part in filter(None, (model, reference)):
        scale_positions(part, sidecar, args.rope_scaling, args.trained_length)
    known = "tokenizer_sha256" in sidecar or bool(args.tokenizer_path) or own_tokenizer
    source = Source(model, path, kind, tokenizer, sidecar, known, reference)
    if args.lora_name.lower() != "none":
        merge_adapter(source, find_lora(args.lora_name, args.out_dir, config.hidden_size, config.use_moe))
    return source


def agreed_sidecar(path: Path, tokenizer_sha256: str) -> dict:
    """Return the sidecar of a folder or a .gguf, or {} if it is about weights of another tokenizer."""
    sidecar = read_sidecar(path) or {}
    known = sidecar.get("tokenizer_sha256")
    if known not in (None, tokenizer_sha256):
        warnings.warn(
            f"{sidecar_path(path)} names another tokenizer than the one in use, so it is not used", stacklevel=2
        )
    return sidecar if known == tokenizer_sha256 else {}


def merge_adapter(source: Source, path: Path) -> None:
    """Add the adapter to the source's weights, in float32."""
    model = load_lora(copy.deepcopy(source.model).float(), path, source.tokenizer.sha256)
    before = logits_of(model)
    merge_lora(model)
    say(f"merged {path}")
    compare(before, logits_of(model))
    source.model, source.reference = model, None
    source.sidecar = {**source.sidecar, "merged_adapter": path.name}
    source.adapter_path = path
    source.adapter = f"-{path.stem.removesuffix('_moe').rsplit('_', 1)[0]}"


def build(state: dict[str, torch.Tensor], config: MiniMindConfig, path: Path) -> MiniMindForCausalLM:
    """Return the model of these tensors, in their dtype. Raises WeightsError, naming `path`, if they do not fit."""
    with torch.random.fork_rng(devices=[]):
        model = MiniMindForCausalLM(config).to(state["model.embed_tokens.weight"].dtype)
    check_shapes(model, state, path)
    model.load_state_dict(state, strict=True)
    return model.eval()


# --- the check -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Return float32 logits (4, 64, vocab) on random ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
    return model(input_ids=ids).logits.float()


def compare(before: torch.Tensor, after: torch.Tensor, rounding: str = "") -> None:
    """Print how far the logits differ. Raises ValueError if they differ by more than the tolerance."""
    largest = float((after - before).abs().max())
    scale = max(float(before.abs().max()), 1.0)
    line = (
        f"check: logits on 4 x 64 random ids, before and after: largest difference {largest:.2g} (logits to {scale:.3g}"
    )
    if rounding:
        error = mean_square_error(before, after)
        good = error <= ROUNDING_TOLERANCE
        line += f"), {error:.2%} in the mean square from rounding to {rounding} (allowed {ROUNDING_TOLERANCE:.0%}"
    else:
        good = largest <= TOLERANCE * scale
        line += f", allowed {TOLERANCE * scale:.2g}"
    say(line + ")")
    if not good:  # a comparison with NaN is not good either
        raise ValueError("the converted weights give other logits, so nothing was written to the target")


def mean_square_error(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the root mean square of the difference, relative to that of the logits."""
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())


def check_rounding(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Print how many values a smaller dtype changes, if any. Raises ValueError if one is beyond its range."""
    changed = total = 0
    for name, parameter in model.named_parameters():
        rounded = parameter.detach().to(dtype)
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinity; nothing was written")
        if not torch.isfinite(rounded).all():
            raise ValueError(f"{name} reaches {parameter.abs().max():.3g}, beyond {dtype_name(dtype)}; see --dtype")
        changed += int((rounded.to(parameter.dtype) != parameter).sum())
        total += parameter.numel()
    if changed:
        say(f"rounding to {dtype_name(dtype)} changes {changed:,} of {total:,} values")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- targets ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Provide an empty folder next to the target, removed at the end; `publish` moves its files to their place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.staged"):  # what a killed process left behind
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".staged") as folder:
        yield Path(folder)


def publish(staged: Path, folder: Path) -> None:
    """Move the checked files into the folder, weights first.

    Other files there stay, except those of an older export that runtimes would load as well.
    """
    folder.mkdir(exist_ok=True)
    names = {file.name for file in staged.iterdir()}
    for name in sorted(names, key=lambda name: name.endswith(".json")):
        os.chmod(staged / name, file_mode())  # save_pretrained makes weights readable by their owner alone
        os.replace(staged / name, folder / name)
    if "model.safetensors" in names:
        for file in {file for pattern in READ_BY_RUNTIMES for file in folder.glob(pattern) if file.name not in names}:
            file.unlink()


def check_not_read(target: Path, *read: Path | None) -> None:
    """Raise ValueError if the target is a file that the conversion reads; not even --force replaces that."""
    if target.exists() and any(path is not None and path.exists() and target.samefile(path) for path in read):
        raise ValueError("the target is what was read; name another with --output")


def check_target(target: Path, force: bool, *files: Path) -> None:
    """Raise ValueError if a folder to be filled is not empty, or single files exist, unless --force is given."""
    if target.resolve() == ROOT / "model":
        raise ValueError(f"--output {target} holds the program's own files; name another folder")
    if files:
        taken = [file for file in files if file.exists()]
        what = f"{taken[0]} exists" if taken else ""
    else:
        if target.exists() and not target.is_dir():
            raise ValueError(f"--output {target} is a file; this format is a folder")
        what = f"{target} is not empty" if target.is_dir() and any(target.iterdir()) else ""
    if what and not force:
        raise ValueError(f"{what}; --force replaces what is written again, --output names another target")


def write_hf(source: Source, target: Path, kind: str, args: argparse.Namespace) -> None:
    """Write a folder that AutoModelForCausalLM, AutoTokenizer and vLLM load."""
    if kind != "minimind" and kind != hf_format(source.config):
        what = "a mixture of experts" if source.config.use_moe else "dense"
        norms = "with" if source.config.qk_norm else "without"
        raise ValueError(
            f"{source.path} is {what} {norms} query/key norms, which {kind} has no place for; use --to "
            f"{hf_format(source.config)}, gguf or minimind"
        )
    check_target(target, args.force)
    dtype = DTYPES[args.dtype or "float16"]
    with staging(target) as folder:
        before = logits_of(source.computing(dtype))
        if kind == "minimind":
            copy.deepcopy(source.model).to(dtype).save_pretrained(folder)
        else:
            from safetensors.torch import save

            state = {key: tensor.to(dtype).contiguous() for key, tensor in source.model.state_dict().items()}
            data = save(to_hf(state, source.config), metadata={"format": "pt"})
            write_atomically(folder / "model.safetensors", lambda file: file.write(data))
            write_json(folder / "config.json", hf_config(source.config, dtype))
        write_beside(source, folder, target.name)
        after = load_folder(folder, trust_remote_code=kind == "minimind", dtype=torch.float32)
        compare(before, logits_of(after))
        check_chat(source.tokenizer, folder, kind == "minimind")
        if kind == "minimind":  # transformers keeps the code that it ran, under this temporary folder's name
            shutil.rmtree(Path(inspect.getfile(type(after))).parents[1], ignore_errors=True)
        publish(folder, target)
    say(f"wrote {target} ({kind} format, {dtype_name(dtype)})")


def write_beside(source: Source, folder: Path, name: str) -> None:
    """Write the files of a model folder other than configuration and weights."""
    config = source.config
    generation = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**generation, "do_sample": True, "temperature": 0.85, "top_p": 0.85})
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source.tokenizer.path / file).is_file():
            shutil.copyfile(source.tokenizer.path / file, folder / file)
    write_json(sidecar_path(folder), source.new_sidecar)
    card = model_card(name, {"Weights": folder}, [file.name for file in folder.iterdir()])
    write_atomically(folder / "README.md", lambda file: file.write(card.encode()))


def check_chat(tokenizer: ChatTokenizer, folder: Path, own_code: bool) -> None:
    """Check that the folder's template gives the ids that the model was trained with."""
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": "你好, who are you?\n3+4=7"}]
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=own_code)
    if not theirs.chat_template:
        return say(NO_TEMPLATE)
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    same = ids == tokenizer.encode_prompt(turns)
    say(f"check: a chat prompt of {len(ids)} ids through the written tokenizer: {'the same' if same else 'DIFFERENT'}")
    if not same and tokenizer.path == ROOT / "model":
        raise ValueError("the written tokenizer gives other ids, so nothing was written to the target")


def write_gguf_folder(source: Source, target: Path, gguf_type: str, args: argparse.Namespace) -> None:
    """Write a folder with the GGUF file and ollama's Modelfile, or the named .gguf with a Modelfile next to it."""
    single = target.suffix == ".gguf"
    folder = target.parent if single else target
    name = target.stem if single else f"{source.name}-{gguf_type}"
    check_not_read(folder / f"{name}.gguf", source.path)
    check_target(folder, args.force, *((target, folder / "Modelfile", sidecar_path(target)) if single else ()))
    with staging(target) as staged:
        file = staged / f"{name}.gguf"
        if gguf_type == "F16":
            before = logits_of(source.computing(torch.float16))
        else:
            rounded = build(round_to_gguf(source.model.state_dict(), gguf_type), source.config, source.path)
            before = logits_of(rounded)
            error = mean_square_error(logits_of(source.computing()), before)
            say(f"rounding to {gguf_type} changes the logits by {error:.2%} in the mean square")
        state = source.model.state_dict()
        kept = write_gguf(file, state, source.config, source.tokenizer, gguf_type, name)
        if not source.tokenizer.template.given:
            say(NO_TEMPLATE)
        if kept:
            say(f"{len(kept)} tensors stay F16, as their rows are not a multiple of 32: {', '.join(kept[:3])} ...")
        compare(before, logits_of(build(*read_gguf(file), file)))
        text = modelfile(source.tokenizer, file.name)
        write_atomically(staged / "Modelfile", lambda out: out.write(text.encode()))
        write_json(sidecar_path(file), source.new_sidecar)
        publish(staged, folder)
    say(f"wrote {folder / file.name} and {folder / 'Modelfile'}")


def modelfile(tokenizer: ChatTokenizer, file_name: str) -> str:
    """Return ollama's Modelfile; its template is Go's spelling of the tokenizer's chat template."""
    bos, eos = (tokenizer.decode([number], skip_control=False) for number in (tokenizer.bos_id, tokenizer.eos_id))
    try:
        template = go_template(tokenizer.template)
        template = "# the tokenizer has no chat template" if template is None else f'TEMPLATE """{template}"""'
    except ValueError as error:  # it refuses tools, say; runtimes have it in the .gguf as well
        say(f"note: the Modelfile has no template: {error}")
        template = "# the tokenizer's chat template is in the .gguf only"
    return f'''# ollama create minimind -f Modelfile && ollama run minimind
FROM ./{file_name}

{template}

PARAMETER stop "{bos}"
PARAMETER stop "{eos}"
PARAMETER temperature 0.85
PARAMETER top_p 0.85
PARAMETER top_k 0
PARAMETER repeat_penalty 1.0
'''


def write_pth(source: Source, target: Path, args: argparse.Namespace) -> None:
    """Write a weight file of ours, float16, with its sidecar."""
    check_target(target, args.force, target, sidecar_path(target))
    sidecar = {"config": source.config.to_diff_dict(), **source.new_sidecar}
    with staging(target) as folder:
        before = logits_of(source.computing(torch.float16))
        save_weights(folder / target.name, source.model, sidecar)
        after, _ = load_model(folder / target.name)
        compare(before, logits_of(after.float()))
        publish(folder, target.parent)
    say(f"wrote {target}")


# --- adapters --------------------------------------------------------------------------------------------------------


def convert_adapter(path: Path, kind: str, args: argparse.Namespace) -> None:
    """Convert an adapter: our .pth into a folder for the peft library, or (kind "peft") back."""
    if kind == "adapter":
        pairs, sidecar = read_lora(path), read_sidecar(path) or {}
    else:
        pairs, sidecar = read_peft(path), read_sidecar(path) or {}
        if args.tokenizer_path:
            sidecar = agreed_sidecar(path, ChatTokenizer(args.tokenizer_path).sha256)
    sidecar = without_paths(sidecar) | {"converted_from": path.name}
    base = None if args.base is None else base_path(args)
    model = adapter_base(path, sidecar, base)
    if kind == "adapter":
        load_lora(model, path)
        target = Path(args.output or Path(args.out_dir) / "peft" / path.stem)
        check_not_read(target, path, base)
        check_target(target, args.force)
        with staging(target) as folder:
            save_peft(folder, model)
            write_json(sidecar_path(folder), sidecar)
            compare(logits_of(model), logits_of(with_peft(model, folder)))
            publish(folder, target)
    else:
        put_on(model, pairs, path)
        before = logits_of(with_peft(model, path))
        size = model.config.hidden_size, model.config.use_moe
        name = path.absolute().name.removesuffix(lora_path("", "", *size).stem)  # export names folders with the size
        target = Path(args.output or lora_path(args.out_dir, name, *size))
        check_not_read(target, path, base)
        check_target(target, args.force, target, sidecar_path(target))
        sidecar["config"] = model.config.to_diff_dict()
        if args.tokenizer_path:
            sidecar["tokenizer_sha256"] = ChatTokenizer(args.tokenizer_path).sha256
        with staging(target) as folder:
            save_lora(folder / target.name, model, sidecar)
            compare(before, logits_of(load_lora(model, folder / target.name)), "float16")
            publish(folder, target.parent)
    say(f"wrote {target}")


def adapter_base(path: Path, sidecar: dict, base: Path | None) -> MiniMindForCausalLM:
    """Return the float32 model that an adapter is checked on: --base, or random weights of the sizes in the sidecar."""
    if base is not None:
        return load_model(base)[0].float()
    if not (fields := sidecar.get("config")):  # adapters of other programs, and old ones
        raise ValueError(f"{path} does not tell the sizes of its model; name the weights it belongs to with --base")
    say("the adapter is checked on random base weights; --base FILE checks it on its own")
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**fields)).eval()


def base_path(args: argparse.Namespace) -> Path:
    try:
        return find_weights(args.base, args.out_dir, args.hidden_size, args.use_moe)
    except WeightsError as error:
        raise WeightsError(f"--base {error}") from error


def with_peft(model: MiniMindForCausalLM, folder: Path) -> torch.nn.Module:
    """Return the base of `model` in transformers' class with the folder's adapter.

    The peft library reads the adapter; if it is not installed, our own code does.
    """
    base = copy.deepcopy(model)
    remove_lora(base)
    if importlib.util.find_spec("peft") is None:
        say("the peft library is not installed, so the adapter is read back by our own code")
        put_on(base, read_peft(folder), folder)
        return base
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    if base.config.use_moe:
        raise ValueError("the PEFT layout holds adapters of dense models; this one is for a mixture of experts")
    fields = hf_config(base.config, torch.float32)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    theirs.load_state_dict(base.state_dict(), strict=True)
    return PeftModel.from_pretrained(theirs, folder).eval()


# --- main ------------------------------------------------------------------------------------------------------------


def default_output(source: Source, to: str, gguf_type: str, args: argparse.Namespace) -> Path:
    if to == "pth":
        known = source.sidecar.get("stage")
        stage = known if known in STAGE_OF_MODE.values() else STAGE_OF_MODE[args.model_mode]
        return weight_path(args.out_dir, stage, source.config.hidden_size, source.config.use_moe)
    return ROOT / (f"{source.name}-{gguf_type}-GGUF" if to == "gguf" else source.name)


def convert(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf_type = check_gguf_type(args.gguf_type or "F16")
    path = input_path(args)
    kind = input_kind(path)
    if kind in ("adapter", "peft"):
        wanted = "peft" if kind == "adapter" else "lora"
        if args.to not in ("auto", wanted):
            raise ValueError(f"{path} is an adapter and becomes --to {wanted}; to merge it, give it as --lora_name")
        check_read(args, path, kind, wanted)
        return convert_adapter(path, kind, args)
    if args.to in ("peft", "lora"):
        raise ValueError(f"--to {args.to} is for adapters, and {path} holds the weights of a model")
    source = read_source(path, kind, args)
    to = args.to
    if to == "auto":
        to = hf_format(source.config) if kind == "pth" else "pth"
    check_read(args, path, kind, to)
    if to not in ("pth", "minimind") and source.config.rope_dtype != "float32":
        say(f"note: {path} rounds its rotary tables to float16; {to} computes them in float32, and so does the check")
        source.config.rope_dtype = "float32"
    target = Path(args.output) if args.output else default_output(source, to, gguf_type, args)
    check_not_read(target, path, source.adapter_path)
    say(f"{path}: {describe(source)} -> {to}")
    if to == "gguf":
        write_gguf_folder(source, target, gguf_type, args)
    elif to == "pth":
        write_pth(source, target, args)
    else:
        write_hf(source, target, to, args)


def check_read(args: argparse.Namespace, path: Path, kind: str, to: str) -> None:
    """Raise ValueError for a flag that this conversion would not read."""
    adapter, tensors_only = kind in ("adapter", "peft"), kind in ("pth", "old")
    for names, read, why in (
        (("dtype",), to in HF_FORMATS, f"folders in Hugging Face format; --to {to} has a type of its own"),
        (("gguf_type",), to == "gguf", "--to gguf"),
        (("base",), adapter, f"adapters, and {path} is none"),
        (("rope_theta", "num_attention_heads"), tensors_only, f".pth files; {path} says it itself"),
        (("lora_name", "rope_scaling", "trained_length"), not adapter, f"models; {path} is an adapter"),
    ):
        given = [name for name in names if str(getattr(args, name)).lower() != "none"]
        if given and not read:
            raise ValueError(f"--{given[0]} is for {why}; leave it out")


def describe(source: Source) -> str:
    count = sum(parameter.numel() for parameter in source.model.parameters())
    kind = "mixture of experts" if source.config.use_moe else "dense"
    old = ", names from before April 2025" if source.kind == "old" else ""
    return f"{count / 1e6:.2f}M parameters, {kind}, {dtype_name(source.model.dtype)}{old}"


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        convert(args)
    except (ImportError, SafetensorError) as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written to the target")


if __name__ == "__main__":
    main()
