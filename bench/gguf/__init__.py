"""Training from GGUF files."""
