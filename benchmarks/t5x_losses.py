"""Trains an SLM with T5X's trainer, and has slm_jax's own step compute the same: their losses side by side.

Where t5x is importable (docs/t5x.md):

    PYTHONPATH=... .venv/bin/python benchmarks/t5x_losses.py --gin_file t5x/demo.gin --gin.NAME=value ...

Prints a line of JSON for each step, with the losses
- `t5x`: of T5X's trainer,
- `same_weights`: of slm_jax's step, on T5X's batch and the weights that T5X had at that step,
- `on_its_own`: of slm_jax's step on T5X's batches, from the first weights on with its own updates,
- `last_bit`: the same, where the first weights differ in their last bit: how far rounding alone goes.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import absl.logging
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from t5x import trainer as t5x_trainer  # pyright: ignore[reportMissingImports]

# The gin files name it as T5X's own do, as a function of the module that runs.
from t5x.train import train  # pyright: ignore[reportMissingImports]

from slm_jax.checkpoints.foundation import load_foundation
from slm_jax.cli import gin_config
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES
from slm_jax.partitioning.sharding import partitioned
from slm_jax.t5x_partner.model import SLMModel
from slm_jax.training.initialisation import make_state, optimizer_of, run_shapes
from slm_jax.training.optimizers import AdamWConfig, make_schedule
from slm_jax.training.state import TrainState
from slm_jax.training.step import make_train_step


class Record:
    """What T5X's trainer was given: the model, and for each step its parameters, batch and summary."""

    def __init__(self):
        self.model: Any = None
        self.params: list[Any] = []
        self.batches: list[Any] = []
        self.summaries: list[Any] = []

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the trainer's method that trains, which also records."""

        def recorded(trainer: Any, batches: Any, num_steps: int, start_step: int | None = None) -> Any:
            assert num_steps == 1, "LOG_PERIOD is not 1"
            # The state is donated.
            self.params.append(jax.device_get(flax.core.unfreeze(trainer.train_state.params)))
            self.model = trainer._model
            batch = next(batches)
            self.batches.append(jax.device_get(batch))
            self.summaries.append(method(trainer, iter([batch]), 1, start_step))
            return self.summaries[-1]

        return recorded


class OwnStep:
    """slm_jax's own step for T5X's model, with frozen weights that its own loader read.

    Args:
      model: T5X's.
      config: of the optimizer.
      batch: of the run, for its shapes.
    """

    def __init__(self, model: SLMModel, config: AdamWConfig, batch: Mapping[str, Any]):
        mesh, objective = make_mesh(devices=jax.devices()[:1]), model.objective
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
        self._optimizer = optimizer_of(config, objective, shapes)
        self._mesh = mesh
        self._shapes = run_shapes(objective, self._optimizer, shapes, mesh, DEFAULT_RULES)
        self._frozen = {
            part: load_foundation(
                directory, objective.parts[part].kind, self._shapes.frozen[part], model.frozen_dtype
            )
            for part, directory in model.foundations.items()
        }
        schedule = make_schedule(config.schedule)
        self._step = jax.jit(make_train_step(objective, self._optimizer, schedule, seed=0, mesh=mesh))

    def start(self, params: Any) -> TrainState:
        """Returns the state of a run that begins with these parameters."""
        shapes = self._shapes.state
        placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, shapes.params)
        return make_state(placed, self._optimizer, shapes)

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, float]:
        """Returns the state after a step, and its loss."""
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        with partitioned(self._mesh):
            state, metrics = self._step(state, self._frozen, arrays)
        return state, float(metrics["loss"])


def main() -> None:
    """Runs both and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True)
    args, words = parser.parse_known_args()
    absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger().setLevel(logging.WARNING)
    bindings = [word.removeprefix("--gin.") for word in words]
    gin_config.parse(args.gin_file, bindings)
    record = Record()
    t5x_trainer.BaseTrainer.train = record.around(t5x_trainer.BaseTrainer.train)
    gin_config.build(train)
    own = OwnStep(record.model, gin_config.build(AdamWConfig), record.batches[0])
    first = record.params[0]
    on_its_own = own.start(first)
    last_bit = own.start(jax.tree.map(lambda leaf: np.nextafter(leaf, np.float32(np.inf)), first))
    steps = zip(record.params, record.batches, record.summaries, strict=True)
    for step, (params, batch, summary) in enumerate(steps, 1):
        line = {"step": step, "t5x": float(summary.result()["loss"].value)}
        line["same_weights"] = own(own.start(params), batch)[1]
        on_its_own, line["on_its_own"] = own(on_its_own, batch)
        last_bit, line["last_bit"] = own(last_bit, batch)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
