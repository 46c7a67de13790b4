"""MiniMind-3: the original's weights and numbers, and what a file without a sidecar is taken for."""

import contextlib
import functools
import json
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from conftest import PRETRAIN, tiny_flags
from safetensors.torch import save_file
from test_checkpoint import assert_same_end, killed_at_step_4, noisy_slow_steps
from test_distributed import ACCUMULATED, RANKS, WHOLE, check_split, split_run
from test_generation import assert_same_answer
from transformers import Qwen3Config, Qwen3ForCausalLM

import eval_model
from model.decoder import ForwardDecoder, LeanDecoder, is_llama_like
from model.generation import SamplingParams, generate_batch
from model.loading import load_folder
from model.model_lora import apply_lora, lora_layers, merge_lora
from model.model_minimind import MINIMIND3, PRESETS, MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, read_state_dict, save_weights
from trainer import train_pretrain
from trainer.arguments import model_config
from trainer.optimization import build_optimizer

COMPAT3 = Path(__file__).parent / "compat3"
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}

both_kinds = pytest.mark.parametrize("kind", ["dense", "moe"])


def tiny_model(**fields) -> MiniMindForCausalLM:
    """A MiniMind-3 with weights larger than at the start, so that attention and routing are far from uniform."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**MINIMIND3, **TINY, **fields})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.mul_(4)
    return model


def assert_equals_the_original(model: MiniMindForCausalLM, kind: str, loss_weight: float) -> None:
    expected = torch.load(COMPAT3 / f"{kind}_expected.pt", weights_only=True)
    with torch.no_grad():
        logits = model.float().eval()(expected["input_ids"]).logits
        torch.testing.assert_close(logits[..., ::8], expected["logits"], atol=1e-4, rtol=0)
        if kind == "moe":
            aux_loss = model.train()(expected["input_ids"]).aux_loss * 0.1 / loss_weight
            torch.testing.assert_close(aux_loss, expected["aux_loss"], atol=1e-4, rtol=0)


# --- the original's files --------------------------------------------------------------------------------------------


@both_kinds
def test_weights_without_a_sidecar_give_the_originals_logits_and_balance_loss(kind):
    with pytest.warns(UserWarning, match="its tensors say MiniMind-3, so it is read with rms_norm_eps 1e-06"):
        model, sidecar = load_model(COMPAT3 / f"{kind}.pth")
    assert sidecar is None
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 16)
    assert_equals_the_original(model, kind, loss_weight=5e-4)  # no tensor shows the coefficient


@both_kinds
def test_a_folder_of_the_original_gives_the_same(kind, tmp_path):
    config = json.loads((COMPAT3 / f"{kind}_config.json").read_text()) | {"architectures": ["MiniMindForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "minimind"}))
    state = read_state_dict(COMPAT3 / f"{kind}.pth")
    state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_folder(tmp_path, trust_remote_code=False, dtype=torch.float32)
    assert model.config.aux_loss_alpha == config["router_aux_loss_coef"]
    assert_equals_the_original(model, kind, loss_weight=0.1)


@both_kinds
def test_weights_come_back_as_they_were_and_with_the_same_configuration(kind, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        model, _ = load_model(COMPAT3 / f"{kind}.pth")
    save_weights(tmp_path / "full_sft_64.pth", model, {"config": model.config.to_diff_dict()})
    before, after = torch.load(COMPAT3 / f"{kind}.pth"), torch.load(tmp_path / "full_sft_64.pth")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with warnings.catch_warnings(action="error"):  # a sidecar leaves nothing to guess
        again, _ = load_model(tmp_path / "full_sft_64.pth")
    assert again.config.to_dict() == model.config.to_dict()


def test_a_preset_for_other_weights_is_refused(tmp_path):
    save_weights(tmp_path / "full_sft_64.pth", MiniMindForCausalLM(MiniMindConfig(**TINY)))
    with pytest.raises(WeightsError, match="full_sft_64.pth .* no query/key norm"):
        load_model(tmp_path / "full_sft_64.pth", unseen=PRESETS["minimind3"])


def test_mixed_head_counts_are_told_by_tensor(tmp_path):
    state = read_state_dict(COMPAT3 / "dense.pth")
    for name in ("q_proj", "o_proj"):
        key = f"model.layers.1.self_attn.{name}.weight"
        state[key] = state[key][:32] if name == "q_proj" else state[key][:, :32]
    torch.save(state, tmp_path / "full_sft_64.pth")
    with warnings.catch_warnings(action="ignore"), pytest.raises(WeightsError) as error:
        load_model(tmp_path / "full_sft_64.pth")
    assert "layers.1.self_attn." in str(error.value) and "in the file and" in str(error.value)


def test_heads_that_no_tensor_shows(tmp_path):
    """Without query/key norms the same matrices may be any number of heads: 8 if they fit, with a note, or the flag."""
    path = tmp_path / "full_sft_64.pth"
    save_weights(path, MiniMindForCausalLM(MiniMindConfig(**TINY)))
    with pytest.warns(UserWarning, match="number of attention heads: 8 assumed.*--num_attention_heads"):
        assert load_model(path)[0].config.num_key_value_heads == 4
    with warnings.catch_warnings(action="error"):
        assert load_model(path, unseen={"num_attention_heads": 4})[0].config.num_key_value_heads == 2
    six = {**TINY, "hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2}
    save_weights(path, MiniMindForCausalLM(MiniMindConfig(**six)))
    with pytest.raises(WeightsError, match="8 attention heads do not divide .* --num_attention_heads"):
        load_model(path)


def test_a_head_of_its_own_is_refused_and_a_missing_one_is_the_embedding(tmp_path):
    path = tmp_path / "full_sft_64.pth"
    shutil.copy(COMPAT3 / "dense.pth", path)
    state = torch.load(path)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, path)
    with pytest.raises(WeightsError, match="full_sft_64.pth has an lm_head.weight that differs from the embedding"):
        load_model(path)
    del state["lm_head.weight"]
    torch.save(state, path)
    with warnings.catch_warnings(action="ignore"):
        assert_equals_the_original(load_model(path)[0], "dense", 0.1)


def test_a_hostile_config_cannot_hang_or_break_the_loading(tmp_path):
    model = MiniMindForCausalLM(MiniMindConfig(**TINY))
    path, sound = tmp_path / "full_sft_64.pth", model.config.to_diff_dict()
    for changes, message in [
        ({"rope_theta": float("nan")}, "rope_theta"), ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"num_attention_heads": 0}, "attention heads"), ({"num_attention_heads": [4]}, "attention heads"),
        ({"rope_scaling": [1]}, "rope_scaling"), ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"bos_token_id": {}}, "bos_token_id"), ({"hidden_act": ["silu"]}, "hidden_act"),
    ]:  # fmt: skip
        save_weights(path, model, {"config": {**sound, **changes}})
        with pytest.raises(WeightsError, match=f"full_sft_64.pth cannot be loaded: .*{message}.*full_sft_64.json"):
            load_model(path)
    save_weights(path, model, {"config": {**sound, "num_labels": 10**7, "torch_dtype": 5, "architectures": 7}})
    assert load_model(path)[0].config.num_key_value_heads == 2
    for key, value in [("config", [1]), ("flags", 3), ("tokenizer_sha256", 5)]:
        save_weights(path, model, {key: value})
        with pytest.raises(WeightsError, match=f"{key} is not "):
            load_model(path)
    MiniMindConfig(num_labels=10**9)  # a list of that many names would take minutes


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_logits_equal_transformers_qwen3_with_heads_of_any_size():
    model = tiny_model(head_dim=24)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            **{name: getattr(model.config, name) for name in names},
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        )
    ).eval()
    qwen3.load_state_dict(model.state_dict(), strict=True)
    ids = torch.randint(97, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, qwen3(ids).logits, atol=1e-5, rtol=1e-5)
    assert is_llama_like(qwen3)  # the fast decoder serves it too, so it must compute the same
    assert_lean_equals_forward(qwen3)


def assert_lean_equals_forward(model) -> None:
    """Prompts into two slots, then steps of both together: the fast decoder against the model's own forward."""
    lean, plain = LeanDecoder(model, 3, 100), ForwardDecoder(model, 3, 100)
    ids = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        for slot, length in ((1, 20), (2, 9)):
            expected = plain.prefill(slot, ids[slot - 1][:length], 0)
            torch.testing.assert_close(lean.prefill(slot, ids[slot - 1][:length], 0), expected, atol=2e-5, rtol=1e-4)
        for step in range(4):
            arguments = ([1, 2], [3 + step, 7 + step], [20 + step, 9 + step])
            expected = plain.decode_one_token(*arguments)
            torch.testing.assert_close(lean.decode_one_token(*arguments), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "fields", [{}, {"use_moe": True}, {"head_dim": 24}, {"qk_norm": False, "head_dim": 32}, {"adapter": True}], ids=str
)
def test_the_fast_decoder_equals_the_models_forward(fields):
    model = tiny_model(**{name: value for name, value in fields.items() if name != "adapter"})
    if "adapter" in fields:
        apply_lora(model, rank=2)
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora.B.weight.data, std=0.1)
    assert_lean_equals_forward(model)
    if "adapter" in fields:  # and merged it is the same model
        ids = torch.arange(3, 40).unsqueeze(0)
        with torch.no_grad():
            before = model(ids).logits
            merge_lora(model)
            torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_greedy_answers_made_together_equal_transformers_generate(use_moe):
    model = tiny_model(use_moe=use_moe)
    prompts = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 17, 30)]
    params = SamplingParams(temperature=0, max_new_tokens=16, stop_ids=())
    for prompt, answer in zip(prompts, generate_batch(model, prompts, params), strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert_same_answer(model, prompt, answer, theirs)


def test_the_balance_loss_of_a_batch_is_over_all_its_tokens_packed_or_not():
    model = tiny_model(use_moe=True).train()
    ids = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(3))
    stream = {
        "input_ids": ids.view(1, 60),
        "position_ids": torch.arange(20).repeat(3).view(1, 60),
        "document_ids": torch.arange(3).repeat_interleave(20).view(1, 60),
        "cu_seqlens": torch.tensor([0, 20, 40, 60, 60], dtype=torch.int32),
        "max_seqlen": 20,
    }
    with torch.no_grad():
        rows, packed = model(ids).aux_loss, model(**stream).aux_loss
        single = torch.stack([model(row.unsqueeze(0)).aux_loss for row in ids]).mean()
    torch.testing.assert_close(packed, rows, rtol=1e-5, atol=0)
    assert abs(rows - single) > 1e-3 * rows, "the mean over documents would be another loss"


