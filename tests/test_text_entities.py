"""Entities: what the finders find, and that masking leaves no occurrence and touches nothing else."""

import random
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import cpu_seconds

from data import InputError
from data.problems import Data
from data.text.corpus import load_passages
from data.text.entities import RuleFinder, SpacyFinder, make_finder, mask_entity, occurs

WIKIPEDIA = Path(__file__).parents[2] / "shared" / "data" / "wikipedia_passages.jsonl"
needs_wikipedia = pytest.mark.skipif(not WIKIPEDIA.exists(), reason=f"sample corpus {WIKIPEDIA} is not here")


@pytest.mark.parametrize(
    ("text", "entity", "expected"),
    [
        ("Rome is in Italy. I love Rome.", "Rome", "# is in Italy. I love #."),
        ("Romeo left Rome; prerome, Rome2, _Rome", "Rome", "Romeo left #; prerome, Rome2, _Rome"),
        ("Marie Curie's work. MARIE CURIE", "Marie Curie", "#'s work. #"),
        ("Marie\nCurie, Marie \t Curie, MarieCurie", "Marie Curie", "#, #, MarieCurie"),
        ("the Rome-based, pre-Rome (Rome) “Rome” Rome/Paris", "Rome", "the #-based, pre-# (#) “#” #/Paris"),
        ("18, 1843, 18.5, 1,800, 3.18 18th 18. 18-year", "18", "#, 1843, 18.5, 1,800, 3.18 18th #. #-year"),
        ("in 1843, 1843.", "1843", "in #, #."),
        ("12% or 12 %", "12%", "# or 12 %"),
        ("about 12% of 12", "12", "about #% of #"),
        ("Zoë, ZOË, Zoe", "Zoë", "#, #, Zoe"),
        ("Jose\u0301 met Jose", "Jose", "Jose\u0301 met #"),
        ("Łódź, łódź, Łódźian", "Łódź", "#, #, Łódźian"),
        ("O'Hara, O’Hara", "O'Hara", "#, #"),
        ("Saint- Pol and Saint-Pol and Saint Pol", "Saint-Pol", "# and # and Saint Pol"),
        ("the U.S. Navy, U.S.A, U.S.U.S.", "U.S.", "the # Navy, U.S.A, ##"),
        ("a (b.c*) a (bxc)", "(b.c*)", "a # a (bxc)"),
        ("a b a b a", "a b a", "# b a"),
        ("5,5,5", "5,", "##5"),  # the second is part of a number until the first is gone
        ("the [MASK] of the mask", "mask", "the [MASK] of the #"),
        ("no such thing", "Rome", "no such thing"),
        ("", "Rome", ""),
    ],
)
def test_masking(text, entity, expected):
    masked, count = mask_entity(text, entity, "#")
    assert masked == expected
    assert count == expected.count("#") - text.count("#")
    assert occurs(text, entity) == (count > 0)
    assert not occurs(masked, entity)


def test_mask_takes_the_placeholder_literally_and_refuses_what_cannot_end():
    assert mask_entity("Rome, Rome", "Rome", r"\1\g<0>") == (r"\1\g<0>, \1\g<0>", 2)
    for entity, placeholder in ((" \n", "[MASK]"), ("rome", "[Rome]"), ("[MASK]", "[MASK]")):
        with pytest.raises(ValueError):
            mask_entity("Rome", entity, placeholder)
    # the word inside a placeholder is not hidden a second time, so both can be used on one text
    assert mask_entity("Mask and [MASK]", "Mask", "[TARGET]") == ("[TARGET] and [MASK]", 1)


