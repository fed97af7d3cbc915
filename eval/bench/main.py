"""Benchmarks: `python -m eval.bench NAME [options]`, and without a name what there is.

Each prints a table and, with --out FILE, writes the same figures as JSON. It measures memtrain.py from outside, so it
imports it; nothing imports this file. A whole run is measured by `/usr/bin/time -v python memtrain.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import memtrain
from data import InputError
from data.config import STUDY, as_evaluated, dashes
from data.run.files import output, replacing, write_json, writing
from data.run.terminal import StrictParser, columns, one_line
from data.world.miniwiki import MiniWorld
from eval.bench import plain
from eval.bench.measure import Capture, extra_mb, forget_peak, peak_mb, seconds
from eval.longqa import long_qa_row
from eval.stage import environment

TOLERANCE = 1e-5  # of loss and gradients, in fp64


# ---- step: one GRPO step, twice ------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What one phase took: wall seconds, tokens through the model (padding included), peak memory of the process."""

    seconds: float
    tokens: int
    peak_mb: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.tokens + other.tokens, max(self.peak_mb, other.peak_mb))


class Meter:
    """Measures phases; counts every token that goes through one of the models."""

    def __init__(self, models: Sequence[torch.nn.Module], bar: tqdm):
        self.tokens, self.bar, self.device = 0, bar, next(models[0].parameters()).device
        for model in models:
            model.register_forward_pre_hook(self._count)

    def _count(self, model, args) -> None:
        self.tokens += len(args[0])

    def __call__(self, name: str, work: Callable):
        """Runs work(); returns its value and its Cost."""
        self.bar.set_postfix_str(name)
        self.tokens, value = 0, []
        forget_peak(self.device)
        spent = seconds(lambda: value.append(work()), self.device)
        self.bar.update()
        return value[0], Cost(spent, self.tokens, peak_mb(self.device))


class Pair:
    """Both implementations of the step on one model, one reference, one configuration."""

    def __init__(self, c: memtrain.Config, model: memtrain.Decoder, tokenizer, data,
                 train_rows: int = plain.TRAIN_ROWS, sample_rows: int = plain.SAMPLE_ROWS):
        # update() clips before it hands the gradient over: here it must arrive as it was computed
        self.c, self.model, self.data, self.train_rows = replace(c, grad_clip=1e30), model, data, train_rows
        self.agent = memtrain.Agent(model, tokenizer, c)
        self.plain_agent = plain.PlainAgent(model, tokenizer, c, sample_rows)
        self.reference = copy.deepcopy(model).requires_grad_(False)
        for module in self.reference.modules():
            if isinstance(module, memtrain.Linear):
                module.adapted = False
        self.capture = Capture(model)

    def sample(self, agent, step: int) -> memtrain.Batch:
        return memtrain.collect(agent, self.data, "memtrain", step)

    def ours(self, batch: memtrain.Batch, entries: set[int]) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, gradient) by memtrain.update."""
        reference = None if self.c.lora_rank else self.reference  # with LoRA: the network with its adapters off
        stats = memtrain.update(self.model, reference, self.capture, self.c, batch, entries)
        if stats["skipped"]:
            raise InputError("loss or gradient is not finite here: nothing to compare; give another --init")
        return stats["loss"], self.capture.gradient

    def plain(self, batch: memtrain.Batch, entries: set[int]) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, gradient) by the plain implementation."""
        loss = plain.train(self.model, self.reference, self.c, batch, entries, self.train_rows)
        self.capture.step()
        self.capture.zero_grad()
        return loss, self.capture.gradient

    def exact(self) -> None:
        """Goes on in fp64, where two ways to write the same equations agree to far more than what fp32 rounds."""
        self.model.double()
        self.reference.double()

    @torch.no_grad()
    def shift(self) -> None:
        """Moves the policy off the one that sampled: ratios leave 1 and the clip range, the KL term leaves 0."""
        generator = torch.Generator().manual_seed(0)
        for p in self.capture.parameters.values():
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p += 0.05 * noise * p.std(correction=0).clamp(min=0.02)


def kept_entries(batch: memtrain.Batch) -> set[int]:
    """Reward entries of the groups that pass the filter."""
    signal = memtrain.with_signal(batch)
    return {e for e, g in enumerate(batch.group) if g in signal}


