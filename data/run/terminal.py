"""What a run says, and to whom: text from outside never reaches a terminal raw, and a run goes on when nobody listens.

Loads nothing heavy.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

from data import InputError

# Control characters but for tab and line feed, marks that turn the direction of writing, lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_END = re.compile("[\n\u2028\u2029]")


def printable(text: str) -> str:
    r"""`text` with what could steer a terminal, or turn a line around, spelled out: \x1b instead of an escape."""
    return UNPRINTABLE.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    r"""`text` as a message of one line: also what ends one, such as the \n in a file's name, is spelled out."""
    return LINE_END.sub(lambda m: m[0].encode("unicode_escape").decode(), printable(text))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of a table: the first column on the left, figures on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
        row[1:], widths[1:], strict=True))]).rstrip() for row in rows)


@cache
def note(text: str) -> None:
    """A line that a run says once, beside its progress bars."""
    from tqdm import tqdm

    tqdm.write(printable(f"note: {text}"))


class StrictParser(argparse.ArgumentParser):
    """Of a command line; what is wrong with one is an InputError."""

    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help lists the options")


class Lasting:
    """A stream whose reader may go away (a closed terminal, `| head`): from then on it writes to nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """The file behind the stream becomes /dev/null, for libraries that write there by themselves too."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def outlive_terminal() -> None:
    """Makes standard output and error last. One that was closed from the start is opened on /dev/null: else the next
    file opened would get its number, and what a library prints would end up in that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as we run)
        stream.reconfigure(errors="backslashreplace")  # a terminal of few letters is no reason to stop either
        setattr(sys, name, Lasting(stream))
