"""MemTrain: self-supervised context memory training (arXiv 2606.03197), reproduced in one script.

A context-memory agent reads a document section by section. At each turn it sees [problem; memory; section] in one
fixed window and rewrites its memory; after the last section it answers from the memory alone. MemTrain trains this
memory without labels, on two tasks made from raw text:

    masked reconstruction  (A)  one entity y is [MASK] everywhere in the document; the agent reads on and names it
    memory recall, IMR     (B)  an earlier section with one entity as [TARGET]; name it from an intermediate memory

    R^I_ij = I[answer_ij = target_i]                              one recall prompt a rollout, G2 samples j
    R^E_i  = I[answer_i = y] + lambda / G2 * sum_j R^I_ij         G1 rollouts i of a document
    A      = R - mean of R over its group                         Dr. GRPO; broadcast to every turn and token
    J      = mean over interactions of the token mean of  min(r A, clip(r, 1-eps_low, 1+eps_high) A) - beta KL

Two downstream tasks show what that is good for: questions about long documents, read by the same loop (MemAgent), and
pairs of questions answered with a search tool, whose results take the section's place (MEM1). The data flows one way:

    corpus -> tasks -> rollouts -> rewards -> advantages -> packed batch -> loss -> step -> checkpoint
                                                                        checkpoints -> evaluation -> report

Differences from the paper, each with its reason, are listed in eval/README.md. Commands:

    python memtrain.py                                   the whole paper in miniature (preset nano, two CPU cores)
    python memtrain.py --seeds 0,1,2 --ablations --scaling    with every arm of its ablations, and one report of all
    python memtrain.py plan --preset qwen3-4b            its memory, tokens, hours; nothing is downloaded or run
    python memtrain.py --help                            every field of the configuration

Shape legend, for the whole project: B groups, N rollouts, T packed tokens, P prefix, S suffix, H query heads,
K key heads, D head size, C width, V vocabulary, G group size.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import random
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import InputError
from data.config import (
    COMMANDS,
    FREE_FIELDS,
    TRAINED,
    Config,
    as_evaluated,
    check,
    command_options,
    is_study,
    kept_steps,
    kind_of,
    lengths_of,
    parse,
    processes,
    refusal,
    rope_scaling,
)
from data.run.terminal import note, outlive_terminal, printable
from data.run.threads import spin_briefly
from eval import commands

if __name__ == "__main__":  # --help, typos, plans and studies are answered here, before torch is loaded
    outlive_terminal()
    spin_briefly()
    try:
        if sys.argv[1:2] == ["plan"]:
            sys.exit(commands.plan(sys.argv[2:]))
        if sys.argv[1:] and sys.argv[1] in COMMANDS:
            command_options(sys.argv[1], sys.argv[2:])
        elif is_study(parse(sys.argv[1:])):
            sys.exit(commands.study(sys.argv[1:]))
    except InputError as e:
        sys.exit(refusal(e, sys.argv[1:]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.problems import Data
from data.prompts import FULL, MASK_PROBLEM, SHORT, Prompts
from data.run import ranks
from data.run.folder import Interrupt, Log, RunFolder, Stopped, deaf
from data.search import CORRECTION, Action, SearchProblem, observation, split_response
from data.tasks import Problem, cut_middle, recall_target, recall_then, sections
from data.text.retrieval import Retriever
from data.weights.checkpoint import load_checkpoint, save_checkpoint
from data.weights.loading import check_vocabulary, choose_dtype, load_tokenizer
from data.weights.pretrained import check_window, load_adapter, load_weights, locate, read_shape
from data.weights.tokenizer import Tokenizer
from eval.header import header
from eval.metrics import exact_match, extract_boxed
from eval.stage import command, commit, earlier_results, evaluate
from eval.watch import signs, watch
from kernels import synchronise, use_triton
from kernels.attention import memory_attention
from kernels.fused import add_norm, norm_rope, swiglu
from kernels.grpo import linear_grpo_loss
from kernels.joined import joined, products
from kernels.layout import moved
from kernels.logprob import linear_logprob
from kernels.packing import Packed, bounded, group_by_prefix, pack
from kernels.sampling import Sampler, Turn

# ---- Decoder -----------------------------------------------------------------------------------------------------

Adapters = list[tuple[torch.Tensor, torch.Tensor]] | None  # A and B of every adapted layer, in order; None: no adapters


class Linear(nn.Module):
    """y = x W^T + b + scale * x A^T B^T; the last term only with LoRA, where W is frozen and B starts at zero.

    W has the dtype of the activations; A and B are float32 masters.
    """

    def __init__(self, name: str, inputs: int, outputs: int, c: Config, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.adapted = c.lora_rank > 0 and name in c.lora_targets.split(",")
        self.frozen: tuple[torch.Tensor, torch.Tensor] | None = None  # adapters in place of its own
        self.joint: list | None = None  # while sampling: weight and bias with those of the layers beside it
        if self.adapted:
            self.lora_a = nn.Parameter(torch.empty(c.lora_rank, inputs, dtype=torch.float32))
            self.lora_b = nn.Parameter(torch.zeros(outputs, c.lora_rank, dtype=torch.float32))
            self.scale = c.lora_alpha / c.lora_rank

    def forward(self, x):
        return self.adapt(F.linear(x, self.weight, self.bias), x)

    def adapt(self, y, x):
        """Adds the last term to y, in place."""
        if self.adapted:
            a, b = self.frozen or (self.lora_a, self.lora_b)
            y.addmm_(F.linear(x, a.to(x.dtype)), b.to(x.dtype).T, alpha=self.scale)
        return y

    def merged(self) -> torch.Tensor:
        """W + scale B A, in the dtype of W."""
        return (self.weight + self.scale * self.lora_b @ self.lora_a).to(self.weight.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, c: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), c.norm_eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then SwiGLU: the block of Qwen3 (QK-norm), Qwen2 (bias) and Llama."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.norm1, self.norm2 = RMSNorm(c.width, c), RMSNorm(c.width, c)
        self.q = Linear("q", c.width, c.heads * c.head_size, c, c.bias)
        self.k = Linear("k", c.width, c.key_heads * c.head_size, c, c.bias)
        self.v = Linear("v", c.width, c.key_heads * c.head_size, c, c.bias)
        self.o = Linear("o", c.heads * c.head_size, c.width, c)
        self.q_norm, self.k_norm = (RMSNorm(c.head_size, c) if c.qk_norm else None for _ in range(2))
        self.gate, self.up = Linear("gate", c.width, c.hidden, c), Linear("up", c.width, c.hidden, c)
        self.down = Linear("down", c.hidden, c.width, c)

    def forward(self, x, rotary, attend, wanted=None, slots=None):
        """x (T,C) -> (T,C), or (M,C) where only the rows `wanted` (M) are needed: all are keys, few go on."""
        T, D, eps = len(x), self.c.head_size, self.c.norm_eps
        norms = (self.q_norm.weight, self.k_norm.weight) if self.c.qk_norm else None
        q, k, v = (y.view(T, -1, D) for y in products(self.norm1(x), (self.q, self.k, self.v)))  # (T,H,D), 2 (T,K,D)
        q, k = norm_rope(q, k, v, rotary, norms, eps, slots)
        a = attend(q, k, v).reshape(T, -1)  # (T,H*D)
        if wanted is not None:
            a, x = a.index_select(0, wanted), x.index_select(0, wanted)
        x, h = add_norm(x, self.o(a), self.norm2.weight, eps)
        return x + self.down(swiglu(*products(h, (self.gate, self.up))))


def rope_frequencies(c: Config) -> torch.Tensor:
    """(D/2) float32, radians a position. With scaling as in Llama 3: waves longer than original / low are stretched by
    the factor, those shorter than original / high stay, between them it is blended."""
    f = c.rope_theta ** (-torch.arange(0, c.head_size, 2, dtype=torch.float64, device="cpu") / c.head_size)
    if numbers := rope_scaling(c):
        factor, low, high, original = numbers
        share = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        f = share * f + (1 - share) * f / factor
    return f.float()


class Decoder(nn.Module):
    """Token ids to hidden states. The head is applied outside, so that linear_logprob owns it.

    base_id: which frozen weights the adapters belong to; checkpoints of adapters carry it. share: of --micro-tokens
    that a forward pass takes; halved once if memory runs out.
    """

    def __init__(self, c: Config, vocab: int):
        super().__init__()
        self.c, self.base_id, self.share = c, "", 1.0
        self.fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)
                       if f.metadata["group"] == "model"} | {"lora_rank": c.lora_rank, "lora_targets": c.lora_targets}
        self.embed = nn.Parameter(torch.empty(c.vocab or vocab, c.width))
        self.embed_norm = RMSNorm(c.width, c) if c.embed_norm else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c)
        if not c.tied:
            self.output = nn.Parameter(torch.empty(c.vocab or vocab, c.width))
        self.register_buffer("inverse_frequency", rope_frequencies(c), persistent=False)
        if self.embed.device.type != "meta":  # there, a checkpoint brings the weights
            self.initialise(c.seed)
        if c.lora_rank:  # everything else stays put
            for name, p in self.named_parameters():
                p.requires_grad_(".lora_" in name)

    @torch.no_grad()
    def initialise(self, seed: int):
        """Output projections start at zero, so that each block starts as the identity: with a plain Gaussian
        start, names were not copied after 15 M tokens, in a feasibility study on this kind of machine."""
        generator = torch.Generator().manual_seed(seed)
        self.embed.normal_(0, 1, generator=generator)
        if not self.c.tied:
            self.output.normal_(0, 0.001, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                if name.endswith((".o", ".down")):
                    module.weight.zero_()
                else:
                    module.weight.normal_(0, module.weight.shape[1] ** -0.5, generator=generator)
        self.reset_adapters(generator)

    @torch.no_grad()
    def reset_adapters(self, generator: torch.Generator | None = None):
        """A random, B zero: the network is its base again."""
        generator = generator or torch.Generator().manual_seed(self.c.seed)
        for module in self.adapted():
            a = torch.empty(module.lora_a.shape).normal_(0, module.lora_a.shape[1] ** -0.5, generator=generator)
            module.lora_a.copy_(a)
            module.lora_b.zero_()

    def adapted(self) -> list[Linear]:
        return [m for m in self.modules() if isinstance(m, Linear) and hasattr(m, "lora_a")]

    def frozen_adapters(self) -> Adapters:
        """A copy of the adapters as they are, a few MB; None where they change nothing yet."""
        layers = self.adapted()
        if not any(m.lora_b.any() for m in layers):
            return None
        return [(m.lora_a.detach().clone(), m.lora_b.detach().clone()) for m in layers]

    @contextmanager
    def with_adapters(self, kept: Adapters) -> Iterator[None]:
        """The network with these adapters instead of its own; None: with none."""
        layers = self.adapted()
        for m, pair in zip(layers, kept or [None] * len(layers), strict=True):
            m.frozen, m.adapted = pair, kept is not None
        try:
            yield
        finally:
            for m in layers:
                m.frozen, m.adapted = None, True

    @contextmanager
    def merged(self) -> Iterator[None]:
        """For sampling: adapters added to the weights, products taken together; afterwards the very same weights."""
        layers = self.adapted() if self.c.lora_merge else []
        kept = [m.weight.data.clone() for m in layers]
        for m in layers:  # in place: captured graphs know the weights by address
            m.weight.data.copy_(m.merged())
            m.adapted = False
        try:
            with joined(g for b in self.blocks for g in ((b.q, b.k, b.v), (b.gate, b.up))):
                yield
        finally:
            for m, weight in zip(layers, kept, strict=True):
                m.weight.data.copy_(weight)
                m.adapted = True

    @property
    def head(self) -> torch.Tensor:  # (V,C)
        return self.embed if self.c.tied else self.output

    def forward(self, ids, positions, attend, wanted=None, slots=None):
        """ids, positions (T) -> hidden (T,C), or (M,C) of the tokens `wanted` (M): the last block does without the
        others. attend(layer, q, k, v) -> (T,H,D) decides who sees whom: it is memory_attention in training, fills
        the cache in prefill and reads it in decoding. slots: of each layer, where new keys and values go first."""
        angle = positions[:, None].float() * self.inverse_frequency  # (T,D/2)
        rotary = angle.cos()[:, None], angle.sin()[:, None]
        x = F.embedding(ids, self.embed)
        if self.embed_norm:
            x = self.embed_norm(x)
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            arguments = x, rotary, partial(attend, layer), wanted if last else None, slots and slots[layer]
            if self.c.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.norm(x)


# ---- Scoring -----------------------------------------------------------------------------------------------------


def states(model: Decoder, packed: Packed) -> torch.Tensor:
    """Hidden states that predict the scored tokens of a packed batch: (M,C)."""
    return model(packed.ids, packed.layout.positions,
                 lambda layer, q, k, v: memory_attention(q, k, v, packed.layout), packed.source)


def score(model: Decoder, packed: Packed, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every scored token of a packed batch: (M,), (M,)."""
    return linear_logprob(states(model, packed), model.head, packed.target, temperature)


