"""Load AC-LoRA Dataset: a folder becomes latents and conditionings."""
