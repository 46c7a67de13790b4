"""scripts/report.py: what logs tell, whatever happened to the runs, and a page that stands on its own."""

import json
import math
import re
from pathlib import Path

import pytest
from conftest import tiny_flags, write_texts

from scripts import report, report_charts
from scripts.evaluate import table_of
from scripts.report_logs import differences, read_folder, read_run, read_runs
from trainer import train_pretrain
from trainer.estimate import relevant_flags


def start(first_step: int = 0, total_steps: int = 10, time: float = 0.0, **flags) -> dict:
    return {
        "event": "start", "time": time, "run": "x", "first_step": first_step, "total_steps": total_steps,
        "parameters": 4_460_000, "device": "cpu", "processes": 1, "threads": 1, "versions": {"torch": "2.13.0"},
        "flags": {"learning_rate": 1e-4, "seed": 1, "out_dir": "a", "changed": ["learning_rate"]} | flags,
    }  # fmt: skip


def step(number: int, loss: float | None = None, time: float = 0.0) -> dict:
    loss = 9.0 - number / 10 if loss is None else loss
    return {
        "event": "step", "step": number, "time": time, "seconds": time, "loss": loss, "lr": 1e-4, "grad_norm": 1.0,
        "tokens": 100 * number, "tokens_per_second": 50.0, "mfu": 0.5, "aux_loss": 0.0, "peak_memory_bytes": 10**8,
    }  # fmt: skip


def evaluation(number: int, loss: float = 8.0, sample: str = "") -> dict:
    return {"event": "evaluation", "step": number, "valid_loss": loss, "bits_per_byte": loss / 3, "sample": sample}


def write_log(out_dir: Path, lines: list, name: str = "pretrain_256") -> Path:
    path = out_dir / "logs" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


def test_a_killed_and_resumed_run_is_one_curve(tmp_path):
    killed = [start(), *(step(n, loss=5.0, time=n) for n in range(1, 8)), evaluation(4, 7.0), evaluation(6, 1.0)]
    resumed = [
        start(first_step=4, time=50),
        *(step(n, time=46 + n) for n in range(5, 11)),
        {"event": "end", "step": 10},
    ]
    run = read_run(write_log(tmp_path, killed + resumed))
    assert run.series("loss") == (list(range(1, 11)), [5.0] * 4 + [9.0 - n / 10 for n in range(5, 11)])
    assert run.series("valid_loss", held_out=True) == ([4], [7.0])
    assert (run.parts, run.repeated, run.replaced, run.state) == (2, 3, 0, "complete")
    assert run.wall_seconds == 7 + 56  # lost steps were paid for too; each step's seconds begin again at 0


def test_a_run_that_was_stopped_ends_with_its_last_step_even_if_that_was_not_logged(tmp_path):
    lines = [start(), step(1), step(4), {"event": "end", "step": 6}]
    run = read_run(write_log(tmp_path, lines))
    assert run.state == "stopped at step 6 of 10" and dict(report.tiles(run, None))["steps"] == "6"
    run = read_run(write_log(tmp_path, [*lines, start(first_step=6), step(7)]))
    assert run.state == "stopped at step 7 of 10, or still running"


def test_a_loss_is_titled_by_what_it_is_of_and_ticks_tell_apart(tmp_path):
    titles = {}
    for kind, more in (
        ("pretrain", {}),
        ("conversation", {}),
        ("preference", {}),
        ("rollouts", {}),
        ("conversation", {"ce": 1.0}),
    ):
        lines = [start() | {"kind": kind}, *(step(n) | {"mfu": 0.03 + n / 1000} | more for n in (1, 5, 9))]
        figures = report_charts.charts([read_run(write_log(tmp_path, lines))])
        titles[kind, *more] = [figure.axes[0].get_title("left") for figure in figures]
    first = [found[0] for found in titles.values()]
    assert first == ["loss, nats a token", "loss, nats a token", "loss, nats a pair", "loss", "loss"]
    axis = figures[titles["conversation", "ce"].index("MFU")].axes[0].yaxis
    ticks = [axis.get_major_formatter()(value) for value in axis.get_majorticklocs()]
    assert len(set(ticks)) == len(ticks) > 2 and all(text.endswith("%") for text in ticks)


