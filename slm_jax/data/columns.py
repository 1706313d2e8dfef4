"""Preprocessors on whole chunks of references: what SeqIO gives one by one, at ten times the speed.

A task is defined once, by SeqIO preprocessors; those of `ON_COLUMNS` have a second form here, on columns of
a chunk, that gives the same values (`tests/data/test_columns.py` compares them). A task of which a
preprocessor has none goes through SeqIO.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seqio

from slm_jax.data import preprocessors
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.preprocessors import LANGUAGE_NAMES, SPEECH_MARKER, template_fields
from slm_jax.data.references import SPEECH
from slm_jax.data.sources import ReferenceSource
from slm_jax.data.sources.base import count_of
from slm_jax.errors import UserError, nearest

# Sentencepiece's own threads; it holds Python back while they work.
_TOKENIZER_THREADS = -1
# What tf.strings.strip takes away.
_ASCII_SPACE = " \t\n\v\f\r"


class Ragged(NamedTuple):
    """Lists of numbers, one for each reference of a chunk.

    Attributes:
      values: of all lists, one after the other.
      offsets: int64 [n + 1], where each list starts in `values`, and the end.
    """

    values: np.ndarray
    offsets: np.ndarray


Chunk = dict[str, Any]  # name -> [n], or Ragged
Step = Callable[[Chunk], Chunk]


class Pipeline:
    """A task's preprocessors on columns.

    Args:
      task: a SeqIO task whose source is a `ReferenceSource`.
    """

    def __init__(self, task: seqio.Task):
        self._steps = [_on_columns(step, task) for step in task.preprocessors]
        self._templates = [template for step in task.preprocessors for template in _templates_of(step)]
        self._seen = {"speech"}

    @staticmethod
    def fits(task: seqio.Task) -> bool:
        """Whether every part of a task has a form on columns."""
        vocabularies = [feature.vocabulary for feature in task.output_features.values()]
        return (
            isinstance(task.source, ReferenceSource)
            and all(_function_of(step) in ON_COLUMNS for step in task.preprocessors)
            # SeqIO's fast tokenizer has no counterpart outside TensorFlow.
            and not any(getattr(vocabulary, "_use_fast_tokenizer", False) for vocabulary in vocabularies)
        )

    def __call__(self, chunk: Chunk) -> Chunk:
        """Returns a chunk as the preprocessors leave it."""
        for step in self._steps:
            self._seen.update(chunk)
            chunk = step(chunk)
        return chunk

    def check_fields(self) -> None:
        """Raises UserError where a template reads a field that no chunk had."""
        for template in self._templates:
            for field in template_fields(template):
                if field not in self._seen:
                    raise UserError(
                        f"prompt template {template!r} reads field {field!r}, which no reference has"
                        f"{nearest(field, self._seen)}"
                    )


def texts(chunk: Chunk, field: str) -> Sequence[str]:
    """Returns a field of a chunk, empty texts where no reference has it."""
    return chunk[field] if field in chunk else [""] * count_of(chunk)


def render(template: str, chunk: Chunk) -> list[str]:
    """Returns a template filled in for every reference of a chunk."""
    parts: list[Iterable[str]] = []
    for literal, field, _, _ in string.Formatter().parse(template):
        if literal:
            parts.append(itertools.repeat(literal, count_of(chunk)))
        if field is not None:
            parts.append(texts(chunk, field))
    return list(map("".join, zip(*parts, strict=True))) if parts else [""] * count_of(chunk)


def pick(ids: Sequence[str], count: int, salt: str) -> np.ndarray:
    """Returns the number that `preprocessors` picks for each id: int64 [n] within `range(count)`."""
    return tf.strings.to_hash_bucket_fast([f"{salt}\n{id_}" for id_ in ids], count).numpy()


def ragged(lists: Sequence[Sequence[int]], dtype: Any = np.int32) -> Ragged:
    """Returns lists as one array with offsets."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(values) for values in lists], out=offsets[1:])
    return Ragged(np.fromiter(itertools.chain.from_iterable(lists), dtype, int(offsets[-1])), offsets)


