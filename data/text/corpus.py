"""Passages to train on and questions to evaluate with, from local files or from the hub.

    load_passages(spec)  -> Corpus          .jsonl .json .txt .parquet, a folder of them, or "wikipedia"
    load_questions(spec) -> list[Question]  HotpotQA / 2WikiMultiHopQA, MuSiQue and FlashRAG records, or "hotpotqa";
                                            bAbI, LoCoMo and LongMemEval's form (data/text/conversations.py)

A Corpus knows the two things the method asks of raw text: which passages are related to a passage (BM25),
and a split by title that never puts one subject on both sides. Whatever is wrong with the user's files raises
InputError: one line with the path, the line (or record, or row), and what to do.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from data import InputError
from data.text import conversations, files, hub
from data.text.dense import Dense, retriever_of
from data.text.retrieval import Retriever, top
from data.text.words import SENTENCE_END, UNIT, compared, count

WIKIPEDIA = hub.Source(
    "wikimedia/wikipedia", "20231101.en", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", ("title", "text"),
    "give a local file or folder, or the default, the mini-world",
)  # fmt: skip
WIKIPEDIA_ARTICLES = 20_000
HOTPOTQA = hub.Source(
    "hotpotqa/hotpot_qa", "distractor", "1908d6afbbead072334abe2965f91bd2709910ab",
    ("id", "question", "answer", "type", "supporting_facts", "context"),
    "give a local .json or .jsonl file of questions",
)  # fmt: skip
HOTPOTQA_SPLITS = ("validation", "train")  # "hotpotqa" alone is the first
HOTPOTQA_QUESTIONS = 20_000  # the paper's 500 steps of 32 documents ask 16,000
ENDINGS = (".jsonl", ".json", ".txt", ".parquet")
PASSAGE_COLUMNS = ("title", "text", "contents")
PASSAGE_FORM = "a passage is {title, text} or {contents}, all of them strings"
OWN_PLACEHOLDER = re.compile(r"\[(MASK|TARGET)\]")
QUESTION_FORMS = (
    "accepted: HotpotQA/2WikiMultiHopQA (_id, question, answer, supporting_facts, context), "
    "MuSiQue (id, question, answer, paragraphs), FlashRAG (id, question, golden_answers), LoCoMo, LongMemEval, "
    "bAbI (.txt)"
)


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable unit of text."""

    title: str
    text: str

    @property
    def rendered(self) -> str:
        """The form in which a passage appears in documents and in the index."""
        return f"{self.title}: {self.text}" if self.title else self.text  # statements of a story have none


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the passages that came with it."""

    id: str
    question: str
    answers: tuple[str, ...]  # the first is canonical, the rest are aliases
    gold: tuple[Passage, ...]  # the passages that hold the evidence; may be empty
    distractors: tuple[Passage, ...]  # the other passages that came along; may be empty
    kind: str = ""  # as the data set names it: bridge, comparison, 2hop, ...
    ordered: bool = False  # whether `gold` is a story or conversation: its order is kept, its end counts
    missing: tuple[str, ...] = ()  # titles of evidence that did not come along


class Corpus:
    """Passages, a name, and an index that is built when it is first needed: BM25, or what `searched_by` says.

    `clues` is kept as given; only the mini-world, which knows its own facts, provides it.
    Raises InputError if there is no passage.
    """

    def __init__(self, passages: Sequence[Passage], name: str, clues: Callable | None = None):
        if not passages:
            raise InputError(f"corpus {name}: no passage in it; give files with text")
        self.passages = list(passages)
        self.name = name
        self.clues = clues
        self.searched_by = "bm25"

    def __len__(self) -> int:
        return len(self.passages)

    def related(self, index: int, k: int) -> list[int]:
        """The k passages that score highest with passage `index` as the query, itself excluded, best first.

        Ties go to the lower index, so that the answer is a function of the corpus alone; passages that share
        no word with the query fill up the end. Raises InputError if there are fewer than k other passages.
        """
        if not 0 <= k <= len(self) - 1:
            have = f"corpus {self.name}: {k} related passages wanted, {len(self)} passages in all"
            raise InputError(f"{have}; give a larger corpus or ask for fewer")
        scores = self.retriever.scores(self.passages[index].rendered)  # [passages]
        scores[index] = float("-inf")
        return top(scores, k)

    def search(self, query: str, k: int) -> list[int]:
        """At most k passages for `query`, best first; those without a word of the query are left out."""
        return self.retriever.search([query], k)[0]

    def split(self, held_out: float = 0.1, seed: int = 0) -> "tuple[Corpus, Corpus]":
        """(training part, held-out part), about `held_out` of the titles in the second.

        A stable hash of (seed, title) decides: all passages of a title are on one side, and on the same side
        in any order, size or selection of the corpus. Raises InputError if a side would be empty.
        """
        if not 0 < held_out < 1:
            raise InputError(f"corpus {self.name}: held_out={held_out} must lie between 0 and 1")
        sides: tuple[list[Passage], list[Passage]] = ([], [])
        for passage in self.passages:
            digest = hashlib.sha256(json.dumps([seed, passage.title]).encode()).digest()
            sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(passage)
        if not all(sides):
            have = f"corpus {self.name}: one side of the split of {len(self)} passages is empty"
            raise InputError(f"{have} with held_out={held_out}; give a larger corpus or another held_out")
        names = (f"{self.name}/train", f"{self.name}/held-out")
        return Corpus(sides[0], names[0], self.clues), Corpus(sides[1], names[1], self.clues)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of all passages and their order (tasks refer to passages by index)."""
        digest = hashlib.sha256()
        for passage in self.passages:
            digest.update(json.dumps([passage.title, passage.text]).encode() + b"\n")
        return digest.hexdigest()[:16]

    @cached_property
    def retriever(self) -> Retriever | Dense:
        """Over the passages, built when it is first needed."""
        return retriever_of(self.searched_by, self)


