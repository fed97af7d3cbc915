"""The benchmark's two sides compute the same thing: tokens, loss, every gradient. Else its times mean nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memtrain
from eval.bench import kernels as bench_kernels
from eval.bench import main as bench
from eval.bench import peers as bench_peers
from eval.bench import plain
from eval.bench import step as bench_step
from eval.bench import threads as bench_threads
from eval.bench.measure import Figures, Row, table
from kernels.grpo import linear_grpo_loss

CPU = torch.device("cpu")
TINY = ["--width", "32", "--layers", "2", "--heads", "2", "--key-heads", "1", "--head-size", "16", "--hidden", "48",
        "--people", "60", "--passages", "4", "--related", "2", "--section", "48", "--memory", "8", "--response", "10",
        "--window", "128", "--result", "24", "--act", "12", "--documents", "2", "--group", "3", "--recall-group", "2",
        "--eval-questions", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def data():
    c = memtrain.parse([*TINY, "--update-documents", "2"])
    return memtrain.Data(c, memtrain.load_tokenizer())


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Of the plain side: batches of several sizes."""
    monkeypatch.setattr(plain, "TRAIN_ROWS", 5)
    monkeypatch.setattr(plain, "SAMPLE_ROWS", 4)


def pair_of(data, *fields) -> bench_step.Pair:
    """Random weights, none of them zero, and a head with clear favourites, the stop token now and then among them."""
    c = memtrain.parse([*TINY, "--update-documents", "2", *fields])
    model, generator = memtrain.Decoder(c, data.tokenizer.size), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
        model.head.mul_(0.5 if c.tied else 5)
        model.head[data.tokenizer.end] *= 3
    return bench_step.Pair(c, model, data.tokenizer, data)


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
    same = bench_step.same_tokens(mine, other)
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
        found = bench_step.deviation(pair.ours(batch, entries), pair.plain(batch, entries))
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
        assert bench_step.deviation(pair.plain(batch, everything), exact)["gradient"] > 1e-4, wrong
        pair.c = right
    batch.rewards[0] += 1e-3
    assert bench_step.deviation(pair.plain(batch, everything), exact)["gradient"] > 1e-5


def test_recomputed_is_recorded(data):
    """The plain side against itself: log-probs recorded with the cache are those of whole padded rows."""
    pair = pair_of(data)
    turns = sampled(pair, pair.plain_agent).turns
    ids, mask, old = plain.padded(turns, "cpu")
    with torch.no_grad():
        new = plain.logprobs_of(pair.model, ids, 1.0)
    assert mask.sum() == sum(len(t.sampled) for t in turns)
    torch.testing.assert_close(new * mask, old, atol=1e-5, rtol=0)


def rows_of(figures: dict, what: str) -> dict[str, dict]:
    return {row["by"]: row for row in figures["rows"] if row["what"].startswith(what)}


