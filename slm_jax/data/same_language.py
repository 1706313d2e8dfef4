"""Translation of speech that is in the language of the translation already."""

from __future__ import annotations

import functools

import numpy as np

from slm_jax.data.columnwise import Columns, over_columns, texts
from slm_jax.data.host_tensorflow import Dataset
from slm_jax.data.prompt_languages import base_code


def transcribe_same_language(dataset: Dataset, *, language: str) -> Dataset:
    """Lets the transcript be the translation of speech in the language itself, where it has no other.

    Args:
      dataset: references.
      language: code of the language to translate into; regions do not count.
    """
    step = functools.partial(transcribe_same_language_on_columns, language=language)
    return over_columns(dataset, step, strings=[f"translations.{language}"])


def transcribe_same_language_on_columns(columns: Columns, *, language: str) -> Columns:
    """`transcribe_same_language` on columns."""
    field = f"translations.{language}"
    spoken = [base_code(code) == base_code(language) for code in texts(columns, "language")]
    written = texts(columns, field)
    return columns | {field: np.where(spoken & (written == ""), texts(columns, "text"), written)}
