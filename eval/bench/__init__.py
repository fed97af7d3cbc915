"""Benchmarks, which measure memtrain.py from outside: `python -m eval.bench`."""
