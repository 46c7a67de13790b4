"""Score weights on multiple-choice sets, questions with a known answer and held-out data, and print a table.

    python scripts/evaluate.py --weight full_sft --tasks ceval arc_easy --download
    python scripts/evaluate.py --weight pretrain full_sft full_sft+lora_medical ./MiniMind2 --tasks ceval
    python scripts/evaluate.py --weight MODEL --base_url http://127.0.0.1:8998/v1 --tasks arc_easy
    torchrun --nproc_per_node 2 scripts/evaluate.py --weight full_sft --tasks cmmlu

A weight is a stage or a .pth file, optionally followed by +ADAPTER, or a folder in Hugging Face format; with
--base_url, a name that an OpenAI-compatible server knows. A task is a set in --eval_dir, or the path of a file or
folder; layouts are described in scripts/evaluation_sets.py.

Each question with options is asked in two ways. "letters": the options are listed, and the letter with the highest
probability is the answer. Otherwise the text of each option is scored after the question, by the sum of its
log-probs, or their mean over its tokens or UTF-8 bytes. Questions without options are answered in words.

Held-out training data is read: texts and answers give the loss, by position too, and pairs tell how often the chosen
answer is the more likely one, or gains more than the rejected one against --reference. With --match, conversations are
answered instead: "form" counts the answers with both a thought and an answer in their tags, "name" those that contain
--name if and only if the gold answer does.

Writes OUT_DIR/scores/{weights}.json, and the table as .md next to it:

    weights, source, format ("chat" or "plain"), shots, permutations, date, seconds (null if resumed), versions
    stage, parameters, trained_tokens, tokenizer_sha256                            null if unknown
    settings: {name: what decided the scores of a set}
    tasks: {name: {
        questions, chance, mean_shots, cut (questions that lost their beginning),
        letters, sum, per_token, per_byte: {
            accuracy, stderr, macro (mean over subjects),
            calibrated (accuracy of score minus the score without the question), without_question (of the latter alone)}
        letters also has:
            picked: {letter: share of answers}, explained (share of the right answers that a model would have with these
            shares but no look at the question), permuted (accuracy with the options in other orders), same_option
            (share of questions answered with the same option in every order)
        subjects: {name: {questions, chance, letters, sum, per_token, per_byte: {accuracy, stderr}}}}}
    tasks without options: questions, samples, cut (no room for an answer: wrong), pass@1, stderr, majority,
        subjects: {name: questions, pass@1, stderr, majority}
    texts and answers: questions, tokens, loss (nats per token), bits_per_byte, subjects: {positions: the last three},
        beyond_context (share of the tokens to learn that the context has no room for)
    pairs: questions, sum, per_token, reward (with --reference): {accuracy, stderr}, subjects: {name: the same},
        beyond_context, left_out (pairs without two answers that differ within the context)
All shares are between 0 and 1. calibrated, without_question, permuted and same_option have a ..._stderr each; a
standard error of one question is null. Sets that the same weights were scored on before stay in the file.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model.threads  # isort: skip  # noqa: F401  how torch's threads wait: decided before torch loads
import numpy as np
import openai
import torch
import torch.distributed as dist
import transformers

from dataset.answers import (
    answer_part,
    choice,
    choice_matches,
    core,
    exact_matches,
    is_well_formed,
    number,
    number_matches,
    offered,
)
from dataset.lm_dataset import tokenize_records
from dataset.progress import ProgressBar
from dataset.tokenization import ChatTokenizer
from model.flags import BOOL, add_api_key, at_least, show_defaults
from model.generation import SamplingParams, generate_batch
from model.loading import CONTEXT, READY_FLAGS, add_flags, experts_in, load_ready, ready_flags, tokenizer_folder
from model.model_lora import find_lora
from model.streams import entry_point
from model.weights import find_weights, write_atomically, write_json
from scripts.evaluation_sets import LETTERS, PUBLIC, Question, QuestionSet, download, read_set
from scripts.log_likelihoods import Pair, log_likelihoods, log_likelihoods_of_server
from scripts.openai_client import explain, new_client
from scripts.prepare_overlap import Decontaminate
from scripts.prepare_pipeline import all_blocks, filter_block, in_order
from scripts.report_logs import read_json

UNIT = 64  # questions that are scored together, and lost together when a run is killed
TEXT_WAYS = ("sum", "per_token", "per_byte")
WAYS = ("letters", *TEXT_WAYS)
MATCHES = {"number": number_matches, "exact": exact_matches, "choice": choice_matches}
MATCHES["form"] = lambda answer, gold: is_well_formed(answer)
FIRST_BITS = 8  # losses of the first 2^8 positions are one figure, then a figure for each doubling
MOST_PARTS = 24  # figures of a set's subjects that the table shows; more are only in the .json
HAN = re.compile(r"[\u4e00-\u9fff]")
ONLY_LETTER = ("\nAnswer with the letter alone.", "\n只回答选项的字母。")


class Candidate(NamedTuple):
    """Weights to score. score: (context ids, option ids) pairs -> log-likelihoods. write: prompts -> answers."""

    name: str
    tokenizer: ChatTokenizer
    context_length: int
    chat: bool
    facts: dict[str, Any]
    score: Callable[[list], list[float]]
    write: Callable[[list[list[int]]], list[str]]


# --- what is scored --------------------------------------------------------------------------------------------------


def located(spec: str, args: argparse.Namespace) -> tuple[Path, str, str]:
    """Return the weights that --weight means, the adapter ("": none), and what both are called."""
    base, _, adapter = (spec, "", "") if Path(spec).exists() else spec.partition("+")
    is_folder = Path(base).is_dir()
    path = Path(base) if is_folder else find_weights(base, args.out_dir, args.hidden_size, args.use_moe)
    name, folder = path.absolute().name if is_folder else path.stem, path.absolute().parent
    if not is_folder and folder != Path(args.out_dir).absolute():
        name = f"{folder.name}_{name}"  # runs in folders of their own have weights of one name
    return path, adapter, name + (f"+{Path(adapter).stem}" if adapter else "")


def load_candidate(spec: str, args: argparse.Namespace) -> tuple[Candidate, dict]:
    """Return weights that are ready, and their sidecar."""
    path, adapter, name = located(spec, args)
    ready = load_ready(path, ChatTokenizer, merged_lora=adapter or None, out_dir=args.out_dir, **ready_flags(args))
    sidecar = ready.sidecar
    sizes = ready.model.config
    lora = adapter and str(find_lora(adapter, args.out_dir, sizes.hidden_size, experts_in(sizes) > 0))
    facts = {
        "source": str(path),
        "adapter": lora or None,
        "stage": sidecar.get("stage"),
        "parameters": sum(p.numel() for p in ready.model.parameters()),
        "trained_tokens": sidecar.get("progress", {}).get("tokens"),
        "tokenizer_sha256": ready.tokenizer.sha256,
    }
    params = SamplingParams(
        args.temperature, max_new_tokens=args.max_new_tokens, stop_ids=(ready.tokenizer.eos_id,), seed=args.seed
    )

    def write(prompts: list[list[int]]) -> list[str]:
        answers = generate_batch(ready.model, prompts, params, context_length=ready.context_length)
        return [ready.tokenizer.decode(ids) for ids in answers]

    score = partial(log_likelihoods, ready.model)
    chat = is_chat(path.stem, args)
    return Candidate(name, ready.tokenizer, ready.context_length, chat, facts, score, write), sidecar


def is_chat(name: str, args: argparse.Namespace) -> bool:
    return args.format == "chat" or (args.format == "auto" and not name.startswith("pretrain"))


def reach_candidate(name: str, args: argparse.Namespace) -> tuple[Candidate, dict]:
    """Return a model of the server at --base_url; its tokenizer is the one at --tokenizer_path."""
    client = new_client(openai.OpenAI, args.base_url, api_key=args.api_key)
    tokenizer = ChatTokenizer(tokenizer_folder(Path(name), args.tokenizer_path))

    def write(prompts: list[list[int]]) -> list[str]:
        def answer(ids: list[int], seed: int) -> str:
            room = min(args.max_new_tokens, context_length - len(ids))
            options = dict(model=name, max_tokens=room, temperature=args.temperature, seed=seed)
            return client.completions.create(prompt=ids, **options).choices[0].text

        return [answer(ids, seed) for seed, ids in enumerate(prompts, args.seed)]

    facts = dict.fromkeys(("adapter", "stage", "parameters", "trained_tokens")) | {"source": args.base_url}
    facts["tokenizer_sha256"] = tokenizer.sha256
    score = partial(log_likelihoods_of_server, client, name)
    file_name, context_length = re.sub(r"[^\w.+-]", "_", name), args.max_seq_len or context_of_server(client, name)
    return Candidate(file_name, tokenizer, context_length, is_chat(name, args), facts, score, write), {}


def context_of_server(client: openai.OpenAI, name: str) -> int:
    """Return how many tokens of question and option a server's model reads, one less than its context."""
    client.completions.create(model=name, prompt="1", max_tokens=1)  # our server loads a model with its first request
    with contextlib.suppress(openai.APIStatusError):  # ours and vLLM say it
        about = next((model for model in client.models.list() if model.id == name), None)
        return ((about and about.model_extra or {}).get("max_model_len") or CONTEXT) - 1
    return CONTEXT - 1


