"""What memories hold: known readings give known figures; readings.json is complete, resumable and deaf to its text."""

import json
import types

import pytest
from conftest import TINY

import memtrain
from data import InputError
from data.tasks import MASK, MASK_PROBLEM, Problem
from data.text.corpus import Passage, Question
from data.text.entities import RuleFinder
from data.world.miniwiki import Fact
from eval.memory import (
    FURTHER,
    READINGS,
    Book,
    Memories,
    chosen_lengths,
    load_readings,
    masked_book,
    phrasings,
    question_book,
    sentences,
    tally,
)

FOUNDED = Fact("Tellinford", "founder", "Joren Tellin")
BORN = Fact("Joren Tellin", "birth_year", "1714")
PEOPLE = Fact("Tellinford", "population", "5000")
PHRASES = phrasings(types.SimpleNamespace(facts=[FOUNDED, BORN, PEOPLE]))
FINDER = RuleFinder()
QUESTION = Problem("q", "What is the birth year of the founder of Tellinford?", ("1714",), (), "bridge")
SECTIONS = ["Tellinford: Tellinford was founded by Joren Tellin.\n",
            "Tellinford: The quiet bridge draws visitors. Tellinford has 5000 people.\n",
            "Joren Tellin: Joren Tellin was born in 1714. The bridge is quiet in every season.\n",
            "Joren Tellin: Joren Tellin built Tellinford.\n"]


def tallied(book: Book, memories) -> dict:
    return tally([book], [memories])


def asked(sections=SECTIONS, facts=(FOUNDED, BORN)) -> Book:
    return question_book(QUESTION, sections, 4, FINDER, (), facts, PHRASES)


def test_a_known_reading_gives_known_figures():
    row = tallied(asked(), ["Tellinford was founded by Joren Tellin.",
                            "Tellinford was founded by Joren Tellin.\n Tellinford  has 5000 people.",
                            "Joren Tellin was born in 1714.",
                            "Joren Tellin settled Tellinford. Mobrin Kovem was born in 1714."])
    # the founder is asked after for three memories, until the fourth section says it again; the year for two
    assert row["retention"] == [[2, 2], [1, 2], [0, 1]]
    assert row["verbatim"] == pytest.approx(4 / 6)
    assert (row["n"], row["unit"]) == (1, "facts")


def test_a_fact_that_is_said_again_is_not_asked_after_any_more():
    twice = [SECTIONS[0], SECTIONS[3], SECTIONS[1], SECTIONS[0]]
    kept = ["", *["Tellinford was founded by Joren Tellin."] * 3]
    assert tallied(asked(twice, [FOUNDED]), kept)["retention"] == [[0, 1]], "noted anew, not kept"
    once = [SECTIONS[0], *[SECTIONS[1]] * 9]
    row = tallied(asked(once, [FOUNDED]), ["Tellinford was founded by Joren Tellin."] * 10)
    assert row["retention"] == [[1, 1]] * FURTHER, "a longer document ends there"


@pytest.mark.parametrize("memory", [
    "Tellinford was founded by Joren Tellin", "Tellinford was founded by Joren Tellin and others.",
    "Tellinford was founded by Joren.", "New Tellinford was founded by Joren Tellin.",
    "tellinford was founded by joren tellin.", "Joren Tellin was founded by Tellinford.", "", "..."])
def test_what_is_not_a_fact_word_for_word_is_none(memory):
    row = tallied(asked(SECTIONS[:1], [FOUNDED]), [memory])
    assert row["retention"] == [[0, 1]]


def test_a_fact_counts_from_the_section_that_says_it():
    """Stated before it was read, it was not read: neither kept nor counted as held."""
    row = tallied(asked(SECTIONS[1:3], [BORN]), ["Joren Tellin was born in 1714."] * 2)
    assert row["retention"] == [[1, 1]] and row["verbatim"] == 0.5


def test_nothing_to_count_is_null():
    row = tallied(asked(SECTIONS[1:2], []), [""])
    assert row["n"] == 1 and row["retention"] is None and row["verbatim"] is None


