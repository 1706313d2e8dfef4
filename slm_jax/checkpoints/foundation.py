"""Foundation models on disk: saved once, referenced by runs, never copied."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike

from slm_jax import storage
from slm_jax.checkpoints.broadcast import agree, read_once, together
from slm_jax.checkpoints.directories import barrier, first_line, new_directory, put_in_place
from slm_jax.checkpoints.fingerprints import StreamedFingerprint, fingerprint
from slm_jax.checkpoints.orbax_paths import orbax_path
from slm_jax.checkpoints.parameters import (
    ParameterTable,
    check_parameters,
    parameter_table,
    table_from_json,
    table_to_json,
)
from slm_jax.checkpoints.provenance import FORMAT_VERSION, check_format_version
from slm_jax.checkpoints.safetensors import flatten, load_placed, save_safetensors, unflatten
from slm_jax.checkpoints.streaming import StreamedArray, save_streamed
from slm_jax.errors import StorageError, UserError, nearest
from slm_jax.models.encoders import ENCODERS
from slm_jax.models.quantization import (
    SCALE,
    is_quantized,
    is_scale,
    rounded_on_device,
    unquantized_shapes,
)
from slm_jax.models.t5 import T5Config

RECORD_FILE = "foundation.json"
PARAMS_FOLDER = "params"
PARAMS_FILE = "params.safetensors"
FORMATS = ("orbax", "safetensors")
# Fields of a model's configuration that do not change what its parameters mean.
_RUN_TIME_FIELDS = {
    "dropout", "dtype", "remat", "scan", "scan_unroll", "loss_chunk", "loss_logits", "relative_bias_init_std",
    "attention_kernel",
}  # fmt: skip


@dataclass(frozen=True)
class FoundationRecord:
    """What `foundation.json` says.

    Attributes:
      directory: where it lies.
      kind: the sort of model, such as `t5` or `conformer`.
      config: the model's configuration as plain values.
      fingerprint: of the parameters.
      parameters: shape and dtype of every parameter by path.
      provenance: what it was made from and by (see `Provenance.to_json`); empty where that was not recorded.
    """

    directory: Path
    kind: str
    config: dict[str, Any]
    fingerprint: str
    parameters: ParameterTable
    provenance: dict[str, Any] = field(default_factory=dict)


def save_foundation(
    directory: str | Path,
    params: Any,
    *,
    kind: str,
    config: Mapping[str, Any],
    files: Sequence[str | Path] = (),
    provenance: Mapping[str, Any] | None = None,
    format: str = "orbax",
) -> FoundationRecord:
    """Saves a model's parameters with its configuration; nothing that loads is left behind when killed.

    Args:
      directory: where to; must not exist, or be empty.
      params: the unboxed parameters, nested dictionaries of numpy or jax arrays.
      kind: the sort of model.
      config: its configuration as plain values (what JSON holds).
      files: files to copy next to the parameters, such as a tokenizer.
      provenance: what the model was made from and by.
      format: `orbax`, sharded and of any size, or `safetensors`, one file, for a model that one host holds.

    Raises:
      UserError: the directory holds something, or cannot be written, or the format is unknown.
    """
    directory = new_directory(directory)
    if format not in FORMATS:
        raise UserError(f"a foundation model has no format {format!r}{nearest(format, FORMATS)}")
    record = FoundationRecord(
        directory,
        kind,
        _plain(config),
        fingerprint(params),
        parameter_table(params),
        _plain(provenance or {}),
    )
    with put_in_place(directory, f"{kind} model") as partial:
        if format == "orbax":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(orbax_path(partial / PARAMS_FOLDER), params)
                checkpointer.wait_until_finished()
        elif jax.process_index() == 0:
            save_safetensors(partial / PARAMS_FILE, params, {"kind": kind, "fingerprint": record.fingerprint})
        barrier("foundation parameters")
        _write_record(partial, record, files)
    return record


def save_foundation_streamed(
    directory: str | Path,
    arrays: Mapping[str, StreamedArray],
    *,
    kind: str,
    config: Mapping[str, Any],
    fingerprint: Callable[[], str],
    files: Iterable[str | Path] = (),
    provenance: Mapping[str, Any] | None = None,
    written: Callable[[int], None] = lambda _: None,
) -> FoundationRecord:
    """Saves parameters that are made part by part, in one process; else as `save_foundation`.

    Args:
      directory, kind, config, files, provenance: of `save_foundation`.
      arrays: the parameters by their paths.
      fingerprint: returns that of the parameters once all of them were made.
      written: told the bytes of each part when it is on disk.

    Raises:
      UserError: the directory holds something, has no room, or cannot be written. What the making of a part
        raises goes through.
    """
    directory = new_directory(directory)
    table = {name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}
    needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in table.values())
    with put_in_place(directory, f"{kind} model", needed) as partial:
        save_streamed(partial / PARAMS_FOLDER, unflatten(arrays), written)
        record = FoundationRecord(
            directory, kind, _plain(config), fingerprint(), table, _plain(provenance or {})
        )
        _write_record(partial, record, files)
    return record


def read_foundation(directory: str | Path) -> FoundationRecord:
    """Reads `foundation.json`, without the parameters.

    Raises:
      UserError: there is none, it is damaged, or a newer release wrote it.
    """
    directory = storage.absolute_path(directory)
    path = directory / RECORD_FILE
    if not storage.asked(directory, lambda: storage.is_file(path)):
        there = storage.asked(directory, lambda: storage.is_folder(directory))
        raise UserError(
            f"{directory} is no foundation model: "
            + (f"it has no {RECORD_FILE}" if there else "there is no such directory")
        )
    try:
        record = json.loads(storage.asked(directory, lambda: storage.read(path)))
        check_format_version(record["format_version"], str(path))
        return FoundationRecord(
            directory,
            record["kind"],
            record["config"],
            record["fingerprint"],
            table_from_json(record["parameters"]),
            record.get("provenance", {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error


def load_foundation(
    directory: str | Path,
    kind: str,
    abstract: Any,
    dtype: DTypeLike | None = None,
    config: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Loads parameters straight onto their devices and verifies their fingerprint.

    In a run of several processes all of them call this together, and what several replicas hold is read by
    one of them (`broadcast.read_once`).

    Args:
      directory: of `save_foundation`.
      kind: the expected sort of model.
      abstract: unboxed tree of ShapeDtypeStruct, with shardings where the parameters are to be split. Where
        it has int8 matrices (`models.quantization`), those on disk are rounded, or are int8 already.
      dtype: floating parameters are cast to it after the check, apart from the scales of int8 matrices; None
        keeps the dtype on disk.
      config: the expected configuration; None checks none.
      defaults: what fields of the configuration are where a checkpoint, saved before they were, lacks them.

    Raises:
      UserError: no foundation model, another kind, another configuration (the field is named), another
        tree (the parameter is named), or damaged data, in any process: all of them raise.
    """
    record, stored, rounding = together(lambda: _checked(directory, kind, abstract, config, defaults))
    # It covers names, shapes and dtypes: all processes go on with the same arrays.
    agree(f"a {kind} model with fingerprint", record.fingerprint)
    if rounding:
        return _read_rounded(record, abstract, stored, dtype)
    params = _read(record, stored)
    _check_fingerprint(record, fingerprint(params))
    return params if dtype is None else _cast(params, dtype)


