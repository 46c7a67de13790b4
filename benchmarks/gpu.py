"""Speed of training and decoding on your GPU, next to transformers, in eight minutes.

    python benchmarks/gpu.py [--data_path FILE.jsonl] [--json out/gpu.json]

For the 26M, the 104M and the MoE 145M preset, one optimizer step for every 32 rows of 512, in bfloat16 (training in
float32 where bfloat16 is only emulated):

  ours                   as the stage scripts train: packed rows, variable-length attention, compiled, fused AdamW
  - compile, - varlen, - fused AdamW, - loss in blocks, - grouped products, - packing
                         the same with one thing turned off: what it is worth
  + Muon                 the same with Muon, which steps once for 32 rows here and for 256 in pretraining
  + Muon one by one      the same with torch's Muon, which updates its matrices one by one
  transformers, padded   LlamaForCausalLM, eager, each document padded to 512 (dense presets)
  transformers, packed   the same model compiled, with our packed rows (dense presets)

The documents are those of the sample, joined to the length of web texts, unless --data_path names others. The most
telling contenders come first; those that --budget has no time for are left out, and one that fails does not stop the
others.

It prints for each: useful tokens (not padding) per second, MFU against the best matrix product of this run, peak
memory, seconds until warm (compiling), and the share of time spent waiting for the loader; then tokens per second of
decoding at 1, 16 and 64 texts next to transformers' generate. With --device cpu and small settings it runs on a CPU
too, for tests.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.decoding import of_ours, timed
from benchmarks.peers import MODELS, llama, machine, synchronize
from benchmarks.train_throughput import PaddedDocuments, matmul_rate, our_loss, packed_peer_loss, peer_loss
from dataset.tokenization import ChatTokenizer
from model import model_minimind
from model.device import has_bfloat16
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import write_json
from trainer.arguments import run_script, stage_parser
from trainer.cost import Memory, attention_flops, count_parameters, flops_per_token
from trainer.distributed import Process
from trainer.loader import PackedData, model_inputs
from trainer.optimization import build_optimizer

WARM_STEPS, PROMPT_TOKENS = 3, 64


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--data_path", type=Path, help="texts, jsonl (default: the sample's, joined to some 200 tokens each)")
    add("--rows", type=int, default=32, help="rows per micro-batch (default: %(default)s)")
    add("--max_seq_len", type=int, default=512)
    add("--seconds", type=float, default=5, help="per contender, when warm (default: %(default)s)")
    add("--budget", type=float, default=450, help="seconds in all; the rest is left out (default: %(default)s)")
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
def without_grouped() -> Iterator[None]:
    """Hide the grouped product, which the model looks up by its name."""
    with mock.patch.object(F, "grouped_mm", None, create=True):
        del F.grouped_mm
        yield


def without_varlen() -> contextlib.AbstractContextManager:
    return mock.patch.object(model_minimind, "HAS_VARLEN", False)


def whole_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the loss of our model from the float32 logits of all tokens at once."""
    output = model(**model_inputs(batch))
    total = F.cross_entropy(output.logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return total / batch["step_targets"] + output.aux_loss


def joined(source: Path, target: Path, count: int = 2) -> Path:
    """Write a file whose texts are `count` texts of the source each."""
    texts = [json.loads(line)["text"] for line in source.read_text("utf-8").splitlines()]
    lines = [{"text": "\n".join(texts[first : first + count])} for first in range(0, len(texts), count)]
    target.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return target


class Rows:
    """Endless micro-batches on the device: packed by the loader that training uses, or one document a row."""

    def __init__(self, args: argparse.Namespace, tokenizer: ChatTokenizer, folder: str):
        self.args, self.tokenizer = args, tokenizer
        self.path = args.data_path or joined(ROOT / "dataset/sample/pretrain.jsonl", Path(folder) / "texts.jsonl")
        flags = ["--data_path", str(self.path), "--out_dir", folder, "--cache_dir", folder]
        flags += ["--batch_size", str(args.rows), "--max_seq_len", str(args.max_seq_len), "--device", args.device]
        settings = stage_parser("").parse_args(flags)
        device = torch.device(args.device)
        process = Process(0, 0, 1, torch.device("cuda", device.index or 0) if device.type == "cuda" else device)
        settings.accumulation_steps = 1
        self.data = PackedData(settings, "pretrain", tokenizer, process)
        self.tokens_per_document = self.data.plan.stats["positions"] / self.data.plan.stats["documents"]

    def packed(self) -> Iterator[dict]:
        """Yield full batches forever from one loader, as a long file would."""
        batches = self.data._batches(0, shuffle=False)
        yield from self.data._load(batches, itertools.cycle(range(max(len(batches) - 1, 1))))

    def padded(self) -> Iterator[dict]:
        """Use enough workers, so that tokenising, which this recipe does on the fly, is not the bottleneck."""
        cuda = self.args.device.startswith("cuda")
        documents = PaddedDocuments(self.path, self.tokenizer)
        endless = RandomSampler(documents, replacement=True, num_samples=1 << 40)
        workers = min(4, max((os.cpu_count() or 1) - 1, 1)) if cuda else 1
        loader = DataLoader(documents, self.args.rows, sampler=endless, num_workers=workers, pin_memory=cuda)
        for batch in loader:
            yield {name: value.to(self.args.device, non_blocking=True) for name, value in batch.items()}


def measure(
    model: nn.Module,
    batches: Iterator[dict],
    loss_of: Callable,
    args: argparse.Namespace,
    fused: bool = True,
    muon: str = "",
) -> dict:
    """Train for a while; return the rates of this process and its peak memory."""
    device, memory = torch.device(args.device), Memory(args.device)
    memory.reset()
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    if muon:
        rates = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "embedding_lr_scale": 1.0}
        optimizer = build_optimizer(model, argparse.Namespace(optimizer="muon", **rates))
    if muon == "one by one":
        optimizer.parts[0].step = functools.partial(torch.optim.Muon.step, optimizer.parts[0])

    def step(batch: dict) -> tuple[int, int]:
        """Useful tokens, (token, position it sees) pairs."""
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
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
    synchronize(args.device)
    warm_after = time.perf_counter() - start
    tokens = attended = 0
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        useful, pairs = step(batch)
        tokens, attended = tokens + useful, attended + pairs
        synchronize(args.device)
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
    def ours(compiled=True, padded=False, loss_of=our_loss, within=contextlib.nullcontext, **options) -> dict:
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config)
        if compiled and args.device.startswith("cuda"):
            model.model.compile(dynamic=False)
        with within():
            return measure(model, rows.padded() if padded else rows.packed(), loss_of, args, **options)

    def peer(packed: bool) -> dict:
        model = llama(config)
        model.config.minimind = config  # the operations of both are counted alike
        if not packed:
            return measure(model, rows.padded(), peer_loss, args, fused=False)
        if args.device.startswith("cuda"):
            model.compile(dynamic=False)
        return measure(model, rows.packed(), packed_peer_loss, args)

    partial = functools.partial
    contenders = {
        "ours": ours,
        "transformers, padded": partial(peer, packed=False),
        "transformers, packed": partial(peer, packed=True),
        "- grouped products": partial(ours, within=without_grouped),
        "- compile": partial(ours, compiled=False),
        "- varlen": partial(ours, within=without_varlen),
        "- packing": partial(ours, padded=True, loss_of=peer_loss),
        "- loss in blocks": partial(ours, loss_of=whole_loss),
        "- fused AdamW": partial(ours, fused=False),
        "+ Muon": partial(ours, muon="grouped"),
        "+ Muon one by one": partial(ours, muon="one by one"),
    }
    # transformers has no mixture of experts like ours
    dense_only = ("transformers, padded", "transformers, packed", "- packing")
    absent = dense_only if config.use_moe else ("- grouped products",)
    if not has_bfloat16(torch.device(args.device)):
        absent += ("+ Muon one by one",)  # torch's computes in bfloat16 whatever the device
    return {name: run for name, run in contenders.items() if name not in absent}


