"""Times the kernels beside what one would write without them: `python -m eval.bench kernels`.

Every operation runs forward and backward (decode, draw: forward) at several shapes, by the product (memtrain) and by
peers that compute the same: naive code, SDPA on repeated prefixes, FlexAttention with the equivalent block mask,
torch.compile of the naive code and cut-cross-entropy where there is a GPU, liger-kernel's GRPO losses. Peers of
other packages take part where they are installed (pip install liger-kernel==0.8.5 cut-cross-entropy==25.1.1). The
results of an operation are compared with each other; with fp64 they are compared by the tests (pytest -m gpu).
Ceilings (a matrix product, a copy) are measured in the same run.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from data.run.terminal import columns
from eval.bench.measure import extra_mb, seconds
from kernels import fused, use_triton
from kernels.attention import memory_attention
from kernels.decode import Members, memory_decode
from kernels.draw import draw
from kernels.grpo import grpo_loss, linear_grpo_loss
from kernels.layout import Layout
from kernels.logprob import linear_logprob

Peer = Callable[[], tuple[torch.Tensor, ...]]  # runs once; returns outputs and gradients, to be compared


@dataclass
class Case:
    """One operation at one shape. flops, bytes: what it must compute and move at least, forward and backward."""

    operation: str
    shape: str
    peers: dict[str, Peer]
    flops: float
    bytes: float
    dtype: torch.dtype


PACKAGES = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy"}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ---- The operations ------------------------------------------------------------------------------------------------


def _leaves(device, dtype, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)  # on the card: a CPU takes seconds for a long document's
    return [torch.randn(s, generator=generator, device=device, dtype=dtype).requires_grad_() for s in shapes]


def _forward_backward(function: Callable, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    out = function()
    first = out[0] if isinstance(out, tuple) else out
    return first.detach(), *torch.autograd.grad(first.float().square().mean(), leaves)


def logprob_case(device, dtype, N: int, C: int, V: int, compiled: bool) -> Case:
    hidden, weight = _leaves(device, dtype, (N, C), (V, C))
    with torch.no_grad():
        weight *= C**-0.5
    target = torch.randint(V, (N,), device=device)

    def naive(hidden, weight):
        logp = (hidden @ weight.T).float().log_softmax(-1)
        return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    leaves = [hidden, weight]
    peers = {"memtrain": lambda: _forward_backward(lambda: linear_logprob(hidden, weight, target), leaves),
             "full logits": lambda: _forward_backward(lambda: naive(hidden, weight), leaves)}
    if compiled:
        fast = torch.compile(naive)
        peers["full logits, torch.compile"] = lambda: _forward_backward(lambda: fast(hidden, weight), leaves)
    if device.type == "cuda" and installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        # without its filter, which drops small gradients: the others keep them. It gives no entropy.
        peers["cut-cross-entropy"] = lambda: _forward_backward(lambda: -linear_cross_entropy(
            hidden, weight, target, reduction="none", filter_eps=None), leaves)
    size = hidden.element_size()
    return Case("log-prob", f"N {N}, C {C}, V {V:,}", peers, 8.0 * N * C * V, 2.0 * size * (N * C + V * C), dtype)


class Ragged:
    """Sequences of `tokens` tokens on average, 8 rollouts a group (`sequences` is a multiple of 8), and their loss by
    our kernel and by naive code on padded rows."""

    def __init__(self, device, sequences: int, tokens: int):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 2 * tokens, (sequences,), generator=generator)
        self.offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device)
        self.sequences, self.total, longest = sequences, int(lengths.sum()), int(lengths.max())
        self.group = (torch.arange(sequences) // 8).to(device)
        self.rewards = torch.rand(sequences, generator=generator).to(device)
        self.rollout = torch.arange(sequences, device=device)
        self.place = torch.arange(longest, device=device) < lengths.to(device)[:, None]  # (S,longest)
        self.noise = [0.1 * torch.randn(self.total, generator=generator).to(device) for _ in range(2)]

    def around(self, new: torch.Tensor) -> None:
        """Old and reference log-probs (N) near the new ones."""
        self.old, self.ref = (new.detach().float() + noise for noise in self.noise)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """x (N,...) -> (S,longest,...)."""
        rows = x.new_zeros(*self.place.shape, *x.shape[1:])
        return rows.index_put((self.place,), x)

    @property
    def advantages(self) -> torch.Tensor:
        mean = self.rewards.new_zeros(self.sequences // 8).index_add(0, self.group, self.rewards) / 8
        return self.rewards - mean[self.group]  # (S)

    @property
    def arguments(self) -> tuple:
        return (self.old, self.ref, self.rewards, self.group, self.rollout, self.offsets, self.sequences, 0.2, 0.2,
                1e-3)

    def ours(self, new):
        return grpo_loss(new, *self.arguments)[0]

    def naive(self, new):
        n, o, r = (self.padded(x) for x in (new, self.old, self.ref))
        ratio, advantage = (n - o).exp(), self.advantages[:, None]
        objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        objective = objective - 1e-3 * ((r - n).exp() - (r - n) - 1)
        return -((objective * self.place).sum(1) / self.place.sum(1)).sum() / self.sequences


def _gradients(function: Callable, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    loss = function()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def loss_case(device, sequences: int, tokens: int, compiled: bool) -> Case:
    ragged = Ragged(device, sequences, tokens)
    new = (-torch.rand(ragged.total, generator=torch.Generator().manual_seed(1))).to(device).requires_grad_()
    ragged.around(new)
    peers = {"memtrain": lambda: _gradients(lambda: ragged.ours(new), [new]),
             "padded rows": lambda: _gradients(lambda: ragged.naive(new), [new])}
    if compiled:
        fast = torch.compile(ragged.naive)
        peers["padded rows, torch.compile"] = lambda: _gradients(lambda: fast(new), [new])
    N = ragged.total
    return Case("GRPO loss", f"{sequences} sequences, {N:,} tokens", peers, 20.0 * N, 16.0 * N, torch.float32)


def head_and_loss_case(device, dtype, sequences: int, tokens: int, C: int, V: int, trained: bool = True) -> Case:
    """From hidden states to the GRPO loss in one go, as liger-kernel has it; gradients of hidden states and, where it
    is `trained`, of the head."""
    ragged = Ragged(device, sequences, tokens)
    hidden, weight = _leaves(device, dtype, (ragged.total, C), (V, C))
    leaves = [hidden, weight.requires_grad_(trained)][:1 + trained]
    target = torch.randint(V, (ragged.total,), device=device)
    with torch.no_grad():
        weight *= C**-0.5
        ragged.around(linear_logprob(hidden, weight, target)[0])

    def naive():
        logp = (hidden @ weight.T).float().log_softmax(-1)
        return ragged.naive(logp.gather(-1, target[:, None])[:, 0])

    peers = {"memtrain": lambda: _gradients(lambda: linear_grpo_loss(hidden, weight, target, *ragged.arguments)[0],
                                            leaves)}
    if use_triton(device, dtype):  # elsewhere they are the same
        peers["memtrain, two passes"] = lambda: _gradients(
            lambda: ragged.ours(linear_logprob(hidden, weight, target)[0]), leaves)
    peers["full logits"] = lambda: _gradients(naive, leaves)
    if installed("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        chunked = LigerFusedLinearGRPOLoss(beta=1e-3, compiled=device.type == "cuda", loss_type="grpo")
        ids, old, ref = (ragged.padded(x) for x in (target, ragged.old, ragged.ref))

        def fused():
            return chunked(ragged.padded(hidden), weight, ids, ragged.place, ragged.advantages,
                           ref_per_token_logps=ref, old_per_token_logps=old)[0]

        def kernel():
            rows = F.pad(ragged.padded(hidden), (0, 0, 0, 1)) @ weight.T  # (S,longest+1,V): its last place is unused
            return triton_grpo_loss(rows, old, ref, ids, ragged.advantages, ragged.place, temperature=1.0, beta=1e-3,
                                    eps_low=0.2, eps_high=0.2, inplace=False, loss_type="grpo", reduce=True)[0]

        peers["liger, fused linear"] = lambda: _gradients(fused, leaves)
        if device.type == "cuda":
            peers["liger, logits"] = lambda: _gradients(kernel, leaves)
    N, size = ragged.total, hidden.element_size()
    frozen = "" if trained else ", frozen head"
    return Case("log-prob and loss", f"{sequences} sequences, {N:,} tokens, C {C}, V {V:,}{frozen}", peers,
                (4.0 + 2 * trained) * N * C * V, size * (2.0 * N * C + (1 + trained) * V * C), dtype)


def attention_case(device, dtype, groups: int, prefix: int, G: int, suffix: tuple[int, int], H: int, K: int,
                   D: int) -> Case:
    """`groups` groups of G rollouts; suffix: shortest and longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(suffix[0], suffix[1] + 1, (groups * G,), generator=generator)
    layout = Layout([prefix] * groups, lengths, torch.arange(groups).repeat_interleave(G), device)
    T = layout.total
    q, k, v = leaves = _leaves(device, dtype, (T, H, D), (T, K, D), (T, K, D))
    S = int(lengths.max())
    # every rollout as a row of its own: the prefix repeated, padded at the end
    reach = torch.arange(prefix + S)
    index = torch.where(reach < prefix, layout.prefix_start.cpu()[layout.group.cpu()][:, None] + reach,
                        layout.suffix_start.cpu()[:, None] + (reach - prefix).clamp(max=S)).clamp(max=T - 1).to(device)
    real = (reach < prefix + lengths[:, None]).to(device)  # (N,P+S)
    first = torch.zeros(groups * G, dtype=torch.bool)
    first[::G] = True  # the prefix's own output is taken from the first rollout of its group
    mine = (real & (first.to(device)[:, None] | (reach >= prefix).to(device)))  # (N,P+S)

    def repeated():
        rows = [x[index].transpose(1, 2) for x in (q, k, v)]  # (N,.,P+S,D)
        out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
        return torch.empty_like(q).index_copy(0, index[mine], out[mine])

    own_start, group = layout.own_start, torch.zeros(T, dtype=torch.long, device=device)
    for b, (start, end) in enumerate(zip(*(x.tolist() for x in layout.group_range[::2]), strict=True)):
        group[start:end] = b
    prefix_end, start_of = layout.group_range[1][group], layout.group_range[0][group]

    def visible(b, h, i, j):
        return (j <= i) & (j >= start_of[i]) & ((j >= own_start[i]) | (j < prefix_end[i]))

    peers = {"memtrain": lambda: _forward_backward(lambda: memory_attention(q, k, v, layout), leaves),
             "repeated prefixes, SDPA": lambda: _forward_backward(repeated, leaves)}
    if device.type == "cuda":  # its backward pass exists for CUDA only
        mask = create_block_mask(visible, None, None, T, T, device=device, _compile=True)  # else T x T is built
        fast = torch.compile(flex_attention)

        def flex():
            return fast(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask,
                        enable_gqa=True)[0].transpose(0, 1)

        peers["FlexAttention"] = lambda: _forward_backward(flex, leaves)
    pairs = groups * prefix * (prefix + 1) / 2 + float((lengths * prefix + lengths * (lengths + 1) / 2).sum())
    size = q.element_size()
    return Case("attention", f"{groups} x (prefix {prefix} + {G} x {suffix[0]}-{suffix[1]}), H {H}, K {K}, D {D}",
                peers, 14.0 * pairs * H * D, size * T * D * (4.0 * H + 4 * K), dtype)


