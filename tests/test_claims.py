"""Claims C4-C8, arms and backbones, the ledger, and what is refused: synthetic runs, no model involved."""

import json
import types

import numpy as np
import pytest
from synthetic import LENGTHS, SHARES, answers, make_run, memory_rows, qa_rows, reading, search_row, search_rows

from data import InputError
from data.config import ABLATIONS, Config
from eval.metrics import bootstrap_mean
from eval.plan import parameters
from eval.report.claims import MIN_QUESTIONS, Table, backbones, group, on_arms, on_backbones, on_search, verdicts
from eval.report.ledger import ledger, power, stage_cost
from eval.report.page import embedded, main, overall, ranged, readings, write_report
from eval.report.results import load_run
from eval.report.tables import ablations, scaling

BOTH = "memtrain+memagent"


def runs_of(tmp_path, arms: dict[str, tuple[dict, dict]], seeds=(0, 1)) -> list:
    """{name: (config, shares)} -> loaded runs, one a seed."""
    return [load_run(make_run(tmp_path / f"{name}-{seed}", seed, config, long_qa=qa_rows(shares, seed)))
            for name, (config, shares) in arms.items() for seed in seeds]


def change(name: str) -> dict:
    """What an ablation changes in the default configuration."""
    entry = ABLATIONS[name]
    return entry(vars(Config())) if callable(entry) else entry


# ------------------------------------------------------------------------------------------------ arms


def test_runs_are_grouped_into_arms_and_named(tmp_path):
    arms = group(runs_of(tmp_path, {
        "full": ({}, SHARES), "e2e": ({"recall_group": 0, "threads": 7, "eval_lengths": "1,2"}, SHARES),
        "half": (change("memory-half"), SHARES), "lr": ({"lr": 0.001, "kl": 0.5}, SHARES)}))
    assert [(arm.name, len(arm.runs)) for arm in arms] == [
        ("full", 2), ("end-to-end", 2), ("memory-half", 2), ("kl=0.5, lr=0.001", 2)]
    assert arms[0].changed == {} and arms[1].changed == {"recall_group": 0}


def test_no_two_ablations_are_the_same_and_all_name_fields():
    made = [change(name) for name in ABLATIONS]
    assert len({json.dumps(value, sort_keys=True) for value in made}) == len(ABLATIONS)
    assert all(vars(Config()).keys() >= value.keys() and value for value in made)


def test_the_claims_about_arms(tmp_path):
    lower = {BOTH: tuple(v - 0.25 for v in SHARES[BOTH])}
    late = {BOTH: (*SHARES[BOTH][:2], 0.40, 0.30)}
    runs = runs_of(tmp_path, {"full": ({}, SHARES), "e2e": ({"recall_group": 0}, lower),
                              "decoupled": ({"recall_weight": 0.0}, late),
                              "longer": ({"memagent_steps": 24}, {"memagent": (0.8, 0.75, 0.7, 0.6)})})
    c4, c5, c6 = on_arms(group(runs))
    assert c4.verdict == "reproduced" and c4.difference.mean == 25.0 and "63.3 without" in c4.paper
    assert c5.verdict == "reproduced" and c5.ours.startswith("4x to 8x: +30.0 [")
    assert "at the shorter lengths, 1x to 2x: +0.0 [" in c5.ours
    assert c6.verdict == "not reproduced: the interval includes zero" and "24 steps" in c6.claim
    table = ablations(group(runs), BOTH)
    assert [row[0] for row in table] == ["full", "end-to-end", "decoupled"], "the longer arm has no such system"
    assert table[0][6] == "" and table[1][6].startswith("+25.0 [") and table[1][1].startswith("55.0 (")
    assert [row[0] for row in scaling(group(runs))] == [
        "+ MemAgent, 15 steps of MemAgent", "+ MemAgent, 24 steps of MemAgent",
        "+ MemTrain + MemAgent, 15 steps of MemAgent"]


def test_a_worse_full_method_is_not_reproduced(tmp_path):
    better = {BOTH: tuple(v + 0.15 for v in SHARES[BOTH])}
    c4, *_ = on_arms(group(runs_of(tmp_path, {"full": ({}, SHARES), "e2e": ({"recall_group": 0}, better)})))
    assert c4.verdict == "not reproduced: the difference is negative" and c4.difference.high < 0


