"""Text from outside stays text: hostile passages, questions and answers through every function that takes them."""

import json
import re
import time

import pytest
from conftest import TINY, cpu_seconds
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_run, qa_rows

import memtrain
from data import InputError
from data.tasks import masked_document, recall_target, split_sections
from data.text.corpus import load_passages, load_questions
from data.text.entities import RuleFinder, mask_entity, occurs
from data.weights.loading import load_tokenizer
from eval.metrics import _form, exact_match, extract_boxed, f1, memagent_sub_em, normalize, search_r1_sub_em
from eval.report.page import md, write_report

TOKENIZER, FINDER = load_tokenizer(), RuleFinder()
PIECES = ["<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "[MASK]", "[TARGET]", "[MA\0SK]", "[ MASK ]",
          "\\boxed{", "{", "}", "{{", "}}", "{problem}", "%s", "<script>alert(1)</script>", "]](x)",
          "<img src=x onerror=alert(1)>", "![x](javascript:alert(1))", "`", "|", "\n", "\r", "\u2028", "\t", "\0",
          "\x1b[31m", "\x1b]0;t\x07", "\x9b2J", "\u202e", "\u2066", "\ud800", "\udfff", "e\u0301", "ﬁ", "🙂", "Paris",
          "the", "1931", "U.S.", "Jean-Paul", '"', "'", " ", "  ", ". ", "A", "a", "5,", "=HYPERLINK(1)", "{{ 7*7 }}",
          "{% raw %}"]
outside = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join)
fuzz = settings(max_examples=150, deadline=None, derandomize=True)
SPECIAL = {*TOKENIZER.user, *TOKENIZER.assistant, *TOKENIZER.stops}


# ---- fuzz


@fuzz
@given(outside)
def test_no_text_becomes_a_special_token(text):
    ids = TOKENIZER.encode(text)
    assert not SPECIAL & set(ids)
    assert TOKENIZER.decode(ids) == re.sub("[\ud800-\udfff]", "\ufffd", text)


@fuzz
@given(st.lists(st.tuples(outside, outside), min_size=4, max_size=8), st.integers(0, 9))
def test_documents_of_any_passages(tmp_path_factory, records, seed):
    """What is read is clean, what is hidden is hidden, and [MASK] stands where something was hidden alone."""
    path = tmp_path_factory.mktemp("fuzz") / "c.jsonl"
    path.write_text("\n".join(json.dumps({"title": a, "text": b}) for a, b in records), encoding="utf-8")
    try:
        corpus = load_passages(str(path))
        problem = masked_document(corpus, FINDER, seed, 0, min(4, len(corpus)), 1)
    except InputError as e:
        assert "\n" not in str(e) and (str(path) in str(e) or "corpus" in str(e))
        return
    for p in corpus.passages:
        assert not re.search("[\ud800-\udfff\0]|\\[(MASK|TARGET)\\]", p.rendered), "ours alone to write"
    (answer,), text = problem.answers, "\n".join(problem.passages)
    assert not any(occurs(p, answer) for p in problem.passages)
    rendered = {mask_entity(p.rendered, answer, "[MASK]") for p in corpus.passages}
    assert set(problem.passages) <= {masked for masked, _ in rendered}
    assert text.count("[MASK]") >= 1 and exact_match("[MASK]", problem.answers) == 0
    made = recall_target(text, FINDER, memtrain.random.Random(seed))
    if made:
        assert made[0].count("[TARGET]") >= 1 and not occurs(*made) and "[MASK]" not in made[1]
    sections = split_sections(problem.passages, TOKENIZER, 16)
    assert all(0 < len(s) <= 16 for s in sections) and not SPECIAL & {i for s in sections for i in s}


@fuzz
@given(outside, st.lists(outside.filter(str.strip), min_size=1, max_size=3))
def test_metrics_of_any_text(text, answers):
    box = extract_boxed(text)
    assert box is None or (box and box in text)
    for prediction in (text, box, None):
        exact, partial, within, either = (m(prediction, answers) for m in (
            exact_match, f1, search_r1_sub_em, memagent_sub_em))
        assert 0 <= exact <= partial <= 1 and within <= either and {exact, within, either} <= {0, 1}
        # their authors' normalisation is for English: it keeps a mark of direction, say, that ours takes out
        assert exact <= within or any(_form(x) != normalize(x) for x in (prediction, *answers))
    if re.search(r"\[\s*(mask|target)\s*\]", text, re.IGNORECASE):
        assert exact_match(text, [text, *answers]) == 0, "no reward for writing the placeholder back"


