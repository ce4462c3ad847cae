"""Make the screenshots of the documentation, with the real ComfyUI in a headless browser."""
