"""What only a card can show: captured graphs, a whole step in its precision, adapters on bf16 weights, whole runs.

    python -m pytest -m gpu

Each is compared with the CPU, which the other tests compare with the paper's formulas.
"""

import json
from dataclasses import replace

import pytest
import torch

import memtrain
from tests.conftest import TINY

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none here")]
CUDA = torch.device("cuda", 0)


def moved(model: memtrain.Decoder, dtype=torch.float32) -> memtrain.Decoder:
    """A copy on the card, its weights in `dtype`; adapters stay float32."""
    twin = memtrain.copy.deepcopy(model).to(CUDA)
    for name, p in twin.named_parameters():
        if ".lora_" not in name:
            p.data = p.data.to(dtype)
    return twin


def prompts(count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Groups of three with equal prefixes, of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [((torch.arange(20 + 30 * (i // 3)) * (i // 3 + 2) % vocabulary).tolist(),
             torch.randint(vocabulary, (3 + i % 4,), generator=generator).tolist()) for i in range(count)]


def sampled(model, c, chunk: int, count: int = 12, limit: int = 24):
    keys = [("gpu", i) for i in range(count)]
    return memtrain.Sampler(model, chunk)(c, prompts(count, len(model.embed)), keys, limit, (1,))


def agrees(mine, theirs, tolerance: float) -> None:
    assert [t.sampled for t in mine] == [t.sampled for t in theirs]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=tolerance, rtol=0)


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "drawn"])
@pytest.mark.parametrize("rows", [512, 5], ids=["at once", "admitted as others end"])
def test_captured_graphs_sample_what_the_cpu_samples(tiny, decoder, greedy, rows):
    c = replace(tiny("--sample-rows", str(rows)), **({"top_p": 1e-9} if greedy else {}))
    model = decoder(c, 61)
    there = moved(model)
    truth = sampled(model, c, 0)
    agrees(sampled(there, c, 1), truth, 1e-5)  # eager: one launch after the other
    sampler = memtrain.Sampler(there, 16)
    keys = [("gpu", i) for i in range(12)]
    for _ in range(3):  # as they are, captured, replayed
        agrees(sampler(c, prompts(12, 61), keys, 24, (1,)), truth, 1e-5)
    assert any(sampler.graphs.values()), "nothing was captured"


def test_captured_graphs_in_bf16(tiny, decoder):
    c = replace(tiny("--lora-rank", "2", "--dtype", "bfloat16"), top_p=1e-9)
    there = moved(decoder(c, 61), torch.bfloat16)
    eager, captured = sampled(there, c, 1), sampled(there, c, 16)
    agrees(captured, eager, 2e-2)


def test_deterministic_runs_capture_nothing(tiny, decoder):
    c = tiny("--deterministic", "true")
    sampler = memtrain.Sampler(moved(decoder(c, 61)), 16)
    turns = sampler(c, prompts(6, 61), [("gpu", i) for i in range(6)], 24, (1,))
    assert turns == sampler(c, prompts(6, 61), [("gpu", i) for i in range(6)], 24, (1,)) and not sampler.graphs


def gaps(model, c) -> torch.Tensor:
    """|log pi scored - log pi sampled| of every sampled token."""
    turns = sampled(model, c, 16)
    groups = memtrain.group_by_prefix([t.prefix for t in turns])
    rows = [(turns[g[0]].prefix, [(turns[i].given, turns[i].sampled) for i in g]) for g in groups]
    with torch.no_grad():
        scored = memtrain.score(model, memtrain.pack(rows, CUDA))[0].cpu()
    return (scored - torch.tensor([x for g in groups for i in g for x in turns[i].logprobs])).abs()


def test_sampled_log_probs_are_the_scored_ones(tiny, decoder):
    c = tiny()
    assert gaps(moved(decoder(c, 61)), c).max() <= 1e-5


def test_sampled_log_probs_are_the_scored_ones_in_bf16(tokenizer):
    """Of the shipped base: random weights make logits so large that bf16 leaves little of them."""
    c = memtrain.parse(["--stages", "memtrain"])
    model = memtrain.Decoder(c, tokenizer.size)
    memtrain.load_checkpoint(memtrain.SHIPPED_BASE, model, tokenizer)
    assert gaps(moved(model, torch.bfloat16), c).mean() <= 2e-2


class Kept:
    """In the optimiser's place."""

    def __init__(self, model):
        self.model, self.gradient = model, {}

    def step(self):
        self.gradient = {n: p.grad.double().cpu() for n, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none=True):
        for p in self.model.parameters():
            p.grad = None


@pytest.mark.parametrize("lora", [0, 2], ids=["all weights", "LoRA"])
def test_a_grpo_step_equals_fp64_on_the_cpu(tiny, agent, lottery, lora):
    a = agent(*(("--lora-rank", str(lora)) if lora else ()))
    c = replace(a.c, grad_clip=1e30)
    batch = memtrain.collect(a, memtrain.Data(c, a.tokenizer), "memtrain", 0)
    exact, there = memtrain.copy.deepcopy(a.model).double(), moved(a.model)
    rows, gradients = {}, {}
    for name, model in (("exact", exact), ("there", there)):
        kept = Kept(model)
        reference = memtrain.reference_of(model, c)
        with torch.no_grad():  # the policy has moved since it sampled
            for p in filter(lambda p: p.requires_grad, model.parameters()):
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.device))
        rows[name] = memtrain.update(model, reference, kept, c, batch, set(batch.entry))
        gradients[name] = kept.gradient
    assert rows["there"]["loss"] == pytest.approx(rows["exact"]["loss"], abs=1e-5)
    assert rows["there"]["kl"] == pytest.approx(rows["exact"]["kl"], rel=1e-3) and rows["there"]["kl"] > 0
    assert gradients["exact"].keys() == gradients["there"].keys() and gradients["exact"]
    for name, true in gradients["exact"].items():
        assert (gradients["there"][name] - true).norm() <= 1e-3 * true.norm() + 1e-9, name


