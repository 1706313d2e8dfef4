"""Parameters in one safetensors file: nested dictionaries, their names joined by slashes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm_jax.checkpoints.parameters import ParameterTable, check_parameters
from slm_jax.errors import UserError


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of nested dictionaries by their path, such as `encoder/layers/mlp/wi/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in table.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    return tree


def save_safetensors(path: str | os.PathLike, params: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes parameters as they are, whole or not at all; the same ones give the same bytes.

    Args:
      path: of the file.
      params: nested dictionaries of numpy or jax arrays, all of them on this host.
      metadata: goes into the file's header; values that are not text as JSON.

    Raises:
      OSError: it cannot be written.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    arrays = {
        name: np.asarray(jax.device_get(leaf), order="C") for name, leaf in sorted(flatten(params).items())
    }
    header = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in (metadata or {}).items()
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # The library leaves a file that its owner alone may read; others may where they may read a usual one.
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(arrays, unfinished, header or None)
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    """Returns nested dictionaries of numpy arrays, bfloat16 included.

    Raises:
      UserError: the file is missing or is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # safetensors knows bfloat16 where ml_dtypes is, which JAX brings.
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return unflatten({name: file.get_tensor(name) for name in names})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def load_placed(
    path: str | os.PathLike, places: Mapping[str, jax.ShapeDtypeStruct], table: ParameterTable
) -> dict[str, jax.Array]:
    """Returns some of a file's arrays, of which it reads the parts that this process's devices hold.

    Args:
      path: of the file.
      places: shapes with dtype and sharding, by name, of the arrays that are wanted.
      table: of all that the file is to hold.

    Raises:
      UserError: the file is missing, is no whole safetensors file, or does not hold what `table` says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            shapes = {name: (tuple(file.get_slice(name).get_shape()), "") for name in names}
            check_parameters(shapes, table, str(path), check_dtype=False)
            return {name: _placed(file, name, place) for name, place in places.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _placed(file: Any, name: str, place: jax.ShapeDtypeStruct) -> jax.Array:
    # The library slices nothing that has no dims or no elements.
    part = file.get_slice(name) if math.prod(place.shape) > 1 else file.get_tensor(name)

    def values(index: Any) -> np.ndarray:
        read = np.asarray(part[index])
        if read.dtype != place.dtype:
            raise UserError(f"parameter {name} has dtype {read.dtype}, expected {place.dtype}")
        return read

    assert place.sharding is not None
    return jax.make_array_from_callback(place.shape, place.sharding, values, place.dtype)
