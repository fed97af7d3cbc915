"""A study: which runs it has, and how they are run, interrupted, taken up again and reported.

How it treats its runs is tested with a stand-in for them that does in a second, without torch, what a run does to its
folder; that real runs do the same, with a study of two seeds and one of an arm.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TINY

import eval.report.page
import eval.study
import memtrain
from data.arms import arguments, jobs
from data.config import ABLATIONS, OTHER_BASE, PRESETS, SCALING, Config, ablations, arm_of, check, parse
from eval import plan
from memtrain import main

ROOT = Path(memtrain.__file__).parent
SEED = TINY.index("--seed")
SMALLEST = [*TINY[:SEED], *TINY[SEED + 2:], "--memtrain-steps", "2", "--memagent-steps", "2", "--eval-lengths", "1",
            "--run", "t", "--device", "cpu"]

# ---- which runs


@pytest.mark.parametrize("preset", PRESETS)
def test_every_arm_is_a_run_that_differs_from_the_full_one_alone_in_what_its_name_says(preset):
    full = parse(["--preset", preset])
    made = ablations(vars(full))
    own = {"settled": preset != "nano", "kl": full.kl == 1e-3}  # what a preset has no budgets for, or is itself
    assert ABLATIONS.keys() - made.keys() == {name for name, holds in own.items() if holds}
    for name, change in made.items():
        arm = dataclasses.replace(full, **change)
        check(arm)
        assert arm != full and arm_of(vars(full), vars(arm) | {"seed": 9, "run": "x", "init": "y"}) == name
        assert parse(arguments(arm)) == arm
    assert arm_of(vars(full), vars(full)) == "full"
    assert arm_of(vars(full), vars(full) | {"lr": 0.5, "group": 4}) == "group=4, lr=0.5"
    assert arm_of(vars(full), vars(full) | {"old": 1}) == "old=1", "what one of the two has alone counts, too"
    assert arm_of(vars(full) | {"old": 1}, vars(full)) == "old=None"


@pytest.mark.parametrize("preset", PRESETS)
def test_arms_scale_the_memory_with_all_that_depends_on_it(preset):
    full = parse(["--preset", preset])
    for name, factor in (("memory-half", 0.5), ("memory-double", 2.0)):
        c = dataclasses.replace(full, **ablations(vars(full))[name])
        assert c.memory == pytest.approx(factor * full.memory, abs=0.51) and c.section == full.section
        assert c.response - c.memory == full.response - full.memory
        assert c.window - c.section - c.memory - c.response == full.window - full.section - full.memory - full.response


def test_the_runs_of_a_study():
    made = jobs(parse(["--seeds", "0,2", "--ablations", "--scaling"]))
    names = [job.run.removeprefix("nano-study.") for job in made]
    arms = [name for name in ABLATIONS if name not in SCALING] + list(SCALING)
    assert names[:2] == ["s0", "s2"] and {n for n in names if "base" not in n} == {
        "s0", "s2", *(f"s{s}.{arm}" for s in (0, 2) for arm in arms)}
    by_name = {job.run.removeprefix("nano-study."): job.config for job in made}
    assert by_name["s2"] == dataclasses.replace(Config(), run="nano-study.s2", seed=2,
                                                stages="memtrain,memagent,mem1,eval")
    assert by_name["s2.decoupled"].recall_weight == 0 and by_name["s2.decoupled"].seed == 2
    for name, c in by_name.items():
        arm = name.partition(".")[2]
        if arm == "longer-memagent":  # twice the 60 + 15 steps of the full run: equal steps and labels on the way
            assert c.stages == "memagent,eval" and c.memagent_steps == 150 and c.keep_steps == "5,38,75"
            assert c.eval_systems == "memagent,memagent@5,memagent@38,memagent@75"
        elif arm == "more-labels":
            assert c.stages == "memtrain,memtrain+memagent,eval" and c.memagent_steps == 75 and c.keep_steps == "5,38"
            assert c.eval_systems == "memtrain+memagent,memtrain+memagent@5,memtrain+memagent@38"
        elif arm == "settled":
            assert (c.memagent_steps, c.mem1_steps) == (30, 20) and c.eval_systems in c.stages
            assert c.stages == "memtrain,memagent,memtrain+memagent,mem1,memtrain+mem1,eval"
        elif name.startswith("s") and arm:
            assert c.stages == "memtrain,memtrain+memagent,eval" and c.eval_systems == (
                "base," * (arm in OTHER_BASE) + "memtrain+memagent")
        long = arm in ("", "end-to-end", "decoupled", *SCALING)
        assert c.eval_lengths == ("1,2,4,8,16,32" if long else "1,2,4,8"), "claims are about long documents"
    assert all(job.config.eval_lengths == "16,64" for job in jobs(parse(["--ablations", "--eval-lengths", "16,64"])))
    assert len(jobs(parse(["--scaling"]))) == 4 and not any(
        "g2-4" in job.run for job in jobs(parse(["--ablations", "--recall-group", "4"]))), "that is the full run"
    assert not any(job.arm == "base" for job in jobs(parse(["--preset", "qwen3-4b", "--ablations"])))


def test_one_base_for_all():
    made = {job.run: job for job in jobs(parse(["--preset", "small", "--seeds", "5,6", "--ablations"]))}
    (base,) = [job for job in made.values() if job.arm == "base"]
    assert base.run == "small-study.base" and base.config.stages == "base" and base.config.seed == 0
    for job in made.values():
        if job.arm != "base":
            assert "base" not in job.config.stages
            assert job.config.init == "runs/small-study.base/base/checkpoint.safetensors"


# ---- bad input

BAD = {
    "--seeds 0,1,0": ["--seeds 0,1,0", "ascending"], "--seeds 1,x": ["--seeds 1,x", "whole numbers"],
    "--seeds 0,-1": ["--seeds 0,-1", "from 0"], "--seeds 1,": ["--seeds 1,"], "--seeds 0.5": ["--seeds 0.5"],
    "--seeds 1 --seed 2": ["--seed 2", "--seeds 1", "one of the two"],
    "--ablations --stages eval": ["--ablations", "memtrain", "--stages eval"],
    "--scaling --stages memtrain,eval": ["--scaling", "memagent"], "--seeds 1,2 --stages report": ["nothing to do"],
    "--ablations --memory 100": ["--response"], "--ablations maybe": ["maybe"],
    "--stages memtrain+memagent": ["memtrain+memagent", "not finished", "runs/t"],
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_refused_and_nothing_written(command, folder, capsys):
    assert main([*SMALLEST, *command.split()]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("memtrain: ")]
    assert len(lines) == 1 and all(part in lines[0] for part in BAD[command]), captured.err
    assert captured.err.count(BAD[command][-1]) == 1  # nor is it said in another line
    assert list(folder.rglob("*")) == []


@pytest.mark.parametrize("command", [["read", "f.txt"], ["export", "--format", "hf", "--to", "d", "--checkpoint", "c"]])
def test_other_commands_are_no_studies(command, folder, capsys):
    assert main([*command, "--seeds", "0,1"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_neither_a_study_nor_a_run_takes_the_others_folder(folder, capsys):
    for name in ("study.json", "config.json"):
        (folder / "runs/t").mkdir(parents=True, exist_ok=True)
        (folder / "runs/t" / name).write_text("{}")
        assert main([*SMALLEST, *["--seeds", "0,1"] * (name == "config.json")]) == 2
        assert "choose another --run" in capsys.readouterr().err
        (folder / "runs/t" / name).unlink()


@pytest.mark.parametrize("book", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "config": {}, "runs": [3]}'])
def test_a_book_that_is_none(book, folder, capsys):
    (folder / "runs/t").mkdir(parents=True)
    (folder / "runs/t/study.json").write_text(book)
    assert main([*SMALLEST, "--seeds", "0,1"]) == 2
    assert "runs/t/study.json" in capsys.readouterr().err
    assert (folder / "runs/t/study.json").read_text() == book and len(list(folder.rglob("*"))) == 3


# ---- how they are run: with a stand-in

STAND_IN = f"""
import dataclasses, json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from data import InputError
from data.config import FREE_FIELDS, Config, parse
from data.run.files import write_json
from data.run.folder import RunFolder
from eval.plan import evaluated, trainings

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
c = parse(sys.argv[1:])
with open("calls", "a") as calls:
    calls.write(f"{{c.run}} {{os.environ.get('CUDA_VISIBLE_DEVICES', '-')}} {{c.threads}} {{c.init}}\\n")
