"""Published checkpoints in and out: Qwen2/2.5, Qwen3 and Llama (SmolLM2) weights, and PEFT's adapters.

    read_shape(folder)             config.json -> the fields of the decoder's shape; needs no torch
    locate(name, revision)         a folder, or what the hub has under that name
    load_weights(folder, model)    safetensors, single or sharded, tensor by tensor straight to dtype and device
    load_adapter(folder, model)    PEFT's adapter files
    export_weights, export_adapter the same forms, for transformers and PEFT

What the decoder can't represent is refused by name. Where two files or fields state one fact, transformers' order
counts. Tensor names differ in spelling only (NAMES): no tensor is reshaped or permuted, the decoder rotates halves as
these checkpoints do.
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
from data.run.terminal import note

if TYPE_CHECKING:
    import torch

FAMILIES = {  # model_type: what such a decoder has
    "llama": {"qk_norm": False, "bias": False},
    "qwen2": {"qk_norm": False, "bias": True},
    "qwen3": {"qk_norm": True, "bias": False},
}
ASSUMED = {  # what a config.json means that leaves it out: transformers' defaults
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of Llama 3
NAMES = {"embed": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output": "lm_head.weight"}
PARTS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj",
         "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm",
         "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
                   "additional_chat_templates/*.jinja", "special_tokens_map.json", "added_tokens.json",
                   "generation_config.json", "*.tiktoken")
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old checkpoints carry
# Fields of adapter_config.json: those that are read, and those that change nothing in what is loaded. Any other must be
# off: its names and values grow with PEFT.
READ = {"peft_type", "base_model_name_or_path", "r", "lora_alpha", "bias", "init_lora_weights"}
IDLE = {"auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"}
STARTS = (True, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it is


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
    path, raw = folder / "config.json", _config(folder)
    family = raw.get("model_type")

    def refuse(bad: Any, what: str) -> None:
        if bad:
            raise InputError(f"{path}: {what}, which this decoder can't represent; give a Qwen2, Qwen3 or Llama "
                             f"checkpoint with full attention")

    refuse(family not in FAMILIES, f"model_type {family!r}")
    refuse(any(k.startswith(("num_experts", "num_local_experts", "n_routed")) and raw[k] for k in raw), "experts (MoE)")
    refuse(set(raw.get("layer_types") or []) - {"full_attention"}, f"layer_types {raw.get('layer_types')}")
    refuse(raw.get("hidden_act", "silu") not in ("silu", "swish"), f"hidden_act {raw.get('hidden_act')!r}")
    refuse(raw.get("mlp_bias"), "mlp_bias")
    refuse(raw.get("attention_bias") and family != "qwen2", "attention_bias")
    refuse(raw.get("quantization_config"), "quantized weights")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers takes one of the two whole
    refuse(not isinstance(rope, dict), f"rope scaling {rope!r}")
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0)} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta"}
    if kind == "llama3":
        known |= set(SCALING)
        rope |= {k: raw[k] for k in SCALING[3:] if raw.get(k)}
        rope.setdefault(SCALING[3], raw["max_position_embeddings"])
    elif kind == "linear" and rope.get("factor") == 1:
        known |= {"factor"}
    else:
        refuse(kind != "default", f"rope scaling {kind!r}")
    refuse(rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1, "partial rotary positions")
    odd = sorted(k for k, v in rope.items() if k not in known and v is not None)
    refuse(odd, f"{odd and odd[0]} of rope scaling {kind!r}")
    try:
        layers, heads = int(raw["num_hidden_layers"]), int(raw["num_attention_heads"])
        slides = raw.get("sliding_window", 4096) and int(raw.get("max_window_layers", 28)) < layers
        scaling = ",".join(f"{float(rope[k]):.15g}" for k in SCALING) if kind == "llama3" else ""
        shape = {"width": int(raw["hidden_size"]), "layers": layers, "heads": heads,
                 "key_heads": int(raw.get("num_key_value_heads") or heads),
                 "head_size": int(raw.get("head_dim") or raw["hidden_size"] // heads),
                 "hidden": int(raw["intermediate_size"]), "rope_theta": float(rope["rope_theta"]),
                 "rope_scaling": scaling, "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
                 "tied": bool(raw.get("tie_word_embeddings", False)), "vocab": int(raw["vocab_size"]),
                 "embed_norm": False}
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: {e.args[0]!r} is missing or malformed; download the checkpoint again") from None
    refuse(raw.get("sliding_window") if family == "llama" else
           raw.get("use_sliding_window") and slides and not raw.get("layer_types"), "a sliding window")
    shape["tied"] = shape["tied"] and not _own_head(folder)
    return shape | FAMILIES[family]


def _config(folder: Path) -> dict[str, Any]:
    """config.json with what it may leave out. InputError if it can't be read, or is that of an adapter."""
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder}: holds an adapter, adapter_config.json; give its base as --model, the adapter's "
                         f"folder as --init")
    raw = read_json(folder / "config.json", "give a folder with config.json, tokenizer and safetensors as published")
    return ASSUMED.get(str(raw.get("model_type")), {}) | raw


