"""Speech continuation: the first part is heard, the text that follows is the target."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from slm_jax.data.continuation import cut_speech
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import Templates


def register_continuation(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    cut: str | None = None,
    cut_words: str | None = None,
    templates: Templates = "continuation",
    target: str = "{continuation}",
    metric_fns: Sequence[MetricFn | str] = ("wer", "chrf"),
    prepare: Sequence[Callable[..., Any]] = (),
    **options: Any,
) -> str:
    """Registers the continuation of speech; returns `name`.

    The audio is the first part alone, with what follows in the field `continuation`; or `cut` says where the
    first part of it ends, and `cut_words` how many words of `text` are said in it.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      cut: field with the length of the first part in seconds; None where the audio is no longer.
      cut_words: field with the number of words of `text` that are said in it; the words after them are the
        field `continuation`.
      templates: prompts, as of `templates.load_templates`.
      target: template of what follows.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      prepare: as of `registration.register_speech_task`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: `cut_words` without `cut`, or as `registration.register_speech_task`.
    """
    if cut_words and not cut:
        raise UserError(f"task {name!r}: cut_words is {cut_words!r} without `cut`, the field of its seconds")
    cuts = [functools.partial(cut_speech, cut=cut, words=cut_words or "")] if cut else []
    settings: dict[str, Any] = {"transcript": "{text_before}" if cut_words else "{text}"} | options
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=templates,
        target=target,
        metric_fns=metric_fns,
        prepare=[*prepare, *cuts],
        **settings,
    )
