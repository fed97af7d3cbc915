"""Answer metrics and the intervals that go with them; numpy only.

The rewards of training and the figures of the report come from the same `extract_boxed` and `exact_match`,
so both must be deaf to tricks: whoever lists several entities, leaves the box open, boxes nothing, boxes an
article that is not the answer, or repeats the placeholder, gets 0. `f1` and `sub_exact_match` are the field's
lenient companions; they are reported beside exact match and are never a reward.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
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
_NOT_LATIN, _MARKS = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1), regex.compile(r"\p{P}")
_UNSPACED = regex.compile(rf"[{UNSPACED}]\p{{M}}*+")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}


def normalize(text: str) -> str:
    """The field's QA normalisation: lower case, no ASCII punctuation, no articles, single spaces.

    The order is the one of the SQuAD and HotpotQA scripts (punctuation goes first, so "U.S." is "us"), whose result it
    is for text in Latin letters. Text with others also loses Unicode's punctuation, and characters of scripts without
    spaces count as words, as in MLQA's script (Lewis et al. 2020): "北京。" is "北京", and half of "北京大学".
    """
    if _NOT_LATIN.search(text):
        text = _MARKS.sub("", unicodedata.normalize("NFKC", text))
        text = _UNSPACED.sub(r" \g<0> ", text)
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
    """The normalised text, or, of what that leaves nothing ("The The", "!!!"), the text itself, but for spaces."""
    return normalize(text) or " ".join(text.split())


def exact_match(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised answer, else 0.0.

    Normalisation deletes articles and punctuation, so a prediction padded with them could be of any length;
    more than twice the longest answer plus 32 characters is over-long and scores 0.
    """
    guess, golds = _prepared(prediction, answers)
    if not guess or len(prediction) > 2 * max(map(len, answers), default=0) + 32:
        return 0.0
    return float(guess in golds)


def f1(prediction: str | None, answers: Sequence[str]) -> float:
    """Token F1, best over the answers. Yes/no/noanswer earn no partial credit (HotpotQA's rule)."""
    guess, golds = _prepared(prediction, answers)
    best = 0.0
    for gold in golds:
        if guess != gold and (guess in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS):
            continue
        mine, theirs = guess.split(), gold.split()
        shared = sum((Counter(mine) & Counter(theirs)).values())
        best = max(best, 2 * shared / (len(mine) + len(theirs)))
    return best


def sub_exact_match(prediction: str | None, answers: Sequence[str]) -> float:
    """1.0 if a normalised answer occurs in the normalised prediction as a run of whole tokens.

    Lenient by nature (a list of entities scores): comparable to what MemAgent reports, not a reward.
    """
    guess, golds = _prepared(prediction, answers)
    return float(any(f" {gold} " in f" {guess} " for gold in golds))


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


def bootstrap_difference(a, b, n: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a - b and its 95% interval, paired by question and seed, as `bootstrap_mean` makes it.

    a, b: (seeds, questions), or (questions,) for one seed; 0/1 or any per-question score. Entry [s, q] of
    both is the same question and the same seed.
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=float)), np.atleast_2d(np.asarray(b, dtype=float))
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"a paired bootstrap needs equal (seeds, questions) arrays: {a.shape}, {b.shape}")
    return bootstrap_mean([a - b], n, seed)


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
