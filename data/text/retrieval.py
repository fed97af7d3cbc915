"""BM25 over the passages of a corpus, of which an index is built in memory.

A passage is searched by its rendered form: the words of its title count like those of its text. What a word is,
data.text.words says; bm25s leaves out English stop words. Loads bm25s and numpy only where something is searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.text.words import searched

LONGEST_QUERY = 10_000  # characters; a question has about 100, a page of text 3,000


class Retriever:
    """BM25 index of `corpus`, a data.text.corpus.Corpus; its passages are numbered as there."""

    def __init__(self, corpus):
        import bm25s

        self.corpus, self.size = corpus, len(corpus.passages)
        self.index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy")
        words = _tokenize([p.rendered for p in corpus.passages])
        self.empty = not words.vocab  # not a single word; bm25s stumbles over it
        if not self.empty:
            self.index.index(words, show_progress=False)

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[int]]:
        """For each query at most k passages, best first, ties to the lower index; passages that share no word with it
        are left out. Of a long query the first 10,000 characters are searched for."""
        if isinstance(queries, str):  # a string is a sequence too: its letters would become the queries
            raise TypeError("queries must be a list of strings, not one string")
        found = []
        for query in queries:
            scores = self.scores(query[:LONGEST_QUERY])  # (passages,)
            found.append([i for i in top(scores, min(k, self.size)) if scores[i] > 0])
        return found

    def scores(self, text: str) -> Any:
        """BM25 of every passage for `text`, however long: float32 array (passages,)."""
        import numpy as np

        known = [] if self.empty else self.index.get_tokens_ids(_tokenize([text], return_ids=False)[0])
        return self.index.get_scores_from_ids(known) if known else np.zeros(self.size, np.float32)


def top(scores: Any, k: int) -> list[int]:
    """Indices of the k highest scores, highest first, lower index first on ties."""
    import numpy as np

    if k <= 0:
        return []
    # Most passages share no word with the query, and so many equal scores slow the partition down: of 300,000
    # passages, one masked document in ten took 40 ms with them and takes 16 without.
    some = np.flatnonzero(scores > 0)
    if len(some) < k:
        some = np.arange(len(scores))
    # Only those that reach the k-th score are sorted: a full sort of a million passages would take 0.1 s.
    threshold = np.partition(scores[some], len(some) - k)[len(some) - k]
    candidates = some[scores[some] >= threshold]
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]].tolist()


def _tokenize(texts: Sequence[str], **options) -> Any:
    import bm25s

    return bm25s.tokenize([" ".join(searched(text)) for text in texts], token_pattern=r"\S+", lower=False,
                          stopwords="english", show_progress=False, **options)