def test_a_single_chosen_expert_counts_in_full():
    model = tiny_model(use_moe=True)
    _, _, weights = model.model.layers[0].mlp.gate(torch.randn(50, 64))
    assert torch.equal(weights, torch.ones(50, 1))
    score, _, weights = tiny_model(use_moe=True, norm_top1_prob=False).model.layers[0].mlp.gate(torch.randn(50, 64))
    assert torch.equal(weights.squeeze(1), score.max(dim=1).values)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [pytest.param("minimind3", marks=pytest.mark.full), "minimind3_moe"])
def test_a_killed_run_ends_bit_identical(launcher, tmp_path, texts, preset):
    """Killed at the fourth step, two after the last save."""
    flags = {"data_path": texts, "preset": preset, "save_interval": 2}
    launcher.run("train_pretrain", tiny_flags(tmp_path / "whole", **flags), patches=[noisy_slow_steps])
    line = tiny_flags(tmp_path / "parts", **flags)
    child = launcher.start("train_pretrain", line, patches=[noisy_slow_steps, killed_at_step_4])
    assert child.wait() == -signal.SIGKILL, child.output
    printed = launcher.run("train_pretrain", [*line, "--resume"], patches=[noisy_slow_steps])
    assert "is at step 2; going on" in printed
    assert_same_end(tmp_path / "parts", tmp_path / "whole", PRETRAIN.name(preset.endswith("moe")))


