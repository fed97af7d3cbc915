"""Facts that change: the timeline world, its shortcuts, what is hidden of it, and what is measured."""

import itertools
import json
import random
from pathlib import Path

import pytest
from synthetic import answers, make_run, qa_row

from data import InputError
from data.config import parse
from data.problems import Data
from data.tasks import MASK, TARGET, Problem, competing, last_masked, masked_in_order, recall_then, split_sections
from data.text.entities import RuleFinder, occurs
from data.world.demonstrations import Demonstrator
from data.world.miniwiki import MiniWorld
from data.world.timeline import KINDS, ROOM, SETTING, Line, Timeline, baselines
from data.world.timeline_demonstrations import Chronicler, needed, suffices
from eval.report import changing
from eval.report.arms import Difference, group
from eval.report.page import main, write_report
from eval.report.results import load_run
from memtrain import main as memtrain_main
from memtrain import recall_probe

FINDER = RuleFinder()


@pytest.fixture(scope="module")
def timelines(tokenizer):
    return {split: Timeline(MiniWorld(600, 0, split), tokenizer) for split in ("train", "dev", "eval")}


# ---- the world ---------------------------------------------------------------------------------------------------


def test_no_shortcut_wins(timelines):
    """Shares of the commonest answer, the first and the last mentioned candidate."""
    for split, timeline in timelines.items():
        found = baselines(timeline, 600, 160)
        assert max(row[0] for row in found.values()) <= 0.03, f"{split}: {found}"
        assert found["all"][1] <= 0.40 and found["all"][2] <= 0.70, f"{split}: {found['all']}"
        assert all(row[2] <= 0.70 for row in found.values()), f"{split}: {found}"


def test_the_commonest_answer_is_right_in_at_most_three_of_a_hundred(timelines):
    asked = [timelines["eval"].asked(i).answer for i in range(3000)]
    assert max(map(asked.count, set(asked))) / len(asked) <= 0.03


def test_names_and_choices_of_the_splits_are_disjoint(timelines):
    named = {}
    for split, timeline in timelines.items():
        threads = [t for i in range(300) for t in timeline.asked(i).threads]
        named[split] = {n for t in threads for n in (t.key, *(x.value for x in t.lines))} - {""}
    assert not named["train"] & (named["dev"] | named["eval"]) and not named["dev"] & named["eval"]
    assert all(len(names) > 100 for names in named.values())


def test_a_history_says_what_holds(timelines):
    """The answer from the lines of the document alone, read as a person would."""
    kinds = set()
    for i in range(400):
        asked = timelines["train"].asked(i)
        problem = timelines["train"].problem(asked, 320)
        body = [p.partition(": ")[2] for p in problem.passages]
        for thread in asked.threads:
            held = [x.value for x in thread.lines if x.move in SETTING]
            assert held == list(thread.held) and all(a != b for a, b in itertools.pairwise(held))
            assert len([x for x in body if x in {y.text for y in thread.lines}]) >= len(thread.lines)
        held = asked.threads[0].held
        if asked.kind in ("now", "first", "before"):
            assert problem.answers == ({"now": held[-1], "first": held[0], "before": held[-2:][0]}[asked.kind],)
        elif asked.kind == "how often":
            assert asked.threads[0].changes > asked.threads[1].changes and problem.answers[0] == asked.threads[0].key
        else:
            assert asked.threads[0].settled and not asked.threads[1].settled
            assert asked.threads[1].lines[-1].move != "settle"
        assert problem.answers[0] not in problem.stale
        assert set(problem.stale) <= (set(held) if asked.kind == "now" else set())
        kinds.add(asked.kind)
    assert kinds == set(KINDS)


def test_the_same_is_asked_at_every_length_and_sections_end_at_whole_turns(timelines, tokenizer):
    for i in range(20):
        short, long = (timelines["eval"].question(i, tokens) for tokens in (160, 1280))
        assert (short.question, short.answers, short.stale) == (long.question, long.answers, long.stale)
        assert len(tokenizer.encode(long.question)) <= ROOM
        parts = split_sections(long.passages, tokenizer, 160)
        lines = [line for ids in parts for line in tokenizer.decode(ids).split("\n") if line]
        assert lines == list(long.passages) and len(parts) >= 7
        tail = sum(map(len, (tokenizer.encode(p + "\n") for p in long.passages)))
        assert 0 <= long.behind < tail


