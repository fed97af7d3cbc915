"""Files that are never left half written. Loads nothing heavy.

Every file is written under a temporary name, flushed to the disk and renamed: a reader finds the old one or the new
one, whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Yields a name to write to, which becomes `path`, all or nothing. InputError as in `writing`."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # also what the caller raises within, such as a refused copy of the previous checkpoint
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value) -> None:
    """InputError where it can't be written; what was there is then intact."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
