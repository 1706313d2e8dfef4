"""A table of a tree's arrays, to say in words where two trees differ."""

from typing import Any

import jax
import numpy as np

from slm_jax.errors import UserError, nearest

# Path -> (shape, dtype name).
ParameterTable = dict[str, tuple[tuple[int, ...], str]]


def parameter_table(tree: Any) -> ParameterTable:
    """Shape and dtype of every array of a tree by its path; arrays may be abstract."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            tuple(leaf.shape),
            np.dtype(leaf.dtype).name,
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def table_to_json(table: ParameterTable) -> dict[str, list[Any]]:
    """The table in a form that JSON holds."""
    return {path: [list(shape), dtype] for path, (shape, dtype) in table.items()}


def table_from_json(record: dict[str, list[Any]]) -> ParameterTable:
    """The inverse of `table_to_json`."""
    return {path: (tuple(shape), dtype) for path, (shape, dtype) in record.items()}


def check_parameters(saved: ParameterTable, expected: ParameterTable, where: str, check_dtype: bool) -> None:
    """Raises UserError that names the first array, by path, in which two tables differ."""
    for path in sorted(saved.keys() | expected.keys()):
        if path not in saved:
            raise UserError(f"{where} lacks parameter {path}, which this model has{nearest(path, saved)}")
        if path not in expected:
            raise UserError(
                f"{where} holds parameter {path}, which this model lacks{nearest(path, expected)}"
            )
        (shape, dtype), (expected_shape, expected_dtype) = saved[path], expected[path]
        if shape != expected_shape:
            raise UserError(
                f"{where} is of another model: parameter {path} has shape {list(shape)}, "
                f"this model's has {list(expected_shape)}"
            )
        if check_dtype and dtype != expected_dtype:
            raise UserError(
                f"{where} is of another model: parameter {path} has dtype {dtype}, "
                f"this model's has {expected_dtype}"
            )
