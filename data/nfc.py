"""NFC as the `tokenizers` library computes it, in linear time.

Python's own differs in two ways. It sorts runs of combining marks by insertion, which takes 80 s for 160,000 of them;
and it follows a newer Unicode: marks and compositions that came after version 9 don't exist for `tokenizers` 0.23.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

# What has a combining class or takes part in a composition since Unicode 10 (to 17): an ordinary character there, so
# that text falls into parts at it. Read off by normalising every code point with tokenizers 0.23.3.
NEWER = re.compile("([\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1add\u1ae0-\u1aeb"
                   "\u1df6-\u1dfa\ua82c\U000105c0-\U000105ff\U00010d24-\U00010d27\U00010d69-\U00010d6d\U00010eab"
                   "\U00010eac\U00010efa\U00010efb\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85"
                   "\U00011070\U0001133b\U00011380-\U000113e2\U0001145e\U00011839\U0001183a\U00011900-\U00011959"
                   "\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97\U00011f41"
                   "\U00011f42\U00016100-\U00016139\U00016d40-\U00016d79\U00016ff0\U00016ff1\U0001e08f"
                   "\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef\U0001e5ee\U0001e5ef"
                   "\U0001e6e3-\U0001e6f5])")
# Three Tibetan vowels are marks only once they are taken apart.
TIBETAN = {c: unicodedata.normalize("NFD", chr(c)) for c in (0xF73, 0xF75, 0xF81)}


@cache
def _marks() -> re.Pattern:
    """Runs of combining marks; all of them lie in the first 2^17 code points."""
    return re.compile("[" + "".join(c for c in map(chr, range(0x300, 0x20000)) if unicodedata.combining(c)) + "]{32,}")


def nfc(text: str) -> str:
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    parts = NEWER.split(text.translate(TIBETAN))
    for i in range(0, len(parts), 2):
        # already in order, a run costs Python nothing more
        ordered = _marks().sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), parts[i])
        parts[i] = unicodedata.normalize("NFC", ordered)
    return "".join(parts)
