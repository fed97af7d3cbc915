"""Stories and conversations as question files: bAbI, LoCoMo, LongMemEval's form; what is refused of them."""

import gzip
import json
from pathlib import Path

import pytest

from data import InputError
from data.tasks import qa_document
from data.text.benchmarks import load_benchmarks
from data.text.corpus import Passage, load_questions
from eval.longqa import scores
from eval.metrics import locomo_f1
from memtrain import main

SHARED = Path(__file__).parents[2] / "shared" / "data"
BABI = ("1 Nora went to the attic.\n2 Piet went to the cellar.\n3 Where is Nora? \tattic\t1\n"
        "4 Nora moved to the porch.\n5 Where is Nora? \tporch\t4\n"
        "1 Piet went to the attic.\n2 Where is Piet? |attic|1\n")
LOCOMO = [{"sample_id": "talk-1", "conversation": {
    "speaker_a": "Nora", "speaker_b": "Piet", "session_1_date_time": "1:56 pm on 8 May, 2023",
    "session_1": [{"speaker": "Nora", "dia_id": "D1:1", "text": "I took the Alder Inn."},
                  {"speaker": "Piet", "dia_id": "D1:2", "text": "Good, I like\nit there."}],
    "session_2_date_time": "9:05 am on 9 May, 2023",
    "session_2": [{"speaker": "Nora", "dia_id": "D2:1", "text": "No, the Birch House after all."}]},
    "qa": [{"question": "Where does Nora stay?", "answer": "Birch House", "evidence": ["D2:1"], "category": 4},
           {"question": "In which year?", "answer": 2023, "evidence": [], "category": 2},
           {"question": "Why?", "answer": "price; she said so", "evidence": [], "category": 3},
           {"question": "Which inns?", "answer": "Alder Inn, Birch House", "evidence": [], "category": 1},
           {"question": "What did Piet pay?", "adversarial_answer": "much", "evidence": [], "category": 5}]}]
LONGMEMEVAL = [{"question_id": "q1", "question_type": "knowledge-update", "question": "Where do I stay?",
                "answer": "Birch House", "question_date": "2023/05/30 (Tue) 23:40",
                "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/22 (Mon) 10:00"],
                "haystack_session_ids": ["a", "b"], "answer_session_ids": ["b"],
                "haystack_sessions": [[{"role": "user", "content": "I took the Alder Inn."},
                                       {"role": "assistant", "content": "Noted."}],
                                      [{"role": "user", "content": "No, Birch House.", "has_answer": True}]]}]


