"""Questions of evaluation sets in the layouts that they are published in, and the download of the public ones.

A set is a file, a folder of files (one subject each), or a folder with a subfolder for each split: dev holds worked
examples, test or val the questions. Layouts of a row, in csv, jsonl or parquet:

    C-Eval, CMMLU, MMLU, our own   question, A, B, C, D ..., answer (a letter); csv without a header as MMLU has it
    CORE-type bundles              query, choices, gold (index): ARC, OpenBookQA, PIQA, HellaSwag ...
    ARC, OpenBookQA, MMLU on hubs  question or question_stem, choices, answerKey or answer (index)
    with an answer to write        conversations (the user's turn last) or question, answer: GSM8K, sums
    held-out training data         text, conversations with their answers, or chosen and rejected
"""

import csv
import itertools
import json
import shutil
import string
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download

from dataset.answers import answer_part
from dataset.lm_dataset import parse_prompt, parse_record
from scripts.prepare_pipeline import Dropped, rows_of
from scripts.prepare_sources import find_files, layout, read_blocks

LETTERS = string.ascii_uppercase
COLUMNS = LETTERS[:10].lower()  # that hold an option
SPLITS = ("test", "val", "validation")
# name: (repository on Hugging Face, revision, files); a .zip is unpacked, other files become {split}/{name}.parquet
ARC = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
PUBLIC = {
    "ceval": ("ceval/ceval-exam", "ae3bf126dd16b939885931a8c5ef4cea47bf1f2c", ["ceval-exam.zip"]),
    "cmmlu": ("haonan-li/cmmlu", "efcc940752ea4a1ea94d2727f11f83858d64fc8e", ["cmmlu_v1_0_1.zip"]),
    "mmlu": ("cais/mmlu", "main", ["all/dev-00000-of-00001.parquet", "all/test-00000-of-00001.parquet"]),
    "arc_easy": (*ARC, ["ARC-Easy/test-00000-of-00001.parquet"]),
    "arc_challenge": (*ARC, ["ARC-Challenge/test-00000-of-00001.parquet"]),
    "openbook_qa": ("allenai/openbookqa", "main", ["main/test-00000-of-00001.parquet"]),
    "gsm8k": ("openai/gsm8k", "main", ["main/test-00000-of-00001.parquet"]),
}


class Question(NamedTuple):
    """text: of the question, or the turns of a conversation. options: empty if an answer is to be written. gold: the
    index of the right option, or the answer as text. record: (kind, record) of held-out training data."""

    subject: str
    text: str | list[dict]
    options: list[str]
    gold: int | str
    record: tuple[str, Any] | None = None


class QuestionSet(NamedTuple):
    """questions, sorted by subject. examples: subject -> worked examples. files: what was read."""

    name: str
    questions: list[Question]
    examples: dict[str, list[Question]]
    files: list[Path]


def download(name: str, folder: Path) -> None:
    """Fetch a public set into folder/{name}/, or leave what is there."""
    if name not in PUBLIC:
        raise ValueError(f"--download knows {', '.join(PUBLIC)}, not {name}")
    repo, revision, files = PUBLIC[name]
    target, unfinished = folder / name, folder / f".{name}.unfinished"
    if find_set(name, folder):
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    for file in files:
        try:
            path = hf_hub_download(repo, file, repo_type="dataset", revision=revision)
        except Exception as error:  # whatever the network says
            raise ValueError(
                f"{name}: {file} of {repo} cannot be fetched ({error}); HF_ENDPOINT names a mirror, or put the set "
                f"into {target} by hand"
            ) from error
        if file.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unfinished, [n for n in archive.namelist() if not n.startswith("__MACOSX")])
        else:
            split = unfinished / Path(file).name.split("-")[0]
            split.mkdir(parents=True)
            shutil.copyfile(path, split / f"{name}.parquet")
    unfinished.rename(target)
    print(f"{name}: {target}, from {repo} at {revision}; its own licence applies")


def find_set(name: str, folder: Path) -> Path | None:
    """Return the path of a set: what `name` is, or folder/name, or a file of that name in or one level below folder."""
    pattern = f"{Path(name).name}.*"
    inside = [*sorted(folder.glob(pattern)), *sorted(folder.glob(f"*/{pattern}"))]
    return next((p for p in (Path(name), folder / name, *inside) if p.exists() and (p.is_dir() or layout(p))), None)


