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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import regex
from lxml import etree
from tqdm import tqdm

from data import InputError
from data.run.files import output, replacing
from data.run.terminal import printable
from data.tasks import sections
from data.text.conversations import chat, joined, speaking
from data.text.files import encoding

PIECE, LINE = 1 << 16, 1 << 13  # bytes read at a time; characters after which a line is cut
EXPORT = re.compile(r"\ufeff?\s*(\[\s*)*\{\s*\"")  # JSON: objects, alone or in lists
WITHOUT_QUESTION = "What are the main facts?"
MAGIC = {b"%PDF": "a PDF; extract its text first, for example with pdftotext",
         **dict.fromkeys((b"%!PS", b"%!\n", b"%!\r"), "PostScript; extract its text first, for example with ps2ascii"),
         b"From: <Saved by": "a browser's archive of a page (MHTML); save the page as HTML",
         b"{\\rtf": "RTF; save it as text first",
         b"PK\x03\x04": "a zip archive or an office document; save it as text first",
         b"\x1f\x8b": "packed with gzip; unpack it first: zcat FILE | python memtrain.py read -"}
# What browsers take for HTML: its doctype or first elements, behind comments and <?xml ...?>. Other XML is text.
HTML = regex.compile(r"\s*(?:<\?[^>]*>\s*|<!--.*?-->\s*)*+"
                     r"<(?:!doctype\s+html|(?:html|head|body|title|meta|script|style|link|base)\b)", regex.I | regex.S)
UNSEEN = re.compile(r"(?i)display\s*:\s*none|visibility\s*:\s*hidden")
VISIBLE = regex.compile(r"[\p{L}\p{N}\p{P}\p{S}--\p{Default_Ignorable_Code_Point}]", regex.V1)


class Text:
    """The lines of a text, markdown or HTML file, or of standard input ("-"), piece by piece.

    size: bytes in all, None where nobody knows; read: bytes so far. InputError if it is missing, binary, or has no
    visible text.
    """

    def __init__(self, name: str):
        self.name, self.size, self.read = name, None, 0
        path = Path(name)
        if name == "-" and sys.stdin is None:
            raise InputError("-: standard input is closed; give a text file, or a text on standard input")
        try:
            self.file: BinaryIO = sys.stdin.buffer if name == "-" else path.open("rb")
            if name != "-":
                self.size = os.fstat(self.file.fileno()).st_size or None
        except OSError as e:
            raise self._unreadable(e) from None
        self.first = self._piece()
        start = self.first.removeprefix(codecs.BOM_UTF8).lstrip(b"\x04 \t\r\n\f\v")  # a printer's Ctrl-D
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise InputError(f"{name}: {what}")
        self.coded = encoding(self.first)
        text = self._decoded(self._decoder(), self.first)
        self.html = bool(HTML.match(text)) or path.suffix.lower() in (".html", ".htm", ".xhtml")
        self.exported = EXPORT.match(text) is not None
        whole = text.split("\n")[:None if len(self.first) < PIECE else -1]  # the last line of a piece may be cut
        self.speakers = set() if self.html else speaking([line.strip() for line in whole if line.strip()])

    def _unreadable(self, e: OSError) -> InputError:
        return InputError(f"{self.name}: can't be read ({e.strerror}); give a text file, or - for standard input")

    def _piece(self) -> bytes:
        try:
            return self.file.read1(PIECE) if self.name == "-" else self.file.read(PIECE)
        except OSError as e:
            raise self._unreadable(e) from None

    def _decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder(self.coded)()

    def _decoded(self, decoder: codecs.IncrementalDecoder, piece: bytes, final: bool = False) -> str:
        try:
            text = decoder.decode(piece, final)
        except UnicodeDecodeError:
            raise InputError(f"{self.name}: neither UTF-8 nor UTF-16 with its mark, somewhere in bytes {self.read} to "
                             f"{self.read + len(piece)}; save the file as UTF-8") from None
        if "\0" in text:
            raise InputError(f"{self.name}: binary, there is a NUL byte in it; give a text file in UTF-8")
        return text

    def pieces(self) -> Iterator[str]:
        decoder, piece = self._decoder(), self.first
        while piece:
            text = self._decoded(decoder, piece)
            self.read += len(piece)
            yield text
            piece = self._piece()
        self._decoded(decoder, b"", final=True)

    def lines(self) -> Iterator[str]:
        """Lines without their end, or the turns of a conversation, those that show nothing left out; whatever is longer
        than LINE characters comes in parts. InputError where a chat export can't be read, and at the end of a text in
        which nothing is to be seen: an answer would come from nothing."""
        seen = False
        for line in filter(VISIBLE.search, self._told()):
            seen = True
            yield line
        if not seen:
            raise InputError(f"{self.name}: empty, there is no visible text in it; give a text")

    def _told(self) -> Iterator[str]:
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


class _Shown:
    """What a browser would show of HTML, block by block, from the parser's events; nothing in it is run or followed."""

    HIDDEN, INLINE = {
        "script", "style", "template", "noscript", "head", "title", "audio", "canvas", "datalist", "iframe", "video"}, {
        "a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "i", "kbd", "mark", "q", "s", "samp", "small", "span",
        "strong", "sub", "sup", "time", "u", "var", "wbr"}

    def __init__(self):
        self.hidden, self.shown = 0, []  # hidden: how many elements deep

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        styled = UNSEEN.search(attributes.get("style") or "")
        self.hidden += bool(self.hidden or tag in self.HIDDEN or "hidden" in attributes or styled)
        self._border(tag)

    def end(self, tag: str) -> None:
        self.hidden -= bool(self.hidden)
        self._border(tag)

    def _border(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.shown.append("\n")

    def data(self, text: str) -> None:
        if not self.hidden:
            self.shown.append(" ".join(text.split("\n")))

    def close(self) -> str:
        """All that was shown since the last call."""
        text = "".join(self.shown)
        self.shown.clear()
        return text


def visible(pieces: Iterable[str]) -> Iterator[str]:
    """The text that HTML shows, a line a block, parsed by libxml2 as it comes. In XHTML any element may end in "/>"."""
    shown = _Shown()
    parser = etree.HTMLParser(target=shown, huge_tree=True)
    parser.feed("\n")  # it would not close over nothing at all
    for piece in pieces:
        parser.feed(piece)
        yield shown.close()
    yield parser.close()


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
    found = sections(text.lines(), agent.tokenizer, c.section)
    first = next(found)  # where nothing is to be seen it is refused here, before anything is printed or written
    with tqdm(total=text.size, desc="read", unit="B", unit_scale=True) as bar:
        for number, section in enumerate(chain([first], found), start=1):
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


@contextmanager
def _list(path: Path) -> Iterator[Callable[[dict], None]]:
    """A JSON list written entry by entry, in constant memory; it gets its name when it is complete."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        before = "\n"

        def write(entry: dict) -> None:
            nonlocal before
            file.write(before + json.dumps(entry))
            before = ",\n"

        yield write
        file.write("\n]\n")
