"""GRPO: its loss against hand-computed numbers, REINFORCE and TRL; rollouts, rewards; and that it learns."""

import argparse
import functools
import json
import math
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TOOLS,
    assert_identical,
    read_log,
    read_resume,
    relative_error,
    sharp_model,
    tiny_flags,
    write_jsonl,
    write_weights,
)

from dataset.text_stream import ToolCall
from model.model_lora import apply_lora, lora_layers
from trainer import estimate, rollouts, train_grpo
from trainer.distributed import Process
from trainer.rewards import build_rewards, score_answer

LOSSES = ("dr_grpo", "grpo", "cispo")
ALONE = Process(0, 0, 1, torch.device("cpu"))


def options(**given) -> argparse.Namespace:
    defaults = {"loss": "dr_grpo", "clip_low": 0.2, "clip_high": 0.28, "beta": 0.0, "max_new_tokens": 10}
    return argparse.Namespace(**defaults | given)


def token_batch(lengths: list[int], advantages: list[float], args, dtype=torch.float64, **given) -> dict:
    """What policy_loss reads, for answers of these lengths that are all there are in the step."""
    weights = [train_grpo.token_weight(length, len(lengths), sum(lengths), args) for length in lengths]
    batch = {
        "advantages": torch.tensor(np.repeat(advantages, lengths), dtype=dtype),
        "weights": torch.tensor(np.repeat(weights, lengths), dtype=dtype),
        "step_targets": sum(lengths),
    }
    return batch | given


def test_advantages_by_hand():
    totals = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    centred = [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [-1, -1, -1, 3]]
    np.testing.assert_allclose(train_grpo.advantages(totals, "dr_grpo"), centred)
    deviation = math.sqrt(4 * 0.25 / 3), math.sqrt((3 * 1 + 9) / 3)
    expected = [
        [a / (deviation[0] + 1e-4) for a in centred[0]],
        centred[1],
        [a / (deviation[1] + 1e-4) for a in centred[2]],
    ]
    for loss in ("grpo", "cispo"):
        np.testing.assert_allclose(train_grpo.advantages(totals, loss), expected)


