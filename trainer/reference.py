"""Log-probs of a file's answers under DPO's frozen reference, computed once and kept on disk."""

from pathlib import Path

import numpy as np
import torch

from dataset.tokenization import ChatTokenizer
from model.weights import load_model
from trainer.arguments import given_config
from trainer.checkpoint import config_fields, file_sha256
from trainer.frozen_outputs import FrozenOutputs
from trainer.loader import PackedData
from trainer.optimization import Precision
from trainer.token_losses import answer_log_probs, forward_losses


@torch.no_grad()
def reference_log_probs(path: Path, data: PackedData, tokenizer: ChatTokenizer) -> np.ndarray:
    """Return reference log-probs (pairs, 2) for every pair this run will see, cached or computed now."""
    process, precision = data.process, Precision(data.args.dtype, data.process.device)
    model, _ = load_model(path, tokenizer.sha256, given_config(data.args))  # what the policy's file is read with
    identity = {
        "weights": file_sha256(path), "config": config_fields(model.config), "data": data.fingerprint(),
        "precision": precision.name, "max_seq_len": data.args.max_seq_len,
    }  # fmt: skip
    shapes = {"log_probs": ((data.plan.num_rows, 2), np.float32)}
    folder = data.args.cache_dir / f"{data.path.stem}-reference"
    outputs = FrozenOutputs(folder, identity, data.plan.num_rows, shapes, process, not data.timed_only)
    data.stores["log-probs"] = outputs.bytes
    if outputs.complete:
        return outputs.arrays["log_probs"]
    model.to(process.device)
    for batch in data.once(f"log-probs of {path.name}", outputs.missing):
        pairs = batch["pair_ids"].numpy()
        with precision.autocast():
            log_probs, _ = answer_log_probs(forward_losses(model, batch)[0], batch)
        outputs.write(pairs, pairs, log_probs=log_probs.cpu().numpy())
    outputs.finish(data.read_in_part or data.cut_short)
    return outputs.arrays["log_probs"]