def read_set(name: str, folder: Path, limit: int | None = None) -> QuestionSet:
    """Read a set. limit: questions of each subject. Raises ValueError that names the file and row that is wrong."""
    path = find_set(name, folder)
    if path is None:
        cure = "; fetch it with --download" if name in PUBLIC else ""
        there = ", ".join(sorted(path.stem for path in folder.glob("*"))) or "nothing"
        raise ValueError(f"--tasks {name}: neither a file or folder nor a set in {folder}{cure}. There is: {there}")
    split = next((path / split for split in SPLITS if (path / split).is_dir() and _has_answers(path / split)), path)
    files = find_files([split])
    questions = sorted((question for file in files for question in read_questions(file)), key=lambda q: q.subject)
    examples: dict[str, list[Question]] = {}
    for file in find_files([path / "dev"]) if (path / "dev").is_dir() else ():
        for question in read_questions(file):
            examples.setdefault(question.subject, []).append(question)
    by_subject = itertools.groupby(questions, lambda question: question.subject)
    kept = [question for _, group in by_subject for question in itertools.islice(group, limit)]
    if not kept:
        raise ValueError(f"{path} holds no question")
    if len({(isinstance(question.gold, str), (question.record or ("",))[0]) for question in kept}) > 1:
        raise ValueError(
            f"{path}: some rows have options and some have none, or rows are of several kinds; make two sets"
        )
    return QuestionSet(path.stem, kept, examples, files)


def _has_answers(split: Path) -> bool:
    """Tell whether a split can be scored: C-Eval does not publish the answers of its test split."""
    row = next(_rows(find_files([split])[0]), (0, {}))[1]
    return any(name in row for name in ("answer", "gold", "answerkey"))


def read_questions(path: Path) -> Iterator[Question]:
    subject = path.name.split(".")[0]
    for ending in ("dev", *SPLITS):
        subject = subject.removesuffix(f"_{ending}")
    for number, row in _rows(path):
        try:
            yield _question(subject, row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: row {number}: {error}; see scripts/evaluation_sets.py for layouts") from error


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (number from 1, row) with the names of columns in lower case."""
    if layout(path) == "csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = list(csv.reader(file))
        names = [name.strip().lower() for name in table[0]]
        if "question" not in names:
            if len(names) != 6:
                raise ValueError(f"{path}: columns {', '.join(names)}; expected question, A, B, C, D, answer")
            names, table = ["question", "a", "b", "c", "d", "answer"], [[], *table]
        for number, cells in enumerate(table[1:], 1):
            if cells and len(cells) < len(names):
                raise ValueError(f"{path}: row {number} has {len(cells)} columns of {len(names)}")
            if cells:
                yield number, dict(zip(names, cells, strict=False))
        return
    for block in read_blocks(path):
        for number, _, row in rows_of(block):
            if isinstance(row, Dropped):
                raise ValueError(f"{path}: row {number}: {row}")
            yield number, {name.lower(): value for name, value in row.items()}


def _question(subject: str, row: dict) -> Question:
    names = [name for name in ("query", "question", "question_stem", "conversations") if row.get(name)]
    gold = next((row[name] for name in ("gold", "answerkey", "answer") if row.get(name) not in (None, "")), None)
    if "chosen" in row or (gold is None and ("text" in row or names == ["conversations"])):
        return _held_out(subject, row)
    if not names or gold is None:
        raise ValueError(f"a question or its answer is missing among the columns {', '.join(row)}")
    subject = str(row.get("subject") or row.get("category") or subject)
    text, choices, labels = row[names[0]], row.get("choices"), list(LETTERS)
    if isinstance(choices, dict):
        choices, labels = choices["text"], [*map(str, choices["label"])]
        text = f"Question: {text}" if names[0] == "question" else text
    listed = list(choices or [row.get(name) for name in COLUMNS])
    if len(listed) > len(LETTERS):
        raise ValueError(f"{len(listed)} choices are more than there are letters")
    options = {place: str(option).strip() for place, option in enumerate(listed) if option not in (None, "")}
    if not options:
        turns = text if names[0] == "conversations" else [{"role": "user", "content": str(text)}]
        turns = parse_prompt(json.dumps({"conversations": turns, "answer": str(gold)}))["conversations"]
        if turns[-1]["role"] != "user":
            raise ValueError("the last turn is not the user's")
        if not answer_part(str(gold)).strip():
            raise ValueError("the answer is empty")
        return Question(subject, turns, [], str(gold))
    place = gold if isinstance(gold, int) else labels.index(gold.strip()) if gold.strip() in labels else -1
    if place not in options or len(options) < 2:
        raise ValueError(f"the answer {gold!r} is none of {len(options)} options")
    return Question(subject, str(text).strip(), list(options.values()), list(options).index(place))


def _held_out(subject: str, row: dict) -> Question:
    """Return a record of training data. Pairs are sorted by which answer is longer, which a model may go by."""
    kind = "preference" if "chosen" in row else "pretrain" if "text" in row else "conversation"
    record = parse_record(kind, json.dumps(row))
    if kind == "preference":
        chosen, rejected = (sum(len(turn["content"]) for turn in side) for side in record)
        subject = "same length" if chosen == rejected else f"chosen {'longer' if chosen > rejected else 'shorter'}"
    turns = record if kind == "conversation" else []
    first = next((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), 0)
    return Question(subject, turns[:first], [], turns[first]["content"] if turns else "", (kind, record))
