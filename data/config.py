"""The configuration: one flat dataclass, its presets, the command line that is generated from it, and what it refuses.

Loads nothing heavy: typos and --help are answered before torch is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import InputError
from data.run.files import read_json
from data.run.terminal import StrictParser, one_line
from data.weights.pretrained import read_shape

LABELS = (60, 180, 450, 900)  # labelled questions at which the label curve has a point


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def memory_times(factor: float, c: Mapping) -> dict:
    """The fields that scale the memory, and with it what a turn may write and its window."""
    more = max(1, round(factor * c["memory"])) - c["memory"]
    return {name: c[name] + share * more for name, share in (("memory", 1), ("response", 1), ("window", 2))}


def memagent_steps(times: int, c: Mapping) -> dict:
    """MemAgent as many times longer than all steps of MemTrain and MemAgent, and what is kept on the way."""
    equal = c["memtrain_steps"] + c["memagent_steps"]
    points = {math.ceil(n / c["documents"]) for n in LABELS} | {equal}
    kept = sorted(n for n in points if n < times * equal and n != c["memagent_steps"])
    return {"memagent_steps": times * equal, "keep_steps": ",".join(map(str, kept))}


# steps of MemAgent and MEM1 after which more of them brought at most two points on the development world (entry 3 of
# eval/results/REGISTER.md)
SETTLED = {"nano": {"memagent_steps": 30, "mem1_steps": 20}}


def settled(c: Mapping) -> dict:
    """Budgets chosen on the development world, which a default run has no time for."""
    return SETTLED.get(c.get("preset", "nano"), {})  # results do not name it


# The arms of a study beside the full run: name -> the fields that differ, or a function that has them from the others.
ABLATIONS: dict[str, dict | Callable[[Mapping], dict]] = {
    "end-to-end": {"recall_group": 0},  # Figure 3: no IMR at all
    "decoupled": {"recall_weight": 0.0},  # Figure 3: IMR is trained, and R^E knows nothing of it
    "shared-probe": {"shared_probe": True},
    "paper-order": {"prompt_order": "paper"},
    "std": {"divide_by_std": True},
    "random-related": {"related": 0},
    "memory-half": partial(memory_times, 0.5),
    "memory-double": partial(memory_times, 2.0),
    "g2-1": {"recall_group": 1},
    "g2-4": {"recall_group": 4},
    # a public release, very likely of the authors, where it differs from the paper or is silent in it
    "released-probe": {"released_probe": True},
    "token-mean": {"token_mean": True},
    "kl": {"kl": 1e-3},
    "clip-higher": {"eps_high": 0.28},
    "settled": settled,
    # MemTrain, then MemAgent with as many steps as both have in the full run; MemAgent alone, up to twice as many: in
    # Figure 4 both have 500 + 300
    "more-labels": partial(memagent_steps, 1),
    "longer-memagent": partial(memagent_steps, 2),
}
SCALING = ("settled", "more-labels", "longer-memagent")  # those that --scaling adds; --ablations adds the others
CLAIMED = ("end-to-end", "decoupled", *SCALING)  # what C2-C7 compare with: evaluated like the full run
ARM_SECTIONS = 8  # the others are evaluated up to this length, which is a quarter of the work
OTHER_BASE = ("paper-order", "memory-half", "memory-double")  # the base reads and writes otherwise in these


def ablations(c: Mapping) -> dict[str, dict]:
    """{arm: the fields in which it differs from a configuration with the fields `c`}, without arms that are `c`."""
    made = {name: change(c) if callable(change) else change for name, change in ABLATIONS.items()}
    return {name: change for name, change in made.items() if any(c[k] != v for k, v in change.items())}


UNTRAINED = {"seed", "init", "keep_steps"}  # beside FREE_FIELDS: in what runs of one arm may differ


def arm_of(full: Mapping, other: Mapping) -> str:
    """The arm that the configuration `other` is beside `full` (fields by name): "full", a name in ABLATIONS, or the
    fields that differ, as "lr=0.001,kl=0.01", None where one of the two has no such field. What a study changes for
    every run, and where a base lies, is no difference."""
    def change_to(fields: Mapping, names: Iterable[str]) -> dict:
        return {k: fields.get(k) for k in names if k not in FREE_FIELDS | UNTRAINED and full.get(k) != fields.get(k)}

    change = change_to(other, full.keys() | other.keys())
    for name, known in ablations(full).items():
        if change == change_to(known, known):
            return name
    return ", ".join(f"{k}={v}" for k, v in sorted(change.items())) or "full"


def option(default, group: str, text: str):
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class Config:
    """The whole configuration, flat. The command line is generated from it; a preset only changes values."""

    preset: str = option("nano", "run", "set of defaults: nano (two CPU cores, twenty minutes); small (one GPU, trains "
                         "its base); smollm2-135m (real weights that two cores can read with); qwen3-0.6b, "
                         "qwen2.5-1.5b, qwen3-4b, qwen2.5-7b (real weights on one GPU); paper, the same for any other "
                         "--model; these five also with -consumer (batches for 24 GB)")
    model: str = option("", "run", "real weights instead of our own: a folder as published (config.json, safetensors, "
                        "tokenizer), or its name on the hub; its shape replaces the fields of the group model")
    revision: str = option("main", "run", "branch, tag or commit of --model on the hub")
    run: str = option("", "run", "name of the folder under runs/; the preset's if empty, with -study for a study")
    stages: str = option("memtrain,memagent,mem1,eval,report", "run", "what to do, in order: base (train the stand-in "
                         "for an instruct model), warmup (a --model learns the formats, without labels), memtrain, "
                         "memagent, mem1 (from the base and, where memtrain was run, from it too; memtrain+memagent, "
                         "memtrain+mem1: from it alone), eval, report")
    seed: int = option(0, "run", "seed of documents, rollouts and evaluation")
    seeds: str = option("", "run", "a study: one run a seed, like 0,1,2, then one report of them all")
    ablations: bool = option(False, "run", "a study: also one run a seed for each of " + ", ".join(
        name for name in ABLATIONS if name not in SCALING) + f"; most of them evaluated up to {ARM_SECTIONS}x")
    scaling: bool = option(False, "run", "a study: also " + ", ".join(SCALING) + ": more steps of MemAgent (in "
                           "settled of MEM1, too), after MemTrain and without it")
    init: str = option("", "run", "checkpoint instead of the shipped base, which the base stage trains on from; with "
                       "--model the folder of a PEFT adapter")
    device: str = option("auto", "run", "auto, cpu or cuda")
    threads: int = option(0, "run", "CPU threads of a process; 0: all cores, shared out among the processes")
    processes: int = option(0, "run", "that share the run on this machine; 0: on a CPU one a core, up to four, for our "
                            "own models without --threads, else one. On GPUs torchrun does it")
    deterministic: bool = option(False, "run", "on a GPU: only operations that give the same result every time, slower")
    tf32: bool = option(False, "run", "on a GPU: float32 products with ten bits of mantissa, several times faster")
    wandb: str = option("disabled", "run", "disabled, offline or online")
    debug: bool = option(False, "run", "show tracebacks")

    corpus: str = option("miniworld", "data", "miniworld, wikipedia, or a .jsonl/.json/.txt/.parquet file or folder")
    people: int = option(600, "data", "size of the mini-world: about 14 passages a person")
    questions: str = option("", "data", "evaluation questions: files, separated by commas (HotpotQA, 2WikiMultiHopQA, "
                            "MuSiQue, FlashRAG, bAbI, LoCoMo or LongMemEval), or hotpotqa (the hub's, validation)")
    train_questions: str = option("", "data", "training questions: likewise, or hotpotqa:train")
    entities: str = option("auto", "data", "finder: rules, spacy (en_core_web_sm), spacy:MODEL, or auto: spacy where "
                           "it is installed, else and in the mini-world rules")
    masked_text: str = option("encyclopaedia", "data", "what MemTrain reads in the mini-world: encyclopaedia; "
                              "timeline, chronicles and dialogues in which facts change; or both, in turn")
    mask: str = option("any", "data", "what MemTrain hides: any entity of a passage drawn at random, everywhere (the "
                       "paper); last, one of the last section that competes with earlier ones of its type, there alone")
    passages: int = option(60, "data", "passages of a masked document (paper: 150)")
    related: int = option(10, "data", "of them retrieved for the pivot, whose entity is masked (paper: 29)")
    masked_sections: int = option(8, "data", "of a masked document, at most; passages beyond are left out (paper: 8)")
    train_sections: int = option(4, "data", "of a training question's document; cuts between passages make "
                                "them about one more (paper: 5-8)")

    benchmarks: str = option("", "data", "search QA: comma-separated NAME of the hub (triviaqa, bamboogle, hotpotqa, "
                             "nq, popqa, 2wikimultihopqa, musique; all), FILE or NAME=FILE of questions; --questions "
                             "if empty; the mini-world asks seven families of its own")
    search_corpus: str = option("", "data", "passages that a search looks through, as --corpus takes them; if empty, "
                                "those of --corpus and all that came with the questions")
    retriever: str = option("bm25", "data", "of related passages and search: bm25, or dense:FOLDER, the vectors of a "
                            "sentence model (needs transformers)")

    width: int = option(128, "model", "C, size of the hidden state")
    layers: int = option(4, "model", "number of blocks")
    heads: int = option(4, "model", "H, query heads")
    key_heads: int = option(2, "model", "K, key heads; divides heads")
    head_size: int = option(32, "model", "D")
    hidden: int = option(320, "model", "inner size of the SwiGLU")
    rope_theta: float = option(10_000.0, "model", "base of the rotary frequencies")
    embed_norm: bool = option(True, "model", "RMS norm right after the embedding")
    rope_scaling: str = option("", "model", "Llama 3's: factor,low,high,original length, as 8,1,4,8192")
    norm_eps: float = option(1e-6, "model", "epsilon of every RMS norm")
    qk_norm: bool = option(True, "model", "RMS norm of queries and keys, as in Qwen3")
    bias: bool = option(False, "model", "bias of the query, key and value projections, as in Qwen2")
    tied: bool = option(False, "model", "head = embedding")
    vocab: int = option(0, "model", "V, rows of the embedding; 0: as many as the tokenizer has ids")

    lora_rank: int = option(0, "LoRA", "rank of the adapters; 0 trains all weights")
    lora_alpha: float = option(32.0, "LoRA", "their scale is alpha / rank")
    lora_targets: str = option("q,k,v,o,gate,up,down", "LoRA", "projections that have one")
    lora_merge: bool = option(True, "LoRA", "add them to a copy of the weights while sampling: faster, more memory")
    dtype: str = option("float32", "LoRA", "of frozen weights, activations and caches: float32, bfloat16, or auto, "
                        "which is bfloat16 where the hardware multiplies it; what is trained is float32")
    recompute: bool = option(False, "LoRA", "recompute a block's activations in the backward pass")

    window: int = option(280, "window", "tokens of one turn, prompt and response (paper: 8192)")
    section: int = option(160, "window", "tokens of a section (paper: 5120)")
    memory: int = option(40, "window", "tokens of the memory (paper: 1024)")
    response: int = option(41, "window", "sampled tokens of a turn, stop included (paper: 1024)")
    turns: int = option(6, "window", "turns of search QA, the last of which has to answer (paper: 6)")
    hits: int = option(3, "window", "passages that a search returns (paper: 3)")
    result: int = option(64, "window", "tokens of them, at most (paper: 1024)")
    act: int = option(28, "window", "sampled tokens of a turn of search QA behind the memory, stop included")
    prompt_order: str = option("section-first", "window", "section-first or paper: where the memory stands")
    prompts: str = option("short", "window", "short, as the base was taught, or full, for instruct models")

    memtrain_steps: int = option(60, "GRPO", "steps of MemTrain (paper: 300)")
    keep_steps: str = option("", "GRPO", "steps after which MemAgent and MEM1 are also kept, and evaluated as systems "
                             "of their own, memagent@5; like 5,38")
    memagent_steps: int = option(15, "GRPO", "steps of MemAgent (paper: 500)")
    mem1_steps: int = option(6, "GRPO", "steps of MEM1 (paper: 200, of MemAgent 500)")
    documents: int = option(12, "GRPO", "documents sampled a step (paper: 32)")
    update_documents: int = option(12, "GRPO", "documents per optimiser step (paper: 32; MemAgent: 8)")
    group: int = option(8, "GRPO", "G1, rollouts a document")
    recall_group: int = option(8, "GRPO", "G2, samples of a recall prompt; 0: no IMR (the End-to-End ablation)")
    recall_weight: float = option(0.5, "GRPO", "lambda, weight of recall in R^E; 0: the Decoupled ablation")
    shared_probe: bool = option(False, "GRPO", "one recall target a document instead of one a rollout")
    released_probe: bool = option(False, "GRPO", "recall as the public release asks it: of a memory, about a section "
                                  "read, but the first, or the one next to come")
    divide_by_std: bool = option(False, "GRPO", "divide advantages by the group's standard deviation")
    token_mean: bool = option(False, "GRPO", "the objective as a mean over all tokens, as the public release has it, "
                              "instead of a mean over turns of their token means")
    eps_low: float = option(0.2, "GRPO", "lower clip of the ratio")
    eps_high: float = option(0.2, "GRPO", "upper clip of the ratio")
    kl: float = option(0.0, "GRPO", "beta, weight of the KL to the reference (paper: 1e-3); 0: no reference")
    lr: float = option(3e-4, "GRPO", "learning rate of AdamW (paper: 1e-6 on 4-7 B parameters)")
    warmup: int = option(5, "GRPO", "steps of linear warm-up")
    grad_clip: float = option(0.2, "GRPO", "norm at which the gradient is clipped")
    temperature: float = option(1.0, "GRPO", "of sampling in training")
    top_p: float = option(1.0, "GRPO", "nucleus of sampling in training")
    micro_tokens: int = option(6_000, "GRPO", "packed tokens of one forward pass; never changes the gradient")
    sample_rows: int = option(1024, "GRPO", "rollouts decoded side by side, at most")
    cache_gb: float = option(4.0, "GRPO", "GB for their keys and values; fewer rollouts at a time where it is short")
    save_every: int = option(20, "GRPO", "steps between checkpoints")

    base_steps: int = option(6000, "base", "steps on text and demonstrations after the copy warm-up")
    base_copy_steps: int = option(200, "base", "warm-up steps on copying random tokens")
    base_lr: float = option(0.02, "base", "learning rate of Muon and of the embedding")
    base_people: int = option(200, "base", "size of the worlds that demonstrations are drawn from")

    base_documents: int = option(12, "base", "documents read by the demonstrators a step")
    base_sharpen: float = option(2.0, "base", "factor on all logits at the end: demonstrations leave a policy flat")
    base_answers: int = option(24, "base", "answers from a sufficient memory a step")
    base_searches: int = option(14, "base", "pairs of questions answered with the search tool a step")
    base_timelines: int = option(0, "base", "documents on facts that change read by careless readers a step")
    base_recalls: int = option(32, "base", "recalls of what a memory holds a step")
    base_directs: int = option(8, "base", "answers straight from a section a step")

    demo_steps: int = option(150, "warm-up", "steps of the stage warmup, on demonstrations made from the corpus alone")
    demo_documents: int = option(2, "warm-up", "documents read a step, with six more prompts each")
    demo_lr: float = option(1e-3, "warm-up", "learning rate of AdamW on adapters; for whole weights give about 2e-5")

    world: str = option("eval", "evaluation", "of the mini-world: eval, or dev, another one to choose budgets and "
                        "designs on; its results go to runs/RUN/dev")
    eval_lengths: str = option("1,2,4,8,16,32", "evaluation", "document lengths in sections, up to 128")
    eval_questions: int = option(200, "evaluation", "questions, the same at every length")
    eval_temperature: float = option(0.7, "evaluation", "of sampling in evaluation (MemAgent's evaluation script: 0.7)")
    eval_top_p: float = option(0.95, "evaluation", "nucleus of sampling in evaluation (MemAgent's: 0.95)")
    eval_pairs: int = option(64, "evaluation", "pairs of questions a search benchmark")
    eval_masked: int = option(100, "evaluation", "held-out masked documents for recall and reconstruction")
    changing: bool = option(False, "evaluation", "also ask about facts that change, in the mini-world's chronicles and "
                            "dialogues, as many questions at the same lengths")
    eval_systems: str = option("", "evaluation", "what to evaluate, like base,memtrain+memagent; if empty, the base, "
                               "base-one-window (the whole document in one window) and all that was trained")

    @property
    def half(self) -> bool:
        """Whether frozen weights take two bytes; `auto` is taken for the bfloat16 that it is on a card."""
        return self.dtype == "bfloat16" or (self.dtype == "auto" and self.lora_rank > 0)

    def cache_slots(self, members: Iterable[int], given: int, prefix: int, limit: int, token_bytes: int,
                    share: float = 1.0) -> tuple[int, int, int, int]:
        """(rollouts, prefixes, room of a suffix, room of a prefix) of the cache that --cache-gb and --sample-rows leave
        to prompts of groups of `members`, at most `given` tokens behind a prefix and `limit` sampled. token_bytes: keys
        and values of one token; share: of --cache-gb. InputError where not even one turn fits."""
        # multiples of 16, so that few shapes serve all turns
        suffix, prefix = (-(-n // 16) * 16 for n in (limit + given, max(1, prefix)))
        budget, rows, count = int(share * self.cache_gb * 1e9 / token_bytes), 0, 0
        for size in members:
            fits = min(self.sample_rows, (budget - (count + 1) * prefix) // suffix) - rows
            if fits < size and count:
                break
            rows, count = rows + min(fits, size), count + 1
        if rows < 1:
            raise InputError(f"--cache-gb {self.cache_gb:g}: too little for one turn of {prefix + suffix} tokens; "
                             f"raise it, or lower --section or --response")
        return rows, count, suffix, prefix


# The paper's setting for real weights; one GPU learns adapters, whose learning rate is above the paper's 1e-6 for all
# weights. LoRA rank and rate are ours, not measured.
PAPER = {"corpus": "wikipedia", "questions": "hotpotqa", "train_questions": "hotpotqa:train", "passages": 150,
         "related": 29, "masked_sections": 8, "train_sections": 6, "embed_norm": False, "dtype": "auto",
         "prompts": "full", "window": 8192, "section": 5120, "memory": 1023, "response": 1024,
         "benchmarks": "all", "result": 1024, "act": 128, "memtrain_steps": 300, "memagent_steps": 500,
         "mem1_steps": 200, "documents": 32, "update_documents": 32, "kl": 1e-3,
         "lr": 2e-5, "lora_rank": 32, "lora_alpha": 64.0, "recompute": True, "micro_tokens": 65_536,
         "sample_rows": 256, "cache_gb": 24.0, "eval_questions": 128, "eval_lengths": "1,2,4,8,16,32,64,128"}
# Batches for 24 GB, and smaller ones where the weights leave little. These sizes, as those of PAPER for 80 GB, are what
# `plan` says will fit. One step of the 0.6B shape on an H200: planned 18.2 GB, peak 17.3; the rest is not measured.
CONSUMER = {"documents": 8, "update_documents": 8, "micro_tokens": 16_384, "sample_rows": 64, "cache_gb": 6.0}
TIGHT = {"qwen3-4b": {"lora_merge": False, "cache_gb": 7.0},
         "qwen2.5-7b": {"lora_merge": False, "cache_gb": 1.6, "micro_tokens": 10_240, "sample_rows": 32}}
QWEN = {  # as in their published config.json
    "qwen3-0.6b": {"model": "Qwen/Qwen3-0.6B", "width": 1024, "layers": 28, "heads": 16, "key_heads": 8,
                   "head_size": 128, "hidden": 3072, "rope_theta": 1e6, "tied": True, "vocab": 151_936},
    "qwen3-4b": {"model": "Qwen/Qwen3-4B-Instruct-2507", "width": 2560, "layers": 36, "heads": 32, "key_heads": 8,
                 "head_size": 128, "hidden": 9728, "rope_theta": 5e6, "tied": True, "vocab": 151_936},
    "qwen2.5-1.5b": {"model": "Qwen/Qwen2.5-1.5B-Instruct", "width": 1536, "layers": 28, "heads": 12, "key_heads": 2,
                     "head_size": 128, "hidden": 8960, "rope_theta": 1e6, "qk_norm": False, "bias": True,
                     "tied": True, "vocab": 151_936},
    "qwen2.5-7b": {"model": "Qwen/Qwen2.5-7B-Instruct", "width": 3584, "layers": 28, "heads": 28, "key_heads": 4,
                   "head_size": 128, "hidden": 18_944, "rope_theta": 1e6, "qk_norm": False, "bias": True,
                   "vocab": 152_064},
}
REAL = {"paper": PAPER} | {name: PAPER | shape for name, shape in QWEN.items()}
# A model that two cores can read with: the paper's window, 1 : 5 : 1 : 1, at an eighth of its size. It follows no
# format by itself, so that it is warmed up, and then short prompts do. Rank, rates and batches are ours.
SMOL = PAPER | {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct", "width": 576, "layers": 30, "heads": 9, "key_heads": 3,
    "head_size": 64, "hidden": 1536, "rope_theta": 1e5, "norm_eps": 1e-5, "qk_norm": False, "tied": True,
    "vocab": 49_152, "stages": "warmup,memtrain,memagent,eval,report", "prompts": "short", "window": 1024,
    "section": 640, "memory": 127, "response": 128, "passages": 50, "result": 384, "act": 48, "lora_rank": 16,
    "lora_alpha": 32.0, "lr": 1e-4, "recompute": False, "micro_tokens": 8_192, "cache_gb": 4.0, "documents": 8,
    "update_documents": 8, "temperature": 0.5, "eval_lengths": "1,2,4,8,16"}
# One GPU: the paper's window, 1 : 5 : 1 : 1, at an eighth of its size, and a base that is trained in the same run.
# Sixty steps of its base ran on an H200, 0.26 s each; none has taken it to its report. `plan --preset small` says more.
SMALL = {"stages": "base,memtrain,memagent,mem1,eval,report", "people": 2000, "passages": 240, "related": 29,
         "width": 512, "layers": 8, "heads": 8, "key_heads": 4, "head_size": 64, "hidden": 1408,
         "window": 1024, "section": 640, "memory": 128, "response": 129, "lr": 1e-4, "tf32": True,
         "micro_tokens": 8_192, "sample_rows": 512, "cache_gb": 2.0, "base_documents": 12, "base_answers": 16,
         "base_recalls": 24, "base_directs": 6}
PRESETS: dict[str, dict] = {"nano": {}, "small": SMALL, "smollm2-135m": SMOL} | REAL | {
    f"{name}-consumer": p | CONSUMER | TIGHT.get(name, {}) for name, p in REAL.items()}
TRAINED = ("memtrain", "memagent", "memtrain+memagent", "mem1", "memtrain+mem1")  # stages of reinforcement learning
STAGES = ("base", "warmup", *TRAINED, "eval", "report")
SYSTEMS = ("base-one-window", "base", *TRAINED)
STUDY = ("seeds", "ablations", "scaling")  # fields that ask for a study: its runs are started without them
CHOICES = {"prompt_order": ("section-first", "paper"), "prompts": ("short", "full"), "mask": ("any", "last"),
           "dtype": ("auto", "float32", "bfloat16"), "masked_text": ("encyclopaedia", "timeline", "both"),
           "world": ("eval", "dev"), "wandb": ("disabled", "offline", "online"), "device": ("auto", "cpu", "cuda")}
# Numbers that are not 0 by default and may be
MAY_BE_ZERO = {"memtrain_steps", "memagent_steps", "mem1_steps", "recall_group", "recall_weight", "related", "warmup",
               "eps_low", "eps_high", "eval_masked", "base_steps", "base_copy_steps", "base_documents", "base_answers",
               "base_searches", "base_recalls", "base_directs"}
COMMANDS = ("plan", "read", "export", "gates")  # besides training and evaluation; the plain command takes options only
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
# Fields that may differ between two starts of the same run: a trained run can be evaluated at more lengths, and one
# that ran out of memory goes on in smaller batches.
FREE_FIELDS = {"stages", "wandb", "debug", "threads", "processes", "device", "run", "preset", "eval_lengths",
               "eval_systems", "world", "changing", "lora_merge", "recompute", "micro_tokens", "sample_rows",
               "cache_gb"} | set(STUDY)


class CommandParser(StrictParser):
    """python memtrain.py NAME ..."""

    def __init__(self, name: str, text: str):
        super().__init__(prog=f"python memtrain.py {name}".strip(), allow_abbrev=False, description=text,
                         epilog="Other options: fields of the configuration, python memtrain.py --help lists them.")


def argument_parser() -> CommandParser:
    """The command line of Config: every field an option, absent unless given."""
    parser = CommandParser("", "MemTrain in miniature: python memtrain.py reproduces the paper end to end.")
    parser.usage = "python memtrain.py [plan | read | export | gates] [--field value ...]"
    parser.epilog = "python memtrain.py plan, read, export and gates have a --help of their own."
    groups: dict = {}
    for f in dataclasses.fields(Config):
        group = groups.setdefault(f.metadata["group"], parser.add_argument_group(f.metadata["group"]))
        kind = {"int": int, "float": float, "bool": _truth}.get(f.type, str)
        extra = {"nargs": "?", "const": True} if f.type == "bool" else {}
        group.add_argument(flag(f.name), type=kind, default=argparse.SUPPRESS,
                           metavar=f.type.upper(), help=f"{f.metadata['help']} (default: {f.default!r})", **extra)
    return parser


def command_options(name: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of `python memtrain.py read`, `export` or `gates`, the rest: fields of Config). InputError as parse."""
    if name == "read":
        parser = CommandParser(name, "Read a text of any length section by section: the memory after each, the answer.")
        parser.add_argument("file", metavar="FILE", help="text, markdown, HTML or a chat (JSON, lines \"Name: "
                                                         "text\") in UTF-8; - for standard input")
        parser.add_argument("--question", action="append", help="answered after the last section; as often as you like")
        parser.add_argument("--out", type=Path, metavar="FILE", help="also write memories and answer as JSON")
    elif name == "gates":
        parser = CommandParser(name, "Whether a base is fit to start reinforcement learning from, step by step.")
    else:
        parser = CommandParser(name, "Write a checkpoint as a PEFT adapter, or as whole weights for transformers.")
        parser.add_argument("--format", choices=("peft", "hf"), required=True, help="adapter, or whole weights")
        parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--checkpoint", type=Path, required=name == "export", metavar="RUN/STAGE",
                        help="like runs/nano/memtrain" + "; without it the shipped base, or --model's weights" * (
                            name != "export"))
    options, fields = parser.parse_known_args(argv)
    for study in STUDY:
        refuse(study in given_fields(fields), f"--{study}: {name} is no study; leave it out")
    return options, fields


