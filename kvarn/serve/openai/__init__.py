"""The OpenAI-compatible endpoints: completions, chat, embeddings, models."""
