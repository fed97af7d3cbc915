"""Demonstrations for a real model before reinforcement learning, from raw text alone: no label, no question of a file.

An instruct model, a small one above all, does not follow the loop: SmolLM2-135M writes no box. Simulated readers go
through real passages, over entities that the finder marks, and show four formats on two kinds of problem:

    masked   which entity is [MASK]? what bears on it are the sentences that hold [MASK]
    cloze    a sentence of a passage with one entity left out; what bears on it is that sentence, then sentences that
             hold a name of the problem

    update   the memory so far, then the section's sentences that bear on the problem, word for word, as many as fit;
             its first sentence where there is nothing else to keep: shown an empty memory, a model wrote nothing at all
    answer   from a memory that suffices, among lines that don't matter
    recall   of an entity that the memory holds
    direct   from a text, for a problem whose answer it holds

A line of a memory is "Title: sentence", so that a sentence about "he" still says who. Unlike the nano base's readers
these forget nothing on purpose: what the model then forgets is its own weakness.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from data import InputError
from data.prompts import Prompts
from data.tasks import MASK, TARGET, masked_document, qa_document, recall_target, sections
from data.text.corpus import SENTENCE_END, Corpus, Question
from data.text.entities import mask_entity, occurs

GAP = "___"
ATTEMPTS = 2000  # draws of a passage before a corpus is found to hold nothing to ask
CLOZE = "What belongs in the gap? {sentence}"
LENGTHS = (0.25, 0.4, 0.6)  # of demonstrated sections, as shares of a whole one: short ones teach more a token
MOST = 2  # lines that a reader takes from one section
LONGEST = 0.45  # share of the memory that one line may take
WEIGHTS = {"update": 1.0, "answer": 3.0, "recall": 3.0, "direct": 3.0}  # answers are few tokens among many


@dataclass(frozen=True)
class Episode:
    """A problem and its document. cues: what a line that bears on it holds; needed: lines that give the answer."""

    problem: str
    answer: str
    passages: tuple[str, ...]  # rendered, masked where the task masks
    cues: tuple[str, ...]
    needed: tuple[str, ...]


def lines(text: str) -> list[str]:
    """The sentences of a section as lines of a memory: ["Title: sentence", ...]. A passage is "Title: text" on a line;
    what was cut off its title stays without."""
    found = []
    for passage in filter(None, text.split("\n")):
        title, colon, body = passage.partition(": ")
        if not colon or len(title) > 80 or ". " in title:
            title, colon, body = "", "", passage
        found += [f"{title}{colon}{s.strip()}" for s in SENTENCE_END.split(body) if s.strip()]
    return found


class Reader:
    """Draws demonstrations from a corpus. section, memory: their lengths in tokens."""

    def __init__(self, corpus: Corpus, finder, prompts: Prompts, section: int, memory: int):
        self.corpus, self.finder, self.prompts, self.tokenizer = corpus, finder, prompts, prompts.tokenizer
        self.section, self.memory = section, memory

    # ---- problems ----------------------------------------------------------------------------------------

    def masked(self, seed: int, index: int, tokens: int) -> Episode:
        """A masked document of about `tokens` tokens; the pivot's lines with [MASK] are what it takes."""
        p = masked_document(self.corpus, self.finder, seed, index, 8, 3, self.size, tokens)
        needed = [s for passage in p.passages for s in lines(passage) if MASK in s]
        return Episode(p.question, p.answers[0], p.passages, (MASK,), tuple(needed))

    def cloze(self, rng: random.Random, tokens: int) -> Episode:
        """A line of a passage with one of its entities left out, and a document that holds the line."""
        for _ in range(ATTEMPTS):
            gold = rng.choice(self.corpus.passages)
            line = rng.choice(lines(gold.rendered))
            body = line.removeprefix(f"{gold.title}: ")
            found = list(dict.fromkeys(e.text for e in self.finder.find(body)))
            if len(found) < 2 or self.size(line) > LONGEST * self.memory:
                continue
            answer = rng.choice(found)
            if occurs(gold.title, answer):
                continue
            named = line if rng.random() < 0.5 else body  # half of the problems do not say whose page it is
            question = Question(f"cloze-{rng.random()}", CLOZE.format(sentence=mask_entity(named, answer, GAP)[0]),
                                (answer,), (gold,), ())
            document = qa_document(question, self.corpus.passages, self.tokenizer, tokens, 0)
            return Episode(document.question, answer, document.passages,
                           tuple(e for e in found if e != answer), (line,))
        raise self.nothing("sentence with two entities")

    def episode(self, rng: random.Random, seed: int, tokens: int) -> Episode:
        if rng.random() < 0.5:
            return self.masked(seed, rng.randrange(1 << 30), tokens)
        return self.cloze(rng, tokens)

    def nothing(self, what: str) -> InputError:
        return InputError(f"corpus {self.corpus.name}: no {what} in {ATTEMPTS} passages drawn at random; give a corpus "
                          f"with names, dates or numbers, a longer --memory, or another --entities finder")

    # ---- the simulated reader ----------------------------------------------------------------------------

    def size(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def update(self, e: Episode, memory: list[str], section: list[str]) -> list[str]:
        """The old memory, then what bears on the problem; lines that don't are let go where it gets too full."""
        found = [s for s in section if s in e.needed] or [s for s in section if any(occurs(s, c) for c in e.cues)]
        new = [s for s in found if s not in memory and self.size(s) <= LONGEST * self.memory][:MOST]
        if not memory and not new:
            new = [s for s in section if self.size(s) <= LONGEST * self.memory][:1]
        kept = set(self.fit([s for s in memory if self.bears(e, s)] + new + memory))
        return [s for s in dict.fromkeys(memory + new) if s in kept]

    def bears(self, e: Episode, line: str) -> bool:
        return line in e.needed or any(occurs(line, c) for c in e.cues)

    def fit(self, wanted: list[str]) -> list[str]:
        """As many of the lines, in order and without repetition, as the memory holds."""
        kept, room = [], self.memory
        for s in dict.fromkeys(wanted):
            if (size := self.size("\n" + s)) <= room:
                kept.append(s)
                room -= size
        return kept

    def memory_ids(self, memory: list[str]) -> list[int]:
        return self.tokenizer.encode("".join("\n" + s for s in memory)) if memory else self.prompts.no_memory

    def idle(self, rng: random.Random, most: int = 2) -> list[str]:
        """Up to `most` lines of random passages: what a memory holds beside what matters."""
        drawn = [rng.choice(lines(rng.choice(self.corpus.passages).rendered)) for _ in range(rng.randint(0, most))]
        return [s for s in drawn if self.size(s) <= LONGEST * self.memory / 2]

    def oracle_memory(self, e: Episode, rng: random.Random, named: bool) -> list[str]:
        """What is needed among lines that don't matter. named: of a masked document, one line also as it was before
        the mask, as a reader who has recognised the entity would note it."""
        needed = rng.sample(e.needed, min(MOST, len(e.needed)))
        if named and needed and MASK in needed[0]:
            needed.insert(1, needed[0].replace(MASK, e.answer))
        memory = self.fit(needed + self.idle(rng))
        if not named:
            rng.shuffle(memory)
        return memory

    # ---- demonstrations ----------------------------------------------------------------------------------

    def boxed(self, answer: str) -> list[int]:
        return [*self.tokenizer.encode(f"\\boxed{{{answer}}}"), self.tokenizer.end]

    def read(self, e: Episode, rng: random.Random, length: int) -> list[tuple]:
        """Two readers go through a document, one from an empty memory, one from lines of other pages. One in five of
        the sections that say nothing on the problem is shown."""
        rows, memories = [], [[], self.fit(self.idle(rng, 3))]
        for ids in sections(e.passages, self.tokenizer, length):
            text, suffixes = lines(self.tokenizer.decode(ids)), []
            shown_at_all = any(s in e.needed for s in text) or rng.random() < 0.2
            for r, old in enumerate(memories):
                memories[r] = self.update(e, old, text)
                prefix, given = self.prompts.update(e.problem, ids, self.memory_ids(old))
                shown = given, [*self.memory_ids(memories[r]), self.tokenizer.end], WEIGHTS["update"]
                suffixes += [shown] if shown not in suffixes else []
            if shown_at_all:
                rows.append((prefix, suffixes))
        return rows

    def answer(self, e: Episode, rng: random.Random) -> tuple:
        memory = self.oracle_memory(e, rng, named=rng.random() < 0.85)
        prefix, given = self.prompts.answer(e.problem, self.memory_ids(memory))
        return prefix, [(given, self.boxed(e.answer), WEIGHTS["answer"])]

    def direct(self, e: Episode, length: int) -> tuple:
        """From the section that holds what is needed; the first one where a cut went through it."""
        parts = list(sections(e.passages, self.tokenizer, length))
        text = next((ids for ids in parts if any(s in e.needed for s in lines(self.tokenizer.decode(ids)))), parts[0])
        prefix, given = self.prompts.direct(e.problem, text)
        return prefix, [(given, self.boxed(e.answer), WEIGHTS["direct"])]

    def recall_case(self, rng: random.Random) -> tuple[list[int], list[int], str]:
        """(section with [TARGET], memory that holds it, the entity)."""
        for _ in range(ATTEMPTS):
            text = "".join(rng.choice(self.corpus.passages).rendered + "\n" for _ in range(2))
            made = recall_target(text, self.finder, rng)
            held = [s for s in lines(text) if made and occurs(s, made[1])
                    and self.size(s) <= LONGEST * self.memory]
            ids = self.tokenizer.encode(made[0]) if made else []
            if held and len(ids) <= self.section and TARGET in made[0]:
                memory = self.fit([rng.choice(held), *self.idle(rng)])
                rng.shuffle(memory)
                return ids, self.memory_ids(memory), made[1]
        raise self.nothing("entity in a short sentence")

    def recall(self, rng: random.Random) -> tuple:
        section, memory, target = self.recall_case(rng)
        prefix, given = self.prompts.recall(section, memory)
        return prefix, [(given, self.boxed(target), WEIGHTS["recall"])]

    def batch(self, seed: int, step: int, documents: int) -> list[tuple]:
        """Rows [(prefix, [(given, response, weight), ...]), ...] of one step: of `documents` documents read, with three
        answers, two recalls and a direct answer each. A function of (corpus, seed, step)."""
        rng, rows = random.Random(f"warmup:{seed}:{step}"), []
        for _ in range(documents):
            length = round(rng.choice(LENGTHS) * self.section)
            rows += self.read(self.episode(rng, seed, round(rng.choice((1, 2)) * length)), rng, length)
            rows += [self.answer(self.episode(rng, seed, length), rng) for _ in range(3)]
            rows += [self.recall(rng) for _ in range(2)]
            rows.append(self.direct(self.cloze(rng, length), length))
        return rows


class WarmupSteps:
    """steps[i]: the rows of training step i, for a DataLoader."""

    def __init__(self, c, corpus: Corpus, finder, prompts: Prompts):
        self.c, self.reader = c, Reader(corpus, finder, prompts, c.section, c.memory)

    def __len__(self) -> int:
        return self.c.demo_steps

    def __getitem__(self, i: int) -> list[tuple]:
        if i >= len(self):
            raise IndexError(i)
        return self.reader.batch(self.c.seed, i, self.c.demo_documents)
