"""Spoken question answering: a question that is heard about a text, or a written one about what is heard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError, nearest
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import Templates

# What is spoken -> its templates, and the transcript that stands for it in a task of text alone.
_SPOKEN = {"question": ("spoken_question", "{question}"), "passage": ("spoken_passage", "{context}")}


def register_spoken_qa(
    name: str,
    *,
    spoken: str,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    templates: Templates | None = None,
    target: str = "{answer}",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    **options: Any,
) -> str:
    """Registers questions and answers about a passage; returns `name`.

    Args:
      name: of the task.
      spoken: `question`: the question is spoken and the passage is in the field `context`; or `passage`: the
        passage is spoken and the question is in the field `question`.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      templates: prompts, as of `templates.load_templates`; by default the packaged set `spoken_question` or
        `spoken_passage`.
      target: template of the answer.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`. With `text_only`, `transcript` is
        what was spoken: `{question}` or `{context}` by default.

    Raises:
      UserError: `spoken` is neither, or as `registration.register_speech_task`.
    """
    if spoken not in _SPOKEN:
        raise UserError(f"task {name!r}: spoken is {spoken!r}{nearest(spoken, _SPOKEN)}")
    packaged, transcript = _SPOKEN[spoken]
    settings: dict[str, Any] = {"transcript": transcript} | options
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=packaged if templates is None else templates,
        target=target,
        metric_fns=metric_fns,
        **settings,
    )
