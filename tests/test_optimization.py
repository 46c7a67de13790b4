"""The optimizer step: the schedule by hand, parameter groups, precision, clipping, numbers that are none."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_identical, read_log, relative_error, tiny_flags
from torch import nn

from model import device as devices
from model.device import usable_dtype
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import muon
from trainer.distributed import Process
from trainer.evaluation import sample_text
from trainer.optimization import (
    Precision,
    blur_half_weights,
    build_optimizer,
    check_finite,
    learning_rate,
    optimizer_step,
    prepare_forward,
)
from trainer.training import start_training

CPU = torch.device("cpu")


def schedule(peak_lr: float, warmup: int, **changes) -> SimpleNamespace:
    flags = {"lr_schedule": "cosine", "min_lr_ratio": 0.1, "decay_ratio": 0.2}
    return SimpleNamespace(learning_rate=peak_lr, warmup_iters=warmup, **flags | changes)


def test_schedule_by_hand():
    """Ten steps, two of warm-up: 1/2, 1, then a cosine over the other eight from 1 down to 0.1."""
    rates = [learning_rate(step, 10, schedule(4.0, 2)) for step in range(10)]
    cosine = [4 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 7)) / 2) for i in range(8)]
    assert rates == pytest.approx([2.0, 4.0, *cosine], rel=1e-12)
    assert rates[2] == 4.0 and rates[-1] == pytest.approx(0.4, rel=1e-12)


def test_wsd_by_hand():
    """Ten steps, two of warm-up, four at the peak, and the last four fall to a tenth along 1 - sqrt."""
    rates = [learning_rate(step, 10, schedule(4.0, 2, lr_schedule="wsd", decay_ratio=0.4)) for step in range(10)]
    falling = [4 * (0.1 + 0.9 * (1 - math.sqrt(i / 3))) for i in range(4)]
    assert rates == pytest.approx([2.0, *[4.0] * 5, *falling], rel=1e-12)
    constant = [learning_rate(step, 10, schedule(4.0, 2, lr_schedule="wsd", decay_ratio=0.0)) for step in range(10)]
    assert constant == [2.0, *[4.0] * 9]


@pytest.mark.parametrize("lr_schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (2, 0), (7, 0), (7, 3), (7, 6), (3, 10), (100, 1)])
def test_schedule_never_exceeds_the_peak(total, warmup, lr_schedule):
    flags = schedule(5e-4, warmup, lr_schedule=lr_schedule, decay_ratio=0.3)
    rates = [learning_rate(step, total, flags) for step in range(total)]
    assert max(rates) <= 5e-4 and min(rates) > 0
    assert rates[0] == (5e-4 / warmup if warmup else 5e-4)
    if total > warmup + 1 and (lr_schedule == "cosine" or round(0.3 * total) > 1):
        assert rates[-1] == pytest.approx(5e-5, rel=1e-9)


def flags(**changes) -> SimpleNamespace:
    defaults = {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    defaults["embedding_lr_scale"] = 1.0
    return SimpleNamespace(**defaults | {"gradient_checkpointing": False, "compile": None, "zero_stage": 0} | changes)


def tiny_model(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    return MiniMindForCausalLM(MiniMindConfig(**sizes, **fields))


@pytest.mark.parametrize("use_moe", [False, True])
def test_matrices_decay_and_norms_do_not(use_moe):
    model = tiny_model(use_moe=use_moe)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    optimizer = build_optimizer(model, flags())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decay.pop(id(parameter)) == (0.0 if "norm" in name else 0.1), name
    assert not decay, "what is frozen is not the optimizer's"
    assert optimizer.defaults["betas"] == (0.9, 0.95)


def test_sgd_is_plain():
    model = tiny_model()
    optimizer = build_optimizer(model, flags(optimizer="sgd"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer_step(model, optimizer, Precision("float32", CPU), 0.25, grad_clip=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.125)


def fill_gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = tiny_model(use_moe=True)
    optimizer = build_optimizer(model, flags(optimizer="muon"))
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    owned = {id(p): group["weight_decay"] for group in muon.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in owned) == ("proj" in name or "gate.weight" in name), name
    rest = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert len(rest) + len(owned) == len(list(model.parameters())) and not owned.keys() & set(rest)
    fill_gradients(model, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer_step(model, optimizer, Precision("float32", CPU), 1e-3, grad_clip=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("elements", [1, 10**9])  # stacks of one matrix, and of all of a shape
def test_muon_in_groups_is_torchs_muon(elements, monkeypatch):
    """Up to roundings of bfloat16: batched products may add in another order (here they do not)."""
    monkeypatch.setattr(muon, "STACK_ELEMENTS", elements)
    monkeypatch.setattr(muon, "product_dtype", lambda device: torch.bfloat16)  # torch's, also where it is emulated
    before, *matrices = ([p for p in tiny_model(use_moe=True).parameters() if p.dim() == 2] for _ in range(3))
    assert len({tuple(sorted(p.shape)) for p in matrices[0]}) < len({p.shape for p in matrices[0]}), "some transposed"
    theirs = torch.optim.Muon(matrices[0], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = muon.GroupedMuon(matrices[1], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for index, (a, b) in enumerate(zip(*matrices, strict=True)):
            a.grad = None if step == index == 1 else torch.randn(a.shape, generator=generator)
            b.grad = a.grad
        theirs.step()
        ours.step()
    for start, a, b in zip(before, *matrices, strict=True):
        assert (a - b).norm() <= 5e-3 * (a - start).norm()
    assert_identical(ours.state_dict(), theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # float16 on GPUs without bfloat16
def test_newton_schulz_brings_all_singular_values_close_to_one(dtype, monkeypatch):
    monkeypatch.setattr(muon, "product_dtype", lambda device: dtype)
    stack = torch.randn(3, 48, 128, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1.0, 1e4]).view(
        3, 1, 1
    )
    found = muon.orthogonalise(stack, (3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.float())
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_embedding_may_learn_at_another_rate(name):
    models = [tiny_model(), tiny_model()]
    for model, scale in zip(models, (1.0, 4.0), strict=True):
        optimizer = build_optimizer(model, flags(optimizer=name, embedding_lr_scale=scale, weight_decay=0.0))
        fill_gradients(model, 0)
        optimizer_step(model, optimizer, Precision("float32", CPU), 1e-3, grad_clip=1.0)
        assert {group["lr"] for group in optimizer.param_groups} == {1e-3, scale * 1e-3}
        sizes = sorted(len(group["params"]) for group in optimizer.param_groups)
        assert sum(sizes) == len(list(model.parameters())) and (1 in sizes) == (name == "muon" or scale != 1)
    start, embedding = tiny_model().model.embed_tokens.weight, "model.embed_tokens.weight"
    plain, fast = (dict(model.named_parameters()) for model in models)
    torch.testing.assert_close(fast[embedding] - start, 4 * (plain[embedding] - start), rtol=1e-3, atol=1e-7)
    assert all(torch.equal(plain[key], fast[key]) for key in plain if key != embedding)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_restored_optimizer_goes_on_as_if_nothing_had_been(name, tmp_path):
    """Through a file, as a resume state is kept, with three steps before and three after."""
    models = [tiny_model(), tiny_model()]
    optimizers = [build_optimizer(model, flags(optimizer=name)) for model in models]
    precision = Precision("float32", CPU)
    for step in range(3):
        fill_gradients(models[0], step)
        optimizer_step(models[0], optimizers[0], precision, 1e-2, grad_clip=1.0)
    torch.save((models[0].state_dict(), optimizers[0].state_dict()), tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    models[1].load_state_dict(weights)
    optimizers[1].load_state_dict(state)
    for step in range(3, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, step)
            optimizer_step(model, optimizer, precision, 1e-2, grad_clip=1.0)
    assert_identical(models[1].state_dict(), models[0].state_dict())
    assert_identical(optimizers[1].state_dict(), optimizers[0].state_dict())


def test_frozen_weights_cost_no_gradient_of_their_own():
    """Counted by torch: 6 operations per trained number and token, 4 per frozen one (the first layers need less)."""
    from trainer.cost import count_parameters, flops_per_token

    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, 0) and flops_per_token(model.config, total) == 6 * total
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    trained = model.lm_head.weight.numel()
    assert count_parameters(model) == (total, total - trained)
    assert flops_per_token(model.config, total, total - trained) == 6 * trained + 4 * (total - trained)
    moe = tiny_model(use_moe=True)
    total, _ = count_parameters(moe)
    expert = sum(p.numel() for p in moe.model.layers[0].mlp.experts[0].parameters())
    active = total - 2 * 2 * expert  # two of four experts in each of two layers
    assert flops_per_token(moe.config, total) == 6 * active
    adapters = 1000
    assert flops_per_token(moe.config, total + adapters, total) == 4 * active + 6 * adapters


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("targets", [512, 1024])
def test_operations_are_those_that_torch_counts(targets, frozen_head):
    """Of a CPU's step whose 1024 tokens have 512 targets or are all targets, without attention."""
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.cost import count_parameters, flops_per_token, head_flops
    from trainer.token_losses import token_cross_entropy

    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MiniMindForCausalLM(config)
    model.lm_head.weight.requires_grad_(not frozen_head)
    labels = torch.where(torch.arange(1024) < targets, 5, -100).view(8, 128)
    with FlopCounterMode(display=False) as counter:
        inputs = model.model.embed_tokens(torch.full((8, 128), 7)).detach().requires_grad_(True)
        output = model(inputs_embeds=inputs, head=lambda hidden, weight: token_cross_entropy(hidden, weight, labels))
        output.head_output.sum().backward()
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    charged = flops_per_token(config, *count_parameters(model)) * 1024 - head_flops(model) * (1024 - targets)
    assert products == pytest.approx(charged, rel=1e-3)  # norms have no products


