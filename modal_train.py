"""The stages on a rented GPU of Modal. Data, weights, logs and resume states live on a volume, minimind by default.

    pip install -r requirements-cloud.txt                             once, then: modal setup
    modal run modal_train.py::train_pretrain                          on one A100
    modal run modal_train.py::train_sft --gpu H100:8 --epochs 3       flags of the stage next to ours
    modal run modal_train.py::chat --model_mode 1                     type a line, read an answer
    modal run modal_train.py::fetch --stage full_sft                  weights, sidecars and logs into out/
    modal run modal_train.py::run scripts/convert_model.py            any other command of the repository

Published data is downloaded into the volume on first use; a --data_path that exists here is uploaded. The stage's own
estimate of time and cost comes first, unless --skip_estimate is given. A run that is preempted, killed or timed out
goes on with --resume by itself, and so does the same command given again; --overwrite starts over. With `modal run
--detach` you can close the laptop.
"""

import argparse
import contextlib
import os
import posixpath
import subprocess
import sys
import time
import uuid
from pathlib import Path, PurePosixPath

import modal

# GPU -> US dollars an hour; CPU and memory come on top. T4, L4, L40S, A100-80GB and H100 as modal.com listed them in
# May 2026, the others as far as known
PRICES = {
    "T4": 0.59, "L4": 0.80, "A10G": 1.10, "L40S": 1.95, "A100": 2.10, "A100-40GB": 2.10, "A100-80GB": 2.50,
    "H100": 3.95, "H200": 4.54, "B200": 6.25,
}  # fmt: skip
KEYS = ("WANDB_API_KEY", "SWANLAB_API_KEY", "HF_TOKEN")  # go along as a secret if they are set here
PUBLISHED = ("pretrain_hq", "sft_mini_512", "sft_512", "dpo", "r1_mix_1024", "lora_medical")  # read by default
IN_CONTAINER, VOLUME = Path("/minimind"), Path("/vol")
CODE = Path(__file__).resolve().parent if modal.is_local() else IN_CONTAINER
DAY = 24 * 3600  # the longest that Modal lets a function run; a retry goes on from there
POLL_SECONDS, GRACE_SECONDS = 1, 25  # a preempted container has 30 seconds to save
STOPPED = (130, 143)  # status of a stage that a signal ended, after saving

# files for the container; all else (data, weights, .env) stays at home
FILES = modal.FilePatternMatcher(
    "*.py",
    "*/*.py",
    "model/**/*.json",
    "dataset/*.jinja",
    "dataset/sample/*.jsonl",
    "scripts/*.jsonl",
    "scripts/web_*",
    "scripts/*.css",
    "requirements.txt",
    "!out",
)
image = (
    modal.Image.debian_slim("3.11")
    .apt_install("build-essential")  # torch.compile needs a compiler
    .pip_install_from_requirements(str(CODE / "requirements.txt"))
    .add_local_dir(CODE, str(IN_CONTAINER), ignore=~FILES)
)
app = modal.App("minimind")
defaults = {
    "image": image,
    "volumes": {str(VOLUME): modal.Volume.from_name("minimind", create_if_missing=True)},
    "timeout": DAY,
}


# --- in the container ------------------------------------------------------------------------------------------------


