"""Computation, one file an operation: reference (the oracle), fast forms, and a micro-benchmark."""