def decode_case(device, dtype, groups: int, prefix: int, G: int, suffix: int, H: int, K: int, D: int) -> Case:
    N = groups * G
    q, pk, pv, sk, sv = (x.detach() for x in _leaves(device, dtype, (N, H, D), *[(groups, K, prefix, D)] * 2,
                                                     *[(N, K, suffix, D)] * 2))
    members = Members(torch.arange(groups).repeat_interleave(G), groups, device=device)
    far = torch.full((groups,), prefix, device=device)
    own = torch.full((N,), suffix, device=device)

    def repeated():
        k, v = (torch.cat([a.repeat_interleave(G, 0), b], 2) for a, b in ((pk, sk), (pv, sv)))  # (N,K,P+S,D)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    with torch.no_grad():
        peers = {"memtrain": lambda: (memory_decode(q, pk, pv, far, sk, sv, own, members),),
                 "repeated prefixes, SDPA": lambda: (repeated(),)}
    size = q.element_size()
    return Case("decode", f"{groups} x {G} rollouts, prefix {prefix}, suffix {suffix}, H {H}, K {K}, D {D}", peers,
                4.0 * N * H * (prefix + suffix) * D, 2.0 * size * K * D * (groups * prefix + N * suffix), dtype)


def draw_case(device, N: int, V: int, top_p: float) -> Case:
    """Token ids. flops: none are counted."""
    logp = (3 * _leaves(device, torch.float32, (N, V))[0].detach()).log_softmax(-1)
    u = torch.rand(N, dtype=torch.float64, device=device)

    def by_sorting():
        p = logp.exp()
        if top_p < 1:
            ordered, index = p.sort(-1, descending=True)
            p = torch.zeros_like(p).scatter_(-1, index, ordered * (ordered.cumsum(-1) - ordered < top_p))
        total = p.double().cumsum(-1)
        return torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)[:, 0]

    peers = {"memtrain": lambda: (draw(logp, u, top_p),), "by sorting": lambda: (by_sorting(),)}
    return Case("draw", f"N {N}, V {V:,}, top_p {top_p}", peers, 0.0, 4.0 * N * V, torch.float32)


