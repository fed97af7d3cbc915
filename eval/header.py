"""What is about to run, on what, and about how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from data.config import kind_of
from data.run import ranks
from data.run.terminal import printable
from eval.plan import packed_tokens, refuse_too_large, work
from eval.stage import commit
from kernels import kernels_in_use, synchronise
from kernels.packing import pack


def header(run, score: Callable) -> None:
    """Prints it. run: a memtrain.Run; score: memtrain.score. InputError where the card is too small."""
    c, data = run.c, run.data
    if run.device.type == "cuda":
        refuse_too_large(c, len(run.model.embed), torch.cuda.get_device_properties(run.device).total_memory)
    parameters = sum(p.numel() for p in run.model.parameters())
    minutes, per_step = estimate(run, score)
    if run.device.type == "cuda" and c.preset == "nano":
        print("note: nano is the preset that a GPU has taken to its report, an H200 in 2.8 minutes; --preset small is "
              "larger and trains its own base, 6,200 steps of 0.26 s there, and has not been run to its report on any")
    if commit() == "unknown":
        print("note: no git checkout here: results will not say which commit they are of")
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}" + f" in each of {ranks.WORLD} processes" * (ranks.WORLD > 1)
    print(printable(
          f"memtrain {commit()}  preset {c.preset}  run {run.folder.path}  seed {c.seed}  stages {c.stages}\n"
          f"  device   {run.device} ({threads}), kernels: {kernels_in_use(run.device)}\n"
          f"  model    {parameters / 1e6:.2f} M parameters, {run.tokenizer.size} tokens"
          f"{f', LoRA rank {c.lora_rank}' if c.lora_rank else ''}\n"
          f"  corpus   {data.train.name}: {len(data.train)} passages to train on, {len(data.held_out)} held out"
          f"{f', {data.kept_out} with evidence of evaluation questions left out' * bool(data.kept_out)}; "
          f"entities: {data.finder.name}; {len(data.questions)} evaluation questions\n"
          f"  window   {c.window} = {c.window - c.section - c.memory - c.response} instruction and problem + "
          f"{c.section} section + {c.memory} memory + {c.response} response; order {c.prompt_order}\n"
          f"  GRPO     {c.documents} documents x {c.group} rollouts x {c.recall_group} recalls; "
          f"{c.memtrain_steps} MemTrain + {c.memagent_steps} MemAgent + {c.mem1_steps} MEM1 steps; about "
          f"{per_step:,} tokens a step\n"
          f"  time     about {minutes:.0f} minutes in all on this machine"), flush=True)
    for line in evidence(c, data):
        print(printable(line), flush=True)


def evidence(c, data) -> list[str]:
    """How much of the evidence a search can find at all, where it looks through files; notes where it is little."""
    if data.world or "mem1" not in map(kind_of, c.stages.split(",")):
        return []
    held = data.evidence()
    shares = ", ".join(f"{name}: {found} of {of} {what}" for name, (found, of, what) in held.items())
    return [f"  search   {len(data.searched)} passages, {data.searched.name}, by {c.retriever}; in it {shares}"] + [
        f"note: search: the index holds {found} of {of} {what} of {name}; for the others an answer comes from what the "
        f"model knows by itself: give --search-corpus" for name, (found, of, what) in held.items() if 2 * found < of]


def estimate(run, score: Callable) -> tuple[float, int]:
    """(minutes, packed tokens of one MemTrain step), from a second of training measured here and now."""
    c = run.c
    # four groups of a small model; of one that takes a second for one of them, that one once
    large = run.device.type == "cpu" and sum(p.numel() for p in run.model.parameters()) > 50e6
    rows = [([5] * c.section, [([6] * c.memory, [7] * 20)] * 8)] * (1 if large else 4)
    packed = pack(rows, run.device)
    spent = []
    for _ in range(1 if large else 3):
        synchronise(run.device)
        began = time.perf_counter()
        (-score(run.model, packed)[0].mean()).backward()
        synchronise(run.device)
        spent.append(time.perf_counter() - began)
    run.model.zero_grad(set_to_none=True)
    rate = packed.layout.total / min(spent)  # tokens/s forward and backward
    return sum(work(c).values()) / rate / 60 / ranks.WORLD, packed_tokens(c, "memtrain")
