"""From nothing to a chat on a laptop: train a tiny model on dataset/sample/, score it and talk to it.

Run the real scripts one after the other, with settings for two CPU cores: trainer/train_pretrain.py,
trainer/train_full_sft.py, scripts/evaluate.py, scripts/eval_toolcall.py, eval_model.py, scripts/report.py. Weights and
logs go to out/quickstart/.

    python scripts/quickstart.py
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.streams import entry_point
from scripts.example_prompts import CONVERSATIONS
from scripts.speedrun import converse, must_run, run

SAMPLE = ROOT / "dataset" / "sample"

# Muon learns this world in about a third of AdamW's steps; what an interrupted quickstart left is not worth keeping
COMMON = (
    "--hidden_size 192 --num_hidden_layers 4 --num_attention_heads 6 --num_key_value_heads 2 --max_seq_len 256 "
    "--optimizer muon --learning_rate 4e-3 --min_lr_ratio 0.05 --warmup_iters 20 --batch_size 8 --accumulation_steps 1 "
    "--log_interval 50 --save_interval 1000 --eval_interval 1000 --overwrite"
)
PRETRAIN_EPOCHS, SFT_EPOCHS = 2, 3
LONG_ROWS = "--max_seq_len 576 --batch_size 4"  # conversations with tools are longer
DIALOGUE = (
    "你好，你是谁？",
    "7加8等于多少？",
    "法国的首都是哪里？",
    "“床前明月光”的下一句是什么？",
    "What colour is the sky?",
)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "quickstart")
    args = parser.parse_args(argv)
    out = ("--out_dir", args.out_dir)
    start = time.monotonic()
    must_run(
        "1. Pretraining: reading",
        "trainer/train_pretrain.py",
        *("--data_path", SAMPLE / "pretrain.jsonl", "--valid_path", SAMPLE / "valid.jsonl"),
        *("--epochs", PRETRAIN_EPOCHS, *COMMON.split(), "--embedding_lr_scale", 1),
        *out,
    )
    conversations = args.out_dir / CONVERSATIONS
    conversations.write_bytes(b"".join((SAMPLE / name).read_bytes() for name in ("sft.jsonl", "tools.jsonl")))
    must_run(
        "2. Fine-tuning: answering, and calling a calculator",
        "trainer/train_full_sft.py",
        *("--data_path", conversations, "--epochs", SFT_EPOCHS, *COMMON.split(), *LONG_ROWS.split()),
        *out,
    )
    questions = ("--tasks", SAMPLE / "questions.jsonl", "--match", "exact", "--overlap", "false")
    must_run("3. Questions it was never asked before", "scripts/evaluate.py", *questions, *out)
    run("4. Sums too long for its head: it calls the calculator", "scripts/eval_toolcall.py", *out)
    converse("5. A conversation", args.out_dir / "full_sft_192.pth", DIALOGUE)
    run("6. Pictures of all this", "scripts/report.py", args.out_dir)
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Talk to it yourself:")
    print(f"  {sys.executable} eval_model.py --model_mode 1 --out_dir {args.out_dir}")


if __name__ == "__main__":
    main()
