"""The published models that can be brought in: one file per family, each a table of names."""

from slm_jax.checkpoints.families import gemma3n, t5, w2v_bert, wav2vec2, whisper
from slm_jax.checkpoints.families.base import Family

FAMILIES: tuple[Family, ...] = (
    t5.FAMILY,
    gemma3n.FAMILY,
    w2v_bert.FAMILY,
    whisper.FAMILY,
    wav2vec2.FAMILY,
)
