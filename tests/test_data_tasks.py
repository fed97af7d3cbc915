"""The mini-world, the tokenizer, and all that is made from passages: masked documents, recalls, demonstrations."""

import gc
import random
import re
import tracemalloc
from itertools import chain, pairwise

import pytest
import torch

from data import InputError
from data.prompts import MASK_PROBLEM, Prompts
from data.tasks import Problem, cut_middle, in_epochs, masked_document, qa_document, recall_target, split_sections
from data.text.corpus import Corpus, Passage
from data.text.entities import RuleFinder, _occurrence, mask_entity, occurs
from data.weights.loading import load_tokenizer
from data.weights.tokenizer import SPECIALS
from data.world.demonstrations import DILIGENT_MASKED, DILIGENT_QUESTION, Demonstrator, sentences
from data.world.miniwiki import ASKING, CLUES, COMPARED, FILLERS, QUESTION_KINDS, RELATIONS, MiniWorld
from data.world.steps import DemoSteps
from eval.metrics import exact_match, extract_boxed
from memtrain import Config

FINDER, NANO = RuleFinder(), Config()


@pytest.fixture(scope="module")
def corpus(world):
    return world.corpus()


@pytest.fixture(scope="module")
def masked(corpus):
    return [masked_document(corpus, FINDER, 5, i, 12, 5) for i in range(60)]


def test_draws_in_epochs_are_permutations():
    for population in (1, 2, 7, 50):
        drawn = [in_epochs("k", i, population) for i in range(3 * population)]
        epochs = [drawn[e * population:(e + 1) * population] for e in range(3)]
        assert all(sorted(e) == list(range(population)) for e in epochs)
        assert population < 7 or len({tuple(e) for e in epochs}) == 3
    assert [in_epochs("k", i, 50) for i in range(50)] != [in_epochs("l", i, 50) for i in range(50)]


def test_every_passage_of_a_users_corpus_is_a_pivot_once_an_epoch():
    corpus = Corpus([Passage(f"T{i}", f"Mobrin Kovem{i} lived here.") for i in range(40)], "own")
    for epoch in range(2):
        hidden = [masked_document(corpus, FINDER, 0, 40 * epoch + i, 3, 0).answers[0] for i in range(40)]
        assert len({a for a in hidden if "Kovem" in a}) == len([a for a in hidden if "Kovem" in a]) > 10


# ---- the mini-world


def test_a_world_is_a_function_of_size_seed_and_split(world):
    again, other = MiniWorld(60, 0, "train"), MiniWorld(60, 1, "train")
    assert again.passages == world.passages and again.facts == world.facts
    assert [again.question(i) for i in range(5)] == [world.question(i) for i in range(5)]
    assert other.passages != world.passages
    assert world.question(0, 1) != world.question(0, 0) != other.question(0, 0)


def test_relations_and_phrasings(world):
    assert len(RELATIONS) >= 12 and {f.relation for f in world.facts} == set(RELATIONS)
    for name, r in RELATIONS.items():
        for said in filter(None, (r.forward, r.backward)):
            assert len(set(said)) >= 3 and all(("{s}" in s) and ("{o}" in s) for s in said), name
        assert r.forward and (bool(r.backward) == (r.object in CLUES)), "what has a passage is told from both sides"


def test_facts_are_consistent_and_all_are_told(world):
    assert len({(f.subject, f.relation) for f in world.facts}) == len(world.facts), "no fact contradicts another"
    for f in world.facts:
        r = RELATIONS[f.relation]
        assert world.kind_of[f.subject] == r.subject and f.subject != f.object
        if r.object in CLUES:
            assert world.kind_of[f.object] == r.object
        else:
            assert f.object not in world.kind_of and (r.object == "word" or f.object.isdigit())
    filler = re.compile("|".join(re.escape(f).replace(r"\{a\}", r"\w+").replace(r"\{b\}", r"\w+") for f in FILLERS))
    told, fillers = set(), 0
    for passage, stated in zip(world.passages, world.stated, strict=True):
        found = []
        for sentence in sentences(passage.rendered):
            if fact := world.fact_of.get(sentence):
                assert occurs(sentence, fact.object) and passage.title in (fact.subject, fact.object)
                found.append(fact)
            else:
                assert filler.fullmatch(sentence), sentence
                fillers += 1
        assert tuple(found) == stated
        told.update(found)
    assert told == set(world.facts) and fillers > len(world.passages) / 4
    linked = [p.title for p in world.passages if any(other in p.text for other in world.kind_of if other != p.title)]
    assert len(linked) > 0.6 * len(world.passages), "passages name each other"
    assert len(set(linked)) > 0.95 * len(world.kind_of), "every entity has a passage that names another"


