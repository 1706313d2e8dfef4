"""Layer norm, convolution and the exact GELU against torch; the pre-norm layer's parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from slm_jax.models import layers


def test_layer_norm_matches_torch(rng):
    x = (rng.normal(size=(3, 5, 8)) * 100 + 1000).astype(np.float32)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    found: Any = layers.LayerNorm(1e-3).apply({"params": {"scale": scale, "bias": bias}}, x)
    double = [torch.from_numpy(value.astype(np.float64)) for value in (x, scale, bias)]
    expected = torch.nn.functional.layer_norm(double[0], (8,), double[1], double[2], 1e-3)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_exact_gelu_matches_torch(rng):
    x = rng.normal(size=1000).astype(np.float32) * 4
    expected = torch.nn.functional.gelu(torch.from_numpy(x))
    np.testing.assert_allclose(layers.ACTIVATIONS["gelu_exact"](jnp.asarray(x)), expected.numpy(), atol=1e-6)
    assert np.abs(layers.ACTIVATIONS["gelu"](jnp.asarray(x)) - expected.numpy()).max() > 1e-4


@pytest.mark.parametrize(("taps", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (10, 5, 0), (2, 2, 0)])
def test_conv_matches_torch(rng, taps, stride, padding):
    x = rng.normal(size=(2, 33, 6)).astype(np.float32)
    kernel, bias = rng.normal(size=(taps, 6, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    axes = ("conv_kernel", "conv_in", "conv_out")
    module: Any = layers.Conv(4, taps, axes, stride=stride, padding=padding)
    found = module.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    weight = torch.from_numpy(kernel.transpose(2, 1, 0).copy())
    wave = torch.from_numpy(x.swapaxes(1, 2).copy())
    expected = torch.nn.functional.conv1d(wave, weight, torch.from_numpy(bias), stride, padding)
    np.testing.assert_allclose(found, expected.numpy().swapaxes(1, 2), atol=1e-4)


def test_grouped_convolution_matches_torch(rng):
    x, kernel = rng.normal(size=(2, 9, 6)).astype(np.float32), rng.normal(size=(4, 2, 6)).astype(np.float32)
    found = layers.convolve(jnp.asarray(x), jnp.asarray(kernel), padding=(2, 2), groups=3)
    weight = torch.from_numpy(kernel.transpose(2, 1, 0).copy())
    expected = torch.nn.functional.conv1d(
        torch.from_numpy(x.swapaxes(1, 2).copy()), weight, padding=2, groups=3
    )
    np.testing.assert_allclose(found, expected.numpy().swapaxes(1, 2), atol=1e-5)


@pytest.mark.parametrize("key_bias", [True, False])
def test_only_the_keys_may_lack_a_bias(key_bias):
    layer = layers.PreNormLayer(num_heads=2, mlp_dim=10, key_bias=key_bias)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 3, 8)), None)
    attention = meta.unbox(boxed)["params"]["attention"]
    have = {name for name, projection in attention.items() if "bias" in projection}
    assert have == {"query", "value", "out"} | ({"key"} if key_bias else set())