def given_fields(argv: Sequence[str]) -> dict:
    """The fields of Config that a command line names. InputError on an unknown name or a wrong type."""
    return vars(argument_parser().parse_args([dashes(a) for a in argv]))


def parse(argv: Sequence[str]) -> Config:
    """Command line -> checked Config. InputError on an unknown name, a wrong type or an impossible combination."""
    given = given_fields(argv)
    preset = given.setdefault("preset", preset_of(given["model"]) if "model" in given else "nano")
    refuse(preset not in PRESETS, f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}")
    if "questions" in given:  # those of one's own are for search, too, unless there are others
        given.setdefault("benchmarks", "")
    refuse("seed" in given and given.get("seeds"),
           f"--seed {given.get('seed')}: --seeds {given.get('seeds')} names the seeds of a study; give one of the two")
    name = {"run": preset + "-study" * any(given.get(x) for x in STUDY)}
    config = dataclasses.replace(Config(), **(name | PRESETS[preset] | given))
    if config.model:
        shape = {f.name for f in dataclasses.fields(Config) if f.metadata["group"] == "model"}
        for own in shape & given.keys():
            raise InputError(f"{flag(own)}: --model {config.model} has a shape of its own; give one of the two")
        if Path(config.model).exists():
            config = dataclasses.replace(config, **read_shape(Path(config.model)))
    check(config)
    return config


