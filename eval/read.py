"""Reading a text of any length with a memory: the paper's loop on a file or on standard input.

    read(agent, source, questions, out) prints the memory after each section, then the answers.

A text is cut into sections of the window's size at line ends, a conversation at its turns.

The problem stands in every turn of the loop, so a memory is of one question: several questions are several readings.
Only prompts that do not show it while reading, those of a fork, let one reading answer all.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import regex
from lxml import etree
from tqdm import tqdm

from data import InputError
from data.run.files import output, write_json
from data.run.terminal import printable
from data.tasks import split_sections
from data.text.conversations import chat, joined, speaking
from data.text.files import encoding

EXPORT = re.compile(r"\ufeff?\s*(\[\s*)*\{\s*\"")  # JSON: objects, alone or in lists
WITHOUT_QUESTION = "What are the main facts?"
MAGIC = {b"%PDF": "a PDF; extract its text first, for example with pdftotext",
         **dict.fromkeys((b"%!PS", b"%!\n", b"%!\r"), "PostScript; extract its text first, for example with ps2ascii"),
         b"From: <Saved by": "a browser's archive of a page (MHTML); save the page as HTML",
         b"{\\rtf": "RTF; save it as text first",
         b"PK\x03\x04": "a zip archive or an office document; save it as text first",
         b"\x1f\x8b": "packed with gzip; unpack it first: zcat FILE | python memtrain.py read -"}
PART = re.compile(r".{1,8192}(?!\S)|.{1,8192}")  # of a line that is longer
VISIBLE = regex.compile(r"[\p{L}\p{N}\p{P}\p{S}--\p{Default_Ignorable_Code_Point}]", regex.V1)
# What browsers take for HTML: its doctype or first elements, behind comments and <?xml ...?>. Other XML is text.
HTML = regex.compile(r"\s*(?:<\?[^>]*>\s*|<!--.*?-->\s*)*+"
                     r"<(?:!doctype\s+html|(?:html|head|body|title|meta|script|style|link|base)\b)", regex.I | regex.S)
UNSEEN = re.compile(r"(?i)display\s*:\s*none|visibility\s*:\s*hidden")
HIDDEN = {"script", "style", "template", "noscript", "head", "title", "audio", "canvas", "datalist", "iframe", "video"}
INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "em", "i", "kbd", "mark", "q", "s", "samp", "small", "span",
          "strong", "sub", "sup", "time", "u", "var", "wbr"}


def visible(name: str, page: str) -> list[str]:
    """The text that HTML shows, a line a block, parsed by libxml2; nothing in it is run or followed. InputError where
    its elements lie deeper than libxml2 goes, 2,048: it would leave out the rest."""
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    root, shown = etree.fromstring((page + "\n<p>").encode(), parser), []  # of nothing at all there is no tree
    if root is None:
        return []
    if any(error.type_name == "ERR_RESOURCE_LIMIT" for error in parser.error_log):
        raise InputError(f"{name}: HTML with too many elements in each other; save the page as text first")
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        border = "" if element.tag in INLINE else "\n"
        text = element.text if event == "start" else element.tail
        if event == "start" and (element.tag in HIDDEN or "hidden" in element.attrib
                                 or UNSEEN.search(element.get("style", ""))):
            walk.skip_subtree()
            text = ""
        shown += [border, (text or "").replace("\n", " ")]
    return [line.strip() for line in "".join(shown).split("\n")]


def lines_of(name: str) -> tuple[list[str], set[str]]:
    """(the lines of a text, markdown or HTML file, or of standard input ("-"), without those that show nothing; who
    speaks, where they are the turns of a conversation). InputError if it is missing, binary, or has no visible text: an
    answer would come from nothing."""
    if name == "-" and sys.stdin is None:
        raise InputError("-: standard input is closed; give a text file, or a text on standard input")
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = content.decode(encoding(content[:4]))
    except OSError as e:
        raise InputError(f"{name}: can't be read ({e.strerror}); give a text file, or - for standard input") from None
    except UnicodeDecodeError as e:
        content, text, bad = content[:100], "", e.start
    start = content.removeprefix(codecs.BOM_UTF8).lstrip(b"\x04 \t\r\n\f\v")  # a printer's Ctrl-D
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise InputError(f"{name}: {what}")
    if content and not text:
        raise InputError(f"{name}: neither UTF-8 nor UTF-16 with its mark, at byte {bad}; save the file as UTF-8")
    if "\0" in text:
        raise InputError(f"{name}: binary, there is a NUL byte in it; give a text file in UTF-8")
    speakers: set[str] = set()
    if EXPORT.match(text):
        turns = chat(name, text)
        lines, speakers = [f"{who}: {said}" for who, said in turns], {who for who, _ in turns}
    elif HTML.match(text) or Path(name).suffix.lower() in (".html", ".htm", ".xhtml"):
        lines = visible(name, text)
    else:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if speakers := speaking(lines):
            lines = list(joined(name, lines, speakers))
    shown = [part.strip() for line in lines for part in PART.findall(line) if VISIBLE.search(part)]
    if not shown:
        raise InputError(f"{name}: empty, there is no visible text in it; give a text")
    return shown, speakers


def read(agent, name: str, questions: Sequence[str], out: Path | None, interrupt=None) -> None:
    """Reads, prints and, with `out`, writes a JSON list: {"section", "tokens", "memory"} of each, then {"question",
    "answer", "response"}; so for each reading, one for each question. An interrupt ends the readings, not the answer.
    InputError on a bad text or place."""
    if out:
        output(out, inputs=[name])
    c, problems, entries = agent.c, list(questions) or [WITHOUT_QUESTION], []
    for problem in problems:
        if (need := agent.prompts.overhead(problem) + c.section + c.memory + c.response) > c.window:
            raise InputError(f"--question: with {problem!r:.60} a turn has {need} tokens, the window {c.window}; ask a "
                             f"shorter one")
    lines, speakers = lines_of(name)
    cut = split_sections(lines, agent.tokenizer, c.section)
    at_once = agent.prompts.update(problems[0], [], []) == agent.prompts.update(problems[-1], [], [])
    if len(problems) > 1:
        how = "one reading for all" if at_once else "one reading each, for a memory is of its question"
        print(f"{len(problems)} questions: {how}")
    if speakers:
        print(f"a conversation of {', '.join(map(printable, sorted(speakers)))}, cut at its turns")
    for asked in [problems] if at_once else [[p] for p in problems]:
        entries += _reading(agent, cut, asked, asked if questions else [], interrupt)
        if interrupt and interrupt.asked:
            break
    if out:
        write_json(out, entries)


def _reading(agent, cut: Sequence[list[int]], asked: Sequence[str], answered: Sequence[str], interrupt) -> list[dict]:
    """One pass over a text with the first problem in view; then the answers. The entries of `out`."""
    c, memory, entries = agent.c, agent.prompts.no_memory, []
    with tqdm(cut, desc="read", unit="section") as bar:
        for number, section in enumerate(bar, start=1):
            memory = agent.update(asked[0], section, memory, ("read", c.seed, number))
            shown = agent.tokenizer.decode(memory).strip()
            with bar.external_write_mode():
                print(f"section {number} ({len(section)} tokens):\n  {printable(shown)}", flush=True)
            entries.append({"section": number, "tokens": len(section), "memory": shown})
            if interrupt and interrupt.asked:
                break
    for question in answered:
        response, answer = agent.answer(question, memory, ("read", c.seed, "answer"))
        asks = f"{printable(question)}\n" if len(answered) > 1 else ""
        print(f"\n{asks}answer: {printable(answer if answer is not None else '(none in a box) ' + response.strip())}")
        entries.append({"question": question, "answer": answer, "response": response.strip()})
    return entries
