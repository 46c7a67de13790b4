"""Who may import whom, and what must not be needed for training."""

import ast
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import GRPO, ROOT, STAGES, run_python

ALL_STAGES = (*STAGES, GRPO)
FOLDERS = ("model", "dataset", "trainer", "scripts", "benchmarks", "tests")
SHARED_LINES = 48  # of SFT and reason, and the most: a new helper should lower it, no change should raise it
NEEDED = 7  # what requirements.txt says of its first lines: "Training alone needs the first seven"
PACKAGES = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)
HEAVY = {*PACKAGES[NEEDED:], "modal", "gradio", "swanlab", "tensorboard"} - {"huggingface_hub"}  # transformers' own


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it, as "folder.module"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module in FOLDERS:
                names |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                names.add(module)
    return {name for name in names if name.split(".")[0] in ("", *FOLDERS) or (ROOT / f"{name}.py").exists()}


def imports_of(paths: list[Path]) -> list[tuple[Path, str]]:
    assert paths
    return [(path, name) for path in paths for name in imported(path)]


def is_stage(name: str) -> bool:
    return name.startswith("trainer.train_")


def test_the_parser_sees_what_it_should(tmp_path):
    (tmp_path / "a.py").write_text(
        "import trainer.loader\nfrom trainer import train_dpo\ndef f():\n    from model.weights import x\n"
        "from . import b\nimport torch, eval_model\n"
    )
    found = imported(tmp_path / "a.py")
    assert found == {"trainer.loader", "trainer.train_dpo", "model.weights", ".", "eval_model"}


@pytest.mark.parametrize("folder", ["model", "dataset"])
def test_model_and_dataset_import_nothing_outside_their_folder(folder):
    wrong = [(path.name, name) for path, name in imports_of(modules(folder)) if not name.startswith(folder + ".")]
    assert not wrong


def test_the_model_file_imports_nothing_of_ours():
    """It travels with exported weights."""
    assert not imported(ROOT / "model" / "model_minimind.py")


def test_trainer_helpers_import_no_stage():
    helpers = [path for path in modules("trainer") if not path.stem.startswith("train_")]
    allowed = ("model.", "dataset.", "trainer.")
    wrong = [(p.name, name) for p, name in imports_of(helpers) if is_stage(name) or not name.startswith(allowed)]
    assert not wrong


def test_trainer_helpers_import_each_other_downwards():
    """No circle: every helper can be read knowing only those below it."""
    graph = {
        f"trainer.{path.stem}": {name for name in imported(path) if name.startswith("trainer.") and not is_stage(name)}
        for path in modules("trainer")
    }
    while graph:
        lowest = {name for name, below in graph.items() if not below & graph.keys()}
        assert lowest, f"these import each other in a circle: {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in lowest}


def test_stages_never_import_each_other():
    stages = [path for path in modules("trainer") if path.stem.startswith("train_")]
    allowed = ("model.", "dataset.", "trainer.")
    wrong = [(p.name, name) for p, name in imports_of(stages) if is_stage(name) or not name.startswith(allowed)]
    assert not wrong


def test_every_stage_has_its_script():
    assert {path.stem for path in modules("trainer") if path.stem.startswith("train_")} == {
        stage.script for stage in ALL_STAGES
    }


def code_lines(path: Path) -> Counter:
    """What a script says: its lines without imports, docstrings, comments and mere brackets."""
    text = path.read_text("utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    left_out = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    documented = [node for node in nodes if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    left_out += [node.body[0] for node in documented if ast.get_docstring(node)]
    numbers = {number for node in left_out for number in range(node.lineno, node.end_lineno + 1)}
    lines = (line.strip() for number, line in enumerate(text.splitlines(), start=1) if number not in numbers)
    return Counter(line for line in lines if any(map(str.isalnum, line)) and not line.startswith("#"))


def test_two_stages_share_only_one_line_calls_of_helpers():
    """What a stage means stands in its script; what all stages do is a line that calls a helper."""
    lines = {stage.script: code_lines(ROOT / "trainer" / f"{stage.script}.py") for stage in ALL_STAGES}
    shared = {pair: lines[pair[0]] & lines[pair[1]] for pair in itertools.combinations(lines, 2)}
    worst = max(shared, key=lambda pair: shared[pair].total())
    assert shared[worst].total() <= SHARED_LINES, (worst, sorted(shared[worst].elements()))


def test_the_loss_of_a_docstrings_formula_is_defined_in_the_script():
    """Each docstring names the function behind its formula: it computes in the script, and main leads to it."""
    for stage in ALL_STAGES:
        tree = ast.parse((ROOT / "trainer" / f"{stage.script}.py").read_text("utf-8"))
        named = re.findall(r"(\w+_loss) below\)", ast.get_docstring(tree))
        assert len(named) == 1, stage.script
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert named[0] in defined, f"{stage.script} does not define {named[0]}"
        arithmetic = [node for node in ast.walk(defined[named[0]]) if isinstance(node, ast.BinOp)]
        assert arithmetic, f"{named[0]} of {stage.script} computes nothing itself"
        reached, waiting = set(), ["main"]
        while waiting:  # functions of this script that main leads to
            reached.add(name := waiting.pop())
            names = {node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
            waiting += [other for other in names & defined.keys() if other not in reached]
        assert named[0] in reached, f"{stage.script} never calls {named[0]}"


@pytest.mark.parametrize("stage", ALL_STAGES, ids=lambda stage: stage.script)
def test_a_stage_script_has_at_most_200_lines(stage):
    assert len((ROOT / "trainer" / f"{stage.script}.py").read_text("utf-8").splitlines()) <= 200


def test_chat_and_scripts_import_no_stage():
    paths = [*modules("scripts"), *ROOT.glob("*.py")]
    assert not [(path.name, name) for path, name in imports_of(paths) if is_stage(name)]


def test_nobody_imports_tests_or_benchmarks():
    paths = [path for folder in FOLDERS[:4] for path in modules(folder)] + list(ROOT.glob("*.py"))
    assert not [(path.name, name) for path, name in imports_of(paths) if name.startswith(("tests", "benchmarks"))]


def test_training_needs_none_of_the_other_packages():
    names = [f"{folder}.{path.stem}" for folder in FOLDERS[:3] for path in modules(folder) if path.stem != "__init__"]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    done = run_python("-c", code + f"print(sorted({HEAVY} & sys.modules.keys()))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
