"""Publish weights or data: a repository on the Hugging Face Hub or ModelScope, with a card written from the sidecar.

    python scripts/push_to_hub.py --repo_id ME/my-model MiniMind2-Small --dry_run    a converted folder; look first
    python scripts/push_to_hub.py --repo_id ME/my-model MiniMind2-Small MiniMind2-Small.gguf out/full_sft_512.pth
    python scripts/push_to_hub.py --repo_id ME/my-adapter out/lora/lora_medical_512.pth --base_model ME/my-model
    python scripts/push_to_hub.py --repo_id ME/my-data dataset/my.jsonl --dataset
    python scripts/push_to_hub.py --repo_id ME/my-model MiniMind2-Small --to modelscope

Nothing goes up but what --dry_run lists: of a folder its weights, configuration, tokenizer and model code; the files
that are named; their sidecars without paths of this machine. The token is that of `hf auth login` or HF_TOKEN; for
ModelScope, MODELSCOPE_API_TOKEN. Interrupted, the same command goes on.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PureWindowsPath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from huggingface_hub import DatasetCardData, HfApi, ModelCardData, get_token
from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError, validate_repo_id

from model.flags import utf8_path
from model.loading import read_config
from model.streams import entry_point
from model.weights import STAGES, WEIGHT_NAME, read_sidecar, sidecar_path
from scripts.model_catalog import count_parameters

FOLDER_FILES = ("*.safetensors", "*.json", "*.py", "*.jinja", "Modelfile", "merges.txt", "*.model")
FORMATS = {".pth", ".gguf", ".resume", ".jsonl", ".parquet"}
MARK = "<!-- written by push_to_hub.py; without this line the card is kept as it is -->"
SOURCE = "https://github.com/jingyaogong/minimind"
NOTES = {"qwen2_moe": "; not for mlx-lm, which never renormalises the weights of the chosen experts"}
# status -> what to do about it
CURES = {
    401: "the token is not accepted; run `hf auth login` again, or set HF_TOKEN",
    403: "the token may not write there; make one with write access, or name a repository of your own",
    404: "there is no such repository or revision",
    409: "something else was committed at the same moment; run the command again",
    413: "a file is larger than the hub takes",
    429: "too many requests; wait some minutes and run the command again: what has arrived is not sent again",
}


# --- what goes up ----------------------------------------------------------------------------------------------------


def collect(paths: list[Path]) -> dict[str, Path | bytes]:
    """Return name in the repository -> file, or what it holds, for the paths of the command line."""
    files: dict[str, Path | bytes] = {}

    def add(name: str, content: Path | bytes) -> None:
        if name in files:
            raise ValueError(f"two of the paths would become {name} in the repository; leave one out")
        files[name] = content

    for path in paths:
        if path.is_dir():
            found = sorted({file for pattern in FOLDER_FILES for file in path.glob(pattern) if file.is_file()})
            if not any(file.suffix == ".safetensors" for file in found):
                raise ValueError(f"{path} holds no weights (*.safetensors); make such a folder with convert_model.py")
            for file in found:
                add(file.name, public(file) if file.name == "minimind.json" else file)
        elif not path.is_file():
            raise ValueError(f"{path} not found; name a converted folder, .pth, .gguf or data files")
        elif path.suffix not in FORMATS:
            raise ValueError(f"{path} is neither weights nor data ({', '.join(sorted(FORMATS))})")
        else:
            add(path.name, path)
            if path.suffix in (".pth", ".gguf") and sidecar_path(path).is_file():
                add(sidecar_path(path).name, public(sidecar_path(path)))
            modelfile = path.with_name("Modelfile")
            if path.suffix == ".gguf" and modelfile.is_file() and modelfile not in files.values():
                add(f"{path.stem}.Modelfile" if "Modelfile" in files else "Modelfile", modelfile)
    return files


def weights_in(path: Path) -> list[Path]:
    """Return the .gguf files of a folder that holds no other weights; else the path itself."""
    return [path] if any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf")) or [path]


def public(sidecar: Path) -> bytes:
    content = without_paths(json.loads(sidecar.read_text("utf-8")))
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def without_paths(sidecar: dict) -> dict:
    """Return a sidecar without the paths of this machine, which are private; the data's name stays."""
    if "flags" not in sidecar:
        return sidecar
    flags = sidecar["flags"].items()
    flags = {k: v for k, v in flags if not (isinstance(v, str) and re.search(r"[/\\]", v))}
    if data := data_name(sidecar):
        flags["data_path"] = data
    return sidecar | {"flags": flags}


