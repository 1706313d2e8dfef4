"""Tasks on SLUE: named entities on VoxPopuli, sentiment on VoxCeleb, recognition on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data.sources import ReferenceSource
from slm_jax.data.sources.corpora.slue import COMBINED, SENTIMENTS, SlueVoxCelebSource, SlueVoxPopuliSource
from slm_jax.errors import UserError, nearest
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.labels import register_classification, register_slots

Splits = Mapping[str, Sequence[str]] | None

_CORPORA = {"slue-voxpopuli": SlueVoxPopuliSource, "slue-voxceleb": SlueVoxCelebSource}
# All eighteen classes of OntoNotes, as they are published.
_PUBLISHED_TAGS = (
    "CARDINAL", "DATE", "EVENT", "FAC", "GPE", "LANGUAGE", "LAW", "LOC", "MONEY", "NORP", "ORDINAL", "ORG",
    "PERCENT", "PERSON", "PRODUCT", "QUANTITY", "TIME", "WORK_OF_ART",
)  # fmt: skip


def register_slue_asr(
    directory: str | Path, *, vocabulary: Any, name: str | None = None, splits: Splits = None, **options: Any
) -> str:
    """Registers recognition on a corpus of SLUE; returns the task's name.

    Args:
      directory: `slue-voxpopuli` or `slue-voxceleb`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task; by default `slue_voxpopuli_asr` or `slue_voxceleb_asr`.
      splits: beside the published ones: by default `train` and `validation`.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: the folder has another name, or as `asr.register_asr`.
    """
    folder = Path(directory).absolute().name
    if folder not in _CORPORA:
        raise UserError(f"SLUE: folder {directory} is no corpus of it{nearest(folder, _CORPORA)}")
    source: ReferenceSource = _CORPORA[folder](directory, splits)
    settings: dict[str, Any] = {"metric_language": "en"} | options
    return register_asr(
        name or f"{folder.replace('-', '_')}_asr",
        source=source,
        vocabulary=vocabulary,
        **settings,
    )


def register_slue_ner(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str = "slue_ner",
    splits: Splits = None,
    tags: str = "combined",
    **options: Any,
) -> str:
    """Registers named entities on SLUE-VoxPopuli, with answers such as `PLACE: bonn; WHEN: today`.

    Args:
      directory: `slue-voxpopuli`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task.
      splits: beside the published ones, as of `SlueVoxPopuliSource`.
      tags: as of `SlueVoxPopuliSource`.
      **options: further arguments of `labels.register_slots`.

    Returns:
      `name`.

    Raises:
      UserError: as `SlueVoxPopuliSource` and `labels.register_slots`.
    """
    names = tuple(COMBINED) if tags == "combined" else _PUBLISHED_TAGS
    source = SlueVoxPopuliSource(directory, splits, tags)
    settings: dict[str, Any] = {"target": "{entities}", "slot_names": names} | options
    return register_slots(name, source=source, vocabulary=vocabulary, **settings)


def register_slue_sentiment(
    directory: str | Path,
    *,
    vocabulary: Any,
    name: str = "slue_sentiment",
    splits: Splits = None,
    **options: Any,
) -> str:
    """Registers sentiment on SLUE-VoxCeleb; where annotators did not agree is left out as `unknown_label`.

    Args:
      directory: `slue-voxceleb`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      name: of the task.
      splits: beside the published ones, as of `SlueVoxCelebSource`.
      **options: further arguments of `labels.register_classification`.

    Returns:
      `name`.

    Raises:
      UserError: as `SlueVoxCelebSource` and `labels.register_classification`.
    """
    source = SlueVoxCelebSource(directory, splits)
    settings: dict[str, Any] = {"templates": "sentiment"} | options
    return register_classification(
        name, labels=SENTIMENTS, field="sentiment", source=source, vocabulary=vocabulary, **settings
    )
