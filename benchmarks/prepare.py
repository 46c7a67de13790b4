"""Speed of prepare_data.py clean and dedup next to the datasets library, and their memory at ten times the data.

    python benchmarks/prepare.py dataset/pretrain_hq.jsonl

The peer runs the same rules of clean in map and filter, with as many processes, and finds near duplicates as is usual
with that library: signatures of datasketch, an index in memory. CPU seconds are steadier than the clock on a machine
that does other work too. The larger data are copies with every fourth kind of character changed, so no duplicates.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.prepare_overlap import BANDS, MINIMA, SHINGLE, normal
from scripts.prepare_pipeline import Dropped
from scripts.prepare_rules import Clean

WORKERS = 2


def cleaned(row: dict) -> dict:
    try:
        made = Clean(max_chars=2000)(row, [])
        return {"text": made[0]["text"] if made else row["text"], "keep": True}
    except Dropped:
        return {"text": row["text"], "keep": False}


def signed(row: dict) -> dict:
    from datasketch import MinHash

    text, found = normal(row["text"]), MinHash(MINIMA)
    found.update_batch({text[n : n + SHINGLE].encode() for n in range(len(text) - SHINGLE + 1)})
    return {"signature": found.hashvalues}


def peer(step: str, source: str, output: str) -> None:
    from datasets import load_dataset
    from datasketch import MinHash, MinHashLSH

    data = load_dataset("json", data_files=source, split="train", cache_dir=f"{output}_cache")
    if step == "clean":
        data = data.map(cleaned, num_proc=WORKERS).filter(bool, input_columns="keep", num_proc=WORKERS)
        data.remove_columns("keep").to_json(output, force_ascii=False)
        return
    index, kept = MinHashLSH(num_perm=MINIMA, params=(BANDS, MINIMA // BANDS)), {}
    for number, row in enumerate(data.map(signed, num_proc=WORKERS).select_columns("signature").with_format("numpy")):
        found = MinHash(MINIMA, hashvalues=row["signature"])
        if not any(found.jaccard(kept[other]) >= 0.8 for other in index.query(found)):
            index.insert(number, found)
            kept[number] = found
    data.select(kept).to_json(output, force_ascii=False)


def measure(name: str, *command) -> None:
    """Run a command; print its wall and CPU seconds and its peak of memory, workers included, shared pages not."""
    start, before, peak = time.perf_counter(), os.times(), 0
    process = psutil.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        used = 0
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended
                memory = one.memory_info()
                used += memory.rss - memory.shared
        peak = max(peak, used)
        time.sleep(0.1)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{name:24} {wall:7.1f} s {cpu:7.1f} s CPU {peak / 1e6:7.0f} MB", flush=True)


def main() -> None:
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        for copies in (1, 10):
            large = Path(folder) / f"{copies}.jsonl"
            with open(large, "w", encoding="utf-8") as file:
                for copy in range(copies):
                    table = {code: code + copy for code in range(0x4E00, 0x9F00, 4)}
                    file.writelines(line.translate(table) for line in open(source, encoding="utf-8"))
            for step, *flags in (("clean", "--max_chars", 2000), ("dedup",)):
                output = f"{folder}/{step}{copies}"
                title = f"{step} of {large.stat().st_size / 1e6:.0f} MB"
                measure(
                    title, ROOT / "scripts" / "prepare_data.py", step, large, "-o", output, "--workers", WORKERS, *flags
                )
                if copies == 1:
                    measure(f"{title}, peer", __file__, step, large, f"{output}_peer")


if __name__ == "__main__":
    peer(*sys.argv[1:]) if len(sys.argv) > 2 else main()
