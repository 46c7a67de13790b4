"""The architecture: against the original implementation's numbers, against transformers' Llama, and against itself."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from model import model_minimind
from model.model_minimind import (
    MINIMIND3,
    PRESETS,
    AttentionPlan,
    DocumentIndex,
    HeadsFirstRotation,
    MiniMindConfig,
    MiniMindForCausalLM,
    RMSNormFunction,
    recomputed,
    rotate,
)

COMPAT = Path(__file__).parent / "compat"
VOCAB = 97


def tiny_config(**fields) -> MiniMindConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MiniMindConfig(**{**sizes, "vocab_size": VOCAB, "max_position_embeddings": 1024, **fields})


def tiny_model(seed: int = 0, **fields) -> MiniMindForCausalLM:
    """Weights larger than at the start of training, so that attention and routing are far from uniform."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(tiny_config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4)
    return model.eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by sharing their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MINIMIND3_TINY = {**MINIMIND3, "num_key_value_heads": 2, "aux_loss_alpha": 0.1}
SHAPES = {
    "dense": {},
    "moe": {"use_moe": True},
    "minimind3": MINIMIND3_TINY,
    "minimind3_moe": {**MINIMIND3_TINY, "use_moe": True},
}
each_kind = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# --- against other implementations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_logits_and_aux_loss_of_the_original(name):
    config = MiniMindConfig(**json.loads((COMPAT / f"{name}_config.json").read_text()))
    model = MiniMindForCausalLM(config)
    model.load_state_dict(torch.load(COMPAT / f"{name}.pth", weights_only=True), strict=True)
    expected = torch.load(COMPAT / f"{name}_expected.pt", weights_only=True)
    with torch.no_grad():
        outputs = model.eval()(expected["input_ids"])
        torch.testing.assert_close(outputs.logits, expected["logits"], atol=1e-4, rtol=0)
        assert outputs.aux_loss == 0
        if name == "moe":
            aux_loss = model.train()(expected["input_ids"]).aux_loss
            torch.testing.assert_close(aux_loss, expected["aux_loss"], atol=1e-4, rtol=0)


def test_logits_equal_transformers_llama():
    model = tiny_model()
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    input_ids = random_ids(2, 200)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-5, rtol=1e-5)


# --- sizes and configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, millions, width",
    [
        ("minimind2_26m", 25.83, 1408),
        ("minimind2_104m", 104.03, 2048),
        ("minimind2_moe", 145.03, 1728),
        ("minimind3", 63.91, 2432),
        ("minimind3_moe", 198.42, 2432),
    ],
)
def test_parameter_counts_of_the_presets(preset, millions, width):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**PRESETS[preset]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert model.config.intermediate_size == width