def print_training(title: str, results: dict[str, dict], peak: float) -> None:
    print(f"\n{title:22}{'tokens/s':>12}{'ours is':>9}{'MFU':>7}{'memory':>10}{'warm after':>12}{'loader':>8}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name:22}{result['error']}")
            continue
        ours = results["ours"].get("tokens_per_second")
        ratio = f"{ours / result['tokens_per_second']:8.2f}×" if ours else f"{'':9}"
        print(
            f"{name:22}{result['tokens_per_second']:12,.0f}{ratio}{result['flops_per_second'] / peak:7.1%}"
            f"{result['memory'] / 1e9:7.2f} GB{result['warm_after']:10.0f} s{result['loader_share']:8.1%}",
            flush=True,
        )


# --- decoding --------------------------------------------------------------------------------------------------------


def decoding_contenders(config: MiniMindConfig, args: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Each returns tokens per second of greedy decoding, prompts included, in bfloat16."""

    def prompts(batch: int) -> torch.Tensor:
        return torch.randint(3, config.vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))

    def rate(batch: int, run: Callable) -> dict:
        run()  # warms up
        return {"tokens_per_second": batch * args.new_tokens / timed(run, torch.device(args.device))}

    def ours(batch: int) -> dict:
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config).to(args.device, torch.bfloat16).eval()
        run = of_ours(model, batch, PROMPT_TOKENS + args.new_tokens)
        return rate(batch, lambda: run(prompts(batch).tolist(), args.new_tokens))

    def generate(batch: int) -> dict:
        torch.manual_seed(0)
        model = llama(config).to(args.device, torch.bfloat16).eval()
        ids = prompts(batch).to(args.device)
        counts = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        return rate(batch, lambda: model.generate(ids, **settings, **counts))

    contenders = {"ours": ours} if config.use_moe else {"ours": ours, "generate": generate}
    return {
        f"{name}, {batch}": functools.partial(run, batch) for batch in args.batches for name, run in contenders.items()
    }


def print_decoding(results: dict[str, dict], batches: list[int]) -> None:
    print(f"\n{'texts together':22}{'tokens/s':>12}{'generate':>12}{'ours is':>9}")
    for batch in batches:
        ours, peer = (results.get(f"{name}, {batch}", {"error": ""}) for name in ("ours", "generate"))
        rates = [result.get("tokens_per_second") for result in (ours, peer)]
        cells = [f"{rate:12,.0f}" if rate else f"{r['error']:>12}" for rate, r in zip(rates, (ours, peer), strict=True)]
        ratio = f"{rates[0] / rates[1]:8.2f}×" if all(rates) else ""
        print(f"{batch:<22}{''.join(cells)}{ratio}", flush=True)


# --- output ----------------------------------------------------------------------------------------------------------


class Schedule:
    """Runs the contenders. A failure stops no other, those without time left are skipped, and the numbers so far are
    written after each."""

    def __init__(self, args: argparse.Namespace, record: dict):
        self.args, self.record = args, record
        self.deadline = time.monotonic() + args.budget
        self.longest: dict[str, float] = {}  # seconds that one of a model took so far

    def run(self, kind: str, title: str, name: str, contender: Callable[[], dict]) -> None:
        start = time.monotonic()
        if start + self.longest.get(title, 0.0) > self.deadline:
            result = {"error": "left out: no time"}
        else:
            try:
                result = contender()
            except torch.OutOfMemoryError:
                result = {"error": "out of memory"}
            except Exception as error:  # the others are still worth measuring
                result = {"error": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:160]}
            if self.args.device.startswith("cuda"):
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()
            if kind == "training":
                self.longest[title] = max(self.longest.get(title, 0.0), time.monotonic() - start)
            shown = f"{result['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in result else result["error"]
            print(f"{title} {kind}, {name}: {shown}, {time.monotonic() - start:.0f} s", flush=True)
        self.record[kind].setdefault(title, {})[name] = result
        if self.args.json:
            write_json(self.args.json, self.record)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    tokenizer = ChatTokenizer(ROOT / "model")
    about, peak = machine(args.device), matmul_rate(torch.device(args.device))
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"best matrix product: {peak / 1e12:,.3g} TFLOP/s", flush=True)
    record = {"machine": about, "matmul_flops_per_second": peak, "training": {}, "decoding": {}}
    record["flags"] = {name: str(value) for name, value in vars(args).items()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")  # compile times of a first run
        schedule = Schedule(args, record)
        rows = Rows(args, tokenizer, folder)
        record["tokens_per_document"] = rows.tokens_per_document
        training, decoding = {}, {}
        for title in args.models:
            sizes = MODELS[title] | ({"num_hidden_layers": args.num_hidden_layers} if args.num_hidden_layers else {})
            config = MiniMindConfig(vocab_size=tokenizer.vocab_size, **sizes)
            training[title] = training_contenders(config, rows, args)
            decoding[title] = decoding_contenders(config, args)
        order = [(name, title) for name in dict.fromkeys(itertools.chain(*training.values())) for title in args.models]
        order = [(name, title) for name, title in order if name in training[title]]
        first = ("ours", "transformers, padded")
        for name, title in [pair for pair in order if pair[0] in first]:
            schedule.run("training", title, name, training[title][name])
        for title in args.models:
            for name, contender in decoding[title].items():
                schedule.run("decoding", title, name, contender)
        for name, title in [pair for pair in order if pair[0] not in first]:
            schedule.run("training", title, name, training[title][name])
    for title in args.models:
        print_training(title, record["training"][title], peak)
        print_decoding(record["decoding"][title], args.batches)
    if not any("error" not in result for results in record["training"].values() for result in results.values()):
        raise ValueError("nothing could be measured; the reasons are in the table above")


if __name__ == "__main__":
    run_script(main)
