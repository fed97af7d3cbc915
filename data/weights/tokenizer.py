"""ids <-> text: the mini-world's own ranks or a `.tiktoken` file through tiktoken, or a published checkpoint.

Text can never become a special token: documents, questions and memories pass through `encode`, which knows
ordinary ranks only; the ids of `user`, `assistant` and `end` are placed by the prompt code alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from data import InputError

SPECIALS = ("<|user|>", "<|assistant|>", "<|end|>")
NANO_RANKS = Path(__file__).parents[1] / "nano" / "miniworld.tiktoken"

# Words carry their leading space, digits go in pairs (a year is two tokens, a count at most three), and the two
# placeholders and the answer box stay whole, so that each can become one rank.
PATTERN = (r" ?\[(?:MASK|TARGET)\]|\\boxed\{| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# tiktoken's regex engine keeps a place to come back to for every character of a `\s+` before a lookahead, and panics
# at the millionth. In strides of 256, while more than that is left, the same is matched.
SPACES, STRIDES = r"\s+(?!", r"(?:\s{256}(?=\s{257}))*\s+(?!"
SURROGATES = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """ids <-> text; of a published checkpoint: data.weights.published.Published, with the same names.

    size: the highest id + 1, specials included; needed: of those that text and prompts can give. user, assistant: the
    ids before the user's text and those between it and the response. stops: the ids that end a response; end, the first
    of them, is the one that is trained.
    fingerprint: 12 hex digits over all that decides about ids; checkpoints carry it.
    """

    def __init__(self, ranks: dict[bytes, int], name: str):
        self.name, self.size = name, len(ranks) + len(SPECIALS)
        self.needed = self.size
        self.user, self.assistant, self.stops = [len(ranks)], [len(ranks) + 1], (len(ranks) + 2,)
        self._encoding = tiktoken.Encoding(name, pat_str=PATTERN.replace(SPACES, STRIDES), mergeable_ranks=ranks,
                                           special_tokens={})
        self._tokens = {i: t for t, i in ranks.items()} | {len(ranks) + i: s.encode() for i, s in enumerate(SPECIALS)}
        digest = hashlib.sha256(PATTERN.encode())
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            digest.update(token + rank.to_bytes(4, "little"))
        self.fingerprint = digest.hexdigest()[:12]

    @property
    def end(self) -> int:
        return self.stops[0]

    def ordinary(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that a text can give: control tokens, and ids without a token, are left out."""
        return [i for i in ids if i < self.user[0]]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text: "<|end|>" in a document gives its characters, never the stop id.

        A lone surrogate counts as U+FFFD, as in data.text.corpus."""
        return self._encoding.encode_ordinary(SURROGATES.sub("\ufffd", text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 give U+FFFD, ids without a token nothing."""
        return b"".join([self._tokens.get(i, b"") for i in ids]).decode("utf-8", "replace")


def read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise InputError(f"tokenizer {path}: {e.strerror}; give an existing .tiktoken file or a checkpoint's "
                         f"folder") from None
    for k, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(f"tokenizer {path}, line {k}: expected 'base64 rank', as tiktoken writes it") from None
    if sorted(ranks.values()) != list(range(len(lines))) or any(bytes([b]) not in ranks for b in range(256)):
        raise InputError(f"tokenizer {path}: ranks must be 0..n-1 and include all 256 bytes; rebuild or replace it")
    return ranks