def test_names_follow_their_rules_and_splits_never_meet(world):
    for entity, kind in world.kind_of.items():
        for fact in world.clue_facts(entity):
            part = {"parent": fact.object.split()[-1], "namesake": fact.object.split()[0],
                    "explorer": fact.object.split()[-1], "founder": fact.object.split()[-1],
                    "owner": fact.object.split()[-1], "setting": fact.object}.get(fact.relation, "")
            assert part in entity, (kind, entity, fact)
    train = [MiniWorld(n, s, "train").kind_of for n, s in ((60, 0), (400, 1), (150, 7))]
    held_out = [MiniWorld(n, s, "eval").kind_of for n, s in ((60, 0), (400, 1), (150, 7))]
    assert set().union(*train).isdisjoint(set().union(*held_out))
    for people, seed in ((60, 0), (400, 1)):  # budgets are chosen on a world that names nothing of the other two
        dev, measured = (MiniWorld(people, seed, split) for split in ("dev", "eval"))
        assert set(dev.kind_of).isdisjoint(set(measured.kind_of).union(*train))
        assert 0.25 < len(dev.passages) / len(measured.passages) <= (1 if people < 120 else 0.4)
    with pytest.raises(ValueError, match="at least 40"):
        MiniWorld(39)


def solve(world, phrase) -> set[str]:
    """Everything that a noun phrase like "the parent of the author of X" can mean."""
    if phrase in world.kind_of:
        return {phrase}
    meanings = set()
    for name, r in RELATIONS.items():
        if r.noun and phrase.startswith(f"the {r.noun} of "):
            inner = solve(world, phrase.removeprefix(f"the {r.noun} of "))
            meanings |= {f.object for f in world.facts if f.relation == name and f.subject in inner}
        if r.inverse and phrase.startswith(f"the {r.inverse} "):
            inner = solve(world, phrase.removeprefix(f"the {r.inverse} "))
            meanings |= {f.subject for f in world.facts if f.relation == name and f.object in inner}
    return meanings


@pytest.mark.parametrize("split", ["train", "eval"])
def test_questions_follow_from_the_facts(split):
    """Six kinds; parsed again from its text, each has one answer; the gold passages state the facts."""
    world, kinds = MiniWorld(60, 4, split), {}
    for i in range(250):
        question, facts = world.question_facts(i)
        (answer,) = question.answers
        kinds.setdefault(question.kind, []).append(len(facts))
        assert set(facts) <= set(world.facts)
        if question.kind == "comparison":
            head, a, b = re.fullmatch(r"(.+), (.+) or (.+)\?", question.question).groups()
            (relation,) = (r for r, text in COMPARED.items() if text == head)
            x, y = (int(world.by_subject[n, relation]) for n in (a, b))
            assert answer == (a if x < y else b) and x != y
        else:
            assert not occurs(question.question, answer)
            form = next(f for f in ASKING if re.fullmatch(f.replace("?", r"\?").format(".+"), question.question))
            front, back = form.split("{}")
            assert solve(world, question.question.removeprefix(front).removesuffix(back)) == {answer}, question
            assert answer in (facts[-1].subject, facts[-1].object)
            for one, two in pairwise(facts):
                assert {one.subject, one.object} & {two.subject, two.object}, "a chain"
            if question.kind in ("date", "number"):
                assert answer.isdigit()
        asked = question.question
        for fact, passage in zip(facts, question.gold, strict=True):
            assert fact in {world.fact_of.get(s) for s in sentences(passage.rendered)}
            assert occurs(asked, passage.title), "on the page of a name known by then"
            asked += f" {fact.subject} {fact.object}"
    assert set(kinds) == set(QUESTION_KINDS) and len(kinds) == 6
    assert all(set(hops) == ({3} if kind == "three-hop" else {2}) for kind, hops in kinds.items())


