"""A training on several GPUs, by processes beside ComfyUI's server.

The server takes no part in their process group, so that a fault in one of them can neither hang nor end it. They load
the model by the nodes before the training, and get all else from the server.
"""
