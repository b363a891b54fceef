"""Which of the KV stays, and which of it is read: eviction and selection. See `part`."""
