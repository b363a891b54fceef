"""Several engines behind a router: policies as state machines, drivers that carry them out."""
