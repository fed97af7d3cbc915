"""The report: figures, states in both directions, pooling, gaps in the data, bad input.

All runs here are synthetic: who answers what is set by hand, no model was involved.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import SHARES, make_run, qa_row, qa_rows

from data import InputError
from data.run.files import json_bytes
from eval.report.arms import Table
from eval.report.claims import Claim, on_long_text
from eval.report.page import main, md, write_report
from eval.report.paper import PAPER_TABLE1
from eval.report.results import load_run


def report(*args, **kwargs) -> str:
    return write_report(*args, **kwargs).read_text()


def line(text: str, start: str, section: str = "") -> list[str]:
    """Cells of the first table line behind this heading whose first cell is `start`."""
    text = text[text.index(f"## {section}") if section else 0:]
    row = next(row for row in text.splitlines() if row.startswith(f"| {start} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def table_of(**shares) -> Table:
    """Three seeds that agree."""
    return Table([row for seed in range(3) for row in qa_rows(
        {name.replace("_", "+"): values for name, values in shares.items()}, seed)])


# ------------------------------------------------------------------------------------------------ one run

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "synthetic")
    return folder, report(folder)


def test_table1_holds_the_figures_with_their_intervals(one):
    _, text = one
    cells = line(text, "Base, one window", "Table 1")
    assert cells[1:5] == ["50.0 [43.1, 56.9]", "30.0 [24.0, 36.7]", "10.0 [6.5, 15.0]", "5.0 [2.7, 9.0]"]
    assert cells[5].startswith("23.8 [") and float(cells[5][6:10]) < 23.8
    rows = [row for row in text.splitlines() if row.startswith("| + MemTrain + MemAgent |")]
    assert len(rows) == 4 and "80.0 [" in rows[0] and "79.69" in rows[1] and "70.31" in rows[1]
    head = "document length, evaluation world"
    assert line(text, head) == [head, "1x", "2x", "4x", "8x", "average"]
    assert line(text, "*tokens*")[1:5] == ["400", "800", "1600", "3200"]


def test_every_table_has_as_many_cells_as_its_header(one):
    widths = []
    for row in one[1].splitlines():
        if row.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", row)))
        elif widths:
            assert len(set(widths)) == 1 and len(widths) > 2, widths
            widths = []


def test_paper_constants_average_to_the_paper_s_own_averages():
    for model, averages in {"Qwen3-4B": (21.97, 56.15, 65.14, 70.31),
                            "Qwen2.5-7B": (20.80, 45.41, 55.86, 73.53)}.items():
        for values, average in zip(PAPER_TABLE1[model].values(), averages, strict=True):
            assert np.mean(values) == pytest.approx(average, abs=0.0101)


def test_header_tables_and_notes(one):
    _, text = one
    assert "    python memtrain.py --run synthetic" in text
    assert line(text, "commit") == ["commit", "abc1234"] and line(text, "threads") == ["threads", "2"]
    assert "1 seed (0), 200 questions" in text and "> **Note:** One seed" in text
    assert line(text, "memtrain", "Training") == [
        "memtrain", "0", "30", "123", "1,234,567", "654,321", "0.100", "0.712"]
    assert "| + MemTrain | — | 50.0 [40.4, 59.6] | 100 |" in text  # recall
    assert "| + MemTrain | 4 | 25.0 [17.0, 35.0] | 100 |" in text  # masked
    assert line(text, r"date\|of birth")[0] == r"date\|of birth"
    assert "| + MemTrain | 52.5 | 52.5 | 52.5 | 52.5 | 98.0 | 31.5 |" in text
    assert not re.search(r"\b(nan|None)\b", text)
    assert "real text" not in text and "at chance:" not in text and "saturated:" not in text


def test_kinds_add_up(one):
    cells = [line(one[1], kind)[2] for kind in ("bridge", r"date\|of birth")]
    pairs = [re.fullmatch(r"([\d.]+) \((\d+)\)", cell) for cell in cells]
    right = sum(float(m[1]) / 100 * int(m[2]) for m in pairs)
    assert [int(m[2]) for m in pairs] == [400, 400]
    assert right == pytest.approx(200 * sum(SHARES["base"]), abs=0.5)


def test_plots_are_written_and_reproducible(one, tmp_path):
    folder, _ = one
    write_report(folder, out=tmp_path / "again")
    for name in ("table1.svg", "training.png", "report.md"):
        assert (folder / name).stat().st_size > 1000
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------ states

def test_clear_lead_is_reproduced(tmp_path):
    paths = [make_run(tmp_path / f"s{seed}", seed) for seed in range(3)]
    one = report(paths[0], paths[1:])
    for claim in ("C1 MemTrain over base, average", "C2 MemTrain+MemAgent over MemAgent, average"):
        assert line(one, claim)[3].startswith("3 seeds; 1x, 2x, 4x, 8x; matched on labels"), claim
        assert line(one, claim)[4] == "**reproduced**", claim
    window = line(one, "C1 MemTrain over base in one window, average")
    assert len(window) == 3 and window[2].startswith("+28.8 [+")
    average = line(one, "C1 MemTrain over base, average")
    assert average[1] == "+34.2 (Qwen3-4B), +24.6 (Qwen2.5-7B)" and average[2].startswith("+23.8 [+")
    claim = "C2 MemTrain+MemAgent over MemAgent"
    assert line(one, f"{claim}, 8x")[1] == "+10.9 (Qwen3-4B), +15.6 (Qwen2.5-7B)"
    fall = line(one, "C3 MemTrain+MemAgent loses less with length than MemAgent")
    assert fall[3].startswith("3 seeds; 1x, 8x; matched on") and fall[4] == "**reproduced**"
    assert "-17.2 against -13.3 (Qwen3-4B), -7.8 against -22.7 (Qwen2.5-7B)" in fall[1]
    assert fall[2].startswith("1x to 8x: -20.0 against -40.0; difference +20.0 [")


def test_untested_claims_are_named(one):
    reasons = {"C4": "no run of the arm end-to-end", "C5": "no run of the arm decoupled",
               "C6": "no run of the arm longer-memagent", "C7": "search QA not run", "C8": "runs of one backbone only"}
    for claim, reason in reasons.items():
        row = next(row for row in one[1].splitlines() if row.startswith(f"| {claim} "))
        assert row.endswith(f"| — | — | **not tested**: {reason} |")


def test_one_seed_is_inconclusive(one):
    row = line(one[1], "C1 MemTrain over base, average")
    assert row[2].startswith("+23.8 [+") and row[3:] == [
        "1 seed; 1x, 2x, 4x, 8x; matched on labels, none on either side", "**inconclusive**: 1 seed, needed: 3"]


def claim(table: Table, name: str) -> Claim:
    return next(c for part in on_long_text(table) for c in part if c.claim == name)


C1, C3 = "C1 MemTrain over base, average", "C3 MemTrain+MemAgent loses less with length than MemAgent"


@pytest.mark.parametrize(("base", "memtrain", "expected"), [
    ((0.4,) * 4, (0.41,) * 4, "not reproduced: the interval lies below half of the paper's +34.2"),
    ((0.4,) * 4, (0.4,) * 4, "not reproduced: the interval lies below half of the paper's +34.2"),
    ((0.4,) * 4, (0.2,) * 4, "not reproduced: the interval lies below zero"),
    ((0.2,) * 4, (0.4,) * 4, "reproduced"),
])
def test_the_average_decides(base, memtrain, expected):
    assert claim(table_of(base=base, memtrain=memtrain), C1).state == expected


def test_a_small_effect_of_the_paper_leaves_it_open():
    """C2 is +5.2 in the paper: an interval around zero holds half of that, too."""
    table = table_of(memagent=(0.4,) * 4, memtrain_memagent=(0.41,) * 4)
    assert claim(table, "C2 MemTrain+MemAgent over MemAgent, average").state == (
        "inconclusive: the interval includes zero")


def test_one_length_alone_decides_nothing_unless_it_lies_below_zero():
    table = table_of(base=(0.3,) * 4, memtrain=(0.6, 0.6, 0.31, 0.6))
    assert claim(table, C1).state == "reproduced"
    detail = claim(table, "C1 MemTrain over base, 4x")
    assert detail.state == "" and detail.difference.low < 0 < detail.difference.high
    below = table_of(base=(0.3,) * 4, memtrain=(0.6, 0.6, 0.1, 0.6))
    assert claim(below, C1).state == "inconclusive: the interval lies below zero at 4x"


def test_falling_off_faster_is_not_reproduced():
    table = table_of(memagent=(0.5,) * 4, memtrain_memagent=(0.9, 0.8, 0.7, 0.6))
    assert claim(table, C3).state == "not reproduced: the interval lies below zero"
    rows = qa_rows({"memagent": (0.5,), "memtrain+memagent": (0.9,)}, lengths=(1,))
    assert claim(Table(rows), C3).state == "not tested: a single length was run"


def test_a_bare_edge_is_not_rounded_into_a_win():
    """With one question the bootstrap has no width; with a hair's breadth the printed interval touches 0."""
    rows = [qa_row("base", 0, 1, [0]), qa_row("memtrain", 0, 1, [1])]
    assert "not tested: too few questions (1," in claim(Table(rows), C1).state
    better = [1] * 4 + [0] * 5996  # +0.07 points, lower bound about +0.02: prints as +0.0
    rows = [qa_row(*own) for seed in range(3)
            for own in (("base", seed, 1, [0] * 6000), ("memtrain", seed, 1, better))]
    found = claim(Table(rows), C1)
    assert found.difference.low == 0.0 and found.word != "reproduced"


