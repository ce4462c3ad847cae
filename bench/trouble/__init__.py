"""Measure a real server's memory over many trainings and with very large datasets."""
