"""The whole thing in one command: download, pretrain, SFT, evaluate, chat, report.

    python scripts/speedrun.py                                           26M, one GPU or a CPU
    python scripts/speedrun.py --size minimind2_104m --stages pretrain full_sft rlhf reason
    python scripts/speedrun.py --launcher "torchrun --nproc_per_node 2" --price_per_hour 0.5
    python scripts/speedrun.py --data_dir my_data --tasks                files of one's own, no scores

Every step prints the command that it runs, and steps that are done are skipped: after Ctrl-C or a lost machine, run
the same command again. A stage that crashes is resumed as long as it gets ahead. Before a stage begins, --estimate says
what it will take; the report says what it took. Flags that this script does not know go to every stage.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.text_stream import TextStream
from dataset.tokenization import ChatTokenizer
from model.flags import add_boolean, show_defaults
from model.generation import SamplingParams, generate_batch
from model.loading import SHARED_FLAGS, load_ready
from model.model_minimind import PRESETS, MiniMindConfig
from model.streams import entry_point
from model.weights import STAGES, read_sidecar, weight_path, write_json
from trainer.arguments import MODEL_FLAGS, stage_parser
from trainer.checkpoint import refuse_other_weights

DATA = {  # stage: the published file that it reads
    "pretrain": "pretrain_hq", "full_sft": "sft_mini_512", "lora": "lora_medical", "rlhf": "dpo",
    "reason": "r1_mix_1024",
}  # fmt: skip
QUESTIONS = ("你好，你是谁？", "如何保持健康？", "请用一句话介绍长江。", "Why is the sky blue?", "1+1等于几？")
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


def run(title: str, *command: object, launcher: str = "") -> int:
    """Run one of our scripts as a user would; return its status.

    Ctrl-C reaches the script too, which saves and ends: wait for that and exit.
    """
    words, asked = [*map(str, command)], []
    print(f"\n=== {title}\n$ {launcher or 'python'} {shlex.join(words)}", flush=True)
    words[0] = str(ROOT / words[0])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    with subprocess.Popen([*(shlex.split(launcher) or [sys.executable]), *words]) as child:
        signal.signal(signal.SIGTERM, lambda number, frame: (asked.append(number), child.terminate()))
        child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if asked or child.returncode in STOPPED:
        sys.exit("stopped; run the same command to go on")
    return child.returncode


def must_run(title: str, *command: object) -> None:
    if status := run(title, *command):
        sys.exit(f"error: {command[0]} ended with status {status}")


def converse(title: str, weights: Path, questions: tuple[str, ...]) -> None:
    """Ask weights a few questions, print the answers and keep them for the report."""
    print(f"\n=== {title}", flush=True)
    ready, out_dir = load_ready(weights, ChatTokenizer, device=SHARED_FLAGS["device"]["default"]), weights.parent
    tokenizer, continues = ready.tokenizer, weights.name.startswith("pretrain_")
    prompts = [
        tokenizer.encode_beginning(you) if continues else tokenizer.encode_prompt([{"role": "user", "content": you}])
        for you in questions
    ]
    longest = SHARED_FLAGS["max_new_tokens"]["default"]
    params = SamplingParams(temperature=0, max_new_tokens=longest, stop_ids=(tokenizer.eos_id, tokenizer.pad_id))
    try:
        answers = generate_batch(ready.model, prompts, params, context_length=ready.context_length)
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command to go on")
    turns = []
    for you, prompt, ids in zip(questions, prompts, answers, strict=True):
        text = TextStream(tokenizer, split_thoughts=True, prompt_ids=prompt)
        pieces = [piece for i in ids for piece in text.push(i)] + text.flush()
        turns.append({"you": you, "model": "".join(piece.text for piece in pieces if not piece.is_thought)})
        print(f"  you:   {you}\n  model: {turns[-1]['model']}")
    try:
        (out_dir / "report").mkdir(exist_ok=True)
        write_json(out_dir / "report" / "dialogue.json", {"turns": turns})
    except OSError as error:
        print(f"note: the conversation is not kept: {error}")


def progress(weights: Path) -> dict:
    """Return how far the run of a weight file is."""
    return (weights.exists() and read_sidecar(weights) or {}).get("progress", {"step": 0, "complete": False})


def check_complete(weights: Path, flags: list[object]) -> None:
    """Raise WeightsError if a complete run was of another configuration; tell which other flags it had."""
    parser = stage_parser("")
    args, _ = parser.parse_known_args([*map(str, flags)])  # a stage's own flags are not known here
    sizes = {name: value for name in MODEL_FLAGS if (value := getattr(args, name)) is not None}
    sizes["vocab_size"], args.overwrite = ChatTokenizer(args.tokenizer_path).vocab_size, False
    refuse_other_weights(weights, MiniMindConfig(**PRESETS[args.preset] | sizes), args)
    for name, was in (read_sidecar(weights) or {}).get("flags", {}).items():
        if getattr(args, name, was) not in (was, parser.get_default(name)):
            print(f"note: {weights} was trained with --{name} {was} and stays; another --out_dir trains it again")


def train(stage: str, weights: Path, command: list[object], args: argparse.Namespace) -> None:
    """Run a stage until it is complete; after a crash, resume it as long as it gets ahead."""
    reached = progress(weights)
    if reached["complete"]:
        print(f"\n=== {stage}: {weights} is complete")
        return
    if args.estimate and not reached["step"]:
        run(f"{stage}: what it will take", *command, "--estimate", launcher=args.launcher)
    while True:
        status = run(stage, *command, "--resume", launcher=args.launcher)
        now = progress(weights)
        if not status and now["complete"]:
            return
        if now["step"] <= reached["step"]:
            sys.exit(f"error: {stage} ended with status {status} before it got beyond step {now['step']}; see above")
        print(f"{stage} ended with status {status} after step {now['step']}: going on from there")
        reached = now


def pipeline(args: argparse.Namespace, more: list[str]) -> None:
    size = PRESETS[args.size]
    hidden_size = args.hidden_size or size["hidden_size"]
    use_moe = size.get("use_moe", False) if args.use_moe is None else args.use_moe
    out, shape = ["--out_dir", args.out_dir], ["--hidden_size", hidden_size, *["--use_moe"] * use_moe]
    files = {stage: args.data_dir / f"{DATA[stage]}.jsonl" for stage in args.stages}
    if missing := [path.stem for path in files.values() if not path.exists()]:
        must_run("data", "scripts/download_data.py", *missing, "--out_dir", args.data_dir)
    sizes = ["--preset", args.size, *(["--hidden_size", args.hidden_size] if args.hidden_size else [])]
    sizes += ["--use_moe", use_moe] if args.use_moe is not None else []
    price = ["--price_per_hour", args.price_per_hour] if args.price_per_hour is not None else []
    for stage in args.stages:
        script = STAGES[stage].script if stage in STAGES else "train_lora.py"
        weights = weight_path(args.out_dir, stage, hidden_size, use_moe)
        if stage == "lora":
            weights = weight_path(args.out_dir / "lora", DATA["lora"], hidden_size, use_moe)
        command = [f"trainer/{script}", "--data_path", files[stage], *sizes, *out, *price, *more]
        if stage == "reason" and "rlhf" not in args.stages:
            command += ["--base_weight", "full_sft"]
        if stage in STAGES and progress(weights)["complete"]:
            check_complete(weights, [*sizes, *more])
        train(stage, weights, command, args)
    if args.tasks:
        known = ["pretrain", *(stage for stage in args.stages if stage in STAGES and stage != "pretrain")]
        tasks = ["--weight", *known, "--tasks", *args.tasks, "--download", "--resume"]
        if run("scores", "scripts/evaluate.py", *tasks, *out, *shape):
            print("note: the scores are incomplete; the report goes on without them")
    last = next((stage for stage in reversed(args.stages) if stage in STAGES), "full_sft")
    chat = ["--model_mode", STAGES[last].mode, *shape]
    converse("a conversation", weight_path(args.out_dir, last, hidden_size, use_moe), QUESTIONS)
    run("report", "scripts/report.py", args.out_dir, *price)
    words = ["eval_model.py", *chat, *out]
    if sys.stdin is not None and sys.stdin.isatty():
        run("chat: Ctrl-D ends it", *words)
    else:
        print(f"\ntalk to it: python {shlex.join(map(str, words))}")


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", choices=list(PRESETS), default="minimind2_26m", help="which model")
    add("--hidden_size", type=int, help="another width than the size's")
    add_boolean(parser, "--use_moe", default=None, help="a mixture of experts, or none (default: as the size)")
    add(
        "--stages", nargs="+", choices=list(DATA), default=["pretrain", "full_sft"], help="what to train, in this order"
    )
    add("--launcher", default="", help="what starts a stage, such as 'torchrun --nproc_per_node 2' (default: python)")
    add("--tasks", nargs="*", default=["ceval", "arc_easy"], help="sets to score, see scripts/evaluate.py; none: skip")
    add("--data_dir", type=Path, default=ROOT / "dataset", help="where the files are, or are downloaded to")
    add("--out_dir", type=Path, default=ROOT / "out", help="weights, logs, scores, report")
    add("--price_per_hour", type=float, help="of this machine in dollars")
    add_boolean(parser, "--estimate", True, "say what a stage will take before it begins")
    show_defaults(parser)
    args, more = parser.parse_known_args(argv)
    pipeline(args, more)


if __name__ == "__main__":
    main()
