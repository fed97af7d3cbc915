"""What a run measured, read from its folder and checked: results.json of form 2, metrics.jsonl, readings.json.

Everything here came from outside and may be anything: what a report can't be built on ends in one line (InputError).
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import InputError
from data.config import FREE_FIELDS, UNTRAINED, Config
from data.run.files import read_json

FORMAT = 2  # of results.json
SYSTEMS = {  # name in results.json: name in print
    "base-one-window": "Base, one window", "base": "Base", "memtrain": "+ MemTrain", "memagent": "+ MemAgent",
    "memtrain+memagent": "+ MemTrain + MemAgent", "mem1": "+ MEM1", "memtrain+mem1": "+ MemTrain + MEM1",
}
# In what runs of one arm may differ: their seed, the machine's fields, where a base lies, what is kept. Of older runs
# also where an index was.
UNSHARED = (FREE_FIELDS | UNTRAINED | {"index"}) - {"world"}
SHAPE = {f.name for f in dataclasses.fields(Config) if f.metadata["group"] == "model"} | {"model"}  # a backbone


def number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value) -> bool:
    return number(value) and value == int(value) and value >= 0


def _pair(value) -> bool:
    return (isinstance(value, list) and len(value) == 2 and number(value[0]) and _count(value[1])
            and 0 <= value[0] <= value[1])


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


CHECKS: dict[str, tuple[Callable, str]] = {
    "system": (lambda v: isinstance(v, str) and re.sub(r"@\d+$", "", v) in SYSTEMS,
               f"one of {', '.join(SYSTEMS)}, with @N after N steps"),
    "text": (lambda v: isinstance(v, str), "a text"),
    "texts": (_texts, "a list of texts"),
    "count": (_count, "a whole number, not negative"),
    "number": (number, "a number"),
    "positive": (lambda v: number(v) and v > 0, "a number above 0"),
    "share": (lambda v: number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "bits": (lambda v: isinstance(v, list) and all(_count(x) and x <= 1 for x in v), "zeros and ones"),
    "bit": (lambda v: _count(v) and v <= 1, "0 or 1"),
    "kinds": (lambda v: isinstance(v, dict) and all(map(_pair, v.values())), "{kind: [sum, asked]}"),
    "marks": (lambda v: isinstance(v, str) and v.isascii() and v.isalnum(), "a letter or digit for each question"),
    "pairs": (lambda v: isinstance(v, list) and all(map(_pair, v)), "a list of [kept, asked]"),
    "object": (lambda v: isinstance(v, dict), "an object"),
}
# section: fields of its rows; ? marks those that may be missing or null. All others are numbers.
SCHEMA = {
    "long_qa": "system:system seed:count length:positive n:positive em:share em_low:share em_high:share correct:bits "
               "kinds?:kinds locomo_f1?:kinds",
    "recall": "system:system seed:count n:count accuracy:share low:share high:share",
    "masked": "system:system seed:count n:positive em:share em_low:share em_high:share",
    "stages": "name:text",
    "search_qa": "system:system seed:count benchmark:text n:positive em:share em_low:share em_high:share correct:bits",
    "changing": "system:system seed:count length:positive n:positive em:share em_low:share em_high:share correct:bits "
                "asked:marks stale:marks changes:marks distance:marks kinds?:kinds",
    "memory": "system:system seed:count length:positive n:positive task?:text unit?:text retention?:pairs",
}
ONCE = {  # section: with system and seed, what tells a measurement from another
    "long_qa": ("length",), "recall": (), "masked": ("sections",), "search_qa": ("benchmark",),
    "memory": ("task", "length"), "changing": ("length",)}
DOCUMENT = ("id:text task:text kind:text length:count question:text answers:texts sections:texts gold:texts "
            "marks:texts outdated?:texts systems:object")  # of readings.json
READING = "memories:texts answer?:text correct?:bit"


@dataclass(frozen=True)
class Run:
    """One run folder, read and checked."""

    path: Path
    environment: dict
    config: dict
    results: dict
    metrics: list[dict]  # one per training step
    readings: list[dict] = field(default_factory=list)  # documents of readings.json

    @property
    def setting(self) -> dict:
        """Every field that runs of one arm must share; what an older run doesn't name is the default."""
        filled = dataclasses.asdict(Config()) | self.config
        return {name: value for name, value in filled.items() if name not in UNSHARED}

    @property
    def shape(self) -> dict:
        return {name: value for name, value in self.setting.items() if name in SHAPE}


