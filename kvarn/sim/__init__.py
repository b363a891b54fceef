"""The engine's own control plane under a virtual clock and a priced executor."""
