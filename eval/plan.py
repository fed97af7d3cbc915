"""What a configuration will need, before anything is downloaded or run: memory by part, tokens, FLOPs, hours, kWh.

    python memtrain.py plan --preset qwen3-4b --gpu H100 [--gpu-memory 80] [--tflops 900] [--mfu 0.35] [any field]
    python memtrain.py plan --preset small --seeds 0,1,2 --ablations --scaling

Arithmetic on a Config alone, without torch. What it takes for granted, as an upper estimate: documents of as many
sections as the configuration allows, each section, memory and rewritten memory as long as it may be, answers of an
eighth of the response, and a signal in every group (groups without one are not trained on, mostly half and more).
Parameters, cache and saved activations are exact and tested against the decoder; times rest on two shares of the
card's peak, MFU and BANDWIDTH_SHARE, on LAUNCH where a model is small and on START where runs are many: assumptions.

GB are 1e9 bytes. A card sold with 24 GB has 25.8 of them: the difference is left to fragmentation.

Legend as everywhere: T packed tokens, M scored tokens, C width, H query heads, K key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data import InputError
from data.arms import jobs
from data.config import TRAINED, CommandParser, is_study, kind_of, readers, searchers, systems_of
from data.run.files import output, write_json
from data.run.terminal import columns

GB = 1e9
CONTEXT = 0.5 * GB  # CUDA's context, compiled kernels and the libraries' workspaces: an allowance
MFU = 0.35  # share of the peak in prefill and training: assumed, usual for LoRA with recomputation on one card
BANDWIDTH_SHARE = 0.6  # of the peak, in decoding: assumed
LAUNCH = 3e-6  # seconds that a kernel takes at least, in a captured decoding step: assumed
KERNELS = 11, 40  # of a block in a decoding step, as tests/fake_card.py counts; outside the blocks, about
DEMONSTRATE = 22e-6  # seconds on one core to make a token of demonstrations: 16 to 26, measured on a shared AMD EPYC
START = 30 / 3600  # hours until a run of a study is at work: libraries, data, kernels compiled, graphs: assumed
WORKERS = 8  # processes that make them beside a GPU, as in memtrain.train_base
ANSWER_SHARE = 8  # an answer is response / 8 tokens long; with the paper's window 128


class Card(NamedTuple):
    """memory in GB; dense bfloat16 TFLOP/s with fp32 sums, without sparsity; memory bandwidth in GB/s; board watts;
    float32 TFLOP/s without tensor cores. With --tf32 float32 reaches half of bfloat16, on all of these."""

    memory: float
    tflops: float
    bandwidth: float
    watts: float
    single: float


CARDS = {
    "3090": Card(24, 71, 936, 350, 35.6),  # NVIDIA, GA102 architecture whitepaper, table of GeForce cards
    "4090": Card(24, 165.2, 1008, 450, 82.6),  # NVIDIA, Ada GPU architecture whitepaper, appendix A
    "5090": Card(32, 209.5, 1792, 575, 104.8),  # NVIDIA, RTX Blackwell GPU architecture whitepaper, appendix A
    "L40S": Card(48, 362, 864, 350, 91.6),  # NVIDIA L40S data sheet (733 with sparsity)
    "A100-40": Card(40, 312, 1555, 400, 19.5),  # NVIDIA A100 data sheet, SXM
    "A100-80": Card(80, 312, 2039, 400, 19.5),  # the same
    "H100": Card(80, 989, 3350, 700, 67),  # NVIDIA H100 data sheet, SXM (1,979 with sparsity)
    "H200": Card(141, 989, 4800, 700, 67),  # NVIDIA H200 data sheet, SXM
    "B200": Card(180, 2250, 8000, 1000, 75),  # NVIDIA DGX B200 data sheet, an eighth of it (4,500 with sparsity)
}


def rate(c, card: Card) -> float:
    """Dense TFLOP/s of the products that a configuration computes."""
    return card.tflops if c.half else card.tflops / 2 if c.tf32 else card.single


# ---- Parameters ----------------------------------------------------------------------------------------------------


def projections(c) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each projection of a block."""
    query, key = c.heads * c.head_size, c.key_heads * c.head_size
    return {"q": (c.width, query), "k": (c.width, key), "v": (c.width, key), "o": (query, c.width),
            "gate": (c.width, c.hidden), "up": (c.width, c.hidden), "down": (c.hidden, c.width)}


def adapted(c, *names: str) -> bool:
    """Whether the input of one of these projections is kept for a gradient: all weights learn, or it has an adapter."""
    return not c.lora_rank or not set(names).isdisjoint(c.lora_targets.split(","))


def adapter_sizes(c) -> dict[str, int]:
    """Parameters of the adapters of one block."""
    return {n: c.lora_rank * (i + o) for n, (i, o) in projections(c).items()
            if c.lora_rank and n in c.lora_targets.split(",")}


