"""Weight files: names and dtypes of the original, written whole or not at all, and refused with a cure."""

import json
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from model import weights
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import (
    WeightsError,
    config_from_state_dict,
    find_weights,
    load_model,
    load_weights,
    read_sidecar,
    read_state_dict,
    save_weights,
    sidecar_path,
    weight_path,
)

COMPAT = Path(__file__).parent / "compat"


def tiny_model(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 97, "max_position_embeddings": 512}
    return MiniMindForCausalLM(MiniMindConfig(**{**sizes, **fields}))


# --- names and contents ----------------------------------------------------------------------------------------------


def test_naming_rule(tmp_path):
    assert weight_path("out", "pretrain", 512, False) == Path("out/pretrain_512.pth")
    assert weight_path(tmp_path, "full_sft", 640, True) == tmp_path / "full_sft_640_moe.pth"
    assert sidecar_path("out/rlhf_512_moe.pth") == Path("out/rlhf_512_moe.json")
    assert sidecar_path("w.gguf") == Path("w.gguf.json")
    assert sidecar_path("MiniMind2") == Path("MiniMind2/minimind.json")


def test_every_stage_has_its_own_mode_script_and_order():
    modes = {"pretrain": 0, "full_sft": 1, "rlhf": 2, "reason": 3, "full_dist": 4, "grpo": 5}
    assert {name: stage.mode for name, stage in weights.STAGES.items()} == modes
    assert sorted(stage.order for stage in weights.STAGES.values()) == list(range(1, len(modes) + 1))
    scripts = {stage.script for stage in weights.STAGES.values()}
    assert scripts < {path.name for path in (Path(weights.__file__).parents[1] / "trainer").glob("train_*.py")}


def test_weights_found_by_stage_or_path(tmp_path):
    """A size of None is open; exact sizes never fall back to another file."""
    path = weight_path(tmp_path, "full_sft", 64, False)
    path.touch()
    assert find_weights("full_sft", tmp_path) == find_weights("full_sft", tmp_path, 64, False) == path
    assert find_weights(str(path), tmp_path / "elsewhere") == path
    for size, moe, name in ((512, False, "full_sft_512.pth"), (64, True, "full_sft_64_moe.pth")):
        with pytest.raises(WeightsError, match=f"{name} not found; run trainer/train_full_sft.py.*holds: full_sft_64"):
            find_weights("full_sft", tmp_path, size, moe)
    with pytest.raises(WeightsError, match="sft is neither a .pth file nor a stage.*full_sft_64.pth"):
        find_weights("sft", tmp_path)


def test_missing_weights_name_the_quickstart(tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "full_sft_192.pth").touch()
    with pytest.raises(WeightsError, match="--out_dir .*quickstart holds: full_sft_192.pth"):
        find_weights("full_sft", tmp_path)
    with pytest.raises(WeightsError) as refused:
        find_weights("rlhf", tmp_path)
    assert "quickstart" not in str(refused.value).removeprefix(str(tmp_path))


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_saved_file_has_the_original_keys_shapes_and_dtypes(name, tmp_path):
    original = torch.load(COMPAT / f"{name}.pth", weights_only=True)
    config = MiniMindConfig(**json.loads((COMPAT / f"{name}_config.json").read_text()))
    save_weights(tmp_path / "ours.pth", MiniMindForCausalLM(config))
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert type(ours) is type(original)
    described = [{key: (t.shape, t.dtype) for key, t in state.items()} for state in (ours, original)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_original_file_loads_by_itself_and_survives_saving(name, tmp_path):
    """Sizes are read off the tensors; only the number of heads, which they do not show, comes from the sidecar."""
    fields = json.loads((COMPAT / f"{name}_config.json").read_text())
    state = torch.load(COMPAT / f"{name}.pth", weights_only=True)
    path = tmp_path / "full_sft_64.pth"
    torch.save(state, path)
    sidecar_path(path).write_text(json.dumps({"config": {"num_attention_heads": fields["num_attention_heads"]}}))
    model, _ = load_model(path)
    for field in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "use_moe"):
        assert getattr(model.config, field) == fields[field], field
    assert not model.training
    expected = torch.load(COMPAT / f"{name}_expected.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"], atol=1e-4, rtol=0)
    save_weights(tmp_path / "again.pth", model)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_sizes_read_from_the_weights():
    fields = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 160, "num_key_value_heads": 4}
    moe = {"use_moe": True, "n_routed_experts": 5, "n_shared_experts": 2}
    for given in (fields, {**fields, **moe}):
        config = config_from_state_dict(tiny_model(**given).state_dict())
        for field, value in given.items():
            assert getattr(config, field) == value, field


def test_more_than_ten_layers_are_counted():
    assert config_from_state_dict(tiny_model(num_hidden_layers=12).state_dict()).num_hidden_layers == 12


