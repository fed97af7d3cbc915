"""Sampling, packing, rewards, the update and the loop that a run can leave and take up again."""

import dataclasses
import json
import math
import os
import random
import signal
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from safetensors.torch import load_file
from test_kernels import dense, plain_loss

import memtrain
from data import InputError
from data.run.files import write_json
from data.run.folder import Interrupt
from data.tasks import Problem
from data.text.entities import occurs
from kernels import joined
from kernels.cache import Cache
from kernels.grpo import grpo_loss
from memtrain import Batch, Sampler, Turn, collect, micro_batches, pack, score, update, with_signal

STOP = 2


def prompts_of(vocab=29, seed=0) -> list[tuple]:
    """Nine ragged prompts: groups of four, two, one and two with equal prefixes, out of order."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]  # noqa: E731
    prefixes = [ids(2, 9), ids(40, 70), ids(1, 1), ids(5, 6)]
    return [(prefixes[g], ids(1, 4)) for g in (0, 1, 0, 0, 2, 3, 1, 0, 3)]


def sampled(model, c, limit=14, prompts=None, keys=None) -> list[Turn]:
    prompts = prompts or prompts_of()
    return Sampler(model)(c, prompts, keys or [("k", i) for i in range(len(prompts))], limit, [STOP])


def packed_of(turns):
    """(packed batch, order of the turns in it)."""
    groups = memtrain.group_by_prefix([t.prefix for t in turns])
    rows = [(turns[g[0]].prefix, [(turns[i].given, turns[i].sampled) for i in g]) for g in groups]
    return pack(rows), [i for g in groups for i in g]


def alone(model, turn, temperature=1.0):
    """Log-probs of a turn by the plainest way: its own sequence, dense causal attention, full logits."""
    ids = torch.tensor(turn.prefix + turn.given + turn.sampled)
    hidden = model(ids, torch.arange(len(ids)), lambda layer, q, k, v: dense(q, k, v))
    logp = (hidden @ model.head.T / temperature).log_softmax(-1)  # (T,V)
    first = len(turn.prefix) + len(turn.given)
    return logp[torch.arange(first - 1, len(ids) - 1), ids[first:]]


# ---- sampling against scoring


@pytest.mark.parametrize("options", [[], ["--temperature", "0.7"], ["--sample-rows", "3"], ["--tied"],
                                     ["--embed-norm", "false"], ["--lora-rank", "3", "--lora-alpha", "3"]],
                         ids=" ".join)
def test_sampled_logprobs_are_the_recomputed_ones(options, tiny, decoder, monkeypatch):
    """Decode path against packed path against one plain sequence: groups, ragged prompts, dropped rows."""
    drops, keep = [], Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, rows: (drops.append(len(rows)), keep(self, rows))[1])
    c = tiny(*options)
    model = decoder(c, 9)  # among nine tokens the stop comes up soon, at different times
    turns = sampled(model, c, 24, prompts_of(9))
    lengths = {len(t.sampled) for t in turns}
    assert len(drops) >= 2 and len(lengths) >= 3, "the case has to reach dropped rows"
    packed, order = packed_of(turns)
    new, entropy = score(model, packed, c.temperature)
    recorded = torch.tensor([x for i in order for x in turns[i].logprobs])
    torch.testing.assert_close(new, recorded, atol=1e-5, rtol=0)
    plain = torch.cat([alone(model, turns[i], c.temperature) for i in order])
    torch.testing.assert_close(new, plain, atol=1e-5, rtol=0)
    assert (entropy > 0).all() and recorded.std() > 0.3, "not a uniform policy: that would hide mistakes"


@pytest.mark.parametrize("options", [[], ["--lora-rank", "3", "--lora-alpha", "3"]], ids=["all weights", "LoRA"])
def test_the_reference_is_scored_at_the_temperature(options, tiny, decoder):
    """The KL at a stage's first step is 0 at any temperature: policy and reference are one, and scored alike."""
    c = tiny("--temperature", "0.7", *options)
    model = decoder(c, 9)
    packed, _ = packed_of(sampled(model, c, 8, prompts_of(9)))
    with torch.no_grad():
        new, plain = score(model, packed, c.temperature)[0], score(model, packed)[0]
    found = memtrain.reference_logprobs(model, memtrain.reference_of(model, c), packed, c)
    torch.testing.assert_close(found, new, atol=1e-6, rtol=0)
    assert (new - plain).abs().max() > 0.05


def test_a_response_ends_with_its_first_stop_or_at_the_limit(tiny, decoder):
    turns = sampled(decoder(vocab=9), tiny(), 8, prompts_of(9))
    assert [(t.prefix, t.given) for t in turns] == prompts_of(9), "in the order of the prompts"
    for t in turns:
        assert len(t.logprobs) == len(t.sampled) <= 8
        assert STOP not in t.sampled[:-1] and (t.sampled[-1] == STOP or len(t.sampled) == 8)
    assert {True, False} == {t.sampled[-1] == STOP for t in turns}, "the case has to reach both ends"
    assert Sampler(decoder(vocab=9))(tiny(), [], [], 8, [STOP]) == [], "no recall in documents of one section"


@pytest.mark.parametrize("rows", ["1024", "4", "1"])
def test_a_response_follows_from_its_key_alone(rows, tiny, decoder):
    """Replayed alone, in another order or in smaller batches: the same tokens."""
    model, prompts = decoder(), prompts_of()
    keys = [("k", i) for i in range(len(prompts))]
    whole = [t.sampled for t in sampled(model, tiny())]
    back = sampled(model, tiny("--sample-rows", rows), prompts=prompts[::-1], keys=keys[::-1])
    assert [t.sampled for t in back[::-1]] == whole
    (single,) = sampled(model, tiny(), prompts=prompts[4:5], keys=keys[4:5])
    assert single.sampled == whole[4]
    assert [t.sampled for t in sampled(model, tiny(), keys=[("other", i) for i in range(9)])] != whole


@pytest.mark.parametrize(("kernels", "rows", "limits"), [("torch", "1024", (9, 4)), ("torch", "3", (9, 4)),
                                                         ("triton", "5", (6, 3))])
