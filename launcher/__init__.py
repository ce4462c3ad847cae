"""The parts of run.py: finding or installing ComfyUI, its Python, a server, and a client that follows a workflow."""
