"""Sampling beside transformers' generate, and one GRPO step beside TRL's GRPOTrainer, on the same checkpoint.

The checkpoint is a Qwen3 of random weights that transformers saves to a temporary folder; both sides load it from
there. Before anything is timed, both sides must be shown to do the same thing:

    sample   greedy tokens are equal, and the log-probs that we record are those of their forward pass. Timed: G
             rows of each prompt, temperature 1, nobody stops early. Theirs: all rows in one batch, each with its copy
             of the prompt, KV cache on, sdpa. Ours: a prompt is read once and its keys are read once a group.
    trl      loss and gradient of the same completions, with ratios away from 1, are equal. Timed: from prompts to
             changed weights; both sides train all weights or the same LoRA. Theirs: dr_grpo, whose sum over (rows x
             longest completion) is our mean of token means where all are of one length; no scaling by the deviation,
             no KL, no vLLM; every row carries its prompt. Ours: prompts once a group; log-probs are recorded while
             sampling, and groups whose rewards tie are left out, as in training.

On the CPU everything is float32. The shape 0.6b is Qwen3-0.6B's, in `trl` with the paper's window, LoRA and recomputed
activations on both sides; on CUDA it is timed in bfloat16, with both sides on the card: it must hold both, although
each side's memory is reported alone. `trl` has not run on a GPU.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import memtrain
from data import InputError
from data.weights.pretrained import adapter_names, load_weights, published
from eval.bench.measure import Capture, Figures, Row, ceilings, forget_peak, measured, peak_mb, table
from kernels import synchronise

SHAPES = {  # transformers' names
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
             "head_dim": 32, "intermediate_size": 768, "vocab_size": 8192},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151_936},
}
# prompt, response, rank of the adapters, rows of TRL's micro-batches; of 0.6b the paper's window
TRL = {"tiny": (640, 64, 0, 8), "0.6b": (7168, 1024, 32, 1)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKED = 32  # greedy tokens compared
NOISE = 0.3  # of the old log-probs in the check of the loss: ratios leave the clip range on both sides
# Largest difference of log-probs; of losses, in units of the mean advantage's size (they cancel to almost nothing); of
# gradients, in units of their norm
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# On a card our float32 products are three of TF32, 5e-7 off each instead of 6e-8: over 28 layers an H200 gave 1.4e-4,
# where transformers itself is 1.5e-5 off float64 on a CPU.
TOLERANCE_ON_A_CARD = 3e-4


def require(*modules: str) -> None:
    """Their libraries, without progress bars and advice between the lines of a table."""
    if absent := [m for m in modules if importlib.util.find_spec(m) is None]:
        raise InputError(f"{absent[0]} is not installed, and this is a comparison with it; "
                         f"pip install -r tests/requirements.txt")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---- The checkpoint that both sides load -----------------------------------------------------------------------------


def save_checkpoint(folder: Path, shape: dict) -> None:
    """Random weights of that shape, through transformers. Wider than its default: near-uniform policies hide
    mistakes, and greedy tokens of a flat one hang on rounding."""
    import transformers

    config = transformers.Qwen3Config(**shape, tie_word_embeddings=True, initializer_range=0.05,
                                      max_position_embeddings=40_960, rope_parameters={
                                          "rope_type": "default", "rope_theta": 1e6})
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def load_theirs(folder: Path, device: torch.device, dtype: torch.dtype):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # nobody stops early
    return model.to(device).eval()


def load_ours(folder: Path, device: torch.device, dtype: torch.dtype, *fields: str) -> memtrain.Decoder:
    c = memtrain.parse(["--model", str(folder), "--preset", "paper", "--dtype", "float32", "--lora-rank", "0",
                        "--recompute", "false", "--kl", "0", "--temperature", "1", "--top-p", "1", *fields])
    # bfloat16 without adapters can't be trained, but it can be sampled from
    c = replace(c, dtype=str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        model = memtrain.Decoder(c, 0)
    load_weights(folder, model, device)
    return model


def make_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary - 2, (count, length), generator=generator).tolist()  # the last two: pad and stop


def describe(o, model: memtrain.Decoder) -> str:
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    return (f"Qwen3 {o.shape}, {parameters / 1e6:.0f} M random parameters, {model.c.dtype}, {o.groups} x {o.group} "
            f"rows, prompts of {o.prompt}, {o.response} new tokens")


# ---- sample ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model, ids: torch.Tensor, length: int, **how) -> list[list[int]]:
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, pad_token_id=0,
                           eos_token_id=None, use_cache=True, **how)
    return whole[:, ids.shape[1]:].tolist()


@torch.no_grad()
def same_policy(ours: memtrain.Decoder, theirs, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Greedy tokens of both sides, two rows a prompt that part at its last token; then tokens sampled by ours, and
    the log-probs we recorded beside those of one forward pass of theirs."""
    rows = [[*p[:-1], (p[-1] + i) % 1000] for p in prompts for i in range(2)]
    ids = torch.tensor(rows, device=ours.embed.device)
    pairs, keys = [(r[:-1], r[-1:]) for r in rows], [("check", i) for i in range(len(rows))]
    sampler = memtrain.Sampler(ours)
    mine = [t.sampled for t in sampler(replace(ours.c, top_p=1e-9), pairs, keys, CHECKED, ())]
    equal = [a == b for x, y in zip(mine, generate(theirs, ids, CHECKED, do_sample=False), strict=True)
             for a, b in zip(x, y, strict=True)]
    turns = sampler(ours.c, pairs, keys, CHECKED, ())
    drawn = torch.tensor([t.sampled for t in turns], device=ids.device)  # (N,L)
    logits = theirs(torch.cat([ids, drawn], 1), logits_to_keep=CHECKED + 1).logits[:, :-1].float()  # (N,L,V)
    wanted = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    recorded = torch.tensor([t.logprobs for t in turns], device=ids.device)
    return {"greedy": sum(equal) / len(equal), "logprob": float((recorded - wanted).abs().max())}


