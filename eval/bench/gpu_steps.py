"""The steps of `python -m eval.gpu`, each of which runs in a process of its own:

    python -m eval.bench gpu-NAME --device cuda|cpu --out FILE --to DIR [--seconds N]

A step writes its figures to FILE as JSON as soon as it has them and ends with 1 where they are not as they must be.
--to is where files go besides, --seconds when the step is stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch

import memtrain
from data.run.files import replacing
from eval import plan
from eval.bench.kernels import Case, attention_case, errors, logprob_case, real_shapes
from eval.bench.measure import Capture, Figures, ceilings, seconds
from kernels import attention, logprob

# Largest error, in units of the true value's largest one. fp32 products are three of TF32.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def probe(options, fields, figures: Figures) -> bool:
    """Card, versions, free memory, and the measured ceilings: matrix products and a copy."""
    device = options.device
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = "none"
    figures.add(torch=torch.__version__, triton=version, python=platform.python_version(), cuda=torch.version.cuda,
                cores=os.cpu_count())
    if device.type == "cuda":
        card, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
        figures.add(card=card.name, capability=f"{card.major}.{card.minor}", memory_gb=total / 1e9, free_gb=free / 1e9,
                    multiprocessors=card.multi_processor_count, l2_mb=card.L2_cache_size / 2**20,
                    shared_kb=card.shared_memory_per_block_optin / 1024)
    for name, dtype, precision in (("bf16", torch.bfloat16, "highest"), ("tf32", torch.float32, "high"),
                                   ("fp64", torch.float64, "highest"), ("fp32", torch.float32, "highest")):
        torch.set_float32_matmul_precision(precision)
        product, copy = ceilings(device, dtype)
        figures.add(**{f"{name}_tflops": product / 1e12}, copy_gb_s=copy / 1e9)
    return True


def kernels(options, fields, figures: Figures) -> bool:
    """Every kernel against fp64 at the shapes of real models, forward and backward."""
    good = True
    for name, dtype, case in real_shapes(options.device):
        found = errors(case.run("memtrain"), case.run("memtrain", torch.float64))
        sound = all(e <= TOLERANCE[dtype] for e in found.values())  # NaN never passes
        good &= sound
        print(name, *(f"{k} {e:.1e}" for k, e in found.items()), "" if sound else "  TOO LARGE", flush=True)
        figures.add(**{name: found})
    return good


# ---- parity: sampler, scorer, gradient -------------------------------------------------------------------------------


@contextlib.contextmanager
def lottery() -> Iterator[None]:
    """Random weights never earn a reward, so that no gradient would flow: here a hash of what was written decides."""
    boxed, match = memtrain.Agent.boxed, memtrain.exact_match
    memtrain.Agent.boxed = lambda self, turn: repr(turn.sampled)
    memtrain.exact_match = lambda text, answers: float(zlib.crc32(text.encode()) % 2)
    try:
        yield
    finally:
        memtrain.Agent.boxed, memtrain.exact_match = boxed, match


def policy(c, tokenizer, device: torch.device, dtype: torch.dtype = torch.float32) -> memtrain.Decoder:
    """The shipped base with its weights in `dtype`, and with adapters that are not zero."""
    model = memtrain.Decoder(c, tokenizer.size)
    memtrain.load_checkpoint(memtrain.SHIPPED_BASE, model, tokenizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" not in name:
                p.data = p.data.to(dtype)
            elif ".lora_b" in name:  # as after some training
                p.normal_(0, 0.02, generator=torch.Generator().manual_seed(p.shape[0]))
    return model.to(device)


def same_readings(c, data, samplers: dict[str, tuple]) -> dict:
    """Readings of the same documents at a fixed seed by several samplers, {name: (model, steps a graph)}, the first of
    them the measure: share of equal tokens, and the largest difference of the log-probs of turns that are equal."""
    problems, turns = [data.masked_problem(i) for i in range(4) for _ in range(6)], {}
    keys = [("parity", i) for i in range(len(problems))]
    for name, (model, chunk) in samplers.items():
        agent = memtrain.Agent(model, data.tokenizer, c, memtrain.Sampler(model, chunk))
        turns[name] = [t for r in agent.read(problems, keys) for t in r.turns]
    first, *others = turns
    found = {}
    for name in others:
        pairs = list(zip(turns[first], turns[name], strict=True))
        same = [x == y for a, b in pairs for x, y in zip(a.sampled, b.sampled, strict=False)]
        gaps = [abs(x - y) for a, b in pairs if (a.given, a.sampled) == (b.given, b.sampled)
                for x, y in zip(a.logprobs, b.logprobs, strict=True)]
        found[f"{name} / {first}"] = {"tokens": sum(same) / len(same), "logprob": max(gaps, default=math.nan)}
    return found


@torch.no_grad()
def mismatch(c, data, model) -> dict[str, float]:
    """|log pi scored - log pi sampled| over the tokens of one MemTrain step's samples."""
    batch = memtrain.collect(memtrain.Agent(model, data.tokenizer, c), data, "memtrain", 0)
    found = [memtrain.micro_loss(model, None, replace(c, kl=0.0), batch, batch.entry, micro, batch.turns, 1)
             for micro in memtrain.micro_batches(batch.turns, c.micro_tokens)]
    total = dict(zip(memtrain.SUMS, sum(sums for _, sums, _, _ in found).tolist(), strict=True))
    return {"mean": total["mismatch"] / total["tokens"], "max": max(float(most) for _, _, most, _ in found),
            "outside": total["outside"] / total["tokens"]}


