"""What a configuration will need, before anything is downloaded or run: memory by phase and part, tokens, FLOPs, hours.

    python memtrain.py plan --preset qwen3-4b --gpu H100 [--gpu-memory 80] [any field]
    python memtrain.py plan --preset small --seeds 0,1,2 --ablations --scaling

Arithmetic on a Config alone, without torch. What it takes for granted, as an upper estimate: documents of as many
sections as the configuration allows, each section, memory and rewritten memory as long as it may be, answers of an
eighth of the response, and a signal in every group (groups without one are not trained on, mostly half and more).
Parameters, cache and saved activations are tested against the decoder; hours are rough.

GB are 1e9 bytes. A card sold with 24 GB has 25.8 of them: the difference is left to fragmentation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data import InputError
from data.arms import jobs
from data.config import (
    PRESETS,
    TRAINED,
    CommandParser,
    flag,
    is_study,
    kind_of,
    parse,
    readers,
    searchers,
    systems_of,
)
from data.run.terminal import columns

GB = 1e9
CONTEXT = 0.5 * GB  # CUDA's context, compiled kernels and the libraries' workspaces: an allowance
LOGITS = 4.0 * (1 << 25)  # bytes of a chunk of logits in training: kernels.grpo
DRAW = 8.0  # bytes a logit at the worst moment of Sampler._draw: logits and log-probs in fp32
# Shares of the card's peaks in products and in decoding, and seconds that a block of a decoding step takes at least. On
# an H200 a GRPO step of the 0.6B shape had the first, and 28 blocks took 4.3 ms (kernels/README.md, `step` and
# `sample`); the second is assumed.
MFU, BANDWIDTH_SHARE, BLOCK = 0.25, 0.6, 150e-6


class Card(NamedTuple):
    """memory in GB; dense bfloat16 TFLOP/s with fp32 sums, without sparsity; memory bandwidth in GB/s."""

    memory: float
    tflops: float
    bandwidth: float


CARDS = {
    "3090": Card(24, 71, 936),  # NVIDIA, GA102 architecture whitepaper, table of GeForce cards
    "4090": Card(24, 165.2, 1008),  # NVIDIA, Ada GPU architecture whitepaper, appendix A
    "5090": Card(32, 209.5, 1792),  # NVIDIA, RTX Blackwell GPU architecture whitepaper, appendix A
    "L40S": Card(48, 362, 864),  # NVIDIA L40S data sheet (733 with sparsity)
    "A100-40": Card(40, 312, 1555),  # NVIDIA A100 data sheet, SXM
    "A100-80": Card(80, 312, 2039),  # the same
    "H100": Card(80, 989, 3350),  # NVIDIA H100 data sheet, SXM (1,979 with sparsity)
    "H200": Card(141, 989, 4800),  # NVIDIA H200 data sheet, SXM
    "B200": Card(180, 2250, 8000),  # NVIDIA DGX B200 data sheet, an eighth of it (4,500 with sparsity)
}

# ---- Parameters ----------------------------------------------------------------------------------------------------


def projections(c) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each projection of a block."""
    query, key = c.heads * c.head_size, c.key_heads * c.head_size
    return {"q": (c.width, query), "k": (c.width, key), "v": (c.width, key), "o": (query, c.width),
            "gate": (c.width, c.hidden), "up": (c.width, c.hidden), "down": (c.hidden, c.width)}


def adapted(c) -> set[str]:
    """The projections that have an adapter."""
    return set(c.lora_targets.split(",")) if c.lora_rank else set()


def parameters(c, vocab: int) -> tuple[int, int]:
    """(weights, adapters)."""
    own = projections(c)
    block = sum(i * o for i, o in own.values()) + 2 * c.width + 2 * c.head_size * c.qk_norm
    block += c.bias * (c.heads + 2 * c.key_heads) * c.head_size
    outside = c.width * (1 + c.embed_norm) + vocab * c.width * (1 if c.tied else 2)
    return c.layers * block + outside, c.layers * c.lora_rank * sum(sum(own[n]) for n in adapted(c))


