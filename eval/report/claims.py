"""Comparing what was measured: arms of runs, paired differences with intervals, and a verdict on each claim C1-C8.

A verdict is read off the 95% interval of a paired difference, after rounding the interval outwards: it is "reproduced"
only where the whole interval lies above zero, "not reproduced" where it doesn't, and "not tested" with the reason
where no such difference was measured.

    runs -> arms (runs that differ in their seed alone) -> Table[system, column][seed] -> Difference -> Claim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.config import arm_of
from data.text.benchmarks import SPLITS
from eval.metrics import bootstrap_mean, wilson_interval
from eval.report.paper import (
    PAPER_ABLATIONS,
    PAPER_DECOUPLED,
    PAPER_LENGTHS,
    PAPER_SCALING,
    PAPER_TABLE1,
    PAPER_TABLE2,
    gap,
    wins,
)
from eval.report.results import Run, refuse_repeats

MIN_QUESTIONS = 30  # below this a bootstrap interval means little: with one question it has no width at all
REPRODUCED = "reproduced"
FULL = "full"
# Fields that decide which questions are asked: arms that differ in one of them can't be compared pair by pair.
ASKED = {"corpus", "people", "questions", "eval_questions", "section", "benchmarks", "eval_pairs", "entities"}

Estimate = tuple[float, float, float]  # mean, low, high: shares in [0, 1]

# ------------------------------------------------------------------------------------------------ figures in print


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


@dataclass(frozen=True)
class Claim:
    """One line of the table of claims; `difference` is None where there is no single one to draw."""

    claim: str
    paper: str
    ours: str
    verdict: str
    difference: Difference | None = None

    @property
    def id(self) -> str:
        return self.claim[:2]


# ------------------------------------------------------------------------------------------------ tables


class Table:
    """Rows of one section as cells[system, column][seed] = row. A column is a length, or a benchmark (by="benchmark").

    unit: how many entries of `correct` belong together, 2 for the two questions that were answered at once.
    """

    def __init__(self, rows: Sequence[dict], by: str = "length", unit: int = 1):
        self.by, self.unit = by, unit
        self.cells: dict[tuple, dict[int, dict]] = {}
        for row in rows:
            self.cells.setdefault((row["system"], row[by]), {})[row["seed"]] = row
        found = dict.fromkeys(row[by] for row in rows)
        order = list(SPLITS)  # the paper's
        self.columns = sorted(found, key=None if by == "length" else lambda n: (order.index(n) if n in order else 7))
        self.seeds = sorted({row["seed"] for row in rows})
        self.known: dict[tuple, Estimate] = {}  # accuracies: tables and plots ask for the same ones

    @property
    def lengths(self) -> list:
        return self.columns

    def seeds_of(self, systems: Sequence[str], columns: Sequence) -> list[int]:
        """Seeds with which every one of these cells was measured."""
        cells = [self.cells.get((system, n), {}) for system in systems for n in columns]
        return [seed for seed in self.seeds if all(seed in cell for cell in cells)]

    def rows(self, system: str) -> list[dict]:
        return [row for (name, _), cell in self.cells.items() if name == system for row in cell.values()]

    def has(self, system: str) -> bool:
        return any(name == system for name, _ in self.cells)

    def correct(self, system: str, column, seeds: Sequence[int]) -> np.ndarray | None:
        """(seeds, units) of the share of right answers of each unit; None where the seeds differ in their number."""
        bits = [self.cells[system, column][s]["correct"] for s in seeds]
        if len({len(row) for row in bits}) != 1:
            return None
        return np.array(bits, float).reshape(len(seeds), -1, self.unit).mean(2)

    def parts(self, system: str, columns: Sequence, seeds: Sequence[int]) -> list[np.ndarray] | None:
        """What is resampled independently: the questions, averaged over lengths (every length asks the same), or each
        benchmark's pairs. None where the number of questions is not the same everywhere."""
        found = [self.correct(system, n, seeds) for n in columns]
        if any(x is None for x in found):
            return None
        if self.by == "benchmark":
            return found
        return [np.mean(found, axis=0)] if len({x.shape for x in found}) == 1 else None

    def accuracy(self, system: str, columns: Sequence, seeds: Sequence[int]) -> Estimate:
        """Mean over these columns and seeds with its 95% interval."""
        key = system, tuple(columns), tuple(seeds)
        if key not in self.known:
            self.known[key] = self._accuracy(system, columns, seeds)
        return self.known[key]

    def _accuracy(self, system: str, columns: Sequence, seeds: Sequence[int]) -> Estimate:
        rows = [self.cells[system, n][s] for n in columns for s in seeds]
        if len(rows) == 1:
            return rows[0]["em"], rows[0]["em_low"], rows[0]["em_high"]
        mean, total = float(np.mean([row["em"] for row in rows])), sum(row["n"] for row in rows)
        # A bootstrap of nothing but zeros has no width: never claim less doubt than Wilson's interval does.
        low, high = wilson_interval(min(mean * total, total), total)
        if parts := self.parts(system, columns, seeds):
            _, boot_low, boot_high = bootstrap_mean(parts)
            low, high = min(low, boot_low), max(high, boot_high)
        return mean, low, high

    def by_seed(self, system: str, columns: Sequence) -> list[Estimate]:
        return [self.accuracy(system, columns, [s]) for s in self.seeds_of([system], columns)]

    def shared(self, a: str, b: str) -> list:
        """Columns in which both were measured; all of them if there is none, to give a reason for."""
        return shared(self, a, self, b)

    def compare(self, a: str, b: str, columns: Sequence, drop: bool = False) -> Difference:
        return compare(self, a, self, b, columns, drop)


