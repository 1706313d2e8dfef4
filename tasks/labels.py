"""Answers of a few words about speech: slots, keywords, and classes such as the sentiment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from slm_jax.data.labels import reject_labels
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import Templates, filled, load_templates


def register_classification(
    name: str,
    *,
    labels: Sequence[str],
    field: str = "label",
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    templates: Templates = "classification",
    joiner: str = ", ",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    prepare: Sequence[Callable[..., Any]] = (),
    **options: Any,
) -> str:
    """Registers the choice of one of a few labels; returns `name`.

    Args:
      name: of the task.
      labels: all that there are; an example with another one is left out as `unknown_label`.
      field: with the label of an example.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      templates: prompts, as of `templates.load_templates`; `{labels}` are the labels. The packaged sets
        `keyword` and `sentiment` ask for these.
      joiner: stands between labels in the prompt.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      prepare: as of `registration.register_speech_task`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: there are fewer than two labels, or as `registration.register_speech_task`.
    """
    if isinstance(labels, str) or len(set(labels)) < 2 or len(set(labels)) != len(labels):
        raise UserError(f"task {name!r}: labels is {labels!r}, expected two or more different texts")
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=filled(load_templates(templates), "labels", joiner.join(labels)),
        target=f"{{{field}}}",
        metric_fns=metric_fns,
        prepare=[*prepare, functools.partial(reject_labels, field=field, labels=tuple(labels))],
        **options,
    )


def register_keyword(name: str, *, keywords: Sequence[str], field: str = "keyword", **options: Any) -> str:
    """Registers keyword spotting: which of a few words is said; returns `name`.

    Args:
      name: of the task.
      keywords: all that there are.
      field: with the keyword of an example.
      **options: further arguments of `register_classification`.

    Raises:
      UserError: as `register_classification`.
    """
    settings: dict[str, Any] = {"templates": "keyword"} | options
    return register_classification(name, labels=keywords, field=field, **settings)


def register_slots(
    name: str,
    *,
    slot_names: Sequence[str],
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    templates: Templates = "slots",
    target: str = "{slots}",
    joiner: str = ", ",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    **options: Any,
) -> str:
    """Registers slot filling: what the speech says of each of a few names; returns `name`.

    Args:
      name: of the task.
      slot_names: what is asked for, such as `city` and `time`.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      templates: prompts, as of `templates.load_templates`; `{slot_names}` are the names.
      target: template of the answer, such as `city: Bonn; time: nine`.
      joiner: stands between names in the prompt.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: there are no names, or as `registration.register_speech_task`.
    """
    if isinstance(slot_names, str) or not slot_names:
        raise UserError(f"task {name!r}: slot_names is {slot_names!r}, expected a list of names")
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=filled(load_templates(templates), "slot_names", joiner.join(slot_names)),
        target=target,
        metric_fns=metric_fns,
        **options,
    )
