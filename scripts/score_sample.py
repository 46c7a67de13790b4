"""Ask a model the sample's questions, none of which it was trained on, and count the answers that are exactly right.

    python scripts/score_sample.py --out_dir out/quickstart            the full_sft weights in that folder
    python scripts/score_sample.py --weight out/quickstart/full_sft_192.pth

Every question is a chat of its own, answered greedily; an answer counts if its whole text, stripped of white space, is
the expected one. Prints a table and a line `exact match: NN.N %`, and writes {weights}.score.json next to the weights.
"""

import argparse
import json
import sys
import unicodedata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.tokenization import ChatTokenizer
from model.flags import show_defaults
from model.generation import SamplingParams, generate_batch
from model.loading import add_flags, load_ready, ready_flags
from model.streams import set_up_streams
from model.weights import STAGES, find_weights, write_json

LONGEST_ANSWER = 128  # tokens; the longest expected answer is about half of it


def read_questions(path: Path) -> list[dict]:
    """Return [{"category", "rule", "question", "answer"}]. Raises ValueError that names the wrong file and line."""
    if not path.is_file():
        raise ValueError(f"{path} not found; run python dataset/sample/make_sample.py, or name a file with --questions")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            question = json.loads(line)
            kinds = [type(question[key]) for key in ("category", "rule", "question", "answer")]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a question ({type(error).__name__}: {error})") from error
        if kinds != [str, bool, str, str]:
            raise ValueError(f"{path}:{number}: category, question and answer must be text, and rule true or false")
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no question; run python dataset/sample/make_sample.py")
    return questions


def ask(model: torch.nn.Module, tokenizer: ChatTokenizer, questions: list[dict]) -> list[str]:
    """Return the model's greedy answer to each question, in order."""
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": q["question"]}]) for q in questions]
    params = SamplingParams(temperature=0.0, max_new_tokens=LONGEST_ANSWER, stop_ids=(tokenizer.eos_id,))
    return [tokenizer.decode(ids).strip() for ids in generate_batch(model, prompts, params)]


def percent(right: int, asked: int) -> float:
    return 100.0 * right / asked if asked else 0.0


def score(questions: list[dict], answers: list[str]) -> dict:
    """Return the content of .score.json; percentages are rounded down, so that rounding never reaches a threshold."""
    rows: dict[str, list[int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right = answer == question["answer"].strip()
        for name in ("all", "rules" if question["rule"] else "facts", "category " + question["category"]):
            row = rows.setdefault(name, [0, 0])
            row[0] += right
            row[1] += 1

    def entry(name: str) -> dict:
        right, asked = rows.get(name, (0, 0))
        return {"right": right, "asked": asked, "percent": int(percent(right, asked) * 10) / 10}

    kinds = {q["category"]: q["rule"] for q in questions}
    return {
        "exact_match": entry("all")["percent"],
        "all": entry("all"),
        "facts": entry("facts"),
        "rules": entry("rules"),
        "categories": {name: {"rule": rule, **entry("category " + name)} for name, rule in kinds.items()},
        "answers": [
            {**question, "model": answer, "right": answer == question["answer"].strip()}
            for question, answer in zip(questions, answers, strict=True)
        ],
    }


def print_score(result: dict, examples: int) -> None:
    rows = [(name, "rule" if row["rule"] else "fact", row) for name, row in result["categories"].items()]
    rows += [("known facts, new wording", "", result["facts"]), ("rules, unseen operands", "", result["rules"])]
    for name, kind, row in rows:
        print(f"{name:26}{kind:6}{row['right']:4} / {row['asked']:<4}{row['percent']:6.1f} %")
    wrong = [answer for answer in result["answers"] if not answer["right"]]
    if wrong and examples:
        print(f"{min(examples, len(wrong))} of {len(wrong)} wrong answers:")
    for answer in wrong[:examples]:
        print(f"  {answer['question']}  ->  {printable(answer['model'])}   (expected {answer['answer']})")
    print(f"exact match: {result['exact_match']:.1f} %", flush=True)


def printable(text: str, longest: int = 60) -> str:
    """Return one short line without control characters, which an untrained model may answer with."""
    line = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return line if len(line) <= longest else line[:longest] + "…"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_flags(parser, "out_dir", "hidden_size", "use_moe", "tokenizer_path", "device")
    add("--stage", choices=sorted(STAGES), default="full_sft", help="whose weights")
    add("--weight", help="a .pth file, instead of --out_dir and --stage")
    add("--questions", type=Path, default=ROOT / "dataset" / "sample" / "questions.jsonl")
    add("--examples", type=int, default=5, help="wrong answers to print")
    show_defaults(parser)
    set_up_streams()
    args = parser.parse_args(argv)
    try:
        questions = read_questions(args.questions)
        path = find_weights(args.weight or args.stage, args.out_dir, args.hidden_size, args.use_moe)
        ready = load_ready(path, ChatTokenizer, dtype="float32", **ready_flags(args))
        answers = ask(ready.model, ready.tokenizer, questions)
        result = {"weights": path.name, "questions": args.questions.name, **score(questions, answers)}
        write_json(path.with_name(f"{path.stem}.score.json"), result)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{path}: {len(questions)} questions")
    print_score(result, args.examples)


if __name__ == "__main__":
    main()
