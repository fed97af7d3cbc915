"""A run's folder: who may work in it, what it has learned so far, and how a run is interrupted."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data import InputError
from data.run.files import json_bytes, read_json, replacing, write_json, writing
from data.run.terminal import note


class RunFolder:
    """runs/<name>: configuration, lock, and where the checkpoints of its stages lie.

    It may be a link to another disk; what lies in it may not, so that nothing is written or removed elsewhere.
    """

    def __init__(self, path: Path):
        self.path = path
        self.held = FileLock(path / ".lock", is_singleton=True)  # the system's: it goes with the process that holds it

    def compare(self, config: dict, free: Iterable[str], defaults: dict) -> None:
        """InputError if the folder was started with another configuration, in which the fields `free` may differ, or
        holds a link. defaults: of fields that a run of an older version did not have."""
        for entry in (*self.path.glob("*"), *self.path.glob("*/*")):
            if entry.is_symlink() and entry.parent.name != "wandb":  # wandb links to its own latest run
                raise InputError(f"{entry}: a symbolic link, behind which files outside the run would be overwritten; "
                                 f"put a file or folder in its place (the run folder itself may be a link)")
        if (self.path / "study.json").exists():
            raise InputError(f"{self.path}: holds the report of a study; choose another --run")
        path = self.path / "config.json"
        theirs = read_json(path, "choose another --run, or delete the folder to start anew") if path.exists() else {}
        if odd := theirs.keys() - config.keys():
            raise InputError(f"{path}: {min(odd)} is no option of this version; choose another --run, or delete the "
                             f"folder to start anew")
        for name, mine in config.items():
            if theirs and name not in free and (old := theirs.get(name, defaults[name])) != mine:
                raise InputError(f"{self.path}: was started with {name}={old!r}, now {mine!r}; "
                                 f"choose another --run, or delete the folder to start anew")

    def claim(self, config: dict) -> None:
        """Creates the folder and writes the configuration. One process a folder."""
        self.lock()
        write_json(self.path / "config.json", config)
        self.tidy()

    def lock(self) -> None:
        """Creates the folder and keeps others out of it until this process ends, however it ends. InputError where
        another has."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.held.acquire(blocking=False)
            except Timeout:
                raise InputError(f"{self.path}: another process is at work on it; wait for it or choose another "
                                 f"--run") from None

    def locked(self) -> bool:
        """Whether another process is at work on it."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with self.held.acquire(blocking=False):
                return False
        except OSError:  # filelock's Timeout is one
            return True

    def tidy(self) -> None:
        """Clears up behind a killed process: half written files go, and each .json says what its checkpoint holds."""
        with writing(self.path):
            for temporary in (*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")):
                temporary.unlink()
        for path in self.path.glob("*/checkpoint.safetensors"):
            copy = path.with_suffix(".json")
            if (state := stored_state(path)) and not (copy.exists() and copy.read_bytes() == json_bytes(state)):
                write_json(copy, state)

    def measured(self, world: str) -> Path:
        """Where the results of an evaluation lie: those on the development world apart from the others."""
        return self.path / "dev" if world == "dev" else self.path

    def checkpoint(self, name: str) -> Path:
        return self.path / name / "checkpoint.safetensors"

    def finished(self, name: str) -> dict | None:
        """The state of a completed stage, or None. Read from the checkpoint itself: the .json beside it is written
        after it, and may speak of another one."""
        state = stored_state(self.checkpoint(name))
        return state if state.get("done") else None


def stored_state(path: Path) -> dict:
    """The state that a checkpoint holds, unverified; {} where there is none. Reads the header alone, without torch:
    eight bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(json.loads(file.read(min(length, 100_000_000)))["__metadata__"]["state"])
    except (OSError, ValueError, LookupError, TypeError):  # a damaged one is refused, and named, where it is loaded
        return {}


def brief(row: dict) -> dict:
    """Six digits of what is no whole number."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) and not v.is_integer() else v for k, v in row.items()}


class Log:
    """metrics.jsonl, a line a step, and wandb where asked for: should it fail, the run goes on after one note."""

    def __init__(self, folder: Path, config: dict):
        self.path, self.wandb = folder / "metrics.jsonl", None
        if config["wandb"] != "disabled":
            self._try(lambda: start_wandb(folder, config))

    def rewind(self, stage: str, step: int) -> None:
        """Forgets lines of `stage` from `step` on, and a line that a crash left half written."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row["stage"] != stage or row["step"] < step:
                    kept.append(line + "\n")
            with replacing(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, row: dict) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(brief(row)) + "\n")  # a half written line is forgotten at the next start
        stage = row["stage"]
        self._try(lambda: self.wandb.log({f"{stage}/{k}": v for k, v in row.items() if k != "stage"}), self.wandb)

    def close(self) -> None:
        self._try(lambda: self.wandb.finish(), self.wandb)

    def _try(self, call: Callable, wanted: object = True) -> None:
        """Calls, where wandb is wanted; what goes wrong there is no reason to stop."""
        try:
            self.wandb = (call() or self.wandb) if wanted else None
        except InputError:
            raise
        except Exception as e:  # no class of exceptions covers a network
            note(f"wandb: {type(e).__name__}: {' '.join(str(e).split())[:200]}; the run goes on without it, "
                 f"metrics.jsonl has every row")
            self.wandb = None


def start_wandb(folder: Path, config: dict) -> Any:
    """A run of wandb, whose curves are drawn over the steps of their own stage.

    Online, its id is drawn once and kept in the run folder, so that a run taken up again goes on in the same curves.
    Offline, wandb resumes nothing: of two starts with one id, the sync of one would replace the other. So each is a run
    of its own there, all in one group. InputError where the package is missing.
    """
    try:
        import wandb
    except ImportError as e:
        raise InputError(f"--wandb {config['wandb']}: {e}; pip install wandb, or leave --wandb out") from None
    known = folder / "wandb.json"
    if not known.exists():
        write_json(known, {"id": f"{config['run'][:40]}-{uuid.uuid4().hex[:8]}"})
    own = id_ = read_json(known, "delete it to begin new curves").get("id")
    if config["wandb"] == "offline":
        own = f"{id_}-{uuid.uuid4().hex[:8]}"
        if (folder / "metrics.jsonl").exists():
            note(f"wandb: offline, no run is resumed: this start is a run of its own, {own}, in the group {id_}; "
                 f"wandb sync takes them all")
    run = wandb.init(project="memtrain", name=config["run"], id=own, group=id_, mode=config["wandb"], dir=str(folder),
                     resume=None if own != id_ else "allow", config=config)
    for stage in config["stages"].split(","):
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run


HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none


class Interrupt:
    """Ctrl-C or SIGTERM once: finish the step, save, leave. Twice: leave at once. SIGHUP, from a terminal that is
    closed: go on."""

    asked = False

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)
        for number in HANGUP:
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # straight to the file: the signal may have come in the middle of a print
            os.write(2, b"\nstopping after this step (again to stop at once) ...\n")


def deaf(worker: int) -> None:
    """For a process that helps a run: the terminal sends Ctrl-C to both, and only the run decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM, *HANGUP):
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """The run was interrupted and left resumable."""