def shared(one: Table, a: str, other: Table, b: str) -> list:
    """Columns in which system a of one table and system b of another were measured; all of `one` if there is none."""
    return [n for n in one.columns if (a, n) in one.cells and (b, n) in other.cells] or one.columns


def compare(one: Table, a: str, other: Table, b: str, columns: Sequence, drop: bool = False) -> Difference:
    """System a of one table minus system b of another, paired by seed and question: of the mean over these columns,
    or (drop) of the change from the first to the last. The two questions of a pair are resampled together."""
    missing = [s for t, s in ((one, a), (other, b)) if not any(t.cells.get((s, n)) for n in columns)]
    if missing:
        return Difference(reason=f"{' and '.join(dict.fromkeys(missing))} not run")
    theirs = other.seeds_of([b], columns)
    seeds = [s for s in one.seeds_of([a], columns) if s in theirs]
    if not seeds:
        return Difference(reason="no seed has all of it")
    if drop:
        ends = [(one.correct(a, n, seeds), other.correct(b, n, seeds)) for n in (columns[0], columns[-1])]
        same = all(x is not None and y is not None and x.shape == y.shape == ends[0][0].shape for x, y in ends)
        x, y = ([ends[1][i] - ends[0][i]] if same else None for i in (0, 1))
    else:
        x, y = one.parts(a, columns, seeds), other.parts(b, columns, seeds)
    if not x or not y or [p.shape for p in x] != [p.shape for p in y]:
        return Difference(reason="not the same questions everywhere")
    asked = sum(p.shape[1] for p in x)
    if asked < MIN_QUESTIONS:
        what = "questions" if one.unit == 1 else "pairs of questions"
        return Difference(reason=f"too few {what} ({asked}, needed: {MIN_QUESTIONS})")
    mean, low, high = bootstrap_mean([p - q for p, q in zip(x, y, strict=True)])
    by_seed = np.mean([(p - q).mean(1) for p, q in zip(x, y, strict=True)], axis=0)
    ours, their = (float(np.mean([p.mean() for p in side])) for side in (x, y))
    return Difference(points(mean), points(low, math.floor), points(high, math.ceil), points(ours), points(their),
                      tuple(points(float(d)) for d in by_seed))


# ------------------------------------------------------------------------------------------------ arms


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]
    changed: dict = field(default_factory=dict)  # field: value, where this arm differs from the full one

    def rows(self, section: str) -> list[dict]:
        return [row for run in self.runs for row in run.results[section]]

    @cached_property
    def table(self) -> Table:
        return Table(self.rows("long_qa"))

    @cached_property
    def search(self) -> Table:
        return Table(self.rows("search_qa"), "benchmark", 2)


