"""Files that are never left half written. Loads nothing heavy.

Every file is written under a temporary name, flushed to the disk and renamed: a reader finds the old one or the new
one, whole. What is no file, such as a device or a pipe, is written to and stays what it is.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from data import InputError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """InputError that names `path` where the disk refuses what is written within."""
    try:
        yield
    except OSError as e:
        raise InputError(f"{path}: can't write ({e.strerror or e}); make room or choose a writable "
                         f"folder, then run the same command again") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name to write to, which becomes `path`, all or nothing. The one way to every output.

    A link is followed, what it names is replaced; a file keeps its permissions. What `standing` opens gets the bytes
    and stays. InputError as in `writing`, and for a folder.
    """
    with writing(path):
        if path.is_dir():
            raise InputError(f"{path}: a folder; give the name of a file")
        if stream := standing(path):
            with stream, TemporaryDirectory() as place:
                temporary = Path(place, path.name)
                yield temporary
                with temporary.open("rb") as file:
                    shutil.copyfileobj(file, stream)
            return
        path = Path(os.path.realpath(path))
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # what a killed process left; a link goes, what it points to stays
            yield temporary
            flush(temporary)
            with suppress(FileNotFoundError):
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
            flush(path.parent)  # else the new name may be lost with the power
        finally:  # also after what the caller raises within, such as a refused copy of the previous checkpoint
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def standing(path: Path) -> BinaryIO | None:
    """Opens what can be written to but not replaced: a device, a pipe, a socket, and where standard output and error
    go, even if that is a file. None for anything else. OSError as from open."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError):
            if os.path.samestat(there, os.fstat(number)):
                stream.flush()  # what was printed comes first
                return os.fdopen(os.dup(number), "wb")  # a name opened anew would begin at the file's start
    return None if stat.S_ISREG(there.st_mode) else path.open("wb")


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # can't open a folder, nor sync what is open for reading; only a power cut tells
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def second_name(path: Path, other: Path) -> None:
    """Makes `other` one more name of the file `path`, all or nothing; a copy where the file system has no links.

    Only for files that are replaced and never written to again: a link shares the bytes. InputError as in `writing`.
    """
    with replacing(other) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def read_json(path: Path, remedy: str) -> dict:
    """The JSON object in a file; InputError with `remedy` if it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__} instead of a JSON object; {remedy}")
    return value


def json_bytes(value) -> bytes:
    """A line for each field of an object, and for each object of a list in it: what changes is seen line by line."""
    def lines(value) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(json.dumps(x) for x in value) + "\n ]"
        return json.dumps(value)

    if not isinstance(value, dict):
        return (lines(value) + "\n").encode()
    fields = ",\n ".join(f"{json.dumps(name)}: {lines(x)}" for name, x in value.items())
    return f"{{\n {fields}\n}}\n".encode()


def write_json(path: Path, value) -> None:
    """InputError where it can't be written; what was there is then intact."""
    with replacing(path) as temporary:
        temporary.write_bytes(json_bytes(value))


ROOT = Path(__file__).parents[2]
SOURCE = {"memtrain.py", "data", "kernels", "eval", "tests", "README.md", "LICENSE", "pyproject.toml",
          "requirements.txt", ".git", ".gitattributes", ".gitignore", ".ci"}


def output(path: Path, option: str = "--out", inputs: Iterable[str | Path] | None = None) -> Path:
    """`path`, given by `option`, as a place to write to. InputError if it is part of this repository's own source.

    Links are resolved first. Inside the repository, eval/results, runs and what is not source are fine. inputs: of a
    command that writes one file, what it reads: a folder, and one of those, are refused before any work is done.
    """
    try:
        place = path.resolve()
        path.is_dir()
    except (OSError, RuntimeError) as error:  # Python 3.11 has no class for links that lead in a circle
        why = getattr(error, "strerror", None) or "its links lead in a circle"
        raise InputError(f"{option} {path}: no place to write to ({why}); give another name") from error
    if place == ROOT or (place.is_relative_to(ROOT) and place.relative_to(ROOT).parts[0] in SOURCE
                         and not place.is_relative_to(ROOT / "eval" / "results")):
        raise InputError(f"{option} {path}: that is where the source of memtrain lies; write to runs/, eval/results/ "
                         f"or outside the repository")
    if inputs is not None and path.is_dir():
        raise InputError(f"{option} {path}: a folder; give the name of a file")
    if path.is_file() and any(os.path.exists(i) and path.samefile(i) for i in inputs or ()):
        raise InputError(f"{option} {path}: is read by this command, and would be overwritten; give another name")
    return path