def test_masked_documents():
    world = types.SimpleNamespace(clue_facts=lambda name: (FOUNDED,) if name == "Tellinford" else ())
    problem = Problem("m", MASK_PROBLEM, ("Tellinford",), (), "masked")
    sections = [s.replace("Tellinford", MASK) for s in SECTIONS]
    book = masked_book(problem, sections, 8, world, PHRASES)
    assert book.gold == {FOUNDED} and book.marks == [MASK]
    assert book.shown == ["[MASK] was founded by Joren Tellin.", "Joren Tellin built [MASK]."]
    row = tallied(book, ["[MASK] was founded by Joren Tellin.", "Tellinford was founded by Joren Tellin.", "[MASK].",
                         "Kovemford was founded by Joren Tellin."])
    assert row["retention"] == [[1, 1], [1, 1], [0, 1]], "by its mask and by its name"
    assert row["verbatim"] == pytest.approx(1 / 4), "the name is not what the sections say, nor yet the third"


def test_real_questions_show_their_evidence():
    passages = ["Kay: Stephen Kay was born in Auckland in 1963.", "Get Carter: Get Carter stars Mickey Rourke."]
    problem = Problem("r", "Where was the director of Get Carter born?", ("Auckland",), (), "bridge")
    sections = ["Other: Anna Bell lives in Oslo.\nKay: Stephen Kay was born in Auck", "land in 1963.\n",
                passages[1] + "\n"]
    book = question_book(problem, sections, 4, FINDER, passages)
    assert book.phrases is None and book.marks == ["Get Carter"]
    assert book.shown == ["Kay: Stephen Kay was born in Auck", "Get Carter: Get Carter stars Mickey Rourke."]
    row = tallied(book, ["Stephen Kay, Auckland", passages[0], "Get Carter: Get Carter stars Mickey Rourke."])
    assert row["unit"] is None and row["retention"] is None and row["verbatim"] == pytest.approx(2 / 3)


def test_real_masked_documents_have_their_clues_beside_the_mask():
    passage = "Carter: It was directed by [MASK] in 2000. Rhona Mitra was in it."
    book = masked_book(Problem("m", MASK_PROBLEM, ("Kay",), (passage,), "masked"), [passage], 8)
    assert book.shown == ["Carter: It was directed by [MASK] in 2000."] and book.marks == [MASK]


def test_sentences_of_any_text():
    assert sentences("It is. So it is!\n\n e\n...\n-") == ["It is.", "So it is!", "e"]
    assert sentences("He is J. Smith. So.") == ["He is J. Smith.", "So."]


def test_lengths_are_chosen_by_what_was_evaluated():
    assert chosen_lengths([1, 2, 4, 8, 16, 32]) == (8, 4)
    assert chosen_lengths([1, 2]) == (2, 2) and chosen_lengths([6, 64]) == (6, 6) and chosen_lengths([16]) == (0, 0)


# ---- readings.json

HOSTILE = "</script><script>alert(1)</script><!-- & \" ' \\ \u2028 {{x}} \0 \x1b[31m \ud800 [MASK] é"


@pytest.fixture
def stand_in(tmp_path, agent):
    """stand_in() -> (Memories of a run on one hostile question, problems, rollouts)."""
    question = Question("q</script>", HOSTILE + "?", (HOSTILE,), (Passage(HOSTILE, HOSTILE + "."),), (), HOSTILE)
    a = agent()
    run = types.SimpleNamespace(
        data=types.SimpleNamespace(questions=[question], held_out_world=None, finder=FINDER), evaluated=a,
        c=types.SimpleNamespace(seed=3, masked_sections=8, eval_masked=0, world="eval"),
        folder=types.SimpleNamespace(path=tmp_path, measured=lambda world: tmp_path))
    problem = Problem(question.id, question.question, question.answers, (question.gold[0].rendered,), HOSTILE)
    sections = len(list(a.sections(problem)))
    memories = [a.tokenizer.encode(f"{HOSTILE} {i}") for i in range(sections)]
    rollout = memtrain.Rollout(problem, [], [], memories, HOSTILE)

    def build():
        return Memories(run, [4]), [problem], [rollout]
    return build


def test_hostile_text_survives(stand_in, tmp_path):
    memories, problems, rollouts = stand_in()
    rows, kept = memories.note("base", 4, problems, rollouts)
    memories.keep("base", kept)
    assert rows["memory"]["n"] == 1 and rows["memory"]["task"] == "question" and rows["memory"]["length"] == 4
    text = (tmp_path / "readings.json").read_bytes()
    assert text.isascii() and b"\0" not in text and b"\x1b" not in text
    (document,) = load_readings(tmp_path / "readings.json")
    assert document["question"] == HOSTILE + "?" and document["answers"] == [HOSTILE] and document["kind"] == HOSTILE
    shown = HOSTILE.replace("\ud800", "\ufffd")  # a token holds no lone surrogate
    assert "".join(document["sections"]).count(shown) == 2
    reading = document["systems"]["base"]
    assert reading["memories"] == [f"{shown} {i}" for i in range(len(document["sections"]))]
    assert reading["answer"] == HOSTILE and reading["correct"] == 0, "an answer with a placeholder is none"
    json.dumps(document, allow_nan=False)


