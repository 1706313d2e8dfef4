"""Published checkpoints become frozen foundation models, and the other way round, a tensor at a time."""

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.checkpoints.families import FAMILIES
from slm_jax.checkpoints.families.base import Family
from slm_jax.checkpoints.families.mapping import Layout, Piece
from slm_jax.checkpoints.fingerprints import StreamedFingerprint
from slm_jax.checkpoints.foundation import (
    RECORD_FILE,
    FoundationRecord,
    architecture,
    save_foundation_streamed,
)
from slm_jax.checkpoints.parameters import ParameterTable, parameter_table
from slm_jax.checkpoints.provenance import package_versions
from slm_jax.checkpoints.sources.base import TensorInfo, TensorSource
from slm_jax.checkpoints.sources.huggingface import CONFIG_FILE, HuggingFaceSource
from slm_jax.checkpoints.sources.t5x import T5XSource, find_t5x
from slm_jax.checkpoints.streaming import StreamedArray
from slm_jax.errors import UserError, nearest
from slm_jax.models.networks import boxed_params
from slm_jax.models.quantization import SCALE, host_scales, quantized, rounded

# int8 is of matrices; what else there is stays in the checkpoint's dtype.
FLOATING = ("float32", "bfloat16")
DTYPES = (*FLOATING, "int8")
# What a tensor that is not stacked may have before it is read in slabs.
_SLAB_BYTES = 256 << 20
# No size in a configuration is above the largest dim of the checkpoint's tensors, or this.
_LEAST_LIMIT = 16_384
_NAMED = 3
_COMPANIONS = (
    "spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def open_source(directory: str | Path) -> TensorSource:
    """Opens a checkpoint of transformers or of T5X, whichever the directory holds.

    Raises:
      UserError: it holds neither, or a damaged one.
    """
    directory = Path(directory)
    try:
        if (directory / RECORD_FILE).is_file():
            raise UserError(
                f"{directory} is a foundation model already: name it in a run, or write it back by --to_hf"
            )
        # A folder of transformers may hold a file called `checkpoint` too, of TensorFlow's.
        if not (directory / CONFIG_FILE).is_file() and find_t5x(directory):
            return T5XSource(directory)
        return HuggingFaceSource(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror or error}") from error


def companions(directory: str | Path) -> list[Path]:
    """Returns the files beside a checkpoint that belong to its tokenizer and its feature extractor.

    Raises:
      UserError: one of them cannot be read.
    """
    found = [path for name in _COMPANIONS if (path := Path(directory) / name).is_file()]
    for path in found:
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: permission denied")
    return found


@dataclass(frozen=True)
class Plan:
    """What a conversion will do; nothing has been read but names and shapes.

    Attributes:
      source: what is converted.
      family: what it is.
      config: our configuration of it.
      table: shape and dtype of every parameter that will be written.
      pieces: where each parameter comes from, by path, layers in order.
      unused: their tensors that are left out, and why.
    """

    source: TensorSource
    family: Family
    config: Any
    table: ParameterTable
    pieces: dict[str, list[Piece]]
    unused: dict[str, str]

    @property
    def bytes(self) -> int:
        """Bytes of the parameters that will be written, before compression."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.table.values())


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Returns the family that a `config.json` names.

    Raises:
      UserError: it names none of those that are known.
    """
    known = {name: family for family in FAMILIES for name in family.model_types}
    found = config.get("model_type")
    if found is None:
        found = _of_architecture(config, known)
    if not isinstance(found, str) or found not in known:
        raise UserError(
            f"{where}: config.json has model_type {found!r}, expected one of {', '.join(sorted(known))}"
        )
    return known[found]


def _of_architecture(config: Mapping[str, Any], known: Collection[str]) -> str | None:
    """Returns the model type that a class of transformers is named for: some files name no other."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    named = [name for name in known if isinstance(first, str) and first.lower().startswith(name)]
    return max(named, key=len, default=None)


def plan_conversion(source: TensorSource, dtype: str | None = None) -> Plan:
    """Decides where every parameter comes from.

    Args:
      source: an opened checkpoint.
      dtype: of the parameters that will be written; that of the checkpoint by default.

    Raises:
      UserError: the architecture is unknown, a tensor is missing, too many, or of another shape or dtype than
        its configuration says.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}{nearest(dtype, DTYPES)}")
    family = family_of(source.config, source.where)
    try:
        config = family.config_of(source.config, source.tensors)
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from error
    _check_sizes(config, source)
    try:
        boxed = boxed_params(config)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(
            f"{source.where}: config.json describes no network that can be built: {error}"
        ) from error
    shapes = {name: shape for name, (shape, _) in parameter_table(nn.unbox(boxed)).items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for piece in family.pieces(config, source.tensors):
        assert piece.parameter in pieces, piece
        pieces[piece.parameter].append(piece)
    for name, found in pieces.items():
        _check_filled(name, shapes[name], found)
    used = {piece.source for found in pieces.values() for piece in found}
    _check_used(source, used, pieces)
    unused = _unused(source, family, used)
    common = _common_dtype(source, used, mixed=dtype in FLOATING)
    if dtype == "int8":
        small = parameter_table(nn.unbox(jax.eval_shape(quantized, boxed)))
        table: ParameterTable = {
            name: (shape, common if name in shapes and kind != "int8" else kind)
            for name, (shape, kind) in small.items()
        }
        # A scale is made of the same tensors as its matrix.
        pieces |= {name: pieces[name.removesuffix(SCALE)] for name in table if name not in pieces}
    else:
        table = {name: (shape, dtype or common) for name, shape in shapes.items()}
    return Plan(source, family, config, table, pieces, unused)


def convert(
    plan: Plan,
    directory: str | Path,
    *,
    files: Collection[str | Path] = (),
    written: Callable[[int], None] = lambda _: None,
) -> FoundationRecord:
    """Writes the foundation model; see `foundation.save_foundation_streamed`.

    Args:
      plan: of `plan_conversion`.
      directory: must not exist, or be empty.
      files: to lie beside the parameters, such as a tokenizer.
      written: told the bytes of each part when it is on disk.

    Raises:
      UserError: a tensor cannot be read or holds no numbers, or the directory cannot be written.
    """
    fingerprint = StreamedFingerprint(plan.table)
    arrays = {
        name: StreamedArray(
            shape,
            np.dtype(dtype),
            plan.pieces[name][0].layer is not None,
            _hashed(name, fingerprint, _Parts(plan, name, fingerprint.tile(name))),
            _head_features(name, shape),
        )
        for name, (shape, dtype) in plan.table.items()
    }
    _check_copies(plan)
    origin = {
        "where": plan.source.where,
        "config": dict(plan.source.config),
        "unused_tensors": plan.unused,
        "packages": package_versions(),
    }
    return save_foundation_streamed(
        directory,
        arrays,
        kind=plan.family.kind,
        config=architecture(plan.config),
        fingerprint=fingerprint.result,
        files=files,
        provenance={"source": origin},
        written=written,
    )


def _head_features(name: str, shape: tuple[int, ...]) -> int | None:
    """Returns which dim of a stacked kernel counts the features of a head, if it is attention's."""
    if len(shape) != 4 or not name.endswith("/kernel"):
        return None
    # [layers, heads, features, embedding] of the output, else [layers, embedding, heads, features].
    return 2 if name.endswith("/out/kernel") else 3


@dataclass(frozen=True)
class _Parts:
    """Makes a parameter part by part: some layers of a stacked one, slabs of a large one."""

    plan: Plan
    name: str
    tile: tuple[int, ...]
    read_before: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict)

    def __call__(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        shape, dtype = self.plan.table[self.name]
        pieces = self.plan.pieces[self.name]
        if pieces[0].layer is None:
            yield from self._slabs(pieces[0], np.dtype(dtype))
            return
        step = self.tile[0]
        for first in range(0, len(pieces), step):
            part = np.empty((step, *shape[1:]), dtype)
            for place, piece in zip(part, pieces[first : first + step], strict=True):
                place[...] = self._stored(piece.layout.to_ours(self._read(piece)), stacked=True)
            yield (first, *(0 for _ in shape[1:])), part
        # This object lives as long as the conversion; what it has read must not.
        self.read_before.clear()

    def _slabs(self, piece: Piece, dtype: np.dtype) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        layout = piece.layout
        dim = slab_dim(layout)
        rows = layout.theirs[0] if layout.theirs else 0
        row_bytes = math.prod(layout.theirs[1:]) * 4
        if dim is None or rows * row_bytes <= _SLAB_BYTES or self._is_summed(dim):
            values = self._stored(layout.to_ours(self._read(piece)), stacked=False)
            yield (0,) * len(layout.ours), values.astype(dtype)
            return
        step = max(1, _SLAB_BYTES // row_bytes // self.tile[dim]) * self.tile[dim]
        for first in range(0, rows, step):
            count = min(step, rows - first)
            ours = tuple(count if index == dim else size for index, size in enumerate(layout.ours))
            part = dataclasses.replace(layout, theirs=(count, *layout.theirs[1:]), ours=ours, split=())
            start = tuple(first if index == dim else 0 for index in range(len(ours)))
            values = part.to_ours(self._read(piece, slice(first, first + count)))
            yield start, self._stored(values, stacked=False).astype(dtype)

    def _stored(self, values: np.ndarray, stacked: bool) -> np.ndarray:
        """Returns what is written of a parameter's values, or of one layer's: themselves, int8, or scales."""
        table = self.plan.table
        if table[self.name][1] == "int8":
            return rounded(values, self._scale_shape(values, self.name + SCALE, stacked))[0]
        if table.get(self.name.removesuffix(SCALE), ("", ""))[1] == "int8":
            return host_scales(values, self._scale_shape(values, self.name, stacked))
        return values

    def _is_summed(self, dim: int) -> bool:
        """Whether int8 scales are taken over a dim, so that no part of it will do."""
        scale = self.plan.table.get(self.name.removesuffix(SCALE) + SCALE)
        return scale is not None and scale[0][dim] == 1

    def _scale_shape(self, values: np.ndarray, name: str, stacked: bool) -> tuple[int, ...]:
        whole = self.plan.table[name][0][stacked:]
        return tuple(1 if scale == 1 else size for size, scale in zip(values.shape, whole, strict=True))

    def _read(self, piece: Piece, rows: slice | None = None) -> np.ndarray:
        index: tuple[int | slice, ...] = () if rows is None else (rows,)
        if piece.select is not None:
            return self._selected(piece, *piece.select)
        return self._checked(piece.source, index)

    def _selected(self, piece: Piece, axis: int, number: int) -> np.ndarray:
        """Returns one layer of a tensor of theirs that holds many; several of them are read at a time."""
        info = self.plan.source.tensors[piece.source]
        layer_bytes = math.prod(info.shape) * info.dtype.itemsize // max(1, info.shape[axis])
        count = max(1, _SLAB_BYTES // max(1, layer_bytes))
        first = number - number % count
        key = (piece.source, first)
        if key not in self.read_before:
            self.read_before.clear()
            layers = slice(first, min(first + count, info.shape[axis]))
            index = (*(slice(None) for _ in range(axis)), layers)
            self.read_before[key] = self._checked(piece.source, index)
        return self.read_before[key].take(number - first, axis=axis)

    def _checked(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        values = self.plan.source.read(name, index)
        if not np.isfinite(values).all():
            raise UserError(f"{self.plan.source.where}: tensor {name} holds values that are no numbers")
        return values


def slab_dim(layout: Layout) -> int | None:
    """Returns the dim of ours along which their rows lie; None where a row of theirs is no slab of ours."""
    if not layout.theirs or layout.split not in ((), layout.theirs):
        return None
    order = layout.order or tuple(range(len(layout.theirs)))
    if tuple(layout.theirs[dim] for dim in order) != layout.ours:
        return None
    return order.index(0)


def _hashed(
    name: str, fingerprint: StreamedFingerprint, parts: _Parts
) -> Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]:
    def hashed() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for start, data in parts():
            data = np.ascontiguousarray(data)
            fingerprint.add(name, start, data)
            yield start, data

    return hashed


def _check_sizes(config: Any, source: TensorSource) -> None:
    """Raises UserError where a size is beyond all that the checkpoint holds.

    So that a damaged configuration never makes the conversion reserve memory.
    """
    limit = max([_LEAST_LIMIT, *(size for info in source.tensors.values() for size in info.shape)])
    layers = max(1, len(source.tensors))
    for name, value in _whole_numbers(architecture(config)):
        most = layers if name.endswith("layers") else limit
        if not -limit <= value <= most:
            raise UserError(
                f"{source.where}: config.json gives {name} = {value}, expected at most {most} by its tensors"
            )


def _whole_numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _whole_numbers(value, f"{prefix}.{name}".lstrip("."))
    elif isinstance(config, (tuple, list)):
        for item in config:
            yield from _whole_numbers(item, prefix)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield prefix, config


def _check_filled(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
    """Asserts that a family fills a parameter whole, each layer once; a family that does not has a bug."""
    pieces.sort(key=lambda piece: piece.layer or 0)
    layers = [piece.layer for piece in pieces]
    stacked = len(pieces) > 0 and layers[0] is not None
    assert layers == (list(range(shape[0])) if stacked else [None]), (name, shape, layers)
    for piece in pieces:
        assert piece.layout.ours == (shape[1:] if stacked else shape), (piece, shape)


def _check_used(source: TensorSource, used: set[str], pieces: dict[str, list[Piece]]) -> None:
    """Raises UserError unless every tensor that is used is there, of the shape that is expected."""
    if missing := sorted(used - source.tensors.keys()):
        raise UserError(
            f"{source.where} lacks {_names(missing)}, which its configuration asks for"
            f"{nearest(missing[0], source.tensors) if len(source.tensors) < 10_000 else ''}"
        )
    for of_parameter in pieces.values():
        for piece in of_parameter:
            shape = found = source.tensors[piece.source].shape
            if piece.select is not None:
                axis, number = piece.select
                inside = axis < len(shape) and number < shape[axis]
                shape = (*shape[:axis], *shape[axis + 1 :]) if inside else (-1,)
            if shape != piece.layout.theirs:
                raise UserError(
                    f"{source.where}: tensor {piece.source} has shape {list(found)}, "
                    f"and its configuration asks for {list(piece.layout.theirs)}"
                    + ("" if piece.select is None else f" without axis {piece.select[0]}, the layers")
                )


def _unused(source: TensorSource, family: Family, used: set[str]) -> dict[str, str]:
    reasons = {name: family.unused(name) for name in source.tensors if name not in used}
    if unknown := sorted(name for name, reason in reasons.items() if reason is None):
        raise UserError(
            f"{source.where} holds {_names(unknown)}, for which a model of its configuration has no use"
        )
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _check_copies(plan: Plan) -> None:
    """Raises UserError where a tensor that is left out as a copy is none."""
    source = plan.source
    for copy, original in plan.family.copies(plan.config, source.tensors):
        shape, wanted = source.tensors[copy].shape, source.tensors[original].shape
        step = max(1, _SLAB_BYTES // max(1, 8 * math.prod(wanted[1:])))
        rows = [(slice(first, first + step),) for first in range(0, wanted[0], step)]
        if shape != wanted or not all(
            np.array_equal(source.read(copy, some), source.read(original, some)) for some in rows
        ):
            raise UserError(
                f"{source.where}: tensor {copy} differs from {original}, and its configuration asks "
                "for one table that is both"
            )


def _common_dtype(source: TensorSource, used: set[str], mixed: bool) -> str:
    """Returns the dtype of the tensors that are used; where they may be `mixed`, one of those."""
    infos: dict[str, TensorInfo] = {name: source.tensors[name] for name in sorted(used)}
    found: dict[str, str] = {}
    for name, info in infos.items():
        if not jnp.issubdtype(info.dtype, jnp.floating):
            raise UserError(
                f"{source.where}: tensor {name} has dtype {info.dtype.name}, expected floating ones"
            )
        found.setdefault(info.dtype.name, name)
    if len(found) > 1 and not mixed:
        examples = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(found.items()))
        raise UserError(f"{source.where} mixes dtypes: {examples}; say by --dtype which one is to be written")
    dtype = min(found)
    return "float32" if dtype == "float64" else dtype


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    noun = "tensors" if len(names) > 1 else "tensor"
    return f"{noun} {', '.join(names[:_NAMED])}{more}"