# ---- The memory loop ---------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """One reading of one document: a turn per section, then the answer turn. memories[t]: tokens after section t."""

    problem: Problem
    sections: list[list[int]]
    turns: list[Turn]
    memories: list[list[int]]
    answer: str | None = None
    finished: int = 0  # turns that ended with the stop token

    @property
    def correct(self) -> float:
        return exact_match(self.answer, self.problem.answers)

    def opening(self, prompts: Prompts) -> tuple[list[int], list[int]]:
        """What every turn shows, whatever was read: instruction and problem."""
        return prompts.update(self.problem.question, [], [])


@dataclass
class Search:
    """One episode of search QA. memories[t]: tokens of the state after turn t; actions[t]: what it did then;
    returned[t]: the passages that its query found."""

    problem: SearchProblem
    turns: list[Turn]
    memories: list[list[int]]
    actions: list[Action]
    returned: list[list[str]]
    shown: list[int]  # ids of what came back last
    finished: int = 0  # turns that ended with the stop token

    @property
    def answers(self) -> Sequence[str | None]:
        """One for each question: those of the last turn, nothing else counts."""
        return self.actions[-1].answers or [None] * len(self.problem.answers)

    @property
    def hits(self) -> list[float]:
        """Exact match of each question."""
        return [exact_match(a, gold) for a, gold in zip(self.answers, self.problem.answers, strict=True)]

    @property
    def correct(self) -> float:
        return sum(self.hits) / len(self.problem.answers)

    def opening(self, prompts: Prompts) -> tuple[list[int], list[int]]:
        return prompts.search(self.problem.questions, "", [], [], False)


