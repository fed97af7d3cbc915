"""Which tokenizer a path means: ours, of a `.tiktoken` file, or a published checkpoint's; which dtype weights get."""

from __future__ import annotations

from pathlib import Path

from data import InputError
from data.weights.tokenizer import NANO_RANKS, Tokenizer, read_ranks


def load_tokenizer(path: str | Path = NANO_RANKS) -> Tokenizer:
    """The tokenizer of a `.tiktoken` file, or of a folder: one around such a file, or a published checkpoint's.

    A file has tiktoken's form, a line a rank: base64 of the bytes, a space, the rank. InputError if it isn't so.
    """
    path = Path(path)
    if path.is_dir():
        if len(stored := list(path.glob("*.tiktoken"))) != 1 or any(path.glob("tokenizer*.json")):
            from data.weights.published import load_published  # loads `tokenizers`

            return load_published(path)
        path = stored[0]
    return Tokenizer(read_ranks(path), path.stem)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """InputError if an id that text or prompts can give has no row among the `rows` of an embedding."""
    if tokenizer.needed > rows:
        raise InputError(f"tokenizer {tokenizer.name}: its ids go up to {tokenizer.needed - 1}, the model's "
                         f"embedding has {rows} rows; give the tokenizer and the weights of one checkpoint")


def choose_dtype(c, device) -> str:
    """--dtype; auto is bfloat16 where weights are frozen and the hardware multiplies it, and float32 elsewhere, where
    it would be emulated and slower."""
    import torch

    if c.dtype != "auto":
        return c.dtype
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if c.lora_rank and fast else "float32"
