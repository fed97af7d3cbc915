"""GRPO: group advantages, clipped ratio, KL and the reduction of the paper's joint objective in one function.

    A_i       = R_i - mean of R over the group of rollout i              (Dr. GRPO: not divided by the deviation)
    r_t       = exp(new_t - old_t)
    kl_t      = exp(ref_t - new_t) - (ref_t - new_t) - 1                 (k3)
    loss      = - 1/M  sum over sequences s of the token mean of  min(r A, clip(r, 1-low, 1+high) A) - beta kl

M is the number of sequences (interactions) of the whole optimiser step, not of this micro-batch: gradients of
micro-batches add up to the gradient of the batch.

    d loss / d new_t = - w_t (A r [unclipped] - beta (1 - exp(ref_t - new_t))),      w_t = 1 / (M * length of s)

Triton: a tiny kernel turns rewards into advantages; then one pass over the tokens, a program a sequence, writes the
gradient and the partial sums of loss and diagnostics. Bytes a token: three log-probs read, one gradient written.

From hidden states (linear_grpo_loss) the gradient goes on through the head in the same sweep, as a token's needs
nothing but its own row of logits z and what is known before the pass:

    new_t = z[target] - logsumexp(z)        dz = d loss / d new_t * (onehot(target) - softmax(z)) / temperature

The library multiplies BUFFER logits' worth of rows with the head; one kernel, a program a row, takes new_t and its
gradient from them and writes dz over them; the library multiplies dz back. No logit is computed twice.

Legend: N packed sampled tokens, S sequences, R rollouts, groups are ragged; C width, V vocabulary.
"""

from __future__ import annotations

import torch

from kernels import operator, tl, triton, use_triton
from kernels.logprob import BUFFER, check, head_for, linear_logprob, product

STATS = ("loss", "tokens", "clip_low", "clip_high", "kl", "zero_advantage", "ratio_max", "ratio_min")
ROLLOUTS = 32  # compared at a time by _advantages
TOKENS = 512  # of one sequence at a time: two or three steps for the responses of the paper; not yet timed on a card
LOGITS = 4096  # of a row at a time, by WARPS warps: 16 KB under way a program; not yet timed on a card
WARPS = 8

# ---- Triton ------------------------------------------------------------------------------------------------------


