"""Readers of other people's checkpoints: names, shapes and values of their tensors, one tensor at a time."""