def vocabulary(c) -> int:
    """Rows of the embedding; without --vocab those of the shipped tokenizer, counted in its file."""
    ranks = Path(__file__).parents[1] / "data" / "nano" / "miniworld.tiktoken"
    return c.vocab or len(ranks.read_bytes().splitlines()) + 3


def element(c) -> int:
    """Bytes of a frozen weight, an activation, a cached key."""
    return 2 if c.half else 4


def token_bytes(c) -> int:
    """Keys and values of one token, in all layers."""
    return 2 * c.layers * c.key_heads * c.head_size * element(c)


# ---- What is sampled -----------------------------------------------------------------------------------------------

# Tokens of a prompt that are neither section nor memory, problem included: of an update, an answer, a recall and a turn
# of search. Counted with the shipped tokenizer (short) and Qwen's (full), for the masked problem; search for two
# questions of the mini-world, of HotpotQA.
WORDS = {"short": (31, 29, 21, 56), "full": (133, 60, 67, 197)}
GIVEN, NO_MEMORY = 4, 4  # what stands around a memory behind the shared prefix; the first turn's memory
FOUND = 10  # what stands around a memory and what a search returned


@dataclass(frozen=True)
class Call:
    """`times` rounds of sampling, each of `groups` prefixes with `members` rollouts; lengths in tokens. constant: the
    prefix is the same in all rounds, so that training joins them."""

    times: int
    groups: int
    members: int
    prefix: int
    given: int
    sampled: int
    constant: bool = False

    @property
    def sequences(self) -> int:
        return self.times * self.groups * self.members


def reading(c, documents: int, group: int, sections: int, one_problem: bool) -> Iterator[Call]:
    """The memory loop over `documents` documents, `group` rollouts each."""
    update, answer, *_ = WORDS[c.prompts]
    shared = (1, documents * group) if one_problem else (documents, group)  # the head alone is the same for all
    for times, memory in [(1, NO_MEMORY), (sections - 1, c.memory)][:sections]:
        if c.prompt_order == "section-first":
            yield Call(times, documents, group, update - GIVEN + c.section, GIVEN + memory, c.memory + 1)
        else:
            yield Call(times, *shared, update - GIVEN, GIVEN + memory + c.section, c.memory + 1, True)
    yield Call(1, *shared, answer - GIVEN, GIVEN + c.memory, answer_tokens(c))


def searching(c, pairs: int, group: int) -> Call:
    """Search QA of `pairs` pairs of questions, with all turns used and everything as long as it may be."""
    head, most = WORDS[c.prompts][3], c.memory + c.act
    return Call(c.turns, pairs, group, head - FOUND, FOUND + c.act + c.result + c.memory, most, True)


