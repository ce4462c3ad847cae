"""Measurements of the pack; see bench/README.md."""