def _checked(
    directory: str | Path,
    kind: str,
    abstract: Any,
    config: Mapping[str, Any] | None,
    defaults: Mapping[str, Any] | None,
) -> tuple[FoundationRecord, Any, bool]:
    """Returns the record, the shapes that are read, and whether they are rounded to int8 then."""
    record = read_foundation(directory)
    if record.kind != kind:
        raise UserError(f"{record.directory} holds a model of kind {record.kind!r}, expected {kind!r}")
    if config is not None:
        _check_config(record, _plain(config), _plain(defaults or {}))
    int8_on_disk = "int8" in {stored for _, stored in record.parameters.values()}
    if int8_on_disk and not is_quantized(abstract):
        raise UserError(
            f"{record.directory} holds int8 weights, and this run wants floats of it; "
            "expected FROZEN_WEIGHTS = 'int8' and a part that is frozen"
        )
    # What is held as int8 is rounded from the numbers on disk, whatever the rest is held in.
    rounding = is_quantized(abstract) and not int8_on_disk
    stored = unquantized_shapes(abstract) if rounding else abstract
    check_parameters(record.parameters, parameter_table(stored), str(record.directory), check_dtype=False)
    return record, stored, rounding


def architecture(config: Any) -> dict[str, Any]:
    """Returns a model's configuration without the fields that do not change what its parameters mean."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _RUN_TIME_FIELDS}


def config_of(record: FoundationRecord) -> Any:
    """Returns the configuration of a saved model, a dataclass of `models/`.

    Raises:
      UserError: no network is of that kind, or one of that kind has no such configuration.
    """
    classes = {kind: config for config, (kind, _) in ENCODERS.items()} | {"t5": T5Config}
    if record.kind not in classes:
        raise UserError(
            f"{record.directory} holds a model of kind {record.kind!r}{nearest(record.kind, classes)}"
        )
    try:
        return _with_fields(classes[record.kind](), record.config)
    except TypeError as error:
        raise UserError(f"{record.directory / RECORD_FILE}: {first_line(error)}") from error


def saved_config(directory: str | Path, **overrides: Any) -> Any:
    """Returns the configuration of the model in a directory, with the fields in `overrides` replaced.

    For gin: with it a run fits whatever checkpoint it is given.

    Raises:
      UserError: no foundation model lies there, or it has no such field.
    """
    config = config_of(read_foundation(directory))
    for name in overrides:
        if not hasattr(config, name):
            fields = [field.name for field in dataclasses.fields(config)]
            raise UserError(f"{type(config).__name__} has no field {name!r}{nearest(name, fields)}")
    return dataclasses.replace(config, **overrides)


def _with_fields(default: Any, fields: Mapping[str, Any]) -> Any:
    """Returns the dataclass with these fields; those that are dataclasses themselves are objects there."""
    values = {
        name: _with_fields(getattr(default, name), value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(default, **values)


def converted(params: Any, dtype: DTypeLike | None) -> Any:
    """Returns parameters with floating ones in `dtype`; None keeps theirs."""

    def convert(leaf: Any) -> Any:
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return leaf.astype(dtype) if floating else leaf

    return params if dtype is None else jax.tree.map(convert, params)


def _read(record: FoundationRecord, abstract: Any) -> Any:
    """Returns the parameters as they are on disk, on the devices that `abstract` names."""
    places = _places(record, abstract)
    leaves = read_once(places, lambda mine: _from_disk(record, mine))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], abstract)


def _read_rounded(record: FoundationRecord, abstract: Any, stored: Any, dtype: DTypeLike | None) -> Any:
    """Returns the parameters with int8 matrices where `abstract` has them.

    One parameter at a time is read and rounded: what fits as int8 need not fit as floats.
    """
    found: dict[str, jax.Array] = {}
    places = flatten(abstract)
    streamed = StreamedFingerprint(record.parameters)
    for name, leaf in _leaves(record, stored):
        streamed.add_array(name, leaf)
        if name + SCALE in places:
            found[name], found[name + SCALE] = rounded_on_device(leaf, places[name], places[name + SCALE])
            leaf.delete()
        else:
            found[name] = leaf if dtype is None else leaf.astype(dtype)
    _check_fingerprint(record, streamed.result())
    return jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)], abstract)


def _leaves(record: FoundationRecord, abstract: Any) -> Iterator[tuple[str, jax.Array]]:
    """Gives the parameters by name, one after the other."""
    for name, place in _places(record, abstract).items():
        yield name, read_once({name: place}, lambda mine: _from_disk(record, mine))[name]


def _places(record: FoundationRecord, abstract: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns where the parameters go by name, in the dtype on disk."""
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, np.dtype(record.parameters[name][1]), sharding=leaf.sharding)
        for name, leaf in flatten(_with_shardings(abstract)).items()
    }


