"""The pages keep their word: commands parse, files exist, defaults and figures are real, both languages agree."""

import argparse
import functools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest
import torch

from benchmarks.lab.many_cards import MODELS, work_of
from model.model_minimind import PRESETS, MiniMindConfig, MiniMindForCausalLM
from model.weights import STAGES
from scripts.quickstart import COMMON
from trainer.arguments import stage_parser
from trainer.cost import activation_bytes, attention_backward_bytes, count_parameters, flops_per_token
from trainer.estimate import CONTEXT_BYTES, assumed_mfu

ROOT = Path(__file__).resolve().parents[1]
README, README_ZH = "README.md", "README_zh.md"
PAGES = [README, *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")), "CONTRIBUTING.md"]
CHINESE = {page: README_ZH if page == README else page.replace("docs/", "docs/zh/") for page in PAGES[:-1]}
ALL_PAGES = [*PAGES, *CHINESE.values()]
STAGES_PAGE, SCALING_PAGE, HOUSE_PAGE = "docs/stages.md", "docs/scaling.md", "CONTRIBUTING.md"
STAGE_SCRIPTS = sorted(ROOT.glob("trainer/train_*.py"))
# used in command lines, and no business of this test
OTHER_PROGRAMS = set(
    "source head tail git ssh tmux rsync nvidia-smi pre-commit llama-cli ollama vllm hf docker".split()
)
LAUNCHERS = {"python", "python3", "torchrun", "deepspeed", "streamlit"}


# --- reading a page --------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """One command line of a page and the folder, seen from the root, that it runs in."""

    words: tuple[str, ...]
    folder: str = "."

    def __str__(self) -> str:
        return shlex.join(self.words)


@functools.cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fences(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), re.DOTALL | re.MULTILINE)


def prose_of(name: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)


def inline_code(name: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose_of(name))


def headings(name: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose_of(name), re.MULTILINE)


def block_commands(name: str) -> list[Command]:
    """The commands of all shell blocks in printed order, as one shell would run them from the root."""
    commands, folder = [], PurePosixPath(".")
    for line in "".join(fences(name, "bash")).replace("\\\n", " ").splitlines():
        for words in _split(shlex.split(line, comments=True), "&&"):
            if words and words[0] == "cd":
                cloned = any(command.words[:2] == ("git", "clone") for command in commands)
                if words[1] == ".." or not (cloned and words[1] == "minimind"):  # there the clone is the root
                    folder = folder.parent if words[1] == ".." else folder / words[1]
            elif words:
                commands.append(Command(tuple(words), str(folder)))
    assert folder == PurePosixPath("."), f"{name}: a command leaves the shell in {folder}"
    return commands


def inline_commands(name: str) -> list[Command]:
    """Commands in running text: `python …`, `make …`, `VARIABLE=value …` and `script.py --flag …`."""
    begins = re.compile(r"(make|python|torchrun|deepspeed) |[A-Z_]+=\w+ |\S+\.py --")
    return [Command(tuple(shlex.split(code))) for code in inline_code(name) if begins.match(code)]


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def tree_paths(name: str) -> list[str]:
    """Paths of the file tree; those of folders end with /, those of several files hold a *."""
    block = next(block for block in fences(name, "text") if re.search(r"^model/$", block, re.MULTILINE))
    paths, folders = [], []
    for line in filter(str.strip, block.splitlines()):
        entry = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        paths.append("".join(folders) + entry)
        if entry.endswith("/"):
            folders.append(entry)
    return paths


def table(name: str, first_row: str) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table whose first row below the header begins with first_row."""
    return next((header, rows) for header, rows in tables(name) if rows[0][0] == first_row)


def tables(name: str) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of every table."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", prose_of(name), re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append((header, rows))
    return found


def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d[\d.,]*\d|\d", text)


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


# --- reading a script ------------------------------------------------------------------------------------------------


class Caught(BaseException):
    """Carries a script's parser out of it at the moment it would parse."""