def is_same_policy(same: dict[str, float], device: torch.device) -> bool:
    limit = TOLERANCE_ON_A_CARD if device.type == "cuda" else TOLERANCE[torch.float32]
    return same["greedy"] == 1 and same["logprob"] <= limit


def step_bytes(model: memtrain.Decoder, groups: int, rows: int, prompt: int, response: int) -> float:
    """What a decoding step must read at least: every weight once, every prompt's keys and values once a group, and
    each row's own, on average."""
    c, size = model.c, model.embed.element_size()
    weights = sum(p.numel() for p in model.parameters()) - (0 if c.tied else model.embed.numel())
    a_token = 2 * c.layers * c.key_heads * c.head_size
    return size * (weights + a_token * (groups * (prompt - 1) + rows * (1 + response / 2)))


def sample(o, fields, figures: Figures) -> bool:
    """Tokens/s of our sampler beside transformers' generate, on the same random Qwen3; share of the bandwidth limit."""
    require("transformers")
    device, exact = o.device, torch.float32  # in bfloat16 two ways to round would part at the first near tie
    o.prompt, o.response = o.prompt or 640, o.response or 64
    with tempfile.TemporaryDirectory() as name:
        save_checkpoint(Path(name), SHAPES[o.shape])
        prompts = make_prompts(o.groups, o.prompt, SHAPES[o.shape]["vocab_size"], 0)

        def load(dtype):
            at_once = str(max(o.groups * o.group, 2 * o.groups))
            return (load_ours(Path(name), device, dtype, "--sample-rows", at_once),
                    load_theirs(Path(name), device, dtype))

        figures.add(same=same_policy(*load(exact), prompts))
        ours, theirs = load(torch.bfloat16 if device.type == "cuda" else exact)
    rows = [p for p in prompts for _ in range(o.group)]
    ids, sampler = torch.tensor(rows, device=device), memtrain.Sampler(ours)
    pairs, keys = [(r[:-1], r[-1:]) for r in rows], [("sample", i) for i in range(len(rows))]

    def sides(length: int) -> dict[str, Callable]:
        return {"memtrain": lambda: sampler(ours.c, pairs, keys, length, ()),
                "transformers generate": lambda: generate(theirs, ids, length, do_sample=True, temperature=1.0, top_k=0,
                                                          top_p=1.0)}

    what = f"sample: {describe(o, ours)}"
    made = measured(what, sides(o.response), device, o.repeats)
    first = measured(f"first token alone: {what}", sides(1), device, o.repeats)
    limit = step_bytes(ours, o.groups, len(rows), o.prompt, o.response) / ceilings(device, ours.embed.dtype)[1]
    for row, one in zip(made, first, strict=True):
        row.ceiling = limit * (o.response - 1) / max(1e-9, row.median - one.median)  # of decoding, prefill left out
        row.note = f"{len(rows) * o.response / row.median:,.0f} tokens/s"
    figures.add_rows(made + first)
    good, same = is_same_policy(figures["same"], device), figures["same"]
    print(f"{table(made + first)}\nfloat32: {same['greedy']:.2%} of {CHECKED} greedy tokens a row are equal, a sampled "
          f"one's log-prob differs by at most {same['logprob']:.1e}  {'ok' if good else 'DIFFERENT'}")
    return good


