"""Pack documents into rows of equal length, and rows into batches that are the same at any number of ranks.

A document of n ids takes n - 1 positions: inputs ids[:-1], labels ids[1:], -100 where the mask of the label is 0.
A plan says which documents share a row. It depends only on the cache and max_seq_len, and is kept next to the tokens.
The order of the rows depends on (seed, epoch) alone. The n-th global batch, that of one optimizer step, is the n-th run
of batch_size * accumulation_steps * world_size rows in that order, however these are split.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.disk import open_or_build, write_array
from dataset.progress import ProgressBar
from dataset.token_cache import TokenCache

PLAN_VERSION = 2
SCAN_TOKENS = 4 << 20  # scanned at once while planning, so memory does not grow with the data
WINDOW_SEGMENTS = 64 << 10  # packed together; a larger window fills rows better and costs memory
PLAN_ARRAYS = {"segment_start": np.int64, "segment_length": np.int32, "row_start": np.int64, "row_targets": np.int32}


class PackingPlan:
    """An opened plan; pickles as its folder.

    A segment is a piece of one document: positions [start, start + length) of the cache's tokens are inputs, the same
    moved by one are labels. Row r holds segments row_start[r] to row_start[r + 1]. For preferences a row is one pair,
    its two segments chosen and rejected, which are laid out in rows of positions only when a batch is made.

    segment_start int64 (segments,), segment_length int32 (segments,) in positions, row_start int64 (num_rows + 1,),
    row_targets int32 (num_rows,): memory maps. fill: share of positions used (preferences: of the rows that a pair
    alone would take). stats: documents, segments, truncated (turns dropped at the end), cut (an answer cut short),
    split (documents longer than a row), skipped (no target), identical (pairs that are alike once cut), positions,
    targets.
    """

    segment_start: np.ndarray
    segment_length: np.ndarray
    row_start: np.ndarray
    row_targets: np.ndarray

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        meta = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        self.max_seq_len, self.num_rows, self.fill = meta["max_seq_len"], meta["num_rows"], meta["fill"]
        self.max_segments_per_row, self.stats = meta["max_segments_per_row"], meta["stats"]
        segments = self.stats["segments"]
        counts = (segments, segments, self.num_rows + 1, self.num_rows)
        for (name, dtype), count in zip(PLAN_ARRAYS.items(), counts, strict=True):
            setattr(self, name, np.memmap(self.folder / f"{name}.bin", dtype, mode="r", shape=(count,)))

    def __reduce__(self):
        return PackingPlan, (self.folder,)


def build_plan(cache: TokenCache, max_seq_len: int, show_progress: bool = True) -> PackingPlan:
    """Return the plan for rows of max_seq_len positions; build it first if the cache's folder does not hold it yet.

    Raises ValueError if no document has a target within max_seq_len, or the plan cannot be written.
    """
    if max_seq_len < 1:
        raise ValueError(f"--max_seq_len must be at least 1, not {max_seq_len}")
    return open_or_build(
        cache.folder / f"plan_{max_seq_len}_v{PLAN_VERSION}",
        PackingPlan,
        lambda unfinished: _write_plan(unfinished, cache, max_seq_len, show_progress),
        f"the packing plan of {cache.folder.name}",
        show_progress,
    )


def _write_plan(folder: Path, cache: TokenCache, max_seq_len: int, show_progress: bool) -> None:
    counted = ("documents", "segments", "truncated", "cut", "split", "skipped", "identical", "positions", "targets")
    stats = dict.fromkeys(counted, 0)
    num_rows = max_segments = lone_rows = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in PLAN_ARRAYS}
        bar = stack.enter_context(ProgressBar("packing", cache.meta["tokens"], "tokens", show=show_progress))
        for start, length, targets in _windows(cache, max_seq_len, stats, bar):
            if cache.kind == "preference":
                row, order = np.arange(len(start)) // 2, slice(None)
                lone_rows += int((1 + (length.reshape(-1, 2).sum(1) > max_seq_len)).sum())
            else:
                row = assign_rows(length, max_seq_len)
                order = np.argsort(row, kind="stable")
            counts = np.bincount(row)
            first = np.cumsum(counts) - counts
            arrays = {
                "row_start": stats["segments"] + first,
                "segment_start": start[order],
                "segment_length": length[order],
                "row_targets": np.add.reduceat(targets[order], first),
            }
            for name, array in arrays.items():
                write_array(files[name], array.astype(PLAN_ARRAYS[name]))
            stats["segments"] += len(start)
            stats["positions"] += int(length.sum())
            stats["targets"] += int(targets.sum())
            num_rows += len(counts)
            max_segments = max(max_segments, int(counts.max()))
        write_array(files["row_start"], np.array([stats["segments"]], np.int64))
    if not num_rows:
        raise ValueError(
            f"none of the {stats['documents']:,} documents of {cache.meta['data_path']} has a token to learn within "
            f"--max_seq_len {max_seq_len}; make it larger"
        )
    meta = {"max_seq_len": max_seq_len, "num_rows": num_rows, "max_segments_per_row": max_segments, "stats": stats}
    meta["fill"] = stats["positions"] / ((lone_rows or num_rows) * max_seq_len)
    (folder / "plan.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _windows(cache: TokenCache, max_seq_len: int, stats: dict, bar: ProgressBar) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the segments of all documents as (start, length, targets), about WINDOW_SEGMENTS at a time; fill stats."""
    find_segments = {"pretrain": _pieces, "conversation": _conversations, "preference": _pairs}[cache.kind]
    waiting, count, total = [], 0, len(cache.offsets) - 1
    for first, last in _document_ranges(cache.offsets, 2 if cache.kind == "preference" else 1):
        waiting.append(find_segments(cache, first, last, max_seq_len, stats))
        count += len(waiting[-1][0])
        stats["documents"] += last - first
        bar.update(int(cache.offsets[last] - cache.offsets[first]))
        if count >= WINDOW_SEGMENTS or (count and last == total):
            yield tuple(map(np.concatenate, zip(*waiting, strict=True)))
            waiting, count = [], 0