class Agent:
    """A policy with its prompts: the one memory loop that training and evaluation share."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, c: Config, sampler: Sampler | None = None):
        self.model, self.tokenizer, self.c = model, tokenizer, c
        self.sampler = sampler or Sampler(model)
        self.prompts = Prompts(tokenizer, c.prompt_order, FULL if c.prompts == "full" else SHORT, c.memory)

    def sample(self, prompts, keys, limit: int = 0) -> list[Turn]:
        return self.sampler(self.c, prompts, keys, limit or self.c.response, self.tokenizer.stops)

    def written(self, turn: Turn) -> list[int]:
        """What a turn wrote, without its stop token."""
        return list(itertools.takewhile(lambda token: token not in self.tokenizer.stops, turn.sampled))

    def boxed(self, turn: Turn) -> str | None:
        return extract_boxed(self.tokenizer.decode(self.written(turn)))

    def sections(self, problem: Problem) -> Iterator[list[int]]:
        return sections(problem.passages, self.tokenizer, self.c.section)

    def read(self, problems: Sequence[Problem], keys: Sequence[tuple], keep_turns: bool = True) -> list[Rollout]:
        """Reads each problem's document section by section and answers; all rollouts go in step.

        keys: one tuple a rollout; its random numbers follow from it, whatever else is in the batch. keep_turns:
        evaluation of very long documents does without the turns and the sections: with a hundred questions they were
        a tenth of the process.
        """
        streams = {p.id: self.sections(p) for p in problems}
        rollouts = [Rollout(p, [], [], []) for p in problems]
        memory = [self.prompts.no_memory] * len(rollouts)
        for t in itertools.count():
            section = {name: next(stream, None) for name, stream in streams.items()}
            reading = [i for i, p in enumerate(problems) if section[p.id] is not None]
            if not reading:
                break
            prompts = [self.prompts.update(problems[i].question, section[problems[i].id], memory[i]) for i in reading]
            for i, turn in zip(reading, self.sample(prompts, [(*keys[i], t) for i in reading]), strict=True):
                memory[i] = self.written(turn)[:self.c.memory]
                if keep_turns:
                    rollouts[i].sections.append(section[problems[i].id])
                rollouts[i].memories.append(memory[i] if keep_turns else array("I", memory[i]))
                self._note(rollouts[i], turn, keep_turns)
        prompts = [self.prompts.answer(r.problem.question, m) for r, m in zip(rollouts, memory, strict=True)]
        for r, turn in zip(rollouts, self.sample(prompts, [(*k, "answer") for k in keys]), strict=True):
            self._note(r, turn, keep_turns)
            r.answer = self.boxed(turn)
        return rollouts

    def search(self, problems: Sequence[SearchProblem], keys: Sequence[tuple], retriever: Retriever) -> list[Search]:
        """MEM1's loop: each turn rewrites the state and searches or answers; everything older is gone. A turn that does
        neither is shown a correction. An episode ends with its answers, or after --turns turns. keys: as in read."""
        c, correction = self.c, self.tokenizer.encode(CORRECTION)
        episodes = [Search(p, [], [], [], [], self.prompts.no_result) for p in problems]
        for t in range(c.turns):
            going = [i for i, e in enumerate(episodes) if not (e.actions and e.actions[-1].answers)]
            if not going:
                break
            prompts = [self._search_prompt(episodes[i], t == c.turns - 1) for i in going]
            for i, turn in zip(going, self.sample(prompts, [(*keys[i], t) for i in going], c.memory + c.act),
                               strict=True):
                state, action = split_response(self.written(turn), self.tokenizer, len(problems[i].questions))
                episodes[i].memories.append(state[:c.memory])
                episodes[i].actions.append(action)
                self._note(episodes[i], turn, True)
            asking = [i for i in going if episodes[i].actions[-1].query]
            for i in going:
                episodes[i].shown = correction
                episodes[i].returned.append([])
            found = retriever.search([episodes[i].actions[-1].query for i in asking], c.hits)
            for i, indices in zip(asking, found, strict=True):
                episodes[i].returned[-1] = [retriever.corpus.passages[p].rendered for p in indices]
                episodes[i].shown = observation(episodes[i].returned[-1], self.tokenizer, c.result)
        return episodes

    def _search_prompt(self, e: Search, last: bool) -> tuple[list[int], list[int]]:
        query = " ".join(self.tokenizer.decode(self.tokenizer.encode(e.actions[-1].query)[:self.c.act]).split()) if (
            e.actions) else ""
        memory = e.memories[-1] if e.memories else self.prompts.no_memory  # one that was emptied stays so, as in read
        return self.prompts.search(e.problem.questions, query, e.shown, memory, last)

    def _note(self, rollout: Rollout | Search, turn: Turn, keep: bool) -> None:
        rollout.finished += turn.sampled[-1] in self.tokenizer.stops
        if keep:
            rollout.turns.append(turn)

    def update(self, question: str, section: list[int], memory: list[int], key: tuple) -> list[int]:
        """The memory after one more section: a turn of `read` for one document that comes as it goes."""
        (turn,) = self.sample([self.prompts.update(question, section, memory)], [key])
        return self.written(turn)[:self.c.memory]

    def answer(self, question: str, memory: list[int], key: tuple) -> tuple[str, str | None]:
        """(whole response, what its box holds)."""
        (turn,) = self.sample([self.prompts.answer(question, memory)], [key])
        return self.tokenizer.decode(self.written(turn)), self.boxed(turn)

    def answer_in_one_window(self, problems: Sequence[Problem], keys: Sequence[tuple]) -> list[str | None]:
        """Baseline: the whole document in one window, its middle cut out where it does not fit."""
        room = self.c.window - self.c.response
        prompts = []
        for p in problems:
            ids = [token for section in self.sections(p) for token in section]
            used = sum(map(len, self.prompts.direct(p.question, [])))
            prompts.append(self.prompts.direct(p.question, cut_middle(ids, max(0, room - used))))
        return [self.boxed(turn) for turn in self.sample(prompts, keys)]

    def recall(self, sections, memories, targets, keys) -> tuple[list[Turn], list[float]]:
        """Names [TARGET] of each masked section (token ids) from a memory: turns and exact matches."""
        turns = self.sample([self.prompts.recall(s, m) for s, m in zip(sections, memories, strict=True)], keys)
        return turns, [exact_match(self.boxed(t), [y]) for t, y in zip(turns, targets, strict=True)]


def recall_probe(agent: Agent, finder, rollout: Rollout, rng: random.Random):
    """Task B of the paper: an intermediate step k, an earlier section l < k, one entity of it as [TARGET]. As
    the public release asks it, 1 <= l <= k counting from 0, and the memory is that before step k: --released-probe.
    -> (masked section ids, memory, target), or None where the document is too short or nameless.
    """
    early = agent.c.released_probe
    if len(rollout.sections) < 2:
        return None
    k = rng.randrange(1, len(rollout.sections))
    if rollout.problem.kind == "masked-last":  # what held then: of the section just read, beside what it overtook
        made = recall_then([agent.tokenizer.decode(s) for s in rollout.sections[:k + 1]], finder, rng)
    else:
        made = recall_target(agent.tokenizer.decode(rollout.sections[rng.randrange(k) + early]), finder, rng)
    if made is None:
        return None
    masked, target = made
    # [TARGET] may be more tokens than the name it hides: the window stays as it is
    return agent.tokenizer.encode(masked)[:agent.c.section], rollout.memories[k - early], target


# ---- GRPO --------------------------------------------------------------------------------------------------------


Reference = Decoder | Adapters  # of the KL term: the policy at the start of the stage, which adapters alone may tell


@dataclass
class Batch:
    """What one sampling phase leaves to train on: sequences with the reward entry each belongs to.

    rewards, group (R): all end-to-end rollouts and all recall samples, each with the id of its group.
    """

    turns: list[Turn]
    entry: list[int]  # of each turn: its index into rewards
    rewards: list[float]
    group: list[int]
    document: list[int]  # of each reward entry: its document, for minibatches
    stats: dict[str, float]


def collect(agent: Agent, data: Data, stage: str, step: int) -> Batch:
    """Samples one step: G1 rollouts a document (in MEM1: a pair of questions) and, in MemTrain, G2 recalls a rollout;
    rewards of equations 1-2."""
    c = agent.c
    masked = stage == "memtrain"
    mine = range(ranks.RANK, c.documents, ranks.WORLD)  # one process reads them all
    problem = {"memtrain": data.masked_problem, "memagent": data.training_question, "mem1": data.training_pair}[stage]
    problems = {d: problem(step * c.documents + d) for d in mine}
    keys = [(c.seed, stage, step, d, g) for d in mine for g in range(c.group)]
    given = [problems[d] for _, _, _, d, _ in keys], keys
    rollouts = agent.search(*given, data.retriever(held_out=False)) if stage == "mem1" else agent.read(*given)
    rewards = [r.correct for r in rollouts]
    turns = [t for r in rollouts for t in r.turns]
    entry = [i for i, r in enumerate(rollouts) for _ in r.turns]
    group = [d for _, _, _, d, _ in keys]
    document = list(group)
    lists = {"reward_em": list(rewards)}
    if masked and c.recall_group:
        probes = []
        for i, (rollout, key) in enumerate(zip(rollouts, keys, strict=True)):
            rng = random.Random(repr(("probe", *(key[:4] if c.shared_probe else key))))
            if probe := recall_probe(agent, data.finder, rollout, rng):
                probes.append((i, *probe))
        copies = [(p, j) for p in probes for j in range(c.recall_group)]
        recalled, hits = agent.recall([p[1] for p, _ in copies], [p[2] for p, _ in copies],
                                      [p[3] for p, _ in copies],
                                      [(*keys[p[0]], "recall", j) for p, j in copies]) if copies else ([], [])
        for n, (i, *_) in enumerate(probes):
            share = float(np.mean(hits[n * c.recall_group:(n + 1) * c.recall_group]))
            rewards[i] += c.recall_weight * share
            group += [c.documents * (1 + c.group * ranks.RANK) + n] * c.recall_group  # unlike those of other ranks
            document += [document[i]] * c.recall_group
        entry += range(len(rollouts), len(rollouts) + len(recalled))
        turns += recalled
        rewards += hits
        lists["recall"] = hits
    lists |= {"reward": rewards[:len(rollouts)], "finished": [t.sampled[-1] in agent.tokenizer.stops for t in turns],
              "memory_tokens": [len(m) for r in rollouts for m in r.memories]}
    lists |= {k: [v] for k, v in signs(agent, rollouts, rewards[:len(rollouts)], turns).items()}
    device = agent.model.embed.device
    stats = {name: ranks.mean(values, device) for name, values in lists.items()}
    stats["tokens_sampled"] = int(ranks.total([sum(len(t.sampled) for t in turns)], device)[0])
    return Batch(turns, entry, rewards, group, document, stats)


def with_signal(batch: Batch) -> set[int]:
    """DAPO's filter: groups whose rewards are all equal teach nothing and are dropped before any computation."""
    by_group: dict[int, set[float]] = {}
    for g, r in zip(batch.group, batch.rewards, strict=True):
        by_group.setdefault(g, set()).add(r)
    return {g for g, values in by_group.items() if len(values) > 1}


