"""What only a GPU can run: the packed attention kernel, compiling, grouped experts, float16 with a scaler."""

import argparse
import contextlib
import functools
import importlib
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DISTILLATION,
    DPO,
    LORA,
    REASON,
    SPEEDS,
    assert_identical,
    read_log,
    read_resume,
    relative_error,
    sharp_model,
    tiny_flags,
    write_data,
    write_weights,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.batching import Engine
from model.generation import SamplingParams, stream
from model.model_lora import apply_lora, lora_layers, merge_lora
from model.model_minimind import HAS_VARLEN, AttentionPlan, MiniMindConfig, MiniMindForCausalLM
from trainer import train_dpo, train_full_sft, train_pretrain
from trainer.evaluation import sample_text
from trainer.muon import GroupedMuon
from trainer.optimization import Precision, build_optimizer
from trainer.teacher import Teacher
from trainer.token_losses import chunked_loss, target_indices, token_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; run it on one: pytest tests/test_cuda.py"
    ),
]


@pytest.fixture(autouse=True)
def compiled_anew():
    """torch counts what it compiles over all models of a process and gives up after eight."""
    torch._dynamo.reset()


def packed_batch(lengths=(5, 70, 1, 52, 96, 32), seq=128, rows=2, vocab=97):
    """Two rows of 128: documents of these lengths, one after the other, none of them in both rows."""
    assert rows * seq == sum(lengths) and seq in np.cumsum(lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (rows, seq), generator=generator)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), rows * seq], dtype=torch.int32)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {
        "input_ids": ids,
        "position_ids": positions.view(rows, seq),
        "document_ids": numbers.view(rows, seq),
        "cu_seqlens": borders,
        "max_seqlen": seq,
    }


def gradients(model, batch, device, dtype, loss_weight):
    model = model.to(device)
    model.zero_grad()
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        head = functools.partial(token_cross_entropy, labels=batch["input_ids"].roll(-1, 1))
        out = model(**batch, head=head)
        loss = out.head_output.mean() + loss_weight * out.aux_loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])


@pytest.mark.parametrize("use_moe", [False, True])
def test_packed_step_on_the_gpu_equals_the_cpu_in_float32(use_moe):
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=128, num_hidden_layers=2, vocab_size=97, use_moe=use_moe)
    model = MiniMindForCausalLM(config)
    torch.backends.cuda.matmul.allow_tf32 = False
    loss_cpu, grad_cpu = gradients(model, packed_batch(), "cpu", torch.float32, 1.0)
    loss_gpu, grad_gpu = gradients(model, packed_batch(), "cuda", torch.float32, 1.0)
    assert loss_gpu == pytest.approx(loss_cpu, rel=1e-5)
    assert (grad_gpu - grad_cpu).norm() <= 1e-4 * grad_cpu.norm()


@pytest.mark.skipif(not HAS_VARLEN, reason="this torch has no varlen_attn with enable_gqa")
def test_varlen_attention_is_chosen_in_bfloat16_and_equals_float32():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=128, num_hidden_layers=2, vocab_size=97))
    batch = packed_batch()
    hidden = torch.zeros(2, 128, 128, device="cuda", dtype=torch.bfloat16)
    assert AttentionPlan.packed(batch["cu_seqlens"].cuda(), 128, hidden, 16).kind == "varlen"
    assert AttentionPlan.packed(batch["cu_seqlens"].cuda(), 128, hidden, 12).kind == "mask"
    loss32, grad32 = gradients(model, batch, "cuda", torch.float32, 0.0)
    loss16, grad16 = gradients(model, batch, "cuda", torch.bfloat16, 0.0)
    assert loss16 == pytest.approx(loss32, rel=1e-2)
    assert (grad16 - grad32).norm() <= 0.05 * grad32.norm()


def test_masked_and_float32_attention_take_the_memory_efficient_kernel():
    model = sharp_model(hidden_size=128, scale=1.0).cuda()
    ids = torch.randint(3, 97, (2, 64), device="cuda")
    with torch.no_grad(), sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        plain = model(ids).logits
        padded = model(ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0], device="cuda"), 0))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert (model(ids).logits - plain).norm() <= 1e-2 * plain.norm()
    assert padded.logits[:, 1:].isfinite().all()


def test_a_sample_in_training_compiles_nothing(tmp_path, tokenizer):
    model = sharp_model(hidden_size=128, scale=1.0).cuda()
    model.model.compile(dynamic=False)
    torch._dynamo.utils.counters.clear()
    sample_text(model, tokenizer, Precision("bfloat16", torch.device("cuda")), [1, 5, 9], max_new_tokens=12)
    assert not torch._dynamo.utils.counters["stats"]


