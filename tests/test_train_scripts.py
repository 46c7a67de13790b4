"""The stages as they are run: their losses by hand, what they write, what they say when something is wrong."""

import errno
import functools
import io
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
    DISTILLATION,
    DPO,
    FULL_SFT,
    LORA,
    PRETRAIN,
    REASON,
    ROOT,
    SPEEDS,
    assert_identical,
    each_stage,
    read_log,
    read_resume,
    relative_error,
    replace_step,
    run_python,
    sharp_model,
    tiny_flags,
    write_conversations,
    write_data,
    write_jsonl,
    write_texts,
)

from dataset.packing import PackedBatches, build_plan
from dataset.progress import ProgressBar
from dataset.token_cache import open_token_cache
from model.model_lora import apply_lora
from model.model_minimind import MiniMindConfig
from model.weights import load_model, load_weights, read_sidecar, save_weights, sidecar_path
from trainer import tracking, train_full_sft, train_pretrain
from trainer.arguments import out_of_memory
from trainer.loader import model_inputs
from trainer.logger import hours
from trainer.token_losses import token_cross_entropy

# --- losses ----------------------------------------------------------------------------------------------------------


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


def preference_documents(path, tokenizer, row: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of chosen, rejected, chosen, ...; targets are the answer's, not those of the prompt."""
    documents = []
    for line in path.read_text("utf-8").splitlines():
        pair = json.loads(line)
        for turns in (pair["chosen"], pair["rejected"]):
            ids, _ = tokenizer.encode_conversation(turns)
            prompt = len(tokenizer.encode_prompt(turns[:-1]))
            answer = len(tokenizer.encode_contents([turns[-1]["content"]])[0]) + 1  # and its eos
            labels = [-100] * (prompt - 1) + ids[prompt : prompt + answer]
            documents.append((ids[:-1], labels + [-100] * (len(ids) - 1 - len(labels))))
            assert len(ids) <= row
    return documents


DOCUMENTS = {
    "pretrain": pretrain_documents,
    "conversation": conversation_documents,
    "reasoning": conversation_documents,
    "preference": preference_documents,
}


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
        ce, aux = loss_of(output.head_output, output.aux_loss, batch)
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
    r"([\d,]+) tokens/s, MFU (\d+)%, grad_norm (\d+\.\d+), padding (\d+\.\d)%, waiting (\d+\.\d)%"
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
        assert float(line[11]) == pytest.approx(100 * record["waiting"], abs=0.1) and 0 < record["waiting"] < 1
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


def test_a_progress_bar_with_the_same_loss_as_the_lines(train, tmp_path, texts, capsys, monkeypatch):
    """On a terminal; elsewhere its first line comes after half a minute."""
    train("train_pretrain", tiny_flags(tmp_path / "a", texts, log_interval=5))
    assert not capsys.readouterr().err
    notes, update = [], ProgressBar.update

    def noting(bar, amount=1, note=None):
        if bar.desc.startswith("training"):
            notes.append(note)
        update(bar, amount, note)

    monkeypatch.setattr(ProgressBar, "update", noting)
    monkeypatch.setattr(ProgressBar, "refresh", lambda bar, **_: print(bar, file=bar.fp))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train("train_pretrain", tiny_flags(tmp_path / "b", texts, log_interval=5))
    shown = capsys.readouterr().err
    assert "training: " in shown and "saving: " in shown
    lines = [f"loss {record['loss']:.4f}, " for record in read_log(tmp_path / "b")]
    assert len(notes) == 10 and notes[4].startswith(lines[0]) and notes[9].startswith(lines[1])
    assert re.fullmatch(r"loss \d\.\d{4}, [\d,]+ tokens/s", notes[3])


def test_hours():
    assert [hours(seconds) for seconds in (0, 29, 31, 3599, 11220)] == ["0:00", "0:00", "0:01", "1:00", "3:07"]


def layer_keys(use_moe: bool) -> set[str]:
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    projections = {f"{name}_proj.weight" for name in ("gate", "up", "down")}
    if not use_moe:
        return attention | norms | {f"mlp.{name}" for name in projections}
    owners = [f"mlp.experts.{e}" for e in range(4)] + ["mlp.shared_experts.0"]
    return attention | norms | {"mlp.gate.weight"} | {f"{owner}.{name}" for owner in owners for name in projections}


def adapter_keys(use_moe: bool) -> set[str]:
    """Every linear layer of a block except the router."""
    layers = {key.removesuffix(".weight") for key in layer_keys(use_moe) if key.endswith("_proj.weight")}
    return {f"{layer}.lora.{side}.weight" for layer in layers for side in "AB"}


@pytest.mark.parametrize("use_moe", [False, True])
@each_stage()
def test_what_a_run_writes(train, tmp_path, inputs, tokenizer, stage, use_moe):
    """The files, their keys and dtypes, and what the sidecar says."""
    flags = inputs(stage, use_moe)
    train(stage.script, tiny_flags(tmp_path, **flags, batch_size=8))
    name = stage.name(use_moe)
    state = torch.load(tmp_path / f"{name}.pth", weights_only=True)
    ends, layer = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}, layer_keys(use_moe)
    if stage is LORA:
        ends, layer = set(), adapter_keys(use_moe)
    assert state.keys() == ends | {f"model.layers.{i}.{key}" for i in range(2) for key in layer}
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    if stage is not LORA:
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])

    sidecar = read_sidecar(tmp_path / f"{name}.pth")
    assert sidecar["stage"] == stage.stem and sidecar["tokenizer_sha256"] == tokenizer.sha256
    config = MiniMindConfig(**sidecar["config"])
    assert (config.hidden_size, config.num_hidden_layers, config.use_moe) == (32, 2, use_moe)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (4, 2, tokenizer.vocab_size)
    documents = DOCUMENTS[stage.data](flags["data_path"], tokenizer, flags["max_seq_len"])
    tokens = sum(len(inputs) for inputs, _ in documents)
    assert sidecar["progress"] == {"step": 5, "tokens": tokens, "complete": True}
    assert sidecar["metrics"]["loss"] == read_log(tmp_path, name)[-1]["loss"]
    assert sidecar["flags"]["learning_rate"] == 2e-3 and sidecar["flags"]["data_path"] == str(flags["data_path"])
    assert sidecar["versions"]["torch"] == torch.__version__
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    written = {path for path in written if not path.startswith("token_cache/")}
    folder, _, stem = name.rpartition("/")
    lock = "/".join(filter(None, ("resume", folder, f".{stem}.lock")))
    assert written == {f"{name}.pth", f"{name}.json", f"logs/{name}.jsonl", f"resume/{name}.resume", lock}


