"""Search QA: what a response means, what each turn shows, what is rewarded and trained, what the base is shown."""

import json
import random

import pytest
import torch

import memtrain
from data import InputError
from data.prompts import Prompts
from data.search import CORRECTION, NOTHING_FOUND, Action, boxes, search_problem, split_response
from data.tasks import Problem
from data.text.corpus import Corpus, Passage, Question
from data.text.retrieval import Retriever
from data.world.demonstrations import Demonstrator, sentences
from data.world.miniwiki import FAMILIES, MiniWorld
from data.world.search_demonstrations import Searcher
from eval.header import evidence
from eval.searchqa import search_row

PASSAGES = [Passage("Kovemgate", "Kovemgate was built by Mobrin Kovem."),
            Passage("Mobrin Kovem", "Mobrin Kovem came of age after 1714."),
            Passage("Zafolt River", "Zafolt River is 312 miles long.")]
PAIR = search_problem([Question("a", "Who built Kovemgate?", ("Mobrin Kovem",), (PASSAGES[0],), ()),
                       Question("b", "How long is Zafolt River?", ("312",), (PASSAGES[2],), ())], "made up")


@pytest.mark.parametrize("text, state, query, answers", [
    (" Kovemgate is old.\nSearch: Kovemgate built", " Kovemgate is old.", "Kovemgate built", ()),
    ("Search:  Kovemgate\n built by", "", "Kovemgate", ()),
    (" One.\nAnswer:\\boxed{ Mobrin Kovem}\\boxed{ 312}", " One.", "", ("Mobrin Kovem", "312")),
    (" One.\n\n  Answer: \\boxed{x} and\n\\boxed{y}", " One.", "", ("x", "y")),
    (" One.\nAnswer:\\boxed{ x}", " One.", "", ()),  # one of two
    (" One.\nAnswer:\\boxed{ x}\\boxed{ y}\\boxed{ z}", " One.", "", ()),  # a guess too many
    (" One.\nAnswer:\\boxed{ x}\\boxed{ }", " One.", "", ()),
    (" One.\nAnswer:\\boxed{ x}\\boxed{ y", " One.", "", ()),
    (" One.\nSearch:", " One.", "", ()),
    (" I Search: nothing", " I Search: nothing", "", ()),  # in the middle of a line it is text
    (" One.\nSearch: a\nAnswer:\\boxed{ x}\\boxed{ y}", " One.\nSearch: a", "", ("x", "y")),  # the last action counts
    ("Answer:\\boxed{ x}\\boxed{ y}\n No.\nSearch: a b", "Answer:\\boxed{ x}\\boxed{ y}\n No.", "a b", ()),
    (" One.\nSearch: a\nAnswer: not known yet", " One.", "a", ()),  # begins like an action and is none
    (" One.\nAnswer:\\boxed{ x}\\boxed{ y}\nSearch:", " One.", "", ("x", "y")),
    (" One.\nAnswer: none\n Two.\nSearch:", " One.", "", ()),
    (" One.\nAnswer: \\boxed {\\text{x}} \\boxed{\\textbf{y}}", " One.", "", ("x", "y")),
    ("", "", "", ()),
])
def test_a_response_is_a_state_and_an_action(tokenizer, text, state, query, answers):
    ids = tokenizer.encode(text)
    kept, parsed = split_response(ids, tokenizer, 2)
    assert tokenizer.decode(kept) == state and kept == ids[:len(kept)]
    assert (parsed.query, parsed.answers) == (query, answers)
    assert parsed.malformed == (not query and not answers)


def test_the_state_keeps_its_very_tokens(tokenizer):
    """Sampled tokens need not be those that encoding their text would give: they go on as they are."""
    odd = [tokenizer.encode(x)[0] for x in " Kov"] + [i for x in "emé" for i in tokenizer.encode(x)]
    kept, action = split_response([*odd, *tokenizer.encode("\nSearch: é")], tokenizer, 2)
    assert kept == odd and action == Action(query="é")


def test_boxes_is_linear_and_takes_the_outermost():
    assert boxes("\\boxed{a \\boxed{b}} \\boxed{ c }") == ["a \\boxed{b}", "c"]
    assert boxes("\\boxed{a} \\boxed{b \\boxed{c}") == ["a", "c"]
    assert boxes("\\boxed{" * 200_000) == [] and boxes("\\boxed{x}" * 50_000) == ["x"] * 50_000


