"""Demonstrations for the base model that stands in for the paper's instruct model.

A simulated reader goes through mini-world documents and shows four formats: update the memory, answer from a
memory, recall a masked entity, answer straight from a text. Its memories are *valid but mediocre*: verbatim
sentences, and what matters in the section just read is reliably noted, but from one update to the next the reader is

    diligent (two in five of the updates on masks, a fifth of those on questions)
        copies the old memory, then adds what is new
    careless (the rest)
        forgets the old memory and notes what matters in this section alone

Reinforcement learning can raise the share of the first. Questions get fewer of them because the base carries more
of their facts than it is shown. Most readers begin with notes of random pages, so that what matters is also added to
a memory that holds something. Relevance is what the reader can *see*: a sentence that states a fact the answer
follows from, recognised by [MASK], by a name of the question, or by the fact before it in a chain, if that one is in
the memory or the section.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from data.prompts import Prompts
from data.tasks import MASK, masked_document, qa_document, recall_target, split_sections
from data.text.entities import RuleFinder, mask_entity, occurs
from data.world.miniwiki import Fact, MiniWorld

DILIGENT_MASKED, DILIGENT_QUESTION = 0.38, 0.22  # share of updates by the diligent reader
WORN = 0.12  # share of old memories shown as they look after a writer that did not stop
PASSAGE = 17  # tokens of a section that a masked document spends on a passage
LENGTHS = (0.4, 0.6, 1.0, 1.0)  # of demonstrated sections, as shares of a whole one: short ones teach more a token


@dataclass
class Demo:
    """One prompt with the wanted responses: prefix shared, (given, response) per suffix; response ends in stop."""

    kind: str
    prefix: list[int]
    suffixes: list[tuple[list[int], list[int]]]


@dataclass
class Episode:
    """A document with what the simulated reader may see of its relevance. Strings are masked where the task masks."""

    problem: str
    answer: str
    sections: list[list[int]]
    fact_of: dict[str, Fact]  # sentence as printed -> its fact
    gold: list[Fact]  # the facts that determine the answer, in the order of the chain
    cue: list[str]  # what the problem names: [MASK], or the names in the question
    chained: bool  # whether each gold fact can be recognised only once the one before is known
    texts: list[str] = field(default_factory=list)


def sentences(text: str) -> list[str]:
    """The sentences of mini-world text, titles dropped; a passage is "title: sentence. sentence." on one line."""
    found = []
    for line in text.split("\n"):
        body = line.split(": ", 1)[-1]
        found += [s if s.endswith(".") else s + "." for s in body.split(". ") if s]
    return found


class Demonstrator:
    """Draws demonstrations from one training world. section, memory: their lengths in tokens."""

    def __init__(self, world: MiniWorld, prompts: Prompts, section: int, memory: int):
        self.world, self.prompts, self.tokenizer = world, prompts, prompts.tokenizer
        self.section, self.memory = section, memory
        self.corpus, self.finder = world.corpus(), RuleFinder()
        self.more = max(1.0, memory / 40)  # a larger memory is shown with as many more sentences that don't matter

    # ---- documents ---------------------------------------------------------------------------------------

    def masked_episode(self, seed: int, index: int, sections: int, length: int = 0) -> Episode:
        """length: tokens of a section; 0 for whole ones, here and below."""
        length = length or self.section
        passages = max(4, round(sections * length / PASSAGE))
        problem = masked_document(self.corpus, self.finder, seed, index, passages, related=min(10, passages - 1))
        answer = problem.answers[0]
        fact_of = {mask_entity(s, answer, MASK)[0]: f for s, f in self.world.fact_of.items()
                   if answer in (f.subject, f.object) or answer in f.subject or answer in f.object}
        return self._episode(problem, fact_of, list(self.world.clue_facts(answer)), [MASK], False, length)

    def question_episode(self, seed: int, index: int, sections: int, length: int = 0) -> Episode:
        length = length or self.section
        question, facts = self.world.question_facts(index, seed)
        problem = qa_document(question, self.world.passages, self.tokenizer, sections * length, seed)
        names = [n for f in facts for n in (f.subject, f.object) if occurs(question.question, n)]
        return self._episode(problem, {}, facts, list(dict.fromkeys(names)), question.kind != "comparison", length)

    def _episode(self, problem, fact_of, gold, cue, chained, length) -> Episode:
        ids = split_sections(problem.passages, self.tokenizer, length)
        return Episode(problem.question, problem.answers[0], ids, self.world.fact_of | fact_of, gold, cue, chained,
                       [self.tokenizer.decode(s) for s in ids])

    # ---- the simulated reader ----------------------------------------------------------------------------

    def evident(self, episode: Episode, memory: list[str], section: list[str]) -> list[Fact]:
        """Gold facts that a careful reader recognises with this memory and this section in view."""
        visible = {episode.fact_of.get(s) for s in memory + section}
        if not episode.chained:
            return [f for f in episode.gold if f in visible]
        evident = []
        for fact in episode.gold:
            if fact not in visible:
                break
            evident.append(fact)
        return evident

    def update(self, episode: Episode, memory: list[str], text: str, rng: random.Random,
               diligent: bool | None = None) -> list[str]:
        """The next memory: sentences of the old one, then of `text`, as many as the budget holds."""
        section = sentences(text)
        if diligent is None:
            diligent = rng.random() < (DILIGENT_MASKED if episode.cue == [MASK] else DILIGENT_QUESTION)
        old = memory if diligent else []
        held = {episode.fact_of.get(s) for s in old}
        said: dict[Fact | None, str] = {}  # fact -> the first sentence of the section that states it
        for s in section:
            said.setdefault(episode.fact_of.get(s), s)
        new = [said[f] for f in self.evident(episode, old, section) if f in said and f not in held]
        if not old and not new:  # nothing to keep: a sentence on what the problem names, else the last one
            named = [s for s in section if any(c in s for c in episode.cue)]
            new = named[:1] or [s for s in section if s in episode.fact_of][-1:]
        return self.fit(old + new)

    def fit(self, wanted: list[str]) -> list[str]:
        """As many of the wanted sentences, in order and without repetition, as the budget holds."""
        kept, room = [], self.memory
        for s in dict.fromkeys(wanted):
            size = len(self.tokenizer.encode(" " + s))
            if size <= room:
                kept.append(s)
                room -= size
        return kept

    def earlier(self, rng: random.Random) -> list[str]:
        """What a reader holds before the first section: nothing, or sentences of random pages, up to three in 40
        tokens."""
        count = rng.choice((0, 0, *range(1, int(3 * self.more) + 1)))
        return self.fit([sentences(rng.choice(self.world.passages).text)[0] for _ in range(count)])

    def random_memory(self, text: str, rng: random.Random) -> list[str]:
        """Up to four sentences of `text` in 40 tokens."""
        lines = sentences(text)
        return self.fit(rng.sample(lines, min(int(4 * self.more), len(lines))))

    def memory_ids(self, memory: list[str]) -> list[int]:
        return self.tokenizer.encode("".join(" " + s for s in memory)) if memory else self.prompts.no_memory

    def worn(self, memory: list[str], rng: random.Random) -> list[int]:
        """`memory`, then sentences of it again until the budget is full and cuts one short."""
        ids = self.memory_ids(memory)
        while len(ids) < self.memory:
            ids = ids + self.memory_ids([rng.choice(memory)])
        return ids[:self.memory]

    def response(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text), self.tokenizer.end]

    def boxed(self, answer: str) -> list[int]:
        return self.response(f"\\boxed{{ {answer}}}")

    # ---- demonstrations ----------------------------------------------------------------------------------

    def read(self, episode: Episode, rng: random.Random, readers: int) -> list[Demo]:
        """`readers` independent readings of one document: update demonstrations with a shared prefix, recalls,
        and answers from those final memories that suffice."""
        demos, memories = [], [self.earlier(rng) for _ in range(readers)]
        for ids, text in zip(episode.sections, episode.texts, strict=True):
            suffixes, eventful = [], False
            for r, old in enumerate(memories):
                worn = bool(old) and rng.random() < WORN
                prefix, given = self.prompts.update(episode.problem, ids,
                                                    self.worn(old, rng) if worn else self.memory_ids(old))
                memories[r] = self.update(episode, old, text, rng)
                held, holds = ({episode.fact_of.get(s) for s in m} for m in (old, memories[r]))
                eventful |= not set(episode.gold).isdisjoint(holds - held)
                shown = given, [*self.memory_ids(memories[r]), self.tokenizer.end]
                suffixes += [shown] if shown not in suffixes else []
            if eventful or rng.random() < 0.2:  # most sections of a long document say nothing new of the problem
                demos.append(Demo("update", prefix, suffixes))
                if rng.random() < 0.25:
                    demos += self.recalls(text, memories[rng.randrange(readers)], rng)
        for memory in memories:
            if set(episode.gold) <= {episode.fact_of.get(s) for s in memory}:
                demos.append(self.answer(episode, memory))
        return demos

    def recalls(self, text: str, memory: list[str], rng: random.Random) -> list[Demo]:
        """Recall of an entity of `text` that the memory holds (an unanswerable one would teach guessing)."""
        for _ in range(8):
            made = recall_target(text, self.finder, rng)
            if made and any(s in memory for s in sentences(text) if occurs(s, made[1])):
                prefix, given = self.prompts.recall(self.tokenizer.encode(made[0]), self.memory_ids(memory))
                return [Demo("recall", prefix, [(given, self.boxed(made[1]))])]
        return []

    def answer(self, episode: Episode, memory: list[str]) -> Demo:
        prefix, given = self.prompts.answer(episode.problem, self.memory_ids(memory))
        return Demo("answer", prefix, [(given, self.boxed(episode.answer))])

    def oracle_memory(self, episode: Episode, rng: random.Random) -> list[str]:
        """The gold sentences among sentences that don't matter, in random order, within the budget."""
        said: dict[Fact, list[str]] = {}
        printed = [s for t in episode.texts for s in sentences(t)]
        for s in printed:
            if s in episode.fact_of:
                said.setdefault(episode.fact_of[s], []).append(s)
        gold = [rng.choice(said[f]) for f in episode.gold if f in said]
        memory = self.fit(gold + rng.sample(printed, min(rng.randint(0, int(3 * self.more)), len(printed))))
        rng.shuffle(memory)
        return memory

    def direct(self, episode: Episode) -> Demo | None:
        """Answer straight from one section that happens to hold all the gold facts."""
        for ids, text in zip(episode.sections, episode.texts, strict=True):
            if set(episode.gold) <= {episode.fact_of.get(s) for s in sentences(text)}:
                prefix, given = self.prompts.direct(episode.problem, ids)
                return Demo("direct", prefix, [(given, self.boxed(episode.answer))])
        return None

    def batch(self, seed: int, step: int, documents: int, answers: int, recalls: int, directs: int) -> list[Demo]:
        """The demonstrations of one training step: a function of (world, seed, step) alone."""
        rng, demos = random.Random(f"demo:{seed}:{step}"), []

        def episode(sections: int) -> Episode:
            index, length = rng.randrange(1 << 30), round(rng.choice(LENGTHS) * self.section)
            make = self.masked_episode if rng.random() < 0.25 else self.question_episode
            return make(seed, index, sections, length)

        for _ in range(documents):
            demos += self.read(episode(rng.choice((1, 2, 3, 4))), rng, readers=3)
        while answers > 0 or recalls > 0 or directs > 0:
            e = episode(1)
            if answers > 0:
                answers -= 1
                demos.append(self.answer(e, self.oracle_memory(e, rng)))
            if recalls > 0:
                made = self.recalls(e.texts[0], self.random_memory(e.texts[0], rng), rng)
                recalls -= len(made)
                demos += made
            if directs > 0 and (demo := self.direct(e)):
                directs -= 1
                demos.append(demo)
        return demos