def test_different_questions_are_not_compared():
    table = Table(qa_rows({"base": (0.2,) * 4}) + qa_rows({"memtrain": (0.6,) * 4}, n=100))
    assert claim(table, C1).state == "not tested: not the same questions everywhere"


def test_the_committed_claims_are_what_their_runs_say(tmp_path, monkeypatch):
    """By the command that the committed report names."""
    monkeypatch.chdir(Path(__file__).parents[1])
    committed = Path("eval/results/nano")
    command = re.search(r"^    python -m eval\.report (.*)$", (committed / "report.md").read_text(), re.MULTILINE)[1]
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    for name in ("claims.json", "report.md"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), f"{name}: run the command again"


# ---------------------------------------------------------------------------------------------- several runs

def test_pooling_shows_mean_and_range_of_the_seeds(tmp_path):
    paths = []
    for seed, shift in enumerate((0.0, 0.05, 0.1)):
        shares = {s: tuple(v + shift for v in values) for s, values in SHARES.items()}
        paths.append(make_run(tmp_path / f"s{seed}", seed, long_qa=qa_rows(shares, seed)))
    path = write_report(paths[0], paths[1:], tmp_path / "pooled")
    text = path.read_text()
    assert path == tmp_path / "pooled" / "report.md" and not (paths[0] / "report.md").exists()
    assert line(text, "Base, one window")[1:] == [
        "55.0 (50.0–60.0)", "35.0 (30.0–40.0)", "15.0 (10.0–20.0)", "10.0 (5.0–15.0)", "28.8 (23.8–33.8)"]
    assert "3 seeds (0, 1, 2)" in text and "One seed" not in text
    assert "by seed +23.8, +23.8, +23.8" in line(text, "C1 MemTrain over base, average")[2]
    assert all(f"    python memtrain.py --run s{seed}" in text for seed in range(3))
    assert "| + MemTrain | — | 50.0 (50.0–50.0) | 100 |" in text
    # what all runs share is said once: a study has dozens of them
    assert line(text, "device", "How it was made")[1:] == ["cpu"]
    assert text.startswith("# MemTrain in miniature: s0, s1, s2\n")