class Scripted:
    """Samples what a script says, and remembers the prompts."""

    def __init__(self, agent, monkeypatch, *responses: str, stop: bool = True):
        self.prompts = []
        tokenizer = agent.tokenizer

        def sample(prompts, keys, limit=0):
            self.prompts.append([tokenizer.decode([*p, *g]) for p, g in prompts])
            ids = [*tokenizer.encode(responses[len(self.prompts) - 1]), *([tokenizer.end] if stop else [])]
            assert len(ids) <= limit + 40
            return [memtrain.Turn(p, g, ids, [-1.0] * len(ids)) for p, g in prompts]
        monkeypatch.setattr(agent, "sample", sample)


def play(agent, monkeypatch, *responses: str):
    script = Scripted(agent, monkeypatch, *responses)
    (episode,) = agent.search([PAIR], [("k", 0)], Retriever(Corpus(PASSAGES, "three")))
    return episode, [p for (p,) in script.prompts]


def test_a_turn_sees_the_last_state_query_and_result_alone(agent, monkeypatch):
    episode, prompts = play(agent(), monkeypatch, " Nothing.\nSearch: Kovemgate built",
                            " Kovemgate was built by Mobrin Kovem.\nSearch: Zafolt River miles",
                            " Mobrin Kovem. 312.\nAnswer:\\boxed{ Mobrin Kovem}\\boxed{ 312}")
    first, second, third = prompts
    assert "Query:" not in first and "No search yet." in first and "No memory yet." in first
    assert "Query: Kovemgate built\n" in second and PASSAGES[0].rendered in second and "Memory: Nothing.\n" in second
    assert "Zafolt River miles" in third and PASSAGES[2].rendered in third
    assert "Memory: Kovemgate was built by Mobrin Kovem.\n" in third
    assert PASSAGES[0].rendered not in third and "Nothing." not in third and "Kovemgate built" not in third
    assert all(PAIR.question in p for p in prompts) and not any("Answer now." in p for p in prompts)
    assert episode.hits == [1.0, 1.0] and episode.correct == 1.0 and len(episode.turns) == 3
    assert episode.finished == 3


def test_a_malformed_action_is_corrected_and_costs_a_turn(agent, monkeypatch):
    episode, prompts = play(agent("--turns", "3"), monkeypatch, " I think.", " Still.\nAnswer:\\boxed{ 312}",
                            " Now.\nAnswer:\\boxed{ 312}\\boxed{ 312}")
    assert CORRECTION.strip() in prompts[1] and CORRECTION.strip() in prompts[2] and "Memory: I think." in prompts[1]
    assert "Answer now." in prompts[2] and "Answer now." not in prompts[1]
    assert [a.malformed for a in episode.actions] == [True, True, False]
    assert episode.hits == [0.0, 1.0] and episode.correct == 0.5


def test_an_emptied_memory_looks_alike_in_every_loop(agent, monkeypatch):
    """Reading, answering, recalling, searching, `read`: nothing stands behind "Memory:". The first turn is another."""
    a = agent()
    _, prompts = play(a, monkeypatch, *["Search: Kovemgate"] * 3, " A.", " A.", " A.")
    assert "Memory: No memory yet.\n" in prompts[0] and "Memory:\n" in prompts[1] and "Memory:\n" in prompts[2]
    script = Scripted(a, monkeypatch, "", "", "", "")
    (rollout,) = a.read([Problem("p", "Who?", ("x",), tuple(p.rendered for p in PASSAGES) * 9, "")], [("k",)])
    assert len(rollout.sections) == 3 and rollout.memories == [[]] * 3
    assert ["Memory: No memory yet.\n" in p for (p,) in script.prompts] == [True, False, False, False]
    assert ["Memory:\n" in p for (p,) in script.prompts] == [False, True, True, True]
    script = Scripted(a, monkeypatch, "", "", "")
    memory = a.update("Who?", [5], a.prompts.no_memory, ("k", 1))
    a.update("Who?", [5], memory, ("k", 2))
    a.recall([[5]], [memory], ["x"], [("k", 3)])
    assert ["Memory:\n" in p for (p,) in script.prompts] == [False, True, True]