def fused_case(device, dtype, name: str, T: int, C: int, H: int, K: int, D: int, compiled: bool) -> Case:
    """What lies between the products of a block of width C, with 3 C hidden; peers: each operation alone."""
    angle = torch.rand(T, 1, D // 2, device=device)
    rotary = angle.cos(), angle.sin()
    shapes, numbers, call = {
        "add_norm": (((T, C), (T, C), (C,)), 8 * T * C, lambda f, x, y, w: f(x, y, w, 1e-6)),
        "norm_rope": (((T, H, D), (T, K, D), (D,), (D,)), 5 * T * (H + K) * D,
                      lambda f, q, k, *w: f(q, k, k, rotary, w, 1e-6)),
        "swiglu": (((T, 3 * C), (T, 3 * C)), 24 * T * C, lambda f, gate, up: (f(gate, up),))}[name]
    leaves = _leaves(device, dtype, *shapes)

    def peer(function):
        out = call(function, *leaves)
        return out[0].detach(), *torch.autograd.grad(out, leaves, [y.detach() for y in out])

    plain = getattr(fused, f"{name}_reference")
    functions = {"memtrain": getattr(fused, name), "PyTorch": plain}
    if compiled:
        functions["PyTorch, torch.compile"] = torch.compile(plain)
    return Case(name, f"T {T:,}, C {C}, H {H}, K {K}, D {D}", {by: lambda f=f: peer(f) for by, f in functions.items()},
                0.0, float(leaves[0].element_size() * numbers), dtype)


def cases(device: torch.device) -> list[Callable[[], Case]]:
    """What is measured where: nano shapes and one real vocabulary on a CPU; the paper's shapes on a GPU."""
    if device.type == "cpu":
        f = torch.float32
        return [lambda: logprob_case(device, f, 6000, 128, 1536, False),
                lambda: logprob_case(device, f, 256, 256, 151_936, False),
                lambda: loss_case(device, 704, 24, False),
                lambda: head_and_loss_case(device, f, 256, 24, 128, 1536),
                lambda: attention_case(device, f, 24, 190, 8, (20, 70), 4, 2, 32),
                lambda: decode_case(device, f, 6, 190, 8, 60, 4, 2, 32),
                *(lambda N=N, V=V, p=p: draw_case(device, N, V, p) for N, V in ((200, 1536), (8, 151_936))
                  for p in (1.0, 0.95))]
    h = torch.bfloat16
    made = [lambda: loss_case(device, 2304, 700, True),
            *(lambda N=N, p=p: draw_case(device, N, 151_936, p) for N in (16, 256) for p in (1.0, 0.95))]
    for C, H, K in ((1024, 16, 8), (2560, 32, 8)):  # Qwen3-0.6B, Qwen3-4B
        made += [lambda C=C: logprob_case(device, h, 4096, C, 151_936, True),
                 *(lambda C=C, t=t: head_and_loss_case(device, h, 16, 256, C, 151_936, t) for t in (True, False)),
                 lambda H=H, K=K: attention_case(device, h, 4, 5320, 8, (1024, 1524), H, K, 128),
                 lambda H=H, K=K: decode_case(device, h, 64, 5320, 8, 1200, H, K, 128),
                 *(lambda name=name, C=C, H=H, K=K: fused_case(device, h, name, 16_384, C, H, K, 128, True)
                   for name in ("add_norm", "norm_rope", "swiglu"))]
    return made


# ---- Measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    operation: str
    shape: str
    by: str
    seconds: float
    fastest: float
    slowest: float
    extra_mb: float
    deviation: float  # largest difference to the first peer, as `difference` has it
    compute_share: float  # of the measured matrix product
    copy_share: float  # of the measured copy


def ceilings(device, dtype) -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s of a copy, read and write counted), best of 5."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    big = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    copy = min(seconds(lambda: other.copy_(big), device) for _ in range(5))
    return 2 * n**3 / product, 2 * big.numel() / copy


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in units of b's largest value; of a loss, a sum of advantages that cancel to almost nothing,
    in units of an advantage."""
    return float((a - b).abs().max() / (b.abs().max().clamp(min=1e-30) if b.ndim else 1.0))


def measure(case: Case, device, repeats: int, limits: tuple[float, float]) -> list[Row]:
    """A row a peer."""
    rows, truth = [], None
    for name, peer in case.peers.items():
        result = peer()  # also the warm-up, and what torch.compile compiles
        truth = truth or result
        deviation = max(difference(a.float(), b.float()) for a, b in zip(result, truth, strict=True))
        del result
        gc.collect()
        extra = extra_mb(peer, device)
        spent = [seconds(peer, device) for _ in range(repeats)]
        middle = statistics.median(spent)
        rows.append(Row(case.operation, case.shape, name, middle, min(spent), max(spent), extra, deviation,
                        case.flops / middle / limits[0], case.bytes / middle / limits[1]))
    return rows


def run(device: torch.device, repeats: int) -> Iterator[tuple[list[Row], dict]]:
    """(rows so far, ceilings) after every case: what was measured is kept, whatever becomes of the rest."""
    rows, limits = [], {}
    for make in tqdm(cases(device), desc="kernels", unit="case"):
        case = make()
        limits.setdefault(case.dtype, ceilings(device, case.dtype))
        rows += measure(case, device, repeats, limits[case.dtype])
        del case
        gc.collect()
        yield rows, {str(k).removeprefix("torch."): v for k, v in limits.items()}


def table(rows: list[Row], limits: dict) -> str:
    lines = [["", "ms", "fastest", "slowest", "extra MB", "differs", "of product", "of copy"]]
    lines += [[f"{r.operation}: {r.shape}, {r.by}", f"{r.seconds * 1e3:.2f}", f"{r.fastest * 1e3:.2f}",
               f"{r.slowest * 1e3:.2f}", f"{r.extra_mb:.0f}", f"{r.deviation:.1e}", f"{r.compute_share:.0%}",
               f"{r.copy_share:.0%}"] for r in rows]
    said = [f"ceilings in {k}: matrix product {a / 1e12:.2f} TFLOP/s, copy {b / 1e9:.0f} GB/s"
            for k, (a, b) in limits.items()]
    said.append("forward and backward (decode, draw: forward), medians; extra: peak memory beyond the inputs; differs: "
                "from the first line, in units of its largest value, losses in units of an advantage")
    said += [f"not measured: {name} (not installed)" for module, name in PACKAGES.items() if not installed(module)]
    return "\n".join([columns(lines), "", *said])
