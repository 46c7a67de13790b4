"""What is no data file is named with its cure, and a file that changed is seen to have changed."""

import gzip
import os
import re
from pathlib import Path

import pytest

from dataset.data_file import SAMPLE_BYTES, SAMPLES, data_identity

LINES = "".join(f'{{"text": "山谷里的第{number}条小路通向一座石桥。"}}\n' for number in range(40))
CAFE = "".join(f'{{"text": "un café à côté, déjà {number}"}}\n' for number in range(40))
FAULTS = {
    "utf16": (LINES.encode("utf-16"), "looks like utf-16. To convert it: .*--encoding utf-16 --output"),
    "utf16le": (LINES.encode("utf-16-le"), "looks like utf-16-le.*--encoding utf-16-le"),
    "utf16be": (LINES.encode("utf-16-be"), "looks like utf-16-be.*--encoding utf-16-be"),
    "gbk": (LINES.encode("gbk"), "looks like gb18030.*prepare_data.py convert .*/data.jsonl --encoding gb18030"),
    "cp1252": (CAFE.encode("cp1252"), "looks like cp1252.*--encoding cp1252"),
    "gzip": (gzip.compress(LINES.encode()), "is a gzip file; unpack it, or: python scripts/prepare_data.py convert"),
    "zip": (b"PK\x03\x04" + b"x" * 99, "is a zip file"),
    "parquet": (b"PAR1" + b"x" * 99, "is a parquet file"),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 99, "is a zstd file"),
    "array": (b'\xef\xbb\xbf\n [{"text": "x"}]', "is a JSON array, not one object a line. To convert it"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
    "html": (b"<!DOCTYPE html><html>404</html>", "is a web page, not data"),
    "zeros": (bytes(10_000), "zero bytes only.*download it again"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize(("content", "message"), FAULTS.values(), ids=FAULTS)
def test_a_file_of_another_kind_is_named_with_the_cure(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        data_identity(path)


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        CAFE.encode(),
        (LINES * 100).encode()[: SAMPLE_BYTES + 1],  # the first sample ends within a character
        LINES.encode() + b'{"text": "\xff\xfe\xfd\xfc"}\n',  # told line by line
        b'{"text": "[1]"}\n',
    ],
)
def test_what_may_hold_records_is_left_to_them(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert data_identity(path)["data_bytes"] == len(content)


@pytest.mark.parametrize("size", [10_000, 2 * SAMPLES * SAMPLE_BYTES])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_change_is_seen_where_size_and_time_stay(tmp_path, size, place):
    """At the head, in the middle and at the tail; in a small file anywhere."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * size)
    os.utime(path, ns=(0, 10**18))
    before = data_identity(path)
    changed = bytearray(b"x" * size)
    # samples lie between head and tail at equal distances: take the first byte of the one in the middle
    middle = (SAMPLES // 2) * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1)
    changed[{0.0: 0, 0.5: middle, 1.0: size - 1}[place]] = ord("y")
    path.write_bytes(changed)
    os.utime(path, ns=(0, 10**18))
    after = data_identity(path)
    assert before.pop("data_sample_sha256") != after.pop("data_sample_sha256") and before == after


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file.*write it to a file first"):
        data_identity(tmp_path / "pipe")


def test_names_that_are_too_long_are_told(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*too long"):
        data_identity(tmp_path / ("x" * 300 + ".jsonl"))
    with pytest.raises(ValueError, match="cannot read .*too long"):
        data_identity(tmp_path / ("x" * 300) / "data.jsonl")


def test_a_missing_published_file_comes_with_its_download_command(tmp_path):
    with pytest.raises(ValueError, match="sft_mini_512.jsonl not found") as caught:
        data_identity(tmp_path / "sft_mini_512.jsonl")
    command = f"python scripts/download_data.py sft_mini_512 --out_dir {tmp_path}"
    assert command in str(caught.value)
    sample = re.search(r"--data_path (\S+pretrain\.jsonl)", str(caught.value))[1]
    assert Path(sample).is_file()
    with pytest.raises(ValueError, match="mine.jsonl not found") as caught:
        data_identity(tmp_path / "mine.jsonl")
    assert "download" not in str(caught.value)