def encode(vocabulary: seqio.Vocabulary, of: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of texts, each different text encoded once."""
    unique = list(dict.fromkeys(of))
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        tokenizer: Any = vocabulary.tokenizer
        found = tokenizer.encode(unique, out_type=int, num_threads=_TOKENIZER_THREADS)
    else:
        found = [list(vocabulary.encode(text)) for text in unique]
    tokens = dict(zip(unique, found, strict=True))
    return [tokens[text] for text in of]


# --- the forms -------------------------------------------------------------------------------------


def _add_language_names(chunk: Chunk) -> Chunk:
    names = [LANGUAGE_NAMES.get(code, code) for code in texts(chunk, "language")]
    return chunk | {"language_name": _objects(names)}


def _reject_languages(chunk: Chunk, *, languages: Sequence[str]) -> Chunk:
    known = set(languages)
    reasons = ["" if code in known else "unknown_language" for code in texts(chunk, "language")]
    return chunk | {"reject": _objects(reasons)}


def _repeat(chunk: Chunk, *, times: int) -> Chunk:
    repeated = {name: np.repeat(values, times) for name, values in chunk.items()}
    numbers = itertools.cycle(range(times))
    ids = zip(repeated["id"], numbers, strict=False)
    repeated["id"] = _objects([f"{id_}#{number}" for id_, number in ids])
    return repeated


def _render_prompts(
    chunk: Chunk, *, templates: Sequence[str], target: str, salt: str, speech: str = SPEECH_MARKER
) -> Chunk:
    preprocessors.check_prompts(templates, target, salt, speech)
    text_only = speech != SPEECH_MARKER
    choice = pick(chunk["id"], len(templates), salt)
    before, said, after = (np.full(len(choice), "", object) for _ in range(3))
    marked = np.zeros(len(choice), bool)
    for number, template in enumerate(templates):
        (at,) = np.nonzero(choice == number)
        chosen = {name: values[at] for name, values in chunk.items()}
        first, marker, last = template.partition(SPEECH_MARKER)
        before[at], after[at] = _objects(render(first, chosen)), _objects(render(last, chosen))
        if marker:
            said[at] = _objects(render(speech, chosen)) if text_only else SPEECH_MARKER
            marked[at] = True
    return chunk | {
        "prompt_before": before,
        "prompt_speech": said,
        "prompt_after": after,
        "prompt_has_speech": marked & (not text_only),
        "targets_pretokenized": _objects([text.strip(_ASCII_SPACE) for text in render(target, chunk)]),
    }


def _tokenize_prompts(chunk: Chunk, *, output_features: Mapping[str, Any], targets_eos: bool = True) -> Chunk:
    vocabulary = output_features["inputs"].vocabulary
    target_vocabulary = output_features["targets"].vocabulary
    chunk = dict(chunk)
    before, said, after = (encode(vocabulary, chunk.pop(f"prompt_{part}")) for part in _PROMPT_PARTS)
    marker, eos = [SPEECH], [vocabulary.eos_id]
    spoken = chunk.pop("prompt_has_speech").tolist()
    said = [marker if heard else tokens for heard, tokens in zip(spoken, said, strict=True)]
    targets = encode(target_vocabulary, chunk["targets_pretokenized"])
    if targets_eos:
        end = [target_vocabulary.eos_id]
        targets = [tokens + end if tokens else tokens for tokens in targets]
    inputs = ragged([b + s + a + eos for b, s, a in zip(before, said, after, strict=True)])
    is_speech = np.zeros(len(inputs.values), bool)
    # The places of what is said: from its first token in the row on, as many as it has.
    counts = np.array([len(tokens) for tokens in said], np.int64)
    first = inputs.offsets[:-1] + np.array([len(tokens) for tokens in before], np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    is_speech[np.repeat(first, counts) + within] = True
    return chunk | {
        "inputs": inputs,
        "inputs_speech": Ragged(is_speech, inputs.offsets),
        "targets": ragged(targets),
    }


def _objects(values: Sequence[str]) -> np.ndarray:
    # Arrays of NumPy's own strings are as wide as the longest, and lose a NUL at the end.
    return np.array(values, object)


_PROMPT_PARTS = ("before", "speech", "after")

# Preprocessor -> its form on columns, with the same keyword arguments.
ON_COLUMNS: dict[Any, Callable[..., Chunk]] = {
    preprocessors.add_language_names: _add_language_names,
    preprocessors.reject_languages: _reject_languages,
    preprocessors.repeat: _repeat,
    preprocessors.render_prompts: _render_prompts,
    preprocessors.tokenize_prompts: _tokenize_prompts,
}


def _function_of(step: Callable[..., Any]) -> Any:
    return step.func if isinstance(step, functools.partial) and not step.args else step


def _on_columns(step: Callable[..., Any], task: seqio.Task) -> Step:
    form = ON_COLUMNS[_function_of(step)]
    keywords = dict(step.keywords) if isinstance(step, functools.partial) else {}
    if "output_features" in inspect.signature(form).parameters:
        keywords["output_features"] = task.output_features
    return functools.partial(form, **keywords)


def _templates_of(step: Callable[..., Any]) -> list[str]:
    """Returns the templates that a preprocessor fills in."""
    if _function_of(step) is not preprocessors.render_prompts or not isinstance(step, functools.partial):
        return []
    settings = step.keywords
    return [*settings["templates"], settings["target"], settings.get("speech", SPEECH_MARKER)]
