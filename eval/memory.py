"""What memories hold: the memory rows of results.json, and readings.json, which the report's viewer shows.

Both come from rollouts that the evaluation reads anyway: nothing is read for them alone.

    gold        facts that the answer follows from, where the world knows them (the mini-world)
    stated      a fact is, by one of its phrasings word for word, whitespace aside, as a sentence that has its full
                stop; [MASK] and the name that it hides count as the same
    retention   [k] = (kept, asked) k sections after a gold fact was first readable, at k = 0 in the memory written on
                that very section. A fact is asked after for as long as no later section states it again: from there
                on it could have been noted anew instead of kept. It counts from where it stands, also where a reader
                can't know yet that it matters (the last link of a chain may come first).
    verbatim    share of the memories' sentences that the text read so far holds word for word
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data import InputError
from data.run.files import write_json
from data.tasks import MASK, Problem
from data.text.entities import occurs
from data.text.words import SENTENCE_END
from data.world.miniwiki import RELATIONS, Fact, MiniWorld
from eval.report.results import load_readings

FURTHER = 8  # k = 0 .. 7
LONGEST, SHOWN = 8, 4  # the longest evaluated questions up to this are measured, kept for the viewer
READINGS = 6  # documents of each task that are kept: the first ones, whatever a system makes of them
FULL_STOP = re.compile(r"(?<=[.!?])\s+")  # mini-world text has no abbreviations


def one_line(text: str) -> str:
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """The sentences of any text, line by line; what has neither letter nor digit is none."""
    pieces = (p.strip() for line in text.split("\n") for p in SENTENCE_END.split(line))
    return [p for p in pieces if any(map(str.isalnum, p))]


def phrasings(world: MiniWorld) -> dict[str, Fact]:
    """Every way in which the world could say each of its facts, not only the two that it chose."""
    return {p.format(s=f.subject, o=f.object): f
            for f in world.facts for p in (*RELATIONS[f.relation].forward, *RELATIONS[f.relation].backward)}


@dataclass
class Book:
    """A document, its sections as text, and what a good memory of it would hold.

    gold: facts; none of real text, whose phrases are None. shown: the sentences of the sections to mark as gold facts.
    outdated: those to mark as true once and not any more. marks: the strings to mark as the masked or asked entity.
    """

    problem: Problem
    task: str  # "masked", "question" or "changing"
    length: int  # sections' worth of tokens that it was made for
    sections: list[str]
    gold: frozenset[Fact] = frozenset()
    phrases: dict[str, Fact] | None = None
    shown: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)

    def stated(self, text: str) -> dict[Fact, str]:
        """{fact: the sentence that states it, as printed} of a text of the mini-world."""
        found = {}
        for piece in FULL_STOP.split(text.strip()):
            for body in (piece, piece.split(": ", 1)[-1]):  # the first of a passage stands behind its title
                plain = one_line(body)
                if self.task == "masked":
                    plain = plain.replace(MASK, self.problem.answers[0])
                if plain in (self.phrases or {}):
                    found.setdefault(self.phrases[plain], body)
        return found

    def show(self, evidence: Sequence[str], marks: Sequence[str]) -> Book:
        """Marks what states gold facts, or, of real text, sentences that stand in `evidence`: a section may cut one in
        two, and of a part of under 20 characters nobody knows where it is from."""
        if self.phrases is not None:
            found = [s for text in self.sections for fact, s in self.stated(text).items() if fact in self.gold]
        else:
            found = [s for text in self.sections for s in sentences(text)
                     if len(s) >= 20 and any(s in e for e in evidence)]
        self.shown, self.marks = list(dict.fromkeys(found)), list(dict.fromkeys(marks))
        return self


def masked_book(problem: Problem, sections: Sequence[str], length: int, world: MiniWorld | None = None,
                phrases: dict[str, Fact] | None = None) -> Book:
    """phrases: those of `world`; both None for real text."""
    gold = frozenset(world.clue_facts(problem.answers[0])) if world else frozenset()
    evidence = [s for p in problem.passages for s in sentences(p) if MASK in s]
    return Book(problem, "masked", length, list(sections), gold, phrases).show(evidence, [MASK])


def question_book(problem: Problem, sections: Sequence[str], length: int, finder, passages: Sequence[str],
                  facts: Sequence[Fact] = (), phrases: dict[str, Fact] | None = None) -> Book:
    """passages: the gold ones, rendered. facts: those of the question's chain, none where only the text is known."""
    marks = [n for f in facts for n in (f.subject, f.object) if occurs(problem.question, n)]
    if phrases is None:
        marks = [e.text for e in finder.find(problem.question)]
    return Book(problem, "question", length, list(sections), frozenset(facts), phrases).show(passages, marks)