def linear_with_gradient(gradient: float) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.full((3, 3), gradient)
    return model, torch.optim.SGD(model.parameters(), lr=123.0)


@pytest.mark.parametrize("clip, step", [(1.0, 1 / 3), (0.0, 2.0), (100.0, 2.0)])
def test_gradients_are_clipped_by_their_norm_and_cleared(clip, step):
    model, optimizer = linear_with_gradient(2.0)  # norm 6
    norm = optimizer_step(model, optimizer, Precision("float32", CPU), lr=0.1, grad_clip=clip)
    assert norm == pytest.approx(6.0)
    torch.testing.assert_close(model.weight.detach(), torch.full((3, 3), -0.1 * step))
    assert model.weight.grad is None


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_any_weight_changes(value, clip):
    model, optimizer = linear_with_gradient(1.0)
    model.weight.grad[1, 1] = value
    with pytest.raises(FloatingPointError, match="gradient norm.*untouched.*--learning_rate"):
        optimizer_step(model, optimizer, Precision("float32", CPU), lr=0.1, grad_clip=clip)
    assert not model.weight.any()


def test_the_scaler_of_float16_skips_such_a_step_but_not_for_ever():
    precision = Precision("float32", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
    model, optimizer = linear_with_gradient(0.0)
    precision.backward(model(torch.ones(1, 3)).sum())
    assert float(model.weight.grad[0, 0]) == 4.0
    assert optimizer_step(model, optimizer, precision, lr=1.0, grad_clip=0) == pytest.approx(3.0)
    torch.testing.assert_close(model.weight.detach(), torch.full((3, 3), -1.0))
    with pytest.raises(FloatingPointError, match="gradient norm"):
        for _ in range(100):
            precision.backward(model(torch.full((1, 3), math.inf)).sum())
            optimizer_step(model, optimizer, precision, lr=1.0, grad_clip=0)
            torch.testing.assert_close(model.weight.detach(), torch.full((3, 3), -1.0))
    assert precision.scaler.get_scale() < 1e-3


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss):
    check_finite(3.0, 0)
    with pytest.raises(FloatingPointError, match="at step 8.*untouched.*--learning_rate"):
        check_finite(loss, 7)