# ---- trl -------------------------------------------------------------------------------------------------------------


def parity(completion: Sequence[int]) -> float:
    """The reward of both sides: cheap, deterministic, and about half of a group earns it."""
    return float(zlib.crc32(repr(list(completion)).encode()) % 2)


class Clock:
    """Seconds and memory of something that starts in one callback and ends in another; into a row."""

    def __init__(self, device: torch.device, what: str, by: str):
        self.device, self.row, self.tokens = device, Row(what, by, [], 0.0), 0

    def start(self) -> None:
        self.before = forget_peak(self.device)
        synchronise(self.device)
        self.began = time.perf_counter()

    def stop(self) -> None:
        synchronise(self.device)
        self.row.seconds.append(time.perf_counter() - self.began)
        self.row.mb = max(self.row.mb, peak_mb(self.device) - self.before)


class OurStep:
    """Sampler, rewards, memtrain.update with AdamW: what train_step does, without the memory loop."""

    def __init__(self, model: memtrain.Decoder, o, clock: Clock):
        self.model, self.c, self.o, self.clock = model, model.c, o, clock
        self.sampler = memtrain.Sampler(model)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=model.c.lr,
                                           weight_decay=0.0)

    def batch(self, prompts: Sequence[list[int]], step: int) -> memtrain.Batch:
        rows = [(p[:-1], p[-1:]) for p in prompts for _ in range(self.o.group)]
        turns = self.sampler(self.c, rows, [("trl", step, i) for i in range(len(rows))], self.o.response, ())
        group = [g for g in range(len(prompts)) for _ in range(self.o.group)]
        return memtrain.Batch(turns, list(range(len(turns))), [parity(t.sampled) for t in turns], group, group, {})

    def __call__(self, prompts: Sequence[list[int]], step: int) -> None:
        self.clock.start()
        batch = self.batch(prompts, step)
        signal = memtrain.with_signal(batch)
        if kept := {e for e, g in enumerate(batch.group) if g in signal}:
            memtrain.update(self.model, None, self.optimizer, self.c, batch, kept)
        self.clock.stop()
        self.clock.tokens += sum(len(t.sampled) for t in batch.turns)


