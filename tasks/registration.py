"""How a family of tasks becomes SeqIO tasks and mixtures.

Every function here and in `asr`, `ast` and `instruction` is plain, takes keyword arguments and returns
the name that it registered, so that a Python module and a gin file can call it alike. Registering the
same definition again changes nothing; another definition under the same name is a user's mistake.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio

from slm_jax.data import preprocessors
from slm_jax.data.sources import ManifestSource, ReferenceSource
from slm_jax.data.vocabularies import vocabulary_of
from slm_jax.errors import UserError, nearest

MetricFn = Callable[..., Mapping[str, float]]
Manifests = Mapping[str, str | Path]

# What each name of a task or mixture stands for, to tell a repetition from a clash.
_definitions: dict[str, object] = {}


def register_speech_task(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: str | Path | seqio.Vocabulary,
    templates: Sequence[str],
    target: str,
    extra_ids: int | None = None,
    languages: Sequence[str] | None = None,
    text_only: bool = False,
    transcript: str = "{text}",
    noise: Mapping[str, float] | None = None,
    repeats: int = 1,
    targets_eos: bool = True,
    metric_fns: Sequence[MetricFn | str] = (),
    metric_language: str = "",
) -> str:
    """Registers a task that answers a prompt about speech.

    Args:
      name: of the task.
      manifests: split -> path of a JSONL manifest; this, or `source`.
      source: where the references come from, one of `slm_jax.data.sources`.
      vocabulary: path of a sentencepiece model or of a T5's folder, published or converted; or a SeqIO
        vocabulary.
      templates: prompts; `{field}` is a field of the manifest, `{speech}` the place of the speech.
      target: template of the target text.
      extra_ids: sentinels that SeqIO adds behind the pieces of a vocabulary given as a path; None leaves them
        to the folder, and adds none to a file.
      languages: languages of the speech that the task accepts; None accepts all.
      text_only: whether the transcript stands in the prompt in place of the speech.
      transcript: template of the transcript, for `text_only`.
      noise: rates for `preprocessors.token_noise` on the transcript, for `text_only`.
      repeats: how many variants of each example, for noise that differs.
      targets_eos: whether targets end with EOS.
      metric_fns: SeqIO metric functions `(targets, predictions)`, or their names: `wer` is one of
        `slm_jax.evaluation.metrics`, `package.module:function` any other.
      metric_language: passed as `language` to metrics that are given by name and take one.

    Returns:
      `name`.

    Raises:
      UserError: a template is malformed, or the name is taken by another definition.
    """
    if noise and not text_only:
        raise UserError(f"task {name!r}: noise is for text_only tasks, whose prompts hold the transcript")
    speech = transcript if text_only else preprocessors.SPEECH_MARKER
    for template in (*templates, target, speech):
        preprocessors.template_fields(template)
    steps: list[Callable[..., Any]] = [preprocessors.add_language_names]
    if languages is not None:
        steps.append(functools.partial(preprocessors.reject_languages, languages=tuple(languages)))
    if repeats > 1:
        steps.append(functools.partial(preprocessors.repeat, times=repeats))
    steps += [
        functools.partial(
            preprocessors.render_prompts, templates=tuple(templates), target=target, salt=name, speech=speech
        ),
        functools.partial(preprocessors.tokenize_prompts, targets_eos=targets_eos),
    ]
    if noise:
        steps.append(functools.partial(preprocessors.token_noise, **noise))
    return add_task(
        name,
        manifests=manifests,
        source=source,
        vocabulary=vocabulary,
        extra_ids=extra_ids,
        steps=steps,
        metric_fns=metric_fns,
        metric_language=metric_language,
    )


def add_task(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: str | Path | seqio.Vocabulary,
    steps: Sequence[Callable[..., Any]],
    extra_ids: int | None = None,
    metric_fns: Sequence[MetricFn | str] = (),
    metric_language: str = "",
) -> str:
    """Registers manifests and preprocessors as a SeqIO task; the arguments are `register_speech_task`'s.

    Args:
      steps: SeqIO preprocessors that end with int32 `inputs` and `targets`.
    """
    if (source is None) == (manifests is None):
        raise UserError(f"task {name!r}: give either `manifests` or `source`")
    source = ManifestSource(manifests or {}) if source is None else source
    if not isinstance(vocabulary, seqio.Vocabulary) and "://" not in str(vocabulary):
        vocabulary = Path(vocabulary).absolute()
    definition = (
        "task",
        type(source),
        source.definition(),
        vocabulary if isinstance(vocabulary, seqio.Vocabulary) else str(vocabulary),
        extra_ids,
        [_definition_of(step) for step in steps],
        list(metric_fns),
        metric_language,
    )
    if _is_registered(name, definition):
        return name
    if isinstance(vocabulary, Path) and vocabulary.is_dir():
        vocabulary = vocabulary_of(vocabulary, extra_ids)
    elif not isinstance(vocabulary, seqio.Vocabulary):
        vocabulary = seqio.SentencePieceVocabulary(str(vocabulary), extra_ids=extra_ids or 0)
    feature = seqio.Feature(vocabulary, add_eos=True)
    try:
        seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=list(steps),
            output_features={"inputs": feature, "targets": feature},
            metric_fns=[_metric(metric, metric_language) for metric in metric_fns],
        )
    except ValueError as error:
        raise UserError(f"task {name!r}: {error}") from None
    _definitions[name] = definition
    return name


def register_proportional_mixture(name: str, tasks: Sequence[str], split: str = "train") -> str:
    """Registers a mixture whose rates are the numbers of references of its tasks, as in the SLM paper.

    Args:
      name: of the mixture.
      tasks: names of registered tasks.
      split: whose references are counted, once a rate is asked for; audio is not read.

    Returns:
      `name`.

    Raises:
      UserError: there are no tasks, one is unknown, or the name is taken by another definition.
    """
    rate = functools.partial(number_of_references, split=split)
    return register_mixture(name, dict.fromkeys(tasks, rate), ("proportional", split))


def register_mixture(
    name: str, rates: Mapping[str, float | Callable[[Any], float]], definition: object = None
) -> str:
    """Registers a mixture with explicit rates: task -> relative number of its examples.

    Args:
      name: of the mixture.
      rates: task -> rate, or a function from the task to its rate.
      definition: tells mixtures apart whose rates are functions.

    Returns:
      `name`.

    Raises:
      UserError: as `register_proportional_mixture`.
    """
    if not rates:
        raise UserError(f"mixture {name!r} is empty, expected at least one task")
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    for task in rates:
        if task not in known:
            raise UserError(f"mixture {name!r} names unknown task {task!r}{nearest(task, known)}")
    signature = ("mixture", sorted(rates), definition or dict(rates))
    if _is_registered(name, signature):
        return name
    try:
        seqio.MixtureRegistry.add(name, list(rates.items()))
    except ValueError as error:
        raise UserError(f"mixture {name!r}: {error}") from None
    _definitions[name] = signature
    return name


def number_of_references(task: seqio.Task, split: str = "train") -> float:
    """Returns how many references a split of a task has, from its source alone.

    Raises:
      UserError: the task has no such split, or its source cannot say.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}{nearest(split, task.splits)}")
    count = task.num_input_examples(split)
    if count is None:
        raise UserError(f"task {task.name!r}: its source does not say how many examples split {split!r} has")
    return float(count)


def _is_registered(name: str, definition: object) -> bool:
    if name not in seqio.TaskRegistry.names() and name not in seqio.MixtureRegistry.names():
        return False
    if _definitions.get(name) != definition:
        raise UserError(f"the name {name!r} is taken by another task or mixture; choose another name")
    return True


def _definition_of(step: Callable[..., Any]) -> object:
    return (step.func, step.keywords) if isinstance(step, functools.partial) else step


def _metric(metric: MetricFn | str, language: str) -> MetricFn:
    """Returns the metric function that is meant; one that is given by name has `language` bound to it."""
    if isinstance(metric, str):
        module_name, _, function_name = metric.rpartition(":")
        try:
            module = importlib.import_module(module_name or "slm_jax.evaluation.metrics")
        except ImportError as error:
            raise UserError(f"there is no metric {metric!r}: {error}") from None
        function = getattr(module, function_name, None)
        if function is None:
            choices = [key for key, value in vars(module).items() if inspect.isfunction(value)]
            raise UserError(f"there is no metric {metric!r}{nearest(function_name, choices)}")
        takes_language = "language" in inspect.signature(function).parameters
        metric = functools.partial(function, language=language) if takes_language else function
    return metric
