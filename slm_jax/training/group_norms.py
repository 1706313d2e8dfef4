"""Norms of gradients, updates and parameters by part of the model: which part a divergence begins in."""

from collections.abc import Mapping
from typing import Any

import jax
import optax


def parameter_groups(tree: Any) -> dict[str, Any]:
    """The parts of a tree of parameters by path: its top level, or the first of several parts."""
    groups, path = tree, ""
    while isinstance(groups, Mapping) and len(groups) == 1:
        (name, below), *_ = groups.items()
        if not isinstance(below, Mapping):
            break
        path, groups = f"{path}{name}/", below
    return {f"{path}{name}": group for name, group in groups.items()}


def group_norms(name: str, tree: Any) -> dict[str, jax.Array]:
    """The 2-norm of each group as a metric `name/group`."""
    return {f"{name}/{group}": optax.tree.norm(part) for group, part in parameter_groups(tree).items()}
