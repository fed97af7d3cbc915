"""The tokenizer of a published checkpoint, from the files of its folder, read by the library that defines them.

    tokenizer.json                                   the form of `tokenizers`; preferred
    vocab.json + merges.txt                          Qwen2's older form
    tokenizer_config.json                            added tokens, eos_token, chat_template
    special_tokens_map.json, added_tokens.json       the same in older folders: read where it lists no added tokens
    chat_template.jinja, additional_chat_templates/  the template, where it is a file of its own
    generation_config.json, else config.json         eos_token_id, one or several

Where two of them disagree, transformers' order counts. Two tokenizers are made of a file. `whole` is what it says: it
reads the chat template's own text, and turns ids into text. `plain` reads everything else. Of the added tokens it has
plain words alone. What is special or is written in signs ("<think>" isn't special, and steers a model too) is a control
token: `plain` has it neither as a word to look for nor in its vocabulary, so no text can give its id. Otherwise its ids
are those of `tokenizers`: what the vocabulary can't spell (in SmolLM2 a few rare bytes) is dropped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from data import InputError
from data.run.files import read_json
from data.weights.chat import around_user
from data.weights.tokenizer import SURROGATES, Tokenizer

AGAIN = "download the checkpoint's folder again"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
UNMARKED = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # in the order of new ids
WORD = re.compile(r"[\w\s'’.&+-]+")  # what an added token that is text, not control, may consist of
BORDERS = ("Who wrote it?", "two words", "a line\n")  # no text of ours begins with a space
PROBE = "".join(map(chr, range(32, 127))) + "\n\té日本語Ж🙂"


class Published(Tokenizer):
    """A checkpoint's tokenizer. stated: what tokenizer.json says, with every added token; config: with the older files;
    where: begins an error."""

    def __init__(self, folder: Path, config: dict, where: str, stated: dict):
        added = stated["added_tokens"]
        self.name, self.added = folder.resolve().name, {t["content"]: t["id"] for t in added}
        # A text's ids are the same every time, and of the whole of it; nothing is put around it.
        model = stated["model"] | {"dropout": None}
        bare = stated | {"model": model, "post_processor": None, "truncation": None, "padding": None}
        self._whole = _made(where, bare)
        words = {t["content"]: t["id"] for t in added if not t["special"] and WORD.fullmatch(t["content"])}
        self.controls = {i for content, i in self.added.items() if content not in words}
        vocab = {token: i for token, i in model["vocab"].items() if token in words or token not in self.added}
        # beside words the others have to stay, for the ids' sake: as special ones, which text is not searched for
        kept = [t | {"special": t["content"] not in words} for t in added] if words else []
        self._plain = _made(where, bare | {"added_tokens": kept, "model": model | {"vocab": vocab, "unk_token": None}})
        self._plain.encode_special_tokens = True
        ordinary = {i for token, i in vocab.items() if token not in words}
        for content, i in self.added.items():
            known = {t.token_to_id(content) for t in (self._whole, *[self._plain] * (content in words))}
            if known != {i} or i in ordinary:
                raise InputError(f"{where}: the vocabulary and the added token {content!r} disagree about the id {i}; "
                                 f"give every token an id of its own")
        self._ordinary = frozenset([*ordinary, *words.values()])
        if self.decode(self.encode(PROBE)) != PROBE:
            raise InputError(f"{where}: text doesn't come back from its ids as it was; only BPE that keeps every "
                             f"character is supported (Qwen, Llama 3, SmolLM2)")
        self.size = 1 + max(self._whole.get_vocab().values())
        self._converse(folder, config)
        self.needed = 1 + max(*ordinary, *words.values(), *self.user, *self.assistant, *self.stops)
        said = json.dumps([stated, self.user, self.assistant, self.stops, *words], sort_keys=True)
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        return _ids(self._plain, text)

    def ordinary(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in self._ordinary]

    def decode(self, ids: Iterable[int]) -> str:
        return self._whole.decode(list(ids), skip_special_tokens=False)

    def _converse(self, folder: Path, config: dict) -> None:
        """Sets user, assistant and stops."""
        where, named, stops = f"tokenizer {folder}", _named(config), []
        if eos := named.get("eos_token"):
            if eos not in self.added:
                raise InputError(f"{where}: the eos_token {eos!r} is not among the added tokens; "
                                 f"give a complete tokenizer_config.json")
            stops.append(self.added[eos])
        for path in (folder / "generation_config.json", folder / "config.json"):
            given = read_json(path, AGAIN).get("eos_token_id") if path.exists() else None
            if given is not None:
                given = given if isinstance(given, list) else [given]
                if bad := [i for i in given if i not in self.controls]:
                    raise InputError(f"{path}: eos_token_id {bad[0]!r} is no added token's id: text could give it; "
                                     f"give the files of one checkpoint")
                stops += given
                break
        if not stops:
            raise InputError(f"{where}: no eos_token in tokenizer_config.json, no eos_token_id in "
                             f"generation_config.json or config.json: nothing would end a response; give a complete "
                             f"checkpoint")
        before, after, closing = around_user(_template(folder, config), named, where)
        self.user, self.assistant = _ids(self._whole, before), _ids(self._whole, after)
        if not self.user or not self.assistant:
            raise InputError(f"{where}: the chat template puts nothing {'after' if self.user else 'before'} the "
                             f"user's text; give a checkpoint that was trained to converse")
        for text in BORDERS:
            if _ids(self._whole, before + text + after) != [*self.user, *self.encode(text), *self.assistant]:
                raise InputError(f"{where}: what the chat template puts around the user's text, {before[-20:]!r} and "
                                 f"{after[:20]!r}, grows into one token with it; give a checkpoint whose template has "
                                 f"control tokens or line breaks there")
        # What the template writes behind a response ends it; a base model's eos may be another.
        closing = [i for i in _ids(self._whole, closing)[:1] if i in self.controls]
        self.stops = tuple(dict.fromkeys(closing + stops))


def load_published(folder: Path) -> Published:
    """The tokenizer of a checkpoint's folder, its prompts and stops included. InputError, one line, otherwise."""
    config = _read(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read(folder / "special_tokens_map.json") | {"older": _read(folder / "added_tokens.json")}
    if (path := folder / "tokenizer.json").exists():
        stated = read_json(path, AGAIN)
    elif (path := folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        stated = _of_qwen2(folder, config)
    else:
        raise InputError(f"tokenizer {folder}: no tokenizer.json, no vocab.json with merges.txt, not one *.tiktoken "
                         f"alone; give the folder of a checkpoint with one of these")
    where, model = f"tokenizer {path}", stated.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{where}: the model is {kind or 'missing'}; only BPE with a vocabulary is supported "
                         f"(Qwen, Llama 3, SmolLM2)")
    return Published(folder, config, where, stated | {"added_tokens": _added(where, stated, config)})


def _read(path: Path) -> dict:
    """A JSON file that a folder may do without."""
    return read_json(path, AGAIN) if path.exists() else {}


def _made(where: str, stated: dict) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(stated))
    except Exception as e:  # the only class that `tokenizers` raises
        raise InputError(f"{where}: can't be loaded{'' if stated['added_tokens'] else ' without its added tokens'} "
                         f"({' '.join(str(e).split())[:200]}); {AGAIN}") from None


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(SURROGATES.sub("\ufffd", text), add_special_tokens=False).ids


