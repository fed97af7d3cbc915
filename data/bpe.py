"""Byte-level BPE as the `tokenizers` library defines it (tokenizer.json), in tiktoken's terms: ranks and one pattern.

Byte-level BPE only, and the ids are those of `tokenizers`, exactly: what can't be had exactly is refused. There are
two differences to bridge. `tokenizers` merges the pairs that are listed, tiktoken any pair whose bytes together are
a rank. And `tokenizers` cuts text in several steps, tiktoken with one pattern.

Why the pairs come out alike. The merges inside a stretch of bytes that ends up as one token are the merges of that
stretch alone: a merge across its border would have ended it. So a token arises always in the same way, from the
pair that comes last when its own bytes are merged (`_merged`), or never. Tokens that never arise are kept out of
tiktoken's ranks, the others are ranked by that last pair; then the pairs that tiktoken sees in a text are the pairs
that `tokenizers` sees, in the same order. tiktoken also looks a whole piece up at once: for tokens that arise it
changes nothing, and with `ignore_merges` (Llama 3) it is what `tokenizers` does too. There tokens that never arise
come last in the ranks, which is right unless a single merge of leftovers would make one: that is refused.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any

import tiktoken

from data import InputError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
# GPT-2's regex on what is left when Digits has cut out the numbers: to it, a number is the end of the text. `NEW` are
# numbers to Digits (Rust's own Unicode tables), symbols to the regex engines.
NEW = "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
NEVER = 1 << 60
# Bytes that no text has, control characters, and the first bytes of planes without letters: a vocabulary that was
# trained without a full alphabet (SmolLM2) may lack these.
DISPENSABLE = {*range(9), 11, 12, *range(14, 32), 127, 0xC0, 0xC1, *range(0xF1, 0x100)}
# Parts of a pattern that mean the same to Oniguruma (in `tokenizers`) and to tiktoken's engine. Words (\w, \b), dots,
# anchors and lookarounds don't; ignoring case is different for letters that fold to several ("ss").
PARTS = re.compile(r"""(?: \\[pP]\{\w+\} | \\[sSdrnt] | \\[^\w\s] | \(\?: | \((?!\?) | [)|?*+] | \{\d+(?:,\d*)?\}(?!\+)
                       | \[\^?(?: \\[pP]\{\w+\} | \\[sSdrnt] | \\[^\w\s] | (?!&&|--|~~)[^\\\[\]] )+\]
                       | \(\?i:(?: 's\|'t\|'re\|'ve\|'m\|'ll\|'d | \[sdmt\]\|ll\|ve\|re )\)
                       | [^\\\[\](){}^$.|?*+] )*""", re.VERBOSE)


# ---- The vocabulary ----------------------------------------------------------------------------------------------


@cache
def alphabet() -> dict[str, int]:
    """The character that GPT-2's byte-level form writes for each byte: itself if it can be seen, else the next of
    those from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + i): b for i, b in enumerate(unseen)}


def spelled_bytes(token: str) -> bytes:
    """A token outside the byte-level alphabet (a special one) stands for its own characters."""
    letters = alphabet()
    try:
        return bytes([letters[c] for c in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def vocabulary(where: str, model: Any) -> dict[str, int]:
    """token -> id of a BPE model that is one of bytes."""
    kind = model.get("type") or ("BPE" if "merges" in model else None) if isinstance(model, dict) else type(model)
    if kind != "BPE":
        raise InputError(f"{where}: the type of the model is {kind}; only byte-level BPE is supported "
                         f"(Qwen, Llama 3, SmolLM2, GPT-2)")
    for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(f"{where}: {option}={model[option]!r} is not supported; only byte-level BPE is "
                             f"(Qwen, Llama 3, SmolLM2, GPT-2)")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < 1 << 31 for i in vocab.values()):
        raise InputError(f"{where}: the vocabulary doesn't map tokens to ids; download it again")
    if len(set(vocab.values())) < len(vocab):
        seen: dict[int, str] = {}
        token, other = next((t, seen[i]) for t, i in vocab.items() if seen.setdefault(i, t) != t)
        raise InputError(f"{where}: {other!r} and {token!r} share the id {vocab[token]}; give every token its own")
    return vocab


def _merged(token: str, order: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """What the listed merges make of a token's own bytes: the parts left, and the rank of the last merge."""
    parts, last, get = list(token), NEVER, order.get
    ranks = [get(pair, NEVER) for pair in pairwise(parts)]
    while ranks and (rank := min(ranks)) < NEVER:
        i, last = ranks.index(rank), rank
        parts[i] += parts.pop(i + 1)
        del ranks[i]
        if i:
            ranks[i - 1] = get((parts[i - 1], parts[i]), NEVER)
        if i < len(ranks):
            ranks[i] = get((parts[i], parts[i + 1]), NEVER)
    return parts, last


def in_ranks(where: str, model: dict, vocab: dict[str, int], added: set[int]) -> \
        tuple[dict[bytes, int], list[int] | None, bytes]:
    """tiktoken's ranks, the id of each rank (None where they are the same), and the bytes that the vocabulary lacks."""
    letters = alphabet()
    lacking = bytes(sorted(b for c, b in letters.items() if c not in vocab))
    if bad := sorted(set(lacking) - DISPENSABLE) or (lacking if model.get("unk_token") else []):
        raise InputError(f"{where}: the vocabulary lacks {len(bad)} of the 256 bytes (0x{bad[0]:02X}, ...); "
                         f"only byte-level BPE that covers text is supported")
    if not isinstance(model.get("merges"), list):
        raise InputError(f"{where}: it has no list of merges; download it again")
    order: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(model["merges"]):
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if not vocab.keys() >= {left, right, left + right}:
                raise ValueError
        except (ValueError, TypeError):
            raise InputError(f"{where}: merge {rank + 1} ({str(merge)[:60]!r}) is not a pair of tokens that gives a "
                             f"token; download it again") from None
        order[left, right] = rank
    base, arising, rest = {c for c in letters if c in vocab}, {}, []
    for token in vocab:
        if len(token) > 1 and base.issuperset(token):
            parts, last = _merged(token, order)
            if len(parts) == 1:
                arising[token] = last
            elif model.get("ignore_merges") and vocab[token] not in added:
                if len(parts) == 2:
                    raise InputError(f"{where}: with ignore_merges, {token!r} is a token as a whole piece only, which "
                                     f"tiktoken can't express; give a tokenizer that lists a merge for it")
                rest.append(token)
    ordered = [*sorted(base, key=vocab.get), *sorted(arising, key=arising.get), *sorted(rest, key=vocab.get)]
    ids = [vocab[t] for t in ordered]
    ranks = {spelled_bytes(t): r for r, t in enumerate(ordered)}
    return ranks, None if ids == list(range(len(ids))) else ids, lacking


# ---- How text is cut ---------------------------------------------------------------------------------------------


def to_nfc(where: str, normalizer: Any) -> bool:
    """Whether text is brought to NFC first. InputError for any other normalizer."""
    kind = normalizer and (normalizer.get("type") if isinstance(normalizer, dict) else str(normalizer))
    if kind == "Sequence":
        return sum(to_nfc(where, n) for n in normalizer.get("normalizers") or []) > 0  # all are looked at
    if kind not in (None, "NFC"):
        raise InputError(f"{where}: the normalizer {kind} is not supported; only NFC or none is")
    return kind == "NFC"


def cutting(where: str, pre: Any) -> str:
    """The one pattern that cuts as the pre-tokenizer does."""
    steps, names = [], []
    todo = [pre]
    while todo:
        step = todo.pop(0)
        if not isinstance(step, dict):
            raise InputError(f"{where}: the pre-tokenizer {step!r} is not supported; byte-level BPE has ByteLevel")
        if step.get("type") == "Sequence":
            todo[:0] = step.get("pretokenizers") or []
        else:
            steps.append(step)
            names.append(str(step.get("type")))
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and last.get("add_prefix_space", True):
        raise InputError(f"{where}: ByteLevel with add_prefix_space is not supported: sections of a text would each "
                         f"get a space; give a tokenizer without it")
    cuts = last.get("use_regex", True)
    if names == ["ByteLevel"] and cuts:
        return GPT2
    if names == ["Digits", "ByteLevel"] and cuts:
        return _digits(steps[0].get("individual_digits", False))
    if names == ["Split", "ByteLevel"] and not cuts:
        split, form = steps[0], (steps[0].get("behavior"), bool(steps[0].get("invert")))
        pattern = split["pattern"].get("Regex") if isinstance(split.get("pattern"), dict) else None
        if isinstance(pattern, str) and (form[0] == "Isolated" or form == ("Removed", True)):
            _check_pattern(where, pattern)
            return pattern
        raise InputError(f"{where}: Split with pattern {str(split.get('pattern'))[:60]}, behavior={form[0]} and "
                         f"invert={form[1]} is not supported; only a Regex whose matches are kept apart is")
    raise InputError(f"{where}: the pre-tokenizer {' + '.join(names) or 'Sequence of nothing'} with use_regex={cuts} "
                     f"is not supported; only ByteLevel, Digits + ByteLevel, and Split + ByteLevel without regex are")


def _digits(individual: bool) -> str:
    numbers = rf"\p{{N}}|[{NEW}]" if individual else rf"\p{{N}}+|[{NEW}]+"
    return (rf"{numbers}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}{NEW}]+"
            rf"|\s+(?![^\s\p{{N}}{NEW}])|\s+")


@cache
def _fault(pattern: str) -> str:
    """Why tiktoken might cut otherwise with a pattern than `tokenizers`, or ""."""
    simple = re.sub(r"(^|\|)" + re.escape(r"\s+(?!\S)") + r"(?=\||$)", "", pattern)
    if not PARTS.fullmatch(simple):
        return "has parts that two regex engines may read differently"
    # What a pattern leaves out is a piece of its own to `tokenizers` and lost to tiktoken.
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    try:
        every = tiktoken.Encoding("bytes", pat_str=simple, mergeable_ranks={bytes([b]): b for b in range(256)},
                                  special_tokens={})
        if all(every.encode_ordinary(c) for c in text[:256]) and len(every.encode_ordinary(text)) == len(text.encode()):
            return ""
    except (ValueError, OverflowError):
        return "is not valid"
    return "doesn't match every character"


def _check_pattern(where: str, pattern: str) -> None:
    if fault := _fault(pattern):
        raise InputError(f"{where}: the pattern {pattern[:80]!r} of Split {fault}; give a tokenizer that cuts "
                         f"text as Qwen, Llama 3 or GPT-2 do")