def test_related_passages_share_an_entity_far_more_often_than_random_ones(world, corpus):
    names = sorted(world.kind_of)
    held = [{n for n in names if occurs(p.rendered, n)} for p in world.passages]
    rng, related, drawn = random.Random(0), [], []
    for i in range(0, len(corpus), 3):
        related += [bool(held[i] & held[j]) for j in corpus.related(i, 3)]
        drawn += [bool(held[i] & held[j]) for j in rng.sample(range(len(corpus)), 3) if j != i]
    assert sum(related) / len(related) > 0.8 > 4 * sum(drawn) / len(drawn)


# ---- the tokenizer


def test_every_text_round_trips_and_none_makes_a_special_token(tokenizer, world):
    rng = random.Random(0)
    texts = ["", " ", "\n\n \t", "naïve café", "日本語", "👩\u200d👩\u200d👧 🏳️", "\0\x1b[0m", "مرحبا", "a" * 5000,
             "\\boxed{ Brisar River}", "[MASK] [TARGET] [mask]", "1843 18.5 1,800", " ".join(SPECIALS),
             "".join(SPECIALS), world.passages[0].rendered]
    texts += [rng.randbytes(200).decode("utf-8", "replace") for _ in range(20)]
    texts += ["".join(chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(50))
              for _ in range(20)]
    special = {*tokenizer.user, *tokenizer.assistant, tokenizer.end}
    assert special == set(range(tokenizer.size - 3, tokenizer.size))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.size - 3 for i in ids)
    assert tokenizer.decode([tokenizer.end]) == "<|end|>"
    words = world.passages[0].rendered
    assert len(tokenizer.encode(words)) < 2.5 * len(words.split()), "its own world is short in tokens"
    for placeholder in (" [MASK]", " [TARGET]", "\\boxed{"):
        assert len(tokenizer.encode(placeholder)) == 1, "placeholders are never cut by a section's end"


@pytest.mark.parametrize(("content", "parts"), [
    (None, ["nope.tiktoken"]), (b"YQ== 0\nnonsense\n", ["line 2"]), (b"YQ== x\n", ["line 1"]),
    (b"YQ== 0\n", ["256 bytes"])])
def test_tokenizer_files_that_are_refused(content, parts, tmp_path):
    path = tmp_path / "nope.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(path)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


# ---- masked documents and recall targets


def test_a_masked_document_hides_its_entity_and_keeps_the_clues(world, masked):
    kinds = set()
    for problem in masked:
        (answer,), text = problem.answers, "\n".join(problem.passages)
        assert not occurs(text, answer) and "[MASK]" in text and problem.question == MASK_PROBLEM
        assert len(problem.passages) == len(set(problem.passages)) == 12
        clues = world.clue_facts(answer)
        assert clues, "the naming rule determines it"
        for fact in clues:
            told = [mask_entity(s, answer, "[MASK]")[0] for s, f in world.fact_of.items() if f == fact]
            assert any(s in text for s in told), (answer, fact)
        kinds.add(world.kind_of[answer])
    assert kinds == set(CLUES), "every type is asked for"


def test_random_passages_make_masked_documents_too(tokenizer):
    """They determine few names: document 12 of the default world takes over 200 draws."""
    corpus = MiniWorld(NANO.people, 0, "train").corpus()
    size = lambda text: len(tokenizer.encode(text))  # noqa: E731
    problem = masked_document(corpus, FINDER, NANO.seed, 12, NANO.passages, 0, size)
    assert any("[MASK]" in p for p in problem.passages)


