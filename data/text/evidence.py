"""The evidence of questions: looked up where it did not come along, kept out of what is trained on, counted where a
search looks.

A question about a long document can be answered only if the document holds its evidence; and what is evaluated on must
not be trained on. Titles, questions and sentences are compared by their words (data.text.words.compared).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from data import InputError
from data.text.corpus import Corpus, Passage, Question
from data.text.words import SENTENCE_END, compared, count

Words = tuple[str, ...]
LONG = 8  # words: a shorter sentence ("He was an actor.") says nothing about where it was taken from
FEW = 0.05  # of a file's questions may lack evidence, and are left out; more, and it is a file without evidence


class Evidence:
    """`passage in Evidence(questions)`: whether it is of a page that holds evidence of one of them, which its title
    decides, or repeats a sentence of that evidence. Stories are made for their questions, and are no pages."""

    def __init__(self, questions: Iterable[Question]):
        pages = [q for q in questions if not q.ordered]
        gold = {passage for q in pages for passage in q.gold}
        named = {title for q in pages for title in q.missing} | {p.title for p in gold}
        self.titles = set(map(compared, named)) - {()}
        self.sentences = {s for p in gold for s in _sentences(p)}

    def __contains__(self, passage: Passage) -> bool:
        return compared(passage.title) in self.titles or not self.sentences.isdisjoint(_sentences(passage))

    def of(self, question: Question) -> bool:
        """Whether a question is about one of these pages; a story never is."""
        return not question.ordered and (any(p in self for p in question.gold)
                                         or any(compared(title) in self.titles for title in question.missing))


def _sentences(passage: Passage) -> list[Words]:
    return [compared(s) for s in SENTENCE_END.split(passage.text) if count(s) >= LONG]


def without_evidence(corpus: Corpus, evidence: Evidence) -> tuple[Corpus, int]:
    """(the corpus without passages that hold this evidence, how many those are). InputError if all do."""
    kept = [p for p in corpus.passages if p not in evidence]
    out = len(corpus) - len(kept)
    if not kept:
        raise InputError(f"corpus {corpus.name}: all {out} passages hold evidence of the evaluation's questions, and "
                         f"none is left to train on; give a larger corpus")
    return (Corpus(kept, corpus.name, corpus.clues) if out else corpus), out


def with_evidence(questions: Sequence[Question], corpus: Corpus, option: str) -> tuple[list[Question], int]:
    """(questions with all of their evidence, how many were left out). Passages of the corpus with the title of missing
    evidence, the very one or else its words, are evidence. InputError if more than a few questions lack some.
    option: where they come from."""
    pages: dict[Words, list[Passage]] = {}
    if any(q.missing for q in questions):
        for passage in corpus.passages:
            pages.setdefault(compared(passage.title), []).append(passage)
    found = []
    for question in questions:
        titles = [compared(title) for title in question.missing]
        if all(title in pages for title in titles):
            named = ([p for p in pages[words] if p.title == title] or pages[words]
                     for title, words in zip(question.missing, titles, strict=True))
            own = dict.fromkeys([*question.gold, *itertools.chain(*named)])
            others = tuple(p for p in question.distractors if p not in own)
            question = replace(question, gold=tuple(own), distractors=others, missing=())
        if question.gold and not question.missing:
            found.append(question)
    if (lacking := len(questions) - len(found)) > FEW * len(questions):
        one = next(q for q in questions if not q.gold or q.missing)
        gone = next((title for title in one.missing if compared(title) not in pages), None)
        what = f"no page {gone!r} in corpus {corpus.name}" if gone else "no passages with it"
        raise InputError(
            f"{option}: {lacking} of {len(questions)} questions come without their evidence, so a document could not "
            f"hold the answer (question {one.id}: {what}); give a file with contexts (HotpotQA's distractor setting, "
            f"2WikiMultiHopQA, MuSiQue), or a --corpus that has the pages it names; for search alone, --benchmarks")
    return found, lacking


def evidence_held(asked: Mapping[str, Sequence[Question]], passages: Sequence[Passage]) -> dict[str, tuple]:
    """{set of questions: (found, of, what)}: gold passages of which `passages` have one of that title; of a set without
    any, questions with an answer that some passage states word for word, which need not be evidence."""
    titles = {compared(p.title) for p in passages}
    bare = {name: some for name, some in asked.items() if not any(q.gold for q in some)}
    answers = {compared(a) for some in bare.values() for q in some for a in q.answers} - {()}
    stated = _stated(answers, passages) if answers else set()
    held = {}
    for name, some in asked.items():
        if name in bare:
            held[name] = sum(any(compared(a) in stated for a in q.answers) for q in some), len(some), "answers stated"
        else:
            gold = [p for q in some for p in q.gold]
            held[name] = sum(compared(p.title) in titles for p in gold), len(gold), "gold passages"
    return held


def _stated(answers: set[Words], passages: Iterable[Passage]) -> set[Words]:
    """Those that some passage holds as a run of words."""
    by_first: dict[str, list[Words]] = {}
    for answer in answers:
        by_first.setdefault(answer[0], []).append(answer)
    found: set[Words] = set()
    for passage in passages:
        words = compared(passage.rendered)
        for i, word in enumerate(words):
            for answer in by_first.get(word, ()):
                if answer not in found and words[i:i + len(answer)] == answer:
                    found.add(answer)
    return found
