"""Tools that ask whether a stage worked: they count what they say, on answers and log-probs worked out one by one."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from dataset.lm_dataset import parse_record
from model.model_lora import apply_lora, lora_path, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights
from scripts import identity_mixture, stage_quality
from tests.conftest import ROOT, one_thread, sentence, write_conversations, write_jsonl
from trainer.loader import PackedData
from trainer.optimization import Precision


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Random weights of two stages and an adapter, as out_dir holds them."""
    out_dir = tmp_path_factory.mktemp("out")
    config = MiniMindConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sidecar = {"tokenizer_sha256": tokenizer.sha256, "config": config.to_dict()}
    for seed, stage in enumerate(("full_sft", "rlhf")):
        torch.manual_seed(seed)
        model = MiniMindForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # random weights of the usual size give almost the same log-prob to every token
        save_weights(out_dir / f"{stage}_32.pth", model, sidecar)
    apply_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B.weight"):
                parameter.normal_(std=0.2)
    save_lora(lora_path(out_dir, "tiny", 32, False), model, {"tokenizer_sha256": tokenizer.sha256})
    return out_dir


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rng = random.Random(3)
    records = []
    for number in range(7):
        question = {"role": "user", "content": sentence(rng, 6)}
        lengths = (40, 4) if number % 3 else (4, 40)
        answers = [{"role": "assistant", "content": f"{number} " + sentence(rng, longest)} for longest in lengths]
        records.append({"chosen": [question, answers[0]], "rejected": [question, answers[1]]})
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", records)


def measure(capsys, *flags) -> list[dict]:
    """The rows that a run of stage_quality writes."""
    target = next(flag for flag in flags if str(flag).endswith("measured.jsonl"))
    with one_thread():
        stage_quality.main([str(flag) for flag in flags])
    capsys.readouterr()
    return json.loads(target.read_text("utf-8").splitlines()[-1])["rows"]


def common(folder, tmp_path) -> list:
    return ["--out_dir", folder, "--hidden_size", 32, "--dtype", "float32", "--json", tmp_path / "measured.jsonl"]


def one_by_one(model, tokenizer, turns: list[dict]) -> tuple[float, int]:
    """Log-prob of the last answer and its tokens, eos included: no packing, no chunks."""
    prompt = tokenizer.encode_prompt(turns[:-1])
    ids, _ = tokenizer.encode_conversation(turns)
    with torch.no_grad():
        log_probs = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    ids = ids[:-1]  # without the newline after eos
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))), len(ids) - len(prompt)


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_wordings_asked_are_not_in_the_sample():
    questions = stage_quality.read_questions(
        ROOT / "scripts" / "identity_questions.txt", ROOT / "dataset" / "sample" / "sft.jsonl"
    )
    assert len({stage_quality.core(question) for question in questions}) == len(questions) >= 40


@pytest.mark.parametrize("trained", ["你叫什么", "  你叫什么？！", "what is YOUR name"])
def test_a_wording_that_was_trained_on_is_refused(tmp_path, trained):
    questions = tmp_path / "questions.txt"
    questions.write_text("你叫什么？\nWhat is your name?\n", encoding="utf-8")
    turns = [{"role": "user", "content": trained}, {"role": "assistant", "content": "MiniMind"}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"conversations": turns}])
    with pytest.raises(ValueError, match=r"data.jsonl holds 1 of the wordings of .*questions.txt"):
        stage_quality.read_questions(questions, data)


