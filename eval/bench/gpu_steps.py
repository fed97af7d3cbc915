"""The steps of `python -m eval.gpu`, each of which runs in a process of its own:

    python -m eval.bench.gpu_steps NAME --device cuda|cpu --result FILE [--out DIR] [--seconds N]

A step writes its figures to FILE as JSON as soon as it has them and ends with 1 where they are not as they must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from data.run.files import replacing
from eval.bench.measure import Capture, seconds
from kernels import attention, decode, fused, grpo, logprob, synchronise
from kernels.layout import Layout

# ---- measuring -----------------------------------------------------------------------------------------------------

Figures = dict[str, object]
# Largest error, in units of the true value's largest one. fp32 products are three of TF32.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def timed(work: Callable, device: torch.device, repeats: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    work()
    return statistics.median(seconds(work, device) for _ in range(repeats))


def random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)


def error(mine: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """largest: in units of the largest true value; norm: of the difference, over the norm. NaN never passes."""
    mine, true = mine.double(), true.double()
    return {"largest": float((mine - true).abs().max() / true.abs().max()),
            "norm": float((mine - true).norm() / true.norm())}


def sound(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> bool:
    return all(e["largest"] <= TOLERANCE[dtype] for e in errors.values())


class Result:
    """The file of figures: whole after every addition."""

    def __init__(self, path: Path):
        self.path, self.figures = path, {}

    def add(self, **figures) -> None:
        self.figures |= figures
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.figures, indent=1), encoding="utf-8")


# ---- probe ---------------------------------------------------------------------------------------------------------


def probe(device: torch.device, result: Result, options) -> bool:
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = "none"
    result.add(torch=torch.__version__, triton=version, python=platform.python_version(), cuda=torch.version.cuda,
               cores=os.cpu_count())
    if device.type == "cuda":
        card, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
        result.add(card=card.name, capability=f"{card.major}.{card.minor}", memory_gb=total / 1e9, free_gb=free / 1e9,
                   multiprocessors=card.multi_processor_count, l2_mb=card.L2_cache_size / 2**20,
                   shared_kb=card.shared_memory_per_block_optin / 1024)
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True),
                              ("fp32", torch.float32, False), ("fp64", torch.float64, False)):
        n = (8192 if name in ("bf16", "tf32") else 4096) if device.type == "cuda" else 512
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        result.add(**{f"{name}_tflops": 2 * n**3 / timed(lambda a=a, b=b: a @ b, device) / 1e12})
    torch.set_float32_matmul_precision("highest")
    size = 2**32 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(255)
    target = torch.empty_like(source)
    result.add(copy_gb_s=2 * size / timed(lambda: target.copy_(source), device) / 1e9)
    return True


# ---- kernels: against fp64, at the shapes of real models ---------------------------------------------------------


def plain_attention(q, k, v, layout: Layout) -> torch.Tensor:
    """Every sequence alone, head by head, in the dtype of q."""
    out, (prefix, suffix, group) = torch.empty_like(q), layout.host_lengths
    starts, own = layout.prefix_start.tolist(), layout.suffix_start.tolist()
    repeat = q.shape[1] // k.shape[1]
    jobs = [(range(s, s + n), n) for s, n in zip(starts, prefix, strict=True) if n]
    jobs += [([*range(starts[g], starts[g] + prefix[g]), *range(s, s + n)], n)
             for s, n, g in zip(own, suffix, group, strict=True)]
    parts = []
    for index, n in jobs:  # the last n tokens of the sequence are queries
        index = torch.tensor([*index], device=q.device)
        hidden = torch.ones(n, len(index), dtype=torch.bool, device=q.device).triu(len(index) - n + 1)
        heads = [(q[index[-n:], h] @ k[index, h // repeat].T / math.sqrt(q.shape[2])).masked_fill(hidden, -torch.inf)
                 .softmax(-1) @ v[index, h // repeat] for h in range(q.shape[1])]
        parts.append((index[-n:], torch.stack(heads, 1)))
    return out.index_copy(0, torch.cat([i for i, _ in parts]), torch.cat([x for _, x in parts]))


def attention_errors(device, dtype, prefix: int, suffix: int, H: int, K: int, D: int) -> dict:
    layout = Layout([prefix, prefix // 3], [suffix, suffix // 2, suffix, 7], [0, 0, 1, 1], device)
    mine = [random(device, dtype, layout.total, n, D).requires_grad_() for n in (H, K, K)]
    true = [x.detach().double().requires_grad_() for x in mine]
    out, truth = attention.memory_attention(*mine, layout), plain_attention(*true, layout)
    weight = random(device, dtype, *out.shape)
    found, wanted = torch.autograd.grad(out, mine, weight), torch.autograd.grad(truth, true, weight.double())
    return {name: error(a, b) for name, a, b in zip(("o", "dq", "dk", "dv"), (out.detach(), *found),
                                                    (truth.detach(), *wanted), strict=True)}


def logprob_errors(device, dtype, N: int, C: int, V: int) -> dict:
    hidden, weight = random(device, dtype, N, C).requires_grad_(), (random(device, dtype, V, C) * C**-0.5).detach()
    weight.requires_grad_()
    target = torch.randint(V, (N,), device=device)
    true = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp = (true[0] @ true[1].T).log_softmax(-1)
    truth = logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    mine = logprob.linear_logprob(hidden, weight, target)
    g = [torch.randn(N, device=device) for _ in range(2)]
    found = torch.autograd.grad(mine, (hidden, weight), g)
    wanted = torch.autograd.grad(truth, true, [x.double() for x in g])
    return {name: error(a.detach(), b.detach()) for name, a, b in zip(
        ("logprob", "entropy", "dhidden", "dweight"), (*mine, *found), (*truth, *wanted), strict=True)}


def decode_errors(device, dtype, groups: int, G: int, prefix: int, suffix: int, H: int, K: int, D: int) -> dict:
    N = groups * G
    q, pk, pv = random(device, dtype, N, H, D), *(random(device, dtype, groups, K, prefix, D) for _ in range(2))
    sk, sv = (random(device, dtype, N, K, suffix, D) for _ in range(2))
    far, own = (torch.randint(1, n + 1, (m,), device=device) for n, m in ((prefix, groups), (suffix, N)))
    group = torch.arange(groups).repeat_interleave(G)
    mine = decode.memory_decode(q, pk, pv, far, sk, sv, own, decode.Members(group, groups, device=device))
    true = torch.empty(N, H, D, dtype=torch.float64, device=device)
    for i, g in enumerate(group.tolist()):
        k, v = (torch.cat([a[g, :, :far[g]], b[i, :, :own[i]]], 1).double().repeat_interleave(H // K, 0)
                for a, b in ((pk, sk), (pv, sv)))  # (H,P+S,D)
        weights = (torch.einsum("hd,htd->ht", q[i].double(), k) / math.sqrt(D)).softmax(-1)
        true[i] = torch.einsum("ht,htd->hd", weights, v)
    return {"o": error(mine, true)}


def fused_errors(device, dtype, T: int, C: int, hidden: int, H: int, K: int, D: int) -> dict:
    """What lies between the products of a block; fp64 goes to the references."""
    shapes = {"x": (T, C), "y": (T, C), "weight": (C,), "q": (T, H, D), "k": (T, K, D), "q_norm": (D,), "k_norm": (D,),
              "gate": (T, hidden), "up": (T, hidden)}
    mine = [random(device, dtype, *shape).requires_grad_() for shape in shapes.values()]
    angle = 100 * torch.rand(T, 1, D // 2, device=device)

    def outputs(x, y, weight, q, k, q_norm, k_norm, gate, up):
        rotary = angle.cos(), angle.sin()
        return (*fused.add_norm(x, y, weight, 1e-6), *fused.norm_rope(q, k, k, rotary, (q_norm, k_norm), 1e-6),
                fused.swiglu(gate, up))

    true = [x.detach().double().requires_grad_() for x in mine]
    out, truth = outputs(*mine), outputs(*true)
    weights = [random(device, dtype, *y.shape) for y in out]
    found = *out, *torch.autograd.grad(out, mine, weights)
    wanted = *truth, *torch.autograd.grad(truth, true, [w.double() for w in weights])
    names = "sum", "norm", "queries", "keys", "swiglu", *(f"d{name}" for name in shapes)
    return {name: error(a.detach(), b.detach()) for name, a, b in zip(names, found, wanted, strict=True)}


def loss_errors(device, sequences: int, tokens: int) -> dict:
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(1, 2 * tokens, (sequences,)).cumsum(0)])
    new = -torch.rand(int(offsets[-1]))
    group, rewards = torch.arange(sequences) // 8, torch.rand(sequences, dtype=torch.float64)
    arguments = [new - 0.4 * torch.randn_like(new), new + 0.1 * torch.randn_like(new), rewards, group,
                 torch.arange(sequences), offsets]
    mine, true = new.to(device).requires_grad_(), new.double().requires_grad_()
    loss, _ = grpo.grpo_loss(mine, *(x.to(device) for x in arguments), sequences, 0.2, 0.2, 1e-3)
    truth, _ = grpo.grpo_loss_reference(true, *(x.double() if x.is_floating_point() else x for x in arguments),
                                        sequences, 0.2, 0.2, 1e-3, False)
    return {"dnew": error(torch.autograd.grad(loss, mine)[0].cpu(), torch.autograd.grad(truth, true)[0])}


def kernels(device: torch.device, result: Result, options) -> bool:
    shapes: list[tuple[str, torch.dtype, Callable[[], dict]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        name, small = str(dtype).removeprefix("torch."), dtype == torch.float32
        for D, H, K in ((64, 9, 3), (128, 16, 8)):
            P, S = (1500, 300) if small else (6000, 900)
            shapes += [(f"attention {name} D {D}", dtype, partial(attention_errors, device, dtype, P, S, H, K, D)),
                       (f"decode {name} D {D}", dtype, partial(decode_errors, device, dtype, 8, 8, 6000, 700, H, K, D)),
                       (f"fused {name} D {D}", dtype, partial(fused_errors, device, dtype, P, 8 * D, 24 * D, H, K, D))]
        shapes.append((f"log-prob {name} V 151936", dtype, partial(logprob_errors, device, dtype, 300, 1024, 151_936)))
    shapes.append(("GRPO loss float32", torch.float32, partial(loss_errors, device, 2304, 700)))
    good = True
    for name, dtype, measure in shapes:
        errors = measure()
        good &= sound(errors, dtype)
        print(name, *(f"{k} {e['largest']:.1e}/{e['norm']:.1e}" for k, e in errors.items()),
              "" if sound(errors, dtype) else "  TOO LARGE", flush=True)
        result.add(**{name: errors})
    return good


# ---- the whole machine -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def elsewhere() -> Iterator[Path]:
    """An empty working directory, for what the main command leaves in runs/."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def rows_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def lottery() -> Iterator[None]:
    """Random weights never earn a reward, so that no gradient would flow: here a hash of what was written decides."""
    import memtrain

    boxed, match = memtrain.Agent.boxed, memtrain.exact_match
    memtrain.Agent.boxed = lambda self, turn: repr(turn.sampled)
    memtrain.exact_match = lambda text, answers: float(zlib.crc32(text.encode()) % 2)
    try:
        yield
    finally:
        memtrain.Agent.boxed, memtrain.exact_match = boxed, match