def gradient(c, batch, model) -> dict[str, torch.Tensor]:
    """Of one update on all of a batch, on the CPU in fp64. Empty where it is not finite."""
    capture = Capture(model)
    memtrain.update(model, memtrain.reference_of(model, c), capture, replace(c, grad_clip=1e30), batch,
                    set(batch.entry))
    return {n: g.double().cpu() for n, g in capture.gradient.items()}


def parity(options, fields, figures: Figures) -> bool:
    """Sampler with graphs = eager = CPU; sampled = scored; a GRPO gradient against fp64."""
    device = options.device
    fields = ["--stages", "memtrain", "--documents", "4", "--update-documents", "4", "--kl", "0.001"]
    c, tokenizer, cpu = memtrain.parse(fields), memtrain.load_tokenizer(), torch.device("cpu")
    data, here, there = memtrain.Data(c, tokenizer), policy(c, tokenizer, cpu), policy(c, tokenizer, device)
    samplers = {"cpu": (here, 0), "eager": (there, 1), "graphs": (there, 16)}
    figures.add(greedy_fp32=same_readings(replace(c, top_p=1e-9), data, samplers),
                sampled_fp32=same_readings(c, data, samplers), mismatch_fp32=mismatch(c, data, there))
    adapters = memtrain.parse([*fields, "--lora-rank", "8"])  # with bf16 weights, as real ones are trained
    half = policy(adapters, tokenizer, device, torch.bfloat16)
    samplers = {"eager": (half, 1), "graphs": (half, 16)}
    figures.add(greedy_bf16=same_readings(replace(adapters, top_p=1e-9), data, samplers),
                mismatch_bf16=mismatch(adapters, data, half))
    half.c = replace(adapters, lora_merge=False)
    figures.add(mismatch_bf16_unmerged=mismatch(half.c, data, half))
    with lottery():
        batch = memtrain.collect(memtrain.Agent(here, tokenizer, c), data, "memtrain", 0)
    mine, true = (gradient(c, batch, model) for model in (there, policy(c, tokenizer, cpu, torch.float64)))
    off = {n: float((mine[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in true.items()}
    figures.add(gradient={"parameters": len(off), "worst": max(off, key=off.get), "error": max(off.values())})
    print(*(f"{name} {found}" for name, found in figures.items()), sep="\n")
    return (any(g.any() for g in true.values()) and figures["gradient"]["error"] <= 1e-3
            and figures["mismatch_fp32"]["max"] <= 1e-4
            and all(x["tokens"] >= 0.999 and x["logprob"] <= 1e-4 for x in figures["greedy_fp32"].values())
            and figures["mismatch_bf16"]["outside"] <= 0.01)


# ---- whole runs ------------------------------------------------------------------------------------------------------


def stop_after(seconds: float) -> None:
    """Asks this process to stop, as Ctrl-C would, after so many seconds; 0: never."""
    if seconds:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.alarm(max(5, int(seconds)))


METRICS = ("reward", "reward_em", "recall", "signal", "loss", "mismatch", "mismatch_max", "seconds",
           "seconds_sampling", "tokens_sampled", "tokens_trained", "tokens")


def main_command(name: str, home: Path, options, figures: Figures) -> tuple[int, Path]:
    """python memtrain.py as RUNS has it, in the folder `home`: (exit code, folder of the run)."""
    began, run, device = time.perf_counter(), home / "runs" / "battery", options.device
    everywhere, card, cpu = RUNS[name]
    argv = [*everywhere, *(card if device.type == "cuda" else cpu)]
    stop_after(0.85 * options.seconds)  # in time to say what there is
    with contextlib.chdir(home):
        code = memtrain.main(["--run", run.name, "--device", device.type, *argv])
    signal.alarm(0)
    log, stages = run / "metrics.jsonl", {}
    for row in map(json.loads, log.read_text().splitlines() if log.exists() else ()):
        stage = stages.setdefault(row["stage"], {"steps": 0})
        stage["steps"] += 1
        for name in METRICS:
            if isinstance(row.get(name), (int, float)):
                stage.setdefault(name, []).append(round(row[name], 5))
    figures.add(command=" ".join(["python memtrain.py", *argv]), exit=code, seconds=time.perf_counter() - began,
                stages=stages, peak_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None)
    return code, run


SHORT = ("--people", "60", "--passages", "12", "--related", "3", "--documents", "2", "--update-documents", "2",
         "--group", "3", "--recall-group", "2", "--threads", "1", "--memagent-steps", "1", "--mem1-steps", "1",
         "--eval-lengths", "1", "--eval-questions", "2", "--eval-masked", "2", "--eval-pairs", "2")
THIN = ("--width", "32", "--hidden", "64", "--layers", "1", "--head-size", "8", "--base-documents", "1")
RUNS = {  # name: options everywhere, on a card, on a CPU
    "nano": (("--preset", "nano", "--stages", "memtrain"), ("--memtrain-steps", "20"),
             (*SHORT, "--memtrain-steps", "2")),
    "small": (("--preset", "small", "--stages", "base"), ("--base-steps", "50", "--base-copy-steps", "10"),
              (*THIN, "--base-steps", "1", "--base-copy-steps", "1")),
    "run": ((), (), (*SHORT, "--memtrain-steps", "1")),
    "train": (("--preset", "small", "--stages", "base,memtrain", "--save-every", "100"), (),
              (*THIN, "--people", "60", "--passages", "60", "--threads", "1"))}


def whole_run(name: str, options, fields, figures: Figures) -> bool:
    """python memtrain.py in an empty folder: its results, and its report as DIR/report.md."""
    with tempfile.TemporaryDirectory() as home:
        code, run = main_command(name, Path(home), options, figures)
        if (run / "results.json").exists():
            figures.add(results=json.loads((run / "results.json").read_text()))
        if (run / "report.md").exists():
            with replacing(options.to / "report.md") as temporary:
                temporary.write_bytes((run / "report.md").read_bytes())
    return code == 0


PART = 15 << 20  # bytes of a file that is brought back: machines that are lent by the minute limit them


def train(options, fields, figures: Figures) -> bool:
    """Preset small, its base and MemTrain, as far as the time goes. The run stays in DIR/train, where the next battery
    goes on; the weights of its last stage come as DIR/small.safetensors.N, bfloat16, to be joined by cat."""
    from safetensors.torch import load_file, save

    home = options.to / "train"
    home.mkdir(parents=True, exist_ok=True)
    code, run = main_command("train", home, options, figures)
    stage = next((s for s in ("memtrain", "base") if (run / s / "checkpoint.safetensors").exists()), None)
    if stage is None:
        return False
    tensors = load_file(run / stage / "checkpoint.safetensors")
    whole = save({k: v.bfloat16().contiguous() for k, v in tensors.items() if k.startswith("model.")},
                 {"state": (run / stage / "checkpoint.json").read_text()})
    parts = [whole[i:i + PART] for i in range(0, len(whole), PART)]
    for i, part in enumerate(parts):
        with replacing(options.to / f"small.safetensors.{i}") as temporary:
            temporary.write_bytes(part)
    figures.add(stage=stage, parts=len(parts), bytes=len(whole))
    return code in (0, 130)  # 130: stopped for time, and saved


# ---- step: a GRPO step of MemTrain with the shape of Qwen3-0.6B ------------------------------------------------------

SHAPE = ("--width", "1024", "--layers", "28", "--heads", "16", "--key-heads", "8", "--head-size", "128", "--hidden",
         "3072", "--rope-theta", "1e6", "--tied", "true", "--vocab", "151936", "--embed-norm", "false", "--window",
         "5632", "--section", "5120", "--people", "2000", "--passages", "400", "--micro-tokens", "32768",
         "--sample-rows", "256", "--cache-gb", "16")


def step(options, fields, figures: Figures) -> bool:
    """A GRPO step of Qwen3-0.6B's shape with LoRA: random weights, its vocabulary and the paper's section; tokens/s,
    peak memory beside the plan's. The first of two steps compiles and captures."""
    device, card = options.device, options.device.type == "cuda"
    c = memtrain.parse(["--stages", "memtrain", "--lora-rank", "32", "--lora-alpha", "64", "--dtype", "bfloat16",
                        "--recompute", "true", "--kl", "0.001", "--memory", "127", "--response", "128", "--related",
                        "29", "--masked-sections", "4", "--documents", "2", "--update-documents", "2",
                        *(SHAPE if card else ("--people", "60", "--window", "480"))])
    tokenizer = memtrain.load_tokenizer()
    with torch.device("meta"):
        model = memtrain.Decoder(c, tokenizer.size)
    weights = {}
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, device=device) * 0.7 * p.shape[-1] ** -0.5 if p.ndim > 1 else torch.ones(
            p.shape, device=device)
        weights[name] = value.to(torch.bfloat16 if card and ".lora_" not in name else torch.float32)
    model.load_state_dict(weights, assign=True)
    model.to(device).reset_adapters()
    run = SimpleNamespace(c=c, model=model, device=device, data=memtrain.Data(c, tokenizer),
                          agent=memtrain.Agent(model, tokenizer, c))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=c.lr)
    reference, rows = memtrain.reference_of(model, c), []
    figures.add(config={k: v for k, v in asdict(c).items() if v != getattr(memtrain.Config(), k)},
                parameters=sum(p.numel() for p in model.parameters()),
                planned_gb=plan.peak(c, len(model.embed))[1] / 1e9)
    with lottery():
        for i in range(2):
            if card:
                torch.cuda.reset_peak_memory_stats()
            rows.append(memtrain.train_step(run, "memtrain", i, reference, optimizer))
            if card:
                rows[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            print(rows[-1], flush=True)
            figures.add(steps=rows)
    return not any(r["skipped"] for r in rows)


# ---- tiles: which sizes are fastest on this card -------------------------------------------------------------------

ATTENTION = {"FORWARD": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3),
                         (128, 32, 4, 3)],
             "BACKWARD_QUERIES": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (64, 128, 8, 2)],
             "BACKWARD_KEYS": [(64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 128, 4, 2),
                               (64, 64, 4, 2)]}