def test_the_loss_by_hand():
    """Two answers of one and two tokens; ratios 1.5 (clipped where the advantage is positive), 0.5 and 1."""
    now = torch.tensor([1.5, 0.5, 1.0], dtype=torch.float64).log().requires_grad_()
    before = torch.zeros(3, dtype=torch.float64)
    for loss, expected in (
        ("dr_grpo", -(2 * 1.28 + (-1 * 0.8) + (-1 * 1.0)) / (2 * 10)),
        ("grpo", -(2 * 1.28 / 2 + (-1 * 0.8 - 1 * 1.0) / (2 * 2))),
        ("cispo", -(1.28 * 2 * math.log(1.5) + 0.5 * -1 * math.log(0.5)) / 3),
    ):
        args = options(loss=loss)
        batch = token_batch([1, 2], [2.0, -1.0], args, before=before, sampled=before)
        value, shown = train_grpo.policy_loss(now, batch, args)
        assert value.item() == pytest.approx(expected, rel=1e-12), loss
        named = dict(zip(train_grpo.METRICS, shown.tolist(), strict=True))
        assert named["loss"] == pytest.approx(expected) and named["clipped"] == pytest.approx(2 / 3)
        assert named["kl"] == 0 and named["rollout_kl"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_an_on_policy_gradient_is_reinforce_with_the_groups_mean_as_baseline(loss):
    args = options(loss=loss)
    log_probs = -torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    advantages = train_grpo.advantages(np.array([[1.0, 0.0, 3.0]]), loss)[0]
    batch = token_batch([4, 3, 2], advantages, args, sampled=log_probs)
    ours = log_probs.clone().requires_grad_()
    train_grpo.policy_loss(ours, batch, args)[0].backward()
    reinforce = log_probs.clone().requires_grad_()
    (-batch["weights"] * batch["advantages"] * reinforce).sum().backward()
    torch.testing.assert_close(ours.grad, reinforce.grad, rtol=1e-12, atol=0)


def test_the_kl_term_is_k3():
    """Of one token with p = 0.5 under the model and 0.25 under the reference: q - log q - 1, q = 1/2."""
    args = options(beta=0.7)
    log_probs = torch.tensor([0.5], dtype=torch.float64).log()
    batch = token_batch([1], [0.0], args, sampled=log_probs, reference=torch.tensor([0.25], dtype=torch.float64).log())
    loss, shown = train_grpo.policy_loss(log_probs, batch, args)
    k3 = 0.5 - math.log(0.5) - 1
    assert loss.item() == pytest.approx(0.7 * k3 / 10) and shown[1].item() == pytest.approx(k3)
    near = train_grpo.k3(torch.zeros(1), torch.full((1,), 1e-5))  # float32 would round exp(x) - 1 - x to 0
    assert near.item() == pytest.approx(5e-11, rel=0.02)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_trls(loss, beta):
    """TRL's GRPOTrainer._compute_loss on equal log-probs, advantages and masks, in float64."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    generator = torch.Generator().manual_seed(1)
    lengths, longest = [5, 2, 7, 1], 7
    mask = torch.tensor([[i < length for i in range(longest)] for length in lengths])
    now, before, reference = (-3 * torch.rand(4, longest, dtype=torch.float64, generator=generator) for _ in range(3))
    before = now + 0.5 * (before + 1.5)  # ratios on both sides of the clip
    args = options(loss=loss, beta=beta, max_new_tokens=12)
    advantages = torch.tensor([1.5, -0.5, -1.0, 0.25], dtype=torch.float64)

    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
        device=torch.device("cpu"),
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (theirs, torch.zeros_like(theirs), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, loss_type=loss,
        importance_sampling_level="token", epsilon_low=0.2, epsilon_high=1.28 if loss == "cispo" else 0.28,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), use_vllm=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=12,
        accelerator=accelerator, _entropy_bonus_enabled=False, use_adaptive_entropy=False, use_liger_kernel=False,
        _metrics={"train": __import__("collections").defaultdict(list)},
    )  # fmt: skip
    theirs = now.clone().requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long), "prompt_mask": torch.ones(4, 1),
        "completion_mask": mask.double(),
        "completion_ids": torch.zeros(4, longest, dtype=torch.long), "advantages": advantages,
        "old_per_token_logps": before, "ref_per_token_logps": reference,
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
    }  # fmt: skip
    expected = grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    ours = now[mask].clone().requires_grad_()
    batch = token_batch(lengths, advantages.tolist(), args, before=before[mask], sampled=before[mask])
    if beta:
        batch["reference"] = reference[mask]
    value, _ = train_grpo.policy_loss(ours, batch, args)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad[mask], rtol=1e-10, atol=0)
    assert not theirs.grad[~mask].any()


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_of_a_file_with_a_space_in_its_name(tmp_path, tokenizer):
    """And an equals sign in that of its folder, and a dataclass, which looks for its module."""
    path = tmp_path / "run=1" / "my own.py"
    path.parent.mkdir()
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Letters:\n"
        "    all: str = 'aeiou'\ndef vowels(answer, record):\n    return 1\n"
    )
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"conversations": [{"role": "user", "content": "?"}], "answer": "1"}])
    flags = ["--reward", "number", f"python:{path}:vowels", "--data_path", str(prompts), "--max_new_tokens", "4"]
    args = train_grpo.parse([*flags, "--device", "cpu", "--out_dir", str(tmp_path)])
    sampler = rollouts.Sampler(prompts, args, tokenizer, ALONE)
    assert [reward.name for reward in sampler.rewards] == ["number", "vowels"]


def test_rewards_are_summed_with_their_weights(tmp_path):
    (tmp_path / "own.py").write_text("def vowels(answer, record):\n    return sum(c in 'aeiou' for c in answer)\n")
    rewards = build_rewards(["number", "format=0.2", f"python:{tmp_path / 'own.py'}:vowels=-1"])
    assert [(reward.name, reward.weight) for reward in rewards] == [("number", 1), ("format", 0.2), ("vowels", -1)]
    record = {"conversations": [{"role": "user", "content": "6 × 7?"}], "answer": "42"}
    answer = "<think>six</think><answer>四十二</answer>"
    assert score_answer(rewards, answer, record) == {"number": 1, "format": 1, "vowels": 7}
    assert score_answer(rewards, "43", record) == {"number": 0, "format": 0, "vowels": 0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("judge", "choose number, exact, choice, format, length"),
        ("number=much", "must be a finite number"),
        ("python:missing.py:f", "missing.py not found"),
        ("python:{text}:f", "not a .py file"),
        ("python:{file}:g", "has no function g"),
        ("python:{broken}:f", "cannot be loaded (NameError"),
    ],
)
def test_an_unknown_reward_is_refused(tmp_path, spec, message):
    (tmp_path / "a.py").write_text("f = len\n")
    (tmp_path / "b.py").write_text("f = g\n")
    (tmp_path / "a.txt").write_text("f = len\n")
    files = {"file": tmp_path / "a.py", "broken": tmp_path / "b.py", "text": tmp_path / "a.txt"}
    with pytest.raises(ValueError, match="--reward") as error:
        build_rewards([spec.format(**files)])
    assert message in str(error.value)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer):
    """A folder with weights to start from and prompts."""
    folder = tmp_path_factory.mktemp("grpo")
    write_weights(folder / "full_sft_32.pth", tokenizer)
    write_weights(folder / "full_sft_32_moe.pth", tokenizer, use_moe=True)
    turns = [{"role": "user", "content": "天气"}]
    write_jsonl(folder / "prompts.jsonl", [{"conversations": turns, "answer": str(n)} for n in range(6)])
    return folder


BRIEF = """
import pathlib
calls = [0]
def brief(answer, record):
    calls[0] += 1
    if calls[0] == 20 and pathlib.Path(__file__).with_name("fail").exists():
        raise OSError("the disk is gone")
    return -len(answer)
"""


def grpo_flags(start, out_dir, **flags) -> list[str]:
    """A command line; by default short texts are rewarded. A file `fail` in out_dir's parent makes the reward fail."""
    out_dir.parent.mkdir(exist_ok=True)
    (out_dir.parent / "reward.py").write_text(BRIEF)
    base = start / f"full_sft_32{'_moe' if flags.get('use_moe') else ''}.pth"
    values = {
        "data_path": start / "prompts.jsonl", "base_weight": base, "batch_size": 2, "prompts_per_step": 2,
        "group_size": 4, "max_new_tokens": 8, "max_steps": 4, "epochs": 100,
        "reward": f"python:{out_dir.parent / 'reward.py'}:brief",
    }  # fmt: skip
    values |= flags
    return tiny_flags(out_dir, values.pop("data_path"), **values)


def test_a_run_learns_what_is_rewarded(train, start, tmp_path):
    """Short texts are rewarded and come; the log-probs of sampling and of training agree."""
    flags = {"max_steps": 30, "learning_rate": 2e-2, "valid_path": start / "prompts.jsonl", "eval_samples": 2}
    train("train_grpo", grpo_flags(start, tmp_path / "out", prompts_per_step=4, group_size=8, **flags))
    log = read_log(tmp_path / "out", "grpo_32")
    assert len(log) == 30 and all(record["groups_taught"] > 0.5 for record in log)
    assert all(record["reward"] == record["reward_brief"] < 0 for record in log)
    first, last = (np.mean([record["reward"] for record in part]) for part in (log[:4], log[-4:]))
    assert last > first + 1  # characters
    # both compute the same float32 numbers in another order; k3 is the square of the difference
    assert all(abs(record["rollout_kl"]) < 1e-6 and record["entropy"] > 0 for record in log)
    (evaluation,) = read_log(tmp_path / "out", "grpo_32", "evaluation")
    assert evaluation["pass_at_1"] == evaluation["pass_at_2"] == 0 and 0 < evaluation["answer_tokens"] <= 8
    # next to the weights stand those of the last step and the held-out ones, each under its own name
    kept = json.loads((tmp_path / "out" / "grpo_32.json").read_text("utf-8"))["metrics"]
    for name in ("reward_brief", "finished"):
        assert (kept[name], kept[f"valid_{name}"]) == (log[-1][name], evaluation[name])


@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "grpo", "beta": 0.1, "updates": 2},
        {"loss": "cispo", "use_moe": True, "temperature": 0.7},
        {"lora_rank": 2, "beta": 0.1},
    ],
    ids=["two updates and a reference", "mixture", "adapter"],
)
def test_a_run_that_stopped_in_its_answers_resumes_to_the_same_bits(train, launcher, start, tmp_path, flags):
    """Stopped by a reward that fails while the third step's answers are scored; and nothing else is left behind."""
    flags = flags | {"save_interval": 1}
    train("train_grpo", grpo_flags(start, tmp_path / "whole", **flags))
    (tmp_path / "fail").touch()
    child = launcher.start("train_grpo", grpo_flags(start, tmp_path / "parts", **flags))
    assert child.wait() == 1
    assert "reward brief failed on the prompt '天气' (OSError: the disk is gone)" in child.output
    name = f"grpo_32{'_moe' if flags.get('use_moe') else ''}"
    assert read_resume(tmp_path / "parts", name)["progress"]["step"] == 2
    (tmp_path / "fail").unlink()
    # how the held-out answers are sampled changes nothing in training
    train("train_grpo", grpo_flags(start, tmp_path / "parts", resume=True, eval_samples=2, **flags))
    whole, parts = read_resume(tmp_path / "whole", name), read_resume(tmp_path / "parts", name)
    for part in ("model", "optimizer", "progress"):
        assert_identical(parts[part], whole[part])
    assert not list(tmp_path.rglob("*.tmp"))
    # sampling and training agree about every token, whatever the temperature
    assert all(abs(record["rollout_kl"]) < 1e-6 for record in read_log(tmp_path / "whole", name))


