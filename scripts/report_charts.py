"""Draw the numbers of training runs as small charts that are readable on light and dark pages."""

import io
import logging
import re
import statistics
import warnings

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from scripts.report_logs import Run

# on a light page, on a dark one; the light ones stand for CSS variables in an SVG
INK, GRID = ("#1f2328", "#e6edf3"), ("#d8dee4", "#30363d")
COLOURS = (
    ("#0969da", "#58a6ff"), ("#bc4c00", "#f0883e"), ("#1a7f37", "#56d364"), ("#8250df", "#bc8cff"),
    ("#bf3989", "#f778ba"), ("#6e7781", "#9198a1"),
)  # fmt: skip
VARIABLES = {light: f"--c{number}" for number, (light, _) in enumerate((INK, GRID, *COLOURS))}
DARK = "".join(f"--c{number}:{dark};" for number, (_, dark) in enumerate((INK, GRID, *COLOURS)))
THEME = f"@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
MOST_POINTS = 600
TITLES = {
    "lr": "learning rate", "grad_norm": "gradient norm", "mfu": "MFU",
    "tokens_per_second": "tokens per second", "held out bits_per_byte": "held out: bits per byte",
}  # fmt: skip
TAUGHT_BY = {"pretrain": "token", "conversation": "token", "preference": "pair"}  # kind of data: what a loss is of
ORDER = ("loss", "held out bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "minimind", "axes.spines.top": False, "axes.spines.right": False,
    "font.family": ["DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei"], "font.size": 9,
    "axes.edgecolor": INK[0], "axes.labelcolor": INK[0], "text.color": INK[0], "xtick.color": INK[0],
    "ytick.color": INK[0], "grid.color": GRID[0], "axes.grid": True, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6,
}  # fmt: skip
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of the fonts above, one is enough


def metrics_of(runs: list[Run]) -> dict[str, str]:
    """Return the metrics to draw, well-known ones first, those that are always zero left out; see Run.metrics."""
    found = {}
    for run in runs:
        for name, held_out in run.metrics().items():
            values = [*run.series(name)[1], *(run.series(held_out, True)[1] if held_out else [])]
            if any(values):
                found[name] = found.get(name) or held_out
    return {name: found[name] for name in sorted(found, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))}


def charts(runs: list[Run]) -> list[Figure]:
    """Return a chart for every metric of a run, or of several on top of each other."""
    found = []
    for name, held_out in metrics_of(runs).items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.6, 2.5), layout="constrained")
            _draw(figure.add_subplot(), runs, name, held_out)
        found.append(figure)
    return found


def overview(groups: list[list[Run]]) -> Figure:
    """Return the losses of all groups next to each other, as one picture; of GRPO its first reward."""
    with matplotlib.rc_context(STYLE):
        rows = -(-len(groups) // 3)
        columns = min(len(groups), 3)
        figure = Figure(figsize=(max(3.6 * columns, 5.2), 2.8 * rows), layout="constrained")
        for axes, runs in zip(figure.subplots(rows, columns, squeeze=False).flat, groups, strict=False):
            metrics = runs[0].metrics()
            rewards = [n for n in metrics if n.startswith("reward_") and all(n in run.metrics() for run in runs)]
            # GRPO's loss stays near 0 however much is learned
            name = rewards[0] if rewards and "groups_taught" in metrics else "loss"
            _draw(axes, runs, name, metrics.get(name, ""))
            if len({run.name for run in runs}) == 1:
                axes.set_title(runs[0].name + ("" if name == "loss" else f": {name.replace('_', ' ')}"))
        for axes in figure.axes[len(groups) :]:
            axes.set_axis_off()
    return figure


def _draw(axes, runs: list[Run], name: str, held_out: str) -> None:
    title, tops = TITLES.get(name, name.replace("_", " ")), []
    # distillation's loss is a mixture, GRPO's has no unit
    units = {None if "ce" in run.metrics() else TAUGHT_BY.get(run.start.get("kind")) for run in runs}
    if name == "loss" and len(units) == 1 and None not in units:
        title = f"loss, nats a {units.pop()}"
    for number, run in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)][0]
        steps, values = thinned(*run.series(name))
        label = run.label or "training"
        if values:
            smooth = smoothed(values) if name != "lr" else values
            if smooth is not values:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            marker = "o" if len(values) < 3 else ""
            axes.plot(steps, smooth, color=colour, label=label, marker=marker, markersize=3)
            tops.append(max(values[: max(len(values) // 20, 1)]))
        if held_out and (points := run.series(held_out, True))[0]:
            other = COLOURS[1][0] if len(runs) == 1 and values else colour
            label = "held out" if not run.label else f"{run.label}, held out"
            axes.plot(*points, color=other, marker="o", markersize=3, linestyle="--", linewidth=1.2, label=label)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if name == "mfu":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    elif name == "tokens_per_second":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(bottom=0)
    if name == "loss" and tops and axes.get_ylim()[1] > 2 * max(tops):
        axes.set_ylim(top=2 * max(tops))  # a run that blew up must not flatten the others
    axes.set_xlim(left=0)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


def thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Return at most MOST_POINTS points: means of neighbours, so that a long run makes no large picture."""
    size = -(-len(values) // MOST_POINTS) or 1
    pieces = range(0, len(values), size)
    return [steps[i] for i in pieces], [statistics.fmean(values[i : i + size]) for i in pieces]


def smoothed(values: list[float]) -> list[float]:
    """Return the running mean over the last twentieth; the values themselves if there are few."""
    window = len(values) // 20
    if window < 2:
        return values
    return [statistics.fmean(values[max(i - window + 1, 0) : i + 1]) for i in range(len(values))]


def svg(figure: Figure, alone: bool = False) -> str:
    """Return a chart as SVG whose colours follow the page; alone: as a file that follows the reader's system."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore"):  # characters that no font has
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    for light, variable in VARIABLES.items():
        text = text.replace(light, f"var({variable},{light})")
    if alone:
        return text.replace("<defs>", f"<style>{THEME}</style>\n <defs>", 1)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text[text.index("<svg") :], count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings(action="ignore"):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()
