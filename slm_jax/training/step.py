"""The train step: gradients with respect to `params` alone, one optimizer update, metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm_jax.errors import UserError
from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules
from slm_jax.partitioning.sharding import batch_sharding, batch_shards
from slm_jax.training.group_norms import group_norms
from slm_jax.training.objectives.base import Batch, Objective
from slm_jax.training.spikes import spike_metrics
from slm_jax.training.state import TrainState

# A scalar, or (numerator, denominator) of a ratio.
StepMetrics = dict[str, Any]
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]
# What `_summed_gradients` adds up: loss, weight, metrics, gradients.
Sums = tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]], Any]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    microbatches: int = 1,
    mesh: Mesh,
    rules: LogicalRules = DEFAULT_RULES,
) -> TrainStep:
    """Makes the pure function `(state, frozen, batch) -> (state, metrics)`, not yet jitted.

    Args:
      objective: what to minimise.
      optimizer: from `optimizers.make_optimizer`.
      schedule: the optimizer's learning rate, for the metrics.
      seed: of dropout; the key of a step is folded from it and the step's number.
      microbatches: parts of the batch whose gradients are added up, one after the other; the result
        means the same as the whole batch at once, in a fraction of its memory.
      mesh, rules: decide how the rows of a microbatch spread over the batch shards.

    Returns:
      A step whose metrics hold the scalars `loss`, `weight`, `grad_norm`, `update_norm`, `param_norm`,
      `learning_rate`, `nonfinite_in_a_row`, `nonfinite_total`, the three norms by group
      (`group_norms.parameter_groups`), those of `spikes.spike_metrics`, and the objective's pairs.
    """
    update = optax.with_extra_args_support(optimizer).update

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        parts = split_rows(batch, microbatches, mesh, rules)
        loss_sum, weight_sum, ratios, grad_sums = _summed_gradients(
            objective, state.params, frozen, parts, rng, microbatches
        )
        # A batch without anything to learn has loss 0 and gradient 0, not 0/0.
        scale = jnp.where(weight_sum > 0, 1.0 / jnp.where(weight_sum > 0, weight_sum, 1.0), 0.0)
        loss = loss_sum * scale
        # A loss that is not finite must void the step even where its gradient happens to be finite.
        scale = jnp.where(jnp.isfinite(loss), scale, jnp.nan)
        grads = jax.tree.map(lambda grad, param: (grad * scale).astype(param.dtype), grad_sums, state.params)
        updates, opt_state = update(grads, state.opt_state, state.params, loss=loss)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "weight": weight_sum,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(_updates_made(state)),
            "nonfinite_in_a_row": _counter(opt_state, "notfinite_count"),
            "nonfinite_total": _counter(opt_state, "total_notfinite"),
            **spike_metrics(opt_state),
            **group_norms("grad_norm", grads),
            **group_norms("update_norm", updates),
            **group_norms("param_norm", params),
        }
        return TrainState(state.step + 1, params, opt_state), {**metrics, **ratios}

    return train_step


def jit_train_step(
    train_step: TrainStep,
    state_shardings: TrainState,
    frozen_shardings: Any,
    batch_shardings: dict[str, NamedSharding],
    mesh: Mesh,
    compiler_options: Mapping[str, Any] | None = None,
) -> TrainStep:
    """Compiles a step with every in- and out-sharding pinned; the state is donated, `frozen` never."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, frozen_shardings, batch_shardings),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=(0,),
        compiler_options=dict(compiler_options or {}),
    )


def split_rows(batch: Batch, parts: int, mesh: Mesh, rules: LogicalRules = DEFAULT_RULES) -> Batch:
    """Splits [B, ...] into [parts, B / parts, ...] so that every part spreads over all batch shards.

    Part i holds every row r with r % parts = i: the same rows on every mesh, so that dropout repeats, and as
    many from each shard, so that no row moves between devices.

    Raises:
      UserError: the rows do not divide into this many parts on this mesh.
    """
    shards = batch_shards(mesh, rules)
    rows_sharding = batch_sharding(mesh, rules)
    parts_sharding = NamedSharding(mesh, PartitionSpec(None, *rows_sharding.spec))

    def split(name: str, array: jax.Array) -> jax.Array:
        rows = array.shape[0]
        if rows % (shards * parts):
            raise UserError(
                f"batch size {rows} is not divisible by {shards} batch shards x {parts} microbatches "
                f"(array {name!r})"
            )
        if parts == 1:
            return array[None]
        split_array = array.reshape(rows // parts, parts, *array.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(split_array, parts_sharding)

    return {name: split(name, array) for name, array in batch.items()}


def _summed_gradients(
    objective: Objective, params: Any, frozen: Any, parts: Batch, rng: jax.Array, microbatches: int
) -> Sums:
    def loss_of(params: Any, part: Batch, part_rng: jax.Array) -> tuple[jax.Array, Any]:
        loss_sum, weight_sum, ratios = objective.loss(params, frozen, part, part_rng)
        return loss_sum.astype(jnp.float32), (weight_sum.astype(jnp.float32), _as_float32(ratios))

    def of_part(part: Batch, part_rng: jax.Array) -> Sums:
        (loss_sum, (weight_sum, ratios)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            params, part, part_rng
        )
        # Sums over many microbatches would lose bits in bfloat16.
        return loss_sum, weight_sum, ratios, jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)

    first = jax.tree.map(lambda array: array[0], parts)
    if microbatches == 1:
        return of_part(first, rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_part, first, rng))

    def add(sums: Sums, item: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
        part, number = item
        return jax.tree.map(jnp.add, sums, of_part(part, jax.random.fold_in(rng, number))), None

    return jax.lax.scan(add, zeros, (parts, jnp.arange(microbatches)))[0]


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _updates_made(state: TrainState) -> Any:
    """The count of the optimizer's schedule: steps that were left out did not move it."""
    kind = optax.ScaleByScheduleState
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda leaf: isinstance(leaf, kind))
    return next((leaf.count for leaf in leaves if isinstance(leaf, kind)), state.step)


def _counter(opt_state: Any, name: str) -> jax.Array:
    return optax.tree.get(opt_state, name)