LOGPROB = [(128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 3),
           (128, 128, 64, 8, 4), (256, 128, 64, 8, 3)]


def tiles(options, fields, figures: Figures) -> bool:
    """Other tile sizes of the kernels: forward and backward together, with one kernel's tiles changed."""
    device, bf16 = options.device, torch.bfloat16
    for D, H, K in ((128, 16, 8), (64, 8, 4)):
        case = attention_case(device, bf16, 2, 5320, 8, (1200, 1200), H, K, D)
        for name, sizes in ATTENTION.items():
            kept = dict(table := getattr(attention, name))
            sweep(figures, f"attention {name} D {D}", case, sizes,
                  lambda s, table=table: table.update(dict.fromkeys(table, (attention.Tiles(*s),))))
            table.update(kept)
    kept = logprob.TILES
    sweep(figures, "log-prob C 1024", logprob_case(device, bf16, 4096, 1024, 151_936), LOGPROB,
          lambda s: setattr(logprob, "TILES", (logprob.Tiles(*s),)))
    logprob.TILES = kept
    return True


def sweep(figures: Figures, name: str, case: Case, sizes: list[tuple], choose: Callable) -> None:
    device, rows = next(iter(case.leaves.values())).device, []
    for one in sizes:
        choose(one)
        try:
            case.run("memtrain")
            spent = min(seconds(lambda: case.run("memtrain"), device) for _ in range(5))
            rows.append({"tiles": one, "ms": 1e3 * spent})
        except Exception as e:  # tiles that do not fit are what is looked for
            rows.append({"tiles": one, "error": f"{type(e).__name__}: {e}"[:120]})
    figures.add(**{name: rows})
    print(name, *rows, sep="\n  ", flush=True)


STEPS = {f.__name__: f for f in (probe, kernels, parity, step, tiles, train)} | {
    name: lambda *rest, name=name: whole_run(name, *rest) for name in ("nano", "small", "run")}
