"""The KV cache as numbers: who owns which page, what is shared, what goes first."""
