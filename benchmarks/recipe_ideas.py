"""Ideas for the pretraining recipe that are not flags of train_pretrain.py, each as a small change of that script.

    python benchmarks/recipe_ideas.py output_init=0 linear=0 -- --data_path FILE.jsonl ...   flags of train_pretrain.py
    python benchmarks/recipe.py run --recipe muon --ideas output_init=0 linear=0 ...         recorded, with its score

An idea is a function of one number below. What was kept has become a flag or a default; the verdicts, with what was
expected and measured, stand in RESULTS.md. These run on one process, without --resume.
"""

import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer import train_pretrain, training
from trainer.arguments import run_script

# --- initialisation --------------------------------------------------------------------------------------------------


def after_init(change) -> None:
    make = train_pretrain.MiniMindForCausalLM

    def changed(config):
        model = make(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                change(config, name, parameter)
        return model

    train_pretrain.MiniMindForCausalLM = changed


BLOCK_OUTPUTS = (".o_proj.weight", ".down_proj.weight")


def output_init(scale: float) -> None:
    """The matrices that write into the residual stream start `scale` times as large; 0: every block is the identity
    (arXiv:1901.09321)."""
    after_init(lambda config, name, p: p.mul_(scale) if name.endswith(BLOCK_OUTPUTS) else None)


def depth_init(_: float) -> None:
    """The same with 1 / sqrt(2 · layers), as GPT-2 does (Radford et al. 2019, section 2.3)."""
    after_init(
        lambda config, name, p: p.mul_((2 * config.num_hidden_layers) ** -0.5) if name.endswith(BLOCK_OUTPUTS) else None
    )


def embedding_init(scale: float) -> None:
    """The tied embedding starts `scale` times as large."""
    after_init(lambda config, name, p: p.mul_(scale) if name.endswith("embed_tokens.weight") else None)


def matrix_init(scale: float) -> None:
    """The matrices inside the blocks start with a standard deviation of scale / sqrt(inputs)."""
    after_init(
        lambda config, name, p: (
            p.normal_(std=scale * p.shape[1] ** -0.5) if ".layers." in name and p.dim() == 2 else None
        )
    )


# --- learning rates --------------------------------------------------------------------------------------------------


def linear(end: float) -> None:
    """A line from the peak to `end` of it instead of a cosine."""

    def schedule(step, total, peak, warmup=0, _=0.1):
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * (1 - (1 - end) * (step - warmup) / max(total - warmup - 1, 1))

    train_pretrain.learning_rate = schedule


def stable_then_decay(share: float) -> None:
    """The peak until the last `share` of the steps, then a line to zero (arXiv:2404.06395, section 4)."""

    def schedule(step, total, peak, warmup=0, _=0.1):
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * min(1.0, (total - step) / max(share * total, 1))

    train_pretrain.learning_rate = schedule


def before_step(change) -> None:
    """change(group, lr, peak) sets what it wants of a parameter group, right before the optimizer steps.

    lr is the schedule's, without the embedding's scale.
    """
    build = training.build_optimizer

    def built(model, args):
        optimizer = build(model, args)

        def hook(part, *_):
            for group in part.param_groups:
                change(group, group["lr"] / group.get("lr_scale", 1.0), args.learning_rate)

        for part in getattr(optimizer, "parts", (optimizer,)):
            part.register_step_pre_hook(hook)
        return optimizer

    training.build_optimizer = built


def is_embedding(group: dict) -> bool:
    return group["params"][0].dim() == 2 and "betas" in group


def norm_rate(scale: float) -> None:
    """The norms' gains learn `scale` times as fast."""

    def change(group, lr, peak):
        if group["params"][0].dim() == 1:
            group["lr"] = lr * scale

    before_step(change)


# --- weight decay, momentum ------------------------------------------------------------------------------------------


def decay_follows(_: float) -> None:
    """Weight decay shrinks with the learning rate (which multiplies it once more anyway)."""

    def change(group, lr, peak):
        group["weight_decay"] = group.setdefault("first_decay", group["weight_decay"]) * lr / peak

    before_step(change)


def embedding_decay(value: float) -> None:
    """Another weight decay for the embedding."""

    def change(group, lr, peak):
        if is_embedding(group):
            group["weight_decay"] = value

    before_step(change)


def muon_momentum(value: float) -> None:
    """Another momentum than Muon's 0.95."""

    def change(group, lr, peak):
        if "momentum" in group:
            group["momentum"] = value

    before_step(change)


# --- loss, averaging -------------------------------------------------------------------------------------------------


def z_loss(weight: float) -> None:
    """Adds weight · log²(sum of exp(logits)) (arXiv:2204.02311, section 5.1)."""

    def head(hidden_states, matrix, labels):
        logits = (hidden_states @ matrix.to(hidden_states.dtype).t()).float()
        normaliser = logits.logsumexp(dim=-1)
        target = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        extra = weight * normaliser.square() if torch.is_grad_enabled() else 0.0
        return (normaliser - target + extra).masked_fill(labels < 0, 0.0)

    train_pretrain.token_cross_entropy = head


def tail_average(share: float) -> None:
    """The weights that are evaluated at the end are the mean over the last `share` of the steps."""
    step, rate, run = training.Training.step, train_pretrain.learning_rate, train_pretrain.Evaluator.run
    clock, mean = {}, {}

    def timed(at, total, *rest, **named):
        clock.update(step=at, total=total)
        return rate(at, total, *rest, **named)

    def stepped(trained, lr):
        norm = step(trained, lr)
        first = math.floor((1 - share) * clock["total"])
        if clock["step"] >= first:
            count = clock["step"] - first + 1
            for name, parameter in trained.model.named_parameters():
                value = parameter.detach()
                mean[name] = mean.get(name, 0) + (value - mean.get(name, 0)) / count
        return norm

    def averaged(self, trained, *rest, **named):
        with torch.no_grad():
            for name, parameter in trained.model.named_parameters():
                parameter.copy_(mean.get(name, parameter))
        return run(self, trained, *rest, **named)

    train_pretrain.learning_rate, training.Training.step = timed, stepped
    train_pretrain.Evaluator.run = averaged


# --- batches ---------------------------------------------------------------------------------------------------------


def batch_ramp(share: float) -> None:
    """--batch_size rows a step for the first `share` of the tokens, twice as many for the rest."""

    class Ramp(train_pretrain.PackedData):
        merging = True

        def first(self) -> int:
            return math.floor(share * super().total_steps)

        @property
        def total_steps(self) -> int:
            whole = super().total_steps
            return self.first() + (whole - self.first()) // 2 if self.merging else whole

        def steps(self, start_step=0):
            plain, waiting, number, first = super().steps(start_step), [], 0, self.first()
            self.merging = False  # the plain steps, counted when the first one is asked for, are more
            for step, micro_batches in plain:
                self.merging = True
                waiting += micro_batches
                if step < first or len(waiting) == 2:
                    for name in ("step_targets", "step_documents"):
                        amount = sum(batch[name] for batch in waiting)
                        waiting = [batch | {name: amount} for batch in waiting]
                    yield number, waiting
                    number, waiting = number + 1, []

    train_pretrain.PackedData = Ramp


def short_first(share: float) -> None:
    """For the first `share` of the steps documents are cut into pieces of at most 128 tokens."""

    class Short(train_pretrain.PackedData):
        def steps(self, start_step=0):
            for step, micro_batches in super().steps(start_step):
                if step < share * self.total_steps:
                    micro_batches = [batch | self.cut(batch) for batch in micro_batches]
                yield step, micro_batches

        @staticmethod
        def cut(batch):
            position, document = batch["position_ids"].flatten(), batch["document_ids"].flatten()
            starts = position % 128 == 0
            starts[1:] |= document[1:] != document[:-1]
            pieces = (starts.cumsum(0) - 1).masked_fill(document < 0, -1).int()
            borders = torch.cat((starts.nonzero().flatten(), torch.tensor([len(starts)]))).int()
            shape = batch["position_ids"].shape
            return {
                "position_ids": (position % 128).view(shape),
                "document_ids": pieces.view(shape),
                "cu_seqlens": borders,
            }

    train_pretrain.PackedData = Short


def file_order(_: float) -> None:
    """Rows in the order of the file instead of a random one."""

    class Ordered(train_pretrain.PackedData):
        def _batches(self, epoch, shuffle=True, accumulation_steps=None):
            return super()._batches(epoch, False, accumulation_steps)

    train_pretrain.PackedData = Ordered


IDEAS = {
    function.__name__: function
    for function in (
        output_init, depth_init, embedding_init, matrix_init, linear, stable_then_decay, norm_rate,
        decay_follows, embedding_decay, muon_momentum, z_loss, tail_average, batch_ramp, short_first, file_order,
    )
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--" not in argv:
        raise ValueError(
            f"usage: recipe_ideas.py IDEA=NUMBER ... -- flags of train_pretrain.py; ideas: {', '.join(IDEAS)}"
        )
    for text in argv[: argv.index("--")]:
        name, _, value = text.partition("=")
        if name not in IDEAS:
            raise ValueError(f"{name}: no such idea; there are {', '.join(IDEAS)}")
        IDEAS[name](float(value or 1))
    train_pretrain.main(argv[argv.index("--") + 1 :])


if __name__ == "__main__":
    run_script(main)
