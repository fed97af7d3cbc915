"""Comparing what was measured: arms of runs, paired differences with intervals, and the state of each claim C1-C8.

A claim is decided by one line, its average, and by one function, `state`: the pages and claims.json print what it
says. All other lines are detail: a difference and its interval, without a verdict.

    runs -> arms (runs that differ in their seed alone) -> Table[system, column][seed] -> Difference -> state -> Claim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.config import arm_of
from data.text.benchmarks import SPLITS
from eval.metrics import bootstrap_mean, wilson_interval
from eval.report.paper import (
    PAPER_ABLATIONS,
    PAPER_DECOUPLED,
    PAPER_FALL,
    PAPER_LENGTHS,
    PAPER_SCALING,
    PAPER_TABLE1,
    PAPER_TABLE2,
    WEAK_BASELINE,
    gap,
    lead,
    wins,
)
from eval.report.results import Run, refuse_repeats

MIN_QUESTIONS = 30  # below this a bootstrap interval means little: with one question it has no width at all
MIN_SEEDS = 3  # with fewer no claim is decided
MIN_RECALL = 0.15  # recall of the base: below it a reward for recall has nothing to choose from (C4, C5)
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
NOT_TESTABLE, NOT_TESTED = "not testable", "not tested"
RULE = (  # `state` in words
    f"Each claim is decided by one line, an average. Reproduced: at least {MIN_SEEDS} seeds, the whole 95% interval "
    "above zero, and no single length or benchmark whose whole interval lies below zero. Not reproduced: the whole "
    "interval below zero, or below half of the paper's effect (Qwen3-4B's where the paper gives two). Inconclusive: "
    "all else, and always with one or two seeds. Not testable: the claim is about recall, and the base recalls less "
    f"than {MIN_RECALL:.0%}. Not tested: there is no such run. C8 follows C1 and C2 of the other backbones.")
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


# ------------------------------------------------------------------------------------------------ the state of a claim


def state(d: Difference, each: Mapping | None = None, effect: float | None = None, untestable: str = "",
          undecided: str = "") -> str:
    """The state of a claim, with the reason behind a colon where it isn't "reproduced": RULE as code.

    d: its one line. each: {length or benchmark: Difference}. effect: the paper's, in points, where it gives a number.
    untestable, undecided: why these runs can't show it at all, or can't decide it whatever the interval is. An interval
    above zero and yet below half of the effect is "reproduced": the claim is that there is a lead.
    """
    if d.reason:
        return f"{NOT_TESTED}: {d.reason}"
    if untestable:
        return f"{NOT_TESTABLE}: {untestable}"
    if undecided:
        return f"{INCONCLUSIVE}: {undecided}"
    if len(d.by_seed) < MIN_SEEDS:
        return f"{INCONCLUSIVE}: {d.seeds}, needed: {MIN_SEEDS}"
    below = [named(n) for n, own in (each or {}).items() if not own.reason and own.high < 0]
    if d.low > 0 and not below:
        return REPRODUCED
    if d.high < 0:
        return f"{NOT_REPRODUCED}: the interval lies below zero"
    if effect is not None and d.high < effect / 2:
        return f"{NOT_REPRODUCED}: the interval lies below half of the paper's {effect:+.1f}"
    return f"{INCONCLUSIVE}: " + (f"the interval lies below zero at {', '.join(below)}" if d.low > 0 else
                                  "the interval includes zero")


@dataclass(frozen=True)
class Claim:
    """One line of the claims: the one that decides a claim has its state, a line of detail has none."""

    claim: str
    paper: str
    ours: str
    difference: Difference | None = None  # None where there is no single one to draw
    state: str = ""
    entered: str = ""  # seeds and columns of the line that decides
    note: str = ""  # what a reader has to know beside it

    @property
    def id(self) -> str:
        return self.claim[:2]

    @property
    def word(self) -> str:
        return self.state.partition(": ")[0]

    @property
    def why(self) -> str:
        return self.state.partition(": ")[2]


def deciding(claim: str, paper: str, d: Difference, said: str, ours: str = "", note: str = "") -> Claim:
    return Claim(claim, paper, ours or str(d), d, said, d.entered, note)


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


@dataclass(frozen=True)
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
    found: dict[str, list[Arm]] = {}
    for own in groups:
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


# ------------------------------------------------------------------------------------------------ claims

BOTH, AGENT = "memtrain+memagent", "memagent"


def _each(over: Callable[[list], Difference], columns: Sequence) -> tuple[Difference, dict]:
    """(the average over columns, {column: its own difference})."""
    return over(columns), {n: over([n]) for n in columns}


def _everywhere(claim: str, paper: str, each: dict) -> Claim:
    """In how many columns the difference lies above zero."""
    tested = [d for d in each.values() if not d.reason]
    ours = f"interval above zero at {sum(d.low > 0 for d in tested)} of {len(tested)}"
    return Claim(claim, paper, ours if tested else "—")


def _leads(table: Table, claim: str, a: str, b: str, paper_b: str, note: str = "") -> tuple[Claim, list[Claim]]:
    """A lead at long documents: (on average, the detail by length)."""
    average, each = _each(lambda columns: table.compare(a, b, columns), table.shared(a, b))
    column = {n: i for i, n in enumerate(PAPER_LENGTHS)}
    said = state(average, each, lead(PAPER_TABLE1, a, paper_b))
    detail = [Claim(f"{claim}, {n:g}x", gap(PAPER_TABLE1, a, paper_b, column[n]) if n in column else "—", str(d), d)
              for n, d in each.items()]
    return (deciding(f"{claim}, average", gap(PAPER_TABLE1, a, paper_b), average, said, note=note),
            [_everywhere(f"{claim}, at every length", wins(PAPER_TABLE1, a, paper_b), each), *detail])


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
    return deciding("C3 MemTrain+MemAgent loses less with length than MemAgent",
                    f"28k to 896k: {PAPER_FALL:+.1f}, -8.6 against -21.1 (Qwen2.5-7B, as the text says); "
                    f"7k to 896k: {paper}", fall, state(fall, effect=PAPER_FALL), ours)


def on_long_text(table: Table) -> tuple[list[Claim], list[Claim]]:
    """C1-C3: (the lines that decide, detail)."""
    first, first_detail = _leads(table, "C1 MemTrain over base", "memtrain", "base", "base-one-window")
    second, second_detail = _leads(table, "C2 MemTrain+MemAgent over MemAgent", BOTH, AGENT, AGENT, WEAK_BASELINE)
    a, b = "memtrain", "base-one-window"
    window = table.compare(a, b, table.shared(a, b))
    beside = Claim("C1 MemTrain over base in one window, average", gap(PAPER_TABLE1, a, b), str(window), window)
    return [first, second, _falls_less(table)], [beside, *first_detail, *second_detail]


def _arm(arms: Sequence[Arm], name: str) -> Arm | None:
    return next((arm for arm in arms if arm.name == name), None)


def longer_memagent(arms: Sequence[Arm]) -> Arm | None:
    """The arm of Figure 4: MemAgent trained on alone, nothing else differs; of several the longest."""
    def steps(arm: Arm) -> int:
        return arm.runs[0].setting["memagent_steps"]

    alone = [arm for arm in arms if arm.changed.keys() == {"memagent_steps"} and steps(arm) > steps(arms[0])]
    return max(alone, key=steps, default=None)


def recall_has_room(full: Arm) -> str:
    """Why C4 and C5 can't be tested from this base: it hardly recalls anything, or no one looked. "" if they can."""
    found = [row["accuracy"] for row in full.rows("recall") if row["system"] == "base"]
    if not found:
        return "recall of the base was not measured"
    if np.mean(found) < MIN_RECALL:
        return f"recall of the base is {points(float(np.mean(found)), math.floor):.1f}%, needed: {MIN_RECALL:.0%}"
    return ""


