"""Speed of DPO, LoRA and GRPO on this machine next to the libraries that people usually take.

  dpo   pairs per second of a DPO step, next to TRL's DPOTrainer as people run it (`trainer.train()`): with a reference
        model in memory, its default, and with the reference's log-probs computed before training
  lora  useful tokens (no padding) per second of a LoRA step, next to peft with each conversation as a row of a batch
        padded to its longest: as many conversations as ours has rows, and about as many tokens as ours has
  grpo  answers per second, while sampling and in whole steps, next to TRL's GRPOTrainer, which samples with
        transformers' generate; and the peak memory of a step next to that of an SFT step on rows of the same size.
        The model is not trained, so almost all answers run to their longest; float32 on a CPU

The peers train transformers' LlamaForCausalLM of the same size from the same weights, on the same records in the same
order, under bfloat16 autocast, with a fused AdamW and without gradient checkpointing. Every contender is a process of
its own. They are timed in turn, round by round; a ratio is that of one round, the median over rounds.

    python benchmarks/stage_throughput.py [--what dpo|lora|grpo] [--data_path FILE.jsonl] [--rounds 3]

Needs trl and peft (requirements-dev.txt). Without --data_path the records are those of dataset/sample/sft.jsonl, which
are short: pairs of an answer and the answer to another question, conversations as they are.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peers
from benchmarks.lab.estimate_check import preferences
from benchmarks.peers import endless, machine, synchronize
from dataset.lm_dataset import parse_record
from dataset.tokenization import ChatTokenizer
from model.flags import at_least
from model.model_lora import TARGETS
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights
from trainer.arguments import run_script, stage_parser
from trainer.cost import Memory
from trainer.distributed import Process, keep_freed_memory
from trainer.loader import PackedData
from trainer.logger import Logger
from trainer.optimization import Precision
from trainer.rollouts import Sampler
from trainer.token_losses import answer_log_probs, forward_losses

BETA, RANK, LEARNING_RATE = 0.1, 8, 1e-6
PROMPTS, GROUP, ANSWER = 8, 8, 64  # of a GRPO step: prompts, answers to each, tokens of an answer
EPOCHS = 2  # of train_dpo.py's default: the reference is asked once for all of them
WARM_STEPS = 2
StepDone = Callable[[int], None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", choices=("dpo", "lora", "grpo", "all"), default="all")
    add("--data_path", type=Path, help="pairs for dpo, conversations otherwise (default: from dataset/sample/)")
    add("--hidden_size", type=int, default=512)
    add("--num_hidden_layers", type=int, default=8)
    add("--num_attention_heads", type=int, default=8)
    add("--num_key_value_heads", type=int, default=2)
    add("--batch_size", type=int, help="pairs (default: 4) or rows (default: 8) in a step, for grpo in a micro-batch")
    add("--max_seq_len", type=int, help="default: 1024 for dpo, 512 otherwise")
    add("--rounds", type=at_least(1), default=3)
    add("--steps", type=at_least(1), default=3, help="optimizer steps per contender and round (default: %(default)s)")
    add("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="append the numbers to this file, one line of JSON for each part")
    args = parser.parse_args(argv)
    if args.data_path and args.what == "all":
        raise ValueError("--data_path: choose one part with --what; they take different records")
    return args


# --- what all contenders share ---------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, folder: Path, data_path: Path, what: str) -> argparse.Namespace:
    """Return the flags that the trainer's helpers read, as a stage script would have them."""
    flags = vars(stage_parser("").parse_args([])) | vars(args)
    flags |= {
        "batch_size": args.batch_size or {"dpo": 4}.get(what, 8), "folder": folder, "data_path": data_path,
        "max_seq_len": args.max_seq_len or {"dpo": 1024}.get(what, 512), "weights": folder / f"{what}.pth",
        "cache_dir": folder / "token_cache", "accumulation_steps": 1, "optimizer": "adamw",
        "learning_rate": LEARNING_RATE, "weight_decay": 0.0, "threads": torch.get_num_threads(),
        "dtype": "float32" if what == "grpo" and args.device == "cpu" else "bfloat16",
    }  # fmt: skip
    return argparse.Namespace(**flags)


