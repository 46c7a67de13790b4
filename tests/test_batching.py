"""Many requests at once: each answer is what it would be alone, and what one request does or suffers is its own."""

import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from test_generation import VOCAB, assert_same_answer, random_ids, sharpen_adapters, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from model import batching, decoder
from model.batching import Engine, QueueFull, Token
from model.generation import SamplingParams, stream
from model.model_lora import apply_lora, remove_lora

GREEDY = SamplingParams(temperature=0, max_new_tokens=12, stop_ids=())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by sharing their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "moe"])
def model(request):
    return tiny_model(use_moe=request.param)


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


def ids_of(request) -> list[int]:
    return [token.id for token in request]


def run_to_end(engine: Engine) -> None:
    while engine.step():
        pass


# --- greedy, beside transformers -------------------------------------------------------------------------------------


def different_answers(model, engine: Engine, prompts: list[list[int]], new_tokens: int) -> int:
    """How many prompts are not answered exactly as by transformers' generate, alone in the engine or while 15 others
    run beside; each of them for a tie closer than 1e-4."""
    params = SamplingParams(temperature=0, max_new_tokens=new_tokens, stop_ids=())
    ties, theirs = 0, []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
        theirs.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    beside = [engine.submit(prompt, params) for prompt in prompts]
    run_to_end(engine)
    for answers in (beside, (engine.submit(prompt, params) for prompt in prompts)):
        for prompt, answer, expected in zip(prompts, answers, theirs, strict=True):
            ours = ids_of(answer)
            assert_same_answer(model, prompt, ours, expected)
            ties += ours != expected
    return ties


def test_50_greedy_answers_equal_transformers_alone_and_beside_15_others(model):
    prompts = [random_ids(1 + 7 * n % 60, seed=100 + n) for n in range(50)]
    assert different_answers(model, Engine(model, slots=16, context_length=128), prompts, 16) <= 2


@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_50_greedy_answers_of_the_preset_equal_transformers(use_moe):
    """The 26M preset (and as a mixture of experts), weights as a .pth holds them."""
    preset = tiny_model(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, vocab_size=6400, use_moe=use_moe)
    for parameter in preset.parameters():
        parameter.copy_(parameter.half())
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 6400, (1 + 5 * n % 90,), generator=generator).tolist() for n in range(50)]
    assert different_answers(preset, Engine(preset, slots=16), prompts, 32) <= 5


# --- sampling --------------------------------------------------------------------------------------------------------


def various_params() -> list[SamplingParams]:
    common = {"max_new_tokens": 20, "stop_ids": (7,)}
    return [
        SamplingParams(seed=1, **common),
        SamplingParams(seed=2, temperature=0.7, top_p=0.8, **common),
        SamplingParams(seed=3, temperature=2.0, top_k=10, min_p=0.05, **common),
        SamplingParams(seed=4, repetition_penalty=1.5, **common),
        SamplingParams(seed=5, frequency_penalty=0.8, presence_penalty=0.4, logprobs=2, **common),
        SamplingParams(seed=6, temperature=0, **common),
    ]


def test_same_seed_gives_the_same_text_whatever_else_runs(model):
    """Requests come in another order, at other times, beside others, in another number of slots."""
    params, prompts = various_params(), [random_ids(5 + 9 * n, seed=n) for n in range(6)]
    alone = [ids_of(Engine(model, slots=1).submit(prompt, p)) for prompt, p in zip(prompts, params, strict=True)]
    for slots, pause in ((16, 0), (16, 3), (2, 1)):
        engine = Engine(model, slots=slots, context_length=200)
        for n in range(4):
            engine.submit(random_ids(30, seed=50 + n), SamplingParams(max_new_tokens=5 + 9 * n, stop_ids=()))
        requests = {}
        for n in (3, 0, 5, 1, 4, 2):
            requests[n] = engine.submit(prompts[n], params[n])
            for _ in range(pause):
                engine.step()
        assert [ids_of(requests[n]) for n in range(6)] == alone