def on_arms(arms: Sequence[Arm]) -> list[Claim]:
    """C4-C6: the full method against arms of it."""
    return [_without_recall(arms), _decoupled(arms), _longer(arms)]


def _versus(full: Arm, arm: Arm | None, name: str, b: str = BOTH) -> tuple[Difference, dict]:
    """MemTrain+MemAgent of the full arm over system b of another: (average, by length)."""
    if arm is None:
        return Difference(reason=f"no run of the arm {name}"), {}
    return _each(lambda columns: against(full, arm, BOTH, b, columns), shared(full.table, BOTH, arm.table, b))


def _without_recall(arms: Sequence[Arm]) -> Claim:
    average, each = _versus(arms[0], _arm(arms, "end-to-end"), "end-to-end")
    ablated, whole = PAPER_ABLATIONS["end-to-end"], PAPER_ABLATIONS["full"]
    return deciding("C4 leaving out IMR is worse: full over End-to-End, average",
                    f"{whole - ablated:+.1f}: {whole:.1f} with, {ablated:.1f} without (Figure 3, Qwen3-4B, average)",
                    average, state(average, each, whole - ablated, recall_has_room(arms[0])))


def _decoupled(arms: Sequence[Arm]) -> Claim:
    full, decoupled, ours = arms[0], _arm(arms, "decoupled"), ""
    far, each = _versus(full, decoupled, "decoupled")
    if decoupled:
        lengths = list(each)
        short, long = lengths[:(len(lengths) + 1) // 2], lengths[(len(lengths) + 1) // 2:]
        far = against(full, decoupled, BOTH, BOTH, long) if long else Difference(reason="a single length was run")
        each = {n: each[n] for n in long}
        if not far.reason:
            near = against(full, decoupled, BOTH, BOTH, short)
            ours = f"{_span(long)}: {far}; at the shorter lengths, {_span(short)}: {near}"
    return deciding("C5 decoupled rewards are worse on long documents: full over Decoupled, longer half of lengths",
                    PAPER_DECOUPLED, far, state(far, each, untestable=recall_has_room(full)), ours)


def _longer(arms: Sequence[Arm]) -> Claim:
    """The paper equalises all steps; an arm with fewer than MemTrain and MemAgent together decides nothing."""
    full, longer, note, undecided = arms[0].runs[0].setting, longer_memagent(arms), "", ""
    steps = longer.changed["memagent_steps"] if longer else 0
    both = full["memtrain_steps"] + full["memagent_steps"]
    if longer and steps < both:
        undecided = f"MemAgent has {steps} steps in all, MemTrain and MemAgent together {both}"
        note = ("C6 is not the paper's comparison here: the paper equalises all steps, 300 + 500 against 800, and "
                f"this arm has {steps} against {full['memtrain_steps']} + {full['memagent_steps']}.")
    average, each = _versus(arms[0], longer, "longer-memagent", AGENT)
    what = f"MemAgent with {steps} steps" if longer else "MemAgent with more steps"
    return deciding(f"C6 more post-training does not replace MemTrain: MemTrain+MemAgent over {what}, average",
                    f"+{PAPER_SCALING:.1f} (Figure 4, the best of 500 to 800 steps)", average,
                    state(average, each, PAPER_SCALING, undecided=undecided), note=note)


def _span(lengths: Sequence[float]) -> str:
    return f"{lengths[0]:g}x" if len(lengths) == 1 else f"{lengths[0]:g}x to {lengths[-1]:g}x"


def on_search(table: Table) -> tuple[Claim, list[Claim]]:
    """C7: (the line that decides, detail)."""
    a, b, claim = "memtrain+mem1", "mem1", "C7 MemTrain+MEM1 over MEM1 at search"
    average, each = Difference(reason="search QA not run"), {}
    if table.columns:
        average, each = _each(lambda columns: table.compare(a, b, columns), table.shared(a, b))
    return (deciding(f"{claim}, average", gap(PAPER_TABLE2, a, b), average,
                     state(average, each, lead(PAPER_TABLE2, a, b))),
            [_everywhere(f"{claim}, on every benchmark", wins(PAPER_TABLE2, a, b), each),
             *(Claim(f"{claim}, {n}", "—", str(d), d) for n, d in each.items())])


def on_backbones(found: dict[str, list[Arm]]) -> Claim:
    """C8: C1 and C2 of the backbones behind the first, each on average; the weakest decides."""
    claim, paper = "C8 it holds for more than one backbone", "C1 and C2 for Qwen3-4B and Qwen2.5-7B"
    lines = {name: on_long_text(arms[0].table)[0][:2] for name, arms in list(found.items())[1:]}
    if not lines:
        return Claim(claim, paper, "—", state=f"{NOT_TESTED}: runs of one backbone only", entered="—")
    words = [c.word for own in lines.values() for c in own]
    worst = next(w for w in (NOT_REPRODUCED, NOT_TESTED, INCONCLUSIVE, REPRODUCED) if w in words)
    which = ", ".join(f"{c.id} for {name}" for name, own in lines.items() for c in own if c.word == worst)
    ours = "; ".join(f"{name}: " + ", ".join(f"{c.id} {c.ours} ({c.word})" for c in own) for name, own in lines.items())
    entered = "; ".join(f"{name}: {' and '.join(dict.fromkeys(c.entered for c in own))}" for name, own in lines.items())
    return Claim(claim, paper, ours, state=worst if worst == REPRODUCED else f"{worst}: {which}", entered=entered)


def verdicts(found: dict[str, list[Arm]]) -> tuple[list[Claim], list[Claim]]:
    """(C1-C8, a line each; the detail beside them)."""
    arms = next(iter(found.values()))
    first, detail = on_long_text(arms[0].table)
    search, by_benchmark = on_search(arms[0].search)
    return [*first, *on_arms(arms), search, on_backbones(found)], detail + by_benchmark
