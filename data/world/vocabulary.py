"""The vocabulary of our own decoders, and how it was made: `python -m data.world.vocabulary`."""

from __future__ import annotations

import argparse
import base64
import re
from pathlib import Path

from data import prompts as templates
from data.run.files import replacing
from data.weights.loading import load_tokenizer
from data.weights.tokenizer import NANO_RANKS, PATTERN
from data.world.miniwiki import MiniWorld


def tokenizer_text(words: int = 28_000) -> str:
    """Text that the mini-world tokenizer is trained on: passages, questions and prompts of training worlds."""
    fixed = [templates.UPDATE, templates.ANSWER, templates.DIRECT, templates.RECALL.format(), templates.MASK_PROBLEM,
             templates.NO_MEMORY, "Memory: Section:\n Text:\n", "\\boxed{ }", " [MASK] [TARGET] \n"]
    parts, count, seed = ["\n".join(fixed).replace("{{", "{").replace("}}", "}")] * 20, 0, 1000
    while count < words:
        world = MiniWorld(400, seed)
        for i, passage in enumerate(world.passages[seed % 17 :: 17]):
            parts += [passage.rendered, world.question(i).question]
            count += len(re.findall(r"\w+", parts[-1] + parts[-2]))
        seed += 1
    return "\n".join(parts)


def build(path: Path = NANO_RANKS, size: int = 1533) -> None:
    """Trains `size` ranks on mini-worlds of the training split and on the prompt templates."""
    from tiktoken._educational import bpe_train


    ranks = bpe_train(data=tokenizer_text(), vocab_size=size, pat_str=PATTERN, visualise=None)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r
                                       for t, r in sorted(ranks.items(), key=lambda i: i[1])))


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m data.world.vocabulary", description=build.__doc__).parse_args()
    build()
    print(f"{NANO_RANKS}: {load_tokenizer().size} ids")
