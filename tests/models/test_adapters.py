"""The transformer adapter: its size in the paper, segments, output norm, options."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.linen.spmd import logical_to_mesh_sharding
from transformers import T5Config as HFT5Config
from transformers.models.t5.modeling_t5 import T5Stack

from slm_jax.errors import UserError
from slm_jax.models.adapters import AdapterConfig, TransformerAdapter
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES

# heads * head_dim differs from dim on purpose.
SMALL = AdapterConfig(layers=2, dim=16, heads=2, head_dim=4, mlp_dim=24)
PAPER = AdapterConfig(layers=2, dim=3072, heads=24, head_dim=128, mlp_dim=5120)
OUT = 12


def random_variables(rng, config, dim=10):
    shapes = nn.unbox(
        jax.eval_shape(
            TransformerAdapter(config, OUT).init,
            jax.random.key(0),
            jnp.zeros((1, 1, 4, dim)),
            jnp.ones((1, 1, 4), jnp.int32),
        )
    )
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


def ragged(rng, slots=2, positions=15, dim=10):
    """Frames [2, slots, P, dim], ids of two segments a slot with padding between and behind, lengths."""
    frames = rng.normal(size=(2, slots, positions, dim)).astype(np.float32)
    ids = np.zeros((2, slots, positions), np.int32)
    spans = []
    for row, slot in np.ndindex(2, slots):
        first, second = (int(n) for n in rng.integers(1, 7, 2))
        ids[row, slot, :first], ids[row, slot, first + 1 : first + 1 + second] = 3, 1
        spans += [(row, slot, 0, first), (row, slot, first + 1, second)]
    return jnp.asarray(frames), jnp.asarray(ids), spans


def adapt(config, variables, frames, ids):
    return jax.jit(TransformerAdapter(config, OUT).apply)(variables, frames, ids)


@pytest.mark.parametrize("relative_bias", ["t5", "none"])
def test_packed_equals_alone(rng, relative_bias):
    config = dataclasses.replace(SMALL, relative_bias=relative_bias, gated=relative_bias == "none")
    variables = random_variables(rng, config)
    frames, ids, spans = ragged(rng)
    apply = jax.jit(TransformerAdapter(config, OUT).apply)
    out = np.asarray(apply(variables, frames, ids))
    assert out.shape == (2, 2 * 15, OUT)
    for row, slot, start, length in spans:
        alone = jnp.zeros((1, 1, 15, 10)).at[0, 0, :length].set(frames[row, slot, start : start + length])
        alone_ids = (jnp.arange(15) < length).astype(jnp.int32)[None, None]
        expected = apply(variables, alone, alone_ids)[0, :length]
        first = slot * 15 + start
        # Of order 1, and summed in another order in float32; a wrong mask would change 0.01 and more.
        np.testing.assert_allclose(out[row, first : first + length], expected, atol=1e-4)
    assert not np.any(out[np.asarray(ids).reshape(2, -1) == 0])


@pytest.mark.parametrize("gated", [False, True])
def test_layers_match_the_encoder_of_transformers_t5(rng, gated):
    """The stack between the projections is a T5 encoder with scores scaled by head_dim ** -0.5."""
    config = dataclasses.replace(SMALL, output_norm="none", gated=gated)
    variables = random_variables(rng, config)
    frames, _, _ = ragged(rng, slots=1)
    lengths = rng.integers(2, 16, 2)
    ids = (np.arange(15) < lengths[:, None]).astype(np.int32)
    torch_stack = T5Stack(
        HFT5Config(
            d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu" if gated else "gelu_new", is_decoder=False, use_cache=False,
        )
    ).eval()  # fmt: skip
    params = variables["params"]
    with torch.no_grad():
        _copy_into(torch_stack, params, config)
        inputs = torch.tensor(np.asarray(frames[:, 0] @ params["in"]["kernel"]))
        states = torch_stack(inputs_embeds=inputs, attention_mask=torch.tensor(ids)).last_hidden_state
    expected = states.numpy() @ np.asarray(params["out"]["kernel"])
    found = np.asarray(adapt(config, variables, frames, jnp.asarray(ids[:, None])))
    np.testing.assert_allclose(found[ids > 0], expected[ids > 0], atol=1e-4)


def _copy_into(stack, params, config):
    def put(parameter, value):
        parameter.copy_(torch.tensor(np.asarray(value)))

    put(stack.final_layer_norm.weight, params["final_norm"]["scale"])
    for index, block in enumerate(stack.block):
        layer = jax.tree.map(lambda x, i=index: x[i], params["layers"])
        inner, mlp = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        attention = jax.tree.map(lambda x: np.asarray(x), layer["attention"])
        put(inner.q.weight, (attention["query"]["kernel"] * config.head_dim**-0.5).reshape(16, -1).T)
        put(inner.k.weight, attention["key"]["kernel"].reshape(16, -1).T)
        put(inner.v.weight, attention["value"]["kernel"].reshape(16, -1).T)
        put(inner.o.weight, attention["out"]["kernel"].reshape(-1, 16).T)
        put(block.layer[0].layer_norm.weight, layer["pre_attention_layer_norm"]["scale"])
        put(block.layer[1].layer_norm.weight, layer["pre_mlp_layer_norm"]["scale"])
        for name in ("wi_0", "wi_1", "wo") if config.gated else ("wi", "wo"):
            put(getattr(mlp, name).weight, layer["mlp"][name]["kernel"].T)
    bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    put(bias.weight, params["relpos_bias"]["rel_embedding"].T)


def test_fresh_output_has_the_scale_asked_for(rng):
    frames, ids, _ = ragged(rng)
    config = dataclasses.replace(SMALL, output_scale=3.5)
    adapter = TransformerAdapter(config, OUT)
    out = np.asarray(adapter.apply(adapter.init(jax.random.key(0), frames, ids), frames, ids))
    rms = np.sqrt(np.mean(out**2, axis=-1))[np.asarray(ids).reshape(2, -1) > 0]
    np.testing.assert_allclose(rms, 3.5, rtol=1e-3)


def test_paper_size_from_shapes_alone():
    frames = jax.ShapeDtypeStruct((1, 1, 8, 1536), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1, 8), jnp.int32)
    variables = jax.eval_shape(TransformerAdapter(PAPER, 4096).init, jax.random.key(0), frames, ids)
    count = sum(x.size for x in jax.tree.leaves(variables))
    assert abs(count / 156e6 - 1) < 0.01


def test_remat_changes_no_gradient_and_dropout_acts_only_in_training(rng):
    variables = random_variables(rng, SMALL)
    frames, ids, _ = ragged(rng)
    weights = rng.normal(size=(2, 30, OUT)).astype(np.float32)

    def gradients(config):
        return jax.grad(lambda v: jnp.mean(adapt(config, v, frames, ids) * weights))(variables)

    for one, other in zip(
        jax.tree.leaves(gradients(SMALL)),
        jax.tree.leaves(gradients(dataclasses.replace(SMALL, remat="full"))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    dropping = TransformerAdapter(dataclasses.replace(SMALL, dropout=0.5), OUT)
    plain = adapt(SMALL, variables, frames, ids)
    np.testing.assert_array_equal(jax.jit(dropping.apply)(variables, frames, ids), plain)
    rngs = {"dropout": jax.random.key(int(rng.integers(2**31)))}
    dropped = dropping.apply(variables, frames, ids, deterministic=False, rngs=rngs)
    assert np.abs(np.asarray(dropped) - np.asarray(plain)).max() > 0.1


def test_no_layers_leave_two_projections(rng):
    config = dataclasses.replace(SMALL, layers=0, output_norm="none")
    variables = random_variables(rng, config)
    frames, ids, _ = ragged(rng)
    assert set(variables["params"]) == {"in", "final_norm", "out"}
    params = variables["params"]
    hidden = np.asarray(frames @ params["in"]["kernel"])
    hidden = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)
    expected = (hidden * params["final_norm"]["scale"]) @ params["out"]["kernel"]
    expected = np.where(np.asarray(ids)[..., None] > 0, expected, 0).reshape(2, 30, OUT)
    np.testing.assert_allclose(adapt(config, variables, frames, ids), expected, atol=1e-5)


def test_empty_rows_give_zeros_and_finite_gradients(rng):
    variables = random_variables(rng, SMALL)
    frames, ids, _ = ragged(rng)
    ids = ids.at[1].set(0)
    value, grads = jax.value_and_grad(lambda v: jnp.sum(adapt(SMALL, v, frames, ids) ** 2))(variables)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert not np.any(adapt(SMALL, variables, frames, ids)[1])


def test_bfloat16_keeps_float32_parameters(rng):
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    variables = random_variables(rng, SMALL)
    frames, ids, _ = ragged(rng)
    rough, exact = adapt(config, variables, frames, ids), adapt(SMALL, variables, frames, ids)
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - np.asarray(exact)).mean()
    assert 0 < error < 0.05 * np.abs(np.asarray(exact)).mean()
    fresh = jax.eval_shape(TransformerAdapter(config, OUT).init, jax.random.key(0), frames, ids)
    assert {x.dtype.name for x in jax.tree.leaves(fresh)} == {"float32"}


def test_shards_on_a_mesh_with_the_same_output(rng):
    adapter = TransformerAdapter(SMALL, OUT)
    frames, ids, _ = ragged(rng, slots=1)
    frames, ids = jnp.tile(frames, (2, 1, 1, 1)), jnp.tile(ids, (2, 1, 1))
    boxed = jax.jit(adapter.init)(jax.random.key(0), frames, ids)
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim and None not in leaf.names
    variables = nn.unbox(boxed)
    single = jax.jit(adapter.apply)(variables, frames, ids)
    mesh = make_mesh(2, 2, 2)
    shardings = logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, list(DEFAULT_RULES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(DEFAULT_RULES)):
        placed = jax.device_put(variables, shardings)
        sharded = jax.jit(adapter.apply)(placed, frames, ids)
    assert placed["params"]["out"]["kernel"].addressable_shards[0].data.shape == (8, 6)
    # Of order 1, and summed in another order in float32; a wrong mask would change 0.01 and more.
    np.testing.assert_allclose(np.asarray(sharded), single, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("activation", "gel", "gelu"),
        ("output_norm", "rmsnorm", "rms"),
        ("relative_bias", "T5", "t5"),
        ("remat", "ful", "full"),
    ],
)
def test_a_users_mistake_names_the_valid_choice(field, value, says):
    with pytest.raises(UserError, match=rf"AdapterConfig\.{field} .*{says}"):
        AdapterConfig(**{field: value})
