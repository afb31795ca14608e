"""Benchmarks: each room beside its peers, measured in one process and interleaved."""
