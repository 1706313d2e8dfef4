"""The published models that can be brought in: one file per family, each a table of names."""

from slm_jax.checkpoints.families import wav2vec2, whisper
from slm_jax.checkpoints.families.base import Family

FAMILIES: tuple[Family, ...] = (whisper.FAMILY, wav2vec2.FAMILY)
