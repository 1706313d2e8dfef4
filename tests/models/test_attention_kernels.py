"""Attention by JAX's kernels against the plain form; and what remat policies compute again."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.errors import UserError
from slm_jax.models import conformer, layers, slm
from slm_jax.models.adapters import AdapterConfig, TransformerAdapter
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder
from slm_jax.models.t5 import T5, T5Config
from slm_jax.training.flops import traced_flops


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def draw_attention(rng, rows, queries, keys, heads, dim):
    q, k, v = (rng.normal(0, 1, (rows, n, heads, dim)).astype(np.float32) for n in (queries, keys, keys))
    bias = rng.normal(0, 1, (1, heads, queries, keys)).astype(np.float32)
    # Ragged segments in order; every query has a key of its own segment, those of segment 0 none.
    query_ids = np.sort(rng.integers(0, 4, (rows, queries)), axis=1).astype(np.int32)
    key_ids = np.sort(
        np.concatenate([np.tile(np.arange(1, 4), (rows, 1)), rng.integers(1, 4, (rows, keys - 3))], 1), 1
    )
    return (q, k, v, bias), layers.segment_mask(jnp.asarray(query_ids), jnp.asarray(key_ids)), query_ids > 0


def test_xla_mixes_as_the_plain_form_does_and_so_do_its_gradients(rng):
    arrays, mask, real = draw_attention(rng, *map(int, rng.integers([1, 2, 4, 1, 2], [4, 20, 20, 5, 12])))
    cotangent = rng.normal(0, 1, arrays[0].shape).astype(np.float32) * real[:, :, None, None]

    def program(kernel):
        def loss(arrays):
            q, k, v, bias = arrays
            mixed = layers.dot_product_attention(q, k, v, mask, bias, scale=0.37, kernel=kernel)
            return jnp.sum(mixed * cotangent), mixed

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    ((_, plain), plain_gradients), ((_, mixed), gradients) = program("plain"), program("xla")
    assert relative(mixed * real[:, :, None, None], plain * real[:, :, None, None]) < 1e-5
    for found, expected in zip(gradients, plain_gradients, strict=True):
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("positions", ["transformer_xl", "shaw", "none"])
@pytest.mark.parametrize("query_scale", ["constant", "per_dim"])
def test_the_conformer_by_xlas_kernel(rng, positions, query_scale):
    config = ConformerConfig(
        layers=2, dim=16, heads=2, subsampling_channels=(4, 4), positions=positions, query_scale=query_scale
    )
    samples = 640 * int(rng.integers(12, 20))
    speech = rng.integers(-9000, 9000, (2, 1, samples)).astype(np.int16)
    segments = np.array([[[[1, 0, 2500], [2, 3200, 3000]]], [[[1, 0, samples], [0, 0, 0]]]], np.int32)
    encoder = ConformerEncoder(config)
    variables = jax.jit(encoder.init)(jax.random.key(int(rng.integers(1000))), speech, segments)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), variables
    )
    plain, ids = jax.jit(encoder.apply)(variables, speech, segments)
    by_kernel = ConformerEncoder(dataclasses.replace(config, attention_kernel="xla"))
    found, found_ids = jax.jit(by_kernel.apply)(variables, speech, segments)
    np.testing.assert_array_equal(found_ids, ids)
    assert relative(found, plain) < 1e-5


def test_dropout_takes_the_plain_form(rng):
    mask = draw_attention(rng, 2, 6, 6, 2, 4)[1]
    attention = layers.MultiHeadAttention(2, 4, dropout=0.5, kernel="xla")
    x = rng.normal(0, 1, (2, 6, 8)).astype(np.float32)
    variables = attention.init(jax.random.key(0), x, x, mask)
    dropped = [
        attention.apply(variables, x, x, mask, deterministic=False, rngs={"dropout": jax.random.key(seed)})
        for seed in range(2)
    ]
    assert relative(*dropped) > 0.05
    plain = layers.MultiHeadAttention(2, 4, dropout=0.5)
    again = plain.apply(variables, x, x, mask, deterministic=False, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(again, dropped[1])


def test_cudnn_is_refused_where_it_is_not(rng):
    config = T5Config(
        vocab_size=20, emb_dim=8, num_heads=2, head_dim=8, mlp_dim=8, encoder_layers=1, decoder_layers=1
    )
    ids = jnp.ones((1, 4), jnp.int32)
    model = T5(dataclasses.replace(config, attention_kernel="cudnn", dtype="bfloat16"))
    with pytest.raises(UserError, match="attention_kernel is 'cudnn' on a cpu, expected 'plain'"):
        jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids)
    with pytest.raises(UserError, match=r"T5Config.attention_kernel is 'cudn'.*did you mean 'cudnn'"):
        T5Config(attention_kernel="cudn")
    with pytest.raises(UserError, match=r"ConformerConfig.attention_kernel is 'flash'"):
        ConformerConfig(attention_kernel="flash")


def test_what_a_policy_computes_again(rng):
    """A frozen T5's backward pass under each policy: no product with weights runs twice unless all do."""
    rows, length = 2, 10
    config = T5Config(
        vocab_size=30, emb_dim=32, num_heads=2, head_dim=12, mlp_dim=48, encoder_layers=3, decoder_layers=1
    )
    embeddings = rng.normal(0, 1, (rows, length, config.emb_dim)).astype(np.float32)
    ids = np.ones((rows, length), np.int32)
    variables = jax.eval_shape(T5(config).init, jax.random.key(0), ids, ids, ids, ids)

    def count(remat):
        model = T5(dataclasses.replace(config, remat=remat))

        def loss(embeddings, variables):
            encoded: Any = model.apply(variables, embeddings, ids, method="encode")
            return jnp.sum(encoded)

        return traced_flops(jax.make_jaxpr(jax.grad(loss))(embeddings, variables))

    attention = config.num_heads * config.head_dim
    weights = 2 * rows * length * (4 * config.emb_dim * attention + 3 * config.emb_dim * config.mlp_dim)
    scores = 2 * rows * length * length * attention
    layers_ = config.encoder_layers
    assert count("none") == layers_ * (2 * weights + 6 * scores)
    assert count("frozen") == count("dots") == count("none") + layers_ * scores
    # The last product of a layer is needed by nothing and is not run again.
    last = 2 * rows * length * config.emb_dim * config.mlp_dim
    assert count("full") == count("none") + layers_ * (weights - last + 2 * scores)