def tally(books: Sequence[Book], readings: Sequence[Sequence[str]]) -> dict:
    """The figures of a memory row; None where there was nothing to count. readings: of each document the text of the
    memory after each section."""
    kept, asked, written, copied = [0] * FURTHER, [0] * FURTHER, 0, 0
    for book, memories in zip(books, readings, strict=True):
        said, noted = ([set(book.stated(text)) for text in texts] for texts in (book.sections, memories))
        for fact in book.gold:
            stands = [t for t, facts in enumerate(said) if fact in facts]
            again = (*stands, len(said), len(said))[1]
            for k in range(min(again - stands[0], FURTHER) if stands else 0):
                asked[k] += 1
                kept[k] += fact in noted[stands[0] + k]
        text = ""
        for section, memory in zip(book.sections, memories, strict=True):
            text += section
            read, own = f" {one_line(text)} ", [one_line(s) for s in sentences(memory)]
            written += len(own)
            copied += sum(f" {s} " in read for s in own)
    return {"n": len(books), "unit": "facts" if books[0].phrases is not None else None,
            "retention": [[a, b] for a, b in zip(kept, asked, strict=True) if b] or None,
            "verbatim": copied / written if written else None}


# ---- The evaluation's side ---------------------------------------------------------------------------------------


def chosen_lengths(lengths: Sequence[int]) -> tuple[int, int]:
    """(the length whose questions are measured, the one whose questions the viewer shows); 0: none is short enough."""
    measured = max((n for n in lengths if n <= LONGEST), default=0)
    return measured, max((n for n in lengths if n <= SHOWN), default=measured)


class Memories:
    """What an evaluation keeps of its readings: rows of results.json and readings.json beside it.

    Length 0 stands for the held-out masked documents. A system is measured by `note`, on any rank, and what is kept of
    it written by `keep`, on the first, before its rows.
    InputError where readings.json is none, or is of other documents.
    """

    def __init__(self, run, lengths: Sequence[int]):
        self.data, self.agent, self.seed = run.data, run.evaluated, run.c.seed
        self.masked_length = run.c.masked_sections
        self.measured, self.shown = chosen_lengths(lengths)
        self.counts = {0: min(READINGS, run.c.eval_masked)}  # by length: documents that are kept
        if self.shown:
            self.counts[self.shown] = min(READINGS, len(run.data.questions))
        self.books: dict[int, list[Book]] = {}  # by length: the same for every system
        self.path = run.folder.measured(run.c.world) / "readings.json"
        self.documents = load_readings(self.path)

    def _task(self, length: int) -> tuple[str, int]:
        return ("question", length) if length else ("masked", self.masked_length)

    def note(self, system: str, length: int, problems: Sequence[Problem],
             rollouts: Sequence) -> tuple[dict[str, dict], list[Kept]]:
        """{"memory": the row} where this length is measured, and what readings.json keeps of these rollouts."""
        if not rollouts or system == "base-one-window" or "@" in system:  # the first writes no memory
            return {}, []
        task, sections = self._task(length)
        count = self.counts.get(length, 0)
        measured = length in (0, self.measured)
        if length not in self.books:
            self.books[length] = list(self._books(problems if measured else problems[:count], length))
        books, read = self.books[length], [reading(self.agent, rollout) for rollout in rollouts]
        row = {"system": system, "seed": self.seed, "task": task, "length": sections}
        rows = {"memory": row | tally(books, [r["memories"] for r in read])} if measured else {}
        return rows, [(shown(book), r) for book, r in zip(books[:count], read, strict=False)]

    def _books(self, problems: Sequence[Problem], length: int) -> Iterator[Book]:
        data, world = self.data, self.data.held_out_world
        phrases = phrasings(world) if world else None
        for i, p in enumerate(problems):
            sections = [self.agent.tokenizer.decode(s) for s in self.agent.sections(p)]
            if not length:
                yield masked_book(p, sections, self.masked_length, world, phrases)
                continue
            gold = [passage.rendered for passage in data.questions[i].gold]
            facts = world.question_facts(i)[1] if world else ()
            yield question_book(p, sections, length, data.finder, gold, facts, phrases)

    def keep(self, system: str, kept: Sequence[Kept]) -> None:
        """Writes how `system` read documents to readings.json."""
        for new, read in kept:
            same = [d for d in self.documents if all(d[k] == new[k] for k in ("id", "task", "length"))]
            if not same:
                self.documents.append(new | {"systems": {}})
            elif same[0]["sections"] != new["sections"]:
                raise InputError(f"{self.path}: document {new['id']} has another text than this run reads; delete it "
                                 f"and results.json beside it to have both written anew")
            (same or self.documents[-1:])[0]["systems"][system] = read
        if kept:
            write_json(self.path, {"format": 1, "documents": self.documents})


Kept = tuple[dict, dict]  # a document of readings.json, and how it was read


def shown(book: Book) -> dict:
    p = book.problem
    return {"id": p.id, "task": book.task, "length": book.length, "kind": p.kind, "question": p.question,
            "answers": list(p.answers), "sections": [s.strip() for s in book.sections], "gold": book.shown,
            "marks": book.marks} | ({"outdated": book.outdated} if book.outdated else {})


def reading(agent, rollout) -> dict:
    return {"memories": [agent.tokenizer.decode(m).strip() for m in rollout.memories], "answer": rollout.answer,
            "correct": int(rollout.correct)}
