"""An SLM inside T5X: a model, its batches, its state. No other room imports t5x, or this one."""
