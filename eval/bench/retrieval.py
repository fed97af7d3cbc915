"""What a search costs: building the BM25 index of a corpus, reading it back, and a query, alone and in batches.

Called by `python -m eval.bench retrieval`. Queries are questions where some are given, else 12 words from the middle of
passages all over the corpus.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from data.run.terminal import columns
from data.text.corpus import Corpus
from data.text.retrieval import INDEX, Retriever
from eval.bench.measure import seconds

QUERIES, QUERY_WORDS = 200, 12
BATCHES = (1, 8, 64)
CPU = torch.device("cpu")


def queries_of(corpus: Corpus) -> list[str]:
    """Up to 200 queries made of words of passages at even distances."""
    texts = [p.text.split() for p in corpus.passages[::max(1, len(corpus) // QUERIES)]][:QUERIES]
    return [" ".join(w[max(0, (len(w) - QUERY_WORDS) // 2):][:QUERY_WORDS]) for w in texts]


def run(corpus: Corpus, queries: Sequence[str], repeats: int) -> dict:
    """Seconds of building and loading, once a repeat; milliseconds a query by batch size."""
    import bm25s  # noqa: F401  its import is no part of the first build

    rows: dict[str, list[float]] = {"build": [], "fingerprint": [], "build and keep": [], "load": []}
    times: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in tqdm(range(repeats), "retrieval", unit="repeat"):
        with tempfile.TemporaryDirectory() as place:
            folder, fresh, made = Path(place, "index"), Corpus(corpus.passages, corpus.name), []
            steps = (lambda c=fresh: Retriever(c), lambda c=fresh: c.fingerprint,
                     *[lambda c=fresh, f=folder: Retriever(c, f)] * 2)
            for spent, step in zip(rows.values(), steps, strict=True):
                spent.append(seconds(lambda step=step, made=made: made.append(step()), CPU))
            megabytes = (folder / INDEX).stat().st_size / 1e6
        for size, spent in times.items():
            found = []
            for start in range(0, len(queries), size):
                some = queries[start:start + size]
                took = seconds(lambda some=some, found=found, r=made[-1]: found.extend(r.search(some)), CPU)
                spent.append(1e3 * took / len(some))
            if found != made[0].search(queries):
                raise AssertionError(f"searching by {size} in the index read back finds something else than at once")
    ms = {str(size): {"median": statistics.median(spent), "p90": sorted(spent)[-(-9 * len(spent) // 10) - 1],
                      "max": max(spent)} for size, spent in times.items()}
    return {"corpus": corpus.name, "passages": len(corpus), "queries": len(queries), "repeats": repeats,
            "index_mb": megabytes, "seconds": rows, "ms": ms}


def table(result: dict) -> str:
    lines = [["seconds", "min", "median", "max"]]
    lines += [[name, *(f"{f(values):.3f}" for f in (min, statistics.median, max))]
              for name, values in result["seconds"].items()]
    ms = [["ms a query", "median", "p90", "max"]]
    ms += [["alone" if width == "1" else f"in batches of {width}", *(f"{figures[f]:.2f}" for f in ms[0][1:])]
           for width, figures in result["ms"].items()]
    return (f"{result['corpus']}: {result['passages']:,} passages, index of {result['index_mb']:.1f} MB, "
            f"{result['queries']} queries, {result['repeats']} repeats\n\n{columns(lines)}\n\n{columns(ms)}")
