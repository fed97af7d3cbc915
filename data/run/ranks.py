"""The processes that share a run: who this one is, sums over all of them, work dealt out to them.

torchrun started them, or `start` did, on a CPU, of which a small model keeps one core busy. Alone, everything here is
the identity. There is no engine behind it: documents, micro-batches and evaluations are dealt out, gradients are
summed, rank 0 writes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data import InputError

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
FIRST = RANK == 0
STORE: dist.Store | None = None  # what all ranks read and write
STARTED: list[tuple[subprocess.Popen, Any]] = []  # the other ranks, where this process started them; what they said
PATIENCE = timedelta(days=7)  # a rank may have much to do before it meets the others
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # nobody else can connect, and no name of the machine has to resolve
SHARED = "MEMTRAIN_STORE"  # the file of it that `start` hands on; not a port, to which others could write


def start(count: int) -> None:
    """Starts this very command `count` - 1 times more, as the other ranks. They write nothing, and end when this
    process does, however it ends."""
    global WORLD, STORE
    if count == 1 or WORLD > 1:
        return
    file = os.path.join(tempfile.mkdtemp(prefix="memtrain-"), "store")
    STORE, WORLD = dist.FileStore(file, count), count
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    for rank in range(1, count):
        said = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
        environment = os.environ | {"WORLD_SIZE": str(count), "RANK": str(rank), SHARED: file}
        STARTED.append((subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment, stdin=subprocess.PIPE,
                                         stdout=subprocess.DEVNULL, stderr=said), said))


@contextmanager
def together(count: int) -> Iterator[None]:
    """A run of `count` ranks on this machine, or of those that torchrun started. InputError where one is lost."""
    try:
        start(count)
        yield
    except RuntimeError:  # what a rank meets whose neighbour is gone
        if why := lost(patience=1):
            raise InputError(why) from None
        raise
    finally:
        leave()


def _follow() -> None:
    """Ends this process with the one that started it, which holds the other end of standard input."""
    os.read(0, 1)  # not through sys.stdin, whose lock a forked process would wait for
    os._exit(1)


if _file := os.environ.pop(SHARED, None):  # not for the processes that this one starts
    STORE = dist.FileStore(_file, WORLD)
    threading.Thread(target=_follow, daemon=True).start()


def lost(patience: float = 0.0) -> str:
    """What became of a rank that `start` started and that has failed; '' where none has, within so many seconds."""
    for rank, (process, said) in enumerate(STARTED, 1):
        with suppress(subprocess.TimeoutExpired):
            if process.wait(patience):
                said.seek(0)
                (*_, last) = said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
                return f"process {rank} of {WORLD} ended with exit code {process.returncode}: {last}"
    return ""


def join(device: torch.device) -> None:
    """Meets the other processes."""
    global STORE
    if WORLD > 1 and not dist.is_initialized():
        STORE = STORE or next(dist.rendezvous("env://", RANK, WORLD, timeout=PATIENCE))[0]
        STORE.set_timeout(PATIENCE)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, store=STORE, rank=RANK,
                                world_size=WORLD)


def leave() -> None:
    """Ends the ranks that `start` started: this one needs nothing more of them."""
    global STORE
    if dist.is_initialized():
        dist.destroy_process_group()
    for process, said in STARTED:
        process.kill()
        process.wait()
        said.close()
    if isinstance(STORE, dist.FileStore) and FIRST:
        shutil.rmtree(os.path.dirname(STORE.path))
    STORE = None


def wait() -> None:
    if WORLD > 1:
        dist.barrier()


def total(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Each value summed over the ranks, in fp64."""
    if WORLD == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def largest(value: float, device: torch.device | str = "cpu") -> float:
    """The largest value of all ranks."""
    if WORLD == 1:
        return value
    most = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def mean(values: Sequence[float], device: torch.device | str = "cpu") -> float:
    """Mean over the values of all ranks; 0 if there is none."""
    amount, count = total([float(sum(values)), len(values)], device)
    return amount / count if count else 0.0


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all ranks; a rank that had nothing to do adds zeros."""
    if WORLD > 1:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)


def gather(values: list, device: torch.device | str = "cpu") -> list:
    """The values of all ranks, those of rank 0 first; what JSON can hold."""
    if WORLD == 1:
        return values
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    sizes = torch.zeros(WORLD, dtype=torch.long, device=device)
    sizes[RANK] = len(text)
    dist.all_reduce(sizes)
    own = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=device)
    own[:len(text)] = text
    parts = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(parts, own)
    return [v for part, size in zip(parts, sizes.tolist(), strict=True)
            for v in json.loads(part[:size].cpu().numpy().tobytes())]


def deal(jobs: Sequence, chosen: Sequence[int], work: Callable, stop: Callable[[], bool]) -> Iterator[tuple]:
    """(job, work(job)) of the jobs with these places in `jobs`, which all ranks know, at rank 0, as they are done,
    whichever rank did them; the others work, and yield nothing. `chosen` is rank 0's; a result is what JSON can hold.
    Nothing new is begun once stop() says so. Once in the life of a run."""
    if WORLD == 1:
        yield from ((jobs[i], work(jobs[i])) for i in chosen if not stop())
        return
    if FIRST:
        STORE.set("jobs", json.dumps(list(chosen)))
    chosen = json.loads(STORE.get("jobs"))
    waited = list(chosen)  # for the results of these
    while not stop() and (n := STORE.add("taken", 1) - 1) < len(chosen):
        STORE.set(f"result {chosen[n]}", json.dumps(work(jobs[chosen[n]])))
        if FIRST:
            yield from _results(jobs, waited)
    while FIRST and waited and not stop():
        if why := lost():
            raise InputError(why)
        time.sleep(0.05)
        yield from _results(jobs, waited)


def _results(jobs: Sequence, waited: list[int]) -> Iterator[tuple]:
    for i in [i for i in waited if STORE.check([f"result {i}"])]:
        waited.remove(i)
        yield jobs[i], json.loads(STORE.get(f"result {i}"))
        STORE.delete_key(f"result {i}")
