"""The command: what it refuses and how, and the whole of it in miniature."""

import dataclasses
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import memtrain
from data import InputError
from data.config import read_config
from data.run.files import second_name
from data.run.folder import Log
from data.text.corpus import load_questions
from data.weights.tokenizer import Tokenizer
from memtrain import Config, main, parse

ROOT = Path(memtrain.__file__).parent


def passages(count: int, names: bool = True) -> str:
    """JSON lines of `count` passages, each with its own title."""
    text = "Paris and the Seine in {0}, by Victor Hugo." if names else "nothing of interest at all, number {1}."
    rows = ({"title": f"topic {chr(97 + i // 26)}{chr(97 + i % 26)}", "text": text.format(1800 + i, "x" * (i + 1))}
            for i in range(count))
    return "\n".join(map(json.dumps, rows))


def questions(*ids: int) -> str:
    rows = ({"id": f"q{i}", "question": f"Who wrote number {i}?", "answer": "Hugo",
             "supporting_facts": [[f"Book {i}", 0]], "context": [[f"Book {i}", ["Hugo wrote it."]]]} for i in ids)
    return "\n".join(map(json.dumps, rows))


def write(**files) -> None:
    for name, content in files.items():
        Path(name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())


def refused(capsys, argv, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds every one of `parts`, after at most a header."""
    assert main([str(a) for a in argv]) == 2
    line, *rest = capsys.readouterr().err.splitlines()
    assert rest == [] and line.startswith("memtrain: ")
    for part in parts:
        assert part in line, line


# ---- bad input

BAD = {  # command: parts of the answer
    "--preset nanno": ["--preset nanno", "nano"], "--grup 4": ["--grup", "--help"], "--sta base": ["--sta"],
    "nano": ["nano"], "--lr": ["--lr"], "--stages ,": ["--stages"],
    "--stages base,evaluate": ["--stages", "evaluate", "memagent"],
    "--group four": ["--group", "four", "int"], "--group 2.5": ["--group", "2.5"],
    "--lr fast": ["--lr", "fast"], "--tied maybe": ["--tied", "maybe"],
    "--lr 0": ["--lr 0"], "--lr nan": ["--lr nan"], "--lr inf": ["--lr inf"], "--kl -1": ["--kl -1"],
    "--kl nan": ["--kl nan"], "--temperature 0": ["--temperature 0"], "--top-p 0": ["--top-p"],
    "--top-p 1.5": ["--top-p"], "--eps-low 1.5": ["--eps-low"], "--seed -1 --stages base": ["--seed -1"],
    "--group 1": ["--group 1", "at least 2"], "--recall-group -1": ["--recall-group -1", "negative"],
    "--window 100": ["--window 100", "section 160"], "--window 250": ["--window 250"], "--memory 41": ["--response"],
    "--documents 6 --update-documents 4": ["--update-documents 4", "--documents 6"],
    "--key-heads 3": ["--key-heads 3"], "--head-size 7": ["--head-size 7"], "--layers 0": ["--layers 0"],
    "--related 12": ["--related 12", "--passages 12"], "--people 20": ["--people 20"],
    "--prompt-order last": ["--prompt-order last", "paper"], "--wandb on": ["--wandb on", "offline"],
    "--device tpu": ["--device tpu", "cuda"], "--entities magic": ["magic", "rules"],
    "--eval-lengths 4,2": ["--eval-lengths 4,2"], "--eval-lengths 1,x": ["--eval-lengths 1,x"],
    "--eval-lengths 256": ["--eval-lengths", "128"],
    "--stages eval --eval-lengths 128": ["too few passages", "--eval-lengths"],  # in this small a world
    "--run ../up": ["--run ../up", "runs/"], "--run .hidden": ["--run .hidden"],
    "--questions q.json": ["--questions", "--corpus"], "--benchmarks b.jsonl": ["--benchmarks", "--corpus"],
    "--turns 0": ["--turns 0"], "--act 4": ["--act 4", "at least 8"],
    "--result 200": ["--window", "result 200"], "--eval-systems base,gold": ["--eval-systems", "gold", "memtrain"],
    "--stages memtrain+mem1": ["--stages memtrain+mem1", "memtrain before it"],
    "--corpus p.jsonl --stages eval": ["--questions"], "--corpus p.jsonl --stages memagent": ["--train-questions"],
    "--corpus nope.jsonl --stages memtrain": ["nope.jsonl", "no such file"],
    "--init nope.safetensors --stages memtrain": ["nope.safetensors", "--init"],
    "--released-probe --mask last --masked-text timeline": ["--released-probe", "--mask last"],
    "--world test": ["--world test", "eval or dev"],
    "--world dev --corpus p.jsonl --stages eval --questions q.jsonl": ["--world dev", "p.jsonl"],
    "--keep-steps 5,x": ["--keep-steps 5,x", "5,38"], "--keep-steps 38,5": ["--keep-steps 38,5", "ascending"],
    "--keep-steps 0,5": ["--keep-steps 0,5"], "--keep-steps 5,99": ["--keep-steps 5,99", "--memagent-steps 15"],
    "--keep-steps 5 --eval-systems memagent@4": ["memagent@4", "memagent@5"],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent(folder, capsys):
    refused(capsys, [*TINY, "--device", "cuda"], "--device cuda", "--device cpu")
    assert list(folder.iterdir()) == []


CORPORA = {  # file, content, stages: parts of the answer
    "empty": ("c.jsonl", b"", "memtrain", ["c.jsonl", "empty"]),
    "not UTF-8": ("c.txt", "Montréal\n".encode("latin-1"), "memtrain", ["c.txt, line 1", "UTF-8"]),
    "not JSON": ("c.jsonl", b'{"title": "a", "text": "b"}\n{"title"', "memtrain", ["c.jsonl, line 2"]),
    "no text": ("c.jsonl", b'{"title": "a"}', "memtrain", ["c.jsonl, line 1"]),
    "an unknown kind": ("c.pdf", b"%PDF", "memtrain", ["c.pdf", ".jsonl"]),
    "no entity": ("c.jsonl", passages(60, names=False), "memtrain", ["no entity"]),
    "too few to mask": ("c.jsonl", passages(7), "memtrain", ["c.jsonl", "passages", "larger corpus"]),
    "too few to train on": ("c.jsonl", passages(30), "memagent", ["few"]),
    "too few held out": ("c.jsonl", passages(30), "memtrain,eval", ["passages", "larger corpus"]),
}


QUESTIONS = {
    "malformed at line 3": (questions(1, 2) + '\n{"id": "q3", "question"', ["q.jsonl, line 3"]),
    "a field is missing": (questions(1) + '\n{"id": "q2", "golden_answers": ["x"]}', ["q.jsonl, line 2", "question"]),
    "an id twice": (questions(1, 2, 1), ["q.jsonl, line 3", "q1"]),
    "empty": ("", ["q.jsonl", "empty"]),
    "missing": (None, ["q.jsonl", "no such file"]),
    "shared with training": (questions(5, 3), ["q3", "--train-questions"]),
}


def without(path: Path, name: str) -> None:
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys() if k != name}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


CHECKPOINTS = {  # options of the checkpoint, what is done to the file: parts of the answer
    "truncated": ([], lambda p: p.write_bytes(p.read_bytes()[:-100]), ["can't be read"]),
    "cut to nothing": ([], lambda p: p.write_bytes(b""), ["can't be read"]),
    "no checkpoint": ([], lambda p: p.write_text("hello, this is a text"), ["can't be read"]),
    "a folder": ([], lambda p: (p.unlink(), p.mkdir()), ["can't be read"]),
    "somebody else's": ([], lambda p: save_file({"w": torch.zeros(2)}, p), ["not written by"]),
    "wider": (["--width", "32"], None, ["shape", "width"]),
    "deeper": (["--layers", "3"], None, ["layers"]),
    "shallower": (["--layers", "1"], None, ["missing"]),
    "of tied weights": (["--tied"], None, ["output", "missing"]),
    "a tensor is missing": ([], lambda p: without(p, "model.norm.weight"), ["damaged", "digest"]),
    "a flipped bit": ([], lambda p: flip(p, -1000), ["damaged", "digest"]),
    "a flipped bit of the state": ([], lambda p: flip(p, p.read_bytes().index(b"\"stage") + 3), ["damaged", "digest"]),
    "of a later version": ([], lambda p: p.write_bytes(p.read_bytes().replace(b"format\\\": 2", b"format\\\": 3")),
                           ["not written by this version"]),
}


def foreign_tokenizer(base_checkpoint) -> list:
    other = Tokenizer({bytes([b]): b for b in range(256)}, "bytes")
    return ["--init", base_checkpoint(tokenizer=other), "--stages", "memtrain"]


RUN_FOLDERS = {  # what runs/t/config.json holds: parts of the answer
    "no JSON": (b"{", ["runs/t/config.json", "JSON", "delete"]), "a list": (b"[1]", ["runs/t/config.json", "list"]),
    "not UTF-8": (b"\xff", ["runs/t/config.json", "delete"]),
    "another seed": (json.dumps(dataclasses.asdict(parse(TINY)) | {"seed": 9}).encode(), ["runs/t", "seed=9", "--run"]),
    "an option of another version": (json.dumps(dataclasses.asdict(parse(TINY)) | {"forgetting": 0}).encode(),
                                     ["runs/t/config.json", "forgetting", "--run"]),
}


BENCHMARKS = {  # content: parts of the answer
    "without answers": (b'{"id": "x", "question": "Who?"}\n', ["b.jsonl, line 1", "golden_answers"]),
    "an empty answer": (b'{"id": "x", "question": "Who?", "golden_answers": []}\n', ["b.jsonl, line 1", "answer"]),
    "one id twice": (b'{"id": "x", "question": "Who?", "golden_answers": ["A"]}\n' * 2, ["b.jsonl, line 2", "'x'"]),
    "one question": (b'{"id": "x", "question": "Who?", "golden_answers": ["A"]}\n', ["b.jsonl", "two"]),
    "none": (b"", ["b.jsonl", "two"]),
}


def older_results(base_checkpoint) -> list:
    Path("runs/t").mkdir(parents=True)
    Path("runs/t/results.json").write_text(json.dumps({"long_qa": [], "recall": [], "masked": [], "stages": []}))
    return ["--run", "t", "--init", base_checkpoint(), "--stages", "eval", "--eval-lengths", "1"]


def bad_inputs() -> dict:
    """name: (prepare(base_checkpoint) -> the rest of the command, parts of the answer)."""
    files = ["--questions", "q.jsonl", "--train-questions", "t.jsonl", "--init", "x"]
    cases = {f"command: {c}": (lambda _, c=c: c.split(), parts) for c, parts in BAD.items()}
    for name, (file, content, stages, parts) in CORPORA.items():
        def prepare(_, file=file, content=content, stages=stages):
            write(**{file.replace(".", "__"): content}, q__jsonl=questions(1, 2), t__jsonl=questions(3, 4))
            return ["--corpus", file, "--stages", stages, "--train-sections", "20", *files]
        cases[f"corpus: {name}"] = prepare, parts
    for name, (content, parts) in QUESTIONS.items():
        def prepare(_, content=content):
            asked = {} if content is None else {"q__jsonl": content}
            write(c__jsonl=passages(200), t__jsonl=questions(3, 4), **asked)
            return ["--corpus", "c.jsonl", *files]
        cases[f"questions: {name}"] = prepare, parts
    for name, (options, change, parts) in CHECKPOINTS.items():
        def prepare(base_checkpoint, options=options, change=change):
            path = Path(base_checkpoint(*options))
            if change:
                change(path)
            return ["--init", path, "--stages", "memtrain"]
        cases[f"checkpoint: {name}"] = prepare, ["base.safetensors", *parts]
    for name, (content, parts) in RUN_FOLDERS.items():
        def prepare(base_checkpoint, content=content):
            Path("runs/t").mkdir(parents=True)
            Path("runs/t/config.json").write_bytes(content)
            return ["--run", "t", "--init", base_checkpoint(), "--stages", "memtrain"]
        cases[f"run folder: {name}"] = prepare, parts
    for name, (content, parts) in BENCHMARKS.items():
        def prepare(_, content=content):
            write(c__jsonl=passages(200), t__jsonl=questions(3, 4), q__jsonl=questions(1, 2), b__jsonl=content)
            return ["--corpus", "c.jsonl", *files, "--benchmarks", "b.jsonl"]
        cases[f"benchmark: {name}"] = prepare, parts
    cases["results: of an older form"] = older_results, ["results.json", "older form"]
    cases["tokenizer: another one"] = foreign_tokenizer, ["tokenizer", "--stages base"]
    return cases


BAD_INPUTS = bad_inputs()


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name, folder, base_checkpoint, capsys):
    """Exit code 2, one line that names the thing and the remedy, in under 2 seconds; no file is written or changed,
    also where only the last stage would fail."""
    prepare, parts = BAD_INPUTS[name]
    argv = [*TINY, *map(str, prepare(base_checkpoint))]
    content = lambda: {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}  # noqa: E731
    before, began = content(), time.process_time()  # of this process alone: others may be at work
    refused(capsys, argv, *parts)
    assert time.process_time() - began < 2
    assert content() == before


def test_there_are_bad_inputs_of_every_sort():
    kinds = [name.split(":")[0] for name in BAD_INPUTS]
    assert len(kinds) >= 80 and {k: kinds.count(k) >= n for k, n in (
        ("command", 40), ("corpus", 9), ("questions", 6), ("checkpoint", 13), ("run folder", 4), ("tokenizer", 1),
        ("benchmark", 5), ("results", 1))} == (
        dict.fromkeys(dict.fromkeys(kinds), True))


@pytest.mark.parametrize(("argument", "limit"), [("--help", 0.5), ("--grup=4", 2), ("--run=../up", 2),
                                                 ("--eval-lengths=256", 2), ("--corpus=c.jsonl", 2)])
def test_an_answer_comes_soon(argument, limit, tmp_path):
    """In seconds of a processor, which others at work lengthen less than the wait; the best of three tries."""
    spent, busy = [], lambda: sum(os.times()[2:4])  # of children
    for _ in range(3):
        began = busy()
        done = subprocess.run([sys.executable, ROOT / "memtrain.py", argument], cwd=tmp_path, capture_output=True,
                              text=True, timeout=20, check=False)
        spent.append(busy() - began)
        if spent[-1] < limit:
            break
    assert min(spent) < 1.5 * limit and list(tmp_path.iterdir()) == []
    assert done.returncode == (0 if argument == "--help" else 2)
    assert argument == "--help" or (len(done.stderr.splitlines()) == 1 and argument.split("=")[0] in done.stderr)


def test_a_damaged_checkpoint_of_the_run_itself_is_named(folder, base_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "2",
               "--save-every", "1"]
    assert main(command) == 0
    path = Path("runs/t/memtrain/checkpoint.safetensors")
    whole = path.read_bytes()
    path.unlink()  # best.safetensors may be the same file
    capsys.readouterr()
    refused(capsys, [*TINY, "--run", "u", "--init", str(path), "--stages", "memtrain"], "no such file",
            "rename previous.safetensors")
    path.write_bytes(whole[:1000])  # the .json beside it still says that the stage is done
    refused(capsys, command, "runs/t/memtrain/checkpoint.safetensors", "delete it", "rename previous.safetensors")
    path.with_name("previous.safetensors").rename(path)
    calls, step = [], memtrain.train_step
    monkeypatch.setattr(memtrain, "train_step", lambda *a: calls.append(a[2]) or step(*a))
    assert main(command) == 0 and calls == [1], "from the step before, whatever the .json said"
    assert json.loads(path.with_suffix(".json").read_text())["done"]


def test_every_module_loads_without_unix():
    """As on Windows: no fcntl, no resource, no SIGHUP."""
    files = [ROOT / "memtrain.py", *(p for room in ("data", "kernels", "eval") for p in (ROOT / room).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files
             if p.name not in ("compile.py", "__main__.py")]  # the first compiles kernels, and needs Triton
    code = f"""
import importlib, signal, sys
del signal.SIGHUP
sys.modules |= dict.fromkeys(("fcntl", "resource", "termios"))
for name in {names}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(names) > 50, done.stderr


def test_one_process_a_run_folder(folder, base_checkpoint, capsys):
    """The lock goes with its process: what a killed one leaves behind locks nobody out."""
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "0"]
    Path("runs/t").mkdir(parents=True)
    hold = ("import filelock, time; lock = filelock.FileLock('runs/t/.lock').acquire();"
            "print('held', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        refused(capsys, command, "runs/t", "another process", "--run")
        other.kill()
    assert main(command) == 0


SHORT = ["--stages", "memtrain,memagent,eval,report", "--memagent-steps", "1", "--eval-lengths", "1", "--eval-masked",
         "1"]  # to its report without search, which takes longest


@pytest.mark.parametrize("room", [1_000, 10_000])  # bytes a file may have: no configuration; no checkpoint
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(room, folder, base_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--memtrain-steps", "1", *SHORT]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        assert main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("memtrain: runs/t") and "make room" in line
    assert not list(folder.rglob("*.tmp"))
    assert main(command) == 0 and Path("runs/t/report.md").exists()


@pytest.fixture
def small_disk(folder):
    """small_disk(kilobytes): a file system of that size is mounted as runs/, or resized."""
    Path("runs").mkdir()

    def size(kilobytes: int) -> None:
        option = "remount," * os.path.ismount("runs") + f"size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", "runs"], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no right to mount a file system here")

    yield size
    subprocess.run(["umount", str(folder / "runs")], capture_output=True, check=False)


@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount")
@pytest.mark.parametrize("room", [200, 600, 1000])  # fills up with the first checkpoint, the second stage, later
def test_a_disk_that_fills_up(room, small_disk, base_checkpoint, capsys, monkeypatch):
    """A real one: what was saved stays whole, and the run goes on once there is room."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    small_disk(room)
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--memtrain-steps", "2", *SHORT, "--save-every", "1"]
    assert main(command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("memtrain: runs/t") and "make room" in line
    for path in Path("runs").glob("t/*/*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["digest"]
    small_disk(60_000)
    assert main(command) == 0 and Path("runs/t/report.md").exists() and not list(Path("runs").rglob("*.tmp"))


def test_a_run_folder_of_another_configuration(folder, base_checkpoint, capsys, monkeypatch):
    """The field that differs is named and nothing is touched; what may differ, may."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "0"]
    assert main(command) == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    refused(capsys, [*command, "--lr", "0.5"], "runs/t", f"lr={memtrain.Config.lr}", "0.5", "--run", "delete")
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()} == before
    assert main([*command, "--stages", "memtrain", "--device", "cpu", "--debug"]) == 0


