"""SeqIO registrations, one file per family of tasks."""

# Before SeqIO, which imports TensorFlow too.
from slm_jax.data import host_tensorflow

__all__ = ["host_tensorflow"]
