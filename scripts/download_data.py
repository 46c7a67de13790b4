"""Download the published training files and weights: resumable, checked by size and hash, never half a file.

    python scripts/download_data.py                          the two files of the quick recipe, into dataset/
    python scripts/download_data.py dpo r1_mix_1024          others by name
    python scripts/download_data.py --list                   what there is, for what, how large, where
    python scripts/download_data.py --weights MiniMind2      a published model, for eval_model.py --load 1
    python scripts/download_data.py --source modelscope      from ModelScope; HF_ENDPOINT names a mirror of Hugging Face

A transfer that broke goes on where it stopped when the command is run again.
"""

import argparse
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.streams import entry_point

# name: (size, tokens to train at, what it is); lengths in names are characters
DATA = {
    "pretrain_hq": ("1.6 GB", 320, "pretraining; of the quick recipe"),
    "sft_mini_512": ("1.2 GB", 340, "SFT; of the quick recipe"),
    "sft_512": ("7.5 GB", 350, "SFT, conversations below 512 characters"),
    "sft_1024": ("5.6 GB", 650, "SFT, below 1,024 (part of sft_2048)"),
    "sft_2048": ("9 GB", 1400, "SFT, below 2,048"),
    "dpo": ("0.9 GB, later 55 MB", 1024, "DPO, preferences below 3,000"),
    "r1_mix_1024": ("340 MB", 720, "reasoning distilled from R1"),
    "lora_medical": ("34 MB", 512, "LoRA: medical questions"),
    "lora_identity": ("23 KB", 512, "LoRA: who am I"),
    "pretrain_t2t_mini": ("1.2 GB", 768, "MiniMind-3: pretraining, small"),
    "pretrain_t2t": ("10 GB", 380, "MiniMind-3: pretraining"),
    "sft_t2t_mini": ("1.6 GB", 768, "MiniMind-3: SFT with tools, small"),
    "sft_t2t": ("14 GB", 768, "MiniMind-3: SFT with tools"),
    "rlaif": ("24 MB", 768, "MiniMind-3: prompts for GRPO and the like"),
    "agent_rl": ("86 MB", 768, "MiniMind-3: tool use over several turns"),
    "agent_rl_math": ("18 MB", 768, "MiniMind-3: mathematics with tools"),
}
WEIGHTS = {
    "MiniMind2-Small": "26M, for transformers",
    "MiniMind2": "104M, for transformers",
    "MiniMind2-MoE": "145M mixture, for transformers",
    "MiniMind2-R1": "104M that reasons, for transformers",
    "MiniMind2-PyTorch": ".pth of all stages and sizes",
    "minimind-3": "64M, for transformers",
    "minimind-3-moe": "198M mixture, for transformers",
    "minimind-3-pytorch": ".pth of MiniMind-3",
}


class Remote(NamedTuple):
    """A file on a hub: its size in bytes, and its SHA-256 or git hash if the hub tells one."""

    name: str
    size: int
    digest: str | None


