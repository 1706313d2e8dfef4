"""The Conformer against a float64 oracle written with loops, and packed rows against single utterances."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.spmd import logical_to_mesh_sharding

from slm_jax.audio.log_mel import LogMelConfig
from slm_jax.errors import UserError
from slm_jax.models import conformer
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder, attention_mask
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import DEFAULT_RULES

SMALL = ConformerConfig(
    layers=2,
    dim=16,
    heads=2,
    conv_kernel=5,
    subsampling_channels=(4, 3),
    log_mel=LogMelConfig(mel_bins=18, mean=-5.0, stddev=3.0),
)
MODES = {
    "full": {"attention": "full"},
    "local": {"attention": "local", "left_context": 3, "right_context": 2, "logit_cap": 5.0},
    "chunk": {"attention": "chunk", "chunk_frames": 4, "left_chunks": 1},
    "own chunk": {"attention": "chunk", "chunk_frames": 3, "left_chunks": 0},
}


@functools.partial(jax.jit, static_argnums=0)
def encode(config: ConformerConfig, variables, speech, segments):
    return ConformerEncoder(config).apply(variables, speech, segments)


def small(**changes) -> ConformerConfig:
    return dataclasses.replace(SMALL, **changes)


def random_parameters(rng, shapes):
    """Parameters of these shapes in which biases and norm scales matter too."""

    def draw(path, leaf):
        noise = jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return 1 + 0.1 * noise if path[-1].key == "scale" else 0.2 * noise

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


def random_variables(rng, config: ConformerConfig):
    speech, segments = jnp.zeros((1, 1, 2560), jnp.int16), jnp.array([[[[1, 0, 2000]]]])
    return random_parameters(
        rng, jax.eval_shape(ConformerEncoder(config).init, jax.random.key(0), speech, segments)
    )


def packed_rows(rng, rows: int, samples: int, loudness: float = 8000.0):
    """int16 [rows, 1, samples]: three ragged utterances a row, none of whole frames; noise between."""
    speech = rng.integers(-32000, 32000, (rows, 1, samples)).astype(np.int16)
    segments = np.zeros((rows, 1, 5, 3), np.int32)
    for row in range(rows):
        start = 0
        for number in (1, 2, 3):
            count = int(rng.integers(700, samples // 3 - 640))
            count += count % 160 == 0
            wave = rng.normal(size=count) * loudness * rng.uniform(0.01, 1)
            speech[row, 0, start : start + count] = np.clip(wave, -32000, 32000)
            segments[row, 0, number] = number, start, count
            start += -(-count // 640) * 640
    return speech, segments


def alone(speech, segments):
    """Each utterance of `packed_rows` in a row of its own: [N, 1, S], segments [N, 1, 1, 3]."""
    found = [(row, *segments[row, 0, e]) for row in range(len(speech)) for e in (1, 2, 3)]
    singles = np.zeros((len(found), 1, speech.shape[-1]), np.int16)
    lengths = np.zeros((len(found), 1, 1, 3), np.int32)
    for index, (row, _, start, count) in enumerate(found):
        singles[index, 0, :count] = speech[row, 0, start : start + count]
        lengths[index, 0, 0] = 1, 0, count
    return singles, lengths, found


# The oracle: one utterance at a time, float64, loops where the module has shifts and masks.


def rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def oracle_conv(x_TMC, kernel, bias):
    frames, bins, _ = x_TMC.shape
    out = np.zeros((-(-frames // 2), -(-bins // 2), kernel.shape[-1])) + bias
    for u in range(out.shape[0]):
        for n in range(out.shape[1]):
            for dt in range(3):
                for dm in range(3):
                    t, m = 2 * u + dt - 1, 2 * n + dm - 1
                    if 0 <= t < frames and 0 <= m < bins:
                        out[u, n] += x_TMC[t, m] @ kernel[dt, dm]
    return out


def oracle_sees(config, query, key):
    if config.attention == "local":
        return -config.left_context <= key - query <= config.right_context
    if config.attention == "chunk":
        return 0 <= query // config.chunk_frames - key // config.chunk_frames <= config.left_chunks
    return True


def oracle_attention(x, p, config):
    query, key, value = (np.einsum("fd,dhc->fhc", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    dim, mixed = config.dim, np.zeros_like(query)
    rates = 1 / 10_000 ** (np.arange(0, dim, 2) / dim)
    for f in range(len(x)):
        for h in range(config.heads):
            scores = {}
            for g in range(len(x)):
                if oracle_sees(config, f, g):
                    angles = (f - g) * rates
                    encoding = np.concatenate([np.sin(angles), np.cos(angles)])
                    position = encoding @ p["position"]["kernel"][:, h]
                    score = (query[f, h] + p["content_bias"][h]) @ key[g, h]
                    score += (query[f, h] + p["position_bias"][h]) @ position
                    score /= np.sqrt(dim // config.heads)
                    if config.logit_cap:
                        score = config.logit_cap * np.tanh(score / config.logit_cap)
                    scores[g] = score
            total = sum(np.exp(s) for s in scores.values())
            mixed[f, h] = sum(np.exp(s) / total * value[g, h] for g, s in scores.items())
    return np.einsum("fhc,hcd->fd", mixed, p["out"]["kernel"])


def oracle_convolution(x, p, config):
    gated = (x @ p["value"]["kernel"]) / (1 + np.exp(-(x @ p["gate"]["kernel"])))
    out, half = np.zeros_like(gated), config.conv_kernel // 2
    for f in range(len(x)):
        for w in range(config.conv_kernel):
            if 0 <= f + w - half < len(x):
                out[f] += gated[f + w - half] * p["depthwise"][w]
    return silu(rms(out, p["norm"]["scale"])) @ p["out"]["kernel"]


def oracle_layer(x, p, config):
    def ffn(x, name):
        return silu(rms(x, p[f"{name}_norm"]["scale"]) @ p[name]["wi"]["kernel"]) @ p[name]["wo"]["kernel"]

    x = x + 0.5 * ffn(x, "ffn_start")
    x = x + oracle_attention(rms(x, p["attention_norm"]["scale"]), p["attention"], config)
    x = x + oracle_convolution(rms(x, p["conv_norm"]["scale"]), p["conv"], config)
    x = x + 0.5 * ffn(x, "ffn_end")
    return rms(x, p["norm"]["scale"])


def oracle_encoder(mel_TM, params, config):
    x = mel_TM[..., None]
    for index in range(2):
        conv = params["subsampling"][f"conv_{index}"]
        x = oracle_conv(x, conv["kernel"], conv["bias"])
        normed = rms(x.reshape(len(x), -1), params["subsampling"][f"norm_{index}"]["scale"])
        x = np.maximum(normed, 0).reshape(x.shape)
    x = np.einsum("tmc,mcd->td", x, params["subsampling"]["out"]["kernel"])
    for layer in range(config.layers):
        x = oracle_layer(x, jax.tree.map(lambda a, index=layer: a[index], params["layers"]), config)
    return x


@pytest.mark.parametrize("mode", MODES)
def test_encoder_matches_oracle(rng, mode):
    config = small(**MODES[mode])
    encoder, variables = ConformerEncoder(config), random_variables(rng, config)
    speech, segments = packed_rows(rng, rows=2, samples=640 * 33)
    mel, mel_ids = encoder.features(jnp.asarray(speech), jnp.asarray(segments))
    frames, ids = jax.jit(lambda *args: encoder.apply(*args, method="encode_features"))(
        variables, mel, mel_ids
    )
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    for row in range(2):
        for number in (1, 2, 3):
            utterance = np.asarray(mel[row, 0], np.float64)[np.asarray(mel_ids[row, 0]) == number]
            expected = oracle_encoder(utterance, params, config)
            found = np.asarray(frames[row, 0])[np.asarray(ids[row, 0]) == number]
            assert len(found) == -(-segments[row, 0, number, 2] // 640)
            np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_layer_matches_oracle(rng, mode):
    config = small(**MODES[mode], conv_kernel=7)
    lengths = rng.integers(1, 14, 3)
    ids = np.zeros((1, 40), np.int32)
    ids[0, : lengths.sum()] = np.repeat([4, 2, 9], lengths)
    x = rng.normal(size=(1, 40, 16)).astype(np.float32)
    around = conformer._surroundings(jnp.asarray(ids), config)
    layer = conformer.ConformerLayer(config)
    variables = random_parameters(rng, jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x), around))
    found, _ = jax.jit(layer.apply)(variables, jnp.asarray(x), around)
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    for number in (4, 2, 9):
        expected = oracle_layer(x[ids == number].astype(np.float64), params, config)
        np.testing.assert_allclose(np.asarray(found)[ids == number], expected, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_alone(rng, mode):
    config = small(**MODES[mode])
    encoder, variables = ConformerEncoder(config), random_variables(rng, config)
    speech, segments = packed_rows(rng, rows=2, samples=640 * 33)
    singles, lengths, found = alone(speech, segments)
    frames_each = [-(-count // 640) for *_, count in found]
    weights = [rng.normal(size=(n, config.dim)).astype(np.float32) / (n * config.dim) for n in frames_each]
    packed_weights = np.zeros((2, 1, 33, config.dim), np.float32)
    single_weights = np.zeros((len(found), 1, 33, config.dim), np.float32)
    for index, (row, _, start, _) in enumerate(found):
        packed_weights[row, 0, start // 640 : start // 640 + frames_each[index]] = weights[index]
        single_weights[index, 0, : frames_each[index]] = weights[index]

    @jax.jit
    def loss_and_frames(variables, speech, segments, weights):
        frames, _ = encoder.apply(variables, speech, segments)
        return jnp.sum(frames * weights), frames

    grad = jax.value_and_grad(loss_and_frames, has_aux=True)
    (_, packed), packed_grads = grad(variables, speech, segments, packed_weights)
    (_, single), single_grads = grad(variables, singles, lengths, single_weights)
    for index, (row, _, start, _) in enumerate(found):
        count, first = frames_each[index], start // 640
        # Of order 1, and summed in another order in float32; a wrong mask would change 0.01 and more.
        np.testing.assert_allclose(packed[row, 0, first : first + count], single[index, 0, :count], atol=1e-4)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(packed_grads), jax.tree.leaves(single_grads), strict=True
    ):
        largest = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, atol=5e-5 * largest, err_msg=jax.tree_util.keystr(path))


def test_frames_outside_segments_are_zero_and_finite(rng):
    """Also where a row is empty: its softmax rows are fully masked, and no gradient is NaN."""
    variables = random_variables(rng, SMALL)
    speech, segments = packed_rows(rng, rows=2, samples=640 * 12)
    segments[1] = 0

    @jax.jit
    @jax.value_and_grad
    def energy(variables):
        return jnp.sum(encode(SMALL, variables, speech, segments)[0] ** 2)

    frames, ids = encode(SMALL, variables, speech, segments)
    assert not np.any(np.asarray(frames)[np.asarray(ids) == 0])
    assert not np.any(ids[1]) and np.any(ids[0])
    value, grads = energy(variables)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_slots_are_independent(rng):
    variables = random_variables(rng, SMALL)
    speech, segments = packed_rows(rng, rows=6, samples=640 * 12)
    shape = (2, 3)
    frames, ids = encode(SMALL, variables, speech, segments)
    slotted, slotted_ids = encode(
        SMALL, variables, speech.reshape(*shape, -1), segments.reshape(*shape, *segments.shape[2:])
    )
    assert slotted.shape == (2, 3, 12, 16) and slotted_ids.dtype == jnp.int32
    np.testing.assert_allclose(slotted.reshape(frames.shape), frames, atol=1e-6)
    np.testing.assert_array_equal(slotted_ids.reshape(ids.shape), ids)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"scan_unroll": 2}])
def test_remat_and_unrolling_change_nothing(rng, change):
    variables = random_variables(rng, SMALL)
    speech, segments = packed_rows(rng, rows=1, samples=640 * 12)
    weights = rng.normal(size=(1, 1, 12, 16)).astype(np.float32)

    def gradients(config):
        loss = jax.value_and_grad(lambda v: jnp.mean(encode(config, v, speech, segments)[0] * weights))
        return jax.jit(loss)(variables)

    for one, other in zip(
        jax.tree.leaves(gradients(SMALL)), jax.tree.leaves(gradients(small(**change))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_close_to_float32_and_keeps_parameters(rng):
    speech, segments = packed_rows(rng, rows=2, samples=640 * 20)
    errors = []
    for _ in range(5):
        variables = random_variables(rng, SMALL)
        exact, _ = encode(SMALL, variables, speech, segments)
        rough, _ = encode(small(dtype="bfloat16"), variables, speech, segments)
        assert rough.dtype == jnp.bfloat16
        error = np.abs(np.asarray(rough, np.float32) - np.asarray(exact))
        errors.append(error.mean() / np.abs(np.asarray(exact)).mean())
    # Of the median network: one in ten hangs on small differences of large numbers.
    assert 0 < np.median(errors) < 0.03
    init = ConformerEncoder(small(dtype="bfloat16")).init
    fresh = jax.eval_shape(init, jax.random.key(0), speech, segments)
    assert {x.dtype.name for x in jax.tree.leaves(fresh)} == {"float32"}


def test_dropout_acts_only_when_not_deterministic(rng):
    config = small(dropout=0.5)
    encoder, variables = ConformerEncoder(config), random_variables(rng, config)
    speech, segments = packed_rows(rng, rows=1, samples=640 * 12)
    without, _ = encode(SMALL, variables, speech, segments)
    np.testing.assert_array_equal(encode(config, variables, speech, segments)[0], without)

    @jax.jit
    def dropped(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return encoder.apply(variables, speech, segments, deterministic=False, rngs=rngs)[0]

    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert np.abs(dropped(1) - dropped(2)).max() > 0.1
    assert np.abs(dropped(1) - without).max() > 0.1


def test_chunks_count_from_the_segment_start():
    ids = jnp.array([[5, 5, 5, 2, 2, 2, 2, 2, 0, 0]])
    mask = attention_mask(ids, small(attention="chunk", chunk_frames=2))[0, 0]
    expected = np.zeros((10, 10), bool)
    for first, last in ((0, 2), (2, 3), (3, 5), (5, 7), (7, 8)):
        expected[first:last, first:last] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("tiny", 1.5e6, 2.0e6), ("600m", 0.59e9, 0.62e9), ("2b", 1.78e9, 1.86e9)]
)
def test_published_sizes_from_shapes_alone(name, low, high):
    encoder = ConformerEncoder(conformer.preset(name))
    speech = jax.ShapeDtypeStruct((1, 1, 6400), jnp.int16)
    segments = jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.int32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), speech, segments)
    assert low < sum(x.size for x in jax.tree.leaves(variables)) < high
    assert encoder.samples_per_frame == 640 and encoder.packs and encoder.dim == encoder.config.dim


def test_every_parameter_names_its_axes_and_shards_on_a_mesh(rng):
    """On 8 devices with the default rules: kernels are really split, and frames equal those of one device."""
    config = small(dim=32, heads=4)
    encoder = ConformerEncoder(config)
    speech, segments = packed_rows(rng, rows=4, samples=640 * 12)
    boxed = jax.jit(encoder.init)(jax.random.key(0), speech, segments)
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned)
        assert len(leaf.names) == leaf.value.ndim and None not in leaf.names
    # Unboxed before the mesh is set: inside, `unbox` would constrain arrays that are not on the mesh yet.
    variables = nn.unbox(boxed)
    single, _ = jax.jit(encoder.apply)(variables, speech, segments)
    mesh = make_mesh(2, 2, 2)
    shardings = logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, list(DEFAULT_RULES))
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(DEFAULT_RULES)):
        placed = jax.device_put(variables, shardings)
        sharded, _ = jax.jit(encoder.apply)(placed, speech, segments)
    query = placed["params"]["layers"]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (2, 16, 2, 8)
    assert len(sharded.sharding.device_set) == 8
    # Sums over devices come in another order.
    assert np.linalg.norm(np.asarray(sharded) - single) <= 1e-4 * np.linalg.norm(single)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: conformer.preset("600M "), "600m"),
        (lambda: small(attention="chunks"), "chunk"),
        (lambda: small(remat="ful"), "full"),
        (lambda: small(heads=3), "does not divide dim 16"),
        (lambda: small(conv_kernel=4), "odd"),
        (lambda: small(dim=15, heads=3), "even"),
    ],
)
def test_a_users_mistake_names_the_valid_choice(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_refuses_samples_that_do_not_fill_frames():
    with pytest.raises(ValueError, match="no multiple of the frame's 640"):
        ConformerEncoder(SMALL).features(
            jnp.zeros((1, 1, 800), jnp.int16), jnp.zeros((1, 1, 1, 3), jnp.int32)
        )