def test_adapters_on_bf16_weights_learn_from_kl_zero(tiny, agent, lottery):
    a = agent("--lora-rank", "2", "--dtype", "bfloat16")
    there = moved(a.model, torch.bfloat16)
    there_agent = memtrain.Agent(there, a.tokenizer, a.c)
    data, reference = memtrain.Data(a.c, a.tokenizer), memtrain.reference_of(there, a.c)
    optimizer = torch.optim.AdamW([p for p in there.parameters() if p.requires_grad], lr=1e-2)
    rows = []
    for i in range(3):
        batch = memtrain.collect(there_agent, data, "memtrain", i)
        rows.append(memtrain.update(there, reference, optimizer, a.c, batch, set(batch.entry)))
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 1e-6
    assert not any(r["skipped"] for r in rows)


def test_a_tiny_run_goes_to_its_report(folder, base_checkpoint):
    assert memtrain.main([*TINY, "--run", "t", "--device", "cuda", "--init", base_checkpoint(), "--memtrain-steps", "2",
                          "--memagent-steps", "2", "--eval-lengths", "1"]) == 0
    assert (folder / "runs/t/report.html").exists()
    results = json.loads((folder / "runs/t/results.json").read_text())
    assert results["environment"]["kernels"] == "Triton" and {r["system"] for r in results["long_qa"]} > {"base"}


def test_read_says_on_a_card_what_it_says_on_a_cpu(folder, capsys):
    (folder / "text.txt").write_text("Ada Lovelace was born in London. She wrote about an engine. " * 40)
    said = {}
    for device in ("cpu", "cuda"):
        memtrain.main(["read", "text.txt", "--question", "Where was Ada Lovelace born?", "--device", device, "--out",
                               f"{device}.json", "--eval-top-p", "1e-9"])
        said[device] = json.loads((folder / f"{device}.json").read_text())
    capsys.readouterr()
    assert said["cpu"] == said["cuda"] and len(said["cpu"]) > 2
