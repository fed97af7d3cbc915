"""Sampling beside transformers' generate, and one GRPO step beside TRL's GRPOTrainer, on the same checkpoint.

The checkpoint is a Qwen3 of random weights that transformers saves to a temporary folder; both sides load it from
there. What is timed is what a user of either would run; before that, both sides must be shown to do the same thing:

    sample   greedy tokens are equal, and the log-probs that we record are those of their forward pass. Timed: G
             rows of each prompt, temperature 1, nobody stops early. Theirs: all rows in one batch, each with its copy
             of the prompt, KV cache on, sdpa. Ours: a prompt is read once and its keys are read once a group.
    trl      loss and gradient of the same completions, with ratios away from 1, are equal. Timed: from prompts to
             changed weights (sampling, rewards, loss, backward, clipping, AdamW). Both train all weights or the same
             LoRA. Theirs: GRPOTrainer with dr_grpo, no scaling by the deviation, no KL, no vLLM, the rows of a
             step in micro-batches of --trl-batch; every row carries its prompt through generation and through the
             loss, and the stop token is suppressed by min_new_tokens. Ours: Sampler and memtrain.update, prompts once
             a group in both; log-probs are recorded while sampling, and groups whose rewards tie are left out, as
             in training (theirs go through the model with an advantage of zero).

With completions of one length, dr_grpo's sum over (rows x longest completion) is our mean of token means.

On the CPU everything is float32. The shape 0.6b is Qwen3-0.6B's, in `trl` with the paper's window, LoRA and recomputed
activations on both sides; on CUDA it is timed in bfloat16 (`sample` is checked in float32 all the same), with both
sides on the card: it must hold both, although each side's memory is reported alone. `trl` has not run on a GPU.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import memtrain
from data import InputError
from data.run.terminal import columns
from data.weights.pretrained import adapter_names, load_weights, published
from eval.bench.kernels import ceilings
from eval.bench.measure import Capture, forget_peak, peak_mb, seconds
from kernels import synchronise

SHAPES = {  # transformers' names; trl: defaults of that benchmark
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
             "head_dim": 32, "intermediate_size": 768, "vocab_size": 8192},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151_936},
}
TRL = {"tiny": {"prompt": 640, "response": 64, "lora_rank": 0, "trl_batch": 8},
       "0.6b": {"prompt": 7168, "response": 1024, "lora_rank": 32, "trl_batch": 1}}  # the paper's window
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
    if absent := [m for m in modules if importlib.util.find_spec(m) is None]:
        raise InputError(f"{absent[0]} is not installed, and this is a comparison with it; "
                         f"pip install -r tests/requirements.txt")


def quiet() -> None:
    """No progress bars and no advice from the other side's libraries between the lines of a table."""
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


def describe(shape: dict, model: memtrain.Decoder) -> str:
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    return (f"Qwen3 of random weights: width {shape['hidden_size']}, {shape['num_hidden_layers']} layers, "
            f"{shape['num_attention_heads']}/{shape['num_key_value_heads']} heads of {shape['head_dim']}, hidden "
            f"{shape['intermediate_size']}, vocabulary {shape['vocab_size']:,}: {parameters / 1e6:.1f} M parameters, "
            f"{model.c.dtype}")


