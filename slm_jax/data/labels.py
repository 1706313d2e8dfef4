"""Targets that are one of a few words."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from slm_jax.data.columnwise import Columns, check_fields, over_columns, texts, with_reason
from slm_jax.data.host_tensorflow import Dataset


def reject_labels(dataset: Dataset, *, field: str, labels: Sequence[str]) -> Dataset:
    """Marks examples whose label is none of `labels` with the reason `unknown_label`.

    Args:
      dataset: references with string fields.
      field: with the label.
      labels: all that there are.

    Raises:
      UserError: there is no such field.
    """
    check_fields(dataset, [field], "the check of labels")
    step = functools.partial(reject_labels_on_columns, field=field, labels=labels)
    return over_columns(dataset, step, strings=["reject"])


def reject_labels_on_columns(columns: Columns, *, field: str, labels: Sequence[str]) -> Columns:
    """`reject_labels` on columns."""
    is_unknown = ~np.isin(texts(columns, field).astype(str), list(labels))
    return columns | {"reject": with_reason(columns, is_unknown, "unknown_label")}