def policy(c, device: torch.device, dtype: torch.dtype = torch.float32):
    """(model, tokenizer): the shipped base with its weights in `dtype`, and with adapters that are not zero."""
    import memtrain

    tokenizer = memtrain.load_tokenizer()
    model = memtrain.Decoder(c, tokenizer.size)
    memtrain.load_checkpoint(memtrain.SHIPPED_BASE, model, tokenizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" not in name:
                p.data = p.data.to(dtype)
            elif ".lora_b" in name:  # as after some training
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(p.shape[0]))
    return model.to(device), tokenizer


def same_readings(c, data, models: dict[str, tuple]) -> dict:
    """Readings of the same documents at a fixed seed by several samplers, the first of them the measure: share of equal
    tokens, and the largest difference of the log-probs of turns that are equal as a whole."""
    import memtrain

    problems, turns = [data.masked_problem(i) for i in range(4) for _ in range(6)], {}
    keys = [("parity", i) for i in range(len(problems))]
    for name, (model, tokenizer, chunk) in models.items():
        agent = memtrain.Agent(model, tokenizer, c, memtrain.Sampler(model, chunk))
        turns[name] = [t for r in agent.read(problems, keys) for t in r.turns]
    first, *others = turns
    found = {}
    for name in others:
        pairs = [(a, b) for a, b in zip(turns[first], turns[name], strict=True)]
        same = [x == y for a, b in pairs for x, y in zip(a.sampled, b.sampled, strict=False)]
        gaps = [abs(x - y) for a, b in pairs if (a.given, a.sampled) == (b.given, b.sampled)
                for x, y in zip(a.logprobs, b.logprobs, strict=True)]
        found[f"{name} / {first}"] = {"tokens": sum(same) / len(same), "logprob": max(gaps, default=math.nan)}
    return found


