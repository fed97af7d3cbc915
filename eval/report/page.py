"""The report of a run, from its JSON alone: report.html for people, report.md for terminals and pull requests.

    python -m eval.report runs/nano                               rebuild one run's report
    python -m eval.report runs/s0 runs/s1 runs/s2 --out DIR       pool runs that differ in their seed only
    python -m eval.report runs/s0 runs/s0-end-to-end --out DIR    compare arms: the first run's is the full one

    results.json, metrics.jsonl, readings.json -> results (checked) -> claims -> tables, plots -> here

Three rules keep it honest. What became of a claim is said by one function, `claims.state`, for both pages and for
claims.json, which has the same in figures. Whatever was not measured is written as "not run" or "not tested", never
left out. The paper's own figures stand beside ours, also where they do not flatter the paper.
"""

import argparse
import base64
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from data import InputError
from data.run.files import json_bytes, output, replacing, writing
from data.run.terminal import one_line, printable
from eval.report import changing, curve, plots, tables
from eval.report.arms import BOTH, Arm, backbones
from eval.report.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, RULE, Claim, verdicts
from eval.report.paper import PAPER_BENCHMARKS, PAPER_LENGTHS, PAPER_TABLE1, PAPER_TABLE2
from eval.report.results import SYSTEMS, Run, load_run
from eval.report.tables import LONG, Outside

INTERVALS = (
    "Differences in percentage points with their 95% interval, rounded outwards: a paired bootstrap over questions, "
    "with the spread of the seeds added by Student's t, which is wide where seeds are few; the two questions of a "
    "search are drawn together. The paper's averages are over its eight lengths, ours over those of this run; for C1 "
    "it compares with base in one window.")
COUNTED = ("FLOPs are the model's: 2 a parameter and token sampled or, where it was counted, read in a prompt, 6 a "
           "parameter and trained token; attention, recomputation and evaluation are not counted.")
SIGNS = {REPRODUCED: "yes", NOT_REPRODUCED: "no", INCONCLUSIVE: "open"}  # the look of a state; the others are grey


def md(value) -> str:
    """Text from outside as one markdown table cell: markup escaped, line breaks turned into spaces, and what could
    steer a terminal spelled out."""
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", printable(" ".join(str(value).split())))


# ------------------------------------------------------------------------------------------------ content