@functools.cache
def parser_of(script: Path) -> argparse.ArgumentParser | None:
    """The parser that a script builds when it is run; None where it has none."""
    if not re.search(r"ArgumentParser|stage_parser", script.read_text(encoding="utf-8")):
        return None

    def caught(parser, *_):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", caught)
        patch.setattr(sys, "argv", [str(script)])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Caught as carrier:
            return carrier.args[0]
    raise AssertionError(f"{script} ran to its end without parsing its command line")


def declared_flags(script: Path) -> set[str]:
    """Its flags, those of subcommands too."""
    names, parsers = set(), [parser_of(script)]
    while parsers:
        parser = parsers.pop()
        names |= set(parser._option_string_actions) if parser else set()
        for action in parser._actions if parser else []:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
    return {name for name in names if name.startswith("--")}


def check_flags(script: Path, words: list[str]) -> None:
    parser = parser_of(script)
    assert parser is not None or not words, f"{script.name} takes no flags"
    if parser is None:
        return
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            at = next((i for i, word in enumerate(words) if word in action.choices), None)
            assert at is not None, f"{script.name} has no {words[:1]}"
            own = {word.split("=")[0] for word in words[:at] if word.startswith("--")}  # flags before the subcommand
            assert own <= set(parser._option_string_actions), f"{script.name} declares not all of {own}"
            parser, words = action.choices[words[at]], words[at + 1 :]
    undeclared = {word.split("=")[0] for word in words if word.startswith("--")} - set(parser._option_string_actions)
    assert not undeclared, f"{script.name} declares no {undeclared}"

    def refuse(message):
        raise AssertionError(f"{script.name} {shlex.join(words)}: {message}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "error", refuse)
        patch.setattr(parser, "exit", lambda *_: None)
        _, unknown = parser.parse_known_args(words)
    assert not unknown, f"{script.name} does not know {unknown}"


def check_command(command: Command) -> None:
    """Raises where a command names a script, flag, file or target that there is not."""
    words = list(command.words)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    words = words[: next((i for i, word in enumerate(words) if word in ("<", ">", "|")), None)]
    program, *rest = words
    folder = ROOT / command.folder
    assert folder.is_dir(), f"no folder {command.folder}"
    if program == "make":
        targets = {word for word in rest if not re.match(r"[A-Z]+=", word)}
        assert targets and targets <= makefile_targets(), f"Makefile has no {rest}"
    elif program == "pip" and rest[:2] == ["install", "pre-commit"]:
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif program == "modal":
        entry = rest[1].partition("modal_train.py::")[2] if rest[:1] == ["run"] else ""
        assert rest == ["setup"] or f"def {entry}(" in text_of("modal_train.py"), f"modal_train.py has no {entry}"
    elif program == "pip":
        rest = [word for word in rest if word not in ("-i", "ADDRESS")]
        assert rest[:2] == ["install", "-r"] and (folder / rest[2]).is_file()
    elif program in LAUNCHERS and "-m" in rest[:1]:
        assert rest[1] in ("venv", "pytest")
    elif program in LAUNCHERS or program.endswith(".py"):
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        assert scripts, "names no script"
        script, flags = folder / words[scripts[0]], words[scripts[0] + 1 :]
        assert script.is_file(), f"{command.folder}/{words[scripts[0]]} does not exist"
        if program == "streamlit":  # its own flags stand before the page's
            flags = flags[flags.index("--") + 1 :] if "--" in flags else []
        check_flags(script, flags)
    else:
        assert program in OTHER_PROGRAMS, f"what is {program}?"


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", text_of("Makefile"), re.MULTILINE))


# --- tests -----------------------------------------------------------------------------------------------------------


def commands_of_all_pages() -> list[Command]:
    return list(dict.fromkeys(command for page in PAGES for command in block_commands(page) + inline_commands(page)))


@pytest.mark.parametrize("command", commands_of_all_pages(), ids=str)
def test_command_parses(command):
    check_command(command)


@pytest.mark.parametrize(
    "line",
    [
        "python train_nothing.py",
        "python eval_model.py --no_such_flag 1",
        "python eval_model.py --model_mode 9",
        "python eval_model.py --hidden 512",
        "torchrun --nproc_per_node 2 trainer/train_pretrain.py --epochs many",
        "make nothing",
        "pip install -r nothing.txt",
        "sudo reboot",
    ],
)
def test_wrong_command_is_noticed(line):
    with pytest.raises(AssertionError):
        check_command(Command(tuple(shlex.split(line))))


def test_first_commands_are_the_two():
    commands = [str(command) for command in block_commands(README)]
    assert commands[0].startswith("git clone ") and commands[1:3] == ["make quickstart", "make test"]


def test_readme_is_short():
    assert len(text_of(README).split()) <= 2000


@pytest.mark.skipif(sys.platform == "win32", reason="the Makefile needs make and a POSIX shell")
def test_make_clean_keeps_weights_and_make_erase_asks(tmp_path):
    kept = [tmp_path / name for name in ("out/a.pth", ".venv/bin/python", "dataset/a.jsonl", "out/resume/a.resume")]
    for path in [*kept, tmp_path / "model/__pycache__/a.pyc", tmp_path / ".pytest_cache/a"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def make(target: str, answer: str = "") -> str:
        command = ["make", "-f", str(ROOT / "Makefile"), target]
        return subprocess.run(command, cwd=tmp_path, input=answer, text=True, capture_output=True, check=True).stdout

    make("clean")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
    assert "Nothing was deleted" in make("erase", "y\n") and all(path.exists() for path in kept)
    shown = make("erase", "yes\n")
    assert "out" in shown and [path.exists() for path in kept] == [False, False, True, False]


@pytest.mark.parametrize("name", [README, HOUSE_PAGE])
def test_tree_names_files_that_exist(name):
    for path in tree_paths(name):
        found = list(ROOT.glob(path)) if "*" in path else [ROOT / path]
        assert found and all(p.is_dir() if path.endswith("/") else p.is_file() for p in found), f"{path} does not exist"


def test_tree_leaves_nothing_out():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout: there is no telling which files belong to it")
    tracked = [PurePosixPath(line) for line in git.stdout.splitlines() if (ROOT / line).is_file()]
    named = tree_paths(HOUSE_PAGE)
    top_level = {path.parts[0] + "/" * (len(path.parts) > 1) for path in tracked if not path.parts[0].startswith(".")}
    assert not top_level - set(named)
    sources = [path for path in tracked if path.suffix == ".py" and (ROOT / path).stat().st_size]
    unnamed = [str(path) for path in sources if not any(path.match(pattern) for pattern in named)]
    assert not unnamed, f"add a line for each to the tree in {HOUSE_PAGE}: {unnamed}"


@pytest.mark.parametrize("script", STAGE_SCRIPTS, ids=lambda path: path.name)
def test_every_flag_of_a_stage_is_named(script):
    unlisted = {"--help", "--local-rank", "--pass_seconds"}  # an alias, and one that --estimate alone passes
    missing = declared_flags(script) - unlisted - flags_in(text_of(STAGES_PAGE))
    assert not missing, f"add these to the tables of {STAGES_PAGE}: {missing}"


@pytest.mark.parametrize("name", ALL_PAGES)
def test_flags_in_running_text_exist(name):
    scripts = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    runnable = [path for path in scripts if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
    declared = set().union(*map(declared_flags, runnable))
    modal = flags_in(text_of("modal_train.py")) | {"--detach"}  # `modal run` reads these
    others = modal | {"--server", "--served-model-name", "--nproc_per_node"}  # of streamlit, of vLLM, of torchrun
    unknown = set().union(*map(flags_in, inline_code(name))) - declared - others
    assert not unknown


@pytest.mark.parametrize("name", [STAGES_PAGE, CHINESE[STAGES_PAGE]])
def test_defaults_are_those_of_the_scripts(name):
    header, rows = table(name, "train_pretrain.py")
    assert sorted(row[0] for row in rows) == [path.name for path in STAGE_SCRIPTS]
    for script, *cells in rows:
        parser = parser_of(ROOT / "trainer" / script)
        for flag, cell in zip(header[1:], cells, strict=True):
            default = parser.get_default(flag.strip("`-"))
            if isinstance(default, dict):  # "2e-3 muon, 5e-4 adamw"; a number alone is AdamW's
                words = [(*part.split(), "adamw")[:2] for part in cell.split(",")]
                expected = {optimizer: float(value) for value, optimizer in words}
                assert list(expected) == list(default), "first the one that the stage takes by itself"
            else:
                expected = ROOT / cell if isinstance(default, Path) else type(default)(cell)
            assert default == expected, f"{script} {flag}"


@pytest.mark.parametrize(("name", "first_row"), [(README, "pretraining"), (README_ZH, "预训练")])
def test_the_stages_of_the_readme_are_those_of_the_scripts(name, first_row):
    rows = table(name, first_row)[1]
    assert sorted(script for _, script, *_ in rows) == [path.name for path in STAGE_SCRIPTS]
    stages = {stage.script: written for written, stage in STAGES.items()} | {"train_lora.py": "lora/lora_medical"}
    for _, script, data, way, _ in rows:
        parser, (begin, end) = parser_of(ROOT / "trainer" / script), way.split(" → ")
        assert data == parser.get_default("data_path").name, script
        assert end == f"{stages[script]}_{MiniMindConfig().hidden_size}.pth", script
        base = parser.get_default("base_weight")
        assert (base in begin) if base in STAGES else not set(STAGES) & set(begin.split()), script


@pytest.mark.parametrize("name", [README, README_ZH])
def test_the_quickstarts_output_is_that_of_the_quickstart(name):
    shown = next(block for block in fences(name, "text") if block.startswith("=== 1."))
    titles = re.findall(r"^=== (.+)$", shown, re.MULTILINE)
    script = text_of("scripts/quickstart.py")
    assert len(titles) == 5 and all(f'"{title}"' in script for title in titles)
    options = stage_parser("").parse_known_args(COMMON.split())[0]
    sizes = "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    config = MiniMindConfig(**{size: getattr(options, size) for size in sizes})
    with torch.device("meta"):
        millions = count_parameters(MiniMindForCausalLM(config))[0] / 1e6
    assert f"{millions:.2f}M parameters, dense, {config.num_hidden_layers} layers of {config.hidden_size}\n" in shown
    questions = len(text_of("dataset/sample/questions.jsonl").splitlines())
    assert f"| questions, pass@1 | {questions} |" in shown and f" {questions} " in prose_of(name)
    measured = re.findall(r"\d+\.\d+", "".join(re.findall(r"^(?:\||right).*", shown, re.MULTILINE)))
    assert len(measured) == 3 and set(measured) <= set(numbers_in(text_of("benchmarks/RESULTS.md")))


def test_estimated_hours_follow_from_the_formula():
    models = {name.split()[-1]: config for name, config in MODELS.items()}
    works = {name: work_of(config) for name, config in models.items()}
    assert f"{works['145M'].active / 1e6:.2f}M" in text_of(SCALING_PAGE)
    tokens = {"pretrain": 1.6e9 / 3.76, "SFT": 2 * 1.2e9 / 3.77}
    header, rows = table(SCALING_PAGE, "pretrain 26M")
    peaks = [float(re.search(r"\((\d+)", cell)[1]) * 1e12 for cell in header[1:]]
    for label, *cells in rows:
        stage, *_, size = label.split()
        for peak, cell in zip(peaks, cells, strict=True):
            numbers, kind = cell.split()
            assert kind in ("estimated", "measured")
            if kind == "estimated":
                hours = works[size].token_flops * tokens[stage] / (peak * assumed_mfu(models[size], 1)) / 3600
                assert float(numbers) == pytest.approx(hours, rel=0.01, abs=0.005), f"{label}: {cell}"
    for row, stage in zip(table(README, "pretraining")[1], ("pretrain", "SFT"), strict=False):
        assert row[-1].split(",")[0] == table(SCALING_PAGE, "pretrain 26M")[1][stage == "SFT"][2].split()[0]


def test_sizes_are_those_of_the_presets():
    sizes = {row[0]: numbers_in(row[1]) for row in table(SCALING_PAGE, "26M")[1]}
    for label, preset in zip(sizes, PRESETS, strict=True):
        config = MiniMindConfig(**PRESETS[preset])
        with torch.device("meta"):
            parameters, _ = count_parameters(MiniMindForCausalLM(config))
        active = flops_per_token(config, parameters) / 6
        expected = [f"{parameters / 1e6:.2f}"] + [f"{active / 1e6:.2f}"] * config.use_moe
        assert sizes[label] == expected, label


def test_memory_of_cards_follows_from_the_formula():
    """Pretraining with Muon and bfloat16 on one CUDA device, as trainer/estimate.py adds it up."""
    card_rows = next(rows for header, rows in tables(SCALING_PAGE) if header[-1] == "24 GB")
    for label, *cells in card_rows:
        config = next(config for name, config in MODELS.items() if name.endswith(label.split()[-1]))
        with torch.device("meta"):
            model = MiniMindForCausalLM(config)
        parameters, _ = count_parameters(model)
        for room, cell in zip((8, 12, 24), cells, strict=True):
            rows = int(re.search(r"--batch_size (\d+)", cell)[1]) if "--batch_size" in cell else 32
            steps = int(re.search(r"--accumulation_steps (\d+)", cell)[1]) if "--accumulation_steps" in cell else 8
            assert rows * steps == 256
            state = 4 * parameters + 4 * config.vocab_size * config.hidden_size  # Muon's momentum, Adam's second moment
            activations = activation_bytes(config, rows * 512) + 2 * parameters
            activations += attention_backward_bytes(config, rows * 512, 9 * rows)
            gigabytes = (8 * parameters + state + activations + CONTEXT_BYTES) / 1e9
            stated = float(numbers_in(cell)[-1])
            assert stated == pytest.approx(gigabytes, abs=0.06) and stated < 0.95 * room, f"{label}: {cell}"


@pytest.mark.parametrize("name", ALL_PAGES)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    targets = re.findall(r"\]\(([^)]+)\)", prose_of(name)) + re.findall(r'(?:src|srcset)="([^"]+)"', prose_of(name))
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        page = (folder / path).resolve() if path else ROOT / name
        assert page.exists(), target
        if anchor:
            assert anchor in anchors_of(str(page.relative_to(ROOT))), target


def anchors_of(name: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings(name)}


def test_every_page_is_linked_from_the_readme():
    for readme, pages in ((README, PAGES[1:]), (README_ZH, list(CHINESE.values())[1:])):
        links = re.findall(r"\]\(([^)#]+)[)#]", prose_of(readme))
        assert set(pages) <= set(links)


@pytest.mark.parametrize("name", [README, README_ZH])
def test_loop_is_that_of_the_script(name):
    script = (line.strip() for line in text_of("trainer/train_pretrain.py").splitlines())
    loop = next(block for block in fences(name, "python") if block.startswith("for step"))
    for line in filter(None, map(str.strip, loop.splitlines())):
        assert any(line == other for other in script), f"not in the script, or not in this order: {line}"


@pytest.mark.parametrize("name", [README, README_ZH])
def test_figures_are_those_of_the_results(name):
    results = set(numbers_in(text_of("benchmarks/RESULTS.md")))
    for row in table(name, "quickstart")[1]:
        for cell in row[1:]:
            missing = [number for number in numbers_in(cell) if number not in results]
            assert not missing, f"{row[0]}: {missing}"


@pytest.mark.parametrize("page", CHINESE)
def test_both_languages_name_the_same(page):
    chinese = CHINESE[page]
    assert block_commands(chinese) == block_commands(page)
    assert set(inline_commands(chinese)) == set(inline_commands(page))
    assert flags_in(text_of(chinese)) == flags_in(text_of(page))
    assert len(headings(chinese)) == len(headings(page))
    assert fences(chinese, "python") == fences(page, "python")
    assert len(tables(chinese)) == len(tables(page))
    for (_, rows), (_, rows_zh) in zip(tables(page), tables(chinese), strict=True):
        assert [[sorted(numbers_in(cell)) for cell in row] for row in rows] == [
            [sorted(numbers_in(cell)) for cell in row] for row in rows_zh
        ]
    if page == README:
        assert tree_paths(chinese) == tree_paths(page)
