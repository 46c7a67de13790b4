"""YaRN (arXiv:2309.00071): equal to transformers' Llama, off by default, carried by configs, reached by flags."""

import copy
import math

import pytest
import torch
from conftest import sharp_model, write_weights
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import eval_model
from model.export import hf_config
from model.loading import choose_context, stretch_context, trained_length
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, rotary_frequencies, rotary_tables
from model.weights import save_weights
from scripts import convert_model
from scripts.model_catalog import entry_of_folder, load_entry

SHAPES = [(64, 1e6, 512, 4.0), (32, 1e4, 256, 8.0), (96, 1e6, 2048, 2.5), (8, 1e6, 64, 4.0)]


def yarn(factor: float = 4.0, length: int = 64, **fields) -> dict:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **fields}


@pytest.mark.parametrize("head_dim, theta, length, factor", SHAPES)
@pytest.mark.parametrize("fields", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.25}])
def test_tables_equal_those_of_transformers(head_dim, theta, length, factor, fields):
    scaling = yarn(factor, length, **fields)
    ours = MiniMindConfig(hidden_size=8 * head_dim, rope_theta=theta, rope_scaling=scaling)
    theirs = LlamaConfig(
        hidden_size=8 * head_dim,
        num_attention_heads=8,
        max_position_embeddings=round(factor * length),
        rope_parameters={**scaling, "rope_theta": theta},
    )
    positions = torch.arange(round(factor * length)).unsqueeze(0)
    expected = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    for table, reference in zip(rotary_tables(positions, ours), expected, strict=True):
        assert torch.allclose(table, reference[..., : head_dim // 2], rtol=0, atol=1e-5)


def test_frequencies_by_hand():
    """Trained on 64 tokens with theta 100: pair i turns 64 · 100^(-i/4) / 2π times, that is 10.2, 3.2, 1.02, 0.3 times.

    beta_fast 4 falls between the pairs 0 and 1, beta_slow 1 between 2 and 3: pair 0 stays, pair 3 is slowed down whole,
    pairs 1 and 2 by a third and two thirds of the way."""
    config = MiniMindConfig(hidden_size=64, rope_theta=100.0, rope_scaling=yarn(2.0, beta_fast=4.0))
    plain = [100 ** (-i / 4) for i in range(4)]
    expected = [f * (1 - s) + f / 2 * s for f, s in zip(plain, (0, 1 / 3, 2 / 3, 1), strict=True)]
    assert rotary_frequencies(config).tolist() == pytest.approx(expected, rel=1e-6)
    assert config.rope_scaling["attention_factor"] == pytest.approx(0.1 * math.log(2) + 1)


def test_off_by_default_and_then_bit_identical():
    config = MiniMindConfig(hidden_size=64)
    positions = torch.arange(300).unsqueeze(0)
    angles = positions.unsqueeze(-1).float() * 1e6 ** -(torch.arange(0, 8, 2, dtype=torch.float32) / 8)
    cos, sin = rotary_tables(positions, config)
    assert config.rope_scaling is None and "rope_scaling" not in config.to_diff_dict()
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_logits_equal_those_of_llama_with_the_same_parameters(factor):
    model = sharp_model(scale=3.0).eval()
    plain = model(torch.arange(200).unsqueeze(0)).logits
    stretch_context(model, factor, 50)
    llama = LlamaForCausalLM(LlamaConfig(**hf_config(model.config, torch.float32))).eval()
    llama.load_state_dict(model.state_dict())
    ids = torch.arange(200).unsqueeze(0)
    with torch.inference_mode():
        ours, theirs = model(ids).logits, llama(ids).logits
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert torch.allclose(ours, plain, atol=1e-4) == (factor == 1.0)


def test_a_loaded_llama_is_stretched_as_ours():
    model = sharp_model(scale=3.0).eval()
    llama = LlamaForCausalLM(LlamaConfig(**hf_config(model.config, torch.float32))).eval()
    llama.load_state_dict(model.state_dict())
    for part in (model, llama):
        stretch_context(part, 4.0, 50)
    ids = torch.arange(200).unsqueeze(0)
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)


def test_a_saved_config_keeps_it(tmp_path):
    config = copy.deepcopy(sharp_model().config)
    config.rope_scaling = MiniMindConfig(rope_scaling=yarn()).rope_scaling
    model = MiniMindForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(100).unsqueeze(0)
    assert loaded.config.rope_scaling == config.rope_scaling
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "scaling, named",
    [
        ({"rope_type": "linear", "factor": 2.0}, "linear"),
        (yarn(0.5), "factor is 0.5"),
        (yarn(length=None), "original_max_position_embeddings is None"),
        (yarn(mscale=2), "mscale"),
        (yarn(beta_fast=1.0), "beta_fast"),
    ],
)
def test_what_it_cannot_do_is_an_error(scaling, named):
    with pytest.raises(ValueError, match=named):
        MiniMindConfig(rope_scaling=scaling)


def test_the_trained_length_comes_from_the_flag_or_the_sidecar():
    sidecar = {"flags": {"max_seq_len": 512}}
    assert trained_length(sidecar, None) == 512 and trained_length(sidecar, 64) == 64
    for flags in (None, {}, *({"max_seq_len": value} for value in (-1, True, 1e300, "512", [512], None))):
        with pytest.raises(ValueError, match="--trained_length"):
            trained_length(None if flags is None else {"flags": flags}, None)


def test_the_chat_takes_the_flag(tmp_path, tokenizer):
    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    command = ["--out_dir", str(tmp_path), "--device", "cpu"]

    def loaded(*flags: str) -> MiniMindForCausalLM:
        return eval_model.load(eval_model.parse_args([*command, *flags]))[0]

    assert loaded().config.rope_scaling is None
    scaling = loaded("--rope_scaling", "4", "--trained_length", "16").config.rope_scaling
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (4.0, 16)
    for flags in (["--rope_scaling", "4"], ["--trained_length", "16"]):
        with pytest.raises(ValueError, match="--rope_scaling"):
            loaded(*flags)


def test_a_converted_folder_knows_its_trained_length(tmp_path, tokenizer):
    model = sharp_model(scale=3.0)
    about = {"config": model.config.to_diff_dict(), "flags": {"max_seq_len": 48}, "tokenizer_sha256": tokenizer.sha256}
    save_weights(tmp_path / "full_sft_32.pth", model, about)
    folder = tmp_path / "MiniMind2"
    convert_model.main(["--input", str(tmp_path / "full_sft_32.pth"), "--output", str(folder)])
    flags = ["--load", "1", "--hf_path", str(folder), "--device", "cpu", "--rope_scaling", "4"]
    chat = eval_model.load(eval_model.parse_args(flags))[0]
    served = load_entry(entry_of_folder(folder, tmp_path), rope_scaling=4.0)[0]
    for loaded in (chat, served):
        assert loaded.config.rope_parameters["original_max_position_embeddings"] == 48
    flags[3] = str(tmp_path / "MiniMind3")
    with pytest.raises(ValueError, match=r"MiniMind3/config.json not found.*; there are: MiniMind2$"):
        eval_model.load(eval_model.parse_args(flags))


def test_a_stretch_without_a_factor_leaves_the_context_to_the_sidecar():
    """LongRoPE, of other people's folders, has factors for each pair instead."""
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 64, "long_factor": [1.0], "factor": None}
    config = LlamaConfig(max_position_embeddings=256)
    config.rope_parameters = scaling
    assert choose_context(config, {"flags": {"max_seq_len": 128}}) == 128
    assert choose_context(config, {}) == 256
