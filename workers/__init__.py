"""Programs that run ComfyUI's executor without a server, alone or several together."""