@fuzz
@given(outside)
def test_questions_of_any_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "q.jsonl"
    path.write_text(json.dumps({"id": text or "x", "question": text, "golden_answers": [text]}))
    try:
        (question,) = load_questions(str(path))
    except InputError as e:
        assert "\n" not in str(e) and "line 1" in str(e)
        return
    assert question.question and question.question == " ".join(question.question.split())
    assert not re.search("[\ud800-\udfff\0]|\\[(MASK|TARGET)\\]", question.question + question.answers[0])


@fuzz
@given(outside)
def test_a_cell_of_the_report_is_one_line_of_plain_text(text):
    cell = md(text)
    assert len(cell.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", cell)
    assert not re.search(r"[`*_\[\]<>|~&]", re.sub(r"\\[\\`*_\[\]<>|~&]", "", cell)), "every mark is escaped"


def test_nothing_of_the_report_is_executed(tmp_path):
    rows = qa_rows(n=2 * len(PIECES))
    for row in rows:
        row["kinds"] = {piece + str(i): [1, 2] for i, piece in enumerate(PIECES)}
    run = make_run(tmp_path / "r", long_qa=rows, claims_note="".join(PIECES),
                   environment={"device": "".join(PIECES), "command": "".join(PIECES)},
                   config={"preset": "".join(PIECES), "corpus": "".join(PIECES)})
    text = write_report(run).read_text(encoding="utf-8")
    plain = re.sub(r"\\[\\`*_\[\]<>|~&]", "", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", text)
    assert "<script" not in "".join(line for line in plain.splitlines() if not line.startswith("    "))
    assert "{{ 7\\*7 }}" in text and "49" not in "".join(re.findall(r"\{\{.*?\}\}", text)), "the template is ours alone"
    table = [line for line in plain.splitlines() if line.startswith("| ") and line.count(" | ") >= 5]
    assert len({line.count("|") for line in plain.split("## By kind")[1].split("## ")[0].splitlines()
                if line.startswith("|")}) == 1 and len(table) > len(PIECES), "no cell breaks out of its row"


# ---- size


HUGE = {"one word": "the ", "one name": "Paris ", "no space": "a", "boxes": "\\boxed{", "commas": "5,", "spaces": " ",
        "marks": "[MASK]", "tags": "<b>", "escapes": "\x1b[31m", "turns": "\u202e", "accents": "e\u0301",
        "initials": "J.", "quotes": '"', "links": "King of the "}


@pytest.mark.parametrize("name", HUGE)
def test_fifty_thousand_repeats_take_linear_time(name):
    def read(text: str) -> None:
        ids = TOKENIZER.encode(text)
        split_sections([text], TOKENIZER, 160)
        FINDER.find(text)
        for entity in ("5,", "Paris", "J."):
            mask_entity(text, entity, "[MASK]")
        for metric in (exact_match, f1, search_r1_sub_em, memagent_sub_em):
            metric(extract_boxed(text) or text, ["Paris"])
        md(text)
        assert TOKENIZER.decode(ids) == text

    small, large = (cpu_seconds(lambda text=HUGE[name] * n: read(text)) for n in (12_500, 50_000))
    assert large < 8 * small + 0.5, "four times the text; quadratic would be sixteen"


def test_five_megabytes_on_one_line(folder):
    """A corpus line, a question line and a paragraph of that size are read in seconds, whatever is made of them."""
    text = "Paris and the Seine. " * 250_000
    (folder / "c.jsonl").write_text(json.dumps({"title": "t", "text": text}))
    (folder / "c.txt").write_text(text)
    (folder / "q.jsonl").write_text(json.dumps({"id": "q", "question": text, "golden_answers": ["Seine"]}))
    (folder / "broken.jsonl").write_text('{"title": "' + text)
    began = time.process_time()
    assert len(load_passages("c.jsonl").passages[0].text) == len(text.strip())
    assert len(load_passages("c.txt")) <= 2, "equal parts are one passage"
    assert load_questions("q.jsonl")[0].question == text.strip()
    with pytest.raises(InputError) as error:
        load_passages("broken.jsonl")
    assert len(str(error.value)) < 300
    assert time.process_time() - began < 20, "measured 4 to 10 s; what is not linear takes hours"


# ---- the whole command


def test_a_run_on_hostile_text(folder, base_checkpoint, monkeypatch, capfd):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    noise = [p for p in PIECES if p.strip(" \n\r\t\0\u2028")]
    rows = [{"title": f"{piece} topic {i}", "text": f"Paris and the Seine in {1800 + i}, by Victor Hugo. {piece * 2}"}
            for i, piece in enumerate((noise * 10)[:250])]
    asked = [{"id": noise[i], "question": f"Who wrote {noise[i]} {i}?", "answer": "[MASK]",
              "supporting_facts": [[f"{noise[i]} book {i}", 0]],
              "context": [[f"{noise[i]} book {i}", [f"Hugo wrote {noise[i]}."]]]} for i in range(9)]
    name = "c\x1b[31m.jsonl"
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, asked[:6])))
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, asked[6:])))
    command = [*TINY, "--corpus", name, "--questions", "q.jsonl", "--train-questions", "t.jsonl", "--run", "t",
               "--init", base_checkpoint(), "--memtrain-steps", "1", "--memagent-steps", "1", "--eval-masked", "2",
               "--turns", "3", "--eval-lengths", "1"]
    assert memtrain.main(command) == 0
    said = capfd.readouterr()
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x80-\x9f\u202e]", said.out), "no escape reaches the terminal"
    assert r"c\x1b[31m.jsonl" in said.out
    (folder / "t.jsonl").write_text(json.dumps(asked[0]))
    assert memtrain.main(command[:-2]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert "\x1b" not in said[-1] and "--train-questions" in said[-1]


# ---- tricks of a policy


TRICKS = {  # what the answer turn writes, where the answer is Victor Hugo
    "no box": "Victor Hugo", "several boxes, the right one first": "\\boxed{Victor Hugo} \\boxed{Paris}",
    "a list": "\\boxed{Victor Hugo, Paris, Seine}", "a list with or": "\\boxed{Paris or Victor Hugo}",
    "a list by lines": "\\boxed{Victor Hugo\nParis}", "a sentence": "\\boxed{It is Victor Hugo.}",
    "the problem": "\\boxed{Which entity is [MASK] in the whole article?}", "the placeholder": "\\boxed{[MASK]}",
    "the other placeholder": "\\boxed{[TARGET]}", "placeholder and answer": "\\boxed{[MASK] Victor Hugo}",
    "box in a box": "\\boxed{\\boxed{Victor Hugo}}",
    "an open box": "\\boxed{Victor Hugo", "an empty box": "\\boxed{}",
    "an empty box behind": "\\boxed{Victor Hugo}\\boxed{}",
    "an article": "\\boxed{the}", "half": "\\boxed{Hugo}", "twice": "\\boxed{Victor Hugo Victor Hugo}",
    "very long": "\\boxed{" + "the " * 100 + "Victor Hugo}", "in braces": "\\boxed{{Victor} {x} {Hugo}}",
    "said to be in the memory": "\\boxed{see memory}",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_exact_match_stays_exact(trick, agent, monkeypatch):
    """The memories say \\boxed{Victor Hugo} at every turn: only the box of the answer turn counts."""
    a, texts = agent(), []
    problem = memtrain.Problem("p", "Which entity is [MASK]?", ("Victor Hugo",), ("A b c.",), "masked")

    def sample(self, prompts, keys):
        text = texts[0] if keys[0][-1] == "answer" else "\\boxed{Victor Hugo}"
        return [memtrain.Turn(*p, [*a.tokenizer.encode(text), a.tokenizer.end], []) for p in prompts]
    monkeypatch.setattr(memtrain.Agent, "sample", sample)
    for text, reward in ((TRICKS[trick], 0.0), ("it is \\boxed{the Victor Hugo.}", 1.0)):
        texts[:] = [text]
        (rollout,) = a.read([problem], [("k",)])
        assert "Victor Hugo" in a.tokenizer.decode(rollout.memories[-1]) and rollout.correct == reward
