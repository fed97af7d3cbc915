"""Kernels against plain references in fp64: every sequence alone, full logits, a loop per token."""

import math
import random
import types
from pathlib import Path

import pytest
import torch

from kernels import grpo, logprob
from kernels.attention import memory_attention
from kernels.decode import Members, memory_decode
from kernels.draw import draw, nucleus
from kernels.grpo import group_advantages, grpo_loss, linear_grpo_loss
from kernels.layout import Layout
from kernels.logprob import linear_logprob

SEED = random.SystemRandom().randrange(1 << 32)


@pytest.fixture(autouse=True)
def fresh():
    """Fresh inputs in every run; pytest shows the seed where a test fails."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)


# ---- memory attention


def dense(q, k, v):
    """Causal attention of one sequence: q (T,H,D), k and v (T,K,D) -> (T,H,D). Plain, quadratic, obvious."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (T,H,D)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def tokens_of(layout) -> list[tuple[list[int], list[list[int]]]]:
    """Per group: packed indices of its prefix and of each of its suffixes."""
    groups = [(list(range(a, a + n)), []) for a, n in
              zip(layout.prefix_start.tolist(), layout.prefix_lengths.tolist(), strict=True)]
    suffixes = (layout.suffix_start, layout.suffix_lengths, layout.group)
    for a, n, g in zip(*(x.tolist() for x in suffixes), strict=True):
        groups[g][1].append(list(range(a, a + n)))
    return groups


def reference_attention(q, k, v, layout):
    """Every suffix with its own copy of the prefix; a prefix alone."""
    out = [None] * len(q)
    for prefix, suffixes in tokens_of(layout):
        for suffix in [[], *suffixes]:
            own = prefix + suffix
            for index, row in zip(own, dense(q[own], k[own], v[own]), strict=True):
                out[index] = row if index in suffix or not suffix else out[index]
    return torch.stack(out) if out else torch.zeros_like(q)


def inputs(layout, heads, key_heads, size=8):
    return [torch.randn(layout.total, n, size).requires_grad_() for n in (heads, key_heads, key_heads)]


LAYOUTS = {  # prefix lengths, suffix lengths, group of each suffix
    "one sequence": ([5], [7], [0]),
    "ragged": ([70, 3, 18], [1, 33, 4, 9, 2], [0, 0, 1, 2, 2]),
    "one-token suffixes": ([4, 6], [1, 1, 1, 1], [0, 0, 0, 1]),
    "empty prefixes": ([0, 5, 0], [3, 1, 2, 6], [0, 0, 1, 2]),
    "groups without suffix": ([4, 66, 1, 0], [5, 2], [0, 2]),
    "only prefixes": ([4, 7], [], []),
    "nine ragged groups": ([1, 65, 0, 12, 64, 63, 130, 7, 2], [17, 1, 3, 16, 15, 2, 40, 5, 6, 1, 1, 33],
                           [0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 8]),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (4, 1)], ids=["GQA1", "GQA2", "GQA4"])
def test_attention_equals_each_sequence_alone(name, heads, key_heads):
    layout = Layout(*LAYOUTS[name])
    q, k, v = inputs(layout, heads, key_heads)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape)
    ours, truth = memory_attention(q, k, v, layout), reference_attention(*exact, layout)
    torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=1e-5)
    (ours * weight).sum().backward()
    (truth * weight).sum().backward()
    for mine, true in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), true.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ragged", "empty prefixes", "nine ragged groups"])
def test_attention_sees_nothing_of_other_sequences(name):
    """NaN anywhere else, forward and backward, changes no bit: neither other groups nor a neighbour's suffix."""
    layout = Layout(*LAYOUTS[name])
    q, k, v = inputs(layout, 4, 2)
    clean = memory_attention(q, k, v, layout)
    for prefix, suffixes in tokens_of(layout):
        for suffix in suffixes:
            own = prefix + suffix
            poisoned = [torch.full_like(x, torch.nan).index_copy(0, torch.tensor(own), x[own]).detach().requires_grad_()
                        for x in (q, k, v)]
            out = memory_attention(*poisoned, layout)
            assert torch.equal(out[suffix], clean[suffix])
            gradients = torch.autograd.grad(clean[suffix].sum(), (q, k, v), retain_graph=True)
            for gradient in gradients:
                others = [i for i in range(layout.total) if i not in own]
                assert not gradient[others].any(), "the gradient stays with what was seen"


