"""Measure how well a model reads beyond the length it was trained on, with and without YaRN.

    python scripts/context_length.py --weight out/pretrain_512.pth --data_path LONG.jsonl
    python scripts/context_length.py --weight pretrain --data_path LONG.jsonl --length 4096 --factors 1,2,4,8

Prints perplexity and bits per byte of the text by position in the row, a column per YaRN factor (1: off). Records are
{"text": …}. Documents of at least --length tokens fill a row each. Shorter ones are joined, so a later position follows
unrelated text. --json FILE appends the figures as one line.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.tokenization import ChatTokenizer
from model.loading import stretch_context, trained_length
from model.streams import set_up_streams
from model.weights import find_weights, load_model


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weight", default="pretrain", help="a stage, whose weights are in --out_dir, or a .pth file (pretrain)")
    add("--out_dir", default=str(ROOT / "out"))
    add("--hidden_size", type=int, default=512, help="chooses between the weights of a stage (512)")
    add("--use_moe", action="store_true", help="chooses between the weights of a stage")
    add("--tokenizer_path", default=str(ROOT / "model"))
    add("--data_path", required=True, help="jsonl of held-out documents, the longer the better")
    add("--trained_length", type=int, default=None, help="in tokens (what the sidecar says)")
    add("--length", type=int, default=None, help="of a row in tokens (four times the trained length)")
    add("--factors", default="1,2,4", help="YaRN factors to compare, 1 for none (1,2,4)")
    add("--rows", type=int, default=32, help="rows to measure (32)")
    add("--json", default=None, help="file to append the figures to")
    args = parser.parse_args(argv)
    args.factors = [float(factor) for factor in args.factors.split(",")]
    return args


def read_documents(path: str, tokenizer: ChatTokenizer) -> Iterator[list[int]]:
    """Yield the ids of each record's text between bos and eos."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}:{number}: not a record {{"text": …}} ({error})') from error
            yield [tokenizer.bos_id, *tokenizer.encode_documents([text])[0], tokenizer.eos_id]


def fill_rows(documents: Iterator[list[int]], length: int, count: int) -> tuple[list[list[int]], int]:
    """Return (rows of `length` ids, how many of them are the beginning of one long document)."""
    single, joined, rest = [], [], []
    for ids in documents:
        if len(ids) >= length:
            single.append(ids[:length])
        elif len(joined) < count:
            rest += ids
            if len(rest) >= length:
                joined.append(rest[:length])
                rest = []
        if len(single) == count:
            break
    return (single + joined)[:count], len(single)


@torch.inference_mode()
def losses(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Return nats (rows, length - 1) of each token given all before it in the row."""
    result = []
    for row in rows:
        ids = torch.tensor([row])
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[0]
        parts = zip(hidden.split(1024), ids[0, 1:].split(1024), strict=True)  # logits of a long row are large
        nats = [torch.nn.functional.cross_entropy(model.lm_head(h).float(), t, reduction="none") for h, t in parts]
        result.append(torch.cat(nats))
    return torch.stack(result)


def position_ranges(trained: int, length: int) -> list[tuple[int, int]]:
    """Return ranges of positions: halves of the trained length, then doublings up to the length."""
    borders = {0, trained // 2, length}
    while trained < length:
        borders.add(trained)
        trained *= 2
    return list(itertools.pairwise(sorted(border for border in borders if border <= length)))


def main(argv: list[str] | None = None) -> None:
    set_up_streams()
    args = parse_args(argv)
    tokenizer = ChatTokenizer(args.tokenizer_path)
    path = find_weights(args.weight, args.out_dir, args.hidden_size, args.use_moe)
    _, sidecar = load_model(path, tokenizer.sha256)
    trained = trained_length(sidecar, args.trained_length)
    length = args.length or 4 * trained
    rows, single = fill_rows(read_documents(args.data_path, tokenizer), length, args.rows)
    if not rows:
        raise ValueError(f"{args.data_path} holds fewer than {length} tokens; set --length")
    print(
        f"{path}, trained on {trained} tokens; {len(rows)} rows of {length} tokens, {single} of them one document each,"
    )
    print(f"{len(rows) - single} joined from short ones. Perplexity, and bits per byte of text, by position:")
    size = torch.tensor([[len(tokenizer.token_bytes(number)) for number in row[1:]] for row in rows])
    ranges = position_ranges(trained, length)
    table = {}  # (factor, range) -> (perplexity, bits per byte)
    for factor in args.factors:
        model, _ = load_model(path)
        model.float()
        if factor != 1:
            stretch_context(model, factor, trained)
        nats = losses(model, rows)
        for start, end in ranges:
            part = nats[:, max(start - 1, 0) : end - 1]  # column i holds the loss of position i + 1
            octets = size[:, max(start - 1, 0) : end - 1].sum().item()
            table[factor, start] = math.exp(part.mean()), part.sum().item() / math.log(2) / octets
    heads = ["no YaRN" if factor == 1 else f"YaRN x{factor:g}" for factor in args.factors]
    print(f"{'position':>13}" + "".join(f"{head:>20}" for head in heads))
    for start, end in ranges:
        cells = "".join("{:>12.2f} {:>7.4f}".format(*table[factor, start]) for factor in args.factors)
        print(f"{f'{start}-{end}':>13}" + cells)
    if args.json:
        figures = {f"{factor:g}": {str(start): table[factor, start] for start, _ in ranges} for factor in args.factors}
        line = {"weight": str(path), "trained": trained, "length": length, "rows": len(rows), "single": single}
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "perplexity and bits per byte by factor and position": figures}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
