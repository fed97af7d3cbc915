"""Search QA after MEM1 (arXiv 2506.15841): several questions at once, a search tool, a state that is rewritten.

Each turn the policy sees instructions, questions, its last internal state, its last query and what that returned;
it writes a new state and, on a line of its own behind it, acts:

    Search: a query                          -> the best passages come back
    Answer: \\boxed{first} \\boxed{second}     -> the end

Anything else is malformed: a correction comes back instead of passages, and the turn is spent. The loop itself is
`Agent.search` in memtrain.py.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from data.text.corpus import Question
from data.weights.tokenizer import Tokenizer

CORRECTION = " End with one line, Search: or Answer:.\n"
NOTHING_FOUND = " Nothing found.\n"
BOX = "\\boxed{"
ACTION = re.compile(r"^[ \t]*(Search|Answer):", re.MULTILINE)


@dataclass(frozen=True)
class SearchProblem:
    """Questions to answer together, each with its accepted answers. kind: the benchmark or family they come from.

    gold: of each question its pieces of evidence, of each piece the passages that state it; empty where not known.
    """

    id: str
    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    kind: str
    gold: tuple[tuple[tuple[str, ...], ...], ...] = ()

    @property
    def question(self) -> str:
        return " ".join(self.questions)


def search_problem(questions: Sequence[Question], kind: str, gold=None) -> SearchProblem:
    """gold: where evidence is stated elsewhere than in the questions' own gold passages, too."""
    gold = gold or tuple(tuple((p.rendered,) for p in q.gold) for q in questions)
    return SearchProblem("+".join(q.id for q in questions), tuple(q.question for q in questions),
                         tuple(q.answers for q in questions), kind, gold)


@dataclass(frozen=True)
class Action:
    """What a turn decided: a query, or one answer for each question; malformed where it did neither."""

    query: str = ""
    answers: tuple[str, ...] = ()

    @property
    def malformed(self) -> bool:
        return not (self.query or self.answers)


def split_response(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], str]:
    """A response (token ids, no stop token) as (ids of the new state, text of the action line and all behind it).

    The state is everything before the first line that begins with `Search:` or `Answer:`, in the very tokens that
    were sampled, without blank ones at its end; all of the response where there is no such line.
    """
    text = tokenizer.decode(ids)
    found = ACTION.search(text)
    start = found.start() if found else len(text)
    end = bisect_right(range(len(ids) + 1), start, key=lambda n: len(tokenizer.decode(ids[:n]))) - 1
    while end and not tokenizer.decode(ids[end - 1:end]).strip():
        end -= 1
    return list(ids[:end]), text[start:]


def parse_action(text: str, questions: int) -> Action:
    """`text`: an action line and what stands behind it, as split_response gives it."""
    found = ACTION.match(text)
    if not found:
        return Action()
    rest = text[found.end():]
    if found.group(1) == "Search":
        return Action(query=" ".join(rest.partition("\n")[0].split()))
    answers = tuple(boxes(rest))
    return Action(answers=answers) if len(answers) == questions and all(answers) else Action()


BRACE = re.compile(r"[{}]")


def boxes(text: str) -> list[str]:
    r"""Contents of the complete, outermost `\boxed{...}` of a text, in order, blanks at their ends stripped.

    Boxes do not nest: what is inside a box is content. After a box that never closes nothing counts, not even a box
    inside it. Every character is visited a bounded number of times: the search continues behind a closed box, and
    ends at an open one.
    """
    found, start = [], text.find(BOX)
    while start >= 0:
        begin, depth, end = start + len(BOX), 1, -1
        for brace in BRACE.finditer(text, begin):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                end = brace.start()
                break
        if end < 0:
            break
        found.append(text[begin:end].strip())
        start = text.find(BOX, end)
    return found


def observation(passages: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[int]:
    """Ids of the passages that a search returned, one a line, cut after `limit` tokens."""
    if not passages:
        return tokenizer.encode(NOTHING_FOUND)[:limit]
    return [i for p in passages for i in tokenizer.encode(p + "\n")][:limit]
