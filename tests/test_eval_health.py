"""What one step of MemTrain has to select on: filled memories, groups with a signal, recall and its room."""

import random

import pytest

import memtrain
from eval.gates import show
from eval.health import ROOM, differing, filled_memory, health
from memtrain import Agent


def test_a_group_has_a_signal_where_its_rewards_differ():
    assert differing([0, 0, 1, 1, 0, 1], 2) == [False, False, True] and differing([], 4) == []


def test_a_filled_memory_holds_whole_sentences_within_its_budget(tokenizer):
    sections = [tokenizer.encode("Torvig: Oren was born in Torvig. Torvig lies on the Alm."),
                tokenizer.encode("Lanning: The port of Lanning was founded in 1702.")]
    said = {"Oren was born in Torvig.", "Torvig lies on the Alm.", "The port of Lanning was founded in 1702."}
    whole = tokenizer.decode(filled_memory(tokenizer, sections, 500, random.Random(0)))
    assert all(s in whole for s in said) and "Torvig:" not in whole
    for budget in range(0, 60, 7):
        ids = filled_memory(tokenizer, sections, budget, random.Random(budget))
        left = tokenizer.decode(ids)
        for sentence in said:
            left = left.replace(sentence, "")
        assert len(ids) <= budget and not left.strip(), "nothing is cut short"


def test_health_of_a_step(agent, lottery, capsys):
    """By a lottery that pays every other answer, groups of three readings and two recalls mostly have a signal; the
    same step gives the same figures."""
    a = agent()
    value = health(a, a.c, memtrain.recall_probe, 2)
    assert value.keys() == {*ROOM, "tokens"} and value == health(a, a.c, memtrain.recall_probe, 2)
    assert value["tokens"] > 0 and 0.2 < value["recall_signal"] <= 1 and 0.2 < value["reading_signal"] <= 1
    assert all(0 < value[name] < 1 for name in ("recall_own", "recall_filled"))
    show(value | {"recall_own": 0.149, "recall_filled": 0.4}, ROOM, {"tokens": "sampled"}, "one step")
    out = capsys.readouterr().out
    assert "recall_own       0.149  0.15-1.00  FAIL" in out and "recall_filled    0.400  0.40-1.00  ok" in out


@pytest.mark.parametrize(("fields", "kinds"), [
    ((), {"masked"}), (("--masked-text", "timeline", "--mask", "last"), {"masked-last"}),
    (("--masked-text", "both", "--mask", "last"), {"masked", "masked-last"})])
def test_health_is_of_the_documents_that_are_trained_on(agent, lottery, monkeypatch, fields, kinds):
    a, read, seen = agent(*fields), Agent.read, set()

    def note(self, problems, *rest, **named):
        seen.update(p.kind for p in problems)
        return read(self, problems, *rest, **named)

    monkeypatch.setattr(Agent, "read", note)
    assert 0 <= health(a, a.c, memtrain.recall_probe, 1)["recall_own"] <= 1 and seen == kinds
