"""What a run has trained, as a checkpoint of T5X, and back, for `slm convert`; T5X itself is not needed."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax import storage
from slm_jax.checkpoints.directories import new_directory, put_in_place
from slm_jax.checkpoints.manager import RunCheckpoints, claim_run_directory
from slm_jax.checkpoints.parameters import check_parameters, parameter_table, table_from_json
from slm_jax.checkpoints.safetensors import flatten, unflatten
from slm_jax.checkpoints.sources.t5x import T5XTensors
from slm_jax.checkpoints.to_t5x import write_t5x
from slm_jax.cli import gin_config
from slm_jax.cli.main import search_paths
from slm_jax.cli.run import Run, save_config
from slm_jax.cli.wiring import Wiring
from slm_jax.errors import UserError, nearest
from slm_jax.training.state import DataCursor, TrainState

_PARAMS = "params/"


def to_t5x(args: argparse.Namespace) -> int:
    """Writes what a run has trained as `checkpoint_<step>` of T5X, and prints its path."""
    if storage.is_remote(args.to_t5x):
        raise UserError(
            f"slm convert: --to_t5x is {args.to_t5x}, expected a local folder, to be copied there"
        )
    with contextlib.closing(_checkpoints_of(args.source)) as checkpoints:
        steps = checkpoints.all_steps()
        step = args.step if args.step is not None else checkpoints.latest_step()
        if step is None or step not in steps:
            found = f"no checkpoint of step {args.step}{nearest(args.step, steps)}"
            found = found if steps else "no checkpoint"
            raise UserError(f"slm convert: {checkpoints.directory} holds {found}")
        folder = new_directory(Path(args.to_t5x) / f"checkpoint_{step}")
        table = table_from_json(checkpoints.read_record(step)["parameters"])
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
            for name, (shape, dtype) in table.items()
            if name.startswith(_PARAMS)
        }
        params = jax.device_get(checkpoints.restore_arrays(wanted, step))
    needed = sum(array.nbytes for array in params.values())
    trained = unflatten({name.removeprefix(_PARAMS): array for name, array in params.items()})
    with put_in_place(folder, "checkpoint of T5X", needed) as partial:
        write_t5x(partial, trained, step)
    print(folder)
    return 0


def to_run(args: argparse.Namespace) -> int:
    """Writes what T5X has trained as the one checkpoint of a new run, and prints the run's path."""
    source = T5XTensors(args.source)
    for note in source.notes:
        print(note, file=sys.stderr, flush=True)
    directory = new_directory(args.to_run)
    bindings = [*args.gin_bindings, f"MODEL_DIR={str(directory)!r}"]
    gin_config.parse(args.gin_file, bindings, search_paths(args))
    run = gin_config.build(Run)
    wired = Wiring(run)
    shapes = wired.shapes.state.params
    found = {name: (info.shape, info.dtype.name) for name, info in source.parameters().items()}
    check_parameters(found, parameter_table(shapes), source.where, check_dtype=True)
    params = jax.tree.map(
        lambda leaf, shape: jax.device_put(leaf, shape.sharding),
        unflatten({name: source.parameter(name) for name in flatten(shapes)}),
        shapes,
    )
    step = _step_of(source)
    state = TrainState(jnp.int32(step), params, {})
    provenance = wired.provenance(gin_config.operative_config())
    claim_run_directory(directory)
    with contextlib.closing(RunCheckpoints(directory / "checkpoints")) as checkpoints:
        checkpoints.save(step, state, DataCursor(0, f"T5X, {source.where}"), provenance)
    save_config(directory, run.working_dir)
    print(directory)
    return 0


def _checkpoints_of(directory: str) -> RunCheckpoints:
    folder = storage.absolute_path(directory) / "checkpoints"
    if not storage.asked(folder, lambda: storage.is_folder(folder)):
        raise UserError(f"slm convert: --from {directory} is no run, expected a directory of slm train")
    return RunCheckpoints(folder, read_only=True)


def _step_of(source: T5XTensors) -> int:
    steps: Any = source.read("state.step") if "state.step" in source.tensors else None
    if steps is None or np.shape(steps) != ():
        raise UserError(f"{source.where} has no state.step, expected a checkpoint of T5X's trainer")
    return int(steps)
