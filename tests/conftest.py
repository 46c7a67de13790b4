"""Small data, small models, and ways to run a training script: in this process, or as one that can be killed."""

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from dataset.tokenization import ChatTokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]
# what a developer has set for other programs; the tests' own servers are on this machine
for name in ("MINIMIND_API_KEY", "OPENAI_API_KEY", "WANDB_MODE", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
WORDS = "the sky was grey and an old king read by his fire 今天 天气 很好 我们 去 公园 看 花 and then it rained".split()
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_seq_len": 64,
    "batch_size": 4,
    "accumulation_steps": 1,
    "learning_rate": 2e-3,
    "epochs": 1,
    "dtype": "float32",
    "device": "cpu",
    "log_interval": 1,
    "save_interval": 1000,
}


# --- tools: what conversations offer and dataset/tools.py runs -------------------------------------------------------


def _schema(name: str, description: str, required: list[str], **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    tool["function"]["name"]: tool
    for tool in (
        _schema("calculator", "Work out an arithmetic expression", ["expression"], expression={"type": "string"}),
        _schema(
            "convert_units", "Convert a quantity to another unit", ["value", "source", "target"],
            value={"type": "number"}, source={"type": "string"}, target={"type": "string"},
        ),
        _schema("clock", "Tell the date and time", [], timezone_hours={"type": "number"}),
        _schema("text_length", "Count the characters of a text", ["text"], text={"type": "string"}),
    )
}  # fmt: skip


# --- flags and data --------------------------------------------------------------------------------------------------


def tiny_flags(out_dir: Path, data_path: Path, **flags) -> list[str]:
    """A command line for a run of seconds."""
    values = TINY | {"out_dir": out_dir, "data_path": data_path} | flags
    return [f"--{name}={value}" for name, value in values.items()]


def sentence(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_texts(path: Path, count: int = 40, longest: int = 60, seed: int = 0) -> Path:
    """Pretraining documents; some are longer than a row of 64."""
    rng = random.Random(seed)
    return write_jsonl(path, [{"text": sentence(rng, longest)} for _ in range(count)])


def write_conversations(path: Path, count: int = 40, longest: int = 20, exchanges: int = 2, seed: int = 0) -> Path:
    """Conversations of one or two exchanges; some are longer than a row of 64, but none of one short exchange is."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        turns = []
        for _ in range(rng.randint(1, exchanges)):
            turns.append({"role": "user", "content": sentence(rng, 5)})
            turns.append({"role": "assistant", "content": sentence(rng, longest)})
        records.append({"conversations": turns})
    return write_jsonl(path, records)


def write_reasoning(path: Path, count: int = 40, longest: int = 8, seed: int = 0) -> Path:
    """Answers of a thought and a conclusion; some questions name a tag too."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        answer = f"<think>\n{sentence(rng, longest)}\n</think>\n<answer>\n{sentence(rng, longest)}\n</answer>"
        question = sentence(rng, 5) + (" <think>" if number % 4 == 0 else "")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"conversations": turns})
    return write_jsonl(path, records)


def write_preferences(path: Path, count: int = 40, longest: int = 12, seed: int = 0) -> Path:
    """Pairs after a prompt of one question or two."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        prompt = [{"role": "user", "content": sentence(rng, 5)}]
        if number % 5 == 0:
            prompt += [{"role": "assistant", "content": sentence(rng, 3)}, {"role": "user", "content": "and then"}]
        # an end of its own, so that no two answers are equal
        answers = [sentence(rng, longest) + end for end in (" 花", " and it rained")]
        records.append(
            {
                side: [*prompt, {"role": "assistant", "content": answer}]
                for side, answer in zip(("chosen", "rejected"), answers, strict=True)
            }
        )
    return write_jsonl(path, records)


def write_data(kind: str, path: Path, **sizes) -> Path:
    writers = {
        "pretrain": write_texts,
        "conversation": write_conversations,
        "reasoning": write_reasoning,
        "preference": write_preferences,
    }
    return writers[kind](path, **sizes)


# --- stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A training script, what it reads, and what its weight file is called."""

    script: str
    data: str  # kind of records, as write_data knows them
    stem: str  # weight file in the output folder, without the size
    base: str = ""  # stem of the weights that it starts from

    def name(self, use_moe: bool = False, hidden_size: int = 32) -> str:
        """What the weight file, the log and the resume state are called."""
        return f"{self.stem}_{hidden_size}{'_moe' if use_moe else ''}"


PRETRAIN = Stage("train_pretrain", "pretrain", "pretrain")
FULL_SFT = Stage("train_full_sft", "conversation", "full_sft", "pretrain")
LORA = Stage("train_lora", "conversation", "lora/lora_medical", "full_sft")
DPO = Stage("train_dpo", "preference", "rlhf", "full_sft")
REASON = Stage("train_distill_reason", "reasoning", "reason", "rlhf")
DISTILLATION = Stage("train_distillation", "conversation", "full_dist", "full_sft")
GRPO = Stage("train_grpo", "prompt", "grpo", "full_sft")
STAGES = (PRETRAIN, FULL_SFT, LORA, DPO, REASON, DISTILLATION)  # those that read their data in packed rows
# records that fill 33 to 39 rows (preferences: pairs): five optimizer steps of eight, the last one ragged
FIVE_STEPS = {"pretrain": 48, "conversation": 64, "reasoning": 75, "preference": 37}
ROW = {"pretrain": 64}  # else 128: most rows then hold more than one conversation


