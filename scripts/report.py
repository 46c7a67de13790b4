"""Make one page of pictures from the logs that every run writes: what was trained, how it went, what it cost.

    python scripts/report.py                               all stages of out/ -> out/report/report.html
    python scripts/report.py out/quickstart --price_per_hour 0.5
    python scripts/report.py --compare out/a out/b         overlay runs and list what differs: folders, or logs

The page needs no network and follows the reader's light or dark setting. Next to it: report.md with the same tables,
and curves.svg and curves.png, the losses of all stages. Logs are only read, also those of runs that are still going on.
"""

import argparse
import html
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.streams import entry_point
from model.weights import write_atomically
from scripts import report_charts
from scripts.report_logs import Run, differences, read_folder, read_json, read_runs
from trainer.estimate import duration, gigabytes
from trainer.loader import plural

Table = tuple[list[str], list[list[str]]]  # header, rows


# --- facts about runs ------------------------------------------------------------------------------------------------


def tiles(run: Run, price: float | None) -> list[tuple[str, str]]:
    """Return (what, figure) of the numbers to see first."""
    speed = run.series("tokens_per_second")[1]
    memory = [line["peak_memory_bytes"] for line in run.steps if "peak_memory_bytes" in line]
    cost = run.cost(price)
    last = {name: (run.series(name, True)[1] or [None])[-1] for name in ("valid_loss", "bits_per_byte")}
    facts = {
        "parameters": "parameters" in run.start and f"{run.start['parameters'] / 1e6:.2f}M",
        "steps": f"{run.last_step:,}",
        "tokens": f"{run.steps[-1].get('tokens', 0) / 1e6:,.2f}M",
        "loss": f"{(run.series('loss')[1] or [float('nan')])[-1]:.4f}",
        "held-out loss": last["valid_loss"] is not None and f"{last['valid_loss']:.4f}",
        "bits per byte": last["bits_per_byte"] is not None and f"{last['bits_per_byte']:.4f}",
        "tokens/s, median": speed and f"{statistics.median(speed):,.0f}",
        "memory": memory and gigabytes(max(memory)),
        "time": duration(run.wall_seconds),
        "cost": cost is not None and f"${cost:,.2f}",
    }
    return [(name, value) for name, value in facts.items() if value]


def notes(run: Run) -> list[str]:
    """Return what a reader must know about a log."""
    start, estimate = run.start, run.estimate
    lines = [run.state]
    if "threads" in start:
        threads = plural(start["threads"], "thread")
        lines.append(f"on {start['device']}: {plural(start['processes'], 'process')} of {threads}")
    if run.parts > 1:
        lost = f", {run.repeated} logged lines of lost steps left out" if run.repeated else ""
        lines.append(f"resumed {times(run.parts - 1)}{lost}")
    if run.replaced:
        lines.append(f"started again from the beginning {times(run.replaced)}; only the last run is shown")
    if run.skipped:
        lines.append(f"{plural(run.skipped, 'broken line')} in the log skipped")
    if estimate.get("seconds") and run.seconds:
        off = run.seconds / estimate["seconds"] - 1
        lines.append(f"--estimate said {duration(estimate['seconds'])}; it took {duration(run.seconds)} ({off:+.0%})")
    return lines


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def milestones(runs: list[Run]) -> Table:
    """Return losses at the start, a tenth, half, and the end."""
    rows = []
    for run in runs:
        for what, (steps, losses) in (("training", run.series("loss")), ("held out", run.series("valid_loss", True))):
            cells = []
            for share in (0, 0.1, 0.5, 1):
                wanted = max(share * run.total_steps, 1)
                step, loss = min(zip(steps, losses, strict=True), key=lambda at: abs(at[0] - wanted), default=(0, 0))
                near = abs(step - wanted) <= max(0.1 * run.total_steps, 1)
                cells.append(f"{loss:.3f} (step {step:,})" if step and near else "–")
            rows += [[run.label or run.name, what, *cells]] if steps else []
    return ["run", "loss", "start", "a tenth", "half", "end"], rows


def summary(runs: list[Run], price: float | None) -> Table:
    """Return a row for each stage, and their sum."""
    names = ("tokens", "loss", "held-out loss", "bits per byte", "time", "cost")
    rows = [[run.name, run.state, *(dict(tiles(run, price)).get(name, "–") for name in names)] for run in runs]
    costs = [cost for run in runs if (cost := run.cost(price)) is not None]
    total = duration(sum(run.wall_seconds for run in runs))
    rows.append(["all", *[""] * 5, total, f"${sum(costs):,.2f}" if costs else "–"])
    return ["run", "state", *names], rows


def differing(runs: list[Run]) -> Table:
    rows = [[name, *values] for name, values in differences(runs)]
    for name in ("loss", "held-out loss", "bits per byte", "tokens/s, median", "time"):
        values = [dict(tiles(run, None)).get(name, "–") for run in runs]
        if set(values) != {"–"}:
            rows.append([name, *values])
    return ["", *(run.label for run in runs)], rows


def samples(run: Run) -> Table:
    return ["step", "sample"], [[f"{e['step']:,}", str(e["sample"])] for e in run.evaluations if e.get("sample")]


def settings(run: Run) -> Table:
    rows = [[f"--{name}", str(value)] for name, value in run.changed_flags.items()]
    rows += [[f"{name} version", str(value)] for name, value in run.start.get("versions", {}).items()]
    return ["setting that is not the default", "value"], rows


