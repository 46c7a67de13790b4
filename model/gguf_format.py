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
from pathlib import Path
from typing import Any

import torch

from model.export import (
    State,
    interleave_rows,
    renormalises,
    shared_expert,
    split_rows,
    split_shared_expert,
    stretched_length,
)
from model.model_minimind import MINIMIND3, MiniMindConfig, yarn_parameters

GGUF_TYPES = ("F16", "Q8_0")
ARCHITECTURES = {(False, False): "llama", (True, False): "bailingmoe"}  # by use_moe and qk_norm
ARCHITECTURES |= {(False, True): "qwen3", (True, True): "qwen3moe"}
INTERLEAVED = ("self_attn.q_proj", "self_attn.k_proj")  # where neighbouring pairs are rotated
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
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
    result = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if moe and not config.qk_norm:  # elsewhere llama.cpp uses the embedding if there is no head
        result["output.weight"] = state["model.embed_tokens.weight"]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, gguf_name in LAYER_NAMES.items():
            tensor = state.get(f"{ours}{name}.weight")
            if tensor is not None:
                if name in interleaved:
                    tensor = interleave_rows(tensor, config.head_dim)
                result[f"{theirs}{gguf_name}.weight"] = tensor
        if moe:
            shared = shared_expert(state, layer, config.n_shared_experts) if config.n_shared_experts else {}
            for name in ("gate", "up", "down"):
                experts = [state[f"{ours}mlp.experts.{e}.{name}_proj.weight"] for e in range(config.n_routed_experts)]
                result[f"{theirs}ffn_{name}_exps.weight"] = torch.stack(experts)
                if shared:
                    result[f"{theirs}ffn_{name}_shexp.weight"] = shared[f"{name}_proj"]
    return result


def from_gguf(tensors: State, config: MiniMindConfig) -> State:
    """Undo to_gguf."""
    interleaved = () if config.qk_norm else INTERLEAVED
    embedding = tensors["token_embd.weight"]
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    state["model.norm.weight"] = tensors["output_norm.weight"]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, gguf_name in LAYER_NAMES.items():
            tensor = tensors.get(f"{theirs}{gguf_name}.weight")
            if tensor is not None:
                if name in interleaved:
                    tensor = split_rows(tensor, config.head_dim)
                state[f"{ours}{name}.weight"] = tensor
        if config.use_moe:
            for name in ("gate", "up", "down"):
                for number, part in enumerate(tensors[f"{theirs}ffn_{name}_exps.weight"]):
                    state[f"{ours}mlp.experts.{number}.{name}_proj.weight"] = part
            if config.n_shared_experts:
                names = ("gate", "up", "down")
                shared = {f"{name}_proj": tensors[f"{theirs}ffn_{name}_shexp.weight"] for name in names}
                state |= split_shared_expert(shared, layer, config.intermediate_size)
    return state


