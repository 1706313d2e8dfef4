"""Foundation models written back as transformers loads them: `config.json` and safetensors files."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from slm_jax import storage
from slm_jax.checkpoints.conversion import companions
from slm_jax.checkpoints.directories import first_line, new_directory, put_in_place
from slm_jax.checkpoints.families import FAMILIES
from slm_jax.checkpoints.families.base import Family
from slm_jax.checkpoints.families.mapping import Piece
from slm_jax.checkpoints.fingerprints import StreamedFingerprint
from slm_jax.checkpoints.foundation import PARAMS_FILE, PARAMS_FOLDER, FoundationRecord, config_of
from slm_jax.checkpoints.orbax_paths import orbax_path
from slm_jax.checkpoints.parameters import check_parameters, parameter_table
from slm_jax.checkpoints.safetensors import flatten, load_safetensors, unflatten
from slm_jax.checkpoints.sources.huggingface import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from slm_jax.errors import UserError
from slm_jax.models.networks import abstract_params

_SHARD_BYTES = 1 << 30
_WRITTEN_DTYPES = ("float32", "bfloat16", "float16")


def convert_to_huggingface(
    record: FoundationRecord, directory: str | Path, *, written: Callable[[int], None] = lambda _: None
) -> None:
    """Writes a foundation model for transformers, in the dtype that it has; nothing half-written is left.

    Args:
      record: of `read_foundation`.
      directory: must not exist, or be empty.
      written: told the bytes of each parameter when its tensors are made.

    Raises:
      UserError: no family of published models is of this kind, the parameters are damaged, or the directory
        holds something or cannot be written.
    """
    if storage.is_remote(directory):
        raise UserError(f"{directory} is remote, and transformers reads local files; expected a local folder")
    directory = new_directory(directory)
    family, config = _family(record), config_of(record)
    (dtype, *more) = sorted({dtype for _, dtype in record.parameters.values()}) or ["nothing"]
    if more or dtype not in _WRITTEN_DTYPES:
        raise UserError(
            f"{record.directory} holds parameters of {', '.join([dtype, *more])}, and transformers is given "
            f"those of one dtype out of {', '.join(_WRITTEN_DTYPES)}; convert the published one without int8"
        )
    expected = parameter_table(abstract_params(config))
    check_parameters(record.parameters, expected, str(record.directory), check_dtype=False)
    needed = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in record.parameters.values())
    with put_in_place(directory, "checkpoint of transformers", needed) as partial:
        _write_tensors(partial, record, family.hf_pieces(config), written)
        text = json.dumps(_described(record, family.hf_config(config), dtype), indent=2, sort_keys=True)
        (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for file in companions(record.directory):
            shutil.copyfile(file, partial / file.name)


def _family(record: FoundationRecord) -> Family:
    families = [family for family in FAMILIES if family.kind == record.kind]
    origin = record.provenance.get("source", {}).get("config", {}).get("model_type")
    # One network may be several families' (conformer); then its origin says whose this one is.
    named = [family for family in families if origin in family.model_types] or families
    if len(named) != 1:
        raise UserError(
            f"{record.directory} holds a model of kind {record.kind!r} that was not converted from a "
            "published one, and transformers has none that computes the same"
        )
    return named[0]


def _described(record: FoundationRecord, config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns `config.json`: what the network is, on top of what the published one said of other things."""
    origin = record.provenance.get("source", {}).get("config", {})
    if origin.get("model_type") != config["model_type"]:
        origin = {}
    outdated = ("torch_dtype", "dtype", "_name_or_path", "transformers_version")
    return {name: value for name, value in origin.items() if name not in outdated} | config | {"dtype": dtype}


def _write_tensors(
    directory: Path, record: FoundationRecord, pieces: list[Piece], written: Callable[[int], None]
) -> None:
    """Writes all tensors in files of about a gigabyte, parameter by parameter."""
    by_parameter: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    assert by_parameter.keys() == record.parameters.keys(), by_parameter.keys() ^ record.parameters.keys()
    fingerprint = StreamedFingerprint(record.parameters)
    shards: list[dict[str, int]] = []
    pending: dict[str, np.ndarray] = {}
    for name, values in _parameters(record):
        fingerprint.add(name, (0,) * values.ndim, values)
        for piece in by_parameter[name]:
            one = values if piece.layer is None else values[piece.layer]
            pending[piece.source] = np.ascontiguousarray(piece.layout.to_theirs(one))
            if sum(tensor.nbytes for tensor in pending.values()) >= _SHARD_BYTES:
                _write_shard(directory, pending, shards)
        written(values.nbytes)
    if pending:
        _write_shard(directory, pending, shards)
    if fingerprint.result() != record.fingerprint:
        raise UserError(
            f"{record.directory} is damaged: its parameters have fingerprint {fingerprint.result()}, "
            f"its record says {record.fingerprint}"
        )
    _name_shards(directory, shards)


def _write_shard(directory: Path, pending: dict[str, np.ndarray], shards: list[dict[str, int]]) -> None:
    from safetensors.numpy import save_file

    path = directory / f"{len(shards)}.safetensors"
    # The library leaves a file that its owner alone may read; others may where they may read a usual one.
    path.touch()
    mode = path.stat().st_mode
    save_file(pending, path, {"format": "pt"})
    path.chmod(mode)
    shards.append({name: tensor.nbytes for name, tensor in pending.items()})
    pending.clear()


def _name_shards(directory: Path, shards: list[dict[str, int]]) -> None:
    """Gives the files the names that transformers expects, and writes the index where there are several."""
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / WEIGHTS_FILE)
        return
    places = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / name)
        places |= dict.fromkeys(shard, name)
    index = {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
        "weight_map": dict(sorted(places.items())),
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parameters(record: FoundationRecord) -> Iterator[tuple[str, np.ndarray]]:
    """Gives every parameter by its path, one at a time."""
    if storage.asked(record.directory, lambda: storage.is_file(record.directory / PARAMS_FILE)):
        yield from flatten(load_safetensors(record.directory / PARAMS_FILE)).items()
        return
    with ocp.PyTreeCheckpointer() as checkpointer:
        for name, (shape, dtype) in record.parameters.items():
            abstract = unflatten({name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))})
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
            try:
                args = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True)
                found = checkpointer.restore(orbax_path(record.directory / PARAMS_FOLDER), args=args)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{record.directory} is damaged: {first_line(error)}") from error
            yield name, np.asarray(flatten(found)[name])
