"""One command for whoever has a GPU: how fast training and decoding are on it, beside transformers, in 8 minutes.

    python benchmarks/gpu.py [--json out/gpu.json]

For the 26M, the 104M and the MoE 145M preset, in bfloat16, one optimizer step for every 32 rows of 512:

  ours                   as the stage scripts train: packed rows, variable-length attention, compiled, fused AdamW
  - compile, - varlen, - fused AdamW, - loss in blocks, - grouped products, - packing
                         the same with that one thing turned off, what it was worth
  transformers, padded   LlamaForCausalLM, eager, each document padded to 512 (dense presets)
  transformers, packed   the same model compiled, with our packed rows (dense presets)

Printed for each: useful tokens (not padding) per second, MFU against the best matrix product of this run, peak memory,
seconds until warm (compiling), share of time that waits for the loader; then tokens per second of decoding at 1, 16 and
64 texts beside transformers' generate. It runs on a CPU too, with --device cpu and small settings, for a test.
"""

import argparse
import contextlib
import functools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_throughput import PaddedDocuments, llama, matmul_rate, packed_peer_loss, peer_loss
from dataset.tokenization import ChatTokenizer
from model import model_minimind
from model.batching import Engine
from model.generation import SamplingParams
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import run_script, stage_parser
from trainer.cost import Memory, attention_flops, count_parameters, flops_per_token
from trainer.distributed import Process
from trainer.loader import PackedData, model_inputs
from trainer.token_losses import token_cross_entropy

PRESETS = {
    "26M": {"hidden_size": 512, "num_hidden_layers": 8},
    "104M": {"hidden_size": 768, "num_hidden_layers": 16},
    "MoE 145M": {"hidden_size": 640, "num_hidden_layers": 8, "use_moe": True},
}
WARM_STEPS, PROMPT_TOKENS = 3, 64


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    add("--data_path", type=Path, default=ROOT / "dataset/sample/pretrain.jsonl")
    add("--rows", type=int, default=32, help="rows per micro-batch (default: %(default)s)")
    add("--max_seq_len", type=int, default=512)
    add("--seconds", type=float, default=6, help="per contender, when warm (default: %(default)s)")
    add("--batches", type=int, nargs="*", default=[1, 16, 64], help="texts decoded together (default: 1 16 64)")
    add("--new_tokens", type=int, default=256, help="decoded per text (default: %(default)s)")
    add("--num_hidden_layers", type=int, help="fewer layers, for a test")
    add("--device", default="cuda")
    add("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable GPU")
    return args


# --- training --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without(holder: object, name: str) -> Iterator[None]:
    """A feature that code looks up by its name is not there for a while."""
    value = getattr(holder, name, None)
    if value is not None:
        delattr(holder, name)
    try:
        yield
    finally:
        if value is not None:
            setattr(holder, name, value)


@contextlib.contextmanager
def mask_attention() -> Iterator[None]:
    before, model_minimind.HAS_VARLEN = model_minimind.HAS_VARLEN, False
    try:
        yield
    finally:
        model_minimind.HAS_VARLEN = before


