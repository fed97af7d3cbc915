"""Checkpoints: one safetensors file with weights, optimiser and state; no pickle anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import InputError
from data.tokenizer import Tokenizer


def save_checkpoint(path: Path, model: nn.Module, tokenizer: Tokenizer, state: dict, optimizers=()) -> None:
    """Weights, optimiser and state in one safetensors file, so that they can never disagree; the state also beside
    it as JSON, to read. Written under a temporary name, then renamed."""
    tensors = {f"model.{k}": v.detach().contiguous() for k, v in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v).contiguous() for k, v in slots.items()}
    state = {"format": 1, "tokenizer": tokenizer.fingerprint, "model": model.fields} | state
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    os.replace(temporary, path)
    write_json(path.with_suffix(".json"), state)


def load_checkpoint(path: Path, model: nn.Module, tokenizer: Tokenizer, optimizers=()) -> dict:
    """Fills model (and optimisers) and returns the state. InputError if the file is damaged or does not fit."""
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as e:
        raise InputError(f"checkpoint {path}: can't be read ({e}); give another --init or delete it") from None
    if state.get("format") != 1:
        raise InputError(f"checkpoint {path}: not written by this version of memtrain; give another --init")
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
    # adapters may be absent: a base without LoRA starts them at zero
    if missing := [k for k in own if k not in weights and ".lora_" not in k]:
        raise InputError(f"checkpoint {path}: tensor {missing[0]} is missing; give a complete checkpoint")
    model.load_state_dict(weights, strict=False)
    for o, optimizer in enumerate(optimizers):
        slots: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, key = name.split(".", 3)
                slots.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def write_json(path: Path, value) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
