"""Kills a run at every moment that could hurt, takes it up again, and compares its end with that of a run left alone.

    python -m eval.faults [--kills 50] [--seed 0] [--out FILE]        about six minutes on two cores

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
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.config import TRAINED
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
SYSTEMS = ("base", *TRAINED)
TIMES = {"seconds", "seconds_sampling", "tokens_per_s"}
# phases in which the step already counts as done
COMMITTED = {"checkpoint.safetensors renamed", "before checkpoint.json", "results.json renamed"}


@dataclass(frozen=True)
class Moment:
    """The n-th time that a step of a stage reaches a phase. Steps of the evaluation are its rows."""

    stage: str
    step: int
    phase: str
    n: int

    @property
    def committed(self) -> bool:
        return self.phase in COMMITTED


# ---- inside the run ------------------------------------------------------------------------------------------------


class Announcer:
    """Writes every moment to a file, and ends the process at the one it is given."""

    def __init__(self, target: Moment | None, trace: Path):
        self.target, self.stage, self.step, self.seen = target, "start", 0, Counter()
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self.trace, b'"start"\n')

    def enter(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def __call__(self, phase: str, mess: Callable[[], None] = lambda: None) -> None:
        """mess: leaves a file as a kill in the middle of its writing would."""
        moment = Moment(self.stage, self.step, phase, self.seen[self.stage, self.step, phase])
        self.seen[self.stage, self.step, phase] += 1
        os.write(self.trace, json.dumps([moment.stage, moment.step, moment.phase, moment.n]).encode() + b"\n")
        if moment == self.target:
            mess()
            os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name: str, before: Callable) -> None:
    """Calls before(*arguments) ahead of every call of owner.name."""
    real = getattr(owner, name)

    def wrapped(*arguments, **named):
        before(*arguments)
        return real(*arguments, **named)
    setattr(owner, name, wrapped)


def announced_run(target: Moment | None, trace: Path, fields: Sequence[str]) -> int:
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
    here, real_gates, save, replace = Announcer(target, trace), gates.gates, checkpoint.save_file, os.replace
    wrap(memtrain, "train_policy", lambda run, name, start: here.enter(name, -1))
    wrap(memtrain, "train_step", lambda run, kind, step, *_: here.enter(here.stage, step))
    wrap(memtrain, "imitate", lambda model, rows, c, step, *_: here.enter("base", step))
    wrap(memtrain.Agent, "sample", lambda *_: here("sampling"))
    wrap(torch.Tensor, "backward", lambda *_: here("backward"))
    for optimizer in (torch.optim.AdamW, torch.optim.Muon):
        wrap(optimizer, "step", lambda *_: here("optimiser"))
    wrap(report, "write_report", lambda *_: here.enter("report", 0))
    wrap(plots, "plot_table1", lambda *_: here("plotting"))

    def few_gates(agent, c):  # two problems of each kind instead of 200: what they measure does not matter here
        here.enter("base", c.base_copy_steps + c.base_steps)
        return real_gates(agent, c, 2)

    def saved(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        here("checkpoint half written", lambda: os.truncate(path, path.stat().st_size // 2))

    def renamed(source, other):
        name = Path(other).name
        if name in ("checkpoint.safetensors", "checkpoint.json", "results.json", "readings.json", "config.json",
                    "report.md", "report.html"):
            here(f"before {name}")
        replace(source, other)
        if name in ("checkpoint.safetensors", "results.json"):
            here(f"{name} renamed")

    def half_a_line(log, row):
        def torn():
            with log.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row)[:40])
        here("metrics, half a line", torn)

    def rows(results):
        here.enter("eval", sum(len(results.value[k]) for k in ("long_qa", "masked", "search_qa")))

    wrap(Log, "write", half_a_line)
    gates.gates, checkpoint.save_file, os.replace = few_gates, saved, renamed
    add, start = stage.Results.add, stage.Results.__init__
    stage.Results.__init__ = lambda results, run: (start(results, run), rows(results))[0]
    stage.Results.add = lambda results, **more: (add(results, **more), rows(results))[0]
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
        what = [sys.executable, "-m", "eval.faults", "--run-until", json.dumps(target and vars(target)), *self.fields]
        known = self.trace.stat().st_size
        with (self.folder / "output").open("w", encoding="utf-8") as output_:
            child = subprocess.Popen(what, cwd=self.folder, stdout=output_, stderr=output_,
                                     env=os.environ | {"PYTHONPATH": str(ROOT)})
            if after is not None:
                while child.poll() is None and self.trace.stat().st_size < known + 20:  # loading torch is not working
                    time.sleep(0.02)
                try:
                    child.wait(after)
                except subprocess.TimeoutExpired:
                    child.kill()
            code = child.wait()
        if code not in (0, -signal.SIGKILL):
            said = (self.folder / "output").read_text(encoding="utf-8").strip().splitlines()
            raise InputError(f"{self.folder}: the run ended with exit code {code} and said: {said[-1] if said else ''}")
        return code != 0

    def starts(self) -> list[list[Moment]]:
        """The moments of each start. A last one that was cut off in the middle of its line is left out."""
        found: list[list[Moment]] = []
        for line in self.trace.read_text(encoding="utf-8").splitlines():
            value = json.loads(line)
            if value == "start":
                found.append([])
            else:
                found[-1].append(Moment(*value))
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
    """`kills` moments in the order of the run, spread as evenly as they go over stages and phases.

    A step whose checkpoint has its name is not done again: of the moments behind that at most one a step can be met.
    """
    pairs: dict[tuple[str, str], list[Moment]] = {}
    for m in moments:
        pairs.setdefault((m.stage, m.phase), []).append(m)
    for own in pairs.values():
        rng.shuffle(own)
    chosen, spent = [], set()
    while len(chosen) < kills and any(pairs.values()):
        for own in rng.sample(list(pairs.values()), len(pairs)):
            m = next((m for m in own if not (m.committed and (m.stage, m.step) in spent)), None)
            own[:] = own[own.index(m) + 1:] if m else []
            if m and len(chosen) < kills:
                chosen.append(m)
                spent |= {(m.stage, m.step)} if m.committed else set()
    return sorted(chosen, key=list(moments).index)


def most_redone(whole: Sequence[Moment], starts: Sequence[Sequence[Moment]]) -> int:
    """The most steps that any start did again: 1 where it took up the step that the one before was killed in. The
    report is no step: it is written by every start."""
    all_steps = dict.fromkeys((m.stage, m.step) for m in whole if m.stage not in ("start", "report"))
    order = {s: i for i, s in enumerate(all_steps)}
    worst = reached = 0
    for start in starts:
        steps = [order[m.stage, m.step] for m in start if (m.stage, m.step) in order]
        if steps:
            worst, reached = max(worst, reached - steps[0]), max(reached, steps[-1] + 1)
    return worst


def compare(whole: dict, other: dict) -> list[str]:
    """What differs, in words; empty where nothing does."""
    found = [f"{name} differs" for name in whole if whole[name] != other[name]]
    steps = [[(r["stage"], r["step"]) for r in x["metrics"]] for x in (whole, other)]
    found += [f"{step} is there {n} times" for step, n in Counter(steps[1]).items() if n > 1]
    return found + [f"{step} is missing" for step in steps[0] if step not in steps[1]]


def trial(kills: int, seed: int, folder: Path, stages: str = STAGES) -> dict:
    """The whole experiment in an empty folder. InputError if a run fails by itself."""
    rng = random.Random(seed)
    fields = [text for name, value in TINY.items() for text in (f"--{name}", str(value))] + ["--stages", stages]
    whole = Victim(folder / "whole", fields)
    began = time.perf_counter()
    whole.start()
    work, expected, moments = time.perf_counter() - began, whole.outcome(), whole.starts()[0]
    inside = choose(moments, kills - kills // 5, rng)
    problems: list[str] = []
    table: Counter = Counter()
    bar = tqdm(total=kills, desc="faults", unit="kill")

    def killed_in(victim: Victim, stage: str, phase: str) -> None:
        table[stage, phase] += 1
        bar.set_postfix_str(f"{stage}: {phase}")
        bar.update()

    victim, redone = Victim(folder / "killed", fields), 0
    for target in inside:
        if not victim.start(target):
            raise InputError(f"{victim.folder}: the run ended before it came to {target}")
        killed_in(victim, target.stage, target.phase)
    victim.start()
    victims, left, n = [victim], kills - len(inside), 0
    while left:
        victims.append(victim := Victim(folder / f"killed-{n}", fields))
        n += 1
        while left and victim.start(after=rng.uniform(0, work / 2)):
            last = [m for start in victim.starts() for m in start][-1]
            killed_in(victim, last.stage, "from outside")
            left -= 1
        victim.start()
    bar.close()
    for victim in victims:
        problems += [f"{victim.folder.name}: {x}" for x in compare(expected, victim.outcome())]
        redone = max(redone, most_redone(moments, victim.starts()))
    if redone > 1:
        problems.append(f"{redone} steps were done again after one kill")
    return {"kills": sum(table.values()), "seed": seed, "runs": len(victims), "steps": len(expected["metrics"]),
            "rows": len(expected["results"]["long_qa"]), "most_steps_redone": redone, "problems": problems,
            "table": [[stage, phase, n] for (stage, phase), n in table.items()]}


def show(result: dict) -> str:
    """The table of kill points and what came of them."""
    cells = {(stage, phase): n for stage, phase, n in result["table"]}
    stages, phases = (list(dict.fromkeys(x)) for x in zip(*cells, strict=True)) if cells else ([], [])
    stages = [s for s in ("start", *SYSTEMS, "eval", "report") if s in stages]
    counts = [(phase, [cells.get((s, phase), 0) for s in stages]) for phase in sorted(phases)]
    counts.append(("all", [sum(row) for row in zip(*(row for _, row in counts), strict=True)]))
    rows = [["killed", *stages, "all"], *([name, *(str(n or "") for n in (*row, sum(row)))] for name, row in counts)]
    lines = [columns(rows), f"\n{result['kills']} kills in {result['runs']} runs of {result['steps']} steps; after one "
                            f"kill at most {result['most_steps_redone']} step done again"]
    return "\n".join(lines + (result["problems"] or ["weights, metrics and results equal those of a run left alone, "
                                                     "bit for bit; no step twice, none missing"]))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--run-until"]:
        target = json.loads(argv[1])
        return announced_run(target and Moment(**target), Path("trace"), argv[2:])
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