def test_chunks_of_launches_of_fixed_size_sample_the_same(kernels, rows, limits, tiny, decoder, monkeypatch):
    """What CUDA does, but for the capture itself: several steps between two looks, rows that idle or have ended, slots
    that are filled again, buffers that stay from call to call."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = decoder(vocab=9)
    expected = [sampled(model, tiny(), limit, prompts_of(9)) for limit in limits]
    monkeypatch.setenv("MEMTRAIN_KERNELS", kernels)
    sampler, c, prompts = Sampler(model, chunk=4), tiny("--sample-rows", rows), prompts_of(9)
    keys, storage, tokens = [("k", i) for i in range(len(prompts))], None, None
    for limit, turns in zip(limits, expected, strict=True):
        got = sampler(c, prompts, keys, limit, [STOP])
        storage, tokens = (sampler.storage, sampler.tokens) if limit == limits[0] else (storage, tokens)
        assert sampler.static == (kernels == "triton")
        assert [t.sampled for t in got] == [t.sampled for t in turns]
        for a, b in zip(got, turns, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)
    assert sampler.storage is storage and sampler.tokens is tokens, "a shorter limit needs no other buffers"


def test_any_of_several_stop_tokens_ends_a_response(tiny, decoder):
    model, prompts = decoder(vocab=9), prompts_of(9)
    one = sampled(model, tiny(), 24, prompts)
    two = Sampler(model)(tiny(), prompts, [("k", i) for i in range(9)], 24, [STOP, 4])
    for a, b in zip(one, two, strict=True):
        first = next((i for i, token in enumerate(a.sampled) if token in (STOP, 4)), len(a.sampled) - 1)
        assert b.sampled == a.sampled[:first + 1]
    assert any(t.sampled[-1] == 4 for t in two)


def test_sampling_keeps_to_its_budget(tiny, decoder, monkeypatch):
    """Batches are sized by --cache-gb before anything runs; if memory is short all the same, half of it, once."""
    model = decoder(vocab=9)
    expected = [t.sampled for t in sampled(model, tiny(), 14, prompts_of(9))]
    token = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, key heads, head size, fp32
    c = tiny("--cache-gb", str(224 * token / 1e9))  # a prefix of 80, and a suffix of 32 four times
    sampler = Sampler(model)
    keys = [("k", i) for i in range(9)]
    assert [t.sampled for t in sampler(c, prompts_of(9), keys, 14, [STOP])] == expected
    rows, groups, suffix, prefix = sampler.cache.capacity
    assert rows * suffix + groups * prefix <= 224 and 1 < rows < 9
    with pytest.raises(InputError, match="too little for one turn"):
        sampled(model, tiny("--cache-gb", "1e-6"))

    def failing(times):
        left, forward = [times], memtrain.Decoder.forward

        def forward_or_not(self, *arguments, **named):
            left[0] -= 1
            if left[0] in range(times):
                raise torch.OutOfMemoryError
            return forward(self, *arguments, **named)
        monkeypatch.setattr(memtrain.Decoder, "forward", forward_or_not)

    failing(1)
    assert [t.sampled for t in Sampler(model)(tiny(), prompts_of(9), keys, 14, [STOP])] == expected
    failing(2)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory while sampling with half"):
        sampled(model, tiny())


def test_a_narrow_nucleus_is_greedy_and_the_frequencies_are_the_probabilities(tiny, decoder):
    model = decoder()
    for turn in sampled(model, tiny("--top-p", "0.000001"), limit=5):
        packed, _ = packed_of([turn])
        hidden = model(packed.ids, packed.layout.positions, lambda _, q, k, v: dense(q, k, v))
        assert (hidden[packed.source] @ model.head.T).argmax(-1).tolist() == turn.sampled
    prompt = prompts_of()[0]
    first = [t.sampled[0] for t in sampled(model, tiny(), 1, [prompt] * 2000, [("f", i) for i in range(2000)])]
    ids = torch.tensor(prompt[0] + prompt[1])
    p = (model(ids, torch.arange(len(ids)), lambda _, q, k, v: dense(q, k, v))[-1] @ model.head.T).softmax(-1)
    share = torch.bincount(torch.tensor(first), minlength=29) / 2000
    assert (share - p).abs().max() < 0.05  # five standard errors


# ---- the packed batch and the gradient


def loss_inputs(turns, order, seed=1):
    """Old and reference log-probs near the new ones, rewards of two groups, one entry a turn."""
    rng = torch.Generator().manual_seed(seed)
    logprobs = [torch.tensor(t.logprobs) + 0.3 * torch.randn(len(t.sampled), generator=rng) for t in turns]
    reference = [x + 0.2 * torch.randn(len(x), generator=rng) for x in logprobs]
    rewards = torch.rand(len(turns), generator=rng, dtype=torch.float64)
    group = torch.tensor([i % 2 for i in range(len(turns))])
    offsets = F.pad(torch.tensor([len(turns[i].sampled) for i in order]).cumsum(0), (1, 0))
    return logprobs, reference, rewards, group, offsets


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a: dict, b: dict, tolerance=1e-5) -> None:
    """Every parameter's gradient, relative to the largest entry of that gradient."""
    assert a.keys() == b.keys() and a
    for name in a:
        scale = float(b[name].abs().max())
        assert scale > 0, f"{name}: a zero gradient would prove nothing"
        assert float((a[name] - b[name]).abs().max()) <= tolerance * max(1.0, scale), name


@pytest.mark.parametrize("options", [[], ["--tied"], ["--lora-rank", "3", "--lora-alpha", "3"]],
                         ids=" ".join)
def test_a_packed_batch_is_each_sequence_alone(options, tiny, decoder):
    c = tiny(*options)
    model = decoder(c)
    turns = sampled(model, c)
    packed, order = packed_of(turns)
    old, ref, rewards, group, offsets = loss_inputs(turns, order)
    loss, _ = grpo_loss(score(model, packed)[0], torch.cat([old[i] for i in order]), torch.cat([ref[i] for i in order]),
                        rewards, group, torch.tensor(order), offsets, len(turns), 0.2, 0.3, 0.1)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    truth = sum(plain_loss(alone(model, t), old[i], ref[i], rewards, group, torch.tensor([i]),
                           torch.tensor([0, len(t.sampled)]), len(turns), 0.2, 0.3, 0.1) for i, t in enumerate(turns))
    truth.backward()
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), abs=1e-5)
    close(ours, gradients(model))


