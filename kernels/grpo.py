"""GRPO: group advantages, clipped ratio, KL and the reduction of the paper's joint objective in one function.

    A_i       = R_i - mean of R over the group of rollout i              (Dr. GRPO: not divided by the deviation)
    r_t       = exp(new_t - old_t)
    kl_t      = exp(ref_t - new_t) - (ref_t - new_t) - 1                 (k3)
    loss      = - 1/M  sum over sequences s of the token mean of  min(r A, clip(r, 1-low, 1+high) A) - beta kl

M is the number of sequences (interactions) of the whole optimiser step, not of this micro-batch: gradients of
micro-batches add up to the gradient of the batch.

    d loss / d new_t = - w_t (A r [unclipped] - beta (1 - exp(ref_t - new_t))),      w_t = 1 / (M * length of s)

Legend: N packed sampled tokens, S sequences, R rollouts, groups are ragged.
"""

from __future__ import annotations

import torch


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


def grpo_loss(new: torch.Tensor, old: torch.Tensor, ref: torch.Tensor | None, rewards: torch.Tensor,
              group: torch.Tensor, rollout: torch.Tensor, offsets: torch.Tensor, interactions: int,
              eps_low: float = 0.2, eps_high: float = 0.2, beta: float = 0.0,
              divide_by_std: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (scalar, differentiable in `new`) and diagnostics summed over this micro-batch.

    new, old, ref (N,): log-probs of the packed sampled tokens under the policy, the policy that sampled them, the
    reference (None: no KL term). rewards, group (R,): reward and group of *every* rollout of the step. rollout
    (S,): the rollout of each sequence here. offsets (S+1,): token ranges of the sequences. interactions: M above.
    Diagnostics are sums over tokens (kl, clip_low, clip_high, tokens) and extremes (ratio_max, ratio_min).
    ValueError names the argument that does not fit.
    """
    if not new.shape == old.shape or (ref is not None and ref.shape != new.shape):
        raise ValueError(f"old, ref: expected the shape of new, {tuple(new.shape)}")
    if len(offsets) != len(rollout) + 1 or int(offsets[0]) != 0 or int(offsets[-1]) != len(new):
        raise ValueError(f"offsets: expected {len(rollout) + 1} ascending values from 0 to {len(new)}")
    if rewards.shape != group.shape:
        raise ValueError(f"group: {len(group)} ids for {len(rewards)} rewards")
    if beta and ref is None:
        raise ValueError("ref: needed where beta is not 0")
    lengths = offsets.diff()  # (S)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=new.device), lengths)  # (N)
    weight = (1.0 / (lengths.to(new.dtype) * interactions))[sequence]  # (N)
    advantage = group_advantages(rewards, group, divide_by_std).to(new.dtype)[rollout][sequence]  # (N)
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    with torch.no_grad():
        stats = {"tokens": torch.tensor(float(len(new))),
                 "clip_low": ((ratio < 1 - eps_low) & (advantage < 0)).sum().float(),
                 "clip_high": ((ratio > 1 + eps_high) & (advantage > 0)).sum().float(),
                 "ratio_max": ratio.max() if len(new) else torch.tensor(1.0),
                 "ratio_min": ratio.min() if len(new) else torch.tensor(1.0),
                 "kl": torch.tensor(0.0)}
    if ref is not None:
        delta = ref - new
        kl = delta.exp() - delta - 1
        stats["kl"] = kl.detach().sum()
        objective = objective - beta * kl
    return -(weight * objective).sum(), stats
