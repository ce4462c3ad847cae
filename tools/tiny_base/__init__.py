"""How the tiny base model is made: its pictures, its training, its measurement."""