def test_a_second_system_is_added_to_the_same_document(stand_in, tmp_path):
    for system in ("base", "memtrain"):  # each as a new process finds it
        memories, problems, rollouts = stand_in()
        row, kept = memories.note(system, 4, problems, rollouts)
        assert row["memory"]["system"] == system
        memories.keep(system, kept)
    (document,) = load_readings(tmp_path / "readings.json")
    assert list(document["systems"]) == ["base", "memtrain"]
    assert memories.note("base-one-window", 4, problems, rollouts) == ({}, [])


def test_readings_of_other_documents_are_refused(stand_in, tmp_path):
    memories, problems, rollouts = stand_in()
    memories.keep("base", memories.note("base", 4, problems, rollouts)[1])
    path = tmp_path / "readings.json"
    value = json.loads(path.read_text())
    value["documents"][0]["sections"][0] = "another text"
    path.write_text(json.dumps(value))
    memories, *_ = stand_in()
    with pytest.raises(InputError, match=r"readings\.json: document .* another text.*delete"):
        memories.keep("memtrain", memories.note("memtrain", 4, problems, rollouts)[1])
    assert json.loads(path.read_text()) == value, "what was there is intact"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "documents": []}', '{"format": 1}', "\x80", "[" * 9999,
                                  '{"format": 1, "documents": [1]}', '{"format": 1, "documents": [{"id": "x"}]}'])
def test_what_are_no_readings_is_refused_in_one_line(text, folder, base_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    path = folder / "runs/t/readings.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    assert memtrain.main([*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "eval"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "readings.json" in lines[-1] and "delete it" in lines[-1]
    assert path.read_bytes() == text.encode("latin-1") and not (folder / "runs/t/results.json").exists()


# ---- in a run


def test_an_evaluation_writes_rows_and_readings(folder, base_checkpoint, monkeypatch):
    """Once for each system, from readings made anyway; a second start adds a system and reads no other again."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    read, calls = memtrain.Agent.read, []

    def counted(self, problems, keys, keep_turns=True):
        if keys[0][0] in ("eval", "held-out"):
            calls.append(keys[0][2])
        return read(self, problems, keys, keep_turns)

    monkeypatch.setattr(memtrain.Agent, "read", counted)
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--eval-lengths", "1,4", "--memtrain-steps", "1"]
    assert memtrain.main([*command, "--stages", "eval"]) == 0
    assert calls == ["base"] * 3, "masked documents, questions at 1x and at 4x: nothing for the memory alone"
    results, readings = (json.loads((folder / "runs/t" / n).read_text()) for n in ("results.json", "readings.json"))
    rows = results["memory"]
    assert [(r["system"], r["seed"], r["task"], r["length"], r["n"], r["unit"]) for r in rows] == [
        ("base", 3, "masked", 8, 3, "facts"), ("base", 3, "question", 4, 4, "facts")]
    for row in rows:
        assert all(0 <= kept <= of for kept, of in row["retention"]) and row["retention"][0][1] > 0
        assert 0 <= row["verbatim"] <= 1
    documents = readings["documents"]
    assert [d["task"] for d in documents] == ["masked"] * 3 + ["question"] * 4 and READINGS >= 4
    for d in documents:
        assert d["systems"].keys() == {"base"} and len(d["systems"]["base"]["memories"]) == len(d["sections"])
        assert d["gold"] and all(any(g in s for s in d["sections"]) for g in d["gold"])
        assert d["marks"] and all(m == MASK or m in d["question"] for m in d["marks"])
    correct = next(r["correct"] for r in results["long_qa"] if r["system"] == "base" and r["length"] == 4)
    assert "".join(str(d["systems"]["base"]["correct"]) for d in documents[3:]) == correct

    calls.clear()
    assert memtrain.main([*command, "--stages", "memtrain,eval"]) == 0
    assert calls == ["memtrain"] * 3
    after = [json.loads((folder / "runs/t" / n).read_text()) for n in ("results.json", "readings.json")]
    assert after[0]["memory"][:2] == rows and [r["system"] for r in after[0]["memory"][2:]] == ["memtrain"] * 2
    for old, new in zip(documents, after[1]["documents"], strict=True):
        assert new["systems"].pop("memtrain").keys() == {"memories", "answer", "correct"} and new == old
