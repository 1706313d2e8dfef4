"""From references to placed batches: sources, index, plan, late loading, iterator."""