def shared(batch: Batch, groups: set[int], device: torch.device) -> Batch:
    """The rewards of all ranks and the turns of `groups`, at every rank: an update is dealt out evenly, whoever sampled
    what it learns from."""
    first = sum(ranks.gather([len(batch.rewards)], device)[:ranks.RANK])
    kept = ranks.gather([(first + e, t.prefix, t.given, t.sampled, t.logprobs) for t, e in zip(
        batch.turns, batch.entry, strict=True) if batch.group[e] in groups], device)
    return Batch([Turn(*t) for _, *t in kept], [e for e, *_ in kept], *(
        ranks.gather(values, device) for values in (batch.rewards, batch.group, batch.document)), batch.stats)


def micro_batches(turns: Sequence[Turn], limit: int) -> Iterator[list[list[int]]]:
    """Turns (indices) by shared prefix, in batches of at most about `limit` packed tokens."""
    batch, used = [], 0
    for members in group_by_prefix([t.prefix for t in turns]):
        part, size = [], len(turns[members[0]].prefix)
        for i in members:
            own = len(turns[i].given) + len(turns[i].sampled)
            if used + size + own > limit and (part or batch):
                yield [*batch, part] if part else batch
                batch, part, used, size = [], [], 0, len(turns[i].prefix)
            part.append(i)
            size += own
        batch.append(part)
        used += size
    if batch:
        yield batch