def read_config(path: Path, remedy: str) -> Config:
    """The configuration in a run's config.json; what an older version did not know has its default. InputError with
    `remedy` on an unknown option, or a value of another type: nothing in it is dropped."""
    theirs, defaults = read_json(path, remedy), dataclasses.asdict(Config())
    for name, value in theirs.items():
        refuse(name not in defaults, f"{path}: {name} is no option of this version; {remedy}")
        kind = type(defaults[name])
        refuse(type(value) not in (kind, int if kind is float else kind),
               f"{path}: {name} is {value!r}, not of type {kind.__name__}; {remedy}")
    return Config(**theirs)


def preset_of(model: str) -> str:
    """The preset made for checkpoints of this size, where `model` is a folder; paper for all others."""
    if not Path(model).exists():
        return "paper"
    shape, sizes = read_shape(Path(model)), ("width", "layers", "heads", "key_heads", "hidden", "vocab")
    return next((n for n, p in PRESETS.items() if "model" in p and all(p[k] == shape[k] for k in sizes)), "paper")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def dashes(argument: str) -> str:
    """--eval_lengths is the same as --eval-lengths."""
    name, eq, value = argument.partition("=")
    return name.replace("_", "-") + eq + value if name.startswith("--") else argument


def ascending(c: Config, name: str, least: int, most: float, example: str) -> list[int]:
    """A field of whole numbers as ints. InputError where they are not ascending, or out of bounds."""
    text = getattr(c, name)
    numbers = [int(x) if x.isascii() and x.isdecimal() else -1 for x in text.split(",")]
    if sorted(set(numbers)) != numbers or numbers[0] < least or numbers[-1] > most:
        raise InputError(f"{flag(name)} {text}: expected ascending whole numbers from {least}"
                         f"{f' to {most}' if most < math.inf else ''}, like {example}")
    return numbers


