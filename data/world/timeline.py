"""The timeline world: facts that change, as chronicles and as dialogues, and questions about when what held.

    python -m data.world.timeline                 # one document of each genre, and what can be asked about it
    python -m data.world.timeline --baselines     # how far guessing gets, by kind of question, in each split

A *thread* is one thing that changes: a *slot* (the seat of a company, the guide of a visit) of a *key*, with a history
of moves that choose, doubt, change and take back a value. In a chronicle each line has a year, in a dialogue a speaker;
several threads run through a document at once, and between them stands small talk: facts of the mini-world that stand
still, among them what the names of the thread follow from.

    choose, change, back   set what holds now; back returns to an earlier value ("no, keep the first")
    float                  a value is mentioned and not chosen, often before the first choice
    doubt, recall          the value that holds, or one that held, is mentioned again; nothing changes
    settle, open           whether the matter is closed; an open one may have been settled before
    recap                  what holds in the end: for unlabelled documents, never for the thread that is asked about

Keys and values are names of a MiniWorld, so those of the three splits are disjoint as its are: whoever takes part in a
history of the "train" world is in no document of "dev" or "eval". A history is a function of (world, seed, index), the
document around it of its length, too: the same question is asked at every length.

No shortcut wins. Names are drawn evenly, so that a constant answer is hardly ever right. A value is often mentioned
before the first choice, so that the first one mentioned is not the first that held, and an old one is often mentioned
after the last change, so that the last one mentioned is not what holds now.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.tasks import Problem
from data.text.entities import occurs
from data.weights.loading import load_tokenizer
from data.weights.tokenizer import Tokenizer
from data.world.miniwiki import Fact, MiniWorld


class Slot(NamedTuple):
    """What changes: "the {noun} of" a key; key, value: types of the mini-world's names."""

    noun: str
    key: str
    value: str


SLOTS = {"chronicle": (Slot("employer", "person", "company"), Slot("owner", "company", "person"),
                       Slot("seat", "company", "town")),
         "dialogue": (Slot("guide", "town", "person"), Slot("supplier", "person", "company"),
                      Slot("place", "company", "town"))}
# {n} noun, {k} key, {v} value. Short words that the nano vocabulary has: a memory holds about four sentences.
PHRASES = {
    "choose": ("The {n} of {k} is {v}.", "{k} has {v} as {n}.", "{v} is to be the {n} of {k}."),
    "change": ("No, the {n} of {k} is {v}.", "{v} is now the {n} of {k}.", "{k} has {v} as {n} from now on."),
    "back": ("No, keep {v} as {n} of {k}.", "{v} is the {n} of {k} after all.", "{k} has {v} as {n} as before."),
    "float": ("Is {v} the like of a {n} of {k}?", "{v} was named among others for {k}.", "{k} is told of {v}."),
    "doubt": ("Is {v} so famous in {k}?", "{v} has been a steep {n} of {k}.", "{k} is in two minds on {v}."),
    "recall": ("{v} was the {n} of {k} in the past.", "{k} had {v} as {n} of old.", "There was {v} before in {k}."),
    "settle": ("The {n} of {k} is settled.", "{k} has settled its {n}.", "So much for the {n} of {k}."),
    "open": ("The {n} of {k} is yet to be settled.", "{k} has to settle its {n} yet.", "Who knows the {n} of {k}?"),
    "recap": ("So the {n} of {k} is {v}.", "So {v} is the {n} of {k}.", "{k} keeps {v} as {n}."),
}
# What a chronicle says otherwise: nobody speaks in it.
DATED = PHRASES | {
    "change": ("From now on the {n} of {k} is {v}.", "{v} came to be {n} of {k}.", "{k} has {v} as {n} from now on."),
    "back": ("Once more the {n} of {k} is {v}.", "{v} is the {n} of {k} after all.", "{k} has {v} as {n} as before."),
    "float": ("{v} was all but named {n} of {k}.", "{v} was named among others for {k}.", "{k} is told of {v}."),
    "doubt": ("{v} was not at home in {k}.", "{v} has been a steep {n} of {k}.", "{k} is in two minds on {v}."),
}
SETTING = ("choose", "change", "back")  # the moves after which something else holds
AIDE = ("recall", "settle", "recap")  # those that the assistant makes
KINDS = {"now": 0.5, "first": 0.15, "before": 0.15, "how often": 0.1, "settled": 0.1}
ASKED = {
    "now": ("What is the {n} of {k} now?", "Name the {n} of {k} now.", "Tell me the {n} of {k} now."),
    "first": ("What was the first {n} of {k}?", "Name the first {n} of {k}.", "Tell me the first {n} of {k}."),
    "before": ("What was the {n} of {k} before?", "Name the old {n} of {k}.", "Tell me the old {n} of {k}."),
    "how often": ("Which changed {n} more, {a} or {b}?", "Which has had more of a {n}, {a} or {b}?"),
    "settled": ("Which has settled its {n}, {a} or {b}?", "Which has a settled {n}, {a} or {b}?"),
}
CHANGES = (0, 1, 1, 2, 2, 3)  # how often a thread changes, drawn evenly from these
ROOM = 20  # tokens of a question, at most: what the window of preset nano leaves
YEARS = range(1500, 1900)  # of a chronicle, from its first line to its last


