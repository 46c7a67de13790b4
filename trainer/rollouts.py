"""GRPO's answers: sampled with the training weights, scored, and packed into rows to learn from.

The answers to one prompt form a group. Draws depend on (seed, step, prompt, sample) alone: neither the number of
processes nor what else is being decoded changes them, and a step that a crash cut off is sampled again to the same ids.

With tools, an answer has several segments, as in a chat: after one that calls tools of dataset/tools.py come their
results, which are not learned, and the next segment. Only the clock's result differs from run to run.

The decoder lays out the weights again for every step (a copy for fast products), so it always samples from the weights
of the last update. On a CPU the layout costs as much time as decoding a few tokens; on a GPU the decoder's graphs are
recorded anew too.
"""

import argparse
import copy
import functools
import hashlib
import json
import shlex
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from dataset.lm_dataset import RecordError, parse_prompt
from dataset.packing import assign_rows, lay_out
from dataset.text_stream import ToolCall, ToolCallSplitter
from dataset.tokenization import ChatTokenizer
from dataset.tools import call_tool, offered_tools, unknown_tools
from model.batching import Engine
from model.sampling import SamplingParams
from trainer.distributed import Process, StopRequest, gather_objects, refuse_differing, sum_over_ranks
from trainer.loader import planned_steps, plural, refuse_vast
from trainer.logger import Logger
from trainer.rewards import build_rewards, score_answer
from trainer.training import Training

SLOTS = 64  # answers decoded together: they share each read of the weights, but each takes room in the cache
MOST_CALLING_TURNS = 8  # of an answer
HELD_OUT = 1 << 40  # evaluation draws as if at this step, so its draws never change


@dataclass
class Rollout:
    """One sampled answer. `learned` marks the ids that the model chose; log_probs are theirs when sampled, in nats."""

    prompt: int  # number of the prompt in the file
    ids: list[int]  # prompt and answer
    learned: list[int]
    log_probs: list[float] = field(default_factory=list)
    text: str = ""  # the answer; with tools, what follows the last result, without calls
    turns: list[dict] = field(default_factory=list)  # so far; with tools, the calls and results too
    calls: int = 0
    finished: bool = False  # False if --max_new_tokens cut it
    rewards: dict[str, float] = field(default_factory=dict)
    total: float = 0.0  # weighted sum of the rewards
    advantage: float = 0.0

    @property
    def length(self) -> int:
        """Tokens that the model chose."""
        return len(self.log_probs)


class RolloutEngine(Engine):
    """An engine whose log-probs are those of the sampled distribution, which is also the one that learns."""

    def _logprobs(self, requests, logits, ids):
        return super()._logprobs(requests, logits / (requests[0].params.temperature or 1.0), ids)


