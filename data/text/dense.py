"""Passages found by meaning: the vectors of a sentence model, as the public release finds them, beside BM25.

    Dense(corpus, model)    model: the folder of a sentence-transformers model, such as all-MiniLM-L6-v2

A text is the mean (or the first) of its tokens' last hidden states, of length 1; two texts are as close as their inner
product. Vectors take minutes, so they are kept beside the rows of the hub, in a file named after corpus and model.
Loads torch and transformers, which is no requirement of the project, only here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import InputError
from data.run.files import read_json, replacing
from data.text.hub import kept
from data.text.retrieval import LONGEST_QUERY, Retriever, top

KNOWN = {"Transformer", "Pooling", "Normalize"}  # modules of a sentence model that are computed here
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
BATCH = 64  # passages encoded side by side


class Dense:
    """Vectors of the passages of `corpus`, a data.text.corpus.Corpus; searched as a data.text.retrieval.Retriever."""

    def __init__(self, corpus, model: Path):
        self.corpus, self.encoder = corpus, encoder(model)
        self.vectors = self._kept(kept(f"vectors-{corpus.fingerprint}-{self.encoder.fingerprint}.npy"))

    def _kept(self, path: Path) -> Any:
        """(passages, D) float32, from the file `path`, made there if it is absent. InputError if it is damaged."""
        import numpy as np

        if not path.exists():
            vectors = self.encoder([p.rendered for p in self.corpus.passages])
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"{path}: damaged or unreadable ({type(e).__name__}); delete it to have it made "
                             f"anew") from None

    def search(self, queries: Sequence[str], k: int = 3) -> list[list[int]]:
        """For each query the k nearest passages, nearest first, ties to the lower index; none for a blank query."""
        if isinstance(queries, str):
            raise TypeError("queries must be a list of strings, not one string")
        return [top(self.scores(q), min(k, len(self.vectors))) if q.strip() else [] for q in queries]

    def scores(self, text: str) -> Any:
        """Inner product of every passage with `text`: float32 array (passages,)."""
        return self.vectors @ self.encoder([text])[0]  # alone: in a batch its last bits would depend on the others


class Encoder:
    """Texts to vectors of length 1. InputError where a package or a file is missing or the model is another kind."""

    def __init__(self, folder: Path):
        def refuse(what: str):
            raise InputError(f"--retriever dense:{folder}: {' '.join(what.split())[:200]}; give the folder of a "
                             f"sentence-transformers model, like all-MiniLM-L6-v2, or use bm25") from None

        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as e:
            raise InputError(f"--retriever dense:{folder}: {e}; pip install transformers, or use bm25") from None

        def said(name: str) -> dict:
            path = folder / name
            return read_json(path, "download the model again") if path.exists() else {}

        if not (folder / "config.json").is_file():
            refuse("no config.json there")
        if (path := folder / "modules.json").exists():
            kinds = {m["type"].rpartition(".")[2] for m in json.loads(path.read_text(encoding="utf-8"))}
            if odd := kinds - KNOWN:
                refuse(f"its module {min(odd)} is not supported, only {', '.join(sorted(KNOWN))}")
        pooling = said("1_Pooling/config.json")
        modes = [pooling["pooling_mode"]] if "pooling_mode" in pooling else [
            POOLINGS.get(n, n) for n, on in pooling.items() if n.startswith("pooling_mode_") and on is True] or ["mean"]
        if len(modes) != 1 or modes[0] not in POOLINGS.values():
            refuse(f"pooling by {', '.join(modes)} is not supported, only mean or cls")
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        except Exception as e:  # a folder can be wrong in many ways
            refuse(f"can't be loaded ({type(e).__name__}: {e})")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.mean = modes == ["mean"]
        self.limit = said("sentence_bert_config.json").get("max_seq_length") or min(
            512, self.tokenizer.model_max_length)
        digest = hashlib.sha256(f"{modes} {self.limit}".encode())
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode() + weight.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:12]

    def __call__(self, texts: Sequence[str]) -> Any:
        """float32 array (texts, D)."""
        import numpy as np
        import torch

        found: Any = None
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length need no padding
        with torch.inference_mode():
            for start in tqdm(range(0, len(order), BATCH), "vectors", unit="batch", leave=False,
                              disable=len(order) <= BATCH):
                some = order[start:start + BATCH]
                batch = self.tokenizer([texts[i][:LONGEST_QUERY] for i in some], padding=True, truncation=True,
                                       max_length=self.limit, return_tensors="pt").to(self.model.device)
                hidden = self.model(**batch).last_hidden_state  # (B,T,D)
                mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
                vectors = (hidden * mask).sum(1) / mask.sum(1) if self.mean else hidden[:, 0]
                vectors = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
                found = np.empty((len(texts), vectors.shape[1]), np.float32) if found is None else found
                found[some] = vectors
        return found


@lru_cache(maxsize=1)
def encoder(folder: Path) -> Encoder:
    """The model in a folder, loaded once for all that is searched with it."""
    return Encoder(folder)


def retriever_of(spec: str, corpus) -> Retriever | Dense:
    """--retriever: bm25, or dense:FOLDER. InputError for anything else."""
    kind, _, model = spec.partition(":")
    if spec != "bm25" and (kind != "dense" or not model):
        raise InputError(f"--retriever {spec}: choose bm25 or dense:FOLDER")
    return Dense(corpus, Path(model)) if model else Retriever(corpus)
