"""Answer metrics and the intervals that go with them; numpy only.

The rewards of training and the figures of the report come from the same `extract_boxed` and `exact_match`,
so both must be deaf to tricks: whoever lists several entities, leaves the box open, boxes nothing, boxes an
article that is not the answer or repeats the placeholder gets 0. The others are reported beside it and are never
a reward; each equals a script of the field:

    exact_match           exact_match_score of HotpotQA's script, but for the tricks and answers that it empties
    f1                    f1_score of HotpotQA's script, but for placeholders and those answers
    search_r1_sub_em      subem_check of Search-R1: an answer is a substring of the prediction
    memagent_sub_em       sub_exact_match_score of MemAgent: either is a substring of the other, so "p" names "Paris"

Those scripts are made for English. Text of other scripts is prepared for the first two as in MLQA's (`_form`).
Substrings are of the normalised texts, and of letters: "19" is in "1931". Several answers: the best counts.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import regex

from data.search import boxes
from data.text.words import UNSPACED

Z95 = 1.959963984540054  # two-sided 95% point of the normal distribution
# The same of Student's t, by degrees of freedom from 1; beyond the last one its value is a little too wide.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PLACEHOLDER = re.compile(r"\[\s*(mask|target)\s*\]", re.IGNORECASE)
# Letters that aren't Latin, and punctuation of their scripts: the quotes and dashes of print are common to all.
_FOREIGN = regex.compile(r"[[\p{L}\p{P}]--\p{Latin}--\p{scx=Common}]|[\p{P}&&\p{InHalfwidth_And_Fullwidth_Forms}]",
                         regex.V1)
_MARKS = regex.compile(r"[\p{P}\p{Default_Ignorable_Code_Point}]")
_UNSPACED = regex.compile(rf"[{UNSPACED}]\p{{M}}*+")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}


def normalize(text: str) -> str:
    """The field's QA normalisation: lower case, no ASCII punctuation, no articles, single spaces.

    The order is the one of the SQuAD and HotpotQA scripts (punctuation goes first, so "U.S." is "us").
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def extract_boxed(text: str) -> str | None:
    r"""Content of the last complete, outermost `\boxed{...}` (data.search.boxes); None where there is none or it is
    empty. So `\boxed{a \boxed{b}}` yields `a \boxed{b}`, which equals neither answer."""
    return (boxes(text) or [""])[-1] or None


def _prepared(prediction: str | None, answers: Sequence[str]) -> tuple[str, list[str]]:
    """Normalised prediction ("" if it can't score) and normalised answers that a prediction could match."""
    if isinstance(answers, str):  # a string is a sequence too: its letters would become the answers
        raise TypeError("answers must be a list of strings, not one string")
    if prediction is None or _PLACEHOLDER.search(prediction):
        return "", []
    return _form(prediction), [a for a in map(_form, answers) if a]


def _form(text: str) -> str:
    """The normalised text. Text of another script than Latin loses Unicode's punctuation and no English articles, and
    without spaces its characters are words: "北京。" is "北京", half of "北京大学" (MLQA, Lewis et al. 2020)."""
    if not _FOREIGN.search(text):
        return normalize(text)
    text = unicodedata.normalize("NFKC", _MARKS.sub("", text)).lower().translate(_DROP_PUNCTUATION)
    return " ".join(_UNSPACED.sub(r" \g<0> ", text).split())


