"""The runs that a study consists of: one of each seed, and one of each seed for every arm of a comparison.

    base                  one for all of them, where --stages has it, of --seed: like a published model
    full, of each seed    the command without --seeds
    an arm, of each seed  the full run but for a few fields (ABLATIONS); it trains and evaluates what it needs alone

Each is an ordinary configuration, whose run could be started by hand with arguments(config).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from data import InputError
from data.config import (
    ARM_SECTIONS,
    CLAIMED,
    OTHER_BASE,
    PRESETS,
    SCALING,
    STUDY,
    TRAINED,
    Config,
    ablations,
    flag,
    lengths_of,
    parse,
    seeds_of,
)


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    arm: str
    config: Config

    @property
    def run(self) -> str:
        return self.config.run


def arguments(c: Config) -> list[str]:
    """The options that give the configuration `c`: those that differ from its preset's."""
    preset = dataclasses.replace(Config(), **({"run": c.preset} | PRESETS[c.preset]))
    given = [f"--preset={c.preset}"] * (c.preset != Config().preset)
    for f in dataclasses.fields(Config):
        value = getattr(c, f.name)
        fixed = f.name == "preset" or (c.model and f.metadata["group"] == "model")  # --model has a shape of its own
        if not fixed and value != getattr(preset, f.name):
            given.append(f"{flag(f.name)}={str(value).lower() if f.type == 'bool' else value}")
    return given


def jobs(c: Config) -> list[Job]:
    """The runs of the study that `c` asks for, in the order in which they are best started: a base before what starts
    from it, and all seeds of an arm before the next one. InputError where one of them can't work."""
    seeds, wanted = seeds_of(c), [s for s in c.stages.split(",") if s not in ("base", "report")]
    alone = dataclasses.replace(c, **dict.fromkeys(STUDY, False) | {"seeds": ""})
    arms = {name: change for name, change in ablations(vars(c)).items()
            if (c.scaling if name in SCALING else c.ablations)}
    short = ",".join(str(n) for n in lengths_of(c) if n <= ARM_SECTIONS) or c.eval_lengths
    made = []
    if "base" in c.stages.split(","):
        base = dataclasses.replace(alone, run=f"{c.run}.base", stages="base")
        made.append(Job("base", base))
        alone = dataclasses.replace(alone, init=str(Path("runs", base.run, "base", "checkpoint.safetensors")))
    if wanted:
        own = dataclasses.replace(alone, stages=",".join(wanted))
        made += [Job("full", dataclasses.replace(own, run=f"{c.run}.s{s}", seed=s)) for s in seeds]
    for name, change in arms.items():
        trains = {"longer-memagent": ("memagent",), "settled": TRAINED}.get(name, ("memtrain", "memtrain+memagent"))
        shown = [*(s for s in trains if s != "memtrain"),
                 *(f"{trains[-1]}@{n}" for n in change.get("keep_steps", "").split(",") if n)]
        own = dataclasses.replace(alone, **change, stages=",".join([*trains, "eval"]),
                                  eval_lengths=c.eval_lengths if name in CLAIMED else short,
                                  eval_systems=",".join([*["base"] * (name in OTHER_BASE), *shown]))
        made += [Job(name, dataclasses.replace(own, run=f"{c.run}.s{s}.{name}", seed=s)) for s in seeds]
    if not made:
        raise InputError(f"--stages {c.stages}: leaves the runs of a study nothing to do; python -m eval.report RUN "
                         f"[RUN ...] builds a report anew")
    for job in made:
        parse(arguments(job.config))  # refuses what can't work, before anything is started
    return made
