"""benchmarks/recipe.py: runs are recorded once, and the report says what the records hold."""

import json

import pytest

from benchmarks import recipe
from tests.conftest import one_thread, write_texts

SIZES = ["--hidden_size=32", "--num_hidden_layers=1", "--device=cpu", "--threads=1"]


@pytest.mark.parametrize("name", ["original", "muon"])
def test_a_run_is_recorded_and_not_repeated(name, tmp_path, capsys):
    texts, results = write_texts(tmp_path / "texts.jsonl"), tmp_path / "runs.jsonl"
    command = ["--results", results, "run", "--recipe", name, "--tokens", 2048, "--learning_rate", 1e-3, "--rows", 2]
    command += ["--data_path", texts, "--valid_path", texts, "--cache_dir", tmp_path / "cache", *SIZES]
    with one_thread():
        for _ in range(2):
            recipe.main([str(part) for part in command])
    (run,) = recipe.read_results(results)
    assert (run["recipe"], run["steps"], run["seed"]) == (name, 2, 0)
    assert 3 < run["bits_per_byte"] < 8 and run["seconds"] > 0
    assert capsys.readouterr().out.count("bits per byte") == 1


def test_the_report_takes_means_over_seeds_and_puts_the_best_first(tmp_path, capsys):
    run = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "rows": 8,
        "tokens": 4096 * 9,
        "steps": 9,
        "learning_rate": 1e-3,
        "more": [],
    }
    runs = [
        run | {"recipe": name, "seed": seed, "bits_per_byte": value, "seconds": 10 * value}
        for name, seed, value in (("adamw", 0, 2.1), ("adamw", 1, 2.3), ("muon", 0, 2.0))
    ]
    results = tmp_path / "runs.jsonl"
    results.write_text("".join(json.dumps(run) + "\n" for run in runs), "utf-8")
    recipe.main(["--results", str(results), "report"])
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:5] == ["2.0000", "-", "1", "9", "20"] and "muon, lr 0.001, 8 rows, 0.04M tokens" in first
    assert second.split()[:5] == ["2.2000", "0.1414", "2", "9", "22"]


def test_flags_after_two_dashes_belong_to_the_training_script():
    command = ["run", "--recipe", "adamw", "--tokens", "9", "--learning_rate", "1", "--rows", "1", "--data_path", "a"]
    args = recipe.parse([*command, "--valid_path", "b", "--", "--weight_decay=0.3"])
    assert args.more == ["--weight_decay=0.3"]