def group(runs: Sequence[Run]) -> list[Arm]:
    """Runs -> arms, that of the first run in front and named "full". InputError where one measurement occurs twice."""
    groups: list[list[Run]] = []
    for run in runs:
        own = next((g for g in groups if g[0].setting == run.setting), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    full, arms = groups[0][0].setting, []
    for own in groups:
        refuse_repeats(own)
        setting = own[0].setting
        changed = {key: setting.get(key) for key in sorted(full.keys() | setting.keys())
                   if full.get(key) != setting.get(key)}
        arms.append(Arm(arm_of(full, setting), own, changed))
    return arms


def backbones(runs: Sequence[Run]) -> dict[str, list[Arm]]:
    """{backbone: its arms}, the first run's backbone in front. A backbone is a shape of the model, or its name."""
    groups: list[list[Run]] = []
    for run in runs:
        own = next((g for g in groups if g[0].shape == run.shape), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    named: dict[str, list[Arm]] = {}
    for own in groups:
        s = own[0].shape
        name = str(s.get("model") or f"width {s.get('width')}, {s.get('layers')} layers")
        named[name if name not in named else f"{name} ({own[0].path.name})"] = group(own)
    return named


def against(full: Arm, arm: Arm, a: str, b: str, columns: Sequence | None = None) -> Difference:
    """System a of the full arm minus system b of another, over the lengths that both have (or these)."""
    if different := sorted(ASKED & arm.changed.keys()):
        return Difference(reason=f"other questions: {', '.join(different)} differ")
    one, other = full.table, arm.table
    return compare(one, a, other, b, shared(one, a, other, b) if columns is None else columns)


# ------------------------------------------------------------------------------------------------ claims

BOTH, AGENT = "memtrain+memagent", "memagent"


def _everywhere(claim: str, paper: str, each: dict, average: Difference, name: Callable) -> Claim:
    """The claim that a difference lies above zero in every column."""
    tested = [n for n, d in each.items() if not d.reason]
    lost = [name(n) for n in tested if each[n].low <= 0]
    if not tested:
        return Claim(claim, paper, "—", next((d.verdict for d in each.values()), average.verdict))
    ours = f"interval above zero at {len(tested) - len(lost)} of {len(tested)}"
    verdict = f"not reproduced: not above zero at {', '.join(lost)}" if lost else REPRODUCED
    if not lost and len(tested) < len(each):
        verdict = f"not tested: at {', '.join(name(n) for n in each if n not in tested)}, {_reason(each)}"
    return Claim(claim, paper, ours, verdict)


def _reason(each: dict) -> str:
    return next(d.reason for d in each.values() if d.reason)


def _leads(table: Table, claim: str, a: str, b: str, paper_b: str) -> tuple[list[Claim], list[Claim]]:
    """A lead on average and at every length: (summary, by length)."""
    lengths = table.shared(a, b)
    average = table.compare(a, b, lengths)
    each = {n: table.compare(a, b, [n]) for n in lengths}
    column = {n: i for i, n in enumerate(PAPER_LENGTHS)}
    summary = [Claim(f"{claim}, average", gap(PAPER_TABLE1, a, paper_b), str(average), average.verdict, average),
               _everywhere(f"{claim}, at every length", wins(PAPER_TABLE1, a, paper_b), each, average, "{:g}x".format)]
    detail = [Claim(f"{claim}, {n:g}x", gap(PAPER_TABLE1, a, paper_b, column[n]) if n in column else "—", str(d),
                    d.verdict, d) for n, d in each.items()]
    return summary, detail


def _falls_less(table: Table) -> Claim:
    lengths = table.shared(BOTH, AGENT)
    fall = Difference(reason=f"{BOTH} and {AGENT} not run")
    if lengths:
        fall = table.compare(BOTH, AGENT, [lengths[0], lengths[-1]], drop=True)
        if not fall.reason and len(lengths) == 1:
            fall = Difference(reason="a single length was run")
    paper = ", ".join(f"{rows[BOTH][-1] - rows[BOTH][0]:+.1f} against {rows[AGENT][-1] - rows[AGENT][0]:+.1f} ({model})"
                      for model, rows in PAPER_TABLE1.items())
    ours = "—" if fall.reason else (f"{lengths[0]:g}x to {lengths[-1]:g}x: {fall.ours:+.1f} against "
                                    f"{fall.theirs:+.1f}; difference {fall}")
    return Claim("C3 MemTrain+MemAgent loses less with length than MemAgent",
                 f"7k to 896k: {paper}; as the paper says, 28k to 896k: -8.6 against -21.1 (Qwen2.5-7B)",
                 ours, fall.verdict, fall)


def on_long_text(table: Table) -> tuple[list[Claim], list[Claim]]:
    """C1-C3: (summary, by length)."""
    first, first_detail = _leads(table, "C1 MemTrain over base", "memtrain", "base", "base-one-window")
    second, second_detail = _leads(table, "C2 MemTrain+MemAgent over MemAgent", BOTH, AGENT, AGENT)
    a, b = "memtrain", "base-one-window"
    window = table.compare(a, b, table.shared(a, b))
    first.append(Claim("C1 MemTrain over base in one window, average", gap(PAPER_TABLE1, a, b), str(window),
                       window.verdict, window))
    return [*first, *second, _falls_less(table)], first_detail + second_detail


def _arm(arms: Sequence[Arm], name: str) -> Arm | None:
    return next((arm for arm in arms if arm.name == name), None)


def longer_memagent(arms: Sequence[Arm]) -> Arm | None:
    """The arm of Figure 4: MemAgent trained on alone; by its name, or because nothing else differs."""
    steps = arms[0].runs[0].setting["memagent_steps"]
    alone = [arm for arm in arms if arm.changed.keys() == {"memagent_steps"} and arm.changed["memagent_steps"] > steps]
    return _arm(arms, "longer-memagent") or next(iter(alone), None)


def on_arms(arms: Sequence[Arm]) -> list[Claim]:
    """C4-C6: the full method against arms of it."""
    full = arms[0]
    without, decoupled, longer = _arm(arms, "end-to-end"), _arm(arms, "decoupled"), longer_memagent(arms)
    missing = "no run of the arm {}"
    d = against(full, without, BOTH, BOTH) if without else Difference(reason=missing.format("end-to-end"))
    ablated, whole = PAPER_ABLATIONS["end-to-end"], PAPER_ABLATIONS["full"]
    claims = [Claim("C4 leaving out IMR is worse: full over End-to-End, average",
                    f"{whole - ablated:+.1f}: {whole:.1f} with, {ablated:.1f} without (Figure 3, Qwen3-4B, average)",
                    str(d), d.verdict, d)]
    d, ours = Difference(reason=missing.format("decoupled")), "—"
    if decoupled:
        lengths = shared(full.table, BOTH, decoupled.table, BOTH)
        far = len(lengths) // 2
        short, long = lengths[:len(lengths) - far], lengths[len(lengths) - far:]
        d = against(full, decoupled, BOTH, BOTH, long) if long else Difference(reason="a single length was run")
        if not d.reason:
            near = against(full, decoupled, BOTH, BOTH, short)
            ours = f"{_span(long)}: {d}; at the shorter lengths, {_span(short)}: {near}"
    claims.append(Claim("C5 decoupled rewards are worse on long documents: full over Decoupled, longer half of lengths",
                        PAPER_DECOUPLED, ours, d.verdict, d))
    d = against(full, longer, BOTH, AGENT) if longer else Difference(reason=missing.format("longer-memagent"))
    steps = f"MemAgent with {longer.changed['memagent_steps']} steps" if longer else "MemAgent with 60% more steps"
    claims.append(Claim(f"C6 more post-training does not replace MemTrain: MemTrain+MemAgent over {steps}, average",
                        f"+{PAPER_SCALING:.1f} (Figure 4, the best of 500 to 800 steps)", str(d), d.verdict, d))
    return claims


def _span(lengths: Sequence[float]) -> str:
    return f"{lengths[0]:g}x" if len(lengths) == 1 else f"{lengths[0]:g}x to {lengths[-1]:g}x"


def on_search(table: Table) -> tuple[list[Claim], list[Claim]]:
    """C7: (summary, by benchmark)."""
    a, b = "memtrain+mem1", "mem1"
    claim = "C7 MemTrain+MEM1 over MEM1 at search"
    if not table.columns:
        d = Difference(reason="search QA not run")
        return [Claim(f"{claim}, average", gap(PAPER_TABLE2, a, b), "—", d.verdict, d),
                Claim(f"{claim}, on every benchmark", wins(PAPER_TABLE2, a, b), "—", d.verdict)], []
    names = table.shared(a, b)
    average = table.compare(a, b, names)
    each = {n: table.compare(a, b, [n]) for n in names}
    return [Claim(f"{claim}, average", gap(PAPER_TABLE2, a, b), str(average), average.verdict, average),
            _everywhere(f"{claim}, on every benchmark", wins(PAPER_TABLE2, a, b), each, average, str)
            ], [Claim(f"{claim}, {n}", "—", str(d), d.verdict, d) for n, d in each.items()]


def on_backbones(named: dict[str, list[Arm]]) -> Claim:
    """C8: whether C1 and C2 hold, on average, for every backbone."""
    claim, paper = "C8 it holds for more than one backbone", "C1 and C2 for Qwen3-4B and Qwen2.5-7B"
    if len(named) < 2:
        return Claim(claim, paper, "—", "not tested: runs of one backbone only")
    said, failed, missing = [], [], []
    for name, arms in named.items():
        found = {c.id: c for c in on_long_text(arms[0].table)[0] if c.claim.endswith((
            "C1 MemTrain over base, average", "C2 MemTrain+MemAgent over MemAgent, average"))}
        if lost := [key for key, c in found.items() if c.verdict.startswith("not reproduced")]:
            failed.append(f"{' and '.join(lost)} for {name}")
        missing += [c.verdict for c in found.values() if c.verdict.startswith("not tested")]
        said.append(f"{name}: " + ", ".join(f"{key} {c.difference} {c.verdict.split(':')[0]}"
                                            for key, c in found.items()))
    worst = f"not reproduced: {'; '.join(failed)}" if failed else next(iter(missing), REPRODUCED)
    return Claim(claim, paper, "; ".join(said), worst)


def verdicts(named: dict[str, list[Arm]]) -> tuple[list[Claim], list[Claim]]:
    """(C1-C8, the same by length and by benchmark)."""
    arms = next(iter(named.values()))
    summary, detail = on_long_text(arms[0].table)
    search, by_benchmark = on_search(arms[0].search)
    return [*summary, *on_arms(arms), *search, on_backbones(named)], detail + by_benchmark
