"""benchmarks/lab/recipe.py: runs are recorded once, and the report says what the records hold."""

import json

import pytest

from benchmarks.lab import recipe
from tests.conftest import one_thread, write_texts

SIZES = ["--hidden_size=32", "--num_hidden_layers=1", "--device=cpu", "--threads=1"]


@pytest.mark.parametrize("name", ["original", "trainer", "muon"])
def test_a_run_is_recorded_and_not_repeated(name, tmp_path, capsys):
    texts, results = write_texts(tmp_path / "texts.jsonl"), tmp_path / "runs.jsonl"
    command = ["--results", results, "run", "--recipe", name, "--tokens", 2048, "--learning_rates", 1e-3, "--rows", 2]
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
        "data": "",
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


def test_the_shares_of_tokens_and_time_are_those_of_the_smallest_budget_that_is_as_good(tmp_path, capsys):
    run = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "rows": 4,
        "steps": 9,
        "learning_rate": 1e-3,
        "more": [],
        "data": "",
    }
    rows = [
        ("adamw", 900, 0, 2.0, 50.0), ("adamw", 900, 1, 2.2, 40.0), ("adamw", 300, 0, 1.0, 10.0),
        ("default", 300, 0, 2.2, 10.0), ("default", 600, 0, 2.0, 20.0), ("default", 600, 1, 2.1, 24.0),
        ("default", 900, 0, 1.9, 40.0), ("original", 500, 0, 1.5, 400.0),
    ]  # fmt: skip
    names = ("recipe", "tokens", "seed", "bits_per_byte", "seconds")
    runs = [run | dict(zip(names, row, strict=True)) for row in rows]
    variant = {"recipe": "default", "tokens": 100, "seed": 0, "bits_per_byte": 1.0, "seconds": 1.0}
    runs += [run | variant | {"more": ["--beta1=0"]}]  # not the recipe itself
    results = tmp_path / "runs.jsonl"
    results.write_text("".join(json.dumps(run) + "\n" for run in runs), "utf-8")
    recipe.main(["--results", str(results), "versus"])
    theirs, ours, shares = capsys.readouterr().out.splitlines()  # nothing of ours is as good as the original's
    assert "adamw" in theirs and "2.1000 ± 0.1414 bits per byte, 2 seeds, 45 s" in theirs
    assert "default" in ours and "2.0500" in ours and shares.split() == "0.67 of the tokens, 0.49 of the time".split()
    shipped = run | recipe.AS_SHIPPED | {"recipe": "original", "tokens": 500, "seed": 0}
    runs += [shipped | {"bits_per_byte": 3.0, "seconds": 300.0}]
    runs += [run | {"recipe": "default", "tokens": 10, "seed": 0, "bits_per_byte": 2.9, "seconds": 3.0}]
    results.write_text("".join(json.dumps(run) + "\n" for run in runs), "utf-8")
    recipe.main(["--results", str(results), "versus"])
    theirs, ours, shares = capsys.readouterr().out.splitlines()[3:]
    assert "256 rows" in theirs and "3.0000 bits per byte, 1 seeds, 300 s" in theirs and "2.9000" in ours
    assert shares.split() == "0.02 of the tokens, 0.01 of the time".split()
    runs[-1] |= {"quiet": False}  # whose seconds mean nothing
    runs += [shipped | {"data": "other", "bits_per_byte": 1.0, "seconds": 1.0}]
    results.write_text("".join(json.dumps(run) + "\n" for run in runs), "utf-8")
    recipe.main(["--results", str(results), "versus"])
    head, *_, ours, shares, other, nothing = capsys.readouterr().out.splitlines()
    assert head == "data :" and "busy s" in ours and shares == "  0.02 of the tokens"
    assert other == "data other:" and nothing.startswith("no run of recipe default")


def test_flags_of_the_training_script_belong_to_the_record(tmp_path):
    texts, results = write_texts(tmp_path / "texts.jsonl"), tmp_path / "runs.jsonl"
    command = ["--results", results, "run", "--recipe", "muon", "--tokens", 2048, "--learning_rates", 1e-3, "--rows", 2]
    command += ["--data_path", texts, "--valid_path", texts, "--cache_dir", tmp_path / "cache", *SIZES]
    with one_thread():
        for more in ([], ["--", "--weight_decay=0"]):
            recipe.main([str(part) for part in [*command, *more]])
    plain, changed = recipe.read_results(results)
    assert changed["more"] == ["--weight_decay=0"] and plain["more"] == []
    assert plain["bits_per_byte"] != changed["bits_per_byte"]


def test_reports_show_the_users_runs_unless_ours_are_asked_for(tmp_path, monkeypatch, capsys):
    assert recipe.parse(["report"]).results == recipe.ROOT / "out" / "recipe_runs.jsonl"
    with pytest.raises(ValueError, match="--results .*none.jsonl not found"):
        recipe.main(["--results", str(tmp_path / "none.jsonl"), "report"])
    recipe.main(["--results", str(recipe.ROOT / "benchmarks" / "lab" / "recipe_runs.jsonl"), "report"])
    assert "256×4 default, lr 0.002, 4 rows, 0.61M tokens" in capsys.readouterr().out


def test_flags_after_two_dashes_belong_to_the_training_script():
    command = ["run", "--recipe", "adamw", "--tokens", "9", "--learning_rates", "1", "--rows", "1", "--data_path", "a"]
    args = recipe.parse([*command, "--valid_path", "b", "--", "--weight_decay=0.3"])
    assert args.more == ["--weight_decay=0.3"]
