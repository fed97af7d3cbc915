"""What a stage cost: tokens and FLOPs. Arithmetic, without torch.

FLOPs are the model's: 2 a parameter and token that passes forward (sampled tokens and, where they were counted, the
prompts they answer), 6 a parameter and token trained on (forward and backward); with adapters 4 a frozen parameter and
6 an adapter's. The embedding of an untied model is looked up, not multiplied, and is left out. Attention scores,
recomputation and the optimiser are not counted.
"""

from eval.plan import parameters


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
