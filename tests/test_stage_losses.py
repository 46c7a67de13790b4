"""The losses of DPO, reason distillation and knowledge distillation against independent references, and as trained."""

import copy
import functools
import importlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    WORDS,
    assert_identical,
    read_log,
    read_resume,
    relative_error,
    tiny_flags,
    write_conversations,
    write_jsonl,
    write_preferences,
    write_texts,
)
from torch.distributions import Categorical, kl_divergence

from dataset.packing import PackedBatches, PreferenceBatches, build_plan
from dataset.token_cache import open_token_cache
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights, weight_path
from trainer import token_losses, train_distill_reason, train_distillation, train_dpo
from trainer.distributed import Process
from trainer.loader import PackedData, model_inputs
from trainer.teacher import Teacher
from trainer.token_losses import answer_log_probs, chunked_loss, target_indices, token_cross_entropy
from trainer.train_distillation import distillation_loss
from trainer.train_dpo import dpo_loss
from trainer.training import Training

CPU = Process(0, 0, 1, torch.device("cpu"))
META = Process(0, 0, 1, torch.device("meta"))
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def sharp_model(use_moe: bool = False, seed: int = 0, **sizes) -> MiniMindForCausalLM:
    """Weights larger than at the start of training: attention and routing are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    model = MiniMindForCausalLM(MiniMindConfig(use_moe=use_moe, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 5.0)
    return model


def save_stage(out_dir: Path, stage: str, tokenizer, model: MiniMindForCausalLM) -> Path:
    path = weight_path(out_dir, stage, model.config.hidden_size, model.config.use_moe)
    save_weights(path, model, {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256})
    return path


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def some_words(start: int, count: int) -> str:
    return " ".join(WORDS[(start * 7 + i * (1 + start % 3)) % len(WORDS)] for i in range(count))


def write_pairs(path: Path, count: int = 9, **_) -> Path:
    """Preferences, some after an exchange that both sides share; none is longer than a row of 64."""
    records = []
    for n in range(count):
        history = [some_words(n, 1), some_words(n + 1, 2)] * (n % 2) + [some_words(n + 2, 2 + n % 3)]
        sides = {"chosen": some_words(n + 3, 2 + n % 5), "rejected": some_words(n + 5, 1 + n % 4)}
        records.append({side: turns(*history, answer) for side, answer in sides.items()})
    return write_jsonl(path, records)


def write_reasoning(path: Path, count: int = 12, **_) -> Path:
    """Answers of the form that reason distillation teaches; users write tags too."""
    records = []
    for n in range(count):
        answer = f"<think>{some_words(n, 3)}</think><answer>{some_words(n + 1, 1 + n % 4)}</answer>"
        records.append({"conversations": turns(f"<think> {some_words(n, 2)} </answer>", answer)})
    return write_jsonl(path, records)


def one_by_one(path: Path, tokenizer, key: str = "conversations") -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each conversation, straight from the text."""
    documents = []
    for line in path.read_text("utf-8").splitlines():
        ids, mask = tokenizer.encode_conversation(json.loads(line)[key])
        labels = [token if wanted else -100 for token, wanted in zip(ids[1:], mask[1:], strict=True)]
        assert len(labels) <= 64
        documents.append((ids[:-1], labels))
    return documents


def answers_of_pairs(path: Path, tokenizer) -> list[list[tuple[list[int], list[int]]]]:
    """For each pair (prompt ids, answer ids) of chosen and rejected: the last turn of each is the answer."""
    pairs = []
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        sides = []
        for side in ("chosen", "rejected"):
            prompt = tokenizer.encode_prompt(record[side][:-1])
            answer = [*tokenizer.encode_contents([record[side][-1]["content"]])[0], tokenizer.eos_id]
            sides.append((prompt, answer))
        pairs.append(sides)
    return pairs


def gradients(model) -> dict[str, torch.Tensor]:
    result = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return result


# --- DPO -------------------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    """Eq. 7 of arXiv:2305.18290 with numbers; label smoothing mixes in the flipped pair."""
    policy, reference = torch.tensor([[-10.0, -14.0], [-3.0, -2.0]]), torch.tensor([[-11.0, -12.0], [-3.0, -3.5]])
    margins = [0.5 * (1 - -2), 0.5 * (0 - 1.5)]
    for smoothing in (0.0, 0.1):
        expected = [
            (1 - smoothing) * math.log(1 + math.exp(-m)) + smoothing * math.log(1 + math.exp(m)) for m in margins
        ]
        loss, margin = dpo_loss(policy, reference, beta=0.5, label_smoothing=smoothing)
        assert margin.tolist() == pytest.approx(margins, rel=1e-6)
        assert loss.tolist() == pytest.approx(expected, rel=1e-6)


def test_dpo_is_ln_2_where_the_policy_is_the_reference():
    log_probs = torch.randn(5, 2) * 100
    for smoothing in (0.0, 0.3):
        loss, margin = dpo_loss(log_probs, log_probs, beta=0.1, label_smoothing=smoothing)
        assert loss.tolist() == pytest.approx([math.log(2)] * 5, abs=1e-7) and not margin.any()


