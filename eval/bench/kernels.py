"""The kernels beside what one would write without them: `python -m eval.bench kernels`.

Every operation runs forward and backward (decode, draw: forward) at several shapes, by us and by peers that compute
the same: naive code, SDPA on repeated prefixes, FlexAttention with the same mask, torch.compile of the naive code and
cut-cross-entropy where there is a GPU, liger-kernel's GRPO losses. Peers of other packages take part where they are
installed. `errors` compares ours with itself in fp64, which always goes to the PyTorch reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from eval.bench.measure import Figures, Row, ceilings, measured, table
from kernels import fused, use_triton
from kernels.attention import memory_attention
from kernels.decode import Members, memory_decode
from kernels.draw import draw
from kernels.grpo import grpo_loss, linear_grpo_loss
from kernels.layout import Layout
from kernels.logprob import linear_logprob, widened


class Case:
    """One operation at one shape. leaves: its inputs by name; gradients flow to those that require them. peers: ours
    first, functions of the leaves that give an output or several. flops, bytes: what it must compute and move at least,
    forward and backward."""

    def __init__(self, name: str, leaves: dict[str, torch.Tensor], peers: dict[str, Callable], flops: float,
                 bytes: float):
        self.name, self.leaves, self.peers, self.flops, self.bytes = name, leaves, peers, flops, bytes
        self.weights: list[torch.Tensor] = []  # of the outputs, in the loss that is differentiated

    def run(self, by: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name; dtype: in place of the leaves' own."""
        leaves = self.leaves
        if dtype:
            leaves = {k: x.detach().to(dtype).requires_grad_(x.requires_grad) for k, x in leaves.items()}
        out = self.peers[by](*leaves.values())
        out = out if isinstance(out, tuple) else (out,)
        found = {f"output {i}": x.detach() for i, x in enumerate(out)}
        wanted = {f"d{k}": x for k, x in leaves.items() if x.requires_grad}
        if not wanted:
            return found
        self.weights = self.weights or [torch.randn_like(x) if x.ndim else torch.ones_like(x) for x in out]
        weights = [w.to(x.dtype) for w, x in zip(self.weights, out, strict=True)]
        return found | dict(zip(wanted, torch.autograd.grad(out, [*wanted.values()], weights), strict=True))


