"""Tell whether a stage did what it is for: measure weights on held-out files and print a table.

    python scripts/stage_quality.py identity --weight full_sft --lora_name lora_identity \\
        --train_path dataset/lora_identity.jsonl --data_path SFT.jsonl
    python scripts/stage_quality.py loss --weight full_sft --lora_name lora_medical --data_path HELD_OUT.jsonl
    python scripts/stage_quality.py preferences --weight rlhf --reference full_sft --data_path PAIRS.jsonl
    python scripts/stage_quality.py reasoning --weight reason --data_path HELD_OUT.jsonl

identity     ask who the model is, in wordings that --train_path does not hold, and about other things; count the
             answers that hold the name
loss         loss in nats per answer token, and bits per byte
preferences  how often the chosen answer wins: by the reward beta * (logpi - logref), by the log-prob of either model,
             and by a rule that takes the longer answer; apart by which answer is longer
reasoning    how many answers are <think>…</think><answer>…</answer>, both parts non-empty, and ended

A weight is a stage or a .pth file. With --lora_name the first row measures the weights alone. --json FILE appends the
figures as one line. Log-probs are computed in --dtype, answers in float32.
"""

import argparse
import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.answers import is_well_formed, reasoned_parts
from dataset.lm_dataset import RecordError, parse_record, shared_turns
from dataset.tokenization import ChatTokenizer
from model.generation import SamplingParams, generate_batch
from model.model_lora import find_lora, load_lora
from model.weights import find_weights, load_model
from trainer.arguments import add_boolean, run_script, stage_parser
from trainer.distributed import Process, keep_freed_memory
from trainer.evaluation import evaluate
from trainer.loader import PackedData, model_inputs
from trainer.optimization import Precision
from trainer.token_losses import answer_log_probs, token_cross_entropy

