"""Instructions about speech, written or spoken, and span corruption for language models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import seqio

from slm_jax.data import preprocessors
from slm_jax.data.sources import ReferenceSource
from slm_jax.tasks.registration import Manifests, MetricFn, add_task, register_speech_task
from slm_jax.tasks.templates import Templates


def register_instruction(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    languages: Sequence[str] | None = None,
    templates: Templates = "instruction",
    target: str = "{response}",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    **options: Any,
) -> str:
    """Registers written instructions about speech, in the field `instruction`; returns `name`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      languages: languages that the task accepts; None accepts all.
      templates: prompts, as of `templates.load_templates`.
      target: template of the answer.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: as `registration.register_speech_task`.
    """
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        languages=languages,
        templates=templates,
        target=target,
        metric_fns=metric_fns,
        **options,
    )


def register_spoken_instruction(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    templates: Templates = "spoken_instruction",
    target: str = "{response}",
    transcript: str = "{text}",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    **options: Any,
) -> str:
    """Registers instructions that are spoken, with the answer in the field `response`; returns `name`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      templates: prompts, as of `templates.load_templates`.
      target: template of the answer.
      transcript: template of what is said, for `text_only`.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: as `registration.register_speech_task`.
    """
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=templates,
        target=target,
        transcript=transcript,
        metric_fns=metric_fns,
        **options,
    )


def register_span_corruption(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: str | Path | seqio.Vocabulary,
    text: str = "{text}",
    extra_ids: int | None = None,
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
    repeats: int = 1,
) -> str:
    """Registers T5's span corruption on a text field of manifests; returns `name`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model with sentinels, or a SeqIO vocabulary.
      text: template of the text to corrupt.
      extra_ids: sentinels that SeqIO adds behind the pieces.
      noise_density: share of tokens that are corrupted.
      mean_span_length: mean length of a corrupted span in tokens.
      repeats: how many variants of each text, each with its own spans.

    Raises:
      UserError: the template is malformed, or the name is taken by another definition.
    """
    preprocessors.template_fields(text)
    variants = [functools.partial(preprocessors.repeat, times=repeats)] if repeats > 1 else []
    corrupt = functools.partial(
        preprocessors.span_corruption,
        text=text,
        noise_density=noise_density,
        mean_span_length=mean_span_length,
    )
    return add_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        extra_ids=extra_ids,
        steps=[*variants, corrupt],
    )
