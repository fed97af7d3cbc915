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
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.run.terminal import columns
from data.run.threads import CHOSEN, SPINS
from eval.bench.measure import Figures

PROGRAM = Path(__file__).parents[2] / "memtrain.py"
WAYS = {"300,000 looks, the default": {"GOMP_SPINCOUNT": "300000"}, f"{int(SPINS):,} looks, ours": {},
        "no look": {"OMP_WAIT_POLICY": "PASSIVE"}}


def threads(options, fields, figures: Figures) -> bool:
    """Training steps on --threads threads (0: all cores) under OpenMP's ways to wait and ours, and in as many
    processes, alone and beside one busy process: seconds of the steps, empty where --limit was not enough. Other
    options are fields of the configuration."""
    n = options.threads or os.cpu_count() or 1
    ways = [("1 thread", 1, 1, {})]
    if n > 1:
        ways += [(f"{n} threads, {name}", n, 1, setting) for name, setting in WAYS.items()]
        ways.append((f"{n} processes of 1 thread", 1, n, {}))
    rows = [measure(fields, *way, options.steps, options.limit, beside)
            for beside in (False, True) for way in tqdm(ways, "beside" if beside else "alone")]
    figures.add(steps=options.steps, team=n, rows=rows)
    print(columns([["", "seconds"], *([r["way"] + ", beside one" * r["beside"], "" if r["seconds"] is None else
                                       f"{r['seconds']:.1f}"] for r in rows)]))
    return True


def measure(fields, name: str, threads: int, processes: int, setting: dict[str, str], steps: int, limit: float,
            beside: bool) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in (*CHOSEN, "OMP_NUM_THREADS")} | setting
    with tempfile.TemporaryDirectory() as folder, busy(beside):
        command = [sys.executable, str(PROGRAM), *fields, "--stages", "memtrain", "--memtrain-steps", str(steps),
                   "--threads", str(threads), "--processes", str(processes), "--device", "cpu", "--run", "threads"]
        lines = []
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit,
                                  check=False)
            if done.returncode:
                raise InputError(f"{name}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
            lines = Path(folder, "runs/threads/metrics.jsonl").read_text().splitlines()
        except subprocess.TimeoutExpired:
            pass
    spent = [r["seconds"] for r in map(json.loads, lines) if r.get("stage") == "memtrain"]
    return {"way": name, "beside": beside, "seconds": sum(spent) if spent else None}


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
