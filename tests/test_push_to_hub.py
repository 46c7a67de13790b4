"""Uploads through the real client libraries to a hub on this machine that refuses, breaks off and starts again."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_python, write_conversations, write_weights
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard, constants, snapshot_download
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.weights import load_model, save_weights, write_json
from scripts import convert_model, push_to_hub

PRIVATE = {".env": "SECRET=1", "optimizer.resume": "state", "notes.txt": "mine", ".cache/x.json": "{}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> Path:
    """out/ with weights as a run leaves them, and what convert_model.py makes of them."""
    folder = tmp_path_factory.mktemp("made")
    weights = write_weights(folder / "out" / "full_sft_32.pth", tokenizer, scale=3.0)
    model, sidecar = load_model(weights)
    flags = {"data_path": "/home/me/secret/sft.jsonl", "optimizer": "adamw", "learning_rate": 5e-4, "max_seq_len": 512}
    known = {"stage": "full_sft", "flags": flags, "metrics": {"loss": 2.5, "valid_loss": 2.25}}
    save_weights(weights, model, sidecar | known | {"progress": {"step": 7, "tokens": 12345, "complete": True}})
    for kind, name in (("llama", "Tiny"), ("gguf", "Tiny.gguf")):
        convert_model.main(["--input", str(weights), "--to", kind, "--output", str(folder / name)])
    for name, text in PRIVATE.items():
        path = folder / "Tiny" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = FakeHub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # yours may hold such a commit
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the libraries wait before they try again
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.shutdown()
    server.server_close()


HUBS = pytest.mark.parametrize("to", ["huggingface", "modelscope"])


def push(to: str, *words: object, repo_id: str = "me/tiny") -> None:
    if to == "modelscope":
        pytest.importorskip("modelscope_hub", reason="modelscope-hub is not installed: requirements-cloud.txt")
    push_to_hub.main(["--repo_id", repo_id, "--to", to, *map(str, words)])


def error_of(*arguments, **options) -> str:
    with pytest.raises(SystemExit) as stopped:
        push(*arguments, **options)
    assert str(stopped.value).startswith("error: ") and TOKEN not in str(stopped.value)
    return str(stopped.value)


def listed(printed: str) -> set[str]:
    return set(re.findall(r"^(\S+) +[\d.,]+ MB$", printed, re.MULTILINE))


@HUBS
def test_what_is_listed_arrives_and_nothing_else(hub, made, to, capsys, caplog):
    paths = made / "Tiny", made / "Tiny.gguf", made / "out" / "full_sft_32.pth"
    push(to, *paths, "--dry_run")
    shown = listed(capsys.readouterr().out)
    assert not hub.asked
    push(to, *paths)
    printed = capsys.readouterr()
    held = hub.repos["models/me/tiny"]
    assert set(held) == shown >= {"model.safetensors", "config.json", "tokenizer.json", "Tiny.gguf", "full_sft_32.pth"}
    assert not [name for name in held if name in PRIVATE or name.startswith(".")]
    assert held["full_sft_32.pth"] == (made / "out" / "full_sft_32.pth").read_bytes()
    assert b"/home/me" not in b"".join(held.values()) and TOKEN not in printed.out + printed.err + caplog.text
    asked = len(hub.asked)
    push(to, *paths)  # once more: nothing large is sent again
    assert set(hub.sent.values()) == {1} and not any(line.startswith("PUT") for line in hub.asked[asked:])


def test_downloaded_again_it_gives_the_same_logits_without_our_code(hub, made, tmp_path):
    push("huggingface", made / "Tiny")
    folder = snapshot_download("me/tiny", cache_dir=tmp_path)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours, _ = load_model(made / "out" / "full_sft_32.pth")
    ids = torch.tensor([tokenizer.encode("今天天气很好 and then it rained")])
    with torch.no_grad():
        a, b = ours.float()(ids).logits, theirs.float()(ids).logits
    assert type(theirs).__name__ == "LlamaForCausalLM" and (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_the_card_says_what_is_known_and_its_front_matter_is_valid(hub, made, tmp_path):
    scores = tmp_path / "full_sft_32.json"
    write_json(scores, {})
    scores.with_suffix(".md").write_text("| task | accuracy |\n|---|---|\n| ceval | 31.4 |\n")
    paths = made / "Tiny", made / "Tiny.gguf", made / "out" / "full_sft_32.pth"
    push("huggingface", *paths, "--scores", scores, "--license", "mit", "--language", "en", "--private")
    assert hub.private == {"models/me/tiny"}
    text = hub.repos["models/me/tiny"]["README.md"].decode()
    card = ModelCard(text)
    card.validate()
    data = card.data
    assert (data.license, data.language, data.library_name) == ("mit", ["en"], "transformers")
    assert data.pipeline_tag == "text-generation" and "text-generation-inference" in data.tags
    for said in ("full_sft (train_full_sft.py)", "0.24M", "sft.jsonl", "12,345", "2.2500", "| ceval | 31.4 |",
                 'from_pretrained("me/tiny")', "vllm serve me/tiny", "llama-cli -hf me/tiny", "hf.co/me/tiny",
                 "python eval_model.py --model_mode 1"):  # fmt: skip
        assert said in text, said
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_the_card_of_a_converted_folder_names_the_data_but_not_where_it_was(hub, made):
    push("huggingface", made / "Tiny")
    files = hub.repos["models/me/tiny"]
    assert "| trained on | sft.jsonl |" in files["README.md"].decode() and b"secret" not in b"".join(files.values())


def test_the_card_survives_sidecars_of_others(tmp_path):
    odd = {"flags": {"data_path": None}, "progress": {"tokens": None, "step": "many"}, "metrics": {"loss": "low"}}
    save_weights(tmp_path / "a.pth", {"x": torch.zeros(2)}, odd)
    assert "trained on" not in push_to_hub.model_card("me/a", {"a": tmp_path / "a.pth"}, ["a.pth"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full_sft_640_moe.pth", "--model_mode 1"),
        ("rlhf_512.pth", "--model_mode 2"),
        ("lora_x_640_moe.pth", "--lora_name lora_x"),
    ],
)
def test_the_command_of_the_card_is_that_of_the_file(name, said, tmp_path):
    save_weights(tmp_path / name, {"x": torch.zeros(2)})
    card = push_to_hub.model_card("me/a", {name: tmp_path / name}, [name])
    assert f"python eval_model.py {said}\n" in card


def test_folders_of_gguf_files_go_up_with_their_facts(hub, made, tmp_path, capsys):
    for kind in ("F16", "Q8_0"):
        words = ["--input", str(made / "out" / "full_sft_32.pth"), "--to", "gguf", "--gguf_type", kind]
        convert_model.main([*words, "--output", str(tmp_path / kind)])
    capsys.readouterr()
    push("huggingface", tmp_path / "F16", tmp_path / "Q8_0")
    names = [f"MiniMind2-32-{kind}" for kind in ("F16", "Q8_0")]
    wanted = {"README.md", "Modelfile", f"{names[1]}.Modelfile"}
    wanted |= {f"{name}.gguf{end}" for name in names for end in ("", ".json")}
    files = hub.repos["models/me/tiny"]
    assert set(files) == wanted == listed(capsys.readouterr().out)
    assert f"FROM ./{names[1]}.gguf".encode() in files[f"{names[1]}.Modelfile"]
    assert files["README.md"].decode().count("| trained on | sft.jsonl |") == 2


@pytest.mark.full
def test_the_python_of_the_card_runs(hub, made, tmp_path):
    push("huggingface", made / "Tiny")
    code = re.search(r"```python\n(.*?)```", hub.repos["models/me/tiny"]["README.md"].decode(), re.DOTALL)[1]
    done = run_python("-c", code.replace("256", "4"), HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), NO_PROXY="*")
    assert done.returncode == 0 and "<|im_start|>user\n你好" in done.stdout, done.stderr


def test_a_card_that_someone_wrote_stays_and_ours_is_renewed(hub, made):
    push("huggingface", made / "Tiny", "--license", "mit")
    push("huggingface", made / "Tiny", "--license", "gpl-3.0")
    files = hub.repos["models/me/tiny"]
    assert b"gpl-3.0" in files["README.md"]
    files["README.md"] = b"# written by hand\n"
    push("huggingface", made / "Tiny")
    assert files["README.md"] == b"# written by hand\n"


def test_an_adapter_names_its_base(hub, made, tmp_path, tokenizer):
    adapter = tmp_path / "lora" / "lora_mine_32.pth"
    adapter.parent.mkdir()
    weights = {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(8, 32)}
    save_weights(adapter, weights, {"stage": "lora", "tokenizer_sha256": tokenizer.sha256})
    push("huggingface", adapter, "--base_model", "me/tiny", repo_id="me/adapter")
    text = hub.repos["models/me/adapter"]["README.md"].decode()
    assert ModelCard(text).data.base_model == "me/tiny" and "--lora_name lora_mine" in text and "out/lora" in text


def test_a_peft_folder_is_told_its_base(hub, tmp_path):
    write_json(tmp_path / "peft" / "adapter_config.json", {"base_model_name_or_path": "", "r": 8})
    save_file({"x": torch.zeros(2)}, tmp_path / "peft" / "adapter_model.safetensors")
    push("huggingface", tmp_path / "peft", "--base_model", "me/tiny", repo_id="me/adapter")
    files = hub.repos["models/me/adapter"]
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "me/tiny", "r": 8}
    text = files["README.md"].decode()
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in text and "```bash" not in text
    assert 'AutoTokenizer.from_pretrained("me/tiny")' in text
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec")


@HUBS
def test_data_goes_to_a_dataset_repository(hub, tmp_path, to):
    data = write_conversations(tmp_path / "mine.jsonl")
    long = tmp_path / "more.jsonl"
    long.write_text(f'{{"text": "{"word " * 1000}"}}\n' * 5)
    push(to, data, long, "--dataset", repo_id="me/data")
    files = hub.repos["datasets/me/data"]
    assert files["mine.jsonl"] == data.read_bytes() and "| mine.jsonl | 40 |" in files["README.md"].decode()
    assert "| more.jsonl | 5 |" in files["README.md"].decode()


def test_a_branch_is_made_for_a_revision(hub, made):
    push("huggingface", made / "Tiny", "--revision", "v2")
    assert hub.branches["models/me/tiny"] == {"v2"}
    assert "POST /api/models/me/tiny/commit/v2" in hub.asked
    push("huggingface", made / "Tiny", "--revision", "v2")  # its files are asked for, not those of the main branch
    assert "GET /api/models/me/tiny/tree/v2" in hub.asked
    assert any("/resolve/v2/README.md" in line for line in hub.asked)


# --- what goes wrong -------------------------------------------------------------------------------------------------


@HUBS
@pytest.mark.parametrize("fault", ["cut", 503, 429])
def test_the_libraries_recover_from_what_passes(hub, made, to, fault):
    hub.faults = {"/put/": [fault]}
    push(to, made / "out" / "full_sft_32.pth")
    assert hub.repos["models/me/tiny"]["full_sft_32.pth"] == (made / "out" / "full_sft_32.pth").read_bytes()


@HUBS
@pytest.mark.parametrize(
    ("where", "status", "said"),
    [
        ("/commit/", 401, "not accepted"),
        ("/commit/", 403, "write access"),
        ("/commit/", 404, "no such repository"),
        ("/commit/", 409, "run the command again"),
        ("/commit/", 413, "larger than"),
        ("/commit/", 429, "too many requests"),
        ("/put/", 500, "run the command again"),
        ("/put/", "cut", "run the command again"),
    ],
)
def test_what_does_not_pass_is_told_and_the_next_try_goes_on(hub, made, to, where, status, said):
    hub.faults = {where: [status] * 60}
    message = error_of(to, made / "out" / "full_sft_32.pth")
    wanted = str(status) if to == "modelscope" and where == "/commit/" else said
    assert "me/tiny" in message and wanted in message and not hub.repos["models/me/tiny"].get("full_sft_32.pth")
    hub.faults, before = {}, hub.sent.total()
    push(to, made / "out" / "full_sft_32.pth")
    assert hub.sent.total() == 1 and before == (1 if where == "/commit/" else 0)
    assert "full_sft_32.pth" in hub.repos["models/me/tiny"]


@HUBS
def test_other_files_in_the_repository_are_not_mixed_with_unasked(hub, made, to):
    hub.repos["models/me/tiny"] = {"model-00001.safetensors": b"another model", ".gitattributes": b""}
    assert "holds other files: model-00001.safetensors" in error_of(to, made / "out" / "full_sft_32.pth")
    assert len(hub.repos["models/me/tiny"]) == 2
    push(to, made / "out" / "full_sft_32.pth", "--keep_others")
    assert {"model-00001.safetensors", "full_sft_32.pth"} < set(hub.repos["models/me/tiny"])


@HUBS
def test_without_a_token_nothing_is_asked(hub, made, to, monkeypatch):
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("scripts.push_to_hub.get_token", lambda: None)
    message = error_of(to, made / "Tiny")
    assert "no token" in message and ("hf auth login" in message or "MODELSCOPE_API_TOKEN" in message)
    assert not hub.asked


@pytest.mark.parametrize("name", ["me", "me/a/b", "me/-x-", "https://huggingface.co/me/x"])
def test_a_wrong_repository_name_is_told_before_anything_is_sent(hub, made, name):
    error_of("huggingface", made / "Tiny", repo_id=name)
    assert not hub.asked


def test_wrong_paths_are_told(hub, made, tmp_path):
    assert "not found" in error_of("huggingface", tmp_path / "none.pth")
    assert "no weights" in error_of("huggingface", tmp_path)
    assert "neither weights nor data" in error_of("huggingface", made / "Tiny" / "notes.txt")
    shutil.copytree(made / "Tiny", tmp_path / "Tiny")
    assert "two of the paths" in error_of("huggingface", made / "Tiny", tmp_path / "Tiny")
    assert not hub.asked