@pytest.mark.parametrize(("change", "part"), [
    ({"forgetting": 0.0}, "forgetting is no option"), ({"window": "280"}, "window is '280', not of type int"),
    ({"kl": None}, "kl is None"), ({"tied": 1}, "tied is 1"), ({"seed": True}, "seed is True"),
    ({"lr": 1}, ""), ({}, "")])
def test_nothing_in_a_runs_configuration_is_dropped(change, part, folder):
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(parse(TINY)) | change))
    if part:
        with pytest.raises(InputError, match=part):
            read_config(folder / "config.json", "give another")
    else:
        assert read_config(folder / "config.json", "") == dataclasses.replace(parse(TINY), **change)


def test_an_output_folder_that_cannot_be_written(folder, base_checkpoint, capsys):
    (folder / "runs").write_text("a file where the folder should be")
    refused(capsys, [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain"], "runs/t", "writable")


def test_debug_shows_the_traceback(folder):
    with pytest.raises(memtrain.InputError):
        main([*TINY, "--corpus", "nope.jsonl", "--stages", "memtrain", "--debug"])


BOMB = b"cposix\nsystem\n(S'touch exploded'\ntR."  # a pickle that runs a command when it is loaded


def test_a_pickle_is_refused_unexecuted_wherever_a_file_is_read(folder, base_checkpoint, capsys, monkeypatch):
    import eval.report.page
    from data.weights.loading import load_tokenizer

    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    pickle = importlib.import_module("pickle")
    with pytest.raises(TypeError):  # what it returned is no object
        pickle.loads(BOMB) + ""
    assert Path("exploded").exists(), "the bomb has to be a bomb"
    Path("exploded").unlink()
    write(**{f"c__{ending}": BOMB for ending in ("jsonl", "json", "txt", "parquet", "pkl")}, t__tiktoken=BOMB,
          b__safetensors=BOMB)
    for ending in ("jsonl", "json", "txt", "parquet", "pkl"):
        refused(capsys, [*TINY, "--corpus", f"c.{ending}", "--stages", "memtrain", "--init", "x"], f"c.{ending}")
    for ending in ("json", "jsonl", "pkl"):
        refused(capsys, [*TINY, "--corpus", "c.txt", "--questions", f"c.{ending}", "--stages", "eval"], "c.")
        with pytest.raises(memtrain.InputError, match=f"c.{ending}"):
            load_questions(f"c.{ending}")
    refused(capsys, [*TINY, "--init", "b.safetensors", "--stages", "memtrain"], "b.safetensors", "can't be read")
    with pytest.raises(memtrain.InputError, match=r"t\.tiktoken"):
        load_tokenizer("t.tiktoken")
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "0"]
    for name, said in (("config.json", "config.json"), ("memtrain/checkpoint.safetensors", "checkpoint"),
                       ("results.json", "results.json")):
        shutil.rmtree("runs", ignore_errors=True)
        path = Path("runs/t", name)
        path.parent.mkdir(parents=True)
        path.write_bytes(BOMB)
        if name == "results.json":
            assert eval.report.page.main(["runs/t"]) == 2 and said in capsys.readouterr().err
        else:
            refused(capsys, command, said)
    assert not list(folder.rglob("exploded"))


def test_no_code_of_ours_could_load_a_pickle():
    """Nor run text as code: what is loaded is JSON, safetensors, parquet or plain text."""
    unsafe = re.compile(r"\b(pickle|cPickle|dill|joblib|marshal|shelve)\b(?! anywhere)|torch\.(load|save)\b"
                        r"|(np|numpy)\.load(?!\(\w+, allow_pickle=False\))|allow_pickle=True|"
                        r"trust_remote_code=True|(?<![\w.])(eval|exec)\(|yaml\.load")
    sources = [p for p in ROOT.rglob("*.py") if not {"tests", "runs", ".git"} & set(p.relative_to(ROOT).parts)]
    assert len(sources) > 20
    found = [f"{p.relative_to(ROOT)}:{n}: {line.strip()}" for p in sources
             for n, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1) if unsafe.search(line)]
    assert found == []


