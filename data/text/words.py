"""What a word is, in any script. Unicode's properties come from `regex`.

Most scripts put spaces between words. Han, Kana and the scripts of South-East Asia (Thai, Lao, Khmer, Myanmar) do not,
and which of their characters make a word takes a dictionary: here each of them counts by itself, and a search compares
pairs, as Lucene's CJKAnalyzer does, and single Han, which often are words. Marks and vowel signs belong to the letter
before them, everywhere.
"""

import re
import unicodedata
from collections.abc import Iterable
from html import unescape
from itertools import pairwise

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Line_Break=SA}"  # for use within [...]; its marks are among them
JOINED = rf"[\w--[{UNSPACED}]]"  # with V1: a character that goes on a word of a script with spaces
SPACED = regex.compile(rf"[{UNSPACED}]\p{{M}}*+\s*+|[\S--[{UNSPACED}]]++\s*+", regex.V1)  # words, with spaces behind
UNIT = regex.compile(SPACED.pattern.replace("++", "{1,40}+"), regex.V1)
# Korean has spaces, but its words carry particles: pairs find the noun in them.
SEARCHED = regex.compile(rf"(?P<pairs>(?:[\w&&[{UNSPACED}\p{{Hangul}}]]\p{{M}}*+)++)"
                         rf"|[\w--[{UNSPACED}\p{{Hangul}}]]{{2,}}+", regex.V1)
COMPARED = regex.compile(rf"[\w&&[{UNSPACED}]]\p{{M}}*+|[{JOINED}--_]++", regex.V1)
INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}ـ]")  # joiners, soft hyphens; Arabic's long stroke
CHARACTER, HAN = regex.compile(r"\X"), regex.compile(r"\p{Han}")
# 。 । ۔ and the like, with up to three closing quotes; behind . ! ? a space has to follow, an initial is none, nor
# what stands before a small letter.
SENTENCE_END = regex.compile(
    r"""(?<=(?:[.!?]|[.!?]["”’')\]])(?<!\b[^\W\d_]\.)\ )(?=\P{Ll})"""
    r"""|(?<=[\p{Sentence_Terminal}--[\0-\x7f]][\p{Pe}\p{Pf}"']{0,3}+\ ?)"""
    r"""(?![\p{Pe}\p{Pf}\p{Sentence_Terminal}"'\ ]|\Z)""", regex.V1)


def searched(text: str) -> Iterable[str]:
    """The words by which a text is searched, in small letters: two characters or more; where there are no spaces, pairs
    and single Han. Of ASCII the runs of letters, digits and _."""
    if text.isascii():  # says the same in a fifth of the time
        yield from re.findall(r"\w\w+", text.lower())
        return
    for match in SEARCHED.finditer(unicodedata.normalize("NFKC", text).lower()):
        if match["pairs"]:
            characters = CHARACTER.findall(match[0])
            yield from map("".join, pairwise(characters))
            yield from (c for c in characters if len(characters) == 1 or HAN.match(c))
        else:
            yield match[0]


def compared(text: str) -> tuple[str, ...]:
    """The words by which texts are compared, in small letters: punctuation, spaces, `_`, HTML's `&amp;` and Unicode
    forms aside. Where there are no spaces, each character is a word."""
    text = unescape(text)
    if text.isascii():  # says the same in a third of the time
        return tuple(re.findall(r"[^\W_]+", text.lower()))
    return tuple(COMPARED.findall(unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()))


def count(text: str) -> int:
    """Length in words; without spaces, in characters. Forty letters at most are one word."""
    return len(UNIT.findall(text))
