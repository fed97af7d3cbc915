"""Synthetic runs for the tests of the report: who answers what is set by hand, no model was involved."""

import json
from pathlib import Path

import numpy as np

from eval.metrics import wilson_interval

LENGTHS = (1, 2, 4, 8)
SHARES = {  # synthetic accuracy at the four lengths
    "base-one-window": (0.50, 0.30, 0.10, 0.05), "base": (0.40, 0.30, 0.25, 0.20),
    "memtrain": (0.60, 0.55, 0.50, 0.45), "memagent": (0.70, 0.60, 0.50, 0.30),
    "memtrain+memagent": (0.80, 0.75, 0.70, 0.60),
}


def answers(share: float, n: int, seed: int) -> list[int]:
    """Exactly share * n right answers; which ones is shuffled, so that systems don't nest by accident."""
    bits = [1] * round(share * n) + [0] * (n - round(share * n))
    return np.random.default_rng(seed).permutation(bits).tolist()


def qa_row(system: str, seed: int, length: float, correct: list[int]) -> dict:
    n, right = len(correct), sum(correct)
    low, high = wilson_interval(right, n)
    return {"system": system, "seed": seed, "length": length, "sections": 2 * length, "tokens": 400 * length,
            "n": n, "em": right / n, "em_low": low, "em_high": high, "f1": right / n,
            "sub_em_search_r1": right / n, "sub_em_memagent": right / n,
            "correct": correct, "kinds": {"bridge": [sum(correct[: n // 2]), n // 2],
                                          "date|of\nbirth": [sum(correct[n // 2:]), n - n // 2]},
            "memory_tokens": 31.5, "finished": 0.98}


def qa_rows(shares=SHARES, seed=0, n=200, lengths=LENGTHS) -> list[dict]:
    return [qa_row(system, seed, length, answers(share, n, 1000 * seed + 10 * i + j))
            for i, (system, values) in enumerate(shares.items())
            for j, (length, share) in enumerate(zip(lengths, values, strict=False))]


BENCHMARKS = ("bridge", "comparison", "date", "place", "work", "company", "number")
SEARCHED = {"base": 0.2, "mem1": 0.3, "memtrain+mem1": 0.5}


def search_row(system: str, seed: int, benchmark: str, correct: list[int]) -> dict:
    low, high = wilson_interval(sum(correct), len(correct))
    return {"system": system, "seed": seed, "benchmark": benchmark, "n": len(correct) // 2, "correct": correct,
            "em": sum(correct) / len(correct), "em_low": low, "em_high": high, "f1": 0.5, "turns": 4.2, "searches": 3.1,
            "answered": 0.9, "malformed": 0.1, "found": None, "memory_tokens": 60.0}


def search_rows(shares=SEARCHED, seed=0, pairs=60, benchmarks=BENCHMARKS) -> list[dict]:
    return [search_row(system, seed, name, answers(share, 2 * pairs, 500 * seed + 20 * i + j))
            for i, (system, share) in enumerate(shares.items()) for j, name in enumerate(benchmarks)]


def memory_rows(seed=0, length=8) -> list[dict]:
    kept = {"base": 0.6, "memtrain": 0.9, "memagent": 0.7, "memtrain+memagent": 0.93}
    return [{"system": system, "seed": seed, "task": "question", "unit": "facts", "length": length, "n": 50,
             "retention": [[round(100 * share ** (k + 1)), 100] for k in range(length)], "verbatim": 0.8}
            for system, share in kept.items()]


def reading(index: int, sections: int, systems=("base", "memtrain", "memagent", "memtrain+memagent"), size=5) -> dict:
    """A document of invented sentences. The first system keeps the last two gold facts, the others all."""
    name, town = f"Oren Valdis {index}", f"Port Lanning {index}"
    fillers = ("The harbour was rebuilt after the flood.", "A choir met there every week.",
               "It rained for most of May.", "The archive holds forty letters.", "Two bridges cross the river.")
    texts, gold = [], []
    for k in range(sections):
        fact = f"{name} wrote chapter {k + 1} of the atlas." if k else f"[MASK] was the home town of {name}."
        own = [fillers[(index + k + i) % 5] for i in range(size)]
        if k % 2 == 0:
            own.insert(2, fact)
            gold.append(fact)
        texts.append(" ".join(own))
    read: dict = {}
    for number, system in enumerate(systems):
        facts, memories = [], []
        for text in texts:
            facts += [g for g in gold if g in text]
            facts = facts[-2 if number == 0 else -6:]
            memories.append(" ".join([*facts, f"{text.split('.')[0]}."]))
        read[system] = {"memories": memories, "answer": town if number else None, "correct": int(number > 0)}
    return {"id": f"masked-{index}", "task": "masked" if index % 2 else "question", "kind": "bridge",
            "length": sections, "question": f"Which entity is [MASK] in the whole article about {name}?",
            "answers": [town], "sections": texts, "gold": gold, "marks": ["[MASK]", name], "systems": read}


def write_readings(folder: Path, documents: list[dict]) -> None:
    (folder / "readings.json").write_text(json.dumps({"format": 1, "documents": documents}), encoding="utf-8")


def make_run(folder: Path, seed=0, config=None, metrics=True, **results) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"preset": "nano", "corpus": "miniworld", "seed": seed, "run": folder.name} | (config or {})
    results = {
        "format": 2, "environment": {"memtrain": "0.1.0", "commit": "abc1234", "date": "2030-01-02", "device": "cpu",
                        "threads": 2, "command": f"python memtrain.py --run {folder.name}"},
        "config": config, "long_qa": qa_rows(seed=seed),
        "recall": [{"system": system, "seed": seed, "n": 100, "accuracy": share, "low": low, "high": high}
                   for system, share, low, high in (("base", 0.3, 0.219, 0.396), ("memtrain", 0.5, 0.404, 0.596))],
        "masked": [{"system": "memtrain", "seed": seed, "sections": 4, "n": 100, "em": 0.25, "em_low": 0.17,
                    "em_high": 0.35}],
        "search_qa": [], "memory": [], "evaluation": {"seconds": 36.0},
        "stages": [{"name": "memtrain", "seed": seed, "steps": 30, "seconds": 123.4,
                    "tokens_sampled": 1234567, "tokens_trained": 654321, "reward_first": 0.1,
                    "reward_last": 0.71234}],
    } | results
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(config))
    if metrics:
        lines = [{"stage": stage, "step": step, "reward": 0.2 + 0.01 * step, "recall": 0.3 + 0.005 * step,
                  "memory_tokens": 40 - 0.2 * step, "kl": float("nan")}
                 for stage in ("memtrain", "memagent") for step in range(1, 31)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
