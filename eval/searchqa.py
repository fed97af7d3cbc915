"""Search QA: two questions at once with a search tool. The agent is handed in: evaluation runs the loop that was
trained."""

from __future__ import annotations

from collections.abc import Sequence

from data.search import SearchProblem
from eval.metrics import lenient, wilson_interval


def search_row(agent, retriever, system: str, seed: int, problems: Sequence[SearchProblem]) -> dict:
    """One row of results.json: `system` on these pairs of questions, all of one benchmark.

    em is the mean over questions, as MEM1's reward is; its interval takes the questions for independent. correct:
    a 0 or 1 for each question, pair by pair. found: share of the pieces of evidence that some search returned, null
    where the gold passages are not known.
    """
    episodes = agent.search(problems, [("search", seed, system, p.id) for p in problems], retriever)
    n, correct = len(problems), [int(hit) for e in episodes for hit in e.hits]
    low, high = wilson_interval(sum(correct), len(correct))
    answers = [a for e in episodes for a in e.answers]
    golds = [gold for p in problems for gold in p.answers]
    found = [share for e in episodes if (share := evidence(e)) is not None]
    states = [len(m) for e in episodes for m in e.memories]
    return {"system": system, "seed": seed, "benchmark": problems[0].kind, "n": n, "em": sum(correct) / len(correct),
            "em_low": low, "em_high": high, "correct": "".join(map(str, correct)),
            **lenient(answers, golds),
            "turns": sum(len(e.turns) for e in episodes) / n,
            "searches": sum(bool(a.query) for e in episodes for a in e.actions) / n,
            "answered": sum(bool(e.actions[-1].answers) for e in episodes) / n,
            "malformed": sum(a.malformed for e in episodes for a in e.actions) / n,
            "found": sum(found) / len(found) if found else None, "memory_tokens": sum(states) / len(states)}


def evidence(episode) -> float | None:
    """Share of an episode's pieces of evidence that a passage it was shown states."""
    pieces = [piece for question in episode.problem.gold for piece in question]
    seen = {p for passages in episode.returned for p in passages}
    return sum(not seen.isdisjoint(piece) for piece in pieces) / len(pieces) if pieces else None
