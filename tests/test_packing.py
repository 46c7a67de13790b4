"""Packing: every target once, nothing across documents, and the same global batches however they are split."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import packing
from dataset.packing import PackedBatches, PackingPlan, PreferenceBatches, assign_rows, build_plan
from dataset.token_cache import TokenCache

ROOT = Path(__file__).resolve().parents[1]
BOS, EOS, NEWLINE, HEADER = 1, 2, 3, 4


def make_cache(folder, kind, documents):
    """A cache of (ids, mask or None) as the builder would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.array([i for ids, _ in documents for i in ids], np.uint16).tofile(folder / "tokens.bin")
    if kind != "pretrain":
        np.array([m for _, mask in documents for m in mask], np.uint8).tofile(folder / "mask.bin")
    offsets = np.cumsum([0] + [len(ids) for ids, _ in documents])
    offsets.astype(np.int64).tofile(folder / "offsets.bin")
    meta = {"kind": kind, "tokens": int(offsets[-1]), "documents": len(documents), "data_path": "data.jsonl"}
    meta["contents_sha256"] = "of no file"
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenCache(folder)


def pretrain_documents(lengths):
    """Documents of so many ids; all ids in them are different, so that a target can be told by its id."""
    ids = iter(range(10, 65_536))
    return [([BOS, *(next(ids) for _ in range(length - 2)), EOS], None) for length in lengths]


def chat(*sizes, fresh):
    """A conversation of one exchange per (prompt size, answer size); an answer size of None leaves the turn out."""
    ids, mask = [], []
    for prompt, answer in sizes:
        ids += [BOS, HEADER, *(next(fresh) for _ in range(prompt)), EOS, NEWLINE]
        mask += [0] * (prompt + 4)
        if answer is not None:
            ids += [BOS, HEADER, *(next(fresh) for _ in range(answer)), EOS, NEWLINE]
            mask += [0, 0, *[1] * (answer + 1), 0]
    return ids, mask


def random_chats(count, seed=0, largest=60):
    dice = np.random.default_rng(seed)
    fresh = iter(range(10, 65_536))
    return [
        chat(*((int(p), int(a)) for p, a in dice.integers(1, largest, (dice.integers(1, 5), 2))), fresh=fresh)
        for _ in range(count)
    ]


def random_pairs(count, seed=0):
    """Chosen and rejected with the same prompt ids, one after the other."""
    dice = np.random.default_rng(seed)
    fresh = iter(range(10, 65_536))
    documents = []
    for prompt, chosen, rejected in dice.integers(1, 30, (count, 3)).tolist():
        opening = [BOS, HEADER, *(next(fresh) for _ in range(prompt)), EOS, NEWLINE, BOS, HEADER]
        for answer in (chosen, rejected):
            ids = [*opening, *(next(fresh) for _ in range(answer)), EOS, NEWLINE]
            documents.append((ids, [0] * len(opening) + [1] * (answer + 1) + [0]))
    return documents


def naive_pretrain(documents, length):
    """What should be trained on, one document at a time: (inputs, labels) of each piece."""
    pieces = []
    for ids, _ in documents:
        for a in range(0, len(ids) - 1, length):
            labels = ids[a + 1 : a + length + 1]
            pieces.append((tuple(ids[a : a + len(labels)]), tuple(labels)))
    return pieces


def naive_conversations(documents, length):
    pieces = []
    for ids, mask in documents:
        if len(ids) > length + 1:
            ends = [i for i in range(length + 1) if mask[i] and not mask[i + 1]]
            kept = min(ends[-1] + 2, length + 1) if ends else length + 1
            ids, mask = ids[:kept], mask[:kept]
        if any(mask):
            labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
            pieces.append((tuple(ids[:-1]), tuple(labels[1:])))
    return pieces


def documents_of(batch):
    """(inputs, labels) of each document of a batch, found by its document_ids; key: its number."""
    found = {}
    numbers = batch["document_ids"].flatten()
    inputs, labels, positions = (batch[k].flatten() for k in ("input_ids", "labels", "position_ids"))
    for number in range(batch["num_documents"]):
        here = numbers == number
        assert positions[here].tolist() == list(range(int(here.sum())))
        found[number] = (tuple(inputs[here].tolist()), tuple(labels[here].tolist()))
    return found