def test_answers_follow_the_models_distribution(dense):
    """Chi-square of the first token of 4,000 requests with seeds 0, 1, 2 ... against the model's own probabilities."""
    prompt = random_ids(6)
    expected = (dense(torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(dim=-1).double()
    engine = Engine(dense, slots=64, context_length=16, max_queue=4000)
    requests = [
        engine.submit(prompt, SamplingParams(temperature=0.8, max_new_tokens=1, stop_ids=(), seed=seed))
        for seed in range(4000)
    ]
    counts = torch.bincount(torch.tensor([ids_of(r)[0] for r in requests]), minlength=VOCAB).double()
    frequent = expected * 4000 >= 5  # the rest is one class: chi-square needs some of each
    observed = torch.cat([counts[frequent], counts[~frequent].sum().unsqueeze(0)])
    mean = 4000 * torch.cat([expected[frequent], expected[~frequent].sum().unsqueeze(0)])
    freedom = len(mean) - 1
    assert freedom > 20
    critical = freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3  # 0.1 %
    assert ((observed - mean) ** 2 / mean).sum() < critical


def test_penalties_count_prompt_and_answer_as_they_should(dense):
    """Greedy by hand: repetition goes by prompt and answer, presence and frequency by the answer alone."""
    prompt = random_ids(8)
    params = SamplingParams(
        temperature=0,
        max_new_tokens=25,
        stop_ids=(),
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.9,
    )
    text = list(prompt)
    for _ in range(25):
        logits = dense(torch.tensor([text])).logits[0, -1].tolist()
        for token in range(VOCAB):
            if token in text:
                logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
            count = text[len(prompt) :].count(token)
            logits[token] -= 0.9 * count + 2.0 * (count > 0)
        text.append(max(range(VOCAB), key=logits.__getitem__))
    engine = Engine(dense, slots=3)
    engine.submit(random_ids(9, seed=4), SamplingParams(max_new_tokens=30, stop_ids=()))
    engine.submit(random_ids(5, seed=6), params)
    for _ in range(2):  # the second time in a slot that has counted before
        assert ids_of(engine.submit(prompt, params)) == text[len(prompt) :]
    assert ids_of(engine.submit(prompt, SamplingParams(temperature=0, max_new_tokens=25, stop_ids=()))) != text[8:]


def test_log_probs_are_those_of_the_raw_logits(dense):
    """Whatever temperature and penalties chose the token, and only for who asks."""
    prompt = random_ids(9)
    fields = {"temperature": 1.7, "top_k": 40, "frequency_penalty": 1.0, "max_new_tokens": 6, "stop_ids": (), "seed": 3}
    engine = Engine(dense, slots=3)
    requests = [engine.submit(prompt, SamplingParams(**fields, logprobs=k)) for k in (5, None, 0)]
    five, none, zero = (list(request) for request in requests)
    assert [t.id for t in five] == [t.id for t in none] == [t.id for t in zero]
    assert all(token == Token(token.id, None, None) for token in none)
    assert all(token.top == [] for token in zero)
    text = list(prompt)
    for token, same in zip(five, zero, strict=True):
        expected = dense(torch.tensor([text])).logits[0, -1].log_softmax(dim=-1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
        assert same.logprob == pytest.approx(token.logprob, abs=1e-5)
        values, ids = expected.topk(5)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-5)
        text.append(token.id)


# --- ends ------------------------------------------------------------------------------------------------------------


class Words(TorchDispatchMode):
    """How often a number is read from a tensor, which waits for a GPU, except with tolist: bool, item, int, ..."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_hears_from_the_device_once(dense, monkeypatch):
    engine = Engine(dense, slots=8)
    params = [replace(p, logprobs=None, stop_ids=()) for p in various_params()]
    requests = [engine.submit(random_ids(8, n), p) for n, p in enumerate(params)]
    while any(request._next_id is None for request in requests):
        engine.step()
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with Words() as words:
        bool(torch.ones(1))
        for _ in range(3):
            engine.step()
    assert words.count == 1, "none but that of this test"
    assert len(lists) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_do_not_change_the_choice_of_others(dense, value):
    engine = Engine(dense, slots=6)
    requests = [engine.submit(random_ids(8, n), replace(p, stop_ids=())) for n, p in enumerate(various_params())]
    while any(request._next_id is None for request in requests):
        engine.step()
    logits = torch.randn(len(requests), VOCAB, generator=torch.Generator().manual_seed(0))
    states = [request._random.getstate() for request in requests]

    def choose(logits: torch.Tensor) -> list:
        for request, state in zip(requests, states, strict=True):
            request._random.setstate(state)
        return engine._choose(requests, logits)

    expected = choose(logits)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        broken = logits.clone()
        broken[rows, 3:70] = value
        chosen = choose(broken)
        assert all(isinstance(token, ValueError) for token in chosen[rows])
        chosen[rows] = expected[rows]
        assert chosen == expected


def test_finish_reasons(dense):
    engine = Engine(dense, slots=2, context_length=40)
    prompt = random_ids(10)
    free = ids_of(engine.submit(prompt, GREEDY))
    stopped = engine.submit(prompt, SamplingParams(temperature=0, max_new_tokens=12, stop_ids=(free[4], VOCAB + 5)))
    assert ids_of(stopped) == free[: free.index(free[4]) + 1] and stopped.finish_reason == "stop"
    assert engine.submit(prompt, GREEDY).finish_reason is None
    run_to_end(engine)
    full = engine.submit(random_ids(35), GREEDY)
    assert len(ids_of(full)) == 5 and full.finish_reason == "length"


def test_wrong_prompts_are_refused_before_they_wait(dense):
    engine = Engine(dense, slots=1, context_length=20)
    for prompt, message in (
        ([], "no token"),
        (random_ids(20), "holds 20 tokens, and the context of 20 leaves no room"),
        ([5, VOCAB], "outside the vocabulary"),
        ([5, -1], "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, GREEDY)
    assert engine.stats()["requests"] == 0


def test_cancel_frees_the_slot_at_once(dense):
    """An answer under way, a prompt that is being read, and one in line; what waits gets the slot in the next step."""
    engine = Engine(dense, slots=2, context_length=256)
    long = SamplingParams(max_new_tokens=100, stop_ids=())
    answering = engine.submit(random_ids(4), long)
    engine.step()
    reading = engine.submit(random_ids(250), long)
    engine.step()
    waiting, last = engine.submit(random_ids(3), long), engine.submit(random_ids(3), long)
    assert len(answering.take()[0]) == 2 and reading.take() == ([], None) and engine.stats()["running"] == 2
    waiting.cancel()
    assert engine.stats()["waiting"] == 1
    for request in (answering, reading):
        request.cancel()
        assert request.finish_reason == "cancelled" and list(request) == []
    assert (engine.stats()["running"], engine.stats()["cancelled"]) == (0, 3)
    engine.step()
    assert len(last.take()[0]) == 1
    last.cancel()
    last.cancel()
    assert engine.stats()["cancelled"] == 4 and not engine.step()


def test_cancel_inside_the_forward_pass(dense, monkeypatch):
    """The token that was being made is dropped, and what the slot holds stays true."""
    engine = Engine(dense, slots=2)
    request, other = engine.submit(random_ids(5), GREEDY), engine.submit(random_ids(9), GREEDY)
    engine.step()
    original = engine._decoder.decode_one_token

    def cancelling(*arguments):
        request.cancel()
        return original(*arguments)

    monkeypatch.setattr(engine._decoder, "decode_one_token", cancelling)
    assert len(list(request)) == 1 and engine.stats()["generated_tokens"] == 3
    assert ids_of(other) == list(stream(dense, random_ids(9), GREEDY))
    again = engine.submit([*random_ids(5), 60, 61], GREEDY)
    assert ids_of(again) == list(stream(dense, [*random_ids(5), 60, 61], GREEDY)) and again.cached_tokens == 5


def test_cancel_from_the_listener(dense):
    """Inside the step that makes the token; nothing comes after it."""
    engine = Engine(dense, slots=2)
    others = engine.submit(random_ids(9), GREEDY)
    requests = []
    request = engine.submit(random_ids(5), GREEDY, notify=lambda: requests[0].cancel())
    requests.append(request)
    assert len(list(request)) == 1 and request.finish_reason == "cancelled"
    assert ids_of(others) == list(stream(dense, random_ids(9), GREEDY))


def test_queue_is_bounded(dense):
    engine = Engine(dense, slots=2, max_queue=3)
    requests = [engine.submit(random_ids(3), GREEDY) for _ in range(5)]
    for _ in range(2):
        with pytest.raises(QueueFull, match="waiting already") as refused:
            engine.submit(random_ids(3), GREEDY)
        assert refused.value.retry_after >= 1
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit(random_ids(3), GREEDY)
    requests[4].cancel()
    engine.submit(random_ids(3), GREEDY)
    run_to_end(engine)
    assert engine.stats() == {
        "slots": 2,
        "running": 0,
        "waiting": 0,
        "requests": 6,
        "cancelled": 1,
        "prompt_tokens": 18,
        "cached_tokens": engine.stats()["cached_tokens"],
        "generated_tokens": 60,
    }


def test_a_seed_below_zero_is_another_than_its_opposite(dense):
    engine = Engine(dense, slots=4)
    params = [SamplingParams(temperature=1.5, max_new_tokens=20, stop_ids=(), seed=seed) for seed in (-1, -1, 0, 1)]
    first, again, zero, opposite = [ids_of(engine.submit(random_ids(5), each)) for each in params]
    assert first == again and len({*map(tuple, (first, zero, opposite))}) == 3


# --- what slots hold -------------------------------------------------------------------------------------------------


def test_a_conversation_finds_its_slot_again(model):
    """Turns of two conversations between each other: each reads only what is new, and answers as if it read all."""
    engine = Engine(model, slots=3)
    texts = [random_ids(20, seed=1), random_ids(30, seed=2)]
    for turn in range(3):
        for number, text in enumerate(texts):
            request = engine.submit(text, GREEDY)
            answer = ids_of(request)
            # the last token of an answer is never read, so what can be there is the text up to the one before
            assert request.cached_tokens == (0 if turn == 0 else len(text) - 6)
            assert_same_answer(model, text, answer, list(stream(model, text, GREEDY)))
            texts[number] = text + answer + random_ids(5, seed=10 * turn + number)


def test_a_beginning_that_many_share_is_read_once(model):
    """Also while the first one still runs, and without taking its slot or that of a longer conversation."""
    engine = Engine(model, slots=4)
    system = random_ids(40)
    first = engine.submit(system + [50, 51], SamplingParams(temperature=0, max_new_tokens=30, stop_ids=()))
    engine.step()
    second = engine.submit(system + [60], GREEDY)
    answer = ids_of(second)
    assert second.cached_tokens == 40
    assert_same_answer(model, system + [60], answer, list(stream(model, system + [60], GREEDY)))
    expected = list(stream(model, system + [50, 51], first.params))
    assert_same_answer(model, system + [50, 51], ids_of(first), expected)
    third = engine.submit(system[:10] + [70], GREEDY)
    ids_of(third)
    assert third.cached_tokens == 10
    again = engine.submit(system + [60] + answer, GREEDY)
    ids_of(again)
    assert again.prompt_tokens - again.cached_tokens == 1


def test_requests_that_come_together_read_their_common_prompt_once(model):
    """As the answers of a GRPO group do."""
    engine, prompt = Engine(model, slots=4), random_ids(40)
    requests = [engine.submit(prompt, GREEDY) for _ in range(4)]
    answers = [ids_of(request) for request in requests]
    assert [request.cached_tokens for request in requests] == [0, 39, 39, 39]
    assert engine.stats()["cached_tokens"] == 3 * 39
    for answer in answers:
        assert_same_answer(model, prompt, answer, list(stream(model, prompt, GREEDY)))


def test_a_common_prompt_that_cannot_be_taken_over_ends_only_the_request_that_wanted_it(model, monkeypatch):
    """Each request is made ready when it is admitted, the second one again once the first has read their prompt."""
    engine, prompt = Engine(model, slots=3), random_ids(40)
    other = engine.submit(prompt[20:25], GREEDY)
    first, second = (engine.submit(prompt, GREEDY) for _ in range(2))
    monkeypatch.setattr(engine, "_make_ready", fails_after(3, engine._make_ready))
    for request, ids in ((other, prompt[20:25]), (first, prompt)):
        assert_same_answer(model, ids, ids_of(request), list(stream(model, ids, GREEDY)))
    with pytest.raises(RuntimeError, match="no memory"):
        ids_of(second)


def fails_after(count: int, call):
    """The call, which raises once it has been made `count` times."""
    calls = iter(range(10**6))

    def failing(*args):
        if next(calls) >= count:
            raise RuntimeError("no memory")
        return call(*args)

    return failing


def test_weights_and_adapters_that_change_take_effect():
    model = tiny_model()
    engine = Engine(model, slots=2)
    prompt = random_ids(20)
    plain = ids_of(engine.submit(prompt, GREEDY))
    answers = [plain]
    for seed in range(3):  # one after the other: memory of an adapter that went may hold the next
        apply_lora(model, rank=2, targets=("q_proj", "down_proj"))
        torch.manual_seed(seed)
        sharpen_adapters(model)
        request = engine.submit(prompt, GREEDY)
        answers.append(ids_of(request))
        assert request.cached_tokens == 0
        assert answers[-1] == list(stream(model, prompt, GREEDY))
        remove_lora(model)
        assert ids_of(engine.submit(prompt, GREEDY)) == plain
    assert len(set(map(tuple, answers))) == 4
    model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert ids_of(engine.submit(prompt, GREEDY)) == list(stream(model, prompt, GREEDY)) != plain


def test_a_switch_waits_for_the_answers_under_way():
    model = tiny_model()
    engine = Engine(model, slots=2)
    expected = list(stream(model, random_ids(20), GREEDY))
    request = engine.submit(random_ids(20), GREEDY)
    engine.step()
    sharpen_adapters(apply_lora(model, rank=2))
    assert ids_of(request) == expected


def test_long_prompts_are_read_in_parts_while_others_go_on(dense, monkeypatch):
    monkeypatch.setattr(batching, "PREFILL_SHARED", 16)
    engine = Engine(dense, slots=3)
    answering = engine.submit(random_ids(4), SamplingParams(max_new_tokens=100, stop_ids=()))
    engine.step()
    answering.take()
    prompt = random_ids(100, seed=2)
    long = engine.submit(prompt, GREEDY)
    second = engine.submit(random_ids(20, seed=9), GREEDY)
    steps = 0
    tokens: list[Token] = []
    while not tokens:
        engine.step()
        steps += 1
        assert len(answering.take()[0]) == 1
        tokens, _ = long.take()
    assert steps == 7  # 100 tokens by 16
    run_to_end(engine)
    assert_same_answer(dense, prompt, [t.id for t in tokens + long.take()[0]], list(stream(dense, prompt, GREEDY)))
    assert ids_of(second) == list(stream(dense, random_ids(20, seed=9), GREEDY))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_logits_that_are_not_finite_end_their_request_alone():
    """And leave nothing behind: the slot is used again, its old values masked but still multiplied."""
    model = tiny_model()
    model.model.embed_tokens.weight[50] = torch.nan
    model.lm_head.weight = torch.nn.Parameter(tiny_model().lm_head.weight, requires_grad=False)
    healthy = [i if i != 50 else 51 for i in random_ids(40)]
    params = SamplingParams(temperature=0, max_new_tokens=4, stop_ids=())
    expected = list(stream(model, healthy[:6], params))
    assert 50 not in expected
    engine = Engine(model, slots=2)
    beside = engine.submit(healthy[:6], params)
    broken = engine.submit([*healthy[:30], 50], GREEDY)
    with pytest.raises(ValueError, match="not finite"):
        list(broken)
    assert broken.finish_reason == "error" and isinstance(broken.error, ValueError)
    assert ids_of(beside) == expected
    for _ in range(3):
        assert ids_of(engine.submit(healthy[:6], params)) == expected
        assert ids_of(engine.submit(healthy[1:3], params)) == list(stream(model, healthy[1:3], params))


@pytest.mark.parametrize("method", ["prefill", "decode_one_token"])
def test_an_exception_ends_the_request_that_caused_it_and_no_other(dense, method, monkeypatch):
    engine = Engine(dense, slots=4)
    original = getattr(engine._decoder, method)
    poison = 13

    def failing(slots, ids, lengths):
        if poison in ids:
            raise RuntimeError("out of memory")
        return original(slots, ids, lengths)

    prompts = [random_ids(6, seed=n) for n in range(3)]
    params = [SamplingParams(temperature=1.2, max_new_tokens=40, stop_ids=(), seed=n) for n in range(3)]
    expected = [list(stream(dense, prompt, p)) for prompt, p in zip(prompts, params, strict=True)]
    if method == "decode_one_token":  # a token that just one of the answers holds
        poison = next(t for t in expected[1][:-1] if t not in expected[0] + expected[2])
    else:
        poison = next(t for t in prompts[1] if t not in prompts[0] + prompts[2])
    monkeypatch.setattr(engine._decoder, method, failing)
    with engine:
        requests = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        with pytest.raises(RuntimeError, match="out of memory"):
            list(requests[1])
        assert [ids_of(requests[0]), ids_of(requests[2])] == [expected[0], expected[2]]
        assert engine._thread.is_alive()
        assert ids_of(engine.submit(prompts[0], params[0])) == expected[0]


def wait_for_ends(requests) -> None:
    deadline = time.monotonic() + 20
    while not all(request.finish_reason for request in requests):
        assert time.monotonic() < deadline, [request.finish_reason for request in requests]
        time.sleep(0.001)


def device_lost(*_):
    raise RuntimeError("device lost")


@pytest.mark.parametrize("method", ["prefill", "decode_one_token"])
def test_on_a_device_that_fails_for_good_every_request_ends(dense, method, monkeypatch):
    """Nothing can be cleared or copied either; the thread lives, and all is well again once the device is."""
    endless = SamplingParams(temperature=0, max_new_tokens=200, stop_ids=())
    expected = list(stream(dense, random_ids(9), GREEDY))
    with Engine(dense, slots=3) as engine:
        assert ids_of(engine.submit(random_ids(9), GREEDY)) == expected
        told = []
        with monkeypatch.context() as broken:
            with engine._stepping:  # its own thread waits
                running = [engine.submit(random_ids(5, seed=n), endless) for n in range(2)]
                engine.step()
                for name in (method, "clear", "copy"):
                    broken.setattr(engine._decoder, name, device_lost)
                waiting = [engine.submit(random_ids(9), GREEDY, notify=lambda: told.append(1)) for _ in range(5)]
            wait_for_ends(running + waiting)
            later = [engine.submit(random_ids(9), GREEDY) for _ in range(2)]
            wait_for_ends(later)
            failed = waiting + later + (running if method == "decode_one_token" else [])
            assert all(request.finish_reason == "error" for request in failed)
            assert all("device lost" in str(request.error) for request in failed)
            assert len(told) >= len(waiting) and engine._thread.is_alive()
            assert (engine.stats()["running"], engine.stats()["waiting"]) == (0, 0)
        for _ in range(4):
            assert ids_of(engine.submit(random_ids(9), GREEDY)) == expected


@pytest.mark.parametrize("threaded", [True, False])
def test_a_copy_that_fails_ends_its_own_request(dense, threaded, monkeypatch):
    text, told = random_ids(30), []
    endless = SamplingParams(temperature=0, max_new_tokens=200, stop_ids=())
    engine = Engine(dense, slots=2)
    if threaded:
        engine.start()
    with monkeypatch.context() as broken:
        with engine._stepping:  # its own thread waits
            first = engine.submit(text, endless)
            engine.step()
            broken.setattr(engine._decoder, "copy", device_lost)
            others = [engine.submit(text + [n], GREEDY, notify=lambda: told.append(1)) for n in range(3)]
        if threaded:
            wait_for_ends(others)
        for request in others:
            with pytest.raises(RuntimeError, match="device lost"):
                list(request)
        assert len(told) == 3
    after = text + [50]
    assert_same_answer(dense, after, ids_of(engine.submit(after, GREEDY)), list(stream(dense, after, GREEDY)))
    assert ids_of(first) == list(stream(dense, text, endless))
    engine.close()


def test_a_layout_that_failed_is_made_again_where_the_old_weights_are_back(monkeypatch):
    model = tiny_model()
    engine = Engine(model, slots=2)
    expected = ids_of(engine.submit([5, 6], GREEDY))
    apply_lora(model, rank=2)
    with monkeypatch.context() as broken:
        broken.setattr(batching, "new_decoder", device_lost)
        request = engine.submit([5, 6], GREEDY)
        with pytest.raises(RuntimeError, match="device lost"):
            engine.step()
        request.cancel()
    remove_lora(model)
    assert ids_of(engine.submit([5, 6], GREEDY)) == expected


def test_a_listener_that_fails_ends_only_its_own_request(dense):
    def gone():
        raise RuntimeError("the event loop is closed")

    with Engine(dense, slots=2) as engine:
        deserted = engine.submit(random_ids(4), SamplingParams(max_new_tokens=200, stop_ids=()), notify=gone)
        other = engine.submit(random_ids(5), GREEDY)
        assert len(ids_of(other)) == 12
        assert len(ids_of(deserted)) == 1 and deserted.finish_reason == "cancelled"


def test_a_layout_that_fails_does_not_end_the_thread(monkeypatch):
    model = tiny_model()
    with Engine(model, slots=2) as engine:
        expected = ids_of(engine.submit([5, 6], GREEDY))
        model.model.norm.weight.mul_(1)  # seen as a change
        original = engine._lay_out

        def failing():
            monkeypatch.setattr(engine, "_lay_out", original)
            raise MemoryError("no room")

        monkeypatch.setattr(engine, "_lay_out", failing)
        with pytest.raises(MemoryError):
            list(engine.submit([5, 6], GREEDY))
        assert ids_of(engine.submit([5, 6], GREEDY)) == expected


# --- threads ---------------------------------------------------------------------------------------------------------


def test_many_threads_submit_read_and_cancel(model):
    """Twelve threads, each with its own requests, some of which it leaves: all other answers are right."""
    prompts = [random_ids(3 + n, seed=n) for n in range(12)]
    expected = [list(stream(model, prompt, GREEDY)) for prompt in prompts]
    endless = SamplingParams(max_new_tokens=230, stop_ids=())
    failures = []

    def client(number: int, engine: Engine):
        try:
            for turn in range(4):
                leaves = (number + turn) % 3 == 0
                request = engine.submit(prompts[number], endless if leaves else GREEDY)
                if leaves:
                    next(iter(request))
                    request.cancel()
                else:
                    assert_same_answer(model, prompts[number], ids_of(request), expected[number])
        except BaseException as error:
            failures.append(error)

    with Engine(model, slots=5) as engine:
        threads = [threading.Thread(target=client, args=(n, engine)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        stats = engine.stats()
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert (stats["running"], stats["waiting"], stats["requests"], stats["cancelled"]) == (0, 0, 48, 16)


def test_notify_comes_from_the_engines_thread_after_what_it_tells_of(dense):
    told = []
    with Engine(dense, slots=2) as engine:
        ready = threading.Event()
        requests = []

        def listen():
            ready.wait()
            tokens, finish_reason = requests[0].take()
            told.append((threading.current_thread().name, len(tokens), finish_reason))

        requests.append(engine.submit(random_ids(3), GREEDY, notify=listen))
        ready.set()
        deadline = time.monotonic() + 30
        while requests[0].finish_reason is None or len(told) < 12:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert told == [("engine", 1, None)] * 11 + [("engine", 1, "length")]


def test_close_ends_what_is_under_way(dense, monkeypatch):
    engine = Engine(dense, slots=1)
    decode = engine._decoder.decode_one_token
    monkeypatch.setattr(engine._decoder, "decode_one_token", lambda *a: wait_for_ends(requests) or decode(*a))
    with engine:
        with engine._stepping:  # its own thread waits
            requests = [engine.submit(random_ids(3), GREEDY) for _ in range(3)]
        next(iter(requests[0]))
    assert [r.finish_reason for r in requests] == ["cancelled"] * 3
    assert not engine._thread.is_alive()
    for use in (lambda: engine.submit([5], GREEDY), engine.start):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_an_idle_engine_sleeps(dense, monkeypatch):
    """It looks for work once when it starts, once when some comes and once after every step."""
    engine, looked = Engine(dense, slots=2), []
    has_work = engine._has_work
    monkeypatch.setattr(engine, "_has_work", lambda: looked.append(1) or has_work())
    with engine:
        assert len(ids_of(engine.submit(random_ids(3), GREEDY))) == 12
        time.sleep(0.2)
        assert len(looked) <= 2 + 12
        assert len(ids_of(engine.submit(random_ids(3), GREEDY))) == 12


# --- memory ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.full)])
def test_memory_stays_flat(count):
    """Requests of all kinds, one in five cancelled: after the first fifth neither objects nor pages are added."""
    try:
        resident()
    except OSError:
        pytest.skip("no /proc on this system")
    model = tiny_model(hidden_size=32, num_hidden_layers=1)
    engine = Engine(model, slots=16, context_length=64)
    params = [p for p in various_params()]
    sizes = []

    def submit(number: int):
        request = engine.submit(random_ids(1 + number % 40, seed=number % 97), params[number % len(params)])
        if number % 5 == 0:
            engine.step()
            request.cancel()

    for number in range(count):
        submit(number)
        if number % 16 == 15:
            run_to_end(engine)
        if number % (count // 10) == count // 10 - 1:
            gc.collect()
            sizes.append((resident(), len(gc.get_objects())))
    assert engine.stats()["requests"] == count
    (first_bytes, first_objects), (last_bytes, last_objects) = sizes[1], sizes[-1]
    assert last_objects - first_objects < 500
    assert last_bytes - first_bytes < 4 * 2**20


@pytest.mark.parametrize("lean", [True, False])
def test_a_dropped_engine_frees_its_cache_at_once(monkeypatch, lean):
    # Training makes an engine a step and few Python objects, so the garbage collector would come too late.
    monkeypatch.setattr(decoder, "is_llama_like", lambda model: lean)
    engine = Engine(tiny_model(), slots=4)
    requests = [engine.submit(random_ids(5), GREEDY) for _ in range(4)]
    run_to_end(engine)
    cache = weakref.ref(engine._decoder if lean else engine._decoder.cache)
    gc.disable()
    try:
        del engine, requests
        assert cache() is None
    finally:
        gc.enable()


def test_the_cache_takes_memory_only_where_texts_stand():
    try:
        resident()
    except OSError:
        pytest.skip("no /proc on this system")
    model, prompt = tiny_model(hidden_size=32, num_hidden_layers=2, max_position_embeddings=16384), random_ids(50)
    gc.collect()
    before = resident()
    engine = Engine(model, slots=64, context_length=16384)
    size = sum(memory.nbytes for memory in engine._decoder.memory)
    requests = [engine.submit(prompt, GREEDY) for _ in range(64)]
    run_to_end(engine)
    assert all(request.finish_reason == "length" for request in requests)
    assert size > 2**27 and resident() - before < size / 4
