"""Speech recognition: the transcript of the speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_jax.data.sources import ReferenceSource
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import Templates


def register_asr(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    languages: Sequence[str] | None = None,
    templates: Templates = "asr",
    metric_fns: Sequence[MetricFn | str] = ("wer", "cer"),
    **options: Any,
) -> str:
    """Registers speech recognition on manifests with the field `text`; returns `name`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      languages: languages that the task accepts; None accepts all.
      templates: prompts, as of `templates.load_templates`; one is chosen per example.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: as `registration.register_speech_task`.
    """
    only = languages[0] if languages and len(languages) == 1 else ""
    settings: dict[str, Any] = {"target": "{text}", "metric_language": only} | options
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        languages=languages,
        templates=templates,
        metric_fns=metric_fns,
        **settings,
    )
