"""Linear + log-softmax + gather: log-probabilities of chosen tokens without keeping any logits.

    z = hidden @ weight.T / temperature        logprob = z[target] - logsumexp(z)        p = softmax(z)
    entropy = logsumexp(z) - sum(p * z)
    dz = g_logprob * (onehot(target) - p)  -  g_entropy * p * (log p + entropy)

Legend: N positions, C width, V vocabulary. PyTorch reference: rows are taken in chunks of at most CHUNK logits,
and the backward pass recomputes them, so the extra memory does not grow with N.
"""

from __future__ import annotations

import torch

CHUNK = 1 << 22  # logits at a time: 16 MB in fp32


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature):
        ctx.set_materialize_grads(False)
        logprob = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy, lse = torch.empty_like(logprob), torch.empty_like(logprob)
        for rows in _chunks(len(hidden), len(weight)):
            z = (hidden[rows] @ weight.T).float().div_(temperature)  # (n,V)
            lse[rows] = z.logsumexp(-1)
            logprob[rows] = z.gather(-1, target[rows, None])[:, 0] - lse[rows]
            p = (z - lse[rows, None]).exp_()
            entropy[rows] = lse[rows] - (p * z).sum(-1)
        ctx.save_for_backward(hidden, weight, target, lse, entropy)
        ctx.temperature = temperature
        return logprob, entropy

    @staticmethod
    def backward(ctx, g_logprob, g_entropy):
        hidden, weight, target, lse, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), len(weight)):
            z = (hidden[rows] @ weight.T).float().div_(ctx.temperature).sub_(lse[rows, None])  # log p (n,V)
            p = z.exp()
            dz = torch.zeros_like(p)
            if g_logprob is not None:
                dz.addcmul_(p, g_logprob[rows, None], value=-1)
                dz.scatter_add_(-1, target[rows, None], g_logprob[rows, None])
            if g_entropy is not None:
                dz -= g_entropy[rows, None] * p * (z + entropy[rows, None])
            dz = dz.div_(ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = dz @ weight
            if d_weight is not None:
                d_weight += (dz.T @ hidden[rows]).float()
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _chunks(n: int, vocabulary: int):
    step = max(1, CHUNK // vocabulary)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
                   temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N,C), weight (V,C), target (N,) int64 -> logprob (N,), entropy (N,) in nats, both fp32.

    Differentiable in hidden and, where it requires grad, in weight. Sums are taken in fp32. ValueError on a
    shape that does not fit, a target outside the vocabulary or a temperature <= 0.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: expected (N,C) and (V,C)")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)}: expected ({len(hidden)},), one a row of hidden")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(f"target: ids must lie in 0..{len(weight) - 1}")
    return _LinearLogprob.apply(hidden, weight, target, temperature)