def print_overlap(sidecar: dict, sets: list[QuestionSet]) -> None:
    """Say how many rows of the training file that a sidecar names share text with the questions."""
    path = Path(sidecar.get("flags", {}).get("data_path") or "")
    if not path.is_file():
        print(f"overlap with training data: not looked for, {path if path.name else 'its path'} is not known here")
        return
    finder = Decontaminate(tuple(file for each in sets for file in each.files))
    options = argparse.Namespace(encoding="utf-8", workers=None, quiet=False)
    try:
        finder.read_evaluation(options.encoding)
    except ValueError as error:
        print(f"overlap with training data: not looked for, {error}")
        return
    rows = found = 0
    found_rows: list[dict] = []
    for _, report in in_order(filter_block, finder, all_blocks([path], "overlap", options), options):
        rows, found = rows + report.rows_in, found + report.dropped["shares text with an evaluation"]
        found_rows += report.examples.get("shares text with an evaluation", [])
    print(f"overlap with training data: {found:,} of {rows:,} rows of {path} share text with the questions")
    for row in found_rows[:3]:
        print(f"  {row['where']} with {row['detail']}")


# --- asking ----------------------------------------------------------------------------------------------------------


def rotated(question: Question, shift: int) -> list[int]:
    """Return the options, as indices, in the order in which they are listed."""
    count = len(question.options)
    return [(place + shift) % count for place in range(count)]


