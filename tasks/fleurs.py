"""Tasks on FLEURS: recognition, translation between any two of its languages, language identification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.sources.corpora.fleurs import FleursSource, language_code
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.ast import register_ast
from slm_jax.tasks.language_id import register_language_id

Splits = Mapping[str, Sequence[str]] | None


def register_fleurs_asr(
    directory: str | Path,
    *,
    languages: Sequence[str],
    vocabulary: Any,
    name: str | None = None,
    splits: Splits = None,
    **options: Any,
) -> str:
    """Registers recognition of one or more languages of FLEURS; returns the task's name.

    Args:
      directory: holds a folder for each language.
      languages: published names, such as `("de_de", "fr_fr")`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default such as `fleurs_de_fr_asr`.
      splits: beside the published ones, as of `FleursSource`.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: as `FleursSource` and `asr.register_asr`.
    """
    source = FleursSource(directory, languages, splits=splits)
    only = language_code(languages[0]) if len(languages) == 1 else ""
    settings: dict[str, Any] = {"metric_language": only} | options
    return register_asr(
        name or f"fleurs_{_joined(languages)}_asr",
        source=source,
        vocabulary=vocabulary,
        **settings,
    )


def register_fleurs_ast(
    directory: str | Path,
    *,
    languages: Sequence[str],
    target_language: str,
    vocabulary: Any,
    name: str | None = None,
    splits: Splits = None,
    **options: Any,
) -> str:
    """Registers translation of one or more languages of FLEURS into another; returns the task's name.

    Args:
      directory: holds a folder for each language.
      languages: published names of the languages of the speech.
      target_language: published name of the language to translate into, such as `en_us`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default such as `fleurs_de_fr_en_ast`.
      splits: beside the published ones, as of `FleursSource`.
      **options: further arguments of `ast.register_ast`.

    Raises:
      UserError: as `FleursSource` and `ast.register_ast`.
    """
    source = FleursSource(directory, languages, (target_language,), splits)
    target = language_code(target_language)
    return register_ast(
        name or f"fleurs_{_joined(languages)}_{target}_ast",
        source=source,
        vocabulary=vocabulary,
        target_language=target,
        **options,
    )


def register_fleurs_language_id(
    directory: str | Path,
    *,
    languages: Sequence[str],
    vocabulary: Any,
    name: str = "fleurs_language_id",
    splits: Splits = None,
    **options: Any,
) -> str:
    """Registers identification of languages of FLEURS; returns `name`.

    Args:
      directory: holds a folder for each language.
      languages: published names.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task.
      splits: beside the published ones, as of `FleursSource`.
      **options: further arguments of `language_id.register_language_id`.

    Raises:
      UserError: as `FleursSource` and `language_id.register_language_id`.
    """
    source = FleursSource(directory, languages, splits=splits)
    return register_language_id(name, source=source, vocabulary=vocabulary, **options)


def _joined(languages: Sequence[str]) -> str:
    return "_".join(language_code(language) for language in languages)
