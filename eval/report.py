"""The report of a run, from its JSON alone: report.md, table1.svg/.png and training.png.

    python -m eval.report runs/nano                               rebuild one run's report
    python -m eval.report runs/s0 runs/s1 runs/s2 --out DIR       pool runs that differ in their seed only

    results.json, metrics.jsonl -> checked rows -> cells[system, length][seed] -> tables, verdicts, plots

Three rules keep it honest. A verdict is read off the 95% interval of a paired difference, after rounding the
interval outwards. Whatever was not measured is written as "not run" or "not tested", never left out. The
paper's own figures stand beside ours, also where they do not flatter the paper.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data import InputError
from data.files import output, replacing, writing
from data.terminal import printable
from eval.metrics import bootstrap_difference, wilson_interval

SYSTEMS = {  # name in results.json: (name in print, colour, dash, marker)
    "base-one-window": ("Base, one window", "#8c8c8c", (0, (3, 2)), "o"),
    "base": ("Base", "#8c8c8c", "-", "s"),
    "memtrain": ("+ MemTrain", "#d07c00", "-", "^"),
    "memagent": ("+ MemAgent", "#3a87d6", "-", "D"),
    "memtrain+memagent": ("+ MemTrain + MemAgent", "#0a9b73", "-", "o"),
}
STAGE_COLOURS = {"memtrain": "#d07c00", "memagent": "#3a87d6", "memtrain+memagent": "#0a9b73"}
MIN_QUESTIONS = 30  # below this a bootstrap interval means little: with one question it has no width at all
REPRODUCED = "**reproduced**"
UNSHARED = {"seed", "run", "wandb", "threads", "debug", "stages"}  # in what pooled runs may differ

# arXiv 2606.03197, Table 1: accuracy in % by document length. Our length 1x stands beside its 7k, 2x beside
# 14k and so on: in both, the shortest document is about one window long and each step doubles it.
PAPER_LENGTHS = {1: "7k", 2: "14k", 4: "28k", 8: "56k", 16: "112k", 32: "224k", 64: "448k", 128: "896k"}
PAPER_TABLE1 = {
    "Qwen3-4B": {
        "base-one-window": (57.81, 51.56, 34.38, 10.94, 8.59, 4.69, 3.91, 3.91),
        "memtrain": (63.28, 60.16, 60.16, 57.03, 60.94, 58.59, 48.44, 40.62),
        "memagent": (70.31, 64.06, 71.88, 62.50, 64.84, 66.41, 64.06, 57.03),
        "memtrain+memagent": (79.69, 73.44, 75.78, 73.44, 68.75, 67.19, 61.72, 62.50),
    },
    "Qwen2.5-7B": {
        "base-one-window": (53.12, 51.56, 35.16, 13.28, 10.16, 1.56, 1.56, 0.00),
        "memtrain": (59.38, 55.47, 48.44, 46.09, 42.19, 38.28, 39.84, 33.59),
        "memagent": (64.06, 67.19, 62.50, 59.38, 55.47, 50.00, 46.88, 41.41),
        "memtrain+memagent": (76.56, 79.69, 77.34, 75.00, 70.31, 75.78, 64.84, 68.75),
    },
}
UNTESTED = {  # claims that need runs of another kind, with the paper's figure
    "C4 leaving out IMR is worse": "63.3 without, 70.3 with (Figure 3, Qwen3-4B, average)",
    "C5 decoupled rewards are worse on long documents": "worse beyond 56k (Figure 3, Qwen3-4B)",
    "C6 more post-training does not replace MemTrain": "2.6 points short after 300 more steps (Figure 4)",
    "C7 MemTrain+MEM1 beats MEM1 at search": "32.1 against 21.5 (Table 2, Qwen3-4B, average)",
    "C8 it holds for more than one backbone": "Qwen3-4B and Qwen2.5-7B",
}


# ------------------------------------------------------------------------------------------------ reading

def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value) -> bool:
    return _number(value) and value == int(value) and value >= 0


CHECKS: dict[str, tuple[Callable, str]] = {
    "system": (lambda v: isinstance(v, str) and v in SYSTEMS, f"one of {', '.join(SYSTEMS)}"),
    "text": (lambda v: isinstance(v, str), "a text"),
    "count": (_count, "a whole number, not negative"),
    "positive": (lambda v: _number(v) and v > 0, "a number above 0"),
    "number": (_number, "a number"),
    "share": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "bits": (lambda v: isinstance(v, list) and all(_count(x) and x <= 1 for x in v), "a list of 0 and 1"),
    "kinds": (lambda v: isinstance(v, dict) and all(
        isinstance(x, list) and len(x) == 2 and all(map(_count, x)) and x[0] <= x[1] for x in v.values()),
        "{kind: [correct, asked]}"),
}
SCHEMA = {  # section: fields of its rows; ? marks those that may be missing or null
    "long_qa": "system:system seed:count length:positive n:positive em:share em_low:share em_high:share "
               "correct:bits sections?:number tokens?:number f1?:share sub_em?:share kinds?:kinds "
               "memory_tokens?:number finished?:share",
    "recall": "system:system seed:count n:positive accuracy:share low:share high:share",
    "masked": "system:system seed:count n:positive em:share em_low:share em_high:share sections?:number",
    "stages": "name:text seed?:count steps?:count seconds?:number tokens_sampled?:count "
              "tokens_trained?:count reward_first?:number reward_last?:number",
}


@dataclass(frozen=True)
class Run:
    """One run folder, read and checked."""

    path: Path
    environment: dict
    config: dict
    results: dict
    metrics: list[dict]  # one per training step


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the run has to reach its evaluation first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error})") from None


def _object(path: Path) -> dict:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is needed, not a {type(value).__name__}")
    return value


def _check_rows(path: Path, section: str, rows) -> list[dict]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: {section} must be a list of objects")
    for index, row in enumerate(rows):
        for field, kind in (item.split(":") for item in SCHEMA[section].split()):
            name = field.rstrip("?")
            if field.endswith("?") and row.get(name) is None:
                continue
            if name not in row:
                raise InputError(f"{path}: {section}[{index}] has no {name!r}")
            good, meaning = CHECKS[kind]
            if not good(row[name]):
                value = f"{row[name]!r}"[:60]
                raise InputError(f"{path}: {section}[{index}].{name} must be {meaning}, not {value}")
        if section == "long_qa":
            n, right = row["n"], sum(row["correct"])
            if len(row["correct"]) != n or abs(right / n - row["em"]) > 1e-3:
                raise InputError(f"{path}: {section}[{index}]: 'correct' disagrees with 'n' or 'em'")
    return rows


def _read_metrics(path: Path) -> list[dict]:
    """Training steps; a resumed run logs some steps twice, the later line counts."""
    steps: dict = {}
    lines = _read(path).split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            if number == len(lines):  # no newline behind it: the run was stopped while writing
                break
            raise InputError(f"{path}: line {number} is not JSON") from None
        if row is None:
            continue
        if not (isinstance(row, dict) and isinstance(row.get("stage"), str) and _count(row.get("step"))):
            raise InputError(f"{path}: line {number} needs a 'stage' and a 'step'")
        steps[row["stage"], row["step"]] = row
    return [steps[key] for key in sorted(steps)]


def load_run(path: Path) -> Run:
    """Read one run folder; InputError says in one line what is wrong with it."""
    path = Path(path)
    source = path / "results.json"
    results = _object(source)
    for name in ("environment", "config"):
        if not isinstance(results.get(name, {}), dict):
            raise InputError(f"{source}: {name} must be an object")
    for section in SCHEMA:
        results[section] = _check_rows(source, section, results.get(section, []))
    if not results["long_qa"]:
        raise InputError(f"{source}: long_qa is empty: nothing was evaluated")
    return Run(path, results.get("environment", {}), results.get("config") or _object(path / "config.json"),
               results, _read_metrics(path / "metrics.jsonl"))


def _check_pool(runs: Sequence[Run]) -> None:
    """Runs are pooled only if they differ in their seed alone and no measurement occurs twice."""
    first = runs[0]
    for run in runs[1:]:
        for key in sorted((first.config.keys() | run.config.keys()) - UNSHARED):
            if first.config.get(key) != run.config.get(key):
                raise InputError(f"{run.path} can't be pooled with {first.path}: its {key} is "
                                 f"{run.config.get(key)!r}, not {first.config.get(key)!r}")
    for section in ("long_qa", "recall", "masked"):
        seen: dict = {}
        for run in runs:
            for row in run.results[section]:
                system, seed = row["system"], row["seed"]
                key = system, seed, row.get("length", row.get("sections"))
                if key in seen:
                    raise InputError(f"{run.path}: {section} of {system}, seed {seed} is already in "
                                     f"{seen[key]}; pool runs of different seeds")
                seen[key] = run.path


# ------------------------------------------------------------------------------------------------ comparing

Estimate = tuple[float, float, float]  # mean, low, high: shares in [0, 1]


def points(share: float, rounding: Callable = round) -> float:
    """A share as percentage points with one decimal; the inner round absorbs binary noise."""
    return rounding(round(1000 * share, 6)) / 10


def interval(mean: float, low: float, high: float) -> str:
    """Rounded outwards: a printed interval is never narrower than the computed one."""
    return f"{points(mean):.1f} [{points(low, math.floor):.1f}, {points(high, math.ceil):.1f}]"


def measured(by_seed: Sequence[Estimate]) -> str:
    """One seed with its interval, several as their mean and range."""
    if len(by_seed) < 2:
        return interval(*by_seed[0]) if by_seed else "not run"
    means = [mean for mean, _, _ in by_seed]
    return f"{points(float(np.mean(means))):.1f} ({points(min(means)):.1f}–{points(max(means)):.1f})"


@dataclass(frozen=True)
class Difference:
    """Ours - theirs in percentage points, 95% interval rounded outwards; or the reason why there is none."""

    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    by_seed: tuple[float, ...] = ()
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.reason:
            return f"not tested: {self.reason}"
        if self.low > 0:
            return REPRODUCED
        why = "the difference is negative" if self.high < 0 else "the interval includes zero"
        return f"not reproduced: {why}"

    def __str__(self) -> str:
        if self.reason:
            return "—"
        seeds = f"; by seed {', '.join(f'{x:+.1f}' for x in self.by_seed)}" if len(self.by_seed) > 1 else ""
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]{seeds}"


class Table:
    """The long-text results: cells[system, length][seed] = row."""

    def __init__(self, rows: Sequence[dict]):
        self.cells: dict[tuple[str, float], dict[int, dict]] = {}
        for row in rows:
            self.cells.setdefault((row["system"], row["length"]), {})[row["seed"]] = row
        self.lengths = sorted({length for _, length in self.cells})
        self.seeds = sorted({row["seed"] for row in rows})

    def seeds_of(self, systems: Sequence[str], lengths: Sequence[float]) -> list[int]:
        """Seeds with which every one of these cells was measured."""
        cells = [self.cells.get((system, n), {}) for system in systems for n in lengths]
        return [seed for seed in self.seeds if all(seed in cell for cell in cells)]

    def rows(self, system: str) -> list[dict]:
        return [row for (name, _), cell in self.cells.items() if name == system for row in cell.values()]

    def shared(self, a: str, b: str) -> list[float]:
        """Lengths at which both were measured; all lengths if there is none, to give a reason for."""
        return [n for n in self.lengths if (a, n) in self.cells and (b, n) in self.cells] or self.lengths

    def correct(self, system: str, lengths: Sequence[float], seeds: Sequence[int]) -> np.ndarray | None:
        """(seeds, lengths, questions) of 0/1; None if the number of questions is not the same everywhere."""
        bits = [[self.cells[system, n][s]["correct"] for n in lengths] for s in seeds]
        return np.array(bits, float) if len({len(cell) for row in bits for cell in row}) == 1 else None

    def accuracy(self, system: str, lengths: Sequence[float], seeds: Sequence[int]) -> Estimate:
        """Mean over these lengths and seeds with its 95% interval."""
        rows = [self.cells[system, n][s] for n in lengths for s in seeds]
        if len(rows) == 1:
            return rows[0]["em"], rows[0]["em_low"], rows[0]["em_high"]
        mean, total = float(np.mean([row["em"] for row in rows])), sum(row["n"] for row in rows)
        # A bootstrap of nothing but zeros has no width: never claim less doubt than Wilson's interval does.
        low, high = wilson_interval(min(mean * total, total), total)
        bits = self.correct(system, lengths, seeds)
        if bits is not None:
            _, boot_low, boot_high = bootstrap_difference(bits.mean(1), np.zeros_like(bits[:, 0]))
            low, high = min(low, boot_low), max(high, boot_high)
        return mean, low, high

    def compare(self, a: str, b: str, lengths: Sequence[float], drop: bool = False) -> Difference:
        """a - b: of the mean over these lengths, or (drop) of the change from the first to the last."""
        missing = [s for s in (a, b) if not any(self.cells.get((s, n)) for n in lengths)]
        seeds = self.seeds_of([a, b], lengths)
        if missing:
            return Difference(reason=f"{' and '.join(missing)} not run")
        if not seeds:
            return Difference(reason="no seed has all of it")
        x, y = self.correct(a, lengths, seeds), self.correct(b, lengths, seeds)
        if x is None or y is None or x.shape != y.shape:
            return Difference(reason="not the same questions everywhere")
        if x.shape[2] < MIN_QUESTIONS:
            return Difference(reason=f"too few questions ({x.shape[2]}, needed: {MIN_QUESTIONS})")
        x, y = (z[:, -1] - z[:, 0] if drop else z.mean(1) for z in (x, y))  # (seeds, questions)
        mean, low, high = bootstrap_difference(x, y)
        by_seed = tuple(points(float(d)) for d in (x - y).mean(1))
        return Difference(points(mean), points(low, math.floor), points(high, math.ceil),
                          points(float(x.mean())), points(float(y.mean())), by_seed)


def paper_gap(a: str, b: str, length: float | None = None) -> str:
    """The paper's a - b in points, per backbone: on average, or at the length that ours stands beside."""
    if length is not None and length not in PAPER_LENGTHS:
        return "—"
    at = slice(None) if length is None else list(PAPER_LENGTHS).index(length)
    return ", ".join(f"{np.mean(rows[a][at]) - np.mean(rows[b][at]):+.1f} ({model})"
                     for model, rows in PAPER_TABLE1.items())


