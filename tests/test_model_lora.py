"""Adapters: what they compute, what their files hold, what their training changes, and what peft makes of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_identical, read_log, read_resume, tiny_flags
from transformers import LlamaConfig, LlamaForCausalLM

from model.model_lora import (
    TARGETS,
    apply_lora,
    block_linears,
    find_lora,
    load_lora,
    lora_layers,
    lora_path,
    lora_state_dict,
    merge_lora,
    read_lora,
    remove_lora,
    save_lora,
    save_peft,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, read_sidecar, save_weights, sidecar_path
from trainer import train_lora

COMPAT = Path(__file__).parent / "compat"
IDS = torch.arange(3, 37).view(2, 17)


def small_model(use_moe: bool = False, **sizes) -> MiniMindForCausalLM:
    """Weights large enough that every layer matters to the logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97} | sizes
    model = MiniMindForCausalLM(MiniMindConfig(use_moe=use_moe, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 6.0)
    return model


def with_random_adapter(model: MiniMindForCausalLM, seed: int = 1, **options) -> MiniMindForCausalLM:
    """As after training: B is not zero."""
    torch.manual_seed(seed)
    apply_lora(model, **options)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora.B.weight.normal_(std=0.1)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def bits(model) -> dict[str, torch.Tensor]:
    """The base weights, whatever adapter is on them."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora." not in name}


# --- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_moe", [False, True])
def test_an_adapter_begins_as_the_identity_and_trains_alone(use_moe):
    model = small_model(use_moe)
    plain = logits(model)
    apply_lora(model, rank=4)
    assert torch.equal(logits(model), plain)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}
    assert {name.rsplit(".", 4)[1] for name in trained} == set(TARGETS)
    linears = [name for name, _ in block_linears(model)]
    assert len(trained) == 2 * len(linears) and len(linears) == 2 * (4 + 3 * (5 if use_moe else 1))


@pytest.mark.parametrize("use_moe", [False, True])
def test_outputs_are_those_of_the_formula_and_of_merged_weights(use_moe):
    """W + (alpha / rank) B A written out by hand; merging gives the same and leaves a plain model."""
    model = with_random_adapter(small_model(use_moe), rank=4, alpha=6)
    by_hand = small_model(use_moe)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            delta = 1.5 * layer.lora.B.weight.double() @ layer.lora.A.weight.double()
            by_hand.get_submodule(name).weight.add_(delta.float())
    adapted = logits(model)
    assert float((adapted - logits(small_model(use_moe))).abs().max()) > 0.1
    torch.testing.assert_close(adapted, logits(by_hand), rtol=1e-5, atol=1e-5)
    merge_lora(model)
    assert not list(lora_layers(model)) and all(type(layer) is torch.nn.Linear for _, layer in block_linears(model))
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)


def test_only_the_targets_get_an_adapter():
    model = apply_lora(small_model(), targets=("q_proj", "o_proj"))
    assert {name.rsplit(".", 1)[-1] for name, _ in lora_layers(model)} == {"q_proj", "o_proj"}


@pytest.mark.parametrize("targets, unknown", [(["q_proj", "w1"], "w1"), (["lm_head"], "lm_head"), ([], r"\(none\)")])
def test_targets_that_no_layer_has(targets, unknown):
    model = small_model()
    there = "down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj"
    with pytest.raises(ValueError, match=f"--lora_targets {unknown}: .*they have {there}"):
        apply_lora(model, targets=targets)
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_layers_with_a_bias_keep_it():
    """Ours have none; models in Hugging Face format may."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for _, layer in block_linears(model):
            if layer.bias is not None:
                layer.bias.normal_()
    plain = logits(model)
    apply_lora(model)
    assert torch.equal(logits(model), plain)
    remove_lora(model)
    assert torch.equal(logits(model), plain)


# --- files -----------------------------------------------------------------------------------------------------------


def test_adapter_of_the_original_gives_its_logits():
    expected = torch.load(COMPAT / "lora_expected.pt", weights_only=True)
    model = MiniMindForCausalLM(MiniMindConfig(**json.loads((COMPAT / "dense_config.json").read_text()))).eval()
    model.load_state_dict(torch.load(COMPAT / "dense.pth", weights_only=True))
    load_lora(model, COMPAT / "lora.pth")
    with torch.no_grad():
        ours = model(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(ours, expected["logits"], rtol=1e-4, atol=1e-4)
    remove_lora(model)
    with torch.no_grad():
        assert float((model(input_ids=expected["input_ids"]).logits - expected["logits"]).abs().max()) > 0.01


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_file_is_a_plain_state_dict_of_half_precision_with_the_scale_in_b(tmp_path, use_moe):
    model = with_random_adapter(small_model(use_moe), rank=4, alpha=12)
    save_lora(tmp_path / "a.pth", model)
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    layers = dict(lora_layers(model))
    assert state.keys() == {f"{name}.lora.{side}.weight" for name in layers for side in "AB"}
    for name, layer in layers.items():
        a, b = state[f"{name}.lora.A.weight"], state[f"{name}.lora.B.weight"]
        assert a.dtype == b.dtype == torch.float16
        assert a.shape == (4, layer.in_features) and b.shape == (layer.out_features, 4)
        torch.testing.assert_close(b.float(), 3 * layer.lora.B.weight, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.float(), layer.lora.A.weight, rtol=1e-3, atol=1e-6)
    assert ("model.layers.0.mlp.experts.1.up_proj.lora.A.weight" in state) == use_moe
    fresh = load_lora(small_model(use_moe), tmp_path / "a.pth")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=0.01, atol=0.01)


def test_ranks_and_targets_are_read_off_the_file(tmp_path):
    for rank, targets in ((2, ("q_proj", "o_proj")), (16, TARGETS)):
        save_lora(tmp_path / f"{rank}.pth", with_random_adapter(small_model(), rank=rank, targets=targets))
    model = small_model()
    for rank, count in ((2, 4), (16, 14), (2, 4)):
        load_lora(model, tmp_path / f"{rank}.pth")
        assert [layer.lora.A.out_features for _, layer in lora_layers(model)] == [rank] * count


def test_adapters_are_switched_without_touching_the_base(tmp_path):
    model = small_model()
    plain, base, places = logits(model), bits(model), {p.data_ptr() for p in model.parameters()}
    expected = {}
    for seed in (1, 2):
        other = with_random_adapter(small_model(), seed, rank=2 * seed)
        save_lora(tmp_path / f"{seed}.pth", other)
        expected[seed] = logits(load_lora(small_model(), tmp_path / f"{seed}.pth"))
    for seed in (1, 2, 1):
        load_lora(model, tmp_path / f"{seed}.pth")
        assert torch.equal(logits(model), expected[seed])
        assert_identical(bits(model), base)
    assert not torch.equal(expected[1], expected[2])
    remove_lora(model)
    assert torch.equal(logits(model), plain)
    assert {p.data_ptr() for p in model.parameters()} == places, "the base was copied"


def test_names_with_and_without_moe(tmp_path):
    dense, moe = (lora_path(tmp_path, "a", 32, use_moe) for use_moe in (False, True))
    assert (dense, moe) == (tmp_path / "lora" / "a_32.pth", tmp_path / "lora" / "a_32_moe.pth")
    save_lora(dense, with_random_adapter(small_model(True)))  # an old file: of experts, under the plain name
    assert find_lora("a", tmp_path, 32, True) == find_lora("a", tmp_path, 32, False) == dense
    load_lora(small_model(True), find_lora("a", tmp_path, 32, True))
    with pytest.raises(WeightsError, match="experts.*dense and mixture of experts"):
        load_lora(small_model(False), find_lora("a", tmp_path, 32, False))
    save_lora(moe, with_random_adapter(small_model(True)))
    assert find_lora("a", tmp_path, 32, True) == moe and find_lora("a", tmp_path, 32, False) == dense
    assert find_lora(str(moe), tmp_path / "elsewhere", 32, False) == moe


def test_a_missing_adapter_names_the_script_and_what_is_there(tmp_path):
    with pytest.raises(WeightsError, match="lora/b_32.pth not found; run trainer/train_lora.py.*holds: no adapters"):
        find_lora("b", tmp_path, 32, False)
    save_lora(tmp_path / "lora" / "a_32.pth", with_random_adapter(small_model()))
    with pytest.raises(WeightsError, match="lora/a_64.pth not found.*holds: a_32.pth"):
        find_lora("a", tmp_path, 64, False)
    with pytest.raises(WeightsError, match="b.pth not found.*train_lora.py"):
        find_lora(str(tmp_path / "b.pth"), tmp_path, 64, False)


def change(state: dict, key: str, tensor: torch.Tensor | None) -> dict:
    state = {**state, key: tensor}
    return {name: value for name, value in state.items() if value is not None}


KEY = "model.layers.1.self_attn.q_proj.lora.A.weight"
MISFITS = {
    "another width": (lambda s: lora_state_dict(apply_lora(small_model(hidden_size=64))), "--hidden_size"),
    "a deeper model": (lambda s: lora_state_dict(apply_lora(small_model(num_hidden_layers=3))), "layers.2.*depth"),
    "two ranks in a layer": (lambda s: change(s, KEY, torch.zeros(5, 32)), "ranks 5 and 8"),
    "half a pair": (lambda s: change(s, KEY, None), "not an adapter file .*layers.1.self_attn.q_proj"),
    "weights, not an adapter": (lambda s: small_model().state_dict(), "not an adapter file"),
    "an adapter among weights": (lambda s: s | small_model().state_dict(), "not an adapter file"),
}


@pytest.mark.parametrize("make, message", MISFITS.values(), ids=MISFITS)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path, make, message):
    save_weights(tmp_path / "a.pth", make(lora_state_dict(with_random_adapter(small_model()))))
    model = with_random_adapter(small_model())
    before = logits(model)
    with pytest.raises(WeightsError, match=message) as caught:
        load_lora(model, tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(caught.value)
    assert torch.equal(logits(model), before)


def test_an_adapter_of_a_shallower_model_is_not_put_on_the_first_layers(tmp_path):
    path, shallow = tmp_path / "a.pth", with_random_adapter(small_model())
    config = {name: value for name, value in shallow.config.to_diff_dict().items() if name == "num_hidden_layers"}
    save_lora(path, shallow, {"config": config})
    with pytest.raises(WeightsError, match="a model of 2 layers, this one has 3"):
        load_lora(small_model(num_hidden_layers=3), path)
    load_lora(small_model(), path)
    sidecar_path(path).unlink()  # an old file does not say what it was made for
    with pytest.warns(UserWarning, match="only some of this model's 3 layers"):
        load_lora(small_model(num_hidden_layers=3), path)


def test_an_adapter_of_another_tokenizer(tmp_path):
    save_lora(tmp_path / "a.pth", with_random_adapter(small_model()), {"tokenizer_sha256": "ab" * 32})
    load_lora(small_model(), tmp_path / "a.pth", "ab" * 32)
    with pytest.raises(WeightsError, match="a.pth was trained with the tokenizer abababababab.*--tokenizer_path"):
        load_lora(small_model(), tmp_path / "a.pth", "cd" * 32)


# --- peft ------------------------------------------------------------------------------------------------------------


def test_the_peft_layout_gives_the_same_logits_in_peft(tmp_path):
    """On transformers' Llama with the same weights: its parameters have our names."""
    from peft import PeftModel

    ours = small_model()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=ours.config.intermediate_size, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(ours.state_dict())
    torch.testing.assert_close(logits(llama), logits(ours), rtol=1e-5, atol=1e-5)

    with_random_adapter(ours, rank=4, alpha=10, targets=("q_proj", "v_proj", "down_proj"))
    save_peft(tmp_path, ours)
    adapted = PeftModel.from_pretrained(llama, tmp_path).eval()
    assert float((logits(ours) - logits(small_model())).abs().max()) > 0.1
    torch.testing.assert_close(logits(adapted), logits(ours), rtol=1e-5, atol=1e-5)


def test_the_peft_layout_has_no_place_for_experts_or_several_ranks(tmp_path):
    with pytest.raises(ValueError, match="dense models"):
        save_peft(tmp_path, apply_lora(small_model(True)))
    model = apply_lora(small_model())
    state = change(lora_state_dict(model), KEY, torch.zeros(2, 32))
    state[KEY.replace(".A.", ".B.")] = torch.zeros(32, 2)
    save_weights(tmp_path / "a.pth", state)
    with pytest.raises(ValueError, match=r"one rank.*\[2, 8\]"):
        save_peft(tmp_path, load_lora(model, tmp_path / "a.pth"))
    assert not list(tmp_path.glob("adapter*"))


# --- training --------------------------------------------------------------------------------------------------------


def save_base(out_dir: Path, tokenizer, use_moe: bool = False) -> Path:
    model = small_model(use_moe, vocab_size=tokenizer.vocab_size)
    path = out_dir / f"full_sft_32{'_moe' if use_moe else ''}.pth"
    config = model.config.to_diff_dict()
    save_weights(path, model, {"config": config, "tokenizer_sha256": tokenizer.sha256})
    return path


@pytest.mark.parametrize("use_moe", [False, True])
def test_training_changes_the_adapter_alone_and_one_step_is_on_disk(
    train, monkeypatch, tmp_path, tokenizer, chats, use_moe, capsys
):
    base = save_base(tmp_path, tokenizer, use_moe)
    seen = []

    def apply(model, *options):
        seen.append(model)
        return apply_lora(model, *options)

    monkeypatch.setattr(train_lora, "apply_lora", apply)
    flags = {"use_moe": use_moe, "lora_name": "mine", "lora_rank": 2, "lora_alpha": 8, "weight_decay": 0.5}
    train("train_lora", tiny_flags(tmp_path, chats, max_steps=1, **flags))
    name = f"mine_32{'_moe' if use_moe else ''}"
    path = tmp_path / "lora" / f"{name}.pth"

    (trained,) = seen
    loaded, _ = load_model(base)
    assert_identical(bits(trained), bits(loaded))
    pairs = read_lora(path)
    assert len(pairs) == len(list(block_linears(loaded)))
    for layer_name, layer in lora_layers(trained):
        a, b = pairs[layer_name]
        torch.testing.assert_close(b.float(), 4 * layer.lora.B.weight, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.float(), layer.lora.A.weight, rtol=1e-3, atol=1e-6)
    assert any(bool(b.any()) for _, b in pairs.values()), "nothing was learned"
    sidecar = read_sidecar(path)
    assert sidecar["stage"] == "lora/mine" and sidecar["tokenizer_sha256"] == tokenizer.sha256

    state = read_resume(tmp_path, f"lora/{name}")
    adapter = {key for key, _ in trained.named_parameters() if ".lora." in key}
    assert state["model"].keys() == adapter
    assert len(state["optimizer"]["state"]) == len(adapter)
    shapes = sorted(tuple(entry["exp_avg"].shape) for entry in state["optimizer"]["state"].values())
    assert shapes == sorted(tuple(tensor.shape) for tensor in state["model"].values())

    count, total = sum(t.numel() for t in state["model"].values()), sum(p.numel() for p in trained.parameters())
    assert f"{count:,} of {total:,} parameters train ({count / total:.2%})" in capsys.readouterr().out


def test_an_adapter_learns_and_evaluates_as_the_loaded_file_does(train, tmp_path, tokenizer, chats):
    """The loss goes down; the base with the adapter of the file gives the logits of the merged one."""
    base = save_base(tmp_path, tokenizer)
    flags = tiny_flags(tmp_path, chats, epochs=3, learning_rate=0.02, save_peft=True, lora_name="mine")
    train("train_lora", flags)
    losses = [record["loss"] for record in read_log(tmp_path, "lora/mine_32")]
    assert losses[-1] < losses[0] - 0.3
    path = tmp_path / "lora" / "mine_32.pth"
    model = load_lora(load_model(base)[0], path)
    adapted = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "lora" / "mine_32_peft" / "adapter_config.json").read_text())["r"] == 8