def test_a_masked_document_is_a_function_of_seed_and_index(corpus, masked):
    assert [masked_document(corpus, FINDER, 5, i, 12, 5) for i in (40, 2)] == [masked[40], masked[2]]
    other = [masked_document(corpus, FINDER, 6, i, 12, 5) for i in range(5)]
    assert all(a.passages != b.passages for a, b in zip(other, masked, strict=False))
    assert len({p.passages for p in masked}) > 50
    shuffled = {next(i for i, p in enumerate(m.passages) if "[MASK]" in p) for m in masked}
    assert len(shuffled) > 5, "the pivot stands anywhere"


@pytest.mark.parametrize(("text", "count", "message"), [
    ("Rome lies on the Tiber.", 5, "5 passages, but a masked document needs 6"),
    ("nothing at all here.", 20, "no entity to mask")])
def test_corpora_that_cannot_be_masked(text, count, message):
    corpus = Corpus([Passage("title", f"{'x' * (i + 1)} {text}") for i in range(count)], "bad")
    with pytest.raises(InputError, match=message) as error:
        masked_document(corpus, FINDER, 0, 0, 6, 2)
    assert "bad" in str(error.value) and "\n" not in str(error.value)


def test_long_passages_make_fewer_of_them(corpus):
    """A limit drops the least related passages; the pivot and its nearest neighbour stay, whatever their length."""
    plain = Corpus(corpus.passages, "plain")
    whole, half, least = (masked_document(plain, FINDER, 5, 1, 12, 5, limit=n) for n in (1e9, 400, 1))
    assert len(whole.passages) == 12 and len(least.passages) == 2 < len(half.passages) < 12
    assert sum(map(len, half.passages)) <= 400
    assert least.answers == half.answers == whole.answers and set(least.passages) < set(half.passages)


def test_a_corpus_that_does_not_know_its_facts_is_masked_too(world):
    """Real text: any entity of the pivot may be drawn; every occurrence goes, titles and possessives included."""
    plain, unguided = Corpus(world.passages, "plain"), 0
    for i in range(40):
        problem = masked_document(plain, FINDER, 0, i, 12, 5)
        assert not occurs("\n".join(problem.passages), problem.answers[0])
        unguided += not world.clue_facts(problem.answers[0])
    assert unguided > 0
    real = Corpus([Passage("Marie Curie", f"Marie Curie's work in Paris, {1890 + i}.") for i in range(8)], "real")
    for i in range(20):
        problem = masked_document(real, FINDER, 0, i, 8, 3)
        text = "\n".join(problem.passages)
        assert not occurs(text, problem.answers[0])
        if problem.answers[0] == "Marie Curie":
            assert text.count("[MASK]: [MASK]'s work") == 8
            break
    else:
        pytest.fail("never asked for Marie Curie")


def test_documents_do_not_stay_in_memory(corpus, world, tokenizer):
    """Thousands are trained on: one at a time is there. What stays of 100 is less than three of them."""
    def build(indices) -> int:
        sizes = []
        for i in indices:
            masked_document(corpus, FINDER, 7, i, 100, 30)
            problem = qa_document(world.question(i), world.passages, tokenizer, 4000, i)
            sizes.append(sum(map(len, problem.passages)))
            _occurrence.cache_clear()  # the compiled rules of the last 1,024 entities are kept, 17 KB each
        re.purge()  # and its last 512
        gc.collect()
        return min(sizes)

    build(range(5))
    tracemalloc.start()
    try:
        build(range(5, 10))
        before = tracemalloc.get_traced_memory()[0]
        smallest = build(range(10, 110))
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 3 * smallest and peak - before < 50 * smallest, (before, after, peak, smallest)


def test_recall_targets_are_never_placeholders(masked):
    rng = random.Random(0)
    for problem in masked[:30]:
        section = "\n".join(problem.passages[:5])
        found, target = recall_target(section, FINDER, rng)
        assert "[TARGET]" in found and not occurs(found, target) and occurs(section, target)
        assert found.count("[MASK]") == section.count("[MASK]") and target.strip("[]") not in ("MASK", "TARGET")
        assert found.replace("[TARGET]", target) == section
    for nameless in ("", "[MASK] was here.", "[MASK] and [MASK]: nothing else."):
        assert recall_target(nameless, FINDER, rng) is None


