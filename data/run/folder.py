"""A run's folder: who may work in it, what it has learned so far, and how a run is interrupted."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

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
    """metrics.jsonl, a line a step, and wandb where asked for."""

    def __init__(self, folder: Path, config: dict):
        self.path, self.wandb = folder / "metrics.jsonl", None
        if config["wandb"] != "disabled":
            self.wandb = Wandb(folder, config)

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
        if self.wandb:
            self.wandb.log({f"{row['stage']}/{k}": v for k, v in row.items() if k != "stage"})

    def close(self) -> None:
        if self.wandb:
            self.wandb.close()


class Wandb:
    """wandb in a thread of its own, behind a queue: should it fail or hang, the run goes on after one note.

    Online, its id is drawn once and kept in the run folder, so that a run taken up again goes on in the same curves.
    Offline, wandb resumes nothing: of two starts with one id, the sync of one would replace the other. So each is a run
    of its own there, all in one group; every curve is drawn over its stage's own step, and so goes on. InputError where
    the package is missing.
    """

    patience = 15.0  # seconds that the end of a run waits for its last rows to be sent

    def __init__(self, folder: Path, config: dict):
        try:
            import wandb
        except ImportError as e:
            raise InputError(f"--wandb {config['wandb']}: {e}; pip install wandb, or leave --wandb out") from None
        known = folder / "wandb.json"
        if not known.exists():
            write_json(known, {"id": f"{config['run'][:40]}-{uuid.uuid4().hex[:8]}"})
        id_ = read_json(known, "delete it to begin new curves").get("id")
        own, offline = id_, config["wandb"] == "offline"
        if offline:
            own = f"{id_}-{uuid.uuid4().hex[:8]}"
            if (folder / "metrics.jsonl").exists():
                note(f"wandb: offline, no run is resumed: this start is a run of its own, {own}, in the group {id_}; "
                     f"wandb sync takes them all")
        self.rows: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self.settings = {"project": "memtrain", "name": config["run"], "id": own, "group": id_,
                         "resume": None if offline else "allow", "mode": config["wandb"], "dir": str(folder),
                         "config": config}
        self.thread = threading.Thread(target=self._send, args=(wandb,), daemon=True)
        self.thread.start()

    def _send(self, wandb) -> None:
        try:
            run = wandb.init(**self.settings)
            axes: set[str] = set()
            while (row := self.rows.get()) is not None:
                for axis in [k for k in row if k.endswith("/step") and k not in axes]:
                    run.define_metric(axis.removesuffix("step") + "*", step_metric=axis)
                    axes.add(axis)
                run.log(row)
            run.finish()
        except BaseException as e:  # no class of exceptions covers a network; nor is it this run's to end
            self._give_up(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")

    def _give_up(self, why: str) -> None:
        note(f"wandb: {why}; the run goes on without it, metrics.jsonl has every row")

    def log(self, row: dict) -> None:
        if self.thread.is_alive():
            self.rows.put(row)

    def close(self) -> None:
        """Waits for the last rows, but not for ever."""
        waiting = self.thread.is_alive()
        self.rows.put(None)
        self.thread.join(self.patience)
        if waiting and self.thread.is_alive():
            self._give_up(f"no answer within {self.patience:g} seconds")


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
