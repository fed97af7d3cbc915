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
from data.run import ranks
from data.run.files import read_json, write_json
from eval.changing import changing_readings, changing_row
from eval.gpu import commit
from eval.longqa import held_out_rows, long_qa_row
from eval.memory import Memories
from eval.plan import stage_cost
from eval.report.results import FORMAT, ONCE, number
from eval.searchqa import search_row
from kernels import kernels_in_use


def environment(run) -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
    return {"commit": commit(), "date": f"{datetime.now():%Y-%m-%d}", "device": gpu or "cpu", "cpu": cpu,
            "threads": torch.get_num_threads() * ranks.WORLD, "torch": torch.__version__,
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
    results = Results(run) if ranks.FIRST else None
    memories = Memories(run, lengths)
    jobs = jobs_of(run, lengths)
    missing = [i for i, j in enumerate(jobs) if results and not results.has(*j)]
    weights = ""

    def measure(job):
        nonlocal weights
        if weights != (wanted := weights_of(job[0])):
            run.load(wanted)
            weights = wanted
        return rows_of(run, *job, memories, recall_probe)

    # the bar counts sections read, and turns of search for as many: that is what takes the time
    bar = tqdm(total=sum(effort(run, *jobs[i]) for i in missing), desc="eval", unit="section", disable=not ranks.FIRST)
    for (system, job), (rows, kept) in ranks.deal(jobs, missing, measure, lambda: run.interrupt.asked):
        bar.set_postfix_str(f"{system} {job}")
        memories.keep(system, kept)
        results.add(**rows)
        bar.update(effort(run, system, job))
    bar.close()
    if run.interrupt.asked:
        return False
    if results:
        results.finish()
    return True


def weights_of(system: str) -> str:
    return system.split("-")[0]


def jobs_of(run, lengths: Sequence[int]) -> list[tuple]:
    """(system, job) of all that is to be measured. job: as in `Results.has`. One process goes from system to system; of
    several each takes the largest that is left."""
    c, systems = run.c, systems_of(run.c)
    trained = [s for s in systems if s not in ("base", "base-one-window") and run.folder.finished(s)]
    jobs = [(s, n) for s in [*readers(trained), "base-one-window"] for n in lengths]
    jobs += [(s, 0) for s in readers(trained) if c.eval_masked and "@" not in s]
    jobs += [(s, name) for s in searchers(trained) for name in run.data.benchmarks]
    jobs += [(s, ChangingLength(n)) for s in readers(trained) for n in lengths if c.changing]
    wanted = c.eval_systems.split(",") if c.eval_systems else systems
    return sorted((j for j in jobs if j[0] in wanted), key=lambda j: (
        -effort(run, *j) if ranks.WORLD > 1 else 0, weights_of(j[0]), str(j[1]).rjust(3)))


class ChangingLength(int):
    """A length in sections of documents in which facts change, as a job."""


def rows_of(run, system: str, job: int | str, memories: Memories, recall_probe) -> tuple[dict[str, dict], list]:
    """Rows of results.json, by section, and what readings.json keeps."""
    c, agent, rollouts = run.c, run.evaluated, []
    if isinstance(job, str):
        return {"search_qa": search_row(agent, run.data.retriever(), system, c.seed, run.data.benchmarks[job])}, []
    if isinstance(job, ChangingLength):
        problems = [run.data.changing_question(i, job) for i in range(c.eval_questions)]
        row = changing_row(agent, system, c.seed, int(job), problems, rollouts)
        return {"changing": row}, changing_readings(agent, int(job), problems, rollouts) * (job == memories.shown)
    if job:
        problems = [run.data.evaluation_question(i, job) for i in range(len(run.data.questions))]
        rows = {"long_qa": long_qa_row(agent, system, c.seed, job, problems, rollouts)}
    else:
        problems = [run.data.masked_problem(i, held_out=True) for i in range(c.eval_masked)]
        recall, masked = held_out_rows(agent, system, c.seed, problems, run.data.finder, recall_probe, rollouts)
        rows = {"masked": masked, "recall": recall}
    memory, kept = memories.note(system, job, problems, rollouts)
    return rows | memory, kept


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
        for section, names in ONCE.items():  # several processes add them in no order
            self.value[section].sort(key=lambda r, names=names: (
                weights_of(r["system"]), [str(r.get(k)).rjust(3) for k in names], r["system"]))
        write_json(self.path, self.value)
