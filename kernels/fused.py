"""What a block does between its matrix products, each in one launch: add and RMSNorm, QK-norm and RoPE, SwiGLU.

    add_norm     s = x + y      h = w s / rms(s)      rms(s)^2 = mean of s^2 over C, plus eps
    norm_rope    u = w x / rms(x) in every head, (a, b) its halves      [a cos - b sin, b cos + a sin]
    swiglu       silu(g) u

    n = s / rms(s):    ds = (w dh - n mean(w dh n)) / rms(s)      dw = sum of dh n over tokens (and heads)
    RoPE turns by an angle: its gradient is turned back      dg = do u sigmoid(g) (1 + g (1 - sigmoid(g)))

Backward passes keep the inputs alone and compute the rest again. dw has one owner for every share of the tokens, whose
parts are added up afterwards: deterministic. Bytes: every operand once.

Legend: T tokens, C width, F hidden width, H query heads, K key heads, D head size, S room of a suffix cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import multiprocessors, operator, tl, triton, use_triton

# ---- Triton ------------------------------------------------------------------------------------------------------

TOKENS = 16  # tokens a tile of norm_rope: 16 numbers a thread at D = 128; none of these is timed on a card yet
HIDDEN = 1024  # numbers a tile of swiglu


@triton.jit
def _add_norm(X, Y, W, TOTAL, OUT, eps, C, BLOCK: tl.constexpr):
    """One token. What is normalised is the sum as it is stored."""
    c = tl.arange(0, BLOCK)
    at, here = tl.program_id(0).to(tl.int64) * C + c, c < C
    s = tl.load(X + at, mask=here, other=0.0).to(tl.float32) + tl.load(Y + at, mask=here, other=0.0).to(tl.float32)
    s = s.to(TOTAL.dtype.element_ty)
    tl.store(TOTAL + at, s, mask=here)
    s, w = s.to(tl.float32), tl.load(W + c, mask=here, other=0.0).to(tl.float32)
    tl.store(OUT + at, (s * tl.rsqrt(tl.sum(s * s) / C + eps) * w).to(OUT.dtype.element_ty), mask=here)


@triton.jit
def _add_norm_gradient(TOTAL, W, DTOTAL, DOUT, DX, PARTS, eps, N, C, share, TRAINED: tl.constexpr, BLOCK: tl.constexpr):
    """`share` tokens, one after the other, and their part (C) of dw."""
    c, program = tl.arange(0, BLOCK), tl.program_id(0).to(tl.int64)
    here, dw = c < C, tl.zeros([BLOCK], tl.float32)
    w = tl.load(W + c, mask=here, other=0.0).to(tl.float32)
    for i in range(0, tl.minimum(share, N - program * share)):
        at = (program * share + i) * C + c
        s = tl.load(TOTAL + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(DOUT + at, mask=here, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(s * s) / C + eps)
        n = s * r
        dx = tl.load(DTOTAL + at, mask=here, other=0.0).to(tl.float32) + r * (w * g - n * (tl.sum(w * g * n) / C))
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=here)
        dw += g * n
    if TRAINED:
        tl.store(PARTS + program * C + c, dw, mask=here)


@triton.jit
def _halves(X, at, here, D: tl.constexpr):
    """Both halves of some heads (BM,BH), in fp32."""
    return (tl.load(X + at, mask=here, other=0.0).to(tl.float32),
            tl.load(X + at + D // 2, mask=here, other=0.0).to(tl.float32))


@triton.jit
def _put(X, at, here, a, b, D: tl.constexpr):
    tl.store(X + at, a.to(X.dtype.element_ty), mask=here)
    tl.store(X + at + D // 2, b.to(X.dtype.element_ty), mask=here)


@triton.jit
def _scale(a, b, eps, D: tl.constexpr):
    """1 / rms of every head (BM,1)."""
    return tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]


@triton.jit
def _turned(X, at, W, cos, sin, here, d, eps, D: tl.constexpr, NORM: tl.constexpr):
    a, b = _halves(X, at, here, D)
    if NORM:
        wa, wb = _halves(W, d[None, :], d[None, :] < D // 2, D)
        r = _scale(a, b, eps, D)
        a, b = a * r * wa, b * r * wb
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def _norm_rope(Q, K, V, WQ, WK, COS, SIN, OQ, OK, OV, places, eps, N, q_row, k_row, v_row, room, H: tl.constexpr,
               KH: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, NORM: tl.constexpr,
               CACHED: tl.constexpr):
    """BM tokens of one head, queries' heads first. CACHED: keys and values go to their places in the cache."""
    rows, h, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.arange(0, BH)
    here = (rows < N)[:, None] & (d < D // 2)[None, :]
    rows = rows.to(tl.int64)[:, None]
    angle = rows * (D // 2) + d[None, :]
    cos, sin = tl.load(COS + angle, mask=here, other=0.0), tl.load(SIN + angle, mask=here, other=0.0)
    if h < H:
        a, b = _turned(Q, rows * q_row + h * D + d[None, :], WQ, cos, sin, here, d, eps, D, NORM)
        _put(OQ, (rows * H + h) * D + d[None, :], here, a, b, D)
    else:
        h -= H
        a, b = _turned(K, rows * k_row + h * D + d[None, :], WK, cos, sin, here, d, eps, D, NORM)
        if CACHED:
            place = tl.load(places + rows, mask=rows < N, other=0)
            to = ((rows * KH + h) * room + place) * D + d[None, :]
            here = here & (place < room)  # a row that is not in use may have run out of its slot
            _put(OK, to, here, a, b, D)
            a, b = _halves(V, rows * v_row + h * D + d[None, :], here, D)
            _put(OV, to, here, a, b, D)
        else:
            _put(OK, (rows * KH + h) * D + d[None, :], here, a, b, D)


@triton.jit
def _turned_back(X, row, heads, W, G, DX, COS, SIN, rows, N, h, d, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Gradient of one head of some tokens; what they add to both halves of dw."""
    here = (rows < N)[:, None] & (d < D // 2)[None, :]
    rows = rows.to(tl.int64)[:, None]
    angle, to = rows * (D // 2) + d[None, :], (rows * heads + h) * D + d[None, :]
    cos, sin = tl.load(COS + angle, mask=here, other=0.0), tl.load(SIN + angle, mask=here, other=0.0)
    ga, gb = _halves(G, to, here, D)
    ga, gb = ga * cos + gb * sin, gb * cos - ga * sin
    da, db = tl.sum(ga, 0), tl.sum(gb, 0)
    if NORM:
        a, b = _halves(X, rows * row + h * D + d[None, :], here, D)
        wa, wb = _halves(W, d[None, :], d[None, :] < D // 2, D)
        r = _scale(a, b, eps, D)
        a, b = a * r, b * r
        da, db = tl.sum(ga * a, 0), tl.sum(gb * b, 0)
        mean = ((tl.sum(wa * ga * a, 1) + tl.sum(wb * gb * b, 1)) / D)[:, None]
        ga, gb = r * (wa * ga - a * mean), r * (wb * gb - b * mean)
    _put(DX, to, here, ga, gb, D)
    return da, db


@triton.jit
def _norm_rope_gradient(Q, K, WQ, WK, COS, SIN, GQ, GK, DQ, DK, PARTS, eps, N, q_row, k_row, share, H: tl.constexpr,
                        KH: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, NORM: tl.constexpr):
    """One head of `share` tokens, and its part (D) of dw."""
    program, h, d = tl.program_id(0), tl.program_id(1), tl.arange(0, BH)
    da, db = tl.zeros([BH], tl.float32), tl.zeros([BH], tl.float32)
    for first in range(program * share, tl.minimum(N, (program + 1) * share), BM):
        rows = first + tl.arange(0, BM)
        if h < H:
            pa, pb = _turned_back(Q, q_row, H, WQ, GQ, DQ, COS, SIN, rows, N, h, d, eps, D, NORM)
        else:
            pa, pb = _turned_back(K, k_row, KH, WK, GK, DK, COS, SIN, rows, N, h - H, d, eps, D, NORM)
        da += pa
        db += pb
    if NORM:
        _put(PARTS, (program.to(tl.int64) * (H + KH) + h) * D + d, d < D // 2, da, db, D)


@triton.jit
def _swiglu(GATE, UP, OUT, gate_row, up_row, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(GATE + row * gate_row + c, mask=c < width, other=0.0).to(tl.float32)
    u = tl.load(UP + row * up_row + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(OUT + row * width + c, (g * tl.sigmoid(g) * u).to(OUT.dtype.element_ty), mask=c < width)


@triton.jit
def _swiglu_gradient(GATE, UP, G, DGATE, DUP, gate_row, up_row, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(GATE + row * gate_row + c, mask=c < width, other=0.0).to(tl.float32)
    u = tl.load(UP + row * up_row + c, mask=c < width, other=0.0).to(tl.float32)
    do, s = tl.load(G + row * width + c, mask=c < width, other=0.0).to(tl.float32), tl.sigmoid(g)
    tl.store(DGATE + row * width + c, (do * u * s * (1 + g * (1 - s))).to(DGATE.dtype.element_ty), mask=c < width)
    tl.store(DUP + row * width + c, (do * g * s).to(DUP.dtype.element_ty), mask=c < width)


def block(width: int) -> dict[str, int]:
    """How add_norm holds a row."""
    size = max(16, triton.next_power_of_2(width))
    return {"BLOCK": size, "num_warps": 4 if size <= 2048 else 8}


def _shares(tokens: int, programs: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(tokens a program, programs) of a gradient, where `programs` run side by side on one share; few, so that their
    parts of dw are small."""
    wanted = triton.cdiv(4 * multiprocessors(device), programs)
    share = max(1, triton.cdiv(triton.cdiv(tokens, wanted), tile)) * tile
    return share, triton.cdiv(tokens, share)


@operator(lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
def _launch_add_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor,
                     eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    if len(x):
        _add_norm[len(x),](x, y, weight, total, out, eps, x.shape[1], **block(x.shape[1]))
    return total, out


def _gradient_and_parts(total, *_):
    return torch.empty_like(total), total.new_empty(_shares(len(total), 1, 1, total.device)[1], total.shape[1],
                                                    dtype=torch.float32)


@operator(_gradient_and_parts)
def _launch_add_norm_gradient(total: torch.Tensor, weight: torch.Tensor, d_total: torch.Tensor, d_out: torch.Tensor,
                              eps: float, trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
    (N, C), (dx, parts) = total.shape, _gradient_and_parts(total)
    share, programs = _shares(N, 1, 1, total.device)
    if N:
        _add_norm_gradient[programs,](total, weight, d_total, d_out, dx, parts, eps, N, C, share, TRAINED=trained,
                                      **block(C))
    return dx, parts


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, eps):
        total, out = _launch_add_norm(x, y, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, out

    @staticmethod
    def backward(ctx, d_total, d_out):
        (total, weight), trained = ctx.saved_tensors, ctx.needs_input_grad[2]
        dx, parts = _launch_add_norm_gradient(total, weight, d_total.contiguous(), d_out.contiguous(), ctx.eps, trained)
        return dx, dx, parts.sum(0).to(weight.dtype) if trained else None, None


def _sizes(q: torch.Tensor, k: torch.Tensor, norm: bool) -> dict[str, int | bool]:
    D = q.shape[2]
    return {"H": q.shape[1], "KH": k.shape[1], "D": D, "BH": max(16, triton.next_power_of_2(D // 2)), "BM": TOKENS,
            "NORM": norm, "num_warps": 4}


def _queries_and_keys(q, k, v, cos, sin, wq, wk, eps, keys=None, *_):
    return q.new_empty(q.shape), k.new_empty(0 if keys is not None else k.shape)


@operator(_queries_and_keys, mutates=("keys", "values"))
def _launch_norm_rope(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                      wq: torch.Tensor | None, wk: torch.Tensor | None, eps: float, keys: torch.Tensor | None,
                      values: torch.Tensor | None, places: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys; no keys where they go to the cache."""
    out, cached = _queries_and_keys(q, k, v, cos, sin, wq, wk, eps, keys), keys is not None
    to = (keys, values, places) if cached else (out[1], v, cos)
    if len(q):
        _norm_rope[triton.cdiv(len(q), TOKENS), q.shape[1] + k.shape[1]](
            q, k, v, q if wq is None else wq, k if wk is None else wk, cos, sin, out[0], *to, eps, len(q), q.stride(0),
            k.stride(0), v.stride(0), keys.shape[2] if cached else 0, CACHED=cached, **_sizes(q, k, wq is not None))
    return out


def _gradients_and_parts(q, k, *_):
    programs = _shares(len(q), q.shape[1] + k.shape[1], TOKENS, q.device)[1]
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(programs, q.shape[1] + k.shape[1], q.shape[2],
                                                                   dtype=torch.float32)


@operator(_gradients_and_parts)
def _launch_norm_rope_gradient(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                               wq: torch.Tensor | None, wk: torch.Tensor | None, eps: float, gq: torch.Tensor,
                               gk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made, heads = _gradients_and_parts(q, k), q.shape[1] + k.shape[1]
    share, programs = _shares(len(q), heads, TOKENS, q.device)
    if len(q):
        _norm_rope_gradient[programs, heads](
            q, k, q if wq is None else wq, k if wk is None else wk, cos, sin, gq, gk, *made, eps, len(q), q.stride(0),
            k.stride(0), share, **_sizes(q, k, wq is not None))
    return made


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, wq, wk, eps):
        ctx.save_for_backward(cos, sin, *(() if wq is None else (q, k, wq, wk)))  # what is only turned is not needed
        ctx.eps = eps
        return _launch_norm_rope(q, k, v, cos, sin, wq, wk, eps, None, None, None)

    @staticmethod
    def backward(ctx, gq, gk):
        (cos, sin, *normed), gq, gk = ctx.saved_tensors, gq.contiguous(), gk.contiguous()
        q, k, wq, wk = normed or (gq, gk, None, None)
        dq, dk, parts = _launch_norm_rope_gradient(q, k, cos, sin, wq, wk, ctx.eps, gq, gk)
        of = [part.sum((0, 1)).to(wq.dtype) if wanted else None for part, wanted in zip(
            parts.tensor_split([q.shape[1]], 1), ctx.needs_input_grad[5:7], strict=True)]
        return dq, dk, None, None, None, *of, None


@operator(lambda gate, up: gate.new_empty(gate.shape))
def _launch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out, (N, width) = gate.new_empty(gate.shape), gate.shape
    if N:
        _swiglu[N, triton.cdiv(width, HIDDEN)](gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=HIDDEN,
                                               num_warps=4)
    return out


@operator(lambda gate, up, g: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)))
def _launch_swiglu_gradient(gate: torch.Tensor, up: torch.Tensor,
                            g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    d_gate, d_up, (N, width) = gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.shape
    if N:
        _swiglu_gradient[N, triton.cdiv(width, HIDDEN)](gate, up, g, d_gate, d_up, gate.stride(0), up.stride(0), width,
                                                        BLOCK=HIDDEN, num_warps=4)
    return d_gate, d_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _launch_swiglu(gate, up)

    @staticmethod
    def backward(ctx, g):
        return _launch_swiglu_gradient(*ctx.saved_tensors, g.contiguous())


# ---- The functions -----------------------------------------------------------------------------------------------


def add_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and its RMSNorm: x, y (T,C), weight (C) -> (T,C), (T,C). Differentiable in all three."""
    if use_triton(x.device, x.dtype):
        return _AddNorm.apply(x.contiguous(), y.contiguous(), weight, eps)
    return add_norm_reference(x, y, weight, eps)


def norm_rope(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary, norms, eps: float, slots=None):
    """Queries and keys with QK-norm and rotary positions: (T,H,D), (T,K,D). Differentiable in q, k and norms.

    q (T,H,D), k and v (T,K,D), each head contiguous; rotary: cosine and sine, (T,1,D/2) float32; norms: weights (D)
    of queries and keys, or None: no norm. slots: keys and values (T,K,S,D), rows and places (T) int64, where one token
    of each row is decoded; its key and value then go to their place of the cache, in the same launch, and no keys
    come back. A place past the end is for rows whose result means nothing. ValueError names what is not contiguous.
    """
    if not use_triton(q.device, q.dtype):
        return norm_rope_reference(q, k, v, rotary, norms, eps, slots)
    _check(q=q, k=k, v=v)
    weights = norms or (None, None)
    if slots is None:
        return _NormRope.apply(q, k, v, *rotary, *weights, eps)
    keys, values, _, places = slots
    return _launch_norm_rope(q, k, v, *rotary, *weights, eps, keys, values, places)[0], None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: (T,F), each row contiguous -> (T,F). Differentiable in both. ValueError as norm_rope."""
    if not use_triton(gate.device, gate.dtype):
        return swiglu_reference(gate, up)
    _check(gate=gate, up=up)
    return _SwiGLU.apply(gate, up)


def _check(**tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        if x.stride()[1:] != x[:1].contiguous().stride()[1:]:
            raise ValueError(f"{name}: strides {x.stride()} of {tuple(x.shape)}, expected the numbers of a token one "
                             f"behind the other")


# ---- PyTorch references ------------------------------------------------------------------------------------------


def add_norm_reference(x, y, weight, eps):
    x = x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)


def norm_rope_reference(q, k, v, rotary, norms, eps, slots=None):
    q, k = (rotate(x if w is None else F.rms_norm(x, w.shape, w, eps), rotary)
            for x, w in zip((q, k), norms or (None, None), strict=True))
    if slots is None:
        return q, k
    keys, values, rows, places = slots
    keys[rows, :, places], values[rows, :, places] = k, v
    return q, None


def rotate(x, rotary):
    """Rotary position embedding on halves, as in the published Qwen and Llama weights. x (T,H,D)."""
    cos, sin = rotary  # (T,1,D/2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def swiglu_reference(gate, up):
    return F.silu(gate) * up