def wording(question: Question, letters: bool, order: list[int], chat: bool) -> tuple[str, str]:
    """Return the question as it is shown, and the words that call for the answer ("": the option goes on with it)."""
    is_chinese = bool(HAN.search(question.text))
    cue = "答案：" if is_chinese else "Answer:"
    if letters:
        listed = [f"{LETTERS[place]}. {question.options[index]}" for place, index in enumerate(order)]
        return "\n".join([question.text, *listed]) + ONLY_LETTER[is_chinese] * chat, cue
    asks = is_chinese or question.text.startswith("Question:") or question.text.endswith("?")
    return question.text, cue if asks else ""


def context_of(candidate: Candidate, shown: list[tuple[str, str]], answers: list[str]) -> str | list[dict]:
    """Return a plain text, or the turns of a chat. shown: (question, cue) of worked examples, then of what is asked."""
    if candidate.chat:
        turns = [{"role": "user", "content": text or cue or "?"} for text, cue in shown]
        for place, answer in enumerate(answers):
            turns.insert(2 * place + 1, {"role": "assistant", "content": answer})
        return turns
    parts = [text + ("\n" if text and cue else "") + cue for text, cue in shown]
    joints = ["" if cue == "答案：" else " " for _, cue in shown]
    worked = [part + joint + answer for part, joint, answer in zip(parts, joints, answers, strict=False)]
    return "\n\n".join([*worked, parts[-1]])


def encode(candidate: Candidate, context: str | list[dict], options: list[str], cue: str) -> list[Pair]:
    """Return (ids of the context, ids of the option after it) for each option."""
    tokenizer = candidate.tokenizer
    if candidate.chat:
        ids = tokenizer.encode_prompt(context)
        return [(ids, option) for option in tokenizer.encode_contents(options)]
    # as other harnesses do: a plain text is encoded as a whole, then divided after as many ids as the context alone has
    joint = "" if cue == "答案：" else " "
    wholes = [tokenizer.encode_beginning(context + joint + option) for option in options]
    border = len(tokenizer.encode_beginning(context))
    return [(whole[:at], whole[at:]) for whole in wholes for at in [min(border, len(whole) - 1)]]


class Asked(NamedTuple):
    """One question in one form. priors: the same options without the question."""

    pairs: list[Pair]
    priors: list[Pair]
    shots: int
    cut: bool


def ask(candidate: Candidate, question: Question, worked: list[Question], letters: bool, shift: int = 0) -> Asked:
    """Encode a question after as many worked examples as the context has room for."""
    order = rotated(question, shift)
    asked = wording(question, letters, order, candidate.chat)
    options = list(LETTERS[: len(order)]) if letters else question.options
    limit = candidate.context_length
    for shots in range(len(worked), -1, -1):
        examples = worked[:shots]
        shown = [wording(each, letters, rotated(each, 0), candidate.chat) for each in examples]
        answers = [LETTERS[each.gold] if letters else each.options[each.gold] for each in examples]
        pairs = encode(candidate, context_of(candidate, [*shown, asked], answers), options, asked[1])
        cut = max(len(context) + len(option) for context, option in pairs) > limit
        if not cut:
            break
    pairs = [(context[-max(limit - len(option), 1) :], option[: limit - 1]) for context, option in pairs]
    priors = encode(candidate, context_of(candidate, [("", asked[1])], []), options, asked[1])
    return Asked(pairs, priors, shots, cut)


