"""Whether MemTrain has something to select on: steps sampled, nothing trained, on the development world; where
something else is hidden or read than in the paper's task, on the documents of training.

Part of `python memtrain.py gates [--temperature 2] [--section 40] ...`. Rule 6 of the register: a claim about recall is
tested only where recall has room.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from data.config import Config
from data.problems import Data
from data.world.demonstrations import sentences
from eval.gates import mean

ROOM = {  # name: (lowest, highest) that passes, what it says
    "recall_own": (0.15, 1.0, "recall from the policy's own memories"),
    "recall_filled": (0.40, 1.0, "recall from memories filled to the budget with sentences of the sections read"),
    "recall_signal": (0.30, 1.0, "groups of recall samples whose rewards differ"),
    "reading_signal": (0.0, 1.0, "groups of readings whose rewards differ, recall's share left out"),
}


def health(agent, c: Config, recall_probe: Callable, steps: int = 2) -> dict[str, float]:
    """{name of ROOM: share, "tokens": sampled in a step}, over the documents of `steps` steps."""
    data = Data(replace(c, corpus="miniworld", world="dev", stages="report"), agent.tokenizer)
    problems = [data.masked_problem(i, held_out=data.papers_mask) for i in range(steps * c.documents)]
    finder = data.finder
    keys = [("health", i, g) for i in range(len(problems)) for g in range(c.group)]
    rollouts = agent.read([problems[i] for _, i, _ in keys], keys)
    sampled = sum(len(t.sampled) for r in rollouts for t in r.turns)
    own, filled, signal = [], [], []
    for r, key in zip(rollouts, keys, strict=True):
        if probe := recall_probe(agent, finder, r, random.Random(repr(key))):
            own.append((probe, key))
            own_too = r.problem.kind == "masked-last"  # its probe asks for the section just read
            read = [filled_memory(agent.tokenizer, r.sections[:k + own_too], c.memory, random.Random(repr((key, k))))
                    for k in range(len(r.sections))]
            given, r.memories = r.memories, read
            filled.append((recall_probe(agent, finder, r, random.Random(repr(key))), key))
            r.memories = given
    shares = {}
    for name, probes in (("recall_own", own), ("recall_filled", filled)):
        copies = [(*probe, (*key, name, j)) for probe, key in probes for j in range(max(1, c.recall_group))]
        turns, hits = agent.recall(*map(list, zip(*copies, strict=True))) if copies else ([], [])
        shares[name] = mean(hits)
        if name == "recall_own":
            sampled += sum(len(t.sampled) for t in turns)
            signal = differing(hits, max(1, c.recall_group))
    return shares | {"recall_signal": mean(signal), "tokens": sampled / steps,
                     "reading_signal": mean(differing([r.correct for r in rollouts], c.group))}


def filled_memory(tokenizer, sections: Sequence[list[int]], budget: int, rng: random.Random) -> list[int]:
    """Sentences of these sections, drawn without replacement, as long as they fit the budget of tokens."""
    found = [s for section in sections for s in sentences(tokenizer.decode(section))]
    ids: list[int] = []
    for sentence in rng.sample(found, len(found)):
        more = tokenizer.encode(" " + sentence)
        if len(ids) + len(more) <= budget:
            ids += more
    return ids


def differing(rewards: Sequence[float], size: int) -> list[bool]:
    """Of each group of `size` rewards in a row: whether it has a signal."""
    return [len(set(rewards[i:i + size])) > 1 for i in range(0, len(rewards), size)]