def parameters(c, vocab: int) -> tuple[int, int]:
    """(weights, adapters)."""
    block = sum(i * o for i, o in projections(c).values()) + 2 * c.width + 2 * c.head_size * c.qk_norm
    block += c.bias * (c.heads + 2 * c.key_heads) * c.head_size
    outside = c.width * (1 + c.embed_norm) + vocab * c.width * (1 if c.tied else 2)
    return c.layers * block + outside, c.layers * sum(adapter_sizes(c).values())


def element(c) -> int:
    """Bytes of a frozen weight, an activation, a cached key."""
    return 2 if c.half else 4


def token_bytes(c) -> int:
    """Keys and values of one token, in all layers."""
    return 2 * c.layers * c.key_heads * c.head_size * element(c)


# ---- Sequences -----------------------------------------------------------------------------------------------------

# Tokens of a prompt that are neither section nor memory, problem included: of an update, an answer, a recall, a
# question about one window and a turn of search. Counted with the shipped tokenizer (short) and Qwen's (full), for the
# masked problem; search for two questions of the mini-world, of HotpotQA.
WORDS = {"short": (31, 29, 21, 30, 56), "full": (133, 60, 67, 46, 197)}
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
    limit: int = 0  # of what may be sampled; 0: --response

    @property
    def sequences(self) -> int:
        return self.times * self.groups * self.members


def reading(c, documents: int, group: int, sections: int, one_problem: bool) -> Iterator[Call]:
    """The memory loop over `documents` documents, `group` rollouts each."""
    update, answer, *_ = WORDS[c.prompts]
    rounds = [(1, NO_MEMORY), (sections - 1, c.memory)] if sections > 1 else [(1, NO_MEMORY)]
    shared = (1, documents * group) if one_problem else (documents, group)  # the head alone is the same for all
    for times, memory in rounds:
        if c.prompt_order == "section-first":
            yield Call(times, documents, group, update - GIVEN + c.section, GIVEN + memory, c.memory + 1)
        else:
            yield Call(times, *shared, update - GIVEN, GIVEN + memory + c.section, c.memory + 1, True)
    yield Call(1, *shared, answer - GIVEN, GIVEN + c.memory, answer_tokens(c))


def searching(c, pairs: int, group: int) -> Call:
    """Search QA of `pairs` pairs of questions, with all turns used and everything as long as it may be."""
    head, most = WORDS[c.prompts][4], c.memory + c.act
    return Call(c.turns, pairs, group, head - FOUND, FOUND + c.act + c.result + c.memory, most, True, most)