def verdicts(table: Table) -> tuple[list[list[str]], list[list[str]]]:
    """(summary, by length), rows of: claim, the paper's figure, ours in points, verdict."""
    summary, detail = [], []
    both, agent = "memtrain+memagent", "memagent"
    for claim, a, b, paper_b in [("C1 MemTrain over base", "memtrain", "base", "base-one-window"),
                                 ("C2 MemTrain+MemAgent over MemAgent", both, agent, agent)]:
        lengths = table.shared(a, b)
        average = table.compare(a, b, lengths)
        each = {n: table.compare(a, b, [n]) for n in lengths}
        tested = [n for n, d in each.items() if not d.reason]
        lost = [f"{n:g}x" for n in tested if each[n].low <= 0]
        wins = ", ".join(f"{sum(map(float.__gt__, rows[a], rows[paper_b]))} of {len(rows[a])} ({model})"
                         for model, rows in PAPER_TABLE1.items())
        ours, verdict = f"interval above zero at {len(tested) - len(lost)} of {len(tested)}", REPRODUCED
        if lost:
            verdict = f"not reproduced: not above zero at {', '.join(lost)}"
        elif not tested:
            ours, verdict = "—", average.verdict
        summary += [[f"{claim}, average", paper_gap(a, paper_b), str(average), average.verdict],
                    [f"{claim}, at every length", f"higher at {wins}", ours, verdict]]
        detail += [[f"{claim}, {n:g}x", paper_gap(a, paper_b, n), str(d), d.verdict] for n, d in each.items()]

    a, b = "memtrain", "base-one-window"
    window = table.compare(a, b, table.shared(a, b))
    summary.insert(2, ["C1 MemTrain over base in one window, average",
                       paper_gap(a, b), str(window), window.verdict])

    ends = [table.shared(both, agent)[i] for i in (0, -1)]
    fall = table.compare(both, agent, ends, drop=True)
    if not fall.reason and ends[0] == ends[1]:
        fall = Difference(reason="a single length was run")
    paper = ", ".join(f"{x[-1] - x[0]:+.1f} against {y[-1] - y[0]:+.1f} ({model})" for model, x, y in
                      ((model, rows[both], rows[agent]) for model, rows in PAPER_TABLE1.items()))
    ours = f"{ends[0]:g}x to {ends[1]:g}x: {fall.ours:+.1f} against {fall.theirs:+.1f}; difference {fall}"
    summary.append(["C3 MemTrain+MemAgent loses less with length than MemAgent",
                    f"7k to 896k: {paper}; as the paper says, 28k to 896k: -8.6 against -21.1 (Qwen2.5-7B)",
                    "—" if fall.reason else ours, fall.verdict])
    summary += [[claim, figure, "—", "not tested here"] for claim, figure in UNTESTED.items()]
    return summary, detail


