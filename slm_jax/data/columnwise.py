"""Preprocessors that are written once, over columns of references, and serve SeqIO's datasets as well.

Such a preprocessor is a pair: a function of columns, `(columns, **settings) -> columns`, whose answer for a
reference depends on that reference alone, and a SeqIO preprocessor that maps it over batches.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from slm_jax.data.host_tensorflow import Dataset, Tensor, tf
from slm_jax.errors import UserError, nearest

# Field -> its values, [n] each: int32, bool, or an object array of str.
Columns = dict[str, np.ndarray]

# References that a function sees at a time in a dataset; its answer does not depend on it.
_BATCH = 1024


def over_columns(
    dataset: Dataset, function: Callable[[Columns], Columns], *, strings: Iterable[str]
) -> Dataset:
    """Returns a dataset of references with a function of columns applied to each.

    Args:
      dataset: of scalars.
      function: returns the columns it was given, some of them with other values, and new ones.
      strings: fields of text that it adds.
    """
    spec = dataset.element_spec
    dtypes = {name: spec[name].dtype for name in spec} | dict.fromkeys(strings, tf.string)

    def call(*values: np.ndarray) -> list[np.ndarray]:
        given = {name: _decoded(value) for name, value in zip(spec, values, strict=True)}
        made = function(given)
        return [made[name] for name in dtypes]

    def apply(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = tf.numpy_function(call, [example[name] for name in spec], list(dtypes.values()))
        for value in made:
            value.set_shape([None])
        return dict(zip(dtypes, made, strict=True))

    return dataset.batch(_BATCH).map(apply).unbatch()


def texts(columns: Columns, name: str) -> np.ndarray:
    """Returns a field of text, object [n]; empty where no reference of these has it."""
    return columns[name] if name in columns else np.full(len(columns["id"]), "", object)


def rendered(template: str, columns: Columns, rows: np.ndarray) -> np.ndarray:
    """Returns a template without `{speech}` filled in from the references at `rows`, object [len(rows)]."""
    text = np.full(len(rows), "", object)
    for literal, field, _, _ in string.Formatter().parse(template):
        text = text + literal
        if field is not None:
            text = text + texts(columns, field)[rows]
    return text


def with_reason(columns: Columns, holds: np.ndarray, reason: str) -> np.ndarray:
    """Returns the field `reject`, object [n]: the reason where it holds; an earlier one stays."""
    found = texts(columns, "reject").copy()
    found[holds & (found == "")] = reason
    return found


def check_fields(dataset: Dataset, fields: Iterable[str], where: str) -> None:
    """Raises UserError unless the references have these fields of text; `where` begins its sentence."""
    known = [name for name, spec in dataset.element_spec.items() if spec.dtype == tf.string]
    for field in fields:
        if field not in known:
            raise UserError(f"{where} reads field {field!r}{nearest(field, known)}")


def buckets(salt: str, values: np.ndarray, count: int) -> np.ndarray:
    """Returns a number from `range(count)` for each text, int64 [n], by a hash of the salt and the text.

    FarmHash Fingerprint64: the same on every platform and in every version of TensorFlow.
    """
    if not len(values):
        return np.zeros(0, np.int64)
    salted = np.array([f"{salt}\n{text}" for text in values], object)
    return tf.strings.to_hash_bucket_fast(salted, count).numpy()


def _decoded(values: np.ndarray) -> np.ndarray:
    if values.dtype != object:
        return values
    return np.array([value.decode() for value in values], object)