def check_shapes(batch, rows, seq, pad_id=0):
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (rows, seq) and batch[name].dtype == torch.int64, name
    assert batch["document_ids"].shape == (rows, seq) and batch["document_ids"].dtype == torch.int32
    numbers = batch["document_ids"].flatten().tolist()
    # Borders, found the slow way: at the begin of a row and wherever the document changes.
    borders = [i for i in range(rows * seq) if i % seq == 0 or numbers[i] != numbers[i - 1]] + [rows * seq]
    cu_seqlens = batch["cu_seqlens"]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == borders + [rows * seq] * (len(cu_seqlens) - len(borders))
    assert batch["position_ids"].flatten().tolist() == [
        i - a for a, b in zip(borders, borders[1:], strict=False) for i in range(a, b)
    ]
    padding = batch["document_ids"] < 0
    assert (batch["input_ids"][padding] == pad_id).all() and (batch["labels"][padding] == -100).all()
    assert batch["max_seqlen"] == seq
    assert batch["real_tokens"] == int((~padding).sum())
    assert batch["target_tokens"] == int((batch["labels"] != -100).sum())
    assert batch["num_documents"] == len(set(numbers) - {-1})


@pytest.mark.parametrize("length", [7, 32, 100])
@pytest.mark.parametrize("kind", ["pretrain", "conversation"])
def test_an_epoch_is_every_document_once(tmp_path, monkeypatch, kind, length):
    monkeypatch.setattr(packing, "SCAN_TOKENS", 500)
    monkeypatch.setattr(packing, "WINDOW_SEGMENTS", 40)
    if kind == "pretrain":
        documents = pretrain_documents(np.random.default_rng(1).integers(2, 90, 300))
        expected = naive_pretrain(documents, length)
    else:
        documents = random_chats(150)
        expected = naive_conversations(documents, length)
    cache = make_cache(tmp_path / "cache", kind, documents)
    plan = build_plan(cache, length, show_progress=False)
    batches = PackedBatches(cache, plan, batch_size=4, accumulation_steps=2, pad_id=9)
    found = []
    for i in range(len(batches)):
        batch = batches[i]
        check_shapes(batch, 4, length, pad_id=9)
        found += documents_of(batch).values()
    assert Counter(found) == Counter(expected)
    targets = sum(label != -100 for _, labels in expected for label in labels)
    assert plan.stats["targets"] == targets == int(plan.row_targets.sum())
    assert plan.stats["positions"] == sum(len(inputs) for inputs, _ in expected)
    assert plan.stats["segments"] == len(expected) and plan.stats["documents"] == len(documents)
    assert plan.fill == plan.stats["positions"] / (plan.num_rows * length)


def test_every_pretrain_target_appears_once_per_epoch(tmp_path):
    documents = pretrain_documents([2, 3, 33, 34, 64, 65, 66, 97, 200, 10, 31, 32])
    cache = make_cache(tmp_path / "cache", "pretrain", documents)
    plan = build_plan(cache, 32, show_progress=False)
    batches = PackedBatches(cache, plan, batch_size=3)
    labels = torch.cat([batches[i]["labels"].flatten() for i in range(len(batches))])
    seen = Counter(labels[labels != -100].tolist())
    assert seen == Counter(i for ids, _ in documents for i in ids[1:])
    assert seen[EOS] == len(documents) and max(count for i, count in seen.items() if i != EOS) == 1
    assert plan.stats["split"] == 6  # those of more than 33 ids


def test_labels_never_cross_documents(tmp_path):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([5, 9, 4, 7, 6, 3, 12]))
    batch = PackedBatches(cache, build_plan(cache, 16, show_progress=False), batch_size=4)[0]
    assert (batch["labels"] != BOS).all()  # a bos is only ever the first of a document, so never a target
    ends = batch["labels"] == EOS
    assert int(ends.sum()) == 7
    after = batch["input_ids"].flatten()[1:][ends.flatten()[:-1]]
    assert set(after.tolist()) <= {BOS, 0}


def one_conversation(tmp_path, length, *sizes):
    documents = [chat(*sizes, fresh=iter(range(10, 999)))]
    cache = make_cache(tmp_path / f"cache_{length}", "conversation", documents)
    plan = build_plan(cache, length, show_progress=False)
    (found,) = documents_of(PackedBatches(cache, plan, batch_size=1)[0]).values()
    return documents[0], found, plan.stats