def signalled_in_the_third_steps_answers(module, number: int = signal.SIGTERM) -> None:
    submit, requests = rollouts.RolloutEngine.submit, []

    def counted(self, *arguments):
        requests.append(submit(self, *arguments))
        if len(requests) == 2 * 8 + 3:
            os.kill(os.getpid(), number)
        return requests[-1]

    rollouts.RolloutEngine.submit = counted


def test_a_signal_ends_the_sampling_and_the_run_resumes_to_the_same_bits(train, launcher, start, tmp_path):
    flags = grpo_flags(start, tmp_path / "parts")
    child = launcher.start("train_grpo", flags, patches=[signalled_in_the_third_steps_answers])
    assert child.wait() == 128 + signal.SIGTERM and "stopped after step 2; saved" in child.output
    train("train_grpo", [*flags, "--resume"])
    train("train_grpo", grpo_flags(start, tmp_path / "whole"))
    ours, theirs = (read_resume(tmp_path / name, "grpo_32") for name in ("parts", "whole"))
    assert_identical(ours, theirs)


def test_a_run_killed_in_its_answers_leaves_nothing_behind(launcher, start, tmp_path):
    """No process, no half-written file; what it leaves is what a resumed run needs and overwrites."""
    flags = grpo_flags(start, tmp_path / "out", save_interval=1)
    killed = functools.partial(signalled_in_the_third_steps_answers, number=signal.SIGKILL)
    child = launcher.start("train_grpo", flags, patches=[killed])
    assert child.wait() == -signal.SIGKILL, child.output
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    left = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    launcher.run("train_grpo", [*flags, "--resume"])
    assert left == {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}


