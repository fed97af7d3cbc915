"""Retrieval judged on its own: how many of the passages that hold the evidence does a search for the question return?

    python -m eval.retrieval --corpus FILE --questions FILE [FILE ...] [--retriever dense:FOLDER]
                             [--out FILE]

Searched is the corpus together with all passages that came with the questions of all files, gold and distractors, so
that what is asked for is there, among what was made to be mistaken for it. The query is the question. Recall at k is
the share of gold passages, over all questions, among the first k found; a repeated paragraph of another title is none.

Beside it stands what looking up titles would find at the same k: the passages whose title occurs in the question word
for word (case and punctuation aside), longer titles first, then in the order of the corpus. A gold passage that is not
named in the question, the second hop of a bridge question, is out of reach of any lookup. With --retriever the vectors
of a sentence model stand beside both.

Intervals are Wilson's, 95%, over gold passages as if those of one question were independent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import InputError
from data.run.files import output, write_json
from data.run.terminal import StrictParser, one_line, printable
from data.search import with_contexts
from data.text.corpus import Corpus, Question, load_passages, load_questions
from data.text.dense import Dense, retriever_of
from data.text.retrieval import Retriever
from data.text.words import compared
from eval.metrics import wilson_interval

DEPTHS = (3, 10)  # 3 is what a search returns in search QA
METHODS = {"bm25": "BM25", "dense": "dense", "titles": "exact title"}


class Titles:
    """A lookup of passages by the titles that a question names."""

    def __init__(self, corpus: Corpus):
        self.passages: dict[tuple[str, ...], list[int]] = {}
        for i, passage in enumerate(corpus.passages):
            self.passages.setdefault(compared(passage.title), []).append(i)
        self.passages.pop((), None)  # a title of punctuation alone
        self.longest = max(map(len, self.passages), default=0)

    def search(self, question: str, k: int) -> list[int]:
        """At most k passages, those of longer titles first, then those of lower index."""
        asked, found = compared(question), {}
        for length in range(min(self.longest, len(asked)), 0, -1):
            spans = {asked[start:start + length] for start in range(len(asked) - length + 1)}
            found |= dict.fromkeys(sorted(i for span in spans for i in self.passages.get(span, ())))
            if len(found) >= k:
                break
        return list(found)[:k]


def judge(name: str, questions: Sequence[Question], corpus: Corpus, retrievers: dict[str, Retriever | Dense],
          titles: Titles) -> dict:
    """One row: recall of each retriever and of the lookup at each depth, each with its interval and counts.

    InputError if no passage is marked as gold.
    """
    number = {p: i for i, p in enumerate(corpus.passages)}
    gold = [{number[p] for p in q.gold} for q in questions]
    asked = sum(map(len, gold))
    if not asked:
        raise InputError(f"{name}: no question has gold passages; give HotpotQA, 2WikiMultiHopQA or MuSiQue records")
    texts = [q.question for q in questions]
    found = {method: retriever.search(texts, max(DEPTHS)) for method, retriever in retrievers.items()}
    found["titles"] = [titles.search(t, max(DEPTHS)) for t in texts]
    row = {"questions": name, "n": len(questions), "gold": asked, "passages": len(corpus)}
    for method, lists in found.items():
        for k in DEPTHS:
            hits = [len(want & set(some[:k])) for want, some in zip(gold, lists, strict=True)]
            low, high = wilson_interval(sum(hits), asked)
            complete = sum(n == len(want) for n, want in zip(hits, gold, strict=True) if want)
            row[f"{method}@{k}"] = {"found": sum(hits), "recall": sum(hits) / asked, "low": low, "high": high,
                                    "all_gold": complete}
    return row


def table(rows: Sequence[dict]) -> str:
    """Markdown: a row for each file; in the brackets the interval, and behind it the questions with all their gold."""
    columns = [(method, k) for method in METHODS for k in DEPTHS if f"{method}@{k}" in rows[0]]
    heads = [f"{METHODS[method]} @{k}" for method, k in columns]
    lines = ["| " + " | ".join(["questions", "n", "gold passages", "searched", *heads]) + " |",
             "|---|" + "---:|" * (3 + len(heads))]
    for row in rows:
        cells = [printable(row["questions"]).replace("|", "\\|"), f"{row['n']:,}", f"{row['gold']:,}",
                 f"{row['passages']:,}"]
        for method, k in columns:
            one = row[f"{method}@{k}"]
            cells.append(f"{100 * one['recall']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]; "
                         f"{one['all_gold']}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Recall of gold passages in %, its 95% interval; questions with all of their gold."])


def run(argv: Sequence[str]) -> None:
    parser = StrictParser(prog="python -m eval.retrieval", allow_abbrev=False,
                          description="Recall of gold passages by BM25, and by a sentence model, beside a lookup of "
                                      "titles.")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="passages, as for memtrain.py")
    parser.add_argument("--questions", required=True, nargs="+", metavar="FILE", help="questions with their passages")
    parser.add_argument("--retriever", default="bm25", metavar="dense:FOLDER", help="a sentence model beside BM25")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures there, as JSON")
    options = parser.parse_args(argv)
    if options.out:
        output(options.out, inputs=[options.corpus, *options.questions])
    corpus = load_passages(options.corpus)
    questions = {file: load_questions(file) for file in options.questions}
    searched = with_contexts(corpus, [q for some in questions.values() for q in some])
    retrievers: dict[str, Retriever | Dense] = {"bm25": Retriever(searched)}
    if options.retriever != "bm25":
        retrievers["dense"] = retriever_of(options.retriever, searched)
    titles = Titles(searched)
    rows = [judge(Path(file).name, some, searched, retrievers, titles) for file, some in questions.items()]
    print(table(rows))
    if options.out:
        write_json(options.out, {"command": " ".join(["python -m eval.retrieval", *argv]), "corpus": corpus.name,
                                 "fingerprint": searched.fingerprint, "rows": rows})


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(sys.argv[1:] if argv is None else list(argv))
    except InputError as error:
        print(one_line(f"retrieval: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
