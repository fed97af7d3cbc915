"""The pictures of README.md, drawn from committed results."""

import json
import re
from pathlib import Path

import pytest

from eval.report import pictures
from eval.report.pictures import main, sentences, telling

ROOT = Path(__file__).parents[1]
RUN = ROOT / "eval" / "results" / "nano" / "s0"


def test_they_are_drawn_and_the_same_every_time(tmp_path, capsys):
    for name in ("one", "two"):
        assert main([str(RUN), "--out", str(tmp_path / name)]) == 0
    for picture in ("loop.png", "reading.png"):
        first, second = ((tmp_path / name / picture).read_bytes() for name in ("one", "two"))
        assert first == second and first[:8] == b"\x89PNG\r\n\x1a\n" and len(first) > 10_000
    assert "reading.png" in capsys.readouterr().out


def test_the_reading_shows_what_one_keeps_and_the_other_loses():
    document = telling(json.loads((RUN / "readings.json").read_text())["documents"])
    base, trained = (document["systems"][name] for name in pictures.SHOWN)
    assert trained["answer"] in document["answers"] and base["answer"] not in document["answers"]
    marked = [line for line, counts in sentences(trained["memories"][-1], document["gold"]) if counts]
    assert marked and all(line in " ".join(document["gold"]) for line in marked)


def test_lines_are_wrapped_and_marked_whole():
    long = "A " + "very " * 20 + "long fact."
    lines = sentences(f"{long} Another one.", [long])
    assert len(lines) > 2 and all(len(line) <= pictures.WIDTH for line, _ in lines)
    assert [counts for _, counts in lines] == [True] * (len(lines) - 1) + [False]


@pytest.mark.parametrize("content", [None, "not JSON", json.dumps({"documents": []})])
def test_a_run_without_readings_is_refused_in_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "readings.json").write_text(content)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pictures: ") and not (tmp_path / "out").exists()


def test_the_front_door_is_short_and_its_links_lead_somewhere():
    """At most 150 lines, 10 KB, 30 words a sentence and 15 a table cell; every link and every file named is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 10_240
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for line in prose.splitlines():
        if line.startswith("|"):
            assert all(len(cell.split()) <= 15 for cell in line.strip("|").split("|")), line
        else:
            assert all(len(sentence.split()) <= 30 for sentence in re.split(r"(?<=[.!?:])\s", line)), line
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        assert link.startswith("https://") or (ROOT / path).exists(), link
        if anchor and not link.startswith("https://"):
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, link


def test_the_front_door_says_what_the_rule_says():
    """States and figures of README.md are those of the committed report."""
    claims = {c["id"]: c for c in json.loads((RUN.parent / "claims.json").read_text(encoding="utf-8"))}
    rows = re.findall(r"^\| (C\d): [^|]+\|[^|]+\|([^|]+)\|([^|]+)\|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert 3 <= len(rows) <= 5
    for name, figures, state in rows:
        assert state.strip(" *") == claims[name]["state"], name
        if (c := claims[name]).get("difference") is not None:  # C8 has two
            assert f"{c['difference']:+.1f} [{c['low']:+.1f}, {c['high']:+.1f}]" in figures, name