def _document_ranges(offsets: np.ndarray, group: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of runs of about SCAN_TOKENS tokens; every `group` documents stay together."""
    first, count = 0, len(offsets) - 1
    while first < count:
        last = int(np.searchsorted(offsets, offsets[first] + SCAN_TOKENS, "right")) - 1
        last = min(max(last - last % group, first + group), count)
        yield first, last
        first = last


# Each of the next three functions returns the segments of documents [first, last) as int64 arrays (start, length,
# targets) and adds to stats what it left out.


def _pieces(cache: TokenCache, first: int, last: int, max_seq_len: int, stats: dict) -> tuple[np.ndarray, ...]:
    """Pretrain: pieces of max_seq_len positions. The label of a piece's last input is the next piece's first input."""
    offsets = np.asarray(cache.offsets[first : last + 1])
    positions = np.diff(offsets) - 1
    pieces = -(-positions // max_seq_len)
    stats["skipped"] += int((positions < 1).sum())
    stats["split"] += int((pieces > 1).sum())
    document = np.repeat(np.arange(last - first), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, … within its document
    start = offsets[document] + number * max_seq_len
    length = np.minimum(positions[document] - number * max_seq_len, max_seq_len)
    return start, length, length


def _conversations(cache: TokenCache, first: int, last: int, max_seq_len: int, stats: dict) -> tuple[np.ndarray, ...]:
    """Conversations: whole, or up to the end of the last answer that fits, or with the first answer cut short."""
    offsets, mask, size, fits = _read_masks(cache, first, last, max_seq_len)
    start = offsets[:-1]
    answer_ends = np.flatnonzero(mask[:-1] > mask[1:])  # the eos of each answer; the "\n" after it is not a target
    # The last answer that ends before this row would be full. It may belong to an earlier document; index -1 (there is
    # none at all) picks the -1 that is appended.
    index = np.searchsorted(answer_ends, start + max_seq_len, "right") - 1
    end = np.append(answer_ends, -1)[index]
    whole_answer = end >= start
    # Keep the "\n" after eos if there is room. Dropping it loses nothing that is learned.
    kept = np.where(whole_answer, np.minimum(end + 2 - start, max_seq_len + 1), max_seq_len + 1)
    kept = np.where(fits, size, kept)
    has_target, targets = _count_targets(mask, start, kept)
    complete = fits | (whole_answer & (offsets[1:] - end <= 2))  # at most the "\n" after the last eos is missing
    stats["truncated"] += int((~complete & whole_answer).sum())
    stats["cut"] += int((~complete & ~whole_answer & has_target).sum())
    stats["skipped"] += int((~has_target).sum())
    return (cache.offsets[first] + start)[has_target], (kept - 1)[has_target], targets[has_target]


def _pairs(cache: TokenCache, first: int, last: int, max_seq_len: int, stats: dict) -> tuple[np.ndarray, ...]:
    """Preferences: answers are cut at the end of the row. Keep a pair if both sides still have a target and differ."""
    offsets, mask, size, fits = _read_masks(cache, first, last, max_seq_len)
    start = offsets[:-1]
    kept = np.where(fits, size, max_seq_len + 1)
    has_target, targets = _count_targets(mask, start, kept)
    tokens = cache.tokens[cache.offsets[first] : cache.offsets[last]]
    learns = has_target.reshape(-1, 2).all(1)
    differs: np.ndarray = learns.copy()
    for pair in np.flatnonzero(learns & ~fits.reshape(-1, 2).all(1)):  # the difference may have been in what was cut
        chosen, rejected = (tokens[start[n] : start[n] + kept[n]] for n in (2 * pair, 2 * pair + 1))
        differs[pair] = not np.array_equal(chosen, rejected)
    stats["identical"] += int((learns & ~differs).sum())
    pair_kept = np.repeat(differs, 2)
    stats["cut"] += int((pair_kept & (_count_targets(mask, start, size)[1] > targets)).sum())
    stats["skipped"] += int((~learns).sum())
    return (cache.offsets[first] + start)[pair_kept], (kept - 1)[pair_kept], targets[pair_kept]


def _read_masks(cache: TokenCache, first: int, last: int, max_seq_len: int) -> tuple[np.ndarray, ...]:
    """Return borders, mask and sizes of documents [first, last), and which fit a row; borders count from 0."""
    offsets = np.asarray(cache.offsets[first : last + 1])
    mask = np.asarray(cache.mask[offsets[0] : offsets[-1]])
    size = np.diff(offsets)
    return offsets - offsets[0], mask, size, size <= max_seq_len + 1


def _count_targets(mask: np.ndarray, start: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (whether any, how many) of each document's first `kept` ids are targets; the first id never is."""
    before = np.zeros(len(mask) + 1, np.int32)
    np.cumsum(mask, out=before[1:])
    targets = before[start + kept] - before[start + 1]
    return targets > 0, targets.astype(np.int64)


def assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each length, int64 (n,); rows are numbered in the order of their first length.

    lengths int (n,), all in 1..capacity. Fills the rows in two ways and takes the one that needs fewer.
    """
    row = min((_fill_rows(lengths, capacity, exact_pairs) for exact_pairs in (False, True)), key=np.max)
    first = np.unique(row, return_index=True)[1]
    return np.argsort(np.argsort(first))[row]


def _fill_rows(lengths: np.ndarray, capacity: int, exact_pairs: bool) -> np.ndarray:
    """Fill rows one after another, each with the longest length left and then the longest that still fits.

    This gives the rows of first fit decreasing. With exact_pairs, a row that begins with at most half its capacity is
    closed by two lengths that fill it exactly, if such a pair is left. This saves short lengths for rows with little
    room, unless there are too few of them to begin with.
    """
    counts = np.bincount(lengths, minlength=capacity + 1).tolist()  # how many of each length are left
    # Integers as sets: while a length x is left, bit x of `left` and bit capacity - x of `mirrored` are set. Shifted
    # against each other, they show all pairs of a given sum at once.
    left = sum(1 << length for length, count in enumerate(counts) if count)
    mirrored = sum(1 << (capacity - length) for length, count in enumerate(counts) if count)
    placed, placed_in = [], []  # lengths in the order in which they are placed, and their rows
    row = -1
    while left:
        row += 1
        free = capacity
        wanted = left.bit_length() - 1  # the highest bit: the longest length left
        seek_pairs = exact_pairs and 2 * wanted <= capacity
        partner = 0
        while wanted > 0:
            placed.append(wanted)
            placed_in.append(row)
            free -= wanted
            counts[wanted] -= 1
            if not counts[wanted]:  # that was the last of this length
                left ^= 1 << wanted
                mirrored ^= 1 << (capacity - wanted)
            if partner:  # the second of a pair, which fills the row
                wanted, partner = partner, 0
                continue
            wanted = (left & ((2 << free) - 1)).bit_length() - 1  # the longest up to `free`; -1 if nothing fits
            if seek_pairs and 0 < wanted < free:
                # The shift moves bit capacity - x to bit free - x, so bit x stays set if both x and free - x are left.
                pairs = left & (mirrored >> (capacity - free))
                longer = pairs.bit_length() - 1
                if longer > 0 and (2 * longer != free or counts[longer] > 1):  # two halves must be two lengths
                    wanted, partner = longer, free - longer
    # So far rows belong to lengths, not to items. Sort both by length and match them: equal lengths in their order.
    by_length = np.argsort(np.array(placed), kind="stable")
    result = np.empty(len(lengths), np.int64)
    result[np.argsort(lengths, kind="stable")] = np.array(placed_in)[by_length]
    return result


@dataclass(eq=False)
class _Batches(Dataset):
    """Micro-batches of one rank in one epoch. Item i belongs to optimizer step i // accumulation_steps.

    For DataLoader(batches, batch_size=None, sampler=range(start, len(batches))). Pickles without its order.
    """

    cache: TokenCache
    plan: PackingPlan
    _: KW_ONLY
    batch_size: int
    accumulation_steps: int = 1
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True
    pad_id: int = 0

    kinds = ()
    counted = ""

    def __post_init__(self):
        if self.cache.kind not in self.kinds:
            raise ValueError(f"{type(self).__name__} takes {' or '.join(self.kinds)} records, not {self.cache.kind}")
        for flag, least in (("batch_size", 1), ("accumulation_steps", 1), ("seed", 0), ("epoch", 0)):
            if getattr(self, flag) < least:
                raise ValueError(f"--{flag} must be at least {least}, not {getattr(self, flag)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")
        self.shares = self.accumulation_steps * self.world_size  # micro-batches of an optimizer step, over all ranks
        self.global_batch_size = self.batch_size * self.shares
        self.steps_per_epoch = -(-self.plan.num_rows // self.global_batch_size)
        self._order, self._step = None, (None, {})

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_order": None, "_step": (None, {}), "_fits": None}

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation_steps

    def step_rows(self, step: int) -> np.ndarray:
        """Return the rows of the plan that make the global batch of an optimizer step, over all ranks."""
        if self._order is None:
            dtype = np.int32 if self.plan.num_rows < 1 << 31 else np.int64
            self._order = np.arange(self.plan.num_rows, dtype=dtype)
            if self.shuffle:
                np.random.default_rng((self.seed, self.epoch)).shuffle(self._order)
        return self._order[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    def rows(self, index: int) -> np.ndarray:
        """Return the rows of a micro-batch: fewer than batch_size in a ragged last step."""
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        # A stride instead of a slice spreads a ragged last step over all ranks and micro-batches.
        return self.step_rows(int(index) // self.accumulation_steps)[self._share(index) :: self.shares]

    def _share(self, index: int) -> int:
        """Return which of its step's micro-batches this one is, counted over all ranks."""
        return int(index) % self.accumulation_steps * self.world_size + self.rank

    def _totals(self, index: int) -> dict[str, int]:
        """Return the totals of a micro-batch's optimizer step, which every process knows without asking the others."""
        step, micro_batch = divmod(int(index), self.accumulation_steps)
        if self._step[0] != step:
            rows = self.step_rows(step)
            _, length, _ = self._segments(rows)
            totals = {
                "step_targets": int(self.plan.row_targets[rows].sum(dtype=np.int64)),
                "step_documents": len(length),
                "step_tokens": int(length.sum()),
                "step_attended": attended_pairs(length),
                "step_positions": self._laid_out_rows(rows) * self.plan.max_seq_len,
                self.counted: len(rows),
            }
            self._step = (step, totals)
        return self._step[1] | {"last": micro_batch == self.accumulation_steps - 1}

    def _segments(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (start, length, index into `rows`) of the segments of these rows of the plan, in order."""
        first = self.plan.row_start[rows]
        counts = self.plan.row_start[rows + 1] - first
        # first, first + 1, … first + count - 1 of each row, one row after another: a range per row without a loop.
        index = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        place = np.repeat(np.arange(len(rows)), counts)
        return self.plan.segment_start[index], self.plan.segment_length[index].astype(np.int64), place


def lay_out(
    cache: Any,
    start: np.ndarray,
    length: np.ndarray,
    row: np.ndarray,
    number: np.ndarray,
    shape: tuple[int, int],
    num_borders: int,
    pad_id: int,
) -> dict:
    """Return a batch of this shape, (rows, seq), from segments sorted by row. number: what document_ids calls each one.

    cache: what has the tokens and the mask that `start` counts in, a TokenCache or GRPO's answers.
    """
    num_rows, seq = shape
    # The flattened rows are a stream of pieces: the documents of a row, then its padding, which may be empty.
    # Segment i of row r is piece i + r, because the padding of r rows comes before it.
    is_document = np.zeros(len(start) + num_rows, bool)
    is_document[np.arange(len(start)) + row] = True

    def stream(of_documents: np.ndarray, of_padding: np.ndarray | int) -> np.ndarray:
        """Return one value per piece, in the order of the stream."""
        pieces = np.empty(len(is_document), np.int64)
        pieces[is_document], pieces[~is_document] = of_documents, of_padding
        return pieces

    sizes = stream(length, seq - np.bincount(row, length, num_rows).astype(np.int64))
    ends = np.cumsum(sizes)
    # Empty padding makes no border. The last border is repeated so that the shape never changes.
    borders = np.full(num_borders, num_rows * seq, np.int32)
    borders[0] = 0
    kept_ends = ends[sizes > 0]
    borders[1 : len(kept_ends) + 1] = kept_ends

    # From pieces to positions: repeat each value for every position of its piece, which begins at ends - sizes.
    position_ids = np.arange(num_rows * seq) - np.repeat(ends - sizes, sizes)
    document_ids = np.repeat(stream(number, -1).astype(np.int32), sizes)
    real = document_ids >= 0
    source = (np.repeat(stream(start, 0), sizes) + position_ids)[real]  # indices in the cache of the real inputs
    input_ids = np.full(num_rows * seq, pad_id, np.int64)
    input_ids[real] = cache.tokens[source]
    targets = cache.tokens[source + 1].astype(np.int64)  # in the same document: n ids make n - 1 positions
    if cache.mask is not None:
        targets[cache.mask[source + 1] == 0] = -100
    labels = np.full(num_rows * seq, -100, np.int64)
    labels[real] = targets
    by_position = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    by_position["document_ids"] = document_ids
    return {name: torch.from_numpy(values.reshape(shape)) for name, values in by_position.items()} | {
        "cu_seqlens": torch.from_numpy(borders),
        "max_seqlen": seq,
        "target_tokens": int((targets != -100).sum()),
        "real_tokens": len(source),
        "attended": attended_pairs(length),
        "num_documents": len(start),
    }


def attended_pairs(length: np.ndarray) -> int:
    """Count the (token, position that it attends to) pairs of documents: n (n + 1) / 2 each."""
    return int((length * (length + 1) // 2).sum())


class PackedBatches(_Batches):
    """Rows of pretrain documents or conversations; batch_size counts rows. An item is a dict:

    input_ids, labels (-100: no target), position_ids (from 0 in each document): int64 (batch_size, max_seq_len)
    document_ids int32 (batch_size, max_seq_len): number of the document in the micro-batch, -1 on padding
    cu_seqlens int32 (batch_size * (max_segments_per_row + 1) + 1,): borders of the documents in the flattened rows, a
        row's padding counting as one; the last is repeated so that the shape never changes
    max_seqlen; target_tokens, real_tokens, attended (pairs), num_documents: of the micro-batch
    row_ids int64 (rows,): rows of the plan, in 0..plan.num_rows - 1; fewer than batch_size in a ragged last step
    last: whether the micro-batch is the last of its optimizer step
    step_targets, step_documents, step_rows, step_tokens, step_attended, step_positions (padding included): of the whole
        optimizer step, all micro-batches of all ranks
    If the last step has too few rows, the rest of the rows is padding.
    """

    kinds = ("pretrain", "conversation")
    counted = "step_rows"

    def __getitem__(self, index: int) -> dict:
        rows = self.rows(index)
        start, length, place = self._segments(rows)
        num_borders = self.batch_size * (self.plan.max_segments_per_row + 1) + 1
        number, shape = np.arange(len(start)), (self.batch_size, self.plan.max_seq_len)
        batch = lay_out(self.cache, start, length, place, number, shape, num_borders, self.pad_id)
        return batch | self._totals(index) | {"row_ids": torch.from_numpy(rows.astype(np.int64))}

    def _laid_out_rows(self, rows: np.ndarray) -> int:
        return self.global_batch_size


@dataclass(eq=False, kw_only=True)
class PreferenceBatches(_Batches):
    """Pairs of chosen and rejected; batch_size counts pairs. Items are those of PackedBatches, except:

    - there are as many rows as the documents of the micro-batch need, rounded up to a multiple of row_multiple,
      because a compiled model is compiled for each shape that occurs
    - documents 2p and 2p + 1 are chosen and rejected of the p-th pair, in any row
    - cu_seqlens is (4 * batch_size + row_multiple,)
    - pair_ids int64 (pairs,): rows of the plan, in 0..plan.num_rows - 1; fewer than batch_size in a ragged last step
    - step_pairs instead of step_rows
    """

    row_multiple: int = 1

    kinds = ("preference",)
    counted = "step_pairs"

    def __getitem__(self, index: int) -> dict:
        rows, totals = self.rows(index), self._totals(index)  # _totals also sets _fits
        start, length, _ = self._segments(rows)
        row, num_rows = self._fits[self._share(index)]
        order = np.argsort(row, kind="stable")
        # at worst each of a pair's two documents has a row with padding of its own; plus rounding and the first border
        num_borders = 4 * self.batch_size + self.row_multiple
        shape = num_rows, self.plan.max_seq_len
        batch = lay_out(self.cache, start[order], length[order], row[order], order, shape, num_borders, self.pad_id)
        return batch | totals | {"pair_ids": torch.from_numpy(rows.astype(np.int64))}

    def _laid_out_rows(self, rows: np.ndarray) -> int:
        """Count a step's rows; set _fits: per micro-batch, the row of each document and the number of rows."""
        self._fits = []
        for share in range(self.shares):
            _, length, _ = self._segments(rows[share :: self.shares])
            row = assign_rows(length, self.plan.max_seq_len) if len(length) else length
            self._fits.append((row, self.row_multiple * -(-(int(row.max(initial=0)) + 1) // self.row_multiple)))
        return sum(num_rows for _, num_rows in self._fits)
