"""Speech translation: the speech in the words of another language."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from slm_jax.data import same_language as same
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError, nearest
from slm_jax.tasks.registration import Manifests, MetricFn, register_speech_task
from slm_jax.tasks.templates import Templates, load_templates, with_target_language


def register_ast(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    target_language: str,
    languages: Sequence[str] | None = None,
    templates: Templates = "ast",
    prompt_language: str = "en",
    same_language: str = "reject",
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
      templates: prompts, as of `templates.load_templates`; `{target_language}` is the name of that language
        in the language of the prompt.
      prompt_language: as of `registration.register_speech_task`.
      same_language: what is done with speech in the target language itself that has no translation: `reject`
        leaves it out as `empty_target`, `transcribe` asks for its transcript.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      **options: further arguments of `registration.register_speech_task`.

    Raises:
      UserError: `same_language` is neither, or as `registration.register_speech_task`.
    """
    if same_language not in _SAME_LANGUAGE:
        raise UserError(
            f"task {name!r}: same_language is {same_language!r}{nearest(same_language, _SAME_LANGUAGE)}"
        )
    prepare = list(options.pop("prepare", ()))
    if same_language == "transcribe":
        prepare.insert(0, functools.partial(same.transcribe_same_language, language=target_language))
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
        templates=with_target_language(load_templates(templates), target_language, prompt_language),
        prompt_language=prompt_language,
        prepare=prepare,
        metric_fns=metric_fns,
        **settings,
    )


_SAME_LANGUAGE = ("reject", "transcribe")