def test_a_run_started_again_is_a_new_one(tmp_path):
    again = [start(total_steps=3, time=9.0), step(1, loss=4.0, time=10.0)]
    run = read_run(write_log(tmp_path, [start(), step(1), step(2), evaluation(2), *again]))
    assert run.series("loss") == ([1], [4.0]) and not run.evaluations
    assert (run.parts, run.replaced, run.wall_seconds) == (1, 1, 10.0)
    assert run.state == "stopped at step 1 of 3, or still running"


def test_broken_lines_are_skipped_and_counted(tmp_path):
    lines = [
        start(),
        step(1),
        '{"event": "step", "st',
        "7",
        '{"event": "step"}',
        '{"step": 3}',
        "",
        step(3) | {"tokens": "x"},
        step(2, math.nan),
    ]
    path = write_log(tmp_path, lines)
    path.write_bytes(path.read_bytes() + b'\xff\xfe{"event"')
    run = read_run(path)
    assert [line["step"] for line in run.steps] == [1, 2] and run.skipped == 6
    report.main([str(tmp_path)])
    assert "6 broken lines" in (tmp_path / "report" / "report.html").read_text("utf-8")


def test_a_sample_with_an_odd_line_separator_is_one_line(tmp_path):
    line = json.dumps(evaluation(1) | {"sample": "一\u2028二\x85"}, ensure_ascii=False)
    run = read_run(write_log(tmp_path, [start(), step(1), line]))
    assert len(run.evaluations) == 1 and not run.skipped


@pytest.mark.parametrize("lines", [None, [], [start()], ["nonsense"]])
def test_nothing_to_report_is_an_error_that_names_the_folder(tmp_path, lines):
    if lines is not None:
        write_log(tmp_path, lines)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert str(stopped.value).startswith("error: ") and str(tmp_path / "logs") in str(stopped.value)
    assert "train_pretrain.py" in str(stopped.value)


def test_stages_come_in_their_order_and_bad_logs_are_named(tmp_path):
    for name in ("rlhf_256", "lora/lora_medical_256", "full_sft_256", "pretrain_256"):
        write_log(tmp_path, [start(), step(10)], name)
    write_log(tmp_path, [], "reason_256")
    runs, wrong = read_folder(tmp_path)
    assert [run.name for run in runs] == ["pretrain_256", "full_sft_256", "lora/lora_medical_256", "rlhf_256"]
    assert len(wrong) == 1 and "reason_256" in wrong[0]


