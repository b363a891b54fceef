"""Bounds as pure functions: how far a policy is from the best that could be done."""
