"""How the tiny base model is made: its images, its training, its measurement."""
