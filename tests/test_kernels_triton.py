"""Triton kernels against fp64: on a GPU where there is one, else interpreted. tests/test_kernels.py has the truth.

Interpreted, they show what is computed, not how fast, and every number as in the source; that they build for real
cards is what the last test asks the compiler.
"""

import importlib.util
import os
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.profiler import profile

import memtrain
from kernels import attention, decode, draw, fused, grpo, input_precision, logprob, use_triton
from kernels.decode import Members
from kernels.layout import Layout
from tests.test_kernels import case, exact_logprob, plain_loss, reference_attention

triton = pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there, `pytest -m gpu` runs just these
SEED = random.SystemRandom().randrange(1 << 32)
# Of the largest true value. The interpreter cuts off where a card rounds to bf16: twice the error.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2 if DEVICE.type == "cuda" else 2e-2, torch.float16: 2e-3}
TF32 = 5e-3  # fp32 where a product is one of TF32


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels whatever the device, fresh inputs, and NaN in every output before it is written."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    monkeypatch.setenv("MEMTRAIN_KERNELS", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bf16 matrices: here it gets their values. And it multiplies
    fp32 exactly: here TF32 has its ten bits of mantissa, cut off as a tensor core does."""
    if DEVICE.type == "cuda":
        return
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def read(x, precision):
        if x.dtype.scalar == triton.language.bfloat16:
            return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)
        if x.dtype.scalar == triton.language.float32 and precision == INPUT_PRECISION.TF32:
            cut = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
            return interpreter.TensorHandle(cut.view(np.float32), x.dtype)
        return x

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, d, precision, *rest: plain(
        self, read(a, precision), read(b, precision), d, precision, *rest))


@pytest.fixture
def high():
    """One product of TF32, as --tf32 asks for."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def close(mine, true, dtype=torch.float32, factor=1.0, least=1e-3) -> bool:
    """Whether all of `mine` is within the dtype's tolerance of the fp64 truth, in units of its largest value, which
    counts as `least` where it is smaller."""
    mine, true = mine.detach(), true.detach()
    scale = max(least, float(true.abs().max())) if true.numel() else 1.0
    bound = factor * TOLERANCE[dtype]
    if dtype == torch.float32 and input_precision(dtype) == "tf32":
        bound = TF32
    return bool(((mine.double().cpu() - true).abs() <= bound * scale).all())


def randn(*shape, dtype=torch.float32, scale=1.0):
    """Random values that the dtype represents exactly, on the device, and the same in fp64 on the CPU."""
    x = (scale * torch.randn(shape)).to(dtype)
    return x.to(DEVICE).requires_grad_(), x.double().requires_grad_()


# ---- memory-state attention ----------------------------------------------------------------------------------------

RAGGED = {
    "one token": ([1], [], []),
    "plain causal": ([0], [70], [0]),
    "one rollout": ([33], [40], [0]),
    "one-token suffixes": ([5, 40], [1, 1, 1, 1], [0, 0, 1, 1]),
    "longer than a tile": ([150, 0, 70], [90, 3, 64, 65], [0, 0, 1, 2]),
    "37 groups": ([i % 7 for i in range(37)], [1 + i % 5 for i in range(60)], sorted(i % 37 for i in range(60))),
}


def attention_agrees(module, layout, heads=4, key_heads=2, size=32, dtype=torch.float32) -> bool:
    tensors = [randn(layout.total, n, size, dtype=dtype) for n in (heads, key_heads, key_heads)]
    mine, true = [a for a, _ in tensors], [b for _, b in tensors]
    moved = Layout(layout.prefix_lengths.cpu(), layout.suffix_lengths.cpu(), layout.group.cpu(), DEVICE)
    out, truth = module.memory_attention(*mine, moved), reference_attention(*true, layout)
    weight = torch.randn(truth.shape)
    gradients = torch.autograd.grad(out, mine, weight.to(DEVICE, dtype))
    truths = torch.autograd.grad(truth, true, weight.to(dtype).double())
    # where one key is all there is, gradients cancel to zero: the error is in units of what cancels
    return all(close(a, b, dtype, least=1.0) for a, b in zip((out, *gradients), (truth, *truths), strict=True))


