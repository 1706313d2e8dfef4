"""Checkpoints of runs and of frozen foundation models, with their provenance."""
