"""T5 against transformers with the same random weights; packing, padding, cache, the loss in chunks."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from flax.linen.spmd import LogicallyPartitioned
from jax.extend.core import jaxprs_in_params

from slm_jax.errors import UserError
from slm_jax.models import t5
from slm_jax.models.losses import chunked_cross_entropy
from slm_jax.models.t5 import T5, T5Config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import MT5Config, MT5ForConditionalGeneration, T5ForConditionalGeneration
    from transformers import T5Config as TheirT5Config


# The attention is not as wide as the embedding; distances reach past the last bucket. One set of shapes for
# most tests lets the compilation cache serve them; what is random is every value and length.
SMALL = T5Config(
    vocab_size=70,
    emb_dim=16,
    num_heads=3,
    head_dim=10,
    mlp_dim=24,
    encoder_layers=2,
    decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=12,
)


def random_config(rng, **fields) -> T5Config:
    """A small configuration of random sizes, for the comparison with transformers."""
    return dataclasses.replace(
        SMALL,
        vocab_size=int(rng.integers(60, 130)),
        emb_dim=int(rng.choice([16, 32])),
        num_heads=int(rng.integers(2, 5)),
        head_dim=int(rng.choice([6, 10])),
        mlp_dim=int(rng.integers(20, 50)),
        encoder_layers=int(rng.integers(1, 4)),
        decoder_layers=int(rng.integers(1, 4)),
        relative_max_distance=int(rng.choice([12, 128])),
        relative_buckets=int(rng.choice([8, 32])),
        **fields,
    )


def apply(config: T5Config, variables, *arrays, method="__call__") -> Any:
    """The model's method, compiled."""
    return _compiled(config, method)(variables, *arrays)


@functools.cache
def _compiled(config: T5Config, method: str):
    return jax.jit(lambda variables, *arrays: T5(config).apply(variables, *arrays, method=method))


@functools.cache
def _encoder(config: T5Config):
    def encode(variables, inputs, segments):
        model = T5(config).bind(variables)
        return model.encode(model.embed(inputs), segments)

    return jax.jit(encode)