def deviation(mine: tuple[float, dict], other: tuple[float, dict]) -> dict[str, float]:
    """loss: difference of two losses, in units of the loss where that is above 1. gradient: norm of the difference
    over the norm, for the worst parameter."""
    difference = torch.stack([(mine[1][n] - g).norm() for n, g in other[1].items()])  # one norm a parameter
    size = torch.stack([g.norm() for g in other[1].values()]).clamp(min=1e-30)
    return {"loss": abs(mine[0] - other[0]) / max(1.0, abs(other[0])), "gradient": float((difference / size).max()),
            "gradient_whole": float(difference.norm() / size.norm())}


def same_tokens(mine: memtrain.Batch, other: memtrain.Batch) -> dict[str, float]:
    """Share of sampled tokens that are equal, and the largest difference of log-probs where a whole turn is."""
    equal = total = 0
    worst = 0.0
    for a, b in zip(mine.turns, other.turns, strict=False):
        equal += sum(x == y for x, y in zip(a.sampled, b.sampled, strict=False))
        total += max(len(a.sampled), len(b.sampled))
        if (a.prefix, a.given, a.sampled) == (b.prefix, b.given, b.sampled):
            worst = max(worst, *(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)))
    return {"share": equal / total, "logprob": worst}


def compare(pair: Pair, step: int, repeats: int) -> dict:
    """Both sides in turn, `repeats` times, then the check of the equations away from ratio 1."""
    bar = tqdm(total=5 * repeats + 7, desc="step", unit="phase")
    meter = Meter([pair.model, pair.reference], bar)
    rows, warm = [], replace(pair.c, documents=1)
    for agent in (pair.agent, pair.plain_agent):  # first calls are slow: what they cost belongs to nobody
        agent.c, full = warm, agent.c
        batch, _ = meter("warm-up", lambda agent=agent: pair.sample(agent, step))
        agent.c = full
    meter("warm-up", lambda: (pair.ours(batch, set(batch.entry)), pair.plain(batch, set(batch.entry))))
    for _ in range(repeats):
        batch, ours_sampling = meter("ours: sampling", lambda: pair.sample(pair.agent, step))
        other, plain_sampling = meter("plain: sampling", lambda: pair.sample(pair.plain_agent, step))
        flipped = not memtrain.with_signal(batch)
        if flipped:
            batch.rewards = [float(random.Random(e).random() < 0.5) for e in range(len(batch.rewards))]
        kept, everything = kept_entries(batch), set(batch.entry)
        mine, ours_training = meter("ours: training", lambda b=batch, k=kept: pair.ours(b, k))
        theirs, plain_training = meter("plain: training, filtered", lambda b=batch, k=kept: pair.plain(b, k))
        _, plain_everything = meter("plain: training", lambda b=batch, e=everything: pair.plain(b, e))
        rows.append({"ours": {"sampling": ours_sampling, "training": ours_training},
                     "plain, filtered": {"sampling": plain_sampling, "training": plain_training},
                     "plain": {"sampling": plain_sampling, "training": plain_everything}})
    pair.exact()
    exact = [meter("check", lambda f=f: f(batch, kept))[0] for f in (pair.ours, pair.plain)]
    pair.shift()
    after = [meter("check", lambda f=f: f(batch, kept))[0] for f in (pair.ours, pair.plain)]
    bar.close()
    return {"documents": pair.c.documents, "group": pair.c.group, "recall_group": pair.c.recall_group,
            "plain_rows": [pair.plain_agent.rows, pair.train_rows], "turns": len(batch.turns),
            "trained_turns": sum(e in kept for e in batch.entry),
            "signal": len(memtrain.with_signal(batch)) / len(set(batch.group)), "coin_rewards": flipped,
            "tokens_sampled": sum(len(t.sampled) for t in batch.turns), "same_tokens": same_tokens(batch, other),
            "rounding": deviation(mine, theirs),
            "deviation": {"as sampled": deviation(*exact), "weights shifted": deviation(*after)},
            "sides": summarise(rows)}


