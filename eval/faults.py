"""Kills a run at every moment that could hurt, takes it up again, and compares its end with that of a run left alone.

    python -m eval.faults [--kills 50] [--seed 0] [--out FILE]        about four minutes on two cores

    whole run, announcing what it does -> moments to be killed at -> killed runs -> same weights, metrics, results?

The run is `memtrain.py` itself, tiny, with a checkpoint after every step. It is started through this file, which wraps
the functions that mark a moment (sampling, backward, a file about to be renamed, ...): each announces itself, and the
process sends itself SIGKILL at the moment it was started for. Four fifths of the kills are such; the rest come from
outside, at random times. Equal means bit for bit: every tensor of every checkpoint, every metric and every result
but seconds and tokens a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.run.files import output, write_json
from data.run.terminal import columns, one_line

ROOT = Path(__file__).parents[1]
TINY = {  # seconds long, and every stage has steps
    "width": 24, "hidden": 40, "layers": 2, "heads": 4, "key-heads": 2, "head-size": 8, "people": 60,
    "base-people": 60, "passages": 12, "related": 3, "train-sections": 2, "documents": 2, "update-documents": 2,
    "group": 3, "recall-group": 2, "eval-lengths": "1,2", "eval-questions": 4, "eval-masked": 3,
    "base-copy-steps": 2, "base-steps": 3, "base-documents": 1, "base-answers": 2, "base-recalls": 1,
    "base-directs": 1, "base-searches": 1,
    "memtrain-steps": 4, "memagent-steps": 3, "mem1-steps": 2, "eval-pairs": 2, "threads": 1, "seed": 3,
    "memory": 20, "response": 21, "window": 240, "kl": "1e-3", "lr": "0.01", "entities": "rules", "save-every": 1,
    "run": "t"}
STAGES = "base,memtrain,memagent,mem1,eval,report"
TIMES = {"seconds", "seconds_sampling", "tokens_per_s"}
FILES = ("checkpoint.safetensors", "checkpoint.json", "results.json", "readings.json", "config.json", "report.md",
         "report.html")
Moment = tuple[str, str, str]  # stage, step (of the evaluation: a row), phase


# ---- inside the run ------------------------------------------------------------------------------------------------


class Announcer:
    """Writes every moment to a file, one line each, and ends the process at the one it is given."""

    def __init__(self, target: Moment | None):
        self.target, self.stage, self.step = target, "start", ""
        self.trace = os.open("trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self("")

    def enter(self, stage: str, step: object) -> None:
        self.stage, self.step = stage, str(step)

    def __call__(self, phase: str, mess: Callable[[], None] = lambda: None) -> None:
        """mess: leaves a file as a kill in the middle of its writing would."""
        moment = self.stage, self.step, phase
        os.write(self.trace, json.dumps(moment).encode() + b"\n")
        if moment == self.target:
            mess()
            os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, work: Callable) -> None:
    """Calls work(*arguments) ahead of every call of owner.name."""
    real = getattr(owner, name)

    def wrapped(*arguments, **named):
        work(*arguments)
        return real(*arguments, **named)
    setattr(owner, name, wrapped)


def announced_run(target: Moment | None, fields: Sequence[str]) -> int:
    """memtrain.main with every moment announced."""
    import torch

    import memtrain
    from data.run.folder import Log
    from data.weights import checkpoint
    from eval import gates, longqa, stage
    from eval.report import page as report
    from eval.report import plots

    # A random policy earns no reward, so that nothing would be learned or told apart: a hash of what it wrote decides.
    memtrain.Agent.boxed = lambda agent, turn: agent.tokenizer.decode(turn.sampled)
    memtrain.exact_match = longqa.exact_match = lambda text, answers: float(zlib.crc32(text.encode()) % 2)
    memtrain.Search.hits = property(lambda e: [float(zlib.crc32(repr(e.turns[-1].sampled).encode()) % 2)] * 2)
    here, real_gates, save, replace = Announcer(target), gates.gates, checkpoint.save_file, os.replace
    gates.gates = lambda agent, c: real_gates(agent, c, 2)  # problems of each kind: what they measure does not matter
    before(memtrain, "train_policy", lambda run, name, start: here.enter(name, ""))
    before(memtrain, "train_step", lambda run, kind, step, *_: here.enter(here.stage, step))
    before(memtrain, "imitate", lambda model, rows, c, step, *_: here.enter("base", step))
    before(stage, "rows_of", lambda run, system, job, *_: here.enter("eval", f"{system} {job}"))
    before(report, "write_report", lambda *_: here.enter("report", ""))
    before(memtrain.Agent, "sample", lambda *_: here("sampling"))
    before(torch.Tensor, "backward", lambda *_: here("backward"))
    before(torch.optim.AdamW, "step", lambda *_: here("optimiser"))
    before(plots, "plot_table1", lambda *_: here("plotting"))

    def saved(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        here("checkpoint half written", lambda: os.truncate(path, path.stat().st_size // 2))

    def renamed(source, other):
        known = Path(other).name in FILES
        if known:
            here(f"before {Path(other).name}")
        replace(source, other)
        if known:
            here(f"{Path(other).name} renamed")

    def torn(log, row):
        def half_a_line():
            with log.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row)[:40])
        here("metrics, half a line", half_a_line)

    before(Log, "write", torn)
    checkpoint.save_file, os.replace = saved, renamed
    return memtrain.main(fields)


# ---- outside it ----------------------------------------------------------------------------------------------------


class Victim:
    """One folder in which the run is started again and again."""

    def __init__(self, folder: Path, fields: Sequence[str]):
        self.folder, self.fields, self.trace = folder, list(fields), folder / "trace"
        folder.mkdir()
        self.trace.touch()

    def start(self, target: Moment | None = None, after: float | None = None) -> bool:
        """Starts the run; True if it was killed, at `target` or `after` seconds of work. InputError if it failed."""
        what = [sys.executable, "-m", "eval.faults", "--run-until", json.dumps(target), *self.fields]
        known = self.trace.stat().st_size
        with (self.folder / "output").open("w", encoding="utf-8") as said:
            child = subprocess.Popen(what, cwd=self.folder, stdout=said, stderr=said,
                                     env=os.environ | {"PYTHONPATH": str(ROOT)})
            if after is not None:
                while child.poll() is None and self.trace.stat().st_size == known:  # loading torch is not working
                    time.sleep(0.02)
                try:
                    child.wait(after)
                except subprocess.TimeoutExpired:
                    child.kill()
            code = child.wait()
        if code not in (0, -signal.SIGKILL):
            last = (self.folder / "output").read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise InputError(f"{self.folder}: the run ended with exit code {code} and said: {''.join(last)}")
        return code != 0

    def starts(self) -> list[list[Moment]]:
        """The moments of each start, the first of which has no phase."""
        found: list[list[Moment]] = []
        for line in self.trace.read_text(encoding="utf-8").splitlines():
            moment = tuple(json.loads(line))
            if not moment[2]:
                found.append([])
            found[-1].append(moment)
        return found

    def outcome(self) -> dict:
        """What must not depend on kills: weights (digests) with their states, metrics, results, readings, leftovers."""
        run = self.folder / "runs" / "t"
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        del results["environment"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return {"weights": {str(p.relative_to(run)): tensors(p) for p in sorted(run.glob("*/*.safetensors"))
                            if p.name != "previous.safetensors"},  # that may be the last one twice
                "states": {p.parent.name: timeless(json.loads(p.read_bytes())) for p in run.glob("*/checkpoint.json")},
                "metrics": timeless(rows), "results": timeless(results),
                "readings": json.loads((run / "readings.json").read_text(encoding="utf-8")),
                "report": (run / "report.md").exists(),
                "leftovers": [str(p.relative_to(run)) for p in run.rglob("*.tmp")]}


def timeless(value):
    """Without what a clock says, at any depth."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def tensors(path: Path) -> str:
    """Digest of a checkpoint: all tensors' bytes, and its state without times."""
    from safetensors import safe_open

    found = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        found.update(json.dumps(timeless(json.loads(file.metadata()["state"])), sort_keys=True).encode())
    return found.hexdigest()