def test_an_adapter_and_its_reference_share_the_base():
    model = sharp_model().eval()
    ids = torch.arange(12).view(1, 12)
    before = model(ids).logits
    reference, other = rollouts.starting_point(model, share=True), rollouts.starting_point(model, share=False)
    apply_lora(model, 2)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora.B.weight)
    assert not torch.allclose(model(ids).logits, before)
    mine = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in reference.parameters()} <= mine
    assert not {p.data_ptr() for p in other.parameters()} & mine
    for same in (reference, other):
        torch.testing.assert_close(same(ids).logits, before)


def test_an_adapter_is_saved_merged(train, start, tmp_path):
    train("train_grpo", grpo_flags(start, tmp_path / "out", lora_rank=2, learning_rate=1e-2))
    saved, base = (
        torch.load(path, weights_only=True) for path in (tmp_path / "out/grpo_32.pth", start / "full_sft_32.pth")
    )
    assert saved.keys() == base.keys()
    embedding, matrix = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(saved[embedding], base[embedding]) and not torch.equal(saved[matrix], base[matrix])


def test_an_estimate_times_whole_steps_and_keeps_nothing(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(estimate, "SECONDS", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = grpo_flags(start, tmp_path / "out", max_steps=50, save_interval=1)
    estimate.run_or_estimate(train_grpo.main, [*flags, "--estimate"])
    shown = capfd.readouterr().out
    assert "this machine" in shown and re.search(r"tokens in 50 steps", shown)
    (file,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    record = json.loads(file.read_text("utf-8"))
    assert record["steps"] == 50 and record["timed"] >= 4 and record["seconds"] > 0


@pytest.mark.full
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_trains_as_ddp_does(launcher, start, tmp_path, zero_stage):
    pytest.importorskip("deepspeed")
    for name, flags in (("ddp", {}), ("zero", {"zero_stage": zero_stage})):
        launcher.run("train_grpo", grpo_flags(start, tmp_path / name, **flags), 2, 400)
    for ours, theirs in zip(*(read_log(tmp_path / name, "grpo_32") for name in ("zero", "ddp")), strict=True):
        assert ours["reward"] == theirs["reward"] and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


# --- tools -----------------------------------------------------------------------------------------------------------


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


QUESTION = [
    {"role": "system", "content": "算", "tools": [TOOLS["calculator"], TOOLS["text_length"]]},
    {"role": "user", "content": "17×23"},
]
# two steps, the first with two calls, one of them to a tool that is not offered
STEPS = [
    *QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [call("calculator", expression="17*23"), call("clock")]},
    {"role": "tool", "content": "391"},
    {"role": "tool", "content": "error: there is no tool 'clock'; tools: calculator, text_length"},
    {"role": "assistant", "content": "再", "tool_calls": [call("text_length", text="391")]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "391"},
]


class ScriptedEngine:
    """Says what the model says in STEPS, token by token, within the tokens that each request may have."""

    def __init__(self, tokenizer):
        self.seeds, said = [], [turn for turn in STEPS[len(QUESTION) :] if turn["role"] == "assistant"]
        self.script = []
        for number, turn in enumerate(STEPS):
            if turn in said:
                before = tokenizer.encode_prompt(STEPS[:number])
                ids = tokenizer.encode_conversation(STEPS[: number + 1])[0][len(before) :]
                self.script.append((before, ids[: ids.index(tokenizer.eos_id) + 1]))

    def __call__(self, model, slots, context_length, max_queue):
        self.left = list(self.script)
        return self

    def submit(self, ids, params):
        before, answer = self.left.pop(0)
        assert ids == before  # what a chat would send
        self.seeds.append(params.seed)
        finish_reason = "stop" if len(answer) <= params.max_new_tokens else "length"
        tokens = [SimpleNamespace(id=i, logprob=-1.0) for i in answer[: params.max_new_tokens]]

        class Answer(list):
            pass

        request = Answer(tokens)
        request.finish_reason = finish_reason
        return request


def scripted_answer(tokenizer, tmp_path, monkeypatch, **flags):
    """(the rollout, seeds of its segments)"""
    path = write_jsonl(tmp_path / "tools.jsonl", [{"conversations": QUESTION, "answer": "391"}])
    args = {"reward": "number", "skip_bad_lines": False, "max_new_tokens": 200, "max_seq_len": 700, "temperature": 1.0}
    args |= {"prompts_per_step": 1, "group_size": 2, "batch_size": 1, "epochs": 1, "max_steps": 0}
    args |= {"max_record_bytes": 1 << 20} | flags
    sampler = rollouts.Sampler(path, argparse.Namespace(**args), tokenizer, ALONE)
    engine = ScriptedEngine(tokenizer)
    monkeypatch.setattr(rollouts, "RolloutEngine", engine)
    (rollout,) = sampler._answers(None, [(0, 7)], sampler.params)
    return rollout, engine.seeds


def test_results_of_tools_are_read_and_not_learned(tokenizer, tmp_path, monkeypatch):
    """The ids and the mask of an answer with calls are those of the same conversation in SFT."""
    rollout, seeds = scripted_answer(tokenizer, tmp_path, monkeypatch)
    ids, mask = tokenizer.encode_conversation(STEPS)
    end = len(ids) - ids[::-1].index(tokenizer.eos_id)  # the template goes on with a line break
    assert rollout.ids == ids[:end] and rollout.learned == mask[:end]
    assert rollout.length == sum(mask) and rollout.finished and rollout.calls == 3
    assert rollout.text == "391" and rollout.rewards == {"number": 1.0}
    assert seeds[0] == 7 and len(set(seeds)) == 3
    assert scripted_answer(tokenizer, tmp_path, monkeypatch)[1] == seeds


def test_only_an_answers_own_turns_count_against_the_calls(tokenizer, tmp_path, monkeypatch):
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3
    monkeypatch.setitem(globals(), "QUESTION", [QUESTION[0], *earlier, QUESTION[1]])
    monkeypatch.setitem(globals(), "STEPS", [*QUESTION, *STEPS[2:]])
    for most, finished in ((2, True), (1, False)):
        monkeypatch.setattr(rollouts, "MOST_CALLING_TURNS", most)
        rollout, _ = scripted_answer(tokenizer, tmp_path, monkeypatch, max_seq_len=900)
        assert rollout.finished == finished


def test_max_steps_shortens_a_run_and_never_lengthens_it(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"conversations": QUESTION[1:], "answer": "391"}] * 3)
    args = {"reward": "number", "skip_bad_lines": False, "max_new_tokens": 9, "max_seq_len": 99, "temperature": 1.0}
    args |= {"prompts_per_step": 1, "group_size": 2, "batch_size": 1, "epochs": 2, "max_record_bytes": 1 << 20}
    for max_steps, total in ((0, 6), (4, 4), (9, 6)):
        flags = argparse.Namespace(**args, max_steps=max_steps)
        assert rollouts.Sampler(path, flags, tokenizer, ALONE).total_steps == total