def test_the_last_turn_has_to_answer(agent, monkeypatch):
    episode, prompts = play(agent("--turns", "2"), monkeypatch, " A.\nSearch: Kovemgate", " A.\nSearch: Zafolt")
    assert len(prompts) == 2 and episode.hits == [0.0, 0.0]


def test_a_query_without_a_known_word_finds_nothing_and_long_ones_are_cut(agent, monkeypatch):
    a = agent("--turns", "3")
    long = "Kovemgate " + "tower " * 60
    _, prompts = play(a, monkeypatch, " A.\nSearch: qqq", f" A.\nSearch: {long}", " A.")
    assert NOTHING_FOUND.strip() in prompts[1]
    assert len(a.tokenizer.encode(prompts[2])) < a.c.window and PASSAGES[0].rendered in prompts[2]


@pytest.mark.parametrize("order", ["section-first", "paper"])
def test_prompt_orders_hold_the_same_parts(tokenizer, order):
    prefix, given = Prompts(tokenizer, order).search(["A?", "B?"], "q", tokenizer.encode("R.\n"),
                                                     tokenizer.encode(" M."), True)
    text = tokenizer.decode(given)
    assert tokenizer.decode(prefix).endswith("A? B?\n")
    assert (text.index("Memory: M.") < text.index("Query: q\nSection:\nR.")) == (order == "paper")
    assert text.endswith("Answer now.\n<|assistant|>")


def test_a_step_trains_every_turn_of_every_episode(agent, tiny):
    """Each turn is a sequence of its own, its reward its episode's; recomputed log-probs equal the recorded ones."""
    a = agent("--documents", "2", "--update-documents", "2")
    data = memtrain.Data(a.c, a.tokenizer)
    batch = memtrain.collect(a, data, "mem1", 0)
    assert len(batch.rewards) == 2 * a.c.group and set(batch.entry) == set(range(len(batch.rewards)))
    assert batch.group == [0] * a.c.group + [1] * a.c.group
    assert set(batch.rewards) <= {0.0, 0.5, 1.0}
    turns = batch.turns[:6]
    assert all(len(t.sampled) <= a.c.memory + a.c.act and len(t.sampled) == len(t.logprobs) for t in batch.turns)
    assert all(len(t.prefix) + len(t.given) + len(t.sampled) <= a.c.window for t in batch.turns)
    packed = memtrain.pack([(t.prefix, [(t.given, t.sampled)]) for t in turns])
    again, _ = memtrain.score(a.model, packed, a.c.temperature)
    torch.testing.assert_close(again, torch.tensor([x for t in turns for x in t.logprobs]), atol=1e-5, rtol=0)


def test_training_pairs_differ_by_seed_and_index_and_not_between_calls(agent):
    a = agent()
    data = memtrain.Data(a.c, a.tokenizer)
    pairs = [data.training_pair(i) for i in range(20)]
    assert pairs == [data.training_pair(i) for i in range(20)] and len({p.id for p in pairs}) == 20
    assert {p.kind for p in pairs} == {"hotpotqa", "nq"}
    asked = {q for p in pairs for q in p.questions}
    assert not asked & {q for ps in data.benchmarks.values() for p in ps for q in p.questions}


def test_every_family_can_be_answered_by_searching(world):
    """For each fact of each question there is a query that returns a passage which states it."""
    retriever = Retriever(world.corpus())
    for family, kinds in FAMILIES.items():
        for i in range(12):
            question, facts = world.family_facts(family, i)
            assert question.kind in kinds and question.answers
            for fact in facts:
                (found,) = retriever.search([f"{fact.subject} {fact.relation} {fact.object}"], 3)
                assert set(found) & set(world.where[fact])


