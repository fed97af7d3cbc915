"""What memories hold: the memory rows of results.json, and readings.json, which the report's viewer shows.

Both come from rollouts that the evaluation reads anyway: nothing is read for them alone. What is counted are *facts*
where the world knows them (the mini-world), else *entities* (the finder's); a row says which, as its unit.

    gold        facts that the answer follows from. Real text: the entities of the gold passages of a question, of the
                sentences around [MASK] in a masked document; those that the problem itself names are left out.
    stated      a fact: one of its phrasings word for word, whitespace aside, as a sentence that has its full stop;
                [MASK] and the name that it hides count as the same. An entity: it occurs (data.text.entities.occurs).
    retention   [k] = (kept, asked) k sections after a gold fact was first readable, at k = 0 in the memory written on
                that very section. A fact is asked after for as long as no later section states it again: from there
                on it could have been noted anew instead of kept. It counts from where it stands, also where a reader
                can't know yet that it matters (the last link of a chain may come first).
    per 100     different facts (gold ones) that a memory states and that a section read so far stated, summed over all
                memories, per 100 of their tokens.
    verbatim    share of the memories' sentences that the text read so far holds word for word.
    invented    share of the memories' entities that neither a section read so far nor the problem holds. The hidden
                entity of a masked document is not counted: naming it is the task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data import InputError
from data.run.files import write_json
from data.tasks import MASK, Problem
from data.text.corpus import SENTENCE_END
from data.text.entities import APOSTROPHE, HYPHEN, occurs
from data.world.miniwiki import RELATIONS, Fact, MiniWorld
from eval.report.results import load_readings

FURTHER = 8  # k = 0 .. 7
LONGEST, SHOWN = 8, 4  # the longest evaluated questions up to this are measured, kept for the viewer
READINGS = 6  # documents of each task that are kept: the first ones, whatever a system makes of them
TAIL = 100  # characters of the section before, in case an entity was cut in two (none is longer)
FULL_STOP = re.compile(r"(?<=[.!?])\s+")  # mini-world text has no abbreviations
VARIED = frozenset(HYPHEN + APOSTROPHE)  # `occurs` lets one stand for another


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


# ---- Documents with what is known of them ------------------------------------------------------------------------


@dataclass
class Book:
    """A document, its sections as text, and what a good memory of it would hold.

    gold: facts, or entities where `phrases` is None. shown: the sentences of the sections to mark as gold facts.
    outdated: those to mark as true once and not any more. marks: the strings to mark as the masked or asked entity.
    """

    problem: Problem
    task: str  # "masked" or "question"
    length: int  # sections' worth of tokens that it was made for
    sections: list[str]
    gold: frozenset
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
                if plain in self.phrases:
                    found.setdefault(self.phrases[plain], body)
        return found


def masked_book(problem: Problem, sections: Sequence[str], length: int, finder, world: MiniWorld | None = None,
                phrases: dict[str, Fact] | None = None) -> Book:
    """phrases: those of `world`; both None for real text."""
    if world:
        book = Book(problem, "masked", length, list(sections), frozenset(world.clue_facts(problem.answers[0])), phrases)
        book.shown = gold_sentences(book)
    else:
        clues = [s for p in problem.passages for s in sentences(p) if MASK in s]
        gold = frozenset(e.text for s in clues for e in finder.find(s) if not occurs(problem.question, e.text))
        book = Book(problem, "masked", length, list(sections), gold)
        book.shown = list(dict.fromkeys(s for text in sections for s in sentences(text) if MASK in s))
    book.marks = [MASK]
    return book


def question_book(problem: Problem, sections: Sequence[str], length: int, finder, passages: Sequence[str],
                  facts: Sequence[Fact] = (), phrases: dict[str, Fact] | None = None) -> Book:
    """passages: the gold ones, rendered. facts: those of the question's chain, none where only the text is known."""
    if phrases is not None:
        book = Book(problem, "question", length, list(sections), frozenset(facts), phrases)
        names = [n for f in facts for n in (f.subject, f.object)]
        book.shown, book.marks = gold_sentences(book), [n for n in names if occurs(problem.question, n)]
    else:
        gold = frozenset(e.text for p in passages for e in finder.find(p) if not occurs(problem.question, e.text))
        book = Book(problem, "question", length, list(sections), gold)
        # a section may cut a sentence in two; of a part of under 20 characters nobody knows where it is from
        book.shown = [s for text in sections for s in sentences(text) if len(s) >= 20 and any(s in p for p in passages)]
        book.marks = [e.text for e in finder.find(problem.question)]
    book.shown, book.marks = list(dict.fromkeys(book.shown)), list(dict.fromkeys(book.marks))
    return book


