"""Everything in one table: `python -m eval.bench all --to DIR`.

    kernels, step, sample, trl, each a process of its own -> DIR/NAME.json -> rows -> DIR/table.md

A benchmark that fails is a row that says so, and stops no other.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

SHAPE = {"cuda": "0.6b", "cpu": "tiny"}
GOALS = (  # on an H100: (start of the row, its peer, what is asked, whether a row has it)
    ("attention", "FlexAttention", "1.2 times as fast", lambda row: row.faster >= 1.2),
    ("log-prob:", "cut-cross-entropy", "as fast as the best, no more memory than this",
     lambda row: row.fastest and row.memory <= row.peer_memory),
    ("decode", "", "65% of a copy", lambda row: row.ceiling >= 0.65),
    ("sample", "", "65% of a copy", lambda row: row.ceiling >= 0.65),
    ("trl", "TRL", "5 times as fast, 24 GB", lambda row: row.faster >= 5 and row.memory <= 24_000),
)


@dataclass(frozen=True)
class Row:
    """One operation beside one peer. seconds, peer_seconds: of the same work; ceiling: the larger share of the measured
    product or copy, 0 where none is known; memory, peer_memory: peak MB, of kernels beyond their inputs, -1 unknown;
    fastest: no peer takes less time."""

    what: str
    seconds: float
    peer: str
    peer_seconds: float
    ceiling: float = 0.0
    memory: float = -1.0
    peer_memory: float = -1.0
    fastest: bool = False

    @property
    def faster(self) -> float:
        return self.peer_seconds / self.seconds

    @property
    def goal(self) -> str:
        for start, peer, text, met in GOALS:
            if self.what.startswith(start) and peer in self.peer:
                return f"{text}: {'met' if met(self) else 'missed'}"
        return ""


def kernel_rows(result: dict) -> Iterator[Row]:
    """A row for each peer of each operation."""
    by_case: dict[tuple, dict] = {}
    for row in result["rows"]:
        by_case.setdefault((row["operation"], row["shape"]), {})[row["by"]] = row
    for (operation, shape), sides in by_case.items():
        mine = sides.pop("memtrain")
        best = all(mine["seconds"] <= peer["seconds"] for peer in sides.values())
        for name, peer in sides.items():
            yield Row(f"{operation}: {shape}", mine["seconds"], name, peer["seconds"],
                      max(mine["compute_share"], mine["copy_share"]), mine["extra_mb"], peer["extra_mb"], best)


def side_rows(what: str, sides: dict, total=lambda side: side) -> Iterator[Row]:
    """A row for each side after the first, which is ours."""
    (_, mine), *peers = ((name, total(side)) for name, side in sides.items())
    median = statistics.median
    for name, peer in peers:
        yield Row(what, median(mine["seconds"]), name, median(peer["seconds"]), mine.get("bandwidth_share", 0.0),
                  mine.get("peak_mb", -1.0), peer.get("peak_mb", -1.0))


ROWS = {
    "kernels": kernel_rows,
    "step": lambda result: side_rows("step: MemTrain, " + result["weights"], result["sides"], lambda x: x["total"]),
    "sample": lambda result: side_rows("sample: " + result["model"], result["sides"]),
    "trl": lambda result: side_rows("trl: a GRPO step, " + result["model"], result["sides"]),
}


def commands(device: str, repeats: int, threads: int) -> dict[str, list[str]]:
    """{name: options}."""
    common = ["--device", device, "--repeats", str(repeats), "--threads", str(threads)]
    shape = ["--shape", SHAPE[device]]
    return {"kernels": common, "step": common, "sample": common + shape, "trl": common + shape}


def run(wanted: dict[str, Sequence[str]], out: Path) -> dict[str, dict | str]:
    """{name: figures, or why there are none}."""
    found: dict[str, dict | str] = {}
    for name, given in tqdm(wanted.items(), desc="all", unit="benchmark"):
        path = out / f"{name}.json"
        path.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-m", "eval.bench", name, *given, "--out", str(path)],
                              capture_output=True, text=True, check=False)
        if not done.returncode:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        elif path.exists():
            found[name] = f"exit {done.returncode}, both sides don't compute the same: see {path}"
        else:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
            found[name] = f"exit {done.returncode}: {said}"
    return found


def _memory(mb: float) -> str:
    return f"{mb:,.0f}" if mb >= 0 else ""


def table(found: dict[str, dict | str]) -> str:
    """Markdown: where it was measured, a row an operation and peer, what failed."""
    where = next((x["environment"] for x in found.values() if isinstance(x, dict)), {})
    card = where.get("device", "") if where.get("device") != "cpu" else where.get("cpu", "")
    on_card = where.get("device", "cpu") != "cpu"
    lines = [f"{where.get('date')}, {card}, {where.get('threads')} threads, torch {where.get('torch')}, commit "
             f"{where.get('commit')}: `python -m eval.bench all`" if where else "Nothing was measured.", "",
             "| what | ours, ms | beside | its ms | ours is faster | of the ceiling | MB | its MB |"
             + " goal on an H100 |" * on_card, "|---|---:|---|---:|---:|---:|---:|---:|" + "---|" * on_card]
    for name, result in found.items():
        if isinstance(result, str):
            lines.append(f"| {name}: **failed**, {result.replace('|', ' ')} |" + " |" * (7 + on_card))
            continue
        for r in ROWS[name](result):
            cells = [r.what.replace("|", " ").replace("\n", ", "), f"{1e3 * r.seconds:,.2f}", r.peer,
                     f"{1e3 * r.peer_seconds:,.2f}", f"{r.faster:.2f}x", f"{r.ceiling:.0%}" if r.ceiling else "",
                     _memory(r.memory), _memory(r.peer_memory), *([r.goal] * on_card)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Medians. Of the ceiling: the larger share of a matrix product or a copy measured in "
                      "the same process. MB: peak memory, of kernels beyond their inputs."]) + "\n"