# ---- sample ----------------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """Both sides on the same prompts: `groups` of them, `group` rows each, `response` new tokens a row."""

    ours: memtrain.Decoder
    theirs: torch.nn.Module
    prompts: list[list[int]]
    group: int
    response: int

    def __post_init__(self):
        self.rows = [p for p in self.prompts for _ in range(self.group)]
        self.ids = torch.tensor(self.rows, device=self.ours.embed.device)
        self.sampler = memtrain.Sampler(self.ours)

    def sample(self, length: int) -> list[list[int]]:
        turns = self.sampler(self.ours.c, [(r[:-1], r[-1:]) for r in self.rows],
                             [("sample", i) for i in range(len(self.rows))], length, ())
        return [t.sampled for t in turns]

    def generate(self, length: int) -> list[list[int]]:
        return generate(self.theirs, self.ids, length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


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
    return {"rows": len(rows), "tokens": CHECKED, "greedy": sum(equal) / len(equal),
            "logprob": float((recorded - wanted).abs().max())}


def step_bytes(model: memtrain.Decoder, groups: int, rows: int, prompt: int, response: int) -> float:
    """What a decoding step must read at least: every weight once, every prompt's keys and values once a group, and
    each row's own, on average."""
    c, size = model.c, model.embed.element_size()
    weights = sum(p.numel() for p in model.parameters()) - (0 if c.tied else model.embed.numel())
    a_token = 2 * c.layers * c.key_heads * c.head_size
    return size * (weights + a_token * (groups * (prompt - 1) + rows * (1 + response / 2)))


def run_sample(o, folder: Path, device: torch.device) -> dict:
    """o: shape, vocabulary, group, groups, prompt, response, repeats."""
    quiet()
    shape = SHAPES[o.shape] | ({"vocab_size": o.vocabulary} if o.vocabulary else {})
    save_checkpoint(folder, shape)
    prompts = make_prompts(o.groups, o.prompt, shape["vocab_size"], 0)
    rows = ("--sample-rows", str(max(o.groups * o.group, 2 * o.groups)))
    exact = torch.float32  # in bfloat16 two ways to round would part at the first near tie
    same = same_policy(load_ours(folder, device, exact, *rows), load_theirs(folder, device, exact), prompts)
    dtype = torch.bfloat16 if device.type == "cuda" else exact
    pair = Sampling(load_ours(folder, device, dtype, *rows), load_theirs(folder, device, dtype), prompts, o.group,
                    o.response)
    sides = {"memtrain": pair.sample, "transformers generate": pair.generate}
    spent = {name: {"all": [], "first": []} for name in sides}
    bar = tqdm(total=2 * (o.repeats + 1), desc="sample", unit="call")
    for repeat in range(o.repeats + 1):  # in turn, so that other work on the machine hits both
        for name, side in sides.items():
            got = []
            whole = seconds(lambda side=side, got=got: got.extend(side(o.response)), device)
            first = seconds(lambda side=side: side(1), device)
            if [len(row) for row in got] != [o.response] * len(pair.rows):
                raise InputError(f"{name}: did not give {o.response} tokens for each of {len(pair.rows)} rows")
            if repeat:  # the first call of each is slow, and counts for nobody
                spent[name]["all"].append(whole)
                spent[name]["first"].append(first)
            bar.update()
    bar.close()
    copy = ceilings(device, dtype)[1]
    size = step_bytes(pair.ours, o.groups, len(pair.rows), o.prompt, o.response)
    return {"model": describe(shape, pair.ours), "device": device.type, "group": o.group, "groups": o.groups,
            "prompt": o.prompt, "response": o.response, "same": same, "bytes_per_step": size, "copy_bytes_per_s": copy,
            "sides": {name: sampling_figures(s, spent["memtrain"], len(pair.rows) * o.response, o.response - 1,
                                             size / copy) for name, s in spent.items()}}


def sampling_figures(mine: dict, ours: dict, tokens: int, steps: int, limit: float) -> dict:
    """limit: seconds of a decoding step at the bandwidth of a copy."""
    decode = max(1e-9, statistics.median(mine["all"]) - statistics.median(mine["first"])) / max(1, steps)
    return {"seconds": mine["all"], "seconds_first_token": mine["first"],
            "tokens_per_s": tokens / statistics.median(mine["all"]), "ms_per_step": 1e3 * decode,
            "bandwidth_share": limit / decode,
            "speedup": [b / a for a, b in zip(ours["all"], mine["all"], strict=True)]}


def same_sampling(result: dict) -> bool:
    limit = TOLERANCE_ON_A_CARD if result.get("device") == "cuda" else TOLERANCE[torch.float32]
    return result["same"]["greedy"] == 1 and result["same"]["logprob"] <= limit


def sample_table(result: dict) -> str:
    same, median = result["same"], statistics.median
    rows = [["", "tokens/s", "seconds", "first token", "ms a step", "of bandwidth", "ours is faster", "min"]]
    rows += [[name, f"{s['tokens_per_s']:,.0f}", f"{median(s['seconds']):.3f}",
              f"{median(s['seconds_first_token']):.3f}", f"{s['ms_per_step']:.2f}",
              f"{s['bandwidth_share']:.0%}", f"{median(s['speedup']):.2f}x",
              f"{min(s['speedup']):.2f}x"] for name, s in result["sides"].items()]
    return (f"{result['model']}\n{result['groups']} groups x {result['group']} rows, prompts of {result['prompt']} "
            f"tokens, {result['response']} new tokens a row\n\n{columns(rows)}\n"
            f"medians, in turn; first token: the prompts read, one token drawn; a step: the rest, per step; of "
            f"bandwidth: the {result['bytes_per_step'] / 1e6:.1f} MB that a step must read,\nat the "
            f"{result['copy_bytes_per_s'] / 1e9:.1f} GB/s of a copy measured here, over that\n"
            f"float32, {same['rows']} rows x {same['tokens']} tokens: {same['greedy']:.2%} of the greedy tokens are "
            f"equal, a sampled token's log-prob differs by at most {same['logprob']:.1e}  "
            f"{'ok' if same_sampling(result) else 'DIFFERENT'}")


# ---- trl -------------------------------------------------------------------------------------------------------------


def parity(completion: Sequence[int]) -> float:
    """The reward of both sides: cheap, deterministic, and about half of a group earns it."""
    return float(zlib.crc32(repr(list(completion)).encode()) % 2)


@dataclass
class Cost:
    """One side's step, in seconds; memory at its peak beyond what was held before."""

    sampling: float
    step: float
    extra_mb: float
    tokens: int


class Clock:
    """Seconds and memory of something that starts in one callback and ends in another."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()

    def start(self) -> None:
        forget_peak(self.device)
        self.before, self.sampling, self.tokens = peak_mb(self.device), 0.0, 0
        self.began = self.now()

    def stop(self) -> Cost:
        return Cost(self.sampling, self.now() - self.began, peak_mb(self.device) - self.before, self.tokens)


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

    def __call__(self, prompts: Sequence[list[int]], step: int) -> tuple[Cost, float]:
        """(cost, share of groups with a signal)."""
        self.clock.start()
        batch = self.batch(prompts, step)
        self.clock.sampling = self.clock.now() - self.clock.began
        self.clock.tokens = sum(len(t.sampled) for t in batch.turns)
        signal = memtrain.with_signal(batch)
        if kept := {e for e, g in enumerate(batch.group) if g in signal}:
            memtrain.update(self.model, None, self.optimizer, self.c, batch, kept)
        return self.clock.stop(), len(signal) / len(prompts)


def make_trainer(folder: Path, device: torch.device, dtype: torch.dtype, o, prompts: Sequence[list[int]], clock: Clock,
                 after: Callable):
    """TRL's GRPOTrainer on the checkpoint, one optimiser step for `groups` prompts, in their order; after(cost) is
    called behind each."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    vocabulary = SHAPES[o.shape]["vocab_size"] if not o.vocabulary else o.vocabulary
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))  # token i is the word i
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left",
                                                     pad_token=str(vocabulary - 2), eos_token=str(vocabulary - 1))
    rows, cuda = o.groups * o.group, device.type == "cuda"
    config = GRPOConfig(
        str(folder / "trl"), use_cpu=not cuda, bf16=dtype == torch.bfloat16, use_vllm=False, loss_type="dr_grpo",
        scale_rewards="none", beta=0.0, epsilon=0.2, num_generations=o.group, max_completion_length=o.response,
        temperature=1.0, top_p=1.0, top_k=0, generation_kwargs={"min_new_tokens": o.response},
        per_device_train_batch_size=o.trl_batch, gradient_accumulation_steps=rows // o.trl_batch,
        gradient_checkpointing=o.recompute, max_steps=o.repeats + 1, learning_rate=1e-6, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch", shuffle_dataset=False,
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)

    def reward(completion_ids, **_):
        clock.tokens += sum(map(len, completion_ids))
        return [parity(ids) for ids in completion_ids]

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            after(clock.stop())

    class Timed(GRPOTrainer):
        def _generate(self, *arguments, **named):
            began = clock.now()
            made = super()._generate(*arguments, **named)
            clock.sampling += clock.now() - began
            return made

    peft = None
    if o.lora_rank:
        from peft import LoraConfig

        peft = LoraConfig(r=o.lora_rank, lora_alpha=2 * o.lora_rank, lora_dropout=0.0, target_modules=TARGETS,
                          task_type="CAUSAL_LM")
    data = Dataset.from_dict({"prompt": [" ".join(map(str, p)) for p in prompts]})
    trainer = Timed(load_theirs(folder, device, dtype), reward, config, data, processing_class=tokenizer,
                    callbacks=[Watch()], peft_config=peft)
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

    device = old.device if model.embed.device.type == "cpu" else model.embed.device
    rewards = torch.tensor(batch.rewards).view(len(prompts), -1)
    inputs = {"prompt_ids": torch.tensor([[*t.prefix, *t.given] for t in turns]),
              "completion_ids": torch.tensor([t.sampled for t in turns]),
              "old_per_token_logps": old, "advantages": (rewards - rewards.mean(1, keepdim=True)).flatten()}
    inputs |= {f"{part}_mask": torch.ones_like(inputs[f"{part}_ids"]) for part in ("prompt", "completion")}
    trainer.model.eval()  # the loss of the whole batch, not divided for accumulation; no layer has dropout
    other, size = 0.0, ours.o.trl_batch
    for first in range(0, n, size):
        part = trainer._compute_loss(trainer.model, {k: v[first:first + size].to(device) for k, v in inputs.items()})
        (part * size / n).backward()
        other += float(part.detach()) * size / n
    theirs = {name: parameters[name].grad.float() for name in named}
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train()
    difference = torch.stack([(mine[k] - g).norm() for k, g in theirs.items()])
    size_, of = torch.stack([g.norm() for g in theirs.values()]), float(inputs["advantages"].abs().mean())
    return {"loss": loss, "trl_loss": other, "loss_differs": abs(loss - other) / of,
            "gradient_differs": float(difference.norm() / size_.norm()),
            "worst_parameter_differs": float((difference / size_.clamp(min=1e-3 * float(size_.max()))).max())}


