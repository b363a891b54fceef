"""Benchmarks: offline, serve, latency, startup, and the comparison of two results.

Every result is one JSON object: a header (`kvarn.bench.record`), the workload, and the numbers
under the key names of the corresponding `vllm bench` command, so that existing tools read it.
"""