def summarise(rows: list[dict]) -> dict:
    """Per side and phase: seconds of every repeat, tokens, peak memory; speed-up over the side's total."""
    sides = {}
    for side in rows[0]:
        costs = {"sampling": [r[side]["sampling"] for r in rows], "training": [r[side]["training"] for r in rows]}
        costs["total"] = [a + b for a, b in zip(*costs.values(), strict=True)]
        sides[side] = {phase: {"seconds": [x.seconds for x in cost], "tokens": cost[-1].tokens,
                               "peak_mb": max(x.peak_mb for x in cost)} for phase, cost in costs.items()}
    for phases in sides.values():
        for phase, cost in phases.items():
            cost["speedup"] = [b / a for a, b in zip(sides["ours"][phase]["seconds"], cost["seconds"], strict=True)]
    return sides


def step_table(result: dict) -> str:
    """The figures of compare() for a terminal."""
    median, same = statistics.median, result["same_tokens"]
    rows = [["", "seconds", "min", "ours is faster", "tokens through", "peak MB"]]
    rows += [[f"{side}: {phase}", f"{median(cost['seconds']):.3f}", f"{min(cost['seconds']):.3f}",
              f"{median(cost['speedup']):.1f}x", f"{cost['tokens']:,d}", f"{cost['peak_mb']:.0f}"]
             for side, phases in result["sides"].items() for phase, cost in phases.items()]
    coins = "; no group carried one: rewards are coin flips here" if result["coin_rewards"] else ""
    lines = [f"weights {result['weights']}\none MemTrain step: {result['documents']} documents x {result['group']} "
             f"rollouts x {result['recall_group']} recalls, {result['turns']} turns, {result['tokens_sampled']:,} "
             f"tokens sampled; {result['signal']:.0%} of the groups carry a signal, {result['trained_turns']} "
             f"turns{coins}\n",
             columns(rows), f"medians; plain samples {result['plain_rows'][0]} rows at a time and trains "
             f"{result['plain_rows'][1]}; 'filtered' leaves out groups without signal, as ours does\n",
             f"same tokens sampled: {same['share']:.2%}; largest difference of a log-prob {same['logprob']:.1e}"]
    lines += [f"same turns in fp64, {name}: {_differences(d)}  {'ok' if _within(d) else 'DIFFERENT'}"
              for name, d in result["deviation"].items()]
    return "\n".join([*lines, f"same turns in fp32, as timed: {_differences(result['rounding'])}"])


def _differences(d: dict[str, float]) -> str:
    return (f"loss differs by {d['loss']:.1e}, gradient of the worst parameter by {d['gradient']:.1e} of its norm, "
            f"the whole by {d['gradient_whole']:.1e}")


def _within(deviation_: dict[str, float]) -> bool:
    return all(deviation_[name] <= TOLERANCE for name in ("loss", "gradient"))  # a NaN fails


def agree(result: dict) -> bool:
    """Whether both sides computed the same; if not, their times mean nothing."""
    return result["same_tokens"]["share"] >= 0.98 and all(map(_within, result["deviation"].values()))


def load_weights(c: memtrain.Config, model: memtrain.Decoder, tokenizer) -> str:
    """Loads --init or the shipped base; random weights where the shipped one does not fit. Says which."""
    path = Path(c.init) if c.init else memtrain.SHIPPED_BASE
    try:
        memtrain.load_checkpoint(path, model, tokenizer)
    except InputError as e:
        if c.init:
            raise
        print(f"random weights, because the shipped base does not load: {e}", file=sys.stderr)
        return "random"
    return str(path)


def step(argv: Sequence[str]) -> int:
    """One GRPO step of MemTrain, by memtrain.py and by eval/bench/plain.py: seconds, tokens, memory; that both sample
    the same tokens and have the same loss and gradient."""
    parser = Parser(step, {
        "repeats": (3, "timed repeats"), "plain_train_rows": (plain.TRAIN_ROWS, "rows of the plain side's training"),
        "plain_sample_rows": (plain.SAMPLE_ROWS, "rows of the plain side's sampling")})
    options, fields = parser.read(argv, "stages", "run", "update-documents")
    c = memtrain.parse(["--stages", "memtrain", "--update-documents", "1", *fields])
    c = replace(c, update_documents=c.documents)  # one update of everything sampled
    torch.set_num_threads(c.threads or os.cpu_count() or 1)
    device, tokenizer = memtrain.choose_device(c.device), memtrain.load_tokenizer()
    model = memtrain.Decoder(c, tokenizer.size).to(device)
    weights = load_weights(c, model, tokenizer)
    pair = Pair(c, model, tokenizer, memtrain.Data(c, tokenizer), options.plain_train_rows, options.plain_sample_rows)
    result = {"weights": weights} | compare(pair, 0, options.repeats)
    finish("step", argv, options.out, device, result | {"config": asdict(c)}, step_table(result))
    return 0 if agree(result) else 1


