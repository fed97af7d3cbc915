"""What every benchmark needs: seconds, peak memory, the gradient of an update."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels import synchronise


def seconds(work: Callable, device: torch.device) -> float:
    """Wall seconds of one call, with what it started on a card."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def forget_peak(device: torch.device) -> None:
    """Starts a new peak: of GPU memory, or of the process's resident memory (Linux; elsewhere peaks only grow)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)  # what the phase before freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def extra_mb(work: Callable, device: torch.device) -> float:
    """Peak memory of one call beyond what was held before."""
    forget_peak(device)
    before = peak_mb(device)
    work()
    return max(0.0, peak_mb(device) - before)


class Capture:
    """In the optimiser's place: keeps the gradient of every trained parameter and leaves the weights alone."""

    def __init__(self, model: torch.nn.Module):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.gradient: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        self.gradient = {n: p.grad.clone() for n, p in self.parameters.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters.values():
            p.grad = None