def data_name(sidecar: dict) -> str:
    """Return the name of the training data without its folders, "" if the sidecar does not tell."""
    return PureWindowsPath(str(sidecar.get("flags", {}).get("data_path") or "")).name  # splits at / and at \\


# --- the card --------------------------------------------------------------------------------------------------------


def facts(path: Path) -> dict[str, str]:
    """Return what is known of weights, ready to be shown."""
    sidecar = read_sidecar(path) or {}
    files = path.glob("*.safetensors") if path.is_dir() else [path] if path.suffix == ".pth" else []
    count, config = count_parameters(files), sidecar.get("config", {})
    if (path / "config.json").is_file():
        config = read_config(path)
    stage, flags = sidecar.get("stage", ""), sidecar.get("flags", {})
    metrics, progress = sidecar.get("metrics", {}), sidecar.get("progress", {})
    heads, kind = config.get("num_attention_heads"), config.get("model_type", "")
    experts = config.get("num_experts") or config.get("n_routed_experts") if kind.endswith("moe") else None
    factor = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("factor")
    shown = {
        "stage": stage + (f" ({STAGES[stage].script})" if stage in STAGES else ""),
        "parameters": f"{count / 1e6:.2f}M" if count else "",
        "architecture": kind + NOTES.get(kind, ""),
        "hidden size": config.get("hidden_size"),
        "layers": config.get("num_hidden_layers"),
        "attention heads": heads and f"{heads}, {config.get('num_key_value_heads', heads)} for keys and values",
        "experts": experts and f"{experts}, {config.get('num_experts_per_tok')} for each token",
        "context": factor and f"stretched by YaRN, factor {factor:g}",
        "made from": sidecar.get("converted_from"),
        "adapter merged in": sidecar.get("merged_adapter"),
        "trained on": data_name(sidecar),
        "length of rows": flags.get("max_seq_len"),
        "tokens seen": f"{progress['tokens']:,}" if isinstance(progress.get("tokens"), int) else "",
        "optimizer steps": f"{progress['step']:,}" if isinstance(progress.get("step"), int) else "",
        "optimizer": flags.get("optimizer"),
        "learning rate": flags.get("learning_rate"),
    }
    shown |= {name.replace("_", " "): f"{value:.4f}" for name, value in metrics.items() if isinstance(value, float)}
    shown["tokenizer SHA-256"] = sidecar.get("tokenizer_sha256")
    return {name: str(value) for name, value in shown.items() if value not in ("", None)}


