"""The question sets of search QA: which are loaded, in which form, and what is said about sets that are wrong."""

import json

import pytest
from test_text_corpus import DATA, FLASHRAG, HOTPOT, MUSIQUE, needs_data, refuses, write

from data.text.benchmarks import FLASHRAG as HUB
from data.text.benchmarks import REVISION, SPLITS, load_benchmarks

SEVEN = "triviaqa", "bamboogle", "hotpotqa", "nq", "popqa", "2wikimultihopqa", "musique"


def flashrag(*questions: str) -> str:
    return "\n".join(json.dumps({"id": f"q{i}", "question": q, "golden_answers": ["Ann"]})
                     for i, q in enumerate(questions))


def test_specs(folder):
    write(folder / "some" / "mine_dev.jsonl", flashrag("Who?", "Where?", "Why?"))
    write(folder / "h.json", json.dumps([HOTPOT, {**HOTPOT, "_id": "h2"}]))
    write(folder / "musique_train.jsonl", "\n".join(json.dumps({**MUSIQUE, "id": f"2hop__{i}"}) for i in range(4)))
    found = load_benchmarks(" some/mine_dev.jsonl, bridge = h.json ,musique_train.jsonl,x_test=h.json", 3)
    assert list(found) == ["mine", "bridge", "musique", "x_test"], "in the order given"
    assert [len(v) for v in found.values()] == [3, 2, 3, 2]
    assert [q.question for q in found["mine"]] == ["Who?", "Where?", "Why?"]
    assert found["bridge"][0].gold and found["musique"][0].kind == "2hop"
    assert len(load_benchmarks("musique=musique_train.jsonl")["musique"]) == 4


def test_the_seven_come_from_the_hub(hub):
    assert tuple(SPLITS) == SEVEN
    asked = hub([{"id": f"q{i}", "question": f"who is nr {i}", "golden_answers": ["Ann"], "metadata": {}}
                 for i in range(9)])
    for spec in ("all", ",".join(SEVEN)):
        found = load_benchmarks(spec, 5)
        assert tuple(found) == SEVEN and all(len(v) == 5 for v in found.values())
    assert found["nq"][4].question == "who is nr 4" and found["nq"][4].answers == ("Ann",)
    assert asked == [((HUB, name), {"revision": REVISION, "split": SPLITS[name], "streaming": True}) for name in SEVEN]
    assert {name for name in SEVEN if SPLITS[name] == "dev"} == {"hotpotqa", "2wikimultihopqa", "musique"}
    hub(ConnectionError("none"))
    refuses(lambda: load_benchmarks("popqa", 7), HUB, "hub", "popqa=FILE")


@pytest.mark.parametrize(("name", "questions", "parts"), [
    ("mine.jsonl", ["Who?"], ["mine.jsonl", "1 question", "two"]),
    ("mine.jsonl", [], ["mine.jsonl", "0 question", "two"]),
])
def test_questions_that_are_none(folder, capsys, name, questions, parts):
    path = write(folder / name, flashrag(*questions))
    refuses(lambda: load_benchmarks(path), *parts)
    refuses(lambda: load_benchmarks(path, 2), *parts)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("change", "part"), [
    ({"golden_answers": []}, "empty answer"), ({"golden_answers": [" ", ""]}, "empty answer"),
    ({"golden_answers": None}, "instead of a list"), ({"golden_answers": "DELETE"}, "golden_answers"),
    ({"golden_answers": "Ann"}, "str instead of a list"), ({"question": ""}, "empty question"),
    ({"question": "DELETE"}, "`question` is missing"), ({"id": 5}, "occurs twice"), ({"id": "DELETE"}, "`id`"),
])
def test_broken_records(folder, change, part):
    good = {**FLASHRAG, "question": "Who sang?"}
    bad = {k: v for k, v in {**good, "id": 6, **change}.items() if v != "DELETE"}
    lines = "\n".join(json.dumps(r) for r in (good, {**good, "id": 7}, bad))
    write(folder / "b.jsonl", lines)
    for limit in (None, 2):  # a broken record behind the limit is refused too
        refuses(lambda limit=limit: load_benchmarks("mine=b.jsonl", limit), "b.jsonl, line 3", part)


@pytest.mark.parametrize(("spec", "parts"), [
    ("", ["empty item", "NAME=FILE"]), ("nq,,popqa", ["empty item"]), ("nq,", ["empty item"]),
    ("=f.jsonl", ["=f.jsonl"]), ("mine=", ["mine="]), ("NQ", ["NQ", "none of the seven"]),
    ("squad", ["squad", "none of the seven"]),
    ("none.jsonl", ["none.jsonl", "no such file"]), ("nq=none.jsonl", ["none.jsonl", "no such file"]),
    ("f.csv", ["f.csv", "'.csv'"]), ("nq,all", ["nq is given twice"]), ("all,all", ["triviaqa is given twice"]),
    ("f.jsonl,f=f.jsonl", ["f is given twice", "NAME=FILE"]), ("f_dev.jsonl,f_test.jsonl", ["f is given twice"]),
])
def test_bad_specs(folder, hub, spec, parts):
    asked = hub([{"id": "1", "question": "Who?", "golden_answers": ["Ann"]}])
    write(folder / "f.jsonl", flashrag("Who?", "Where?"))
    write(folder / "f.csv", "id,question")
    refuses(lambda: load_benchmarks(spec), *parts)
    refuses(lambda: load_benchmarks("f.jsonl", 1), "f.jsonl", "too few")
    assert asked == [], "nothing is fetched for a spec that can't work"


@needs_data
def test_real_samples():
    files = ["triviaqa_dev.jsonl", "nq_dev.jsonl", "hotpotqa_train.json", "2wikimultihopqa_dev.json",
             "musique_train.jsonl"]
    found = load_benchmarks(",".join(str(DATA / file) for file in files))
    assert {k: len(v) for k, v in found.items()} == {"triviaqa": 100, "nq": 100, "hotpotqa": 100,
                                                     "2wikimultihopqa": 82, "musique": 100}
