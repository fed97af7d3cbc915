"""The mini-world: an invented, consistent encyclopaedia of any size, and questions that follow from it.

It stands in for Wikipedia and HotpotQA where neither a network nor a large model is at hand. Nothing in it
exists outside this file, so nothing can be known beforehand; what a reader can *learn* are its naming rules:

    a person   = first name of whom they were named after + family name of their parent    Joren Tellin
    a town     = family name of its founder + an ending for its landscape                  Tellin|ford (river)
    a company  = family name of its founder + a word for its trade                         Tellin Mills (flour)
    a work     = its genre + "of" + the town it is set in                                  Ballad of Tellinford
    a river    = family name of its explorer + "River"                                     Oskel River

A masked name can therefore be inferred from clues that stand in *other* passages, joined with the rule
(the paper's task A: clues have to be gathered from several places and joined with what the model knows).

Every fact (subject, relation, object) is stated on the page of its subject and on that of its object, where the
object has one, each in one of three phrasings that begin with the name of the page. The gold passages of a question
are on the pages that its chain visits, as in HotpotQA. Full names are split by a hash: a world of split "train" and
one of split "eval" have no person, town, company, work or river in common, whatever their seeds and sizes. A world of
split "dev", on which budgets are chosen, is a third as large: names that training may not use either, of families that
the "eval" world of the same size and seed does not have.

A passage holds one fact: with three, a reader this small noted half of what mattered, because it picked another
sentence about the right name. So relevance is a matter of names here, as for [MASK], and answering one of relations.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from data.text.corpus import Corpus, Passage, Question


class Fact(NamedTuple):
    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Relation:
    """How a relation is said. `forward` starts with the subject {s}, `backward` with the object {o}."""

    subject: str  # type of the subject
    object: str  # type of the object: an entity type, or "year", "number", "word"
    forward: tuple[str, ...]
    backward: tuple[str, ...]  # empty where the object has no passage of its own
    noun: str  # "the {noun} of X" in questions; "" where questions do not use it
    inverse: str  # "the {inverse} X" in questions; "" likewise


RELATIONS = {
    "parent": Relation("person", "person",
        ("{s} is a child of {o}.", "{s} descends from {o}.", "{s} was raised by {o}."),
        ("{o} is the parent of {s}.", "{o} raised {s}.", "{o} had a child, {s}."),
        "parent", "child of"),
    "namesake": Relation("person", "person",
        ("{s} was named after {o}.", "{s} is a namesake of {o}.", "{s} recalls {o} by name."),
        ("{o} gave a name to {s}.", "{o} lent a name to {s}.", "{o} is recalled by {s}."),
        "namesake", "person named after"),
    "birthplace": Relation("person", "town",
        ("{s} was born in {o}.", "{s} is a native of {o}.", "{s} hails from {o}."),
        ("{o} is the birthplace of {s}.", "{o} saw the birth of {s}.", "{o} is home to {s}."),
        "birthplace", "native of"),
    "birth_year": Relation("person", "year",
        ("{s} was born in {o}.", "{s} has lived since {o}.", "{s} came of age after {o}."), (),
        "birth year", ""),
    "employer": Relation("person", "company",
        ("{s} works for {o}.", "{s} earns wages at {o}.", "{s} is employed by {o}."),
        ("{o} employs {s}.", "{o} pays {s}.", "{o} hired {s}."),
        "employer", "employee of"),
    "founder": Relation("town", "person",
        ("{s} was founded by {o}.", "{s} was built by {o}.", "{s} was settled by {o}."),
        ("{o} founded {s}.", "{o} built {s}.", "{o} settled {s}."),
        "founder", "town founded by"),
    "landscape": Relation("town", "word",
        ("{s} lies {o}.", "{s} was laid out {o}.", "{s} spreads {o}."), (), "", ""),
    "founding_year": Relation("town", "year",
        ("{s} dates from {o}.", "{s} has stood since {o}.", "{s} was begun in {o}."), (),
        "founding year", ""),
    "population": Relation("town", "number",
        ("{s} has {o} people.", "{s} houses {o} people.", "{s} counts {o} souls."), (),
        "population", ""),
    "river": Relation("town", "river",
        ("{s} stands on {o}.", "{s} drinks from {o}.", "{s} bridges {o}."),
        ("{o} flows through {s}.", "{o} waters {s}.", "{o} runs past {s}."),
        "river", "town on"),
    "owner": Relation("company", "person",
        ("{s} was started by {o}.", "{s} belongs to {o}.", "{s} is run by {o}."),
        ("{o} started {s}.", "{o} runs {s}.", "{o} owns {s}."),
        "owner", "company of"),
    "trade": Relation("company", "word",
        ("{s} makes {o}.", "{s} lives from {o}.", "{s} sells {o}."), (), "", ""),
    "seat": Relation("company", "town",
        ("{s} has its seat in {o}.", "{s} is based in {o}.", "{s} rents a yard in {o}."),
        ("{o} is the seat of {s}.", "{o} shelters {s}.", "{o} taxes {s}."),
        "seat", "company based in"),
    "staff": Relation("company", "number",
        ("{s} keeps {o} workers.", "{s} has {o} workers.", "{s} feeds {o} hands."), (),
        "staff", ""),
    "author": Relation("work", "person",
        ("{s} was written by {o}.", "{s} was penned by {o}.", "{s} is by {o}."),
        ("{o} wrote {s}.", "{o} penned {s}.", "{o} composed {s}."),
        "author", "work by"),
    "genre": Relation("work", "word",
        ("{s} is {o}.", "{s} passes for {o}.", "{s} reads like {o}."), (), "", ""),
    "setting": Relation("work", "town",
        ("{s} is set in {o}.", "{s} tells of {o}.", "{s} plays in {o}."),
        ("{o} is the scene of {s}.", "{o} appears in {s}.", "{o} inspired {s}."),
        "setting", "work set in"),
    "publication": Relation("work", "year",
        ("{s} was printed in {o}.", "{s} has been read since {o}.", "{s} appeared in {o}."), (),
        "printing year", ""),
    "explorer": Relation("river", "person",
        ("{s} was explored by {o}.", "{s} was mapped by {o}.", "{s} was sailed by {o}."),
        ("{o} explored {s}.", "{o} mapped {s}.", "{o} sailed {s}."),
        "explorer", "river explored by"),
    "length": Relation("river", "number",
        ("{s} is {o} miles long.", "{s} runs for {o} miles.", "{s} measures {o} miles."), (),
        "length", ""),
}

LANDSCAPES = {"ford": "at a crossing", "haven": "by the sea", "berg": "on a hill", "holt": "in a forest",
              "mere": "beside a lake", "moor": "on a heath", "stead": "among farms", "gate": "at a pass"}
TRADES = {"Mills": "flour", "Yards": "ships", "Kilns": "bricks", "Looms": "cloth",
          "Forge": "iron", "Press": "paper", "Cellars": "wine", "Lamps": "oil"}
GENRES = {"Ballad": "a song", "Chronicle": "a history", "Comedy": "a merry play", "Elegy": "a lament",
          "Legend": "a heroic tale", "Tragedy": "a sad play", "Atlas": "a book of maps", "Mystery": "a crime story"}

FILLERS = ("The {a} {b} draws visitors.", "The {b} is {a} in every season.", "A {a} {b} is shown there.",
           "In spring the {b} is {a}.", "The {b} is as {a} as ever.", "The old recall a {a} {b}.")
ADJECTIVES = ("quiet", "bright", "narrow", "famous", "golden", "steep", "cheerful", "mellow", "humble", "noisy")
NOUNS = ("weather", "bridge", "market", "garden", "tower", "festival", "bread", "harbour", "library", "orchard")

# What a masked name can be inferred from: type -> the relations that together determine the name.
CLUES = {"person": ("parent", "namesake"), "town": ("founder", "landscape"), "company": ("owner", "trade"),
         "work": ("genre", "setting"), "river": ("explorer",)}

QUESTION_KINDS = {"bridge": 0.35, "inverse": 0.25, "date": 0.1, "number": 0.1, "comparison": 0.1, "three-hop": 0.1}
# What the search benchmarks of the paper's Table 2 ask, as question kinds of this world: TriviaQA, NQ and PopQA one
# fact, Bamboogle and HotpotQA two in a row, 2WikiMultiHopQA a comparison, MuSiQue three in a row.
FAMILIES = {"triviaqa": ("one-hop inverse",), "bamboogle": ("date", "number"), "hotpotqa": ("bridge", "inverse"),
            "nq": ("one-hop value",), "popqa": ("one-hop",), "2wikimultihopqa": ("comparison",),
            "musique": ("three-hop",)}
COMPARED = {"birth_year": "Who was born earlier", "founding_year": "Which was founded earlier",
            "publication": "Which was printed earlier", "population": "Which has fewer inhabitants"}
ASKING = ("What is {}?", "Name {}.", "Tell me {}.")

_ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "th", "v", "w", "z")
_CODAS = ("l", "n", "r", "s", "k", "m", "nd", "lt", "rn", "sk")


def _name_pool(kind: str, size: int) -> list[str]:
    """`size` different invented names; a longer pool begins with the shorter one. Two syllables, later three."""
    rng, names = random.Random(f"names:{kind}"), {}
    while len(names) < size:
        syllables = 2 + (len(names) > 1000)
        word = "".join(rng.choice(_ONSETS) + rng.choice("aeiou") for _ in range(syllables))
        word += rng.choice(_CODAS) if kind == "family" else rng.choice(("", "n", "s"))
        names.setdefault(word.capitalize(), None)
    return list(names)


def split_of(name: str) -> str:
    """"eval" for a fifth of all names, else "train": a property of the name alone."""
    return "eval" if hashlib.sha256(name.encode()).digest()[0] % 5 == 0 else "train"


class MiniWorld:
    """A world of about 14 * `people` short passages, the same for the same (people, seed, split).

    passages: list[Passage], one for each thing said of an entity. stated: the facts of each passage. fact_of:
    sentence -> Fact, fillers absent. facts: all facts. kind_of: entity name -> its type.
    """

    def __init__(self, people: int = 400, seed: int = 0, split: str = "train"):
        if people < 40:
            raise ValueError(f"people={people}: a world needs at least 40 to have enough relations")
        self.people, self.seed, self.split = people, seed, split
        self.names = "train" if split == "train" else "eval"  # whose full names it may use
        self.rng = random.Random(f"miniwiki:{people}:{seed}:{split}")
        self.kind_of: dict[str, str] = {}
        self.facts: list[Fact] = []
        self._populate()
        self.by_subject = {(f.subject, f.relation): f.object for f in self.facts}
        self.by_object: dict[tuple[str, str], list[str]] = defaultdict(list)
        for f in self.facts:
            self.by_object[f.object, f.relation].append(f.subject)
        self._write()

    # ---- the world -------------------------------------------------------------------------------------

    def _new(self, kind: str, name: str) -> bool:
        if name in self.kind_of or split_of(name) != self.names:
            return False
        self.kind_of[name] = kind
        return True

    def _add(self, subject: str, relation: str, object: str | int) -> None:
        self.facts.append(Fact(subject, relation, str(object)))

    def _populate(self) -> None:
        rng, n = self.rng, self.people
        given, family = _name_pool("given", 120), _name_pool("family", max(200, n // 4))
        if self.split == "dev":  # a third as large, of families that the evaluation world leaves
            taken, n = random.Random(f"miniwiki:{n}:{self.seed}:eval").sample(family, n // 4), max(40, n // 3)
            family = [f for f in _name_pool("family", max(200, len(taken) + n // 4)) if f not in taken]
        family = rng.sample(family, n // 4)
        persons, bearers = [], defaultdict(list)  # a first or family name -> who bears it so far
        while len(persons) < n:
            first, last = rng.choice(given), rng.choice(family)
            name = f"{first} {last}"
            # names are drawn evenly (a guess must not pay) and then explained by an earlier bearer, if any
            namesake = rng.choice(bearers[first]) if bearers[first] else ""
            parent = rng.choice(bearers[last]) if bearers[last] else ""
            if not self._new("person", name):
                continue
            persons.append(name)
            bearers[first].append(name)
            bearers[last].append(name)
            if parent:
                self._add(name, "parent", parent)
            if namesake:
                self._add(name, "namesake", namesake)
            self._add(name, "birth_year", rng.randint(1700, 1899))
        rivers = self._named(n // 10, "river", lambda: [("explorer", rng.choice(persons))],
                             lambda c: f"{c[0][1].split()[1]} River")
        towns = self._named(n // 2, "town", lambda: [("founder", rng.choice(persons)),
                                                     ("landscape", rng.choice(list(LANDSCAPES)))],
                            lambda c: c[0][1].split()[1] + c[1][1])
        companies = self._named(n // 4, "company", lambda: [("owner", rng.choice(persons)),
                                                            ("trade", rng.choice(list(TRADES)))],
                                lambda c: f"{c[0][1].split()[1]} {c[1][1]}")
        works = self._named(n // 4, "work", lambda: [("genre", rng.choice(list(GENRES))),
                                                     ("setting", rng.choice(towns))],
                            lambda c: f"{c[0][1]} of {c[1][1]}")
        for name in rivers:
            self._add(name, "length", rng.randint(100, 999))
        for name in towns:
            self._add(name, "founding_year", rng.randint(1400, 1699))
            self._add(name, "population", rng.randint(1000, 9999))
            self._add(name, "river", rng.choice(rivers))
        for name in companies:
            self._add(name, "seat", rng.choice(towns))
            self._add(name, "staff", rng.randint(100, 999))
        for name in works:
            self._add(name, "author", rng.choice(persons))
            self._add(name, "publication", rng.randint(1700, 1899))
        for name in persons:
            self._add(name, "birthplace", rng.choice(towns))
            if rng.random() < 0.5:
                self._add(name, "employer", rng.choice(companies))

    def _named(self, count, kind, draw, compose) -> list[str]:
        """Up to `count` new entities of `kind`, each drawn as [(relation, object), ...] and named by `compose`.

        Fewer where the names run out: a fifth of the families gives an eval world few rivers.
        """
        names = []
        words = {"landscape": LANDSCAPES, "trade": TRADES, "genre": GENRES}
        for _ in range(60 * count):
            if len(names) == count:
                break
            clues = draw()
            name = compose(clues)
            if self._new(kind, name):
                names.append(name)
                for relation, value in clues:
                    self._add(name, relation, words[relation][value] if relation in words else value)
        return names

    # ---- its encyclopaedia -------------------------------------------------------------------------------

    def _write(self) -> None:
        rng = self.rng
        page: dict[str, list[tuple[str, Fact]]] = {name: [] for name in self.kind_of}
        self.fact_of: dict[str, Fact] = {}
        for fact in self.facts:
            spoken = RELATIONS[fact.relation]
            for home, phrasings in ((fact.subject, spoken.forward), (fact.object, spoken.backward)):
                if phrasings:
                    sentence = rng.choice(phrasings).format(s=fact.subject, o=fact.object)
                    self.fact_of[sentence] = fact
                    page[home].append((sentence, fact))
        self.passages: list[Passage] = []
        self.stated: list[tuple[Fact, ...]] = []
        for name, lines in page.items():
            rng.shuffle(lines)
            for sentence, fact in lines:  # a passage each: what is relevant to a name is a matter of that name alone
                part = [sentence]
                if rng.random() < 0.5:
                    filler = rng.choice(FILLERS).format(a=rng.choice(ADJECTIVES), b=rng.choice(NOUNS))
                    part.insert(rng.randrange(2), filler)
                self.passages.append(Passage(name, " ".join(part)))
                self.stated.append((fact,))
        self.where: dict[Fact, list[int]] = defaultdict(list)  # fact -> passages that state it
        for i, facts in enumerate(self.stated):
            for f in facts:
                self.where[f].append(i)

    def corpus(self) -> Corpus:
        """The passages as a Corpus that also knows which masked names its documents determine."""
        return Corpus(self.passages, f"miniworld-{self.split}-{self.people}-{self.seed}", clues=self.determined)

    def clue_facts(self, entity: str) -> tuple[Fact, ...]:
        """The facts that together determine the name `entity`; empty where the rules don't (a root person)."""
        relations = CLUES.get(self.kind_of.get(entity, ""), ())
        found = [(r, self.by_subject.get((entity, r))) for r in relations]
        return tuple(Fact(entity, r, o) for r, o in found) if all(o for _, o in found) else ()

    def determined(self, entity: str, indices) -> bool:
        """Whether a document of these passages determines `entity` although its name is masked everywhere."""
        clues, there = self.clue_facts(entity), set(indices)
        return bool(clues) and all(there.intersection(self.where[f]) for f in clues)

    # ---- questions ---------------------------------------------------------------------------------------

    def _step(self, entity: str, rng: random.Random, last: str | None) -> tuple[str, Fact, str] | None:
        """One hop from `entity`: (noun phrase with {}, the fact used, where it leads), or None."""
        kind, options = self.kind_of[entity], []
        for name, r in RELATIONS.items():
            if r.noun and r.subject == kind and (r.object in (last or CLUES)) and (entity, name) in self.by_subject:
                there = self.by_subject[entity, name]
                options.append((f"the {r.noun} of {{}}", Fact(entity, name, there), there))
            if r.inverse and r.object == kind and (last is None or r.subject in last):
                sources = self.by_object.get((entity, name), [])
                if len(sources) == 1:  # an inverse is a question only where it has one answer
                    options.append((f"the {r.inverse} {{}}", Fact(sources[0], name, entity), sources[0]))
        return rng.choice(options) if options else None

    def _chain(self, kind: str, rng: random.Random):
        ends = {"date": ("year",), "number": ("number",), "one-hop value": ("year", "number")}.get(kind)
        entity = start = rng.choice(list(self.kind_of))
        phrase, facts, seen = "{}", [], [start]
        hops = 3 if kind == "three-hop" else 1 if kind.startswith("one-hop") else 2
        for hop in range(hops):
            step = self._step(entity, rng, ends if hop == hops - 1 else None)
            if step is None or step[2] in seen:
                return None
            noun, fact, entity = step
            phrase = noun.format(phrase)
            facts.append(fact)
            seen.append(entity)
        inverse = any(f.object == before for f, before in zip(facts, seen, strict=False))
        if kind in ("bridge", "inverse", "one-hop", "one-hop inverse") and inverse != kind.endswith("inverse"):
            return None
        return rng.choice(ASKING).format(phrase.format(start)), entity, facts, seen[:-1]

    def _comparison(self, rng: random.Random):
        relation = rng.choice(list(COMPARED))
        names = [f.subject for f in self.facts if f.relation == relation]
        a, b = rng.sample(names, 2)
        x, y = (int(self.by_subject[n, relation]) for n in (a, b))
        if x == y:
            return None
        facts = [Fact(n, relation, self.by_subject[n, relation]) for n in (a, b)]
        return f"{COMPARED[relation]}, {a} or {b}?", a if x < y else b, facts, [a, b]

    def question_facts(self, index: int, seed: int = 0) -> tuple[Question, list[Fact]]:
        """Question number `index` and the facts of its chain in order: a function of (world, seed, index)."""
        rng = random.Random(f"question:{self.people}:{self.seed}:{self.split}:{seed}:{index}")
        kind = rng.choices(list(QUESTION_KINDS), list(QUESTION_KINDS.values()))[0]
        return self._question(kind, rng, f"{self.split}-{self.seed}-{seed}-{index}")

    def family_facts(self, family: str, index: int, seed: int = 0) -> tuple[Question, list[Fact]]:
        """The same of question number `index` of one of the FAMILIES."""
        rng = random.Random(f"{family}:{self.people}:{self.seed}:{self.split}:{seed}:{index}")
        kind = rng.choice(FAMILIES[family])
        return self._question(kind, rng, f"{family}-{self.split}-{self.seed}-{seed}-{index}")

    def _question(self, kind: str, rng: random.Random, id_: str) -> tuple[Question, list[Fact]]:
        made = None
        while made is None:
            made = self._comparison(rng) if kind == "comparison" else self._chain(kind, rng)
        text, answer, facts, visited = made
        gold = tuple(next(self.passages[i] for i in self.where[fact] if self.passages[i].title == name)
                     for fact, name in zip(facts, visited, strict=True))
        return Question(id_, text, (answer,), gold, (), kind), facts

    def question(self, index: int, seed: int = 0) -> Question:
        return self.question_facts(index, seed)[0]


def main() -> None:
    """Prints a text of the evaluation world to read, and on standard error what can be asked about it."""
    argparse.ArgumentParser(prog="python -m data.world.miniwiki", description=main.__doc__).parse_args()
    world, rng = MiniWorld(600, 0, "eval"), random.Random(0)
    questions = [world.question(rng.randrange(1 << 20)) for _ in range(3)]
    gold = {p for q in questions for p in q.gold}
    others = [p for p in world.passages if p not in gold]
    chosen = [*gold, *rng.sample(others, 60 - len(gold))]
    chosen.sort(key=lambda p: p.rendered)  # a set has no order of its own
    rng.shuffle(chosen)
    for q in questions:
        print(f"{q.question}  ({q.answers[0]})", file=sys.stderr)
    print("\n".join(p.rendered for p in chosen))


if __name__ == "__main__":
    main()