def content(named: dict[str, list[Arm]], labels: curve.Curve | None) -> dict:
    """Everything that both reports say, as plain text; what came from outside is an Outside."""
    arms = next(iter(named.values()))
    full, runs = arms[0], arms[0].runs
    everyone = [run for own in named.values() for arm in own for run in arm.runs]
    table, search, config = full.table, full.search, runs[0].config
    rows = {section: full.rows(section) for section in ("long_qa", "recall", "masked", "memory")}
    summary, detail = verdicts(named)
    known = {key: [Outside(v) for v in sorted({str(run.environment.get(key, "not recorded")) for run in everyone})]
             for key in ("commit", "date")}
    return {
        "own_names": [Outside(run.path.resolve().name) for run in runs], "pooled": len(everyone),
        "arms": sum(map(len, named.values())), "rule": RULE, "intervals": INTERVALS,
        "commits": known["commit"], "dates": known["date"], "made": environments(everyone),
        "commands": [_line(run.environment.get("command", "not recorded")) for run in everyone],
        "rebuild": _line(shlex.join(["python", "-m", "eval.report", *(str(run.path) for run in everyone)])),
        "preset": Outside(config.get("preset", "unknown")), "corpus": Outside(config.get("corpus", "unknown")),
        "world": world(config), "seeds": sorted({*table.seeds, *search.seeds}),
        "asked": sorted({f"{row['n']:g}" for row in rows["long_qa"]}),
        "lengths": [f"{n:g}x" for n in table.lengths], "long_names": [SYSTEMS[s] for s in LONG],
        "size": {field: [max(row.get(field) or 0 for row in rows["long_qa"] if row["length"] == length)
                         for length in table.lengths] for field in ("sections", "tokens")},
        "table1": tables.by_columns(table, LONG), "paper1": _averaged(PAPER_TABLE1),
        "paper_lengths": list(PAPER_LENGTHS.values()),
        "further": [{"name": Outside(name), "lengths": [f"{n:g}x" for n in own[0].table.lengths],
                     "table1": tables.by_columns(own[0].table, LONG)} for name, own in list(named.items())[1:]],
        "benchmarks": [Outside(n) for n in search.columns], "paper2": _averaged(PAPER_TABLE2),
        "paper_benchmarks": list(PAPER_BENCHMARKS),
        "table2": tables.by_columns(search, tables.search_systems(search)), "searched": tables.aside(search),
        "summary": summary, "detail": detail, "aside": tables.aside(table), "kinds": tables.by_kind(table),
        "locomo": tables.by_kind(table, "locomo_f1"),
        "ablations": {SYSTEMS[s]: found for s in (BOTH, "memtrain")
                      if len(found := tables.ablations(arms, s)) > 1},
        "changed": [[Outside(arm.name), str(len(arm.runs)),
                     Outside(", ".join(f"{k} = {v}" for k, v in arm.changed.items()))] for arm in arms[1:]],
        "labels": curve.rows(labels), "labels_read": curve.reading(labels) if labels else [],
        "labels_of": [f"{n:g}x" for n in labels.lengths] if labels else [],
        "labels_seeds": labels.seeds if labels else [],
        "recall": tables.per_system(rows["recall"], "accuracy", "low", "high"),
        "masked": tables.per_system(rows["masked"], "em", "em_low", "em_high"),
        "memory": tables.memory(rows["memory"]), "kept_after": [f"k = {k}" for k in tables.RETENTION],
        "changing": changing.content(arms),
        "stages": tables.stages(runs), "counted": COUNTED,
        "notes": [Outside(run.results["claims_note"]) for run in everyone if run.results.get("claims_note")],
    }


def world(config: Mapping) -> str:
    """What the questions are about, for every table's head: no figure of one world passes for one of another."""
    if config.get("corpus", "miniworld") != "miniworld":
        return Outside(config["corpus"])
    return {"eval": "evaluation world", "dev": "development world"}[config.get("world", "eval")]


