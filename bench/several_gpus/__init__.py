"""Measurements on several GPUs."""
