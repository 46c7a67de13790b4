"""The forward passes of decoding: read prompts into slots of a key/value cache, then extend every slot by one token.

`new_decoder` chooses one of two classes with the same methods. LeanDecoder computes MiniMind and Llama models in as few
and as large operations as eager torch allows; ForwardDecoder calls the forward of any model.

Shapes: rows = texts that get their next token together; tokens = new tokens of one prompt; group = heads // kv_heads.
"""

import contextlib
import math
import mmap
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.device import cpu_has_bfloat16, to_device
from model.model_minimind import rotary_tables

# Round key counts up to this, so views and masks are rebuilt per block, not per token.
KEY_BLOCK = 64
# Neighbouring slots share one product if that adds at most this many keys of padding, which cost as much as one call.
PADDING_WORTH = 256
# Up to this many rows, float16 kernels are faster than bfloat16 ones on a CPU.
FEW_ROWS = 64
# Queries of a prompt per product with their keys: bounds the memory of the scores.
QUERY_TILE = 128


def new_decoder(model: nn.Module, slots: int, capacity: int) -> "LeanDecoder | ForwardDecoder":
    """Return a decoder for `slots` texts of `capacity` tokens, with the weights as they are now: see WeightsState."""
    device = next(model.parameters()).device.type
    if device in ("cpu", "cuda") and is_llama_like(model) and not torch.is_autocast_enabled(device):
        return LeanDecoder(model, slots, capacity)
    return ForwardDecoder(model, slots, capacity)


class WeightsState:
    """Remembers a model's parameters and their versions, to see whether they were replaced or written to since.

    It holds references, so that new tensors cannot reuse the same addresses and look unchanged.
    """

    def __init__(self, model: nn.Module):
        self.parameters = list(model.parameters())
        self.versions = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters]

    def is_of(self, model: nn.Module) -> bool:
        return self.versions == WeightsState(model).versions


def is_llama_like(model: nn.Module) -> bool:
    """Tell whether LeanDecoder can run this model: ours, and Llama and Qwen3 whose rotary positions are tables."""
    name, config = type(model).__name__, model.config
    if name == "MiniMindForCausalLM":
        return True
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        name in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        and config.hidden_act == "silu"
        and not getattr(config, "use_sliding_window", False)
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
    )


class SlotCache:
    """Keys and values for the forward of any model, passed as its past_key_values. A slot holds one text.

    Positions are already rotated into the keys, so a key does not depend on its index in the cache. The first update
    allocates memory in the dtype and shape of its keys. `plan_*` sets where the next forward writes.

    keys[layer], values[layer]: (slots, kv_heads, capacity, head_dim); the caller knows how many are filled.
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def plan_prefill(self, slot: int, start: int, end: int) -> None:
        """Prepare for tokens start..end of one slot."""
        self.past = start
        self.write = lambda memory, new: memory[slot : slot + 1, :, start:end].copy_(new)
        self.read = lambda memory: memory[slot : slot + 1, :, :end]

    def plan_decode(self, slots: torch.Tensor, lengths: torch.Tensor) -> None:
        """Prepare for one token of each slot, after its `lengths` tokens."""
        end = int(lengths.max()) + 1
        self.past = end - 1
        # Without self: a cache that refers to itself is freed late.
        place = (slots[:, None], self.heads, lengths[:, None])
        self.write = lambda memory, new: memory.index_put_(place, new[:, :, 0])
        self.read = lambda memory: memory[slots, :, :end]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx == len(self.keys):
            shape = (self.slots, key.shape[1], self.capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros(shape))
            self.heads = torch.arange(key.shape[1], device=key.device)
        self.write(self.keys[layer_idx], key)
        self.write(self.values[layer_idx], value)
        return self.read(self.keys[layer_idx]), self.read(self.values[layer_idx])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return (keys after the next query_length tokens, first visible key); transformers' models call it."""
        return self.past + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past


