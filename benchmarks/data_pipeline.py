"""Speed of the data path next to the tokenizers library alone, and its memory at ten times the data.

    python benchmarks/data_pipeline.py                                        the repository's sample, repeated
    python benchmarks/data_pipeline.py --data_path dataset/pretrain_hq.jsonl --kind pretrain
    python benchmarks/data_pipeline.py --data_path dataset/sft_mini_512.jsonl --kind conversation

Caches go to a temporary folder and are removed. Memory is read from /proc, so that part needs Linux.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer

from dataset.lm_dataset import KINDS, parse_record
from dataset.packing import PackedBatches, PreferenceBatches, build_plan
from dataset.token_cache import open_token_cache
from dataset.tokenization import ChatTokenizer
from dataset.workers import usable_cores

SAMPLES = {"pretrain": "pretrain.jsonl", "conversation": "sft.jsonl"}
PEER_BATCH = 1000  # texts per call of encode_batch; all at once would hold gigabytes of offsets
ROUNDS = 2  # ours and the peer take turns; the better time counts, because other work on the machine hits both


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, help="jsonl file (default: dataset/sample/, pretrain and sft)")
    parser.add_argument("--kind", choices=KINDS, help="kind of its records (default: guessed from the first line)")
    parser.add_argument("--tokenizer_path", type=Path, default=ROOT / "model")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--megabytes", type=float, default=16, help="size that the sample is repeated to")
    parser.add_argument("--scale", type=int, default=10, help="times that the memory test repeats the data")
    args = parser.parse_args(argv)
    if args.data_path:
        inputs = [(args.kind or guess_kind(args.data_path), args.data_path)]
    else:
        inputs = [(kind, ROOT / "dataset" / "sample" / name) for kind, name in SAMPLES.items()]
    with tempfile.TemporaryDirectory(prefix="data_pipeline_") as folder:
        for kind, path in inputs:
            if not args.data_path:
                times = max(1, round(args.megabytes * 1e6 / path.stat().st_size))
                path = repeat(path, times, Path(folder) / path.name)
            measure(args, kind, path, Path(folder))


def measure(args: argparse.Namespace, kind: str, path: Path, folder: Path) -> None:
    tokenizer = ChatTokenizer(args.tokenizer_path)
    cores = usable_cores()
    print(f"\n{path.name}: {kind}, {path.stat().st_size / 1e6:.1f} MB, {cores} cores")

    best = {}  # (wall seconds, CPU seconds)
    for round_ in range(ROUNDS):
        for workers in sorted({1, cores}):
            cache_dir = folder / f"{path.stem}_{workers}_{round_}"
            start, cpu_start = time.perf_counter(), cpu_seconds()
            cache = open_token_cache(
                path, tokenizer, kind, cache_dir=cache_dir, num_workers=workers, show_progress=False
            )
            keep_best(best, ("ours", workers), (time.perf_counter() - start, cpu_seconds() - cpu_start))
            peer = in_process(peer_seconds, args.tokenizer_path, kind, path, workers)
            keep_best(best, ("peer", workers), peer)
    megabytes = sum(len(text.encode()) for text in texts_of(kind, path)) / 1e6
    print("  cache building     ours, jsonl to cache         encode_batch, texts in memory   rate, ours / peer")
    for workers in sorted({1, cores}):
        (ours, ours_cpu), (peer, peer_cpu) = best["ours", workers], best["peer", workers]
        print(
            f"    {workers:2} core{'s' if workers > 1 else ' '}         "
            f"{megabytes / ours:5.2f} MB/s {cache.meta['tokens'] / ours / 1e6:5.2f} Mtokens/s   "
            f"{megabytes / peer:5.2f} MB/s                      {peer / ours:6.1%} "
            f"({peer_cpu / ours_cpu:.1%} by CPU time)"
        )
    if cores > 1:
        print(f"    {cores} cores are {best['ours', 1][0] / best['ours', cores][0]:.2f} times as fast as 1")

    start = time.perf_counter()
    plan = build_plan(cache, args.max_seq_len, show_progress=False)
    print(
        f"  plan, cold            {time.perf_counter() - start:.2f} s for {plan.stats['documents']:,} documents; "
        f"fill {plan.fill:.2%} of {plan.num_rows:,} rows of {plan.max_seq_len}"
    )
    batches = batches_of(cache, plan, args.batch_size)
    count = min(len(batches), 500)
    start = time.perf_counter()
    tokens = sum(batches[i]["real_tokens"] for i in range(count))
    rate = tokens / (time.perf_counter() - start) / 1e6
    print(f"  batches, one process  {rate:.1f} Mtokens/s ({count} of {args.batch_size} x {args.max_seq_len})")

    if not Path("/proc/self/status").exists():
        return
    peaks = {}
    for times in (1, args.scale):
        large = repeat(path, times, folder / f"{path.stem}_x{times}.jsonl")
        for child in ("build", "iterate"):
            result = in_process(measure_memory, args, child, kind, large, folder / f"{path.stem}_x{times}")
            peaks[child, times] = result["rss_anon"]
            if child == "iterate":
                print(
                    f"  warm start at {times:2}x     {result['seconds']:.3f} s to the first batch "
                    f"({result['import_seconds']:.1f} s more for imports)"
                )
        large.unlink()
    for child, text in (("iterate", "open and iterate"), ("build", "build the cache")):
        small, large = peaks[child, 1] / 1e6, peaks[child, args.scale] / 1e6
        print(
            f"  RssAnon, {text:16} {small:.0f} MB at 1x, {large:.0f} MB at {args.scale}x: "
            f"growth {large - small:+.1f} MB"
        )


def in_process(function: Callable, *arguments):
    """Return what the function returns in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_memory(args: argparse.Namespace, child: str, kind: str, path: Path, cache_dir: Path) -> dict:
    """Return the peak of RssAnon above that of the imports, and the seconds from the flags to the first batch."""
    before = rss_anon()
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], rss_anon())

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    tokenizer = ChatTokenizer(args.tokenizer_path)
    cache = open_token_cache(path, tokenizer, kind, cache_dir=cache_dir, show_progress=False)
    batches = batches_of(cache, build_plan(cache, args.max_seq_len, show_progress=False), args.batch_size)
    batches[0]
    seconds = time.perf_counter() - start
    if child == "iterate":
        for i in range(len(batches)):
            batches[i]
    done.set()
    return {"rss_anon": max(peak[0], rss_anon()) - before, "seconds": seconds, "import_seconds": start - STARTED}


