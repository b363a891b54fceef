"""Models: shapes read from configs, one decoder for the dense families, loaders and tokenizers."""