def lengths_of(c: Config) -> list[int]:
    """--eval-lengths as ascending ints."""
    return ascending(c, "eval_lengths", 1, 128, "1,2,4")


def processes(c: Config, cuda: bool) -> int:
    """How many processes share this run on one machine. cuda: whether there is a GPU."""
    alone = (cuda and c.device != "cpu") or c.threads or c.model or c.stages == "report" or os.name != "posix"
    if c.processes or alone:
        return c.processes or 1
    return max(n for n in range(1, min(4, os.cpu_count() or 1) + 1) if c.update_documents % n == 0)


def is_study(c: Config) -> bool:
    """Whether a command asks for several runs and one report."""
    return any(getattr(c, name) for name in STUDY)


def seeds_of(c: Config) -> list[int]:
    """--seeds as ascending ints; without it --seed alone."""
    return ascending(c, "seeds", 0, math.inf, "0,1,2") if c.seeds else [c.seed]


def rope_scaling(c: Config) -> tuple[float, ...]:
    """--rope-scaling as numbers: factor, low, high, original length; empty without it."""
    try:
        numbers = tuple(float(x) for x in c.rope_scaling.split(",")) if c.rope_scaling else ()
    except ValueError:
        numbers = (0.0,)
    if len(numbers) not in (0, 4) or not all(x > 0 for x in numbers):
        raise InputError(f"--rope-scaling {c.rope_scaling}: expected factor,low,high,original length, like 8,1,4,8192")
    return numbers