# ---- kernels, compile, sample, trl: without a configuration ----------------------------------------------------------


def kernels(argv: Sequence[str]) -> int:
    """Each kernel beside peers that compute the same: seconds, extra memory, share of the measured ceilings."""
    from eval.bench import kernels as bench_kernels

    options, _ = Parser(kernels, {"repeats": (5, "timed repeats")}, own=True).read(argv)
    for rows, limits in bench_kernels.run(options.device, options.repeats):
        result = {"rows": [asdict(r) for r in rows], "ceilings": limits}
        if options.out:
            write_json(options.out, {"environment": where_measured("kernels", argv, options.device)} | result)
    finish("kernels", argv, options.out, options.device, result, bench_kernels.table(rows, limits))
    return 0


def compile_kernels(argv: Sequence[str]) -> int:
    """Every kernel compiled for six GPU generations, without a GPU: shared memory, registers, spills."""
    from eval.bench import compile as bench_compile  # needs Triton, and kernels that are not interpreted

    options, _ = Parser(compile_kernels, own=True).read(argv)
    rows = bench_compile.build_all()
    finish("compile", argv, options.out, torch.device("cpu"), {"kernels": [asdict(r) for r in rows]},
           bench_compile.compile_table(rows))
    return int(any(r.shared_kb > r.limit_kb for r in rows))


PEERS = {"repeats": (5, "timed repeats"), "group": (8, "G, rows of a prompt"), "groups": (2, "prompts")}


def peer(parser: Parser, argv: Sequence[str], packages: Sequence[str], run: Callable, table: Callable,
         same: Callable) -> int:
    """One of the two benchmarks beside a library: on a random Qwen3, of which both sides load the same files."""
    from eval.bench import peers as bench_peers

    parser.add_argument("--shape", default="tiny", help="tiny (default) or 0.6b")
    parser.add_argument("--vocabulary", type=int, default=0, help="rows of the embedding; 0: the shape's")
    options, _ = parser.read(argv)
    if options.shape not in bench_peers.SHAPES:
        raise InputError(f"--shape {options.shape}: choose {' or '.join(bench_peers.SHAPES)}")
    if options.vocabulary and options.vocabulary < 1024:
        raise InputError(f"--vocabulary {options.vocabulary}: give at least 1024, or leave it out")
    bench_peers.require(*packages)
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder), options.device)
    finish(parser.name, argv, options.out, options.device, result, table(result))
    return 0 if same(result) else 1


def sample(argv: Sequence[str]) -> int:
    """Tokens/s of our sampler beside transformers' generate, on the same random Qwen3; share of the bandwidth limit."""
    from eval.bench import peers as bench_peers

    parser = Parser(sample, PEERS | {
        "prompt": (640, "tokens of a prompt"), "response": (64, "new tokens of a row")}, own=True)
    return peer(parser, argv, ["transformers"], bench_peers.run_sample, bench_peers.sample_table,
                bench_peers.same_sampling)


def trl(argv: Sequence[str]) -> int:
    """A whole GRPO step beside TRL's GRPOTrainer: seconds, peak memory; that both have the same loss and gradient."""
    from eval.bench import peers as bench_peers

    parser = Parser(trl, PEERS | {
        "prompt": (None, "tokens of a prompt"), "response": (None, "tokens of a completion"),
        "trl_batch": (None, "rows of TRL's micro-batches")}, own=True)
    parser.add_argument("--lora-rank", type=int, help="rank of the adapters; 0 trains all weights (default: the "
                        "shape's)")
    return peer(parser, argv, ["transformers", "trl", "peft", "datasets"], bench_peers.run_trl, bench_peers.trl_table,
                bench_peers.same_step)


# ---- documents: of a corpus ------------------------------------------------------------------------------------------


