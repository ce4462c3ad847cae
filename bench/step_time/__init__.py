"""Time a training step of the pack, of ComfyUI's own node and of a bare PyTorch loop."""