def mismatch(c, data, model, tokenizer) -> dict:
    """|log pi scored - log pi sampled| over the tokens of one MemTrain step's samples."""
    import memtrain

    batch = memtrain.collect(memtrain.Agent(model, tokenizer, c), data, "memtrain", 0)
    gaps = []
    with torch.no_grad():
        for micro in memtrain.micro_batches(batch.turns, c.micro_tokens):
            packed = memtrain.pack([(batch.turns[g[0]].prefix, [(batch.turns[i].given, batch.turns[i].sampled)
                                                                for i in g]) for g in micro], model.embed.device)
            sampled = torch.tensor([x for g in micro for i in g for x in batch.turns[i].logprobs])
            gaps.append((memtrain.score(model, packed, c.temperature)[0].cpu() - sampled).abs())
    gap = torch.cat(gaps)
    return {"tokens": len(gap), "mean": float(gap.mean()), "max": float(gap.max()),
            "outside": float((gap > math.log(1.25)).float().mean())}


def gradients(c, batch, model) -> dict[str, torch.Tensor]:
    """The gradient of one update, on the CPU in fp64."""
    import memtrain

    capture = Capture(model)
    row = memtrain.update(model, memtrain.reference_of(model, c), capture, replace(c, grad_clip=1e30), batch,
                          set(batch.entry))
    assert not row["skipped"], "loss or gradient is not finite"
    return {n: g.double().cpu() for n, g in capture.gradient.items()}


