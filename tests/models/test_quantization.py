"""Frozen matrices as int8: which ones, how near, what it costs, and nothing of it in what trains."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from slm_jax.checkpoints.foundation import architecture, load_foundation, save_foundation
from slm_jax.checkpoints.safetensors import flatten
from slm_jax.models import conformer, layers, quantization, slm, t5, wav2vec2, whisper
from slm_jax.models.networks import boxed_params
from slm_jax.models.quantization import (
    SCALE,
    is_quantized,
    quantized,
    rounded,
    rounded_on_device,
    unquantized_shapes,
)
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import named_shardings

T5 = t5.T5Config(
    vocab_size=96, emb_dim=24, num_heads=4, head_dim=5, mlp_dim=40, encoder_layers=3, decoder_layers=2
)


def boxed_t5(config: t5.T5Config):
    tokens = jnp.ones((1, 3), jnp.int32)
    return jax.jit(t5.T5(config).init)(jax.random.key(0), tokens, tokens, tokens, tokens)["params"]


def dequantised(folder):
    """The matrices that the int8 ones stand for."""
    return {
        name: dequantised(leaf)
        if isinstance(leaf, dict)
        else leaf.astype(jnp.float32) * folder[name + SCALE]
        if name + SCALE in folder
        else leaf
        for name, leaf in folder.items()
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in folder)
    }


@pytest.fixture(scope="module")
def pair():
    """A T5's parameters as floats and as int8, unboxed."""
    boxed = boxed_t5(T5)
    return nn.unbox(boxed), nn.unbox(quantized(boxed))


def test_every_matrix_is_rounded_to_the_nearest_of_its_channel(pair):
    exact, small = (flatten(tree) for tree in pair)
    matrices = {name for name, leaf in small.items() if leaf.dtype == jnp.int8}
    kept = exact.keys() - matrices
    assert all(name.endswith(("kernel", "embedding")) for name in matrices)
    assert all(name.endswith(("/scale", "rel_embedding")) for name in kept)
    for name in matrices:
        scale = np.asarray(small[name + SCALE])
        assert small[name].shape == exact[name].shape and scale.dtype == np.float32
        wrong = np.abs(np.asarray(small[name]) * scale - np.asarray(exact[name]))
        assert (wrong <= scale * 0.5 * (1 + 1e-5)).all()
        # Each channel uses the whole range.
        reduced = tuple(dim for dim, size in enumerate(scale.shape) if size == 1)
        assert (np.abs(np.asarray(small[name], np.int32)).max(axis=reduced) == 127).all()
    shapes = {name: small[name + SCALE].shape for name in matrices}
    assert shapes["encoder/encoder/attention/query/kernel"] == (3, 1, 4, 5)
    assert shapes["encoder/encoder/attention/out/kernel"] == (3, 1, 1, 24)
    assert shapes["decoder/decoder/mlp/wo/kernel"] == (2, 1, 24)
    assert shapes["token_embedder/embedding"] == (96, 1)
    assert shapes["decoder/logits_dense/kernel"] == (1, 96)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("relative_bias", ["shared", "layer"])
