"""Benchmarks, which measure memtrain.py from outside: `python -m eval.bench`."""
import sys

from data.run.threads import spin_briefly

spin_briefly()  # before torch is loaded

from eval.bench.main import main  # noqa: E402

sys.exit(main())