def parity(device: torch.device, result: Result, options) -> bool:
    import memtrain

    fields = ["--stages", "memtrain", "--documents", "4", "--update-documents", "4", "--kl", "0.001"]
    c = memtrain.parse(fields)
    cpu, tokenizer = policy(c, torch.device("cpu"))
    there, _ = policy(c, device)
    data = memtrain.Data(c, tokenizer)
    greedy = replace(c, top_p=1e-9)
    models = {"cpu": (cpu, tokenizer, 0), "eager": (there, tokenizer, 1), "graphs": (there, tokenizer, 16)}
    result.add(greedy_fp32=same_readings(greedy, data, models), sampled_fp32=same_readings(c, data, models))
    result.add(mismatch_fp32=mismatch(c, data, there, tokenizer))
    adapters = memtrain.parse([*fields, "--lora-rank", "8"])  # with bf16 weights, as real ones are trained
    half, _ = policy(adapters, device, torch.bfloat16)
    twin = {"eager": (half, tokenizer, 1), "graphs": (half, tokenizer, 16)}
    result.add(greedy_bf16=same_readings(replace(adapters, top_p=1e-9), data, twin))
    result.add(mismatch_bf16=mismatch(adapters, data, half, tokenizer))
    half.c = replace(adapters, lora_merge=False)
    result.add(mismatch_bf16_unmerged=mismatch(half.c, data, half, tokenizer))
    with lottery():
        batch = memtrain.collect(memtrain.Agent(cpu, tokenizer, c), data, "memtrain", 0)
    exact, _ = policy(c, torch.device("cpu"), torch.float64)
    true, mine = gradients(c, batch, exact), gradients(c, batch, there)
    worst = {n: float((mine[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in true.items()}
    result.add(gradient={"parameters": len(worst), "worst": max(worst, key=worst.get), "error": max(worst.values())})
    for name, figures in result.figures.items():
        print(name, figures, flush=True)
    f = result.figures
    return (f["gradient"]["error"] <= 1e-3 and f["mismatch_fp32"]["max"] <= 1e-4
            and all(x["tokens"] >= 0.999 and x["logprob"] <= 1e-4 for x in f["greedy_fp32"].values())
            and f["mismatch_bf16"]["outside"] <= 0.01)


def stages_of(run: Path, began: float) -> Figures:
    """What metrics.jsonl says of a run."""
    rows = rows_of(run)
    found: Figures = {"seconds": time.perf_counter() - began, "stages": {}}
    for stage in dict.fromkeys(r["stage"] for r in rows):
        of = [r for r in rows if r["stage"] == stage]
        names = ("reward", "reward_em", "recall", "signal", "loss", "mismatch", "mismatch_max", "seconds",
                 "seconds_sampling", "tokens_sampled", "tokens_trained", "tokens")
        found["stages"][stage] = {"steps": len(of)} | {
            n: [round(r[n], 5) for r in of] for n in names if all(isinstance(r.get(n), (int, float)) for r in of)}
    return found


def stop_after(seconds: float) -> None:
    """Asks this process to stop, as Ctrl-C would, after so many seconds; 0: never."""
    if seconds:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.alarm(max(5, int(seconds)))


def main_command(device: torch.device, result: Result, options, *argv: str) -> bool:
    """python memtrain.py with these options, in an empty folder; its figures are read even where it is stopped."""
    import memtrain

    with elsewhere() as folder:
        began, name = time.perf_counter(), "battery"
        watching = threading.Event()

        def note():
            while not watching.wait(5):
                with contextlib.suppress(OSError, ValueError):
                    result.add(**stages_of(folder / "runs" / name, began))

        threading.Thread(target=note, daemon=True).start()
        stop_after(0.9 * options.seconds)  # in time to say what there is
        code = memtrain.main(["--run", name, "--device", device.type, *argv])
        watching.set()
        signal.alarm(0)
        run = folder / "runs" / name
        result.add(**stages_of(run, began), command=" ".join(["python memtrain.py", *argv]), exit=code,
                   peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None)
        results = run / "results.json"
        if results.exists():
            result.add(results=json.loads(results.read_text()))
        if options.out and (run / "report.md").exists():
            with replacing(options.out / "report.md") as temporary:
                temporary.write_bytes((run / "report.md").read_bytes())
        return code == 0


SHORT = ("--people", "60", "--passages", "12", "--related", "3", "--documents", "2", "--update-documents", "2",
         "--group", "3", "--recall-group", "2", "--threads", "1")


def nano(device: torch.device, result: Result, options) -> bool:
    small = () if device.type == "cuda" else SHORT
    steps = "20" if device.type == "cuda" else "2"
    return main_command(device, result, options, "--preset", "nano", "--stages", "memtrain", "--memtrain-steps", steps,
                        *small)


def small(device: torch.device, result: Result, options) -> bool:
    steps = ("50", "10") if device.type == "cuda" else ("1", "1")
    tiny = () if device.type == "cuda" else ("--width", "32", "--hidden", "64", "--layers", "1", "--head-size", "8",
                                             "--base-documents", "1")
    return main_command(device, result, options, "--preset", "small", "--stages", "base", "--base-steps", steps[0],
                        "--base-copy-steps", steps[1], *tiny)


def run(device: torch.device, result: Result, options) -> bool:
    small = () if device.type == "cuda" else (*SHORT, "--memtrain-steps", "1", "--memagent-steps", "1", "--mem1-steps",
                                              "1", "--eval-lengths", "1", "--eval-questions", "2", "--eval-masked",
                                              "2", "--eval-pairs", "2")
    return main_command(device, result, options, *small)


PART = 15 << 20  # bytes of a file that is brought back: machines that are lent by the minute limit them


def train(device: torch.device, result: Result, options) -> bool:
    """Preset small, its base and MemTrain, as far as the time goes. The run stays in DIR/train, where the next battery
    goes on; the weights of its last stage come as DIR/small.safetensors.N, bfloat16, to be joined by cat."""
    from safetensors.torch import load_file, save

    import memtrain

    tiny = () if device.type == "cuda" else ("--people", "60", "--width", "32", "--hidden", "64", "--layers", "1",
                                             "--head-size", "8", "--base-documents", "1", "--passages", "60",
                                             "--threads", "1")
    home = options.out / "train"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    began = time.perf_counter()
    stop_after(0.85 * options.seconds)
    code = memtrain.main(["--preset", "small", "--run", "small", "--stages", "base,memtrain", "--device", device.type,
                          "--save-every", "100", *tiny])
    signal.alarm(0)
    run = home / "runs" / "small"
    result.add(**stages_of(run, began), exit=code)
    stage = next((s for s in ("memtrain", "base") if (run / s / "checkpoint.safetensors").exists()), None)
    if stage:
        tensors = load_file(run / stage / "checkpoint.safetensors")
        whole = save({k: v.bfloat16().contiguous() for k, v in tensors.items() if k.startswith("model.")},
                     {"state": (run / stage / "checkpoint.json").read_text()})
        parts = [whole[i:i + PART] for i in range(0, len(whole), PART)]
        for i, part in enumerate(parts):
            with replacing(options.out / f"small.safetensors.{i}") as temporary:
                temporary.write_bytes(part)
        result.add(stage=stage, parts=len(parts), bytes=len(whole))
    return code in (0, 130) and stage is not None  # 130: stopped for time, and saved


def step(device: torch.device, result: Result, options) -> bool:
    """One GRPO step of MemTrain with Qwen3-0.6B's shape, random weights, its vocabulary and the paper's section."""
    import memtrain
    from eval import plan

    shape = ["--width", "1024", "--layers", "28", "--heads", "16", "--key-heads", "8", "--head-size", "128", "--hidden",
             "3072", "--rope-theta", "1e6", "--tied", "true", "--vocab", "151936", "--embed-norm", "false",
             "--window", "5632", "--section", "5120", "--people", "2000", "--passages", "400", "--micro-tokens",
             "32768", "--sample-rows", "256", "--cache-gb", "16"]
    if device.type == "cpu":
        shape = ["--people", "60"]
    c = memtrain.parse(["--stages", "memtrain", "--lora-rank", "32", "--lora-alpha", "64", "--dtype", "bfloat16",
                        "--recompute", "true", "--kl", "0.001", "--memory", "127", "--response", "128",
                        "--related", "29", "--masked-sections", "4", "--documents", "2", "--update-documents", "2",
                        *(shape if device.type == "cuda" else [*shape, "--window", "480"])])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = memtrain.load_tokenizer()
    with torch.device("meta"):
        model = memtrain.Decoder(c, tokenizer.size)
    for name, p in list(model.named_parameters()):
        module, leaf = (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        kind = torch.float32 if ".lora_" in name else dtype
        value = torch.ones(p.shape, device=device, dtype=kind) if p.ndim == 1 else (
            torch.randn(p.shape, device=device) * 0.7 * p.shape[1] ** -0.5).to(kind)
        setattr(module, leaf, torch.nn.Parameter(value, requires_grad=".lora_" in name))
    model.to(device)
    model.reset_adapters()
    data = memtrain.Data(c, tokenizer)
    agent = memtrain.Agent(model, tokenizer, c)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=c.lr)
    reference, rows = memtrain.reference_of(model, c), []
    result.add(config={k: v for k, v in asdict(c).items() if v != getattr(memtrain.Config(), k)},
               parameters=sum(p.numel() for p in model.parameters()))
    if device.type == "cuda":
        result.add(planned_gb=plan.peak(c, len(model.embed))[1] / 1e9)
    with lottery():
        for i in range(2):  # the first also compiles and captures
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronise(device)
            began, prompts = time.perf_counter(), agent.sampler.prompt_tokens
            batch = memtrain.collect(agent, data, "memtrain", i)
            synchronise(device)
            sampled, peak = time.perf_counter(), {}
            if device.type == "cuda":
                peak = {"peak_sampling_gb": torch.cuda.max_memory_allocated() / 1e9}
                torch.cuda.reset_peak_memory_stats()
            kept = {e for e, g in enumerate(batch.group) if g in memtrain.with_signal(batch)}
            row = memtrain.update(model, reference, optimizer, c, batch, kept)
            synchronise(device)
            ended = time.perf_counter()
            if device.type == "cuda":
                peak |= {"peak_training_gb": torch.cuda.max_memory_allocated() / 1e9}
            rows.append({"seconds": ended - began, "seconds_sampling": sampled - began,
                         "tokens_prompts": agent.sampler.prompt_tokens - prompts,
                         "tokens_sampled": batch.stats["tokens_sampled"],
                         "tokens_trained_per_s": row["tokens_trained"] / (ended - sampled)} | peak | row)
            print(rows[-1], flush=True)
            result.add(steps=rows)
    return not any(r["skipped"] for r in rows)


# ---- tiles: which sizes are fastest on this card -------------------------------------------------------------------

ATTENTION = {"FORWARD": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3),
                         (128, 32, 4, 3)],
             "BACKWARD_QUERIES": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (64, 128, 8, 2)],
             "BACKWARD_KEYS": [(64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 128, 4, 2),
                               (64, 64, 4, 2)]}