def each_stage(*default: Stage, without: tuple[Stage, ...] = ()) -> pytest.MarkDecorator:
    """A test of every stage: all of them by default, or these, and the others with the long tests."""
    stages = [stage for stage in STAGES if stage not in without]
    long = [stage for stage in stages if default and stage not in default]
    marked = [pytest.param(s, id=s.script, marks=pytest.mark.full if s in long else ()) for s in stages]
    return pytest.mark.parametrize("stage", marked)


def sharp_model(
    use_moe: bool = False,
    hidden_size: int = 32,
    num_hidden_layers: int = 2,
    seed: int = 0,
    scale: float = 6.0,
    **fields,
) -> MiniMindForCausalLM:
    """Weights larger than at the start of training: attention and routing are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers, "use_moe": use_moe}
    config = MiniMindConfig(**{**fields, **sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    model = MiniMindForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if "norm" in name else scale)
    return model


def write_weights(path: Path, tokenizer: ChatTokenizer, **fields) -> Path:
    """A weight file with a sidecar, as if a run had ended with it: sharp_model(**fields)."""
    model = sharp_model(**fields)
    save_weights(path, model, {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256})
    return path


def write_endless_weights(path: Path, tokenizer: ChatTokenizer, **fields) -> Path:
    """The same of a model whose answers go on. The first number of its hidden states is 8 throughout, for no block adds
    to it; the head takes it for all ids but those that end an answer, whose probability is below 1e-15."""
    model = sharp_model(**fields)
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        embedding[[tokenizer.eos_id, tokenizer.pad_id]] = 0
        embedding[:, 0] = 8
        embedding[[tokenizer.eos_id, tokenizer.pad_id], 0] = -8
    save_weights(path, model, {"config": model.config.to_diff_dict(), "tokenizer_sha256": tokenizer.sha256})
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tokenizer) -> Callable[..., dict]:
    """inputs(stage, use_moe=False): flags that name data for five steps and the weights that a stage starts from.

    DPO's reference is another model than the one that it starts from; the teacher of distillation is a larger one.
    """
    folder = tmp_path_factory.mktemp("inputs")

    def weights(name: str, **fields) -> Path:
        path = folder / f"{name}{'_moe' if fields.get('use_moe') else ''}.pth"
        return path if path.exists() else write_weights(path, tokenizer, scale=3.0, **fields)

    def flags(stage: Stage, use_moe: bool = False) -> dict:
        data = folder / f"{stage.data}.jsonl"
        values = {"use_moe": use_moe, "data_path": data, "max_seq_len": ROW.get(stage.data, 128)}
        if not data.exists():
            write_data(stage.data, data, count=FIVE_STEPS[stage.data])
        if stage.base:
            values["base_weight"] = weights("base", use_moe=use_moe)
        if stage is DPO:
            values["reference_weight"] = weights("reference", use_moe=use_moe, seed=1)
        if stage is DISTILLATION:
            values["teacher_weight"] = weights("teacher", use_moe=use_moe, seed=2, hidden_size=48, num_hidden_layers=3)
        return values

    return flags


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(ROOT / "model")


@pytest.fixture
def other_tokenizer(tmp_path) -> Path:
    """A folder with a tokenizer of the same size whose ids mean something else: two tokens have changed places."""
    folder = tmp_path / "other_tokenizer"
    folder.mkdir()
    content = json.loads((ROOT / "model" / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    a, b = (token for token, number in vocabulary.items() if number in (6000, 6001))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(ROOT / "model" / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Fills 39 rows of 64: five optimizer steps of eight rows, the last one ragged."""
    return write_texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 48)


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", 50)


# --- runs in this process --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread():
    """Tiny matrices are slower on several threads, and bit-identical results need the same number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def skip_measuring(module) -> None:
    """The product that MFU is measured against takes longer than a tiny run."""
    importlib.import_module("trainer.logger").matmul_flops_per_second = lambda device, dtype: 1e12


@pytest.fixture
def train(monkeypatch):
    """train("train_pretrain", flags): the script's main in this process; returns its module."""
    from trainer import logger

    monkeypatch.setattr(logger, "matmul_flops_per_second", logger.matmul_flops_per_second)  # restored at the end

    def run(script: str, flags: list[str]):
        module = importlib.import_module(f"trainer.{script}")
        skip_measuring(module)
        with one_thread():
            module.main(flags)
        return module

    return run


