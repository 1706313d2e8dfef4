"""wav2vec 2.0 and HuBERT against transformers', in float32, with every weight drawn at random."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from exchange import check_shapes, infos, named, perturb, to_ours, to_theirs
from safetensors.numpy import save_file
from with_encoder import check_in_slm

from slm_jax.checkpoints.families.wav2vec2 import FAMILY
from slm_jax.errors import UserError
from slm_jax.models import wav2vec2
from slm_jax.models.encoders import encoder_class, encoder_kind
from slm_jax.models.networks import abstract_params
from slm_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Encoder

LARGE: dict[str, Any] = {
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_prob": 0.05,
    "vocab_size": 20,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "num_codevectors_per_group": 4,
}
FIELDS = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "conv_dim",
    "conv_kernel", "conv_stride", "conv_bias", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups",
    "hidden_act", "feat_extract_activation", "layer_norm_eps",
)  # fmt: skip
TAPS, STRIDES = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]
CONFIGS: dict[str, dict[str, Any]] = {
    name: LARGE | dict(zip(FIELDS, values, strict=True))
    for name, values in {
        "hubert": ("hubert", 2, 36, 3, 40, [8] * 7, TAPS, STRIDES, True, 16, 4, "gelu", "gelu", 1e-5),
        "wav2vec2": ("wav2vec2", 3, 40, 5, 20, [6, 8, 7, 8, 9, 8, 12], TAPS, STRIDES, False, 7, 2, "relu",
                     "gelu", 1e-3),
        "other strides": ("wav2vec2", 1, 14, 7, 50, [8, 10, 6], [9, 4, 3], [4, 5, 2], True, 12, 7, "gelu",
                          "silu", 1e-5),
    }.items()
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def encode(config: Wav2Vec2Config, params, speech, segments):
    return Wav2Vec2Encoder(config).apply({"params": params}, speech, segments)


def theirs(rng, name: str, head: str = "Model", **changes) -> Any:
    settings = CONFIGS[name] | changes
    family = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[settings["model_type"]]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, family + head)(config).eval()
    perturb(model, rng)
    return model


def ragged(rng, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 [2, 2, S]: one utterance that fills the slot, two ragged ones and none; noise behind them."""
    speech = rng.integers(-32000, 32000, (2, 2, samples)).astype(np.int16)
    lengths = np.array([[samples, rng.integers(420, 1000)], [rng.integers(700, samples), 0]])
    segments = np.zeros((2, 2, 1, 3), np.int32)
    segments[..., 0, 0], segments[..., 0, 2] = [[1, 2], [1, 0]], lengths
    for index in np.ndindex(2, 2):
        wave = rng.normal(size=lengths[index]) * rng.uniform(20, 9000) + rng.uniform(-500, 500)
        speech[index][: lengths[index]] = np.clip(wave, -32000, 32000)
    return speech, segments


def expected_frames(model, waves: list[np.ndarray], normalize: bool = True) -> list[np.ndarray]:
    """Their frames of each wave in one padded batch, with the attention mask; theirs alone must agree."""
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    waves = [wave / np.float32(32768) for wave in waves]
    inputs = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = model(**inputs).last_hidden_state.numpy()
        found = []
        for row, wave in enumerate(waves):
            inputs = extractor(wave, sampling_rate=16_000, return_tensors="pt")
            found.append(model(inputs["input_values"]).last_hidden_state.numpy()[0])
            # No padding leaks into frames of the utterance.
            scale = np.abs(found[row]).max()
            np.testing.assert_allclose(padded[row, : len(found[row])], found[row], atol=1e-4 * scale)
    return found


