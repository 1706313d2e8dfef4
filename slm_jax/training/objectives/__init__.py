"""What a run minimises: one file per objective, all with the interface of `base.Objective`."""
