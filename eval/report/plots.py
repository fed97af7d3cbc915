"""The report's plots, drawn with matplotlib from checked rows: files beside report.md, and SVG inside report.html.

Every plot is a function that draws on axes. Colours are told apart by the colour-blind, and each system has a dash or a
marker of its own as well. In files, text is a mid-grey on a transparent ground, legible on white and on black; inside
the page it takes the page's own colour and font, so that it follows its light and dark look.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data.run.files import replacing
from eval.metrics import wilson_interval
from eval.report.arms import BOTH, Arm, Table
from eval.report.curve import Curve
from eval.report.paper import PAPER_ABLATIONS, PAPER_BENCHMARKS, PAPER_LENGTHS, PAPER_TABLE1, PAPER_TABLE2
from eval.report.results import SYSTEMS, Run, number

LOOKS = {  # system, or stage: (colour, dash, marker)
    "base-one-window": ("#8c8c8c", (0, (3, 2)), "o"), "base": ("#8c8c8c", "-", "s"), "memtrain": ("#d07c00", "-", "^"),
    "memagent": ("#3a87d6", "-", "D"), BOTH: ("#0a9b73", "-", "o"), "mem1": ("#8a6fd1", "-", "v"),
    "memtrain+mem1": ("#c4549a", "-", "P"),
}
ARM_COLOURS = ("#0a9b73", "#d07c00", "#3a87d6", "#c4549a", "#8a6fd1", "#a08a2c", "#8c8c8c")
ARM_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "o^DsvPX"
INK = "#7b7b7b"
STYLE = {
    "font.size": 9.5, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlecolor": INK, "axes.titlesize": 10.5, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": INK, "grid.alpha": 0.2, "grid.linewidth": 0.6, "lines.linewidth": 1.9,
    "lines.markersize": 4.5, "savefig.transparent": True, "savefig.dpi": 160,
    "svg.hashsalt": "memtrain",  # same run, same bytes
    "text.parse_math": False,  # names from outside are text, not formulas
}
PANEL = (5.3, 3.4)  # inches of one panel in the page: still legible at the width of a telephone


@contextmanager
def drawing(more: dict | None = None) -> Iterator[None]:
    """Our style. A letter that the font lacks is drawn as a box, in silence: names come from outside."""
    with matplotlib.rc_context(STYLE | (more or {})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def inline(draw: Callable, size: tuple[float, float] = PANEL) -> str:
    """SVG of one panel for the page: draw(axes). Its ink is the page's; nothing in it is looked up elsewhere."""
    with drawing({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor")
    svg = re.sub(r'<metadata>.*?</metadata>|<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)  # of groups: no one refers to them, and plots would share them
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    return svg.strip()


# ------------------------------------------------------------------------------------------------ drawing on axes


def _end_names(axes, ends: dict[str, tuple[float, float, str]], gap: float = 5.5) -> None:
    """Names at the right ends of lines, {name: (x, y, colour)}, pushed apart where lines end close together."""
    ranked = sorted(ends.items(), key=lambda item: item[1][1])
    low, top = axes.get_ylim()
    gap, heights = gap * (top - low) / 100, []
    for _, (_, y, _) in ranked:
        heights.append(max(y, heights[-1] + gap if heights else low))
    for back in range(1, len(heights) + 1):  # from the top down: nothing above the axes
        heights[-back] = min(heights[-back], top - gap * (back - 1))
    for (name, (x, _, colour)), height in zip(ranked, heights, strict=True):
        axes.annotate(name, (x, height), xytext=(8, 0), textcoords="offset points", va="center", color=colour,
                      annotation_clip=False)


def _over_lengths(axes, lines: dict[str, tuple], ticks: Sequence, labels: Sequence[str]) -> None:
    """{name: (lengths, (L, 1 or 3) of mean[, low, high], (colour, dash, marker))} on a logarithmic axis of lengths."""
    for lengths, values, (colour, dash, marker) in lines.values():
        axes.plot(lengths, values[:, 0], color=colour, linestyle=dash, marker=marker, clip_on=False)
        if values.shape[1] == 3:
            axes.fill_between(lengths, *values[:, 1:].T, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 100)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(ticks, labels)
    _end_names(axes, {name: (lengths[-1], float(values[-1, 0]), look[0])
                      for name, (lengths, values, look) in lines.items()})


def curve(table: Table, system: str, look: tuple) -> tuple | None:
    lengths = [n for n in table.lengths if table.seeds_of([system], [n])]
    if not lengths:
        return None
    values = [table.accuracy(system, [n], table.seeds_of([system], [n])) for n in lengths]
    return lengths, 100 * np.array(values), look


def over_lengths(title: str, lines: dict[str, tuple], ticks: Sequence) -> Callable:
    """A panel of curves of shares in % by document length."""
    def draw(axes) -> None:
        _over_lengths(axes, lines, ticks, [f"{n:g}x" for n in ticks])
        axes.set(title=title, xlabel="document length", ylabel="%")

    return draw


def table1_ours(table: Table) -> Callable:
    curves = {SYSTEMS[s]: found for s in ("base-one-window", "base", "memtrain", "memagent", BOTH)
              if (found := curve(table, s, LOOKS[s]))}

    def draw(axes) -> None:
        _over_lengths(axes, curves, table.lengths, [f"{n:g}x" for n in table.lengths])
        axes.set(title="This run, 95% intervals", xlabel="document length", ylabel="accuracy, %")

    return draw


def table1_paper(axes) -> None:
    lengths = list(PAPER_LENGTHS)
    lines = {SYSTEMS[s]: (lengths, np.array(v)[:, None], LOOKS[s]) for s, v in PAPER_TABLE1["Qwen3-4B"].items()}
    _over_lengths(axes, lines, lengths, list(PAPER_LENGTHS.values()))
    axes.set(title="The paper, Qwen3-4B (Table 1)", xlabel="document length, tokens")


def plot_table1(table: Table, path: Path) -> None:
    """table1.svg: accuracy by length, beside the paper's Qwen3-4B; one scale, one set of colours."""
    with drawing():
        figure = Figure(figsize=(11.4, 4.0), layout="constrained")
        ours, paper = figure.subplots(1, 2, sharey=True)
        table1_ours(table)(ours)
        table1_paper(paper)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def bars(title: str, columns: Sequence[str], values: dict[str, list[tuple | None]]) -> Callable:
    """Grouped bars: {system: (mean, low, high) in % for each column, None where there is none}."""
    def draw(axes) -> None:
        wide = 0.8 / max(1, len(values))
        for i, (system, row) in enumerate(values.items()):
            at = [j for j, cell in enumerate(row) if cell]
            x, cells = np.array(at) + (i - (len(values) - 1) / 2) * wide, [row[j] for j in at]
            mean = np.array([cell[0] for cell in cells])
            axes.bar(x, mean, wide * 0.9, color=LOOKS[system][0], label=SYSTEMS[system])
            if cells and len(cells[0]) == 3:
                error = np.array([[c[0] - c[1], c[2] - c[0]] for c in cells]).T.clip(0)
                axes.errorbar(x, mean, error, fmt="none", ecolor=INK, elinewidth=1)
        axes.set_xticks(range(len(columns)), [c if len(c) < 15 else c[:13] + "…" for c in columns], rotation=30,
                        ha="right", rotation_mode="anchor")
        top = max((max(cell) for row in values.values() for cell in row if cell), default=1)
        axes.set(title=title, ylabel="exact match, %", ylim=(0, max(1, 1.2 * top)))  # room for the legend
        axes.legend(frameon=False, loc="upper right", fontsize=8.5, ncols=2 if len(values) > 3 else 3, borderaxespad=0,
                    columnspacing=1.2, handlelength=1.2)
    return draw


def table2_ours(table: Table, systems: Sequence[str]) -> Callable:
    values: dict[str, list[tuple | None]] = {}
    for s in systems:
        row = [table.accuracy(s, [n], seeds) if (seeds := table.seeds_of([s], [n])) else None for n in table.columns]
        seeds = table.seeds_of([s], table.columns)
        row.append(table.accuracy(s, table.columns, seeds) if seeds else None)
        values[s] = [tuple(100 * x for x in cell) if cell else None for cell in row]
    return bars("This run, 95% intervals", [*table.columns, "average"], values)


def table2_paper(axes) -> None:
    rows = PAPER_TABLE2["Qwen3-4B"]
    bars("The paper, Qwen3-4B (Table 2)", [*PAPER_BENCHMARKS, "average"],
         {s: [(x,) for x in (*values, np.mean(values))] for s, values in rows.items()})(axes)


def ablations_by_length(arms: Sequence[Arm], system: str = BOTH) -> Callable:
    curves = {}
    for i, arm in enumerate(a for a in arms if a.table.has(system)):
        look = ARM_COLOURS[i % len(ARM_COLOURS)], ARM_DASHES[i // len(ARM_COLOURS) % len(ARM_DASHES)], MARKERS[i % 7]
        lengths, values, _ = curve(arm.table, system, look)
        curves[arm.name] = lengths, values if i == 0 else values[:, :1], look  # one band: more would hide each other

    def draw(axes) -> None:
        ticks = arms[0].table.lengths
        _over_lengths(axes, curves, ticks, [f"{n:g}x" for n in ticks])
        axes.set(title=f"{SYSTEMS[system]}, by length", xlabel="document length", ylabel="accuracy, %")

    return draw


def averages(title: str, rows: Sequence[tuple[str, tuple, str]], xlabel: str = "accuracy, %") -> Callable:
    """Dots with intervals, one line a name: (name, (mean[, low, high]) in %, colour)."""
    def draw(axes) -> None:
        for y, (_, value, colour) in enumerate(rows):
            axes.plot(value[0], y, "o", color=colour, markersize=6)
            if len(value) == 3:
                axes.plot(value[1:], (y, y), color=colour, linewidth=1.6)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set(title=title, xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
    return draw


def ablation_averages(arms: Sequence[Arm], system: str = BOTH) -> Callable:
    """Average over the lengths that all of these arms have."""
    own = [arm for arm in arms if arm.table.has(system)]
    lengths = [n for n in own[0].table.lengths if all((system, n) in arm.table.cells for arm in own)]
    rows = []
    for i, arm in enumerate(own):
        if lengths and (seeds := arm.table.seeds_of([system], lengths)):
            value = tuple(100 * x for x in arm.table.accuracy(system, lengths, seeds))
            rows.append((arm.name, value, ARM_COLOURS[i % len(ARM_COLOURS)]))
    over = f", average over {lengths[0]:g}x to {lengths[-1]:g}x" if lengths else ", no length in common"
    return averages(SYSTEMS[system] + over, rows)


def ablations_paper(axes) -> None:
    averages("The paper, Qwen3-4B, average (Figure 3)", [
        (name, (value,), ARM_COLOURS[i]) for i, (name, value) in enumerate(PAPER_ABLATIONS.items())])(axes)
    axes.set_xlim(60, 75)


def label_curve(curve: Curve) -> Callable:
    """Accuracy by labelled questions, from the base and after MemTrain; bands are 95% intervals."""
    def draw(axes) -> None:
        ends = {}
        for system, found in curve.values.items():
            labels, values = list(found), 100 * np.array([estimate for _, estimate in found.values()])
            colour, dash, marker = LOOKS[system]
            axes.plot(labels, values[:, 0], color=colour, linestyle=dash, marker=marker, clip_on=False)
            axes.fill_between(labels, *values[:, 1:].T, color=colour, alpha=0.15, linewidth=0)
            ends[SYSTEMS[system]] = labels[-1], float(values[-1, 0]), colour
        axes.set_xscale("symlog", linthresh=60, linscale=0.5)
        axes.minorticks_off()
        ticks = sorted({n for found in curve.values.values() for n in found})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_ylim(0, None)
        _end_names(axes, ends)
        axes.set(title=f"Mean of {curve.lengths[0]:g}x to {curve.lengths[-1]:g}x, {len(curve.seeds)} seeds",
                 xlabel="labelled questions that MemAgent was trained on", ylabel="accuracy, %")

    return draw


def plot_labels(curve: Curve | None, path: Path) -> bool:
    """labels.svg; False, and no picture of an earlier run, where there is no curve."""
    path.unlink(missing_ok=True)
    if curve is None:
        return False
    with drawing():
        figure = Figure(figsize=(7.6, 4.0), layout="constrained")
        label_curve(curve)(figure.subplots())
        figure.savefig(path, metadata={"Date": None})
    return True


def retention(rows: Sequence[dict], title: str) -> Callable | None:
    """Share of gold facts that a memory still holds k sections after they were read; Wilson's 95% intervals."""
    curves = {}
    for system in SYSTEMS:
        sums: dict[int, np.ndarray] = {}
        for row in rows:
            for k, pair in enumerate((row.get("retention") or []) if row["system"] == system else []):
                sums[k] = sums.get(k, np.zeros(2)) + pair
        found = {k: pair for k, pair in sorted(sums.items()) if pair[1] >= MIN_ASKED}
        if found:
            curves[system] = list(found), 100 * np.array([(a / n, *wilson_interval(a, n)) for a, n in found.values()])
    if not curves:
        return None

    def draw(axes) -> None:
        for system, (k, values) in curves.items():
            colour, dash, _ = LOOKS[system]
            axes.plot(k, values[:, 0], color=colour, linestyle=dash, marker="o" if len(k) < 20 else "", clip_on=False)
            axes.fill_between(k, *values[:, 1:].T, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0, 100)
        _end_names(axes, {SYSTEMS[s]: (k[-1], float(v[-1, 0]), LOOKS[s][0]) for s, (k, v) in curves.items()})
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=f"Gold facts kept, {title}", xlabel="further sections read", ylabel="kept, %")

    return draw


MIN_ASKED = 10  # facts at a distance; a share of fewer says nothing

# ------------------------------------------------------------------------------------------------ training curves

CURVES = {"reward": "Reward", "recall": "Recall of [TARGET]", "memory_tokens": "Memory, tokens", "searches": "Searches",
          "entropy": "Entropy, nats a token", "signal": "Groups with a signal", "kl": "KL to the reference",
          "loss": "Loss of the base stage"}


def training(runs: Sequence[Run]) -> tuple[dict[str, Callable], list[str]]:
    """({metric: draw}, stages): one panel a metric that any step logged."""
    series: dict[str, list] = {name: [] for name in CURVES}  # of (stage, steps, values), one per stage and run
    for run, name in itertools.product(runs, CURVES):
        for stage, rows in itertools.groupby(run.metrics, key=lambda row: row["stage"]):
            if name == "loss" and stage != "base":  # in the others, the loss is minus an objective around zero
                continue
            pairs = [(row["step"], row[name]) for row in rows if number(row.get(name))]
            if pairs and (name != "kl" or any(y for _, y in pairs)):
                series[name].append((stage, *np.array(pairs, float).T))
    logged = [stage for lines in series.values() for stage, *_ in lines]
    names = [s for s in dict.fromkeys([*LOOKS, *logged]) if s in logged]

    def panel(title: str, lines: list) -> Callable:
        def draw(axes) -> None:
            for stage, own in itertools.groupby(sorted(lines, key=lambda line: line[0]), key=lambda line: line[0]):
                _curves(axes, LOOKS.get(stage, (INK,))[0], [(steps, values) for _, steps, values in own])
            axes.set(title=title, xlabel="step", ylim=(0, None))
        return draw

    return {name: panel(CURVES[name], lines) for name, lines in series.items() if lines}, names


def _curves(axes, colour: str, runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """One stage's metric: single runs thin, their mean over the seeds, smoothed, thick."""
    at: dict[float, list[float]] = {}
    for steps, values in runs:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        for step, value in zip(steps, values, strict=True):
            at.setdefault(step, []).append(value)
    steps, values = np.array(sorted(at)), np.array([np.mean(at[step]) for step in sorted(at)])
    window = np.ones(max(1, len(values) // 12))
    inside = np.convolve(np.ones(len(values)), window, "same")[:len(values)]  # fewer steps at the ends
    axes.plot(steps, np.convolve(values, window, "same")[:len(values)] / inside, color=colour,
              marker="" if len(values) > 1 else "o")


def plot_training(runs: Sequence[Run], path: Path) -> bool:
    """training.png: reward, recall and memory length by step; False where no step logged any of them."""
    panels, names = training(runs)
    shown = [panel for name, panel in panels.items() if name in ("reward", "recall", "memory_tokens")]
    path.unlink(missing_ok=True)  # no picture of an earlier run beside this report
    if not shown:
        return False
    with drawing():
        figure = Figure(figsize=(3.8 * len(shown), 3.0), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            draw(axes)
        lines = [Line2D([], [], color=LOOKS.get(s, (INK,))[0], label=s) for s in names]
        figure.legend(handles=lines, loc="outside upper center", ncols=len(names), frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return True
