"""Tasks on GigaSpeech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.sources.corpora.gigaspeech import GigaSpeechSource
from slm_jax.tasks.asr import register_asr


def register_gigaspeech(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str = "gigaspeech_asr",
    splits: Mapping[str, Sequence[str]] | None = None,
    case: str = "lower",
    marks: bool = True,
    **options: Any,
) -> str:
    """Registers recognition on GigaSpeech; returns `name`.

    Args:
      directory: holds `GigaSpeech.json` and `audio/`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task.
      splits: beside the published subsets, as of `GigaSpeechSource`: by default `train` (XL), `validation`
        and `test`.
      case: `lower`, or `published` for upper case.
      marks: whether punctuation is written.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: as `GigaSpeechSource` and `asr.register_asr`.
    """
    source = GigaSpeechSource(directory, splits, case, marks)
    settings: dict[str, Any] = {"metric_language": "en"} | options
    return register_asr(name, source=source, vocabulary=vocabulary, **settings)
