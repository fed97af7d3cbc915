"""Checkpoints: one safetensors file with weights, optimiser and state; no pickle anywhere.

A digest over state and tensors is checked at load. Beside the last checkpoint stay the one before and the one that
earned most in training.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import InputError
from data.run.files import replacing, second_name, write_json
from data.weights.tokenizer import Tokenizer

PREVIOUS, BEST = "previous.safetensors", "best.safetensors"


def digest(state: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256, in hex, over the state's JSON and every tensor's name, dtype, shape and bytes."""
    found = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        t = tensors[name]
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(t.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_checkpoint(path: Path, model: nn.Module, tokenizer: Tokenizer, state: dict, optimizers=(),
                    best: bool = False) -> None:
    """Weights, optimiser and state in one safetensors file, so that they can never disagree; the state also beside
    it as JSON, to read. Frozen weights are left out: the file then says whose adapters it holds. best: no checkpoint
    before was better. InputError where it can't be written; an earlier checkpoint is then intact."""
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    tensors = {f"model.{k}": v.detach().contiguous() for k, v in model.state_dict().items() if k not in frozen}
    for o, optimizer in enumerate(optimizers):
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v).contiguous() for k, v in slots.items()}
    state = {"format": 2, "tokenizer": tokenizer.fingerprint, "model": model.fields} | state
    if frozen:
        state["base"] = model.base_id
    text = json.dumps(state)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"state": text, "digest": digest(text, tensors)})
        except SafetensorError as e:  # its word for a full disk
            raise OSError(str(e)) from None
        # before the new one gets its name: whoever is killed in between does the step again, and this with it
        if best:
            second_name(temporary, path.with_name(BEST))
        if path.exists():
            second_name(path, path.with_name(PREVIOUS))
    write_json(path.with_suffix(".json"), state)


def load_checkpoint(path: Path, model: nn.Module, tokenizer: Tokenizer, optimizers=()) -> dict:
    """Fills model (and optimisers) and returns the state. InputError if the file is damaged or does not fit."""
    instead = "give another --init"
    if path.name != PREVIOUS and path.with_name(PREVIOUS).exists():
        instead = f"rename {PREVIOUS} beside it to {path.name} to go on from the one before"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        state = json.loads(text := metadata.get("state", "{}"))
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: no such file; {instead}") from None
    except (OSError, SafetensorError, ValueError) as e:
        raise InputError(f"checkpoint {path}: can't be read ({e}); {instead}, or delete it") from None
    if state.get("format") != 2:
        raise InputError(f"checkpoint {path}: not written by this version of memtrain; give another --init")
    if metadata.get("digest") != digest(text, tensors):
        raise InputError(f"checkpoint {path}: damaged, its content does not match its digest; {instead}, or delete it")
    if state["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"checkpoint {path}: made with tokenizer {state['tokenizer']}, this is "
                         f"{tokenizer.fingerprint}; train a base for it with --stages base")
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            differing = [k for k, v in model.fields.items() if state["model"].get(k) != v]
            raise InputError(f"checkpoint {path}: {name} has shape {list(tensor.shape)}, which does not fit "
                             f"(fields that differ: {', '.join(differing)}); give those values or train a base")
    adapters_only = "base" in state
    if adapters_only and state["base"] != model.base_id:
        raise InputError(f"checkpoint {path}: adapters of base {state['base']}, this is {model.base_id or 'none'}; "
                         f"give the --model or --init that they were trained on")
    if missing := [k for k in own if k not in weights and (".lora_" in k) == adapters_only]:
        raise InputError(f"checkpoint {path}: tensor {missing[0]} is missing; give a complete checkpoint")
    if not adapters_only:
        model.base_id = metadata["digest"][:16]
        model.reset_adapters()
    model.load_state_dict(weights, strict=False)
    for o, optimizer in enumerate(optimizers):
        slots: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, key = name.split(".", 3)
                slots.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return state