def kind_of(stage: str) -> str:
    """What a stage trains on: memagent, wherever it starts from and ends. Other stages are a kind of their own."""
    return stage.partition("@")[0].rpartition("+")[2]


def kept_steps(c: Config) -> list[int]:
    """--keep-steps as ascending ints."""
    return ascending(c, "keep_steps", 1, math.inf, "5,38") if c.keep_steps else []


def systems_of(c: Config) -> list[str]:
    """All systems that a run of this configuration can have, in the order of the tables."""
    kept = [f"{s}@{n}" for s in TRAINED if s != "memtrain" for n in kept_steps(c)]
    return [*SYSTEMS, *kept]


def readers(trained: Iterable[str]) -> list[str]:
    """The systems that read long documents, of the base and these trained ones."""
    return ["base", *(s for s in trained if kind_of(s) != "mem1")]


def searchers(trained: Sequence[str]) -> list[str]:
    """Those that answer with the search tool; none where none was trained to."""
    return ["base", *(s for s in trained if kind_of(s) != "memagent")] if "mem1" in map(kind_of, trained) else []


def as_evaluated(c: Config) -> Config:
    """The same loop, sampled with less noise, and recall asked as the paper does."""
    return dataclasses.replace(c, temperature=c.eval_temperature, top_p=c.eval_top_p, released_probe=False)


