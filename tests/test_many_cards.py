"""benchmarks/lab/many_cards.py: arithmetic by hand, and the page that shows its tables."""

import itertools

import pytest
import torch

from benchmarks.lab import many_cards
from benchmarks.lab.many_cards import MODELS, Setup, Work, step_of, work_of
from model.model_minimind import MiniMindForCausalLM
from tests.conftest import ROOT
from trainer import train_pretrain


def test_an_all_reduce_by_hand():
    # 25M gradients of 4 bytes on 64 cards, over 12.5 GB/s of which 80 % are reached
    assert Setup("RTX 4090", 64).all_reduce(25_000_000) == pytest.approx(2 * 63 / 64 * 1e8 / 1e10)
    assert Setup("RTX 4090", 8).all_reduce(25_000_000) == pytest.approx(2 * 7 / 8 * 1e8 / (0.8 * 15.75e9))
    assert Setup("H100 SXM", 8).link == "NVLink 4" and Setup("H100 SXM", 16).link == "400 Gb Ethernet"
    assert Setup("RTX 4090", 1).all_reduce(25_000_000) == 0


def test_muons_products_by_hand():
    # five times: two products of (m, n) with (n, m) or (m, m), 2 m² n operations each, and one of (m, m) with (m, m)
    assert many_cards.muon_flops(2, 3) == many_cards.muon_flops(3, 2) == 5 * (24 + 24 + 16)


@pytest.mark.parametrize("name", MODELS)
def test_work_of_a_model_by_hand(name):
    config, work = MODELS[name], work_of(MODELS[name])
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
CONFIG = MODELS["104M"]  # 45 % of the peak are assumed, 40.5 % on several cards


def test_an_optimizer_step_by_hand():
    rate = 165e12 * 0.45
    step = step_of(CONFIG, WORK, Setup("RTX 4090", 1), 4, 3, "adamw")
    assert step.tokens == 3 * 4 * 512
    assert step.compute == pytest.approx(3 * 4 * 512 * 1e8 / rate)
    assert (step.network, step.loader) == (0, 0)
    assert step.optimizer == pytest.approx(40 * 1e7 / 1008e9)
    muon = step_of(CONFIG, WORK, Setup("RTX 4090", 1), 4, 3, "muon")
    assert muon.optimizer - step.optimizer == pytest.approx(1e12 / rate)


def test_what_of_the_all_reduce_the_last_backward_pass_does_not_hide():
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
    for (name, config), setup in itertools.product(MODELS.items(), many_cards.SETUPS[1:]):
        work = work_of(config)
        rows = many_cards.hiding_rows(config, work, setup)
        assert step_of(config, work, setup, rows, 1, "adamw").network == 0, name
        assert step_of(config, work, setup, rows - 1, 1, "adamw").network > 0, name


def test_a_slow_loader_is_waited_for(monkeypatch):
    monkeypatch.setattr(many_cards, "LOADER_TOKENS", 1e5)
    step = step_of(CONFIG, WORK, Setup("RTX 4090", 1), 4, 2, "adamw")
    assert step.loader == pytest.approx(8 * 512 / 1e5 - step.compute)


def test_the_pages_show_the_tables_and_the_batch_is_the_scripts_default():
    tables = many_cards.steps_table(), many_cards.network_table()
    assert all(table in (ROOT / "docs" / "scaling.md").read_text("utf-8") for table in tables)
    rows = [row for table in tables for row in table.splitlines()[1:]]
    assert set(rows) <= set((ROOT / "docs" / "zh" / "scaling.md").read_text("utf-8").splitlines())
    defaults = train_pretrain.parse(["--device", "cpu"])
    assert (defaults.batch_size, defaults.accumulation_steps) == (many_cards.ROWS, many_cards.ACCUMULATION)
