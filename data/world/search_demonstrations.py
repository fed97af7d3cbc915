"""Demonstrations of search QA: a simulated searcher answers two questions of the mini-world with the search tool.

It knows what to look for next and recognises what it finds, but it is mediocre in two things that reinforcement
learning can repair:

    its state    six times in ten it forgets the old one and notes what it has just found alone, like the careless
                 reader of data.world.demonstrations: what it has lost it has to search for again
    its queries  two in five say what is asked in the words of the passages (which finds it 95% of the time), two in
                 five in those of the question (50%), the others give the bare name (40%)
"""

from __future__ import annotations

import random
import re

from data.search import CORRECTION, observation
from data.world.demonstrations import Demo, Demonstrator, sentences
from data.world.miniwiki import FAMILIES, RELATIONS, Fact

DILIGENT_SEARCH = 0.42  # share of turns that copy the old state
QUERIES = {"passages' words": 0.4, "question's words": 0.4, "name": 0.2}
SLIPS = 0.06  # share of turns after which a correction is shown instead of passages: they teach to go on
UNKNOWN = "unknown"  # what is answered in the last turn where nothing was found
SMALL_WORDS = {"a", "after", "at", "been", "by", "for", "from", "has", "have", "in", "is", "its", "of", "on", "out",
               "the", "to", "up", "was"}


def words_of(relation: str) -> list[str]:
    """The content words of a relation's phrasings: ["founded", "built", "settled"]."""
    text = " ".join(re.sub(r"\{.\}", "", phrasing) for phrasing in RELATIONS[relation].forward)
    return [w for w in dict.fromkeys(re.findall("[a-z]+", text)) if w not in SMALL_WORDS]


def query(entity: str, fact: Fact, rng: random.Random) -> str:
    """What a mediocre searcher asks to find `fact` from `entity`, its subject or object."""
    relation, form = RELATIONS[fact.relation], rng.choices(list(QUERIES), list(QUERIES.values()))[0]
    asked = {"passages' words": " ".join(words_of(fact.relation)), "name": "",
             "question's words": relation.noun if entity == fact.subject else relation.inverse}[form]
    return f"{entity} {asked}".strip()


class Searcher:
    """Draws episodes over the world and the prompts of a Demonstrator. turns, hits, result, act: as in Config."""

    def __init__(self, demo: Demonstrator, turns: int, hits: int, result: int, act: int):
        self.demo, self.turns, self.hits, self.result, self.act = demo, turns, hits, result, act

    def episode(self, seed: int, index: int, rng: random.Random) -> Demo:
        """One episode: its turns share the instruction and the questions."""
        demo, family = self.demo, rng.choice(list(FAMILIES))
        pair = [demo.world.family_facts(family, index + i, seed) for i in range(2)]
        asked, chains = [q for q, _ in pair], [facts for _, facts in pair]
        chained = family != "2wikimultihopqa"  # a comparison names both of its facts
        memory, last, shown = [], "", demo.prompts.no_result
        found: list[str] = []  # sentences returned last
        suffixes = []
        for turn in range(self.turns):
            final = turn == self.turns - 1
            prefix, given = demo.prompts.search([q.question for q in asked], last, shown, demo.memory_ids(memory),
                                                final)
            memory = self.note(memory, found, chains, chained, rng)
            known = {demo.world.fact_of.get(s) for s in memory}
            steps = [next(((q.question, chain, f) for f in chain if f not in known), None)
                     for q, chain in zip(asked, chains, strict=True)]
            missing = [s for s in steps if s]
            done = final or not missing
            if done:
                text = "\nAnswer:" + "".join(f"\\boxed{{ {UNKNOWN if step else q.answers[0]}}}"
                                             for q, step in zip(asked, steps, strict=True))
            else:
                question, chain, fact = missing[0]
                last = query(known_end(question, chain, fact), fact, rng)
                text = f"\nSearch: {last}"
            ids = demo.tokenizer.encode(text)
            if len(ids) > self.act:
                break
            suffixes.append((given, [*demo.memory_ids(memory), *ids, demo.tokenizer.end]))
            if done:
                break
            if rng.random() < SLIPS:
                found, shown = [], demo.tokenizer.encode(CORRECTION)
                continue
            passages = [demo.world.passages[i].rendered for i in demo.corpus.search(last, self.hits)]
            shown = observation(passages, demo.tokenizer, self.result)
            found = sentences(demo.tokenizer.decode(shown))
        return Demo("search", prefix, suffixes)

    def note(self, memory: list[str], found: list[str], chains: list[list[Fact]], chained: bool,
             rng: random.Random) -> list[str]:
        """The next state: the old one or nothing, and the sentences found that the questions' chains lead to."""
        fact_of = self.demo.world.fact_of
        old = memory if rng.random() < DILIGENT_SEARCH else []
        held, said = {fact_of.get(s) for s in old}, {fact_of.get(s): s for s in reversed(found)}
        new = []
        for chain in chains:
            for fact in chain:
                if fact in said and fact not in held:
                    new.append(said[fact])
                elif fact not in held and chained:
                    break  # what the next one is about is not known yet
        return self.demo.fit(old + new)


def known_end(question: str, chain: list[Fact], fact: Fact) -> str:
    """From which end a fact is looked up: the one that the question names, or that the facts before it gave."""
    before = {name for f in chain[:chain.index(fact)] for name in (f.subject, f.object)}
    return fact.subject if fact.subject in before or fact.subject in question else fact.object
