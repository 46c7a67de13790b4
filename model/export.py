"""Our weights in the layout of other runtimes, and back: Llama, Qwen3, Qwen2-MoE, Qwen3-MoE, and our own old names.

                    dense     mixture of experts
    without norms   llama     qwen2_moe (needs a shared expert)
    with qk_norm    qwen3     qwen3_moe (has no shared expert)

Everything here maps state dicts and configurations in memory; scripts/convert_model.py reads and writes the files.
The layouts are exact: no product is reordered and no value rounded, so logits change in their last bits at most.
Shapes: a weight is (out, in), as nn.Linear keeps it.
"""

import re
from typing import Any

import torch

from model.model_minimind import MINIMIND3, MiniMindConfig

State = dict[str, torch.Tensor]


# --- rotary pairs ----------------------------------------------------------------------------------------------------


def interleave_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of q_proj or k_proj for a runtime that rotates the pairs (x_2i, x_2i+1).

    Ours rotates (x_i, x_i+head_dim/2). weight (heads · head_dim, hidden).
    """
    # (heads, 2 halves, pairs, hidden) -> (heads, pairs, 2 halves, hidden): the halves of a pair become neighbours
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def split_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo interleave_rows: return rows for the pairs (x_i, x_i+head_dim/2), as our model rotates them."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


# --- names of the original project before April 2025 -----------------------------------------------------------------

OLD_NAMES = {
    r"tok_embeddings\.weight": "model.embed_tokens.weight",
    r"norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"layers\.(\d+)\.attention_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"layers\.(\d+)\.attention\.w([qkvo])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
    r"layers\.(\d+)\.feed_forward\.gate\.weight": r"model.layers.\1.mlp.gate.weight",
    r"layers\.(\d+)\.feed_forward\.shared_experts\.(w[123])\.weight": r"model.layers.\1.mlp.shared_experts.0.\2.weight",
    r"layers\.(\d+)\.feed_forward\.((?:\w+\.\d+\.)?)(w[123])\.weight": r"model.layers.\1.mlp.\2\3.weight",
}
OLD_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OLD_BUFFERS = re.compile(r"(?:.*\.)?(?:pos_cis|freqs_cis|freqs_cos|freqs_sin|mask|k_cache|v_cache|cache_k|cache_v)")


def from_old_names(state: State, num_attention_heads: int) -> State:
    """Return the weights under today's names.

    The old model rotated neighbouring pairs, so rows of q and k change places; which ones depends on the number of
    heads, which no tensor shows. Raises ValueError for an unknown name.
    """
    head_dim = state["tok_embeddings.weight"].shape[1] // num_attention_heads
    renamed = {}
    for key, tensor in state.items():
        if OLD_BUFFERS.fullmatch(key):
            continue
        new = next((re.sub(old, new, key) for old, new in OLD_NAMES.items() if re.fullmatch(old, key)), None)
        if new is None:
            raise ValueError(f"{key} is not a name that the original project used before April 2025")
        new = re.sub(r"\bw[123]\b", lambda match: OLD_PROJECTIONS[match[0]], new)
        if ".attention.wq." in key or ".attention.wk." in key:
            if head_dim < 2 or head_dim % 2 or tensor.shape[0] % head_dim:
                raise ValueError(
                    f"the {tensor.shape[0]} rows of {key} are not heads of an even size, {head_dim} if there are "
                    f"{num_attention_heads}; set --num_attention_heads to the number it was trained with"
                )
            tensor = split_rows(tensor, head_dim)
        renamed[new] = tensor
    renamed.setdefault("lm_head.weight", renamed["model.embed_tokens.weight"])
    return renamed


# --- Hugging Face ----------------------------------------------------------------------------------------------------

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSES |= {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


def hf_format(config: MiniMindConfig) -> str:
    """Return transformers' model_type that computes what this configuration does."""
    if config.qk_norm:
        return "qwen3_moe" if config.use_moe else "qwen3"
    return "qwen2_moe" if config.use_moe else "llama"