def scores(path: Path) -> Table:
    """Return the table that scripts/evaluate.py wrote about weights."""
    lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return (rows[0], rows[2:]) if rows else ([], [])


# --- the page and the Markdown ---------------------------------------------------------------------------------------


class Report:
    """Collects one report, as HTML and as Markdown."""

    def __init__(self, title: str):
        self.title, self.html, self.markdown = title, [], [f"# {title}", ""]
        self.html.append(f"<h1>{html.escape(title)}</h1>")

    def heading(self, text: str) -> None:
        self.html.append(f"<h2>{html.escape(text)}</h2>")
        self.markdown += [f"## {text}", ""]

    def lines(self, lines: list[str]) -> None:
        self.html += [f"<p>{html.escape(line)}</p>" for line in lines]
        self.markdown += [*(f"- {line}" for line in lines), ""]

    def tiles(self, facts: list[tuple[str, str]]) -> None:
        cells = (f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in facts)
        self.html.append(f'<div class="tiles">{"".join(cells)}</div>')
        self.markdown += [", ".join(f"{name} {value}" for name, value in facts), ""]

    def table(self, table: Table, folded: str = "") -> None:
        """folded: what to click on to see it."""
        header, rows = table
        if not rows:
            return
        cells = [[html.escape(cell) for cell in row] for row in rows]
        body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        text = f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
        self.html.append(f"<details><summary>{html.escape(folded)}</summary>{text}</details>" if folded else text)
        clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
        clean.insert(1, ["---"] * len(header))
        self.markdown += [*(f"| {' | '.join(row)} |" for row in clean), ""]

    def charts(self, runs: list[Run]) -> None:
        drawn = (f"<figure>{report_charts.svg(chart)}</figure>" for chart in report_charts.charts(runs))
        self.html.append(f'<div class="charts">{"".join(drawn)}</div>')

    def said(self, turns: list[dict]) -> None:
        bubbles = "".join(
            f'<div class="{who}">{html.escape(str(turn.get(who, "")))}</div>'
            for turn in turns
            for who in ("you", "model")
        )
        self.html.append(f'<div class="said">{bubbles}</div>')
        for turn in turns:
            self.markdown += [f"> **you:** {turn.get('you')}\n>\n> **model:** {turn.get('model')}", ""]

    def write(self, folder: Path, groups: list[list[Run]]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        picture = report_charts.overview(groups)
        style = (ROOT / "scripts" / "report.css").read_text("utf-8") + report_charts.THEME
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{html.escape(self.title)}</title>'
            f"<style>{style}</style></head><body>{''.join(self.html)}</body></html>\n"
        )
        self.markdown.insert(2, "![losses](curves.png)\n")
        contents = {
            "report.html": page.encode("utf-8", "replace"),
            "report.md": "\n".join(self.markdown).encode("utf-8", "replace"),
            "curves.svg": report_charts.svg(picture, alone=True).encode(),
            "curves.png": report_charts.png(picture),
        }
        for name, content in contents.items():
            write_atomically(folder / name, lambda file, content=content: file.write(content))
        return folder / "report.html"


def report_folder(out_dir: Path, output: Path, price: float | None) -> Path:
    """Write the report of an output folder and return the page. Raises ValueError if there is nothing to report."""
    runs, wrong = read_folder(out_dir)
    report = Report(f"MiniMind: {out_dir.resolve().name}")
    report.lines([f"made {time.strftime('%Y-%m-%d %H:%M')} from {out_dir / 'logs'}", *wrong])
    report.table(summary(runs, price))
    report.table(milestones(runs))
    if turns := read_json(out_dir / "report" / "dialogue.json").get("turns"):  # see scripts/speedrun.py
        report.heading("A conversation")
        report.said(turns)
    if found := sorted((out_dir / "scores").glob("*.md")):
        report.heading("Scores")
    for path in found:
        report.table(scores(path))
    for run in runs:
        report.heading(run.name)
        report.lines(notes(run))
        report.tiles(tiles(run, price))
        report.charts([run])
        report.table(samples(run), "samples over time")
        report.table(settings(run), "settings and versions")
    return report.write(output, [[run] for run in runs])


def compare(paths: list[Path], output: Path) -> Path:
    """Write the comparison of runs and return the page. Raises ValueError if there is nothing to compare."""
    groups, wrong = read_runs(paths)
    report = Report("MiniMind: " + " and ".join(dict.fromkeys(run.label for runs in groups for run in runs)))
    report.lines(wrong)
    for runs in groups:
        report.heading(" / ".join(dict.fromkeys(run.name for run in runs)))
        report.lines([f"{run.label}: {', '.join(notes(run))}" for run in runs])
        report.table(differing(runs))
        report.table(milestones(runs))
        report.charts(runs)
    return report.write(output, groups)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out_dir", nargs="?", type=Path, default=ROOT / "out", help="folder with the logs (default: out)")
    add("--compare", nargs="+", type=Path, metavar="RUN", help="output folders or logs to overlay")
    add("--output", type=Path, help="folder to write to (default: OUT_DIR/report)")
    add("--price_per_hour", type=float, help="of the machine in dollars (default: what the runs were given)")
    args = parser.parse_args(argv)
    output = args.output or args.out_dir / "report"
    if args.compare:
        page = compare(args.compare, output)
    else:
        page = report_folder(args.out_dir, output, args.price_per_hour)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
