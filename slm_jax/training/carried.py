"""Optimizer state of several ages: what goes on from another run keeps its own, what is new begins.

An optimizer of Optax counts the updates of all its parameters together, and Adam and Muon correct their
moments by that count, Adafactor decays by it. Moments that were carried over would be too large with a count
that begins, and new ones too small with a count that goes on. So every parameter has an optimizer and a count
of its own, as PyTorch's have.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from slm_jax.partitioning.sharding import KeyPath, path_text


class ByParameter(NamedTuple):
    """Optax state of `by_parameter`.

    Attributes:
      states: the tree of the parameters; in place of each the state of an optimizer of a tree with it alone.
    """

    states: Any


def by_parameter(make: Callable[[KeyPath], optax.GradientTransformation]) -> optax.GradientTransformation:
    """Gives every parameter an optimizer of its own.

    Args:
      make: returns the optimizer of the parameter of a path; it gets trees of that parameter alone.
    """

    def init(params: Any) -> ByParameter:
        return ByParameter(
            jax.tree_util.tree_map_with_path(lambda path, leaf: make(path).init(alone(path, leaf)), params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ByParameter]:
        paths, places = jax.tree_util.tree_flatten_with_path(updates)
        new_updates, states = [], []
        for (path, leaf), old, param in zip(
            paths, places.flatten_up_to(state.states), places.flatten_up_to(params), strict=True
        ):
            found, new = make(path).update(alone(path, leaf), old, alone(path, param))
            new_updates += jax.tree.leaves(found)
            states.append(new)
        return places.unflatten(new_updates), ByParameter(places.unflatten(states))

    return optax.GradientTransformation(init, update)


def alone(path: KeyPath, leaf: Any) -> Any:
    """The tree with a leaf at a path of dictionaries and nothing else."""
    for key in reversed(path):
        leaf = {key.key: leaf}
    return leaf


def leaf_at(tree: Any, path: KeyPath) -> Any:
    """What lies at a path of dictionaries."""
    for key in path:
        tree = tree[key.key]
    return tree


def carried_slots(
    opt_state: Any, saved: Mapping[str, tuple[int, ...]], going_on: set[str]
) -> dict[str, str] | None:
    """Says which arrays of a checkpoint an optimizer state of `by_parameter` goes on from.

    Schedules begin anew, and so do counters of steps that were left out and statistics of spikes.

    Args:
      opt_state: shapes of the state, as `optimizers.make_optimizer` makes it.
      saved: shapes of the checkpoint's optimizer state by name, such as `inner_state/0/count`: of one count
        or of many, with or without clipping and spikes.
      going_on: names of the parameters that go on.

    Returns:
      Name in `opt_state` -> name in the checkpoint, of all slots of these parameters; None where another
      optimizer has made the checkpoint.
    """
    ((at, states),) = [
        (path_text(path), node.states)
        for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is(ByParameter))
        if isinstance(node, ByParameter)
    ]
    slots = [
        (path_text(path), slot, shape)
        for path, state in jax.tree_util.tree_leaves_with_path(states, is_leaf=_is(tuple))
        if path_text(path) in going_on
        for slot, shape in _slots(state)
    ]
    names = [f"{at}/states/{param}/{slot}" for param, slot, _ in slots]
    for root in _ROOTS:
        for found in (
            [f"{root}/{slot}" for _, slot, _ in slots],
            [f"{root}/states/{param}/{slot}" for param, slot, _ in slots],
        ):
            if all(saved.get(name) == shape for name, (_, _, shape) in zip(found, slots, strict=True)):
                return dict(zip(names, found, strict=True))
    return None


# Where `optimizers.make_optimizer` has the optimizer itself: inside of what leaves out updates that are not
# finite, behind clipping where there is any, all of it inside of what watches for spikes, if that does.
_ROOTS = tuple(f"{watched}inner_state{clipped}" for watched in ("", "inner_state/") for clipped in ("", "/1"))


def is_slot_apart(name: str) -> bool:
    """Whether a name in a checkpoint is of the state of one parameter's own optimizer."""
    return any(name.startswith(f"opt_state/{root}/states/") for root in _ROOTS)


def _slots(state: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the arrays of an optimizer's state, but for those of schedules."""
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is(optax.ScaleByScheduleState))
    return [(path_text(path), leaf.shape) for path, leaf in nodes if hasattr(leaf, "shape")]


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, kind)