# sums over the tokens of an update; mismatch: |log pi scored - log pi sampled|, outside: ratios not in [0.8, 1.25]
SUMS = ("tokens", "kl", "clip_low", "clip_high", "entropy", "loss", "mismatch", "outside", "broken")


def micro_loss(model: Decoder, reference: Reference, c: Config, batch: Batch, entry: Sequence[int],
               micro: Sequence[Sequence[int]], turns: Sequence[Turn], interactions: float):
    """The micro-batch `micro` of `turns`, whose reward entries are `entry`: (loss, SUMS (9) fp64, largest mismatch,
    packed tokens). Nothing is read back from the device."""
    device, order = model.embed.device, [i for group in micro for i in group]
    packed = pack([(turns[g[0]].prefix, [(turns[i].given, turns[i].sampled) for i in g]) for g in micro], device, [
        np.array([x for i in order for x in turns[i].logprobs]), np.array(batch.rewards, np.float64),
        np.array(batch.group), np.array([entry[i] for i in order])])
    (old, rewards, group, rollout), offsets = packed.carried, packed.offsets
    if c.token_mean:  # each token an interaction of its own
        rollout = rollout.repeat_interleave(offsets.diff(), output_size=len(old))
        offsets = torch.arange(len(old) + 1, device=device)
    ref = reference_logprobs(model, reference, packed, c) if c.kl else None
    loss, stats, new, entropy = linear_grpo_loss(
        states(model, packed), model.head, packed.target, old, ref, rewards, group, rollout, offsets,
        interactions, c.eps_low, c.eps_high, c.kl, c.divide_by_std, c.temperature)
    with torch.no_grad():
        gap = (new - old.to(new.dtype)).abs()
        stats |= {"entropy": entropy.sum(), "loss": loss, "mismatch": gap.sum(),
                  "outside": (gap > math.log(1.25)).sum(),  # log 1.25 = -log 0.8
                  "broken": ~torch.isfinite(gap).all()}  # clipping can hide an inf
        sums = torch.stack([stats[name].to(device, torch.float64) for name in SUMS])
    return loss, sums, gap.max(), packed.layout.total


def accumulate(model: Decoder, reference: Reference, c: Config, batch: Batch, chosen: Sequence[int],
               limit: int) -> tuple[dict[str, float], float]:
    """Adds this rank's share of the gradient of the objective, a mean over the chosen turns, by micro-batches. Returns
    SUMS by name with `trained`, the packed tokens, and the largest mismatch."""
    turns, entry = [batch.turns[i] for i in chosen], [batch.entry[i] for i in chosen]
    interactions = sum(len(t.sampled) for t in turns) if c.token_mean else len(turns)
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=model.embed.device)
    largest, trained = total.new_zeros(()), 0
    for micro in itertools.islice(micro_batches(turns, limit), ranks.RANK, None, ranks.WORLD):
        loss, sums, most, tokens = micro_loss(model, reference, c, batch, entry, micro, turns, interactions)
        loss.backward()
        total += sums
        largest = torch.maximum(largest, most)
        trained += tokens
    return dict(zip(SUMS, total.tolist(), strict=True)) | {"trained": trained}, float(largest)