def _of_qwen2(folder: Path, config: dict) -> dict:
    """tokenizer.json of vocab.json and merges.txt, which don't say how to cut text: the class does."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    name = str(config.get("tokenizer_class"))
    if name.removesuffix("Fast") != "Qwen2Tokenizer":
        raise InputError(f"tokenizer {folder}: tokenizer_class {name} in tokenizer_config.json doesn't say how to cut "
                         f"text (Qwen2Tokenizer would); give a folder with tokenizer.json")
    try:
        made = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as e:
        raise InputError(f"tokenizer {folder / 'vocab.json'}: can't be loaded with merges.txt "
                         f"({' '.join(str(e).split())[:200]}); {AGAIN}") from None
    made.normalizer, made.decoder = normalizers.NFC(), decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return json.loads(made.to_str())


def _named(config: dict) -> dict[str, str]:
    """The tokens that have a name, as templates call them: eos_token and the like -> text."""
    extra = config.get("extra_special_tokens")
    every = dict.fromkeys(NAMES) | {k: v for k, v in config.items() if k.endswith("_token")}
    every |= extra if isinstance(extra, dict) else {}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in every.items()}
    return {k: v for k, v in texts.items() if isinstance(v, str)}


def _added(where: str, stated: dict, config: dict) -> list[dict]:
    """The added tokens of all files, by id. Special is also what has a name; without an id it gets the next."""
    vocab, named = stated["model"]["vocab"], _named(config)
    try:
        lists = [config.get(k) or [] for k in ("extra_special_tokens", "additional_special_tokens")]
        listed = [t for tokens in lists if not isinstance(tokens, dict) for t in tokens]
        special = [*named.values(), *(t["content"] if isinstance(t, dict) else t for t in listed)]
        every = [*({"content": text, "id": i} for text, i in config.get("older", {}).items()),
                 *(stated.get("added_tokens") or []),
                 *({**t, "id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items())]
        found = {t["content"]: t for t in every}  # the last counts, but for the id
        two = next((t for t in every if t["id"] != found[t["content"]]["id"]), None)
        for text in special:
            if text in vocab or (text != named.get("eos_token") and text not in found):
                free = max([len(vocab), *(t["id"] + 1 for t in found.values())])
                found.setdefault(text, {"content": text, "id": vocab.get(text, free)})
        for text, t in found.items():
            control = bool(t.get("special")) or text in special
            found[text] = UNMARKED | {"normalized": not control} | t | {"special": control}
        tokens = sorted(found.values(), key=lambda t: t["id"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{where}: an added token without content and id; {AGAIN}") from None
    if two:
        ids = sorted([two["id"], found[two["content"]]["id"]])
        raise InputError(f"{where}: the added token {two['content']!r} has the ids {ids[0]} and {ids[1]}; give it one "
                         f"in tokenizer.json and tokenizer_config.json")
    return tokens


def _template(folder: Path, config: dict) -> str:
    """The template of a plain conversation. Files of templates count before the configuration's, all of them."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    named, files = config.get("chat_template"), {name: path for name, path in files.items() if path.exists()}
    if files:
        named = {name: _text(path) for name, path in files.items()}
    elif isinstance(named, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in named if isinstance(t, dict)}
    template = named.get("default") if isinstance(named, dict) else named
    if not isinstance(template, str):
        raise InputError(f"tokenizer {folder}: no chat_template in tokenizer_config.json, no chat_template.jinja; "
                         f"give a checkpoint that was trained to converse (Instruct, Chat)")
    return template


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: can't be read ({getattr(e, 'strerror', None) or 'not UTF-8'}); "
                         f"download it again") from None