@pytest.mark.parametrize(
    ("name", "normalize"),
    [("hubert", True), ("wav2vec2", True), ("other strides", True), ("wav2vec2", False)],
)
def test_encoder_matches_transformers(rng, name, normalize):
    model = theirs(rng, name)
    config = FAMILY.config_of(model.config.to_dict() | {"do_normalize": normalize}, infos(named(model)))
    assert config.published_as == model.config.model_type and config.normalize == normalize
    params = to_ours(FAMILY, config, named(model))
    samples = config.stride * 25
    speech, segments = ragged(rng, samples)
    frames, ids = encode(config, params, speech, segments)
    assert frames.shape == (2, 2, speech.shape[-1] // config.stride, config.dim) and ids.dtype == jnp.int32
    indices = [(0, 0), (0, 1), (1, 0)]
    waves = [speech[index][: segments[index][0, 2]] for index in indices]
    for index, expected in zip(indices, expected_frames(model, waves, normalize), strict=True):
        count = len(expected)
        number, _, length = segments[index][0]
        assert count == (length - config.receptive_field) // config.stride + 1
        np.testing.assert_array_equal(ids[index], np.where(np.arange(ids.shape[-1]) < count, number, 0))
        error = np.abs(frames[index][:count] - expected).max() / np.abs(expected).max()
        print(name, "relative error", error)
        assert error <= 1e-4
        assert not np.any(frames[index][count:])
    assert not np.any(frames[1, 1]) and not np.any(ids[1, 1])


def test_utterance_too_short_for_a_frame_has_none(rng):
    model = theirs(rng, "hubert")
    config = FAMILY.config_of(model.config.to_dict(), {})
    speech, segments = ragged(rng, 1600)
    segments[0, 0, 0, 2], segments[0, 1, 0, 2] = 399, 400
    frames, ids = encode(config, to_ours(FAMILY, config, named(model)), speech, segments)
    assert not np.any(frames[0, 0]) and not np.any(ids[0, 0])
    np.testing.assert_array_equal(ids[0, 1], [2, 0, 0, 0, 0])
    assert np.isfinite(frames).all()


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize(
    ("name", "prefix"), [("hubert", ""), ("hubert", "hubert."), ("wav2vec2", "wav2vec2.")]
)
def test_round_trip_is_exact(rng, name, prefix, old_names):
    model = theirs(rng, name)
    tensors = named(model, prefix)
    if old_names:
        renamed = {"original0": "weight_g", "original1": "weight_v"}
        for new, old in renamed.items():
            found = next(key for key in tensors if key.endswith(new))
            tensors[found.replace(f"parametrizations.weight.{new}", old)] = tensors.pop(found)
    config = FAMILY.config_of(model.config.to_dict(), infos(tensors))
    params = to_ours(FAMILY, config, tensors)
    back = to_theirs(FAMILY.pieces(config, infos(tensors)), params)
    assert set(tensors) - set(back) == {f"{prefix}masked_spec_embed"}
    assert all(np.array_equal(back[key], tensors[key]) for key in back)


@pytest.mark.parametrize(
    ("name", "head"), [("hubert", "ForCTC"), ("wav2vec2", "ForPreTraining"), ("wav2vec2", "ForCTC")]
)
def test_model_with_a_head_converts_and_transformers_reads_what_is_written(rng, tmp_path, name, head):
    model = theirs(rng, name, head)
    tensors = named(model)
    config = FAMILY.config_of(model.config.to_dict(), infos(tensors))
    params = to_ours(FAMILY, config, tensors)
    written = to_theirs(FAMILY.hf_pieces(config), params)
    (tmp_path / "config.json").write_text(json.dumps(FAMILY.hf_config(config)))
    arrays = {key: np.ascontiguousarray(value) for key, value in written.items()}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, FAMILY.hf_config(config)["architectures"][0])
    read, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    wave = torch.from_numpy(rng.normal(size=(1, 4000))).float()
    with torch.no_grad():
        expected = model.base_model(wave).last_hidden_state
        assert torch.equal(read.eval()(wave).last_hidden_state, expected)
    assert FAMILY.config_of(read.config.to_dict(), infos(written)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feat_extract_norm": "group"}, "feat_extract_norm 'group', expected 'layer'.*large variety"),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm False, expected True"),
        ({"add_adapter": True}, "add_adapter True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim 16"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm True"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm False"),
        ({"hidden_act": "selu"}, "hidden_act 'selu'"),
        ({"num_attention_heads": 5}, "num_attention_heads 5.*hidden_size, 36"),
        ({"conv_kernel": [10, 3]}, "2 numbers in conv_kernel.*conv_dim, 7"),
        ({"conv_dim": 512}, "conv_dim 512.*list"),
        ({"conv_dim": [512, "a"]}, "conv_dim 'a'.*whole number"),
        ({"conv_bias": "no"}, "conv_bias 'no'.*true or false"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps '1e-5'.*number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan.*number above 0"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps inf.*number above 0"),
        ({"model_type": "wavlm"}, "model_type 'wavlm'"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    config = transformers.HubertConfig(**CONFIGS["hubert"]).to_dict()
    with pytest.raises(UserError, match=message):
        FAMILY.config_of(config | change, {})


def test_base_variety_is_refused_though_config_does_not_say(rng):
    """Its config.json need not name what transformers has as default."""
    config = transformers.HubertConfig(**CONFIGS["hubert"]).to_dict()
    del config["feat_extract_norm"]
    with pytest.raises(UserError, match="feat_extract_norm 'group'"):
        FAMILY.config_of(config, {})


def test_remat_and_unrolling_change_nothing(rng):
    model = theirs(rng, "other strides", num_hidden_layers=3)
    config = FAMILY.config_of(model.config.to_dict(), {})
    params = to_ours(FAMILY, config, named(model))
    speech, segments = ragged(rng, 1600)

    def gradients(config):
        loss = jax.grad(lambda p: jnp.sum(encode(config, p, speech, segments)[0] ** 2))
        return jax.tree.leaves(jax.jit(loss)(params))

    changed = dataclasses.replace(config, remat="full", scan_unroll=3)
    for one, other in zip(gradients(config), gradients(changed), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(one).max()))


