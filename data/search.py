"""Search QA after MEM1 (arXiv 2506.15841): several questions at once, a search tool, a state that is rewritten.

Each turn the policy sees instructions, questions, its last internal state, its last query and what that returned;
it writes a new state and, on a line of its own behind it, acts:

    Search: a query                          -> the best passages come back
    Answer: \\boxed{first} \\boxed{second}     -> the end

The last line that is one of the two counts; a response without any is malformed: a correction comes back instead of
passages, and the turn is spent. The loop itself is `Agent.search` in memtrain.py.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data.text.corpus import Corpus, Question
from data.weights.tokenizer import Tokenizer

CORRECTION = " End with one line, Search: or Answer:.\n"
NOTHING_FOUND = " Nothing found.\n"
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


def with_contexts(corpus: Corpus, questions: Iterable[Question]) -> Corpus:
    """The corpus and behind it the questions' own passages that it lacks."""
    own = (p for q in questions for p in (*q.gold, *q.distractors))
    return Corpus(list(dict.fromkeys([*corpus.passages, *own])), f"{corpus.name} and contexts")


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


def split_response(ids: Sequence[int], tokenizer: Tokenizer, questions: int) -> tuple[list[int], Action]:
    """A response (token ids, no stop token) as (ids of the new state, what it decided about so many questions).

    The action is the last line that begins with `Search:` or `Answer:` and is one, with all that stands behind it. The
    state is everything before that line, in the very tokens that were sampled, without blank ones at its end; without
    an action what stands before the first line that begins so, or all of the response.
    """
    text = tokenizer.decode(ids)
    starts = [line.start() for line in ACTION.finditer(text)]
    action, start = Action(), (starts or [len(text)])[0]
    for line in reversed(starts):
        if not (found := parse_action(text[line:], questions)).malformed:
            action, start = found, line
            break
    end = bisect_right(range(len(ids) + 1), start, key=lambda n: len(tokenizer.decode(ids[:n]))) - 1
    while end and not tokenizer.decode(ids[end - 1:end]).strip():
        end -= 1
    return list(ids[:end]), action


def parse_action(text: str, questions: int) -> Action:
    """`text`: a line that begins with `Search:` or `Answer:`, and what stands behind it."""
    found = ACTION.match(text)
    if not found:
        return Action()
    rest = text[found.end():]
    if found.group(1) == "Search":
        return Action(query=" ".join(rest.partition("\n")[0].split()))
    answers = tuple(boxes(rest))
    return Action(answers=answers) if len(answers) == questions and all(answers) else Action()


BRACE = re.compile(r"\\boxed\s*\{|[{}]")
# Of LaTeX, as instruct models write it in a box, what says how a text looks: \text{...}, \textbf{...}, \mathrm{...}
LOOKS = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|\\(?:emph|underline|mbox|operatorname)\s*\{([^{}]*)\}")


def boxes(text: str) -> list[str]:
    r"""Contents of the complete, outermost `\boxed{...}` of a text, in order, without `\text{...}` and the like around
    words, blanks at their ends stripped.

    Boxes do not nest: what is inside a complete box is content. A box that never closes is none, whatever stands behind
    it. Every character is visited a bounded number of times.
    """
    opened: list[tuple[bool, int, int]] = []  # braces that are open: whether a box's, where it begins, its content
    found: list[tuple[int, int, int]] = []  # complete boxes: where one begins, its content begins and ends
    for brace in BRACE.finditer(text):
        if brace[0] != "}":
            opened.append((brace[0] != "{", brace.start(), brace.end()))
        elif opened:
            box, start, content = opened.pop()
            if box:
                while found and found[-1][0] > start:  # inside this one
                    found.pop()
                found.append((start, content, brace.start()))
    return [_plain(text[content:end]) for _, content, end in found]


def _plain(content: str) -> str:
    for _ in range(3):  # \textbf{\text{...}}
        content = LOOKS.sub(lambda m: m[1] or m[2] or "", content)
    return content.strip()


def observation(passages: Sequence[str], tokenizer: Tokenizer, limit: int) -> list[int]:
    """Ids of the passages that a search returned, one a line, cut after `limit` tokens."""
    if not passages:
        return tokenizer.encode(NOTHING_FOUND)[:limit]
    return [i for p in passages for i in tokenizer.encode(p + "\n")][:limit]
