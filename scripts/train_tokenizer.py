"""Train the tokenizer, byte-level BPE of 6,400 ids with the chat template, and report how well it compresses.

    python scripts/train_tokenizer.py                                       dataset/pretrain_hq.jsonl -> out/tokenizer/
    python scripts/train_tokenizer.py --data_path a.jsonl b.jsonl --valid_path c.jsonl
    python scripts/train_tokenizer.py --output_dir model --force            replaces the tokenizer there

Weights belong to a tokenizer: after a change of model/tokenizer.json every stage has to be trained again.

Ids: 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|> (special: left out when decoding), 3 to 10 the tags <think> </think>
<answer> </answer> <tool_call> </tool_call> <tool_response> </tool_response> (plain tokens that are never split), then
the 256 bytes, then what BPE learned. The same data gives the same file, byte for byte.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.chat_template import CHAT_TEMPLATE
from dataset.data_file import data_identity
from dataset.disk import writing_errors
from dataset.lm_dataset import json_object, parse_turns
from dataset.tokenization import CONTROL_TOKENS, ChatTokenizer, StreamDecoder
from model.flags import add_boolean
from model.streams import entry_point
from model.weights import write_atomically

CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")
TAGS += ("<tool_response>", "</tool_response>")
SPLIT_AT = re.compile("|".join(map(re.escape, CONTROLS + TAGS)))
# Words as Qwen2 splits them, a pattern that llama.cpp knows by that name, so that exported models tokenize alike there.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with one mark or space before them
    r"|\p{N}"  # digits one by one
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation, with the newlines after it
    r"|\s*[\r\n]+"  # newlines
    r"|\s+(?!\S)|\s+"  # spaces; the last one before a word goes with the word
)
HELD_OUT_EVERY, HELD_OUT_MOST = 50, 2000  # records kept from training for the report if there is no --valid_path


def texts_of(record: dict) -> list[str]:
    """Return the texts of one record: {"text"}, {"conversations"} or {"chosen", "rejected"}. Raises ValueError."""
    sides = {key: record[key] for key in ("conversations", "chosen", "rejected") if key in record}
    turns = [turn for key, side in sides.items() for turn in parse_turns(side, f'"{key}"', may_be_empty=True)]
    said = [turn.get(key) for turn in turns for key in ("reasoning_content", "content")]
    texts = [record["text"]] if "text" in record else [text for text in said if text]
    if not texts or not isinstance(texts[0], str):
        raise ValueError('expected {"text": …}, {"conversations": [turns]} or {"chosen": [turns], "rejected": [turns]}')
    return list(dict.fromkeys(texts))  # a preference record holds its prompt twice


def read_records(paths: list[Path], share: float = 1.0, skip_bad_lines: bool = False) -> Iterator[list[str]]:
    """Yield the texts of each record of jsonl files, or of an evenly spaced share of the records."""
    number, bad = 0, []
    for path in paths:
        with open(path, "rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                number += 1
                if not line.strip() or int(number * share) == int((number - 1) * share):
                    continue
                try:
                    texts = texts_of(json_object(line.decode("utf-8-sig")))
                    "".join(texts).encode()  # raises for half of a surrogate pair
                except ValueError as error:
                    bad.append(f"{path}:{line_number}: {error}")
                    if not skip_bad_lines:
                        raise ValueError(f"{bad[0]}. Correct it, or drop bad lines with --skip_bad_lines") from error
                    continue
                yield texts
    if bad:
        print(f"note: dropped {len(bad):,} bad line{'s' * (len(bad) > 1)}, the first: {bad[0]}", flush=True)


def train(texts: Iterator[str], vocab_size: int) -> str:
    """Return tokenizer.json with exactly vocab_size ids. Raises ValueError if the texts do not yield so many."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in CONTROLS + TAGS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    # Control strings and tags are single ids already, so their letters are left out.
    tokenizer.train_from_iterator((part for text in texts for part in SPLIT_AT.split(text) if part), trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"the data yields {size} ids; give more data, or --vocab_size {size} instead of {vocab_size}")
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROLS
    # Releases of tokenizers before 0.20 read merges only in this form. No token holds a space.
    state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
    return json.dumps(state, ensure_ascii=False, indent=1) + "\n"


