"""Memory-state attention: rows [prefix | suffix 1 | ... | suffix G], the prefix computed once for its group.

              prefix     suffix 1   suffix 2        A prefix token sees the prefix up to itself. A suffix token sees
    prefix    ◣          .          .               its whole prefix and its own suffix up to itself, never another
    suffix 1  ■          ◣          .               suffix. Positions continue from the prefix, so that every suffix
    suffix 2  ■          .          ◣               computes what it would compute alone behind its own prefix copy.

    S = scale Q K^T      P = softmax(S) under the mask      O = P V
    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * O))      dQ = scale dS K      dK = scale dS^T Q

A group is contiguous in the packed batch, so "key j is visible to query i" needs two numbers of the query, own_start
(where its own part starts: its suffix, or the group for a prefix token) and one of the group, prefix_end:

    j <= i  and  (j >= own_start[i]  or  j < prefix_end)

The keys that a tile of queries can see are then two ranges: [group start, min(tile, prefix_end)), of which every
query sees all, and [own_start of the tile's first query, tile end), which is masked. Nothing else is loaded.
FLOPs per visible (query, key) pair and head: 4 D forward, 14 D backward (both passes recompute S and dP, and every
sum has one owner: deterministic). Bytes: Q, O once a tile; K, V once a tile of queries, mostly from L2.

Legend: B groups, N suffixes, T packed tokens, H query heads, K key heads (R = H / K query heads share one), D head
size; BM queries and BN keys a tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import input_precision, operator, shared_memory, tl, triton, use_triton
from kernels.layout import Layout

# ---- Triton ------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles, its warps and pipeline stages."""

    BM: int
    BN: int
    warps: int
    stages: int


# By largest padded head size and bytes of an element, in order of preference; the first that fits the card's shared
# memory is taken. Swept on an H200 in bf16 at 2 x (prefix 5320 + 8 x 1200), ms at D 128 and 64, before and then
# (eval/results/gpu, step tiles): forward 3.17 -> 3.05 and 1.19 -> 0.99, dq 3.80 -> 3.50 and 1.42 -> 1.16. Those of the
# keys, and all of four bytes, are chosen by registers: no spills on sm_90 (eval.bench compile); not timed on a card.
Table = dict[tuple[int, int], tuple[Tiles, ...]]
SMALLEST = (Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1))
FORWARD: Table = {
    (64, 2): (Tiles(64, 64, 4, 3), *SMALLEST), (128, 2): (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), *SMALLEST),
    (64, 4): (Tiles(64, 64, 4, 2), *SMALLEST), (128, 4): (Tiles(64, 64, 8, 2), *SMALLEST)}
BACKWARD_QUERIES: Table = {
    (64, 2): (Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), *SMALLEST),
    (128, 2): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), *SMALLEST),
    (64, 4): (Tiles(128, 64, 8, 2), *SMALLEST), (128, 4): (Tiles(64, 32, 8, 2), *SMALLEST)}
BACKWARD_KEYS: Table = {
    (64, 2): (Tiles(64, 128, 8, 2), *SMALLEST), (128, 2): (Tiles(32, 128, 8, 2), Tiles(32, 64, 4, 2), *SMALLEST),
    (64, 4): (Tiles(32, 128, 8, 2), Tiles(32, 64, 8, 2), *SMALLEST), (128, 4): (Tiles(32, 64, 8, 2), *SMALLEST)}


@triton.jit
def _scores(q, k, rows, keys, own, prefix_end, end, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """S (BM,BN) in units of log 2, -inf where a key is past `end` or invisible."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = (keys < end)[None, :]
    if MASKED:
        i, j = rows[:, None], keys[None, :]
        seen = seen & (j <= i) & ((j >= own[:, None]) | (j < prefix_end))
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _attend(acc, m, l, q, k_ptr, v_ptr, start, end, rows, own, prefix_end, scale, token, d, D: tl.constexpr,
            BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One range of keys into the running (sum, maximum, normaliser) of a tile of queries."""
    for j in range(start, end, BN):
        keys = j + tl.arange(0, BN)
        at = keys.to(tl.int64)[:, None] * token + d[None, :]
        here = (keys < end)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at, mask=here, other=0.0)
        s = _scores(q, k, rows, keys, own, prefix_end, end, scale, MASKED, PRECISION)
        new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        l = l * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + at, mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        m = new
    return acc, m, l


