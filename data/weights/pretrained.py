"""Published checkpoints in and out: Qwen2/2.5, Qwen3 and Llama (SmolLM2) weights, and PEFT's adapters.

    read_shape(folder)             config.json -> the fields of the decoder's shape; needs no torch
    locate(name, revision)         a folder, or what the hub has under that name
    load_weights(folder, model)    safetensors, single or sharded, tensor by tensor straight to dtype and device
    load_adapter(folder, model)    PEFT's adapter files
    export_weights, export_adapter the same forms, for transformers and PEFT

What the decoder can't represent is refused by name. Tensor names differ in spelling only (NAMES): no tensor is
reshaped or permuted, the decoder rotates halves as these checkpoints do.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import InputError
from data.run.files import read_json, replacing, write_json, writing

if TYPE_CHECKING:
    import torch

FAMILIES = {  # model_type: what such a decoder has, and its class in transformers
    "llama": ({"qk_norm": False, "bias": False}, "LlamaForCausalLM"),
    "qwen2": ({"qk_norm": False, "bias": True}, "Qwen2ForCausalLM"),
    "qwen3": ({"qk_norm": True, "bias": False}, "Qwen3ForCausalLM"),
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of Llama 3
NAMES = {"embed": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output": "lm_head.weight"}
PARTS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj",
         "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm",
         "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json", "*.tiktoken")
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old checkpoints carry


def published(name: str) -> str:
    """blocks.3.q.weight -> model.layers.3.self_attn.q_proj.weight. KeyError for what only our decoder has."""
    if name in NAMES:
        return NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.{kind}"


# ---- Shape ---------------------------------------------------------------------------------------------------------


def read_shape(folder: Path) -> dict[str, Any]:
    """The fields of memtrain.Config's group `model` that folder/config.json says. InputError if it can't be read, or
    describes something else than this decoder: another architecture, sliding windows, experts, other scalings."""
    path = folder / "config.json"
    raw = read_json(path, "give a folder with config.json, tokenizer and safetensors as published")

    def refuse(bad: Any, what: str) -> None:
        if bad:
            raise InputError(f"{path}: {what}, which this decoder can't represent; give a Qwen2, Qwen3 or Llama "
                             f"checkpoint with full attention")

    family = raw.get("model_type")
    refuse(family not in FAMILIES, f"model_type {family!r}")
    refuse(any(k.startswith(("num_experts", "num_local_experts", "n_routed")) and raw[k] for k in raw), "experts (MoE)")
    refuse(raw.get("use_sliding_window") or (family == "llama" and raw.get("sliding_window")), "a sliding window")
    refuse(set(raw.get("layer_types") or []) - {"full_attention"}, f"layer_types {raw.get('layer_types')}")
    refuse(raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r}")
    refuse(raw.get("mlp_bias"), "mlp_bias")
    refuse(raw.get("attention_bias") and family != "qwen2", "attention_bias")
    refuse(raw.get("quantization_config"), "quantized weights")
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0)} | (raw.get("rope_scaling") or {}) | (
        raw.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse(kind not in ("default", "llama3"), f"rope scaling {kind!r}")
    refuse(rope.get("partial_rotary_factor", 1) != 1, "partial rotary positions")
    try:
        scaling = ",".join(f"{rope[k]:g}" for k in SCALING) if kind == "llama3" else ""
        heads = int(raw["num_attention_heads"])
        shape = {"width": int(raw["hidden_size"]), "layers": int(raw["num_hidden_layers"]), "heads": heads,
                 "key_heads": int(raw.get("num_key_value_heads") or heads),
                 "head_size": int(raw.get("head_dim") or raw["hidden_size"] // heads),
                 "hidden": int(raw["intermediate_size"]), "rope_theta": float(rope["rope_theta"]),
                 "rope_scaling": scaling, "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
                 "tied": bool(raw.get("tie_word_embeddings", False)), "vocab": int(raw["vocab_size"]),
                 "embed_norm": False}
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: {e.args[0]!r} is missing or malformed; download the checkpoint again") from None
    return shape | FAMILIES[family][0]


def locate(name: str, revision: str = "main") -> Path:
    """`name` as a folder, or downloaded from the hub (or taken from its cache). InputError if neither works."""
    if (path := Path(name)).is_dir():
        return path
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"--model {name}: no such folder; give the folder of a checkpoint, or owner/name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    wanted = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, etag_timeout=5))
    except Exception as e:  # many classes: no network, no such name, no such revision, no access
        raise InputError(f"--model {name}: revision {revision} can't be had from the hub ({type(e).__name__}); "
                         f"give the folder of a downloaded checkpoint instead") from None


# ---- Weights -------------------------------------------------------------------------------------------------------


def load_weights(folder: Path, model, device) -> None:
    """Fills the frozen (or trained) weights of `model`, built on the meta device, and moves the rest to `device`.

    Each tensor goes from the file straight to its dtype and device. Sets model.base_id, 16 hex digits over names,
    shapes and a sample of every tensor. InputError names the file and the tensor that is missing or does not fit.
    """
    import torch

    dtype, found, path = getattr(torch, model.c.dtype), hashlib.sha256(), folder / "config.json"
    own = {published(n): n for n, _ in model.named_parameters() if ".lora_" not in n}
    where = _shards(folder)
    for name in where.keys() - own.keys():
        if not HARMLESS.search(name) and not (name == "lm_head.weight" and model.c.tied):
            raise InputError(f"{where[name]}: tensor {name} has no place in the decoder of {path}; download the "
                             f"checkpoint again, or give one of another kind")
    if missing := sorted(own.keys() - where.keys()):
        raise InputError(f"{folder}: tensor {missing[0]} is in none of its files; download the checkpoint again")
    for file in sorted(set(where.values())):
        with _opened(file, str(device)) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name not in own:
                    continue
                tensor, place = tensors.get_tensor(name), _place(model, own[name])
                if tensor.shape != place[1].shape:
                    raise InputError(f"{file}: {name} has shape {list(tensor.shape)}, {path} says "
                                     f"{list(place[1].shape)}; download the checkpoint again")
                sample = tensor.reshape(-1)[::max(1, tensor.numel() // 64)].float().cpu().numpy()
                found.update(f"{name} {list(tensor.shape)}".encode() + sample.tobytes())
                setattr(place[0], own[name].rpartition(".")[2], torch.nn.Parameter(
                    tensor.to(dtype), requires_grad=not model.c.lora_rank))
    for m in model.adapted():
        for kind in ("lora_a", "lora_b"):
            setattr(m, kind, torch.nn.Parameter(torch.empty_like(getattr(m, kind), device=device)))
    model.to(device)  # the rotary frequencies
    model.reset_adapters()
    model.base_id = found.hexdigest()[:16]


def _place(model, name: str) -> tuple[Any, torch.Tensor]:
    """The module that holds parameter `name`, and the parameter."""
    module, _, leaf = name.rpartition(".")
    holder = model.get_submodule(module)
    return holder, getattr(holder, leaf)


def _shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it, from the index, or from the only file. InputError if a file is missing."""
    again = "download the checkpoint again"
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    listed = read_json(index, again).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
        raise InputError(f"{index}: no weight_map in it; {again}")
    for file in sorted(set(listed.values())):
        if Path(file).name != file:
            raise InputError(f"{index}: names {file!r}, which is not a file of this folder; {again}")
        with _opened(folder / file) as tensors:
            held = set(tensors.keys())
        if absent := sorted(n for n, f in listed.items() if f == file and n not in held):
            raise InputError(f"{index}: {file} does not hold {absent[0]}; {again}")
    return {name: folder / file for name, file in listed.items()}


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt", device=device)
    except (OSError, SafetensorError) as e:
        missing = "is missing" if not path.exists() else f"can't be read ({e})"
        raise InputError(f"{path}: {missing}; download the checkpoint again") from None
    with file:
        yield file


