"""Parameters in one safetensors file: nested dictionaries, their names joined by slashes."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm_jax import storage
from slm_jax.checkpoints.parameters import ParameterTable, check_parameters
from slm_jax.errors import UserError

_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jax.numpy.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


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

    if storage.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "params.safetensors"
            save_safetensors(local, params, metadata)
            storage.put(local, os.fspath(path))
        return
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

    if storage.is_remote(path):
        file = _RemoteFile(path)
        return unflatten({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, safetensors' own
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
        opened = _RemoteFile(path) if storage.is_remote(path) else safe_open(path, framework="numpy")
        with opened as file:
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


class _Tensor(NamedTuple):
    """Where a tensor lies in the bytes after the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _RemoteFile:
    """What this file needs of safetensors' `safe_open`, of a remote file: it is read in stretches.

    Raises:
      UserError: it is missing, or no whole safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._file = storage.asked(path, lambda: storage.SharedFile(path))
        length = int.from_bytes(self._read(0, 8), "little")
        try:
            if not 0 < length <= self._file.size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(self._read(8, length))
            self._begin = 8 + length
            self._tensors = {
                name: _Tensor(_DTYPES[told["dtype"]], tuple(told["shape"]), *told["data_offsets"])
                for name, told in header.items()
                if name != "__metadata__"
            }
            if (
                self._begin + max((tensor.end for tensor in self._tensors.values()), default=0)
                > self._file.size
            ):
                raise ValueError("it is cut off")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} cannot be read: no whole safetensors file ({error})") from error

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> "_RemoteSlice":
        """A tensor of which parts are read."""
        return _RemoteSlice(self, name)

    def get_tensor(self, name: str) -> np.ndarray:
        """The whole of a tensor."""
        shape = self.shape(name)
        return self.rows(name, 0, shape[0] if shape else 1)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """A stretch along the first dim, which lies together in the file."""
        dtype, shape, begin, end = self._tensors[name]
        count = shape[0] if shape else 1
        size = (end - begin) // max(1, count)
        data = self._read(self._begin + begin + start * size, (stop - start) * size)
        return np.frombuffer(data, dtype).reshape((stop - start, *shape[1:]) if shape else ())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._tensors[name].shape

    def _read(self, offset: int, length: int) -> bytes:
        return storage.asked(self._path, lambda: self._file.read_at(offset, length))


class _RemoteSlice:
    def __init__(self, file: _RemoteFile, name: str):
        self._file, self._name = file, name

    def get_shape(self) -> tuple[int, ...]:
        return self._file.shape(self._name)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.get_shape()[0])
        return self._file.rows(self._name, start, stop)[(slice(None), *index[1:])]