def pair_batch(path: Path, tokenizer, tmp_path: Path, pairs: int) -> dict:
    """All pairs of a file in one micro-batch, in the order of the file."""
    cache = open_token_cache(path, tokenizer, "preference", cache_dir=tmp_path / "cache", show_progress=False)
    plan = build_plan(cache, 64, show_progress=False)
    return PreferenceBatches(cache, plan, batch_size=pairs, shuffle=False)[0]


def preference_sums(model, batch, reference, **options):
    args = train_dpo.parse([f"--{name}={value}" for name, value in options.items()])
    head = functools.partial(token_cross_entropy, labels=batch["labels"])
    return train_dpo.preference_loss(model(**model_inputs(batch), head=head).head_output, batch, reference, args)


def float32_log_probs(model, batch):
    head = functools.partial(token_cross_entropy, labels=batch["labels"])
    with torch.no_grad():
        return answer_log_probs(model(**model_inputs(batch), head=head).head_output, batch)[0].numpy()


def test_no_value_is_read_from_the_device_for_the_kept_reference(tmp_path, tokenizer):
    """A tensor on "meta" has none: to read one raises, where a GPU would be waited for."""
    path = write_pairs(tmp_path / "a.jsonl", 6)
    args = train_dpo.parse(tiny_flags(tmp_path, path, cache_dir=tmp_path / "cache"))
    batch = next(PackedData(args, "preference", tokenizer, META).once())
    losses = torch.empty_like(batch["labels"], dtype=torch.float32)
    loss, shown = train_dpo.preference_loss(losses, batch, torch.zeros(6, 2).numpy(), args)
    assert loss.is_meta and shown.is_meta and shown.shape == (len(train_dpo.METRICS),)


def test_dpo_is_trls_sigmoid_loss(tmp_path, tokenizer, monkeypatch):
    """From the text on: our packed batch and per-token losses against TRL's trainer on padded rows of Llama."""
    datasets, trl, transformers = (pytest.importorskip(name) for name in ("datasets", "trl", "transformers"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    policy, reference = sharp_model(seed=0), sharp_model(seed=1)
    path = write_pairs(tmp_path / "a.jsonl", 6)
    batch = pair_batch(path, tokenizer, tmp_path, 6)
    sums, shown = preference_sums(policy, batch, float32_log_probs(reference, batch), beta=0.3)
    (sums / 6).backward()

    def llama(model) -> torch.nn.Module:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=model.config.intermediate_size, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=6400, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )  # fmt: skip
        copied = transformers.LlamaForCausalLM(config)
        copied.load_state_dict(model.state_dict())
        return copied

    trained = llama(policy)
    options = {"report_to": [], "use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.DPOTrainer(
            trained,
            llama(reference),
            args=trl.DPOConfig(str(tmp_path / "trl"), beta=0.3, loss_type=["sigmoid"], **options),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.path),
        )
    rows = [
        {"prompt_ids": chosen[0], "chosen_ids": chosen[1], "rejected_ids": rejected[1]}
        for chosen, rejected in answers_of_pairs(path, tokenizer)
    ]
    theirs = trainer.compute_loss(trained, trainer.data_collator(rows))
    theirs.backward()
    # float32 rounds the four log-probs of a pair, sums of around 50 nats each: on every processor in another place
    log_probs = np.stack([float32_log_probs(model, batch) for model in (policy, reference)])
    rounding = 2 * float(np.finfo(np.float32).eps) * 0.3 * float(np.abs(log_probs).sum()) / 6
    assert rounding < 2e-5
    assert sums.item() / 6 == pytest.approx(theirs.item(), abs=rounding)
    assert abs(theirs.item() - math.log(2)) > 0.02, "the pair of models says nothing"
    ours = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert relative_error(ours, {name: parameter.grad for name, parameter in trained.named_parameters()}) < 1e-5

    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    means = dict(zip(train_dpo.METRICS, (shown / 6).tolist(), strict=True))
    for name, theirs in (
        ("reward_margin", "rewards/margins"),
        ("reward_accuracy", "rewards/accuracies"),
        ("logp_chosen", "logps/chosen"),
        ("logp_rejected", "logps/rejected"),
    ):
        slack = rounding if name == "reward_margin" else 0.0
        assert means[name] == pytest.approx(logged[theirs], rel=1e-5, abs=slack)

    def exact_log_prob(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        log_probs = llama(model).double()(ids).logits[0, :-1].log_softmax(dim=-1)
        return log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    with torch.no_grad():
        margins = [
            0.3 * (exact_log_prob(policy, *pair[0]) - exact_log_prob(reference, *pair[0]))
            - 0.3 * (exact_log_prob(policy, *pair[1]) - exact_log_prob(reference, *pair[1]))
            for pair in answers_of_pairs(path, tokenizer)
        ]
    assert means["reward_margin"] == pytest.approx(float(sum(margins)) / 6, abs=rounding)


def test_the_mean_form_of_dpo_by_hand(tmp_path, tokenizer):
    """Log-probs per token of the answer and its <|im_end|>; the metrics too."""
    policy, reference = sharp_model(seed=0), sharp_model(seed=1)
    path = write_pairs(tmp_path / "a.jsonl", 6)
    batch = pair_batch(path, tokenizer, tmp_path, 6)
    sums, shown = preference_sums(
        policy, batch, float32_log_probs(reference, batch), beta=2.0, logp="mean", label_smoothing=0.1
    )

    expected, drifts = [], []
    for pair in answers_of_pairs(path, tokenizer):
        means = []
        for prompt, answer in pair:
            for model in (policy, reference):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                log_probs = logits.double().log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1))
                means.append(float(log_probs.mean()))
        margin = 2.0 * ((means[0] - means[1]) - (means[2] - means[3]))
        expected.append(0.9 * math.log(1 + math.exp(-margin)) + 0.1 * math.log(1 + math.exp(margin)))
        drifts.append(0.5 * (means[0] - means[1] + means[2] - means[3]))
    assert sums.item() == pytest.approx(sum(expected), rel=1e-5)
    metrics = dict(zip(train_dpo.METRICS, shown.tolist(), strict=True))
    assert metrics["loss"] == pytest.approx(sum(expected), rel=1e-5)
    assert metrics["kl"] == pytest.approx(sum(drifts), rel=1e-4)