def model_card(
    repo_id: str,
    paths: dict[str, Path],
    files: Collection[str],
    scores: Iterable[Path] = (),
    base_model: str | None = None,
    language: Sequence[str] = ("zh", "en"),
    license: str | None = None,
) -> str:
    """Return the README.md of weights.

    repo_id: on a hub, or the name of a folder. paths: title -> folder or file. files: names of what lies next to it.
    """
    peft = "adapter_config.json" in files
    adapter = peft or any(path.suffix == ".pth" and path.parent.name == "lora" for path in paths.values())
    loads = "config.json" in files  # in transformers
    custom = any(name.endswith(".py") for name in files)
    gguf, pth = (next((n for n in sorted(files) if n.endswith(end)), "") for end in (".gguf", ".pth"))
    data = ModelCardData(
        language=list(language),
        license=license,
        library_name="peft" if peft else "transformers" if loads else "pytorch",
        pipeline_tag="text-generation",
        tags=["pytorch", "gpt", "transformers", "text-generation-inference"] + ["custom_code"] * custom,
        base_model=base_model,
        inference={"parameters": {"temperature": 0.85, "top_p": 0.85}} if loads and not custom else False,
    )
    name = repo_id.split("/")[-1]
    parts = [f"# {name}", f"A small language model trained from zero with [MiniMind]({SOURCE})."]
    if adapter:
        parts[1] = f"A LoRA adapter for {base_model or 'MiniMind'}, trained with [MiniMind]({SOURCE})."
    for title, path in paths.items():
        if path.suffix not in FORMATS - {".pth", ".gguf"} and (known := facts(path)):
            parts += [f"## {title}", "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in known.items())]
    for path in scores:
        parts += [f"## Scores of {path.stem}", path.with_suffix(".md").read_text("utf-8").strip()]
    parts.append("## Use")
    if loads or peft:
        trust = ", trust_remote_code=True" * custom
        library, loader = ("peft", "AutoPeftModelForCausalLM") if peft else ("transformers", "AutoModelForCausalLM")
        base = base_model or "OWNER/NAME of its base" if peft else repo_id
        parts.append(
            f"```python\nfrom {library} import {loader}\nfrom transformers import AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{base}"{trust})\n'
            f'model = {loader}.from_pretrained("{repo_id}"{trust})\n'
            'turns = [{"role": "user", "content": "你好"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))\n```"
        )
    commands = [f"vllm serve {repo_id}"] * (loads and not custom)
    if gguf:
        commands += [f"llama-cli -hf {repo_id}", f"ollama run hf.co/{repo_id}"]
    local = [f"hf download {repo_id} --local-dir "] if "/" in repo_id else []
    if pth:
        match, where = WEIGHT_NAME.fullmatch(Path(pth).stem), "out/lora" if adapter else "out"
        lora_name = Path(pth).stem.removesuffix("_moe").rsplit("_", 1)[0]
        mode = f"--model_mode {STAGES[match['stage']].mode}" if match else f"--lora_name {lora_name}"
        commands += [*(command + where for command in local), f"python eval_model.py {mode}"]
    elif loads:
        commands += [*(command + name for command in local), f"python eval_model.py --load 1 --hf_path {name}"]
    if commands:
        parts.append("```bash\n" + "\n".join(commands) + "\n```")
    return f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n" + "\n\n".join(parts) + "\n"


def found_scores(paths: list[Path]) -> list[Path]:
    """Return what scripts/evaluate.py wrote about these weights."""
    candidates = [path.parent / "scores" / f"{path.stem}.json" for path in paths]
    candidates += [ROOT / "out" / "scores" / f"{path.name}.json" for path in paths if path.is_dir()]
    return [path for path in candidates if path.with_suffix(".md").is_file()]


def dataset_card(args: argparse.Namespace, files: dict[str, Path | bytes]) -> str:
    data = DatasetCardData(language=args.language, license=args.license, task_categories=["text-generation"])
    parts = [f"# {args.repo_id.split('/')[-1]}", f"Training data for [MiniMind]({SOURCE}), one JSON object a line."]
    rows, first = [], ""
    for name, path in files.items():
        if name.endswith(".jsonl"):
            with open(path, "rb") as file:
                line = file.readline()
                first = first or line[:2000].decode("utf-8", "replace").strip()
                records = bool(line) + sum(1 for _ in file)
                rows.append(f"| {name} | {records:,} | {path.stat().st_size / 1e6:,.1f} MB |")
    parts.append("| file | records | size |\n|---|---|---|\n" + "\n".join(rows))
    parts.append(f"```json\n{first}\n```")
    return f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n" + "\n\n".join(parts) + "\n"


