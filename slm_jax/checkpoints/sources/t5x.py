"""Checkpoints of T5X, read without T5X: msgpack with zarr arrays beside it, or Orbax.

A legacy checkpoint is a folder `checkpoint_<step>` with a file `checkpoint`, a msgpack index of the train
state. A leaf of it is an array inside the index, or says in which folder beside it a zarr array lies; where
it was *written* (a bucket, an absolute path) is ignored. An Orbax checkpoint holds `state/`, with all
arrays in one OCDBT store or with one folder each. Parameters are what lies below `target`; the optimizer's
state is named, for the conversion to leave out.

Nothing is unpickled, and what a damaged index claims is held against the files before memory is asked for.

The configuration is not in the checkpoint. It is read off names and shapes, in the words of T5X's `T5Config`;
what shapes cannot say, the activation and the distance of the last bucket of relative positions, is T5's.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts

from slm_jax.checkpoints.directories import first_line
from slm_jax.checkpoints.sources.base import TensorInfo
from slm_jax.errors import UserError

INDEX = "checkpoint"
_STEP = re.compile(r"checkpoint_(\d+)")
_NEWEST_FORMAT = 3
_MOST_INDEX_BYTES = 1 << 33
_MOST_DIMS = 8
# gzip gives at most 1032 bytes for one; what claims more is damaged.
_MOST_EXPANSION = 1100
_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
_CHUNKED = "__msgpack_chunked_array__"
_PARAMETERS = "target."
_EMBEDDING = "target.token_embedder.embedding"
_NO_T5 = "expected the parameters of a T5"


class _Inline(NamedTuple):
    """An array that stands in the index."""

    info: TensorInfo
    data: bytes


class _Folder(NamedTuple):
    """A zarr array in a folder beside the index."""

    info: TensorInfo
    path: Path


class _Store(NamedTuple):
    """A zarr array in an OCDBT store."""

    info: TensorInfo
    array: Any


def find_t5x(directory: str | Path) -> Path | None:
    """Returns the folder of a T5X checkpoint, or None where there is none.

    Args:
      directory: the checkpoint, or the folder that holds `checkpoint_<step>`: the newest of those.
    """
    return next(iter(_steps(Path(directory))), None)


class T5XTensors:
    """What a T5X checkpoint holds, of whatever model.

    Attributes:
      where: the checkpoint's folder.
      notes: what a user should know of the choice, such as that the newest of several steps was taken.
      tensors: names are paths in the train state, joined by dots: `target.encoder.encoder_norm.scale`.
    """

    def __init__(self, directory: str | Path):
        """Opens a checkpoint, or the newest of those that a folder holds.

        Raises:
          UserError: there is none, it is damaged, or a part of it is missing.
        """
        steps = _steps(Path(directory))
        if not steps:
            raise UserError(f"{directory} is no T5X checkpoint, expected a folder checkpoint_<step>")
        folder = steps[0]
        self.where = str(folder)
        self.notes: tuple[str, ...] = ()
        if len(steps) > 1:
            self.notes = (f"{folder.name} is the newest of {len(steps)} checkpoints in {folder.parent}",)
        legacy = (folder / INDEX).is_file()
        self._places = dict(_legacy(folder) if legacy else _orbax(folder / "state"))
        self.tensors: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}

    def parameters(self) -> dict[str, TensorInfo]:
        """Shape and dtype of each parameter by its path, such as `adapter/out/kernel`."""
        return {
            name.removeprefix(_PARAMETERS).replace(".", "/"): info
            for name, info in self.tensors.items()
            if name.startswith(_PARAMETERS)
        }

    def parameter(self, path: str) -> np.ndarray:
        """Returns a parameter by its path; raises UserError as `read`."""
        return self.read(_PARAMETERS + path.replace("/", "."))

    def read(self, name: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Returns the tensor `name`, or what `tensor[index]` is; see `sources.base.TensorSource.read`."""
        place = self._places[name]
        if isinstance(place, _Inline):
            array = np.frombuffer(place.data, place.info.dtype).reshape(place.info.shape)
            return array[index]
        try:
            array = place.array if isinstance(place, _Store) else _open_folder(place.path)
            return np.asarray((array[index] if index else array).read().result())
        except (ValueError, OSError, IndexError, TypeError, MemoryError) as error:
            raise UserError(f"{self.where}: {name} cannot be read: {first_line(error)}") from error


