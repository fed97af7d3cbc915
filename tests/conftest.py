"""Shared by all tests: one thread, a tiny policy whose every part matters, a small world, a reward that varies."""

import os
import signal
import sys
import time
import timeit
import types
import zlib
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, hence before the imports below

sys.path.insert(0, str(Path(__file__).parents[1]))

import memtrain
from data.run.terminal import note
from data.weights.loading import load_tokenizer
from data.world.miniwiki import MiniWorld

# A model and a step small enough for a second; windows, prompts and tokenizer are those of the nano preset.
TINY = {"width": 24, "hidden": 40, "layers": 2, "heads": 4, "key-heads": 2, "head-size": 8, "people": 60,
        "base-people": 60, "passages": 12, "related": 3, "train-sections": 2, "documents": 2, "update-documents": 2,
        "group": 3, "recall-group": 2, "eval-lengths": "1,2", "eval-questions": 4, "eval-masked": 3,
        "base-copy-steps": 2, "base-steps": 3, "base-documents": 1, "base-answers": 2, "base-recalls": 1,
        "base-directs": 1, "base-searches": 1, "mem1-steps": 2, "eval-pairs": 2, "threads": 1, "seed": 3, "kl": 1e-3}
TINY = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]


def cpu_seconds(call) -> float:
    """CPU time of a call: the best of three, without the garbage collector, which walks what other tests left."""
    return min(timeit.repeat(call, number=1, repeat=3, timer=time.process_time))


def waited(condition, seconds=60) -> bool:
    """Whether it comes true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return bool(condition())


@pytest.fixture(autouse=True)
def undisturbed():
    """One thread, as beside a training; a run installs signal handlers, which must not outlive its test."""
    torch.set_num_threads(1)
    note.cache_clear()  # said once a process, and a test is one
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def world():
    return MiniWorld(60, 0, "train")


@pytest.fixture(scope="session")
def tiny():
    """tiny("--group", "4") -> Config; the stages need no evaluation data."""
    return lambda *extra: memtrain.parse([*TINY, "--stages", "memtrain,memagent", *extra])


@torch.no_grad()
def randomise(model, seed: int = 0):
    """No projection stays at zero and no norm at one: a mistake anywhere shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.3 if name == "embed" else 1.5 * p.shape[-1] ** -0.5
        p.copy_(1 + 0.2 * noise if p.ndim == 1 else scale * noise)
    return model


@pytest.fixture(scope="session")
def decoder(tiny):
    """decoder(config or None, vocabulary, seed) -> Decoder with random weights everywhere (LoRA's B included)."""
    return lambda c=None, vocab=29, seed=0: randomise(memtrain.Decoder(c or tiny(), vocab), seed)


@pytest.fixture
def agent(tiny, decoder, tokenizer):
    """agent("--group", "4") -> Agent over a random policy."""
    def build(*extra):
        c = tiny(*extra)
        return memtrain.Agent(decoder(c, tokenizer.size), tokenizer, c)
    return build


@pytest.fixture
def lottery(monkeypatch):
    """A random policy never earns a reward, so no gradient would flow: here a hash of what it wrote decides."""
    monkeypatch.setattr(memtrain.Agent, "boxed", lambda self, turn: self.tokenizer.decode(turn.sampled))
    monkeypatch.setattr(memtrain, "exact_match", lambda text, answers: float(zlib.crc32(text.encode()) % 2))
    monkeypatch.setattr(memtrain.Search, "hits", property(drawn_hits))


def drawn_hits(episode) -> list[float]:
    return [float(zlib.crc32(repr(episode.turns[-1].sampled).encode()) % 2)] * len(episode.problem.answers)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory: runs/ is created in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base_checkpoint(tmp_path_factory, tiny, decoder, tokenizer):
    """base_checkpoint("--layers", "1") -> path of a checkpoint of a random policy of that shape."""
    def build(*extra, tokenizer=tokenizer):
        c = tiny(*extra)
        path = tmp_path_factory.mktemp("base") / "base.safetensors"
        state = {"stage": "base", "step": 1, "done": True}
        memtrain.save_checkpoint(path, decoder(c, tokenizer.size), tokenizer, state)
        return str(path)
    return build


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(rows or an exception) -> list of what load_dataset is asked for; nothing is cached yet."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def serve(rows):
        asked = []

        def load_dataset(*args, **options):
            asked.append((args, options))
            if isinstance(rows, Exception):
                raise rows
            return iter(rows)

        def api():
            return types.SimpleNamespace(dataset_info=lambda name, revision, timeout: None)

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=api))
        return asked

    return serve