# --- the hubs --------------------------------------------------------------------------------------------------------


class HuggingFace:
    name, login = "the Hugging Face Hub", "run `hf auth login`, or set HF_TOKEN"

    def __init__(self, args: argparse.Namespace, kind: str):
        self.args, self.kind, self.token, self.branch = args, kind, get_token(), args.revision
        self.api = HfApi(token=self.token)

    def held(self) -> list[str] | None:
        """Return the names of the files in the repository; None if there is none."""
        try:
            return self.api.list_repo_files(self.args.repo_id, repo_type=self.kind, revision=self.branch)
        except RevisionNotFoundError:
            self.branch = None  # it will start as a copy of the main one
            return self.api.list_repo_files(self.args.repo_id, repo_type=self.kind)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                self.api.whoami()  # the hub says 401 both of a bad token and of what it hides
            return None

    def download(self, name: str, folder: str) -> str:
        options = {"repo_type": self.kind, "revision": self.branch, "local_dir": folder}
        return self.api.hf_hub_download(self.args.repo_id, name, **options)

    def create(self) -> None:
        options = {"private": self.args.private, "space_sdk": "gradio" if self.kind == "space" else None}
        self.api.create_repo(self.args.repo_id, repo_type=self.kind, exist_ok=True, **options)
        if self.args.revision:
            self.api.create_branch(self.args.repo_id, branch=self.args.revision, repo_type=self.kind, exist_ok=True)

    def upload(self, folder: Path, message: str) -> str:
        options = {"repo_type": self.kind, "revision": self.args.revision, "commit_message": message}
        return self.api.upload_folder(repo_id=self.args.repo_id, folder_path=folder, **options).commit_url


class ModelScope:
    name, login = "ModelScope", "set MODELSCOPE_API_TOKEN to the one that modelscope.cn shows in your settings"

    def __init__(self, args: argparse.Namespace, kind: str):
        try:
            from modelscope_hub import HubApi
        except ImportError:
            raise ValueError("--to modelscope: run pip install -r requirements-cloud.txt") from None
        self.args, self.kind, self.token = args, kind, os.environ.get("MODELSCOPE_API_TOKEN")
        self.api = HubApi(token=self.token, endpoint=os.environ.get("MODELSCOPE_ENDPOINT"))

    def held(self) -> list[str] | None:
        if not self.api.repo_exists(self.args.repo_id, self.kind):
            return None
        files = self.api.list_repo_files(self.args.repo_id, self.kind, revision=self.args.revision)
        return [file.path for file in files]

    def download(self, name: str, folder: str) -> Path:
        options = {"revision": self.args.revision, "local_dir": folder}
        return self.api.download_file(self.args.repo_id, self.kind, name, **options)

    def create(self) -> None:
        if not self.api.repo_exists(self.args.repo_id, self.kind):
            visibility = "private" if self.args.private else "public"
            self.api.create_repo(self.args.repo_id, self.kind, visibility=visibility)

    def upload(self, folder: Path, message: str) -> str:
        options = {"revision": self.args.revision, "commit_message": message, "use_cache": False}
        reasons = []  # the library's error does not hold them
        try:
            self.api.upload_folder(self.args.repo_id, self.kind, folder, progress_callback=reasons.append, **options)
        except Exception as error:
            told = {str(event["error"]) for event in reasons if event.get("error")}
            raise OSError("; ".join([str(error), *sorted(told)])) from error
        return f"{self.api._config.endpoint}/{self.kind}s/{self.args.repo_id}"


HUBS = {"huggingface": HuggingFace, "modelscope": ModelScope}


