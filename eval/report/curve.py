"""The label curve: MemAgent from the base and after MemTrain, by how many labelled questions it was trained on.

Its points are the policies of the full arm, of arms that differ in the steps of MemAgent alone, and those kept on the
way (--keep-steps). A step of MemAgent takes one labelled question a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eval.report.arms import AGENT, BOTH, Arm, Difference, against, interval, points

STARTS = {AGENT: "base", BOTH: "memtrain"}  # MemAgent's system: what it starts from


@dataclass(frozen=True)
class Point:
    """A policy after some steps of MemAgent, none for what MemAgent starts from."""

    arm: Arm
    system: str  # as in results.json
    steps: int

    @property
    def labels(self) -> int:
        return self.steps * self.arm.runs[0].setting["documents"]

    @property
    def after_memtrain(self) -> bool:
        return self.system.startswith("memtrain")

    @property
    def all_steps(self) -> int:
        return self.steps + self.after_memtrain * self.arm.runs[0].setting["memtrain_steps"]

    @cached_property
    def flops(self) -> float | None:
        """Of all its training, MemTrain's included: mean over the runs. None where a stage was not recorded."""
        stages = {*(["memtrain"] if self.after_memtrain else []), *([self.system] if self.steps else [])}
        of_run = [[row.get("flops") for row in run.results["stages"] if row["name"] in stages] for run in self.arm.runs]
        if any(len(own) < len(stages) or None in own for own in of_run):
            return None
        return float(np.mean([sum(own) for own in of_run]))

    def __str__(self) -> str:
        return f"{self.all_steps} steps, {self.labels} labels, {teraflops(self.flops)} TFLOP"


def teraflops(flops: float | None) -> str:
    return "—" if flops is None else f"{flops / 1e12:.3g}"


def full_method(full: Arm) -> Point:
    """MemTrain and MemAgent of the full arm: what the points of MemAgent alone are matched with."""
    return Point(full, BOTH, full.runs[0].setting["memagent_steps"])


def curves(arms: Sequence[Arm]) -> dict[str, dict[int, Point]]:
    """{"memagent" or "memtrain+memagent": {steps of MemAgent: Point}}, steps ascending; the full arm's go first."""
    found: dict[str, dict[int, Point]] = {}
    for agent, start in STARTS.items():
        made = {0: Point(arms[0], start, 0)} if arms[0].table.has(start) else {}
        for arm in (a for a in arms if a.changed.keys() <= {"memagent_steps", "mem1_steps"}):
            for system in dict.fromkeys(system for system, _ in arm.table.cells):
                name, _, kept = system.partition("@")
                steps = int(kept) if kept else arm.runs[0].setting["memagent_steps"]
                if name == agent:
                    made.setdefault(steps, Point(arm, system, steps))
        found[agent] = dict(sorted(made.items()))
    return found


def matched_steps(alone: dict[int, Point], full: Arm) -> Point | None:
    """MemAgent with as many steps as MemTrain and MemAgent have in the full arm; where that was not run the next
    longer, else the longest, of those with more steps of MemAgent than the full arm."""
    ours = full_method(full)
    longer = {steps: p for steps, p in alone.items() if steps > ours.steps}
    enough = [steps for steps in longer if steps >= ours.all_steps]
    return longer[min(enough)] if enough else longer[max(longer)] if longer else None


def matched_flops(alone: dict[int, Point], full: Arm) -> Point | None:
    """The point whose FLOPs come nearest to those of MemTrain and MemAgent together, in proportion."""
    target = full_method(full).flops
    known = [p for p in alone.values() if p.steps and p.flops]
    return min(known, key=lambda p: abs(math.log(p.flops / target))) if target and known else None


@dataclass(frozen=True)
class Curve:
    """Both curves over the lengths that all their points have, means over the seeds that all have."""

    lengths: list
    seeds: list[int]
    values: dict[str, dict[int, tuple[Point, tuple[float, float, float]]]]  # system: {labels: (point, estimate)}
    differences: dict[int, Difference]  # by labels: after MemTrain minus from the base


def label_curve(arms: Sequence[Arm]) -> Curve | None:
    """None with fewer than three points on each of the two curves: a line through two is no curve."""
    found = curves(arms)
    if min(map(len, found.values())) < 3:
        return None
    everything = [p for own in found.values() for p in own.values()]
    lengths = [n for n in arms[0].table.columns if all((p.system, n) in p.arm.table.cells for p in everything)]
    seeds = set.intersection(*(set(p.arm.table.seeds_of([p.system], lengths)) for p in everything))
    if not lengths or not seeds:
        return None
    values = {name: {p.labels: (p, p.arm.table.accuracy(p.system, lengths, sorted(seeds))) for p in own.values()}
              for name, own in found.items()}
    both = [n for n in values[BOTH] if n in values[AGENT]]
    differences = {}
    for n in both:
        ours, theirs = values[BOTH][n][0], values[AGENT][n][0]
        differences[n] = against(ours.arm, theirs.arm, ours.system, theirs.system, lengths)
    return Curve(lengths, sorted(seeds), values, differences)


def rows(curve: Curve | None) -> list[list[str]]:
    """Labels; steps of MemAgent, accuracy and TFLOP of both curves; the paired difference."""
    def cells(name: str, n: int) -> list[str]:
        if n not in curve.values[name]:
            return ["not run", "—", "—"]
        point, estimate = curve.values[name][n]
        return [interval(*estimate), str(point.all_steps), teraflops(point.flops)]

    if curve is None:
        return []
    return [[str(n), *cells(AGENT, n), *cells(BOTH, n), str(curve.differences.get(n, "—"))]
            for n in sorted({*curve.values[AGENT], *curve.values[BOTH]})]


def reading(curve: Curve) -> list[str]:
    """Two sentences: what MemTrain is worth in labels, by linear interpolation of the means, and where they cross."""
    alone = [(n, mean) for n, (_, (mean, _, _)) in curve.values[AGENT].items()]
    target = curve.values[BOTH][0][1][0]
    reached = next((i for i, (_, mean) in enumerate(alone) if mean >= target), None)
    if reached is None:
        worth = f"more than the {alone[-1][0]} that were tried"
    elif reached == 0:
        worth = "none"
    else:
        (a, low), (b, high) = alone[reached - 1:reached + 1]
        worth = f"about {a + (b - a) * (target - low) / (high - low):.0f}"
    ahead = [(n, d.mean) for n, d in curve.differences.items()]
    last = next((i for i, (_, mean) in enumerate(ahead) if mean <= 0), len(ahead))
    if last == len(ahead):
        crossing = f"MemTrain first stays ahead up to {ahead[-1][0]} labels: the curves do not cross there."
    elif last == 0:
        crossing = "MemTrain first is not ahead even without labels."
    else:
        crossing = f"The curves cross between {ahead[last - 1][0]} and {ahead[last][0]} labels."
    return [f"MemTrain without a label scores {points(target):.1f}; MemAgent alone needs labels for that: {worth}.",
            crossing]