def score_options(
    candidate: Candidate, questions: list[Question], examples: dict, args: argparse.Namespace
) -> list[dict]:
    """Return a record for each question: log-likelihoods of its options in every form, and sizes to divide them by."""
    asked = []
    for question in questions:
        worked = examples.get(question.subject, [])[: args.shots]
        shifts = range(min(args.permutations, len(question.options) - 1) + 1)
        forms = [ask(candidate, question, worked, True, shift) for shift in shifts]
        asked.append([*forms, ask(candidate, question, worked, False)])
    lists = [pairs for forms in asked for pairs in [*(f.pairs for f in forms), forms[0].priors, forms[-1].priors]]
    scores = iter(candidate.score([pair for pairs in lists for pair in pairs]))
    records = []
    for question, forms in zip(questions, asked, strict=True):
        *letters, text, letters_prior, text_prior = (
            [next(scores) for _ in question.options] for _ in range(len(forms) + 2)
        )
        records.append({
            # of each order, by option
            "letters": [[row[n] for n in np.argsort(rotated(question, shift))] for shift, row in enumerate(letters)],
            "letters_prior": letters_prior, "text": text, "text_prior": text_prior,
            "tokens": [len(option) for _, option in forms[-1].pairs],
            "bytes": [len(option.encode()) for option in question.options],
            "shots": forms[0].shots, "cut": any(form.cut for form in forms),
        })  # fmt: skip
    return records


def write_answers(candidate: Candidate, questions: list[Question], args: argparse.Namespace) -> list[dict]:
    """Return a record for each question: its answers and which of them are right."""
    name = args.name.casefold()
    matches = MATCHES | {"name": lambda answer, gold: (name in answer.casefold()) == (name in gold.casefold())}
    prompts = [
        candidate.tokenizer.encode_prompt(q.text)
        if candidate.chat
        else candidate.tokenizer.encode_beginning("\n\n".join(turn["content"] for turn in q.text) + "\n")
        for q in questions
    ]
    fit = [len(ids) < candidate.context_length for ids in prompts]
    asked = [ids for ids, fits in zip(prompts, fit, strict=True) if fits for _ in range(args.samples)]
    answers = iter(candidate.write(asked))
    records = []
    for question, fits in zip(questions, fit, strict=True):
        own = [next(answers) if fits else "" for _ in range(args.samples)]
        match = args.match if args.match != "auto" else kind_of(question.gold)
        right = [fits and matches[match](answer, question.gold) for answer in own]
        votes = [vote(answer, match, question.gold) for answer in own]
        majority = votes.index(Counter(votes).most_common(1)[0][0])
        records.append({"answers": own, "right": right, "majority": right[majority], "cut": not fits})
    return records


def kind_of(gold: str) -> str:
    return "number" if re.fullmatch(r"[-+\d.,/%\s$¥]*\d[\d.,%\s]*", answer_part(gold)) else "exact"


def vote(answer: str, match: str, gold: str) -> str:
    """Return a key that is equal for answers with the same meaning."""
    if match == "choice":
        return str(choice(answer, offered(gold)))
    return str(number(answer)) if match == "number" else core(answer)


def pieces_of(ids: list[int], mask: list[int] | None, limit: int) -> Iterator[tuple[str, Pair]]:
    """Yield (positions, (ids before, learned ids)) of a document, a piece for each learned run within a range."""

    def place(at: int) -> tuple[bool, int]:
        return mask is None or bool(mask[at]), max(at.bit_length(), FIRST_BITS)

    for (learned, bits), run in itertools.groupby(range(1, min(len(ids), limit)), place):
        if learned:
            places = list(run)
            name = f"{1 << bits - 1 if bits > FIRST_BITS else 0}-{1 << bits}"
            yield name, (ids[: places[0]], ids[places[0] : places[-1] + 1])


def read_records(candidate: Candidate, questions: list[Question]) -> list[dict]:
    """Return for each held-out record the [positions, nats, tokens, bytes] of its documents' pieces.

    A pair has two documents, chosen and rejected; all else has one. beyond: learned tokens beyond the context.
    compares: a pair's answers both begin within the context, and differ there.
    """
    tokenizer = candidate.tokenizer
    documents = [tokenize_records(kind, [record], tokenizer) for kind, record in (q.record for q in questions)]
    limit = candidate.context_length
    pieces = [[list(pieces_of(ids, mask, limit)) for ids, mask in each] for each in documents]
    scores = iter(candidate.score([pair for each in pieces for document in each for _, pair in document]))

    def measured(positions: str, learned: list[int]) -> list:
        return [positions, -next(scores), len(learned), sum(len(tokenizer.token_bytes(i)) for i in learned)]

    return [
        {
            "documents": [[measured(name, learned) for name, (_, learned) in document] for document in each],
            "beyond": sum(len(ids[limit:]) if mask is None else sum(mask[limit:]) for ids, mask in whole),
            "compares": all(each) and whole[0][0][:limit] != whole[-1][0][:limit],
        }
        for each, whole in zip(pieces, documents, strict=True)
    ]


# --- running ---------------------------------------------------------------------------------------------------------


def units_of(sets: list[QuestionSet]) -> list[tuple[str, int, int]]:
    """Return (set, first question, end) of each piece of work."""
    starts = [(each, start) for each in sets for start in range(0, len(each.questions), UNIT)]
    return [(each.name, start, min(start + UNIT, len(each.questions))) for each, start in starts]