def test_the_network_computes_with_what_the_int8_stands_for(tied, relative_bias, rng):
    import dataclasses

    config = dataclasses.replace(T5, tied_logits=tied, relative_bias=relative_bias)
    small = nn.unbox(quantized(boxed_t5(config)))
    tokens = jnp.asarray(rng.integers(2, 96, (2, 7)), jnp.int32)
    ids = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3], jnp.int32)

    @jax.jit
    def logits(params):
        model = t5.T5(config).bind({"params": params})
        hidden = model.decode(model.encode(model.embed(tokens), ids), ids, tokens, jnp.ones_like(tokens))
        return model.logits(hidden)

    wanted, found = np.asarray(logits(dequantised(small))), np.asarray(logits(small))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_no_stack_of_layers_is_ever_there_as_floats(pair):
    _, small = pair
    tokens = jnp.ones((2, 7), jnp.int32)

    def loss(params, embeddings):
        model = t5.T5(T5).bind({"params": params})
        hidden = model.decode(model.encode(embeddings, tokens), tokens, tokens, tokens)
        return model.token_losses(hidden, tokens).sum()

    compiled = jax.jit(jax.grad(loss, argnums=1)).lower(small, jnp.ones((2, 7, 24))).compile().as_text()
    assert compiled is not None
    for kernel in ("24,40", "40,24", "24,4,5", "4,5,24", "24,20", "20,24"):
        assert f"f32[3,{kernel}]" not in compiled, kernel
        assert f"f32[2,{kernel}]" not in compiled, kernel
    assert "s8[3,24,40]" in compiled


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_loaded_floats_become_what_init_makes_split_over_the_mesh(pair, tmp_path, format):
    exact, small = pair
    record = save_foundation(tmp_path / "t5", exact, kind="t5", config=architecture(T5), format=format)
    boxed = jax.eval_shape(quantized, boxed_params(T5))
    places = named_shardings(boxed, make_mesh(2, 1, 4, devices=jax.devices()[:8]))
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        places,
    )
    assert is_quantized(shapes) and not is_quantized(unquantized_shapes(shapes))
    assert flatten(unquantized_shapes(shapes)).keys() == flatten(exact).keys()
    made = load_foundation(record.directory, "t5", shapes, dtype="bfloat16")
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for name, leaf in flatten(made).items():
        assert leaf.sharding == flatten(shapes)[name].sharding, name
        wanted = flatten(small)[name]
        is_scale = name.endswith(SCALE)
        assert leaf.dtype == (wanted.dtype if leaf.dtype == jnp.int8 or is_scale else jnp.bfloat16), name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(wanted.astype(leaf.dtype)), err_msg=name)
    wo = flatten(made)["encoder/encoder/mlp/wi_0/kernel_scale"]
    assert wo.sharding.shard_shape(wo.shape) == (3, 1, 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reduced", [(0,), (1,), (0, 1)], ids=str)
def test_host_and_devices_round_to_the_same_bits_also_next_to_half_way(rng, monkeypatch, reduced, dtype):
    shape = (47, 64, 24)
    monkeypatch.setattr(quantization, "_BLOCK", 3 * 64 * 24)
    drawn = rng.normal(0, 0.1, shape).astype(dtype).astype(np.float32)
    # Most values as near to a point half-way between two as the dtype can say, on either side of it.
    scale_shape = tuple(1 if dim in reduced else size for dim, size in enumerate(shape))
    _, scale = rounded(drawn, scale_shape)
    half_way = ((np.floor(drawn / scale) + 0.5) * scale).astype(dtype)
    side = np.where(rng.random(shape) < 0.5, np.inf, -np.inf).astype(dtype)
    near = np.where(rng.random(shape) < 0.5, half_way, np.nextafter(half_way, side).astype(dtype))
    matrix = np.where(np.abs(drawn) < 0.9 * 127 * scale, near, drawn.astype(dtype))

    values, scale = rounded(matrix, scale_shape)
    exact, channel = matrix.astype(np.float64), scale.astype(np.float64)
    assert values.dtype == np.int8 and scale.dtype == np.float32
    # In float64 these products are exact.
    assert ((values - 0.5) * channel <= exact).all() and (exact < (values + 0.5) * channel).all()
    assert (np.abs(values.astype(int)).max(axis=reduced) == 127).all()
    mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8])
    for axes in ((None, None, None), (None, "fsdp", "tensor")):
        kept = (None if dim in reduced else axis for dim, axis in enumerate(axes))
        places = [NamedSharding(mesh, PartitionSpec(*names)) for names in (axes, kept)]
        shapes = [
            jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
            for array, place in zip((values, scale), places, strict=True)
        ]
        found = rounded_on_device(jax.device_put(matrix, places[0]), *shapes)
        np.testing.assert_array_equal(found[0], values)
        np.testing.assert_array_equal(found[1], scale)


def test_a_channel_of_zeros_and_one_value_alone():
    module = layers.Dense(3, ("embed", "mlp"))
    boxed = dict(module.init(jax.random.key(0), jnp.ones((1, 4)))["params"])
    kernel = np.zeros((4, 3), np.float32)
    kernel[2, 1] = -0.3
    boxed["kernel"] = nn.Partitioned(jnp.asarray(kernel), ("embed", "mlp"))
    small = nn.unbox(quantized(boxed))
    found = module.apply({"params": small}, jnp.eye(4))
    np.testing.assert_allclose(np.asarray(found), kernel, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [conformer.preset(name) for name in ("2b", "gemma3n", "w2v_bert")]
    + [whisper.preset("large_v3"), wav2vec2.preset("hubert_large"), t5.preset("xxl"), t5.preset("umt5_base")],
)
def test_most_of_every_published_network_is_int8(config):
    boxed = boxed_params(config)
    small = flatten(nn.unbox(jax.eval_shape(quantized, boxed)))
    size = {name: leaf.size for name, leaf in small.items()}
    kept = {name: leaf for name, leaf in small.items() if leaf.dtype != jnp.int8 and not name.endswith(SCALE)}
    kernels = [name for name in kept if name.endswith(("kernel", "embedding"))]
    assert all(re.search("conv_|rel_embedding|position|distance|subsampling", name) for name in kernels), (
        kernels
    )
    assert sum(size[name] for name in kept) < 0.05 * sum(size.values()), sorted(
        ((size[name], name) for name in kept), reverse=True
    )[:5]


def test_convolutions_and_norms_of_the_encoder_stay_as_they_are():
    config = slm.preset("tiny")
    segments = jnp.array([[[[1, 0, 6400]]]])
    from slm_jax.models.conformer import ConformerEncoder

    init = ConformerEncoder(config.speech_encoder).init
    boxed = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1, 6400), jnp.int16), segments)["params"]
    small = flatten(nn.unbox(jax.eval_shape(quantized, boxed)))
    whole = {name for name, leaf in small.items() if leaf.dtype != jnp.int8 and not name.endswith(SCALE)}
    assert "layers/conv/depthwise" in whole and "subsampling/conv_0/kernel" in whole
    assert small["layers/ffn_start/wi/kernel"].dtype == jnp.int8
    assert small["layers/attention/position/kernel"].dtype == jnp.int8
