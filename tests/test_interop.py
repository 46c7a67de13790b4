"""Our GGUF files in llama.cpp: `make test-interop` builds it and runs these; without it they are skipped.

llama.cpp rounds activations and its cache to float16, so its logits are near ours and not equal; greedy answers of a
trained model are the same text.
"""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_weights

from model.loading import stretch_context
from model.model_minimind import MINIMIND3
from model.weights import load_model
from scripts import convert_model, quickstart

pytestmark = pytest.mark.interop
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; make test-interop builds it")

PROMPTS = [
    "你好，你是谁？", "7加8等于多少？", "法国的首都是哪里？", "日本的首都是哪里？", "9加6等于多少？", "15减7等于多少？",
    "“床前明月光”的下一句是什么？", "草是什么颜色的？", "英国的首都是哪里？", "2加2等于多少？", "一年有几个月？",
    "狗用英语怎么说？", "小明有三个苹果。", "What colour is the sky?", "What is 3 plus 4?", "Who are you?",
    "What is the capital of Italy?", "What colour is grass?", "How many days are in a week?",
    "What is the opposite of hot?",
]  # fmt: skip


@pytest.fixture(scope="module", params=[(), ("--preset", "minimind3"), ("--preset", "minimind3_moe")], ids="_".join)
def trained(request, tmp_path_factory):
    """A small model that has learned the bundled sample: the quickstart's recipe, an epoch of each stage.

    In GGUF it is a llama, a qwen3 or a qwen3moe.
    """
    out = tmp_path_factory.mktemp("trained")
    sample = ROOT / "dataset" / "sample"
    for script, data in (("train_pretrain", "pretrain"), ("train_full_sft", "sft")):
        command = [sys.executable, f"trainer/{script}.py", "--data_path", sample / f"{data}.jsonl", "--epochs", "1"]
        command += [*quickstart.COMMON.split(), "--out_dir", out, "--device", "cpu", *request.param]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return next(out.glob("full_sft_*.pth"))


@pytest.fixture
def in_llama_cpp(tmp_path):
    """in_llama_cpp(weights, flags): converts to GGUF and loads the file."""
    opened = []

    def load(weights, *flags: str, n_ctx: int = 1024) -> llama_cpp.Llama:
        target = tmp_path / f"{len(opened)}.gguf"
        target.parent.mkdir(exist_ok=True)
        convert_model.main(
            ["--input", str(weights), "--to", "gguf", "--output", str(target.parent / target.stem / "m.gguf"), *flags]
        )
        file = str(target.parent / target.stem / "m.gguf")
        probe = f"import llama_cpp; llama_cpp.Llama({file!r}, n_ctx=64, verbose=False).eval([1])"
        status = subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode
        assert status >= 0, (
            f"llama.cpp itself died of {signal.Signals(-status).name}: it is built for another processor. Build it "
            "again: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir llama-cpp-python"
        )
        opened.append(llama_cpp.Llama(file, n_ctx=n_ctx, n_threads=2, logits_all=True, verbose=False))
        return opened[-1]

    yield load
    for runtime in opened:
        runtime.close()


def logits(runtime, ids: list[int]) -> np.ndarray:
    runtime.reset()
    runtime.eval(ids)
    return np.array(runtime.scores[: len(ids)])


@torch.inference_mode()
def our_logits(model, ids: list[int]) -> np.ndarray:
    return model(torch.tensor([ids])).logits[0].numpy()