def make_trainer(folder: Path, dtype: torch.dtype, o, prompts: Sequence[list[int]], clock: Clock, after: Callable):
    """TRL's GRPOTrainer on the checkpoint, one optimiser step for `groups` prompts, in their order; after() is called
    behind each."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    vocabulary = SHAPES[o.shape]["vocab_size"]
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))  # token i is the word i
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left",
                                                     pad_token=str(vocabulary - 2), eos_token=str(vocabulary - 1))
    config = GRPOConfig(
        str(folder / "trl"), use_cpu=o.device.type == "cpu", bf16=dtype == torch.bfloat16, use_vllm=False,
        loss_type="dr_grpo", scale_rewards="none", beta=0.0, epsilon=0.2, num_generations=o.group,
        max_completion_length=o.response, temperature=1.0, top_p=1.0, top_k=0,
        generation_kwargs={"min_new_tokens": o.response}, per_device_train_batch_size=o.trl_batch,
        gradient_accumulation_steps=o.groups * o.group // o.trl_batch, gradient_checkpointing=o.shape != "tiny",
        max_steps=o.repeats + 1, learning_rate=1e-6, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", shuffle_dataset=False, report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)

    def reward(completion_ids, **_):
        clock.tokens += sum(map(len, completion_ids))
        return [parity(ids) for ids in completion_ids]

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()
            after()

    lora = LoraConfig(r=o.lora_rank, lora_alpha=2 * o.lora_rank, lora_dropout=0.0, target_modules=TARGETS,
                      task_type="CAUSAL_LM") if o.lora_rank else None
    data = Dataset.from_dict({"prompt": [" ".join(map(str, p)) for p in prompts]})
    trainer = GRPOTrainer(load_theirs(folder, o.device, dtype), reward, config, data, processing_class=tokenizer,
                          callbacks=[Watch()], peft_config=lora)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def same_objective(ours: OurStep, trainer, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Loss and gradient of both sides for completions that ours sampled, old log-probs shifted by some noise."""
    model, batch = ours.model, ours.batch(prompts, -1)
    n, generator = len(batch.turns), torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(n, ours.o.response, generator=generator)
    old = torch.tensor([t.logprobs for t in batch.turns]) + noise
    turns = [replace(t, logprobs=o) for t, o in zip(batch.turns, old.tolist(), strict=True)]
    # parity may tie in a small group; these never do
    batch = replace(batch, turns=turns, rewards=[float(i % 3 == 0) + 0.5 * (i % 2) for i in range(n)])
    named = adapter_names(model) or {published(name): name for name, _ in model.named_parameters()}
    parameters = {name.replace(".default.", "."): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, mine in named.items():  # adapters start at random on either side
            parameters[name].copy_(model.get_parameter(mine))

    capture = Capture(model)
    loss = memtrain.update(model, None, capture, replace(ours.c, grad_clip=1e30), batch, set(range(n)))["loss"]
    mine = {k: capture.gradient[v].float() for k, v in named.items()}

    rewards = torch.tensor(batch.rewards).view(len(prompts), -1)
    inputs = {"prompt_ids": torch.tensor([[*t.prefix, *t.given] for t in turns]),
              "completion_ids": torch.tensor([t.sampled for t in turns]),
              "old_per_token_logps": old, "advantages": (rewards - rewards.mean(1, keepdim=True)).flatten()}
    inputs |= {f"{part}_mask": torch.ones_like(inputs[f"{part}_ids"]) for part in ("prompt", "completion")}
    trainer.model.eval()  # the loss of the whole batch, not divided for accumulation; no layer has dropout
    other, size = 0.0, ours.o.trl_batch
    for first in range(0, n, size):
        part = trainer._compute_loss(trainer.model, {k: v[first:first + size].to(model.embed.device)
                                                     for k, v in inputs.items()})
        (part * size / n).backward()
        other += float(part.detach()) * size / n
    theirs = {name: parameters[name].grad.float() for name in named}
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train()
    difference, whole = (torch.stack([x.norm() for x in side]).norm() for side in (
        [mine[k] - g for k, g in theirs.items()], theirs.values()))
    return {"loss": loss, "trl_loss": other, "gradient_differs": float(difference / whole),
            "loss_differs": abs(loss - other) / float(inputs["advantages"].abs().mean())}


def held_mb(model: torch.nn.Module, optimizer, caches: Sequence[torch.Tensor] = ()) -> float:
    """What one side holds between two steps: the other side's share of the same process is not its own."""
    held = {p.data_ptr(): p for p in model.parameters()}
    state = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    return sum(x.numel() * x.element_size() for x in (*held.values(), *state, *caches)) / 2**20


def trl(o, fields, figures: Figures) -> bool:
    """A whole GRPO step beside TRL's GRPOTrainer: seconds, peak memory; that both have the same loss and gradient."""
    require("transformers", "trl", "peft", "datasets")
    prompt, response, rank, o.trl_batch = TRL[o.shape]
    o.prompt, o.response, o.lora_rank = o.prompt or prompt, o.response or response, (
        rank if o.lora_rank is None else o.lora_rank)
    if o.group < 2 or (o.groups * o.group) % o.trl_batch:
        raise InputError(f"--group {o.group}, --groups {o.groups}: a group needs two to compare, and their product "
                         f"must be a multiple of {o.trl_batch}, the rows of TRL's micro-batches")
    dtype = torch.bfloat16 if o.device.type == "cuda" and o.lora_rank else torch.float32
    prompts = make_prompts(o.groups * (o.repeats + 1), o.prompt, SHAPES[o.shape]["vocab_size"], 0)
    bar = tqdm(total=o.repeats + 1, desc="trl", unit="step")

    def after() -> None:  # in turn, so that other work on the machine hits both
        ours(prompts[bar.n * o.groups:(bar.n + 1) * o.groups], bar.n)
        if not bar.n:  # the first step of each is slow, and counts for nobody
            for clock in clocks:
                clock.row.seconds.clear()
                clock.row.mb = 0.0
        bar.update()

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as name:
        warnings.simplefilter("ignore")  # TRL and transformers tell each other of renamed options
        save_checkpoint(Path(name), SHAPES[o.shape])
        model = load_ours(Path(name), o.device, dtype, "--sample-rows", str(o.groups * o.group), "--cache-gb", "6",
                          "--lora-rank", str(o.lora_rank), "--lora-alpha", str(2 * o.lora_rank or 1), "--lr", "1e-6",
                          "--recompute", str(o.shape != "tiny").lower(), "--grad-clip", "1", "--micro-tokens", "16384")
        what = f"trl: a GRPO step, {describe(o, model)}, LoRA rank {o.lora_rank}"
        clocks = [Clock(o.device, what, by) for by in ("memtrain", "TRL GRPOTrainer")]
        ours = OurStep(model, o, clocks[0])
        trainer = make_trainer(Path(name), dtype, o, prompts, clocks[1], after)
        same = same_objective(ours, trainer, prompts[:o.groups])
        trainer.train()
    bar.close()
    caches = [x for kv in (*ours.sampler.cache.prefix, *ours.sampler.cache.suffix) for x in kv]
    clocks[0].row.mb += held_mb(model, ours.optimizer, caches)
    clocks[1].row.mb += held_mb(trainer.model, trainer.optimizer)
    tokens = [clock.tokens for clock in clocks]
    figures.add_rows([clock.row for clock in clocks], same=same, tokens_sampled=tokens)
    good = set(tokens) == {len(prompts) * o.group * o.response} and all(
        same[name] <= TOLERANCE[dtype] for name in ("loss_differs", "gradient_differs"))
    print(f"{table([clock.row for clock in clocks])}\nMB here: what a side holds, and its peak beyond\n"
          f"same completions, ratios off 1: loss {same['loss']:.6f} and {same['trl_loss']:.6f}, gradient differs by "
          f"{same['gradient_differs']:.1e} of its norm  {'ok' if good else 'DIFFERENT'}")
    return good
