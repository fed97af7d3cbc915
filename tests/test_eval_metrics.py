"""Metrics: strict where training could cheat, equal to the field's scripts elsewhere."""

import random
import re
import string
import time

import numpy as np
import pytest

from eval.metrics import (
    bootstrap_mean,
    exact_match,
    extract_boxed,
    f1,
    lenient,
    memagent_sub_em,
    normalize,
    search_r1_sub_em,
    wilson_interval,
)


@pytest.mark.parametrize(("text", "expected"), [
    ("The  Quick, Brown FOX!", "quick brown fox"),
    ("an apple a day", "apple day"),
    ("U.S.A.", "usa"),
    ("theatre and anthem", "theatre and anthem"),  # articles are words, not prefixes
    ("12 March 1931", "12 march 1931"),
    ("", ""), ("the", ""), (" a  AN The ", ""), ("...!?", ""), ("\t\n", ""),
    ("Zürich", "zürich"),
])
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(("text", "expected"), [
    (r"so \boxed{Paris}.", "Paris"),
    (r"\boxed{ Paris }", "Paris"),
    (r"\boxed{Rome} no, \boxed{Paris}", "Paris"),  # the last one counts
    (r"\boxed{x{y}z}", "x{y}z"),
    (r"\boxed{a \boxed{b}}", r"a \boxed{b}"),
    (r"\boxed{a \boxed{b}} \boxed{c}", "c"),
    (r"\boxed{Paris", None),
    (r"\boxed{a \boxed{b}", "b"),  # the first never closes: it is none
    (r"\boxed{a} \boxed{b", "a"),  # the last complete one
    (r"\boxed{a} \boxed{b \boxed{c}", "c"),
    (r"I think \boxed{Rome, no: \boxed{Paris}. Done.", "Paris"),
    (r"{ \boxed{Paris}", "Paris"), (r"\boxed{Rome {\boxed{Paris}}", "Paris"),
    (r"\boxed{}", None), (r"\boxed{  }", None),
    (r"\boxed{a} \boxed{}", None),  # an empty box takes the answer back
    (r"boxed{Paris}", None), (r"\boxed Paris", None), (r"\Boxed{Paris}", None),
    (r"\boxed {Paris}", "Paris"), ("\\boxed\n {Paris}", "Paris"),
    (r"\boxed{\text{Paris}}", "Paris"), (r"$$\boxed{\textbf{ Paris }}$$", "Paris"),
    (r"\boxed{\mathrm{\textit{Old Paris}}}", "Old Paris"), (r"\boxed{\text{Paris}, \emph{France}}", "Paris, France"),
    (r"\boxed{\text{Paris} \frac{1}{2}}", r"Paris \frac{1}{2}"), (r"\boxed{{Paris}}", "{Paris}"),
    (r"\boxed{\text{}}", None), (r"\boxed{\text{Paris}", None),
    ("Paris", None), ("", None), ("}{", None), ("\\boxed{", None), ("\\boxed{}}", None),
    ("\\boxed{two\nlines}", "two\nlines"),
    (r"} \boxed{a}} }", "a"),
])
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


def test_extract_boxed_survives_noise():
    rng = random.Random(0)
    pieces = ["\\boxed{", "\\boxed", "{", "}", "\\", "a", " ", "\n", "é", "the", "[MASK]", "\x00", "\ud800"]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        content = extract_boxed(text)
        if content is not None:
            assert content and content == content.strip() and content in text  # no \text{} among the pieces
            depth = 0
            for char in content:
                depth += (char == "{") - (char == "}")
                assert depth >= 0
            assert depth == 0


@pytest.mark.parametrize("text", ["\\boxed{" * 100_000, "\\boxed{a}" * 100_000, "\\boxed{" + "{}" * 300_000,
                                  "\\boxed" * 100_000, "\\boxed" + " " * 500_000, "\\boxed{" + "\\text{" * 100_000,
                                  "\\boxed{" + "\\text{a}" * 50_000 + "}", "\\boxed{" * 50_000 + "}" * 49_999])
def test_extract_boxed_is_linear(text):
    start = time.process_time()
    extract_boxed(text)
    assert time.process_time() - start < 5  # quadratic time takes minutes