def test_years_of_a_chronicle_go_up_and_a_dialogue_has_two_speakers(timelines):
    genres = {}
    for i in range(60):
        problem = timelines["eval"].question(i, 640)
        genres.setdefault(problem.id.partition("-")[0], []).append([p.partition(": ")[0] for p in problem.passages])
    assert genres.keys() == {"chronicle", "dialogue"}
    for years in genres["chronicle"]:
        assert years == sorted(years) and all(y.isdecimal() for y in years)
    assert all(set(speakers) == {"User", "Aide"} for speakers in genres["dialogue"])


def test_what_the_line_before_says_does_not_count(timelines):
    """behind: tokens after the last move that sets something, of the asked thread."""
    timeline = timelines["eval"]
    asked = next(a for a in map(timeline.asked, range(99)) if a.kind == "now" and a.threads[0].changes > 1)
    problem = timeline.problem(asked, 640)
    said = [x.text for x in asked.threads[0].lines if x.move in SETTING]
    at = max(i for i, p in enumerate(problem.passages) if p.partition(": ")[2] == said[-1])
    assert problem.behind == sum(len(timeline.tokenizer.encode(p + "\n")) for p in problem.passages[at + 1:])
    assert set(problem.current) | set(problem.outdated) == set(said)
    assert all(asked.answer in s for s in problem.current) and not any(asked.answer in s for s in problem.outdated)


# ---- simulated readers -------------------------------------------------------------------------------------------


def line(move: str, value: str = "", key: str = "Oren") -> Line:
    return Line(f"{move} {value} {key}", key, move, value)


def test_what_a_memory_needs():
    a, b, c, old = line("choose", "A"), line("change", "B"), line("back", "A"), line("recall", "B")
    assert needed("now", [a, b, c, old]) == [c] and needed("first", [a, b, c]) == [a]
    assert needed("before", [a, b, c]) == [b, c] and needed("now", [old]) == []
    closed, opened, other = line("settle"), line("open"), line("settle", key="Mara")
    assert needed("settled", [closed, opened, other]) == [opened, other]


def test_readers_are_careless_about_updates(timelines, agent):
    demo = Demonstrator(MiniWorld(200, 5, "train"), agent().prompts, 160, 40)
    demos = Chronicler(demo).batch(0, 0, 40)
    assert {d.kind for d in demos} == {"update", "answer"}
    decode = demo.tokenizer.decode
    for d in demos:
        for _, response in d.suffixes:
            assert response[-1] == demo.tokenizer.end and len(response) <= 41
            assert "[MASK]" not in decode(response), "what is asked for is nothing to note"
    prompts = [decode(d.prefix) for d in demos]
    assert any("Name [MASK]." in p for p in prompts) and any(" now" in p for p in prompts)


def test_names_alone_tell_what_a_demonstration_is_about(timelines, agent):
    """A base that was shown one thread a document noted any line that looked like one."""
    chronicler, others, lines = Chronicler(Demonstrator(MiniWorld(200, 5, "train"), agent().prompts, 160, 40)), [], []
    for i in range(60):
        asked = chronicler.timeline.asked(i)
        own, hidden = [t.key for t in asked.threads], "Mara keeps [MASK] as guide."
        passages = chronicler.document(asked, 320, random.Random(i), hidden)
        assert sum(hidden in p for p in passages) == 1 and hidden in "\n".join(passages[-5:])
        told = [p for p in passages if f" {asked.threads[0].slot.noun}" in p and hidden not in p]
        lines.append(sum(any(k in p for k in own) for p in told))
        others.append(len(told) - lines[-1])
        assert {x.text for t in asked.threads for x in t.lines} <= {p.partition(": ")[2] for p in passages}
    assert sum(others) > 0.2 * sum(lines), "of the same slot; the other two come on top"


