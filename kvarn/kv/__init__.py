"""The KV cache: who owns which page (left), and where the pages' bytes are (`pool`, right)."""
