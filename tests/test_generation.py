"""Decoding: the cache changes nothing, greedy equals transformers' generate, sampling follows its distribution."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from model.generation import (
    KVCache,
    SamplingParams,
    decode_one_token,
    generate_batch,
    new_cache,
    new_generator,
    prefill,
    sample,
    stream,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

VOCAB = 97
GREEDY = SamplingParams(temperature=0, max_new_tokens=24, stop_ids=())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by sharing their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(**fields) -> MiniMindForCausalLM:
    """Weights larger than at the start of training, so that attention, routing and answers are not all alike."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MiniMindConfig(**{**sizes, "vocab_size": VOCAB, "max_position_embeddings": 256, **fields})
    model = MiniMindForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request):
    return tiny_model(use_moe=request.param)


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


def random_ids(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_same_answer(model, prompt: list[int], ours: list[int], theirs: list[int]):
    """Equal token for token, up to the first place where the two likeliest logits lie closer than 1e-4."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            logits = model(torch.tensor([prompt + theirs[:n]])).logits[0, -1]
            assert abs(logits[a] - logits[b]) < 1e-4, f"token {n}: {a} instead of {b}"
            return


# --- cache -----------------------------------------------------------------------------------------------------------


def test_cached_logits_equal_uncached(model):
    ids = torch.tensor([random_ids(40), random_ids(40, seed=2)])
    whole = model(ids).logits
    cache = new_cache(model, batch_size=2)
    logits = [prefill(model, ids[:, :15], cache)]
    logits += [decode_one_token(model, ids[:, n], cache) for n in range(15, 40)]
    torch.testing.assert_close(torch.stack(logits, dim=1), whole[:, 14:], atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 50, 100])
def test_chunked_prefill_equals_whole(model, chunk_size):
    ids = torch.tensor([random_ids(50)])
    whole, chunked = new_cache(model), new_cache(model)
    expected = prefill(model, ids, whole, chunk_size=1000)
    torch.testing.assert_close(prefill(model, ids, chunked, chunk_size=chunk_size), expected, atol=1e-5, rtol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(chunked.keys[layer][:, :, :50], whole.keys[layer][:, :, :50], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_left_padded_rows_equal_single_ones(model, chunk_size):
    """Also where a whole chunk of a row is padding."""
    lengths, longest = [13, 2, 9], 13
    prompts = [random_ids(n, seed=n) for n in lengths]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    cache = new_cache(model, batch_size=3, capacity=20)
    steps = [prefill(model, ids, cache, mask, chunk_size=chunk_size)]
    following = torch.tensor([random_ids(3, seed=20 + n) for n in range(4)])
    steps += [decode_one_token(model, tokens, cache) for tokens in following]
    for row, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt + following[:, row].tolist()])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack([s[row] for s in steps]), alone, atol=1e-5, rtol=1e-5)


def test_padding_elsewhere_is_refused(dense):
    for mask in ([1, 1, 0], [1, 0, 1]):
        with pytest.raises(ValueError, match="left"):
            prefill(dense, torch.tensor([[5, 6, 7]]), new_cache(dense), torch.tensor([mask]))
    cache = new_cache(dense)
    prefill(dense, torch.tensor([[5, 6, 7]]), cache)
    with pytest.raises(ValueError, match="empty cache"):
        prefill(dense, torch.tensor([[0, 7]]), cache, torch.tensor([[0, 1]]))


def test_truncated_cache_goes_on_as_if_the_rest_had_never_been(model):
    ids = torch.tensor([random_ids(30)])
    cache = new_cache(model)
    prefill(model, ids, cache)
    cache.truncate(12)
    other = torch.tensor([random_ids(8, seed=5)])
    logits = prefill(model, other, cache)
    expected = model(torch.cat([ids[:, :12], other], dim=1)).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_cache_never_moves(dense):
    """Its memory is taken once: a step neither allocates nor copies what is there."""
    cache = new_cache(dense, capacity=64)
    prefill(dense, torch.tensor([random_ids(10)]), cache)
    before = [t.data_ptr() for t in cache.keys + cache.values]
    for token in random_ids(40):
        decode_one_token(dense, torch.tensor([token]), cache)
    assert [t.data_ptr() for t in cache.keys + cache.values] == before
    assert all(t.shape == (1, 2, 64, 16) for t in cache.keys + cache.values)


def test_full_cache_says_so(dense):
    cache = new_cache(dense, capacity=4)
    with pytest.raises(ValueError, match="holds 4 tokens at most, and 5 are needed"):
        prefill(dense, torch.tensor([random_ids(5)]), cache)


def test_interrupted_forward_leaves_the_cache_as_it_was(dense):
    """Ctrl-C between two layers: what was written is forgotten, and the next step is right."""
    ids = torch.tensor([random_ids(10)])
    cache = new_cache(dense)
    prefill(dense, ids[:, :6], cache)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = dense.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode_one_token(dense, torch.tensor([50]), cache)
    hook.remove()
    assert cache.get_seq_length() == 6
    logits = prefill(dense, ids[:, 6:], cache)
    torch.testing.assert_close(logits, dense(ids).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_keep_rows(model):
    prompts = [random_ids(n, seed=n) for n in (4, 9, 6)]
    ids = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    cache = new_cache(model, batch_size=3, capacity=12)
    prefill(model, ids, cache, (ids > 0).long())
    cache.keep_rows(torch.tensor([2, 0]))
    logits = decode_one_token(model, torch.tensor([11, 12]), cache)
    for row, (prompt, token) in enumerate([(prompts[2], 11), (prompts[0], 12)]):
        expected = model(torch.tensor([[*prompt, token]])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


# --- greedy against transformers -------------------------------------------------------------------------------------


def transformers_generate(model, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0, **options
    )
    return generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_greedy_equals_transformers_generate(model, cache):
    for length in (1, 12, 40):
        prompt = random_ids(length, seed=length)
        options = {"use_cache": cache != "none"}
        if cache == "static":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=128)
        theirs = transformers_generate(model, prompt, eos_token_id=None, **options)
        assert_same_answer(model, prompt, list(stream(model, prompt, GREEDY)), theirs)


def test_greedy_stops_where_transformers_does(model):
    prompt = random_ids(10)
    free = list(stream(model, prompt, GREEDY))
    stop = free[7]
    theirs = transformers_generate(model, prompt, eos_token_id=stop)
    ours = list(stream(model, prompt, SamplingParams(temperature=0, max_new_tokens=24, stop_ids=(stop, 1))))
    assert ours == theirs and ours[-1] == stop


def test_repetition_penalty_equals_transformers(dense):
    prompt = random_ids(20)
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_ids=(), repetition_penalty=1.3)
    theirs = transformers_generate(dense, prompt, eos_token_id=None, repetition_penalty=1.3)
    ours = list(stream(dense, prompt, params))
    assert ours == theirs
    assert ours != list(stream(dense, prompt, GREEDY))


def test_left_padded_transformers_generate(model):
    """Our model under transformers' own padded batches."""
    prompts = [random_ids(n, seed=n) for n in (3, 11, 7)]
    ids = torch.tensor([[0] * (11 - len(p)) + p for p in prompts])
    out = model.generate(
        ids, attention_mask=(ids > 0).long(), do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0
    )
    for prompt, row in zip(prompts, out, strict=True):
        assert_same_answer(model, prompt, row[11:].tolist(), list(stream(model, prompt, GREEDY)))


def test_other_architectures_of_transformers():
    """A Llama folder chats through the same cache: single, chunked and padded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, initializer_range=0.2, **sizes)
    llama = LlamaForCausalLM(config).eval().requires_grad_(False)
    prompts = [random_ids(n, seed=n) for n in (3, 11, 7)]
    batch = generate_batch(llama, prompts, GREEDY)
    for prompt, answer in zip(prompts, batch, strict=True):
        theirs = transformers_generate(llama, prompt, eos_token_id=None)
        assert_same_answer(llama, prompt, list(stream(llama, prompt, GREEDY)), theirs)
        assert_same_answer(llama, prompt, answer, theirs)
    ids = torch.tensor([random_ids(30)])
    chunked = prefill(llama, ids, new_cache(llama), chunk_size=7)
    torch.testing.assert_close(chunked, llama(ids).logits[:, -1], atol=1e-5, rtol=1e-5)


# --- stream ----------------------------------------------------------------------------------------------------------


def test_stream_reuses_what_the_cache_holds(model):
    """Second turn: only the new part is read, and the answer is the one of a fresh cache."""
    cache = new_cache(model)
    first = random_ids(20)
    answer = list(stream(model, first, GREEDY, cache=cache))
    assert cache.token_ids == first + answer[:-1]
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for second, unread in (
        (first + answer + random_ids(6, seed=8), 7),  # the last token of an answer was never fed
        (first[:15] + random_ids(4, seed=9), 4),  # turns were dropped: the beginning still agrees
        (first, 5),  # what followed was written over in the turn before
        (first[:10], 1),  # all of it is there: the last token is read again for its logits
        (random_ids(5, seed=10), 5),
    ):
        read.clear()
        ours = list(stream(model, second, GREEDY, cache=cache))
        assert read[0] == unread
        assert_same_answer(model, second, ours, list(stream(model, second, GREEDY)))
    hook.remove()


def test_abandoned_stream_leaves_a_usable_cache(dense):
    cache = new_cache(dense)
    prompt = random_ids(20)
    part = list(itertools.islice(stream(dense, prompt, GREEDY, cache=cache), 5))
    following = prompt + part + random_ids(3, seed=4)
    ours = list(stream(dense, following, GREEDY, cache=cache))
    assert_same_answer(dense, following, ours, list(stream(dense, following, GREEDY)))


def test_answer_is_bounded_by_the_context(dense):
    prompt = random_ids(250)
    assert len(list(stream(dense, prompt, GREEDY))) == 6
    assert len(list(stream(dense, prompt[:30], GREEDY, context_length=40))) == 10
    assert len(list(stream(dense, prompt[:30], GREEDY, cache=new_cache(dense, capacity=35)))) == 5
    assert [len(a) for a in generate_batch(dense, [prompt, prompt[:247], prompt[:9]], GREEDY)] == [6, 9, 24]


@pytest.mark.parametrize("length", [256, 300])
def test_prompt_that_fills_the_context(dense, length):
    message = f"holds {length} tokens, and the context of 256 leaves no room.*--max_seq_len"
    for run in (lambda p: list(stream(dense, p)), lambda p: generate_batch(dense, [p])):
        with pytest.raises(ValueError, match=message):
            run(random_ids(length))
        with pytest.raises(ValueError, match="no token"):
            run([])


def test_broken_weights_say_so():
    broken = tiny_model()
    broken.model.norm.weight[0] = float("nan")
    for run in (lambda: list(stream(broken, [5])), lambda: generate_batch(broken, [[5]])):
        with pytest.raises(ValueError, match="not finite"):
            run()


def test_seed_fixes_the_answer(model):
    prompt = random_ids(10)
    params = [SamplingParams(temperature=1.5, max_new_tokens=12, stop_ids=(), seed=seed) for seed in (3, 3, 4, None)]
    first, again, other, drawn = (list(stream(model, prompt, p)) for p in params)
    assert first == again
    assert first != other
    assert drawn != list(stream(model, prompt, params[3]))


def test_bfloat16_decodes_as_it_reads():
    """bfloat16 weights and under autocast: each step's logits are those of the whole text, to bfloat16's precision."""
    half = tiny_model().bfloat16()
    ids = torch.tensor([random_ids(30)])

    def check(model):
        cache = new_cache(model)
        steps = [prefill(model, ids[:, :20], cache)]
        steps += [decode_one_token(model, ids[:, n], cache) for n in range(20, 30)]
        assert cache.keys[0].dtype == torch.bfloat16
        assert steps[0].dtype == torch.float32
        whole = model(ids).logits[0, 19:].float()
        assert (torch.cat(steps) - whole).norm() < 0.02 * whole.norm()
        assert len(list(stream(model, ids[0].tolist(), GREEDY))) == 24

    check(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(tiny_model())


# --- generate_batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batch_equals_one_by_one(model, batch_size):
    """Answers in the order of the prompts, whatever shares a batch, and with rows that end at different times."""
    prompts = [random_ids(n, seed=n) for n in (9, 3, 17, 1, 12, 5, 8, 17, 30, 2)]
    free = [list(stream(model, p, GREEDY)) for p in prompts]
    stop_ids = (free[0][3], free[2][10], free[4][0])
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_ids=stop_ids, repetition_penalty=1.1)
    alone = [list(stream(model, p, params)) for p in prompts]
    assert len({len(answer) for answer in alone}) > 1
    together = generate_batch(model, prompts, params, batch_size=batch_size)
    for prompt, ours, theirs in zip(prompts, together, alone, strict=True):
        assert_same_answer(model, prompt, ours, theirs)


def test_sampled_batch_equals_stream_with_consecutive_seeds(dense):
    prompts = [random_ids(n, seed=n) for n in (9, 3, 17, 4)]
    params = SamplingParams(temperature=1.0, max_new_tokens=10, stop_ids=(), seed=7)
    answers = generate_batch(dense, prompts, params, batch_size=3)
    for number, prompt in enumerate(prompts):
        alone = SamplingParams(temperature=1.0, max_new_tokens=10, stop_ids=(), seed=7 + number)
        assert answers[number] == list(stream(dense, prompt, alone))


def test_empty_batch(dense):
    assert generate_batch(dense, [], GREEDY) == []


# --- sample ----------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def kept_tokens(**fields) -> set[int]:
    """Which of PROBABILITIES' tokens come at all in 3000 draws."""
    logits = PROBABILITIES.log().expand(3000, -1)
    return set(sample(logits, SamplingParams(**fields), generator=new_generator(0)).tolist())


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 50}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        ({"top_p": 0.94}, {1, 2, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        # of the two likeliest, 0.4 / 0.7 = 0.57 is the first one's share
        ({"top_k": 2, "top_p": 0.56}, {1}),
        ({"top_k": 2, "top_p": 0.58}, {1, 3}),
        # temperature comes before top_p: at 0.5 the shares go by squares, 0.009, 0.561, 0.035, 0.316, 0.079
        ({"temperature": 0.5, "top_p": 0.55}, {1}),
        ({"temperature": 0.5, "top_p": 0.57}, {1, 3}),
        ({"temperature": 0.5, "top_p": 0.87}, {1, 3}),
        ({"temperature": 0.5, "top_p": 0.89}, {1, 3, 4}),
        ({"temperature": 1e-4}, {1}),
    ],
    ids=str,
)
def test_top_k_top_p_and_temperature_by_hand(fields, expected):
    assert kept_tokens(**fields) == expected


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, PROBABILITIES),
        ({"temperature": 2.0}, PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum()),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"top_k": 3}, torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85),
        ({"top_p": 0.72}, torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85),
        ({"repetition_penalty": 2.0}, None),
    ],
    ids=str,
)
def test_sampling_distribution(fields, expected):
    """Chi-square of 20,000 draws with a fixed seed, at 0.1 %."""
    draws, params = 20_000, SamplingParams(**fields)
    logits, seen = PROBABILITIES.log(), None
    if expected is None:  # token 1 was seen: its negative logit is doubled, its probability squared
        seen = torch.tensor([[False, True, False, False, False]]).expand(draws, -1)
        expected = torch.tensor([0.05, 0.16, 0.1, 0.3, 0.15]) / 0.76
    tokens = sample(logits.expand(draws, -1), params, seen, new_generator(11))
    counts, possible = torch.bincount(tokens, minlength=5).double(), expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected))[possible].sum()
    critical = {3: 13.82, 5: 18.47}[int(possible.sum())]
    assert chi_square < critical


