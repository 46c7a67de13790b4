"""modal_train.py with the real modal package: what is asked of Modal; its functions run here, killed and resumed."""

import contextlib
import errno
import os
import queue
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY, assert_identical, read_resume, write_conversations, write_texts, write_weights

from model.weights import STAGES, read_state_dict

modal = pytest.importorskip("modal", reason="modal is not installed: requirements-cloud.txt")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills and links as Linux does, where the container runs")
import modal_train  # noqa: E402

RUN = {**TINY, "max_steps": 8, "save_interval": 1}


def inside(function: modal.Function) -> object:
    """The client's own object behind its public face: what it will send to Modal."""
    return next(value for name, value in vars(function).items() if name.startswith("_sync_original"))


@pytest.fixture(scope="session")
def code(tmp_path_factory) -> Path:
    """The repository as the container has it: the files that the image adds, and no others."""
    folder = tmp_path_factory.mktemp("container") / "minimind"
    for path in [*ROOT.glob("*.*"), *ROOT.glob("[mdts]*/*.*"), *ROOT.glob("dataset/sample/*")]:
        name = path.relative_to(ROOT)
        if modal_train.FILES(name) and name.parts[0] != "tests":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    return folder


@pytest.fixture
def container(code, tmp_path, monkeypatch) -> types.SimpleNamespace:
    """Its functions think that they are in a container of Modal, with a volume of files in tmp_path.

    commits: how many there were; on_commit, on_reload: called then.
    """
    state = types.SimpleNamespace(volume=tmp_path / "vol", commits=0, on_commit=lambda: None, on_reload=lambda: None)

    def sync(volume: str, action: str) -> None:
        state.commits += action == "commit"
        (state.on_commit if action == "commit" else state.on_reload)()

    def enter(volume: str) -> None:
        for link in (code / "out", *code.glob("dataset/*.jsonl")):
            link.unlink(missing_ok=True)
        original(volume)

    original = modal_train.enter
    monkeypatch.setattr(modal_train, "CODE", code)
    monkeypatch.setattr(modal_train, "VOLUME", state.volume)
    monkeypatch.setattr(modal_train, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(modal_train, "enter", enter)
    monkeypatch.setattr(modal_train, "sync", sync)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_texts(_folder(state.volume / "dataset") / "pretrain_hq.jsonl", 48)
    return state


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def train(script: str = "train_pretrain.py", run_id: str = "1", gpus: int = 0, estimate: bool = False, **flags) -> int:
    words = [f"trainer/{script}", *(f"--{name}={value}" for name, value in (RUN | flags).items())]
    return modal_train.train.local(words, "minimind", gpus, 3.6, run_id, estimate)


def kill_stages() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended just now, a zombie too
            if any("trainer/train_" in word for word in child.cmdline()):
                child.send_signal(signal.SIGKILL)


# --- what Modal is asked for -----------------------------------------------------------------------------------------


def asked(*words: str) -> object:
    args, _ = modal_train.own_flags(words, "A100")
    return inside(modal_train.configured(modal_train.train, args))._options


@pytest.mark.parametrize(("gpu", "name", "count"), [("H100:8", "H100", 8), ("L40S", "L40S", 1), ("A10G:2", "A10G", 2)])
def test_gpu_time_volume_and_secrets_are_those_of_the_flags(monkeypatch, gpu, name, count):
    monkeypatch.setenv("WANDB_API_KEY", "a-key")
    options = asked("--gpu", gpu, "--timeout=600", "--volume", "mine", "--epochs", "3")
    assert (options.resources.gpu_config.gpu_type, options.resources.gpu_config.count) == (name, count)
    assert options.timeout_secs == 600
    ((path, volume),) = options.validated_volumes
    assert path == "/vol" and volume.name == "mine"
    assert "WANDB_API_KEY" in repr(options.secrets) and "a-key" not in repr(options.secrets)


def test_without_flags_it_is_one_a100_for_a_day_with_the_volume_minimind():
    options = asked()
    assert (options.resources.gpu_config.gpu_type, options.resources.gpu_config.count) == ("A100", 1)
    assert options.timeout_secs == 24 * 3600 and options.validated_volumes[0][1].name == "minimind"


def test_the_container_gets_code_and_sample_and_nothing_private():
    wanted = ["model/weights.py", "model/tokenizer.json", "dataset/sample/sft.jsonl", "trainer/train_dpo.py"]
    wanted += ["model/tokenizer_v1/tokenizer.json"]
    wanted += ["modal_train.py", "scripts/web_page.css", "scripts/report.css", "requirements.txt", "eval_model.py"]
    private = [".env", "dataset/pretrain_hq.jsonl", "out/full_sft_512.pth", "out/logs/a.jsonl", ".git/config", ".netrc"]
    private += ["out/mine.py", "out/exp/mine.py"]  # they would make out/ there a folder of the container's own
    private += ["MiniMind2/model.safetensors", ".venv/lib/python3.11/site-packages/torch/__init__.py"]
    assert all(modal_train.FILES(Path(name)) for name in wanted)
    assert not any(modal_train.FILES(Path(name)) for name in private)
    assert all(not modal_train.FILES(Path(name)) or (ROOT / name).exists() for name in wanted)


def test_every_stage_has_an_entry_that_starts_its_script(monkeypatch):
    started = {}
    monkeypatch.setattr(modal_train, "submit", lambda script, data, words: started.update({script: (data, words)}))
    entries = [name for name in vars(modal_train) if name.startswith("train_")]
    for name in entries:
        getattr(modal_train, name)("--epochs", "2")
    scripts = {stage.script for stage in STAGES.values()} | {"train_lora.py"}
    assert started.keys() == scripts and {"train_pretrain", "train_sft"} <= set(entries)
    assert {data for data, _ in started.values()} - {""} == set(modal_train.PUBLISHED)
    for script, (data, words) in started.items():
        assert words == ("--epochs", "2")
        text = (ROOT / "trainer" / script).read_text("utf-8")
        assert f'"dataset/{data or "grpo"}.jsonl"' in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "RTX4090"], "H100"),
        (["--gpu", "H100:9"], "1 to 8"),
        (["--gpu=H100:many"], "--gpu"),
        (["--timeout", "100000"], "--timeout"),
        (["--out_dir", "/data"], "must be in out/"),
        (["--out_dir=out/../exp"], "must be in out/"),
        (["--data_path=a/d.jsonl", "--valid_path=b/d.jsonl"], "have one name on the volume"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_started(words, said):
    with pytest.raises(SystemExit) as stopped:
        modal_train.train_pretrain(*words)
    assert str(stopped.value).startswith("error: ") and said in str(stopped.value)


def test_a_file_from_home_is_uploaded_and_never_replaces_a_published_one(tmp_path, monkeypatch):
    uploads, jobs = [], []
    batch = contextlib.nullcontext(types.SimpleNamespace(put_file=lambda path, name: uploads.append((path, name))))
    volume = types.SimpleNamespace(batch_upload=lambda force: batch)
    job = types.SimpleNamespace(remote=lambda words, *_: jobs.append(words))
    monkeypatch.setattr(modal.Volume, "from_name", lambda name, **_: volume)
    monkeypatch.setattr(modal_train, "configured", lambda function, args: job)
    published, mine = tmp_path / "pretrain_hq.jsonl", tmp_path / "mine.jsonl"
    for path in (published, mine):
        write_texts(path, 4)
    with pytest.raises(SystemExit, match="name of a published file.*rename it"):
        modal_train.train_pretrain("--data_path", str(published))
    assert not uploads
    modal_train.train_pretrain("--data_path", str(mine), "--valid_path", str(mine), "--out_dir", "out/exp")
    assert uploads == [(mine, "/dataset/mine.jsonl")] * 2
    assert {"--data_path=dataset/mine.jsonl", "--valid_path=dataset/mine.jsonl", "--out_dir=out/exp"} < set(jobs[0])


@pytest.mark.parametrize("error", [RuntimeError("open files"), modal.exception.ConflictError("open files")])
def test_a_volume_that_cannot_sync_now_is_told_and_ends_nothing(monkeypatch, capsys, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(modal, "is_local", lambda: False)
    monkeypatch.setattr(modal.Volume, "from_name", lambda name: types.SimpleNamespace(commit=fail, reload=fail))
    for action in ("reload", "commit"):
        modal_train.sync("minimind", action)
        assert f"did not {action}: open files" in capsys.readouterr().out


def test_the_command_line_reaches_the_entry(tmp_path):
    """`modal run` itself accepts flags of a stage, and says that it has no account."""
    env = {"HOME": str(tmp_path), "MODAL_CONFIG_PATH": str(tmp_path / "modal.toml"), "PATH": os.environ["PATH"]}
    command = ["-m", "modal", "run", "modal_train.py::train_pretrain", "--gpu", "H100", "--epochs=2", "--use_moe"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "oken" in done.stdout + done.stderr and "No such option" not in done.stderr


# --- what runs there -------------------------------------------------------------------------------------------------


def test_killed_with_a_volume_that_lags_the_same_command_ends_with_the_same_bits(container, tmp_path, capfd):
    """Killed in mid-step; mounted again, the volume lacks the last commit until it is reloaded."""
    assert train() == 0
    assert "trainer/train_pretrain.py: 0." in capfd.readouterr().out
    assert not list((container.volume / "out" / "resume").glob(".1")) and container.commits >= 2
    out, whole, steps = container.volume / "out", tmp_path / "whole", []
    shutil.move(out, whole)

    def keep_two_commits_then_kill() -> None:
        if len(steps) < 2 and read_resume(out)["progress"]["step"] > max(steps, default=0):
            # the stage goes on meanwhile: what it writes beside and renames may be gone before it is copied
            shutil.copytree(out, tmp_path / f"commit{len(steps)}", ignore=shutil.ignore_patterns("*.tmp"))
            steps.append(read_resume(tmp_path / f"commit{len(steps)}")["progress"]["step"])
        if len(steps) == 2:
            kill_stages()

    container.on_commit = keep_two_commits_then_kill
    with pytest.raises(RuntimeError, match="interrupted .status -9."):
        train()
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "commit0", out)
    container.on_commit = lambda: None
    container.on_reload = lambda: shutil.copytree(tmp_path / "commit1", out, dirs_exist_ok=True)
    assert train() == 0
    assert f"is at step {steps[1]}; going on" in capfd.readouterr().out
    assert_identical(read_resume(out)["model"], read_resume(whole)["model"])
    assert_identical(read_resume(out)["optimizer"], read_resume(whole)["optimizer"])
    assert_identical(read_state_dict(out / "pretrain_32.pth"), read_state_dict(whole / "pretrain_32.pth"))


def test_saves_in_a_folder_of_out_are_seen_too(container):
    assert modal_train.newest_save() == 0
    (_folder(container.volume / "out" / "exp" / "resume") / "pretrain_32.resume").touch()
    assert modal_train.newest_save() > 0


def test_looking_for_saves_bears_folders_that_go_meanwhile(container, monkeypatch):
    gone, listed = _folder(container.volume / "out" / "token_cache" / "plan.unfinished"), []
    (_folder(container.volume / "out" / "resume") / "pretrain_32.resume").touch()
    scan = os.scandir

    def scan_as_one_goes(path):
        listed.append(str(path))
        if gone.is_dir() and str(path) == str(gone):
            gone.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_as_one_goes)
    assert modal_train.newest_save() > 0 and str(gone) in listed


def test_preempted_it_saves_and_commits_before_it_goes(container, monkeypatch):
    wait = modal_train.time.sleep

    def preempted(seconds: float) -> None:
        if not told and modal_train.newest_save():
            told.append(True)
            raise KeyboardInterrupt
        wait(seconds)

    told, ended, log = [], [], container.volume / "out" / "logs" / "pretrain_32.jsonl"
    container.on_commit = lambda: ended.append('"event": "end"' in log.read_text("utf-8"))
    monkeypatch.setattr(modal_train.time, "sleep", preempted)
    with pytest.raises(KeyboardInterrupt):
        train(epochs=1000, max_steps=0)
    assert ended[-1]


def test_the_state_that_a_fresh_run_deletes_is_not_taken_for_a_save(container):
    """A mistake is not tried again, on several GPUs either, where every failure has status 1."""
    assert train(max_steps=1) == 0
    commits = container.commits
    assert train(run_id="2", max_steps=5, save_interval=100, overwrite=True, learning_rate=1e30, gpus=2) == 1
    assert container.commits - commits <= 2 and not list((container.volume / "out" / "resume").glob(".2"))


@pytest.mark.full
def test_overwrite_starts_anew_but_its_retry_goes_on(container, capfd):
    assert train(max_steps=2) == 0
    kills = [kill_stages]
    container.on_commit = lambda: kills and kills.pop()()
    with pytest.raises(RuntimeError):
        train(run_id="2", max_steps=6, overwrite=True)
    assert "which this one replaces" in capfd.readouterr().out
    assert train(run_id="2", max_steps=6, overwrite=True) == 0
    assert "going on" in capfd.readouterr().out


@pytest.fixture
def at_home(container, monkeypatch):
    """What is asked of Modal from home runs here instead. Returns (function, gpu, words) of each call."""
    calls = []

    def configured(function, args):
        name = next(n for n in ("train", "execute", "converse") if getattr(modal_train, n) is function)

        def remote(words, *more, **options):
            calls.append((name, args.gpu, words))
            return function.local(words, *more, **options)

        def spawn(*arguments):
            raise NotImplementedError

        return types.SimpleNamespace(remote=remote, spawn=spawn)

    monkeypatch.setattr(modal_train, "configured", configured)
    return calls


def test_a_stage_without_its_base_names_what_makes_it(at_home, container, capfd):
    write_conversations(container.volume / "dataset" / "sft_mini_512.jsonl")
    with pytest.raises(SystemExit) as stopped:
        modal_train.train_sft("--skip_estimate", *(f"--{name}={value}" for name, value in RUN.items()))
    assert "train_pretrain.py first" in capfd.readouterr().err
    assert "modal run modal_train.py::train_sft for train_full_sft.py" in str(stopped.value)
    assert [(name, gpu) for name, gpu, _ in at_home] == [("execute", None), ("train", "A100")]
    assert "--data_path=dataset/sft_mini_512.jsonl" in at_home[1][2]


def test_data_that_is_nowhere_is_told_before_a_gpu_is_rented(at_home, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="data_of_nobody.jsonl is neither a file here, nor on the volume"):
        modal_train.train_pretrain("--data_path", "data_of_nobody.jsonl")
    assert [(name, gpu) for name, gpu, _ in at_home] == [("execute", None)]
    assert "cannot" in capfd.readouterr().err


def test_any_command_runs_and_its_status_comes_back(at_home, container):
    with pytest.raises(SystemExit) as stopped:
        modal_train.run("--gpu", "T4", "sh", "-c", "touch out/made && exit 3")
    assert stopped.value.code == 3 and at_home[0][1] == "T4" and (container.volume / "out" / "made").is_file()
    with pytest.raises(SystemExit, match="run what"):
        modal_train.run()


def test_what_a_command_leaves_in_the_repository_is_kept_in_out(at_home, container, code, capfd):
    try:
        with pytest.raises(SystemExit) as stopped:
            modal_train.run("sh", "-c", "mkdir MiniMind2-x && touch MiniMind2-x/model.safetensors out/here")
    finally:
        shutil.rmtree(code / "MiniMind2-x", ignore_errors=True)
    assert stopped.value.code == 0 and "is on the volume as out/MiniMind2-x" in capfd.readouterr().out
    held = {path.name for path in (container.volume / "out").rglob("*")}
    assert {"model.safetensors", "here"} < held and "pretrain_hq.jsonl" not in held


@pytest.mark.full
def test_chat_answers_lines_that_come_through_a_queue(container, tokenizer, capfd):
    write_weights(_folder(container.volume / "out") / "full_sft_32.pth", tokenizer)
    lines = queue.Queue()
    for line in ("hello\n", "and again\n", None):
        lines.put(line)
    words = ["eval_model.py", "--model_mode", "1", "--max_new_tokens", "4", "--device", "cpu"]
    assert modal_train.converse.local(words, "minimind", lines) == 0
    assert capfd.readouterr().out.count("\n") >= 2


@pytest.mark.full
def test_several_gpus_are_several_processes_and_the_estimate_comes_first(container, capfd):
    assert train(gpus=2, estimate=True, max_steps=2, batch_size=2) == 0
    printed = capfd.readouterr().out
    assert "2 processes" in printed and printed.index("at $3.6 an hour") < printed.index("pretrain_32.pth is ready")
    assert printed.index("pretrain_32.pth is ready") < printed.index("about $0.0")


# --- bringing it home ------------------------------------------------------------------------------------------------


class FakeVolume:
    """The files of a folder as a modal.Volume lists and reads them."""

    def __init__(self, folder: Path):
        self.folder, self.cut = folder, False

    def iterdir(self, path: str):
        if not (self.folder / path).exists():
            raise modal.exception.NotFoundError(path)
        for file in sorted((self.folder / path).rglob("*")):
            kind = modal.volume.FileEntryType.FILE if file.is_file() else modal.volume.FileEntryType.DIRECTORY
            stat = file.stat()
            yield modal.volume.FileEntry(str(file.relative_to(self.folder)), kind, int(stat.st_mtime), stat.st_size)

    def read_file(self, path: str):
        data = (self.folder / path).read_bytes()
        yield data[: len(data) // 2]
        if not self.cut:
            yield data[len(data) // 2 :]


@pytest.fixture
def volume(tmp_path, monkeypatch) -> FakeVolume:
    made = FakeVolume(tmp_path / "vol")
    for name in ("full_sft_32.pth", "full_sft_32.json", "pretrain_32.pth", "logs/full_sft_32.jsonl",
                 "lora/lora_medical_32.pth", "resume/full_sft_32.resume", "token_cache/a/tokens.bin"):  # fmt: skip
        _folder((made.folder / "out" / name).parent)
        (made.folder / "out" / name).write_bytes(name.encode() * 9)
    monkeypatch.setattr(modal.Volume, "from_name", lambda name, **_: made)
    return made


def fetched(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fetch_brings_weights_sidecars_and_logs_of_a_stage(volume, tmp_path):
    home = tmp_path / "home"
    modal_train.fetch("--stage", "full_sft", "--out_dir", str(home))
    assert fetched(home) == {"full_sft_32.pth", "full_sft_32.json", "logs/full_sft_32.jsonl"}
    assert (home / "full_sft_32.pth").read_bytes() == b"full_sft_32.pth" * 9
    modal_train.fetch("--out_dir", str(home))
    assert {"pretrain_32.pth", "lora/lora_medical_32.pth"} < fetched(home)
    assert not any("resume" in name or "token_cache" in name for name in fetched(home))


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_fetch_replaces_nothing_unasked_and_keeps_no_half_file(volume, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "full_sft_32.pth").write_bytes(b"trained at home")
    words = ("--stage", "full_sft", "--out_dir", str(home))
    with pytest.raises(SystemExit, match="--overwrite"):
        modal_train.fetch(*words)
    assert (home / "full_sft_32.pth").read_bytes() == b"trained at home"
    volume.cut = True
    with pytest.raises(SystemExit, match="did not arrive whole"):
        modal_train.fetch(*words, "--overwrite")
    monkeypatch.setattr(volume, "read_file", full_disk)
    with pytest.raises(SystemExit, match="full_sft_32.*No space left"):
        modal_train.fetch(*words, "--overwrite")
    assert not list(home.rglob(".*"))
    assert (home / "full_sft_32.pth").read_bytes() == b"trained at home"
    with pytest.raises(SystemExit, match="has no rlhf yet; train first. It holds: out/full_sft_32.pth"):
        modal_train.fetch("--stage", "rlhf")
