"""Find entities in a text, and hide one everywhere in it.

A finder has a `name`, for the run's header, and `find(text)`: entities in text order, without overlaps.
spaCy does it where it and an English model are installed, else rules for dates, numbers, names and titles.

`mask_entity` and `occurs` share one rule of what an occurrence is, so that after masking nothing occurs. It
ignores case, lets any whitespace stand for any other, and never matches inside a longer word or number:
neither "Rome" in "Romeo" nor "18" in "1843", "18.5" or "1,800"; but in "Rome's" and "Rome-based" it does.
Vowel signs belong to their word. Where a script has no spaces between words, an occurrence may stand anywhere; in
Korean anywhere at the beginning of a word, whose end is a particle. `shows` judges the finished text, more strictly.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

import regex

from data import InputError
from data.text.words import INVISIBLE, JOINED, UNSPACED

PLACEHOLDER = re.compile(r"\[(?:MASK|TARGET)\]")


@dataclass(frozen=True, slots=True)
class Entity:
    """A stretch of a text: text == source[start:end]."""

    text: str
    label: str  # rules: DATE, NUMBER, NAME, TITLE; spaCy: its own labels
    start: int
    end: int


class Finder(Protocol):
    name: str

    def find(self, text: str) -> list[Entity]: ...


def make_finder(choice: str = "auto") -> Finder:
    """The finder for "rules", "spacy" (its small English model), "spacy:<model>", or "auto": spaCy if it and that model
    are installed, else rules.

    Raises InputError for anything else, and where spaCy or its model is missing or does not load.
    """
    if choice == "rules":
        return RuleFinder()
    kind, _, model = choice.partition(":")
    if choice != "auto" and kind != "spacy":
        raise InputError(f"entity finder {choice!r} is unknown; use auto, rules, spacy or spacy:<model>")
    model = model or "en_core_web_sm"
    try:
        import spacy

        if spacy.util.is_package(model):  # NER needs none of these, and they would take most of the time
            return SpacyFinder(spacy.load(model, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer"]))
    except ModuleNotFoundError:
        pass
    except Exception as error:  # installed, but broken: "auto" must not quietly make other data of it
        raise InputError(f"entity finder {choice!r}: spaCy does not load ({type(error).__name__}); repair it or use "
                         f"rules") from error
    if choice == "auto":
        return RuleFinder()
    raise InputError(f"entity finder {choice!r}: no spaCy, or no model {model}; pip install spacy && python -m spacy "
                     f"download {model}, or use rules")


# ---- masking

HYPHEN, APOSTROPHE = "-‐‑–", "'’‘"
KATAKANA = r"[\p{Katakana}ー]"  # foreign names: a run of it is one word


@lru_cache(maxsize=1024)  # about 17 KB each
def _occurrence(entity: str) -> tuple[regex.Pattern, regex.Pattern, regex.Pattern]:
    """The one rule, as three patterns: an occurrence of `entity`; a run of what becomes one once the occurrence beside
    it is replaced ("5," in "5,5,", ",5" in ",5,5"); a part of such a run. Raises ValueError if `entity` is blank."""
    entity = entity.strip()
    if not entity:
        raise ValueError("a blank entity has no occurrences")
    body = []
    for part in re.split(rf"(\s+|[{HYPHEN}]\s*|[{APOSTROPHE}])", entity):
        if part.isspace():
            body.append(r"\s+")
        elif part and part[0] in HYPHEN:
            body.append(rf"[{HYPHEN}]\s*")  # 2WikiMultiHopQA has both "Saint- Pol" and "Saint-Pol"
        else:
            body.append(f"[{APOSTROPHE}]" if part in tuple(APOSTROPHE) else re.escape(part))
    first, last = entity[0], entity[-1]
    # An edge that is a letter or digit must not go on, nor a number behind "." or ",".
    before = f"(?<!{_goes_on(first)})" + (r"(?<!\d[.,])" if first.isdigit() else "")
    after = f"(?!{_goes_on(last, end=True)})" + (r"(?![.,]\d)" if last.isdigit() else "")
    if last == ".":  # "U.S." is not in "U.S.A", but twice in "U.S.U.S."
        after = rf"(?!(?!(?i:{re.escape(first)})){JOINED})"
    # A placeholder is no occurrence of the word "mask": masking it would never end.
    before, body = rf"{before}(?!(?<=\[)(?:MASK|TARGET)\])", f"(?i:{''.join(body)})"
    one, run = f"{before}{body}{after}", f"{before}(?:{body}{after})+|(?:{before}{body})+{after}"
    # uncached by `regex`, which draws from Python's global generator when its cache is full, and forgets no pattern
    return tuple(regex.compile(pattern, regex.VERSION1, cache_pattern=False) for pattern in (one, run, body))


def _goes_on(edge: str, end: bool = False) -> str:
    """What would go on the word that begins, or has its end, with `edge`: a pattern of one character, perhaps none."""
    if not edge.isalnum() and not regex.match(r"\p{M}", edge):
        return "(?!)"  # nothing: punctuation is an edge by itself
    if regex.match(KATAKANA, edge):
        return KATAKANA
    if regex.match(rf"[{UNSPACED}\p{{Hangul}}]" if end else f"[{UNSPACED}]", edge):
        return r"\p{M}"  # but no letter loses its vowel sign
    return JOINED


def occurs(text: str, entity: str) -> bool:
    """Whether `mask_entity` would replace anything. Raises ValueError if `entity` is blank."""
    return _occurrence(entity)[0].search(text) is not None


def mask_entity(text: str, entity: str, placeholder: str) -> tuple[str, int]:
    """(text with every occurrence of `entity` replaced, their number); afterwards `occurs` is False.

    Raises ValueError if `entity` is blank or occurs in the placeholder.
    """
    if occurs(placeholder, entity):
        raise ValueError(f"{entity!r} occurs in the placeholder {placeholder!r}")
    _, run, part = _occurrence(entity)
    count, new = 0, 1
    while new:  # runs are replaced whole: one of 100,000 parts would take as many passes. A second finds oddities
        new = 0

        def replaced(match: re.Match) -> str:
            nonlocal new
            parts = len(part.findall(match[0]))
            new += parts
            return placeholder * parts
        text = run.sub(replaced, text)
        count += new
    return text, count


UNCASED, FOREIGN = regex.compile(r"\p{Lo}"), regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)


def shows(text: str, entity: str) -> bool:
    """Whether a finished, masked text still shows what was masked, in whatever script and form.

    Beyond `occurs`: in other Unicode forms, with invisible characters between; where letters have no capitals, inside
    longer words, for affixes go with names there and words are not always set apart; of other letters than Latin ones,
    at the beginning of longer words, whose end is an inflection.
    """
    if text.isascii() and entity.isascii():
        return occurs(text, entity)
    text, entity = (unicodedata.normalize("NFKC", INVISIBLE.sub("", PLACEHOLDER.sub("\n", t))).casefold()
                    for t in (text, entity.strip()))
    if regex.search(f"[{UNSPACED}]", entity):
        text, entity = (regex.sub(r"\W", "", t) for t in (text, entity))
    if UNCASED.search(entity):
        return entity in text
    return occurs(text, entity) or bool(FOREIGN.search(entity) and regex.search(rf"\b{regex.escape(entity)}", text))


# ---- finding with rules

YEAR, DAY = r"(?:1\d|20)\d\d", r"(?:3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?"
MONTHS = "January February March April May June July August September October November December"
MONTH = f"(?:{MONTHS.replace(' ', '|')}|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\\.?)"
# Possessive quantifiers (++, *+) and the bounded quotation keep every pattern linear on hostile input.
QUOTED = re.compile(r'"([^"\n]{1,100}+)"|“([^“”\n]{1,100}+)”|《([^《》\n]{1,100}+)》|『([^『』\n]{1,100}+)』')
FIGURES = regex.compile(
    rf"(?<!{JOINED})(?<!\d[.,])(?:(?P<DATE>"
    rf"{DAY} (?:of )?{MONTH}(?:,? {YEAR})?|{MONTH} {DAY}(?:,? {YEAR})?|{MONTH},? {YEAR}"
    rf"|{YEAR}-\d\d-\d\d|{YEAR}s?"
    r")|(?P<NUMBER>(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?(?:%| per ?cent)?))" rf"(?!{JOINED})(?![.,]\d)",
    regex.VERSION1,
)
# Initials (J. J.R.R. U.S.), or a word: O'Hara but not the 's of Curie's; Jean-Paul, Stratford-upon-Avon, but
# only the Italian of Italian-born. [^\W\d_a-z] is a letter that may be a capital.
LETTER = f"[{JOINED}--[\\d_\\p{{M}}]]"
TOKEN = regex.compile(
    rf"(?<!{JOINED})(?:(?P<initials>(?:[{LETTER}--[a-z]]\.)++)(?!{JOINED})"
    rf"|{LETTER}{JOINED}*+(?:['’](?!s\b){LETTER}{JOINED}*+|-(?:[a-z]{{2,4}}-){{0,2}}+(?=[{LETTER}--[a-z]]){JOINED}++)*+)",
    regex.VERSION1,
)
LOWER = re.compile(r"(?<!\w)[a-z]\w*+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONNECTORS = _words("of de da di du del della des la le les los las van von der den zu bin ibn al el y")
# Words that open a sentence with a capital: never the first word of a name ...
FUNCTION = _words(
    """a about according across after against all along alongside also although am among amongst an and
    another any are around as at be because before behind being below beneath beside besides between both but
    by can could despite did do does down due during each either even every few following for from further
    given had has have having he hence her here hers his how however i if in indeed inside instead into is it
    its itself just later like many meanwhile more most much my near neither nevertheless no nor not now of
    off on once only onto or other others our out outside over per perhaps rather regarding she should since
    so some soon still such than that the their them then there thereafter therefore these they this those
    though through throughout thus till to together too toward towards under unlike until up upon us via was
    we were what whatever when where whereas whether which while who whom whose why with within without would
    yet you your"""
)
# ... nor a name alone: months and days, our placeholders' words, and what opens sentences in other languages.
NEVER_ALONE = _words(
    f"""{MONTHS} Monday Tuesday Wednesday Thursday Friday Saturday Sunday mask target""".lower()
) | _words(
    """er sie es ich wir ihr man die das ein eine je tu il elle on nous vous ils elles un une yo él ella nosotros ellos
    ellas una lui lei noi loro gli eu ele ela eles elas uma ik hij zij wij het een jag ja ono oni я
    ты он она оно мы вы они він вона воно ми ви вони εγώ αυτός αυτή αυτό εμείς αυτοί biz onlar"""
)


def english(texts: Iterable[str]) -> bool:
    """Whether these passages are English, which the rules are made for: one word in six is "the",
    "of", "and" or the like there, and hardly one in thirty elsewhere."""
    words = [word.lower() for text in texts for word in regex.findall(r"\w+", text)]
    return sum(word in TELLING for word in words) >= len(words) / 12


TELLING = _words("the of and to with from by")
LONGEST = 100  # characters: what runs on for longer is a headline or a list


class RuleFinder:
    """Dates, numbers, quoted titles and runs of capitalised words, found without a model.

    Names go on over "of", "de", "von", "&" and the like, but not over "and", which mostly stands between two names. An
    article in front is left out. A single digit is not taken: hidden, it would be all over the document and still be
    guessed. What more was tried (titles before names, common words, articles) does not agree better with spaCy.
    """

    name = "rules"

    def find(self, text: str) -> list[Entity]:
        used = bytearray(len(text))  # 1 where an entity or a placeholder stands
        spans = []
        for match in PLACEHOLDER.finditer(text):
            used[match.start() : match.end()] = b"\1" * len(match[0])
        for start, end, label in chain(_titles(text), _figures(text)):
            if used.find(1, start, end) < 0:
                used[start:end] = b"\1" * (end - start)
                spans.append((start, end, label))
        spans += _names(text, used)
        return [Entity(text[start:end], label, start, end) for start, end, label in sorted(spans)]


Span = tuple[int, int, str]  # start, end, label


def _titles(text: str) -> Iterator[Span]:
    for match in QUOTED.finditer(text):
        start, end = match.span(match.lastindex)
        inner = text[start:end]
        words = inner.split()
        # Straight quotes may be paired wrongly, and speech is quoted: a title capitalises its long words.
        if not words or not re.match("[^\\W_a-z]", words[0]) or inner.strip(" .,;:").lower() in FUNCTION:
            continue
        if not any(w[0].islower() and len(w) > 4 for w in words):
            start += len(inner) - len(inner.lstrip())
            yield start, start + len(inner.strip().rstrip(" .,;:")), "TITLE"


def _figures(text: str) -> Iterator[Span]:
    for match in FIGURES.finditer(text):
        if 1 < len(match[0]) <= LONGEST:
            yield *match.span(), match.lastgroup


def _names(text: str, used: bytearray) -> Iterator[Span]:
    lower = set(LOWER.findall(text))
    runs: list[list[re.Match]] = []  # capitalised words that belong together; the last may still grow
    run: list[re.Match] = []
    previous = None
    for token in TOKEN.finditer(text):
        word, taken = token[0], used.find(1, *token.span()) >= 0
        if taken or (run and not _adjacent(text, previous, token)):
            run = []
        previous = token
        if taken:
            continue
        if not _is_capitalised(word):
            if word not in CONNECTORS:
                run = []
        elif run and not (run[-1]["initials"] and word.lower() in FUNCTION):  # "in the U.S. The"
            run.append(token)
        else:
            run = [token] if word.lower() not in FUNCTION else []
            runs += [run] if run else []
    for run in runs:
        start, end = run[0].start(), run[-1].end()
        if len(run[-1]["initials"] or "") == 2:
            end -= 1  # the full stop of "Henry V." ends the sentence
        alone = text[start:end].lower() if len(run) == 1 else ""  # a name alone is nowhere written small
        if end - start <= LONGEST and not (alone and (len(alone) < 2 or alone in lower or alone in NEVER_ALONE)):
            yield start, end, "NAME"


def _is_capitalised(word: str) -> bool:
    return word[0].isupper() or bool(re.match(r"(?:d|l|dell|al|el)['’-][^\W\d_a-z]", word))


def _adjacent(text: str, left: re.Match, right: re.Match) -> bool:
    """Whether only a space, or what may stand inside a name, is between two tokens."""
    return text[left.end():min(right.start(), left.end() + 4)] in (" ", "  ", "\xa0", " & ", "- ")


# ---- finding with spaCy


class SpacyFinder:
    """The entities of a spaCy pipeline, with its labels, trimmed to what `mask_entity` should hide.

    "the Beatles" would leave "Beatles" in sight elsewhere, "Rome's" every other "Rome": articles in front,
    quotes and possessives are cut off.
    """

    def __init__(self, nlp: Any):
        self.nlp = nlp
        self.name = f"spacy:{nlp.meta['lang']}_{nlp.meta['name']}"

    def find(self, text: str) -> list[Entity]:
        self.nlp.max_length = max(self.nlp.max_length, len(text) + 1)  # spaCy refuses a million characters
        hidden = [match.span() for match in PLACEHOLDER.finditer(text)]
        found = []
        for entity in self.nlp(text).ents:
            front = re.match(r"""[\s"“”'‘’(]*(?:(?:the|an?)(?:\s+|\Z))?""", entity.text, re.IGNORECASE).end()
            core = re.sub(r"""(?:['’]s)?[\s"“”'‘’),;:]*\Z""", "", entity.text[front:])
            start, end = entity.start_char + front, entity.start_char + front + len(core)
            if any(map(str.isalnum, core)) and not any(a < end and start < b for a, b in hidden):
                found.append(Entity(core, entity.label_, start, end))
        return found