def test_dtypes_that_the_device_lacks_are_replaced_and_named(monkeypatch):
    assert usable_dtype("float32", CPU) == (torch.float32, "")
    dtype, notice = usable_dtype("float16", CPU)
    assert dtype == torch.float32 and "needs CUDA" in notice
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    assert usable_dtype("bfloat16", CPU) == (torch.bfloat16, "")
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    dtype, notice = usable_dtype("bfloat16", CPU)
    assert dtype == torch.float32 and "no bfloat16" in notice
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    dtype, notice = usable_dtype("bfloat16", torch.device("cuda"))
    assert dtype == torch.float16 and "scaler" in notice


def test_bfloat16_is_autocast_without_a_scaler(monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    precision = Precision("bfloat16", CPU)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    assert not precision.scaler.is_enabled()
    with Precision("float32", CPU).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def rounding_step(weights: torch.Tensor, update: float) -> float:
    """How far an update moves weights once they are rounded to bfloat16; the update and the result in bfloat16 ulps."""
    ulp = torch.ldexp(torch.ones_like(weights), torch.frexp(weights).exponent - 8)
    return float((((weights + update * ulp).bfloat16().float() - weights.bfloat16().float()) / ulp).mean())


def test_weights_of_a_file_take_no_step_in_bfloat16_that_was_not_asked_for():
    """One number in eight is a tie: half of them flip at once, a step of 1/16 ulp whatever the learning rate."""
    layer = nn.Linear(600, 600, bias=False)
    half = torch.randn(600, 600, generator=torch.Generator().manual_seed(0)).half().float()
    layer.weight.data.copy_(half)
    assert rounding_step(layer.weight.data, 0.002) == pytest.approx(0.0625, rel=0.05)
    blur_half_weights(layer, seed=3)
    weights = layer.weight.data
    assert torch.equal(weights.bfloat16(), half.bfloat16())
    moved = (weights - half).abs() / torch.ldexp(torch.ones_like(half), torch.frexp(half).exponent - 11)
    assert moved.max() <= 0.5 and moved.mean() == pytest.approx(0.25, rel=0.01)  # float16 ulps
    for update in (0.002, -0.002, 0.02, 0.2):  # 360,000 weights: 720 of them flip for the smallest, give or take 27
        assert rounding_step(weights, update) == pytest.approx(update, rel=0.2)
    layer.weight.data.copy_(half)
    blur_half_weights(layer, seed=3)
    assert torch.equal(weights, layer.weight.data)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_only_matrices_of_a_file_that_train_in_bfloat16_are_blurred(monkeypatch, has_bfloat16):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: has_bfloat16)
    model, process = tiny_model(), Process(rank=0, local_rank=0, world_size=1, device=CPU)
    fresh = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.half())  # the embedding, too
        model.model.layers[0].mlp.up_proj.weight.zero_()
    of_file = model.lm_head.weight.clone()
    state = torch.get_rng_state()
    start_training(model, flags(dtype="bfloat16", grad_clip=1.0, seed=5), process)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.lm_head.weight, of_file) != has_bfloat16
    assert not model.model.layers[0].mlp.up_proj.weight.any()
    kept = [name for name, p in model.named_parameters() if torch.equal(p, fresh[name])]
    assert len(kept) == len(fresh) - 2