def update(model: Decoder, reference: Reference, optimizer, c: Config, batch: Batch,
           entries: set[int]) -> dict[str, float]:
    """One optimiser step on the turns of the given reward entries. Micro-batches never change the gradient; if memory
    runs out, they are halved, once."""
    chosen = [i for i, e in enumerate(batch.entry) if e in entries]
    device = model.embed.device
    while True:
        try:
            total, largest = accumulate(model, reference, c, batch, chosen, int(c.micro_tokens * model.share))
            break
        except torch.OutOfMemoryError:
            if model.share < 1:
                raise InputError(f"out of memory while training with half of --micro-tokens {c.micro_tokens}; lower "
                                 f"it, or give --recompute") from None
        model.share = 0.5
        optimizer.zero_grad(set_to_none=True)
        tqdm.write(f"out of memory while training: going on with half of --micro-tokens {c.micro_tokens}")
    total = dict(zip(total, ranks.total(list(total.values()), device), strict=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ranks.sum_gradients(parameters)
    norm = float(nn.utils.clip_grad_norm_(parameters, c.grad_clip))
    skipped = total["broken"] > 0 or not (math.isfinite(norm) and math.isfinite(total["loss"]))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    per_token = {name: total[name] / max(1.0, total["tokens"]) for name in (
        "kl", "clip_low", "clip_high", "entropy", "mismatch")}
    return per_token | {"mismatch_max": ranks.largest(largest, device),
                        "mismatch_outside": total["outside"] / max(1.0, total["tokens"]), "grad_norm": norm,
                        "loss": total["loss"], "skipped": float(skipped), "tokens_trained": total["trained"]}


def reference_of(model: Decoder, c: Config) -> Reference:
    """The policy as it is now, frozen: a copy of its adapters, or of the whole network where that is trained."""
    return model.frozen_adapters() if c.lora_rank else copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def reference_logprobs(model: Decoder, reference: Reference, packed: Packed, c: Config) -> torch.Tensor:
    """Log-probs under the policy that the stage started from."""
    if isinstance(reference, Decoder):
        return score(reference, packed, c.temperature)[0]
    with model.with_adapters(reference):
        return score(model, packed, c.temperature)[0]


# ---- A run -------------------------------------------------------------------------------------------------------


class Policy:
    """Tokenizer and decoder of a configuration, and where their weights come from.

    c: the configuration, with the shape of --model. The decoder of a --model stays on the meta device until its
    weights are loaded.
    """

    def __init__(self, c: Config, device: torch.device):
        self.device, self.source = device, None
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if c.tf32 else "highest")
        if c.model:
            self.source = locate(c.model, c.revision)
            c = dataclasses.replace(c, **read_shape(self.source))
            check(c)
            check_window(self.source, c.window)
        c = dataclasses.replace(c, dtype=choose_dtype(c, device))
        self.c, self.tokenizer = c, load_tokenizer(*filter(None, [self.source]))
        if c.vocab:
            check_vocabulary(self.tokenizer, c.vocab)
        with torch.device("meta" if c.model else "cpu"):  # its generator is the CPU's, so that a seed means the same
            self.model = Decoder(c, self.tokenizer.size)
        if not c.model:
            self.model.to(device)

    @classmethod
    def of(cls, c: Config, folder: Path, checkpoint: Path | None = None) -> Policy:
        """The policy of a checkpoint in a run's folder; without one the base that the configuration starts from."""
        policy = cls(c, choose_device(c.device))
        policy.load_base(RunFolder(folder))
        if checkpoint:
            load_checkpoint(checkpoint, policy.model, policy.tokenizer)
        return policy

    def load_base(self, folder: RunFolder) -> None:
        """Weights that training starts from. Frozen ones are read once; afterwards only the adapters are reset."""
        c, model = self.c, self.model
        if c.lora_rank and model.base_id:
            model.reset_adapters()
        elif self.source:
            load_weights(self.source, model, self.device)
        else:
            trained = folder.checkpoint("base") if folder.finished("base") else None
            load_checkpoint(trained or Path(c.init or SHIPPED_BASE), model, self.tokenizer)
        if self.source and c.init:
            load_adapter(Path(c.init), model)
        if self.source and folder.finished("warmup"):
            load_checkpoint(folder.checkpoint("warmup"), model, self.tokenizer)


class Run:
    """A folder under runs/, its configuration, data, model and log."""

    def __init__(self, c: Config):
        self.c, self.folder = c, RunFolder(Path("runs") / c.run)
        self.device = choose_device(c.device)
        ranks.join(self.device)
        self.policy = Policy(c, self.device)
        self.c, self.tokenizer, self.model = self.policy.c, self.policy.tokenizer, self.policy.model
        c, self.data = self.c, Data(self.c, self.tokenizer)
        self.agent = Agent(self.model, self.tokenizer, c)
        self.evaluated = Agent(self.model, self.tokenizer, as_evaluated(c), self.agent.sampler)
        longest = max([MASK_PROBLEM, *(q.question for q in self.data.questions)], key=len)
        if (need := self.agent.prompts.overhead(longest) + c.section + c.memory + c.response) > c.window:
            if c.corpus == "miniworld":
                raise InputError(f"--window {c.window}: the longest problem makes a turn of {need} tokens; "
                                 f"raise --window or lower --section, --memory or --response")
            note(f"some questions make a turn of {need} tokens, more than --window {c.window}")
        self.folder.compare(dataclasses.asdict(c), FREE_FIELDS, dataclasses.asdict(Config()))
        stages = c.stages.split(",")
        if "eval" in stages:
            earlier_results(self.folder.measured(c.world) / "results.json")
        for stage in {"memtrain+memagent", "memtrain+mem1"}.intersection(stages):
            if not self.folder.finished("memtrain") and "memtrain" not in stages[:stages.index(stage)]:
                raise InputError(f"--stages {c.stages}: {stage} starts from memtrain, which is not finished in "
                                 f"{self.folder.path}; give memtrain before it")
        if "base" not in stages and {"warmup", *TRAINED, "eval"}.intersection(stages):
            self.load("base")  # a checkpoint that does not fit is refused before anything is written
            if c.lora_rank:  # so are adapters of another base; whole weights would be read twice for nothing
                for name in filter(self.folder.finished, TRAINED):
                    self.load(name)
        if ranks.FIRST:
            self.folder.claim(dataclasses.asdict(c))
            self.log = Log(self.folder.path, dataclasses.asdict(c))
        self.interrupt = Interrupt()
        ranks.wait()  # the folder is there

    def load(self, system: str) -> None:
        """Fills the model with the weights of a system."""
        if system == "base" or self.c.lora_rank:
            self.policy.load_base(self.folder)
        if system != "base":
            load_checkpoint(self.folder.checkpoint(system), self.model, self.tokenizer)

    # Rank 0 writes, the others wait until it has written.

    def save(self, name: str, state: dict, optimizers=(), best: bool = False) -> None:
        if ranks.FIRST:
            save_checkpoint(self.folder.checkpoint(name), self.model, self.tokenizer, state, optimizers, best)
        ranks.wait()

    def write(self, row: dict) -> None:
        if ranks.FIRST:
            self.log.write(row)

    def rewind(self, stage: str, step: int) -> None:
        if ranks.FIRST:
            self.log.rewind(stage, step)

    def asked_to_stop(self) -> bool:
        """Whether any rank was interrupted: then all stop after the same step."""
        return ranks.total([self.interrupt.asked], self.device)[0] > 0


SHIPPED_BASE = Path(__file__).parent / "data" / "nano" / "base.safetensors"


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu")
    device = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():  # with its index, as every tensor there says its device
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.cuda.set_device(device)
    try:
        use_triton(device)
    except ValueError as e:
        raise InputError(str(e)) from None
    return device


# ---- Stages ------------------------------------------------------------------------------------------------------


def train_base(run: Run) -> None:
    """The stand-in for an instruct model: copying, then text and demonstrations of the five formats."""
    from data.world.steps import DemoSteps
    from eval.gates import gates

    c, model = run.c, run.model
    if not run.folder.checkpoint("base").exists() and c.init and load_checkpoint(
            Path(c.init), model, run.tokenizer).get("done"):
        with torch.no_grad():  # a finished base was sharpened at its end, as this one will be
            model.norm.weight.div_(c.base_sharpen)

    def scale(step: int) -> float:
        after = step - c.base_copy_steps  # warm up anew after copying; the last half decays to zero
        return min(1.0, (step + 1) / 20, 2 - 2 * (after + 0.5) / c.base_steps if after >= 0 else 1.0,
                   (after + 1) / 20 if after >= 0 else 1.0)

    state = teach(run, "base", DemoSteps(c, run.tokenizer), base_optimizers(c, model), scale, text=0.2)
    with torch.no_grad():
        model.norm.weight.mul_(c.base_sharpen)
    state |= {"done": True, "config": dataclasses.asdict(c), "commit": commit()}
    run.save("base", state | {"gates": gates(run.agent, c) if ranks.FIRST else {}})


def warm_up(run: Run) -> None:
    """Real weights learn the formats from demonstrations that raw text gives, before they are rewarded."""
    from data.warmup import WarmupSteps
    from eval.gates import real_gates

    c, data = run.c, run.data
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=c.demo_lr, weight_decay=0.)
    steps = WarmupSteps(c, data.train, data.finder, run.agent.prompts)
    _ = steps[0]  # a corpus that holds nothing to ask is refused here, in one line, and not by a worker
    state = teach(run, "warmup", steps, [optimizer], lambda step: min((step + 1) / 5, 1 - step / c.demo_steps))
    state |= {"done": True, "commit": commit()}
    run.save("warmup", state | {"gates": real_gates(run.agent, c, data) if ranks.FIRST else {}})