def test_conversations_that_fit_are_whole(tmp_path):
    # 2 * (5 + 4) ids an exchange, one position less than ids
    (ids, mask), (inputs, labels), stats = one_conversation(tmp_path, 35, (5, 5), (5, 5))
    assert inputs == tuple(ids[:-1])
    assert labels == tuple(i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True))
    assert stats["truncated"] == stats["cut"] == stats["skipped"] == 0


def test_only_the_newline_after_the_last_answer_may_go_unnoticed(tmp_path):
    (ids, _), (inputs, labels), stats = one_conversation(tmp_path, 34, (5, 5), (5, 5))
    assert inputs == tuple(ids[:-2]) and labels[-1] == EOS
    assert stats["truncated"] == stats["cut"] == 0


def test_trailing_turns_are_dropped_at_the_end_of_the_last_exchange_that_fits(tmp_path):
    (ids, _), (inputs, labels), stats = one_conversation(tmp_path, 33, (5, 5), (5, 5), (1, 1))
    assert inputs == tuple(ids[:17]) and ids[17] == NEWLINE  # the first exchange, its "\n" being the last label
    assert labels[-2:] == (EOS, -100)
    assert stats["truncated"] == 1 and stats["cut"] == stats["skipped"] == 0


def test_a_question_without_an_answer_at_the_end_is_dropped_too(tmp_path):
    (ids, _), (inputs, _), stats = one_conversation(tmp_path, 22, (5, 5), (5, None))
    assert inputs == tuple(ids[:17]) and stats["truncated"] == 1


def test_a_question_without_an_answer_stays_where_it_fits(tmp_path):
    (ids, _), (inputs, _), stats = one_conversation(tmp_path, 26, (5, 5), (5, None))
    assert inputs == tuple(ids[:-1]) and stats["truncated"] == 0


def test_a_first_answer_that_does_not_fit_is_cut_and_loses_its_eos(tmp_path):
    (ids, _), (inputs, labels), stats = one_conversation(tmp_path, 14, (5, 5), (5, 5))
    assert inputs == tuple(ids[:14])
    assert labels[-4:] == tuple(ids[11:15]) and EOS not in labels
    assert stats["cut"] == 1 and stats["truncated"] == stats["skipped"] == 0


def test_conversations_without_a_target_in_the_row_are_skipped_and_counted(tmp_path):
    fresh = iter(range(10, 999))
    documents = [chat((20, 5), fresh=fresh), chat((3, 3), fresh=fresh), chat((3, None), fresh=fresh)]
    cache = make_cache(tmp_path / "cache", "conversation", documents)
    plan = build_plan(cache, 25, show_progress=False)
    assert plan.stats["skipped"] == 2 and plan.stats["segments"] == plan.num_rows == 1
    with pytest.raises(ValueError, match="none of the 3 documents .* --max_seq_len 5; make it larger"):
        build_plan(cache, 5, show_progress=False)
    assert not (cache.folder / "plan_5_v1").exists()