def loss_and_gradients(model) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    borders = torch.tensor([0, 10, 24, 30, 48, 48], dtype=torch.int32)
    output = model(input_ids=ids, cu_seqlens=borders, max_seqlen=24)
    loss = output.logits.logsumexp(-1).square().mean() + output.aux_loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_flag_gradient_checkpointing_recomputes_both_layers_and_changes_no_gradient(use_moe, monkeypatch):
    loss, gradients = loss_and_gradients(tiny_model(use_moe=use_moe))
    model = tiny_model(use_moe=use_moe)
    prepare_forward(model, flags(gradient_checkpointing=True), CPU)
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    loss_again, gradients_again = loss_and_gradients(model)
    assert len(calls) == 2, "both layers"
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_again, gradients) < 1e-6


def without_a_compiler(module) -> None:
    """As if there were no C++ compiler. (CXX was read when the process that this one is a copy of imported torch.)"""
    import torch._inductor.config

    torch._inductor.config.cpp.cxx = (None, "/nonexistent/c++")


@pytest.mark.full
@pytest.mark.parametrize("use_moe, works", [(False, True), (True, True), (False, False)])
def test_compiled_losses_are_the_same(launcher, tmp_path, texts, use_moe, works):
    """So are the names of the weights. Where compiling fails the run says so and goes on without."""
    flags = {"max_steps": 3, "num_hidden_layers": 1, "use_moe": use_moe}
    plain, compiled, cache = tmp_path / "plain", tmp_path / "compiled", tmp_path / "inductor"
    launcher.run("train_pretrain", tiny_flags(plain, texts, **flags))
    printed = launcher.run(
        "train_pretrain",
        tiny_flags(compiled, texts, compile=True, **flags),
        env={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        patches=[] if works else [without_a_compiler],
        seconds=500,
    )
    if works:
        assert list(cache.rglob("*.cpp")), f"nothing was compiled:\n{printed}"
    else:
        assert printed.count("C++ compiler") == 1 and "goes on without it" in printed  # one line, not hundreds
    name = "pretrain_32_moe" if use_moe else "pretrain_32"
    losses = [[line["loss"] for line in read_log(folder, name)] for folder in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert torch.load(compiled / f"{name}.pth").keys() == torch.load(plain / f"{name}.pth").keys()


def compiled_graphs(counters) -> int:
    return counters["stats"]["unique_graphs"]


def test_a_sample_in_training_compiles_nothing(tokenizer):
    """Every token is a new shape, and torch gives a model up that it had to compile for eight of them."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model = MiniMindForCausalLM(
        MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=tokenizer.vocab_size)
    )
    model.model.compile(dynamic=False, backend="eager")
    sample_text(model, tokenizer, Precision("bfloat16", CPU), [1, 5, 9], max_new_tokens=5)
    assert compiled_graphs(counters) == 0
    model(torch.tensor([[1, 5, 9]]))
    assert compiled_graphs(counters) > 0, "training is compiled all the same"


def test_a_compiled_mixture_is_not_compiled_anew_for_every_division_of_its_tokens():
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    model = tiny_model(use_moe=True)
    model.model.compile(dynamic=False, backend="eager")
    generator, graphs = torch.Generator().manual_seed(0), []
    for _ in range(4):
        counters.clear()
        model(torch.randint(3, 50, (2, 16), generator=generator)).logits.sum().backward()
        graphs.append(compiled_graphs(counters))
    assert graphs[0] > 0 and graphs[1:] == [0, 0, 0]
