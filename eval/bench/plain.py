"""One GRPO step as a straightforward implementation does it: what the ideas of memtrain.py are measured against.

Same weights (memtrain.Decoder), same prompts and memory loop (memtrain.Agent), same random numbers, same equations
(the paper's joint GRPO). What differs is how it is computed:

                   plain                                            memtrain.py
    prompts        computed anew for every sample                   a prefix once for its group
    batches        padded rows                                      packed rows, similar suffixes in one attention call
    finished rows  decoded on until the batch is done               dropped
    training       logits and softmax of every position, (B,T,V)    of the sampled tokens, in chunks, never stored
    no signal      trained on like the rest                         filtered before any computation

Where a choice was open, it went in favour of this side: rows of similar length share a batch in training, finished
batches stop early, a prefill computes the head for its last position only, training needs no attention mask
(padding on the right under a causal mask), there are no diagnostics, and TRAIN_ROWS and SAMPLE_ROWS are what ran
fastest. The log-probs of the sampling policy are recorded while sampling, as in memtrain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kernels.sampling import draw, uniforms
from memtrain import Agent, Batch, Config, Decoder, Turn

# Rows of a padded batch, chosen by CPU seconds for 2 documents of the nano preset on one core of an AMD EPYC: training
# with 4, 8, 16, 32, 64 rows took 6.0, 5.4, 5.9, 7.0, 9.6, sampling with 16, 32, 64, 128 took 2.2, 2.2, 2.3, 2.4.
TRAIN_ROWS, SAMPLE_ROWS = 8, 32


class PlainAgent(Agent):
    """The same memory loop over the plain sampler, SAMPLE_ROWS prompts side by side."""

    def sample(self, prompts: Sequence[tuple], keys: Sequence[tuple]) -> list[Turn]:
        turns = []
        for first in range(0, len(prompts), SAMPLE_ROWS):
            part = slice(first, first + SAMPLE_ROWS)
            random_numbers = np.stack([uniforms(key, self.c.response) for key in keys[part]])
            written = generate(self.model, [[*p, *g] for p, g in prompts[part]], random_numbers, self.tokenizer.end,
                               self.c.temperature, self.c.top_p)
            turns += [Turn(p, g, *w) for (p, g), w in zip(prompts[part], written, strict=True)]
        return turns


def rows_of(model: Decoder, ids: torch.Tensor, positions: torch.Tensor, attend: Callable) -> torch.Tensor:
    """The decoder on a padded batch: ids, positions (B,T) -> hidden (B,T,C). attend(layer, q, k, v) gets (B,H,T,D)."""
    B, T = ids.shape

    def flat(layer, q, k, v):
        q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return attend(layer, q, k, v).transpose(1, 2).flatten(0, 1)  # (B*T,H,D)

    return model(ids.flatten(), positions.flatten(), flat).view(B, T, -1)


@torch.no_grad()
def generate(model: Decoder, prompts: Sequence[list[int]], random_numbers: np.ndarray, stop: int, temperature: float,
             top_p: float) -> list[tuple[list[int], list[float]]]:
    """Prompts padded on the left, one KV cache row each: [(tokens, log-probs), ...], stop token included.

    random_numbers (B,limit) in [0,1): token t of row b is where the distribution's running sum passes them.
    """
    device, c, (B, limit) = model.embed.device, model.c, random_numbers.shape
    pad = torch.tensor([max(map(len, prompts)) - len(p) for p in prompts], device=device)  # (B)
    ids = torch.tensor([[stop] * n + p for n, p in zip(pad.tolist(), prompts, strict=True)], device=device)  # (B,P)
    P = ids.shape[1]
    u = torch.as_tensor(random_numbers, device=device)
    index = torch.arange(P + limit, device=device)
    real = index >= pad[:, None]  # (B,P+limit)
    cache = torch.zeros(c.layers, 2, B, c.key_heads, P + limit, c.head_size, device=device, dtype=model.embed.dtype)

    def attend(layer, q, k, v):
        new = slice(used - q.shape[2], used)
        cache[layer, 0, :, :, new], cache[layer, 1, :, :, new] = k, v
        keys, values = cache[layer, :, :, :, :used]  # (B,K,used,D)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    used = P
    mask = real[:, None, None, :P] & (index[:P, None] >= index[:P]) | torch.eye(P, dtype=torch.bool, device=device)
    positions = (index[:P] - pad[:, None]).clamp(min=0)
    hidden = rows_of(model, ids, positions, attend)[:, -1]  # (B,C)
    tokens, logprobs = [], []
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(limit):
        logp = ((hidden @ model.head.T).float() / temperature).log_softmax(-1)  # (B,V)
        drawn = draw(logp, u[:, t], top_p)  # (B)
        tokens.append(drawn)
        logprobs.append(logp.gather(1, drawn[:, None])[:, 0])
        finished |= drawn == stop
        if t == limit - 1 or finished.all():
            break
        used += 1
        mask = real[:, None, None, :used]
        hidden = rows_of(model, drawn[:, None], used - 1 - pad[:, None], attend)[:, -1]
    tokens, logprobs = torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()
    ends = [row.index(stop) + 1 if stop in row else len(row) for row in tokens]
    return [(row[:n], logp[:n]) for row, logp, n in zip(tokens, logprobs, ends, strict=True)]


def train(model: Decoder, reference: Decoder | None, c: Config, batch: Batch, entries: set[int]) -> float:
    """Leaves the gradient of the GRPO loss over the turns of `entries` in .grad and returns the loss."""
    chosen = [(t, e) for t, e in zip(batch.turns, batch.entry, strict=True) if e in entries]
    chosen.sort(key=lambda x: len(x[0].prefix) + len(x[0].given) + len(x[0].sampled))
    advantage, loss = advantages(batch, c.divide_by_std), 0.0
    for first in range(0, len(chosen), TRAIN_ROWS):
        micro = chosen[first:first + TRAIN_ROWS]
        ids, mask, old = padded([t for t, _ in micro], model.embed.device)
        A = torch.tensor([advantage[e] for _, e in micro], device=ids.device)[:, None]  # (B,1)
        new = logprobs_of(model, ids, c.temperature)
        ratio = (new - old).exp()
        objective = torch.min(ratio * A, ratio.clamp(1 - c.eps_low, 1 + c.eps_high) * A)  # (B,T)
        if c.kl:
            with torch.no_grad():
                ref = logprobs_of(reference, ids, c.temperature)
            objective = objective - c.kl * ((ref - new).exp() - (ref - new) - 1)
        token_mean = (objective * mask).sum(1) / mask.sum(1)  # (B)
        part = -token_mean.sum() / len(chosen)
        part.backward()
        loss += float(part.detach())
    return loss


def advantages(batch: Batch, divide_by_std: bool) -> list[float]:
    """Reward minus the mean reward of its group."""
    groups: dict[int, list[float]] = {}
    for g, r in zip(batch.group, batch.rewards, strict=True):
        groups.setdefault(g, []).append(r)
    scale = {g: np.std(r) + 1e-6 if divide_by_std else 1.0 for g, r in groups.items()}
    return [(r - np.mean(groups[g])) / scale[g] for g, r in zip(batch.group, batch.rewards, strict=True)]


def padded(turns: Sequence[Turn], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (B,T+1), padded on the right; of the T predictions: which are trained (B,T), and their old log-probs."""
    B, T = len(turns), max(len(t.prefix) + len(t.given) + len(t.sampled) for t in turns) - 1
    ids = torch.zeros(B, T + 1, dtype=torch.long)
    mask, old = torch.zeros(B, T), torch.zeros(B, T)
    for b, t in enumerate(turns):
        prompt, size = len(t.prefix) + len(t.given), len(t.sampled)
        ids[b, :prompt + size] = torch.tensor([*t.prefix, *t.given, *t.sampled])
        mask[b, prompt - 1:prompt - 1 + size] = 1
        old[b, prompt - 1:prompt - 1 + size] = torch.tensor(t.logprobs)
    return ids.to(device), mask.to(device), old.to(device)


def logprobs_of(model: Decoder, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability of every token but the first of padded rows ids (B,T+1): (B,T), through logits (B,T,V)."""
    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
    hidden = rows_of(model, ids[:, :-1], positions, attend)  # (B,T,C)
    logits = hidden @ model.head.T / temperature  # (B,T,V)
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
