"""The question sets that search QA is evaluated on: the paper's seven from the hub, or local files.

    load_benchmarks("nq,hotpotqa=my/hotpot.json,my/triviaqa_dev.jsonl", limit=100) -> {name: [Question, ...]}

A benchmark is NAME (one of the seven, streamed from the hub in FlashRAG's form), NAME=FILE, or FILE, whose name is
then the file's without its ending and _train, _dev or _test; "all" is the seven. Files may have FlashRAG's form or
those of HotpotQA, 2WikiMultiHopQA and MuSiQue (data/text/corpus.py).

Question marks, of any script (data.text.words). A record without one is refused: most often its columns are swapped, or
its text was cut. The seven sets are the exception, from the hub or from a file under their name, for their authors
publish such questions: all of the 100 of NQ in our sample have no mark, 7 of 100 of TriviaQA, 4 of 100 of HotpotQA.
Each of those gets a mark here, as in the public preparations of these sets for search agents, unless it ends as a
sentence does ("Name one of the mascots."); how many is printed. Under their names, too, a single word in a file is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import InputError
from data.run.terminal import note
from data.text import hub
from data.text.corpus import Question, parse_questions, question_records
from data.text.files import set_name
from data.text.words import asks, count, ends

# In the order of the paper's Table 2. Splits as search agents are commonly evaluated: test where there is one,
# else dev.
SPLITS = {"triviaqa": "test", "bamboogle": "test", "hotpotqa": "dev", "nq": "test", "popqa": "test",
          "2wikimultihopqa": "dev", "musique": "dev"}
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
REVISION = "4086cd004e8433a77d553754be40fa2b76655a09"  # a commit by its maintainers; no hub was in reach to try it
NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")
QUESTIONS = 20_000  # more than any of the seven has (PopQA: 14,267)
FORM = f"give NAME, NAME=FILE or FILE, NAMEs from the hub being all or {', '.join(SPLITS)}"


def load_benchmarks(spec: str, limit: int | None = None) -> dict[str, list[Question]]:
    """The first `limit` questions (default: all) of each benchmark in `spec`, in its order.

    Raises InputError, with the file and the record, for what `load_questions` refuses (missing or empty answers, ids
    given twice, ...) and for questions without a mark as said above; also for a name given twice, one that is unknown,
    and fewer than two questions, for search QA asks two at once.
    """
    if limit is not None and limit < 2:
        raise InputError(f"benchmarks {spec}: {limit} questions of each are too few; two are asked at once")
    sources = _sources(spec)
    names = [name for name, _ in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"benchmarks {spec}: {name} is given twice; leave one out, or name it NAME=FILE")
    return {name: _load(name, source, limit) for name, source in sources}


def load_local(spec: str, limit: int | None = None) -> list[Question]:
    """The questions of those benchmarks that are files, which may come with passages; those of the hub never do."""
    return [q for name, file in _sources(spec) if file for q in _load(name, file, limit)]


def _sources(spec: str) -> list[tuple[str, Path | None]]:
    """(name, file) of each item of `spec`; None: from the hub."""
    found: list[tuple[str, Path | None]] = []
    for item in map(str.strip, spec.split(",")):
        name, given, file = (part.strip() for part in item.partition("="))
        if not item or (given and not (name and file)):
            raise InputError(f"benchmarks {spec!r}: {item or 'an empty item'}; {FORM}")
        if item == "all":
            found += [(name, None) for name in SPLITS]
        elif given or item in SPLITS:
            found.append((name, Path(file) if given else None))
        elif Path(item).suffix or Path(item).exists():
            found.append((set_name(Path(item)), Path(item)))
        else:
            raise InputError(f"benchmarks {spec}: {item} is none of the seven and no file; {FORM}")
        if not NAME.fullmatch(found[-1][0]):
            raise InputError(f"benchmarks {spec}: {found[-1][0]!r} is no name of letters, digits, . _ -; "
                             f"give NAME=FILE")
    return found


def _load(name: str, file: Path | None, limit: int | None) -> list[Question]:
    if file is None:
        source = hub.Source(FLASHRAG, name, REVISION, ("id", "question", "golden_answers"),
                            f"give a local file, {name}=FILE, or leave it out")
        records: Iterable[tuple[str, Any]] = hub.rows(source, SPLITS[name], limit or QUESTIONS)
    else:
        records = question_records(file)
    read = list(parse_questions(records))  # also what `limit` leaves out: a broken file is refused as a whole
    for where, question in read:
        bare = not asks(question.question)
        if file and bare and (name not in SPLITS or count(question.question) < 2):
            _refuse(where, question, name)
    questions = [_marked(question) for _, question in read][:limit]
    if len(questions) < 2:
        raise InputError(f"{file or name}: {len(questions)} question, and two are asked at once; give more")
    if without := sum(not asks(question.question) for _, question in read[:limit]):
        note(f"benchmark {name}: {without} of {len(questions)} questions come without a question mark; it is put "
             f"behind those that don't end as a sentence does")
    return questions


def _refuse(where: str, question: Question, name: str) -> None:
    text = question.question if len(question.question) <= 60 else question.question[:57] + "..."
    sample = "" if name in SPLITS else f", or, if the file is a sample of {', '.join(SPLITS)}, give it as NAME=FILE"
    raise InputError(f"{where}, id {question.id!r}: no question mark in {text!r}; ask a question there{sample}")


def _marked(question: Question) -> Question:
    """The question with a mark behind it if there is none anywhere and it doesn't end as a sentence does."""
    text = question.question
    if asks(text) or ends(text):
        return question
    return replace(question, question=text + "?")