folder = RunFolder(Path("runs") / c.run)
try:
    folder.compare(dataclasses.asdict(c), FREE_FIELDS, dataclasses.asdict(Config()))
    folder.claim(dataclasses.asdict(c))
except InputError as error:
    print(f"memtrain: {{error}}")
    sys.exit(2)
for stage, steps in trainings(c).items():
    log = folder.path / "metrics.jsonl"
    done = log.read_text().count('"' + stage + '"') if log.exists() else 0
    for step in range(done, steps):
        time.sleep(float(os.environ.get("STEP", "0")))
        with log.open("a") as file:
            file.write(json.dumps({{"stage": stage, "step": step}}) + "\\n")
        if Path("broken").exists() and Path("broken").read_text() == c.run:
            print("something of interest\\nmemtrain: the card\\x1b caught fire")
            sys.exit(3)
        if stopped:
            sys.exit(130)
write_json(folder.path / "results.json", {{"long_qa": [
    {{"system": s, "length": 1}} for s in evaluated(c)]}})
"""


@pytest.fixture
def stand_in(folder, monkeypatch):
    """Runs are STAND_IN; the report notes which folders it was given."""
    reports = []

    def write_report(run_dir, others=(), out=None):
        reports.append([p.name for p in (run_dir, *others)])
        (out / "report.md").write_text("# pooled\n")
        return out / "report.md"

    (folder / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(eval.study, "SCRIPT", folder / "stand_in.py")
    monkeypatch.setattr(eval.study, "POLL", 0.02)
    monkeypatch.setattr(eval.report.page, "write_report", write_report)
    return reports


def book(run: str = "t") -> dict:
    return {r["run"]: r for r in json.loads(Path(f"runs/{run}/study.json").read_text())["runs"]}


def calls() -> list[str]:
    return [line.split()[0] for line in Path("calls").read_text().splitlines()]


STUDY = [*SMALLEST, "--seeds", "0,1", "--scaling", "--stages", "base,memtrain,memagent,eval,report"]
RUNS = ["t.base", "t.s0", "t.s1", *(f"t.s{s}.{arm}" for arm in SCALING for s in (0, 1))]


def test_a_study_runs_everything_once_and_reports(stand_in, capsys):
    assert main(STUDY) == 0
    assert sorted(calls()) == sorted(RUNS) and calls()[0] == "t.base", "what starts from it waits for it"
    assert stand_in == [RUNS[1:]]
    out, err = capsys.readouterr()
    assert "# pooled" in out and "report: runs/t/report.md" in out and f"{len(RUNS)} runs" in out
    assert err.count("finished after") == len(RUNS) and "100%" in err and "\x1b" not in out
    made = book()
    assert list(made) == RUNS and all(r["exit_code"] == 0 and r["seconds"] > 0 for r in made.values())
    assert made["t.s1.longer-memagent"]["arm"] == "longer-memagent"
    assert {"--seed=1", "--memagent-steps=8"} <= set(made["t.s1.longer-memagent"]["arguments"])
    assert all(Path(f"runs/{run}/output.log").exists() for run in RUNS)

    assert main(STUDY) == 0 and len(calls()) == len(RUNS) and len(stand_in) == 2, "nothing is left but the report"
    seeds = STUDY.index("--seeds") + 1
    more = [*STUDY[:seeds], "0,1,2", *STUDY[seeds + 1:]]
    assert main(more) == 0 and sorted(calls()[len(RUNS):]) == ["t.s2", *(f"t.s2.{a}" for a in sorted(SCALING))]
    whole = len(RUNS) + 1 + len(SCALING)
    assert main([*more, "--eval-lengths", "1,2"]) == 0 and len(calls()) == 2 * whole, "all evaluate more"
    capsys.readouterr()
    assert main([*more, "--lr", "0.5"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memtrain: ")]
    assert "was started with lr=0.0003, now 0.5" in line and len(calls()) == 2 * whole + 1, "a run's words, once"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_goes_on_where_it_stopped(number, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("STEP", "0.4")
    waiter = threading.Thread(target=interrupt_when, args=(number, "runs/t.s0/metrics.jsonl"))
    waiter.start()
    assert main(STUDY) == 130
    waiter.join()
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("stopped; continue with: python memtrain.py ") and "--scaling" in err
    assert "failed" not in err and stand_in == [] and not Path("runs/t/report.md").exists()
    made = book()
    assert made["t.base"]["exit_code"] == 0 and made["t.s0"]["exit_code"] == 130
    before = {path: path.read_text() for path in Path("runs").glob("t.*/metrics.jsonl")}
    monkeypatch.setenv("STEP", "0")
    assert main(STUDY) == 0 and calls().count("t.base") == 1 and calls().count("t.s0") == 2
    assert all(path.read_text().startswith(text) for path, text in before.items()) and len(stand_in) == 1
    assert len(Path("runs/t.s0/metrics.jsonl").read_text().splitlines()) == 6, "no step was done twice"


def interrupt_when(number: int, path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.02)
    os.kill(os.getpid(), number)


def test_the_runs_of_a_killed_study_are_waited_for(stand_in, folder, monkeypatch):
    """SIGKILL, as when memory runs out: its runs go on, and the next study lets them."""
    monkeypatch.setenv("STEP", "0.5")
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; import eval.study as s;"
               "s.SCRIPT = Path('stand_in.py').resolve(); s.main(sys.argv[1:])")
    with subprocess.Popen([sys.executable, "-c", program, *STUDY], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as killed:
        while not Path("runs/t.s0/metrics.jsonl").exists():
            time.sleep(0.02)
        killed.kill()
    monkeypatch.setenv("STEP", "0")
    assert main(STUDY) == 0, "also while they still hold their folders"
    assert calls().count("t.s0") == 2 and len(stand_in) == 1
    assert len(Path("runs/t.s0/metrics.jsonl").read_text().splitlines()) == 6


def test_a_run_that_fails_is_named_and_the_others_go_on(stand_in, capsys):
    Path("broken").write_text("t.s0")
    assert main(STUDY) == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "failed" in line]
    assert line.endswith("runs/t.s0: failed (exit code 3): memtrain: the card\\x1b caught fire")
    assert f"no report: 1 of {len(RUNS)} runs are not finished (t.s0)" in err and stand_in == []
    assert not Path("runs/t/report.md").exists() and sum(r["exit_code"] == 0 for r in book().values()) == len(RUNS) - 1
    Path("broken").unlink()
    assert main(STUDY) == 0 and calls()[len(RUNS):] == ["t.s0"] and len(stand_in) == 1


def test_without_its_base_nothing_is_started(stand_in, capsys):
    Path("broken").write_text("t.base")
    assert main(STUDY) == 1 and calls() == ["t.base"] and f"{len(RUNS)} of {len(RUNS)} runs" in capsys.readouterr().err


def test_one_study_a_folder(stand_in, capsys):
    Path("runs/t").mkdir(parents=True)
    hold = ("import filelock, time; lock = filelock.FileLock('runs/t/.lock').acquire();"
            "print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert main(STUDY) == 2 and "another process" in capsys.readouterr().err and not Path("calls").exists()
        other.kill()


@pytest.mark.parametrize(("device", "count", "threads", "found"), [
    ("auto", 0, 0, [["-", "1"]]), ("cpu", 2, 3, [["-", "3"]]), ("auto", 1, 0, [["0", "0"]]),
    ("cuda", 2, 0, [["0", "0"], ["1", "0"]])])
def test_where_runs_go(device, count, threads, found, stand_in, monkeypatch):
    """One on each GPU, or as many one-thread processes as there are cores."""
    monkeypatch.setattr(eval.study, "gpus", lambda: list(map(str, range(count))))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setenv("STEP", "0.05")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    argv = [*SMALLEST, "--seeds", "0,1,2", "--device", device, "--threads", str(threads)]
    assert main(argv) == 0
    assert sorted(map(list, {tuple(line.split()[1:3]) for line in Path("calls").read_text().splitlines()})) == found
    spots = eval.study.places(parse(argv))[0]
    assert len(spots) == (count if device != "cpu" and count else 3 // max(1, threads))


def test_a_study_needs_no_torch(folder, stand_in):
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; import eval.study as s;"
               "s.SCRIPT, s.POLL = Path('stand_in.py').resolve(), 0.02; assert s.main(sys.argv[1:]) == 0;"
               "assert not {'torch', 'numpy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, *SMALLEST, "--seeds", "0,1", "--stages", "memagent,eval"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- real runs


def test_a_study_of_real_runs(folder, base_checkpoint, monkeypatch):
    """Two seeds with their report, and an arm, which trains and evaluates what it needs alone."""
    base = base_checkpoint()
    argv = [*SMALLEST, "--init", base, "--seeds", "0,1", "--ablations", "--stages", "memtrain,memagent,eval,report",
            "--eval-masked", "1"]
    wanted = [job for job in jobs(parse(argv)) if job.run in ("t.s0", "t.s1", "t.s0.end-to-end")]
    monkeypatch.setattr(eval.study, "jobs", lambda c: wanted)
    assert main(argv) == 0
    full = {"base", "base-one-window", "memtrain", "memagent", "memtrain+memagent"}
    for job in wanted:
        rows = json.loads(Path(f"runs/{job.run}/results.json").read_text())["long_qa"]
        assert {r["system"] for r in rows} == (full if job.arm == "full" else {"memtrain+memagent"})
        assert {r["seed"] for r in rows} == {job.config.seed}
        assert json.loads(Path(f"runs/{job.run}/config.json").read_text()) == dataclasses.asdict(
            dataclasses.replace(job.config, threads=1))
    report = Path("runs/t/report.md").read_text()
    assert "t.s0" in report and "t.s1" in report and "2 seeds (0, 1)" in report and "end-to-end" in report


def test_a_group_of_one_recall_enters_the_reward_and_is_not_trained_on(agent, lottery, tokenizer):
    a = agent("--recall-group", "1", "--group", "8")
    batch = memtrain.collect(a, memtrain.Data(a.c, tokenizer), "memtrain", 0)
    recalled = [e for e, g in enumerate(batch.group) if g >= a.c.documents]
    assert recalled and {batch.rewards[e] for e in recalled} == {0.0, 1.0}
    assert {round(batch.rewards[e] % 1, 6) for e in range(a.c.documents * a.c.group)} == {0.0, 0.5}
    assert not memtrain.with_signal(batch) & {batch.group[e] for e in recalled}


def test_one_stage_trains_memagent_on_top_of_memtrain_alone(folder, base_checkpoint, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    assert main([*SMALLEST, "--init", base_checkpoint(), "--stages", "memtrain,memtrain+memagent"]) == 0
    stages = [json.loads(line)["stage"] for line in Path("runs/t/metrics.jsonl").read_text().splitlines()]
    assert stages == ["memtrain"] * 2 + ["memtrain+memagent"] * 2 and not Path("runs/t/memagent").exists()


def test_a_finished_base_is_taken_up_without_its_sharpening(folder, base_checkpoint, monkeypatch):
    """It is sharpened at the end of every base stage: going on from a sharpened one would do it twice."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    monkeypatch.setattr("eval.gates.gates", lambda agent, c: {})
    base, seen = base_checkpoint(), []

    def imitate(model, *_):
        seen.append(model.norm.weight.detach().clone())
        return 0.0, 1

    monkeypatch.setattr(memtrain, "imitate", imitate)
    assert main([*SMALLEST, "--init", base, "--stages", "base", "--base-sharpen", "4"]) == 0
    run = memtrain.Run(parse([*SMALLEST, "--init", base, "--run", "u", "--stages", "memtrain"]))
    assert (seen[0] * 4 - run.model.norm.weight).abs().max() < 1e-6


# ---- its plan


def test_the_plan_of_a_study_is_that_of_its_runs():
    """And preset small is what it says: 20 to 60 M parameters, the paper's window in miniature, 8 GB, and two hours for
    a whole study on an H100: by the plan's assumptions, which no card has confirmed."""
    c = parse(["--preset", "small", "--seeds", "0,1,2", "--ablations", "--scaling"])
    vocab, made = plan.vocabulary(c), jobs(c)
    hours = sum(plan.run_cost(job.config, vocab, plan.CARDS["H100"])[0] for job in made)
    most = max(plan.peak(job.config, vocab)[1] for job in made)
    runs = 3 * (len(ablations(vars(c))) + 1) + 1
    assert f"a study of {runs} runs" in plan.text(c, "H100", 8e9) and f"about {hours:,.2f} hours" in plan.text(
        c, "H100", 8e9)
    assert f"peak {most / 1e9:.1f} of 8 GB" in plan.text(c, "H100", 8e9) and most < 8e9 and hours < 2.5
    assert 20e6 < plan.parameters(c, vocab)[0] < 60e6 and c.window == 1024
    words = c.window - c.section - c.memory - c.response
    assert (words, c.section, c.memory, c.response) == (127, 640, 128, 129)