def errors(mine: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference, in units of the largest true value; of a loss, a sum of advantages that cancel to almost
    nothing, in units of an advantage. NaN stays NaN."""
    return {name: float((mine[name].double() - x.double()).abs().max() / (x.double().abs().max().clamp(min=1e-30)
                                                                          if x.ndim else 1.0))
            for name, x in true.items()}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def random(device, dtype, **shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)  # on the card: a CPU takes seconds for a long document's
    return {name: torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
            for name, shape in shapes.items()}


def compiled(device, name: str, function: Callable) -> dict[str, Callable]:
    return {f"{name}, torch.compile": torch.compile(function)} if device.type == "cuda" else {}


# ---- The operations ------------------------------------------------------------------------------------------------


def head(device, dtype, N: int, C: int, V: int) -> dict[str, torch.Tensor]:
    leaves = random(device, dtype, hidden=(N, C), weight=(V, C))
    leaves["weight"].data *= C**-0.5
    return leaves


def logprob_case(device, dtype, N: int, C: int, V: int, entropy: bool = False) -> Case:
    """entropy: as an output, too."""
    target = torch.randint(V, (N,), device=device)
    wanted = slice(2 if entropy else 1)

    def naive(hidden, weight):
        logp = (hidden @ weight.T).float().log_softmax(-1)
        return (logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1))[wanted]

    peers = {"memtrain": lambda hidden, weight: linear_logprob(hidden, weight, target)[wanted], "full logits": naive}
    peers |= compiled(device, "full logits", naive)
    if device.type == "cuda" and not entropy and installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        # without its filter, which drops small gradients: the others keep them
        peers["cut-cross-entropy"] = lambda hidden, weight: -linear_cross_entropy(
            hidden, weight, target, reduction="none", filter_eps=None)
    return Case(f"log-prob: N {N}, C {C}, V {V:,}", head(device, dtype, N, C, V), peers, 8.0 * N * C * V,
                2.0 * dtype.itemsize * (N * C + V * C))


class Ragged:
    """Sequences of `tokens` tokens on average, 8 rollouts a group (`sequences` is a multiple of 8), and their loss by
    our kernel and by naive code on padded rows."""

    def __init__(self, device, sequences: int, tokens: int):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 2 * tokens, (sequences,), generator=generator)
        self.offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device)
        self.sequences, self.total = sequences, int(lengths.sum())
        self.rollout = torch.arange(sequences, device=device)
        self.group = self.rollout // 8
        self.rewards = torch.rand(sequences, generator=generator).to(device)
        self.advantages = (self.rewards.view(-1, 8) - self.rewards.view(-1, 8).mean(1, keepdim=True)).flatten()
        self.place = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)  # (S,longest)
        self.noise = [0.1 * torch.randn(self.total, generator=generator).to(device) for _ in range(2)]
        self.name = f"{sequences} sequences, {self.total:,} tokens"

    def around(self, new: torch.Tensor) -> None:
        """Old and reference log-probs (N) near the new ones."""
        self.old, self.ref = (new.detach() + noise for noise in self.noise)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """x (N,...) -> (S,longest,...)."""
        return x.new_zeros(*self.place.shape, *x.shape[1:]).index_put((self.place,), x)

    def arguments(self, like: torch.Tensor) -> tuple:
        old, ref = (x.to(widened(like[:0]).dtype) for x in (self.old, self.ref))
        return old, ref, self.rewards, self.group, self.rollout, self.offsets, self.sequences, 0.2, 0.2, 1e-3

    def ours(self, new):
        return grpo_loss(new, *self.arguments(new))[0]

    def naive(self, new):
        n, o, r = (self.padded(x) for x in (new, self.old, self.ref))
        ratio, advantage = (n - o).exp(), self.advantages[:, None]
        objective = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        objective = objective - 1e-3 * ((r - n).exp() - (r - n) - 1)
        return -((objective * self.place).sum(1) / self.place.sum(1)).sum() / self.sequences


def loss_case(device, sequences: int, tokens: int) -> Case:
    ragged = Ragged(device, sequences, tokens)
    new = (-torch.rand(ragged.total, generator=torch.Generator().manual_seed(1))).to(device).requires_grad_()
    ragged.around(new)
    peers = {"memtrain": ragged.ours, "padded rows": ragged.naive} | compiled(device, "padded rows", ragged.naive)
    return Case(f"GRPO loss: {ragged.name}", {"new": new}, peers, 20.0 * ragged.total, 16.0 * ragged.total)


def head_and_loss_case(device, dtype, sequences: int, tokens: int, C: int, V: int, trained: bool = True) -> Case:
    """From hidden states to the GRPO loss in one go, as liger-kernel has it. trained: gradients of the head, too."""
    ragged = Ragged(device, sequences, tokens)
    leaves = head(device, dtype, ragged.total, C, V)
    leaves["weight"].requires_grad_(trained)
    target = torch.randint(V, (ragged.total,), device=device)
    with torch.no_grad():
        ragged.around(linear_logprob(*leaves.values(), target)[0])

    def naive(hidden, weight):
        logp = (hidden @ weight.T).float().log_softmax(-1)
        return ragged.naive(logp.gather(-1, target[:, None])[:, 0])

    peers = {"memtrain": lambda hidden, weight: linear_grpo_loss(hidden, weight, target, *ragged.arguments(hidden))[0]}
    if use_triton(device, dtype):  # elsewhere they are the same
        peers["memtrain, two passes"] = lambda hidden, weight: ragged.ours(linear_logprob(hidden, weight, target)[0])
    peers["full logits"] = naive
    if installed("liger_kernel"):
        peers |= liger(device, ragged, target)
    N = ragged.total
    return Case(f"log-prob and loss: {ragged.name}, C {C}, V {V:,}{'' if trained else ', frozen head'}", leaves, peers,
                (4.0 + 2 * trained) * N * C * V, dtype.itemsize * (2.0 * N * C + (1 + trained) * V * C))


def liger(device, ragged: Ragged, target: torch.Tensor) -> dict[str, Callable]:
    """Its loss on hidden states in chunks; on a card also its kernel on logits."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    chunked = LigerFusedLinearGRPOLoss(beta=1e-3, compiled=device.type == "cuda", loss_type="grpo")
    ids, old, ref = (ragged.padded(x) for x in (target, ragged.old, ragged.ref))

    def fused_linear(hidden, weight):
        return chunked(ragged.padded(hidden), weight, ids, ragged.place, ragged.advantages, ref_per_token_logps=ref,
                       old_per_token_logps=old)[0]

    def on_logits(hidden, weight):
        rows = F.pad(ragged.padded(hidden), (0, 0, 0, 1)) @ weight.T  # (S,longest+1,V): its last place is unused
        return triton_grpo_loss(rows, old, ref, ids, ragged.advantages, ragged.place, temperature=1.0, beta=1e-3,
                                eps_low=0.2, eps_high=0.2, inplace=False, loss_type="grpo", reduce=True)[0]

    return {"liger, fused linear": fused_linear} | ({"liger, logits": on_logits} if device.type == "cuda" else {})


def attention_case(device, dtype, groups: int, prefix: int, G: int, suffix: tuple[int, int], H: int, K: int,
                   D: int) -> Case:
    """`groups` groups of G rollouts; suffix: shortest and longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(suffix[0], suffix[1] + 1, (groups * G,), generator=generator)
    layout = Layout([prefix] * groups, lengths, torch.arange(groups).repeat_interleave(G), device)
    T, S = layout.total, int(lengths.max())
    leaves = random(device, dtype, q=(T, H, D), k=(T, K, D), v=(T, K, D))
    # every rollout as a row of its own: the prefix repeated, padded at the end
    reach, lengths = torch.arange(prefix + S, device=device), lengths.to(device)
    index = torch.where(reach < prefix, layout.prefix_start[layout.group][:, None] + reach,
                        layout.suffix_start[:, None] + reach - prefix).clamp(max=T - 1)  # (N,P+S)
    first = torch.arange(groups * G, device=device)[:, None] % G == 0  # whose output the prefix takes
    mine = (reach < prefix + lengths[:, None]) & (first | (reach >= prefix))  # (N,P+S)

    def repeated(q, k, v):
        rows = [x[index].transpose(1, 2) for x in (q, k, v)]  # (N,.,P+S,D)
        out = F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
        return torch.empty_like(q).index_copy(0, index[mine], out[mine])

    peers = {"memtrain": lambda q, k, v: memory_attention(q, k, v, layout), "repeated prefixes, SDPA": repeated}
    if device.type == "cuda":  # its backward pass exists for CUDA only
        peers["FlexAttention"] = flex(layout)
    pairs = groups * prefix * (prefix + 1) / 2 + float((lengths * prefix + lengths * (lengths + 1) / 2).sum())
    return Case(f"attention: {groups} x (prefix {prefix} + {G} x {suffix[0]}-{suffix[1]}), H {H}, K {K}, D {D}", leaves,
                peers, 14.0 * pairs * H * D, dtype.itemsize * T * D * (4.0 * H + 4 * K))


def flex(layout: Layout) -> Callable:
    start, prefix_end, end = layout.group_range
    start, prefix_end = (x.repeat_interleave(end - start) for x in (start, prefix_end))  # (T) of a token's group

    def visible(b, h, i, j):
        return (j <= i) & (j >= start[i]) & ((j >= layout.own_start[i]) | (j < prefix_end[i]))

    @cache
    def mask():
        return create_block_mask(visible, None, None, layout.total, layout.total, device=layout.device,
                                 _compile=True)  # else T x T is built

    fast = torch.compile(flex_attention)
    return lambda *qkv: fast(*(x.transpose(0, 1)[None] for x in qkv), block_mask=mask(),
                             enable_gqa=True)[0].transpose(0, 1)


def decode_case(device, dtype, groups: int, prefix: int, G: int, suffix: int, H: int, K: int, D: int) -> Case:
    N = groups * G
    caches = {"pk": (groups, K, prefix, D), "pv": (groups, K, prefix, D), "sk": (N, K, suffix, D),
              "sv": (N, K, suffix, D)}
    leaves = {name: x.detach() for name, x in random(device, dtype, q=(N, H, D), **caches).items()}
    members = Members(torch.arange(groups).repeat_interleave(G), groups, device=device)
    far, own = torch.full((groups,), prefix, device=device), torch.full((N,), suffix, device=device)

    def repeated(q, pk, pv, sk, sv):
        k, v = (torch.cat([a.repeat_interleave(G, 0), b], 2) for a, b in ((pk, sk), (pv, sv)))  # (N,K,P+S,D)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    peers = {"memtrain": lambda q, pk, pv, sk, sv: memory_decode(q, pk, pv, far, sk, sv, own, members),
             "repeated prefixes, SDPA": repeated}
    return Case(f"decode: {groups} x {G} rollouts, prefix {prefix}, suffix {suffix}, H {H}, K {K}, D {D}", leaves,
                peers, 4.0 * N * H * (prefix + suffix) * D,
                2.0 * dtype.itemsize * K * D * (groups * prefix + N * suffix))


def draw_case(device, N: int, V: int, top_p: float) -> Case:
    """Token ids. flops: none are counted."""
    logp = (3 * random(device, torch.float32, logp=(N, V))["logp"].detach()).log_softmax(-1)
    u = torch.rand(N, dtype=torch.float64, device=device)

    def by_sorting(logp):
        p = logp.exp()
        if top_p < 1:
            ordered, index = p.sort(-1, descending=True)
            p = torch.zeros_like(p).scatter_(-1, index, ordered * (ordered.cumsum(-1) - ordered < top_p))
        total = p.double().cumsum(-1)
        return torch.searchsorted(total, (u * total[:, -1])[:, None], right=True)[:, 0]

    return Case(f"draw: N {N}, V {V:,}, top_p {top_p}", {"logp": logp},
                {"memtrain": lambda logp: draw(logp, u, top_p), "by sorting": by_sorting}, 0.0, 4.0 * N * V)


def fused_case(device, dtype, name: str, T: int, C: int, H: int, K: int, D: int) -> Case:
    """What lies between the products of a block of width C, with 3 C hidden; peers: each operation alone."""
    angle = 100 * torch.rand(T, 1, D // 2, device=device)
    rotary = angle.cos(), angle.sin()
    shapes, numbers, rest = {
        "add_norm": ({"x": (T, C), "y": (T, C), "w": (C,)}, 8 * T * C, lambda x, y, w: (x, y, w, 1e-6)),
        "norm_rope": ({"q": (T, H, D), "k": (T, K, D), "wq": (D,), "wk": (D,)}, 5 * T * (H + K) * D,
                      lambda q, k, *w: (q, k, k, rotary, w, 1e-6)),
        "swiglu": ({"gate": (T, 3 * C), "up": (T, 3 * C)}, 24 * T * C, lambda gate, up: (gate, up))}[name]
    ours, plain = getattr(fused, name), getattr(fused, f"{name}_reference")
    peers = {"memtrain": lambda *leaves: ours(*rest(*leaves)), "PyTorch": lambda *leaves: plain(*rest(*leaves))}
    return Case(f"{name}: T {T:,}, C {C}, H {H}, K {K}, D {D}", random(device, dtype, **shapes),
                peers | compiled(device, "PyTorch", peers["PyTorch"]), 0.0, float(dtype.itemsize * numbers))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    """What is timed where: nano shapes and one real vocabulary on a CPU; the paper's shapes on a GPU."""
    if device.type == "cpu":
        f = torch.float32
        return [lambda: logprob_case(device, f, 6000, 128, 1536), lambda: logprob_case(device, f, 256, 256, 151_936),
                lambda: loss_case(device, 704, 24), lambda: head_and_loss_case(device, f, 256, 24, 128, 1536),
                lambda: attention_case(device, f, 24, 190, 8, (20, 70), 4, 2, 32),
                lambda: decode_case(device, f, 6, 190, 8, 60, 4, 2, 32),
                *(lambda N=N, V=V, p=p: draw_case(device, N, V, p) for N, V in ((200, 1536), (8, 151_936))
                  for p in (1.0, 0.95))]
    h = torch.bfloat16
    made = [lambda: loss_case(device, 2304, 700),
            *(lambda N=N, p=p: draw_case(device, N, 151_936, p) for N in (16, 256) for p in (1.0, 0.95))]
    for C, H, K in ((1024, 16, 8), (2560, 32, 8)):  # Qwen3-0.6B, Qwen3-4B
        made += [lambda C=C: logprob_case(device, h, 4096, C, 151_936),
                 *(lambda C=C, t=t: head_and_loss_case(device, h, 16, 256, C, 151_936, t) for t in (True, False)),
                 lambda H=H, K=K: attention_case(device, h, 4, 5320, 8, (1024, 1524), H, K, 128),
                 lambda H=H, K=K: decode_case(device, h, 64, 5320, 8, 1200, H, K, 128),
                 *(lambda name=name, C=C, H=H, K=K: fused_case(device, h, name, 16_384, C, H, K, 128)
                   for name in ("add_norm", "norm_rope", "swiglu"))]
    return made


def real_shapes(device: torch.device) -> Iterator[tuple[str, torch.dtype, Case]]:
    """Every kernel at shapes of real models, in both precisions; fp32 at less than the paper's window."""
    for dtype in (torch.bfloat16, torch.float32):
        P, S = (6000, 900) if dtype == torch.bfloat16 else (1500, 300)
        kind = str(dtype).removeprefix("torch.")
        for D, H, K in ((64, 9, 3), (128, 16, 8)):
            yield f"attention {kind} D {D}", dtype, attention_case(device, dtype, 2, P, 2, (S // 2, S), H, K, D)
            yield f"decode {kind} D {D}", dtype, decode_case(device, dtype, 8, 6000, 8, 700, H, K, D)
            for name in ("add_norm", "norm_rope", "swiglu"):
                yield f"{name} {kind} D {D}", dtype, fused_case(device, dtype, name, P, 8 * D, H, K, D)
        yield f"log-prob {kind}", dtype, logprob_case(device, dtype, 300, 1024, 151_936, True)
        yield f"log-prob and loss {kind}", dtype, head_and_loss_case(device, dtype, 16, 20, 1024, 151_936)
    yield "GRPO loss float32", torch.float32, loss_case(device, 2304, 700)


def differences(case: Case) -> dict[str, str]:
    """What a peer's outputs and gradients differ by from ours."""
    true = case.run("memtrain")
    return {by: f"differs by {max(errors(case.run(by), true).values()):.0e}" for by in list(case.peers)[1:]}


def timed(case: Case, device, repeats: int, limits: tuple[float, float]) -> list[Row]:
    """A row a peer."""
    notes = differences(case)
    rows = measured(case.name, {by: lambda by=by: case.run(by) for by in case.peers}, device, repeats)
    for row in rows:
        row.note = notes.get(row.by, "")
        row.ceiling = max(case.flops / limits[0], case.bytes / limits[1]) / row.median
    return rows


def kernels(options, fields, figures: Figures) -> bool:
    """Each kernel beside peers that compute the same: seconds, extra memory, share of the measured ceilings."""
    rows, limits = [], {}
    for make in tqdm(cases(options.device), desc="kernels", unit="case"):
        case = make()
        dtype = next(iter(case.leaves.values())).dtype
        limits.setdefault(dtype, ceilings(options.device, dtype))
        rows += timed(case, options.device, options.repeats, limits[dtype])
        del case
        figures.add_rows(rows, ceilings={str(k).removeprefix("torch."): v for k, v in limits.items()})
    print(table(rows))
    print(*(f"ceilings in {k}: matrix product {a / 1e12:.2f} TFLOP/s, copy {b / 1e9:.0f} GB/s"
            for k, (a, b) in figures["ceilings"].items()), sep="\n")
    print(*(f"not measured: {name} is not installed" for name in ("liger_kernel", "cut_cross_entropy")
            if not installed(name)), sep="\n")
    return True
