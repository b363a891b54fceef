"""Training of drafters and acceptance heads, before and while serving."""
