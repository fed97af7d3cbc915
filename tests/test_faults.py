"""What a run survives: kills, terminals that go away, a network that does."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY

import memtrain
from data import InputError
from data.files import ROOT, output
from eval import faults
from eval.faults import Moment

# ---- killed at any moment


@pytest.mark.parametrize("seed", [1])
def test_a_killed_run_ends_as_one_left_alone(seed, tmp_path):
    """The short form of `python -m eval.faults`: four kills in different stages."""
    result = faults.trial(4, seed, tmp_path, "base,memtrain,eval,report")
    assert result["problems"] == [] and result["most_steps_redone"] == 1 and result["kills"] == 4
    assert len({stage for stage, _, _ in result["table"]}) >= 3, "the kills have to reach different stages"
    assert faults.show(result).endswith("none missing")


MOMENTS = [Moment(stage, step, phase, n) for stage in ("base", "memtrain") for step in range(4)
           for phase in ("sampling", "before checkpoint.safetensors", "checkpoint.safetensors renamed",
                         "before checkpoint.json") for n in range(2 if phase == "sampling" else 1)]


def test_kills_are_spread_and_can_be_met():
    for seed in range(20):
        chosen = faults.choose(MOMENTS, 16, random.Random(seed))
        assert len(set(chosen)) == 16 and chosen == sorted(chosen, key=MOMENTS.index)
        assert min(Counter((m.stage, m.phase) for m in chosen).values()) >= 1
        assert len({(m.stage, m.phase) for m in chosen}) == 8
        assert max(Counter((m.stage, m.step) for m in chosen if m.committed).values()) == 1


def test_steps_done_again_are_counted():
    steps = [Moment("base", i, "sampling", 0) for i in range(5)]
    assert faults.most_redone(steps, [steps[:3], steps[2:]]) == 1  # taken up at the step it was killed in
    assert faults.most_redone(steps, [steps[:3], steps[3:]]) == 0
    assert faults.most_redone(steps, [steps[:3], steps[1:]]) == 2
    assert faults.most_redone(steps, [steps, steps]) == 5


def test_every_difference_is_noticed():
    rows = [{"stage": "base", "step": i, "loss": 1.0} for i in range(3)]
    whole = {"weights": {"a": "x"}, "metrics": rows, "results": {"em": 0.5}}
    assert faults.compare(whole, dict(whole)) == []
    assert faults.compare(whole, whole | {"weights": {"a": "y"}}) == ["weights differs"]
    assert faults.compare(whole, whole | {"results": {"em": 0.6}}) == ["results differs"]
    assert "('base', 2) is missing" in faults.compare(whole, whole | {"metrics": rows[:2]})
    assert "('base', 1) is there 2 times" in faults.compare(whole, whole | {"metrics": [*rows, rows[1]]})


def test_a_run_that_fails_by_itself_is_no_kill(tmp_path):
    victim = faults.Victim(tmp_path / "v", ["--grup", "3"])
    with pytest.raises(InputError, match=r"exit code 2.*--grup"):
        victim.start()


def test_no_state_of_a_global_generator_has_to_be_kept(folder, lottery, tiny, tokenizer, monkeypatch):
    """Every random number follows from a key or a step: torch, numpy and Python's generators are not touched, so that
    a checkpoint that does not hold them loses nothing."""
    monkeypatch.setattr(memtrain, "estimate", lambda run: (0.0, 0))
    monkeypatch.setattr("eval.gates.gates", lambda agent, c: {})
    memtrain.Data(tiny(), tokenizer).masked_problem(0)  # loads libraries, some of which draw a number for themselves
    before = torch.get_rng_state(), np.random.get_state()[1:], random.getstate()
    assert memtrain.main([*TINY, "--run", "t", "--stages", "base,memtrain,memagent,eval", "--memtrain-steps", "2",
                          "--memagent-steps", "1", "--group", "4"]) == 0
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state()[1:], before[1], strict=True))
    rows = [json.loads(line) for line in (folder / "runs/t/metrics.jsonl").read_text().splitlines()]
    assert any(row.get("loss") for row in rows if row["stage"] != "base"), "something has to be learned"


# ---- where results may be written


@pytest.mark.parametrize("path", ["data", "data/x.json", "eval/x.json", "memtrain.py", "README.md", "tests/new", ".",
                                  "eval/results/../metrics.py", "kernels/../data/y", ".git/config"])
def test_the_own_source_is_no_place_for_results(path, tmp_path):
    with pytest.raises(InputError, match=r"--out .*source.*runs/"):
        output(ROOT / path)
    (tmp_path / "link").symlink_to(ROOT)
    with pytest.raises(InputError, match="--out"):
        output(tmp_path / "link" / path)


def test_places_for_results(tmp_path):
    for path in (tmp_path / "x", ROOT / "runs/a/x.json", ROOT / "eval/results/new/x.json", ROOT / "figures.json"):
        assert output(path) == path