def write_gguf(
    path: str | Path, state: State, config: MiniMindConfig, tokenizer_folder: str | Path, gguf_type: str, name: str
) -> list[str]:
    """Write the file; return the tensors that stay F16 because their rows do not fill whole blocks of the type.

    Raises ValueError if llama.cpp has no such tokenizer or mixture, or if the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[config.use_moe, config.qk_norm])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if gguf_type == "F16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_tokenizer(writer, Path(tokenizer_folder), config.vocab_size)
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
    scaling = config.rope_scaling
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings if scaling is None else stretched_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if scaling is not None:
        from gguf import RopeScalingType

        if scaling != yarn_parameters({**scaling, "attention_factor": None}):
            raise ValueError("rope_scaling: GGUF takes YaRN's own attention_factor only; leave it out of the config")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if config.use_moe and not config.qk_norm:
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_norm(renormalises(config))
        writer.add_expert_weights_scale(1.0)
        writer.add_leading_dense_block_count(0)


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    from gguf import TokenType

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    numbers = range(vocab_size)  # ids that the model has and the tokenizer lacks should never be produced
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(content, folder))
    writer.add_token_list([tokens.get(number, f"[unused{number}]") for number in numbers])
    writer.add_token_types([types.get(number, TokenType.UNUSED) for number in numbers])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    numbers_of = {token: number for number, token in tokens.items()}
    for kind, default in (("bos", "<|im_start|>"), ("eos", "<|im_end|>"), ("pad", "<|endoftext|>")):
        token = config.get(f"{kind}_token") or default
        getattr(writer, f"add_{kind}_token_id")(numbers_of[token["content"] if isinstance(token, dict) else token])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    template = chat_template(folder)
    if isinstance(template, str):
        writer.add_chat_template(without_marks(template))
    elif template:
        writer.add_chat_template([{**part, "template": without_marks(part["template"])} for part in template])


def chat_template(folder: str | Path) -> str | list[dict] | None:
    """Return the chat template of a tokenizer's folder, or its named ones, or None if there is none.

    transformers knows two places; a file of its own has precedence.
    """
    file, config_file = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    return config.get("chat_template")


def without_marks(template: str) -> str:
    """Return a template without the marks of transformers' assistant mask, which llama.cpp does not know.

    A block that is always taken replaces them, so that spaces around them are trimmed as before.
    """
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)


def go_template(folder: str | Path) -> str | None:
    """Return the folder's chat template in Go's language, as ollama's Modelfile wants it; None if there is none.

    It is pieced together from the template's output for turns that hold marks.
    """
    from transformers import AutoTokenizer

    if not chat_template(folder):
        return None
    render = AutoTokenizer.from_pretrained(folder, local_files_only=True).apply_chat_template
    marks = {role: f"@{role}@" for role in ("system", "user", "assistant", "tool")}
    turns = {role: {"role": role, "content": mark} for role, mark in marks.items()}
    call = {"type": "function", "function": {"name": "@name@", "arguments": {}}}
    calls: list[dict] = [turns["user"], {**turns["assistant"], "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "@offered@"}}

    def text(*history: dict, **options) -> str:
        return render(list(history), tokenize=False, **options)

    def around(role: str, *history: dict, **options) -> tuple[str, str]:
        added = text(*history, turns[role], **options).removeprefix(text(*history, **options))
        before, _, after = added.partition(marks[role])
        return before, after

    user, answer = around("user", turns["user"], turns["assistant"]), around("assistant", turns["user"])
    result = around("tool", *calls, tools=[tool])
    asked = marks["user"].join(user)  # the text of the user's turn
    openings = {}  # what precedes it, (with tools, with a system turn) -> text
    for tools in (None, [tool]):
        for system in ((), (turns["system"],)):
            opening = text(*system, turns["user"], tools=tools).removesuffix(asked)
            opening = opening.replace(marks["system"], "{{ .System }}")
            openings[bool(tools), bool(system)] = opening.replace(
                "\n" + json.dumps(tool), "{{ range .Tools }}\n{{ . }}{{ end }}"
            )
    prompt = text(turns["user"], add_generation_prompt=True).removeprefix(text(turns["user"]))
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


def read_gguf(path: str | Path) -> tuple[State, MiniMindConfig]:
    """Return the tensors in float32 under our names, and the configuration, of a file that write_gguf wrote.

    Raises ValueError if it is not a GGUF file or has an architecture that is not ours.
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
    fields = dict(MINIMIND3 if kind.startswith("qwen3") else {}) | {
        "hidden_size": field(f"{kind}.embedding_length"),
        "num_hidden_layers": field(f"{kind}.block_count"),
        "num_attention_heads": field(f"{kind}.attention.head_count"),
        "num_key_value_heads": field(f"{kind}.attention.head_count_kv"),
        "intermediate_size": field(f"{kind}.feed_forward_length"),
        "head_dim": field(f"{kind}.attention.key_length"),
        "vocab_size": field(f"{kind}.vocab_size"),
        "max_position_embeddings": field(f"{kind}.context_length"),
        "rms_norm_eps": float(f"{field(f'{kind}.attention.layer_norm_rms_epsilon'):.6g}"),  # a float32 in the file
        "rope_theta": field(f"{kind}.rope.freq_base"),
    }
    for name in ("bos", "eos", "pad"):
        fields[f"{name}_token_id"] = field(f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id")
    if field(f"{kind}.rope.scaling.type") == "yarn":
        fields["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": field(f"{kind}.rope.scaling.factor"),
            "original_max_position_embeddings": field(f"{kind}.rope.scaling.original_context_length"),
            "beta_fast": field(f"{kind}.rope.scaling.yarn_beta_fast"),
            "beta_slow": field(f"{kind}.rope.scaling.yarn_beta_slow"),
        }
    if kind.endswith("moe"):
        fields |= {
            "use_moe": True,
            "n_routed_experts": field(f"{kind}.expert_count"),
            "num_experts_per_tok": field(f"{kind}.expert_used_count"),
        }
    if kind == "bailingmoe":
        renormalised = field(f"{kind}.expert_weights_norm", False)
        fields |= {
            "n_shared_experts": field(f"{kind}.expert_shared_count"),
            "norm_topk_prob": renormalised,
            "norm_top1_prob": renormalised and fields["num_experts_per_tok"] == 1,
        }
    config = MiniMindConfig(**fields)
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return from_gguf(tensors, config), config