def test_repetition_penalty_by_hand():
    """A positive logit is divided, a negative one multiplied; either way the token becomes less likely."""
    logits = torch.tensor([[2.0, -1.0, 1.5, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(logits, params, seen).tolist() == [2]  # 2.0 became 1.0, below 1.5
    only_negative = torch.tensor([[-1.0, -1.5, -9.0, -9.0]])
    assert sample(only_negative, params, torch.tensor([[True, False, False, False]])).tolist() == [1]
    assert sample(only_negative, params, None).tolist() == [0]


def test_one_generator_per_row_makes_rows_independent():
    logits = PROBABILITIES.log().expand(4, -1)
    params = SamplingParams()
    seeds = [5, 6, 7, 8]
    together = sample(logits, params, generator=[new_generator(s) for s in seeds]).tolist()
    alone = [sample(logits[:1], params, generator=new_generator(s)).item() for s in seeds]
    assert together == alone


def test_extreme_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 3e4, 0.0]])
    for temperature in (1e-6, 1.0, 100.0):
        assert sample(logits, SamplingParams(temperature=temperature), generator=new_generator(0)).tolist() == [0, 1]
    minus_infinity = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(50, -1)
    assert set(sample(minus_infinity, SamplingParams(top_p=0.9)).tolist()) == {1}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_p": 0}, "--top_p is 0, and must be above 0 and at most 1"),
        ({"top_p": 1.1}, "--top_p"),
        ({"top_k": -1}, "--top_k"),
        ({"repetition_penalty": 0}, "--repetition_penalty"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"top_p": 2, "temperature": -1}, "--temperature.*; --top_p"),
    ],
    ids=str,
)
def test_wrong_sampling_params(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_cache_takes_any_number_of_key_heads():
    cache = KVCache(num_layers=1, batch_size=2, capacity=5)
    key = torch.randn(2, 3, 4, 8)
    keys, values = cache.update(key, key + 1, 0)
    assert torch.equal(keys, key) and torch.equal(values, key + 1)
    assert cache.get_mask_sizes(1) == (5, 0)
