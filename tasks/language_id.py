"""Language identification: the name of the language that is spoken, or its code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError, nearest
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import OF_SPEECH, Templates

_ANSWERS = {"name": "{language_name}", "code": "{language}"}


def register_language_id(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    answer: str = "name",
    languages: Sequence[str] | None = None,
    templates: Templates = "language_id",
    prompt_language: str = "en",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    **options: Any,
) -> str:
    """Registers language identification on references with the field `language`; returns `name`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      answer: `name`, in the language of the prompt, or `code`.
      languages: languages that the task accepts; None accepts all.
      templates: prompts, as of `templates.load_templates`.
      prompt_language: code of the language of the prompts; that of the speech would be the answer.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: `answer` is neither, the prompt tells the answer, or as `registration.register_speech_task`.
    """
    if answer not in _ANSWERS:
        raise UserError(f"task {name!r}: answer is {answer!r}{nearest(answer, _ANSWERS)}")
    if prompt_language == OF_SPEECH:
        raise UserError(
            f"task {name!r}: prompt_language 'speech' tells the answer, expected a code like 'en'"
        )
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        languages=languages,
        templates=templates,
        prompt_language=prompt_language,
        target=_ANSWERS[answer],
        metric_fns=metric_fns,
        **options,
    )
