"""The report's tables: lists of rows of plain text, the same for report.md and report.html, which escape them.

What came from outside is an Outside: in markdown its marks have to be escaped, ours not.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from eval.report.arms import BOTH, Arm, Table, against, measured, points, shared
from eval.report.curve import Point, teraflops
from eval.report.results import SYSTEMS, Run

LONG = ("base-one-window", "base", "memtrain", "memagent", BOTH)  # systems of Table 1
SEARCH = ("base", "mem1", "memtrain+mem1")  # systems of Table 2
RETENTION = (0, 1, 2, 4, 8, 16, 32, 64)  # distances in the table of what is kept


class Outside(str):
    """Text from a file of the run."""


def by_columns(table: Table, systems: Sequence[str]) -> list[list[str]]:
    """Accuracy of each system by length or benchmark, and on average."""
    rows = []
    for system in systems:
        cells = [measured(table.by_seed(system, [n])) for n in table.columns]
        whole = table.by_seed(system, table.columns) if table.columns else []
        rows.append([SYSTEMS[system], *cells, measured(whole) if whole else "—"])
    return rows


def search_systems(table: Table) -> list[str]:
    return [s for s in SYSTEMS if s in SEARCH or table.has(s)]


# field: (head of its column, factor)
BESIDE = {"em": ("EM", 100), "f1": ("F1", 100), "sub_em_search_r1": ("sub-EM, Search-R1", 100),
          "sub_em_memagent": ("sub-EM, MemAgent", 100), "sub_em": ("whole words", 100), "turns": ("turns", 1),
          "searches": ("searches", 1), "answered": ("answered, %", 100), "malformed": ("malformed", 1),
          "found": ("found, %", 100), "finished": ("finished, %", 100), "memory_tokens": ("memory, tokens", 1)}


def aside(table: Table) -> tuple[list[str], list[list[str]]]:
    """The lenient metrics and how the systems read or searched, as far as the rows, which may be older, have them:
    heads and lines, means over columns and seeds."""
    systems = [s for s in SYSTEMS if table.has(s)]
    fields = [f for f in BESIDE if any(row.get(f) is not None for s in systems for row in table.rows(s))]
    return ["system", *(BESIDE[f][0] for f in fields)], _means(table, systems, {f: BESIDE[f][1] for f in fields})


def _means(table: Table, systems: Sequence[str], shown: dict[str, int]) -> list[list[str]]:
    lines = []
    for system in systems:
        values = {f: [row[f] for row in table.rows(system) if row.get(f) is not None] for f in shown}
        lines.append([SYSTEMS[system], *(f"{scale * np.mean(values[f]):.1f}" if values[f] else "—"
                                         for f, scale in shown.items())])
    return lines


def per_system(rows: Sequence[dict], value: str, low: str, high: str) -> list[list[str]]:
    """recall and masked: one line per system and number of sections."""
    groups: dict = {}
    for row in rows:
        groups.setdefault((list(SYSTEMS).index(row["system"]), row.get("sections") or 0), []).append(row)
    return [[SYSTEMS[own[0]["system"]], f"{sections:g}" if sections else "—",
             measured([(row[value], row[low], row[high]) for row in own]), f"{own[0]['n']:g}"]
            for (_, sections), own in sorted(groups.items(), key=lambda item: item[0])]


def by_kind(table: Table, field: str = "kinds") -> list[list[str]]:
    """Accuracy per kind of question over all lengths and seeds: every length asks the same questions. field:
    "locomo_f1" for F1 as LoCoMo's authors count it, by category."""
    sums: dict = {}
    for system in LONG:
        for row in table.rows(system):
            for kind, pair in (row.get(field) or {}).items():
                sums[kind, system] = sums.get((kind, system), np.zeros(2)) + pair
    return [[Outside(kind), *(f"{points(right / asked):.1f} ({asked:.0f})" if asked else "—"
                              for right, asked in (sums.get((kind, s), (0, 0)) for s in LONG))]
            for kind in sorted({kind for kind, _ in sums})]


