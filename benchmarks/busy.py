"""What a busy machine costs: run a benchmark alone, then next to one and to two processes that never rest.

    python benchmarks/busy.py                  training and decoding of a 2.8M model, with model/threads.py and without
    python benchmarks/busy.py benchmarks/train_throughput.py --rounds 2 --seconds 5

Peers that the command measures run under the same load, in the same run. With c cores and n competitors a fair share is
about c / (c + n) of the quiet speed for work that keeps every core busy.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPETITOR = (sys.executable, "-c", "while True: pass")
WITHOUT = {"LOCAL_RANK": "0"}  # as in the processes of a launcher, where model/threads.py does nothing


def main(command: list[str]) -> None:
    for competitors in (0, 1, 2):
        others = [subprocess.Popen(COMPETITOR) for _ in range(competitors)]
        try:
            print(f"\n=== {competitors} other busy processes", flush=True)
            for more in ({},) if command else ({}, WITHOUT):
                words = command or [__file__, "--own"]
                subprocess.run([sys.executable, *words], check=True, env=os.environ | more)
        finally:
            for other in others:
                other.kill()
                other.wait()


def speed(work: Callable[[], int], seconds: float = 5.0) -> float:
    """Return what work counts, for each second."""
    work()
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        count += work()
    return count / (time.monotonic() - start)


def own() -> None:
    """Print the tokens a second of training steps (8 rows of 256) and of one stream of greedy text."""
    sys.path.insert(0, str(ROOT))
    import model.threads  # isort: skip  # noqa: F401  before torch
    import torch

    from model.generation import SamplingParams, generate_batch
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
    small = MiniMindForCausalLM(MiniMindConfig(**sizes))
    optimizer = torch.optim.AdamW(small.parameters(), 1e-3, fused=True)
    ids = torch.randint(6400, (8, 256))

    def step() -> int:
        small(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return ids.numel()

    training = speed(step)
    greedy = SamplingParams(0.0, max_new_tokens=200, stop_ids=())
    decoding = speed(lambda: len(generate_batch(small.eval(), [[1, 5, 6, 7]], greedy)[0]))
    waiting = "without" if "LOCAL_RANK" in os.environ else "with"
    print(f"{waiting} model/threads.py: training {training:,.0f} tokens/s, decoding {decoding:,.0f}", flush=True)


if __name__ == "__main__":
    own() if sys.argv[1:] == ["--own"] else main(sys.argv[1:])