def config_of(args: argparse.Namespace, tokenizer: ChatTokenizer) -> MiniMindConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return MiniMindConfig(vocab_size=tokenizer.vocab_size, **{name: getattr(args, name) for name in names})


def process_of(args: argparse.Namespace) -> Process:
    return Process(rank=0, local_rank=0, world_size=1, device=torch.device(args.device))


def llama(args: argparse.Namespace, tokenizer: ChatTokenizer) -> nn.Module:
    """transformers' Llama with the weights that ours starts from."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    return peers.llama(config_of(args, tokenizer), torch.load(args.weights, weights_only=True), **ids)


def make_weights(args: argparse.Namespace, tokenizer: ChatTokenizer) -> None:
    torch.manual_seed(0)
    save_weights(args.weights, MiniMindForCausalLM(config_of(args, tokenizer)), {"tokenizer_sha256": tokenizer.sha256})


# --- contenders: each trains until step_done, called with a step's pairs or tokens, raises EndOfTurns -----------------


class EndOfTurns(Exception):
    """The last round is over."""


@torch.no_grad()
def reference_steps(args: argparse.Namespace, tokenizer: ChatTokenizer, step_done: StepDone) -> None:
    """Do what train_dpo.py does once before it trains: the reference's log-probs of a batch."""
    process, precision = process_of(args), Precision(args.dtype, torch.device(args.device))
    model = MiniMindForCausalLM(config_of(args, tokenizer)).to(process.device).eval()
    for batch in endless(PackedData(args, "preference", tokenizer, process).once):
        with precision.autocast():
            log_probs, _ = answer_log_probs(forward_losses(model, batch)[0], batch)
        step_done(len(log_probs))


