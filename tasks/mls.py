"""Tasks on Multilingual LibriSpeech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.sources.corpora.mls import LANGUAGES, MLSSource
from slm_jax.tasks.asr import register_asr


def register_mls(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    lengths: str = "headers",
    limited: bool = False,
    **options: Any,
) -> str:
    """Registers recognition on one language of MLS; returns the task's name.

    Args:
      directory: such as `mls_german` or `mls_german_opus`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default such as `mls_de_asr`.
      splits: beside the published ones, as of `MLSSource`.
      lengths: as of `MLSSource`.
      limited: whether `train` is its subset of 10 hours.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: as `MLSSource` and `asr.register_asr`.
    """
    source = MLSSource(directory, splits, lengths, limited)
    language = LANGUAGES[source.directory.name.split("_")[1]]
    settings: dict[str, Any] = {"metric_language": language} | options
    return register_asr(
        name or f"mls_{language}_asr",
        source=source,
        vocabulary=vocabulary,
        **settings,
    )