def resident_mb(model: torch.nn.Module, optimizer, caches: Sequence[torch.Tensor] = ()) -> float:
    """What one side holds between two steps: the other side's share of the same process is not its own."""
    held = {p.data_ptr(): p for p in model.parameters()}
    state = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    return sum(x.numel() * x.element_size() for x in (*held.values(), *state, *caches)) / 2**20


def run_trl(o, folder: Path, device: torch.device) -> dict:
    """o: shape, vocabulary, group, groups, prompt, response, repeats, lora_rank, trl_batch."""
    for name, value in TRL[o.shape].items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.group < 2 or o.lora_rank < 0:
        raise InputError(f"--group {o.group}, --lora-rank {o.lora_rank}: a group of one has no mean to compare with, "
                         f"a rank is not negative; give at least 2 and 0")
    if (o.groups * o.group) % o.trl_batch:
        raise InputError(f"--trl-batch {o.trl_batch}: must divide the {o.groups * o.group} rows of a step")
    quiet()
    o.recompute = o.shape != "tiny"
    shape = SHAPES[o.shape] | ({"vocab_size": o.vocabulary} if o.vocabulary else {})
    save_checkpoint(folder, shape)
    prompts = make_prompts(o.groups * (o.repeats + 1), o.prompt, shape["vocab_size"], 0)
    dtype = torch.bfloat16 if device.type == "cuda" and o.lora_rank else torch.float32
    clock = Clock(device)
    model = load_ours(folder, device, dtype, "--sample-rows", str(o.groups * o.group), "--cache-gb", "6",
                      "--lora-rank", str(o.lora_rank), "--lora-alpha", str(2 * o.lora_rank or 1), "--lr", "1e-6",
                      "--recompute", str(o.recompute).lower(), "--grad-clip", "1", "--micro-tokens", "16384")
    ours, costs, signal = OurStep(model, o, clock), {"memtrain": [], "TRL GRPOTrainer": []}, []
    bar = tqdm(total=o.repeats + 1, desc="trl", unit="step")

    def after(cost: Cost) -> None:  # in turn, so that other work on the machine hits both
        step = bar.n
        mine, share = ours(prompts[step * o.groups:(step + 1) * o.groups], step)
        if step:  # the first step of each is slow, and counts for nobody
            costs["TRL GRPOTrainer"].append(cost)
            costs["memtrain"].append(mine)
            signal.append(share)
        bar.update()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL and transformers tell each other of renamed options
        trainer = make_trainer(folder, device, dtype, o, prompts, clock, after)
        same = same_objective(ours, trainer, prompts[:o.groups])
        trainer.train()
    bar.close()
    caches = [x for kv in (*ours.sampler.cache.prefix, *ours.sampler.cache.suffix) for x in kv]
    held = {"memtrain": resident_mb(model, ours.optimizer, caches),
            "TRL GRPOTrainer": resident_mb(trainer.model, trainer.optimizer)}
    return {"model": describe(shape, model), "group": o.group, "groups": o.groups, "prompt": o.prompt,
            "response": o.response, "lora_rank": o.lora_rank, "trl_batch": o.trl_batch, "recompute": o.recompute,
            "dtype": model.c.dtype, "same": same, "signal": statistics.mean(signal),
            "sides": {name: step_figures(rows, costs["memtrain"], held[name]) for name, rows in costs.items()}}