# ---- what lies in a run folder


@pytest.mark.parametrize("name", ["memtrain", "config.json", ".lock", "metrics.jsonl",
                                  "memtrain/checkpoint.safetensors", "memtrain/previous.safetensors.tmp",
                                  "results.json.tmp"])
def test_nothing_is_followed_out_of_a_run_folder(name, folder, base_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    command = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "0"]
    (folder / "mine").mkdir()
    (folder / "mine" / "precious").write_text("do not touch")
    link = folder / "runs/t" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(folder / "mine" if name == "memtrain" else folder / "mine" / "precious")
    refused(capsys, command, f"runs/t/{name}", "symbolic link", "in its place")
    assert link.is_symlink() and (folder / "mine" / "precious").read_text() == "do not touch"
    assert [p.name for p in (folder / "mine").iterdir()] == ["precious"]


def test_a_run_folder_may_itself_be_a_link(folder, base_checkpoint, monkeypatch):
    """To another disk, where there is room."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    (folder / "disk").mkdir()
    (folder / "runs").mkdir()
    (folder / "runs/t").symlink_to(folder / "disk")
    assert main([*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps",
                 "1"]) == 0
    assert (folder / "disk/memtrain/checkpoint.safetensors").exists()


def test_the_last_two_checkpoints_and_the_best_are_kept(folder, base_checkpoint, monkeypatch):
    """The best by the mean reward of the last five steps; as links, which cost no room."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    rewards, step = [0.0, 0.5, 1.0, 0.9, 0.9, 0.1, 0.1], memtrain.train_step
    monkeypatch.setattr(memtrain, "train_step", lambda run, kind, n, *rest: step(run, kind, n, *rest) | {
        "reward": rewards[n]})
    assert main([*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "7",
                 "--save-every", "1"]) == 0
    path, steps = Path("runs/t/memtrain/checkpoint.safetensors"), {}
    for name in ("checkpoint", "previous", "best"):
        with safe_open(path.with_name(f"{name}.safetensors"), "pt") as file:
            steps[name] = json.loads(file.metadata()["state"])["step"]
    assert steps == {"checkpoint": 7, "previous": 6, "best": 6}, "means: 0 .25 .5 .6 .66 .68 .60"
    assert path.with_name("best.safetensors").stat().st_ino == path.with_name("previous.safetensors").stat().st_ino
    assert sorted(p.name for p in path.parent.iterdir()) == ["best.safetensors", "checkpoint.json",
                                                             "checkpoint.safetensors", "previous.safetensors"]


