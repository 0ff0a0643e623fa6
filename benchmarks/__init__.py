"""Benchmarks, run from a checkout: `python -m benchmarks.samplers`, then `python -m
benchmarks.tables`."""