def tokenizer_config() -> str:
    """Return tokenizer_config.json, for transformers and the tools that read its folders."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **CONTROL_TOKENS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    return json.dumps(config, ensure_ascii=False, indent=2) + "\n"


def check_writable(folder: Path) -> None:
    """Raise ValueError if no file can be written there: before training, not after it."""
    missing = not folder.exists()
    with writing_errors(folder, "the tokenizer", "--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    if missing:
        folder.rmdir()


CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
CODE = re.compile(
    r"^\s*(```|#include\b|import \w|from [\w.]+ import\b|def \w+\(|class \w+.*[:{]$|return\b.*[;)\]\w]$|"
    r"(if|for|while)\b.*[:{]$|(let|const|var|public|private|static|int|void)\s+\w+.*[=;({]|"
    r"print\w*\(|console\.|</?\w+[ >])|[;{}]\s*$|=>|\w\(\)|\w\[\w+\]|^\s*\w[\w.]* [-+*]?= \S"
)


def split_by_kind(text: str) -> list[tuple[str, str]]:
    """Return (kind, passage) pairs that join to the text; kind is guessed by line: "Chinese", "code", else "English".

    Lines without letters belong to the passage before them.
    """
    passages = []
    for line in text.splitlines(keepends=True):
        if len(CHINESE.findall(line)) > 0.2 * len("".join(line.split())):
            kind = "Chinese"
        elif CODE.search(line):
            kind = "code"
        else:
            kind = "English" if not passages or re.search("[A-Za-z]", line) else passages[-1][0]
        if passages and passages[-1][0] == kind:
            passages[-1] = (kind, passages[-1][1] + line)
        else:
            passages.append((kind, line))
    return passages


def report_compression(tokenizer: ChatTokenizer, texts: list[str]) -> None:
    """Print bytes per token of held-out text; control strings and tags count neither as bytes nor as tokens."""
    passages = [pair for text in texts for part in SPLIT_AT.split(text) for pair in split_by_kind(part)]
    num_bytes, num_tokens = Counter(), Counter()
    for (kind, passage), ids in zip(passages, tokenizer.encode_contents([p for _, p in passages]), strict=True):
        num_bytes[kind] += len(passage.encode())
        num_tokens[kind] += len(ids)
    print(f"{'held-out text':<14}{'bytes':>12}{'tokens':>12}{'bytes per token':>18}")
    for kind in ("Chinese", "English", "code"):
        if num_tokens[kind]:
            print(f"{kind:<14}{num_bytes[kind]:>12,}{num_tokens[kind]:>12,}{num_bytes[kind] / num_tokens[kind]:>18.3f}")
        else:
            print(f"{kind:<14}{'none':>12}")
    total_bytes, total_tokens = num_bytes.total(), num_tokens.total()
    print(f"{'all':<14}{total_bytes:>12,}{total_tokens:>12,}{total_bytes / max(total_tokens, 1):>18.3f}")


def round_trip_samples() -> list[tuple[str, str]]:
    """Return (name, text) pairs: samples of every Unicode plane, and random bytes as Latin-1 and as broken UTF-8."""
    samples = []
    for plane in range(17):
        points = [*range(plane << 16, (plane + 1) << 16, 7), (plane << 16) + 0xFFFF]
        samples.append((f"plane {plane}", "".join(chr(p) for p in points if not 0xD800 <= p <= 0xDFFF)))
    state, noise = 1, bytearray()
    for _ in range(20_000):  # a fixed sequence (Knuth's 64-bit congruential generator), the same on every machine
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        noise.append(state >> 56)
    samples.append(("bytes as Latin-1", noise.decode("latin-1")))
    samples.append(("broken UTF-8", noise.decode("utf-8", errors="replace")))
    return samples


def check_round_trip(tokenizer: ChatTokenizer) -> None:
    """Check that text survives encode and decode, whole and streamed. Raises ValueError for the first that does not."""
    for name, text in round_trip_samples():
        ids = tokenizer.encode_contents([text])[0]
        stream = StreamDecoder(tokenizer)
        if tokenizer.decode(ids) != text or "".join(map(stream.push, ids)) + stream.flush() != text:
            raise ValueError(f"the tokenizer changes text: {name} does not survive encode and decode")
    print("round trip: all 17 Unicode planes and random bytes come back unchanged, whole and streamed")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data_path",
        type=Path,
        nargs="+",
        default=[ROOT / "dataset/pretrain_hq.jsonl"],
        metavar="JSONL",
        help="pretrain, conversation or preference records, one file or several (default: dataset/pretrain_hq.jsonl)",
    )
    add(
        "--valid_path",
        type=Path,
        metavar="JSONL",
        help=f"records for the report (default: every {HELD_OUT_EVERY}th record, which is then kept from training)",
    )
    add("--vocab_size", type=int, default=6400, help="ids in all (default: %(default)s)")
    add(
        "--max_train_mb",
        type=float,
        default=100.0,
        help="larger data is thinned out evenly to about this many MB; training needs some 60 times their size "
        "in memory (default: %(default)s)",
    )
    add("--output_dir", type=Path, default=ROOT / "out/tokenizer", help="default: out/tokenizer")
    add(
        "--force",
        action="store_true",
        help="replace the tokenizer that --output_dir holds already; weights trained with it depend on it",
    )
    add_boolean(parser, "--skip_bad_lines", False, "drop and count lines that are not valid records")
    args = parser.parse_args(argv)
    mistakes = []
    for path in [*args.data_path, *([args.valid_path] if args.valid_path else [])]:
        try:
            data_identity(path)
        except ValueError as error:
            mistakes.append(str(error))
    smallest = len(CONTROLS + TAGS) + 256
    if not smallest <= args.vocab_size <= 65536:
        mistakes.append(f"--vocab_size {args.vocab_size}: {smallest} ids are fixed, and token files hold up to 65536")
    if args.max_train_mb <= 0:
        mistakes.append(f"--max_train_mb {args.max_train_mb:g} must be positive")
    if (args.output_dir / "tokenizer.json").exists() and not args.force:
        mistakes.append(f"{args.output_dir} holds a tokenizer, on which weights may depend; replace it with --force")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return args


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_writable(args.output_dir)
    size_mb = sum(path.stat().st_size for path in args.data_path) / 1e6
    share = min(1.0, args.max_train_mb / size_mb) if size_mb else 1.0
    held_out = []

    def training_texts() -> Iterator[str]:
        num_records, started = 0, time.time()
        for texts in read_records(args.data_path, share, args.skip_bad_lines):
            num_records += 1
            if num_records % 20_000 == 0:
                print(f"{num_records:,} records read in {time.time() - started:.0f} s", flush=True)
            if not args.valid_path and num_records % HELD_OUT_EVERY == 0 and len(held_out) < HELD_OUT_MOST:
                held_out.append("\n".join(texts))
            else:
                yield from texts
        print(f"{num_records:,} records read in {time.time() - started:.0f} s; counting and merging", flush=True)

    names = ", ".join(path.name for path in args.data_path)
    print(f"training {args.vocab_size:,} ids on {names}: {size_mb:.1f} MB, {share:.0%} of the records", flush=True)
    started = time.time()
    tokenizer_json = train(training_texts(), args.vocab_size)
    for name, content in (("tokenizer.json", tokenizer_json), ("tokenizer_config.json", tokenizer_config())):
        write_atomically(args.output_dir / name, lambda file, content=content: file.write(content.encode()))
    print(f"trained in {time.time() - started:.0f} s, written to {args.output_dir}")

    tokenizer = ChatTokenizer(args.output_dir)
    if args.valid_path:
        held_out = ["\n".join(texts) for texts in read_records([args.valid_path], skip_bad_lines=args.skip_bad_lines)]
    report_compression(tokenizer, held_out)
    check_round_trip(tokenizer)
    print("ids:", ", ".join(f"{token} {tokenizer.encode_documents([token])[0]}" for token in CONTROLS + TAGS))
    print(f"vocabulary {tokenizer.vocab_size:,}, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    main()
