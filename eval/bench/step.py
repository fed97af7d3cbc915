"""One GRPO step of MemTrain by memtrain.py and by the plain implementation, and that both compute the same:
`python -m eval.bench step`."""

from __future__ import annotations

import copy
import random
from dataclasses import asdict, replace
from pathlib import Path

import torch

import memtrain
from data import InputError
from eval.bench import plain
from eval.bench.measure import Capture, Figures, Row, measured, table

TOLERANCE = 1e-5  # of loss and gradients, in fp64
LossAndGradient = tuple[float, dict[str, torch.Tensor]]


class Pair:
    """Both implementations of the step on one model, one reference, one configuration."""

    def __init__(self, c: memtrain.Config, model: memtrain.Decoder, tokenizer, data):
        # update() clips before it hands the gradient over: here it must arrive as it was computed
        self.c, self.model, self.data = replace(c, grad_clip=1e30), model, data
        self.agent, self.plain_agent = (kind(model, tokenizer, c) for kind in (memtrain.Agent, plain.PlainAgent))
        self.reference = copy.deepcopy(model).requires_grad_(False)
        for module in self.reference.modules():
            if isinstance(module, memtrain.Linear):
                module.adapted = False
        self.capture = Capture(model)

    def sample(self, agent, step: int) -> memtrain.Batch:
        return memtrain.collect(agent, self.data, "memtrain", step)

    def ours(self, batch: memtrain.Batch, entries: set[int]) -> LossAndGradient:
        reference = None if self.c.lora_rank else self.reference  # with LoRA: the network with its adapters off
        stats = memtrain.update(self.model, reference, self.capture, self.c, batch, entries)
        if stats["skipped"]:
            raise InputError("loss or gradient is not finite here: nothing to compare; give another --init")
        return stats["loss"], self.capture.gradient

    def plain(self, batch: memtrain.Batch, entries: set[int]) -> LossAndGradient:
        loss = plain.train(self.model, self.reference, self.c, batch, entries)
        self.capture.step()
        self.capture.zero_grad()
        return loss, self.capture.gradient

    def exact(self) -> None:
        """Goes on in fp64, where two ways to write the same equations agree to far more than what fp32 rounds."""
        self.model.double()
        self.reference.double()

    @torch.no_grad()
    def shift(self) -> None:
        """Moves the policy off the one that sampled: ratios leave 1 and the clip range, the KL term leaves 0."""
        generator = torch.Generator().manual_seed(0)
        for p in self.capture.parameters.values():
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p += 0.05 * noise * p.std(correction=0).clamp(min=0.02)


def deviation(mine: LossAndGradient, other: LossAndGradient) -> dict[str, float]:
    """loss: difference of two losses, in units of the loss where that is above 1. gradient: norm of the difference
    over the norm, for the worst parameter."""
    worst = torch.stack([(mine[1][n] - g).norm() / g.norm().clamp(min=1e-30) for n, g in other[1].items()]).max()
    return {"loss": abs(mine[0] - other[0]) / max(1.0, abs(other[0])), "gradient": float(worst)}


def same_tokens(mine: memtrain.Batch, other: memtrain.Batch) -> dict[str, float]:
    """Share of sampled tokens that are equal, and the largest difference of log-probs where a whole turn is."""
    equal = total = 0
    worst = 0.0
    for a, b in zip(mine.turns, other.turns, strict=False):
        equal += sum(x == y for x, y in zip(a.sampled, b.sampled, strict=False))
        total += max(len(a.sampled), len(b.sampled))
        if (a.prefix, a.given, a.sampled) == (b.prefix, b.given, b.sampled):
            worst = max(worst, *(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)))
    return {"share": equal / total, "logprob": worst}


def agree(figures: dict) -> bool:
    """Whether both sides computed the same; if not, their times mean nothing. A NaN fails."""
    return figures["same_tokens"]["share"] >= 0.98 and all(
        x <= TOLERANCE for found in figures["deviation"].values() for x in found.values())


def compare(pair: Pair, repeats: int, figures: Figures) -> list[Row]:
    """Times both sides in turn, then checks the equations, also away from ratio 1."""
    device = pair.model.embed.device
    batch, other = pair.sample(pair.agent, 0), pair.sample(pair.plain_agent, 0)
    if coins := not memtrain.with_signal(batch):
        batch.rewards = [float(random.Random(e).random() < 0.5) for e in range(len(batch.rewards))]
    signal, everything = memtrain.with_signal(batch), set(batch.entry)
    kept = {e for e, g in enumerate(batch.group) if g in signal}
    sampling = measured("step: sampling", {"memtrain": lambda: pair.sample(pair.agent, 0),
                                           "plain": lambda: pair.sample(pair.plain_agent, 0)}, device, repeats)
    training = measured("step: training", {"memtrain": lambda: pair.ours(batch, kept),
                                           "plain": lambda: pair.plain(batch, everything),
                                           "plain, groups without signal left out": lambda: pair.plain(batch, kept)},
                        device, repeats)
    whole = [Row("step: both", b.by, [x + y for x, y in zip(a.seconds, b.seconds, strict=True)], max(a.mb, b.mb))
             for a, b in zip([*sampling, sampling[1]], training, strict=True)]
    pair.exact()
    exact = deviation(pair.ours(batch, kept), pair.plain(batch, kept))
    pair.shift()
    figures.add(documents=pair.c.documents, turns=len(batch.turns), signal=len(signal) / len(set(batch.group)),
                coin_rewards=coins, tokens_sampled=sum(len(t.sampled) for t in batch.turns),
                same_tokens=same_tokens(batch, other), deviation={
                    "as sampled": exact, "weights shifted": deviation(pair.ours(batch, kept), pair.plain(batch, kept))})
    return [*whole, *sampling, *training]


def step(options, fields, figures: Figures) -> bool:
    """One GRPO step of MemTrain, by memtrain.py and by eval/bench/plain.py: seconds and memory; that both sample the
    same tokens and have the same loss and gradient. Other options are fields of the configuration."""
    c = memtrain.parse(["--stages", "memtrain", "--update-documents", "1", *fields])
    c = replace(c, update_documents=c.documents)  # one update of everything sampled
    tokenizer = memtrain.load_tokenizer()
    model = memtrain.Decoder(c, tokenizer.size).to(options.device)
    weights = c.init or memtrain.SHIPPED_BASE
    memtrain.load_checkpoint(Path(weights), model, tokenizer)
    rows = compare(Pair(c, model, tokenizer, memtrain.Data(c, tokenizer)), options.repeats, figures)
    figures.add_rows(rows, weights=str(weights), config=asdict(c))
    coins = "; no group carried one: rewards are coin flips here" if figures["coin_rewards"] else ""
    print(f"weights {weights}; {c.documents} documents x {c.group} rollouts x {c.recall_group} recalls, "
          f"{figures['turns']} turns; {figures['signal']:.0%} of the groups carry a signal{coins}\n\n{table(rows)}\n"
          f"same tokens sampled: {figures['same_tokens']['share']:.2%}; in fp64: "
          f"{'ok' if agree(figures) else 'DIFFERENT'}, {figures['deviation']}")
    return agree(figures)
