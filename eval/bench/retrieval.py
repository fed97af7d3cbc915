"""What a search costs: building the BM25 index of a corpus, reading it back, and a query, alone and in batches.

Called by `python -m eval.bench retrieval`. Queries are questions where some are given, else 12 words from the middle of
passages all over the corpus.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data.text.corpus import Corpus
from data.text.retrieval import INDEX, Retriever

QUERIES, QUERY_WORDS = 200, 12
BATCHES = (1, 8, 64)
STEPS = ("build", "fingerprint", "build and keep", "load")


def queries_of(corpus: Corpus) -> list[str]:
    """Up to 200 queries made of words of passages at even distances."""
    texts = [p.text.split() for p in corpus.passages[::max(1, len(corpus) // QUERIES)]][:QUERIES]
    return [" ".join(w[max(0, (len(w) - QUERY_WORDS) // 2):][:QUERY_WORDS]) for w in texts]


def run(corpus: Corpus, queries: Sequence[str], repeats: int) -> dict:
    """Seconds of building and loading, once a repeat; milliseconds a query, as `spread` has them, by batch size."""
    import bm25s  # noqa: F401  its import is no part of the first build

    rows: dict[str, list[float]] = {name: [] for name in STEPS}
    times: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in tqdm(range(repeats), "retrieval", unit="repeat"):
        built, loaded, megabytes = index_once(Corpus(corpus.passages, corpus.name), rows)
        found = built.search(queries)
        for size, values in times.items():
            if search_once(loaded, queries, size, values) != found:
                raise AssertionError(f"searching by {size} in the index read back finds something else than at once")
    return {"corpus": corpus.name, "passages": len(corpus), "queries": len(queries), "repeats": repeats,
            "index_mb": megabytes, "seconds": rows, "ms": {str(size): spread(values) for size, values in times.items()}}


def index_once(corpus: Corpus, rows: dict[str, list[float]]) -> tuple[Retriever, Retriever, float]:
    """Appends the seconds of each of STEPS. Returns the index built, the one read back, and its MB on the disk."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "index")
        steps = (lambda: Retriever(corpus), lambda: corpus.fingerprint, lambda: Retriever(corpus, folder),
                 lambda: Retriever(corpus, folder))
        made = []
        for name, step in zip(STEPS, steps, strict=True):
            seconds, value = timed(step)
            rows[name].append(seconds)
            made.append(value)
        return made[0], made[-1], (folder / INDEX).stat().st_size / 1e6


def search_once(retriever: Retriever, queries: Sequence[str], size: int, times: list[float]) -> list[list[int]]:
    """What is found for all queries, `size` of them at a time; appends the milliseconds a query of each batch."""
    found: list[list[int]] = []
    for start in range(0, len(queries), size):
        some = queries[start:start + size]
        seconds, new = timed(lambda some=some: retriever.search(some))
        times.append(1e3 * seconds / len(some))
        found += new
    return found


def timed(work: Callable):
    """(seconds, value) of work()."""
    began = time.perf_counter()
    value = work()
    return time.perf_counter() - began, value


def spread(values: Sequence[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {"median": statistics.median(ranked), "p90": ranked[-(-9 * len(ranked) // 10) - 1], "max": ranked[-1]}


def table(result: dict) -> str:
    lines = [f"{result['corpus']}: {result['passages']:,} passages, index of {result['index_mb']:.1f} MB, "
             f"{result['queries']} queries, {result['repeats']} repeats\n",
             f"{'seconds':24s}{'min':>10s}{'median':>10s}{'max':>10s}"]
    for name, values in result["seconds"].items():
        lines.append(f"{name:24s}{min(values):10.3f}{statistics.median(values):10.3f}{max(values):10.3f}")
    lines.append(f"\n{'ms a query':24s}{'median':>10s}{'p90':>10s}{'max':>10s}")
    for width, figures in result["ms"].items():
        name = "alone" if width == "1" else f"in batches of {width}"
        lines.append(f"{name:24s}" + "".join(f"{figures[f]:10.2f}" for f in ("median", "p90", "max")))
    return "\n".join(lines)