@pytest.mark.parametrize("missing", ["max_new_tokens", "max_seq_len"])
def test_an_answer_without_room_after_a_call_is_not_finished(tokenizer, tmp_path, monkeypatch, missing):
    engine = ScriptedEngine(tokenizer)
    prompt, first = engine.script[0]
    longest = {"max_new_tokens": len(first), "max_seq_len": len(prompt) + len(first) + 10}
    flags = {"max_new_tokens": len(first)} | {missing: longest[missing]}
    rollout, _ = scripted_answer(tokenizer, tmp_path, monkeypatch, **flags)
    assert rollout.ids == prompt + first and not rollout.finished and rollout.rewards == {"number": 0.0}


class EagerSplitter:
    """Takes three texts of four for calls, so that a model that has learned nothing calls too."""

    def push(self, text: str) -> list:
        return [ToolCall("text_length", json.dumps({"text": text})) if len(text) % 4 else text]

    def flush(self) -> list:
        return []


class Ending:
    """Ends an answer after some tokens: a model that has learned nothing never does. It does not change log-probs."""

    def __init__(self, left: int):
        self.left = left

    def allowed(self, vocab_size: int) -> torch.Tensor:
        ids = torch.arange(vocab_size)
        return ids == 2 if self.left <= 0 else ids != 2

    def advance(self, token_id: int) -> None:
        self.left -= 1


