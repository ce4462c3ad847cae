"""Train AC-LoRA, what it shows while it runs, and its options."""
