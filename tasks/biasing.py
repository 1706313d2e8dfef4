"""Contextual biasing: recognition with a list of phrases in the prompt that may be said."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slm_jax.data import biasing
from slm_jax.data.sources import ManifestSource, ReferenceSource
from slm_jax.errors import UserError, check_whole
from slm_jax.evaluation.metrics import rare_word_recall
from slm_jax.tasks.asr import register_asr
from slm_jax.tasks.registration import Manifests, MetricFn
from slm_jax.tasks.templates import Templates


def register_biasing(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: Any,
    distractors: int | Sequence[int],
    distractor_file: str | Path | None = None,
    distractor_split: str = "train",
    absent: float = 0.0,
    phrases: str = "phrases",
    separator: str = ";",
    joiner: str = ", ",
    common_words: str | Path | None = None,
    templates: Templates = "biasing",
    metric_fns: Sequence[MetricFn | str] = ("wer",),
    prepare: Sequence[Callable[..., Any]] = (),
    **options: Any,
) -> str:
    """Registers recognition with phrase lists, which templates read as `{phrase_list}`; returns `name`.

    Args:
      name: of the task; the phrases that an example is given depend on it.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model, or a SeqIO vocabulary.
      distractors: phrases in a list that are not the example's own: a number, or the least and the most.
      distractor_file: text file that they are drawn from, one a line; None draws them from the phrases of
        the other examples of `distractor_split`.
      distractor_split: split of the source.
      absent: share of the examples whose own phrases are not in the list.
      phrases: field with an example's own phrases.
      separator: stands between them.
      joiner: stands between the phrases in the prompt.
      common_words: text file, one a line. With it the phrases are not read from a field: they are the words
        of the transcript that are not in the file, and their recall is one of the metrics.
      templates: prompts, as of `templates.load_templates`.
      metric_fns: SeqIO metric functions, or names in `slm_jax.evaluation.metrics`.
      prepare: as of `registration.register_speech_task`.
      **options: further arguments of `asr.register_asr`.

    Raises:
      UserError: a setting is out of its range, or as `registration.register_speech_task`.
    """
    counts = (distractors, distractors) if isinstance(distractors, int) else tuple(distractors)
    for count in counts:
        check_whole(f"task {name!r}: distractors", count, least=0)
    if len(counts) != 2 or counts[0] > counts[1]:
        raise UserError(
            f"task {name!r}: distractors is {distractors!r}, expected a number, or the least and the most"
        )
    if not isinstance(absent, int | float) or not 0 <= absent <= 1:
        raise UserError(f"task {name!r}: absent is {absent!r}, expected a share from 0 to 1")
    if not separator:
        raise UserError(f"task {name!r}: separator is empty, expected a text such as ';'")
    if (source is None) == (manifests is None):
        raise UserError(f"task {name!r}: give either `manifests` or `source`")
    source = ManifestSource(manifests or {}) if source is None else source
    steps = [*prepare]
    metrics = [*metric_fns]
    if common_words is not None:
        common = biasing.PhraseFile(common_words)
        steps.append(functools.partial(biasing.rare_words, common=common, separator=separator))
        metrics.append(functools.partial(rare_word_recall, common_words=common))
        phrases = "phrases"
    if distractor_file is not None:
        pool = biasing.PhraseFile(distractor_file)
    elif common_words is not None:
        raise UserError(f"task {name!r}: common_words needs a distractor_file to draw other phrases from")
    else:
        pool = biasing.SourcePhrases(source, source.check_split(distractor_split), phrases, separator)
    lists = functools.partial(
        biasing.phrase_lists,
        pool=pool,
        distractors=counts,
        absent=absent,
        salt=name,
        phrases=phrases,
        separator=separator,
        joiner=joiner,
    )
    return register_asr(
        name,
        source=source,
        vocabulary=vocabulary,
        templates=templates,
        metric_fns=metrics,
        prepare=[*steps, lists],
        **options,
    )
