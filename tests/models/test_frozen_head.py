"""Cross-entropy under a head that trains or is frozen, cut along tokens or the vocabulary: one gradient.

A frozen head needs two passes over the logits.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slm_jax.models.losses import chunked_cross_entropy
from slm_jax.models.quantization import quantized
from slm_jax.models.t5 import T5, T5Config
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import batch_sharding, named_shardings, partitioned
from slm_jax.training.flops import traced_flops

SMALL = T5Config(
    vocab_size=72,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    encoder_layers=1,
    decoder_layers=1,
    loss_chunk=9,
)
KINDS = {
    "untied": SMALL,
    "untied, scaled": dataclasses.replace(SMALL, scale_untied_logits=True),
    "tied": dataclasses.replace(SMALL, tied_logits=True),
    "tied, unscaled": dataclasses.replace(SMALL, tied_logits=True, scale_tied_logits=False),
}
# A vocabulary that is cut in three chunks of 128 words, the last of which has 83 of the one before it.
CUT = {"vocab_size": 301, "loss_logits": 1}


def drawn(rng: np.random.Generator, config: T5Config) -> Any:
    """Random variables: the head alone matters."""
    ids = jnp.ones((1, 2), jnp.int32)
    boxed = jax.eval_shape(T5(config).init, jax.random.key(0), ids, ids, ids, ids)
    return jax.tree.map(
        lambda leaf: leaf.replace_boxed(jnp.asarray(rng.normal(0, 0.7, leaf.value.shape), jnp.float32)),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def scored(config: T5Config, variables: Any, hidden: Any, targets: Any, frozen: bool) -> Any:
    return T5(config).apply(variables, hidden, targets, method="score_tokens", frozen_head=frozen)


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_gradient(config, variables, hidden, targets, frozen, weights):
    def loss(hidden):
        losses, correct = scored(config, variables, hidden, targets, frozen)
        return jnp.sum(losses * weights), (losses, correct)

    return jax.value_and_grad(loss, has_aux=True)(hidden)


def kernel_of(config: T5Config, variables: Any) -> Any:
    params = variables["params"]
    return (
        params["token_embedder"]["embedding"]
        if config.tied_logits
        else params["decoder"]["logits_dense"]["kernel"]
    )


@functools.partial(jax.jit, static_argnums=0)
def trained(config, variables, hidden, targets, weights):
    """Value and gradients of the head and of the states."""

    def loss(variables, hidden):
        losses, correct = scored(config, variables, hidden, targets, False)
        return jnp.sum(losses * weights), (losses, correct)

    value, (of_variables, of_hidden) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        variables, hidden
    )
    return value, (kernel_of(config, of_variables), of_hidden)


def draw_states(rng: np.random.Generator, config: T5Config, rows: int, tokens: int) -> tuple[Any, Any, Any]:
    hidden = rng.normal(0, 1, (rows, tokens, config.emb_dim)).astype(np.float32)
    targets = rng.integers(0, config.vocab_size, (rows, tokens)).astype(np.int32)
    # Some tokens count nothing, and one loss counts negatively: cotangents are not all alike.
    weights = rng.choice([0.0, 1.0, 0.3, -2.0], (rows, tokens)).astype(np.float32)
    weights[0, 0] = 1.0
    return hidden, targets, weights


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("cut", [{}, CUT], ids=["tokens", "vocabulary"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_gradient_of_the_head_that_trains(rng, kind, cut, int8):
    config = dataclasses.replace(KINDS[kind], **cut)
    boxed = drawn(rng, config)
    variables = nn.unbox(quantized(boxed) if int8 else boxed)
    hidden, targets, weights = draw_states(rng, config, int(rng.integers(1, 5)), int(rng.integers(1, 12)))
    uncut = dataclasses.replace(config, loss_logits=SMALL.loss_logits)
    (_, plain), plain_gradient = value_and_gradient(uncut, variables, hidden, targets, False, weights)
    (_, frozen), gradient = value_and_gradient(config, variables, hidden, targets, True, weights)
    if cut:
        assert relative(frozen[0], plain[0]) < 1e-5
    else:
        np.testing.assert_array_equal(frozen[0], plain[0])
    np.testing.assert_array_equal(frozen[1], plain[1])
    assert relative(gradient, plain_gradient) < 1e-5


@pytest.mark.parametrize("cut", [{}, CUT], ids=["tokens", "vocabulary"])
def test_it_is_the_gradient_that_torch_finds(rng, cut):
    config = dataclasses.replace(SMALL, **cut)
    variables = nn.unbox(drawn(rng, config))
    hidden, targets, weights = draw_states(rng, config, 3, 7)
    (_, (losses, _)), gradient = value_and_gradient(config, variables, hidden, targets, True, weights)
    states = torch.tensor(hidden, requires_grad=True)
    kernel = torch.tensor(np.array(kernel_of(config, variables)), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        (states @ kernel).reshape(-1, config.vocab_size),
        torch.tensor(targets.reshape(-1), dtype=torch.long),
        reduction="none",
    )
    (expected * torch.tensor(weights.reshape(-1))).sum().backward()
    assert relative(losses.reshape(-1), expected.detach().numpy()) < 1e-5
    assert states.grad is not None and relative(gradient, states.grad.numpy()) < 1e-5
    (_, (losses, _)), gradients = trained(config, variables, hidden, targets, weights)
    assert relative(losses.reshape(-1), expected.detach().numpy()) < 1e-5
    assert kernel.grad is not None
    for found, from_torch in zip(gradients, (kernel.grad, states.grad), strict=True):
        assert relative(found, from_torch.numpy()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_trains_has_one_gradient_however_it_is_cut(rng, kind):
    config = dataclasses.replace(KINDS[kind], **CUT)
    variables = nn.unbox(drawn(rng, config))
    hidden, targets, weights = draw_states(rng, config, int(rng.integers(1, 5)), int(rng.integers(1, 12)))
    uncut = dataclasses.replace(config, loss_logits=SMALL.loss_logits)
    (_, (plain, likeliest)), expected = trained(uncut, variables, hidden, targets, weights)
    (_, (losses, correct)), gradients = trained(config, variables, hidden, targets, weights)
    np.testing.assert_array_equal(correct, likeliest)
    assert relative(losses, plain) < 1e-5
    for found, wanted in zip(gradients, expected, strict=True):
        assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("cut", [{}, CUT], ids=["tokens", "vocabulary"])
def test_bfloat16_states_get_a_bfloat16_gradient_near_the_exact_one(rng, cut):
    exact_config = dataclasses.replace(SMALL, **cut)
    config = dataclasses.replace(exact_config, dtype="bfloat16")
    variables = nn.unbox(drawn(rng, config))
    hidden, targets, weights = draw_states(rng, config, 4, 9)
    _, exact = value_and_gradient(exact_config, variables, hidden, targets, True, weights)
    half = jnp.asarray(hidden, jnp.bfloat16)
    _, exact_gradients = trained(exact_config, variables, hidden, targets, weights)
    _, gradient = value_and_gradient(config, variables, half, targets, True, weights)
    _, (of_kernel, of_states) = trained(config, variables, half, targets, weights)
    assert gradient.dtype == of_states.dtype == jnp.bfloat16 and of_kernel.dtype == jnp.float32
    assert relative(gradient.astype(jnp.float32), exact) < 0.02
    assert relative(of_states.astype(jnp.float32), exact) < 0.02
    assert relative(of_kernel, exact_gradients[0]) < 0.02


def test_logits_are_computed_once_and_never_of_all_tokens(rng):
    config = dataclasses.replace(SMALL, vocab_size=500, loss_chunk=8)
    variables = nn.unbox(drawn(rng, config))
    hidden, targets, weights = draw_states(rng, config, 4, 16)
    one = 2 * 4 * 16 * config.emb_dim * config.vocab_size

    def program(frozen):
        return jax.make_jaxpr(lambda h: value_and_gradient(config, variables, h, targets, frozen, weights))(
            hidden
        )

    # Forward and the gradient of the states; where the head trains, the logits once more.
    assert traced_flops(program(True)) == 2 * one
    assert traced_flops(program(False)) == 3 * one
    # No array as large as the logits of all tokens, and none of the vocabulary leaves the loop.
    text = compiled_text(value_and_gradient, config, variables, hidden, targets, True, weights)
    assert f"[4,16,{config.vocab_size}]" not in text and f"[8,4,2,{config.vocab_size}]" not in text


def compiled_text(function: Any, *arguments: Any) -> str:
    text = function.lower(*arguments).compile().as_text()
    assert text
    return text


def test_evaluation_alone_computes_no_gradient(rng):
    config = dataclasses.replace(SMALL, vocab_size=500)
    variables = nn.unbox(drawn(rng, config))
    hidden, targets, weights = draw_states(rng, config, 4, 16)

    def products(text: str) -> int:
        return len(re.findall(r" dot\(|matmul", text))

    evaluation = jax.jit(lambda hidden: scored(config, variables, hidden, targets, True))
    alone = products(compiled_text(evaluation, hidden))
    both = products(compiled_text(value_and_gradient, config, variables, hidden, targets, True, weights))
    assert 0 < alone < both


MESHES = [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("cut", [{}, {"vocab_size": 1088, "loss_logits": 1}], ids=["tokens", "vocabulary"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_split_vocabulary_gives_the_same(rng, axes, cut):
    config = dataclasses.replace(SMALL, **cut)
    boxed = drawn(rng, config)
    hidden, targets, weights = draw_states(rng, config, 8, 6)
    _, expected = value_and_gradient(config, nn.unbox(boxed), hidden, targets, True, weights)
    mesh = make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **axes})
    placed = jax.device_put(nn.unbox(boxed), named_shardings(boxed, mesh))
    rows = batch_sharding(mesh)

    def gradient(variables, hidden):
        return jax.grad(lambda h: jnp.sum(scored(config, variables, h, targets, True)[0] * weights))(hidden)

    with partitioned(mesh):
        found = jax.jit(gradient, out_shardings=rows)(placed, jax.device_put(hidden, rows))
    assert relative(found, expected) < 1e-5
    _, expected = trained(config, nn.unbox(boxed), hidden, targets, weights)
    with partitioned(mesh):
        _, found = trained(config, placed, jax.device_put(hidden, rows), targets, weights)
    for part, wanted in zip(found, expected, strict=True):
        assert relative(part, wanted) < 1e-5


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("axes", [{}, {"data": 8}, {"fsdp": 8}, {"tensor": 8}, MESHES[1]], ids=str)
def test_memory_does_not_depend_on_the_vocabulary(axes, trains):
    devices = jax.devices()[: 8 if axes else 1]
    mesh = make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **axes}, devices=devices)
    rows = batch_sharding(mesh)
    hidden = jax.ShapeDtypeStruct((32, 32, 32), jnp.float32, sharding=rows)
    targets = jax.ShapeDtypeStruct((32, 32), jnp.int32, sharding=rows)

    def temporaries(vocab: int) -> int:
        config = dataclasses.replace(SMALL, vocab_size=vocab, emb_dim=32, num_heads=8, loss_logits=2**17)
        ids = jnp.ones((1, 2), jnp.int32)
        boxed = jax.eval_shape(T5(config).init, jax.random.key(0), ids, ids, ids, ids)
        shardings = named_shardings(boxed, mesh)
        variables = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            nn.unbox(boxed),
            shardings,
        )

        def gradient(variables, hidden, targets):
            if trains:
                # The head's is a result; beside it there is no room for another one.
                return trained(config, variables, hidden, targets, 1.0)[1]
            return jax.grad(lambda h: jnp.sum(scored(config, variables, h, targets, True)[0]))(hidden)

        places = (kernel_of(config, shardings), rows) if trains else rows
        with partitioned(mesh):
            compiled = jax.jit(gradient, out_shardings=places).lower(variables, hidden, targets).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(250112) < 1.15 * temporaries(32768)


def test_a_token_of_weight_zero_has_no_gradient_whatever_its_loss():
    kernel = jnp.array([[1.0, -1.0], [np.inf, 0.0]])
    hidden = jnp.array([[[1.0, 0.0], [1.0, 0.0]]])

    def loss(hidden):
        losses, _ = chunked_cross_entropy(
            hidden,
            jnp.zeros((1, 2), jnp.int32),
            lambda h: h[..., :1] * kernel[:1],
            1,
            frozen_head=lambda g: g @ kernel[:1].T,
        )
        return jnp.sum(jnp.where(jnp.array([[True, False]]), losses, 0.0))

    gradient = jax.grad(loss)(hidden.at[0, 1, 0].set(3.0)[..., :1])
    assert np.isfinite(gradient).all() and gradient[0, 1, 0] == 0 != gradient[0, 0, 0]
