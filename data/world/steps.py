"""What a base is taught in each step: a world of its own, read, searched and asked about by the demonstrators."""

from __future__ import annotations

import random

import numpy as np

from data.prompts import Prompts
from data.weights.tokenizer import Tokenizer
from data.world.demonstrations import Demonstrator
from data.world.miniwiki import MiniWorld
from data.world.search_demonstrations import Searcher
from data.world.timeline_demonstrations import Chronicler

# answers are few tokens among many
WEIGHTS = {"update": 2.0, "answer": 2.0, "recall": 3.0, "direct": 2.0, "search": 2.0}


class DemoSteps:
    """steps[i]: rows [(prefix, [(given, response, weight), ...]), ...] of training step i, for a DataLoader: first
    copying alone, then demonstrations.

    Every step has a world of its own: a world that lasted a hundred steps was learned by heart, and the loss that
    fell by half within it said nothing about the next. A function of (configuration, i).
    """

    def __init__(self, config, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        orders = sorted(("section-first", "paper"), key=config.prompt_order.__ne__)
        self.prompts = [Prompts(tokenizer, order) for order in orders]  # its own order, and the other one

    def __len__(self) -> int:
        return self.config.base_copy_steps + self.config.base_steps

    def __getitem__(self, i: int) -> list[tuple]:
        if i >= len(self):
            raise IndexError(i)
        c, step = self.config, i - self.config.base_copy_steps
        if step < 0:
            return self.copying(i)
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

    def copying(self, i: int) -> list[tuple]:
        """64 sequences of 32 random tokens to be repeated: they build the copy circuit that everything rests on."""
        rng = np.random.default_rng([self.config.seed, i])
        tokens = rng.integers(0, self.tokenizer.size - 3, (64, 32)).tolist()
        return [(ids, [(self.tokenizer.assistant, ids, 1.0)]) for ids in tokens]
