"""BM25 over the passages of a corpus: the one place that searches.

    Retriever(corpus)          an index in memory
    Retriever(corpus, folder)  the index that `folder` keeps; built and kept there if the folder is absent or empty

A kept index is one file, written under a temporary name and renamed: a build that was killed leaves nothing that is
later taken for an index. The file says which corpus it is of. Loads bm25s and numpy only where something is searched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from data import InputError
from data.run.files import replacing, writing
from data.text.words import searched


class Corpus(Protocol):
    """What is searched, a data.text.corpus.Corpus: passages with their rendered form, and a fingerprint of them."""

    name: str
    passages: Sequence[Any]
    fingerprint: str

    def __len__(self) -> int: ...


# A passage is searched by its rendered form: the words of its title count like those of its text.
SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75, "stopwords": "english", "text": "title: text",
            "words": "of any script; pairs of characters, and single Han, where it has no spaces (data.text.words)"}
INDEX, LOCK = "index.npz", ".lock"
ARRAYS = ("data", "indices", "indptr")
LONGEST_QUERY = 10_000  # characters; a question has about 100, a page of text 3,000


class Retriever:
    """BM25 index of `corpus`, a data.text.corpus.Corpus; its passages are numbered as there.

    Raises InputError if `folder` holds the index of another corpus, one of other settings or another bm25s, a damaged
    one, or other files; nothing in it is changed then. Two processes may start on one empty folder: the second waits.
    """

    def __init__(self, corpus: Corpus, folder: Path | None = None):
        self.corpus, self.size = corpus, len(corpus)
        self.index = _build(corpus) if folder is None else keep(
            Path(folder, INDEX), lambda path: _load(path, corpus), lambda: _build(corpus),
            lambda index, path: _save(index, path, corpus))

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[int]]:
        """For each query at most k passages, best first, ties to the lower index; passages that share no word with it
        are left out. Single letters and English stop words are no words (data.text.words); of a long query the first
        10,000 characters are searched for, so that no query takes longer than those do."""
        if isinstance(queries, str):  # a string is a sequence too: its letters would become the queries
            raise TypeError("queries must be a list of strings, not one string")
        found = []
        for words in _words([query[:LONGEST_QUERY] for query in queries]):
            scores = self._scores(words)  # (passages,)
            found.append([i for i in top(scores, min(k, self.size)) if scores[i] > 0])
        return found

    def scores(self, text: str) -> Any:
        """BM25 of every passage for `text`, however long: float32 array (passages,)."""
        return self._scores(_words([text])[0])

    def _scores(self, words: list[str]) -> Any:
        import numpy as np

        known = self.index.get_tokens_ids(words)
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


def _words(texts: list[str]) -> list[list[str]]:
    return _tokenize(texts, return_ids=False)


def _tokenize(texts: Sequence[str], **options) -> Any:
    """bm25s removes English stop words and numbers the rest; what a word is, data.text.words says."""
    import bm25s

    return bm25s.tokenize([" ".join(searched(text)) for text in texts], token_pattern=r"\S+", lower=False,
                          stopwords=SETTINGS["stopwords"], show_progress=False, **options)


def _empty() -> Any:
    import bm25s

    return bm25s.BM25(method=SETTINGS["method"], k1=SETTINGS["k1"], b=SETTINGS["b"], backend="numpy")


def _build(corpus: Corpus) -> Any:
    import numpy as np

    index = _empty()
    words = _tokenize([p.rendered for p in corpus.passages])
    if words.vocab:
        index.index(words, show_progress=False)
    else:  # a corpus without a single word, in which nothing is found; bm25s stumbles over it
        _fill(index, [], {"data": np.zeros(0, np.float32), "indices": np.zeros(0, np.int32),
                          "indptr": np.zeros(1, np.int64)}, len(corpus))
    return index


def _fill(index: Any, words: list[str], arrays: dict[str, Any], size: int) -> None:
    """Gives `index` what BM25.load would: word k has the columns indptr[k] to indptr[k + 1] of data and indices."""
    index.vocab_dict = {word: k for k, word in enumerate(words)}
    index.scores = arrays | {"num_docs": size}
    index.nonoccurrence_array = None  # of BM25 variants that score absent words


# ---- an index on disk


def keep(path: Path, load: Callable[[Path], Any], build: Callable[[], Any],
         save: Callable[[Any, Path], None]) -> Any:
    """The index in the file `path`, which is built if nothing is in its folder. InputError where other files are."""
    if path.exists():
        return load(path)
    folder, own = path.parent, {path.name, path.name + ".tmp", LOCK}  # the second is what a killed build leaves
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: a file, and an index needs a folder; give a new or an empty one")
        if folder.exists() and (strangers := sorted({p.name for p in folder.iterdir()} - own)):
            raise InputError(f"{folder}: holds no index but other files ({strangers[0]}); give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK).acquire()  # ends with its process, however that ends
    with lock:
        if path.exists():  # another process has built it meanwhile
            return load(path)
        index = build()
        save(index, path)
    return index


def _about(corpus: Corpus) -> dict[str, Any]:
    """What must agree between a kept index and the corpus and program that want to use it (all but the name)."""
    import bm25s

    return {"form": 1, "corpus": corpus.name, "passages": len(corpus), "fingerprint": corpus.fingerprint,
            "bm25s": bm25s.__version__, "settings": SETTINGS}


def _save(index: Any, path: Path, corpus: Corpus) -> None:
    words = sorted(index.vocab_dict, key=index.vocab_dict.__getitem__)  # the k-th has the number k
    write_arrays(path, _about(corpus), {"words": _packed(words)} | {name: index.scores[name] for name in ARRAYS})


def _load(path: Path, corpus: Corpus) -> Any:
    """The index in a file; InputError if it is damaged, of another corpus, or made otherwise."""
    arrays = read_arrays(path, _about(corpus), ("words", *ARRAYS))
    index = _empty()
    _fill(index, json.loads(arrays.pop("words").tobytes()), arrays, len(corpus))
    return index


def _packed(value: Any) -> Any:
    import numpy as np

    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def write_arrays(path: Path, about: dict[str, Any], arrays: dict[str, Any]) -> None:
    """A zip archive, in which each part has a checksum."""
    import numpy as np

    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, about=_packed(about), **arrays)


def read_arrays(path: Path, mine: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Arrays of a kept index by name; InputError if it is damaged, or says otherwise about itself than `mine`."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            kept = json.loads(file["about"].tobytes())
            if isinstance(kept, dict) and isinstance(kept["fingerprint"], str):  # else it is damaged
                _compare(path, kept, mine)
            return {name: file[name] for name in names}
    except InputError:
        raise
    except Exception as error:  # a damaged zip archive raises many classes, and there is one thing to do
        why = type(error).__name__
        raise InputError(f"{path}: damaged or unreadable ({why}); delete it, and it is built again") from error


def _compare(path: Path, kept: dict[str, Any], mine: dict[str, Any]) -> None:
    if kept["fingerprint"] != mine["fingerprint"]:
        theirs, ours = (f"{x['corpus']} with {x['passages']:,} passages, {x['fingerprint']}" for x in (kept, mine))
        raise InputError(f"{path}: the index of another corpus ({theirs}) than this one ({ours}); give another "
                         f"folder, or delete this one to have it built anew")
    for name in mine:
        if name not in ("corpus", "passages", "fingerprint") and kept[name] != mine[name]:
            raise InputError(f"{path}: made with {name} {kept[name]}, here it is {mine[name]}; give another folder, or "
                             f"delete this one to have it built anew")
