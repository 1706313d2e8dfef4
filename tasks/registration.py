"""How a family of tasks becomes SeqIO tasks and mixtures.

Every function here and in the files of the families is plain, takes keyword arguments and returns
the name that it registered, so that a Python module and a gin file can call it alike. Registering the
same definition again changes nothing; another definition under the same name is a user's mistake.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import seqio

from slm_jax.data import preprocessors, prompt_languages
from slm_jax.data.sources import ManifestSource, ReferenceSource
from slm_jax.data.vocabularies import vocabulary_of
from slm_jax.errors import UserError, nearest
from slm_jax.tasks import templates as prompts
from slm_jax.tasks.rates import PartRate, check_rate, find_part
from slm_jax.tasks.templates import Templates

MetricFn = Callable[..., Mapping[str, float]]
Manifests = Mapping[str, str | Path]
Rate = float | PartRate | Callable[[seqio.Task], float]

# What each name of a task or mixture stands for, to tell a repetition from a clash.
_definitions: dict[str, object] = {}


def register_speech_task(
    name: str,
    *,
    manifests: Manifests | None = None,
    source: ReferenceSource | None = None,
    vocabulary: str | Path | seqio.Vocabulary,
    templates: Templates,
    target: str,
    prompt_language: str = "en",
    order: str = "template",
    prepare: Sequence[Callable[..., Any]] = (),
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
      templates: prompts, as of `templates.load_templates`; `{field}` is a field of the reference, `{speech}`
        the place of the speech.
      target: template of the target text.
      prompt_language: code of the language of the prompts, or `speech` for that of each example's speech;
        speech in a language without templates is asked about in English, or in the first that there is.
      order: of speech and text: `template` leaves it to the templates; `speech_first`, `speech_last`.
      prepare: SeqIO preprocessors that make fields which the templates read.
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
    for template in (target, speech):
        preprocessors.template_fields(template)
    before, chosen = _prompt_steps(name, templates, prompt_language, order)
    steps: list[Callable[..., Any]] = [before]
    if isinstance(languages, str):
        raise UserError(f"task {name!r}: languages is {languages!r}, expected a list such as [{languages!r}]")
    if languages is not None:
        steps.append(functools.partial(preprocessors.reject_languages, languages=tuple(languages)))
    if repeats > 1:
        steps.append(functools.partial(preprocessors.repeat, times=repeats))
    steps += prepare
    steps += [
        *chosen.steps,
        functools.partial(
            preprocessors.render_prompts, templates=chosen.templates, target=target, salt=name, speech=speech
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


class _Prompts(NamedTuple):
    """What `render_prompts` is given: templates, and the steps that make their fields."""

    templates: tuple[str, ...]
    steps: tuple[Callable[..., Any], ...] = ()


def _prompt_steps(
    name: str, templates: Templates, prompt_language: str, order: str
) -> tuple[Callable[..., Any], _Prompts]:
    """Returns the step that names languages, and the prompts."""
    try:
        loaded = prompts.load_templates(templates)
        if prompt_language != prompts.OF_SPEECH:
            some = prompts.in_order(prompts.in_language(loaded, prompt_language), order)
            return _naming([prompt_language]), _Prompts(some)
        spoken = {
            language: prompts.in_order(some, order) for language, some in prompts.by_language(loaded).items()
        }
        every = [template for some in spoken.values() for template in some]
        has_speech = prompt_languages.has_speech(every, f"task {name!r}")
    except UserError as error:
        raise UserError(f"task {name!r}: {str(error).removeprefix(f'task {name!r}: ')}") from None
    choose = functools.partial(prompt_languages.choose_prompts, templates=spoken, salt=name)
    joined = prompt_languages.PROMPT_TEMPLATE if has_speech else prompt_languages.TEXT_PROMPT_TEMPLATE
    return _naming(list(spoken)), _Prompts((joined,), (choose,))


def _naming(languages: Sequence[str]) -> Callable[..., Any]:
    if list(languages) == ["en"]:
        return preprocessors.add_language_names
    names = {language: dict(prompts.names_in(language)) for language in languages}
    return functools.partial(prompt_languages.name_languages, names=names)


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
    if not isinstance(source, seqio.DataSource):
        raise UserError(f"task {name!r}: source is {source!r}, expected one of slm_jax.data.sources")
    if not isinstance(vocabulary, str | Path | seqio.Vocabulary):
        raise UserError(
            f"task {name!r}: vocabulary is {vocabulary!r}, expected the path of a SentencePiece model"
        )
    if not isinstance(vocabulary, seqio.Vocabulary) and "://" not in str(vocabulary):
        vocabulary = Path(vocabulary).absolute()
    definition = (
        "task",
        type(source),
        source.definition(),
        vocabulary if isinstance(vocabulary, seqio.Vocabulary) else str(vocabulary),
        extra_ids,
        [_definition_of(step) for step in steps],
        [_definition_of(metric) for metric in metric_fns],
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
    """Registers a mixture whose rates are the numbers of references of its parts, as in the SLM paper.

    Args:
      name: of the mixture.
      tasks: names of registered tasks and mixtures.
      split: whose references are counted, once a rate is asked for; audio is not read.

    Returns:
      `name`.

    Raises:
      UserError: there are no parts, one is unknown or named twice, or the name is taken by another
        definition.
    """
    return _register_counted(name, tasks, "examples", split)


def register_hours_mixture(name: str, tasks: Sequence[str], split: str = "train") -> str:
    """Registers a mixture whose rates are the hours of speech of its parts.

    A rate is a relative number of examples, so that a part with twice the hours gives twice the examples.
    Arguments and errors are those of `register_proportional_mixture`.
    """
    return _register_counted(name, tasks, "hours", split)


def register_temperature_mixture(
    name: str,
    tasks: Sequence[str],
    temperature: float,
    maximum: float | None = None,
    measure: str = "examples",
    split: str = "train",
) -> str:
    """Registers a mixture with rates `min(n, maximum) ** (1 / temperature)`, as T5's and mT5's are.

    Raffel et al. 2020 (arXiv 1910.10683), section 3.5.2: `maximum` is their limit on the size of a data set.

    Args:
      name: of the mixture.
      tasks: names of registered tasks and mixtures.
      temperature: 1 is proportional; the higher, the more alike are the rates.
      maximum: what a part counts for at most; None for no limit.
      measure: what n counts: `examples` or `hours`.
      split: whose references are counted, once a rate is asked for.

    Returns:
      `name`.

    Raises:
      UserError: the temperature or the maximum is not positive, the measure is unknown, or as
        `register_proportional_mixture`.
    """
    return _register_counted(name, tasks, measure, split, temperature, maximum)


def _register_counted(name: str, tasks: Sequence[str], measure: str, split: str, *power: Any) -> str:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise UserError(f"mixture {name!r}: tasks is {tasks!r}, expected a list of names")
    for task in tasks:
        if list(tasks).count(task) > 1:
            raise UserError(f"mixture {name!r} names {task!r} twice")
    return register_mixture(name, {task: PartRate(name, task, measure, split, *power) for task in tasks})


def register_mixture(name: str, rates: Mapping[str, Rate]) -> str:
    """Registers a mixture with explicit rates: part -> relative number of its examples.

    A part is a task or a mixture. Of a mixture, the rate is divided among its own parts by their rates; a
    task that comes in by several ways has the sum of its rates, as SeqIO has it.

    Args:
      name: of the mixture.
      rates: name of a registered task or mixture -> its rate; of a task, a function from the task to it too.

    Returns:
      `name`.

    Raises:
      UserError: there are no parts, one is unknown, a rate is not a positive number, or the name is taken by
        another definition.
    """
    if not rates:
        raise UserError(f"mixture {name!r} is empty, expected at least one task")
    for part, rate in rates.items():
        found = find_part(part, f"mixture {name!r}")
        is_counted = isinstance(rate, PartRate) or (callable(rate) and isinstance(found, seqio.Task))
        if not is_counted:
            check_rate(rate, f"mixture {name!r}: {part!r}")
    signature = ("mixture", sorted(rates.items(), key=lambda item: item[0]))
    if _is_registered(name, signature):
        return name
    try:
        seqio.MixtureRegistry.add(name, list(rates.items()))
    except ValueError as error:
        raise UserError(f"mixture {name!r}: {error}") from None
    _definitions[name] = signature
    return name


def _is_registered(name: str, definition: object) -> bool:
    if name not in seqio.TaskRegistry.names() and name not in seqio.MixtureRegistry.names():
        return False
    if _definitions.get(name) != definition:
        raise UserError(f"the name {name!r} is taken by another task or mixture; choose another name")
    return True


def _definition_of(step: Callable[..., Any] | str) -> object:
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
