"""Layers with one input, such as queries, keys and values, as one product while a policy samples.

Their weights (and biases) are moved one behind the other in memory, and stay the parameters that they are: who trains,
saves, loads or copies them need not know. Where they lie apart again, after a copy or on another device, they are moved
once more; otherwise they stay, so that captured graphs find them. Scoring and training multiply each layer apart.

A layer has weight (N,C), bias (N) or None, adapt(y, x), which adds its adapter's part to y, and room for `joint`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from kernels import use_triton


def products(x: torch.Tensor, layers: Sequence) -> list[torch.Tensor]:
    """[layer(x) for layer in layers], by one product within `joined`. x (T,C)."""
    if layers[0].joint is None:
        return [layer(x) for layer in layers]
    parts = F.linear(x, *layers[0].joint).split([len(layer.weight) for layer in layers], 1)
    return [layer.adapt(y, x) for layer, y in zip(layers, parts, strict=True)]


@contextmanager
def joined(groups: Iterable[Sequence]) -> Iterator[None]:
    """Within it `products` takes one product for the layers of each group, where the kernels run. Elsewhere nothing
    changes: on a CPU another width may mean another rounding. For no gradient: the parameters are not what is used."""
    groups = [g for g in groups if use_triton(g[0].weight.device, g[0].weight.dtype)]
    for layers in groups:
        layers[0].joint = [_together([getattr(layer, kind) for layer in layers]) for kind in ("weight", "bias")]
    try:
        yield
    finally:
        for layers in groups:
            layers[0].joint = None


@torch.no_grad()
def _together(parts: Sequence[torch.nn.Parameter | None]) -> torch.Tensor | None:
    """The parts as one tensor, of whose storage they are views from now on."""
    first, end = parts[0], 0
    if first is None:
        return None
    for p in parts:
        if p.untyped_storage()._cdata != first.untyped_storage()._cdata or p.storage_offset() != end:
            whole = torch.cat([x.data for x in parts])
            for x, view in zip(parts, whole.split([len(x) for x in parts]), strict=True):
                x.data = view
            return whole
        end += p.numel()
    return first.data.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
