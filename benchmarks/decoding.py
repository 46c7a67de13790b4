"""Decoding speed: our engine beside transformers' generate, the same weights, greedy, one prompt at a time or many.

The contenders, each timed in turn, round by round:

  ours          model/generation.py: preallocated cache, one prefill, then a token a step
  generate      transformers' generate on our model (its DynamicCache)
  llama         transformers' generate on LlamaForCausalLM with the same weights

Tokens per second of the decoding alone: N over the time to make 1 + N tokens less the time to make 1. The ids that
ours and generate produce are compared first.

    python benchmarks/decoding.py [--weight out/full_sft_512.pth] [--batch 1] [--dtype bfloat16] [--device cuda]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from model.generation import SamplingParams, generate_batch, stream
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model


def llama_twin(model: MiniMindForCausalLM) -> LlamaForCausalLM | None:
    """The same weights in transformers' Llama; None for a mixture of experts."""
    config = model.config
    if config.use_moe:
        return None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")
    twin = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}))
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, help="a .pth (default: random weights of the 26M preset)")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded together")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = load_model(args.weight)[0] if args.weight else MiniMindForCausalLM(MiniMindConfig())
    twin = llama_twin(model)
    model = model.to(device, getattr(torch, args.dtype)).eval()
    prompts = torch.randint(3, model.config.vocab_size, (args.batch, args.prompt_tokens)).tolist()
    ids = torch.tensor(prompts, device=device)

    def ours(count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_new_tokens=count)
        if args.batch == 1:
            return [list(stream(model, prompts[0], params))]
        return generate_batch(model, prompts, params, batch_size=args.batch)

    def of_transformers(peer):
        def run(count: int) -> list[list[int]]:
            config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
            output = peer.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            return output[:, ids.shape[1] :].tolist()

        return run

    contenders = {"ours": ours, "generate": of_transformers(model)}
    if twin is not None:
        contenders["llama"] = of_transformers(twin.to(device, getattr(torch, args.dtype)).eval())
    outputs = {name: run(1 + args.new_tokens) for name, run in contenders.items()}  # warms up, too
    same = sum(a == b for a, b in zip(outputs["ours"], outputs["generate"], strict=True))

    def seconds(run, count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    rates = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            first = seconds(run, 1)
            rates[name].append(args.batch * args.new_tokens / (seconds(run, 1 + args.new_tokens) - first))

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{device}, {torch.get_num_threads()} threads, {versions}; "
        f"{parameters:.2f}M in {args.dtype}, batch {args.batch}, prompt {args.prompt_tokens}, {args.new_tokens} tokens"
    )
    print(f"same greedy ids as generate on our model: {same} of {args.batch} prompts")
    print(f"{'':10}{'tokens/s':>10}   ours is faster by (median of {args.rounds} rounds)")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True))
        print(f"{name:10}{statistics.median(values):10,.0f}   {ratio:.2f}×")


if __name__ == "__main__":
    main()