def splits(total):
    return [
        (world, batch, total // world // batch)
        for world in range(1, total + 1)
        for batch in range(1, total + 1)
        if total % (world * batch) == 0
    ]


@pytest.mark.parametrize("kind", ["pretrain", "conversation", "preference"])
def test_global_batches_are_the_same_at_any_split(tmp_path, kind):
    if kind == "pretrain":
        documents = pretrain_documents(np.random.default_rng(1).integers(2, 60, 200))
    else:
        documents = random_chats(60) if kind == "conversation" else random_pairs(45)
    cache = make_cache(tmp_path / "cache", kind, documents)
    plan = build_plan(cache, 48, show_progress=False)
    assert plan.num_rows % 8, "the last step should be ragged"
    reference = None
    for world, batch_size, accumulation in splits(8):
        ranks = [
            (PreferenceBatches if kind == "preference" else PackedBatches)(
                cache,
                plan,
                batch_size=batch_size,
                accumulation_steps=accumulation,
                world_size=world,
                rank=rank,
                seed=5,
                epoch=1,
            )
            for rank in range(world)
        ]
        assert len(ranks[0]) == ranks[0].steps_per_epoch * accumulation
        assert ranks[0].steps_per_epoch == -(-plan.num_rows // 8)
        steps = []
        for step in range(ranks[0].steps_per_epoch):
            micro_batches = [rank[step * accumulation + j] for rank in ranks for j in range(accumulation)]
            documents = Counter(d for micro in micro_batches for d in documents_of(micro).values())
            for micro in micro_batches:
                rows = micro["step_pairs"] if kind == "preference" else micro["step_rows"]
                assert micro["step_targets"] == sum(m["target_tokens"] for m in micro_batches)
                assert micro["step_documents"] == sum(m["num_documents"] for m in micro_batches) == documents.total()
                assert rows == min(8, plan.num_rows - 8 * step)
                # what the packer counts is what the tensors hold
                assert micro["step_tokens"] == sum(int((m["document_ids"] >= 0).sum()) for m in micro_batches)
                assert micro["step_positions"] == sum(m["input_ids"].numel() for m in micro_batches)
                assert micro["step_attended"] == sum(seen_pairs(m) for m in micro_batches)
                assert micro["attended"] == seen_pairs(micro)
            assert [micro["last"] for micro in micro_batches] == world * ([False] * (accumulation - 1) + [True])
            steps.append(documents)
        reference = reference or steps
        assert steps == reference, (world, batch_size, accumulation)


def seen_pairs(batch: dict) -> int:
    return int(((batch["position_ids"] + 1) * (batch["document_ids"] >= 0)).sum())


def test_a_ragged_last_step_is_spread_over_the_ranks(tmp_path):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([17] * 21))
    plan = build_plan(cache, 16, show_progress=False)
    last = [PackedBatches(cache, plan, batch_size=4, world_size=4, rank=rank)[1] for rank in range(4)]
    assert [batch["num_documents"] for batch in last] == [2, 1, 1, 1]
    for batch in last:
        check_shapes(batch, 4, 16)


def first_inputs(cache, plan, **options):
    batches = PackedBatches(cache, plan, batch_size=2, **options)
    return torch.cat([batches[i]["input_ids"] for i in range(len(batches))]).tolist()


def test_order_is_a_function_of_seed_and_epoch(tmp_path):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([17] * 40))
    plan = build_plan(cache, 16, show_progress=False)
    orders = [first_inputs(cache, plan, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] == first_inputs(cache, plan, seed=0, epoch=0)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    # In file order without shuffling, which is what evaluation uses.
    assert first_inputs(cache, plan, shuffle=False) == [list(ids[:-1]) for ids, _ in pretrain_documents([17] * 40)]


def test_empty_rows_and_indices_outside(tmp_path):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([9]))
    batches = PackedBatches(cache, build_plan(cache, 8, show_progress=False), batch_size=2, world_size=3, rank=2)
    assert len(batches) == 1
    check_shapes(batches[0], 2, 8)
    assert batches[0]["real_tokens"] == 0 and batches[0]["step_targets"] == 8
    for index in (1, -1):
        with pytest.raises(IndexError):
            batches[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch_size must be at least 1, not 0"),
        ({"batch_size": 1, "accumulation_steps": 0}, "--accumulation_steps must be at least 1"),
        ({"batch_size": 1, "world_size": 2, "rank": 2}, "rank 2 is not one of 2 ranks"),
        ({"batch_size": 1, "seed": -1}, "--seed must be at least 0, not -1"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([9]))
    plan = build_plan(cache, 8, show_progress=False)
    with pytest.raises(ValueError, match=message):
        PackedBatches(cache, plan, **options)
    with pytest.raises(ValueError, match="PreferenceBatches takes preference records, not pretrain"):
        PreferenceBatches(cache, plan, batch_size=1)
    with pytest.raises(ValueError, match="--max_seq_len must be at least 1"):
        build_plan(cache, 0)


@pytest.mark.parametrize("length", [20, 64])
def test_pairs_stay_together_and_answers_are_cut(tmp_path, monkeypatch, length):
    monkeypatch.setattr(packing, "SCAN_TOKENS", 300)
    documents = random_pairs(49)
    documents += [chat((2, 3), fresh=iter(range(60_000, 60_100))), chat((70, 3), fresh=iter(range(61_000, 61_100)))]
    expected = []
    cut = 0
    for p in range(0, len(documents), 2):
        pair = [(ids[: length + 1], mask[: length + 1]) for ids, mask in documents[p : p + 2]]
        if all(any(mask) for _, mask in pair):
            expected.append(
                tuple(
                    (tuple(ids[:-1]), tuple(i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)))
                    for ids, mask in pair
                )
            )
            cut += sum(sum(kept[1]) < sum(full[1]) for kept, full in zip(pair, documents[p : p + 2], strict=True))
    cache = make_cache(tmp_path / "cache", "preference", documents)
    plan = build_plan(cache, length, show_progress=False)
    assert plan.num_rows == len(expected) and plan.stats["skipped"] == 50 - len(expected)
    assert plan.stats["cut"] == cut > 0 if length == 20 else plan.stats["cut"] == cut
    batches = PreferenceBatches(cache, plan, batch_size=4, pad_id=9)
    found = {}
    for i in range(len(batches)):
        batch = batches[i]
        rows = len(batch["input_ids"])
        assert 1 <= rows <= 8
        check_shapes(batch, rows, length, pad_id=9)
        assert batch["cu_seqlens"].shape == (17,)
        pairs = batch["pair_ids"].tolist()
        assert batch["num_documents"] == 2 * len(pairs) and batch["pair_ids"].dtype == torch.int64
        inside = documents_of(batch)
        found |= {pair: (inside[2 * p], inside[2 * p + 1]) for p, pair in enumerate(pairs)}
    assert [found[pair] for pair in range(plan.num_rows)] == expected  # pair_ids count the kept pairs in file order


