"""The decoding engine, from token ids to token ids. Start here.

                        model/batching.py: Engine                     model/decoder.py
    stream()  ──┐     ┌──────────────────────────┐          ┌───────────────────────────────────┐
    server    ──┼────>│ queue    r7, r8          │  step()  │ prefill: a part of one prompt     │
    page      ──┘ sub-│ slot 0   r5, answering   │─────────>│ decode_one_token: one more token  │
       ^          mit │ slot 1   r6, in prompt   │          │   of every answering slot         │
       │              │ slot 2   free            │          │ cache: keys and values, by slot   │
       │              └──────────────────────────┘          └───────────────────────────────────┘
       │                            ^                                        │ logits (rows, vocab)
       └───────── tokens ───────────┴──────── choose(), model/sampling.py <──┘

A request waits until a slot of the cache is free. Each step of the engine reads up to 512 tokens of a waiting prompt
(128 if other answers are running) and makes one more token of every running answer; `choose` picks each token by its
request's own parameters. A request ends at a stop id, at its maximum length, when the context is full, or when it is
cancelled. Its slot keeps the text: the next request that begins with the same ids reads only the rest, so a
conversation is read once. The functions below step the engine themselves; the server and the page let a thread do it.

`stream` yields the ids of one answer as they are made; `generate_batch` answers many prompts. Stop strings and thoughts
are found in the text of these ids: dataset/text_stream.py.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import nn

from model.batching import Engine
from model.sampling import SamplingParams

__all__ = ["SamplingParams", "generate_batch", "loop_length", "stream"]


def stream(
    model: nn.Module,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    engine: Engine | None = None,
    context_length: int | None = None,
) -> Generator[int, None, None]:
    """Yield the ids of the answer to one prompt; a stop id that ends it is the last.

    An answer ends at a stop id, after params.max_new_tokens, or where prompt and answer fill context_length (by default
    and at most the model's max_position_embeddings). engine: one of this model that the caller keeps, so that each turn
    of a conversation reads only what is new. Raises ValueError if the prompt leaves no room or logits are not finite.
    """
    params = params or SamplingParams()
    if engine is None:
        longest = min(context_length or len(prompt_ids) + params.max_new_tokens, model.config.max_position_embeddings)
        engine = Engine(model, slots=1, context_length=longest)
    request = engine.submit(prompt_ids, params, context_length=context_length)
    try:
        for token in request:
            yield token.id
    finally:  # a caller that stops listening frees the slot
        request.cancel()


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    *,
    batch_size: int = 64,
    context_length: int | None = None,
) -> list[list[int]]:
    """Return the answers to many prompts, in their order; a stop id that ends an answer is its last.

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


def loop_length(ids: Sequence[int], least: int = 48, repeats: int = 4, longest: int = 64) -> int:
    """Return the length in tokens of the phrase that an answer ends in repeating, or 0 if it does not loop.

    The end loops if its last `least` tokens or more are at least `repeats` copies of one phrase of up to `longest`.
    """
    for length in range(1, longest + 1):
        tail = ids[-max(least, repeats * length) :]
        if len(tail) >= max(least, repeats * length) and tail[length:] == tail[:-length]:
            return length
    return 0
