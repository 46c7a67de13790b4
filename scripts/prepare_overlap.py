"""Rows that repeat earlier ones, exactly or nearly (dedup), and rows that share text with evaluations (decontaminate).

Near duplicates are found by MinHash (Broder 1997) with banding: 120 minima of hashed 5-character runs, 20 keys of six
minima each. Two rows with a key in common are compared by all their minima, whose share of equal ones estimates the
Jaccard similarity. Keys and minima lie in scratch files, so memory does not grow with the data.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scripts.prepare_pipeline import Dropped, Step, all_blocks, flag, in_order, new_output, rows_of
from scripts.prepare_rules import HAN, WEIGHTS, character_classes, code_points, rolling_hashes, strings_in
from scripts.prepare_sources import Block, find_files, read_blocks

SHINGLE = 5  # characters
BANDS, BAND_ROWS = 20, 6
MINIMA = BANDS * BAND_ROWS
SLICE_ROWS = 500_000  # rows whose keys are sorted together: bounds memory
CHUNK = 4096  # rows whose minima are compared together
ROUNDS = 20  # rows of one key that the others are compared with
MULTIPLIERS = np.random.default_rng(1).integers(0, 1 << 32, (2, MINIMA), np.uint32) | np.uint32(1)
KEY_WEIGHTS = np.random.default_rng(2).integers(0, 1 << 63, BAND_ROWS, np.uint64) | np.uint64(1)
NOT_ALNUM = re.compile(r"[\W_]+")
# what ends or divides sentences; in front of a digit, a Latin letter or "=" it may be part of a number or of code
SENTENCE_MARK = re.compile(r"(?<!\d)!(?![\w=])|[.,:;?'\"。、“”‘’](?![\w=])", re.ASCII)
NEEDLESS_SPACE = re.compile(r"(?<!\w) | (?!\w)", re.ASCII)


def strings_of(value: object) -> Iterator[str]:
    """Return all texts in a row, at any depth, except roles."""
    return (holder[key] for holder, key in strings_in([value], but=("role", "from")))


def normal(text: str) -> str:
    """Return only letters and digits, in one width and case: texts that are equal then count as equal."""
    return NOT_ALNUM.sub("", unicodedata.normalize("NFKC", text).casefold())


def exact(texts: Iterable[str]) -> str:
    """Return the texts without what does not count in an exact repeat: width, case, spaces, marks of sentences."""
    marked = SENTENCE_MARK.sub(" ", unicodedata.normalize("NFKC", "\0".join(texts)).casefold())
    return NEEDLESS_SPACE.sub("", " ".join(marked.split()))


def minima_of(text: str) -> np.ndarray | None:
    """Return the MinHash of a normal text, (MINIMA,) uint32; None if it is shorter than a shingle."""
    runs = rolling_hashes(code_points(text), SHINGLE).astype(np.uint64)
    if not len(runs):
        return None
    runs = ((runs * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)).astype(np.uint32)
    parts = [runs[n : n + 4096, None] * MULTIPLIERS[0] + MULTIPLIERS[1] for n in range(0, len(runs), 4096)]
    return np.min([part.min(axis=0) for part in parts], axis=0)


def sign_block(near: float, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows,) keys of equal texts, (BANDS, rows) keys of near ones, (rows, MINIMA) low bytes; key 0: none."""
    rows = [[] if isinstance(row, Dropped) else list(strings_of(row)) for _, _, row in rows_of(block)]
    keys = np.array([hash_of(exact(texts)) if any(map(str.strip, texts)) else 0 for texts in rows], np.uint64)
    texts = [normal("".join(texts)) for texts in rows]
    minima = [minima_of(text) if text and near else None for text in texts]
    table = np.array([np.zeros(MINIMA, np.uint32) if row is None else row for row in minima]).reshape(-1, MINIMA)
    bands = (table.reshape(-1, BANDS, BAND_ROWS) * KEY_WEIGHTS).sum(axis=2)
    return keys, np.ascontiguousarray(bands.T), table.astype(np.uint8)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass
