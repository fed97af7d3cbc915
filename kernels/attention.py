"""Memory-state attention: rows [prefix | suffix 1 | ... | suffix G], the prefix computed once for its group.

              prefix     suffix 1   suffix 2        A prefix token sees the prefix up to itself. A suffix token sees
    prefix    ◣          .          .               its whole prefix and its own suffix up to itself, never another
    suffix 1  ■          ◣          .               suffix. Positions continue from the prefix, so that every suffix
    suffix 2  ■          .          ◣               computes what it would compute alone behind its own prefix copy.

Legend: B groups, N suffixes, T packed tokens, P longest prefix, S longest suffix, G most suffixes of one group,
H query heads, K key heads (R = H / K query heads share one), D head size.

PyTorch references. Hidden states and keys of a prefix are computed once for its group; no T x T mask is built.
Suffixes of similar size share a bucket, so that ragged batches waste little on padding.
"""

from __future__ import annotations

import math
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


class _Gather(torch.autograd.Function):
    """x (T,...) -> x[index] (n,L,...). Real places are unique, so the backward pass copies instead of adding
    (PyTorch's own scatters element by element on the CPU: 100 times slower here)."""

    @staticmethod
    def forward(ctx, x, index, mask):
        ctx.save_for_backward(index[mask], mask)
        ctx.shape = x.shape
        return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx, grad):
        places, mask = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, places, grad[mask]), None, None


class _Repeat(torch.autograd.Function):
    """x (b,...) -> x[group] (n,...): the backward pass adds whole rows."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.save_for_backward(group)
        ctx.groups = len(x)
        return x.index_select(0, group)

    @staticmethod
    def backward(ctx, grad):
        (group,) = ctx.saved_tensors
        return grad.new_zeros(ctx.groups, *grad.shape[1:]).index_add_(0, group, grad), None


def memory_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Attention of a packed batch under the mask above, scaled by 1/sqrt(D).

    q (T,H,D), k and v (T,K,D), one dtype -> (T,H,D). Differentiable in q, k, v. ValueError on a shape that
    does not fit the layout.
    """
    if len(q) != layout.total or k.shape != v.shape or len(k) != len(q) or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected {layout.total} "
                         f"tokens and a whole number of query heads per key head")
    places, parts = [], []
    for index, mask in layout.prefix_buckets:
        qp, kp, vp = (_Gather.apply(x, index, mask).transpose(1, 2) for x in (q, k, v))  # (b,H,P,D), (b,K,P,D)
        # rows are padded at the end: under a causal mask no real token ever sees the padding
        out = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True, enable_gqa=True)
        places.append(index[mask])
        parts.append(out.transpose(1, 2)[mask])
    for b in layout.suffix_buckets:
        qs = _Gather.apply(q, b.suffix, b.mask).transpose(1, 2)  # (n,H,S,D)
        ks, vs = (torch.cat([_Repeat.apply(_Gather.apply(x, b.prefix, b.prefix_mask), b.group),
                             _Gather.apply(x, b.suffix, b.mask)], 1).transpose(1, 2) for x in (k, v))  # (n,K,P+S,D)
        out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=b.visible, enable_gqa=True)
        places.append(b.suffix[b.mask])
        parts.append(out.transpose(1, 2)[b.mask])
    return torch.empty_like(q).index_copy(0, torch.cat(places), torch.cat(parts))


def memory_decode(q, prefix_k, prefix_v, prefix_mask, suffix_k, suffix_v, suffix_mask, row, groups) -> torch.Tensor:
    """One new token for each of N rollouts against its group's prefix cache and its own suffix cache.

    q (N,H,D); prefix_k/v (B,K,P,D) with prefix_mask (B,P); suffix_k/v (N,K,S,D) with suffix_mask (N,S), the new
    token's own key included; row (N): place of each rollout in the (B*groups) grid. -> (N,H,D)
    """
    N, H, D = q.shape
    B, K, P, _ = prefix_k.shape
    R = H // K
    q = (q * (1 / math.sqrt(D))).view(N, K, R, D)
    own = (q @ suffix_k.transpose(-1, -2)).masked_fill(~suffix_mask[:, None, None], -torch.inf)  # (N,K,R,S)
    full = B * groups == N
    grid = q if full else q.new_zeros(B * groups, K, R, D).index_copy_(0, row, q)
    grid = grid.view(B, groups, K, R, D).transpose(1, 2).reshape(B, K, groups * R, D)
    far = (grid @ prefix_k.transpose(-1, -2)).masked_fill(~prefix_mask[:, None, None], -torch.inf)
    far = far.view(B, K, groups, R, P).transpose(1, 2).reshape(B * groups, K, R, P)
    far = far if full else far[row]
    attn = torch.cat([far, own], -1).softmax(-1)  # (N,K,R,P+S)
    mixed = attn[..., P:] @ suffix_v  # (N,K,R,D)
    far = attn[..., :P]
    far = far if full else far.new_zeros(B * groups, K, R, P).index_copy_(0, row, far)
    far = far.reshape(B, groups, K, R, P).transpose(1, 2).reshape(B, K, groups * R, P) @ prefix_v
    far = far.view(B, K, groups, R, D).transpose(1, 2).reshape(B * groups, K, R, D)
    return (mixed + (far if full else far[row])).view(N, H, D)