def answer_tokens(c) -> int:
    """With the paper's window 128."""
    return max(6, c.response // 8)


def step(c, kind: str) -> tuple[Call, ...]:
    """What one GRPO step of `kind` (memtrain, memagent or mem1) samples, and then trains on."""
    if kind == "mem1":
        return (searching(c, c.documents, c.group),)
    # passages of a question's document are not cut, which makes one more
    sections = c.masked_sections if kind == "memtrain" else c.train_sections + 1
    calls = [*reading(c, c.documents, c.group, sections, kind == "memtrain")]
    if kind == "memtrain" and c.recall_group and sections > 1:
        calls.append(Call(1, c.documents * c.group, c.recall_group, WORDS[c.prompts][2] - 1 + c.section + c.memory, 1,
                          answer_tokens(c)))
    return tuple(calls)


def evaluation(c) -> tuple[Call, ...]:
    """What the evaluations of all systems sample: documents of all lengths, as if they were one, and search. Masked
    documents and the base's one window, which are few, are left out."""
    if "eval" not in c.stages.split(","):
        return ()
    sections = sum(int(n) for n in c.eval_lengths.split(","))
    many = 7 if c.corpus == "miniworld" or c.benchmarks == "all" else len(c.benchmarks.split(","))
    return (*[*reading(c, c.eval_questions, 1, sections, False)] * len(evaluated(c)),
            *[searching(c, many * c.eval_pairs, 1)] * len(searched(c)))


# ---- What passes through the model ---------------------------------------------------------------------------------


class Pass(NamedTuple):
    """A forward pass, or many: packed tokens, those that are scored, visible (query, key) pairs of one head."""

    tokens: int = 0
    scored: int = 0
    pairs: int = 0


def added(passes: Iterable[Pass]) -> Pass:
    return Pass(*map(sum, zip(Pass(), *passes, strict=True)))


def largest(passes: Iterable[Pass]) -> Pass:
    """By tokens, and by scored tokens."""
    return Pass(*map(max, zip(Pass(), *passes, strict=True)))


def packed(prefix: int, own: int, members: int, scored: int) -> Pass:
    """A prefix with `members` suffixes of `own` tokens."""
    pairs = prefix * (prefix + 1) // 2 + members * (own * prefix + own * (own + 1) // 2)
    return Pass(prefix + members * own, scored, pairs)


@cache
def training(calls: tuple[Call, ...], limit: int) -> list[Pass]:
    """The micro-batches of one optimiser step: the rule of memtrain.micro_batches on lengths. Where a group is cut, its
    prefix is computed again."""
    passes, room = [Pass()], limit
    for x in calls:
        rounds, own = (1 if x.constant else x.times), x.given + x.sampled
        for left in [x.sequences // (x.groups * rounds)] * (x.groups * rounds):
            while left:
                part = min(left, max((room - x.prefix) // own, room == limit))
                if part > 0:
                    passes[-1] = added([passes[-1], packed(x.prefix, own - 1, part, part * x.sampled)])
                    left, room = left - part, room - x.prefix - part * own
                if left:
                    passes.append(Pass())
                    room = limit
    return passes


def slots(c, calls: Sequence[Call]) -> list[tuple[int, int, int, int]]:
    """(rows, groups, suffix room, prefix room) of the cache in each of these calls, as the Sampler will have it.
    InputError where a single turn doesn't fit."""
    return [c.cache_slots(itertools.repeat(x.members, x.groups), x.given, x.prefix, max(c.response, x.sampled),
                          token_bytes(c)) for x in calls]


def prefill(c, calls: Sequence[Call]) -> list[Pass]:
    """The passes over prompts. A group is cut only where it has more rollouts than the cache has rows."""
    passes = []
    for x, (rows, *_) in zip(calls, slots(c, calls), strict=True):
        parts = math.ceil(x.members / rows)
        one = packed(x.prefix, x.given, math.ceil(x.members / parts), 0)
        groups = max(1, min(c.micro_tokens // one.tokens, x.groups * parts))
        passes += [Pass(*(groups * n for n in one))] * math.ceil(x.times * x.groups * parts / groups)
    return passes


def unshared(calls: Sequence[Call]) -> int:
    """Tokens that pass through the model once where each sequence is computed alone."""
    return sum(x.sequences * (x.prefix + x.given + x.sampled - 1) for x in calls)


def tokens(c, calls: tuple[Call, ...]) -> dict[str, int]:
    """Tokens of one step: through the model while sampling and in one training pass, and without any sharing."""
    return {"sampled": sum(x.sequences * x.sampled for x in calls), "prompts": added(prefill(c, calls)).tokens,
            "trained": added(training(calls, c.micro_tokens)).tokens,
            "unshared": unshared(calls)}


# ---- What a run does -------------------------------------------------------------------------------------------------


def trainings(c) -> dict[str, int]:
    """What a run trains, in order: name -> steps."""
    steps: dict[str, int] = {}
    for stage in c.stages.split(","):
        if stage == "base":
            steps["base"] = c.base_copy_steps + c.base_steps
        elif stage == "warmup":
            steps["warmup"] = c.demo_steps
        elif stage in TRAINED:
            steps[stage] = getattr(c, f"{kind_of(stage)}_steps")
            if stage in ("memagent", "mem1") and "memtrain" in steps:  # from the base, and from memtrain too
                steps[f"memtrain+{stage}"] = steps[stage]
    return steps


def kinds_of(c) -> list[str]:
    """The kinds of GRPO steps among the stages: memtrain (masks), memagent (questions), mem1 (search)."""
    trained = set(map(kind_of, trainings(c)))
    return [kind for kind in ("memtrain", "memagent", "mem1") if kind in trained]


def evaluated(c, which: Callable = readers) -> list[str]:
    """The systems whose memory loop a run evaluates on long texts, if it evaluates at all."""
    steps = trainings(c)
    made = [s for s in systems_of(c) if s != "base" and int(s.partition("@")[2] or 0) <= steps.get(
        s.partition("@")[0], -1)]
    return [s for s in which(made) if not c.eval_systems or s in c.eval_systems.split(",")]


def searched(c) -> list[str]:
    """Those that it evaluates on search."""
    return evaluated(c, searchers)


def packed_tokens(c, stage: str) -> int:
    """Of one step, through forward and backward; of the stages that imitate about, by counts of their demonstrations
    (data/world/demonstrations.py, data/warmup.py)."""
    if stage == "warmup":
        return round(c.demo_documents * (1_810 + 0.145 * c.section))
    if stage != "base":
        return added(training(step(c, kind_of(stage)), c.micro_tokens)).tokens
    section, more = 0.72 * c.section, max(1.0, c.memory / 40)  # more: what a memory holds grows with its room
    return round(1.7 * c.base_documents * (0.64 * c.section + 86 + 29 * more)
                 + (c.base_answers + 0.9 * c.base_documents) * (53 + 9 * more)
                 + (c.base_recalls + 0.25 * c.base_documents) * (28 + section + 22 * more)
                 + c.base_directs * (36 + section) + c.base_searches * 511)


def work(c) -> dict[str, float]:
    """Of each stage of a run, in units of one packed token forward and backward: for how long it takes, beside other
    stages and runs of the same model."""
    done = {name: float(steps * packed_tokens(c, name)) for name, steps in trainings(c).items()}
    if "memtrain" in done:
        done["memtrain"] *= 0.55  # most recall groups have no signal and are not trained on
    if calls := evaluation(c):  # forward alone is about 2.5 times faster
        done["eval"] = unshared(calls) / 2.5
    return done


def stage_cost(state: dict, c, vocab: int) -> dict:
    """What a stage cost: the fields of a row of `stages` that a finished stage's state gives. tokens_prompts: tokens of
    the prompts that went through the model while sampling; null where the run didn't count them.

    FLOPs are the model's: 2 a parameter and token that passes forward (sampled tokens and, where they were counted, the
    prompts they answer), 6 a parameter and token trained on (forward and backward); with adapters 4 a frozen parameter
    and 6 an adapter's. The embedding of an untied model is looked up, not multiplied, and is left out. Attention
    scores, recomputation and the optimiser are not counted.
    """
    weights, adapters = parameters(c, vocab)
    multiplied = weights - (0 if c.tied else vocab * c.width)
    sampled, prompts = state.get("tokens_sampled", 0), state.get("tokens_prompts")
    trained = state.get("tokens_trained", state.get("tokens", 0))
    flops = 2.0 * (multiplied + adapters) * (sampled + (prompts or 0))
    flops += (4.0 * multiplied + 6.0 * adapters if adapters else 6.0 * multiplied) * trained
    return {"tokens_sampled": sampled, "tokens_prompts": prompts, "tokens_trained": trained,
            "parameters": weights + adapters, "flops": flops}


# ---- Memory --------------------------------------------------------------------------------------------------------


def saved(c) -> tuple[float, float]:
    """Bytes that autograd keeps of one block, (per packed token, per token that goes on behind the attention).

    One after the other, on CUDA: the block's input, its norm and norm's factor, queries and keys before their norm,
    queries, keys, values, output and log-sum-exp of the attention; then the stream, its norm, gate, up, and their
    product; and what each adapter's A gives. A projection's input is kept where its weights or its adapter learn.
    """
    query, key, e, few = c.heads * c.head_size, c.key_heads * c.head_size, element(c), adapted(c)
    learns = few or set(projections(c))
    first = e * (c.width * (1 + bool(learns & set("qkv"))) + (query + key) * c.qk_norm + 2 * query + 2 * key)
    first += 4 * (1 + c.heads) + e * c.lora_rank * len(few & set("qkv"))
    second = e * (c.width * (1 + bool(learns & {"gate", "up"})) + c.hidden * (2 + ("down" in learns)))
    second += e * c.lora_rank * len(few - set("qkv"))
    return first, second


def activations(c, tokens: int, scored: int) -> tuple[float, float]:
    """(kept from forward to backward, at work on top of it) in bytes, of a pass over `tokens` of which `scored` count.

    With recomputation a block keeps its input; one block at a time is then computed again.
    """
    e, (first, second) = element(c), saved(c)
    embedded = e * c.width if c.embed_norm and not c.lora_rank else 0
    ends = tokens * (4 * c.head_size + 24 + embedded) + scored * (2 * e * c.width + 20)
    if c.recompute:
        kept = tokens * c.layers * e * c.width
        width = tokens if c.layers > 1 else scored
        free = 2 if not c.lora_rank or "down" in adapted(c) else 3  # gradients of its widest tensors
        work = tokens * (first - e * c.width) + width * (second + e * c.hidden * free)
    else:
        kept = tokens * (c.layers * first + (c.layers - 1) * second) + scored * second
        work = 0.0
    if c.kl:  # the reference is scored while all of this is kept
        work = max(work, forward_bytes(c, tokens))
    return kept + ends, work


def forward_bytes(c, tokens: int) -> float:
    """Peak of a pass that keeps nothing: in the MLP, beside the stream, what the attention left behind, and three of
    the wide tensors."""
    query, key = c.heads * c.head_size, c.key_heads * c.head_size
    return tokens * (element(c) * (3 * c.width + 2 * query + 2 * key + 3 * c.hidden) + 4 * c.head_size + 24)


def learning(c, most: Pass, trained: int) -> dict[str, float]:
    """Parts of training `trained` parameters by passes of this size."""
    kept, work = activations(c, most.tokens, most.scored)
    work = max(work, 4.0 * trained - kept)  # AdamW's temporaries come when activations are gone
    return {"AdamW moments": 8.0 * trained, "gradients": 4.0 * trained, "activations kept": kept,
            "one block at work": work, "logits": LOGITS}


def sampling(c, vocab: int, calls: Sequence[Call]) -> tuple[dict[str, float], dict[str, float]]:
    """(parts of sampling these calls that stay behind it, those that do not)."""
    made = slots(c, calls)
    keys = max(rows * suffix + groups * prefix for rows, groups, suffix, prefix in made)
    drawn = DRAW * vocab * max(rows for rows, *_ in made)
    copied = [math.prod(projections(c)[n]) for n in adapted(c)] if c.lora_merge else []
    return ({"KV cache": float(token_bytes(c) * keys), "captured decoding steps": drawn},
            {"second copy of adapted weights": element(c) * c.layers * sum(copied) + 8.0 * max(copied, default=0),
             "prompts' activations, or logits": max(forward_bytes(c, largest(prefill(c, calls)).tokens), drawn)})


@cache
def memory(c, vocab: int) -> dict[str, dict[str, float]]:
    """Bytes by part for each phase that --stages has: base, warmup, sampling, training, evaluation."""
    (base, extra), stages, kinds = parameters(c, vocab), c.stages.split(","), kinds_of(c)
    trained, stays, phases = extra or base, {}, {}
    always = {"weights": float(element(c) * base), "adapters": 4.0 * extra, "CUDA context (allowance)": CONTEXT}
    for stage in [s for s in ("base", "warmup") if s in stages]:
        most = min(c.micro_tokens, packed_tokens(c, stage))
        phases[stage] = always | learning(dataclasses.replace(c, kl=0.0), Pass(most, most * 6 // 10), trained)
    if kinds:
        steps = [step(c, kind) for kind in kinds]
        stays, passing = sampling(c, vocab, sum(steps, ()))
        model = {"AdamW moments": 8.0 * trained, "reference model": 4.0 * base if c.kl and not c.lora_rank else 0.0}
        phases["sampling"] = always | model | stays | passing
        most = largest(p for calls in steps for p in training(calls, c.micro_tokens))
        phases["training"] = always | model | stays | learning(c, most, trained)
    if calls := evaluation(c):
        own, passing = sampling(c, vocab, calls)
        phases["evaluation"] = always | {k: max(v, stays.get(k, 0.0)) for k, v in own.items()} | passing
    return phases or {"start": always}


def peak(c, vocab: int) -> tuple[str, float]:
    """(phase, bytes) of the largest demand."""
    totals = {phase: sum(parts.values()) for phase, parts in memory(c, vocab).items()}
    worst = max(totals, key=totals.get)
    return worst, totals[worst]


def remedy(c, vocab: int, limit: float) -> str:
    """Options that bring the peak to at most `limit` bytes: recomputation, then halves of what may be halved, in turn,
    where that lowers it."""
    now, changes = c, {}
    least = round(1.1 * token_bytes(c) * (c.window + c.response) / GB, 2)  # a prompt and a response
    for _ in range(8):
        milder = {"recompute": True, "cache_gb": max(least, round(now.cache_gb / 2, 2)),
                  "micro_tokens": max(c.window, now.micro_tokens // 2),
                  "sample_rows": max(c.group, now.sample_rows // 2), "lora_merge": False}
        for name, value in milder.items():
            tried = dataclasses.replace(now, **{name: value})
            if peak(tried, vocab)[1] < peak(now, vocab)[1]:
                now, changes[name] = tried, f"{flag(name)} {str(value).lower()}"
            if peak(now, vocab)[1] <= limit:
                return " ".join(changes.values())
    return "a smaller preset"


def refuse_too_large(c, vocab: int, limit: float) -> None:
    """InputError where the plan's peak exceeds a card of `limit` bytes, with what to change."""
    phase, most = peak(c, vocab)
    if most > limit:
        raise InputError(f"--device cuda: {limit / GB:.1f} GB of GPU memory, less than the {most / GB:.1f} GB that the "
                         f"plan needs in {phase}; give {remedy(c, vocab, limit)}")


# ---- FLOPs and hours -----------------------------------------------------------------------------------------------


def forward_flops(c, vocab: int, p: Pass) -> float:
    """2 a parameter and token, 4 D a query head, visible pair and layer, 2 C V a scored token."""
    blocks = c.layers * sum(i * o for i, o in projections(c).values()) + parameters(c, vocab)[1]
    attention = c.layers * c.heads * c.head_size * p.pairs
    return 2.0 * blocks * p.tokens + 4.0 * attention + 2.0 * c.width * vocab * p.scored


def training_flops(c, vocab: int, p: Pass) -> float:
    """A backward pass is two forward passes, one where weights are frozen; recomputation and reference are one each."""
    return forward_flops(c, vocab, p) * (3 - bool(c.lora_rank) + c.recompute + bool(c.kl))


def cost(c, vocab: int, card: Card, calls: Sequence[Call], trained: Sequence[Pass]) -> tuple[float, float]:
    """(hours, FLOPs) of sampling these calls and training on these passes. A decoding step takes as long as reading
    weights and cache does, and BLOCK at least; what is decoded is computed meanwhile."""
    flops = forward_flops(c, vocab, added(prefill(c, calls))) + training_flops(c, vocab, added(trained))
    spent = flops / (card.tflops * 1e12 * MFU * (1 if c.half else 0.5))  # float32 as TF32
    for x, (rows, groups, suffix, prefix) in zip(calls, slots(c, calls), strict=True):
        moved = element(c) * parameters(c, vocab)[0] + token_bytes(c) * (rows * suffix + groups * prefix)
        steps = x.sequences * x.sampled / rows
        spent += steps * max(moved / (card.bandwidth * 1e9 * BANDWIDTH_SHARE), c.layers * BLOCK)
        flops += forward_flops(c, vocab, Pass(x.sequences * x.sampled, x.sequences * x.sampled))
    return spent / 3600, flops


def step_cost(c, vocab: int, card: Card, stage: str) -> tuple[float, float]:
    """(hours, FLOPs) of one step."""
    if stage in ("base", "warmup"):
        size = packed_tokens(c, stage)
        return cost(dataclasses.replace(c, kl=0.0), vocab, card, (), [Pass(size, size // 4, size * c.section // 2)])
    calls = step(c, kind_of(stage))
    return cost(c, vocab, card, calls, training(calls, c.micro_tokens))


def run_cost(c, vocab: int, card: Card) -> tuple[float, float]:
    """(hours, FLOPs) of a run."""
    hours, flops = cost(c, vocab, card, evaluation(c), ())
    for name, steps in trainings(c).items():
        h, f = step_cost(c, vocab, card, name)
        hours, flops = hours + steps * h, flops + steps * f
    return hours, flops


# ---- The command ---------------------------------------------------------------------------------------------------


def text(c, name: str, limit: float) -> str:
    """The plan for a terminal. name: of the card; limit: its memory in bytes."""
    vocab, card, runs = vocabulary(c), CARDS[name], [job.config for job in jobs(c)] if is_study(c) else [c]
    (base, extra), phases = parameters(c, vocab), memory(c, vocab)
    adapters = f"{extra / 1e6:.1f} M in adapters (rank {c.lora_rank})" if extra else "all trained"
    parts = dict.fromkeys(part for of in phases.values() for part, size in of.items() if size)
    table = [["memory, GB", *phases]]
    table += [[f"  {part}", *(f"{of[part] / GB:.2f}" if part in of else "" for of in phases.values())]
              for part in parts]
    table.append(["  total", *(f"{sum(of.values()) / GB:.2f}" for of in phases.values())])
    phase, most = max((peak(run, vocab) for run in runs), key=lambda x: x[1])
    fits = "fits" if most <= limit else f"DOES NOT FIT {limit / GB:g} GB; it would with {remedy(c, vocab, limit)}"
    steps = [["a step, thousands of tokens", "sampled", "prompts", "trained", "unshared", "PFLOP", "seconds"]]
    for kind in kinds_of(c):
        hours, flops = step_cost(c, vocab, card, kind)
        steps.append([f"  {kind}", *(f"{n / 1e3:,.0f}" for n in tokens(c, step(c, kind)).values()),
                      f"{flops / 1e15:.2f}", f"{3600 * hours:.1f}"])
    hours, flops = map(sum, zip(*(run_cost(run, vocab, card) for run in runs), strict=True))
    return (f"plan     preset {c.preset}  {c.model or 'own decoder'}  {base / 1e6:,.1f} M parameters in "
            f"{'bfloat16' if c.half else 'float32'}, {adapters}\n\n{columns(table)}\n  peak {most / GB:.1f} of "
            f"{limit / GB:g} GB, in {phase}: {fits}\n\n{columns(steps)}\n\n"
            f"  {f'a study of {len(runs)} runs, ' * (len(runs) > 1)}in all {flops / 1e18:.3g} EFLOP, about "
            f"{hours:,.2f} hours on one {name}\n\n"
            f"Planned, not measured: {MFU:.0%} of {card.tflops:g} TFLOP/s (float32: of half) in prefill and training, "
            f"{BANDWIDTH_SHARE:.0%} of\n{card.bandwidth:g} GB/s in decoding; sections, memories and documents of full "
            f"length, answers of {answer_tokens(c)} tokens, a\nsignal in every group: an upper estimate.")


def main(argv: Sequence[str]) -> None:
    """python memtrain.py plan. Prints the plan; InputError on what can't be planned."""
    parser = CommandParser("plan", "What a configuration will need: memory, tokens, FLOPs, hours.")
    parser.add_argument("--gpu", metavar="NAME", help=f"the card: {', '.join(CARDS)} (default: 4090 for a memory of "
                        f"24 GB and -consumer presets, else H100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="its memory (default: the card's)")
    known, rest = parser.parse_known_args(list(argv))
    c, room = parse(rest), known.gpu_memory
    if room is not None and not 0 < room < math.inf:
        raise InputError(f"--gpu-memory {room:g}: expected a number above 0")
    small = room <= 24 if room else c.preset.endswith("-consumer")
    name = {n.lower(): n for n in CARDS}.get((known.gpu or ("4090" if small else "H100")).lower())
    if name is None:
        raise InputError(f"--gpu {known.gpu}: unknown; choose one of {', '.join(CARDS)}, with --gpu-memory of another")
    if c.model and not Path(c.model).exists() and c.model != PRESETS[c.preset].get("model"):
        raise InputError(f"--model {c.model}: its shape is not known before it is downloaded; give its folder, or one "
                         f"of the presets")
    print(text(c, name, (room or CARDS[name].memory) * GB))