def test_nothing_occurs_after_masking_whatever_the_text():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("aAb1 ..,-'’\n[]", k=rng.randrange(1, 30)))
        entity = "".join(rng.choices("ab1 .,-'", k=rng.randrange(1, 5)))
        if not entity.strip():
            continue
        masked, count = mask_entity(text, entity, "[MASK]")
        assert not occurs(masked, entity), (text, entity, masked)
        assert occurs(text, entity) == (count > 0) == (masked != text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tellinford was founded by Joren Tellin in 1843.", "NAME:Tellinford NAME:Joren Tellin DATE:1843"),
        ("The Ballad of Tellinford was widely sung.", "NAME:Ballad of Tellinford"),
        ("born on 12 May 1843 or May 12, 1843", "DATE:12 May 1843 DATE:May 12, 1843"),
        ("May 1843, the 1840s, 1843-05-12, 3 June", "DATE:May 1843 DATE:1840s DATE:1843-05-12 DATE:3 June"),
        ("from 1914–1918, 2099 but 2100", "DATE:1914 DATE:1918 DATE:2099 NUMBER:2100"),
        ("2,297 people, 3.5 km, 12 towns, 45%", "NUMBER:2,297 NUMBER:3.5 NUMBER:12 NUMBER:45%"),
        ("about 12 percent, 1,234,567.8", "NUMBER:12 percent NUMBER:1,234,567.8"),
        ("18th, version 3.5.1, 12x, 7 dogs", ""),
        ("She saw the Beatles. The Beatles sang.", "NAME:Beatles NAME:Beatles"),
        ("In London he slept. After Rome he ate. He knew nobody.", "NAME:London NAME:Rome"),
        ("then J. R. Smith and J.R.R. Tolkien", "NAME:J. R. Smith NAME:J.R.R. Tolkien"),
        ("ruled by Henry V. He died in the U.S. The end.", "NAME:Henry V NAME:U.S."),
        ("Dr. Ann Smith of St. Louis", "NAME:Dr NAME:Ann Smith of St NAME:Louis"),
        ("Marie Curie's daughter met James' son", "NAME:Marie Curie NAME:James"),
        ("Jean-Paul, an Italian-born man of Stratford-upon-Avon",
         "NAME:Jean-Paul NAME:Italian NAME:Stratford-upon-Avon"),
        ("with Ludwig van der Berg, Juan de la Cruz, Jeanne d'Arc and Fiske O'Hara",
         "NAME:Ludwig van der Berg NAME:Juan de la Cruz NAME:Jeanne d'Arc NAME:Fiske O'Hara"),
        ("the Battle of the Golden Spurs", "NAME:Battle NAME:Golden Spurs"),
        ("Boso the Great gave Ann the Nobel Prize", "NAME:Boso NAME:Great NAME:Ann NAME:Nobel Prize"),
        ("where Bertha and Hucbert met Simon & Garfunkel", "NAME:Bertha NAME:Hucbert NAME:Simon & Garfunkel"),
        ("He wrote \"The Night Garden,\" and “Salt” there", "TITLE:The Night Garden TITLE:Salt"),
        ('He said "i never liked any garden" there', ""),
        ('a 6" nail, he had a 5" one, "It" and "[MASK] Hill"', "NAME:Hill"),
        ('It was called "Rome, 1843 and After" in Rome', "TITLE:Rome, 1843 and After NAME:Rome"),
        ("Bridges are old. Many bridges fell.", ""),
        ("It rained. Tellinford is a town.", "NAME:Tellinford"),
        ("Beijing\nBeijing is large.", "NAME:Beijing NAME:Beijing"),
        ("Beijing: Beijing is large.", "NAME:Beijing NAME:Beijing"),
        ("It opens in May, on a Monday, with Theresa May", "NAME:Theresa May"),
        ("Oskel River\nTellin Mills grew.", "NAME:Oskel River NAME:Tellin Mills"),
        ("[MASK] of Rome met [TARGET], MASK and Ann [MASK] Lee.", "NAME:Rome NAME:Ann NAME:Lee"),
        ('the "Ballad of [MASK]" in [TARGET]ville', "NAME:Ballad"),
        ("Émile Zola lived in Łódź", "NAME:Émile Zola NAME:Łódź"),
        ("Tall Trees " * 10, ""),
        (f'"{"Tall Trees " * 10}" by Ann Lee', "NAME:Ann Lee"),
        (" \n", ""),
        ("", ""),
    ],
)
def test_rules(text, expected):
    found = RuleFinder().find(text)
    assert " ".join(f"{e.label}:{e.text}" for e in found) == expected