def load_passages(spec: str, *, limit: int | None = None, max_words: int = 180,
                  size: Callable[[str], int] = count) -> Corpus:
    """The corpus that `spec` names: a file, a folder (its files, sorted, recursive), or "wikipedia".

    .json, .jsonl: records {title, text}, or {contents} as in FlashRAG, whose first line is the quoted title;
        taken as they are. .parquet: the same as columns, split into `max_words` of what `size` measures.
    .txt: a blank line ends a paragraph, long ones are split; the first of several lines is the title if it
        looks like a heading (`_is_heading`).
    "wikipedia": articles, split too.
    What has no title is named after its file, with a running number. `limit` is the number of articles for
    "wikipedia" (default 20,000), of passages for files (default all). Repeated passages are dropped.
    Raises InputError.
    """
    if (limit is not None and limit < 1) or max_words < 1:
        raise InputError(f"corpus {spec}: limit={limit} and max_words={max_words} must be at least 1")
    path = Path(spec)
    if spec == "wikipedia":
        articles = hub.rows(WIKIPEDIA, "train", limit or WIKIPEDIA_ARTICLES)
        found = (
            Passage(_one_line(article["title"]), part)
            for _, article in articles
            for part in split_text(_clean(article["text"]), max_words, size)
        )
    else:
        found = islice((p for file in _files(path) for p in _read_passages(file, max_words, size)), limit)
    passages = list(dict.fromkeys(found))
    if not passages:
        raise InputError(f"{spec}: empty, not one passage in it; give files with text")
    return Corpus(passages, path.name or spec)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("[!.]*") if files.ending(p) in ENDINGS and p.is_file())
        if not found:
            raise InputError(f"{path}: a folder without a {', '.join(ENDINGS)} file; give one that has some")
        return found
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give {', '.join(ENDINGS)}, a folder, or wikipedia")
    if files.ending(path) not in ENDINGS:
        raise InputError(f"{path}: unsupported ending {path.suffix!r}; use {', '.join(ENDINGS)}, or .gz of them")
    return [path]


def _read_passages(path: Path, max_words: int, size: Callable[[str], int]) -> Iterator[Passage]:
    if files.ending(path) == ".txt":
        yield from _paragraphs(path, max_words, size)
        return
    for number, (where, record) in enumerate(files.records(path, PASSAGE_COLUMNS), start=1):
        try:
            title, text = record.get("title"), record.get("text")
            if text is None and "contents" in record:
                first, _, rest = record["contents"].strip().partition("\n")
                title, text = (_unquoted(first.strip()), rest) if rest else (title, first)
            title = _one_line(title or "") or f"{path.stem} {number}"
            text = _clean(text).strip()
        except (AttributeError, TypeError) as error:  # not a record, or not a string where one is needed
            raise InputError(f"{where}: no usable title and text; {PASSAGE_FORM}") from error
        if not text:
            raise InputError(f"{where}: the text is empty; {PASSAGE_FORM}")
        for part in split_text(text, max_words, size) if files.ending(path) == ".parquet" else (text,):
            yield Passage(title, part)


def _unquoted(title: str) -> str:
    """FlashRAG's `"title"` without the pair of quotes around it, and with those of its own."""
    inner = title[1:-1]  # "A" and "B" is no pair around a title: behind the first word a quote closes
    return inner if re.fullmatch('".*"', title) and not re.match(r'[^"]*[^\W\d_]"(?!\w)[^"]*"', inner) else title