def refuse(bad: object, message: str) -> None:
    """InputError with the message where something is bad."""
    if bad:
        raise InputError(message)


def check(c: Config) -> None:
    """Refuses what can't work, in one line."""
    for f in dataclasses.fields(Config):
        value, name = getattr(c, f.name), flag(f.name)
        if f.name in CHOICES:
            refuse(value not in CHOICES[f.name], f"{name} {value}: choose {' or '.join(CHOICES[f.name])}")
        if f.type in ("int", "float"):
            refuse(not value < math.inf, f"{name} {value}: must be finite")
            refuse(value < 0, f"{name} {value}: must not be negative")
            refuse(not value and f.default and f.name not in MAY_BE_ZERO, f"{name} {value}: must be above 0")
    check_parts(c)
    check_stages(c)
    check_data(c)
    check_study(c)
    lengths_of(c)


def check_parts(c: Config) -> None:
    """Sizes that don't go together."""
    refuse(c.group < 2, f"--group {c.group}: a group of one has no mean to compare with; use at least 2")
    refuse(c.documents % c.update_documents,
           f"--update-documents {c.update_documents}: must divide --documents {c.documents}")
    world = max(c.processes, int(os.environ.get("WORLD_SIZE", "1")))
    refuse(c.update_documents % world,
           f"--update-documents {c.update_documents}: must be a multiple of the {world} processes that share them")
    refuse(c.heads % c.key_heads, f"--key-heads {c.key_heads}: must divide --heads {c.heads}")
    refuse(c.head_size % 2, f"--head-size {c.head_size}: rotary positions need an even size")
    rope_scaling(c)
    for name in ("top_p", "eval_top_p", "eps_low"):
        refuse(getattr(c, name) > 1, f"{flag(name)} {getattr(c, name)}: must be at most 1")
    refuse(c.dtype == "bfloat16" and not c.lora_rank, f"--dtype {c.dtype}: weights that are trained stay float32; give "
                                                     f"--lora-rank, or --dtype float32")
    refuse(not set(c.lora_targets.split(",")) <= set(PROJECTIONS),
           f"--lora-targets {c.lora_targets}: choose from {','.join(PROJECTIONS)}")
    refuse(c.model and c.init and not c.lora_rank,
           f"--init {c.init}: beside --model it is an adapter; give its --lora-rank, too")
    refuse(c.response <= c.memory, f"--response {c.response}: needs --memory {c.memory} and a stop token")
    refuse(c.act < 8, f"--act {c.act}: too few tokens for a line with a query or answers; give at least 8")
    need = c.section + c.memory + c.response + 24
    refuse(c.window < need, f"--window {c.window}: section {c.section} + memory {c.memory} + response {c.response} + "
                            f"at least 24 for the instruction need {need}; raise --window or lower the parts")
    need = c.result + 2 * c.memory + 2 * c.act + 24
    refuse("mem1" in map(kind_of, c.stages.split(",")) and c.window < need,
           f"--window {c.window}: a search's result {c.result} + memory {c.memory} twice + query and action, {c.act} "
           f"each + at least 24 for the instruction need {need}; raise --window or lower the parts")


