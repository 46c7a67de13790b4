"""benchmarks/lab/stage_rates.py: each setting runs once, as the stage script does, and is reported."""

import json

import pytest

from benchmarks.lab import recipe, stage_rates
from tests.conftest import DPO, ROOT, one_thread, read_log, write_data

RUN = {
    "stage": "full_sft", "hidden_size": 256, "num_hidden_layers": 4, "rows": 8, "steps": 9, "base_weight": "ab",
    "teacher_weight": None, "data_path": "cd", "valid_path": "ef", "more": [],
}  # fmt: skip


def command(tmp_path, stage: str, **flags) -> list[str]:
    """A `run` with files that exist."""
    for name in ("base.pth", "data.jsonl", "valid.jsonl"):
        (tmp_path / name).touch()
    values = {
        "stage": stage, "optimizer": "adamw", "learning_rates": 1e-3, "steps": 3, "rows": 2, "device": "cpu",
        "threads": 1, "base_weight": tmp_path / "base.pth", "data_path": tmp_path / "data.jsonl",
        "valid_path": tmp_path / "valid.jsonl", "cache_dir": tmp_path / "cache",
    } | flags  # fmt: skip
    words = ["--results", tmp_path / "runs.jsonl", "run"]
    for name, value in values.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(word) for word in words]


def recorded(tmp_path) -> list[dict]:
    return stage_rates.read_results(tmp_path / "runs.jsonl")


@pytest.fixture
def runs(monkeypatch) -> tuple[list, set]:
    """In place of training: the (learning rate, seed) of what ran, and the rates at which it is interrupted."""
    done, stop = [], set()

    def held_out(run: dict, args) -> dict:
        if run["learning_rate"] in stop:
            raise KeyboardInterrupt
        done.append((run["learning_rate"], run["seed"]))
        return {"valid_loss": run["learning_rate"]}

    monkeypatch.setattr(stage_rates, "held_out", held_out)
    return done, stop


# --- the runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_the_stages_script_with_these_flags(tmp_path, inputs, train, capsys):
    """Its record holds what the script, called by hand, measures on the held-out file at its end."""
    files = {name: path for name, path in inputs(DPO).items() if name in ("data_path", "base_weight")}
    files["valid_path"] = write_data("preference", tmp_path / "pairs.jsonl", count=9, seed=1)
    more = ["--num_attention_heads=4", "--max_seq_len=128", "--dtype=float32"]
    flags = {"learning_rates": 3e-3, "hidden_size": 32, "num_hidden_layers": 2, "seeds": 5, "optimizer": "muon"}
    with one_thread():
        stage_rates.main([*command(tmp_path, "dpo", **flags, **files), "--", *more])
    (run,) = recorded(tmp_path)

    by_hand = {"out_dir": tmp_path / "by_hand", "hidden_size": 32, "num_hidden_layers": 2, "batch_size": 2}
    by_hand |= {"max_steps": 3, "epochs": 9, "learning_rate": 3e-3, "optimizer": "muon", "seed": 5, "device": "cpu"}
    train("train_dpo", more + [f"--{name}={value}" for name, value in (by_hand | files).items()])
    expected = read_log(tmp_path / "by_hand", "rlhf_32", "evaluation")[-1]
    assert expected["step"] == 3
    for name, value in expected.items():
        if name.startswith("valid_"):
            assert run[name] == pytest.approx(value, abs=1e-6), name
    assert abs(run["valid_loss"] - 0.6931) > 1e-4  # the weights have moved
    assert (run["learning_rate"], run["seed"], run["steps"], run["rows"]) == (3e-3, 5, 3, 2)
    assert str(tmp_path) not in json.dumps(run)
    assert f"held-out loss {run['valid_loss']:.4f}" in capsys.readouterr().out


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, runs, capsys):
    done, stop = runs
    stop.add(2e-3)
    with pytest.raises(KeyboardInterrupt):
        stage_rates.main(command(tmp_path, "lora", learning_rates=[1e-3, 2e-3, 4e-3], seeds=[0, 1]))
    stop.clear()
    assert done == [(1e-3, 0)]
    stage_rates.main(command(tmp_path, "lora", learning_rates=[1e-3, 2e-3, 4e-3], seeds=[0, 1]))
    assert done[1:] == [(2e-3, 0), (4e-3, 0), (1e-3, 1), (2e-3, 1), (4e-3, 1)]
    assert [(run["learning_rate"], run["seed"]) for run in recorded(tmp_path)] == done


