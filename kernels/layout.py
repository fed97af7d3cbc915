"""Where the tokens of a packed batch lie: rows [prefix | suffix 1 | ... | suffix G], group after group.

Legend: B groups, N suffixes, T packed tokens, P longest prefix, S longest suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch


def before(counts: np.ndarray) -> np.ndarray:
    """(n) counts -> (n+1): how many come before each, and how many there are."""
    return np.concatenate([[0], counts.cumsum()]).astype(np.int64)


def moved(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Arrays as tensors on `device`: on a card by one copy from pinned memory, which the host does not wait for."""
    arrays = [np.ascontiguousarray(x) for x in arrays]
    tensors = [torch.from_numpy(x) for x in arrays]
    if device.type == "cpu":
        return tensors
    place = before(np.array([-(-x.nbytes // 16) * 16 for x in arrays])).tolist()  # kernels like multiples of 16 bytes
    buffer = torch.empty(place[-1], dtype=torch.uint8, pin_memory=True)
    for x, at in zip(arrays, place, strict=False):
        buffer[at:at + x.nbytes] = torch.from_numpy(x.reshape(-1).view(np.uint8))
    there = buffer.to(device, non_blocking=True)
    return [there[at:at + x.nbytes].view(x.dtype).view(x.shape) for x, at in zip(tensors, place, strict=False)]


class Layout:
    """Where the tokens of each group lie in a packed batch: group by group, its prefix, then its suffixes.

    prefix_lengths: B ints >= 0; suffix_lengths: N ints >= 1; group: N ints, ascending: the group of each suffix.
    carry: arrays that go to the device in the same copy; as tensors they are in `carried`. The kernels read, as int32:
    own_start, own_end (T): packed index where the own part of a token starts and ends, its suffix or, for a prefix
    token, the prefix; group_range, three (B): start of each group, end of its prefix, end of the group.
    ValueError names the argument that does not fit.
    """

    def __init__(self, prefix_lengths, suffix_lengths, group, device="cpu", carry: Sequence[np.ndarray] = ()):
        prefix, suffix, group = (np.asarray(x, dtype=np.int64) for x in (prefix_lengths, suffix_lengths, group))
        if len(suffix) != len(group):
            raise ValueError(f"group: {len(group)} entries for {len(suffix)} suffixes")
        if len(group) and ((np.diff(group) < 0).any() or group[0] < 0 or group[-1] >= len(prefix)):
            raise ValueError("group: must ascend and name one of the prefixes")
        # counted on the host: the device is only told, and never waited for
        within = np.bincount(group, suffix, len(prefix)).astype(np.int64)  # (B) suffix tokens of a group
        start = before(prefix + within)  # (B+1)
        suffix_start = start[:-1][group] + prefix[group] + before(suffix)[:-1] - before(within)[:-1][group]
        self.groups, self.suffixes, self.total = len(prefix), len(suffix), int(start[-1])
        if self.total >= 2**31:
            raise ValueError(f"prefix_lengths, suffix_lengths: {self.total} packed tokens, expected fewer than 2^31")
        first = np.concatenate([start[:-1], suffix_start])  # (B+N) where each prefix and each suffix starts
        length, origin = np.concatenate([prefix, suffix]), np.concatenate([np.zeros_like(prefix), prefix[group]])
        order = (first * 2 + (length > 0)).argsort()  # an empty prefix shares its start with what follows
        shift = (origin - first)[order].repeat(length[order])
        self._tiles: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}
        self._host = start, prefix, suffix, group, (first + length)[order].repeat(length[order])
        ranges = [first[order].repeat(length[order]), self._host[4], start[:-1], start[:-1] + prefix, start[1:]]
        (self.prefix_start, self.prefix_lengths,  # (B)
         self.suffix_start, self.suffix_lengths, self.group,  # (N)
         self.positions, self.own_start, self.own_end, *rest) = moved(  # (T)
            [start[:-1], prefix, suffix_start, suffix, group, np.arange(self.total) + shift,
             *(x.astype(np.int32) for x in ranges), *carry], torch.device(device))
        self.group_range, self.carried = tuple(rest[:3]), rest[3:]
        self.device = self.positions.device  # where the tensors are: "cuda" alone is no device of a tensor

    @property
    def host_lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B) prefix lengths, (N) suffix lengths, (N) groups, where they can be looked at without waiting."""
        return self._host[1:4]

    def within_prefixes(self) -> np.ndarray:
        """Packed indices of all prefix tokens but the last of each, on the host."""
        start, prefix = self._host[:2]
        return np.concatenate([np.arange(s, s + n - 1) for s, n in zip(start[:-1], prefix, strict=True)])

    def tiles(self, size: int, keys: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Every group in tiles of `size` tokens: first packed index and group of each, both (tiles) int32.

        The longest work comes first, so that a card is not left with it at the end. As queries the last tiles of a
        group have most keys to visit; as keys its first ones have most queries, unless they lie in a suffix.
        """
        if (size, keys) not in self._tiles:
            start, prefix, *_, own_end = self._host
            count = -(-np.diff(start) // size)  # (B)
            group = np.arange(self.groups).repeat(count)
            work = np.arange(len(group)) - before(count)[:-1].repeat(count)  # place in the group
            first, end = start[:-1][group] + work * size, start[1:][group]
            if keys:
                own_end = own_end[np.minimum(first + size, end) - 1]
                work = np.where(first < (start[:-1] + prefix)[group], end, own_end) - first
            order = np.argsort(-work, kind="stable")
            self._tiles[size, keys] = tuple(moved([x[order].astype(np.int32) for x in (first, group)], self.device))
        return self._tiles[size, keys]

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