def test_positions_continue_from_the_prefix():
    layout = Layout([3, 0, 2], [2, 3, 1, 2], [0, 0, 1, 2])
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("groups", ["001122", "000122", "0", "0000", "1100", "1010", "021021", "2101"])
def test_decode_equals_the_last_token_of_each_sequence(groups):
    """Caches with poisoned padding; groups of equal and of different sizes, in order and out of it. In "1100" two
    groups have changed places, which was once taken for order."""
    heads, key_heads, size = 4, 2, 8
    group = torch.tensor([int(g) for g in groups])  # (N)
    counts = group.bincount().tolist()
    prefix_lengths = [random.Random(SEED + i).choice((1, 5, 12)) for i in range(len(counts))]
    suffix_lengths = [1 + 3 * (i % 3) for i in range(len(group))]
    P, S = max(prefix_lengths) + 2, max(suffix_lengths) + 1  # no row reaches the end: padding everywhere
    q = torch.randn(len(group), heads, size)
    prefix_k, prefix_v = torch.randn(2, len(counts), key_heads, P, size)
    suffix_k, suffix_v = torch.randn(2, len(group), key_heads, S, size)
    prefix_mask = torch.arange(P) < torch.tensor(prefix_lengths)[:, None]
    suffix_mask = torch.arange(S) < torch.tensor(suffix_lengths)[:, None]
    for mask, caches in ((prefix_mask, (prefix_k, prefix_v)), (suffix_mask, (suffix_k, suffix_v))):
        for cache in caches:
            cache.masked_fill_(~mask[:, None, :, None], 1e6)
    ours = memory_decode(q, prefix_k, prefix_v, torch.tensor(prefix_lengths), suffix_k, suffix_v,
                         torch.tensor(suffix_lengths), Members(group, len(counts)))
    for i, g in enumerate(group.tolist()):
        k, v = (torch.cat([a[g][:, :prefix_lengths[g]], b[i][:, :suffix_lengths[i]]], 1).transpose(0, 1).double()
                for a, b in ((prefix_k, suffix_k), (prefix_v, suffix_v)))  # (T,K,D)
        last = dense(q[i].double().expand(len(k), -1, -1), k, v)[-1]
        torch.testing.assert_close(ours[i].double(), last, atol=1e-5, rtol=1e-5)


BAD_LAYOUTS = {"group: 1 entries": ([2], [1, 1], [0]), "group: must ascend": ([2, 2], [1, 1], [1, 0]),
               "group: must": ([2], [1], [1])}


def test_attention_refuses_what_does_not_fit():
    for message, bad in BAD_LAYOUTS.items():
        with pytest.raises(ValueError, match=message):
            Layout(*bad)
    q = torch.zeros(4, 3, 8)
    for T, heads in ((5, 3), (4, 2)):
        with pytest.raises(ValueError, match="expected 4 tokens"):
            memory_attention(q, torch.zeros(T, heads, 8), torch.zeros(T, heads, 8), Layout([4], [], []))


# ---- log-probabilities


