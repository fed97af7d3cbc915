"""A batch of sequences with shared prefixes as one row of tokens, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.layout import Layout


@dataclass
class Packed:
    """Rows [prefix | suffix 1 | ... ] back to back, and which tokens are scored.

    ids (T); layout; source (M): packed index whose hidden state predicts each scored token; target (M); offsets (N+1):
    ranges of scored tokens of the suffixes, in order; carried: what else went along.
    """

    ids: torch.Tensor
    layout: Layout
    source: torch.Tensor
    target: torch.Tensor
    offsets: torch.Tensor
    carried: list[torch.Tensor]


def pack(rows, device="cpu", carry: Sequence[np.ndarray] = ()) -> Packed:
    """rows: [(prefix ids, [(given ids, sampled ids), ...]), ...]. The sampled tokens are scored: who wrote a token
    decides, never its text. The last one is predicted but never read. carry: arrays that go to the device, too: all of
    it is one copy."""
    ids, prefix_lengths, suffix_lengths, group, source, target, offsets = [], [], [], [], [], [], [0]
    for b, (prefix, suffixes) in enumerate(rows):
        ids += prefix
        prefix_lengths.append(len(prefix))
        for given, sampled in suffixes:
            first = len(ids) + len(given) - 1
            source += range(first, first + len(sampled))
            target += sampled
            ids += given
            ids += sampled[:-1]
            suffix_lengths.append(len(given) + len(sampled) - 1)
            group.append(b)
            offsets.append(len(target))
    own = [np.array(x, np.int64) for x in (ids, source, target, offsets)]
    layout = Layout(prefix_lengths, suffix_lengths, group, device, [*own, *carry])
    ids, source, target, offsets, *carried = layout.carried
    return Packed(ids, layout, source, target, offsets, carried)


def bounded(rows, limit: int) -> Iterator[list]:
    """Consecutive rows [(prefix, [(given, sampled, ...), ...]), ...] in batches of at most about `limit` tokens."""
    batch, used = [], 0
    for row in rows:
        size = len(row[0]) + sum(len(given) + len(sampled) for given, sampled, *_ in row[1])
        if batch and used + size > limit:
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += size
    yield batch


def group_by_prefix(prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of equal prefixes together, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prefix in enumerate(prefixes):
        groups.setdefault(tuple(prefix), []).append(i)
    return list(groups.values())
