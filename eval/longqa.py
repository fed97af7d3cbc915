"""Long-text QA and held-out memory tests. The agent is handed in: evaluation reads with the loop that was trained."""

from __future__ import annotations

import random
from collections.abc import Sequence

from data.tasks import Problem
from data.text.conversations import LOCOMO
from eval.metrics import LENIENT, exact_match, lenient, locomo_f1, wilson_interval


def long_qa_row(agent, system: str, seed: int, length: int, problems: Sequence[Problem],
                read: list | None = None) -> dict:
    """One row of results.json: `system` on these problems, documents of `length` sections' worth of tokens.

    read: gets the rollouts, without turns and sections; none come from one window.
    """
    keys = [("eval", seed, system, length, p.id) for p in problems]
    row = {"system": system, "seed": seed, "length": length, "n": len(problems)}
    sizes = [[len(s) for s in agent.sections(p)] for p in problems]  # one document's tokens at a time
    row["sections"] = sum(map(len, sizes)) / len(sizes)
    row["tokens"] = sum(map(sum, sizes)) / len(sizes)
    if system == "base-one-window":
        answers = agent.answer_in_one_window(problems, keys)
    else:
        rollouts = agent.read(problems, keys, keep_turns=False)
        if read is not None:
            read += rollouts
        answers = [r.answer for r in rollouts]
        lengths = [len(m) for r in rollouts for m in r.memories]
        row["memory_tokens"] = sum(lengths) / len(lengths)
        row["finished"] = sum(r.finished for r in rollouts) / sum(len(r.memories) + 1 for r in rollouts)
    return row | scores(answers, problems)


def scores(answers: Sequence[str | None], problems: Sequence[Problem]) -> dict:
    """em with its 95% Wilson interval, LENIENT, a 0 or 1 for each problem, and [correct, n] of each kind; of LoCoMo
    also its authors' F1 by kind."""
    correct = [int(exact_match(a, p.answers)) for a, p in zip(answers, problems, strict=True)]
    low, high = wilson_interval(sum(correct), len(correct))
    kinds: dict[str, list[int]] = {}
    for hit, p in zip(correct, problems, strict=True):
        count = kinds.setdefault(p.kind or "question", [0, 0])
        count[0] += hit
        count[1] += 1
    told: dict[str, list[float]] = {}
    for answer, p in zip(answers, problems, strict=True):
        if p.kind.startswith(LOCOMO):
            told.setdefault(p.kind, []).append(locomo_f1(answer, p.answers, p.kind.removeprefix(LOCOMO)))
    locomo = {"locomo_f1": {kind: [sum(f), len(f)] for kind, f in told.items()}} if told else {}
    return locomo | {"em": sum(correct) / len(correct), "em_low": low, "em_high": high,
            **lenient(answers, [p.answers for p in problems]), "correct": "".join(map(str, correct)), "kinds": kinds}


def held_out_rows(agent, system: str, seed: int, problems: Sequence[Problem], finder, probe,
                  read: list | None = None) -> tuple[dict, dict]:
    """(recall row, masked row) of results.json on held-out masked documents.

    probe(agent, finder, rollout, rng): draws a recall prompt as training does, here the same for all systems.
    read: gets the rollouts.
    """
    rollouts = agent.read(problems, [("held-out", seed, system, p.id) for p in problems])
    if read is not None:
        read += rollouts
    drawn = [probe(agent, finder, r, random.Random(f"held-out:{r.problem.id}")) for r in rollouts]
    drawn = [d for d in drawn if d]
    row = {"system": system, "seed": seed}
    hits = []
    if drawn:
        keys = [("held-out recall", seed, system, i) for i in range(len(drawn))]
        hits = agent.recall(*zip(*drawn, strict=True), keys)[1]
    low, high = wilson_interval(sum(hits), len(hits)) if hits else (0.0, 1.0)
    recall = row | {"n": len(hits), "accuracy": sum(hits) / max(1, len(hits)), "low": low, "high": high}
    sections = sum(len(r.sections) for r in rollouts) / len(rollouts)
    masked = scores([r.answer for r in rollouts], problems)
    return recall, row | {"sections": sections, "n": len(rollouts)} | {
        k: masked[k] for k in ("em", "em_low", "em_high", *LENIENT)}