COMMON_METRICS = {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "padding", "waiting", "aux_loss", "tokens"}
COMMON_METRICS |= SPEEDS
OWN_METRICS = {
    DPO: {"reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "kl"},
    DISTILLATION: {"ce", "kl"},
}


@each_stage()
def test_metrics_of_every_stage(train, tmp_path, inputs, stage, capsys):
    """Those of the log file are on the screen too."""
    train(stage.script, tiny_flags(tmp_path, **inputs(stage), max_steps=2))
    own = OWN_METRICS.get(stage, set())
    records, lines = read_log(tmp_path, stage.name()), capsys.readouterr().out.splitlines()
    lines = [line for line in lines if LINE.search(line)]
    assert len(records) == len(lines) == 2
    for record, line in zip(records, lines, strict=True):
        assert record.keys() == {"event", "step", "epoch"} | COMMON_METRICS | own
        shown = dict(re.findall(r", (\w+) (-?\d+\.\d{4})", line.split("padding")[1]))
        assert shown.keys() == own
        for name, value in shown.items():
            assert float(value) == pytest.approx(record[name], abs=1e-4)


def first_step(train, out_dir, stage, flags) -> dict:
    """What is logged of the first step."""
    train(stage.script, tiny_flags(out_dir, **flags, max_steps=1))
    return read_log(out_dir, stage.name(flags["use_moe"]))[0]


@pytest.mark.parametrize("use_moe", [False, True])
def test_first_losses_of_the_stages_agree(train, tmp_path, inputs, use_moe):
    """Data, weights and batches are the same, and nothing is learnt before the first step."""
    flags = inputs(FULL_SFT, use_moe)
    sft = first_step(train, tmp_path, FULL_SFT, flags)
    same = {
        "an adapter begins as the identity": first_step(train, tmp_path, LORA, flags),
        "tags that weigh 1": first_step(train, tmp_path, REASON, flags | {"tag_weight": 1.0}),
        "cross-entropy alone": first_step(
            train, tmp_path, DISTILLATION, inputs(DISTILLATION, use_moe) | flags | {"alpha": 1.0}
        ),
    }
    for reason, record in same.items():
        for name in ("loss", "aux_loss", "padding"):
            assert record[name] == pytest.approx(sft[name], rel=1e-6), reason
    assert (sft["aux_loss"] > 0.1) == use_moe


def test_the_logged_distillation_loss_is_the_sum_of_its_parts(train, tmp_path, inputs):
    record = first_step(train, tmp_path, DISTILLATION, inputs(DISTILLATION) | {"alpha": 0.3, "temperature": 1.5})
    assert record["kl"] > 0.01
    assert record["loss"] == pytest.approx(0.3 * record["ce"] + 0.7 * 1.5**2 * record["kl"], rel=1e-5)


def test_tags_weigh_more(train, tmp_path, inputs):
    """The loss is linear in their weight."""
    one, ten, four = (
        first_step(train, tmp_path / str(weight), REASON, inputs(REASON) | {"tag_weight": weight})["loss"]
        for weight in (1.0, 10.0, 4.0)
    )
    assert ten > one + 1 and four == pytest.approx(one + (ten - one) / 3, rel=1e-5)


def test_data_without_tags_is_said_before_training(train, tmp_path, inputs, chats, capsys):
    train("train_distill_reason", tiny_flags(tmp_path, **inputs(REASON) | {"data_path": chats, "max_steps": 1}))
    said = capsys.readouterr().out.split("Epoch:")[0]
    assert "chats.jsonl holds no <think> </think> <answer> </answer>; nothing in it teaches to think first" in said


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


@pytest.mark.parametrize("use_moe", [False, pytest.param(True, marks=pytest.mark.full)])
@each_stage(PRETRAIN, LORA, DPO, DISTILLATION)
def test_bfloat16_learns_as_float32_does(train, tmp_path, inputs, stage, use_moe, monkeypatch):
    monkeypatch.setattr("model.device.cpu_has_bfloat16", lambda: True)  # emulated where the processor has none
    name = stage.name(use_moe)
    for dtype in ("float32", "bfloat16"):
        train(stage.script, tiny_flags(tmp_path / dtype, **inputs(stage, use_moe) | {"dtype": dtype, "batch_size": 8}))
    losses = [[r["loss"] for r in read_log(tmp_path / dtype, name)] for dtype in ("float32", "bfloat16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0], "it is float32"
    trained = read_resume(tmp_path / "bfloat16", name)["model"]
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


@each_stage(DPO)
def test_float16_on_a_cpu_is_float32_and_says_so(train, tmp_path, inputs, stage, capsys):
    for dtype in ("float32", "float16"):
        train(stage.script, tiny_flags(tmp_path / dtype, **inputs(stage) | {"dtype": dtype, "max_steps": 2}))
        said = "float16 training needs CUDA: training in float32 on cpu" in capsys.readouterr().out
        assert said == (dtype == "float16")
    ours, theirs = (read_resume(tmp_path / dtype, stage.name())["model"] for dtype in ("float16", "float32"))
    assert_identical(ours, theirs)


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


def trained_model(out_dir, stage, base=None):
    """The model that a run ended with, in float32."""
    model = sharp_model()
    if stage is LORA:
        load_weights(model, base)
        apply_lora(model)
    missing, unexpected = model.load_state_dict(read_resume(out_dir, stage.name())["model"], strict=False)
    assert not unexpected and (stage is LORA or not missing)
    return model.eval()


def target_log_probs(model, documents) -> list[torch.Tensor]:
    """The log-probs of each document's targets, the documents taken one by one."""
    result = []
    with torch.no_grad():
        for inputs, labels in documents:
            labels = torch.tensor(labels)
            log_probs = F.log_softmax(model(input_ids=torch.tensor([inputs])).logits[0], dim=-1)
            result.append(log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels >= 0])
    return result


HELD_OUT = {"max_steps": 4, "eval_interval": 2, "sample_prompt": "the old king", "batch_size": 3}


@each_stage(PRETRAIN, FULL_SFT, LORA, without=(DPO,))
def test_held_out_loss_and_bits_per_byte(train, tmp_path, inputs, tokenizer, stage, capsys):
    """Against the final weights and the held-out documents one by one; bytes are those of the text itself."""
    flags = inputs(stage)
    valid = write_data(stage.data, tmp_path / "valid.jsonl", count=9, longest=6, seed=3)
    train(stage.script, tiny_flags(tmp_path, **flags | HELD_OUT | {"valid_path": valid}))
    records = [json.loads(line) for line in valid.read_text("utf-8").splitlines()]
    texts = [record["text"] for record in records if "text" in record]
    turns = [turn for record in records for turn in record.get("conversations", ())]
    texts += [turn["content"] for turn in turns if turn["role"] == "assistant"]
    num_bytes = sum(len(text.encode()) for text in texts)

    model = trained_model(tmp_path, stage, flags.get("base_weight"))
    log_probs = torch.cat(target_log_probs(model, DOCUMENTS[stage.data](valid, tokenizer, flags["max_seq_len"])))
    loss, nats = -float(log_probs.mean()), -float(log_probs.sum())
    evaluations = read_log(tmp_path, stage.name(), "evaluation")
    assert [record["step"] for record in evaluations] == [2, 4]
    assert evaluations[-1]["valid_loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert evaluations[1]["valid_loss"] < evaluations[0]["valid_loss"]
    printed = capsys.readouterr().out
    assert f"valid loss {loss:.4f}" in printed and printed.count("sample: 'the old king' -> ") == 2
    assert read_sidecar(tmp_path / f"{stage.name()}.pth")["metrics"]["valid_loss"] == evaluations[-1]["valid_loss"]


@pytest.mark.parametrize("logp", ["sum", "mean"])
def test_held_out_preferences(train, tmp_path, inputs, tokenizer, logp, capsys):
    """Against the final policy, the reference, and the answers one by one."""
    flags = inputs(DPO)
    valid = write_data("preference", tmp_path / "valid.jsonl", count=9, seed=3)
    train(DPO.script, tiny_flags(tmp_path, **flags | HELD_OUT | {"valid_path": valid, "beta": 0.3, "logp": logp}))
    documents = preference_documents(valid, tokenizer, flags["max_seq_len"])
    models = trained_model(tmp_path, DPO), load_model(flags["reference_weight"])[0].eval()
    policy, reference = (target_log_probs(model, documents) for model in models)
    drift = torch.stack([(ours - theirs).mean() for ours, theirs in zip(policy, reference, strict=True)]).mean()
    reduce = torch.mean if logp == "mean" else torch.sum
    policy, reference = (torch.stack([reduce(t) for t in tokens]).view(-1, 2) for tokens in (policy, reference))
    margin = 0.3 * (policy - reference) @ torch.tensor([1.0, -1.0])
    expected = {
        "valid_loss": (1 + (-margin).exp()).log().mean(),
        "valid_reward_margin": margin.mean(),
        "valid_reward_accuracy": (margin > 0).float().mean(),
        "valid_logp_chosen": policy[:, 0].mean(),
        "valid_logp_rejected": policy[:, 1].mean(),
        "valid_kl": drift,
    }
    evaluations = read_log(tmp_path, DPO.name(), "evaluation")
    assert [record["step"] for record in evaluations] == [2, 4]
    for name, value in expected.items():
        assert evaluations[-1][name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    assert evaluations[-1].keys() == {"event", "time", "step", "sample", *expected}
    printed = capsys.readouterr().out
    assert f"valid reward margin {expected['valid_reward_margin']:.4f}" in printed and printed.count("sample:") == 2
    metrics = read_sidecar(tmp_path / f"{DPO.name()}.pth")["metrics"]
    assert metrics["valid_reward_accuracy"] == evaluations[-1]["valid_reward_accuracy"]


@each_stage(PRETRAIN, DPO)
def test_evaluating_changes_no_weight(train, tmp_path, inputs, stage):
    flags, name = inputs(stage, use_moe=True) | {"max_steps": 4}, stage.name(use_moe=True)
    valid = write_data(stage.data, tmp_path / "valid.jsonl", count=9, seed=3)
    train(stage.script, tiny_flags(tmp_path / "without", **flags))
    flags |= {"valid_path": valid, "eval_interval": 1, "sample_prompt": "花"}
    train(stage.script, tiny_flags(tmp_path / "with", **flags))
    states = [read_resume(tmp_path / folder, name) for folder in ("without", "with")]
    assert_identical(*states)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_stage(PRETRAIN, DPO)
def test_held_out_metrics_are_the_same_on_two_processes(launcher, tmp_path, inputs, stage, dtype):
    valid = write_data(stage.data, tmp_path / "valid.jsonl", count=9, seed=3)
    flags = inputs(stage) | {"valid_path": valid, "max_steps": 1, "learning_rate": 1e-12, "dtype": dtype}
    for world_size in (1, 2):
        line = tiny_flags(tmp_path / str(world_size), **flags | {"batch_size": 4 // world_size})
        launcher.run(stage.script, line, world_size)
    one, two = (read_log(tmp_path / str(n), stage.name(), "evaluation")[-1] for n in (1, 2))
    assert one.keys() == two.keys()
    for name in one.keys() - SPEEDS - {"event", "step", "sample"}:
        assert two[name] == pytest.approx(one[name], rel=1e-5 if dtype == "float32" else 5e-3, abs=1e-5), name


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


def test_sft_may_start_from_nothing_and_pretraining_from_anything(train, tmp_path, texts, chats):
    # no float32 weight moves at this rate; some lie so close to a border of float16 that 1e-12 moves them across
    sft, base = tmp_path / "full_sft_32.pth", tmp_path / "base.pth"
    train("train_full_sft", tiny_flags(tmp_path, chats, base_weight="none", learning_rate=1e-30))
    train("train_pretrain", tiny_flags(tmp_path, texts, learning_rate=1e-30))
    assert_identical(torch.load(sft), torch.load(tmp_path / "pretrain_32.pth"))  # the same seed, the same first weights
    save_weights(base, sharp_model(False), read_sidecar(sft))
    for name in (base, "full_sft"):
        flags = tiny_flags(tmp_path, texts, learning_rate=1e-30, base_weight=name, lr_schedule="wsd")
        train("train_pretrain", flags)
        said = base if name == base else sft
        assert_identical(torch.load(tmp_path / "pretrain_32.pth"), torch.load(said))
    with pytest.raises(ValueError, match="neither a .pth file nor a stage"):
        train("train_pretrain", tiny_flags(tmp_path, texts, base_weight="nowhere"))


def test_wsd_holds_the_rate_and_falls_at_the_end(train, tmp_path, texts):
    flags = {"lr_schedule": "wsd", "decay_ratio": 0.5, "warmup_iters": 0, "log_interval": 1, "max_steps": 6}
    train("train_pretrain", tiny_flags(tmp_path, texts, **flags))
    rates = [record["lr"] for record in read_log(tmp_path, "pretrain_32")]
    assert rates[:4] == [rates[0]] * 4 and rates[3] > rates[4] > rates[5] == pytest.approx(rates[0] / 10)


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


def odd_weights(path, tokenizer, use_moe: bool = True):
    """Weights of another theta, eps and routing than ours, which no tensor shows."""
    fields = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "num_experts_per_tok": 1, "norm_topk_prob": False}
    model = sharp_model(use_moe)
    model = type(model)(MiniMindConfig(**model.config.to_diff_dict() | fields))
    save_weights(path, model, {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256})
    return fields


@each_stage(FULL_SFT, DPO, PRETRAIN)
def test_what_the_base_is_goes_on_into_what_is_trained(train, tmp_path, inputs, tokenizer, stage):
    fields = odd_weights(tmp_path / "base.pth", tokenizer)
    flags = inputs(stage, use_moe=True) | {"base_weight": tmp_path / "base.pth", "max_steps": 1}
    flags.pop("reference_weight", None)
    train(stage.script, tiny_flags(tmp_path / "out", **flags))
    config = read_sidecar(tmp_path / "out" / f"{stage.name(True)}.pth")["config"]
    assert {name: config[name] for name in fields} == fields
    if stage is DPO:
        assert read_log(tmp_path / "out", stage.name(True))[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


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
    assert not list(tmp_path.glob("*.pth")) and not list(tmp_path.glob("resume/*.resume"))


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

    def make(take_step):
        peak = [0]

        def step(*arguments):
            norm = take_step(*arguments)
            with open("/proc/self/status") as file:
                anonymous = int(re.search(r"RssAnon:\s+(\d+) kB", file.read())[1]) // 1024
            peak[0] = max(peak[0], anonymous)
            with open(os.environ["MEMORY"], "w") as file:
                file.write(str(peak[0]))
            return norm

        return step

    replace_step(make)


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


# --- nothing that prints or logs may end a run -----------------------------------------------------------------------


def test_a_console_that_lacks_characters(tmp_path):
    """What it cannot show is replaced: of a path, a sample, and our own lines."""
    data = write_texts(tmp_path / "天气.jsonl", 8)
    flags = tiny_flags(tmp_path / "输出", data, max_steps=1, sample_prompt="花", valid_path=data)
    done = run_python("trainer/train_pretrain.py", *flags, PYTHONIOENCODING="cp437", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "1 step of 4 rows (4 ? 1" in done.stdout and "??.jsonl" in done.stdout and "sample: " in done.stdout
    assert (tmp_path / "输出" / "pretrain_32.pth").exists()


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError("nobody reads this")


def test_a_terminal_that_is_gone(train, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=3))
    monkeypatch.undo()
    assert len(read_log(tmp_path)) == 3 and (tmp_path / "pretrain_32.pth").exists()


def test_a_full_disk_costs_log_lines_and_not_the_run(train, tmp_path, texts, monkeypatch, capsys):
    """Half of a line fits, then none; later there is room again."""
    written, write = [], io.FileIO.write

    def full(file, line):
        written.append(line)
        if len(written) in (2, 3):
            if len(written) == 2:
                write(file, line[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, line)

    monkeypatch.setattr(tracking, "append", full)
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=4))
    assert capsys.readouterr().out.count("No space left on device") == 1
    lines = (tmp_path / "logs" / "pretrain_32.jsonl").read_text("utf-8").splitlines()
    read = [json.loads(line) for line in lines if line.endswith("}")]
    assert [record.get("step") for record in read] == [None, 3, 4, 4]
    assert sum(not line.endswith("}") for line in lines) == 1, "the half line stays alone"


def test_a_half_line_of_a_killed_run_stays_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1')
    for number in (2, 3):
        assert tracking.JsonLines(path).write({"step": number}) == ""
    assert path.read_text("utf-8").splitlines() == ['{"step": 1', '{"step": 2}', '{"step": 3}']


@pytest.mark.parametrize("flag", ["batch_size", "accumulation_steps"])
def test_sizes_far_beyond_the_data_are_refused(train, tmp_path, chats, flag):
    with pytest.raises(ValueError, match=f"--{flag} 1000000000: far more than .*chats.jsonl has, [0-9]+ rows"):
        train("train_pretrain", tiny_flags(tmp_path, write_texts(tmp_path / "chats.jsonl", 9), **{flag: 10**9}))


def test_too_little_memory_is_a_message():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")
    assert out_of_memory(error).startswith("CUDA out of memory. Tried to allocate 20.00 GiB. Lower --batch_size and ")
    assert "Lower --batch_size" in out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert out_of_memory(RuntimeError("shapes do not match")) == ""


def test_notes_before_training_starts(train, tmp_path, texts, capsys):
    train("train_pretrain", tiny_flags(tmp_path, texts, max_steps=1, warmup_iters=5, batch_size=64))
    said = capsys.readouterr().out.split("Epoch:")[0]
    assert "note: --warmup_iters 5: the run has 1 step" in said and "note: one step takes 64 rows" in said