def memory(rows: Sequence[dict]) -> list[list[str]]:
    """What memories hold, by kind of document: shares of gold facts kept after k further sections, then means over
    lengths and seeds."""
    lines = []
    for (task, what), (system, name) in itertools.product(tasks(rows).items(), SYSTEMS.items()):
        own = [row for row in rows if row["system"] == system and row.get("task") == task]
        if not own:
            continue
        cells = [Outside(what)]
        for k in RETENTION:
            found = [row["retention"][k] for row in own if k < len(row.get("retention") or [])]
            kept, asked = np.sum(found or [[0, 0]], axis=0)
            cells.append(f"{points(kept / asked):.1f} ({asked})" if asked else "—")
        copied = [row["verbatim"] for row in own if row.get("verbatim") is not None]
        lines.append([name, *cells, f"{100 * np.mean(copied):.1f}" if copied else "—"])
    return lines


def tasks(rows: Sequence[dict]) -> dict[str | None, str]:
    """Kinds of documents in rows of `memory`, with what was counted in them."""
    units = {row.get("task"): row.get("unit") for row in rows}
    return {task: f"{task or 'all'} documents" + (f", {unit}" if unit else "") for task, unit in units.items()}


def ablations(arms: Sequence[Arm], system: str) -> list[list[str]]:
    """One line an arm: accuracy by length, average, full minus this arm over the lengths that both have, its cost."""
    full, lines = arms[0], []
    for arm in arms:
        if not arm.table.has(system):
            continue
        cells = [measured(arm.table.by_seed(system, [n])) if (system, n) in arm.table.cells else "not run"
                 for n in full.table.lengths]
        own = [n for n in full.table.lengths if (system, n) in arm.table.cells]
        whole = arm.table.by_seed(system, own)
        average = measured(whole) if whole else "—"
        if own != full.table.lengths and whole:
            average += f" over {', '.join(f'{n:g}x' for n in own)}"
        d = against(full, arm, system, system, shared(full.table, system, arm.table, system))
        difference = "" if arm is full else d.reason or str(d)
        lines.append([Outside(arm.name), *cells, average, difference, *_cost(arm, system)])
    return lines


def _cost(arm: Arm, system: str) -> list[str]:
    """Labels, steps, TFLOP, tokens trained, sampled and prefilled (prompts, while sampling) and seconds of the stages
    that lead to a system: means over the arm's runs."""
    point = Point(arm, system, arm.runs[0].setting["memagent_steps"] if system == BOTH else 0)
    stages = [row for row in arm.rows("stages") if row["name"] in {system, *system.split("+")[:1]}]
    counts = ([row.get(f) for row in stages] for f in ("tokens_trained", "tokens_sampled", "tokens_prompts", "seconds"))
    return [str(point.labels), str(point.all_steps), teraflops(point.flops),
            *(f"{sum(each) / len(arm.runs):,.0f}" if each and None not in each else "—" for each in counts)]


def stages(runs: Sequence[Run]) -> list[list[str]]:
    fields = {"seed": "{:g}", "steps": "{:,.0f}", "seconds": "{:,.0f}", "tokens_sampled": "{:,.0f}",
              "tokens_trained": "{:,.0f}", "reward_first": "{:.3f}", "reward_last": "{:.3f}"}
    return [[Outside(row["name"]), *("—" if row.get(f) is None else show.format(row[f]) for f, show in fields.items())]
            for run in runs for row in run.results["stages"]]


def warnings(arms: Sequence[Arm], backbones: Sequence[str]) -> list[str]:
    """What a reader must know before believing a figure."""
    table, runs, found = arms[0].table, arms[0].runs, []
    config = runs[0].config
    if config.get("preset") == "nano" and config.get("corpus", "miniworld") != "miniworld":
        found.append("A model this small learns little from real text: these figures show that the code path "
                     "runs, not the method.")
    for (by, cells), (system, name) in itertools.product(
            (("length", table), ("benchmark", arms[0].search)), SYSTEMS.items()):
        shares = [row["em"] for row in cells.rows(system)]
        if shares and max(shares) <= 0.03:
            found.append(f"{name} is at chance: 3% or less at every {by}. Comparisons with it say little.")
        if shares and min(shares) >= 0.97:
            found.append(f"{name} is saturated: 97% or more at every {by}. Comparisons with it say little.")
    if len({seed for arm in arms[:1] for seed in (*table.seeds, *arm.search.seeds)}) == 1:
        found.append("One seed: the intervals cover the choice of questions, not how another training would differ.")
    if len({run.environment.get("commit") for arm in arms for run in arm.runs}) > 1:
        found.append("The pooled runs come from different commits.")
    if len(backbones) > 1:
        found.append(f"Tables and plots show the first backbone, {backbones[0]}; "
                     "of the others there are Table 1 and C8.")
    return found
