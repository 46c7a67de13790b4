"""Move runs between machines: one archive of weights, resume states and logs, every file checked by its hash.

    python scripts/pack_run.py pack runs.tar                          all of out/ but the token cache
    python scripts/pack_run.py pack runs.tar --run full_sft_512 pretrain_512 --token_cache
    python scripts/pack_run.py unpack runs.tar                        on the other machine; then train with --resume

Unpacking replaces nothing that differs unless --overwrite is given, and shows no file before all have been checked.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.flags import utf8_path
from model.streams import entry_point
from model.weights import write_atomically

MANIFEST = "manifest.json"
STATE = ".resume"  # unpacked after the weights that it belongs to


def chosen(out_dir: Path, runs: list[str], token_cache: bool) -> list[Path]:
    """Return what goes into the archive. Raises ValueError if a run left nothing."""
    found, seen = [], set()
    for path in sorted(out_dir.rglob("*")):
        parts = path.relative_to(out_dir).parts
        name = next((run for run in runs if any(part.split(".")[0] == run for part in parts)), "")
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if "token_cache" in parts:
            found += [path] * token_cache
        elif name or not runs:
            found.append(path)
            seen.add(name)
    if missing := set(runs) - seen:
        held = ", ".join(sorted(path.stem for path in out_dir.rglob("*.pth"))) or "no weights"
        raise ValueError(f"{out_dir} holds nothing of --run {' '.join(sorted(missing))}; it holds {held}")
    if not found:
        raise ValueError(f"{out_dir} holds nothing to pack; train first, or name another --out_dir")
    return found


def pack(args: argparse.Namespace) -> None:
    files, manifest = chosen(args.out_dir, args.run, args.token_cache), {}

    def write(archive) -> None:
        with tarfile.open(fileobj=archive, mode="w|") as tar:
            for path in files:
                name = path.relative_to(args.out_dir).as_posix()
                with open(path, "rb") as file:  # a run that saves now replaces the file, and this one stays whole
                    manifest[name] = hashlib.file_digest(file, "sha256").hexdigest()
                    file.seek(0)
                    tar.addfile(tar.gettarinfo(arcname=name, fileobj=file), file)
                print(name, flush=True)
            data = json.dumps(manifest, indent=2).encode()
            info = tarfile.TarInfo(MANIFEST)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    write_atomically(args.archive, write)
    print(f"{args.archive}: {len(manifest)} files, {args.archive.stat().st_size / 1e6:,.1f} MB")


def unpack(args: argparse.Namespace) -> None:
    args.out_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=args.out_dir, prefix=".unpack-"))
    try:
        with tarfile.open(args.archive) as tar:
            tar.extractall(staging, filter="data")
        files = [path for path in staging.rglob("*") if path.is_file() and not path.is_symlink()]
        manifest = json.loads((staging / MANIFEST).read_text("utf-8")) if staging / MANIFEST in files else None
        held = {path.relative_to(staging).as_posix() for path in files} - {MANIFEST}
        if not isinstance(manifest, dict) or manifest.keys() != held:  # names that lead elsewhere are not in it either
            raise ValueError(
                f"{args.archive} has no {MANIFEST} that lists its files: it did not arrive whole, or pack_run.py did "
                "not make it"
            )
        for name, digest in manifest.items():
            if digest != digest_of(staging / name):
                raise ValueError(f"{name} in {args.archive} is damaged; copy the archive again")
        differing = [n for n, digest in manifest.items() if digest_of(args.out_dir / n) not in (digest, "")]
        if differing and not args.overwrite:
            raise ValueError(
                f"{args.out_dir} holds other {', '.join(differing[:5])}; move them, replace them with --overwrite, or "
                "name another --out_dir"
            )
        for name in sorted(manifest, key=lambda name: PurePosixPath(name).suffix == STATE):
            (args.out_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, args.out_dir / name)
            print(args.out_dir / name, flush=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def digest_of(path: Path) -> str:
    """Return the hash of a file, "" if there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write an archive")
    unpacking = commands.add_parser("unpack", help="undo it")
    for command, function in ((packing, pack), (unpacking, unpack)):
        command.add_argument("archive", type=utf8_path, help="a .tar file")
        command.add_argument("--out_dir", type=utf8_path, default=ROOT / "out", help="folder of the runs")
        command.set_defaults(function=function)
    packing.add_argument("--run", nargs="+", default=[], help="such as full_sft_512 (default: all)")
    packing.add_argument("--token_cache", action="store_true", help="the caches too; they can always be rebuilt")
    unpacking.add_argument("--overwrite", action="store_true", help="replace files that differ")
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        args.function(args)
    except tarfile.TarError as error:
        raise ValueError(str(error)) from error


if __name__ == "__main__":
    main()
