"""A study: the runs of several seeds and arms (data/arms.py), each a process of its own, and one report of them all.

    python memtrain.py --seeds 0,1,2 [--ablations] [--scaling] [--run NAME]

On a CPU as many runs go side by side as there are cores, of one thread each (or --threads); on GPUs one on each. Every
run is an ordinary one in a folder of its own, runs/NAME.s0, runs/NAME.s0.end-to-end ..., with what it says in its
output.log. The same command started again skips what is finished and goes on with the rest. runs/NAME/ holds the
report and study.json:

    {"command": str, "runs": [{"run", "arm", "arguments": of its command, "seconds": of wall time over all its starts,
                               "exit_code": of its last start, or null}]}

Needs no torch.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.arms import Job, arguments, jobs
from data.config import Config, parse
from data.run.files import read_json, write_json, writing
from data.run.folder import Interrupt, RunFolder
from data.run.terminal import printable
from eval.plan import work

SCRIPT = Path(__file__).parents[1] / "memtrain.py"
POLL = 0.5  # seconds between two looks at the runs


class Child:
    """One run of the study: its line in the book, and its process while it has one. known: the line of earlier starts,
    which holds where the arguments are the same."""

    def __init__(self, job: Job, known: dict):
        self.job, self.folder, self.work = job, Path("runs") / job.run, sum(work(job.config).values())
        self.entry = {"run": job.run, "arm": job.arm, "arguments": arguments(job.config), "seconds": 0.0,
                      "exit_code": None}
        if known.get("arguments") == self.entry["arguments"] and (self.folder / "config.json").exists():
            self.entry |= known
        self.process: subprocess.Popen | None = None

    @property
    def finished(self) -> bool:
        return self.entry["exit_code"] == 0

    def start(self, options: Sequence[str], environment: dict) -> None:
        """Starts its process, in a group of its own: Ctrl-C reaches the study, which passes it on once."""
        self.entry["exit_code"], self.began = None, time.perf_counter()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            log = (self.folder / "output.log").open("ab")
        with log:
            self.process = subprocess.Popen([sys.executable, str(SCRIPT), *self.entry["arguments"], *options],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            env=os.environ | environment, process_group=0)

    def ended(self) -> bool:
        """Whether its process has ended, which is then noted."""
        self.entry["exit_code"] = self.process.poll()
        if self.entry["exit_code"] is not None:
            self.entry["seconds"] += round(time.perf_counter() - self.began, 1)
        return self.entry["exit_code"] is not None

    def last_line(self) -> str:
        """The last thing that the run said."""
        with suppress(OSError):
            text = (self.folder / "output.log").read_bytes()[-20_000:].decode(errors="replace")
            lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
            return lines[-1][:300] if lines else "said nothing"
        return "left no output.log"


# ---- Where they run ------------------------------------------------------------------------------------------------


def gpus() -> list[str]:
    """The CUDA devices that a run would see, as CUDA_VISIBLE_DEVICES names them. Asked of torch, in another process."""
    done = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
                          capture_output=True, text=True, check=False)
    count = int(done.stdout) if done.returncode == 0 else 0
    names = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n] or list(map(str, range(count)))
    return names[:count]


def places(c: Config) -> tuple[list[dict], list[str], str]:
    """(the environment of each run that goes at the same time, options that all runs get, both in words)."""
    if c.device != "cpu" and (devices := gpus()):
        return [{"CUDA_VISIBLE_DEVICES": name} for name in devices], [], f"{len(devices)} GPUs, one run on each"
    threads = c.threads or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, cores // threads)
    return ([{"OMP_NUM_THREADS": str(threads)}] * count, [f"--threads={threads}"],
            f"{cores} CPU cores, {count} runs at a time, threads of each: {threads}")


# ---- All of them -----------------------------------------------------------------------------------------------------


class Study:
    """The runs of one command, and their book: study.json."""

    def __init__(self, c: Config, command: str):
        self.c, self.path, self.command = c, Path("runs") / c.run, command
        self.book = self.path / "study.json"
        if (self.path / "config.json").exists():
            raise InputError(f"{self.path}: holds a single run, whose report the study's would replace; choose another "
                             f"--run")
        known, again = {}, "choose another --run, or delete it to start anew"
        if self.book.exists():
            try:
                known = {entry["run"]: entry for entry in read_json(self.book, again)["runs"]}
            except (KeyError, TypeError):
                raise InputError(f"{self.book}: not a study of this version; {again}") from None
        self.children = [Child(job, known.get(job.run, {})) for job in jobs(c)]
        self.base = next((child for child in self.children if child.job.arm == "base"), None)  # of all the others
        self.running: dict[int, Child] = {}  # place -> the run there

    def begin(self) -> None:
        self.folder = RunFolder(self.path)
        self.folder.lock()
        self.write()

    def write(self) -> None:
        write_json(self.book, {"command": self.command, "runs": [child.entry for child in self.children]})

    def _start(self, spots: Sequence[dict], options: Sequence[str]) -> bool:
        """Starts runs where there is room, the base alone before the others. Whether there are more: runs of a study
        that was killed go on by themselves, and are waited for."""
        known = self.children if not self.base or self.base.finished else [self.base]
        ready = [child for child in known if not child.finished and not child.process]
        for place in set(range(len(spots))) - self.running.keys():
            child = next((child for child in ready if not RunFolder(child.folder).locked()), None)
            if child:
                ready.remove(child)
                child.start(options, spots[place])
                self.running[place] = child
        return bool(ready)

    def _ended(self) -> list[Child]:
        """Takes out the runs that have ended, and books them."""
        ended = [place for place, child in self.running.items() if child.ended()]
        children = [self.running.pop(place) for place in ended]
        if children:
            self.write()
        return children

    def _say(self, child: Child) -> None:
        count = sum(c.finished for c in self.children)
        if child.finished:
            said = f"finished after {child.entry['seconds'] / 60:.1f} minutes, {count} of {len(self.children)} runs"
        else:
            said = f"failed (exit code {child.entry['exit_code']}): {child.last_line()}"
        tqdm.write(printable(f"{child.folder}: {said}"), file=sys.stderr)

    def run(self, spots: Sequence[dict], options: Sequence[str], interrupt: Interrupt) -> bool:
        """Runs what is not finished. False where it was interrupted; then every run has saved and ended. InputError
        with a run's words where it was refused, as the others would be; they save and end, too."""
        tqdm.monitor_interval = 0  # no thread beside the one that starts processes
        refused, told, waiting, shown = "", False, False, -math.inf
        with tqdm(total=sum(child.work for child in self.children), desc="study", smoothing=0, dynamic_ncols=True,
                  initial=sum(child.work for child in self.children if child.finished), bar_format="{desc} "
                  "{percentage:3.0f}%|{bar:20}| {elapsed}, about {remaining} left{postfix}") as bar:
            try:
                while True:
                    if not (interrupt.asked or refused):
                        waiting = self._start(spots, options)
                    elif not told:
                        told, waiting = True, False
                        for child in self.running.values():
                            child.process.terminate()
                    if not self.running and not waiting:
                        break
                    bar.set_postfix_str(", ".join(c.job.run for c in self.running.values()), refresh=False)
                    if sys.stderr.isatty() or time.perf_counter() - shown > 60:  # a file gets a line a minute
                        bar.refresh()
                        shown = time.perf_counter()
                    time.sleep(POLL)
                    for child in self._ended():
                        bar.update(child.work if child.finished else 0)
                        if child.entry["exit_code"] == 2 and not told:
                            refused = refused or child.last_line().removeprefix("memtrain: ")
                        elif not told:
                            self._say(child)
            finally:  # no process outlives the study: what is left was left by a second Ctrl-C, or by an error
                for child in self.running.values():
                    child.process.kill()
                    child.process.wait()
        if refused:
            raise InputError(refused)
        return not interrupt.asked


