"""Artifacts for serving, each checked against the model that it came from."""