def push(hub: HuggingFace | ModelScope, files: dict[str, Path | bytes], args: argparse.Namespace) -> str:
    """Upload the files in one commit and return its address. Raises ValueError if the repository holds other files."""
    held = hub.held() or []
    others = sorted(set(held) - set(files) - {".gitattributes", "README.md", "configuration.json"})
    if others and not args.keep_others:
        raise ValueError(
            f"{args.repo_id} holds other files: {', '.join(others[:8])}. Give --keep_others to add to it, or name "
            "another repository"
        )
    with tempfile.TemporaryDirectory() as folder:
        if "README.md" in held and MARK not in Path(hub.download("README.md", folder)).read_text("utf-8"):
            print("README.md there was not written by this script; it stays as it is", flush=True)
            files = {name: content for name, content in files.items() if name != "README.md"}
    hub.create()
    with tempfile.TemporaryDirectory(prefix="push-") as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.symlink_to(content.resolve())
        return hub.upload(Path(folder), "Upload with MiniMind's push_to_hub.py")


def explain(error: Exception, hub: HuggingFace | ModelScope, repo_id: str) -> str:
    """Return an error of a client library as one line with the cure, and without the token."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status_code", None)
    cure = CURES.get(status, "the hub fails; run the command again later" if (status or 0) >= 500 else "")
    if not status:
        cure = "run the command again: what has arrived is not sent again"
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    return f"{repo_id} on {hub.name}: {cure} ({reason})".replace(hub.token or "\0", "…")


def upload(hub: HuggingFace | ModelScope, files: dict[str, Path | bytes], args: argparse.Namespace) -> None:
    """List the files and, unless it is a dry run, push them. Ends with a message if that is not possible."""
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{name:40} {size / 1e6:12,.3f} MB")
    try:
        validate_repo_id(args.repo_id)
        if args.repo_id.count("/") != 1:
            raise ValueError(f"--repo_id {args.repo_id}: must be OWNER/NAME")
        if args.dry_run:
            return
        if not hub.token:
            raise ValueError(f"no token for {hub.name}: {hub.login}")
        print(push(hub, files, args))
    except ValueError as error:
        sys.exit(f"error: {error}".replace(hub.token or "\0", "…"))
    except Exception as error:  # each library has its own
        sys.exit(f"error: {explain(error, hub, args.repo_id)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", type=utf8_path, help="converted folders, .pth, .gguf; with --dataset .jsonl")
    add("--repo_id", required=True, metavar="OWNER/NAME", help="repository, made if it is missing")
    add("--to", choices=list(HUBS), default="huggingface", help="which hub (default: %(default)s)")
    add("--dataset", action="store_true", help="the files are data")
    add("--private", action="store_true", help="make the repository private")
    add("--revision", help="branch to commit to (default: the main one)")
    add("--license", default="apache-2.0", help="of what is uploaded (default: %(default)s)")
    add("--language", nargs="+", default=["zh", "en"], help="(default: zh en)")
    add("--base_model", metavar="OWNER/NAME", help="what an adapter belongs to")
    add("--scores", nargs="*", type=utf8_path, help="from evaluate.py (default: OUT_DIR/scores/ of these weights)")
    add("--keep_others", action="store_true", help="add to a repository that holds other files")
    add("--dry_run", action="store_true", help="list the files and print the card; nothing is sent")
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    paths = [path for each in args.paths for path in weights_in(each)]
    files = collect(paths)
    if args.base_model and isinstance(config := files.get("adapter_config.json"), Path):
        filled = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": args.base_model}
        files[config.name] = json.dumps(filled, indent=2).encode()
    if args.dataset:
        card = dataset_card(args, files)
    else:
        titles = {path.name + "/" * path.is_dir(): path for path in paths}
        scores = found_scores(paths) if args.scores is None else args.scores
        card = model_card(args.repo_id, titles, files, scores, args.base_model, args.language, args.license)
    files["README.md"] = card.encode()
    hub = HUBS[args.to](args, "dataset" if args.dataset else "model")
    upload(hub, files, args)
    if args.dry_run:
        print(f"\n{files['README.md'].decode()}")


if __name__ == "__main__":
    main()