def test_step_command(tmp_path, capsys, data):
    out, base = tmp_path / "step.json", tmp_path / "base.safetensors"
    c = memtrain.parse([*TINY, "--update-documents", "2"])
    memtrain.save_checkpoint(base, memtrain.Decoder(c, data.tokenizer.size), data.tokenizer, {"step": 1, "done": True})
    assert bench.main(["step", *TINY, "--init", str(base), "--repeats", "1", "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert result["environment"]["command"].startswith("python -m eval.bench step --width 32")
    assert result["config"]["documents"] == result["config"]["update_documents"] == 2
    assert result["weights"] == str(base) and result["coin_rewards"] and result["same_tokens"]["share"] > 0.98
    whole, parts = rows_of(result, "step: both"), (rows_of(result, "step: sampling"), rows_of(result, "step: training"))
    assert list(whole) == ["memtrain", "plain", "plain, groups without signal left out"]
    for by in ("memtrain", "plain"):
        assert whole[by]["seconds"] == [sum(part[by]["seconds"][0] for part in parts)] and whole[by]["mb"] >= 0
        assert f"| step: both | {by} | {1e3 * whole[by]['seconds'][0]:,.2f} |" in printed
    assert "in fp64: ok" in printed


def test_a_deviation_is_reported():
    result = {"same_tokens": {"share": 1.0}, "deviation": {"as sampled": {"loss": 0.0, "gradient": 2e-5}}}
    assert not bench_step.agree(result)
    result["deviation"]["as sampled"]["gradient"] = float("nan")
    assert not bench_step.agree(result)
    result["deviation"]["as sampled"]["gradient"] = 9e-6
    assert bench_step.agree(result)
    result["same_tokens"]["share"] = 0.5
    assert not bench_step.agree(result)
    good, bad = {"p": torch.ones(3)}, {"p": torch.tensor([1.0, 1.0, float("nan")])}
    assert not bench_step.deviation((0.0, bad), (0.0, good))["gradient"] <= 1e-5


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
    assert all(r["seconds"] == 1.5 for r in rows)
    assert log.read_text().splitlines() == 2 * [
        "1 1 (None, None, None)", "1 2 ('300000', None, None)", "1 2 (None, None, None)", "1 2 (None, 'PASSIVE', None)",
        "2 1 (None, None, None)"]
    program.write_text("import time; time.sleep(60)")
    started = []
    monkeypatch.setattr(bench_threads.subprocess, "Popen", lambda *a, make=subprocess.Popen, **k: started.append(
        make(*a, **k)) or started[-1])
    row = bench_threads.measure([], "slow", 1, 1, {}, 1, 0.2, True)
    assert row["seconds"] is None and len(started) == 2 and all(p.poll() is not None for p in started)
    program.write_text("raise SystemExit('no such thing')")
    with pytest.raises(memtrain.InputError, match="slow: no such thing"):
        bench_threads.measure([], "slow", 1, 1, {}, 1, 30, False)


@pytest.mark.parametrize(("argv", "says"), [
    (["speed"], "speed: unknown benchmark; choose one of step, kernels, compile, sample, trl, threads, all, "),
    (["step", "--repeats", "0"], "--repeats 0: must be at least 1"),
    (["step", "--repeats", "x"], "--repeats"), (["step", "--grup", "4"], "--grup"),
    (["step", "--group", "1"], "--group 1"), (["step", "--update-documents", "2"], "leave it out"),
    (["step", "--update_documents=2"], "leave it out"), (["step", "--documents", "0"], "--documents 0"),
    (["step", "--seeds", "0,1"], "--seeds: the benchmark chooses it"),
    (["step", "--init", "nowhere.safetensors"], "nowhere.safetensors"), (["step", "--width", "64"], "base.safetensors"),
    (["step", "--out", "."], "--out .: a folder"), (["all"], "--to"),
    (["sample", "--shape", "7b"], "--shape"), (["sample", "--response", "-1"], "--response -1"),
    (["sample", "--device", "tpu"], "--device"), (["sample", "--lora-rank", "4"], "--lora-rank: unknown option"),
    (["trl", "--lora-rank", "-1"], "--lora-rank -1"), (["trl", "--group", "1"], "--group 1"),
    (["trl", "--groups", "0"], "--groups 0"), (["trl", "--group", "3"], "a multiple of 8"),
    (["threads", "--steps", "0"], "--steps 0"), (["threads", "--run", "x"], "--run: the benchmark chooses")])
def test_bad_arguments(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and says in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def cases() -> list[bench_kernels.Case]:
    f = torch.float32
    return [bench_kernels.logprob_case(CPU, f, 20, 8, 50, True), bench_kernels.loss_case(CPU, 16, 5),
            bench_kernels.head_and_loss_case(CPU, f, 16, 5, 8, 50),
            bench_kernels.head_and_loss_case(CPU, f, 16, 5, 8, 50, False),
            bench_kernels.attention_case(CPU, f, 2, 7, 3, (2, 5), 4, 2, 8),
            bench_kernels.decode_case(CPU, f, 2, 7, 3, 4, 4, 2, 8), bench_kernels.draw_case(CPU, 5, 40, 0.9),
            *(bench_kernels.fused_case(CPU, f, name, 5, 8, 4, 2, 8) for name in ("add_norm", "norm_rope", "swiglu"))]


def test_peers_of_the_kernels_compute_the_same(monkeypatch, tmp_path, capsys):
    """A benchmark of unlike things says nothing: every peer agrees with ours at a small shape, and ours with fp64."""
    made, out = cases(), tmp_path / "kernels.json"
    for case in made:
        true = case.run("memtrain")
        off = {by: bench_kernels.errors(case.run(by), true) for by in case.peers}
        assert len(off) >= 2 and all(e < 1e-4 for found in off.values() for e in found.values()), (case.name, off)
        exact = bench_kernels.errors(true, case.run("memtrain", torch.float64))
        assert exact.keys() == true.keys() and max(exact.values()) < 1e-5, (case.name, exact)
    monkeypatch.setattr(bench_kernels, "cases", lambda device: [lambda case=case: case for case in made])
    assert bench.main(["kernels", "--repeats", "2", "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == sum(len(case.peers) for case in made) and all(r["ceiling"] > 0 for r in rows)
    assert sum("differs by" in line for line in capsys.readouterr().out.splitlines()) == len(rows) - len(made)


@pytest.mark.parametrize("which", range(10))
def test_a_wrong_kernel_is_found(which, monkeypatch):
    case = cases()[which]
    ours = case.peers["memtrain"]

    def wrong(*leaves):
        out = ours(*leaves)
        return tuple(1.01 * x for x in out) if isinstance(out, tuple) else out + 1 if out.dtype == torch.int64 else (
            1.01 * out)

    exact = case.run("memtrain", torch.float64)
    case.peers["memtrain"] = wrong
    assert max(bench_kernels.errors(case.run("memtrain"), exact).values()) > 1e-4
    assert not bench_kernels.errors({"o": torch.tensor([float("nan"), 1.0])}, {"o": torch.ones(2)})["o"] <= 1.0


# ---- sample, trl

FEW = ["--repeats", "1", "--threads", "1", "--group", "4", "--prompt", "20", "--response", "5", "--device", "cpu"]


@pytest.fixture
def few_words(monkeypatch):
    monkeypatch.setitem(bench_peers.SHAPES, "tiny", bench_peers.SHAPES["tiny"] | {"vocab_size": 1024})


def test_sample_command(tmp_path, capsys, few_words):
    pytest.importorskip("transformers")
    out = tmp_path / "sample.json"
    assert bench.main(["sample", *FEW, "--groups", "3", "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.count("  ok") == 1 and "DIFFERENT" not in printed
    assert result["same"]["greedy"] == 1 and result["same"]["logprob"] < 1e-4
    rows = rows_of(result, "sample: ")
    assert list(rows) == ["memtrain", "transformers generate"]
    for row in rows.values():
        assert f"{3 * 4 * 5 / row['seconds'][0]:,.0f} tokens/s" in printed and row["ceiling"] > 0
    assert len(rows_of(result, "first token alone")) == 2


def test_what_a_decoding_step_must_read(tmp_path, few_words):
    """3.4 M parameters in fp32; per key 2 (k, v) x 4 layers x 4 heads x 32: 3 prompts once, 12 rows' own."""
    pytest.importorskip("transformers")
    bench_peers.save_checkpoint(tmp_path, bench_peers.SHAPES["tiny"])
    model = bench_peers.load_ours(tmp_path, CPU, torch.float32)
    assert bench_peers.step_bytes(model, 3, 12, 20, 5) == pytest.approx(
        4 * (3_411_968 + 1024 * (3 * 19 + 12 * 3.5)), rel=1e-3)


def test_another_policy_is_found(tmp_path, few_words):
    """Weights that differ a little: the log-probs tell, or the benchmark would time unlike things."""
    pytest.importorskip("transformers")
    bench_peers.save_checkpoint(tmp_path, bench_peers.SHAPES["tiny"])
    ours, theirs = (load(tmp_path, CPU, torch.float32) for load in (bench_peers.load_ours, bench_peers.load_theirs))
    prompts = bench_peers.make_prompts(2, 20, 1024, 1)
    assert bench_peers.is_same_policy(bench_peers.same_policy(ours, theirs, prompts), CPU)
    with torch.no_grad():
        ours.blocks[1].q_norm.weight *= 1.05
    assert not bench_peers.is_same_policy(bench_peers.same_policy(ours, theirs, prompts), CPU)


@pytest.mark.parametrize("rank", [0, 2])
def test_trl_command(rank, tmp_path, capsys, few_words):
    for library in ("transformers", "trl", "peft", "datasets"):
        pytest.importorskip(library)
    out = tmp_path / "trl.json"
    assert bench.main(["trl", *FEW, "--lora-rank", str(rank), "--out", str(out)]) == 0
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.count("  ok") == 1 and f"LoRA rank {rank}" in printed
    assert result["same"]["gradient_differs"] < 1e-4
    assert abs(result["same"]["loss"]) > 1e-3  # at ratio 1 it would be zero whatever the formula
    assert result["tokens_sampled"] == [2 * 2 * 4 * 5] * 2
    rows = rows_of(result, "trl: ")
    assert list(rows) == ["memtrain", "TRL GRPOTrainer"]
    assert all(len(row["seconds"]) == 1 and row["mb"] > 10 for row in rows.values())


def test_another_objective_is_found(tmp_path, monkeypatch, capsys, few_words):
    """A clip range that is not TRL's shows in the check of the loss."""
    for library in ("transformers", "trl"):
        pytest.importorskip(library)
    monkeypatch.setattr(memtrain, "linear_grpo_loss", lambda *a: linear_grpo_loss(*a[:10], 0.19, *a[11:]))
    assert bench.main(["trl", *FEW]) == 1 and "DIFFERENT" in capsys.readouterr().out


def test_peers_that_are_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(bench_peers.importlib.util, "find_spec", lambda name: None)
    for name in ("sample", "trl"):
        assert bench.main([name, *FEW]) == 2
        error = capsys.readouterr().err
        assert "transformers is not installed" in error and "pip install -r tests/requirements.txt" in error
        assert error.count("\n") == 1


# ---- all

def test_the_table():
    rows = [Row("attention: D 128", "memtrain", [0.002, 0.001, 0.004], 7, 0.5), Row("attention: D 128", "SDPA", [0.001],
            70, 0.9, "differs | by"), Row("trl", "memtrain", [1.0], 20_000), Row("trl", "TRL", [4.5], 50_000)]
    lines = table(rows).splitlines()
    assert lines[2] == "| attention: D 128 | memtrain | 2.00 | 1.00 |  | 50% | 7 |  |"
    assert lines[3] == "| attention: D 128 | SDPA | 1.00 | 1.00 | 0.50x | 90% | 70 | differs   by |"
    assert lines[5] == "| trl | TRL | 4,500.00 | 4,500.00 | 4.50x |  | 50,000 |  |"


def test_all_command(tmp_path, monkeypatch, capsys):
    """One that fails stops no other; its line says why, and so does the exit code."""
    def run(command, real=subprocess.run, **how):
        if command[0] != sys.executable:
            return real(command, **how)
        name, out = command[3], Path(command[command.index("--out") + 1])
        if name == "sample":
            return subprocess.CompletedProcess(command, 2, "", "advice\nbench: transformers is not installed")
        figures = Figures(out)
        where = {"device": "cpu", "cpu": "EPYC", "date": "today", "threads": 1, "torch": "2", "commit": "abc"}
        figures.add_rows([Row(name, "memtrain", [1.0], 1.0), Row(name, "peer", [3.0], 1.0)],
                         environment=where | {"command": " ".join(command)})
        return subprocess.CompletedProcess(command, int(name == "trl"), "", "")

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.main(["all", "--to", str(tmp_path / "there"), "--device", "cpu"]) == 1
    text = (tmp_path / "there" / "table.md").read_text()
    assert "sample **failed**, exit 2: bench: transformers is not installed" in text
    assert "trl **failed**, exit 1: both sides do not compute the same" in text and "EPYC" in text
    assert text.startswith("`python -m eval.bench all --to "), "the command that makes the table"
    assert "| step | peer | 3,000.00 | 3,000.00 | 3.00x |" in text and "| kernels | peer |" in text
    assert text in capsys.readouterr().out
    assert bench.main(["all", "--to", "memtrain.py"]) == 2 and "source of memtrain" in capsys.readouterr().err
