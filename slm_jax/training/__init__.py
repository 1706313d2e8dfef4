"""State, step, objectives, optimizers and the loop."""
