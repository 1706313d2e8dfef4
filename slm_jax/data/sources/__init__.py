"""Where references come from: SeqIO data sources of texts and numbers, never audio."""

from slm_jax.data.sources.base import Columns, ReferenceSource
from slm_jax.data.sources.manifest import ManifestSource

__all__ = ["Columns", "ManifestSource", "ReferenceSource"]
