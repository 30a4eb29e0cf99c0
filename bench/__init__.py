"""Benchmarks: what is kept for backward, equality, speed, each against Algorithm 1 in the same run."""