def test_fresh_positions_are_as_large_as_their_direction():
    config = Wav2Vec2Config(layers=1, dim=64, heads=2, mlp_dim=8, position_kernel=16, position_groups=4)
    position = wav2vec2.PositionConv(config)
    variables: Any = position.init(jax.random.key(0), jnp.zeros((1, 9, 64)))["params"]
    norms = jnp.sqrt(jnp.sum(variables["direction"].value ** 2, axis=(1, 2)))
    np.testing.assert_allclose(variables["length"].value, norms, rtol=0.1)


def test_speech_that_does_not_fit_is_refused():
    encoder = Wav2Vec2Encoder(Wav2Vec2Config())
    with pytest.raises(ValueError, match=r"330 samples.*320"):
        encoder.features(jnp.zeros((1, 1, 330), jnp.int16), jnp.zeros((1, 1, 1, 3), jnp.int32))
    with pytest.raises(ValueError, match="2 utterances"):
        encoder.features(jnp.zeros((1, 1, 640), jnp.int16), jnp.zeros((1, 1, 2, 3), jnp.int32))


def test_bfloat16_computes_close_to_float32(rng):
    model = theirs(rng, "other strides")
    config = FAMILY.config_of(model.config.to_dict(), {})
    params = to_ours(FAMILY, config, named(model))
    speech, segments = ragged(rng, 6400)
    exact: Any = encode(config, params, speech, segments)[0]
    rough: Any = encode(dataclasses.replace(config, dtype="bfloat16"), params, speech, segments)[0]
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - np.asarray(exact))
    assert 0 < error.mean() < 0.03 * np.abs(exact).mean()


def test_encoder_in_an_slm(rng):
    config = Wav2Vec2Config(
        layers=2,
        dim=12,
        heads=3,
        mlp_dim=16,
        conv_dims=(8, 8, 8),
        conv_kernels=(10, 8, 5),
        conv_strides=(5, 8, 8),
        position_kernel=6,
        position_groups=2,
    )
    assert encoder_kind(config) == "wav2vec2" and encoder_class(config) is Wav2Vec2Encoder
    check_in_slm(rng, config)


@pytest.mark.parametrize("name", ["hubert_large", "xls_r_2b"])
def test_presets_have_the_published_shapes(name):
    config = wav2vec2.preset(name)
    settings = FAMILY.hf_config(config)
    family = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[config.published_as]
    with torch.device("meta"):
        their_config = getattr(transformers, f"{family}Config")(**settings)
        check_shapes(FAMILY, config, getattr(transformers, f"{family}Model")(their_config))
    abstract = jax.tree.leaves(abstract_params(config))
    assert sum(leaf.size for leaf in abstract) > {"hubert_large": 315e6, "xls_r_2b": 2.1e9}[name]
    assert (config.stride, config.receptive_field) == (320, 400)


def test_unknown_preset_is_refused():
    assert wav2vec2.preset("mms_1b", remat="full").remat == "full"
    with pytest.raises(UserError, match="did you mean 'hubert_large'"):
        wav2vec2.preset("hubert-large")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads is 3.*dim 1024"),
        ({"position_groups": 3}, "position_groups is 3.*dim 1024"),
        ({"layers": 0}, "layers is 0"),
        ({"conv_dims": (8, 0)}, "conv_dims is 0"),
        ({"conv_strides": [5, 2]}, "conv_strides has 2 numbers.*7 as conv_dims"),
        ({"conv_dims": (), "conv_kernels": (), "conv_strides": ()}, "conv_dims has 0 numbers"),
        ({"published_as": "huber"}, "did you mean 'hubert'"),
        ({"conv_activation": "tanh"}, "conv_activation is 'tanh'"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Wav2Vec2Config(**change)