def peer_seconds(tokenizer_path: Path, kind: str, path: Path, threads: int) -> tuple[float, float]:
    """Return (wall, CPU) seconds that the library's encode_batch takes for the same texts with as many threads."""
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    texts = list(texts_of(kind, path))
    file = tokenizer_path / "tokenizer.json" if tokenizer_path.is_dir() else tokenizer_path
    tokenizer = Tokenizer.from_file(str(file))
    start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, len(texts), PEER_BATCH):
        tokenizer.encode_batch(texts[first : first + PEER_BATCH])
    return time.perf_counter() - start, time.process_time() - cpu_start


def texts_of(kind: str, path: Path):
    """Yield every text of a file that is tokenized: documents, or the contents of turns."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = parse_record(kind, line)
            if kind == "pretrain":
                yield record
            else:
                turns = record if kind == "conversation" else [*record[0], *record[1]]
                yield from (turn["content"] for turn in turns)


def batches_of(cache, plan, batch_size: int):
    return (PreferenceBatches if cache.kind == "preference" else PackedBatches)(cache, plan, batch_size=batch_size)


def guess_kind(path: Path) -> str:
    with open(path, encoding="utf-8-sig") as file:
        keys = json.loads(file.readline())
    return "pretrain" if "text" in keys else "preference" if "chosen" in keys else "conversation"


def repeat(path: Path, times: int, target: Path) -> Path:
    with open(path, "rb") as source, open(target, "wb") as copy:
        for _ in range(times):
            source.seek(0)
            while block := source.read(1 << 22):
                copy.write(block)
    return target


def rss_anon() -> int:
    """Return the bytes of memory that belong to this process alone, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended: steadier than the clock on a shared machine."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def keep_best(best: dict, key: tuple, seconds: tuple[float, float]) -> None:
    """Keep the smaller of wall and of CPU seconds."""
    best[key] = tuple(map(min, seconds, best.get(key, seconds)))


if __name__ == "__main__":
    main()