def _paragraphs(path: Path, max_words: int, size: Callable[[str], int]) -> Iterator[Passage]:
    groups: list[list[str]] = [[]]
    for _, line in files.lines(path):
        if line := _one_line(line):
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    for number, lines in enumerate(filter(None, groups), start=1):
        title = lines.pop(0) if len(lines) > 1 and _is_heading(lines[0]) else f"{path.stem} {number}"
        yield from (Passage(title, part) for part in split_text(" ".join(lines), max_words, size))


def split_text(text: str, max_words: int, size: Callable[[str], int] = count) -> list[str]:
    """`text` in parts of at most `max_words`, or of what else `size` measures: short paragraphs merged, long ones cut
    at sentence ends.

    Headings of a text that needs several parts are left out; a sentence that is too long by itself is cut
    between words, or characters where no spaces are between words. Whitespace is normalised.
    """
    paragraphs = [(line, size(line)) for line in map(_one_line, text.splitlines()) if line]
    if sum(length for _, length in paragraphs) > max_words:
        paragraphs = [p for p in paragraphs if not _is_heading(p[0])] or paragraphs
    parts, filled = [""], 0
    for paragraph, length in paragraphs:
        if filled + length > max_words:  # a paragraph stays in one part where it can
            parts.append("")
            filled = 0
        for piece in [paragraph] if length <= max_words else _sentences(paragraph, max_words, size):
            if filled and filled + size(piece) > max_words:
                parts.append("")
                filled = 0
            parts[-1] += piece
            filled += size(piece)
        parts[-1] += " "
    return [part.strip() for part in parts if part.strip()]


def _sentences(text: str, max_words: int, size: Callable[[str], int]) -> Iterator[str]:
    """The sentences of `text` with the space behind them, too long ones in as few pieces as need be."""
    for sentence in SENTENCE_END.split(text):
        if size(sentence) <= max_words:
            yield sentence
            continue
        piece, filled = "", 0
        for unit in UNIT.findall(sentence):
            length = size(unit)
            if piece and filled + length > max_words:
                yield piece
                piece, filled = "", 0
            piece += unit
            filled += length
        yield piece


def _is_heading(line: str) -> bool:
    return len(line) <= 60 and count(line) <= 8 and unicodedata.category(line[-1])[0] != "P"


