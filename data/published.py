"""The tokenizer of a published checkpoint, from the files of its folder, as a `tiktoken.Encoding`.

    tokenizer.json                                   the `tokenizers` library's form; preferred
    vocab.json + merges.txt, or one *.tiktoken       older forms; the way to cut text follows from tokenizer_class
    tokenizer_config.json                            added tokens, eos_token, chat_template
    chat_template.jinja                              the template, where it is a file of its own
    generation_config.json, else config.json         eos_token_id, one or several

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

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from data import InputError
from data.chat import around_user
from data.tokenizer import Tokenizer, read_ranks

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
# How the classes cut that have no tokenizer.json: (pattern, NFC)
CLASSES = {"GPT2Tokenizer": (GPT2, False), "Qwen2Tokenizer": (QWEN2, True), "QWenTokenizer": (QWEN2, True)}
# GPT-2's regex on what is left when Digits has cut out the numbers: to it, a number is the end of the text. `NEW` are
# numbers to Digits (Rust's own Unicode tables), symbols to the regex engines.
NEW = "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
NEVER = 1 << 60
# Bytes that no text has, control characters, and the first bytes of planes without letters: a vocabulary that was
# trained without a full alphabet (SmolLM2) may lack these.
DISPENSABLE = {*range(9), 11, 12, *range(14, 32), 127, 0xC0, 0xC1, *range(0xF1, 0x100)}
# Parts of a pattern that mean the same to Oniguruma (in `tokenizers`) and to tiktoken's engine. Words (\w, \b), dots,
# anchors and lookarounds don't; ignoring case is different for letters that fold to several ("ss").
PARTS = re.compile(r"""(?: \\[pP]\{\w+\} | \\[sSdrnt] | \\[^\w\s] | \(\?: | [()|?*+] | \{\d+(?:,\d*)?\}(?!\+)
                       | \[\^?(?: \\[pP]\{\w+\} | \\[sSdrnt] | \\[^\w\s] | (?!&&|--|~~)[^\\\[\]] )+\]
                       | \(\?i:(?: 's\|'t\|'re\|'ve\|'m\|'ll\|'d | \[sdmt\]\|ll\|ve\|re )\)
                       | [^\\\[\](){}^$.|?*+] )*""", re.VERBOSE)


def load_published(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, its prompts and stops included. InputError, one line, otherwise."""
    config = _read(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else None
    stored = sorted(folder.glob("*.tiktoken"))
    if (folder / "tokenizer.json").exists():
        where = f"tokenizer {folder / 'tokenizer.json'}"
        whole = _read(folder / "tokenizer.json")
        pattern, normalized = _pattern(where, whole.get("pre_tokenizer")), _normalized(where, whole.get("normalizer"))
        model = whole.get("model")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        where, whole = f"tokenizer {folder / 'vocab.json'}", {}
        pattern, normalized = _of_class(folder, config)
        model = {"type": "BPE", "vocab": _read(folder / "vocab.json"), "merges": _merges(folder / "merges.txt")}
    elif len(stored) == 1:
        where, whole, model = f"tokenizer {stored[0]}", {}, None
        if config is None:  # no checkpoint's: a folder around such a file as this project writes
            return Tokenizer(read_ranks(stored[0]), stored[0].stem)
        pattern, normalized = _of_class(folder, config)
    else:
        raise InputError(f"tokenizer {folder}: {len(stored)} files *.tiktoken, no tokenizer.json, no vocab.json with "
                         f"merges.txt; give the folder of a checkpoint with one of these")
    config = config or {}
    if model is None:
        vocab = ranks = read_ranks(stored[0])
        tokens, ids, lacking = {i: t for t, i in ranks.items()}, None, b""
    added = _added(where, whole.get("added_tokens", []), config)
    if model is not None:
        vocab = _vocabulary(where, model)
        tokens = {i: _bytes(t) for t, i in vocab.items()}
        ranks, ids, lacking = _ranks(where, model, vocab, {a["id"] for a in added.values()})
    ordinary = {ids[r] if ids else r for r in ranks.values()}
    for content, token in added.items():
        if token["special"] and token["id"] in ordinary:
            raise InputError(f"{where}: the special token {content!r} is one that ordinary text gives; "
                             f"give a tokenizer that keeps them apart")
        if vocab.get(content, token["id"]) != token["id"] or (content not in vocab and token["id"] in tokens):
            raise InputError(f"{where}: the vocabulary and the added token {content!r} disagree about the id "
                             f"{token['id']}; give every token an id of its own")
        tokens[token["id"]] = content.encode()
    tokenizer = Tokenizer(ranks, folder.resolve().name, pattern, ids=ids, tokens=tokens,
                          added={c: a["id"] for c, a in added.items()}, normalized=normalized, lacking=lacking)
    _converse(tokenizer, folder, config, added)
    return tokenizer


def _read(path: Path) -> Any:
    """A JSON object. InputError if it can't be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror}); give a complete checkpoint folder") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({' '.join(str(e).split())[:100]}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a {type(value).__name__} instead of a JSON object; download it again")
    return value


# ---- The vocabulary ----------------------------------------------------------------------------------------------


@cache
def _alphabet() -> dict[str, int]:
    """The character that GPT-2's byte-level form writes for each byte: itself if it can be seen, else the next of
    those from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + i): b for i, b in enumerate(unseen)}


def _bytes(token: str) -> bytes:
    """A token outside the byte-level alphabet (a special one) stands for its own characters."""
    letters = _alphabet()
    return bytes(map(letters.__getitem__, token)) if letters.keys() >= set(token) else token.encode("utf-8", "replace")


def _vocabulary(where: str, model: Any) -> dict[str, int]:
    """token -> id of a BPE model that is one of bytes."""
    if not isinstance(model, dict):
        raise InputError(f"{where}: it has no model; download it again")
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise InputError(f"{where}: a {kind} model; only byte-level BPE is supported (Qwen, Llama 3, SmolLM2, GPT-2)")
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


def _merges(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a token may hold other separators
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: can't be read ({getattr(e, 'strerror', None) or 'not UTF-8'}); "
                         f"download it again") from None
    return [line.rstrip("\r") for line in lines if line.rstrip("\r") and not line.startswith("#version")]


def _merged(token: str, order: dict[tuple[str, str], int]) -> tuple[list[str], int]:
    """What the listed merges make of a token's own bytes: the parts left, and the rank of the last merge."""
    parts, last = list(token), NEVER
    ranks = [order.get(pair, NEVER) for pair in pairwise(parts)]
    while ranks and (rank := min(ranks)) < NEVER:
        i, last = ranks.index(rank), rank
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        if i:
            ranks[i - 1] = order.get((parts[i - 1], parts[i]), NEVER)
        if i < len(ranks):
            ranks[i] = order.get((parts[i], parts[i + 1]), NEVER)
    return parts, last


def _ranks(where: str, model: dict, vocab: dict[str, int], added: set[int]) -> \
        tuple[dict[bytes, int], list[int] | None, bytes]:
    """tiktoken's ranks, the id of each rank (None where they are the same), and the bytes that the vocabulary lacks."""
    letters = _alphabet()
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
    ranks = {_bytes(t): r for r, t in enumerate(ordered)}
    return ranks, None if ids == list(range(len(ids))) else ids, lacking


def _added(where: str, listed: Any, config: dict) -> dict[str, dict]:
    """content -> {id, special, lstrip, rstrip, ...} of tokenizer.json and of tokenizer_config.json."""
    found: dict[str, dict] = {}
    try:
        more = [{**t, "id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items()]
        for token in [*listed, *more]:
            content, own = token["content"], token["id"]
            if not isinstance(content, str) or not content or type(own) is not int or not 0 <= own < 1 << 31:
                raise TypeError
            same = found.setdefault(content, {"special": False} | token)
            if same["id"] != own:
                raise InputError(f"{where}: the added token {content!r} has the ids {same['id']} and {own}; "
                                 f"give it one in tokenizer.json and tokenizer_config.json")
            same["special"] |= bool(token.get("special"))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{where}: an added token without content and id; download it again") from None
    ids = [t["id"] for t in found.values()]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise InputError(f"{where}: two added tokens share the id {twice}; give every token its own")
    return found


# ---- How text is cut ---------------------------------------------------------------------------------------------


def _of_class(folder: Path, config: dict | None) -> tuple[str, bool]:
    name = str((config or {}).get("tokenizer_class"))
    if name.removesuffix("Fast") not in CLASSES:
        raise InputError(f"tokenizer {folder}: tokenizer_class {name} in tokenizer_config.json doesn't say how to cut "
                         f"text ({', '.join(CLASSES)} would); give a folder with tokenizer.json")
    return CLASSES[name.removesuffix("Fast")]


def _normalized(where: str, normalizer: Any) -> bool:
    kind = normalizer and (normalizer.get("type") if isinstance(normalizer, dict) else str(normalizer))
    if kind == "Sequence":
        return "NFC" in [_normalized(where, n) and "NFC" for n in normalizer.get("normalizers") or []]
    if kind not in (None, "NFC"):
        raise InputError(f"{where}: the normalizer {kind} is not supported; only NFC or none is")
    return kind == "NFC"


def _pattern(where: str, pre: Any) -> str:
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


# ---- The conversation --------------------------------------------------------------------------------------------


def _converse(tokenizer: Tokenizer, folder: Path, config: dict, added: dict[str, dict]) -> None:
    """Sets user, assistant and stops."""
    where = f"tokenizer {folder}"
    words = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
    words = {k: v for k, v in words.items() if isinstance(v, str)}
    stops = []
    if eos := words.get("eos_token"):
        if eos not in added:
            raise InputError(f"{where}: the eos_token {eos!r} is not among the added tokens; "
                             f"give a complete tokenizer_config.json")
        stops.append(added[eos]["id"])
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        given = _read(path).get("eos_token_id") if path.exists() else None
        if given is not None:
            given = given if isinstance(given, list) else [given]
            if bad := [i for i in given if type(i) is not int or i not in tokenizer._tokens]:
                raise InputError(f"{path}: eos_token_id {bad[0]!r} is no id of the tokenizer; "
                                 f"give the files of one checkpoint")
            stops += given
            break
    if not stops:
        raise InputError(f"{where}: no eos_token in tokenizer_config.json, no eos_token_id in generation_config.json "
                         f"or config.json: nothing would end a response; give a complete checkpoint")
    before, after, closing = around_user(_template(folder, config), words, where)
    tokenizer.user, tokenizer.assistant = _marked(tokenizer, added, before), _marked(tokenizer, added, after)
    if not tokenizer.user or not tokenizer.assistant:
        raise InputError(f"{where}: the chat template puts nothing {'after' if tokenizer.user else 'before'} the "
                         f"user's text; give a checkpoint that was trained to converse")
    # What the template writes behind a response ends it; a base model's eos may be another.
    closing = _marked(tokenizer, added, closing)[:1]
    closing = [i for i in closing if i in tokenizer.added.values()]
    tokenizer.stops = tuple(dict.fromkeys(closing + stops))


def _template(folder: Path, config: dict) -> str:
    path, template = folder / "chat_template.jinja", config.get("chat_template")
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: can't be read ({getattr(e, 'strerror', None) or 'not UTF-8'}); "
                             f"download it again") from None
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InputError(f"tokenizer {folder}: no chat_template in tokenizer_config.json, no chat_template.jinja; "
                         f"give a checkpoint that was trained to converse (Instruct, Chat)")
    return template


def _marked(tokenizer: Tokenizer, added: dict[str, dict], text: str) -> list[int]:
    """Ids of a template's own text, the only one in which added tokens are recognised: the longest at each place."""
    ids: list[int] = []
    spaces = {False: "", True: r"\s*"}
    forms = [f"{spaces[bool(a.get('lstrip'))]}({re.escape(c)}){spaces[bool(a.get('rstrip'))]}"
             for c, a in sorted(added.items(), key=lambda item: -len(item[0]))]
    place = 0
    for match in re.finditer("|".join(forms) or "(?!)", text):
        ids += [*tokenizer.encode(text[place : match.start()]), added[match[match.lastindex]]["id"]]
        place = match.end()
    return ids + tokenizer.encode(text[place:])
