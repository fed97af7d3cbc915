"""Questions about facts that change: exact match, and answers that are out of date.

    stale     an answer that was true once and is not any more: of questions about what holds now alone
    asked     a letter for each question: n(ow), f(irst), b(efore), h(ow often), s(ettled)
    changes   a digit: how often the thread changed; of two threads the sum, 9 at most
    distance  a digit: sections between the last change and the end, 0 none, then one more each time they double
"""

from __future__ import annotations

from collections.abc import Sequence

from data.world.timeline import Changing
from eval.longqa import long_qa_row
from eval.memory import Book, Kept, reading, shown
from eval.metrics import exact_match

SHOWN = 4  # documents of the viewer: the first ones whose fact has changed


def changing_row(agent, system: str, seed: int, length: int, problems: Sequence[Changing], read: list) -> dict:
    """A row of results.json: that of long_qa, and of each question what the module's docstring says. read: gets the
    rollouts."""
    row = long_qa_row(agent, system, seed, length, problems, read)
    stale = [int(exact_match(r.answer, p.stale)) if p.stale else 0 for r, p in zip(read, problems, strict=True)]
    sections = [p.behind // agent.c.section for p in problems]
    return row | {"asked": "".join(p.kind[0] for p in problems), "stale": "".join(map(str, stale)),
                  "changes": "".join(str(min(p.changes, 9)) for p in problems),
                  "distance": "".join(str(min(n.bit_length(), 9)) for n in sections)}


def changing_readings(agent, length: int, problems: Sequence[Changing], read: Sequence) -> list[Kept]:
    """What readings.json keeps: the first documents whose fact has changed."""
    chosen = [i for i, p in enumerate(problems) if p.stale][:SHOWN]
    books = [Book(problems[i], "changing", length, [agent.tokenizer.decode(s) for s in agent.sections(problems[i])],
                  shown=list(problems[i].current), outdated=list(problems[i].outdated)) for i in chosen]
    return [(shown(book), reading(agent, read[i])) for i, book in zip(chosen, books, strict=True)]
