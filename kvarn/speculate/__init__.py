"""Speculation: proposers of drafts, control of their length, and what learns from verification."""