@triton.jit
def _forward(Q, K, V, O, LSE, tile_start, tile_group, own_start, group_start, prefix_end, group_end, scale,
             H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of queries of one head. LSE (T,H): log-sum-exp of each row, in units of log 2."""
    tile, h = tl.program_id(0), tl.program_id(1)
    first, b = tl.load(tile_start + tile), tl.load(tile_group + tile)
    start, shared, last = tl.load(group_start + b), tl.load(prefix_end + b), tl.load(group_end + b)
    rows, d = first + tl.arange(0, BM), tl.arange(0, BD)
    own = tl.load(own_start + rows, mask=rows < last, other=0)
    at = rows.to(tl.int64)[:, None] * (H * D) + h * D + d[None, :]
    here = (rows < last)[:, None] & (d < D)[None, :]
    q = tl.load(Q + at, mask=here, other=0.0)
    acc, m = tl.zeros([BM, BD], tl.float32), tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    k, v, token = K + (h // R) * D, V + (h // R) * D, (H // R) * D
    full = tl.minimum(first, shared)
    acc, m, l = _attend(acc, m, l, q, k, v, start, full, rows, own, shared, scale, token, d, D, BN, False, PRECISION)
    near = tl.maximum(full, tl.load(own_start + first))
    acc, m, l = _attend(acc, m, l, q, k, v, near, tl.minimum(first + BM, last), rows, own, shared, scale, token, d, D,
                        BN, True, PRECISION)
    l = tl.where(l == 0.0, 1.0, l)  # rows past the end of the group
    tl.store(O + at, (acc / l[:, None]).to(O.dtype.element_ty), mask=here)
    tl.store(LSE + rows.to(tl.int64) * H + h, m + tl.log2(l), mask=rows < last)


@triton.jit
def _query_gradient(dq, q, do, lse, delta, k_ptr, v_ptr, start, end, rows, own, prefix_end, scale, token, d,
                    D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    for j in range(start, end, BN):
        keys = j + tl.arange(0, BN)
        at = keys.to(tl.int64)[:, None] * token + d[None, :]
        here = (keys < end)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at, mask=here, other=0.0)
        v = tl.load(v_ptr + at, mask=here, other=0.0)
        p = tl.exp2(_scores(q, k, rows, keys, own, prefix_end, end, scale, MASKED, PRECISION) - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_queries(Q, K, V, O, DO, LSE, DELTA, DQ, tile_start, tile_group, own_start, group_start, prefix_end,
                      group_end, scale, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """dQ of one tile of queries of one head, and DELTA (T,H) = rowsum(dO * O), which the keys' pass needs."""
    tile, h = tl.program_id(0), tl.program_id(1)
    first, b = tl.load(tile_start + tile), tl.load(tile_group + tile)
    start, shared, last = tl.load(group_start + b), tl.load(prefix_end + b), tl.load(group_end + b)
    rows, d = first + tl.arange(0, BM), tl.arange(0, BD)
    own = tl.load(own_start + rows, mask=rows < last, other=0)
    at = rows.to(tl.int64)[:, None] * (H * D) + h * D + d[None, :]
    here = (rows < last)[:, None] & (d < D)[None, :]
    q, do = tl.load(Q + at, mask=here, other=0.0), tl.load(DO + at, mask=here, other=0.0)
    row = rows.to(tl.int64) * H + h
    lse = tl.load(LSE + row, mask=rows < last, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * tl.load(O + at, mask=here, other=0.0).to(tl.float32), 1)
    tl.store(DELTA + row, delta, mask=rows < last)
    dq = tl.zeros([BM, BD], tl.float32)
    k, v, token = K + (h // R) * D, V + (h // R) * D, (H // R) * D
    full = tl.minimum(first, shared)
    dq = _query_gradient(dq, q, do, lse, delta, k, v, start, full, rows, own, shared, scale, token, d, D, BN, False,
                         PRECISION)
    near = tl.maximum(full, tl.load(own_start + first))
    dq = _query_gradient(dq, q, do, lse, delta, k, v, near, tl.minimum(first + BM, last), rows, own, shared, scale,
                         token, d, D, BN, True, PRECISION)
    tl.store(DQ + at, (dq * (scale * 0.6931471805599453)).to(DQ.dtype.element_ty), mask=here)


@triton.jit
def _key_gradient(dk, dv, k, v, q_ptr, do_ptr, LSE, DELTA, own_start, start, end, keys, prefix_end, scale, h, d,
                  H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One range of queries into dK and dV of a tile of keys, from S^T = K Q^T: P^T and dS^T (BN,BM) are the left
    operands of what follows as they stand. Unless MASKED every query sees every key, and the range is whole tiles."""
    for i in range(start, end, BM):
        rows = i + tl.arange(0, BM)
        at = rows.to(tl.int64)[:, None] * (H * D) + d[None, :]
        row = rows.to(tl.int64) * H + h
        if MASKED or d.shape[0] > D:
            here = (rows < end)[:, None] & (d < D)[None, :]
            q, do = tl.load(q_ptr + at, mask=here, other=0.0), tl.load(do_ptr + at, mask=here, other=0.0)
        else:
            q, do = tl.load(q_ptr + at), tl.load(do_ptr + at)
        p = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if MASKED:
            lse = tl.load(LSE + row, mask=rows < end, other=0.0)
            delta = tl.load(DELTA + row, mask=rows < end, other=0.0)
            own, j = tl.load(own_start + rows, mask=rows < end, other=0), keys[:, None]
            seen = (j <= rows[None, :]) & ((j >= own[None, :]) | (j < prefix_end)) & (rows < end)[None, :]
            p = tl.where(seen, p, float("-inf"))
        else:
            lse, delta = tl.load(LSE + row), tl.load(DELTA + row)
        p = tl.exp2(p - lse[None, :])
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(Q, K, V, DO, LSE, DELTA, DK, DV, tile_start, tile_group, own_start, own_end, prefix_end, group_end,
                   scale, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, PRECISION: tl.constexpr):
    """dK and dV of one tile of keys of one key head: the sum over its R query heads and all queries that see it."""
    tile, kh = tl.program_id(0), tl.program_id(1)
    first, b = tl.load(tile_start + tile), tl.load(tile_group + tile)
    shared, last = tl.load(prefix_end + b), tl.load(group_end + b)
    keys, d = first + tl.arange(0, BN), tl.arange(0, BD)
    at = keys.to(tl.int64)[:, None] * ((H // R) * D) + kh * D + d[None, :]
    here = (keys < last)[:, None] & (d < D)[None, :]
    k, v = tl.load(K + at, mask=here, other=0.0), tl.load(V + at, mask=here, other=0.0)
    dk, dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)
    # a prefix is seen by the rest of its group, a suffix by itself; past a tile inside the prefix nothing is masked
    end = tl.where(first < shared, last, tl.load(own_end + tl.minimum(first + BN, last) - 1))
    # but a few more queries are taken as if it were, so that whole tiles remain
    masked = tl.where(first + BN <= shared, tl.minimum(first + BN, end), end)
    masked += (end - masked) % BM
    for r in range(R):
        h = kh * R + r
        q, do = Q + h * D, DO + h * D
        dk, dv = _key_gradient(dk, dv, k, v, q, do, LSE, DELTA, own_start, first, masked, keys, shared, scale, h, d, H,
                               D, BM, True, PRECISION)
        dk, dv = _key_gradient(dk, dv, k, v, q, do, LSE, DELTA, own_start, masked, end, keys, shared, scale, h, d, H, D,
                               BM, False, PRECISION)
    tl.store(DK + at, (dk * (scale * 0.6931471805599453)).to(DK.dtype.element_ty), mask=here)
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=here)


def shared_bytes(tiles: Tiles, padded: int, element: int, resident: int) -> int:
    """Upper estimate of a block's shared memory: `resident` operands of the tile that stays (q, or q and do, or k and
    v), two of the tiles that stream by in every pipeline stage, and a matrix of weights. Checked by the tests."""
    stays, streams = max(tiles.BM, tiles.BN), min(tiles.BM, tiles.BN)
    return ((resident * stays + 2 * streams * tiles.stages) * padded + tiles.BM * tiles.BN) * element


def choose(table: Table, head_size: int, dtype: torch.dtype, precision: str, limit: int, resident: int) -> Tiles:
    """The first tiles of a table whose estimate fits `limit` bytes."""
    padded = max(16, triton.next_power_of_2(head_size))
    fitting = table[64 if padded <= 64 else 128, dtype.itemsize]
    if precision == "tf32x3":  # three products each, whose operands leave no registers for a second stage
        fitting = [t for t in fitting if t.stages == 1]
    return next(t for t in fitting if shared_bytes(t, padded, dtype.itemsize, resident) <= limit)


def _tiles(table: Table, q: torch.Tensor) -> Tiles:
    return choose(table, q.shape[-1], q.dtype, input_precision(q.dtype), shared_memory(q.device),
                  1 if table is FORWARD else 2)


@operator(lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)))
def _launch_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile_start: torch.Tensor,
                    tile_group: torch.Tensor, own_start: torch.Tensor, group_start: torch.Tensor,
                    prefix_end: torch.Tensor, group_end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    if len(q):
        _forward[len(tile_start), q.shape[1]](q, k, v, out, lse, tile_start, tile_group, own_start, group_start,
                                              prefix_end, group_end, **_sizes(q, k, _tiles(FORWARD, q)))
    return out, lse


@operator(lambda q, k, v, out, do, lse, *_: (torch.empty_like(q), torch.empty_like(lse)))
def _launch_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, do: torch.Tensor,
                    lse: torch.Tensor, tile_start: torch.Tensor, tile_group: torch.Tensor, own_start: torch.Tensor,
                    group_start: torch.Tensor, prefix_end: torch.Tensor, group_end: torch.Tensor,
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    if len(q):
        _backward_queries[len(tile_start), q.shape[1]](
            q, k, v, out, do, lse, delta, dq, tile_start, tile_group, own_start, group_start, prefix_end, group_end,
            **_sizes(q, k, _tiles(BACKWARD_QUERIES, q)))
    return dq, delta


@operator(lambda q, k, v, *_: (torch.empty_like(k), torch.empty_like(v)))
def _launch_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, lse: torch.Tensor,
                 delta: torch.Tensor, tile_start: torch.Tensor, tile_group: torch.Tensor, own_start: torch.Tensor,
                 own_end: torch.Tensor, prefix_end: torch.Tensor, group_end: torch.Tensor,
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if len(q):
        _backward_keys[len(tile_start), k.shape[1]](
            q, k, v, do, lse, delta, dk, dv, tile_start, tile_group, own_start, own_end, prefix_end, group_end,
            **_sizes(q, k, _tiles(BACKWARD_KEYS, q)))
    return dk, dv


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout):
        out, lse = _launch_forward(q, k, v, *layout.tiles(_tiles(FORWARD, q).BM), layout.own_start,
                                   *layout.group_range)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx, do):
        (q, k, v, out, lse), layout, do = ctx.saved_tensors, ctx.layout, do.contiguous()
        dq, delta = _launch_queries(q, k, v, out, do, lse, *layout.tiles(_tiles(BACKWARD_QUERIES, q).BM),
                                    layout.own_start, *layout.group_range)
        dk, dv = _launch_keys(q, k, v, do, lse, delta, *layout.tiles(_tiles(BACKWARD_KEYS, q).BN, True),
                              layout.own_start, layout.own_end, *layout.group_range[1:])
        return dq, dk, dv, None


def _sizes(q, k, t: Tiles) -> dict:
    D = q.shape[-1]
    return {"scale": 1 / (math.sqrt(D) * math.log(2)), "H": q.shape[1], "R": q.shape[1] // k.shape[1], "D": D,
            "BD": max(16, triton.next_power_of_2(D)), "BM": t.BM, "BN": t.BN, "PRECISION": input_precision(q.dtype),
            "num_warps": t.warps, "num_stages": t.stages}


# ---- The function ------------------------------------------------------------------------------------------------


def memory_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout,
                     prefixes: bool = True) -> torch.Tensor:
    """Attention of a packed batch under the mask above, scaled by 1/sqrt(D).

    q (T,H,D), k and v (T,K,D), one dtype (fp32, bf16, fp16) and device -> (T,H,D). Differentiable in q, k, v.
    prefixes: False where nobody reads what prefix tokens get; the reference then leaves it undefined.
    ValueError naming the argument that does not fit.
    """
    if len(q) != layout.total or k.shape != v.shape or len(k) != len(q) or q.shape[2] != k.shape[2] \
            or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected {layout.total} "
                         f"tokens, one head size and a whole number of query heads per key head")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device == layout.device:
        raise ValueError(f"q {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}, layout on "
                         f"{layout.device}: expected one dtype and one device")
    if not use_triton(q.device, q.dtype):
        return memory_attention_reference(q, k, v, layout, prefixes)
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or q.shape[2] > 128:
        raise ValueError(f"q {q.dtype}, head size {q.shape[2]}: the kernel takes fp32, bf16 and fp16 up to 128")
    return _MemoryAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), layout)


# ---- PyTorch reference -------------------------------------------------------------------------------------------


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


def memory_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout,
                               prefixes: bool = True) -> torch.Tensor:
    """Same result. Suffixes of similar size share a bucket, so that ragged batches waste little on padding; the
    gradient of a prefix key is summed over its group, and no T x T mask is built."""
    places, parts = [], []
    for index, mask in layout.prefix_buckets if prefixes else ():
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
