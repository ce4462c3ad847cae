"""Measure the images that adapters draw in eight styles which the tiny base was not trained on."""