def test_without_hard_links_checkpoints_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not permitted")
    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "a").write_text("x")
    second_name(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "x" and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


# ---- the configuration


def test_help_explains_every_field_in_its_group(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # lines are wrapped at spaces and at hyphens
    for f in dataclasses.fields(Config):
        assert f"--{f.name.replace('_', '-')}" in text and f"{f.metadata['group']}:--" in text
        assert "".join(f.metadata["help"].split()) in text


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--grup", 2), ("--group=1", 2)])
def test_the_command_line_is_checked_before_torch_is_loaded(argument, code):
    program = (f"import runpy, sys\nsys.argv = ['memtrain.py', {argument!r}]\n"
               f"try:\n    runpy.run_path({str(ROOT / 'memtrain.py')!r}, run_name='__main__')\n"
               f"except SystemExit as e:\n    assert e.code == {code}, e.code\n"
               "assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=20, capture_output=True)


def test_every_field_can_be_given_both_ways():
    for f in dataclasses.fields(Config):
        kind = {"int": int, "float": float, "bool": bool, "str": str}[f.type]
        assert type(f.default) is kind and f.metadata["help"]
    assert parse(["--eval_lengths=1,2", "--micro-tokens", "99", "--tied", "--embed-norm", "no"]) == dataclasses.replace(
        Config(), eval_lengths="1,2", micro_tokens=99, tied=True, embed_norm=False, run="nano")
    assert parse(["--run", "x"]).run == "x"


# ---- logs


class FakeWandb(types.ModuleType):
    """Stands in for the package where it is not installed: notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.rows, self.axes = [], [], []

    def init(self, **settings):
        self.calls.append(settings)
        return types.SimpleNamespace(log=self.rows.append, finish=lambda: None, define_metric=self.axis)

    def axis(self, name, step_metric):
        self.axes.append((name, step_metric))


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_gets_every_row(mode, folder, tiny, monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    c = tiny("--run", "t", "--wandb", mode)
    (folder / "runs/t").mkdir(parents=True)
    log = Log(folder / "runs/t", dataclasses.asdict(c))
    log.write({"stage": "memtrain", "step": 0, "reward": 0.5})
    log.close()
    assert fake.calls[0]["mode"] == mode and fake.calls[0]["name"] == "t"
    assert fake.calls[0]["config"]["seed"] == 3 and Path(fake.calls[0]["dir"]) == folder / "runs/t"
    assert fake.rows == [{"memtrain/step": 0, "memtrain/reward": 0.5}]
    assert ("memtrain/*", "memtrain/step") in fake.axes, "curves go on where a stage does, whatever wandb counts"
    assert json.loads((folder / "runs/t/metrics.jsonl").read_text()) == {"stage": "memtrain", "step": 0, "reward": 0.5}
    assert "note" not in capsys.readouterr().out
    Log(folder / "runs/t", dataclasses.asdict(c)).close()
    assert fake.calls[1]["group"] == fake.calls[0]["group"]
    said = capsys.readouterr().out
    if mode == "online":
        assert fake.calls[1]["id"] == fake.calls[0]["id"] and fake.calls[1]["resume"] == "allow", "one curve"
        assert said == ""
    else:
        assert fake.calls[1]["id"] != fake.calls[0]["id"], "else syncing one would replace the other"
        assert said.count("note: wandb: offline") == 1 and fake.calls[1]["id"] in said
    Log(folder / "runs", dataclasses.asdict(c)).close()
    assert fake.calls[2]["id"] != fake.calls[0]["id"], "another folder is another run, whatever its name"


@pytest.mark.parametrize("outage", ["init", "log"])
def test_without_wandb_a_run_goes_on_after_one_note(outage, folder, tiny, monkeypatch, capsys):
    fake = FakeWandb()

    def broken(*_, **__):
        raise OSError("no \x1b[31mnetwork\nat all")
    if outage == "init":
        fake.init = broken
    else:
        fake.init = lambda **_: types.SimpleNamespace(log=broken, finish=lambda: None, define_metric=fake.axis)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    c, rows = tiny("--run", "t", "--wandb", "online"), [{"stage": "memtrain", "step": i} for i in range(3)]
    log = Log(folder, dataclasses.asdict(c))
    for row in rows:
        log.write(row)
    log.close()
    notes = capsys.readouterr().out.strip().splitlines()
    assert len(notes) == 1 and notes[0].startswith("note: wandb: ") and "metrics.jsonl" in notes[0]
    assert "\\x1b[31mnetwork at all" in notes[0] and "\x1b" not in notes[0]
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == rows


def test_wandb_that_is_not_installed(folder, capsys, base_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(capsys, [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--wandb", "offline"],
            "--wandb offline", "pip install wandb")


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_offline_writes_a_local_run(folder, tiny):
    """The real package, without a network, in a process of its own: it starts services."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from data.run.folder import Log;"
            "log = Log(Path('.'), {'run': 't', 'wandb': 'offline', 'stages': 'memtrain'});"
            "log.write({'stage': 'memtrain', 'step': 0, 'reward': 0.5}); log.close()")
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, timeout=100, capture_output=True)
    assert list(folder.glob("**/offline-run-*/*.wandb"))


def test_the_log_forgets_what_a_resumed_run_does_again(folder, tiny):
    log = Log(folder, dataclasses.asdict(tiny()))
    rows = [{"stage": s, "step": i} for s in ("memtrain", "memagent") for i in range(3)]
    for row in rows:
        log.write(row)
    with log.path.open("a") as file:
        file.write('{"stage": "mema')
    log.rewind("memagent", 1)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == rows[:4]


# ---- the whole command

SMOKE = [*TINY, "--run", "smoke", "--stages", "base,memtrain,memagent,eval,report", "--memtrain-steps", "2",
         "--memagent-steps", "2"]
TIMES = {"seconds", "seconds_sampling", "tokens_per_s"}


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


FEW_GATES = """
import runpy, sys
del sys.argv[0]
sys.path.insert(0, sys.argv[0].removesuffix("memtrain.py"))
import eval.gates
eval.gates.gates = lambda agent, c, gates=eval.gates.gates: gates(agent, c, 2)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The command as a user runs it, but with two problems a gate, its output in files: (folder, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("smoke")
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        done = subprocess.run([sys.executable, "-c", FEW_GATES, str(ROOT / "memtrain.py"), *SMOKE], cwd=folder,
                              stdout=out, stderr=err, timeout=170, check=False)
    assert done.returncode == 0, (folder / "err").read_text()[-2000:]
    return folder, (folder / "out").read_text(), (folder / "err").read_text()


def test_the_whole_command(smoke):
    folder, out, err = smoke
    run = folder / "runs/smoke"
    assert {"report.md", "report.html", "table1.svg", "results.json", "config.json"} <= {p.name for p in run.iterdir()}
    assert "\x1b" not in out + err and "Warning" not in err
    for word in ("device", "kernels", "corpus", "entities: rules", "window", "tokens a step", "minutes", "gate"):
        assert word in out
    assert {p.name for p in folder.iterdir()} == {"runs", "out", "err"}, "everything is under runs/"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [("base", i) for i in range(5)] + [
        (s, i) for s in ("memtrain", "memagent", "memtrain+memagent") for i in range(2)]
    report = (run / "report.md").read_text()
    assert "MemTrain" in report and (report in out or report.splitlines()[0] in out)


def test_results_have_the_promised_form(smoke):
    results = json.loads((smoke[0] / "runs/smoke/results.json").read_text())
    assert {"environment", "config", "long_qa", "recall", "stages"} <= results.keys()
    systems = {"base-one-window", "base", "memtrain", "memagent", "memtrain+memagent"}
    fields = {"system", "seed", "length", "sections", "tokens", "n", "em", "em_low", "em_high", "f1"}
    assert {(r["system"], r["length"]) for r in results["long_qa"]} == {(s, n) for s in systems for n in (1, 2)}
    assert all(fields <= r.keys() and r["seed"] == 3 and r["n"] == 4 for r in results["long_qa"])
    assert {r["system"] for r in results["recall"]} == systems - {"base-one-window"}
    sizes = {n: {(r["sections"], r["tokens"]) for r in results["long_qa"] if r["length"] == n} for n in (1, 2)}
    assert all(len(s) == 1 for s in sizes.values()), "every system reads the same documents"
    stages = {s["name"]: s for s in results["stages"]}
    assert stages.keys() == systems - {"base-one-window"}
    for name, stage in stages.items():
        assert {"steps", "seconds", "tokens_sampled", "tokens_trained", "reward_first", "reward_last"} <= stage.keys()
        assert stage["steps"] == (5 if name == "base" else 2) and stage["seconds"] >= 0
    assert {"commit", "device", "threads", "torch", "command", "kernels"} <= results["environment"].keys()
    assert results["config"] == dataclasses.asdict(parse(SMOKE))
    state = json.loads((smoke[0] / "runs/smoke/base/checkpoint.json").read_text())
    assert state["done"] and state["gates"] and state["config"]["width"] == 24


def test_one_seed_gives_one_run(smoke, folder, monkeypatch):
    """The same command in another folder and process state: the same metrics, figures and weights."""
    monkeypatch.setattr("eval.gates.gates", lambda agent, c: {})
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    assert main(SMOKE) == 0
    one, two = smoke[0] / "runs/smoke", folder / "runs/smoke"
    rows = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (one, two)]
    assert timeless(rows[0]) == timeless(rows[1]) and any(r.get("loss") for r in rows[0])
    results = [json.loads((p / "results.json").read_text()) for p in (one, two)]
    for section in ("config", "long_qa", "recall", "masked"):
        assert results[0][section] == results[1][section], section
    assert timeless(results[0]["stages"]) == timeless(results[1]["stages"])
    for path in one.glob("*/checkpoint.safetensors"):
        with safe_open(path, "pt") as a, safe_open(two / path.relative_to(one), "pt") as b:
            assert all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in a.keys())  # noqa: SIM118


def test_every_metric_is_explained_in_the_readme(smoke):
    readme = (ROOT / "eval/README.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`(\w+)`", readme))
    names = set()
    for line in (smoke[0] / "runs/smoke/metrics.jsonl").read_text().splitlines():
        names |= json.loads(line).keys()
    assert names - {"stage", "step", "seconds", "seconds_sampling", "tokens"} - explained == set()


def test_a_checkpoint_of_any_stage_starts_a_run(smoke, folder, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    for stage in ("base", "memagent"):
        shutil.copy(smoke[0] / f"runs/smoke/{stage}/checkpoint.safetensors", folder / f"{stage}.safetensors")
        assert main([*TINY, "--run", stage, "--stages", "memtrain", "--memtrain-steps", "1",
                     "--init", f"{stage}.safetensors"]) == 0
        assert json.loads((folder / f"runs/{stage}/memtrain/checkpoint.json").read_text())["done"]


def test_real_text_runs_to_its_report(folder, base_checkpoint, monkeypatch):
    """Passages and questions from files, no stage on invented text."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    write(c__jsonl=passages(250), q__jsonl=questions(*range(6)), t__jsonl=questions(*range(6, 9)))
    assert main([*TINY, "--corpus", "c.jsonl", "--questions", "q.jsonl", "--train-questions", "t.jsonl",
                 "--run", "real", "--init", base_checkpoint(), "--memtrain-steps", "1", "--memagent-steps", "1",
                 "--eval-masked", "2", "--eval-lengths", "1", "--turns", "3"]) == 0
    results = json.loads((folder / "runs/real/results.json").read_text())
    assert len(results["long_qa"]) == 5 and all(r["n"] == 4 for r in results["long_qa"])
    assert "learns little from real text" in (folder / "runs/real/report.md").read_text()


def test_evaluation_without_masked_documents(folder, base_checkpoint, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    assert main([*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "eval", "--eval-masked", "0",
                 "--eval-lengths", "1"]) == 0
    results = json.loads((folder / "runs/t/results.json").read_text())
    assert len(results["long_qa"]) == 2 and not any(r["n"] for r in results["recall"] + results["masked"])


def test_a_finished_run_can_be_evaluated_at_more_lengths(folder, base_checkpoint, monkeypatch):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    seen, base = [], base_checkpoint()
    for lengths in ("1", "1,2"):
        assert main([*TINY, "--run", "t", "--init", base, "--stages", "eval", "--eval-masked", "0",
                     "--eval-lengths", lengths]) == 0
        seen.append(json.loads((folder / "runs/t/results.json").read_text())["long_qa"])
    assert seen[1][:2] == seen[0] and [(r["system"], r["length"]) for r in seen[1]] == [
        ("base", 1), ("base-one-window", 1), ("base", 2), ("base-one-window", 2)]


def test_what_is_kept_on_the_way_is_evaluated_apart(folder, base_checkpoint, lottery, monkeypatch):
    """memagent@1 of a run of two steps is the policy of a run of one; on the development world its results stand
    apart from the others."""
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    base = [*TINY, "--init", base_checkpoint(), "--eval-masked", "0", "--eval-lengths", "1"]
    two = [*base, "--run", "two", "--memagent-steps", "2", "--keep-steps", "1"]
    assert main([*base, "--run", "one", "--stages", "memagent", "--memagent-steps", "1"]) == 0
    assert main([*two, "--stages", "memagent"]) == 0
    one, kept, end = (load_file(f"runs/{p}/checkpoint.safetensors") for p in (
        "one/memagent", "two/memagent@1", "two/memagent"))
    assert all(torch.equal(kept[k], one[k]) for k in one) and not all(torch.equal(end[k], one[k]) for k in one)
    for world in ("eval", "dev"):
        assert main([*two, "--stages", "eval,report", "--world", world, "--eval-systems", "memagent,memagent@1"]) == 0
    both = [json.loads(Path(f"runs/two/{part}results.json").read_text()) for part in ("", "dev/")]
    assert all({r["system"] for r in b["long_qa"]} == {"memagent", "memagent@1"} for b in both)
    assert [b["config"]["world"] for b in both] == ["eval", "dev"] and Path("runs/two/dev/report.md").exists()
    named = ["development world" in Path(f"runs/two/{part}report.md").read_text() for part in ("", "dev/")]
    assert named == [False, True]
