"""Schedules and optimizers against their formulas and Optax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.errors import UserError
from slm_jax.training.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    MuonConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
    matrix_dims,
)


def rates(config: ScheduleConfig, updates: int) -> list[float]:
    schedule = make_schedule(config)
    return [float(jnp.asarray(schedule(count))) for count in range(updates)]


@pytest.mark.parametrize("decay", ["constant", "rsqrt", "cosine"])
def test_warm_up_then_decay(rng, decay):
    warmup, total = int(rng.integers(1, 9)), int(rng.integers(12, 30))
    config = ScheduleConfig(2.0, warmup, decay, total_steps=total, floor=0.5)
    expected = []
    for update in range(1, 41):
        if update <= warmup:
            expected.append(2.0 * update / warmup)
        elif decay == "constant":
            expected.append(2.0)
        elif decay == "rsqrt":
            expected.append(2.0 * math.sqrt(warmup / update))
        else:
            share = min((update - warmup) / (total - warmup), 1.0)
            expected.append(0.5 + 1.5 * (1 + math.cos(math.pi * share)) / 2)
    np.testing.assert_allclose(rates(config, 40), expected, rtol=1e-5)


def test_without_warm_up_the_first_update_has_the_peak():
    assert rates(ScheduleConfig(0.25, 0), 3) == [0.25] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig(decay="cosin", total_steps=9), "did you mean 'cosine'"),
        (ScheduleConfig(decay="cosine"), "needs total_steps above warmup_steps=100, found None"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_schedule(config)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((ScheduleConfig, "warmup_steps", value) for value in (-1, "x", 1.5)),
        *((ScheduleConfig, "peak", value) for value in ("x", None, math.nan, math.inf, -1)),
        (ScheduleConfig, "total_steps", 0),
        (ScheduleConfig, "floor", "0"),
        (AdamWConfig, "b1", 1),
        (AdamWConfig, "weight_decay", "x"),
        *((kind, "clip_norm", 0) for kind in (AdamWConfig, AdafactorConfig, MuonConfig)),
        *((kind, "schedule", 0.1) for kind in (AdamWConfig, AdafactorConfig, MuonConfig)),
        (AdafactorConfig, "min_dim_size_to_factor", "x"),
        (AdafactorConfig, "scale_by_parameter", 1),
        (MuonConfig, "matrix_scale", True),
    ],
)
def test_fields_that_are_no_such_numbers_are_refused(kind, field, value):
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.{field} is {value!r}, expected "):
        kind(**{field: value})


def tree(rng):
    return {
        "kernel": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32),
        "scale": jnp.asarray(rng.normal(size=12), jnp.float32),
    }


def test_gradients_are_clipped_by_their_global_norm(rng):
    params, grads = tree(rng), tree(rng)
    config = AdamWConfig(schedule=ScheduleConfig(1.0, 0), clip_norm=0.5)
    optimizer = make_optimizer(config)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    norm = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(grads)))
    moment = optax.tree.get(state, "mu")
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * g * 0.5 / norm, rtol=1e-4), moment, grads)


def test_weight_decay_spares_norms_and_biases(rng):
    axes: Any = {
        "kernel": ("embed", "mlp"),
        "stacked kernel": ("layers", "embed", "heads", "kv"),
        "table": ("vocab", "embed"),
        "convolution": ("conv_kernel", "conv_in", "conv_out"),
        "scale": ("norm",),
        "stacked scale": ("layers", "norm"),
        "bias of heads": ("heads", "kv"),
        "stacked bias of heads": ("layers", "heads", "kv"),
        "stacked bias of a joined gate": ("layers", "gates", "mlp"),
        "unnamed": (),
    }
    params = {
        name: jnp.asarray(rng.normal(size=(2,) * len(names)), jnp.float32) for name, names in axes.items()
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = AdamWConfig(schedule=ScheduleConfig(0.1, 0), weight_decay=0.5)
    for apart in (False, True):
        optimizer = make_optimizer(config, axes, apart=apart)
        updates: Any = optimizer.update(zeros, optimizer.init(params), params)[0]
        for name in ("kernel", "stacked kernel", "table", "convolution"):
            np.testing.assert_allclose(updates.pop(name), -0.05 * params[name], rtol=1e-5)
        assert len(updates) == 6 and not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    with pytest.raises(ValueError, match="weight decay needs the logical axes"):
        make_optimizer(config)


@pytest.mark.parametrize("apart", [False, True])
def test_which_parameters_decay_changes_nothing_in_a_checkpoint(rng, apart):
    params, axes = tree(rng), {"kernel": ("embed", "mlp"), "scale": ("norm",)}
    states = [
        make_optimizer(AdamWConfig(weight_decay=decay), named, apart=apart).init(params)
        for decay, named in ((0.0, None), (0.0, axes), (0.1, axes))
    ]
    # Orbax sees the structure of optimizer state as well as its arrays.
    assert len({str(jax.tree.structure(state)) for state in states}) == 1


def test_adafactor_keeps_rows_and_columns_alone(rng):
    params = tree(rng)
    optimizer = make_optimizer(AdafactorConfig(min_dim_size_to_factor=8))
    state = optimizer.init(params)
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert max(sizes) == 12
    grads = tree(rng)
    updates, _ = optimizer.update(grads, state, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_nonfinite_updates_are_never_applied_however_many(rng):
    params = tree(rng)
    optimizer = make_optimizer(AdamWConfig())
    state = optimizer.init(params)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    update = jax.jit(optimizer.update)
    for count in range(1, 30):
        updates, state = update(bad, state, params)
        assert int(optax.tree.get(state, "notfinite_count")) == count
        assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    _, state = update(tree(rng), state, params)
    assert int(optax.tree.get(state, "notfinite_count")) == 0
    assert int(optax.tree.get(state, "total_notfinite")) == 29


@pytest.mark.parametrize(
    ("names", "contracted", "out"),
    [
        (("embed", "mlp"), (0,), (1,)),
        (("layers", "embed", "mlp"), (1,), (2,)),
        (("layers", "embed", "heads", "kv"), (1,), (2, 3)),
        (("layers", "heads", "kv", "embed"), (1, 2), (3,)),
        (("mel", "conv_out", "embed"), (0, 1), (2,)),
        (("layers", "embed", "gates", "mlp"), (1,), (2, 3)),
    ],
)
def test_muon_knows_what_a_matrix_contracts(names, contracted, out):
    dims = matrix_dims(names)
    assert dims is not None
    assert (dims.reduction_axis, dims.output_axis) == (contracted, out)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("norm",),
        ("layers", "norm"),
        ("layers", "heads", "kv"),
        ("vocab", "embed"),
        ("embed", "vocab"),
        ("conv_kernel", "mel", "conv_in", "conv_out"),
        ("layers", "conv_kernel", "mlp"),
        ("heads", "relpos_buckets"),
    ],
)
def test_muon_leaves_what_is_no_matrix_to_adam(names):
    assert matrix_dims(names) is None


def test_muon_makes_the_singular_values_of_every_stacked_matrix_alike(rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 8, 2, 6)), jnp.float32), "scale": jnp.ones(8)}
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    config = MuonConfig(schedule=ScheduleConfig(0.1, 0), matrix_scale=5.0)
    axes: Any = {"kernel": ("layers", "embed", "heads", "kv"), "scale": ("norm",)}
    optimizer = make_optimizer(config, axes)
    updates: Any = optimizer.update(grads, optimizer.init(params), params)[0]
    # Five steps of Newton-Schulz bring singular values near 1; the rest is the shape's scale.
    for matrix in np.asarray(updates["kernel"]).reshape(3, 8, 12):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.5 * math.sqrt(12 / 8))
        assert values.min() > 0.5 and values.max() < 1.4
    np.testing.assert_array_equal(np.sign(updates["scale"]), -np.sign(grads["scale"]))
