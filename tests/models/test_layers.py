"""The shared layers against formulas written out in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from transformers.models.t5.modeling_t5 import T5Attention

from slm_jax.models import layers


def init(module, rng, *args, **kwargs):
    """The module's parameters, unboxed, every one of them random."""
    shapes = meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_bucket_is_that_of_transformers(rng, bidirectional):
    buckets, distance = int(rng.choice([8, 16, 32])), int(rng.integers(40, 200))
    relative = np.arange(-500, 501, dtype=np.int32).reshape(7, 143)
    ours = layers.relative_position_bucket(jnp.asarray(relative), bidirectional, buckets, distance)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(relative), bidirectional=bidirectional, num_buckets=buckets, max_distance=distance
    )
    # float32 logarithms may fall on either side of a bucket's edge; that moves one position by one bucket.
    differ = np.asarray(ours) != theirs.numpy()
    assert differ.sum() <= 2
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() <= 1
    assert len(np.unique(ours)) == buckets - (1 if bidirectional else 0)


def test_rms_norm_computes_in_float32(rng):
    x = rng.normal(0, 3, (3, 5, 16))
    module: Any = layers.RMSNorm(1e-6, dtype=jnp.bfloat16)
    variables = init(module, rng, jnp.zeros((1, 16)))
    bf16 = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(bf16, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    exact = exact * np.asarray(variables["params"]["scale"], np.float64)
    found = module.apply(variables, bf16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(found, np.float32),
        np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float32),
    )


def test_dense_contracts_the_trailing_dims(rng):
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    module: Any = layers.Dense(6, ("heads", "kv", "embed"), contracted=2, use_bias=True)
    variables = init(module, rng, x)
    kernel, bias = (np.asarray(variables["params"][name]) for name in ("kernel", "bias"))
    assert kernel.shape == (4, 5, 6)
    np.testing.assert_allclose(
        module.apply(variables, x), np.einsum("abcd,cde->abe", x, kernel) + bias, atol=1e-5
    )


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("gated", [True, False])
def test_mlp(rng, activation, gated):
    x = rng.normal(size=(2, 3, 8))
    module: Any = layers.Mlp(12, activation=activation, gated=gated)
    variables = init(module, rng, x.astype(np.float32))
    kernels = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in variables["params"].items()}
    assert set(kernels) == ({"wi_0", "wi_1", "wo"} if gated else {"wi", "wo"})
    inner = x @ kernels["wi_0" if gated else "wi"]
    hidden = {
        "gelu": lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
        "relu": lambda y: np.maximum(y, 0),
        "silu": lambda y: y / (1 + np.exp(-y)),
    }[activation](inner)
    if gated:
        hidden = hidden * (x @ kernels["wi_1"])
    np.testing.assert_allclose(
        module.apply(variables, x.astype(np.float32)), hidden @ kernels["wo"], atol=1e-4, rtol=1e-4
    )


def test_attention_is_the_written_out_formula(rng):
    rows, queries, keys, heads, dim = 2, 5, 7, 3, 4
    x, y = rng.normal(size=(rows, queries, 8)), rng.normal(size=(rows, keys, 6))
    mask = rng.random((rows, 1, queries, keys)) < 0.6
    mask[..., 0] = True
    bias = rng.normal(size=(1, heads, queries, keys))
    module: Any = layers.MultiHeadAttention(heads, dim, scale=dim**-0.5)
    args = [jnp.asarray(value, jnp.float32) for value in (x, y)]
    variables = init(module, rng, *args)
    kernel = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in variables["params"].items()}
    query = np.einsum("bqd,dhc->bhqc", x, kernel["query"]) * dim**-0.5
    key, value = (np.einsum("bkd,dhc->bhkc", y, kernel[name]) for name in ("key", "value"))
    scores = np.where(mask, query @ key.swapaxes(-1, -2) + bias, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqc,hcd->bqd", weights @ value, kernel["out"])
    found = module.apply(variables, *args, jnp.asarray(mask), jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_attention_to_nothing_is_finite_with_finite_gradients(rng):
    x = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    module: Any = layers.MultiHeadAttention(2, 4)
    variables = init(module, rng, x, x)
    nothing = jnp.zeros((2, 1, 4, 4), bool)
    gradients = jax.grad(lambda v: module.apply(v, x, x, nothing).sum())(variables)
    leaves = [module.apply(variables, x, x, nothing), *jax.tree.leaves(gradients)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_initial_variances_keep_the_scale(rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 256)), jnp.float32)
    for scale in (1.0, 64**-0.5):
        module: Any = layers.MultiHeadAttention(4, 64, scale=scale)
        variables = meta.unbox(module.init(jax.random.key(int(rng.integers(1 << 30))), x, x))["params"]
        query = jnp.einsum("bld,dhc->blhc", x, variables["query"]["kernel"]) * scale
        key = jnp.einsum("bld,dhc->blhc", x, variables["key"]["kernel"])
        scores = jnp.einsum("bqhc,bkhc->bhqk", query, key)
        assert 0.6 < float(scores.std()) < 1.6


def test_segment_mask_joins_equal_and_nonzero_ids():
    mask = layers.segment_mask(jnp.array([[1, 2, 0]]), jnp.array([[0, 1, 2, 2]]))
    assert mask.shape == (1, 1, 3, 4)
    expected = [[False, True, False, False], [False, False, True, True], [False] * 4]
    np.testing.assert_array_equal(mask[0, 0], expected)