@triton.jit
def _advantages(REWARD, GROUP, OUT, N, BY_STD: tl.constexpr, BLOCK: tl.constexpr):
    """Advantages of BLOCK rollouts; group ids are ragged and in any order, so each is compared with all."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reward, group = tl.load(REWARD + i, mask=i < N, other=0.0), tl.load(GROUP + i, mask=i < N, other=-1)
    least = reward
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        same = (tl.load(GROUP + j, mask=j < N, other=-2)[None, :] == group[:, None])
        others = tl.load(REWARD + j, mask=j < N, other=0.0)[None, :]
        least = tl.minimum(least, tl.min(tl.where(same, others, float("inf")), 1))
    # subtracting one member first keeps ties exact: (r - least) is 0 for all of them, and so is its mean
    total, square, count = tl.zeros_like(reward), tl.zeros_like(reward), tl.zeros_like(reward)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        same = (tl.load(GROUP + j, mask=j < N, other=-2)[None, :] == group[:, None])
        shifted = tl.where(same, tl.load(REWARD + j, mask=j < N, other=0.0)[None, :] - least[:, None], 0.0)
        total += tl.sum(shifted, 1)
        square += tl.sum(shifted * shifted, 1)
        count += tl.sum(tl.where(same, 1.0, 0.0), 1)
    mean = total / tl.maximum(count, 1.0)
    advantage = reward - least - mean
    if BY_STD:
        variance = tl.maximum(square / tl.maximum(count, 1.0) - mean * mean, 0.0)
        advantage = advantage / (tl.sqrt(variance) + 1e-6)
    tl.store(OUT + i, advantage.to(OUT.dtype.element_ty), mask=i < N)


@triton.jit
def _sequence(s, ADVANTAGE, ROLLOUT, OFFSETS, interactions):
    """Of sequence s: its first token, the one past its last, its advantage, and the weight of each of its tokens."""
    start, end = tl.load(OFFSETS + s), tl.load(OFFSETS + s + 1)
    weight = 1.0 / (tl.maximum((end - start).to(tl.float32), 1.0) * interactions)
    return start, end, tl.load(ADVANTAGE + tl.load(ROLLOUT + s)), weight


@triton.jit
def _objective(new, old, ref, a, low, high, beta, HAS_REF: tl.constexpr):
    """Of tokens whose advantage is a: ratio, objective, the gradient of that in `new`, and KL."""
    ratio = tl.exp(new - old)
    clipped = tl.minimum(tl.maximum(ratio, 1 - low), 1 + high)
    objective = tl.minimum(ratio * a, clipped * a)
    gradient = tl.where(ratio * a <= clipped * a, ratio * a, 0.0)
    kl = tl.zeros_like(ratio)
    if HAS_REF:
        delta = ref - new
        kl = tl.exp(delta) - delta - 1
        objective -= beta * kl
        gradient -= beta * (1 - tl.exp(delta))
    return ratio, objective, gradient, kl


@triton.jit
def _loss(NEW, OLD, REF, ADVANTAGE, ROLLOUT, OFFSETS, GRADIENT, PARTS, interactions, low, high, beta, S,
          HAS_REF: tl.constexpr, BLOCK: tl.constexpr):
    """One sequence: gradient of its tokens, and its row of PARTS (8,S) in the order of STATS."""
    s = tl.program_id(0)
    start, end, a, weight = _sequence(s, ADVANTAGE, ROLLOUT, OFFSETS, interactions)
    a += tl.zeros([BLOCK], tl.float32)
    loss, lows, highs = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    kls, zeros = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    most, least = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("inf"), tl.float32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        live = t < end
        new, old = tl.load(NEW + t, mask=live, other=0.0), tl.load(OLD + t, mask=live, other=0.0)
        ref = tl.load(REF + t, mask=live, other=0.0)
        ratio, objective, gradient, kl = _objective(new, old, ref, a, low, high, beta, HAS_REF)
        kls += tl.where(live, kl, 0.0)
        loss -= tl.where(live, objective, 0.0) * weight
        lows += tl.where(live & (ratio < 1 - low) & (a < 0), 1.0, 0.0)
        highs += tl.where(live & (ratio > 1 + high) & (a > 0), 1.0, 0.0)
        zeros += tl.where(live & (a == 0), 1.0, 0.0)
        most = tl.maximum(most, tl.where(live, ratio, 0.0))
        least = tl.minimum(least, tl.where(live, ratio, float("inf")))
        tl.store(GRADIENT + t, -weight * gradient, mask=live)
    out = PARTS + s
    tl.store(out, tl.sum(loss))
    tl.store(out + S, (end - start).to(tl.float32))
    tl.store(out + 2 * S, tl.sum(lows))
    tl.store(out + 3 * S, tl.sum(highs))
    tl.store(out + 4 * S, tl.sum(kls))
    tl.store(out + 5 * S, tl.sum(zeros))
    tl.store(out + 6 * S, tl.max(most))
    tl.store(out + 7 * S, tl.min(least))


@triton.jit
def _sweep(Z, DZ, TARGET, OLD, REF, SEQUENCE, ADVANTAGE, ROLLOUT, OFFSETS, LOGPROB, ENTROPY, interactions, low, high,
           beta, scale, V, pitch, HAS_REF: tl.constexpr, BLOCK: tl.constexpr):
    """One row of products with the head: its log-prob and entropy; then dz / temperature, whose rows of `pitch` begin
    where those of Z (n,V) do. A 16-bit dz fills half of what Z did, so what is written was read, or is read just now
    by another warp: hence the barrier."""
    t = tl.program_id(0).to(tl.int64)
    Z += t * V
    DZ += t * pitch
    target = tl.load(TARGET + t)
    # a target outside the vocabulary can't be looked for without waiting for the card: it shows as NaN
    chosen = tl.load(Z + target, mask=(target >= 0) & (target < V), other=float("nan")) * scale
    m, l, e = float("-inf"), 0.0, 0.0
    for v in range(0, V, BLOCK):
        words = v + tl.arange(0, BLOCK)
        z = tl.load(Z + words, mask=words < V, other=float("-inf")) * scale
        top = tl.maximum(m, tl.max(z))
        p, shrink = tl.exp(z - top), tl.exp(m - top)
        l = l * shrink + tl.sum(p)
        e = e * shrink + tl.sum(p * tl.where(words < V, z, 0.0))
        m = top
    lse = m + tl.log(l)
    new = chosen - lse
    tl.store(LOGPROB + t, new)
    tl.store(ENTROPY + t, lse - e / l)
    _, _, a, weight = _sequence(tl.load(SEQUENCE + t), ADVANTAGE, ROLLOUT, OFFSETS, interactions)
    _, _, gradient, _ = _objective(new, tl.load(OLD + t), tl.load(REF + t), a, low, high, beta, HAS_REF)
    g = -weight * gradient * scale
    for v in range(0, V, BLOCK):
        words = v + tl.arange(0, BLOCK)
        z = tl.load(Z + words, mask=words < V, other=0.0) * scale
        tl.debug_barrier()
        dz = g * (tl.where(words == target, 1.0, 0.0) - tl.exp(z - lse))
        tl.store(DZ + words, dz.to(DZ.dtype.element_ty), mask=words < V)


@operator(lambda rewards, *_: rewards.new_empty(len(rewards), dtype=torch.float32))
def _launch_advantages(rewards: torch.Tensor, group: torch.Tensor, by_std: bool) -> torch.Tensor:
    """rewards (R) fp64, group (R) int64 -> (R) fp32."""
    advantages = rewards.new_empty(len(rewards), dtype=torch.float32)
    if len(rewards):
        _advantages[triton.cdiv(len(rewards), ROLLOUTS),](rewards, group, advantages, len(rewards), BY_STD=by_std,
                                                          BLOCK=ROLLOUTS, num_warps=4)
    return advantages


def _gradient_and_parts(new, old, ref, advantages, rollout, *_):
    return torch.empty_like(new), new.new_empty(len(STATS), len(rollout))


@operator(_gradient_and_parts)
def _launch_loss(new: torch.Tensor, old: torch.Tensor, ref: torch.Tensor | None, advantages: torch.Tensor,
                 rollout: torch.Tensor, offsets: torch.Tensor, interactions: float, low: float, high: float,
                 beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    S = len(rollout)
    gradient, parts = torch.empty_like(new), new.new_empty(len(STATS), S)
    if S:
        _loss[S,](new, old, new if ref is None else ref, advantages, rollout, offsets, gradient, parts, interactions,
                  low, high, beta, S, HAS_REF=ref is not None, BLOCK=TOKENS, num_warps=4)
    return gradient, parts


def _swept(hidden, head, target, *rest):
    return (*(hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2)),
            *(torch.empty_like(x) if wanted else x.new_empty(0)
              for x, wanted in zip((hidden, head), rest[-2:], strict=True)))


@operator(_swept)
def _launch_sweep(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, old: torch.Tensor,
                  ref: torch.Tensor | None, advantages: torch.Tensor, rollout: torch.Tensor, offsets: torch.Tensor,
                  interactions: float, low: float, high: float, beta: float, temperature: float, for_hidden: bool,
                  for_head: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> log-prob and entropy (N) fp32, gradients of hidden and head; one that is not wanted is empty."""
    N, V, wide = len(hidden), len(head), head_for(head)
    logprob, entropy, d_hidden, _ = _swept(hidden, head, target, for_hidden, False)
    d_head = torch.zeros_like(head, dtype=torch.float32) if for_head else head.new_empty(0)
    sequence = torch.searchsorted(offsets, torch.arange(N, device=offsets.device), right=True) - 1  # (N)
    rows = max(1, BUFFER // V)
    for i in range(0, N, rows):
        x = hidden[i:i + rows]
        z = product(x, wide.T)  # (n,V) fp32
        dz = z.view(hidden.dtype)[:, :V]  # in its place
        _sweep[len(x),](z, dz, target[i:], old[i:], (old if ref is None else ref)[i:], sequence[i:], advantages,
                        rollout, offsets, logprob[i:], entropy[i:], interactions, low, high, beta, 1 / temperature, V,
                        dz.stride(0), HAS_REF=ref is not None, BLOCK=LOGITS, num_warps=WARPS)
        if for_hidden:
            d_hidden[i:i + rows] = product(dz, head)
        if for_head and dz.dtype == d_head.dtype:
            d_head.addmm_(dz.T, x)
        elif for_head:
            d_head += product(dz.T, x)
        del z, dz  # before the next ones are made
    return logprob, entropy, d_hidden, d_head.to(head.dtype)


class _GrpoLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, which has everything at hand; backward only scales it."""

    @staticmethod
    def forward(ctx, new, old, ref, advantages, rollout, offsets, interactions, low, high, beta):
        gradient, parts = _launch_loss(new, old, ref, advantages, rollout, offsets, interactions, low, high, beta)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(parts)
        return parts[0].sum(), parts

    @staticmethod
    def backward(ctx, g_loss, _):
        return (ctx.saved_tensors[0] * g_loss, *[None] * 9)


class _LinearGrpoLoss(torch.autograd.Function):
    """As above, with the gradients of hidden and head."""

    @staticmethod
    def forward(ctx, hidden, head, target, old, ref, *rest):
        *rest, temperature = rest
        new, entropy, *gradients = _launch_sweep(hidden, head, target, old, ref, *rest, temperature,
                                                 *ctx.needs_input_grad[:2])
        _, parts = _launch_loss(new, old, ref, *rest)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts, new, entropy)
        return parts[0].sum(), parts, new, entropy

    @staticmethod
    def backward(ctx, g_loss, *_):
        # in place: another gradient of a large head may not fit. A second backward pass is refused by autograd
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(d.mul_(g_loss) if want else None for d, want in wanted), *[None] * 11


def _contiguous(*tensors):
    return (None if x is None else x.contiguous() for x in tensors)


def _stats(parts) -> dict[str, torch.Tensor]:
    """Diagnostics from the sequences' parts (8,S)."""
    if not parts.shape[1]:
        return {**dict.fromkeys(STATS[1:], parts.new_zeros(())), "ratio_max": parts.new_ones(()),
                "ratio_min": parts.new_ones(())}
    sums = parts[:6].sum(1)
    return {**dict(zip(STATS[1:6], sums[1:], strict=True)), "ratio_max": parts[6].max(), "ratio_min": parts[7].min()}


# ---- The function ------------------------------------------------------------------------------------------------


def grpo_loss(new: torch.Tensor, old: torch.Tensor, ref: torch.Tensor | None, rewards: torch.Tensor,
              group: torch.Tensor, rollout: torch.Tensor, offsets: torch.Tensor, interactions: int,
              eps_low: float = 0.2, eps_high: float = 0.2, beta: float = 0.0,
              divide_by_std: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (scalar, differentiable in `new`) and diagnostics summed over this micro-batch.

    new, old, ref (N,): log-probs of the packed sampled tokens under the policy, the policy that sampled them, the
    reference (None: no KL term). rewards, group (R,): reward and group of *every* rollout of the step. rollout
    (S,): the rollout of each sequence here. offsets (S+1,): token ranges of the sequences. interactions: M above.
    Log-probs are fp32 (or fp64), rewards of any float type, ids and offsets int64. Diagnostics are sums over tokens
    (tokens, kl, clip_low, clip_high, zero_advantage: tokens whose advantage is 0) and extremes (ratio_max, ratio_min).
    ValueError names the argument that does not fit; values are looked at where that waits for no card.
    """
    _check(new, old, ref, rewards, group, rollout, offsets, beta)
    if use_triton(new.device, new.dtype):
        if new.dtype != torch.float32:
            raise ValueError(f"new {new.dtype}: the kernel takes fp32 log-probs")
        advantages = _launch_advantages(rewards.double().contiguous(), group.contiguous(), divide_by_std)
        loss, parts = _GrpoLoss.apply(*_contiguous(new, old, ref, advantages, rollout, offsets), float(interactions),
                                      eps_low, eps_high, beta)
        return loss, _stats(parts)
    return grpo_loss_reference(new, old, ref, rewards, group, rollout, offsets, interactions, eps_low, eps_high, beta,
                               divide_by_std)


def linear_grpo_loss(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, old: torch.Tensor,
                     ref: torch.Tensor | None, rewards: torch.Tensor, group: torch.Tensor, rollout: torch.Tensor,
                     offsets: torch.Tensor, interactions: int, eps_low: float = 0.2, eps_high: float = 0.2,
                     beta: float = 0.0, divide_by_std: bool = False, temperature: float = 1.0,
                     ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """grpo_loss of the log-probs that linear_logprob has: loss (scalar, differentiable in `hidden` and, where it
    requires grad, in `head`), diagnostics, and log-prob and entropy (N,), which carry no gradient here.

    hidden (N,C), head (V,C) and target (N,) int64 as in linear_logprob, the rest as in grpo_loss. The kernels do it in
    one sweep and hold at most BUFFER logits (or a row's); elsewhere, and where no gradient is wanted, it is one
    function after the other. `old` may be of any float type. ValueError as these two have it.
    """
    arguments = rewards, group, rollout, offsets
    old = old.to(torch.promote_types(hidden.dtype, torch.float32))
    if not (use_triton(hidden.device, hidden.dtype) and torch.is_grad_enabled() and (
            hidden.requires_grad or head.requires_grad)):
        new, entropy = linear_logprob(hidden, head, target, temperature)
        loss, stats = grpo_loss(new, old, ref, *arguments, interactions, eps_low, eps_high, beta, divide_by_std)
        return loss, stats, new.detach(), entropy.detach()
    check(hidden, head, target, temperature)
    _check(hidden.new_empty(len(hidden), dtype=torch.float32), old, ref, *arguments, beta)
    advantages = _launch_advantages(rewards.double().contiguous(), group.contiguous(), divide_by_std)
    loss, parts, new, entropy = _LinearGrpoLoss.apply(
        *_contiguous(hidden, head, target, old, ref, advantages, rollout, offsets), float(interactions), eps_low,
        eps_high, beta, temperature)
    return loss, _stats(parts), new, entropy


def _check(new, old, ref, rewards, group, rollout, offsets, beta) -> None:
    looked_at = not new.is_cuda
    if not new.shape == old.shape or (ref is not None and ref.shape != new.shape):
        raise ValueError(f"old, ref: expected the shape of new, {tuple(new.shape)}")
    if len(offsets) != len(rollout) + 1 or (looked_at and (int(offsets[0]) != 0 or int(offsets[-1]) != len(new))):
        raise ValueError(f"offsets: expected {len(rollout) + 1} ascending values from 0 to {len(new)}")
    if rewards.shape != group.shape:
        raise ValueError(f"group: {len(group)} ids for {len(rewards)} rewards")
    if len(rollout) and looked_at and not 0 <= int(rollout.min()) <= int(rollout.max()) < len(rewards):
        raise ValueError(f"rollout: expected indices into {len(rewards)} rewards")
    tensors = {"old": old, "ref": ref, "rewards": rewards, "group": group, "rollout": rollout, "offsets": offsets}
    for name, tensor in tensors.items():
        kind = torch.int64 if name in ("group", "rollout", "offsets") else None if name == "rewards" else new.dtype
        if tensor is not None and (tensor.device != new.device or kind not in (None, tensor.dtype)):
            raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, expected {kind or 'floats'} on {new.device}")
    if beta and ref is None:
        raise ValueError("ref: needed where beta is not 0")


# ---- PyTorch reference -------------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, group: torch.Tensor, divide_by_std: bool = False) -> torch.Tensor:
    """rewards (R,), group (R,) int64 -> (R,): reward minus the mean of its group; exactly 0 where all tie.

    divide_by_std: the original GRPO, as an ablation.
    """
    size = int(group.max()) + 1 if len(group) else 0
    count = torch.bincount(group, minlength=size).to(rewards.dtype)
    # subtracting one member first keeps ties exact: (r - r0) is 0 for all of them, and so is its mean
    least = rewards.new_full((size,), torch.inf).scatter_reduce(0, group, rewards, "amin")
    shifted = rewards - least[group]
    mean = rewards.new_zeros(size).index_add(0, group, shifted) / count
    advantages = shifted - mean[group]
    if divide_by_std:
        variance = rewards.new_zeros(size).index_add(0, group, advantages**2) / count
        advantages = advantages / (variance.sqrt()[group] + 1e-6)
    return advantages


def grpo_loss_reference(new, old, ref, rewards, group, rollout, offsets, interactions, eps_low, eps_high, beta,
                        divide_by_std):
    """Same result, in the words of the formula."""
    lengths = offsets.diff()  # (S)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=new.device), lengths)  # (N)
    weight = (1.0 / (lengths.to(new.dtype) * interactions))[sequence]  # (N)
    advantage = group_advantages(rewards, group, divide_by_std).to(new.dtype)[rollout][sequence]  # (N)
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        stats = {"tokens": new.new_tensor(float(len(new))),
                 "clip_low": ((ratio < 1 - eps_low) & (advantage < 0)).sum().float(),
                 "clip_high": ((ratio > 1 + eps_high) & (advantage > 0)).sum().float(),
                 "zero_advantage": (advantage == 0).sum().float(),
                 "ratio_max": ratio.max() if len(new) else new.new_ones(()),
                 "ratio_min": ratio.min() if len(new) else new.new_ones(()),
                 "kl": new.new_zeros(())}
    if ref is not None:
        delta = ref - new
        kl = delta.exp() - delta - 1
        stats["kl"] = kl.detach().sum()
        objective = objective - beta * kl
    return -(weight * objective).sum(), stats
