"""Whether a base model is fit to start reinforcement learning from: it must be able to do each step of the loop,
and be careless in exactly one, keeping what its memory holds. Measured on a training world of its own, sampled as
in training; no evaluation question is looked at.

    python memtrain.py gates [--checkpoint RUN/STAGE]      (default: the shipped base)

Real weights have gates of their own, on held-out passages of the corpus: the formats, not carelessness.
"""

from __future__ import annotations

import random

from data.tasks import recall_target, sections
from data.text.entities import occurs
from data.warmup import Reader, lines
from data.world.demonstrations import Demonstrator, Episode, sentences
from data.world.miniwiki import MiniWorld
from eval.metrics import exact_match

GATES = {  # name: (lowest, highest) that passes, what it says
    "answer_question": (0.9, 1.0, "questions answered from an oracle memory"),
    "answer_masked": (0.9, 1.0, "masks named from an oracle memory"),
    "verbatim": (0.95, 1.0, "sentences of written memories that the section or the old memory holds word for word"),
    "recall": (0.9, 1.0, "recall of a target that the memory holds"),
    "kept_now": (0.6, 1.0, "gold facts of the section just read that are noted"),
    "kept_later": (0.15, 0.40, "gold facts still there two sections later"),
    "oracle_gain": (0.4, 1.0, "accuracy at 4 sections with an oracle memory, minus the base's own"),
    "constant_guess": (0.0, 0.03, "share of the commonest answer among training questions"),
}
WHY = {  # no gates: where the loop loses what it should keep
    "noted_question": "gold facts that a section makes evident and the memory notes, questions",
    "noted_masked": "the same, masked documents",
    "carried_question": "gold facts in memory that survive one update whose section does not repeat them, questions",
    "carried_masked": "the same, masked documents",
}


def gates(agent, config, n: int = 200) -> dict[str, float]:
    """Measures every gate with n problems of each kind, prints them, and returns {name: value}."""
    world = MiniWorld(config.base_people, 99, "train")
    demo = Demonstrator(world, agent.prompts, config.section, config.memory)
    value = _answering(agent, demo, n) | _recall(agent, demo, n) | _keeping(agent, demo, n)
    answers = [world.question(i, 7).answers[0] for i in range(1000)]
    value["constant_guess"] = max(map(answers.count, set(answers))) / len(answers)
    show(value, GATES, WHY, "of the base model, training world, sampled as in training")
    return value


def show(value: dict[str, float], asked: dict[str, tuple[float, float, str]], more: dict[str, str], of: str) -> None:
    """Prints a table: the gates with what they let through, then what says why."""
    print(f"\n{'gate':16s} value  passes within   ({of})")
    for name, (low, high, meaning) in asked.items():
        ok = "ok  " if low <= value[name] <= high else "FAIL"
        print(f"{name:16s} {value[name]:5.3f}  {low:.2f}-{high:.2f}  {ok}    {meaning}")
    for name, meaning in more.items():
        print(f"{name:16s} {value[name]:5.3f}                     {meaning}")


def _episodes(demo: Demonstrator, masked: bool, sections: int, n: int) -> list[Episode]:
    make = demo.masked_episode if masked else demo.question_episode
    return [make(7, i, sections) for i in range(n)]


def _answering(agent, demo: Demonstrator, n: int) -> dict[str, float]:
    found = {}
    for name, masked in (("answer_question", False), ("answer_masked", True)):
        episodes = _episodes(demo, masked, 2, n)
        memories = [demo.memory_ids(demo.oracle_memory(e, random.Random(i))) for i, e in enumerate(episodes)]
        prompts = [agent.prompts.answer(e.problem, m) for e, m in zip(episodes, memories, strict=True)]
        turns = agent.sample(prompts, [("gate", name, i) for i in range(n)])
        found[name] = mean(exact_match(agent.boxed(t), [e.answer]) for t, e in zip(turns, episodes, strict=True))
    return found


