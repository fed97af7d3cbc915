"""The report's part on facts that change: what holds now, stale answers, and what training does to both.

Rows come from results.json, section `changing` (eval.changing); those on facts that stand still, section `long_qa`, are
set beside them. A stale answer was true once and is not any more; only questions about what holds now can have one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from eval.metrics import wilson_interval
from eval.report import plots
from eval.report.arms import BOTH, FULL, Arm, Difference, Table, compare, measured, points, shared
from eval.report.claims import MIN_SEEDS
from eval.report.results import SYSTEMS

HELPS, HARMS, OPEN = "helps", "harms", "inconclusive"
RULE = (f"Helps: at least {MIN_SEEDS} seeds and a whole 95% interval on the good side of zero, more right or less "
        f"stale. Harms: on the other side. Inconclusive: all else, and always with fewer seeds.")
MASKED = {"mask", "masked_text"}  # arms that differ in these alone start from the full one's base
DISTANCES = ("under 1", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64+")  # sections, by the digit of `distance`


def current(rows: Sequence[dict], field: str) -> list[dict]:
    """Rows that a Table can be made of: of the questions about what holds now alone, `field`, correct or stale."""
    made = []
    for row in rows:
        bits = [int(x) for x, kind in zip(row[field], row["asked"], strict=True) if kind == "n"]
        if bits:
            low, high = wilson_interval(sum(bits), len(bits))
            made.append({k: row[k] for k in ("system", "seed", "length")} | {
                "n": len(bits), "correct": bits, "em": sum(bits) / len(bits), "em_low": low, "em_high": high})
    return made


@lru_cache(maxsize=64)  # every table and figure of a report asks for those of every arm
class Facts:
    """The three tables of one arm: all questions, and of those about what holds now the right and the stale answers."""

    def __init__(self, arm: Arm):
        self.arm, self.rows = arm, arm.rows("changing")
        self.all = Table(self.rows, seeds=arm.seeds)
        self.right, self.stale = (Table(current(self.rows, f), seeds=arm.seeds) for f in ("correct", "stale"))


def shown(arms: Sequence[Arm]) -> Iterator[tuple[str, Facts, str]]:
    """(name in print, tables, system) of every line: all systems of the full arm, what the others trained."""
    for arm in arms:
        facts = Facts(arm)
        for system, name in SYSTEMS.items():
            if facts.all.has(system) and (arm.name == FULL or system != "base"):
                yield name if arm.name == FULL else f"{name}, {arm.name}", facts, system


def by_length(arms: Sequence[Arm]) -> list[list[str]]:
    """Exact match on all questions about facts that change, by length, on average, and on facts that stand still."""
    lengths, lines = Facts(arms[0]).all.columns, []
    for name, facts, system in shown(arms):
        cells = [measured(facts.all.by_seed(system, [n])) for n in lengths]
        still = facts.arm.table
        both = [n for n in lengths if (system, n) in still.cells]
        lines.append([name, *cells, measured(facts.all.by_seed(system, lengths)),
                      measured(still.by_seed(system, both)) if both else "not run"])
    return lines


def _shares(rows: Sequence[dict], system: str, keep: Callable[[dict, int], bool]) -> str:
    """"right / stale / stale among wrong (asked)" in %, of the questions about what holds now that `keep` (row,
    number) lets through."""
    right = stale = asked = 0
    for row in (r for r in rows if r["system"] == system):
        for i in (i for i, kind in enumerate(row["asked"]) if kind == "n" and keep(row, i)):
            right, stale, asked = right + row["correct"][i], stale + int(row["stale"][i]), asked + 1
    if not asked:
        return "—"
    wrong = f"{points(stale / (asked - right)):.1f}" if asked > right else "—"
    return f"{points(right / asked):.1f} / {points(stale / asked):.1f} / {wrong} ({asked})"


def stale(arms: Sequence[Arm]) -> list[list[str]]:
    """Of what holds now: right, stale, stale among the wrong ones."""
    lines = []
    for name, facts, system in shown(arms):
        right, old = (t.by_seed(system, t.columns) for t in (facts.right, facts.stale))
        wrong = 1 - float(np.mean([x[0] for x in right])) if right else 0
        share = f"{points(float(np.mean([x[0] for x in old])) / wrong):.1f}" if wrong else "—"
        lines.append([name, measured(right), measured(old), share])
    return lines


def by_changes(arms: Sequence[Arm]) -> list[list[str]]:
    return [[name, *(_shares(facts.rows, system, lambda row, i, n=n: row["changes"][i] == n) for n in "0123")]
            for name, facts, system in shown(arms)]


def distances(arms: Sequence[Arm]) -> list[str]:
    """The distances that were asked at, as digits."""
    return sorted({d for arm in arms for row in arm.rows("changing") for d in row["distance"]})


def by_distance(arms: Sequence[Arm]) -> list[list[str]]:
    found = distances(arms)
    return [[name, *(_shares(facts.rows, system, lambda row, i, d=d: row["distance"][i] == d) for d in found)]
            for name, facts, system in shown(arms)]


def verdict(d: Difference, sign: int = 1) -> str:
    """RULE. sign: -1 where less is better."""
    if d.reason:
        return f"not tested: {d.reason}"
    if len(d.by_seed) < MIN_SEEDS:
        return f"{OPEN}: {d.seeds}, needed: {MIN_SEEDS}"
    low, high = sorted((sign * d.low, sign * d.high))
    return HELPS if low > 0 else HARMS if high < 0 else f"{OPEN}: the interval includes zero"


def effects(arms: Sequence[Arm]) -> list[list[str]]:
    """What MemTrain does to questions about what holds now: over the base, before MemAgent, and of another arm over the
    full one's; more right, less stale."""
    full, lines = Facts(arms[0]), []
    pairs = [(f"{SYSTEMS[a]} minus {SYSTEMS[b]}", full, a, full, b)
             for a, b in (("memtrain", "base"), ("memagent", "base"), (BOTH, "memagent"), (BOTH, "base"))]
    for arm in arms[1:]:
        own = Facts(arm)
        start = own if own.all.has("base") or arm.changed.keys() - MASKED else full
        pairs += [(f"MemTrain, {arm.name}, minus base", own, "memtrain", start, "base"),
                  (f"MemTrain, {arm.name}, minus MemTrain", own, "memtrain", full, "memtrain")]
    for name, one, a, other, b in pairs:
        if not (one.all.has(a) and other.all.has(b)):
            continue
        cells = [name]
        for mine, theirs, sign in ((one.right, other.right, 1), (one.stale, other.stale, -1),
                                   (one.arm.table, other.arm.table, 1)):
            d = compare(mine, a, theirs, b, shared(mine, a, theirs, b))
            cells += [d.reason or str(d), verdict(d, sign)]
        lines.append(cells)
    return lines