def test_who_wrote_a_token_decides_what_is_trained(agent, tiny):
    """Everything sampled is scored, the stop token included; prompts and sections never, whatever they say."""
    a = agent()
    end, assistant = a.tokenizer.end, a.tokenizer.assistant[-1]
    text = a.tokenizer.encode("\\boxed{ Brisar River} <|assistant|> Memory: Section: <|end|>")
    prompts = [a.prompts.update("Who?", text, text), a.prompts.answer("Who?", text), a.prompts.recall(text, text)]
    turns = [Turn(*prompts[0], [*text, end], []), Turn(*prompts[0], [end], []), Turn(*prompts[1], text, []),
             Turn(*prompts[2], [*text[:3], end], [])]
    packed, order = packed_of(turns)
    assert packed.target.tolist() == [token for i in order for token in turns[i].sampled]
    assert packed.offsets.diff().tolist() == [len(turns[i].sampled) for i in order]
    ids, place = packed.ids.tolist(), 0
    for source, target, n in zip(*(iter(x) for x in _spans(packed)), strict=True):
        assert ids[source[0]] == assistant, "the first is predicted at the end of the prompt"
        assert source == list(range(source[0], source[0] + n))
        assert [ids[s + 1] for s in source[:-1]] == target[:-1], "the last is predicted, never read"
        place += n
    assert place == len(packed.target)
    trained = {s + 1 for source in _spans(packed)[0] for s in source[:-1]}
    assert len(ids) - len(trained) == sum(map(len, (prompts[0][0], prompts[0][1] * 2, *prompts[1], *prompts[2])))


def _spans(packed):
    counts = packed.offsets.diff().tolist()
    return [s.tolist() for s in packed.source.split(counts)], [t.tolist() for t in packed.target.split(counts)], counts


class Catch:
    """An optimiser that keeps the gradients it is shown."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def step(self):
        self.steps.append(gradients(self.model))

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)


@pytest.fixture(scope="module")
def reading(tiny, decoder, tokenizer):
    """One step's batch of a random policy, with rewards that vary: (agent, data, batch)."""
    c = tiny("--grad-clip", "1e9", "--passages", "20")
    a = memtrain.Agent(decoder(c, tokenizer.size), tokenizer, c)
    data = memtrain.Data(c, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memtrain.Agent, "boxed", lambda self, turn: self.tokenizer.decode(turn.sampled))
        patch.setattr(memtrain, "exact_match", lambda text, answers: float(zlib.crc32(text.encode()) % 2))
        return a, data, collect(a, data, "memtrain", 0)


@pytest.mark.parametrize("token_mean", [False, True], ids=["mean of turns", "mean of tokens"])
def test_micro_batches_never_change_the_gradient(token_mean, reading, decoder):
    a, _, batch = reading
    reference = decoder(a.c, a.tokenizer.size, seed=1)
    chosen = {e for e, g in enumerate(batch.group) if g in with_signal(batch)}
    caught, rows = Catch(a.model), []
    for limit in (1, 300, 700, 10**9):
        c = dataclasses.replace(a.c, micro_tokens=limit, token_mean=token_mean)
        rows.append(update(a.model, reference, caught, c, batch, chosen))
        close(caught.steps[-1], caught.steps[0], 2e-6)
    assert len(caught.steps) == 4
    for row in rows:
        for name in ("loss", "kl", "entropy", "grad_norm", "clip_low", "clip_high"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-7), name
    assert rows[0]["tokens_trained"] > 1.5 * rows[-1]["tokens_trained"], "prefixes are shared where they can be"
    assert rows[0]["kl"] > 0 and rows[0]["clip_low"] == rows[0]["clip_high"] == 0


def test_the_objective_is_a_mean_of_turns_or_of_tokens(reading):
    """From the policy that sampled, each ratio is 1 and the objective is the mean advantage, of turns or of tokens:
    where the turns differ in length, so do the two."""
    a, _, batch = reading
    batch = dataclasses.replace(batch, turns=[Turn(t.prefix, t.given, t.sampled[:n], t.logprobs[:n])
                                              for n, t in enumerate(batch.turns, start=1)])
    chosen = {e for e, g in enumerate(batch.group) if g in with_signal(batch)}
    mean = {g: np.mean([r for r, own in zip(batch.rewards, batch.group, strict=True) if own == g])
            for g in batch.group}
    used = [(batch.rewards[e] - mean[batch.group[e]], len(t.sampled)) for t, e in zip(
        batch.turns, batch.entry, strict=True) if e in chosen]
    advantages, lengths = zip(*used, strict=True)
    wanted = {False: np.mean(advantages), True: np.average(advantages, weights=lengths)}
    assert len(set(lengths)) > 1 and abs(wanted[False] - wanted[True]) > 1e-4
    for token_mean, value in wanted.items():
        c = dataclasses.replace(a.c, kl=0.0, token_mean=token_mean)
        assert update(a.model, None, Catch(a.model), c, batch, chosen)["loss"] == pytest.approx(-value, abs=1e-6)


