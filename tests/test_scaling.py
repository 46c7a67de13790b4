"""benchmarks/scaling.py: the fit against known curves, arithmetic by hand, and the page that is committed."""

import argparse
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import scaling
from benchmarks.recipe import read_results
from benchmarks.scaling import MODELS, Curve, Setup, Work, fit, fit_all, points_of, step_of
from model.model_minimind import MiniMindForCausalLM
from trainer import train_pretrain

ROOT = Path(__file__).resolve().parents[1]
KNOWN = Curve(E=2.4, A=482.0, alpha=0.35, B=1043.0, beta=0.37)
SIZES, BUDGETS = (128, 256, 384), (1_000_000, 2_000_000, 4_000_000, 8_000_000)
DEFAULTS = argparse.Namespace(batch_size=32, accumulation_steps=8, optimizer="adamw")
ANY = argparse.Namespace(recipe=None, learning_rate=None, rows=None, min_steps=200)


def record(hidden: int, tokens: int, loss: float, **more) -> dict:
    run = {
        "recipe": "muon",
        "learning_rate": 8e-3,
        "rows": 8,
        "data": "ab",
        "more": [],
        "ideas": [],
        "seed": 0,
        "time": 1,
    }
    run |= {"hidden_size": hidden, "num_hidden_layers": 4, "tokens": tokens, "steps": tokens // 4096}
    return run | {"valid_loss": loss, "bits_per_byte": 0.4 * loss} | more


def records(curve: Curve = KNOWN, noise: float = 0.0, sizes=SIZES, budgets=BUDGETS) -> list[dict]:
    random = np.random.default_rng(3)
    runs = [record(hidden, tokens, 1.0) for hidden, tokens in itertools.product(sizes, budgets)]
    for run, point in zip(runs, points_of(runs), strict=True):
        run["valid_loss"] = curve.loss(point.parameters, run["tokens"]) * math.exp(noise * random.standard_normal())
        run["bits_per_byte"] = 0.4 * run["valid_loss"]
    return runs


# --- the fit ---------------------------------------------------------------------------------------------------------


def logs(points) -> tuple[np.ndarray, ...]:
    return tuple(np.log([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss"))


def test_the_fit_recovers_the_constants_of_a_curve():
    found = fit(*logs(points_of(records())))[0]
    expected = [math.log(KNOWN.E), math.log(KNOWN.A), KNOWN.alpha, math.log(KNOWN.B), KNOWN.beta]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_given_exponents_stay_and_the_other_constants_are_recovered():
    found = fit(*logs(points_of(records())), exponents=(KNOWN.alpha, KNOWN.beta))[0]
    assert (found[2], found[4]) == (KNOWN.alpha, KNOWN.beta)
    np.testing.assert_allclose(np.exp(found[[0, 1, 3]]), [KNOWN.E, KNOWN.A, KNOWN.B], rtol=1e-6)


@pytest.mark.parametrize("outlier", [0.0, 0.2])
def test_the_fit_is_the_minimum_that_another_optimizer_finds(outlier):
    """torch's LBFGS on its own Huber loss, from the curve that the points were made of."""
    log_n, log_d, log_l = logs(points_of(records(noise=0.004)))
    log_l[3] += outlier
    ours = torch.tensor(fit(log_n, log_d, log_l)[0])
    n, d, target = (torch.tensor(values) for values in (log_n, log_d, log_l))

    def objective(theta):
        e, a, alpha, b, beta = theta
        estimate = torch.logsumexp(torch.stack([e.expand(len(n)), a - alpha * n, b - beta * d]), 0)
        return torch.nn.functional.huber_loss(estimate, target, reduction="sum", delta=scaling.HUBER_DELTA)

    start = [math.log(KNOWN.E), math.log(KNOWN.A), KNOWN.alpha, math.log(KNOWN.B), KNOWN.beta]
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 300, "tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([theta], **options)

    def closure():
        optimizer.zero_grad()
        value = objective(theta)
        value.backward()
        return value

    optimizer.step(closure)
    assert objective(ours).item() <= objective(theta).item() * (1 + 1e-6)


def test_a_point_left_out_is_compared_with_a_curve_through_the_others():
    runs = records()
    runs[5]["valid_loss"] *= 1.01  # on the curve are all the others
    fitted = scaling.fit_points(points_of(runs), "", None)
    assert fitted.left_out[5] == pytest.approx(math.log(1.01), rel=1e-4)
    assert 0 < fitted.residuals[5] < fitted.left_out[5]


def test_the_interval_is_as_wide_as_the_noise_makes_it():
    """E, A and B by hand: with both exponents given, the noise of one known point carries over in proportion."""
    narrow, wide = (
        scaling.fit_points(points_of(records(noise=noise)), "", (KNOWN.alpha, KNOWN.beta)) for noise in (1e-5, 1e-3)
    )
    widths = [high - low for low, high in (f.interval(lambda c: c.loss(26e6, 4e8)) for f in (narrow, wide))]
    assert widths[1] / widths[0] == pytest.approx(100, rel=0.1)
    low, high = wide.interval(lambda c: c.loss(4.46e6, 4e6))  # inside the data nearly all of it is averaged out
    assert 0 < high - low < 2 * 1.645 * 1e-3 * KNOWN.loss(4.46e6, 4e6)


def test_the_spread_over_seeds_counts_when_the_residuals_are_smaller():
    runs = [run | {"seed": seed, "valid_loss": run["valid_loss"] * (1 + sign)}
            for run in records() for seed, sign in ((0, 0.01), (1, -0.01))]  # fmt: skip
    points = points_of(runs)
    assert [p.seeds for p in points] == [2] * 12
    assert points[0].spread == pytest.approx(math.sqrt(2) * 0.01 * points[0].loss)
    fitted = scaling.fit_points(points, "", (KNOWN.alpha, KNOWN.beta))
    assert np.abs(fitted.residuals).max() < 1e-6
    low, high = fitted.interval(lambda c: c.loss(4.46e6, 4e6))
    assert high - low > 0.01 * KNOWN.loss(4.46e6, 4e6)


def test_exponents_are_fitted_only_where_the_data_tell_them():
    chosen, fits, told = fit_all(points_of(records(noise=1e-4)))
    assert told and chosen is fits[0] and len(fits) == 3
    assert chosen.curve.alpha == pytest.approx(KNOWN.alpha, rel=0.05)
    chosen, fits, told = fit_all(points_of(records(noise=0.008)))
    assert not told and chosen is fits[-1]
    assert (chosen.curve.alpha, chosen.curve.beta) == (0.3478, 0.3658)
    chosen, fits, told = fit_all(points_of(records(sizes=(128, 384))))  # two sizes cannot, however exact
    assert not told and len(fits) == 2


# --- which runs are points -------------------------------------------------------------------------------------------


def test_runs_of_other_settings_and_short_ones_are_not_mixed_in():
    runs = records()
    others = [
        runs[0] | {"learning_rate": 4e-3}, runs[1] | {"rows": 16}, runs[2] | {"recipe": "adamw"},
        runs[3] | {"more": ["--warmup_iters=9"]}, runs[4] | {"ideas": ["z_loss=1"]}, runs[5] | {"data": "cd"},
        record(128, 500_000, 9.0), *(run | {"recipe": "original", "seed": seed} for run in runs for seed in (0, 1)),
        record(192, 4_000_000, 9.0, recipe="original"),
    ]  # fmt: skip
    setting, points = scaling.select(runs + others, Path("x"), ANY)
    assert points == points_of(runs)
    assert scaling.describe(setting) == "recipe muon, learning rate 0.008, 8 rows of 512 a step"
    asked = argparse.Namespace(**(vars(ANY) | {"recipe": "original"}))
    assert len(scaling.select(runs + others, Path("x"), asked)[1]) == 13


def test_parameters_are_counted_once():
    (point,) = points_of([record(256, 10**6, 5.0)])
    # embedding 6400 · 256; layers of 2.5 · 256² + 3 · 256 · 704 + 2 norms; the last norm
    assert point.parameters == 6400 * 256 + 4 * (163_840 + 540_672 + 512) + 256


def test_too_few_points_are_an_error_with_the_command_that_makes_more(tmp_path):
    path, output = tmp_path / "runs.jsonl", tmp_path / "page.md"
    path.write_text("".join(json.dumps(run) + "\n" for run in records(sizes=(256,))), "utf-8")
    with pytest.raises(
        ValueError, match=r"holds 4 points of one setting \(1 size and 4 budgets.*recipe.py run --recipe muon"
    ):
        scaling.main(["--results", str(path), "--output", str(output)])
    wide = {"4 points .*2 sizes and 2 budgets": (SIZES[:2], BUDGETS[:2]), "6 points .*6 sizes and 1 budget ": (
        (128, 192, 256, 320, 384, 448), BUDGETS[:1])}  # fmt: skip
    for message, (sizes, budgets) in wide.items():
        with pytest.raises(ValueError, match=message):
            scaling.select(records(sizes=sizes, budgets=budgets), path, ANY)
    with pytest.raises(ValueError, match="holds no run of at least 200 steps"):
        scaling.main(["--results", str(path), "--output", str(output), "--recipe", "adamw"])
    with pytest.raises(ValueError, match="--results .*none.jsonl not found"):
        scaling.main(["--results", str(tmp_path / "none.jsonl"), "--output", str(output)])
    assert not output.exists()


# --- arithmetic by hand ----------------------------------------------------------------------------------------------


def test_an_all_reduce_by_hand():
    assert scaling.ring_seconds(8e8, 8, 1e10) == pytest.approx(0.14)  # 2 · 7/8 · 0.8 GB at 10 GB/s
    # 25M gradients of 4 bytes among 64 cards, through 12.5 GB/s of which 80 % are reached
    assert Setup("RTX 4090", 64).all_reduce(25_000_000) == pytest.approx(2 * 63 / 64 * 1e8 / 1e10)
    assert Setup("RTX 4090", 8).all_reduce(25_000_000) == pytest.approx(2 * 7 / 8 * 1e8 / (0.8 * 15.75e9))
    assert Setup("H100 SXM", 8).link == "NVLink 4" and Setup("H100 SXM", 16).link == "400 Gb Ethernet"
    assert Setup("RTX 4090", 1).all_reduce(25_000_000) == 0


def test_muons_products_by_hand():
    # five times: two products of (m, n) with (n, m) or (m, m), 2 m² n operations each, and one of (m, m) with (m, m)
    assert scaling.muon_flops(2, 3) == scaling.muon_flops(3, 2) == 5 * (24 + 24 + 16)


@pytest.mark.parametrize("name", MODELS)
def test_work_of_a_model_by_hand(name):
    config, work = MODELS[name], scaling.work_of(MODELS[name])
    assert {"26M": 25.83, "104M": 104.03, "MoE 145M": 145.03}[name] == pytest.approx(work.parameters / 1e6, abs=5e-3)
    assert {"26M": 25.83, "104M": 104.03, "MoE 145M": 91.95}[name] == pytest.approx(work.active / 1e6, abs=5e-3)
    attention = 12 * config.hidden_size * config.num_hidden_layers * 256.5
    assert work.token_flops == pytest.approx(6 * work.active + attention)
    with torch.device("meta"):
        layers = MiniMindForCausalLM(config).model.layers
    matrices = [sorted(p.shape) for p in layers.parameters() if p.dim() == 2]
    assert len(matrices) == config.num_hidden_layers * (4 + (3 * 5 + 1 if config.use_moe else 3))
    assert work.muon_flops == 5 * sum(4 * m**2 * n + 2 * m**3 for m, n in matrices)


WORK = Work(parameters=10_000_000, active=10_000_000, token_flops=1e8, muon_flops=1e12)
CONFIG = MODELS["104M"]  # of which 45 % of the peak are assumed, 40.5 % on several cards


def test_an_optimizer_step_by_hand():
    rate = 165e12 * 0.45
    step = step_of(CONFIG, WORK, Setup("RTX 4090", 1), 4, 3, "adamw")
    assert step.tokens == 3 * 4 * 512
    assert step.compute == pytest.approx(3 * 4 * 512 * 1e8 / rate)
    assert (step.network, step.loader) == (0, 0)
    assert step.optimizer == pytest.approx(40 * 1e7 / 1008e9)
    assert step.seconds == pytest.approx(step.compute + step.optimizer)
    muon = step_of(CONFIG, WORK, Setup("RTX 4090", 1), 4, 3, "muon")
    assert muon.optimizer - step.optimizer == pytest.approx(1e12 / rate)


def test_what_of_the_all_reduce_does_not_hide_behind_the_last_backward_pass():
    setup, rate = Setup("RTX 4090", 8), 165e12 * 0.405
    travel = 2 * 7 / 8 * 4e7 / (0.8 * 15.75e9)  # 5.6 ms
    micro = 512 * 1e8 / rate  # 0.8 ms a row
    for rows, accumulation in ((1, 1), (1, 8), (4, 1)):
        step = step_of(CONFIG, WORK, setup, rows, accumulation, "adamw")
        assert step.network == pytest.approx(travel - rows * micro * 2 / 3)
        assert step.tokens == 8 * rows * accumulation * 512
    assert step_of(CONFIG, WORK, setup, 32, 1, "adamw").network == 0
    zero = step_of(CONFIG, WORK, setup, 32, 1, "adamw", zero=True)
    assert zero.network == pytest.approx(travel / 2)  # weights are gathered after the step
    assert zero.optimizer == pytest.approx(40 * 1e7 / 8 / 1008e9)


def test_rows_that_hide_the_all_reduce_are_the_fewest():
    for (name, config), setup in itertools.product(MODELS.items(), scaling.SETUPS[1:]):
        work = scaling.work_of(config)
        rows = scaling.hiding_rows(config, work, setup)
        assert step_of(config, work, setup, rows, 1, "adamw").network == 0, name
        assert step_of(config, work, setup, rows - 1, 1, "adamw").network > 0, name


def test_a_slow_loader_is_waited_for(monkeypatch):
    monkeypatch.setattr(scaling, "LOADER_TOKENS", 1e5)
    step = step_of(CONFIG, WORK, Setup("RTX 4090", 1), 4, 2, "adamw")
    assert step.loader == pytest.approx(8 * 512 / 1e5 - step.compute)
    assert step.worst == ("loader", step.loader / step.compute)


def test_the_first_bottleneck_is_the_first_and_more_rows_remove_it():
    for (config, card), optimizer in itertools.product(
        itertools.product(MODELS.values(), scaling.WIRING), ("adamw", "muon")
    ):
        work = scaling.work_of(config)
        setup, step = scaling.first_bottleneck(config, work, card, DEFAULTS, optimizer)
        assert step.tokens == 32 * 8 * 512 and step.worst[1] > 0.1
        fewer = Setup(card, setup.cards // 2)
        rows = 256 // fewer.cards
        assert step_of(config, work, fewer, min(rows, 32), max(1, rows // 32), optimizer).worst[1] <= 0.1
        more = scaling.enough_rows(config, work, setup, DEFAULTS, optimizer)
        assert more.worst[1] <= 0.1 and more.tokens > step.tokens
    assert scaling.first_bottleneck(CONFIG, Work(1, 1, 1e9, 0), "RTX 4090", DEFAULTS, "muon") is None


def test_rows_of_a_step_are_split_into_micro_batches():
    assert [scaling.split(rows, 32) for rows in (1, 32, 64, 80)] == [(1, 1), (32, 1), (32, 2), (32, 3)]


def test_critical_batch_by_hand():
    assert scaling.critical_batch(3.0) == pytest.approx(2e8 / 3 ** (100 / 21))


def test_advised_flags_grow_the_batch_only_as_far_as_steps_and_critical_batch_allow():
    work = scaling.work_of(MODELS["26M"])
    alone, many = Setup("RTX 4090", 1), Setup("RTX 4090", 64)
    step = scaling.advised_step(MODELS["26M"], work, alone, DEFAULTS, 4e8, 3.0)
    assert step.flags == "--batch_size 32 --accumulation_steps 8"
    unbound = scaling.advised_step(MODELS["26M"], work, many, DEFAULTS, 1e12, 1.0)
    assert unbound.worst[1] <= 0.1 and unbound.tokens > 131_072
    assert scaling.advised_step(MODELS["26M"], work, many, DEFAULTS, 2.7e8, 1.0).tokens == 262_144  # 1,030 steps
    assert scaling.advised_step(MODELS["26M"], work, many, DEFAULTS, 2.6e8, 1.0).tokens == 131_072
    assert scaling.advised_step(MODELS["26M"], work, many, DEFAULTS, 1e12, 4.5).tokens == 131_072  # critical: 156K


# --- the page --------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in records(noise=0.003)), "utf-8")
    scaling.main(["--results", str(folder / "runs.jsonl"), "--output", str(folder / "page.md")])
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
    return (folder / "page.md").read_text("utf-8")


def rows_of(page: str, header: str) -> list[list[str]]:
    """Cells of the table whose header line begins so."""
    table = page[page.index(f"| {header}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_flag_that_the_page_names_exists(page):
    named = set(re.findall(r"`(--\w+)|(?<= )(--\w+) \d", page))
    named = {one or other for one, other in named} - {"--estimate"}
    assert {"--accumulation_steps", "--zero_stage", "--num_workers", "--batch_size", "--optimizer"} <= named
    known = vars(train_pretrain.parse(["--device", "cpu"]))
    assert [flag for flag in named if flag[2:] not in known] == []


def test_the_page_tells_time_and_money_of_every_model_and_setup(page):
    rows = rows_of(page, "model | data | cards | flags")
    assert [row[:3] for row in rows] == [
        [model, data, setup.name] for model in MODELS for data in scaling.DATA for setup in scaling.SETUPS
    ]
    # 26M over 1.6 GB on a 4090 by hand: operations over 30 % of 165 TFLOP/s, at half a dollar an hour
    seconds = scaling.DATA["1.6 GB"] * scaling.work_of(MODELS["26M"]).token_flops / (0.3 * 165e12)
    assert float(rows[0][6].split()[0]) == pytest.approx(seconds / 60, rel=0.02) and rows[0][6].endswith("min")
    assert rows[0][7] == f"${seconds / 7200:.2f}"


def test_predictions_lie_in_their_intervals_and_fall_with_size_and_data(page):
    rows = rows_of(page, "model | data | tokens | tokens")
    for row in rows:
        for cell in row[5:7]:
            loss, low, high = numbers(cell)
            assert low <= loss <= high
    (small, small_all, large, large_all), tokens = ([numbers(row[5])[0] for row in rows[:4]], numbers(rows[0][2])[0])
    assert small > small_all and small > large > large_all
    assert tokens == pytest.approx(1600 / 3.76, rel=2e-3)  # millions
    assert small == pytest.approx(KNOWN.loss(25.83e6, 4.255e8), rel=0.1)


def test_the_same_records_make_the_same_page(page, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in reversed(records(noise=0.003))), "utf-8")
    scaling.main(["--results", str(path), "--output", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text("utf-8") == page


def test_the_committed_page_is_what_the_script_prints_for_the_committed_records(tmp_path):
    committed, results = ROOT / "benchmarks" / "SCALING.md", ROOT / "benchmarks" / "recipe_runs.jsonl"
    try:
        scaling.select(read_results(results), results, ANY)
    except ValueError as error:
        assert not committed.exists()
        pytest.skip(str(error))
    scaling.main(["--results", str(results), "--output", str(tmp_path / "page.md")])
    printed, page = (tmp_path / "page.md").read_text("utf-8"), committed.read_text("utf-8")
    cure = "run python benchmarks/scaling.py and commit benchmarks/SCALING.md"
    assert NUMBER.sub("0", printed).split() == NUMBER.sub("0", page).split(), cure
    # another processor may round the last digit of a fit differently
    assert numbers(printed) == pytest.approx(numbers(page), rel=0.01, abs=0.01), cure