def test_default_config_is_the_26m_preset():
    config = MiniMindConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (512, 8, 6400)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert config.intermediate_size == 1408
    assert (config.rope_theta, config.max_position_embeddings, config.rms_norm_eps) == (1e6, 32768, 1e-5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings and not config.use_moe


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 510}, "hidden_size 510 is not divisible by num_attention_heads 8.*--hidden_size"),
        ({"hidden_size": 72}, "is odd.*--hidden_size to a multiple of 16"),
        ({"num_key_value_heads": 3}, "not divisible by num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"use_moe": True, "num_experts_per_tok": 5}, "num_experts_per_tok 5 must lie .* n_routed_experts 4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"dropout": 0.1}, "dropout=0.1 is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported"),
        ({"hidden_size": "512"}, "hidden_size must be .* a whole number.*, got '512'"),
        ({"num_attention_heads": True}, "num_attention_heads must be"),
        ({"head_dim": 15}, "head.* is 15: it is odd"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
        ({"aux_loss_alpha": [0.1]}, "aux_loss_alpha must be"),
        ({"use_moe": "yes"}, "use_moe must be true or false"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor must be a number"),
        ({"rope_dtype": "int8"}, "rope_dtype must be float32 or float16"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MiniMindConfig(**fields)


# --- what forward takes and gives ------------------------------------------------------------------------------------


def test_loss_is_the_shifted_cross_entropy_and_ignores_100():
    model, input_ids = tiny_model(), random_ids(2, 9)
    labels = input_ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        outputs = model(input_ids, labels=labels)
    log_probs = outputs.logits.log_softmax(-1)
    by_hand = [-log_probs[b, t, labels[b, t + 1]] for b in range(2) for t in range(8) if labels[b, t + 1] != -100]
    torch.testing.assert_close(outputs.loss, torch.stack(by_hand).mean())
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(input_ids, labels=labels, logits_to_keep=1)


def test_logits_to_keep_and_head():
    model, input_ids = tiny_model(), random_ids(2, 9)
    with torch.no_grad():
        logits = model(input_ids).logits
        torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, logits[:, -3:])
        seen = model(input_ids, head=lambda hidden, weight: F.linear(hidden, weight) * 2)
    torch.testing.assert_close(seen.head_output, logits * 2)
    assert seen.logits is None  # the field of that name holds logits or nothing


def test_embedding_and_head_are_one_tensor():
    model = tiny_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@each_kind
def test_left_padding_changes_nothing(shape):
    model = tiny_model(**shape)
    lengths = [5, 12, 1, 9]
    rows = [random_ids(1, n, seed=n) for n in lengths]
    padded = torch.cat([F.pad(row, (12 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (12 - n) + [1] * n for n in lengths])
    with torch.no_grad():
        together = model(padded, attention_mask=mask).logits
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(logits[-row.shape[1] :], model(row).logits[0], atol=1e-5, rtol=1e-5)


@each_kind
def test_right_padding_changes_nothing_and_does_not_count_in_the_aux_loss(shape):
    model = tiny_model(**shape).train()
    input_ids = random_ids(1, 10)
    mask = torch.tensor([[1] * 10 + [0] * 6])
    with torch.no_grad():
        alone, padded = model(input_ids), model(F.pad(input_ids, (0, 6)), attention_mask=mask)
    torch.testing.assert_close(padded.logits[:, :10], alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.aux_loss, alone.aux_loss)
    assert (alone.aux_loss > 0) == model.config.use_moe


@each_kind
def test_causal(shape):
    model = tiny_model(**shape)
    input_ids = random_ids(1, 30)
    changed = input_ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(input_ids).logits, model(changed).logits
    # Other tokens in an expert's product round its results differently; a leak would show at once, as below.
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 20], after[:, 20], atol=1e-3)


# --- packed documents ------------------------------------------------------------------------------------------------

# lengths of the documents of each row, and the row length; what is left of a row is padding
PACKINGS = {
    "odd": ([[7, 1, 23], [30, 2]], 37),
    "across_tiles": ([[100, 60, 140], [257, 13], [64, 64, 128, 44]], 300),
    "one_document_a_row": ([[128], [128]], 128),
    "longer_than_tiles": ([[400], [129, 127, 143]], 401),
    "full_rows": ([[128, 128], [64, 192]], 256),
}


def pack(name: str):
    """The documents as single rows, and the batch as the data path builds it."""
    rows, seq = PACKINGS[name]
    documents, borders, number = [], [0], 0
    input_ids = torch.zeros(len(rows), seq, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    position_ids, document_ids = torch.zeros_like(input_ids), torch.full_like(input_ids, -1, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            ids = random_ids(length + 1, seed=100 + number)
            documents.append((ids[:-1], ids[1:]))
            place = (row, slice(start, start + length))
            input_ids[place], labels[place] = documents[-1]
            position_ids[place], document_ids[place] = torch.arange(length), number
            start, number = start + length, number + 1
            borders.append(row * seq + start)
        if start < seq:
            position_ids[row, start:] = torch.arange(seq - start)
            borders.append((row + 1) * seq)
    borders += [len(rows) * seq] * 3  # borders are padded to a fixed count
    batch = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "document_ids": document_ids,
        "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        "max_seqlen": seq,
    }
    return documents, batch, labels


def use_mask_path(monkeypatch):
    """Lets a CPU take the path of other devices: a mask for scaled_dot_product_attention instead of tiles."""
    original = AttentionPlan.packed.__func__
    gpu = {"device": SimpleNamespace(type="cuda"), "is_cuda": False, "dtype": torch.float32}

    def packed(cls, cu_seqlens, max_seqlen, hidden_states, head_dim):
        elsewhere = SimpleNamespace(shape=hidden_states.shape, **gpu)
        plan = original(cls, cu_seqlens, max_seqlen, elsewhere, head_dim)
        assert plan.kind == "mask"
        return plan

    monkeypatch.setattr(AttentionPlan, "packed", classmethod(packed))


def loss_and_gradients(model, run):
    model.zero_grad()
    losses, logits = run()
    losses.backward()
    return losses.detach(), logits, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "head_dim, capability, built, kind",
    [
        (64, (8, 0), True, "varlen"), (256, (9, 0), True, "varlen"), (64, (7, 5), True, "mask"),
        (64, (8, 9), False, "mask"), (12, (8, 0), True, "mask"), (264, (9, 0), True, "mask"),
    ],
)  # fmt: skip
def test_the_variable_length_kernel_is_taken_where_it_is_there_and_fits(head_dim, capability, built, kind, monkeypatch):
    monkeypatch.setattr(model_minimind, "HAS_VARLEN", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    gpu = SimpleNamespace(
        device=SimpleNamespace(type="cuda", index=0), is_cuda=True, dtype=torch.bfloat16, shape=(1, 8, head_dim)
    )
    borders = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert AttentionPlan.packed(borders, 8, gpu, head_dim).kind == kind


@each_kind
@pytest.mark.parametrize("path", ["tiles", "mask"])
@pytest.mark.parametrize("name", PACKINGS)
def test_packed_equals_unpacked(name, path, shape, monkeypatch):
    """Loss, logits, every gradient and the balance loss: as if each document were a batch of its own."""
    if path == "mask":
        use_mask_path(monkeypatch)
    model = tiny_model(**shape).train()
    documents, batch, labels = pack(name)
    per_document = model.config.seq_aux  # MiniMind-3 balances its experts over the batch, which packing makes larger

    def one_by_one():
        nats, aux, logits = 0.0, 0.0, []
        for ids, targets in documents:
            outputs = model(ids.unsqueeze(0))
            nats = nats + F.cross_entropy(outputs.logits[0], targets, reduction="sum")
            aux = aux + outputs.aux_loss
            logits.append(outputs.logits[0].detach())
        return nats / (labels >= 0).sum() + per_document * aux / len(documents), torch.cat(logits)

    def together():
        outputs = model(**batch)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) + per_document * outputs.aux_loss
        return loss, outputs.logits[batch["document_ids"] >= 0].detach()

    loss, logits, gradients = loss_and_gradients(model, one_by_one)
    packed_loss, packed_logits, packed_gradients = loss_and_gradients(model, together)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_logits, logits, atol=2e-5, rtol=1e-5)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for parameter, gradient in gradients.items():
        if parameter.endswith("mlp.gate.weight") and not per_document:  # the one chosen expert's weight is always 1
            assert max(gradient.norm(), packed_gradients[parameter].norm()) < 1e-6 * total
            continue
        difference = (packed_gradients[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert difference < 2e-5, parameter


@each_kind
@pytest.mark.parametrize("path", ["tiles", "mask"])
def test_nothing_leaks_between_documents(path, shape, monkeypatch):
    """The gradient of one document's logits is exactly zero at every other document and at the padding."""
    if path == "mask":
        use_mask_path(monkeypatch)
    model = tiny_model(**shape)
    _, batch, _ = pack("across_tiles")
    input_ids, document_ids = batch.pop("input_ids"), batch["document_ids"]
    for document in (0, 1, 4, 8):
        inputs = model.model.embed_tokens(input_ids).detach().requires_grad_()
        own = document_ids == document
        model(inputs_embeds=inputs, **batch).logits[own].square().sum().backward()
        assert (inputs.grad[own].abs().sum(-1) > 0).all()
        assert (inputs.grad[~own] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
def test_tiles_under_autocast(dtype):
    """The CPU's own attention in half precision: near the float32 result, with finite gradients."""
    model = tiny_model().train()
    _, batch, labels = pack("across_tiles")

    def run():
        logits = model(**batch).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), logits

    exact, _, gradients = loss_and_gradients(model, run)
    with torch.autocast("cpu", dtype=dtype):
        half, _, half_gradients = loss_and_gradients(model, run)
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=0)
    for parameter, gradient in gradients.items():
        assert (half_gradients[parameter] - gradient).norm() < 0.1 * gradient.norm(), parameter


# --- functions written by hand for training on a CPU, with their gradients -------------------------------------------


def test_the_norm_and_its_gradients_are_those_of_torch():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    upstream = torch.randn(3, 7, 16)
    ours = RMSNormFunction.apply(x, weight, 1e-5, torch.float32)
    theirs = F.rms_norm(x.double(), (16,), weight.double(), 1e-5)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(ours, (x, weight), upstream)
    expected = torch.autograd.grad(theirs, (x, weight), upstream.double())
    for gradient, double in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, double, rtol=1e-5, atol=1e-6)


def test_the_heads_first_rotation_is_the_plain_one_with_its_gradient():
    torch.manual_seed(0)
    tokens, kv_heads, group, head_dim = 5, 2, 3, 8
    x = torch.randn(tokens, kv_heads, group, head_dim, requires_grad=True)
    angles = torch.rand(tokens, head_dim // 2)
    plain = rotate(x.view(1, tokens, kv_heads * group, head_dim), angles.cos()[None], angles.sin()[None])
    plain = plain.view(x.shape).transpose(0, 1)
    ours = HeadsFirstRotation.apply(x, angles.cos(), angles.sin())
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(plain.shape)
    gradients = [torch.autograd.grad(result, x, upstream)[0] for result in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


# --- mixture of experts ----------------------------------------------------------------------------------------------


def test_experts_chosen_by_hand():
    """One token: the two likeliest of four experts, weighted by their renormalised scores, plus the shared expert."""
    model = tiny_model(use_moe=True)
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        scores = F.linear(x[0, 0], layer.gate.weight).softmax(-1)
        first, second = scores.argsort(descending=True)[:2].tolist()
        total = scores[first] + scores[second]
        expected = scores[first] / total * layer.experts[first](x) + scores[second] / total * layer.experts[second](x)
        out, _ = layer(x, None)
        torch.testing.assert_close(out, expected + layer.shared_experts[0](x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("counts", [[10, 3, 0, 7], [20, 0, 0, 0], [5, 5, 5, 5]], ids=str)
def test_grouped_product_equals_the_slices(counts):
    layer = tiny_model(use_moe=True).model.layers[0].mlp
    inputs = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(4))
    weight = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(5))
    results = []
    for product in (
        lambda x: layer._grouped(x, torch.tensor(counts)),
        lambda x: torch.cat([e(part) for e, part in zip(layer.experts, x.split(counts), strict=True)]),
    ):
        layer.zero_grad()
        x = inputs.clone().requires_grad_()
        out = product(x)
        (out * weight).sum().backward()  # a contiguous gradient, which grouped_mm's backward on a CPU needs
        gradients = [p.grad.clone() for expert in layer.experts for p in expert.parameters()]
        results.append([out.detach(), x.grad, *gradients])
    for grouped, sliced in zip(*results, strict=True):
        torch.testing.assert_close(grouped, sliced, atol=1e-4, rtol=1e-4)


def test_experts_without_tokens_get_zero_gradients():
    """Zero, not None: optimizers and gradient averaging over ranks need a gradient for each parameter."""
    model = tiny_model(use_moe=True).train()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        layer.gate.weight.zero_()  # equal scores: ties go to the same two experts for every token
    outputs = model(random_ids(1, 12))
    chosen = set(layer.gate(torch.randn(5, 64))[1].flatten().tolist())
    assert len(chosen) == 2
    outputs.logits.sum().backward()
    for number, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (number in chosen)


def test_aux_loss_of_perfect_balance_and_of_collapse():
    """sum_e f_e · P_e is 1 where load and scores are even, the number of experts where all choose the same."""
    model = tiny_model(use_moe=True, num_hidden_layers=1, aux_loss_alpha=1.0, num_experts_per_tok=1).train()
    layer = model.model.layers[0].mlp
    gate = torch.zeros(4, 64)
    gate[2] = 1.0
    hidden = torch.ones(1, 6, 64)
    documents = DocumentIndex.build((1, 6), hidden.device)
    with torch.no_grad():
        layer.gate.weight.copy_(gate)  # scores 1 for expert 2, nearly 0 for the others
        torch.testing.assert_close(layer(hidden, documents)[1], torch.tensor(4.0), atol=1e-4, rtol=0)
        layer.gate.weight.zero_()
        torch.testing.assert_close(layer(hidden, documents)[1], torch.tensor(1.0), atol=1e-5, rtol=0)


@each_kind
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_transformers_switch_of_gradient_checkpointing_changes_nothing(shape):
    model = tiny_model(**shape).train()
    _, batch, labels = pack("odd")

    def run():
        outputs = model(**batch)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) + outputs.aux_loss
        return loss, outputs.logits

    loss, _, gradients = loss_and_gradients(model, run)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again, _, recomputed = loss_and_gradients(model, run)
    assert len(calls) == 2, "nothing was computed again in backward"
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(recomputed[parameter], gradient, rtol=1e-5, atol=1e-7)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_activations_changes_no_bit_of_a_gradient_and_keeps_less(shape, dtype):
    model = tiny_model(**shape).train()
    _, batch, labels = pack("longer_than_tiles")

    def run():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            outputs = model(**batch)
        return F.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten()) + outputs.aux_loss, None

    def kept_bytes():
        """What autograd holds after a forward: each storage once, parameters not counted."""
        kept = {p.data_ptr(): 0 for p in model.parameters()}

        def count(tensor):
            kept.setdefault(tensor.data_ptr(), tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss, _ = run()
        del loss
        return sum(kept.values())

    loss, _, gradients = loss_and_gradients(model, run)
    before = kept_bytes()
    model.recompute_activations()
    again, _, recomputed = loss_and_gradients(model, run)
    assert torch.equal(again, loss)
    for parameter, gradient in gradients.items():
        assert torch.equal(recomputed[parameter], gradient), parameter
    assert kept_bytes() < 0.8 * before
    model.recompute_activations(False)
    assert kept_bytes() == before


def test_a_recomputed_tensor_is_not_kept():
    gate, up = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    linear = torch.nn.Linear(8, 4, bias=False)
    expected = torch.autograd.grad(linear(gate * up).square().sum(), (gate, up, linear.weight))
    product = gate * up
    with recomputed(product, lambda: calls.append(1) or (gate * up).detach()):
        out = linear(product)
    calls, gone = [], weakref.ref(product)
    del product
    assert gone() is None
    for gradient, wanted in zip(
        torch.autograd.grad(out.square().sum(), (gate, up, linear.weight)), expected, strict=True
    ):
        assert torch.equal(gradient, wanted)
    assert calls == [1]


# --- save_pretrained and from_pretrained -----------------------------------------------------------------------------


@each_kind
def test_reload_gives_equal_logits(shape, tmp_path):
    model, input_ids = tiny_model(**shape), random_ids(2, 40)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reloaded, report = MiniMindForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(reloaded(input_ids).logits, model(input_ids).logits)
        assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
        half = MiniMindForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half(input_ids).logits, model.bfloat16()(input_ids).logits)


def test_saved_config_names_rope_theta(tmp_path):
    """Older runtimes do not read rope_parameters, and would assume 1e4."""
    tiny_model(rope_theta=5e5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 5e5
    assert MiniMindConfig.from_pretrained(tmp_path).rope_theta == 5e5


def test_exported_folder_runs_elsewhere_as_remote_code(tmp_path):
    """The folder alone is enough for AutoModelForCausalLM, in a process that knows nothing of this repository."""
    model, input_ids = tiny_model(use_moe=True), random_ids(1, 20)
    folder = tmp_path / "exported"
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save({"input_ids": input_ids, "logits": model(input_ids).logits}, tmp_path / "expected.pt")
    script = """
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True).eval()
assert model.__class__.__module__.startswith("transformers_modules"), model.__class__.__module__
with torch.no_grad():
    torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"])
assert model.generate(expected["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 20
print("equal")
"""
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "SYSTEMROOT": "C:\\Windows"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "equal"