def settings_of(candidate: Candidate, each: QuestionSet, args: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the scores of a set, as JSON keeps it."""
    names = ("preset", "num_attention_heads", "rope_scaling", "trained_length", "dtype", "shots", "permutations")
    names += ("samples", "match", "name", "temperature", "max_new_tokens", "seed")
    sources = [Path(path) for path in (candidate.facts["source"], candidate.facts["adapter"]) if path]
    return {name: getattr(args, name) for name in names} | {
        "format": "chat" if candidate.chat else "plain",
        "context": candidate.context_length,
        "set": hashlib.sha256(repr((each.questions, each.examples)).encode("utf-8", "replace")).hexdigest()[:12],
        "tokenizer": candidate.facts["tokenizer_sha256"],
        "weights": [candidate.name, *(last_change(path) for path in sources)],
    }


def last_change(path: Path) -> int | str:
    """Return when weights were written, in ns; a server's address itself."""
    return max(file.stat().st_mtime_ns for file in (path, *path.glob("*"))) if path.exists() else str(path)


def run(
    candidate: Candidate, sets: list[QuestionSet], output: Path, key: str, args: argparse.Namespace
) -> dict[str, list[dict]]:
    """Return the records of each set. Work that is done is in files next to the output, one for each process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    by_name = {each.name: each for each in sets}
    if not args.resume and rank == 0:
        remove_parts(output, key)
    wait(world)
    done = read_parts(output, key)
    wait(world)
    waiting = [unit for unit in units_of(sets) if unit not in done][rank::world]
    with (
        open(output.with_name(f"{output.stem}.{key}.{rank}.part"), "a", encoding="utf-8") as part,
        ProgressBar(candidate.name, sum(u[2] - u[1] for u in waiting), "questions", show=rank == 0) as bar,
    ):
        part.write("\n")  # after half a line that a killed run left
        for name, start, end in waiting:
            questions = by_name[name].questions[start:end]
            if questions[0].options:
                records = score_options(candidate, questions, by_name[name].examples, args)
            elif is_read(questions[0], args):
                records = read_records(candidate, questions)
            else:
                records = write_answers(candidate, questions, args)
            part.write(json.dumps({"unit": [name, start, end], "records": records}, ensure_ascii=False) + "\n")
            part.flush()
            bar.update(len(questions))
    wait(world)
    done = read_parts(output, key) if rank == 0 else dict.fromkeys(units_of(sets), [])
    if missing := [unit for unit in units_of(sets) if unit not in done]:
        raise ValueError(
            f"{output.stem}: {len(missing)} parts of the work are gone; did another process score the same? Let one "
            "finish, then run this command with --resume"
        )
    return {name: [r for unit in units_of([each]) for r in done[unit]] for name, each in by_name.items()}


def is_read(question: Question, args: argparse.Namespace) -> bool:
    """Tell whether a question is held-out data to read. Raises ValueError if --match cannot be applied to it."""
    if question.record and args.match != "auto" and question.record[0] != "conversation":
        raise ValueError(
            f"--match {args.match} is for conversations, and a set of --tasks holds {question.record[0]} data"
        )
    return question.record is not None and args.match == "auto"


def wait(world: int) -> None:
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        dist.barrier()


def remove_parts(output: Path, key: str) -> None:
    for part in output.parent.glob(f"{output.stem}.{key}.*.part"):
        part.unlink(missing_ok=True)


def read_parts(output: Path, key: str) -> dict[tuple, list[dict]]:
    done = {}
    for part in output.parent.glob(f"{output.stem}.{key}.*.part"):
        with open(part, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    done[tuple(entry["unit"])] = entry["records"]
    return done


# --- what it means ---------------------------------------------------------------------------------------------------


def standard_error(shares: Sequence[float] | np.ndarray) -> float | None:
    """Return the standard error of a mean of shares between 0 and 1; None of a single one.

    Where all are alike, their spread would say 0. Then two right and two wrong answers are added (Agresti and Coull).
    """
    count = len(shares)
    if count < 2:
        return None
    if min(shares) < max(shares):
        return float(np.std(shares, ddof=1) / math.sqrt(count))
    mean = (float(np.sum(shares)) + 2) / (count + 4)
    return math.sqrt(mean * (1 - mean) / (count + 4))


def accuracy(hits: Sequence[float] | np.ndarray, name: str = "accuracy", error: str = "stderr") -> dict[str, Any]:
    return {name: float(np.mean(hits)), error: standard_error(hits)}


def scores_of(record: dict, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of a question's options, with the question and without it."""
    if way == "letters":
        return np.array(record["letters"][0]), np.array(record["letters_prior"])
    size = np.array({"sum": 1, "per_token": record["tokens"], "per_byte": record["bytes"]}[way])
    return np.array(record["text"]) / size, np.array(record["text_prior"]) / size


def summary(questions: list[Question], records: list[dict], reference: list[dict] | None = None) -> dict:
    """Return the scores of a set, as the module's docstring describes them. reference: records of --reference."""
    golds = np.array([question.gold for question in questions])
    subjects = sorted({question.subject for question in questions})
    members = {s: [n for n, question in enumerate(questions) if question.subject == s] for s in subjects}
    if "documents" in records[0]:
        if questions[0].record[0] != "preference":
            return losses(records)
        members = {s: [n for n in m if records[n]["compares"]] for s, m in members.items()}
        members = {s: m for s, m in members.items() if m}
        rows = sorted(itertools.chain(*members.values()))
        if not rows:
            raise ValueError("no pair has two answers that differ within the context; see --max_seq_len")
        result = preferred(records, rows, reference)
        result |= {"left_out": len(records) - len(rows), "beyond_context": beyond(records)}
        return result | {"subjects": {s: preferred(records, m, reference) for s, m in members.items()}}
    if not questions[0].options:
        samples, cut = len(records[0]["right"]), sum(record["cut"] for record in records)
        result = {"questions": len(questions), "samples": samples, "cut": cut} | passed(records)
        result["subjects"] = {s: {"questions": len(m)} | passed([records[n] for n in m]) for s, m in members.items()}
        return result
    chances = np.array([1 / len(question.options) for question in questions])
    result = {
        "questions": len(questions), "chance": float(chances.mean()),
        "mean_shots": float(np.mean([record["shots"] for record in records])),
        "cut": sum(record["cut"] for record in records),
    }  # fmt: skip
    by_subject = {s: {"questions": len(m), "chance": float(chances[m].mean())} for s, m in members.items()}
    for way in WAYS:
        scores, priors = zip(*(scores_of(record, way) for record in records), strict=True)
        hits = np.array([row.argmax() for row in scores]) == golds
        for subject, where in members.items():
            by_subject[subject][way] = accuracy(hits[where])
        result[way] = accuracy(hits)
        result[way]["macro"] = float(np.mean([by_subject[subject][way]["accuracy"] for subject in subjects]))
        calibrated = [(row - prior).argmax() for row, prior in zip(scores, priors, strict=True)]
        for name, picks in (("calibrated", calibrated), ("without_question", [prior.argmax() for prior in priors])):
            result[way] |= accuracy(np.array(picks) == golds, name, f"{name}_stderr")
    result["letters"] |= letter_bias(records, golds)
    return result | {"subjects": by_subject}


def beyond(records: list[dict]) -> float:
    """Return the share of the tokens to learn that are beyond the context."""
    left = sum(record["beyond"] for record in records)
    read = sum(piece[2] for record in records for document in record["documents"] for piece in document)
    return left / max(left + read, 1)


def losses(records: list[dict]) -> dict:
    """Return the loss and bits per byte of texts and answers, and of each range of positions."""
    pieces = [piece for record in records for piece in record["documents"][0]]

    def rates(pieces: list[list]) -> dict:
        nats, tokens, size = (sum(piece[n] for piece in pieces) for n in (1, 2, 3))
        return {"tokens": tokens, "loss": nats / tokens, "bits_per_byte": nats / math.log(2) / max(size, 1)}

    if not pieces:
        raise ValueError("held-out data without anything to learn in the context; see --max_seq_len")
    ranges = sorted({piece[0] for piece in pieces}, key=lambda name: int(name.split("-")[1]))
    by_range = {name: rates([piece for piece in pieces if piece[0] == name]) for name in ranges}
    return {"questions": len(records), "beyond_context": beyond(records)} | rates(pieces) | {"subjects": by_range}


def preferred(records: list[dict], rows: Sequence[int], reference: list[dict] | None) -> dict:
    """Return how often the chosen answer of a pair scores higher than the rejected one; a tie counts as a miss."""

    def totals(records: list[dict], at: int) -> np.ndarray:
        """Return nats or tokens (pairs, 2)."""
        return np.array([[sum(piece[at] for piece in side) for side in records[n]["documents"]] for n in rows])

    nats = totals(records, 1)
    scores = {"sum": -nats, "per_token": -nats / np.maximum(totals(records, 2), 1)}
    if reference is not None:
        scores = {"reward": totals(reference, 1) - nats} | scores
    return {"questions": len(rows)} | {way: accuracy(score[:, 0] > score[:, 1]) for way, score in scores.items()}


def letter_bias(records: list[dict], golds: np.ndarray) -> dict:
    """Return what the letters alone explain, and what listing the options in other orders changes."""
    orders = [[int(np.argmax(row)) for row in record["letters"]] for record in records]
    picks = np.array([row[0] for row in orders])
    accurate = float((picks == golds).mean())
    blind = sum(float((picks == place).mean() * (golds == place).mean()) for place in set(golds.tolist()))
    result: dict[str, Any] = {
        "picked": {LETTERS[place]: float((picks == place).mean()) for place in sorted(set(picks.tolist()))},
        "explained": min(blind / accurate, 1.0) if accurate else None,
        "permuted": None, "same_option": None,
    }  # fmt: skip
    if len(orders[0]) > 1:
        permuted = [float(np.mean(np.array(row[1:]) == gold)) for row, gold in zip(orders, golds, strict=True)]
        result |= accuracy(permuted, "permuted", "permuted_stderr")
        result |= accuracy([len(set(row)) == 1 for row in orders], "same_option", "same_option_stderr")
    return result


def passed(records: list[dict]) -> dict[str, Any]:
    shares = [float(np.mean(record["right"])) for record in records]
    return accuracy(shares, "pass@1") | {"majority": float(np.mean([record["majority"] for record in records]))}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def with_error(task: dict, name: str, error: str) -> str:
    return percent(task[name]) + (f" ± {percent(task[error])}" if error in task else "")


def figures(task: dict) -> dict[str, tuple[str, str, str]]:
    """Return what the table shows of a set: title -> (questions, chance, figure)."""
    counts = str(task.get("questions", "")), percent(task["chance"]) if "chance" in task else ""
    shown = {}
    if "loss" in task:
        shown = {"loss": f"{task['loss']:.4f}", "bits per byte": f"{task['bits_per_byte']:.4f}"}
    if "pass@1" in task:
        shown["pass@1"] = with_error(task, "pass@1", "stderr")
    if task.get("samples", 1) > 1:
        shown["majority"] = percent(task["majority"])
    for way in ("reward", *WAYS):
        if way in task:
            shown[way] = with_error(task[way], "accuracy", "stderr")
    rows = {title: (*counts, figure) for title, figure in shown.items()}
    for title in ("calibrated", "without_question", "permuted", "same_option", "explained"):
        if "calibrated" in task.get("letters", {}):
            rows[f"letters: {title}"] = "", "", with_error(task["letters"], title, f"{title}_stderr")
    if task.get("beyond_context"):
        rows["beyond the context, %"] = "", "", percent(task["beyond_context"])
    limits = {"left_out": "pairs left out", "cut": "cut to the context", "mean_shots": "worked examples, mean"}
    rows |= {title: ("", "", f"{task[name]:.4g}") for name, title in limits.items() if task.get(name)}
    subjects = {name: figures(entry) for name, entry in task.get("subjects", {}).items()}
    parts = {f"{title}: {name}": found[title] for title in shown for name, found in subjects.items() if title in found}
    return rows | parts if 1 < len(subjects) and len(parts) <= MOST_PARTS else rows


def print_wrong(questions: list[Question], records: list[dict], most: int) -> None:
    """Print questions whose first answer is wrong."""

    def line(text: str, longest: int = 60) -> str:
        text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
        return text if len(text) <= longest else text[:longest] + "…"

    pairs = zip(questions, records, strict=True) if "right" in records[0] else ()
    wrong = [(question, record["answers"][0]) for question, record in pairs if not record["right"][0]]
    if wrong and most:
        print(f"{min(most, len(wrong))} of {len(wrong)} wrong answers:")
    for question, answer in wrong[:most]:
        print(f"  {line(question.text[-1]['content'])}  ->  {line(answer)}   (expected {line(question.gold)})")


def table_of(results: list[dict]) -> str:
    """Return a Markdown table: a line for each task and way of asking, a column for each of the weights."""
    rows = [["task", "questions", "chance", *(result["weights"] for result in results)]]
    for name in results[0]["tasks"]:
        found = [figures(result["tasks"][name]) for result in results]
        titles = dict.fromkeys(title for each in found for title in each)
        for title in titles:
            count = next(each[title][:2] for each in found if title in each)
            rows.append([f"{name}, {title}", *count, *(each[title][2] if title in each else "–" for each in found)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


# --- the command -----------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--weight", nargs="+", default=["full_sft"], help="what to score, several side by side")
    add("--tasks", nargs="+", required=True, help=f"sets in --eval_dir or paths; public: {', '.join(PUBLIC)}")
    add("--eval_dir", type=Path, default=ROOT / "dataset" / "eval", help="folder of the sets")
    add("--download", **BOOL, default=False, help="fetch the public sets of --tasks that are not there yet")
    add("--format", choices=("auto", "chat", "plain"), default="auto", help="auto: chat, but plain for pretrain")
    add("--shots", type=at_least(0), default=5, help="worked examples, as far as the set has them and they fit")
    add("--permutations", type=at_least(0), default=1, help="other orders of the options to ask in")
    add("--samples", type=at_least(1), default=1, help="answers to each question without options")
    add(
        "--match",
        choices=("auto", *MATCHES, "name"),
        default="auto",
        help="how answers in words are judged",
    )
    add("--name", default="MiniMind", help="for --match name")
    add("--examples", type=at_least(0), default=5, dest="wrong_answers", help="wrong answers to print")
    add("--reference", help="weights that training began with, for the reward of pairs")
    add("--temperature", type=float, help="of sampling answers in words (default: 0, with several samples 0.7)")
    add("--max_new_tokens", type=at_least(1), default=256, help="longest answer in tokens")
    add("--seed", type=int, default=0, help="of sampled answers")
    add("--limit", type=at_least(1), help="questions of each subject")
    add("--overlap", **BOOL, default=True, help="look for the questions in the training file that the sidecar names")
    add("--resume", **BOOL, default=False, help="go on where a run with the same settings stopped")
    add("--output", type=Path, help="a .json file, or a folder for several weights (default: OUT_DIR/scores/)")
    add("--base_url", help="score a model of this OpenAI-compatible server; --tokenizer_path names its tokenizer")
    add_api_key(parser, "for --base_url")
    add_flags(parser, "out_dir", "hidden_size", "use_moe", *READY_FLAGS)
    show_defaults(parser)
    args = parser.parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.7 if args.samples > 1 else 0.0
    if args.output and args.output.suffix == ".json" and len({*args.weight, args.reference} - {None}) > 1:
        raise ValueError("--output names one .json file, and there are several weights; name a folder")
    if args.device in ("cuda", "xpu", "npu") and "LOCAL_RANK" in os.environ:
        args.device += f":{os.environ['LOCAL_RANK']}"
    return args


def evaluate(args: argparse.Namespace) -> list[dict]:
    """Score all weights on all sets; return what was written."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    if args.download and is_main:
        for name in args.tasks:
            if name in PUBLIC:
                download(name, args.eval_dir)
    wait(int(os.environ.get("WORLD_SIZE", 1)))
    sets = [read_set(name, args.eval_dir, args.limit) for name in args.tasks]
    if len({each.name for each in sets}) < len(sets):
        raise ValueError(f"--tasks {' '.join(args.tasks)}: two of them have one name; rename a file or folder")
    results, reference = [], None
    reach = reach_candidate if args.base_url else load_candidate
    specs = list(dict.fromkeys([args.reference, *args.weight] if args.reference else args.weight))
    names = Counter(spec if args.base_url else located(spec, args)[2] for spec in specs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"--weight: several are called {twice[0]}; score them one by one")
    compared = len(specs) > 1 and any(is_read(each.questions[0], args) for each in sets)
    if compared and not args.max_seq_len:
        args.max_seq_len = max(reach(spec, args)[0].context_length for spec in args.weight)
    scored = []
    for spec in specs:
        start = time.monotonic()
        candidate, sidecar = reach(spec, args)
        if compared and candidate.context_length != args.max_seq_len:
            raise ValueError(
                f"{spec} reads {candidate.context_length} tokens, the others {args.max_seq_len}, and held-out data is "
                "compared over the same tokens; name a --max_seq_len that all have"
            )
        folder = args.output or Path(args.out_dir) / "scores"
        output = folder if folder.suffix == ".json" else folder / f"{candidate.name}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {each.name: settings_of(candidate, each, args) for each in sets}
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
        scored.append((output, key))
        earlier = read_json(output)
        known = [name for name, made in settings.items() if earlier.get("settings", {}).get(name) == made]
        if args.resume and not args.reference and len(known) == len(sets):
            results.append(earlier | {"tasks": {name: earlier["tasks"][name] for name in known}})
            continue
        if args.overlap and is_main and not args.base_url:
            print_overlap(sidecar, sets)
        records = run(candidate, sets, output, key, args)
        if not is_main:
            continue
        result = {
            "weights": candidate.name, **candidate.facts, "format": "chat" if candidate.chat else "plain",
            "shots": args.shots, "permutations": args.permutations, "date": time.strftime("%Y-%m-%d"),
            "seconds": None if args.resume else round(time.monotonic() - start, 1),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "settings": settings,
            "tasks": {
                each.name: summary(each.questions, records[each.name], reference and reference[each.name])
                for each in sets
            },
        }  # fmt: skip
        if args.reference:
            reference = reference or records
        for each in sets:
            print_wrong(each.questions, records[each.name], args.wrong_answers)
        results.append(result)
        written = with_earlier(result, read_json(output))
        write_json(output, written)
        write_atomically(output.with_suffix(".md"), lambda file, made=written: file.write(table_of([made]).encode()))
        print(f"{candidate.name}: {output}", flush=True)
    for output, key in scored if is_main else ():
        remove_parts(output, key)
    return results if is_main else []


def with_earlier(result: dict, earlier: dict) -> dict:
    """Return a result with the other sets that the same weights were scored on before."""
    weights = next(iter(result["settings"].values()))["weights"]
    kept = [name for name, made in earlier.get("settings", {}).items() if made["weights"] == weights]
    parts = ("settings", "tasks")
    return result | {part: {name: earlier[part][name] for name in kept} | result[part] for part in parts}


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        results = evaluate(args)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on")
    except openai.OpenAIError as error:
        sys.exit(f"error: {explain(error, args.base_url)}")
    if results:
        print(table_of(results), end="")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