@app.function(**defaults, max_containers=1, single_use_containers=True, retries=modal.Retries(max_retries=5))
def train(words: list[str], volume: str, gpus: int, price: float, run_id: str, estimate: bool = True) -> int:
    """Run a stage, its estimate first, and return its exit status: a user's mistake is not tried again.

    words: its script and flags. price: dollars an hour. Raises RuntimeError if it was interrupted, so that Modal starts
    it again. run_id: of this call and its retries; with --overwrite only the first attempt starts over.
    """
    enter(volume)
    command = [*launcher(gpus), *words]
    saved_something = VOLUME / "out" / "resume" / f".{run_id}"
    if estimate and not saved_something.exists():
        estimated = subprocess.run([*command, "--estimate", f"--price_per_hour={price}"], cwd=CODE)
        if estimated.returncode or any(word.split("=")[0] == "--estimate" for word in words):
            return estimated.returncode
    if saved_something.exists() or not any(word.split("=")[0] == "--overwrite" for word in words):
        command.append("--resume")
    begin, first = time.monotonic(), newest_save()
    with subprocess.Popen(command, cwd=CODE) as stage:
        try:
            last = first
            while stage.poll() is None:
                time.sleep(POLL_SECONDS)
                if (now := newest_save()) > last:  # a fresh run deletes the state of an earlier one
                    last = now
                    saved_something.touch()
                    sync(volume, "commit")
        finally:
            stage.terminate()  # preempted: the stage saves and ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                stage.wait(GRACE_SECONDS)
            stage.kill()
            sync(volume, "commit")
    hours, status = (time.monotonic() - begin) / 3600, stage.returncode
    print(f"{words[0]}: {60 * hours:.1f} min, about ${hours * price:.2f} for the GPU", flush=True)
    # torchrun turns every failure into status 1
    if status < 0 or status in STOPPED or (status and gpus > 1 and newest_save() > first):
        raise RuntimeError(f"{words[0]} was interrupted (status {status}); the next attempt goes on from the last save")
    saved_something.unlink(missing_ok=True)
    sync(volume, "commit")
    return status


@app.function(**defaults)
def execute(words: list[str], volume: str, unless: str = "") -> int:
    """Run a command in the repository; return its exit status. unless: a file on the volume that makes it needless.

    What it leaves in the repository's folder, as convert_model.py does by default, is copied into out/.
    """
    enter(volume)
    if unless and (VOLUME / unless).exists():
        return 0
    before = set(CODE.iterdir())
    status = subprocess.run([*launcher(0)[: words[0].endswith(".py")], *words], cwd=CODE).returncode
    for path in sorted(set(CODE.iterdir()) - before):
        print(f"{path} is on the volume as out/{path.name}", flush=True)
        subprocess.run(["cp", "-r", path, VOLUME / "out"], check=True)
    sync(volume, "commit")
    return status


@app.function(**defaults)
def converse(words: list[str], volume: str, lines: modal.Queue) -> int:
    """Chat in a container: lines come through a queue, None ends; the answers are what is printed."""
    enter(volume)
    with subprocess.Popen([*launcher(0), *words], cwd=CODE, stdin=subprocess.PIPE, encoding="utf-8") as chat:
        while chat.poll() is None and (line := lines.get()) is not None:
            chat.stdin.write(line)
            chat.stdin.flush()
    return chat.returncode


def enter(volume: str) -> None:
    """See the volume as it is now, and make it the repository's out/ and data."""
    sync(volume, "reload")
    for name in ("dataset", "out/resume"):
        (VOLUME / name).mkdir(parents=True, exist_ok=True)
    links = {CODE / "out": VOLUME / "out"}
    links |= {CODE / "dataset" / path.name: path for path in (VOLUME / "dataset").glob("*.jsonl")}
    for link, target in links.items():
        if not link.exists():
            link.symlink_to(target)


def sync(volume: str, action: str) -> None:
    """Commit what was written to a volume, or reload what others wrote."""
    if modal.is_local():
        return
    try:
        getattr(modal.Volume.from_name(volume), action)()
    except (modal.exception.Error, RuntimeError) as error:  # Modal also commits in the background and at the end
        print(f"note: the volume did not {action}: {error}", flush=True)


def newest_save() -> int:
    """Return when a resume state was last replaced, in nanoseconds; 0 if there is none."""
    newest = 0
    for folder, _, names in os.walk(VOLUME / "out"):  # unlike rglob it bears folders that the stage renames meanwhile
        for name in names:
            if name.endswith(".resume"):
                with contextlib.suppress(FileNotFoundError):
                    newest = max(newest, os.stat(os.path.join(folder, name)).st_mtime_ns)
    return newest


