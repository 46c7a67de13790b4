"""Runs that move: packed, checked, unpacked elsewhere, and resumed there with the same bits."""

import hashlib
import io
import json
import shutil
import tarfile

import pytest
from conftest import assert_identical, read_resume, tiny_flags

from scripts import pack_run


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    for name in ("full_sft_32.pth", "full_sft_32.json", "resume/full_sft_32.resume", "logs/full_sft_32.jsonl",
                 "resume/.full_sft_32.lock", "pretrain_32.pth", "lora/lora_a_32.pth", "token_cache/a/tokens.bin",
                 "stable/token_cache/a/tokens.bin",
                 "resume/full_sft_32.shards/step-1/0.pt", ".env"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 50)
    return folder


def move(out, target, *words) -> set[str]:
    archive = out.parent / "runs.tar"
    pack_run.main(["pack", str(archive), "--out_dir", str(out), *words])
    pack_run.main(["unpack", str(archive), "--out_dir", str(target)])
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def test_all_runs_move_without_caches_locks_and_secrets(out, tmp_path):
    moved = move(out, tmp_path / "there")
    assert moved == {
        "full_sft_32.pth", "full_sft_32.json", "resume/full_sft_32.resume", "logs/full_sft_32.jsonl",
        "pretrain_32.pth", "lora/lora_a_32.pth", "resume/full_sft_32.shards/step-1/0.pt",
    }  # fmt: skip
    assert all((tmp_path / "there" / name).read_bytes() == (out / name).read_bytes() for name in moved)


def test_one_run_moves_with_the_cache_if_asked(out, tmp_path):
    moved = move(out, tmp_path / "there", "--run", "full_sft_32", "--token_cache")
    assert "token_cache/a/tokens.bin" in moved and "resume/full_sft_32.shards/step-1/0.pt" in moved
    assert not moved & {"pretrain_32.pth", "lora/lora_a_32.pth"}


def test_nothing_is_replaced_unasked_and_nothing_damaged_arrives(out, tmp_path):
    there, archive = tmp_path / "there", tmp_path / "runs.tar"
    move(out, there)
    move(out, there)  # the same files once more
    (there / "pretrain_32.pth").write_bytes(b"trained there")
    with pytest.raises(SystemExit, match="other pretrain_32.pth.*--overwrite"):
        pack_run.main(["unpack", str(archive), "--out_dir", str(there)])
    assert (there / "pretrain_32.pth").read_bytes() == b"trained there"
    pack_run.main(["unpack", str(archive), "--out_dir", str(there), "--overwrite"])
    data = bytearray(archive.read_bytes())
    data[data.index(b"pretrain_32.pthpretrain") + 5] ^= 1
    archive.write_bytes(data)
    with pytest.raises(SystemExit, match="pretrain_32.pth in .* is damaged"):
        pack_run.main(["unpack", str(archive), "--out_dir", str(tmp_path / "new")])
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match="error: "):
        pack_run.main(["unpack", str(archive), "--out_dir", str(tmp_path / "new")])
    assert not list((tmp_path / "new").iterdir())


DIGEST = hashlib.sha256(b"code").hexdigest()


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("../a.py", None),
        ("a.py", {"a.py": DIGEST, "../a.py": ""}),
        ("a.py", {"a.py": DIGEST, "../../a.py": ""}),
        ("a.py", {"a.py": DIGEST, "b.py": ""}),
        ("a.py", {"a.py": ""}),
        ("a.py", {}),
        ("a.py", []),
        ("a.py", None),
    ],
)
def test_an_archive_cannot_write_elsewhere_nor_what_its_manifest_does_not_list(name, manifest, tmp_path):
    archive, there = tmp_path / "evil.tar", tmp_path / "new" / "deep"
    with tarfile.open(archive, "w") as tar:
        for member, data in ((name, b"code"), ("manifest.json", json.dumps(manifest).encode())):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(SystemExit, match="error: .*(outside|lists its files|damaged)"):
        pack_run.main(["unpack", str(archive), "--out_dir", str(there)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_weights_behind_a_link_are_packed(out, tmp_path):
    shutil.move(out / "pretrain_32.pth", tmp_path / "large_disk.pth")
    (out / "pretrain_32.pth").symlink_to(tmp_path / "large_disk.pth")
    assert "pretrain_32.pth" in move(out, tmp_path / "there")
    there = tmp_path / "there" / "pretrain_32.pth"
    assert not there.is_symlink() and there.read_bytes() == b"pretrain_32.pth" * 50


def test_unknown_runs_and_empty_folders_are_told(out, tmp_path):
    with pytest.raises(SystemExit, match="nothing of --run rlhf_32; it holds full_sft_32"):
        pack_run.main(["pack", str(tmp_path / "a.tar"), "--out_dir", str(out), "--run", "rlhf_32"])
    with pytest.raises(SystemExit, match="nothing to pack"):
        pack_run.main(["pack", str(tmp_path / "a.tar"), "--out_dir", str(tmp_path / "none")])
    assert not (tmp_path / "a.tar").exists()


def test_a_run_that_moved_ends_with_the_same_bits(train, tmp_path, texts, monkeypatch):
    from trainer import distributed

    here, there, whole = tmp_path / "here", tmp_path / "there", tmp_path / "whole"
    line = ["--max_steps=4", "--save_interval=1"]
    train("train_pretrain", [*tiny_flags(whole, texts), *line])
    agreed = distributed.StopRequest.agreed
    asked = []
    monkeypatch.setattr(
        distributed.StopRequest, "agreed", lambda *args: asked.append(1) or len(asked) == 2 or agreed(*args)
    )
    with pytest.raises(SystemExit):
        train("train_pretrain", [*tiny_flags(here, texts), *line])
    move(here, there)
    shutil.rmtree(here)
    train("train_pretrain", [*tiny_flags(there, texts), *line, "--resume"])
    assert_identical(read_resume(there)["model"], read_resume(whole)["model"])
