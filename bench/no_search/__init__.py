"""Compare AC-LoRA, without a search for the rank, with the best of a grid of ranks and steps."""
