"""Data sets of the Hugging Face hub: streamed once, at a pinned commit, and from then on read from the disk.

    HF_HOME/memtrain/hotpotqa--hotpot_qa-distractor-validation-200-1908d6afbbea.jsonl.gz

holds the first 200 rows of that split, a JSON line a row. gzip closes with a checksum: a file that was cut off or
changed is noticed. Loads `datasets` only where something has to be fetched.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data import InputError
from data.run.files import writing


@dataclass(frozen=True)
class Source:
    """A data set on the hub: where, which commit, which columns to keep, and what to use where there is no hub."""

    name: str
    config: str
    revision: str  # a commit: the same rows in every run
    columns: tuple[str, ...]
    instead: str


def rows(source: Source, split: str, limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line k", row) of the first `limit` rows of a split, fetched at the first call.

    InputError if they are not on the disk and the hub can't be reached, if they can't be written, and if what is on
    the disk is damaged.
    """
    path = cached(source, split, limit)
    if not path.exists():
        _fetch(source, split, limit, path)
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")  # to its end, where the checksum stands
        if not text:
            raise EOFError("empty")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged or unreadable ({error}); delete it, and it is fetched again") from error
    for number, line in enumerate(text.splitlines(), start=1):
        yield f"{path}, line {number}", json.loads(line)


def cached(source: Source, split: str, limit: int) -> Path:
    """The file that keeps these rows."""
    parts = (source.name.replace("/", "--"), source.config, split, str(limit), source.revision[:12])
    return kept("-".join(parts) + ".jsonl.gz")


def kept(name: str) -> Path:
    """A file that outlives a run, in the folder that HF_HOME names (default ~/.cache/huggingface)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home, "memtrain", name).expanduser()


def _fetch(source: Source, split: str, limit: int, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as own:  # two runs may fetch the same rows side by side
            part = Path(own, path.name)
            with gzip.open(part, "wt", compresslevel=1, encoding="ascii") as file:
                for row in _stream(source, split, limit):
                    file.write(json.dumps(row) + "\n")
            os.replace(part, path)


def _stream(source: Source, split: str, limit: int) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
        from huggingface_hub import HfApi
        from tqdm import tqdm

        # One question without retries: with no network, load_dataset alone would try for half a minute.
        HfApi().dataset_info(source.name, revision=source.revision, timeout=10)
        stream = load_dataset(source.name, source.config, revision=source.revision, split=split, streaming=True)
        for row in tqdm(islice(stream, limit), f"{source.name}, {split}", limit, leave=False, unit="row"):
            yield {c: row[c] for c in source.columns}
    except Exception as error:  # no package, no network, errors of the hub: many classes, one thing to do
        problem = f"{source.name}: cannot be streamed from the hub ({type(error).__name__})"
        raise InputError(f"{problem}; {source.instead}") from error