# ------------------------------------------------------------------------------------------------ tables

def md(value) -> str:
    """Text from outside as one markdown table cell: markup escaped, line breaks turned into spaces, and what could
    steer a terminal spelled out."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", printable(" ".join(str(value).split())))


def table1(table: Table) -> list[list[str]]:
    rows = []
    for system, (name, *_) in SYSTEMS.items():
        by_length = [measured([table.accuracy(system, [n], [s]) for s in table.seeds_of([system], [n])])
                     for n in table.lengths]
        whole = table.seeds_of([system], table.lengths)
        average = measured([table.accuracy(system, table.lengths, [s]) for s in whole]) if whole else "—"
        rows.append([name, *by_length, average])
    return rows


def per_system(rows: Sequence[dict], value: str, low: str, high: str) -> list[list[str]]:
    """recall and masked: one line per system and number of sections."""
    groups: dict = {}
    for row in rows:
        groups.setdefault((list(SYSTEMS).index(row["system"]), row.get("sections") or 0), []).append(row)
    return [[SYSTEMS[own[0]["system"]][0], f"{sections:g}" if sections else "—",
             measured([(row[value], row[low], row[high]) for row in own]), f"{own[0]['n']:g}"]
            for (_, sections), own in sorted(groups.items(), key=lambda item: item[0])]


def by_kind(table: Table) -> list[list[str]]:
    """Accuracy per kind of question over all lengths and seeds: every length asks the same questions."""
    sums: dict = {}
    for system in SYSTEMS:
        for row in table.rows(system):
            for kind, pair in (row.get("kinds") or {}).items():
                sums[kind, system] = sums.get((kind, system), np.zeros(2)) + pair
    return [[md(kind), *(f"{points(right / asked):.1f} ({asked:.0f})" if asked else "—"
                         for right, asked in (sums.get((kind, s), (0, 0)) for s in SYSTEMS))]
            for kind in sorted({kind for kind, _ in sums})]


def aside(table: Table) -> list[list[str]]:
    """The lenient metrics and how the systems read: means over lengths and seeds."""
    shown = {"em": 100, "f1": 100, "sub_em": 100, "finished": 100, "memory_tokens": 1}
    lines = []
    for system, (name, *_) in SYSTEMS.items():
        values = {f: [row[f] for row in table.rows(system) if row.get(f) is not None] for f in shown}
        if table.rows(system):
            lines.append([name, *(f"{scale * np.mean(values[f]):.1f}" if values[f] else "—"
                                  for f, scale in shown.items())])
    return lines


def stages(runs: Sequence[Run]) -> list[list[str]]:
    fields = {"seed": "{:g}", "steps": "{:,.0f}", "seconds": "{:,.0f}", "tokens_sampled": "{:,.0f}",
              "tokens_trained": "{:,.0f}", "reward_first": "{:.3f}", "reward_last": "{:.3f}"}
    return [[md(row["name"]), *("—" if row.get(f) is None else show.format(row[f])
                                for f, show in fields.items())]
            for run in runs for row in run.results["stages"]]


def warnings(table: Table, runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    config = runs[0].config
    if config.get("preset") == "nano" and config.get("corpus", "miniworld") != "miniworld":
        found.append("A model this small learns little from real text: these figures show that the code path "
                     "runs, not the method.")
    for system, (name, *_) in SYSTEMS.items():
        shares = [row["em"] for row in table.rows(system)]
        if shares and max(shares) <= 0.03:
            found.append(f"{name} is at chance: 3% or less at every length. Comparisons with it say little.")
        if shares and min(shares) >= 0.97:
            found.append(f"{name} is saturated: 97% or more at every length. Comparisons with it say little.")
    if len(table.seeds) == 1:
        found.append("One seed: the intervals cover the choice of questions, not how another training would "
                     "differ.")
    if len({run.environment.get("commit") for run in runs}) > 1:
        found.append("The pooled runs come from different commits.")
    return found


# ------------------------------------------------------------------------------------------------ plots

INK = "#7b7b7b"  # mid-grey on a transparent ground: legible on a white page and on a dark one
STYLE = {
    "font.size": 9.5, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlecolor": INK, "axes.titlesize": 10.5, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": INK, "grid.alpha": 0.2, "grid.linewidth": 0.6, "lines.linewidth": 1.9,
    "lines.markersize": 4.5, "savefig.transparent": True, "savefig.dpi": 160,
    "svg.hashsalt": "memtrain",  # same run, same bytes
}


def _name_lines(axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names at the right ends of the lines, pushed apart where lines end close together."""
    ranked = sorted(ends.items(), key=lambda item: item[1][1])
    gap, heights = 5.5, []  # in points of accuracy
    for _, (_, y) in ranked:
        heights.append(max(y, heights[-1] + gap if heights else 0))
    for back in range(1, len(heights) + 1):  # from the top down: nothing above 100
        heights[-back] = min(heights[-back], 100 - gap * (back - 1))
    for (system, (x, _)), height in zip(ranked, heights, strict=True):
        name, colour, *_ = SYSTEMS[system]
        axes.annotate(name, (x, height), xytext=(8, 0), textcoords="offset points", va="center",
                      color=colour, annotation_clip=False)


