"""Is my card right, and how fast is it? One command gives all figures: the first thing to run on a new GPU.

    python -m eval.gpu --minutes 20 --out DIR [--done eval/results/gpu] [--only NAME,NAME] [--device cpu]

Every step is a process of its own with a time limit: one that fails, hangs or is killed never stops the others. After
each step DIR/gpu.json is written anew, whole or not at all. A step that was green on this card with the very sources
it depends on, in DIR or under --done, is not run again; so a battery that was stopped goes on. With --device cpu the
steps that need CUDA are left out, and the others run at small sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from data import InputError
from data.run.files import write_json
from data.run.terminal import one_line

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
LINES = 150  # of a step's output that are kept
LEAST = 8.0  # seconds: with less left no step is started


@dataclass(frozen=True)
class Step:
    """seconds: what it is expected to take; it is stopped after twice as long. command: what python runs, with
    {device}, {result} (a file for its figures, as JSON), {out} and {seconds} filled in. sources: patterns of the files
    its result depends on. cuda: whether it makes no sense without one."""

    name: str
    seconds: float
    text: str
    command: tuple[str, ...]
    sources: tuple[str, ...]
    cuda: bool = False


# most of a test's time on a card goes into compiling its kernels, for which one core does little
SPREAD = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
KERNELS = ("kernels/**/*.py", *(f"eval/bench/{name}.py" for name in ("gpu_steps", "kernels", "measure")))
AGENT = (*KERNELS, "memtrain.py", "data/**/*.py", "eval/*.py")
BENCH = (*AGENT, "eval/bench/*.py")
TESTS = (*AGENT, "tests/conftest.py", "tests/test_kernels.py", "tests/test_kernels_triton.py",
         "tests/test_kernels_gpu.py")


def bench(name: str, seconds: float, text: str, *command: str, sources=BENCH, cuda: bool = True) -> Step:
    return Step(name, seconds, text, ("-m", "eval.bench", *command, "--device", "{device}", "--out", "{result}"),
                sources, cuda)


def own(name: str, seconds: float, text: str, sources: tuple[str, ...] = AGENT, cuda: bool = False) -> Step:
    return bench(name, seconds, text, f"gpu-{name}", "--to", "{out}", "--seconds", "{seconds}", sources=sources,
                 cuda=cuda)


def tests(name: str, seconds: float, text: str, *chosen: str) -> Step:
    command = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb", "short", *chosen)
    return Step(name, seconds, text, command, TESTS, True)


STEPS = (
    own("probe", 40, "card, versions, free memory, and the measured ceilings: matrix products and a copy", KERNELS),
    tests("tests", 60, "the GPU tests: sampler, a GRPO step, LoRA, a tiny run to its report",
          "tests/test_kernels_gpu.py"),
    tests("kernel-tests", 60, "the kernels' own tests", "tests/test_kernels_triton.py", *SPREAD, "-k",
          "not broken and not six_generations"),
    own("kernels", 40, "every kernel against fp64 at the shapes of real models, forward and backward", KERNELS, True),
    own("parity", 40, "sampler with graphs = eager = CPU; sampled = scored; a GRPO gradient against fp64"),
    own("nano", 60, "20 MemTrain steps of the preset nano: reward, seconds, mismatch"),
    bench("times", 60, "each kernel beside FlexAttention, SDPA, Liger, cut-cross-entropy, torch.compile", "kernels",
          "--repeats", "5"),
    bench("sample", 75, "tokens/s of Qwen3-0.6B's shape beside transformers", "sample", "--shape", "0.6b",
          "--repeats", "2"),
    own("step", 40, "one GRPO step of Qwen3-0.6B's shape with LoRA: tokens/s, peak memory beside the plan's"),
    own("small", 60, "60 steps of the preset small's base: seconds a step, loss"),
    bench("peers", 90, "a whole GRPO step beside TRL's", "trl", "--shape", "0.6b", "--repeats", "2", "--groups", "1"),
    own("tiles", 60, "other tile sizes of the kernels, timed: the fastest of each", KERNELS, True),
    tests("mutants", 60, "kernels broken on purpose are noticed on the card too", "tests/test_kernels_triton.py",
          *SPREAD, "-k", "broken"),
    own("run", 400, "the main command, python memtrain.py, from its first step to its report"),
    own("train", 3600, "preset small, base and MemTrain, as far as the time goes; its weights come back in parts"),
)


def source_hash(patterns: Iterable[str], root: Path = ROOT) -> str:
    """16 hex digits over the contents of the files that match."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def card(device: str) -> str:
    """What nvidia-smi calls the first GPU; "cpu" with --device cpu."""
    if device == "cpu":
        return "cpu"
    try:
        names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                               text=True, check=False, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        names = []
    return names[0].strip() if names else "unknown GPU"


