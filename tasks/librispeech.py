"""Tasks on LibriSpeech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.sources.corpora.librispeech import LibriSpeechSource
from slm_jax.tasks.asr import register_asr


def register_librispeech(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str = "librispeech_asr",
    splits: Mapping[str, Sequence[str]] | None = None,
    case: str = "lower",
    **options: Any,
) -> str:
    """Registers recognition on LibriSpeech; returns `name`.

    Args:
      directory: the folder `LibriSpeech`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task.
      splits: beside the published ones, as of `LibriSpeechSource`: by default `train` (960 hours),
        `validation` and `test`.
      case: `lower`, or `published` for upper case.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: as `LibriSpeechSource` and `asr.register_asr`.
    """
    source = LibriSpeechSource(directory, splits, case)
    settings: dict[str, Any] = {"metric_language": "en"} | options
    return register_asr(name, source=source, vocabulary=vocabulary, **settings)
