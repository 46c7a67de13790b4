"""MiniMind: a Llama-style decoder, dense or mixture of experts, in one file that imports nothing else of this project.

Pre-norm blocks with RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245) and SwiGLU (arXiv:2002.05202). The mixture of experts has shared and routed experts as in
arXiv:2401.06066. The layout is Llama's, with qk_norm Qwen3's. The classes are transformers classes, so that
`save_pretrained`, `from_pretrained` and `generate` work and the file travels with exported weights as remote code.

Read it from top to bottom: config, norm, rotary positions, attention, feed-forward, experts, block, model. The last
section holds hand-written kernels for training on a CPU; the model is complete without them.

Shapes: batch, seq = rows and positions of the input; tokens = batch · seq; heads = query heads;
kv_heads = key/value heads; group = heads // kv_heads, the query heads that share a key head.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast

try:  # FlashAttention over packed documents; its arguments differ between torch releases
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    HAS_VARLEN = False


# Fields of the known models that differ from MiniMindConfig's defaults. MiniMind-3 has the layout of Qwen3.
MINIMIND3 = {"num_key_value_heads": 4, "intermediate_ratio": math.pi, "rms_norm_eps": 1e-6, "qk_norm": True}
MINIMIND3 |= {"n_shared_experts": 0, "num_experts_per_tok": 1, "norm_top1_prob": True}
MINIMIND3 |= {"aux_loss_alpha": 5e-4, "seq_aux": False}
MINIMIND3_FILES = {**MINIMIND3, "rope_dtype": "float16"}  # what the original's files leave unsaid
PRESETS: dict[str, dict[str, Any]] = {
    "minimind2_26m": {"hidden_size": 512, "num_hidden_layers": 8},
    "minimind2_104m": {"hidden_size": 768, "num_hidden_layers": 16},
    "minimind2_moe": {"hidden_size": 640, "num_hidden_layers": 8, "use_moe": True},
    "minimind3": {"hidden_size": 768, "num_hidden_layers": 8, **MINIMIND3},
    "minimind3_moe": {"hidden_size": 768, "num_hidden_layers": 8, "use_moe": True, **MINIMIND3},
}


class MiniMindConfig(PretrainedConfig):
    """Sizes and switches of a MiniMind model; the defaults are the 26M dense preset.

    `intermediate_size=None` means 64 * ceil(intermediate_ratio * hidden_size / 64), the SwiGLU width of the presets.
    `head_dim=None` means hidden_size / num_attention_heads. `qk_norm` normalises each head's query and key.
    `norm_topk_prob` makes the weights of several chosen experts sum to one; a single one keeps its score as its weight,
    as in MiniMind-2, unless `norm_top1_prob` is set too (MiniMind-3, Qwen3). `seq_aux` balances the experts within each
    document, else within the micro-batch.
    `rope_dtype="float16"` rounds the rotary tables as the original's MiniMind-3 does when it answers in half precision.
    `rope_scaling` stretches the context by YaRN, in transformers' form: {"rope_type": "yarn", "factor": 4.0,
    "original_max_position_embeddings": trained length}, optionally "beta_fast", "beta_slow" and "attention_factor"; see
    rotary_frequencies. None leaves positions as they are.
    """

    model_type = "minimind"
    rope_scaling: ClassVar[dict[str, Any] | None] = None  # replaces transformers' property of that name

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = 2,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        intermediate_ratio: float = 8 / 3,
        vocab_size: int = 6400,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-5,
        qk_norm: bool = False,
        rope_theta: float = 1e6,
        rope_scaling: dict[str, Any] | None = None,
        rope_dtype: str = "float32",
        hidden_act: str = "silu",
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int = 1,
        norm_topk_prob: bool = True,
        norm_top1_prob: bool = False,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,
        seq_aux: bool = True,
        **kwargs: Any,
    ):
        fields = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        fields["num_key_value_heads"] = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        if rope_scaling is None:
            del fields["rope_scaling"]
        else:
            fields["rope_scaling"] = yarn_parameters(rope_scaling)
        for name, value in fields.items():  # each argument becomes a field
            setattr(self, name, value)
        for name, default in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0)):
            kwargs.setdefault(name, default)
        self._check(kwargs)
        self.intermediate_size = intermediate_size or 64 * math.ceil(intermediate_ratio * hidden_size / 64)
        self.head_dim = head_dim or hidden_size // num_attention_heads
        kwargs.setdefault("tie_word_embeddings", True)
        for name in ("num_labels", "id2label", "label2id"):  # of classifiers; transformers would make a list that long
            kwargs.pop(name, None)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "MiniMindConfig":
        """Read a config.json; also the original's of MiniMind-3, with other names and some fields left out."""
        if "num_experts" in config_dict:
            config_dict = {**MINIMIND3_FILES, **config_dict}
            names = {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"}
            if config_dict.get("use_moe"):
                names["moe_intermediate_size"] = "intermediate_size"
            config_dict |= {ours: config_dict.pop(theirs) for theirs, ours in names.items() if theirs in config_dict}
        return super().from_dict(config_dict, **kwargs)

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for a value of the wrong type, out of range, or at odds with the others.

        These fields are also filled from other people's files, so every one is checked.
        """
        counts = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"]
        counts += ["max_position_embeddings", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"]
        counts += [name for name in ("head_dim", "intermediate_size") if getattr(self, name) is not None]
        for name in counts:
            value, least = getattr(self, name), int(name != "n_shared_experts")
            most = 1024 if name == "num_hidden_layers" or name.startswith("n_") else 2**31  # of modules
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be at least {least}, a whole number up to {most}, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "intermediate_ratio", "aux_loss_alpha"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1e300 or (value == 0 and name != "aux_loss_alpha"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("qk_norm", "use_moe", "norm_topk_prob", "norm_top1_prob", "seq_aux"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if type(kwargs[name]) not in (int, type(None)):
                raise ValueError(f"{name} must be a token id, got {kwargs[name]!r}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                f"set --hidden_size to a multiple of {self.num_attention_heads}"
            )
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f"the size of a head, hidden_size / num_attention_heads, is {head_dim}: it is odd, and rotary "
                f"positions need pairs; set --hidden_size to a multiple of {2 * self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rope_dtype not in ("float32", "float16"):
            raise ValueError(f"rope_dtype must be float32 or float16, got {self.rope_dtype!r}")
        for name, value in (("hidden_act", "silu"), ("scoring_func", "softmax"), ("dropout", 0.0)):
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; MiniMind uses {value!r}")
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must lie between 1 and "
                f"n_routed_experts {self.n_routed_experts}"
            )


def yarn_parameters(rope_scaling: dict[str, Any]) -> dict[str, Any]:
    """Check MiniMindConfig's rope_scaling and fill in its defaults."""
    if not isinstance(rope_scaling, dict):
        raise ValueError(f"rope_scaling must be a set of names and values, got {rope_scaling!r}")
    given = {**rope_scaling}
    kind = given.pop("rope_type", given.pop("type", None))
    values = {"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0}
    values |= {"attention_factor": None}
    if kind != "yarn" or given.keys() - values.keys():
        unknown = ", ".join(sorted(given.keys() - values.keys())) or f"rope_type {kind!r}"
        raise ValueError(f"rope_scaling: {unknown} is not supported; it takes rope_type 'yarn', {', '.join(values)}")
    values |= {name: value for name, value in given.items() if value is not None}
    wrong = [name for name, value in values.items() if not isinstance(value, int | float | None)]
    if wrong:
        raise ValueError(f"rope_scaling: {wrong[0]} must be a number, got {values[wrong[0]]!r}")
    factor, length = values["factor"], values["original_max_position_embeddings"]
    if factor is None or not 1 <= factor < math.inf:
        raise ValueError(f"rope_scaling: factor is {factor}, and must be 1 or more: longest context / trained length")
    if length is None or length < 1:
        raise ValueError(f"rope_scaling: original_max_position_embeddings is {length}, and must be the trained length")
    if not values["beta_fast"] > values["beta_slow"] > 0:
        raise ValueError(f"rope_scaling: beta_fast must exceed beta_slow, and beta_slow must exceed 0: {values}")
    if values["attention_factor"] is None:
        values["attention_factor"] = 0.1 * math.log(factor) + 1.0  # arXiv:2309.00071, eq. 22, on both cos and sin
    return {"rope_type": "yarn", **values}


# --- norm ------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in float32; under autocast the result has the autocast dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and self.training:
            return RMSNormFunction.apply(x.float(), self.weight.float(), self.eps, compute_dtype(x))
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(compute_dtype(x))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of the next matrix product: autocast's when it is on, else that of x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


# --- rotary positions ------------------------------------------------------------------------------------------------


def rotary_frequencies(config: MiniMindConfig, device: torch.device | None = None) -> torch.Tensor:
    """Return the radians per position of each pair of dimensions, (head_dim / 2) in float32: theta^(-2i/head_dim).

    With YaRN (arXiv:2309.00071, section 3.2, "NTK-by-parts") pairs that turn more than beta_fast times within the
    trained length keep their frequency. Pairs that turn less than beta_slow times are slowed by the factor, so they
    never reach an angle that training did not show. The pairs between are blended.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies

    def pair_that_turns(times: float) -> float:
        """Return the (fractional) index of the pair that turns this often within the trained length."""
        wavelength = scaling["original_max_position_embeddings"] / times
        return config.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_that_turns(scaling["beta_fast"])), 0)
    last = min(math.ceil(pair_that_turns(scaling["beta_slow"])), config.head_dim - 1)
    pairs = torch.arange(len(frequencies), device=device, dtype=torch.float32)
    slowed = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)  # 0 keeps the frequency, 1 slows it
    wavelengths = config.rope_theta**exponent  # rounded twice, as in transformers: it shows at position 10,000
    return 1 / (scaling["factor"] * wavelengths) * slowed + 1 / wavelengths * (1 - slowed)


def rotary_tables(position_ids: torch.Tensor, config: MiniMindConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of position · frequency, each (batch, seq, head_dim / 2) in float32, times YaRN's factor.

    They are computed once per forward: there is no buffer that a reload or a `.to(bfloat16)` could spoil.
    """
    with torch.autocast(position_ids.device.type, enabled=False):
        angles = position_ids.unsqueeze(-1).float() * rotary_frequencies(config, position_ids.device)
        cos, sin = angles.cos(), angles.sin()
        if config.rope_scaling is not None:
            cos, sin = (table * config.rope_scaling["attention_factor"] for table in (cos, sin))
        if config.rope_dtype == "float16":
            cos, sin = cos.half().float(), sin.half().float()
        return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}), the split-halves convention of Hugging Face's Llama.

    x (batch, seq, heads, head_dim), cos and sin (batch, seq, head_dim / 2). float32 inside, x's dtype outside.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # the same angle for every head
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# --- attention -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.recompute = False  # see MiniMindForCausalLM.recompute_activations
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:  # keeps the scores of attention in bounds, whatever the learning rate (arXiv:2010.04245)
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, rotary, plan: "AttentionPlan", past_key_values=None) -> torch.Tensor:
        """x (batch, seq, hidden) -> the same shape; rotary: see rotary_tables."""
        batch, seq, _ = x.shape
        query = self.q_proj(x).view(batch, seq, self.heads, self.head_dim)
        key = self.k_proj(x).view(batch, seq, self.kv_heads, self.head_dim)
        value = self.v_proj(x).view(batch, seq, self.kv_heads, self.head_dim)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if plan.kind == "tiles":
            out = attend_in_tiles(query, key, value, rotary, plan.tiles, self.recompute)
        elif plan.kind == "varlen":
            query, key, value = (t.flatten(0, 1) for t in (rotate(query, *rotary), rotate(key, *rotary), value))
            # arguments: borders and longest document, of queries and of keys; window (-1, 0) is causal
            documents = (plan.cu_seqlens, plan.cu_seqlens, plan.max_seqlen, plan.max_seqlen)
            out = varlen_attn(query, key, value, *documents, window_size=(-1, 0), enable_gqa=True)
        else:
            out = self._attend(rotate(query, *rotary), rotate(key, *rotary), value, plan, past_key_values)
        return self.o_proj(out.reshape(batch, seq, self.heads * self.head_dim))

    def _attend(self, query, key, value, plan: "AttentionPlan", past_key_values) -> torch.Tensor:
        """Attend with torch's scaled_dot_product_attention; (batch, seq, heads, head_dim) in and out."""
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (batch, heads, seq, head_dim)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        grouped = self.heads != self.kv_heads
        if grouped and query.is_cuda and (plan.mask is not None or query.dtype == torch.float32):
            # flash attention supports neither, and the memory-efficient kernel, which does, supports no groups
            key, value = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (key, value))
            grouped = False
        if plan.kind == "parts":
            queries = query.split([len(mask) for _, mask in plan.tiles], dim=2)
            out = [
                F.scaled_dot_product_attention(part, key[:, :, keys], value[:, :, keys], mask, enable_gqa=grouped)
                for part, (keys, mask) in zip(queries, plan.tiles, strict=True)
            ]
            return torch.cat(out, dim=2).transpose(1, 2)
        causal = plan.kind == "causal"
        out = F.scaled_dot_product_attention(query, key, value, plan.mask, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)


