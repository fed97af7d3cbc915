"""Linear + log-softmax + gather: log-probabilities of chosen tokens without keeping any logits.

    z = hidden @ weight.T / temperature        logprob = z[target] - logsumexp(z)        p = softmax(z)
    entropy = logsumexp(z) - sum(p * z)
    dz = g_logprob * (onehot(target) - p)  -  g_entropy * p * (log p + entropy)
    d_hidden = dz @ weight / temperature       d_weight = dz.T @ hidden / temperature

Forward: one kernel; a tile of rows walks over a share of the vocabulary and carries maximum, sum of exponentials, sum
of p z and the target's logit; the shares are joined afterwards. No logit leaves the chip. Backward: a second kernel
recomputes a block of logits and writes dz in the dtype of the inputs to a buffer of at most BUFFER elements, whatever
N and V are; the two products with it are the library's. Where weight needs no gradient its product is left out.
FLOPs: 2 N C V forward; 6 N C V backward (4 without d_weight). Bytes: weight once a tile of rows, mostly from L2.

Legend: N positions, C width, V vocabulary; BM rows, BV vocabulary entries, BC channels a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels import input_precision, multiprocessors, operator, shared_memory, tl, triton, use_triton

# ---- Triton ------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles, its warps and pipeline stages."""

    BM: int
    BV: int
    BC: int
    warps: int
    stages: int


# In order of preference; the first that fits the card's shared memory is taken. Swept on an H200 in bf16 at N 4096,
# C 1024, V 151,936 (eval/results/gpu, step tiles): four stages 3.26 ms forward and 5.42 backward, three 3.81 and 5.40.
TILES = (Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 32, 8, 3), Tiles(64, 64, 32, 4, 3),
         Tiles(32, 32, 32, 4, 2))
BUFFER = 1 << 25  # elements of dz at a time: 64 MB in bf16; 4,096 rows x 8,192 entries keep the products large
ROWS = 4096  # rows of such a block


@triton.jit
def _logits(X, W, rows, words, N, C, V, scale, BM: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
            PRECISION: tl.constexpr):
    """One tile of z (BM,BV) in fp32."""
    z = tl.zeros([BM, BV], tl.float32)
    x = X + rows.to(tl.int64)[:, None] * C
    w = W + words.to(tl.int64)[:, None] * C
    for c in range(0, C, BC):
        d = c + tl.arange(0, BC)[None, :]
        left = tl.load(x + d, mask=(rows < N)[:, None] & (d < C), other=0.0)
        right = tl.load(w + d, mask=(words < V)[:, None] & (d < C), other=0.0)
        z = tl.dot(left, tl.trans(right), z, input_precision=PRECISION)
    return z * scale