class ForwardDecoder:
    """Decodes with the model's own forward. Works under autocast, and uses changed weights at once.

    The forward takes input_ids, attention_mask (4-D boolean, True = may look), position_ids, past_key_values and
    logits_to_keep.
    """

    def __init__(self, model: nn.Module, slots: int, capacity: int):
        self.model, self.cache = model, SlotCache(slots, capacity)
        self.device = next(model.parameters()).device

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> torch.Tensor:
        """Read ids after the slot's `start` tokens; return the next token's logits (1, vocab) in float32."""
        self.cache.plan_prefill(slot, start, start + len(ids))
        positions = torch.arange(start, start + len(ids), device=self.device).unsqueeze(0)
        return self._forward(torch.tensor([ids], device=self.device), positions, None)

    def decode_one_token(self, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Read one more token into each of these slots, which are in ascending order and hold `lengths` tokens.

        Returns the next tokens' logits (rows, vocab), float32.
        """
        positions = torch.tensor(lengths, device=self.device).unsqueeze(1)
        self.cache.plan_decode(torch.tensor(slots, device=self.device), positions.squeeze(1))
        mask = torch.arange(max(lengths) + 1, device=self.device) <= positions
        return self._forward(torch.tensor(ids, device=self.device).unsqueeze(1), positions, mask[:, None, None, :])

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Remove what a failed text left, which may not be finite."""
        for memory in self.cache.keys + self.cache.values:
            memory[slot] = 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot into another."""
        for memory in self.cache.keys + self.cache.values:
            memory[target, :, :count] = memory[source, :, :count]

    def _forward(self, input_ids, position_ids, mask) -> torch.Tensor:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].float()


# --- the lean forward ------------------------------------------------------------------------------------------------


def product(weight: torch.Tensor, bias: torch.Tensor | None = None):
    """Return a function x (rows, in) -> x weightᵀ + bias, with a constant weight (out, in) laid out to be read fast.

    On a CPU, x and the result are float32. A weight that float16 holds exactly (all of a .pth file), or that is in half
    precision anyway, is kept in float16: read in half the time, multiplied and summed in float32. Other weights stay
    float32, transposed for products with few rows. Prompts of a bfloat16 model are computed in bfloat16.
    """
    if weight.device.type != "cpu":
        return lambda x: F.linear(x, weight, bias)
    full, bias = weight.float(), None if bias is None else bias.float()
    half = weight.half()
    narrow = torch.equal(half.float(), full) or (weight.dtype != torch.float32 and bool(half.isfinite().all()))
    with contextlib.suppress(AttributeError, RuntimeError):  # this processor lacks the float16 kernels
        if narrow:
            packed = torch.ops.quantized.linear_prepack_fp16(full, bias)
            run = torch.ops.quantized.linear_dynamic_fp16.default
            run(full.new_zeros(1, full.shape[1]), packed)
            if weight.dtype == torch.bfloat16 and bias is None and cpu_has_bfloat16():
                return lambda x: run(x, packed) if len(x) <= FEW_ROWS else F.linear(x.bfloat16(), weight).float()
            return lambda x: run(x, packed)
    transposed = full.t().contiguous()
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.addmm(bias, x, transposed)


def projection(layers: Sequence[nn.Linear], order: torch.Tensor | None = None):
    """Join linear layers of the same input into one product: (rows, in) -> (rows, their outputs side by side).

    order: a permutation of the output columns. An adapter is not merged, so that the weights stay exact in float16:
    W x + B (A x) is computed as [W B] [x, A x].
    """
    weight = torch.cat([layer.weight.detach() for layer in layers])
    adapters = [getattr(layer, "lora", None) for layer in layers]
    if any(adapters):
        # Each layer's B only sees its own A's outputs; a layer without an adapter has a block of no columns.
        downs = [lora.A.weight.detach() for lora in adapters if lora]
        ups = [
            lora.B.weight.detach() * lora.scale if lora else weight.new_zeros(layer.out_features, 0)
            for layer, lora in zip(layers, adapters, strict=True)
        ]
        weight = torch.cat([weight, torch.block_diag(*ups)], dim=1)
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat(zeros).detach()
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    whole = product(weight, bias)
    if not any(adapters):
        return whole
    down = product(torch.cat(downs))
    return lambda x: whole(torch.cat((x, down(x)), dim=1))


def rms_norm(weight: torch.Tensor, eps: float):
    """Return a function x (..., size) -> x / sqrt(mean(x²) + eps) · weight; weight is (size,), or (heads, size)."""
    weight, size = weight.detach().float(), weight.shape[-1]
    if weight.is_cuda:
        if weight.dim() == 1:
            return lambda x: F.rms_norm(x.float(), (size,), weight, eps).to(x.dtype)
        return lambda x: (F.rms_norm(x.float(), (size,), eps=eps) * weight).to(x.dtype)
    # The same as x · sqrt(n) weight / sqrt(sum(x²) + n eps): three kernels, a third of F.rms_norm's time.
    scaled, offset = weight * size**0.5, torch.tensor((size * eps) ** 0.5)
    return lambda x: torch.mul(x, scaled).div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(offset))


class LeanFeedForward:
    """down(silu(gate(x)) · up(x)), with gate and up in one product."""

    def __init__(self, mlp: nn.Module):
        self.gate_up, self.down = projection([mlp.gate_proj, mlp.up_proj]), projection([mlp.down_proj])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=1)  # two (rows, intermediate)
        return self.down(F.silu(gate).mul_(up))


class LeanExperts:
    """The mixture of experts. A CPU computes the chosen experts only; a GPU all, which needs no synchronisation."""

    def __init__(self, mlp: nn.Module):
        self.router = product(mlp.gate.weight.detach())
        self.top_k, self.renormalise = mlp.gate.top_k, mlp.gate.renormalise
        self.experts = [LeanFeedForward(expert) for expert in mlp.experts]
        self.shared = [LeanFeedForward(expert) for expert in mlp.shared_experts]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # both (tokens, top_k)
        weights, chosen = self.router(x).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(x)
        for shared in self.shared:
            out += shared(x)
        if x.is_cuda and (len(x) <= QUERY_TILE or torch.cuda.is_current_stream_capturing()):  # never waits
            # (tokens, experts), zero for experts that were not chosen
            shares = torch.zeros(len(x), len(self.experts), device=x.device).scatter_(1, chosen, weights).to(x.dtype)
            for number, expert in enumerate(self.experts):
                out += expert(x) * shares[:, number : number + 1]
        elif len(x) == 1:  # of one text: a third faster than looking for rows
            for number, weight in zip(chosen[0].tolist(), weights[0].tolist(), strict=True):
                out.add_(self.experts[number](x), alpha=weight)
        else:
            for number, expert in enumerate(self.experts):
                # the tokens that chose this expert, and at which of their top_k
                rows, ranks = (chosen == number).nonzero(as_tuple=True)
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, ranks].unsqueeze(1).to(x.dtype))
        return out


class LeanLayer:
    """The constant weights of one block, as functions of activations."""

    def __init__(self, block: nn.Module, order: torch.Tensor, eps: float):
        attention = block.self_attn
        self.qkv = projection([attention.q_proj, attention.k_proj, attention.v_proj], order)
        self.head_norm = None
        if hasattr(attention, "q_norm"):  # one weight per head, its dimensions in the order of the rows
            norms = [(attention.q_norm.weight, attention.q_proj), (attention.k_norm.weight, attention.k_proj)]
            rows = torch.cat([weight.detach().repeat(layer.out_features // len(weight)) for weight, layer in norms])
            self.head_norm = rms_norm(rows[order[: len(rows)]].view(-1, attention.head_dim), eps)
        self.out = projection([attention.o_proj])
        self.attention_norm = rms_norm(block.input_layernorm.weight, eps)
        self.mlp_norm = rms_norm(block.post_attention_layernorm.weight, eps)
        self.mlp = LeanExperts(block.mlp) if hasattr(block.mlp, "experts") else LeanFeedForward(block.mlp)


class SlotGroup:
    """Rows of a step whose slots are neighbours, so that one batched product serves them all.

    keys[layer] (rows · kv_heads, head_dim, count) and values[layer] (rows · kv_heads, count, head_dim) are views of the
    cache: the first `count` keys of these slots. bias (rows · kv_heads, 1, count) is -inf beyond the end of each text.
    """

    def __init__(self, decoder: "LeanDecoder", first_slot: int, rows: slice, count: int):
        self.rows, self.kv_heads, self.dtype = rows, decoder.kv_heads, decoder.dtype
        # Queries are indexed by row · kv_heads + head, keys and values by slot · kv_heads + head. The slots are
        # neighbours, so both are contiguous, and slicing them makes views: a group copies no keys.
        self.query_rows = slice(rows.start * self.kv_heads, rows.stop * self.kv_heads)
        memory_rows = slice(first_slot * self.kv_heads, (first_slot + rows.stop - rows.start) * self.kv_heads)
        self.keys = [memory[memory_rows, :count].transpose(1, 2) for memory in decoder.keys]
        self.values = [memory[memory_rows, :count] for memory in decoder.values]
        self.positions = torch.arange(count, device=decoder.device)

    def hide(self, lengths: torch.Tensor) -> None:
        """Set the bias. lengths (all rows of the step,): tokens before the one that is read now."""
        # Position `length` is the new token's own key, which it may see; what lies behind is padding or stale.
        hidden = self.positions > lengths[self.rows].repeat_interleave(self.kv_heads).unsqueeze(1)
        bias = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        self.bias = bias.masked_fill_(hidden, -torch.inf).unsqueeze(1)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. On a CPU a page takes memory only once it is written to, because most of a cache stays empty."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class LeanDecoder:
    """MiniMind and Llama in as few and as large operations as eager torch allows.

    For a single token, calling an operation costs as much as its arithmetic. Weights are copied once into a faster
    layout (float16, half the size of a float32 model). Activations and cache are float32 on a CPU.

    Rotary positions turn pairs of dimensions. Queries and keys are laid out with each pair side by side, so that
    turning them is one complex product; attention does not depend on the order of dimensions.

    memory[layer]: (2, slots · kv_heads, capacity + 1, head_dim), keys and values, zero until they are written.
    keys[layer] and values[layer] are its halves, flat[layer] (all rows, head_dim) is a view for writing single tokens.
    """

    def __init__(self, model: nn.Module, slots: int, capacity: int):
        config = model.config
        self.device = next(model.parameters()).device
        self.slots, self.capacity = slots, capacity
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = model.model.layers[0].self_attn.head_dim
        self.scale = self.head_dim**-0.5
        self.dtype = torch.float32 if self.device.type == "cpu" else next(model.parameters()).dtype

        # Reorder each head of q and k from two halves into pairs (0, d/2), (1, d/2 + 1) ...; v stays as it is.
        rotated = (self.heads + self.kv_heads) * self.head_dim
        order = torch.arange(rotated + self.kv_heads * self.head_dim, device=self.device)
        order[:rotated] = order[:rotated].view(-1, 2, self.head_dim // 2).transpose(1, 2).flatten()
        self.layers = [LeanLayer(block, order, config.rms_norm_eps) for block in model.model.layers]
        self.embedding = model.model.embed_tokens.weight.detach()
        self.norm = rms_norm(model.model.norm.weight, config.rms_norm_eps)
        self.head = projection([model.lm_head])
        self.rotations = self._rotation_table(model)

        # One position more than the capacity: idle slots of a step on a GPU write there.
        shape = (2, slots * self.kv_heads, capacity + 1, self.head_dim)
        self.memory = [zeros(shape, self.dtype, self.device) for _ in self.layers]
        self.flat = [memory.view(-1, self.head_dim) for memory in self.memory]
        self.keys, self.values = [m[0] for m in self.memory], [m[1] for m in self.memory]
        self.groups, self.groups_of = [], None
        self.graphs, self.rows_of = {}, None
        # By default torch records all graphs of a process on one stream, that of the first device.
        self.recording_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _rotation_table(self, model: nn.Module) -> torch.Tensor:
        """Return cos + i sin of each position and pair, (capacity + 1, 1, head_dim / 2)."""
        positions = torch.arange(self.capacity + 1, device=self.device).unsqueeze(0)
        if hasattr(model.model, "rotary_emb"):
            cos, sin = model.model.rotary_emb(torch.zeros(1, device=self.device), positions)
            cos, sin = (table[..., : self.head_dim // 2] for table in (cos, sin))
        else:
            cos, sin = rotary_tables(positions, model.config)
        return torch.complex(cos[0].float(), sin[0].float()).unsqueeze(1)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Remove what a failed text left, which may not be finite."""
        for memory in self.memory:
            memory.unflatten(1, (self.slots, -1))[:, slot] = 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot into another."""
        for memory in self.memory:  # by_slot: (2, slots, kv_heads, capacity + 1, head_dim)
            by_slot = memory.unflatten(1, (self.slots, -1))
            by_slot[:, target, :, :count] = by_slot[:, source, :, :count]

    def _forward(self, ids: torch.Tensor, rotations: torch.Tensor, attend, last_only: bool = False) -> torch.Tensor:
        """Return logits (tokens, vocab), or only the last token's, of ids (tokens,).

        rotations: (tokens, 1, head_dim / 2). attend: a function of the layer's number and of qkv
        (tokens, heads + 2 kv_heads, head_dim) that returns (tokens, heads · head_dim).
        """
        hidden = F.embedding(ids, self.embedding).to(self.dtype)
        rotated = self.heads + self.kv_heads
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(hidden))
            if layer.head_norm is not None:  # q and k, each head by itself
                heads = qkv.view(len(ids), -1, self.head_dim)[:, :rotated]
                heads.copy_(layer.head_norm(heads))
            # Turn the pairs of q and k in place, as complex numbers; v is behind them.
            pairs = qkv.view(len(ids), rotated + self.kv_heads, self.head_dim // 2, 2)[:, :rotated]
            if self.dtype == torch.float32:
                torch.view_as_complex(pairs).mul_(rotations)
            else:
                pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * rotations))
            attended = attend(number, qkv.view(len(ids), rotated + self.kv_heads, self.head_dim))
            # If only the last token's logits are wanted, the last layer's other tokens are done: their keys are stored.
            if last_only and number == len(self.layers) - 1:
                hidden, attended = hidden[-1:], attended[-1:]
            hidden += layer.out(attended)
            hidden += layer.mlp(layer.mlp_norm(hidden))
        return self.head(self.norm(hidden)).float()

    # --- a prompt ----------------------------------------------------------------------------------------------------

    def prefill(self, slot: int, ids: Sequence[int], start: int) -> torch.Tensor:
        """Read ids after the slot's `start` tokens; return the next token's logits (1, vocab) in float32."""
        end = start + len(ids)
        slot_rows = slice(slot * self.kv_heads, (slot + 1) * self.kv_heads)

        def attend(number: int, qkv: torch.Tensor) -> torch.Tensor:
            query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            keys, values = self.keys[number][slot_rows], self.values[number][slot_rows]
            keys[:, start:end] = key.transpose(0, 1)
            values[:, start:end] = value.transpose(0, 1)
            query = query.unflatten(1, (self.kv_heads, -1)).transpose(0, 1)  # (kv_heads, tokens, group, head_dim)
            out = torch.empty_like(query)
            for first in range(0, len(ids), QUERY_TILE):
                tile = query[:, first : first + QUERY_TILE]
                tokens, seen = tile.shape[1], start + first + tile.shape[1]
                # Queries of a group share a key head, so (tokens · group) is one dimension: no repeated keys.
                scores = torch.bmm(tile.flatten(1, 2), keys[:, :seen].transpose(1, 2)).mul_(self.scale)
                scores = scores.unflatten(1, (tokens, -1))
                # Only keys of the tile itself can come after a query.
                later = torch.full((tokens, tokens), -torch.inf, dtype=self.dtype, device=self.device).triu_(1)
                scores[..., seen - tokens :].add_(later.unsqueeze(1))
                weights = scores.flatten(1, 2).softmax(dim=-1)
                out[:, first : first + tokens] = torch.bmm(weights, values[:, :seen]).view(tile.shape)
            return out.transpose(0, 1).reshape(len(ids), -1)

        with torch.autocast(self.device.type, enabled=False):
            tokens = to_device(ids, self.device)
            return self._forward(tokens, self.rotations[start:end], attend, last_only=True)

    # --- a token of each text ----------------------------------------------------------------------------------------

    def decode_one_token(self, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Read one more token into each of these slots, which are in ascending order and hold `lengths` tokens.

        Returns the next tokens' logits (rows, vocab), float32.
        """
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):  # graphs are recorded and replayed on the current device
                    return self._decode_all_slots(slots, ids, lengths)
            self._group(slots, lengths)
            lengths = torch.tensor(lengths, device=self.device)
            return self._decode(torch.tensor(ids, device=self.device), lengths)

    def _decode(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Decode the rows of self.groups; ids and lengths (rows,) as in decode_one_token."""
        for slot_group in self.groups:
            slot_group.hide(lengths)
        new_rows = (self.first_rows + lengths.unsqueeze(1)).flatten()
        group = self.heads // self.kv_heads

        def attend(number: int, qkv: torch.Tensor) -> torch.Tensor:
            # One write stores the new keys and values of all rows, in the order of first_rows.
            self.flat[number].index_copy_(0, new_rows, qkv[:, self.heads :].reshape(-1, self.head_dim))
            query = qkv[:, : self.heads].reshape(-1, group, self.head_dim)  # (rows · kv_heads, group, head_dim)
            parts = []
            for part in self.groups:
                own = query if len(self.groups) == 1 else query[part.query_rows]
                # bias + scale · q kᵀ, over this group's first `count` keys
                weights = torch.baddbmm(part.bias, own, part.keys[number], alpha=self.scale).softmax(dim=-1)
                parts.append(torch.bmm(weights, part.values[number]))
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
            return out.view(len(ids), -1)

        return self._forward(ids, self.rotations[lengths], attend)

    def _group(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Group neighbouring slots of similar length; keep the groups until a text outgrows its block of keys."""
        blocks = [length // KEY_BLOCK + 1 for length in lengths]  # of keys that each row needs
        if self.groups_of == (slots, blocks):
            return
        self.groups_of = (list(slots), blocks)
        self._find_first_rows(slots)
        self.groups, first = [], 0
        for row in range(1, len(slots) + 1):
            # Close the group before this row if the slots are not neighbours or it would pad the others too much.
            together = blocks[first : row + 1]
            padding = KEY_BLOCK * (max(together) * len(together) - sum(together))
            if row == len(slots) or slots[row] != slots[row - 1] + 1 or padding > PADDING_WORTH:
                count = min(max(blocks[first:row]) * KEY_BLOCK, self.capacity)
                self.groups.append(SlotGroup(self, slots[first], slice(first, row), count))
                first = row

    def _find_first_rows(self, slots: Sequence[int]) -> None:
        """Set first_rows (rows, 2 · kv_heads): the row in `flat` where each head's keys, then its values, begin."""
        # In `flat`, the keys of all slots come first, then the values of all slots.
        heads = torch.arange(self.kv_heads, device=self.device)
        heads = torch.cat((heads, heads + self.slots * self.kv_heads))
        of_slot = torch.tensor(slots, device=self.device).unsqueeze(1) * self.kv_heads
        self.first_rows = (of_slot + heads) * self.keys[0].shape[1]

    def _decode_all_slots(self, slots: Sequence[int], ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Decode on a GPU, idle slots included, so that shapes repeat and a step is one recorded CUDA graph.

        Launching the kernels one by one would take longer than running them. Each power of two of keys has a graph.
        """
        # An idle slot reads id 0 at the position beyond the capacity, which no text reaches.
        all_ids, all_lengths = [0] * self.slots, [self.capacity] * self.slots
        for slot, token, length in zip(slots, ids, lengths, strict=True):
            all_ids[slot], all_lengths[slot] = token, length
        inputs = to_device([all_ids, all_lengths], self.device)
        if not self.graphs:
            self.inputs = torch.empty_like(inputs)
            self._find_first_rows(range(self.slots))
        self.inputs.copy_(inputs)
        if self.rows_of != slots:
            self.rows_of, self.rows = list(slots), to_device(slots, self.device)
        count = min(max(256, 1 << max(lengths).bit_length()), self.capacity + 1)
        if count not in self.graphs:
            self.graphs[count] = self._record(count)
        graph, logits = self.graphs[count]
        if graph is None:
            logits = self._decode_group(count)
        else:
            graph.replay()
        return logits[self.rows]

    def _decode_group(self, count: int) -> torch.Tensor:
        self.groups = [SlotGroup(self, 0, slice(0, self.slots), count)]
        return self._decode(*self.inputs)

    def _record(self, count: int) -> tuple:
        """Return (graph, its logits), or (None, None) if recording fails."""
        if self.device.type != "cuda":
            return None, None
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a first run, not recorded, in which libraries initialise themselves
                self._decode_group(count)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the GPU meanwhile, to pin a batch for example
            with torch.cuda.graph(graph, stream=self.recording_stream, capture_error_mode="thread_local"):
                logits = self._decode_group(count)
            return graph, logits
        except RuntimeError as error:
            warnings.warn(f"decoding continues without CUDA graphs, more slowly: {error}", stacklevel=2)
            return None, None