def teach(run: Run, name: str, steps: Sequence, optimizers, scale, text: float = 0.0) -> dict:
    """Imitates steps[i], rows as `imitate` takes them, one optimiser step each, from where it stopped; the state then.
    scale(i): factor on all learning rates."""
    from torch.utils.data import DataLoader, Subset

    c, path = run.c, run.folder.checkpoint(name)
    rates = [[g["lr"] for g in o.param_groups] for o in optimizers]
    state = {"stage": name, "step": 0, "seconds": 0.0, "tokens": 0}
    if path.exists():
        state = load_checkpoint(path, run.model, run.tokenizer, optimizers)
    run.rewind(name, state["step"])
    # a generator of its own: no run draws from the global ones, so that no checkpoint has to keep their state
    # on a CPU they would take the cores that train; a GPU waits for one of them: 0.5 s a step of preset small, measured
    workers = 1 if run.device.type == "cpu" else min(8, max(1, (os.cpu_count() or 2) - 1))
    demos = iter(DataLoader(Subset(steps, range(state["step"], len(steps))), batch_size=None, num_workers=workers,
                            prefetch_factor=4, generator=torch.Generator(), worker_init_fn=deaf))
    with ExitStack() as stack:
        # the workers are told to go: deaf as they are, an exit that only sends it a signal would wait for ever
        stack.callback(demos._shutdown_workers)
        bar = stack.enter_context(tqdm(total=len(steps), initial=state["step"], desc=name, unit="step",
                                       disable=not ranks.FIRST))
        while state["step"] < len(steps):
            step, start = state["step"], time.perf_counter()
            loss, tokens = imitate(run.model, next(demos), c, step, run.device, text)
            for o, lr in zip(optimizers, rates, strict=True):
                for g, base in zip(o.param_groups, lr, strict=True):
                    g["lr"] = base * scale(step)
                o.step()
                o.zero_grad(set_to_none=True)
            synchronise(run.device)
            seconds = time.perf_counter() - start
            state |= {"step": step + 1, "seconds": state["seconds"] + seconds, "tokens": state["tokens"] + tokens}
            run.write({"stage": name, "step": step, "loss": loss, "seconds": seconds, "tokens": tokens})
            bar.set_postfix_str(f"loss {loss:.3f}")
            bar.update()
            stop = run.asked_to_stop()
            if state["step"] % c.save_every == 0 or state["step"] == len(steps) or stop:
                run.save(name, state, optimizers)
            if stop:
                raise Stopped
    return state


