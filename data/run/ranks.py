"""The processes that torchrun started: who this one is, and sums over all of them.

Alone, without torchrun, everything here is the identity. There is no engine behind it: documents are dealt out,
gradients are summed, rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
FIRST = RANK == 0


def join(device: torch.device) -> None:
    """Meets the other processes. A wait may be long: rank 0 evaluates alone."""
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wait() -> None:
    if WORLD > 1:
        dist.barrier()


def total(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Each value summed over the ranks, in fp64."""
    if WORLD == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def largest(value: float, device: torch.device | str = "cpu") -> float:
    """The largest value of all ranks."""
    if WORLD == 1:
        return value
    most = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def mean(values: Sequence[float], device: torch.device | str = "cpu") -> float:
    """Mean over the values of all ranks; 0 if there is none."""
    amount, count = total([float(sum(values)), len(values)], device)
    return amount / count if count else 0.0


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all ranks; a rank that had nothing to do adds zeros."""
    if WORLD > 1:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
