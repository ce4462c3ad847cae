"""Nodes on a LoRA: save, load, inspect, resize."""