def test_grouped_experts_equal_sliced_experts():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(hidden_size=128, num_hidden_layers=1, vocab_size=97, use_moe=True)
    ).cuda()
    mlp = model.model.layers[0].mlp
    x = torch.randn(64, 128, device="cuda")
    counts = torch.tensor([20, 0, 40, 4], device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        grouped = mlp._grouped(x, counts)
        sliced = torch.cat([e(part) for e, part in zip(mlp.experts, x.split(counts.tolist()), strict=True)])
    assert (grouped - sliced).float().norm() <= 0.02 * sliced.float().norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("use_moe", ["false", "true"])
def test_pretrain_and_sft_on_the_gpu_compiled(tmp_path, dtype, use_moe):
    texts = [{"text": f"数字{i}之后是{i + 1}。" * (1 + i % 7)} for i in range(200)]
    turns = [
        {"conversations": [{"role": "user", "content": f"{i}加1？"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(200)
    ]
    for name, records in (("pretrain", texts), ("sft", turns)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    flags = ["--hidden_size", "128", "--num_hidden_layers", "2", "--max_seq_len", "128", "--batch_size", "4"]
    flags += ["--epochs", "2", "--learning_rate", "1e-3", "--accumulation_steps", "2", "--log_interval", "1"]
    flags += ["--dtype", dtype, "--use_moe", use_moe, "--out_dir", str(tmp_path)]
    train_pretrain.main(["--data_path", str(tmp_path / "pretrain.jsonl"), *flags])
    train_full_sft.main(["--data_path", str(tmp_path / "sft.jsonl"), *flags])
    suffix = "_moe" if use_moe == "true" else ""
    log = (tmp_path / "logs" / f"pretrain_128{suffix}.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, log) if record["event"] == "step"]
    assert losses[-1] < losses[0]
    assert (tmp_path / f"full_sft_128{suffix}.pth").exists()


@pytest.mark.parametrize("use_moe", [False, True])
def test_muon_in_groups_is_torchs_muon(use_moe):
    models = [sharp_model(use_moe=use_moe, hidden_size=128, scale=1.0).cuda() for _ in range(2)]
    settings = {"optimizer": "muon", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    ours, theirs = (
        build_optimizer(model, argparse.Namespace(**settings, embedding_lr_scale=1.0)).parts[0] for model in models
    )
    assert isinstance(ours, GroupedMuon)
    before = [[p.detach().clone() for p in group["params"]] for group in ours.param_groups][0]
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    ours.step()
    torch.optim.Muon.step(theirs)
    for start, a, b in zip(before, ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert (a - b).norm() <= 0.02 * (b - start).norm()


# --- LoRA, DPO, reason distillation, knowledge distillation ----------------------------------------------------------


@pytest.fixture
def stage_flags(tmp_path, tokenizer):
    """stage_flags(stage, use_moe): data and the weights that a stage starts from; sizes that all kernels take."""

    def flags(stage, use_moe: bool) -> dict:
        sizes = {"use_moe": use_moe, "hidden_size": 128, "scale": 1.0}
        values = {"hidden_size": 128, "max_seq_len": 128, "use_moe": use_moe, "accumulation_steps": 2, "epochs": 2}
        values["data_path"] = write_data(stage.data, tmp_path / "data.jsonl", count=60)
        values["base_weight"] = write_weights(tmp_path / "base.pth", tokenizer, **sizes)
        if stage is DPO:
            values["reference_weight"] = write_weights(tmp_path / "reference.pth", tokenizer, seed=1, **sizes)
        if stage is DISTILLATION:
            values["teacher_weight"] = write_weights(tmp_path / "teacher.pth", tokenizer, seed=2, **sizes)
        return values

    return flags


def run(stage, out_dir, **flags) -> list[dict]:
    """The stage's main in this process; what it logged of every step."""
    importlib.import_module(f"trainer.{stage.script}").main(tiny_flags(out_dir, **flags))
    return read_log(out_dir, stage.name(flags["use_moe"], 128))


NEW_STAGES = pytest.mark.parametrize("stage", [LORA, DPO, REASON, DISTILLATION], ids=lambda stage: stage.script)


@pytest.mark.parametrize("use_moe", [False, True])
@NEW_STAGES
def test_first_step_of_a_stage_on_the_gpu_equals_the_cpu(tmp_path, stage_flags, stage, use_moe):
    flags = stage_flags(stage, use_moe) | {"max_steps": 1, "compile": False}
    cpu, gpu = (run(stage, tmp_path / device, **flags, device=device)[0] for device in ("cpu", "cuda"))
    # products of float32 matrices are TF32 on a GPU; a pair whose margin is near 0 may change sides
    names = SPEEDS | {"event", "step", "epoch", "lr", "padding", "reward_accuracy"}
    for name in cpu.keys() - names:
        assert gpu[name] == pytest.approx(cpu[name], rel=0.05 if name == "grad_norm" else 5e-3, abs=2e-2), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("use_moe", [False, True])
@NEW_STAGES
def test_a_stage_on_the_gpu_compiled(tmp_path, stage_flags, stage, use_moe, dtype):
    rate = {DPO: 1e-4}.get(stage, 2e-3)
    flags = stage_flags(stage, use_moe) | {"dtype": dtype, "device": "cuda", "learning_rate": rate}
    losses = [record["loss"] for record in run(stage, tmp_path / "out", **flags)]
    assert losses[-1] < losses[0]
    state = torch.load(tmp_path / "out" / f"{stage.name(use_moe, 128)}.pth", weights_only=True)
    assert not any("_orig_mod" in key for key in state)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_stage_resumed_on_the_gpu_goes_on_where_it_was(tmp_path, stage_flags, broken_off, capsys):
    flags = stage_flags(LORA, False) | {"dtype": "bfloat16", "device": "cuda", "compile": False, "save_interval": 2}
    run(LORA, tmp_path / "whole", **flags)
    broken_off(LORA.script, tiny_flags(tmp_path / "parts", **flags), 4)
    run(LORA, tmp_path / "parts", **flags, resume=True)
    assert "is at step 2; going on" in capsys.readouterr().out
    ours, theirs = (read_resume(tmp_path / name, LORA.name(False, 128)) for name in ("parts", "whole"))
    assert_identical([ours[name] for name in ("rng", "progress")], [theirs[name] for name in ("rng", "progress")])
    assert relative_error(ours["model"], theirs["model"]) < 1e-2  # kernels may sum in another order


@pytest.mark.parametrize("use_moe", [False, True])
def test_distillation_from_what_the_teacher_said_once(tmp_path, stage_flags, use_moe):
    """All tokens but one are kept: the same loss as with the teacher in memory, up to the float16 on disk."""
    flags = stage_flags(DISTILLATION, use_moe) | {"device": "cuda", "compile": False, "max_steps": 2}
    live, kept = (run(DISTILLATION, tmp_path / str(k), **flags, cache_teacher=k) for k in (0, 6399))
    for ours, theirs in zip(kept, live, strict=True):
        for name in ("loss", "ce", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=1e-3), name


@contextlib.contextmanager
def waiting_for_the_gpu_raises():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_places_of_targets_are_found_without_waiting_for_the_gpu():
    labels = torch.full((2, 64), -100, device="cuda")
    labels[0, 3:9], labels[1, 60:] = 5, 7
    batch = {"labels": labels, "target_tokens": 10}
    with waiting_for_the_gpu_raises():
        places = target_indices(batch)
    assert places.tolist() == [*range(3, 9), *range(124, 128)]


def test_what_frozen_models_said_is_fetched_without_waiting_for_the_gpu():
    """DPO's reference and the kept teacher: all on the GPU but the numbers of pairs and rows."""
    args, reference = train_dpo.parse([]), np.random.default_rng(0).random((6, 2), np.float32)
    losses, labels = torch.rand(2, 64), torch.full((2, 64), -100)
    numbers = torch.arange(4, dtype=torch.int32).repeat_interleave(32).view(2, 64).clone()
    numbers[:, 60:], labels[:, 20:28], labels[:, 40:50] = -1, 5, 7
    batch = {"pair_ids": torch.tensor([4, 1]), "row_ids": torch.tensor([2, 0]), "document_ids": numbers}
    batch |= {"labels": labels, "target_tokens": 36}
    teacher = Teacher.__new__(Teacher)
    ids = np.arange(40_000, 40_012, dtype=np.uint16).reshape(6, 2)
    teacher.kept = argparse.Namespace(arrays={"token_ids": ids, "log_probs": reference.astype(np.float16)})
    teacher.ends = np.array([2, 3, 6])

    def fetched(losses, batch):
        said = teacher.log_probs(batch, target_indices(batch))(slice(None))
        return *train_dpo.preference_loss(losses, batch, reference, args), *said

    expected = fetched(losses, batch)
    on_gpu = {name: batch[name].cuda() for name in ("document_ids", "labels")}
    losses = losses.cuda()
    with waiting_for_the_gpu_raises():
        found = fetched(losses, batch | on_gpu)
    assert expected[3][:, 0].tolist() == [40_006, 40_008, 40_010, 40_000, 40_002]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs)


def test_chunked_loss_on_the_gpu_equals_full_logits():
    torch.manual_seed(0)
    hidden = torch.randn(2500, 64, device="cuda", requires_grad=True)  # three chunks, the last one ragged
    weight = (0.2 * torch.randn(500, 64, device="cuda")).requires_grad_()
    labels = torch.randint(500, (2500,), device="cuda")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        loss = chunked_loss(
            hidden, weight, lambda logits, c: F.cross_entropy(logits, labels[c], reduction="sum").view(1), losses=1
        )[0]
        ours = torch.autograd.grad(loss, (hidden, weight))
        full = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
        theirs = torch.autograd.grad(full, (hidden, weight))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert float(loss) == pytest.approx(float(full), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_adapters_of_experts_take_part_in_bfloat16(monkeypatch):
    """The grouped product knows no adapters, so a layer with them goes expert by expert; merged, it is used again."""
    model = sharp_model(use_moe=True, hidden_size=128, scale=1.0).cuda()
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in packed_batch().items()}

    def outputs():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model.model(**batch).last_hidden_state.float()

    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k))
    plain = outputs()
    assert calls, "the grouped product is used without adapters"
    apply_lora(model, rank=8)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora.B.weight, std=0.05)
    calls.clear()
    adapted = outputs()
    assert not calls
    merge_lora(model)
    merged = outputs()
    assert calls
    assert (adapted - merged).norm() <= 0.05 * merged.norm()
    assert (adapted - plain).norm() >= 0.2 * plain.norm(), "the adapter does something"


@pytest.mark.parametrize("use_moe", [False, True])
def test_engine_on_the_gpu_answers_as_on_the_cpu(use_moe):
    """Greedy and sampled, texts that pass a power of two of keys, and every step a recorded graph."""
    model = sharp_model(use_moe=use_moe, hidden_size=128, scale=1.0).eval().requires_grad_(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (5, 250, 40, 9, 120)]
    params = [
        SamplingParams(temperature=n % 2, top_p=0.9, frequency_penalty=0.1, max_new_tokens=20, stop_ids=(), seed=n)
        for n in range(5)
    ]
    expected = [list(stream(model, prompt, p)) for prompt, p in zip(prompts, params, strict=True)]
    engine = Engine(model.cuda(), slots=4, context_length=300)
    requests = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    answers = [[token.id for token in request] for request in requests]
    # a rounding that decides a tie changes the rest of its text
    assert sum(a == b for a, b in zip(answers, expected, strict=True)) >= 4
    assert len(engine._decoder.graphs) > 1
    assert all(graph is not None for graph, _ in engine._decoder.graphs.values())


def test_engine_on_the_gpu_in_bfloat16_follows_the_models_forward():
    model = sharp_model(hidden_size=128, scale=1.0).eval().requires_grad_(False).cuda().bfloat16()
    engine = Engine(model, slots=2, context_length=64)
    ids = list(range(5, 35))
    engine._decoder.prefill(1, ids[:-1], 0)
    with torch.inference_mode():
        logits = engine._decoder.decode_one_token([1], ids[-1:], [len(ids) - 1])
        expected = model(torch.tensor([ids], device="cuda")).logits[:, -1].float()
    assert (logits - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_engines_on_the_first_and_the_last_device_answer_alike():
    """Neither is made the current device, and each records its graphs."""
    model = sharp_model(hidden_size=128, scale=1.0).eval().requires_grad_(False)
    prompts, answers = [list(range(5, 35)), list(range(40, 60))], []
    params = SamplingParams(temperature=0, max_new_tokens=20, stop_ids=())
    for number in (0, torch.cuda.device_count() - 1):
        engine = Engine(model.to(f"cuda:{number}"), slots=3, context_length=64)
        requests = [engine.submit(prompt, params) for prompt in prompts]
        answers.append([[token.id for token in request] for request in requests])
        assert engine._decoder.graphs and all(graph is not None for graph, _ in engine._decoder.graphs.values())
    assert answers[0] == answers[1]


def test_a_step_waits_for_the_gpu_once():
    model = sharp_model(hidden_size=128, scale=1.0).eval().requires_grad_(False).cuda()
    engine = Engine(model, slots=4, context_length=64)
    params = [
        SamplingParams(max_new_tokens=20, stop_ids=(), **fields)
        for fields in ({"temperature": 0}, {}, {"top_p": 0.9, "top_k": 5}, {"frequency_penalty": 0.1})
    ]
    requests = [engine.submit(list(range(5, 25)), p) for p in params]
    for _ in range(3):  # prompts, the recording of the graph, what is made once
        engine.step()
    assert all(request._next_id is not None for request in requests)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("called a synchronizing" in str(warning.message) for warning in caught) == 5
