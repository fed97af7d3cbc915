"""Several processes that share a run: what one does, they do; and none outlives the others."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, waited
from safetensors.torch import load_file

from data.config import Config, processes
from data.run import ranks
from data.run.files import ROOT

# a random policy as tiny as this never answers: an answer is right by what it says, whatever that is
RANKS = """
import sys, zlib
sys.path.insert(0, sys.argv.pop(1))
import memtrain
memtrain.Agent.boxed = lambda self, turn: self.tokenizer.decode(turn.sampled)
memtrain.exact_match = lambda text, answers: float(zlib.crc32(text.encode()) % 2)
import eval.header, eval.stage
eval.header.estimate = lambda *_: (0.0, 0)
rows_of = eval.stage.rows_of
def noted(run, system, job, *rest):
    with open(f"rank{memtrain.ranks.RANK}", "a") as file:
        print(system, job, file=file)
    return rows_of(run, system, job, *rest)
eval.stage.rows_of = noted
sys.exit(memtrain.main())
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]  # or --run were its own
MOVED = {"seconds", "seconds_sampling", "tokens_per_s", "tokens", "tokens_trained", "tokens_prompts"}


def test_two_processes_do_what_one_does(tmp_path):
    """The same global batch, so the same weights; one metrics file; the same answers, whichever process read them."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [str(script), str(ROOT), *TINY, "--base-steps", "2", "--memtrain-steps", "4", "--run", "t", "--stages"]
    starts = {"one": ([], "base,memtrain,eval", []), "two": ([], "base,memtrain,eval", ["--processes", "2"]),
              "torchrun": (TORCHRUN, "base,memtrain", [])}
    for name, (launcher, stages, more) in starts.items():
        (folder := tmp_path / name).mkdir()
        done = subprocess.run([sys.executable, *launcher, *command, stages, *more], cwd=folder, capture_output=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (tmp_path / name / "runs/t" for name in starts)
    start = load_file(one / "base/checkpoint.safetensors")
    for other in others:
        for stage in ("base", "memtrain"):
            a, b = (load_file(run / stage / "checkpoint.safetensors") for run in (one, other))
            assert a.keys() == b.keys()
            for key, tensor in a.items():
                torch.testing.assert_close(b[key], tensor, atol=1e-6, rtol=1e-5, msg=key)
            assert stage == "base" or any((start[k] - a[k]).abs().max() > 1e-4 for k in a), "it has to learn"
        rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                for run in (one, other)]
        assert len(rows[0]) == len(rows[1]) == 8
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - MOVED - {"stage"}:  # each process prefills what all documents share
                assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), (key, a[key], b[key])
    done = [(tmp_path / "two" / f"rank{r}").read_text().splitlines() for r in (0, 1)]
    assert all(done) and sorted(done[0] + done[1]) == sorted((tmp_path / "one/rank0").read_text().splitlines())
    results = [json.loads((run / "results.json").read_text()) for run in (one, others[0])]
    for section in ("long_qa", "masked", "recall", "memory"):
        assert results[0][section] == results[1][section] != []
    assert [r["environment"]["threads"] for r in results] == [1, 2]
    readings = [{(d["task"], d["id"], s): how for d in json.loads((run / "readings.json").read_text())["documents"]
                 for s, how in d["systems"].items()} for run in (one, others[0])]
    assert readings[0] == readings[1] and {s for _, _, s in readings[0]} == {"base", "memtrain"}


def test_the_number_of_processes():
    def of(cuda=False, **fields):
        return processes(Config(**fields), cuda)

    cores = os.cpu_count() or 1
    assert of() == {1: 1, 2: 2, 3: 3}.get(cores, 4) and of(update_documents=1) == of(threads=1) == of(cuda=True) == 1
    assert of(model="folder") == of(stages="report") == 1 and of(processes=3) == of(processes=3, threads=1) == 3
    assert of(cuda=True, device="cpu") == of()


@pytest.fixture
def pair(tmp_path, base_checkpoint):
    """(a run of two processes, in its tenth step or so; the other process's id)."""
    log, err = tmp_path / "runs/t/metrics.jsonl", (tmp_path / "err").open("w")
    command = [sys.executable, str(ROOT / "memtrain.py"), *TINY, "--run", "t", "--init", base_checkpoint(), "--stages",
               "memtrain", "--memtrain-steps", "5000", "--save-every", "5000", "--processes", "2"]
    with err, subprocess.Popen(command, cwd=tmp_path, stderr=err, stdout=subprocess.DEVNULL,
                               start_new_session=True) as child:
        try:
            assert waited(lambda: log.exists() and log.read_bytes().count(b"\n") > 3, 120)
            (other,) = map(int, Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split())
            yield child, other
        finally:
            child.kill()


def gone(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return not status.exists() or "\nState:\tZ" in status.read_text()


def listening(process: int) -> set[str]:
    """Addresses, in hexadecimal, at which it takes connections."""
    inodes = {os.readlink(fd) for fd in Path(f"/proc/{process}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{process}/net/{name}").read_text()
            .splitlines()[1:]]
    return {r[1].partition(":")[0] for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in inodes}


def said(tmp_path) -> str:
    return (tmp_path / "err").read_text().replace("\r", "\n").strip().splitlines()[-1]


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
class TestEnds:
    def test_with_the_first_process_the_others_end(self, pair):
        """And nobody outside this machine could have talked to them."""
        child, other = pair
        assert set() < listening(child.pid) | listening(other) <= {"0100007F", f"{0:024X}01000000"}, "127.0.0.1 and ::1"
        child.kill()
        child.wait(10)
        assert waited(lambda: gone(other))

    def test_a_lost_process_is_named(self, pair, tmp_path):
        child, other = pair
        os.kill(other, signal.SIGKILL)
        assert child.wait(90) == 2
        assert said(tmp_path) == "memtrain: process 1 of 2 ended with exit code -9: it said nothing"

    @pytest.mark.parametrize("everyone", [False, True])
    def test_an_interrupted_run_is_left_resumable(self, pair, tmp_path, everyone):
        """By a signal to the first alone, or to all as a terminal sends it."""
        child, other = pair
        (os.killpg if everyone else os.kill)(child.pid, signal.SIGINT)
        assert child.wait(90) == 130 and gone(other)
        assert said(tmp_path).startswith("stopped; continue with: python memtrain.py")
        steps = [json.loads(line)["step"] for line in (tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()]
        assert json.loads((tmp_path / "runs/t/memtrain/checkpoint.json").read_text())["step"] == steps[-1] + 1


def test_alone_nothing_is_dealt_out():
    done = list(ranks.deal([3, 4, 5], [0, 2], lambda x: x + 1, lambda: False))
    assert done == [(3, 4), (5, 6)] and ranks.gather([1]) == [1]
    assert list(ranks.deal([3, 4], [0, 1], lambda x: x, lambda: True)) == []
