"""What a run cost: tokens, FLOPs, device hours and an estimate of energy, per stage. Arithmetic, without torch.

FLOPs are the model's: 2 a parameter and token that passes forward (sampled tokens and, where they were counted, the
prompts they answer), 6 a parameter and token trained on (forward and backward); with adapters 4 a frozen parameter and
6 an adapter's. The embedding of an untied model is looked up, not multiplied, and is left out. Attention scores,
recomputation and the optimiser are not counted.
"""

from collections.abc import Sequence

from eval.plan import CARDS, parameters
from eval.report.arms import Arm

THREAD_WATTS = 10.0  # a 64-thread server CPU at 280 W gives 4.4 W a thread; as much again for memory, losses, cooling
COUNTED = ("seconds", "tokens_sampled", "tokens_prompts", "tokens_trained", "flops")
CARD_WATTS = 400.0  # of a GPU that eval.plan doesn't know


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


def power(environment: dict) -> tuple[float, str, float]:
    """(watts, what is assumed, device hours an hour) of where a run was made."""
    device = str(environment.get("device", "cpu"))
    if device == "cpu":
        threads = environment.get("threads")
        threads = threads if isinstance(threads, int) and threads > 0 else 1
        return threads * THREAD_WATTS, f"{THREAD_WATTS:g} W a CPU thread, its share of the machine included", threads
    plain = device.lower().replace("-", " ")
    names = [n for n in CARDS if n.split("-")[0].lower() in plain]  # "A100-40": the memory says which
    known = next((n for n in names if "-" not in n or f"{n.split('-')[1]}gb" in plain), names[0] if names else None)
    watts = CARDS[known].watts if known else CARD_WATTS
    card = known or "a card that is not known here"
    return watts, f"{watts:g} W for the GPU all the time ({card}), its host left out", 1


def ledger(arms: Sequence[Arm]) -> tuple[list[dict], list[str]]:
    """(rows, what they assume): one row per arm and stage, summed over the arm's runs; the last row is the sum of all.

    A row has arm, stage, device, runs, seconds, tokens_sampled, tokens_prompts, tokens_trained, flops, hours (of a GPU
    or of a CPU thread), unit and kwh; None where nothing was recorded.
    """
    rows: dict[tuple, dict] = {}
    notes, uncounted = {}, False
    for arm in arms:
        for run in arm.runs:
            watts, assumed, share = power(run.environment)
            notes[assumed] = None
            evaluation = run.results.get("evaluation")
            own = [row for row in run.results["stages"] if "@" not in row["name"]]  # the whole stage has those, too
            done = [*own, *([{"name": "eval"} | evaluation] if isinstance(evaluation, dict) else [])]
            for stage in done:
                device = str(run.environment.get("device", "cpu"))
                row = rows.setdefault((arm.name, stage["name"], device), {
                    "arm": arm.name, "stage": stage["name"], "device": device, "runs": 0,
                    "unit": "CPU-hours" if device == "cpu" else "GPU-hours"})
                hours = stage["seconds"] / 3600 if stage.get("seconds") is not None else None
                _add(row, {"runs": 1, "hours": hours and hours * share, "kwh": hours and hours * watts / 1000})
                _add(row, {key: stage.get(key) for key in COUNTED})
                uncounted |= bool(stage.get("tokens_sampled")) and stage.get("tokens_prompts") is None
    units = sorted({row["unit"] for row in rows.values()})
    total: dict = {"arm": "", "stage": "all", "device": "", "unit": " and ".join(units)}
    for row in rows.values():
        _add(total, {key: row.get(key) for key in (*COUNTED, "hours", "kwh")})
    assumed = [f"Energy is not measured: {note}." for note in notes]
    assumed.append("FLOPs are the model's: 2 a parameter and sampled token, 6 a parameter and trained token; "
                   "attention, recomputation and evaluation are not counted.")
    if uncounted:
        assumed.append("Prompts read while sampling were not counted in these runs; they are missing from the FLOPs.")
    return [*rows.values(), *([total] if rows else [])], assumed


def _add(row: dict, more: dict) -> None:
    for key, value in more.items():
        row[key] = row.get(key) if value is None else (row.get(key) or 0) + value
