"""Training steps on several threads or processes, alone and beside a busy process, under ways to wait.

On a machine that is not idle, "alone" means beside what else is at work there.
Called by `python -m eval.bench threads`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.run.terminal import columns
from data.run.threads import CHOSEN, SPINS

PROGRAM = Path(__file__).parents[2] / "memtrain.py"
WAYS = {"300,000 looks, the default": {"GOMP_SPINCOUNT": "300000"}, f"{int(SPINS):,} looks, ours": {},
        "no look": {"OMP_WAIT_POLICY": "PASSIVE"}}


def run(fields: Sequence[str], threads: int, steps: int, limit: float) -> list[dict]:
    """A row for each way, one for as many processes and one for a single thread, alone and beside a busy process: wall
    seconds of the steps (None where `limit` was not enough), CPU seconds of all processes of the run."""
    ways = [(f"{threads} threads, {name}", threads, 1, setting) for name, setting in WAYS.items()]
    ways = [("1 thread", 1, 1, {}), *([*ways, (f"{threads} processes of 1 thread", 1, threads, {})] * (threads > 1))]
    return [measure(fields, *way, steps, limit, beside)
            for beside in (False, True) for way in tqdm(ways, "beside" if beside else "alone")]


def measure(fields, name: str, threads: int, processes: int, setting: dict[str, str], steps: int, limit: float,
            beside: bool) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in (*CHOSEN, "OMP_NUM_THREADS")} | setting
    with tempfile.TemporaryDirectory() as folder, busy(beside):
        command = [sys.executable, str(PROGRAM), *fields, "--stages", "memtrain", "--memtrain-steps", str(steps),
                   "--threads", str(threads), "--processes", str(processes), "--device", "cpu", "--run", "threads"]
        own = _children()
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit,
                                  check=False)
        except subprocess.TimeoutExpired:
            done = None
        own = _children() - own
        if done and done.returncode:
            raise InputError(f"{name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
        lines = Path(folder, "runs/threads/metrics.jsonl").read_text().splitlines() if done else []
    rows = [r for r in map(json.loads, lines) if r.get("stage") == "memtrain"]
    return {"way": name, "beside": beside, "seconds": sum(r["seconds"] for r in rows) if done else None,
            "cpu_seconds": own}


@contextmanager
def busy(wanted: bool):
    """One process that does nothing but keep a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def _children() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(rows: Sequence[dict], limit: float) -> str:
    lines = [["", "seconds", "CPU seconds"]]
    lines += [[r["way"] + ", beside one" * r["beside"], f"> {limit:.0f}" if r["seconds"] is None else
               f"{r['seconds']:.1f}", f"{r['cpu_seconds']:.1f}"] for r in rows]
    return f"{columns(lines)}\nseconds: the steps alone; CPU seconds: all processes with their start"