# --- knowledge distillation: the divergence --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_is_cross_entropy_and_torchs_divergence(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 20, 53, dtype=torch.float64).mul(3).unbind()
    labels = torch.randint(0, 53, (20,))
    log_probs = torch.log_softmax(teacher / temperature, dim=-1)
    loss, cross_entropy, divergence = distillation_loss(student, labels, log_probs, 0.3, temperature).tolist()
    expected = float(
        F.kl_div(F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="sum")
    )
    also = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)).sum()
    assert divergence == pytest.approx(expected, rel=1e-12) == pytest.approx(float(also), rel=1e-6)
    assert cross_entropy == pytest.approx(-float(student.log_softmax(-1)[torch.arange(20), labels].sum()), rel=1e-12)
    assert loss == pytest.approx(0.3 * cross_entropy + 0.7 * temperature**2 * expected, rel=1e-12)


@pytest.mark.parametrize("k", [0, 1, 5, 52])
def test_nothing_diverges_where_the_student_is_the_teacher(k):
    torch.manual_seed(0)
    logits = torch.randn(20, 53) * 3
    log_probs, ids = torch.log_softmax(logits / 2, dim=-1), None
    if k:
        log_probs, ids = log_probs.topk(k)
    loss, _, divergence = distillation_loss(logits, torch.zeros(20, dtype=torch.int64), log_probs, 0.0, 2.0, ids)
    assert abs(float(divergence)) < 1e-5 and abs(float(loss)) < 1e-4


