"""GGUF files for llama.cpp and ollama, written and read back with the gguf package: weights, tokenizer and template.

                    dense     mixture of experts
    without norms   llama     bailingmoe (needs a shared expert)
    with qk_norm    qwen3     qwen3moe (has no shared expert and always renormalises)

These names are llama.cpp's. Its "bailingmoe" computes what ours does: softmax over all experts, the chosen weights
renormalised, shared experts without a gate; its "qwen2moe" never renormalises. "llama" and "bailingmoe" rotate
neighbouring pairs, so the rows of q and k are interleaved; "qwen3" and "qwen3moe" rotate split halves, as ours does.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.export import SHARED_DIMS, State, interleave_rows, renormalises, split_rows, stretched_length
from model.model_minimind import MINIMIND3, MiniMindConfig, MiniMindForCausalLM, yarn_parameters
from model.weights import reads_a_file

GGUF_TYPES = ("F16", "Q8_0")
ARCHITECTURES = {(False, False): "llama", (True, False): "bailingmoe"}  # by use_moe and qk_norm
ARCHITECTURES |= {(False, True): "qwen3", (True, True): "qwen3moe"}
INTERLEAVED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")  # where neighbouring pairs are rotated
# Fields of our configuration and of its rope_scaling -> their keys in the file, after the architecture's name.
WHOLE_NUMBERS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
}
REAL_NUMBERS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "factor": "rope.scaling.factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
YARN_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
# llama.cpp's name for how a tokenizer cuts text before it merges bytes, by the pattern that does it
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    None: "gpt-2",  # the pattern that ByteLevel has built in
}


def check_gguf_type(name: str) -> str:
    """Return the type's proper spelling. Raises ValueError for a type that is not written here."""
    if name.upper() not in GGUF_TYPES:
        raise ValueError(
            f"--gguf_type {name} is not supported; {' and '.join(GGUF_TYPES)} are. For others write F16 and give the "
            "file to llama.cpp's llama-quantize"
        )
    return name.upper()