@triton.jit
def _forward(X, W, TARGET, MAX, SUM, MEAN, CHOSEN, N, C, V, share, scale, BM: tl.constexpr, BV: tl.constexpr,
             BC: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of rows over one share of the vocabulary. Outputs (shares,N): maximum, sum exp(z - maximum),
    sum exp(z - maximum) z, and the target's logit where this share holds it, else 0."""
    rows, s = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    target = tl.load(TARGET + rows, mask=rows < N, other=-1)
    m, l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    e, chosen = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    end = tl.minimum(V, (s + 1) * share)
    for v in range(s * share, end, BV):
        words = v + tl.arange(0, BV)
        z = _logits(X, W, rows, words, N, C, end, scale, BM, BV, BC, PRECISION)
        here = (words < end)[None, :]
        chosen += tl.sum(tl.where((words[None, :] == target[:, None]) & here, z, 0.0), 1)
        new = tl.maximum(m, tl.max(tl.where(here, z, float("-inf")), 1))
        p, shrink = tl.where(here, tl.exp(z - new[:, None]), 0.0), tl.exp(m - new)
        l = l * shrink + tl.sum(p, 1)
        e = e * shrink + tl.sum(p * z, 1)
        m = new
    out = s.to(tl.int64) * N + rows
    tl.store(MAX + out, m, mask=rows < N)
    tl.store(SUM + out, l, mask=rows < N)
    tl.store(MEAN + out, e, mask=rows < N)
    tl.store(CHOSEN + out, chosen, mask=rows < N)


@triton.jit
def _logit_gradient(X, W, TARGET, LSE, ENTROPY, G_LOGPROB, G_ENTROPY, DZ, N, C, V, first, width, scale,
                    BM: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of dz / temperature: rows of this block x vocabulary entries first ... first + width. DZ (N,width)."""
    rows, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BV + tl.arange(0, BV)
    words = first + column
    z = _logits(X, W, rows, words, N, C, V, scale, BM, BV, BC, PRECISION)
    live = rows < N
    target = tl.load(TARGET + rows, mask=live, other=-1)
    logp = z - tl.load(LSE + rows, mask=live, other=0.0)[:, None]
    p = tl.exp(logp)
    g = tl.load(G_LOGPROB + rows, mask=live, other=0.0)[:, None]
    h = tl.load(G_ENTROPY + rows, mask=live, other=0.0)[:, None]
    entropy = tl.load(ENTROPY + rows, mask=live, other=0.0)[:, None]
    dz = g * (tl.where(words[None, :] == target[:, None], 1.0, 0.0) - p) - h * p * (logp + entropy)
    at = rows.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(DZ + at, (dz * scale).to(DZ.dtype.element_ty), mask=live[:, None] & (column < width)[None, :])


def shared_bytes(tiles: Tiles, element: int) -> int:
    """Upper estimate of a block's shared memory: both operands once per pipeline stage. Checked by the tests."""
    return (tiles.BM + tiles.BV) * tiles.BC * element * tiles.stages


def choose(dtype: torch.dtype, precision: str, limit: int) -> Tiles:
    """The first tiles whose estimate fits `limit` bytes; smaller ones where each product is three of TF32."""
    fitting = [t for t in TILES if shared_bytes(t, dtype.itemsize) <= limit]
    return fitting[0] if precision == "tf32" else next(t for t in fitting if t.BM <= 64)


def _sizes(hidden) -> dict:
    precision = input_precision(hidden.dtype)
    t = choose(hidden.dtype, precision, shared_memory(hidden.device))
    return {"BM": t.BM, "BV": t.BV, "BC": t.BC, "PRECISION": precision, "num_warps": t.warps, "num_stages": t.stages}


def _shares(rows: int, vocabulary: int, sizes: dict, device: torch.device) -> tuple[int, int]:
    """(vocabulary entries a share, shares): enough programs for the card where there are few rows."""
    wanted = max(1, 4 * multiprocessors(device) // max(1, triton.cdiv(rows, sizes["BM"])))
    share = triton.cdiv(triton.cdiv(vocabulary, wanted), sizes["BV"]) * sizes["BV"]
    return share, triton.cdiv(vocabulary, share)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n,k) @ b (k,m) in fp32 (fp64 where they are): a logit of 20 that is rounded to bf16 is off by up to 0.06."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return widened(a) @ widened(b)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_for(weight: torch.Tensor) -> torch.Tensor:
    """weight as `product` takes it many times: off CUDA no library multiplies bf16 to fp32, so that it is widened."""
    return weight if weight.is_cuda else widened(weight)


def _rows(hidden, *_):
    return tuple(hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))


@operator(_rows)
def _launch_forward(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, temperature: float,
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> log-prob, entropy, log-sum-exp, each (N) fp32."""
    (N, C), V, sizes = hidden.shape, len(weight), _sizes(hidden)
    share, shares = _shares(N, V, sizes, hidden.device)
    most, total, mean, chosen = hidden.new_empty(4, shares, N, dtype=torch.float32)
    if N:
        _forward[triton.cdiv(N, sizes["BM"]), shares](hidden, weight, target, most, total, mean, chosen, N, C, V,
                                                      share, 1 / temperature, **sizes)
    top = most.amax(0)  # (N)
    part = (most - top).exp()
    total = (total * part).sum(0)
    lse = top + total.log()
    # a target outside the vocabulary can't be looked for without waiting for the card: it shows as NaN
    known = torch.where((target >= 0) & (target < V), 0.0, torch.nan)
    return chosen.sum(0) - lse + known, lse - (mean * part).sum(0) / total, lse


def _gradients(hidden, weight, *rest):
    return tuple(torch.empty_like(x) if wanted else x.new_empty(0)
                 for x, wanted in zip((hidden, weight), rest[-2:], strict=True))


@operator(_gradients)
def _launch_backward(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, lse: torch.Tensor,
                     entropy: torch.Tensor, g_logprob: torch.Tensor, g_entropy: torch.Tensor, temperature: float,
                     for_hidden: bool, for_weight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of hidden and weight; one that is not wanted is empty."""
    (N, C), V, sizes = hidden.shape, len(weight), _sizes(hidden)
    d_hidden = torch.empty_like(hidden) if for_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else weight.new_empty(0)
    rows, columns = min(N, ROWS), min(V, BUFFER // max(1, min(N, ROWS)))
    for r in range(0, N, max(1, rows)):
        x = hidden[r:r + rows]
        sums = hidden.new_zeros(len(x), C, dtype=torch.float32) if for_hidden else None
        for v in range(0, V, columns):
            w = weight[v:v + columns]
            dz = hidden.new_empty(len(x), len(w))
            _logit_gradient[triton.cdiv(len(x), sizes["BM"]), triton.cdiv(len(w), sizes["BV"])](
                x, weight, target[r:r + rows], lse[r:], entropy[r:], g_logprob[r:], g_entropy[r:], dz, len(x), C, V,
                v, len(w), 1 / temperature, **sizes)
            if for_hidden:
                sums += product(dz, w)
            if for_weight:
                d_weight[v:v + columns] += product(dz.T, x)
            del dz  # before the next one is made
        if for_hidden:
            d_hidden[r:r + rows] = sums
    return d_hidden, d_weight.to(weight.dtype)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        ctx.set_materialize_grads(False)
        logprob, entropy, lse = _launch_forward(hidden, weight, target, temperature)
        ctx.save_for_backward(hidden, weight, target, lse, entropy)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        hidden, weight, target, lse, entropy = ctx.saved_tensors
        g_logprob, g_entropy = (torch.zeros_like(lse) if g is None else g.contiguous() for g in (g_logprob, g_entropy))
        wanted = ctx.needs_input_grad[:2]
        made = _launch_backward(hidden, weight, target, lse, entropy, g_logprob, g_entropy, ctx.temperature, *wanted)
        return *(d if want else None for d, want in zip(made, wanted, strict=True)), None, None


# ---- The function ------------------------------------------------------------------------------------------------


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
                   temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N,C), weight (V,C), target (N,) int64 -> logprob (N,), entropy (N,) in nats, both fp32.

    hidden and weight: fp32, bf16 or fp16 (or fp64, and then so are the results). Differentiable in hidden and, where
    it requires grad, in weight. Sums are taken in fp32. ValueError on a shape, dtype or device that does not fit, a
    target outside the vocabulary (on CUDA its log-prob is NaN instead: a look would wait for the card) or a
    temperature <= 0.
    """
    check(hidden, weight, target, temperature)
    if not use_triton(hidden.device, hidden.dtype):
        return _Reference.apply(hidden, weight, target, temperature)
    return _LinearLogprob.apply(hidden.contiguous(), weight.contiguous(), target.contiguous(), temperature)


def check(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, temperature: float) -> None:
    """ValueError, as linear_logprob has it, where they do not fit each other."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: expected (N,C) and (V,C)")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)}: expected ({len(hidden)},), one a row of hidden")
    if hidden.dtype != weight.dtype or not hidden.device == weight.device == target.device:
        raise ValueError(f"hidden {hidden.dtype} on {hidden.device}, weight {weight.dtype} on {weight.device}, target "
                         f"on {target.device}: expected one dtype and one device")
    if target.dtype != torch.int64:
        raise ValueError(f"target {target.dtype}: expected int64")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    if len(target) and not target.is_cuda and not 0 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(f"target: ids must lie in 0..{len(weight) - 1}")
    if use_triton(hidden.device, hidden.dtype) and hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden {hidden.dtype}: the kernel takes fp32, bf16 and fp16")