LOGPROB = [(128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 3),
           (128, 128, 64, 8, 4), (256, 128, 64, 8, 3)]


def attention_launches(device: torch.device, H: int, K: int, D: int) -> dict[str, Callable]:
    """Each pass of memory attention by itself, at the paper's section, as a function of its tiles."""
    layout = Layout([5320] * 2, [1200] * 16, torch.arange(2).repeat_interleave(8), device)
    q, k, v, do = (random(device, torch.bfloat16, layout.total, n, D) for n in (H, K, K, H))
    own, ranges = layout.own_start, layout.group_range
    out, lse = attention._launch_forward(q, k, v, *layout.tiles(attention._tiles(attention.FORWARD, q).BM), own,
                                         *ranges)
    _, delta = attention._launch_queries(
        q, k, v, out, do, lse, *layout.tiles(attention._tiles(attention.BACKWARD_QUERIES, q).BM), own, *ranges)
    return {"FORWARD": lambda t: attention._launch_forward(q, k, v, *layout.tiles(t.BM), own, *ranges),
            "BACKWARD_QUERIES": lambda t: attention._launch_queries(q, k, v, out, do, lse, *layout.tiles(t.BM), own,
                                                                    *ranges),
            "BACKWARD_KEYS": lambda t: attention._launch_keys(q, k, v, do, lse, delta, *layout.tiles(t.BN, True), own,
                                                              layout.own_end, *ranges[1:])}


