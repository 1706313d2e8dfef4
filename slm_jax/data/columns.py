"""Preprocessors on whole chunks of references: what SeqIO gives one by one, at ten times the speed.

A task is defined once, by SeqIO preprocessors; those of `ON_COLUMNS` have a second form here, on columns of
a chunk, that gives the same values (`tests/data/test_columns.py` compares them). A task of which a
preprocessor has none goes through SeqIO.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import seqio

from slm_jax.data import biasing, continuation, labels, preprocessors, prompt_languages, same_language
from slm_jax.data.columnwise import buckets, rendered, texts, with_reason
from slm_jax.data.host_tensorflow import tf
from slm_jax.data.preprocessors import LANGUAGE_NAMES, SPEECH_MARKER
from slm_jax.data.references import SPEECH
from slm_jax.data.sources import ReferenceSource
from slm_jax.errors import UserError

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
        self._task = task
        self._steps = [_on_columns(step, task) for step in task.preprocessors]
        self._fields: set[str] = set()
        self._is_checked = False

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
        if not self._fields:
            self._fields.update(chunk)
            # A field may come first in a later chunk: what is wrong here is told in the end.
            with contextlib.suppress(UserError):
                self.check()
        self._fields.update(chunk)
        for step in self._steps:
            chunk = step(chunk)
        return chunk

    def check(self) -> None:
        """Raises UserError where the preprocessors ask for what no chunk had, as they do in SeqIO."""
        if self._is_checked:
            return
        empty = {name: tf.constant([""]) for name in self._fields} | {"samples": tf.constant([0])}
        dataset = tf.data.Dataset.from_tensor_slices(empty)
        self._task.preprocess_postcache(dataset, sequence_length=None, seed=0)
        self._is_checked = True


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
    names: list[str] = [LANGUAGE_NAMES.get(code) or code for code in texts(chunk, "language")]
    return chunk | {"language_name": _objects(names)}


def _reject_languages(chunk: Chunk, *, languages: Sequence[str]) -> Chunk:
    known = set(languages)
    is_other = np.array([code not in known for code in texts(chunk, "language")], bool)
    return chunk | {"reject": with_reason(chunk, is_other, "unknown_language")}


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
    choice = buckets(salt, chunk["id"], len(templates))
    if anonymous := preprocessors.anonymous_templates(templates):
        nameless = texts(chunk, "language_name") == ""
        choice[nameless] = np.array(anonymous)[buckets(salt, chunk["id"][nameless], len(anonymous))]
    before, said, after = (np.full(len(choice), "", object) for _ in range(3))
    marked = np.zeros(len(choice), bool)
    for number, template in enumerate(templates):
        (at,) = np.nonzero(choice == number)
        first, marker, last = template.partition(SPEECH_MARKER)
        before[at], after[at] = rendered(first, chunk, at), rendered(last, chunk, at)
        if marker:
            said[at] = rendered(speech, chunk, at) if text_only else SPEECH_MARKER
            marked[at] = True
    targets = rendered(target, chunk, np.arange(len(choice)))
    return chunk | {
        "prompt_before": before,
        "prompt_speech": said,
        "prompt_after": after,
        "prompt_has_speech": marked & (not text_only),
        "targets_pretokenized": _objects([text.strip(_ASCII_SPACE) for text in targets]),
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
    biasing.phrase_lists: biasing.phrase_lists_on_columns,
    biasing.rare_words: biasing.rare_words_on_columns,
    continuation.cut_speech: continuation.cut_speech_on_columns,
    labels.reject_labels: labels.reject_labels_on_columns,
    prompt_languages.choose_prompts: prompt_languages.choose_prompts_on_columns,
    prompt_languages.name_languages: prompt_languages.name_languages_on_columns,
    same_language.transcribe_same_language: same_language.transcribe_same_language_on_columns,
}


def _function_of(step: Callable[..., Any]) -> Any:
    return step.func if isinstance(step, functools.partial) and not step.args else step


def _on_columns(step: Callable[..., Any], task: seqio.Task) -> Step:
    form = ON_COLUMNS[_function_of(step)]
    keywords = dict(step.keywords) if isinstance(step, functools.partial) else {}
    if "output_features" in inspect.signature(form).parameters:
        keywords["output_features"] = task.output_features
    return functools.partial(form, **keywords)