# ---- PyTorch reference -------------------------------------------------------------------------------------------

CHUNK = 1 << 22  # logits at a time: 16 MB in fp32
KEPT = 1 << 24  # probabilities that are kept for the backward pass where there are no more: 64 MB in fp32
LEAST = 64  # rows at a time, as long as they are within KEPT: fewer would read a large head again and again


class _Reference(torch.autograd.Function):
    """Rows in chunks of about CHUNK logits. The backward pass finds their probabilities, or recomputes them where they
    are many or the entropy has a gradient, too: to the same bits."""

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprob = hidden.new_empty(len(hidden), dtype=wide)
        entropy, lse = torch.empty_like(logprob), torch.empty_like(logprob)
        head, kept = head_for(weight), []
        keep = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= KEPT
        for rows in _chunks(len(hidden), len(weight)):
            z = _divided(product(hidden[rows], head.T), temperature)  # (n,V)
            lse[rows] = z.logsumexp(-1)
            logprob[rows] = z.gather(-1, target[rows, None])[:, 0] - lse[rows]
            p = (z - lse[rows, None]).exp_()
            entropy[rows] = lse[rows] - z.mul_(p).sum(-1)
            if keep:
                kept.append(p)
        ctx.save_for_backward(hidden, weight, target, lse, entropy, *kept)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        hidden, weight, target, lse, entropy, *kept = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight, wanted = None, ctx.needs_input_grad[1]
        head = head_for(weight)
        for i, rows in enumerate(_chunks(len(hidden), len(weight))):
            if kept and g_entropy is None:
                dz = kept[i] * -g_logprob[rows, None]
            else:
                logp = _divided(product(hidden[rows], head.T), ctx.temperature).sub_(lse[rows, None])  # (n,V)
                if g_entropy is None:
                    dz = logp.exp_().mul_(-g_logprob[rows, None])
                else:
                    p = logp.exp()
                    dz = torch.zeros_like(p) if g_logprob is None else p * -g_logprob[rows, None]
                    dz -= g_entropy[rows, None] * p * (logp + entropy[rows, None])
            if g_logprob is not None:
                dz.scatter_add_(-1, target[rows, None], g_logprob[rows, None])
            dz = _divided(dz, ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = dz @ weight
            if wanted and not kept and d_weight is not None and dz.dtype == d_weight.dtype:
                d_weight.addmm_(dz.T, hidden[rows])  # of a large head, adding takes as long as the product
            elif wanted:
                part = (dz.T @ hidden[rows]).to(lse.dtype)
                d_weight = part if d_weight is None else d_weight.add_(part)
        return d_hidden, d_weight.to(weight.dtype) if wanted else None, None, None


def _divided(x: torch.Tensor, temperature: float) -> torch.Tensor:
    """x / temperature, in place; x as it is where that changes nothing, since a pass over all logits takes a while."""
    return x if temperature == 1 else x.div_(temperature)


def _chunks(n: int, vocabulary: int):
    step = max(1, CHUNK // vocabulary, min(LEAST, KEPT // vocabulary))
    return [slice(i, min(i + step, n)) for i in range(0, max(1, n), step)]  # of no rows one, whose sums are zero