def test_tied_tensors_are_stored_once(tmp_path):
    """A large embedding under two names: the file holds its bytes once, and loads as one storage."""
    model = tiny_model(vocab_size=5000)
    save_weights(tmp_path / "tied.pth", model)
    unique = sum(p.numel() for p in model.parameters()) * 2
    assert unique < (tmp_path / "tied.pth").stat().st_size < unique + 40_000
    state = torch.load(tmp_path / "tied.pth", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    save_weights(tmp_path / "w.pth", model)
    assert all(torch.equal(t, before[key]) and t.dtype == torch.float32 for key, t in model.state_dict().items())


def test_wrapper_prefixes_are_stripped(tmp_path):
    def wrap(name: str, module: nn.Module) -> nn.Module:  # what torch.compile and DistributedDataParallel do to names
        outer = nn.Module()
        outer.add_module(name, module)
        return outer

    model = tiny_model()
    save_weights(tmp_path / "plain.pth", model)
    save_weights(tmp_path / "compiled.pth", wrap("module", wrap("_orig_mod", model)))
    plain, compiled = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("plain", "compiled"))
    assert list(plain) == list(compiled)
    torch.save({f"module._orig_mod.{key}": tensor for key, tensor in plain.items()}, tmp_path / "prefixed.pth")
    assert list(read_state_dict(tmp_path / "prefixed.pth")) == list(plain)


# --- written whole or not at all -------------------------------------------------------------------------------------


def test_what_a_killed_process_left_half_written_goes_with_the_next_save(tmp_path):
    """Of the same file only."""
    stale, other = tmp_path / ".pretrain_64.pth.abc.tmp", tmp_path / ".pretrain_64_moe.pth.abc.tmp"
    stale.write_bytes(b"half")
    (tmp_path / ".pretrain_64.pth.def.tmp").mkdir()  # of another program
    other.write_bytes(b"half")
    save_weights(tmp_path / "pretrain_64.pth", tiny_model())
    assert not stale.exists() and other.exists()


def test_failure_while_writing_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "pretrain_64.pth"
    save_weights(path, tiny_model(), {"stage": "pretrain"})
    before = path.read_bytes()

    def breaks_off(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", breaks_off)
    with pytest.raises(WeightsError, match="No space left.*previous file is as it was.*--out_dir"):
        save_weights(path, tiny_model(vocab_size=98))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pretrain_64.json", "pretrain_64.pth"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE stands in for a full disk")
def test_full_disk_keeps_the_previous_file(tmp_path):
    """A real write error in the middle of the file, as torch.save reports it."""
    import resource
    import signal

    path = tmp_path / "pretrain_64.pth"
    save_weights(path, tiny_model())
    before = path.read_bytes()
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(WeightsError, match="previous file is as it was"):
            save_weights(path, {"model.embed_tokens.weight": torch.zeros(1000, 1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pretrain_64.pth"]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    with pytest.raises(WeightsError, match="cannot write .*--out_dir"):
        save_weights(tmp_path / "out" / "pretrain_64.pth", tiny_model())


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_saved_file_has_the_usual_permissions(tmp_path):
    save_weights(tmp_path / "w.pth", tiny_model())
    (tmp_path / "usual").touch()
    assert (tmp_path / "w.pth").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("value, message", [(float("nan"), "holds NaN or infinity"), (1e5, "beyond float16's 65504")])
def test_values_that_half_precision_cannot_hold(value, message, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(WeightsError, match=f"model.norm.weight .*{message}"):
        save_weights(tmp_path / "w.pth", model)
    assert not list(tmp_path.iterdir())


# --- refused with a cure ---------------------------------------------------------------------------------------------


def test_missing_file_names_the_script_and_lists_what_is_there(tmp_path):
    save_weights(tmp_path / "pretrain_512.pth", tiny_model())
    with pytest.raises(WeightsError, match=r"full_sft_512.pth not found; run .*/train_full_sft.py.*pretrain_512.pth"):
        read_state_dict(tmp_path / "full_sft_512.pth")
    with pytest.raises(WeightsError, match="train_distillation.py"):
        read_state_dict(tmp_path / "full_dist_512.pth")
    with pytest.raises(WeightsError, match="no weights"):
        read_state_dict(tmp_path / "nowhere" / "rlhf_512.pth")


def test_folder_instead_of_file(tmp_path):
    (tmp_path / "full_sft_512.pth").mkdir()
    with pytest.raises(WeightsError, match="is a folder, not a weight file"):
        read_state_dict(tmp_path / "full_sft_512.pth")


def test_pickle_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was_run"),)

    def dump(content, path):
        path.write_bytes(pickle.dumps(content, protocol=2))

    for name, write in (("torch.pth", torch.save), ("bare.pth", dump)):
        write({"model.norm.weight": Payload()}, tmp_path / name)
        with pytest.raises(WeightsError, match="not a weight file of tensors only"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 half a zip"], ids=["empty", "text", "cut"])
def test_broken_file(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match="w.pth is not a weight file"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "is empty.*fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 52\n", "Git-LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page.*download the file itself"),
        (b'{"error": "not found"}', "is JSON.*download the file again"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "is compressed.*unpack"),
        (b"GGUF\x03\0\0\0", "a GGUF file.*convert_model.py"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"a": {}}', "safetensors file.*--load 1"),
        (pickle.dumps({"a": os.getcwd}), "which could run code"),
    ],
    ids=["empty", "lfs", "html", "json", "gzip", "gguf", "safetensors", "pickle"],
)
def test_files_that_were_saved_as_weights_by_mistake_are_named(content, what, tmp_path):
    (tmp_path / "full_sft_512.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=f"full_sft_512.pth is not a weight file.*{what}") as refused:
        read_state_dict(tmp_path / "full_sft_512.pth")
    assert "weights_only" not in str(refused.value)


def test_cut_off_file(tmp_path):
    save_weights(tmp_path / "w.pth", tiny_model())
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a weight file"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [{}, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, torch.zeros(2)], ids=str)
def test_not_a_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not hold a plain state dict"):
        read_state_dict(tmp_path / "w.pth")


def test_other_weights(tmp_path):
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="not MiniMind weights"):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("key", ["tok_embeddings.weight", "layers.0.attention.wq.weight"])
def test_old_format_is_recognised(key, tmp_path):
    torch.save({key: torch.zeros(2, 2), "norm.weight": torch.zeros(2)}, tmp_path / "full_sft_512.pth")
    with pytest.raises(WeightsError, match=r"before April 2025.*scripts/convert_model.py"):
        read_state_dict(tmp_path / "full_sft_512.pth")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 128}, "--hidden_size is 128 here and 64 in the file"),
        ({"num_hidden_layers": 3}, "--num_hidden_layers is 3 here and 2 in the file"),
        ({"use_moe": True}, "--use_moe is True here and False in the file"),
        ({"vocab_size": 101}, "--vocab_size is 101 here and 97 in the file"),
    ],
)
def test_wrong_size_names_the_flag(fields, message, tmp_path):
    save_weights(tmp_path / "pretrain_64.pth", tiny_model())
    model = tiny_model(**fields)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "pretrain_64.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_missing_tensor_is_named(tmp_path):
    state = {key: t for key, t in tiny_model().state_dict().items() if key != "model.layers.1.mlp.up_proj.weight"}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="missing in the file.*layers.1.mlp.up_proj"):
        load_weights(tiny_model(), tmp_path / "w.pth")


