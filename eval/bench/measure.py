"""What every benchmark needs: seconds, peak memory, ceilings, rows of a table, a file of figures."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data.run.files import write_json
from kernels import synchronise


@dataclass
class Row:
    """One side of a comparison. seconds: of each repeat; mb: peak memory beyond what was held before; ceiling: the
    larger share of the measured product or copy, 0 where none is counted; note: what else there is to say."""

    what: str
    by: str
    seconds: list[float]
    mb: float
    ceiling: float = 0.0
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Figures(dict):
    """Figures by name; with a path, a file of them that is whole after every addition."""

    def __init__(self, path: Path | None):
        super().__init__()
        self.path = path

    def add(self, **figures) -> None:
        self |= figures
        if self.path:
            write_json(self.path, self)

    def add_rows(self, rows: Sequence[Row], **figures) -> None:
        self.add(rows=[asdict(row) for row in rows], **figures)


def seconds(work: Callable, device: torch.device) -> float:
    """Wall seconds of one call, with what it started on a card."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def forget_peak(device: torch.device) -> float:
    """Starts a new peak: of GPU memory, or of the process's resident memory (Linux; elsewhere peaks only grow). MB held
    now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        ctypes.CDLL(None).malloc_trim(0)  # what the phase before freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mb(device)


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def measured(what: str, sides: dict[str, Callable], device: torch.device, repeats: int) -> list[Row]:
    """A row a side, ours first. One call of each for its memory, which also warms it up; then all in turn, so that
    other work on the machine hits all."""
    rows = []
    for name, work in sides.items():
        before = forget_peak(device)
        work()
        synchronise(device)
        rows.append(Row(what, name, [], max(0.0, peak_mb(device) - before)))
    for _ in range(repeats):
        for row, work in zip(rows, sides.values(), strict=True):
            row.seconds.append(seconds(work, device))
    return rows


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s of a copy, read and write counted), best of 5."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    big = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    copy = min(seconds(lambda: other.copy_(big), device) for _ in range(5))
    return 2 * n**3 / product, 2 * big.numel() / copy


def table(rows: Sequence[Row]) -> str:
    """Markdown. The first row of each `what` is ours; the others are compared with it."""
    lines = ["| what | by | ms | fastest | ours is faster | of the ceiling | MB | |",
             "|---|---|---:|---:|---:|---:|---:|---|"]
    first: dict[str, Row] = {}
    for row in rows:
        ours = first.setdefault(row.what, row)
        faster = "" if row is ours else f"{row.median / ours.median:.2f}x"
        cells = [row.what, row.by, f"{1e3 * row.median:,.2f}", f"{1e3 * min(row.seconds):,.2f}", faster,
                 f"{row.ceiling:.0%}" if row.ceiling else "", f"{row.mb:,.0f}", row.note]
        lines.append("| " + " | ".join(cell.replace("|", " ") for cell in cells) + " |")
    return "\n".join([*lines, "", "Medians; of the ceiling: the larger share of a matrix product or a copy measured in "
                                  "the same process; MB: peak memory beyond what was held before."])


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
