"""Demonstrations on facts that change: simulated readers that are careless about updates.

They read documents of data.world.timeline with the question in view, note what is said of its thread, and are mediocre
in two ways that reinforcement learning can repair:

    what the memory held   is forgotten in two updates of three, as by the readers of data.world.demonstrations
    what was overtaken     two in five hold what the question needs and nothing else (up to date); the others keep every
                           value side by side (hoarding), stick to what they noted first (stubborn), or note any
                           mention, chosen or not (loose)

Answers are shown from memories that suffice, old values among them: what holds now is what was set last.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from data.prompts import LAST_PROBLEM
from data.tasks import MASK, split_sections
from data.text.entities import mask_entity
from data.world.demonstrations import LENGTHS, Demo, Demonstrator, sentences
from data.world.timeline import SETTING, Asked, Line, Timeline

DILIGENT_TIMELINE = 0.33  # share of updates that copy the old memory
READERS = {"up to date": 0.4, "hoarding": 0.3, "stubborn": 0.15, "loose": 0.15}
CLOZE = 0.6  # share of questions on what holds now that come as a sentence with [MASK]


def needed(kind: str, lines: Sequence[Line]) -> list[Line]:
    """Of these lines of the asked threads, in order, those that a memory needs for a question of this kind."""
    if kind == "settled":
        last = {x.key: x for x in lines if x.move in ("settle", "open")}
        return [x for x in lines if last.get(x.key) is x]
    held = [x for x in lines if x.move in SETTING]
    return {"now": held[-1:], "first": held[:1], "before": held[-2:], "how often": held}[kind]


def suffices(asked: Asked, lines: Sequence[Line]) -> bool:
    """Whether a memory that holds these lines, in order, leads to the answer."""
    whole = [x for t in asked.threads for x in t.lines]
    if asked.kind == "how often":
        count = {t.key: sum(x.key == t.key and x.move in SETTING for x in lines) for t in asked.threads}
        return all(count[asked.answer] > n for key, n in count.items() if key != asked.answer)
    return set(needed(asked.kind, whole)) <= set(lines) and needed(asked.kind, lines) == needed(asked.kind, whole)


class Chronicler:
    """Draws demonstrations on changing facts over the world and the prompts of a Demonstrator."""

    def __init__(self, demo: Demonstrator):
        self.demo, self.timeline = demo, Timeline(demo.world, demo.tokenizer)

    def wording(self, asked: Asked, rng: random.Random) -> tuple[str, str]:
        """(the question, ""), or (the problem of a sentence that the end of the text hides, that sentence)."""
        if asked.kind != "now" or rng.random() > CLOZE:
            return asked.question, ""
        hidden = mask_entity(asked.threads[0].recap(rng), asked.answer, MASK)[0]
        return LAST_PROBLEM.format(sentence=hidden), hidden

    def read(self, seed: int, index: int, rng: random.Random, readers: int) -> list[Demo]:
        """`readers` readings of one document: updates with a shared prefix, answers from final memories that do."""
        demo, asked = self.demo, self.timeline.asked(index, seed)
        length = round(rng.choice(LENGTHS) * demo.section)
        (question, hidden), line_of = self.wording(asked, rng), {x.text: x for t in asked.threads for x in t.lines}
        passages = self.document(asked, rng.choice((1, 2, 3, 4)) * length, rng, hidden)
        demos, memories = [], [demo.earlier(rng) for _ in range(readers)]
        for ids in split_sections(passages, demo.tokenizer, length):
            said = [p.partition(": ")[2] for p in demo.tokenizer.decode(ids).split("\n") if p]
            said = [s for s in said if s != hidden]  # what is asked for is nothing to note
            if not said:
                continue
            lines, suffixes = [line_of[s] for s in said if s in line_of], []
            for r, old in enumerate(memories):
                prefix, given = demo.prompts.update(question, ids, demo.memory_ids(old))
                memories[r] = self.update(asked.kind, old, said, lines, line_of, rng)
                shown = given, [*demo.memory_ids(memories[r]), demo.tokenizer.end]
                suffixes += [shown] if shown not in suffixes else []
            if lines or hidden or rng.random() < 0.2:
                demos.append(Demo("update", prefix, suffixes))
        for memory in memories:
            if suffices(asked, [line_of[s] for s in memory if s in line_of]):
                demos.append(self.answer(question, memory, asked.answer))
        return demos

    def document(self, asked: Asked, tokens: int, rng: random.Random, hidden: str) -> list[str]:
        """Passages of about `tokens` tokens or more: the threads that are asked about among others, so that only their
        names tell what matters; at the end what holds of those, and the hidden sentence."""
        threads = list(asked.threads)
        for _ in range(rng.randint(0, 3)):
            threads.append(self.timeline.another(asked.genre, threads, rng))
        passages, _ = self.timeline.write(asked.genre, threads, tokens, rng)
        last = [t.recap(rng) for t in threads[len(asked.threads):] if rng.random() < 0.6]
        last += [hidden] if hidden else []
        speaker = passages[-1].partition(": ")[0]
        return [*passages, *(f"{speaker}: {s}" for s in rng.sample(last, len(last)))]

    def update(self, kind: str, memory: list[str], said: list[str], lines: list[Line], line_of: dict[str, Line],
               rng: random.Random) -> list[str]:
        """The next memory: what is left of the old one, then what this reader makes of the lines of the thread."""
        old = memory if rng.random() < DILIGENT_TIMELINE else []
        held = [line_of[s] for s in old if s in line_of]
        reader = rng.choices(list(READERS), list(READERS.values()))[0]
        known = [*held, *lines]
        chosen = {"up to date": needed(kind, known), "hoarding": [x for x in known if x.move in SETTING],
                  "stubborn": held or needed(kind, lines)[:1] or lines[:1],
                  "loose": [*held, *rng.sample(lines, min(1, len(lines)))]}[reader]
        kept = [s for s in old if s not in line_of] + [x.text for x in chosen]
        return self.demo.fit(kept or [rng.choice(said).split(". ")[-1]])

    def oracle_memory(self, asked: Asked, rng: random.Random) -> list[str]:
        """The lines that the answer needs, among others of the same threads in the order of the text and small talk."""
        whole = [x for t in asked.threads for x in t.lines]
        wanted = needed(asked.kind, whole)
        while True:
            lines = [x for x in whole if x in wanted or rng.random() < 0.4]
            kept = self.demo.fit([x.text for x in lines])
            if suffices(asked, [x for x in lines if x.text in kept]):
                break
            if rng.random() < 0.3:
                return []  # more than a memory holds
        for _ in range(rng.randint(0, 2)):
            kept.insert(rng.randint(0, len(kept)), sentences(rng.choice(self.demo.world.passages).text)[0])
        return kept if self.demo.fit(kept) == kept else self.demo.fit([x.text for x in lines])

    def answer(self, question: str, memory: list[str], answer: str) -> Demo:
        prefix, given = self.demo.prompts.answer(question, self.demo.memory_ids(memory))
        return Demo("answer", prefix, [(given, self.demo.boxed(answer))])

    def batch(self, seed: int, step: int, documents: int) -> list[Demo]:
        """The demonstrations of one training step: `documents` documents read, twice as many answers."""
        rng, demos, answers = random.Random(f"timeline demo:{seed}:{step}"), [], 2 * documents
        for _ in range(documents):
            demos += self.read(seed, rng.randrange(1 << 30), rng, readers=3)
        while answers:
            asked = self.timeline.asked(rng.randrange(1 << 30), seed)
            if memory := self.oracle_memory(asked, rng):
                demos.append(self.answer(self.wording(asked, rng)[0], memory, asked.answer))
                answers -= 1
        return demos