def launcher(gpus: int) -> list[str]:
    if gpus < 2:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]


# --- at home ---------------------------------------------------------------------------------------------------------


def own_flags(words: tuple[str, ...], gpu: str | None, *more: tuple[str, dict]) -> tuple[argparse.Namespace, list[str]]:
    """Return our flags, checked, and the rest, which are the script's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add = parser.add_argument
    add("--gpu", default=gpu)
    add("--timeout", type=int, default=DAY)
    add("--volume", default="minimind")
    for name, options in more:
        add(name, **options)
    args, rest = parser.parse_known_args(words)
    name, _, count = (args.gpu or "").partition(":")
    if args.gpu and (name not in PRICES or not (count or "1").isdecimal() or not 1 <= int(count or 1) <= 8):
        sys.exit(f"error: --gpu {args.gpu}: must be NAME or NAME:COUNT with 1 to 8 of {', '.join(PRICES)}")
    if not 1 <= args.timeout <= DAY:
        sys.exit(
            f"error: --timeout {args.timeout}: must be 1 to {DAY} seconds; a run that takes longer goes on by itself"
        )
    args.count = int(count or 1) if args.gpu else 0
    args.price = args.count * PRICES.get(name, 0)
    return args, rest


def configured(function: modal.Function, args: argparse.Namespace) -> modal.Function:
    """Return a function with the GPU, time, volume and secrets that the flags ask for."""
    volumes = {str(VOLUME): modal.Volume.from_name(args.volume, create_if_missing=True)}
    secrets = [modal.Secret.from_dict({key: os.environ[key] for key in KEYS if key in os.environ})]
    return function.with_options(gpu=args.gpu, timeout=args.timeout, volumes=volumes, secrets=secrets)


def submit(script: str, data: str, words: tuple[str, ...]) -> None:
    """Train with a stage's script. data: the published file that it reads by default, "" if there is none."""
    data_path = {"type": Path, "default": data and f"dataset/{data}.jsonl"}
    paths = ("--data_path", data_path), ("--valid_path", {"type": Path, "default": ""}), ("--out_dir", {})
    args, rest = own_flags(words, "A100", ("--skip_estimate", {"action": "store_true"}), *paths)
    if args.out_dir:
        if posixpath.normpath(args.out_dir).split("/")[0] != "out":
            sys.exit(f"error: --out_dir {args.out_dir}: must be in out/, which is what the volume keeps")
        rest.append(f"--out_dir={args.out_dir}")
    if args.data_path.name == args.valid_path.name and args.data_path.resolve() != args.valid_path.resolve():
        sys.exit(f"error: {args.data_path} and {args.valid_path} have one name on the volume; rename one")
    for flag in ("data_path", "valid_path"):
        if (path := getattr(args, flag)).name:
            bring(path, args)
            rest.append(f"--{flag}=dataset/{path.name}")
    words = [f"trainer/{script}", *rest]
    run_id, estimate = uuid.uuid4().hex, not args.skip_estimate
    status = configured(train, args).remote(words, args.volume, args.count, args.price, run_id, estimate)
    if status:
        sys.exit(
            f"error: {script} ended with status {status}; see above. Where that names a script, here it is an entry: "
            "modal run modal_train.py::train_sft for train_full_sft.py, and the script's own name for the others"
        )


def bring(path: Path, args: argparse.Namespace) -> None:
    """Have a data file on the volume: uploaded from here, else downloaded there as one of the published files."""
    if path.is_file():
        if path.stem in PUBLISHED and not path.parent.samefile(CODE / "dataset"):
            sys.exit(f"error: {path} has the name of a published file, which it would replace on the volume; rename it")
        volume = modal.Volume.from_name(args.volume, create_if_missing=True)
        with volume.batch_upload(force=True) as batch:  # blocks that are there already are not sent again
            batch.put_file(path, f"/dataset/{path.name}")
        return
    download = ["scripts/download_data.py", path.stem, "--out_dir", str(VOLUME / "dataset")]
    args = argparse.Namespace(**vars(args) | {"gpu": None})
    if configured(execute, args).remote(download, args.volume, unless=f"dataset/{path.name}"):
        sys.exit(f"error: {path} is neither a file here, nor on the volume, nor one of the published files; see above")