@functools.cache
def _gradient(config: T5Config):
    """Of the losses' sum with respect to all parameters; also gives the losses."""

    def loss(variables, inputs, segments, targets, target_segments):
        losses, _ = T5(config).apply(variables, inputs, segments, targets, target_segments)
        return jnp.sum(jnp.where(target_segments > 0, losses, 0)), losses

    return jax.jit(jax.grad(loss, has_aux=True))


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def random_variables(config: T5Config, rng) -> dict:
    """Parameters of a moderate scale, every one of them random, norms too."""
    ids = jnp.ones((1, 1), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(lambda: T5(config).init(jax.random.key(0), ids, ids, ids, ids)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        # Kernels keep activations near 1, so that no layer multiplies rounding errors.
        mean, std = (1.0, 0.2) if "scale" in name else (0.0, 1.0 if "embedding" in name else 0.2)
        return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def ragged(rng, rows: int, length: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids (1, or 0 for padding at the end), int32 [rows, length]."""
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = length
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return (rng.integers(2, vocab, (rows, length)) * segments).astype(np.int32), segments


def in_torch(config: T5Config, params: dict) -> torch.nn.Module:
    """The model of transformers with our parameters."""
    kind: Any = (
        (TheirT5Config, T5ForConditionalGeneration)
        if config.tied_logits
        else (
            MT5Config,
            MT5ForConditionalGeneration,
        )
    )
    theirs = kind[1](
        kind[0](
            vocab_size=config.vocab_size,
            d_model=config.emb_dim,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.encoder_layers,
            num_decoder_layers=config.decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_max_distance,
            layer_norm_epsilon=config.norm_epsilon,
            feed_forward_proj=f"gated-{config.activation}" if config.gated else config.activation,
            tie_word_embeddings=config.tied_logits,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )
    if not config.tied_logits:
        # transformers 5 ties MT5's head whatever the configuration says; mT5's own is not tied.
        theirs.lm_head = torch.nn.Linear(config.emb_dim, config.vocab_size, bias=False)
    state = {"shared.weight": params["token_embedder"]["embedding"]}
    for stack, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        ours = params[stack]
        state[f"{stack}.embed_tokens.weight"] = params["token_embedder"]["embedding"]
        state[f"{stack}.final_layer_norm.weight"] = ours[f"{stack}_norm"]["scale"]
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        state[bias] = ours["relpos_bias"]["rel_embedding"].T
        for layer in range(count):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], ours[stack])
            state |= layer_in_torch(one, f"{stack}.block.{layer}.layer", stack == "decoder")
    if not config.tied_logits:
        state["lm_head.weight"] = params["decoder"]["logits_dense"]["kernel"].T
    else:
        state["lm_head.weight"] = params["token_embedder"]["embedding"]
    theirs.load_state_dict(
        {name: torch.tensor(np.asarray(leaf)) for name, leaf in state.items()}, strict=True
    )
    return theirs.eval()


def layer_in_torch(layer: dict, prefix: str, decoder: bool) -> dict:
    state = {}
    attentions = [("attention", "pre_attention_layer_norm", "SelfAttention")]
    if decoder:
        attentions = [
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ]
    for index, (ours, norm, theirs) in enumerate(attentions):
        for letter, name in zip("qkv", ("query", "key", "value"), strict=True):
            kernel = layer[ours][name]["kernel"]
            state[f"{prefix}.{index}.{theirs}.{letter}.weight"] = kernel.reshape(kernel.shape[0], -1).T
        kernel = layer[ours]["out"]["kernel"]
        state[f"{prefix}.{index}.{theirs}.o.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
        state[f"{prefix}.{index}.layer_norm.weight"] = layer[norm]["scale"]
    last = f"{prefix}.{len(attentions)}"
    for name, leaf in layer["mlp"].items():
        state[f"{last}.DenseReluDense.{name}.weight"] = leaf["kernel"].T
    return state | {f"{last}.layer_norm.weight": layer["pre_mlp_layer_norm"]["scale"]}


V1_0 = {"gated": False, "activation": "relu", "tied_logits": True}


@pytest.mark.parametrize("fields", [{}, V1_0], ids=["mt5", "t5_v1_0"])
def test_states_and_logits_are_those_of_transformers(rng, fields):
    config = random_config(rng, **fields)
    variables = random_variables(config, rng)
    theirs = in_torch(config, variables["params"])
    inputs, segments = ragged(rng, 4, 19, config.vocab_size)
    targets, target_segments = ragged(rng, 4, 9, config.vocab_size)
    encoded = _encoder(config)(variables, inputs, segments)
    hidden = apply(config, variables, encoded, segments, targets, target_segments, method="decode")
    logits = apply(config, variables, hidden, method="logits")
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(inputs).long(),
            attention_mask=torch.tensor(segments),
            decoder_input_ids=torch.tensor(np.pad(targets[:, :-1], ((0, 0), (1, 0)))).long(),
        )
    real, target_real = segments == 1, target_segments == 1
    found = np.asarray(encoded)[real]
    np.testing.assert_allclose(found, expected.encoder_last_hidden_state.numpy()[real], atol=1e-4)
    expected_logits = expected.logits.numpy()[target_real]
    np.testing.assert_allclose(np.asarray(logits)[target_real], expected_logits, atol=1e-4, rtol=1e-4)


def test_packed_examples_equal_the_examples_alone(rng):
    variables = random_variables(SMALL, rng)
    examples = [
        [rng.integers(2, SMALL.vocab_size, int(size)) for size in rng.integers(1, most, 2)]
        for most in (9, 8, 8)
    ]

    def row(chosen):
        """Inputs, segment ids, targets and target segment ids [1, 24] of the chosen examples in one row."""
        arrays = np.zeros((4, 1, 24), np.int32)
        for part in (0, 1):
            at = 0
            for number, example in enumerate(chosen, 1):
                arrays[2 * part, 0, at : at + len(example[part])] = example[part]
                arrays[2 * part + 1, 0, at : at + len(example[part])] = number
                at += len(example[part])
        return arrays

    def real(losses, chosen):
        return np.asarray(losses)[row(chosen)[3] > 0]

    gradient, together = _gradient(SMALL)(variables, *row(examples))
    alone = [_gradient(SMALL)(variables, *row([example])) for example in examples]
    separate = [real(losses, [example]) for (_, losses), example in zip(alone, examples, strict=True)]
    # Of order 1, and summed in another order in float32; a wrong mask would change 0.01 and more.
    np.testing.assert_allclose(real(together, examples), np.concatenate(separate), rtol=1e-4, atol=1e-4)
    summed = sum(flat(gradient) for gradient, _ in alone)
    assert np.linalg.norm(flat(gradient) - summed) <= 1e-5 * np.linalg.norm(summed)


def test_padded_rows_are_finite_with_finite_gradients(rng):
    variables = random_variables(SMALL, rng)
    arrays = [*ragged(rng, 3, 7, SMALL.vocab_size), *ragged(rng, 3, 7, SMALL.vocab_size)]
    for array in arrays:
        array[1] = 0
    assert np.isfinite(flat(_gradient(SMALL)(variables, *arrays))).all()


@pytest.mark.parametrize(
    "fields",
    [{"remat": "full"}, {"remat": "dots"}, {"remat": "frozen"}, {"scan": False}, {"attention_kernel": "xla"}],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_remat_and_unrolling_change_nothing(rng, fields):
    variables = random_variables(SMALL, rng)
    arrays = [*ragged(rng, 3, 7, SMALL.vocab_size), *ragged(rng, 3, 7, SMALL.vocab_size)]
    plain, _ = _gradient(SMALL)(variables, *arrays)
    other, _ = _gradient(dataclasses.replace(SMALL, **fields))(variables, *arrays)
    assert jax.tree.structure(plain) == jax.tree.structure(other)
    assert np.linalg.norm(flat(plain) - flat(other)) <= 1e-5 * np.linalg.norm(flat(plain))


def test_dropout_only_where_asked(rng):
    config = dataclasses.replace(SMALL, dropout=0.5)
    variables = random_variables(config, rng)
    ids = jnp.ones((2, 5), jnp.int32)

    @functools.partial(jax.jit, static_argnums=1)
    def losses(seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        return T5(config).apply(variables, ids, ids, ids, ids, None, deterministic, rngs=rngs)[0]

    np.testing.assert_array_equal(losses(0, True), losses(1, True))
    assert not np.allclose(losses(0, False), losses(1, False))


def test_shift_starts_every_segment_with_zero():
    targets = jnp.array([[5, 6, 1, 7, 1, 0], [3, 4, 8, 9, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 0]])
    expected = [[0, 5, 6, 0, 7, 0], [0, 3, 0, 8, 9, 0]]
    np.testing.assert_array_equal(t5.shift_within_segments(targets, segments, positions), expected)
    expected[1] = [0, 3, 4, 8, 9, 0]
    np.testing.assert_array_equal(t5.shift_within_segments(targets, segments), expected)


def test_decode_steps_give_the_logits_of_the_whole(rng):
    variables = random_variables(SMALL, rng)
    inputs, segments = ragged(rng, 3, 11, SMALL.vocab_size)
    targets = rng.integers(2, SMALL.vocab_size, (3, 6)).astype(np.int32)
    encoded = _encoder(SMALL)(variables, inputs, segments)
    hidden = apply(SMALL, variables, encoded, segments, targets, np.ones_like(targets), method="decode")
    whole = apply(SMALL, variables, hidden, method="logits")

    @jax.jit
    def step(variables, encoded, tokens):
        arguments = (encoded, segments, tokens, targets.shape[1])
        return T5(SMALL).apply(variables, *arguments, method="decode_step", mutable=["cache"])

    cache = {}
    for at, tokens in enumerate(np.pad(targets, ((0, 0), (1, 0)))[:, :-1].T):
        # What the encoder gave is read in the first step only; afterwards its keys come from the cache.
        states = encoded if at == 0 else jnp.full_like(encoded, jnp.nan)
        logits, cache = step({**variables, **cache}, states, tokens[:, None])
        np.testing.assert_allclose(logits[:, 0], whole[:, at], atol=1e-4, rtol=1e-4)


def dense_losses(hidden, kernel, targets):
    logits = jnp.einsum("btd,dv->btv", hidden, kernel)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1) == targets


@pytest.mark.parametrize("chunk", [1, 5, 7, 1000])
def test_chunked_loss_and_gradients_are_the_dense_ones(rng, chunk):
    rows, length, dim, vocab = 3, int(rng.choice([1, 2, 11])), 8, 37
    hidden = jnp.asarray(rng.normal(size=(rows, length, dim)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(dim, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32)
    targets = targets.at[0].set(jnp.argmax(hidden[0] @ kernel, axis=-1).astype(jnp.int32))
    weights = jnp.asarray(rng.random((rows, length)), jnp.float32)

    def chunked(hidden, kernel, targets):
        return chunked_cross_entropy(hidden, targets, lambda x: jnp.einsum("btd,dv->btv", x, kernel), chunk)

    def of(function):
        def loss(hidden, kernel):
            losses, correct = function(hidden, kernel, targets)
            return jnp.sum(losses * weights), (losses, correct)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, kernel)

    (_, (losses, correct)), gradients = of(chunked)
    (_, (expected, hits)), expected_gradients = of(dense_losses)
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_array_equal(correct, hits)
    assert correct[0].all() and losses.shape == correct.shape == (rows, length)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def array_sizes(jaxpr):
    """Sizes of all arrays that a jaxpr computes, those inside its loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(variable.aval.shape)) for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def test_no_array_is_as_large_as_all_logits(rng):
    rows, length = 2, 16
    config = dataclasses.replace(SMALL, vocab_size=4099, loss_chunk=8)
    variables = random_variables(config, rng)
    ids = jnp.ones((rows, length), jnp.int32)
    hidden = jnp.ones((rows, length, config.emb_dim))

    def chunked(hidden, variables):
        return apply(config, variables, hidden, ids, method="token_losses").sum()

    def dense(hidden, variables):
        kernel = variables["params"]["decoder"]["logits_dense"]["kernel"]
        return dense_losses(hidden, kernel, ids)[0].sum()

    def largest(function):
        return max(array_sizes(jax.make_jaxpr(jax.value_and_grad(function))(hidden, variables).jaxpr))

    assert largest(chunked) <= 8 * 4099 < rows * length * 4099 == largest(dense)


@pytest.mark.parametrize(
    ("name", "total", "encoder"),
    [
        ("small", 0.300e9, 0.019e9),
        ("base", 0.582e9, 0.085e9),
        ("large", 1.230e9, 0.308e9),
        ("xl", 3.743e9, 1.158e9),
        ("xxl", 12.92e9, 4.631e9),
    ],
)
def test_published_sizes(name, total, encoder):
    ids = jnp.ones((1, 1), jnp.int32)
    model = T5(t5.preset(name))
    params = meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), ids, ids, ids, ids)))["params"]

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(params) == pytest.approx(total, rel=2e-3)
    assert count(params["encoder"]) == pytest.approx(encoder, rel=3e-2)


def test_every_parameter_names_its_axes():
    config = SMALL
    ids = jnp.ones((1, 1), jnp.int32)
    boxed: Any = jax.eval_shape(lambda: T5(config).init(jax.random.key(0), ids, ids, ids, ids))["params"]
    boxes: Any = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, LogicallyPartitioned)
        assert len(box.names) == box.unbox().ndim and None not in box.names
    kernel = boxed["encoder"]["encoder"]["attention"]["out"]["kernel"]
    assert kernel.names == ("layers", "heads", "kv", "embed")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: t5.preset("xxxl"), "did you mean 'xxl'"),
        (lambda: T5Config(activation="gelo"), "did you mean 'gelu'"),
        (lambda: T5Config(remat="ful"), "did you mean 'full'"),
    ],
)
def test_unknown_names_say_the_nearest(make, found):
    with pytest.raises(UserError, match=found):
        make()


@pytest.mark.parametrize("name", ["loss_chunk", "loss_logits"])
@pytest.mark.parametrize("value", ["x", 0, -5])
def test_losses_are_cut_by_whole_numbers(name, value):
    with pytest.raises(UserError, match=rf"T5Config\.{name} is {value!r}, expected a whole number"):
        T5Config(**{name: value})
