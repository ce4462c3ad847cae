"""The pack's nodes, which ComfyUI lists under "AC-LoRA": extension.py names them.

Importing this loads none of them, so that `compatibility` can look at ComfyUI first.
"""