# ---- long documents and sections


@pytest.mark.parametrize("sections", [1, 2, 4, 8, 16])
def test_question_documents(sections, world, tokenizer):
    """The gold passages are in, no passage is there twice, and the document fills its length but for one passage."""
    tokens, places = 160 * sections, []
    longest = max(len(tokenizer.encode(p.rendered + "\n")) for p in world.passages)
    for i in range(40):
        question = world.question(i)
        problem = qa_document(question, world.passages, tokenizer, tokens, 3)
        assert problem == qa_document(question, world.passages, tokenizer, tokens, 3)
        gold = [p.rendered for p in question.gold]
        assert set(gold) <= set(problem.passages) and len(set(problem.passages)) == len(problem.passages)
        size = sum(len(tokenizer.encode(p + "\n")) for p in problem.passages)
        assert tokens - longest < size <= max(tokens, sum(len(tokenizer.encode(g + "\n")) for g in gold))
        assert size >= 0.75 * tokens or sections == 1
        places.append(problem.passages.index(gold[0]) / max(1, len(problem.passages) - 1))
    if sections >= 4:
        assert min(places) < 0.2 and max(places) > 0.8, "the gold stands anywhere"
    assert qa_document(question, world.passages, tokenizer, tokens, 4).passages != problem.passages or sections == 1


def test_question_documents_use_what_came_with_the_question(world, tokenizer):
    import dataclasses
    own = tuple(Passage(f"Own {i}", f"Own text number {i} of the question.") for i in range(6))
    question = dataclasses.replace(world.question(0), distractors=own)
    passages = qa_document(question, world.passages, tokenizer, 800, 0).passages
    assert {p.rendered for p in own} <= set(passages) and len(passages) > len(own) + len(question.gold)
    with pytest.raises(InputError, match="too few passages") as error:
        qa_document(question, world.passages[:5], tokenizer, 5000, 0)
    assert question.id in str(error.value) and "5000" in str(error.value)


@pytest.mark.parametrize("length", [16, 50, 160, 10_000])
def test_sections_are_the_document_in_order(length, masked, tokenizer):
    for problem in masked[:10]:
        sections = split_sections(problem.passages, tokenizer, length)
        ids = [tokenizer.encode(p + "\n") for p in problem.passages]
        assert [*chain(*sections)] == [*chain(*ids)]
        assert all(0 < len(s) <= length for s in sections)
        ends, place = {0}, 0
        for p in ids:
            place += len(p)
            ends.add(place)
        if length >= max(map(len, ids)):
            place = 0
            for s in sections:
                place += len(s)
                assert place in ends, "no passage is cut that fits in a section"
    assert split_sections([], tokenizer, 10) == []


@pytest.mark.parametrize(("length", "kept"), [(0, []), (1, [0]), (2, [0, 9]), (5, [0, 1, 2, 8, 9]),
                                              (10, range(10)), (99, range(10))])
def test_cut_middle(length, kept):
    assert cut_middle(list(range(10)), length) == list(kept)


# ---- demonstrations


@pytest.fixture(scope="module")
def demos(world, tokenizer):
    demonstrator = Demonstrator(world, Prompts(tokenizer), NANO.section, NANO.memory)
    return demonstrator, demonstrator.batch(0, 0, 12, 30, 6, 10)


