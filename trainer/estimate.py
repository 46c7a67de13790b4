"""--estimate: what a run will take, before anything is spent.

The stage's own loop runs for a few optimizer steps on the real data and its time and memory are measured; no weights
are saved. From that comes the time on this machine. Other cards are computed from the operations that the steps
counted, at a share of the card's peak that is assumed, not measured: see assumed_mfu and CARDS. A later run with the
same flags says at its end how far off the estimate was.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.model_minimind import HAS_VARLEN, MiniMindConfig
from model.weights import write_json
from trainer.cost import Memory, activation_bytes, attention_backward_bytes, mapped_bytes
from trainer.distributed import Process
from trainer.loader import PackedData, plural

LIBRARIES = Memory("cpu").now()  # this module is imported when the libraries are, and before any model is made
# flags that change neither time nor memory of the steps themselves
IRRELEVANT = {
    "resume", "log_interval", "save_interval", "eval_interval", "use_wandb", "wandb_project", "out_dir", "cache_dir",
    "valid_path", "sample_prompt", "overwrite", "save_peft", "estimate", "price_per_hour", "local_rank", "ddp",
}  # fmt: skip
CONTEXT_BYTES = 0.8e9  # what CUDA, its libraries and the allocator's fragments take besides


@dataclass(frozen=True)
class Card:
    """Peak of dense bfloat16 products with float32 sums (the makers' data sheets), memory, price of renting one.

    Prices in US dollars an hour are round numbers of 2026: on-demand offers of specialised providers for A100, H100
    and H200 as https://www.mercatus-ai.com/blog/cloud-gpu-pricing lists them, the consumer cards by guess.
    """

    name: str
    teraflops: float
    gigabytes: float
    dollars: float
    count: int = 1


CARDS = (
    Card("RTX 3090", 71, 24, 0.25),
    Card("RTX 4090", 165, 24, 0.50),
    Card("A100 80GB", 312, 80, 1.30),
    Card("H100 SXM", 989, 80, 3.00),
    Card("H200", 989, 141, 4.00),
    Card("8 × RTX 4090", 165, 24, 0.50, 8),
    Card("8 × H100 SXM", 989, 80, 3.00, 8),
)


def assumed_mfu(config: MiniMindConfig, cards: int) -> float:
    """Share of the peak that training is assumed to reach: 30 % at width 512, in proportion below, 45 % from 768 on;
    several cards in one machine lose a tenth."""
    width = config.hidden_size
    share = 0.30 * min(width / 512, 1) + 0.15 * min(max((width - 512) / 256, 0), 1)
    return share * (0.9 if cards > 1 else 1.0)


class Calibration:
    """Times the optimizer steps of a run, and says what all of them will take."""

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        model: nn.Module,
        data: PackedData,
        name: str,
        teacher: nn.Module | None = None,
    ):
        self.args, self.process, self.data = args, process, data
        self.path = Path(args.out_dir) / "logs" / f"{name}.estimate.json"
        self.memory = Memory(process.device)
        self.parts = memory_parts(model, args, process)
        if teacher is not None:
            self.parts["teacher"] = sum(p.nbytes for p in teacher.parameters())
        self.memory.reset()
        self.moments, self.processor = [time.perf_counter()], [time.process_time()]
        self.flops, self.tokens, self.positions = [], [], []

    def step_done(self, flops: float, tokens: float, positions: float) -> None:
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())
        self.processor.append(time.process_time())
        self.flops.append(flops)
        self.tokens.append(tokens)
        self.positions.append(positions)

    def measured(self) -> dict:
        """Seconds of one step, its operations and tokens on all processes, peak bytes of this process: of the steps of
        the whole run, of which the timed ones are a sample. processor: of its seconds, those of the first step and of
        another. to_come: of the bytes, those of tokens not read yet."""
        data = self.data
        seconds, processor = ([b - a for a, b in itertools.pairwise(m)] for m in (self.moments, self.processor))
        timed = slice(min(1, len(seconds) - 1), None)  # the first one compiles and fills caches
        tokens = data.tokens_per_step
        larger = tokens / statistics.fmean(self.tokens[timed])
        to_come = self._tokens_to_come()
        # packed rows are as many in each step; pairs take as many rows as they need
        longer = larger if data.cache.kind == "preference" else 1.0
        return {
            "first": seconds[0],
            "steps": len(seconds[timed]),
            "step": statistics.fmean(seconds[timed]) * longer,
            "processor": (processor[0], statistics.fmean(processor[timed]) * longer),
            "spread": statistics.pstdev(seconds[timed]) / statistics.fmean(seconds[timed]),
            "flops": statistics.fmean(self.flops[timed]) * larger,
            "tokens": tokens,
            "to_come": to_come,
            "bytes": self.memory.peak() + to_come,
        }

    def _tokens_to_come(self) -> int:
        """Bytes of the mapped token file that the rest of the run will bring into a CPU process."""
        if self.process.device.type == "cuda":
            return 0
        share = min(self.data.total_steps / self.data.steps_per_epoch, 1.0)
        whole = sum(file.stat().st_size for file in self.data.cache.folder.glob("*.bin"))
        self.parts["tokens"] = int(share * whole)
        return max(self.parts["tokens"] - mapped_bytes(self.data.cache.folder), 0)

    def report(self, config: MiniMindConfig, parameters: int, frozen: int) -> str:
        """All that is known, as text; also written beside the logs, for the comparison after the run."""
        args, data, world = self.args, self.data, self.process.world_size
        m, steps = self.measured(), data.total_steps
        passes, threads = sum(data.passes.values()), plural(torch.get_num_threads(), "thread")
        total = steps * m["step"] + max(m["first"] - m["step"], 0) + passes
        record = {"seconds": total, "bytes": m["bytes"], "step": m["step"], "steps": steps}
        record |= {"timed": m["steps"], "processor": m["processor"], "to_come": m["to_come"]}
        write_json(self.path, record | {"flags": relevant_flags(args, self.process)})
        timed = f"± {m['spread']:.0%} ({m['steps']} timed)" if m["steps"] > 1 else "(one timed: no spread is known)"
        lines = [
            f"{parameters / 1e6:.2f}M parameters, {(parameters - frozen) / 1e6:.2f}M of them trained",
            f"{m['tokens'] * steps / 1e6:,.1f}M tokens in {plural(steps, 'step')}, {m['tokens']:,.0f} tokens a step"
            + f" ({plural(args.epochs, 'epoch')})" * (args.epochs > 1),
            "",
            f"this machine ({self.process.device}, {plural(world, 'process')} of {threads})",
            f"  {m['step']:.3g} s a step {timed}, {m['tokens'] / m['step']:,.0f} tokens/s",
            *(f"  beforehand: {title}, {duration(seconds)}" for title, seconds in data.passes.items()),
            f"  {duration(total)}{self._price(total)}, without evaluations and saving",
            *self._memory_lines(m["bytes"]),
            "",
            f"other cards, computed, not measured: {assumed_mfu(config, 1):.0%} of the peak is assumed",
            f"  {'':14}{'memory':>16}{'time':>12}{'cost':>10}",
            *self._card_lines(config, m["flops"] * steps, 1 + passes / (steps * m["step"])),
        ]
        return "\n".join(lines)

    def _price(self, seconds: float) -> str:
        if self.args.price_per_hour is None:
            return ""
        return f", ${seconds / 3600 * self.args.price_per_hour:,.2f} at ${self.args.price_per_hour:g} an hour"

    def _memory_lines(self, peak: int) -> list[str]:
        parts = dict(self.parts)
        if self.process.device.type != "cuda":
            parts["Python and its libraries"] = LIBRARIES
        parts["activations and the rest"] = max(peak - sum(parts.values()), 0)
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        total = self.memory.total()
        lines = [f"  memory: {gigabytes(peak)}{f' of {gigabytes(total)}' if total else ''} a process: {listed}"]
        if total and peak > 0.9 * total:
            lines.append("  that is nearly all there is: lower --batch_size and raise --accumulation_steps as much")
        cache = sum(file.stat().st_size for file in self.data.cache.folder.iterdir())
        saved = self.parts["weights"] // 2, self.parts["weights"] + self.parts["optimizer state"]
        stored = {"tokens": cache, **self.data.stores, "weights": saved[0], "resume": saved[1]}
        lines.append("  disk: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in stored.items()))
        return lines

    def _card_lines(self, config: MiniMindConfig, flops: float, beforehand: float) -> list[str]:
        args, lines = self.args, []
        for card in CARDS:
            seconds = beforehand * flops / (card.count * card.teraflops * 1e12 * assumed_mfu(config, card.count))
            needed, room = self.bytes_on_a_card(config, args.batch_size), 0.95 * card.gigabytes * 1e9
            advice = ""
            if needed > room:
                advice = f"  does not fit: {self._cure(config, room)}"
            cost = seconds / 3600 * card.count * card.dollars
            lines.append(
                f"  {card.name:14}{f'{gigabytes(needed)} of {card.gigabytes:g}':>16}{duration(seconds):>12}"
                f"{f'${cost:,.2f}' if cost >= 0.01 else '< $0.01':>10}{advice}"
            )
        return lines

    def bytes_on_a_card(self, config: MiniMindConfig, batch_size: int, checkpointing: bool = False) -> float:
        """Highest memory of training with CUDA and this batch size, computed."""
        args, parts = self.args, dict(self.parts)
        checkpointing = checkpointing or args.gradient_checkpointing
        size = 4 if args.dtype == "float32" else 2
        whole_head = "teacher" not in parts  # distillation computes its loss in chunks that are not kept
        positions = args.max_seq_len * self.rows * batch_size / args.batch_size
        activations = activation_bytes(config, positions, checkpointing, size, whole_head)
        activations += parts["weights"] // 2 if size == 2 else 0  # autocast's copies
        if HAS_VARLEN and size == 2:
            activations += attention_backward_bytes(config, positions, self.borders(batch_size))
        gradients = parts.pop("gradients")
        parts.pop("tokens", None)
        # within one micro-batch the activations go as the gradients come; those of earlier ones are there all the time
        alone = args.accumulation_steps == 1 and self.process.world_size == 1
        step = max(gradients, activations) if alone else gradients + activations
        return sum(parts.values()) + step + CONTEXT_BYTES

    @property
    def rows(self) -> int:
        """Rows of a micro-batch; of pairs, which take as many as they need, the most that were seen, and on a GPU
        a multiple of --batch_size."""
        args = self.args
        if self.data.cache.kind != "preference":
            return args.batch_size
        most = max(self.positions) / (args.accumulation_steps * self.process.world_size * args.max_seq_len)
        return -(-math.ceil(most) // args.batch_size) * args.batch_size

    def borders(self, batch_size: int) -> int:
        """Ends of documents that a GPU's micro-batch of so many rows or pairs has room for: see dataset/packing.py."""
        if self.data.cache.kind == "preference":
            return 5 * batch_size - 1
        return batch_size * (self.data.plan.max_segments_per_row + 1)

    def _cure(self, config: MiniMindConfig, room: float) -> str:
        """Flags with which it fits into so many bytes, and the optimizer step stays what it is where that can be."""
        args = self.args
        whole = args.batch_size * args.accumulation_steps
        for checkpointing in (False, True)[args.gradient_checkpointing :]:
            fitting = [
                rows for rows in range(args.batch_size, 0, -1)
                if whole % rows == 0 and self.bytes_on_a_card(config, rows, checkpointing) <= room
            ]  # fmt: skip
            if fitting:
                flags = f"--batch_size {fitting[0]} --accumulation_steps {whole // fitting[0]}"
                return flags + " --gradient_checkpointing" * (checkpointing and not args.gradient_checkpointing)
        return "use a smaller model, --zero_stage 3 on several cards, or a lower --max_seq_len"


def memory_parts(model: nn.Module, args: argparse.Namespace, process: Process) -> dict[str, int]:
    """Bytes of one process that follow from the parameters: weights, gradients, optimizer state."""
    whole = [(getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, _, grad in whole if grad)
    moments = {"adamw": 8, "muon": 4, "sgd": 0}[args.optimizer]
    state = trained * moments
    if args.optimizer == "muon":  # one momentum for matrices inside the blocks, two moments for the rest
        state += 4 * sum(p.numel() for n, p in model.named_parameters() if p.dim() != 2 or ".layers." not in n)
    share = {stage: process.world_size if args.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    return {
        "weights": sum(size * bytes_each for size, bytes_each, _ in whole) // share[3],
        "gradients": 4 * trained // share[2],
        "optimizer state": state // share[1],
    }


def relevant_flags(args: argparse.Namespace, process: Process) -> dict[str, str]:
    flags = {name: str(value) for name, value in vars(args).items() if name not in IRRELEVANT}
    return flags | {"processes": str(process.world_size), "threads": str(torch.get_num_threads())}


def compared(path: Path, args: argparse.Namespace, process: Process, seconds: float, peak: int) -> str:
    """How far off an earlier --estimate of this very run was; "" when there was none."""
    try:
        estimate = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    if estimate.get("flags") != relevant_flags(args, process):
        return ""
    off = seconds / estimate["seconds"] - 1, peak / estimate["bytes"] - 1
    return (
        f"estimated: {duration(estimate['seconds'])}, {gigabytes(estimate['bytes'])}; it took {duration(seconds)} "
        f"({off[0]:+.0%}) and {gigabytes(peak)} ({off[1]:+.0%})"
    )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