class EndingEngine(rollouts.RolloutEngine):
    def submit(self, prompt_ids, params):
        return super().submit(prompt_ids, replace(params, grammar=lambda: Ending(params.seed % 12)))


def test_a_run_with_tools_resumes_to_the_same_bits(train, start, tmp_path, monkeypatch):
    """It stops while the answers of its third step are scored."""
    monkeypatch.setattr(rollouts, "ToolCallSplitter", EagerSplitter)
    monkeypatch.setattr(rollouts, "RolloutEngine", EndingEngine)
    turns = [{"role": "system", "content": "a", "tools": [{"function": {"name": "text_length"}}]}, *QUESTION[1:]]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"conversations": turns, "answer": "1"}] * 3)
    flags = {"data_path": prompts, "max_seq_len": 256, "max_new_tokens": 40, "save_interval": 1, "temperature": 0.8}
    train("train_grpo", grpo_flags(start, tmp_path / "whole", **flags))
    (tmp_path / "fail").touch()
    with pytest.raises(ValueError, match="the disk is gone"):
        train("train_grpo", grpo_flags(start, tmp_path / "parts", **flags))
    (tmp_path / "fail").unlink()
    train("train_grpo", grpo_flags(start, tmp_path / "parts", resume=True, **flags))
    whole, parts = (read_resume(tmp_path / folder, "grpo_32") for folder in ("whole", "parts"))
    for part in ("model", "optimizer", "progress"):
        assert_identical(parts[part], whole[part])
    log = read_log(tmp_path / "whole", "grpo_32")
    assert all(record["tool_calls"] > 0.5 and record["finished"] > 0.5 for record in log)
    assert all(abs(record["rollout_kl"]) < 1e-6 for record in log)