class AttentionPlan:
    """How one forward computes attention, chosen once for all layers.

    kind "causal": plain rows. "mask": a boolean mask (batch, 1, queries, keys), True = may attend, None = to all.
    "parts" (CPU): one row with such a mask, its queries in parts that leave out the keys that none of them sees.
    "tiles" (CPU) and "varlen" (FlashAttention): packed documents.
    """

    def __init__(self, kind: str, mask=None, tiles=None, cu_seqlens=None, max_seqlen: int | None = None):
        self.kind, self.mask, self.tiles = kind, mask, tiles
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen

    @classmethod
    def packed(cls, cu_seqlens: torch.Tensor, max_seqlen: int, hidden_states: torch.Tensor, head_dim: int):
        """Plan rows (batch, seq, hidden) whose documents have the borders cu_seqlens (documents + 1,)."""
        dtype = compute_dtype(hidden_states)
        if hidden_states.device.type == "cpu":
            return cls("tiles", tiles=attention_tiles(cu_seqlens, dtype))
        fits = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
        if HAS_VARLEN and hidden_states.is_cuda and fits and flash_runs_on(hidden_states.device.index):
            return cls("varlen", cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        batch, seq = hidden_states.shape[:2]
        positions = torch.arange(batch * seq, device=cu_seqlens.device)
        # number of the document at each position: how many documents end at or before it
        document = torch.bucketize(positions, cu_seqlens[1:].long(), right=True).view(batch, seq)
        mask = (document.unsqueeze(2) == document.unsqueeze(1)).tril()  # (batch, queries, keys)
        return cls("mask", mask=mask.unsqueeze(1))

    @classmethod
    def rows(cls, attention_mask: torch.Tensor | None, past: int, keys: int, hidden_states: torch.Tensor):
        """Plan rows that may be padded (attention_mask (batch, keys), 0 = padding) and may continue `past` tokens."""
        (batch, queries), device = hidden_states.shape[:2], hidden_states.device
        if attention_mask is not None and attention_mask.dim() == 4:  # the caller's own mask
            if attention_mask.shape[:2] == (1, 1) and attention_mask.dtype == torch.bool and device.type == "cpu":
                parts = attention_mask[0, 0].split(128)
                seen = [part.any(dim=0).nonzero().squeeze(1) for part in parts]
                return cls("parts", tiles=[(keys, part[:, keys]) for keys, part in zip(seen, parts, strict=True)])
            return cls("mask", mask=attention_mask)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded and past == 0 and keys == queries:
            return cls("causal")
        key_positions = torch.arange(keys, device=device)
        query_positions = torch.arange(past, past + queries, device=device).unsqueeze(1)
        if not padded and queries == 1 and keys == past + 1:
            return cls("mask")  # one new token attends to everything
        mask = (key_positions <= query_positions).expand(batch, 1, queries, keys)
        if padded:
            real = F.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]), value=True)  # or cut, if longer
            # a padding query attends to itself, or its softmax would have no terms
            mask = mask & real[:, None, None, :] | (key_positions == query_positions)
        return cls("mask", mask=mask)


