"""What a run survives: kills, terminals that go away, a network that does."""

import dataclasses
import io
import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, waited

import memtrain
from data import InputError
from data.run.files import ROOT, output, write_json
from data.run.folder import Interrupt
from data.run.terminal import printable
from data.tasks import Problem
from eval import faults, retrieval, stage
from eval.bench import main as bench
from eval.report import page as reports
from eval.watch import SIGNS, signs, watch
from kernels.grpo import group_advantages, grpo_loss_reference

# ---- killed at any moment


def test_a_killed_run_ends_as_one_left_alone(tmp_path):
    """The short form of `python -m eval.faults`: four kills in different stages."""
    result = faults.trial(4, 1, tmp_path, "base,memtrain,eval,report")
    assert result["problems"] == [] and result["most_steps_redone"] == 1 and result["kills"] == 4
    assert len({stage for _, stage, _ in result["table"]}) >= 3, "the kills have to reach different stages"
    assert faults.show(result).endswith("none missing")


def test_kills_are_spread_and_can_be_met():
    moments = [(stage, str(step), phase) for stage in ("base", "memtrain") for step in range(8)
               for phase in ("", "sampling", "before checkpoint.json", "checkpoint.json renamed")]
    for seed in range(20):
        chosen = faults.choose(moments, 12, random.Random(seed))
        assert len({m[:2] for m in chosen}) == 12 and chosen == sorted(chosen, key=moments.index)
        assert set(Counter(m[0] for m in chosen).values()) == {6} and set(Counter(m[2] for m in chosen).values()) == {4}
        assert len(faults.choose(moments, 99, random.Random(seed))) == 16


def test_steps_done_again_are_counted():
    steps = [("base", str(i), "sampling") for i in range(5)]
    assert faults.most_redone([steps[:3], steps[2:]]) == 1  # taken up at the step it was killed in
    assert faults.most_redone([steps[:3], steps[3:]]) == 0
    assert faults.most_redone([steps[:3], steps[1:]]) == 2
    assert faults.most_redone([steps, [("start", "", ""), *steps], [("report", "", "plotting")]]) == 5


def test_every_difference_is_noticed(tmp_path, monkeypatch):
    """Rows of metrics that are missing, twice or other, weights, results: whatever the killed run's end has."""
    ends = iter([{"metrics": [1, 2], "results": 3}, {"metrics": [1, 2, 2], "results": 3}])
    monkeypatch.setattr(faults.Victim, "start", lambda self, target=None, after=None: target is not None)
    monkeypatch.setattr(faults.Victim, "starts", lambda self: [[("base", "0", ""), ("base", "0", "sampling")]])
    monkeypatch.setattr(faults.Victim, "outcome", lambda self: next(ends))
    result = faults.trial(1, 0, tmp_path)
    assert result["problems"] == ["killed-0: metrics differ"] and result["table"] == [["sampling", "base", 1]]
    assert faults.show(result).endswith("metrics differ")


def test_a_run_that_fails_by_itself_is_no_kill(tmp_path):
    victim = faults.Victim(tmp_path / "v", ["--grup", "3"])
    with pytest.raises(InputError, match=r"exit code 2.*--grup"):
        victim.start()