def gold_sentences(book: Book) -> list[str]:
    return [s for text in book.sections for fact, s in book.stated(text).items() if fact in book.gold]


# ---- Counting ----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over documents; `row` makes the shares."""

    unit: str
    documents: int = 0
    kept: list[int] = field(default_factory=lambda: [0] * FURTHER)
    asked: list[int] = field(default_factory=lambda: [0] * FURTHER)
    facts: int = 0
    gold: int = 0
    tokens: int = 0
    sentences: int = 0
    verbatim: int = 0
    entities: int = 0
    invented: int = 0

    def add(self, book: Book, memories: Sequence[str], tokens: int, finder) -> None:
        """memories: the text after each section, of so many tokens in all."""
        found = [{e.text for e in finder.find(m)} for m in memories]
        sections, noted = self._stated(book, memories, found)
        self.documents += 1
        self.tokens += tokens
        self._retention(book.gold, sections, noted)
        read = set()
        for section, memory in zip(sections, noted, strict=True):
            read |= section
            self.facts += len(memory & read)
            self.gold += len(memory & read & book.gold)
        self._copies(book, memories)
        self._inventions(book, found)

    @staticmethod
    def _stated(book: Book, memories, found) -> tuple[list[set], list[set]]:
        """What each section and each memory states."""
        if book.phrases is not None:
            return tuple([set(book.stated(text)) for text in texts] for texts in (book.sections, memories))
        wanted = book.gold.union(*found)
        sections = [{e for e in wanted if text.holds(e)} for text in map(Searchable, book.sections)]
        return sections, [f | {g for g in book.gold if occurs(m, g)} for f, m in zip(found, memories, strict=True)]

    def _retention(self, gold: frozenset, sections: Sequence[set], noted: Sequence[set]) -> None:
        for fact in gold:
            stands = [t for t, section in enumerate(sections) if fact in section]
            if not stands:
                continue
            first, again = stands[0], stands[1] if len(stands) > 1 else len(sections)
            for k in range(min(again - first, FURTHER)):
                self.asked[k] += 1
                self.kept[k] += fact in noted[first + k]

    def _copies(self, book: Book, memories: Sequence[str]) -> None:
        text = ""
        for section, memory in zip(book.sections, memories, strict=True):
            text += section
            read = f" {one_line(text)} "
            own = [one_line(s) for s in sentences(memory)]
            self.sentences += len(own)
            self.verbatim += sum(f" {s} " in read for s in own)

    def _inventions(self, book: Book, found: Sequence[set[str]]) -> None:
        hidden = {a.lower() for a in book.problem.answers} if book.task == "masked" else set()
        tails = ["", *(s[-TAIL:] for s in book.sections)]
        texts = [Searchable(tail + s) for tail, s in zip(tails, book.sections, strict=False)]
        known = {}  # entity -> the first section it is in
        for e in set().union(*found):
            asked = occurs(book.problem.question, e)
            known[e] = 0 if asked else next((t for t, text in enumerate(texts) if text.holds(e)), len(texts))
        for t, entities in enumerate(found):
            counted = [e for e in entities if e.lower() not in hidden]
            self.entities += len(counted)
            self.invented += sum(known[e] > t for e in counted)

    def row(self) -> dict:
        """The figures of a memory row; None where there was nothing to count."""
        last = max((k for k, n in enumerate(self.asked) if n), default=-1)
        share = lambda part, whole: part / whole if whole else None  # noqa: E731
        return {"n": self.documents, "unit": self.unit,
                "retention": [[self.kept[k], self.asked[k]] for k in range(last + 1)] or None,
                "facts_per_100": share(100 * self.facts, self.tokens),
                "gold_per_100": share(100 * self.gold, self.tokens) if last >= 0 else None,
                "verbatim": share(self.verbatim, self.sentences), "invented": share(self.invented, self.entities)}


