"""Benchmarks: figures in tables, no assertions. `make bench`; docs/benchmarks.md says what they mean.

Each benchmark is a module with `run(bench) -> Result`; `__main__` knows them by name.
"""