def test_no_state_of_a_global_generator_has_to_be_kept(folder, lottery, tiny, tokenizer, monkeypatch):
    """Every random number follows from a key or a step: torch, numpy and Python's generators are not touched, so that
    a checkpoint that does not hold them loses nothing."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    monkeypatch.setattr("eval.gates.gates", lambda agent, c: {})
    memtrain.Data(tiny(), tokenizer).masked_problem(0)  # loads libraries, some of which draw a number for themselves
    before = torch.get_rng_state(), np.random.get_state()[1:], random.getstate()
    assert memtrain.main([*TINY, "--run", "t", "--stages", "base,memtrain,memagent,eval", "--memtrain-steps", "2",
                          "--memagent-steps", "1", "--group", "4"]) == 0
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state()[1:], before[1], strict=True))
    rows = [json.loads(line) for line in (folder / "runs/t/metrics.jsonl").read_text().splitlines()]
    assert any(row.get("loss") for row in rows if row["stage"] != "base"), "something has to be learned"


# ---- numerics


def row_of(**values) -> dict:
    return {"entropy": 0.05, "all_zero": 0.5, "all_one": 0.0, "empty": 0.0, "finished": 0.97, "copied": 0.1,
            "mismatch_outside": 0.0} | values


BAD_ROWS = {"entropy collapse": {"entropy": 0.0001}, "all-zero rewards": {"all_zero": 1.0},
            "all-one rewards": {"all_one": 1.0}, "empty responses": {"empty": 0.8},
            "responses without end": {"finished": 0.1}, "copied prompts": {"copied": 0.9},
            "sampler and scorer disagree": {"mismatch_outside": 0.02}}


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_is_told_once_after_three_steps_in_a_row(name):
    bad, seen, told = row_of(**BAD_ROWS[name]), {}, []
    for row in [bad, bad, row_of(), bad, bad, bad, bad, row_of(), bad, bad, bad]:
        told.append(watch(row, seen))
        seen = json.loads(json.dumps(seen))  # as a checkpoint keeps it
    assert [len(t) for t in told] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert told[5][0].startswith(f"{name}: ") and "\n" not in told[5][0]
    assert watch(row_of(), seen) == [] and watch({k: v for k, v in row_of().items() if k != "entropy"}, {}) == []


def test_the_metrics_behind_the_signs(agent):
    a = agent()
    end, problem = a.tokenizer.end, Problem("p", "Which of the two towns by the river is older?", ("X",), (), "kind")
    head, written = a.prompts.update(problem.question, [], [])[0][:12], a.tokenizer.encode("Zorla, a town in Brisar.")
    turn = lambda ids: memtrain.Turn([1], [1], [*ids, end], [])  # noqa: E731
    rollout = lambda p, answer, memory: memtrain.Rollout(p, [], [], [memory], answer)  # noqa: E731
    other = dataclasses.replace(problem, id="q")
    found = signs(a, [rollout(problem, "X", head), rollout(problem, "X", written), rollout(other, None, head),
                      rollout(other, "Y", written)], [1.0, 1.5, 0.0, 0.0], [turn([]), turn(written)])
    grams = 2 * (len(head) - 3), 2 * (len(written) - 3)
    assert found == {"all_zero": 0.5, "all_one": 0.5, "empty": 0.5, "copied": pytest.approx(grams[0] / sum(grams))}


def test_a_note_is_given_once_though_the_run_is_taken_up_again(folder, base_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "8",
               "--save-every", "1"]
    step = memtrain.train_step

    def leaves(run, kind, n, *rest):
        if n == 5 and not (folder / "left").exists():
            (folder / "left").touch()
            raise KeyboardInterrupt
        return step(run, kind, n, *rest)
    monkeypatch.setattr(memtrain, "train_step", leaves)
    assert memtrain.main(command) == 130 and memtrain.main(command) == 0
    assert capsys.readouterr().out.count("note: memtrain, step 3: all-zero rewards: ") == 1


@pytest.mark.parametrize("by_std", [False, True])
def test_a_group_of_one_has_no_advantage(by_std):
    """The others of its group may have been left out: nothing to compare with is no signal, not a large one."""
    rewards, group = torch.tensor([1.0, 0.25, 0.75, 7.0], dtype=torch.float64), torch.tensor([2, 0, 0, 5])
    found = group_advantages(rewards, group, by_std)
    assert found[0] == found[3] == 0 and found[1] == -found[2] < 0
    new = torch.zeros(2, requires_grad=True)
    loss, _ = grpo_loss_reference(new, torch.zeros(2), None, rewards, group, torch.tensor([0]), torch.tensor([0, 2]), 1,
                                  0.2, 0.2, 0.0, by_std)
    loss.backward()
    assert loss == 0 and not new.grad.any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_log_prob_that_is_not_finite_skips_the_step(value, agent, tiny, tokenizer):
    """Also -inf where the advantage is positive: the ratio is clipped, the loss stays finite."""
    a = agent("--kl", "0")
    prompt = a.prompts.answer("Who?", a.tokenizer.encode(" a memory"))
    turns = a.sample([prompt] * 2, [("k", 0), ("k", 1)])
    turns[0] = dataclasses.replace(turns[0], logprobs=[value, *turns[0].logprobs[1:]])
    batch = memtrain.Batch(turns, [0, 1], [1.0, 0.0], [0, 0], [0, 0], {})
    optimizer = torch.optim.AdamW(a.model.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in a.model.named_parameters()}
    assert memtrain.update(a.model, None, optimizer, a.c, batch, {0, 1})["skipped"] == 1
    assert all(torch.equal(p, before[n]) for n, p in a.model.named_parameters()) and not optimizer.state


# ---- where results may be written


@pytest.mark.parametrize("path", ["data", "data/x.json", "eval/x.json", "memtrain.py", "README.md", "tests/new", ".",
                                  "eval/results/../metrics.py", "kernels/../data/y", ".git/config"])
def test_the_own_source_is_no_place_for_results(path, tmp_path):
    with pytest.raises(InputError, match=r"--out .*source.*runs/"):
        output(ROOT / path)
    (tmp_path / "link").symlink_to(ROOT)
    with pytest.raises(InputError, match="--out"):
        output(tmp_path / "link" / path)


def test_every_command_with_an_out_asks_first(capsys):
    before = {p: p.read_bytes() for p in (ROOT / "data").glob("*.py")}
    for main, command in ((reports.main, ["eval/results/nano", "--out"]), (bench.main, ["step", "--out"]),
                          (faults.main, ["--out"])):
        assert main([*command, str(ROOT / "data" / "config.py")]) == 2
        assert "source of memtrain" in capsys.readouterr().err.splitlines()[-1]
    assert {p: p.read_bytes() for p in (ROOT / "data").glob("*.py")} == before


def test_places_for_results(tmp_path):
    for path in (tmp_path / "x", ROOT / "runs/a/x.json", ROOT / "eval/results/new/x.json", ROOT / "figures.json"):
        assert output(path) == path


def test_no_place_for_results(tmp_path):
    (tmp_path / "round").symlink_to("round")
    for name, why in (("round", "circle"), ("round/x", "circle"), ("x" * 300, "too long")):
        with pytest.raises(InputError, match=f"--out .*{why}.*another name"):
            output(tmp_path / name)


def test_a_device_or_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    for name in ("pipe", "to pipe"):
        got = []
        reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()), daemon=True)  # noqa: B023
        reader.start()
        write_json(tmp_path / name, {"a": [1, 2]})
        reader.join(10)
        assert json.loads(got[0]) == {"a": [1, 2]} and stat.S_ISFIFO(os.stat(tmp_path / name).st_mode)
    write_json(Path(os.devnull), {"a": 1})
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", "to pipe"]


def test_an_output_that_is_a_link_is_followed_and_keeps_its_permissions(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.json").write_text("old")
    os.chmod(tmp_path / "far" / "x.json", 0o600)
    (tmp_path / "x.json").symlink_to("far/x.json")
    (tmp_path / "new.json").symlink_to("far/new.json")  # names nothing yet
    for name in ("x.json", "new.json"):
        write_json(tmp_path / name, {"a": 1})
        assert (tmp_path / name).is_symlink() and json.loads((tmp_path / "far" / name).read_text()) == {"a": 1}
    assert stat.S_IMODE(os.stat(tmp_path / "far" / "x.json").st_mode) == 0o600
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "far"):
        with pytest.raises(InputError, match=name):
            write_json(tmp_path / name, {})
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["new.json", "x.json"]


@pytest.mark.parametrize("place", ["/dev/stdout", "out", "link"])
def test_where_standard_output_goes_is_added_to(place, tmp_path):
    """Through its device, and by the name of the file that it is: what was printed before and after stays."""
    code = "print('before'); from data.run.files import write_json; from pathlib import Path; import sys; write_json(" \
           "Path(sys.argv[1]), {'a': 1}); print('after')"
    (tmp_path / "link").symlink_to("out")
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", code, str(tmp_path / place)], stdout=file, check=True, cwd=ROOT)
    assert (tmp_path / "out").read_text() == 'before\n{\n "a": 1\n}\nafter\n'


def test_what_a_command_reads_and_a_folder_are_no_place_for_its_results(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Kovemgate was built by Mobrin Kovem.")
    (tmp_path / "link").symlink_to("text.txt")
    for name, said in (("text.txt", "is read"), ("link", "is read"), (".", "a folder")):
        assert memtrain.main(["read", str(tmp_path / "text.txt"), "--out", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "text.txt").read_text() == "Kovemgate was built by Mobrin Kovem."


# ---- the same twice


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_same_seed_gives_the_same_metrics(threads, folder, base_checkpoint, lottery, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", (called := []).append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # what main sets is taken back after the test
    base, rows = base_checkpoint(), []
    for name in ("a", "b"):
        assert memtrain.main([*TINY, "--run", name, "--init", base, "--memtrain-steps", "2", "--documents", "1",
                              "--update-documents", "1", "--stages", "memtrain", "--lr", "0.01", "--threads", threads,
                              *(["--deterministic"] if name == "b" else [])]) == 0
        assert torch.get_num_threads() == int(threads)
        lines = (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        rows.append(faults.timeless([json.loads(line) for line in lines]))
    assert rows[0] == rows[1] and len(rows[0]) == 2 and any(row.get("loss") for row in rows[0])
    assert called == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"]


# ---- terminals and signals

COMMAND = [sys.executable, str(ROOT / "memtrain.py"), *TINY, "--run", "t"]


def test_a_run_goes_on_when_its_terminal_is_closed(folder, base_checkpoint):
    """`| head -1`, no standard error from the start, and the signal that a closed terminal sends."""
    command = [*COMMAND, "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "3"]
    with subprocess.Popen(["sh", "-c", 'exec "$@" 2>&- <&-', "sh", *command], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline().startswith(b"memtrain ")
        child.stdout.close()
        child.send_signal(signal.SIGHUP)
        assert child.wait(60) == 0
    assert json.loads((folder / "runs/t/memtrain/checkpoint.json").read_text())["done"]
    for line in (folder / "runs/t/metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["stage"] == "memtrain", "nothing that was meant for the terminal"


def test_sigterm_to_all_processes_of_a_run_ends_as_stopped(folder):
    """As a batch system sends it. The process that makes demonstrations must not die before the run has saved."""
    log = folder / "runs/t/metrics.jsonl"
    with (folder / "err").open("w") as err, subprocess.Popen(
            [*COMMAND, "--stages", "base", "--base-steps", "5000", "--save-every", "5000"], stderr=err,
            stdout=subprocess.DEVNULL, start_new_session=True) as child:
        assert waited(lambda: log.exists() and log.read_bytes().count(b"\n") >= 5), "past the copying"
        os.killpg(child.pid, signal.SIGTERM)
        assert child.wait(60) == 130
    said = (folder / "err").read_text().replace("\r", "\n").strip().splitlines()
    assert said[-1].startswith("stopped; continue with: python memtrain.py") and "Traceback" not in "".join(said)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert json.loads((folder / "runs/t/base/checkpoint.json").read_text())["step"] == len(steps) == steps[-1] + 1


def test_a_signal_in_the_middle_of_a_print_is_noted(capfd):
    """A handler that printed would re-enter the stream that is being written."""
    interrupt = Interrupt()

    class Stream(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            os.kill(os.getpid(), signal.SIGINT)
            return len(data)
    sys.stderr, kept = io.TextIOWrapper(io.BufferedWriter(Stream())), sys.stderr
    try:
        print("text", file=sys.stderr, flush=True)
    finally:
        sys.stderr = kept
    assert interrupt.asked and "stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[31mred\x07", r"\x1b[31mred\x07"), ("a\tb\nc", "a\tb\nc"), ("\u202egnp", r"\u202egnp"), ("\x00", r"\x00"),
    ("\ud800", r"\ud800"), ("Zürich 東京 🙂", "Zürich 東京 🙂"), ("\r\x9b2J", r"\r\x9b2J")])
def test_printable(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("command", [["--corpus", "no\nsuch.jsonl"], ["--run", "a\nb"], ["read", "no\u2028such.txt"],
                                     ["--stages", "x\r\ny"], ["--no\nsuch", "1"]])
def test_a_refusal_is_one_line_whatever_a_name_holds(command, folder, capsys):
    assert memtrain.main(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    for main, more in ((reports.main, ["a\nb"]), (bench.main, ["a\nb"]),
                       (retrieval.main, ["--corpus", "a\nb", "--questions", "c"])):
        assert main(more) == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_nothing_needs_git(folder, base_checkpoint, monkeypatch, capsys):
    """Results say that the commit is unknown; so does the start, once."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    monkeypatch.setenv("PATH", str(folder))
    assert stage.commit() == "unknown"
    assert memtrain.main([*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain,eval",
                          "--memtrain-steps", "0", "--eval-lengths", "1"]) == 0
    assert capsys.readouterr().out.count("no git checkout here") == 1
    assert json.loads((folder / "runs/t/results.json").read_text())["environment"]["commit"] == "unknown"
