"""The verbs of the command line beside the run itself. Nothing heavy is loaded before one is at work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from data import InputError
from data.config import PRESETS, as_evaluated, command_options, parse
from data.run.files import output


def plan(argv: Sequence[str]) -> None:
    """python memtrain.py plan: what a configuration will need."""
    from eval.plan import main

    main(argv, parse, PRESETS)


def study(argv: Sequence[str]) -> int:
    """python memtrain.py --seeds ... --ablations --scaling: several runs, each a process, and one report of them."""
    from eval.study import main

    return main(argv)


def read(argv: Sequence[str], open_checkpoint: Callable, agent: Callable) -> None:
    """python memtrain.py read FILE: the memory after each section of a text, then the answer."""
    import torch

    from data.run.folder import Interrupt
    from eval.read import read

    options, fields = command_options("read", argv)
    policy = open_checkpoint(options, fields)
    c = as_evaluated(policy.c)
    torch.set_num_threads(c.threads or os.cpu_count() or 1)
    read(agent(policy.model, policy.tokenizer, c), options.file, options.question, options.out, Interrupt())


def gates(argv: Sequence[str], open_checkpoint: Callable, agent: Callable) -> int:
    """python memtrain.py gates: whether a base is fit to start reinforcement learning from; 1 where it is not."""
    from eval.gates import gates, passed

    policy = open_checkpoint(*command_options("gates", argv))
    return int(not passed(gates(agent(policy.model, policy.tokenizer, policy.c), policy.c)))


def export(argv: Sequence[str], open_checkpoint: Callable) -> None:
    """python memtrain.py export: a checkpoint in the form that other tools read."""
    from data.weights.pretrained import export_adapter, export_weights

    options, fields = command_options("export", argv)
    if output(options.to).exists() and not (options.to.is_dir() and not any(options.to.iterdir())):
        raise InputError(f"--to {options.to}: exists and is not an empty folder; give a new one")
    policy = open_checkpoint(options, fields)
    if options.format == "peft":
        export_adapter(options.to, policy.model)
    else:
        export_weights(options.to, policy.model, policy.source)
    print(f"{options.to}: {', '.join(sorted(p.name for p in options.to.iterdir()))}")
