"""Proposers: who guesses the next tokens; one file, one technique."""
