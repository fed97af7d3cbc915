"""The tokenizer of a published checkpoint, from the files of its folder, read by the library that defines them.

    tokenizer.json                                   the form of `tokenizers`; preferred
    vocab.json + merges.txt                          Qwen2's older form
    tokenizer_config.json                            added tokens, eos_token, chat_template
    chat_template.jinja                              the template, where it is a file of its own
    generation_config.json, else config.json         eos_token_id, one or several

Two tokenizers are made of a file. `whole` is what it says: it reads the chat template's own text, and turns ids into
text. `plain` reads everything else. It has no added token, special or not ("<think>" isn't, and steers a model too),
neither as a word to look for nor in its vocabulary: no text can give the id of one. Otherwise its ids are those of
`tokenizers`: what the vocabulary can't spell (in SmolLM2 a few rare bytes) is dropped, and where a file puts a space
before a text (Llama 2), each part of a prompt that is encoded by itself gets one.
"""

from __future__ import annotations

import hashlib
import json
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
UNMARKED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
PROBE = "".join(map(chr, range(32, 127))) + "\n\té日本語Ж🙂"


class Published(Tokenizer):
    """A checkpoint's tokenizer. stated: what tokenizer.json says, with every added token; where: begins an error."""

    def __init__(self, folder: Path, config: dict, where: str, stated: dict):
        self.name, self.added = folder.resolve().name, {t["content"]: t["id"] for t in stated["added_tokens"]}
        # A text's ids are the same every time, and of the whole of it; nothing is put around it.
        model = stated["model"] | {"dropout": None}
        bare = stated | {"model": model, "post_processor": None, "truncation": None, "padding": None}
        self._whole = _made(where, bare)
        vocab = {token: i for token, i in model["vocab"].items() if token not in self.added}
        self._plain = _made(where, bare | {"added_tokens": [], "model": model | {"vocab": vocab, "unk_token": None}})
        self._ordinary = frozenset(vocab.values())
        for content, i in self.added.items():
            if i != self._whole.token_to_id(content) or i in self._ordinary:
                raise InputError(f"{where}: the vocabulary and the added token {content!r} disagree about the id {i}; "
                                 f"give every token an id of its own")
        if self.decode(self.encode(PROBE)) != PROBE:
            raise InputError(f"{where}: text doesn't come back from its ids as it was; only BPE that keeps every "
                             f"character is supported (Qwen, Llama 3, SmolLM2)")
        self.size = 1 + max(self._whole.get_vocab().values())
        self._converse(folder, config)
        said = json.dumps([stated, self.user, self.assistant, self.stops], sort_keys=True)
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        return _ids(self._plain, text)

    def ordinary(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if i in self._ordinary]

    def decode(self, ids: Iterable[int]) -> str:
        return self._whole.decode(list(ids), skip_special_tokens=False)

    def _converse(self, folder: Path, config: dict) -> None:
        """Sets user, assistant and stops."""
        where = f"tokenizer {folder}"
        words = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token")}
        words = {k: v for k, v in words.items() if isinstance(v, str)}
        stops, controls = [], list(self.added.values())
        if eos := words.get("eos_token"):
            if eos not in self.added:
                raise InputError(f"{where}: the eos_token {eos!r} is not among the added tokens; "
                                 f"give a complete tokenizer_config.json")
            stops.append(self.added[eos])
        for path in (folder / "generation_config.json", folder / "config.json"):
            given = read_json(path, AGAIN).get("eos_token_id") if path.exists() else None
            if given is not None:
                given = given if isinstance(given, list) else [given]
                if bad := [i for i in given if i not in controls]:
                    raise InputError(f"{path}: eos_token_id {bad[0]!r} is no added token's id: text could give it; "
                                     f"give the files of one checkpoint")
                stops += given
                break
        if not stops:
            raise InputError(f"{where}: no eos_token in tokenizer_config.json, no eos_token_id in "
                             f"generation_config.json or config.json: nothing would end a response; give a complete "
                             f"checkpoint")
        before, after, closing = around_user(_template(folder, config), words, where)
        self.user, self.assistant = _ids(self._whole, before), _ids(self._whole, after)
        if not self.user or not self.assistant:
            raise InputError(f"{where}: the chat template puts nothing {'after' if self.user else 'before'} the "
                             f"user's text; give a checkpoint that was trained to converse")
        # What the template writes behind a response ends it; a base model's eos may be another.
        closing = [i for i in _ids(self._whole, closing)[:1] if i in controls]
        self.stops = tuple(dict.fromkeys(closing + stops))


def load_published(folder: Path) -> Published:
    """The tokenizer of a checkpoint's folder, its prompts and stops included. InputError, one line, otherwise."""
    config = folder / "tokenizer_config.json"
    config = read_json(config, AGAIN) if config.exists() else {}
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


def _added(where: str, stated: dict, config: dict) -> list[dict]:
    """The added tokens of tokenizer.json and of tokenizer_config.json, by id."""
    try:
        every = [*(stated.get("added_tokens") or []),
                 *({**t, "id": int(i)} for i, t in (config.get("added_tokens_decoder") or {}).items())]
        found = {t["content"]: UNMARKED | t for t in reversed(every)}
        two = next((t for t in every if t["id"] != found[t["content"]]["id"]), None)
        tokens = sorted(found.values(), key=lambda t: t["id"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{where}: an added token without content and id; {AGAIN}") from None
    if two:
        raise InputError(f"{where}: the added token {two['content']!r} has the ids {found[two['content']]['id']} and "
                         f"{two['id']}; give it one in tokenizer.json and tokenizer_config.json")
    return tokens


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
