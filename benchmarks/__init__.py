"""Benchmarks: `python -m benchmarks.NAME`. Each one compares within one run, because machines differ."""