@pytest.mark.parametrize(("prediction", "answers", "expected"), [
    ("Paris", ["Paris"], 1), ("the paris.", ["Paris"], 1), ("PARIS", ["Rome", "Paris"], 1),
    ("Rome", ["Paris"], 0), ("Paris, France", ["Paris"], 0), ("Par", ["Paris"], 0), ("Pariss", ["Paris"], 0),
    (None, ["Paris"], 0), ("", ["Paris"], 0), ("the", ["Paris"], 0), ("...", ["Paris"], 0),
    (" \n", ["Paris"], 0),
    ("", [""], 0), ("the", ["The"], 0), ("!", ["?"], 0), ("the", ["a"], 0),  # nothing never equals nothing
    ("Paris", [], 0), ("", [], 0),
    ("Paris or Rome or Berlin", ["Rome"], 0), ("Paris; Rome", ["Paris", "Rome"], 0),
    ("Paris Paris", ["Paris"], 0),
    (r"a \boxed{Paris}", ["Paris"], 0), (r"\text{Paris}", ["Paris"], 0),
    ("the " * 30 + "Paris", ["Paris"], 0), ("Paris" + "!" * 100, ["Paris"], 0),  # over-long
    ("Paris " * 1000, ["Paris"], 0),
    ("[MASK]", ["mask"], 0), ("[TARGET]", ["Target"], 0), ("[ mask ]", ["Mask"], 0), ("[MASK].", ["MASK"], 0),
    ("The Mask", ["Mask"], 1), ("Target", ["Target"], 1),  # but a real entity of that name may be named
    ("1,931", ["1931"], 1), ("1931", ["1932"], 0),
    ("The Who", ["the who"], 1), ("AN", ["AN"], 1), ("The A", ["The A"], 1), ("?!", ["?!"], 1), ("+", [" + "], 1),
    ("A", ["AN"], 0), ("?!", ["?"], 0), ("the ?!", ["?!"], 0),  # what normalises to nothing is compared as it stands
    ("。", ["。"], 1), ("An", ["x", "An"], 1), ("!", [""], 0), (" ", ["?"], 0),
    ("上海。", ["上海"], 1), ("「上海」", ["上海"], 1), ("上海市", ["上海"], 0), ("दिल्ली।", ["दिल्ली"], 1),
    ("«Киев»", ["киев"], 1), ("１９９８年", ["1998年"], 1), ("القاهرة؟", ["القاهرة"], 1),
    ("“Paris”", ["Paris"], 0),  # Latin: as SQuAD's script
    ("1906。", ["1906"], 1), ("Lyon？", ["Lyon"], 1), ("1906؟", ["1906"], 1),  # the mark alone is of another script
    ("B城", ["城"], 0), ("A城", ["城"], 0), ("the Киев", ["Киев"], 0), ("上\u200b海", ["上海"], 1),  # no articles there
])
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(("text", "expected"), [
    (r"The answer is \boxed{Paris}", 1), ("Paris", 0), (r"\boxed{Paris", 0), (r"\boxed{}", 0),
    (r"\boxed{Rome \boxed{Paris}}", 0), (r"\boxed{\boxed{Paris}}", 0), (r"\boxed{Paris} \boxed{Rome}", 0),
    (r"\boxed{{Paris}}", 1), (r"\boxed{\text{Paris}}", 1), (r"\boxed{Rome, Paris, Berlin}", 0),
    (r"\boxed{the}", 0), (r"\boxed{[MASK]}", 0),
])
def test_rewarded_text(text, expected):
    assert exact_match(extract_boxed(text), ["Paris"]) == expected


@pytest.mark.parametrize(("prediction", "answers", "expected"), [
    ("Paris", ["Paris"], 1.0), ("Paris France", ["Paris"], 2 / 3), ("old Paris", ["new Paris"], 0.5),
    ("x x y", ["x"], 0.5), ("Rome", ["Paris", "Rome town"], 2 / 3), ("Rome", ["Paris"], 0.0),
    ("yes", ["yes"], 1.0), ("yes it is", ["yes"], 0.0), ("no", ["no way"], 0.0), ("yes", ["no"], 0.0),
    ("noanswer", ["noanswer"], 1.0), ("noanswer given", ["noanswer"], 0.0),
    ("yes sir", ["yes", "yes sir"], 1.0), ("大阪市", ["大阪"], 0.8), ("กรุงเทพ", ["กรุงเทพ"], 1.0),
    ("Киев 2", ["Киев."], 2 / 3),
    (None, ["Paris"], 0.0), ("", [""], 0.0), ("the", ["The"], 0.0), ("the", ["the"], 1.0), ("[MASK]", ["mask"], 0.0),
    ("x", [], 0.0),
])
def test_f1(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(("prediction", "answers", "search_r1", "memagent"), [
    ("it is Paris, France", ["Paris"], 1, 1), ("the old town of Paris", ["old town"], 1, 1), ("Paris", ["Paris"], 1, 1),
    ("Parisian", ["Paris"], 1, 1), ("1931", ["19"], 1, 1),  # letters, not words
    ("Par", ["Paris"], 0, 1), ("Paris", ["Paris, France"], 0, 1), ("a", ["Paris"], 0, 1),  # "a" normalises to nothing
    ("town old", ["old town"], 0, 0), ("Rome", ["Paris"], 0, 0), ("Rome", ["Paris", "Rome"], 1, 1),
    ("", ["Paris"], 0, 1), ("Paris", ["the"], 1, 1), (None, ["Paris"], 0, 0), ("Paris", [], 0, 0),
    ("U.S.", ["us"], 1, 1), ("The New-York", ["new york"], 0, 0), ("yes it is", ["yes"], 1, 1),
])
def test_sub_em(prediction, answers, search_r1, memagent):
    assert (search_r1_sub_em(prediction, answers), memagent_sub_em(prediction, answers)) == (search_r1, memagent)


def scripts(prediction: str, answer: str) -> dict[str, float]:
    """What the scripts of HotpotQA, Search-R1 and MemAgent compute of one answer, in words of our own."""
    def tidy(text):
        kept = [c for c in text.lower() if c not in string.punctuation]
        return " ".join(re.sub(r"\b(?:the|an|a)\b", " ", "".join(kept)).split())
    mine, gold = tidy(prediction), tidy(answer)
    left, shared = gold.split(), 0
    for word in mine.split():
        if word in left:
            left.remove(word)
            shared += 1
    closed = {"yes", "no", "noanswer"} & {mine, gold} and mine != gold
    precision, recall = (shared / max(1, len(text.split())) for text in (mine, gold))
    f1 = 2 * precision * recall / (precision + recall) if shared and not closed else 0.0
    return {"em": float(mine == gold), "f1": f1,
            "sub_em_search_r1": float(mine.find(gold) >= 0),
            "sub_em_memagent": float(mine.find(gold) >= 0 or gold.find(mine) >= 0)}


def test_each_metric_equals_its_script():
    rng = random.Random(0)
    words = ["Paris", "paris", "the", "a", "old", "Old-town", "U.S.", "yes", "no", "noanswer", "19", "1931", "é", "(x)"]
    seen = []
    for _ in range(4000):
        prediction, answer = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(2))
        theirs = scripts(prediction, answer)
        ours = {"em": exact_match(prediction, [answer])} | lenient([prediction], [[answer]])
        if not normalize(answer) or not normalize(prediction):  # ours compares them as they stand
            assert ours["em"] == ours["f1"] == (prediction == answer)
            ours |= {"em": theirs["em"], "f1": theirs["f1"]}
        assert ours == pytest.approx(theirs), (prediction, answer)
        seen.append(tuple(theirs.values()))
    assert {0.0, 1.0} <= {em for em, *_ in seen} and any(m > s for *_, s, m in seen) and len(set(seen)) > 10


