"""What a run leaves on disk: weights with their sidecar, and all that --resume needs to go on as if never stopped.

Each file is replaced atomically, in this order: ZeRO's shards, weights, sidecar, resume state. A resume state that is
there therefore never runs ahead of the weights.
"""

import argparse
import hashlib
import platform
import random
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from torch import nn

from dataset.tokenization import ChatTokenizer
from model.model_lora import read_lora
from model.model_minimind import MiniMindConfig
from model.weights import (
    WeightsError,
    config_from_state_dict,
    read_sidecar,
    read_state_dict,
    save_weights,
    weight_path,
    write_atomically,
)
from trainer.arguments import FREE_ON_RESUME
from trainer.distributed import Process, barrier, gather_objects, refuse_differing, share_from_main
from trainer.training import Training

SHARED = {  # these too, though free on --resume, must be the same in all processes
    "resume", "batch_size", "accumulation_steps", "save_interval", "eval_interval", "eval_samples", "sample_prompt",
}  # fmt: skip
LOCK_SECONDS = 8  # loader workers of a killed run hold its lock until they notice, within five seconds


@dataclass
class Progress:
    """How far a run is; part of its resume state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # seen by all processes, padding excluded
    complete: bool = False

    def advance(self, batch: dict, total_steps: int) -> None:
        """Count another optimizer step. batch: any of its micro-batches."""
        self.step += 1
        self.tokens += batch["step_tokens"]
        self.complete = self.step >= total_steps

    def due(self, interval: int) -> bool:
        """Tell whether something is due that happens every `interval` steps and after the last one."""
        return self.complete or self.step % interval == 0


def output_path(stage: str, config: MiniMindConfig, args: argparse.Namespace, process: Process) -> Path:
    """Return the weight file of this run, claimed for it. Raises WeightsError if that would destroy other work."""
    path = weight_path(args.out_dir, stage, config.hidden_size, config.use_moe)
    claim(path, args, process)
    refuse_other_weights(path, config, args)
    return path


def resume_path(weights: Path, args: argparse.Namespace) -> Path:
    return args.out_dir / "resume" / weights.relative_to(args.out_dir).with_suffix(".resume")


def claim(weights: Path, args: argparse.Namespace, process: Process) -> Path:
    """Lock `weights` until this process ends, and return it.

    Raises ValueError, in all processes alike, if they were started with different flags, if another run writes it, or
    if an unfinished run would be lost.
    """
    deciding = [name for name in vars(args) if name in SHARED or not (name in FREE_ON_RESUME or name.endswith("_path"))]
    facts = {f"--{name}": getattr(args, name) for name in deciding}
    refuse_differing(facts | {"--valid_path": bool(args.valid_path), "the result": weights.name}, process)
    state, mistake = resume_path(weights, args), ""
    if process.is_main:
        try:
            state.parent.mkdir(parents=True, exist_ok=True)
            process.locks.append(FileLock(state.with_name(f".{state.stem}.lock"), is_singleton=True))
            process.locks[-1].acquire(LOCK_SECONDS)
        except Timeout:
            mistake = f"another process is training {weights} right now: wait for it, or choose another --out_dir"
        except OSError as error:
            mistake = f"cannot write to {state.parent}: {error.strerror}; choose another --out_dir"
        else:
            mistake = _unfinished(state) if not args.resume and not args.overwrite else ""
    if mistake := share_from_main(mistake, process):
        raise WeightsError(mistake)
    return weights


def _unfinished(state: Path) -> str:
    """Say that a resume state belongs to an unfinished run; "" if it does not, or if there is none."""
    if not state.exists():
        return ""
    try:
        progress = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["progress"]
        if progress["complete"]:
            return ""
        found = f"holds step {progress['step']} of an unfinished run"
    except Exception:  # torch raises many kinds here
        return f"{state} cannot be read: give --overwrite to start again and replace it"
    return f"{state} {found}: give --resume to go on with it, or --overwrite to start again and replace it"


def refuse_other_weights(path: Path, config: MiniMindConfig, args: argparse.Namespace) -> None:
    """Raise WeightsError if `path` holds weights of another configuration, as file names do not tell the depth."""
    if args.overwrite or not path.exists():
        return
    unseen = {"config": {"num_attention_heads": config.num_attention_heads}}  # tensors do not show it
    try:
        existing = config_from_state_dict(read_state_dict(path), read_sidecar(path) or unseen)
    except WeightsError as error:
        raise WeightsError(f"{error}. It would be replaced: move it away or give --overwrite") from error
    names = ("num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "qk_norm")
    differing = [
        f"{name} {getattr(existing, name)} there, {getattr(config, name)} here"
        for name in names
        if getattr(existing, name) != getattr(config, name)
    ]
    if differing:
        raise WeightsError(
            f"{path} holds weights of another configuration ({', '.join(differing)}); give --overwrite to replace "
            "them, or another --out_dir"
        )


def refuse_other_adapter(path: Path, model: nn.Module, args: argparse.Namespace) -> None:
    """Raise WeightsError if `path` holds an adapter for a model of another depth."""
    if args.overwrite or not path.exists():
        return
    there = {name.split(".layers.")[-1].split(".")[0] for name in read_lora(path)}
    here = {str(index) for index in range(model.config.num_hidden_layers)}
    if there != here:
        raise WeightsError(
            f"{path} holds an adapter of {len(there)} layers, this model has {len(here)}; give --overwrite to replace "
            "it, or another --lora_name"
        )


class Checkpoint:
    """Saves and restores one run: float32 weights, optimizer, scaler, data position and all RNG states.

    Only what is trained goes into the resume state; frozen weights come from the file they were loaded from. Under ZeRO
    every process writes its shard of weights and optimizer state to a new folder, NAME.shards/TAG/. The resume state
    names that folder, so replacing it switches to the new shards at once; older folders are removed after that.
    """

    def __init__(
        self,
        weights: Path,
        stage: str,
        args: argparse.Namespace,
        process: Process,
        tokenizer: ChatTokenizer,
        data: Any,
        write: Callable[[Path, nn.Module, dict], None] = save_weights,
        base: Path | None = None,
        **frozen: Path,
    ):
        """data: a PackedData, or train_grpo's Sampler. write(path, model, sidecar): writes the weight file.

        base: the weights that training starts from. frozen: weights that are read all along. Neither may change on
        resume; only a base may be the weight file itself. Raises WeightsError if frozen weights would be replaced, and
        ValueError if another process, or the state to resume from, is of another run. Construct it before the first
        pass over the data: on another number of processes it changes args.accumulation_steps, so that the global batch
        stays what it was.
        """
        for name, path in frozen.items():
            if weights.exists() and path.samefile(weights):
                raise WeightsError(
                    f"{path} is the {name} of this run and would be replaced by its result: copy it to another name "
                    "first, or choose another --out_dir"
                )
        if base and not (weights.exists() and base.samefile(weights)):
            frozen["base"] = base
        self.weights, self.stage, self.write = weights, stage, write
        self.name = str(weights.relative_to(args.out_dir).with_suffix(""))
        self.path = resume_path(weights, args)
        self.shards = self.path.with_suffix(".shards")
        self.args, self.process, self.tokenizer, self.data = args, process, tokenizer, data
        self.saved_step, self._saved_at, self._save_seconds = 0, time.monotonic(), 0.0
        hashes = {name: file_sha256(path) for name, path in frozen.items()}
        self.identity = {"tokenizer": tokenizer.sha256, **data.fingerprint(), **hashes}
        # weights that are trained on in their own file are no base, and that may differ by machine
        refuse_differing(self.identity, process)
        self.state = self._load()

    def restore(self, training: Training, fresh: str = "") -> Progress:
        """Restore trained weights, optimizer and scaler, then RNG states (of as many processes as now), then progress.

        Return a new Progress if there is nothing to resume. fresh: what to say then.
        """
        state, self.state = self.state, None
        if state is None:
            if self.process.is_main and not self.args.resume and self.path.exists():
                self.path.unlink()  # or --resume could take it for this run's
                self.process.say(f"{self.path} held the state of an earlier run, which this one replaces")
            if fresh:
                self.process.say(fresh)
            return Progress()
        try:
            training.load_state(state, self.shards / state["shards"])
        except ValueError as error:
            raise ValueError(
                f"--resume: {self.path}: {error}; give --overwrite instead of --resume to start again"
            ) from error
        if len(state["rng"]) == self.process.world_size:
            _set_rng_state(state["rng"][self.process.rank], self.process.device)
        progress = Progress(**state["progress"])
        self.saved_step = progress.step
        done = "the run is complete; nothing to do" if progress.complete else "going on"
        self.process.say(f"--resume: {self.path} is at step {progress.step}; {done}")
        return progress

    def _load(self) -> dict | None:
        """Return the state to resume from, checked against this run's flags and data; None if there is none."""
        if not self.args.resume:
            return None
        state = share_from_main(self._read() if self.process.is_main else None, self.process)
        if state is None:
            self.process.say(f"--resume: nothing is saved at {self.path} yet; starting from the beginning")
            return None
        if isinstance(state, ValueError):
            raise state
        ranks, now = state["ranks"], self.identity.copy()
        now |= {f"--{name}": value for name, value in result_flags(self.args).items()}
        # a flag that the saved run did not know yet had its default; older states lack some of the identity
        was = {name: value for name, value in now.items() if name.removeprefix("--") not in self.args.changed}
        saved = {f"--{name}": value for name, value in state["flags"].items() if name not in FREE_ON_RESUME}
        was |= saved | state["identity"]
        differing = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
        changed = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in differing]
        if changed:
            raise ValueError(
                f"--resume: this would not be the run that was saved in {self.path}: {'; '.join(changed)}. "
                "Give the old values, or --overwrite instead of --resume to start again"
            )
        if state["shards"] and ranks != self.process.world_size:
            raise ValueError(
                f"--resume: {self.path} was saved under ZeRO by {ranks} process{'es' * (ranks > 1)}, each with its own "
                f"shard, and now there are {self.process.world_size}; start the same number again"
            )
        self._keep_global_batch(state["global_batch"], ranks)
        return state

    def _read(self) -> dict | ValueError | None:
        """Return the saved state, what is wrong with the file, or None if there is none.

        Only the main process reads it: other machines may have disks of their own, with older states on them.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if {"flags", "identity", "ranks"} <= state.keys():
                return state
            reason = "it lacks flags, identity or ranks"
        except Exception as error:  # torch raises many kinds here
            reason = type(error).__name__
        return ValueError(f"{self.path} is not a resume state ({reason}); delete it to start from the beginning")

    def _keep_global_batch(self, saved: int, ranks: int) -> None:
        args, world_size = self.args, self.process.world_size
        if self.data.global_batch == saved:
            return
        per_step = args.batch_size * world_size
        if world_size != ranks and saved % per_step == 0:
            args.accumulation_steps = saved // per_step
            self.process.say(
                f"--resume: {ranks} -> {world_size} processes; accumulation_steps is now {args.accumulation_steps}"
            )
            return
        raise ValueError(
            f"--resume: the saved run took {saved} rows per optimizer step; batch_size × accumulation_steps × "
            f"processes is {args.batch_size} × {args.accumulation_steps} × {world_size}. Set --batch_size and "
            f"--accumulation_steps so that the product is {saved}"
        )

    def due(self, progress: Progress) -> bool:
        """Tell whether to save now: the same in all processes.

        Without --save_interval every hundred steps, but more rarely if saving took over 3 % of the time.
        """
        if self.args.save_interval or progress.complete or not progress.due(100):
            return progress.due(self.args.save_interval or 100)
        rested = time.monotonic() - self._saved_at > 30 * self._save_seconds
        return share_from_main(rested, self.process)

    def save(self, training: Training, progress: Progress, metrics: dict) -> None:
        """Write weights, sidecar and resume state, unless they are on disk already.

        Every process calls it. The main one writes; under ZeRO each writes its shard. metrics: for the sidecar.
        """
        if progress.step == self.saved_step:
            return
        start = time.monotonic()
        rng = gather_objects(_rng_state(self.process.device), self.process)
        # the tag is unique: shards of an earlier run that stopped at this step must not be overwritten
        tag = share_from_main(f"step-{progress.step}-{secrets.token_hex(4)}", self.process)
        shards = training.save_shards(self.shards, tag)
        barrier(self.process)  # all shards are on disk
        with training.whole_weights() as model:
            if self.process.is_main:
                self.write(self.weights, model, self._sidecar(model.config, progress, metrics))
                state = training.state() | {
                    "shards": shards,
                    "progress": asdict(progress),
                    "rng": rng,
                    "flags": result_flags(self.args),
                    "identity": self.identity,
                    "global_batch": self.data.global_batch,
                    "ranks": self.process.world_size,
                }
                write_atomically(self.path, lambda file: torch.save(state, file))
        self.saved_step = progress.step
        barrier(self.process)  # the resume state names the new shards
        if self.process.local_rank == 0 and self.shards.exists():
            for folder in self.shards.iterdir():
                if folder.name != shards:
                    shutil.rmtree(folder, ignore_errors=True)
            if not shards:
                shutil.rmtree(self.shards, ignore_errors=True)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - start

    def _sidecar(self, config: MiniMindConfig, progress: Progress, metrics: dict) -> dict:
        """Return what the sidecar of the weights says: what they are, and how they were made."""
        return {
            "stage": self.stage,
            "config": config_fields(config),
            "tokenizer_sha256": self.tokenizer.sha256,
            "progress": asdict(progress),
            "metrics": metrics,
            "flags": result_flags(self.args) | {"data_path": str(self.args.data_path)},
            "versions": versions(),
        }


def config_fields(config: MiniMindConfig) -> dict:
    return {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def result_flags(args: argparse.Namespace) -> dict:
    """Return the flags that decide a run's result, except paths: the identity compares what the files hold."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in FREE_ON_RESUME and not name.endswith("_path") and isinstance(value, str | int | float | bool)
    }


def _rng_state(device: torch.device) -> dict:
    state: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (state[0], state[1].tolist(), *state[2:]),
        "torch": torch.get_rng_state(),
        **({} if device.type == "cpu" else {device.type: torch.get_device_module(device).get_rng_state()}),
    }


def _set_rng_state(state: dict, device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and state.get(device.type) is not None:  # a run may go on with another kind of device
        torch.get_device_module(device).set_rng_state(state[device.type])
