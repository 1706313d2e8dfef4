"""Tasks on CoVoST 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.prompt_languages import base_code
from slm_jax.data.sources.corpora.covost2 import CoVoST2Source
from slm_jax.tasks.ast import register_ast


def register_covost2(
    directory: str | Path,
    *,
    clips: str | Path,
    source_language: str,
    target_language: str,
    vocabulary: Any,
    name: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    **options: Any,
) -> str:
    """Registers translation of one pair of CoVoST 2; returns the task's name.

    Args:
      directory: of the tables.
      clips: the folder `clips` of Common Voice 4 in the source language.
      source_language: code of the speech as it is published, such as `de` or `zh-CN`.
      target_language: code of the translation as it is published.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default such as `covost2_de_en_ast`.
      splits: beside the published ones, as of `CoVoST2Source`.
      **options: further arguments of `ast.register_ast`.

    Raises:
      UserError: as `CoVoST2Source` and `ast.register_ast`.
    """
    source = CoVoST2Source(directory, clips, source_language, target_language, splits)
    spoken, written = base_code(source_language), base_code(target_language)
    return register_ast(
        name or f"covost2_{spoken}_{written}_ast",
        source=source,
        vocabulary=vocabulary,
        target_language=written,
        **options,
    )
