"""python -m eval.gpu: what a step does to itself never reaches the others, and the file is whole at every moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from eval import gpu
from eval.bench import gpu_steps
from eval.gpu import Step

PYTHON = "import json, os, sys, time; "


def step(name: str, code: str, seconds: float = 20, cuda: bool = False, sources=("pyproject.toml",)) -> Step:
    """A step that runs `code`; in it, `say(x)` writes x as the step's figures."""
    said = PYTHON + "say = lambda x: open(sys.argv[1], 'w').write(json.dumps(x)); " + code
    return Step(name, seconds, "a test", ("-c", said, "{result}"), sources, cuda)


GOOD = step("good", "say({'value': 3}); print('a line')")
AFTER = step("after", "say({'value': 4})")


def states(made: dict) -> dict[str, str]:
    return {r["name"]: r["state"] for r in made["steps"]}


def written(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())


@pytest.mark.parametrize(("bad", "state"), [
    (step("bad", "say({'half': 1}); print('the reason'); sys.exit(3)"), "failed"),
    (step("bad", "say({'half': 1}); print('the reason', flush=True); time.sleep(60)", seconds=0.4), "timeout"),
    (step("bad", "say({'half': 1}); print('the reason', flush=True); os.kill(os.getpid(), 9)"), "killed"),
    (step("bad", "say({'half': 1}); print('the reason'); raise MemoryError"), "failed"),
], ids=["fails", "hangs", "is killed", "raises"])
def test_a_bad_step_stops_no_other_and_leaves_what_it_knew(tmp_path, bad, state):
    made = gpu.battery([GOOD, bad, AFTER], "cpu", tmp_path, 1.0, [])
    assert states(made) == {"good": "green", "bad": state, "after": "green"} and written(tmp_path) == made
    good, failed, _ = made["steps"]
    assert good["result"] == {"value": 3} and good["lines"] == ["a line"] and good["exit"] == 0
    assert failed["result"] == {"half": 1} and "the reason" in failed["lines"]


def test_what_a_step_leaves_running_ends_with_it(tmp_path):
    child = ("import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
             "say({'pid': p.pid})")
    made = gpu.battery([step("parent", child)], "cpu", tmp_path, 1.0, [])
    pid, until = made["steps"][0]["result"]["pid"], time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "still running"
        time.sleep(0.05)


def test_a_battery_goes_on_where_it_was_stopped(tmp_path):
    count = tmp_path / "count"
    counting = step("counting", f"open({str(count)!r}, 'a').write('x'); say(1)")
    first = gpu.battery([counting, step("bad", "sys.exit(1)")], "cpu", tmp_path, 1.0, [])
    again = gpu.battery([counting, step("bad", "say(2)"), AFTER], "cpu", tmp_path, 1.0, [])
    assert count.read_text() == "x", "what was green is not run again"
    assert states(again) == {"counting": "green", "bad": "green", "after": "green"}
    assert again["steps"][0] == first["steps"][0], "its record stays as it was measured"
    (other := tmp_path / "other").mkdir()
    assert states(gpu.battery([counting], "cpu", other, 1.0, [tmp_path])) == {"counting": "green"}
    assert count.read_text() == "x", "--done counts like --out"


