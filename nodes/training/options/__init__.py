"""The options nodes, which are chained to Train AC-LoRA."""
