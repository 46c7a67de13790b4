"""A page where friends chat with your weights: write the folder of a Hugging Face Space, and upload it.

    python scripts/make_space.py                                      out/full_sft_512.pth -> out/space/
    python out/space/app.py                                           look at it here first
    python scripts/make_space.py --repo_id ME/my-chat                 write it and upload it
    python scripts/make_space.py --repo_id ME/my-chat --weight rlhf --private

The folder holds app.py (Gradio), the weights with their sidecar, the tokenizer, and the code of ours that loads and
decodes them; nothing else is needed, and nothing is asked of another host. A free Space has two processor cores.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from huggingface_hub import SpaceCardData

from dataset.tokenization import ChatTokenizer
from model.flags import show_defaults, utf8_path
from model.generation import SamplingParams, stream
from model.loading import add_flags, load_ready, tokenizer_folder
from model.streams import entry_point
from model.weights import find_weights, read_sidecar, sidecar_path
from scripts.convert_model import staging
from scripts.example_prompts import example_prompts
from scripts.push_to_hub import MARK, SOURCE, HuggingFace, public, upload

GRADIO = "6.31.0"
CODE = ("model/*.py", "dataset/*.py", "dataset/*.jinja", "scripts/__init__.py", "scripts/web_markdown.py")
# a Space has no GPU unless it is paid for: torch without CUDA
CPU_TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"
NEEDED = ("torch", "transformers", "tokenizers", "numpy", "filelock", "jinja2")
CORES = 2


def write_space(weights: Path, tokenizer: Path, title: str, license_name: str, target: Path) -> str:
    """Fill the folder; return what it holds. Raises ValueError if the weights cannot be loaded."""
    ready = load_ready(weights, ChatTokenizer, tokenizer_path=tokenizer)
    sidecar = read_sidecar(weights) or {}
    continues = sidecar.get("stage", weights.stem).startswith("pretrain")
    for pattern in CODE:
        for path in ROOT.glob(pattern):
            copy(path, target / path.relative_to(ROOT))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (ready.tokenizer.path / name).is_file():
            copy(ready.tokenizer.path / name, target / "model" / name)
    copy(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer, target / "model" / "tokenizer.json")
    copy(ROOT / "scripts" / "space_app.py", target / "app.py")
    copy(weights, target / weights.name)
    if sidecar:
        sidecar_path(target / weights.name).write_bytes(public(sidecar_path(weights)))
    count = sum(p.numel() for p in ready.model.parameters()) / 1e6
    rate = tokens_per_second(ready)
    space = {
        "title": title,
        "description": f"{count:.3g}M parameters, trained from zero with [MiniMind]({SOURCE}). It makes things up.",
        "weights": weights.name,
        "continues": continues,
        "examples": example_prompts(sidecar, continues, 4),
    }
    (target / "space.json").write_text(json.dumps(space, ensure_ascii=False, indent=2), "utf-8")
    pins = re.findall(rf"^(?:{'|'.join(NEEDED)})==.*$", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    (target / "requirements.txt").write_text("\n".join([CPU_TORCH, *pins, f"gradio=={GRADIO}"]) + "\n", "utf-8")
    card = SpaceCardData(
        title=title, sdk="gradio", sdk_version=GRADIO, python_version="3.11", app_file="app.py", license=license_name
    )
    text = (
        f"---\n{card.to_yaml()}\n---\n\n{MARK}\n\n# {title}\n\nA chat with `{weights.name}`: {count:.2f}M parameters, "
        f"trained with [MiniMind]({SOURCE}). About {rate:.0f} tokens/s on {CORES} processor cores, where this "
        "page was made. Run it at home: `pip install -r requirements.txt && python app.py`.\n"
    )
    (target / "README.md").write_text(text, "utf-8")
    return f"{weights.name}, {count:.2f}M parameters, about {rate:.0f} tokens/s on {CORES} cores"


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def tokens_per_second(ready, count: int = 32) -> float:
    """Return the pace of an answer on this machine, on as many cores as a free Space has, without the first token."""
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    ids = ready.tokenizer.encode_prompt([{"role": "user", "content": "你好"}])
    params = SamplingParams(max_new_tokens=count, temperature=1.0, stop_ids=())
    answer = stream(ready.model, ids, params)
    next(answer)
    begin = time.perf_counter()
    rate = sum(1 for _ in answer) / (time.perf_counter() - begin)
    torch.set_num_threads(before)
    return rate


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weight", default="full_sft", help="stage or .pth file")
    add_flags(parser, "out_dir", "hidden_size", "use_moe", "tokenizer_path")
    add("--output", type=utf8_path, help="folder to write (default: OUT_DIR/space)")
    add("--repo_id", metavar="OWNER/NAME", help="Space to upload to, made if it is missing (default: none)")
    add("--title", help="of the page (default: the name of the Space, or of the weights)")
    add("--license", default="apache-2.0", help="of the weights")
    add("--private", action="store_true", help="make the Space private")
    add("--dry_run", action="store_true", help="with --repo_id: write the folder and list what would be uploaded")
    show_defaults(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    weights = find_weights(args.weight, args.out_dir, args.hidden_size, args.use_moe)
    target = (args.output or Path(args.out_dir) / "space").resolve()
    if target.exists() and any(target.iterdir()) and not (target / "space.json").exists():
        raise ValueError(f"--output {target} holds other files; name a new folder")
    if target in weights.resolve().parents:
        raise ValueError(f"{weights} is in the folder that would be replaced; name another with --output")
    title = args.title or (args.repo_id or weights.stem).split("/")[-1]
    tokenizer = tokenizer_folder(weights, args.tokenizer_path)
    with staging(target) as folder:
        told = write_space(weights, tokenizer, title, args.license, folder / "space")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder / "space", target)
    print(f"{target}: {told}", flush=True)
    if not args.repo_id:
        print(f"python {target / 'app.py'}")
        return
    files = {str(path.relative_to(target)): path for path in sorted(target.rglob("*")) if path.is_file()}
    args.revision, args.keep_others = None, True
    upload(HuggingFace(args, "space"), files, args)


if __name__ == "__main__":
    main()
