"""Benchmarks: bytes kept for backward, equality and speed, each against Algorithm 1 as the paper writes it.

`python -m svf_fast.bench.kept`, `.episode`, `.equality`, `.speed`; each prints a table and, with `--out DIR`, writes JSON."""
