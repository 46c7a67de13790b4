"""What routing costs: a training step of the mixture of experts beside a dense model with the same active parameters.

A token of the mixture passes through its top-k experts and the shared ones. The dense twin has one feed-forward as wide
as these together, and all else the same, so that both do the same matrix products; the router's weight (a few thousand
numbers a layer) is all that it lacks. Both train on the same packed rows, one optimizer step per micro-batch, in turn,
round by round. The mixture's step contains what is its own: routing, sorting, the balance loss, smaller products, and
the optimizer's pass over the experts that a token did not visit.

    python benchmarks/moe_throughput.py [--data_path FILE.jsonl] [--rows 8] [--rounds 5]
    python benchmarks/moe_throughput.py --device cuda --rows 32
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train_throughput import SEQ, Contender, count, endless, our_loss
from dataset.packing import PackedBatches, build_plan
from dataset.token_cache import open_token_cache
from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.cost import flops_per_token
from trainer.distributed import keep_freed_memory


def dense_twin(config: MiniMindConfig) -> MiniMindConfig:
    """The dense model that computes as much per token as this mixture of experts: one feed-forward, as wide as the
    chosen and the shared experts together."""
    experts = config.num_experts_per_tok + config.n_shared_experts
    changes = {"use_moe": False, "intermediate_size": experts * config.intermediate_size}
    return MiniMindConfig(**{**config.to_dict(), **changes})


def main(argv: list[str] | None = None) -> float:
    """Prints both and returns the ratio of their steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, default=ROOT / "dataset/sample/pretrain.jsonl")
    parser.add_argument("--hidden_size", type=int, default=640)
    parser.add_argument("--num_hidden_layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {SEQ} per micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="per contender and round")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    keep_freed_memory()
    torch.manual_seed(0)
    tokenizer = ChatTokenizer(ROOT / "model")
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.num_hidden_layers}
    mixture = MiniMindConfig(vocab_size=tokenizer.vocab_size, use_moe=True, **sizes)

    with tempfile.TemporaryDirectory() as folder:
        cache = open_token_cache(args.data_path, tokenizer, "pretrain", cache_dir=folder)
        packed = PackedBatches(cache, build_plan(cache, SEQ), batch_size=args.rows)

        def contender(config: MiniMindConfig) -> Contender:
            model = MiniMindForCausalLM(config).train()
            if device.type == "cuda":
                model.model.compile(dynamic=False)
            batches = endless(lambda: (packed[i] for i in range(max(len(packed) - 1, 1))))  # the last may be ragged
            return Contender(model, batches, our_loss, autocast=True, fused=True, device=device)

        contenders = {"mixture of experts": contender(mixture), "dense twin": contender(dense_twin(mixture))}
        for both in contenders.values():
            both.step()
        for _ in range(args.rounds):
            for both in contenders.values():
                both.run(args.seconds)

    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rows} rows of {SEQ}")
    print(f"{'':20}{'parameters':>12}{'active':>10}{'feed-forward':>14}{'tokens/s':>10}")
    for name, one in contenders.items():
        parameters, config = count(one.model), one.model.config
        active = flops_per_token(config, parameters) / 6
        rate = statistics.median(one.rates)
        width = config.intermediate_size
        print(f"{name:20}{parameters / 1e6:11.2f}M{active / 1e6:9.2f}M{width:14,}{rate:10,.0f}")
    rates = (one.rates for one in contenders.values())
    ratio = statistics.median(dense / routed for routed, dense in zip(*rates, strict=True))
    print(f"a step of the mixture takes {ratio:.3f} × the dense one's (median of {args.rounds} rounds)")
    return ratio


if __name__ == "__main__":
    main()