def check_stages(c: Config) -> None:
    """Stages and systems that are unknown, or not of this model; a folder that is none."""
    wants = c.stages.split(",")
    for name, known in (("stages", STAGES), ("eval_systems", ["", *systems_of(c)])):
        for part in getattr(c, name).split(","):
            refuse(part not in known, f"{flag(name)} {getattr(c, name)}: {part!r} is unknown; choose from "
                                      f"{','.join(filter(None, known))}")
    refuse("warmup" in wants and not c.model, f"--stages {c.stages}: warmup is for a --model; our own decoder is "
                                              f"taught by the stage base")
    refuse("base" in wants and c.model, f"--stages {c.stages}: --model is the base; leave base out")
    refuse("base" in wants and c.lora_rank,
           f"--lora-rank {c.lora_rank}: the base stage trains all weights; run it without adapters first")
    refuse(max(kept_steps(c), default=0) > max(c.memagent_steps, c.mem1_steps),
           f"--keep-steps {c.keep_steps}: neither --memagent-steps {c.memagent_steps} nor --mem1-steps {c.mem1_steps} "
           f"goes that far")
    refuse(not re.fullmatch(r"[\w-][\w.-]{0,99}", c.run), f"--run {c.run[:100]}: use at most 100 letters, digits, "
           f"'-', '_' and '.'; runs are folders under runs/")