def test_arms_are_compared_on_what_they_share(tmp_path):
    """Seeds and lengths that one arm lacks don't count; other questions can't be compared at all."""
    full = runs_of(tmp_path / "a", {"full": ({}, SHARES)}, seeds=(0, 1, 2))
    short = make_run(tmp_path / "short", 1, {"recall_group": 0}, long_qa=qa_rows({BOTH: (0.3, 0.3)}, 1))
    c4, *_ = on_arms(group([*full, load_run(short)]))
    assert c4.difference.by_seed == (47.5,), "seed 1 alone, at 1x and 2x"
    row = ablations(group([*full, load_run(short)]), BOTH)[1]
    assert row[3:5] == ["not run", "not run"] and row[5].endswith("over 1x, 2x")
    other = make_run(tmp_path / "other", 1, {"recall_weight": 0.0, "eval_questions": 50}, long_qa=qa_rows(seed=1))
    arms = group([*full, load_run(other)])
    assert arms[1].name == "eval_questions=50, recall_weight=0.0"
    assert ablations(arms, BOTH)[1][6] == "other questions: eval_questions differ"


# ------------------------------------------------------------------------------------------------ search


def test_search_is_compared_pair_by_pair():
    average, every = on_search(Table(search_rows(), "benchmark", 2))[0]
    assert average.verdict == every.verdict == "reproduced" and average.difference.mean == 20.0
    assert "7 of 7" in every.ours and "+10.6 (Qwen3-4B)" in average.paper and "7 of 7 (Qwen3-4B)" in every.paper
    rows = search_rows()
    for row in rows:
        if row["system"] == "memtrain+mem1" and row["benchmark"] == "date":
            row.update(search_row("memtrain+mem1", 0, "date", answers(0.3, 120, 9)))
    average, every = on_search(Table(rows, "benchmark", 2))[0]
    assert average.verdict == "reproduced" and every.verdict == "not reproduced: not above zero at date"


def test_the_two_questions_of_a_pair_belong_together():
    """Where both always have the same outcome there are half as many independent answers: a wider interval."""
    bits = answers(0.5, 100, 1)
    twice, apart = [x for bit in bits for x in (bit, bit)], [x for bit in bits for x in (bit, 1 - bit)]
    tables = [Table([search_row("mem1", 0, "a", [0] * 200), search_row("memtrain+mem1", 0, "a", own)], "benchmark", 2)
              for own in (twice, apart)]
    wide, narrow = (t.compare("memtrain+mem1", "mem1", ["a"]) for t in tables)
    assert wide.mean == narrow.mean == 50.0 and narrow.low == narrow.high == 50.0
    assert wide.high - wide.low > 15


def test_few_pairs_are_not_tested_but_their_average_may_be():
    table = Table(search_rows(pairs=MIN_QUESTIONS - 1), "benchmark", 2)
    average, every = on_search(table)[0]
    assert average.verdict == "reproduced"
    assert every.verdict.startswith(f"not tested: too few pairs of questions ({MIN_QUESTIONS - 1},")


