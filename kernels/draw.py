"""Drawing a token from log-probs by inverting their cumulated sum, within a nucleus that is found without a sort.

    nucleus: the smallest set of tokens of mass >= top_p, the likeliest first, of equal ones those of lower id
    drawn = number of tokens i with  sum_{j <= i, in the nucleus} p_j  <=  u * mass of the nucleus

The kernel halves an interval in which the least probability of the nucleus lies. Floats that are not negative have the
order of their bit patterns, so that after 30 passes over a row it is known exactly, and every pass is a sum that one
program takes in a fixed order: deterministic, and nothing that the host has to look at. The reference looks, and sorts
the values of those rows whose likeliest token is not enough.
Bytes: a row of log-probs 3 times, and 30 times more from L2 where top_p < 1.

Legend: N rows, V vocabulary, p probabilities.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels import operator, tl, triton, use_triton

# ---- Triton ------------------------------------------------------------------------------------------------------

BLOCK, WARPS = 4096, 8  # tokens at a time; not yet timed on a card


@triton.jit
def _mass(row, V, least, BLOCK: tl.constexpr):
    """fp32 mass of the tokens whose probability has a bit pattern of at least `least`."""
    mass = tl.zeros([BLOCK], tl.float32)
    for v in range(0, V, BLOCK):
        at = v + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(row + at, mask=at < V, other=float("-inf")))
        mass += tl.where(p.to(tl.int32, bitcast=True) >= least, p, 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _within(row, v, V, least, ties, BLOCK: tl.constexpr):
    """(fp64 probabilities of one block, 0 outside the nucleus; how many more of those at `least` may stay)."""
    at = v + tl.arange(0, BLOCK)
    p = tl.exp(tl.load(row + at, mask=at < V, other=float("-inf")))
    bits = p.to(tl.int32, bitcast=True)
    tied = (bits == least).to(tl.int32)
    stays = (bits > least) | ((tied > 0) & (tl.cumsum(tied, 0) <= ties))
    return tl.where(stays, p, 0.0).to(tl.float64), ties - tl.sum(tied, 0)


@triton.jit
def _draw(LOGP, U, DRAWN, V, top_p, PAST: tl.constexpr, BLOCK: tl.constexpr):
    """The token of one row. PAST: a bit pattern that no probability reaches; 1 where all tokens are in the nucleus."""
    row = LOGP + tl.program_id(0).to(tl.int64) * V
    least, past = tl.full([], 0, tl.int32), tl.full([], PAST, tl.int32)
    while past - least > 1:  # the mass from `least` on is enough, from `past` on it is not
        middle = (least + past) // 2
        enough = _mass(row, V, middle, BLOCK) >= top_p
        least, past = tl.where(enough, middle, least), tl.where(enough, past, middle)
    missing = tl.maximum(top_p - _mass(row, V, past, BLOCK), 0.0)  # so much of equal tokens
    ties = tl.minimum(tl.ceil(missing / tl.maximum(least, 1 << 23).to(tl.float32, bitcast=True)), V * 1.0).to(tl.int32)
    total, left = tl.zeros([1], tl.float64), ties
    for v in range(0, V, BLOCK):
        p, left = _within(row, v, V, least, left, BLOCK)
        total += tl.sum(p, 0)
    target = total * tl.load(U + tl.program_id(0))
    before, drawn, left = tl.zeros([1], tl.float64), tl.zeros([1], tl.int32), ties
    for v in range(0, V, BLOCK):
        p, left = _within(row, v, V, least, left, BLOCK)
        drawn += tl.sum((before + tl.cumsum(p, 0) <= target).to(tl.int32), 0)
        before += tl.sum(p, 0)
    tl.store(DRAWN + tl.program_id(0) + tl.arange(0, 1), tl.minimum(drawn, V - 1).to(tl.int64))


@operator(lambda logp, u, top_p: torch.empty_like(u, dtype=torch.long))
def _launch(logp: torch.Tensor, u: torch.Tensor, top_p: float) -> torch.Tensor:
    (N, V), drawn = logp.shape, torch.empty_like(u, dtype=torch.long)
    if N:
        _draw[N,](logp, u, drawn, V, top_p, PAST=0x3F800001 if top_p < 1 else 1,  # 1.0 is 0x3F800000
                  BLOCK=min(BLOCK, triton.next_power_of_2(V)), num_warps=WARPS)
    return drawn


# ---- The function ------------------------------------------------------------------------------------------------


def draw(logp: torch.Tensor, u: torch.Tensor, top_p: float) -> torch.Tensor:
    """logp (N,V) fp32, u (N) fp64 uniform in [0, 1), 0 < top_p -> (N) int64 token ids. Nothing is read back."""
    if use_triton(logp.device, logp.dtype):
        return _launch(logp.contiguous(), u.contiguous(), top_p)
    return draw_reference(logp, u, top_p)


# ---- PyTorch reference -------------------------------------------------------------------------------------------

def draw_reference(logp: torch.Tensor, u: torch.Tensor, top_p: float) -> torch.Tensor:
    """Same result. On a card that is told to be deterministic, whose cumsum is not, on the CPU."""
    if logp.is_cuda and torch.are_deterministic_algorithms_enabled():
        return draw_reference(logp.cpu(), u.cpu(), top_p).to(logp.device)
    # fp64: over a large vocabulary an fp32 running sum would shift the draw
    total = nucleus(logp.exp(), top_p).double().cumsum(-1)
    drawn = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=logp.shape[1] - 1)


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """p (N,V) with everything outside the nucleus set to zero."""
    if top_p >= 1:
        return p
    most, best = p.max(-1, keepdim=True)  # (N,1): mostly it is enough alone
    kept, wide = torch.zeros_like(p).scatter_(-1, best, most), most[:, 0] < top_p
    rows = p[wide]  # (n,V)
    # numpy sorts values alone 10 times as fast as torch does, which carries their places along
    ordered = torch.from_numpy(np.sort(rows.cpu().numpy())).to(p.device).flip(-1)
    count = (ordered.cumsum(-1) - ordered < top_p).sum(-1, keepdim=True)  # (n,1)
    least = ordered.gather(-1, count - 1)
    tied = rows == least
    first = tied.cumsum(-1, dtype=torch.int32) <= count - (ordered > least).sum(-1, keepdim=True)
    kept[wide] = rows * ((rows > least) | (tied & first))
    return kept