def test_the_likeliest_tokens_give_a_lower_bound_that_becomes_the_divergence():
    """Tokens that count as one cannot be told apart: less divergence, and all of it once they are all known."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 20, 53, dtype=torch.float64).unbind()
    labels, log_probs = torch.zeros(20, dtype=torch.int64), torch.log_softmax(teacher / 2, dim=-1)
    whole = float(distillation_loss(student, labels, log_probs, 0.0, 2.0)[2])
    found = []
    for k in (1, 2, 5, 20, 50, 52):
        values, ids = log_probs.topk(k)
        found.append(float(distillation_loss(student, labels, values, 0.0, 2.0, ids)[2]))
    assert found == sorted(found) and found[0] < 0.5 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-9) and found[-2] < whole


@pytest.mark.parametrize("k", [0, 1, 5])
def test_gradient_of_distillation_is_that_of_finite_differences(k):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 11, dtype=torch.float64).unbind()
    labels, log_probs, ids = torch.randint(0, 11, (4,)), torch.log_softmax(teacher / 2, dim=-1), None
    if k:
        log_probs, ids = log_probs.topk(k)
    assert torch.autograd.gradcheck(
        lambda logits: distillation_loss(logits, labels, log_probs, 0.4, 2.0, ids)[0], student.requires_grad_()
    )


def chunk_example(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 53, (33,), generator=generator)
    teacher = torch.log_softmax(torch.randn(33, 53, generator=generator) * 3, dim=-1)
    return hidden, weight, labels, teacher


# of 33 tokens: many chunks, a ragged last one, exactly one, room to spare
@pytest.mark.parametrize("chunk", [1, 4, 33, 1024])
def test_chunked_loss_and_its_gradient_are_those_of_the_whole_logits(monkeypatch, chunk):
    monkeypatch.setattr(token_losses, "DISTRIBUTIONS", {"cpu": chunk})
    hidden, weight, labels, teacher = chunk_example(torch.float32)
    expected = distillation_loss(hidden @ weight.t(), labels, teacher, 0.4, 2.0)
    expected_grads = torch.autograd.grad(expected[0] * 0.37, (hidden, weight))
    sizes = []

    def loss_of_logits(logits, tokens):
        sizes.append(len(logits))
        return distillation_loss(logits, labels[tokens], teacher[tokens], 0.4, 2.0)

    sums = chunked_loss(hidden, weight, loss_of_logits, losses=3)
    assert max(sizes) <= chunk and sum(sizes) == 33
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(sums[0] * 0.37, (hidden, weight))
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, loss_of_logits, losses=3).requires_grad


def test_chunked_loss_in_bfloat16(monkeypatch):
    monkeypatch.setattr(token_losses, "DISTRIBUTIONS", {"cpu": 4})
    hidden, weight, labels, teacher = chunk_example(torch.float32)
    expected = distillation_loss(hidden @ weight.t(), labels, teacher, 0.4, 2.0)
    expected_grads = torch.autograd.grad(expected[0], (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        sums = chunked_loss(
            hidden, weight, lambda logits, c: distillation_loss(logits, labels[c], teacher[c], 0.4, 2.0), losses=3
        )
    grads = torch.autograd.grad(sums[0], (hidden, weight))
    assert sums.dtype == torch.float32 and [grad.dtype for grad in grads] == [torch.float32] * 2
    torch.testing.assert_close(sums, expected, rtol=0.01, atol=0.1)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


def test_a_micro_batch_without_targets_has_a_gradient_of_zero():
    hidden, weight, *_ = chunk_example(torch.float32)
    sums = chunked_loss(hidden[:0], weight, lambda logits, _: logits.sum().expand(3), losses=3)
    grad_hidden, grad_weight = torch.autograd.grad(sums[0] + 0 * weight.sum(), (hidden, weight))
    assert not sums.any() and not grad_weight.any() and not grad_hidden.any()


# --- tag weights -----------------------------------------------------------------------------------------------------


def test_tag_weights_by_hand():
    """One id per tag, several ids, a tag that is cut off, one that stands where nothing is learned."""
    labels = torch.tensor(
        [
            [-100, -100, 7, 40, 41, 8, 2, -100],  # 7 and 8 are tags of one id
            [-100, 5, 6, 9, 5, 9, 5, 6],  # a tag of three ids, then its first id alone, then its end cut off
            [8, 8, -100, 7, -100, 7, 3, -100],
        ]
    )
    weights = train_distill_reason.target_weights(labels, [[7], [8], [5, 6, 9]], 10.0)
    assert weights.tolist() == [
        [0, 0, 10, 1, 1, 10, 1, 0],
        [0, 10, 10, 10, 1, 1, 1, 1],
        [10, 10, 0, 10, 0, 10, 1, 0],
    ]
    assert train_distill_reason.target_weights(labels, [[7], [8]], 1.0).tolist() == (labels >= 0).float().tolist()


def reason_run(train, tmp_path, tokenizer, records, **flags) -> tuple[float, MiniMindForCausalLM]:
    """Logged loss of one step over all records, and the model that it is the loss of."""
    base = save_stage(tmp_path, "rlhf", tokenizer, sharp_model())
    path = write_jsonl(tmp_path / "r.jsonl", records)
    train("train_distill_reason", tiny_flags(tmp_path, path, max_steps=1, learning_rate=1e-12, **flags))
    model = sharp_model()
    model.load_state_dict(torch.load(base))
    return read_log(tmp_path, "reason_32")[0]["loss"], model


@torch.no_grad()
def losses_of_answer(model, tokenizer, question: str, answer_ids: list[int]) -> list[float]:
    prompt = tokenizer.encode_prompt(turns(question))
    logits = model(input_ids=torch.tensor([prompt + answer_ids])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(answer_ids), reduction="none").tolist()


def test_reason_loss_by_hand_with_a_truncated_answer_and_tags_of_the_user(train, tmp_path, tokenizer):
    """Tags count ten times in answers alone; the denominator counts every token once; a tag that is cut off is gone."""
    question = "<think> the </think> <answer>"
    whole = "<think>the sky</think><answer>was grey</answer>"
    long = "<think>" + "the sky was grey " * 30 + "</think><answer>grey</answer>"
    records = [{"conversations": turns(question, answer)} for answer in (whole, long)]
    loss, model = reason_run(train, tmp_path, tokenizer, records, tag_weight=7)

    tag_ids = {tokenizer.encode_contents([tag])[0][0] for tag in TAGS}
    assert all(len(ids) == 1 for ids in tokenizer.encode_contents(list(TAGS)))
    prompt = tokenizer.encode_prompt(turns(question))
    assert len(tag_ids & set(prompt)) == 3, "the user's tags are the same ids"
    nats, targets, tags = 0.0, 0, []
    for answer in (whole, long):
        ids = [*tokenizer.encode_contents([answer])[0], tokenizer.eos_id][: 65 - len(prompt)]
        tags.append(sum(token in tag_ids for token in ids))
        losses = losses_of_answer(model, tokenizer, question, ids)
        nats += sum((7 if token in tag_ids else 1) * ce for token, ce in zip(ids, losses, strict=True))
        targets += len(ids)
    assert tags == [4, 1], "the second answer is cut inside its thought"
    assert loss == pytest.approx(nats / targets, rel=1e-5)


def test_reason_loss_where_a_tag_is_several_ids(train, tmp_path, tokenizer, monkeypatch):
    """As with a tokenizer that has no ids for the tags: the whole sequence counts, its parts elsewhere do not."""
    monkeypatch.setattr(train_distill_reason, "TAGS", ("<思考>",))
    ids = tokenizer.encode_contents(["<思考>"])[0]
    answer = "天气<思考>天空<思 花<思考>"
    loss, model = reason_run(train, tmp_path, tokenizer, [{"conversations": turns("<思考>", answer)}], tag_weight=7)
    answer_ids = [*tokenizer.encode_contents([answer])[0], tokenizer.eos_id]
    places = [n for n in range(len(answer_ids)) if answer_ids[n : n + len(ids)] == ids]
    assert len(ids) == 3 and len(places) == 2 and answer_ids.count(ids[0]) == 3
    losses = losses_of_answer(model, tokenizer, "<思考>", answer_ids)
    tagged = {place + i for place in places for i in range(len(ids))}
    expected = sum((7 if n in tagged else 1) * ce for n, ce in enumerate(losses)) / len(losses)
    assert loss == pytest.approx(expected, rel=1e-5)


# --- packed = one by one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_moe", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("stage", ["dpo", "reason", "distillation"])
def test_packed_loss_is_that_of_the_documents_one_by_one(tmp_path, tokenizer, stage, use_moe):
    """Value and gradient of one optimizer step over a whole file, in micro-batches of two rows, some of them empty."""
    model = sharp_model(use_moe)
    write = {"dpo": write_pairs, "reason": write_reasoning, "distillation": write_conversations}[stage]
    path = write(tmp_path / "a.jsonl", count=11, longest=6, exchanges=1)
    kind = "preference" if stage == "dpo" else "conversation"
    cache = open_token_cache(path, tokenizer, kind, cache_dir=tmp_path / "cache", show_progress=False)
    plan = build_plan(cache, 64, show_progress=False)
    batches_class = PreferenceBatches if stage == "dpo" else PackedBatches
    batches = batches_class(cache, plan, batch_size=2, accumulation_steps=plan.num_rows // 2 + 3)
    assert len(batches) == batches.accumulation_steps

    if stage == "dpo":
        args = train_dpo.parse(["--beta=0.3"])
        other = sharp_model(seed=1).eval()
        pairs, reference = answers_of_pairs(path, tokenizer), torch.zeros(plan.num_rows, 2)
        loss_one_by_one = expected_aux = 0.0
        for n, pair in enumerate(pairs):
            log_probs, aux = [], 0.0
            for side, (prompt, answer) in enumerate(pair):
                ids, targets = torch.tensor([prompt + answer]), torch.tensor(answer).unsqueeze(1)
                places = slice(len(prompt) - 1, -1)
                output = model(input_ids=ids)
                log_probs.append(output.logits[0, places].log_softmax(-1).gather(1, targets).sum())
                aux = aux + output.aux_loss / (2 * len(pairs))
                with torch.no_grad():
                    logits = other(input_ids=ids).logits[0, places]
                    reference[n, side] = logits.log_softmax(-1).gather(1, targets).sum()
            margin = 0.3 * ((log_probs[0] - reference[n, 0]) - (log_probs[1] - reference[n, 1]))
            loss = F.softplus(-margin) / len(pairs)
            (loss + aux).backward()
            loss_one_by_one, expected_aux = loss_one_by_one + loss.item(), expected_aux + aux.item()

        def loss_of(batch):
            head = functools.partial(token_cross_entropy, labels=batch["labels"])
            output = model(**model_inputs(batch), head=head)
            loss, _ = train_dpo.preference_loss(output.head_output, batch, reference.numpy(), args)
            return loss / batch["step_pairs"], output.aux_loss
    else:
        documents = one_by_one(path, tokenizer)
        num_targets = sum(label >= 0 for _, labels in documents for label in labels)
        tag_ids = torch.tensor([tokenizer.encode_contents([tag])[0][0] for tag in TAGS])
        args = train_distillation.parse(["--alpha=0.3", "--temperature=2", "--dtype=float32"])
        save_stage(tmp_path, "full_sft", tokenizer, sharp_model(seed=1, hidden_size=64))
        teacher_path = tmp_path / "full_sft_64.pth"
        teacher = Teacher(teacher_path, args, tokenizer, CPU)
        loss_one_by_one = expected_aux = 0.0
        for inputs, labels in documents:
            output, labels = model(input_ids=torch.tensor([inputs])), torch.tensor(labels)
            wanted = labels >= 0
            logits = output.logits[0, wanted]
            if stage == "reason":
                weights = torch.where(torch.isin(labels[wanted], tag_ids), 10.0, 1.0)
                loss = (F.cross_entropy(logits, labels[wanted], reduction="none") * weights).sum() / num_targets
            else:
                with torch.no_grad():
                    theirs = teacher.model(input_ids=torch.tensor([inputs])).logits[0, wanted]
                divergence = kl_divergence(Categorical(logits=theirs / 2), Categorical(logits=logits / 2)).sum()
                loss = 0.3 * F.cross_entropy(logits, labels[wanted], reduction="sum") + 0.7 * 4 * divergence
                loss = loss / num_targets
            aux = output.aux_loss / len(documents)
            (loss + aux).backward()
            loss_one_by_one, expected_aux = loss_one_by_one + loss.item(), expected_aux + aux.item()

        def loss_of(batch):
            if stage == "distillation":
                log_probs = teacher.log_probs(batch, target_indices(batch))
                head = functools.partial(
                    train_distillation.distillation_head, batch=batch, teacher_log_probs=log_probs, args=args
                )
                output = model(**model_inputs(batch), head=head)
                return output.head_output[0] / batch["step_targets"], output.aux_loss
            head = functools.partial(token_cross_entropy, labels=batch["labels"])
            output = model(**model_inputs(batch), head=head)
            weights = train_distill_reason.target_weights(batch["labels"], [[int(i)] for i in tag_ids], 10.0)
            loss, _ = train_distill_reason.reason_loss(output.head_output, weights, output.aux_loss, batch)
            return loss, output.aux_loss

    expected = gradients(model)
    packed_loss = packed_aux = 0.0
    for batch in (batches[i] for i in range(len(batches))):
        loss, aux = loss_of(batch)
        aux = aux * batch["num_documents"] / batch["step_documents"]
        (loss + aux).backward()
        packed_loss, packed_aux = packed_loss + loss.item(), packed_aux + aux.item()
    assert packed_loss == pytest.approx(loss_one_by_one, rel=1e-5)
    assert packed_aux == pytest.approx(expected_aux, rel=1e-5) and (packed_aux > 0.1) == use_moe
    packed = gradients(model)
    assert relative_error(packed, expected) < 1e-5
    for name in packed:  # small tensors too
        assert float((packed[name] - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()), name


# --- the balance loss in every stage ---------------------------------------------------------------------------------


def first_gradients(train, monkeypatch, script: str, flags: list[str], aux_loss_alpha: float):
    """The model as it was before its first step, and the gradients of that step."""
    module = importlib.import_module(f"trainer.{script}")
    model_config, take_step = module.model_config, Training.step
    seen = []

    def config_with_alpha(*args):
        config = model_config(*args)
        config.aux_loss_alpha = aux_loss_alpha
        return config

    def step(training, lr):
        model = training.model
        seen.append((copy.deepcopy(model), {name: p.grad for name, p in model.named_parameters()}))
        seen[0][1].update({name: g.clone() for name, g in seen[0][1].items() if g is not None})
        return take_step(training, lr)

    with monkeypatch.context() as patch:
        patch.setattr(module, "model_config", config_with_alpha)
        patch.setattr(Training, "step", step)
        train(script, flags)
    return seen[0]


SCRIPTS = {
    "train_pretrain": write_texts,
    "train_full_sft": write_conversations,
    "train_lora": write_conversations,
    "train_dpo": write_pairs,
    "train_distill_reason": write_reasoning,
    "train_distillation": write_conversations,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_balance_loss_reaches_the_gradient(train, monkeypatch, tmp_path, tokenizer, script):
    """With and without it: the difference is the gradient of the mean over documents taken one by one."""
    sizes = {"exchanges": 1} if script != "train_pretrain" else {}
    data = SCRIPTS[script](tmp_path / "a.jsonl", count=7, longest=6, **sizes)
    for stage, seed in (("pretrain", 0), ("full_sft", 1), ("rlhf", 2)):
        save_stage(tmp_path, stage, tokenizer, sharp_model(True, seed))
    flags = {"use_moe": True, "max_steps": 1, "batch_size": 3, "accumulation_steps": 4, "grad_clip": 0}
    if script == "train_distillation":
        save_stage(tmp_path, "full_sft", tokenizer, sharp_model(seed=1, hidden_size=64))
        flags["teacher_hidden_size"] = 64
    flags = tiny_flags(tmp_path, data, **flags)
    model, with_aux = first_gradients(train, monkeypatch, script, flags, 0.1)
    _, without = first_gradients(train, monkeypatch, script, flags, 0.0)

    if script == "train_pretrain":
        texts = [json.loads(line)["text"] for line in data.read_text("utf-8").splitlines()]
        documents = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_documents(texts)]
    else:
        keys = ("chosen", "rejected") if script == "train_dpo" else ("conversations",)
        documents = [inputs for key in keys for inputs, _ in one_by_one(data, tokenizer, key)]
    model.zero_grad(set_to_none=True)
    model.train()
    for ids in documents:
        (model(input_ids=torch.tensor([ids])).aux_loss / len(documents)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    routers = [name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    if script == "train_lora":  # the router is frozen; what comes before it is not
        assert all(with_aux[name] is None for name in routers)
        assert {name for name, grad in with_aux.items() if grad is not None} == {
            name for name in with_aux if ".lora." in name
        }
    else:
        assert all(float(expected[name].norm()) > 1e-4 for name in routers)
    difference = {name: with_aux[name] - without[name] for name in expected}
    assert relative_error(difference, expected) < 1e-3


# --- as trained ------------------------------------------------------------------------------------------------------


def test_dpo_begins_at_ln_2_and_learns(train, tmp_path, tokenizer):
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model())
    data = write_pairs(tmp_path / "a.jsonl", 16)
    train("train_dpo", tiny_flags(tmp_path, data, epochs=10, learning_rate=1e-3))
    log = read_log(tmp_path, "rlhf_32")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(log[0]["reward_margin"]) < 1e-5 and abs(log[0]["kl"]) < 1e-5
    assert log[0]["logp_chosen"] < -10 and log[0]["logp_rejected"] < -10
    assert log[-1]["loss"] < 0.6 and log[-1]["reward_accuracy"] == 1 and log[-1]["reward_margin"] > 0.1


def test_a_file_without_a_sidecar_is_read_with_one_number_of_heads(train, tmp_path):
    """By the model and its reference; a teacher, whose heads no flag says, needs the sidecar."""
    path = tmp_path / "bare.pth"
    save_weights(path, sharp_model())
    pairs = write_preferences(tmp_path / "pairs.jsonl", 4)
    flags = {"base_weight": path, "max_steps": 1}
    train("train_dpo", tiny_flags(tmp_path / "dpo", pairs, **flags))
    (record,) = read_log(tmp_path / "dpo", "rlhf_32")
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(record["reward_margin"]) < 1e-5
    chats = write_conversations(tmp_path / "chats.jsonl", 4)
    with pytest.raises(ValueError, match=r"bare.pth has no sidecar, .* write it into \S+bare.json"):
        train("train_distillation", tiny_flags(tmp_path / "kd", chats, **flags, teacher_weight=path))


def test_distillation_begins_at_zero_where_the_student_is_the_teacher(train, tmp_path, tokenizer, chats):
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model())
    train("train_distillation", tiny_flags(tmp_path, chats, max_steps=1, teacher_hidden_size=32, alpha=0))
    (record,) = read_log(tmp_path, "full_dist_32")
    assert abs(record["kl"]) < 1e-5 and abs(record["loss"]) < 1e-4 and record["ce"] > 1


def test_training_from_the_kept_teacher_is_training_from_the_live_one(train, monkeypatch, tmp_path, tokenizer, chats):
    """All but one token of the vocabulary is kept, in half precision; the model itself is let go."""
    base = save_stage(tmp_path, "full_sft", tokenizer, sharp_model(num_hidden_layers=1))
    wide = save_stage(tmp_path, "full_sft", tokenizer, sharp_model(seed=1, hidden_size=64))
    flags = {"num_hidden_layers": 1, "base_weight": base, "teacher_weight": wide, "epochs": 2, "alpha": 0.2}
    teachers = []
    monkeypatch.setattr(train_distillation, "Teacher", lambda *rest: (teachers.append(Teacher(*rest)), teachers[-1])[1])
    for k in (0, 6399):
        train("train_distillation", tiny_flags(tmp_path / str(k), chats, cache_teacher=k, **flags))
    assert teachers[0].model is not None and teachers[1].model is None
    live, kept = (read_resume(tmp_path / str(k), "full_dist_32")["model"] for k in (0, 6399))
    start = {name: tensor.float() for name, tensor in torch.load(base).items()}
    moved = {name: tensor - start[name] for name, tensor in live.items()}
    assert relative_error({name: tensor - start[name] for name, tensor in kept.items()}, moved) < 0.05
    for a, b in zip(*(read_log(tmp_path / str(k), "full_dist_32") for k in (0, 6399)), strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=2e-3) and a["ce"] == pytest.approx(b["ce"], rel=2e-3)


def test_the_teacher_on_disk_holds_the_likeliest_tokens_of_every_target(tmp_path, tokenizer, chats, monkeypatch):
    monkeypatch.setattr(token_losses, "DISTRIBUTIONS", {"cpu": 7})
    path = save_stage(tmp_path, "full_sft", tokenizer, sharp_model(seed=1))
    args = train_distillation.parse(
        tiny_flags(tmp_path, chats, max_steps=1, batch_size=3, temperature=3, teacher_hidden_size=32)
    )
    data = PackedData(args, "conversation", tokenizer, CPU)
    live, kept = (Teacher(path, args, tokenizer, CPU) for _ in range(2))
    kept.keep(data, 5)
    steps = 0
    for _, (batch,) in data.steps():  # shuffled, where the file was read in order
        places = target_indices(batch)
        everything = slice(0, len(places))
        values, ids = kept.log_probs(batch, places)(everything)
        expected, _ = live.log_probs(batch, places)(everything)
        expected_values, expected_ids = expected.topk(5)
        torch.testing.assert_close(values, expected_values, rtol=1e-3, atol=1e-3)
        assert float((ids == expected_ids).float().mean()) > 0.99  # but for ties
        steps += 1
    assert steps == 1
    # on the device nothing has a value: none is read to find what is on disk
    (batch,) = next(PackedData(args, "conversation", tokenizer, META).steps())[1]
    values, ids = kept.log_probs(batch, batch["labels"])(slice(3))
    assert values.is_meta and ids.is_meta and values.shape == ids.shape == (3, 5)


# --- when something is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train_dpo", {"beta": 0.0}, "--beta 0.0: must be above 0"),
        ("train_dpo", {"beta": -1.0}, "--beta -1.0: must be above 0"),
        ("train_dpo", {"label_smoothing": 0.5}, "--label_smoothing 0.5: must be at least 0 and below 0.5"),
        ("train_distillation", {"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ("train_distillation", {"temperature": -2.0}, "--temperature -2.0: must be above 0"),
        ("train_distillation", {"alpha": 1.5}, "--alpha 1.5: must be between 0 and 1"),
        ("train_distillation", {"alpha": -0.1}, "--alpha -0.1: must be between 0 and 1"),
        ("train_distillation", {"cache_teacher": 6400}, "--cache_teacher 6400: must be .*smaller than the vocabulary"),
        ("train_distillation", {"cache_teacher": -1}, "--cache_teacher -1: must be 0 or more"),
        ("train_distill_reason", {"tag_weight": -1.0}, "--tag_weight -1.0: must be 0 or more"),
    ],
)
def test_flags_out_of_range(train, tmp_path, chats, script, flags, message):
    with pytest.raises(ValueError, match=message):
        train(script, tiny_flags(tmp_path, chats, **flags))


@pytest.mark.parametrize(
    "script, stage, maker",
    [
        ("train_dpo", "full_sft", "train_full_sft"),
        ("train_distill_reason", "rlhf", "train_dpo"),
        ("train_distillation", "full_sft", "train_full_sft"),
    ],
)
def test_missing_base_weights(train, tmp_path, chats, script, stage, maker):
    with pytest.raises(ValueError, match=f"{stage}_32.pth not found; run trainer/{maker}.py first.*holds: no weights"):
        train(script, tiny_flags(tmp_path, chats))


BAD_PAIRS = {
    "equal": ((["a", "b"], ["a", "b"]), "chosen and rejected hold the same answers"),
    "other question": ((["a", "b"], ["c", "d"]), "differ before their answers, in turn 1: .*the same prompt"),
    "other question, same answer": ((["a", "b"], ["c", "b"]), "differ before their answers, in turn 1"),
    "other second question": ((["a", "b", "c", "d"], ["a", "b", "e", "f"]), "differ before their answers, in turn 3"),
    "no answer": ((["a", "b"], ["a"]), '"rejected" has no assistant turn'),
}


@pytest.mark.parametrize("pair, message", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_pairs_that_are_no_preference(train, tmp_path, tokenizer, pair, message):
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model())
    good = {"chosen": turns("a", "b"), "rejected": turns("a", "c")}
    bad = dict(zip(("chosen", "rejected"), (turns(*contents) for contents in pair), strict=True))
    data = write_jsonl(tmp_path / "bad.jsonl", [good, bad])
    with pytest.raises(ValueError, match=f"bad.jsonl:2: .*{message}"):
        train("train_dpo", tiny_flags(tmp_path, data))


def test_teachers_that_do_not_fit(train, tmp_path, tokenizer, chats):
    base = save_stage(tmp_path, "full_sft", tokenizer, sharp_model())
    flags = tiny_flags(tmp_path, chats, base_weight=base)
    with pytest.raises(ValueError, match="full_sft_64.pth not found; run trainer/train_full_sft.py"):
        train("train_distillation", [*flags, "--teacher_hidden_size=64"])
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model(hidden_size=64, vocab_size=6000))
    with pytest.raises(ValueError, match="full_sft_64.pth has 6000 token ids, the student 6400.*one tokenizer"):
        train("train_distillation", [*flags, "--teacher_hidden_size=64"])
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model(hidden_size=64))
    with pytest.raises(ValueError, match="--teacher_num_hidden_layers 3: .*full_sft_64.pth has 2; leave it out"):
        train("train_distillation", [*flags, "--teacher_hidden_size=64", "--teacher_num_hidden_layers=3"])
    details = (tmp_path / "full_sft_64.json").read_text()
    (tmp_path / "full_sft_64.json").write_text(details.replace(tokenizer.sha256, "ab" * 32))
    with pytest.raises(ValueError, match="full_sft_64.pth was trained with the tokenizer abab.*--tokenizer_path"):
        train("train_distillation", [*flags, "--teacher_hidden_size=64"])


def test_reference_of_other_weights_is_computed_anew(train, tmp_path, tokenizer, capsys):
    """Its log-probs lie on disk under the hash of the weights; a run with the same ones reads them."""
    data = write_pairs(tmp_path / "a.jsonl")
    flags = tiny_flags(tmp_path, data)
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model())
    train("train_dpo", flags)
    first = read_resume(tmp_path, "rlhf_32")
    assert "computing them again" not in capsys.readouterr().out
    train("train_dpo", flags)
    assert "computing them again" not in capsys.readouterr().out
    assert_identical(read_resume(tmp_path, "rlhf_32")["model"], first["model"])
    assert len(list((tmp_path / "token_cache").glob("a-reference-*"))) == 1
    save_stage(tmp_path, "full_sft", tokenizer, sharp_model(seed=1))
    train("train_dpo", flags)
    assert "belongs to other weights, data or settings; computing them again" in capsys.readouterr().out
    assert read_log(tmp_path, "rlhf_32")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
