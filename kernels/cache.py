"""Keys and values of rollouts that are being decoded, in slots: prefixes once a group, suffixes once a rollout.

The slots lie in storage that is allocated once, and are reused: finished rollouts and groups are overwritten by the
last live ones, so that those in use are always the first, and new ones are added behind them. No tensor changes its
place, so that a decoding step can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.attention import memory_attention
from kernels.decode import Members, memory_decode
from kernels.layout import Layout


class Cache:
    """rows, groups: slots for R rollouts and B prefixes; suffix_room, prefix_room: tokens in each. `used` rollouts of
    `groups_used` prefixes are in it; group (on the host): the group of each.

    Legend: B groups, N rollouts in use, K key heads, D head size, P room of a prefix, S room of a suffix.
    """

    def __init__(self, storage: torch.Tensor, layers: int, key_heads: int, head_size: int, rows: int, groups: int,
                 suffix_room: int, prefix_room: int):
        """storage: flat, of at least `elements(...)` finite numbers; what was in it is overwritten."""
        device, taken = storage.device, 0

        def carve(slots, room):
            nonlocal taken
            size = slots * key_heads * room * head_size
            part = storage[taken:taken + size].view(slots, key_heads, room, head_size)
            taken += size
            return part

        self.prefix = [(carve(groups, prefix_room), carve(groups, prefix_room)) for _ in range(layers)]  # 2 (B,K,P,D)
        self.suffix = [(carve(rows, suffix_room), carve(rows, suffix_room)) for _ in range(layers)]  # 2 (R,K,S,D)
        self.prefix_lengths = torch.zeros(groups, dtype=torch.long, device=device)  # (B)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (R) tokens in each suffix
        self.start = torch.zeros(rows, dtype=torch.long, device=device)  # (R) positions before the suffix
        self.group: list[int] = []
        self.groups_used, self.static = 0, False
        self.members = Members([0] * rows, groups, device=device)

    @staticmethod
    def elements(layers: int, key_heads: int, head_size: int, rows: int, groups: int, suffix_room: int,
                 prefix_room: int) -> int:
        return 2 * layers * key_heads * head_size * (rows * suffix_room + groups * prefix_room)

    @property
    def used(self) -> int:
        return len(self.group)

    @property
    def capacity(self) -> tuple[int, int, int, int]:
        """(rows, groups, tokens of a suffix, tokens of a prefix)."""
        (prefix, _), (suffix, _) = self.prefix[0], self.suffix[0]
        return len(suffix), len(prefix), suffix.shape[2], prefix.shape[2]

    def clear(self) -> None:
        self.group, self.groups_used = [], 0

    def add(self, layout: Layout):
        """Slots for all groups and rollouts of a packed batch of prompts; returns attend(layer, q, k, v) for its
        forward pass: memory attention, which puts keys and values away, and of the last layer's prefixes keeps no
        more than those. Call regroup() before decoding."""
        first_row, first_group = self.used, self.groups_used
        prefix_lengths, suffix_lengths, group = layout.host_lengths
        self.group += (group + first_group).tolist()
        self.groups_used += layout.groups
        rows, groups = slice(first_row, self.used), slice(first_group, self.groups_used)
        self.prefix_lengths[groups], self.lengths[rows] = layout.prefix_lengths, layout.suffix_lengths
        self.start[rows] = layout.prefix_lengths[layout.group]

        def places(start, lengths, longest):
            index = torch.arange(longest, device=layout.device)
            return index * (index < lengths[:, None]) + start[:, None]

        parts = [(self.prefix, groups, places(layout.prefix_start, layout.prefix_lengths, prefix_lengths.max())),
                 (self.suffix, rows, places(layout.suffix_start, layout.suffix_lengths, suffix_lengths.max()))]

        def attend(layer, q, k, v):
            for caches, slots, index in parts:
                for cache, x in zip(caches[layer], (k, v), strict=True):
                    cache[slots, :, :index.shape[1]] = x[index].transpose(1, 2)
            return memory_attention(q, k, v, layout, prefixes=layer < len(self.prefix) - 1)

        return attend

    def slots(self, n: int) -> list[tuple[torch.Tensor, ...]]:
        """Where the next keys and values of the first n rollouts go, layer by layer: keys and values (n,K,S,D), rows
        and places (n). It is place `lengths`, which the caller then counts. There may be more rows than are in use:
        what they hold is overwritten, what they give means nothing."""
        rows, places = torch.arange(n, device=self.lengths.device), self.lengths[:n]
        self.step = [(keys[:n], values[:n], rows, places) for keys, values in self.suffix], places + 1
        return self.step[0]

    def decode(self, layer, q, k, v):
        """attend() of one new token a rollout, whose key and value lie in their slots."""
        slots, lengths = self.step
        prefix = self.prefix[layer] if self.static else [x[:self.groups_used] for x in self.prefix[layer]]
        return memory_decode(q, *prefix, self.prefix_lengths[:len(prefix[0])], *slots[layer][:2], lengths, self.members)

    def keep(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Drops all rollouts but `rows` (ascending), and prefixes that nobody reads any more. Returns the moves
        [(from, to), ...] of rollouts, for what else the caller keeps of each. Call regroup() before decoding."""
        moves = _moves(rows)
        group = [self.group[i] for i in rows[:len(rows) - len(moves)]]
        for source, target in moves:
            group.insert(target, self.group[source])
        prefixes = sorted(set(group))
        shifts = _moves(prefixes)
        for tensors, pairs in (([self.lengths, self.start, *(x for kv in self.suffix for x in kv)], moves),
                               ([self.prefix_lengths, *(x for kv in self.prefix for x in kv)], shifts)):
            move(tensors, pairs)
        renamed = dict(shifts)
        self.group = [renamed.get(g, g) for g in group]
        self.groups_used = len(prefixes)
        return moves

    def regroup(self, rows: int | None = None, groups: int | None = None, most: int | None = None) -> None:
        """Tells the kernels who reads which prefix. rows, groups, most: sizes to launch for, whatever is in use; then
        nothing that a captured launch reads changes its place."""
        self.static = rows is not None
        if self.static:
            self.members.replace(Members(self.group, groups, most), rows)
        else:
            self.members = Members(self.group, self.groups_used, device=self.lengths.device)


def _moves(live: Sequence[int]) -> list[tuple[int, int]]:
    """[(from, to), ...] that bring the slots `live` (ascending) to the front: the last ones fill the gaps."""
    gaps = sorted(set(range(len(live))) - set(live))
    return list(zip([i for i in live if i >= len(live)], gaps, strict=True))


def move(tensors: Sequence[torch.Tensor], moves: Sequence[tuple[int, int]]) -> None:
    """tensor[to] = tensor[from], for every tensor and move."""
    if moves:
        source, target = torch.tensor(moves, device=tensors[0].device).T
        for x in tensors:
            x[target] = x[source]
