"""Compiles every kernel for six GPU generations, without a GPU: `python -m eval.bench compile`.

For each generation it takes the very tiles that the kernels would choose there, for every dtype and head size, and
reads shared memory from the compiler and registers and spills from the binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from data.run.terminal import columns
from kernels import attention, decode, draw, fused, grpo, logprob

GENERATIONS = {80: ("A100", 163), 86: ("3090", 99), 89: ("4090", 99), 90: ("H100", 227), 100: ("B200", 227),
               120: ("5090", 99)}  # compute capability: (a card, KB of shared memory that one block may use)
DTYPES = {"bf16": (torch.bfloat16, "tf32"), "fp16": (torch.float16, "tf32"), "fp32": (torch.float32, "tf32x3"),
          "tf32": (torch.float32, "tf32")}  # inputs, and how their products are taken
HEAD_SIZES = (32, 64, 80, 96, 128)

# Pointer types of kernel arguments that are not the inputs' dtype, and scalars that are not int32.
FP32 = {"LSE", "DELTA", "ACC", "M", "L", "MAX", "SUM", "MEAN", "CHOSEN", "ENTROPY", "G_LOGPROB", "G_ENTROPY", "NEW",
        "OLD", "REF", "ADVANTAGE", "GRADIENT", "PARTS", "LOGP", "LOGPROB", "Z", "COS", "SIN"}
INT32 = {"tile_start", "tile_group", "own_start", "own_end", "group_start", "prefix_end", "group_end", "offsets",
         "order"}
INT64 = {"TARGET", "GROUP", "ROLLOUT", "OFFSETS", "SEQUENCE", "lengths", "DRAWN", "places"}
FLOATS = {"scale", "interactions", "low", "high", "beta", "top_p", "eps"}
INPUTS = {"Q", "K", "V", "O", "DO", "DQ", "DK", "DV", "X", "W", "DZ", "Y", "DX", "TOTAL", "DTOTAL", "OUT", "DOUT", "WQ",
          "WK", "OQ", "OK", "OV", "GQ", "GK", "GATE", "UP", "G", "DGATE", "DUP"}
INTS = {"room", "split", "splits", "N", "C", "V", "S", "share", "first", "width", "pitch", "q_row", "k_row", "v_row",
        "gate_row", "up_row"}


@dataclass(frozen=True)
class Variant:
    """One kernel as it would be launched. tiles: what it was given, for the table."""

    name: str
    kernel: object
    dtype: str
    head_size: int
    constants: tuple[tuple[str, int | str], ...]
    warps: int
    stages: int


@dataclass
class Compiled:
    """What the compiler made of a variant on one generation."""

    card: str
    capability: int
    kernel: str
    dtype: str
    head_size: int
    constants: str
    shared_kb: float
    limit_kb: int
    registers: int
    spilled: int  # bytes of local memory a thread: stack and spills


def variants(limit: int, dtypes=tuple(DTYPES), head_sizes=HEAD_SIZES) -> list[Variant]:
    """Every launch that a card with `limit` bytes of shared memory can come to."""
    found: dict[Variant, None] = {}

    def add(name, kernel, dtype, head_size, warps, stages, **constants):
        found[Variant(name, kernel, dtype, head_size, tuple(constants.items()), warps, stages)] = None

    for dtype in dtypes:
        if dtype != "tf32":  # which says how products are taken
            add_fused(add, dtype, head_sizes)
        kind, precision = DTYPES[dtype]
        for D in head_sizes:
            sizes = {"H": 14, "R": 2, "D": D, "BD": max(16, triton.next_power_of_2(D)), "PRECISION": precision}
            for kernel, table, resident in (("_forward", attention.FORWARD, 1),
                                            ("_backward_queries", attention.BACKWARD_QUERIES, 2),
                                            ("_backward_keys", attention.BACKWARD_KEYS, 2)):
                t = attention.choose(table, D, kind, precision, limit, resident)
                add(f"attention{kernel}", getattr(attention, kernel), dtype, D, t.warps, t.stages, BM=t.BM, BN=t.BN,
                    **sizes)
            for BM in sorted({decode.rows_a_tile(n, precision) for n in (8, 32, 128)}):
                add("decode_prefix", decode._decode_prefix, dtype, D, 4, 2, BM=BM, BN=decode.tile(D, kind),
                    **sizes)
            add("decode_suffix", decode._decode_suffix, dtype, D, 4, 2, BM=16, BN=decode.tile(D, kind),
                **sizes)
        t = logprob.choose(kind, precision, limit)
        for kernel in ("_forward", "_logit_gradient"):
            add(f"logprob{kernel}", getattr(logprob, kernel), dtype, 0, t.warps, t.stages, BM=t.BM, BV=t.BV, BC=t.BC,
                PRECISION=precision)
    for past in (1, 0x3F800001):
        add("draw", draw._draw, "fp32", 0, draw.WARPS, 3, PAST=past, BLOCK=draw.BLOCK)
    for by_std in (False, True):
        add("grpo_advantages", grpo._advantages, "fp32", 0, 4, 1, BY_STD=by_std, BLOCK=grpo.ROLLOUTS)
    for has_ref in (False, True):
        add("grpo_loss", grpo._loss, "fp32", 0, 4, 1, HAS_REF=has_ref, BLOCK=grpo.TOKENS)
        for dtype in sorted({d.replace("tf32", "fp32") for d in dtypes}):
            add("grpo_sweep", grpo._sweep, dtype, 0, grpo.WARPS, 3, HAS_REF=has_ref, BLOCK=grpo.LOGITS)
    return list(found)


def add_fused(add, dtype: str, head_sizes) -> None:
    """What lies between the products of a block, at three widths."""
    for width in (512, 2048, 4096):
        size, warps = fused.block(width).values()
        add("fused_add_norm", fused._add_norm, dtype, 0, warps, 3, BLOCK=size)
        for trained in (False, True):
            add("fused_add_norm_gradient", fused._add_norm_gradient, dtype, 0, warps, 3, TRAINED=trained, BLOCK=size)
    for kernel in ("_swiglu", "_swiglu_gradient"):
        add(f"fused{kernel}", getattr(fused, kernel), dtype, 0, 4, 3, BLOCK=fused.HIDDEN)
    for D in head_sizes:
        for norm in (False, True):
            sizes = {"H": 14, "KH": 7, "D": D, "BH": max(16, triton.next_power_of_2(D // 2)), "BM": fused.TOKENS,
                     "NORM": norm}
            for cached in (False, True):
                add("fused_norm_rope", fused._norm_rope, dtype, D, 4, 3, CACHED=cached, **sizes)
            add("fused_norm_rope_gradient", fused._norm_rope_gradient, dtype, D, 4, 3, **sizes)


def signature(variant: Variant) -> dict[str, str]:
    """Argument types of the launch. KeyError for an argument that this file has not been told about."""
    constants, types = dict(variant.constants), {}
    for name in variant.kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif variant.name == "grpo_advantages" and name in ("REWARD", "OUT"):
            types[name] = {"REWARD": "*fp64", "OUT": "*fp32"}[name]
        elif variant.name == "draw" and name == "U":
            types[name] = "*fp64"
        elif variant.name.startswith(("logprob", "draw", "grpo")) and name == "V":
            types[name] = "i32"
        elif name in INPUTS:
            types[name] = "*" + variant.dtype.replace("tf32", "fp32")
        else:
            kinds = {"*fp32": FP32, "*i32": INT32, "*i64": INT64, "fp32": FLOATS, "i32": INTS}
            types[name] = next((kind for kind, names in kinds.items() if name in names), None) or _unknown(name)
    return types


def _unknown(name: str):
    raise KeyError(f"{name}: a new kernel argument; tell eval/bench/compile.py its type")


def build(variant: Variant, capability: int) -> Compiled:
    """Compiles one variant for one generation and reads what it needs. Triton's error if it can't."""
    card, limit = GENERATIONS[capability]
    types = signature(variant)
    # PyTorch's tensors start at multiples of 16 bytes and widths are multiples of 16: a launch tells the compiler so
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(types.items())
               if kind[0] == "*" or name == "C"}
    source = ASTSource(variant.kernel, types, dict(variant.constants), aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": variant.warps, "num_stages": variant.stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True,
                               check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    tiles = " ".join(f"{k}={v}" for k, v in variant.constants if k in ("BM", "BN", "BV", "BC", "BLOCK"))
    return Compiled(card, capability, variant.name, variant.dtype, variant.head_size,
                    f"{tiles} warps={variant.warps} stages={variant.stages}", made.metadata.shared / 1024, limit,
                    registers, stack)


def build_all(capabilities=tuple(GENERATIONS), dtypes=tuple(DTYPES), head_sizes=HEAD_SIZES) -> list[Compiled]:
    """Every variant of every generation, on two threads (the compiler runs outside Python's lock)."""
    jobs = [(v, c) for c in capabilities for v in variants(GENERATIONS[c][1] << 10, dtypes, head_sizes)]
    with ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(lambda job: build(*job), jobs), total=len(jobs), desc="compile", unit="kernel"))


def compile_table(rows: list[Compiled]) -> str:
    lines = [["card", "sm", "kernel", "dtype", "D", "shared KB", "limit", "registers", "spilled", "tiles"]]
    lines += [[r.card, str(r.capability), r.kernel, r.dtype, str(r.head_size or ""), f"{r.shared_kb:.1f}",
               f"{r.limit_kb}" + " TOO LARGE" * (r.shared_kb > r.limit_kb), str(r.registers), str(r.spilled),
               r.constants] for r in rows]
    worst = max(rows, key=lambda r: r.spilled)
    return (f"{columns(lines)}\n\n{len(rows)} kernels built for {len({r.card for r in rows})} generations; most shared "
            f"memory {max(r.shared_kb / r.limit_kb for r in rows):.0%} of its card's limit; most spilled: "
            f"{worst.spilled} bytes a thread ({worst.kernel}, {worst.dtype}, D {worst.head_size}, {worst.card})")
