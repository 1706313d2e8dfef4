"""The published models that can be brought in: one file per family, each a table of names."""

from slm_jax.checkpoints.families.base import Family

FAMILIES: tuple[Family, ...] = ()
