"""Conversations and stories in which facts change: bAbI, LoCoMo, LongMemEval's form, and chat exports.

    bAbI          .txt as published: numbered statements, questions among them with answer and supporting lines behind a
                  tab (in some copies a bar); a line numbered 1 begins a new story. What was said last counts
    LoCoMo        {sample_id, conversation: {session_N, session_N_date_time}, qa: [{question, answer, category}]}
    LongMemEval   {question_id, question_type, question, answer, question_date, haystack_dates, haystack_sessions}
    a chat        [{role, content}, ...] or [{speaker, text}, ...], content also as parts, [{type, text}, ...]; lines
                  "Name: text"

Forms are recognised by their content. Whatever is wrong ends in InputError: one line with the file and the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import regex

from data import InputError
from data.text.files import set_name

CATEGORIES = {1: "multi-hop", 2: "time", 3: "world knowledge", 4: "single-hop", 5: "unanswerable"}  # LoCoMo's
LOCOMO = "locomo: "  # before the category in a question's kind
REFUSALS = ("not mentioned", "no information available")  # what its authors take for a refusal
DATES = ("%I:%M %p on %d %B, %Y", "%Y/%m/%d %H:%M")  # LoCoMo's, LongMemEval's without the weekday
STATEMENT = re.compile(r"(\d+) (\S.*)")
TURN = regex.compile(r"(\w[\w .'’-]{0,39}+)(?:: +|：\s*)(\S.*)")


@dataclass(frozen=True)
class Told:
    """A question about lines that have an order, (who or what, text) each."""

    id: str
    question: str
    answers: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]
    kind: str


# ---- bAbI --------------------------------------------------------------------------------------------------------


def babi(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Told]]:
    """lines: (number in the file, text). Each question with the statements of its story before it."""
    story, last, stories = [], 0, 0
    kind = set_name(path)
    for number, line in lines:
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        found = STATEMENT.fullmatch(line.strip())
        if not found:
            raise InputError(f"{where}: no bAbI line; a line is a number, a space and a statement, or a question with "
                             f"a tab, its answer, a tab and the supporting lines")
        said, *rest = (part.strip() for part in re.split(r"[\t|]", found[2]))
        if (at := int(found[1])) == 1:
            story, stories = [], stories + 1
        elif at <= last or not stories:
            raise InputError(f"{where}: line {at} of a story follows line {last}; lines of a story count up from 1")
        last = at
        if not rest and not said.endswith("?"):
            story.append(("", said))
        elif not story or not any(rest[:1]):
            raise InputError(f"{where}: a question without " + ("an answer" if story else "a statement before it"))
        else:
            yield where, Told(f"{kind}-{stories}-{at}", said, (rest[0],), tuple(story), kind)


# ---- conversations with questions --------------------------------------------------------------------------------


def expand(where: str, record: Any) -> Iterator[tuple[str, Any]]:
    """The questions of one record: those of a conversation as Told, a record of another form as it is."""
    if isinstance(record, dict) and "conversation" in record and "qa" in record:
        yield from _locomo(where, record)
    elif isinstance(record, dict) and "haystack_sessions" in record:
        yield _longmemeval(where, record)
    else:
        yield where, record


def _locomo(where: str, record: dict) -> Iterator[tuple[str, Told]]:
    conversation, lines, dates = _need(where, record, "conversation", dict), [], []
    numbers = sorted(int(k.split("_")[1]) for k, v in conversation.items()
                     if re.fullmatch(r"session_\d+", k) and v is not None)  # parquet has every column in every row
    if not numbers:
        raise InputError(f"{where}: a conversation without session_1; LoCoMo has session_N and session_N_date_time")
    for n in numbers:
        place, date = f"{where}, session_{n}", _need(where, conversation, f"session_{n}_date_time", str)
        dates.append(_date(place, date))
        if len(dates) > 1 and dates[-1] < dates[-2]:
            raise InputError(f"{place}: {date} lies before session_{numbers[len(dates) - 2]}; sessions go by date")
        lines += [(f"Session {n}", date), *turns(place, _need(where, conversation, f"session_{n}", list), False)]
    _two_speakers(where, [t for t in lines if not t[0].startswith("Session ")])
    sample = str(record.get("sample_id", where))
    for i, qa in enumerate(_need(where, record, "qa", list), start=1):
        place = f"{where}, question {i}"
        if not isinstance(qa, dict) or qa.get("category") not in list(CATEGORIES):
            raise InputError(f"{place}: `category` must be one of 1 to 5")
        refuse = qa["category"] == 5
        answer = REFUSALS if refuse else (_answer(place, qa),)
        if qa["category"] == 3:  # its authors count what stands before the semicolon
            answer = (answer[0].partition(";")[0].strip(),)
        yield place, Told(f"{sample}-{i}", _need(place, qa, "question", str), answer, tuple(lines),
                          LOCOMO + CATEGORIES[qa["category"]])


def _longmemeval(where: str, record: dict) -> tuple[str, Told]:
    sessions, dates = (_need(where, record, f"haystack_{k}", list) for k in ("sessions", "dates"))
    if not sessions or len(dates) != len(sessions):
        raise InputError(f"{where}: {len(sessions)} haystack_sessions and {len(dates)} haystack_dates; one each is "
                         f"needed")
    known = [_date(f"{where}, haystack_dates[{i}]", d) for i, d in enumerate(dates)]
    lines = []
    for i, session in enumerate(sessions):
        if i and known[i] < known[i - 1]:
            raise InputError(f"{where}: haystack_dates[{i}], {dates[i]}, lies before the one before it; sort the "
                             f"sessions by date")
        lines += [(f"Session {i + 1}", dates[i]), *turns(f"{where}, haystack_sessions[{i}]", session, False)]
    _two_speakers(where, [t for t in lines if not t[0].startswith("Session ")])
    id, kind = (_need(where, record, k, str) for k in ("question_id", "question_type"))
    asked, day = (_need(where, record, k, str) for k in ("question", "question_date"))
    _date(where, day)
    return where, Told(id, f"{asked} (asked {day})", (_answer(where, record),), tuple(lines),
                       kind + " without an answer" * id.endswith("_abs"))


def _need(where: str, record: dict, key: str, kind: type) -> Any:
    if not isinstance(record.get(key), kind):
        what = {str: "a text", list: "a list", dict: "an object"}[kind]
        raise InputError(f"{where}: `{key}` " + (f"must be {what}" if key in record else "is missing"))
    if kind is str and not record[key].strip():
        raise InputError(f"{where}: `{key}` is empty; leave it out")
    return record[key]


def _answer(where: str, record: dict) -> str:
    """A text, or a number: LoCoMo has years."""
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int) or not str(answer).strip():
        raise InputError(f"{where}: `answer` must be a text, not {answer!r:.40}")
    return str(answer)


def _date(where: str, text: Any) -> datetime:
    plain = " ".join(re.sub(r"\(\w+\)", " ", text).split()) if isinstance(text, str) else ""
    for form in DATES:
        try:
            return datetime.strptime(plain, form)
        except ValueError:
            continue
    raise InputError(f"{where}: {text!r:.40} is no date like 1:56 pm on 8 May, 2023 or 2023/05/20 (Sat) 02:21")


# ---- turns -------------------------------------------------------------------------------------------------------


def turns(where: str, items: list, alone: bool = True) -> list[tuple[str, str]]:
    """(who, text) of [{role, content}, ...] or [{speaker, text}, ...]. alone: this is the whole conversation, which
    needs two speakers."""
    found = []
    for i, item in enumerate(items, start=1):
        keys = next(((a, b) for a, b in (("role", "content"), ("speaker", "text"))
                     if isinstance(item, dict) and a in item and b in item), None)
        if not keys:
            raise InputError(f"{where}, turn {i}: a turn is {{role, content}} or {{speaker, text}}")
        parts = item[keys[1]]
        if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
            item = item | {keys[1]: " ".join(p["text"] for p in parts)}  # as OpenAI's exports have it
        who, text = (_need(f"{where}, turn {i}", item, k, str) for k in keys)
        found.append((" ".join(who.split()), " ".join(text.split())))
    if alone:
        _two_speakers(where, found)
    return found


def _two_speakers(where: str, lines: list[tuple[str, str]]) -> None:
    if (found := len({who for who, _ in lines} - {"system"})) < 2:
        raise InputError(f"{where}: {found} speaker; a conversation has two or more")


def chat(name: str, text: str) -> list[tuple[str, str]]:
    """The turns of a JSON chat export. InputError where it is none, or one of them can't be read."""
    try:
        items = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        items = None
    if not isinstance(items, list):
        raise InputError(f"{name}: JSON, and no chat that can be read; give one list of {{role, content}} or "
                         f"{{speaker, text}}, or lines of text")
    return turns(name, items)


def speaking(lines: list[str]) -> set[str]:
    """The speakers of lines "Name: text", if they are a conversation: the first line is a turn, most are turns, and few
    names come back. Empty otherwise."""
    found = [TURN.fullmatch(line) for line in lines]
    names = [turn[1] for turn in found if turn]
    few = 2 <= len(set(names)) <= max(2, len(names) // 3)
    return set(names) if few and found[0] and len(names) >= len(lines) / 2 else set()


def joined(name: str, lines: Iterable[str], speakers: set[str]) -> Iterator[str]:
    """Lines that no speaker begins belong to the turn before. InputError on an empty turn."""
    turn, count, bare = "", 0, {f"{who}:" for who in speakers}
    for line in chain(lines, [""]):
        begun = TURN.fullmatch(line)
        if turn and line and line not in bare and not (begun and begun[1] in speakers):
            turn += " " + line
            continue
        if turn in bare:
            raise InputError(f"{name}, turn {count}: {turn} and no text; leave it out")
        if turn:
            yield turn
        turn, count = line, count + 1