def step_figures(rows: Sequence[Cost], ours: Sequence[Cost], held: float) -> dict:
    return {"seconds": [r.step for r in rows], "seconds_sampling": [r.sampling for r in rows],
            "tokens_sampled": [r.tokens for r in rows], "peak_mb": held + max(r.extra_mb for r in rows),
            "speedup": [b.step / a.step for a, b in zip(ours, rows, strict=True)]}


def same_step(result: dict) -> bool:
    """One objective, and as many tokens on both sides."""
    tokens = {n for s in result["sides"].values() for n in s["tokens_sampled"]}
    limit = TOLERANCE[getattr(torch, result["dtype"])]
    return tokens == {result["groups"] * result["group"] * result["response"]} and all(
        result["same"][name] <= limit for name in ("loss_differs", "gradient_differs"))


def trl_table(result: dict) -> str:
    same, median = result["same"], statistics.median
    trained = f"LoRA of rank {result['lora_rank']}" if result["lora_rank"] else "all weights"
    rows = [["", "sampling", "step s", "ours is faster", "min", "peak MB"]]
    rows += [[name, f"{median(s['seconds_sampling']):.3f}", f"{median(s['seconds']):.3f}",
              f"{median(s['speedup']):.2f}x", f"{min(s['speedup']):.2f}x", f"{s['peak_mb']:.0f}"]
             for name, s in result["sides"].items()]
    return (f"{result['model']}\none GRPO step: {result['groups']} groups x {result['group']} completions of "
            f"{result['response']} tokens behind prompts of {result['prompt']}; {trained}, AdamW"
            f"{', activations recomputed' if result['recompute'] else ''}\n\n{columns(rows)}\n"
            f"medians after one to warm up, in turn; memory: what a side holds, and its peak beyond; groups that carry "
            f"a signal: {result['signal']:.0%}\nsame completions, ratios off 1: loss {same['loss']:.6f} and "
            f"{same['trl_loss']:.6f}, gradient differs by {same['gradient_differs']:.1e} of its norm, the worst "
            f"parameter by {same['worst_parameter_differs']:.1e}  {'ok' if same_step(result) else 'DIFFERENT'}")