def test_pooling_refuses_repeated_seeds(tmp_path):
    first = make_run(tmp_path / "a")
    with pytest.raises(InputError, match="seed 0 is already in"):
        write_report(first, [make_run(tmp_path / "c", 0)])
    assert not (first / "report.md").exists()


def test_one_measurement_twice_is_refused(tmp_path):
    rows = [*qa_rows(), qa_row("base", 0, 8, [1] * 200) | {"sections": 99}]
    with pytest.raises(InputError, match="long_qa of base, seed 0"):
        write_report(make_run(tmp_path / "run", long_qa=rows))


# ------------------------------------------------------------------------------------------------ gaps

def test_missing_systems_and_logs_are_shown_as_not_run(tmp_path):
    shares = {"base": SHARES["base"], "memagent": (0.5, 0.4)}  # memagent at two lengths only
    empty = {"recall": [], "masked": [], "stages": []}
    folder = make_run(tmp_path / "run", metrics=False, long_qa=qa_rows(shares), **empty)
    (folder / "training.png").write_bytes(b"from an earlier run")
    text = report(folder)
    assert line(text, "Base, one window")[1:] == ["not run"] * 4 + ["—"]
    ours = next(row for row in text.splitlines() if row.startswith("| + MemAgent | 50.0 ["))
    assert ours.endswith("| not run | not run | — |")
    assert line(text, "C1 MemTrain over base, average")[2:] == ["—", "—", "**not tested**: memtrain not run"]
    assert line(text, "C2 MemTrain+MemAgent over MemAgent, average")[2:] == [
        "—", "—", "**not tested**: memtrain+memagent not run"]
    assert text.count("Not run.") == 4 and "No stage was recorded." in text and "there are no curves" in text
    assert not (folder / "training.png").exists()


def test_only_the_required_fields(tmp_path):
    rows = qa_rows(lengths=(1,))
    for row in rows:
        for field in ("sections", "tokens", "f1", "sub_em_search_r1", "sub_em_memagent", "kinds", "memory_tokens",
                      "finished"):
            del row[field]
    folder = make_run(tmp_path / "run", long_qa=rows, environment={})
    assert "not recorded" in report(folder)


