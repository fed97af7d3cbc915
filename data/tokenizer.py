"""Byte-level BPE through tiktoken: the mini-world's own ranks, or any `.tiktoken` file.

    python -m data.tokenizer            # rebuild data/nano/miniworld.tiktoken (about two minutes)

The shipped ranks are older than the last changes to the mini-world's pages: a rebuild gives others (names and
phrasings are the same, their order is not), and then needs a base trained anew (`--stages base`).

Text can never become a special token: documents, questions and memories pass through `encode`, which knows
ordinary ranks only; the three special ids are placed by the prompt code alone.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cached_property
from pathlib import Path

import tiktoken

from data import InputError

SPECIALS = ("<|user|>", "<|assistant|>", "<|end|>")
NANO_RANKS = Path(__file__).parent / "nano" / "miniworld.tiktoken"

# Words carry their leading space, digits go in pairs (a year is two tokens, a count at most three), and the two
# placeholders and the answer box stay whole, so that each can become one rank.
PATTERN = (r" ?\[(?:MASK|TARGET)\]|\\boxed\{| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class Tokenizer:
    """ids <-> text. size: number of ids, specials included. user, assistant, end: the special ids."""

    def __init__(self, ranks: dict[bytes, int], name: str, pattern: str = PATTERN):
        specials = {s: len(ranks) + i for i, s in enumerate(SPECIALS)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.user, self.assistant, self.end = specials.values()
        self.stops = (self.end,)
        self.size = len(ranks) + len(specials)
        self._ranks = ranks

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text: "<|end|>" in a document gives its characters, never the stop id."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        return self.encoding.decode(list(ids))

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over ranks and pattern; checkpoints carry it."""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in sorted(self._ranks.items(), key=lambda item: item[1]):
            digest.update(token + rank.to_bytes(4, "little"))
        return digest.hexdigest()[:12]


def load_tokenizer(path: str | Path = NANO_RANKS) -> Tokenizer:
    """Reads tiktoken's file form: a line a rank, base64 of the bytes, a space, the rank. InputError if it isn't."""
    path, ranks = Path(path), {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise InputError(f"tokenizer {path}: {e.strerror}; give an existing .tiktoken file") from None
    for k, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(f"tokenizer {path}, line {k}: expected 'base64 rank', as tiktoken writes it") from None
    if sorted(ranks.values()) != list(range(len(lines))) or any(bytes([b]) not in ranks for b in range(256)):
        raise InputError(f"tokenizer {path}: ranks must be 0..n-1 and include all 256 bytes; rebuild or replace it")
    return Tokenizer(ranks, path.stem)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """InputError where ids would go beyond an embedding of `rows` rows."""
    if tokenizer.size > rows:
        raise InputError(f"tokenizer {tokenizer.encoding.name}: {tokenizer.size} ids for an embedding of {rows} rows; "
                         f"give the tokenizer of this checkpoint")


def build(path: Path = NANO_RANKS, size: int = 1533) -> None:
    """Trains `size` ranks on mini-worlds of the training split and on the prompt templates."""
    from tiktoken._educational import bpe_train

    from data.demonstrations import tokenizer_text

    ranks = bpe_train(data=tokenizer_text(), vocab_size=size, pat_str=PATTERN, visualise=None)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=lambda i: i[1])))


if __name__ == "__main__":
    build()
    print(f"{NANO_RANKS}: {load_tokenizer().size} ids")
