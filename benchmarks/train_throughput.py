"""Training speed on this machine: useful tokens per second of our training step next to the same model in transformers.

Every contender trains the same 26M Llama with its own code, on documents of the same file, one optimizer step per
micro-batch. They are timed in turn, round by round, so that a noisy machine disturbs all alike. Useful tokens are
those that are not padding. The peers:

  padded float32    transformers' LlamaForCausalLM, eager, each document padded to 512, tokenised on the fly by one
                    worker: the recipe that most scripts of this kind use
  padded bfloat16   the same under bfloat16 autocast
  packed compiled   the same model with packed rows (our batches, documents kept apart by position_ids), torch.compile
                    and bfloat16 autocast: the best that transformers gives without writing kernels

    python benchmarks/train_throughput.py [--data_path FILE.jsonl] [--rows 8] [--rounds 3]
    python benchmarks/train_throughput.py --device cuda --rows 32

On several cores the same job can be one process with several threads, or one process per core, each training on a
share of the rows, as `torchrun --nproc_per_node N trainer/train_pretrain.py` does. The second way, without peers:

    torchrun --nproc_per_node 2 benchmarks/train_throughput.py --accumulation_steps 8
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import endless, llama, synchronize
from dataset.packing import PackedBatches, build_plan
from dataset.token_cache import open_token_cache
from dataset.tokenization import ChatTokenizer
from model.device import has_bfloat16
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.cost import attention_flops, count_parameters, flops_per_token, matmul_flops_per_second
from trainer.distributed import keep_freed_memory
from trainer.token_losses import forward_losses

SEQ = 512


class PaddedDocuments(Dataset):
    """One document per row, tokenised on the fly, cut or padded to SEQ."""

    def __init__(self, path: Path, tokenizer: ChatTokenizer):
        with path.open(encoding="utf-8") as file:
            self.texts = [json.loads(line)["text"] for line in file]
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        tokenizer = self.tokenizer
        ids = tokenizer.encode_documents([self.texts[index]])[0][: SEQ - 2]
        ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        padding = SEQ - len(ids)
        return {
            "input_ids": torch.tensor(ids + [tokenizer.pad_id] * padding),
            "labels": torch.tensor(ids + [-100] * padding),
        }


class Contender:
    """A model with its batches: `step()` is one optimizer step and returns its useful tokens."""

    def __init__(self, model, batches, loss, autocast: bool, fused: bool, device: torch.device, accumulation: int = 1):
        self.plain, self.batches, self.loss, self.autocast = model.to(device), batches, loss, autocast
        self.model = self.plain
        self.device, self.accumulation = device, accumulation
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        self.rates: list[float] = []
        self.flops = 0.0

    def step(self) -> int:
        tokens = 0
        for micro_batch in range(self.accumulation):
            last = micro_batch == self.accumulation - 1 or not dist.is_initialized()
            with contextlib.nullcontext() if last else self.model.no_sync():
                tokens += self.accumulate(next(self.batches))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return tokens

    def accumulate(self, batch: dict) -> int:
        on_device = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model, on_device)
        loss.backward()
        if "real_tokens" in batch:
            self.flops += attention_flops(self.plain.config, batch["attended"])
            return batch["real_tokens"]
        return int((batch["labels"] >= 0).sum())

    def run(self, seconds: float) -> None:
        tokens, self.flops, start = 0, 0.0, time.perf_counter()
        while over_processes(float((elapsed := time.perf_counter() - start) < seconds)):  # until all are done
            tokens += self.step()
            synchronize(self.device)
        model = self.plain
        if isinstance(model, MiniMindForCausalLM):
            self.flops = over_processes(
                (self.flops + tokens * flops_per_token(model.config, count_parameters(model)[0])) / elapsed
            )
        self.rates.append(over_processes(tokens / elapsed))


def over_processes(value: float) -> float:
    """Return the sum over the processes of the job."""
    if dist.is_initialized():
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor)
    return value


def our_loss(model, batch: dict) -> torch.Tensor:
    token_losses, aux_loss = forward_losses(model, batch)
    return token_losses.sum() / batch["step_targets"] + aux_loss


def peer_loss(model, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def packed_peer_loss(model, batch: dict) -> torch.Tensor:
    # labels are already shifted in our batches; transformers takes such labels as shift_labels
    out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    logits = out.logits.float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100)


def matmul_rate(device: torch.device) -> float:
    """Best operations per second of square products, with the threads and processes in use.

    In bfloat16, or in float32 where bfloat16 is only emulated, which takes minutes for one product.
    """
    sizes = (2048, 4096) if device.type == "cpu" else (4096, 8192)
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    return max(over_processes(matmul_flops_per_second(device, dtype, size)) for size in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, default=ROOT / "dataset/sample/pretrain.jsonl")
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 per micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="per contender and round")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled peer, which takes a minute")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="of ours: micro-batches per optimizer step")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        if device.type != "cpu":
            parser.error("several processes are measured on a CPU only: leave out torchrun, or --device")
        dist.init_process_group("gloo")
    keep_freed_memory()
    torch.manual_seed(0)
    tokenizer = ChatTokenizer(ROOT / "model")
    config = MiniMindConfig(vocab_size=tokenizer.vocab_size)

    with tempfile.TemporaryDirectory() as folder:
        cache = open_token_cache(args.data_path, tokenizer, "pretrain", cache_dir=folder)
        packed = PackedBatches(cache, build_plan(cache, SEQ), batch_size=args.rows)
        padded = PaddedDocuments(args.data_path, tokenizer)
        full = len(packed) - 1  # the last batch may be ragged

        def packed_batches():
            first = int(os.environ.get("RANK", 0))
            return endless(lambda: (packed[i] for i in range(first, full - full % processes, processes)))

        def padded_batches():
            return endless(lambda: iter(DataLoader(padded, args.rows, shuffle=True, num_workers=1, drop_last=True)))

        ours = MiniMindForCausalLM(config)
        if device.type == "cuda":
            ours.model.compile(dynamic=False)
        contenders = {"ours": Contender(ours, packed_batches(), our_loss, True, True, device, args.accumulation_steps)}
        for dtype in ("float32", "bfloat16") if processes == 1 else ():
            peer = Contender(llama(config), padded_batches(), peer_loss, dtype == "bfloat16", False, device)
            contenders[f"padded {dtype}"] = peer
        if processes == 1 and not args.no_compile:
            model = llama(config)
            model.compile(dynamic=False)
            contenders["packed compiled"] = Contender(model, packed_batches(), packed_peer_loss, True, True, device)
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.step()
            contender.step()
            seconds = time.perf_counter() - start
            print(f"{name}: {count_parameters(contender.model)[0] / 1e6:.2f}M, warm after {seconds:.0f} s", flush=True)
        our_flops, peak = [], 0.0
        for _ in range(args.rounds):
            for contender in contenders.values():
                contender.run(args.seconds)
            our_flops.append(contenders["ours"].flops)
            peak = max(peak, matmul_rate(device))

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        if int(os.environ["RANK"]):
            return
    setting = f"torch {torch.__version__}, {args.rows} rows of {SEQ}, {args.data_path.name}"
    print(f"\n{device}, {processes} processes of {torch.get_num_threads()} threads, {setting}")
    print(f"{'':18}{'useful tokens/s':>16}  {'ours is faster by (median of rounds)':>36}")
    ours = contenders["ours"].rates
    for name, contender in contenders.items():
        ratio = statistics.median(a / b for a, b in zip(ours, contender.rates, strict=True))
        print(f"{name:18}{statistics.median(contender.rates):16,.0f}  {ratio:35.2f}×")
    mfu = sorted(flops / peak for flops in our_flops)
    print(f"best matrix product of the run: {peak / 1e9:,.0f} GFLOP/s")
    print(f"MFU of ours: median {statistics.median(mfu):.1%}, best {mfu[-1]:.1%} of {len(mfu)} rounds")


if __name__ == "__main__":
    main()