def load_questions(spec: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions (default: all) of a .json, .jsonl or .parquet file, or of HotpotQA on the hub.

    The form of a file is recognised record by record (QUESTION_FORMS). "hotpotqa" or "hotpotqa:validation" and
    "hotpotqa:train" are the splits of its distractor setting (default: 20,000 questions at most).
    Raises InputError, with the file and the record, for what is missing, empty, of a wrong type, or doubled.
    """
    if limit is not None and limit < 1:
        raise InputError(f"questions {spec}: limit={limit} must be at least 1")
    name, _, split = spec.partition(":")
    if name == "hotpotqa":
        split = split or HOTPOTQA_SPLITS[0]
        if split not in HOTPOTQA_SPLITS:
            raise InputError(f"{spec}: no such split; use {' or '.join(f'{name}:{s}' for s in HOTPOTQA_SPLITS)}")
        records = hub.rows(HOTPOTQA, split, limit or HOTPOTQA_QUESTIONS)
    else:
        records = question_records(Path(spec))
    questions = list(parse_questions(records))
    if not questions:
        raise InputError(f"{spec}: empty, not one question in it; {QUESTION_FORMS}")
    return questions[:limit]


def parse_questions(records: Iterable[tuple[str, Any]]) -> Iterator[Question]:
    """The questions of (where, parsed JSON). InputError as in `load_questions`."""
    ids: set[str] = set()
    for where, record in (part for whole in records for part in conversations.expand(*whole)):
        try:
            question = _told(record) if isinstance(record, conversations.Told) else _question(record)
        except KeyError as error:
            raise InputError(f"{where}: `{error.args[0]}` is missing; {QUESTION_FORMS}") from error
        except (TypeError, ValueError, LookupError) as error:
            raise InputError(f"{where}: malformed record ({error}); {QUESTION_FORMS}") from error
        if question.id in ids:
            raise InputError(f"{where}: the id {question.id!r} occurs twice; give every question its own")
        ids.add(question.id)
        yield question


def question_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, parsed record) of a file of questions, data.text.files; a .txt is bAbI."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a .json, .jsonl or .parquet file of questions, or hotpotqa")
    if files.ending(path) == ".txt":
        return conversations.babi(path, files.lines(path))
    if files.ending(path) not in (".json", ".jsonl", ".parquet"):
        raise InputError(f"{path}: unsupported ending {path.suffix!r}; questions come as .json, .jsonl or .parquet, or "
                         f".gz of them")
    return files.records(path)


@lru_cache(maxsize=4)  # hundreds of questions are asked about one conversation
def _said(lines: tuple[tuple[str, str], ...]) -> tuple[Passage, ...]:
    return tuple(Passage(_one_line(who), _one_line(text)) for who, text in lines)


def _told(told: conversations.Told) -> Question:
    lines = _said(told.lines)
    answers = tuple(map(_one_line, told.answers))
    return Question(told.id, _one_line(told.question), answers, lines, (), told.kind, ordered=True)


def _question(record: Any) -> Question:
    """Raises KeyError for what is missing, TypeError, ValueError or IndexError for what has a wrong form."""
    if not isinstance(record, dict):
        raise TypeError(f"{type(record).__name__} instead of a record")
    gold: dict[Passage, None] = {}  # dicts: 2WikiMultiHopQA repeats some paragraphs word for word
    others: dict[Passage, None] = {}
    evidence: set[str] = set()
    if "context" in record:
        key = "id" if "id" in record else "_id"  # the hub's, the authors' own
        kind, answers = _one_line(record.get("type") or ""), [record["answer"]]
        evidence = {_one_line(fact[0]) for fact in _pairs(record["supporting_facts"], "title", "sent_id")}
        pages = [Passage(_one_line(title), _one_line(" ".join(_items(sentences))))
                 for title, sentences in _pairs(record["context"], "title", "sentences")]
        alike = set(map(compared, evidence - {p.title for p in pages}))  # where no page has the very title
        for passage in pages:
            (gold if passage.title in evidence or compared(passage.title) in alike else others)[passage] = None
    elif "paragraphs" in record:
        key, kind = "id", str(record["id"]).partition("__")[0]  # "2hop__150763_14904"
        answers = [record["answer"], *_items(record.get("answer_aliases", []))]
        for entry in _items(record["paragraphs"]):
            passage = Passage(_one_line(entry["title"]), _one_line(entry["paragraph_text"]))
            (gold if entry["is_supporting"] else others)[passage] = None
        if record.get("answerable") is False:
            raise ValueError("marked as not answerable, use the file of answerable questions")
    elif "golden_answers" in record:
        key, kind, answers = "id", "", _items(record["golden_answers"])
        about = record.get("metadata")  # of HotpotQA and 2WikiMultiHopQA it says which pages hold the evidence
        if isinstance(about, dict) and isinstance(facts := about.get("supporting_facts"), dict):
            evidence = set(map(_one_line, _items(facts["title"])))
    else:
        raise ValueError("none of `context`, `paragraphs`, `golden_answers`")
    question = _one_line(record["question"])
    known = tuple(dict.fromkeys(filter(None, map(_answer, answers))))
    if not question or not known:
        raise ValueError("empty answer" if question else "empty question")
    if not isinstance(record[key], str | int) or record[key] == "":
        raise TypeError(f"`{key}` is neither a string nor a number")
    gold, others = ({p: None for p in some if p.text} for some in (gold, others))
    held = {compared(p.title) for p in gold}
    missing = sorted(title for title in evidence if compared(title) not in held)
    return Question(str(record[key]), question, known, tuple(gold), tuple(others), kind, missing=tuple(missing))


def _answer(value: Any) -> str:
    """Numbers are written as one would: 1843, and 1843 for the 1843.0 that a table makes of it; NaN and infinity are
    no answers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
    return _one_line(str(value) if number else value)


def _pairs(value: Any, first: str, second: str) -> list[Sequence]:
    """[[a, b], ...], as HotpotQA's files have it; the hub has columns, {first: [a, ...], second: [b, ...]}."""
    if isinstance(value, dict):
        return list(zip(_items(value[first]), _items(value[second]), strict=True))
    return [_items(pair) for pair in _items(value)]


def _items(value: Any) -> list:
    if not isinstance(value, list):  # a string would pass for a list of its letters
        raise TypeError(f"{type(value).__name__} instead of a list")
    return value


def _clean(text: str) -> str:
    """NFC, so that entities can be matched by code point; no NUL; lone surrogates become U+FFFD. The placeholders of
    the tasks get round brackets: a document that says [MASK] by itself would ask for something it does not hide."""
    text = OWN_PLACEHOLDER.sub(r"(\1)", text.replace("\0", ""))
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", re.sub("[\ud800-\udfff]", "\ufffd", text))


def _one_line(text: str) -> str:
    """Cleaned, every run of whitespace one space. Raises TypeError if `text` is not a string."""
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} instead of a string")
    return " ".join(_clean(text).split())