def exact_logprob(hidden, weight, target, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize(("n", "vocabulary", "chunk"),
                         [(1, 2, 1), (7, 11, 30), (33, 101, 256), (33, 101, 1 << 22), (0, 5, 8)])
@pytest.mark.parametrize("kept", [0, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_linear_logprob_equals_full_log_softmax(n, vocabulary, chunk, temperature, kept, monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK", chunk)
    monkeypatch.setattr(logprob, "KEPT", kept)
    monkeypatch.setattr(logprob, "LEAST", 1)
    hidden, weight = torch.randn(n, 6).requires_grad_(), (0.4 * torch.randn(vocabulary, 6)).requires_grad_()
    target = torch.randint(vocabulary, (n,))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth, ours = exact_logprob(*exact, target, temperature), linear_logprob(hidden, weight, target, temperature)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-5)
    for used in ([0], [1], [0, 1]):  # gradients through one output or both
        factor = torch.randn(2, n)
        mine = torch.autograd.grad([ours[i] for i in used], (hidden, weight), [factor[i] for i in used], True)
        true = torch.autograd.grad([truth[i] for i in used], exact, [factor[i].double() for i in used], True)
        for a, b in zip(mine, true, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


def test_kept_probabilities_save_a_product_and_change_no_bit(monkeypatch):
    """The head is multiplied once forward, never again; with one element more than KEPT a second time. Its gradient is
    then summed within the products, which rounds in another order."""
    hidden, weight = torch.randn(40, 6).requires_grad_(), torch.randn(30, 6).requires_grad_()
    target, factor, products = torch.randint(30, (40,)), torch.randn(40), []
    monkeypatch.setattr(logprob, "CHUNK", 300)
    monkeypatch.setattr(logprob, "LEAST", 1)
    monkeypatch.setattr(logprob, "product", lambda a, b, real=logprob.product: products.append(len(a)) or real(a, b))
    found = []
    for kept in (40 * 30, 40 * 30 - 1):
        monkeypatch.setattr(logprob, "KEPT", kept)
        products.clear()
        value, entropy = linear_logprob(hidden, weight, target, 0.7)
        gradients = torch.autograd.grad(value, (hidden, weight), factor)
        found.append((list(products), value, entropy, *gradients))
    assert found[0][0] == [10] * 4 and found[1][0] == [10] * 8
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:-1], found[1][1:-1], strict=True))
    torch.testing.assert_close(found[0][-1], found[1][-1], atol=1e-5, rtol=1e-5)


def test_chunks_of_a_large_head_have_rows_enough():
    """A chunk of a row reads the whole head for one product; 64 MB hold 64 rows of 151,936 logits, and no more than
    16 are taken at once of a head of a million."""
    sizes = {v: logprob._chunks(10_000, v)[0].stop for v in (1536, 8192, 151_936, 1 << 20)}
    assert sizes == {1536: 2730, 8192: 512, 151_936: 64, 1 << 20: 16}


def test_logit_gradients_of_a_row_sum_to_zero():
    """With equal weight rows w, the gradient in hidden is (sum of dlogits) * w; V is small, so that none can hide. In
    fp64: in fp32 one seed in many rounds to just over 1e-5."""
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 4, dtype=torch.float64).expand(5, -1).contiguous()
    value, entropy = linear_logprob(hidden, weight, torch.randint(5, (9,)))
    torch.testing.assert_close(value, torch.full((9,), -math.log(5), dtype=torch.float64))
    for output in (value, entropy):
        assert torch.autograd.grad(output.sum(), hidden, retain_graph=True)[0].abs().max() < 1e-12


