"""Tasks on VoxPopuli."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.sources.corpora.voxpopuli import VoxPopuliSource
from slm_jax.tasks.asr import register_asr


def register_voxpopuli(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> str:
    """Registers recognition on one language of VoxPopuli; returns the task's name.

    Args:
      directory: such as `transcribed_data/de`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default such as `voxpopuli_de_asr`.
      splits: beside the published ones, as of `VoxPopuliSource`.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: as `VoxPopuliSource` and `asr.register_asr`.
    """
    source = VoxPopuliSource(directory, splits)
    settings: dict[str, Any] = {"metric_language": base_code(source.directory.name)} | options
    return register_asr(
        name or f"voxpopuli_{source.directory.name}_asr",
        source=source,
        vocabulary=vocabulary,
        **settings,
    )
