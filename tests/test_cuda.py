"""What only a GPU can run: the packed attention kernel, compiling, grouped experts, float16 with a scaler."""

import functools
import json

import pytest
import torch

from model.model_minimind import HAS_VARLEN, AttentionPlan, MiniMindConfig, MiniMindForCausalLM
from trainer import train_full_sft, train_pretrain
from trainer.token_losses import token_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; run it on one: pytest tests/test_cuda.py"
    ),
]


def packed_batch(lengths=(5, 70, 1, 128, 52), seq=128, rows=2, vocab=97):
    """Two rows of 128: documents of these lengths, one after the other."""
    assert sum(lengths) == rows * seq
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
        loss = out.logits.mean() + loss_weight * out.aux_loss
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])


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
    hidden = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    assert AttentionPlan.packed(batch["cu_seqlens"].cuda(), 128, hidden, (2, 128)).kind == "varlen"
    loss32, grad32 = gradients(model, batch, "cuda", torch.float32, 0.0)
    loss16, grad16 = gradients(model, batch, "cuda", torch.bfloat16, 0.0)
    assert loss16 == pytest.approx(loss32, rel=1e-2)
    assert (grad16 - grad32).norm() <= 0.05 * grad32.norm()


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
