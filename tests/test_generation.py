"""Decoding: the cache changes nothing, greedy equals transformers' generate, sampling follows its distribution."""

import contextlib
import itertools
import unittest.mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from model.batching import Engine
from model.decoder import ForwardDecoder, LeanDecoder, new_decoder
from model.generation import SamplingParams, generate_batch, loop_length, stream
from model.model_lora import apply_lora, lora_layers
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, Router
from model.sampling import SamplingRows, choose, penalise

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
    """Equal token for token, up to the first place where the two likeliest logits lie closer than 1e-4, or, in a
    mixture of experts, the scores of an expert that is chosen and of one that is not closer than 1e-6."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            logits, gap = logits_and_routing_gap(model, prompt + theirs[:n])
            tie = abs(logits[a] - logits[b]) < 1e-4 or gap < 1e-6
            assert tie, f"token {n}: {a} instead of {b}, logits {logits[a]} and {logits[b]}, experts {gap:.1e} apart"
            return


def logits_and_routing_gap(model, ids: list[int]) -> tuple[torch.Tensor, float]:
    gaps = [1.0]

    def note(router, _, output):
        ordered = output[0].sort(descending=True).values
        gaps.append(float((ordered[:, router.top_k - 1] - ordered[:, router.top_k]).min()))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    logits = model(torch.tensor([ids])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits, min(gaps)


# --- the forward passes ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["lean", "forward", "lean float16"])
def decoder_of(request):
    """Makes a decoder of each kind; rounding the weights to float16 makes the lean one keep them so."""

    def make(model, slots=4, capacity=64):
        if request.param == "forward":
            return ForwardDecoder(model, slots, capacity)
        if request.param == "lean float16":
            for parameter in model.parameters():
                parameter.copy_(parameter.half())
        decoder = new_decoder(model, slots, capacity)
        assert isinstance(decoder, LeanDecoder)
        return decoder

    return make


@pytest.fixture(params=["dense", "moe", "adapters", "llama"])
def any_model(request):
    if request.param == "llama":
        return tiny_llama()
    model = tiny_model(use_moe=request.param == "moe")
    if request.param == "adapters":
        sharpen_adapters(apply_lora(model, rank=3, alpha=3, targets=("q_proj", "v_proj", "o_proj", "up_proj")))
    return model


def tiny_llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCAB, "num_key_value_heads": 2, "initializer_range": 0.2, **fields}
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    for name, parameter in llama.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.uniform_(0.5, 1.5)
    return llama


def sharpen_adapters(model) -> None:
    for _, layer in lora_layers(model):
        layer.lora.requires_grad_(False)
        layer.lora.B.weight.normal_(std=0.3)


def test_decoder_equals_the_models_forward(any_model, decoder_of):
    """Prompts read whole and in parts, texts of other lengths beside, slots that are neighbours or not."""
    decoder = decoder_of(any_model)
    texts = {0: random_ids(40), 1: random_ids(9, seed=2), 3: random_ids(21, seed=3)}
    read = {0: 30, 1: 2, 3: 14}
    for slot, parts in ((0, (11, 19)), (3, (14,)), (1, (1, 1))):
        start = 0
        for part in parts:
            logits = decoder.prefill(slot, texts[slot][start : start + part], start)
            start += part
            expected = any_model(torch.tensor([texts[slot][:start]])).logits[0, -1:]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    for slots in ([0, 1, 3], [0, 3], [1], [0, 1], [1, 3], [0, 1, 3], [3]):
        ids = [texts[slot][read[slot]] for slot in slots]
        logits = decoder.decode_one_token(slots, ids, [read[slot] for slot in slots])
        for row, slot in zip(logits, slots, strict=True):
            read[slot] += 1
            expected = any_model(torch.tensor([texts[slot][: read[slot]]])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=2e-5)


def test_long_texts_leave_their_block_and_their_group():
    """Lengths pass multiples of the block, and short texts beside long ones get a product of their own."""
    model = tiny_model(max_position_embeddings=1024)
    decoder = new_decoder(model, 3, 1024)
    texts = [random_ids(700, seed=1), random_ids(40, seed=2), random_ids(200, seed=3)]
    read = [610, 1, 120]
    for slot, text in enumerate(texts):
        decoder.prefill(slot, text[: read[slot]], 0)
    for _ in range(35):
        logits = decoder.decode_one_token([0, 1, 2], [t[n] for t, n in zip(texts, read, strict=True)], read)
        read = [n + 1 for n in read]
    assert len(decoder.groups) > 1
    for row, text, length in zip(logits, texts, read, strict=True):
        torch.testing.assert_close(row, model(torch.tensor([text[:length]])).logits[0, -1], atol=2e-5, rtol=2e-5)


def test_float16_weights_are_kept_only_where_they_lose_nothing(monkeypatch):
    """And a decoder without the float16 kernels is right, too."""
    ids = random_ids(20)
    model = tiny_model()
    expected = model(torch.tensor([ids])).logits[0, -1:]
    for parameter in model.parameters():
        parameter.mul_(1 + 2**-13)  # beyond float16's eleven bits
    shifted = model(torch.tensor([ids])).logits[0, -1:]
    assert (shifted - expected).abs().max() > 2e-4
    torch.testing.assert_close(new_decoder(model, 1, 32).prefill(0, ids, 0), shifted, atol=2e-5, rtol=2e-5)

    def no_kernel(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.ops.quantized, "linear_prepack_fp16", no_kernel)
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    expected = model(torch.tensor([ids])).logits[0, -1:]
    torch.testing.assert_close(new_decoder(model, 1, 32).prefill(0, ids, 0), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ],
    ids=str,
)
def test_variants_of_llama(fields):
    llama = tiny_llama(**fields)
    decoder = new_decoder(llama, 2, 64)
    assert isinstance(decoder, LeanDecoder)
    ids = random_ids(40)
    decoder.prefill(1, ids[:-1], 0)
    logits = decoder.decode_one_token([1], ids[-1:], [len(ids) - 1])
    torch.testing.assert_close(logits, llama(torch.tensor([ids])).logits[:, -1], atol=2e-5, rtol=2e-5)


def test_what_is_not_llama_goes_through_its_forward():
    dynamic = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert isinstance(new_decoder(dynamic, 1, 8), ForwardDecoder)
    assert isinstance(new_decoder(tiny_llama(hidden_act="gelu"), 1, 8), ForwardDecoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(new_decoder(tiny_model(), 1, 8), ForwardDecoder)


def test_steps_of_a_gpu_computed_on_the_cpu(any_model):
    """All slots take part, with idle ones writing where no text reaches."""
    decoder = new_decoder(any_model, 3, 40)
    text = random_ids(30)
    decoder.prefill(2, text[:20], 0)
    for length in range(20, 30):
        logits = decoder._decode_all_slots([2], [text[length]], [length])
        expected = any_model(torch.tensor([text[: length + 1]])).logits[:, -1]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    assert not any(memory[: 2 * 2, :40].any() for memory in decoder.keys)


def test_steps_of_a_gpu_follow_slots_that_change(dense):
    """Which rows are asked for is kept on the device while it stays the same, and only then."""
    decoder = new_decoder(dense, 3, 40)
    texts = [random_ids(20, seed) for seed in range(3)]
    for slot, text in enumerate(texts):
        decoder.prefill(slot, text[:10], 0)
    read, kept = [10] * 3, []
    for slots in ([0, 2], [0, 2], [1, 2], [1], [0, 1, 2], [0, 1, 2]):
        logits = decoder._decode_all_slots(slots, [texts[s][read[s]] for s in slots], [read[s] for s in slots])
        for slot in slots:
            read[slot] += 1
        expected = torch.cat([dense(torch.tensor([texts[s][: read[s]]])).logits[:, -1] for s in slots])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        kept.append(decoder.rows)
    assert [a is b for a, b in itertools.pairwise(kept)] == [True, False, False, False, True]


class Noted(contextlib.AbstractContextManager):
    """Stands for a class of torch.cuda: writes down what it is called with, and when it is entered and left."""

    def __init__(self, notes: list, name: str):
        self.notes, self.name = notes, name

    def __call__(self, *args, **kwargs) -> "Noted":
        self.notes.append((self.name, *args, kwargs) if kwargs else (self.name, *args))
        return self

    def __exit__(self, *_) -> None:
        self.notes.append(f"end of {self.name}")


def test_a_gpu_that_is_not_the_current_one_decodes_on_itself(dense, monkeypatch):
    decoder, notes = new_decoder(dense, 1, 16), []
    decoder.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device", Noted(notes, "device"))
    monkeypatch.setattr(decoder, "_decode_all_slots", lambda *_: notes.append("decodes"))
    decoder.decode_one_token([0], [5], [0])
    assert notes == [("device", torch.device("cuda", 1)), "decodes", "end of device"]


def test_graphs_are_recorded_on_a_stream_of_their_device_whatever_other_threads_do(dense, monkeypatch):
    decoder, notes = new_decoder(dense, 1, 16), []
    decoder.device, decoder.recording_stream = torch.device("cuda", 1), "its own"
    monkeypatch.setattr(decoder, "_decode_group", lambda count: notes.append("decodes"))
    monkeypatch.setattr(torch.cuda, "stream", Noted(notes, "stream"))
    monkeypatch.setattr(torch.cuda, "graph", Noted(notes, "graph"))
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, unittest.mock.Mock())
    assert decoder._record(256)[0] is torch.cuda.CUDAGraph.return_value
    how = {"stream": "its own", "capture_error_mode": "thread_local"}
    assert notes[3:] == [("graph", torch.cuda.CUDAGraph.return_value, how), "decodes", "end of graph"]


def test_interrupted_forward_leaves_the_text_as_it_was():
    """Ctrl-C between two layers: what was written is written over, and the next step is right."""
    model = tiny_model()
    ids = random_ids(10)
    decoder = new_decoder(model, 1, 16)
    decoder.prefill(0, ids[:6], 0)
    layer = decoder.layers[1]
    out, layer.out = layer.out, None
    with pytest.raises(TypeError):
        decoder.decode_one_token([0], [50], [6])
    layer.out = out
    torch.testing.assert_close(
        decoder.prefill(0, ids[6:], 6), model(torch.tensor([ids])).logits[:, -1], atol=2e-5, rtol=2e-5
    )


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
    """A Llama folder chats through the same engine, in few calls and through its forward."""
    prompts = [random_ids(n, seed=n) for n in (3, 11, 7)]
    for llama in (tiny_llama(), tiny_llama(hidden_act="gelu")):
        batch = generate_batch(llama, prompts, GREEDY)
        for prompt, answer in zip(prompts, batch, strict=True):
            theirs = transformers_generate(llama, prompt, eos_token_id=None)
            assert_same_answer(llama, prompt, list(stream(llama, prompt, GREEDY)), theirs)
            assert_same_answer(llama, prompt, answer, theirs)


# --- stream ----------------------------------------------------------------------------------------------------------


def test_stream_reuses_what_its_engine_holds(model):
    """Second turn: only the new part is read, and the answer is that of a fresh engine."""
    engine = Engine(model, slots=1)
    first = random_ids(20)
    answer = list(stream(model, first, GREEDY, engine=engine))
    for second, unread in (
        (first + answer + random_ids(6, seed=8), 7),  # the last token of an answer was never fed
        (first[:15] + random_ids(4, seed=9), 4),  # turns were dropped: the beginning still agrees
        (first, 5),  # what followed was written over in the turn before
        (first[:10], 1),  # all of it is there: the last token is read again for its logits
        (random_ids(5, seed=10), 5),
    ):
        before = engine.stats()["cached_tokens"]
        ours = list(stream(model, second, GREEDY, engine=engine))
        assert len(second) - (engine.stats()["cached_tokens"] - before) == unread
        assert_same_answer(model, second, ours, list(stream(model, second, GREEDY)))


def test_abandoned_stream_leaves_a_usable_engine(dense):
    engine = Engine(dense, slots=1)
    prompt = random_ids(20)
    answer = stream(dense, prompt, GREEDY, engine=engine)
    part = list(itertools.islice(answer, 5))
    answer.close()
    assert engine.stats()["running"] == 0 and engine.stats()["cancelled"] == 1
    following = prompt + part + random_ids(3, seed=4)
    ours = list(stream(dense, following, GREEDY, engine=engine))
    assert engine.stats()["cached_tokens"] == 24
    assert_same_answer(dense, following, ours, list(stream(dense, following, GREEDY)))


def test_answer_is_bounded_by_the_context(dense):
    prompt = random_ids(250)
    assert len(list(stream(dense, prompt, GREEDY))) == 6
    assert len(list(stream(dense, prompt[:30], GREEDY, context_length=40))) == 10
    engine = Engine(dense, slots=1, context_length=35)
    assert len(list(stream(dense, prompt[:30], GREEDY, engine=engine))) == 5
    assert len(list(stream(dense, prompt[:30], GREEDY, engine=engine, context_length=33))) == 3
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
    """bfloat16 weights, and autocast: each step's logits are those of the whole text, to bfloat16's precision."""
    ids = random_ids(30)

    def check(model):
        decoder = new_decoder(model, 1, 30)
        steps = [decoder.prefill(0, ids[:20], 0)]
        steps += [decoder.decode_one_token([0], [ids[n]], [n]) for n in range(20, 30)]
        assert steps[0].dtype == torch.float32
        whole = model(torch.tensor([ids])).logits[0, 19:].float()
        assert (torch.cat(steps) - whole).norm() < 0.02 * whole.norm()
        assert len(list(stream(model, ids, GREEDY))) == 24

    check(tiny_model().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(tiny_model())


@pytest.mark.parametrize(
    "ids, length",
    [
        ([], 0),
        ([7] * 47, 0),  # too little to tell
        ([1, 2, 3, *[7] * 48], 1),
        ([9, *[1, 2, 3] * 16], 3),
        ([1, 2, 3] * 16 + [1], 3),  # cut in the middle of the phrase
        (list(range(64)) * 4, 64),
        (list(range(64)) * 3, 0),
        (list(range(65)) * 9, 0),
        ([1, 2, 3] * 30 + [4], 0),  # it looped, and went on
        ([n * n % 91 for n in range(90)], 0),
    ],
    ids=str,
)
def test_a_loop_is_noticed(ids, length):
    assert loop_length(ids) == length


def test_no_stop_id_before_the_least_length(model):
    prompt = random_ids(10)
    free = list(stream(model, prompt, GREEDY))
    stops = tuple(free[:4])
    params = SamplingParams(temperature=0, max_new_tokens=24, stop_ids=(*stops, VOCAB + 5), min_new_tokens=6)
    text, answer = list(prompt), list(stream(model, prompt, params))
    for n, token in enumerate(answer):
        logits = model(torch.tensor([text])).logits[0, -1]
        if n < 6:
            logits[list(stops)] = -torch.inf
        assert token == int(logits.argmax()) or logits.max() - logits[token] < 1e-4
        text.append(token)
    assert len(answer) > 6 and not set(answer[:6]) & set(stops)
    # beside an answer without such a wish, whose logits stay as they are
    engine = Engine(model, slots=2)
    requests = [engine.submit(prompt, p) for p in (params, GREEDY)]
    assert [[token.id for token in request] for request in requests] == [answer, free]
    with pytest.raises(ValueError, match="--min_new_tokens is -1"):
        SamplingParams(min_new_tokens=-1)


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


def uniform(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, dtype=torch.float64, generator=generator)


def sample(logits: torch.Tensor, *params: SamplingParams, seen=None, counts=None, seed: int = 0) -> torch.Tensor:
    """One token per row of logits (rows, vocab); one set of parameters serves for all rows."""
    params = params * len(logits) if len(params) == 1 else params
    rows = SamplingRows(params)
    if rows.penalised is not None:
        none = torch.zeros(logits.shape)
        seen, counts = none.bool() if seen is None else seen, none if counts is None else counts
        logits = penalise(logits, rows, seen[rows.penalised], counts[rows.penalised])
    return choose(logits, rows, uniform(len(logits), seed))


def kept_tokens(**fields) -> set[int]:
    """Which of PROBABILITIES' tokens come at all in 3000 draws."""
    return set(sample(PROBABILITIES.log().expand(3000, -1), SamplingParams(**fields)).tolist())


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
        ({"min_p": 0.74}, {1, 3}),
        ({"min_p": 0.76}, {1}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.3}, {1, 3, 4}),
        ({"min_p": 0.2, "top_k": 3}, {1, 3, 4}),
        ({"min_p": 0.2, "top_p": 0.6}, {1, 3}),
        ({"min_p": 0.76, "temperature": 2.0}, {1, 3}),
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
    draws, logits, seen = 20_000, PROBABILITIES.log(), None
    if expected is None:  # token 1 was seen: its negative logit is doubled, its probability squared
        seen = torch.tensor([[False, True, False, False, False]]).expand(draws, -1)
        expected = torch.tensor([0.05, 0.16, 0.1, 0.3, 0.15]) / 0.76
    tokens = sample(logits.expand(draws, -1), SamplingParams(**fields), seen=seen, seed=11)
    assert_distribution(tokens, expected)


