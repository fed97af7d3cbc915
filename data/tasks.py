"""Tasks made from passages: masked documents (the paper's task A), recall targets (task B), long QA documents.

All are functions of (corpus, seed, index) alone, so that a document can be rebuilt anywhere, in any order.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from data import InputError
from data.prompts import LAST_PROBLEM, MASK_PROBLEM
from data.text.corpus import Corpus, Passage, Question
from data.text.entities import mask_entity, shows
from data.text.words import SENTENCE_END, SPACED
from data.weights.tokenizer import Tokenizer

MASK, TARGET = "[MASK]", "[TARGET]"


@dataclass(frozen=True)
class Problem:
    """One document to read and one question about it. answers: accepted answers, canonical first."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]  # rendered, in reading order
    kind: str


def sections(passages: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    """Token ids of the document in sections of at most `length` tokens, in order; `passages` may be endless.

    A section ends after the last passage that fits; only a passage longer than a whole section is cut.
    """
    section: list[int] = []
    for passage in passages:
        ids = tokenizer.encode(passage + "\n")
        if len(section) + len(ids) > length and section:
            yield section
            section = []
        whole = max(0, len(ids) - 1) // length * length
        yield from (ids[start:start + length] for start in range(0, whole, length))
        section = section + ids[whole:]
    if section:
        yield section


def split_sections(passages: Sequence[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    return list(sections(passages, tokenizer, length))


def _draw(rng: random.Random, population: int, count: int, taken: Sequence[int]) -> list[int]:
    """`count` different indices below `population`, none of them in `taken`."""
    taken = set(taken)
    chosen = rng.sample(range(population), min(population, count + len(taken)))
    return [i for i in chosen if i not in taken][:count]


@lru_cache(maxsize=8)
def permutation(key: str, population: int) -> array:
    """The indices below `population` in an order that follows from `key`."""
    order = array("L", range(population))
    random.Random(key).shuffle(order)
    return order


def in_epochs(key: str, index: int, population: int) -> int:
    """Draw `index` of an endless stream below `population`: epoch after epoch, each a permutation of its own."""
    epoch, place = divmod(index, population)
    return permutation(f"{key}:{epoch}", population)[place]


def masked_document(corpus: Corpus, finder, seed: int, index: int, passages: int, related: int,
                    size: Callable[[str], int] = len, limit: float = math.inf) -> Problem:
    """Document `index`: pivot + `related` BM25 neighbours + random passages, one entity of the pivot masked.

    At most `limit` of what `size` measures (characters; a tokenizer's tokens), the least related left out first, but
    always the pivot and the passage nearest to it. Where the corpus can tell (the mini-world), only entities that
    the document determines are masked. A document that still shows its answer is not given out, another is drawn. Of
    other corpora every passage is a pivot once an epoch, but for those that give none, which chance replaces; of the
    mini-world, whose documents shipped results rest on, chance draws all. InputError if the corpus is too small, or if
    200 pivots in a row (2,000 where the corpus can tell) give none.
    """
    if len(corpus.passages) < passages:
        raise InputError(f"corpus {corpus.name}: {len(corpus.passages)} passages, but a masked document needs "
                         f"{passages}; give a larger corpus or lower --passages")
    attempts = 2000 if corpus.clues else 200  # without related passages a document determines few of its names
    for attempt in range(attempts):
        rng = random.Random(f"mask:{seed}:{index}:{attempt}")
        pivot = rng.randrange(len(corpus.passages))
        if not corpus.clues and not attempt:
            pivot = in_epochs(f"pivots:{seed}", index, len(corpus.passages))
        chosen = [pivot, *corpus.related(pivot, related)]
        chosen += _draw(rng, len(corpus.passages), passages - len(chosen), chosen)
        total = list(accumulate(size(corpus.passages[i].rendered) for i in chosen))
        chosen = chosen[:max(2, bisect_right(total, limit))]
        found = sorted({e.text for e in finder.find(corpus.passages[pivot].rendered)})
        if corpus.clues:
            found = [e for e in found if corpus.clues(e, chosen)]
        if found:
            answer = rng.choice(found)
            rng.shuffle(chosen)
            masked = tuple(mask_entity(corpus.passages[i].rendered, answer, MASK)[0] for i in chosen)
            if not shows("\n".join(masked), answer):
                return Problem(f"mask-{seed}-{index}", MASK_PROBLEM, (answer,), masked, "masked")
    raise InputError(f"corpus {corpus.name}: no entity to mask, or none that masks hide, in {attempts} passages drawn; "
                     f"give a corpus with names, dates or numbers, or another --entities finder")


def recall_target(section: str, finder, rng: random.Random) -> tuple[str, str] | None:
    """(section with one entity replaced by [TARGET], that entity), or None if it holds none that this hides.

    The section may contain [MASK]; a finder never returns a placeholder, so [TARGET] never is its entity.
    """
    found = sorted({e.text for e in finder.find(section)})
    while found:
        target = rng.choice(found)
        masked, count = mask_entity(section, target, TARGET)
        if count and not shows(masked, target):
            return masked, target
        found.remove(target)
    return None


def competing(earlier: Sequence[str], last: str, finder, known: bool) -> list[tuple[str, str]]:
    """(entity, its sentence) of `last`, for those that compete with earlier ones of their type: a sentence of the texts
    `earlier` names what the entity's sentence names, too, and another entity of the same type. known: only entities
    that an earlier text holds. A speaker or a year in front of a line is no part of its sentence."""
    def told(text: str) -> list[tuple[str, list]]:
        lines = (line.partition(": ")[2] or line for line in text.split("\n"))
        return [(s, finder.find(s)) for line in lines for s in SENTENCE_END.split(line) if s.strip()]

    past = [[(e.text, e.label) for e in found] for text in earlier for _, found in told(text)]
    before, chosen = {text for found in past for text, _ in found}, {}
    for sentence, found in told(last):
        for e in found:
            context = {other.text for other in found} - {e.text}
            if (not known or e.text in before) and any(
                    any(text in context for text, _ in old) and
                    any(label == e.label and text != e.text and text not in context for text, label in old)
                    for old in past):
                chosen.setdefault(e.text, sentence)
    return sorted(chosen.items())


def last_masked(id: str, passages: Sequence[str], finder, tokenizer: Tokenizer, length: int, room: int,
                rng: random.Random) -> Problem | None:
    """A document in its own order, one entity of its last section hidden there, and the sentence that held it as the
    problem, in at most `room` tokens: what holds in the end has to be kept while earlier, competing values stay
    readable. None where no entity of the last section was named before and competes, or where it still shows."""
    parts = split_sections(passages, tokenizer, length)
    if len(parts) < 2:
        return None
    start, size = len(passages), 0
    while size < len(parts[-1]):
        start -= 1
        size += len(tokenizer.encode(passages[start] + "\n"))
    found = competing(passages[:start], "\n".join(passages[start:]), finder, known=True)
    asked = [(y, LAST_PROBLEM.format(sentence=around(mask_entity(sentence, y, MASK)[0], MASK, words)))
             for y, sentence in found for words in (12, 8, 5)]
    fitting = {y: question for y, question in reversed(asked) if len(tokenizer.encode(question)) <= room}
    if not fitting:
        return None
    answer, question = rng.choice(sorted(fitting.items()))
    tail = [mask_entity(p, answer, MASK)[0] for p in passages[start:]]
    if shows("\n".join(tail), answer):
        return None
    return Problem(id, question, (answer,), (*passages[:start], *tail), "masked-last")


def masked_in_order(id: str, passages: Sequence[str], finder, rng: random.Random,
                    determined: Callable[[str], bool] | None = None) -> Problem | None:
    """The paper's task on a document in its own order: an entity of a passage drawn at random is hidden everywhere.
    determined: whether the document determines a name, where someone can tell. None where there is no such entity, or
    where it still shows."""
    found = sorted({e.text for e in finder.find(rng.choice(passages))})
    found = [e for e in found if determined is None or determined(e)]
    if not found:
        return None
    answer = rng.choice(found)
    masked = tuple(mask_entity(p, answer, MASK)[0] for p in passages)
    return None if shows("\n".join(masked), answer) else Problem(id, MASK_PROBLEM, (answer,), masked, "masked")


def around(sentence: str, placeholder: str, words: int) -> str:
    """At most `words` words of a sentence, those around a placeholder; characters where no spaces are between words."""
    found = SPACED.findall(sentence)
    at = next(i for i, w in enumerate(found) if placeholder in w)
    first = max(0, min(at - words // 2, len(found) - words))
    return "".join(found[first:first + words]).strip()


def recall_then(texts: Sequence[str], finder, rng: random.Random) -> tuple[str, str] | None:
    """As recall_target for the last of these sections: an entity that competes with earlier ones, so that the memory
    after it is asked for what held then."""
    found = competing(texts[:-1], texts[-1], finder, known=False)
    if not found:
        return None
    target, _ = rng.choice(found)
    masked = mask_entity(texts[-1], target, TARGET)[0]
    return None if shows(masked, target) else (masked, target)


def _shuffled(rng: random.Random, population: int) -> Iterator[int]:
    """Indices below `population` in random order, drawn as they are asked for."""
    moved: dict[int, int] = {}
    for left in range(population, 0, -1):
        k = rng.randrange(left)
        yield moved.get(k, k)
        moved[k] = moved.pop(left - 1, left - 1)


def qa_document(question: Question, pool: Sequence[Passage], tokenizer: Tokenizer, tokens: int,
                seed: int) -> Problem:
    """The question's gold passages shuffled among its own distractors and then `pool`, up to `tokens` tokens.

    The gold passages are always in, however short the document, those of a story in their order; the filling is a
    function of (question, seed, tokens). InputError if the pool can't fill the document without repeating a passage.
    """
    rng = random.Random(f"qa:{question.id}:{seed}:{tokens}")
    chosen, seen = [], set()
    own = [*question.gold, *rng.sample(question.distractors, len(question.distractors))]
    room = tokens
    for k, passage in enumerate(own):
        size = len(tokenizer.encode(passage.rendered + "\n"))
        if k < len(question.gold) or size <= room:
            chosen.append(passage.rendered)
            room -= size
        seen.add(passage)
    for i in _shuffled(rng, len(pool)) if room > 0 else ():
        size = len(tokenizer.encode(pool[i].rendered + "\n"))
        if size > room:
            break
        if pool[i] not in seen:
            chosen.append(pool[i].rendered)
            room -= size
    else:
        if room > tokens // 4:
            raise InputError(f"question {question.id}: the corpus has too few passages for a document of {tokens} "
                             f"tokens; give a larger corpus or shorter --eval-lengths")
    order = list(range(len(chosen)))
    rng.shuffle(order)
    if question.ordered:  # scattered among the others, in its own order
        gold = len(question.gold)
        story = iter(range(gold))
        order = [next(story) if i < gold else i for i in order]
    passages = tuple(chosen[i] for i in order)
    return Problem(question.id, question.question, question.answers, passages, question.kind)


def cut_middle(ids: list[int], length: int) -> list[int]:
    """The first and the last half of `length` tokens: how a document too long for one window is given to it."""
    if len(ids) <= length:
        return ids
    return ids[:(length + 1) // 2] + ids[len(ids) - length // 2:]