def trl_trainer(method: str, args: argparse.Namespace, tokenizer: ChatTokenizer, callback, records, options, **more):
    """Return TRL's trainer of a method, DPO or GRPO, that calls back after each optimizer step."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    logging.set_verbosity_error()

    class OneStep(TrainerCallback):
        def on_step_end(self, *_, **__):
            callback()

    on_cpu = args.device == "cpu"
    config = getattr(trl, f"{method}Config")(
        output_dir=str(args.folder / "trl"), learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
        max_grad_norm=args.grad_clip, num_train_epochs=1000, use_cpu=on_cpu, bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False, optim="adamw_torch_fused", dataloader_pin_memory=not on_cpu,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    return getattr(trl, f"{method}Trainer")(
        model=llama(args, tokenizer),
        args=config,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(tokenizer.path),
        callbacks=[OneStep()],
        **more,
    )


def trl_dpo_steps(args: argparse.Namespace, tokenizer: ChatTokenizer, step_done: StepDone, precompute: bool) -> None:
    """Run TRL's DPOTrainer with its own loop."""
    pairs = [parse_record("preference", line) for line in args.data_path.read_text("utf-8").splitlines()]
    records = [{"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]} for chosen, rejected in pairs]
    options = {
        "per_device_train_batch_size": args.batch_size, "beta": BETA, "precompute_ref_log_probs": precompute,
        "max_length": args.max_seq_len + 1,  # ours counts inputs, without the last label
        "train_sampling_strategy": "sequential", "dataloader_drop_last": True,
    }  # fmt: skip
    reference = None if precompute else llama(args, tokenizer)
    step = functools.partial(step_done, args.batch_size)
    trainer = trl_trainer("DPO", args, tokenizer, step, records, options, ref_model=reference)
    assert not trainer.model.is_gradient_checkpointing  # TRL's default is on
    trainer.train()


def peft_steps(args: argparse.Namespace, tokenizer: ChatTokenizer, step_done: StepDone, equal_tokens: bool) -> None:
    """peft on the same model, batches padded to their longest conversation, labels on the answers."""
    from peft import LoraConfig, get_peft_model

    options = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": list(TARGETS)}
    model = get_peft_model(llama(args, tokenizer), LoraConfig(task_type="CAUSAL_LM", **options))
    model = model.to(args.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    per_batch, longest = args.batch_size, args.max_seq_len + 1
    lines = args.data_path.read_text("utf-8").splitlines()
    encoded = [tokenizer.encode_conversation(parse_record("conversation", line)) for line in lines]
    documents = [(torch.tensor(ids[:longest]), torch.tensor(mask[:longest]).bool()) for ids, mask in encoded]
    if equal_tokens:
        plan = PackedData(args, "conversation", tokenizer, process_of(args)).plan
        per_batch = max(round(per_batch * plan.stats["segments"] / plan.num_rows), 1)

    def padded_batches() -> Iterator[dict]:
        pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
        for first in range(0, len(documents) + 1 - per_batch, per_batch):
            batch = documents[first : first + per_batch]
            yield {
                "input_ids": pad([ids for ids, _ in batch], padding_value=tokenizer.pad_id),
                "labels": pad([ids.masked_fill(~mask, -100) for ids, mask in batch], padding_value=-100),
                "attention_mask": pad([torch.ones_like(ids) for ids, _ in batch]),
            }

    for batch in endless(padded_batches):
        batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(args.device.split(":")[0], torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step_done(int(batch["attention_mask"].sum()) - len(batch["input_ids"]))  # inputs, as ours counts them


def stage_steps(args: argparse.Namespace, tokenizer: ChatTokenizer, step_done: StepDone, stage: str, sampling=False):
    """Run the stage's script, and count pairs, answers or useful tokens.

    sampling: only ever sample the answers of the first step.
    """
    script, answers, log = importlib.import_module(f"trainer.train_{stage}"), Sampler._answers, Logger.step
    shared = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads batch_size max_seq_len device"
    flags = {name: vars(args)[name] for name in (*shared.split(), "cache_dir", "data_path", "dtype", "optimizer")}
    flags |= {"epochs": 1000, "learning_rate": LEARNING_RATE, "log_interval": 1000, "accumulation_steps": 1}
    flags |= {"save_interval": 10**6, **{"dpo": {"beta": BETA}, "lora": {"lora_rank": RANK}}.get(stage, {})}
    flags |= {"out_dir": args.folder / f"out_{os.getpid()}", "base_weight": args.weights}
    if stage == "grpo":
        reward = f"python:{args.folder / 'reward.py'}:length"
        flags |= {"prompts_per_step": PROMPTS, "group_size": GROUP, "max_new_tokens": ANSWER, "reward": reward}
        flags["data_path"] = sample_prompts(args)

    def sample_forever(*arguments):
        while True:
            step_done(len(answers(*arguments)))

    def log_step(*arguments, **named):
        log(*arguments, **named)
        batch = arguments[-1]
        step_done({"grpo": PROMPTS * GROUP, "dpo": args.batch_size}.get(stage, batch["step_tokens"]))

    Logger.step = log_step
    Sampler._answers = sample_forever if sampling else answers
    script.main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])


def trl_grpo_steps(args: argparse.Namespace, tokenizer: ChatTokenizer, step_done: StepDone, sampling: bool) -> None:
    """Run TRL's GRPOTrainer with its own loop. sampling: only ever sample the answers of the first step."""
    asked = [json.loads(line)["conversations"] for line in sample_prompts(args).read_text("utf-8").splitlines()]
    options = {
        "per_device_train_batch_size": PROMPTS * GROUP, "num_generations": GROUP, "max_completion_length": ANSWER,
        "beta": 0.0, "loss_type": "dr_grpo", "temperature": 1.0,
    }  # fmt: skip

    def lengths(completions, **_) -> list[float]:
        return [float(len(turns[0]["content"])) for turns in completions]

    step, records = functools.partial(step_done, PROMPTS * GROUP), [{"prompt": turns} for turns in asked]
    trainer = trl_trainer("GRPO", args, tokenizer, step, records, options, reward_funcs=lengths)
    generate = trainer.model.generate

    def sample_forever(*arguments, **named):
        while True:
            step_done(len(generate(*arguments, **named)))

    trainer.model.generate = sample_forever if sampling else generate
    trainer.train()


# --- contenders in processes -----------------------------------------------------------------------------------------


class Turns:
    """The contender's side of the pipe: counts steps, and waits between rounds."""

    def __init__(self, connection, args: argparse.Namespace):
        self.connection, self.args = connection, args
        self.steps_left, self.done, self.started = WARM_STEPS, 0, time.perf_counter()

    def step_done(self, amount: int) -> None:
        self.done += amount
        self.steps_left -= 1
        if self.steps_left == 0:
            synchronize(self.args.device)
            self.connection.send((self.done, time.perf_counter() - self.started))
            self.steps_left, self.done = self.connection.recv(), 0
            if not self.steps_left:
                raise EndOfTurns
            self.started = time.perf_counter()


CONTENDERS = {
    "ours": functools.partial(stage_steps, stage="dpo"),
    "ours, log-probs of the reference": reference_steps,
    "TRL, reference in memory": functools.partial(trl_dpo_steps, precompute=False),
    "TRL, log-probs beforehand": functools.partial(trl_dpo_steps, precompute=True),
    "ours, packed rows": functools.partial(stage_steps, stage="lora"),
    "peft, as many rows": functools.partial(peft_steps, equal_tokens=False),
    "peft, as many tokens": functools.partial(peft_steps, equal_tokens=True),
    "ours, sampling": functools.partial(stage_steps, stage="grpo", sampling=True),
    "TRL, sampling": functools.partial(trl_grpo_steps, sampling=True),
    "ours, whole steps": functools.partial(stage_steps, stage="grpo"),
    "TRL, whole steps": functools.partial(trl_grpo_steps, sampling=False),
    "ours, SFT": functools.partial(stage_steps, stage="full_sft"),
}


def contend(connection, name: str, args: argparse.Namespace) -> None:
    """Run a process: two steps to warm up, then rounds as the other side asks for them."""
    torch.set_num_threads(args.threads)
    os.environ["HF_HOME"] = str(args.folder / "hf")
    memory = Memory(args.device)
    try:
        keep_freed_memory()
        before = memory.peak()
        CONTENDERS[name](args, ChatTokenizer(ROOT / "model"), step_done=Turns(connection, args).step_done)
    except EndOfTurns:
        connection.send(memory.peak() - before)
    except Exception:
        connection.send(traceback.format_exc())


def measure_rounds(names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return what each contender does per second, a number for each round."""
    context = multiprocessing.get_context("spawn")
    connections, children = {}, []
    for name in names:
        connections[name], other = context.Pipe()
        children.append(context.Process(target=contend, args=(other, name, args), daemon=True))
        children[-1].start()
        other.close()
        _, seconds = receive(name, connections[name])  # one after the other, so that no one is disturbed
        print(f"{name}: warm after {seconds:.0f} s", flush=True)
    rates = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, connection in connections.items():
            connection.send(args.steps)
            done, seconds = receive(name, connection)
            rates[name].append(done / seconds)
    for name, connection in connections.items():
        connection.send(0)
        print(f"{name}: {receive(name, connection) / 1e6:,.0f} MB at its peak, the model included", flush=True)
    for child in children:
        child.join(30)
    return rates


def receive(name: str, connection) -> tuple[int, float] | int:
    try:
        message = connection.recv()
    except EOFError:
        message = "its process ended"
    if isinstance(message, str):
        raise ValueError(f"{name} failed:\n{message}")
    return message


# --- the parts -------------------------------------------------------------------------------------------------------


def sample_prompts(args: argparse.Namespace) -> Path:
    """Write short prompts and a reward that differs from answer to answer; return the prompts' path."""
    turns = [parse_record("conversation", line)[:1] for line in args.data_path.read_text("utf-8").splitlines()]
    prompts = [{"conversations": asked, "answer": "1"} for asked in turns if len(asked[0]["content"]) < 40]
    path = args.folder / f"prompts_{os.getpid()}.jsonl"
    path.write_text("".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts), encoding="utf-8")
    (args.folder / "reward.py").write_text("def length(answer, record):\n    return float(len(answer))\n")
    return path


def shuffled_copy(path: Path, source: Path, kind: str, args: argparse.Namespace) -> Path:
    """Return the records in a random order, so that a few steps see what is typical.

    Of pairs only as many as are trained on, for TRL asks the reference about all; and such as every contender takes.
    """
    lines = [line for line in source.read_text("utf-8").splitlines() if line.strip()]
    random.Random(1).shuffle(lines)
    if kind == "preference":
        tokenizer, kept = ChatTokenizer(ROOT / "model"), []
        for line in lines:
            chosen, rejected = parse_record(kind, line)
            prompt = len(tokenizer.encode_prompt(chosen[:-1]))
            if chosen[:-1] == rejected[:-1] and chosen[-1]["role"] == "assistant" and prompt < args.max_seq_len:
                kept.append(line)
        lines = kept[: args.batch_size * (WARM_STEPS + args.rounds * args.steps)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def print_rates(rates: dict[str, list[float]], first: str, unit: str) -> dict:
    table = {}
    print(f"{'':36}{unit:>16}  {'ours is faster by':>18}")
    for name, rounds in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates[first], rounds, strict=True))
        table[name] = {"rate": statistics.median(rounds), "ratio": ratio, "rounds": rounds}
        print(f"{name:36}{statistics.median(rounds):16,.2f}  {ratio:17.2f}×")
    return table


def compare_dpo(args: argparse.Namespace) -> dict:
    names = list(CONTENDERS)[:4]
    rates = measure_rounds(names, args)
    asked = rates.pop("ours, log-probs of the reference")
    # a pair is trained on EPOCHS times and the reference asked once
    whole = [1 / (1 / step + 1 / (EPOCHS * once)) for step, once in zip(rates["ours"], asked, strict=True)]
    rates = {"ours": rates.pop("ours"), f"ours, reference of {EPOCHS} epochs included": whole} | rates
    print(f"\nDPO, {args.batch_size} pairs a step, at most {args.max_seq_len} tokens, {args.data_path.name}")
    return print_rates(rates, "ours", "pairs/s")


def compare_lora(args: argparse.Namespace) -> dict:
    rates = measure_rounds(list(CONTENDERS)[4:7], args)
    print(f"\nLoRA, rank {RANK}, {args.batch_size} rows of {args.max_seq_len}, {args.data_path.name}")
    return print_rates(rates, "ours, packed rows", "useful tokens/s")


def compare_grpo(args: argparse.Namespace) -> dict:
    rates = measure_rounds(list(CONTENDERS)[7:], args)
    rates.pop("ours, SFT")
    width = args.num_key_value_heads * args.hidden_size // args.num_attention_heads
    cache = 8 * args.num_hidden_layers * width  # bytes of a token in float32
    print(f"\nGRPO, {PROMPTS} × {GROUP} answers of {ANSWER} tokens a step; the cache takes {cache:,} bytes a token")
    table = {}
    for kind in ("sampling", "whole steps"):
        both = {name: rounds for name, rounds in rates.items() if name.endswith(kind)}
        table |= print_rates(both, f"ours, {kind}", "answers/s")
    return table


PARTS = {"dpo": compare_dpo, "lora": compare_lora, "grpo": compare_grpo}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tokenizer = ChatTokenizer(ROOT / "model")
    for what in PARTS if args.what == "all" else (args.what,):
        with tempfile.TemporaryDirectory(prefix="stage_throughput_") as name:
            folder = Path(name)
            source = args.data_path or ROOT / "dataset/sample/sft.jsonl"
            if what == "dpo" and not args.data_path:
                source = preferences(source, folder / "pairs.jsonl")
            (folder / "data").mkdir()
            part = settings(args, folder, folder / "data" / source.name, what)
            shuffled_copy(part.data_path, source, "preference" if what == "dpo" else "conversation", part)
            make_weights(part, tokenizer)
            table = PARTS[what](part)
        if args.json:
            flags = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
            record = {"what": what, "flags": flags, "machine": machine(args.device), "table": table}
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine(args.device).items()))


if __name__ == "__main__":
    run_script(main)