def test_linear_logprob_survives_extreme_logits_and_a_frozen_head():
    hidden, weight = torch.tensor([[3e4, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    value, entropy = linear_logprob(hidden, weight, torch.tensor([1]))
    assert value.tolist() == [-6e4] and entropy.tolist() == [0.0]
    (value + entropy).sum().backward()
    assert hidden.grad.tolist() == [[-2.0, 0.0]] and weight.grad is None


@pytest.mark.parametrize(("hidden", "target", "temperature", "message"), [
    ((3, 5), [0, 1, 2], 1.0, "hidden"), ((3, 4), [0, 1], 1.0, "target"), ((3, 4), [0, 1, 7], 1.0, "0..6"),
    ((3, 4), [0, -1, 2], 1.0, "0..6"), ((3, 4), [0, 1, 2], 0.0, "temperature")])
def test_linear_logprob_refuses(hidden, target, temperature, message):
    with pytest.raises(ValueError, match=message):
        linear_logprob(torch.zeros(hidden), torch.zeros(7, 4), torch.tensor(target), temperature)


# ---- GRPO


def plain_advantages(rewards, group, divide_by_std=False):
    out = []
    for r, g in zip(rewards, group, strict=True):
        own = [x for x, h in zip(rewards, group, strict=True) if h == g]
        mean = sum(own) / len(own)
        spread = math.sqrt(sum((x - mean) ** 2 for x in own) / len(own)) + 1e-6
        out.append((r - mean) / (spread if divide_by_std else 1))
    return out


def plain_loss(new, old, ref, rewards, group, rollout, offsets, interactions, low, high, beta, divide_by_std=False):
    """PAPER.md section 4 with a loop per token, differentiable in new."""
    advantages, total = plain_advantages(rewards.tolist(), group.tolist(), divide_by_std), new.new_zeros(())
    for s, r in enumerate(rollout.tolist()):
        span = range(int(offsets[s]), int(offsets[s + 1]))
        mean = new.new_zeros(())
        for t in span:
            ratio, a = torch.exp(new[t] - old[t]), advantages[r]
            clipped = 1 + high if ratio > 1 + high else 1 - low if ratio < 1 - low else ratio
            term = ratio * a if ratio * a < clipped * a else clipped * a
            if ref is not None:
                term = term - beta * (torch.exp(ref[t] - new[t]) - (ref[t] - new[t]) - 1)
            mean = mean + term / len(span)
        total = total + mean / interactions
    return -total


def case(kl=True, dtype=torch.float64):
    """Ragged groups and lengths, ratios on both sides of an uneven clip range, a tied group, two turns a rollout."""
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    rewards = torch.tensor([1.0, 0.25, 0.0, 0.5, 0.5, *torch.rand(4, dtype=torch.float64)], dtype=torch.float64)
    rollout = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8])
    lengths = torch.randint(1, 9, (len(rollout),))
    lengths[3] = 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    old = -torch.rand(int(offsets[-1]), dtype=dtype) * 3
    step = 0.4 * torch.randn_like(old)
    step[0], step[offsets[3]] = 0.5, -0.5  # clipped above with A > 0, clipped below with A < 0, in every draw
    new = (old + step).requires_grad_()
    ref = old + 0.3 * torch.randn_like(old) if kl else None
    return [new, old, ref, rewards, group, rollout, offsets, 15, 0.1, 0.3, 0.05 if kl else 0.0]


def agrees(module, arguments) -> bool:
    """Whether loss, gradient and diagnostics of module.grpo_loss are those of the plain loop."""
    new = arguments[0]
    loss, stats = module.grpo_loss(*arguments)
    truth = plain_loss(*arguments)
    mine, true = (torch.autograd.grad(x, new)[0] for x in (loss, truth))
    return torch.allclose(loss, truth, atol=1e-10) and torch.allclose(mine, true, atol=1e-10) and \
        stats["tokens"] == len(new)


@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_grpo_loss_equals_a_plain_loop(kl, divide_by_std):
    arguments = [*case(kl), divide_by_std]
    assert agrees(grpo, arguments)
    new, old, ref, rewards, group, rollout, offsets = arguments[:7]
    _, stats = grpo_loss(*arguments)
    advantage = torch.tensor(plain_advantages(rewards.tolist(), group.tolist()))[rollout]
    advantage, ratio = advantage.repeat_interleave(offsets.diff()), (new - old).exp()
    assert stats["clip_low"] == ((ratio < 0.9) & (advantage < 0)).sum() > 0, "the case has to reach both sides"
    assert stats["clip_high"] == ((ratio > 1.3) & (advantage > 0)).sum() > 0
    assert stats["ratio_max"] == ratio.max() and stats["ratio_min"] == ratio.min()
    delta = ref - new.detach() if kl else torch.zeros(1)
    assert float(stats["kl"]) == pytest.approx(float((delta.exp() - delta - 1).sum()))


BREAKS = {  # each a plausible slip; the comparison above must notice it
    "clip sides swapped": ("ratio.clamp(1 - eps_low, 1 + eps_high)", "ratio.clamp(1 - eps_high, 1 + eps_low)"),
    "KL pushes away": ("objective - beta * kl", "objective + beta * kl"),
    "KL of the wrong direction": ("delta = ref - new\n        kl = delta", "delta = new - ref\n        kl = delta"),
    "no length normalisation": ("lengths.to(new.dtype) * interactions", "torch.ones_like(lengths) * interactions"),
    "maximum for minimum": ("torch.minimum(", "torch.maximum("),
    "no baseline": ("shifted - mean[group]", "shifted"),
    "advantage of another rollout": ("[rollout][sequence]", "[rollout.flip(0)][sequence]"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_grpo_loss_is_noticed(name):
    source = Path(grpo.__file__).read_text(encoding="utf-8")
    right, wrong = BREAKS[name]
    assert source.count(right) == 1, "kernels/grpo.py has changed: adapt BREAKS"
    broken = types.ModuleType("broken")
    exec(source.replace(right, wrong), broken.__dict__)
    assert not agrees(broken, case())


def test_advantages_sum_to_zero_and_vanish_on_ties():
    group = torch.randint(4, (40,))
    advantages = group_advantages(torch.rand(40, dtype=torch.float64), group)
    torch.testing.assert_close(torch.zeros(4, dtype=torch.float64).index_add(0, group, advantages),
                               torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    for value in (0.0, 1.0, 0.1 + 0.2, 1 / 3, 1e-30):
        for size in (2, 3, 7, 8):  # sum / size rounds: value - mean would not always be 0
            tied = torch.tensor([value] * size + [1.0, 0.0], dtype=torch.float64)
            for divide_by_std in (False, True):
                out = group_advantages(tied, torch.tensor([0] * size + [1, 1]), divide_by_std).tolist()
                assert out[:size] == [0.0] * size and out[size] == -out[size + 1] > 0


def test_micro_batches_interactions_and_order():
    arguments = case()
    new, old, ref, rewards, group, rollout, offsets, interactions, *rest = arguments
    whole = torch.autograd.grad(grpo_loss(*arguments)[0], new)[0]
    twice, _ = grpo_loss(new, old, ref, rewards, group, rollout, offsets, 2 * interactions, *rest)
    torch.testing.assert_close(2 * torch.autograd.grad(twice, new)[0], whole, atol=0, rtol=1e-12)
    parts = torch.zeros_like(whole)
    for first, last in ((0, 4), (4, 5), (5, len(rollout))):  # sequences of three micro-batches
        a, b = int(offsets[first]), int(offsets[last])
        loss, _ = grpo_loss(new[a:b], old[a:b], ref[a:b], rewards, group, rollout[first:last],
                            offsets[first:last + 1] - a, interactions, *rest)
        parts += torch.autograd.grad(loss, new)[0]
    torch.testing.assert_close(parts, whole, atol=1e-15, rtol=1e-12)
    order = torch.randperm(len(rewards))  # rewards listed in another order, groups under other numbers
    moved = [new, old, ref, rewards[order], torch.tensor([5, 0, 3])[group[order]], order.argsort()[rollout]]
    moved, _ = grpo_loss(*moved, offsets, interactions, *rest)
    torch.testing.assert_close(torch.autograd.grad(moved, new)[0], whole, atol=1e-15, rtol=1e-12)


def test_grpo_loss_at_the_sampling_policy():
    """new == old == ref: the ratio is 1, the KL 0, and the gradient -w A."""
    arguments = case()
    arguments[0] = arguments[1].clone().requires_grad_()
    arguments[2] = arguments[1]
    loss, stats = grpo_loss(*arguments)
    lengths = arguments[6].diff()
    advantage = group_advantages(arguments[3], arguments[4])[arguments[5]]
    expected = -(advantage / lengths / arguments[7]).repeat_interleave(lengths)
    torch.testing.assert_close(torch.autograd.grad(loss, arguments[0])[0], expected)
    assert stats["kl"] == stats["clip_low"] == stats["clip_high"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_grpo_loss_is_one_function_after_the_other(dtype):
    """To the bit where there are no kernels; `old` comes in fp64, and log-probs give no gradient."""
    arguments = case(True)[1:]
    hidden, head = (torch.randn(n, 6, dtype=dtype, requires_grad=True) for n in (len(arguments[0]), 11))
    target, arguments[1] = torch.randint(11, (len(hidden),)), arguments[1].to(dtype)
    new, entropy = linear_logprob(hidden, head, target, 0.7)
    loss, stats = grpo_loss(new, arguments[0].to(dtype), *arguments[1:], True)
    one, diagnostics, *others = linear_grpo_loss(hidden, head, target, *arguments, True, 0.7)
    pairs = [(one, loss), *zip(others, (new, entropy), strict=True), *((diagnostics[k], stats[k]) for k in stats)]
    pairs += zip(*(torch.autograd.grad(x, (hidden, head)) for x in (one, loss)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and not any(x.requires_grad for x in others)
    with pytest.raises(ValueError, match="old, ref"):
        linear_grpo_loss(hidden, head, target, arguments[0][1:], *arguments[1:])


@pytest.mark.parametrize(("place", "value", "message"), [
    (1, torch.zeros(2), "old"), (2, torch.zeros(2), "old, ref"), (2, None, "ref"), (4, torch.zeros(2).long(), "group"),
    (5, torch.zeros(3).long(), "offsets"), (6, torch.arange(13), "offsets")])
def test_grpo_loss_refuses(place, value, message):
    arguments = case()
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        grpo_loss(*arguments)


# ---- drawing


def plain_nucleus(p, top_p: float) -> list[int]:
    """Ids in the order of falling probability, of equal ones the lower first, until they have the mass."""
    kept, mass = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if mass >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += p[i]
    return sorted(kept)


TIES = torch.tensor([[1, 2, 4, 1, 4, 2, 1, 1], [0, 0, 5, 5, 0, 5, 0, 1], [2] * 8, [0, 0, 0, 0, 0, 0, 16, 0]]) / 16


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.75, 0.5, 1e-9])
def test_the_nucleus_is_the_smallest_set_of_that_mass(top_p):
    for p in (TIES, torch.randn(5, 29).softmax(-1), (3 * torch.randn(3, 1536)).softmax(-1)):
        kept = nucleus(p, top_p)
        for row, mine in zip(p.tolist(), kept, strict=True):
            assert mine.nonzero()[:, 0].tolist() == [i for i in plain_nucleus(row, top_p) if row[i] > 0]
        assert torch.equal(kept[kept > 0], p[kept > 0]), "the others stay as they are"


@pytest.mark.parametrize("top_p", [1.0, 0.95, 1e-9])
@pytest.mark.parametrize(("vocabulary", "temperature"), [(8, 1.0), (29, 1.0), (29, 0.5), (29, 2.0), (151_936, 0.7)])
def test_frequencies_are_the_probabilities(vocabulary, temperature, top_p):
    """At evenly spaced u each token comes up as often as its probability in fp64 says, to one draw either way."""
    n = 2000 if vocabulary < 100 else 50
    logp = (TIES[:1].log() if vocabulary == 8 else 4 * torch.randn(1, vocabulary)).div(temperature).log_softmax(-1)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    share = torch.bincount(draw(logp.expand(n, -1), u, top_p), minlength=vocabulary) / n
    p, exact = logp[0].double().exp(), torch.zeros(vocabulary, dtype=torch.float64)
    kept = plain_nucleus(p.tolist(), top_p)
    exact[kept] = p[kept] / p[kept].sum()
    assert (share - exact).abs().max() <= 1.01 / n and not share[exact == 0].any()