def test_questions_about_the_model_are_not_unrelated(tmp_path):
    talks = [("你是谁？", "一个助手"), ("为什么天是蓝的", "散射"), ("1+1=?", "minimind says 2"), ("Why?", "So.")]
    records = [
        {"conversations": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in talks
    ]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    assert stage_quality.unrelated_questions(data, "MiniMind", 10) == ["为什么天是蓝的", "Why?"]
    assert stage_quality.unrelated_questions(data, "MiniMind", 1) == ["为什么天是蓝的"]


def test_answers_with_the_name_are_counted_before_and_with_the_adapter(
    folder, tmp_path, monkeypatch, capsys, tokenizer
):
    questions = tmp_path / "questions.txt"
    questions.write_text("who?\nwhich?\nname?\ncalled?\n", encoding="utf-8")
    train = write_conversations(tmp_path / "train.jsonl", 3)
    other = write_conversations(tmp_path / "other.jsonl", 5)
    said = iter([["a"] * 9, ["minimind!", "I am MiniMind", "no", "MINIMIND"] + ["x", "MiniMind", "x", "x", "x"]])
    monkeypatch.setattr(
        stage_quality, "answers", lambda *_: [tokenizer.encode_contents([text])[0] for text in next(said)]
    )
    before, after = measure(
        capsys, "identity", *common(folder, tmp_path), "--weight", "full_sft", "--lora_name", "tiny",
        "--questions", questions, "--train_path", train, "--data_path", other, "--prompts", 5,
    )  # fmt: skip
    assert (before["with name"], before["with name by mistake"]) == (0, 0)
    assert (after["with name"], after["with name by mistake"]) == (0.75, 0.2)
    assert (before["weights"], after["weights"]) == ("full_sft_32", "full_sft_32 + tiny_32")


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_that_of_the_answers_one_by_one_and_changes_with_the_adapter(folder, tmp_path, capsys, tokenizer):
    data = write_conversations(tmp_path / "data.jsonl", 6, exchanges=1)
    flags = [*common(folder, tmp_path), "--weight", "full_sft", "--lora_name", "tiny", "--data_path", data]
    before, after = measure(capsys, "loss", *flags, "--cache_dir", tmp_path / "cache")
    model, _ = stage_quality.load_model(folder / "full_sft_32.pth", tokenizer.sha256)
    conversations = [parse_record("conversation", line) for line in data.read_text("utf-8").splitlines()]
    sums = [one_by_one(model, tokenizer, turns) for turns in conversations]
    nats, tokens = -sum(s for s, _ in sums), sum(n for _, n in sums)
    size = sum(len(turns[-1]["content"].encode()) for turns in conversations)
    assert before["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert before["bits per byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert after["loss"] != pytest.approx(before["loss"], rel=1e-4)
    assert after["worse by"] == pytest.approx(after["loss"] / before["loss"] - 1)


# --- preferences -----------------------------------------------------------------------------------------------------


def test_accuracies_by_hand():
    policy = torch.tensor([[-10.0, -12.0], [-9.0, -3.0], [-5.0, -5.0], [-8.0, -20.0]])
    reference = torch.tensor([[-11.0, -12.0], [-9.0, -2.0], [-6.0, -6.0], [-8.0, -23.0]])
    lengths = torch.tensor([[10, 4], [9, 3], [5, 5], [2, 4]])
    rows = {
        row.pop("accuracy by"): row for row in stage_quality.preference_rows(policy, reference, lengths, lengths, 0.1)
    }
    assert rows["(pairs)"] == {"all": 4, "chosen longer": 2, "chosen shorter": 1, "same length": 1}
    # margins of the rewards: 1, 1, 0 (a tie), -3, times beta
    expected = {"all": 2.5 / 4, "chosen longer": 1.0, "chosen shorter": 0.0, "same length": 0.5}
    assert rows["reward (policy against reference)"] == pytest.approx(expected)
    assert rows["the longer answer"] == pytest.approx(expected)
    by_policy = {"all": 2.5 / 4, "chosen longer": 0.5, "chosen shorter": 1.0, "same length": 0.5}
    assert rows["log-prob under the policy"] == pytest.approx(by_policy)
    # per token: -1 > -3; -1 = -1; tie; -4 > -5
    per_token = {"all": 3 / 4, "chosen longer": 0.75, "chosen shorter": 1.0, "same length": 0.5}
    assert rows["log-prob per token under the policy"] == pytest.approx(per_token)
    assert stage_quality.accuracy(policy, torch.zeros(4, dtype=torch.bool)) is None


@pytest.mark.parametrize("max_seq_len", [256, 48])
def test_log_probs_and_full_lengths_of_pairs_are_those_one_by_one(folder, tmp_path, pairs, tokenizer, max_seq_len):
    flags = ["preferences", *common(folder, tmp_path), "--weight", "rlhf", "--reference", "full_sft", "--data_path"]
    args = stage_quality.parse([str(flag) for flag in (*flags, pairs, "--max_seq_len", max_seq_len)])
    args.cache_dir = tmp_path / "cache"
    model, _ = stage_quality.load("rlhf", args, tokenizer)
    data = PackedData(args, "preference", tokenizer, stage_quality.alone(args))
    log_probs, counts = stage_quality.pair_log_probs(model, data, Precision("float32", torch.device("cpu")))
    records = [parse_record("preference", line) for line in pairs.read_text("utf-8").splitlines()]
    wanted = torch.tensor([[one_by_one(model, tokenizer, turns) for turns in pair] for pair in records])
    assert torch.equal(stage_quality.answer_lengths(data).double(), wanted[..., 1].double())
    if max_seq_len == 256:
        assert torch.equal(counts, wanted[..., 1].double())
        torch.testing.assert_close(log_probs, wanted[..., 0].double(), rtol=1e-5, atol=1e-4)
    else:
        assert (counts < wanted[..., 1]).any()  # cut to the row, while the lengths above are not


def test_a_policy_that_is_its_reference_has_no_reward(folder, tmp_path, pairs, capsys):
    flags = [*common(folder, tmp_path), "--weight", "full_sft", "--reference", "full_sft", "--data_path", pairs]
    rows = measure(capsys, "preferences", *flags, "--prompts", 2, "--max_new_tokens", 3, "--cache_dir", tmp_path)
    by = {row["accuracy by"]: row for row in rows if "accuracy by" in row}
    margins = next(row for row in rows if "reward margin" in row)
    assert by["reward (policy against reference)"]["all"] == 0.5
    assert by["(pairs)"]["all"] == 7
    assert sum(by["(pairs)"][group] for group in ("chosen longer", "chosen shorter", "same length")) == 7
    assert margins["dpo loss"] == pytest.approx(math.log(2)) and margins["reward margin"] == 0
    lengths = [row for row in rows if "answers of" in row]
    assert [row["temperature"] for row in lengths] == [0.0, 0.7]
    assert all(row["prompts"] == 2 and row["mean_tokens"] <= 3 for row in lengths)


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ended", "fault"),
    [
        ("<think>\n1 + 1\n</think>\n<answer>\n2\n</answer>", True, ""),
        ("<think>a</think><answer>b</answer>", False, "not ended"),
        ("<think> \n</think><answer>b</answer>", True, "empty part"),
        ("<think>a</think><answer></answer>", True, "empty part"),
        ("<think>a</think>b", True, "tags missing or in disorder"),
        ("<answer>b</answer><think>a</think>", True, "tags missing or in disorder"),
        ("<think>a</think><answer>b</answer> and more", True, "tags missing or in disorder"),
        ("<think>a</think>so<answer>b</answer>", True, "tags missing or in disorder"),
        ("<think>a<think>b</think><answer>c</answer>", True, "tags missing or in disorder"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", True, "tags missing or in disorder"),
    ],
)
def test_the_form_of_a_reasoned_answer(text, ended, fault):
    assert stage_quality.fault_of(text, ended) == fault


def test_well_formed_answers_are_counted_from_their_ids(folder, tmp_path, monkeypatch, capsys, tokenizer):
    good, cut = "<think>a</think><answer>b</answer>", "<think>a</think><answer>b"
    ids = [[*tokenizer.encode_contents([good])[0], tokenizer.eos_id], tokenizer.encode_contents([cut])[0]]
    monkeypatch.setattr(stage_quality, "answers", lambda *_: ids)
    data = write_conversations(tmp_path / "data.jsonl", 2)
    rows = measure(capsys, "reasoning", *common(folder, tmp_path), "--weight", "rlhf", "--data_path", data)
    assert [row["temperature"] for row in rows] == [0.0, 0.7]
    for row in rows:
        assert (row["well-formed"], row["not ended"], row["ended"]) == (0.5, 1, 0.5)
        assert row["mean_tokens"] == (len(ids[0]) - 1 + len(ids[1])) / 2


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_said(folder, tmp_path):
    flags = ["loss", "--out_dir", str(folder), "--hidden_size", "32", "--weight", "full_sft"]
    with pytest.raises(ValueError, match="missing.jsonl"):
        stage_quality.main([*flags, "--data_path", str(tmp_path / "missing.jsonl")])
    with pytest.raises(ValueError, match="--batch_size 0: must be at least 1"):
        stage_quality.main([*flags, "--data_path", "x", "--batch_size", "0"])


# --- the identity's mixture ------------------------------------------------------------------------------------------


def test_the_mixture_for_an_identity_holds_what_looks_alike_and_nothing_that_contradicts():
    def conversation(question: str) -> dict:
        return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": "…"}]}

    identity = [conversation(f"Who are you, {number}?") for number in range(3)]
    parts = [conversation("You are a historian. " + "Explain. " * 40), conversation("请扮演一位老师")]
    near = [conversation(f"你好，{number}") for number in range(10)]
    rest = [conversation(f"Sum of {number} and 2") for number in range(10)]
    about = [conversation("你是谁"), conversation("What can you do?"), conversation("What is your name?")]
    mixed = identity_mixture.mixture(identity, parts + near + rest + about, repeats=2, alike=4, others=5, seed=0)
    questions = [identity_mixture.first_question(record) for record in mixed]
    assert len(mixed) == 6 + 2 + 4 + 5
    assert all(questions.count(identity_mixture.first_question(record)) == 2 for record in identity)
    assert all(record in mixed for record in parts) and not any(record in mixed for record in about)
    again = identity_mixture.mixture(identity, parts + near + rest + about, repeats=2, alike=4, others=5, seed=0)
    assert mixed == again