def base_optimizers(c: Config, model: Decoder) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the hidden matrices, AdamW for the rest."""
    hidden = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    heads = [] if c.tied else [{"params": [model.output], "lr": c.base_lr / 5}]
    return (torch.optim.Muon(hidden, lr=c.base_lr, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW([{"params": [model.embed], "lr": c.base_lr}, *heads,
                               {"params": vectors, "lr": c.base_lr / 5}], betas=(0.9, 0.95), weight_decay=0.0))


def imitate(model: Decoder, rows, c: Config, step: int, device, share: float) -> tuple[float, int]:
    """Gradient of the weighted next-token loss of rows [(prefix, [(given, response, weight), ...]), ...]; a share
    of the prefix tokens is scored too, at weight 0.6. Returns loss and packed tokens."""
    generator = torch.Generator().manual_seed(step)
    batches, total = [], 0.0
    for micro in bounded(sorted(rows, key=lambda r: len(r[0])), c.micro_tokens):
        packed = pack([(p, [(g, r) for g, r, _ in s]) for p, s in micro], device)
        weight = [torch.full((len(r),), w) for _, s in micro for _, r, w in s]
        text = packed.layout.within_prefixes()
        text = text[torch.rand(len(text), generator=generator).numpy() < share]
        weight = torch.cat([*weight, torch.full((len(text),), 0.6)])
        total += float(weight.sum())
        batches.append((packed, *moved([text, weight.numpy()], device)))
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for packed, text, weight in batches[ranks.RANK::ranks.WORLD]:
        packed.source = torch.cat([packed.source, text])
        packed.target = torch.cat([packed.target, packed.ids[text + 1]])
        logprob, _ = score(model, packed)
        part = -(logprob * weight).sum() / total
        part.backward()
        loss += part.detach()
    ranks.sum_gradients(model.parameters())
    return ranks.total([float(loss)], device)[0], sum(p.layout.total for p, _, _ in batches)


RECENT = 5  # steps whose mean reward decides which checkpoint is the best: one step's is noise


def train_policy(run: Run, name: str, start: str) -> None:
    """One stage of reinforcement learning, from system `start`: memtrain, or memagent or mem1, which are called
    memtrain+... where they start from it."""
    c, model, path = run.c, run.model, run.folder.checkpoint(name)
    kind = kind_of(name)
    steps = {"memtrain": c.memtrain_steps, "memagent": c.memagent_steps, "mem1": c.mem1_steps}[kind]
    if run.folder.finished(name):
        return
    run.load(start)
    reference = reference_of(model, c) if c.kl else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=c.lr, weight_decay=0.0)
    state = {"stage": name, "step": 0, "seconds": 0.0, "tokens_prompts": 0, "tokens_sampled": 0,
             "tokens_trained": 0, "rewards": [], "poisoned": 0}
    if path.exists():
        state = load_checkpoint(path, model, run.tokenizer, [optimizer])
    run.rewind(name, state["step"])
    with tqdm(total=steps, initial=state["step"], desc=name, unit="step", disable=not ranks.FIRST) as bar:
        while state["step"] < steps:
            row = train_step(run, kind, state["step"], reference, optimizer)
            run.write({"stage": name} | row)
            state["step"] += 1
            state["rewards"].append(row["reward"])
            for total in ("seconds", "tokens_prompts", "tokens_sampled", "tokens_trained"):
                state[total] += row[total]
            state["poisoned"] = state["poisoned"] + 1 if row.get("skipped") == 1 else 0
            if state["poisoned"] == 5:
                raise InputError(f"{name}: loss, gradient or a log-prob was not finite in five steps in a row, up to "
                                 f"step {state['step']}; lower --lr, or give a sound --init")
            for sign in watch(row, state.setdefault("seen", {})):
                note(f"{name}, step {state['step']}: {sign}")
            bar.set_postfix_str(f"reward {row['reward']:.2f} exact {row['reward_em']:.2f} signal {row['signal']:.2f}")
            bar.update()
            done = state["step"] == steps  # the finished policy does without its optimiser
            stop = run.asked_to_stop()
            if state["step"] in kept_steps(c) and kind != "memtrain":
                run.save(f"{name}@{state['step']}", state | {"done": True})
            if done or state["step"] % c.save_every == 0 or stop:
                recent = float(np.mean(state["rewards"][-RECENT:]))
                best = recent >= state.get("best", 0.0)
                state["best"] = max(recent, state.get("best", 0.0))
                run.save(name, state | {"done": done}, [] if done else [optimizer], best)
            if stop:
                raise Stopped
    if not run.folder.finished(name):  # a stage of no steps
        run.save(name, state | {"done": True})


def train_step(run: Run, kind: str, step: int, reference, optimizer) -> dict:
    """Sample, reward, filter, update; returns the row of metrics.jsonl."""
    c, sampler, began = run.c, run.agent.sampler, time.perf_counter()
    before = sampler.prompt_tokens
    batch = collect(run.agent, run.data, kind, step)
    prompts = int(ranks.total([sampler.prompt_tokens - before], run.device)[0])
    sampled = time.perf_counter() - began
    signal_, groups = with_signal(batch), len(set(batch.group))
    batch = shared(batch, signal_, run.device)
    for g in optimizer.param_groups:
        g["lr"] = c.lr * min(1.0, (step + 1) / max(1, c.warmup))
    rows = []
    for first in range(0, c.documents, c.update_documents):
        entries = {e for e in batch.entry if first <= batch.document[e] < first + c.update_documents}
        if entries:
            rows.append(update(run.model, reference, optimizer, c, batch, entries))
    synchronise(run.device)
    seconds = time.perf_counter() - began
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]} if rows else {}
    mean |= {k: v for k, v in rows[0].items() if "mismatch" in k} if rows else {}  # later ones have moved on purpose
    mean["tokens_trained"] = sum(r["tokens_trained"] for r in rows)
    signals, groups = ranks.total([len(signal_), groups], run.device)
    speed = mean["tokens_trained"] / max(1e-9, seconds - sampled)
    return {"step": step, "seconds": seconds, "seconds_sampling": sampled,
            "tokens_prompts": prompts} | batch.stats | mean | {
        "signal": signals / groups, "tokens_per_s": speed}


def report(run: Run) -> None:
    from eval.report.page import write_report

    path = write_report(run.folder.measured(run.c.world))
    print(printable(f"\n{path.read_text(encoding='utf-8')}\nreport: {path}"))


def run_stages(run: Run) -> None:
    for stage in run.c.stages.split(","):
        if stage in ("base", "warmup"):
            if not run.folder.finished(stage):
                (train_base if stage == "base" else warm_up)(run)
        elif stage == "memtrain":
            train_policy(run, "memtrain", "base")
        elif stage in ("memagent", "mem1"):
            train_policy(run, stage, "base")
            if run.folder.finished("memtrain"):
                train_policy(run, f"memtrain+{stage}", "memtrain")
        elif stage in ("memtrain+memagent", "memtrain+mem1"):
            train_policy(run, stage, "memtrain")
        elif stage == "eval":
            if not evaluate(run, lengths_of(run.c), recall_probe):
                raise Stopped
        elif stage == "report" and ranks.FIRST:
            report(run)


# ---- Command line ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    own, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    try:
        if argv and argv[0] in COMMANDS:
            given = {"read": (Policy.of, Agent), "gates": (Policy.of, Agent, recall_probe), "export": (Policy.of,)}
            return getattr(commands, argv[0])(argv[1:], *given.get(argv[0], ())) or 0
        c = parse(argv)
        if is_study(c):
            return commands.study(argv)
        with ranks.together(processes(c, torch.cuda.is_available()) if own else 1):
            torch.set_num_threads(c.threads or max(1, (os.cpu_count() or 1) // ranks.WORLD))
            if c.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
                torch.use_deterministic_algorithms(True)
            run = Run(c)
            try:
                if ranks.FIRST:
                    header(run, score)
                run_stages(run)
            finally:
                if ranks.FIRST:
                    run.log.close()
    except torch.OutOfMemoryError as e:
        return refusal(InputError(str(e).partition("\n")[0]), argv)
    except InputError as e:
        return refusal(e, argv)
    except (Stopped, KeyboardInterrupt):
        print(f"stopped; continue with: {command()}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