def test_micro_batches_hold_every_turn_once_within_the_limit(reading):
    turns = reading[2].turns
    size = lambda i: len(turns[i].given) + len(turns[i].sampled)  # noqa: E731
    for limit in (1, 400, 1500, 10**9):
        batches = list(micro_batches(turns, limit))
        assert sorted(i for b in batches for g in b for i in g) == list(range(len(turns)))
        for b in batches:
            assert all(turns[i].prefix == turns[g[0]].prefix for g in b for i in g)
            total = sum(len(turns[g[0]].prefix) + sum(map(size, g)) for g in b)
            assert total <= limit or sum(map(len, b)) == 1
    assert len(batches) == 1 and len(batches[0]) == len({tuple(t.prefix) for t in turns})


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]], ids=["all weights", "LoRA"])
def test_recomputing_activations_changes_nothing_but_the_memory(lora, tiny, decoder, reading):
    a, _, batch = reading
    entries, kept, gradients = set(batch.entry), [], []
    for recompute in ("false", "true"):
        c = tiny(*lora, "--recompute", recompute, "--grad-clip", "1e9", "--kl", "0")
        model = decoder(c, a.tokenizer.size)
        caught, sizes = Catch(model), {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        packed, _ = packed_of(batch.turns)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            score(model, packed)
        update(model, None, caught, c, batch, entries)
        kept.append(sum(sizes.values()))
        gradients.append(caught.steps[-1])
    close(gradients[1], gradients[0], 1e-6)
    assert kept[1] < 0.6 * kept[0]


def test_out_of_memory_halves_the_micro_batches_once(decoder, reading, monkeypatch):
    a, _, batch = reading
    entries, states, limits = set(batch.entry), memtrain.states, []
    model = decoder(dataclasses.replace(a.c, kl=0.0), a.tokenizer.size)
    caught, c = Catch(model), dataclasses.replace(a.c, kl=0.0, micro_tokens=2000)
    update(model, None, caught, c, batch, entries)

    def too_much(model, packed):
        limits.append(packed.layout.total)
        if packed.layout.total > limit:
            raise torch.OutOfMemoryError
        return states(model, packed)

    monkeypatch.setattr(memtrain, "states", too_much)
    limit = 1000
    row = update(model, None, caught, c, batch, entries)
    close(caught.steps[-1], caught.steps[0], 2e-6)
    assert max(limits) > 1000 >= limits[-1] and row["skipped"] == 0 and model.share == 0.5
    limit = 100
    with pytest.raises(InputError, match="out of memory while training with half of --micro-tokens 2000"):
        update(model, None, caught, c, batch, entries)


def test_poisoned_steps_are_skipped_and_counted(reading, decoder):
    a, _, batch = reading
    for poison in ("log-prob", "parameter"):
        model = decoder(a.c, a.tokenizer.size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        turns = list(batch.turns)
        if poison == "log-prob":
            turns[0] = dataclasses.replace(turns[0], logprobs=[math.nan] * len(turns[0].logprobs))
        else:
            with torch.no_grad():
                model.blocks[0].q.weight[0, 0] = math.nan
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        row = update(model, model, optimizer, a.c, dataclasses.replace(batch, turns=turns), set(batch.entry))
        assert row["skipped"] == 1.0
        assert all(torch.equal(torch.nan_to_num(p), torch.nan_to_num(before[n])) for n, p in model.named_parameters())
        assert not optimizer.state and all(p.grad is None for p in model.parameters())
    model = decoder(a.c, a.tokenizer.size)
    row = update(model, None, torch.optim.AdamW(model.parameters()), dataclasses.replace(a.c, kl=0.0), batch,
                 set(batch.entry))
    assert row["skipped"] == 0.0 and row["kl"] == 0.0


# ---- the memory loop


def test_reading_keeps_to_the_window_and_the_memory_budget(agent, reading):
    a, data, _ = reading
    problems = [data.masked_problem(0), data.training_question(1)]
    rollouts = a.read(problems, [("r", i) for i in range(2)])
    for r, problem in zip(rollouts, problems, strict=True):
        assert [*chain(*r.sections)] == [*chain(*(a.tokenizer.encode(p + "\n") for p in problem.passages))]
        assert len(r.turns) == len(r.sections) + 1 == len(r.memories) + 1
        memory = a.prompts.no_memory
        for t, (section, turn) in enumerate(zip(r.sections, r.turns, strict=False)):
            assert (turn.prefix, turn.given) == a.prompts.update(problem.question, section, memory)
            memory = turn.sampled[:-1] if turn.sampled[-1] == a.tokenizer.end else turn.sampled
            memory = memory[:a.c.memory]
            assert r.memories[t] == memory
            assert len(turn.sampled) <= a.c.response
            assert len(turn.prefix) + len(turn.given) + a.c.response <= a.c.window
        assert (r.turns[-1].prefix, r.turns[-1].given) == a.prompts.answer(problem.question, memory)
    assert max(len(m) for r in rollouts for m in r.memories) == a.c.memory, "a random policy fills it"


def test_a_rollout_follows_from_its_key_alone(reading):
    a, data, _ = reading
    problems = [data.masked_problem(i // 2) for i in range(4)]
    keys = [("replay", i) for i in range(4)]
    together = a.read(problems, keys)
    for i in (0, 3):
        (single,) = a.read([problems[i]], [keys[i]])
        assert [t.sampled for t in single.turns] == [t.sampled for t in together[i].turns]
    (bare,) = a.read([problems[3]], [keys[3]], keep_turns=False)
    assert bare.turns == bare.sections == [] and bare.answer == together[3].answer
    assert [*map(list, bare.memories)] == together[3].memories


@pytest.mark.parametrize("order", ["section-first", "paper"])
def test_prompt_orders(order, agent):
    a = agent("--prompt-order", order)
    section, memory = a.tokenizer.encode("the SECTION"), a.tokenizer.encode(" the MEMORY")
    for kind, prompt in {"update": a.prompts.update("PROBLEM <|end|>", section, memory),
                         "recall": a.prompts.recall(section, memory),
                         "answer": a.prompts.answer("PROBLEM <|end|>", memory),
                         "direct": a.prompts.direct("PROBLEM <|end|>", section)}.items():
        ids = prompt[0] + prompt[1]
        assert [ids[0]] == a.tokenizer.user and [ids[-1]] == a.tokenizer.assistant
        assert sum(i >= a.tokenizer.user[0] for i in ids) == 2, "a problem can't forge a special token"
        text = a.tokenizer.decode(ids)
        parts = ["the SECTION", "the MEMORY"] if order == "section-first" else ["the MEMORY", "the SECTION"]
        parts = [p for p in parts if p in text]
        parts = ["PROBLEM", *parts] if kind != "recall" else parts
        assert len(parts) == {"update": 3, "recall": 2, "answer": 2, "direct": 2}[kind]
        assert [text.index(p) for p in parts] == sorted(text.index(p) for p in parts), text
    shared = a.prompts.update("PROBLEM", section, memory)[0]
    assert ("SECTION" in a.tokenizer.decode(shared)) == (order == "section-first")
    assert a.prompts.recall(section, memory)[1] == a.tokenizer.assistant, "G2 samples share the whole prompt"
    assert a.prompts.overhead("PROBLEM") + len(section) + len(memory) == sum(
        map(len, a.prompts.update("PROBLEM", section, memory)))


def test_one_window_cuts_the_middle_out(agent, reading, monkeypatch):
    a, data, _ = reading
    seen = []
    monkeypatch.setattr(memtrain.Agent, "sample", lambda self, prompts, keys: seen.extend(prompts) or [
        Turn(*p, a.tokenizer.encode("\\boxed{ x}"), []) for p in prompts])
    problem = data.training_question(0)
    assert a.answer_in_one_window([problem], [("w",)]) == ["x"]
    ids, document = seen[0][0] + seen[0][1], [*chain(*a.sections(problem))]
    assert len(ids) == a.c.window - a.c.response < len(document), "the window is full"
    head = sum(map(len, a.prompts.direct(problem.question, []))) - 1
    text = ids[head:-1]
    half = len(text) // 2
    assert text[-half:] == document[-half:] and text[:len(text) - half] == document[:len(text) - half]


# ---- rewards


def test_rewards_are_equations_1_and_2(agent, reading, monkeypatch, lottery):
    """R^I of every recall sample, R^E = correct + lambda / G2 * sum of R^I, each in its group and document."""
    _, data, _ = reading
    a, hits, recall = agent("--group", "3", "--recall-group", "4", "--recall-weight", "0.7"), [], memtrain.Agent.recall
    correct = {}

    def watched(self, sections, memories, targets, keys):
        out = recall(self, sections, memories, targets, keys)
        hits.extend(zip(keys, out[1], strict=True))
        return out
    monkeypatch.setattr(memtrain.Agent, "recall", watched)
    read = memtrain.Agent.read
    monkeypatch.setattr(memtrain.Agent, "read", lambda self, problems, keys: [
        correct.setdefault(k, r) for k, r in zip(keys, read(self, problems, keys), strict=True)])
    batch = collect(a, data, "memtrain", 5)
    outcomes = list(correct.items())
    assert [k for k, _ in outcomes] == [(a.c.seed, "memtrain", 5, d, g) for d in range(2) for g in range(3)]
    for i, (key, rollout) in enumerate(outcomes):
        own = [hit for k, hit in hits if k[:5] == key]
        assert len(own) == 4
        assert batch.rewards[i] == pytest.approx(rollout.correct + 0.7 / 4 * sum(own))
        assert batch.group[i] == batch.document[i] == key[3]
        own = [batch.turns[t] for t, e in enumerate(batch.entry) if e == i]
        assert own == rollout.turns and len(own) == len(rollout.sections) + 1, "every turn, the answer too"
    assert batch.rewards[6:] == [hit for _, hit in hits], "R^I is the bare hit"
    for n, (key, _) in enumerate(hits):
        assert batch.document[6 + n] == key[3] and batch.entry.count(6 + n) == 1
        assert batch.group[6 + n] == batch.group[6 + n // 4 * 4] >= 2
    assert len(set(batch.group)) == 2 + 6 and {0.0, 1.0} == {h for _, h in hits}
    assert batch.stats["reward_em"] == pytest.approx(sum(r.correct for _, r in outcomes) / 6)
    assert batch.stats["recall"] == pytest.approx(sum(h for _, h in hits) / 24)
    assert batch.stats["tokens_sampled"] == sum(len(t.sampled) for t in batch.turns)


def test_a_reading_without_a_probe_leaves_the_others_their_own(agent, reading, monkeypatch, lottery):
    """A document of one section, or without a name: no recall, and nobody else's."""
    a, hits, seen = agent("--recall-weight", "0.5"), {}, []
    recall, probe, read = memtrain.Agent.recall, memtrain.recall_probe, memtrain.Agent.read

    def some(*given):
        seen.append(len(seen))
        return None if seen[-1] in (0, 3) else probe(*given)

    def watched(self, sections, memories, targets, keys):
        turns, right = recall(self, sections, memories, targets, keys)
        for key, hit in zip(keys, right, strict=True):
            hits.setdefault(key[:5], []).append(hit)
        return turns, right
    monkeypatch.setattr(memtrain, "recall_probe", some)
    monkeypatch.setattr(memtrain.Agent, "recall", watched)
    outcomes = {}
    monkeypatch.setattr(memtrain.Agent, "read", lambda self, problems, keys: [
        outcomes.setdefault(k, r) for k, r in zip(keys, read(self, problems, keys), strict=True)])
    batch = collect(a, reading[1], "memtrain", 5)
    own = [hits.get(key, []) for key in outcomes]
    assert [len(h) for h in own] == [0, 2, 2, 0, 2, 2] and {0.0, 1.0} == {x for h in own for x in h}
    assert batch.rewards[:6] == pytest.approx([r.correct + 0.25 * sum(h)
                                               for r, h in zip(outcomes.values(), own, strict=True)])
    assert batch.document[6:] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(("options", "stage"), [(["--recall-group", "0"], "memtrain"), ([], "memagent")])
def test_without_recall_the_reward_is_the_outcome(options, stage, agent, reading, lottery):
    batch = collect(agent(*options), reading[1], stage, 1)
    assert set(batch.rewards) == {0.0, 1.0} and len(batch.rewards) == 6 and "recall" not in batch.stats
    assert batch.document == batch.group == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("released", [False, True], ids=["paper", "release"])
def test_recall_probes_hide_an_earlier_entity(released, reading):
    """Section l before step k, its target nowhere in sight, the memory that of step k; within the section's length. As
    released: the memory before step k, and l from the second section to k itself."""
    a, data, _ = reading
    a = memtrain.Agent(a.model, a.tokenizer, dataclasses.replace(a.c, released_probe=released))
    seen, unread = set(), 0
    for i in range(60):
        problem = data.masked_problem(i)
        sections = [*a.sections(problem)]
        rollout = memtrain.Rollout(problem, sections, [], [[t] for t in range(len(sections))])
        probe = memtrain.recall_probe(a, data.finder, rollout, random.Random(i))
        if len(sections) < 2:
            assert probe is None
            continue
        masked, (k,), target = probe
        text = a.tokenizer.decode(masked)
        full = len(masked) == a.c.section  # [TARGET] is longer than most names: the end may have been cut off
        k += released
        hidden = [(s, s.replace(target, "[TARGET]")) for s in map(a.tokenizer.decode, sections[released:k + released])]
        sources = [s for s, h in hidden if h == text or (full and h.startswith(text))]
        assert sources, "an earlier section, changed by nothing but [TARGET]"
        unread += released and sources == [a.tokenizer.decode(sections[k])]
        assert 1 <= k < len(sections) and "[TARGET]" in text and not occurs(text, target)
        assert target not in ("[MASK]", "MASK")
        assert full or text.count("[MASK]") == sources[0].count("[MASK]")
        assert len(masked) <= a.c.section
        seen.add((k, len(sections)))
    assert len(seen) >= 2 and (unread > 0) == released


@pytest.mark.parametrize("shared", [True, False])
def test_shared_probe(shared, agent, reading, monkeypatch):
    _, data, _ = reading
    a, asked, recall = agent("--group", "4", *(["--shared-probe"] if shared else [])), [], memtrain.Agent.recall
    monkeypatch.setattr(memtrain.Agent, "recall", lambda self, sections, memories, targets, keys: (
        asked.extend(zip([k[3] for k in keys], map(tuple, sections), targets, strict=True)),
        recall(self, sections, memories, targets, keys))[1])
    collect(a, data, "memtrain", 1)
    sections = [{s for d, s, _ in asked if d == document} for document in range(2)]
    assert all(len(s) == 1 for s in sections) if shared else any(len(s) > 1 for s in sections)


# ---- groups with and without signal


def test_dapo_filter():
    def batch(rewards, group):
        return Batch([], [], rewards, group, [0] * len(group), {})
    assert with_signal(batch([0, 0, 1, 1, 0.5, 0.5], [0, 0, 1, 1, 2, 2])) == set()
    assert with_signal(batch([0, 1, 1, 1, 0.5, 0.75], [0, 0, 1, 1, 2, 2])) == {0, 2}
    assert with_signal(batch([], [])) == set()


@pytest.fixture
def run(folder, tiny, base_checkpoint):
    """run("--group", "4") -> Run in an empty folder, from a random base."""
    return lambda *extra: memtrain.Run(tiny("--run", "t", "--init", base_checkpoint(), *extra))


def test_without_signal_nothing_is_computed(run, monkeypatch):
    r = run()
    monkeypatch.setattr(memtrain, "update", None)  # calling it would fail
    before = {n: p.detach().clone() for n, p in r.model.named_parameters()}
    row = memtrain.train_step(r, "memtrain", 0, None, torch.optim.AdamW(r.model.parameters()))
    assert row["signal"] == row["reward"] == row["tokens_trained"] == 0
    assert all(torch.equal(p, before[n]) for n, p in r.model.named_parameters())


def test_groups_without_signal_are_not_trained_on(run, lottery, monkeypatch):
    """Only turns of groups whose rewards differ reach the update, in minibatches of whole documents."""
    r, seen = run("--documents", "4", "--update-documents", "2", "--group", "2"), []
    monkeypatch.setattr(memtrain, "update", lambda model, reference, optimizer, c, batch, entries: (
        seen.append((batch, entries)), update(model, reference, optimizer, c, batch, entries))[1])
    optimizer = torch.optim.AdamW(r.model.parameters())
    row = memtrain.train_step(r, "memtrain", 2, r.model, optimizer)
    batch, signal_ = seen[0][0], with_signal(seen[0][0])
    assert 0 < len(signal_) < len(set(batch.group)), "the case needs both sorts"
    for number, (_, entries) in enumerate(seen):
        assert entries == {e for e, g in enumerate(batch.group)
                           if g in signal_ and batch.document[e] // 2 == number}
    trained = sum(len(batch.turns[t].sampled) for t, e in enumerate(batch.entry) if batch.group[e] in signal_)
    assert row["signal"] == len(signal_) / len(set(batch.group)) and row["tokens_trained"] >= trained
    assert optimizer.param_groups[0]["lr"] == pytest.approx(r.c.lr * 3 / 5), "third of five steps of warm-up"


# ---- LoRA


def test_lora(tiny, decoder, tokenizer, base_checkpoint, reading, monkeypatch):
    """B = 0: the base itself. Afterwards only adapters move, and the network with them off still is the base."""
    path, batch, c = Path(base_checkpoint()), reading[2], tiny("--lora-rank", "4", "--kl", "0.1")
    plain, adapted = memtrain.Decoder(tiny(), tokenizer.size), memtrain.Decoder(c, tokenizer.size)
    for model in (plain, adapted):
        memtrain.load_checkpoint(path, model, tokenizer)
    packed, _ = packed_of(batch.turns)
    with torch.no_grad():
        base = score(plain, packed)[0]
        torch.testing.assert_close(score(adapted, packed)[0], base, atol=0, rtol=0)
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable and {n for n in trainable if ".lora_" not in n} == set(), "the base must stay what it was"
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # the first step moves B alone
        row = update(adapted, None, optimizer, c, batch, set(batch.entry))
    assert row["kl"] > 0 and row["skipped"] == 0
    with torch.no_grad():
        assert (score(adapted, packed)[0] - base).abs().max() > 1e-3
        torch.testing.assert_close(memtrain.reference_logprobs(adapted, None, packed, c), base, atol=0, rtol=0)
        assert (score(adapted, packed)[0] - base).abs().max() > 1e-3, "the adapters are on again"


@pytest.mark.parametrize("fields", [(), ("--bias", "true"), ("--lora-rank", "2"), ("--lora-rank", "2", "--lora-merge",
                                                                                  "false")], ids=str)
def test_layers_of_one_input_are_one_product_while_sampling(fields, tiny, decoder, tokenizer, monkeypatch, tmp_path):
    """As on a card. The parameters stay what they are, for whoever copies, moves, saves or loads them."""
    monkeypatch.setattr(joined, "use_triton", lambda *_: True)
    model = decoder(tiny(*fields), tokenizer.size)
    before, x = {n: p.detach().clone() for n, p in model.named_parameters()}, torch.randn(5, model.c.width)

    def joined_as_apart(model, x):
        with torch.no_grad(), model.merged():
            for layers in ((b.q, b.k, b.v) if i else (b.gate, b.up) for b in model.blocks for i in range(2)):
                assert layers[0].joint[0].data_ptr() == layers[0].weight.data_ptr()
                for a, m in zip(joined.products(x, layers), layers, strict=True):
                    torch.testing.assert_close(a, m(x), atol=1e-5, rtol=1e-5)
        assert not any(m.joint for m in model.modules() if isinstance(m, memtrain.Linear))
        return [p.data_ptr() for p in model.parameters()]

    places = joined_as_apart(model, x)
    assert places == joined_as_apart(model, x), "captured graphs know them by address"
    twin = memtrain.copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].q.weight.add_(1)
    joined_as_apart(twin.double(), x.double())
    memtrain.save_checkpoint(tmp_path / "a.safetensors", model, tokenizer, {"stage": "base"})
    with torch.no_grad():
        model.blocks[0].v.weight.add_(0 if fields and "lora" in fields[0] else 1)  # frozen ones are in no checkpoint
    memtrain.load_checkpoint(tmp_path / "a.safetensors", model, tokenizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert places == joined_as_apart(model, x)


@pytest.mark.parametrize("fields", [(), ("--lora-rank", "2")], ids=["all weights", "LoRA"])
def test_every_stage_is_held_to_the_policy_that_it_starts_from(folder, base_checkpoint, lottery, monkeypatch, fields):
    """KL 0 at the first step of each stage, also of those that go on from another, and the same after an interruption
    in the middle of one."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--stages", "memtrain,memagent,mem1", "--init", base_checkpoint(), "--memtrain-steps", "2",
               "--memagent-steps", "3", "--lr", "0.01", "--warmup", "1", "--save-every", "1", "--group", "6", "--turns",
               "3", *fields]

    def divergences(run: str) -> dict[str, list[float]]:
        found = {}
        for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["stage"], []).append(row["kl"])
        return found

    assert memtrain.main([*command, "--run", "whole"]) == 0
    whole = divergences("whole")
    assert set(whole) == {"memtrain", "memagent", "memtrain+memagent", "mem1", "memtrain+mem1"}
    for stage, kl in whole.items():
        assert kl[0] == pytest.approx(0, abs=1e-6) and max(kl[1:]) > 1e-5, stage
    step, calls = memtrain.train_step, []

    def interrupted(run, kind, *rest):
        calls.append(kind)
        if calls.count("memagent") == 6:
            raise KeyboardInterrupt
        return step(run, kind, *rest)

    monkeypatch.setattr(memtrain, "train_step", interrupted)
    assert memtrain.main([*command, "--run", "parts"]) == 130
    assert len(divergences("parts")["memtrain+memagent"]) == 2
    monkeypatch.setattr(memtrain, "train_step", step)
    assert memtrain.main([*command, "--run", "parts"]) == 0
    assert divergences("parts") == whole


def test_sampler_and_scorer_are_said_to_agree(agent, lottery):
    """mismatch: of a step's first update, in fp32 what rounding leaves; the share outside [0.8, 1.25] and the largest
    are of all tokens, so that one wrong token shows."""
    a = agent()
    batch = memtrain.collect(a, memtrain.Data(a.c, a.tokenizer), "memtrain", 0)
    optimizer = torch.optim.AdamW(a.model.parameters(), lr=0.0)
    row = memtrain.update(a.model, None, optimizer, dataclasses.replace(a.c, kl=0.0), batch, set(batch.entry))
    assert 0 <= row["mismatch"] <= 1e-5 and row["mismatch_max"] <= 1e-4 and row["mismatch_outside"] == 0
    turn = batch.turns[0]
    batch.turns[0] = dataclasses.replace(turn, logprobs=[turn.logprobs[0] - 1.0, *turn.logprobs[1:]])
    row = memtrain.update(a.model, None, optimizer, dataclasses.replace(a.c, kl=0.0), batch, set(batch.entry))
    tokens = sum(len(t.sampled) for t in batch.turns)
    assert row["mismatch_max"] == pytest.approx(1, abs=1e-3)
    assert row["mismatch_outside"] == pytest.approx(1 / tokens)
    assert row["mismatch"] == pytest.approx(1 / tokens, rel=0.05)


@pytest.mark.parametrize(("units", "fields", "dtype"), [
    (True, ["--lora-rank", "2", "--dtype", "auto"], "bfloat16"), (False, ["--lora-rank", "2", "--dtype", "auto"],
                                                                  "float32"),
    (True, ["--dtype", "auto"], "float32"), (True, ["--lora-rank", "2"], "float32"),
    (False, ["--lora-rank", "2", "--dtype", "bfloat16"], "bfloat16")])
def test_auto_is_bf16_where_weights_are_frozen_and_the_processor_multiplies_it(monkeypatch, tiny, units, fields, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert memtrain.Policy(tiny(*fields), torch.device("cpu")).model.c.dtype == dtype


# ---- checkpoints, interruption, resumption


def test_checkpoints_round_trip(tmp_path, tiny, decoder, tokenizer):
    c = tiny()
    model, fresh = decoder(c, tokenizer.size), memtrain.Decoder(c, tokenizer.size)
    optimizers = [[torch.optim.Muon([m.blocks[0].q.weight], lr=0.1), torch.optim.AdamW([m.output, m.norm.weight])]
                  for m in (model, fresh)]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for o in optimizers[0]:
        o.step()
    path = tmp_path / "deep" / "checkpoint.safetensors"
    memtrain.save_checkpoint(path, model, tokenizer, {"step": 7}, optimizers[0])
    state = memtrain.load_checkpoint(path, fresh, tokenizer, optimizers[1])
    assert state["step"] == 7 and state == json.loads(path.with_suffix(".json").read_text())
    assert not list(path.parent.glob("*.tmp"))
    for name, p in model.named_parameters():
        assert torch.equal(p, fresh.get_parameter(name))
    for o, n in zip(*optimizers, strict=True):
        old, new = o.state_dict()["state"], n.state_dict()["state"]
        assert old.keys() == new.keys() and old
        assert all(torch.equal(torch.as_tensor(old[i][k]), new[i][k]) for i in old for k in old[i])


def test_no_temporary_file_outlives_what_stopped_its_writing(tmp_path, tiny, decoder, tokenizer):
    """The old checkpoint can't be set aside: the new one, already written, does not keep its room on the disk."""
    path, model = tmp_path / "checkpoint.safetensors", decoder(tiny(), tokenizer.size)
    memtrain.save_checkpoint(path, model, tokenizer, {"step": 1})
    (tmp_path / "previous.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(memtrain.InputError, match="previous"):
        memtrain.save_checkpoint(path, model, tokenizer, {"step": 2})
    assert not list(tmp_path.glob("*.tmp")) and memtrain.load_checkpoint(path, model, tokenizer)["step"] == 1


def test_five_poisoned_steps_in_a_row_end_the_stage(folder, tiny, base_checkpoint, monkeypatch, capsys):
    row = {"step": 0, "reward": 0.0, "reward_em": 0.0, "signal": 1.0, "seconds": 0.0, "tokens_prompts": 0,
           "tokens_sampled": 0, "tokens_trained": 0, "finished": 1.0} | dict.fromkeys(
               ("all_zero", "all_one", "empty", "copied"), 0.0)
    poisoned = iter([1, 1, 1, 1, 0, 0.5, 1, 1, 1, 1, 1])
    monkeypatch.setattr(memtrain, "train_step", lambda *_: row | {"skipped": float(next(poisoned))})
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "50"]
    assert memtrain.main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("memtrain: memtrain") and "up to step 11" in line and "--lr" in line


COMMAND = ["--run", "t", "--stages", "memtrain,memagent", "--memtrain-steps", "4", "--memagent-steps", "2",
           "--group", "4", "--lr", "0.01", "--save-every", "2"]
TIMES = {"seconds", "seconds_sampling", "tokens_per_s"}


@pytest.fixture
def start(base_checkpoint, monkeypatch, tmp_path):
    """start(folder name, *options) -> exit code of the whole command there; a second call takes the run up again."""
    init = base_checkpoint()
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))

    def go(name, *options):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        return memtrain.main([*TINY, *COMMAND, "--init", init, *options])
    return go


def outcome(folder: Path) -> tuple:
    """Weights and optimiser of every stage, and the log without its times."""
    tensors = {f"{p.parent.name}:{k}": v for p in sorted(folder.glob("runs/t/*/checkpoint.safetensors"))
               for k, v in load_file(p).items()}
    rows = [json.loads(line) for line in (folder / "runs/t/metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same(a: tuple, b: tuple) -> None:
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_an_interrupted_run_continues_bit_for_bit(start, lottery, tmp_path, monkeypatch, capsys):
    """Stopped by Ctrl-C after step 3, killed without warning in step 2 of the next stage (after a torn log line):
    the weights, the optimiser and the log are those of the run that was left alone."""
    assert start("whole") == 0
    whole = outcome(tmp_path / "whole")
    assert len(whole[1]) == 4 + 2 + 2
    assert {row["stage"] for row in whole[1] if row["signal"] > 0} == {"memtrain", "memagent", "memtrain+memagent"}
    capsys.readouterr()

    step, calls = memtrain.train_step, []

    def ctrl_c(run, kind, number, *rest):
        calls.append((kind, number))
        if (kind, number) == ("memtrain", 2):
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, kind, number, *rest)

    def killed(run, kind, number, *rest):
        if (kind, number) == ("memagent", 1):
            with run.log.path.open("a") as log:
                log.write('{"stage": "memagent", "st')
            raise SystemExit(9)
        return step(run, kind, number, *rest)

    monkeypatch.setattr(memtrain, "train_step", ctrl_c)
    assert start("broken") == 130
    assert calls == [("memtrain", 0), ("memtrain", 1), ("memtrain", 2)], "the step is finished, no other begun"
    stopped = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.startswith("stopped; continue with: python memtrain.py")
    state = json.loads(Path("runs/t/memtrain/checkpoint.json").read_text())
    assert state["step"] == 3 and not state.get("done")
    monkeypatch.setattr(memtrain, "train_step", killed)
    with pytest.raises(SystemExit):
        start("broken")
    monkeypatch.setattr(memtrain, "train_step", step)
    assert start("broken") == 0
    same(outcome(tmp_path / "broken"), whole)
    monkeypatch.setattr(memtrain, "train_step", None)  # calling it would fail
    assert start("broken") == 0, "a finished run has nothing left to do"


def test_the_base_stage_continues_bit_for_bit(start, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.gates.gates", lambda agent, c: {})
    base = ["--stages", "base", "--base-copy-steps", "2", "--base-steps", "3"]
    assert start("whole", *base) == 0
    imitate = memtrain.imitate
    for stop in (1, 3):  # during the copying, and during the demonstrations
        def ctrl_c(model, rows, c, step, device, share, stop=stop):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return imitate(model, rows, c, step, device, share)
        monkeypatch.setattr(memtrain, "imitate", ctrl_c)
        assert start("broken", *base) == 130
    monkeypatch.setattr(memtrain, "imitate", imitate)
    assert start("broken", *base) == 0
    same(outcome(tmp_path / "broken"), outcome(tmp_path / "whole"))


def test_a_second_signal_stops_at_once():
    interrupt = Interrupt()
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.asked
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_evaluation_continues(start, tmp_path, monkeypatch):
    """Killed before any write of its results: no row twice, none missing, the same figures."""
    assert start("whole", "--stages", "eval") == 0
    write, count = write_json, [0]
    for stop in (2, 4):
        def killed(path, value, stop=stop):
            count[0] += path.name == "results.json"
            if count[0] == stop:
                raise KeyboardInterrupt
            write(path, value)
        monkeypatch.setattr("eval.stage.write_json", killed)
        count[0] = 0
        assert start(f"broken{stop}", "--stages", "eval") == 130
        monkeypatch.setattr("eval.stage.write_json", write)
        assert start(f"broken{stop}", "--stages", "eval") == 0
        whole, broken = (json.loads((tmp_path / name / "runs/t/results.json").read_text())
                         for name in ("whole", f"broken{stop}"))
        for section in ("long_qa", "recall", "masked"):
            rows = [sorted(x[section], key=lambda row: (row["system"], row.get("length", 0))) for x in (whole, broken)]
            assert rows[0] == rows[1], (stop, section)


def test_evaluation_asks_every_system_the_same(reading, monkeypatch):
    """Rows carry what the report needs; a system's answers follow from its own seed."""
    from eval.longqa import held_out_rows, long_qa_row
    a, data, _ = reading
    problems = [data.evaluation_question(i, 2) for i in range(3)]
    row = long_qa_row(a, "base", 0, 2, problems)
    assert row == long_qa_row(a, "base", 0, 2, problems)
    assert row["n"] == 3 and len(row["correct"]) == 3 and row["em"] == 0.0 and row["em_high"] > 0
    assert row["sections"] >= 2 and row["tokens"] <= 2 * a.c.section and row["memory_tokens"] <= a.c.memory
    assert sum(n for _, n in row["kinds"].values()) == 3
    right = {id(p): p.answers[0] for p in problems}
    monkeypatch.setattr(memtrain.Agent, "answer_in_one_window", lambda self, ps, keys: [right[id(p)] for p in ps])
    assert long_qa_row(a, "base-one-window", 0, 2, problems)["em"] == 1.0
    held_out = [data.masked_problem(i, held_out=True) for i in range(3)]
    seen, recall = [], memtrain.Agent.recall
    monkeypatch.setattr(memtrain.Agent, "recall", lambda self, sections, memories, targets, keys: (
        seen.append((sections, targets)), recall(self, sections, memories, targets, keys))[1])
    for system in ("base", "memtrain"):
        recalled, masked = held_out_rows(a, system, 0, held_out, data.finder, memtrain.recall_probe)
        assert recalled["n"] >= 1 and masked["n"] == 3 and 0 <= recalled["low"] <= recalled["accuracy"]
    assert seen[0] == seen[1], "the same targets in the same sections for every system"


def test_training_and_evaluation_share_no_document(reading):
    _, data, _ = reading
    titles = {p.title for p in data.train.passages} & {p.title for p in data.held_out.passages}
    assert titles == set()
    train = {data.training_question(i).question for i in range(50)}
    assert not train & {q.question for q in data.questions}
    lengths = [data.evaluation_question(0, n) for n in (1, 2)]
    assert isinstance(lengths[0], Problem) and lengths[0].question == lengths[1].question