class HuggingFace:
    """A repository of data or a model on Hugging Face."""

    owner, revision = "jingyaogong", "main"
    endpoint = constants.ENDPOINT

    def __init__(self, name: str, kind: str, revision: str | None):
        self.repo, self.kind, self.revision = f"{self.owner}/{name}", kind, revision or self.revision

    def url(self, name: str) -> str:
        folder = "datasets/" if self.kind == "dataset" else ""
        return f"{self.endpoint}/{folder}{self.repo}/resolve/{self.revision}/{name}"

    def files(self) -> list[Remote]:
        api = HfApi(self.endpoint)
        info = api.repo_info(self.repo, repo_type=self.kind, revision=self.revision, files_metadata=True)
        return [Remote(f.rfilename, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in info.siblings]


class ModelScope(HuggingFace):
    """The same on ModelScope, by its plain addresses."""

    owner, revision = "gongjy", "master"
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")

    def url(self, name: str) -> str:
        return f"{self.endpoint}/{self.kind}s/{self.repo}/resolve/{self.revision}/{name}"

    def files(self) -> list[Remote]:
        tree = "tree" if self.kind == "dataset" else "files"
        url = f"{self.endpoint}/api/v1/{self.kind}s/{self.repo}/repo/{tree}?Revision={self.revision}&Recursive=True"
        response = http_backoff("GET", url)
        hf_raise_for_status(response)
        entries = response.json()["Data"]["Files"]
        return [Remote(f["Path"], f["Size"], f.get("Sha256")) for f in entries if f.get("Type") != "tree"]


HUBS = {"huggingface": HuggingFace, "modelscope": ModelScope}


def fault_of(path: Path, remote: Remote) -> str | None:
    """Return what is wrong with a file on disk; None if it is identical to the hub's."""
    if path.stat().st_size != remote.size:
        return f"it has {path.stat().st_size:,} bytes, the hub's has {remote.size:,}"
    is_lfs = len(remote.digest or "") == 64  # else a git blob
    digest = hashlib.sha256() if is_lfs else hashlib.sha1(f"blob {remote.size}\0".encode())
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return None if remote.digest in (None, digest.hexdigest()) else "its contents differ from the hub's"


@contextmanager
def hub_errors(hub: HuggingFace, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library has its own; none must end in a traceback
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{what}: {reason[:500]}\nWhat has arrived is kept: run the command again to go on. If {hub.endpoint} "
            "cannot be reached, try --source modelscope, or a mirror: HF_ENDPOINT=https://…"
        ) from error


def download(hub: HuggingFace, wanted: list[str] | None, target: Path, overwrite: bool) -> None:
    """Download files of a hub into a folder. Raises ValueError if that is not possible."""
    with hub_errors(hub, f"cannot list {hub.repo}"):
        files = {f.name: f for f in hub.files() if not f.name.startswith(".")}
    missing = [name for name in wanted or [] if name not in files]
    if missing:
        raise ValueError(
            f"{hub.repo} has no {', '.join(missing)} at revision {hub.revision}; it has {', '.join(sorted(files))}. "
            "Older files may be in an older --revision"
        )
    root = os.path.abspath(target)  # of names: a file there may be a link to another disk
    if outside := [n for n in wanted or files if not Path(os.path.abspath(target / n)).is_relative_to(root)]:
        raise ValueError(f"{hub.repo} lists {outside[0]!r}, which would be written outside {target}; nothing is loaded")
    plan = []
    for remote in [files[name] for name in wanted or sorted(files)]:
        path = target / remote.name
        fault = fault_of(path, remote) if path.exists() else "missing"
        if fault and path.exists() and not overwrite:
            raise ValueError(f"{path} is there, but {fault}; move it, or replace it with --overwrite")
        if fault:
            plan.append(remote)
        else:
            print(f"{path}: already there and complete")
    staging = target / ".download"
    staging.mkdir(parents=True, exist_ok=True)
    parts = [staging / f"{remote.name}.part" for remote in plan]
    arrived = sum(part.stat().st_size for part in parts if part.exists())
    needed, free = sum(remote.size for remote in plan) - arrived, shutil.disk_usage(target).free
    if needed > free:
        raise ValueError(f"{target} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; see --out_dir")
    try:
        with FileLock(staging / "lock", timeout=0):
            for remote in plan:
                fetch(hub, remote, staging, target)
    except Timeout:
        raise ValueError(f"another run is downloading into {target}; wait for it") from None
    if not any(staging.rglob("*.part")):  # of other files, which a later run goes on with
        shutil.rmtree(staging, ignore_errors=True)


def fetch(hub: HuggingFace, remote: Remote, staging: Path, target: Path) -> None:
    """Download one file into staging, from where it stopped; check it, then give it its name."""
    print(f"{hub.url(remote.name)} ({remote.size / 1e6:,.1f} MB)", flush=True)
    part, path = staging / f"{remote.name}.part", target / remote.name
    for folder in (part.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # hf_hub_download begins again after every stop; http_get under it goes on, on either hub
    with hub_errors(hub, remote.name), open(part, "ab") as file:
        if file.tell() > remote.size:
            file.seek(file.truncate(0))
        headers = build_hf_headers() if type(hub) is HuggingFace else None
        http_get(hub.url(remote.name), file, resume_size=file.tell(), headers=headers, expected_size=remote.size)
    if fault := fault_of(part, remote):
        part.unlink()
        raise ValueError(f"{remote.name} did not arrive complete: {fault}. Run the command again")
    part.replace(path)
    print(f"{path}: complete", flush=True)


def print_list(hub: HuggingFace) -> None:
    for name, (size, tokens, what) in DATA.items():
        print(f"{name + '.jsonl':24} {size:20} --max_seq_len {tokens:<5} {what}\n    {hub.url(name + '.jsonl')}")
    print("\n--weights")
    for name, what in WEIGHTS.items():
        print(f"{name:24} {what}\n    {type(hub)(name, 'model', None).url('').split('/resolve/')[0]}")


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", default=["pretrain_hq", "sft_mini_512"], help="names from --list (default: %(default)s)")
    add("--list", action="store_true", help="print what there is, with addresses, and stop")
    add("--source", choices=list(HUBS), default="huggingface", help="which hub (default: %(default)s)")
    add("--weights", nargs="+", default=[], metavar="NAME", help="models instead of data, each into its own folder")
    add("--out_dir", type=Path, help="where to (default: dataset/; weights: the repository's root)")
    add("--revision", help="branch, tag or commit on the hub (default: its newest)")
    add("--overwrite", action="store_true", help="replace files that differ from the hub's")
    args = parser.parse_args(argv)
    hub = HUBS[args.source]("minimind_dataset", "dataset", args.revision)
    if args.list:
        print_list(hub)
    elif args.weights:
        for name in args.weights:
            model = HUBS[args.source](name, "model", args.revision)
            download(model, None, (args.out_dir or ROOT) / name, args.overwrite)
    else:
        names = [name.removesuffix(".jsonl") + ".jsonl" for name in args.files]
        download(hub, names, args.out_dir or ROOT / "dataset", args.overwrite)


if __name__ == "__main__":
    main()