@pytest.mark.parametrize("name", RAGGED)
def test_attention_equals_every_sequence_alone(name):
    assert attention_agrees(attention, Layout(*RAGGED[name]))


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 64), (7, 1, 80), (4, 2, 96), (2, 2, 128)])
def test_attention_heads_and_sizes(heads, key_heads, size):
    assert attention_agrees(attention, Layout([40, 0], [15, 40, 5], [0, 0, 1]), heads, key_heads, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_half_precision(dtype):
    assert attention_agrees(attention, Layout([150, 3], [40, 9, 30], [0, 0, 1]), dtype=dtype)


def test_attention_gradients_are_the_same_every_time():
    layout = Layout([40, 3], [20, 9, 30], [0, 0, 1], DEVICE)
    q, k, v = (randn(layout.total, n, 32)[0] for n in (4, 2, 2))
    once, again = (torch.autograd.grad(attention.memory_attention(q, k, v, layout).square().sum(), (q, k, v))
                   for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("keys", [False, True])
def test_tiles_cover_every_token_once(keys):
    for prefix, suffix, group in RAGGED.values():
        layout = Layout(prefix, suffix, group)
        start, of = layout.tiles(16, keys)
        covered = []
        for a, b in zip(start.tolist(), of.tolist(), strict=True):
            covered += range(a, min(a + 16, int(layout.group_range[2][b])))
        assert sorted(covered) == list(range(layout.total))


def test_keys_that_most_queries_see_come_first():
    layout = Layout([40, 8], [20, 33, 70, 70], [0, 0, 1, 1])
    index, ends = np.arange(layout.total), layout.group_range[2].numpy()
    group, own = np.searchsorted(ends, index, "right"), layout.own_start.numpy()
    seen = (index <= index[:, None]) & (group == group[:, None]) & (
        (index >= own[:, None]) | (index < layout.group_range[1].numpy()[group][:, None]))  # (query, key)
    reach = [index[seen[:, a:min(a + 16, ends[b])].any(1)].max() - a for a, b in np.stack(layout.tiles(16, True), 1)]
    assert reach == sorted(reach, reverse=True)


# ---- decode --------------------------------------------------------------------------------------------------------


def decode_agrees(module, counts=(3, 1, 4), heads=4, key_heads=2, size=32, dtype=torch.float32, idle=0) -> bool:
    """Groups of `counts` rollouts in any order; `idle` rows behind them, and a group more, belong to nobody."""
    rng = random.Random(SEED)  # lengths without repetition: each is needed to notice one of the MUTANTS
    group = [g for g, n in enumerate(counts) for _ in range(n)]
    group = torch.tensor(rng.sample(group, len(group)))
    prefix_lengths = torch.tensor([700, *rng.sample((0, 1, 64, 300), len(counts) - 1)])
    suffix_lengths = torch.tensor([*islice(cycle(rng.sample((1, 2, 33, 130), 4)), len(group))])
    q = randn(len(group), heads, size, dtype=dtype)
    caches = [randn(n, key_heads, int(most.max()) + 3, size, dtype=dtype)
              for n, most in ((len(counts), prefix_lengths),) * 2 + ((len(group), suffix_lengths),) * 2]
    members = module.Members(group, len(counts), device=DEVICE)
    if idle:
        fixed = module.Members([0] * (len(group) + idle), len(counts) + 1, device=DEVICE)
        fixed.replace(module.Members(group, len(counts), max(counts) + 2), len(group) + idle)
        members = fixed
    mine = [x.detach() for x, _ in caches]
    for cache, lengths in zip(mine, (prefix_lengths, prefix_lengths, suffix_lengths, suffix_lengths), strict=True):
        for row, n in enumerate(lengths.tolist()):
            cache[row, :, n:] = torch.nan if cache is mine[0] or cache is mine[2] else 1e4  # never to be read
    more = lambda x, n: torch.cat([x, torch.full_like(x[:1], 1).expand(n, *x.shape[1:])])  # noqa: E731
    far, own = int(idle > 0), idle
    out = module.memory_decode(more(q[0].detach(), own), *(more(x, far) for x in mine[:2]),
                               more(prefix_lengths, far).to(DEVICE), *(more(x, own) for x in mine[2:]),
                               more(suffix_lengths, own).to(DEVICE), members)
    for i, g in enumerate(group.tolist()):
        P, S = int(prefix_lengths[g]), int(suffix_lengths[i])
        k, v = (torch.cat([a[1][g, :, :P], b[1][i, :, :S]], 1).repeat_interleave(heads // key_heads, 0).detach()
                for a, b in ((caches[0], caches[2]), (caches[1], caches[3])))  # (H,P+S,D)
        weights = (torch.einsum("hd,htd->ht", q[1][i].detach(), k) / size**0.5).softmax(-1)
        if not close(out[i], torch.einsum("ht,htd->hd", weights, v), dtype):
            return False
    return True


@pytest.mark.parametrize(("counts", "heads", "key_heads", "size"), [
    ((3, 1, 4), 4, 2, 32), ((1,), 4, 4, 64), ((20,), 7, 1, 80), ((2, 2), 2, 2, 96), ((9, 40), 4, 2, 128)])
def test_decode_equals_plain_attention(counts, heads, key_heads, size):
    assert decode_agrees(decode, counts, heads, key_heads, size)


@pytest.mark.parametrize("idle", [1, 40])
def test_decode_with_rows_that_belong_to_nobody(idle):
    """What a captured launch of fixed size does: nothing it reads may depend on what is in use."""
    assert decode_agrees(decode, idle=idle)


def test_decode_reads_nothing_past_the_slot_of_a_row_that_ran_out_of_it():
    """A row that is not in use counts on: behind the last slot lies memory of others."""
    q, prefix, lengths = randn(2, 4, 16)[0], randn(1, 2, 5, 16)[0], torch.tensor([4, 7], device=DEVICE)
    storage = torch.full((2 * 3 * 2 * 6 * 16,), torch.nan, device=DEVICE)  # each of two caches with a slot behind
    keys, values = (part.view(3, 2, 6, 16)[:2].copy_(randn(2, 2, 6, 16)[0].detach()) for part in storage.chunk(2))
    args = q.detach(), prefix.detach(), prefix.detach(), torch.tensor([5], device=DEVICE), keys, values
    members = decode.Members([0, 0], 1, device=DEVICE)
    out = decode.memory_decode(*args, lengths, members)
    assert torch.equal(out, decode.memory_decode(*args, lengths.clamp(max=6), members)) and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_in_half_precision(dtype):
    assert decode_agrees(decode, dtype=dtype)


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def logprob_agrees(module, n=70, width=40, vocabulary=203, temperature=1.0, dtype=torch.float32) -> bool:
    hidden, weight = randn(n, width, dtype=dtype), randn(vocabulary, width, dtype=dtype, scale=0.25)
    target = torch.randint(vocabulary, (n,))
    mine = module.linear_logprob(hidden[0], weight[0], target.to(DEVICE), temperature)
    true = exact_logprob(hidden[1], weight[1], target, temperature)
    good = all(close(a, b, torch.float32, 3, least=0.1) for a, b in zip(mine, true, strict=True))
    for used in ([0], [1], [0, 1]):
        factor = torch.randn(2, n)
        a = torch.autograd.grad([mine[i] for i in used], (hidden[0], weight[0]),
                                [factor[i].to(DEVICE) for i in used], True)
        b = torch.autograd.grad([true[i] for i in used], (hidden[1], weight[1]),
                                [factor[i].double() for i in used], True)
        good &= all(close(x, y, dtype, 3, least=0.1) for x, y in zip(a, b, strict=True))
    return good


@pytest.mark.parametrize(("n", "width", "vocabulary"), [(1, 16, 2), (7, 6, 11), (70, 40, 203), (130, 33, 65),
                                                        (3, 8, 1500), (0, 8, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprob_equals_full_log_softmax(n, width, vocabulary, temperature):
    assert logprob_agrees(logprob, n, width, vocabulary, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logprob_in_half_precision(dtype):
    assert logprob_agrees(logprob, dtype=dtype)


def test_logprob_in_blocks_of_rows_and_vocabulary(monkeypatch):
    monkeypatch.setattr(logprob, "ROWS", 32)
    monkeypatch.setattr(logprob, "BUFFER", 32 * 50)
    assert logprob_agrees(logprob)


def test_logit_gradients_of_a_row_sum_to_zero():
    hidden, weight = randn(9, 16)[0], torch.randn(1, 16).expand(37, -1).contiguous().to(DEVICE)
    value, entropy = logprob.linear_logprob(hidden, weight, torch.randint(37, (9,)).to(DEVICE))
    for output in (value, entropy):
        assert torch.autograd.grad(output.sum(), hidden, retain_graph=True)[0].abs().max() < 1e-5


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = randn(5, 8)[0], torch.randn(11, 8).to(DEVICE)
    logprob.linear_logprob(hidden, weight, torch.arange(5).to(DEVICE))[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


# ---- GRPO ----------------------------------------------------------------------------------------------------------


def grpo_agrees(module, kl=True, divide_by_std=False) -> bool:
    arguments = [*case(kl, torch.float32), divide_by_std]
    arguments[1] = arguments[0].detach() - 0.4 * torch.randn_like(arguments[1])  # in fp32, no ratio on a clip bound
    doubles = [x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    doubles[0].requires_grad_()
    arguments = [x.detach().to(DEVICE) if torch.is_tensor(x) else x for x in arguments]
    arguments[0].requires_grad_()
    loss, stats = module.grpo_loss(*arguments)
    truth, (_, expected) = plain_loss(*doubles), grpo.grpo_loss_reference(*doubles)
    mine, true = torch.autograd.grad(3 * loss, arguments[0])[0], torch.autograd.grad(3 * truth, doubles[0])[0]
    # the loss is a sum whose terms cancel: its error is in units of them, not of what is left
    good = close(loss.detach(), truth.detach(), least=0.1) and close(mine, true)
    return good and set(stats) == set(expected) and all(close(stats[k], expected[k].double()) for k in expected)


@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("divide_by_std", [False, True])
def test_grpo_equals_a_plain_loop(kl, divide_by_std):
    assert grpo_agrees(grpo, kl, divide_by_std)


def test_grpo_long_sequences_many_groups_and_exact_ties():
    n, sequences = 100, 40
    group, rewards = torch.randint(37, (n,)), torch.rand(n, dtype=torch.float64)
    rewards[group == group[0]] = 0.1 + 0.2
    rollout = torch.cat([torch.zeros(1).long(), torch.randint(n, (sequences - 1,))])
    offsets = torch.nn.functional.pad(torch.randint(0, 1300, (sequences,)).cumsum(0), (1, 0))
    new = (-torch.rand(int(offsets[-1]))).requires_grad_()
    arguments = [new.detach() + 0.3 * torch.randn_like(new), None, rewards, group, rollout, offsets, 50, 0.2, 0.25]
    reference = grpo.grpo_loss_reference(new, *arguments, 0.0, False)
    moved = [x.to(DEVICE) if torch.is_tensor(x) else x for x in arguments]
    mine = new.detach().to(DEVICE).requires_grad_()
    loss, stats = grpo.grpo_loss(mine, *moved)
    gradient = torch.autograd.grad(loss, mine)[0].cpu()
    assert close(gradient, torch.autograd.grad(reference[0], new)[0].double())
    assert not gradient[:int(offsets[1])].any(), "a tied group teaches exactly nothing"
    assert float(stats["zero_advantage"]) >= int(offsets[1])


# ---- GRPO from hidden states ---------------------------------------------------------------------------------------


def linear_case(kl=True, vocabulary=203, dtype=torch.float32, temperature=0.7):
    """Arguments of linear_grpo_loss, and the same in fp64: `case` around the log-probs of random hidden states, whose
    targets reach both ends of the vocabulary."""
    new, _, ref, *rest = case(kl)
    rest[2:4] = rest[2][:6], rest[3][:7]  # six sequences: the interpreter takes its time
    new = new[:rest[3][-1]]
    tensors = randn(len(new), 24, dtype=dtype), randn(vocabulary, 24, dtype=dtype, scale=0.25)
    target = torch.randint(vocabulary, (len(new),))
    target[:2] = torch.tensor([0, vocabulary - 1])
    new = exact_logprob(tensors[0][1], tensors[1][1], target, temperature)[0].detach()
    step = 0.4 * torch.randn_like(new)
    step[((step.exp() - 0.9).abs() < 0.02) | ((step.exp() - 1.3).abs() < 0.02)] = 0  # else TF32 could change sides
    step[0], step[rest[3][3]] = 0.5, -0.5
    given = [(new - step).float(), None if ref is None else (new + 0.3 * torch.randn_like(new)).float(), *rest]
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given]
    given = [x.to(DEVICE) if torch.is_tensor(x) else x for x in given]
    return ([*(x for x, _ in tensors), target.to(DEVICE), *given], [*(x for _, x in tensors), target, *exact])


def linear_grpo_agrees(module, kl=True, divide_by_std=False, vocabulary=203, dtype=torch.float32,
                       temperature=0.7) -> bool:
    """Several chunks of rows, several steps a row, and the last of each mostly empty."""
    given, exact = linear_case(kl, vocabulary, dtype, temperature)
    with mock.patch.multiple(module, BUFFER=7 * vocabulary, LOGITS=64):
        loss, stats, *mine = module.linear_grpo_loss(*given, divide_by_std, temperature)
    true = exact_logprob(*exact[:3], temperature)
    truth = plain_loss(true[0], *exact[3:], divide_by_std)
    _, expected = grpo.grpo_loss_reference(true[0], *exact[3:], divide_by_std)
    good = set(stats) == set(expected) and all(close(stats[k], expected[k].double()) for k in expected)
    good &= close(loss.detach(), truth.detach(), least=0.1)
    good &= all(close(a, b, torch.float32, 3, least=0.1) for a, b in zip(mine, true, strict=True))
    gradients = torch.autograd.grad(3 * loss, given[:2]), torch.autograd.grad(3 * truth, exact[:2])
    return good and all(close(a, b, dtype, 3, least=1e-2) for a, b in zip(*gradients, strict=True))


in_bf16 = partial(linear_grpo_agrees, dtype=torch.bfloat16)


@pytest.mark.parametrize(("kl", "divide_by_std", "vocabulary", "dtype"), [
    (True, False, 203, torch.float32), (False, True, 128, torch.float32), (True, True, 2, torch.float32),
    (False, False, 203, torch.bfloat16), (True, True, 128, torch.bfloat16)], ids=str)
def test_linear_grpo_equals_log_probs_and_a_plain_loop(kl, divide_by_std, vocabulary, dtype):
    assert linear_grpo_agrees(grpo, kl, divide_by_std, vocabulary, dtype)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_linear_grpo_at_other_temperatures_and_whole(temperature):
    assert linear_grpo_agrees(grpo, temperature=temperature)
    given, _ = linear_case(temperature=temperature)
    new, entropy = logprob.linear_logprob(*given[:3], temperature)
    loss, stats = grpo.grpo_loss(new, *given[3:])
    one, diagnostics, *other = grpo.linear_grpo_loss(*given, False, temperature)  # 2^25 logits at a time
    pairs = [(one, loss), *zip(other, (new, entropy), strict=True), *((diagnostics[k], stats[k]) for k in stats)]
    pairs += zip(torch.autograd.grad(one, given[:2]), torch.autograd.grad(loss, given[:2]), strict=True)
    assert all(close(a, b.detach().double().cpu(), factor=3, least=0.1) for a, b in pairs)
    with torch.no_grad():  # no gradient, no logits
        again = grpo.linear_grpo_loss(*given, False, temperature)
    assert torch.equal(again[0], loss) and torch.equal(again[2], new) and not again[2].requires_grad


def test_linear_grpo_of_a_frozen_head_of_nothing_and_twice():
    given, _ = linear_case()
    given[1] = given[1].detach()
    loss = grpo.linear_grpo_loss(*given)[0]
    loss.backward(retain_graph=True)
    assert given[0].grad.any() and given[1].grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for offsets, rollout in (([0], []), ([0, 0, 0], [1, 0])):
        hidden, head = randn(0, 24)[0], randn(11, 24)[0]
        ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        loss, stats, new, _ = grpo.linear_grpo_loss(
            hidden, head, ids, new := ids.float(), None, given[5], given[6],
            *(torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in (rollout, offsets)), 3)
        loss.backward()
        assert not loss and not stats["tokens"] and not len(new) and not head.grad.any()


def test_linear_grpo_shows_what_is_broken():
    """A NaN or an inf in a row is that row's alone; so is a target outside the vocabulary, where no look is taken."""
    given, _ = linear_case()
    with torch.no_grad():
        given[0][3], given[0][5] = torch.nan, torch.inf
    seen = grpo.linear_grpo_loss(*given, False, 0.7)[2]
    assert (~seen.isfinite()).nonzero()[:, 0].tolist() == [3, 5]
    given, _ = linear_case()
    given[2][2] = 203
    advantages = torch.zeros(len(given[5]), device=DEVICE)
    rest = *given[:5], advantages, *given[7:9], 15.0, 0.1, 0.3, 0.05, 1.0
    assert grpo._LinearGrpoLoss.apply(*rest)[2].isnan().nonzero()[:, 0].tolist() == [2]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there test_kernels_gpu.py has a whole step")
@pytest.mark.parametrize("fields", [("--tied", "true"), ("--lora-rank", "2", "--temperature", "0.7")],
                         ids=["tied", "LoRA"])
def test_a_micro_batch_is_that_of_the_references(fields, tiny, decoder, monkeypatch):
    """Loss, sums and the gradient of every parameter; a tied head's is the embedding's, too."""
    c, found = tiny("--kl", "0.1", *fields), []
    model = decoder(c, 29)
    reference = memtrain.reference_of(model, c)
    with torch.no_grad():  # else the ratio is 1 and the KL 0
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p) * p.requires_grad
    turns = [memtrain.Turn(p, [3, 4], [7, 8, 9], [-3.0, -3.5, -2.5]) for p in ([5, 6], [5, 6], [7])]
    batch = memtrain.Batch(turns, [0, 1, 2], [0.0, 1.0, 0.5], [0, 0, 0], [0, 0, 0], {})
    for side in ("triton", "torch"):
        monkeypatch.setenv("MEMTRAIN_KERNELS", side)
        loss, sums, *_ = memtrain.micro_loss(model, reference, c, batch, [0, 1, 2], [[0, 1], [2]], turns, 3)
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append([loss.detach(), sums, *torch.autograd.grad(loss, wanted)])
    assert sum(bool(x.any()) for x in found[1]) > len(wanted) / 2
    assert all(close(a, b.double(), factor=10) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("file", "kernel", "last"), [("grpo", "_sweep", "        del z, dz"),
                                                      ("logprob", "_logit_gradient", "            del dz")])
def test_no_more_logits_are_held_than_said(file, kernel, last, tmp_path, monkeypatch):
    """The allocator's peak beyond what is returned, over eight chunks; one that outlives the next is noticed. Without
    the kernel: the interpreter holds on to what it was given."""
    hidden, head, target, zeros = torch.randn(64, 1), torch.randn(4096, 1), torch.arange(64), torch.zeros(64)
    ids = torch.tensor([0, 64])
    arguments = {"grpo": (target, zeros, None, zeros[:1], ids[:1], ids, 1.0, 0.2, 0.2, 0.0, 1.0, True, True),
                 "logprob": (target, *[zeros] * 4, 1.0, True, True)}[file]
    most = 4 * 8 * 4096 + 40_000
    for module, bound in ((sys.modules[f"kernels.{file}"], (4 * 8 * 4096, most)),
                          (broken_kernel(file, last, last.replace("del", "#"), tmp_path, monkeypatch), (most, 1e9))):
        monkeypatch.setattr(module, "BUFFER", 8 * 4096)
        monkeypatch.setattr(module, "ROWS", 8, raising=False)
        monkeypatch.setattr(module, kernel, defaultdict(lambda: lambda *_, **__: None))
        with profile(profile_memory=True) as seen:
            getattr(module, {"grpo": "_launch_sweep", "logprob": "_launch_backward"}[file])(hidden, head, *arguments)
        sizes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert bound[0] <= max(np.cumsum(sizes)) <= bound[1]


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_agrees(module, top_ps=(0.9, 1.0)) -> bool:
    """Beside the reference, at evenly spaced u: ordinary rows, equal probabilities, nuclei over several blocks."""
    few = torch.tensor([1, 2, 4, 1, 4, 2, 1, 1]) / 16
    for row in (few.log(), 2 * torch.randn(203), torch.zeros(5000), torch.randn(5000).round()):
        n = 6 if len(row) < 1000 else 2
        logp, u = row.log_softmax(-1).expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n
        for top_p in top_ps:
            if not torch.equal(module.draw(logp.to(DEVICE), u.to(DEVICE), top_p).cpu(),
                               draw.draw_reference(logp, u, top_p)):
                return False
    return True


@pytest.mark.parametrize("top_p", [1.0, 0.75, 1e-9])
def test_draws_are_those_of_the_reference(top_p):
    assert draw_agrees(draw, (top_p,))
    none = torch.zeros(0, 5, device=DEVICE)
    assert draw.draw(none, none[:, 0].double(), top_p).shape == (0,)


# ---- between the products of a block --------------------------------------------------------------------------------


def gradients_agree(mine, true, leaves, dtype, least=0.1) -> bool:
    """Outputs, and gradients of all `leaves`, each with its fp64 twin."""
    weights = [torch.randn(y.shape).to(dtype) for y in true]
    inputs, doubles = [a for a, _ in leaves], [b for _, b in leaves]
    found = torch.autograd.grad(mine, inputs, [w.to(DEVICE) for w in weights])
    wanted = torch.autograd.grad(true, doubles, [w.double() for w in weights])
    return all(close(a, b, dtype, least=least) for a, b in zip((*mine, *found), (*true, *wanted), strict=True))


def plain_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def plain_rope(x, angle):
    """As complex numbers: halves are turned by angle (T,D/2)."""
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def add_norm_agrees(module, tokens=40, width=40, dtype=torch.float32) -> bool:
    x, y, w = leaves = [randn(*shape, dtype=dtype) for shape in ((tokens, width), (tokens, width), (width,))]
    truth = (x[1] + y[1]).detach().to(dtype).double().requires_grad_()  # rounded, as what follows will see it
    mine = module.add_norm(x[0], y[0], w[0], 0.1)
    of, true = [torch.randn(tokens, width).to(dtype) for _ in range(2)], (truth, plain_norm(truth, w[1], 0.1))
    found = torch.autograd.grad(mine, [a for a, _ in leaves], [g.to(DEVICE) for g in of])
    dx, dw = torch.autograd.grad(true, (truth, w[1]), [g.double() for g in of])
    return all(close(a, b, dtype, 2) for a, b in zip((*mine, *found), (*true, dx, dx, dw), strict=True))


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (40, 40), (3, 128), (2, 2560), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_add_and_norm(tokens, width, dtype):
    assert add_norm_agrees(fused, tokens, width, dtype)


def norm_rope_agrees(module, heads=4, key_heads=2, size=32, dtype=torch.float32, normed=True, tokens=50) -> bool:
    """Trained; and decoded, out of one matrix, into a cache whose other places stay what they were."""
    counts = heads, key_heads, key_heads
    q, k, v = (randn(tokens, n, size, dtype=dtype) for n in counts)
    norms = [randn(size, dtype=dtype) for _ in range(2)] if normed else []
    angle = (100 * torch.rand(tokens, size // 2)).double()
    rotary = [x.float()[:, None].to(DEVICE) for x in (angle.cos(), angle.sin())]
    weights = tuple(w for w, _ in norms) or None
    mine = module.norm_rope(q[0], k[0], v[0], rotary, weights, 0.1)
    true = [plain_rope(plain_norm(x, norms[i][1], 0.1) if normed else x, angle) for i, (_, x) in enumerate((q, k))]
    good = gradients_agree(mine, true, [q, k, *norms], dtype)
    together = torch.cat([x[0].detach().flatten(1) for x in (q, k, v)], 1)
    parts = [x.unflatten(1, (n, size)) for n, x in zip(
        counts, together.split([n * size for n in counts], 1), strict=True)]
    places, cached = torch.randint(5, (tokens,)), torch.full((2, tokens + 1, key_heads, 5, size), 7.0, dtype=dtype)
    cached, rows = cached.to(DEVICE)[:, :tokens], torch.arange(tokens)  # what a broken kernel writes past it is ours
    places[3:4] = 5  # a row that is not in use, and has run out of its slot
    alone = module.norm_rope(*parts, rotary, weights, 0.1, (*cached, rows.to(DEVICE), places.to(DEVICE)))
    used = places < 5
    expected = torch.full(cached.shape, 7.0).double()
    for to, x in zip(expected, (true[1], v[1]), strict=True):
        to[rows[used], :, places[used]] = x[used].detach()
    return good and alone[1] is None and torch.equal(alone[0], mine[0]) and close(cached, expected, dtype)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 16), (4, 4, 32), (14, 2, 64), (7, 1, 80), (3, 1, 128)])
@pytest.mark.parametrize("normed", [True, False], ids=["QK-norm", "RoPE alone"])
def test_norm_and_rope(heads, key_heads, size, normed):
    assert norm_rope_agrees(fused, heads, key_heads, size, normed=normed)


@pytest.mark.parametrize(("tokens", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (16, torch.float16),
                                               (33, torch.bfloat16)], ids=str)
def test_norm_and_rope_of_few_and_many_tokens(tokens, dtype):
    assert norm_rope_agrees(fused, dtype=dtype, tokens=tokens)


def swiglu_agrees(module, tokens=5, width=1300, dtype=torch.float32) -> bool:
    """Out of one matrix too."""
    gate, up = leaves = [randn(tokens, width, dtype=dtype, scale=2) for _ in range(2)]
    mine, true = module.swiglu(gate[0], up[0]), gate[1] * gate[1].sigmoid() * up[1]
    both = torch.cat([gate[0], up[0]], 1).detach().split(width, 1)
    return gradients_agree([mine], [true], leaves, dtype) and torch.equal(module.swiglu(*both), mine)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 40), (2, 1025), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_swiglu(tokens, width, dtype):
    assert swiglu_agrees(fused, tokens, width, dtype)


def test_what_is_not_contiguous_is_refused():
    x = torch.zeros(3, 16, 2, device=DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match=r"k: strides"):
        fused.norm_rope(x.contiguous(), x, x, (x, x), None, 1e-6)
    with pytest.raises(ValueError, match=r"gate: strides"):
        fused.swiglu(x[:, 0].T, x[:, 0].T)


@pytest.mark.parametrize("fields", [(), ("--qk-norm", "false", "--bias", "true"), ("--lora-rank", "2", "--lora-merge",
                                                                                  "false")],
                         ids=["own", "as Qwen2", "LoRA apart"])
def test_a_decoder_samples_and_learns_with_kernels_as_without(fields, tiny, decoder, monkeypatch):
    """Products of several layers in one, keys and values written to their slots, and all gradients."""
    c = replace(tiny(*fields), top_p=1e-9)
    model, prompts = decoder(c, 61).to(DEVICE), [([*range(20)], [3, 4]), ([*range(20)], [5]), ([*range(9)], [6, 7, 8])]

    def results():
        turns = memtrain.Sampler(model, 16)(c, prompts, [("kernels", i) for i in range(3)], 3, (1,))
        packed = memtrain.pack([(prompts[0][0], [(t.given, t.sampled) for t in turns[:2]])], DEVICE)
        gradients = torch.autograd.grad(memtrain.score(model, packed)[0].sum(),
                                        [p for p in model.parameters() if p.requires_grad])
        return [t.sampled for t in turns], torch.tensor([x for t in turns for x in t.logprobs]), gradients

    tokens, logprobs, gradients = results()
    assert model.blocks[0].v.weight.storage_offset() == model.blocks[0].q.weight.numel() + (
        model.blocks[0].k.weight.numel()), "they were not taken together"
    monkeypatch.setenv("MEMTRAIN_KERNELS", "torch")
    expected = results()
    assert tokens == expected[0] and close(logprobs, expected[1].double(), least=1.0)
    assert all(close(a, b.double().cpu(), factor=3, least=0.1) for a, b in zip(gradients, expected[2], strict=True))


def test_frozen_norms_get_no_gradient():
    x, w = randn(6, 2, 16)[0], torch.ones(16, device=DEVICE)
    rotary = [torch.ones(6, 1, 8, device=DEVICE)] * 2
    queries, keys = fused.norm_rope(x, x, x, rotary, (w, w), 1e-6)
    total, out = fused.add_norm(x.flatten(1), x.flatten(1), torch.ones(32, device=DEVICE), 1e-6)
    (queries.sum() + keys.sum() + total.sum() + out.sum()).backward()
    assert x.grad.isfinite().all() and w.grad is None


# ---- broken on purpose ---------------------------------------------------------------------------------------------

MUTANTS = {
    "attention": {
        "mask shifted by one": ("(j <= i)", "(j < i + 2)"),
        "own part without its first token": ("(j >= own[:, None])", "(j > own[:, None])"),
        "prefix cut by one": ("(j < prefix_end)", "(j < prefix_end - 1)"),
        "no mask at all": ("    if MASKED:", "    if False:"),
        "prefix of the neighbour group": ("tl.load(group_start + b), tl.load(prefix_end + b)",
                                          "tl.load(group_start + tl.maximum(b, 1) - 1), tl.load(prefix_end + b)"),
        "sum not rescaled": ("acc = acc * shrink[:, None]", "acc = acc"),
        "missing scale": ("(dq * (scale * 0.6931471805599453))", "dq"),
        "delta dropped": ("ds = p * (dp - delta[:, None])", "ds = p * dp"),
        "keys' mask shifted by one": ("(j <= rows[None, :])", "(j < rows[None, :] + 2)"),
        "keys' delta dropped": ("(dp - delta[None, :])", "dp"),
        "queries past the end in a whole tile": ("    masked += (end - masked) % BM\n", ""),
        "one query head for all": ("for r in range(R):", "for r in range(1):"),
        "suffixes forgotten by the prefix": ("tl.where(first < shared, last,", "tl.where(first < shared, shared,"),
    },
    "decode": {
        "keys of two splits": ("tl.minimum(length, (s + 1) * split)", "length"),
        "prefix of the neighbour group": ("base = (b.to(tl.int64)", "base = ((tl.maximum(b, 1) - 1).to(tl.int64)"),
        "parts joined without weights": ("far * theirs[:, None]", "far"),
        "heads and rollouts exchanged": ("first + pair // R", "first + pair % R"),
        "rollouts taken in order": ("tl.load(order + first + pair // R, mask=live, other=0)", "(first + pair // R)"),
        "own last token unseen": ("for j in range(0, length, BN)", "for j in range(0, length - 1, BN)"),
    },
    "logprob": {
        "off-target gradient dropped": ("1.0, 0.0) - p)", "1.0, 0.0))"),
        "gradient without temperature": ("(dz * scale)", "dz"),
        "end of the vocabulary unmasked": ("here = (words < end)[None, :]", "here = (words >= 0)[None, :]"),
        "sum not rescaled": ("l = l * shrink", "l = l"),
        "entropy gradient of the wrong sign": ("- h * p", "+ h * p"),
        "target of the neighbour row": ("tl.load(TARGET + rows, mask=rows < N, other=-1)",
                                        "tl.load(TARGET + rows // 2, mask=rows < N, other=-1)"),
    },
    "draw": {
        "all of equal tokens kept": ("tl.cumsum(tied, 0) <= ties", "tl.cumsum(tied, 0) <= V"),
        "equal tokens counted anew in every block": ("ties - tl.sum(tied, 0)", "ties"),
        "equal tokens dropped": ("(tied > 0)", "(tied > 1)"),
        "nucleus of the last block": ("mass += tl.where", "mass = tl.where"),
        "blocks not cumulated": ("before + tl.cumsum(p, 0)", "tl.cumsum(p, 0)"),
        "no nucleus": (">= top_p", ">= 2 * top_p"),
    },
    "fused": {
        "one addend normalised": ("+ tl.load(Y + at, mask=here, other=0.0).to(tl.float32)\n", "\n"),
        "mean over the padded row": ("(s * tl.rsqrt(tl.sum(s * s) / C", "(s * tl.rsqrt(tl.sum(s * s) / BLOCK"),
        "no eps": ("/ C + eps) * w)", "/ C) * w)"),
        "gradient past the norm alone": ("n * (tl.sum(w * g * n) / C)", "n * 0.0"),
        "gradient of the sum dropped": ("tl.load(DTOTAL + at, mask=here, other=0.0).to(tl.float32) + r", "r"),
        "norm's gradient of the last token": ("        dw += g * n", "        dw = g * n"),
        "turned the other way": ("a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
        "gradient not turned back": ("ga * cos + gb * sin, gb * cos - ga * sin",
                                     "ga * cos - gb * sin, gb * cos + ga * sin"),
        "one half normalised": ("(tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D", "tl.sum(a * a, 1) / D"),
        "head's gradient past the norm alone": ("r * (wa * ga - a * mean)", "r * (wa * ga)"),
        "head's gradient of the last tokens": ("        da += pa", "        da = pa"),
        "keys normed as queries": ("d[None, :], WK, cos", "d[None, :], WQ, cos"),
        "a place too far": ("* room + place) * D", "* room + place + 1) * D"),
        "past the end of a slot": ("here & (place < room)", "here"),
        "values of the first key head": ("V, rows * v_row + h * D", "V, rows * v_row"),
        "gate's rows as if alone": ("GATE + row * gate_row + c", "GATE + row * width + c"),
        "sigmoid for silu": ("(g * tl.sigmoid(g) * u)", "(tl.sigmoid(g) * u)"),
        "slope of silu": ("(1 + g * (1 - s))", "1.0"),
    },
    "grpo": {
        "clip sides swapped": ("tl.maximum(ratio, 1 - low), 1 + high)", "tl.maximum(ratio, 1 - high), 1 + low)"),
        "KL pushes away": ("objective -= beta * kl", "objective += beta * kl"),
        "KL gradient dropped": ("gradient -= beta * (1 - tl.exp(delta))", "gradient -= 0.0"),
        "clipped gradient flows": ("tl.where(ratio * a <= clipped * a, ratio * a, 0.0)", "ratio * a"),
        "no length normalisation": ("(tl.maximum((end - start).to(tl.float32), 1.0) * interactions)", "interactions"),
        "no baseline": ("advantage = reward - least - mean", "advantage = reward - least"),
        "sweep: off-target gradient dropped": ("1.0, 0.0) - tl.exp(z - lse))", "1.0, 0.0))"),
        "sweep: gradient without temperature": ("-weight * gradient * scale", "-weight * gradient"),
        "sweep: end of the vocabulary unmasked": ('other=float("-inf")) * scale', "other=0.0) * scale"),
        "sweep: sum not rescaled": ("l = l * shrink", "l = l"),
        "sweep: entropy of the wrong sign": ("lse - e / l", "lse + e / l"),
        "sweep: target of the neighbour row": ("tl.load(TARGET + t)", "tl.load(TARGET + t // 2)"),
        "sweep: first token to the sequence before": ("right=True) - 1", "right=False).sub(1).clamp(min=0)"),
        "sweep: 16-bit gradients read past their place": ("[:, :V]  # in", "[:, -V:]  # in"),
        "sweep: gradient of the head from the last rows": ("d_head.addmm_(dz.T, x)", "d_head = dz.T @ x"),
        "sweep: gradient of the loss ignored": ("d.mul_(g_loss)", "d"),
    },
}
AGREES = {"attention": lambda m: attention_agrees(m, Layout([150, 20], [40, 9, 70, 3], [0, 0, 1, 1])),
          "decode": lambda m: decode_agrees(m, (4, 3, 5)), "draw": draw_agrees,
          "grpo": lambda m: all(f(m) for f in (grpo_agrees, linear_grpo_agrees, in_bf16)),
          "fused": lambda m: swiglu_agrees(m) and add_norm_agrees(m) and norm_rope_agrees(m),
          # the last tile of a share mostly empty, and two tiles a share
          "logprob": lambda m: logprob_agrees(m, vocabulary=520, temperature=1.7) and logprob_agrees(
              m, vocabulary=2500, temperature=0.7)}


def test_each_precision_keeps_its_bound(high):
    assert all(AGREES[file](sys.modules[f"kernels.{file}"]) for file in ("attention", "decode", "logprob", "grpo"))


@pytest.mark.parametrize("size", [64, 128])
def test_attention_at_high_precision(high, size):
    assert attention_agrees(attention, Layout([150, 3], [40, 9, 30], [0, 0, 1]), 2, 1, size)


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in MUTANTS.items() for n in names])
def test_a_broken_kernel_is_noticed(file, name, tmp_path, monkeypatch):
    broken = broken_kernel(file, *MUTANTS[file][name], tmp_path, monkeypatch)
    assert not AGREES[file](broken)
    if file in ("attention", "decode", "logprob"):  # which have products
        torch.set_float32_matmul_precision("high")
        try:
            assert not AGREES[file](broken), "the bound of TF32 is too wide"
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("file", "a", "b"), [("attention", "q", "k"), ("decode", "q", "k"),
                                              ("logprob", "left", "right")])
def test_products_of_too_few_bits_are_noticed(file, a, b, high, tmp_path, monkeypatch):
    """bf16 where TF32 is asked for, and TF32 where three of them are."""
    of_bf16 = (f"tl.dot({a}, tl.trans({b})", f"tl.dot({a}.to(tl.bfloat16), tl.trans({b}.to(tl.bfloat16))")
    assert not AGREES[file](broken_kernel(file, *of_bf16, tmp_path, monkeypatch))
    torch.set_float32_matmul_precision("highest")
    of_tf32 = ("input_precision=PRECISION", 'input_precision="tf32"')
    assert not AGREES[file](broken_kernel(file, *of_tf32, tmp_path, monkeypatch))


def broken_kernel(file, right, wrong, tmp_path, monkeypatch):
    source = Path(sys.modules[f"kernels.{file}"].__file__).read_text(encoding="utf-8")
    assert right in source, f"kernels/{file}.py has changed: adapt MUTANTS"
    (tmp_path / "broken.py").write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("broken", tmp_path / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "broken", broken)
    spec.loader.exec_module(broken)
    return broken


# ---- the choice, and the compiler ----------------------------------------------------------------------------------


def test_one_place_chooses_and_says_what_is_missing(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("MEMTRAIN_KERNELS", "torch")
    assert not use_triton(cpu)
    monkeypatch.setenv("MEMTRAIN_KERNELS", "")
    assert not use_triton(cpu)
    for value, interpret, message in (("fast", "1", "choose torch or triton"), ("triton", "0", "TRITON_INTERPRET")):
        monkeypatch.setenv("MEMTRAIN_KERNELS", value)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        with pytest.raises(ValueError, match=message):
            use_triton(cpu)


def test_kernels_refuse_what_they_do_not_take():
    layout, x = Layout([4], [], [], DEVICE), torch.zeros(4, 2, 256, device=DEVICE)
    for bad, message in ((x, "up to 128"), (x[..., :64].int(), "fp32, bf16 and fp16")):
        with pytest.raises(ValueError, match=message):
            attention.memory_attention(bad, bad, bad, layout)
    with pytest.raises(ValueError, match="one dtype"):
        attention.memory_attention(x, x.half(), x, layout)
    zeros = partial(torch.zeros, device=DEVICE)
    with pytest.raises(ValueError, match="suffix_lengths"):
        decode.memory_decode(zeros(2, 2, 8), *zeros(2, 1, 2, 3, 8), zeros(1), *zeros(2, 2, 2, 1, 8), zeros(3),
                             Members([0, 0], 1, device=DEVICE))
    with pytest.raises(ValueError, match="fp32, bf16"):
        logprob.linear_logprob(zeros(2, 3).int(), zeros(4, 3).int(), zeros(2).long())
    with pytest.raises(ValueError, match="expected int64"):
        logprob.linear_logprob(zeros(2, 3), zeros(4, 3), zeros(2).int())
    arguments = [x.to(DEVICE) if torch.is_tensor(x) else x for x in case(dtype=torch.float16)]
    with pytest.raises(ValueError, match="fp32 log-probs"):
        grpo.grpo_loss(*arguments)
    if DEVICE.type == "cpu":  # values are looked at where that waits for no card
        arguments[5] = arguments[5] + 3
        with pytest.raises(ValueError, match="rollout"):
            grpo.grpo_loss(*arguments)


def test_a_target_outside_the_vocabulary_never_passes_for_a_log_prob(monkeypatch):
    """Refused on a CPU; on a card, where a look would wait for it, the log-prob is NaN, and a step that has one is
    skipped."""
    hidden, weight = randn(2, 8)[0], randn(5, 8)[0]
    target = torch.tensor([4, 5], device=DEVICE)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=r"ids must lie in 0\.\.4"):
            logprob.linear_logprob(hidden, weight, target)
    seen = logprob._LinearLogprob.apply(hidden, weight, target, 1.0)[0]
    assert seen[0].isfinite() and seen[1].isnan()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_kernels_build_for_six_generations(capability):
    """Every tile that could be launched on sm_90, compiled, not interpreted, hence in a process of its own. Of the
    other generations the largest head, which needs the most shared memory; the rest of them, and fp16, whose code
    is bf16's, is left to `python -m eval.bench compile`."""
    sizes, narrow = ((32, 64, 80, 128), (64, 128)) if capability == 90 else ((128,), ())
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MEMTRAIN_KERNELS")}
    code = (f"from eval.bench.compile import *; assert {capability} in GENERATIONS and len(GENERATIONS) == 6; "
            f"rows = build_all(({capability},), ('bf16', 'fp32'), {sizes}); "
            f"rows += build_all(({capability},), ('tf32',), {narrow}); "
            "print(compile_table(rows)); assert all(r['shared_kb'] <= r['limit_kb'] for r in rows); "
            "assert not [r for r in rows if r['sm'] == 90 and r['dtype'] != 'fp32' and r['D'] in (0, 64, 128) "
            "and r['spilled']]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                          cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "for 1 generations" in done.stdout
