"""Benchmarks, run from a checkout.

For example `python -m benchmarks.samplers`, then `python -m benchmarks.tables`.
"""