class Searchable:
    """A text that is searched for many entities: most are not in it, which a plain search tells faster."""

    def __init__(self, text: str):
        self.text = one_line(text)
        self.lower = self.text.lower()

    def holds(self, entity: str) -> bool:
        plain = entity.isascii() and VARIED.isdisjoint(entity)
        return (not plain or one_line(entity).lower() in self.lower) and occurs(self.text, entity)


# ---- The evaluation's side ---------------------------------------------------------------------------------------


def chosen_lengths(lengths: Sequence[int]) -> tuple[int, int]:
    """(the length whose questions are measured, the one whose questions the viewer shows); 0: none is short enough."""
    measured = max((n for n in lengths if n <= LONGEST), default=0)
    return measured, max((n for n in lengths if n <= SHOWN), default=measured)


class Memories:
    """What an evaluation keeps of its readings: rows of results.json and readings.json beside it.

    rows: those that results.json has so far. Length 0 stands for the held-out masked documents. A system is measured by
    `note`, on any rank, and what is kept of it written by `keep`, on the first.
    InputError where readings.json is none, or is of other documents.
    """

    def __init__(self, run, lengths: Sequence[int], rows: Sequence[dict]):
        self.data, self.agent, self.seed, self.rows = run.data, run.evaluated, run.c.seed, rows
        self.masked_length = run.c.masked_sections
        self.measured, self.shown = chosen_lengths(lengths)
        self.counts = {0: min(READINGS, run.c.eval_masked)}  # by length: documents that are kept
        if self.shown:
            self.counts[self.shown] = min(READINGS, len(run.data.questions))
        self.books: dict[int, list[Book]] = {}  # by length: the same for every system
        self.path = run.folder.measured(run.c.world) / "readings.json"
        self.documents = load_readings(self.path, "length:count kind:text")

    def _task(self, length: int) -> tuple[str, int]:
        return ("question", length) if length else ("masked", self.masked_length)

    def has(self, system: str, length: int | str) -> bool:
        """Whether nothing is left to note of `system` at this length; of other jobs than lengths nothing is, nor of
        policies that were kept on the way."""
        if system == "base-one-window" or "@" in system or type(length) is not int:  # the first writes no memory
            return True
        task, sections = self._task(length)
        row = any((r.get("system"), r.get("task"), r.get("length")) == (system, task, sections) for r in self.rows)
        kept = sum(d["task"] == task and d["length"] == sections and system in d["systems"] for d in self.documents)
        return (row or length not in (0, self.measured)) and kept >= self.counts.get(length, 0)

    def note(self, system: str, length: int, problems: Sequence[Problem],
             rollouts: Sequence) -> tuple[dict[str, dict], list[Kept]]:
        """{"memory": the row} where this length is measured, and what readings.json keeps of these rollouts."""
        if not rollouts or self.has(system, length):
            return {}, []
        task, sections = self._task(length)
        count = self.counts.get(length, 0)
        measured = length in (0, self.measured)
        if length not in self.books:
            self.books[length] = list(self._books(problems if measured else problems[:count], length))
        tally, texts = None, [[self.agent.tokenizer.decode(m).strip() for m in r.memories] for r in rollouts]
        for book, rollout, memories in zip(self.books[length], rollouts, texts, strict=False):
            tally = tally or Tally("entities" if book.phrases is None else "facts")
            if measured:
                tally.add(book, memories, sum(map(len, rollout.memories)), self.data.finder)
        kept = [(shown(book), reading(self.agent, rollout))
                for book, rollout in zip(self.books[length][:count], rollouts, strict=False)]
        row = {"system": system, "seed": self.seed, "task": task, "length": sections}
        return {"memory": row | tally.row()} if measured else {}, kept

    def _books(self, problems: Sequence[Problem], length: int) -> Iterator[Book]:
        data, world = self.data, self.data.held_out_world
        phrases = phrasings(world) if world else None
        for i, p in enumerate(problems):
            sections = [self.agent.tokenizer.decode(s) for s in self.agent.sections(p)]
            if not length:
                yield masked_book(p, sections, self.masked_length, data.finder, world, phrases)
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
                raise InputError(f"{self.path}: document {new['id']} has another text than this run reads; delete the "
                                 f"file to have it written anew")
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
