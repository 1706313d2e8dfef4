"""The program of a run: its train step with all that decides how it is compiled.

Training runs it, and what plans a run compiles it without data, weights or devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules
from slm_jax.partitioning.sharding import batch_sharding
from slm_jax.training.compiler_options import check_compiler_options
from slm_jax.training.initialisation import RunShapes, optimizer_of, run_shapes, shardings_of
from slm_jax.training.objectives.base import Objective
from slm_jax.training.optimizers import OptimizerConfig, make_schedule
from slm_jax.training.spikes import SpikeConfig
from slm_jax.training.step import TrainStep, jit_train_step, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """What a run computes in a step, and where.

    Attributes:
      shapes: of all variables, with shardings.
      optimizer: makes the state's slots.
      step: the pure function `(state, frozen, batch) -> (state, metrics)`.
      jitted: the same with every sharding pinned; trace it inside `partitioned(mesh, rules)`.
      mesh, rules: where arrays lie.
    """

    shapes: RunShapes
    optimizer: optax.GradientTransformation
    step: TrainStep
    jitted: Any
    mesh: Mesh
    rules: LogicalRules


def make_train_program(
    objective: Objective,
    optimizer: OptimizerConfig,
    batch_shapes: dict[str, jax.ShapeDtypeStruct],
    *,
    seed: int,
    microbatches: int = 1,
    mesh: Mesh,
    rules: LogicalRules = DEFAULT_RULES,
    spikes: SpikeConfig | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    apart: bool = False,
) -> TrainProgram:
    """Makes a run's program; computes nothing of it.

    Args:
      objective: what to minimise.
      optimizer: its configuration.
      batch_shapes: of the global batch, the largest where there are several.
      seed: of dropout.
      microbatches: parts of a batch whose gradients are added up.
      mesh, rules: where arrays lie.
      spikes: which steps stand out, and whether they are left out; None watches for none.
      compiler_options: of the step's compilation, name -> value.
      apart: whether every parameter counts its own updates, see `optimizers.make_optimizer`.

    Raises:
      UserError: from the partitioning rules, the compiler refuses an option, or the objective has nothing
        to train.
    """
    check_compiler_options(compiler_options or {}, mesh)
    transformation = optimizer_of(optimizer, objective, batch_shapes, spikes, apart)
    shapes = run_shapes(objective, transformation, batch_shapes, mesh, rules)
    step = make_train_step(
        objective,
        transformation,
        make_schedule(optimizer.schedule),
        seed=seed,
        microbatches=microbatches,
        mesh=mesh,
        rules=rules,
    )
    jitted = jit_train_step(
        step,
        shardings_of(shapes.state),
        shardings_of(shapes.frozen),
        dict.fromkeys(batch_shapes, batch_sharding(mesh, rules)),
        mesh,
        compiler_options,
    )
    return TrainProgram(shapes, transformation, step, jitted, mesh, rules)
