"""Measurements that anyone can run: `python -m benchmarks.NAME`; each compares in one run, since machines differ."""
