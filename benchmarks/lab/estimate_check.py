"""Compare --estimate with the runs it predicts, for several stages and settings.

    python benchmarks/lab/estimate_check.py [--only pretrain …] [--seconds 40] [--json out/estimate_check.json]

Each setting is estimated and then run for as many optimizer steps as fit in --seconds. It starts from random weights,
because neither time nor memory depends on them. On a GPU the models and batches are larger. The exit status is 1 if a
time is off by more than 15 % or a memory by more than 10 %. The last column compares processor seconds: with one
thread that is the time without what other programs took. --by_processor judges by it if they cannot be stopped.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights, write_json
from trainer.arguments import run_script

BOUNDS = {"time": 0.15, "memory": 0.10}
SMALL, BASE, LARGE = ((256, 4), (512, 8), (768, 16))  # hidden size, layers: 4.46M, 26M, 104M
STUDENT = (128, 4)
EPOCHS = 1000  # no run is to end before its time


def settings(cuda: bool) -> dict[str, tuple[str, tuple[int, int], str]]:
    """name -> (stage script, hidden size and layers, its other flags)"""
    if cuda:
        return {
            "pretrain": ("pretrain", BASE, "--optimizer adamw"),
            "pretrain 104M": ("pretrain", LARGE, ""),
            "muon": ("pretrain", BASE, "--optimizer muon"),
            "moe": ("pretrain", (640, 8), "--use_moe"),
            "checkpointing": ("pretrain", LARGE, "--gradient_checkpointing"),
            "float32": ("pretrain", BASE, "--dtype float32"),
            "sft": ("full_sft", BASE, ""),
            "lora": ("lora", BASE, ""),
            "dpo": ("dpo", BASE, "--batch_size 16"),
            "distillation": ("distillation", BASE, f"--teacher_hidden_size {LARGE[0]}"),
        }
    return {
        "pretrain": ("pretrain", BASE, "--batch_size 8 --accumulation_steps 1 --optimizer adamw"),
        "muon": ("pretrain", SMALL, "--batch_size 8 --accumulation_steps 2 --optimizer muon"),
        "moe": ("pretrain", SMALL, "--batch_size 8 --accumulation_steps 1 --use_moe"),
        "checkpointing": ("pretrain", BASE, "--batch_size 8 --accumulation_steps 1 --gradient_checkpointing"),
        "float32": ("pretrain", SMALL, "--batch_size 8 --accumulation_steps 1 --dtype float32"),
        "sft": ("full_sft", SMALL, "--batch_size 8"),
        "lora": ("lora", BASE, "--batch_size 4"),
        "dpo": ("dpo", SMALL, ""),
        "distillation": ("distillation", STUDENT, f"--batch_size 8 --teacher_hidden_size {SMALL[0]}"),
    }


def preferences(conversations: Path, target: Path) -> Path:
    """Make pairs if there are no real ones: the rejected answer is that of the conversation before."""
    lines, answer = [], None
    with conversations.open(encoding="utf-8") as file:
        for line in file:
            turns = json.loads(line)["conversations"][:2]
            if answer not in (None, turns[1]):
                lines.append(json.dumps({"chosen": turns, "rejected": [turns[0], answer]}, ensure_ascii=False) + "\n")
            answer = turns[1]
    target.write_text("".join(lines), encoding="utf-8")
    return target


def run_stage(script: str, flags: list[str]) -> None:
    command = [sys.executable, str(ROOT / "trainer" / f"train_{script}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def compare(name: str, setting: tuple, folder: Path, args: argparse.Namespace) -> dict:
    """Estimated and measured seconds and bytes of a run."""
    script, (hidden, layers), more = setting
    out = folder / name.replace(" ", "_")
    tokenizer = ChatTokenizer(ROOT / "model")
    if script != "pretrain":
        for width, depth in {(hidden, layers)} | ({SMALL, LARGE} if script == "distillation" else set()):
            config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth, vocab_size=tokenizer.vocab_size)
            stem = "pretrain" if script == "full_sft" else "full_sft"
            save_weights(out / f"{stem}_{width}.pth", MiniMindForCausalLM(config))
    data = {"pretrain": args.pretrain_data, "dpo": args.preference_data}.get(script, args.conversation_data)
    flags = ["--data_path", str(data), "--out_dir", str(out), "--cache_dir", str(args.cache_dir or folder / "cache")]
    flags += ["--hidden_size", str(hidden), "--num_hidden_layers", str(layers), "--epochs", str(EPOCHS), *more.split()]
    flags += ["--device", args.device, "--save_interval", "1000000"]

    def estimated(*more: str) -> dict:
        run_stage(script, [*flags, "--estimate", *more])
        (file,) = out.glob("logs/**/*.estimate.json")
        return json.loads(file.read_text("utf-8"))

    estimate = estimated()
    steps = max(round(args.seconds / estimate["step"]), estimate["timed"] + 1)
    if script == "dpo":  # how much the reference has to read depends on it
        estimate = estimated("--max_steps", str(steps))
    run_stage(script, [*flags, "--max_steps", str(steps)])
    (log,) = out.glob("logs/**/*.jsonl")
    end = json.loads(log.read_text("utf-8").splitlines()[-1])
    measured = {"seconds": end["seconds"], "bytes": end["peak_memory_bytes"]}
    measured["processor_seconds"] = end["processor_seconds"]
    unread = max(1 - steps * EPOCHS / estimate["steps"], 0) * estimate["to_come"]  # of tokens, at the end
    first, another = estimate["processor"]
    expected = {
        "seconds": estimate["seconds"] - (estimate["steps"] - steps) * estimate["step"],
        "bytes": estimate["bytes"] - unread,
        "processor_seconds": first + (steps - 1) * another,
    }
    off = {name: measured[name] / value - 1 for name, value in expected.items()}
    return {"steps": steps, "estimated": expected, "measured": measured, "off": off}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help="names of the table (default: all)")
    add("--seconds", type=float, default=40, help="of each run (default: %(default)s)")
    add("--pretrain_data", type=Path, default=ROOT / "dataset/sample/pretrain.jsonl")
    add("--conversation_data", type=Path, default=ROOT / "dataset/sample/sft.jsonl")
    add("--preference_data", type=Path, help="(default: made from the conversations)")
    add("--cache_dir", type=Path, help="tokenised data (default: a temporary folder)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--by_processor", action="store_true", help="judge times by processor seconds of the steps")
    add("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args(argv)
    known = settings(args.device.startswith("cuda"))
    if unknown := set(args.only or ()) - known.keys():
        raise ValueError(f"--only {' '.join(sorted(unknown))}: the table has {', '.join(known)}")
    results = {}
    print(f"{'':16}{'steps':>6}{'estimated':>18}{'measured':>18}{'time':>8}{'memory':>8}{'processor':>11}")
    with tempfile.TemporaryDirectory() as folder:
        if args.preference_data is None:
            args.preference_data = preferences(args.conversation_data, Path(folder) / "pairs.jsonl")
        for name in args.only or known:
            result = results[name] = compare(name, known[name], Path(folder), args)
            parts = (result["estimated"], result["measured"])
            shown = "".join(f"{part['seconds']:9.1f} s {part['bytes'] / 1e9:4.2f} GB" for part in parts)
            time, memory, processor = result["off"].values()
            print(f"{name:16}{result['steps']:6}{shown}{time:+8.1%}{memory:+8.1%}{processor:+11.1%}", flush=True)
            if args.json:
                write_json(args.json, results)
    time_by = "processor_seconds" if args.by_processor else "seconds"
    bounds = {time_by: BOUNDS["time"], "bytes": BOUNDS["memory"]}
    far = [
        name for name, found in results.items() if any(abs(found["off"][what]) > most for what, most in bounds.items())
    ]
    print(f"beyond 15 % of time or 10 % of memory: {', '.join(sorted(far)) or 'none'}")
    sys.exit(1 if far else 0)


if __name__ == "__main__":
    run_script(main)