@pytest.mark.parametrize("length, identical", [(20, 1), (64, 0)])
def test_pairs_that_are_alike_once_cut_are_left_out(tmp_path, length, identical):
    """Their margin is 0 whatever the model says. The first pair differs behind the row's end, the second before it."""
    documents = []
    for end in (30, 10):
        chosen = chat((2, 40), fresh=iter(range(60_000, 60_100)))
        documents += [chosen, (chosen[0][:end] + [5] + chosen[0][end + 1 :], chosen[1])]
    plan = build_plan(make_cache(tmp_path, "preference", documents), length, show_progress=False)
    assert plan.stats["identical"] == identical and plan.stats["skipped"] == 0 and plan.num_rows == 2 - identical


def test_short_pairs_share_rows(tmp_path):
    cache = make_cache(tmp_path / "cache", "preference", random_pairs(64))
    plan = build_plan(cache, 256, show_progress=False)
    batches = PreferenceBatches(cache, plan, batch_size=8)
    rows = sum(len(batches[i]["input_ids"]) for i in range(len(batches)))
    assert plan.stats["positions"] / (rows * 256) > 0.8


def test_a_preference_micro_batch_without_pairs_is_one_row_of_padding(tmp_path):
    cache = make_cache(tmp_path / "cache", "preference", random_pairs(1))
    plan = build_plan(cache, 64, show_progress=False)
    batch = PreferenceBatches(cache, plan, batch_size=2, world_size=2, rank=1)[0]
    check_shapes(batch, 1, 64)
    assert batch["pair_ids"].tolist() == [] and batch["step_pairs"] == 1 and batch["cu_seqlens"].shape == (9,)


def first_fit_decreasing(lengths, capacity):
    rows = []
    for length in sorted(lengths, reverse=True):
        for row in range(len(rows)):
            if rows[row] >= length:
                rows[row] -= length
                break
        else:
            rows.append(capacity - length)
    return len(rows)


@pytest.mark.parametrize("seed", range(20))
def test_assign_rows_overfills_no_row_and_is_no_worse_than_first_fit_decreasing(seed):
    dice = np.random.default_rng(seed)
    capacity = int(dice.integers(1, 200))
    lengths = np.minimum(dice.integers(1, dice.integers(1, capacity + 1) + 1, dice.integers(1, 300)), capacity)
    row = assign_rows(lengths, capacity)
    used = np.bincount(row, lengths)
    assert used.max() <= capacity and used.min() > 0
    assert len(used) <= first_fit_decreasing(lengths.tolist(), capacity)
    first = [row.tolist().index(r) for r in range(len(used))]
    assert first == sorted(first)  # rows in the order of the file


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([6, 5, 5, 4, 2, 2], 2),  # 6 + 4 + 2 and 5 + 5 + 2, where the longest first gives 6 + 5, 5 + 4 + 2 and 2
        ([6, 5, 5, 5, 5, 4, 3, 2], 3),  # and here pairs that fill a row leave no short ones for the fives
    ],
)
def test_assign_rows_takes_the_better_of_two_ways(lengths, rows):
    assert assign_rows(np.array(lengths), 12).max() + 1 == rows


def test_rows_are_filled_to_98_percent():
    """Lengths as in conversations cut at 512: many between 100 and 500, some of 512."""
    dice = np.random.default_rng(0)
    lengths = np.minimum(dice.lognormal(5.3, 0.7, 20_000).astype(int) + 20, 512)
    rows = assign_rows(lengths, 512).max() + 1
    assert lengths.sum() / (rows * 512) > 0.98


