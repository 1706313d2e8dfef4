"""The step: accumulation, empty batches, donation, gradients of `params` alone."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import ToyObjective, ToySource

from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES
from slm_jax.partitioning.sharding import batch_sharding, partitioned
from slm_jax.training.initialisation import make_state, make_variables, run_shapes, shardings_of
from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig, make_optimizer, make_schedule
from slm_jax.training.program import make_train_program
from slm_jax.training.step import jit_train_step, make_train_step, split_rows


class Bench:
    """A state and a compiled step on a mesh."""

    def __init__(self, mesh, microbatches=1, rows=16, seed=0, dropout=0.0, config=None):
        self.mesh = mesh
        self.source = ToySource(mesh, rows_per_step=rows, seed=seed)
        config = config or AdamWConfig(schedule=ScheduleConfig(peak=0.01, warmup_steps=1), clip_norm=None)
        optimizer = make_optimizer(config)
        objective = ToyObjective(dropout)
        shapes = run_shapes(objective, optimizer, self.source.shapes, mesh, DEFAULT_RULES)
        wanted = {"params": shapes.state.params, "frozen": shapes.frozen}
        variables = make_variables(objective, self.source.shapes, wanted, None, seed, mesh, DEFAULT_RULES)
        self.frozen = variables["frozen"]
        self.state = make_state(variables["params"], optimizer, shapes.state)
        self.step = jit_train_step(
            make_train_step(
                objective,
                optimizer,
                make_schedule(config.schedule),
                seed=seed,
                microbatches=microbatches,
                mesh=mesh,
            ),
            shardings_of(shapes.state),
            shardings_of(shapes.frozen),
            dict.fromkeys(self.source.shapes, batch_sharding(mesh)),
            mesh,
        )

    def batch(self):
        return next(iter(self.source.batches(0))).arrays

    def take(self, batch=None):
        with partitioned(self.mesh):
            return self.step(self.state, self.frozen, batch or self.batch())


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1), 4), ((2, 2, 2), 4), ((8, 1, 1), 2)])
def test_microbatches_mean_the_same_as_the_whole_batch(rng, shape, microbatches):
    seed = int(rng.integers(2**31))
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    whole, whole_metrics = Bench(mesh, seed=seed).take()
    parts, parts_metrics = Bench(mesh, microbatches, seed=seed).take()
    # Adam's first step divides by the gradient's size, so moments are compared where they are linear in it.
    moments = [optax.tree.get(state.opt_state, "mu") for state in (whole, parts)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *moments)
    assert float(whole_metrics["weight"]) == float(parts_metrics["weight"])
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(whole_metrics[name], parts_metrics[name], rtol=1e-5)
    np.testing.assert_allclose(whole_metrics["accuracy"], parts_metrics["accuracy"])


def test_microbatches_spread_over_all_shards_without_moving_rows(rng):
    mesh = make_mesh(2, 4, 1)
    rows = jnp.arange(32)
    split = jax.jit(lambda rows: split_rows({"rows": rows}, 2, mesh)["rows"])
    compiled = split.lower(jax.device_put(rows, batch_sharding(mesh))).compile()
    parts = compiled(jax.device_put(rows, batch_sharding(mesh)))
    np.testing.assert_array_equal(parts, [range(0, 32, 2), range(1, 32, 2)])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("slice", "data", "fsdp")))
    assert parts.sharding.is_equivalent_to(spread, parts.ndim)
    program = compiled.as_text()
    assert program
    for operation in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert operation not in program


def test_rows_that_do_not_divide_are_refused():
    mesh = make_mesh(8)
    with pytest.raises(UserError, match="16 is not divisible by 8 batch shards x 4 microbatches"):
        Bench(mesh, microbatches=4).take()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_empty_batch_has_loss_0_and_changes_nothing(rng, microbatches):
    bench = Bench(make_mesh(devices=jax.devices()[:1]), microbatches, seed=int(rng.integers(2**31)))
    before = jax.device_get(bench.state.params)
    batch = bench.batch()
    state, metrics = bench.take({**batch, "weights": jnp.zeros_like(batch["weights"])})
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0
    assert int(metrics["nonfinite_total"]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))


def test_gradients_are_those_of_the_mean_over_weights(rng):
    seed = int(rng.integers(2**31))
    bench = Bench(make_mesh(devices=jax.devices()[:1]), seed=seed)
    objective, batch, params = ToyObjective(0.0), bench.batch(), bench.state.params

    def mean_loss(params):
        loss_sum, weight_sum, _ = objective.loss(params, bench.frozen, batch, jax.random.key(0))
        return loss_sum / weight_sum

    loss, grads = jax.value_and_grad(mean_loss)(params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    state, metrics = bench.take()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    moment = optax.tree.get(state.opt_state, "mu")
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * g, rtol=1e-4, atol=1e-8), moment, grads)


def test_the_state_is_donated_and_frozen_never():
    bench = Bench(make_mesh(2, 2, 2))
    bench.take()
    donated = (bench.state.step, bench.state.params, optax.tree.get(bench.state.opt_state, "mu"))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(bench.frozen))


def test_dropout_differs_between_steps_and_repeats_with_the_seed(rng):
    seed = int(rng.integers(2**31))
    mesh = make_mesh(devices=jax.devices()[:1])
    config = AdamWConfig(schedule=ScheduleConfig(peak=0.0, warmup_steps=1))
    losses = []
    for _ in range(2):
        bench = Bench(mesh, seed=seed, dropout=0.5, config=config)
        batch = bench.batch()
        bench.state, first = bench.take(batch)
        bench.state, second = bench.take(batch)
        losses.append((float(first["loss"]), float(second["loss"])))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_the_learning_rate_of_the_metrics_is_the_one_that_is_used(rng):
    config = AdamWConfig(schedule=ScheduleConfig(peak=0.02, warmup_steps=4), clip_norm=None, b1=0.0, b2=0.0)
    bench = Bench(make_mesh(devices=jax.devices()[:1]), seed=int(rng.integers(2**31)), config=config)
    poisoned = {**bench.batch(), "poison": jnp.zeros(16).at[3].set(1.0)}
    rates = []
    for batch in (bench.batch(), poisoned, bench.batch()):
        before = jax.device_get(bench.state.params)
        bench.state, metrics = bench.take(batch)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(bench.state.params))
        # Without moments Adam moves every parameter by the learning rate.
        rates.append((float(metrics["learning_rate"]), float(max(jax.tree.leaves(moved)))))
    np.testing.assert_allclose(rates[0], 0.005, rtol=1e-3)
    assert rates[1][1] == 0.0
    np.testing.assert_allclose(rates[2], 0.01, rtol=1e-3)


class _LargeLayers:
    """Sums of squares behind a scan over layers, whose gradients dwarf everything else."""

    parts: ClassVar[dict[str, str]] = {}
    shapes: ClassVar = {"x": jax.ShapeDtypeStruct((8, 256), jnp.float32)}

    def init(self, rng, batch):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.01), ("layers", "embed", "mlp"))
        return {"params": {"layers": init(rng, (8, 256, 256), jnp.float32)}, "frozen": {}}

    def loss(self, params, frozen, batch, rng):
        out, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(x @ layer), None), batch["x"], params["layers"])
        return jnp.sum(out**2), jnp.float32(out.size), {}


def test_microbatches_need_no_second_copy_of_the_gradients():
    mesh = make_mesh(devices=jax.devices()[:1])
    objective: Any = _LargeLayers()
    temporaries = []
    for microbatches in (1, 4):
        program = make_train_program(
            objective, AdamWConfig(), _LargeLayers.shapes, seed=0, microbatches=microbatches, mesh=mesh
        )
        with partitioned(mesh):
            lowered = program.jitted.lower(program.shapes.state, program.shapes.frozen, _LargeLayers.shapes)
        temporaries.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    gradients = 8 * 256 * 256 * 4
    assert temporaries[0] > gradients
    assert temporaries[1] - temporaries[0] < 0.5 * gradients