@app.local_entrypoint()
def train_pretrain(*words: str):
    submit("train_pretrain.py", "pretrain_hq", words)


@app.local_entrypoint()
def train_sft(*words: str):
    submit("train_full_sft.py", "sft_mini_512", words)


@app.local_entrypoint()
def train_lora(*words: str):
    submit("train_lora.py", "lora_medical", words)


@app.local_entrypoint()
def train_dpo(*words: str):
    submit("train_dpo.py", "dpo", words)


@app.local_entrypoint()
def train_distill_reason(*words: str):
    submit("train_distill_reason.py", "r1_mix_1024", words)


@app.local_entrypoint()
def train_distillation(*words: str):
    submit("train_distillation.py", "sft_512", words)


@app.local_entrypoint()
def train_grpo(*words: str):
    submit("train_grpo.py", "", words)


@app.local_entrypoint()
def run(*words: str):
    """Any command: a script of the repository with its flags, or a program."""
    args, rest = own_flags(words, None)
    if not rest:
        sys.exit("error: run what? Name a script of the repository, or a program")
    sys.exit(configured(execute, args).remote(rest, args.volume))


@app.local_entrypoint()
def evaluate(*words: str):
    run("scripts/evaluate.py", "--gpu", "L4", *words)


@app.local_entrypoint()
def download_data(*words: str):
    run("scripts/download_data.py", "--out_dir", str(VOLUME / "dataset"), *words)


@app.local_entrypoint()
def chat(*words: str):
    """Talk to weights on the volume; flags are those of eval_model.py."""
    args, rest = own_flags(words, "T4")
    with modal.Queue.ephemeral() as lines:
        call = configured(converse, args).spawn(["eval_model.py", *rest], args.volume, lines)
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        sys.exit(call.get())


@app.local_entrypoint()
def fetch(*words: str):
    """Bring weights, sidecars and logs home: of --stage, or all."""
    options = ("--stage", {"default": ""}), ("--out_dir", {"type": Path, "default": CODE / "out"})
    args, rest = own_flags(words, None, *options, ("--overwrite", {"action": "store_true"}))
    if rest:
        sys.exit(f"error: fetch knows no {' '.join(rest)}; it has --stage, --volume, --out_dir and --overwrite")
    volume = modal.Volume.from_name(args.volume)
    try:
        entries = [entry for entry in volume.iterdir("out") if entry.type == modal.volume.FileEntryType.FILE]
    except modal.exception.NotFoundError:
        entries = []
    wanted = []
    for entry in entries:
        path = PurePosixPath(entry.path.lstrip("/")).relative_to("out")
        private = any(part.startswith(".") or part in ("resume", "token_cache") for part in path.parts)
        if not private and path.name.startswith(f"{args.stage}_" if args.stage else ""):
            wanted.append((entry, args.out_dir / path))
    if not wanted:
        held = ", ".join(entry.path for entry in entries if entry.path.endswith(".pth")) or "no weights"
        sys.exit(f"error: volume {args.volume} has no {args.stage or 'results'} yet; train first. It holds: {held}")
    for entry, path in wanted:
        there = path.stat() if path.exists() else None
        if there and (there.st_size, int(there.st_mtime)) == (entry.size, entry.mtime):
            continue
        if there and not args.overwrite:
            sys.exit(f"error: {path} is there and differs from the volume's; move it, or replace it with --overwrite")
        partial = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                for piece in volume.read_file(entry.path):
                    file.write(piece)
            if partial.stat().st_size != entry.size:
                raise OSError("it did not arrive whole; run the command again")
            os.utime(partial, (entry.mtime, entry.mtime))
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            sys.exit(f"error: {path}: {error}")
        print(path, flush=True)