@pytest.mark.parametrize("preset, whole", [("minimind3", WHOLE), ("minimind3_moe", ACCUMULATED)])
def test_two_processes_train_as_one(launcher, tmp_path, texts, preset, whole):
    """The mixture's balance loss is over a micro-batch, so that has the same rows in both runs."""
    flags = {"data_path": texts, "preset": preset, "optimizer": "sgd", "learning_rate": 0.3}
    flags["use_moe"] = preset.endswith("moe")
    expected = split_run(launcher, tmp_path / "whole", PRETRAIN, whole, **flags)
    check_split(launcher, tmp_path, PRETRAIN, RANKS, expected, 1e-6, **flags)


def test_flags_win_over_the_preset():
    parse = functools.partial(train_pretrain.parse, [])
    assert model_config(parse(), 6400).to_dict() == MiniMindConfig().to_dict()

    def config(*flags: str) -> MiniMindConfig:
        return model_config(train_pretrain.parse(list(flags)), 6400)

    for name, fields in PRESETS.items():
        assert config("--preset", name).to_dict() == MiniMindConfig(**fields).to_dict()
    small = config("--preset", "minimind3", "--hidden_size", "256", "--num_key_value_heads", "2")
    assert (small.hidden_size, small.num_hidden_layers, small.num_key_value_heads) == (256, 8, 2)
    assert small.intermediate_size == 832 and small.rms_norm_eps == 1e-6 and small.qk_norm
    assert (
        config("--preset", "minimind3", "--use_moe").to_dict() == MiniMindConfig(**PRESETS["minimind3_moe"]).to_dict()
    )
    assert not config("--preset", "minimind3", "--qk_norm", "false").qk_norm and config("--qk_norm").qk_norm


def test_muon_takes_the_matrices_and_adamw_the_norms_of_heads():
    model = tiny_model(use_moe=True).requires_grad_(True)
    muon, adamw = build_optimizer(model, train_pretrain.parse(["--optimizer", "muon"])).parts
    norms = [p for name, p in model.named_parameters() if name.endswith(("q_norm.weight", "k_norm.weight"))]
    undecayed = [p for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]]
    assert len(norms) == 4 and all(any(p is norm for p in undecayed) for norm in norms)
    assert all(p.dim() == 2 for group in muon.param_groups for p in group["params"])


def test_chat_reads_the_originals_weights_by_preset_and_by_tensor(tmp_path, capsys):
    shutil.copy(COMPAT3 / "moe.pth", tmp_path / "full_sft_64_moe.pth")
    arguments = ["--out_dir", str(tmp_path), "--device", "cpu", "--prompt", "hi", "--max_new_tokens", "3"]
    for more, named in [
        ([], "6400 token ids"),  # the tokenizer is another one: sizes and layout were read
        (["--hidden_size", "64", "--num_hidden_layers", "2", "--preset", "minimind3_moe"], "6400 token ids"),
        (["--hidden_size", "64", "--preset", "minimind3_moe"], "6400 token ids"),
        (["--preset", "minimind3_moe"], "full_sft_768_moe.pth not found"),
    ]:
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(SystemExit):
            eval_model.main([*arguments, *more])
        assert named in capsys.readouterr().err
