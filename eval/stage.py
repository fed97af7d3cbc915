"""The evaluation stage of a run: which systems at which lengths, results.json, and where it was measured."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import InputError
from data.files import read_json, write_json
from eval.ledger import stage_cost
from eval.longqa import held_out_rows, long_qa_row
from eval.results import FORMAT, ONCE, number
from kernels import kernels_in_use

TRAINED = ("base", "memtrain", "memagent", "memtrain+memagent", "mem1", "memtrain+mem1")  # stages that leave weights


def commit() -> str:
    """Commit of the source, with a + where it was changed; empty outside a git checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], check=False)
    return done.stdout.strip()


def environment(run) -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    return {"commit": commit(), "date": f"{datetime.now():%Y-%m-%d}", "device": gpu or "cpu", "cpu": cpu,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": ".".join(map(str, sys.version_info[:3])), "kernels": kernels_in_use(run.device),
            "command": command()}


def command() -> str:
    return shlex.join(["python", "memtrain.py", *sys.argv[1:]])


def evaluate(run, lengths: Sequence[int], recall_probe) -> bool:
    """Every trained system on the same questions at every length, and on held-out masked documents.

    run: folder, configuration, data and the agent as evaluated (memtrain.Run). recall_probe: draws a recall prompt
    as training does. Returns whether the evaluation is complete; False where it was interrupted after a row.
    """
    c, results = run.c, Results(run)
    systems = ["base", *(s for s in ("memtrain", "memagent", "memtrain+memagent") if run.folder.finished(s))]
    jobs = [(s, n) for s in systems for n in lengths]
    jobs += [("base-one-window", n) for n in lengths] + [(s, 0) for s in systems if c.eval_masked]
    jobs = [j for j in jobs if not results.has(*j)]
    # the bar counts sections read: that is what takes the time
    bar = tqdm(total=sum(n if s != "base-one-window" else 1 for s, n in jobs), desc="eval", unit="section")
    loaded = None
    for system, length in sorted(jobs, key=lambda j: (j[0].split("-")[0], j[1])):
        if loaded != (wanted := system.split("-")[0]):
            run.load(wanted)
            loaded = wanted
        bar.set_postfix_str(f"{system} {length}x")
        if length:
            problems = [run.data.evaluation_question(i, length) for i in range(len(run.data.questions))]
            results.add(long_qa=long_qa_row(run.evaluated, system, c.seed, length, problems))
        else:
            problems = [run.data.masked_problem(i, held_out=True) for i in range(c.eval_masked)]
            recall, masked = held_out_rows(run.evaluated, system, c.seed, problems, run.data.finder, recall_probe)
            results.add(masked=masked, recall=recall)
        bar.update(length if system != "base-one-window" else 1)
        if run.interrupt.asked:
            bar.close()
            return False
    bar.close()
    results.finish()
    return True


class Results:
    """results.json, saved after every row, so that an interrupted evaluation goes on where it stopped.

    Rows of each section of eval.results.SCHEMA; `evaluation` holds the seconds that measuring them took.
    """

    def __init__(self, run):
        self.run, self.path, self.since = run, run.folder.path / "results.json", time.perf_counter()
        self.value = {"format": FORMAT, "environment": environment(run), "config": dataclasses.asdict(run.c),
                      "evaluation": {"seconds": 0.0}, "stages": []} | {section: [] for section in ONCE}
        if self.path.exists():
            old = read_json(self.path, "delete it to evaluate anew")
            if old.get("format") != FORMAT:
                raise InputError(f"{self.path}: of an older form (format {old.get('format')!r:.20}, needed: {FORMAT}); "
                                 f"delete it to evaluate anew")
            spent = old.get("evaluation", {"seconds": 0.0})
            if not all(isinstance(old.get(k, []), list) for k in ONCE) or not number(
                    isinstance(spent, dict) and spent.get("seconds")):
                raise InputError(f"{self.path}: its rows are not those of an evaluation; delete it to evaluate anew")
            self.value |= {k: old.get(k, []) for k in ONCE} | {"evaluation": spent}

    def has(self, system: str, length: int) -> bool:
        rows = self.value["long_qa"] if length else self.value["recall"]
        return any(r["system"] == system and r.get("length", 0) == length for r in rows)

    def add(self, **rows: dict) -> None:
        """A row that is there already stays: its job was done again for another's sake, with the same result."""
        for section, row in rows.items():
            same = ("system", "seed", *ONCE[section])
            if not any(all(r.get(k) == row.get(k) for k in same) for r in self.value[section]):
                self.value[section].append(row)
        now = time.perf_counter()
        self.value["evaluation"]["seconds"] += now - self.since
        self.since = now
        write_json(self.path, self.value)

    def finish(self) -> None:
        stages = []
        for name in TRAINED:
            if state := self.run.folder.finished(name):
                rewards = state.get("rewards", [])
                few = max(1, min(5, len(rewards) // 2))  # one step's reward is noisy: means of five
                cost = stage_cost(state, self.run.c, self.run.c.vocab or self.run.tokenizer.size)
                stages.append({"name": name, "seed": self.run.c.seed, "steps": state["step"],
                               "seconds": round(state["seconds"], 1), **cost,
                               "reward_first": float(np.mean(rewards[:few])) if rewards else None,
                               "reward_last": float(np.mean(rewards[-few:])) if rewards else None})
        self.value["stages"] = stages
        write_json(self.path, self.value)