def test_the_page_needs_nothing_else_and_shows_no_markup_of_a_sample(tmp_path):
    lines = [start(), *(step(n) for n in range(1, 11)), evaluation(10, 2.5, "<script>alert(1)</script> | 你好")]
    write_log(tmp_path, lines)
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "dialogue.json").write_text(json.dumps({"turns": [{"you": "7+8?", "model": "<b>15"}]}))
    (tmp_path / "scores").mkdir()
    tasks = {
        "ceval": {"questions": 1346, "chance": 0.25, "letters": {"accuracy": 0.25, "stderr": 0.012}},
        "sums": {"questions": 9, "pass@1": 1, "stderr": 0},
    }
    table = table_of([{"weights": "a", "tasks": tasks}])
    (tmp_path / "scores" / "a.md").write_text(table, encoding="utf-8")
    (tmp_path / "scores" / "broken.md").write_text("no table")
    report.main([str(tmp_path), "--price_per_hour", "3600"])
    page = (folder / "report.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;15" in page
    addresses = set(re.findall(r'https?://[^"\s<]+', page))
    assert all("w3.org" in address for address in addresses), addresses  # names of XML, fetched by nobody
    assert page.count("<svg") == 6 and "prefers-color-scheme:dark" in page  # aux_loss is 0 and not drawn
    assert "$" in page and "2.5000" in page and "--learning_rate" in page and "--seed" not in page
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "prefers-color-scheme:dark" in (folder / "curves.svg").read_text("utf-8")
    text = (folder / "report.md").read_text("utf-8")
    assert r"\| 你好" in text and "| ceval, letters | 1346 | 25.0 | 25.0 ± 1.2 |" in text
    assert "| sums, pass@1 | 9 |  | 100.0 ± 0.0 |" in text


def test_the_held_out_loss_of_distillation_is_its_cross_entropy(tmp_path):
    lines = [start(), step(1) | {"ce": 6.5, "kl": 0.3}, evaluation(1)]
    metrics = read_run(write_log(tmp_path, lines, "full_dist_256")).metrics()
    assert (metrics["loss"], metrics["ce"], metrics["kl"]) == ("", "valid_loss", "")


def test_comparing_two_rates_names_what_differs(tmp_path):
    folders = [tmp_path / "slow", tmp_path / "fast"]
    for folder, rate, loss in zip(folders, (1e-4, 5e-4), (8.0, 7.0), strict=True):
        lines = [start(learning_rate=rate, out_dir=str(folder)), step(1), step(10, loss), evaluation(10, loss)]
        write_log(folder, lines, "lora/lora_medical_256")
    ((slow, fast),), _ = read_runs(folders)
    assert (slow.label, fast.label) == ("slow", "fast")
    assert differences([slow, fast]) == [("--learning_rate", ["0.0001", "0.0005"])]
    report.main(["--compare", *map(str, folders), "--output", str(tmp_path / "ab")])
    text = (tmp_path / "ab" / "report.md").read_text("utf-8")
    assert "| --learning_rate | 0.0001 | 0.0005 |" in text and "| loss | 8.0000 | 7.0000 |" in text
    with pytest.raises(ValueError, match="no run has the same name"):
        write_log(folders[0], [start(), step(1)], "pretrain_256")
        write_log(folders[1], [start(), step(1)], "full_sft_256")
        (folders[0] / "logs/lora/lora_medical_256.jsonl").unlink()
        read_runs(folders)


def test_an_estimate_of_other_flags_is_not_shown(tmp_path):
    path = write_log(tmp_path, [start(batch_size=8), step(1, time=90.0)])
    for batch_size, shown in ((8, True), (16, False)):
        estimate = {"seconds": 60.0, "flags": relevant_flags(start(batch_size=batch_size))}
        path.with_suffix(".estimate.json").write_text(json.dumps(estimate), "utf-8")
        report.main([str(tmp_path)])
        assert ("--estimate said" in (tmp_path / "report" / "report.md").read_text("utf-8")) == shown


def test_the_overview_draws_grpos_reward_and_only_where_all_have_it(tmp_path):
    more = {"reward_number": 0.5, "groups_taught": 1.0}
    grpo = read_run(write_log(tmp_path, [start(), step(1) | more, step(2) | more], "grpo_256"))
    sft = read_run(write_log(tmp_path, [start(), step(1), step(2)], "full_sft_256"))
    alone, both = report_charts.overview([[grpo]]), report_charts.overview([[grpo, sft]])
    assert "reward number" in alone.axes[0].get_title("left") and alone.axes[0].lines[0].get_ydata()[0] == 0.5
    assert len(both.axes[0].lines) == 2 and both.axes[0].lines[0].get_ydata()[0] == step(1)["loss"]


def test_a_real_run_says_what_was_not_default(tmp_path, monkeypatch):
    flags = tiny_flags(tmp_path, write_texts(tmp_path / "texts.jsonl"), eval_interval=5, sample_prompt="the sky")
    train_pretrain.main([*flags, f"--valid_path={tmp_path / 'texts.jsonl'}"])
    (run,), wrong = read_folder(tmp_path)
    assert not wrong and run.state == "complete" and run.name == "pretrain_32"
    assert run.changed_flags.keys() >= {"hidden_size", "learning_rate", "valid_path"}
    assert not run.changed_flags.keys() & {"seed", "grad_clip", "out_dir"}
    assert [line["step"] for line in run.steps] == list(range(1, run.total_steps + 1))
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "mfu"} <= run.metrics().keys()
    assert run.metrics()["loss"] == "valid_loss" and all(e["sample"] for e in run.evaluations)
