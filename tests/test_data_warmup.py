"""Demonstrations from raw text: lines word for word, problems that their memories answer, nothing of an evaluation."""

import json
import random
from pathlib import Path

import pytest
from test_memtrain_command import refused, write
from test_weights_real import FIELDS, main, model  # noqa: F401 (a fixture)

from data import InputError
from data.config import parse, preset_of
from data.prompts import Prompts
from data.tasks import MASK, TARGET
from data.text.corpus import Corpus, Passage, Question
from data.text.entities import RuleFinder, occurs
from data.text.evidence import Evidence, without_evidence
from data.warmup import Reader, lines

TOWNS = ("Arlem", "Brask", "Corvo", "Delmar", "Esker", "Fintry", "Gorst", "Halden", "Ister", "Jarrow")


@pytest.fixture
def reader(tokenizer):
    text = "{0} Bay lies in Upper Norland. It was mapped by Ada {0} in {1}. Its lighthouse burned down on 3 May {2}."
    corpus = Corpus([Passage(f"{t} Bay", text.format(t, 1700 + i, 1800 + i)) for i, t in enumerate(TOWNS)], "bays")
    return Reader(corpus, RuleFinder(), Prompts(tokenizer, "section-first", memory=160), 400, 160)


def test_lines_are_sentences_with_their_title():
    text = "Oak: It is tall. It was planted by J. Smith in 1900.\nin London. He said: yes. No.\n"
    assert lines(text) == ["Oak: It is tall.", "Oak: It was planted by J. Smith in 1900.", "in London.",
                           "He said: yes.", "No."], "what a section begins with may have lost its title"


def test_a_gap_is_filled_from_the_document_alone(reader):
    rng = random.Random(0)
    for _ in range(20):
        e = reader.cloze(rng, 300)
        assert not occurs(e.problem, e.answer) and any(occurs(p, e.answer) for p in e.passages)
        assert e.needed[0] in lines("\n".join(e.passages))


def test_a_corpus_without_a_name_is_refused(tokenizer):
    corpus = Corpus([Passage("nothing", "of interest at all."), Passage("nothing", "else.")], "c")
    nameless = Reader(corpus, RuleFinder(), Prompts(tokenizer, "section-first", memory=160), 400, 160)
    for draw in (lambda: nameless.cloze(random.Random(0), 300), lambda: nameless.recall_case(random.Random(0))):
        with pytest.raises(InputError, match=r"corpus c: no .*--entities"):
            draw()


def test_a_reader_copies_word_for_word_and_forgets_nothing_that_matters(reader):
    e = reader.masked(0, 3, 300)
    text = lines("\n".join(e.passages))
    bearing = [s for s in text if MASK in s]
    memory = reader.update(e, ["Note: one line."], text)
    assert set(bearing[:1]) <= set(memory) <= {*text, "Note: one line."} and memory[0] == "Note: one line."
    assert reader.update(e, memory, ["Elsewhere: nothing."]) == memory
    assert reader.update(e, [], ["Elsewhere: nothing."]) == ["Elsewhere: nothing."], "never an empty memory"
    full = [f"Idle {i}: {'word ' * 20}" for i in range(3)]
    assert set(bearing[:1]) <= set(reader.update(e, full, text)), "lines that don't matter make room"


def test_responses_end_and_hold_what_they_should(reader, tokenizer):
    rows = reader.batch(0, 1, 2)
    assert rows == reader.batch(0, 1, 2) != reader.batch(0, 2, 2) and len(rows) >= 12
    for prefix, suffixes in rows:
        for given, response, weight in suffixes:
            assert response[-1] == tokenizer.end and weight > 0
            text, shown = tokenizer.decode(response[:-1]), tokenizer.decode(prefix + given)
            if text.strip().startswith("\\boxed{"):
                continue
            assert all(s in shown for s in text.split("\n") for s in [s.partition(": ")[2]])


def test_a_recall_names_what_its_memory_holds(reader, tokenizer):
    for i in range(10):
        section, memory, target = reader.recall_case(random.Random(i))
        assert TARGET in tokenizer.decode(section) and not occurs(tokenizer.decode(section), target)
        assert occurs(tokenizer.decode(memory), target)


def test_evidence_of_evaluation_questions_is_kept_out_and_counted():
    corpus = Corpus([Passage("A", "one"), Passage("A", "two"), Passage("B", "three")], "c")
    asked = [Question("q", "Who?", ("x",), (Passage("A", "as the question file has it"),), (Passage("B", "other"),))]
    kept, out = without_evidence(corpus, Evidence(asked))
    assert [p.title for p in kept.passages] == ["B"] and out == 2
    assert without_evidence(corpus, Evidence([])) == (corpus, 0)


def test_a_warm_up_is_what_later_stages_start_from(model, lottery, monkeypatch, capsys, folder):  # noqa: F811
    """MemTrain's first KL is 0, so that its reference is the warmed-up policy; `gates` measures that again."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    monkeypatch.setattr("memtrain.commit", lambda: "abc")
    small = [*FIELDS, "--model", model, "--run", "t", "--memory", "150", "--response", "151", "--demo-documents", "1"]
    text = "{0} Bay lies in Upper Norland. Ada {0} mapped it in {1}."
    rows = [{"title": f"{t} Bay {i}", "text": text.format(t, 1700 + i)} for t in TOWNS for i in range(30)]
    write(c__jsonl="\n".join(map(json.dumps, rows)))
    assert main([*small, "--stages", "warmup,memtrain", "--demo-steps", "2", "--memtrain-steps", "1"]) == 0, (
        capsys.readouterr().err)
    rows = [json.loads(line) for line in Path("runs/t/metrics.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rows] == ["warmup", "warmup", "memtrain"]
    assert rows[2]["kl"] == pytest.approx(0, abs=1e-6)
    shown = capsys.readouterr().out
    assert "finished" in shown and "FAIL" in shown, "a model of two random layers passes no gate"
    assert main(["gates", "--checkpoint", "runs/t/warmup"]) == 1
    assert "copied" in capsys.readouterr().out


def test_a_warm_up_without_a_model_is_refused(folder, capsys):
    refused(capsys, ["--stages", "warmup"], "warmup", "--model")


def test_a_folder_chooses_the_preset_of_its_size(model):  # noqa: F811
    assert preset_of(model) == preset_of("owner/name") == "paper"
    assert parse(["--preset", "smollm2-135m", "--stages", "report"]).prompts == "short"
