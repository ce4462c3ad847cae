"""Nodes that change how a training goes; each hands what it sets on to the next, and the last to Train AC-LoRA."""