def test_a_plan_is_kept_beside_the_tokens_and_made_again_when_damaged(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([9, 5, 4]))
    plan = build_plan(cache, 8, show_progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_plan", None)  # would fail if it were made again
        assert build_plan(cache, 8, show_progress=False).folder == plan.folder
    assert build_plan(cache, 4, show_progress=False).max_seq_len == 4
    os.truncate(plan.folder / "row_start.bin", 8)
    again = build_plan(cache, 8, show_progress=False)
    assert again.row_start.tolist() == [0, 1, 3]
    assert len(pickle.dumps(again)) < 500 and pickle.loads(pickle.dumps(again)).row_start.tolist() == [0, 1, 3]


def test_a_full_disk_leaves_no_half_plan(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache", "pretrain", pretrain_documents([9, 5, 4]))

    def full(file, array):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_array", full)
        with pytest.raises(ValueError, match="cannot write the packing plan .*free some space"):
            build_plan(cache, 8, show_progress=False)
    assert [path.name for path in cache.folder.glob("*/")] == []
    assert isinstance(build_plan(cache, 8, show_progress=False), PackingPlan)


def test_loader_workers_under_spawn_give_the_same_batches(tmp_path):
    cache = make_cache(tmp_path / "cache", "conversation", random_chats(40))
    plan = build_plan(cache, 64, show_progress=False)
    batches = PackedBatches(cache, plan, batch_size=3, accumulation_steps=2, seed=7, epoch=3)
    size = len(pickle.dumps(batches))
    batches[0]
    assert len(pickle.dumps(batches)) == size  # the order, which grows with the data, is made again in each worker
    loader = DataLoader(
        batches, batch_size=None, sampler=range(2, len(batches)), num_workers=2, multiprocessing_context="spawn"
    )
    loaded = list(loader)
    assert len(loaded) == len(batches) - 2
    for i, batch in enumerate(loaded, 2):
        expected = batches[i]
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            same = torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
            assert same and type(batch[name]) is type(value), name


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.data_pipeline import rss_anon\n"
        "from dataset.packing import PackedBatches, build_plan\n"
        "from dataset.token_cache import TokenCache\n"
        "before = rss_anon()\n"
        "cache = TokenCache(sys.argv[1])\n"
        "batches = PackedBatches(cache, build_plan(cache, 512, show_progress=False), batch_size=32)\n"
        "for i in range(len(batches)): batches[i]\n"
        "print(rss_anon() - before)\n"
    )
    grown = []
    for scale in (1, 10):
        lengths = np.random.default_rng(0).integers(20, 500, 20_000 * scale)
        folder = tmp_path / f"x{scale}"
        make_cache(folder, "pretrain", [([BOS, EOS], None)])
        np.full(lengths.sum(), 7, np.uint16).tofile(folder / "tokens.bin")
        np.concatenate(([0], np.cumsum(lengths))).astype(np.int64).tofile(folder / "offsets.bin")
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"tokens": int(lengths.sum()), "documents": len(lengths)}))
        run = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
        grown.append(int(run.stdout))
    assert grown[1] - grown[0] < 50e6, grown


def test_rows_of_pairs_come_in_few_shapes_where_asked(tmp_path):
    """Padding rows change nothing: the same documents, targets and pairs as without them."""
    cache = make_cache(tmp_path / "cache", "preference", random_pairs(40))
    plan = build_plan(cache, 32, show_progress=False)
    exact, rounded = (PreferenceBatches(cache, plan, batch_size=4, row_multiple=multiple) for multiple in (1, 4))
    shapes = set()
    for ours, theirs in zip(map(rounded.__getitem__, range(len(rounded))), exact, strict=False):
        rows = len(theirs["input_ids"])
        shapes.add(len(ours["input_ids"]))
        for name in ("input_ids", "labels", "position_ids", "document_ids"):
            assert torch.equal(ours[name][:rows], theirs[name])
        assert (ours["document_ids"][rows:] == -1).all() and (ours["labels"][rows:] == -100).all()
        borders = ours["cu_seqlens"].unique()
        assert borders[-1] == ours["input_ids"].numel() and len(ours["cu_seqlens"]) >= len(borders)
        assert torch.equal(ours["pair_ids"], theirs["pair_ids"])
    assert shapes <= {4, 8}
