"""Speed of prepare_data.py clean and dedup next to the datasets library, and their memory at eight times the data.

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


def cleaned(row: dict) -> dict:
    with contextlib.suppress(Dropped):
        return {"text": (Clean(max_chars=2000)(row, []) or [row])[0]["text"], "keep": True}
    return {"text": row["text"], "keep": False}


def peer(step: str, source: str, output: str) -> None:
    from datasets import load_dataset
    from datasketch import MinHash, MinHashLSH

    def signed(row: dict) -> dict:
        text, found = normal(row["text"]), MinHash(MINIMA)
        found.update_batch({text[n : n + SHINGLE].encode() for n in range(len(text) - SHINGLE + 1)})
        return {"signature": found.hashvalues}

    data = load_dataset("json", data_files=source, split="train", cache_dir=f"{output}_cache")
    if step == "clean":
        data = data.map(cleaned, num_proc=2).filter(bool, input_columns="keep", num_proc=2).remove_columns("keep")
        return data.to_json(output, force_ascii=False)
    index, kept = MinHashLSH(num_perm=MINIMA, params=(BANDS, MINIMA // BANDS)), {}
    for number, row in enumerate(data.map(signed, num_proc=2).select_columns("signature").with_format("numpy")):
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
        with contextlib.suppress(psutil.Error):  # a worker has ended
            memory = [each.memory_info() for each in (process, *process.children(recursive=True))]
            peak = max(peak, sum(each.rss - each.shared for each in memory))
        time.sleep(0.1)
    cpu = sum(os.times()[2:4]) - sum(before[2:4])
    print(f"{name:24} {time.perf_counter() - start:7.1f} s {cpu:7.1f} s CPU {peak / 1e6:7.0f} MB", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for copies in (1, 8):
            large = Path(folder) / f"{copies}.jsonl"
            with open(large, "w", encoding="utf-8") as file:
                for copy in range(copies):
                    table = {code: code + copy for code in range(0x4E00, 0x9F00, 4)}
                    file.writelines(line.translate(table) for line in open(sys.argv[1], encoding="utf-8"))
            for step, *flags in (("clean", "--max_chars=2000"), ("dedup",)):
                title, output = f"{step} of {large.stat().st_size / 1e6:.0f} MB", f"{folder}/{step}{copies}"
                measure(title, ROOT / "scripts/prepare_data.py", step, large, "-o", output, "--workers=2", *flags)
                if copies == 1:
                    measure(f"{title}, peer", __file__, step, large, f"{output}_peer")


if __name__ == "__main__":
    peer(*sys.argv[1:]) if len(sys.argv) > 2 else main()
