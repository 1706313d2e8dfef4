"""Weights without collections: one dictionary by names such as `adapter/out/kernel`, as files have them."""

from collections.abc import Mapping
from typing import Any

from slm_jax.checkpoints.safetensors import flatten, unflatten

COLLECTIONS = ("params", "frozen")


def to_names(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of `params` and `frozen` by name, in the order of their names.

    Raises:
      ValueError: two collections have a leaf of the same name.
    """
    tables = [flatten(variables[collection]) for collection in COLLECTIONS if collection in variables]
    names = [name for table in tables for name in table]
    if len(set(names)) != len(names):
        raise ValueError("params and frozen hold a parameter of the same name")
    return dict(sorted((name, leaf) for table in tables for name, leaf in table.items()))


def to_variables(weights: Mapping[str, Any], trainable: tuple[str, ...]) -> dict[str, Any]:
    """Returns the collections of an SLM again, from weights by name.

    Args:
      weights: of `to_names`.
      trainable: parts of the model whose weights are `params`.
    """
    parts = unflatten(weights)
    variables: dict[str, Any] = {collection: {} for collection in COLLECTIONS}
    for part, tree in parts.items():
        variables["params" if part in trainable else "frozen"][part] = tree
    return variables