def environments(runs: Sequence[Run]) -> dict[str, list]:
    """What all runs were made with, and a line for each run with the rest."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.environment) if key != "command"]
    alike = [key for key in keys if len({str(run.environment.get(key)) for run in runs}) == 1]
    other = [key for key in keys if key not in alike]
    lines = [[run.path.resolve().name, run.config.get("seed", "—"), *(run.environment.get(key, "—") for key in other)]
             for run in runs]
    return {"alike": [[Outside(key), Outside(runs[0].environment[key])] for key in alike],
            "other": [Outside(key) for key in other], "lines": [[Outside(cell) for cell in line] for line in lines]}


def _line(text) -> str:
    return printable(" ".join(str(text).split()))


def _averaged(paper: dict) -> dict[str, list[list[str]]]:
    return {model: [[SYSTEMS[s], *(f"{v:.2f}" for v in (*values, sum(values) / len(values)))]
                    for s, values in rows.items()] for model, rows in paper.items()}


# ------------------------------------------------------------------------------------------------ html


def embedded(value) -> Markup:
    """JSON as it may stand inside a <script> of data: nothing in it can end the element, or begin another."""
    text = json.dumps(value, ensure_ascii=False)
    unsafe = "[<>&\u007f-\u009f\u2028\u2029\ud800-\udfff]"
    return Markup(re.sub(unsafe, lambda m: f"\\u{ord(m[0]):04x}", text))


def readings(runs: Sequence[Run]) -> Markup | str:
    """Data of the viewer: the documents of the first run that has some."""
    chosen = []
    for d in next((run.readings for run in runs if run.readings), []):
        systems = {name: {key: reading.get(key) for key in ("memories", "answer", "correct")}
                   for name, reading in d["systems"].items()}
        if d["sections"] and systems:
            marked = {key: [part for part in d[key] if part.strip()] for key in ("answers", "gold", "marks")}
            chosen.append(marked | {"task": d["task"], "kind": d.get("kind") or "", "question": d["question"],
                                    "sections": d["sections"], "systems": systems,
                                    "outdated": d.get("outdated") or []})
    return embedded({"documents": chosen, "names": SYSTEMS}) if chosen else ""


def figures(folder: Path) -> dict[str, Markup]:
    """{name: address of an image that holds it} of the plots that were drawn beside the page."""
    found = {}
    for name, kind in (("table1.svg", "svg+xml"), ("labels.svg", "svg+xml"), ("changing.png", "png"),
                       ("training.png", "png")):
        if (path := folder / name).exists():
            held = base64.b64encode(path.read_bytes()).decode()
            found[path.stem] = Markup(f"data:image/{kind};base64,{held}")
    return found


def html(said: dict, folder: Path, data: Markup | str) -> str:
    """The page, whose plots lie in `folder`. Everything but our own style, script and plots is escaped."""
    here = Path(__file__)
    script = here.with_name("report.js").read_text(encoding="utf-8")
    environment = _environment(autoescape=True, finalize=lambda v: v if isinstance(v, Markup) else printable(str(v)))
    environment.filters["sign"] = lambda claim: SIGNS.get(claim.word, "none")
    return environment.get_template("report.html.j2").render(said | {
        "figures": figures(folder),
        "style": Markup(here.with_name("report.css").read_text(encoding="utf-8")), "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), "readings": data})


# ------------------------------------------------------------------------------------------------ report


def _environment(**options) -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, **options)


def claim_cells(c: Claim) -> list[str]:
    """A claim as cells of a markdown row. Names of benchmarks, arms and backbones come from outside; brackets of
    intervals are ours."""
    cells = [md(c.claim), c.paper, md(c.ours) if c.id == "C8" else c.ours]
    entered = md(c.entered) + (f"; matched on {md(c.matched)}" if c.matched else "")
    return [*cells, entered, f"**{c.word}**{md(c.state.removeprefix(c.word))}"] if c.state else cells


def figures_of(c: Claim) -> dict:
    """A claim in claims.json."""
    d = c.difference if c.difference and not c.difference.reason else None
    measured = {"difference": d.mean, "low": d.low, "high": d.high, "by_seed": list(d.by_seed)} if d else {}
    return {"id": c.id, "claim": c.claim, "state": c.word, "why": c.why, "entered": c.entered,
            "matched": c.matched, **measured}


def write_report(run_dir: Path, others: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write report.html, report.md, claims.json and the plots for a run, or for several seeds and arms; returns
    report.md."""
    if out:
        output(Path(out))
    runs = [load_run(path) for path in (run_dir, *others)]
    named, out = backbones(runs), Path(out or run_dir)
    arms = next(iter(named.values()))
    data, labels = readings([run for arm in arms for run in arm.runs]), curve.label_curve(arms)
    said = content(named, labels) | {"warnings": [Outside(w) for w in tables.warnings(arms, list(named))]}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        plots.plot_table1(arms[0].table, out / "table1.svg")
        plots.plot_labels(labels, out / "labels.svg")
        curves = plots.plot_training(arms[0].runs, out / "training.png")
        changing.plot(arms, out / "changing.png")
    markdown = _environment(finalize=lambda v: md(v) if isinstance(v, Outside) else v)
    markdown.filters |= {"cell": lambda v: md(v) if isinstance(v, Outside) else v, "lines": claim_cells, "md": md}
    made = {"report.html": html(said, out, data),
            "report.md": markdown.get_template("report.md.j2").render(said, curves=curves, shown=bool(data)),
            "claims.json": json_bytes([figures_of(c) for c in said["summary"]]).decode()}
    for name, text in made.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out / "report.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(
        "Write the report of a run from its JSON. Several runs that differ in their seed are pooled; others are arms "
        "that are compared with the first, or further backbones."))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder with a results.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the first RUN)")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.runs[0], arguments.runs[1:], arguments.out))
    except InputError as error:
        print(one_line(f"error: {error}"), file=sys.stderr)
        return 2
    return 0
