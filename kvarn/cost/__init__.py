"""What a step, a transfer and a joule cost: one model of time, energy and links for everybody."""