def choose(moments: Sequence[Moment], kills: int, rng: random.Random) -> list[Moment]:
    """At most `kills` moments in the order of the run, spread over stages and phases; one a step at most, so that all
    can be met in one run: a step whose checkpoint has its name is not done again."""
    left, chosen, seen = [m for m in moments if m[2]], [], Counter()
    while left and len(chosen) < kills:
        stage, step, phase = m = min(left, key=lambda m: (seen[m[0]] + seen[m[2]], rng.random()))
        chosen.append(m)
        seen.update((stage, phase))
        left = [x for x in left if x[:2] != (stage, step)]
    return sorted(chosen, key=list(moments).index)


def most_redone(starts: Sequence[Sequence[Moment]]) -> int:
    """The most steps of training and rows of evaluation that any start did again: 1 where it took up the one that the
    start before was killed in. The report is no step: it is written by every start."""
    worst, seen = 0, set()
    for start in starts:
        steps = {(stage, step) for stage, step, _ in start if step}
        worst, seen = max(worst, len(seen & steps)), seen | steps
    return worst


def trial(kills: int, seed: int, folder: Path, stages: str = STAGES) -> dict:
    """The whole experiment in an empty folder. InputError if a run fails by itself."""
    rng = random.Random(seed)
    fields = [text for name, value in TINY.items() for text in (f"--{name}", str(value))] + ["--stages", stages]
    whole = Victim(folder / "whole", fields)
    began = time.perf_counter()
    whole.start()
    work, expected, moments = time.perf_counter() - began, whole.outcome(), whole.starts()[0]
    inside, killed, victims = kills - kills // 5, [], []
    with tqdm(total=kills, desc="faults", unit="kill") as bar:
        while len(killed) < kills:
            victims.append(victim := Victim(folder / f"killed-{len(victims)}", fields))
            for target in choose(moments, inside - len(killed), rng):
                if not victim.start(target):
                    raise InputError(f"{victim.folder}: the run ended before it came to {target}")
                killed.append((target[2], target[0]))
                bar.update()
            while inside <= len(killed) < kills and victim.start(after=rng.uniform(0, work / 2)):
                killed.append(("from outside", victim.starts()[-1][-1][0]))
                bar.update()
            victim.start()
    redone = max(most_redone(victim.starts()) for victim in victims)
    ends = {victim.folder.name: victim.outcome() for victim in victims}
    problems = [f"{name}: {what} differ" for name, end in ends.items() for what in end if end[what] != expected[what]]
    if redone > 1:
        problems.append(f"{redone} steps were done again after one kill")
    return {"kills": kills, "seed": seed, "runs": len(victims), "steps": len(expected["metrics"]),
            "most_steps_redone": redone, "problems": problems,
            "table": [[*where, n] for where, n in sorted(Counter(killed).items())]}