def check_window(folder: Path, window: int) -> None:
    """InputError if the checkpoint knows no positions as far as a turn goes."""
    known = _config(folder)["max_position_embeddings"]
    if not isinstance(known, int) or known < window:
        raise InputError(f"{folder / 'config.json'}: max_position_embeddings {known} is less than --window {window}; "
                         f"lower --window or, where its scaling reaches further, raise max_position_embeddings")


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
    shapes and a sample of every tensor, however they are dealt out to files. InputError names the file and the tensor
    that is missing or does not fit.
    """
    import torch

    dtype, path, samples = getattr(torch, model.c.dtype), folder / "config.json", {}
    own = {published(n): n for n, _ in model.named_parameters() if ".lora_" not in n}
    stored = _stored(folder)
    if model.c.tied and NAMES["embed"] not in stored:  # either of two names for one tensor
        own[NAMES["output"]] = own.pop(NAMES["embed"])
    for name in stored.keys() - own.keys():
        if not HARMLESS.search(name) and not (name == NAMES["output"] and model.c.tied):
            raise InputError(f"{stored[name][0]}: tensor {stored[name][1]} has no place in the decoder of {path}; "
                             f"download the checkpoint again, or give one of another kind")
    if missing := sorted(own.keys() - stored.keys()):
        raise InputError(f"{folder}: tensor {missing[0]} is in none of its files; download the checkpoint again")
    for file in sorted({file for file, _ in stored.values()}):
        with _opened(file, str(device)) as tensors:
            for name in [n for n in own if stored[n][0] == file]:
                tensor, place = tensors.get_tensor(stored[name][1]), _place(model, own[name])
                if tensor.shape != place[1].shape:
                    raise InputError(f"{file}: {name} has shape {list(tensor.shape)}, {path} says "
                                     f"{list(place[1].shape)}; download the checkpoint again")
                sample = tensor.reshape(-1)[::max(1, tensor.numel() // 64)].float().cpu().numpy()
                samples[name] = f"{name} {list(tensor.shape)}".encode() + sample.tobytes()
                setattr(place[0], own[name].rpartition(".")[2], torch.nn.Parameter(
                    tensor.to(dtype), requires_grad=not model.c.lora_rank))
    for m in model.adapted():
        for kind in ("lora_a", "lora_b"):
            setattr(m, kind, torch.nn.Parameter(torch.empty_like(getattr(m, kind), device=device)))
    model.to(device)  # the rotary frequencies
    model.reset_adapters()
    model.base_id = hashlib.sha256(b"".join(samples[n] for n in sorted(samples))).hexdigest()[:16]


def _place(model, name: str) -> tuple[Any, torch.Tensor]:
    """The module that holds parameter `name`, and the parameter."""
    module, _, leaf = name.rpartition(".")
    holder = model.get_submodule(module)
    return holder, getattr(holder, leaf)


def _stored(folder: Path) -> dict[str, tuple[Path, str]]:
    """Published name of every stored tensor -> (file, its name there, which may lack "model."). The single file counts
    before an index; an index says which files there are, they say what they hold. InputError if one is missing."""
    again = "download the checkpoint again"
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single.name]
    elif index.exists():
        listed = read_json(index, again).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
            raise InputError(f"{index}: no weight_map in it; {again}")
        files = sorted(set(listed.values()))
        if odd := [file for file in files if Path(file).name != file]:
            raise InputError(f"{index}: names {odd[0]!r}, which is not a file of this folder; {again}")
    else:
        raise InputError(f"{folder}: {single.name} is missing, and an index of parts, too; {again}, or convert "
                         f"pytorch_model.bin: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new folder) "
                         f"of transformers writes safetensors")
    found = {}
    for path in (folder / file for file in files):
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                found[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"] = path, name
    return found


def _own_head(folder: Path) -> bool:
    """Whether the files hold a head that differs from the embedding: then it counts, and nothing is tied."""
    if not any(folder.glob("*.safetensors")):  # a shape can be read without weights
        return False
    import torch

    stored = _stored(folder)
    if not {NAMES["embed"], NAMES["output"]} <= stored.keys():
        return False
    tensors = []
    for path, name in (stored[NAMES["embed"]], stored[NAMES["output"]]):
        with _opened(path) as file:
            tensors.append(file.get_tensor(name))
    return not torch.equal(tensors[0], tensors[1].to(tensors[0].dtype))


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
    on = sorted(k for k, v in raw.items() if v and k not in READ | IDLE)
    refuse(on, f"{on and on[0]}, which is not supported", "give a plain LoRA adapter")
    refuse(raw.get("bias", "none") != "none", "trained biases", "give a plain LoRA adapter")
    start = raw.get("init_lora_weights")
    refuse(start and start not in STARTS, f"init_lora_weights {start!r}, which may change the base", "PEFT's "
           "save_pretrained(path_initial_model_for_weight_conversion=...) makes plain LoRA of it")
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)  # PEFT's defaults
    refuse(rank != c.lora_rank, f"rank {rank}, --lora-rank {c.lora_rank}", f"give --lora-rank {rank}")
    refuse(alpha != c.lora_alpha, f"alpha {alpha}, --lora-alpha {c.lora_alpha}", f"give --lora-alpha {alpha}")
    names, file = adapter_names(model), folder / "adapter_model.safetensors"
    if not file.exists():
        raise InputError(f"{file}: is missing; adapter_model.bin can't be read, PEFT's save_pretrained converts it to "
                         f"safetensors")
    with _opened(file) as tensors:
        held, base = set(tensors.keys()), (tensors.metadata() or {}).get("base", "")
        if odd := sorted(held ^ names.keys()):
            word = "is missing" if odd[0] in names else "has no place here"
            raise InputError(f"{file}: {odd[0]} {word}: an adapter of another base, or of other --lora-targets")
        with torch.no_grad():
            for name, ours in names.items():
                tensor, own = tensors.get_tensor(name), model.get_parameter(ours)
                if tensor.shape != own.shape:
                    raise InputError(f"{file}: {name} has shape {list(tensor.shape)}, expected {list(own.shape)}: an "
                                     f"adapter of another base; give that --model, or another --init")
                own.copy_(tensor)
    theirs = raw.get("base_model_name_or_path")
    refuse(base and base != model.base_id, f"an adapter of {theirs!r} of digest {base}, not of {c.model} of digest "
           f"{model.base_id}", "give that --model, or another --init")
    if theirs and theirs != c.model and not base:
        note(f"{path}: an adapter of {theirs}, used on {c.model}: their shapes agree, no more is known")


def export_adapter(folder: Path, model) -> None:
    """adapter_config.json and adapter_model.safetensors, as PeftModel.from_pretrained reads them."""
    from safetensors.torch import save_file

    c, state = model.c, model.state_dict()
    tensors = {theirs: state[ours].float().cpu().contiguous() for theirs, ours in adapter_names(model).items()}
    if not tensors:
        raise InputError("--format peft: this checkpoint has no adapters, all weights were trained; use --format hf")
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "base": model.base_id})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": c.model, "revision": None,
        "r": c.lora_rank, "lora_alpha": c.lora_alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "target_modules": sorted(PARTS[t].rpartition(".")[2]
                                                         for t in c.lora_targets.split(","))})


# ---- Merged weights ------------------------------------------------------------------------------------------------

SHARD = 4 << 30  # bytes


def export_weights(folder: Path, model, source: Path | None) -> None:
    """config.json and safetensors with adapters merged, in shards of 4 GB, as transformers reads them.

    source: the checkpoint the weights came from, whose config.json and tokenizer files are taken along. InputError
    where there is none: no other tool has our own decoder and its vocabulary.
    """
    from huggingface_hub import save_torch_state_dict

    if not source:
        raise InputError("--format hf: a decoder of our own, which no other tool reads; give a checkpoint whose run "
                         "began from a published --model")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(dict(_merged(model)), folder, max_shard_size=SHARD)
    raw = read_json(source / "config.json", "give the checkpoint it came from")
    write_json(folder / "config.json", raw | {"dtype": model.c.dtype, "torch_dtype": model.c.dtype,
                                               "tie_word_embeddings": model.c.tied})
    for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
        with replacing(folder / file.relative_to(source)) as temporary:
            shutil.copyfile(file, temporary)


def _merged(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, tensor) of every weight, adapters added."""
    adapted = {f"{name}.weight": m for name, m in model.named_modules() if m in set(model.adapted())}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            yield published(name), adapted[name].merged().detach() if name in adapted else tensor