@torch.inference_mode()
def our_answer(model, tokenizer, ids: list[int], count: int) -> list[int]:
    """Greedy, without a cache, up to eos."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != tokenizer.eos_id):
        ids.append(int(model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].argmax()))
    return ids[start:]


def mixed_strings(count: int) -> list[str]:
    """Chinese, English, digits, signs and white space of all sorts, whole sentences and pieces, control strings too."""
    rng = random.Random(0)
    lines = (ROOT / "dataset" / "sample" / "pretrain.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    odd = [
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "I'LL",
        "don't",
        "'s",
        "3.14159",
        "１２",
        "①",
        "é",
        "ß",
        "日本語",
        "한국어",
        "مرحبا",
    ]
    odd += [
        "🙂",
        "👩‍💻",
        "½",
        "__init__",
        "==",
        "->",
        "<think>",
        "</answer>",
        "<|im_end|>",
        "<|im_start|>user",
        "\u3000",
        "…",
    ]
    strings = []
    while len(strings) < count:
        pieces = []
        for _ in range(rng.randint(1, 6)):
            text = rng.choice(texts)
            start = rng.randrange(len(text))
            pieces += [text[start : start + rng.randint(1, 40)], *rng.choices(odd, k=rng.randint(0, 3))]
        strings.append("".join(pieces))
    return strings


def test_llama_cpp_cuts_text_as_we_do(tmp_path, tokenizer, in_llama_cpp):
    runtime = in_llama_cpp(write_weights(tmp_path / "full_sft_32.pth", tokenizer, hidden_size=32))
    strings = mixed_strings(500)
    for text in strings:  # as contents, where control strings are text
        ids = runtime.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode_contents([text])[0], text
        assert runtime.detokenize(ids, special=True).decode("utf-8", errors="replace").lstrip(" ") == text.lstrip(" ")
    for text in strings:  # as documents, where they are control ids
        ids = runtime.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == tokenizer.encode_documents([text])[0], text


def test_greedy_answers_of_a_trained_model_are_the_same_text(trained, tokenizer, in_llama_cpp):
    runtime = in_llama_cpp(trained)
    model = load_model(trained)[0].float()
    answers = set()
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode_prompt(turns)
        answer = runtime.create_chat_completion(turns, temperature=0.0, max_tokens=64, repeat_penalty=1.0)
        expected = tokenizer.decode(our_answer(model, tokenizer, ids, 64))
        assert answer["usage"]["prompt_tokens"] == len(ids), prompt  # through the template in the file
        assert answer["choices"][0]["message"]["content"] == expected, prompt
        answers.add(expected)
    assert len(answers) >= 10  # it has learned to tell questions apart, or equality would say little


@pytest.mark.parametrize("fields", [{}, {**MINIMIND3, "num_key_value_heads": 2}], ids=["minimind2", "minimind3"])
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("flags", [(), ("--rope_scaling", "4", "--trained_length", "100")])
def test_logits_are_near_ours(fields, use_moe, flags, tmp_path, tokenizer, in_llama_cpp):
    """Wrong pairs in the rotation, a router that does not renormalise or a plain context differ by far more."""
    path = write_weights(tmp_path / "full_sft_64.pth", tokenizer, use_moe=use_moe, hidden_size=64, scale=4.0, **fields)
    runtime = in_llama_cpp(path, *flags)
    model = load_model(path)[0].float()
    if flags:
        stretch_context(model, 4.0, 100)
    ids = torch.randint(7, 6400, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = our_logits(model, ids), logits(runtime, ids)
    error = np.sqrt(((ours - theirs) ** 2).mean(axis=1)) / ours.std(axis=1)
    assert np.median(error) < 0.002 and (error < 0.01).mean() > 0.97, (np.median(error), error.max())


def test_eight_bit_weights_load(trained, tokenizer, in_llama_cpp):
    runtime = in_llama_cpp(trained, "--gguf_type", "Q8_0")
    model = load_model(trained)[0].float()
    ids = tokenizer.encode_prompt([{"role": "user", "content": PROMPTS[0]}])
    ours, theirs = our_logits(model, ids), logits(runtime, ids)
    assert np.abs(theirs - ours).mean() < 0.05 * ours.std()


def test_its_answers_end_at_our_end_of_turn(trained, in_llama_cpp):
    runtime = in_llama_cpp(trained)
    answer = runtime.create_chat_completion([{"role": "user", "content": PROMPTS[1]}], temperature=0.0, max_tokens=200)
    assert answer["choices"][0]["finish_reason"] == "stop"