@pytest.mark.parametrize("metric", [exact_match, f1, search_r1_sub_em, memagent_sub_em])
def test_one_string_is_not_a_list_of_answers(metric):
    with pytest.raises(TypeError, match="list"):
        metric("P", "Paris")


@pytest.mark.parametrize(("successes", "n", "low", "high"), [  # values of the published formula, four places
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962),
    (1, 1, 0.2065, 1.0), (0, 0, 0.0, 1.0), (3, 200, 0.0051, 0.0432),
])
def test_wilson_interval(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_refuses_impossible_counts():
    for successes, n in [(-1, 5), (6, 5), (0, -1), (float("nan"), 5)]:
        with pytest.raises(ValueError):
            wilson_interval(successes, n)


def bootstrap_difference(a, b):
    """Of a - b, paired by seed and question, as eval.report.arms.compare has it."""
    return bootstrap_mean([np.atleast_2d(np.asarray(a, float)) - np.asarray(b, float)])


def test_bootstrap_matches_the_paired_normal_interval():
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.6, rng.random(400) < 0.45
    mean, low, high = bootstrap_difference(a, b)
    d = a.astype(float) - b
    half = 1.96 * d.std() / 20
    assert mean == pytest.approx(d.mean())
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.01)
    assert bootstrap_difference(a, b) == (mean, low, high)  # same seed, same interval
    assert bootstrap_difference(b, a)[0] == pytest.approx(-mean)


def test_bootstrap_uses_the_pairs():
    rng = np.random.default_rng(2)
    hard = rng.random((3, 300)) < 0.5
    better = hard.copy()
    better[:, :15] = True  # solves what the other solves, and a few questions more
    mean, low, high = bootstrap_difference(better, hard)
    assert 0 < low < mean < high < 0.06  # unpaired, the interval would be 0.09 wide and include zero


def test_seeds_enter_as_students_t_of_their_sample_deviation():
    """Where all questions agree: 0.1 / sqrt(3) is the standard error, 4.3027 Student's t of two degrees."""
    mean, low, high = bootstrap_mean([np.array([[0.1] * 40, [0.2] * 40, [0.3] * 40])])
    assert (mean, high - mean, mean - low) == pytest.approx((0.2, 4.3027 * 0.1 / 3**0.5, 4.3027 * 0.1 / 3**0.5))


def test_bootstrap_widens_when_seeds_disagree():
    rng = np.random.default_rng(3)
    b = np.zeros((3, 300))
    agree = rng.random((3, 300)) < 0.3
    disagree = rng.random((3, 300)) < np.array([[0.0], [0.3], [0.6]])
    (_, low, high), (_, own_low, own_high) = bootstrap_difference(agree, b), bootstrap_difference(disagree, b)
    assert own_high - own_low > 3 * (high - low)


def test_bootstrap_without_a_difference_is_zero():
    x = np.ones((2, 50))
    assert bootstrap_difference(x, x) == (0.0, 0.0, 0.0)
