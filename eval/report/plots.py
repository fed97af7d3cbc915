"""The report's plots: files beside report.md, which report.html holds, too.

Every plot is a list of functions that draw on axes. Colours are told apart by the colour-blind, and each system has a
dash or a marker of its own as well. Text is a mid-grey on a transparent ground, legible on white and on black.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data.run.files import replacing
from eval.report.arms import BOTH, Table
from eval.report.curve import Curve
from eval.report.paper import PAPER_LENGTHS, PAPER_TABLE1
from eval.report.results import SYSTEMS, Run, number

LOOKS = {  # system, or stage: (colour, dash, marker)
    "base-one-window": ("#8c8c8c", (0, (3, 2)), "o"), "base": ("#8c8c8c", "-", "s"), "memtrain": ("#d07c00", "-", "^"),
    "memagent": ("#3a87d6", "-", "D"), BOTH: ("#0a9b73", "-", "o"), "mem1": ("#8a6fd1", "-", "v"),
    "memtrain+mem1": ("#c4549a", "-", "P"),
}
ARM_COLOURS = ("#0a9b73", "#d07c00", "#3a87d6", "#c4549a", "#8a6fd1", "#a08a2c", "#8c8c8c")
MARKERS = "o^DsvPX"
INK = "#7b7b7b"
STYLE = {
    "font.size": 9.5, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlecolor": INK, "axes.titlesize": 10.5, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": INK, "grid.alpha": 0.2, "grid.linewidth": 0.6, "lines.linewidth": 1.9,
    "lines.markersize": 4.5, "savefig.transparent": True, "savefig.dpi": 110,
    "svg.hashsalt": "memtrain",  # same run, same bytes
    "text.parse_math": False,  # names from outside are text, not formulas
}


@contextmanager
def drawing(more: dict | None = None) -> Iterator[None]:
    """Our style. A letter that the font lacks is drawn as a box, in silence: names come from outside."""
    with matplotlib.rc_context(STYLE | (more or {})), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def picture(path: Path, panels: Sequence[Callable], size: tuple[float, float], rows: int = 1, sharey: bool = False,
            stages: Sequence[str] = ()) -> bool:
    """Writes the panels in `rows` rows as one picture of so many inches. False, and no picture of an earlier run, where
    there is nothing to draw. stages: of its legend."""
    path.unlink(missing_ok=True)
    if not panels:
        return False
    with drawing():
        figure = Figure(figsize=size, layout="constrained")
        places = figure.subplots(rows, -(-len(panels) // rows), squeeze=False, sharey=sharey).flat
        for axes, draw in itertools.zip_longest(places, panels, fillvalue=Axes.set_axis_off):
            draw(axes)
        if stages:
            lines = [Line2D([], [], color=LOOKS.get(s, (INK,))[0], label=s) for s in stages]
            figure.legend(handles=lines, loc="outside upper center", ncols=len(stages), frameon=False)
        with replacing(path) as temporary:
            form = path.suffix[1:]
            figure.savefig(temporary, format=form, metadata={"Date": None} if form == "svg" else None)
    return True


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


def over_lengths(title: str, lines: dict[str, tuple], ticks: Sequence, ylabel: str = "%") -> Callable:
    """A panel of curves of shares in % by document length."""
    def draw(axes) -> None:
        _over_lengths(axes, lines, ticks, [f"{n:g}x" for n in ticks])
        axes.set(title=title, xlabel="document length", ylabel=ylabel)

    return draw


def plot_table1(table: Table, path: Path) -> bool:
    """table1.svg: accuracy by length, beside the paper's Qwen3-4B; one scale, one set of colours."""
    ours = {SYSTEMS[s]: found for s in ("base-one-window", "base", "memtrain", "memagent", BOTH)
            if (found := curve(table, s, LOOKS[s]))}
    lengths = list(PAPER_LENGTHS)
    theirs = {SYSTEMS[s]: (lengths, np.array(v)[:, None], LOOKS[s]) for s, v in PAPER_TABLE1["Qwen3-4B"].items()}

    def paper(axes) -> None:
        _over_lengths(axes, theirs, lengths, list(PAPER_LENGTHS.values()))
        axes.set(title="The paper, Qwen3-4B (Table 1)", xlabel="document length, tokens")

    this = over_lengths("This run, 95% intervals", ours, table.lengths, "accuracy, %")
    return picture(path, [this, paper], (11.4, 4.0), sharey=True)


def plot_labels(curve: Curve | None, path: Path) -> bool:
    """labels.svg: accuracy by labelled questions, from the base and after MemTrain; bands are 95% intervals."""
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

    return picture(path, [draw] if curve else [], (7.6, 4.0))


# ------------------------------------------------------------------------------------------------ training curves

CURVES = {"reward": "Reward", "recall": "Recall of [TARGET]", "memory_tokens": "Memory, tokens", "searches": "Searches",
          "entropy": "Entropy, nats a token", "signal": "Groups with a signal", "kl": "KL to the reference",
          "loss": "Loss of the base stage"}


def plot_training(runs: Sequence[Run], path: Path) -> bool:
    """training.png: one panel a metric that any step logged."""
    series: dict[str, list] = {name: [] for name in CURVES}  # of (stage, steps, values), one per stage and run
    for run, name in itertools.product(runs, CURVES):
        for stage, rows in itertools.groupby(run.metrics, key=lambda row: row["stage"]):
            if name == "loss" and stage != "base":  # in the others, the loss is minus an objective around zero
                continue
            pairs = [(row["step"], row[name]) for row in rows if number(row.get(name))]
            if pairs and (name != "kl" or any(y for _, y in pairs)):
                series[name].append((stage, *np.array(pairs, float).T))
    logged = [stage for lines in series.values() for stage, *_ in lines]
    stages = [s for s in dict.fromkeys([*LOOKS, *logged]) if s in logged]

    def panel(title: str, lines: list) -> Callable:
        def draw(axes) -> None:
            for stage in sorted({stage for stage, *_ in lines}):
                own = [(steps, values) for name, steps, values in lines if name == stage]
                _curves(axes, LOOKS.get(stage, (INK,))[0], own)
            axes.set(title=title, xlabel="step", ylim=(0, None))
        return draw

    panels = [panel(CURVES[name], lines) for name, lines in series.items() if lines]
    rows = -(-len(panels) // 3)
    return picture(path, panels, (11.4, 0.4 + 2.6 * rows), rows, stages=stages)


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
