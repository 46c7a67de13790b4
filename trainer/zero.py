"""ZeRO (arXiv:1910.02054) through the DeepSpeed engine: settings, start, whole weights, resume state in shards.

Stage 1 divides the optimizer's state among the processes, stage 2 the gradients too, stage 3 also the weights.
No other file imports deepspeed, and this one does so only when --zero_stage asks for it.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from model.model_minimind import MoEFeedForward

BUCKET = 20_000_000  # elements per collective
# set by our own flags; files written for other trainers say "auto" for them
OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping")  # fmt: skip


def zero_mistakes(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with --zero_stage and --deepspeed_config, or with this machine for them."""
    if not args.zero_stage:
        return ["--deepspeed_config: needs --zero_stage 1, 2 or 3"] if args.deepspeed_config else []
    mistakes = []
    if sys.platform != "linux":
        mistakes.append(f"--zero_stage {args.zero_stage}: DeepSpeed runs on Linux only; leave the flag out")
    elif importlib.util.find_spec("deepspeed") is None:
        mistakes.append(f"--zero_stage {args.zero_stage}: deepspeed is not installed; run: pip install deepspeed")
    if args.optimizer != "adamw":
        mistakes.append(
            f"--optimizer {args.optimizer}: ZeRO cuts flattened weights into pieces, which fits AdamW only; "
            "use --optimizer adamw, or leave --zero_stage out"
        )
    try:
        _expert_settings(args)
    except ValueError as error:
        mistakes.append(str(error))
    return mistakes


def _expert_settings(args: argparse.Namespace) -> dict:
    """Return the content of --deepspeed_config without values that are "auto". Raises ValueError if it is unusable."""
    path = args.deepspeed_config
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--deepspeed_config {path}: must hold a JSON object")
    content = _without_auto(content)
    for name in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(content.get(name, {}), dict):
            raise ValueError(f"--deepspeed_config {path}: {name} must be an object")
    taken = [name for name in OURS if name in content]
    if taken:
        raise ValueError(
            f"--deepspeed_config {path}: {', '.join(taken)} must go; the flags --batch_size, --accumulation_steps, "
            "--grad_clip, --learning_rate and so on say it"
        )
    stage = content.get("zero_optimization", {}).get("stage", args.zero_stage)
    if stage != args.zero_stage:
        raise ValueError(f"--deepspeed_config {path}: stage {stage} contradicts --zero_stage {args.zero_stage}")
    return content


def _without_auto(content: dict) -> dict:
    content = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in content.items()}
    return {name: value for name, value in content.items() if value != "auto"}


def zero_settings(args: argparse.Namespace, dtype: torch.dtype, cuda: bool) -> dict:
    """Return DeepSpeed's configuration: what the flags say, overridden by --deepspeed_config.

    bfloat16 goes through autocast, as in runs without DeepSpeed: weights, norms and accumulated gradients stay in
    float32, so the same run gives the same numbers. (DeepSpeed's own bf16 mode rounds all three; a file can ask for
    it.) float16 needs a loss scale, and only DeepSpeed's fp16 mode applies one to its gradient norm: half-precision
    weights with a float32 copy in the optimizer.
    """
    settings = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": 1,  # ZeroTraining.micro_batch says which micro-batch is a step's last
        "gradient_clipping": args.grad_clip,
        "zero_optimization": {
            "stage": args.zero_stage,
            "overlap_comm": cuda,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
        },
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == torch.bfloat16:
        # an empty list of safe modules: gradients travel in float32
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif dtype == torch.float16:
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    expert = _expert_settings(args)
    if any(expert.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        settings.pop("torch_autocast", None)
        settings.pop("fp16", None)
    return _merged(settings, expert)


def _merged(settings: dict, over: dict) -> dict:
    result = dict(settings)
    for name, value in over.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def start_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
):
    """Wrap a model that holds its first weights in a DeepSpeed engine. The process group must exist."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for GPUs and warns that there are none
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists on a launcher even for one process
    import deepspeed
    from deepspeed.utils import logger

    # torch warns at each call of a collective that DeepSpeed still uses under its old name
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    logger.setLevel(logging.WARNING)
    # shared-memory collectives, for inference on CPUs: training does not use them, and building them takes minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if args.zero_stage == 3:
        if any(isinstance(module, MoEFeedForward) for module in model.modules()):
            # which experts get tokens differs between processes, so their weights are fetched together
            deepspeed.utils.set_z3_leaf_modules(model, [MoEFeedForward])
        # forward hands this weight to `head` without calling the layer that owns it
        deepspeed.zero.register_external_parameter(model, model.lm_head.weight)
    settings = zero_settings(args, dtype, device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


@contextlib.contextmanager
def gathered(engine: nn.Module) -> Iterator[None]:
    """Give every process all weights of the engine's module, so that one of them alone can save it or sample from it.

    Under stage 3 all processes enter together. The hooks that fetch and drop weights around every layer would need all
    of them, so they are off inside.
    """
    if engine.zero_optimization_stage() != 3:
        yield
        return
    import deepspeed

    modules = list(engine.module.modules())
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
        for module in modules:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for module, (before, after) in zip(modules, hooks, strict=True):
                module._forward_pre_hooks, module._forward_hooks = before, after


def save_shards(engine: nn.Module, folder: Path) -> None:
    """Write this process's part of weights and optimizer state to a new folder and flush it to disk.

    The resume state names the folder only after all processes have written theirs.
    """
    engine.save_checkpoint(str(folder), tag="zero", save_latest=False, exclude_frozen_parameters=True)
    for path in (folder / "zero").iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def load_shards(engine: nn.Module, folder: Path) -> None:
    """Load what save_shards wrote. Raises ValueError if it is damaged or not all here."""
    if not any(folder.glob("zero/*_model_states.pt")):
        raise ValueError(
            f"{folder} lacks *_model_states.pt, which is written by the first machine: with ZeRO several machines need "
            "one --out_dir on a disk that all share, so copy the whole folder here and resume again"
        )
    try:
        engine.load_checkpoint(str(folder), tag="zero", load_module_strict=False)
    except Exception as error:  # torch and DeepSpeed raise many kinds here
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} cannot be read ({reason}); --overwrite starts again") from error
