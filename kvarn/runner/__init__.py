"""The device image of a plan: rows, batches, the sampler, the memory ledger. Executes `StepPlan`s."""