@pytest.mark.parametrize(
    "change", [{"steps": 4}, {"rows": 3}, {"optimizer": "muon"}, {"stage": "full_sft"}, {"hidden_size": 64}]
)
def test_another_setting_is_another_run(tmp_path, runs, change):
    stage_rates.main(command(tmp_path, "lora"))
    stage_rates.main(command(tmp_path, **{"stage": "lora"} | change))
    stage_rates.main([*command(tmp_path, **{"stage": "lora"} | change), "--", "--grad_clip=0"])
    assert len(runs[0]) == 3


@pytest.mark.parametrize("name", ["base.pth", "data.jsonl", "valid.jsonl"])
def test_a_file_with_other_content_is_another_run(tmp_path, runs, name):
    stage_rates.main(command(tmp_path, "lora"))
    (tmp_path / name).rename(tmp_path / "moved")
    moved = {"base.pth": "base_weight", "data.jsonl": "data_path", "valid.jsonl": "valid_path"}[name]
    stage_rates.main(command(tmp_path, "lora", **{moved: tmp_path / "moved"}))
    assert len(runs[0]) == 1  # the same content under another name is the same run
    (tmp_path / name).write_text("other", "utf-8")
    stage_rates.main(command(tmp_path, "lora"))
    assert len(runs[0]) == 2


def test_a_failed_run_is_an_error_with_the_scripts_name_and_message(tmp_path, monkeypatch):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "train_lora.py").write_text("import sys\nsys.exit('error: the rate is wrong')\n", "utf-8")
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="train_lora.py failed: error: the rate is wrong"):
        stage_rates.main(command(tmp_path, "lora"))
    assert not recorded(tmp_path)


def test_mistakes_name_the_flag(tmp_path, runs):
    with pytest.raises(ValueError, match="--valid_path: .*nowhere.jsonl not found"):
        stage_rates.main(command(tmp_path, "lora", valid_path=tmp_path / "nowhere.jsonl"))
    for stage, files in (("distillation", {}), ("lora", {"teacher_weight": tmp_path / "base.pth"})):
        with pytest.raises(ValueError, match="--teacher_weight"):
            stage_rates.main(command(tmp_path, stage, **files))
    assert not runs[0]


# --- the report ------------------------------------------------------------------------------------------------------


def test_every_stage_has_a_script_and_a_default():
    for stage in stage_rates.STAGES:
        assert (ROOT / "trainer" / f"train_{stage}.py").is_file()
        assert stage_rates.default_rate(stage, "adamw") > 0


def test_the_report_takes_means_and_spreads_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage_rates, "default_rate", lambda stage, optimizer: {"adamw": 1e-3, "muon": 5e-3}[optimizer])
    losses = [("adamw", 1e-3, 0, 3.2), ("adamw", 1e-3, 1, 3.4), ("adamw", 2e-3, 0, 3.0), ("adamw", 2e-3, 1, 3.2)]
    losses += [("muon", 2e-3, 0, 2.5)]
    names = (*stage_rates.CHOICE[:2], "seed", "valid_loss")
    records = [RUN | dict(zip(names, values, strict=True)) for values in losses]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "runs.jsonl").write_text(lines, "utf-8")
    stage_rates.main(["--results", str(tmp_path / "runs.jsonl"), "report"])
    title, head, first, second, adamw, muon, both = capsys.readouterr().out.splitlines()
    assert title == "full_sft, 256×4, 9 steps of 8 rows, from ab"
    assert head.split() == ["valid_loss", "adamw", "muon"]
    assert first.split() == ["0.001", "3.3000", "±", "0.1414", "(2)", "-"]
    assert second.split() == ["0.002", "3.1000", "±", "0.1414", "(2)", "2.5000", "(1)"]
    assert adamw.startswith("adamw: change to 0.002: 0.002 is better than the default 0.001 by 0.2000")
    assert muon == "muon: the default, 0.005, was not run; best 0.002"
    assert both == "muon 0.002 ends 0.5000 lower than adamw 0.002; one seed"  # seed 0: 3.0 and 2.5