def report(study: Study) -> None:
    """The pooled report, over all runs that were evaluated."""
    from eval.report.page import write_report

    first, *others = [child.folder for child in study.children if child.job.arm != "base"]
    path = write_report(first, others, study.path)
    print(printable(f"\n{path.read_text(encoding='utf-8')}\nreport: {path}"))


def main(argv: Sequence[str]) -> int:
    """Runs the study that a command line of memtrain.py asks for; returns the exit code. InputError on bad input."""
    c, command = parse(argv), shlex.join(["python", "memtrain.py", *argv])
    study, interrupt = Study(c, command), Interrupt()
    total, finished = len(study.children), sum(child.finished for child in study.children)
    spots, options, where = ([], [], "nothing left to run") if finished == total else places(c)
    arms = Counter(child.job.arm for child in study.children)
    print(printable(f"memtrain  study {study.path}: {total} runs, {finished} of them finished; {where}\n"
                    f"  arms     {', '.join(f'{name} x {n}' for name, n in arms.items())}\n"
                    f"  output   of each run in {study.path}.*/output.log"), flush=True)
    study.begin()
    try:
        went_through = study.run(spots, options, interrupt)
    except KeyboardInterrupt:
        went_through = False
    if not went_through:
        print(f"stopped; continue with: {command}", file=sys.stderr)
        return 130
    if missing := [child.job.run for child in study.children if not child.finished]:
        print(printable(f"memtrain: no report: {len(missing)} of {total} runs are not finished "
                        f"({', '.join(missing[:3])}{' ...' * (len(missing) > 3)}); the same command tries them again"),
              file=sys.stderr)
        return 1
    if "report" in c.stages.split(",") and arms.keys() - {"base"}:
        report(study)
    return 0
