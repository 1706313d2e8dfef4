"""Where references come from: SeqIO data sources of texts and numbers, never audio."""

from slm_jax.data.sources.base import Columns, ReferenceSource
from slm_jax.data.sources.manifest import ManifestSource
from slm_jax.data.sources.shards import ShardSource

__all__ = ["Columns", "ManifestSource", "ReferenceSource", "ShardSource"]
