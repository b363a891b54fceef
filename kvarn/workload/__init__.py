"""Traces, arrival processes, lengths and prompt sources: what is asked of a system, and when."""
