"""Where the tokens of a packed batch lie: rows [prefix | suffix 1 | ... | suffix G], group after group.

Legend: B groups, N suffixes, T packed tokens, P longest prefix, S longest suffix.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F


class Layout:
    """Where the tokens of each group lie in a packed batch: group by group, its prefix, then its suffixes.

    prefix_lengths: B ints >= 0; suffix_lengths: N ints >= 1; group: N ints, ascending: the group of each suffix.
    ValueError names the argument that does not fit.
    """

    def __init__(self, prefix_lengths, suffix_lengths, group, device="cpu"):
        prefix, suffix, group = (torch.as_tensor(x, dtype=torch.long)
                                 for x in (prefix_lengths, suffix_lengths, group))
        if len(suffix) != len(group):
            raise ValueError(f"group: {len(group)} entries for {len(suffix)} suffixes")
        if len(group) and (group.diff().lt(0).any() or group.min() < 0 or group.max() >= len(prefix)):
            raise ValueError("group: must ascend and name one of the prefixes")
        self._tiles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.groups, self.suffixes, self.device = len(prefix), len(suffix), torch.device(device)
        tokens = prefix.clone().index_add_(0, group, suffix)  # (B) tokens of a whole group
        start = F.pad(tokens.cumsum(0), (1, 0))  # (B+1)
        before = F.pad(suffix.cumsum(0), (1, 0))[:-1]  # (N) suffix tokens before this one, over all groups
        group_before = F.pad(torch.zeros_like(prefix).index_add_(0, group, suffix).cumsum(0), (1, 0))[:-1]
        self.prefix_start, self.prefix_lengths = start[:-1].to(device), prefix.to(device)  # (B)
        suffix_start = start[:-1][group] + prefix[group] + before - group_before[group]
        self.suffix_start, self.suffix_lengths = suffix_start.to(device), suffix.to(device)  # (N)
        self.group, self.total = group.to(device), int(tokens.sum())
        first = torch.cat([start[:-1], suffix_start])  # (B+N) where each prefix and each suffix starts
        length, origin = torch.cat([prefix, suffix]), torch.cat([torch.zeros_like(prefix), prefix[group]])
        order = (first * 2 + (length > 0)).argsort()  # an empty prefix shares its start with what follows
        shift = (origin - first)[order].repeat_interleave(length[order])
        self.positions = (torch.arange(self.total) + shift).to(device)  # (T) within its own sequence
        if self.total >= 2**31:
            raise ValueError(f"prefix_lengths, suffix_lengths: {self.total} packed tokens, expected fewer than 2^31")
        self._host = start, prefix, first[order], length[order]  # on the CPU

    # ---- what the kernels read: int32, on the device -------------------------------------------------------------

    def _part(self, values: torch.Tensor) -> torch.Tensor:
        """(B+N) values of prefixes and suffixes in packed order -> (T) int32 of their tokens."""
        return values.repeat_interleave(self._host[3]).int().to(self.device)

    @cached_property
    def own_start(self) -> torch.Tensor:
        """(T) packed index where the own part of a token starts: its suffix, or the prefix for a prefix token."""
        return self._part(self._host[2])

    @cached_property
    def own_end(self) -> torch.Tensor:
        """(T) packed index after the last token of that part."""
        return self._part(self._host[2] + self._host[3])

    @cached_property
    def group_range(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Three (B): packed index of each group's start, of the end of its prefix, and of its end."""
        start, prefix = self._host[:2]
        return tuple(x.int().to(self.device) for x in (start[:-1], start[:-1] + prefix, start[1:]))

    def tiles(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every group in tiles of `size` tokens: first packed index and group of each, both (tiles) int32.

        The last tiles of a group come first: as queries they have most keys to visit, and a card should not be left
        with its longest work at the end.
        """
        if size not in self._tiles:
            start, _, *_ = self._host
            count = -(-start.diff() // size)  # (B)
            group = torch.arange(self.groups).repeat_interleave(count)
            within = torch.arange(len(group)) - F.pad(count.cumsum(0), (1, 0))[:-1].repeat_interleave(count)
            order = within.argsort(descending=True, stable=True)
            first = start[:-1][group] + within * size
            self._tiles[size] = tuple(x[order].int().to(self.device) for x in (first, group))
        return self._tiles[size]

    # ---- what the references read: padded indices ----------------------------------------------------------------

    @cached_property
    def prefix_buckets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(index (b,P), mask (b,P)), ...] over the non-empty prefixes, similar lengths together."""
        return [_rows(self.prefix_start[of], self.prefix_lengths[of])
                for of in _similar(self.prefix_lengths[:, None], (64,)) if self.prefix_lengths[of[0]]]

    @cached_property
    def suffix_buckets(self) -> list[Bucket]:
        """All suffixes, similar ones together."""
        sizes = torch.stack([self.prefix_lengths[self.group], self.suffix_lengths], 1)  # (N,2)
        return [Bucket(self, of) for of in _similar(sizes, (64, 16))]


class Bucket:
    """Padded indices of some suffixes (n of them, from b groups): what a dense attention call needs."""

    def __init__(self, layout: Layout, of: torch.Tensor):
        groups, self.group = layout.group[of].unique(return_inverse=True)  # (b), (n)
        self.prefix, self.prefix_mask = _rows(layout.prefix_start[groups], layout.prefix_lengths[groups])  # (b,P)
        self.suffix, self.mask = _rows(layout.suffix_start[of], layout.suffix_lengths[of])  # (n,S)
        S = self.suffix.shape[1]
        own = self.mask[:, None, :] & torch.ones(S, S, dtype=torch.bool, device=self.mask.device).tril()
        own |= torch.eye(S, dtype=torch.bool, device=self.mask.device)  # a padded query sees itself: no empty row
        far = self.prefix_mask[self.group][:, None, :].expand(-1, S, -1)
        self.visible = torch.cat([far, own], -1)[:, None]  # (n,1,S,P+S)


def _rows(start: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded packed indices (n,L) of ranges and the mask of real places; padding points at the range's start."""
    grid = torch.arange(int(lengths.max()), device=lengths.device).expand(len(lengths), -1)
    mask = grid < lengths[:, None]
    return grid * mask + start.clamp(max=start.max())[:, None], mask


def _similar(sizes: torch.Tensor, steps: tuple[int, ...]) -> list[torch.Tensor]:
    """Indices of rows whose sizes (n,d) round up to the same multiples of `steps`, bucket by bucket."""
    if not len(sizes):
        return []
    rounded = -(-sizes // torch.tensor(steps, device=sizes.device))
    _, bucket = rounded.unique(dim=0, return_inverse=True)
    return [(bucket == i).nonzero()[:, 0] for i in range(int(bucket.max()) + 1)]
