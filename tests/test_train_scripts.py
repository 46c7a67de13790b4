"""The stages as they are run: their losses by hand, what they write, what they say when something is wrong."""

import functools
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    assert_identical,
    read_log,
    read_resume,
    relative_error,
    run_python,
    tiny_flags,
    write_conversations,
    write_jsonl,
    write_texts,
)

from dataset.packing import PackedBatches, build_plan
from dataset.token_cache import open_token_cache
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_weights, read_sidecar, sidecar_path
from trainer import train_full_sft, train_pretrain
from trainer.loader import model_inputs
from trainer.token_losses import token_cross_entropy

# --- losses ----------------------------------------------------------------------------------------------------------


def sharp_model(use_moe: bool) -> MiniMindForCausalLM:
    """Weights larger than at the start of training: attention and routing are far from uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MiniMindForCausalLM(MiniMindConfig(**sizes, use_moe=use_moe))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 6.0)
    return model


def pretrain_documents(path, tokenizer, row: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each document, those longer than a row in pieces, straight from the text."""
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    documents = []
    for ids in tokenizer.encode_documents(texts):
        ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        starts = range(0, len(ids) - 1, row)
        documents += [(ids[:-1][start : start + row], ids[1:][start : start + row]) for start in starts]
    return documents


def conversation_documents(path, tokenizer, row: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each conversation; all of them fit a row."""
    documents = []
    for line in path.read_text("utf-8").splitlines():
        ids, mask = tokenizer.encode_conversation(json.loads(line)["conversations"])
        labels = [token if wanted else -100 for token, wanted in zip(ids[1:], mask[1:], strict=True)]
        assert len(labels) <= row
        documents.append((ids[:-1], labels))
    return documents


def gradients(model) -> dict[str, torch.Tensor]:
    result = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("kind", ["pretrain", "conversation"])
def test_packed_loss_is_that_of_the_documents_one_by_one(tmp_path, tokenizer, kind, use_moe):
    """One optimizer step over the whole file, packed into micro-batches of two rows, the last ones empty."""
    if kind == "pretrain":
        path = write_texts(tmp_path / "a.jsonl", 14)
        loss_of, documents_of = train_pretrain.pretrain_loss, pretrain_documents
    else:
        path = write_conversations(tmp_path / "a.jsonl", 14, longest=6, exchanges=1)
        loss_of, documents_of = train_full_sft.sft_loss, conversation_documents
    model = sharp_model(use_moe)

    documents = documents_of(path, tokenizer, 64)
    num_targets = sum(label >= 0 for _, labels in documents for label in labels)
    expected_ce = expected_aux = 0.0
    for inputs, labels in documents:
        output = model(input_ids=torch.tensor([inputs]))
        ce = F.cross_entropy(output.logits[0], torch.tensor(labels), ignore_index=-100, reduction="sum") / num_targets
        aux = output.aux_loss / len(documents)
        (ce + aux).backward()
        expected_ce, expected_aux = expected_ce + ce.item(), expected_aux + aux.item()
    expected = gradients(model)

    cache = open_token_cache(path, tokenizer, kind, cache_dir=tmp_path / "cache", show_progress=False)
    plan = build_plan(cache, 64, show_progress=False)
    batches = PackedBatches(cache, plan, batch_size=2, accumulation_steps=plan.num_rows // 2 + 3)
    assert len(batches) == batches.accumulation_steps and plan.num_rows < len(documents)
    packed_ce = packed_aux = 0.0
    for batch in (batches[i] for i in range(len(batches))):
        output = model(**model_inputs(batch), head=functools.partial(token_cross_entropy, labels=batch["labels"]))
        ce, aux = loss_of(output.logits, output.aux_loss, batch)
        (ce + aux).backward()
        packed_ce, packed_aux = packed_ce + ce.item(), packed_aux + aux.item()

    assert packed_ce == pytest.approx(expected_ce, rel=1e-5)
    assert packed_aux == pytest.approx(expected_aux, rel=1e-5)
    assert (packed_aux > 0.1) == use_moe
    packed = gradients(model)
    assert relative_error(packed, expected) < 1e-5
    for name in packed:  # small tensors too
        assert float((packed[name] - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()), name


# --- what a run writes -----------------------------------------------------------------------------------------------

LINE = re.compile(
    r"Epoch:\[(\d+)/(\d+)\]\((\d+)/(\d+)\) loss:(\d+\.\d+) lr:(\S+) epoch_Time:(\d+\.\d)min \| "
    r"([\d,]+) tokens/s, MFU (\d+)%, grad_norm (\d+\.\d+), padding (\d+\.\d)%"
)


def test_log_lines_on_screen_and_in_the_file(train, tmp_path, texts, capsys):
    train("train_pretrain", tiny_flags(tmp_path, texts, epochs=2, log_interval=4, warmup_iters=3, batch_size=8))
    lines = LINE.findall(capsys.readouterr().out)
    records = read_log(tmp_path)
    # five steps an epoch: every fourth step, and the last one
    assert [line[:4] for line in lines] == [("1", "2", "4", "5"), ("2", "2", "3", "5"), ("2", "2", "5", "5")]
    assert [record["step"] for record in records] == [4, 8, 10] and [r["epoch"] for r in records] == [1, 2, 2]
    for line, record in zip(lines, records, strict=True):
        assert float(line[4]) == pytest.approx(record["loss"], abs=1e-4)
        assert float(line[5]) == pytest.approx(record["lr"], rel=1e-3)
        assert float(line[7].replace(",", "")) == pytest.approx(record["tokens_per_second"], abs=1)
        assert float(line[9]) == pytest.approx(record["grad_norm"], abs=0.01)
        assert float(line[10]) == pytest.approx(100 * record["padding"], abs=0.1)
    (start,) = read_log(tmp_path, event="start")
    assert start["total_steps"] == 10 and start["first_step"] == 0 and start["flags"]["batch_size"] == 8
    assert start["versions"]["torch"] == torch.__version__
    losses = [record["loss"] for record in records]
    assert losses == sorted(losses, reverse=True), "it learns"


def test_logged_loss_is_the_mean_over_the_interval(train, tmp_path, texts):
    train("train_pretrain", tiny_flags(tmp_path / "each", texts))
    train("train_pretrain", tiny_flags(tmp_path / "four", texts, log_interval=4))
    each = [record["loss"] for record in read_log(tmp_path / "each")]
    four = [record["loss"] for record in read_log(tmp_path / "four")]
    assert four == pytest.approx([np.mean(each[:4]), np.mean(each[4:8]), np.mean(each[8:])])


def test_lines_of_a_mixture_of_experts_have_the_same_format(train, tmp_path, texts, capsys):
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=2, use_moe=True))
    assert len(LINE.findall(capsys.readouterr().out)) == 2
    assert all(record["aux_loss"] > 0.1 for record in read_log(tmp_path, "pretrain_32_moe"))


def test_a_progress_bar_on_a_terminal_only(train, tmp_path, texts, capsys, monkeypatch):
    train("train_pretrain", tiny_flags(tmp_path / "a", texts, log_interval=5))
    assert "\r" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train("train_pretrain", tiny_flags(tmp_path / "b", texts, log_interval=5))
    assert re.search(r"\[#+\.*\] 4/10 loss:\d\.\d+ \d+\.\d min left", capsys.readouterr().err)


def layer_keys(use_moe: bool) -> set[str]:
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    projections = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    if not use_moe:
        return attention | norms | {f"mlp.{name}" for name in projections}
    owners = [f"mlp.experts.{e}" for e in range(4)] + ["mlp.shared_experts.0"]
    return attention | norms | {"mlp.gate.weight"} | {f"{owner}.{name}" for owner in owners for name in projections}


@pytest.mark.parametrize("use_moe", [False, True])
def test_weight_file_and_sidecar(train, tmp_path, texts, tokenizer, use_moe):
    train("train_pretrain", tiny_flags(tmp_path, texts, use_moe=use_moe))
    name = "pretrain_32_moe" if use_moe else "pretrain_32"
    state = torch.load(tmp_path / f"{name}.pth", weights_only=True)
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert state.keys() == ends | {f"model.layers.{i}.{key}" for i in range(2) for key in layer_keys(use_moe)}
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])

    sidecar = read_sidecar(tmp_path / f"{name}.pth")
    assert sidecar["stage"] == "pretrain" and sidecar["tokenizer_sha256"] == tokenizer.sha256
    config = MiniMindConfig(**sidecar["config"])
    assert (config.hidden_size, config.num_hidden_layers, config.use_moe) == (32, 2, use_moe)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (4, 2, tokenizer.vocab_size)
    tokens = sum(len(inputs) for inputs, _ in pretrain_documents(texts, tokenizer, 64))
    assert sidecar["progress"] == {"step": 10, "tokens": tokens, "complete": True}
    assert sidecar["metrics"]["loss"] == read_log(tmp_path, name)[-1]["loss"]
    assert sidecar["flags"]["learning_rate"] == 2e-3 and sidecar["flags"]["data_path"] == str(texts)
    assert sidecar["versions"]["torch"] == torch.__version__
    folders = {"logs", "resume", "token_cache"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.pth", f"{name}.json"} | folders


def test_an_epoch_shorter_than_save_interval_leaves_weights(train, tmp_path, texts):
    train("train_pretrain", tiny_flags(tmp_path, texts, save_interval=10_000, max_steps=1))
    assert (tmp_path / "pretrain_32.pth").exists() and read_resume(tmp_path)["progress"]["complete"]


def test_every_epoch_has_its_own_order(train, tmp_path, texts):
    """At a learning rate that changes nothing, the losses of an epoch are a mere permutation of rows."""
    train("train_pretrain", tiny_flags(tmp_path, texts, epochs=2, learning_rate=1e-12, batch_size=1))
    losses = [record["loss"] for record in read_log(tmp_path)]
    half = len(losses) // 2
    assert losses[:half] != pytest.approx(losses[half:], rel=1e-4)
    assert sorted(losses[:half]) == pytest.approx(sorted(losses[half:]), rel=1e-5)


def test_workers_change_nothing(train, tmp_path, texts):
    for workers in (0, 2):
        train("train_pretrain", tiny_flags(tmp_path / str(workers), texts, num_workers=workers, epochs=2))
    assert_identical(read_resume(tmp_path / "0"), read_resume(tmp_path / "2"))


def test_bfloat16_learns_as_float32_does(train, tmp_path, texts):
    for dtype in ("float32", "bfloat16"):
        train("train_pretrain", tiny_flags(tmp_path / dtype, texts, dtype=dtype))
    losses = [[record["loss"] for record in read_log(tmp_path / dtype)] for dtype in ("float32", "bfloat16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert read_resume(tmp_path / "bfloat16")["model"]["model.norm.weight"].dtype == torch.float32


def test_from_its_own_folder_and_from_anywhere(tmp_path, texts):
    """The real command in the real shell's way: `cd trainer && python train_pretrain.py`."""
    relative = [f"--data_path={os.path.relpath(texts, ROOT / 'trainer')}", "--out_dir", str(tmp_path)]
    done = run_python("train_pretrain.py", *tiny_flags(tmp_path, texts, max_steps=3), *relative, cwd=ROOT / "trainer")
    assert done.returncode == 0, done.stderr
    assert len(LINE.findall(done.stdout)) == 3 and not done.stderr, done.stderr
    assert f"{tmp_path / 'pretrain_32.pth'} is ready" in done.stdout


def test_a_mistake_is_a_message_and_a_bad_exit_status(launcher, tmp_path, chats):
    child = launcher.start("train_full_sft", tiny_flags(tmp_path, chats))
    assert child.wait() == 1
    assert child.output.startswith("error: ") and child.output.count("\n") == 1 and "train_pretrain.py" in child.output


# --- held-out data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pretrain", "conversation"])
def test_held_out_loss_and_bits_per_byte(train, tmp_path, texts, chats, tokenizer, kind, capsys):
    """Against the final weights and the held-out documents one by one; bytes are those of the text itself."""
    flags = {"max_steps": 4, "eval_interval": 2, "sample_prompt": "the old king", "batch_size": 3}
    valid, name, documents_of = write_texts(tmp_path / "v.jsonl", 9, seed=3), "pretrain_32", pretrain_documents
    train("train_pretrain", tiny_flags(tmp_path, texts, **flags | {"valid_path": valid}))
    num_bytes = sum(len(json.loads(line)["text"].encode()) for line in valid.read_text("utf-8").splitlines())
    if kind == "conversation":
        valid, name, documents_of = tmp_path / "c.jsonl", "full_sft_32", conversation_documents
        write_conversations(valid, 9, longest=6, exchanges=1, seed=3)
        train("train_full_sft", tiny_flags(tmp_path, chats, **flags | {"valid_path": valid}))
        turns = [t for line in valid.read_text("utf-8").splitlines() for t in json.loads(line)["conversations"]]
        num_bytes = sum(len(turn["content"].encode()) for turn in turns if turn["role"] == "assistant")
    model = sharp_model(False).eval()
    model.load_state_dict(read_resume(tmp_path, name)["model"])
    nats, targets = 0.0, 0
    with torch.no_grad():
        for inputs, labels in documents_of(valid, tokenizer, 64):
            logits = model(input_ids=torch.tensor([inputs])).logits[0]
            nats += F.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
            targets += sum(label >= 0 for label in labels)
    evaluations = read_log(tmp_path, name, "evaluation")
    assert [record["step"] for record in evaluations] == [2, 4]
    assert evaluations[-1]["valid_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert evaluations[1]["valid_loss"] < evaluations[0]["valid_loss"]
    printed = capsys.readouterr().out
    assert f"valid loss {nats / targets:.4f}" in printed and printed.count("sample:") == 2 * (1 + (kind != "pretrain"))
    assert read_sidecar(tmp_path / f"{name}.pth")["metrics"]["valid_loss"] == evaluations[-1]["valid_loss"]


def test_evaluating_changes_no_weight(train, tmp_path, texts):
    valid = write_texts(tmp_path / "valid.jsonl", 9, seed=3)
    train("train_pretrain", tiny_flags(tmp_path / "without", texts, use_moe=True))
    flags = {"valid_path": valid, "eval_interval": 1, "sample_prompt": "花"}
    train("train_pretrain", tiny_flags(tmp_path / "with", texts, use_moe=True, **flags))
    states = [read_resume(tmp_path / name, "pretrain_32_moe") for name in ("without", "with")]
    assert_identical(*states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_held_out_loss_is_the_same_on_two_processes(launcher, tmp_path, texts, dtype):
    valid = write_texts(tmp_path / "valid.jsonl", 9, seed=3)
    flags = {"valid_path": valid, "max_steps": 1, "learning_rate": 1e-12, "dtype": dtype}
    for world_size in (1, 2):
        line = tiny_flags(tmp_path / str(world_size), texts, batch_size=4 // world_size, **flags)
        launcher.run("train_pretrain", line, world_size)
    one, two = (read_log(tmp_path / str(n), event="evaluation")[-1] for n in (1, 2))
    for name in ("valid_loss", "bits_per_byte"):
        assert two[name] == pytest.approx(one[name], rel=1e-5 if dtype == "float32" else 1e-3)


# --- SFT starts from pretrained weights ------------------------------------------------------------------------------


@pytest.fixture
def pretrained(train, tmp_path, texts):
    train("train_pretrain", tiny_flags(tmp_path, texts))
    return tmp_path / "pretrain_32.pth"


def test_sft_starts_from_the_pretrained_weights(train, tmp_path, chats, pretrained):
    train("train_full_sft", tiny_flags(tmp_path, chats, learning_rate=1e-12))
    assert_identical(torch.load(tmp_path / "full_sft_32.pth"), torch.load(pretrained))
    train("train_full_sft", tiny_flags(tmp_path, chats, epochs=3))
    losses = [record["loss"] for record in read_log(tmp_path, "full_sft_32")]
    assert losses[-1] < losses[0] - 0.1
    assert read_sidecar(tmp_path / "full_sft_32.pth")["stage"] == "full_sft"


def test_sft_starts_from_any_weight_file(train, tmp_path, chats, pretrained):
    moved = tmp_path / "elsewhere" / "mine.pth"
    moved.parent.mkdir()
    pretrained.rename(moved)
    with pytest.warns(UserWarning, match="mine.pth has no sidecar.*--tokenizer_path"):
        train("train_full_sft", tiny_flags(tmp_path, chats, learning_rate=1e-12, base_weight=moved))
    assert_identical(torch.load(tmp_path / "full_sft_32.pth"), torch.load(moved))


def test_missing_pretrained_weights(train, tmp_path, chats, pretrained):
    with pytest.raises(ValueError) as caught:
        train("train_full_sft", tiny_flags(tmp_path, chats, hidden_size=64))
    message = str(caught.value)
    assert str(tmp_path / "pretrain_64.pth") in message and "train_pretrain.py" in message
    assert "holds: pretrain_32.pth" in message and "--hidden_size" in message


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"num_hidden_layers": 3}, "--num_hidden_layers is 3 here and 2 in the file"),
        ({"hidden_size": 64}, "--hidden_size is 64 here and 32 in the file"),
        ({"use_moe": True}, "--use_moe is True here and False in the file"),
        ({"num_key_value_heads": 4}, "--num_key_value_heads is 4 here and 2 in the file"),
    ],
)
def test_pretrained_weights_of_other_sizes(train, tmp_path, texts, chats, flags, said):
    pretrained = tmp_path / "pretrain_32.pth"
    flags = {"num_attention_heads": 8} | flags
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=1, num_attention_heads=8))
    with pytest.raises(ValueError, match=said):
        train("train_full_sft", tiny_flags(tmp_path, chats, base_weight=pretrained, **flags))
    assert not list(tmp_path.glob("full_sft*"))