def write(name: str, value) -> str:
    Path(name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return name


def test_babi_asks_of_what_was_told_before(folder):
    first, second, third = load_questions(write("babi_qa9_test.txt", BABI))
    assert [q.answers[0] for q in (first, second, third)] == ["attic", "porch", "attic"]
    assert [p.rendered for p in second.gold] == ["Nora went to the attic.", "Piet went to the cellar.",
                                                 "Nora moved to the porch."]
    assert {q.kind for q in (first, second, third)} == {"babi_qa9"} and len({q.id for q in (first, second, third)}) == 3
    assert [p.rendered for p in third.gold] == ["Piet went to the attic."], "a story of its own"


def test_statements_are_scattered_in_their_order(folder, tokenizer):
    """As BABILong does: other passages between them, the latest state last."""
    question = load_questions(write("b.txt", BABI))[1]
    pool = [Passage(f"Page {i}", f"Nothing to see on page {i}.") for i in range(80)]
    orders = set()
    for seed in range(6):
        passages = qa_document(question, pool, tokenizer, 400, seed).passages
        told = [p for p in passages if not p.startswith("Page")]
        assert told == [p.rendered for p in question.gold] and len(passages) > 15
        orders.add(tuple(i for i, p in enumerate(passages) if not p.startswith("Page")))
    assert len(orders) > 3, "not always in the same places"


def test_locomo_has_dates_and_five_categories(folder):
    questions = load_questions(write("l.json", LOCOMO))
    assert [q.kind for q in questions] == [f"locomo: {k}" for k in (
        "single-hop", "time", "world knowledge", "multi-hop", "unanswerable")]
    assert [q.answers[0] for q in questions[:4]] == ["Birch House", "2023", "price", "Alder Inn, Birch House"]
    assert [p.rendered for p in questions[0].gold] == [
        "Session 1: 1:56 pm on 8 May, 2023", "Nora: I took the Alder Inn.", "Piet: Good, I like it there.",
        "Session 2: 9:05 am on 9 May, 2023", "Nora: No, the Birch House after all."]


def test_longmemeval_keeps_knowledge_updates_apart(folder):
    (question,) = load_questions(write("m.json", LONGMEMEVAL))
    assert (question.kind, question.answers) == ("knowledge-update", ("Birch House",))
    assert question.question == "Where do I stay? (asked 2023/05/30 (Tue) 23:40)"
    assert [p.rendered for p in question.gold][-1] == "user: No, Birch House."
    (question,) = load_questions(write("m.json", [LONGMEMEVAL[0] | {"question_id": "q1_abs"}]))
    assert question.kind == "knowledge-update without an answer"


def test_they_are_benchmarks_too(folder):
    write("b.txt", BABI)
    write("l.json", LOCOMO)
    found = load_benchmarks("babi=b.txt,l.json")
    assert {name: len(questions) for name, questions in found.items()} == {"babi": 3, "l": 5}


def test_packed_files_and_parquet_are_the_same_questions(folder):
    """Parquet gives every conversation the sessions of the longest."""
    from pyarrow import Table, parquet

    Path("babi_qa9_test.txt.gz").write_bytes(gzip.compress(BABI.encode()))
    assert load_questions("babi_qa9_test.txt.gz") == load_questions(write("babi_qa9_test.txt", BABI))
    short = changed(LOCOMO, 0, "qa", 1, "answer", to="2023")
    short[0]["sample_id"] = "talk-2"
    for key in ("session_2", "session_2_date_time"):
        del short[0]["conversation"][key]
    talks = changed(LOCOMO, 0, "qa", 1, "answer", to="2023") + short
    parquet.write_table(Table.from_pylist(talks), "l.parquet")
    assert load_questions("l.parquet") == load_questions(write("l.json", talks))
    assert set(load_benchmarks("babi_qa9_test.txt.gz,l.parquet")) == {"babi_qa9", "l"}


def test_locomos_own_f1():
    """By hand: stems, "and" dropped, commas part a multi-hop answer, a refusal is right where nothing is known."""
    assert locomo_f1("The adopted dogs", ["adopting dog"], "single-hop") == 1
    assert locomo_f1("dogs", ["cats and dogs"], "time") == pytest.approx(2 / 3)
    assert locomo_f1("dogs, birds", ["cats, dogs"], "multi-hop") == 0.5
    assert locomo_f1("dogs, birds", ["cats, dogs"], "single-hop") == 0.5
    refusals = ("not mentioned", "no information available")
    assert locomo_f1("It is Not mentioned here", refusals, "unanswerable") == 1
    assert locomo_f1("much", refusals, "unanswerable") == locomo_f1(None, refusals, "unanswerable") == 0
    assert locomo_f1(None, ["x"], "time") == locomo_f1("", ["x"], "multi-hop") == 0


def test_categories_are_scored_apart(folder, tokenizer):
    problems = [qa_document(q, [], tokenizer, 1, 0) for q in load_questions(write("l.json", LOCOMO))]
    row = scores(["Birch House", "1999", "the price", "Alder Inn", "not mentioned"], problems)
    assert row["locomo_f1"] == {"locomo: single-hop": [1, 1], "locomo: time": [0, 1], "locomo: world knowledge": [1, 1],
                                "locomo: multi-hop": [pytest.approx(0.5), 1], "locomo: unanswerable": [1, 1]}
    assert "locomo_f1" not in scores(["x"], problems[:0] or [problems[0].__class__("i", "q", ("x",), (), "bridge")])


def changed(value, *path, to):
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    if to is None:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return value


TALKED = (0, "conversation")
REFUSED = {
    "no number": ("b.txt", "Nora went home.\n", "line 1: no bAbI line"),
    "no story yet": ("b.txt", "1 Where is Nora? \tattic\t1\n", "without a statement"),
    "cut before the answer": ("b.txt", "1 Nora left.\n2 Where is Nora?", "without an answer"),
    "no answer": ("b.txt", "1 Nora left.\n2 Where is Nora? \t\t1\n", "without an answer"),
    "lines in disorder": ("b.txt", "1 A left.\n3 B left.\n2 C left.\n", "line 2 of a story follows line 3"),
    "begins in the middle": ("b.txt", "4 A left.\n", "count up from 1"),
    "only statements": ("b.txt", "1 A left.\n2 B left.\n", "not one question"),
    "no timeline": ("l.json", changed(LOCOMO, *TALKED, "session_1_date_time", to=None), "date_time` is missing"),
    "no date": ("l.json", changed(LOCOMO, *TALKED, "session_1_date_time", to="soon"), "session_1: 'soon' is no date"),
    "dates out of order": ("l.json", changed(LOCOMO, *TALKED, "session_2_date_time", to="1:00 am on 1 May, 2020"),
                           "session_2: 1:00 am on 1 May, 2020 lies before session_1"),
    "empty turn": ("l.json", changed(LOCOMO, *TALKED, "session_1", 0, "text", to=" "), "turn 1: `text` is empty"),
    "one speaker": ("l.json", changed(LOCOMO, *TALKED, "session_1", 1, "speaker", to="Nora"), "1 speaker"),
    "no session": ("l.json", [{"conversation": {}, "qa": []}], "without session_1"),
    "a turn of another form": ("l.json", changed(LOCOMO, *TALKED, "session_1", 0, to="hello"), "a turn is {role"),
    "answer is a list": ("l.json", changed(LOCOMO, 0, "qa", 0, "answer", to=["x"]), "`answer` must be a text"),
    "answer is missing": ("l.json", changed(LOCOMO, 0, "qa", 0, "answer", to=None), "`answer` must be a text"),
    "a list of categories": ("l.json", changed(LOCOMO, 0, "qa", 0, "category", to=[1]), "`category` must be one of"),
    "empty question": ("l.json", changed(LOCOMO, 0, "qa", 0, "question", to=" "), "`question` is empty"),
    "odd category": ("l.json", changed(LOCOMO, 0, "qa", 0, "category", to=9), "`category` must be one of 1 to 5"),
    "dates are too few": ("m.json", changed(LONGMEMEVAL, 0, "haystack_dates", to=["2023/05/20 (Sat) 02:21"]),
                          "2 haystack_sessions and 1 haystack_dates"),
    "sessions out of order": ("m.json", changed(LONGMEMEVAL, 0, "haystack_dates", 1, to="2023/05/01 (Mon) 10:00"),
                              "haystack_dates[1], 2023/05/01 (Mon) 10:00, lies before"),
    "answer is true": ("m.json", changed(LONGMEMEVAL, 0, "answer", to=True), "`answer` must be a text, not True"),
    "no question date": ("m.json", changed(LONGMEMEVAL, 0, "question_date", to=None), "`question_date` is missing"),
    "odd question date": ("m.json", changed(LONGMEMEVAL, 0, "question_date", to="soon"), "'soon' is no date"),
    "no sessions": ("m.json", changed(changed(LONGMEMEVAL, 0, "haystack_sessions", to=[]), 0, "haystack_dates", to=[]),
                    "0 haystack_sessions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_ends_in_one_line(folder, case):
    name, value, said = REFUSED[case]
    with pytest.raises(InputError) as error:
        load_questions(write(name, value))
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def corpus(n: int = 60) -> str:
    return "".join(json.dumps({"title": f"Page {i}", "text": f"Page {i} tells of Mill {i % 7} and of the year "
                               f"{1800 + i}."}) + "\n" for i in range(n))


def test_a_run_on_stories(folder, base_checkpoint, capsys):
    """bAbI's training file trains MemAgent, its test file is asked; the same words of another story are no leak."""
    from conftest import TINY

    write("c.jsonl", corpus(300))
    write("babi_qa1_train.txt", BABI)
    write("babi_qa1_test.txt", BABI.replace("attic", "barn"))
    assert main([*TINY, "--init", base_checkpoint(), "--corpus", "c.jsonl", "--questions", "babi_qa1_test.txt",
                 "--train-questions", "babi_qa1_train.txt", "--stages", "memagent,eval,report", "--memagent-steps", "1",
                 "--run", "t", "--eval-questions", "3"]) == 0, capsys.readouterr().err
    rows = json.loads(Path("runs/t/results.json").read_text())["long_qa"]
    assert all(set(r["kinds"]) == {"babi_qa1"} for r in rows) and {r["system"] for r in rows} >= {"base", "memagent"}
    assert main([*TINY, "--init", base_checkpoint(), "--corpus", "c.jsonl", "--questions", "babi_qa1_train.txt",
                 "--train-questions", "babi_qa1_train.txt", "--run", "u"]) == 2, "the same story is"
    assert "is also question" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.exists(), reason="no sample data in ../shared/data")
def test_the_published_files_are_read():
    assert {len(load_questions(str(SHARED / f"babi_{q}_test.txt"))) for q in ("qa1", "qa2", "qa3")} == {500}
    questions = load_questions(str(SHARED / "locomo5.json"))
    assert len(questions) == 999 and len({q.kind for q in questions}) == 5
