"""Where references come from: SeqIO data sources of texts and numbers, never audio."""

from slm_jax.data.sources.base import Columns, ReferenceSource
from slm_jax.data.sources.kaldi import KaldiSource
from slm_jax.data.sources.manifest import ManifestSource
from slm_jax.data.sources.nemo import NemoSource
from slm_jax.data.sources.parquet import ParquetSource
from slm_jax.data.sources.shards import ShardSource
from slm_jax.data.sources.table import TableSource
from slm_jax.data.sources.tfds import TfdsSource
from slm_jax.data.sources.webdataset import WebDatasetSource

__all__ = [
    "Columns",
    "KaldiSource",
    "ManifestSource",
    "NemoSource",
    "ParquetSource",
    "ReferenceSource",
    "ShardSource",
    "TableSource",
    "TfdsSource",
    "WebDatasetSource",
]
