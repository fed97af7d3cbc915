"""Runs tests/fake_card.py where PyTorch believes that it was built for CUDA: the path of a GPU, without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA: `pytest -m gpu` shows more")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, for a library of thirty lines")
def test_every_step_goes_through_on_a_pretended_card(tmp_path):
    """A decoder made and moved, weights loaded, the sampler, a GRPO step, a step of the base, documents read; and the
    faults that once kept the main command from starting on a card, put back: each is noticed."""
    library = tmp_path / "fake_card.so"
    subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", HERE / "fake_card.cpp", "-o", library, "-I",
                    TORCH / "include", "-L", TORCH / "lib", "-lc10", "-ltorch_cpu"], check=True)
    run = ("import os, sys, pytest; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); "
           "os._exit(code)")  # the engine's threads would be missed at the end
    environment = os.environ | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(TORCH / "lib"),
                                "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", run, str(HERE / "fake_card.py"), "-q", "-p", "no:cacheprovider",
                           "--tb=short"], capture_output=True, text=True, env=environment, cwd=HERE.parent, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0 and "failed" not in done.stdout
