"""The evidence of questions: looked up where it did not come along, and kept out of what is trained on.

A question about a long document can be answered only if the document holds its evidence; and what is evaluated on must
not be trained on. Both compare words alone: case, punctuation, spaces and Unicode forms aside.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

import regex

from data import InputError
from data.text.corpus import Corpus, Passage, Question
from data.text.words import SENTENCE_END, count

LONG = 8  # words: a shorter sentence ("He was an actor.") says nothing about where it was taken from
FEW = 0.05  # of a file's questions may lack evidence, and are left out; more, and it is a file without evidence


def plain(text: str) -> str:
    """The words of `text`, of any script, in small letters, one space between them."""
    return " ".join(regex.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class Evidence:
    """`passage in Evidence(questions)`: whether it is of a page that holds evidence of one of them, which its title
    decides, or repeats a sentence of that evidence. Stories are made for their questions, and are no pages."""

    def __init__(self, questions: Iterable[Question]):
        gold = {passage for question in questions if not question.ordered for passage in question.gold}
        self.titles = set(filter(None, (plain(p.title) for p in gold)))
        self.sentences = {s for p in gold for s in _sentences(p)}

    def __contains__(self, passage: Passage) -> bool:
        return plain(passage.title) in self.titles or not self.sentences.isdisjoint(_sentences(passage))


def _sentences(passage: Passage) -> list[str]:
    return [plain(s) for s in SENTENCE_END.split(passage.text) if count(s) >= LONG]


def with_evidence(questions: Sequence[Question], corpus: Corpus, option: str) -> tuple[list[Question], int]:
    """(questions with all of their evidence, how many were left out). Passages of the corpus with the title of missing
    evidence are evidence. InputError if more than a few questions lack some. option: where they come from."""
    pages: dict[str, list[Passage]] = {}
    if any(q.missing for q in questions):
        for passage in corpus.passages:
            pages.setdefault(plain(passage.title), []).append(passage)
    found = []
    for question in questions:
        titles = [plain(title) for title in question.missing]
        if all(title in pages for title in titles):
            own = dict.fromkeys([*question.gold, *(p for title in titles for p in pages[title])])
            others = tuple(p for p in question.distractors if p not in own)
            question = replace(question, gold=tuple(own), distractors=others, missing=())
        if question.gold and not question.missing:
            found.append(question)
    if (lacking := len(questions) - len(found)) > FEW * len(questions):
        one = next(q for q in questions if not q.gold or q.missing)
        gone = next((title for title in one.missing if plain(title) not in pages), None)
        what = f"no page {gone!r} in corpus {corpus.name}" if gone else "no passages with it"
        raise InputError(
            f"{option}: {lacking} of {len(questions)} questions come without their evidence, so a document could not "
            f"hold the answer (question {one.id}: {what}); give a file with contexts (HotpotQA's distractor setting, "
            f"2WikiMultiHopQA, MuSiQue), or a --corpus that has the pages it names; for search alone, --benchmarks")
    return found, lacking