def documents(argv: Sequence[str]) -> int:
    """Masked documents of --corpus, built one after the other: milliseconds, tokens, passages, memory."""
    parser = Parser(documents, {"repeats": (50, "how many documents")})
    parser.add_argument("--tokenizer", type=Path, help=".tiktoken file to count with (default: the nano preset's)")
    options, fields = parser.read(argv, "stages", "run")
    c = memtrain.parse(["--stages", "memtrain", *fields])
    tokenizer = memtrain.load_tokenizer(*filter(None, [options.tokenizer]))
    began = time.perf_counter()
    data = memtrain.Data(c, tokenizer)  # reads and indexes the corpus, and builds document 0
    ready, cpu, rows = time.perf_counter() - began, torch.device("cpu"), []

    def build() -> None:
        for i in tqdm(range(options.repeats), "documents", unit="document"):
            began = time.perf_counter()
            problem = data.masked_problem(i)
            rows.append({"ms": 1e3 * (time.perf_counter() - began), "passages": len(problem.passages),
                         "tokens": sum(len(tokenizer.encode(p + "\n")) for p in problem.passages)})

    extra, lines = extra_mb(build, cpu), [["", "min", "median", "p90", "max"]]
    for name in ("ms", "tokens", "passages"):
        values = sorted(row[name] for row in rows)
        figures = (values[0], statistics.median(values), values[-(-9 * len(values) // 10) - 1], values[-1])
        lines.append([name, *(f"{v:,.1f}" if name == "ms" else f"{v:,.0f}" for v in figures)])
    result = {"corpus": data.train.name, "corpus_passages": len(data.train), "ready_seconds": ready,
              "entities": data.finder.name, "extra_mb": extra, "documents": rows, "config": asdict(c)}
    finish("documents", argv, options.out, cpu, result,
           f"{len(rows)} masked documents of {data.train.name}: {len(data.train):,} passages, read and indexed in "
           f"{ready:.1f} s; entities: {data.finder.name}; at most {extra:.1f} MB more\n\n{columns(lines)}")
    return 0


# ---- threads: ways to wait ------------------------------------------------------------------------------------------


def threads(argv: Sequence[str]) -> int:
    """Training steps on --threads threads (default: all cores) under OpenMP's ways to wait and ours, and in as many
    processes, alone and beside one busy process: wall and CPU seconds."""
    from eval.bench import threads as bench_threads

    parser = Parser(threads, {"steps": (2, "how many"), "limit": (120, "seconds after which one is given up")})
    options, fields = parser.read(argv, "stages", "run", "memtrain-steps", "device")
    c = memtrain.parse(fields)
    count = c.threads or os.cpu_count() or 1
    rows = bench_threads.run(fields, count, options.steps, options.limit)
    finish("threads", argv, options.out, torch.device("cpu"), {"steps": options.steps, "team": count, "rows": rows},
           bench_threads.table(rows, options.limit))
    return 0


# ---- length: what a longer document costs ---------------------------------------------------------------------------


def length(argv: Sequence[str]) -> int:
    """The evaluation of --eval-questions questions at each of --eval-lengths (default: 32 at 1,4,16,64), each in a
    process of its own and on one thread: peak memory, CPU seconds by its tokens."""
    parser = Parser(length)
    parser.add_argument("--read-mb", default="1,4,16", metavar="MB", help="sizes of the text that `python memtrain.py "
                        "read` reads, ascending; 0: none (default: 1,4,16)")
    parser.add_argument("--only", type=int, default=0, help=argparse.SUPPRESS)  # measure this length, here; for itself
    options, fields = parser.read(argv, "stages", "run", "eval-masked")
    try:
        sizes = sorted({float(x) for x in options.read_mb.split(",")} - {0.0})
        if sizes and not 0 < sizes[0] <= sizes[-1] < 1e6:
            raise ValueError
    except ValueError:
        raise InputError(f"--read-mb {options.read_mb}: expected sizes in MB, like 1,4,16") from None
    c = memtrain.parse(["--eval-questions", "32", "--eval-lengths", "1,4,16,64", "--threads", "1", *fields,
                        "--stages", "eval", "--eval-masked", "0"])
    torch.set_num_threads(c.threads or os.cpu_count() or 1)
    device = memtrain.choose_device(c.device)
    if options.only:
        print(json.dumps(evaluated_at(c, device, options.only)))
        return 0
    rows = []
    for n in tqdm(memtrain.lengths_of(c), desc="length", unit="process"):
        said = alone(f"length {n}", ["-m", "eval.bench", "length", "--only", str(n), *fields]).stdout
        rows.append(json.loads(said.splitlines()[-1]))
    read = read_texts(sizes)
    # below a length of 4 other things than the document make the peak
    tables = [costs(rows, "length", next((r for r in rows if r["length"] >= 4), rows[0]), "tokens")]
    tables += [costs(read, "mb", read[0], "sections")] if read else []
    finish("length", argv, options.out, device, {"evaluation": rows, "read": read, "config": asdict(c)},
           "\n\n".join(tables))
    return 0


def alone(name: str, arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """python with these arguments in a process of its own; InputError with its last line where it fails."""
    done = subprocess.run([sys.executable, *arguments], text=True, cwd=Path(memtrain.__file__).parent,
                          capture_output=True, check=False)
    if done.returncode:
        raise InputError(f"at {name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return done


READER = {"width": 16, "layers": 1, "heads": 1, "key-heads": 1, "head-size": 16, "hidden": 32, "window": 2100,
          "section": 1950, "memory": 15, "response": 16, "threads": 1}
READER = [text for name, value in READER.items() for text in (f"--{name}", str(value))]


# the process itself tells its peak: to whoever started it, its own would be counted in
READ = ("import sys, memtrain, eval.bench.main; code = memtrain.main(sys.argv[1:]);"
        "print(f'\\n{eval.bench.main.peak_mb(memtrain.choose_device(\"cpu\"))}', file=sys.stderr); sys.exit(code)")


def read_texts(sizes: Sequence[float]) -> list[dict]:
    """`python memtrain.py read` on texts of the mini-world, MB by MB: what it holds does not depend on the model, so a
    tiny random one with long sections reads them."""
    world, rows = MiniWorld(600, 0, "train"), []
    text = "".join(p.rendered + "\n" for p in world.passages).encode()
    with tempfile.TemporaryDirectory() as folder:
        path, weights = Path(folder, "text.txt"), Path(folder, "tiny.safetensors")
        c, tokenizer = memtrain.parse(READER), memtrain.load_tokenizer()
        memtrain.save_checkpoint(weights, memtrain.Decoder(c, tokenizer.size), tokenizer, {"step": 0, "done": True})
        for mb in tqdm(sizes, desc="read", unit="text"):
            with path.open("wb") as file:
                for start in range(0, int(mb * 1e6), len(text)):
                    file.write(text[:int(mb * 1e6) - start])
            memories = Path(folder, "memories.json")
            began = time.perf_counter()
            said = alone(f"{mb:g} MB", ["-c", READ, "read", str(path), "--init", str(weights), "--out", str(memories),
                                        *READER]).stderr
            rows.append({"mb": mb, "sections": len(json.loads(memories.read_text())),
                         "seconds": time.perf_counter() - began, "peak_mb": float(said.splitlines()[-1])})
    return rows


def evaluated_at(c: memtrain.Config, device, n: int) -> dict:
    """One row of the evaluation at length n, by the model's weights or random ones; what came before (loading, a first
    row at 1x) is in the peak, as it is in a run, but not in the seconds."""
    tokenizer = memtrain.load_tokenizer()
    data, model = memtrain.Data(c, tokenizer), memtrain.Decoder(c, tokenizer.size).to(device)
    weights = load_weights(c, model, tokenizer)
    agent = memtrain.Agent(model, tokenizer, as_evaluated(c))

    def row(length_: int) -> dict:
        problems = (data.evaluation_question(i, length_) for i in range(len(data.questions)))
        return long_qa_row(agent, "base", c.seed, length_, list(problems))
    row(1)
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # others may be at work on this CPU
    began = clock()
    result = row(n)
    return {"length": n, "weights": weights, "sections": result["sections"], "tokens": result["tokens"],
            "seconds": clock() - began, "peak_mb": peak_mb(device)}


def costs(rows: Sequence[dict], size: str, first: dict, unit: str) -> str:
    """Peak and time per `unit` of the text, each beside the row `first`."""
    def beside(row: dict, of: Callable[[dict], float]) -> str:
        return f"{of(row) / of(first) - 1:+.1%}"

    def each(row: dict) -> float:
        return row["seconds"] / row[unit]

    lines = [[size, "sections", "peak MB", "", "seconds", f"ms of one of {unit}", ""]]
    lines += [[f"{r[size]:g}", f"{r['sections']:,.1f}", f"{r['peak_mb']:.1f}", beside(r, lambda x: x["peak_mb"]),
               f"{r['seconds']:.2f}", f"{1e3 * each(r):.3f}", beside(r, each)] for r in rows]
    return f"{columns(lines)}\n%: beside {size} {first[size]:g}"


# ---- Command line --------------------------------------------------------------------------------------------------


def everything(argv: Sequence[str]) -> int:
    """kernels, step, sample and trl; DIR/table.md has each beside its peers, with its share of the ceilings."""
    from eval.bench import table as bench_table

    parser = Parser(everything, {"repeats": (3, "timed repeats")}, own=True)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the table and all figures go")
    options, _ = parser.read(argv)
    out = output(options.to, "--to")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    found = bench_table.run(bench_table.commands(options.device.type, options.repeats, options.threads), out)
    text = bench_table.table(found)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {out}")
    return int(any(isinstance(result, str) for result in found.values()))


class Parser(StrictParser):
    """Options of one benchmark: --out, and whole numbers of at least 1, {name: (default, text)}. own: --device and
    --threads, and nothing else; otherwise what it does not know goes to memtrain's command line, which is strict."""

    def __init__(self, command: Callable, numbers: dict[str, tuple[int | None, str]] | None = None, own: bool = False):
        name = next(name for name, known in COMMANDS.items() if known is command)
        super().__init__(prog=f"python -m eval.bench {name}", description=command.__doc__, allow_abbrev=False,
                         epilog=None if own else "Any other option is a field of the configuration: python memtrain.py "
                                                 "--help")
        self.name, self.numbers, self.own = name, numbers or {}, own
        self.add_argument("--out", type=Path, help="also write the figures there, as JSON")
        for number, (default, what) in self.numbers.items():
            self.add_argument(f"--{number.replace('_', '-')}", type=int, default=default,
                              help=f"{what} (default: {default or 'those of --shape'})")
        if own:
            self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
            self.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")

    def read(self, argv: Sequence[str], *chosen: str) -> tuple[argparse.Namespace, list[str]]:
        """(options, fields of the configuration). chosen: fields that the benchmark sets itself."""
        options, fields = self.parse_known_args([dashes(a) for a in argv])
        if self.own and fields:
            raise InputError(f"{fields[0]}: unknown option; python -m eval.bench lists them")
        for name in (*chosen, *STUDY):  # one run is measured
            if any(f == f"--{name}" or f.startswith(f"--{name}=") for f in fields):
                raise InputError(f"--{name}: the benchmark chooses it; leave it out")
        for name in self.numbers:
            if (value := getattr(options, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if options.out and not os.access(options.out.parent, os.W_OK):
            raise InputError(f"--out {options.out}: can't be written; give a file in a writable folder")
        if options.out:
            output(options.out, inputs=[])
        if self.own:
            torch.set_num_threads(options.threads or os.cpu_count() or 1)
            options.device = memtrain.choose_device(options.device)
        return options, fields


def where_measured(name: str, argv: Sequence[str], device) -> dict:
    return environment(SimpleNamespace(device=device)) | {"command": " ".join(["python -m eval.bench", name, *argv])}


def finish(name: str, argv: Sequence[str], out: Path | None, device, result: dict, table: str) -> None:
    where = where_measured(name, argv, device)
    gpu = where["device"] if device.type == "cuda" else where["cpu"]
    print(f"\n{where['command']}\n{where['date']}, {gpu}, {where['threads']} threads, torch "
          f"{where['torch']}, commit {where['commit']}\n\n{table}")
    if out:
        write_json(out, {"environment": where} | result)
        print(f"\nwritten to {out}")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"step": step, "kernels": kernels, "compile": compile_kernels,
                                                        "sample": sample, "trl": trl, "documents": documents,
                                                        "threads": threads, "length": length, "all": everything}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"    {name:10s} {' '.join(command.__doc__.split())}" for name, command in COMMANDS.items()))
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"{argv[0]}: unknown benchmark; choose one of {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except InputError as e:
        if "--debug" in argv:
            raise
        print(one_line(f"bench: {e}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
