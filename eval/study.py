"""A study: the runs of several seeds and arms (data/arms.py), each a process of its own, and one report of them all.

    python memtrain.py --seeds 0,1,2 [--ablations] [--scaling] [--run NAME]

On a CPU as many runs go side by side as there are cores, of one thread each (or --threads); on GPUs one on each. Every
run is an ordinary one in a folder of its own, runs/NAME.s0, runs/NAME.s0.end-to-end ..., with what it says in its
output.log. The same command started again skips what is finished and goes on with the rest. runs/NAME/ holds the
report and study.json:

    {"format": 1, "command": str, "config": the study's fields,
     "runs": [{"run", "arm", "seed", "overrides": fields that make the arm, "after": the run whose base it starts from,
               "seconds": of wall time over all its starts, "finished", "exit_code": of its last start, or null}]}

Needs no torch: what a run has done is read from its metrics.jsonl and results.json.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import re
import shlex
import signal
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
from data.config import FREE_FIELDS, Config, lengths_of, parse
from data.run.files import json_bytes, read_json, write_json, writing
from data.run.folder import Interrupt, RunFolder
from data.run.terminal import printable
from eval.plan import evaluated, trainings, work

SCRIPT = Path(__file__).parents[1] / "memtrain.py"
POLL = 0.5  # seconds between two looks at the runs
# of the fields that may differ, those that make work, and for which stage
DECIDES = {"stages": "", "eval_lengths": "eval", "eval_systems": "eval", "world": "eval"}
STAGE = re.compile(r'^\{"stage": "([^"]+)"', re.MULTILINE)  # of a line of metrics.jsonl
SHOWN = 4  # runs whose stage the bar names


# ---- One run -----------------------------------------------------------------------------------------------------


class Child:
    """One run of the study: its process while it has one, and how far it is."""

    def __init__(self, job: Job, entry: dict):
        self.job, self.entry, self.folder = job, entry, Path("runs") / job.run
        self.work = work(job.config)
        self.process: subprocess.Popen | None = None
        self.seen: dict[Path, tuple[tuple, object]] = {}  # file -> (size and time, what was read)

    @property
    def total(self) -> float:
        return sum(self.work.values())

    def start(self, options: Sequence[str], environment: dict) -> None:
        """Starts its process, in a group of its own: Ctrl-C reaches the study, which passes it on once."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            log = (self.folder / "output.log").open("ab")
        with log:
            self.process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments(self.job.config), *options],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            env=os.environ | environment, process_group=0, preexec_fn=_orphans_stop)
        self.before, self.began = self.entry["seconds"], time.perf_counter()

    def note_time(self) -> None:
        self.entry["seconds"] = round(self.before + time.perf_counter() - self.began, 1)

    def signal(self, number: int) -> None:
        if self.process:
            self.process.send_signal(number)

    def _read(self, name: str, parse_text):
        """What `parse_text` makes of a file of the run, read again only where it has changed; None without it."""
        path = self.folder / name
        try:
            status = path.stat()
            state = status.st_size, status.st_mtime_ns
            if self.seen.get(path, (None, None))[0] != state:
                self.seen[path] = state, parse_text(path.read_text(encoding="utf-8"))
            return self.seen[path][1]
        except (OSError, ValueError):
            return None

    def progress(self) -> tuple[float, str]:
        """(work done, the stage it is at)."""
        if self.entry["finished"]:
            return self.total, "finished"
        steps = self._read("metrics.jsonl", lambda text: Counter(STAGE.findall(text))) or {}
        done, stage = 0.0, "starting"
        for name, count in trainings(self.job.config).items():
            if made := min(steps.get(name, 0), count):
                stage = f"{name} {made}/{count}"
                done += self.work[name] * made / count
        if "eval" in self.work:
            results = RunFolder(Path()).measured(self.job.config.world) / "results.json"
            rows = (self._read(str(results), json.loads) or {}).get("long_qa") or []
            systems = evaluated(self.job.config)
            read = sum(row["length"] for row in rows if row["system"] in systems)
            whole = len(systems) * sum(lengths_of(self.job.config))
            if read:
                stage = f"eval {read}/{whole}"
                done += self.work["eval"] * min(1.0, read / whole)
        return done, stage

    def last_line(self) -> str:
        """The last thing that the run said."""
        with suppress(OSError):
            with (self.folder / "output.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
                text = file.read().decode(errors="replace")
            lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
            return lines[-1][:300] if lines else "said nothing"
        return "left no output.log"

    def refused(self) -> bool:
        """Whether its last start was refused before it wrote anything."""
        return self.entry["exit_code"] == 2 and not (self.folder / "config.json").exists()

    def forget(self) -> None:
        """Takes back what its start has left, where the run itself has written nothing."""
        with suppress(OSError):
            (self.folder / "output.log").unlink()
            self.folder.rmdir()


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _orphans_stop() -> None:
    """In a new process: should the study be killed, its runs are told to save and stop (Linux: PR_SET_PDEATHSIG).
    Otherwise they would go on, and lock their folders for whoever starts the study again."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)


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
    devices = [] if c.device == "cpu" else gpus()
    if devices:
        where = "one GPU, one run at a time" if len(devices) == 1 else f"{len(devices)} GPUs, one run on each"
        return [{"CUDA_VISIBLE_DEVICES": name} for name in devices], [], where
    threads = c.threads or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, cores // threads)
    return ([{"OMP_NUM_THREADS": str(threads)}] * count, [f"--threads={threads}"],
            f"{cores} CPU cores, {count} at a time of {threads} thread{'s' * (threads > 1)}")


# ---- All of them -----------------------------------------------------------------------------------------------------


def did(job: Job) -> bool:
    """Whether the last start of a run was with this configuration, but for where it ran and in what pieces."""
    path = Path("runs") / job.run / "config.json"
    if not path.exists():
        return False
    theirs = read_json(path, "delete the folder to start it anew")
    decides = {name for name, stage in DECIDES.items() if stage in job.config.stages}
    mine = json.loads(json_bytes(vars(job.config)))
    return theirs.keys() <= mine.keys() and all(theirs.get(k) == v for k, v in mine.items()
                                                if k not in FREE_FIELDS - decides)


class Study:
    """The runs of one command, and their book: study.json."""

    def __init__(self, c: Config, command: str):
        self.c, self.path = c, Path("runs") / c.run
        self.book = self.path / "study.json"
        known = self._known()
        self.children = []
        for job in jobs(c):
            entry = {"run": job.run, "arm": job.arm, "seed": job.config.seed, "overrides": job.overrides,
                     "after": job.after, "seconds": 0.0, "finished": False, "exit_code": None}
            entry |= {k: v for k, v in known.get(job.run, {}).items() if k in ("seconds", "finished", "exit_code")}
            entry["finished"] = entry["finished"] and did(job)
            self.children.append(Child(job, entry))
        self.command = command
        self.running: dict[int, Child] = {}  # place -> the run there
        self.is_new, self.waiting = not self.book.exists(), False

    def _known(self) -> dict[str, dict]:
        """The runs in study.json by name. InputError where the folder is no study, or one of another configuration."""
        if (self.path / "config.json").exists():
            raise InputError(f"{self.path}: holds a single run, whose report the study's would replace; choose another "
                             f"--run")
        if not self.book.exists():
            return {}
        again = "choose another --run, or delete it to start anew"
        book = read_json(self.book, again)
        theirs, runs = book.get("config"), book.get("runs")
        if book.get("format") != 1 or not isinstance(theirs, dict) or not isinstance(runs, list) or not all(
                isinstance(r, dict) and isinstance(r.get("run"), str) for r in runs):
            raise InputError(f"{self.book}: not a study of this version; {again}")
        for name, mine in self._config().items():
            if theirs.get(name, mine) != mine:
                raise InputError(f"{self.path}: the study was started with {name}={theirs[name]!r}, now {mine!r}; "
                                 f"{again}")
        return {r["run"]: r for r in runs}

    def _config(self) -> dict:
        return {k: v for k, v in dataclasses.asdict(self.c).items() if k not in FREE_FIELDS | {"seed"}}

    def begin(self) -> None:
        self.folder = RunFolder(self.path)
        self.folder.lock()
        self.write()

    def write(self) -> None:
        write_json(self.book, {"format": 1, "command": self.command, "config": self._config(),
                               "runs": [child.entry for child in self.children]})

    # ---- running

    def _ready(self) -> Child | None:
        """The next run to start: not started yet, and the base it needs is there. Runs of a study that was killed may
        still be saving: they are waited for."""
        state, self.waiting = {child.job.run: child for child in self.children}, False
        for child in self.children:
            waits = child.job.after and not state[child.job.after].entry["finished"]
            if not (child.entry["finished"] or child.process or waits):
                if not RunFolder(child.folder).locked():
                    return child
                self.waiting = True
        return None

    def _start(self, spots: Sequence[dict], options: Sequence[str]) -> None:
        for place, environment in enumerate(spots):
            if place not in self.running and (child := self._ready()):
                child.entry["exit_code"] = None
                child.start(options, environment)
                self.running[place] = child

    def _ended(self) -> list[Child]:
        """Takes out the runs that have ended, and books them."""
        ended = []
        for place, child in list(self.running.items()):
            child.note_time()
            if (code := child.process.poll()) is not None:
                child.entry |= {"exit_code": code, "finished": code == 0}
                del self.running[place]
                ended.append(child)
        if ended:
            self.write()
        return ended

    def _say(self, child: Child) -> None:
        entry, count = child.entry, sum(c.entry["finished"] for c in self.children)
        if entry["finished"]:
            said = f"finished after {entry['seconds'] / 60:.1f} minutes, {count} of {len(self.children)} runs"
        else:
            said = f"failed (exit code {entry['exit_code']}): {child.last_line()}"
        tqdm.write(printable(f"{child.folder}: {said}"), file=sys.stderr)

    def _show(self, bar: tqdm) -> None:
        # a run that begins a stage again has done less than was shown
        bar.n = max(bar.n, sum(child.progress()[0] for child in self.children))
        stages = [f"{c.job.run.removeprefix(self.c.run + '.')}: {c.progress()[1]}" for c in self.running.values()]
        more = f" and {len(stages) - SHOWN} more" * (len(stages) > SHOWN)
        bar.set_postfix_str(", ".join(stages[:SHOWN]) + more, refresh=False)
        if sys.stderr.isatty() or time.perf_counter() - self.shown > 60:  # a file gets a line a minute
            bar.refresh()
            self.shown = time.perf_counter()

    def run(self, spots: Sequence[dict], options: Sequence[str], interrupt: Interrupt) -> bool:
        """Runs what is not finished. False where it was interrupted; then every run has saved and ended."""
        tqdm.monitor_interval = 0  # no thread beside the one that starts processes
        began = sum(child.progress()[0] for child in self.children)
        told, self.shown = False, -math.inf
        with tqdm(total=sum(child.total for child in self.children), initial=began, desc="study",
                  smoothing=0, dynamic_ncols=True,
                  bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}, about {remaining} left{postfix}") as bar:
            try:
                while True:
                    if not told and not interrupt.asked:
                        self._start(spots, options)
                    if interrupt.asked and not told:
                        told = True
                        for child in self.running.values():
                            child.signal(signal.SIGTERM)
                    self._show(bar)
                    if not self.running and (told or not self.waiting):
                        return not told
                    time.sleep(POLL)
                    for child in self._ended():
                        if not told:
                            self._refuse_for_all(child)
                            self._say(child)
            except InputError:
                bar.leave = False  # its one line is all there is to say
                raise
            finally:
                self._leave()

    def _refuse_for_all(self, child: Child) -> None:
        """InputError with its words where the first run to end was refused what all of them get."""
        if self.is_new and child.refused() and not any((c.folder / "config.json").exists() for c in self.children):
            for other in self.running.values():
                other.signal(signal.SIGTERM)
                other.process.wait()
            self.running.clear()
            if not any((c.folder / "config.json").exists() for c in self.children):
                message = child.last_line().removeprefix("memtrain: ")
                for other in self.children:
                    other.forget()
                with suppress(OSError):
                    self.book.unlink()
                    (self.path / ".lock").unlink()
                    self.path.rmdir()
                    Path("runs").rmdir()
                raise InputError(message)

    def _leave(self) -> None:
        """No process outlives the study: what is still running here was left by a second Ctrl-C, or by an error."""
        for child in self.running.values():
            child.signal(signal.SIGKILL)
            child.process.wait()
            child.note_time()
        if self.running:
            self.running.clear()
            self.write()


def report(study: Study) -> None:
    """The pooled report, over all runs that were evaluated."""
    from eval.report.page import write_report

    first, *others = [child.folder for child in study.children if child.job.arm != "base"]
    path = write_report(first, others, study.path)
    print(printable(f"\n{path.read_text(encoding='utf-8')}\nreport: {path}"))


def header(study: Study, where: str) -> None:
    arms = Counter(child.job.arm for child in study.children)
    finished = sum(child.entry["finished"] for child in study.children)
    print(printable(f"memtrain  study {study.path}: {len(study.children)} runs, {finished} of them finished; {where}\n"
                    f"  arms     {', '.join(f'{name} x {n}' for name, n in arms.items())}\n"
                    f"  output   of each run in {study.path}.*/output.log"), flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs the study that a command line of memtrain.py asks for; returns the exit code. InputError on bad input."""
    c, command = parse(argv), shlex.join(["python", "memtrain.py", *argv])
    study, interrupt = Study(c, command), Interrupt()
    if all(child.entry["finished"] for child in study.children):
        spots, options, where = [], [], "nothing left to run"
    else:
        spots, options, where = places(c)
    header(study, where)
    study.begin()
    try:
        went_through = study.run(spots, options, interrupt)
    except KeyboardInterrupt:
        went_through = False
    if not went_through:
        print(f"stopped; continue with: {command}", file=sys.stderr)
        return 130
    if missing := [child.job.run for child in study.children if not child.entry["finished"]]:
        print(printable(f"memtrain: no report: {len(missing)} of {len(study.children)} runs are not finished "
                        f"({', '.join(missing[:3])}{' ...' * (len(missing) > 3)}); the same command tries them again"),
              file=sys.stderr)
        return 1
    if "report" in c.stages.split(",") and any(child.job.arm != "base" for child in study.children):
        report(study)
    return 0
