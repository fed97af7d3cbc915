"""The question sets that search QA is evaluated on: the paper's seven from the hub, or local files.

    load_benchmarks("nq,hotpotqa=my/hotpot.json,my/triviaqa_dev.jsonl", limit=100) -> {name: [Question, ...]}

A benchmark is NAME (one of the seven, streamed from the hub in FlashRAG's form), NAME=FILE, or FILE, whose name is
then the file's without its ending and _train, _dev or _test; "all" is the seven. Files may have FlashRAG's form or
those of HotpotQA, 2WikiMultiHopQA and MuSiQue (data/text/corpus.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data import InputError
from data.text import hub
from data.text.corpus import Question, parse_questions, question_records
from data.text.files import set_name

# In the order of the paper's Table 2. Splits as search agents are commonly evaluated: test where there is one,
# else dev.
SPLITS = {"triviaqa": "test", "bamboogle": "test", "hotpotqa": "dev", "nq": "test", "popqa": "test",
          "2wikimultihopqa": "dev", "musique": "dev"}
FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
REVISION = "4086cd004e8433a77d553754be40fa2b76655a09"  # a commit by its maintainers; no hub was in reach to try it
QUESTIONS = 20_000  # more than any of the seven has (PopQA: 14,267)
FORM = f"give NAME, NAME=FILE or FILE, NAMEs from the hub being all or {', '.join(SPLITS)}"


def load_benchmarks(spec: str, limit: int | None = None) -> dict[str, list[Question]]:
    """The first `limit` questions (default: all) of each benchmark in `spec`, in its order.

    Raises InputError, with the file and the record, for what `load_questions` refuses (missing or empty answers, ids
    given twice, ...); also for a name given twice, one that is unknown, and fewer than two questions, for search QA
    asks two at once.
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
            found.append((set_name(Path(item)) or Path(item).stem, Path(item)))
        else:
            raise InputError(f"benchmarks {spec}: {item} is none of the seven and no file; {FORM}")
    return found


def _load(name: str, file: Path | None, limit: int | None) -> list[Question]:
    if file is None:
        source = hub.Source(FLASHRAG, name, REVISION, ("id", "question", "golden_answers"),
                            f"give a local file, {name}=FILE, or leave it out")
        records: Iterable[tuple[str, Any]] = hub.rows(source, SPLITS[name], limit or QUESTIONS)
    else:
        records = question_records(file)
    # all are read, also what `limit` leaves out: a broken file is refused as a whole
    questions = list(parse_questions(records))[:limit]
    if len(questions) < 2:
        raise InputError(f"{file or name}: {len(questions)} question, and two are asked at once; give more")
    return questions
