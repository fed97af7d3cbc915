"""Reading a text of any length with a memory: the paper's loop on a file or on standard input, in constant memory.

    read(agent, source, questions, out) prints the memory after each section, then the answers.

The text is never held whole: it comes in pieces of 64 KB, is cut into sections of the window's size at line ends, and
what was read is forgotten but for the memory. A conversation is cut at its turns: lines "Name: text" come like any
text, a JSON list of {role, content} or {speaker, text} is held whole.

The problem stands in every turn of the loop, so a memory is of one question: several questions are several readings.
Only prompts that do not show it while reading, those of a fork, let one reading answer all.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data import InputError
from data.run.files import output, replacing
from data.run.terminal import printable
from data.tasks import sections
from data.text.conversations import chat, joined, speaking

DECODER = codecs.getincrementaldecoder("utf-8-sig")
PIECE, LINE = 1 << 16, 1 << 13  # bytes read at a time; characters after which a line is cut
EXPORT = re.compile(r"\ufeff?\s*(\[\s*)*\{\s*\"")  # JSON: objects, alone or in lists
WITHOUT_QUESTION = "What are the main facts?"
MAGIC = {b"%PDF": "a PDF; extract its text first, for example with pdftotext",
         b"PK\x03\x04": "a zip archive or an office document; save it as text first"}


class Text:
    """The lines of a text, markdown or HTML file, or of standard input ("-"), piece by piece.

    size: bytes in all, None where nobody knows; read: bytes so far. InputError if it is missing, empty or binary.
    """

    def __init__(self, name: str):
        self.name, self.size, self.read = name, None, 0
        path = Path(name)
        try:
            self.file: BinaryIO = sys.stdin.buffer if name == "-" else path.open("rb")
            if name != "-":
                self.size = os.fstat(self.file.fileno()).st_size or None
            self.first = self.file.read1(PIECE) if name == "-" else self.file.read(PIECE)
        except OSError as e:
            raise InputError(f"{name}: can't be read ({e.strerror}); give a text file, or - for standard "
                             f"input") from None
        for start, what in MAGIC.items():
            if self.first.startswith(start):
                raise InputError(f"{name}: {what}")
        if b"\0" in self.first:
            raise InputError(f"{name}: binary, there is a NUL byte in it; give a text file in UTF-8")
        if not self.first.strip():
            raise InputError(f"{name}: empty, not a word in it; give a text")
        text = self._decoded(DECODER(), self.first)
        start = self.first[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        self.html = start.startswith((b"<!doctype html", b"<html")) or path.suffix.lower() in (".html", ".htm")
        self.exported = EXPORT.match(text) is not None
        whole = text.split("\n")[:None if len(self.first) < PIECE else -1]  # the last line of a piece may be cut
        self.speakers = set() if self.html else speaking([line.strip() for line in whole if line.strip()])

    def _decoded(self, decoder, piece: bytes, final: bool = False) -> str:
        try:
            return decoder.decode(piece, final)
        except UnicodeDecodeError:
            raise InputError(f"{self.name}: not UTF-8 somewhere in bytes {self.read} to {self.read + len(piece)}; "
                             f"save the file with that encoding") from None

    def pieces(self) -> Iterator[str]:
        decoder, piece = DECODER(), self.first
        while piece:
            text = self._decoded(decoder, piece)
            self.read += len(piece)
            yield text
            piece = self.file.read1(PIECE) if self.name == "-" else self.file.read(PIECE)
        self._decoded(decoder, b"", final=True)

    def lines(self) -> Iterator[str]:
        """Lines without their end, blank ones left out, or the turns of a conversation; whatever is longer than LINE
        characters comes in parts. InputError where a chat export can't be read."""
        if self.exported:
            turns = chat(self.name, "".join(self.pieces()))
            self.speakers = {who for who, _ in turns}
            yield from (f"{who}: {text}" for who, text in turns)
        else:
            yield from joined(self.name, self._lines(), self.speakers) if self.speakers else self._lines()

    def _lines(self) -> Iterator[str]:
        pieces, rest = self.pieces(), ""
        for piece in visible(pieces) if self.html else pieces:
            *whole, rest = (rest + piece).split("\n")
            while len(rest) > LINE:
                cut = rest.rfind(" ", LINE // 2, LINE) + 1 or LINE
                whole, rest = [*whole, rest[:cut]], rest[cut:]
            yield from filter(None, map(str.strip, whole))
        if rest.strip():
            yield rest.strip()


class _Visible(HTMLParser):
    """What a browser would show of HTML, block by block; nothing in it is run or followed."""

    HIDDEN, INLINE = {"script", "style", "template", "noscript", "head"}, {
        "a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "i", "kbd", "mark", "q", "s", "samp", "small", "span",
        "strong", "sub", "sup", "time", "u", "var", "wbr"}

    def __init__(self):
        super().__init__(convert_charrefs=False)
        self.hidden, self.shown = "", []

    def handle_starttag(self, tag, attrs):
        if tag in self.HIDDEN and not self.hidden:
            self.hidden = tag
        if tag not in self.INLINE:
            self.shown.append("\n")

    def handle_endtag(self, tag):
        if tag == self.hidden or (self.hidden == "head" and tag == "body"):
            self.hidden = ""
        if tag not in self.INLINE:
            self.shown.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.shown.append(" ".join(data.split("\n")))

    def handle_entityref(self, name):
        self.handle_data(unescape(f"&{name};"))

    def handle_charref(self, name):
        self.handle_data(unescape(f"&#{name};"))


def visible(pieces: Iterable[str]) -> Iterator[str]:
    """The text that HTML shows, a line a block. An unclosed tag is dropped once it is longer than a piece."""
    parser = _Visible()
    for piece in pieces:
        parser.feed(piece)
        if len(parser.rawdata) > PIECE:
            parser.rawdata = ""
        yield "".join(parser.shown)
        parser.shown.clear()
    parser.close()
    yield "".join(parser.shown)


def read(agent, name: str, questions: Sequence[str], out: Path | None, interrupt=None) -> None:
    """Reads, prints and, with `out`, writes a JSON list: {"section", "tokens", "memory"} of each, then {"question",
    "answer", "response"}; so for each reading, one for each question. An interrupt ends the readings, not the answer.
    InputError on a bad text or place, or where standard input would be read twice."""
    if out:
        output(out, inputs=[name])
    c, problems = agent.c, list(questions) or [WITHOUT_QUESTION]
    for problem in problems:
        if (need := agent.prompts.overhead(problem) + c.section + c.memory + c.response) > c.window:
            raise InputError(f"--question: with {problem!r:.60} a turn has {need} tokens, the window {c.window}; ask a "
                             f"shorter one")
    at_once = agent.prompts.update(problems[0], [], []) == agent.prompts.update(problems[-1], [], [])
    readings = [problems] if at_once else [[p] for p in problems]
    if len(readings) > 1 and name == "-":
        raise InputError(f"--question: {len(readings)} questions are as many readings, and standard input can be read "
                         f"once; give a file")
    text = Text(name)
    with ExitStack() as stack:
        write = stack.enter_context(_list(out)) if out else lambda entry: None
        if len(problems) > 1:
            how = "one reading for all" if at_once else "one reading each, for a memory is of its question"
            print(f"{len(problems)} questions: {how}")
        for asked in readings:
            _reading(agent, text, asked, asked if questions else [], write, interrupt)
            if interrupt and interrupt.asked:
                break
            text = Text(name) if asked is not readings[-1] else text


def _reading(agent, text: Text, asked: Sequence[str], answered: Sequence[str], write, interrupt) -> None:
    """One pass over a text with the first problem in view; then the answers."""
    c, memory, told = agent.c, agent.prompts.no_memory, False
    with tqdm(total=text.size, desc="read", unit="B", unit_scale=True) as bar:
        for number, section in enumerate(sections(text.lines(), agent.tokenizer, c.section), start=1):
            memory = agent.update(asked[0], section, memory, ("read", c.seed, number))
            shown = agent.tokenizer.decode(memory).strip()
            bar.update(text.read - bar.n)
            with bar.external_write_mode():
                if text.speakers and not told:
                    print(f"a conversation of {', '.join(map(printable, sorted(text.speakers)))}, cut at its turns")
                told = True
                print(f"section {number} ({len(section)} tokens):\n  {printable(shown)}", flush=True)
            write({"section": number, "tokens": len(section), "memory": shown})
            if interrupt and interrupt.asked:
                break
    for question in answered:
        response, answer = agent.answer(question, memory, ("read", c.seed, "answer"))
        asks = f"{printable(question)}\n" if len(answered) > 1 else ""
        print(f"\n{asks}answer: {printable(answer if answer is not None else '(none in a box) ' + response.strip())}")
        write({"question": question, "answer": answer, "response": response.strip()})


class _list:
    """A JSON list written entry by entry, in constant memory; it gets its name when it is complete."""

    def __init__(self, path: Path):
        self.replacing, self.count = replacing(path), 0

    def __enter__(self):
        self.path = self.replacing.__enter__()
        self.path.write_text("[", encoding="utf-8")
        return self

    def __call__(self, entry: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write((",\n" if self.count else "\n") + json.dumps(entry))
        self.count += 1

    def __exit__(self, *error):
        if error[0] is None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n]\n")
        return self.replacing.__exit__(*error)
