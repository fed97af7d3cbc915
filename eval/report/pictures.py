"""The two pictures of README.md: the memory loop, and memories being written, read from a run's readings.json.

    python -m eval.report.pictures [RUN] [--out DIR]      (default: eval/results/nano/s0, written beside it)
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from data import InputError
from data.run.files import ROOT, output, read_json, replacing
from data.run.terminal import one_line
from eval.report.plots import INK, LOOKS, drawing
from eval.report.results import SYSTEMS

SHOWN = ("base", "memtrain")  # side by side
WIDTH = 62  # characters of a line of a memory
KEPT, LOST = "#0a9b73", "#c0392b"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = INK) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fill=False, edgecolor=colour,
                                  linewidth=1.4))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=colour, fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.4})


def loop(axes: Axes) -> None:
    """Three sections of a document, read one by one; what goes on is the memory alone."""
    memory, probe = LOOKS["memtrain"][0], LOOKS["memagent"][0]
    axes.set(xlim=(-0.2, 10.2), ylim=(0, 4.4))
    axes.axis("off")
    for i in range(3):
        x = 0.3 + 2.6 * i
        box(axes, x, 3.3, 1.7, 0.7, f"section {i + 1}" + (" [MASK]" if i != 1 else ""))
        box(axes, x, 1.9, 1.7, 0.7, "policy")
        box(axes, x, 0.6, 1.7, 0.7, f"memory {i + 1}", memory)
        arrow(axes, (x + 0.85, 3.26), (x + 0.85, 2.66))
        arrow(axes, (x + 0.85, 1.86), (x + 0.85, 1.36), memory)
        arrow(axes, (x + 1.75, 1.0), (x + 2.6, 2.1) if i < 2 else (x + 2.45, 1.0), memory)
    box(axes, 8.0, 0.6, 1.9, 0.7, "answer: who is\n[MASK]?  reward", memory)
    box(axes, 8.0, 1.9, 1.9, 0.9, "recall: who is [TARGET]\nof section 1, from\nmemory 2?  reward", probe)
    axes.plot([3.75, 3.75, 8.95, 8.95], [0.56, 0.2, 0.2, 0.2], color=probe, linewidth=1.1, linestyle=":")
    axes.plot([10.08, 10.08], [0.2, 2.3], color=probe, linewidth=1.1, linestyle=":")
    axes.plot([8.95, 10.08], [0.2, 0.2], color=probe, linewidth=1.1, linestyle=":")
    arrow(axes, (10.08, 2.3), (9.94, 2.3), probe)


def telling(documents: Sequence[dict]) -> dict:
    """The first document in which the second system is right and the first is not, of those with most sections."""
    right = [d for d in documents if d["systems"].get(SHOWN[1], {}).get("answer") in d["answers"]
             and d["systems"].get(SHOWN[0], {}).get("answer") not in d["answers"]]
    if not right:
        raise InputError(f"no document in which {SHOWN[1]} is right and {SHOWN[0]} is not; give another run")
    return max(right, key=lambda d: d["length"])


def sentences(memory: str, gold: Sequence[str]) -> list[tuple[str, bool]]:
    """Lines of a memory, each with whether it is part of a fact that the answer follows from."""
    lines = []
    for sentence in memory.replace(". ", ".\n").splitlines():
        lines += [(line, sentence.strip() in gold) for line in textwrap.wrap(sentence, WIDTH)]
    return lines


def reading(figure: Figure, document: dict) -> None:
    """A row a section: what each system's memory held after it; facts that count are marked."""
    sides = [[sentences(m, document["gold"]) for m in document["systems"][s]["memories"]] for s in SHOWN]
    heights = [max(1, *(len(side[i]) for side in sides if i < len(side))) for i in range(max(map(len, sides)))]
    total = sum(heights) + 0.7 * len(heights) + 4
    figure.set_size_inches(11, 0.2 * total)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(total, 0))
    axes.axis("off")
    axes.text(0, 0.6, f"“{document['question']}”  {document['answers'][0]}", color=INK, fontsize=10, va="center")
    for x, name in zip((8, 55), SHOWN, strict=True):
        axes.text(x, 2.0, f"memory of: {SYSTEMS[name]}", color=LOOKS[name][0], fontsize=10, va="center",
                  fontweight="bold")
    y = 3.2
    for i, height in enumerate(heights):
        axes.axhline(y - 0.45, color=INK, alpha=0.25, linewidth=0.6)
        axes.text(0, y + 0.2, f"section {i + 1}", color=INK, fontsize=8.5, va="center")
        for x, side in zip((8, 55), sides, strict=True):
            for k, (line, counts) in enumerate(side[i] if i < len(side) else []):
                axes.text(x, y + 0.2 + k, line, color=KEPT if counts else INK, fontsize=8.5, va="center",
                          fontweight="bold" if counts else "normal")
        y += height + 0.7
    axes.axhline(y - 0.45, color=INK, alpha=0.25, linewidth=0.6)
    axes.text(0, y + 0.2, "answer", color=INK, fontsize=8.5, va="center")
    for x, name in zip((8, 55), SHOWN, strict=True):
        answer = document["systems"][name]["answer"]
        right = answer in document["answers"]
        axes.text(x, y + 0.2, f"{answer or '(none)'}  {'right' if right else 'wrong'}", fontsize=9, va="center",
                  color=KEPT if right else LOST, fontweight="bold")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report.pictures", description="The pictures of README.md.")
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "eval" / "results" / "nano" / "s0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a folder (default: the one that RUN lies in)")
    options = parser.parse_args(argv)
    try:
        out = output(options.out or options.run.parent)
        document = telling(read_json(options.run / "readings.json", "give a run that was evaluated")["documents"])
        out.mkdir(parents=True, exist_ok=True)
        with drawing({"savefig.facecolor": "white", "savefig.transparent": False, "savefig.dpi": 130}):
            figures = {name: Figure(figsize=(9, 3.6), layout="constrained") for name in ("loop.png", "reading.png")}
            loop(figures["loop.png"].subplots())
            reading(figures["reading.png"], document)
            for name, figure in figures.items():
                with replacing(out / name) as path:
                    figure.savefig(path, format="png", metadata={"Software": None})
    except InputError as e:
        print(one_line(f"pictures: {e}"), file=sys.stderr)
        return 2
    print(f"{out / 'loop.png'}, {out / 'reading.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
