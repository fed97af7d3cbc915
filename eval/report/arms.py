"""Runs grouped into arms, their rows as tables of cells, and paired differences between two cells, with intervals.

    runs -> arms (runs that differ in their seed alone) -> Table[system, column][seed] -> Difference
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data import InputError
from data.config import arm_of
from data.text.benchmarks import SPLITS
from eval.metrics import bootstrap_mean, wilson_interval
from eval.report.results import Run, refuse_repeats

MIN_QUESTIONS = 30  # below this a bootstrap interval means little: with one question it has no width at all
FULL, BOTH, AGENT = "full", "memtrain+memagent", "memagent"
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


def named(column) -> str:
    return column if isinstance(column, str) else f"{column:g}x"


def counted(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


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
    of_seeds: int = 0  # seeds of the full run: more than entered where one is missing
    columns: tuple = ()
    without: tuple = ()  # columns of the full run that one of the two lacks

    @property
    def seeds(self) -> str:
        n, of = len(self.by_seed), self.of_seeds
        return counted(n, "seed") if n >= of else f"{n} of {counted(of, 'seed')}"

    @property
    def entered(self) -> str:
        """Which seeds and columns it is made of, and what is missing."""
        if self.reason:
            return "—"
        missing = f"; without {', '.join(map(named, self.without))}" if self.without else ""
        return f"{self.seeds}; {', '.join(map(named, self.columns))}{missing}"

    def __str__(self) -> str:
        if self.reason:
            return "—"
        seeds = f"; by seed {', '.join(f'{x:+.1f}' for x in self.by_seed)}" if len(self.by_seed) > 1 else ""
        fewer = f"; {self.seeds}" if len(self.by_seed) < self.of_seeds else ""
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]{seeds}{fewer}"


# ------------------------------------------------------------------------------------------------ tables


class Table:
    """Rows of one section as cells[system, column][seed] = row. A column is a length, or a benchmark (by="benchmark").

    unit: how many entries of `correct` belong together, 2 for the two questions that were answered at once.
    seeds: those of the runs, where that is more than these rows show.
    """

    def __init__(self, rows: Sequence[dict], by: str = "length", unit: int = 1, seeds: Sequence[int] = ()):
        self.by, self.unit = by, unit
        self.cells: dict[tuple, dict[int, dict]] = {}
        for row in rows:
            self.cells.setdefault((row["system"], row[by]), {})[row["seed"]] = row
        found = dict.fromkeys(row[by] for row in rows)
        order = list(SPLITS)  # the paper's
        self.columns = sorted(found, key=None if by == "length" else lambda n: (order.index(n) if n in order else 7))
        self.seeds = sorted({*seeds, *(row["seed"] for row in rows)})
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
            low, high = max(0.0, min(low, boot_low)), min(1.0, max(high, boot_high))
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
                      tuple(points(float(d)) for d in by_seed), of_seeds=len(one.seeds), columns=tuple(columns),
                      without=tuple(n for n in one.columns if n not in shared(one, a, other, b)))


# ------------------------------------------------------------------------------------------------ arms


@dataclass(frozen=True, eq=False)  # itself alone is equal, so that what is made of an arm can be cached
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]
    changed: dict = field(default_factory=dict)  # field: value, where this arm differs from the full one

    def rows(self, section: str) -> list[dict]:
        return [row for run in self.runs for row in run.results[section]]

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for section in ("long_qa", "search_qa") for row in self.rows(section)})

    @cached_property
    def table(self) -> Table:
        return Table(self.rows("long_qa"), seeds=self.seeds)

    @cached_property
    def search(self) -> Table:
        return Table(self.rows("search_qa"), "benchmark", 2, self.seeds)


def _alike(runs: Sequence[Run], key: Callable[[Run], dict]) -> list[list[Run]]:
    """Runs of one key together, in the order of their first ones. A key may be a dict, which no dict can hold."""
    groups: list[list[Run]] = []
    for run in runs:
        own = next((g for g in groups if key(g[0]) == key(run)), None)
        if own is None:
            groups.append([run])
        else:
            own.append(run)
    return groups


def group(runs: Sequence[Run]) -> list[Arm]:
    """Runs -> arms, that of the first run in front and named "full". InputError where one measurement occurs twice, or
    where some were measured on the development world and others not."""
    if len({run.setting["world"] for run in runs}) > 1:
        raise InputError("runs of the development world and of the evaluation world; give those of one world")
    groups = _alike(runs, lambda run: run.setting)
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
    found: dict[str, list[Arm]] = {}
    for own in _alike(runs, lambda run: run.shape):
        s = own[0].shape
        name = str(s.get("model") or f"width {s.get('width')}, {s.get('layers')} layers")
        found[name if name not in found else f"{name} ({own[0].path.name})"] = group(own)
    return found


def against(full: Arm, arm: Arm, a: str, b: str, columns: Sequence | None = None) -> Difference:
    """System a of the full arm minus system b of another, over the lengths that both have (or these)."""
    if different := sorted(ASKED & arm.changed.keys()):
        return Difference(reason=f"other questions: {', '.join(different)} differ")
    one, other = full.table, arm.table
    return compare(one, a, other, b, shared(one, a, other, b) if columns is None else columns)