def check_data(c: Config) -> None:
    """Data that the mini-world does not have, or that another corpus needs."""
    own, wants = c.corpus == "miniworld", c.stages.split(",")
    refuse(c.passages <= c.related, f"--related {c.related}: a document of --passages {c.passages} holds the pivot "
                                    f"and at most {c.passages - 1} related passages")
    refuse(c.people < 40, f"--people {c.people}: a mini-world needs at least 40")
    refuse(c.retriever != "bm25" and not re.fullmatch("dense:.+", c.retriever),
           f"--retriever {c.retriever}: choose bm25 or dense:FOLDER")
    refuse(c.mask == "last" and c.released_probe, "--released-probe: --mask last has recall probes of its own")
    refuse(own and c.mask == "last" and c.masked_text == "encyclopaedia",
           "--mask last: the encyclopaedia's documents have no order; give --masked-text timeline or both")
    for name in ("questions", "train_questions", "benchmarks", "search_corpus"):
        refuse(own and getattr(c, name), f"{flag(name)}: the mini-world asks and searches its own pages; give --corpus")
    for name in ("masked_text", "changing", "world"):
        refuse(not own and getattr(c, name) != getattr(Config, name),
               f"{flag(name)} {getattr(c, name)}: the mini-world alone has that; leave it out with --corpus {c.corpus}")
    for stage, name in (("eval", "questions"), *((s, "train_questions") for s in TRAINED[1:])):
        refuse(not own and stage in wants and not getattr(c, name),
               f"--corpus {c.corpus}: the stage {stage} needs {flag(name)} FILE; or leave it out of --stages")


def check_study(c: Config) -> None:
    """What can't be a study."""
    seeds_of(c)
    stages = c.stages.split(",")
    for name, wanted in (("ablations", ("memtrain", "memagent", "eval")), ("scaling", ("memagent", "eval"))):
        missing = [s for s in wanted if getattr(c, name) and s not in stages]
        refuse(missing, f"--{name}: needs the stage {missing and missing[0]}, which --stages {c.stages} leaves out")
    refuse(is_study(c) and int(os.environ.get("WORLD_SIZE", "1")) > 1,
           "--seeds: a study starts processes of its own; start it without torchrun")


def refusal(error: InputError, argv: Sequence[str]) -> int:
    """Says in one line what was wrong with `argv` or what it names; returns the exit code."""
    if "--debug" in argv:
        raise error
    print(one_line(f"memtrain: {error}"), file=sys.stderr)
    return 2