EFFECTS = ("", "right now", "state", "stale", "state", "standing facts", "state")


def content(arms: Sequence[Arm]) -> dict:
    """What both pages say; {} where nothing was asked about facts that change."""
    if not arms[0].rows("changing"):
        return {}
    asked = [DISTANCES[int(d)] for d in distances(arms)]
    lengths = [f"{n:g}x" for n in Facts(arms[0]).all.columns]
    return {"rule": RULE, "by_length": (["system", *lengths, "average", "standing facts"], by_length(arms)),
            "stale": (["system", "right, %", "stale, %", "stale among wrong, %"], stale(arms)),
            "changes": (["system", "never", "once", "twice", "three times"], by_changes(arms)),
            "distance": (["system", *asked], by_distance(arms)), "effects": (list(EFFECTS), effects(arms))}


def plot(arms: Sequence[Arm], path: Path) -> bool:
    """changing.png: right and stale answers on what holds now, by length."""
    panels = []
    for label, field in (("Right on what holds now", "right"), ("Stale answers on what holds now", "stale")):
        lines, ticks = {}, Facts(arms[0]).all.columns
        for i, (name, facts, system) in enumerate(shown(arms)):
            look = plots.LOOKS[system] if facts.arm.name == FULL else (
                plots.ARM_COLOURS[i % len(plots.ARM_COLOURS)], (0, (4, 2)), plots.MARKERS[i % 7])
            if curve := plots.curve(getattr(facts, field), system, look):
                lines[name] = curve
        if lines:
            panels.append(plots.over_lengths(label, lines, ticks))
    return plots.picture(path, panels, (11.4, 4.0))