def exact_match(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised answer, else 0.0.

    Normalisation deletes articles and punctuation, so a prediction padded with them could be of any length;
    more than twice the longest answer plus 32 characters is over-long and scores 0. An answer of which it leaves
    nothing ("The The", "!!!") is compared as it stands.
    """
    guess, golds = _prepared(prediction, answers)
    if prediction is None or len(prediction) > 2 * max(map(len, answers), default=0) + 32:
        return 0.0
    return float(guess in golds) if guess else _as_it_stands(prediction, answers)


def _as_it_stands(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of those answers that normalise to nothing."""
    return float(any(a.strip() == (prediction or "").strip() != "" and not _form(a) for a in answers))


def f1(prediction: str | None, answers: Sequence[str]) -> float:
    """Token F1, best over the answers. Yes/no/noanswer earn no partial credit (HotpotQA's rule)."""
    guess, golds = _prepared(prediction, answers)
    best = _as_it_stands(prediction, answers)
    for gold in golds:
        if guess != gold and (guess in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS):
            continue
        mine, theirs = guess.split(), gold.split()
        shared = sum((Counter(mine) & Counter(theirs)).values())
        best = max(best, 2 * shared / (len(mine) + len(theirs)))
    return best


def search_r1_sub_em(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 if a normalised answer occurs in the normalised prediction; a list of entities scores."""
    return _sub_em(prediction, answers, lambda guess, gold: gold in guess)


def memagent_sub_em(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 if of prediction and an answer, normalised, either occurs in the other; what normalises to nothing scores."""
    return _sub_em(prediction, answers, lambda guess, gold: gold in guess or guess in gold)


def _sub_em(prediction: str | None, answers: Sequence[str], within: Callable[[str, str], bool]) -> float:
    """No prediction, such as a box that was never written, scores 0."""
    if isinstance(answers, str):
        raise TypeError("answers must be a list of strings, not one string")
    return float(prediction is not None and any(within(normalize(prediction), normalize(a)) for a in answers))


# By name in results.json.
LENIENT = {"f1": f1, "sub_em_search_r1": search_r1_sub_em, "sub_em_memagent": memagent_sub_em}


def lenient(predictions: Sequence[str | None], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean of each of LENIENT over the questions."""
    pairs = list(zip(predictions, answers, strict=True))
    return {name: sum(metric(p, a) for p, a in pairs) / len(pairs) for name, metric in LENIENT.items()}


def locomo_f1(prediction: str | None, answers: Sequence[str], category: str) -> float:
    """The score of LoCoMo's authors: token F1 of Porter stems, "and" counted among the articles. Multi-hop: the mean
    over the parts of the answer, cut at commas, of the best part of the prediction. Unanswerable: whether a phrase of
    refusal, one of `answers`, occurs. Their stemmer is NLTK's, which departs from Porter's in a few words."""
    if category == "unanswerable":
        return float(any(a in (prediction or "").lower() for a in answers))
    parts = (lambda text: [p.strip() for p in text.split(",")]) if category == "multi-hop" else (lambda text: [text])
    guesses = [_stems(p) for p in parts(prediction or "")]
    best = [max(_overlap(guess, _stems(gold)) for guess in guesses) for gold in parts(answers[0])]
    return sum(best) / len(best)


def _stems(text: str) -> list[str]:
    from snowballstemmer import stemmer

    return stemmer("porter").stemWords([w for w in normalize(text).split() if w != "and"])


def _overlap(guess: list[str], gold: list[str]) -> float:
    shared = sum((Counter(guess) & Counter(gold)).values())
    return 2 * shared / (len(guess) + len(gold)) if shared else 0.0


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion; (0, 1) where nothing was measured."""
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    scale = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * (p * (1 - p) / n + Z95**2 / (4 * n * n)) ** 0.5
    # the exact bounds at p = 0 and p = 1 are 0 and 1; rounding errors would leave them just inside
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def bootstrap_mean(parts: Sequence[np.ndarray], n: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over `parts` of their means, with its 95% interval: a bootstrap over questions, Student's t over seeds.

    parts: (seeds, questions) each, of the same seeds and of questions of their own, such as one benchmark each.
    Half widths add up as squares: that of the questions, drawn anew within each part while the seeds stay, and that
    of the seeds, t times the standard error of their means. With each variance at its own quantile such a sum covers
    at least 95% (Banerjee, Sankhya 1961), with three seeds too, where drawing seeds with replacement falls short: it
    sees two thirds of their variance, and never that it knows it badly. With one seed the questions alone.
    """
    counts = _resamples(tuple(part.shape[1] for part in parts), n, seed)
    means = np.mean([drawn @ part.mean(0) / part.shape[1] for part, drawn in zip(parts, counts, strict=True)], axis=0)
    mean, (low, high) = float(np.mean([part.mean() for part in parts])), np.quantile(means, [0.025, 0.975])
    by_seed = np.mean([part.mean(1) for part in parts], axis=0)
    free = len(by_seed) - 1
    of_seeds = T95[min(free, len(T95)) - 1] * by_seed.std(ddof=1) / len(by_seed) ** 0.5 if free else 0.0
    return mean, float(mean - np.hypot(mean - low, of_seeds)), float(mean + np.hypot(high - mean, of_seeds))


@lru_cache(maxsize=16)
def _resamples(questions: tuple[int, ...], n: int, seed: int) -> list[np.ndarray]:
    """How often each resample draws each question of each part (n, Q). A report asks for the same ones hundreds of
    times. Drawing with replacement = multinomial counts used as weights."""
    rng = np.random.default_rng(seed)
    return [rng.multinomial(q, np.full(q, 1 / q), size=n).astype(float) for q in questions]
