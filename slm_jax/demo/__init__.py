"""The embedded corpus and its tiny foundation models."""