def test_demonstrations_show_valid_turns_within_the_budgets(demos, world, tokenizer):
    """Responses end in their only stop and fit; memories quote sentences in sight; answers and recalls can be known."""
    _, batch = demos
    assert {d.kind for d in batch} == {"update", "answer", "recall", "direct"}
    kept = []
    for demo in batch:
        for given, response in demo.suffixes:
            assert response.index(tokenizer.end) == len(response) - 1 < NANO.response
            assert given[-1:] == tokenizer.assistant and demo.prefix[:1] == tokenizer.user
            assert len(demo.prefix) + len(given) + len(response) <= NANO.window
            prompt, said = tokenizer.decode(demo.prefix + given), tokenizer.decode(response[:-1])
            if demo.kind == "update":
                assert len(response) - 1 <= NANO.memory
                assert said == " No memory yet." or all(s in prompt for s in sentences(said))
                old = sentences(prompt.split("\nMemory:")[1].split("\n")[0].strip())
                kept.append(any(s in sentences(said.strip()) for s in old))
            else:
                answer = extract_boxed(said)
                assert answer and exact_match(answer, [answer]) == 1.0 and said == f"\\boxed{{ {answer}}}"
                if demo.kind == "recall":
                    section, memory = prompt.split("\nMemory:")
                    assert "[TARGET]" in section and not occurs(section, answer) and occurs(memory, answer)
    assert 0 < sum(kept) < len(kept), "careful and careless updates are shown"


def test_the_diligent_reader_keeps_what_matters(demos, tokenizer):
    """Read diligently, gold facts survive to the end; carelessly, far fewer do: the room that training has."""
    demonstrator, _ = demos
    held = {}
    for diligent in (True, False):
        hits = []
        for i in range(30):
            episode, memory = demonstrator.question_episode(1, i, 4), []
            for text in episode.texts:
                memory = demonstrator.update(episode, memory, text, random.Random(i), diligent)
                assert len(tokenizer.encode("".join(" " + s for s in memory))) <= NANO.memory
                assert len(set(memory)) == len(memory)
            hits.append(episode.gold[0] in {episode.fact_of.get(s) for s in memory})
        held[diligent] = sum(hits) / len(hits)
    assert held[True] > held[False] + 0.3, held


@pytest.mark.parametrize("masked", [True, False])
def test_readers_begin_with_notes_of_other_pages_and_often_forget_them(masked, demos, tokenizer):
    demonstrator, _ = demos
    make = demonstrator.masked_episode if masked else demonstrator.question_episode
    begun, kept, rng = [], [], random.Random(0)
    for i in range(40):
        episode, old = make(2, i, 1), ["Nobody lives in Nowhere."]
        kept += [old[0] in demonstrator.update(episode, old, episode.texts[0], rng) for _ in range(10)]
        for demo in demonstrator.read(episode, rng, readers=3):
            if demo.kind == "update":
                held = [tokenizer.decode(given).split("Memory:")[1].split("\n")[0] for given, _ in demo.suffixes]
                begun += ["No memory yet." not in memory for memory in held]
    assert 0.3 < sum(begun) / len(begun) < 0.9
    assert abs(sum(kept) / len(kept) - (DILIGENT_MASKED if masked else DILIGENT_QUESTION)) < 0.1


def test_a_worn_memory_fills_the_budget_with_what_it_held(demos, tokenizer):
    demonstrator, _ = demos
    memory = demonstrator.random_memory(demonstrator.question_episode(1, 0, 1).texts[0], random.Random(0))
    ids = demonstrator.worn(memory[:1], random.Random(1))
    assert len(ids) == NANO.memory
    *whole, cut = sentences(tokenizer.decode(ids).strip())
    assert set(whole) == set(memory[:1]) and memory[0].startswith(cut.removesuffix("."))


def test_demonstration_steps_follow_from_the_configuration(tiny, tokenizer):
    steps = DemoSteps(tiny(), tokenizer)
    rows = [steps[i] for i in range(len(steps))]
    assert len(rows) == 5 and rows[4] != rows[3], "two steps of copying, then three of demonstrations"
    assert rows[1] != rows[0] and all(given == tokenizer.assistant and ids == prefix
                                      for prefix, [(given, ids, _)] in rows[1])
    assert DemoSteps(tiny(), tokenizer)[4] == rows[4], "a resumed base stage sees the same"
    assert torch.tensor([w for _, s in rows[2] for _, _, w in s]).min() > 0
    with pytest.raises(IndexError):
        steps[5]


def test_problems_carry_what_evaluation_needs(masked):
    assert all(isinstance(p, Problem) and p.kind == "masked" and p.id == f"mask-5-{i}" for i, p in enumerate(masked))
