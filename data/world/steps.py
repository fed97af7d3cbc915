"""What a base is taught in each step: a world of its own, read, searched and asked about by the demonstrators."""

from __future__ import annotations

import random

from data.prompts import Prompts
from data.weights.loading import load_tokenizer
from data.world.demonstrations import Demonstrator
from data.world.miniwiki import MiniWorld
from data.world.search_demonstrations import Searcher
from data.world.timeline_demonstrations import Chronicler

# answers are few tokens among many
WEIGHTS = {"update": 2.0, "answer": 2.0, "recall": 3.0, "direct": 2.0, "search": 2.0}


class DemoSteps:
    """steps[i]: rows [(prefix, [(given, response, weight), ...]), ...] of training step i, for a DataLoader.

    Every step has a world of its own: a world that lasted a hundred steps was learned by heart, and the loss that
    fell by half within it said nothing about the next. i is counted from `first`. A function of (configuration, i).
    """

    def __init__(self, config, first: int = 0):
        self.config, self.first = config, max(0, first)
        tokenizer, orders = load_tokenizer(), sorted(("section-first", "paper"), key=config.prompt_order.__ne__)
        self.prompts = [Prompts(tokenizer, order) for order in orders]  # its own order, and the other one

    def __len__(self) -> int:
        return self.config.base_steps - self.first

    def __getitem__(self, i: int) -> list[tuple]:
        if i >= len(self):
            raise IndexError(i)
        c, step = self.config, i + self.first
        # world 0 is the one reinforcement learning reads, 99 the gates'
        world = MiniWorld(c.base_people, 1_000_000 * (c.seed + 1) + step, "train")
        # every fifth step in the other order, so that the two can be compared
        demonstrator = Demonstrator(world, self.prompts[step % 5 == 4], c.section, c.memory)
        demos = demonstrator.batch(c.seed, step, c.base_documents, c.base_answers, c.base_recalls,
                                   c.base_directs)
        searcher = Searcher(demonstrator, c.turns, c.hits, c.result, c.act)
        rng = random.Random(f"search:{c.seed}:{step}")
        demos += [searcher.episode(c.seed, rng.randrange(1 << 30), rng) for _ in range(c.base_searches)]
        if c.base_timelines:
            demos += Chronicler(demonstrator).batch(c.seed, step, c.base_timelines)
        return [(d.prefix, [(g, r, WEIGHTS[d.kind]) for g, r in d.suffixes]) for d in demos]