def starting_point(model: nn.Module, share: bool) -> nn.Module:
    """Return the model as it is now, in eval mode. share: with its own parameters, if they will not change (LoRA)."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()} if share else {}).eval()


def draw_seed(*numbers: int) -> int:
    """Return a 64-bit seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Sampler:
    """The prompts of a file (they are few and stay in memory) and the answers to them.

    steps_per_epoch, total_steps: batches of answers. One epoch follows another without a gap, so every step is full.
    """

    def __init__(self, path: Path, args: argparse.Namespace, tokenizer: ChatTokenizer, process: Process):
        """Read the prompts.

        Raises ValueError if a line is not a prompt with an answer (unless --skip_bad_lines), or is too long, and in all
        processes alike if they read different prompts.
        """
        self.path, self.args, self.process, self.tokenizer = path, args, process, tokenizer
        self.rewards = build_rewards(shlex.split(args.reward))
        self.records = read_prompts(path, args.skip_bad_lines, args.max_record_bytes)
        self.with_tools = any("tools" in turn for record in self.records for turn in record["conversations"])
        self.prompt_ids = [tokenizer.encode_prompt(record["conversations"]) for record in self.records]
        longest = max(map(len, self.prompt_ids))
        needed = longest + args.max_new_tokens - 1
        if needed > args.max_seq_len:
            raise ValueError(
                f"the longest prompt of {path} has {longest} tokens; with --max_new_tokens {args.max_new_tokens} it "
                f"needs --max_seq_len {needed}, not {args.max_seq_len}"
            )
        refuse_vast(args, ("prompts_per_step", "group_size", "batch_size"), path, len(self.records), "prompt")
        refuse_differing(self.fingerprint(), process)
        self.passes, self.waited, self.notice = {}, 0.0, ""  # as PackedData has them, for the logger
        self.global_batch = args.prompts_per_step * args.group_size
        self.steps_per_epoch = -(-len(self.records) // args.prompts_per_step)
        self.total_steps = planned_steps(args, self.steps_per_epoch)
        self.params = SamplingParams(
            args.temperature, max_new_tokens=args.max_new_tokens, stop_ids=(tokenizer.eos_id,), logprobs=0
        )

    def fingerprint(self) -> dict:
        """Return what must not change when a run is resumed."""
        text = json.dumps(self.records, ensure_ascii=False, sort_keys=True)
        return {"prompts": len(self.records), "contents": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def facts(self) -> dict:
        """Return what the log says about the data; no pass over it comes before the first step."""
        return {"kind": "rollouts", "passes": self.passes, "stores": {}}

    def describe(self) -> str:
        return f"{self.path}: {len(self.records):,} prompts, rewarded by {self.args.reward}"

    def describe_steps(self) -> str:
        prompts, group = self.args.prompts_per_step, self.args.group_size
        return f"{plural(self.total_steps, 'step')} of {plural(prompts, 'prompt')} with {plural(group, 'answer')} each"

    @torch.no_grad()
    def sample_step(self, training: Training, step: int, stop: StopRequest) -> list[Rollout]:
        """Return this process's scored answers of a step, group by group, for its share of the step's prompts.

        Return [] once a signal was heard: the step is then not taken.
        """
        args, process = self.args, self.process
        jobs = []
        for position in range(args.prompts_per_step)[process.rank :: process.world_size]:
            epoch, place = divmod(step * args.prompts_per_step + position, len(self.records))
            number = int(self._order(epoch)[place])
            jobs += [(number, draw_seed(args.seed, step, position, sample)) for sample in range(args.group_size)]
        with training.whole_weights() as model:
            return self._answers(model, jobs, self.params, stop)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.args.seed, epoch)).permutation(len(self.records))

    @torch.no_grad()
    def evaluate(self, training: Training, logger: Logger, step: int) -> dict[str, float]:
        """Answer all prompts; log and return the held-out metrics, and log a sample.

        An answer is right if the reward named first is above 0.5. pass_at_1: share of right greedy answers; pass_at_K:
        share of prompts with a right one among K = --eval_samples sampled answers. Rewards, length in tokens and the
        finished share are means over the greedy answers.
        """
        args, process, name = self.args, self.process, self.rewards[0].name
        numbers = range(len(self.records))[process.rank :: process.world_size]
        jobs = [(n, draw_seed(args.seed, HELD_OUT, n, sample)) for n in numbers for sample in range(args.eval_samples)]
        with logger.paused("evaluating"), training.whole_weights() as model:
            greedy = self._answers(model, [(n, 0) for n in numbers], replace(self.params, temperature=0.0))
            right = np.array([r.rewards[name] > 0.5 for r in self._answers(model, jobs, self.params)])
        sums = {
            "pass_at_1": sum(r.rewards[name] > 0.5 for r in greedy),
            f"pass_at_{args.eval_samples}": right.reshape(-1, args.eval_samples).any(axis=1).sum(),
            "answer_tokens": sum(r.length for r in greedy),
            "finished": sum(r.finished for r in greedy),
        } | self._call_count(greedy)
        sums |= {f"reward_{w.name}": sum(r.rewards[w.name] for r in greedy) for w in self.rewards}
        totals = sum_over_ranks([float(value) for value in sums.values()], process)
        shown = greedy[0] if greedy else None
        sample = f"{self.records[shown.prompt]['conversations'][-1]['content']!r} -> {shown.text!r}" if shown else ""
        metrics = {key: total / len(self.records) for key, total in zip(sums, totals, strict=True)}
        logger.evaluation(step, metrics, sample)
        return metrics

    def micro_batches(
        self, rollouts: list[Rollout], advantages: Callable, token_weight: Callable
    ) -> tuple[list[dict], dict[str, int], dict[str, float]]:
        """Return micro-batches of the groups that teach something, the step's counts, and its means to log.

        A batch is as `pack` makes it, with the counts, and advantages, weights and sampled (log-probs) of each learned
        token, float32 (tokens,). Every process gets as many batches as the one with the most; there are none if no
        process has a group that teaches.

        advantages, token_weight: as train_grpo.py defines them.
        """
        args, process = self.args, self.process
        rewards = np.array([rollout.total for rollout in rollouts]).reshape(-1, args.group_size)
        for rollout, advantage in zip(rollouts, advantages(rewards, args.loss).flat, strict=True):
            rollout.advantage = float(advantage)
        taught = list(compress(rollouts, np.repeat(np.ptp(rewards, axis=1) > 0, args.group_size)))
        sums = {
            "answers": len(rollouts),
            "sampled_tokens": sum(r.length for r in rollouts),
            "step_documents": len(taught),
            "step_targets": sum(r.length for r in taught),
            "step_tokens": sum(len(r.ids) - 1 for r in taught),
            "step_attended": sum(len(r.ids) * (len(r.ids) - 1) // 2 for r in taught),
            "reward": float(rewards.sum()),
            "finished": sum(r.finished for r in rollouts),
            "entropy": -sum(sum(r.log_probs) for r in rollouts),
        } | self._call_count(rollouts)
        sums |= {f"reward_{w.name}": sum(r.rewards[w.name] for r in rollouts) for w in self.rewards}
        totals = dict(zip(sums, sum_over_ranks([float(value) for value in sums.values()], process), strict=True))
        answers, tokens = totals.pop("answers"), totals.pop("sampled_tokens")
        counts = {name: int(totals.pop(name)) for name in list(totals) if name.startswith("step_")}
        # entropy: the mean of -log p over the model's own samples, in nats per token
        means = {name: value / (tokens if name == "entropy" else answers) for name, value in totals.items()}
        means |= {"answer_tokens": tokens / answers, "groups_taught": counts["step_documents"] / answers}
        batches = pack(taught, args, self.tokenizer.pad_id) if counts["step_documents"] else []
        most = max(gather_objects(len(batches), process))
        batches += [pack([], args, self.tokenizer.pad_id)[0] for _ in range(most - len(batches))]
        counts["step_positions"] = most * process.world_size * args.batch_size * args.max_seq_len
        for number, batch in enumerate(batches):
            members = batch.pop("rollouts")
            lengths = [rollout.length for rollout in members]
            weights = [token_weight(length, answers, tokens, args) for length in lengths]
            batch["advantages"] = torch.tensor(np.repeat([r.advantage for r in members], lengths), dtype=torch.float32)
            batch["weights"] = torch.tensor(np.repeat(weights, lengths), dtype=torch.float32)
            batch["sampled"] = torch.tensor([p for r in members for p in r.log_probs], dtype=torch.float32)
            for name, value in batch.items():
                batch[name] = value.to(process.device) if isinstance(value, torch.Tensor) else value
            batch |= counts | {"last": number == most - 1}
        return batches, counts, means

    def _call_count(self, rollouts: list[Rollout]) -> dict[str, int]:
        return {"tool_calls": sum(r.calls for r in rollouts)} if self.with_tools else {}

    def _answers(
        self, model: nn.Module, jobs: list[tuple[int, int]], params: SamplingParams, stop: StopRequest | None = None
    ) -> list[Rollout]:
        """Return scored answers to jobs, (number of the prompt, seed of the draws), in their order."""
        if not jobs:
            return []
        longest = max(len(self.prompt_ids[number]) for number, _ in jobs) + params.max_new_tokens
        needed = self.args.max_seq_len + 1 if self.with_tools else longest  # results need room too
        engine = RolloutEngine(model, slots=min(SLOTS, len(jobs)), context_length=needed, max_queue=len(jobs))
        rollouts, pending = [], deque()

        def submit(rollout: Rollout, seed: int) -> None:
            left = params.max_new_tokens - rollout.length
            request = engine.submit(rollout.ids, replace(params, max_new_tokens=left, seed=seed))
            pending.append((rollout, seed, request))

        for number, seed in jobs:
            ids = list(self.prompt_ids[number])
            rollouts.append(Rollout(number, ids, [0] * len(ids), turns=self.records[number]["conversations"]))
            submit(rollouts[-1], seed)
        while pending:
            if stop and stop.heard():
                return []
            rollout, seed, request = pending.popleft()
            tokens = list(request)  # steps the engine, and with it all other answers
            rollout.ids += [token.id for token in tokens]
            rollout.learned += [1] * len(tokens)
            rollout.log_probs += [token.logprob for token in tokens]
            rollout.finished = request.finish_reason == "stop"
            rollout.text = self.tokenizer.decode([token.id for token in tokens])
            if self.with_tools and self._answer_calls(rollout, needed):
                submit(rollout, draw_seed(seed, len(rollout.turns)))
        for rollout in rollouts:
            record = self.records[rollout.prompt] | {"length_share": rollout.length / params.max_new_tokens}
            rollout.rewards = score_answer(self.rewards, rollout.text, record)
            rollout.total = sum(reward.weight * rollout.rewards[reward.name] for reward in self.rewards)
        return rollouts

    def _answer_calls(self, rollout: Rollout, longest: int) -> bool:
        """Run the calls of the last segment and append their results. Return whether the answer goes on.

        longest: tokens that a text may have. An answer that has no room to go on is not finished.
        """
        splitter = ToolCallSplitter()
        parts = [*splitter.push(rollout.text), *splitter.flush()]
        calls = [part for part in parts if isinstance(part, ToolCall)]
        rollout.text = "".join(part for part in parts if isinstance(part, str))
        rollout.calls += len(calls)
        if not calls or not rollout.finished:
            return False
        rollout.finished = False
        offered = offered_tools(rollout.turns)
        said = [{"type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in calls]
        results = [{"role": "tool", "content": call_tool(c.name, json.loads(c.arguments), offered)} for c in calls]
        turns = [*rollout.turns, {"role": "assistant", "content": rollout.text, "tool_calls": said}, *results]
        # `behind`: what the template writes after the assistant's eos; no content can hold an eos
        written = self.tokenizer.encode_prompt(turns)
        ends = [place for place, token_id in enumerate(written) if token_id == self.tokenizer.eos_id]
        behind = written[ends[rollout.ids.count(self.tokenizer.eos_id) - 1] + 1 :]
        room = min(longest - len(rollout.ids) - len(behind), self.params.max_new_tokens - rollout.length)
        own = turns[len(self.records[rollout.prompt]["conversations"]) :]
        if room < 1 or sum(turn["role"] == "assistant" for turn in own) > MOST_CALLING_TURNS:
            return False
        rollout.ids += behind
        rollout.learned += [0] * len(behind)
        rollout.turns = turns
        return True


def read_prompts(path: Path, skip_bad_lines: bool, max_record_bytes: int) -> list[dict]:
    """Return the records of a prompt file: conversations, answer, and other keys that a user's own reward may read."""
    records, bad = [], []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        if len(line.encode()) > max_record_bytes:
                            raise RecordError(f"longer than --max_record_bytes {max_record_bytes}")
                        record = parse_prompt(line)
                        if unknown := unknown_tools(record["conversations"]):
                            raise RecordError(unknown)
                        records.append(record)
                    except RecordError as error:
                        bad.append(f"line {number}: {error}")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if bad and not skip_bad_lines:
        raise ValueError(
            f"{path}: {len(bad)} of {len(bad) + len(records)} lines are not prompts with an answer; {bad[0]}. "
            "Correct them, or give --skip_bad_lines"
        )
    if not records:
        raise ValueError(f'{path} holds no prompt; a line is {{"conversations": [turns], "answer": "…"}}')
    return records


def pack(rollouts: list[Rollout], args: argparse.Namespace, pad_id: int) -> list[dict]:
    """Return micro-batches, at least one, of --batch_size rows that hold all answers, each a document of its own.

    They are as dataset/packing.py makes them, with the rollouts in the order of their targets in the flattened rows.
    """
    lengths = np.array([len(rollout.ids) - 1 for rollout in rollouts], dtype=np.int64)
    row_of = assign_rows(lengths, args.max_seq_len) if len(rollouts) else lengths
    order = np.argsort(row_of, kind="stable")
    # as many borders as a step can need, so that a compiled model sees one shape
    shape, borders = (args.batch_size, args.max_seq_len), args.prompts_per_step * args.group_size + args.batch_size + 1
    batches = []
    for first in range(0, row_of.max(initial=0) + 1, args.batch_size):
        chosen = order[row_of[order] // args.batch_size == first // args.batch_size]
        members, length, row = [rollouts[i] for i in chosen], lengths[chosen], row_of[chosen] - first
        ids = np.array([id for rollout in members for id in rollout.ids], np.int64)
        learned = np.array([mark for rollout in members for mark in rollout.learned], np.int64)
        starts = np.cumsum(length + 1) - (length + 1)
        answers = SimpleNamespace(tokens=ids, mask=learned)
        batch = lay_out(answers, starts, length, row, np.arange(len(members)), shape, borders, pad_id)
        batches.append(batch | {"rollouts": members})
    return batches
