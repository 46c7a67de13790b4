"""The teacher of knowledge distillation: its log-probs at the targets of a batch, computed or read from disk."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataset.tokenization import ChatTokenizer
from model.device import to_device
from model.weights import heads_are_guessed, load_model, sidecar_path
from trainer.checkpoint import config_fields, file_sha256
from trainer.distributed import Process
from trainer.frozen_outputs import FrozenOutputs
from trainer.loader import PackedData, model_inputs
from trainer.optimization import Precision, prepare_forward
from trainer.token_losses import DISTRIBUTIONS, chunk_size, target_indices, token_chunks


class Teacher:
    """Returns the teacher's log-probs at the targets of a batch, computed now or kept from an earlier pass."""

    def __init__(self, path: Path, args: argparse.Namespace, tokenizer: ChatTokenizer, process: Process):
        self.path, self.args, self.process = path, args, process
        self.precision = Precision(args.dtype, process.device)
        self.model, sidecar = load_model(path, tokenizer.sha256)
        config = self.model.config
        layers, vocab, heads = config.num_hidden_layers, config.vocab_size, config.num_attention_heads
        if heads_are_guessed(config, sidecar):
            raise ValueError(
                f"the teacher {path} has no sidecar, and its tensors do not show the number of attention heads: write "
                f'it into {sidecar_path(path)}, such as {{"config": {{"num_attention_heads": {heads}}}}}'
            )
        if args.teacher_num_hidden_layers not in (None, layers):
            raise ValueError(
                f"--teacher_num_hidden_layers {args.teacher_num_hidden_layers}: {path} has {layers}; leave it out"
            )
        if vocab != tokenizer.vocab_size:
            raise ValueError(
                f"the teacher {path} has {vocab} token ids, the student {tokenizer.vocab_size}: both must use one "
                "tokenizer, because the distributions are compared token by token"
            )
        self.model.to(process.device, self.precision.dtype).requires_grad_(False)
        prepare_forward(self.model, args, process.device)
        self.kept = None

    @torch.no_grad()
    def log_probs(self, batch: dict, targets: torch.Tensor) -> Callable[[slice], tuple]:
        """Return a function of a slice of the targets: (log-probs, token ids or None), for distillation_loss."""
        if self.kept:
            indices = self._indices(batch)
            ids, values = (
                to_device(self.kept.arrays[name][indices], targets.device).to(dtype)
                for name, dtype in (("token_ids", torch.int64), ("log_probs", torch.float32))
            )
            return lambda chunk: (values[chunk], ids[chunk])
        hidden = self.model.model(**model_inputs(batch)).last_hidden_state.flatten(0, 1)[targets]
        weight, temperature = self.model.lm_head.weight, self.args.temperature
        return lambda chunk: (F.log_softmax((hidden[chunk] @ weight.t()).float() / temperature, dim=-1), None)

    def keep(self, data: PackedData, k: int) -> None:
        """Compute the k most likely tokens at every target that this run will see, unless they are on disk.

        Frees the model: from then on log_probs reads from disk.
        """
        identity = {
            "weights": file_sha256(self.path), "config": config_fields(self.model.config), "data": data.fingerprint(),
            "precision": self.precision.name, "max_seq_len": self.args.max_seq_len,
            "temperature": self.args.temperature, "k": k,
        }  # fmt: skip
        self.ends = np.cumsum(data.plan.row_targets, dtype=np.int64)
        targets = int(self.ends[-1])
        shapes = {"token_ids": ((targets, k), np.uint16), "log_probs": ((targets, k), np.float16)}
        folder = self.args.cache_dir / f"{data.path.stem}-teacher"
        kept = FrozenOutputs(folder, identity, data.plan.num_rows, shapes, self.process, not data.timed_only)
        data.stores["teacher's tokens"] = kept.bytes
        if not kept.complete:
            for batch in data.once(f"most likely tokens of {self.path.name}", kept.missing):
                rows = batch["row_ids"].numpy()
                with self.precision.autocast():
                    log_probs = self.log_probs(batch, target_indices(batch))
                    parts = token_chunks(batch["target_tokens"], chunk_size(DISTRIBUTIONS, batch["labels"]))
                    chunks = [log_probs(part)[0].topk(k) for part in parts]
                values, ids = (torch.cat(part).cpu().numpy() for part in zip(*chunks, strict=True))
                kept.write(rows, self._indices(batch), token_ids=ids, log_probs=values)
            kept.finish(data.read_in_part or data.cut_short)
        self.kept, self.model = kept, None

    def _indices(self, batch: dict) -> np.ndarray:
        """Return the indices of a batch's targets in the arrays on disk."""
        rows = batch["row_ids"].numpy()
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        spans = [np.arange(start, end) for start, end in zip(starts, self.ends[rows], strict=True)]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)