def test_the_report_keeps_settings_apart_and_shows_what_dpo_measures(monkeypatch):
    monkeypatch.setattr(stage_rates, "default_rate", lambda stage, optimizer: 1e-5)
    choice = {"optimizer": "adamw", "learning_rate": 1e-5, "seed": 0, "valid_loss": 0.6}
    more = {"valid_reward_accuracy": 0.625, "valid_kl": -0.031, "valid_logp_chosen": -321.5}
    runs = [RUN | choice | more | {"stage": "dpo", "steps": steps} for steps in (9, 10)]
    first, second = stage_rates.report(runs).split("\n\n")
    assert "9 steps" in first and "10 steps" in second and first.replace("9 steps", "10 steps") == second
    for name, value in more.items():
        assert f"{name:>22}" in first and f"{value:.4f} (1)" in first


@pytest.mark.parametrize(
    "losses, expected",
    [
        # means 3.0 and 2.8; spreads 0.1 and 0.1
        ({1: {0: 2.9, 1: 3.0, 2: 3.1}, 2: {0: 2.7, 1: 2.8, 2: 2.9}, 3: {0: 9}}, "change to 2: 2 is better than the"),
        # the gain, 0.05, is within the spread, 0.1
        (
            {1: {0: 2.9, 1: 3.0, 2: 3.1}, 2: {0: 2.85, 1: 2.95, 2: 3.05}},
            "keep 1: 2 is better than the default 1 by 0.0",
        ),
        # the spread that counts is the larger one
        ({1: {0: 3.0, 1: 3.0}, 2: {0: 2.5, 1: 3.3}}, "keep 1: 2 is better than the default 1 by 0.1000"),
        ({1: {0: 3.0, 1: 3.0}, 2: {0: 3.1}}, "keep 1: the best of 2 tried"),
        ({1: {0: 3.0, 1: 3.0}}, "no other rate was run"),
        ({1: {0: 3.0}, 2: {0: 2.9}}, "with one seed that decides nothing"),
        # seed 1, which the default lacks, does not count: 2.9 against 3.0 on seed 0
        ({1: {0: 3.0}, 2: {0: 2.9, 1: 9.0}}, "2 is better than the default 1 by 0.1000"),
        ({2: {0: 3.0}, 3: {0: 2.9}}, "the default, 1, was not run; best 3"),
    ],
)
def test_a_default_changes_only_for_a_gain_beyond_the_spread_on_the_same_seeds(losses, expected):
    assert expected in stage_rates.verdict(losses, 1)


def test_optimizers_are_compared_at_their_best_rates_on_the_same_seeds():
    adamw = {1: {0: 3.0, 1: 3.2}, 2: {0: 9.0}}
    found = stage_rates.compare_best(adamw, {4: {0: 2.9, 1: 3.0, 2: 2.0}, 8: {0: 9.0}})
    assert found == "muon 4 ends 0.1500 lower than adamw 1; spread over 2 seeds 0.1414"
    assert "0.5000 higher than adamw 1" in stage_rates.compare_best(adamw, {4: {0: 3.5}})
    assert "no seed in common" in stage_rates.compare_best(adamw, {4: {7: 3.5}})


def test_a_best_rate_at_the_edge_of_the_grid_is_told():
    inside = {rate: {0: loss, 1: loss} for rate, loss in ((1, 3.0), (2, 2.0), (3, 2.5))}
    assert "at the edge" not in stage_rates.verdict(inside, 1)
    assert "at the edge of what was tried" in stage_rates.verdict(inside | {3: {0: 1.0, 1: 1.0}}, 1)


def test_flags_after_two_dashes_belong_to_the_stages_script(tmp_path):
    args = stage_rates.parse([*command(tmp_path, "lora"), "--", "--lora_rank=2"])
    assert (args.more, args.stage) == (["--lora_rank=2"], "lora")


def test_the_report_shows_the_users_runs_unless_ours_are_asked_for(tmp_path, capsys):
    assert stage_rates.parse(["report"]).results == ROOT / "out" / "stage_rate_runs.jsonl"
    with pytest.raises(ValueError, match="--results .*none.jsonl not found"):
        stage_rates.main(["--results", str(tmp_path / "none.jsonl"), "report"])
    stage_rates.main(["--results", str(ROOT / "benchmarks" / "lab" / "stage_rate_runs.jsonl"), "report"])
    assert "full_sft, 256×4, 100 steps of 8 rows" in capsys.readouterr().out