def tiles(device: torch.device, result: Result, options) -> bool:
    for D, H, K in ((128, 16, 8), (64, 8, 4)):
        for name, launch in attention_launches(device, H, K, D).items():
            table = getattr(attention, name)
            kept, rows = dict(table), []
            for sizes in ATTENTION[name]:
                t = attention.Tiles(*sizes)
                table.update(dict.fromkeys(table, (t,)))
                rows.append({"tiles": sizes} | attempt(partial(launch, t), device))
            table.update(kept)
            say(result, f"attention {name} bfloat16 D {D}", rows)
    hidden, weight = random(device, torch.bfloat16, 4096, 1024), random(device, torch.bfloat16, 151_936, 1024) * 0.03
    target, kept = torch.randint(len(weight), (4096,), device=device), logprob.TILES
    _, entropy, lse = logprob._launch_forward(hidden, weight, target, 1.0)
    ones = torch.ones_like(lse)
    work = {"forward": lambda: logprob._launch_forward(hidden, weight, target, 1.0),
            "backward": lambda: logprob._launch_backward(hidden, weight, target, lse, entropy, ones, ones, 1.0, True,
                                                         False)}
    for name, call in work.items():
        rows = []
        for sizes in LOGPROB:
            logprob.TILES = (logprob.Tiles(*sizes),)
            rows.append({"tiles": sizes} | attempt(call, device))
        logprob.TILES = kept
        say(result, f"log-prob {name} bfloat16 C 1024", rows)
    return True


def attempt(work: Callable, device: torch.device) -> Figures:
    try:
        return {"ms": 1e3 * timed(work, device, 3)}
    except Exception as e:  # tiles that do not fit are what is looked for
        return {"error": f"{type(e).__name__}: {e}"[:120]}


def say(result: Result, name: str, rows: list[Figures]) -> None:
    result.add(**{name: rows})
    print(name, *(f"{r['tiles']} {r['ms']:.3f} ms" if "ms" in r else f"{r['tiles']} {r['error']}" for r in rows),
          sep="\n  ", flush=True)


STEPS = {f.__name__: f for f in (probe, kernels, parity, nano, small, run, step, tiles, train)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.bench.gpu_steps",
                                     description="One step of python -m eval.gpu.")
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--result", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=0.0, help="after which the step is stopped")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available here; give --device cpu")
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    return 0 if STEPS[options.name](device, Result(options.result), options) else 1


if __name__ == "__main__":
    sys.exit(main())