@torch.compiler.assume_constant_result
def flash_runs_on(device_index: int) -> bool:
    """Return whether varlen_attn's flash kernels exist in this torch (not on Windows) and for this GPU (Ampere up)."""
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device_index) >= (8, 0)


# --- feed-forward ----------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.recompute = False  # see MiniMindForCausalLM.recompute_activations
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not trains_eagerly_on_cpu(gate):
            return self.down_proj(F.silu(gate) * up)
        product = SwiGLUFunction.apply(gate, up)
        if not self.recompute:
            return self.down_proj(product)
        with recomputed(product, lambda: F.silu(gate.detach()).mul_(up.detach())):
            return self.down_proj(product)


# --- mixture of experts ----------------------------------------------------------------------------------------------


class MoEFeedForward(nn.Module):
    """Routed experts, top-k per token, plus shared experts that see every token (arXiv:2401.06066)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))
        self.aux_loss_alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux

    def forward(self, x: torch.Tensor, documents: "DocumentIndex | None") -> tuple[torch.Tensor, torch.Tensor]:
        """x (batch, seq, hidden) -> the same shape, and the balance loss (0 without documents)."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # (tokens, hidden)
        scores, experts, weights = self.gate(x)
        out = self._routed(x, experts, weights)
        for shared in self.shared_experts:
            out = out + shared(x)
        aux_loss = x.new_zeros((), dtype=torch.float32)
        if documents is not None and self.aux_loss_alpha > 0:
            aux_loss = self.aux_loss_alpha * documents.balance_loss(scores, experts, self.seq_aux)
        return out.view(shape), aux_loss

    def _routed(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sort the (token, expert) pairs by expert, so that each expert is one product over a contiguous slice."""
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # (tokens · top_k,): pair p belongs to token p // top_k
        inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=x.device))
        inputs = Permuted.apply(x, order, inverse, top_k)
        counts = torch.zeros(len(self.experts), dtype=torch.int64, device=x.device)
        counts = counts.index_add_(0, experts.flatten(), torch.ones_like(order))  # pairs of each expert
        plain = all(type(layer) is nn.Linear for expert in self.experts for layer in expert.children())  # no adapters
        aligned = not any(size % 8 for size in self.experts[0].gate_proj.weight.shape)  # rows of 16 bytes
        grouped = plain and aligned and x.is_cuda and hasattr(F, "grouped_mm") and compute_dtype(x) == torch.bfloat16
        outputs = self._grouped(inputs, counts) if grouped else self._sliced(inputs, counts)
        outputs = Permuted.apply(outputs, inverse, order, 1).view(len(x), top_k, -1)  # back in the tokens' order
        return (outputs * weights.unsqueeze(-1).to(outputs.dtype)).sum(dim=1)

    @torch.compiler.disable  # the slices have new sizes every step, and each would be compiled
    def _sliced(self, inputs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run each expert over its slice of the sorted inputs (pairs, hidden)."""
        # an expert that got no token still takes part, with an empty slice: its gradient is zero, not missing
        slices = inputs.split(counts.tolist())
        # CPU training rounds sizes up, or blocks of ever new sizes would fragment the allocator's memory
        multiple = 128 if self.training and not inputs.is_cuda else 1
        return torch.cat(
            [
                expert(F.pad(part, (0, 0, 0, -len(part) % multiple)))[: len(part)]
                for expert, part in zip(self.experts, slices, strict=True)
            ]
        )

    def _grouped(self, inputs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run all experts in three grouped products, without a loop.

        On Hopper and B200 the counts need not even reach the host; on other cards torch loops over the experts inside.
        """
        dtype = compute_dtype(inputs)
        ends = counts.cumsum(0).to(torch.int32)

        def product(tensor: torch.Tensor, name: str) -> torch.Tensor:
            stacked = torch.stack([getattr(expert, name).weight.to(dtype) for expert in self.experts])
            return F.grouped_mm(tensor, stacked.transpose(1, 2), offs=ends)

        inputs = inputs.to(dtype)
        return product(F.silu(product(inputs, "gate_proj")) * product(inputs, "up_proj"), "down_proj")


class Router(nn.Module):
    """Choose top-k experts per token by softmax over all experts; the chosen weights may be made to sum to one."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob and (self.top_k > 1 or config.norm_top1_prob)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (tokens, hidden) -> float32 scores (tokens, experts), chosen experts and their weights (tokens, top_k)."""
        scores = F.linear(x, self.weight).float().softmax(dim=-1)
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return scores, experts, weights


class DocumentIndex:
    """The document of each token, for the balance loss, which packing and padding must not change.

    ids (tokens,) from 0 to slots - 1; padding has the extra number `slots`. A slot may be empty.
    """

    def __init__(self, ids: torch.Tensor, slots: int):
        self.ids, self.slots = ids, slots
        lengths = torch.zeros(slots + 1, device=ids.device).index_add_(0, ids, torch.ones_like(ids).float())
        self.lengths = lengths[:slots]  # tokens of each document, without padding
        self.documents = (self.lengths > 0).sum().clamp(min=1)

    @classmethod
    def build(cls, shape, device, document_ids=None, attention_mask=None, slots: int | None = None):
        """Index rows of shape (batch, seq): by document_ids where given (-1 = padding), else one document a row."""
        batch, seq = shape
        if document_ids is None:
            slots = batch
            document_ids = torch.arange(batch, device=device).unsqueeze(1).expand(batch, seq)
            if attention_mask is not None and attention_mask.dim() == 2:
                document_ids = document_ids.masked_fill(attention_mask[:, -seq:] == 0, -1)
        elif slots is None:
            slots = batch * seq
        ids = document_ids.reshape(-1).long()
        return cls(torch.where(ids < 0, slots, ids), slots)

    def balance_loss(self, scores: torch.Tensor, experts: torch.Tensor, per_document: bool) -> torch.Tensor:
        """Return the mean over documents of sum_e f_e · P_e (arXiv:2401.06066, eq. 12-14).

        f_e is the share of choices that fell on expert e, times the number of experts; P_e is its mean score. Without
        per_document all tokens form one pool. scores (tokens, experts), experts (tokens, top_k).
        """
        num_experts, top_k = scores.shape[1], experts.shape[1]
        chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0)
        zeros = scores.new_zeros(self.slots + 1, num_experts)
        load = zeros.index_add(0, self.ids, chosen)[: self.slots]  # (slots, experts), summed over a document's tokens
        importance = zeros.index_add(0, self.ids, scores)[: self.slots]
        lengths = self.lengths.clamp(min=1).unsqueeze(1)
        if not per_document:
            load, importance = load.sum(0, keepdim=True), importance.sum(0, keepdim=True)
            lengths = self.lengths.sum().clamp(min=1)
            return (load * num_experts / (lengths * top_k) * (importance / lengths)).sum()
        per_document_loss = (load * num_experts / (lengths * top_k) * (importance / lengths)).sum(dim=1)
        return per_document_loss.sum() / self.documents


# --- block and model -------------------------------------------------------------------------------------------------


class MiniMindBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.use_moe = config.use_moe
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(self, hidden_states, rotary, plan, past_key_values=None, documents=None):
        """Return the hidden states (batch, seq, hidden) and the layer's balance loss (None when dense)."""
        attended = self.self_attn(self.input_layernorm(hidden_states), rotary, plan, past_key_values)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not self.use_moe:
            return hidden_states + self.mlp(normed), None
        out, aux_loss = self.mlp(normed, documents)
        return hidden_states + out, aux_loss


class MiniMindPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model class."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MiniMindBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


@dataclass
class MiniMindModelOutput(BaseModelOutputWithPast):
    """Hidden states after the final norm, and the balance loss summed over layers."""

    aux_loss: torch.Tensor | None = None


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        document_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> MiniMindModelOutput:
        """Return hidden states (batch, seq, hidden); for the arguments see MiniMindForCausalLM.forward."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seq = hidden_states.shape[:2]
        device = hidden_states.device
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:  # padding on the left takes no position
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past : past + seq]
            else:
                position_ids = torch.arange(past, past + seq, device=device).expand(batch, seq)
        if cu_seqlens is not None:
            plan = AttentionPlan.packed(cu_seqlens, max_seqlen or seq, hidden_states, self.config.head_dim)
        else:
            keys = past + seq
            if hasattr(past_key_values, "get_mask_sizes"):  # a transformers cache may hold more slots than tokens
                keys = past_key_values.get_mask_sizes(seq, 0)[0]
            plan = AttentionPlan.rows(attention_mask, past, keys, hidden_states)
        rotary = rotary_tables(position_ids, self.config)
        documents = None
        if self.config.use_moe and self.training:
            slots = None if cu_seqlens is None else cu_seqlens.numel() - 1
            documents = DocumentIndex.build((batch, seq), device, document_ids, attention_mask, slots)

        aux_loss = hidden_states.new_zeros((), dtype=torch.float32)
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            arguments = (hidden_states, rotary, plan, past_key_values, documents)
            if checkpointing:
                hidden_states, layer_aux = torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden_states, layer_aux = layer(*arguments)
            if layer_aux is not None:
                aux_loss = aux_loss + layer_aux
        return MiniMindModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, aux_loss=aux_loss
        )


@dataclass
class MiniMindOutput(MoeCausalLMOutputWithPast):
    """Logits (batch, seq, vocab), or head_output: what the caller's `head` returned in their place."""

    head_output: Any = None


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model: MiniMindModel and a head that shares the embedding's weight."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None):
        super().__init__(config or MiniMindConfig())
        self.model = MiniMindModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.post_init()

    def recompute_activations(self, enable: bool = True) -> None:
        """Recompute attention probabilities and SwiGLU products in the backward pass, to the same bits.

        CPU training then keeps a third less memory. On CUDA, kernels and compiler do this by themselves.
        """
        for module in self.modules():
            if isinstance(module, (Attention, FeedForward)):
                module.recompute = enable

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        head: Callable[[torch.Tensor, torch.Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> MiniMindOutput:
        """Return logits (batch, seq, vocab), or those of the last `logits_to_keep` positions.

        input_ids (batch, seq); attention_mask (batch, past + seq), 0 = padding; position_ids (batch, seq).
        kwargs, for packed rows: cu_seqlens (documents + 1,) int32, borders of the documents in the flattened stream of
        batch · seq positions, the last entry repeated as padding; max_seqlen, an upper bound of their lengths;
        document_ids (batch, seq), -1 on padding, for the balance loss.
        head: a function (hidden_states, lm_head.weight) -> anything, called instead of the head and returned as
        `head_output`; `logits` is then None. A loss can avoid logits that it does not need, and every weight is still
        used inside forward, as DDP and ZeRO require.
        labels (batch, seq), as transformers defines them: shifted inside, -100 ignored.
        past_key_values: an object with `update(key, value, layer_idx)` -> all keys and values, and `get_seq_length()`.

        aux_loss is the balance loss summed over layers (training mode, mixture of experts; else 0).
        """
        if use_cache and past_key_values is None:
            from transformers import DynamicCache

            past_key_values = DynamicCache()
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        hidden_states, aux_loss = outputs.last_hidden_state, outputs.aux_loss
        loss = logits = head_output = None
        if head is not None:
            head_output = head(hidden_states, self.lm_head.weight)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
            if labels is not None:
                if logits.shape[1] != labels.shape[1]:
                    raise ValueError("labels need the logits of all positions; leave logits_to_keep at 0")
                loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()) + aux_loss
        return MiniMindOutput(
            loss=loss, logits=logits, head_output=head_output, aux_loss=aux_loss, past_key_values=past_key_values
        )


MiniMindConfig.register_for_auto_class()
MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")


# --- kernels of eager CPU training -----------------------------------------------------------------------------------
#
# Why they exist: without a compiler every operation passes over memory on its own, and on a CPU that traffic, not the
# arithmetic, is most of a step. These functions save passes, or memory, by computing gradients by hand. The model above
# is complete without them: RMSNorm is F.rms_norm, FeedForward is down(silu(gate) · up), packed attention is a mask.
# Only `Permuted` serves GPUs too; `x[order // copies]` would do instead.


def trains_eagerly_on_cpu(x: torch.Tensor) -> bool:
    """Return whether a hand-written function saves passes over memory here; a compiler fuses plain ones by itself."""
    return x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling()


class RMSNormFunction(torch.autograd.Function):
    """y = x / sqrt(mean(x²) + eps) · weight in float32. x (..., size), weight (size,)."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.mul(x, inverse_rms).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        grad = grad.to(x.dtype)
        product = grad * x
        grad_weight = inverse_rms.flatten() @ product.flatten(0, -2)
        # d/dx of x / rms(x): the part of weight · grad along x does not change the norm of the result
        along = (product @ weight).unsqueeze(-1).mul_(inverse_rms.pow(3).div_(x.shape[-1]))
        grad_x = torch.mul(grad, weight, out=product).mul_(inverse_rms).addcmul_(x, along, value=-1)
        return grad_x, grad_weight, None, None


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) · up. Computes silu(gate) again in the backward pass: a quarter less memory in the feed-forward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


def recomputed(tensor: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which autograd does not keep this tensor, but calls `compute` when it needs it."""
    storage, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: torch.Tensor) -> torch.Tensor | torch.Size:
        same = saved.data_ptr() == storage and saved.numel() == shape.numel() and saved.is_contiguous()
        return saved.shape if same else saved

    def unpack(kept: torch.Tensor | torch.Size) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else compute().view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def attend_in_tiles(query, key, value, rotary, tiles, recompute: bool) -> torch.Tensor:
    """Rotate and attend inside packed documents: query (batch, seq, heads, head_dim), key and value with kv_heads.

    Returns (tokens, kv_heads, group, head_dim).
    """
    kv_heads, head_dim = key.shape[2:]
    # one stream of tokens; query heads that share a key head lie next to each other (key and value have a group of 1)
    query, key, value = (t.view(-1, kv_heads, t.shape[2] // kv_heads, head_dim) for t in (query, key, value))
    (cos, sin), scale = (table.flatten(0, 1) for table in rotary), head_dim**-0.5
    query = HeadsFirstRotation.apply(query, cos * scale, sin * scale)  # the scale costs nothing here
    key = HeadsFirstRotation.apply(key, cos, sin).squeeze(2)
    return TiledAttention.apply(query, key, value.squeeze(2).transpose(0, 1), tiles, recompute)


class HeadsFirstRotation(torch.autograd.Function):
    """Rotate, and bring the heads to the front as TiledAttention takes them.

    It turns half by half with the heads outside, so every pass runs over (tokens · head_dim / 2) numbers in a row;
    turning each head's halves in place would make loops of 32. The gradient is the rotation backwards.

    x (tokens, kv_heads, group, head_dim), cos and sin (tokens, head_dim / 2) -> (kv_heads, tokens, group, head_dim).
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out = x.new_empty((x.shape[1], x.shape[0], *x.shape[2:]))
        # both seen as (kv_heads, group, tokens, head_dim), so that cos and sin broadcast over the heads
        HeadsFirstRotation.turn(x.permute(1, 2, 0, 3), cos, sin, out.transpose(1, 2))
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad_x = grad.new_empty((grad.shape[1], grad.shape[0], *grad.shape[2:]))
        HeadsFirstRotation.turn(grad.transpose(1, 2), cos, -sin, grad_x.permute(1, 2, 0, 3))
        return grad_x, None, None

    @staticmethod
    def turn(x, cos, sin, out):
        """Write the rotated x into out, both (kv_heads, group, tokens, head_dim) in any layout."""
        halves = x.unflatten(-1, (2, -1)).movedim(-2, 0)  # (2, kv_heads, group, tokens, head_dim / 2)
        first, second = torch.empty(halves.shape, dtype=torch.float32).copy_(halves)
        turned = torch.empty(halves.shape, dtype=torch.float32)
        torch.mul(first, cos, out=turned[0]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=turned[1]).addcmul_(first, sin)
        out.unflatten(-1, (2, -1)).movedim(-2, 0).copy_(turned)  # the halves side by side again


class TiledAttention(torch.autograd.Function):
    """Causal attention inside packed documents, as matrix products over tiles of queries.

    A tile of queries meets the keys from the start of its first document to its own end; a bias hides what lies outside
    each query's document or after it. The query heads of a group share one product with their key head, so keys
    and values are never repeated. On a CPU this is several times faster than `scaled_dot_product_attention`, whose
    kernel does not reach the rate of the matrix library.

    query (kv_heads, tokens, group, head_dim), already scaled by 1/sqrt(head_dim); key and value (kv_heads, tokens,
    head_dim) -> (tokens, kv_heads, group, head_dim). recompute: the backward pass computes the probabilities again, to
    the same bits, instead of keeping them.
    """

    @staticmethod
    def forward(ctx, query, key, value, tiles, recompute):
        kv_heads, tokens, group, head_dim = query.shape
        out = query.new_empty((tokens, kv_heads, group, head_dim))
        kept = []
        for tile in tiles:
            start, end, first_key, _ = tile
            probabilities = TiledAttention.probabilities(query, key, tile)
            attended = torch.bmm(probabilities, value[:, first_key:end])  # (kv_heads, queries · group, head_dim)
            out[start:end] = attended.view(kv_heads, end - start, group, head_dim).transpose(0, 1)
            if not recompute:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.tiles = tiles
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, *kept = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        # several tiles add to the same key, so the sums are float32
        grad_key = torch.zeros(key.shape, dtype=torch.float32)
        grad_value = torch.zeros(value.shape, dtype=torch.float32)
        for number, tile in enumerate(ctx.tiles):
            start, end, first_key, _ = tile
            probabilities = kept[number] if kept else TiledAttention.probabilities(query, key, tile)
            keys, values = key[:, first_key:end], value[:, first_key:end]
            queries = query[:, start:end].flatten(1, 2)  # (kv_heads, queries · group, head_dim)
            grad = grad_out[start:end].transpose(0, 1).reshape(queries.shape)
            grad_value[:, first_key:end] += torch.bmm(probabilities.transpose(1, 2), grad)
            grad_scores = torch.bmm(grad, values.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, grad_scores.dtype)
            grad_query[:, start:end] = torch.bmm(grad_scores, keys).view(len(key), end - start, *query.shape[2:])
            grad_key[:, first_key:end] += torch.bmm(grad_scores.transpose(1, 2), queries)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None

    @staticmethod
    def probabilities(query, key, tile):
        """Return the softmax of a tile's scores, (kv_heads, queries · group, keys)."""
        start, end, first_key, bias = tile
        scores = torch.bmm(query[:, start:end].flatten(1, 2), key[:, first_key:end].transpose(1, 2))
        # the bias (queries, 1, keys) is the same for all heads
        scores.view(len(key), end - start, -1, end - first_key).add_(bias)
        return torch.softmax(scores, dim=-1)


def attention_tiles(cu_seqlens: torch.Tensor, dtype: torch.dtype, tile: int = 128, rounding: int = 64) -> list[tuple]:
    """Return tiles (start, end, first_key, bias) that cover a stream of packed documents; see TiledAttention.

    cu_seqlens (documents + 1,): borders of the documents in the stream. Key ranges are rounded so that few
    distinct matrix shapes occur: the CPU's matrix library compiles a kernel for each.
    """
    borders = cu_seqlens.to("cpu", torch.int64)
    tokens = int(borders[-1])
    document_start = borders[:-1].repeat_interleave(borders.diff())  # (tokens,): where the token's document begins
    positions = torch.arange(tokens)
    tiles = []
    for start in range(0, tokens, tile):
        end = min(start + tile, tokens)
        first_key = int(document_start[start]) // rounding * rounding
        queries, keys = positions[start:end, None], positions[None, first_key:end]
        hidden = (keys > queries) | (keys < document_start[start:end, None])
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        tiles.append((start, end, first_key, bias.unsqueeze(1)))
    return tiles


class Permuted(torch.autograd.Function):
    """x[order // copies], where order (tokens · copies,) is a permutation and inverse is its inverse.

    For arbitrary indices autograd would add gradients up, with atomics or a sort; here they only move back.
    """

    @staticmethod
    def forward(ctx, x, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = grad[inverse]
        return grad.view(-1, ctx.copies, grad.shape[-1]).sum(dim=1) if ctx.copies > 1 else grad, None, None, None
