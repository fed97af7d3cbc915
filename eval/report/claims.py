"""The state of each claim C1-C8.

A claim is decided by one line, its average, and by one function, `state`: the pages and claims.json print what it
says. All other lines are detail: a difference and its interval, without a verdict.

    arms (runs that differ in their seed alone) -> Difference -> state -> Claim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.report.arms import AGENT, BOTH, Arm, Difference, Table, against, named, points, shared
from eval.report.curve import Point, curves, full_method, matched_flops, matched_steps
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
)

MIN_SEEDS = 3  # with fewer no claim is decided
MIN_RECALL = 0.15  # recall of the base: below it a reward for recall has nothing to choose from (C4, C5)
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"
NOT_TESTABLE, NOT_TESTED = "not testable", "not tested"
RULE = (  # `state` in words
    f"Each claim is decided by one line, an average. Reproduced: at least {MIN_SEEDS} seeds, the whole 95% interval "
    "above zero, however small the lead, and no single length or benchmark whose whole interval lies below zero. Not "
    "reproduced: the whole interval below zero, or else below half of the paper's effect (Qwen3-4B's where the paper "
    "gives two). Inconclusive: all else, and always with one or two seeds. Not testable: the claim is about recall, "
    f"and the base recalls less than {MIN_RECALL:.0%}. Not tested: there is no such run. C8 follows C1 and C2 of the "
    "other backbones.")

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
    matched: str = ""  # what both sides have equally much of
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


def deciding(claim: str, paper: str, d: Difference, said: str, ours: str = "", note: str = "",
             matched: str = "") -> Claim:
    return Claim(claim, paper, ours or str(d), d, said, d.entered, "" if d.reason else matched, note)


# ------------------------------------------------------------------------------------------------ claims

ON_TOP = "labels and steps of {}{}; MemTrain's steps come on top"
BUT_THE_ARM = "all but what the arm's name says"


def _each(over: Callable[[list], Difference], columns: Sequence) -> tuple[Difference, dict]:
    """(the average over columns, {column: its own difference})."""
    return over(columns), {n: over([n]) for n in columns}


def _leads(table: Table, claim: str, a: str, b: str, paper_b: str, matched: str,
           note: str = "") -> tuple[Claim, list[Claim]]:
    """A lead at long documents: (on average, the detail by length)."""
    average, each = _each(lambda columns: table.compare(a, b, columns), table.shared(a, b))
    column = {n: i for i, n in enumerate(PAPER_LENGTHS)}
    said = state(average, each, lead(PAPER_TABLE1, a, paper_b))
    detail = [Claim(f"{claim}, {n:g}x", gap(PAPER_TABLE1, a, paper_b, column[n]) if n in column else "—", str(d), d)
              for n, d in each.items()]
    return (deciding(f"{claim}, average", gap(PAPER_TABLE1, a, paper_b), average, said, note=note, matched=matched),
            detail)


def _falls_less(table: Table, budget: str) -> Claim:
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
                    f"7k to 896k: {paper}", fall, state(fall, effect=PAPER_FALL), ours,
                    matched=ON_TOP.format("MemAgent", budget))


def over_base(table: Table) -> tuple[Claim, list[Claim]]:
    """C1: (the line that decides, detail)."""
    a, b = "memtrain", "base-one-window"
    first, detail = _leads(table, "C1 MemTrain over base", a, "base", b, "labels, none on either side")
    window = table.compare(a, b, table.shared(a, b))
    return first, [Claim("C1 MemTrain over base in one window, average", gap(PAPER_TABLE1, a, b), str(window), window),
                   *detail]


def over_memagent(table: Table, budget: str = "") -> tuple[list[Claim], list[Claim]]:
    """C2 and C3: (the lines that decide, detail). budget: of MemAgent, in words."""
    second, detail = _leads(table, "C2 MemTrain+MemAgent over MemAgent", BOTH, AGENT, AGENT,
                            ON_TOP.format("MemAgent", budget), WEAK_BASELINE)
    return [second, _falls_less(table, budget)], detail


def on_long_text(table: Table) -> tuple[list[Claim], list[Claim]]:
    """C1-C3 of one table: (the lines that decide, detail)."""
    (first, of_first), (others, of_others) = over_base(table), over_memagent(table)
    return [first, *others], [*of_first, *of_others]


def _arm(arms: Sequence[Arm], name: str) -> Arm | None:
    return next((arm for arm in arms if arm.name == name), None)


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
                    average, state(average, each, whole - ablated, recall_has_room(arms[0])), matched=BUT_THE_ARM)


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
                    PAPER_DECOUPLED, far, state(far, each, untestable=recall_has_room(full)), ours,
                    matched=BUT_THE_ARM)


def _longer(arms: Sequence[Arm]) -> Claim:
    """The paper equalises all steps; MemAgent with fewer than MemTrain and MemAgent together decides nothing."""
    full, note, undecided = arms[0], "", ""
    ours = full_method(full)
    theirs = matched_steps(curves(arms)[AGENT], full)
    if theirs and theirs.steps < ours.all_steps:
        undecided = f"MemAgent has {theirs.steps} steps in all, MemTrain and MemAgent together {ours.all_steps}"
        note = ("C6 is not the paper's comparison here: the paper equalises all steps, 300 + 500 against 800, and "
                f"this arm has {theirs.steps} against {ours.all_steps - ours.steps} + {ours.steps}.")
    average, each = _over_point(full, theirs)
    what = f"MemAgent with {theirs.steps} steps" if theirs else "MemAgent with more steps"
    return deciding(f"C6 more post-training does not replace MemTrain: MemTrain+MemAgent over {what}, average",
                    f"+{PAPER_SCALING:.1f} (Figure 4, the best of 500 to 800 steps)", average,
                    state(average, each, PAPER_SCALING, undecided=undecided), note=note,
                    matched=f"all steps: {ours} against {theirs}" if theirs and not undecided else "")


def _over_point(full: Arm, theirs: Point | None) -> tuple[Difference, dict]:
    return _versus(full, theirs and theirs.arm, "longer-memagent", theirs.system if theirs else AGENT)


def _otherwise_matched(arms: Sequence[Arm]) -> list[Claim]:
    """C6 at equal FLOPs; at equal labels it is C2."""
    theirs = matched_flops(curves(arms)[AGENT], arms[0])
    if theirs is None or theirs.arm is arms[0]:
        return []
    average, _ = _over_point(arms[0], theirs)
    return [Claim(f"C6 at equal FLOPs, average: {full_method(arms[0])} against {theirs}", "—", str(average), average)]


def _span(lengths: Sequence[float]) -> str:
    return f"{lengths[0]:g}x" if len(lengths) == 1 else f"{lengths[0]:g}x to {lengths[-1]:g}x"


def on_search(table: Table, budget: str = "") -> tuple[Claim, list[Claim]]:
    """C7: (the line that decides, detail)."""
    a, b, claim = "memtrain+mem1", "mem1", "C7 MemTrain+MEM1 over MEM1 at search"
    average, each = Difference(reason="search QA not run"), {}
    if table.columns:
        average, each = _each(lambda columns: table.compare(a, b, columns), table.shared(a, b))
    return (deciding(f"{claim}, average", gap(PAPER_TABLE2, a, b), average,
                     state(average, each, lead(PAPER_TABLE2, a, b)), matched=ON_TOP.format("MEM1", budget)),
            [Claim(f"{claim}, {n}", "—", str(d), d) for n, d in each.items()])


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


def _budget(arm: Arm, field: str) -> str:
    c = arm.runs[0].setting
    what = "pairs of questions" if field == "mem1_steps" else "questions"
    return f", {c[field]} steps of {c['documents']} {what}"


def verdicts(found: dict[str, list[Arm]]) -> tuple[list[Claim], list[Claim]]:
    """(C1-C8, a line each; the detail beside them). C2, C3 and C7 are decided at the budgets that were chosen on the
    development world, where these were run; the full arm's are then detail."""
    arms = next(iter(found.values()))
    full = arms[0]
    settled = _arm(arms, "settled") or full
    first, detail = over_base(full.table)
    others, of_others = over_memagent(settled.table, _budget(settled, "memagent_steps"))
    search, by_benchmark = on_search(settled.search, _budget(settled, "mem1_steps"))
    detail += [*of_others, *_otherwise_matched(arms), *by_benchmark]
    if settled is not full:
        short = [*over_memagent(full.table)[0], on_search(full.search)[0]]
        for c, field in zip(short, ("memagent_steps", "memagent_steps", "mem1_steps"), strict=True):
            detail.append(Claim(c.claim + _budget(full, field), "—", c.ours, c.difference))
    return [first, *others, *on_arms(arms), search, on_backbones(found)], detail