@dataclass(frozen=True)
class Line:
    """One thing said of a thread. value: "" where the move names none."""

    text: str
    key: str
    move: str
    value: str = ""


@dataclass(frozen=True)
class Thread:
    """One history. held: the values that held, in order, each followed by another one."""

    slot: Slot
    key: str
    lines: tuple[Line, ...]
    held: tuple[str, ...]
    settled: bool

    @property
    def changes(self) -> int:
        return len(self.held) - 1

    def recap(self, rng: random.Random) -> str:
        """A sentence on what holds in the end."""
        return rng.choice(PHRASES["recap"]).format(n=self.slot.noun, k=self.key, v=self.held[-1])


@dataclass(frozen=True)
class Changing(Problem):
    """A question about facts that change. stale: for "now" the values that held once and do not any more; changes: how
    often the thread changed (of two threads the sum); behind: tokens between the last change and the end. current,
    outdated: for "now" the sentences that set what holds, and what held."""

    stale: tuple[str, ...] = ()
    changes: int = 0
    behind: int = 0
    current: tuple[str, ...] = ()
    outdated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A question before its document is made."""

    id: str
    question: str
    answer: str
    kind: str
    genre: str
    threads: tuple[Thread, ...]

    @property
    def stale(self) -> tuple[str, ...]:
        (first, *_) = self.threads
        return tuple(dict.fromkeys(v for v in first.held if v != self.answer)) if self.kind == "now" else ()


class Timeline:
    """Histories over the names of a MiniWorld."""

    def __init__(self, world: MiniWorld, tokenizer: Tokenizer):
        self.world, self.tokenizer = world, tokenizer
        self.names: dict[str, list[str]] = {}
        for name, kind in world.kind_of.items():
            self.names.setdefault(kind, []).append(name)
        self.said: dict[str, dict[str, Fact]] = {}  # name -> sentences that its spelling follows from, and their facts
        for sentence, fact in world.fact_of.items():
            if fact in world.clue_facts(fact.subject):
                self.said.setdefault(fact.subject, {})[sentence] = fact

    # ---- histories ---------------------------------------------------------------------------------------

    def thread(self, slot: Slot, rng: random.Random, taken: Sequence[str] = (), changes: int = -1,
               settled: bool | None = None) -> Thread:
        """taken: keys that others have. changes, settled: as drawn unless given."""
        key = rng.choice([k for k in self.names[slot.key] if k not in taken])
        phrases = DATED if slot in SLOTS["chronicle"] else PHRASES
        count = rng.choice(CHANGES) if changes < 0 else changes
        settled = rng.random() < 0.5 if settled is None else settled
        values = rng.sample([v for v in self.names[slot.value] if v != key], count + 2)
        lines, held = [], []

        def say(move: str, value: str = "") -> None:
            text = rng.choice(phrases[move]).format(n=slot.noun, k=key, v=value)
            lines.append(Line(text, key, move, value))

        if rng.random() < 0.6:
            say("float", values.pop())
        for turn in range(count + 1):
            earlier = [v for v in held if v != held[-1]]
            move = "choose" if not turn else "back" if earlier and rng.random() < 0.4 else "change"
            held.append(rng.choice(earlier) if move == "back" else values.pop())
            say(move, held[-1])
            if turn < count and rng.random() < 0.3:
                say("doubt", held[-1])
        if not settled and rng.random() < 0.5:  # it was closed, and is open again: the last word counts
            lines.insert(len(lines) - 1, Line(rng.choice(PHRASES["settle"]).format(n=slot.noun, k=key), key, "settle"))
        say("settle" if settled else "open")
        old = [v for v in [*held, *(x.value for x in lines if x.move == "float")] if v != held[-1]]
        if old and rng.random() < 0.45:
            was = rng.choice(old)
            say("recall" if was in held else "float", was)
        return Thread(slot, key, tuple(lines), tuple(held), settled)

    def another(self, genre: str, threads: Sequence[Thread], rng: random.Random) -> Thread:
        """One more thread of a document of this genre, of a key that these have not."""
        return self.thread(rng.choice(SLOTS[genre]), rng, [t.key for t in threads])

    def asked(self, index: int, seed: int = 0, kind: str = "") -> Asked:
        """Question number `index`: a function of (world, seed, index), and of `kind` where one is wanted."""
        w = self.world
        rng = random.Random(f"timeline:{w.people}:{w.seed}:{w.split}:{seed}:{index}:{kind}")
        while True:
            made = self._asked(f"{w.split}-{w.seed}-{seed}-{index}", rng, kind)
            if len(self.tokenizer.encode(made.question)) <= ROOM:
                return made

    def _asked(self, id: str, rng: random.Random, kind: str) -> Asked:
        genre = rng.choice(list(SLOTS))
        slot = rng.choice(SLOTS[genre])
        kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in ("how often", "settled"):
            few, many = sorted(rng.sample(range(4), 2)) if kind == "how often" else (-1, -1)
            right = self.thread(slot, rng, (), many, True if kind == "settled" else None)
            other = self.thread(slot, rng, (right.key,), few, False if kind == "settled" else None)
            threads, answer = (right, other), right.key
        else:
            thread = self.thread(slot, rng, (), rng.choice((1, 1, 2, 3)) if kind == "before" else -1)
            threads = (thread,)
            answer = {"now": thread.held[-1], "first": thread.held[0], "before": thread.held[-2:][0]}[kind]
        a, b = rng.sample([t.key for t in threads], 2) if len(threads) == 2 else ("", "")
        question = rng.choice(ASKED[kind]).format(n=slot.noun, k=threads[0].key, a=a, b=b)
        return Asked(f"{genre}-{id}", question, answer, kind, genre, threads)

    # ---- documents ---------------------------------------------------------------------------------------

    def talk(self, threads: Sequence[Thread], rng: random.Random) -> str:
        """Small talk: a fact that a name of a thread follows from, or anything; never of a key."""
        keys = {t.key for t in threads}
        for _ in range(20):
            clues = self.said.get(rng.choice(rng.choice(threads).held), {}) if threads and rng.random() < 0.5 else {}
            said = rng.choice(list(clues)) if clues else rng.choice(self.world.passages).text
            if not any(key in said for key in keys):
                return said
        return "The weather is quiet."

    def write(self, genre: str, threads: Sequence[Thread], tokens: int, rng: random.Random,
              recaps: bool = False) -> tuple[list[str], list[Line | None]]:
        """(passages, the line behind each, None for small talk) of about `tokens` tokens: the given threads, as many
        others, and small talk. recaps: each thread but some ends with what holds."""
        threads, placed, room = list(threads), [], tokens

        def place(lines: Sequence[Line], first: float, last: float) -> None:
            nonlocal room
            where = sorted(rng.uniform(first, last) for _ in lines)
            placed.extend(zip(where, lines, strict=True))
            room -= sum(len(self.tokenizer.encode(x.text)) + 4 for x in lines)

        def run(thread: Thread) -> None:
            end = rng.uniform(0.3, 1)
            place(thread.lines, rng.uniform(0, 0.7 * end), end)
            if recaps and rng.random() < 0.7:
                place([Line(thread.recap(rng), thread.key, "recap", thread.held[-1])], max(end, 1 - 120 / tokens), 1)

        for thread in threads:
            run(thread)
        while room > 0:
            if rng.random() < 0.12:
                other = self.another(genre, threads, rng)
                if sum(len(self.tokenizer.encode(x.text)) + 4 for x in other.lines) < room:
                    threads.append(other)
                    run(other)
                    continue
            said = self.talk(threads, rng)
            room -= len(self.tokenizer.encode(said)) + 4
            if room > 0:
                placed.append((rng.random(), said))
        placed.sort(key=lambda p: p[0])
        lines = [line if isinstance(line, Line) else None for _, line in placed]
        texts = [line.text if isinstance(line, Line) else line for _, line in placed]
        return [f"{self.label(genre, i / len(texts), lines[i], rng)}: {t}" for i, t in enumerate(texts)], lines

    def label(self, genre: str, share: float, line: Line | None, rng: random.Random) -> str:
        """What stands before a line: the year, or who speaks."""
        if genre == "chronicle":
            return str(YEARS[int(share * len(YEARS))])
        return rng.choice(("User", "Aide")) if line is None else "Aide" if line.move in AIDE else "User"

    def problem(self, asked: Asked, tokens: int) -> Changing:
        """The question with a document of about `tokens` tokens around its threads."""
        passages, lines = self.write(asked.genre, asked.threads, tokens, random.Random(f"{asked.id}:{tokens}"))
        keys = {t.key for t in asked.threads}
        last = max(i for i, x in enumerate(lines) if x and x.key in keys and x.move in SETTING)
        behind = sum(len(self.tokenizer.encode(p + "\n")) for p in passages[last + 1:])
        says = [x for x in asked.threads[0].lines if x.move in SETTING] if asked.kind == "now" else []
        return Changing(asked.id, asked.question, (asked.answer,), tuple(passages), asked.kind, asked.stale,
                        sum(t.changes for t in asked.threads), behind,
                        tuple(x.text for x in says if x.value == asked.answer),
                        tuple(x.text for x in says if x.value != asked.answer))

    def question(self, index: int, tokens: int, seed: int = 0) -> Changing:
        return self.problem(self.asked(index, seed), tokens)

    def document(self, index: int, tokens: int, seed: int = 0) -> list[str]:
        """The passages of an unlabelled document, most of whose threads end with what holds."""
        rng = random.Random(f"unlabelled:{self.world.split}:{self.world.seed}:{seed}:{index}")
        genre = rng.choice(list(SLOTS))
        threads: list[Thread] = []
        for _ in range(3):
            threads.append(self.another(genre, threads, rng))
        return self.write(genre, threads, tokens, rng, recaps=True)[0]

    def determined(self, name: str, passages: Sequence[str]) -> bool:
        """Whether the small talk of a document determines `name` although it is masked everywhere."""
        text, clues = "\n".join(passages), self.said.get(name, {})
        return bool(clues) and {f for s, f in clues.items() if s in text} == set(clues.values())


# ---- how far guessing gets ---------------------------------------------------------------------------------------


def baselines(timeline: Timeline, n: int, tokens: int, seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """{kind: shares of n questions of it that the commonest answer, the first and the last mentioned candidate get
    right}; "all": of all kinds as they are mixed, the largest share of a commonest answer. Candidates are the values
    named beside the asked key, or the two keys that a question names."""
    found = {}
    for kind in KINDS:
        answers, first, last = [], 0, 0
        for i in range(n):
            asked = timeline.asked(i, seed, kind)
            keys = [t.key for t in asked.threads]
            options = keys if len(keys) > 1 else sorted({x.value for x in asked.threads[0].lines if x.value})
            named = [o for p in timeline.problem(asked, tokens).passages for o in options
                     if any(occurs(p, k) for k in keys) and occurs(p, o)]
            answers.append(asked.answer)
            first += named[0] == asked.answer
            last += named[-1] == asked.answer
        found[kind] = max(map(answers.count, set(answers))) / n, first / n, last / n
    mixed = [sum(KINDS[kind] * found[kind][i] for kind in KINDS) for i in (1, 2)]
    return found | {"all": (max(f[0] for f in found.values()), *mixed)}


def main() -> None:
    """Prints a chronicle and a dialogue of the evaluation world with their questions, or how far guessing gets."""
    parser = argparse.ArgumentParser(prog="python -m data.world.timeline", description=main.__doc__)
    parser.add_argument("--baselines", action="store_true", help="how much of 600 questions a kind guessing gets")
    options = parser.parse_args()
    tokenizer = load_tokenizer()
    if options.baselines:
        print("split  kind       commonest  first mentioned  last mentioned")
        for split in ("train", "dev", "eval"):
            for kind, (c, f, l) in baselines(Timeline(MiniWorld(600, 0, split), tokenizer), 600, 320).items():
                print(f"{split:6} {kind:10} {c:8.1%} {f:16.1%} {l:15.1%}")
        return
    timeline, shown = Timeline(MiniWorld(600, 0, "eval"), tokenizer), set()
    for index in range(100):
        problem = timeline.question(index, 320)
        if (genre := problem.id.partition("-")[0]) not in shown:
            shown.add(genre)
            print("\n".join(problem.passages) + "\n")
            print(f"{problem.question}  ({problem.answers[0]})", file=sys.stderr)


if __name__ == "__main__":
    main()