# ---- Adapters ------------------------------------------------------------------------------------------------------


def adapter_names(model) -> dict[str, str]:
    """Names of the adapters in PEFT's files -> ours."""
    kinds = {"lora_a": "lora_A", "lora_b": "lora_B"}
    names = {}
    for name, _ in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        if kind in kinds:
            names[f"base_model.model.{published(stem + '.weight').removesuffix('weight')}{kinds[kind]}.weight"] = name
    return names


def load_adapter(folder: Path, model) -> None:
    """Fills the adapters from adapter_config.json and adapter_model.safetensors. InputError if they belong to another
    base, or hold more than LoRA on the projections that the configuration names."""
    import torch

    path, c = folder / "adapter_config.json", model.c
    raw = read_json(path, "give the folder that PEFT's save_pretrained or memtrain's export wrote")

    def refuse(bad: Any, what: str, remedy: str) -> None:
        if bad:
            raise InputError(f"{path}: {what}; {remedy}")

    refuse(raw.get("peft_type") != "LORA", f"peft_type {raw.get('peft_type')!r}", "give a LoRA adapter")
    for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
                 "layers_to_transform"):
        refuse(raw.get(name), f"{name}, which is not supported", "give a plain LoRA adapter")
    refuse(raw.get("bias", "none") != "none", "trained biases", "give a plain LoRA adapter")
    theirs = str(raw.get("base_model_name_or_path") or "").rstrip("/").rpartition("/")[2]
    mine = c.model.rstrip("/").rpartition("/")[2]
    refuse(theirs and mine and theirs != mine, f"an adapter of {raw['base_model_name_or_path']}, not of {c.model}",
           "give that --model, or another --init")
    refuse(raw.get("r") != c.lora_rank, f"rank {raw.get('r')}, --lora-rank {c.lora_rank}",
           f"give --lora-rank {raw.get('r')}")
    refuse(raw.get("lora_alpha") != c.lora_alpha, f"alpha {raw.get('lora_alpha')}, --lora-alpha {c.lora_alpha}",
           f"give --lora-alpha {raw.get('lora_alpha')}")
    names, file = adapter_names(model), folder / "adapter_model.safetensors"
    with _opened(file) as tensors:
        held = set(tensors.keys())
        if odd := sorted(held ^ names.keys()):
            word = "is missing" if odd[0] in names else "has no place here"
            raise InputError(f"{file}: {odd[0]} {word}: an adapter of another base, or of other --lora-targets")
        with torch.no_grad():
            for theirs, ours in names.items():
                tensor, own = tensors.get_tensor(theirs), model.get_parameter(ours)
                if tensor.shape != own.shape:
                    raise InputError(f"{file}: {theirs} has shape {list(tensor.shape)}, expected {list(own.shape)}: an "
                                     f"adapter of another base; give that --model, or another --init")
                own.copy_(tensor)