def gguf_names(config: MiniMindConfig) -> list[tuple[str, str, int | None]]:
    """Return (our name, GGUF's name, number of the expert in it) of every tensor but the head, which is the embedding.

    The experts of a layer share one GGUF tensor, and so do its shared experts.
    """
    import gguf

    kind = ARCHITECTURES[config.use_moe, config.qk_norm]
    (number,) = (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    theirs = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    with torch.device("meta"):
        keys = [key for key in MiniMindForCausalLM(config).state_dict() if key != "lm_head.weight"]
    names = []
    for key in keys:
        expert = re.search(r"experts\.(\d+)\.", key)
        name = theirs.get_name(key.replace(expert[0], "experts.") if expert else key, try_suffixes=(".weight",))
        names.append((key, name, int(expert[1]) if expert else None))
    return names


def to_gguf(state: State, config: MiniMindConfig) -> State:
    """Return our tensors under GGUF's names, experts stacked into (experts, out, in).

    Raises ValueError for a mixture that llama.cpp has no architecture for.
    """
    moe, interleaved = config.use_moe, () if config.qk_norm else INTERLEAVED
    if moe and config.qk_norm and (config.n_shared_experts or not renormalises(config)):
        raise ValueError(
            "GGUF's qwen3moe has no shared experts and always renormalises, and this model differs; use --to minimind"
        )
    if moe and not config.qk_norm and config.n_shared_experts < 1:
        raise ValueError("GGUF's bailingmoe always has a shared expert, and this model has none; use --to minimind")
    parts: dict[str, list[torch.Tensor]] = {}
    for key, name, _ in gguf_names(config):
        tensor = interleave_rows(state[key], config.head_dim) if key.endswith(interleaved) else state[key]
        parts.setdefault(name, []).append(tensor)
    result = {}
    for name, tensors in parts.items():
        if name.endswith("_shexp.weight"):
            result[name] = torch.cat(tensors, dim=SHARED_DIMS[name.split("_")[1]])
        else:
            result[name] = torch.stack(tensors) if name.endswith("_exps.weight") else tensors[0]
    if moe and not config.qk_norm:  # elsewhere llama.cpp uses the embedding if there is no head
        result["output.weight"] = state["model.embed_tokens.weight"]
    return result


def from_gguf(tensors: State, config: MiniMindConfig) -> State:
    """Undo to_gguf. Raises ValueError for tensors that our architecture has no place for."""
    embedding = tensors["token_embd.weight"]
    unknown = sorted(tensors.keys() - {name for _, name, _ in gguf_names(config)} - {"output.weight"})
    if not torch.equal(tensors.get("output.weight", embedding), embedding):
        unknown.append("output.weight, which is not the embedding")
    if unknown:
        raise ValueError(f"our architecture has no place for {', '.join(unknown[:3])}")
    interleaved = () if config.qk_norm else INTERLEAVED
    state = {"lm_head.weight": embedding}
    for key, name, expert in gguf_names(config):
        tensor = tensors[name]
        if name.endswith("_shexp.weight"):
            dim = SHARED_DIMS[name.split("_")[1]]
            tensor = tensor.split(config.intermediate_size, dim)[expert].contiguous()
        elif expert is not None:
            tensor = tensor[expert]
        state[key] = split_rows(tensor, config.head_dim) if key.endswith(interleaved) else tensor
    return state


def write_gguf(
    path: str | Path, state: State, config: MiniMindConfig, tokenizer: Any, gguf_type: str, name: str
) -> list[str]:
    """Write the file; return the tensors that stay F16 because their rows do not fill whole blocks of the type.

    tokenizer: a dataset.tokenization.ChatTokenizer, which this folder may not import. Raises ValueError if llama.cpp
    has no such tokenizer or mixture, or if the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[config.use_moe, config.qk_norm])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if gguf_type == "F16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    kept = []
    for key, tensor in to_gguf(state, config).items():
        kind = tensor_type(key, tensor, gguf_type)
        if tensor.dim() > 1 and kind.name == "F16" != gguf_type:
            kept.append(key)
        array = tensor.detach().float().contiguous().numpy()
        writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except (OSError, ValueError) as error:  # of a full disk numpy says only how many items were written
        free = shutil.disk_usage(Path(path).parent).free
        raise ValueError(
            f"cannot write {path}: {error}. {free / 1e6:.0f} MB are free there; make room, or name another --output"
        ) from error
    return kept


def tensor_type(key: str, tensor: torch.Tensor, gguf_type: str) -> Any:
    """Return the type of a tensor: norms and routers are F32, tensors whose rows do not fill whole blocks are F16."""
    import gguf

    kind = gguf.GGMLQuantizationType[gguf_type]
    if tensor.dim() == 1 or key.endswith(("ffn_gate_inp.weight", "mlp.gate.weight")):
        return gguf.GGMLQuantizationType.F32
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return gguf.GGMLQuantizationType.F16
    return kind


def round_to_gguf(state: State, gguf_type: str) -> State:
    """Return our tensors in float32 as a file of this type holds them.

    Rounding goes row by row, so the order of rows does not matter.
    """
    from gguf import quants

    rounded = {}
    for key, tensor in state.items():
        kind = tensor_type(key, tensor, gguf_type)
        array = quants.dequantize(quants.quantize(tensor.detach().float().numpy(), kind), kind)
        rounded[key] = torch.from_numpy(array.astype("float32"))
    return rounded


def _add_sizes(writer: Any, config: MiniMindConfig) -> None:
    values, scaling, kind = config.to_dict(), config.rope_scaling, writer.arch
    if scaling is not None:
        from gguf import RopeScalingType

        if scaling != yarn_parameters({**scaling, "attention_factor": None}):
            raise ValueError("rope_scaling: GGUF takes YaRN's own attention_factor only; leave it out of the config")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        values |= {**scaling, "max_position_embeddings": stretched_length(config)}
    if config.use_moe:
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if kind == "bailingmoe":
        writer.add_expert_weights_norm(renormalises(config))
        writer.add_expert_weights_scale(1.0)
        writer.add_leading_dense_block_count(0)
    if not config.use_moe:
        values = {name: value for name, value in values.items() if "expert" not in name}
    elif kind != "bailingmoe":
        del values["n_shared_experts"]
    for keys, add in ((WHOLE_NUMBERS, writer.add_uint32), (REAL_NUMBERS, writer.add_float32)):
        for name, key in keys.items():
            if name in values:
                add(f"{kind}.{key}", values[name])
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    from gguf import TokenType

    content = json.loads((tokenizer.path / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    numbers = range(vocab_size)  # ids that the model has and the tokenizer lacks should never be produced
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(content, tokenizer.path))
    writer.add_token_list([tokens.get(number, f"[unused{number}]") for number in numbers])
    writer.add_token_types([types.get(number, TokenType.UNUSED) for number in numbers])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if template := tokenizer.template.without_marks():
        writer.add_chat_template(template)


def go_template(template: Any) -> str | None:
    """Return a tokenizer's chat template in Go's language, as ollama's Modelfile wants it; None if it has none.

    It is pieced together from the output of the template, a dataset.chat_template.ChatTemplate, for turns that hold
    marks.
    """
    if not template.given:
        return None
    marks = {role: f"@{role}@" for role in ("system", "user", "assistant", "tool")}
    turns = {role: {"role": role, "content": mark} for role, mark in marks.items()}
    call = {"type": "function", "function": {"name": "@name@", "arguments": {}}}
    calls: list[dict] = [turns["user"], {**turns["assistant"], "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "@offered@"}}

    def text(*history: dict, tools: Sequence[dict] = (), prompt: bool = False) -> str:
        return "".join(template.split(list(history), list(tools), prompt, {}))

    def around(role: str, *history: dict, tools: Sequence[dict] = ()) -> tuple[str, str]:
        added = text(*history, turns[role], tools=tools).removeprefix(text(*history, tools=tools))
        before, _, after = added.partition(marks[role])
        return before, after

    user, answer = around("user", turns["user"], turns["assistant"]), around("assistant", turns["user"])
    result = around("tool", *calls, tools=[tool])
    asked = marks["user"].join(user)  # the text of the user's turn
    openings = {}  # what precedes it, (with tools, with a system turn) -> text
    for tools in ([], [tool]):
        for system in ((), (turns["system"],)):
            opening = text(*system, turns["user"], tools=tools).removesuffix(asked)
            opening = opening.replace(marks["system"], "{{ .System }}")
            openings[bool(tools), bool(system)] = opening.replace(
                "\n" + json.dumps(tool), "{{ range .Tools }}\n{{ . }}{{ end }}"
            )
    prompt = text(turns["user"], prompt=True).removeprefix(text(turns["user"]))
    return (
        f"{{{{ if .Tools }}}}{{{{ if .System }}}}{openings[True, True]}{{{{ else }}}}{openings[True, False]}"
        "{{ end }}"
        f"{{{{ else if .System }}}}{openings[False, True]}{{{{ else }}}}{openings[False, False]}{{{{ end }}}}"
        '{{ range $turn := .Messages }}{{ if eq $turn.Role "user" }}'
        f'{user[0]}{{{{ $turn.Content }}}}{user[1]}{{{{ else if eq $turn.Role "assistant" }}}}'
        f"{answer[0]}{{{{ $turn.Content }}}}{{{{ range $number, $call := $turn.ToolCalls }}}}"
        "{{ if or $number $turn.Content }}\n{{ end }}"
        '<tool_call>\n{"name": "{{ $call.Function.Name }}", "arguments": {{ $call.Function.Arguments }}}\n</tool_call>'
        f'{{{{ end }}}}{answer[1]}{{{{ else if eq $turn.Role "tool" }}}}'
        f"{result[0]}{{{{ $turn.Content }}}}{result[1]}{{{{ end }}}}{{{{ end }}}}{prompt}"
    )


def pre_tokenizer(content: dict, folder: Path) -> str:
    """Return llama.cpp's name for how this tokenizer.json cuts text. Raises ValueError if we know of none."""
    cutter = content.get("pre_tokenizer") or {}
    parts = cutter.get("pretokenizers", [cutter])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    plain = content["model"].get("type") == "BPE" and not content.get("normalizer") and len(byte_level) == 1
    plain = plain and not byte_level[0].get("add_prefix_space") and len(parts) == len(patterns) + 1
    pattern = patterns[0] if patterns else None
    built_in = bool(byte_level) and byte_level[0].get("use_regex", True)
    if not plain or len(patterns) > 1 or built_in == bool(patterns) or pattern not in PRE_TOKENIZERS:
        raise ValueError(
            f"{folder / 'tokenizer.json'} cuts text in a way that llama.cpp has no name for, so its tokens would "
            "differ; GGUF takes byte-level BPE as scripts/train_tokenizer.py makes it"
        )
    return PRE_TOKENIZERS[pattern]


@reads_a_file
def read_gguf(path: str | Path) -> tuple[State, MiniMindConfig]:
    """Return the tensors in float32 under our names, and the configuration, of a file that write_gguf wrote.

    Raises ValueError if it is damaged, not a GGUF file or has an architecture that is not ours.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        return default if found is None else found.contents()

    kind = field("general.architecture")
    if kind not in ARCHITECTURES.values():
        raise ValueError(f"{path} holds the architecture {kind}; ours are {', '.join(ARCHITECTURES.values())}")
    fields: dict[str, Any] = dict(MINIMIND3) if kind.startswith("qwen3") else {}
    held = {name: field(f"{kind}.{key}") for name, key in (WHOLE_NUMBERS | REAL_NUMBERS).items()}
    yarn = {name: held.pop(name) for name in YARN_FIELDS}
    fields |= {name: value for name, value in held.items() if value is not None}
    fields["rms_norm_eps"] = float(f"{held['rms_norm_eps']:.6g}")  # a float32 in the file
    for name in ("bos", "eos", "pad"):
        fields[f"{name}_token_id"] = field(f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id")
    if (stretched := field(f"{kind}.rope.scaling.type", "none")) not in ("none", "yarn"):
        raise ValueError(f"{path} stretches its positions by rope scaling of type {stretched}; ours is yarn")
    if stretched == "yarn":
        fields["rope_scaling"] = {"rope_type": "yarn", **yarn}
    fields["use_moe"] = kind.endswith("moe")
    if kind == "bailingmoe":
        fields["norm_topk_prob"] = field(f"{kind}.expert_weights_norm", False)
        fields["norm_top1_prob"] = fields["norm_topk_prob"] and fields["num_experts_per_tok"] == 1
    config = MiniMindConfig(**fields)
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return from_gguf(tensors, config), config
