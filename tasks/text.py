"""Tasks of text alone, to watch what becomes of a language model's ability beside speech.

Any task of speech is one of text too, with `text_only`: its transcript then stands in place of the speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_jax.data.preprocessors import SPEECH_MARKER
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import Templates, load_templates, with_target_language


def register_text(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    templates: Templates = "text_instruction",
    target: str = "{response}",
    metric_fns: Sequence[MetricFn | str] = ("exact_match",),
    **options: Any,
) -> str:
    """Registers questions without speech, by default `instruction` with the answer `response`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      templates: prompts without `{speech}`, as of `templates.load_templates`.
      target: template of the answer.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Returns:
      `name`.

    Raises:
      UserError: a template has a place for speech, or as `registration.register_speech_task`.
    """
    loaded = load_templates(templates)
    for template in (template for some in loaded.values() for template in some):
        if SPEECH_MARKER in template:
            raise UserError(
                f"task {name!r}: prompt template {template!r} holds {SPEECH_MARKER}, expected text alone"
            )
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=loaded,
        target=target,
        metric_fns=metric_fns,
        **options,
    )


def register_text_translation(
    name: str,
    *,
    target_language: str,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    text: str = "text",
    templates: Templates = "text_translation",
    prompt_language: str = "en",
    metric_fns: Sequence[MetricFn | str] = ("bleu", "chrf"),
    **options: Any,
) -> str:
    """Registers translation of text into `translations.<target_language>`; returns `name`.

    Args:
      name: of the task.
      target_language: code of the language to translate into, a key of `translations`.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      text: field that is translated, which templates read as `{text}`.
      templates: prompts, as of `templates.load_templates`; `{target_language}` is the name of that language.
      prompt_language: as of `registration.register_speech_task`.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `register_text`.

    Raises:
      UserError: as `register_text`.
    """
    named = with_target_language(load_templates(templates), target_language, prompt_language)
    asked = {
        language: tuple(template.replace("{text}", f"{{{text}}}") for template in some)
        for language, some in named.items()
    }
    settings: dict[str, Any] = {
        "target": f"{{translations.{target_language}}}",
        "metric_language": target_language,
    } | options
    return register_text(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        templates=asked,
        prompt_language=prompt_language,
        metric_fns=metric_fns,
        **settings,
    )