def assert_distribution(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square at 0.1 %: the critical value by the approximation of Wilson and Hilferty (1931)."""
    counts, possible = torch.bincount(tokens, minlength=len(expected)).double(), expected > 0
    assert counts[~possible].sum() == 0
    mean = len(tokens) * expected.double()
    chi_square = ((counts - mean) ** 2 / mean)[possible].sum()
    freedom = int(possible.sum()) - 1
    critical = freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < critical


def test_rows_of_other_parameters_do_not_change_a_rows_choice():
    """Sixteen sets of parameters at once: each row gets what it would alone, from its own draw."""
    fields = ({}, {"temperature": 0}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"repetition_penalty": 1.7})
    fields += ({"frequency_penalty": 0.7}, {"presence_penalty": -0.9}, {"temperature": 0.3, "top_p": 0.9, "top_k": 3})
    fields += ({"temperature": 3.0, "min_p": 0.1, "frequency_penalty": 1.1}, {"top_k": 1}, {"top_p": 1e-6})
    params = [SamplingParams(**f) for f in (*fields, *fields[2:6])]
    generator = torch.Generator().manual_seed(1)
    for round_ in range(40):
        logits = 3 * torch.randn(16, 50, generator=generator)
        counts = torch.randint(0, 3, (16, 50), generator=generator).float()
        seen = (counts > 0) | (torch.rand(16, 50, generator=generator) < 0.2)
        together = sample(logits, *params, seen=seen, counts=counts, seed=round_)
        draws = uniform(16, round_)
        for row, p in enumerate(params):
            rows = SamplingRows([p])
            own = logits[row : row + 1]
            if rows.penalised is not None:
                own = penalise(own, rows, seen[row : row + 1], counts[row : row + 1])
            assert together[row] == choose(own, rows, draws[row : row + 1])


def test_sampling_equals_transformers_warpers():
    """The tokens that stay, and their probabilities, are those of transformers' own processors in the same order."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    theirs = LogitsProcessorList(
        [TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    )
    expected = theirs(None, logits).softmax(dim=-1)[0]
    assert 3 < (expected > 0).sum() < 20
    ours = SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05)
    assert_distribution(sample(logits.expand(30_000, -1), ours, seed=5), expected)


