"""Speech translation: the speech in the words of another language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_jax.data.preprocessors import LANGUAGE_NAMES
from slm_jax.data.sources import ReferenceSource
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task

# `{target_language}` is filled in at registration.
AST_TEMPLATES = (
    "Translate the speech into {target_language}: {speech}",
    "Say this in {target_language}: {speech}",
    "Translate from {language_name} into {target_language}: {speech}",
    "What is this in {target_language}? {speech}",
)


def register_ast(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    target_language: str,
    languages: Sequence[str] | None = None,
    templates: Sequence[str] = AST_TEMPLATES,
    metric_fns: Sequence[MetricFn | str] = ("bleu", "chrf"),
    **options: Any,
) -> str:
    """Registers speech translation on manifests with the field `translations`; returns `name`.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      target_language: code of the language to translate into, a key of `translations`.
      languages: languages of the speech that the task accepts; None accepts all.
      templates: prompts; `{target_language}` is the name of that language.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: as `registration.register_speech_task`.
    """
    target_name = LANGUAGE_NAMES.get(target_language, target_language)
    settings: dict[str, Any] = {
        "target": f"{{translations.{target_language}}}",
        "metric_language": target_language,
    } | options
    return register_speech_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        languages=languages,
        templates=tuple(template.replace("{target_language}", target_name) for template in templates),
        metric_fns=metric_fns,
        **settings,
    )
