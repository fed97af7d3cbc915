"""Triton kernels against fp64: on a GPU where there is one, else interpreted. tests/test_kernels.py has the truth.

Interpreted, they show what is computed, not how fast, and every number as in the source; that they build for real
cards is what test_kernels_build asks the compiler.
"""

import importlib.util
import os
import random
import subprocess
import sys
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import attention, decode, draw, grpo, input_precision, logprob, use_triton
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
    "grpo": {
        "clip sides swapped": ("tl.maximum(ratio, 1 - low), 1 + high)", "tl.maximum(ratio, 1 - high), 1 + low)"),
        "KL pushes away": ("objective -= beta * kl", "objective += beta * kl"),
        "KL gradient dropped": ("gradient -= beta * (1 - tl.exp(delta))", "gradient -= 0.0"),
        "clipped gradient flows": ("tl.where(ratio * a <= clipped * a, ratio * a, 0.0)", "ratio * a"),
        "no length normalisation": ("(tl.maximum(count, 1.0) * interactions)", "interactions"),
        "no baseline": ("advantage = reward - least - mean", "advantage = reward - least"),
    },
}
AGREES = {"attention": lambda m: attention_agrees(m, Layout([150, 20], [40, 9, 70, 3], [0, 0, 1, 1])),
          "decode": lambda m: decode_agrees(m, (4, 3, 5)), "grpo": lambda m: grpo_agrees(m), "draw": draw_agrees,
          # the last tile of a share mostly empty, and two tiles a share
          "logprob": lambda m: logprob_agrees(m, vocabulary=520, temperature=1.7) and logprob_agrees(
              m, vocabulary=2500, temperature=0.7)}


def test_each_precision_keeps_its_bound(high):
    assert all(AGREES[file](sys.modules[f"kernels.{file}"]) for file in ("attention", "decode", "logprob"))


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
    """Every tile that could be launched, compiled, not interpreted, hence in a process of its own. The three other
    generations have the tiles of 90 and 120, so that their largest head is enough; the rest of them, and fp16, whose
    code is bf16's, is left to `python -m eval.bench compile`."""
    sizes, narrow = ((32, 64, 80, 128), (64, 128)) if capability in (80, 90, 120) else ((128,), ())
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MEMTRAIN_KERNELS")}
    code = (f"from eval.bench.compile import *; assert {capability} in GENERATIONS and len(GENERATIONS) == 6; "
            f"rows = build_all(({capability},), ('bf16', 'fp32'), {sizes}); "
            f"rows += build_all(({capability},), ('tf32',), {narrow}); "
            "print(compile_table(rows)); assert all(r.shared_kb <= r.limit_kb for r in rows); "
            "assert not [r for r in rows if r.capability == 90 and r.dtype != 'fp32' and r.head_size in (0, 64, 128) "
            "and r.spilled]")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                          cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "for 1 generations" in done.stdout and "TOO LARGE" not in done.stdout
