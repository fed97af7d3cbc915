"""Decoding with memory-state attention: one new token for each of N rollouts, whose group shares a prefix.

              keys of the prefix, once a group           keys of its own suffix
    rollout 1 ┐                                          ■ ■ ■ ■
    rollout 2 ├ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■              ■ ■
    rollout 3 ┘                                          ■ ■ ■

Two launches. The first multiplies all query heads of all rollouts of a group, stacked to one matrix, with the keys of
their prefix: each key is read once a group, and the matrix units have rows to work on. A long prefix is split, so
that few groups still fill the card. The second reads each rollout's own keys and joins the parts by log-sum-exp:

    m = max m_i      O = sum exp(m_i - m) acc_i / sum exp(m_i - m) l_i

Bytes: every prefix key and value once a group, every own key and value once, and per split N H (D + 2) floats.
FLOPs: 4 D per (query head, visible key).

Legend: B groups, N rollouts, H query heads, K key heads (R = H / K), D head size, P room of the prefix cache, S room
of the suffix cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from kernels import input_precision, multiprocessors, operator, tl, triton, use_triton
from kernels.layout import before


class Members:
    """Which rollouts belong to which group. Built once for all layers and many tokens.

    group: N ints, in any order; groups: B. order (N) int32: the rollouts, group after group; offsets (B+1) int32:
    those of group b are order[offsets[b]:offsets[b+1]]. most: rollouts to expect in a group, the largest unless given.
    row (N): place of each rollout in a (B, most) grid; full: that grid has no gap and the rollouts are in its order.
    hidden: suffix lengths, and what the reference adds to scores for as long as it is handed that very tensor.
    """

    def __init__(self, group, groups: int, most: int | None = None, device="cpu"):
        group = np.asarray(group.cpu() if torch.is_tensor(group) else group, dtype=np.int64)
        counts = np.bincount(group, minlength=groups)
        first = before(counts)
        self.most, self.hidden = most or int(counts.max()), (None,)
        order = np.argsort(group, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(group))
        row = group * self.most + place - first[group]
        self.full = groups * self.most == len(group) and bool((row == np.arange(len(group))).all())
        self.offsets, self.order, self.row = (torch.from_numpy(x).to(device) for x in (
            first.astype(np.int32), order.astype(np.int32), row))

    def replace(self, other: Members, rows: int) -> None:
        """Takes over `other` in place, for a launch over `rows` rollouts, of which `other` may know fewer: the rest
        belongs to no group. Only the kernels can do that, the reference needs a group for every row."""
        self.most, self.row, self.full = other.most, other.row, other.full
        self.offsets[:len(other.offsets)] = other.offsets
        self.offsets[len(other.offsets):] = len(other.order)
        self.order[:len(other.order)] = other.order
        self.order[len(other.order):rows] = 0


# ---- Triton ------------------------------------------------------------------------------------------------------

SPLIT = 256  # fewest keys that a split of a prefix is worth; not yet timed on a card


def tile(head_size: int, dtype: torch.dtype) -> int:
    """Keys a tile, in both kernels: at most 16 KB of keys, so that keys, values and two stages fit every card."""
    return max(16, min(64, (16 << 10) // (max(16, triton.next_power_of_2(head_size)) * dtype.itemsize)))


def rows_a_tile(rows: int, precision: str) -> int:
    """(rollout, query head) pairs a tile of the prefix kernel, where a group has `rows` of them."""
    return min(64 if precision == "tf32" else 32, max(16, triton.next_power_of_2(rows)))


@triton.jit
def _tile(acc, m, l, q, k_ptr, v_ptr, keys, end, scale, d, D: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys into the running (sum, maximum, normaliser) of some query rows."""
    at = keys.to(tl.int64)[:, None] * D + d[None, :]
    here = (keys < end)[:, None] & (d < D)[None, :]
    k = tl.load(k_ptr + at, mask=here, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    s = tl.where((keys < end)[None, :], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p, shrink = tl.exp2(s - safe[:, None]), tl.exp2(m - safe)
    v = tl.load(v_ptr + at, mask=here, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, new, l * shrink + tl.sum(p, 1)


@triton.jit
def _decode_prefix(Q, K, V, lengths, offsets, order, ACC, M, L, scale, room, split, N, H: tl.constexpr, R: tl.constexpr,
                   D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One split of one group's prefix under one key head, for BM of the group's (rollout, query head) pairs."""
    b, kh, s = tl.program_id(0), tl.program_id(1) % (H // R), tl.program_id(2)
    tile = tl.program_id(1) // (H // R)
    first, last, length = tl.load(offsets + b), tl.load(offsets + b + 1), tl.load(lengths + b)
    pair, d = tile * BM + tl.arange(0, BM), tl.arange(0, BD)
    live = first + pair // R < last
    n, h = tl.load(order + first + pair // R, mask=live, other=0).to(tl.int64), kh * R + pair % R
    here = live[:, None] & (d < D)[None, :]
    q = tl.load(Q + (n * H + h)[:, None] * D + d[None, :], mask=here, other=0.0)
    acc, m, l = tl.zeros([BM, BD], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    base = (b.to(tl.int64) * (H // R) + kh) * room * D
    end = tl.where(first < last, tl.minimum(length, (s + 1) * split), 0)  # nobody reads it: nothing to do
    for j in range(s * split, end, BN):
        acc, m, l = _tile(acc, m, l, q, K + base, V + base, j + tl.arange(0, BN), end, scale, d, D, PRECISION)
    out = (s.to(tl.int64) * N + n) * H + h
    tl.store(ACC + out[:, None] * D + d[None, :], acc, mask=here)
    tl.store(M + out, m, mask=live)
    tl.store(L + out, l, mask=live)


@triton.jit
def _decode_suffix(Q, K, V, lengths, ACC, M, L, O, scale, room, splits, N, H: tl.constexpr, R: tl.constexpr,
                   D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One rollout's own suffix under one key head, joined with the parts of its prefix."""
    n, kh = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.minimum(tl.load(lengths + n), room)  # a row that is not in use counts one past its slot
    r, d = tl.arange(0, BM), tl.arange(0, BD)
    row = n * H + kh * R + r
    here = (r < R)[:, None] & (d < D)[None, :]
    q = tl.load(Q + row[:, None] * D + d[None, :], mask=here, other=0.0)
    acc, m, l = tl.zeros([BM, BD], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    base = (n * (H // R) + kh) * room * D
    for j in range(0, length, BN):
        acc, m, l = _tile(acc, m, l, q, K + base, V + base, j + tl.arange(0, BN), length, scale, d, D, PRECISION)
    for s in range(0, splits):
        part = (s * N + n) * H + kh * R + r  # n is 64 bit
        other = tl.load(M + part, mask=r < R, other=float("-inf"))
        new = tl.maximum(m, other)
        safe = tl.where(new == float("-inf"), 0.0, new)
        mine, theirs = tl.exp2(m - safe), tl.exp2(other - safe)
        l = l * mine + tl.load(L + part, mask=r < R, other=0.0) * theirs
        far = tl.load(ACC + part[:, None] * D + d[None, :], mask=here, other=0.0)
        acc = acc * mine[:, None] + far * theirs[:, None]
        m = new
    tl.store(O + row[:, None] * D + d[None, :], (acc / l[:, None]).to(O.dtype.element_ty), mask=here)


@operator(lambda q, *_: torch.empty_like(q))
def _decode(q: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor, prefix_lengths: torch.Tensor,
            suffix_k: torch.Tensor, suffix_v: torch.Tensor, suffix_lengths: torch.Tensor, offsets: torch.Tensor,
            order: torch.Tensor, most: int) -> torch.Tensor:
    (N, H, D), (B, K, P, _) = q.shape, prefix_k.shape
    R, out = H // K, torch.empty_like(q)
    rows = most * R
    sizes = {"H": H, "R": R, "D": D, "BD": max(16, triton.next_power_of_2(D)), "BN": tile(D, q.dtype),
             "PRECISION": input_precision(q.dtype), "num_warps": 4, "num_stages": 2}
    scale = 1 / (math.sqrt(D) * math.log(2))
    BM = rows_a_tile(rows, sizes["PRECISION"])
    tiles = triton.cdiv(rows, BM)
    split, splits = _split(P, B * K * tiles, sizes["BN"], q.device)
    acc = q.new_empty(splits, N, H, D, dtype=torch.float32)
    m, l = q.new_empty(2, splits, N, H, dtype=torch.float32)
    if splits:
        _decode_prefix[B, K * tiles, splits](q, prefix_k, prefix_v, prefix_lengths, offsets, order, acc, m, l, scale,
                                             P, split, N, BM=BM, **sizes)
    _decode_suffix[N, K](q, suffix_k, suffix_v, suffix_lengths, acc, m, l, out, scale, suffix_k.shape[2], splits, N,
                         BM=max(16, triton.next_power_of_2(R)), **sizes)
    return out


def _split(prefix: int, programs: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(keys a split, splits) of prefixes of at most `prefix` keys, where `programs` blocks run without splitting."""
    wanted = max(1, 4 * multiprocessors(device) // max(1, programs))
    split = max(SPLIT, triton.cdiv(triton.cdiv(prefix, wanted), tile) * tile)
    return split, triton.cdiv(prefix, split)


# ---- The function ------------------------------------------------------------------------------------------------


def memory_decode(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths,
                  members: Members) -> torch.Tensor:
    """Attention of one new token a rollout over its group's prefix and its own suffix, scaled by 1/sqrt(D).

    q (N,H,D); prefix_k, prefix_v (B,K,P,D) of which prefix_lengths (B) keys count; suffix_k, suffix_v (N,K,S,D) of
    which suffix_lengths (N) >= 1 count, the new token's own among them. One dtype. -> (N,H,D).
    ValueError naming the argument that does not fit.
    """
    (N, H, D), (B, K, P, _), S = q.shape, prefix_k.shape, suffix_k.shape[2]
    expected = {"prefix_v": (prefix_v, (B, K, P, D)), "prefix_lengths": (prefix_lengths, (B,)),
                "prefix_k": (prefix_k, (B, K, P, D)), "suffix_k": (suffix_k, (N, K, S, D)),
                "suffix_v": (suffix_v, (N, K, S, D)), "suffix_lengths": (suffix_lengths, (N,)),
                "members.order": (members.order[:N], (N,)), "members.offsets": (members.offsets[:B + 1], (B + 1,))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or tensor.device != q.device:
            raise ValueError(f"{name}: {tuple(tensor.shape)} on {tensor.device}, expected {shape} on {q.device}")
    if H % K:
        raise ValueError(f"q: {H} query heads for {K} key heads, expected a multiple")
    if not use_triton(q.device, q.dtype):
        return memory_decode_reference(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths,
                                       members)
    caches = [x if x.is_contiguous() else x.contiguous() for x in (prefix_k, prefix_v, suffix_k, suffix_v)]
    return _decode(q.contiguous(), *caches[:2], prefix_lengths, *caches[2:], suffix_lengths, members.offsets,
                   members.order, members.most)


# ---- PyTorch reference -------------------------------------------------------------------------------------------


def memory_decode_reference(q, prefix_k, prefix_v, prefix_lengths, suffix_k, suffix_v, suffix_lengths,
                            members: Members) -> torch.Tensor:
    """Same result. Rollouts sit in a (groups, most) grid, so that one matrix product reads each prefix once; scores
    stay in that order, because moving them took as long as multiplying."""
    (N, H, D), (B, K, _, _), most = q.shape, prefix_k.shape, members.most
    R, full = H // K, members.full
    if members.hidden[0] is not suffix_lengths:
        members.hidden = suffix_lengths, *(_hidden(x, q.dtype) for x in (prefix_lengths, suffix_lengths))
    _, no_prefix, no_suffix = members.hidden
    P, used = no_prefix.shape[-1], no_suffix.shape[-1]
    prefix_k, prefix_v = prefix_k[:, :, :P], prefix_v[:, :, :P]
    suffix_k, suffix_v = suffix_k[:, :, :used], suffix_v[:, :, :used]

    def to_grid(x):  # (N,K,R,*) -> (B,K,most,R,*)
        x = x if full else x.new_zeros(B * most, *x.shape[1:]).index_copy_(0, members.row, x)
        return x.view(B, most, *x.shape[1:]).transpose(1, 2)

    def from_grid(x):
        x = x.transpose(1, 2).reshape(B * most, K, R, -1)
        return x if full else x[members.row]

    q = (q * (1 / math.sqrt(D))).view(N, K, R, D)
    own = (q @ suffix_k.transpose(-1, -2)).add_(no_suffix)  # (N,K,R,S)
    far = (to_grid(q).reshape(B, K, most * R, D) @ prefix_k.transpose(-1, -2)).add_(no_prefix)
    attn = torch.cat([far.view(B, K, most, R, P), to_grid(own)], -1).softmax(-1)  # (B,K,most,R,P+S)
    far = (attn[..., :P].reshape(B, K, most * R, P) @ prefix_v).view(B, K, most, R, D)
    return (from_grid(attn[..., P:]) @ suffix_v + from_grid(far)).view(N, H, D)


def _hidden(lengths: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n) lengths -> (n,1,1,longest): -inf past each, else 0. Adding it is 15 times as fast as masked_fill on a CPU."""
    past = torch.arange(int(lengths.max()), device=lengths.device) >= lengths[:, None]
    return torch.zeros(past.shape, dtype=dtype, device=past.device).masked_fill_(past, -torch.inf)[:, None, None]
