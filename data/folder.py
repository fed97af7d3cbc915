"""A run's folder: who may work in it, what it has learned so far, and how a run is interrupted."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.files import json_bytes, read_json, replacing, write_json, writing


class RunFolder:
    """runs/<name>: configuration, lock, and where the checkpoints of its stages lie.

    It may be a link to another disk; what lies in it may not, so that nothing is written or removed elsewhere.
    """

    def __init__(self, path: Path):
        self.path = path

    def compare(self, config: dict, free: Iterable[str]) -> None:
        """InputError if the folder was started with another configuration, in which the fields `free` may differ, or
        holds a link."""
        for entry in (*self.path.glob("*"), *self.path.glob("*/*")):
            if entry.is_symlink() and entry.parent.name != "wandb":  # wandb links to its own latest run
                raise InputError(f"{entry}: a symbolic link, behind which files outside the run would be overwritten; "
                                 f"put a file or folder in its place (the run folder itself may be a link)")
        path = self.path / "config.json"
        theirs = read_json(path, "choose another --run, or delete the folder to start anew") if path.exists() else {}
        for name, mine in config.items():
            if theirs and name not in free and theirs.get(name) != mine:
                raise InputError(f"{self.path}: was started with {name}={theirs.get(name)!r}, now {mine!r}; "
                                 f"choose another --run, or delete the folder to start anew")

    def claim(self, config: dict) -> None:
        """Creates the folder and writes the configuration. One process a folder: the lock ends with its process,
        however that ends."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self.path}: another process is at work on it; wait for it or choose another "
                             f"--run") from None
        write_json(self.path / "config.json", config)
        self.tidy()

    def tidy(self) -> None:
        """Clears up behind a killed process: half written files go, and each .json says what its checkpoint holds."""
        with writing(self.path):
            for temporary in (*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")):
                temporary.unlink()
        for path in self.path.glob("*/checkpoint.safetensors"):
            copy = path.with_suffix(".json")
            if (state := stored_state(path)) and not (copy.exists() and copy.read_bytes() == json_bytes(state)):
                write_json(copy, state)

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


class Log:
    """metrics.jsonl, a line a step, and wandb where asked for."""

    def __init__(self, folder: Path, config: dict):
        self.path, self.wandb = folder / "metrics.jsonl", None
        if config["wandb"] != "disabled":
            import wandb

            self.wandb = wandb.init(project="memtrain", name=config["run"], id=config["run"], resume="allow",
                                    mode=config["wandb"], dir=str(folder), config=config)

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
            file.write(json.dumps(row) + "\n")  # a half written line is forgotten at the next start
        if self.wandb:
            self.wandb.log({f"{row['stage']}/{k}": v for k, v in row.items() if k != "stage"})


class Interrupt:
    """Ctrl-C or SIGTERM once: finish the step, save, leave. Twice: leave at once."""

    asked = False

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step (again to stop at once) ...")


def deaf(worker: int) -> None:
    """For a process that helps a run: the terminal sends Ctrl-C to both, and only the run decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """The run was interrupted and left resumable."""
