"""The benchmark's two sides compute the same thing: tokens, loss, every gradient. Else its times mean nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import memtrain
from eval.bench import kernels as bench_kernels
from eval.bench import main as bench
from eval.bench import peers as bench_peers
from eval.bench import plain
from eval.bench import table as bench_table
from eval.bench import threads as bench_threads
from kernels.grpo import linear_grpo_loss

TINY = ["--width", "32", "--layers", "2", "--heads", "2", "--key-heads", "1", "--head-size", "16", "--hidden", "48",
        "--people", "60", "--passages", "4", "--related", "2", "--section", "48", "--memory", "8", "--response", "10",
        "--window", "128", "--result", "24", "--act", "12", "--documents", "2", "--group", "3", "--recall-group", "2",
        "--eval-questions", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def data():
    c = memtrain.parse([*TINY, "--update-documents", "2"])
    return memtrain.Data(c, memtrain.load_tokenizer())


def pair_of(data, *fields) -> bench.Pair:
    """Random weights, none of them zero, and a head with clear favourites, the stop token now and then among them."""
    c = memtrain.parse([*TINY, "--update-documents", "2", *fields])
    model, generator = memtrain.Decoder(c, data.tokenizer.size), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
        model.head.mul_(0.5 if c.tied else 5)
        model.head[data.tokenizer.end] *= 3
    return bench.Pair(c, model, data.tokenizer, data, train_rows=5, sample_rows=4)


def sampled(pair, agent) -> memtrain.Batch:
    batch = pair.sample(agent, 3)
    batch.rewards = [float(e % 3 == 0) + 0.5 * (e % 2) for e in range(len(batch.rewards))]
    return batch


@pytest.mark.parametrize("fields", [
    (), ("--prompt-order", "paper", "--temperature", "0.7"), ("--top-p", "0.8"), ("--sample-rows", "7")])
def test_both_sides_sample_the_same(data, fields):
    pair = pair_of(data, *fields)
    mine, other = sampled(pair, pair.agent), sampled(pair, pair.plain_agent)
    assert [t.sampled for t in mine.turns] == [t.sampled for t in other.turns]
    assert [(t.prefix, t.given) for t in mine.turns] == [(t.prefix, t.given) for t in other.turns]
    same = bench.same_tokens(mine, other)
    assert same["share"] == 1 and same["logprob"] < 1e-5
    lengths = {len(t.sampled) for t in mine.turns}
    assert len(lengths) > 2  # ragged: rows finished at different times


@pytest.mark.parametrize("fields", [
    (), ("--kl", "0.5", "--temperature", "0.7"), ("--kl", "0", "--divide-by-std"),
    ("--prompt-order", "paper", "--micro-tokens", "300"), ("--tied",),
    ("--kl", "0.5", "--lora-rank", "2")])
def test_both_sides_have_one_loss_and_one_gradient(data, fields):
    pair = pair_of(data, *fields)
    batch = sampled(pair, pair.agent)
    entries = {e for e, g in enumerate(batch.group) if g != 1}  # a part of the groups, as after the filter
    for moved in (False, True):
        if moved:
            pair.shift()
        found = bench.deviation(pair.ours(batch, entries), pair.plain(batch, entries))
        assert found["loss"] < 1e-5 and found["gradient"] < 1e-5, (moved, found)


def test_the_shift_leaves_the_clip_range(data):
    """Away from ratio 1 the clip and the KL term are in the gradient, or the test above would not see them."""
    pair = pair_of(data, "--kl", "0.1")
    batch = sampled(pair, pair.agent)
    everything = set(batch.entry)
    pair.shift()
    exact = pair.plain(batch, everything)
    for wrong in ({"eps_low": 0.0, "eps_high": 0.0}, {"kl": 0.0}, {"temperature": 1.001}):
        pair.c, right = replace(pair.c, **wrong), pair.c
        assert bench.deviation(pair.plain(batch, everything), exact)["gradient"] > 1e-4, wrong
        pair.c = right
    batch.rewards[0] += 1e-3
    assert bench.deviation(pair.plain(batch, everything), exact)["gradient"] > 1e-5


def test_recomputed_is_recorded(data):
    """The plain side against itself: log-probs recorded with the cache are those of whole padded rows."""
    pair = pair_of(data)
    turns = sampled(pair, pair.plain_agent).turns
    ids, mask, old = plain.padded(turns, "cpu")
    with torch.no_grad():
        new = plain.logprobs_of(pair.model, ids, 1.0)
    assert mask.sum() == sum(len(t.sampled) for t in turns)
    torch.testing.assert_close(new * mask, old, atol=1e-5, rtol=0)


def test_step_command(tmp_path, capsys):
    out = tmp_path / "step.json"
    assert bench.main(["step", *TINY, "--repeats", "1", "--plain-train-rows", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["environment"]["command"].startswith("python -m eval.bench step --width 32")
    assert result["config"]["documents"] == result["config"]["update_documents"] == result["documents"] == 2
    assert result["weights"] == "random" and result["coin_rewards"] and result["same_tokens"]["share"] > 0.98
    ours, other = result["sides"]["ours"], result["sides"]["plain"]
    for side in result["sides"].values():
        for cost in side.values():
            assert len(cost["seconds"]) == 1 and min(cost["seconds"]) > 0 and cost["tokens"] > 0
            assert cost["peak_mb"] > 0 and min(cost["speedup"]) > 0
            assert f"{cost['tokens']:,d}" in printed
    assert ours["total"]["tokens"] == ours["sampling"]["tokens"] + ours["training"]["tokens"]
    assert other["total"]["tokens"] > 1.5 * ours["total"]["tokens"]  # prompts recomputed, rows padded
    assert "DIFFERENT" not in printed and printed.count("  ok") == 2


def test_a_deviation_is_reported(data):
    result = {"same_tokens": {"share": 1.0}, "deviation": {"as sampled": {"loss": 0.0, "gradient": 2e-5}}}
    assert not bench.agree(result)
    result["deviation"]["as sampled"]["gradient"] = float("nan")
    assert not bench.agree(result)
    result["deviation"]["as sampled"]["gradient"] = 9e-6
    assert bench.agree(result)
    result["same_tokens"]["share"] = 0.5
    assert not bench.agree(result)
    good, bad = {"p": torch.ones(3)}, {"p": torch.tensor([1.0, 1.0, float("nan")])}
    assert not bench.deviation((0.0, bad), (0.0, good))["gradient"] <= 1e-5


SEEN = """
import os, runpy, sys
sys.path.insert(0, sys.argv[1])

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch())
program, sys.argv = sys.argv[2], ["x", "kernels"] if sys.argv[2] == "eval.bench" else ["x", "--stages", "eval"]
run = runpy.run_path if program.endswith(".py") else runpy.run_module
run(program, run_name="__main__")
"""


@pytest.mark.parametrize("program", ["memtrain.py", "eval.bench"])
@pytest.mark.parametrize(("chosen", "seen"), [
    ({}, f"{bench_threads.SPINS} None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")])
def test_threads_wait_briefly_unless_the_user_chose(program, chosen, seen):
    """As it is when torch is loaded: afterwards OpenMP does not look again."""
    root = Path(memtrain.__file__).parent
    environment = {k: v for k, v in os.environ.items() if k not in bench_threads.CHOSEN} | chosen
    done = subprocess.run([sys.executable, "-c", SEEN, str(root), program], cwd=root, env=environment,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split("\n")[0] == seen, done.stderr


STAND_IN = """
import json, os, pathlib, sys, time
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
while time.process_time() < 0.2:
    pass