def export_adapter(folder: Path, model) -> None:
    """adapter_config.json and adapter_model.safetensors, as PeftModel.from_pretrained reads them."""
    from safetensors.torch import save_file

    c, state = model.c, model.state_dict()
    tensors = {theirs: state[ours].float().cpu().contiguous() for theirs, ours in adapter_names(model).items()}
    if not tensors:
        raise InputError("--format peft: this checkpoint has no adapters, all weights were trained; use --format hf")
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": c.model, "revision": None,
        "r": c.lora_rank, "lora_alpha": c.lora_alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "target_modules": sorted(PARTS[t].rpartition(".")[2]
                                                         for t in c.lora_targets.split(","))})


# ---- Merged weights ------------------------------------------------------------------------------------------------

SHARD = 4 << 30  # bytes


def export_weights(folder: Path, model, source: Path | None) -> None:
    """config.json and safetensors with adapters merged, in shards of 4 GB, as transformers reads them.

    source: the checkpoint the weights came from, whose config.json and tokenizer files are taken along; None writes a
    config.json for our own decoder. A norm behind the embedding, which no published family has, is folded into it.
    """
    from safetensors.torch import save_file

    from data.weights.tokenizer import NANO_RANKS

    tensors = dict(_merged(model))
    plan, size = [[]], 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if plan[-1] and size + bytes_ > SHARD:
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += bytes_
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = [f"model-{i:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else "model.safetensors"
             for i in range(1, len(plan) + 1)]
    for file, names in zip(files, plan, strict=True):
        with replacing(folder / file) as temporary:
            save_file({n: tensors[n].cpu().contiguous() for n in names}, temporary, metadata={"format": "pt"})
    if len(plan) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": {
            name: file for file, names in zip(files, plan, strict=True) for name in names}})
    if source:
        raw = read_json(source / "config.json", "give the checkpoint it came from")
        write_json(folder / "config.json", raw | {"dtype": model.c.dtype, "torch_dtype": model.c.dtype})
        files = [file for pattern in TOKENIZER_FILES for file in source.glob(pattern)]
    else:
        write_json(folder / "config.json", describe(model, "lm_head.weight" not in tensors))
        files = [NANO_RANKS]
    for file in files:
        with replacing(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)


def _merged(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, tensor) of every weight, adapters added."""
    adapted = {f"{name}.weight": m for name, m in model.named_modules() if m in set(model.adapted())}
    fold = model.embed_norm is not None
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or name.startswith("embed_norm"):
            continue
        if name == "embed" and fold:
            yield NAMES["embed"], model.embed_norm(tensor).detach()
            if model.c.tied:
                yield NAMES["output"], tensor
        else:
            yield published(name), adapted[name].merged().detach() if name in adapted else tensor


def describe(model, tied: bool) -> dict[str, Any]:
    """config.json for a decoder of our own."""
    c = model.c
    family = next(name for name, (has, _) in FAMILIES.items() if has == {"qk_norm": c.qk_norm, "bias": c.bias})
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.rope_scaling:
        rope |= dict(zip(SCALING, map(float, c.rope_scaling.split(",")), strict=True)) | {"rope_type": "llama3"}
    return {"architectures": [FAMILIES[family][1]], "model_type": family, "hidden_size": c.width,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.key_heads,
            "head_dim": c.head_size, "intermediate_size": c.hidden, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
            "rope_parameters": rope, "tie_word_embeddings": tied, "vocab_size": len(model.embed),
            "max_position_embeddings": c.window, "dtype": c.dtype}
