"""What a run cost: tokens, FLOPs and device hours, per stage. Arithmetic, without torch.

FLOPs are the model's: 2 a parameter and token that passes forward (sampled tokens and, where they were counted, the
prompts they answer), 6 a parameter and token trained on (forward and backward); with adapters 4 a frozen parameter and
6 an adapter's. The embedding of an untied model is looked up, not multiplied, and is left out. Attention scores,
recomputation and the optimiser are not counted.
"""

from collections.abc import Sequence

from eval.plan import parameters
from eval.report.arms import Arm
from eval.report.results import number

SUMMED = ("seconds", "tokens_sampled", "tokens_trained", "flops", "hours")


def stage_cost(state: dict, c, vocab: int) -> dict:
    """The ledger's fields of a row of `stages`, from a finished stage's state. tokens_prompts: tokens of the prompts
    that went through the model while sampling; null where the run didn't count them."""
    weights, adapters = parameters(c, vocab)
    multiplied = weights - (0 if c.tied else vocab * c.width)
    sampled, prompts = state.get("tokens_sampled", 0), state.get("tokens_prompts")
    trained = state.get("tokens_trained", state.get("tokens", 0))
    flops = 2.0 * (multiplied + adapters) * (sampled + (prompts or 0))
    flops += (4.0 * multiplied + 6.0 * adapters if adapters else 6.0 * multiplied) * trained
    return {"tokens_sampled": sampled, "tokens_prompts": prompts, "tokens_trained": trained,
            "parameters": weights + adapters, "flops": flops}


def ledger(arms: Sequence[Arm]) -> list[dict]:
    """One row per arm, stage and device, summed over the arm's runs; the last row is the sum of all.

    A row has arm, stage, device, runs and SUMMED; hours are of a GPU or of a CPU's threads. None where nothing was
    recorded.
    """
    rows: dict[tuple, dict] = {}
    total = _empty("", "all", "")
    for arm in arms:
        for run in arm.runs:
            device = str(run.environment.get("device", "cpu"))
            threads = run.environment.get("threads") if device == "cpu" else 1
            stages = [row for row in run.results["stages"] if "@" not in row["name"]]  # the whole stage has those, too
            for stage in (*stages, {"name": "eval"} | run.results.get("evaluation", {})):
                row = rows.setdefault((arm.name, stage["name"], device), _empty(arm.name, stage["name"], device))
                seconds = stage.get("seconds")
                hours = None if seconds is None else seconds / 3600 * (threads if number(threads) else 1)
                for own in (row, total):
                    own["runs"] += 1
                    for key, value in (stage | {"hours": hours}).items():
                        if key in SUMMED and value is not None:
                            own[key] = (own[key] or 0) + value
    return [*rows.values(), total | {"runs": ""}]


def _empty(arm: str, stage: str, device: str) -> dict:
    return {"arm": arm, "stage": stage, "device": device, "runs": 0, **dict.fromkeys(SUMMED)}