@pytest.fixture
def broken_off(train, monkeypatch):
    """broken_off(script, flags, number): a run that ends in that step."""
    from trainer.training import Training

    def run(script, flags, number):
        steps, step = [], Training.step

        def breaks_off(training, lr):
            steps.append(lr)
            if len(steps) == number:
                raise FloatingPointError("broken off")
            return step(training, lr)

        with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
            patch.setattr(Training, "step", breaks_off)
            train(script, flags)

    return run


def read_resume(out_dir: Path, name: str = "pretrain_32") -> dict:
    return torch.load(out_dir / "resume" / f"{name}.resume", weights_only=True)


def read_log(out_dir: Path, name: str = "pretrain_32", event: str = "step") -> list[dict]:
    lines = (out_dir / "logs" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


# what a log says of the machine, not of the model
SPEEDS = {"time", "seconds", "seconds_per_step", "processor_seconds", "peak_memory_bytes", "tokens_per_second", "mfu"}
SPEEDS |= {"waiting"}


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, all tensors together."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[key].double() - theirs[key].double()).square().sum()) for key in ours)
    return (difference / sum(float(theirs[key].double().square().sum()) for key in ours)) ** 0.5


def assert_identical(ours, theirs, where: str = "state") -> None:
    """Equal to the last bit, in any nesting of dicts, lists and tensors."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_identical(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_identical(a, b, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


# --- runs in other processes -----------------------------------------------------------------------------------------


class Child:
    """A script in a process of its own, with everything that it prints."""

    def __init__(self, process: multiprocessing.Process, printed: Path):
        self.process, self.printed = process, printed
        self.pid, self.status = process.pid, None

    @property
    def output(self) -> str:
        return self.printed.read_text("utf-8", errors="replace") if self.printed.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """Exit status, as a shell would see it from python: 1 after a message, negative when killed by a signal."""
        if self.status is None:
            self.process.join(seconds)
            if self.process.is_alive():
                self.signal(signal.SIGABRT)  # prints where it hangs
                self.process.join()
                raise AssertionError(f"still running after {seconds} s:\n{self.output}")
            self.status = self.process.exitcode
            self.process.close()  # else its pipes stay open, and a session starts more children than may be open
        return self.status

    def is_alive(self) -> bool:
        return self.status is None and self.process.is_alive()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until the text is printed."""
        end = time.monotonic() + seconds
        while text not in self.output:
            alive = self.is_alive()
            assert alive or text in self.output, f"ended without printing {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"{text!r} was not printed in {seconds} s:\n{self.output}"
            time.sleep(0.01)

    def signal(self, number: int, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may be through already
            (os.killpg if group else os.kill)(self.pid, number)


def _run_in_child(script: str, flags: list[str], env: dict, printed: Path, patches: list) -> None:
    os.setsid()  # a process group, as a launcher makes one
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    os.environ.update(env)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # as in a plain process
    module = importlib.import_module(f"trainer.{script}")
    for patch in (skip_measuring, *patches):
        patch(module)
    module.run_script(module.main, flags)


def replace_step(make) -> None:
    """In a child process: every optimizer step is make(the step itself), a function of (training, lr)."""
    from trainer import training

    for kind in (training.Training, training.ZeroTraining):
        kind.step = make(kind.step)


class Launcher:
    """Starts scripts as processes, from a server that has imported torch and transformers already."""

    def __init__(self, folder: Path):
        if sys.platform == "win32":
            pytest.skip("Windows has no fork server, and no signal that stops a run")
        self.folder, self.children = folder, []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([f"trainer.{stage.script}" for stage in (*STAGES, GRPO)])
        before = dict(os.environ)
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, script: str, flags: list[str], env: dict | None = None, patches=()) -> Child:
        """patches: functions of this file or of a test file, called with the script's module before its main."""
        printed = self.folder / f"{len(self.children)}.txt"
        arguments = (script, flags, env or {}, printed, list(patches))
        process = self.context.Process(target=_run_in_child, args=arguments)
        process.start()
        self.children.append(Child(process, printed))
        return self.children[-1]

    def start_ranks(self, world_size: int, script: str, flags: list[str], env: dict | None = None, patches=()):
        """What torchrun starts on one machine. flags: those of all, or a list of them for each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)} | (env or {})
        lines = flags if isinstance(flags[0], list) else [flags] * world_size
        return [
            self.start(script, line, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, patches)
            for rank, line in enumerate(lines)
        ]

    def run(self, script: str, flags: list[str], world_size: int = 1, seconds: float = 120, **options) -> str:
        """Runs to the end, which must be a good one; returns what the first process printed."""
        if world_size == 1:
            children = [self.start(script, flags, **options)]
        else:
            children = self.start_ranks(world_size, script, flags, **options)
        printed = [(child.wait(seconds), child.output) for child in children]
        assert all(status == 0 for status, _ in printed), "\n".join(map(str, printed))
        return printed[0][1]


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("printed"))
    yield launcher
    for child in launcher.children:  # what a test that failed left behind
        if child.is_alive():
            child.signal(signal.SIGKILL)


def run_python(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """A fresh interpreter, for what only that can show."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=180
    )
