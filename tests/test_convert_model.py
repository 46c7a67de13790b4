"""Conversion: what other runtimes load gives our logits, the way back is exact, and nothing is lost on the way."""

import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, run_python, sharp_model, write_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from dataset.chat_template import without_marks
from dataset.tokenization import ChatTokenizer
from model import gguf_format, loading
from model.export import CLASSES, hf_config, hf_format, interleave_rows, split_rows, to_hf
from model.gguf_format import pre_tokenizer, read_gguf, write_gguf
from model.model_lora import apply_lora, load_lora, lora_layers, save_lora
from model.model_minimind import MINIMIND3, MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, read_sidecar, read_state_dict, save_weights
from scripts import convert_model

IDS = torch.randint(6400, (2, 64), generator=torch.Generator().manual_seed(0))
SHAPE = {"scale": 3.0, "hidden_size": 64}


@pytest.fixture
def convert(capsys):
    """convert(flag, value, ...): the script's main in this process; returns what it printed."""

    def run(*flags) -> str:
        capsys.readouterr()
        convert_model.main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """refused(flags): the conversion must end with a message and status 1; returns the message."""

    def run(*flags) -> str:
        with pytest.raises(SystemExit) as stop:
            convert_model.main([str(flag) for flag in flags])
        assert str(stop.value.code).startswith("error: ")
        return str(stop.value.code)

    return run


def save_model(path: Path, model: MiniMindForCausalLM, tokenizer: ChatTokenizer, **fields) -> Path:
    save_weights(path, model, {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256, **fields})
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer) -> Path:
    return write_weights(tmp_path_factory.mktemp("dense") / "full_sft_64.pth", tokenizer, **SHAPE)


@pytest.fixture(scope="module")
def moe(tmp_path_factory, tokenizer) -> Path:
    return write_weights(tmp_path_factory.mktemp("moe") / "full_sft_64_moe.pth", tokenizer, use_moe=True, **SHAPE)