def test_an_answer_follows_from_its_memory(timelines):
    for i in range(200):
        asked = timelines["train"].asked(i)
        whole = [x for t in asked.threads for x in t.lines]
        assert suffices(asked, whole), asked
        if asked.kind == "now":
            last = [x for x in whole if x.move in SETTING][-1]
            again = asked.threads[0].held.count(last.value) > 1
            assert again or not suffices(asked, [x for x in whole if x is not last])


# ---- what is hidden ----------------------------------------------------------------------------------------------

TALK = ["User: Book the Alder Inn for Tarrow.", "Aide: The Alder Inn for Tarrow, noted.", "User: Mind you, it rains.",
        "User: Rather the Birch House for Tarrow.", "Aide: It will be cold there.", "User: What of the train?",
        "Aide: So the Birch House for Tarrow it is."]


def test_the_end_is_hidden_while_competing_values_stay_readable(tokenizer):
    """The entity of the last section that was named before and stands beside another of its type."""
    found = competing(TALK[:-1], TALK[-1], FINDER, known=True)
    assert [y for y, _ in found] == ["Birch House"]
    length = len(tokenizer.encode("\n".join(TALK[:5]) + "\n"))
    problem = last_masked("x", TALK, FINDER, tokenizer, length, 99, random.Random(0))
    assert problem.answers == ("Birch House",) and problem.kind == "masked-last"
    assert problem.passages[:5] == tuple(TALK[:5]) and problem.passages[-1] == f"Aide: So the {MASK} for Tarrow it is."
    assert f"So the {MASK} for Tarrow it is." in problem.question
    assert last_masked("x", TALK, FINDER, tokenizer, length, 3, random.Random(0)) is None, "no room for the sentence"
    assert last_masked("x", TALK, FINDER, tokenizer, 10_000, 99, random.Random(0)) is None, "one section has no before"
    assert competing(TALK[:1], TALK[-1], FINDER, known=True) == [], "it was not named before"
    assert competing(["User: The Birch House for Tarrow."], TALK[-1], FINDER, known=True) == [], "nothing competes"


def test_a_recall_asks_for_what_held_then():
    made = recall_then(TALK[:4], FINDER, random.Random(0))
    assert made == (f"User: Rather the {TARGET} for Tarrow.", "Birch House")
    assert recall_then(TALK[:3], FINDER, random.Random(0)) is None


def test_the_papers_mask_on_a_text_in_order():
    problem = masked_in_order("x", TALK, FINDER, random.Random(1))
    (y,) = problem.answers
    assert not any(occurs(p, y) for p in problem.passages) and len(problem.passages) == len(TALK)
    assert masked_in_order("x", TALK, FINDER, random.Random(1), lambda name: False) is None


def test_memtrain_reads_what_it_is_told_to(tokenizer):
    def kinds(*options):
        data = Data(parse([*options, "--stages", "memtrain", "--people", "200"]), tokenizer)
        problems = [data.masked_problem(i) for i in range(4)]
        assert data.masked_problem(0, held_out=True).kind == "masked", "held-out documents stay the paper's"
        return problems

    usual, last = kinds(), kinds("--masked-text", "timeline", "--mask", "last")
    assert [p.kind for p in usual] == ["masked"] * 4 and [p.kind for p in last] == ["masked-last"] * 4
    assert all(p.answers[0] in "\n".join(p.passages) and MASK in "\n".join(p.passages) for p in last)
    whole = kinds("--masked-text", "timeline")
    assert all(p.kind == "masked" and not occurs("\n".join(p.passages), p.answers[0]) for p in whole)
    both = kinds("--masked-text", "both", "--mask", "last")
    assert [p.kind for p in both] == ["masked-last", "masked"] * 2 and both[1] == usual[1]


