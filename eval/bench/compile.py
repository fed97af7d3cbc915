"""Compiles every kernel for six GPU generations, without a GPU: `python -m eval.bench compile`.

Every operation is called on small inputs, for every dtype and head size. Its launches are noted instead of made, with
the tiles that it chooses on the card in question; then they are compiled. Shared memory is read from the compiler,
registers and spills from the binary.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from data.run.terminal import columns
from kernels import attention, decode, draw, fused, grpo, logprob
from kernels.layout import Layout

GENERATIONS = {80: ("A100", 163), 86: ("3090", 99), 89: ("4090", 99), 90: ("H100", 227), 100: ("B200", 227),
               120: ("5090", 99)}  # compute capability: (a card, KB of shared memory that one block may use)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
HEAD_SIZES = (32, 64, 80, 96, 128)
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.int32: "*i32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched. types: of its arguments, as the compiler names them; constants: values of
    those that are "constexpr"."""

    name: str
    kernel: JITFunction
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | str], ...]
    warps: int
    stages: int
    dtype: str = field(compare=False)  # of the inputs, for the table


@contextmanager
def noted(dtype: str, limit: int) -> Iterator[list[Launch]]:
    """Launches within, as on a card with `limit` bytes of shared memory; none is made."""
    found = []

    def note(kernel, *arguments, grid, warmup, num_warps=4, num_stages=3, **named):
        room, name = kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__.strip("_")
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        types = {n: "constexpr" if n in constants else POINTERS[given[n].dtype] if torch.is_tensor(given[n]) else
                 {int: "i32", float: "fp32"}[type(given[n])] for n in kernel.arg_names}
        found.append(Launch(name if name.startswith(room) else f"{room}_{name}", kernel, tuple(types.items()),
                            tuple(constants.items()), num_warps, num_stages, dtype))

    card = {"shared_memory": lambda device: limit}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    with (patch.object(JITFunction, "run", note), patch.multiple(attention, **card), patch.multiple(logprob, **card),
          patch.dict(os.environ, MEMTRAIN_KERNELS="triton", TRITON_INTERPRET="1")):  # on a CPU, but they never run
        yield found
    torch.set_float32_matmul_precision(precision)


def call_all(kind: torch.dtype, head_sizes: Sequence[int]) -> None:
    """Every operation that has a kernel, forward and backward, in every way that training and sampling call it."""
    def zeros(*shape, dtype=kind):
        return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)

    def back(*outputs):
        torch.autograd.backward([x.sum() for x in outputs])

    for width in (512, 2048, 4096):
        for weight in (zeros(width), zeros(width).detach()):
            back(*fused.add_norm(zeros(2, width), zeros(2, width), weight, 1e-6))
    back(fused.swiglu(zeros(2, 512), zeros(2, 512)))
    ids, old, offsets = torch.zeros(4, dtype=torch.long), torch.zeros(4), torch.tensor([0, 1, 4])
    back(*logprob.linear_logprob(zeros(4, 64), zeros(32, 64), ids))
    for ref, by_std in ((None, False), (old, True)):
        rest = old, ref, torch.zeros(2), ids[:2], torch.arange(2), offsets, 2, 0.2, 0.2, 0.0, by_std
        grpo.grpo_loss(zeros(4, dtype=torch.float32), *rest)
        grpo.linear_grpo_loss(zeros(4, 64), zeros(32, 64), ids, *rest)
    for top_p in (1.0, 0.9):
        draw.draw(torch.zeros(1, 151_936), torch.zeros(1, dtype=torch.float64), top_p)
    for D in head_sizes:
        q, k, v = zeros(27, 14, D), zeros(27, 7, D), zeros(27, 7, D)
        back(attention.memory_attention(q, k, v, Layout([20], [3, 4], [0, 0])))
        rotary = torch.zeros(2, 27, 1, D // 2)
        slots = *torch.zeros(2, 27, 7, 5, D, dtype=kind), torch.arange(27), torch.zeros(27, dtype=torch.long)
        for norms in (None, (zeros(D), zeros(D))):
            back(*fused.norm_rope(q, k, v, rotary, norms, 1e-6))
            with torch.no_grad():
                fused.norm_rope(q, k, v, rotary, norms, 1e-6, slots)
        for rollouts in (4, 16, 64):
            far, own = (torch.zeros(2, n, 7, 20, D, dtype=kind) for n in (1, rollouts))
            members = decode.Members(torch.zeros(rollouts, dtype=torch.long), 1)
            decode.memory_decode(torch.zeros(rollouts, 14, D, dtype=kind), *far, ids[:1] + 20, *own,
                                 torch.full((rollouts,), 20), members)


def launches(limit: int, dtypes=tuple(DTYPES), head_sizes=HEAD_SIZES) -> list[Launch]:
    """Every launch that a card with `limit` bytes of shared memory can come to."""
    found: dict[Launch, None] = {}
    for dtype in dtypes:
        with noted(dtype, limit) as some:
            call_all(DTYPES[dtype], head_sizes)
        found |= dict.fromkeys(launch for launch in some if launch not in found)
    return list(found)


def build(launch: Launch, capability: int) -> dict:
    """Compiles one launch for one generation: what it needs, spilled in bytes of local memory a thread. Triton's error
    if it can't."""
    card, limit = GENERATIONS[capability]
    constants = dict(launch.constants)
    # PyTorch's tensors start at multiples of 16 bytes and widths are multiples of 16: a launch tells the compiler so
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(launch.types)
               if kind[0] == "*" or name == "C"}
    source = ASTSource(launch.kernel, dict(launch.types), constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": launch.warps, "num_stages": launch.stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True,
                               check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    tiles = " ".join(f"{k}={v}" for k, v in constants.items() if k in ("BM", "BN", "BV", "BC", "BLOCK"))
    return {"card": card, "sm": capability, "kernel": launch.name, "dtype": launch.dtype, "D": constants.get("D", 0),
            "shared_kb": made.metadata.shared / 1024, "limit_kb": limit, "registers": registers, "spilled": stack,
            "tiles": f"{tiles} warps={launch.warps} stages={launch.stages}"}


def build_all(capabilities=tuple(GENERATIONS), dtypes=tuple(DTYPES), head_sizes=HEAD_SIZES) -> list[dict]:
    """Every launch on every generation, on two threads (the compiler runs outside Python's lock)."""
    jobs = [(x, c) for c in capabilities for x in launches(GENERATIONS[c][1] << 10, dtypes, head_sizes)]
    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(lambda job: build(*job), jobs), total=len(jobs), desc="compile", unit="kernel"))


def compile_table(rows: list[dict]) -> str:
    lines = [list(rows[0]), *([f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    worst, fullest = max(rows, key=lambda r: r["spilled"]), max(rows, key=lambda r: r["shared_kb"] / r["limit_kb"])
    return (f"{columns(lines)}\n\n{len(rows)} kernels built for {len({r['card'] for r in rows})} generations; most "
            f"spilled: {worst['kernel']}, {worst['dtype']}, D {worst['D']}, {worst['card']}; most of its card's shared "
            f"memory: {fullest['kernel']}, {fullest['dtype']}, {fullest['shared_kb'] / fullest['limit_kb']:.0%}")
