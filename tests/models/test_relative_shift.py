"""Scores per distance to scores per key: against a loop, and the TPU's kernel against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models import relative_shift as relative_shift_module
from slm_jax.models.conformer_attention import RelativeAttention, position_inputs
from slm_jax.models.relative_shift import padded_distances, relative_shift, rolled_shift
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import named_shardings, partitioned
from slm_jax.partitioning.topology import compiling_for, find_topology

interpreted = functools.partial(rolled_shift, interpret=True)


def test_against_a_loop(rng):
    by_distance = rng.normal(size=(2, 3, 5, 9))
    shifted = relative_shift(jnp.asarray(by_distance))
    for query in range(5):
        for key in range(5):
            # Column 0 holds distance query - key = 4, the last one -4.
            np.testing.assert_allclose(shifted[:, :, query, key], by_distance[:, :, query, 4 - query + key])


@pytest.mark.parametrize("frames", [1, 7, 64, 131])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_moves_the_same_numbers(rng, frames, dtype):
    scores = jnp.asarray(rng.normal(size=(2, 3, frames, 2 * frames - 1)), dtype)
    expected = relative_shift(scores)
    np.testing.assert_array_equal(interpreted(scores), expected)
    spare = padded_distances(frames) - scores.shape[-1]
    # What is past the distances is never read.
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, spare)), constant_values=jnp.nan)
    np.testing.assert_array_equal(interpreted(padded), expected)


@pytest.mark.parametrize("frames", [1, 12, 131])
def test_where_all_rows_turn_alike_the_numbers_are_the_same(rng, monkeypatch, frames):
    monkeypatch.setattr(relative_shift_module, "device_kind", lambda: "TPU v4")
    scores = jnp.asarray(rng.normal(size=(1, 2, frames, 2 * frames - 1)), jnp.float32)
    np.testing.assert_array_equal(interpreted(scores), relative_shift(scores))


def test_the_kernel_has_the_same_gradient(rng):
    scores, weights = rng.normal(size=(1, 2, 9, 17)), rng.normal(size=(1, 2, 9, 9))

    def gradient(shift, scores):
        return jax.grad(lambda scores: jnp.sum(jnp.sin(shift(scores)) * weights))(
            jnp.asarray(scores, jnp.float32)
        )

    expected = gradient(relative_shift, scores)
    np.testing.assert_array_equal(gradient(interpreted, scores), expected)
    padded = np.pad(scores, ((0, 0), (0, 0), (0, 0), (0, padded_distances(9) - 17)))
    np.testing.assert_array_equal(gradient(interpreted, padded)[..., :17], expected)
    assert not gradient(interpreted, padded)[..., 17:].any()


def test_every_device_moves_its_own_part(rng):
    scores = jnp.asarray(rng.normal(size=(4, 2, 11, 21)), jnp.float32)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with partitioned(mesh):
        compiled = jax.jit(interpreted).lower(scores).compile()
        shifted = compiled(scores)
    np.testing.assert_array_equal(shifted, relative_shift(scores))
    assert {shard.data.shape for shard in shifted.addressable_shards} == {(1, 1, 11, 11)}


def test_elsewhere_it_is_refused(rng):
    with pytest.raises(UserError, match="'pallas' on a cpu, expected 'plain'"):
        rolled_shift(jnp.zeros((1, 1, 3, 5)))


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2"])
def test_attention_compiles_for_tpus_and_gathers_nothing(name):
    """With heads and rows cut over four chips: the kernel is in the program, and nothing is gathered."""
    frames, dim = 37, 64
    attention = RelativeAttention(dim, heads=4, kernel="pallas", dtype=jnp.bfloat16)
    plain = RelativeAttention(dim, heads=4, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, frames, dim), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((4, 1, frames, frames), jnp.bool)
    positions = position_inputs(frames, dim, "transformer_xl", jnp.bfloat16)
    topology = find_topology(name)
    mesh = make_mesh(data=2, tensor=2, devices=topology.devices)
    with compiling_for(topology), partitioned(mesh):
        boxed = jax.eval_shape(lambda *args: plain.init(jax.random.key(0), *args), x, mask, positions)
        variables = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "names")),
            named_shardings(boxed, mesh),
        )
        program = str(jax.jit(attention.apply).lower(variables, x, mask, positions).compile().as_text())
    assert "relative_shift" in program and "tpu_custom_call" in program
    assert "all-gather" not in program
