"""A checkpoint as published, from its folder to an exported adapter: what `--model` does, on random weights."""

import json
from pathlib import Path

import pytest
import torch
from conftest import randomise
from test_memtrain_command import passages, questions, write
from test_weights_tokenizer import save, trained

from data.weights.loading import load_tokenizer
from memtrain import main

transformers = pytest.importorskip("transformers")
FIELDS = {"corpus": "c.jsonl", "questions": "q.jsonl", "train-questions": "t.jsonl", "passages": 12, "related": 3,
          "window": 1024, "section": 100, "memory": 11, "response": 12, "train-sections": 2, "masked-sections": 3,
          "documents": 2, "update-documents": 2, "group": 3, "recall-group": 2, "memtrain-steps": 2,
          "memagent-steps": 1, "mem1-steps": 1, "result": 300, "act": 60, "eval-lengths": "1,2",
          "eval-questions": 2, "eval-masked": 2, "lora-rank": 3, "lora-alpha": 6, "lr": 0.01, "save-every": 1,
          "device": "cpu", "threads": 1}
FIELDS = [text for name, value in FIELDS.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def model(folder):
    """A Qwen3 of two layers with a byte-level BPE and a chat template, and a corpus with questions beside it."""
    path = folder / "qwen-tiny"
    save(trained("qwen3"), path)
    tokenizer = load_tokenizer(path)
    config = transformers.Qwen3Config(
        vocab_size=tokenizer.size + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    network = randomise(transformers.Qwen3ForCausalLM(config).float(), 5)
    kept = {p.name: p.read_bytes() for p in path.iterdir()}
    network.bfloat16().save_pretrained(path)
    for name, content in kept.items():
        (path / name).write_bytes(content)
    write(c__jsonl=passages(300), q__jsonl=questions(1, 2, 3), t__jsonl=questions(4, 5))
    return str(path)


def run(*argv: str) -> int:
    return main([*FIELDS, *argv])


def test_from_a_folder_to_an_adapter(model, lottery, monkeypatch, capsys, folder):
    """Trained with LoRA on bf16 weights, resumed, evaluated, exported, taken up again as --init, read with."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    assert run("--model", model, "--run", "t") == 0, capsys.readouterr().err
    results = json.loads(Path("runs/t/results.json").read_text())
    assert {r["system"] for r in results["long_qa"]} >= {"base", "memtrain", "memagent", "memtrain+memagent"}
    rows = [json.loads(line) for line in Path("runs/t/metrics.jsonl").read_text().splitlines()]
    others = ["memagent", "memtrain+memagent", "mem1", "memtrain+mem1"]
    assert [r["stage"] for r in rows] == ["memtrain"] * 2 + others
    assert rows[1]["kl"] > 0, "the reference stays where it was"
    firsts = [r["kl"] for r in (rows[0], *rows[2:]) if "kl" in r]  # by lottery a step may have no signal, and no update
    assert len(firsts) >= 4 and firsts == pytest.approx([0] * len(firsts), abs=1e-6), "each stage has its own"
    size = Path("runs/t/memtrain/checkpoint.safetensors").stat().st_size
    assert size < Path(model, "model.safetensors").stat().st_size, "adapters only"

    assert run("--model", model, "--run", "t", "--eval-lengths", "1") == 0, "a finished run is evaluated again"
    assert main(["export", "--checkpoint", "runs/t/memtrain", "--format", "peft", "--to", "adapter"]) == 0
    assert main(["export", "--checkpoint", "runs/t/memtrain", "--format", "hf", "--to", "merged"]) == 0
    peft = pytest.importorskip("peft")
    ids = torch.randint(200, (1, 40), generator=torch.Generator().manual_seed(0))
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, "adapter")(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)(ids).logits
    assert (theirs - before).abs().max() > 0.01, "it has learned something"
    torch.testing.assert_close(merged, theirs, atol=0.1, rtol=0.05)  # rounded to bf16 once more
    assert load_tokenizer(Path("merged")).fingerprint == load_tokenizer(Path(model)).fingerprint

    assert run("--model", model, "--run", "u", "--init", "adapter", "--stages", "memtrain",
               "--memtrain-steps", "1") == 0
    (row,) = (json.loads(line) for line in Path("runs/u/metrics.jsonl").read_text().splitlines())
    assert row["kl"] == pytest.approx(0, abs=1e-6), "the adapter that a stage starts from is its reference"
    Path("text.txt").write_text("Paris and the Seine in 1803, by Victor Hugo.\n" * 40)
    capsys.readouterr()
    assert main(["read", "text.txt", "--question", "Who?", "--checkpoint", "runs/t/memtrain", "--device", "cpu"]) == 0
    assert "section 2" in (shown := capsys.readouterr().out) and "answer:" in shown


def test_adapters_stay_with_their_base(model, monkeypatch, capsys):
    """The folder of --model holds other weights of the same shape by now."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    assert run("--model", model, "--run", "t", "--stages", "memtrain", "--memtrain-steps", "1") == 0
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kept = {p.name: p.read_bytes() for p in Path(model).iterdir() if "token" in p.name}
    randomise(network, 6).bfloat16().save_pretrained(model)
    for name, content in kept.items():
        Path(model, name).write_bytes(content)
    capsys.readouterr()
    assert run("--model", model, "--run", "t", "--stages", "memtrain,eval", "--memtrain-steps", "1") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "adapters of base" in line and "--model" in line


def test_a_hub_out_of_reach_names_the_local_alternative(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("--model", "owner/no-such-model", "--run", "t") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "owner/no-such-model" in line and "folder" in line and not Path("runs").exists()
