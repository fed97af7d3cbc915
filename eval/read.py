"""Reading a text of any length with a memory: the paper's loop on a file or on standard input, in constant memory.

    read(agent, source, question, out) prints the memory after each section, then the answer.

The text is never held whole: it comes in pieces of 64 KB, is cut into sections of the window's size at line ends, and
what was read is forgotten but for the memory.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import regex
from lxml import etree
from tqdm import tqdm

from data import InputError
from data.run.files import output, replacing
from data.run.terminal import printable
from data.tasks import sections
from data.text.files import encoding

PIECE, LINE = 1 << 16, 1 << 13  # bytes read at a time; characters after which a line is cut
WITHOUT_QUESTION = "What are the main facts?"
MAGIC = {b"%PDF": "a PDF; extract its text first, for example with pdftotext",
         b"%!": "PostScript; extract its text first, for example with ps2ascii",
         b"{\\rtf": "RTF; save it as text first",
         b"PK\x03\x04": "a zip archive or an office document; save it as text first",
         b"\x1f\x8b": "packed with gzip; unpack it first: zcat FILE | python memtrain.py read -"}
# What browsers take for HTML: its doctype or first elements, behind comments and XML's first line. Other XML is text.
HTML = regex.compile(r"\s*(?:<\?xml[^>]*>\s*|<!--.*?-->\s*)*+"
                     r"<(?:!doctype\s+html|(?:html|head|body|title|meta|script|style|link|base)\b)", regex.I | regex.S)
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
        start = self.first.removeprefix(codecs.BOM_UTF8).lstrip()
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise InputError(f"{name}: {what}")
        self.coded = encoding(self.first)
        head = self._decoded(self._decoder(), self.first)
        self.html = bool(HTML.match(head)) or path.suffix.lower() in (".html", ".htm", ".xhtml")

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
        """Lines without their end, those that show nothing left out; a line of over LINE characters comes in parts.
        InputError at the end of a text in which nothing can be seen: an answer would come from nothing."""
        seen, rest = False, ""
        for piece in visible(self.pieces()) if self.html else self.pieces():
            *whole, rest = (rest + piece).split("\n")
            while len(rest) > LINE:
                cut = rest.rfind(" ", LINE // 2, LINE) + 1 or LINE
                whole, rest = [*whole, rest[:cut]], rest[cut:]
            for line in filter(VISIBLE.search, whole):
                seen = True
                yield line.strip()
        if VISIBLE.search(rest):
            yield rest.strip()
        elif not seen:
            raise InputError(f"{self.name}: empty, there is no visible text in it; give a text")


class _Shown:
    """What a browser would show of HTML, block by block, from the parser's events; nothing in it is run or followed."""

    HIDDEN, INLINE = {"script", "style", "template", "noscript", "head", "title"}, {
        "a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "i", "kbd", "mark", "q", "s", "samp", "small", "span",
        "strong", "sub", "sup", "time", "u", "var", "wbr"}

    def __init__(self):
        self.hidden, self.shown = 0, []  # hidden: how many elements deep

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.hidden += bool(self.hidden or tag in self.HIDDEN or "hidden" in attributes)
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


def read(agent, name: str, question: str, out: Path | None, interrupt=None) -> None:
    """Reads, prints and, with `out`, writes a JSON list: {"section", "tokens", "memory"} of each, then {"question",
    "answer", "response"}. An interrupt ends the reading, not the answer. InputError on a bad text or place."""
    c, text = agent.c, Text(name)
    problem = question or WITHOUT_QUESTION
    if (need := agent.prompts.overhead(problem) + c.section + c.memory + c.response) > c.window:
        raise InputError(f"--question: with it a turn has {need} tokens, the window {c.window}; ask a shorter one")
    memory, answer = agent.prompts.no_memory, None
    with ExitStack() as stack:
        write = stack.enter_context(_list(out)) if out else lambda entry: None
        bar = stack.enter_context(tqdm(total=text.size, desc="read", unit="B", unit_scale=True))
        for number, section in enumerate(sections(text.lines(), agent.tokenizer, c.section), start=1):
            memory = agent.update(problem, section, memory, ("read", c.seed, number))
            shown = agent.tokenizer.decode(memory).strip()
            bar.update(text.read - bar.n)
            with bar.external_write_mode():
                print(f"section {number} ({len(section)} tokens):\n  {printable(shown)}", flush=True)
            write({"section": number, "tokens": len(section), "memory": shown})
            if interrupt and interrupt.asked:
                break
        bar.close()
        if question:
            response, answer = agent.answer(question, memory, ("read", c.seed, "answer"))
            print(f"\nanswer: {printable(answer if answer is not None else '(none in a box) ' + response.strip())}")
            write({"question": question, "answer": answer, "response": response.strip()})


class _list:
    """A JSON list written entry by entry, in constant memory; it gets its name when it is complete."""

    def __init__(self, path: Path):
        self.replacing, self.count = replacing(output(path)), 0

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