def _check(where: str, row, fields: str) -> set[str]:
    """The names of these fields. InputError unless `row` is an object that has them."""
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object")
    names = set()
    for name, kind in (item.split(":") for item in fields.split()):
        name, optional = name.rstrip("?"), name.endswith("?")
        names.add(name)
        if optional and row.get(name) is None:
            continue
        if name not in row:
            raise InputError(f"{where} has no {name!r}")
        good, meaning = CHECKS[kind]
        if not good(row[name]):
            raise InputError(f"{where}.{name} must be {meaning}, not {row[name]!r:.60}")
    return names


def _check_rows(path: Path, section: str, rows) -> list[dict]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: {section} must be a list of objects")
    for index, row in enumerate(rows):
        where = f"{path}: {section}[{index}]"
        if isinstance(bits := row.get("correct"), str) and not bits.strip("01"):  # "0110"; older runs hold a list
            row["correct"] = list(map(int, bits))
        named = _check(where, row, SCHEMA[section])
        if odd := [k for k, v in row.items() if k not in named and v is not None and not number(v)]:
            raise InputError(f"{where}.{odd[0]} must be a number, not {row[odd[0]]!r:.60}")
        if "correct" in row:
            asked, right = row["n"] * (2 if section == "search_qa" else 1), sum(row["correct"])
            if len(row["correct"]) != asked or abs(right / asked - row["em"]) > 1e-3:
                raise InputError(f"{where}: 'correct' disagrees with 'n' or 'em'")
        if section == "changing" and any(len(row[k]) != row["n"] for k in ("asked", "stale", "changes", "distance")):
            raise InputError(f"{where}: 'asked', 'stale', 'changes' and 'distance' need one letter for each of 'n'")
    return rows


def _read_metrics(path: Path) -> list[dict]:
    """Training steps; a resumed run logs some steps twice, the later line counts."""
    steps: dict = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for position, line in enumerate(lines, 1):
        try:
            row = json.loads(line or "null")
        except ValueError:
            if position == len(lines):  # no newline behind it: the run was stopped while writing
                break
            raise InputError(f"{path}: line {position} is not JSON") from None
        if row is not None:
            _check(f"{path}: line {position}", row, "stage:text step:count")
            steps[row["stage"], row["step"]] = row
    return [steps[key] for key in sorted(steps)]


def load_readings(path: Path) -> list[dict]:
    """Documents of readings.json, each with the memories of several systems; none where the file is missing."""
    again = "delete it and results.json beside it to have both written anew"
    value = read_json(path, again) if path.exists() else {"format": 1, "documents": []}
    if value.get("format") != 1 or not isinstance(value.get("documents"), list):
        raise InputError(f"{path}: readings of another form; {again}")
    try:
        for index, document in enumerate(value["documents"]):
            where = f"{path}: documents[{index}]"
            _check(where, document, DOCUMENT)
            for name, reading in document["systems"].items():
                _check(f"{where}.systems[{name!r:.40}]", reading, READING)
                if len(reading["memories"]) > len(document["sections"]):
                    raise InputError(f"{where}.systems[{name!r:.40}]: more memories than the document has sections")
    except InputError as error:
        raise InputError(f"{error}; {again}") from None
    return value["documents"]


def load_run(path: Path) -> Run:
    """Read one run folder; InputError says in one line what is wrong with it."""
    path = Path(path)
    source = path / "results.json"
    results = read_json(source, "the run has to reach its evaluation first")
    if results.get("format") != FORMAT:
        raise InputError(f"{source}: of an older form (format {results.get('format')!r:.20}, needed: {FORMAT}); move "
                         f"it away and run the same command again to evaluate anew")
    _check(str(source), results, "environment?:object config?:object evaluation?:object")
    for section in SCHEMA:
        results[section] = _check_rows(source, section, results.get(section, []))
    _check(f"{source}: evaluation", results.get("evaluation", {}), "seconds?:number")
    if not results["long_qa"] and not results["search_qa"]:
        raise InputError(f"{source}: long_qa is empty: nothing was evaluated")
    config = results.get("config") or read_json(path / "config.json", "the run has to be started first")
    if not all(isinstance(value, str | int | float | bool | None) for value in config.values()):
        raise InputError(f"{source}: config must hold plain values")
    return Run(path, results.get("environment", {}), config, results, _read_metrics(path / "metrics.jsonl"),
               load_readings(path / "readings.json"))


def refuse_repeats(runs: Sequence[Run]) -> None:
    """InputError where a measurement occurs twice in runs that are to be pooled: a seed was given twice."""
    for section, at in ONCE.items():
        seen: dict = {}
        for run in runs:
            for row in run.results[section]:
                key = row["system"], row["seed"], *(row.get(name) for name in at)
                if key in seen:
                    raise InputError(f"{run.path}: {section} of {row['system']}, seed {row['seed']} is already in "
                                     f"{seen[key]}; pool runs of different seeds")
                seen[key] = run.path
