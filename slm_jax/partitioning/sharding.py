"""From logical axis names to shardings, and the sharding plan as text."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.errors import UserError, nearest
from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules

PyTree = Any
KeyPath = tuple[Any, ...]


def named_shardings(boxed_abstract: PyTree, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> PyTree:
    """Maps variables with logical axis names to shardings.

    Args:
      boxed_abstract: tree of shapes, boxed by `nn.with_logical_partitioning`; an unboxed leaf is replicated.
      mesh: the device mesh.
      rules: logical axis -> mesh axis.

    Returns:
      The same tree without boxes, with a NamedSharding at every leaf.

    Raises:
      UserError: a logical axis without a rule, or a dim that its mesh axis does not divide.
    """

    def of_leaf(path: KeyPath, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _leaf_spec(path_text(path), leaf, mesh, rules))

    return jax.tree_util.tree_map_with_path(of_leaf, boxed_abstract, is_leaf=_is_box)


def batch_sharding(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> NamedSharding:
    """The sharding of every array of a batch: rows over the batch axes, all else whole."""
    return NamedSharding(mesh, PartitionSpec(_as_rules(rules)["activation_batch"]))


def batch_shards(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> int:
    """Into how many parts the rows of a batch are split."""
    return _ways(_as_rules(rules)["activation_batch"], mesh)


def check_batch_rows(rows: int, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> None:
    """Raises UserError, naming the nearest sizes that fit, where batch shards do not divide `rows`."""
    shards = batch_shards(mesh, rules)
    if rows % shards:
        below = rows // shards * shards
        choices = " or ".join(str(size) for size in (below, below + shards) if size)
        raise UserError(
            f"batch size {rows} is not divisible by the mesh's {shards} batch shards; "
            f"the nearest is {choices}"
        )


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> Iterator[None]:
    """Gives meaning to the logical constraints inside models; every call of a jitted model goes in here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def spec_of(names: Sequence[str | None], mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> PartitionSpec:
    """The partition spec of an array with these logical axes, a mesh axis used once at most.

    Raises:
      UserError: a name has no rule.
    """
    table = _as_rules(rules)
    for name in names:
        if name is not None and name not in table:
            raise UserError(f"logical axis {name!r} has no partitioning rule{nearest(name, table)}")
    taken: set[str] = set()
    spec: list[str | tuple[str, ...] | None] = [None] * len(names)
    for name, mesh_axes in rules:
        for dim, dim_name in enumerate(names):
            axes = _axes(mesh_axes)
            if dim_name == name and spec[dim] is None and axes and not taken.intersection(axes):
                unknown = set(axes) - set(mesh.axis_names)
                if unknown:
                    raise UserError(
                        f"rule {name!r} -> {mesh_axes!r} names no axis of the mesh"
                        f"{nearest(sorted(unknown)[0], mesh.axis_names)}"
                    )
                spec[dim] = mesh_axes
                taken.update(axes)
    return PartitionSpec(*spec)


def plan_text(boxed_abstract: Mapping[str, PyTree], mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> str:
    """The sharding plan: path, shape, dtype, logical axes, spec and bytes per device of every variable.

    Args:
      boxed_abstract: boxed shapes by collection, as `jax.eval_shape(model.init, ...)` returns them.
      mesh: the device mesh.
      rules: logical axis -> mesh axis.

    Raises:
      UserError: as `named_shardings`.
    """
    lines = ["mesh: " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())]
    for collection, tree in boxed_abstract.items():
        rows, total, per_device, count = [], 0, 0, 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
            value = leaf.value if _is_box(leaf) else leaf
            name = path_text(path)
            sharding = NamedSharding(mesh, _leaf_spec(f"{collection}/{name}", leaf, mesh, rules))
            local = math.prod(sharding.shard_shape(value.shape)) * value.dtype.itemsize
            total += math.prod(value.shape) * value.dtype.itemsize
            per_device += local
            count += math.prod(value.shape)
            axes = f"({','.join(str(axis) for axis in leaf.names)})" if _is_box(leaf) else "-"
            rows.append(
                (
                    name,
                    _shape_text(value.shape),
                    value.dtype.name,
                    axes,
                    _spec_text(sharding),
                    f"{local:,}",
                )
            )
        lines += ["", f"{collection}:", *_columns(rows)]
        lines.append(f"  total: {count:,} parameters, {total:,} bytes, {per_device:,} bytes per device")
    return "\n".join(lines) + "\n"


def like_params(abstract: PyTree, params: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree that mirrors the parameters, such as an optimizer's state.

    A leaf whose path ends in a parameter's path and has its shape is split as the parameter is; one that
    lacks some of its dims (Adafactor's row and column statistics) keeps the split of the dims it has; all
    else is replicated.

    Args:
      abstract: shapes of the tree, from unboxed parameters.
      params: shapes of the parameters, unboxed.
      param_shardings: their shardings.
      mesh: the device mesh.
    """
    known = {
        path: (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(param_shardings), strict=True
        )
    }

    def of_leaf(path: KeyPath, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            if path[start:] in known:
                shape, spec = known[path[start:]]
                return NamedSharding(mesh, _reduced_spec(leaf.shape, shape, spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of_leaf, abstract)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def path_text(path: KeyPath) -> str:
    """A tree path as `encoder/layers/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _reduced_spec(shape: tuple[int, ...], full: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    entries = tuple(spec) + (None,) * (len(full) - len(spec))
    kept: list[Any] = []
    position = 0
    for size in shape:
        # A dim that is not found, or one of several of the same size, is left whole: such slots are small.
        while position < len(full) and full[position] != size:
            position += 1
        if position == len(full) or (len(shape) < len(full) and full.count(size) > 1):
            return PartitionSpec()
        kept.append(entries[position])
        position += 1
    return PartitionSpec(*kept)


def _leaf_spec(name: str, leaf: Any, mesh: Mesh, rules: LogicalRules) -> PartitionSpec:
    if not _is_box(leaf):
        return PartitionSpec()
    if len(leaf.names) != len(leaf.value.shape):
        raise UserError(
            f"parameter {name} of shape {_shape_text(leaf.value.shape)} names {len(leaf.names)} "
            f"logical axes: {tuple(leaf.names)}"
        )
    try:
        spec = spec_of(leaf.names, mesh, rules)
    except UserError as error:
        raise UserError(f"parameter {name}: {error}") from None
    for size, axis, mesh_axes in zip(leaf.value.shape, leaf.names, spec, strict=True):
        ways = _ways(mesh_axes, mesh)
        if size % ways:
            raise UserError(
                f"parameter {name}: dim {axis!r} of size {size} is not divisible by mesh axis "
                f"{'*'.join(_axes(mesh_axes))} of size {ways}"
            )
    return spec


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.Partitioned)


def _as_rules(rules: LogicalRules) -> dict[str, str | tuple[str, ...] | None]:
    # The first rule of a name is the one that counts for whether it is known at all.
    return dict(reversed(rules))


def _axes(mesh_axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def _ways(mesh_axes: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(mesh_axes))


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def _spec_text(sharding: NamedSharding) -> str:
    axes = ["*".join(_axes(mesh_axes)) or "-" for mesh_axes in sharding.spec]
    return f"({','.join(axes)})" if axes else "-"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