def _recall(agent, demo: Demonstrator, n: int) -> dict[str, float]:
    sections, memories, targets = [], [], []
    for i, e in enumerate(_episodes(demo, False, 1, 4 * n)):  # a third has a target that the memory holds
        rng = random.Random(i)
        text = e.texts[0]
        memory = demo.random_memory(text, rng)
        made = recall_target(text, demo.finder, rng)
        if made and any(occurs(s, made[1]) for s in memory):
            sections.append(agent.tokenizer.encode(made[0]))
            memories.append(demo.memory_ids(memory))
            targets.append(made[1])
    return {"recall": mean(agent.recall(sections, memories, targets, [("gate r", i) for i in range(len(targets))])[1])}


def _keeping(agent, demo: Demonstrator, n: int) -> dict[str, float]:
    """Reads 4-section documents and follows every gold fact from the section that first states it."""
    now, later, verbatim, correct, oracle, why = [], [], [], [], [], {}
    for masked in (False, True):
        noted, carried = (why.setdefault(f"{what}_{'masked' if masked else 'question'}", [])
                          for what in ("noted", "carried"))
        episodes = _episodes(demo, masked, 4, n // 2)
        memory = [agent.prompts.no_memory] * len(episodes)
        held = [[] for _ in episodes]  # per episode, per section: sentences of the memory
        for t in range(max(len(e.sections) for e in episodes)):
            at = [i for i, e in enumerate(episodes) if t < len(e.sections)]
            prompts = [agent.prompts.update(episodes[i].problem, episodes[i].sections[t], memory[i]) for i in at]
            for i, turn in zip(at, agent.sample(prompts, [("gate k", masked, i, t) for i in at]), strict=True):
                before = held[i][-1] if held[i] else []
                memory[i] = agent.written(turn)
                held[i].append(sentences(agent.tokenizer.decode(memory[i]).strip()))
                known = {*before, *sentences(episodes[i].texts[t])}
                verbatim += [s in known for s in held[i][-1]]
        for i, e in enumerate(episodes):
            facts = [{e.fact_of.get(s) for s in m} for m in held[i]]  # of each memory
            printed = [sentences(text) for text in e.texts]  # of each section
            sections = [{e.fact_of.get(s) for s in lines} for lines in printed]
            for t, section in enumerate(sections):
                noted += [f in facts[t] for f in demo.evident(e, [], printed[t])]
                carried += [f in facts[t] for f in e.gold if t and f in facts[t - 1] and f not in section]
            for fact in e.gold:
                stated = [t for t, section in enumerate(sections) if fact in section]
                kept = [fact in m for m in facts]
                if stated:
                    now.append(kept[stated[0]])
                    if stated[0] + 2 < len(kept) and not any(t <= stated[0] + 2 for t in stated[1:]):
                        later.append(kept[stated[0] + 2])
        final = [agent.prompts.answer(e.problem, m) for e, m in zip(episodes, memory, strict=True)]
        best = [agent.prompts.answer(e.problem, demo.memory_ids(demo.oracle_memory(e, random.Random(i))))
                for i, e in enumerate(episodes)]
        for prompts, hits in ((final, correct), (best, oracle)):
            turns = agent.sample(prompts, [("gate o", masked, i) for i in range(len(prompts))])
            hits += [exact_match(agent.boxed(t), [e.answer]) for t, e in zip(turns, episodes, strict=True)]
    return {"verbatim": mean(verbatim), "kept_now": mean(now), "kept_later": mean(later),
            "oracle_gain": mean(oracle) - mean(correct)} | {k: mean(v) for k, v in why.items()}


REAL_GATES = {  # of real weights after their warm-up, on held-out passages
    "finished": (0.95, 1.0, "answers that end in a box"),
    "named": (0.5, 1.0, "masks named from an oracle memory: lines with [MASK], one of them with its name"),
    "copied": (0.9, 1.0, "lines of written memories that the section or the old memory holds word for word"),
}
REAL_WHY = {
    "recalled": "recall of a target that the memory holds",
    "answered": "gaps filled from the line that they were left in",
    "inferred": "masks named from the lines with [MASK] alone: what the name is must be guessed",
    "noted": "lines that bear on the problem and that the memory takes up, where the section holds one",
    "carried": "lines of a memory that bear on the problem and outlive an update",
}


def real_gates(agent, config, data, n: int = 0) -> dict[str, float]:
    """Measures every gate of real weights with n problems of each kind from held-out passages, sampled as in training,
    prints them, and returns {name: value}. n: as many as the card does in a minute; 100 on a GPU, 24 on a CPU."""
    n = n or (100 if agent.model.embed.device.type == "cuda" else 24)
    reader = Reader(data.held_out, data.finder, agent.prompts, config.section, config.memory)
    rng, length = random.Random("gates"), round(0.4 * config.section)
    masked = [reader.masked(-2, i, length) for i in range(n)]
    cloze = [reader.cloze(rng, length) for _ in range(n)]
    recalls = [reader.recall_case(rng) for _ in range(n)]
    asked = {"named": [(e, reader.oracle_memory(e, rng, True)) for e in masked],
             "inferred": [(e, reader.oracle_memory(e, rng, False)) for e in masked],
             "answered": [(e, reader.oracle_memory(e, rng, False)) for e in cloze]}
    value, boxes = {}, []
    for name, cases in asked.items():
        prompts = [agent.prompts.answer(e.problem, reader.memory_ids(m)) for e, m in cases]
        answers = [agent.boxed(t) for t in agent.sample(prompts, [("gate", name, i) for i in range(n)])]
        boxes += [a is not None for a in answers]
        value[name] = mean(exact_match(a, [e.answer]) for a, (e, _) in zip(answers, cases, strict=True))
    turns, hits = agent.recall(*zip(*recalls, strict=True), [("gate r", i) for i in range(n)])
    value |= {"recalled": mean(hits), "finished": mean(boxes + [agent.boxed(t) is not None for t in turns])}
    value |= _copying(agent, reader, masked[:n // 2] + cloze[:n // 2], length)
    show(value, REAL_GATES, REAL_WHY, "after the warm-up, held-out passages, sampled as in training")
    return value


def _copying(agent, reader: Reader, episodes, length: int) -> dict[str, float]:
    """Reads every document in sections of `length` tokens."""
    copied, noted, carried = [], [], []
    memory = [agent.prompts.no_memory] * len(episodes)
    parts = [list(sections(e.passages, agent.tokenizer, length)) for e in episodes]
    for t in range(max(map(len, parts))):
        at = [i for i in range(len(parts)) if t < len(parts[i])]
        prompts = [agent.prompts.update(episodes[i].problem, parts[i][t], memory[i]) for i in at]
        for i, turn in zip(at, agent.sample(prompts, [("gate k", i, t) for i in at]), strict=True):
            old, section = (lines(agent.tokenizer.decode(ids)) for ids in (memory[i], parts[i][t]))
            memory[i] = agent.written(turn)[:reader.memory]
            new = lines(agent.tokenizer.decode(memory[i]))
            known = {*old, *section, *lines(agent.tokenizer.decode(agent.prompts.no_memory))}
            copied += [s in known for s in new]
            wanted = reader.update(episodes[i], [], section)
            noted += [any(s in new for s in wanted)] if wanted else []
            carried += [s in new for s in old if s in known - {*section} and reader.bears(episodes[i], s)]
    return {"copied": mean(copied), "noted": mean(noted), "carried": mean(carried)}


def mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / max(1, len(values))


def passed(value: dict[str, float]) -> bool:
    return all(low <= value[name] <= high for name, (low, high, _) in (
        GATES if "verbatim" in value else REAL_GATES).items())