folder = pathlib.Path("runs", option["--run"])
folder.mkdir(parents=True)
waiting = os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")
rows = [{"stage": "memtrain", "seconds": 0.5, "waiting": waiting}] * int(option["--memtrain-steps"])
folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in [{"stage": "base"}, *rows]))
print(option["--processes"], option["--threads"], waiting, file=open(option["--init"], "a"))
"""


def test_threads_command(tmp_path, monkeypatch):
    """Every way alone and beside a busy process, whatever is set here; one that takes too long is given up, and both
    processes end."""
    program, out, log = tmp_path / "stand_in.py", tmp_path / "threads.json", tmp_path / "log"
    program.write_text(STAND_IN)
    monkeypatch.setattr(bench_threads, "PROGRAM", program)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert bench.main(["threads", "--init", str(log), "--steps", "3", "--threads", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [r["beside"] for r in rows] == [False] * 5 + [True] * 5 and len({r["way"] for r in rows}) == 5
    assert all(r["seconds"] == 1.5 and r["cpu_seconds"] > 0.2 for r in rows)
    assert log.read_text().splitlines() == 2 * [
        "1 1 (None, None, None)", "1 2 ('300000', None, None)", "1 2 (None, None, None)", "1 2 (None, 'PASSIVE', None)",
        "2 1 (None, None, None)"]
    program.write_text("import time; time.sleep(60)")
    started = []
    monkeypatch.setattr(bench_threads.subprocess, "Popen", lambda *a, make=subprocess.Popen, **k: started.append(
        make(*a, **k)) or started[-1])
    row = bench_threads.measure([], "slow", 1, 1, {}, 1, 0.2, True)
    assert row["seconds"] is None and len(started) == 2 and all(p.poll() is not None for p in started)
    assert "> 0" in bench_threads.table([row], 0.2)
    program.write_text("raise SystemExit('no such thing')")
    with pytest.raises(memtrain.InputError, match="slow: no such thing"):
        bench_threads.measure([], "slow", 1, 1, {}, 1, 30, False)


def test_documents_command(tmp_path, capsys):
    out = tmp_path / "documents.json"
    argv = ["documents", "--people", "60", "--passages", "20", "--related", "5", "--repeats", "11", "--out", str(out)]
    assert bench.main(argv) == 0
    rows = json.loads(out.read_text())["documents"]
    assert len(rows) == 11 and all(r["ms"] > 0 and r["passages"] == 20 and 200 < r["tokens"] < 1280 for r in rows)
    tokens = sorted(r["tokens"] for r in rows)
    line = next(t for t in capsys.readouterr().out.splitlines() if t.startswith("tokens"))
    assert [int(v.replace(",", "")) for v in line.split()[1:]] == [tokens[k] for k in (0, 5, 9, 10)]


@pytest.mark.parametrize(("argv", "says"), [
    (["speed"], "speed: unknown benchmark; choose one of step, kernels, compile, sample, trl, documents, "
     "threads, length"),
    (["step", "--repeats", "0"], "--repeats 0: must be at least 1"),
    (["step", "--repeats", "x"], "--repeats"), (["step", "--grup", "4"], "--grup"),
    (["step", "--group", "1"], "--group 1"), (["step", "--update-documents", "2"], "leave it out"),
    (["step", "--update_documents=2"], "leave it out"), (["step", "--documents", "0"], "--documents 0"),
    (["step", "--seeds", "0,1"], "--seeds: the benchmark chooses it"),
    (["step", "--init", "nowhere.safetensors"], "nowhere.safetensors"),
    (["step", "--out", "nowhere/x.json"], "--out nowhere/x.json"),
    (["documents", "--tokenizer", "no.tiktoken"], "no.tiktoken"), (["documents", "--repeats", "0"], "--repeats 0"),
    (["documents", "--corpus", "none.txt"], "none.txt"), (["documents", "--related", "99"], "--related 99"),
    (["sample", "--shape", "7b"], "--shape 7b: choose tiny or 0.6b"), (["sample", "--response", "0"], "--response 0"),
    (["sample", "--device", "tpu"], "--device"), (["sample", "--lora-rank", "4"], "--lora-rank: unknown option"),
    (["sample", "--vocabulary", "9"], "--vocabulary 9"), (["trl", "--lora-rank", "-1"], "--lora-rank -1"),
    (["trl", "--trl-batch", "0"], "--trl-batch 0"), (["trl", "--trl-batch", "3"], "--trl-batch 3: must divide"),
    (["trl", "--group", "1"], "--group 1"), (["trl", "--groups", "0"], "--groups 0"),
    (["threads", "--steps", "0"], "--steps 0"), (["threads", "--device", "cuda"], "--device: the benchmark chooses"),
    (["threads", "--preset", "huge"], "--preset huge")])
def test_bad_arguments(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_peers_of_the_kernels_compute_the_same():
    """A benchmark of unlike things says nothing: every peer agrees with the product at a small shape."""
    cpu, f = torch.device("cpu"), torch.float32
    made = [bench_kernels.logprob_case(cpu, f, 20, 8, 50, False), bench_kernels.loss_case(cpu, 16, 5, False),
            bench_kernels.head_and_loss_case(cpu, f, 16, 5, 8, 50),
            bench_kernels.attention_case(cpu, f, 2, 7, 3, (2, 5), 4, 2, 8),
            bench_kernels.decode_case(cpu, f, 2, 7, 3, 4, 4, 2, 8),
            *(bench_kernels.fused_case(cpu, f, name, 5, 8, 4, 2, 8, False) for name in ("add_norm", "norm_rope",
                                                                                        "swiglu"))]
    rows = [r for case in made for r in bench_kernels.measure(case, cpu, 2, (1e9, 1e9))]
    assert len(rows) == 17 and all(r.deviation < 1e-4 for r in rows), rows
    assert all(0 < r.fastest <= r.seconds <= r.slowest and r.compute_share + r.copy_share > 0 for r in rows)
    text = bench_kernels.table(rows, {"float32": (1e9, 1e9)})
    assert all(r.by in text for r in rows) and text.count("memtrain") == 8


def test_kernel_benchmarks_refuse_what_they_do_not_know(capsys):
    for arguments in (["kernels", "--speed", "1"], ["kernels", "--repeats", "0"], ["compile", "--card", "H100"]):
        assert bench.main(arguments) == 2
        assert capsys.readouterr().err.startswith("bench: --")


def test_a_longer_document_takes_no_more_memory_and_time_by_its_length(tmp_path, capsys):
    """Each length in a process of its own; the bound on time is a wide one, for a machine with others at work."""
    out = tmp_path / "length.json"
    assert bench.main(["length", *TINY, "--update-documents", "2", "--people", "400", "--eval-questions", "8",
                       "--eval-lengths", "4,64", "--read-mb", "0.1,0.4", "--out", str(out)]) == 0
    one, four = json.loads(out.read_text())["read"]
    assert four["sections"] > 3.5 * one["sections"] > 40 and four["peak_mb"] < 1.03 * one["peak_mb"]
    short, long = json.loads(out.read_text())["evaluation"]
    assert long["sections"] > 12 * short["sections"] and long["peak_mb"] < 1.05 * short["peak_mb"]
    assert 0.5 < long["seconds"] / long["tokens"] / (short["seconds"] / short["tokens"]) < 2
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "+0.0%" in table["4"] and table["64"].count("%") == 2


# ---- sample, trl

FEW = ["--repeats", "1", "--threads", "1", "--vocabulary", "1024", "--group", "4", "--prompt", "20", "--response", "5"]


def test_sample_command(tmp_path, capsys):
    pytest.importorskip("transformers")
    out = tmp_path / "sample.json"
    assert bench.main(["sample", *FEW, "--groups", "3", "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "vocabulary 1,024" in printed and printed.count("  ok") == 1 and "DIFFERENT" not in printed
    assert result["same"]["greedy"] == 1 and result["same"]["logprob"] < 1e-4
    for name, side in result["sides"].items():
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert f"{side['tokens_per_s']:,.0f}" in row and len(side["seconds"]) == 1
        assert side["tokens_per_s"] == pytest.approx(3 * 4 * 5 / side["seconds"][0])
        assert side["bandwidth_share"] > 0 and side["seconds_first_token"][0] > 0
    # 3.4 M parameters in fp32; per key 2 (k, v) x 4 layers x 4 heads x 32: 3 prompts once, 12 rows' own
    assert result["bytes_per_step"] == pytest.approx(4 * (3_411_968 + 1024 * (3 * 19 + 12 * 3.5)), rel=1e-3)


def test_another_policy_is_found(tmp_path):
    """Weights that differ a little: the log-probs tell, or the benchmark would time unlike things."""
    pytest.importorskip("transformers")
    shape, cpu = bench_peers.SHAPES["tiny"] | {"vocab_size": 1024}, torch.device("cpu")
    bench_peers.save_checkpoint(tmp_path, shape)
    ours, theirs = (load(tmp_path, cpu, torch.float32) for load in (bench_peers.load_ours, bench_peers.load_theirs))
    prompts = bench_peers.make_prompts(2, 20, 1024, 1)
    assert bench_peers.same_sampling({"same": bench_peers.same_policy(ours, theirs, prompts)})
    with torch.no_grad():
        ours.blocks[1].q_norm.weight *= 1.05
    assert not bench_peers.same_sampling({"same": bench_peers.same_policy(ours, theirs, prompts)})


@pytest.mark.parametrize("rank", [0, 2])
def test_trl_command(rank, tmp_path, capsys):
    for library in ("transformers", "trl", "peft", "datasets"):
        pytest.importorskip(library)
    out = tmp_path / "trl.json"
    argv = ["trl", *FEW, "--trl-batch", "2", "--lora-rank", str(rank), "--out", str(out)]
    assert bench.main(argv) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.count("  ok") == 1 and ("LoRA of rank 2" if rank else "all weights") in printed
    assert result["same"]["gradient_differs"] < 1e-4 and result["same"]["worst_parameter_differs"] < 1e-3
    assert abs(result["same"]["loss"]) > 1e-3  # at ratio 1 it would be zero whatever the formula
    for name, side in result["sides"].items():
        row = next(line for line in printed.splitlines() if line.startswith(name))
        assert f"{side['seconds'][0]:.3f}" in row and 0 < side["seconds_sampling"][0] < side["seconds"][0]
        assert side["tokens_sampled"] == [2 * 4 * 5] and side["peak_mb"] > 10


def test_another_objective_is_found(tmp_path, monkeypatch):
    """A clip range that is not TRL's shows in the check of the loss."""
    for library in ("transformers", "trl"):
        pytest.importorskip(library)
    options = SimpleNamespace(shape="tiny", vocabulary=1024, group=4, groups=2, prompt=20, response=5, repeats=1,
                              lora_rank=0, trl_batch=8)
    monkeypatch.setattr(memtrain, "linear_grpo_loss", lambda *a: linear_grpo_loss(*a[:10], 0.19, *a[11:]))
    result = bench_peers.run_trl(options, tmp_path, torch.device("cpu"))
    assert not bench_peers.same_step(result) and "DIFFERENT" in bench_peers.trl_table(result)