class T5XSource(T5XTensors):
    """A T5X checkpoint of a T5 opened for reading; see `sources.base.TensorSource`.

    Attributes:
      config: what shapes say of the network, by the names of T5X's `T5Config`, with `model_type` of `t5x`.
    """

    def __init__(self, directory: str | Path):
        """Opens a checkpoint, or the newest of those that a folder holds.

        Raises:
          UserError: there is none, it is damaged, a part of it is missing, or it is no T5.
        """
        super().__init__(directory)
        self.config: Mapping[str, Any] = _config(self.where, self.tensors)
        activation, distance = (
            self.config[name] for name in ("mlp_activations", "relative_attention_max_distance")
        )
        assumed = f"{activation[0]}, {distance}"
        self.notes += (f"T5X tells no activation and no distance of the last bucket: taken as {assumed}",)


def _steps(directory: Path) -> list[Path]:
    """The checkpoints that a folder is or holds, the newest first."""
    if _is_checkpoint(directory):
        return [directory]
    found: list[tuple[int, Path]] = []
    if directory.is_dir():
        for folder in directory.iterdir():
            if (step := _STEP.fullmatch(folder.name)) and len(step[1]) < 20 and _is_checkpoint(folder):
                found.append((int(step[1]), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _is_checkpoint(folder: Path) -> bool:
    state = folder / "state"
    return (folder / INDEX).is_file() or any((state / file).is_file() for file in ("_METADATA", INDEX))


def _legacy(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and places of the parameters of a legacy checkpoint; of the optimizer, names and shapes."""
    path = folder / INDEX
    try:
        size = path.stat().st_size
        if size > _MOST_INDEX_BYTES:
            raise UserError(f"{path} has {size} bytes, expected an index of at most {_MOST_INDEX_BYTES}")
        tree = _unpacked(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    version = tree.get("version", 0) if isinstance(tree, dict) else None
    if isinstance(version, _Inline) or not isinstance(version, int):
        raise UserError(f"{path} is damaged: it is no index of a T5X checkpoint")
    if version > _NEWEST_FORMAT:
        raise UserError(f"{path} has format {version}, expected at most {_NEWEST_FORMAT}")
    optimizer = tree.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("target"), dict):
        raise UserError(f"{path} is damaged: it has no optimizer/target, {_NO_T5}")
    for name, leaf in _leaves(path, optimizer["target"], "target"):
        yield name, _place(folder, name, leaf)
    for name, leaf in _leaves(path, optimizer.get("state") or {}, "state"):
        if isinstance(leaf, _Inline):
            yield name, leaf
        elif (info := _info_of_spec(leaf)) is not None:
            yield name, _Folder(info, folder / _folder_name(leaf))


def _unpacked(data: bytes) -> Any:
    """The index as plain values; arrays in it stay bytes, checked against their shape."""
    return msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_extension)


def _extension(code: int, data: bytes) -> Any:
    # The types of flax.serialization: 1 an array, 2 a complex number, 3 a scalar.
    if code not in (1, 3):
        return None
    parts = msgpack.unpackb(data, raw=False, strict_map_key=True)
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("an array in the index has no shape, dtype and bytes")
    shape, name, values = parts
    info = TensorInfo(_shape(shape), _dtype(name))
    if not isinstance(values, bytes) or len(values) != math.prod(info.shape) * info.dtype.itemsize:
        raise ValueError(f"an array in the index, of shape {info.shape}, has another number of bytes")
    return _Inline(info, values)


def _leaves(path: Path, root: Any, root_name: str) -> Iterator[tuple[str, Any]]:
    """What stands at the ends of a tree, by its path. An explicit stack: depth is the file's to choose."""
    stack = [(root_name, root)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, dict) and _CHUNKED in node:
            yield name, _whole(path, name, node)
        elif isinstance(node, dict) and not _is_spec(node):
            for key, value in node.items():
                if not isinstance(key, str) or not key.isprintable():
                    raise UserError(f"{path} is damaged: {name} has the name {str(key)[:80]!r} in it")
                stack.append((f"{name}.{key}", value))
        elif node is not None:
            yield name, node


def _is_spec(node: dict) -> bool:
    return isinstance(node.get("driver"), str) or isinstance(node.get("kvstore"), dict)


def _whole(path: Path, name: str, node: dict) -> _Inline:
    """An array that flax cut into pieces of at most 1 GiB."""
    try:
        shape = _shape(node["shape"] if isinstance(node["shape"], list) else _in_order(node["shape"]))
        chunks = _in_order(node["chunks"])
        dtypes = {chunk.info.dtype for chunk in chunks}
        data = b"".join(chunk.data for chunk in chunks)
        if len(dtypes) != 1 or len(data) != math.prod(shape) * next(iter(dtypes)).itemsize:
            raise ValueError(f"its chunks are not an array of shape {shape}")
        return _Inline(TensorInfo(shape, dtypes.pop()), data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {name}: {first_line(error)}") from error


def _in_order(numbered: Any) -> list[Any]:
    return [numbered[str(number)] for number in range(len(numbered))]


def _shape(shape: Any) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or len(shape) > _MOST_DIMS or any(not 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"shape {str(shape)[:80]}")
    if math.prod(shape) >= 1 << 45:
        raise ValueError(f"shape {shape}")
    return tuple(shape)


def _dtype(name: Any) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype {str(name)[:80]!r}")
    return np.dtype(jnp.bfloat16 if name == "bfloat16" else name)


def _place(folder: Path, name: str, leaf: Any) -> _Inline | _Folder:
    """Where a parameter lies, checked as far as it can be without reading it."""
    if isinstance(leaf, _Inline):
        return leaf
    if not isinstance(leaf, dict):
        raise UserError(f"{folder / INDEX} is damaged: {name} is {str(leaf)[:80]!r}, expected an array")
    last = _folder_name(leaf)
    if last in ("", ".", "..") or not last.isprintable():
        raise UserError(f"{folder / INDEX} is damaged: {name} has no path")
    info = _check_folder(folder / last)
    stated = _info_of_spec(leaf)
    if stated is not None and stated != info:
        raise UserError(
            f"{folder / INDEX}: {name} has shape {stated.shape} and dtype {stated.dtype}, but the array "
            f"beside it has {info.shape} and {info.dtype}"
        )
    return _Folder(info, folder / last)


def _folder_name(leaf: dict) -> str:
    """The last part of where an array was written: its name beside the index."""
    store = leaf.get("kvstore")
    written = leaf.get("path") or (store.get("path") if isinstance(store, dict) else None)
    return written.rstrip("/").rsplit("/", 1)[-1] if isinstance(written, str) else ""


def _info_of_spec(leaf: Any) -> TensorInfo | None:
    """Shape and dtype that the index states, where it does."""
    if isinstance(leaf, _Inline):
        return leaf.info
    try:
        return TensorInfo(_shape(leaf["metadata"]["shape"]), _dtype(leaf["dtype"]))
    except (ValueError, TypeError, KeyError):
        return None


def _check_folder(path: Path) -> TensorInfo:
    """Shape and dtype of a zarr array, all of whose chunks are there.

    Raises:
      UserError: it is missing, damaged, or claims sizes that its files cannot hold.
    """
    file = path / ".zarray"
    try:
        described = json.loads(file.read_bytes())
        shape, chunks = _shape(described["shape"]), _shape(described["chunks"])
        dtype = _zarr_dtype(described["dtype"])
        separator = described.get("dimension_separator", ".")
        if described["zarr_format"] != 2 or len(shape) != len(chunks) or 0 in chunks or separator != ".":
            raise ValueError("it is not of zarr's format 2")
        files = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.name[0] != "."}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}") from error
    grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    if math.prod(grid) != len(files):
        raise UserError(f"{path} has {len(files)} chunks, expected {math.prod(grid)}: the array is not whole")
    chunk_bytes = math.prod(chunks) * dtype.itemsize
    if files and chunk_bytes > _MOST_EXPANSION * min(files.values()) + 4096:
        raise UserError(f"{path} has a chunk of {min(files.values())} bytes, expected one for {chunk_bytes}")
    return TensorInfo(shape, dtype)


def _zarr_dtype(name: Any) -> np.dtype:
    if name == "bfloat16":
        return _dtype(name)
    if not isinstance(name, str) or not re.fullmatch(r"[<|][fiub]\d", name):
        raise ValueError(f"dtype {str(name)[:80]!r}")
    return _dtype(np.dtype(name).name)


def _open_folder(path: Path) -> Any:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path.absolute()}/"},
        # A chunk that is not there would else be zeros.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, read=True).result()


def _orbax(state: Path) -> Iterator[tuple[str, Any]]:
    """Names and places of what an Orbax checkpoint holds."""
    if not (state / "manifest.ocdbt").is_file():
        folders = sorted(path for path in state.iterdir() if (path / ".zarray").is_file())
        for path in folders:
            if path.name.startswith(_PARAMETERS):
                yield path.name, _Folder(_check_folder(path), path)
            elif (info := _info_of_folder(path)) is not None:
                yield path.name, _Folder(info, path)
        return
    base = {"driver": "ocdbt", "base": f"file://{state.absolute()}/"}
    try:
        keys = ts.KvStore.open(base).result().list().result()
        roots = sorted(
            {key.decode().rsplit("/", 1)[0] for key in keys if key.endswith((b"/.zarray", b"/zarr.json"))}
        )
        drivers = {key.decode().rsplit("/", 1)[0]: "zarr3" for key in keys if key.endswith(b"/zarr.json")}
        opened = {
            name: ts.open(
                {
                    "driver": drivers.get(name, "zarr"),
                    "kvstore": {**base, "path": f"{name}/"},
                    "fill_missing_data_reads": False,
                },
                open=True,
                read=True,
            )
            for name in roots
        }
        for name, future in opened.items():
            array = future.result()
            yield name, _Store(TensorInfo(tuple(array.shape), array.dtype.numpy_dtype), array)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UserError(f"{state} is damaged: {first_line(error)}") from error


def _info_of_folder(path: Path) -> TensorInfo | None:
    try:
        return _check_folder(path)
    except UserError:
        return None


def _config(where: str, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """What names and shapes say of the network, as T5X's `T5Config` names it.

    Raises:
      UserError: a tensor that every T5 has is missing, or has the wrong number of dims.
    """

    def shape(name: str, *dims: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{where} has no {name}, {_NO_T5}")
        found = tensors[name].shape
        if len(found) not in dims or 0 in found:
            wanted = " or ".join(map(str, dims))
            raise UserError(f"{where}: {name} has shape {found}, expected {wanted} dims, {_NO_T5}")
        return found

    def stack(name: str) -> tuple[str, int]:
        """Where the first layer of a stack is, and how many there are."""
        scanned = f"{_PARAMETERS}{name}.{name}"
        norm = f"pre_{'self_' * (name == 'decoder')}attention_layer_norm.scale"
        if f"{scanned}.{norm}" in tensors:
            found = shape(f"{scanned}.{norm}", 2)
            return scanned, found[1] if found[0] == vocabulary[1] else found[0]
        first = f"{_PARAMETERS}{name}.layers_0"
        shape(f"{first}.{norm}", 1)
        layer = re.compile(rf"target\.{name}\.layers_(\d{{1,6}})\.{re.escape(norm)}")
        numbers = [int(found[1]) for found in map(layer.fullmatch, tensors) if found]
        if sorted(numbers) != list(range(len(numbers))):
            raise UserError(f"{where} has layers {sorted(numbers)} of the {name}, expected all from 0")
        return first, len(numbers)

    vocabulary = shape(_EMBEDDING, 2)
    encoder, encoder_layers = stack("encoder")
    _, decoder_layers = stack("decoder")
    scanned = encoder == f"{_PARAMETERS}encoder.encoder"
    own = f"{encoder}.relpos_bias.rel_embedding"
    per_layer = own in tensors
    table = shape(own if per_layer else f"{_PARAMETERS}encoder.relpos_bias.rel_embedding", 2, 3)
    gated = f"{encoder}.mlp.wi_0.kernel" in tensors
    mlp = shape(f"{encoder}.mlp.{'wi_0' if gated else 'wi'}.kernel", 3 if scanned else 2)
    query = shape(f"{encoder}.attention.query.kernel", *((3, 4) if scanned else (2, 3)))
    fused = len(query) == (3 if scanned else 2)
    # The axis of the layers is never the last one, nor the last but one.
    heads = table[0] if not (per_layer and scanned) or fused else query[-2]
    if fused and query[-1] % heads:
        raise UserError(f"{where}: {query[-1]} features of the queries are no multiple of {heads} heads")
    return {
        "model_type": "t5x",
        "vocab_size": vocabulary[0],
        "emb_dim": vocabulary[1],
        "num_heads": heads,
        "head_dim": query[-1] // heads if fused else query[-1],
        "mlp_dim": mlp[-1],
        "num_encoder_layers": encoder_layers,
        "num_decoder_layers": decoder_layers,
        "mlp_activations": ["gelu", "linear"] if gated else ["relu"],
        "logits_via_embedding": "target.decoder.logits_dense.kernel" not in tensors,
        "relative_bias": "layer" if per_layer else "shared",
        "relative_attention_num_buckets": table[-1],
        "relative_attention_max_distance": 128,
    }