def test_benchmarks_are_resampled_each_on_its_own():
    """Independent parts: the variance of the mean is that of independent means, however the parts are ordered."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(1, 400)) for _ in range(4)]
    _, low, high = bootstrap_mean(parts, n=4000)
    expected = 2 * 1.96 * np.sqrt(sum(p.var() / p.size for p in parts)) / 4
    assert high - low == pytest.approx(expected, rel=0.08)


def test_search_rows_are_checked(tmp_path, capsys):
    rows = search_rows()
    rows[0]["n"] = 5
    assert main([str(make_run(tmp_path / "a", search_qa=rows))]) == 2
    assert "search_qa[0]: 'correct' disagrees with 'n' or 'em'" in capsys.readouterr().err
    assert main([str(make_run(tmp_path / "b", memory=[memory_rows()[0] | {"retention": [[3, 2]]}]))]) == 2
    assert "memory[0].retention must be a list of [kept, asked]" in capsys.readouterr().err
    twice = make_run(tmp_path / "c", search_qa=[*search_rows(), search_rows()[0]])
    assert main([str(twice)]) == 2 and "search_qa of base, seed 0 is already in" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ backbones


def test_backbones_are_told_apart_by_their_shape(tmp_path):
    runs = runs_of(tmp_path, {"nano": ({}, SHARES), "small": ({"width": 384, "layers": 8, "window": 1024}, SHARES)})
    named = backbones(runs)
    assert list(named) == ["width 128, 4 layers", "width 384, 8 layers"]
    c8 = on_backbones(named)
    assert c8.verdict == "reproduced" and c8.ours.count("reproduced") == 4
    worse = SHARES | {BOTH: SHARES["memagent"]}
    c8 = on_backbones(backbones([*runs[:2], *runs_of(tmp_path / "w", {"small": ({"width": 384}, worse)})]))
    assert c8.verdict == "not reproduced: C2 for width 384, 4 layers" and "width 384, 4 layers: C1 +" in c8.ours
    assert on_backbones(backbones(runs[:2])).verdict == "not tested: runs of one backbone only"
    text = write_report(runs[0].path, [r.path for r in runs[1:]], tmp_path / "out").read_text()
    assert "Tables and plots show the first backbone, width 128, 4 layers" in text
    assert "| C8 it holds for more than one backbone | C1 and C2 for Qwen3-4B" in text
    assert text.count("The same for another backbone, width 384, 8 layers:\n\n| document length | 1x |") == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h3>The same for another backbone, width 384, 8 layers</h3>") == 1


def test_the_worst_line_is_the_verdict_of_a_claim():
    made = [types.SimpleNamespace(verdict=v) for v in ("reproduced", "not tested: x", "not reproduced: y")]
    assert overall(made) == "not reproduced" and overall(made[:2]) == "not tested" and overall(made[:1]) == "reproduced"


def test_ranges_share_one_axis(tmp_path):
    summary, _ = verdicts(backbones(runs_of(tmp_path, {"full": ({}, SHARES)})))
    drawn = [r["range"] for r in ranged(summary) if r["range"]]
    assert len(drawn) == 4 and len({r["zero"] for r in drawn}) == 1, "a claim that was not tested has none"
    assert all(0 <= r["low"] <= r["mean"] <= r["low"] + r["width"] <= 100 for r in drawn)


# ------------------------------------------------------------------------------------------------ ledger, readings


def test_flops_are_counted_by_hand():
    c = Config()
    weights, _ = parameters(c, 1000)
    state = {"tokens_sampled": 10, "tokens_trained": 7}
    cost = stage_cost(state, c, 1000)
    multiplied = weights - 1000 * c.width  # the embedding is looked up
    assert cost["flops"] == multiplied * (2 * 10 + 6 * 7) and cost["tokens_prompts"] is None
    assert stage_cost(state | {"tokens_prompts": 100}, c, 1000)["flops"] == multiplied * (2 * 110 + 6 * 7)
    assert stage_cost({"tokens": 5}, c, 1000)["flops"] == multiplied * 6 * 5


@pytest.mark.parametrize(("device", "watts", "card"), [
    ("NVIDIA H100 80GB HBM3", 700, "H100"), ("NVIDIA A100-SXM4-80GB", 400, "A100-80"),
    ("NVIDIA GeForce RTX 4090", 450, "4090"), ("Some Card 9", 400, "not known"), ("cpu", 40, "CPU thread")])
def test_power_is_assumed_and_said(device, watts, card):
    found, said, hours = power({"device": device, "threads": 4})
    assert found == watts and card in said and hours == (4 if device == "cpu" else 1)


def test_the_ledger_adds_up(tmp_path):
    rows, notes = ledger(group(runs_of(tmp_path, {"full": ({}, SHARES), "e2e": ({"recall_group": 0}, SHARES)})))
    assert [(r["arm"], r["stage"]) for r in rows] == [
        ("full", "memtrain"), ("full", "eval"), ("end-to-end", "memtrain"), ("end-to-end", "eval"), ("", "all")]
    assert rows[0]["runs"] == 2 and rows[0]["seconds"] == pytest.approx(246.8)
    assert rows[0]["hours"] == pytest.approx(246.8 * 2 / 3600), "two threads"
    assert rows[-1]["seconds"] == pytest.approx(2 * (246.8 + 72)) and rows[-1]["unit"] == "CPU-hours"
    assert rows[-1]["kwh"] == pytest.approx(rows[-1]["hours"] * 10 / 1000)
    assert rows[1].get("flops") is None and any("Prompts" in note for note in notes)


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d.pop("sections"), "has no 'sections'"), (lambda d: d.update(gold=[1]), "gold must be a list of texts"),
    (lambda d: d["systems"]["base"].update(memories="x"), "memories must be a list of texts"),
    (lambda d: d["systems"]["base"].update(correct=2), "correct must be 0 or 1"),
    (lambda d: d["sections"].pop(), "more memories than the document has sections"),
    (lambda d: d.update(systems={"base": 3}), "must be an object")])
def test_bad_readings_end_in_one_line(tmp_path, capsys, change, message):
    document = reading(0, 3)
    change(document)
    folder = make_run(tmp_path / "r")
    (folder / "readings.json").write_text(json.dumps({"format": 1, "documents": [document]}))
    assert main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and "documents[0]" in err
    assert not (folder / "report.html").exists()


def test_readings_of_another_form_are_refused(tmp_path):
    folder = make_run(tmp_path / "r")
    (folder / "readings.json").write_text('{"documents": []}')
    with pytest.raises(InputError, match="readings of another form"):
        write_report(folder)


def test_embedded_json_is_whole_and_can_not_end_its_element():
    value = {"a": "</script><!-- <script>&amp;\u2028\ud800\x00", "n": [1, None, True]}
    text = embedded(value)
    assert not set("<>&\u2028\ud800\x00") & set(text) and json.loads(text) == value


def test_too_many_documents_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.report.page.VIEWER_BYTES", 20_000)
    folder = make_run(tmp_path / "r")
    (folder / "readings.json").write_text(json.dumps({"format": 1, "documents": [reading(i, 8) for i in range(12)]}))
    data, (shown, all_) = readings([load_run(folder)])
    assert 0 < shown < all_ == 12 and len(data) < 25_000
    assert f"shows {shown} of 12 documents" in write_report(folder).read_text()


def test_memories_are_told_apart_by_document_and_may_lack_a_count(tmp_path):
    rows = memory_rows()
    masked = [row | {"task": "masked", "retention": None, "gold_per_100": None} for row in rows]
    text = write_report(make_run(tmp_path / "r", memory=rows + masked)).read_text()
    section = text[text.index("## What memories hold"):]
    assert "| + MemTrain | question documents, facts | 90.0 (100) | 81.0 (100) |" in section
    assert "| + MemTrain | masked documents, facts | — | — |" in section and "| 80.0 | 2.0 |" in section


def test_lengths_of_the_synthetic_runs():
    assert LENGTHS == (1, 2, 4, 8), "the halves of C5 above are 1x, 2x and 4x, 8x"


# ------------------------------------------------------------------------------------------------ results.json


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results() -> what an evaluation in this folder would go on with."""
    from eval import stage

    monkeypatch.setattr(stage, "environment", lambda run: {"commit": "abc"})
    state = {"done": True, "step": 3, "seconds": 2.0, "tokens_sampled": 10, "tokens_trained": 20, "rewards": [0.0, 1.0]}
    folder = types.SimpleNamespace(path=tmp_path, finished=lambda name: state if name == "mem1" else None)
    run = types.SimpleNamespace(folder=folder, c=Config(), tokenizer=types.SimpleNamespace(size=1000))
    return lambda: stage.Results(run)