class Dedup(Step):
    """Leave out rows that repeat an earlier row, exactly or nearly; held-out files count as earlier."""

    near: float = flag(
        0.8, "similarity (Jaccard) from which rows are near duplicates, 0: exact ones only (default: 0.8)"
    )
    held_out: tuple = flag((), "files whose rows must not be in the output", type=Path)

    def run(self, args) -> None:
        inputs, held_out = find_files(args.inputs), find_files(self.held_out)
        with new_output(args.output, args, [*inputs, *held_out]) as (file, scratch):
            counts = self._sign(held_out, scratch, args), self._sign(inputs, scratch, args)
            if not (total := sum(map(sum, counts))):
                raise ValueError(f"{', '.join(map(str, inputs))}: nothing but blank lines")
            repeats = np.memmap(scratch / "repeats", np.int64, "w+", shape=total)  # the row that it repeats, plus one
            near = np.memmap(scratch / "near", np.bool_, "w+", shape=total)
            for name in ["exact", *(f"band{band}" for band in range(BANDS if self.near else 0))]:
                for leaders, rows in self._alike(scratch, name, repeats):
                    new = repeats[rows] == 0
                    repeats[rows[new]], near[rows[new]] = leaders[new] + 1, name != "exact"
            self.write(file, _judged(inputs, *counts, repeats, near, args), inputs, args)

    def _sign(self, paths: list[Path], scratch: Path, args) -> list[int]:
        """Append keys and minima of all rows to scratch files; return the rows of each block."""
        counts = []
        with ExitStack() as stack:
            names = ["exact", *(f"band{band}" for band in range(BANDS)), "minima"]
            files = [stack.enter_context(open(scratch / name, "ab")) for name in names]
            for exact, bands, minima in in_order(
                sign_block, self.near, all_blocks(paths, "dedup: reading", args), args
            ):
                counts.append(len(exact))
                for file, array in zip(files, [exact, *bands, minima], strict=True):
                    file.write(array.tobytes())
        return counts

    def _alike(self, scratch: Path, name: str, repeats: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (earlier rows, rows that repeat them) among those not left out yet, a part of the keys at a time."""
        all_keys = np.memmap(scratch / name, np.uint64, "r")
        minima = np.memmap(scratch / "minima", np.uint8, "r").reshape(-1, MINIMA)
        parts = len(all_keys) // SLICE_ROWS + 1
        for part in range(parts):
            rows = []
            for start in range(0, len(all_keys), SLICE_ROWS):
                keys = all_keys[start : start + SLICE_ROWS]
                chosen = (keys % parts == part) & (keys != 0) & (repeats[start : start + SLICE_ROWS] == 0)
                rows.append(np.flatnonzero(chosen) + start)
            rows = np.concatenate(rows)
            order = np.argsort(all_keys[rows], kind="stable")
            rows, keys = rows[order], all_keys[rows[order]]
            for _ in range(ROUNDS):
                if len(rows) < 2:
                    break
                first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
                leaders = np.repeat(rows[first], np.diff([*first, len(keys)]))
                others = np.flatnonzero(leaders != rows)
                alike = np.ones(len(others), bool)
                for n in range(0, len(others) if name != "exact" else 0, CHUNK):
                    at = others[n : n + CHUNK]
                    equal = (minima[leaders[at]] == minima[rows[at]]).mean(axis=1)
                    alike[n : n + CHUNK] = (equal - 1 / 256) / (1 - 1 / 256) >= self.near  # chance: once in 256
                yield leaders[others[alike]], rows[others[alike]]
                keys, rows = keys[others[~alike]], rows[others[~alike]]


def _judged(
    inputs: list[Path], held_out: list[int], counts: list[int], repeats: np.ndarray, near: np.ndarray, args
) -> Iterator[Block]:
    """Yield the blocks of the inputs, with a verdict for each row."""
    start = sum(held_out)
    for block, count in zip(all_blocks(inputs, "dedup: writing", args), counts, strict=True):
        found = zip(repeats[start : start + count].tolist(), near[start : start + count].tolist(), strict=True)
        reasons = ("exact duplicate", "near duplicate")
        verdicts = [(reasons[is_near], f"of row {twin:,} of all files") if twin else None for twin, is_near in found]
        yield block._replace(verdicts=verdicts)
        start += count


@dataclass
class Decontaminate(Step):
    """Leave out rows that share a run of text with evaluation files, or list them."""

    evaluation: tuple = flag(
        (), "evaluation files or folders, in any layout that evaluate.py reads", type=Path, required=True
    )
    characters: int = flag(24, "a shared run of as many letters, part of them Chinese (default: %(default)s)")
    words: int = flag(13, "or of as many words (default: %(default)s)")
    list_only: bool = flag(False, "write the rows that overlap, and with what, instead of the others")
    known: np.ndarray | None = None  # (runs,) hashes, sorted
    known_items: np.ndarray | None = None  # (runs,) the evaluation row that each is from
    items: list = field(default_factory=list)

    def run(self, args) -> None:
        for name in ("characters", "words"):
            if not 1 <= getattr(self, name) <= len(WEIGHTS):
                raise ValueError(f"--{name} {getattr(self, name)}: from 1 to {len(WEIGHTS)}")
        self.read_evaluation(args.encoding)
        super().run(args)

    def read_evaluation(self, encoding: str) -> None:
        known = [(np.empty(0), np.empty(0, int))]
        for path in find_files(self.evaluation):
            for number, _, row in (found for block in read_blocks(path, encoding) for found in rows_of(block)):
                runs = [hashes for text in strings_of(row) for hashes, _ in self.runs_of(text)]
                runs = np.concatenate([np.empty(0), *runs])
                known.append((runs[runs != 0], np.full(np.count_nonzero(runs), len(self.items))))
                self.items.append(f"{path}:{number}")
        short = sum(not len(runs) for runs, _ in known[1:])
        hashes, items = (np.concatenate(arrays) for arrays in zip(*known, strict=True))
        self.known, first = np.unique(hashes, return_index=True)
        self.known_items = items[first]
        if not len(hashes):
            raise ValueError(
                f"no text in --evaluation is as long as --characters {self.characters} or --words {self.words}"
            )
        print(f"{len(self.items):,} evaluation rows; {short:,} are too short to be found")

    def runs_of(self, text: str) -> Iterator[tuple[np.ndarray, list[str] | str]]:
        """Return (hashes, what they are runs of): characters of a Chinese text, words of any text."""
        letters = normal(text)
        codes = code_points(letters)
        hashes = rolling_hashes(codes, self.characters)
        if len(hashes):
            is_han = character_classes()[codes] == HAN
            han = np.convolve(is_han, np.ones(self.characters, int), "valid")
            hashes = np.where(4 * han >= self.characters, hashes, 0)
        yield hashes, letters
        words = unicodedata.normalize("NFKC", text).casefold().split()
        words = [word for word in (NOT_ALNUM.sub("", word) for word in words) if word]
        numbers = (
            np.array([hash_of(word) & 0x3FFFF for word in words], np.uint32) if len(words) >= self.words else codes[:0]
        )
        yield -rolling_hashes(numbers, self.words), words

    def __call__(self, row: dict, changes: list[str]) -> list[dict] | None:
        for text in strings_of(row):
            for (hashes, parts), size in zip(self.runs_of(text), (self.characters, self.words), strict=True):
                at = np.searchsorted(self.known, hashes).clip(max=len(self.known) - 1)
                hits = np.flatnonzero((self.known[at] == hashes) & (hashes != 0))
                if len(hits):
                    shared = parts[hits[0] : hits[0] + size]
                    shared = shared if isinstance(shared, str) else " ".join(shared)
                    source = self.items[self.known_items[at[hits[0]]]]
                    if self.list_only:
                        return [{"shared": shared, "with": source, "row": row}]
                    raise Dropped("shares text with an evaluation", f"{source}: {shared}")
        if self.list_only:
            raise Dropped("no overlap")
        return None