def test_the_next_command_names_the_stage_of_the_base(train, tmp_path, tokenizer, chats, capsys):
    base = save_base(tmp_path, tokenizer).rename(tmp_path / "rlhf_32.pth")
    sidecar = json.loads((tmp_path / "full_sft_32.json").read_text()) | {"stage": "rlhf"}
    base.with_suffix(".json").write_text(json.dumps(sidecar))
    train("train_lora", tiny_flags(tmp_path, chats, max_steps=1, base_weight="rlhf"))
    assert "--model_mode 2" in capsys.readouterr().out


def test_an_adapter_that_peft_cannot_hold_is_told_before_training(train, tmp_path, tokenizer, chats):
    base = save_base(tmp_path, tokenizer, use_moe=True)
    with pytest.raises(ValueError, match="PEFT layout holds adapters of dense models"):
        train("train_lora", tiny_flags(tmp_path, chats, base_weight=base, use_moe=True, save_peft=True))
    assert not (tmp_path / "lora" / "lora_medical_32_moe.pth").exists()


def test_wrong_flags_and_missing_base_weights(train, tmp_path, tokenizer, chats):
    with pytest.raises(ValueError, match="full_sft_32.pth not found; run trainer/train_full_sft.py first"):
        train("train_lora", tiny_flags(tmp_path, chats))
    save_base(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="--lora_targets w1: .*they have down_proj,"):
        train("train_lora", tiny_flags(tmp_path, chats, lora_targets="q_proj,w1"))
    for flag, value in (("lora_rank", 0), ("lora_alpha", 0.0), ("lora_name", "a/b"), ("lora_name", "None")):
        with pytest.raises(ValueError, match=re.escape(f"--{flag} {value}: must be ")):
            train("train_lora", tiny_flags(tmp_path, chats, **{flag: value}))
    assert not (tmp_path / "lora").exists()


def test_an_adapter_of_another_depth_is_not_replaced_and_another_rank_is_not_resumed(train, tmp_path, tokenizer, chats):
    save_base(tmp_path, tokenizer)
    flags = {"max_steps": 1, "lora_name": "mine"}
    train("train_lora", tiny_flags(tmp_path, chats, **flags))
    with pytest.raises(ValueError, match="--lora_rank was 8, is 4"):
        train("train_lora", tiny_flags(tmp_path, chats, **flags, lora_rank=4, resume=True))
    deeper = tmp_path / "deeper.pth"
    shutil.copy(tmp_path / "lora" / "mine_32.pth", deeper)
    state = torch.load(deeper) | lora_state_dict(apply_lora(small_model(num_hidden_layers=3)))
    save_weights(tmp_path / "lora" / "mine_32.pth", state)
    with pytest.raises(ValueError, match="adapter of 3 layers, this model has 2.*--overwrite"):
        train("train_lora", tiny_flags(tmp_path, chats, **flags))
    train("train_lora", tiny_flags(tmp_path, chats, **flags, overwrite=True))
    assert len(read_lora(tmp_path / "lora" / "mine_32.pth")) == 14
