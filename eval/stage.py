"""The evaluation stage of a run: which systems at which lengths, results.json, and where it was measured."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import InputError
from data.config import readers, searchers, systems_of
from data.run.files import read_json, write_json
from eval.changing import changing_row, keep_for_viewer
from eval.gpu import commit
from eval.longqa import held_out_rows, long_qa_row
from eval.memory import Memories
from eval.report.ledger import stage_cost
from eval.report.results import FORMAT, ONCE, number
from eval.searchqa import search_row
from kernels import kernels_in_use


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
    """Every trained system on the same questions at every length, and on held-out masked documents; what their memories
    held of these is counted on the way.

    run: folder, configuration, data and the agent as evaluated (memtrain.Run). recall_probe: draws a recall prompt
    as training does. Returns whether the evaluation is complete; False where it was interrupted after a row.
    """
    c, results = run.c, Results(run)
    systems = systems_of(c)
    trained = [s for s in systems if s not in ("base", "base-one-window") and run.folder.finished(s)]
    jobs = [(s, n) for s in [*readers(trained), "base-one-window"] for n in lengths]
    jobs += [(s, 0) for s in readers(trained) if c.eval_masked and "@" not in s]
    jobs += [(s, name) for s in searchers(trained) for name in run.data.benchmarks]
    jobs += [(s, ChangingLength(n)) for s in readers(trained) for n in lengths if c.changing]
    memories = Memories(run, lengths, results.value["memory"])
    wanted = c.eval_systems.split(",") if c.eval_systems else systems
    jobs = [j for j in jobs if j[0] in wanted and not (results.has(*j) and memories.has(*j))]
    # the bar counts sections read, and turns of search for as many: that is what takes the time
    bar = tqdm(total=sum(effort(run, *j) for j in jobs), desc="eval", unit="section")
    loaded = None
    for system, job in sorted(jobs, key=lambda j: (j[0].split("-")[0], str(j[1]).rjust(3))):
        if loaded != (weights := system.split("-")[0]):
            run.load(weights)
            loaded = weights
        bar.set_postfix_str(f"{system} {job}")
        if isinstance(job, str):
            results.add(search_qa=search_row(run.evaluated, run.data.retriever(), system, c.seed,
                                             run.data.benchmarks[job]))
        elif isinstance(job, ChangingLength):
            problems, read = [run.data.changing_question(i, job) for i in range(c.eval_questions)], []
            row = changing_row(run.evaluated, system, c.seed, int(job), problems, read)
            keep_for_viewer(memories, system, int(job), problems, read)
            results.add(changing=row)
        else:
            results.add(**reading_rows(run, system, job, memories, recall_probe))
        bar.update(effort(run, system, job))
        if run.interrupt.asked:
            bar.close()
            return False
    bar.close()
    results.finish()
    return True


class ChangingLength(int):
    """A length in sections of documents in which facts change, as a job."""


def reading_rows(run, system: str, length: int, memories: Memories, recall_probe) -> dict[str, dict]:
    """Rows of results.json on questions about documents of `length` sections; 0: on held-out masked documents."""
    c, rollouts = run.c, []
    if length:
        problems = [run.data.evaluation_question(i, length) for i in range(len(run.data.questions))]
        rows = {"long_qa": long_qa_row(run.evaluated, system, c.seed, length, problems, rollouts)}
    else:
        problems = [run.data.masked_problem(i, held_out=True) for i in range(c.eval_masked)]
        recall, masked = held_out_rows(run.evaluated, system, c.seed, problems, run.data.finder, recall_probe, rollouts)
        rows = {"masked": masked, "recall": recall}
    return rows | memories.note(system, length, problems, rollouts)


def effort(run, system: str, job: int | str) -> int:
    """About how many sections' worth of turns a job is, for the progress bar."""
    if isinstance(job, str):
        return -(-len(run.data.benchmarks[job]) * run.c.turns // max(1, len(run.data.questions)))
    return job if job and system != "base-one-window" else 1


def earlier_results(path: Path) -> dict:
    """What an earlier start has measured, {} if nothing. InputError if the file is of an older form, or of another."""
    if not path.exists():
        return {}
    old = read_json(path, "delete it to evaluate anew")
    if old.get("format") != FORMAT:
        raise InputError(f"{path}: of an older form (format {old.get('format')!r:.20}, needed: {FORMAT}); delete it to "
                         f"evaluate anew")
    spent = old.get("evaluation", {"seconds": 0.0})
    if not all(isinstance(old.get(k, []), list) for k in ONCE) or not number(
            isinstance(spent, dict) and spent.get("seconds")):
        raise InputError(f"{path}: its rows are not those of an evaluation; delete it to evaluate anew")
    return {k: old.get(k, []) for k in ONCE} | {"evaluation": spent}


class Results:
    """results.json, saved after every row, so that an interrupted evaluation goes on where it stopped.

    Rows of each section of eval.report.results.SCHEMA; `evaluation` holds the seconds that measuring them took.
    """

    def __init__(self, run):
        self.run, self.path, self.since = run, run.folder.measured(run.c.world) / "results.json", time.perf_counter()
        self.value = {"format": FORMAT, "environment": environment(run), "config": dataclasses.asdict(run.c),
                      "evaluation": {"seconds": 0.0}, "stages": []} | {section: [] for section in ONCE}
        self.value |= earlier_results(self.path)

    def has(self, system: str, job: int | str) -> bool:
        """job: a length in sections, 0 for the held-out masked documents, or the name of a benchmark."""
        section, key = ("search_qa", "benchmark") if isinstance(job, str) else (
            "changing" if isinstance(job, ChangingLength) else "long_qa" if job else "recall", "length")
        return any(r["system"] == system and r.get(key, 0) == job for r in self.value[section])

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
        for name in systems_of(self.run.c):
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
