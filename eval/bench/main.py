"""Benchmarks: `python -m eval.bench NAME [options]`, and without a name what there is.

Each prints a table and, with --out FILE, writes the same figures as JSON. It measures memtrain.py from outside, so it
imports it; nothing imports this file. A whole run is measured by `/usr/bin/time -v python memtrain.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import memtrain
from data import InputError
from data.config import STUDY, dashes, flag
from data.run.files import output, replacing, writing
from data.run.terminal import StrictParser, one_line
from eval.bench.gpu_steps import STEPS
from eval.bench.kernels import kernels
from eval.bench.measure import Figures, Row, table
from eval.bench.peers import SHAPES, sample, trl
from eval.bench.step import step
from eval.bench.threads import threads
from eval.stage import environment


def compile_kernels(options, fields, figures: Figures) -> bool:
    """Every kernel compiled for six GPU generations, without a GPU: shared memory, registers, spills."""
    from eval.bench import compile as bench_compile  # needs Triton, and kernels that are not interpreted

    rows = bench_compile.build_all()
    figures.add(kernels=rows)
    print(bench_compile.compile_table(rows))
    return all(r["shared_kb"] <= r["limit_kb"] for r in rows)


def everything(options, fields, figures: Figures) -> bool:
    """kernels, step, sample and trl, each in a process of its own; DIR/table.md has each beside its peers, with its
    share of the ceilings. One that fails is a line that says so, and stops no other."""
    out = output(options.to, "--to")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    rows, failed, where = [], [], ""
    for name in tqdm(("kernels", "step", "sample", "trl"), desc="all", unit="benchmark"):
        path = out / f"{name}.json"
        path.unlink(missing_ok=True)
        shape = ["--shape", "0.6b" if options.device.type == "cuda" else "tiny"] if name in ("sample", "trl") else []
        done = subprocess.run([sys.executable, "-m", "eval.bench", name, "--device", options.device.type, "--threads",
                               str(options.threads), "--repeats", str(options.repeats), *shape, "--out", str(path)],
                              capture_output=True, text=True, check=False)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
            failed.append(f"{name} **failed**, exit {done.returncode}: "
                          f"{'both sides do not compute the same' if 'rows' in found else said}")
        else:
            rows += [Row(**row) for row in found["rows"]]
            where = heading(found["environment"] | {"command": figures["environment"]["command"]})
    text = "\n\n".join([where or "Nothing was measured.", table(rows), *failed]) + "\n"
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {out}")
    return not failed


def heading(where: dict) -> str:
    card = where["device"] if where["device"] != "cpu" else where["cpu"]
    return (f"`{where['command']}`, {where['date']}, {card}, {where['threads']} threads, torch {where['torch']}, "
            f"commit {where['commit']}")


# ---- Command line --------------------------------------------------------------------------------------------------

# name: function of (options, fields of the configuration, figures) -> whether all is well; options of its own
PEERS = {"repeats": 5, "shape": "tiny", "group": 8, "groups": 2, "prompt": 0, "response": 0}
COMMANDS: dict[str, tuple[Callable, dict]] = {
    "step": (step, {"repeats": 3}), "kernels": (kernels, {"repeats": 5}), "compile": (compile_kernels, {}),
    "sample": (sample, PEERS), "trl": (trl, PEERS | {"lora_rank": None}),
    "threads": (threads, {"steps": 2, "limit": 120}), "all": (everything, {"repeats": 3, "to": Path})} | {
    f"gpu-{name}": (step, {"to": Path, "seconds": 0}) for name, step in STEPS.items()}
FIELDS = ("step", "threads")  # take those of memtrain's command line, too, but for these
CHOSEN = ("stages", "run", "update-documents", "memtrain-steps", *STUDY)
HELP = {"repeats": "timed repeats", "shape": f"of the model: {' or '.join(SHAPES)}", "group": "rows of a prompt",
        "groups": "prompts", "prompt": "its tokens; 0: the shape's", "response": "new tokens a row; 0: the shape's",
        "lora_rank": "of the adapters, 0 trains all weights; without it the shape's", "steps": "timed",
        "limit": "seconds after which a way is given up", "to": "folder of the table and all figures",
        "seconds": "after which it is stopped; 0: never"}


def parse(name: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, fields of the configuration)."""
    function, own = COMMANDS[name]
    parser = StrictParser(prog=f"python -m eval.bench {name}", description=function.__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    for option, default in own.items():
        kind = {str: str, type: Path}.get(type(default), int)
        parser.add_argument(flag(option), type=kind, default=None if kind is Path else default,
                            required=kind is Path, choices=SHAPES if option == "shape" else None,
                            help=HELP[option] + f" (default: {default})" * (kind is not Path))
    options, fields = parser.parse_known_args([dashes(a) for a in argv])
    if fields and name not in FIELDS:
        raise InputError(f"{fields[0]}: unknown option; python -m eval.bench {name} --help lists them")
    for field in fields:
        if field.partition("=")[0].removeprefix("--") in CHOSEN:
            raise InputError(f"{field}: the benchmark chooses it; leave it out")
    for option, value in vars(options).items():
        least = 1 if own.get(option) else 0
        if isinstance(value, int) and value < least:
            raise InputError(f"{flag(option)} {value}: must be at least {least}")
    if options.out:
        output(options.out, inputs=[])
    return options, fields


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"    {name:10s} {' '.join(function.__doc__.split())}"
                        for name, (function, _) in COMMANDS.items() if not name.startswith("gpu-")))
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"{argv[0]}: unknown benchmark; choose one of {', '.join(COMMANDS)}")
        options, fields = parse(argv[0], argv[1:])
        torch.set_num_threads(options.threads or os.cpu_count() or 1)
        options.device = memtrain.choose_device(options.device)
        torch.manual_seed(0)
        figures = Figures(options.out)
        figures["environment"] = environment(SimpleNamespace(device=options.device)) | {
            "command": " ".join(["python -m eval.bench", *argv])}
        print(heading(figures["environment"]) + "\n")
        return 0 if COMMANDS[argv[0]][0](options, fields, figures) else 1
    except InputError as e:
        print(one_line(f"bench: {e}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