# --- sidecar ---------------------------------------------------------------------------------------------------------


def test_sidecar_round_trip(tmp_path):
    model = tiny_model(rope_theta=1e4, num_attention_heads=4)
    sidecar = {"stage": "pretrain", "config": model.config.to_dict(), "tokenizer_sha256": "ab" * 32, "loss": 2.5}
    save_weights(tmp_path / "w.pth", model, sidecar)
    assert read_sidecar(tmp_path / "w.pth") == json.loads(json.dumps(sidecar, default=str))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reloaded, seen = load_model(tmp_path / "w.pth", "ab" * 32)
    assert seen["loss"] == 2.5
    assert (reloaded.config.rope_theta, reloaded.config.num_attention_heads) == (1e4, 4)


def test_weights_without_sidecar_load_with_a_warning(tmp_path):
    save_weights(tmp_path / "w.pth", tiny_model())
    with pytest.warns(UserWarning, match="no sidecar that names its tokenizer.*--tokenizer_path"):
        assert load_weights(tiny_model(), tmp_path / "w.pth", "ab" * 32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(tiny_model(), tmp_path / "w.pth")


def test_another_tokenizer_is_refused(tmp_path):
    save_weights(tmp_path / "w.pth", tiny_model(), {"tokenizer_sha256": "ab" * 32})
    message = "abababababab….*cdcdcdcdcdcd….*--tokenizer_path"
    with pytest.raises(WeightsError, match=message):
        load_weights(tiny_model(), tmp_path / "w.pth", "cd" * 32)
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path / "w.pth", "cd" * 32)


@pytest.mark.parametrize("content", ["{broken", "[1, 2]"])
def test_broken_sidecar(content, tmp_path):
    save_weights(tmp_path / "w.pth", tiny_model())
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(WeightsError, match="w.json is not .*delete it"):
        load_weights(tiny_model(), tmp_path / "w.pth")


def test_json_is_written_beside_and_renamed(tmp_path, monkeypatch):
    weights.write_json(tmp_path / "a.json", {"n": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(WeightsError, match="cannot write"):
        weights.write_json(tmp_path / "a.json", {"n": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_another_number_of_heads_is_told_by_the_sidecar(tmp_path):
    """The tensors have the same shapes, but mean another model."""
    path = tmp_path / "w.pth"
    model = tiny_model()
    heads = model.config.num_attention_heads
    save_weights(path, model, {"config": {"num_attention_heads": 2 * heads}})
    with pytest.raises(WeightsError, match=f"--num_attention_heads is {heads} here and {2 * heads} in the file"):
        load_weights(tiny_model(), path)
    save_weights(path, model, {"config": {"num_attention_heads": heads}})
    load_weights(tiny_model(), path)
