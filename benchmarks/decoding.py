"""Decoding speed: our engine next to transformers' generate and llama.cpp, the same weights, greedy.

The contenders, each timed in turn, round by round:

  ours          model/batching.py
  generate      transformers' generate on our model (its DynamicCache)
  llama         transformers' generate on LlamaForCausalLM with the same weights; dense models only
  llama.cpp     through llama-cpp-python, if it is installed and --gguf names the same weights as GGUF

Measured:

  one stream    tokens per second of the decoding alone: N over the time to make 1 + N tokens less the time to make 1
  first token   seconds from a prompt of --long_prompt tokens to the first id of the answer
  concurrent    --concurrent requests at once, and the same requests one after another through transformers:
                tokens per second from the first prompt to the last token, prompts included
  bandwidth     weight bytes that a token of one stream needs, over what memory delivers if it is only read

    python benchmarks/decoding.py [--weight out/full_sft_512.pth] [--dtype bfloat16] [--device cuda]
    python scripts/convert_model.py --help    # how to write the GGUF file for --gguf
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers
from transformers import GenerationConfig

from benchmarks.peers import llama, synchronize
from model.batching import Engine
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.sampling import SamplingParams
from model.weights import load_model


def random_model(use_moe: bool) -> MiniMindForCausalLM:
    """Return a preset with random weights, rounded to float16 as a .pth holds them."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=640 if use_moe else 512, use_moe=use_moe))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def of_ours(model, concurrent: int, context_length: int = 2048):
    engine = Engine(model, slots=concurrent, context_length=context_length)

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        for slot in engine._slots:  # each round must read its prompt again
            slot.ids = []
        params = SamplingParams(temperature=0.0, max_new_tokens=count, stop_ids=())
        requests = [engine.submit(prompt, params) for prompt in prompts]
        return [[token.id for token in request] for request in requests]

    return run


def of_transformers(model):
    device = next(model.parameters()).device

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        answers = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=device)
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            answers.append(output[0, len(prompt) :].tolist())
        return answers

    return run


def of_llama_cpp(path: Path, threads: int):
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            llama.reset()
            answers.append(list(itertools.islice(llama.generate(prompt, temp=0.0, top_k=1), count)))
        return answers

    return run


def read_bandwidth(device: torch.device, mebibytes: int = 512) -> float:
    """Return bytes per second of summing a block too large for any cache, the best of several passes."""
    block = torch.ones(mebibytes * 2**18, device=device)
    return 4 * block.numel() / min(timed(block.sum, device) for _ in range(8))


def weight_bytes(model: MiniMindForCausalLM, device: torch.device) -> float:
    """Return the bytes of weights that one token needs: all matrices, and of the experts only the chosen ones. On a CPU
    the engine reads two bytes per weight if float16 holds the values, as in a .pth, or the model is in half
    precision."""
    config, total = model.config, 0
    for name, parameter in model.named_parameters():  # the tied head is listed once
        share = config.num_experts_per_tok / config.n_routed_experts if ".mlp.experts." in name else 1
        total += share * parameter.numel()
    exact = all(torch.equal(p.half().to(p.dtype), p) for p in model.parameters())
    narrow = device.type == "cpu" and (exact or next(model.parameters()).dtype != torch.float32)
    return total * (2 if narrow else next(model.parameters()).element_size())


def timed(run, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def table(title: str, unit: str, values: dict[str, list[float]], more_is_better: bool = True) -> None:
    """Return medians, and the median over rounds of the ratio within a round."""
    print(f"\n{title:28}{unit:>10}   ours is better by (median and range over rounds)")
    for name, rounds in values.items():
        pairs = zip(values["ours"], rounds, strict=True)
        ratios = [a / b if more_is_better else b / a for a, b in pairs]
        spread = "" if name == "ours" else f"   {min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  {name:26}{statistics.median(rounds):10,.1f}   {statistics.median(ratios):.2f}×{spread}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, help="a .pth (default: random weights of the 26M preset)")
    parser.add_argument("--use_moe", action="store_true", help="random weights of the 145M mixture of experts")
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--long_prompt", type=int, default=512)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model = load_model(args.weight)[0] if args.weight else random_model(args.use_moe)
    twin = None if model.config.use_moe else llama(model.config, model.state_dict())
    model = model.to(device, getattr(torch, args.dtype)).eval()

    def prompts(count: int, length: int) -> list[list[int]]:
        return torch.randint(3, model.config.vocab_size, (count, length)).tolist()

    contenders = {"ours": of_ours(model, args.concurrent), "generate": of_transformers(model)}
    if twin is not None:
        contenders["llama"] = of_transformers(twin.to(device, getattr(torch, args.dtype)).eval())
    if args.gguf:
        contenders["llama.cpp"] = of_llama_cpp(args.gguf, torch.get_num_threads())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{device}, {torch.get_num_threads()} threads, {versions}; {parameters:.2f}M in {args.dtype}, "
        f"prompts of {args.prompt_tokens} tokens, {args.new_tokens} new ones"
    )
    many = prompts(args.concurrent, args.prompt_tokens)
    one, long = prompts(1, args.prompt_tokens), prompts(1, args.long_prompt)
    outputs = {name: run(one, 1 + args.new_tokens) for name, run in contenders.items()}  # warms up, too
    for name, output in outputs.items():
        same = next((n for n, (a, b) in enumerate(zip(outputs["ours"][0], output[0], strict=True)) if a != b), None)
        print(f"  {name}: {'the same ids as ours' if same is None else f'the same ids as ours up to token {same}'}")

    stream, first, together = ({name: [] for name in contenders} for _ in range(3))
    sequential = [name for name in contenders if name in ("ours", "generate")]
    bandwidth = []
    for _ in range(args.rounds):
        bandwidth.append(read_bandwidth(device))
        for name, run in contenders.items():
            begun = timed(lambda run=run: run(one, 1), device)
            whole = timed(lambda run=run: run(one, 1 + args.new_tokens), device)
            stream[name].append(args.new_tokens / (whole - begun))
            first[name].append(1000 * timed(lambda run=run: run(long, 1), device))
        for name in sequential:
            seconds = timed(lambda run=contenders[name]: run(many, args.new_tokens), device)
            together[name].append(args.concurrent * args.new_tokens / seconds)

    table("one stream", "tokens/s", stream)
    table(f"first token after {args.long_prompt}", "ms", first, more_is_better=False)
    table(f"{args.concurrent} requests", "tokens/s", {name: together[name] for name in sequential})
    needed = weight_bytes(model, device)
    shares = [rate * needed / limit for rate, limit in zip(stream["ours"], bandwidth, strict=True)]
    print(
        f"\nmemory: {needed / 1e6:.1f} MB of weights a token, {statistics.median(bandwidth) / 1e9:.1f} GB/s read; "
        f"one stream of ours uses {statistics.median(shares):.0%} of that ({min(shares):.0%} to {max(shares):.0%})"
    )


if __name__ == "__main__":
    main()
