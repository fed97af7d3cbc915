"""How the CPU's threads wait for each other. OpenMP reads it when torch is loaded: call spin_briefly before.

By default a thread of GNU OpenMP that has nothing to do looks 300,000 times whether there is work again. A look takes
22 ns on a shared AMD EPYC, all of them 6.6 ms, which is longer than a turn on a core: beside another busy process it
keeps from its core the very thread that it waits for. A thread that never looks has to be woken every time.
Seconds of each way stand in kernels/README.md, "Threads beside other work".
"""

from __future__ import annotations

import os

SPINS = "1000"  # looks, 0.02 ms: idle as fast as any other number, kernels/README.md
CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # by the user, who is obeyed


def spin_briefly() -> None:
    """Sets GOMP_SPINCOUNT, for this process and those it starts, unless one of CHOSEN is set."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = SPINS
