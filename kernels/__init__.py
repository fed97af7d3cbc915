"""The operations that dominate the method: memory_attention, memory_decode, linear_logprob, grpo_loss, the last two in
one sweep (linear_grpo_loss), draw, and what lies between the products of a block (fused).

The file of each holds a Triton kernel and, beside it, the PyTorch reference with the same signature. One place decides
which of them runs: the kernel on CUDA, the reference elsewhere; MEMTRAIN_KERNELS=torch or =triton forces a side
(triton on a CPU needs TRITON_INTERPRET=1, which is slow and meant for tests). fp64 always goes to the reference:
checks are made with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton comes for Linux only: elsewhere the kernels are text and the references run
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), None


def use_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether tensors of `dtype` on `device` go to the kernels. ValueError if MEMTRAIN_KERNELS can't be honoured."""
    forced = os.environ.get("MEMTRAIN_KERNELS", "")
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"MEMTRAIN_KERNELS={forced}: choose torch or triton, or leave it unset")
    if forced == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("MEMTRAIN_KERNELS=triton: there is no CUDA device; set TRITON_INTERPRET=1 to interpret the "
                         "kernels, or leave it unset")
    if forced == "triton" and tl is None:
        raise ValueError("MEMTRAIN_KERNELS=triton: Triton is not installed; leave it unset")
    wanted = forced == "triton" or (not forced and device.type == "cuda" and tl is not None)
    return wanted and dtype != torch.float64


def input_precision(dtype: torch.dtype) -> str:
    """How the kernels multiply tiles of `dtype`, in Triton's words. fp32 as torch is told to (--tf32): "high" is one
    product of TF32, "highest" three. 16-bit tiles are multiplied as they are, which is "high"."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def kernels_in_use(device: torch.device) -> str:
    """One line for the header of a run."""
    return "Triton" if use_triton(device) else "PyTorch references"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use; what runs on no card fits the smallest."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if _card(device) else 99 << 10


def multiprocessors(device: torch.device) -> int:
    """How many of them the card has; 4 stand for one where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if _card(device) else 4


def _card(device: torch.device) -> bool:
    """Whether there is a card behind `device`: tests pretend to have one."""
    return device.type == "cuda" and torch.cuda.is_available()


def operator(shapes: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorates a function that launches kernels: it becomes the operator memtrain::FILE_NAME of torch.library.

    `shapes` takes the same arguments and returns empty outputs, so that a whole step can be tried on tensors that have
    a shape and a device but no data, as tests/fake_card.py does, or traced by torch.compile. mutates: arguments that
    it writes to.
    """
    def make(launch):
        name = f"memtrain::{launch.__module__.rpartition('.')[2]}_{launch.__name__.strip('_')}"
        made = torch.library.custom_op(name, launch, mutates_args=mutates)
        made.register_fake(shapes)
        return made
    return make


def synchronise(device: torch.device) -> None:
    """Waits for what the device was told to do: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
