"""Load the pack's nodes where this ComfyUI can run them, and else say in one sentence why not.

ComfyUI prints that sentence; nodes/web/missing_nodes.js says it in the browser. Nothing is registered half: without the
nodes the templates are not offered either.
"""

from .load import MINIMUM, load_extension

__all__ = ["MINIMUM", "load_extension"]
