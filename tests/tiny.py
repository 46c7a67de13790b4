"""Stand in for python, torchrun, make and others while test_pages_run.py runs a page: same commands, tiny sizes.

A copy of the repository is the working folder. Scripts run for real, with a layer, two steps and a few tokens; servers
go to the background and are ended by the next one; what needs a network or another machine is only looked at.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# Muon computes in bfloat16, which some CPUs only emulate
STAGE = "--optimizer adamw --num_hidden_layers 1 --max_steps 2 --batch_size 2 --max_seq_len 128 --epochs 1 --device cpu"
SIZES = {  # flags that a script is given in place of its own
    "train_distillation.py": f"{STAGE} --teacher_num_hidden_layers 1",
    "train_grpo.py": f"{STAGE} --prompts_per_step 2 --group_size 2 --max_new_tokens 4 --eval_samples 2",
    "eval_model.py": "--max_new_tokens 4 --device cpu",
    "train_tokenizer.py": "--vocab_size 300",
    "recipe.py": "--tokens 4096 --num_hidden_layers 1 --hidden_size 64 --device cpu",
    "evaluate.py": "--device cpu --limit 2 --max_new_tokens 4",
    "decoding.py": "--prompt_tokens 8 --new_tokens 4 --long_prompt 16 --concurrent 2 --rounds 1",
    "gpu.py": "--models 26M --rows 1 --max_seq_len 64 --seconds 0.1 --batches 1 --new_tokens 4 "
    "--num_hidden_layers 1 --device cpu",
}  # fmt: skip
QUICKSTART = """
from scripts import quickstart
quickstart.COMMON += " --num_hidden_layers 1 --max_steps 2 --optimizer adamw"
quickstart.DIALOGUE = quickstart.DIALOGUE[:1]
quickstart.main()
"""
HEALTH = {
    "serve_openai_api.py": "http://127.0.0.1:8998/health",
    "web_demo.py": "http://127.0.0.1:{port}/_stcore/health",
}
BACKGROUND = Path("out/.background")
SECONDS = 180  # for a server to start


def main(program: str, *words: str) -> int:
    words = list(words)
    if any("original/" in word for word in words) and not Path("original").exists():
        shutil.copytree(
            "out", "original/out", ignore=shutil.ignore_patterns("*.json", "resume", "token_cache", "original")
        )
        shutil.copytree("model", "original/model")
    if program in ("python", "python3"):
        return python(words)
    if program == "torchrun":
        return launch([sys.executable, "-m", "torch.distributed.run", "--standalone"], words)
    if program == "deepspeed":
        return launch([sys.executable, "-m", "deepspeed.launcher.runner"], words)
    if program == "streamlit":
        return streamlit(words)
    if program == "make":
        return make(words)
    if program == "git":  # the copy is the clone
        Path(words[-1]).symlink_to(".")
    return 0


def python(words: list[str]) -> int:
    if words[:2] == ["-m", "venv"]:
        activate = Path(words[2], "bin", "activate")
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.touch()
        return 0
    name = Path(words[0]).name
    if words[0] == "-m" or name == "download_data.py":  # pytest; the data is there
        return 0
    if name in ("push_to_hub.py", "make_space.py"):
        words.append("--dry_run")
    if name == "quickstart.py":
        return subprocess.run([sys.executable, "-c", QUICKSTART]).returncode
    if name == "serve_openai_api.py":
        return background([sys.executable, *words, "--max_seq_len", "512"], HEALTH[name])  # room for the sample's tools
    if name == "take_screenshots.py" and not shutil.which("chromium"):
        return 0
    return subprocess.run([sys.executable, *with_sizes(words)], input="你好\n", encoding="utf-8").returncode


def launch(launcher: list[str], words: list[str]) -> int:
    """torchrun or deepspeed with two processes on this machine."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    count = ["--nproc_per_node", "2"] if "torch.distributed.run" in launcher else ["--num_accelerators", "2"]
    return subprocess.run([*launcher, *count, *with_sizes(words[at:])]).returncode


def with_sizes(words: list[str]) -> list[str]:
    name = Path(words[0]).name
    sizes = SIZES.get(name, STAGE if "trainer" in words[0] else "").split()
    if name == "recipe.py" and words[-1] in ("report", "versus"):
        sizes = []
    for flag, value in zip(sizes[::2], sizes[1::2], strict=True):
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


def streamlit(words: list[str]) -> int:
    port = words[words.index("--server.port") + 1] if "--server.port" in words else "8501"
    command = [sys.executable, "-m", "streamlit", "run", "--server.headless", "true", *words[1:]]
    return background(command, HEALTH["web_demo.py"].format(port=port))


def background(command: list[str], health: str) -> int:
    """Start a server in place of the one before it and wait until it answers."""
    end_background()
    with Path("out/server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    BACKGROUND.write_text(str(server.pid))
    for _ in range(SECONDS * 2):
        if server.poll() is not None:
            break
        try:
            return 0 if urllib.request.urlopen(health, timeout=2).status == 200 else 1
        except OSError:
            time.sleep(0.5)
    print(Path("out/server.log").read_text("utf-8", "replace")[-2000:], file=sys.stderr)
    return 1


def end_background() -> None:
    if BACKGROUND.exists():
        pid = int(BACKGROUND.read_text())
        BACKGROUND.unlink()
        try:
            os.killpg(pid, signal.SIGTERM)
            for _ in range(100):
                os.killpg(pid, 0)
                time.sleep(0.1)
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def make(words: list[str]) -> int:
    """The quickstart for real, of the other targets only what they would do."""
    if words == ["quickstart"]:
        return python(["-m", "venv", ".venv"]) + python(["scripts/quickstart.py"])
    real = next(path for path in map(shutil.which, ("/usr/bin/make", "/bin/make", "/usr/local/bin/make")) if path)
    return subprocess.run([real, "-n", *words], stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