def hf_config(config: MiniMindConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json for the class of hf_format.

    Rotary settings are written twice: `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for older
    runtimes, which would silently assume a theta of 10,000; likewise `dtype` and `torch_dtype`.
    """
    kind = hf_format(config)
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    context = config.max_position_embeddings
    if config.rope_scaling is not None:
        rope |= config.rope_scaling
        context = stretched_length(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size", "initializer_range")
    names += ("intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps")
    fields = {name: getattr(config, name) for name in (*names, "rope_theta", "vocab_size", "head_dim")} | {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "attention_dropout": 0.0,
        "max_position_embeddings": context,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.rope_scaling is not None:
        fields["rope_scaling"] = config.rope_scaling
    if kind == "llama":
        return fields | {"attention_bias": False, "mlp_bias": False}
    if config.qk_norm:
        fields |= {"attention_bias": False, "sliding_window": None}
    fields["use_sliding_window"] = False
    if not config.use_moe:
        return fields | {"max_window_layers": config.num_hidden_layers}
    if kind == "qwen2_moe":
        # qkv_bias: the biases are zeros, but older runtimes read them in any case
        fields |= {"shared_expert_intermediate_size": config.intermediate_size * config.n_shared_experts}
        fields |= {"qkv_bias": True}
    return fields | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": renormalises(config),
        "output_router_logits": False,
        "router_aux_loss_coef": config.aux_loss_alpha,
    }


def renormalises(config: MiniMindConfig) -> bool:
    """Return whether the weights of a token's experts sum to one; see MiniMindConfig."""
    return config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.norm_top1_prob)


def stretched_length(config: MiniMindConfig) -> int:
    """Return the context in tokens that YaRN stretches to."""
    return round(config.rope_scaling["original_max_position_embeddings"] * config.rope_scaling["factor"])


def to_hf(state: State, config: MiniMindConfig) -> State:
    """Return the tensors of the class of hf_format, in the dtype of `state`; the head is the embedding.

    Only Qwen2-MoE has other tensors than ours. It multiplies its shared expert by sigmoid(g·x): with g = 0 that is
    exactly 1/2, which a doubled down_proj undoes. Several shared experts become one of their joint width.
    Raises ValueError if doubling exceeds the dtype, or if the format's number of shared experts is not ours.
    """
    state = {key: tensor for key, tensor in state.items() if key != "lm_head.weight"}
    if not config.use_moe:
        return state
    if config.qk_norm:
        if config.n_shared_experts:
            raise ValueError("Qwen3-MoE has no shared experts, and this model has; use --to minimind")
        return state
    if config.n_shared_experts < 1:
        raise ValueError("Qwen2-MoE always has a shared expert, and this model has none; use --to minimind")
    result = {key: tensor for key, tensor in state.items() if ".shared_experts." not in key}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v"):
            weight = state[f"{prefix}self_attn.{name}_proj.weight"]
            result[f"{prefix}self_attn.{name}_proj.bias"] = weight.new_zeros(weight.shape[0])
        shared = shared_expert(state, layer, config.n_shared_experts)
        down = shared["down_proj"] * 2
        if not torch.isfinite(down).all():
            raise ValueError(
                f"{prefix}mlp.shared_experts: the doubled down_proj exceeds {str(down.dtype).removeprefix('torch.')}; "
                "use --dtype bfloat16 or float32"
            )
        shared["down_proj"] = down
        result |= {f"{prefix}mlp.shared_expert.{name}.weight": tensor for name, tensor in shared.items()}
        result[f"{prefix}mlp.shared_expert_gate.weight"] = down.new_zeros(1, config.hidden_size)
    return result


# gate and up (width, hidden) of shared experts are stacked, down (hidden, width) are put side by side
SHARED_DIMS = {"gate": 0, "up": 0, "down": 1}


def shared_expert(state: State, layer: int, count: int) -> State:
    """Return the shared experts of a layer as one: their sum is a single expert of their joint width."""
    prefix = f"model.layers.{layer}.mlp.shared_experts."
    return {
        f"{name}_proj": torch.cat([state[f"{prefix}{number}.{name}_proj.weight"] for number in range(count)], dim=dim)
        for name, dim in SHARED_DIMS.items()
    }


def split_shared_expert(tensors: State, layer: int, width: int) -> State:
    """Undo shared_expert: return one wide expert as shared experts of `width`."""
    prefix = f"model.layers.{layer}.mlp.shared_experts."
    return {
        f"{prefix}{number}.{name}_proj.weight": part.contiguous()
        for name, dim in SHARED_DIMS.items()
        for number, part in enumerate(tensors[f"{name}_proj"].split(width, dim=dim))
    }


def from_hf(state: State, hf: Any) -> tuple[State, MiniMindConfig]:
    """Return our tensors and configuration from the state dict and the config of a class in transformers.

    Raises ValueError that names what our architecture cannot express.
    """
    if hf.model_type == "minimind":
        config = MiniMindConfig(**hf.to_dict())
        return _with_head(state), config
    if hf.model_type not in CLASSES:
        raise ValueError(
            f"model_type {hf.model_type} cannot become a .pth of ours; {', '.join(CLASSES)} and minimind can"
        )
    obstacles = {
        f"hidden_act {hf.hidden_act}": hf.hidden_act != "silu",
        "sliding windows": bool(getattr(hf, "use_sliding_window", False)),
        "layers without experts": bool(getattr(hf, "mlp_only_layers", None)),
        "experts in some layers only": getattr(hf, "decoder_sparse_step", 1) != 1,
    }
    rope = dict(hf.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    obstacles[f"rope_type {kind}"] = kind not in ("default", "yarn")
    _refuse(obstacles)
    fields: dict[str, Any] = dict(MINIMIND3) if hf.model_type.startswith("qwen3") else {}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    names += ("max_position_embeddings", "rms_norm_eps", "initializer_range", "intermediate_size")
    fields |= {name: getattr(hf, name) for name in names}
    fields["head_dim"] = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(getattr(hf, name, None), int):
            fields[name] = getattr(hf, name)
    fields |= {"rope_theta": theta, "rope_scaling": rope if kind == "yarn" else None}
    state = {key: tensor for key, tensor in state.items() if not key.endswith("rotary_emb.inv_freq")}
    if hf.model_type.endswith("_moe"):
        state = _split_experts(state)
        fields |= {
            "use_moe": True,
            "intermediate_size": hf.moe_intermediate_size,
            "n_routed_experts": hf.num_experts,
            "num_experts_per_tok": hf.num_experts_per_tok,
            "norm_topk_prob": hf.norm_topk_prob,
            "norm_top1_prob": hf.norm_topk_prob and hf.num_experts_per_tok == 1,
            "aux_loss_alpha": hf.router_aux_loss_coef,
        }
        if hf.model_type == "qwen2_moe":
            state = _from_qwen2_moe(state, hf)
            fields["n_shared_experts"] = hf.shared_expert_intermediate_size // hf.moe_intermediate_size
    biases = [key for key in state if key.endswith(".bias")]
    _refuse({f"{key}, which is not zero": bool(state[key].any()) for key in biases})
    config = MiniMindConfig(**fields)
    return _with_head({key: tensor for key, tensor in state.items() if key not in biases}), config


def _split_experts(state: State) -> State:
    """Return one tensor per expert and projection; transformers 5 keeps them stacked."""
    result = {}
    for key, tensor in state.items():
        if key.endswith(".mlp.experts.gate_up_proj"):  # (experts, 2 · width, hidden)
            for number, both in enumerate(tensor):
                stem = key.removesuffix("gate_up_proj") + f"{number}."
                result[f"{stem}gate_proj.weight"], result[f"{stem}up_proj.weight"] = both.chunk(2)
        elif key.endswith(".mlp.experts.down_proj"):  # (experts, hidden, width)
            stem = key.removesuffix("down_proj")
            result |= {f"{stem}{number}.down_proj.weight": part for number, part in enumerate(tensor)}
        else:
            result[key] = tensor
    return result


def _from_qwen2_moe(state: State, hf: Any) -> State:
    """Undo what to_hf does for Qwen2-MoE, whose shared expert our shared experts become."""
    width, wide = hf.moe_intermediate_size, hf.shared_expert_intermediate_size
    _refuse({f"a shared expert of width {wide}, not a multiple of the experts' {width}": wide % width != 0})
    gates = [key for key in state if key.endswith(".shared_expert_gate.weight")]
    _refuse({f"{key}, a gate that is not zero": bool(state[key].any()) for key in gates})
    result = {key: tensor for key, tensor in state.items() if ".mlp.shared_expert" not in key}
    for layer in range(hf.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.shared_expert."
        names = ("gate_proj", "up_proj", "down_proj")
        shared = {name: state[f"{prefix}{name}.weight"] for name in names}
        shared["down_proj"] = shared["down_proj"] / 2
        result |= split_shared_expert(shared, layer, width)
    return result


def _with_head(state: State) -> State:
    """Add the head, as a .pth holds the tied weight under both names. Raises ValueError if there is another head."""
    embedding = state["model.embed_tokens.weight"]
    head = state.get("lm_head.weight", embedding)
    _refuse({"a head that is not the embedding (tie_word_embeddings false)": not torch.equal(head, embedding)})
    return {**state, "lm_head.weight": embedding}


def _refuse(obstacles: dict[str, bool]) -> None:
    there = [name for name, present in obstacles.items() if present]
    if there:
        raise ValueError(f"cannot become a .pth of ours, whose architecture has no place for {'; '.join(there)}")