def test_a_temperature_that_float32_takes_for_zero_is_greedy():
    logits, draws = torch.tensor([[1.0, 3.0, 2.0]] * 2), torch.tensor([[0.01], [0.99]], dtype=torch.float64)
    for others in (1e-46, 1.0):  # alone, and next to a row that is sampled
        rows = SamplingRows([SamplingParams(temperature=1e-46), SamplingParams(temperature=others)])
        assert choose(logits, rows, draws)[0] == 1


def test_penalties_by_hand():
    """A positive logit is divided, a negative one multiplied; then frequency times count and presence are taken off."""
    logits = torch.tensor([[2.0, -1.0, 1.5, -3.0]]).expand(3, -1)
    params = [
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(frequency_penalty=0.5, presence_penalty=0.25),
        SamplingParams(repetition_penalty=2.0, frequency_penalty=-1.0),
    ]
    seen = torch.tensor([[True, True, False, False]]).expand(3, -1)
    counts = torch.tensor([[3.0, 0.0, 1.0, 0.0]]).expand(3, -1)
    expected = torch.tensor([[1.0, -2.0, 1.5, -3.0], [0.25, -1.0, 0.75, -3.0], [4.0, -2.0, 2.5, -3.0]])
    torch.testing.assert_close(penalise(logits, SamplingRows(params), seen, counts), expected, rtol=0, atol=1e-6)
    only_negative = torch.tensor([[-1.0, -1.5, -9.0, -9.0]])
    greedy = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert sample(only_negative, greedy, seen=torch.tensor([[True, False, False, False]])).tolist() == [1]
    assert sample(only_negative, greedy).tolist() == [0]


def test_extreme_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 3e4, 0.0]])
    for temperature in (1e-6, 1.0, 100.0):
        assert sample(logits, SamplingParams(temperature=temperature)).tolist() == [0, 1]
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
        ({"min_p": 1.5}, "--min_p is 1.5, and must be between 0 and 1"),
        ({"presence_penalty": float("nan")}, "--presence_penalty"),
        ({"frequency_penalty": float("inf")}, "--frequency_penalty"),
        ({"logprobs": -1}, "--logprobs"),
        ({"top_p": 2, "temperature": -1}, "--temperature.*; --top_p"),
    ],
    ids=str,
)
def test_wrong_sampling_params(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)