def plot_table1(table: Table, stem: Path) -> None:
    """Accuracy by length, beside the paper's Qwen3-4B; one scale, one set of colours."""
    curves = {}  # system: (lengths, (L, 3) of mean, low, high)
    for system in SYSTEMS:
        lengths = [n for n in table.lengths if table.seeds_of([system], [n])]
        if lengths:
            values = [table.accuracy(system, [n], table.seeds_of([system], [n])) for n in lengths]
            curves[system] = lengths, 100 * np.array(values)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 4.0), layout="constrained")
        ours, paper = figure.subplots(1, 2, sharey=True)
        theirs = {s: (list(PAPER_LENGTHS), np.array(v)[:, None]) for s, v in PAPER_TABLE1["Qwen3-4B"].items()}
        for axes, lines in ((ours, curves), (paper, theirs)):
            for system, (lengths, values) in lines.items():
                _, colour, dash, marker = SYSTEMS[system]
                axes.plot(lengths, values[:, 0], color=colour, linestyle=dash, marker=marker, clip_on=False)
                if values.shape[1] == 3:
                    axes.fill_between(lengths, *values[:, 1:].T, color=colour, alpha=0.15, linewidth=0)
            _name_lines(axes, {s: (lengths[-1], float(v[-1, 0])) for s, (lengths, v) in lines.items()})
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        ours.set(title="This run, 95% intervals", xlabel="document length", ylabel="accuracy, %")
        ours.set_ylim(0, 100)
        ours.set_xticks(table.lengths, [f"{n:g}x" for n in table.lengths])
        paper.set(title="The paper, Qwen3-4B (Table 1)", xlabel="document length, tokens")
        paper.set_xticks(list(PAPER_LENGTHS), list(PAPER_LENGTHS.values()))
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(stem.with_suffix(".png"))