@needs_wikipedia
def test_rules_on_real_text():
    finder, total = RuleFinder(), 0
    for passage in load_passages(str(WIKIPEDIA), limit=400).passages:
        text = passage.rendered
        found = finder.find(text)
        total += len(found)
        assert all(a.end <= b.start for a, b in pairwise(found)), "in order, no overlaps"
        for entity in found:
            assert text[entity.start : entity.end] == entity.text == entity.text.strip()
        for entity in found[:3]:
            masked, count = mask_entity(text, entity.text, "[MASK]")
            # found whole words only: masking them hits at least the one that was found
            assert count >= 1 and not occurs(masked, entity.text), entity
            assert all("MASK" not in e.text for e in finder.find(masked))
    assert total > 400 * 8


HOSTILE = ["a", "A", "1", ",111", "Abc ", "A.", "A-", "A-of-", "a'", "A of the ", '"', "“", "[MASK", "1 May "]


@pytest.mark.parametrize("unit", HOSTILE)
def test_rules_and_masking_are_linear(unit):
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        return cpu_seconds(lambda: (RuleFinder().find(text), mask_entity(text, "Abc of Def", "[MASK]"),
                                    mask_entity(text, f"{unit} {unit}".strip() or "x", "[T]")))

    # Quadratic would be 25 times as long; 0.2 s absorbs a busy machine.
    assert seconds(250_000) < 12 * seconds(50_000) + 0.2


def test_finder_choice(monkeypatch):
    assert make_finder("rules").name == "rules"
    for choice in ("", "Rules", "nltk"):
        with pytest.raises(InputError, match="use auto, rules, spacy") as error:
            make_finder(choice)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "spacy", None)  # what an import finds where spaCy is not installed
    assert make_finder("auto").name == "rules"
    for choice in ("spacy", "spacy:en_core_web_sm"):
        with pytest.raises(InputError, match="pip install spacy") as error:
            make_finder(choice)
        assert "\n" not in str(error.value)


@pytest.fixture
def nlp():
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    patterns = {"ORG": "the Beatles", "PERSON": "Marie Curie's", "DATE": "1843", "GPE": "MASK", "X": "the"}
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": k, "pattern": p} for k, p in patterns.items()])
    return pipeline


def test_spacy_keeps_labels_and_trims(nlp):
    text = "In 1843 the Beatles met Marie Curie's cat and [MASK] on the hill."
    found = SpacyFinder(nlp).find(text)
    assert " ".join(f"{e.label}:{e.text}" for e in found) == "DATE:1843 ORG:Beatles PERSON:Marie Curie"
    assert all(text[e.start : e.end] == e.text for e in found)
    assert re.fullmatch(r"spacy:en_\w+", SpacyFinder(nlp).name)
    nlp.max_length = 10
    assert len(SpacyFinder(nlp).find(text)) == 3


def test_spacy_models_are_looked_up(nlp, monkeypatch, tiny, tokenizer):
    import spacy

    monkeypatch.setattr(spacy.util, "is_package", lambda name: name == "en_core_web_sm")
    monkeypatch.setattr(spacy, "load", lambda name, exclude: nlp)
    assert isinstance(make_finder("auto"), SpacyFinder)
    assert isinstance(make_finder("spacy"), SpacyFinder)
    assert Data(tiny(), tokenizer).finder.name == "rules", "the mini-world is the same whatever else is installed"
    with pytest.raises(InputError, match="no model de_core_news_sm"):
        make_finder("spacy:de_core_news_sm")
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    assert make_finder("auto").name == "rules"

    def broken(name, exclude):
        raise OSError("two\nlines")

    monkeypatch.setattr(spacy.util, "is_package", lambda name: True)
    monkeypatch.setattr(spacy, "load", broken)
    with pytest.raises(InputError, match="does not load") as error:  # not silently other data
        make_finder("auto")
    assert "\n" not in str(error.value)
