"""SeqIO registrations, one file per family of tasks."""