def test_an_evaluation_goes_on_with_its_rows_and_its_seconds(results, tmp_path):
    first = results()
    first.add(long_qa=qa_rows()[0])
    first.add(search_qa=search_rows()[0], memory=memory_rows()[0])
    first.add(long_qa=qa_rows()[0])
    spent = json.loads((tmp_path / "results.json").read_text())["evaluation"]["seconds"]
    again = results()
    assert again.has("base-one-window", 1) and not again.has("base", 1) and spent > 0
    again.finish()
    value = json.loads((tmp_path / "results.json").read_text())
    assert value["format"] == 2 and value["evaluation"]["seconds"] == spent
    assert [len(value[s]) for s in ("long_qa", "search_qa", "memory", "masked")] == [1, 1, 1, 0], "no row twice"
    (stage,) = value["stages"]
    assert stage["name"] == "mem1" and stage["reward_last"] == 1.0
    assert stage["flops"] == stage_cost({"tokens_sampled": 10, "tokens_trained": 20}, Config(), 1000)["flops"]
    write_report(tmp_path)


@pytest.mark.parametrize("old", ['{"long_qa": []}', '{"format": 1}', '{"format": 2, "memory": 3}',
                                 '{"format": 2, "evaluation": {"seconds": "x"}}'])
def test_results_of_an_older_form_are_refused_and_stay(results, tmp_path, old):
    (tmp_path / "results.json").write_text(old)
    with pytest.raises(InputError, match=r"results\.json: .*delete it to evaluate anew"):
        results()
    assert (tmp_path / "results.json").read_text() == old
