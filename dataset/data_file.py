"""Check a data file: there, readable, jsonl in UTF-8. If it is not, say what it looks like and how to cure it."""

import hashlib
import os
import re
import stat
from pathlib import Path

SAMPLE_BYTES, SAMPLES = 64 << 10, 64  # hashed: samples from head to tail; a small file as a whole
CONVERT = "python scripts/prepare_data.py convert"
SAMPLE = Path(__file__).resolve().parent / "sample"
PUBLISHED = re.compile(r"(pretrain_hq|sft_(mini_)?\d+|dpo|r1_mix_\d+|lora_(identity|medical))\.jsonl")
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}


def data_identity(path: Path) -> dict:
    """Return path, size, time and a hash of samples of a data file: they tell whether it is still the same.

    Raises ValueError if there is no such file, or if it does not begin like jsonl in UTF-8.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{path} is a folder; --data_path takes one jsonl file")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            raise ValueError(f"{path} is not a regular file, and it is read more than once; write it to a file first")
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            head = file.read(SAMPLE_BYTES)
            for number in range(SAMPLES):
                file.seek(number * max(status.st_size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    except FileNotFoundError as error:
        near = sorted(other.name for other in path.parent.glob("*.jsonl"))
        holds = f"{path.parent} holds: {', '.join(near[:10]) or 'no jsonl file'}"
        if not os.path.isdir(path.parent):
            holds = f"the folder {path.parent} is not there either"
        message = f"{path} not found; give a jsonl file to --data_path or --valid_path. {holds}"
        if PUBLISHED.fullmatch(path.name):
            message += (
                f". To download it: python scripts/download_data.py {path.stem} --out_dir {path.parent}. "
                f"To try a stage at once: --data_path {SAMPLE}{os.sep}pretrain.jsonl or sft.jsonl"
            )
        raise ValueError(message) from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; see --data_path") from error
    if fault := _fault(head, path):
        raise ValueError(f"{path} {fault}")
    return {
        "data_path": str(path),
        "data_bytes": status.st_size,
        "data_mtime_ns": status.st_mtime_ns,
        "data_sample_sha256": digest.hexdigest(),
    }


def disguise(head: bytes) -> str | None:
    """Return what a file that begins like this is instead of data, and the cure."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:100].lower()
    if head and not head.strip(b"\0"):
        return "holds zero bytes only; its transfer broke off: download it again"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip file; unpack it"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the data; fetch it with: git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not data; download the file itself"
    return None


def _fault(head: bytes, path: Path) -> str | None:
    """Return what is wrong with a file that begins like this, and the cure."""
    if not head:
        return "is empty; download or make it again"
    if fault := disguise(head):
        return fault
    new = path.with_name(path.name.split(".")[0] + "_utf8.jsonl")
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return f"is a {name} file; unpack it, or: {CONVERT} {path} --output {new}"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        return f"is a JSON array, not one object a line. To convert it: {CONVERT} {path} --output {new}"
    if encoding := guess_encoding(head):
        return (
            f"is not UTF-8; it looks like {encoding}. To convert it: "
            f"{CONVERT} {path} --encoding {encoding} --output {new}"
        )
    return None


def guess_encoding(head: bytes, fewest_wrong: int = 4) -> str | None:
    """Return the encoding of a text that is not UTF-8, if that can be told; None if it has fewer wrong bytes."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if 4 * head.count(0) > len(head):
        return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    # In another encoding most bytes beyond ASCII are wrong. A few wrong ones in UTF-8 are reported line by line later.
    beyond = len(re.findall(rb"[\x80-\xff]", head))
    wrong = head.decode("utf-8", "replace").count("\ufffd")
    if wrong < fewest_wrong or 4 * wrong < beyond:
        return None
    alone = len(re.findall(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])", head))  # Chinese characters are pairs
    return "cp1252" if 2 * alone > beyond else "gb18030"
