"""Text generation on token ids alone: `stream` gives the ids of one answer as they are made, `generate_batch` those of
many prompts. Both are the engine of model/batching.py, stepped by whoever asks for the next token.

They run on ours and on the Llama family of transformers with few calls per token, and on any other model of
transformers through its forward; see model/decoder.py.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import nn

from model.batching import Engine
from model.sampling import SamplingParams

__all__ = ["SamplingParams", "generate_batch", "stream"]


def stream(
    model: nn.Module,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    engine: Engine | None = None,
    context_length: int | None = None,
) -> Generator[int, None, None]:
    """Yields the ids of the answer to one prompt, one at a time; where a stop id ends it, that id is the last.

    An answer ends at a stop id, after params.max_new_tokens, or where prompt and answer fill context_length (by default
    and at most the model's max_position_embeddings). engine: one of this model, kept by the caller, whose slots reuse
    what they hold of an earlier turn as far as it agrees with the prompt, so that a conversation is read only once.
    Raises ValueError where the prompt leaves no room, or the logits are not finite.
    """
    params = params or SamplingParams()
    if engine is None:
        longest = min(context_length or len(prompt_ids) + params.max_new_tokens, model.config.max_position_embeddings)
        engine = Engine(model, slots=1, context_length=longest)
    request = engine.submit(prompt_ids, params, context_length=context_length)
    try:
        for token in request:
            yield token.id
    finally:  # whoever stops listening frees the slot
        request.cancel()


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 64,
    context_length: int | None = None,
) -> list[list[int]]:
    """Answers to many prompts, in their order; where a stop id ends an answer, that id is its last.

    At most batch_size are decoded together. With a seed, prompt i is answered as `stream` would with seed + i, up to
    rounding: the others do not change its draws.
    """
    params = params or SamplingParams()
    if not prompts:
        return []
    needed = max(len(ids) for ids in prompts) + params.max_new_tokens
    limit = min(context_length or needed, model.config.max_position_embeddings)
    engine = Engine(
        model, slots=min(batch_size, len(prompts)), context_length=min(needed, limit), max_queue=len(prompts)
    )
    requests = [
        engine.submit(ids, params if params.seed is None else replace(params, seed=params.seed + number))
        for number, ids in enumerate(prompts)
    ]
    return [[token.id for token in request] for request in requests]
