"""The tokenizer of a published checkpoint, from the files of its folder, as a `tiktoken.Encoding`.

    tokenizer.json                                   the `tokenizers` library's form; preferred
    vocab.json + merges.txt, or one *.tiktoken       older forms; the way to cut text follows from tokenizer_class
    tokenizer_config.json                            added tokens, eos_token, chat_template
    chat_template.jinja                              the template, where it is a file of its own
    generation_config.json, else config.json         eos_token_id, one or several

Byte-level BPE only, and the ids are those of `tokenizers`, exactly (data.bpe); what can't be had exactly is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from data import InputError
from data.bpe import GPT2, QWEN2, cutting, in_ranks, spelled_bytes, to_nfc, vocabulary
from data.chat import around_user
from data.files import read_json
from data.tokenizer import Tokenizer, read_ranks

AGAIN = "download the checkpoint's folder again"
# How the classes cut that have no tokenizer.json: (pattern, NFC)
CLASSES = {"GPT2Tokenizer": (GPT2, False), "Qwen2Tokenizer": (QWEN2, True), "QWenTokenizer": (QWEN2, True)}


def load_published(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, its prompts and stops included. InputError, one line, otherwise."""
    config = read_json(folder / "tokenizer_config.json", AGAIN) if (folder / "tokenizer_config.json").exists() else None
    stored = sorted(folder.glob("*.tiktoken"))
    if (folder / "tokenizer.json").exists():
        where = f"tokenizer {folder / 'tokenizer.json'}"
        whole = read_json(folder / "tokenizer.json", AGAIN)
        pattern, normalized = cutting(where, whole.get("pre_tokenizer")), to_nfc(where, whole.get("normalizer"))
        model = whole.get("model") or {}
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        where, whole = f"tokenizer {folder / 'vocab.json'}", {}
        pattern, normalized = _of_class(folder, config)
        model = {"type": "BPE", "vocab": read_json(folder / "vocab.json", AGAIN),
                 "merges": _merges(folder / "merges.txt")}
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
    added = _added(where, whole.get("added_tokens") or [], config)
    if model is not None:
        vocab = vocabulary(where, model)
        tokens = {i: spelled_bytes(t) for t, i in vocab.items()}
        ranks, ids, lacking = in_ranks(where, model, vocab, {a["id"] for a in added.values()})
    ordinary = {ids[r] if ids else r for r in ranks.values()}
    for content, token in added.items():
        if token["special"] and token["id"] in ordinary:
            raise InputError(f"{where}: the special token {content!r} is one that ordinary text gives; "
                             f"give a tokenizer that keeps them apart")
        if vocab.get(content, token["id"]) != token["id"] or (content not in vocab and token["id"] in tokens):
            raise InputError(f"{where}: the vocabulary and the added token {content!r} disagree about the id "
                             f"{token['id']}; give every token an id of its own")
        tokens[token["id"]] = content.encode("utf-8", "replace")
    tokenizer = Tokenizer(ranks, folder.resolve().name, pattern, ids=ids, tokens=tokens,
                          added={c: a["id"] for c, a in added.items()}, normalized=normalized, lacking=lacking)
    _converse(tokenizer, folder, config, added)
    return tokenizer


# ---- The files ---------------------------------------------------------------------------------------------------


def _merges(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a token may hold other separators
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: can't be read ({getattr(e, 'strerror', None) or 'not UTF-8'}); "
                         f"download it again") from None
    return [line.rstrip("\r") for line in lines if line.rstrip("\r") and not line.startswith("#version")]


def _of_class(folder: Path, config: dict | None) -> tuple[str, bool]:
    name = str((config or {}).get("tokenizer_class"))
    if name.removesuffix("Fast") not in CLASSES:
        raise InputError(f"tokenizer {folder}: tokenizer_class {name} in tokenizer_config.json doesn't say how to cut "
                         f"text ({', '.join(CLASSES)} would); give a folder with tokenizer.json")
    return CLASSES[name.removesuffix("Fast")]


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
        given = read_json(path, AGAIN).get("eos_token_id") if path.exists() else None
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
