"""The verbs of the command line beside the run itself. Nothing heavy is loaded before one is at work."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data import InputError
from data.config import FREE_FIELDS, as_evaluated, check, command_options, flag, given_fields, parse, read_config
from data.run.files import output


def open_checkpoint(options: argparse.Namespace, fields: Sequence[str], policy: Callable) -> Any:
    """The policy of --checkpoint RUN/STAGE, with the configuration of its run, or the base that `fields` describe.
    policy: memtrain.Policy.of. Nothing is trained or evaluated: fields that only that needs are not looked at."""
    idle = ["--stages", "report"]
    if options.checkpoint is None:
        c = parse([*idle, *fields])
        return policy(c, Path("runs") / c.run)
    stage = options.checkpoint.parent if options.checkpoint.suffix else options.checkpoint
    path, remedy = stage / "checkpoint.safetensors", "give RUN/STAGE, like runs/nano/memtrain"
    if not path.is_file():
        raise InputError(f"--checkpoint {options.checkpoint}: there is no {path}; {remedy}")
    theirs = read_config(stage.parent / "config.json", remedy)
    given = given_fields([*idle, *fields])
    if fixed := given.keys() - FREE_FIELDS - {"seed", "eval_temperature", "eval_top_p"}:
        raise InputError(f"{flag(min(fixed))}: the checkpoint has a value of its own; leave it out")
    c = dataclasses.replace(theirs, **given)
    check(c)
    return policy(c, stage.parent, path)


def plan(argv: Sequence[str]) -> None:
    """python memtrain.py plan: what a configuration will need."""
    from eval.plan import main

    main(argv)


def study(argv: Sequence[str]) -> int:
    """python memtrain.py --seeds ... --ablations --scaling: several runs, each a process, and one report of them."""
    from eval.study import main

    return main(argv)


def read(argv: Sequence[str], policy: Callable, agent: Callable) -> None:
    """python memtrain.py read FILE: the memory after each section of a text, then the answer."""
    import torch

    from data.run.folder import Interrupt
    from eval.read import read

    options, fields = command_options("read", argv)
    opened = open_checkpoint(options, fields, policy)
    c = as_evaluated(opened.c)
    torch.set_num_threads(c.threads or os.cpu_count() or 1)
    read(agent(opened.model, opened.tokenizer, c), options.file, options.question or [], options.out, Interrupt())


def gates(argv: Sequence[str], policy: Callable, agent: Callable, recall_probe: Callable) -> int:
    """python memtrain.py gates: whether a base is fit to start reinforcement learning from, 1 where it is not; of our
    own also whether a step of MemTrain has something to select on."""
    from data.problems import Data
    from eval.gates import gates, passed, real_gates, show
    from eval.health import ROOM, health

    opened = open_checkpoint(*command_options("gates", argv), policy)
    own, c = agent(opened.model, opened.tokenizer, opened.c), opened.c
    if c.model:
        return int(not passed(real_gates(own, c, Data(c, opened.tokenizer))))
    fit = passed(gates(own, c))
    show(health(own, c, recall_probe), ROOM, {"tokens": "sampled a step"},
         "two steps of MemTrain, sampled as in training, nothing trained")
    return int(not fit)


def export(argv: Sequence[str], policy: Callable) -> None:
    """python memtrain.py export: a checkpoint in the form that other tools read."""
    from data.weights.pretrained import export_adapter, export_weights

    options, fields = command_options("export", argv)
    if output(options.to).exists() and not (options.to.is_dir() and not any(options.to.iterdir())):
        raise InputError(f"--to {options.to}: exists and is not an empty folder; give a new one")
    opened = open_checkpoint(options, fields, policy)
    if options.format == "peft":
        export_adapter(options.to, opened.model)
    else:
        export_weights(options.to, opened.model, opened.source)
    print(f"{options.to}: {', '.join(sorted(p.name for p in options.to.iterdir()))}")
