"""What run.py is made of: a ComfyUI to run in, its Python, a server, and a client that follows a workflow."""