def test_the_end_of_any_text_can_be_hidden(folder, tokenizer):
    """A corpus file in its own order: rooms of a house whose lodgers change."""
    names = ["Alva Brook", "Tomas Reed", "Ines Falk", "Jonas Wirth"]
    Path("c.jsonl").write_text("".join(json.dumps({"title": f"Day {i}", "text": f"The lodger of Hazel Court is "
                                                   f"{names[i * 7 % 4]}. Rain fell on the yard."}) + "\n"
                                       for i in range(200)))
    data = Data(parse(["--corpus", "c.jsonl", "--mask", "last", "--stages", "memtrain", "--passages", "30",
                       "--window", "340"]), tokenizer)
    problem = data.masked_problem(3)
    assert problem.kind == "masked-last" and problem.answers[0] in names
    Path("d.jsonl").write_text("".join(json.dumps({"title": f"Page {i}", "text": "nothing here has a name"}) + "\n"
                                       for i in range(200)))
    with pytest.raises(InputError, match="--mask last: nothing to hide"):
        Data(parse(["--corpus", "d.jsonl", "--mask", "last", "--stages", "memtrain"]), tokenizer)


def test_the_probe_of_a_masked_end(agent, tokenizer):
    ours = agent()
    parts = [tokenizer.encode(t + "\n") for t in ("\n".join(TALK[:2]), "\n".join(TALK[2:4]), TALK[-1])]

    class Reading:
        problem = Problem("x", "Name [MASK].", ("y",), tuple(TALK), "masked-last")
        sections = parts
        memories = ([1], [2], [3])

    found = {recall_probe(ours, FINDER, Reading, random.Random(i))[1:] and
             tuple(map(str, recall_probe(ours, FINDER, Reading, random.Random(i))[1:])) for i in range(20)}
    assert found == {("[2]", "Birch House"), ("[3]", "Birch House")}, "of the section just read, what overtook"


# ---- what is measured --------------------------------------------------------------------------------------------


def changing_row(system: str, seed: int, length: int, right: float, stale: float, n: int = 100) -> dict:
    """Synthetic: of 100 questions, 80 about what holds now."""
    hits = answers(right, n, seed + length)
    old = [0 if h else int(i % 100 < 100 * stale) for i, h in enumerate(hits)]
    asked = "n" * 80 + "fbhs" * 5
    return qa_row(system, seed, length, hits) | {
        "asked": asked, "stale": "".join(str(o) if a == "n" else "0" for o, a in zip(old, asked, strict=True)),
        "changes": "0123" * 25, "distance": "01" * 50}


def test_the_report_on_facts_that_change(tmp_path):
    shares = {"base": (0.2, 0.5), "memtrain": (0.4, 0.3), "memagent": (0.5, 0.2), "memtrain+memagent": (0.6, 0.1)}
    paths = [make_run(tmp_path / f"s{seed}", seed, changing=[
        changing_row(s, seed, n, *share) for s, share in shares.items() for n in (1, 4)]) for seed in range(3)]
    text = write_report(paths[0], paths[1:], tmp_path / "out").read_text()
    assert "## Facts that change" in text and (tmp_path / "out" / "changing.png").stat().st_size > 10_000
    assert "Facts that change</h2>" in (tmp_path / "out" / "report.html").read_text()
    line = next(x for x in text.split("\n") if x.startswith("| + MemTrain minus Base"))
    assert line.count("helps") == 3, line
    arms = group([load_run(p) for p in paths])
    (base, *_) = changing.stale(arms)
    rows = [r for r in arms[0].rows("changing") if r["system"] == "base"]
    now = [(r["correct"][i], int(r["stale"][i])) for r in rows for i in range(80)]
    right, old = (100 * sum(x[k] for x in now) / len(now) for k in (0, 1))
    assert base[1].startswith(f"{right:.1f} ") and base[2].startswith(f"{old:.1f} ")
    assert abs(float(base[3]) - 100 * old / (100 - right)) < 0.1
    never, *_ = changing.by_changes(arms)[0][1:]
    assert never.endswith(f"({3 * 2 * 20})"), "three seeds, two lengths, a quarter of the questions about now"
    right, old, wrong = map(float, never.split(" (")[0].split(" / "))
    assert old > 0 and abs(wrong - 100 * old / (100 - right)) < 0.2
    assert changing.Facts(arms[0]) is changing.Facts(arms[0]), "built once"