TEMPERATURES = (0.0, 0.7)
# "other" questions that are about the model after all
ABOUT_THE_MODEL = re.compile(r"你是谁|你叫什么|你的名字|介绍.{0,4}你自己|who are you|your name|yourself", re.IGNORECASE)
# columns that are shares of something
SHARES = {"with name", "with name by mistake", "worse by", "well-formed", "empty", "ended"}
SHARES |= {"all", "chosen longer", "chosen shorter", "same length"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = parser.add_subparsers(dest="measure", required=True)

    def measure(name: str, *, lora: bool, prompts: int, max_new_tokens: int, max_seq_len: int) -> Callable:
        add = measures.add_parser(name, allow_abbrev=False).add_argument
        add("--weight", required=True, help="stage or .pth file")
        if lora:
            add("--lora_name", help="adapter on top: a name in OUT_DIR/lora/, or a .pth file")
        add("--data_path", type=Path, required=True, help="held-out jsonl file")
        add("--out_dir", type=Path, default=ROOT / "out", help="folder of the stages' weights (default: out/)")
        add("--hidden_size", type=int, default=512, help="chooses the file of a stage (default: %(default)s)")
        add_boolean(measures.choices[name], "--use_moe", False, "chooses the file of a stage")
        add("--tokenizer_path", type=Path, default=ROOT / "model")
        add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
        add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of log-probs and losses")
        add("--json", type=Path, help="append the numbers to this file as one line of JSON")
        if max_seq_len:
            add("--max_seq_len", type=int, default=max_seq_len, help="as in training (default: %(default)s)")
            add("--cache_dir", type=Path, help="tokenised data (default: OUT_DIR/token_cache)")
            add("--batch_size", type=int, default=8, help="rows or pairs at once (default: %(default)s)")
        if prompts:
            add("--prompts", type=int, default=prompts, help="questions of the file asked (default: %(default)s)")
            add("--max_new_tokens", type=int, default=max_new_tokens, help="longest answer (default: %(default)s)")
            add("--seed", type=int, default=0, help="of the answers at a temperature")
            add("--examples", type=int, default=3, help="answers to print (default: %(default)s)")
        return add

    add = measure("identity", lora=True, prompts=200, max_new_tokens=96, max_seq_len=0)
    add("--name", default="MiniMind", help="the name to count, in any case (default: %(default)s)")
    add("--questions", type=Path, default=Path(__file__).with_name("identity_questions.txt"), help="a wording a line")
    add("--train_path", type=Path, required=True, help="what the adapter was trained on: must hold no wording asked")
    measure("loss", lora=True, prompts=0, max_new_tokens=0, max_seq_len=512)
    add = measure("preferences", lora=False, prompts=50, max_new_tokens=256, max_seq_len=1024)
    add("--reference", required=True, help="stage or .pth file that the training started from")
    add("--beta", type=float, default=0.1, help="of the reward (default: %(default)s)")
    measure("reasoning", lora=True, prompts=200, max_new_tokens=1024, max_seq_len=0)

    args = parser.parse_args(argv)
    mistakes = [
        f"--{flag} {value}: must be {wanted}"
        for flag, low, wanted in (
            ("prompts", 0, "0 or more"), ("max_new_tokens", 1, "at least 1"), ("max_seq_len", 2, "at least 2"),
            ("batch_size", 1, "at least 1"), ("beta", 1e-12, "above 0"), ("examples", 0, "0 or more"),
        )
        if (value := getattr(args, flag, low)) < low
    ]  # fmt: skip
    if mistakes:
        raise ValueError("; ".join(mistakes))
    args = argparse.Namespace(**vars(stage_parser("").parse_args([])) | vars(args))  # PackedData reads some more flags
    args.cache_dir, args.num_workers = args.cache_dir or args.out_dir / "token_cache", 0
    return args


# --- models, questions, answers --------------------------------------------------------------------------------------


def load(name: str, args: argparse.Namespace, tokenizer: ChatTokenizer) -> tuple[torch.nn.Module, Path]:
    """Return (the model in float32 and eval mode, its file)."""
    path = find_weights(name, args.out_dir, args.hidden_size, args.use_moe)
    model, _ = load_model(path, tokenizer.sha256)
    return model.to(args.device).float(), path


def contenders(args: argparse.Namespace, tokenizer: ChatTokenizer) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (title, model): the weights alone, then, if an adapter is named, the same model with it."""
    model, path = load(args.weight, args, tokenizer)
    yield path.stem, model
    if args.lora_name:
        adapter = find_lora(args.lora_name, args.out_dir, model.config.hidden_size, model.config.use_moe)
        yield f"{path.stem} + {adapter.stem}", load_lora(model, adapter)


def read_records(path: Path, kind: str) -> Iterator[tuple]:
    """Yield the records of a file, parsed. Raises ValueError that names the file and the wrong line."""
    if not path.is_file():
        raise ValueError(f"{path} not found; name a jsonl file")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_record(kind, line)
            except RecordError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def first_prompt(turns: list[dict]) -> list[dict]:
    """Return the turns before the first answer of a conversation."""
    return list(itertools.takewhile(lambda turn: turn["role"] != "assistant", turns))


def answers(
    model: torch.nn.Module, tokenizer: ChatTokenizer, prompts: list[list[dict]], args, temperature: float = 0.0
) -> list[list[int]]:
    """Return the ids of the answer to each prompt; those that ended end in eos."""
    stop_ids = (tokenizer.eos_id,)
    params = SamplingParams(temperature, max_new_tokens=args.max_new_tokens, stop_ids=stop_ids, seed=args.seed)
    return generate_batch(model, [tokenizer.encode_prompt(turns) for turns in prompts], params)


def lengths(generated: list[list[int]], tokenizer: ChatTokenizer) -> dict[str, float]:
    """Return the mean tokens of answers without eos, and the share that ended by themselves."""
    ended = [ids[-1] == tokenizer.eos_id for ids in generated]
    sizes = [len(ids) - end for ids, end in zip(generated, ended, strict=True)]
    return {"mean_tokens": fmean(sizes), "empty": sizes.count(0) / len(sizes), "ended": fmean(ended)}


# --- identity --------------------------------------------------------------------------------------------------------


def core(question: str) -> str:
    """Return a wording without case, spaces and punctuation, so that equal wordings compare equal."""
    return re.sub(r"[\W_]", "", question).lower()


def read_questions(path: Path, train_path: Path) -> list[str]:
    """Return the wordings of a file. Raises ValueError if there are none or training data holds one of them."""
    if not path.is_file():
        raise ValueError(f"{path} not found; --questions takes a text file with a wording on each line")
    questions = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no question")
    trained = {
        core(turn["content"])
        for turns in read_records(train_path, "conversation")
        for turn in turns
        if turn["role"] == "user"
    }
    known = [question for question in questions if core(question) in trained]
    if known:
        raise ValueError(
            f"{train_path} holds {len(known)} of the wordings of {path}, so they prove nothing: {known[:5]}"
        )
    return questions


def unrelated_questions(path: Path, name: str, count: int) -> list[str]:
    """Return first questions of a file's conversations, except those about the model or with its name."""
    questions = []
    for turns in read_records(path, "conversation"):
        first = turns[0]["content"] if turns[0]["role"] == "user" else ""
        named = any(name.lower() in turn["content"].lower() for turn in turns)
        if first and not named and not ABOUT_THE_MODEL.search(first):
            questions.append(first)
        if len(questions) == count:
            break
    if not questions:
        raise ValueError(f"{path} has no conversation that a user opens and that is not about the model")
    return questions


def identity(args: argparse.Namespace, tokenizer: ChatTokenizer) -> list[dict]:
    own = read_questions(args.questions, args.train_path)
    other = unrelated_questions(args.data_path, args.name, args.prompts)
    rows = []
    for title, model in contenders(args, tokenizer):
        asked = answers(model, tokenizer, [[{"role": "user", "content": q}] for q in own + other], args)
        texts = [tokenizer.decode(ids) for ids in asked]
        named = [args.name.lower() in text.lower() for text in texts]
        mine, others = named[: len(own)], named[len(own) :]
        rows.append({
            "weights": title, "name": args.name, "asked who": len(own), "with name": fmean(mine),
            "asked otherwise": len(other), "with name by mistake": fmean(others),
        })  # fmt: skip
        wrong = [i for i, has in enumerate(named) if has != (i < len(own))]
        show_examples(f"{title}: wrong", [((own + other)[i], texts[i]) for i in wrong], args.examples)
    return rows


# --- loss ------------------------------------------------------------------------------------------------------------


def loss(args: argparse.Namespace, tokenizer: ChatTokenizer) -> list[dict]:
    process, precision = alone(args), Precision(args.dtype, torch.device(args.device))
    data = PackedData(args, "conversation", tokenizer, process)
    rows = []
    for title, model in contenders(args, tokenizer):
        measured = evaluate(model, data, precision, process, tokenizer)
        worse = measured["valid_loss"] / rows[0]["loss"] - 1 if rows else 0.0
        rows.append({
            "weights": title, "loss": measured["valid_loss"], "bits per byte": measured["bits_per_byte"],
            "answer tokens": data.plan.stats["targets"], "worse by": worse,
        })  # fmt: skip
    return rows


# --- preferences -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def pair_log_probs(model: torch.nn.Module, data: PackedData, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs of all answers of a file, summed over tokens, and token counts; each (pairs, 2)."""
    log_probs = torch.zeros(data.plan.num_rows, 2, dtype=torch.float64)
    counts = torch.zeros(data.plan.num_rows, 2, dtype=torch.float64)
    for batch in data.once():
        with precision.autocast():
            head = functools.partial(token_cross_entropy, labels=batch["labels"])
            sums, tokens = answer_log_probs(model(**model_inputs(batch), head=head).head_output, batch)
        pairs = batch["pair_ids"]
        log_probs[pairs], counts[pairs] = sums.double().cpu(), tokens.double().cpu()
    return log_probs, counts


def answer_lengths(data: PackedData) -> torch.Tensor:
    """Return the tokens of each pair's answers before they were cut to the row, (pairs, 2)."""
    offsets = np.asarray(data.cache.offsets)
    documents = np.searchsorted(offsets, np.asarray(data.plan.segment_start), "right") - 1
    before = np.concatenate(([0], np.cumsum(data.cache.mask, dtype=np.int64)))
    return torch.from_numpy(before[offsets[documents + 1]] - before[offsets[documents]]).view(-1, 2)


def accuracy(scores: torch.Tensor, group: torch.Tensor) -> float | None:
    """Return the share of a group's pairs whose chosen answer scores higher; a tie counts half.

    scores: (pairs, 2). Returns None if the group is empty.
    """
    wins = (scores[:, 0] > scores[:, 1]).double() + 0.5 * (scores[:, 0] == scores[:, 1]).double()
    return float(wins[group].mean()) if group.any() else None


def preference_rows(
    policy: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor, full_lengths: torch.Tensor, beta: float
) -> list[dict]:
    """Return a row for each way to guess which answer of a pair is the chosen one. All arguments are (pairs, 2)."""
    longer = full_lengths[:, 0] > full_lengths[:, 1]
    shorter = full_lengths[:, 0] < full_lengths[:, 1]
    groups = {"all": torch.ones_like(longer), "chosen longer": longer, "chosen shorter": shorter}
    groups["same length"] = ~longer & ~shorter
    ways = {
        "reward (policy against reference)": beta * (policy - reference),
        "reward per token": beta * (policy - reference) / counts,
        "the longer answer": full_lengths.double(),
        "log-prob under the policy": policy,
        "log-prob per token under the policy": policy / counts,
        "log-prob under the reference": reference,
        "log-prob per token under the reference": reference / counts,
    }
    rows = [{"accuracy by": "(pairs)"} | {name: int(group.sum()) for name, group in groups.items()}]
    for way, scores in ways.items():
        rows.append({"accuracy by": way} | {name: accuracy(scores, group) for name, group in groups.items()})
    return rows


def preferences(args: argparse.Namespace, tokenizer: ChatTokenizer) -> list[dict]:
    precision = Precision(args.dtype, torch.device(args.device))
    data = PackedData(args, "preference", tokenizer, alone(args))
    models = {name: load(name, args, tokenizer) for name in dict.fromkeys((args.weight, args.reference))}
    measured = {name: pair_log_probs(model, data, precision) for name, (model, _) in models.items()}
    policy, counts = measured[args.weight]
    reference, _ = measured[args.reference]
    rows = preference_rows(policy, reference, counts, answer_lengths(data), args.beta)
    margin = args.beta * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    drift = ((policy - reference) / counts).mean(dim=0)
    rows.append({
        "reward margin": float(margin.mean()), "dpo loss": float(-torch.nn.functional.logsigmoid(margin).mean()),
        "log(pi / ref) per token, chosen": float(drift[0]), "rejected": float(drift[1]),
    })  # fmt: skip
    pairs = itertools.islice(read_records(args.data_path, "preference"), args.prompts)
    prompts = [chosen[: shared_turns(chosen, rejected)] for chosen, rejected in pairs]
    prompts = [turns for turns in prompts if turns and turns[-1]["role"] == "user"]
    for temperature in TEMPERATURES if prompts else ():
        for name in dict.fromkeys((args.reference, args.weight)):
            model, path = models[name]
            generated = answers(model, tokenizer, prompts, args, temperature)
            rows.append(
                {"answers of": path.stem, "temperature": temperature, "prompts": len(prompts)}
                | lengths(generated, tokenizer)
            )
            shown = [
                (turns[-1]["content"], tokenizer.decode(ids)) for turns, ids in zip(prompts, generated, strict=True)
            ]
            show_examples(f"{path.stem}, temperature {temperature:g}", shown, args.examples)
    return rows


# --- reasoning -------------------------------------------------------------------------------------------------------


def fault_of(text: str, ended: bool) -> str:
    """Return what is wrong with the form of a reasoned answer, "" if nothing is."""
    if not ended:
        return "not ended"
    if reasoned_parts(text) is None:
        return "tags missing or in disorder"
    return "" if is_well_formed(text) else "empty part"


def reasoning(args: argparse.Namespace, tokenizer: ChatTokenizer) -> list[dict]:
    records = itertools.islice(read_records(args.data_path, "conversation"), args.prompts)
    prompts = [turns for turns in map(first_prompt, records) if turns and turns[-1]["role"] == "user"]
    if not prompts:
        raise ValueError(f"{args.data_path} has no conversation that a user opens, or --prompts is 0")
    rows = []
    for title, model in contenders(args, tokenizer):
        for temperature in TEMPERATURES:
            generated = answers(model, tokenizer, prompts, args, temperature)
            texts = [tokenizer.decode(ids) for ids in generated]
            faults = [fault_of(text, ids[-1] == tokenizer.eos_id) for text, ids in zip(texts, generated, strict=True)]
            counts = Counter(faults)
            rows.append(
                {"weights": title, "temperature": temperature, "prompts": len(prompts)}
                | {"well-formed": counts[""] / len(faults)}
                | {fault: counts[fault] for fault in ("not ended", "tags missing or in disorder", "empty part")}
                | lengths(generated, tokenizer)
            )
            wrong = [(prompts[i][-1]["content"], texts[i]) for i, fault in enumerate(faults) if fault]
            show_examples(f"{title}, temperature {temperature:g}: not well-formed", wrong, args.examples)
    return rows


# --- output ----------------------------------------------------------------------------------------------------------


def alone(args: argparse.Namespace) -> Process:
    return Process(rank=0, local_rank=0, world_size=1, device=torch.device(args.device))


def show_examples(title: str, pairs: list[tuple[str, str]], count: int) -> None:
    def line(text: str, longest: int) -> str:
        text = " ".join(text.split())
        return text if len(text) <= longest else text[:longest] + "…"

    if pairs and count:
        print(f"{title}, {min(count, len(pairs))} of {len(pairs)}:")
    for question, answer in pairs[:count]:
        print(f"  {line(question, 60)}  ->  {line(answer, 100)!r}")


def print_rows(rows: list[dict]) -> None:
    """Print a table for each run of rows with the same columns."""
    for columns, table in itertools.groupby(rows, key=tuple):
        cells = [list(columns), *([shown(name, value) for name, value in row.items()] for row in table)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print()
        for first, *others in cells:
            right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            print("  ".join((first.ljust(widths[0]), *right)))


def shown(name: str, value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if name in SHARES else f"{value:.4f}"
    return "-" if value is None else str(value)


MEASURES = {"identity": identity, "loss": loss, "preferences": preferences, "reasoning": reasoning}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    rows = MEASURES[args.measure](args, tokenizer)
    print(f"\n{args.measure}: {args.data_path.name}, torch {torch.__version__}, {args.device}")
    print_rows(rows)
    if args.json:
        flags = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
        record = {"measure": args.measure, "flags": flags, "torch": torch.__version__, "rows": rows}
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
