"""The loop (plan, execute, apply) that joins decisions and computation; `LLM`, its Python face."""