def test_warnings(tmp_path):
    shares = SHARES | {"base-one-window": (0.0, 0.03, 0.01, 0.0), "memtrain": (1.0, 0.97, 0.98, 0.99)}
    text = report(make_run(tmp_path / "run", config={"corpus": "wiki.jsonl"}, long_qa=qa_rows(shares)))
    assert "**Note:** Base, one window is at chance" in text
    assert "**Note:** + MemTrain is saturated" in text and text.count("saturated:") == 1
    assert "learns little from real text" in text and "not the method" in text


def test_interrupted_and_repeated_metrics(tmp_path):
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "memtrain", "step": 30, "reward": 9.0}\n{"stage": "memtr')
    steps = load_run(folder).metrics
    assert len(steps) == 60 and [r for r in steps if r["stage"] == "memtrain"][-1]["reward"] == 9.0
    (folder / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\nnonsense\n{"stage": "a", "step": 2}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        load_run(folder)


def test_text_from_outside_can_not_break_a_table():
    assert md("a|b\nc `x` <img> *y*\r\n") == r"a\|b c \`x\` \<img\> \*y\*"


# ------------------------------------------------------------------------------------------------ bad input

def broken(change) -> dict:
    row = qa_row("base", 0, 1, [1, 0, 1, 0])
    change(row)
    return {"long_qa": [row]}


@pytest.mark.parametrize(("results", "message"), [
    ("{not json", "not JSON"), ("[1, 2]", "instead of a JSON object"),
    ("{}", "of an older form (format None, needed: 2)"),
    ('{"format": 1, "long_qa": []}', "of an older form (format 1, needed: 2)"),
    ('{"format": 2}', "long_qa is empty"),
    ({"long_qa": {}}, "long_qa must be a list"), ({"long_qa": [3]}, "long_qa must be a list of objects"),
    ({"long_qa": [], "config": 3}, "config must be an object"),
    (broken(lambda r: r.pop("em")), "has no 'em'"),
    (broken(lambda r: r.update(system="gpt")), "system must be one of"),
    (broken(lambda r: r.update(system=["base"])), "system must be one of"),
    (broken(lambda r: r.update(em=50.0)), "em must be a number in"),
    (broken(lambda r: r.update(em=True)), "em must be a number in"),
    (broken(lambda r: r.update(em=float("nan"))), "em must be a number in"),
    (broken(lambda r: r.update(em=0.75)), "disagrees"),
    (broken(lambda r: r.update(n=5)), "disagrees"),
    (broken(lambda r: r.update(n=0)), "n must be a number above 0"),
    (broken(lambda r: r.update(correct=[2, 0, 0, 0])), "zeros and ones"),
    (broken(lambda r: r.update(correct="0020")), "zeros and ones"),
    (broken(lambda r: r.update(kinds={"bridge": [3, 2]})), "kinds must be"),
    (broken(lambda r: r.update(kinds={"bridge": 3})), "kinds must be"),
])
def test_bad_results_end_in_one_line(tmp_path, capsys, results, message):
    (tmp_path / "config.json").write_text("{}")
    text = results if isinstance(results, str) else json.dumps({"format": 2} | results)
    (tmp_path / "results.json").write_text(text)
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "report.md").exists()


def test_answers_are_digits_or_a_list(tmp_path):
    for correct in ([1, 0, 1, 0], "1010"):
        make_run(tmp_path, long_qa=[qa_row("base", 0, 1, [1, 0, 1, 0]) | {"correct": correct}])
        assert load_run(tmp_path).results["long_qa"][0]["correct"] == [1, 0, 1, 0]


def test_a_field_is_a_line_and_so_is_a_row():
    value = {"a": [1, -0.5e-9, None], "b": {"c": "[\n1]"}, "d": [], "5": [{"f": [True]}, {"g": 1}]}
    text = json_bytes(value)
    assert json.loads(text) == json.loads(json.dumps(value))
    assert text.splitlines() == [b"{", b' "a": [1, -5e-10, null],', b' "b": {"c": "[\\n1]"},', b' "d": [],', b' "5": [',
                                 b'  {"f": [true]},', b'  {"g": 1}', b" ]", b"}"]
    assert [json.loads(json_bytes(x)) for x in ([value], [], {}, [1])] == [json.loads(json.dumps([value])), [], {}, [1]]


def test_missing_or_unreadable_run(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    assert main([str(tmp_path)]) == 2
    folder = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main([str(folder), "--out", str(tmp_path / "file")]) == 2
    assert "can't write" in capsys.readouterr().err


def test_command_line_without_torch(tmp_path):
    folder = make_run(tmp_path / "run")
    code = ("import runpy, sys; sys.argv = ['eval.report', sys.argv[1]]\n"
            "try: runpy.run_module('eval.report', run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 0, end.code\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "report.md")