def show(result: dict) -> str:
    """The kills by phase and stage, and what came of them."""
    rows = [["killed", "in", "times"], *([phase, stage, str(n)] for phase, stage, n in result["table"])]
    said = result["problems"] or ["weights, metrics and results equal those of a run left alone, bit for bit; no step "
                                  "twice, none missing"]
    return "\n".join([columns(rows), f"\n{result['kills']} kills in {result['runs']} runs of {result['steps']} steps; "
                      f"after one kill at most {result['most_steps_redone']} step done again", *said])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--run-until"]:
        target = json.loads(argv[1])
        return announced_run(target and tuple(target), argv[2:])
    parser = argparse.ArgumentParser(prog="python -m eval.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    options = parser.parse_args(argv)
    try:
        if options.kills < 1:
            raise InputError(f"--kills {options.kills}: must be at least 1")
        if options.out:
            output(options.out, inputs=[])
        with tempfile.TemporaryDirectory(prefix="memtrain-faults-") as folder:
            result = trial(options.kills, options.seed, Path(folder))
        print(f"\npython -m eval.faults {' '.join(argv)}\n\n{show(result)}")
        if options.out:
            write_json(options.out, result)
    except InputError as e:
        print(one_line(f"faults: {e}"), file=sys.stderr)
        return 2
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