def plot_training(runs: Sequence[Run], path: Path) -> bool:
    """Reward, recall and memory length by step; False where no step logged any of them."""
    panels = {"reward": "Reward", "recall": "Recall of [TARGET]", "memory_tokens": "Memory, tokens"}
    series: dict = {field: [] for field in panels}  # of (stage, steps, values), one per stage and run
    for run, field in itertools.product(runs, panels):
        for stage, rows in itertools.groupby(run.metrics, key=lambda row: row["stage"]):
            pairs = [(row["step"], row[field]) for row in rows if _number(row.get(field))]
            if pairs:
                series[field].append((stage, *np.array(pairs, float).T))
    shown = [field for field in panels if series[field]]
    path.unlink(missing_ok=True)  # no picture of an earlier run beside this report
    if not shown:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.8 * len(shown), 3.0), layout="constrained")
        for axes, field in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for stage, steps, values in series[field]:
                colour, width = STAGE_COLOURS.get(stage, INK), max(1, len(values) // 12)
                window = np.ones(width)
                inside = np.convolve(np.ones(len(values)), window, "same")  # fewer steps at the ends
                if len(runs) == 1:
                    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                axes.plot(steps, np.convolve(values, window, "same") / inside, color=colour,
                          linewidth=1.9 if len(runs) == 1 else 1.2, marker="" if len(values) > 1 else "o")
            axes.set(title=panels[field], xlabel="step", ylim=(0, None))
        logged = [stage for field in shown for stage, *_ in series[field]]
        names = [s for s in dict.fromkeys([*STAGE_COLOURS, *logged]) if s in logged]
        lines = [matplotlib.lines.Line2D([], [], color=STAGE_COLOURS.get(s, INK), label=s) for s in names]
        figure.legend(handles=lines, loc="outside upper center", ncols=len(names), frameon=False)
        figure.savefig(path)
    return True


# ------------------------------------------------------------------------------------------------ report

def write_report(run_dir: Path, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write report.md and its plots for a run, or for several of different seeds; returns report.md."""
    if out:
        output(Path(out))
    runs = [load_run(path) for path in (run_dir, *others)]
    _check_pool(runs)
    rows = {section: [row for run in runs for row in run.results[section]] for section in SCHEMA}
    table, config, out = Table(rows["long_qa"]), runs[0].config, Path(out or run_dir)
    keys = dict.fromkeys(key for run in runs for key in run.environment if key != "command")
    size = {field: [max(row.get(field) or 0 for row in rows["long_qa"] if row["length"] == length)
                    for length in table.lengths] for field in ("sections", "tokens")}
    summary, detail = verdicts(table)
    content = {
        "names": [md(run.path.resolve().name) for run in runs],
        "commands": [printable(" ".join(str(run.environment.get("command", "not recorded")).split())) for run in runs],
        "environment": [[md(key), *(md(run.environment.get(key, "—")) for run in runs)] for key in keys],
        "preset": md(config.get("preset", "unknown")), "corpus": md(config.get("corpus", "unknown")),
        "seeds": table.seeds, "asked": sorted({f"{row['n']:g}" for row in rows["long_qa"]}),
        "lengths": [f"{n:g}x" for n in table.lengths], "size": size, "systems": SYSTEMS,
        "table1": table1(table), "paper": PAPER_TABLE1, "paper_lengths": list(PAPER_LENGTHS.values()),
        "summary": summary, "detail": detail, "aside": aside(table), "kinds": by_kind(table),
        "recall": per_system(rows["recall"], "accuracy", "low", "high"),
        "masked": per_system(rows["masked"], "em", "em_low", "em_high"),
        "stages": stages(runs), "warnings": warnings(table, runs),
        "notes": [md(run.results["claims_note"]) for run in runs if run.results.get("claims_note")],
    }
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = template.from_string(Path(__file__).with_name("report.md.j2").read_text(encoding="utf-8"))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        plot_table1(table, out / "table1")
        curves = plot_training(runs, out / "training.png")
    with replacing(out / "report.md") as temporary:
        temporary.write_text(template.render(**content, curves=curves), encoding="utf-8")
    return out / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(
        "Write the report of a run from its JSON; several runs that differ in their seed are pooled."))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder with a results.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the first RUN)")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs[0], arguments.runs[1:], arguments.out))
    except InputError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