def test_row_of_results(agent, monkeypatch):
    a = agent()
    Scripted(a, monkeypatch, " A.\nSearch: Kovemgate built", " A.\nAnswer:\\boxed{ Mobrin Kovem}\\boxed{ 9}")
    row = search_row(a, Retriever(Corpus(PASSAGES, "three")), "mem1", 4, [PAIR, PAIR])
    assert row["benchmark"] == "made up" and row["n"] == 2 and row["correct"] == "1010" and row["em"] == 0.5
    assert (row["turns"], row["searches"], row["answered"], row["malformed"], row["found"]) == (2, 1, 1, 0, 0.5)
    assert row["em_low"] < 0.5 < row["em_high"] and row["memory_tokens"] > 0


# ---- demonstrations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searcher(tokenizer):
    c = memtrain.parse([])
    demo = Demonstrator(MiniWorld(120, 3, "train"), Prompts(tokenizer), c.section, c.memory)
    return Searcher(demo, c.turns, c.hits, c.result, c.act), c


def test_demonstrated_episodes_are_valid(searcher, tokenizer):
    """Every state holds only what the old one or the result says, every action is well formed, every turn fits, and
    answers other than `unknown` are right."""
    search, c = searcher
    known, given_answers = answers_known(search), 0
    for i in range(60):
        demo = search.episode(5, 2 * i, random.Random(i))
        assert 1 <= len(demo.suffixes) <= c.turns
        for n, (given, response) in enumerate(demo.suffixes):
            assert len(demo.prefix) + len(given) + c.memory + c.act <= c.window
            assert response[-1] == tokenizer.end and len(response) <= c.memory + c.act
            shown = tokenizer.decode(given)
            state, action = split_response(response[:-1], tokenizer, 2)
            assert not action.malformed and bool(action.answers) == (n == len(demo.suffixes) - 1)
            written = tokenizer.decode(state)
            if written != " No memory yet.":
                assert all(s in shown for s in sentences(written.strip()))
            for answer, asked in zip(action.answers, answers_of(known, search, demo),
                                     strict=bool(action.answers)):
                assert answer in (asked, "unknown")
                given_answers += answer == asked
    assert given_answers > 20


def answers_known(search):
    """{question: answer} of the world."""
    return {q.question: q.answers[0] for f in FAMILIES for i in range(120)
            for q in [search.demo.world.family_facts(f, i, 5)[0]]}


def answers_of(known, search, demo):
    """Answers of the two questions in a demonstration's prompt, looked up in the world."""
    text = search.demo.tokenizer.decode(demo.prefix)
    return [a for q, a in sorted(known.items(), key=lambda item: text.find(item[0])) if q in text]


@pytest.fixture
def files(folder):
    """A corpus of 200 towns, and questions: t, b in FlashRAG's form; h, q of HotpotQA's, with passages."""
    lines = lambda rows: "\n".join(map(json.dumps, rows))  # noqa: E731
    asked = lambda who: [{"id": f"{who}{i}", "question": f"Who is {who} {i}?",  # noqa: E731
                          "golden_answers": [f"Hugo Moor{i}"]} for i in range(5)]
    (folder / "c.jsonl").write_text(lines({"title": f"Town {i}", "text": f"Town {i} was built by Hugo Moor{3 * i}."}
                                          for i in range(200)))
    for name in "tb":
        (folder / f"{name}.jsonl").write_text(lines(asked(name)))
    (folder / "q.jsonl").write_text(lines(
        {"_id": f"q{i}", "question": f"Who built Town {i}?", "answer": f"Hugo Moor{3 * i}",
         "supporting_facts": [[f"Town {i}", 0]],
         "context": [[f"Town {i}", [f"Town {i} was built by Hugo Moor{3 * i}."]]]}
        for i in range(100, 105)))
    (folder / "h.jsonl").write_text(lines(
        {"_id": f"h{i}", "question": f"Who wed Ada{i}?", "answer": "Ben",
         "supporting_facts": [[f"Ada{i}", 0], ["Ben", 0]],
         "context": [[f"Ada{i}", [f"Ada{i} wed Ben."]], ["Ben", ["Ben sang."]], ["Cy", ["Cy fished."]]]}
        for i in range(5)))
    return ["--corpus", "c.jsonl", "--questions", "q.jsonl", "--train-questions", "t.jsonl", "--stages", "mem1,eval"]


