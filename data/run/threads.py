"""How the CPU's threads wait for each other. OpenMP reads it when torch is loaded: call spin_briefly before.

By default a thread of GNU OpenMP that has nothing to do looks 300,000 times, some milliseconds, whether there is work
again. Beside another busy process it then keeps from its core the very thread that it waits for: four steps took 318 s
instead of 16. A thread that never looks has to be woken every time: 24 s on idle cores.
"""

from __future__ import annotations

import os

SPINS = "10000"  # looks, a few tenths of a millisecond; `python -m eval.bench threads` measures it beside the others
CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # by the user, who is obeyed


def spin_briefly() -> None:
    """Sets GOMP_SPINCOUNT, for this process and those it starts, unless one of CHOSEN is set."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ["GOMP_SPINCOUNT"] = SPINS
