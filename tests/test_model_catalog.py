"""What the server and the web page offer: models in an output folder and in Hugging Face format, with adapters."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, sharp_model, write_weights
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.tokenization import ChatTokenizer
from model.loading import load_ready
from model.model_lora import apply_lora, lora_layers, save_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model
from scripts.model_catalog import Entry, find_models, load_entry, size_label


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("out")
    write_weights(folder / "pretrain_32.pth", tokenizer)
    write_weights(folder / "full_sft_32.pth", tokenizer, seed=1)
    write_weights(folder / "reason_32_moe.pth", tokenizer, use_moe=True)
    write_weights(folder / "full_sft_48.pth", tokenizer, hidden_size=48)
    for name, use_moe in (("lora_medical_32", False), ("lora_identity_32", False), ("lora_medical_32_moe", True)):
        model = apply_lora(sharp_model(use_moe=use_moe), rank=2)
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora.B.weight)
        save_lora(folder / "lora" / f"{name}.pth", model, {"tokenizer_sha256": tokenizer.sha256})
    (folder / "notes.pth").write_text("none of ours")
    (folder / "resume").mkdir()
    return folder


def save_folder(folder: Path, seed: int = 2, tokenizer: bool = True) -> Path:
    sharp_model(seed=seed).save_pretrained(folder)
    if tokenizer:
        shutil.copy(ROOT / "model" / "tokenizer.json", folder)
        shutil.copy(ROOT / "model" / "tokenizer_config.json", folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 20).unsqueeze(0)).logits


def test_everything_in_the_output_folder_chat_models_first(out_dir):
    entries = find_models(out_dir, folders=())
    assert [entry.name for entry in entries] == ["full_sft_32", "full_sft_48", "reason_32_moe", "pretrain_32"]
    assert [entry.stage for entry in entries] == ["full_sft", "full_sft", "reason", "pretrain"]
    first, other, moe, _ = entries
    assert first.adapters == ("lora_identity", "lora_medical") and other.adapters == ()
    assert moe.adapters == ("lora_medical",) and moe.use_moe and moe.size == "0.3M MoE"
    assert first == Entry(
        "full_sft_32", out_dir / "full_sft_32.pth", "full_sft", "0.2M", 32, False, first.adapters, out_dir
    )


def test_folders_in_hugging_face_format(out_dir, tmp_path):
    save_folder(tmp_path / "place" / "MiniMind2")
    save_folder(tmp_path / "full_sft_32")
    (tmp_path / "place" / "empty").mkdir()
    (tmp_path / "place" / "broken").mkdir()
    (tmp_path / "place" / "broken" / "config.json").write_text("{")
    shutil.copy(tmp_path / "full_sft_32" / "model.safetensors", tmp_path / "place" / "broken")
    entries = find_models(out_dir, folders=(tmp_path / "place", tmp_path / "full_sft_32", tmp_path / "missing"))[4:]
    # a name that is taken becomes the path
    assert [entry.name for entry in entries] == ["MiniMind2", str(tmp_path / "full_sft_32")]
    assert all(entry.path.is_dir() for entry in entries)
    assert entries[0].size == "0.2M" and entries[0].adapters == ("lora_identity", "lora_medical")


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on Linux only")
def test_names_that_are_not_utf8_are_escaped(tmp_path, tokenizer):
    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "caf\udce9_32.pth").write_bytes(b"")
    save_folder(tmp_path / "caf\udce9")
    entries = find_models(tmp_path, folders=())
    assert [entry.name for entry in entries] == ["full_sft_32", "caf\\udce9"]
    assert entries[0].adapters == entries[1].adapters == ("caf\\udce9",)
    with pytest.raises(ValueError, match="not valid UTF-8"):  # safetensors refuses such a path
        load_entry(entries[1])


def test_an_empty_place_holds_no_models(tmp_path):
    assert find_models(tmp_path / "missing", folders=(tmp_path,)) == []


@pytest.mark.parametrize(
    "fields, label",
    [
        ({"hidden_size": 512, "num_hidden_layers": 8}, "26M"),
        ({"hidden_size": 768, "num_hidden_layers": 16}, "104M"),
        ({"hidden_size": 640, "num_hidden_layers": 8, "use_moe": True}, "145M MoE"),
        ({"hidden_size": 192, "num_hidden_layers": 8}, "4.3M"),
    ],
)
def test_sizes_are_called_as_people_call_them(fields, label):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**fields))
    assert size_label(sum(p.numel() for p in model.parameters()), fields.get("use_moe", False)) == label


def test_a_file_that_cannot_be_read_is_listed_and_loading_says_why(tmp_path):
    (tmp_path / "full_sft_32.pth").write_bytes(b"broken")
    (entry,) = find_models(tmp_path, folders=())
    assert entry.size == ""
    with pytest.raises(ValueError, match="not a weight file"):
        load_entry(entry)


def test_a_file_that_changed_is_looked_at_again(tmp_path, tokenizer):
    path = write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    assert find_models(tmp_path, folders=())[0].size == "0.2M"
    write_weights(path, tokenizer, num_hidden_layers=12)
    os.utime(path, ns=(1, 1))
    assert find_models(tmp_path, folders=())[0].size == "0.4M"


def test_what_is_loaded_is_what_the_file_holds(out_dir, tokenizer):
    entry = find_models(out_dir, folders=())[0]
    model, its_tokenizer, *_ = load_entry(entry)
    assert torch.equal(logits(model), logits(load_model(entry.path)[0]))
    assert its_tokenizer.sha256 == tokenizer.sha256 and not model.training
    assert next(load_entry(entry, dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16


def test_an_adapter_is_merged(out_dir):
    entry = find_models(out_dir, folders=())[0]
    plain, merged = load_model(entry.path)[0], load_entry(entry, lora_name="lora_medical").model
    from model.model_lora import load_lora

    adapted = load_lora(plain, out_dir / "lora" / "lora_medical_32.pth")
    assert not list(lora_layers(merged))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits(merged), logits(load_entry(entry)[0]), atol=0.1)


def test_an_adapter_for_another_size_is_refused(out_dir):
    other = find_models(out_dir, folders=())[1]
    with pytest.raises(ValueError, match=r"lora_medical_48.pth not found.*lora_medical_32.pth"):
        load_entry(other, lora_name="lora_medical")
    with pytest.raises(ValueError, match="another --hidden_size"):
        load_entry(other, lora_name=str(out_dir / "lora" / "lora_medical_32.pth"))


def test_a_folder_is_loaded_with_its_own_tokenizer(out_dir, tmp_path, other_tokenizer):
    folder = save_folder(tmp_path / "MiniMind2", tokenizer=False)
    (entry,) = find_models(tmp_path / "none", folders=(folder,))
    assert load_entry(entry)[1].path == ROOT / "model"
    shutil.copy(other_tokenizer / "tokenizer.json", folder)
    shutil.copy(other_tokenizer / "tokenizer_config.json", folder)
    model, tokenizer, *_ = load_entry(entry)
    assert tokenizer.path == folder
    torch.testing.assert_close(logits(model), logits(sharp_model(seed=2).eval()))


def test_a_folder_is_asked_through_its_own_chat_template(tmp_path):
    """If it has none, or flags put another in its place, a warning names both."""
    folder = tmp_path / "theirs"
    config = LlamaConfig(
        vocab_size=6400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(ROOT / "model" / "tokenizer.json", folder)
    config = json.loads((ROOT / "model" / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ messages[0].content }}!"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready = load_ready(folder, ChatTokenizer)
    hello = [{"role": "user", "content": "hello"}]
    assert ready.tokenizer.decode(ready.tokenizer.encode_prompt(hello)) == "hello!"
    with pytest.warns(UserWarning, match=f"{folder} is asked through {ROOT / 'model'}/tokenizer_config.json, not"):
        load_ready(folder, ChatTokenizer, tokenizer_path=ROOT / "model")
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"{folder} is asked through MiniMind's chat template, not"):
        load_ready(folder, ChatTokenizer)


def test_the_context_is_stretched_when_asked(out_dir):
    entry = find_models(out_dir, folders=())[0]
    plain, stretched = (load_entry(entry, **flags) for flags in ({}, {"rope_scaling": 4.0, "trained_length": 16}))
    assert plain.context_length == 8192 and stretched.context_length == 64
    plain, stretched = plain.model, stretched.model
    assert plain.config.rope_scaling is None and stretched.config.rope_scaling["factor"] == 4
    assert not torch.allclose(logits(plain), logits(stretched), atol=1e-4)
    with pytest.raises(ValueError, match="--trained_length"):  # this sidecar knows no length
        load_entry(entry, rope_scaling=4.0)


def test_weights_of_another_tokenizer_are_refused(out_dir, other_tokenizer):
    entry = find_models(out_dir, folders=())[0]
    with pytest.raises(ValueError, match="--tokenizer_path"):
        load_entry(entry, tokenizer_path=other_tokenizer)


def test_looking_does_not_read_the_tensors(tmp_path, tokenizer, monkeypatch):
    """A file that nothing has looked at, as what is counted once is remembered."""
    write_weights(tmp_path / "full_sft_32.pth", tokenizer)
    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, mmap=False, **k: mapped.append(mmap) or load(*a, mmap=mmap, **k))
    assert find_models(tmp_path, folders=())[0].size == "0.2M" and mapped == [True]