def whole_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Our model with the float32 logits of all tokens at once."""
    output = model(**model_inputs(batch))
    total = F.cross_entropy(output.logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return total / batch["step_targets"] + output.aux_loss


def training_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """As train_pretrain.py computes it."""
    output = model(**model_inputs(batch), head=functools.partial(token_cross_entropy, labels=batch["labels"]))
    return output.logits.sum() / batch["step_targets"] + output.aux_loss


class Rows:
    """Endless micro-batches on the device: packed by the loader that training uses, or one document a row."""

    def __init__(self, args: argparse.Namespace, tokenizer: ChatTokenizer, folder: str):
        self.args, self.tokenizer = args, tokenizer
        flags = ["--data_path", str(args.data_path), "--out_dir", folder, "--cache_dir", folder]
        flags += ["--batch_size", str(args.rows), "--max_seq_len", str(args.max_seq_len), "--device", args.device]
        settings = stage_parser("").parse_args(flags)
        device = torch.device(args.device)
        process = Process(0, 0, 1, torch.device("cuda", device.index or 0) if device.type == "cuda" else device)
        settings.accumulation_steps = 1
        self.data = PackedData(settings, "pretrain", tokenizer, process)

    def packed(self) -> Iterator[dict]:
        while True:
            yield from self.data.all_batches()

    def padded(self) -> Iterator[dict]:
        documents = PaddedDocuments(self.args.data_path, self.tokenizer)
        cuda = self.args.device.startswith("cuda")
        loader = torch.utils.data.DataLoader(
            documents, self.args.rows, shuffle=True, num_workers=1, drop_last=True, pin_memory=cuda
        )
        while True:
            for batch in loader:
                yield {name: value.to(self.args.device, non_blocking=True) for name, value in batch.items()}


def measure(
    model: nn.Module, batches: Iterator[dict], loss_of: Callable, args: argparse.Namespace, fused: bool = True
) -> dict:
    """Trains for a while; rates of this process and its peak memory."""
    device, memory = torch.device(args.device), Memory(args.device)
    memory.reset()
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(batch: dict) -> tuple[int, int]:
        """Useful tokens, (token, position it sees) pairs."""
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if "real_tokens" in batch:
            return batch["real_tokens"], batch["attended"]
        lengths = (batch["labels"] >= 0).sum(dim=1)
        return int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())

    start = time.perf_counter()
    for _ in range(WARM_STEPS):
        step(next(batches))
    synchronize()
    warm_after = time.perf_counter() - start
    tokens = attended = 0
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        useful, pairs = step(batch)
        tokens, attended = tokens + useful, attended + pairs
        synchronize()
    seconds = time.perf_counter() - start
    config = getattr(model.config, "minimind", model.config)
    flops = flops_per_token(config, count_parameters(model)[0]) * tokens + attention_flops(config, attended)
    return {
        "tokens_per_second": tokens / seconds,
        "flops_per_second": flops / seconds,
        "memory": memory.peak(),
        "warm_after": warm_after,
        "loader_share": waited / seconds,
    }


def training_contenders(config: MiniMindConfig, rows: Rows, args: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    def ours(compiled: bool = True) -> nn.Module:
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config)
        if compiled and args.device.startswith("cuda"):
            model.model.compile(dynamic=False)
        return model

    def peer(compiled: bool) -> nn.Module:
        model = llama(config)
        model.config.minimind = config  # the operations of both are counted alike
        if compiled and args.device.startswith("cuda"):
            model.compile(dynamic=False)
        return model

    def without_varlen() -> dict:
        with mask_attention():
            return measure(ours(), rows.packed(), training_loss, args)

    def without_grouped() -> dict:
        with without(F, "grouped_mm"):
            return measure(ours(), rows.packed(), training_loss, args)

    contenders = {
        "ours": lambda: measure(ours(), rows.packed(), training_loss, args),
        "- compile": lambda: measure(ours(compiled=False), rows.packed(), training_loss, args),
        "- varlen": without_varlen,
        "- fused AdamW": lambda: measure(ours(), rows.packed(), training_loss, args, fused=False),
        "- loss in blocks": lambda: measure(ours(), rows.packed(), whole_loss, args),
    }
    if config.use_moe:
        return contenders | {"- grouped products": without_grouped}
    return contenders | {
        "- packing": lambda: measure(ours(), rows.padded(), peer_loss, args),
        "transformers, padded": lambda: measure(peer(False), rows.padded(), peer_loss, args, fused=False),
        "transformers, packed": lambda: measure(peer(True), rows.packed(), packed_peer_loss, args),
    }


def compare_training(config: MiniMindConfig, rows: Rows, args: argparse.Namespace) -> dict[str, dict]:
    results = {}
    for name, run in training_contenders(config, rows, args).items():
        try:
            results[name] = run()
        except torch.OutOfMemoryError:
            results[name] = {"error": "out of memory"}
        if args.device.startswith("cuda"):
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    return results


def print_training(title: str, results: dict[str, dict], peak: float) -> None:
    print(f"\n{title:22}{'tokens/s':>12}{'ours is':>9}{'MFU':>7}{'memory':>10}{'warm after':>12}{'loader':>8}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:22}{result['error']:>12}")
            continue
        ratio = results["ours"]["tokens_per_second"] / result["tokens_per_second"]
        print(
            f"{name:22}{result['tokens_per_second']:12,.0f}{ratio:8.2f}×{result['flops_per_second'] / peak:7.1%}"
            f"{result['memory'] / 1e9:7.2f} GB{result['warm_after']:10.0f} s{result['loader_share']:8.1%}",
            flush=True,
        )


# --- decoding --------------------------------------------------------------------------------------------------------


def compare_decoding(config: MiniMindConfig, args: argparse.Namespace) -> dict[int, dict]:
    """Tokens per second of greedy decoding, prompts included, in bfloat16."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).to(args.device, torch.bfloat16).eval()
    peer = None if config.use_moe else llama(config)
    if peer is not None:
        peer.load_state_dict(model.state_dict())
        peer = peer.to(args.device, torch.bfloat16).eval()
    params = SamplingParams(temperature=0.0, max_new_tokens=args.new_tokens, stop_ids=())
    results = {}
    for batch in args.batches:
        prompts = torch.randint(3, config.vocab_size, (batch, PROMPT_TOKENS))
        engine = Engine(model, slots=batch, context_length=PROMPT_TOKENS + args.new_tokens)

        def ours(engine=engine, prompts=prompts) -> None:
            requests = [engine.submit(ids, params) for ids in prompts.tolist()]
            while engine.step():
                pass
            assert all(request.finish_reason == "length" for request in requests)

        def generate(prompts=prompts) -> None:
            ids = prompts.to(args.device)
            counts = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
            peer.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **counts)

        rates = {}
        for name, run in (("ours", ours), ("generate", generate if peer is not None else None)):
            if run is None:
                continue
            run()
            start = time.perf_counter()
            run()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            rates[name] = batch * args.new_tokens / (time.perf_counter() - start)
        engine.close()
        results[batch] = rates
    return results


def print_decoding(results: dict[int, dict]) -> None:
    print(f"\n{'texts together':22}{'tokens/s':>12}{'generate':>12}{'ours is':>9}")
    for batch, rates in results.items():
        peer = f"{rates['generate']:12,.0f}{rates['ours'] / rates['generate']:8.2f}×" if "generate" in rates else ""
        print(f"{batch:<22}{rates['ours']:12,.0f}{peer}", flush=True)


# --- output ----------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    if device.startswith("cuda"):
        found |= {"card": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    tokenizer = ChatTokenizer(ROOT / "model")
    about, peak = machine(args.device), matmul_rate(torch.device(args.device))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"best bfloat16 matrix product: {peak / 1e12:,.1f} TFLOP/s", flush=True)
    record = {"machine": about, "matmul_flops_per_second": peak, "training": {}, "decoding": {}}
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(args, tokenizer, folder)
        for title in args.models:
            sizes = PRESETS[title] | ({"num_hidden_layers": args.num_hidden_layers} if args.num_hidden_layers else {})
            config = MiniMindConfig(vocab_size=tokenizer.vocab_size, **sizes)
            record["training"][title] = compare_training(config, rows, args)
            print_training(title, record["training"][title], peak)
            record["decoding"][title] = compare_decoding(config, args)
            print_decoding(record["decoding"][title])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    run_script(main)