def test_search_looks_through_what_came_with_the_questions(files, tiny, tokenizer, folder):
    files = [*files[:5], "h.jsonl", "--benchmarks", "b.jsonl", *files[6:]]
    data = memtrain.Data(tiny(*files), tokenizer)
    assert len(data.searched) == 200 + 5 + 2, "each of their passages once"
    assert data.evidence() == {"training": (10, 10, "gold passages"), "b": (2, 4, "answers stated")}, "Moor0, Moor3"
    (first,) = evidence(data.c, data)
    assert "207 passages" in first and "training: 10 of 10 gold passages, b: 2 of 4 answers stated" in first
    (folder / "less.jsonl").write_text("".join((folder / "c.jsonl").read_text().splitlines(True)[1:]))
    less = memtrain.Data(tiny("--corpus", "less.jsonl", *files[2:]), tokenizer)
    second = evidence(less.c, less)[1]
    assert second.startswith("note: search: ") and "1 of 4" in second and "--search-corpus" in second
    (found,) = data.retriever().search(["Ada3 wed"], 1)
    assert data.searched.passages[found[0]].title == "Ada3"
    again = memtrain.Data(tiny(*files[:6], "--stages", "eval", "--benchmarks", "h2=h.jsonl"), tokenizer)
    assert again.searched.fingerprint == data.searched.fingerprint, "one index from start to end"
    (folder / "s.jsonl").write_text(json.dumps({"title": "Ada1", "text": "Ada1 wed Ben."}))
    own = memtrain.Data(tiny(*files, "--search-corpus", "s.jsonl"), tokenizer)
    assert len(own.searched) == 1 and own.evidence()["training"] == (1, 10, "gold passages")
    assert len(evidence(own.c, own)) == 3
    with pytest.raises(InputError, match=r"no.jsonl"):
        memtrain.Data(tiny(*files, "--search-corpus", "no.jsonl"), tokenizer)
    world = memtrain.Data(tiny("--stages", "mem1"), tokenizer)
    assert evidence(world.c, world) == [], "the mini-world searches its own pages"


def test_training_questions_come_in_epochs(files, tiny, tokenizer, folder):
    data = memtrain.Data(tiny(*files), tokenizer)
    for epoch in range(3):
        pairs = [data.training_pair(2 * epoch + i).id.split("+") for i in range(2)]
        assert len({q for pair in pairs for q in pair}) == 4, "of five questions one is left out"
    drawn = [data.train_questions.index(q) for i in range(15) for q in data.train_questions
             if q.id == data.training_question(i).id]
    assert all(sorted(drawn[e:e + 5]) == list(range(5)) for e in (0, 5, 10))
    for name, said in (("t", "--train-questions"), ("q", "--questions")):
        whole = (folder / f"{name}.jsonl").read_text()
        (folder / f"{name}.jsonl").write_text(whole.splitlines()[0])
        with pytest.raises(InputError, match=f"{said} {name}.jsonl: one question"):
            memtrain.Data(tiny(*files), tokenizer)
        (folder / f"{name}.jsonl").write_text(whole)


def test_a_finished_run_is_evaluated_on_its_own_benchmarks(folder, tiny, tokenizer):
    """Also where --stages names no training any more."""
    lines = lambda rows: "\n".join(map(json.dumps, rows))  # noqa: E731
    asked = lambda who: [{"id": f"{who}{i}", "question": f"Who is {who} {i}?", "answer": "Hugo",  # noqa: E731
                          "supporting_facts": [[f"{who} {i}", 0]], "context": [[f"{who} {i}", ["He is Hugo."]]]}
                         for i in range(5)]
    (folder / "c.jsonl").write_text(lines({"title": f"Town {i}", "text": f"Town {i} was built by Hugo Moor."}
                                          for i in range(200)))
    for name in "qtb":
        (folder / f"{name}.jsonl").write_text(lines(asked(name)))
    options = ["--corpus", "c.jsonl", "--questions", "q.jsonl", "--train-questions", "t.jsonl", "--stages", "eval"]
    data = memtrain.Data(tiny(*options, "--benchmarks", "b.jsonl"), tokenizer)
    assert {name: [p.id for p in pairs] for name, pairs in data.benchmarks.items()} == {"b": ["b0+b1", "b2+b3"]}
    assert list(memtrain.Data(tiny(*options), tokenizer).benchmarks) == ["q"]