def test_an_arm_that_hides_something_else_starts_from_the_same_base(tmp_path):
    rows = {"full": {"base": (0.2, 0.5), "memtrain": (0.4, 0.3)}, "last": {"memtrain": (0.5, 0.2)},
            "other": {"memtrain": (0.5, 0.2)}}
    config = {"full": {"mask": "any"}, "last": {"mask": "last"}, "other": {"mask": "last", "section": 80}}
    arms = group([load_run(make_run(tmp_path / f"{arm}{seed}", seed, config[arm], changing=[
        changing_row(s, seed, n, *share) for s, share in shares.items() for n in (1, 4)]))
        for arm, shares in rows.items() for seed in range(3)])
    lines = [line for line in changing.effects(arms) if line[0].endswith(", minus base")]
    assert len(lines) == 1 and arms[1].name in lines[0][0], "other sections: another base, not evaluated"
    ours, base = (changing.Facts(arm).right.accuracy(s, [1, 4], range(3)) for arm, s in (
        (arms[1], "memtrain"), (arms[0], "base")))
    assert abs(float(lines[0][1].split(" ")[0]) - 100 * (ours[0] - base[0])) < 0.1 and lines[0][2] == "helps"


def test_without_such_rows_nothing_is_said_of_them(tmp_path):
    text = write_report(make_run(tmp_path / "s0")).read_text()
    assert "Facts that change" not in text and not (tmp_path / "s0" / "changing.png").exists()


def test_a_verdict_needs_three_seeds_and_a_side():
    def of(low, high, seeds=3):
        return Difference((low + high) / 2, low, high, by_seed=(0.0,) * seeds)

    assert changing.verdict(of(1, 3)) == "helps" and changing.verdict(of(-3, -1)) == "harms"
    assert changing.verdict(of(-3, -1), -1) == "helps" and changing.verdict(of(1, 3), -1) == "harms"
    assert changing.verdict(of(-1, 3)).startswith("inconclusive") and "1 seed" in changing.verdict(of(1, 3, 1))
    assert changing.verdict(Difference(reason="memtrain not run")) == "not tested: memtrain not run"


@pytest.mark.parametrize(("field", "value", "said"), [
    ("stale", "01", "one letter for each"), ("changes", 7, "a letter or digit"), ("asked", "n f", "a letter or digit")])
def test_rows_that_can_not_be_counted_are_refused(tmp_path, capsys, field, value, said):
    path = make_run(tmp_path / "s0", changing=[changing_row("base", 0, 1, 0.2, 0.5) | {field: value}])
    assert main([str(path)]) == 2 and said in capsys.readouterr().err


def test_a_run_measures_changing_facts_where_it_is_asked_to(folder, base_checkpoint, capsys):
    """Evaluated later with the flag: rows are added, the others stay; the viewer gets outdated sentences."""
    from conftest import TINY

    command = [*TINY, "--init", base_checkpoint(), "--stages", "memtrain,eval,report", "--memtrain-steps", "1",
               "--masked-text", "timeline", "--mask", "last", "--run", "t", "--eval-questions", "12"]
    assert memtrain_main(command) == 0, capsys.readouterr().err
    before = json.loads(Path("runs/t/results.json").read_text())
    assert before["changing"] == []
    assert memtrain_main([*command, "--changing"]) == 0, capsys.readouterr().err
    after = json.loads(Path("runs/t/results.json").read_text())
    assert after["long_qa"] == before["long_qa"]
    assert {(r["system"], r["length"]) for r in after["changing"]} == {(s, n) for s in ("base", "memtrain")
                                                                       for n in (1, 2)}
    documents = json.loads(Path("runs/t/readings.json").read_text())["documents"]
    told = [d for d in documents if d["task"] == "changing"]
    assert told and all(d["outdated"] and set(d["systems"]) == {"base", "memtrain"} for d in told)
    for d in told:
        assert all(any(s in text for text in d["sections"]) for s in (*d["outdated"], *d["gold"]))
    assert "## Facts that change" in Path("runs/t/report.md").read_text()
