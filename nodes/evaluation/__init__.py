"""Evaluate AC-LoRA: drawn images are compared with real ones, and with what the base draws."""