def _from_disk(record: FoundationRecord, places: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the parts of parameters that this process holds, without a word to the others."""
    file = record.directory / PARAMS_FILE
    if storage.asked(file, lambda: storage.is_file(file)):
        return load_placed(file, places, record.parameters)
    item = unflatten(places)
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"foundation{here}"
    )
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            folder = orbax_path(record.directory / PARAMS_FOLDER)
            return flatten(checkpointer.restore(folder, args=arguments))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if storage.is_away(record.directory, error):
            raise StorageError(f"cannot read {record.directory}: {first_line(error)}") from error
        raise UserError(f"{record.directory} is damaged: {first_line(error)}") from error


def _check_fingerprint(record: FoundationRecord, found: str) -> None:
    if found != record.fingerprint:
        raise UserError(
            f"{record.directory} is damaged: its parameters have fingerprint {found}, "
            f"{RECORD_FILE} says {record.fingerprint}"
        )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _write_record(partial: Path, record: FoundationRecord, files: Iterable[str | Path]) -> None:
    if jax.process_index() != 0:
        return
    for file in files:
        if storage.is_remote(partial):
            storage.put(Path(file), str(partial / Path(file).name))
        else:
            shutil.copyfile(file, partial / Path(file).name)
    text = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "kind": record.kind,
            "config": record.config,
            "fingerprint": record.fingerprint,
            "parameters": table_to_json(record.parameters),
            "provenance": record.provenance,
        },
        indent=1,
    )
    storage.write(partial / RECORD_FILE, text + "\n")


def _check_config(record: FoundationRecord, expected: dict[str, Any], defaults: dict[str, Any]) -> None:
    saved = _flat(defaults) | _flat(record.config)
    expected = _flat(expected)
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected:
            side, other = ("the model", saved) if name in expected else ("this run", expected)
            raise UserError(
                f"{record.directory}: configuration field {name!r} is unknown to {side}{nearest(name, other)}"
            )
        if saved[name] != expected[name]:
            raise UserError(
                f"{record.directory}: configuration field {name!r} is {saved[name]!r}, "
                f"expected {expected[name]!r}"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration, those of configurations inside it by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _with_shardings(abstract: Any) -> Any:
    # Orbax asks for a sharding at every leaf, so that a checkpoint never decides where arrays go.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device), abstract
    )


def _cast(params: Any, dtype: DTypeLike) -> Any:
    names = flatten(params)

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        if not floating or leaf.dtype == np.dtype(dtype) or is_scale(_name(path), names):
            return leaf
        # One array at a time: never is the whole model held in both dtypes.
        smaller = leaf.astype(dtype)
        leaf.delete()
        return smaller

    return jax.tree_util.tree_map_with_path(cast, params)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config)))
