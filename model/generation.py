"""Text generation on token ids alone: a preallocated key/value cache, prefill, one-token decode, sampling.

`stream` gives the ids of one answer as they are made, `generate_batch` those of many prompts. Both run on any model
whose `forward` takes input_ids, attention_mask (4-D boolean, True = may look), position_ids, past_key_values and
logits_to_keep: ours, and the Llama family of transformers.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

# Positions per forward of a long prompt: bounds the memory of scores and masks, and is long enough for full speed.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    temperature: 0 = greedy.
    top_k: only the k likeliest tokens, 0 = all.
    top_p: only the likeliest tokens that together reach this probability, 1 = all.
    repetition_penalty: > 1 makes tokens of prompt and answer less likely to come again (arXiv:1909.05858, section 4.1).
    max_new_tokens: an answer also ends where the context does.
    stop_ids: ids that end an answer.
    seed: None draws another one each time.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop_ids: tuple[int, ...] = (2,)
    seed: int | None = None

    def __post_init__(self):
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
        )
        wrong = [f"--{name} is {value}, and must be {rule}" for name, value, good, rule in checks if not good]
        if wrong:
            raise ValueError("; ".join(wrong))


class KVCache:
    """Keys and values of all layers in memory that is allocated once; a step writes its tokens and copies nothing else.

    Rows share one length. Shorter rows are padded on the left: `set_padding` hides those slots from all later queries.
    Memory is taken at the first update, in the dtype and shape of the keys that arrive, so that autocast and any number
    of key heads work. Positions are rotated into the keys beforehand: a slot does not depend on its place in the cache.

    keys[layer], values[layer]: (batch, kv_heads, capacity, head_dim), of which the first `length` slots are filled.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int):
        self.num_layers, self.batch_size, self.capacity = num_layers, batch_size, capacity
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.length = 0
        self.padding: torch.Tensor | None = None  # (batch,) padded slots at the beginning of each row
        self.visible: torch.Tensor | None = None  # (batch, 1, 1, capacity) bool, False on padding
        self.token_ids: list[int] = []  # the ids behind the slots; kept by `stream` to reuse them in the next turn

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (batch, kv_heads, tokens, head_dim) behind what is there; returns views of all keys and all values."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens at most, and {end} are needed; raise its capacity"
            )
        if layer_idx == len(self.keys):
            self.keys.append(key.new_empty(key.shape[0], key.shape[1], self.capacity, key.shape[3]))
            self.values.append(value.new_empty(value.shape[0], value.shape[1], self.capacity, value.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if layer_idx == self.num_layers - 1:  # a forward that is interrupted leaves the cache as it was
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys after the next query_length tokens, first visible key); transformers' models ask for it."""
        return self.length + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        self.length = min(self.length, length)
        del self.token_ids[length:]

    def set_padding(self, attention_mask: torch.Tensor) -> None:
        """attention_mask (batch, tokens): 0 on the padding, which must stand to the left of the tokens, 1 elsewhere."""
        padding = (attention_mask == 0).sum(dim=1)
        slots = torch.arange(self.capacity, device=attention_mask.device)
        visible = slots >= padding.unsqueeze(1)
        if not torch.equal(visible[:, : attention_mask.shape[1]], attention_mask.bool()):
            raise ValueError("attention_mask must hold zeros (padding) to the left of the ones only")
        if bool(padding.any()):
            self.padding, self.visible = padding, visible[:, None, None, :]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keeps the rows of these indices, in this order, and frees the others."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            smaller = tensor.new_empty(len(rows), *tensor.shape[1:])
            smaller[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, rows)
            return smaller

        self.keys, self.values = [kept(t) for t in self.keys], [kept(t) for t in self.values]
        self.batch_size = len(rows)
        if self.padding is not None:
            self.padding, self.visible = self.padding[rows], self.visible[rows]


def new_cache(model: nn.Module, batch_size: int = 1, capacity: int | None = None) -> KVCache:
    """A cache for this model; capacity in tokens, by default the model's whole context."""
    return KVCache(model.config.num_hidden_layers, batch_size, capacity or model.config.max_position_embeddings)


@torch.inference_mode()
def prefill(
    model: nn.Module,
    input_ids: torch.Tensor,
    cache: KVCache,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int = PREFILL_CHUNK,
) -> torch.Tensor:
    """Reads a prompt into the cache, behind what the cache already holds.

    input_ids (batch, tokens); attention_mask (batch, tokens), 0 on left padding, only into an empty cache.
    Returns the logits of the last position, (batch, vocab), in float32.
    """
    if attention_mask is not None:
        if cache.length:
            raise ValueError("padding can only stand at the beginning: give attention_mask with an empty cache")
        cache.set_padding(attention_mask)
    for chunk in input_ids.split(chunk_size, dim=1):
        logits = _forward(model, chunk, cache)
    return logits


@torch.inference_mode()
def decode_one_token(model: nn.Module, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Feeds one token per row, (batch,), and returns the logits of the next one, (batch, vocab), in float32."""
    return _forward(model, tokens.unsqueeze(1), cache)


def _forward(model: nn.Module, input_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    queries, past = input_ids.shape[1], cache.length
    mask = position_ids = None
    if cache.padding is not None:
        steps = torch.arange(past, past + queries, device=input_ids.device)
        position_ids = (steps - cache.padding.unsqueeze(1)).clamp(min=0)
        mask = cache.visible[..., : past + queries]
        if queries > 1:
            keys = torch.arange(past + queries, device=input_ids.device)
            # a padding query sees itself, or its softmax would be over nothing
            mask = mask & (keys <= steps.unsqueeze(1)) | (keys == steps.unsqueeze(1))
    outputs = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return outputs.logits[:, -1].float()


@torch.inference_mode()
def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    seen: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Chooses one token per row: logits (batch, vocab) float32 -> ids (batch,).

    seen (batch, vocab) bool: tokens that repetition_penalty applies to. generator: one for all rows, or one for each;
    on the CPU, so that a seed means the same draws on every device. Order: penalty, temperature, top_k, top_p.
    """
    if seen is not None and params.repetition_penalty != 1:
        # dividing a negative logit would make it more likely
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        return logits.argmax(dim=-1)

    # from the largest logit down, so that a tiny temperature cannot overflow
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    vocab_ids = None
    if 0 < params.top_k < logits.shape[-1]:
        logits, vocab_ids = logits.topk(params.top_k, dim=-1)
    elif params.top_p < 1:
        logits, vocab_ids = logits.sort(dim=-1, descending=True)
    probabilities = logits.softmax(dim=-1)
    if params.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        # the likeliest has nothing before it, so it always stays
        probabilities = probabilities.masked_fill(before >= params.top_p, 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)
    draws = _uniform(logits.shape[0], generator).to(logits.device) * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, draws, right=True).clamp(max=logits.shape[-1] - 1)
    return (choice if vocab_ids is None else vocab_ids.gather(1, choice)).squeeze(1)


def _uniform(batch: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    """(batch, 1) float64 in [0, 1)."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(batch, 1, dtype=torch.float64, generator=generator)
    return torch.stack([torch.rand(1, dtype=torch.float64, generator=row) for row in generator])


def new_generator(seed: int | None) -> torch.Generator:
    """A random generator on the CPU; without a seed, one that differs each time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def check_prompt(prompt_ids: Sequence[int], context_length: int) -> None:
    if not len(prompt_ids):
        raise ValueError("the prompt holds no token; generation needs at least one, such as bos")
    if len(prompt_ids) >= context_length:
        raise ValueError(
            f"the prompt holds {len(prompt_ids)} tokens, and the context of {context_length} leaves no room for an "
            "answer; shorten the prompt or raise --max_seq_len"
        )


def _context_length(model: nn.Module, context_length: int | None) -> int:
    longest = model.config.max_position_embeddings
    return longest if context_length is None else min(context_length, longest)


def _seen_tokens(prompts: Sequence[Sequence[int]], logits: torch.Tensor, params: SamplingParams) -> torch.Tensor | None:
    if params.repetition_penalty == 1:
        return None
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        seen[row, torch.tensor(ids, device=logits.device)] = True
    return seen


def check_logits(logits: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite: the weights are broken, or --dtype float16 is too narrow for them")


@torch.inference_mode()
def stream(
    model: nn.Module,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    cache: KVCache | None = None,
    context_length: int | None = None,
) -> Generator[int, None, None]:
    """Yields the ids of the answer to one prompt, one at a time; where a stop id ends it, that id is the last.

    An answer ends at a stop id, after params.max_new_tokens, or where prompt and answer fill context_length (by default
    and at most the model's max_position_embeddings). cache: what it holds from an earlier turn is reused as far as it
    agrees with the prompt, so that a conversation is read only once. Raises ValueError where the prompt leaves no room,
    or the logits are not finite.
    """
    params = params or SamplingParams()
    context_length = _context_length(model, context_length)
    if cache is not None:
        context_length = min(context_length, cache.capacity)
    check_prompt(prompt_ids, context_length)
    room = min(params.max_new_tokens, context_length - len(prompt_ids))
    cache = cache or new_cache(model, capacity=len(prompt_ids) + room)
    device = next(model.parameters()).device
    generator = new_generator(params.seed) if params.temperature > 0 else None

    prompt_ids = [int(i) for i in prompt_ids]
    # the last token of the prompt is read in any case: its logits are what the answer begins with
    cache.truncate(min(_common_prefix(cache.token_ids, prompt_ids), len(prompt_ids) - 1))
    unread = prompt_ids[cache.length :]
    logits = prefill(model, torch.tensor([unread], device=device), cache)
    cache.token_ids += unread
    check_logits(logits)
    seen = _seen_tokens([prompt_ids], logits, params)
    while True:
        token = sample(logits, params, seen, generator)
        token_id = int(token)
        yield token_id
        room -= 1
        if room == 0 or token_id in params.stop_ids:
            return
        if seen is not None:
            seen[0, token_id] = True
        logits = decode_one_token(model, token, cache)
        cache.token_ids.append(token_id)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for n, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return n
    return min(len(first), len(second))


@torch.inference_mode()
def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 64,
    context_length: int | None = None,
) -> list[list[int]]:
    """Answers to many prompts, in their order; where a stop id ends an answer, that id is its last.

    Prompts of similar length are decoded together, padded on the left, at most batch_size at once. With a seed, prompt
    i is answered as `stream` would with seed + i, up to rounding: the others do not change its draws.
    """
    params = params or SamplingParams()
    context_length = _context_length(model, context_length)
    for ids in prompts:
        check_prompt(ids, context_length)
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        together = _generate_together(model, [prompts[i] for i in chosen], chosen, params, context_length)
        for i, answer in zip(chosen, together, strict=True):
            answers[i] = answer
    return answers


def _generate_together(
    model: nn.Module,
    prompts: list[Sequence[int]],
    numbers: list[int],
    params: SamplingParams,
    context_length: int,
) -> list[list[int]]:
    """One left-padded batch; rows that are done leave it when they are half of it."""
    device = next(model.parameters()).device
    longest = max(len(ids) for ids in prompts)
    room = [min(params.max_new_tokens, context_length - len(ids)) for ids in prompts]
    padded = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        padded[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    cache = new_cache(model, len(prompts), longest + max(room))
    logits = prefill(model, padded.to(device), cache, mask.to(device))
    check_logits(logits)
    seen = _seen_tokens(prompts, logits, params)
    generators = None
    if params.temperature > 0:
        generators = [new_generator(None if params.seed is None else params.seed + number) for number in numbers]

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # rows[i]: whose answer the i-th row of the batch is; None once that is complete
    while True:
        tokens = sample(logits, params, seen, generators)
        for i, token_id in enumerate(tokens.tolist()):
            row = rows[i]
            if row is None:
                continue
            answers[row].append(token_id)
            if token_id in params.stop_ids or len(answers[row]) == room[row]:
                rows[i] = None
        alive = [i for i, row in enumerate(rows) if row is not None]
        if not alive:
            return answers
        if seen is not None:
            seen.scatter_(1, tokens.unsqueeze(1), True)
        if 2 * len(alive) <= len(rows):
            kept = torch.tensor(alive, device=device)
            cache.keep_rows(kept)
            tokens, rows = tokens[kept], [rows[i] for i in alive]
            seen = None if seen is None else seen[kept]
            generators = None if generators is None else [generators[i] for i in alive]
        logits = decode_one_token(model, tokens, cache)