def test_a_killed_battery_leaves_a_whole_file(tmp_path):
    code = ("import sys; sys.path.insert(0, {root!r}); from tests.test_bench_battery import *; "
            "gpu.battery([GOOD, step('long', 'time.sleep(60)', seconds=60)], 'cpu', Path({out!r}), 2.0, [])")
    process = subprocess.Popen([sys.executable, "-c", code.format(root=str(gpu.ROOT), out=str(tmp_path))],
                               cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("long"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states(written(tmp_path)) == {"good": "green"}
    assert states(gpu.battery([GOOD, AFTER], "cpu", tmp_path, 1.0, [])) == {"good": "green", "after": "green"}


def test_changed_sources_and_other_cards_are_run_again(tmp_path, monkeypatch):
    root, count = tmp_path / "root", tmp_path / "count"
    root.mkdir()
    (out := tmp_path / "out").mkdir()
    (root / "kernel.py").write_text("x = 1")
    counting = step("counting", f"open({str(count)!r}, 'a').write('x'); say(1)", sources=("*.py",))
    monkeypatch.setattr(gpu, "ROOT", root)
    real = gpu.source_hash
    monkeypatch.setattr(gpu, "source_hash", lambda patterns: real(patterns, root))
    for content, runs in (("x = 1", 1), ("x = 1", 1), ("x = 2", 2)):
        (root / "kernel.py").write_text(content)
        gpu.battery([counting], "cpu", out, 1.0, [])
        assert len(count.read_text()) == runs
    monkeypatch.setattr(gpu, "card", lambda device: "another card")
    gpu.battery([counting], "cpu", out, 1.0, [])
    assert len(count.read_text()) == 3


def test_a_full_disk_costs_the_file_and_nothing_else(tmp_path, monkeypatch, capsys):
    gpu.battery([GOOD], "cpu", tmp_path, 1.0, [])
    before = (tmp_path / "gpu.json").read_text()
    write_bytes = Path.write_bytes

    def full(self, data):
        if self.name == "gpu.json.tmp":
            write_bytes(self, data[:20])
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    made = gpu.battery([GOOD, AFTER], "cpu", tmp_path, 1.0, [])
    assert states(made) == {"good": "green", "after": "green"}, "the steps go on"
    assert (tmp_path / "gpu.json").read_text() == before and not (tmp_path / "gpu.json.tmp").exists()
    assert "No space left on device" in capsys.readouterr().err


def test_steps_for_a_card_are_said_to_be_left_out_and_time_ends(tmp_path, capsys):
    made = gpu.battery([step("there", "say(1)", cuda=True), GOOD], "cpu", tmp_path, 1.0, [])
    assert states(made) == {"there": "skipped", "good": "green"} and "needs CUDA" in capsys.readouterr().out
    made = gpu.battery([AFTER], "cpu", tmp_path, 0.01, [])
    assert states(made) == {"after": "not run"} and "no time left" in capsys.readouterr().out


def test_the_parent_needs_no_package():
    """It has to say what is wrong where PyTorch does not load: only the standard library is imported."""
    code = ("import sys; before = set(sys.modules); import eval.gpu; "
            "print(*{m.partition('.')[0] for m in set(sys.modules) - before})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=gpu.ROOT, check=True,
                          env=os.environ | {"PYTHONPATH": ""})
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"eval", "data"}, "our own"


def test_help_explains_every_step(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for one in gpu.STEPS:
        assert one.name in text and one.text in text
        assert gpu.source_hash(one.sources) != gpu.source_hash(()), f"{one.name}: its sources match no file"


@pytest.mark.parametrize(("argv", "message"), [
    (["--out", "x", "--only", "probe,nonsense"], "unknown step 'nonsense'"),
    (["--out", "x", "--minutes", "0"], "must be above 0"), ([], "--out"),
    (["--out", "/dev/null/x"], "give a folder that can be written")])
def test_a_bad_command_is_refused_in_one_line(argv, message, folder, capsys):
    with pytest.raises(SystemExit) as end:
        gpu.parse(argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_real_steps_run_on_a_cpu(tmp_path):
    """Small sizes: two of the steps that need no card, as a user would start them."""
    command = [sys.executable, "-m", "eval.gpu", "--device", "cpu", "--out", str(tmp_path), "--minutes", "5", "--only",
               "probe,kernels,nano"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu.ROOT, check=False)
    made = written(tmp_path)
    assert done.returncode == 0 and states(made) == {"probe": "green", "kernels": "skipped", "nano": "green"}, made
    assert made["steps"][0]["result"]["fp32_tflops"] > 0
    assert made["steps"][2]["result"]["stages"]["memtrain"]["steps"] == 2


def test_a_training_cut_short_brings_its_weights_and_goes_on(tmp_path):
    """Stopped by SIGTERM as by its time limit, but once two steps are logged: no processor is too slow for that."""
    log, result = tmp_path / "train/runs/battery/metrics.jsonl", tmp_path / "result.json"

    def start(rows: int) -> dict:
        command = [sys.executable, "-m", "eval.bench", "gpu-train", "--device", "cpu", "--out", str(result), "--to",
                   str(tmp_path)]
        with subprocess.Popen(command, cwd=gpu.ROOT) as process:
            while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= rows):
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
        assert process.returncode == 0
        return json.loads(result.read_text())

    first = start(2)
    steps = first["stages"]["base"]["steps"]
    assert first["stage"] == "base" and first["exit"] == 130 and steps >= 2
    tensors = load(b"".join((tmp_path / f"small.safetensors.{i}").read_bytes() for i in range(first["parts"])))
    assert tensors["model.embed"].dtype == torch.bfloat16 and not any("optimizer" in k for k in tensors)
    assert start(steps + 2)["stages"]["base"]["steps"] >= steps + 2


def test_a_step_is_told_to_stop_in_time():
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(time.monotonic()))
    began = time.monotonic()
    gpu_steps.stop_after(1)
    while not told and time.monotonic() < began + 60:
        time.sleep(0.05)
    assert told and told[0] - began >= 4.9, "at least five seconds, or it would have nothing to say"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_committed_battery_can_be_read():
    found = gpu.green([gpu.ROOT / "eval" / "results" / "gpu"], "NVIDIA H200")
    assert {"probe", "kernels", "parity", "tests", "run"} <= {name for name, _ in found}
