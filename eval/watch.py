"""Signs that a stage is learning nothing, or something else than meant: a metric each, and a note once a stage.

None of them stops a run. A sign has to show in three steps in a row: a single step with no reward is common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

IN_A_ROW = 3
GRAM = 4  # tokens: shorter stretches of the problem, such as a name, belong into a memory

# name: (condition on a row of metrics.jsonl, what it means and what to try). A step without an update has no entropy.
# 0.002 nats: the shipped base starts at 0.02 to 0.07, and a policy that has learned its task well ends near 0.01.
SIGNS: dict[str, tuple[Callable[[dict], bool], str]] = {
    "entropy collapse": (lambda r: r.get("entropy", 1.0) < 0.002,
                         "the entropy is below 0.002 nats a token, so that the rollouts of a group hardly differ any "
                         "more; try a lower --lr or a higher --temperature"),
    "all-zero rewards": (lambda r: r["all_zero"] == 1.0,
                         "no rollout of any document earns a reward, so that nothing is learned; try easier documents "
                         "(fewer --passages or --train-sections), a larger --group or a better --init"),
    "all-one rewards": (lambda r: r["all_one"] == 1.0,
                        "every rollout of every document is right, so that nothing is left to learn; stop here or try "
                        "longer documents"),
    "empty responses": (lambda r: r["empty"] > 0.5,
                        "more than half of the responses are empty; try a lower --lr or another --init"),
    "responses without end": (lambda r: r["finished"] < 0.5,
                              "more than half of the responses are cut off before their stop token; raise --response, "
                              "or train a base whose responses are shorter"),
    "sampler and scorer disagree": (
        lambda r: r.get("mismatch_outside", 0.0) > 0.01,
        "more than 1% of the tokens were sampled with a probability that scoring puts off by a factor of 1.25 or more, "
        "before any update; try --dtype float32, or report it with the configuration and the card"),
    "copied prompts": (lambda r: r["copied"] > 0.5,
                       "more than half of what memories hold repeats the instruction or the problem, which every "
                       "prompt shows anyway; try a lower --lr or another --init"),
}


def grams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(GRAM)), strict=False))


def signs(agent, rollouts, rewards: Sequence[float], turns) -> dict[str, float]:
    """The metrics that the signs are read from, of one step: rollouts with their rewards, and all turns.

    all_zero, all_one: share of documents whose rollouts all earn nothing, all answer right. empty: share of turns that
    wrote nothing but their stop. copied: share of the memories' 4-grams that their prompt's instruction and problem
    hold."""
    by_document: dict[str, list[tuple[float, float]]] = {}
    shown: dict[str, set] = {}  # by problem: 4-grams of its prompt
    copied = total = 0
    for r, reward in zip(rollouts, rewards, strict=True):
        problem = r.problem
        by_document.setdefault(problem.id, []).append((reward, r.correct))
        if problem.question not in shown:
            prefix, given = r.opening(agent.prompts)
            shown[problem.question] = {*grams(prefix), *grams(given)}
        for memory in r.memories:
            own = grams(memory)
            copied += sum(g in shown[problem.question] for g in own)
            total += len(own)
    count = len(by_document)
    return {"all_zero": sum(all(reward == 0 for reward, _ in d) for d in by_document.values()) / count,
            "all_one": sum(all(correct == 1 for _, correct in d) for d in by_document.values()) / count,
            "empty": sum(not agent.written(t) for t in turns) / len(turns), "copied": copied / max(1, total)}


def watch(row: dict, seen: dict[str, int]) -> list[str]:
    """What `row` is the third in a row to show. `seen` counts the rows, and stays with the checkpoint: a note is given
    once a stage, however often that is taken up again."""
    notes = []
    for name, (condition, text) in SIGNS.items():
        if seen.get(name, 0) < IN_A_ROW:
            seen[name] = seen.get(name, 0) + 1 if condition(row) else 0
            if seen[name] == IN_A_ROW:
                notes.append(f"{name}: {text}")
    return notes