def flops_of_training(module, x, ids, **kwargs) -> int:
    """What a loss on the module's result and its gradient by input and parameters compute, from shapes."""
    variables = nn.unbox(jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), x, ids))

    def loss(variables, x):
        found: Any = module.apply(variables, x, ids, **kwargs)
        return jnp.sum(found[0] if isinstance(found, tuple) else found)

    return traced_flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x))


@pytest.mark.parametrize(
    "config",
    [
        ConformerConfig(layers=2, dim=16, heads=2, conv_kernel=5, subsampling_channels=(4, 3)),
        conformer.preset("gemma3n", layers=2, dim=16, heads=2, subsampling_channels=(4, 3)),
        conformer.preset("w2v_bert", layers=2, dim=16, heads=2, ffn_dim=24),
    ],
    ids=["usm", "gemma3n", "w2v_bert"],
)
def test_a_conformer_runs_no_product_with_weights_twice_but_in_full(rng, config):
    rows, length = int(rng.integers(1, 4)), 4 * int(rng.integers(3, 7))
    bins = (config.kaldi_fbank if config.front_end == "kaldi_fbank" else config.log_mel).mel_bins
    bins *= config.kaldi_fbank.stack if config.front_end == "kaldi_fbank" else 1
    x, ids = jnp.ones((rows, 1, length, bins)), jnp.ones((rows, 1, length), jnp.int32)

    def count(remat):
        encoder = ConformerEncoder(dataclasses.replace(config, remat=remat))
        return flops_of_training(encoder, x, ids, method="encode_features")

    frames = length if config.subsampling == "projection" else length // 4
    # Scores of content and of positions, and what they mix: the gradient of the map behind needs that too.
    attention = 2 * rows * config.dim * frames * (frames + (2 * frames - 1) + frames)
    assert count("frozen") == count("dots") == count("none") + config.layers * attention
    assert count("full") > count("frozen")


@pytest.mark.parametrize("gated", [False, True])
def test_an_adapter_runs_no_product_with_weights_twice_but_in_full(rng, gated):
    rows, length = (int(number) for number in rng.integers(2, 9, 2))
    config = AdapterConfig(layers=3, dim=16, heads=2, head_dim=6, mlp_dim=24, gated=gated)
    x, ids = jnp.ones((rows, 1, length, 10)), jnp.ones((rows, 1, length), jnp.int32)

    def count(remat):
        return flops_of_training(TransformerAdapter(dataclasses.replace(config, remat=remat), 12), x, ids)

    attention = 2 * rows * config.heads * config.head_dim * length * (length + length)
    assert count("frozen") == count("dots") == count("none") + config.layers * attention
    assert count("full") > count("frozen")


def test_a_model_goes_to_a_platform_with_the_kernels_that_it_has_there():
    config = slm.preset("tiny")
    trained = dataclasses.replace(
        config,
        speech_encoder=dataclasses.replace(config.speech_encoder, attention_kernel="pallas"),
        llm=dataclasses.replace(config.llm, attention_kernel="cudnn"),
    )
    for platform, others in (
        ("cpu", {"speech_encoder": "pallas", "llm": "cudnn"}),
        ("gpu", {"speech_encoder": "pallas"}),
        ("tpu", {"llm": "cudnn"}),
        (None, {"speech_encoder": "pallas", "llm": "cudnn"}),
    ):
        here, found = trained.on_platform(platform)
        assert found == others
        for part in ("speech_encoder", "llm"):
            expected = getattr(config if part in others else trained, part)
            assert getattr(here, part) == expected
    # JAX's own form is there everywhere, but not for lengths that are open.
    anywhere = dataclasses.replace(config, llm=dataclasses.replace(config.llm, attention_kernel="xla"))
    assert anywhere.on_platform("cpu") == (anywhere, {})
    assert anywhere.on_platform(None) == (config, {"llm": "xla"})
