"""The device image of a plan: rows, batches, sampler, memory ledger. Executes `StepPlan`s."""