def commit() -> str:
    """Commit of the source, with a + where it was changed; "unknown" without git or outside a checkout."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True,
                              text=True, cwd=ROOT, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def green(folders: Iterable[Path], name: str) -> dict[tuple[str, str], dict]:
    """{(step, hash of its sources): its record} of everything that went well on the card `name`."""
    found = {}
    for path in sorted(p for folder in folders if folder.is_dir() for p in folder.glob("**/*.json")):
        with suppress(OSError, ValueError):
            battery = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(battery, dict) and battery.get("battery") == FORMAT and battery.get("card") == name:
                found |= {(r["name"], r["sources"]): r for r in battery["steps"] if r["state"] == "green"}
    return found


def run(step: Step, device: str, out: Path, limit: float) -> dict:
    """Runs one step in a session of its own; its record."""
    with tempfile.TemporaryDirectory(prefix=f"gpu-{step.name}-", ignore_cleanup_errors=True) as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        words = {"{device}": device, "{result}": str(result), "{out}": str(out), "{seconds}": f"{limit:.0f}"}
        began = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen([sys.executable, "-u", *(words.get(word, word) for word in step.command)],
                                       stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT,
                                       start_new_session=True)
            try:
                code = process.wait(limit)
                state = "green" if code == 0 else "killed" if code < 0 else "failed"
            except subprocess.TimeoutExpired:
                state, code = "timeout", None
            finally:  # also what it left running, and when the battery itself is stopped
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - began
        try:  # a step that did not get to its end has mostly written what it knew
            figures = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            figures = None
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return {"name": step.name, "limit": round(limit, 1), "state": state, "exit": code, "seconds": round(seconds, 1),
            "result": figures, "lines": lines[-LINES:]}


def battery(steps: Sequence[Step], device: str, out: Path, minutes: float, done: Sequence[Path]) -> dict:
    """All steps that are not green yet, as far as the time goes; the content of gpu.json."""
    began, name = time.monotonic(), card(device)
    known = green([out, *done], name)
    made = {"battery": FORMAT, "card": name, "device": device, "commit": commit(),
            "date": f"{datetime.now():%Y-%m-%d %H:%M}", "steps": []}
    for step in steps:
        left = 60 * minutes - (time.monotonic() - began)
        sources = source_hash(step.sources)
        if record := known.get((step.name, sources)):
            said = "green already"
        elif step.cuda and device == "cpu":
            said = "needs CUDA"
            record = {"name": step.name, "state": "skipped", "why": said}
        elif left < LEAST:
            said = f"no time left of --minutes {minutes:g}"
            record = {"name": step.name, "state": "not run", "why": said}
        else:
            print(f"{step.name:12s} {step.text} ...", flush=True)
            record = run(step, device, out, min(2 * step.seconds, left))
            said = f"{record['state']} in {record['seconds']:.0f} s"
        print(f"{step.name:12s} {said}", flush=True)
        made["steps"].append({"sources": sources, "commit": made["commit"]} | record)
        try:
            write_json(out / "gpu.json", made)
        except InputError as e:  # a full disk: what was there stays
            print(one_line(f"eval.gpu: {e}; the steps go on"), file=sys.stderr)
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="steps, with the seconds each is expected to take:\n" + "\n".join(
            f"  {s.name:12s}{s.seconds:5.0f}  {s.text}{' (CUDA only)' if s.cuda else ''}" for s in STEPS))
    parser.add_argument("--minutes", type=float, default=15.0, help="for all steps together (default: 15)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json goes")
    parser.add_argument("--done", type=Path, action="append", default=[], metavar="DIR",
                        help="folders of earlier results")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these steps, in the order given")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    named = {s.name: s for s in STEPS}
    names = options.only.split(",") if options.only else list(named)
    if odd := [n for n in names if n not in named]:
        parser.error(f"--only {options.only}: unknown step {odd[0]!r}; choose from {','.join(named)}")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: must be above 0")
    options.steps = [named[n] for n in names]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"--out {options.out}: {e.strerror}; give a folder that can be written")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    out = options.out.resolve()
    made = battery(options.steps, options.device, out, options.minutes, options.done)
    states = [record["state"] for record in made["steps"]]
    print(f"{made['card']}: {states.count('green')} of {len(states)} steps green; {out / 'gpu.json'}")
    return 0 if all(state in ("green", "skipped") for state in states) else 1


if __name__ == "__main__":
    sys.exit(main())
