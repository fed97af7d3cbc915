"""A run's folder: who may work in it, what it has learned so far, and how a run is interrupted."""

from __future__ import annotations

import fcntl
import json
import signal
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.files import replacing, write_json, writing


class RunFolder:
    """runs/<name>: configuration, lock, and where the checkpoints of its stages lie."""

    def __init__(self, path: Path):
        self.path = path

    def compare(self, config: dict, free: Iterable[str]) -> None:
        """InputError if the folder was started with another configuration; the fields `free` may differ."""
        path = self.path / "config.json"
        theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
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

    def checkpoint(self, name: str) -> Path:
        return self.path / name / "checkpoint.safetensors"

    def finished(self, name: str) -> dict | None:
        """The state of a completed stage, or None."""
        path = self.checkpoint(name).with_suffix(".json")
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return state if state.get("done") else None


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


class Stopped(Exception):
    """The run was interrupted and left resumable."""
