"""Sampling: many responses side by side, whose prompts share prefixes, drawn from keys that each rollout owns.

A sampler admits prompts while its Cache has slots, draws a token for every row, and closes the gaps of those that have
ended. On CUDA a step is a captured graph.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from kernels import use_triton
from kernels.cache import Cache, move
from kernels.draw import draw
from kernels.logprob import head_for, product
from kernels.packing import bounded, group_by_prefix, pack


@dataclass(frozen=True)
class Turn:
    """One interaction: its prompt (shared prefix, given tokens), what the policy sampled, and how likely it was."""

    prefix: list[int]
    given: list[int]
    sampled: list[int]
    logprobs: list[float]


def uniforms(key: tuple, count: int) -> np.ndarray:
    """`count` uniform numbers that follow from `key` alone, so that one rollout can be replayed without the rest."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


class Sampler:
    """Decodes responses side by side. Keys and values lie in a Cache that is allocated once and sized beforehand;
    responses that have ended make room for the next prompts in the queue.

    chunk: steps between two looks at what has ended; 16 on CUDA, where with the kernels each step is a captured graph:
    drawing and stop checks happen on the device. One elsewhere: the batch shrinks once a quarter of it has ended.
    """

    def __init__(self, model: torch.nn.Module, chunk: int = 0):
        self.model, self.wanted = model, chunk
        self.storage: torch.Tensor | None = None  # of keys and values; every shape of batch has a Cache over it
        self.caches: dict[tuple, Cache] = {}
        self.tokens: torch.Tensor | None = None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.pool = None
        self.share = 1.0  # of --cache-gb; halved once if memory runs out all the same
        self.prompt_tokens = 0  # that have been prefilled so far

    @torch.no_grad()
    def __call__(self, c, prompts: Sequence[tuple], keys: Sequence[tuple], limit: int,
                 stops: Sequence[int]) -> list[Turn]:
        """One response of at most `limit` tokens, the stop token included, to each (prefix, given) prompt; equal
        prefixes are shared. keys: what each response's random numbers follow from; c: a Config. Turns in the order of
        prompts. torch.OutOfMemoryError where half of --cache-gb is still too much."""
        if not prompts:
            return []
        with self.model.merged():
            while True:
                try:
                    return self._run(c, prompts, keys, limit, stops)
                except torch.OutOfMemoryError:
                    if self.share < 1:
                        raise torch.OutOfMemoryError(
                            f"out of memory while sampling with half of --cache-gb {c.cache_gb}; lower it, or "
                            f"--sample-rows {c.sample_rows}") from None
                    self.share, self.storage, self.cache = 0.5, None, None
                    self._forget()
                tqdm.write(f"out of memory while sampling: going on with half of --cache-gb {c.cache_gb}")

    def _run(self, c, prompts, keys, limit, stops) -> list[Turn]:
        turns: list[Turn | None] = [None] * len(prompts)
        queue = self._begin(c, prompts, limit, stops)
        while True:
            self._admit(queue, prompts, keys)
            if not self.owner:
                return turns
            steps = min(self.chunk, self.left)
            self.left -= steps
            for _ in range(steps):
                if self.static:
                    self._replay()
                    continue
                self._draw(len(self.owner))
                if self.chunk == 1:  # what has ended need not go through the model
                    self._retire(prompts, turns)
                self._forward(len(self.owner))
            if self.chunk > 1:
                self._retire(prompts, turns)

    def _begin(self, c, prompts, limit, stops) -> deque[list[int]]:
        """Sets up for these prompts; the queue of those that wait for a slot."""
        self.c, self.limit, self.stops = c, limit, tuple(stops)
        self.device, self.dtype = self.model.embed.device, self.model.embed.dtype
        self.chunk = self.wanted or (16 if self.device.type == "cuda" else 1)
        # launches of fixed size on fixed tensors; what is deterministic about an operation may not be captured
        self.static = self.chunk > 1 and use_triton(self.device, self.dtype) and not c.deterministic
        self.weights = hash(tuple(p.data_ptr() for p in self.model.parameters()))  # a graph knows them by address
        self.head = head_for(self.model.head)
        self.owner: list[int] = []  # the prompt that each row in use answers
        return self._reserve(prompts)

    def _reserve(self, prompts) -> deque[list[int]]:
        """Sizes cache and buffers; returns the queue: groups of prompts with equal prefixes, in parts that fit."""
        m, groups = self.model.c, group_by_prefix([p for p, _ in prompts])
        token_bytes = 2 * m.layers * m.key_heads * m.head_size * self.dtype.itemsize
        slots = self.c.cache_slots(map(len, groups), max(len(given) for _, given in prompts),
                                   max(len(p) for p, _ in prompts), self.limit, token_bytes, self.share)
        shape, rows = (m.layers, m.key_heads, m.head_size, *slots), slots[0]
        size = Cache.elements(*shape)
        if self.storage is None or size > len(self.storage) or self.storage.dtype != self.dtype:
            self._forget()
            self.storage = None  # given back before the next one is made
            self.storage = torch.zeros(size, dtype=self.dtype, device=self.device)
        if self.tokens is None or rows > len(self.tokens) or self.limit > self.tokens.shape[1] - 1:
            self._forget()
            self._buffers(rows, m.width)
        if shape not in self.caches:
            self.caches[shape] = Cache(self.storage, *shape)
        self.cache, self.shape = self.caches[shape], shape
        self.cache.clear()
        self.most = max(min(len(g), rows) for g in groups)
        return deque(g[i:i + rows] for g in groups for i in range(0, len(g), rows))

    def _forget(self) -> None:
        """Drops what knows a tensor by its address; with the last graph goes the memory that they shared."""
        self.caches.clear()
        self.graphs.clear()
        self.pool = None

    def _buffers(self, rows: int, width: int) -> None:
        """What is known of each row. A row that has ended writes into one column more than there are tokens."""
        def empty(*shape, dtype=torch.long):
            return torch.zeros(rows, *shape, dtype=dtype, device=self.device)

        self.hidden, self.token = empty(width, dtype=self.dtype), empty()  # (R,C), (R) last token drawn
        self.count, self.done = empty(), empty(dtype=torch.bool)  # (R) tokens drawn, (R)
        self.tokens = empty(self.limit + 1)  # (R,limit+1)
        self.logprobs = empty(self.limit + 1, dtype=torch.float32)
        self.random = empty(self.limit + 1, dtype=torch.float64)

    def _admit(self, queue: deque[list[int]], prompts, keys) -> None:
        """Takes groups from the queue while there are slots, and prefills them."""
        cache, (rows, groups, *_), taken = self.cache, self.cache.capacity, []
        while queue and cache.used + sum(map(len, taken)) + len(queue[0]) <= rows and (
                cache.groups_used + len(taken) < groups):
            taken.append(queue.popleft())
        if not taken:
            return
        first, order = cache.used, [i for g in taken for i in g]
        packed_rows = [(prompts[g[0]][0], [(prompts[i][1], [0]) for i in g]) for g in taken]
        # in parts: one pass over all prompts took twice as long on a CPU, its activations fit no cache
        for part in bounded(packed_rows, self.c.micro_tokens):
            p, at = pack(part, self.device), cache.used
            self.prompt_tokens += p.layout.total
            hidden = self.model(p.ids, p.layout.positions, cache.add(p.layout), p.source)  # at the last given token
            self.hidden[at:cache.used] = hidden
        new = slice(first, cache.used)
        self.done[new], self.count[new] = False, 0
        self.random[new, :self.limit] = torch.as_tensor(np.stack([uniforms(keys[i], self.limit) for i in order]),
                                                        device=self.device)
        self.owner += order
        self.left = self.limit  # steps after which even the youngest row has ended
        self._regroup()

    def _regroup(self) -> None:
        if self.static:
            self.cache.regroup(*self.cache.capacity[:2], self.most)
        else:
            self.cache.regroup()

    def _draw(self, n: int) -> None:
        """The next token of the first n rows."""
        logits = product(self.hidden[:n], self.head.T).float().div_(self.c.temperature)  # (n,V)
        logp = logits.log_softmax(-1)
        ended, count = self.done[:n], self.count[:n]
        at = torch.where(ended, self.tokens.shape[1] - 1, count)[:, None]
        drawn = draw(logp, self.random[:n].gather(1, at)[:, 0], self.c.top_p)
        self.token[:n] = drawn
        self.tokens[:n].scatter_(1, at, drawn[:, None])
        self.logprobs[:n].scatter_(1, at, logp.gather(1, drawn[:, None]))
        count += ~ended
        stopped = count >= self.limit
        for stop in self.stops:
            stopped |= drawn == stop
        ended |= stopped

    def _forward(self, n: int) -> None:
        """The tokens drawn last go through the model."""
        if n:
            cache = self.cache
            positions = cache.start[:n] + cache.lengths[:n]
            self.hidden[:n] = self.model(self.token[:n], positions, cache.decode, slots=cache.slots(n))
            cache.lengths[:n] += ~self.done[:n]

    def _replay(self) -> None:
        """_draw and _forward over the next power of two of rows: once as they are, then captured, then replayed."""
        n = min(max(8, 1 << (self.cache.used - 1).bit_length()), self.cache.capacity[0])
        key = (n, self.most, self.shape, self.limit, self.stops, self.c.temperature, self.c.top_p, self.weights)
        if key not in self.graphs or self.device.type != "cuda":
            self.graphs[key] = None  # kernels are compiled and libraries set up
            self._draw(n)
            self._forward(n)
            return
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all: no graph leaves anything in it
            with torch.cuda.graph(self.graphs[key], pool=self.pool):
                self._draw(n)
                self._forward(n)
        self.graphs[key].replay()

    def _retire(self, prompts, turns) -> None:
        """Takes out what has ended, in batches: closing the gaps copies keys and values."""
        n = self.cache.used
        done = self.done[:n].tolist()
        if 4 * sum(done) < n:
            return
        ended = [i for i, over in enumerate(done) if over]
        rows = torch.tensor(ended, device=self.device)
        of = (x[rows].tolist() for x in (self.tokens, self.logprobs, self.count))
        for i, tokens, logprobs, count in zip(ended, *of, strict=True):
            turns[self.owner[i]] = Turn(*prompts[self.owner[i]], tokens[:count], logprobs[:count])
        moves = self.cache.keep([i for i, over in enumerate(done) if not over])
        move([self.hidden, self.token, self.count, self.done, self.tokens, self.logprobs, self.random], moves)
        for source, target in moves:
            self.owner[target] = self.owner[source]
        del self.owner[self.cache.used:]
        if self.owner:
            self._regroup()
