"""Scores and speed next to lm-evaluation-harness, on the same weights, prompts and questions, on a CPU.

    pip install "lm-eval[api]==0.4.13"
    python benchmarks/evaluation.py --weight full_sft --eval_dir dataset/eval
    python scripts/serve_openai_api.py &
    python benchmarks/evaluation.py --weight full_sft --base_url http://127.0.0.1:8998/v1 --model full_sft_512

lm-eval reads the weights as the Llama folder that scripts/convert_model.py writes, or asks a server with its
local-completions. Prompts come from scripts/evaluate.py, --format plain, and reach lm-eval as the text of a local task.
Speeds are questions for each second of CPU time, of the clock with a server. Only scoring is timed: in lm-eval its
loglikelihood(), which also tokenizes, here tokenizing and log_likelihoods().
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_DATASETS_OFFLINE"] = "1"

from scripts import evaluate
from scripts.evaluation_sets import Question, read_set

# title: (set, letters, worked examples, share of --questions)
FORMS = {
    "ARC-easy, text of the options": ("arc_easy", False, 0, 1.0),
    "C-Eval, letters": ("ceval", True, 0, 1.0),
    "C-Eval, letters, 5 examples": ("ceval", True, 5, 0.25),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weight", default="full_sft", help="a stage or a .pth file")
    add("--out_dir", default=str(ROOT / "out"))
    add("--eval_dir", type=Path, default=ROOT / "dataset" / "eval")
    add("--questions", type=int, default=200, help="the first of each set")
    add("--batch_size", type=int, default=16, help="of lm-eval; ours has none")
    add("--base_url", help="compare by a server in place of a folder")
    add("--model", help="what the server calls the weights")
    return parser.parse_args()


def timed(function: Callable, *arguments) -> tuple[object, float, float]:
    """Return the result, and seconds on the clock and of this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    return function(*arguments), time.perf_counter() - wall, time.process_time() - cpu


def ours(candidate: evaluate.Candidate, questions: list[Question], worked: dict, letters: bool, shots: int) -> tuple:
    """Return how each question is asked, and the log-likelihoods of its options, (questions, options)."""
    asked = [evaluate.ask(candidate, q, worked.get(q.subject, [])[:shots], letters) for q in questions]
    scores = iter(candidate.score([pair for form in asked for pair in form.pairs]))
    return asked, [[next(scores) for _ in form.pairs] for form in asked]


def theirs(lm, tokenizer, questions: list[Question], asked: list[evaluate.Asked], folder: Path) -> tuple:
    """Return lm-eval's log-likelihoods, its accuracy, and the seconds of its scoring."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_control=False)

    with open(folder / "task.jsonl", "w", encoding="utf-8") as file:
        for question, form in zip(questions, asked, strict=True):
            choices = [text(option) for _, option in form.pairs]
            row = {"ctx": text(form.pairs[0][0]), "choices": choices, "gold": question.gold}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    task = {
        "task": f"local_{time.time_ns()}", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "task.jsonl")}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice", "doc_to_text": "{{ctx}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    import lm_eval

    seconds, loglikelihood = [], type(lm).loglikelihood

    def measured(*arguments, **options):
        result, *spent = timed(lambda: loglikelihood(lm, *arguments, **options))
        seconds.extend(spent)
        return result

    lm.loglikelihood = measured
    found = lm_eval.simple_evaluate(lm, tasks=[task], log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    scores = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    return scores, found["results"][task["task"]]["acc,none"], *seconds


def main() -> None:
    args = parse()
    from lm_eval.api.registry import get_model  # not needed for --help

    flags = ["--weight", args.model or args.weight, "--tasks", "none", "--format", "plain", "--out_dir", args.out_dir]
    flags += ["--device", "cpu", "--dtype", "float32", "--max_seq_len", "2048"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.base_url:
            options = evaluate.parse([*flags, "--base_url", args.base_url])
            candidate, _ = evaluate.reach_candidate(args.model, options)
            kind, model = "local-completions", {"model": args.model, "tokenizer": str(ROOT / "model")}
            model["base_url"] = f"{args.base_url}/completions"
        else:
            candidate, _ = evaluate.load_candidate(args.weight, evaluate.parse(flags))
            command = [sys.executable, str(ROOT / "scripts" / "convert_model.py"), "--input", candidate.facts["source"]]
            subprocess.run([*command, "--output", str(folder / "llama")], check=True, stdout=subprocess.DEVNULL)
            kind, model = "hf", {"pretrained": str(folder / "llama"), "device": "cpu", "dtype": "float32"}
        lm = get_model(kind)(batch_size=args.batch_size, max_length=2048, **model)
        print("| | questions | largest difference, nats | accuracy here / lm-eval | questions/s of both | ratio |")
        print("|-|-|-|-|-|-|")
        for title, (name, letters, shots, share) in FORMS.items():
            each = read_set(name, args.eval_dir)
            questions = each.questions[: round(share * args.questions)]
            (asked, scores), wall, cpu = timed(ours, candidate, questions, each.examples, letters, shots)
            other, accuracy, other_wall, other_cpu = theirs(lm, candidate.tokenizer, questions, asked, folder)
            difference = max(abs(a - b) for s, o in zip(scores, other, strict=True) for a, b in zip(s, o, strict=True))
            right = np.mean([np.argmax(row) == q.gold for row, q in zip(scores, questions, strict=True)])
            if args.base_url:
                cpu, other_cpu = wall, other_wall  # the server works
            speeds = f"{len(questions) / cpu:.2f} / {len(questions) / other_cpu:.2f}"
            print(
                f"| {title} | {len(questions)} | {difference:.1e} | {right:.3f} / {accuracy:.3f} | {speeds} "
                f"| {other_cpu / cpu:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