@pytest.fixture(scope="module")
def dense3(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("dense3") / "full_sft_64.pth"
    return write_weights(path, tokenizer, head_dim=24, **MINIMIND3, **SHAPE)


@pytest.fixture(scope="module")
def moe3(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("moe3") / "full_sft_64_moe.pth"
    return write_weights(path, tokenizer, use_moe=True, **MINIMIND3, **SHAPE)


@pytest.fixture
def weights(request) -> Path:
    return request.getfixturevalue(request.param)


each_kind = pytest.mark.parametrize("weights", ["dense", "moe", "dense3", "moe3"], indirect=True)


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.float().eval()(input_ids=ids).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- Llama and Qwen2-MoE ---------------------------------------------------------------------------------------------


@each_kind
def test_transformers_gives_our_logits_without_remote_code(weights, tmp_path, convert, request):
    convert("--input", weights, "--output", tmp_path / "hf", "--dtype", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours, _ = load_model(weights)
    formats = {("dense", "llama"), ("moe", "qwen2_moe"), ("dense3", "qwen3"), ("moe3", "qwen3_moe")}
    assert (request.node.callspec.params["weights"], hf_format(ours.config)) in formats
    assert type(theirs).__name__ == CLASSES[hf_format(ours.config)]
    assert theirs.dtype == torch.float32
    assert torch.allclose(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    assert not list((tmp_path / "hf").glob("*.py")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shared, top_k, renormalised", [(1, 2, True), (3, 2, False), (1, 1, True)])
def test_every_kind_of_mixture_is_exact(shared, top_k, renormalised, tmp_path, tokenizer, convert):
    config = MiniMindConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, use_moe=True, n_shared_experts=shared,
        num_experts_per_tok=top_k, norm_topk_prob=renormalised,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 4.0)
    path = save_model(tmp_path / "a.pth", model, tokenizer)
    convert("--input", path, "--output", tmp_path / "hf", "--dtype", "float32")
    convert("--input", path, "--output", tmp_path / "g", "--to", "gguf")
    convert("--input", tmp_path / "hf", "--output", tmp_path / "back.pth")
    ours = load_model(path)[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.allclose(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    for back in (tmp_path / "back.pth", next((tmp_path / "g").glob("*.gguf"))):
        state = read_state_dict(back) if back.suffix == ".pth" else read_gguf(back)[0]
        assert state.keys() == read_state_dict(path).keys()
    again = load_model(tmp_path / "back.pth")[0].config
    assert (again.n_shared_experts, again.num_experts_per_tok) == (shared, top_k)
    assert torch.allclose(logits(load_model(tmp_path / "back.pth")[0]), logits(ours), rtol=0, atol=1e-6)


@each_kind
def test_the_way_to_hugging_face_and_back_is_bit_identical_in_float16(weights, tmp_path, convert):
    convert("--input", weights, "--output", tmp_path / "hf")
    convert("--input", tmp_path / "hf", "--output", tmp_path / "back.pth")
    before, after = torch.load(weights), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys()
    assert all(after[key].dtype == torch.float16 and torch.equal(before[key], after[key]) for key in before)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    config = load_model(tmp_path / "back.pth")[0].config
    assert config.to_dict() == load_model(weights)[0].config.to_dict()


def test_doubling_is_exact_down_to_the_smallest_number_and_refused_above_the_largest():
    model = sharp_model(use_moe=True).half()
    state = model.state_dict()
    key = "model.layers.0.mlp.shared_experts.0.down_proj.weight"
    values = torch.tensor([2.0**-24, 3 * 2.0**-24, 1023 * 2.0**-24, 32752.0], dtype=torch.float16)
    state[key].view(-1)[:4] = values
    doubled = to_hf(state, model.config)["model.layers.0.mlp.shared_expert.down_proj.weight"]
    assert torch.equal(doubled.view(-1)[:4] / 2, values)
    state[key].view(-1)[0] = 32768.0
    with pytest.raises(ValueError, match="--dtype bfloat16 or float32"):
        to_hf(state, model.config)


def test_qwen2_moe_takes_half_of_a_doubled_shared_expert(moe):
    model = load_model(moe)[0]
    state = to_hf(model.state_dict(), model.config)
    prefix = "model.layers.1."
    assert torch.equal(
        state[prefix + "mlp.shared_expert.down_proj.weight"],
        model.model.layers[1].mlp.shared_experts[0].down_proj.weight * 2,
    )
    assert state[prefix + "mlp.shared_expert_gate.weight"].shape == (1, 64)
    zeros = ["mlp.shared_expert_gate.weight", *(f"self_attn.{name}_proj.bias" for name in "qkv")]
    assert all(state[prefix + name].count_nonzero() == 0 for name in zeros)
    assert "lm_head.weight" not in state


@each_kind
def test_the_config_says_what_older_runtimes_read(weights, tmp_path, convert):
    """rope_theta and torch_dtype beside today's rope_parameters and dtype: without them transformers 4 falls back."""
    convert("--input", weights, "--output", tmp_path / "hf", "--dtype", "bfloat16", "--rope_scaling", 4,
            "--trained_length", 64)  # fmt: skip
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    for rope in (config["rope_scaling"], config["rope_parameters"]):
        assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    assert config["max_position_embeddings"] == 256
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    if config["model_type"] == "qwen2_moe":
        wanted = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1}
        wanted |= {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 192, "mlp_only_layers": []}
        assert wanted.items() <= config.items()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters["factor"] == 4.0


def test_the_folder_is_complete(dense, tmp_path, tokenizer, convert):
    model = sharp_model(**SHAPE)
    about = {"stage": "full_sft", "metrics": {"bits_per_byte": 1.25}, "flags": {"max_seq_len": 512}}
    path = save_model(tmp_path / "full_sft_64.pth", model, tokenizer, **about, progress={"tokens": 1234567, "step": 8})
    printed = convert("--input", path, "--output", tmp_path / "My Model")
    folder = tmp_path / "My Model"
    assert re.search(r"largest difference [\d.e-]+ \(logits to [\d.]+, allowed [\d.]+\)", printed)
    theirs = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "你好 <think>\n\n a"}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode_prompt(turns)
    assert ChatTokenizer(folder).sha256 == tokenizer.sha256
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 0)
    card = (folder / "README.md").read_text("utf-8")
    for fact in ("# My Model", "0.51M", "full_sft", "1,234,567", "byte | 1.2500", "rows | 512", tokenizer.sha256):
        assert fact in card, fact


def test_our_own_classes_load_with_remote_code_from_another_folder(moe, tmp_path, convert):
    kept = Path(HF_MODULES_CACHE, "transformers_modules")
    before = set(kept.glob("*_dot_staged"))
    convert("--input", moe, "--output", tmp_path / "own", "--to", "minimind")
    assert set(kept.glob("*_dot_staged")) == before, "a copy of the code was left in the user's cache"
    expected = tmp_path / "expected.pt"
    torch.save((IDS, logits(load_model(moe)[0])), expected)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.split(".")[0] in ("model", "dataset") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids, expected = torch.load(sys.argv[2])
with torch.inference_mode():
    print(float((model(ids).logits - expected).abs().max()), type(model).__module__)
"""
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = run_python("-c", code, str(tmp_path / "own"), str(expected), cwd=tmp_path, **cache)
    assert done.returncode == 0, done.stderr
    difference, module = done.stdout.split()[-2:]
    assert float(difference) <= 1e-6 and module.startswith("transformers_modules")


def test_our_own_classes_come_back_bit_identical(moe, tmp_path, convert):
    convert("--input", moe, "--output", tmp_path / "own", "--to", "minimind")
    convert("--input", tmp_path / "own", "--output", tmp_path / "back.pth")
    before, after = torch.load(moe), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_folders_that_transformers_wrote_come_in(dense, moe, tmp_path, convert):
    """In shards, in bfloat16, with experts merged or not: what save_pretrained of today makes."""
    for path in (dense, moe):
        convert("--input", path, "--output", tmp_path / "hf", "--dtype", "bfloat16", "--force")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        theirs.save_pretrained(tmp_path / path.stem, max_shard_size="400KB")
        shutil.copy(ROOT / "model" / "tokenizer.json", tmp_path / path.stem)
        assert len(list((tmp_path / path.stem).glob("*.safetensors"))) > 1
        printed = convert("--input", tmp_path / path.stem, "--output", tmp_path / path.name)
        ours, sidecar = load_model(tmp_path / path.name)
        assert torch.allclose(logits(ours), logits(theirs), rtol=0, atol=2e-5)
        assert "bfloat16 -> pth" in printed and sidecar["tokenizer_sha256"]
        shutil.rmtree(tmp_path / "hf")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"attention_bias": True}, "q_proj.bias, which is not zero"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "rope_type linear"),
    ],
)
def test_what_our_architecture_cannot_hold_is_refused(change, named, tmp_path, refused):
    from transformers import LlamaConfig

    fields = hf_config(MiniMindConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4), torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **change}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "hf")
    assert named in refused("--input", tmp_path / "hf", "--output", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_a_llama_whose_heads_have_a_size_of_their_own_becomes_ours(tmp_path, convert):
    from transformers import LlamaConfig

    fields = hf_config(MiniMindConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4), torch.float32)
    theirs = LlamaForCausalLM(LlamaConfig(**{**fields, "head_dim": 8}))
    theirs.save_pretrained(tmp_path / "hf")
    convert("--input", tmp_path / "hf", "--output", tmp_path / "x.pth", "--tokenizer_path", ROOT / "model")
    ours, _ = load_model(tmp_path / "x.pth")
    assert (ours.config.num_attention_heads, ours.config.head_dim) == (4, 8)
    assert torch.allclose(logits(ours), logits(theirs.half()), rtol=0, atol=1e-5)


# --- MiniMind-3 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_originals_minimind3_becomes_qwen3_and_comes_back(kind, tmp_path, tokenizer, convert):
    """Without a sidecar, and with a tokenizer of fewer ids than the weights, as other people's files come."""
    path = tmp_path / "their.pth"
    shutil.copy(Path(__file__).parent / "compat3" / f"{kind}.pth", path)
    (tmp_path / "tokenizer").mkdir()
    vocabulary = json.loads((ROOT / "model" / "tokenizer.json").read_text("utf-8"))
    names = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)[:600]
    vocabulary["model"] |= {"vocab": {name: number for number, name in enumerate(names)}, "merges": []}
    vocabulary["added_tokens"] = [token for token in vocabulary["added_tokens"] if token["content"] in names]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    common = ("--tokenizer_path", tmp_path / "tokenizer")
    printed = convert("--input", path, "--output", tmp_path / "hf", *common)
    assert f"-> {'qwen3' if kind == 'dense' else 'qwen3_moe'}" in printed and "rotary tables" in printed
    convert("--input", tmp_path / "hf", "--output", tmp_path / "back.pth", *common)
    convert("--input", path, "--to", "gguf", "--output", tmp_path / "g" / "m.gguf", *common)
    convert("--input", tmp_path / "g" / "m.gguf", "--output", tmp_path / "again.pth", *common)
    before = read_state_dict(path)
    for back in ("back.pth", "again.pth"):
        after = read_state_dict(tmp_path / back)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        config = load_model(tmp_path / back)[0].config
        wanted = {"rms_norm_eps": 1e-6, "head_dim": 16, "num_key_value_heads": 2, "qk_norm": True}
        wanted |= {"num_experts_per_tok": 1, "norm_top1_prob": True, "n_shared_experts": 0, "rope_dtype": "float32"}
        assert wanted.items() <= config.to_dict().items()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.randint(640, (2, 64), generator=torch.Generator().manual_seed(0))
    ours = load_model(tmp_path / "back.pth")[0]
    assert torch.allclose(logits(theirs, ids), logits(ours, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields, to, named",
    [
        ({"n_shared_experts": 1}, "auto", "Qwen3-MoE has no shared experts"),
        ({"n_shared_experts": 1}, "gguf", "qwen3moe has no shared experts"),
        ({"norm_top1_prob": False}, "gguf", "always renormalises"),
        ({"qk_norm": False}, "auto", "Qwen2-MoE always has a shared expert"),
        ({"qk_norm": False}, "gguf", "bailingmoe always has a shared expert"),
        ({}, "qwen2_moe", "with query/key norms.* use --to qwen3_moe, gguf or minimind"),
    ],
)
def test_mixtures_that_a_format_cannot_hold_are_refused(fields, to, named, tmp_path, tokenizer, refused):
    shape = {**MINIMIND3, "use_moe": True, **SHAPE, **fields}
    path = write_weights(tmp_path / "full_sft_64_moe.pth", tokenizer, **shape)
    assert re.search(named, refused("--input", path, "--to", to, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_single_expert_that_keeps_its_score_is_exact_in_qwen3_moe(tmp_path, tokenizer, convert):
    shape = {**MINIMIND3, "use_moe": True, "norm_top1_prob": False, **SHAPE}
    path = write_weights(tmp_path / "full_sft_64_moe.pth", tokenizer, **shape)
    convert("--input", path, "--output", tmp_path / "hf", "--dtype", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.norm_topk_prob is False
    assert torch.allclose(logits(theirs), logits(load_model(path)[0]), rtol=0, atol=1e-5)


def test_a_full_disk_is_called_that(dense, tmp_path, refused, monkeypatch):
    def full(self, *_):
        raise OSError("1228800 requested and 934576 written")  # numpy's words

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    said = refused("--input", dense, "--to", "gguf", "--output", tmp_path / "g")
    assert "cannot write" in said and "MB are free there" in said
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("to", ["llama", "minimind", "gguf"])
def test_files_can_be_read_by_whom_the_umask_lets(to, dense, tmp_path, convert):
    before = os.umask(0o022)
    try:
        convert("--input", dense, "--output", tmp_path / "out", "--to", to)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_a_gate_that_is_not_zero_is_refused(moe, tmp_path, convert, refused):
    convert("--input", moe, "--output", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.shared_expert_gate.weight[0, 3] = 0.1
    model.save_pretrained(tmp_path / "hf")
    assert "a gate that is not zero" in refused("--input", tmp_path / "hf", "--output", tmp_path / "x.pth")


# --- weights from before April 2025 ----------------------------------------------------------------------------------


def old_weights(use_moe: bool, dim: int = 32, heads: int = 4, kv_heads: int = 2, width: int = 64) -> dict:
    """Random weights under the old names."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).half()

    def mlp(prefix: str) -> dict:
        return {
            f"{prefix}.{w}.weight": draw(*((dim, width) if w == "w2" else (width, dim))) for w in ("w1", "w2", "w3")
        }

    embedding = draw(6400, dim)
    state = {"tok_embeddings.weight": embedding, "output.weight": embedding, "norm.weight": 1 + draw(dim)}
    state["freqs_cos"] = draw(8, 4)  # a buffer that some releases stored
    for layer in range(2):
        rows = {"wq": dim, "wk": kv_heads * dim // heads, "wv": kv_heads * dim // heads, "wo": dim}
        state |= {f"layers.{layer}.attention.{name}.weight": draw(count, dim) for name, count in rows.items()}
        state |= {f"layers.{layer}.{name}_norm.weight": 1 + draw(dim) for name in ("attention", "ffn")}
        prefix = f"layers.{layer}.feed_forward"
        if use_moe:
            state[f"{prefix}.gate.weight"] = draw(4, dim) * 5
            state |= mlp(f"{prefix}.shared_experts")
            for expert in range(4):
                state |= mlp(f"{prefix}.experts.{expert}")
        else:
            state |= mlp(prefix)
    return state


def old_forward(state: dict, ids: list[int], heads: int = 4, kv_heads: int = 2, theta: float = 1e6) -> torch.Tensor:
    """What that release computed, a sequence at a time: rotary positions are complex factors on neighbouring pairs."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = w["tok_embeddings.weight"][ids]
    count, dim = x.shape
    size = dim // heads
    angles = torch.outer(torch.arange(count).double(), theta ** -(torch.arange(0, size, 2).double() / size))
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rotated(x: torch.Tensor, count_heads: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(count, count_heads, size // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).reshape(count, count_heads, size)

    def mlp(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate = x @ w[f"{prefix}.w1.weight"].T
        return (gate * torch.sigmoid(gate) * (x @ w[f"{prefix}.w3.weight"].T)) @ w[f"{prefix}.w2.weight"].T

    def mixture(x: torch.Tensor, prefix: str) -> torch.Tensor:
        scores = (x @ w[f"{prefix}.gate.weight"].T).softmax(-1)
        rows = []
        for row, score in zip(x, scores, strict=True):
            best = score.argsort(descending=True)[:2]
            parts = [score[e] / score[best].sum() * mlp(row, f"{prefix}.experts.{e}") for e in best.tolist()]
            rows.append(sum(parts) + mlp(row, f"{prefix}.shared_experts"))
        return torch.stack(rows)

    for layer in range(2):
        at, ffn = f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        h = norm(x, f"layers.{layer}.attention_norm.weight")
        q = rotated(h @ w[f"{at}.wq.weight"].T, heads)
        k = rotated(h @ w[f"{at}.wk.weight"].T, kv_heads).repeat_interleave(heads // kv_heads, dim=1)
        v = (h @ w[f"{at}.wv.weight"].T).view(count, kv_heads, size).repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, v).reshape(count, dim) @ w[f"{at}.wo.weight"].T
        h = norm(x, f"layers.{layer}.ffn_norm.weight")
        x = x + (mixture(h, ffn) if f"{ffn}.gate.weight" in w else mlp(h, ffn))
    return norm(x, "norm.weight") @ w["output.weight"].T


@pytest.mark.parametrize("use_moe", [False, True])
def test_weights_from_before_april_2025_give_the_logits_that_they_gave_then(use_moe, tmp_path, convert):
    state = old_weights(use_moe)
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match="scripts/convert_model.py"):
        read_state_dict(tmp_path / "old.pth")
    flags = ["--input", tmp_path / "old.pth", "--num_attention_heads", 4]
    printed = convert(*flags, "--output", tmp_path / "new.pth")
    assert "before April 2025 -> pth" in printed
    model, sidecar = load_model(tmp_path / "new.pth")
    assert sidecar["config"]["num_attention_heads"] == 4 and "tokenizer_sha256" not in sidecar
    ids = IDS[0].tolist()
    expected = old_forward(state, ids)
    assert torch.allclose(logits(model, torch.tensor([ids]))[0].double(), expected, rtol=0, atol=1e-4)
    convert(*flags, "--to", "qwen2_moe" if use_moe else "llama", "--output", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert torch.allclose(logits(theirs, torch.tensor([ids]))[0].double(), expected, rtol=0, atol=1e-4)


HEADS = ["--num_attention_heads", "4"]
HOSTILE = {
    "more heads than columns": (old_weights(False), {}, ["--num_attention_heads", "1000"], "--num_attention_heads"),
    "as many heads as columns": (old_weights(False), {}, ["--num_attention_heads", "32"], "even size, 1 if"),
    "no embedding": ({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, {}, [], "damaged.*tok_embeddings"),
    "old names, one dimension": (
        old_weights(False) | {"layers.0.attention.wq.weight": torch.zeros(32)}, {}, HEADS, "x.pth is damaged"
    ),
    "numbers for names": ({1: torch.zeros(3)}, {}, [], "plain state dict"),
    "a query without rows": ({**sharp_model(**SHAPE).state_dict(), **{
        f"model.layers.0.self_attn.{name}_proj.weight": torch.zeros(0, 64) for name in "qk"}}, {}, HEADS, "the 0 rows"),
    "a theta of 400 digits": (
        sharp_model(**SHAPE).state_dict(), {"config": {"num_attention_heads": 4, "rope_theta": 10**400}}, [],
        "rope_theta must be a positive number",
    ),
    "NaN": (
        sharp_model(**SHAPE).state_dict() | {"model.norm.weight": torch.full((64,), torch.nan)}, {}, HEADS,
        "model.norm.weight holds NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("state, sidecar, flags, named", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_no_model_of_ours_wrote_is_one_message(state, sidecar, flags, named, tmp_path, refused):
    torch.save(state, tmp_path / "x.pth")
    if sidecar:
        (tmp_path / "x.json").write_text(json.dumps(sidecar))
    assert re.search(named, refused("--input", tmp_path / "x.pth", "--output", tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["[]", "null", '{"model_type": ["x"]}', '{"model_type": "llama", "head_dim": "x"}'])
def test_a_folder_with_a_strange_config_is_one_message(config, tmp_path, refused):
    (tmp_path / "config.json").write_text(config)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert str(tmp_path) in refused("--input", tmp_path, "--output", tmp_path / "x.pth")


def test_old_weights_with_an_unknown_tensor_or_wrong_heads_are_refused(tmp_path, refused):
    torch.save(old_weights(False), tmp_path / "old.pth")
    flags = ["--input", tmp_path / "old.pth", "--output", tmp_path / "x.pth"]
    assert "--num_attention_heads" in refused(*flags, "--num_attention_heads", 1)
    torch.save(old_weights(False) | {"layers.0.novelty.weight": torch.ones(1)}, tmp_path / "old.pth")
    assert "layers.0.novelty.weight is not a name" in refused(*flags)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def test_rows_are_interleaved_head_by_head():
    weight = torch.arange(2 * 6).float().unsqueeze(1).expand(12, 3)  # two heads of six rows
    rows = interleave_rows(weight, 6)[:, 0].int().tolist()
    assert rows == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(split_rows(interleave_rows(weight, 6), 6), weight)


@each_kind
def test_gguf_comes_back_bit_identical_in_float16(weights, tmp_path, convert):
    convert("--input", weights, "--output", tmp_path / "g", "--to", "gguf")
    file = next((tmp_path / "g").glob("*.gguf"))
    convert("--input", file, "--output", tmp_path / "back.pth")
    before, after = torch.load(weights), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    old, new = load_model(weights)[0].config.to_dict(), load_model(tmp_path / "back.pth")[0].config.to_dict()
    assert old == new


@pytest.mark.parametrize(
    "changes, scaling, named",
    [
        ({"output.weight": torch.ones(6400, 64)}, "", "no place for output.weight, which is not the embedding"),
        ({"blk.1.attn_q.bias": torch.ones(64)}, "", "no place for blk.1.attn_q.bias"),
        ({"rope_freqs.weight": torch.ones(8)}, "", "no place for rope_freqs.weight"),
        ({"output_norm.weight": None}, "", "is damaged.*output_norm.weight"),
        ({}, "LINEAR", "rope scaling of type linear"),
    ],
)
def test_a_gguf_of_others_that_ours_cannot_hold_is_refused(
    changes, scaling, named, dense, tmp_path, tokenizer, monkeypatch, refused
):
    model, right, sizes = load_model(dense)[0], gguf_format.to_gguf, gguf_format._add_sizes

    def tensors(*arguments) -> dict:
        return {key: tensor for key, tensor in (right(*arguments) | changes).items() if tensor is not None}

    def add_sizes(writer, config) -> None:
        sizes(writer, config)
        if scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType[scaling])

    monkeypatch.setattr(gguf_format, "to_gguf", tensors)
    monkeypatch.setattr(gguf_format, "_add_sizes", add_sizes)
    write_gguf(tmp_path / "x.gguf", model.state_dict(), model.config, tokenizer, "F16", "x")
    assert re.search(named, refused("--input", tmp_path / "x.gguf", "--output", tmp_path / "x.pth"))
    assert not (tmp_path / "x.pth").exists()


def test_gguf_quantises_whole_blocks_and_says_what_stays(dense, tmp_path, tokenizer, convert):
    printed = convert("--input", dense, "--output", tmp_path / "a.gguf", "--to", "gguf", "--gguf_type", "q8_0")
    error = float(re.search(r"changes the logits by ([\d.]+)%", printed)[1])
    assert 0 < error < 5
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    odd = write_weights(tmp_path / "odd.pth", tokenizer, hidden_size=48, scale=3.0)
    printed = convert("--input", odd, "--output", tmp_path / "b" / "b.gguf", "--to", "gguf", "--gguf_type", "Q8_0")
    assert "stay F16" in printed


def test_gguf_carries_the_tokenizer(moe, tmp_path, tokenizer, convert):
    convert("--input", moe, "--output", tmp_path / "g", "--to", "gguf")
    reader = gguf.GGUFReader(next((tmp_path / "g").glob("*.gguf")))

    def field(name: str):
        return reader.get_field(name).contents()

    vocabulary = json.loads((ROOT / "model" / "tokenizer.json").read_text("utf-8"))
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    by_id = {number: token for token, number in vocabulary["model"]["vocab"].items()}
    assert tokens == [by_id[number] for number in range(6400)]
    assert field("tokenizer.ggml.merges") == vocabulary["model"]["merges"]
    assert (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")) == ("gpt2", "qwen2")
    control, user_defined, normal = 3, 4, 1
    assert kinds[:11] == [control] * 3 + [user_defined] * 8 and set(kinds[11:]) == {normal}
    ids = [field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")]
    assert ids == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert field("tokenizer.ggml.add_bos_token") is False
    template = json.loads((ROOT / "model" / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    assert field("tokenizer.chat_template") == without_marks(template)
    assert field("general.architecture") == "bailingmoe" and field("bailingmoe.expert_weights_norm") is True


def test_gguf_takes_the_template_from_where_transformers_saves_it(dense, tmp_path, tokenizer, convert):
    """A file of its own, which goes before what the configuration holds; a note where there is neither."""

    def written(folder: Path) -> tuple[object, str]:
        target = tmp_path / f"{folder.name}-g"
        printed = convert("--input", dense, "--output", target, "--to", "gguf", "--tokenizer_path", folder)
        return gguf.GGUFReader(next(target.glob("*.gguf"))).get_field("tokenizer.chat_template"), printed

    AutoTokenizer.from_pretrained(ROOT / "model").save_pretrained(tmp_path / "saved")
    shutil.copy(ROOT / "model" / "tokenizer.json", tmp_path / "saved")  # the bytes that the weights know
    config_file = tmp_path / "saved" / "tokenizer_config.json"
    config = json.loads(config_file.read_text("utf-8"))
    assert "chat_template" not in config and (tmp_path / "saved" / "chat_template.jinja").is_file()
    ours = AutoTokenizer.from_pretrained(ROOT / "model").chat_template
    field, printed = written(tmp_path / "saved")
    assert field.contents() == without_marks(ours) and "no chat template" not in printed

    config_file.write_text(json.dumps({**config, "chat_template": "old"}), encoding="utf-8")
    both = (tmp_path / "saved").rename(tmp_path / "both")
    assert written(both)[0].contents() == without_marks(ours)
    assert ours == AutoTokenizer.from_pretrained(both).chat_template

    (both / "chat_template.jinja").unlink()
    (both / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    field, printed = written(both.rename(tmp_path / "neither"))
    assert field is None and "no chat template" in printed


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused():
    content = json.loads((ROOT / "model" / "tokenizer.json").read_text("utf-8"))
    assert pre_tokenizer(content, Path("x")) == "qwen2"
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert pre_tokenizer({**content, "pre_tokenizer": plain}, Path("x")) == "gpt-2"
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"
    for cutter in (content["pre_tokenizer"], {**plain, "add_prefix_space": True}, {**plain, "use_regex": False}, None):
        with pytest.raises(ValueError, match="no name for"):
            pre_tokenizer({**content, "pre_tokenizer": cutter}, Path("x"))


def in_go(template: str, data: dict) -> str:
    """Render the few constructs of Go's templates that a Modelfile of ours has: fields, if, or, eq, range."""
    tokens = [token for token in re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL) if token]

    def value(text: str, scope: dict):
        text = text.strip()
        if text.startswith(("eq ", "or ")):
            first, second = text[3:].split(" ", 1)
            first, second = value(first, scope), value(second, scope)
            return first == second if text.startswith("eq ") else first or second
        if text.startswith('"'):
            return text[1:-1]
        names = text.split(".")
        found = scope[names[0] or "."]
        for name in names[1:] if text != "." else ():
            found = found.get(name, "")
        return found

    def block(position: int, scope: dict, shown: bool) -> tuple[str, int, str]:
        """Return the text up to an end or else at this depth, its position, and that word."""
        written = ""
        while position < len(tokens):
            token = tokens[position]
            word = token[2:-2].strip() if token.startswith("{{") else None
            if word is None:
                written += token * shown
            elif word == "end" or word.startswith("else"):
                return written, position, word
            elif word.startswith("if "):
                taken = False
                while word != "end":
                    wanted = word == "else" or bool(shown and value(word.removeprefix("else ")[3:], scope))
                    text, position, word = block(position + 1, scope, shown and wanted and not taken)
                    written, taken = written + text, taken or wanted
            elif word.startswith("range "):
                names, _, items = word[6:].rpartition(":=")
                names = [name.strip() for name in names.split(",") if name.strip()]
                found = (value(items, scope) or []) if shown else []
                for number, item in enumerate(found):
                    values = (number, item)[2 - len(names) :]
                    inner = {**scope, ".": item, **dict(zip(names, values, strict=True))}
                    written += block(position + 1, inner, True)[0]
                position = block(position + 1, {**scope, **dict.fromkeys(names, {})}, False)[1]
            elif shown:
                found = value(word, scope)
                written += found if isinstance(found, str) else json.dumps(found)
            position += 1
        return written, position, "end"

    return block(0, {".": data}, True)[0]


def test_the_modelfile_spells_the_chat_template(dense, tmp_path, tokenizer, convert):
    """Turns, tools, calls and results come out as transformers writes them, of our template and of one like Qwen's."""
    (tmp_path / "other").mkdir()
    config = json.loads((ROOT / "model" / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = """\
{%- if tools or messages[0].role == 'system' %}{{ '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
    {%- if tools %}{{ '\\nTools:' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for turn in messages if turn.role != 'system' %}
    {{- '<|im_start|>' + ('user\\n<result>' if turn.role == 'tool' else turn.role) + '\\n' }}
    {%- if turn.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ turn.content }}
    {%- for call in turn.tool_calls or [] %}
        {{- '\\n' if turn.content or not loop.first }}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "model" / "tokenizer.json", tmp_path / "other")
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"a": 1, "b": [name]}}} for name in ("f", "g")
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    talk = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "?"},
    ]
    more = [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "4"}]
    more += [{"role": "assistant", "content": "so", "tool_calls": calls[:1]}, {"role": "tool", "content": "5"}]
    for folder in (ROOT / "model", tmp_path / "other"):
        convert("--input", dense, "--output", tmp_path / folder.name / "g", "--to", "gguf", "--tokenizer_path", folder)
        text = (tmp_path / folder.name / "g" / "Modelfile").read_text("utf-8")
        assert (tmp_path / folder.name / "g" / re.search(r"^FROM \./(.+)$", text, re.MULTILINE)[1]).is_file()
        assert re.findall(r'^PARAMETER stop "(.+)"$', text, re.MULTILINE) == ["<|im_start|>", "<|im_end|>"]
        assert "\nPARAMETER top_k 0\n" in text
        template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
        theirs = AutoTokenizer.from_pretrained(folder)
        for system in ((), ({"role": "system", "content": "Be brief."},)):
            for turns, tools in ((talk, None), (talk + more, [tool, {**tool, "x": 2}])):
                history = [*system, *turns]
                messages = [
                    {
                        "Role": turn["role"],
                        "Content": turn["content"],
                        "ToolCalls": [
                            {"Function": {key.title(): value for key, value in call["function"].items()}}
                            for call in turn.get("tool_calls", ())
                        ],
                    }
                    for turn in history
                ]
                data = {"System": system[0]["content"] if system else "", "Tools": tools or [], "Messages": messages}
                expected = theirs.apply_chat_template(history, tools=tools, tokenize=False, add_generation_prompt=True)
                assert in_go(template, data) == expected
    tokenizer_ids = tokenizer.encode_prompt(talk)
    assert tokenizer.encode_documents([AutoTokenizer.from_pretrained(ROOT / "model").apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True)])[0] == tokenizer_ids  # fmt: skip


def test_a_template_that_refuses_tools_goes_into_the_gguf_alone(dense, tmp_path, tokenizer, convert):
    text = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}x{% endfor %}"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "model" / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(text)
    printed = convert("--input", dense, "--output", tmp_path / "g", "--to", "gguf", "--tokenizer_path", tmp_path)
    assert "the Modelfile has no template" in printed and "TEMPLATE" not in (tmp_path / "g" / "Modelfile").read_text()
    reader = gguf.GGUFReader(next((tmp_path / "g").glob("*.gguf")))
    assert reader.get_field("tokenizer.chat_template").contents() == text


def test_the_template_marks_what_training_learns_and_gguf_goes_without_the_marks(dense, tmp_path, tokenizer, convert):
    """transformers' assistant mask is our loss mask; a runtime without that extension renders the same text."""
    convert("--input", dense, "--output", tmp_path / "hf")
    convert("--input", dense, "--output", tmp_path / "g", "--to", "gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = [
        {"role": "user", "content": "你好 <think>"}, {"role": "assistant", "content": "hi\n"},
        {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4, I think"},
    ]  # fmt: skip
    marked = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = tokenizer.encode_conversation(turns)
    assert (marked["input_ids"], marked["assistant_masks"]) == (ids, list(mask))
    reader = gguf.GGUFReader(next((tmp_path / "g").glob("*.gguf")))
    written = reader.get_field("tokenizer.chat_template").contents()
    assert "generation -%}" in theirs.chat_template and "generation -%}" not in written
    turns.append({"role": "assistant", "content": "5", "reasoning_content": "2+3"})
    assert theirs.apply_chat_template(turns, tokenize=False, chat_template=written) == (
        text := theirs.apply_chat_template(turns, tokenize=False)
    )
    assert text.endswith("assistant\n<think>\n2+3\n</think>\n<answer>\n5\n</answer><|im_end|>\n")
    loose = "a {% generation %}\n b {%- endgeneration +%}\n c"
    assert theirs.apply_chat_template(turns, tokenize=False, chat_template=without_marks(loose)) == (
        theirs.apply_chat_template(turns, tokenize=False, chat_template=loose)
    )


# --- adapters --------------------------------------------------------------------------------------------------------


def adapter(path: Path, base: Path, tokenizer: ChatTokenizer, **options) -> Path:
    """An adapter whose B is far from zero."""
    model = apply_lora(load_model(base)[0].float(), rank=4, alpha=8, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora.B.weight.normal_(std=0.1)
    save_lora(path, model, {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256})
    return path


def test_an_adapter_is_merged_on_the_way(dense, tmp_path, tokenizer, convert):
    name = adapter(tmp_path / "out" / "lora" / "lora_x_64.pth", dense, tokenizer)
    shutil.copy(dense, tmp_path / "out")
    shutil.copy(dense.with_suffix(".json"), tmp_path / "out")
    printed = convert(
        "--out_dir", tmp_path / "out", "--lora_name", "lora_x", "--output", tmp_path / "hf", "--dtype", "float32"
    )
    expected = logits(load_lora(load_model(dense)[0].float(), name))
    assert f"merged {name}" in printed and "lora_x_64.pth" in (tmp_path / "hf" / "README.md").read_text("utf-8")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(load_model(dense)[0]), atol=0.1)


@pytest.mark.parametrize("weights", ["dense", "dense3"], indirect=True)
def test_an_adapter_works_in_the_peft_library(weights, tmp_path, tokenizer, convert, refused):
    path = adapter(tmp_path / "lora_x_64.pth", weights, tokenizer)
    convert("--input", path, "--output", tmp_path / "peft", "--base", weights)
    convert("--input", weights, "--output", tmp_path / "hf", "--dtype", "float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
    ours = load_lora(load_model(weights)[0].float(), path)
    assert torch.allclose(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    (tmp_path / "peft" / "minimind.json").unlink()  # as of adapters of other programs
    back = ["--input", tmp_path / "peft", "--output", tmp_path / "back.pth"]
    assert "with --base" in refused(*back)
    convert(*back, "--base", weights)
    before, after = torch.load(path), torch.load(tmp_path / "back.pth")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_comes_back_from_peft_under_its_name(dense, tmp_path, tokenizer, convert, refused, recwarn):
    path = adapter(tmp_path / "lora" / "identity8_64.pth", dense, tokenizer)
    before = torch.load(path)
    path.with_suffix(".json").write_text(
        json.dumps(read_sidecar(path) | {"flags": {"data_path": "/home/me/d.jsonl", "base_weight": "/home/me/b.pth"}})
    )
    convert("--input", path, "--out_dir", tmp_path, "--base", dense)
    written = files(tmp_path / "peft" / "identity8_64")
    assert json.loads(written["adapter_config.json"])["base_model_name_or_path"] == ""
    assert json.loads(written["minimind.json"])["flags"] == {"data_path": "d.jsonl"}
    back = ["--input", tmp_path / "peft" / "identity8_64", "--out_dir", tmp_path]
    assert f"{path} exists; --force" in refused(*back)
    convert(*back, "--force")
    assert [file.name for file in path.parent.glob("*.pth")] == ["identity8_64.pth"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in torch.load(path).items())
    assert read_sidecar(path)["config"]["num_attention_heads"] == 4
    recwarn.clear()
    load_lora(load_model(dense)[0].float(), path, tokenizer.sha256)
    assert not [warning for warning in recwarn if "tokenizer" in str(warning.message)]


def test_an_unknown_base_is_named_with_what_there_is(dense, tmp_path, tokenizer, refused):
    path = adapter(tmp_path / "lora_x_64.pth", dense, tokenizer)
    message = refused("--input", path, "--base", "nosuch", "--out_dir", dense.parent)
    assert "--base nosuch is neither a .pth file nor a stage; the stages are pretrain, full_sft" in message
    assert f"{dense.parent} holds: full_sft_64.pth" in message


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2.0}}, {"rank_pattern": {"q_proj": 2}},
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
    ],
)  # fmt: skip
def test_an_adapter_of_the_peft_library_becomes_ours(options, dense, tmp_path, convert):
    convert("--input", dense, "--output", tmp_path / "hf", "--dtype", "float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    torch.manual_seed(0)
    theirs = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    convert("--input", tmp_path / "peft", "--output", tmp_path / "lora_y_64.pth", "--base", dense)
    ours = load_lora(load_model(dense)[0].float(), tmp_path / "lora_y_64.pth")
    expected = logits(theirs)
    assert float((logits(ours) - expected).abs().max()) < 2e-3 * float(expected.abs().max())  # rounded to float16


@pytest.mark.parametrize(
    "options, named", [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")]
)
def test_adapters_that_ours_cannot_express_are_refused(options, named, dense, tmp_path, convert, refused):
    convert("--input", dense, "--output", tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options)).save_pretrained(tmp_path / "peft")
    assert named in refused("--input", tmp_path / "peft", "--output", tmp_path / "x.pth")


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "config, shapes, named",
    [
        ({"init_lora_weights": "lora_ga"}, (), "not init_lora_weights lora_ga"),
        ({"init_lora_weights": "mica"}, (), "not init_lora_weights mica"),
        ({"alora_invocation_tokens": [5, 6]}, (), "not alora_invocation_tokens"),
        ({"kasa_config": {}}, (), "not kasa_config"),
        ({"lora_bias": True}, (), "not lora_bias"),
        ({"peft_type": None}, (), "not peft_type None"),
        ([], (), "peft is damaged"),
        ({"lora_alpha": "x"}, (), "peft is damaged"),
        ({"alpha_pattern": {"(": 1}}, (), "peft is damaged"),
        ({}, ((0, 64), (64, 0)), "peft is damaged"),
        ({}, ((4, 64), (64, 8)), "A and B of one rank"),
        ({}, ((4,), (64,)), "A and B of one rank"),
    ],
)
def test_an_adapter_whose_file_says_more_or_nonsense_is_refused(config, shapes, named, dense, tmp_path, refused):
    if isinstance(config, dict):
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    shapes = dict(zip("AB", shapes or ((4, 64), (64, 4)), strict=True))
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {LAYER.format(side): torch.ones(shape) for side, shape in shapes.items()}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    assert named in refused("--input", tmp_path / "peft", "--base", dense, "--output", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_an_adapter_for_another_size_is_refused(dense, tmp_path, tokenizer, refused):
    other = write_weights(tmp_path / "full_sft_32.pth", tokenizer, hidden_size=32)
    path = adapter(tmp_path / "lora_x_32.pth", other, tokenizer)
    message = refused("--input", dense, "--lora_name", path, "--output", tmp_path / "hf")
    assert "--hidden_size" in message and not (tmp_path / "hf").exists()
    assert "--hidden_size" in refused("--input", path, "--base", dense, "--output", tmp_path / "peft")


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_without_flags_it_does_what_it_always_did(tmp_path, tokenizer, monkeypatch, convert):
    os.symlink(ROOT / "model", tmp_path / "model")
    monkeypatch.setattr(convert_model, "ROOT", tmp_path)
    monkeypatch.setitem(loading.SHARED_FLAGS["out_dir"], "default", str(tmp_path / "out"))
    write_weights(tmp_path / "out" / "full_sft_512.pth", tokenizer, hidden_size=512, num_hidden_layers=1, scale=1.0)
    convert()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "MiniMind2-Small")
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float16
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files(tmp_path / "MiniMind2-Small").keys() == names | {"README.md", "minimind.json"}


@pytest.mark.parametrize(
    "source, flags, named",
    [
        ("moe", ["--to", "llama"], "mixture of experts.*--to qwen2_moe"),
        ("dense", ["--to", "qwen2_moe"], "dense.*--to llama"),
        ("dense", ["--to", "gguf", "--gguf_type", "Q4_K_M"], "Q4_K_M.*F16 and Q8_0.*llama-quantize"),
        ("dense", ["--to", "gguf", "--dtype", "float32"], "--dtype"),
        ("dense", ["--gguf_type", "F16"], "--gguf_type is for --to gguf"),
        ("dense", ["--base", "full_sft"], "--base is for adapters"),
        ("dense", ["--to", "peft"], "--to peft is for adapters"),
        ("dense", ["--num_hidden_layers", "5"], "--num_hidden_layers is 5.*has 2"),
        ("dense", ["--num_attention_heads", "8"], "--num_attention_heads is 8.*says 4"),
        ("dense", ["--rope_scaling", "4"], "--trained_length"),
        ("dense", ["--lora_name", "nobody"], "nobody_64.pth not found"),
        ("dense", ["--tokenizer_path", "/nowhere"], "--tokenizer_path"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_written(source, flags, named, request, tmp_path, refused):
    path = request.getfixturevalue(source)
    assert re.search(named, refused("--input", path, "--output", tmp_path / "target", *flags))
    assert not list(tmp_path.iterdir())


def test_flags_that_an_input_has_no_use_for_are_refused(dense, tmp_path, tokenizer, convert, refused):
    convert("--input", dense, "--output", tmp_path / "hf")
    lora = adapter(tmp_path / "lora_x_64.pth", dense, tokenizer)
    for path, flags in (
        (tmp_path / "hf", (["--rope_theta", "1e4"], ["--num_attention_heads", "4"])),
        (lora, (["--dtype", "float32"], ["--lora_name", "x"], ["--rope_scaling", "4"], ["--gguf_type", "F16"])),
    ):
        for words in flags:
            message = refused("--input", path, "--output", tmp_path / "target", *words)
            assert f"{words[0]} is for" in message and not (tmp_path / "target").exists()


def test_missing_and_foreign_input_is_named(dense, tmp_path, refused):
    assert "run trainer/train_full_sft.py" in refused("--out_dir", tmp_path)
    assert "not found" in refused("--input", tmp_path / "nothing")
    assert "without config.json" in refused("--input", tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF, or not")
    assert "not a readable GGUF file" in refused("--input", tmp_path / "a.gguf")
    (tmp_path / "b.pth").write_bytes(b"not a weight file")
    assert "not a weight file" in refused("--input", tmp_path / "b.pth")


def test_weights_of_another_tokenizer_are_refused(dense, tmp_path, other_tokenizer, refused):
    flags = ["--input", dense, "--output", tmp_path / "hf", "--tokenizer_path", other_tokenizer]
    assert "was trained with the tokenizer" in refused(*flags)


def test_a_target_that_holds_something_is_replaced_only_by_force(dense, moe, tmp_path, convert, refused):
    target = tmp_path / "hf"
    convert("--input", dense, "--output", target)
    (target / "notes.txt").write_text("mine")
    for old in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja",
                "model_minimind.py", "adapter_config.json", "special_tokens_map.json"):  # fmt: skip
        (target / old).write_text("of an older export")
    before = files(target)
    message = refused("--input", moe, "--output", target)
    assert "is not empty" in message and "--force" in message and files(target) == before
    convert("--input", moe, "--output", target, "--force")
    assert json.loads((target / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert (target / "notes.txt").read_text() == "mine"
    assert [path.name for path in target.glob("model*")] == ["model.safetensors"]
    assert not [name for name, data in files(target).items() if data == b"of an older export"]
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)),
        logits(load_model(moe)[0]),
        rtol=0,
        atol=1e-5,
    )
    path = tmp_path / "x.pth"
    for flags in (["--to", "pth", "--output", path], ["--to", "gguf", "--output", tmp_path / "x.gguf"]):
        convert("--input", dense, *flags)
        assert "exists" in refused("--input", dense, *flags)
        convert("--input", dense, *flags, "--force")


def test_what_was_read_is_never_replaced(tmp_path, tokenizer, convert, refused):
    """Not even by force: the default name of --to pth is that of the weights an adapter is merged into."""
    base = write_weights(tmp_path / "full_sft_64.pth", tokenizer, **SHAPE)
    lora = adapter(tmp_path / "lora" / "lora_x_64.pth", base, tokenizer)
    convert("--input", base, "--output", tmp_path / "hf")
    convert("--input", base, "--output", tmp_path / "g", "--to", "gguf")
    convert("--input", lora, "--output", tmp_path / "peft")
    gguf_file = next((tmp_path / "g").glob("*.gguf"))
    (tmp_path / "link.pth").symlink_to(base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    merge = ["--out_dir", tmp_path, "--lora_name", "lora_x", "--to", "pth"]
    for flags in (
        merge,
        [*merge, "--output", lora],
        ["--input", base, "--to", "pth", "--output", tmp_path / "link.pth"],
        ["--input", tmp_path / "hf", "--to", "llama", "--output", tmp_path / "g" / ".." / "hf"],
        ["--input", gguf_file, "--to", "gguf", "--output", gguf_file],
        ["--input", gguf_file, "--to", "gguf", "--output", tmp_path / "g"],
        ["--input", tmp_path / "peft", "--output", base, "--base", base],
    ):
        assert refused(*flags, "--force") == "error: the target is what was read; name another with --output"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    convert(*merge, "--output", tmp_path / "merged.pth")
    assert read_sidecar(tmp_path / "merged.pth")["merged_adapter"] == "lora_x_64.pth"


@pytest.mark.parametrize("flags", [["--to", "llama"], ["--to", "minimind"], ["--to", "gguf"]])
def test_what_the_sidecar_tells_comes_back(flags, tmp_path, tokenizer, other_tokenizer, convert, capsys):
    about = {"stage": "rlhf", "metrics": {"loss": 1.5}, "flags": {"max_seq_len": 96}, "progress": {"step": 8}}
    with_path = about | {"flags": {"max_seq_len": 96, "data_path": "/home/me/data.jsonl"}}  # stays on this machine
    path = save_model(tmp_path / "rlhf_64.pth", sharp_model(**SHAPE), tokenizer, **with_path)
    convert("--input", path, "--output", tmp_path / "there", *flags)
    source = next((tmp_path / "there").glob("*.gguf"), tmp_path / "there")
    convert("--input", source, "--to", "pth", "--output", tmp_path / "back.pth")
    sidecar = read_sidecar(tmp_path / "back.pth")
    about["flags"]["data_path"] = "data.jsonl"
    expected = {**read_sidecar(path), "flags": about["flags"], "converted_from": source.name}
    assert sidecar == expected | {"config": sidecar["config"]}
    convert("--input", source, "--to", "pth", "--out_dir", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.pth")] == ["rlhf_64.pth"]
    convert("--input", source, "--to", "gguf", "--output", tmp_path / "long.gguf", "--rope_scaling", "4")
    assert read_gguf(tmp_path / "long.gguf")[1].rope_scaling["original_max_position_embeddings"] == 96
    # with another tokenizer they are not these weights' facts
    convert_model.main(
        ["--input", str(source), "--to", "pth", "--output", str(tmp_path / "other.pth")]
        + ["--tokenizer_path", str(other_tokenizer)]
    )
    assert "names another tokenizer" in capsys.readouterr().err
    sidecar = read_sidecar(tmp_path / "other.pth")
    assert not about.keys() & sidecar.keys() and sidecar["tokenizer_sha256"] != tokenizer.sha256


@pytest.mark.parametrize(
    "function, target, flags",
    [
        ("to_hf", "hf", []),
        ("write_gguf", "g", ["--to", "gguf"]),
        ("save_weights", "new.pth", ["--to", "pth"]),
    ],
)
def test_a_conversion_that_changes_a_weight_fails_its_own_check(
    function, target, flags, dense, tmp_path, monkeypatch, refused
):
    right = getattr(convert_model, function)
    key = "model.layers.1.self_attn.k_proj.weight"

    def spoilt(*arguments):
        place = 0 if function == "to_hf" else 1
        state = arguments[place] if isinstance(arguments[place], dict) else arguments[place].state_dict()
        state = {**state, key: state[key].roll(1, dims=0)}
        return right(*arguments[:place], state, *arguments[place + 1 :])

    monkeypatch.setattr(convert_model, function, spoilt)
    assert "other logits" in refused("--input", dense, "--output", tmp_path / target, *flags)
    assert not list(tmp_path.iterdir())


def test_a_sidecar_names_the_tokenizer_only_when_it_is_known(dense, tmp_path, tokenizer, convert):
    bare = tmp_path / "bare.pth"
    shutil.copy(dense, bare)
    flags = ["--input", bare, "--num_attention_heads", 4, "--to", "pth"]
    convert(*flags, "--output", tmp_path / "a.pth")
    convert(*flags, "--output", tmp_path / "b.pth", "--tokenizer_path", ROOT / "model")
    assert "tokenizer_sha256" not in read_sidecar(tmp_path / "a.pth")
    assert read_sidecar(tmp_path / "b.pth")["tokenizer_sha256"] == tokenizer.sha256
    assert np.allclose(logits(load_model(tmp_path / "a.pth")[0]), logits(load_model(dense)[0]))