def test_pretrained_weights_of_another_tokenizer(train, tmp_path, chats, pretrained, other_tokenizer):
    with pytest.raises(ValueError, match="pretrain_32.pth was trained with the tokenizer.*--tokenizer_path"):
        train("train_full_sft", tiny_flags(tmp_path, chats, tokenizer_path=other_tokenizer))
    sidecar_path(pretrained).unlink()
    with pytest.warns(UserWarning, match="--tokenizer_path"):
        train("train_full_sft", tiny_flags(tmp_path, chats, tokenizer_path=other_tokenizer, max_steps=1))


def test_sft_learns_from_answers_alone(train, tmp_path, tokenizer, pretrained):
    """What is said by users does not reach a gradient except through attention: the same answers, the same labels."""
    data = write_conversations(tmp_path / "a.jsonl", 3, longest=6, exchanges=1)
    train("train_full_sft", tiny_flags(tmp_path, data, max_steps=1, learning_rate=1e-12))
    model = sharp_model(False)
    load_weights(model, pretrained)
    nats, targets = 0.0, 0
    for line in data.read_text("utf-8").splitlines():
        turns = json.loads(line)["conversations"]
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt = tokenizer.encode_prompt(turns[:number])
                answer = [*tokenizer.encode_contents([turn["content"]])[0], tokenizer.eos_id]
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                nats += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
                targets += len(answer)
    assert read_log(tmp_path, "full_sft_32")[0]["loss"] == pytest.approx(nats / targets, rel=1e-5)