@pytest.mark.full
@pytest.mark.parametrize("use_moe", [False, True])
def test_two_processes_train_as_one(launcher, start, tmp_path, use_moe):
    flags = {"use_moe": use_moe, "optimizer": "sgd", "learning_rate": 0.1}
    for world_size in (1, 2):
        launcher.run("train_grpo", grpo_flags(start, tmp_path / str(world_size), **flags), world_size)
    name = f"grpo_32{'_moe' if use_moe else ''}"
    one, two = (read_resume(tmp_path / world, name)["model"] for world in "12")
    assert relative_error(two, one) < 1e-5
    for ours, theirs in zip(read_log(tmp_path / "2", name), read_log(tmp_path / "1", name), strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"])


@pytest.mark.full
@pytest.mark.parametrize("flag", ["data_path", "valid_path"])
def test_processes_with_other_prompts_are_refused(launcher, start, tmp_path, flag):
    lines, other = (start / "prompts.jsonl").read_text().splitlines(keepends=True), tmp_path / "other.jsonl"
    other.write_text("".join(lines[1:]))
    flags = {"valid_path": start / "prompts.jsonl"}
    commands = [grpo_flags(start, tmp_path / "0", **flags), grpo_flags(start, tmp_path / "1", **flags | {flag: other})]
    children = launcher.start_ranks(2, "train_grpo", commands)
    assert [child.wait() for child in children] == [1, 1]
    for child in children:
        assert f"prompts is {len(lines)} in process 0, {len(lines) - 1} in 1" in child.output, child.output


@pytest.mark.parametrize(
    ("line", "flags", "message"),
    [
        ('{"conversations": [{"role": "user", "content": "a"}]}', {}, '"answer" is missing'),
        ('{"conversations": [{"role": "user", "content": "a"}], "answer": " "}', {}, '"answer" is empty'),
        ("", {}, "holds no prompt"),
        (None, {"max_record_bytes": 20}, "line 1: longer than --max_record_bytes 20"),
        (None, {"group_size": 1}, "--group_size 1: must be at least 2"),
        (None, {"temperature": 0}, "--temperature 0.0: must be above 0"),
        (None, {"max_new_tokens": 60}, "--max_seq_len"),
        (None, {"accumulation_steps": 2}, "--accumulation_steps 2"),
        (None, {"prompts_per_step": 10**9}, "--prompts_per_step 1000000000: far more than "),
        (None, {"group_size": 10**9}, "--group_size 1000000000: far more than "),
        (None, {"reward": "judge"}, "--reward judge"),
        (None, {"reward": "number", "data_path": "nothing.jsonl"}, "nothing.jsonl"),
    ],
)
def test_bad_input_is_named(train, start, tmp_path, line, flags, message):
    if line is not None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(line + "\n")
        flags = {"data_path": path}
    with pytest.raises(ValueError) as error:
        train("train_grpo", grpo_flags(start, tmp_path, **flags))
    assert message in str(error.value).replace("key ", "")
    assert not (tmp_path / "grpo_32.pth").exists()