def test_peers_that_are_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    for name in ("sample", "trl"):
        assert bench.main([name, *FEW]) == 2
        error = capsys.readouterr().err
        assert "transformers is not installed" in error and "pip install -r tests/requirements.txt" in error
        assert error.count("\n") == 1


def kernel(by, seconds, compute, copy, mb):
    return {"operation": "attention", "shape": "D 128", "by": by, "seconds": seconds, "compute_share": compute,
            "copy_share": copy, "extra_mb": mb}


def test_all_in_one_table():
    sides = {"memtrain": {"seconds": [2.0, 1.0, 4.0], "peak_mb": 20_000}, "TRL": {"seconds": [9.0], "peak_mb": 50_000}}
    where = {"device": "H100", "date": "today", "threads": 1, "torch": "2", "commit": "abc"}
    found = {"kernels": {"environment": where,
                         "rows": [kernel("memtrain", 0.002, 0.5, 0.1, 7), kernel("SDPA", 0.001, 0.9, 0.1, 70),
                                  kernel("FlexAttention", 0.003, 0.4, 0.1, 7)]},
             "sample": "exit 2: no | transformers", "trl": {"model": "tiny", "sides": sides}}
    text = bench_table.table(found)
    rows = {line.split(" | ")[2]: line for line in text.splitlines() if line.startswith("| att")}
    assert rows["SDPA"] == "| attention: D 128 | 2.00 | SDPA | 1.00 | 0.50x | 50% | 7 | 70 |  |"
    assert "1.50x" in rows["FlexAttention"] and "1.2 times as fast: met" in rows["FlexAttention"]
    assert "**failed**, exit 2: no   transformers" in text
    assert "| 2,000.00 | TRL | 9,000.00 | 4.50x |  | 20,000 | 50,000 | 5 times as fast, 24 GB: missed |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {10}


def test_all_command(tmp_path, monkeypatch, capsys):
    """One that fails stops no other; its line says why, and so does the exit code."""
    wanted = {"sample": ["--repeats", "0"], "step": [*TINY, "--device", "cpu", "--repeats", "1"]}
    monkeypatch.setattr(bench_table, "commands", lambda *_: wanted)
    assert bench.main(["all", "--to", str(tmp_path / "there")]) == 1
    text = (tmp_path / "there" / "table.md").read_text()
    assert "| sample: **failed**, exit 2: bench: --repeats 0: must be at least 1 |" in text
    assert {line.split(" | ")[2] for line in text.splitlines() if line.startswith("| step")} >= {"plain"}
    assert json.loads((tmp_path / "there" / "step.json").read_text())["sides"] and text in capsys.readouterr().out
    assert bench.main(["all", "--to", "memtrain.py"]) == 2 and "source of memtrain" in capsys.readouterr().err
