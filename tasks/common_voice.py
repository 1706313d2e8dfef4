"""Tasks on Common Voice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.sources.corpora.common_voice import CommonVoiceSource
from slm_jax.tasks.asr import register_asr


def register_common_voice(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> str:
    """Registers recognition on one language of Common Voice; returns the task's name.

    Args:
      directory: such as `cv-corpus-17.0-2024-03-15/de`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default such as `common_voice_de_asr`.
      splits: beside the published ones, as of `CommonVoiceSource`.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: as `CommonVoiceSource` and `asr.register_asr`.
    """
    source = CommonVoiceSource(directory, splits)
    language = base_code(source.directory.name)
    settings: dict[str, Any] = {"metric_language": language} | options
    return register_asr(
        name or f"common_voice_{language}_asr",
        source=source,
        vocabulary=vocabulary,
        **settings,
    )