# --- when something is wrong -----------------------------------------------------------------------------------------


def test_data_that_is_missing_or_bad(train, tmp_path, texts):
    with pytest.raises(ValueError, match="nowhere.jsonl not found"):
        train("train_pretrain", tiny_flags(tmp_path, tmp_path / "nowhere.jsonl"))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "good"}, {"txt": "bad"}, {"text": "also good"}])
    with pytest.raises(ValueError, match=r"bad.jsonl:2: .*\n.*--skip_bad_lines"):
        train("train_pretrain", tiny_flags(tmp_path, bad))
    train("train_pretrain", tiny_flags(tmp_path, bad, skip_bad_lines=True))
    with pytest.raises(ValueError, match="nowhere.jsonl not found"):
        train("train_pretrain", tiny_flags(tmp_path / "b", texts, valid_path=tmp_path / "nowhere.jsonl"))


def test_a_tokenizer_that_is_missing(train, tmp_path, texts):
    with pytest.raises(ValueError, match="tokenizer"):
        train("train_pretrain", tiny_flags(tmp_path, texts, tokenizer_path=tmp_path / "nowhere"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_leave_the_last_good_state(train, tmp_path, texts, monkeypatch, what):
    """The fourth step goes wrong; what was saved after the second is still there and can be resumed."""
    calls, pretrain_loss = [], train_pretrain.pretrain_loss

    def spoilt(token_losses, aux_loss, batch):
        cross_entropy, aux = pretrain_loss(token_losses, aux_loss, batch)
        calls.append(1)
        if len(calls) == 4:
            if what == "loss":
                return cross_entropy * math.nan, aux
            token_losses.register_hook(lambda grad: grad * math.inf)
        return cross_entropy, aux

    monkeypatch.setattr(train_pretrain, "pretrain_loss", spoilt)
    flags = tiny_flags(tmp_path / "spoilt", texts, save_interval=2)
    with pytest.raises(FloatingPointError, match=f"{what}.*untouched.*--learning_rate"):
        train("train_pretrain", flags)
    state = read_resume(tmp_path / "spoilt")
    assert state["progress"] == {"step": 2, "tokens": state["progress"]["tokens"], "complete": False}
    assert read_sidecar(tmp_path / "spoilt" / "pretrain_32.pth")["progress"]["step"] == 2
    monkeypatch.undo()
    train("train_pretrain", [*flags, "--resume"])
    train("train_pretrain", tiny_flags(tmp_path / "whole", texts))
    assert_identical(read_resume(tmp_path / "spoilt"), read_resume(tmp_path / "whole"))


@pytest.mark.parametrize("flags", [{}, {"save_interval": 1}])
def test_a_learning_rate_that_is_far_too_high(launcher, tmp_path, texts, flags):
    """A message and a bad exit status; no file holds the weights that it led to."""
    child = launcher.start("train_pretrain", tiny_flags(tmp_path, texts, learning_rate=1e30, **flags))
    assert child.wait() == 1
    assert "error: " in child.output and "Traceback" not in child.output
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob("resume/*"))


def test_all_processes_stop_when_one_meets_numbers_that_are_not_finite(launcher, tmp_path, texts):
    children = launcher.start_ranks(2, "train_pretrain", tiny_flags(tmp_path, texts, learning_rate=1e30))
    assert [child.wait() for child in children] == [1, 1]
    assert "--learning_rate" in children[0].output and "--learning_rate" in children[1].output


# --- the long ones ---------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_wandb_offline(launcher, tmp_path, texts):
    flags = tiny_flags(tmp_path / "out", texts, use_wandb=True, wandb_project="tests")
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    launcher.run("train_pretrain", flags, env=env)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
    launcher.run("train_pretrain", tiny_flags(tmp_path / "two", texts, use_wandb=True), 2, env=env)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2, "one run per job, not per process"


def note_memory(module) -> None:
    """Writes the largest anonymous memory (MB) that was seen after a step."""
    optimizer_step, peak = module.optimizer_step, [0]

    def step(*arguments):
        norm = optimizer_step(*arguments)
        with open("/proc/self/status") as file:
            anonymous = int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) // 1024
        peak[0] = max(peak[0], anonymous)
        with open(os.environ["MEMORY"], "w") as file:
            file.write(str(peak[0]))
        return norm

    module.optimizer_step = step


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(launcher, tmp_path):
    peaks = []
    for megabytes in (30, 300):
        path = tmp_path / f"{megabytes}.jsonl"
        block = write_texts(tmp_path / "block.jsonl", 4000, 120, seed=megabytes).read_bytes()
        with path.open("wb") as file:
            for _ in range(megabytes * 10**6 // len(block)):
                file.write(block)
        out = tmp_path / str(megabytes)
        env = {"MEMORY": str(tmp_path / "memory")}
        flags = tiny_flags(out, path, max_steps=30, max_seq_len=256)
        launcher.run("train_pretrain", flags, env=env, patches=[note_memory], seconds=900)
        peaks.append(int((tmp_path / "memory").read_text()))
        path.unlink()
    print(peaks)
    assert peaks[1] - peaks[0] <= 50, peaks