def answer_tokens(c) -> int:
    return max(6, c.response // ANSWER_SHARE)


def sections_of(c, kind: str) -> int:
    """Sections of a training document. Passages of a question's document are not cut, which makes one more."""
    return c.masked_sections if kind == "memtrain" else c.train_sections + 1


def step(c, kind: str) -> tuple[Call, ...]:
    """What one GRPO step of `kind` (memtrain, memagent or mem1) samples, and then trains on."""
    if kind == "mem1":
        return (searching(c, c.documents, c.group),)
    sections = sections_of(c, kind)
    calls = [*reading(c, c.documents, c.group, sections, kind == "memtrain")]
    if kind == "memtrain" and c.recall_group and sections > 1:
        calls.append(Call(1, c.documents * c.group, c.recall_group, WORDS[c.prompts][2] - 1 + c.section + c.memory, 1,
                          answer_tokens(c)))
    return tuple(calls)


def evaluation(c, system: str) -> list[Call]:
    """Sampling of one system's evaluation. Its questions share nothing, its masked documents the problem."""
    lengths, calls = [int(n) for n in c.eval_lengths.split(",")], []
    if system == "base-one-window":
        direct, most = WORDS[c.prompts][3], c.window - c.response
        return [Call(1, c.eval_questions, 1, min(most, n * c.section + direct), 1, answer_tokens(c)) for n in lengths]
    for n in lengths:
        calls += reading(c, c.eval_questions, 1, n, False)
    if c.eval_masked:
        calls += reading(c, c.eval_masked, 1, c.masked_sections, True)
        calls.append(Call(1, c.eval_masked, 1, WORDS[c.prompts][2] - 1 + c.section + c.memory, 1, answer_tokens(c)))
    return calls


def searches(c) -> list[Call]:
    """Sampling of one system's search benchmarks."""
    many = 7 if c.corpus == "miniworld" or c.benchmarks == "all" else len(c.benchmarks.split(","))
    return [searching(c, c.eval_pairs, 1)] * many


def unshared(calls: Sequence[Call]) -> int:
    """Tokens that pass through the model once where each sequence is computed alone."""
    return sum(x.sequences * (x.prefix + x.given + x.sampled - 1) for x in calls)


@dataclass
class Passes:
    """Forward passes over packed tokens: their number, tokens T, scored tokens M, visible (query, key) pairs of one
    head, and the largest pass of all by tokens and by scored tokens."""

    passes: int = 0
    tokens: int = 0
    scored: int = 0
    pairs: int = 0
    most: int = 0
    most_scored: int = 0

    def add(self, tokens: int, scored: int, pairs: int, count: int = 1) -> None:
        self.passes += count
        self.tokens += count * tokens
        self.scored += count * scored
        self.pairs += count * pairs
        self.most, self.most_scored = max(self.most, tokens), max(self.most_scored, scored)


def _pairs(prefix: int, own: int, members: int) -> int:
    return prefix * (prefix + 1) // 2 + members * (own * prefix + own * (own + 1) // 2)


@cache
def training(calls: tuple[Call, ...], limit: int) -> Passes:
    """The micro-batches of one optimiser step: the rule of memtrain.micro_batches on lengths. Where a group is cut, its
    prefix is computed again."""
    total, used, batch = Passes(), 0, [0, 0, 0]  # batch: tokens, scored, pairs
    for x in calls:
        groups, members = (x.groups, x.members * x.times) if x.constant else (x.groups * x.times, x.members)
        own = x.given + x.sampled
        for _ in range(groups):
            part, size = 0, x.prefix
            for left in range(members, -1, -1):
                full = left and used + size + own > limit and (part or batch[0])
                if part and (full or not left):
                    batch = [a + b for a, b in zip(batch, (x.prefix + part * (own - 1), part * x.sampled,
                                                           _pairs(x.prefix, own - 1, part)), strict=True)]
                if full:
                    total.add(*batch)
                    batch, part, used, size = [0, 0, 0], 0, 0, x.prefix
                if left:
                    part, size = part + 1, size + own
            used += size
    total.add(*batch)
    return total


def slots(c, calls: Sequence[Call]) -> list[tuple[int, int, int, int]]:
    """(rows, groups, suffix room, prefix room) of the cache in each of these calls, as the Sampler will have it.
    InputError where a single turn doesn't fit."""
    return [c.cache_slots(itertools.repeat(x.members, x.groups), x.given, x.prefix, x.limit or c.response,
                        token_bytes(c))
            for x in calls]


def cache_bytes(c, made: Sequence[tuple[int, int, int, int]]) -> float:
    """Of the largest of these caches."""
    return float(token_bytes(c) * max(rows * suffix + groups * prefix for rows, groups, suffix, prefix in made))


def prefill(c, calls: Sequence[Call], made: Sequence[tuple[int, int, int, int]]) -> Passes:
    """The passes over prompts. A group is cut only where it has more rollouts than the cache has rows."""
    total = Passes()
    for x, (rows, *_) in zip(calls, made, strict=True):
        parts = math.ceil(x.members / rows)
        members = math.ceil(x.members / parts)
        size = x.prefix + members * (x.given + 1)
        groups = max(1, min(c.micro_tokens // size, x.groups * parts))
        total.add(groups * (x.prefix + members * x.given), groups * members,
                  groups * _pairs(x.prefix, x.given, members), math.ceil(x.times * x.groups * parts / groups))
    return total


# ---- What a run does -------------------------------------------------------------------------------------------------

# Of the demonstrations of data/world/demonstrations.py, counted: how many of a document's sections are shown, to how
# many readers that differ; tokens of an answer; turns of an episode of search.
SHOWN, READERS, SAID, TURNS = 0.68, 2.5, 6, 5.5
COPIED = 64 * 64  # tokens of a step of copying: DemoSteps.copying
# Of data/warmup.py's, counted over 30 steps with sections of 400 and 640 tokens: packed tokens of a document's rows are
# WARMED[0] + WARMED[1] * section, of which the share is scored.
WARMED, WARMED_SCORED = (1_810, 0.145), 0.1


def demonstrated(c) -> Passes:
    """The micro-batches of one step of the base stage, about: rows of data.world.steps, a fifth of their prefixes
    scored beside the responses."""
    update, answer, recall, direct, search = WORDS["short"]
    section = 0.72 * c.section  # LENGTHS are 0.75 in the mean, and a section ends with its last whole passage
    more = max(1.0, c.memory / 40)  # Demonstrator.more: what memories hold, and what is written, in tokens
    held, written, drawn = 11 + 9 * more, 11 + 2.5 * more, 22 * more
    read = 0.64 * c.section  # a document's last section is not full
    rows = [(c.base_documents * 2.5 * SHOWN, update + read, READERS * held, READERS * written),
            (c.base_answers + c.base_documents * 0.9, answer, held + 7, SAID),
            (c.base_recalls + c.base_documents * 0.25, recall + section + drawn, 1, SAID),
            (c.base_directs, direct + section, 1, SAID),
            (c.base_searches, search - FOUND, TURNS * 64, TURNS * 20.6)]
    tokens = sum(n * (prefix + given + sampled) for n, prefix, given, sampled in rows)
    scored = sum(n * (0.2 * prefix + sampled) for n, prefix, given, sampled in rows)
    pairs = sum(n * _pairs(round(prefix), round(given + sampled), 1) for n, prefix, given, sampled in rows)
    passes = max(1, round(tokens / c.micro_tokens))
    return Passes(passes, round(tokens), round(scored), round(pairs), min(round(tokens), c.micro_tokens),
                  round(min(1, c.micro_tokens / tokens) * scored))


def warmed(c) -> Passes:
    """The micro-batches of one step of the stage warmup, about."""
    tokens = round(c.demo_documents * (WARMED[0] + WARMED[1] * c.section))
    most = min(tokens, c.micro_tokens)
    return Passes(max(1, round(tokens / c.micro_tokens)), tokens, round(WARMED_SCORED * tokens),
                  round(tokens * c.section / 4), most, round(WARMED_SCORED * most))


def trainings(c) -> dict[str, int]:
    """What a run trains, in order: name -> steps."""
    wanted, steps = c.stages.split(","), {}
    for stage in wanted:
        if stage == "base":
            steps["base"] = c.base_copy_steps + c.base_steps
        elif stage == "warmup":
            steps["warmup"] = c.demo_steps
        elif stage in TRAINED:
            count = getattr(c, f"{kind_of(stage)}_steps")
            steps[stage] = count
            if stage in ("memagent", "mem1") and "memtrain" in steps:  # from the base, and from memtrain too
                steps[f"memtrain+{stage}"] = count
    return steps


def kinds_of(c) -> list[str]:
    """The kinds of GRPO steps among the stages: memtrain (masks), memagent (questions), mem1 (search)."""
    trained = set(map(kind_of, trainings(c)))
    return [kind for kind in ("memtrain", "memagent", "mem1") if kind in trained]


def evaluated(c) -> list[str]:
    """The systems whose memory loop a run evaluates on long texts, if it evaluates at all."""
    return _wanted(c, readers(_trained(c)))


def searched(c) -> list[str]:
    """Those that it evaluates on search."""
    return _wanted(c, searchers(_trained(c)))


def _trained(c) -> list[str]:
    made = trainings(c)
    return [s for s in systems_of(c) if (name := s.partition("@")[0]) in made and name != "base"
            and int(s.partition("@")[2] or 0) <= made[name]]


def _wanted(c, systems: list[str]) -> list[str]:
    return [s for s in systems if not c.eval_systems or s in c.eval_systems.split(",")]


def packed_tokens(c, stage: str) -> int:
    """Of one step, through forward and backward."""
    if stage in ("base", "warmup"):
        return (demonstrated if stage == "base" else warmed)(c).tokens
    return training(step(c, kind_of(stage)), c.micro_tokens).tokens


def work(c) -> dict[str, float]:
    """Of each stage of a run, in units of one packed token forward and backward: for how long it takes, beside other
    stages and runs of the same model."""
    done: dict[str, float] = {}
    for name, steps in trainings(c).items():
        done[name] = float(steps * packed_tokens(c, name))
        if name == "base":
            done[name] -= c.base_copy_steps * (packed_tokens(c, name) - COPIED)
        elif name == "memtrain":
            done[name] *= 0.55  # most recall groups have no signal and are not trained on
    if "eval" in c.stages.split(","):  # forward alone is about 2.5 times faster
        lengths = sum(int(n) for n in c.eval_lengths.split(","))
        done["eval"] = len(evaluated(c)) * lengths * c.eval_questions * (c.section + 110) / 2.5
        turns = len(searched(c)) * sum(x.sequences for x in searches(c))
        done["eval"] += turns * (c.result + c.memory + 110) / 2.5
    return done


# ---- Memory --------------------------------------------------------------------------------------------------------


def saved(c) -> tuple[float, float]:
    """Bytes that autograd keeps of one block, (per packed token, per token that goes on behind the attention).

    One after the other, on CUDA: the block's input, its norm and norm's factor, queries and keys before their norm,
    queries, keys, values, output and log-sum-exp of the attention; then the stream, its norm, gate, up, and their
    product; and what each adapter's A gives.
    """
    query, key, e = c.heads * c.head_size, c.key_heads * c.head_size, element(c)
    few = set(adapter_sizes(c))
    first = e * (c.width * (1 + adapted(c, "q", "k", "v")) + (query + key) * c.qk_norm + 2 * query + 2 * key)
    first += 4 * (1 + c.heads) + e * c.lora_rank * len(few & set("qkv"))
    second = e * (c.width * (1 + adapted(c, "gate", "up")) + c.hidden * (2 + adapted(c, "down")))
    second += e * c.lora_rank * len(few - set("qkv"))
    return first, second


def activations(c, tokens: int, scored: int) -> tuple[float, float]:
    """(kept from forward to backward, at work on top of it) in bytes, of a pass over `tokens` of which `scored` count.

    With recomputation a block keeps its input; one block at a time is then computed again.
    """
    e = element(c)
    first, second = saved(c)
    embedded = e * c.width if c.embed_norm and not c.lora_rank else 0
    ends = tokens * (4 * c.head_size + 24 + embedded) + scored * (2 * e * c.width + 20)
    if c.recompute:
        kept = tokens * c.layers * e * c.width
        width = tokens if c.layers > 1 else scored
        # beside what a block keeps, the gradients of its two widest tensors
        work = tokens * (first - e * c.width) + width * (second + e * c.hidden * (3 - adapted(c, "down")))
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


DRAW = 20  # bytes a logit at the worst moment of sampling.draw: log-probs in fp32, probabilities and their sum in fp64
DRAW_NUCLEUS = 52  # with top_p < 1: sorted copies with their indices, and the sort's workspace


PROMPTS = "prompts' activations, or logits"


@cache
def memory(c, vocab: int) -> dict[str, dict[str, float]]:
    """Bytes by part for each phase: sampling, training, base, evaluation (those that --stages has)."""
    e, (base, extra), own = element(c), parameters(c, vocab), projections(c)
    trained, stages, kinds = extra or base, c.stages.split(","), kinds_of(c)
    always = {"weights": base * e, "CUDA context (allowance)": CONTEXT} | ({"adapters": 4.0 * extra} if extra else {})
    copied = [math.prod(own[n]) for n in adapter_sizes(c)] if c.lora_merge else []
    merged = {"second copy of adapted weights": e * c.layers * sum(copied) + 8.0 * max(copied)} if copied else {}
    calls, graphs = [x for kind in kinds for x in step(c, kind)], 0.0
    phases: dict[str, dict[str, float]] = {}

    def learning(c, most: int, scored: int, weights: float) -> dict[str, float]:
        kept, work = activations(c, most, scored)
        work = max(work, 4.0 * weights - kept)  # AdamW's temporaries come when activations are gone
        return {"gradients": 4.0 * weights, "activations kept": kept, "one block at work": work}

    if calls:
        made = slots(c, calls)
        rows = max(m[0] for m in made)
        graphs = DRAW * vocab * rows  # all share one pool, as large as the largest of them
        stays = always | {"AdamW moments": 8.0 * trained, "KV cache": cache_bytes(c, made),
                          "captured decoding steps": graphs}
        if c.kl and not c.lora_rank:
            stays["reference model"] = 4.0 * base
        prompts = forward_bytes(c, prefill(c, calls, made).most)
        phases["sampling"] = stays | merged | {PROMPTS: max(prompts, graphs)}
        passes = [training(step(c, kind), c.micro_tokens) for kind in kinds]
        most, scored = (max(getattr(p, name) for p in passes) for name in ("most", "most_scored"))
        # kernels.grpo: a chunk of logits in fp32, and their gradients in its place
        phases["training"] = stays | learning(c, most, scored, trained) | {"logits": (1 << 25) * 4.0}
    if "base" in stages:
        p, hidden = demonstrated(c), c.layers * sum(math.prod(x) for x in own.values())
        most = max(p.most, min(COPIED, c.micro_tokens))
        phases["base"] = always | {"moments of Muon and AdamW": 4.0 * hidden + 8.0 * (base - hidden)} | learning(
            dataclasses.replace(c, kl=0.0), most, max(p.most_scored, most * 6 // 10), base) | {
                # kernels.logprob: a block of dz, two of sums
                "logits gradient": (1 << 25) * e + 2 * 4096 * c.width * 4.0}
    if "eval" in stages:
        systems = [x for s in ("base", "base-one-window") for x in evaluation(c, s)]
        systems += searches(c) if searched(c) else []
        made = slots(c, calls + systems)
        drawn = (DRAW_NUCLEUS if c.eval_top_p < 1 else DRAW) * vocab * max(m[0] for m in made[len(calls):])
        prompts = forward_bytes(c, prefill(c, systems, made[len(calls):]).most)
        phases["evaluation"] = always | merged | {
            "KV cache": cache_bytes(c, made), "captured decoding steps": max(graphs, drawn),
            PROMPTS: max(prompts, drawn)}
    return phases or {"start": always}


def peak(c, vocab: int) -> tuple[str, float]:
    """(phase, bytes) of the largest demand."""
    totals = {phase: sum(parts.values()) for phase, parts in memory(c, vocab).items()}
    worst = max(totals, key=totals.get)
    return worst, totals[worst]


def fitting(c, vocab: int, limit: float) -> dict[str, object]:
    """Fields to change so that the peak is at most `limit` bytes: of the mildest changes, one after the other, those
    that lower it; {} if that is not enough."""
    now, changes = c, {}
    while peak(now, vocab)[1] > limit:
        milder = {"recompute": True, "cache_gb": round(0.75 * now.cache_gb, 2),
                  "micro_tokens": max(c.window, now.micro_tokens // 2),
                  "sample_rows": max(c.group, now.sample_rows // 2), "lora_merge": False}
        least = 1.1 * token_bytes(c) * (c.window + c.response) / GB  # the cache has to hold a prompt and a response
        tried = ((name, value, dataclasses.replace(now, **{name: value})) for name, value in milder.items()
                 if value != getattr(now, name) and (name != "cache_gb" or value >= least))
        found = next((x for x in tried if peak(x[2], vocab)[1] < peak(now, vocab)[1]), None)
        if found is None:
            return {}
        now, changes = found[2], changes | {found[0]: found[1]}
    return changes


def remedy(c, vocab: int, limit: float) -> str:
    changes = fitting(c, vocab, limit)
    return " ".join(f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in changes.items()
                    ) or "a smaller preset"


# ---- Work and time -------------------------------------------------------------------------------------------------


def forward_flops(c, vocab: int, p: Passes, adapters: bool, head: int) -> dict[str, float]:
    """FLOPs of forward passes by kind: 2 a parameter and token (the last block's o and MLP on scored tokens only), 4 D
    a query head, visible pair and layer, 2 C V for each of `head` logit rows."""
    own, few = projections(c), adapter_sizes(c)

    def linear(sizes: dict[str, int]) -> float:
        first, rest = sum(sizes.get(n, 0) for n in "qkv"), sum(v for n, v in sizes.items() if n not in "qkv")
        return 2.0 * (p.tokens * (c.layers * first + (c.layers - 1) * rest) + p.scored * rest)

    return {"weights": linear({n: i * o for n, (i, o) in own.items()}), "adapters": linear(few) if adapters else 0.0,
            "attention": 4.0 * c.layers * c.heads * c.head_size * p.pairs, "head": 2.0 * c.width * vocab * head}


def training_flops(c, vocab: int, p: Passes, one_sweep: bool = True) -> float:
    """Forward and backward. A frozen weight has one product in the backward pass (the input's gradient), a trained one
    two; attention has seven against the forward's two (both kernels compute the scores again); the head, where it does
    not go with the GRPO loss in `one_sweep`, computes its logits again. Recomputation is one more forward of the
    blocks, less a last product of which nothing is kept; the reference one more of everything."""
    f, again = forward_flops(c, vocab, p, True, p.scored), bool(c.recompute)
    frozen = bool(c.lora_rank)
    total = f["weights"] * (1 + again + (1 if frozen else 2)) + f["adapters"] * (1 + again + 2)
    if again and "down" not in adapter_sizes(c):
        total -= 2.0 * c.width * c.hidden * (p.tokens * (c.layers - 1) + p.scored)
    total += f["attention"] * (1 + again + 3.5) + f["head"] * (3 - frozen + (not one_sweep))
    if c.kl:
        total += f["weights"] + f["attention"] + f["head"]
    return total


def sampling(c, vocab: int, calls: Sequence[Call], before: Sequence[Call], top_p: float) -> dict[str, float]:
    """Work of these calls after those `before`: FLOPs of prefill and of decoding, bytes that decoding moves, tokens
    through the model, tokens sampled, most rows side by side, decoding steps one after the other."""
    made = slots(c, [*before, *calls])[len(before):]
    pre, separate = prefill(c, calls, made), not c.lora_merge
    flops = sum(forward_flops(c, vocab, pre, separate, 0).values())
    base, extra = parameters(c, vocab)
    weights = element(c) * (base - (0 if c.tied else vocab * c.width)) + (4 * extra if separate else 0)
    out = {"prefill": flops, "decode": 0.0, "bytes": 0.0, "tokens": pre.tokens, "sampled": 0, "rows": 0, "steps": 0.0}
    kv = token_bytes(c)
    for x, (rows, groups, *_) in zip(calls, made, strict=True):
        side = min(rows, x.groups * x.members, groups * x.members)
        together = min(x.members, side)  # rows that read one prefix at once
        steps, context = x.sequences * x.sampled / side, x.given + x.sampled / 2
        p = Passes(tokens=x.sequences * x.sampled, scored=x.sequences * x.sampled,
                   pairs=int(x.sequences * x.sampled * (x.prefix + context)))
        out["decode"] += sum(forward_flops(c, vocab, p, separate, p.scored).values())
        # 60 bytes a logit: written, read and converted eight times in draw; sorted for a nucleus, about twice that
        out["bytes"] += steps * (weights + kv * (side / together * x.prefix + side * context)
                                 + side * vocab * (60 if top_p >= 1 else 130))
        out["tokens"] += x.sequences * (x.sampled - 1)
        out["steps"] += steps
        out["sampled"] += x.sequences * x.sampled
        out["rows"] = max(out["rows"], side)
    return out


def seconds(c, work: dict[str, float], card: Card, mfu: float) -> float:
    """Prefill at the share `mfu` of the peak; decoding is bound by it, by the bandwidth, or by the kernels' number."""
    peak_flops = rate(c, card) * 1e12 * mfu
    moved = work["bytes"] / (card.bandwidth * 1e9 * BANDWIDTH_SHARE)
    launched = work["steps"] * LAUNCH * (c.layers * KERNELS[0] + KERNELS[1])
    return work["prefill"] / peak_flops + max(moved, work["decode"] / peak_flops, launched)


def stages(c, vocab: int, card: Card, mfu: float) -> list[dict]:
    """For each stage: steps, seconds and FLOPs of a step, hours."""
    rows, before, trained, peak_flops = [], [], trainings(c), rate(c, card) * 1e12 * mfu

    def add(stage: str, steps: int, sampling_: float, training_: float, flops: float, side: int = 0) -> None:
        rows.append({"stage": stage, "steps": steps, "sample_seconds": sampling_, "train_seconds": training_,
                     "flops": flops, "sample_rows": side, "hours": steps * (sampling_ + training_) / 3600})

    taught = dataclasses.replace(c, kl=0.0)  # the stages without a reference
    if "base" in trained:  # its demonstrations are made on the CPU, beside the training
        flops = training_flops(taught, vocab, demonstrated(c), False)
        copied = training_flops(taught, vocab, Passes(1, COPIED, COPIED * 6 // 10, 64 * _pairs(32, 32, 1)), False)
        make = demonstrated(c).tokens * DEMONSTRATE / WORKERS
        add("base", c.base_steps, max(0.0, make - flops / peak_flops), flops / peak_flops, flops)
        add("base, copying", c.base_copy_steps, 0.0, copied / peak_flops, copied)
    if "warmup" in trained:
        flops = training_flops(taught, vocab, warmed(c), False)
        add("warmup", c.demo_steps, 0.0, flops / peak_flops, flops)
    for kind in kinds_of(c):
        calls = step(c, kind)
        work = sampling(c, vocab, calls, before, c.top_p)
        learn = training_flops(c, vocab, training(calls, c.micro_tokens))
        before = [*before, *calls]
        names = [n for n in trained if kind_of(n) == kind]
        add(names[0] + " (twice)" * (len(names) > 1), sum(trained[n] for n in names), seconds(c, work, card, mfu),
            learn / peak_flops, work["prefill"] + work["decode"] + learn, work["rows"])
    if "eval" in c.stages.split(","):
        works = [sampling(c, vocab, evaluation(c, s), before, c.eval_top_p)
                 for s in evaluated(c) + _wanted(c, ["base-one-window"])]
        works += [sampling(c, vocab, searches(c), before, c.eval_top_p) for _ in searched(c)]
        add(f"eval of {len(evaluated(c))} systems", 1, sum(seconds(c, w, card, mfu) for w in works), 0.0,
            sum(w["prefill"] + w["decode"] for w in works), max((w["rows"] for w in works), default=0))
    return rows


def study(c, vocab: int, card: Card, mfu: float) -> list[dict]:
    """For each arm of a study: runs and their hours in all, one after the other on one card."""
    arms: dict[str, dict] = {}
    for job in jobs(c):
        row = arms.setdefault(job.arm, {"arm": job.arm, "runs": 0, "steps": 0, "flops": 0.0, "hours": 0.0})
        rows = stages(job.config, vocab, card, mfu)
        row["runs"] += 1
        row["steps"] += sum(trainings(job.config).values())
        row["flops"] += sum(r["steps"] * r["flops"] for r in rows)
        row["hours"] += sum(r["hours"] for r in rows) + START
    return list(arms.values())


def tokens(c, kind: str) -> dict[str, int]:
    """Tokens of one step: through the model while sampling and in one training pass, and without any sharing."""
    calls = step(c, kind)
    sampled = sum(x.sequences * x.sampled for x in calls)
    return {"sampled": sampled, "prompts": prefill(c, calls, slots(c, calls)).tokens,
            "packed": training(calls, c.micro_tokens).tokens, "unshared": unshared(calls)}


# ---- The command ---------------------------------------------------------------------------------------------------


def vocabulary(c) -> int:
    """Rows of the embedding; without --vocab those of the shipped tokenizer, counted in its file."""
    ranks = Path(__file__).parents[1] / "data" / "nano" / "miniworld.tiktoken"
    return c.vocab or len(ranks.read_bytes().splitlines()) + 3


def make_plan(c, card: Card, name: str, mfu: float = MFU, limit: float = 0.0) -> dict:
    """Everything the command prints, as JSON values. limit: bytes of the card, 0: not asked."""
    vocab = vocabulary(c)
    base, extra = parameters(c, vocab)
    phase, most = peak(c, vocab)
    rows = stages(c, vocab, card, mfu)
    hours, flops = sum(r["hours"] for r in rows), sum(r["steps"] * r["flops"] for r in rows)
    arms = study(c, vocab, card, mfu) if is_study(c) else []
    if arms:
        hours, flops = sum(r["hours"] for r in arms), sum(r["flops"] for r in arms)
        phase, most = max((peak(job.config, vocab) for job in jobs(c)), key=lambda x: x[1])
    orders = {order: {k: tokens(dataclasses.replace(c, prompt_order=order), k) for k in kinds_of(c)}
              for order in ("section-first", "paper")}
    fits = not limit or most <= limit
    return {"preset": c.preset, "model": c.model, "parameters": base, "adapters": extra,
            "dtype": "bfloat16" if c.half else "float32", "memory": memory(c, vocab), "peak_phase": phase, "peak": most,
            "limit": limit, "fits": fits, "remedy": "" if fits else remedy(c, vocab, limit), "tokens": orders,
            "stages": rows, "hours": hours, "kwh": hours * card.watts / 1000, "study": arms, "flops": flops,
            "card": name, "tflops": rate(c, card), "mfu": mfu, "bandwidth": card.bandwidth}


def text(c, p: dict) -> str:
    """The plan for a terminal."""
    adapters = f"{p['adapters'] / 1e6:.1f} M in adapters (rank {c.lora_rank})" if p["adapters"] else "all trained"
    phases = p["memory"]
    memory_ = [["memory, GB", *phases]]
    memory_ += [[f"  {part}", *(f"{parts[part] / GB:.2f}" if part in parts else "" for parts in phases.values())]
                for part in dict.fromkeys(part for parts in phases.values() for part in parts)]
    memory_.append(["  total", *(f"{sum(parts.values()) / GB:.2f}" for parts in phases.values())])
    passed = [["tokens a step, thousands", "sampled", "prompts", "trained", "unshared"]]
    passed += [[f" {'*' if order == c.prompt_order else ' '}{kind}, {order}", *(
        f"{t[x] / 1e3:,.0f}" for x in ("sampled", "prompts", "packed", "unshared"))]
        for order, of in p["tokens"].items() for kind, t in of.items()]
    time = [[f"time, on {p['card']}", "steps", "sample s", "train s", "PFLOP", "hours"]]
    time += [[f"  {r['stage']}", str(r["steps"]), f"{r['sample_seconds']:.1f}", f"{r['train_seconds']:.1f}",
              f"{r['flops'] / 1e15:.2f}", f"{r['hours']:.2f}"] for r in p["stages"]]
    runs = [["the study, one run after the other", "runs", "steps", "PFLOP", "hours"]]
    runs += [[f"  {r['arm']}", str(r["runs"]), str(r["steps"]), f"{r['flops'] / 1e15:.2f}", f"{r['hours']:.2f}"]
             for r in p["study"]]
    fits = "fits" if p["fits"] else f"DOES NOT FIT {p['limit'] / GB:g} GB; it would with {p['remedy']}"
    products = "bfloat16" if c.half else "float32 as TF32" if c.tf32 else "float32"
    return (f"plan     preset {c.preset}  {c.model or 'own decoder'}  {p['parameters'] / 1e6:,.1f} M parameters in "
            f"{p['dtype']}, {adapters}\n\n{columns(memory_)}\n  peak {p['peak'] / GB:.1f} of {p['limit'] / GB:g} GB, "
            f"in {p['peak_phase']}: {fits}\n\n{columns(passed)}\n\n{columns(time)}\n\n"
            + f"{columns(runs)}\n" * bool(p["study"]) +
            f"  in all {p['flops'] / 1e18:.3g} EFLOP, {p['hours']:,.2f} hours, {p['kwh']:,.1f} kWh of the card\n\n"
            f"Assumed: {p['mfu']:.0%} of {p['tflops']:g} TFLOP/s ({products}) in prefill and training, "
            f"{BANDWIDTH_SHARE:.0%} of {p['bandwidth']:g} GB/s in decoding;\nsections, memories and documents of full "
            f"length, answers of {answer_tokens(c)} tokens, a signal in every group: an upper\nestimate, planned and "
            f"not measured.")


def refuse_too_large(c, vocab: int, limit: float) -> None:
    """InputError where the plan's peak exceeds a card of `limit` bytes, with what to change."""
    phase, most = peak(c, vocab)
    if most > limit:
        raise InputError(f"--device cuda: {limit / GB:.1f} GB of GPU memory, less than the {most / GB:.1f} GB that the "
                         f"plan needs in {phase}; give {remedy(c, vocab, limit)}")


def main(argv: Sequence[str], parse: Callable, presets: dict[str, dict]) -> None:
    """parse, presets: of memtrain.py. Prints the plan; InputError on what can't be planned."""
    parser = CommandParser("plan", "What a configuration will need: memory, tokens, FLOPs, hours, kWh.")
    parser.add_argument("--gpu", metavar="NAME", help=f"the card: {', '.join(CARDS)} (default: 4090 for a memory of "
                        f"24 GB and -consumer presets, else H100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="its memory (default: the card's)")
    parser.add_argument("--tflops", type=float, metavar="N", help="dense bfloat16 TFLOP/s (default: the card's)")
    parser.add_argument("--mfu", type=float, default=MFU, metavar="SHARE", help=f"share of it that is reached in "
                        f"prefill and training: an assumption (default: {MFU})")
    parser.add_argument("--out", metavar="FILE", help="write JSON")
    known, rest = parser.parse_known_args(list(argv))
    c = parse(rest)
    for name, most in (("gpu_memory", math.inf), ("tflops", math.inf), ("mfu", 1.0)):
        value = getattr(known, name)
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0"
                             f"{' and at most 1' if name == 'mfu' else ''}")
    small = (known.gpu_memory or 99) <= 24 or (known.gpu_memory is None and c.preset.endswith("-consumer"))
    name = {n.lower(): n for n in CARDS}.get((known.gpu or ("4090" if small else "H100")).lower())
    if name is None:
        raise InputError(f"--gpu {known.gpu}: unknown; choose one of {', '.join(CARDS)}, with --gpu-memory and "
                         f"--tflops of another")
    if c.model and not Path(c.model).exists() and c.model != presets[c.preset].get("model"):
        raise InputError(f"--model {c.model}: its shape is not known before it is downloaded; give its folder, or one "
                         f"of the presets")
    card = CARDS[name]
    if known.tflops:
        card, name = card._replace(tflops=known.tflops), f"{name} with {known.tflops:g} TFLOP/s"
    p = make_plan(c, card, name, known.mfu, (known.gpu_memory or card.memory) * GB)
    if known.out:
        write_json(output(Path(known.out), inputs=[]), p)
    print(text(c, p))
